//! Growing and shrinking a disk off line.
//!
//! What has to go for a larger disk, and in which order, says [`Growth`], for this and for
//! disks that are being served alike.
//!
//! A smaller disk has a shorter BAT. Number of entries, first block offset and disk
//! size change in the write of one sector, too, and before anything that was given
//! up is touched: a cut in front of it leaves the old disk whole, one behind it the
//! new disk with clusters that nothing uses.

use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::delta::{Delta, read_header};
use super::error::{ImageError, IoContext, Result};
use super::file::{ImageFile, rename_opening};
use super::open::{Access, OpenImage, OpenMode, image_of, open};
use super::repair::{examine_as, free_leaks};
use super::size::{refuse_growth, refuse_new, whole_clusters};
use crate::format::{
    ClusterSize, Fate, Geometry, Growth, GuestCluster, Header, HostCluster, InUse, SECTOR_SIZE,
    Sector,
};
use crate::ploop::{Chain, Level};
use crate::storage::HostFile;

/// The size that a disk shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This.
    Exactly(Sector),
    /// As much more.
    GrowBy(Sector),
    /// As much less.
    ShrinkBy(Sector),
}

/// Whether a disk may become smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// What the guest has behind the new end is given up.
    Allowed,
    /// Nothing is given up.
    Refused,
}

/// Gives the disk at `path` another size, which is rounded up to whole clusters, and
/// gives back what it is then.
///
/// # Errors
/// A smaller size where that is not allowed, or where snapshots keep the larger
/// disk; one that the format cannot hold; whatever keeps the image from being
/// opened and changed.
pub fn resize(path: &Path, size: NewSize, shrink: Shrink) -> Result<Sector> {
    let mut image = open(path, OpenMode::new(Access::Change))?;
    let (Some(level), Some(file)) = (image.chain.levels.last(), image.files.last()) else {
        return Err(refuse(path, "has no image"));
    };
    let file = image_of(file)?;
    match *level {
        Level::Plain {
            size: old_size,
            cluster,
        } => {
            let new_size = size.apply(path, old_size, cluster, shrink)?;
            Header::new(new_size, cluster).map_err(|error| refuse_new(path, error))?;
            // It is the base, and nothing lies on it: there are no snapshots.
            // Also where it says so: that may be what could not be made stable.
            resize_raw(&file, old_size, new_size, || match &mut image.bundle {
                Some(bundle) => bundle.prepare_disk_size(new_size)?.publish(),
                None => Ok(()),
            })?;
            Ok(new_size)
        }
        Level::Ploop => {
            let mut delta = Delta::load(file)?;
            let Geometry {
                disk_size: old_size,
                cluster,
                ..
            } = *delta.geometry();
            let new_size = size.apply(path, old_size, cluster, shrink)?;
            if new_size < old_size {
                require_shrinkable(path, &image)?;
                cut_down(&mut delta, new_size)?;
            } else {
                if new_size > old_size {
                    require_nothing_hidden(&image.files, &image.chain)?;
                }
                grow(&mut delta, new_size)?;
            }
            update_descriptor(&mut image, new_size)?;
            Ok(new_size)
        }
    }
}

/// The size that [`resize`] would give the disk at `path`, for a process that serves it and
/// can make it larger.
///
/// # Errors
/// As [`resize`], as far as that can be known while somebody uses the disk. One that
/// [may](Shrink::Allowed) become smaller is left to who uses it.
pub fn size_after(path: &Path, size: NewSize, shrink: Shrink) -> Result<Sector> {
    let image = open(path, OpenMode::new(Access::Read).force_share(true))?;
    let (Some(level), Some(file)) = (image.chain.levels.last(), image.files.last()) else {
        return Err(refuse(path, "has no image"));
    };
    match *level {
        Level::Plain {
            size: old_size,
            cluster,
        } => {
            let new_size = size.apply(path, old_size, cluster, shrink)?;
            Header::new(new_size, cluster).map_err(|error| refuse_new(path, error))?;
            Ok(new_size)
        }
        Level::Ploop => {
            let header = read_header(&image_of(file)?)?;
            let Geometry {
                disk_size: old_size,
                cluster,
                ..
            } = *header.geometry();
            let new_size = size.apply(path, old_size, cluster, shrink)?;
            if new_size > old_size {
                require_nothing_hidden(&image.files, &image.chain)?;
                Growth::new(&header, new_size)
                    .map_err(|error| refuse_growth(&file.path, &header, error))?;
            }
            Ok(new_size)
        }
    }
}

