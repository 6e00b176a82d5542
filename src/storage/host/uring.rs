//! I/O by io_uring: one ring for one thread.
//!
//! Each operation in flight has a slot, which owns it, and at most one entry in
//! the ring at a time; the rings have room for all slots, so that neither can
//! overflow. An operation stays where it is in memory from the moment that it is
//! queued until it is given out again: the kernel has pointers to it.
//!
//! Completions are processed when the thread enters the kernel next, and its
//! poller is woken for it (`IORING_SETUP_COOP_TASKRUN`). Deferring them until the
//! thread asks (`IORING_SETUP_DEFER_TASKRUN`) would need an eventfd, since work
//! that is deferred wakes nobody who polls the ring; with that it costs as much as
//! it saves, and a ring could not pass from one thread to another.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::thread;
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, opcode, squeue, types};
use rustix::io::Errno;

use super::clone::{CloneRange, Cloner, Cloning};
use super::file::Description;
use super::job::{Job, Memory, Step, Verdict};
use super::pieces::Pieces;
use super::rings::{self, Generation};
use super::{Files, errno, psync};
use crate::storage::{Completion, Op};

/// The most operations that one thread can have in flight: what the kernel
/// allows as entries of a ring.
const MAX_DEPTH: u32 = 32 << 10;
/// How often a submission is tried that the kernel has no memory for, and the
/// pause between: a second in all.
const SUBMIT_TRIES: u32 = 10_000;
const SUBMIT_PAUSE: Duration = Duration::from_micros(100);

/// One thread's access through a ring.
pub struct Uring {
    pub(super) ring: IoUring,
    files: Files,
    /// How many files there is room for in its table. Behind them is the description with
    /// the locks.
    room: u32,
    /// The file whose locks these are.
    locked: usize,
    /// Grows as needed up to its capacity, and never moves.
    slots: Vec<Option<Task>>,
    /// Slots that are free, the one used last on top.
    free: Vec<u32>,
    /// Slots with an entry in the ring that the kernel has not taken, in order.
    staged: Vec<u32>,
    /// Memory for transfers that cannot be made from where they are.
    pieces: Pieces,
    /// Slots that wait for a piece, in order. While there are any, others have some.
    waiting: VecDeque<u32>,
    /// Slots that ended without the kernel, because the ring is broken.
    failed: Vec<u32>,
    /// Entries that the kernel has taken and not completed.
    in_kernel: usize,
    /// Does what the ring cannot do. Started when it is needed.
    cloner: Option<Cloner>,
    /// What the ring failed with, if it is of no use any more.
    broken: Option<Errno>,
    /// System calls made, for tests of how few they are.
    #[cfg(test)]
    pub(super) calls: usize,
}

/// An operation in its slot.
#[derive(Debug)]
struct Task {
    tag: u64,
    job: Job,
    /// How it ends, if that was clear before the kernel was asked. It then goes
    /// through the ring as a no-op, so that its end wakes the poller too. Or what is to be
    /// done when the entry under way, which only waits, has ended.
    decided: Option<Verdict>,
    /// If it is done beside the ring, which only waits for its end.
    cloning: Option<Arc<Cloning>>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("in_flight", &self.in_flight())
            .field("in_kernel", &self.in_kernel)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

/// How many files a ring has room for: of the longest chain.
pub(super) const FILES_MAX: u32 = 127;

impl Uring {
    /// `depth` is in operations. The ring is of the newest of `generations` that
    /// the kernel can make.
    pub(super) fn new(
        files: Files,
        pieces: Pieces,
        depth: u32,
        generations: &'static [Generation],
    ) -> io::Result<Self> {
        let depth = depth.clamp(1, MAX_DEPTH);
        let (ring, room) = make(depth, &files, generations)?;
        Ok(Self {
            ring,
            room,
            locked: files.open.len() - 1,
            files,
            pieces,
            waiting: VecDeque::new(),
            slots: Vec::with_capacity(depth as usize),
            free: Vec::new(),
            staged: Vec::with_capacity(depth as usize),
            failed: Vec::new(),
            in_kernel: 0,
            cloner: None,
            broken: None,
            #[cfg(test)]
            calls: 0,
        })
    }

