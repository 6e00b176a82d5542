//! Which file holds which part of a disk.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::Result;
use super::file::HostImage;
use super::open::{OpenMode, open};
use super::reader::{DiskReader, Extent};

/// A range of the disk in one state; serialised it has the keys of
/// `qemu-img map --output=json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MapEntry {
    /// In bytes of the disk.
    pub start: u64,
    /// In bytes.
    pub length: u64,
    /// Which level has it: 0 is the top, more is further down.
    pub depth: usize,
    /// Whether any level has it.
    pub present: bool,
    /// Whether it is known to read as zeros.
    pub zero: bool,
    /// Whether it may hold anything but zeros.
    pub data: bool,
    /// Never, here.
    pub compressed: bool,
    /// Where it is in the file, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Which file it is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filename: Option<PathBuf>,
}

/// Gives each range of the disk at `path` to `each`, in order and without gaps.
///
/// # Errors
/// Whatever keeps it from being opened and read so.
pub fn map(path: &Path, mode: OpenMode, mut each: impl FnMut(MapEntry)) -> Result<()> {
    let image = open(path, mode)?;
    let disk = DiskReader::load(&image)?;
    let mut start = 0;
    while let Some(extent) = disk.extent(start, u64::MAX) {
        start = extent.range.end;
        for entry in entries_of(&disk, &extent)? {
            each(entry);
        }
    }
    Ok(())
}

/// One entry for an extent; several for one of a raw image with holes.
fn entries_of(disk: &DiskReader<HostImage>, extent: &Extent) -> Result<Vec<MapEntry>> {
    let depth_of = |level| disk.depth() - 1 - level;
    let Some(place) = extent.place else {
        return Ok(vec![MapEntry {
            start: extent.range.start,
            length: extent.range.end - extent.range.start,
            depth: depth_of(0),
            present: false,
            zero: true,
            data: false,
            compressed: false,
            offset: None,
            filename: None,
        }]);
    };
    let entry = |start: u64, end: u64, data: bool| MapEntry {
        start,
        length: end - start,
        depth: depth_of(place.level),
        present: true,
        zero: !data,
        data,
        compressed: false,
        offset: Some(place.offset + (start - extent.range.start)),
        filename: Some(disk.path(place.level).to_owned()),
    };
    let mut entries = Vec::new();
    let mut start = extent.range.start;
    // In an expandable image, a hole is a matter of its clusters alone.
    if !disk.is_plain(place.level) {
        return Ok(vec![entry(start, extent.range.end, true)]);
    }
    while start < extent.range.end {
        let data = disk.next_data(start, extent.range.end - start)?;
        let data = data.map_or(extent.range.end..extent.range.end, |data| data.range);
        let data_start = data.start.min(extent.range.end);
        if start < data_start {
            entries.push(entry(start, data_start, false));
        }
        let data_end = data.end.min(extent.range.end);
        if data_start < data_end {
            entries.push(entry(data_start, data_end, true));
        }
        start = data_end.max(data_start);
    }
    Ok(entries)
}
