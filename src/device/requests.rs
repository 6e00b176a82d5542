//! The requests of one queue, between its ring and the engine.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use slab::Slab;
use smallvec::SmallVec;

use super::mailbox::Parked;
use super::memory::{Hold, QueueMemory};
use super::ratelimit::guest_log;
use super::request::{ID_LEN, Limits, Operation, Rejected, Reply, Request, Status};
use super::statistics::{Ended, Kind, QueueCounters};
use super::throttle::{self, Valve};
use super::{BlockDevice, config};
use crate::notices::IoError;
use crate::ploop::{self, Command, Done, EngineError, Queue};
use crate::storage::{Disk, Segments};

/// An answered chain, for the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    /// Index of the chain's first descriptor, by which the driver knows it.
    pub head: u16,
    /// Bytes of guest memory written.
    pub len: u32,
}

/// What a queue could not bring to its end.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Ended, and not in the used ring.
    pub unanswered: Vec<Used>,
    /// The heads of chains that were taken and are not done, oldest first.
    pub unfinished: Vec<u16>,
}

/// The memory that lists of segments may take for one queue, in bytes, before no more
/// is taken from the ring. One request has 16 KiB at most. Pieces that follow each other
/// in memory cost nothing.
const MAX_LIST_BYTES: usize = 1 << 20;

/// What a request takes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Weight {
    /// To be read or written.
    data: u64,
    /// Of memory for the list of its segments.
    list: usize,
}

fn weight(command: &Command) -> Weight {
    match command {
        Command::Read { data, .. } | Command::Write { data, .. } => Weight {
            data: data.len() as u64,
            list: data.list_bytes(),
        },
        Command::Flush | Command::Discard { .. } | Command::WriteZeroes { .. } => Weight::default(),
    }
}

/// A request that the engine has.
#[derive(Debug)]
struct InFlight {
    weight: Weight,
    head: u16,
    /// How many chains the ring had given before it.
    place: u64,
    reply: Reply,
    memory: Hold,
    /// What is counted of it, and when it was taken.
    counted: Ended,
    since: u64,
    /// Whether the driver cannot tell whether it was done: a discard.
    is_hint: bool,
}

/// Every chain that comes in by [`Self::accept`] or [`Self::reject`] goes out once
/// as a [`Used`].
pub(super) struct Requests<D: Disk> {
    queue_index: usize,
    device: Arc<BlockDevice<D>>,
    engine: Queue<D>,
    /// By the tag that the engine knows them by.
    in_flight: Slab<InFlight>,
    /// Of all of them.
    load: Weight,
    /// Chains that the ring has given.
    taken: u64,
    counters: Arc<QueueCounters>,
    /// Those that limits keep back, which count as in flight.
    valve: Valve<ploop::Request>,
    /// Nothing more is to be begun for now.
    is_held: bool,
    /// The time of this batch of requests, if any was taken; else 0.
    batch_time: u64,
    used: Vec<Used>,
    /// The bytes that [`Self::used`] had to read or write.
    used_load: u64,
    /// That a drain has left undone.
    undone: Vec<InFlight>,
    /// Places and heads of those that were given up without an answer.
    unfinished: Vec<(u64, u16)>,
    /// Empty; kept for its memory.
    done: Vec<Done>,
}

impl<D: Disk> Requests<D> {
    /// Of a queue whose engine's side is `engine`. These have `ended` already.
    pub fn new(
        queue_index: usize,
        device: Arc<BlockDevice<D>>,
        engine: Queue<D>,
        mut ended: Vec<Used>,
    ) -> Self {
        let depth = usize::from(device.queue_size());
        ended.reserve(depth);
        device.queue_opened();
        let counters = device.statistics().queue(queue_index);
        counters.set_runs(true);
        let valve = Valve::new(Arc::clone(device.throttle()));
        Self {
            queue_index,
            device,
            engine,
            in_flight: Slab::with_capacity(depth),
            load: Weight::default(),
            taken: 0,
            counters,
            valve,
            is_held: false,
            batch_time: 0,
            used: ended,
            used_load: 0,
            undone: Vec::new(),
            unfinished: Vec::new(),
            done: Vec::with_capacity(depth),
        }
    }