    pub(super) fn queue(&mut self, tag: u64, op: Op) -> Result<(), Op> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < self.slots.capacity() => {
                self.slots.push(None);
                (self.slots.len() - 1) as u32
            }
            None => return Err(op),
        };
        self.slots[index as usize] = Some(Task {
            tag,
            job: Job::new(op),
            decided: None,
            cloning: None,
        });
        self.stage(index);
        Ok(())
    }

    pub(super) fn submit(&mut self) {
        let mut tries = 0;
        while !self.staged.is_empty() {
            match self.enter(self.staged.len(), 0, EnterFlags::empty()) {
                Ok(0) | Err(Errno::AGAIN | Errno::BUSY) if tries < SUBMIT_TRIES => {
                    tries += 1;
                    thread::sleep(SUBMIT_PAUSE);
                }
                Ok(0) => self.give_up(Errno::AGAIN),
                Ok(taken) => {
                    self.in_kernel += taken;
                    self.staged.drain(..taken);
                }
                Err(Errno::INTR) => {}
                Err(error) => self.give_up(error),
            }
        }
    }

    pub(super) fn reap(&mut self, done: &mut Vec<Completion>) {
        while let Some(index) = self.failed.pop() {
            let error = self.broken.unwrap_or(Errno::IO);
            self.give_out(index, Err(error), done);
        }
        if self.in_kernel == 0 {
            return;
        }
        self.run_pending_work();
        while let Some(entry) = self.next_completion() {
            let index = entry.user_data() as u32;
            match self.verdict(index, entry.result()) {
                Verdict::Done(result) => self.give_out(index, result, done),
                Verdict::Again => self.stage(index),
                Verdict::Doubted { error, decided } => self.wait_to_end(index, error, decided),
            }
        }
        // Parts of short transfers: nobody else knows that they wait.
        if !self.staged.is_empty() {
            self.submit();
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn completion_fd(&self) -> Option<RawFd> {
        // What a broken ring has failed does not show there.
        self.broken.is_none().then(|| self.ring.as_raw_fd())
    }

    /// Which files are open, base first.
    #[cfg(test)]
    pub(super) fn opened(&self) -> Vec<bool> {
        self.files.open.iter().map(Option::is_some).collect()
    }

    /// Puts the next step of a task into the ring.
    fn stage(&mut self, index: u32) {
        if self.broken.is_some() {
            self.failed.push(index);
            return;
        }
        let Some(entry) = self.entry(index) else {
            return self.waiting.push_back(index);
        };
        self.push(index, entry);
    }

    /// Has a task end with an error when it is decided what that means.
    #[cold]
    fn wait_to_end(&mut self, index: u32, error: Errno, decided: RawFd) {
        if self.broken.is_some() {
            self.failed.push(index);
            return;
        }
        if let Some(task) = &mut self.slots[index as usize] {
            task.decided = Some(Verdict::Done(Err(error)));
        }
        self.push(index, readable(decided));
    }

    fn push(&mut self, index: u32, entry: squeue::Entry) {
        let entry = entry.user_data(u64::from(index));
        // SAFETY: the task owns or vouches for what the entry points to. It stays
        // in its slot, which does not move, until the kernel has completed the
        // entry; if we go first, `drop` waits for that.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => self.staged.push(index),
            // Not reached: there is room for an entry of each slot.
            Err(_) => self.failed.push(index),
        }
    }

    /// What the kernel shall do next for a task; `None` if it waits for a piece.
    fn entry(&mut self, index: u32) -> Option<squeue::Entry> {
        let Some(task) = &mut self.slots[index as usize] else {
            return Some(opcode::Nop::new().build());
        };
        if let Some(range) = CloneRange::of(task.job.op(), &self.files.shared) {
            return Some(match begin_clone(&mut self.cloner, range) {
                Ok(cloning) => {
                    let over = readable(cloning.raw_fd());
                    task.cloning = Some(cloning);
                    over
                }
                Err(_) => self.decide(index, Errno::OPNOTSUPP),
            });
        }
        let id = task.job.file();
        let mut is_new = !self.files.is_open(id);
        let step = match self.files.get(id) {
            Ok(file) => {
                let step = task.job.step(file, &mut self.pieces);
                is_new |= file.take_reopened();
                step
            }
            Err(error) => Step::Nothing(Err(error)),
        };
        let is_waiting = matches!(step, Step::Wait);
        let entry = entry_for(&step, types::Fixed(u32::from(id.0)));
        let only_waits = matches!(step, Step::Undecided { .. });
        let entry = if task.job.may_block() && !only_waits {
            entry.flags(squeue::Flags::ASYNC)
        } else {
            entry
        };
        match step {
            Step::Nothing(end) => task.decided = Some(Verdict::Done(end)),
            Step::Undecided { .. } => task.decided = Some(Verdict::Again),
            _ => {}
        }
        if is_new && let Err(error) = self.register_file(id) {
            return Some(self.decide(index, error));
        }
        (!is_waiting).then_some(entry)
    }

    /// Makes a task end with an error, by way of a no-op.
    fn decide(&mut self, index: u32, error: Errno) -> squeue::Entry {
        if let Some(task) = &mut self.slots[index as usize] {
            task.decided = Some(Verdict::Done(Err(error)));
        }
        opcode::Nop::new().build()
    }

    fn next_completion(&mut self) -> Option<io_uring::cqueue::Entry> {
        let entry = self.ring.completion().next()?;
        self.in_kernel -= 1;
        Some(entry)
    }

    /// What the end of an entry means for its task.
    fn verdict(&mut self, index: u32, result: i32) -> Verdict {
        let Some(Some(task)) = self.slots.get_mut(index as usize) else {
            return Verdict::Done(Err(Errno::IO));
        };
        if task.decided.is_some()
            && let Some(verdict) = task.decided.take()
        {
            return verdict;
        }
        if let Some(cloning) = &task.cloning {
            return Verdict::Done(cloning.wait());
        }
        match self.files.get(task.job.file()) {
            Ok(file) => match task.job.ended(result, file) {
                Verdict::Done(Err(Errno::CANCELED)) => {
                    do_here(&mut task.job, file, &mut self.pieces)
                }
                verdict => verdict,
            },
            Err(error) => Verdict::Done(Err(error)),
        }
    }

    fn give_out(&mut self, index: u32, result: Result<(), Errno>, done: &mut Vec<Completion>) {
        if let Some(mut task) = self.slots[index as usize].take() {
            self.free.push(index);
            if let Some(piece) = task.job.take_piece() {
                self.pieces.give(piece);
                if let Some(next) = self.waiting.pop_front() {
                    self.stage(next);
                }
            }
            if let Some(cloning) = &task.cloning {
                // Of a broken ring it may not be over, and who gets the operation
                // back relies on that.
                let _ = cloning.wait();
            }
            done.push(Completion {
                tag: task.tag,
                result,
                op: task.job.into_op(),
            });
        }
    }

    /// Completions that the kernel processes when this thread comes by: comes by,
    /// if there is nothing else.
    fn run_pending_work(&mut self) {
        if self.ring.completion().is_empty() && self.ring.submission().taskrun() {
            // If this fails, the flag is still there the next time.
            let _ = self.enter(0, 0, EnterFlags::GETEVENTS);
        }
    }

    fn enter(&mut self, submit: usize, wait_for: u32, flags: EnterFlags) -> Result<usize, Errno> {
        #[cfg(test)]
        {
            self.calls += 1;
        }
        let submitter = self.ring.submitter();
        // SAFETY: no argument is passed, and what the entries in the ring point
        // to is vouched for in `stage`.
        let entered = unsafe {
            submitter.enter::<libc::sigset_t>(submit as u32, wait_for, flags.bits(), None)
        };
        entered.map_err(errno)
    }

    /// The ring does not take entries any more. What it has taken goes on; all
    /// else fails from now on.
    pub(super) fn give_up(&mut self, error: Errno) {
        log::error!("io_uring no longer accepts I/O: {error}");
        self.broken = Some(error);
        self.failed.append(&mut self.staged);
        self.failed.extend(self.waiting.drain(..));
    }

    fn register_file(&mut self, id: super::FileId) -> Result<(), Errno> {
        let file = self.files.get(id)?;
        let fd = file.as_fd().as_raw_fd();
        if u32::from(id.0) >= self.room {
            return Err(Errno::MFILE);
        }
        let submitter = self.ring.submitter();
        match submitter.register_files_update(u32::from(id.0), &[fd]) {
            Ok(_) => self.keep_locks(id),
            Err(error) => {
                // The ring still has another description, or none.
                file.put_back_reopened();
                Err(errno(error))
            }
        }
    }

    /// Of a new top the locks go where those of the old one were: nothing that was written
    /// to that is in flight any more.
    fn keep_locks(&mut self, id: super::FileId) -> Result<(), Errno> {
        let index = usize::from(id.0);
        let shared = self.files.shared.get(id).filter(|_| index > self.locked);
        let Some(locks) = shared.and_then(|shared| shared.writers_lock()) else {
            return Ok(());
        };
        let fds = [locks.as_raw_fd()];
        let updated = self.ring.submitter().register_files_update(self.room, &fds);
        updated.map_err(errno)?;
        self.locked = index;
        Ok(())
    }
}

