//! One host file: what all threads know about it, and one thread's description.
//!
//! Direct I/O is decided here and nowhere else: whether the file is read and
//! written around the page cache, and the way back when it turns out that it does
//! not work. What it demands is known in [`direct`](super::direct).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::Statx;
use rustix::io::Errno;

use super::direct::{
    Alignment, BUFFER_ALIGNMENT, is_refusal_of_direct, open_direct, reopen, reopen_or_share,
    set_direct,
};
use super::lease::{LOST, Lease};
use super::{Cache, HostFile};
use crate::storage::filesystem::Kind;
use crate::storage::{AlignedBuf, LockStanding, filesystem, opening};

/// The uses of `fallocate(2)`. Which of them a file system knows shows when it
/// is asked for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fallocation {
    /// Give space back.
    Punch,
    /// Zero, keep the space.
    ZeroRange,
    /// Take space, make the file longer.
    Allocate,
}

impl Fallocation {
    /// The argument of the system call.
    pub(super) fn mode(self) -> i32 {
        match self {
            Self::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Allocate => 0,
        }
    }
}

/// What all threads know about a file.
#[derive(Debug)]
pub(super) struct SharedFile {
    /// For the methods that block, for threads that cannot have their own, and for all
    /// where there [must be one](Self::must_share) only.
    file: File,
    /// In its place since direct I/O was given up. `file` stays: what was written to it
    /// has to be synced there, see [`Description::next_to_sync`].
    buffered: OnceLock<File>,
    /// Held to open that.
    opening_buffered: Mutex<()>,
    kind: Kind,
    /// No thread may have a description of its own: see
    /// [`Kind::tells_lost_writes_once`]. Nor may any be closed before the end.
    must_share: bool,
    /// Not `fdatasync(2)` but `fsync(2)`: see [`Kind::keeps_length_with_data`].
    syncs_whole: bool,
    /// The caller's description, to which locks belong.
    given: File,
    path: PathBuf,
    writable: bool,
    /// How `file` and the threads' descriptions are opened.
    opened_direct: bool,
    alignment: Alignment,
    /// Cleared for good by the first transfer that the file refuses to do
    /// directly. Each thread then clears `O_DIRECT` on its own description.
    direct: AtomicBool,
    /// Indexed by [`Fallocation`].
    refused: [AtomicBool; 3],
    /// Ranges of other files could not be cloned into this one.
    clone_refused: AtomicBool,
    /// Held to make the file longer or shorter where that takes a look at its
    /// length first, and to judge its length.
    length: Mutex<()>,
    /// How long the file was made or seen to be, in bytes. Nobody else may make it
    /// shorter.
    known_len: AtomicU64,
    /// What it took on the disk when that was looked at last, in units of 512 bytes.
    known_blocks: AtomicU64,
    /// How long it was when it was found that somebody had; `NOT_CUT` as long as
    /// nobody has.
    cut_at: AtomicU64,
    /// How far it may be used at present, in bytes; `NOT_CUT` as far as it goes. All I/O
    /// looks at this, and at nothing else unless it is less.
    usable_to: AtomicU64,
    /// Held to change that.
    judging: Mutex<()>,
    /// It belongs to the disk no more.
    is_retired: AtomicBool,
    /// By which it is to be used, where a server may take its locks away.
    lease: Option<Arc<Lease>>,
    /// What was found when its lock was taken.
    shown: Shown,
    /// The name of the opening that the file has, as far as this process has given it one, or
    /// has seen it: see [`Self::is_still_named`].
    name: Mutex<Option<Option<u64>>>,
}

/// What one description is told of the locks of another one of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// Nothing.
    No,
    /// That they are there.
    Yes,
    /// That those were gone which were there before.
    Lost,
}

/// Of a file that nobody has made shorter.
const NOT_CUT: u64 = u64::MAX;

