//! Host file I/O: the seam between the engine and the kernel.
//!
//! A [`Disk`] is the set of host files that one virtual disk lies in (the deltas
//! of a chain, base first). Each thread that does I/O opens its own [`Io`] on it:
//! its own ring, and where the file system allows it its own file descriptions. Tests put a simulated disk here.
//!
//! Knows files, offsets, memory segments and alignment. Must not know what a
//! cluster, a BAT or a guest is.

pub mod filesystem;
mod host;
mod limits;
pub mod lock;
pub mod lock_promise;
#[cfg(all(test, not(ploop_loom)))]
pub(crate) mod one_file_fs;
pub mod opening;
mod segments;
mod shared;
pub(crate) mod zeros;

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use rustix::io::Errno;

pub use host::{
    Aio, Cache, FileWatch, HostDisk, HostFile, HostIo, HostOptions, KnownFile, LockWatch, Look,
    LookFor, Moment, NewTop, NotOpenable, SeesMark, WatchError, start_maker,
};
pub use limits::ease_limits;
pub use segments::{AlignedBuf, Buffer, Segment, Segments};
pub use shared::SharedWords;

/// Which of the files of a [`Disk`]: 0 is the base, the highest the top delta.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u8);

/// What is known of the locks on the files of a [`Disk`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum LockStanding {
    /// Nobody looks: they cannot be lost as long as this host lives.
    #[default]
    Unwatched,
    /// They were there at the last look.
    Held,
    /// They may be gone: nothing is begun until that is known.
    InDoubt,
    /// They are gone. Nothing is begun any more, for good.
    Lost,
}

/// What to do with a range that shall read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Give the space back (`FALLOC_FL_PUNCH_HOLE`); parts of host blocks are
    /// zeroed in place. Where the file system cannot, zeros are written over what is anything
    /// else: no space is taken that was not taken before.
    Punch,
    /// Keep the space (`FALLOC_FL_ZERO_RANGE`, else zeros are written).
    KeepAllocated,
}

/// One operation on a host file. Owns the memory that it reads or fills, for as
/// long as it is in flight.
#[derive(Debug)]
pub enum Op {
    /// Fill the buffer from `offset`. Beyond the end of the file it reads zeros.
    Read {
        /// From where.
        file: FileId,
        /// In bytes, of any alignment.
        offset: u64,
        /// To where; its length is the length of the transfer.
        buffer: Buffer,
    },
    /// Write the buffer at `offset`. Fails with `EINVAL` if it does not start
    /// and end at multiples of [`Disk::write_alignment`].
    Write {
        /// To where.
        file: FileId,
        /// In bytes.
        offset: u64,
        /// What; its length is the length of the transfer.
        buffer: Buffer,
        /// Complete only when the data is stable (`RWF_DSYNC`).
        dsync: bool,
    },
    /// Make a range inside the file read as zeros. Does not change the length of
    /// the file. Where the file system can only be made to by writing, this is a
    /// read-modify-write of the blocks (of [`Disk::write_alignment`]) that the
    /// range covers in part: nothing else may write there meanwhile, and a file
    /// that ends inside the last of them is made to end with it.
    Zero {
        /// Where.
        file: FileId,
        /// In bytes, of any alignment.
        offset: u64,
        /// In bytes.
        len: u64,
        /// What becomes of the space.
        mode: ZeroMode,
    },
    /// Make the file at least `offset + len` long and allocate the range; what
    /// was there stays, what is new reads as zeros. Where the file system cannot
    /// allocate, the file is only made longer.
    Allocate {
        /// Where.
        file: FileId,
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
    },
    /// Make a range of a file have the data of a range of another one, which then
    /// lies on the disk once for both (`FICLONERANGE`). Fails with `EOPNOTSUPP`
    /// where the file system cannot do that with these files and ranges; see
    /// [`Disk::clone_unit`]. If it fails, parts of the range may have changed.
    Clone {
        /// Whose data.
        from: FileId,
        /// In bytes.
        from_offset: u64,
        /// To where.
        file: FileId,
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
    },
    /// Make everything that completed before this was submitted stable, the
    /// length of the file included (`fdatasync`, or `fsync` where that keeps no length).
    Sync {
        /// Of which file.
        file: FileId,
    },
}

impl Op {
    /// The file that it is about.
    pub fn file(&self) -> FileId {
        match *self {
            Self::Read { file, .. }
            | Self::Write { file, .. }
            | Self::Zero { file, .. }
            | Self::Allocate { file, .. }
            | Self::Clone { file, .. }
            | Self::Sync { file } => file,
        }
    }
}

/// The end of an operation. Transfers are whole or failed: an [`Io`] continues
/// short ones by itself, and one that cannot continue fails with `EIO`.
#[derive(Debug)]
pub struct Completion {
    /// The tag given to [`Io::queue`].
    pub tag: u64,
    /// How it went.
    pub result: Result<(), Errno>,
    /// The operation, given back with its memory.
    pub op: Op,
}

