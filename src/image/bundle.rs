//! A bundle: a folder with image files and the descriptor that says how they
//! stack.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::{ImageError, IoContext, Result};
use super::folder::{Folder, Replacement};
use crate::format::{Descriptor, EditError, Guid, Sector};

/// An open folder with a checked descriptor.
#[derive(Debug)]
pub struct Bundle {
    folder: Folder,
    descriptor: Descriptor,
}

/// What a path given by the user means.
#[derive(Debug)]
pub enum Location {
    /// One image file.
    Bare(PathBuf),
    /// A disk with a descriptor.
    Bundle(Bundle),
}

impl Location {
    /// A folder, or the descriptor in it, is a bundle; anything else is a bare
    /// image, whether it exists or not.
    ///
    /// # Errors
    /// As [`Bundle::open`].
    pub fn of(path: &Path) -> Result<Self> {
        let folder = if path.is_dir() {
            path
        } else if path.file_name() == Some(OsStr::new(Descriptor::FILE_NAME)) {
            match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            }
        } else {
            return Ok(Self::Bare(path.to_owned()));
        };
        Bundle::open(folder).map(Self::Bundle)
    }
}

impl Bundle {
    /// Opens a folder and reads its descriptor.
    ///
    /// # Errors
    /// There is no descriptor, it is not valid, or an I/O error.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = Folder::open(path)?;
        let descriptor = read_descriptor(&folder)?;
        Ok(Self { folder, descriptor })
    }

    /// The folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// For messages.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// As read or saved last.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Whether the descriptor in the folder still is the one in memory.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(super) fn is_current(&self) -> Result<bool> {
        Ok(read_descriptor(&self.folder)? == self.descriptor)
    }

    /// Reads the descriptor again. Another process may have made the disk larger while it
    /// served it, and this one was opened before.
    ///
    /// # Errors
    /// As [`Self::open`]; or it says something else that is new.
    pub fn refresh(&mut self) -> Result<()> {
        let mut now = read_descriptor(&self.folder)?;
        let disk_size = std::mem::replace(&mut now.disk_size, self.descriptor.disk_size);
        if now != self.descriptor {
            return Err(changed(&self.folder));
        }
        self.descriptor.disk_size = disk_size;
        Ok(())
    }

    /// Reads the descriptor again, of a disk whose images were opened by what it said before and
    /// which another process has served since: branches that it is no part of may have gone.
    ///
    /// # Errors
    /// As [`Self::open`]; or the disk consists of other images by now. What was read before stays.
    pub fn catch_up(&mut self) -> Result<()> {
        let now = read_descriptor(&self.folder)?;
        if now.chain(now.top()) != self.descriptor.chain(self.descriptor.top()) {
            return Err(changed(&self.folder));
        }
        self.descriptor = now;
        Ok(())
    }

    /// Reads the descriptor again, whatever it says: nobody here has the disk open that it
    /// describes.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn read_anew(&mut self) -> Result<()> {
        self.descriptor = read_descriptor(&self.folder)?;
        Ok(())
    }

    /// Puts another descriptor in place, in one step, and makes that stable.
    ///
    /// # Errors
    /// Any of `open(2)`, `write(2)`, `fsync(2)` and `rename(2)`. The old
    /// descriptor may still be in place, or the new one.
    pub fn save(&mut self, descriptor: Descriptor) -> Result<()> {
        self.prepare(descriptor)?.publish()
    }

    /// The first half of [`Self::save`]: what may fail for want of space or permission.
    ///
    /// # Errors
    /// Any of `open(2)`, `write(2)` and `fsync(2)`.
    pub(crate) fn prepare(&mut self, descriptor: Descriptor) -> Result<NewDescriptor<'_>> {
        let text = descriptor.to_xml();
        let name = Descriptor::FILE_NAME;
        Ok(NewDescriptor {
            file: self.folder.prepare(name, text.as_bytes(), None)?,
            now: &mut self.descriptor,
            new: descriptor,
        })
    }

    /// A descriptor that says how large the disk is: what may fail for want of space or
    /// permission. Also where the old one says so, which may not be stable.
    ///
    /// # Errors
    /// Any of `open(2)`, `write(2)` and `fsync(2)`.
    pub fn prepare_disk_size(&mut self, disk_size: Sector) -> Result<NewDescriptor<'_>> {
        let mut descriptor = self.descriptor.clone();
        descriptor.disk_size = disk_size;
        self.prepare(descriptor)
    }

    /// Has the descriptor say how large the disk is, if it does not yet.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn set_disk_size(&mut self, disk_size: Sector) -> Result<()> {
        match self.descriptor.disk_size == disk_size {
            true => Ok(()),
            false => self.prepare_disk_size(disk_size)?.publish(),
        }
    }

    /// The one that lies on the snapshot `guid`, alone.
    ///
    /// # Errors
    /// There is no such snapshot, it is the top, none lies on it, or several do.
    pub(crate) fn only_child(&self, guid: Guid) -> Result<Guid> {
        let child = self.descriptor.only_child(guid);
        child.map_err(|error| self.edit_error(error))
    }

    /// The descriptor of the disk without these snapshots, base first, one right below the other,
    /// each of which is only part of the next, and the last of `to`.
    ///
    /// # Errors
    /// There is no such snapshot, others lie on it, it was being deleted by somebody who did not
    /// finish, or they do not lie so.
    pub(crate) fn without(&self, guids: &[Guid], to: Guid) -> Result<Descriptor> {
        let mut descriptor = self.descriptor.clone();
        let refuse = |why: String| ImageError::Unsupported {
            path: self.path().to_owned(),
            why,
        };
        let above = guids.iter().skip(1).chain([&to]);
        for (guid, above) in guids.iter().zip(above) {
            let child = descriptor.only_child(*guid);
            if child.map_err(|error| self.edit_error(error))? != *above {
                return Err(refuse(format!(
                    "has no snapshot {above} on {guid} any more"
                )));
            }
            if descriptor.shot(*guid).is_some_and(|shot| shot.merging) {
                let why = "has a snapshot that was being deleted: 'ploop-img check --repair \
                           leaks' finishes that when the disk is not in use";
                return Err(refuse(why.to_owned()));
            }
            let bypassed = descriptor.bypass(*guid);
            bypassed.map_err(|error| self.edit_error(error))?;
        }
        Ok(descriptor)
    }

    /// Says on which bundle a change of the tree failed.
    pub(super) fn edit_error(&self, source: EditError) -> ImageError {
        let path = self.path().to_owned();
        match source {
            EditError::NotFound(guid) => ImageError::NoSnapshot { path, guid },
            source => ImageError::Edit { path, source },
        }
    }

    /// Whether `guid` names a snapshot or the top.
    ///
    /// # Errors
    /// [`ImageError::NoSnapshot`] if not.
    pub fn require(&self, guid: Guid) -> Result<()> {
        match self.descriptor.shot(guid) {
            Some(_) => Ok(()),
            None => Err(self.edit_error(EditError::NotFound(guid))),
        }
    }
}