impl SharedFile {
    /// Opens a description for `given` as `cache` wants it, as far as the file
    /// system lets it.
    pub(super) fn new(
        given: HostFile,
        cache: Cache,
        lease: Option<&Arc<Lease>>,
    ) -> io::Result<Self> {
        let HostFile {
            file: given,
            path,
            writable,
        } = given;
        let kind = Kind::of(&given);
        let mut opened = None;
        // Its client goes on showing through its cache what was there before a direct write, which
        // the process before may have made, or another host: data and mapping would be old.
        let has_old_cache = kind.is_fuse() && filesystem::is_ceph(&given);
        if has_old_cache && cache != Cache::None {
            log::warn!(
                "{}: ceph-fuse shows what is out of date through the page cache: it is not used",
                path.display()
            );
        }
        if cache == Cache::None || has_old_cache {
            match open_direct(&given, writable, kind) {
                Ok(direct) => opened = Some(direct),
                Err(error) if is_refusal_of_direct(&error) => warn_buffered(&path, &error),
                Err(error) => return Err(error),
            }
        }
        let (file, alignment) = match opened {
            Some((file, alignment)) => (file, Some(alignment)),
            None => {
                let shared = given.try_clone()?;
                (reopen_or_share(shared, writable, false)?, None)
            }
        };
        let shown = lease.and_then(|lease| lock_first(lease, &file, &given, &path));
        let lease = lease.filter(|_| shown.is_some()).cloned();
        let refused: [AtomicBool; 3] = Default::default();
        if kind.is_in_memory() {
            // Allocating is zeroing there, which would only be done too early.
            refused[Fallocation::Allocate as usize].store(true, Relaxed);
        }
        if kind.is_fuse() {
            // GlusterFS says that it has zeroed, and has not.
            refused[Fallocation::ZeroRange as usize].store(true, Relaxed);
        }
        let metadata = file.metadata()?;
        Ok(Self {
            known_len: AtomicU64::new(metadata.len()),
            known_blocks: AtomicU64::new(metadata.blocks()),
            cut_at: AtomicU64::new(NOT_CUT),
            usable_to: AtomicU64::new(NOT_CUT),
            judging: Mutex::new(()),
            is_retired: AtomicBool::new(false),
            lease,
            shown: shown.unwrap_or(Shown::No),
            name: Mutex::new(None),
            kind,
            must_share: kind.tells_lost_writes_once(),
            syncs_whole: !kind.keeps_length_with_data(),
            file,
            buffered: OnceLock::new(),
            opening_buffered: Mutex::new(()),
            given,
            path,
            writable,
            opened_direct: alignment.is_some(),
            alignment: alignment.unwrap_or(Alignment::NONE),
            direct: AtomicBool::new(alignment.is_some()),
            refused,
            clone_refused: AtomicBool::new(false),
            length: Mutex::new(()),
        })
    }

