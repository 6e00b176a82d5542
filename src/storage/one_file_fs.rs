//! A file system in user space (FUSE) with one file, for tests of what others serve: its
//! server can say what it likes.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

const NAME: &str = "file";
const CONTENT: &[u8] = b"served";
const INODE: INodeNo = INodeNo(2);

/// What the server says when it is asked.
#[derive(Clone, Copy, Default)]
pub(crate) struct Answers {
    /// To any `open(2)`, if not that it is well.
    pub open: Option<Errno>,
    /// To one with `O_DIRECT`.
    pub direct_open: Option<Errno>,
    /// To a look at the file, if not what it is like.
    pub look: Option<Errno>,
    /// To a question about the file system, if not what it is like.
    pub statfs: Option<Errno>,
    /// The file has lost its last name.
    pub is_nameless: bool,
    /// To a write.
    pub write: Option<Errno>,
    /// To one on what was opened with `O_DIRECT`.
    pub direct_write: Option<Errno>,
    /// Writes are said to be well and get lost. Who syncs what was opened for them hears
    /// of it, and nobody else does; once that is closed, nobody ever will (sshfs).
    pub loses_writes: bool,
    /// Of lost writes the first hears who syncs or closes the file, by whichever opening
    /// (GlusterFS's write-behind).
    pub tells_first_who_asks: bool,
    /// It cannot look for data (GlusterFS's shards).
    pub keeps_shards: bool,
}

/// What the server was asked for, on which of the file's openings, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Open(u64),
    Write(u64),
    Sync(u64),
}

struct State {
    answers: Answers,
    len: u64,
    uses: Vec<Use>,
    /// Of each opening, whether it is direct.
    opened: Vec<bool>,
    /// Openings whose writes got lost.
    lost: Vec<u64>,
}

impl State {
    /// Whether a write got lost of which this opening hears; of that it hears once.
    fn is_told(&mut self, handle: FileHandle) -> bool {
        let is_first = self.answers.tells_first_who_asks;
        let before = self.lost.len();
        self.lost.retain(|&lost| !is_first && lost != handle.0);
        self.lost.len() < before
    }
}

/// The file system, mounted until it is dropped.
pub(crate) struct OneFileFs {
    state: Arc<Mutex<State>>,
    session: Option<BackgroundSession>,
    folder: TempDir,
}

impl OneFileFs {
    /// `None`, said aloud, if nothing can be mounted.
    pub fn mount() -> Option<Self> {
        let state = Arc::new(Mutex::new(State {
            answers: Answers::default(),
            len: CONTENT.len() as u64,
            uses: Vec::new(),
            opened: Vec::new(),
            lost: Vec::new(),
        }));
        let server = Server(Arc::clone(&state));
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("one file".to_owned())];
        match fuser::spawn_mount(server, folder.path(), &config) {
            Ok(session) => Some(Self {
                state,
                session: Some(session),
                folder,
            }),
            Err(error) => {
                let peers_are_required = std::env::var_os("PLOOP_REQUIRE_PEERS").is_some();
                assert!(!peers_are_required, "FUSE is required: {error}");
                eprintln!("LEFT OUT: no FUSE file system can be mounted: {error}");
                None
            }
        }
    }

    /// Of the file.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(NAME)
    }

    /// How many syncs the server was asked for.
    pub fn syncs(&self) -> usize {
        let uses = &self.lock().uses;
        uses.iter()
            .filter(|what| matches!(what, Use::Sync(_)))
            .count()
    }

    /// What the server was asked for since this was called for the last time.
    pub fn take_uses(&self) -> Vec<Use> {
        std::mem::take(&mut self.lock().uses)
    }

    /// How long the file is, in bytes.
    pub fn len(&self) -> u64 {
        self.lock().len
    }

    /// From now on the server answers so.
    pub fn answer(&self, answers: Answers) {
        self.lock().answers = answers;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }
}

impl Drop for OneFileFs {
    fn drop(&mut self) {
        let _ = unmount(self.folder.path(), UnmountFlags::DETACH);
        // How it ends is no matter any more.
        let _ = self.session.take().map(BackgroundSession::join);
    }
}

/// Nothing that the kernel is told is to be remembered by it.
const FORGET: Duration = Duration::ZERO;

struct Server(Arc<Mutex<State>>);

impl Server {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics with it")
    }

    fn attr(&self, inode: INodeNo) -> FileAttr {
        let is_file = inode == INODE;
        let state = self.lock();
        FileAttr {
            ino: inode,
            size: if is_file { state.len } else { 0 },
            blocks: 1,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: match is_file {
                true => FileType::RegularFile,
                false => FileType::Directory,
            },
            perm: if is_file { 0o644 } else { 0o755 },
            nlink: u32::from(!(is_file && state.answers.is_nameless)),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&FORGET, &self.attr(INODE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let error = self.lock().answers.look.filter(|_| inode == INODE);
        match error {
            Some(error) => reply.error(error),
            None => reply.attr(&FORGET, &self.attr(inode)),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.lock().answers.statfs {
            Some(error) => reply.error(error),
            None => reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let is_direct = flags.0 & libc::O_DIRECT != 0;
        let mut state = self.lock();
        let answers = state.answers;
        match answers.open.or(answers.direct_open.filter(|_| is_direct)) {
            Some(error) => reply.error(error),
            None => {
                let handle = state.opened.len() as u64;
                state.opened.push(is_direct);
                state.uses.push(Use::Open(handle));
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
        }
    }

    /// Only lengths are anybody's concern.
    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            self.lock().len = size;
        }
        reply.attr(&FORGET, &self.attr(inode));
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(match self.lock().answers.keeps_shards {
            true => Errno::EOPNOTSUPP,
            // The kernel does it itself then: all is data.
            false => Errno::ENOSYS,
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let rest = CONTENT.get(offset as usize..).unwrap_or_default();
        reply.data(&rest[..rest.len().min(size as usize)]);
    }

    /// What is written is nobody's concern.
    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.lock();
        let answers = state.answers;
        let is_direct = state.opened[handle.0 as usize];
        state.uses.push(Use::Write(handle.0));
        if let Some(error) = answers.write.or(answers.direct_write.filter(|_| is_direct)) {
            return reply.error(error);
        }
        if answers.loses_writes {
            state.lost.push(handle.0);
        }
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.lock();
        state.uses.push(Use::Sync(handle.0));
        match state.is_told(handle) {
            true => reply.error(Errno::EIO),
            false => reply.ok(),
        }
    }

    /// In place of `flush`, which comes from processes of other tests too that have all
    /// descriptors for a moment.
    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.lock().is_told(handle);
        reply.ok();
    }
}
