//! What the thread that serves the front-end's messages tells a queue thread.
//!
//! The queue thread owns its ring and its side of the engine as long as it runs, so
//! nobody else changes them: it is asked to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::dirty_log::Marks;
use super::event::Event;
use crate::ploop::QueueWaker;

/// What becomes of requests that wait for space on the host (see
/// [`Queue::drain`](crate::ploop::Queue::drain)) and still find
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// They fail. For a guest that goes on.
    Fail,
    /// The same at the end of the program, which has little time left: what limits keep back
    /// is not waited for any longer than anything else.
    FailSoon,
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
    /// What is written to guest memory is to be marked so from now on, to be confirmed by
    /// [`Mailbox::confirm`].
    Marks(Option<Marks>),
    /// Complete what is in flight and end.
    Stop(Parked),
}

/// The mail of one queue thread.
pub(super) struct Mailbox {
    /// Whether there is any: what the queue thread looks at between batches.
    pending: AtomicBool,
    mail: Mutex<Vec<Mail>>,
    waker: QueueWaker,
    progress: Mutex<Progress>,
    progressed: Condvar,
}

/// How far the reader has come.
#[derive(Debug, Default)]
struct Progress {
    has_ended: bool,
    /// How much mail it has confirmed.
    confirmed: u64,
}

impl Mailbox {
    /// Empty; `waker` is that of the reader.
    pub fn new(waker: QueueWaker) -> Self {
        Self {
            pending: AtomicBool::new(false),
            mail: Mutex::default(),
            waker,
            progress: Mutex::default(),
            progressed: Condvar::new(),
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

    /// Queue thread: nobody will take mail any more.
    pub fn end(&self) {
        self.progress().has_ended = true;
        self.progressed.notify_all();
    }

    /// Queue thread: what one mail asks for has been done.
    pub fn confirm(&self) {
        self.progress().confirmed += 1;
        self.progressed.notify_all();
    }

    /// Waits for the reader's end, so long at most. Returns whether it has ended.
    pub fn has_ended_within(&self, time: Duration) -> bool {
        self.comes_within(time, |progress| progress.has_ended)
    }

    /// Waits until the reader has confirmed so much mail or ended. Returns whether it has.
    pub fn has_confirmed_within(&self, count: u64, time: Duration) -> bool {
        self.comes_within(time, |progress| {
            progress.has_ended || progress.confirmed >= count
        })
    }

    fn comes_within(&self, time: Duration, has_come: impl Fn(&Progress) -> bool) -> bool {
        let wait = |progress: &mut Progress| !has_come(progress);
        let waited = self
            .progressed
            .wait_timeout_while(self.progress(), time, wait);
        has_come(&waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Mail>> {
        // Nothing panics with the lock held.
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