    /// Takes space for a range now, whatever that costs. A file system that cannot
    /// is left alone.
    pub(super) fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.require_usable()?;
        let keep = rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(self.file(), keep, offset, len) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            result => Ok(result?),
        }
    }

    /// A file that is taken to be direct with this alignment, whatever it is.
    #[cfg(test)]
    pub(super) fn pretend_direct(file: File, alignment: Alignment) -> Self {
        Self {
            known_len: AtomicU64::new(file.metadata().expect("it is open").len()),
            known_blocks: AtomicU64::new(0),
            cut_at: AtomicU64::new(NOT_CUT),
            usable_to: AtomicU64::new(NOT_CUT),
            judging: Mutex::new(()),
            is_retired: AtomicBool::new(false),
            lease: None,
            shown: Shown::No,
            name: Mutex::new(None),
            given: file.try_clone().expect("a descriptor can be copied"),
            kind: Kind::of(&file),
            must_share: Kind::of(&file).tells_lost_writes_once(),
            syncs_whole: !Kind::of(&file).keeps_length_with_data(),
            file,
            buffered: OnceLock::new(),
            opening_buffered: Mutex::new(()),
            path: PathBuf::from("pretended"),
            writable: true,
            opened_direct: true,
            alignment,
            direct: AtomicBool::new(true),
            refused: Default::default(),
            clone_refused: AtomicBool::new(false),
            length: Mutex::new(()),
        }
    }

    /// The description with the locks that say that this file is written to, if it is.
    pub(super) fn writers_lock(&self) -> Option<BorrowedFd<'_>> {
        self.writable.then(|| self.given.as_fd())
    }

    /// Whether more than data has to be synced for a length to be stable.
    pub(super) fn syncs_whole(&self) -> bool {
        self.syncs_whole
    }

    /// See [`crate::storage::Disk::opening`].
    pub(super) fn opening(&self) -> io::Result<Option<u64>> {
        opening::opening(&self.file)
    }

    /// See [`crate::storage::Disk::set_opening`].
    pub(super) fn set_opening(&self, opening: u64) -> io::Result<()> {
        self.require_lease()?;
        let mut name = self.lock_name();
        opening::set_opening(&self.file, opening)?;
        *name = Some(Some(opening));
        Ok(())
    }

    /// From now on [`Self::is_still_named`] can be asked. `false` if nobody could answer.
    pub(super) fn note_name(&self) -> io::Result<bool> {
        let mut name = self.lock_name();
        *name = Some(opening::opening(&self.file)?);
        Ok(opening::can_be_named(&self.file))
    }

    /// Whether the name of its opening is the one that it had when this process gave it one,
    /// or looked: else somebody else has opened it.
    pub(super) fn is_still_named(&self) -> io::Result<bool> {
        let name = self.lock_name();
        Ok(*name == Some(opening::opening(&self.file)?))
    }

    fn lock_name(&self) -> MutexGuard<'_, Option<Option<u64>>> {
        self.name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was found when its lock was taken.
    pub(super) fn shown(&self) -> Shown {
        self.shown
    }

    /// The descriptions whose locks keep others away, or are looked at, besides those for
    /// looks alone.
    pub(super) fn locked_descriptions(&self) -> impl Iterator<Item = &File> {
        [Some(&self.file), self.buffered.get()]
            .into_iter()
            .flatten()
    }

    /// In bytes.
    pub(super) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// In bytes, and no less than it is known to be: a server can be late to say (GlusterFS's
    /// client for a second or so).
    pub(super) fn len_at_least(&self) -> io::Result<u64> {
        Ok(self.len()?.max(self.known_len.load(Relaxed)))
    }

    /// Cuts or extends it to `len` bytes, or a little more: the caller then zeroes what
    /// is behind ([`filesystem::len_to_set`]). Says how long it is.
    pub(super) fn set_len(&self, len: u64) -> io::Result<u64> {
        let _guard = self.length.lock().unwrap_or_else(PoisonError::into_inner);
        self.require_usable()?;
        let len = filesystem::len_to_set(self.file(), len, self.known_len.load(Relaxed))?;
        self.file().set_len(len)?;
        self.known_len.store(len, Relaxed);
        Ok(len)
    }

    /// Extends it to `len` bytes if it is shorter.
    pub(super) fn extend_to(&self, len: u64) -> io::Result<()> {
        let _guard = self.length.lock().unwrap_or_else(PoisonError::into_inner);
        self.require_usable()?;
        if self.len_at_least()? < len {
            self.file().set_len(len)?;
        }
        self.has_grown_to(len);
        Ok(())
    }

    /// Takes note that it was made at least so long.
    pub(super) fn has_grown_to(&self, len: u64) {
        self.known_len.fetch_max(len, Relaxed);
    }

    /// The name that it was opened by.
    pub(super) fn retire(&self) {
        self.is_retired.store(true, Relaxed);
    }

    /// Whether it belongs to the disk no more: nobody uses it, and it may be deleted.
    pub(super) fn is_retired(&self) -> bool {
        self.is_retired.load(Relaxed)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The description that it was opened by.
    pub(super) fn given(&self) -> &File {
        &self.given
    }

    /// Whether the file has become shorter than it was known to be, which nobody
    /// may make it. If so, it is said in the log, once, and for good.
    pub(super) fn is_found_cut(&self) -> bool {
        let _guard = self.length.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_cut() {
            return true;
        }
        if self.is_anybodys() {
            return false;
        }
        // Of a file that cannot be asked nothing is known.
        let Ok(len) = filesystem::len_now(&self.file) else {
            return false;
        };
        let known_len = self.known_len.fetch_max(len, Relaxed);
        if len >= known_len {
            return false;
        }
        self.set_cut(len);
        log::error!(
            "{}: the file was cut from {known_len} to {len} bytes while it was being served, and \
             the data behind that is gone: I/O there and every flush will fail from now on. Stop the guest, \
             find who cut the file, and check the image",
            self.path.display()
        );
        true
    }

    /// Whether the file is shorter than it was known to be, or was found cut. What
    /// it has grown, and what it takes on the disk, is taken note of.
    pub(super) fn seems_cut(&self) -> bool {
        let _guard = self.length.lock().unwrap_or_else(PoisonError::into_inner);
        let is_short = |stat: Statx| {
            self.known_blocks.store(stat.stx_blocks, Relaxed);
            stat.stx_size < self.known_len.fetch_max(stat.stx_size, Relaxed)
        };
        let is_short = || filesystem::stat_now(&self.file).is_ok_and(is_short);
        self.is_cut() || (!self.is_anybodys() && is_short())
    }

    /// What it takes on the disk, in bytes, as it was found last.
    pub(super) fn known_allocation(&self) -> u64 {
        self.known_blocks.load(Relaxed).saturating_mul(512)
    }

    /// Whether it is written to.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether all threads must use one description of it.
    pub(super) fn must_share(&self) -> bool {
        self.must_share
    }

    /// Whether its transfers go around the host's page cache at present.
    pub(super) fn is_direct(&self) -> bool {
        self.direct.load(Relaxed)
    }

    /// Whether a read that met the end of the file at `position` should have found
    /// data there.
    pub(super) fn misses_data_at(&self, position: u64) -> bool {
        position < self.known_len.load(Relaxed) && self.is_found_cut()
    }

    /// Whether the file is known to be longer than that.
    pub(super) fn reaches_beyond(&self, position: u64) -> bool {
        position < self.known_len.load(Relaxed)
    }

    /// Whether it was found to have been made shorter by somebody else.
    pub(super) fn is_cut(&self) -> bool {
        self.cut_at.load(Relaxed) != NOT_CUT
    }

    /// Whether what ends at `end` may be used: it lies in front of the place where somebody
    /// has cut the file, if that was found, and the [`Lease`] allows it.
    pub(super) fn is_usable_up_to(&self, end: u64) -> bool {
        end <= self.usable_to.load(Relaxed)
    }

    /// The same of all of it.
    pub(super) fn is_usable(&self) -> bool {
        self.usable_to.load(Relaxed) == NOT_CUT
    }

    /// Why something may not be used: what it fails with; `None` if that is not known yet,
    /// and to be waited for.
    #[cold]
    pub(super) fn why_unusable(&self) -> Option<Errno> {
        match self.lease.as_ref().map(|lease| lease.standing()) {
            Some(LockStanding::InDoubt) => None,
            Some(LockStanding::Lost) => Some(LOST),
            _ => Some(Errno::IO),
        }
    }

    /// Readable when what is in doubt is decided.
    pub(super) fn decided_fd(&self) -> Option<RawFd> {
        self.lease.as_ref().map(|lease| lease.decided_fd())
    }

    /// By which it is to be used.
    pub(super) fn lease(&self) -> Option<&Arc<Lease>> {
        self.lease.as_ref()
    }

    /// The [`Lease`] allows it, or not any more.
    pub(super) fn set_usable(&self, is_usable: bool) {
        let _guard = self.judging.lock().unwrap_or_else(PoisonError::into_inner);
        let usable_to = if is_usable {
            self.cut_at.load(Relaxed)
        } else {
            0
        };
        self.usable_to.store(usable_to, Relaxed);
    }

    fn set_cut(&self, len: u64) {
        let _guard = self.judging.lock().unwrap_or_else(PoisonError::into_inner);
        self.cut_at.store(len, Relaxed);
        self.usable_to.fetch_min(len, Relaxed);
    }

    /// Whether others may have it, and make it shorter.
    fn is_anybodys(&self) -> bool {
        let lease = self.lease.as_ref();
        lease.is_some_and(|lease| lease.standing() == LockStanding::Lost)
    }

    /// Waits while it is in doubt.
    pub(super) fn require_lease(&self) -> io::Result<()> {
        Ok(self
            .lease
            .as_ref()
            .map_or(Ok(()), |lease| lease.require())?)
    }

    fn require_usable(&self) -> io::Result<()> {
        self.require_lease()?;
        if self.is_cut() {
            return Err(Errno::IO.into());
        }
        Ok(())
    }

    /// Another description of the same file, with the lock that each has.
    fn open_again(&self, file: &File, direct: bool) -> io::Result<File> {
        let again = reopen(file, self.writable, direct)?;
        if let Some(lease) = &self.lease {
            lease.lock(&again)?;
        }
        Ok(again)
    }

    /// One without any lock, to ask by, and to read around the page cache if that is possible;
    /// `None` if the file cannot be opened again, as with rights that were given up.
    pub(super) fn open_to_ask(&self) -> io::Result<Option<File>> {
        let opened = match reopen(&self.file, false, true) {
            Err(error) if is_refusal_of_direct(&error) => reopen(&self.file, false, false),
            result => result,
        };
        match opened {
            Err(error) if is_without_rights(&error) => Ok(None),
            result => result.map(Some),
        }
    }

    /// One that is used as this is, by the lock of the [`Lease`], and around the page cache if
    /// that is possible. The same as all threads share if it cannot be opened again.
    pub(super) fn open_to_look(&self) -> io::Result<File> {
        match self.open_again(&self.file, true) {
            Err(error) if is_refusal_of_direct(&error) => self.open_again(&self.file, false),
            Err(error) if is_without_rights(&error) => self.file.try_clone(),
            result => result,
        }
    }

    /// What transfers must be aligned to at present.
    pub(super) fn alignment(&self) -> Alignment {
        if self.direct.load(Relaxed) {
            self.alignment
        } else {
            Alignment::NONE
        }
    }

    /// Whether this was not refused so far.
    pub(super) fn can(&self, what: Fallocation) -> bool {
        !self.refused[what as usize].load(Relaxed)
    }

    /// Remembers that the file system does not know this.
    pub(super) fn cannot(&self, what: Fallocation, error: Errno) {
        if !self.refused[what as usize].swap(true, Relaxed) {
            log::info!("{}: no {what:?} here ({error})", self.path.display());
        }
    }

    /// Whether it was not found so far that ranges cannot be cloned into it.
    pub(super) fn can_clone(&self) -> bool {
        !self.clone_refused.load(Relaxed)
    }

    /// Remembers that ranges cannot be cloned into it.
    pub(super) fn cannot_clone(&self, error: Errno) {
        if !self.clone_refused.swap(true, Relaxed) {
            log::debug!(
                "{}: clusters are copied, not shared ({error})",
                self.path.display()
            );
        }
    }

    /// The description that all threads share.
    pub(super) fn file(&self) -> &File {
        self.buffered.get().unwrap_or(&self.file)
    }

    /// Its descriptor. Another one takes its place at most once, and both are open as long
    /// as this lives.
    pub(super) fn raw_fd(&self) -> RawFd {
        self.file().as_raw_fd()
    }

    /// Puts a description without direct I/O in the place of the one that all threads
    /// share.
    fn open_buffered(&self) -> io::Result<()> {
        let lock = self.opening_buffered.lock();
        let _guard = lock.unwrap_or_else(PoisonError::into_inner);
        if self.buffered.get().is_none() {
            let file = self.open_again(&self.file, false)?;
            // Nobody else sets it.
            let _ = self.buffered.set(file);
        }
        Ok(())
    }

    /// The unit in bytes, a power of two, in which space is given back.
    pub(super) fn block_size(&self) -> io::Result<u32> {
        Ok(believable_block(rustix::fs::fstatvfs(&self.file)?.f_frsize))
    }

    /// Whether io_uring would send each transfer to a kernel worker thread,
    /// although the file lies in memory and a plain system call would not block.
    pub(super) fn is_served_best_by_plain_calls(&self) -> bool {
        self.kind.is_in_memory() && self.refuses_nowait()
    }

    /// Whether reads cannot be asked not to block.
    fn refuses_nowait(&self) -> bool {
        let mut memory = AlignedBuf::from_slice(BUFFER_ALIGNMENT as usize, &[0; 4096]);
        let iovec = libc::iovec {
            iov_base: memory.as_mut_ptr().cast(),
            iov_len: memory.len(),
        };
        // SAFETY: the descriptor is open; the vector describes `memory`, which
        // outlives the call.
        let read = unsafe { libc::preadv2(self.file.as_raw_fd(), &iovec, 1, 0, libc::RWF_NOWAIT) };
        read == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP)
    }

    /// The caller has transfers that direct I/O would refuse.
    pub(super) fn forgo_direct(&self) {
        self.stop_direct(Errno::INVAL);
    }

    fn stop_direct(&self, error: Errno) {
        if self.direct.swap(false, Relaxed) {
            warn_buffered(&self.path, &error.into());
        }
    }
}

