//! Which file holds which part of a disk.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::{ImageError, Result};
use super::file::HostImage;
use super::open::{OpenImage, OpenMode, look_at, not_a_bundle};
use super::reader::{DiskReader, Extent};
use crate::format::Guid;

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
    let (_image, disk) = DiskReader::open(path, mode)?;
    each_extent(&disk, |extent| {
        entries_of(&disk, extent)?.into_iter().for_each(&mut each);
        Ok(())
    })
}

/// Gives each range of the disk at `path` to `each`, in order, that has changed since
/// `snapshot`, which it lies on: what a level above that snapshot has a cluster for, whatever
/// is in it, and what is behind the end that the disk had then. Whoever has the disk as it was
/// then, and copies these ranges over it, has it as it is.
///
/// # Errors
/// There is no such snapshot, it is the present state, or it is not below what is looked at;
/// or as [`map`].
pub fn map_since(
    path: &Path,
    mode: OpenMode,
    snapshot: Guid,
    mut each: impl FnMut(MapEntry),
) -> Result<()> {
    let (_image, then, disk) = look_at(path, mode, |image| {
        let then = level_of(&image, path, snapshot)?;
        let disk = DiskReader::load(&image)?;
        Ok((image, then, disk))
    })?;
    let old_end = disk.size_of(then).bytes();
    each_extent(&disk, |mut extent| {
        if extent.place.is_none_or(|place| place.level <= then) {
            // Behind the old end, the snapshot and those below it have nothing.
            let behind = extent.range.end > old_end && extent.place.is_none();
            if !behind {
                return Ok(());
            }
            extent.range.start = extent.range.start.max(old_end);
        }
        entries_of(&disk, extent)?.into_iter().for_each(&mut each);
        Ok(())
    })
}

/// The level that `snapshot` is, of a disk that has changed since.
fn level_of(image: &OpenImage, path: &Path, snapshot: Guid) -> Result<usize> {
    let Some(bundle) = &image.bundle else {
        return Err(not_a_bundle(path));
    };
    bundle.require(snapshot)?;
    if snapshot == bundle.descriptor().top() {
        return Err(ImageError::PresentState {
            path: bundle.path().to_owned(),
            guid: snapshot,
        });
    }
    let mut levels = image.guids().into_iter();
    levels
        .position(|guid| guid == Some(snapshot))
        .ok_or_else(|| ImageError::NotBelow {
            path: bundle.path().to_owned(),
            guid: snapshot,
            above: image.top.filter(|_| !image.is_top()),
        })
}

/// Gives all extents to `each`, in order.
pub(super) fn each_extent(
    disk: &DiskReader<HostImage>,
    mut each: impl FnMut(Extent) -> Result<()>,
) -> Result<()> {
    let mut start = 0;
    while let Some(extent) = disk.extent(start, u64::MAX) {
        start = extent.range.end;
        each(extent)?;
    }
    Ok(())
}

/// One entry for an extent; several for one of a raw image with holes.
pub(super) fn entries_of(disk: &DiskReader<HostImage>, extent: Extent) -> Result<Vec<MapEntry>> {
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
