//! A file system of our own (FUSE), which sees every write and every sync that the
//! daemon makes, can fail a sync, and loses at a power cut what was not synced.
//!
//! The kernel passes `fdatasync` on as such, and a write with `RWF_DSYNC` as a write
//! that a sync follows before the caller hears of it. Nothing is cached between: writes
//! arrive here before they end for who has made them, also those by way of the page
//! cache.

mod locks;
mod medium;

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLock,
    ReplyLseek, ReplyOpen, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use crate::common::{backend::Corpse, left_out};
pub use locks::Loss;
use locks::{Lock, Locks};
pub use medium::Event;
use medium::{FileState, Files};

/// Nothing that the kernel is told is to be remembered by it.
const FORGET: Duration = Duration::ZERO;

/// A file that a test has put there, or the daemon has made.
struct Node {
    name: String,
    /// Gone from the folder: its contents are nobody's concern any more.
    removed: bool,
}

/// What the file system is, whether it is mounted or not.
struct State {
    files: Files,
    /// Indexed by the number of the inode, from [`FIRST`] on.
    nodes: Vec<Node>,
    rng: SmallRng,
    /// How many of the next syncs do not fail, and how many after those do.
    syncs_to_pass: usize,
    syncs_to_fail: usize,
    /// Syncs that wait for [`FrailFs::let_syncs_go`], while they are to.
    held_syncs: Option<Vec<(INodeNo, FileHandle, ReplyEmpty)>>,
    power: Power,
    /// See [`FrailFs::keep_shards`].
    shard: Option<u64>,
    /// See [`FrailFs::be_strict`].
    direct_block: u64,
    /// How often a file was opened.
    openings: u64,
    /// See [`FrailFs::lose_next_write`].
    loses_next_write: bool,
    /// What lost writes were made by, if nobody has been told yet.
    lost: Vec<FileHandle>,
    told: Told,
    locks: Locks,
    /// Questions for locks that wait for [`FrailFs::let_looks_go`], while they are to.
    held_looks: Option<Vec<(Lock, ReplyLock)>>,
    /// Of who was there when they were to: what was opened before this.
    holds_looks_before: u64,
    /// See [`FrailFs::delay_looks`].
    look_delay: Duration,
    /// See [`FrailFs::hold_next_lock`].
    holds_next_lock: bool,
    held_lock: Option<(Lock, ReplyEmpty)>,
    /// Reads of whoever watches its lock that wait for [`FrailFs::let_reads_go`], while they are
    /// to.
    held_reads: Option<Vec<HeldRead>>,
    /// See [`FrailFs::refuse_unlocks`].
    refuses_unlocks: bool,
    looks_to_fail: (usize, Errno),
    /// See [`FrailFs::keep_attributes`].
    attributes: Option<HashMap<(INodeNo, OsString), Vec<u8>>>,
}

struct HeldRead {
    inode: INodeNo,
    handle: FileHandle,
    offset: u64,
    size: u32,
    reply: ReplyData,
}

/// Who hears of a write that was said to be well and got lost: once, from a sync or from
/// closing the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// What it was made by (sshfs).
    Writer,
    /// Whoever is the first, by whatever it is (GlusterFS's write-behind).
    First,
}

/// Bit of the handles of what was opened for direct I/O.
const DIRECT: u64 = 1;

/// Inode of the first file; the root is 1.
const FIRST: u64 = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Power {
    On,
    /// It has been cut: nothing is answered any more.
    Cut,
    /// Who could have used an answer is dead.
    Off,
}

struct Shared {
    state: Mutex<State>,
    answers: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// For requests of the kernel, which wait from a cut until they fail.
    fn enter(&self) -> Result<MutexGuard<'_, State>, Errno> {
        let state = self.lock();
        let cut = |state: &mut State| state.power == Power::Cut;
        let state = self.answers.wait_while(state, cut).unwrap();
        match state.power {
            Power::On => Ok(state),
            _ => Err(Errno::EIO),
        }
    }
}