/// One thread's description of a file.
#[derive(Debug)]
pub(super) struct Description {
    shared: Arc<SharedFile>,
    /// `None`: the shared one is used.
    own: Option<File>,
    /// The direct one that was there before `own`.
    own_given_up: Option<File>,
    /// Whether `O_DIRECT` is set.
    direct: bool,
    /// See [`Self::take_reopened`].
    reopened: bool,
}

impl Description {
    /// A new description. Where there must be one only, or the file cannot be opened
    /// again (no `/proc`, rights given up meanwhile, too many descriptors), the shared one.
    pub(super) fn open(shared: &Arc<SharedFile>) -> Self {
        if shared.must_share {
            return Self::share(shared);
        }
        let direct = shared.direct.load(Relaxed);
        match shared.open_again(&shared.file, direct) {
            Ok(own) => Self {
                own: Some(own),
                direct,
                ..Self::share(shared)
            },
            Err(error) => {
                let path = shared.path.display();
                log::debug!("{path}: cannot be opened again ({error}), sharing a description");
                Self::share(shared)
            }
        }
    }

    /// The shared description.
    pub(super) fn share(shared: &Arc<SharedFile>) -> Self {
        Self {
            shared: Arc::clone(shared),
            own: None,
            own_given_up: None,
            direct: shared.opened_direct && shared.buffered.get().is_none(),
            reopened: false,
        }
    }

