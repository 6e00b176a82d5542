//! Folders: opening what is in them without being led out, and putting new files
//! under their names in one step.

use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::error::{ImageError, IoContext, Result};
use super::fault;
use super::file::HostImage;
use super::ownership::{Ownership, PRIVATE};
use crate::storage::filesystem;

/// What is made under a passing name first begins with this.
pub(super) const TEMPORARY_PREFIX: &str = ".ploop-img-";

/// An open folder.
#[derive(Debug)]
pub struct Folder {
    file: File,
    path: PathBuf,
}

impl Folder {
    /// Opens the folder at `path`.
    ///
    /// # Errors
    /// Any of `open(2)`.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty());
        Ok(Self {
            file: File::from(fd.context(path, "open the folder")?),
            path: path.to_owned(),
        })
    }

    /// The folder that `path` is in, and its name there.
    ///
    /// # Errors
    /// `path` has no last name (as `/` and `..`), or any of `open(2)`.
    pub fn of(path: &Path) -> Result<(Self, &OsStr)> {
        let Some(name) = path.file_name() else {
            return Err(ImageError::Unsupported {
                path: path.to_owned(),
                why: "does not end in a name; give the path of the file or folder itself".into(),
            });
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Ok((Self::open(parent)?, name))
    }

    /// For messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Opens the image file at `name`, a relative path of plain names. A symbolic
    /// link on the way is refused: it could lead anywhere.
    ///
    /// # Errors
    /// Any of `openat(2)`, or it is something else than a regular file.
    pub fn open_image(&self, name: &Path, writable: bool) -> Result<File> {
        let path = self.path.join(name);
        let (folders, last) = match (name.parent(), name.file_name()) {
            (Some(parent), Some(last)) => (parent, last),
            _ => return Err(Errno::NOENT).context(&path, "open"),
        };
        let mut folder = self.file.as_fd().try_clone_to_owned();
        for component in folders.components() {
            let Component::Normal(component) = component else {
                return Err(Errno::XDEV).context(&path, "open");
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let next = rustix::fs::openat(
                folder.context(&path, "open")?,
                component,
                flags,
                Mode::empty(),
            );
            folder = next.map_err(io::Error::from);
        }
        let folder = folder.context(&path, "open")?;
        open_regular(folder, last, OFlags::NOFOLLOW, writable, &path)
    }

    /// The names of everything in the folder.
    ///
    /// # Errors
    /// Any of `getdents(2)`.
    pub fn names(&self) -> Result<Vec<(OsString, FileType)>> {
        use std::os::unix::ffi::OsStrExt;
        let context = "list the folder";
        let entries = rustix::fs::Dir::read_from(&self.file).context(&self.path, context)?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.context(&self.path, context)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push((name.to_owned(), entry.file_type()));
            }
        }
        names.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(names)
    }

    /// Whether there is anything of that name.
    ///
    /// # Errors
    /// Any of `stat(2)` but that there is nothing.
    pub fn contains(&self, name: &Path) -> Result<bool> {
        match rustix::fs::statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno).context(&self.path.join(name), "look at"),
        }
    }

    /// A new, empty file that gets the name `name` with [`NewFile::publish`]. It is
    /// for its maker alone, unless it is given another ownership.
    ///
    /// # Errors
    /// Any of `open(2)`.
    pub fn new_file(&self, name: &OsStr) -> Result<NewFile<'_>> {
        fault::point();
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = PRIVATE;
        let (fd, passing) = match rustix::fs::openat(&self.file, ".", flags, mode) {
            Ok(fd) => (fd, None),
            // Not every file system has files without a name.
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::ISDIR | Errno::NOENT) => {
                let name = temporary_name();
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&self.file, &name, flags, mode);
                (fd.context(&self.path, "make a file in")?, Some(name))
            }
            Err(errno) => return Err(errno).context(&self.path, "make a file in"),
        };
        Ok(NewFile {
            image: HostImage::new(File::from(fd), self.path.join(name)),
            name: name.to_owned(),
            passing,
            folder: self,
        })
    }

    /// Puts a new file with `content` in place of the one named `name`, if there
    /// is any, in one step, and makes that stable. It has the owner, group and mode of
    /// that one, or else `ownership`, or else is for its maker alone.
    ///
    /// # Errors
    /// Any of `open(2)`, `write(2)`, `fsync(2)` and `rename(2)`.
    pub(super) fn replace(
        &self,
        name: &'static str,
        content: &[u8],
        ownership: Option<Ownership>,
    ) -> Result<()> {
        self.prepare(name, content, ownership)?.publish()
    }

    /// The first half of [`Self::replace`]: all that may fail for want of space or
    /// permission.
    ///
    /// # Errors
    /// Any of `open(2)`, `write(2)` and `fsync(2)`.
    pub(super) fn prepare(
        &self,
        name: &'static str,
        content: &[u8],
        ownership: Option<Ownership>,
    ) -> Result<Replacement<'_>> {
        let path = self.path.join(name);
        let ownership = match self.contains(Path::new(name))? {
            true => {
                let old = self.open_image(Path::new(name), false)?;
                Some(Ownership::of(&old, &path)?)
            }
            false => ownership,
        };
        Ok(Replacement {
            passing: Some(self.write_temporary(content, ownership)?),
            name,
            folder: self,
        })
    }

    /// A synced file under a passing name.
    fn write_temporary(&self, content: &[u8], ownership: Option<Ownership>) -> Result<String> {
        use std::io::Write;
        let name = temporary_name();
        let path = self.path.join(&name);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        fault::point();
        let fd = rustix::fs::openat(&self.file, &name, flags, PRIVATE);
        let mut file = File::from(fd.context(&path, "create")?);
        fault::point();
        let given = ownership.map_or(Ok(()), |ownership| ownership.give(&file, &path));
        let written = given.and_then(|()| {
            let written = file.write_all(content).and_then(|()| file.sync_all());
            written.context(&path, "write")
        });
        if written.is_err() {
            let _ = rustix::fs::unlinkat(&self.file, &name, AtFlags::empty());
        }
        written.map(|()| name)
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// Any of `unlink(2)` but that there is none.
    pub fn remove(&self, name: &Path) -> Result<()> {
        fault::point();
        match rustix::fs::unlinkat(&self.file, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => self.sync(),
            Err(errno) => Err(errno).context(&self.path.join(name), "remove"),
        }
    }

    /// Makes a new folder that has a passing name until [`NewFolder::publish`].
    ///
    /// # Errors
    /// Any of `mkdir(2)`.
    pub fn new_folder(&self) -> Result<NewFolder<'_>> {
        let name = temporary_name();
        let path = self.path.join(&name);
        fault::point();
        rustix::fs::mkdirat(&self.file, &name, Mode::from_raw_mode(0o755))
            .context(&path, "make the folder")?;
        Ok(NewFolder {
            inside: Folder::open(&path)?,
            name: Some(name),
            parent: self,
        })
    }

    /// Makes what happened to names here stable.
    ///
    /// # Errors
    /// Any of `fsync(2)`.
    pub fn sync(&self) -> Result<()> {
        fault::point();
        self.file.sync_all().context(&self.path, "sync the folder")
    }
}

