//! Who may use a file: its owner, group and mode, which a file keeps that takes the
//! place of another or holds what was in another.
//!
//! What is made here is made for its maker alone first ([`PRIVATE`]), so that at no
//! moment anybody can read it who could not read the file that it comes from.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Gid, Mode, Uid};

use super::error::{IoContext, Result};

/// The mode, before the umask, of every new file: a guest's disk is nobody else's
/// business.
pub(super) const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Owner, group and mode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ownership {
    uid: u32,
    gid: u32,
    /// Reading, writing and executing.
    mode: u32,
}

impl Ownership {
    /// Of an open file.
    ///
    /// # Errors
    /// Any of `fstat(2)`.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let metadata = file.metadata().context(path, "look at")?;
        Ok(Self {
            uid: metadata.uid(),
            gid: metadata.gid(),
            mode: metadata.mode() & 0o777,
        })
    }

    /// Of what a disk is read from. That of a device says nothing of files.
    ///
    /// # Errors
    /// Any of `fstat(2)`.
    pub fn of_image(file: &File, path: &Path) -> Result<Option<Self>> {
        let is_file = file.metadata().context(path, "look at")?.is_file();
        is_file.then(|| Self::of(file, path)).transpose()
    }

    /// Gives it to a file that was made with the mode [`PRIVATE`]. What we may not
    /// give it gets nobody instead: of another group, what the group may is left out.
    ///
    /// # Errors
    /// Any of `fstat(2)` and `fchmod(2)`.
    pub fn give(&self, file: &File, path: &Path) -> Result<()> {
        let is_kept = self.give_owner(file).context(path, "look at")?;
        let mode = match is_kept {
            true => self.mode,
            false => self.mode & !0o070,
        };
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode)).context(path, "set the mode of")
    }

    /// Says whether the file has the group now.
    fn give_owner(&self, file: &File) -> io::Result<bool> {
        let now = file.metadata()?;
        if (now.uid(), now.gid()) == (self.uid, self.gid) {
            return Ok(true);
        }
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let given = rustix::fs::fchown(file.as_fd(), Some(uid), Some(gid));
        if given.is_ok() {
            return Ok(true);
        }
        // The group at least: an owner may give a file to each group of theirs.
        let given = rustix::fs::fchown(file.as_fd(), None, Some(gid));
        Ok(given.is_ok() || now.gid() == self.gid)
    }
}
