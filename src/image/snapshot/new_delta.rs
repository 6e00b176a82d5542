//! A new, empty delta before a descriptor names it: made and stable, and of no use to anybody
//! yet. What comes next is one rename, whether the disk is in use or not.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::{Bundle, notes};
use crate::format::{Descriptor, Guid, Header, ImageKind};
use crate::image::create::{ROOT_NAME, publish_file, write_empty};
use crate::image::error::{ImageError, Result};
use crate::image::file::ImageFile;
use crate::image::open::{lock_file, open_level};
use crate::image::ownership::Ownership;
use crate::storage::HostFile;
use crate::storage::lock::{ImageLock, LockMode};

/// What a snapshot is to be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name; `None` for a random one.
    pub guid: Option<Guid>,
    /// One line of text for people.
    pub description: Option<String>,
}

impl NewSnapshot {
    /// The descriptor of the bundle with the snapshot `guid`, above which the image in `file`
    /// is the top. The snapshot is noted, which does no harm if it is then not made: the next
    /// one that is noted takes the note away.
    pub(super) fn descriptor(
        &self,
        bundle: &Bundle,
        guid: Guid,
        file: PathBuf,
    ) -> Result<Descriptor> {
        let mut descriptor = bundle.descriptor().clone();
        descriptor
            .push_top(guid, file)
            .map_err(|error| bundle.edit_error(error))?;
        notes::add(bundle, guid, self.description.as_deref())?;
        Ok(descriptor)
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct NewDelta {
    name: PathBuf,
    descriptor: Descriptor,
}

impl NewDelta {
    /// An empty delta with this header, and the descriptor that `edit` makes with its name.
    pub(super) fn make(
        bundle: &Bundle,
        header: &Header,
        ownership: Ownership,
        edit: impl FnOnce(&Bundle, PathBuf) -> Result<Descriptor>,
    ) -> Result<Self> {
        let name = new_name(bundle);
        let descriptor = edit(bundle, name.clone())?;
        publish_file(bundle.folder(), name.as_os_str(), |file| {
            ownership.give(file.file(), file.path())?;
            write_empty(file, header)
        })?;
        Ok(Self { name, descriptor })
    }

    /// The delta that becomes the top of a disk in use when the snapshot `guid` is made of it.
    /// `top` is the present one, which `path` names; who may use that may use this.
    ///
    /// # Errors
    /// A name that is taken, a chain that is as long as it may be, notes that are damaged,
    /// another top than that of the bundle, or any I/O error.
    pub fn above(
        bundle: &Bundle,
        (top, path): (&File, &Path),
        header: &Header,
        guid: Guid,
        new: &NewSnapshot,
    ) -> Result<Self> {
        let descriptor = bundle.descriptor();
        let image = descriptor.image(descriptor.top());
        let is_top = image.is_some_and(|image| {
            // Where else it may be does not matter: the bundle has a file of this name once.
            image.file.file_name() == path.file_name()
        });
        if !is_top {
            return Err(ImageError::Unsupported {
                path: path.to_owned(),
                why: "is not the top of the bundle, so no snapshot can be made of it".to_owned(),
            });
        }
        let ownership = Ownership::of(top, path)?;
        Self::make(bundle, header, ownership, |bundle, file| {
            new.descriptor(bundle, guid, file)
        })
    }

    /// What the descriptor of the bundle becomes.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Opens it to be served, and locks it for that.
    ///
    /// # Errors
    /// Any of `open(2)` and `fcntl(2)`; somebody else has locked it.
    pub fn open(&self, bundle: &Bundle) -> Result<(HostFile, ImageLock)> {
        let top = self.descriptor.top();
        let image = self.descriptor.image(top).filter(|image| {
            image.kind == ImageKind::Expandable && image.file.file_name() == self.name.file_name()
        });
        let image = image.ok_or_else(|| ImageError::NoSnapshot {
            path: bundle.path().to_owned(),
            guid: top,
        })?;
        let file = open_level(bundle, image, true)?;
        let lock = lock_file(&file, LockMode::ReadWrite, false)?;
        Ok((file, lock))
    }

    /// Nothing names it, and nothing will.
    pub fn remove(&self, bundle: &Bundle) {
        if let Err(error) = bundle.folder().remove(&self.name) {
            let path = bundle.path().join(&self.name);
            log::warn!(
                "{}: a file that nothing uses stays there: {error}",
                path.display()
            );
        }
    }
}

/// A file name for a new delta that is not taken.
fn new_name(bundle: &Bundle) -> PathBuf {
    let base = bundle.descriptor().images().first();
    let base = base.and_then(|image| image.file.file_name()?.to_str());
    let guid = Guid::random();
    format!("{}.{guid}", first_name(base.unwrap_or(ROOT_NAME))).into()
}

/// What the base was called at first: it may be one that was a delta once, and has a name of
/// that kind. Names would become too long for any file system.
fn first_name(mut base: &str) -> &str {
    while let Some((first, last)) = base.rsplit_once('.')
        && !first.is_empty()
        && last.starts_with('{')
        && last.parse::<Guid>().is_ok()
    {
        base = first;
    }
    base
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    #[test]
    fn names_of_deltas_do_not_become_longer_and_longer() {
        let guid = Guid::random();
        for (base, first) in [
            ("root.hds".to_owned(), "root.hds"),
            (format!("root.hds.{guid}"), "root.hds"),
            (format!("disk.{guid}.{guid}"), "disk"),
            ("disk.{guid}".to_owned(), "disk.{guid}"),
        ] {
            assert_eq!(first_name(&base), first);
        }
        assert_eq!(first_name(&format!(".{guid}")), format!(".{guid}"));
    }
}