impl NewSize {
    /// What becomes of a disk of `old_size`: whole clusters, unless it stays what it is.
    fn apply(
        self,
        path: &Path,
        old_size: Sector,
        cluster: ClusterSize,
        shrink: Shrink,
    ) -> Result<Sector> {
        let wanted = match self {
            Self::Exactly(size) => size,
            Self::GrowBy(more) => Sector(old_size.0.saturating_add(more.0)),
            Self::ShrinkBy(less) if less < old_size => Sector(old_size.0 - less.0),
            Self::ShrinkBy(_) => {
                let why = format!(
                    "is {} bytes large; nothing would be left of it",
                    old_size.bytes()
                );
                return Err(refuse(path, &why));
            }
        };
        if wanted < old_size && shrink == Shrink::Refused {
            let why = format!(
                "is {} bytes large; making it smaller cuts off what the guest has there. Shrink \
                 the guest's file systems and partitions first, then use --shrink",
                old_size.bytes()
            );
            return Err(refuse(path, &why));
        }
        Ok(match wanted {
            wanted if wanted == old_size => old_size,
            // In the started cluster at the end of an odd disk.
            wanted if wanted < old_size && cluster.round_up(wanted) > old_size => old_size,
            wanted => whole_clusters(path, wanted, cluster),
        })
    }
}

/// That a larger disk shows nothing that is behind the end of a plain image just below the
/// top: how much of such an image is of the disk, only the level above it says. What is a
/// hole there reads as the zeros that a larger disk has.
///
/// # Errors
/// There is something, or that cannot be known.
pub fn require_nothing_hidden(files: &[HostFile], chain: &Chain) -> Result<()> {
    let ([.., base, _], [.., Level::Plain { size, .. }, _]) = (files, &chain.levels[..]) else {
        return Ok(());
    };
    let len = base.file.metadata().context(&base.path, "look at")?.len();
    let end = size.bytes();
    if Sector(len / SECTOR_SIZE) <= *size {
        return Ok(());
    }
    match rustix::fs::seek(&base.file, SeekFrom::Data(end)) {
        Err(Errno::NXIO) => Ok(()),
        _ => Err(refuse(
            &base.path,
            &format!(
                "holds data behind the end of its disk, which a larger disk would show; if nobody \
                 needs it, cut the file while nobody uses the disk ('truncate --size={end}')"
            ),
        )),
    }
}

/// That nothing but the disk itself has its size.
fn require_shrinkable(path: &Path, image: &OpenImage) -> Result<()> {
    let nodes = image.bundle.as_ref().map(|b| b.descriptor().shots().len());
    if nodes.is_some_and(|nodes| nodes > 1) {
        return Err(refuse(
            path,
            "has snapshots, which are of the larger disk; delete them first ('ploop-img snapshot \
             merge' deletes all of a chain), or copy the disk with 'ploop-img convert' and shrink \
             the copy",
        ));
    }
    Ok(())
}

