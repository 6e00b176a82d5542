//! I/O by plain system calls, one after the other, on the caller's thread.
//!
//! The right way for files that lie in memory, and the only one on kernels
//! without io_uring.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::Files;
use super::clone::CloneRange;
use super::file::Description;
use super::job::{Job, Memory, Step, Verdict};
use super::pieces::Pieces;
use crate::storage::{Completion, Op, Segment};

/// One thread's access by plain system calls.
#[derive(Debug)]
pub struct Psync {
    files: Files,
    pieces: Pieces,
    /// First those that are done, then those that were queued since.
    completions: Vec<Completion>,
    done: usize,
    depth: usize,
}

impl Psync {
    pub(super) fn new(files: Files, pieces: Pieces, depth: u32) -> Self {
        Self {
            files,
            pieces,
            completions: Vec::new(),
            done: 0,
            depth: depth.max(1) as usize,
        }
    }

    pub(super) fn queue(&mut self, tag: u64, op: Op) -> Result<(), Op> {
        if self.completions.len() >= self.depth {
            return Err(op);
        }
        self.completions.push(Completion {
            tag,
            result: Ok(()),
            op,
        });
        Ok(())
    }

    pub(super) fn submit(&mut self) {
        for completion in &mut self.completions[self.done..] {
            if let Some(range) = CloneRange::of(&completion.op, &self.files.shared) {
                completion.result = range.run();
                continue;
            }
            // Any operation without memory does as a stand-in.
            let stand_in = Op::Sync {
                file: completion.op.file(),
            };
            let mut job = Job::new(std::mem::replace(&mut completion.op, stand_in));
            completion.result = match self.files.get(job.file()) {
                Ok(file) => perform(&mut job, file, &mut self.pieces),
                Err(error) => Err(error),
            };
            completion.op = job.into_op();
        }
        self.done = self.completions.len();
    }

    pub(super) fn reap(&mut self, done: &mut Vec<Completion>) {
        done.extend(self.completions.drain(..self.done));
        self.done = 0;
    }

    pub(super) fn in_flight(&self) -> usize {
        self.completions.len()
    }

    /// Which files are open, base first.
    #[cfg(test)]
    pub(super) fn opened(&self) -> Vec<bool> {
        self.files.open.iter().map(Option::is_some).collect()
    }
}

/// Does an operation and gives it back.
pub(super) fn run(op: Op, file: &mut Description) -> Result<Op, Errno> {
    let mut job = Job::new(op);
    // Rare, and of the file's owner, so it has a piece for itself.
    perform(&mut job, file, &mut Pieces::new(Arc::default()))?;
    Ok(job.into_op())
}

fn perform(job: &mut Job, file: &mut Description, pieces: &mut Pieces) -> Result<(), Errno> {
    let result = take_steps(job, file, pieces);
    if let Some(piece) = job.take_piece() {
        pieces.give(piece);
    }
    result
}

fn take_steps(job: &mut Job, file: &mut Description, pieces: &mut Pieces) -> Result<(), Errno> {
    loop {
        let result = match job.step(file, pieces) {
            Step::Nothing(end) => return end,
            // Not reached: it is the only one, and the thread has a piece of its own.
            Step::Wait => return Err(Errno::AGAIN),
            Step::Undecided { decided } => {
                wait_for(decided);
                continue;
            }
            step => call(&step, file),
        };
        match job.ended(result, file) {
            Verdict::Again => {}
            Verdict::Done(end) => return end,
            Verdict::Doubted { error, decided } => {
                wait_for(decided);
                return Err(error);
            }
        }
        if job.may_block() {
            std::thread::yield_now();
        }
    }
}

/// Blocks until a descriptor is readable, or a signal comes.
#[cold]
fn wait_for(fd: RawFd) {
    // SAFETY: it is that of the lease of the caller's file, which outlives this call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    // Whatever has ended it, it is looked at again.
    let _ = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None);
}

/// One system call; its result, or the negative error number.
pub(super) fn call(step: &Step, file: &Description) -> i32 {
    let fd = file.as_fd().as_raw_fd();
    let result = match *step {
        Step::Read { offset, memory } => read(fd, memory, offset as i64),
        Step::Write {
            offset,
            memory,
            dsync,
        } => write(fd, memory, offset as i64, dsync),
        Step::Fallocate { what, offset, len } => {
            // SAFETY: no memory is passed.
            unsafe { libc::fallocate(fd, what.mode(), offset as i64, len as i64) as isize }
        }
        // SAFETY: no memory is passed.
        Step::Sync { fd, whole: false } => unsafe { libc::fdatasync(fd) as isize },
        // SAFETY: no memory is passed.
        Step::Sync { fd, whole: true } => unsafe { libc::fsync(fd) as isize },
        Step::Wait | Step::Undecided { .. } | Step::Nothing(_) => 0,
    };
    match result {
        -1 => -io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO),
        // A transfer is of at most 31 bits.
        _ => result as i32,
    }
}

fn read(fd: RawFd, memory: Memory, offset: i64) -> isize {
    match memory {
        // SAFETY: the job vouches for the memory until it is told how this ended.
        Memory::One { ptr, len } => unsafe { libc::pread(fd, ptr.cast(), len as usize, offset) },
        // SAFETY: the same, and a segment is laid out like an iovec.
        Memory::Many { list, count } => unsafe {
            libc::preadv(fd, list.cast(), count as i32, offset)
        },
    }
}

fn write(fd: RawFd, memory: Memory, offset: i64, dsync: bool) -> isize {
    let flags = if dsync { libc::RWF_DSYNC } else { 0 };
    match memory {
        // SAFETY: the job vouches for the memory until it is told how this ended.
        Memory::One { ptr, len } if !dsync => unsafe {
            libc::pwrite(fd, ptr.cast(), len as usize, offset)
        },
        Memory::One { ptr, len } => {
            let segment = Segment::new(ptr, len as usize);
            // SAFETY: the same, and a segment is laid out like an iovec.
            unsafe { libc::pwritev2(fd, (&raw const segment).cast(), 1, offset, flags) }
        }
        // SAFETY: the same.
        Memory::Many { list, count } => unsafe {
            libc::pwritev2(fd, list.cast(), count as i32, offset, flags)
        },
    }
}