impl State {
    fn inode_of(&self, name: &str) -> Option<INodeNo> {
        let found = |node: &Node| !node.removed && node.name == name;
        let index = self.nodes.iter().position(found)?;
        Some(INodeNo(FIRST + index as u64))
    }

    fn file(&mut self, inode: INodeNo) -> Result<&mut FileState, Errno> {
        let index = inode.0.checked_sub(FIRST).ok_or(Errno::EISDIR)?;
        let node = self.nodes.get(index as usize).ok_or(Errno::ENOENT)?;
        self.files.get_mut(&node.name).ok_or(Errno::ENOENT)
    }

    fn attr(&mut self, inode: INodeNo) -> Result<FileAttr, Errno> {
        let is_root = inode == INodeNo::ROOT;
        let size = if is_root {
            0
        } else {
            self.file(inode)?.live.len() as u64
        };
        Ok(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_root {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if is_root { 0o755 } else { 0o644 },
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// The next handle.
    fn open(&mut self, is_direct: bool) -> FileHandle {
        self.openings += 1;
        FileHandle(self.openings << 1 | if is_direct { DIRECT } else { 0 })
    }

    /// Tells who asks by way of `handle` of what was lost, if that is who hears of it.
    fn tell_of_lost(&mut self, handle: FileHandle) -> Result<(), Errno> {
        let told = self.told;
        let before = self.lost.len();
        self.lost
            .retain(|&lost| told == Told::Writer && lost != handle);
        match self.lost.len() < before {
            true => Err(Errno::EIO),
            false => Ok(()),
        }
    }

    fn sync(&mut self, inode: INodeNo, handle: FileHandle) -> Result<(), Errno> {
        self.tell_of_lost(handle)?;
        self.locks.allow(handle)?;
        if let Some(left) = self.syncs_to_pass.checked_sub(1) {
            self.syncs_to_pass = left;
        } else if let Some(left) = self.syncs_to_fail.checked_sub(1) {
            self.syncs_to_fail = left;
            let mut rng = SmallRng::from_rng(&mut self.rng);
            self.file(inode)?.fail_sync(&mut rng);
            return Err(Errno::EIO);
        }
        self.file(inode)?.sync();
        Ok(())
    }

    fn tell_of_locks(&self, lock: Lock, reply: ReplyLock) {
        match self.locks.find(lock) {
            Ok(Some(found)) => reply.locked(found.range.0, found.range.1, found.kind, 0),
            Ok(None) => reply.locked(0, 0, libc::F_UNLCK, 0),
            Err(error) => reply.error(error),
        }
    }

    fn set_lock(&mut self, lock: Lock, reply: ReplyEmpty) {
        if self.refuses_unlocks && lock.kind == libc::F_UNLCK {
            return reply.error(Errno::EIO);
        }
        match self.locks.set(lock) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn answer_read(&mut self, read: HeldRead) {
        match self.read(&read) {
            Ok(bytes) => read.reply.data(&bytes),
            Err(error) => read.reply.error(error),
        }
    }

    fn read(&mut self, read: &HeldRead) -> Result<Vec<u8>, Errno> {
        self.check(read.handle, read.offset, read.size as usize)?;
        let bytes = &self.file(read.inode)?.live;
        let start = (read.offset as usize).min(bytes.len());
        let end = (start + read.size as usize).min(bytes.len());
        Ok(bytes[start..end].to_vec())
    }

    fn end_sync(&mut self, inode: INodeNo, handle: FileHandle, reply: ReplyEmpty) {
        match self.sync(inode, handle) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    /// Refuses what direct I/O cannot do, on what was opened for that, and what had a lock
    /// and has none, if that is so.
    fn check(&self, handle: FileHandle, offset: u64, len: usize) -> Result<(), Errno> {
        self.locks.allow(handle)?;
        let is_direct = handle.0 & DIRECT != 0;
        match is_direct && !(offset | len as u64).is_multiple_of(self.direct_block) {
            true => Err(Errno::EINVAL),
            false => Ok(()),
        }
    }

    /// Cuts a file or makes it longer.
    fn set_len(&mut self, inode: INodeNo, len: u64) -> Result<(), Errno> {
        let shard = self.shard;
        let file = self.file(inode)?;
        let old_len = file.live.len() as u64;
        file.set_len(len);
        // The piece that would keep `len % shard` bytes if that were not 0.
        if let Some(shard) = shard
            && len < old_len
            && len.is_multiple_of(shard)
            && len > 0
        {
            file.zero(len - shard, shard);
        }
        Ok(())
    }

    fn create(&mut self, name: &str) -> INodeNo {
        self.files
            .insert(name.to_owned(), FileState::new(Vec::new()));
        self.nodes.push(Node {
            name: name.to_owned(),
            removed: false,
        });
        INodeNo(FIRST + self.nodes.len() as u64 - 1)
    }
}

/// The file system, mounted. Dropped, it is not any more.
pub struct FrailFs {
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    folder: TempDir,
}

impl FrailFs {
    /// With the files of a folder, which are stable. `None`, which is said on the
    /// terminal, if it cannot be mounted.
    pub fn mount(files: &Path, seed: u64) -> Option<Self> {
        let entries = fs::read_dir(files).unwrap().map(Result::unwrap);
        let files = entries
            .filter(|entry| entry.file_type().unwrap().is_file())
            .map(|entry| {
                let name = entry.file_name().into_string().unwrap();
                (name, fs::read(entry.path()).unwrap())
            });
        Self::with_files(files.collect(), SmallRng::seed_from_u64(seed))
    }

    fn with_files(files: Vec<(String, Vec<u8>)>, rng: SmallRng) -> Option<Self> {
        let nodes = files.iter().map(|(name, _)| Node {
            name: name.clone(),
            removed: false,
        });
        let state = State {
            nodes: nodes.collect(),
            files: files
                .into_iter()
                .map(|(name, bytes)| (name, FileState::new(bytes)))
                .collect(),
            rng,
            syncs_to_pass: 0,
            syncs_to_fail: 0,
            held_syncs: None,
            power: Power::On,
            shard: None,
            direct_block: 1,
            openings: 0,
            loses_next_write: false,
            lost: Vec::new(),
            told: Told::Writer,
            locks: Locks::default(),
            held_looks: None,
            holds_looks_before: 0,
            look_delay: Duration::ZERO,
            holds_next_lock: false,
            held_lock: None,
            held_reads: None,
            refuses_unlocks: false,
            looks_to_fail: (0, Errno::EIO),
            attributes: None,
        };
        let shared = Arc::new(Shared {
            state: state.into(),
            answers: Condvar::new(),
        });
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mounted = Mounted(Arc::clone(&shared));
        match fuser::spawn_mount(mounted, folder.path(), &config()) {
            Ok(session) => Some(Self {
                shared,
                session: Some(session),
                folder,
            }),
            Err(error) => {
                let _ = left_out(&format!("no FUSE file system can be mounted: {error}"));
                None
            }
        }
    }

    /// Where a file is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Its root.
    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// From now on nothing that anybody does has an effect or an end, until `kill`
    /// has made sure that nobody is left who could tell of an end. What the cut has
    /// left is mounted again.
    pub fn cut_power(mut self, kill: impl FnOnce(&Self) -> Corpse) -> Self {
        self.shared.lock().power = Power::Cut;
        let corpse = kill(&self);
        let (files, rng) = {
            let mut state = self.shared.lock();
            state.power = Power::Off;
            self.shared.answers.notify_all();
            let State { files, rng, .. } = &mut *state;
            let left = files
                .iter()
                .map(|(name, file)| (name.clone(), file.after_cut(rng)));
            (left.collect(), SmallRng::from_rng(rng))
        };
        drop(corpse);
        self.unmount();
        Self::with_files(files, rng).expect("it could be mounted before")
    }

    /// From now on files are kept in pieces of so many bytes, as GlusterFS does with
    /// `features.shard`: it refuses to look for data, and a file that is cut to the end
    /// of a piece loses all of that piece.
    pub fn keep_shards(&self, bytes: u64) {
        self.shared.lock().shard = Some(bytes);
    }

    /// From now on what is opened with `O_DIRECT` takes whole blocks of so many bytes only,
    /// whatever becomes of the flag afterwards, as on GlusterFS with `strict-o-direct`.
    pub fn be_strict(&self, block: u64) {
        self.shared.lock().direct_block = block;
    }

    /// The next write is said to be well and gets lost.
    pub fn lose_next_write(&self, told: Told) {
        let mut state = self.shared.lock();
        (state.loses_next_write, state.told) = (true, told);
    }

    /// Whether that write is still to come.
    pub fn loses_next_write(&self) -> bool {
        self.shared.lock().loses_next_write
    }

    /// The next so many syncs fail with `EIO`.
    pub fn fail_syncs(&self, count: usize) {
        self.shared.lock().syncs_to_fail = count;
    }

    /// The same after so many that do not.
    pub fn fail_syncs_after(&self, passing: usize, count: usize) {
        let mut state = self.shared.lock();
        (state.syncs_to_pass, state.syncs_to_fail) = (passing, count);
    }

    /// No sync comes to its end from now on.
    pub fn hold_syncs(&self) {
        self.shared.lock().held_syncs = Some(Vec::new());
    }

    /// How many wait for their end.
    pub fn held_syncs(&self) -> usize {
        let state = self.shared.lock();
        state.held_syncs.as_ref().map_or(0, Vec::len)
    }

    /// All come to their ends.
    pub fn let_syncs_go(&self) {
        let mut state = self.shared.lock();
        for (inode, handle, reply) in state.held_syncs.take().unwrap_or_default() {
            state.end_sync(inode, handle, reply);
        }
    }

    /// As a server whose client is gone that kept lengths to itself until `fsync` (CephFS):
    /// files end where their data does.
    pub fn find_lengths(&self) {
        let mut state = self.shared.lock();
        state.files.values_mut().for_each(FileState::find_len);
    }

    /// All locks are taken away, and those who had them notice it, or not.
    pub fn take_locks(&self, loss: Loss) {
        let mut state = self.shared.lock();
        let last = state.openings << 1 | DIRECT;
        state.locks.lose(loss, last);
    }

    /// From now on what has a lock can have none taken again, though it has it and can be read
    /// by, as on GlusterFS with `client.strict-locks` when some bricks are not the ones that they
    /// were.
    pub fn refuse_locks_taken_again(&self) {
        self.shared.lock().locks.refuse_more();
    }

    /// How many locks there are.
    pub fn locks(&self) -> usize {
        self.shared.lock().locks.len()
    }

    /// From now on nobody gets an answer who asks for a lock by what is open already.
    pub fn hold_looks(&self) {
        let mut state = self.shared.lock();
        state.held_looks = Some(Vec::new());
        state.holds_looks_before = (state.openings + 1) << 1;
    }

    /// From now on who asks for a lock is told so much later.
    pub fn delay_looks(&self, delay: Duration) {
        self.shared.lock().look_delay = delay;
    }

    /// The next lock that is taken is, and who takes it hears of it, when [let go](Self::let_lock_go).
    pub fn hold_next_lock(&self) {
        self.shared.lock().holds_next_lock = true;
    }

    /// Whether one waits for that.
    pub fn holds_lock(&self) -> bool {
        self.shared.lock().held_lock.is_some()
    }

    /// It is.
    pub fn let_lock_go(&self) {
        let mut state = self.shared.lock();
        if let Some((lock, reply)) = state.held_lock.take() {
            state.set_lock(lock, reply);
        }
    }

    /// From now on nothing is read by what has a lock far behind the end of the file, by which
    /// its owner knows that it is there.
    pub fn hold_reads(&self) {
        self.shared.lock().held_reads = Some(Vec::new());
    }

    /// How many reads wait for that.
    pub fn held_reads(&self) -> usize {
        let state = self.shared.lock();
        state.held_reads.as_ref().map_or(0, Vec::len)
    }

    /// All are done.
    pub fn let_reads_go(&self) {
        let mut state = self.shared.lock();
        for read in state.held_reads.take().unwrap_or_default() {
            state.answer_read(read);
        }
    }

    /// From now on nobody can give a lock back.
    pub fn refuse_unlocks(&self) {
        self.shared.lock().refuses_unlocks = true;
    }

    /// The next so many who ask for a lock are told `EIO`.
    pub fn fail_looks(&self, count: usize) {
        self.shared.lock().looks_to_fail = (count, Errno::EIO);
    }

    /// Whoever asks for a lock is told that the way to the server is lost, until
    /// [`Self::fail_looks`].
    pub fn lose_the_way(&self) {
        self.shared.lock().looks_to_fail = (usize::MAX, Errno::ENOTCONN);
    }

    /// All get one.
    pub fn let_looks_go(&self) {
        let mut state = self.shared.lock();
        for (lock, reply) in state.held_looks.take().unwrap_or_default() {
            state.tell_of_locks(lock, reply);
        }
    }

    /// How many syncs are still to fail.
    pub fn syncs_to_fail(&self) -> usize {
        self.shared.lock().syncs_to_fail
    }

    /// Whether bytes of a file are written that a cut could take back.
    pub fn has_unsynced_bytes(&self, name: &str) -> bool {
        self.shared.lock().files[name].has_unsynced_bytes()
    }

    /// What was done to a file since this was asked for the last time.
    pub fn take_events(&self, name: &str) -> Vec<Event> {
        let mut state = self.shared.lock();
        let file = state.files.get_mut(name);
        file.expect("it is there").take_events()
    }

    /// What who reads a file sees.
    pub fn read(&self, name: &str) -> Vec<u8> {
        self.shared.lock().files[name].live.clone()
    }

    /// Files have extended attributes. To be called before anybody has asked for one.
    pub fn keep_attributes(&self) {
        self.shared.lock().attributes = Some(HashMap::new());
    }

    /// From now on nothing that is asked for gets an answer.
    pub fn stall(&self) {
        self.shared.lock().power = Power::Cut;
    }

    /// The program dies that is the file system: what is under way or asked for fails, and all
    /// locks are gone, until it is [mounted again](Self::mount_again).
    pub fn kill(&mut self) {
        // Cuts the connection, even where it says that the mount is busy.
        let _ = unmount(self.folder.path(), UnmountFlags::FORCE);
        let mut state = self.shared.lock();
        // Who waits here for an answer would keep the program alive.
        state.power = Power::Off;
        state.locks = Locks::default();
        drop(state);
        self.shared.answers.notify_all();
        self.join();
        self.shared.lock().power = Power::On;
    }

    /// Another program is the file system, in the same place.
    pub fn mount_again(&mut self) {
        // That of the dead one, if it is still there.
        let _ = unmount(self.folder.path(), UnmountFlags::DETACH);
        let mounted = Mounted(Arc::clone(&self.shared));
        let session = fuser::spawn_mount(mounted, self.folder.path(), &config());
        self.session = Some(session.expect("it could be mounted before"));
    }

    /// Ends it whoever still has it: the rings of a dead process have it for a moment
    /// longer than that lives, and every mount namespace made meanwhile has a copy.
    fn unmount(&mut self) {
        if self.session.is_none() {
            return;
        }
        // Even where it says that the mount is busy, it has cut the connection.
        if unmount(self.folder.path(), UnmountFlags::FORCE).is_err() {
            let _ = unmount(self.folder.path(), UnmountFlags::DETACH);
        }
        self.join();
    }

    /// Waits for the end of the program whose connection was cut.
    fn join(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        // A request that its reader was taking when the connection was cut ends with
        // ECONNABORTED (fs/fuse/dev.c, `fuse_dev_do_read`), not with the end of the mount.
        let ended = session.join().or_else(|error| match error.raw_os_error() {
            Some(libc::ECONNABORTED) => Ok(()),
            _ => Err(error),
        });
        assert!(thread::panicking() || ended.is_ok(), "{ended:?}");
    }
}

impl Drop for FrailFs {
    fn drop(&mut self) {
        // A request that waits would keep it mounted.
        if let Ok(mut state) = self.shared.state.lock() {
            state.power = Power::Off;
        }
        self.shared.answers.notify_all();
        self.unmount();
    }
}

fn config() -> Config {
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("frail".to_owned())];
    config
}

/// What the kernel asks.
struct Mounted(Arc<Shared>);

fn name_of(name: &OsStr) -> Result<&str, Errno> {
    name.to_str().ok_or(Errno::EILSEQ)
}

/// Answers with what `$body` is `Ok` of, or with its error.
macro_rules! answer {
    ($reply:ident, $body:expr, $value:pat => $ok:expr) => {
        match (|| -> Result<_, Errno> { $body })() {
            Ok($value) => $ok,
            Err(error) => $reply.error(error),
        }
    };
}

impl Filesystem for Mounted {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        config
            .add_capabilities(InitFlags::FUSE_POSIX_LOCKS)
            .map_err(|_| std::io::ErrorKind::Unsupported.into())
    }

    fn getlk(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        _pid: u32,
        reply: ReplyLock,
    ) {
        let lock = Lock {
            inode,
            handle,
            owner,
            range: (start, end),
            kind,
        };
        let mut state = self.0.lock();
        let (looks, error) = state.looks_to_fail;
        if let Some(left) = looks.checked_sub(1) {
            state.looks_to_fail.0 = left;
            return reply.error(error);
        }
        let is_held = lock.handle.0 < state.holds_looks_before;
        let delay = state.look_delay;
        match &mut state.held_looks {
            Some(held) if is_held => held.push((lock, reply)),
            _ if !delay.is_zero() => {
                let shared = Arc::clone(&self.0);
                thread::spawn(move || {
                    thread::sleep(delay);
                    shared.lock().tell_of_locks(lock, reply);
                });
            }
            _ => state.tell_of_locks(lock, reply),
        }
    }

    fn setlk(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        _pid: u32,
        _sleep: bool,
        reply: ReplyEmpty,
    ) {
        let lock = Lock {
            inode,
            handle,
            owner,
            range: (start, end),
            kind,
        };
        let mut state = self.0.lock();
        match lock.kind != libc::F_UNLCK && std::mem::take(&mut state.holds_next_lock) {
            true => state.held_lock = Some((lock, reply)),
            false => state.set_lock(lock, reply),
        }
    }

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
        self.0.lock().locks.close(handle);
        reply.ok();
    }

    fn setxattr(
        &self,
        _: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        answer!(reply, {
            let mut state = self.0.enter()?;
            let attributes = state.attributes.as_mut().ok_or(Errno::ENOSYS)?;
            attributes.insert((inode, name.to_owned()), value.to_owned());
            Ok(())
        }, () => reply.ok());
    }

    fn getxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        answer!(reply, {
            let state = self.0.enter()?;
            let attributes = state.attributes.as_ref().ok_or(Errno::ENOSYS)?;
            let value = attributes.get(&(inode, name.to_owned()));
            value.cloned().ok_or(Errno::NO_XATTR)
        }, value => match size {
            0 => reply.size(value.len() as u32),
            _ => reply.data(&value),
        });
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer!(reply, {
            let mut state = self.0.enter()?;
            let inode = state.inode_of(name_of(name)?).ok_or(Errno::ENOENT)?;
            state.attr(inode)
        }, attr => reply.entry(&FORGET, &attr, Generation(0)));
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.0.enter()?.attr(inode), attr => reply.attr(&FORGET, &attr));
    }

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
        answer!(reply, {
            let mut state = self.0.enter()?;
            if let Some(size) = size {
                state.set_len(inode, size)?;
            }
            state.attr(inode)
        }, attr => reply.attr(&FORGET, &attr));
    }

    fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let is_direct = flags.0 & libc::O_DIRECT != 0;
        let handle = self.0.lock().open(is_direct);
        reply.opened(handle, FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = match self.0.enter() {
            Ok(state) => state,
            Err(error) => return reply.error(error),
        };
        let read = HeldRead {
            inode,
            handle,
            offset,
            size,
            reply,
        };
        let is_watched = state.locks.has_far(handle);
        match &mut state.held_reads {
            Some(held) if is_watched => held.push(read),
            _ => state.answer_read(read),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        answer!(reply, {
            let mut state = self.0.enter()?;
            state.check(handle, offset, data.len())?;
            if std::mem::take(&mut state.loses_next_write) {
                state.lost.push(handle);
            } else {
                state.file(inode)?.write(offset, data);
            }
            Ok(data.len() as u32)
        }, len => reply.written(len));
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer!(reply, {
            let mut state = self.0.enter()?;
            let file = state.file(inode)?;
            let end = offset + length;
            let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
            if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
                file.zero(offset, length);
            }
            if !keeps_size && end > file.live.len() as u64 {
                file.set_len(end);
            }
            Ok(())
        }, () => reply.ok());
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        let keeps_shards = self.0.lock().shard.is_some();
        reply.error(match keeps_shards {
            true => Errno::EOPNOTSUPP,
            // The kernel does it itself then: all is data.
            false => Errno::ENOSYS,
        });
    }

    fn fsync(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        of_data: bool,
        reply: ReplyEmpty,
    ) {
        match self.0.enter() {
            Ok(mut state) => {
                if !of_data && let Ok(file) = state.file(inode) {
                    file.keep_len();
                }
                match &mut state.held_syncs {
                    Some(held) => held.push((inode, handle, reply)),
                    None => state.end_sync(inode, handle, reply),
                }
            }
            Err(error) => reply.error(error),
        }
    }

    /// A descriptor is closed. Who is killed waits for this, so a cut holds nobody up.
    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        match self.0.lock().tell_of_lost(handle) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        answer!(reply, {
            let mut state = self.0.enter()?;
            let inode = state.create(name_of(name)?);
            Ok((state.attr(inode)?, state.open(false)))
        }, (attr, handle) => {
            reply.created(&FORGET, &attr, Generation(0), handle, FopenFlags::empty());
        });
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer!(reply, {
            let mut state = self.0.enter()?;
            let name = name_of(name)?;
            let inode = state.inode_of(name).ok_or(Errno::ENOENT)?;
            state.nodes[(inode.0 - FIRST) as usize].removed = true;
            state.files.remove(name);
            Ok(())
        }, () => reply.ok());
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        from: &OsStr,
        _: INodeNo,
        to: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        answer!(reply, {
            let mut state = self.0.enter()?;
            let (from, to) = (name_of(from)?, name_of(to)?);
            let inode = state.inode_of(from).ok_or(Errno::ENOENT)?;
            if let Some(replaced) = state.inode_of(to) {
                if flags.contains(RenameFlags::RENAME_NOREPLACE) {
                    return Err(Errno::EEXIST);
                }
                state.nodes[(replaced.0 - FIRST) as usize].removed = true;
            }
            to.clone_into(&mut state.nodes[(inode.0 - FIRST) as usize].name);
            let file = state.files.remove(from).ok_or(Errno::ENOENT)?;
            state.files.insert(to.to_owned(), file);
            Ok(())
        }, () => reply.ok());
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        answer!(reply, {
            let state = self.0.enter()?;
            for (index, node) in state.nodes.iter().enumerate().skip(offset as usize) {
                let index = index as u64;
                let inode = INodeNo(FIRST + index);
                if !node.removed && reply.add(inode, index + 1, FileType::RegularFile, &node.name) {
                    break;
                }
            }
            Ok(())
        }, () => reply.ok());
    }
}
