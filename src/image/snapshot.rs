//! Snapshots of a bundle: its tree of images, and the changes of it.
//!
//! Every change is made of new files first, then one rename that puts the new
//! descriptor in place, then the removal of files that are no more needed. Cut
//! off anywhere, the bundle is in its old or its new state; `check` names the
//! files that are left over.

mod create;
mod delete;
mod lift;
mod list;
mod merge;
mod new_delta;
mod notes;
mod switch;

use std::path::{Path, PathBuf};

pub use create::create_snapshot;
pub use delete::delete_snapshot;
pub(crate) use delete::remove_leaf_beside;
pub(crate) use lift::{Lift, LiftStep, LiftedImages};
pub use list::{SnapshotInfo, find_snapshot, list_snapshots};
pub(crate) use list::{described, is_described, list_of, note_of};
#[cfg(all(test, not(ploop_loom)))]
pub(crate) use merge::Level as MergeLevel;
pub use merge::merge_snapshots;
pub(crate) use merge::range;
pub(crate) use new_delta::NewDelta;
pub use new_delta::NewSnapshot;
pub use switch::switch_snapshot;

pub(super) use delete::finish_merge;

use super::bundle::{Bundle, Location};
use super::delta::read_header;
use super::error::{ImageError, Result};
use super::open::{image_of, lock_file, not_a_bundle, open_level, plain_size};
use super::ownership::Ownership;
use crate::format::{Descriptor, Guid, Header, ImageKind};
use crate::storage::HostFile;
use crate::storage::lock::{ImageLock, LockMode};

/// A bundle, and some of its images that nobody else uses as long as this lasts.
/// The top is always one of them, so that only one change is made at a time.
#[derive(Debug)]
pub(super) struct Held {
    pub bundle: Bundle,
    images: Vec<(Guid, HostFile)>,
    _locks: Vec<ImageLock>,
}

impl Held {
    /// Opens the bundle at `path` with its top, and those images that `also`
    /// names, for change.
    pub fn open(path: &Path, also: impl Fn(&Bundle) -> Result<Vec<Guid>>) -> Result<Self> {
        const TRIES: usize = 5;
        for _ in 0..TRIES {
            let Location::Bundle(bundle) = Location::of(path)? else {
                return Err(not_a_bundle(path));
            };
            let mut guids = also(&bundle)?;
            guids.push(bundle.descriptor().top());
            guids.sort_unstable();
            guids.dedup();
            let mut images = Vec::new();
            let mut locks = Vec::new();
            for guid in guids {
                let file = open_for_change(&bundle, guid)?;
                locks.push(lock_file(&file, LockMode::Exclusive, false)?);
                images.push((guid, file));
            }
            // What the descriptor said before the locks were taken may be history.
            if bundle.is_current()? {
                return Ok(Self {
                    bundle,
                    images,
                    _locks: locks,
                });
            }
        }
        Err(ImageError::Busy(path.to_owned()))
    }

    /// An image that is held.
    pub fn file(&self, guid: Guid) -> Result<&HostFile> {
        let held = self.images.iter().find(|(held, _)| *held == guid);
        held.map(|(_, file)| file)
            .ok_or_else(|| ImageError::NoSnapshot {
                path: self.bundle.path().to_owned(),
                guid,
            })
    }

    /// After a change of the descriptor: files may belong to other nodes now.
    fn follow(&mut self) {
        let bundle = &self.bundle;
        let held = std::mem::take(&mut self.images);
        let owned = held.into_iter().filter_map(|(_, file)| {
            let mut images = bundle.descriptor().images().iter();
            let image = images.find(|image| bundle.path().join(&image.file) == file.path)?;
            Some((image.guid, file))
        });
        self.images = owned.collect();
    }

    /// Makes an empty delta with `header`, for whom the top is, then puts the descriptor in place that
    /// `edit` makes with its name. If that fails, the delta is gone again.
    fn add_delta(
        &mut self,
        header: &Header,
        edit: impl FnOnce(&Bundle, PathBuf) -> Result<Descriptor>,
    ) -> Result<()> {
        let old_top = self.file(self.bundle.descriptor().top())?;
        let ownership = Ownership::of(&old_top.file, &old_top.path)?;
        let delta = NewDelta::make(&self.bundle, header, ownership, edit)?;
        let saved = self.bundle.save(delta.descriptor().clone());
        if saved.is_err() && !matches!(self.bundle.is_current(), Ok(false)) {
            // The old descriptor is in place, so nothing names the new file.
            delta.remove(&self.bundle);
        }
        saved
    }
}

fn open_for_change(bundle: &Bundle, guid: Guid) -> Result<HostFile> {
    bundle.require(guid)?;
    match bundle.descriptor().image(guid) {
        Some(image) => open_level(bundle, image, true),
        None => Err(ImageError::NoSnapshot {
            path: bundle.path().to_owned(),
            guid,
        }),
    }
}

/// The header of an empty image that is to lie on node `below`.
fn header_on_top(bundle: &Bundle, below: Guid, file: &HostFile) -> Result<Header> {
    let descriptor = bundle.descriptor();
    let kind = descriptor.image(below).map(|image| image.kind);
    if kind == Some(ImageKind::Plain) {
        let size = plain_size(file, descriptor.disk_size, below == descriptor.top())?;
        // As it is: a snapshot does not change the disk.
        return Header::new(size, descriptor.cluster).map_err(|source| ImageError::Header {
            path: file.path.clone(),
            source,
        });
    }
    let header = read_header(&image_of(file)?)?;
    header.on_top().map_err(|source| ImageError::Header {
        path: file.path.clone(),
        source,
    })
}