/// A descriptor that is not in place yet. Dropped, the old one stays.
#[derive(Debug)]
pub struct NewDescriptor<'a> {
    file: Replacement<'a>,
    now: &'a mut Descriptor,
    new: Descriptor,
}

impl NewDescriptor<'_> {
    /// That the old one is as it was when this one was made from it.
    ///
    /// # Errors
    /// As [`Bundle::open`]; or it says something else.
    pub fn require_unchanged(&self) -> Result<()> {
        let folder = self.file.folder();
        match read_descriptor(folder)? == *self.now {
            true => Ok(()),
            false => Err(changed(folder)),
        }
    }

    /// Puts it in place, in one step, and makes that stable.
    ///
    /// # Errors
    /// Any of `rename(2)` and `fsync(2)`. After the latter it may be in place.
    pub fn publish(self) -> Result<()> {
        self.file.publish()?;
        *self.now = self.new;
        Ok(())
    }

    /// Puts it in place, in one step. It is known whether it is there, and what comes back
    /// says whether that is stable.
    ///
    /// # Errors
    /// Any of `rename(2)`: the old one is still in place.
    pub fn put(self) -> Result<Result<()>> {
        let folder = self.file.folder();
        match self.file.put() {
            Ok(()) => {
                *self.now = self.new;
                Ok(folder.sync())
            }
            // A server may have done what it is asked for a second time.
            Err(error) if matches!(read_descriptor(folder), Ok(found) if found == self.new) => {
                *self.now = self.new;
                Ok(Err(error))
            }
            Err(error) => Err(error),
        }
    }
}

/// Says that somebody else has changed the descriptor.
fn changed(folder: &Folder) -> ImageError {
    ImageError::Unsupported {
        path: folder.path().join(Descriptor::FILE_NAME),
        why: "was changed by another program while the disk is in use".to_owned(),
    }
}

fn read_descriptor(folder: &Folder) -> Result<Descriptor> {
    let name = Path::new(Descriptor::FILE_NAME);
    let path = folder.path().join(name);
    if !folder.contains(name)? {
        return Err(ImageError::NoDescriptor(folder.path().to_owned()));
    }
    let file = folder.open_image(name, false)?;
    let mut text = String::new();
    // One byte more tells a text that is too long from one that is not.
    let mut limited = file.take(Descriptor::TEXT_MAX as u64 + 1);
    let read = limited.read_to_string(&mut text).context(&path, "read")?;
    if read > Descriptor::TEXT_MAX {
        return Err(ImageError::Unsupported {
            path,
            why: format!(
                "is longer than {} bytes, which no descriptor is",
                Descriptor::TEXT_MAX
            ),
        });
    }
    Descriptor::parse(&text).map_err(|source| ImageError::Descriptor { path, source })
}
