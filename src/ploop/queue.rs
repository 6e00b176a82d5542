//! The submitter's half of the engine: one for each virtqueue thread.
//!
//! Requests are split at cluster borders and looked up here. Reads, and writes to
//! clusters that are mapped or can be mapped on the spot, go straight to this
//! thread's own ring; the rest is dispatched to runners and comes back through
//! the inbox.

mod split;

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;
use slab::Slab;
use smallvec::SmallVec;

use self::split::Rest;
use super::EngineError;
use super::allowance::Allowance;
use super::engine::{Engine, MdMessage, WritePlan};
use super::entry::Place;
use super::epoch::{Epoch, Participant};
use super::inbox::Inbox;
use super::pio::{Home, Pio, QueueMessage, Work};
use super::preempt;
use super::request::{Command, Done, Request, SectorRange};
use super::rule::{self, Rule};
use super::stable_writes::Generation;
use crate::format::{GuestCluster, SECTOR_SIZE, Sector};
use crate::storage::{Buffer, Completion, Disk, Io, Op, Segments};

/// How often a drain looks for writes that wait for space.
const DRAIN_POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// A request under way.
struct Active {
    tag: u64,
    /// Parts that have not ended, and one more while it is being split.
    parts: usize,
    result: Result<(), EngineError>,
    changes_disk: bool,
    /// Each part is stable, mapping included.
    stable: bool,
    /// A flush that started after all of it has succeeded.
    flushed: bool,
}

impl Active {
    /// Whether, in write-through, it may not complete yet.
    fn needs_flush<D: Disk>(&self, engine: &Engine<D>) -> bool {
        !self.flushed && (!self.stable || engine.is_barrier_open())
    }
}

/// An operation on this queue's ring.
struct LocalOp {
    request: usize,
    /// What it takes of the queue's [`Allowance`].
    charge: u64,
    epoch: Epoch,
    /// Where a write goes, should it have to be tried again.
    target: Option<(GuestCluster, u32)>,
    /// Of a stable write.
    generation: Option<Generation>,
    /// It was a stable write that has failed so, and is now tried as one that is not.
    doubted: Option<Errno>,
}

/// Wakes the thread of a [`Queue`] from any other, for what is not the engine's.
#[derive(Clone)]
pub struct QueueWaker(Arc<Inbox<QueueMessage>>);

impl QueueWaker {
    /// To be called after what the thread shall see. From [`Queue::may_sleep`] on it
    /// makes one of [`Queue::fds`] readable; before, the thread looks by itself.
    pub fn wake(&self) {
        self.0.waker().wake();
    }
}

/// See the module's text.
pub struct Queue<D: Disk> {
    engine: Arc<Engine<D>>,
    io: D::Io,
    participant: Participant,
    inbox: Arc<Inbox<QueueMessage>>,
    active: Slab<Active>,
    /// What is left of requests that are not cut into parts yet.
    rests: VecDeque<Rest>,
    /// More of them may be cut at once.
    has_more_to_cut: bool,
    /// None may be cut for now.
    is_held: bool,
    allowance: Allowance,
    /// The cluster for whose copy a request was charged last.
    copied: Option<GuestCluster>,
    ops: Slab<LocalOp>,
    /// Operations that the ring had no room for.
    backlog: VecDeque<(u64, Op)>,
    /// Requests that came while the engine was suspended.
    held: VecDeque<Request>,
    /// Tags of requests that can neither be done nor fail, as the lock on the image is lost.
    stranded: Vec<u64>,
    finished: Vec<Done>,
    /// Kept for its memory.
    completions: Vec<Completion>,
}

