//! A runner: does the pios that the queue threads do not do on the spot.
//!
//! These are discards and zeroing, copy-on-write from lower deltas, writes that
//! direct I/O takes only as a read-modify-write, what has to move for a larger disk,
//! and whatever waits behind one of these. All pios of a cluster that need a runner meet the same one, so a locked
//! cluster is the business of one thread: what comes meanwhile waits in its list.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;
use slab::Slab;

mod cow;
mod relocate;
mod rmw;
mod squeeze;
mod zero;

use self::cow::{CopyBuffers, Cow};
use self::relocate::Relocation;
use self::rmw::Rmw;
use self::squeeze::Squeeze;
use super::EngineError;
use super::engine::{Engine, WritePlan};
use super::entry::{Entry, Place};
use super::epoch::{Epoch, Participant};
use super::inbox::{Inbox, Waker};
use super::pio::{Pio, Work};
use super::preempt;
use super::rule::{self, Rule};
use crate::format::GuestCluster;
use crate::storage::{Buffer, Completion, Disk, Io, Op};

/// How often a runner looks whether older I/O on a locked cluster is over.
const GRACE_POLL: Duration = Duration::from_micros(100);

/// Operations that a runner keeps in flight.
const DEPTH: u32 = 64;

/// See the module's text.
pub struct Runner<D: Disk> {
    engine: Arc<Engine<D>>,
    io: D::Io,
    participant: Participant,
    inbox: Arc<Inbox<Pio>>,
    ops: Slab<(Epoch, RunnerOp)>,
    /// Operations that the ring had no room for.
    backlog: VecDeque<(u64, Op)>,
    /// Clusters that this runner has locked.
    busy: BTreeMap<GuestCluster, Busy>,
    /// Copies under way; each takes the memory of a cluster.
    copies: usize,
    /// Pios that need a copy when there is memory for one more.
    awaits_copy: VecDeque<Pio>,
    /// Memory for copies, kept for the next ones.
    buffers: CopyBuffers,
    /// Wait for the end of copies to where the BAT of a larger disk goes.
    awaits_end: Vec<Pio>,
    completions: Vec<Completion>,
}

/// What an operation in flight is for.
enum RunnerOp {
    /// The write of a pio, given back if it has to be tried again.
    Write(Pio, GuestCluster, u32),
    /// Zeroing so many bytes inside a cluster, the first that the pio still has to
    /// do: it is moved on only when they are done.
    Zero(Pio, u64),
    /// A step of the job of a locked cluster.
    Job(GuestCluster),
}

/// A locked cluster.
struct Busy {
    job: Job,
    /// Came meanwhile, oldest first.
    waiting: VecDeque<Pio>,
}

enum Job {
    /// I/O that started before the lock must end first.
    AwaitIo {
        epoch: u64,
        then: Then,
    },
    Rmw(Rmw),
    Cow(Cow),
    Relocation(Relocation),
    Squeeze(Squeeze),
}

/// What is done when no other I/O to the cluster is under way.
enum Then {
    Rmw(Rmw),
    Relocation(Relocation),
    Squeeze(Squeeze),
}

impl<D: Disk> Runner<D> {
    pub(super) fn new(engine: Arc<Engine<D>>, index: usize) -> io::Result<Self> {
        let participant = engine
            .epochs
            .join()
            .ok_or_else(|| io::Error::other("too many threads"))?;
        Ok(Self {
            io: engine.disk.open_io(DEPTH)?,
            participant,
            inbox: engine.runners[index].clone(),
            ops: Slab::with_capacity(DEPTH as usize),
            backlog: VecDeque::new(),
            busy: BTreeMap::new(),
            copies: 0,
            awaits_copy: VecDeque::new(),
            awaits_end: Vec::new(),
            buffers: CopyBuffers::new(engine.grid().cluster().bytes()),
            completions: Vec::new(),
            engine,
        })
    }

    /// Does what there is to do, without waiting. Returns after how long it wants
    /// to be called again if nothing wakes it before.
    pub fn poll(&mut self, _now: Duration) -> Option<Duration> {
        self.inbox.waker().disarm();
        loop {
            self.look();
            if self.inbox.may_sleep() {
                break;
            }
        }
        let waits_for_io = |busy: &Busy| matches!(busy.job, Job::AwaitIo { .. });
        if self.io.completion_fd().is_none() && self.io.in_flight() > 0 {
            return Some(Duration::ZERO);
        }
        self.busy.values().any(waits_for_io).then_some(GRACE_POLL)
    }

