//! A thread's inbox: a lock-free list and a descriptor that wakes its reader.
//!
//! The reader's descriptor is written only when the reader may be asleep: while
//! it works, a message costs no system call, neither its sender nor the reader.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};

use super::llist::{LockFreeList, Taken};
use super::sync::atomic::{AtomicU8, Ordering, fence};

/// The reader is awake, and its descriptor is not signalled.
const AWAKE: u8 = 0;
/// The reader may be asleep, and its descriptor is not signalled.
const ARMED: u8 = 1;
/// The descriptor is signalled, or is just about to be.
const SIGNALLED: u8 = 2;

/// Wakes one thread.
pub struct Waker {
    fd: OwnedFd,
    state: AtomicU8,
}

impl Waker {
    /// Not armed: the reader is awake.
    ///
    /// # Errors
    /// Those of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            fd: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            state: AtomicU8::new(AWAKE),
        })
    }

    /// Wakes the reader, if it may be asleep. To be called after what it shall see.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.state.load(Ordering::Relaxed) != ARMED {
            return;
        }
        let won = self
            .state
            .compare_exchange(ARMED, SIGNALLED, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        if won {
            // Cannot fail: the counter is far from its end, as only one signals
            // and the reader drains before it arms again.
            let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        }
    }

    /// The reader is about to look for work for the last time before it sleeps.
    /// Whatever is posted from now on wakes it.
    pub fn arm(&self) {
        match self.state.load(Ordering::Acquire) {
            AWAKE => {}
            SIGNALLED => {
                let mut counter = [0; 8];
                if rustix::io::read(&self.fd, &mut counter).is_err() {
                    // The signal is still to come, and will wake the reader.
                    return;
                }
            }
            _ => return,
        }
        self.state.store(ARMED, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The reader works, and looks for what is posted from now on by itself: it
    /// need not be woken until it arms again.
    pub fn disarm(&self) {
        // Fails if somebody is waking the reader, which does no harm.
        let _ = self
            .state
            .compare_exchange(ARMED, AWAKE, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Whether the reader may be asleep.
    #[cfg(all(test, not(ploop_loom)))]
    pub fn is_armed(&self) -> bool {
        self.state.load(Ordering::Acquire) == ARMED
    }

    /// Polls readable when the reader was woken.
    pub fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Messages to one thread.
pub struct Inbox<T> {
    list: LockFreeList<T>,
    waker: Waker,
}

impl<T> Inbox<T> {
    /// Empty.
    ///
    /// # Errors
    /// Those of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            list: LockFreeList::default(),
            waker: Waker::new()?,
        })
    }

    /// Adds a message and wakes the reader if need be.
    pub fn post(&self, message: T) {
        self.list.push(message);
        self.waker.wake();
    }

    /// The reader has nothing to do and wants to sleep. False if it must not,
    /// because there is a message.
    pub fn may_sleep(&self) -> bool {
        self.waker.arm();
        let nothing = self.list.is_empty();
        if !nothing {
            self.waker.disarm();
        }
        nothing
    }

    /// Everything posted so far, oldest first.
    pub fn take_all(&self) -> Taken<T> {
        self.list.take_all()
    }

    /// Whether there was nothing at the moment of the call.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// What wakes the reader.
    pub fn waker(&self) -> &Waker {
        &self.waker
    }
}