    /// What a request may be.
    pub fn limits(&self) -> Limits {
        let engine = self.engine.engine();
        Limits {
            disk_size: engine.disk_size(),
            read_only: engine.is_read_only(),
            max_ranges: config::MAX_RANGES,
            max_range_sectors: config::MAX_RANGE_SECTORS,
        }
    }

    /// Which queue of the device it is.
    pub fn queue_index(&self) -> usize {
        self.queue_index
    }

    /// Descriptors that are readable while [`Self::poll`] has something to do.
    pub fn fds(&self) -> SmallVec<[RawFd; 2]> {
        self.engine.fds()
    }

    /// Whether the engine should have one more request, of a ring of that size. If
    /// not, it has some that will end, or there are answers to be put back.
    pub fn has_room(&self, ring_size: u16) -> bool {
        let unanswered = self.in_flight.len() + self.used.len();
        unanswered < usize::from(ring_size)
            && self.load.list < MAX_LIST_BYTES
            && self.engine.has_room()
    }

    /// Starts a request that was parsed with the newest map of `memory`.
    pub fn accept(&mut self, head: u16, request: Request, memory: &QueueMemory) {
        let Request { operation, reply } = request;
        let place = self.taken;
        self.taken += 1;
        match operation {
            Operation::Engine(command) => {
                let weight = weight(&command);
                let counted = Ended::of(&command);
                let is_hint = matches!(command, Command::Discard { .. });
                let since = self.time_of_batch();
                self.counters.begin();
                self.load.data += weight.data;
                self.load.list += weight.list;
                let tag = self.in_flight.insert(InFlight {
                    weight,
                    head,
                    place,
                    reply,
                    memory: memory.hold(),
                    counted,
                    since,
                    is_hint,
                }) as u64;
                self.limit(ploop::Request { tag, command }, &counted);
            }
            Operation::GetId(target) => {
                write_id(&target, self.device.serial());
                let len = reply.finish(Status::Ok);
                self.used.push(Used { head, len });
            }
        }
    }

    /// Starts a request as soon as limits let it.
    fn limit(&mut self, request: ploop::Request, counted: &Ended) {
        // Before it is handed about.
        if self.valve.is_open() {
            return self.engine.push(request);
        }
        let (kind, bytes) = match counted.kind() {
            Kind::Read => (throttle::Kind::Read, counted.bytes()),
            Kind::Write => (throttle::Kind::Write, counted.bytes()),
            // It moves none, and one may name 128 GiB: others would wait for hours.
            Kind::Unmap => (throttle::Kind::Write, 0),
            Kind::Flush => return self.engine.push(request),
        };
        if let Some(request) = self.valve.pass(kind, bytes, request) {
            self.engine.push(request);
        }
    }

    /// After which time limits may let something pass that waits, and that the engine has
    /// room for.
    pub fn pause(&self) -> Option<Duration> {
        let pause = self.valve.pause()?;
        self.engine.has_room().then_some(pause)
    }

    /// From now on nothing waits for limits: the ring stops.
    pub fn lift_limits(&mut self) {
        self.valve.open_for_good();
    }

    /// Answers a chain that is no request.
    pub fn reject(&mut self, head: u16, rejected: Rejected) {
        let Rejected { error, kind, reply } = rejected;
        self.taken += 1;
        if let Some(kind) = kind {
            self.counters.refuse(kind);
        }
        guest_log!(
            self.device.guest_limit(),
            Warn,
            "queue {}: request refused: {error}",
            self.queue_index
        );
        let len = reply.map_or(0, |reply| reply.finish(error.status()));
        self.used.push(Used { head, len });
    }

    /// The ring has given a chain that there cannot be.
    pub fn skip(&mut self) {
        self.taken += 1;
    }

    /// Starts what was accepted and collects what has ended. Never blocks.
    pub fn poll(&mut self, memory: &mut QueueMemory) {
        self.batch_time = 0;
        self.engine.submit();
        self.engine.poll(&mut self.done);
        if self.pass_on() {
            self.engine.submit();
            self.engine.poll(&mut self.done);
        }
        self.settle(memory, Parked::Fail);
        debug_assert!(
            self.undone.is_empty(),
            "only a drain leaves something undone"
        );
    }