    /// What all threads know.
    pub(super) fn shared(&self) -> &SharedFile {
        &self.shared
    }

    /// The alignment that the next transfer must have; `None`: it is not direct.
    pub(super) fn direct(&mut self) -> Option<Alignment> {
        if !self.direct {
            return None;
        }
        if !self.shared.direct.load(Relaxed) {
            self.clear_direct();
            return None;
        }
        Some(self.shared.alignment)
    }

    /// Goes on without direct I/O: here, and soon in all threads.
    pub(super) fn stop_direct(&mut self, error: Errno) {
        self.shared.stop_direct(error);
        if self.direct {
            self.clear_direct();
        }
    }

    /// Whether the descriptor is another one since this was asked for the last time.
    pub(super) fn take_reopened(&mut self) -> bool {
        std::mem::take(&mut self.reopened)
    }

    /// Who has asked for that could not make use of it, and will ask again.
    pub(super) fn put_back_reopened(&mut self) {
        self.reopened = true;
    }

    /// What a sync is to be made by, after it was made by `synced`; `None` if that is all.
    ///
    /// The description that was used until direct I/O was given up comes first, then the
    /// one at present. A server may have taken writes by the old one and lost them since,
    /// or lose later what other threads still have in flight, and tell only who syncs or
    /// closes that. So it is neither closed nor forgotten. Whether it is given up before or
    /// after a sync was made by it, the next one is the same.
    pub(super) fn next_to_sync(&self, synced: Option<RawFd>) -> Option<RawFd> {
        let shared = &self.shared;
        let (given_up, present) = match &self.own {
            Some(own) => (self.own_given_up.as_ref(), own),
            None => match shared.buffered.get() {
                Some(buffered) => (Some(&shared.file), buffered),
                None => (None, &shared.file),
            },
        };
        let present = present.as_raw_fd();
        match synced {
            None => Some(given_up.map_or(present, AsRawFd::as_raw_fd)),
            Some(fd) => (fd != present).then_some(present),
        }
    }