/// A file, synced, that is to take the place of another. Dropped, it is gone.
#[derive(Debug)]
pub(super) struct Replacement<'a> {
    /// The name that it has meanwhile.
    passing: Option<String>,
    name: &'static str,
    folder: &'a Folder,
}

impl<'a> Replacement<'a> {
    /// Where it is.
    pub fn folder(&self) -> &'a Folder {
        self.folder
    }

    /// Puts it in place, in one step, and makes that stable.
    ///
    /// # Errors
    /// Any of `rename(2)` and `fsync(2)`. After the latter it may be in place.
    pub fn publish(self) -> Result<()> {
        let folder = self.folder;
        self.put()?;
        folder.sync()
    }

    /// Puts it in place, in one step, which is not stable yet.
    ///
    /// # Errors
    /// Any of `rename(2)`: it is not in place.
    pub fn put(mut self) -> Result<()> {
        let path = self.folder.path.join(self.name);
        let folder = &self.folder.file;
        if let Some(passing) = &self.passing {
            fault::point();
            rustix::fs::renameat(folder, passing, folder, self.name).context(&path, "replace")?;
        }
        self.passing = None;
        Ok(())
    }
}

impl Drop for Replacement<'_> {
    fn drop(&mut self) {
        if let Some(passing) = &self.passing {
            let _ = rustix::fs::unlinkat(&self.folder.file, passing, AtFlags::empty());
        }
    }
}

