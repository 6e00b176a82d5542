//! Locks on an image file, shared with QEMU and with Virtuozzo's own tool.
//!
//! QEMU announces what it does with a file by read locks on single bytes of it
//! (locks, not data: what is stored there does not matter). Byte 100 + n says "I
//! use permission n", byte 200 + n "nobody else may use permission n". One who
//! comes takes its own locks first and then tests whether anybody holds the bytes
//! that contradict them, so of two who come at once at most one stays. The
//! official `ploop` tool takes bytes 200 to 204 and refuses if anybody has one.
//!
//! The locks are open-file-description locks: they belong to the description, not
//! to the process, and closing another descriptor of the file does not drop them.
//!
//! Knows lock bytes and their meaning. Must not know what is in the file.

mod holder;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use thiserror::Error;

pub use holder::Holder;

use super::filesystem;

/// First of the bytes that say which permissions the holder uses.
const USED_BASE: i64 = 100;
/// First of the bytes that say which permissions nobody else may use.
const DENIED_BASE: i64 = 200;

/// Behind all that a file can be as long as, and in front of the last byte that can be locked.
const OWN_FROM: i64 = 1 << 62;
const OWN_BYTES: u64 = 1 << 61;

/// Whoever changes a file that lies on a server has a lock on this byte, beside the others. Who
/// comes tries to lock it exclusively, for a moment: of a server that consists of several each
/// is asked then, where only one answers a question. One that has not given up a host yet may
/// still take what that had under way (GlusterFS).
const CHANGED: i64 = OWN_FROM - 1;

/// The byte that this process locks in each file that it has locked, and nobody else. It is
/// drawn by lot: who finds a lock on it has found one that this process has had all the time
/// since it was taken.
pub fn own_byte() -> i64 {
    static BYTE: OnceLock<i64> = OnceLock::new();
    *BYTE.get_or_init(|| {
        let (lot, _) = uuid::Uuid::new_v4().as_u64_pair();
        OWN_FROM + (lot % OWN_BYTES) as i64
    })
}

/// A set of permissions, bit n for permission n of QEMU's block layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Permissions(u8);

impl Permissions {
    /// Read, and see the same until a write of one's own.
    const CONSISTENT_READ: u8 = 0;
    /// Change what is stored.
    const WRITE: u8 = 1;
    /// Change the length.
    const RESIZE: u8 = 3;
    /// There are five of them.
    const COUNT: u8 = 5;

    const fn of(list: &[u8]) -> Self {
        let (mut bits, mut at) = (0, 0);
        while at < list.len() {
            bits |= 1 << list[at];
            at += 1;
        }
        Self(bits)
    }

    const ALL: Self = Self((1 << Self::COUNT) - 1);

    fn iter(self) -> impl DoubleEndedIterator<Item = u8> {
        (0..Self::COUNT).filter(move |n| self.0 & (1 << n) != 0)
    }
}

/// What the holder of an [`ImageLock`] wants to do with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Serve it for writing. Others may not write, nor expect to read anything
    /// consistent unless they say that they do not care (`qemu-img -U`).
    ReadWrite,
    /// Only read it. Others may read too.
    ReadOnly,
    /// Change it, or the bundle that it belongs to, off line: nobody else may
    /// use it in any way.
    Exclusive,
}

impl LockMode {
    /// What QEMU's own locks for this are, but for `Exclusive`, which is what
    /// the official tool takes as well.
    fn used_and_denied(self) -> (Permissions, Permissions) {
        use Permissions as P;
        let others_change = P::of(&[P::WRITE, P::RESIZE]);
        match self {
            Self::ReadWrite => (
                P::of(&[P::CONSISTENT_READ, P::WRITE, P::RESIZE]),
                others_change,
            ),
            Self::ReadOnly => (P::of(&[P::CONSISTENT_READ]), others_change),
            Self::Exclusive => (P::of(&[P::CONSISTENT_READ, P::WRITE, P::RESIZE]), P::ALL),
        }
    }
}

