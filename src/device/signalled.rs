//! The events by which the queue threads of a connection signal.
//!
//! A front-end can make a signal block (see [`super::event`]), and with it the thread that
//! signals. Others may wait for that thread, directly or by way of the engine: a flush of
//! one queue waits for the stable writes of all. So whoever waits for anything that a queue
//! thread has to do lets all of them go on meanwhile, again and again.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::event::Event;

/// How long to wait for a thread, before those that may be blocked are let go on.
pub(super) const UNBLOCK_INTERVAL: Duration = Duration::from_millis(20);

/// Those of one connection.
#[derive(Debug, Default)]
pub(super) struct Signalled(Mutex<Vec<Weak<Event>>>);

impl Signalled {
    /// Threads may signal by this one from now on, as long as it lives.
    pub fn add(&self, event: &Arc<Event>) {
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.retain(|known| known.strong_count() > 0);
        events.push(Arc::downgrade(event));
    }

    /// Lets threads go on that are blocked in a signal.
    pub fn unblock(&self) {
        let events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let living = events.iter().filter_map(Weak::upgrade);
        living.for_each(|event| event.unblock());
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::thread;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::OFlags;

    use super::*;

    /// A front-end can send as many as it likes.
    #[test]
    fn events_that_are_gone_are_not_kept() {
        let signalled = Signalled::default();
        let make = || {
            let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
            Arc::new(Event::new(File::from(event)).unwrap())
        };
        let living = make();
        signalled.add(&living);
        for _ in 0..10 {
            signalled.add(&make());
        }
        let events = signalled.0.lock().unwrap();
        // The last one goes when the next one comes.
        assert_eq!(events.len(), 2);
        assert!(Weak::ptr_eq(&events[0], &Arc::downgrade(&living)));
    }

    #[test]
    fn who_is_blocked_in_a_signal_is_let_go_whatever_ring_is_waited_for() {
        let signalled = Arc::new(Signalled::default());
        let make = || {
            let theirs = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
            let ours = File::from(theirs.try_clone().unwrap());
            let event = Arc::new(Event::new(ours).unwrap());
            signalled.add(&event);
            (event, theirs)
        };
        let (blocked, theirs) = make();
        let (gone, _theirs) = make();
        drop(gone);
        let _other = make();
        let full = u64::MAX - 1;
        rustix::io::write(&theirs, &full.to_ne_bytes()).unwrap();
        rustix::fs::fcntl_setfl(&theirs, OFlags::empty()).unwrap();
        let thread = thread::spawn(move || blocked.signal());
        while !thread.is_finished() {
            signalled.unblock();
        }
        thread.join().unwrap();
    }
}