impl<D: Disk> Queue<D> {
    pub(super) fn new(engine: Arc<Engine<D>>) -> io::Result<Self> {
        let participant = engine
            .epochs
            .join()
            .ok_or_else(|| io::Error::other("too many queues at a time"))?;
        let inbox = Arc::new(Inbox::new()?);
        engine.add_inbox(&inbox);
        Ok(Self {
            io: engine.disk.open_io(engine.options.queue_depth)?,
            participant,
            inbox,
            active: Slab::with_capacity(engine.options.queue_depth as usize),
            rests: VecDeque::new(),
            has_more_to_cut: false,
            is_held: false,
            allowance: Allowance::new(engine.allowance.clone()),
            copied: None,
            ops: Slab::with_capacity(engine.options.queue_depth as usize),
            backlog: VecDeque::new(),
            held: VecDeque::new(),
            stranded: Vec::new(),
            finished: Vec::new(),
            completions: Vec::new(),
            engine,
        })
    }

    /// Starts a request: splits it, looks it up, queues its I/O on this thread's
    /// ring or dispatches it. [`Self::submit`] starts what was queued.
    pub fn push(&mut self, request: Request) {
        let epoch = self.participant.begin_look_up();
        // Looked at inside the epoch: whoever suspends waits for it.
        let is_suspended = self.engine.is_suspended();
        preempt::point("admitted");
        if is_suspended {
            self.hold_back(request);
        } else {
            self.start(request);
        }
        self.participant.end_look_up(epoch);
    }

    /// Keeps a request until the engine takes some again.
    #[cold]
    fn hold_back(&mut self, request: Request) {
        match self.engine.reports_loss() {
            true => self.finished.push(Done {
                tag: request.tag,
                result: Err(EngineError::LockLost),
            }),
            false => self.held.push_back(request),
        }
    }

    /// Starts everything queued, with one system call.
    pub fn submit(&mut self) {
        self.io.submit();
    }

    /// Appends the requests that have ended to `done`. Never blocks. Queues more
    /// I/O where an end makes that necessary; starts it, too.
    pub fn poll(&mut self, done: &mut Vec<Done>) {
        self.inbox.waker().disarm();
        let epoch = self.participant.begin_look_up();
        self.look();
        self.participant.end_look_up(epoch);
        done.append(&mut self.finished);
    }

    /// To be called before the thread sleeps: from then on [`Self::fds`] wake it.
    /// False if [`Self::poll`] has something to do already.
    pub fn may_sleep(&mut self) -> bool {
        !self.has_ready() && self.inbox.may_sleep()
    }

    fn look(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.io.reap(&mut completions);
        for completion in completions.drain(..) {
            self.local_done(completion);
        }
        self.completions = completions;
        preempt::point("reaped");
        for message in self.inbox.take_all() {
            self.hear(message);
        }
        if !self.held.is_empty() && !self.engine.is_suspended() {
            for request in std::mem::take(&mut self.held) {
                self.start(request);
            }
        }
        if (!self.held.is_empty() || !self.rests.is_empty()) && self.engine.is_suspended() {
            self.refuse_what_waits();
        }
        self.cut_more();
        self.queue_backlog();
    }

    /// What could wait for ever fails, if the lock on the image is lost and that is reported.
    #[cold]
    fn refuse_what_waits(&mut self) {
        if !self.engine.reports_loss() {
            return;
        }
        for request in std::mem::take(&mut self.held) {
            self.hold_back(request);
        }
        self.drop_rests(true);
    }

    /// What it submits to.
    pub fn engine(&self) -> &Engine<D> {
        &self.engine
    }

    /// Whether another request would be started at once. Otherwise it waits for others
    /// of this queue, and is better left where it can still be taken from by whoever
    /// comes after: what was pushed and has not started ends undone in a drain.
    pub fn has_room(&self) -> bool {
        // A long discard does not keep transfers waiting.
        match self.rests.len() {
            0 => true,
            1 => !self.rests[0].is_transfer(),
            _ => false,
        }
    }

    /// Whether all is begun that was pushed: nothing but discards would end undone in a
    /// drain.
    pub fn is_begun(&self) -> bool {
        self.rests.iter().all(Rest::is_discard)
    }