    /// Starts what limits let pass. The engine gets no more than it has room for, as it
    /// does from the ring, and before the ring: what it has not begun ends undone in a
    /// drain. Returns whether there was something.
    #[inline]
    fn pass_on(&mut self) -> bool {
        let mut has_passed = false;
        while !self.is_held
            && self.engine.has_room()
            && let Some(request) = self.valve.next()
        {
            self.engine.push(request);
            has_passed = true;
        }
        has_passed
    }

    /// Whether [`Self::poll`] has more to do at once: not all I/O ends with a
    /// descriptor that gets readable.
    pub fn has_ready(&self) -> bool {
        self.engine.has_ready()
    }

    /// Whether nothing more of what was accepted is to be begun for now.
    pub fn hold(&mut self, is_held: bool) {
        self.is_held = is_held;
        self.engine.hold(is_held);
    }

    /// To be called before the thread sleeps. False if [`Self::poll`] has something
    /// to do already.
    pub fn may_sleep(&mut self) -> bool {
        self.engine.may_sleep()
    }

    /// Waits until nothing is in flight any more. Returns the heads of the chains that
    /// were taken last, last first, and that are as if they had not been: nothing, or
    /// not all, was done for them, and their driver may wait for them still. They can
    /// be taken again. With `may_give_back` off there are none.
    pub fn drain(
        &mut self,
        memory: &mut QueueMemory,
        parked: Parked,
        may_give_back: bool,
    ) -> Vec<u16> {
        self.hold(false);
        self.empty_valve(memory, self.unless_locked_out(parked), may_give_back);
        let grace = self.device.stops().grace();
        self.engine.drain(&mut self.done, grace);
        // The lock may have been lost by now.
        let parked = self.unless_locked_out(parked);
        self.settle(memory, parked);
        let mut undone = std::mem::take(&mut self.undone);
        undone.sort_unstable_by_key(|request| std::cmp::Reverse(request.place));
        let mut given_back = Vec::new();
        for request in undone {
            if may_give_back && request.place + 1 == self.taken {
                self.taken -= 1;
                request.reply.abandon();
                given_back.push(request.head);
            } else if parked == Parked::Drop {
                request.reply.abandon();
                self.unfinished.push((request.place, request.head));
            } else {
                let status = match request.is_hint {
                    true => Status::Ok,
                    false => Status::IoError,
                };
                let len = request.reply.finish(status);
                let head = request.head;
                self.used.push(Used { head, len });
            }
            memory.release(request.memory);
        }
        given_back
    }

    /// What waits for a lock that is lost waits on, whoever stops the ring: on another host,
    /// or in another process, it can be done.
    fn unless_locked_out(&self, parked: Parked) -> Parked {
        match self.engine.engine().is_locked_out() {
            true => Parked::Drop,
            false => parked,
        }
    }

    /// Takes what limits have kept back: whoever stops the ring waits for the end, and not
    /// for limits. What was taken last can go back and is not begun. What others were taken
    /// behind cannot: all of it is done, unless that takes far too long.
    fn empty_valve(&mut self, memory: &mut QueueMemory, parked: Parked, may_give_back: bool) {
        let mut waiting = self.valve.take_all();
        let places = waiting.iter().rev();
        let places = places.map(|request| self.in_flight[request.tag as usize].place);
        let last = places.zip((0..self.taken).rev());
        let last = last.take_while(|(place, last)| may_give_back && place == last);
        let to_do = waiting.len() - last.count();
        for request in waiting.drain(to_do..) {
            self.leave(request);
        }
        let mut waiting = VecDeque::from(waiting);
        let stops = self.device.stops();
        let time = match parked {
            Parked::Fail => stops.patience(),
            // They are taken again, or the image is still to be closed.
            Parked::Drop | Parked::FailSoon => stops.grace(),
        };
        let start = Instant::now();
        let mut is_done = waiting.is_empty();
        while !is_done {
            // One after the other: should the time be over, most are done.
            while self.engine.has_room()
                && let Some(request) = waiting.pop_front()
            {
                self.engine.push(request);
            }
            self.engine.submit();
            self.engine.poll(&mut self.done);
            self.settle(memory, parked);
            // The engine's own drain drops what is not begun by then.
            is_done = waiting.is_empty() && self.engine.is_begun();
            if self.engine.is_suspended() || start.elapsed() >= time {
                break;
            }
            if !is_done && (waiting.is_empty() || !self.engine.has_room()) {
                self.engine.wait_for_an_end();
            }
        }
        for request in waiting {
            self.leave(request);
        }
    }

