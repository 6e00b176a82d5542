//! Off-line work on images: opening, creating, checking, converting, snapshots.
//!
//! Knows files, folders, locks and the order in which changes must reach the
//! disk. Must not know how a guest is served, nor how results are shown: the
//! operations return reports, `ploop-img` prints them.

mod bitmaps;
mod bundle;
mod check;
mod compact;
mod compare;
mod convert;
mod create;
mod delta;
mod error;
mod fault;
mod file;
mod folder;
mod info;
mod layout;
mod map;
mod measure;
mod open;
mod ownership;
mod progress;
mod reader;
mod repair;
mod resize;
mod size;
mod snapshot;
mod source;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod version;

pub use bitmaps::{change_bitmaps, list_bitmaps};
pub use bundle::{Bundle, Location, NewDescriptor};
pub use check::{CheckReport, Repair, check, check_served};
pub use compact::compact;
pub use compare::{CompareError, Comparison, Difference, Side, compare};
pub use convert::{Conversion, Destination, Origin};
pub use create::{create, is_bare_name};
pub use delta::{Delta, read_header};
pub use error::{ImageError, Result};
pub use file::{HostImage, ImageFile};
pub use folder::{Folder, NewFile, NewFolder};
pub use info::{BitmapNote, DiskInfo, FormatSpecific, ImageInfo, PloopInfo, info};
pub use layout::{Layout, LevelLayout, Part, Stretch, layout};
pub use map::{MapEntry, map, map_since};
pub use measure::{Measure, measure_copy, measure_new};
pub use open::{Access, OpenImage, OpenMode, bundle_around, open};
pub use progress::Progress;
pub use resize::{NewSize, Shrink, require_nothing_hidden, resize, size_after};
#[cfg(all(test, not(ploop_loom)))]
pub(crate) use snapshot::MergeLevel;
pub(crate) use snapshot::{
    Lift, LiftStep, LiftedImages, NewDelta, described, is_described, list_of, note_of, range,
    remove_leaf_beside,
};
pub use snapshot::{
    NewSnapshot, SnapshotInfo, create_snapshot, delete_snapshot, find_snapshot, list_snapshots,
    merge_snapshots, switch_snapshot,
};
pub use source::DiskFormat;
pub use version::change_version;
