//! Merging an image into the one below it, and whole ranges of a chain into one.

use std::path::Path;

use super::Held;
use super::delete::{collapse, open_lower};
use crate::format::is_zero;
use crate::format::{GuestCluster, Guid, HostCluster, InUse};
use crate::image::bundle::Bundle;
use crate::image::convert::write_data;
use crate::image::delta::Delta;
use crate::image::error::{ImageError, IoContext, Result};
use crate::image::file::{ImageFile, rename_opening};
use crate::image::open::image_of;
use crate::image::progress::{Progress, check_cancelled};
use crate::image::repair::drop_extension;
use crate::image::resize::grow;
use crate::image::size::refuse_growth;

/// Deletes all snapshots from `from` up to the one below `to`, both in the chain
/// of the disk: what they hold goes into one image, that of `to`. Without `from`
/// it begins at the base, without `to` it goes up to the top.
///
/// They go all at once, before the first cluster is copied: cut off in the middle,
/// it is to be finished by `ploop-img check --repair leaks`.
///
/// # Errors
/// Snapshots that are not there or not in this order, one in between that others
/// lie on too, an image in use, or any I/O error.
pub fn merge_snapshots(
    path: &Path,
    from: Option<Guid>,
    to: Option<Guid>,
    progress: &dyn Progress,
) -> Result<()> {
    let mut held = Held::open(path, |bundle| range(bundle, from, to))?;
    let levels = range(&held.bundle, from, to)?;
    let Some((_, guids)) = levels.split_last() else {
        return Ok(());
    };
    let mut descriptor = held.bundle.descriptor().clone();
    let nameless: std::result::Result<Vec<_>, _> = guids
        .iter()
        .map(|guid| descriptor.begin_collapse(*guid))
        .collect();
    let nameless = nameless.map_err(|error| held.bundle.edit_error(error))?;
    check_range(&held, &levels)?;
    if descriptor != *held.bundle.descriptor() {
        held.bundle.save(descriptor)?;
        held.follow();
    }
    // From the bottom up, so that each cluster is copied once.
    for guid in nameless {
        collapse(&mut held, guid, progress)?;
    }
    Ok(())
}

/// That all of these levels, which are held, can be merged into the lowest: once
/// the first are, there is no way back.
fn check_range(held: &Held, levels: &[Guid]) -> Result<()> {
    let Some((lowest, above)) = levels.split_first().filter(|(_, rest)| !rest.is_empty()) else {
        return Ok(());
    };
    let is_merging = |guid| {
        held.bundle
            .descriptor()
            .shot(guid)
            .is_some_and(|s| s.merging)
    };
    let lowest = open_lower(held, *lowest, is_merging(*lowest))?;
    for guid in above {
        // What a merge that was cut off left is mended when its turn comes.
        if is_merging(*guid) {
            continue;
        }
        let upper = Delta::load(image_of(held.file(*guid)?)?)?;
        upper.require_sound()?;
        // A guest cluster gets its place in the lowest once, whichever has it, so
        // that what is enough for each is enough for all.
        check_mergeable(&lowest, &upper)?;
    }
    Ok(())
}

/// The chain from `from` to `to`, base first.
pub(crate) fn range(bundle: &Bundle, from: Option<Guid>, to: Option<Guid>) -> Result<Vec<Guid>> {
    let descriptor = bundle.descriptor();
    let to = to.unwrap_or(descriptor.top());
    bundle.require(to)?;
    let chain = descriptor.chain(to);
    let first = match from {
        None => 0,
        Some(from) => {
            bundle.require(from)?;
            let found = chain.iter().position(|image| image.guid == from);
            found.ok_or_else(|| ImageError::Unsupported {
                path: bundle.path().to_owned(),
                why: format!("snapshot {from} is not below {to}, so they cannot be merged"),
            })?
        }
    };
    Ok(chain[first..].iter().map(|image| image.guid).collect())
}

/// An image that is merged with the one above it.
pub(crate) enum Level<F> {
    Ploop(Delta<F>),
    Plain(F),
}

/// That `lower` can have the size and the clusters of `upper`.
///
/// # Errors
/// Why not.
pub(super) fn check_mergeable<F: ImageFile>(lower: &Level<F>, upper: &Delta<F>) -> Result<()> {
    let Level::Ploop(lower) = lower else {
        return Ok(());
    };
    let disk_size = upper.geometry().disk_size;
    let header = lower.header().grown(disk_size);
    let header = header.map_err(|error| refuse_growth(lower.path(), lower.header(), error))?;
    // As if each cluster of the upper were new, and all that grows were to move.
    let clusters = lower.geometry().host_clusters_below(lower.file_len()?)
        + u64::from(header.geometry().first_host_cluster().0)
        + u64::from(header.geometry().entries);
    if clusters > u64::from(header.geometry().host_cluster_limit()) {
        return Err(no_room(lower.path()));
    }
    Ok(())
}