/// A file that has not got its name yet. Dropped, it is gone.
#[derive(Debug)]
pub struct NewFile<'a> {
    image: HostImage,
    name: OsString,
    /// The name that it has meanwhile, where files without one are not to be had.
    passing: Option<String>,
    folder: &'a Folder,
}

impl NewFile<'_> {
    /// To write it.
    pub fn image(&self) -> &HostImage {
        &self.image
    }

    /// Gives the file, synced, its name, and makes that stable.
    ///
    /// # Errors
    /// [`ImageError::Exists`] if the name is taken; any of `fsync(2)`, `link(2)`
    /// and `rename(2)`.
    pub fn publish(mut self) -> Result<()> {
        let path = self.folder.path.join(&self.name);
        let file = self.image.file();
        fault::point();
        self.image.sync_all().context(&path, "sync")?;
        fault::point();
        let folder = &self.folder.file;
        let named = match &self.passing {
            Some(passing) => rename_new(folder, passing, &self.name, rename_new_file),
            None => {
                let same = format!("/proc/self/fd/{}", file.as_raw_fd());
                let flags = AtFlags::SYMLINK_FOLLOW;
                rustix::fs::linkat(rustix::fs::CWD, same, folder, &self.name, flags)
            }
        };
        if named == Err(Errno::EXIST) {
            return Err(ImageError::Exists(path));
        }
        named.context(&path, "create")?;
        self.passing = None;
        self.folder.sync()
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if let Some(passing) = &self.passing {
            let _ = rustix::fs::unlinkat(&self.folder.file, passing, AtFlags::empty());
        }
    }
}

/// A folder that has not got its name yet. Dropped, it is gone, with the files
/// in it.
#[derive(Debug)]
pub struct NewFolder<'a> {
    inside: Folder,
    name: Option<String>,
    parent: &'a Folder,
}

impl NewFolder<'_> {
    /// To fill it.
    pub fn inside(&self) -> &Folder {
        &self.inside
    }

    /// Gives the folder, synced, its name, and makes that stable.
    ///
    /// # Errors
    /// [`ImageError::Exists`] if the name is taken; any of `fsync(2)` and
    /// `rename(2)`.
    pub fn publish(mut self, name: &OsStr) -> Result<()> {
        let path = self.parent.path.join(name);
        self.inside.sync()?;
        if let Some(passing) = &self.name {
            fault::point();
            match rename_new(&self.parent.file, passing, name, rename_new_folder) {
                Err(Errno::EXIST | Errno::NOTEMPTY) => return Err(ImageError::Exists(path)),
                renamed => renamed.context(&path, "create")?,
            }
        }
        self.name = None;
        self.parent.sync()
    }
}

impl Drop for NewFolder<'_> {
    fn drop(&mut self) {
        let Some(name) = &self.name else { return };
        for (file, _) in self.inside.names().unwrap_or_default() {
            let _ = rustix::fs::unlinkat(&self.inside.file, &file, AtFlags::empty());
        }
        let _ = rustix::fs::unlinkat(&self.parent.file, name, AtFlags::REMOVEDIR);
    }
}

/// Renames without replacing anything. `otherwise` does that where the file system has
/// no rename of that kind.
fn rename_new(
    folder: &File,
    from: &str,
    to: &OsStr,
    otherwise: fn(&File, &str, &OsStr) -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(folder, from, folder, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => otherwise(folder, from, to),
        renamed => renamed,
    }
}

/// A file gets its name as a second one, which replaces nothing either. A crash in
/// between leaves it both.
fn rename_new_file(folder: &File, from: &str, to: &OsStr) -> rustix::io::Result<()> {
    rustix::fs::linkat(folder, from, folder, to, AtFlags::empty())?;
    fault::point();
    rustix::fs::unlinkat(folder, from, AtFlags::empty())
}

