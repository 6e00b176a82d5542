//! Whether the files of a disk are still this process's to use.
//!
//! A lock on a file of a server is a lease: a server that has not heard of this host for a
//! while gives the lock to another one, and this one is not told. From then on nothing may
//! be written here, whatever thread would write it. So each description that does I/O
//! carries a lock on a byte that nobody else locks, which has some servers refuse I/O by it
//! once the lock is gone; and somebody looks whether that lock is still there
//! ([`LockWatch`](super::LockWatch)).
//!
//! While a look is late, or I/O has failed as it does without the lock, it is not known.
//! Then nothing is begun: it waits for the next look, which decides. What is lost stays
//! lost.
//!
//! Knows states and who waits for them. Must not know how it is found out.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::file::SharedFile;
use crate::storage::{LockStanding, lock};

/// How long a renewal is waited for that nobody needs any more. One that takes longer is of a
/// server that cannot be reached, where nothing is locked or unlocked.
const RENEWAL_TIME: Duration = Duration::from_secs(2);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Lease {
    /// The byte that every description of this disk locks: [`lock::own_byte`].
    byte: i64,
    /// A copy of [`Inner::standing`], for who only asks.
    standing: AtomicU8,
    inner: Mutex<Inner>,
    /// Something is doubted, or nobody has to look any more.
    to_look: Condvar,
    /// A renewal has ended.
    renewed: Condvar,
    /// Polls readable unless it is in doubt.
    decided: OwnedFd,
    files: OnceLock<Vec<Weak<SharedFile>>>,
}

#[derive(Debug)]
struct Inner {
    standing: LockStanding,
    /// How often it was doubted: a look that began before says nothing of a doubt since.
    doubts: u64,
    /// Of these, those that a look was begun for.
    looked_into: u64,
    /// A sync has failed since it was known to be there, and nobody was told of that.
    withholds_sync: bool,
    is_over: bool,
    /// The locks are being taken once more.
    is_renewed: bool,
}

/// What is to be done next by who looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookFor {
    /// Look. The number goes with the answer.
    Doubts(u64),
    /// Nothing any more.
    End,
}