impl Drop for Uring {
    /// Closing a ring does not stop what it has started: waits for it.
    fn drop(&mut self) {
        while self.in_kernel > 0 {
            match self.enter(0, 1, EnterFlags::GETEVENTS) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => thread::sleep(SUBMIT_PAUSE),
            }
            while self.next_completion().is_some() {}
        }
    }
}

/// Takes a step by a plain system call. The kernel has given it up untouched: it would
/// have had to block, and there can be no more threads for that (`RLIMIT_NPROC`). A sync
/// that is said to have failed is never made good again, so it must not fail for this.
#[cold]
fn do_here(job: &mut Job, file: &mut Description, pieces: &mut Pieces) -> Verdict {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        log::warn!(
            "the kernel cannot start threads for I/O that blocks, most likely because of a limit \
             (RLIMIT_NPROC): using plain system calls for it, which are slower"
        );
    });
    match job.step(file, pieces) {
        Step::Nothing(end) => Verdict::Done(end),
        Step::Wait | Step::Undecided { .. } => Verdict::Again,
        step => job.ended(psync::call(&step, file), file),
    }
}

/// A ring that knows the files, and for how many it has room: for those that may come, as far
/// as the limit of descriptors (`RLIMIT_NOFILE`) lets it have that.
fn make(
    depth: u32,
    files: &Files,
    generations: &'static [Generation],
) -> io::Result<(IoUring, u32)> {
    let fewest = files.open.len() as u32;
    let room = FILES_MAX.max(fewest);
    match rings::make(depth, descriptors(files, room), generations) {
        Ok(ring) => Ok((ring, room)),
        Err(error) if error.raw_os_error() == Some(libc::EMFILE) => {
            let ring = rings::make(depth, descriptors(files, fewest), generations)?;
            files.shared.is_fixed.store(true, Ordering::Release);
            Ok((ring, fewest))
        }
        Err(error) => Err(error),
    }
}