    fn look(&mut self) {
        self.reap();
        self.end_graces();
        self.end_waits_for_copies();
        for pio in self.inbox.take_all() {
            self.run(pio);
            if self.io.completion_fd().is_none() {
                // Its I/O ends while it is being started: one pio is taken to its
                // end before the next, while its data is in the CPU's cache.
                self.io.submit();
                while self.reap() {}
            }
        }
        while self.copies < self.copies_max()
            && let Some(pio) = self.awaits_copy.pop_front()
        {
            self.run(pio);
        }
        self.queue_backlog();
    }

    /// Goes on with what has ended, and starts what that takes. False if nothing
    /// has.
    fn reap(&mut self) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        self.io.reap(&mut completions);
        let some = !completions.is_empty();
        for completion in completions.drain(..) {
            self.op_done(completion);
        }
        self.completions = completions;
        if some {
            self.queue_backlog();
        }
        some
    }

    /// What wakes the thread, beside [`Io::completion_fd`].
    pub(super) fn waker(&self) -> &Waker {
        self.inbox.waker()
    }

    /// Whether nothing has woken the thread since its last look.
    #[cfg(all(test, not(ploop_loom)))]
    pub(crate) fn is_asleep(&self) -> bool {
        self.waker().is_armed()
    }

    pub(super) fn io(&self) -> &D::Io {
        &self.io
    }

    /// Whether it has nothing under way.
    pub(super) fn is_idle(&self) -> bool {
        self.ops.is_empty()
            && self.busy.is_empty()
            && self.awaits_copy.is_empty()
            && self.awaits_end.is_empty()
            && self.inbox.is_empty()
    }

    fn run(&mut self, pio: Pio) {
        let epoch = self.participant.begin_look_up();
        let cluster = pio.work.cluster(self.engine.grid());
        match pio.work {
            // These are about what is busy.
            Work::EndCopies => self.await_end_of_copies(pio),
            Work::EndMove { is_stable, .. } => self.end_relocation(pio, cluster, is_stable),
            _ => match self.busy.get_mut(&cluster) {
                Some(busy) => busy.waiting.push_back(pio),
                None => self.begin(pio),
            },
        }
        self.participant.end_look_up(epoch);
    }

    fn begin(&mut self, pio: Pio) {
        match pio.work {
            Work::Write { .. } => self.write(pio),
            Work::CopyUp {
                cluster,
                level,
                top,
            } => self.copy_up(pio, cluster, level, top),
            Work::Move {
                cluster,
                to,
                keep,
                only_if,
            } => self.begin_relocation(pio, cluster, (to, keep), only_if),
            Work::Squeeze { cluster } => self.begin_squeeze(pio, cluster),
            _ => self.zero(pio),
        }
    }

    fn complete(&self, pio: Pio, result: Result<(), EngineError>) {
        pio.home.complete(result);
        preempt::point("completed");
        self.engine.dispatched.fetch_sub(1, Ordering::AcqRel);
    }

    /// The pio needs space that is not there; `full` if the host said so.
    fn park(&self, pio: Pio, full: bool) {
        self.engine.park(pio, full);
        preempt::point("parked");
        self.engine.dispatched.fetch_sub(1, Ordering::AcqRel);
    }

    fn fail(&self, pio: Pio, errno: Errno) {
        match errno {
            Errno::NOSPC | Errno::DQUOT => self.park(pio, true),
            _ => self.complete(pio, Err(EngineError::Io(errno))),
        }
    }

    fn queue(&mut self, op: RunnerOp, io: Op) {
        let epoch = self.participant.begin_io();
        let tag = self.ops.insert((epoch, op)) as u64;
        if !self.backlog.is_empty() {
            self.backlog.push_back((tag, io));
        } else if let Err(io) = self.io.queue(tag, io) {
            self.backlog.push_back((tag, io));
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

    fn op_done(&mut self, completion: Completion) {
        let (epoch, op) = self.ops.remove(completion.tag as usize);
        self.participant.leave(epoch);
        match op {
            RunnerOp::Write(mut pio, cluster, offset) => {
                let result = completion.result;
                if let Op::Write {
                    buffer: Buffer::Client(data),
                    ..
                } = completion.op
                {
                    pio.work = Work::Write {
                        cluster,
                        offset,
                        data,
                    };
                }
                match result {
                    Ok(()) => self.complete(pio, Ok(())),
                    Err(errno) => self.fail(pio, errno),
                }
            }
            RunnerOp::Zero(mut pio, len) => match completion.result {
                Ok(()) => {
                    pio.work.advance(len);
                    self.run(pio);
                }
                Err(errno) => self.fail(pio, errno),
            },
            RunnerOp::Job(cluster) => self.step(cluster, completion),
        }
    }

    fn write(&mut self, mut pio: Pio) {
        let Work::Write {
            cluster,
            offset,
            data,
        } = &mut pio.work
        else {
            return self.zero(pio);
        };
        let (cluster, offset) = (*cluster, *offset);
        match self.engine.plan_write(cluster, offset, data) {
            WritePlan::At { offset: at, .. } => {
                let op = Op::Write {
                    file: self.engine.top(),
                    offset: at,
                    buffer: Buffer::Client(std::mem::take(data)),
                    dsync: false,
                };
                self.queue(RunnerOp::Write(pio, cluster, offset), op);
            }
            WritePlan::Nothing { .. } => self.complete(pio, Ok(())),
            WritePlan::Space => self.park(pio, false),
            WritePlan::Runner => {
                let entry = self.engine.rely_on(cluster);
                match entry.place() {
                    Place::In(file, _) if file != self.engine.top() => {
                        self.begin_cow(pio, cluster, entry);
                    }
                    place => self.begin_rmw(pio, cluster, offset, entry, place),
                }
            }
        }
    }

    /// Starts what waits for the end of older I/O, where that has come.
    fn end_graces(&mut self) {
        let epochs = &self.engine.epochs;
        let is_over = |busy: &Busy| match busy.job {
            Job::AwaitIo { epoch, ref then } => {
                let rule = match then {
                    Then::Rmw(_) => Rule::OldIoBeforeModify,
                    Then::Relocation(_) => Rule::OldIoBeforeCopy,
                    Then::Squeeze(_) => Rule::OldIoBeforeZeroCheck,
                };
                epochs.all_reached(epoch) || !rule::kept(rule)
            }
            _ => false,
        };
        let over: Vec<_> = self
            .busy
            .iter()
            .filter(|(_, busy)| is_over(busy))
            .map(|(cluster, _)| *cluster)
            .collect();
        for cluster in over {
            if let Some(Busy {
                job: Job::AwaitIo { then, .. },
                waiting,
            }) = self.busy.remove(&cluster)
            {
                let (job, op) = match then {
                    Then::Rmw(rmw) => {
                        let op = rmw.read(&self.engine);
                        (Job::Rmw(rmw), op)
                    }
                    Then::Relocation(relocation) => {
                        let op = relocation.read(&self.engine, &mut self.buffers);
                        (Job::Relocation(relocation), op)
                    }
                    Then::Squeeze(squeeze) => {
                        let op = squeeze.read(&self.engine, &mut self.buffers);
                        (Job::Squeeze(squeeze), op)
                    }
                };
                self.queue_job(cluster, job, waiting, op);
            }
        }
    }

    /// Makes the cluster this runner's own; false if its entry is not `from` any
    /// more. Reads go on.
    fn lock(&self, cluster: GuestCluster, from: Entry) -> bool {
        let is_ours = self.engine.bat.replace(cluster, from, from.locked());
        preempt::point("locked");
        is_ours.is_ok()
    }

    fn unlock(&mut self, cluster: GuestCluster, waiting: VecDeque<Pio>) {
        self.engine.bat.unlock(cluster);
        preempt::point("unlocked");
        self.run_waiting(waiting);
    }

    /// Goes on with the job of a locked cluster.
    fn queue_job(&mut self, cluster: GuestCluster, job: Job, waiting: VecDeque<Pio>, op: Op) {
        self.busy.insert(cluster, Busy { job, waiting });
        self.queue(RunnerOp::Job(cluster), op);
    }

    /// Runs what waited for a cluster that is not locked any more.
    fn run_waiting(&mut self, waiting: VecDeque<Pio>) {
        for pio in waiting {
            self.run(pio);
        }
    }

    /// An operation of the job of a locked cluster has ended.
    fn step(&mut self, cluster: GuestCluster, completion: Completion) {
        let Some(Busy { job, waiting }) = self.busy.remove(&cluster) else {
            return;
        };
        match job {
            Job::Rmw(rmw) => self.step_rmw(cluster, rmw, waiting, completion),
            Job::Cow(cow) => self.step_cow(cluster, cow, waiting, completion),
            Job::Relocation(relocation) => {
                self.step_relocation(cluster, relocation, waiting, completion);
            }
            Job::Squeeze(squeeze) => self.step_squeeze(cluster, squeeze, waiting, completion),
            // Has no operation in flight.
            Job::AwaitIo { .. } => self.unlock(cluster, waiting),
        }
    }
}