fn refuse(path: &Path, why: &str) -> ImageError {
    ImageError::Unsupported {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}

/// The header has the last word, so the descriptor may follow it: whoever opens
/// the bundle in between finds the new size.
fn update_descriptor(image: &mut OpenImage, disk_size: Sector) -> Result<()> {
    match &mut image.bundle {
        Some(bundle) => bundle.set_disk_size(disk_size),
        None => Ok(()),
    }
}

/// Gives a raw disk another size; `update` writes it to the descriptor. A cut never leaves
/// a file that is shorter than the descriptor says.
fn resize_raw<F: ImageFile>(
    file: &F,
    old_size: Sector,
    new_size: Sector,
    mut update: impl FnMut() -> Result<()>,
) -> Result<()> {
    rename_opening(file)?;
    if new_size < old_size {
        update()?;
    }
    // What lies behind the end of the disk was never the guest's.
    file.set_len(old_size.min(new_size).bytes())
        .and_then(|()| file.set_len(new_size.bytes()))
        .and_then(|()| file.sync())
        .context(file.path(), "resize")?;
    if new_size >= old_size {
        update()?;
    }
    Ok(())
}

/// Grows one image file.
///
/// # Errors
/// The image is not sound, the size is not one that it can have, or an I/O error;
/// one that leaves the image marked as in use says so by the next command.
pub(super) fn grow<F: ImageFile>(delta: &mut Delta<F>, disk_size: Sector) -> Result<()> {
    delta.require_sound()?;
    if disk_size == delta.geometry().disk_size {
        return Ok(());
    }
    let growth = Growth::new(delta.header(), disk_size)
        .map_err(|error| refuse_growth(delta.path(), delta.header(), error))?;
    let found_as = delta.header().in_use;
    let old_len = delta.file_len()?;
    delta.begin()?;

    let moves = match copy_away(delta, &growth) {
        Ok(moves) => moves,
        Err(error) => {
            // A full disk, most likely. Nothing was changed but the end of the file.
            delta.set_len(old_len)?;
            delta.finish(found_as)?;
            return Err(error);
        }
    };
    for one in &moves {
        delta.set_entry(one.guest, one.to);
    }
    delta.write_entries(moves.iter().map(|one| one.guest))?;
    delta.sync()?;

    let space = growth.bat_space();
    if delta.file_len()? < space.end {
        delta.set_len(space.end)?;
    }
    delta.punch(space)?;
    delta.sync()?;

    delta.set_header(growth.header().clone());
    delta.set_mark(InUse::Open);
    delta.write_header()?;
    // The extension is no more; its clusters are to be had. So are those of which more
    // than the BAT needs was given up.
    let first = growth.first_host_cluster();
    if found_as == InUse::ClosedWithExtension || moves.iter().any(|one| one.from >= first) {
        let findings = examine_as(delta, InUse::Open)?;
        free_leaks(delta, &findings)?;
    }
    delta.finish(InUse::Closed)
}

/// Shrinks one image file that nothing lies on and that lies on nothing.
///
/// # Errors
/// As [`grow`].
pub(super) fn cut_down<F: ImageFile>(delta: &mut Delta<F>, disk_size: Sector) -> Result<()> {
    delta.require_sound()?;
    let shrunk = delta.header().shrunk(disk_size);
    let header = shrunk.map_err(|source| ImageError::Header {
        path: delta.path().to_owned(),
        source,
    })?;
    delta.begin()?;

    delta.set_header(header);
    // Whatever extension there was is not of this disk.
    delta.set_mark(InUse::Open);
    delta.write_header()?;
    delta.sync()?;

    // Entries that are no more must not come back when the disk grows.
    let geometry = *delta.geometry();
    delta.punch(geometry.metadata_len()..geometry.data_start)?;
    zero_behind_end(delta)?;
    let findings = examine_as(delta, InUse::Open)?;
    free_leaks(delta, &findings)?;
    delta.finish(InUse::Closed)
}

/// The last cluster of a disk may hold more than the disk. What a guest has never
/// seen must not come to light when the disk grows.
fn zero_behind_end<F: ImageFile>(delta: &Delta<F>) -> Result<()> {
    let geometry = delta.geometry();
    let size = geometry.disk_size.bytes();
    let inside = size % geometry.cluster.bytes();
    let last = GuestCluster((size >> geometry.cluster.shift()) as u32);
    match delta.lookup(last) {
        Some(offset) if inside != 0 => {
            delta.punch(offset + inside..offset + geometry.cluster.bytes())?;
            // Before the copy that may follow, and before the size.
            delta.sync()
        }
        _ => Ok(()),
    }
}

/// What becomes of an entry.
struct Move {
    guest: GuestCluster,
    from: HostCluster,
    to: Option<HostCluster>,
}

/// Copies the clusters that have to go to the end of the file, and makes that stable.
/// Gives back the entries to change.
fn copy_away<F: ImageFile>(delta: &Delta<F>, growth: &Growth) -> Result<Vec<Move>> {
    let geometry = delta.geometry();
    let file_end = geometry.host_clusters_below(delta.file_len()?);
    let mut next = file_end.max(u64::from(growth.first_host_cluster().0));
    let mut moves = Vec::new();
    for (guest, value) in (0..).map(GuestCluster).zip(delta.bat()) {
        let Some(from) = geometry.host_cluster(*value).filter(|_| *value != 0) else {
            continue;
        };
        let to = match growth.fate(guest, from) {
            Fate::Stays => continue,
            Fate::Goes => None,
            Fate::Moves { .. } if next >= u64::from(geometry.host_cluster_limit()) => {
                return Err(refuse(delta.path(), "has no room left in its file"));
            }
            Fate::Moves { keep } => {
                let to = HostCluster(next as u32);
                next += 1;
                delta.set_len(geometry.host_offset(HostCluster(next as u32)))?;
                delta.copy(geometry.host_offset(from), geometry.host_offset(to), keep)?;
                Some(to)
            }
        };
        moves.push(Move { guest, from, to });
    }
    delta.sync()?;
    Ok(moves)
}

#[cfg(test)]
mod tests;
