//! What has happened to a disk that somebody outside should hear of.
//!
//! Any floor may post a notice, from any thread; who tells the world takes them when a
//! descriptor gets readable. A notice is for what is rare: posting takes a lock, and a
//! system call. There is no room for a flood: failed requests, which a guest can provoke,
//! are told of once a second, and what nobody takes is dropped.
//!
//! Knows nothing of who posts and who listens.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

/// Most notices that wait.
const MAX_WAITING: usize = 64;

/// Failed requests are told of that often at most.
const ERROR_INTERVAL: Duration = Duration::from_secs(1);

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The host file system is full. Whether writes that need space wait, or fail.
    HostFull {
        /// They wait.
        waits: bool,
    },
    /// The host file system has space again.
    HostHasSpace,
    /// The lock on a file of the image is lost, and nothing is read or written any more.
    LockLost {
        /// Of the file.
        path: PathBuf,
        /// How that is known.
        why: String,
        /// Whether requests wait. Else they fail.
        waits: bool,
    },
    /// After such a loss: the image can be opened anew, by its path.
    StorageBack {
        /// Of the file whose lock is lost, or of the image.
        path: PathBuf,
    },
    /// A request has failed.
    IoError(IoError),
    /// The file of the top is used behind a place that was named for that.
    WriteThreshold {
        /// That place, in bytes from the start of the file.
        threshold: u64,
        /// How many bytes behind it.
        exceeded_by: u64,
    },
    /// A file of the image cannot be reached any more by its path, or not all of it.
    ImageVanished {
        /// That path.
        path: PathBuf,
        /// What has become of the file, in one word.
        how: &'static str,
    },
}

/// How a request has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoError {
    /// A read; else it was to change or to flush something.
    pub is_read: bool,
    /// For want of space on the host.
    pub no_space: bool,
    /// For people.
    pub reason: String,
}

/// See the module's text.
#[derive(Debug)]
pub struct Notices {
    event: OwnedFd,
    waiting: Mutex<VecDeque<Notice>>,
    start: Instant,
    /// When a failed request may be told of again, in ms since the start.
    next_error_ms: AtomicU64,
}

impl Notices {
    /// None yet.
    ///
    /// # Errors
    /// Any of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            waiting: Mutex::default(),
            start: Instant::now(),
            next_error_ms: AtomicU64::new(0),
        })
    }

    /// Tells of it.
    pub fn post(&self, notice: Notice) {
        let mut waiting = self.waiting();
        if waiting.len() < MAX_WAITING {
            waiting.push_back(notice);
        }
        drop(waiting);
        // It can only fail when the descriptor is readable anyway.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Tells of a failed request, unless that was done a moment ago. Then it costs a
    /// look at the clock and a load.
    pub fn post_error(&self, error: impl FnOnce() -> IoError) {
        if self.admits_error(self.start.elapsed()) {
            self.post(Notice::IoError(error()));
        }
    }

    fn admits_error(&self, now: Duration) -> bool {
        let now_ms = now.as_millis() as u64;
        let next_ms = self.next_error_ms.load(Ordering::Relaxed);
        let then_ms = now_ms + ERROR_INTERVAL.as_millis() as u64;
        // Of several at the same moment, one.
        now_ms >= next_ms
            && self
                .next_error_ms
                .compare_exchange(next_ms, then_ms, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// All that wait, the oldest first.
    pub fn take(&self) -> Vec<Notice> {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        self.waiting().drain(..).collect()
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Notice>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable while there is something to take.
impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn is_readable(notices: &Notices) -> bool {
        let mut fds = [PollFd::new(&notices.event, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())) == Ok(1)
    }

    #[test]
    fn notices_come_in_order_and_a_flood_is_cut() {
        let notices = Notices::new().unwrap();
        assert!(!is_readable(&notices));
        notices.post(Notice::HostFull { waits: true });
        notices.post(Notice::HostHasSpace);
        assert!(is_readable(&notices));
        let expected = [Notice::HostFull { waits: true }, Notice::HostHasSpace];
        assert_eq!(notices.take(), expected);
        assert!(!is_readable(&notices));
        assert_eq!(notices.take(), []);
        for _ in 0..1_000 {
            notices.post(Notice::HostHasSpace);
        }
        assert_eq!(notices.take().len(), MAX_WAITING);
    }

    #[test]
    fn failed_requests_are_told_of_once_a_second() {
        let notices = Notices::new().unwrap();
        let start = Duration::from_secs(5);
        assert!(notices.admits_error(start));
        assert!(!notices.admits_error(start + ERROR_INTERVAL / 2));
        assert!(notices.admits_error(start + ERROR_INTERVAL));
        assert!(!notices.admits_error(start + ERROR_INTERVAL));
    }
}