/// Why an image cannot be locked.
#[derive(Debug, Error)]
pub enum LockError {
    /// Somebody writes to it.
    #[error("{0} has the image open for writing")]
    Writer(Holder),
    /// Somebody uses it and does not want it to be changed.
    #[error("{0} has the image open and does not let others write to it")]
    NoWriters(Holder),
    /// Somebody uses it alone.
    #[error("{0} has locked the image exclusively")]
    Exclusive(Holder),
    /// Somebody reads it, and the lock wanted is exclusive.
    #[error("{0} has the image open")]
    Reader(Holder),
    /// The file system cannot lock, or something else is wrong with the file.
    #[error("cannot lock the image: {0}")]
    Io(#[from] io::Error),
}

impl LockError {
    /// Looks for the process that is in the way, where the kernel did not name it.
    /// It is worth its time when the error is going to be shown.
    #[must_use]
    pub fn identify_holder(mut self, file: &File) -> Self {
        match &mut self {
            Self::Writer(holder)
            | Self::NoWriters(holder)
            | Self::Exclusive(holder)
            | Self::Reader(holder) => holder.identify(file),
            Self::Io(_) => {}
        }
        self
    }
}

/// The locks on one image, until it is dropped.
#[derive(Debug)]
pub struct ImageLock {
    /// The same description as the caller's file.
    file: File,
    mode: LockMode,
}

impl ImageLock {
    /// Takes the locks for `mode`, or says who is in the way. `file` must be
    /// open for reading; one open file description can carry one lock only.
    ///
    /// # Errors
    /// [`LockError::Io`] if the file system cannot lock, the other variants if
    /// somebody uses the image in a way that does not go with `mode`.
    pub fn acquire(file: &File, mode: LockMode) -> Result<Self, LockError> {
        let lock = Self::share(file, mode)?;
        test_everywhere(&lock.file, mode)?;
        Ok(lock)
    }

    /// Takes the locks for `mode` beside somebody who has them and is going to give the
    /// image over: others find it locked all the time. Until that one has gone, nothing
    /// may be done with the image that he could notice.
    ///
    /// # Errors
    /// [`LockError::Io`] if the file system cannot lock.
    pub fn share(file: &File, mode: LockMode) -> Result<Self, LockError> {
        let (used, denied) = mode.used_and_denied();
        // From here on, dropping it gives back what was taken.
        let lock = Self {
            file: file.try_clone()?,
            mode,
        };
        // First: as long as it is there, the others have been. Without it that is not known.
        let _ = share_byte(&lock.file, own_byte());
        if mode != LockMode::ReadOnly {
            say_changed(&lock.file);
        }
        take(&lock.file, used, denied)?;
        Ok(lock)
    }

    /// Takes once more what `file` has of `mode` already: a server that consists of several
    /// may have lost its part of it, where another one has not.
    ///
    /// # Errors
    /// Any of `fcntl(2)`.
    pub fn renew(file: &File, mode: LockMode) -> io::Result<()> {
        let (used, denied) = mode.used_and_denied();
        share_byte(file, own_byte())?;
        if mode != LockMode::ReadOnly {
            say_changed(file);
        }
        take(file, used, denied)
    }

    /// The image has become a lower level: see [`stop_writing`].
    ///
    /// # Errors
    /// Any of `fcntl(2)`.
    pub fn stop_writing(&mut self) -> io::Result<()> {
        stop_writing(&self.file)?;
        self.mode = LockMode::ReadOnly;
        Ok(())
    }

    /// Whether nobody else uses the image in a way that does not go with this lock, as
    /// there may be since it was [shared](Self::share).
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub fn is_alone(&self) -> Result<(), LockError> {
        test(&self.file, self.mode)
    }

    /// Closes the descriptor as the end of the process does, without a word about the
    /// locks.
    #[cfg(test)]
    pub(crate) fn abandon(self) {
        use std::os::fd::FromRawFd;
        let lock = std::mem::ManuallyDrop::new(self);
        // SAFETY: the descriptor is ours, and nobody closes it a second time.
        drop(unsafe { File::from_raw_fd(lock.file.as_raw_fd()) });
    }
}

/// Whether anybody but this description holds a byte that contradicts this mode.
///
/// # Errors
/// As [`ImageLock::acquire`].
pub fn test(file: &File, mode: LockMode) -> Result<(), LockError> {
    // Mostly nobody is there at all, and each question may go to a server.
    if !is_used_by_others(file)? {
        return Ok(());
    }
    let (used, denied) = mode.used_and_denied();
    for n in used.iter() {
        if let Some(holder) = holder_of(file, DENIED_BASE + i64::from(n))? {
            return Err(match n {
                Permissions::CONSISTENT_READ => LockError::Exclusive(holder),
                // A writer denies writing too; that it writes says more.
                _ => match holder_of(file, USED_BASE + i64::from(n))? {
                    Some(writer) => LockError::Writer(writer),
                    None => LockError::NoWriters(holder),
                },
            });
        }
    }
    // From the highest down: of all that one holder uses, that it changes the
    // image says more than that it reads.
    for n in denied.iter().rev() {
        if let Some(holder) = holder_of(file, USED_BASE + i64::from(n))? {
            return Err(match n {
                Permissions::CONSISTENT_READ => LockError::Reader(holder),
                _ => LockError::Writer(holder),
            });
        }
    }
    Ok(())
}

/// Takes the lock on [`CHANGED`] beside others who have it. Where that cannot be, the others
/// have to do.
fn say_changed(file: &File) {
    for _ in 0..TRIES {
        match share_byte(file, CHANGED) {
            // Somebody looks whether we are there.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(TRY_PAUSE),
            _ => return,
        }
    }
}

const TRIES: u32 = 20;
const TRY_PAUSE: Duration = Duration::from_millis(5);

/// As [`test()`], and of every server that the file is kept by.
///
/// # Errors
/// As [`ImageLock::acquire`].
pub fn test_everywhere(file: &File, mode: LockMode) -> Result<(), LockError> {
    test(file, mode)?;
    match mode != LockMode::ReadOnly && filesystem::may_be_shared(file) {
        true => ask_every_server(file),
        false => Ok(()),
    }
}

/// Whether nobody else has a lock on [`CHANGED`], on any server.
fn ask_every_server(file: &File) -> Result<(), LockError> {
    match set(file, CHANGED, 1, libc::F_WRLCK) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(LockError::Writer(Holder {
            pid: None,
            byte: CHANGED,
        })),
        // Where it cannot be locked like that, nobody has.
        Err(_) => Ok(()),
        Ok(()) => Ok(set(file, CHANGED, 1, libc::F_RDLCK)?),
    }
}

