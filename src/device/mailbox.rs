//! What the thread that serves the front-end's messages tells a queue thread.
//!
//! The queue thread owns its ring and its side of the engine as long as it runs, so
//! nobody else changes them: it is asked to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::event::Event;
use crate::ploop::QueueWaker;

/// What becomes of requests that wait for space on the host (see
/// [`Queue::drain`](crate::ploop::Queue::drain)) and still find
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// They fail. For a guest that goes on.
    Fail,
    /// They are left without an answer. For a front-end that is gone: it may come
    /// back and send them again.
    Drop,
}

/// One message.
#[derive(Debug)]
pub(super) enum Mail {
    /// The driver kicks by this event from now on.
    Kick(Arc<Event>),
    /// The driver wants to be signalled by this event from now on.
    Call(Option<Arc<Event>>),
    /// Errors of the ring are told by this event from now on.
    Error(Option<Arc<Event>>),
    /// The table of guest memory has changed: let go of the old one.
    Memory,
    /// Complete what is in flight and end.
    Stop(Parked),
}

/// The mail of one queue thread.
pub(super) struct Mailbox {
    /// Whether there is any: what the queue thread looks at between batches.
    pending: AtomicBool,
    mail: Mutex<Vec<Mail>>,
    waker: QueueWaker,
}

impl Mailbox {
    /// Empty; `waker` is that of the reader.
    pub fn new(waker: QueueWaker) -> Self {
        Self {
            pending: AtomicBool::new(false),
            mail: Mutex::default(),
            waker,
        }
    }

    /// Leaves a message. Never blocks for longer than the reader needs to take some.
    pub fn post(&self, mail: Mail) {
        self.lock().push(mail);
        self.pending.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Queue thread: whether there is mail. Costs a relaxed load.
    pub fn has_mail(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    /// Queue thread: all there is, oldest first.
    pub fn take(&self) -> Vec<Mail> {
        let mut mail = self.lock();
        self.pending.store(false, Ordering::Relaxed);
        std::mem::take(&mut *mail)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Mail>> {
        // Nothing panics with the lock held.
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
