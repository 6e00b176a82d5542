//! Ranges of files that share their data (`FICLONERANGE`).
//!
//! io_uring has no such operation, and the call may wait for the journal of the
//! file system. So a ring has a thread for it, started with the first clone, and
//! learns of the end of each by polling a descriptor.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::file::SharedFile;
use super::{FileList, errno};
use crate::storage::Op;
use crate::threads::{self, Role};

/// What to clone, and where to.
#[derive(Debug)]
pub(super) struct CloneRange {
    from: Arc<SharedFile>,
    from_offset: u64,
    to: Arc<SharedFile>,
    to_offset: u64,
    len: u64,
}

impl CloneRange {
    /// `None` if the operation is another one.
    pub(super) fn of(op: &Op, files: &FileList) -> Option<Self> {
        let Op::Clone {
            from,
            from_offset,
            file,
            offset,
            len,
        } = *op
        else {
            return None;
        };
        Some(Self {
            from: files.get(from)?.clone(),
            from_offset,
            to: files.get(file)?.clone(),
            to_offset: offset,
            len,
        })
    }

    /// Does it. Whatever says that these files or ranges cannot be cloned is
    /// `EOPNOTSUPP`, and the file is remembered not to be able to.
    pub(super) fn run(&self) -> Result<(), Errno> {
        let is_usable =
            || self.to.is_usable() && self.from.is_usable_up_to(self.from_offset + self.len);
        while !is_usable() {
            match self.to.why_unusable().or(self.from.why_unusable()) {
                Some(error) => return Err(error),
                None => self.to.require_lease().map_err(errno)?,
            }
        }
        if !self.to.can_clone() {
            return Err(Errno::OPNOTSUPP);
        }
        let range = libc::file_clone_range {
            src_fd: i64::from(self.from.raw_fd()),
            src_offset: self.from_offset,
            src_length: self.len,
            dest_offset: self.to_offset,
        };
        // SAFETY: both descriptors are open as long as the files, and the
        // structure outlives the call, which only reads it.
        let result = unsafe { libc::ioctl(self.to.raw_fd(), libc::FICLONERANGE, &raw const range) };
        if result == 0 {
            return Ok(());
        }
        match errno(io::Error::last_os_error()) {
            error @ (Errno::OPNOTSUPP
            | Errno::NOTTY
            | Errno::NOSYS
            | Errno::XDEV
            | Errno::INVAL
            | Errno::PERM
            | Errno::TXTBSY) => {
                self.to.cannot_clone(error);
                Err(Errno::OPNOTSUPP)
            }
            error => Err(error),
        }
    }
}

/// A clone on its way.
#[derive(Debug)]
pub(super) struct Cloning {
    /// Polls readable when it is over.
    over: OwnedFd,
    /// 0, or the negative error number.
    result: AtomicI32,
}

impl Cloning {
    fn end(&self, result: Result<(), Errno>) {
        let result = result.map_or_else(|error| -error.raw_os_error(), |()| 0);
        self.result.store(result, Ordering::Release);
        // Cannot fail: the counter was 0.
        let _ = rustix::io::write(&self.over, &1_u64.to_ne_bytes());
    }

    /// How it went. Blocks until it is over, as it is once the descriptor has
    /// become readable.
    pub(super) fn wait(&self) -> Result<(), Errno> {
        let mut over = [PollFd::new(&self.over, PollFlags::IN)];
        while poll(&mut over, None) == Err(Errno::INTR) {}
        match self.result.load(Ordering::Acquire) {
            0 => Ok(()),
            error => Err(Errno::from_raw_os_error(-error)),
        }
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.over.as_raw_fd()
    }
}

/// A thread that clones. Dropping it waits until all is done.
#[derive(Debug)]
pub(super) struct Cloner {
    work: Option<mpsc::Sender<(CloneRange, Arc<Cloning>)>>,
    thread: Option<JoinHandle<()>>,
}

impl Cloner {
    /// # Errors
    /// When there can be no more threads.
    pub(super) fn start() -> io::Result<Self> {
        let (work, inbox) = mpsc::channel::<(CloneRange, Arc<Cloning>)>();
        let thread = threads::start(Role::Clone, "clone", move || {
            for (range, cloning) in inbox {
                cloning.end(range.run());
            }
        })?;
        Ok(Self {
            work: Some(work),
            thread: Some(thread),
        })
    }

    /// # Errors
    /// Those of `eventfd(2)`.
    pub(super) fn begin(&self, range: CloneRange) -> io::Result<Arc<Cloning>> {
        let cloning = Arc::new(Cloning {
            over: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            result: AtomicI32::new(0),
        });
        let sender = self.work.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let sent = sender.send((range, cloning.clone()));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(cloning)
    }
}

impl Drop for Cloner {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
