//! Where the images lie. Each bed shows another part of a server.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::scratch;

/// A kind of storage and how it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bed {
    /// A file of a real file system, in the page cache, without O_DIRECT. Reads
    /// end within the system call: what is left is the path of the CPU.
    PageCache,
    /// tmpfs with O_DIRECT: nothing waits for a device, and io_uring cannot run
    /// an operation in line.
    Tmpfs,
    /// A file of a real file system with O_DIRECT: the way to the device.
    Disk,
}

impl Bed {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 3] = [Self::PageCache, Self::Tmpfs, Self::Disk];

    /// As printed.
    pub fn label(self) -> &'static str {
        match self {
            Self::PageCache => "page cache",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    /// For file names.
    pub fn slug(self) -> &'static str {
        match self {
            Self::PageCache => "page-cache",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    /// Whether files are opened with O_DIRECT.
    pub fn is_direct(self) -> bool {
        self != Self::PageCache
    }
}

/// The directories of the beds.
#[derive(Clone, Debug)]
pub struct Directories {
    /// On a real file system.
    pub disk: PathBuf,
    /// On tmpfs.
    pub tmpfs: PathBuf,
}

impl Directories {
    /// The directory of a bed.
    pub fn of(&self, bed: Bed) -> &PathBuf {
        match bed {
            Bed::PageCache | Bed::Disk => &self.disk,
            Bed::Tmpfs => &self.tmpfs,
        }
    }

    /// Bytes that files on a bed may still take.
    ///
    /// # Errors
    /// The directory cannot be looked at.
    pub fn free(&self, bed: Bed) -> Result<u64> {
        let dir = self.of(bed);
        let fs =
            rustix::fs::statvfs(dir).with_context(|| format!("statvfs of {}", dir.display()))?;
        Ok(fs.f_bavail * fs.f_frsize)
    }

    /// A new directory on a bed, removed with all that is in it when dropped.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make(&self, bed: Bed) -> Result<TempDir> {
        scratch::make(self.of(bed))
    }
}