    /// Opens the file anew: a server that has opened it for direct I/O (GlusterFS with
    /// `strict-o-direct`) does not learn of what `fcntl` changes here, and goes on refusing
    /// what direct I/O cannot do. The locks stay where they are, with the caller's
    /// description.
    fn clear_direct(&mut self) {
        // Even if it fails: the transfers then fail with their own error, and
        // are not tried for ever.
        self.direct = false;
        let shared = &self.shared;
        let opened = match &mut self.own {
            Some(own) => shared
                .open_again(own, false)
                .map(|new| self.own_given_up = Some(std::mem::replace(own, new))),
            None => shared.open_buffered(),
        };
        if opened.is_ok() {
            self.reopened = true;
        } else if let Err(error) = set_direct(self.as_fd(), false) {
            let path = shared.path.display();
            log::error!("{path}: cannot turn direct I/O off: {error}");
        }
    }
}

impl AsFd for Description {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.own.as_ref().unwrap_or(self.shared.file()).as_fd()
    }
}

fn warn_buffered(path: &Path, error: &io::Error) {
    let path = path.display();
    log::warn!("{path}: direct I/O does not work here ({error}); using the page cache");
}

/// Locks a description as all are, where that is of use. `given` is another one, with the
/// locks that keep others away. `None` if that cannot be.
fn lock_first(lease: &Lease, file: &File, given: &File, path: &Path) -> Option<Shown> {
    // The first one is asked before it has one itself.
    let was_there = lease.is_seen_by(file).unwrap_or(true);
    if let Err(error) = lease.lock(file) {
        log::warn!(
            "{}: a lock on it cannot be watched ({error}): if the server takes it away, this is \
             not noticed",
            path.display()
        );
        return None;
    }
    Some(match lease.is_seen_by(given) {
        Ok(true) if was_there => Shown::Yes,
        Ok(true) => Shown::Lost,
        _ => Shown::No,
    })
}