impl Lease {
    /// Not watched yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            byte: lock::own_byte(),
            standing: AtomicU8::new(LockStanding::Unwatched as u8),
            inner: Mutex::new(Inner {
                standing: LockStanding::Unwatched,
                doubts: 0,
                looked_into: 0,
                withholds_sync: false,
                is_over: false,
                is_renewed: false,
            }),
            renewed: Condvar::new(),
            to_look: Condvar::new(),
            decided: eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            files: OnceLock::new(),
        })
    }

    /// These are used as long as it is held.
    pub fn cover(&self, files: &[Arc<SharedFile>]) {
        let _ = self.files.set(files.iter().map(Arc::downgrade).collect());
    }

    /// Takes the lock of a description.
    pub fn lock(&self, file: &File) -> io::Result<()> {
        lock::share_byte(file, self.byte)
    }

    /// Whether anybody but this description has that lock: one of ours has.
    pub fn is_seen_by(&self, file: &File) -> io::Result<bool> {
        lock::is_locked(file, self.byte)
    }

    /// How it stands. May be old when it is looked at.
    pub fn standing(&self) -> LockStanding {
        match self.standing.load(Ordering::Acquire) {
            value if value == LockStanding::Held as u8 => LockStanding::Held,
            value if value == LockStanding::InDoubt as u8 => LockStanding::InDoubt,
            value if value == LockStanding::Lost as u8 => LockStanding::Lost,
            _ => LockStanding::Unwatched,
        }
    }

    /// Polls readable unless it is in doubt.
    pub fn decided_fd(&self) -> RawFd {
        self.decided.as_raw_fd()
    }

    /// Blocks as long as it is in doubt.
    ///
    /// # Errors
    /// It is lost.
    pub fn require(&self) -> Result<(), Errno> {
        loop {
            match self.standing() {
                LockStanding::Held | LockStanding::Unwatched => return Ok(()),
                LockStanding::Lost => return Err(LOST),
                LockStanding::InDoubt => {
                    let mut decided = [PollFd::new(&self.decided, PollFlags::IN)];
                    // It is asked again, whatever has ended the wait.
                    let _ = poll(&mut decided, None);
                }
            }
        }
    }

    /// Something happened that does without the lock. `false` if nobody looks.
    pub fn doubt(&self) -> bool {
        self.doubt_by(false)
    }

    /// The same of a sync that has failed: its end is withheld until it is decided.
    pub fn doubt_by_sync(&self) -> bool {
        self.doubt_by(true)
    }

    /// Whether who waits for a sync that has failed does not know it yet.
    pub fn withholds_sync(&self) -> bool {
        self.lock_inner().withholds_sync
    }

    fn doubt_by(&self, is_sync: bool) -> bool {
        let mut inner = self.lock_inner();
        match inner.standing {
            LockStanding::Unwatched => return false,
            LockStanding::Lost => return true,
            LockStanding::Held | LockStanding::InDoubt => {}
        }
        inner.doubts += 1;
        inner.withholds_sync |= is_sync;
        self.set(&mut inner, LockStanding::InDoubt);
        self.to_look.notify_all();
        true
    }

    /// From now on somebody looks.
    pub fn begin_watch(&self) {
        let mut inner = self.lock_inner();
        if inner.standing == LockStanding::Unwatched {
            self.set(&mut inner, LockStanding::Held);
        }
    }

    /// Nobody looks any more. What is in doubt is lost then. Waits for a lock that is being
    /// taken once more, for a while: whoever gives the file up would not have it unlocked.
    pub fn end_watch(&self) {
        let mut inner = self.lock_inner();
        inner.is_over = true;
        match inner.standing {
            LockStanding::Held => self.set(&mut inner, LockStanding::Unwatched),
            // Nobody will decide it.
            LockStanding::InDoubt => self.set(&mut inner, LockStanding::Lost),
            LockStanding::Unwatched | LockStanding::Lost => {}
        }
        self.to_look.notify_all();
        let is_busy = |inner: &mut Inner| inner.is_renewed;
        let waited = self
            .renewed
            .wait_timeout_while(inner, RENEWAL_TIME, is_busy);
        drop(waited);
    }

    /// Has the lock taken once more, by `renew`. `None` if nobody looks any more.
    pub fn renew<T>(&self, renew: impl FnOnce() -> T) -> Option<T> {
        let mut inner = self.lock_inner();
        if inner.is_over {
            return None;
        }
        inner.is_renewed = true;
        drop(inner);
        let result = renew();
        self.lock_inner().is_renewed = false;
        self.renewed.notify_all();
        Some(result)
    }

    /// Waits until it is time for a look, `pause` at most unless something is doubted.
    pub fn wait_for_look(&self, pause: Duration) -> LookFor {
        let inner = self.lock_inner();
        let sleeps = |inner: &mut Inner| !inner.is_over && inner.doubts == inner.looked_into;
        let waited = self.to_look.wait_timeout_while(inner, pause, sleeps);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if inner.is_over {
            return LookFor::End;
        }
        inner.looked_into = inner.doubts;
        LookFor::Doubts(inner.doubts)
    }

    /// A look that began when there were so many doubts has found the lock. `true` if that
    /// ends a doubt.
    pub fn affirm(&self, doubts: u64) -> bool {
        let mut inner = self.lock_inner();
        let ends = inner.standing == LockStanding::InDoubt && inner.doubts == doubts;
        if ends {
            inner.withholds_sync = false;
            self.set(&mut inner, LockStanding::Held);
        }
        ends
    }

    /// It is gone, for good. `true` the first time, unless nobody is to look any more: what a
    /// late look finds then is that it was given up.
    pub fn lose(&self) -> bool {
        let mut inner = self.lock_inner();
        if inner.is_over {
            return false;
        }
        let is_news = inner.standing != LockStanding::Lost;
        self.set(&mut inner, LockStanding::Lost);
        is_news
    }

    fn set(&self, inner: &mut Inner, standing: LockStanding) {
        inner.standing = standing;
        self.standing.store(standing as u8, Ordering::Release);
        let is_usable = !matches!(standing, LockStanding::InDoubt | LockStanding::Lost);
        for file in self.files.get().into_iter().flatten() {
            if let Some(file) = file.upgrade() {
                file.set_usable(is_usable);
            }
        }
        // Last: who is woken finds what was decided. Neither fails but when there is nothing
        // to do.
        let _ = match standing {
            LockStanding::InDoubt => rustix::io::read(&self.decided, &mut [0_u8; 8]),
            _ => rustix::io::write(&self.decided, &1_u64.to_ne_bytes()),
        };
    }

    fn lock_inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What everything fails with that is begun without the lock.
pub(super) const LOST: Errno = Errno::NOLCK;

/// Whether I/O by a description with a lock fails like this when the server has taken the
/// lock away, or the way to the server is lost: see [`Lease`].
pub(super) fn tells_of_loss(error: Errno) -> bool {
    tells_of_absence(error)
        || matches!(
            error,
            Errno::BADFD | Errno::SHUTDOWN | Errno::STALE | Errno::IO | LOST
        )
}

/// Of these errors, those that say that the way to the server is lost. The second one is what
/// was under way fails with when a program dies that is the file system (FUSE).
pub(super) fn tells_of_absence(error: Errno) -> bool {
    matches!(error, Errno::NOTCONN | Errno::CONNABORTED)
}

#[cfg(test)]
mod tests;