    /// Whether nothing is begun, as the engine is suspended.
    pub fn is_suspended(&self) -> bool {
        self.engine.is_suspended()
    }

    /// Whether for now no more parts are begun of requests that were pushed before.
    pub fn hold(&mut self, is_held: bool) {
        if std::mem::replace(&mut self.is_held, is_held) && !is_held {
            self.has_more_to_cut = !self.rests.is_empty();
        }
    }

    /// Requests pushed and not yet given out by [`Self::poll`].
    pub fn in_flight(&self) -> usize {
        self.active.len() + self.held.len() + self.stranded.len() + self.finished.len()
    }

    /// Requests that came while the engine was suspended: nothing is in flight
    /// for them.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Descriptors that poll readable (level-triggered) while [`Self::poll`] has
    /// something to do, from [`Self::may_sleep`] on.
    pub fn fds(&self) -> SmallVec<[RawFd; 2]> {
        let inbox = self.inbox.waker().as_raw_fd();
        self.io.completion_fd().into_iter().chain([inbox]).collect()
    }

    /// To wake the thread that sleeps on [`Self::fds`].
    pub fn waker(&self) -> QueueWaker {
        QueueWaker(self.inbox.clone())
    }

    /// Whether [`Self::poll`] has something to do that no descriptor tells of.
    pub fn has_ready(&self) -> bool {
        !self.finished.is_empty()
            || self.has_more_to_cut
            || (self.io.completion_fd().is_none() && self.io.in_flight() > 0)
    }

    /// Whether nothing has woken the thread since its last look.
    #[cfg(all(test, not(ploop_loom)))]
    pub(crate) fn is_asleep(&self) -> bool {
        self.inbox.waker().is_armed()
    }

    /// Requests that wait for space on the host get one more try and then fail:
    /// for a ring that stops, as its guest waits for the end of the drain.
    pub fn give_up_parked(&mut self) {
        self.engine.md.post(MdMessage::GiveUp {
            inbox: self.inbox.clone(),
        });
    }

    /// Waits until every request has ended. Parked ones fail. What has not been started is not
    /// started any more, and its requests end with [`EngineError::Undone`]: zeroing, which
    /// others may have been pushed behind, after `grace`, the rest at once, and all at once
    /// that a suspended engine holds.
    pub fn drain(&mut self, done: &mut Vec<Done>, grace: Duration) {
        let start = Instant::now();
        // Before anything of it is begun.
        self.drop_rests(self.engine.is_suspended());
        self.submit();
        self.poll(done);
        for request in std::mem::take(&mut self.held) {
            done.push(Done {
                tag: request.tag,
                result: Err(EngineError::Undone),
            });
        }
        self.give_up_stranded(done);
        while self.in_flight() > 0 {
            let is_over = self.engine.is_suspended() || start.elapsed() >= grace;
            self.drop_rests(is_over);
            self.wait_for_an_end();
            self.poll(done);
            self.give_up_stranded(done);
        }
    }

    /// They can be done again, elsewhere.
    fn give_up_stranded(&mut self, done: &mut Vec<Done>) {
        done.extend(self.stranded.drain(..).map(|tag| Done {
            tag,
            result: Err(EngineError::Undone),
        }));
    }

    /// Blocks until [`Self::poll`] may have something to do, though not for long. What is
    /// parked fails.
    pub fn wait_for_an_end(&mut self) {
        if !self.has_ready() {
            // Again and again: a write may find only now that there is no space.
            self.give_up_parked();
            self.wait(DRAIN_POLL);
        }
    }