fn is_without_rights(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound
    )
}

/// The block size that a file system reports in bytes, if it can be one.
fn believable_block(reported: u64) -> u32 {
    // Network file systems report their transfer size here, or anything.
    const MAX: u32 = 64 << 10;
    const USUAL: u32 = 4096;
    let size = u32::try_from(reported).unwrap_or(0);
    let is_believable = size.is_power_of_two() && (512..=MAX).contains(&size);
    if is_believable { size } else { USUAL }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_block_size_that_can_be_one_is_believed() {
        for size in [512, 1024, 4096, 65536] {
            assert_eq!(u64::from(believable_block(size)), size);
        }
        for size in [
            0,
            1,
            256,
            513,
            4097,
            131_072,
            1 << 20,
            (1 << 32) + 4096,
            u64::MAX,
        ] {
            assert_eq!(believable_block(size), 4096, "{size}");
        }
    }

    #[test]
    fn what_is_asked_of_fallocate_keeps_the_length_but_where_it_allocates() {
        let (punch, keep) = (libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_KEEP_SIZE);
        assert_eq!(Fallocation::Punch.mode(), punch + keep);
        let zero = libc::FALLOC_FL_ZERO_RANGE;
        assert_eq!(Fallocation::ZeroRange.mode(), zero + keep);
        assert_eq!(Fallocation::Allocate.mode(), 0);
    }
}