/// One thread's access to a [`Disk`]. Dropping it waits for what is in flight;
/// what was queued and not submitted may be dropped undone.
///
/// It belongs to one thread at a time, and should pass to another one only while
/// nothing is in flight: the kernel may want to complete things on the old one.
pub trait Io: Send {
    /// Takes an operation. It may start at once or with the next [`Self::submit`].
    ///
    /// # Errors
    /// Gives the operation back when there is no room for it: call
    /// [`Self::submit`] and [`Self::reap`], then try again.
    fn queue(&mut self, tag: u64, op: Op) -> Result<(), Op>;

    /// Starts what was queued: one system call for all of it.
    fn submit(&mut self);

    /// Appends what has completed to `done`, without waiting.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Operations queued or started and not yet given out by [`Self::reap`].
    fn in_flight(&self) -> usize;

    /// A descriptor that polls readable while [`Self::reap`] has something to
    /// give; `None` if completions never come by themselves (they are there
    /// after [`Self::submit`]). A wait for it can end with `EINTR` as soon as
    /// something completes.
    fn completion_fd(&self) -> Option<RawFd>;
}

/// The files of one virtual disk. The methods here block and are for opening,
/// closing and offline work.
pub trait Disk: Send + Sync + 'static {
    /// One thread's access.
    type Io: Io + 'static;

    /// A new ring for a thread, and file descriptions; `depth` is how many
    /// operations at least it can have in flight.
    ///
    /// # Errors
    /// Any of `open(2)` and `io_uring_setup(2)`.
    fn open_io(&self, depth: u32) -> io::Result<Self::Io>;

    /// Length of a file in bytes.
    ///
    /// # Errors
    /// Any of `fstat(2)`.
    fn len(&self, file: FileId) -> io::Result<u64>;

    /// Cuts or extends a file (`ftruncate`). Where a cut to that very length could take
    /// what is in front of it, a block of zeros stays behind it.
    ///
    /// # Errors
    /// Any of `ftruncate(2)`.
    fn set_len(&self, file: FileId, len: u64) -> io::Result<()>;

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// Any of `pread(2)`; `UnexpectedEof` beyond the end of the file.
    fn read_exact_at(&self, file: FileId, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Where the first data at or behind `offset` begins and ends, `None` if there is none:
    /// everything else is a hole. Where the file system does not say, all of it is data.
    ///
    /// # Errors
    /// Any of `lseek(2)`.
    fn next_data(&self, file: FileId, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.len(file)?;
        Ok((offset < len).then_some(offset..len))
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// Any of `pwrite(2)`.
    fn write_all_at(&self, file: FileId, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Allocates a range inside the file, so that writes to it find space; what
    /// was there stays. Where the file system cannot, nothing happens.
    ///
    /// # Errors
    /// Any of `fallocate(2)`.
    fn allocate(&self, file: FileId, offset: u64, len: u64) -> io::Result<()>;

    /// As [`Op::Sync`].
    ///
    /// # Errors
    /// Any of `fsync(2)`; after one, nothing written before is to be relied on.
    fn sync(&self, file: FileId) -> io::Result<()>;

    /// The unit in bytes, a power of two, in which the host file system gives
    /// space back (its block size).
    fn zero_granularity(&self) -> u32;

    /// The unit in bytes, a power of two, that the offsets and the length of an
    /// [`Op::Clone`] into the top file must be multiples of; `None` if it is known
    /// that there is no use in trying one. It can become `None`, and then stays so.
    fn clone_unit(&self) -> Option<u32> {
        None
    }

    /// The unit in bytes, a power of two, that the offset and the length of an
    /// [`Op::Write`] must be multiples of at present: what direct I/O demands of
    /// the top file. It can become smaller, never larger.
    fn write_alignment(&self) -> u32 {
        1
    }

    /// Whether an [`Op::Write`] of the top file with `dsync` takes nothing from another.
    /// If not, its error can be the only word of what the other one lost: then one thread
    /// alone may make something stable. Nor if a sync of data keeps no length.
    fn has_stable_writes(&self) -> bool {
        true
    }

    /// The name under which somebody opened a file for writing last: see
    /// [`Self::set_opening`]. `None` if there is none, or none can be kept.
    ///
    /// # Errors
    /// Any of `fgetxattr(2)` but that there is none.
    fn opening(&self, _: FileId) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// Keeps with a file the name of its present opening for writing. It need not
    /// survive a power cut.
    ///
    /// # Errors
    /// `Unsupported` where the file system keeps no attributes; any of `fsetxattr(2)`.
    fn set_opening(&self, _: FileId, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes sure that the lock on a file is there that nobody looks after yet, as far as that
    /// can be seen. If it is not, nothing is written any more.
    ///
    /// # Errors
    /// When it is gone, or cannot be asked for.
    fn require_lock(&self, _: FileId) -> io::Result<()> {
        Ok(())
    }

    /// What is known of the locks on the files.
    fn lock_standing(&self) -> LockStanding {
        LockStanding::Unwatched
    }

    /// Blocks as long as it is in doubt whether the locks are there.
    fn wait_for_locks(&self) {}

    /// Has the locks looked at before anything else is begun, if somebody looks after them.
    fn doubt_locks(&self) {}

    /// What will be written to the top file is not aligned as direct I/O demands
    /// it: afterwards [`Self::write_alignment`] is 1.
    fn forgo_direct(&self) {}
}
