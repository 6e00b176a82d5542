//! The bytes on disk: header, BAT, format extension, `DiskDescriptor.xml`.
//!
//! Knows every field and its limits, and turns untrusted bytes into checked
//! types. Does no I/O and knows nothing of files, threads or virtio.

mod header;
mod units;

pub use header::{Geometry, Header, HeaderError, InUse, Version};
pub use units::{ClusterSize, GuestCluster, HostCluster, SECTOR_SIZE, Sector};