/// A folder takes the place of an empty one that was made for that, which replaces
/// nothing either. A crash in between leaves the empty one.
fn rename_new_folder(folder: &File, from: &str, to: &OsStr) -> rustix::io::Result<()> {
    rustix::fs::mkdirat(folder, to, Mode::from_raw_mode(0o755))?;
    fault::point();
    let renamed = rustix::fs::renameat(folder, from, folder, to);
    if renamed.is_err() {
        let _ = rustix::fs::unlinkat(folder, to, AtFlags::REMOVEDIR);
    }
    renamed
}

fn temporary_name() -> String {
    let id = uuid::Uuid::new_v4();
    format!("{TEMPORARY_PREFIX}{}", id.simple())
}

/// How long a name may lead to a file that is no longer there. A client of a network
/// file system keeps names for a second or so; what other hosts do to them meanwhile
/// it does not see.
const STALE_NAME_PATIENCE: Duration = Duration::from_secs(3);

/// The pause between two tries.
const STALE_NAME_PAUSE: Duration = Duration::from_millis(50);

/// Opens what must be a regular file. What it is is looked at first, without
/// opening it: a FIFO would wait, a device could do anything.
pub(super) fn open_regular(
    folder: impl AsFd,
    name: impl rustix::path::Arg,
    extra: OFlags,
    writable: bool,
    path: &Path,
) -> Result<File> {
    let name = name.as_cow_c_str().context(path, "open")?;
    let start = Instant::now();
    loop {
        let there = look_up(&folder, &name, extra, path)?;
        match open_again(there.as_fd(), writable) {
            Err(errno) if is_stale(errno) && start.elapsed() < STALE_NAME_PATIENCE => {
                thread::sleep(STALE_NAME_PAUSE);
            }
            opened => return opened.context(path, "open"),
        }
    }
}

/// What is there under a name, if it is a regular file.
fn look_up(folder: impl AsFd, name: &CStr, extra: OFlags, path: &Path) -> Result<OwnedFd> {
    let look = OFlags::PATH | OFlags::CLOEXEC | extra;
    let there = rustix::fs::openat(folder, name, look, Mode::empty()).context(path, "open")?;
    let stat = rustix::fs::fstat(&there).context(path, "look at")?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(there),
        FileType::Symlink => "a symbolic link",
        FileType::Directory => "a folder",
        FileType::Fifo => "a FIFO",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Socket => "a socket",
        FileType::Unknown => "no regular file",
    };
    Err(ImageError::WrongKind {
        path: path.to_owned(),
        kind,
        expected: "an image file",
    })
}

/// Opens what was looked up. `ESTALE` if it has lost its name meanwhile.
fn open_again(there: BorrowedFd<'_>, writable: bool) -> rustix::io::Result<File> {
    let access = if writable {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    let same = format!("/proc/self/fd/{}", there.as_raw_fd());
    let fd = rustix::fs::open(&same, access | OFlags::CLOEXEC, Mode::empty())?;
    match filesystem::stat_now(&fd) {
        Ok(stat) if stat.stx_nlink == 0 => return Err(Errno::STALE),
        Err(error) if Errno::from_io_error(&error).is_some_and(is_stale) => {
            return Err(Errno::STALE);
        }
        _ => {}
    }
    if filesystem::may_be_shared(&fd) {
        // The client of a network file system may answer all of that from what it knows, and
        // open when something is read. What goes around its caches it has to ask for.
        let direct = access | OFlags::CLOEXEC | OFlags::DIRECT;
        if rustix::fs::open(same, direct, Mode::empty()).is_err_and(is_stale) {
            return Err(Errno::STALE);
        }
    }
    Ok(File::from(fd))
}

/// What is said of a file that was there when it was looked up.
fn is_stale(errno: Errno) -> bool {
    matches!(errno, Errno::STALE | Errno::NOENT)
}

#[cfg(all(test, not(ploop_loom)))]
mod tests;
