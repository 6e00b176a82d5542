//! The bytes on disk: header, BAT, format extension, `DiskDescriptor.xml`,
//! `snapshots.json`.
//!
//! Knows every field and its limits, and turns untrusted bytes into checked
//! types. Does no I/O and knows nothing of files, threads or virtio.

mod bat;
mod cluster_set;
mod descriptor;
mod extension;
mod foreign;
mod growth;
mod header;
mod notes;
mod packing;
mod units;

pub use bat::{BatProblem, BatScan, BatScanner, scan_bat, scan_bat_with};
pub use cluster_set::ClusterSet;
pub use descriptor::{
    Descriptor, DescriptorError, EditError, Guid, GuidError, Image, ImageKind, Shot, XmlError,
};
pub use extension::{BitmapId, DirtyBitmap, Extension, ExtensionError};
pub use foreign::ForeignFormat;
pub use growth::{Fate, Growth};
pub use header::{Geometry, Header, HeaderError, InUse, TooLarge, Version, is_marked_in_use};
pub use notes::{SnapshotNote, SnapshotNotes};
pub use packing::{Packing, is_zero, zero_blocks};
pub use units::{ClusterSize, GuestCluster, HostCluster, SECTOR_SIZE, Sector};

use header::{HEADS, SECTORS_PER_TRACK, cylinders};
