//! The host's own files.
//!
//! A [`HostDisk`] knows the files; a [`HostIo`] is one thread's access to them,
//! through io_uring or through plain system calls. Both take operations apart
//! with the same [`job`], and differ only in how they ask the kernel.
//!
//! Knows system calls, direct I/O and what file systems refuse. Must not know
//! what is in the files.

mod clone;
mod direct;
mod file;
mod job;
mod lease;
mod lock_watch;
mod pieces;
mod psync;
mod rings;
#[cfg(test)]
mod tests;
mod uring;
mod watch;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;

use self::file::{Description, SharedFile, Shown};
use self::lease::Lease;
use self::pieces::{Pieces, Pool};
use self::psync::Psync;
use self::rings::Generation;
use self::uring::Uring;
use super::{
    AlignedBuf, Buffer, Completion, Disk, FileId, Io, LockStanding, Op, Segments, filesystem,
};
use crate::notices::Notices;
use crate::threads;

pub use self::lease::LookFor;
pub use self::lock_watch::{LockWatch, Look, Moment, NotOpenable, SeesMark, WatchError};
pub use self::rings::start_maker;
pub use self::watch::FileWatch;

/// One of the files of a disk, as the caller opened it. Its locks stay with the
/// caller's description.
#[derive(Debug)]
pub struct HostFile {
    /// Open for reading, and for writing if `writable`.
    pub file: File,
    /// For messages.
    pub path: PathBuf,
    /// Whether it will be written to.
    pub writable: bool,
}

/// What is known of one of the files of a disk.
#[derive(Clone, Copy, Debug)]
pub struct KnownFile<'a> {
    /// As it was opened.
    pub path: &'a Path,
    /// Whether it is used around the host's page cache.
    pub is_direct: bool,
    /// What it takes on the host's disk, in bytes. Of a disk whose files are
    /// [watched](HostDisk::watch) it is some seconds old at most.
    pub allocation: u64,
}

/// What QEMU's `cache` option means, as far as it concerns the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Around the host's page cache (`O_DIRECT`), where the file system can.
    #[default]
    None,
    /// Through the host's page cache.
    Writeback,
}

/// How the kernel is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// io_uring, unless the kernel lacks it, or plain calls do not block on
    /// these files and io_uring cannot know that.
    #[default]
    Auto,
    /// io_uring.
    IoUring,
    /// Plain system calls, one after the other.
    Psync,
}

/// How a [`HostDisk`] does its I/O.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostOptions {
    /// Whether the host's page cache is used.
    pub cache: Cache,
    /// How the kernel is asked.
    pub aio: Aio,
}

/// What a thread is to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Plain,
    Ring,
    /// Plain calls where a ring finds no memory.
    RingIfPossible,
}

/// A [`Disk`] of host files.
#[derive(Debug)]
pub struct HostDisk {
    files: Arc<FileList>,
    cache: Cache,
    way: Way,
    block_size: u32,
    /// Memory of our own for transfers, of all threads.
    pool: Arc<Pool>,
    /// Of files whose locks a server can take away.
    lease: Option<Arc<Lease>>,
}