    /// It is as if the engine had dropped it.
    fn leave(&mut self, request: ploop::Request) {
        let tag = request.tag;
        let result = Err(EngineError::Undone);
        self.done.push(Done { tag, result });
    }

    /// Waits a moment for something to end, unless limits let something pass. What waits
    /// for space on the host fails.
    pub fn wait_for_an_end(&mut self) {
        if self.pause() != Some(Duration::ZERO) {
            self.engine.wait_for_an_end();
        }
    }

    /// What is to be put into the used ring, in this order.
    pub fn to_put_back(&self) -> &[Used] {
        &self.used
    }

    /// The first `count` of [`Self::to_put_back`] are in the used ring.
    pub fn were_put_back(&mut self, count: usize) {
        self.used_load = 0;
        self.used.drain(..count);
    }

    /// What is left at the end.
    pub fn into_left(mut self) -> Left {
        self.unfinished.sort_unstable();
        Left {
            unanswered: std::mem::take(&mut self.used),
            unfinished: self.unfinished.iter().map(|&(_, head)| head).collect(),
        }
    }

    /// How much there is for [`Self::to_put_back`].
    pub fn used(&self) -> usize {
        self.used.len()
    }

    /// How many bytes the requests have read or written that there are for
    /// [`Self::to_put_back`].
    pub fn used_load(&self) -> u64 {
        self.used_load
    }

    /// How many bytes the engine has to read or write.
    pub fn load(&self) -> u64 {
        self.load.data
    }

    /// Requests that the engine has.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn time_of_batch(&mut self) -> u64 {
        if self.batch_time == 0 {
            self.batch_time = self.device.statistics().now();
        }
        self.batch_time
    }

    fn settle(&mut self, memory: &mut QueueMemory, parked: Parked) {
        if self.done.is_empty() {
            return;
        }
        let now = self.device.statistics().now();
        self.counters.note_end(now);
        for Done { tag, result } in self.done.drain(..) {
            let request = self.in_flight.remove(tag as usize);
            self.load.data -= request.weight.data;
            self.load.list -= request.weight.list;
            self.used_load += request.weight.data;
            if result == Err(EngineError::Undone) {
                self.counters.give_up();
                self.undone.push(request);
                continue;
            }
            let InFlight {
                head,
                place,
                reply,
                memory: hold,
                counted,
                since,
                ..
            } = request;
            let was_waiting = matches!(
                result,
                Err(EngineError::NoSpace
                    | EngineError::Stopped
                    // A flush, for whose pages of the BAT there was none.
                    | EngineError::Metadata(Errno::NOSPC | Errno::DQUOT))
            );
            if parked == Parked::Drop && was_waiting {
                self.counters.give_up();
                reply.abandon();
                self.unfinished.push((place, head));
                memory.release(hold);
                continue;
            }
            let time = now.saturating_sub(since);
            self.counters.end(&counted, result.is_ok(), time);
            if let Err(error) = &result {
                if let Some(notices) = &self.device.notices {
                    notices.post_error(|| io_error(counted.kind(), error));
                }
                guest_log!(
                    self.device.guest_limit(),
                    Warn,
                    "queue {}: request failed: {error}",
                    self.queue_index
                );
            }
            let len = reply.finish(Status::of(&result));
            self.used.push(Used { head, len });
            memory.release(hold);
        }
    }
}

impl<D: Disk> Drop for Requests<D> {
    fn drop(&mut self) {
        debug_assert!(self.in_flight.is_empty() || std::thread::panicking());
        self.counters.set_runs(false);
        self.device.queue_closed();
    }
}

fn io_error(kind: Kind, error: &EngineError) -> IoError {
    IoError {
        is_read: kind == Kind::Read,
        no_space: matches!(error, EngineError::NoSpace),
        reason: error.to_string(),
    }
}

/// Answers `VIRTIO_BLK_T_GET_ID`; `target` has at most [`ID_LEN`] bytes.
fn write_id(target: &Segments, serial: &[u8; ID_LEN]) {
    target.copy_from(0, &serial[..target.len()]);
}

#[cfg(all(test, not(ploop_loom)))]
mod tests;