    /// Blocks until [`Self::poll`] may have something to do, or the time is over.
    fn wait(&mut self, at_most: Timespec) {
        use rustix::event::{PollFd, PollFlags, poll};
        use std::os::fd::BorrowedFd;
        if !self.may_sleep() {
            return;
        }
        let raw = self.fds();
        let mut fds: SmallVec<[PollFd<'_>; 2]> = raw
            .iter()
            .map(|&fd| {
                // SAFETY: the descriptors belong to `self.io` and `self.inbox`,
                // which live as long as `self` is borrowed.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                PollFd::from_borrowed_fd(fd, PollFlags::IN)
            })
            .collect();
        let _ = poll(&mut fds, Some(&at_most));
    }

    fn start(&mut self, request: Request) {
        let key = self.active.insert(Active {
            tag: request.tag,
            parts: 1,
            result: Ok(()),
            changes_disk: !matches!(request.command, Command::Read { .. } | Command::Flush),
            stable: true,
            flushed: false,
        });
        match self.check(&request.command) {
            Ok(()) => match Rest::all(key, request.command) {
                Some(rest) => return self.cut(rest),
                None => self.flush(key),
            },
            Err(error) => self.active[key].result = Err(error),
        }
        self.part_done(key);
    }

    fn check(&self, command: &Command) -> Result<(), EngineError> {
        let changes = |result: Result<(), EngineError>| {
            if self.engine.is_read_only() {
                Err(EngineError::ReadOnly)
            } else {
                result
            }
        };
        match command {
            Command::Read { start, data } => self.check_data(*start, data),
            Command::Write { start, data } => changes(self.check_data(*start, data)),
            Command::Flush => Ok(()),
            Command::Discard { ranges } | Command::WriteZeroes { ranges, .. } => {
                changes(ranges.iter().try_for_each(|range| self.check_range(*range)))
            }
        }
    }

    fn check_data(&self, start: Sector, data: &Segments) -> Result<(), EngineError> {
        if !(data.len() as u64).is_multiple_of(SECTOR_SIZE) {
            return Err(EngineError::PartialSector(data.len()));
        }
        let count = Sector(data.len() as u64 / SECTOR_SIZE);
        self.check_range(SectorRange { start, count })
    }

    fn check_range(&self, range: SectorRange) -> Result<(), EngineError> {
        let end = range.start.0.checked_add(range.count.0);
        if end.is_some_and(|end| end <= self.engine.disk_size().0) {
            Ok(())
        } else {
            Err(EngineError::past_end(range.start, range.count))
        }
    }

    fn read(
        &mut self,
        key: usize,
        cluster: GuestCluster,
        offset: u32,
        mut data: Segments,
        charge: u64,
    ) {
        let Place::In(file, host) = self.engine.bat.get(cluster).place() else {
            data.fill_zero();
            return self.allowance.end(charge);
        };
        let level = self.engine.level(file);
        let at = level.offset(host) + u64::from(offset);
        if file != self.engine.top() {
            // A disk that has grown since the snapshot reads as zeros beyond the
            // size that it had then.
            let start = self.engine.grid().cluster_start(cluster) + u64::from(offset);
            let within = level.disk_bytes().saturating_sub(start);
            let inside = data.take_front(usize::try_from(within).unwrap_or(usize::MAX));
            data.fill_zero();
            data = inside;
            if data.is_empty() {
                return self.allowance.end(charge);
            }
        }
        let op = Op::Read {
            file,
            offset: at,
            buffer: Buffer::Client(data),
        };
        self.local(key, op, None, charge);
    }

    fn write(
        &mut self,
        key: usize,
        cluster: GuestCluster,
        offset: u32,
        data: Segments,
        charge: u64,
    ) {
        match self.engine.plan_write(cluster, offset, &data) {
            WritePlan::At {
                offset: at,
                on_disk,
            } => {
                let dsync = on_disk && self.engine.wants_stable_write();
                self.active[key].stable &= dsync;
                let op = Op::Write {
                    file: self.engine.top(),
                    offset: at,
                    buffer: Buffer::Client(data),
                    dsync,
                };
                self.local(key, op, Some((cluster, offset)), charge);
            }
            WritePlan::Nothing { on_disk } => {
                self.active[key].stable &= on_disk;
                self.allowance.end(charge);
            }
            WritePlan::Runner => {
                let work = Work::Write {
                    cluster,
                    offset,
                    data,
                };
                self.dispatch(key, work, charge);
            }
            WritePlan::Space => {
                let work = Work::Write {
                    cluster,
                    offset,
                    data,
                };
                let pio = self.pio(key, work, charge);
                self.engine.park(pio, false);
            }
        }
    }

    /// A part that others do, with what it takes of the allowance.
    fn pio(&mut self, key: usize, work: Work, charge: u64) -> Pio {
        self.active[key].parts += 1;
        self.active[key].stable = false;
        Pio {
            home: Home::new(self.inbox.clone(), key, charge),
            work,
            last_try: false,
        }
    }

    fn dispatch(&mut self, key: usize, work: Work, charge: u64) {
        let cluster = work.cluster(self.engine.grid());
        let pio = self.pio(key, work, charge);
        self.engine.dispatch(cluster, pio);
    }

    fn flush(&mut self, key: usize) {
        if self.engine.has_sync_failed() {
            self.active[key].result = Err(EngineError::SyncFailed);
        } else if !self.engine.is_covered() {
            self.wait_for_flush(key);
        }
    }

    fn wait_for_flush(&mut self, key: usize) {
        self.active[key].parts += 1;
        preempt::point("waiting");
        self.engine.ask_md(MdMessage::Flush {
            inbox: self.inbox.clone(),
            request: key,
        });
    }

    /// Queues an operation on this thread's ring.
    fn local(&mut self, key: usize, op: Op, target: Option<(GuestCluster, u32)>, charge: u64) {
        self.active[key].parts += 1;
        let epoch = self.participant.begin_io();
        let is_stable_write = matches!(op, Op::Write { dsync: true, .. });
        let generation = is_stable_write.then(|| self.engine.begin_stable_write());
        let tag = self.ops.insert(LocalOp {
            request: key,
            charge,
            epoch,
            target,
            generation,
            doubted: None,
        }) as u64;
        if !self.backlog.is_empty() {
            self.backlog.push_back((tag, op));
        } else if let Err(op) = self.io.queue(tag, op) {
            self.backlog.push_back((tag, op));
        }
    }

    fn queue_backlog(&mut self) {
        while let Some((tag, op)) = self.backlog.pop_front() {
            if let Err(op) = self.io.queue(tag, op) {
                self.backlog.push_front((tag, op));
                break;
            }
        }
        self.io.submit();
    }

    /// A stable write is a write and a sync in one, and its error does not say which
    /// of the two has failed. If it was the write, that concerns nobody else. A sync
    /// that fails may have lost what others have written, and its error is reported
    /// once only: no later sync would tell (I7). So the write is tried alone, and unless
    /// that fails for the same reason, it was the sync. Its epoch stays, as does its
    /// cluster. A full host is no exception: one that finds the space for a write late
    /// (NFS, thin volumes) says so in the sync.
    fn doubt(&mut self, completion: Completion) -> Option<Completion> {
        match completion {
            Completion {
                tag,
                result: Err(errno),
                op:
                    Op::Write {
                        file,
                        offset,
                        buffer,
                        dsync: true,
                    },
            } => {
                self.ops[tag as usize].doubted = Some(errno);
                self.engine.note_doubt(true);
                let write = Op::Write {
                    file,
                    offset,
                    buffer,
                    dsync: false,
                };
                self.backlog.push_back((tag, write));
                None
            }
            completion => Some(completion),
        }
    }

    fn local_done(&mut self, completion: Completion) {
        let Some(completion) = self.doubt(completion) else {
            return;
        };
        let local = self.ops.remove(completion.tag as usize);
        self.participant.leave(local.epoch);
        preempt::point("I/O ended");
        let key = local.request;
        let doubted = local.doubted;
        let sync_has_failed = doubted.is_some_and(|errno| completion.result != Err(errno));
        if sync_has_failed {
            self.engine.set_sync_failed("a stable write");
        }
        if doubted.is_some() {
            self.engine.note_doubt(false);
        }
        if let Some(generation) = local.generation {
            self.engine.end_stable_write(generation);
            preempt::point("stable write ended");
        }
        if sync_has_failed {
            self.allowance.end(local.charge);
            self.active[key].result = Err(EngineError::SyncFailed);
            return self.part_done(key);
        }
        match (completion.result, completion.op, local.target) {
            (Ok(()), ..) => self.allowance.end(local.charge),
            (
                Err(Errno::NOSPC | Errno::DQUOT),
                Op::Write {
                    buffer: Buffer::Client(data),
                    ..
                },
                Some((cluster, offset)),
            ) => {
                // It goes on as another part, which waits for the host.
                self.allowance.uncharge(local.charge);
                let work = Work::Write {
                    cluster,
                    offset,
                    data,
                };
                let pio = self.pio(key, work, 0);
                self.engine.park(pio, true);
            }
            (Err(errno), ..) => {
                self.allowance.end(local.charge);
                self.active[key].result = Err(EngineError::Io(errno));
            }
        }
        self.part_done(key);
    }

    fn hear(&mut self, message: QueueMessage) {
        match message {
            QueueMessage::PioDone {
                request,
                charge,
                result,
            } => {
                self.allowance.end(charge);
                if result.is_err() {
                    self.active[request].result = result;
                }
                self.part_done(request);
            }
            QueueMessage::FlushDone { request, result } => {
                self.active[request].stable = true;
                self.active[request].flushed = true;
                if self.active[request].result.is_ok() {
                    self.active[request].result = result;
                }
                self.part_done(request);
            }
            QueueMessage::Parked { charge } => self.allowance.uncharge(charge),
            // There may be a new top, to which each cluster has to be copied anew.
            QueueMessage::Resumed => self.copied = None,
        }
    }

    /// A part of the request has ended; if it was the last, the request ends, or,
    /// in write-through, is made stable first.
    fn part_done(&mut self, key: usize) {
        let request = &mut self.active[key];
        request.parts -= 1;
        if request.parts > 0 {
            return;
        }
        if request.result.is_err() {
            if self.engine.has_lost_lock() {
                return self.strand(key);
            }
        } else if request.changes_disk && !self.engine.ends_at_once() {
            if self.engine.has_lost_lock() {
                // What becomes of it on the host is not known.
                return self.strand(key);
            } else if !self.engine.is_write_through() {
                self.engine.note_change_in_doubt();
            } else if self.engine.has_sync_failed() {
                request.result = Err(EngineError::SyncFailed);
            } else if request.needs_flush(&self.engine) && rule::kept(Rule::WriteThroughMapping) {
                return self.wait_for_flush(key);
            }
        }
        preempt::point("judged");
        let request = self.active.remove(key);
        if request.changes_disk && !(request.stable && request.result.is_ok()) {
            self.participant.count_completed();
        }
        self.finished.push(Done {
            tag: request.tag,
            result: request.result,
        });
    }

    /// A request ends that has failed because the lock on the image is lost, or of which it is
    /// not known what became of it on the host.
    #[cold]
    fn strand(&mut self, key: usize) {
        let tag = self.active.remove(key).tag;
        match self.engine.reports_loss() {
            true => self.finished.push(Done {
                tag,
                result: Err(EngineError::LockLost),
            }),
            false => self.stranded.push(tag),
        }
    }
}

impl<D: Disk> Drop for Queue<D> {
    /// Memory of the client must not be used any more after this: waits for
    /// everything in flight.
    fn drop(&mut self) {
        #[cfg(test)]
        if self.engine.is_abandoned() {
            return;
        }
        self.drain(&mut Vec::new(), Duration::ZERO);
    }
}