/// The image that this description has locked for writing is only read from now on: others
/// may read it too, and write no more than before.
///
/// # Errors
/// Any of `fcntl(2)`.
pub fn stop_writing(file: &File) -> io::Result<()> {
    let (used, _) = LockMode::ReadWrite.used_and_denied();
    let (reads, _) = LockMode::ReadOnly.used_and_denied();
    for n in used.iter().filter(|n| reads.iter().all(|read| read != *n)) {
        set(file, USED_BASE + i64::from(n), 1, libc::F_UNLCK)?;
    }
    let _ = set(file, CHANGED, 1, libc::F_UNLCK);
    Ok(())
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // The description can outlive this value in other descriptors, so closing ours is not
        // enough. It has no other locks.
        if let Err(error) = set(&self.file, 0, 0, libc::F_UNLCK) {
            log::warn!("cannot unlock an image: {error}");
        }
    }
}

/// Gives back all that a description has locked, as far as the server can be reached.
pub fn unlock_all(file: &File) {
    // As far as the file can be locked.
    let _ = set(file, 0, 0, libc::F_UNLCK);
}

fn take(file: &File, used: Permissions, denied: Permissions) -> io::Result<()> {
    for n in used.iter() {
        share_byte(file, USED_BASE + i64::from(n))?;
    }
    for n in denied.iter() {
        share_byte(file, DENIED_BASE + i64::from(n))?;
    }
    Ok(())
}

/// Takes a read lock on a byte.
///
/// # Errors
/// Any of `fcntl(2)`.
pub fn share_byte(file: &File, byte: i64) -> io::Result<()> {
    set(file, byte, 1, libc::F_RDLCK)
}

/// Whether any description but this one has a lock on a byte.
///
/// # Errors
/// Any of `fcntl(2)`.
pub fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    Ok(holder_of(file, byte)?.is_some())
}

/// Whether any description but this one has a lock that tells of the use of an image.
///
/// # Errors
/// Any of `fcntl(2)`.
pub fn is_used_by_others(file: &File) -> io::Result<bool> {
    // There is nothing else between the bytes for use and those for denial.
    let end = DENIED_BASE + i64::from(Permissions::COUNT);
    Ok(holder_within(file, USED_BASE, end - USED_BASE)?.is_some())
}

/// A request for `len` bytes from `start`.
fn flock(start: i64, len: i64, kind: i32) -> libc::flock {
    libc::flock {
        // The kinds are 0 to 2; libc gives them a wider type than the field.
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// Takes or drops locks. A read lock never conflicts with the read locks that
/// everybody takes here; with a foreign write lock it fails.
fn set(file: &File, start: i64, len: i64, kind: i32) -> io::Result<()> {
    let request = flock(start, len, kind);
    // SAFETY: the descriptor is open, and F_OFD_SETLK reads a `struct flock`.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &request) };
    if rc == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Who but us holds any lock on a byte.
fn holder_of(file: &File, byte: i64) -> io::Result<Option<Holder>> {
    holder_within(file, byte, 1)
}

/// The same of any of `len` bytes from `start`.
fn holder_within(file: &File, start: i64, len: i64) -> io::Result<Option<Holder>> {
    let mut request = flock(start, len, libc::F_WRLCK);
    // SAFETY: the descriptor is open, and F_OFD_GETLK reads and writes a
    // `struct flock`.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut request) };
    if rc == -1 {
        return Err(io::Error::last_os_error());
    }
    if i32::from(request.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    Ok(Some(Holder {
        pid: (request.l_pid > 0).then_some(request.l_pid),
        byte: start,
    }))
}
