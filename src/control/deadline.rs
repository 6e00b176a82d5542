//! The end of the program comes in time, whatever keeps it from ending well.
//!
//! A disk that has stopped answering holds up who waits for it for ever, and closing the
//! image waits for everything. Whoever has asked the program to end expects that it does:
//! to start it again elsewhere, or to let the machine go down.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::low_level;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::signals::Signals;
use crate::threads::{self, Role};

/// From the signal to the end, at most.
const TIME_TO_END: Duration = Duration::from_secs(5);

/// Of it, what is left to the last lines of the log.
const TIME_FOR_LAST_LINES: Duration = Duration::from_millis(1200);

/// Exit status when the image could not be closed.
pub const NOT_CLOSED: u8 = 1;

/// From now on the program has [`TIME_TO_END`]. If that passes it ends as by a power cut, with
/// this status.
pub fn set(status: u8) {
    warn(threads::start(Role::Deadline, "deadline", move || count_down(status)).map(drop));
}

fn count_down(status: u8) {
    thread::sleep(TIME_TO_END - TIME_FOR_LAST_LINES);
    log::error!(
        "the disk does not answer: the program ends and leaves the image as it is; it \
         will be checked when it is next opened"
    );
    log::logger().flush();
    low_level::exit(status.into());
}

fn warn(set: io::Result<()>) {
    if let Err(error) = set {
        log::warn!("shutting down may take as long as the disk takes: {error}");
    }
}

/// As long as it is there, a signal starts the countdown of [`set`] although the main
/// loop does not look.
#[must_use]
pub struct Watch(Option<Arc<EventFd>>);

/// See [`Watch`].
pub fn watch(signals: &Signals) -> Watch {
    let over = start_watch(signals.as_raw_fd());
    warn(over.as_ref().map(drop).map_err(|error| error.kind().into()));
    Watch(over.ok())
}

fn start_watch(signals: i32) -> io::Result<Arc<EventFd>> {
    let over = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
    threads::start(Role::Deadline, "deadline", {
        let over = Arc::clone(&over);
        move || {
            // SAFETY: signals are caught until the program ends.
            let signals = unsafe { BorrowedFd::borrow_raw(signals) };
            // SAFETY: this thread has the event.
            let ended = unsafe { BorrowedFd::borrow_raw(over.as_raw_fd()) };
            let watched = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
            let mut fds = [watched(signals), watched(ended)];
            while poll(&mut fds, None).is_err() {}
            if fds[1].revents().is_empty() {
                count_down(NOT_CLOSED);
            }
        }
    })?;
    Ok(over)
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(over) = &self.0 {
            // It can only fail when the descriptor is readable anyway.
            let _ = over.write(1);
        }
    }
}

/// Ends the program if it is not lifted in time: another one waits, and goes on then.
pub struct Limit {
    lift: Sender<()>,
    /// By the first of the two that may: the end of the time and [`Self::lift`].
    is_decided: Arc<AtomicBool>,
}

impl Limit {
    /// From now on.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(time: Duration) -> io::Result<Self> {
        Self::start_with(time, move || {
            log::error!("the image cannot be served within {} s", time.as_secs());
            log::logger().flush();
            low_level::exit(NOT_CLOSED.into());
        })
    }

    fn start_with(time: Duration, end: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (lift, lifted) = channel();
        let is_decided = Arc::new(AtomicBool::new(false));
        let decided = Arc::clone(&is_decided);
        threads::start(Role::Deadline, "deadline", move || {
            let is_late = lifted.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
            if is_late && !decided.swap(true, Ordering::AcqRel) {
                end();
            }
        })?;
        Ok(Self { lift, is_decided })
    }

    /// It is done. `false` if it is too late: the process ends.
    #[must_use]
    pub fn lift(self) -> bool {
        let is_in_time = !self.is_decided.swap(true, Ordering::AcqRel);
        let _ = self.lift.send(());
        is_in_time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a limit that is lifted after some time: whether it was, and whether it has ended
    /// the program.
    fn outcome(limit: Duration, lifted: Duration) -> (bool, bool) {
        let (tell, told) = channel();
        let limit = Limit::start_with(limit, move || tell.send(()).unwrap()).unwrap();
        thread::sleep(lifted);
        let is_lifted = limit.lift();
        // Until the thread has gone, and its end of the channel with it.
        (is_lifted, told.recv().is_ok())
    }

    #[test]
    fn a_limit_is_lifted_or_ends_the_program_and_never_both() {
        let moment = Duration::from_millis(20);
        assert_eq!(outcome(3000 * moment, Duration::ZERO), (true, false));
        assert_eq!(outcome(moment, 5 * moment), (false, true));
        // At nearly the same time.
        let mut lifted = 0;
        for round in 0..2000 {
            let time = Duration::from_micros(round % 200);
            let (is_lifted, has_ended) = outcome(time, 2 * moment / 200);
            assert_ne!(is_lifted, has_ended);
            lifted += usize::from(is_lifted);
        }
        eprintln!("{lifted} of 2000 were lifted");
    }
}
