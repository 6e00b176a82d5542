//! How long the file of a new image would be.

use std::path::Path;

use serde::Serialize;

use super::create::new_header;
use super::error::Result;
use super::file::HostImage;
use super::open::OpenMode;
use super::reader::DiskReader;
use super::source::{DiskFormat, Source};
use crate::format::{ClusterSize, Sector};

/// Lengths of a file in bytes, holes included; serialised it has the keys of
/// `qemu-img measure --output=json`. The descriptor of a bundle is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measure {
    /// That a conversion needs at most: what is known to read as zeros takes nothing.
    pub required: u64,
    /// Once the guest has written everywhere.
    pub fully_allocated: u64,
}

/// Measures an empty disk of `size`, in clusters of `cluster` or the default.
///
/// # Errors
/// A size that the format cannot hold.
pub fn measure_new(
    size: Sector,
    format: DiskFormat,
    cluster: Option<ClusterSize>,
) -> Result<Measure> {
    measure_clusters(Path::new("the new image"), size, format, cluster, 0)
}

/// Measures what a copy of the disk at `path` would take; `cluster` as for a
/// conversion.
///
/// # Errors
/// Whatever keeps it from being read; a size that the format cannot hold.
pub fn measure_copy(
    path: &Path,
    source_format: Option<DiskFormat>,
    mode: OpenMode,
    format: DiskFormat,
    cluster: Option<ClusterSize>,
) -> Result<Measure> {
    let source = Source::open(path, source_format, mode)?;
    let disk = &source.disk;
    let cluster = cluster.unwrap_or(disk.cluster());
    let used = clusters_with_data(disk, cluster)?;
    measure_clusters(path, disk.disk_size(), format, Some(cluster), used)
}

fn measure_clusters(
    path: &Path,
    size: Sector,
    format: DiskFormat,
    cluster: Option<ClusterSize>,
    used: u64,
) -> Result<Measure> {
    if format == DiskFormat::Raw {
        return Ok(Measure {
            required: size.bytes(),
            fully_allocated: size.bytes(),
        });
    }
    let cluster = cluster.unwrap_or(ClusterSize::DEFAULT);
    let header = new_header(path, size, cluster)?;
    let geometry = header.geometry();
    let with = |clusters: u64| geometry.data_start + clusters * cluster.bytes();
    Ok(Measure {
        required: with(used),
        fully_allocated: with(geometry.disk_clusters()),
    })
}

/// How many clusters of that size hold anything but known zeros.
fn clusters_with_data(disk: &DiskReader<HostImage>, cluster: ClusterSize) -> Result<u64> {
    const AT_ONCE: u64 = 1 << 30;
    let mut count = 0;
    // Up to here, clusters are counted.
    let mut counted = 0;
    while let Some(data) = disk.next_data(counted << cluster.shift(), AT_ONCE)? {
        let first = data.range.start >> cluster.shift();
        let after = cluster.count_for(data.range.end);
        count += after - first;
        counted = after;
    }
    Ok(count)
}
