//! What can go wrong in the engine.

use std::io;

use rustix::io::Errno;
use thiserror::Error;

use crate::format::{ExtensionError, HeaderError, Sector, TooLarge};
use crate::storage::FileId;

/// Why a request failed. Cheap to copy: one failed sync fails many requests.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum EngineError {
    /// The host file answered this to the I/O of this very request.
    #[error("host I/O failed: {0}")]
    Io(Errno),
    /// The host file system is full, and the request may not wait any longer.
    #[error("no space left on the host file system")]
    NoSpace,
    /// The request lies outside the disk, or runs past its end.
    #[error("{count} sectors at sector {start} reach past the end of the disk")]
    PastEnd {
        /// First sector.
        start: u64,
        /// How many.
        count: u64,
    },
    /// The length of the memory is no multiple of a sector.
    #[error("{0} bytes are not a whole number of sectors")]
    PartialSector(usize),
    /// The disk is served read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// A page of the BAT could not be written. It stays dirty and is tried again.
    #[error("the block allocation table could not be written: {0}")]
    Metadata(Errno),
    /// A sync failed, so nothing written since the last good one can be relied
    /// on. Nothing becomes stable any more until the image is opened again.
    #[error("a sync of the image failed earlier: open it again and check it")]
    SyncFailed,
    /// The lock on the image is gone, so that others may use it: nothing is read or written
    /// any more.
    #[error("the lock on the image was lost, and another host may use it")]
    LockLost,
    /// The image has no room for another cluster: its version cannot address it.
    #[error("the image cannot hold more clusters")]
    ImageFull,
    /// A disk cannot become smaller while it is used.
    #[error(
        "it has {} bytes and cannot shrink to {} while it is in use",
        Sector(*.from).bytes(), Sector(*.to).bytes()
    )]
    Smaller {
        /// In sectors.
        from: u64,
        /// In sectors.
        to: u64,
    },
    /// The format cannot hold a disk of this size.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// There is not the memory for the BAT of a larger disk.
    #[error("there is not enough memory for the block allocation table of so large a disk")]
    Memory,
    /// A dirty bitmap would have more bits than one may have.
    #[error(
        "a dirty bitmap of the disk is too fine for so large a disk: remove it first, and make one \
         of a larger granularity then"
    )]
    FineBitmap,
    /// The format has one cluster for the tables of all.
    #[error(
        "the image has no place for the persistent dirty bitmaps of so large a disk: remove one \
         first, or make it anew with a larger granularity"
    )]
    ManyBitmaps,
    /// Two cannot make it larger at a time, nor is a snapshot made meanwhile.
    #[error("the disk is already being made larger")]
    Growing,
    /// The header says, or may say, that the disk is larger than its guest knows: writing that
    /// failed. Above such an image there can be no smaller one.
    #[error(
        "the disk was to become larger, and that failed in the last step: try that again first"
    )]
    HalfGrown,
    /// Nothing but its data can change while it is suspended.
    #[error("the disk is suspended, and stays what it is until it is resumed")]
    Suspended,
    /// The chain is as long as it may be.
    #[error(
        "the chain would have more than {} levels, the most that is served; delete or merge \
         snapshots first",
        super::levels::LEVELS_MAX
    )]
    TooDeep,
    /// Each level takes a number, and one that is deleted does not give its own back.
    #[error(
        "this process has used up its {} numbers for levels, of which each snapshot takes one, \
         whether it was deleted since or not: end it and start another one, or have another one \
         take over from it (--take-over)",
        super::levels::LEVELS_MAX
    )]
    NoLevelNumber,
    /// The top was not closed for a new one.
    #[error("the top is in use, and no other one can take its place")]
    TopInUse,
    /// Another one has become the top.
    #[error("a snapshot was made meanwhile")]
    TopChanged,
    /// The top is the base.
    #[error("there is no level below the top")]
    NoLevelBelow,
    /// Nothing was prepared.
    #[error("nothing was prepared for a larger disk")]
    NotPrepared,
    /// The image was not closed, and its guest may come back for what is not in it.
    #[error(
        "a guest of a process that was killed may come back; until it has, or the image is \
         opened without it, the disk stays what it is"
    )]
    GuestAwaited,
    /// The engine was closed, or has dropped the request because it is stopping.
    #[error("the engine is stopped")]
    Stopped,
    /// Its queue was drained before all of the request was started. Some of it may have
    /// been done; it can be done again.
    #[error("the queue was stopped before all of the request was done")]
    Undone,
}

/// Why an image was not opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// A file of the chain could not be read, written or synced.
    #[error("cannot {what} of level {level}")]
    Io {
        /// "read the header", say.
        what: &'static str,
        /// Of the chain, 0 is the base.
        level: u8,
        /// What the kernel said.
        source: io::Error,
    },
    /// A header is wrong.
    #[error("the header of level {level} is wrong")]
    Header {
        /// Of the chain, 0 is the base.
        level: u8,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// The file is shorter than its header and BAT.
    #[error("level {level} is cut off: its header and BAT need {needed} bytes, the file has {len}")]
    Truncated {
        /// Of the chain, 0 is the base.
        level: u8,
        /// Bytes of header and BAT.
        needed: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// The BAT is corrupt: leaks apart, no crash of ours leaves this.
    #[error(
        "the BAT of level {level} is corrupt ({problems} wrong entries, the first: {first}); run `ploop-img check --repair all`"
    )]
    CorruptBat {
        /// Of the chain, 0 is the base.
        level: u8,
        /// How many entries.
        problems: u32,
        /// The first of them.
        first: String,
    },
    /// A conversion between format versions was cut off half-way.
    #[error(
        "a conversion between format versions of level {level} was cut off; run `ploop-img check --repair all`"
    )]
    Converting {
        /// Of the chain, 0 is the base.
        level: u8,
    },
    /// The format says that who does not know a feature of it must leave the image alone.
    #[error("level {level} was written by a program that is newer, or another one")]
    Feature {
        /// Of the chain, 0 is the base.
        level: u8,
        /// Which feature.
        source: ExtensionError,
    },
    /// A level does not fit the one above it.
    #[error("level {level} does not fit the chain: {why}")]
    Misfit {
        /// Of the chain, 0 is the base.
        level: u8,
        /// What does not fit.
        why: &'static str,
    },
    /// A chain has at least one level and at most 127.
    #[error(
        "a chain of {0} levels cannot be served (1 to 127 can); delete or merge snapshots first"
    )]
    Levels(usize),
    /// There is not the memory for the BAT, which takes at most eight bytes for
    /// each of its entries.
    #[error("there is not enough memory for a BAT of {entries} entries")]
    Memory {
        /// Of the top.
        entries: u32,
    },
    /// Threads, rings or descriptors could not be made.
    #[error("cannot set up the I/O of the engine")]
    Setup(#[source] io::Error),
}

impl OpenError {
    pub(super) fn io(what: &'static str, file: FileId) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            level: file.0,
            source,
        }
    }
}

impl EngineError {
    /// What the host answered to I/O that takes space.
    pub(super) const fn of_host(errno: Errno) -> Self {
        match errno {
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace,
            errno => Self::Io(errno),
        }
    }

    pub(super) fn past_end(start: Sector, count: Sector) -> Self {
        Self::PastEnd {
            start: start.0,
            count: count.0,
        }
    }
}
