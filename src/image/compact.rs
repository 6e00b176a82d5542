//! Giving back the space of an image: zeros become holes, and clusters move from
//! the end of the file into holes in front of them.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::convert::write_data;
use super::delta::Delta;
use super::error::{IoContext, Result};
use super::file::{ImageFile, rename_opening};
use super::open::{Access, OpenMode, image_of, open};
use super::progress::{Progress, check_cancelled};
use super::repair::{examine_as, free_leaks};
use crate::format::{GuestCluster, HostCluster, InUse, Packing, SECTOR_SIZE, is_zero, zero_blocks};
use crate::ploop::Level;
use crate::storage::HostFile;

/// How much of a file is looked at at once.
const CHUNK: u64 = 4 << 20;

/// Compacts all images of the disk at `path`. Gives back how many bytes less it
/// takes on the host.
///
/// # Errors
/// An image that is in use or not sound, or any I/O error.
pub fn compact(path: &Path, progress: &dyn Progress) -> Result<u64> {
    let image = open(path, OpenMode::new(Access::Repair))?;
    let levels = || image.chain.levels.iter().zip(&image.files);
    let mut total = 0;
    for (level, file) in levels() {
        if *level == Level::Ploop {
            Delta::load(image_of(file)?)?.require_sound()?;
        }
        total += image_of(file)?
            .file_len()
            .context(&file.path, "get the length")?;
    }
    progress.begin(total);
    let before = space_of(&image.files)?;
    let mut meter = Meter { progress, done: 0 };
    for (index, (level, file)) in levels().enumerate() {
        let file = image_of(file)?;
        match level {
            Level::Ploop => compact_delta(&mut Delta::load(file)?, index == 0, &mut meter)?,
            Level::Plain { .. } => compact_plain(&file, &mut meter)?,
        }
    }
    let after = space_of(&image.files)?;
    check_cancelled(progress, path, "what was gained so far stays")?;
    Ok(before.saturating_sub(after))
}

/// What files take on the host, in bytes.
fn space_of(files: &[HostFile]) -> Result<u64> {
    let blocks = files.iter().map(|file| {
        let metadata = file.file.metadata().context(&file.path, "look at")?;
        Ok(metadata.blocks() * SECTOR_SIZE)
    });
    blocks.sum()
}

/// Adds up what is done of several files.
struct Meter<'a> {
    progress: &'a dyn Progress,
    done: u64,
}

impl Meter<'_> {
    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        self.progress.done(self.done);
    }
}

/// There are no entries in a plain image, only holes to be made.
fn compact_plain(file: &impl ImageFile, meter: &mut Meter<'_>) -> Result<()> {
    rename_opening(file)?;
    let len = file.file_len().context(file.path(), "get the length")?;
    let mut start = 0;
    while start < len && !meter.progress.is_cancelled() {
        let end = (start + CHUNK).min(len);
        punch_zeros(file, start, end)?;
        meter.add(end - start);
        start = end;
    }
    file.sync().context(file.path(), "sync")
}

/// Compacts one image. `is_base` says that nothing lies below it, so that a
/// cluster of zeros may go; above others it has to stay, to hide theirs.
fn compact_delta<F: ImageFile>(
    delta: &mut Delta<F>,
    is_base: bool,
    meter: &mut Meter<'_>,
) -> Result<()> {
    delta.begin()?;
    let zeros = punch_clusters(delta, meter)?;
    if is_base {
        for guest in &zeros {
            delta.set_entry(*guest, None);
        }
        delta.write_entries(zeros)?;
        // Before their clusters are used for others.
        delta.sync()?;
    }
    move_down(delta)?;
    let findings = examine_as(delta, InUse::Closed)?;
    free_leaks(delta, &findings)?;
    delta.finish(InUse::Closed)
}

/// Makes holes where mapped clusters are zero. Gives back those that are nothing
/// but zeros.
fn punch_clusters<F: ImageFile>(
    delta: &Delta<F>,
    meter: &mut Meter<'_>,
) -> Result<Vec<GuestCluster>> {
    let cluster = delta.geometry().cluster.bytes();
    let mut zeros = Vec::new();
    for guest in (0..delta.geometry().entries).map(GuestCluster) {
        if meter.progress.is_cancelled() {
            break;
        }
        let Some(start) = delta.lookup(guest) else {
            continue;
        };
        let mut has_data = false;
        for piece in (start..start + cluster).step_by(CHUNK as usize) {
            let end = (piece + CHUNK).min(start + cluster);
            has_data |= punch_zeros(delta.file(), piece, end)?;
        }
        if !has_data {
            zeros.push(guest);
        }
        meter.add(cluster);
    }
    Ok(zeros)
}

/// Makes holes where there are blocks of zeros, at most [`CHUNK`] at once. Says
/// whether anything else is there.
fn punch_zeros(file: &impl ImageFile, start: u64, end: u64) -> Result<bool> {
    let path = file.path();
    let mut has_data = false;
    let mut at = start;
    while at < end {
        let data = file.next_data(at).context(path, "seek in")?;
        let Some(data) = data.filter(|data| data.start < end) else {
            break;
        };
        at = data.end.min(end);
        let mut bytes = vec![0; (at - data.start) as usize];
        file.read_exact_at(&mut bytes, data.start)
            .context(path, "read")?;
        has_data |= !is_zero(&bytes);
        for hole in zero_blocks(&bytes, data.start) {
            file.punch(hole).context(path, "punch a hole")?;
        }
    }
    Ok(has_data)
}

/// Moves the last clusters of the file into unused ones in front of them. A cut
/// leaves each where it was or where it goes to; both hold the same.
fn move_down<F: ImageFile>(delta: &mut Delta<F>) -> Result<()> {
    let geometry = *delta.geometry();
    let scan = delta.scan()?;
    let first = geometry.first_host_cluster().0;
    let packing = Packing::new(&geometry, scan.mapped);
    let mut free = (first..packing.end())
        .map(HostCluster)
        .filter(|host| !scan.used.contains(*host));
    let mut moved = Vec::new();
    let mut buffer = vec![0; geometry.cluster.bytes() as usize];
    for guest in (0..geometry.entries).map(GuestCluster) {
        let value = delta.bat()[guest.0 as usize];
        let host = geometry.host_cluster(value).filter(|_| value != 0);
        let Some(host) = host.filter(|host| packing.is_behind(*host)) else {
            continue;
        };
        let Some(to) = free.next() else {
            break;
        };
        let target = geometry.host_offset(to);
        delta.read(&mut buffer, geometry.host_offset(host))?;
        delta.punch(target..target + geometry.cluster.bytes())?;
        write_data(delta.file(), &buffer, target)?;
        moved.push((guest, to));
    }
    delta.sync()?;
    for (guest, to) in &moved {
        delta.set_entry(*guest, Some(*to));
    }
    delta.write_entries(moved.into_iter().map(|(guest, _)| guest))?;
    delta.sync()
}

#[cfg(test)]
mod tests;