fn begin_clone(cloner: &mut Option<Cloner>, range: CloneRange) -> io::Result<Arc<Cloning>> {
    let cloner = match cloner {
        Some(cloner) => cloner,
        None => cloner.insert(Cloner::start()?),
    };
    cloner.begin(range)
}

/// Makes the descriptions that are open known to the ring; and behind them, under a
/// number that no operation uses, the one that carries the locks of the file that is
/// written to.
///
/// When the process is killed, the kernel neither stops nor awaits writes that a ring
/// has handed to the disk. The descriptors are closed, and the locks of a description
/// would go with its last one, while such a write can still arrive, in a file that
/// somebody else has meanwhile opened, checked and changed. But a description in the
/// table of a ring lives as long as the ring does, and a ring is taken down only when
/// all its requests have ended (`io_ring_exit_work` in the kernel waits for them and
/// gives the table back afterwards). So the locks outlive every write.
///
/// Plain calls need nothing of the kind: a thread in the midst of one keeps all
/// descriptors of the process open.
///
/// There is `room` for so many files, which may be more than there are.
fn descriptors(files: &Files, room: u32) -> Vec<RawFd> {
    const NONE: RawFd = -1;
    let locks = files.shared.top().writers_lock();
    let open = files.open.iter();
    let mut fds: Vec<RawFd> = open
        .map(|file| file.as_ref().map_or(NONE, |file| file.as_fd().as_raw_fd()))
        .collect();
    fds.resize(room as usize, NONE);
    fds.push(locks.map_or(NONE, |fd| fd.as_raw_fd()));
    fds
}

fn entry_for(step: &Step, fd: types::Fixed) -> squeue::Entry {
    match *step {
        Step::Read { offset, memory } => match memory {
            Memory::One { ptr, len } => opcode::Read::new(fd, ptr, len).offset(offset).build(),
            Memory::Many { list, count } => opcode::Readv::new(fd, list.cast(), count)
                .offset(offset)
                .build(),
        },
        Step::Write {
            offset,
            memory,
            dsync,
        } => {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            match memory {
                Memory::One { ptr, len } => opcode::Write::new(fd, ptr, len)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                Memory::Many { list, count } => opcode::Writev::new(fd, list.cast(), count)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Step::Fallocate { what, offset, len } => opcode::Fallocate::new(fd, len)
            .offset(offset)
            .mode(what.mode())
            .build(),
        Step::Sync { fd, whole } => opcode::Fsync::new(types::Fd(fd))
            .flags(match whole {
                true => types::FsyncFlags::empty(),
                false => types::FsyncFlags::DATASYNC,
            })
            .build(),
        Step::Undecided { decided } => readable(decided),
        Step::Wait | Step::Nothing(_) => opcode::Nop::new().build(),
    }
}

/// Ends when a descriptor is readable.
fn readable(fd: RawFd) -> squeue::Entry {
    opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build()
}
