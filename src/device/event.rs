//! Eventfds that a front-end has given us.
//!
//! The front-end keeps a descriptor of the same event and of its flags: it can fill
//! the counter, empty it, and make reads and writes block. None of that may stop
//! the thread that uses it here for good.
//!
//! A read never blocks, by `RWF_NOWAIT`. For writes there is no such thing: eventfds refuse
//! the flag, and cannot be opened again for a description of our own. So a write can block
//! if the front-end makes it do so after its event has come here, with its counter full.
//! That stops the one queue, and who waits for it, until somebody unblocks it: see
//! [`super::signalled`].

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use thiserror::Error;

/// What the kernel calls an eventfd.
const EVENT_LINK: &str = "anon_inode:[eventfd]";

/// A descriptor that is no [`Event`].
#[derive(Debug, Error)]
pub(super) enum EventError {
    #[error("the event descriptor is {0}, not an eventfd")]
    OtherKind(String),
    #[error("cannot tell what the event descriptor is: {0}")]
    Unknown(io::Error),
}

/// An eventfd.
#[derive(Debug)]
pub(super) struct Event {
    fd: OwnedFd,
    /// Whether a write could block when the descriptor came.
    may_block: bool,
}

impl Event {
    /// Anything else than an eventfd would be written to, or could block us.
    pub fn new(file: File) -> Result<Self, EventError> {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let target = std::fs::read_link(link).map_err(EventError::Unknown)?;
        if target.as_os_str() != EVENT_LINK {
            return Err(EventError::OtherKind(format!(
                "{:?}",
                target.display().to_string()
            )));
        }
        // All front-ends of note make it non-blocking. The flag is that of their
        // descriptor as well, so it is not ours to set.
        let flags =
            rustix::fs::fcntl_getfl(&file).map_err(|errno| EventError::Unknown(errno.into()))?;
        Ok(Self {
            fd: file.into(),
            may_block: !flags.contains(OFlags::NONBLOCK),
        })
    }

    /// Lets a write of another thread end that the counter's being full blocks. The driver
    /// misses nothing: that write is a signal.
    pub fn unblock(&self) {
        if !self.is_ready(PollFlags::OUT) {
            self.clear();
        }
    }

    /// Sets the counter to zero. Never fails and never blocks: somebody else may
    /// have read the event first, as QEMU does when it stops a disk.
    pub fn clear(&self) {
        // An old kernel refuses. Left unread, it would be reported for ever.
        if self.read_now() == Err(Errno::OPNOTSUPP) && self.is_ready(PollFlags::IN) {
            let _ = rustix::io::read(&self.fd, &mut [0; 8]);
        }
    }

    /// Adds one to the counter. Where it is full, the driver has not heard of earlier
    /// signals yet, and needs no more.
    pub fn signal(&self) {
        if self.may_block && !self.is_ready(PollFlags::OUT) {
            return;
        }
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
    }

    fn read_now(&self) -> Result<(), Errno> {
        /// Reads at the file's own position: events have no other.
        const NO_OFFSET: u64 = u64::MAX;
        let mut counter = [0; 8];
        let mut buffers = [IoSliceMut::new(&mut counter)];
        preadv2(&self.fd, &mut buffers, NO_OFFSET, ReadWriteFlags::NOWAIT).map(drop)
    }

    fn is_ready(&self, how: PollFlags) -> bool {
        let now = Timespec::default();
        poll(&mut [PollFd::new(&self.fd, how)], Some(&now)) == Ok(1)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::sync::Arc;
    use std::time::Duration;

    fn event(count: u32, flags: EventfdFlags) -> (Event, OwnedFd) {
        let theirs = eventfd(count, flags).unwrap();
        let ours = Event::new(File::from(theirs.try_clone().unwrap())).unwrap();
        (ours, theirs)
    }

    #[test]
    fn clearing_what_somebody_else_has_read_neither_blocks_nor_fails() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let (event, theirs) = event(3, flags);
            event.clear();
            assert!(!event.is_ready(PollFlags::IN));
            event.clear();
            rustix::io::write(&theirs, &1_u64.to_ne_bytes()).unwrap();
            assert!(event.is_ready(PollFlags::IN));
        }
    }

    #[test]
    fn a_signal_that_cannot_be_delivered_does_not_block() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let (event, theirs) = event(0, flags);
            let read = || {
                let mut counter = [0; 8];
                rustix::io::read(&theirs, &mut counter).unwrap();
                u64::from_ne_bytes(counter)
            };
            event.signal();
            let full = u64::MAX - 2;
            rustix::io::write(&theirs, &full.to_ne_bytes()).unwrap();
            event.signal();
            assert_eq!(read(), u64::MAX - 1);
            event.signal();
            assert_eq!(read(), 1);
        }
    }

    #[test]
    fn a_write_that_blocks_can_be_ended() {
        let (event, theirs) = event(0, EventfdFlags::NONBLOCK);
        let event = Arc::new(event);
        let full = u64::MAX - 1;
        rustix::io::write(&theirs, &full.to_ne_bytes()).unwrap();
        rustix::fs::fcntl_setfl(&theirs, OFlags::empty()).unwrap();
        let signalling = std::thread::spawn({
            let event = Arc::clone(&event);
            move || event.signal()
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!signalling.is_finished(), "it does not block");
        event.unblock();
        signalling.join().unwrap();
        assert!(event.is_ready(PollFlags::IN), "the driver is told");
        // One that blocks nobody keeps what it has.
        event.unblock();
        assert!(event.is_ready(PollFlags::IN));
    }

    #[test]
    fn only_eventfds_are_events() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        let others: [OwnedFd; 4] = [
            tempfile::tempfile().unwrap().into(),
            File::open("/dev/zero").unwrap().into(),
            socket.into(),
            pipe.into(),
        ];
        for other in others {
            let error = Event::new(File::from(other)).unwrap_err();
            assert!(matches!(error, EventError::OtherKind(_)), "{error}");
        }
    }
}