pub(super) fn no_room(path: &Path) -> ImageError {
    ImageError::Unsupported {
        path: path.to_owned(),
        why: "has no room for more clusters: its version cannot name them".to_owned(),
    }
}

/// Copies all clusters of `upper` into `lower`, which grows where it is smaller.
/// At each moment, `upper` on `lower` reads the same. `is_base` says that nothing
/// lies below `lower`, so that zeros need no cluster.
///
/// # Errors
/// Any I/O error. `lower` stays marked as in use then.
pub(super) fn merge_into<F: ImageFile>(
    lower: &mut Level<F>,
    upper: &Delta<F>,
    is_base: bool,
    progress: &dyn Progress,
) -> Result<()> {
    let clusters = mapped(upper);
    let geometry = upper.geometry();
    progress.begin(clusters.len() as u64 * geometry.cluster.bytes());
    match lower {
        Level::Plain(file) => merge_into_plain(file, upper, &clusters, progress),
        Level::Ploop(lower) => {
            grow(lower, geometry.disk_size)?;
            merge_into_ploop(lower, upper, &clusters, is_base, progress)
        }
    }
}

/// What of the disk an image has.
fn mapped<F: ImageFile>(delta: &Delta<F>) -> Vec<GuestCluster> {
    let geometry = delta.geometry();
    let clusters = geometry.cluster.count_for(geometry.disk_size.bytes()) as u32;
    let guests = (0..clusters).map(GuestCluster);
    guests
        .filter(|guest| delta.lookup(*guest).is_some())
        .collect()
}

fn cancelled(progress: &dyn Progress, path: &Path) -> Result<()> {
    let state = "the disk is what it was; finish with 'ploop-img check --repair leaks'";
    check_cancelled(progress, path, state)
}

fn merge_into_plain<F: ImageFile>(
    lower: &F,
    upper: &Delta<F>,
    clusters: &[GuestCluster],
    progress: &dyn Progress,
) -> Result<()> {
    let geometry = upper.geometry();
    let path = lower.path();
    let size = geometry.disk_size.bytes();
    // It becomes the top again, perhaps, that a guest knows from before its snapshot.
    rename_opening(lower)?;
    if lower.file_len().context(path, "get the length")? < size {
        lower.set_len(size).context(path, "grow")?;
    }
    let mut buffer = vec![0; geometry.cluster.bytes() as usize];
    for (index, guest) in (1..).zip(clusters) {
        cancelled(progress, path)?;
        read_cluster(upper, *guest, &mut buffer)?;
        let start = u64::from(guest.0) << geometry.cluster.shift();
        // The disk may end inside its last cluster.
        let len = (size - start).min(geometry.cluster.bytes()) as usize;
        lower
            .write_all_at(&buffer[..len], start)
            .context(path, "write")?;
        progress.done(index * geometry.cluster.bytes());
    }
    lower.sync().context(path, "sync")
}

fn merge_into_ploop<F: ImageFile>(
    lower: &mut Delta<F>,
    upper: &Delta<F>,
    clusters: &[GuestCluster],
    is_base: bool,
    progress: &dyn Progress,
) -> Result<()> {
    drop_extension(lower)?;
    lower.begin()?;
    let geometry = *lower.geometry();
    let file_end = geometry.host_clusters_below(lower.file_len()?);
    let mut next = file_end.max(u64::from(geometry.first_host_cluster().0));
    let mut buffer = vec![0; geometry.cluster.bytes() as usize];
    let mut changed = Vec::new();
    for (index, guest) in (1..).zip(clusters) {
        cancelled(progress, lower.path())?;
        read_cluster(upper, *guest, &mut buffer)?;
        if let Some(offset) = lower.lookup(*guest) {
            // `upper` still has it, so nobody sees this one.
            lower.write(&buffer, offset, "write a cluster")?;
        } else if !(is_base && is_zero(&buffer)) {
            if next >= u64::from(geometry.host_cluster_limit()) {
                return Err(no_room(lower.path()));
            }
            let host = HostCluster(next as u32);
            next += 1;
            lower.set_len(geometry.host_offset(host) + geometry.cluster.bytes())?;
            write_data(lower.file(), &buffer, geometry.host_offset(host))?;
            changed.push((*guest, host));
        }
        progress.done(index * geometry.cluster.bytes());
    }
    // Data and length are on disk before an entry points there.
    lower.sync()?;
    for (guest, host) in &changed {
        lower.set_entry(*guest, Some(*host));
    }
    if !changed.is_empty() {
        lower.clear_empty();
    }
    lower.write_entries(changed.iter().map(|(guest, _)| *guest))?;
    lower.finish(InUse::Closed)
}

fn read_cluster<F: ImageFile>(
    delta: &Delta<F>,
    guest: GuestCluster,
    buffer: &mut [u8],
) -> Result<()> {
    match delta.lookup(guest) {
        Some(offset) => delta.read(buffer, offset),
        None => {
            buffer.fill(0);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