impl HostDisk {
    /// Takes the files, base first. Opens each once more, so that what this does
    /// to the description (`O_DIRECT`) does not concern the caller's.
    ///
    /// # Errors
    /// `InvalidInput` if there is no file or more than 256; any of `open(2)`;
    /// any of `io_uring_setup(2)` if that is asked for by name.
    pub fn new(files: Vec<HostFile>, options: HostOptions) -> io::Result<Self> {
        if files.is_empty() || files.len() > usize::from(u8::MAX) + 1 {
            let message = format!("a disk has 1 to 256 files, not {}", files.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let is_leased = |file: &HostFile| filesystem::may_be_shared(&file.file);
        let lease = files.iter().any(is_leased).then(Lease::new).transpose()?;
        Self::build(files, options, lease.map(Arc::new), is_leased)
    }

    fn build(
        files: Vec<HostFile>,
        options: HostOptions,
        lease: Option<Arc<Lease>>,
        is_leased: impl Fn(&HostFile) -> bool + Sync,
    ) -> io::Result<Self> {
        let open = |file: HostFile| {
            let lease = lease.as_ref().filter(|_| is_leased(&file));
            SharedFile::new(file, options.cache, lease)
        };
        let files = threads::side_by_side(files, |file| Ok(Arc::new(open(file)?)))
            .into_iter()
            .collect::<io::Result<Vec<_>>>()?;
        if let Some(lease) = &lease {
            lease.cover(&files);
        }
        let way = choose_way(&files, options.aio)?;
        let files = Arc::new(FileList::new(files));
        Ok(Self {
            block_size: files.top().block_size()?,
            cache: options.cache,
            way,
            files,
            pool: Arc::default(),
            lease,
        })
    }

    /// By which is found out that a server has taken the locks away; `None` where none can.
    /// It has to be used from now on: what fails as it does without the lock waits for it.
    /// `sees_mark` says of the beginning of a file whether it was opened and not closed.
    ///
    /// # Errors
    /// [`WatchError::Lost`] if a lock has gone since it was taken; any of `open(2)` and
    /// `fcntl(2)`.
    pub fn watch_locks(&self, sees_mark: SeesMark) -> Result<Option<LockWatch>, WatchError> {
        let lease = self.lease.as_ref();
        lease.map_or(Ok(None), |lease| {
            LockWatch::new(lease, &self.files, sees_mark)
        })
    }

    /// Makes sure that the locks are there, where nobody watches them and the file system shows
    /// them. If one is not, nothing is written any more.
    ///
    /// # Errors
    /// When one is gone, or cannot be asked for.
    pub fn require_locks(&self) -> io::Result<()> {
        let mut files = self.files.iter();
        files.try_for_each(|file| self.require_lock_on(file))
    }

    fn require_lock_on(&self, file: &SharedFile) -> io::Result<()> {
        let (Some(lease), Shown::Yes | Shown::Lost) = (&self.lease, file.shown()) else {
            return Ok(());
        };
        let is_there = match (file.shown(), file.open_to_ask()?) {
            (Shown::Lost, _) => false,
            (_, Some(other)) => lease.is_seen_by(&other)?,
            (_, None) => true,
        };
        if is_there {
            return Ok(());
        }
        lease.begin_watch();
        lease.lose();
        let message = "a server has taken the lock away, and another host may use the file";
        Err(io::Error::other(message))
    }

    /// By which is found out, said in the log and told to `notices` that a file was
    /// deleted, replaced, moved or cut short while it is used.
    #[must_use = "it finds out nothing unless it looks"]
    pub fn watch(&self, notices: Option<Arc<Notices>>) -> FileWatch {
        FileWatch::new(self.files.iter(), notices)
    }

    /// What is known of a file. Asks nobody: a file of a server that has gone cannot be asked.
    pub fn known_file(&self, file: FileId) -> Option<KnownFile<'_>> {
        let file = self.files.get(file)?;
        Some(KnownFile {
            path: file.path(),
            is_direct: file.is_direct(),
            allocation: file.known_allocation(),
        })
    }

    /// Opens a file that is to become the top, as [`Self::add`] does it. What is written to it
    /// need not be aligned to more than `write_alignment`, in bytes.
    ///
    /// # Errors
    /// Any of `open(2)`; `Unsupported` if it lies in a file system of another kind, or in one
    /// whose server may take locks away, or if the limit of descriptors (`RLIMIT_NOFILE`)
    /// leaves rings no room for another file.
    pub fn prepare(&self, file: HostFile, write_alignment: u32) -> io::Result<NewTop> {
        if self.lease.is_some() {
            let message = "a server may take the lock of the disk away, and the lock of another \
                           file is not watched yet";
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        let file = SharedFile::new(file, self.cache, None)?;
        if file.must_share() != self.files.top().must_share() {
            let message = "the file lies in a file system of another kind than the others";
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        if self.files.is_fixed.load(Ordering::Acquire) {
            let message = format!(
                "the limit of open files (RLIMIT_NOFILE) is too low for another file: it has to \
                 be {} at least",
                uring::FILES_MAX + 1
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        if file.alignment().offset > write_alignment {
            file.forgo_direct();
        }
        Ok(NewTop(Arc::new(file)))
    }

    /// From now on this is the top, and the next number. To be called while nothing is in
    /// flight; what was the top before is only read from then on, and says so to others.
    ///
    /// # Errors
    /// There are as many files as there can be.
    pub fn add(&self, top: NewTop) -> io::Result<FileId> {
        let old = Arc::clone(self.files.top());
        let id = self.files.push(top.0)?;
        if let Err(error) = super::lock::stop_writing(old.given()) {
            let path = old.path().display();
            log::warn!("{path}: others still find it locked as one that is written to: {error}");
        }
        Ok(id)
    }

    /// Whether files may go while the disk is used. Where a server may take locks away, one that
    /// has gone would look like a lost lock.
    pub fn can_retire(&self) -> bool {
        self.lease.is_none()
    }

    /// The file belongs to the disk no more, and nobody reads it: it is not watched any more.
    /// Its descriptors stay open.
    pub fn retire(&self, file: FileId) {
        if let Some(file) = self.files.get(file) {
            file.retire();
        }
    }

    /// As it was opened.
    pub fn path(&self, file: FileId) -> Option<&Path> {
        self.files.get(file).map(|file| file.path())
    }

    /// Whether another open file description has any lock on the file that tells of its use.
    ///
    /// # Errors
    /// Any of `fcntl(2)`; there is no such file.
    pub fn is_used_by_others(&self, file: FileId) -> io::Result<bool> {
        super::lock::is_used_by_others(self.file(file)?.given())
    }

    /// Whether that is the file, by whatever name it was opened.
    ///
    /// # Errors
    /// Any of `fstat(2)`; there is no such file.
    pub fn is_file(&self, file: FileId, other: &File) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let (own, other) = (self.file(file)?.given().metadata()?, other.metadata()?);
        Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
    }

    /// Bytes that the file system of the top has for whoever is not privileged.
    ///
    /// # Errors
    /// Any of `fstatvfs(3)`.
    pub fn free_space(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(self.files.top().given())?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Looks at the top as it was given, without opening it.
    pub fn with_top<R>(&self, look: impl FnOnce(&File, &Path) -> R) -> R {
        let top = self.files.top();
        look(top.given(), top.path())
    }

    /// A disk whose files are used by a lease, wherever they lie.
    #[cfg(test)]
    fn pretend_leased(
        files: Vec<HostFile>,
        options: HostOptions,
        lease: &Arc<Lease>,
    ) -> io::Result<Self> {
        Self::build(files, options, Some(Arc::clone(lease)), |_| true)
    }

    /// A disk of files as they are, for tests that want odd ones.
    #[cfg(test)]
    fn of_shared(files: Vec<Arc<SharedFile>>, way: Way) -> Self {
        Self {
            files: Arc::new(FileList::new(files)),
            cache: Cache::default(),
            way,
            block_size: 4096,
            pool: Arc::default(),
            lease: None,
        }
    }

    fn file(&self, file: FileId) -> io::Result<&Arc<SharedFile>> {
        self.files.get(file).ok_or_else(|| Errno::BADF.into())
    }
}

/// A file that is about to become the top of a [`HostDisk`].
#[derive(Debug)]
pub struct NewTop(Arc<SharedFile>);

impl NewTop {
    /// Takes space for a range that the file has, so that writes to it find it.
    ///
    /// # Errors
    /// Any of `fallocate(2)` but that the file system cannot.
    pub fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.reserve(offset, len)
    }
}

/// The files of a disk, base first. The list only becomes longer.
#[derive(Debug)]
struct FileList {
    files: Box<[OnceLock<Arc<SharedFile>>]>,
    count: AtomicUsize,
    /// Somebody has no room for another one.
    is_fixed: AtomicBool,
}

impl FileList {
    /// At least one.
    fn new(files: Vec<Arc<SharedFile>>) -> Self {
        let count = AtomicUsize::new(files.len());
        let room = (files.len()..=usize::from(u8::MAX)).map(|_| OnceLock::new());
        Self {
            files: files.into_iter().map(OnceLock::from).chain(room).collect(),
            count,
            is_fixed: AtomicBool::new(false),
        }
    }

    fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    fn get(&self, file: FileId) -> Option<&Arc<SharedFile>> {
        self.files.get(usize::from(file.0))?.get()
    }

    fn top(&self) -> &Arc<SharedFile> {
        let top = self.files[self.len() - 1].get();
        top.expect("the files that are counted are there")
    }

    fn iter(&self) -> impl Iterator<Item = &Arc<SharedFile>> {
        self.files[..self.len()].iter().filter_map(OnceLock::get)
    }

    fn push(&self, file: Arc<SharedFile>) -> io::Result<FileId> {
        let count = self.len();
        let free = self.files.get(count);
        let set = free.map(|free| free.set(file));
        if !matches!(set, Some(Ok(()))) {
            return Err(Errno::MFILE.into());
        }
        self.count.store(count + 1, Ordering::Release);
        Ok(FileId(count as u8))
    }
}

fn choose_way(files: &[Arc<SharedFile>], aio: Aio) -> io::Result<Way> {
    match aio {
        Aio::Psync => Ok(Way::Plain),
        Aio::IoUring => rings::try_out().map(|()| Way::Ring).map_err(explain),
        Aio::Auto => {
            if files
                .iter()
                .all(|file| file.is_served_best_by_plain_calls())
            {
                log::debug!("using plain system calls: the files are in memory");
                return Ok(Way::Plain);
            }
            match rings::try_out().map_err(explain) {
                Ok(()) => {
                    log::debug!("using io_uring");
                    Ok(Way::RingIfPossible)
                }
                Err(error) => {
                    log::info!("io_uring is not available ({error}); using plain system calls");
                    Ok(Way::Plain)
                }
            }
        }
    }
}

/// Kernels count the memory of the rings of all processes of a user (before 5.12, and
/// again since 6.14) and say no more than `ENOMEM` when it is too much.
fn explain(error: io::Error) -> io::Error {
    match is_out_of_memory(&error) {
        true => io::Error::new(
            error.kind(),
            "no memory for an io_uring; the limit of locked memory (RLIMIT_MEMLOCK, \
             LimitMEMLOCK= of systemd), which is for all processes of this user, may be too low",
        ),
        false => error,
    }
}

fn is_out_of_memory(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOMEM)
}

/// How much a blocking transfer moves at once, in bytes.
const BLOCKING_CHUNK: usize = 1 << 20;

impl Disk for HostDisk {
    type Io = HostIo;

    fn open_io(&self, depth: u32) -> io::Result<HostIo> {
        let files = || Files::new(Arc::clone(&self.files));
        let pieces = || Pieces::new(Arc::clone(&self.pool));
        let plain = || HostIo(Access::Psync(Psync::new(files(), pieces(), depth)));
        if self.way == Way::Plain {
            return Ok(plain());
        }
        match Uring::new(files(), pieces(), depth, &Generation::ALL) {
            Ok(ring) => Ok(HostIo(Access::Uring(ring.into()))),
            Err(error) if self.way == Way::RingIfPossible && is_out_of_memory(&error) => {
                log::warn!("{}; this thread uses plain system calls", explain(error));
                Ok(plain())
            }
            Err(error) => Err(explain(error)),
        }
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        self.file(file)?.len()
    }

    fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        set_len(file, self.file(file)?, len)
    }

    fn next_data(&self, file: FileId, offset: u64) -> io::Result<Option<Range<u64>>> {
        let shared = self.file(file)?;
        match filesystem::next_data(shared.file(), offset) {
            Err(errno) if filesystem::refuses_seek(errno) => {
                let end = shared.len()?;
                Ok((offset < end).then_some(offset..end))
            }
            data => Ok(data?),
        }
    }

    fn read_exact_at(&self, file: FileId, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let shared = self.file(file)?;
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| shared.len().is_ok_and(|len| len < end)) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut at = offset;
        for chunk in bytes.chunks_mut(BLOCKING_CHUNK) {
            let mut segments = Segments::new();
            // SAFETY: the memory is borrowed mutably for longer than the
            // operation lives, and not touched meanwhile.
            unsafe { segments.push(chunk.as_mut_ptr(), chunk.len()) };
            let op = Op::Read {
                file,
                offset: at,
                buffer: Buffer::Client(segments),
            };
            psync::run(op, &mut Description::share(shared))?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    fn write_all_at(&self, file: FileId, bytes: &[u8], offset: u64) -> io::Result<()> {
        let shared = self.file(file)?;
        let mut at = offset;
        for chunk in bytes.chunks(BLOCKING_CHUNK) {
            write_blocks(file, shared, chunk, at)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    fn sync(&self, file: FileId) -> io::Result<()> {
        let mut description = Description::share(self.file(file)?);
        psync::run(Op::Sync { file }, &mut description)?;
        Ok(())
    }

    fn allocate(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.file(file)?.reserve(offset, len)
    }

    fn opening(&self, file: FileId) -> io::Result<Option<u64>> {
        self.file(file)?.opening()
    }

    fn set_opening(&self, file: FileId, opening: u64) -> io::Result<()> {
        self.file(file)?.set_opening(opening)
    }

    fn forgo_direct(&self) {
        self.files.top().forgo_direct();
    }

    fn zero_granularity(&self) -> u32 {
        self.block_size
    }

    fn clone_unit(&self) -> Option<u32> {
        let top = self.files.top();
        top.can_clone().then_some(self.block_size)
    }

    fn write_alignment(&self) -> u32 {
        self.files.top().alignment().offset
    }

    fn require_lock(&self, file: FileId) -> io::Result<()> {
        self.require_lock_on(self.file(file)?)
    }

    fn lock_standing(&self) -> LockStanding {
        let lease = self.lease.as_ref();
        lease.map_or(LockStanding::Unwatched, |lease| lease.standing())
    }

    fn wait_for_locks(&self) {
        if let Some(lease) = &self.lease {
            // Whoever asks afterwards hears of a loss.
            let _ = lease.require();
        }
    }

    fn doubt_locks(&self) {
        self.lease.as_ref().map(|lease| lease.doubt());
    }

    fn has_stable_writes(&self) -> bool {
        let top = self.files.top();
        !top.must_share() && !top.syncs_whole()
    }
}

/// Writes `bytes`, with what is around them in their first and last block if
/// only whole blocks can be written. Nobody else may write there meanwhile.
fn write_blocks(
    file: FileId,
    shared: &Arc<SharedFile>,
    bytes: &[u8],
    offset: u64,
) -> io::Result<()> {
    let alignment = shared.alignment();
    let end = offset.checked_add(bytes.len() as u64).ok_or(Errno::FBIG)?;
    let (start, blocks_end) = (alignment.floor(offset), alignment.ceil(end));
    let mut blocks = AlignedBuf::new(4096);
    let mut description = Description::share(shared);
    let mut cut_to = None;
    if (start, blocks_end) == (offset, end) {
        blocks.extend_from_slice(bytes);
    } else {
        blocks.resize((blocks_end - start) as usize, 0);
        let around = Op::Read {
            file,
            offset: start,
            buffer: Buffer::Owned(blocks),
        };
        blocks = owned(psync::run(around, &mut description)?)?;
        let from = (offset - start) as usize;
        blocks[from..from + bytes.len()].copy_from_slice(bytes);
        let len = shared.len_at_least()?.max(end);
        cut_to = (len < blocks_end).then_some(len);
    }
    let write = Op::Write {
        file,
        offset: start,
        buffer: Buffer::Owned(blocks),
        dsync: false,
    };
    psync::run(write, &mut description)?;
    cut_to.map_or(Ok(()), |len| set_len(file, shared, len))
}

/// Cuts or extends a file to `len` bytes, or a little more, which is zeroed
/// ([`filesystem::len_to_set`]). Nobody else may write there meanwhile.
fn set_len(file: FileId, shared: &Arc<SharedFile>, len: u64) -> io::Result<()> {
    let end = shared.set_len(len)?;
    if end > len {
        write_blocks(file, shared, &filesystem::zeroed_tail(), len)?;
    }
    Ok(())
}

/// The memory of an operation that was given memory of our own.
fn owned(op: Op) -> io::Result<AlignedBuf> {
    match op {
        Op::Read {
            buffer: Buffer::Owned(bytes),
            ..
        } => Ok(bytes),
        _ => Err(Errno::INVAL.into()),
    }
}

/// The error number of an error of the system.
fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// One thread's descriptions of the files of a disk.
#[derive(Debug)]
struct Files {
    shared: Arc<FileList>,
    /// The top one from the start, the others when they are needed: a chain may
    /// have many, and most threads never touch most of them. It becomes longer with the
    /// chain.
    open: Vec<Option<Description>>,
}

impl Files {
    fn new(shared: Arc<FileList>) -> Self {
        let mut open: Vec<_> = shared.iter().map(|_| None).collect();
        if let Some(slot) = open.last_mut() {
            *slot = Some(Description::open(shared.top()));
        }
        Self { shared, open }
    }

    /// Whether the description of a file is there already.
    fn is_open(&self, file: FileId) -> bool {
        matches!(self.open.get(usize::from(file.0)), Some(Some(_)))
    }

    /// The description of a file, opened if need be.
    fn get(&mut self, file: FileId) -> Result<&mut Description, Errno> {
        let index = usize::from(file.0);
        if index >= self.open.len() {
            self.open.resize_with(self.shared.len(), || None);
        }
        let slot = self.open.get_mut(index).ok_or(Errno::BADF)?;
        let shared = self.shared.get(file).ok_or(Errno::BADF)?;
        Ok(slot.get_or_insert_with(|| Description::open(shared)))
    }
}

/// One thread's access to a [`HostDisk`].
#[derive(Debug)]
pub struct HostIo(Access);

#[derive(Debug)]
enum Access {
    Uring(Box<Uring>),
    Psync(Psync),
}

impl Io for HostIo {
    #[inline]
    fn queue(&mut self, tag: u64, op: Op) -> Result<(), Op> {
        match &mut self.0 {
            Access::Uring(io) => io.queue(tag, op),
            Access::Psync(io) => io.queue(tag, op),
        }
    }

    #[inline]
    fn submit(&mut self) {
        match &mut self.0 {
            Access::Uring(io) => io.submit(),
            Access::Psync(io) => io.submit(),
        }
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        match &mut self.0 {
            Access::Uring(io) => io.reap(done),
            Access::Psync(io) => io.reap(done),
        }
    }

    #[inline]
    fn in_flight(&self) -> usize {
        match &self.0 {
            Access::Uring(io) => io.in_flight(),
            Access::Psync(io) => io.in_flight(),
        }
    }

    fn completion_fd(&self) -> Option<RawFd> {
        match &self.0 {
            Access::Uring(io) => io.completion_fd(),
            Access::Psync(_) => None,
        }
    }
}
