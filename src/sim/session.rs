//! One opening of an image: the engine's actors, the requests that are under way,
//! and what the model hears of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rustix::io::Errno;
use smallvec::{SmallVec, smallvec};

use super::cases::{Case, Cases};
use super::disk::{Faults, SimDisk};
use super::file::SECTOR;
use super::memory::Memory;
use super::model::{ChangeId, Flush, Model, Read};
use super::pattern::{self, Value};
use super::scenario::{Action, Profile, Scenario};
use crate::format::Sector;
use crate::ploop::control::{Control, Outcome};
use crate::ploop::{
    Command, Done, Engine, EngineError, MdWriter, OnEnospc, Opened, Queue, Request, Runner,
    SectorRange,
};
use crate::storage::Segments;

/// Turns until what should have ended counts as hanging.
const PATIENCE: u32 = 40_000;

/// A failure, in words.
pub type Failure = String;

/// What the sessions of a life share.
pub struct World {
    /// Of the driver; the disk has its own.
    pub rng: SmallRng,
    /// What was set up.
    pub scenario: Scenario,
    /// The host.
    pub disk: SimDisk,
    /// What may be read.
    pub model: Model,
    /// What has happened how often.
    pub cases: Cases,
    /// Every write has another.
    pub next_value: u64,
}

impl World {
    fn new_value(&mut self) -> Value {
        self.next_value += 1;
        Value(self.next_value)
    }
}

pub(super) enum Kind {
    Read { read: Read, first: u64 },
    Change { id: ChangeId, mode: Option<u32> },
    Flush { flush: Flush, has_work: bool },
}

/// A request under way.
pub(super) struct InFlight {
    pub queue: usize,
    pub kind: Kind,
    pub ask: Ask,
    pub memory: Option<Memory>,
    /// It came in this suspension.
    pub held: Option<u32>,
    /// It came after a sync was known to have failed.
    pub after_failed_sync: bool,
}

/// What a request asks for: it may have to be asked again, of another process.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Read {
        start: Sector,
    },
    Write {
        start: Sector,
    },
    Flush,
    Discard {
        ranges: SmallVec<[SectorRange; 1]>,
    },
    WriteZeroes {
        ranges: SmallVec<[SectorRange; 1]>,
        unmap: bool,
    },
}

impl Ask {
    pub fn command(&self, memory: Option<&Memory>, rng: &mut SmallRng) -> Command {
        let mut data = || {
            let piece = random_piece(rng);
            memory.map_or_else(Segments::new, |memory| memory.segments(piece))
        };
        match self.clone() {
            Self::Read { start } => Command::Read {
                start,
                data: data(),
            },
            Self::Write { start } => Command::Write {
                start,
                data: data(),
            },
            Self::Flush => Command::Flush,
            Self::Discard { ranges } => Command::Discard { ranges },
            Self::WriteZeroes { ranges, unmap } => Command::WriteZeroes { ranges, unmap },
        }
    }
}

/// When an actor wants to be polled, beside when it is woken.
struct Alarm {
    /// Of its [`crate::storage::Io`].
    io: usize,
    at: Option<Duration>,
}

/// Of the write cache, as far as the clients know.
pub(super) enum WriteThrough {
    Off,
    Turning {
        outcome: Outcome,
        flush: Flush,
    },
    /// Each time that it is turned on gets a number.
    On(u32),
}

/// Of [`Control::Suspend`] and [`Control::Close`].
struct Quiesce {
    outcome: Outcome,
    flush: Flush,
}

enum Suspension {
    No,
    Under(Quiesce),
    /// Each gets a number.
    Yes(u32),
}

impl Suspension {
    fn number(&self) -> Option<u32> {
        match self {
            Self::Yes(number) => Some(*number),
            _ => None,
        }
    }
}

/// See the module's text.
pub struct Session {
    fuse: Fuse,
    pub(super) requests: BTreeMap<u64, InFlight>,
    pub(super) next_tag: u64,
    pub(super) engine: Arc<Engine<SimDisk>>,
    pub(super) queues: Vec<Queue<SimDisk>>,
    runners: Vec<Runner<SimDisk>>,
    md: MdWriter<SimDisk>,
    now: Duration,
    pub(super) write_through: WriteThrough,
    pub(super) times_on: u32,
    suspension: Suspension,
    pub(super) times_suspended: u32,
    pub(super) trouble: Trouble,
    pub(super) sync_failed: bool,
    is_lazy: bool,
    /// Of runners, the metadata thread, and queues, in this order.
    alarms: Vec<Alarm>,
}

/// Turns the power off when a test panics: else what is in flight would be waited
/// for, and nobody would go on with it. Dropped before anything else.
struct Fuse {
    disk: SimDisk,
    engine: Arc<Engine<SimDisk>>,
}

impl Drop for Fuse {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.disk.power_off();
            self.engine.abandon();
        }
    }
}

/// For what requests may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trouble {
    /// The host fails.
    faults: bool,
    /// The host is full, and writes need not wait or were told not to.
    space: bool,
    /// The host is full, and has no space for the mapping either.
    space_for_metadata: bool,
    /// The host is full. A write in write-through to what was punched needs space; if it
    /// finds some when it is tried again, that looks like a failed sync.
    space_in_doubt: bool,
    read_only: bool,
}

impl Trouble {
    fn explains(self, error: EngineError) -> bool {
        match error {
            EngineError::NoSpace => self.space,
            EngineError::Metadata(Errno::NOSPC) if self.space_for_metadata => true,
            EngineError::SyncFailed if self.space_in_doubt => true,
            EngineError::Io(_) | EngineError::Metadata(_) | EngineError::SyncFailed => self.faults,
            EngineError::ReadOnly => self.read_only,
            _ => false,
        }
    }
}

impl Session {
    /// Takes over what was opened.
    pub fn new(
        opened: Opened<SimDisk>,
        world: &World,
        profile: &Profile,
        policy: OnEnospc,
    ) -> Self {
        let queues = (0..world.scenario.queues)
            .map(|_| opened.engine.queue().expect("there is room for all queues"))
            .collect();
        let alarms = (0..world.disk.io_count())
            .map(|io| Alarm {
                io,
                at: Some(Duration::ZERO),
            })
            .collect();
        Self {
            fuse: Fuse {
                disk: world.disk.clone(),
                engine: opened.engine.clone(),
            },
            requests: BTreeMap::new(),
            next_tag: 0,
            engine: opened.engine,
            queues,
            runners: opened.runners,
            md: opened.md,
            now: Duration::ZERO,
            write_through: WriteThrough::Off,
            times_on: 0,
            suspension: Suspension::No,
            times_suspended: 0,
            trouble: Trouble {
                faults: profile.faults != Faults::default(),
                space: profile.is_tight && policy == OnEnospc::Report,
                space_for_metadata: profile.is_tight && world.scenario.medium.copies_on_write,
                space_in_doubt: profile.is_tight,
                read_only: profile.read_only,
            },
            sync_failed: false,
            is_lazy: profile.is_lazy,
            alarms,
        }
    }

    /// Runs until the power goes, or the profile says that it is enough.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn run(&mut self, world: &mut World, profile: &Profile) -> Result<(), Failure> {
        for _ in 0..profile.actions_left {
            let action = profile.choose(&mut world.rng);
            self.act(world, profile, action)?;
            if !world.disk.is_powered() {
                break;
            }
        }
        Ok(())
    }

    fn act(&mut self, world: &mut World, profile: &Profile, action: Action) -> Result<(), Failure> {
        let rng = &mut world.rng;
        match action {
            Action::PollQueue => {
                let queue = rng.random_range(0..self.queues.len());
                self.poll_queue(world, queue)?;
            }
            Action::PollRunner => {
                let runner = rng.random_range(0..self.runners.len());
                self.poll_runner(world, runner);
            }
            Action::PollMd => self.poll_md(world)?,
            Action::Disk => world.disk.step(),
            Action::Time => {
                let micros = *[10, 1_000, 30_000, 600_000].choose(rng).unwrap();
                self.now += Duration::from_micros(micros);
            }
            Action::WriteThrough => self.toggle_write_through(world),
            Action::Suspend => self.toggle_suspension(world),
            Action::Space => {
                let more = rng.random_range(0..4) * world.scenario.cluster / 4096;
                let used = world.disk.used_blocks();
                let capacity = rng.random_bool(0.9).then_some(used + more);
                world
                    .disk
                    .change_medium(|medium| medium.capacity = capacity);
            }
            Action::GiveUp => {
                let queue = rng.random_range(0..self.queues.len());
                self.give_up(queue);
            }
            request if self.requests.len() < profile.depth => {
                self.push(world, profile.sectors, request);
            }
            _ => {}
        }
        self.hear_controls(world)
    }

    // --- requests ---

    fn push(&mut self, world: &mut World, max: u64, action: Action) {
        let queue = world.rng.random_range(0..self.queues.len());
        let (kind, memory, ask) = match action {
            Action::Read => {
                let range = self.choose_range(world, max);
                self.new_read(world, &range)
            }
            Action::Write => self.new_write(world, max),
            Action::Flush => {
                let kind = Kind::Flush {
                    flush: world.model.begin_flush(),
                    has_work: world.disk.is_unsynced(),
                };
                (kind, None, Ask::Flush)
            }
            discard => self.new_zeroing(world, max, discard == Action::Discard),
        };
        self.give(world, queue, (kind, memory, ask));
    }

    /// A new request goes to a queue.
    pub(super) fn give(
        &mut self,
        world: &mut World,
        queue: usize,
        (kind, memory, ask): (Kind, Option<Memory>, Ask),
    ) {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.requests.insert(
            tag,
            InFlight {
                queue,
                kind,
                ask,
                memory,
                held: self.suspension.number(),
                after_failed_sync: self.sync_failed,
            },
        );
        self.ask(world, tag);
    }

    /// The engine gets a request.
    pub(super) fn ask(&mut self, world: &mut World, tag: u64) {
        let Some(request) = self.requests.get(&tag) else {
            return;
        };
        let queue = request.queue;
        let command = request.ask.command(request.memory.as_ref(), &mut world.rng);
        world
            .disk
            .note(|| format!("vq{queue} takes {tag}: {}", describe(&command)));
        self.queues[queue].push(Request { tag, command });
        if world.rng.random_bool(0.7) {
            self.queues[queue].submit();
        }
    }

    /// Where the next request goes: whole clusters and host blocks now and then,
    /// any sectors else, never beyond the island.
    fn choose_range(&self, world: &mut World, max: u64) -> std::ops::Range<u64> {
        let islands = world.scenario.layout.islands();
        let island = islands.choose(&mut world.rng).unwrap().clone();
        let unit = *[1, 8, world.scenario.cluster / SECTOR as u64]
            .choose(&mut world.rng)
            .unwrap();
        let start = world.rng.random_range(island.clone());
        let start = (start - start % unit).max(island.start);
        let count = world.rng.random_range(1..=max).next_multiple_of(unit);
        start..(start + count).min(island.end)
    }

    pub(super) fn new_read(
        &mut self,
        world: &mut World,
        range: &std::ops::Range<u64>,
    ) -> (Kind, Option<Memory>, Ask) {
        let len = (range.end - range.start) as usize * SECTOR;
        let ask = Ask::Read {
            start: Sector(range.start),
        };
        let kind = Kind::Read {
            read: world.model.begin_read(world.index(range)),
            first: range.start,
        };
        (kind, Some(Memory::new(vec![0xa5; len])), ask)
    }

    fn new_change(&self, world: &mut World) -> (ChangeId, Kind) {
        let id = world.model.begin();
        let mode = match self.write_through {
            WriteThrough::On(number) => Some(number),
            _ => None,
        };
        (id, Kind::Change { id, mode })
    }

    fn new_write(&mut self, world: &mut World, max: u64) -> (Kind, Option<Memory>, Ask) {
        let range = self.choose_range(world, max);
        let value = if world.rng.random_ratio(1, 12) {
            Value::ZEROS
        } else {
            world.new_value()
        };
        let mut bytes = vec![0; (range.end - range.start) as usize * SECTOR];
        pattern::fill(&mut bytes, value, range.start);
        let memory = Memory::new(bytes);
        let ask = Ask::Write {
            start: Sector(range.start),
        };
        let (id, kind) = self.new_change(world);
        let index = world.index(&range);
        world.model.touch(id, index, value, true);
        (kind, Some(memory), ask)
    }

    fn new_zeroing(
        &mut self,
        world: &mut World,
        max: u64,
        discard: bool,
    ) -> (Kind, Option<Memory>, Ask) {
        let (id, kind) = self.new_change(world);
        let mut ranges = smallvec![];
        for _ in 0..*[1, 1, 3].choose(&mut world.rng).unwrap() {
            let range = self.choose_range(world, 2 * max);
            ranges.push(SectorRange {
                start: Sector(range.start),
                count: Sector(range.end - range.start),
            });
            self.touch_zeroed(world, id, &range, discard);
        }
        let unmap = world.rng.random();
        let ask = if discard {
            Ask::Discard { ranges }
        } else {
            Ask::WriteZeroes { ranges, unmap }
        };
        (kind, None, ask)
    }

    /// A discard makes zeros for sure only of whole clusters that become holes.
    fn touch_zeroed(
        &self,
        world: &mut World,
        id: ChangeId,
        range: &std::ops::Range<u64>,
        discard: bool,
    ) {
        let per_cluster = world.scenario.cluster / SECTOR as u64;
        let mut at = range.start;
        while at < range.end {
            let cluster = at - at % per_cluster;
            let cluster_end = (cluster + per_cluster).min(world.scenario.disk_sectors);
            let end = cluster_end.min(range.end);
            let is_whole = at == cluster && end == cluster_end;
            let certain = !discard || (is_whole && world.scenario.can_unmap());
            let index = world.index(&(at..end));
            world.model.touch(id, index, Value::ZEROS, certain);
            at = end;
        }
    }

    fn poll_queue(&mut self, world: &mut World, queue: usize) -> Result<(), Failure> {
        let alarm = self.runners.len() + 1 + queue;
        let is_woken = !self.queues[queue].is_asleep() || self.queues[queue].has_ready();
        if !is_woken && !self.has_alarm(world, alarm) {
            return Ok(());
        }
        let mut done = Vec::new();
        self.queues[queue].poll(&mut done);
        self.queues[queue].may_sleep();
        self.alarms[alarm].at = None;
        if !world.disk.is_powered() {
            // What ends from now on ends for want of power.
            return Ok(());
        }
        for done in done {
            self.end(world, queue, &done)?;
        }
        Ok(())
    }

    fn end(&mut self, world: &mut World, queue: usize, done: &Done) -> Result<(), Failure> {
        let tag = done.tag;
        world.disk.note(|| format!("{tag} ends: {:?}", done.result));
        let request = self
            .requests
            .remove(&tag)
            .filter(|request| request.queue == queue)
            .ok_or_else(|| format!("I10: request {tag} ends twice, or on another queue"))?;
        if let Err(error) = done.result {
            self.sync_failed |= error == EngineError::SyncFailed;
            if !self.trouble.explains(error) {
                return Err(format!("I10: request {tag} failed for no reason: {error}"));
            }
        } else if request.held.is_some() && request.held == self.suspension.number() {
            return Err(format!("S22: request {tag} was done while suspended"));
        }
        let good = done.result.is_ok();
        match request.kind {
            Kind::Read { read, first } if good => {
                let bytes = request.memory.map(|memory| memory.to_vec());
                let bytes = bytes.unwrap_or_default();
                let offset = world.scenario.layout.index(first).unwrap_or(0);
                let found = |index: u64| {
                    let at = (index - offset) as usize;
                    pattern::tell(&bytes[at * SECTOR..][..SECTOR], first + at as u64)
                };
                world
                    .model
                    .end_read(&read, found)
                    .map_err(|wrong| format!("read {tag} from sector {first} on: {wrong:?}"))?;
            }
            Kind::Read { .. } => {}
            Kind::Change { id, mode } => {
                let on = matches!(self.write_through, WriteThrough::On(now) if Some(now) == mode);
                world.model.end(id, good, on);
                world.cases.count_if(Case::WriteThrough, good && on);
            }
            Kind::Flush { .. } if good && request.after_failed_sync => {
                return Err(format!(
                    "I7: flush {tag} came after a failed sync and succeeded"
                ));
            }
            Kind::Flush { flush, has_work } if good => {
                world.model.end_flush(&flush);
                world.cases.count_if(Case::Flush, has_work);
            }
            Kind::Flush { .. } => world.cases.count(Case::FailedFlush),
        }
        Ok(())
    }

    // --- the metadata thread, and what it was asked for ---

    fn poll_md(&mut self, world: &mut World) -> Result<(), Failure> {
        let alarm = self.runners.len();
        if self.md.is_asleep() && !self.has_alarm(world, alarm) {
            return Ok(());
        }
        let after = self.md.poll(self.now);
        self.alarms[alarm].at = after.map(|after| self.now + after);
        world
            .cases
            .look_at_metadata(&world.disk, &world.scenario, &self.engine)
    }

    /// Whether an actor that nothing woke wants to be polled.
    fn has_alarm(&self, world: &World, alarm: usize) -> bool {
        let Alarm { io, at } = &self.alarms[alarm];
        !self.is_lazy || at.is_some_and(|at| at <= self.now) || world.disk.has_completions(*io)
    }

    fn poll_runner(&mut self, world: &World, runner: usize) {
        if self.runners[runner].is_asleep() && !self.has_alarm(world, runner) {
            return;
        }
        let after = self.runners[runner].poll(self.now);
        self.alarms[runner].at = after.map(|after| self.now + after);
    }

    fn give_up(&mut self, queue: usize) {
        self.trouble.space = true;
        self.queues[queue].give_up_parked();
    }

    fn toggle_write_through(&mut self, world: &mut World) {
        match self.write_through {
            WriteThrough::Off => {
                let flush = world.model.begin_flush();
                if let Some(outcome) = self.engine.begin_write_through(true) {
                    self.write_through = WriteThrough::Turning { outcome, flush };
                }
            }
            WriteThrough::Turning { .. } => {}
            WriteThrough::On(_) => {
                self.engine.begin_write_through(false);
                self.write_through = WriteThrough::Off;
            }
        }
    }

    fn toggle_suspension(&mut self, world: &mut World) {
        match self.suspension {
            Suspension::No => {
                self.suspension = Suspension::Under(self.quiesce(world, Control::Suspend));
            }
            Suspension::Under(_) => {}
            Suspension::Yes(_) => {
                self.engine.resume();
                self.suspension = Suspension::No;
            }
        }
    }

    fn quiesce(&self, world: &mut World, what: Control) -> Quiesce {
        world.disk.note(|| format!("{what:?} begins"));
        Quiesce {
            flush: world.model.begin_flush(),
            outcome: self.engine.control(what),
        }
    }

    fn hear_controls(&mut self, world: &mut World) -> Result<(), Failure> {
        if !world.disk.is_powered() {
            return Ok(());
        }
        if let WriteThrough::Turning { outcome, flush } = &self.write_through
            && let Some(result) = outcome.get()
        {
            self.judge(world, "write-through", flush, result)?;
            self.times_on += 1;
            self.write_through = WriteThrough::On(self.times_on);
        }
        if let Suspension::Under(quiesce) = &self.suspension
            && let Some(result) = quiesce.outcome.get()
        {
            self.judge(world, "suspend", &quiesce.flush, result)?;
            self.times_suspended += 1;
            self.suspension = Suspension::Yes(self.times_suspended);
        }
        Ok(())
    }

    fn judge(
        &self,
        world: &mut World,
        what: &str,
        flush: &Flush,
        result: Result<(), EngineError>,
    ) -> Result<(), Failure> {
        world.disk.note(|| format!("{what}: {result:?}"));
        match result {
            Ok(()) => world.model.end_flush(flush),
            // The mark is written when the image is closed.
            Err(EngineError::Io(Errno::NOSPC)) if self.trouble.space_for_metadata => {}
            Err(error) if !self.trouble.explains(error) => {
                return Err(format!("I10: {what} failed for no reason: {error}"));
            }
            Err(_) => {}
        }
        Ok(())
    }

    // --- ends ---

    /// Every actor and the host get a turn until `is_over`, or the power goes.
    pub(super) fn turn_until(
        &mut self,
        world: &mut World,
        what: &str,
        is_over: impl Fn(&Self) -> bool,
    ) -> Result<(), Failure> {
        for turn in 0..PATIENCE {
            if is_over(self) || !world.disk.is_powered() {
                return Ok(());
            }
            for queue in 0..self.queues.len() {
                self.queues[queue].submit();
                self.poll_queue(world, queue)?;
            }
            for runner in 0..self.runners.len() {
                self.poll_runner(world, runner);
            }
            self.poll_md(world)?;
            self.hear_controls(world)?;
            world.disk.step();
            if turn % 64 == 0 {
                self.now += Duration::from_millis(10);
            }
        }
        Err(format!("I10: {what} hangs; {}", self.describe_hang(world)))
    }

    fn describe_hang(&self, world: &World) -> String {
        let tags: Vec<_> = self.requests.keys().collect();
        let held: Vec<_> = self.queues.iter().map(Queue::held).collect();
        let asleep: Vec<_> = self.runners.iter().map(Runner::is_asleep).collect();
        let alarms: Vec<_> = self.alarms.iter().map(|alarm| alarm.at).collect();
        format!(
            "under way: {tags:?}, held: {held:?}, runners asleep: {asleep:?}, md asleep: {}, alarms: {alarms:?} at {:?}, host busy: {}",
            self.md.is_asleep(),
            self.now,
            world.disk.is_busy()
        )
    }

    /// Waits for every request; parked ones have to end.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn drain(&mut self, world: &mut World) -> Result<(), Failure> {
        self.turn_until(world, "suspend", |session| {
            !matches!(session.suspension, Suspension::Under(_))
        })?;
        if self.suspension.number().is_some() {
            self.toggle_suspension(world);
        }
        let is_tight = world.disk.is_tight();
        // A write may find only now that there is no space.
        for _ in 0..PATIENCE {
            let in_flight = self.requests.len();
            if in_flight == 0 || !world.disk.is_powered() {
                return Ok(());
            }
            if is_tight {
                (0..self.queues.len()).for_each(|queue| self.give_up(queue));
            }
            let give_up_again_at = self.now + Duration::from_millis(50);
            self.turn_until(world, "a request", |session| {
                let is_late = is_tight && session.now > give_up_again_at;
                session.requests.len() < in_flight || is_late
            })?;
        }
        Err(format!(
            "I10: parked requests do not end; {}",
            self.describe_hang(world)
        ))
    }

    /// Closes the image.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn close(&mut self, world: &mut World) -> Result<Closed, Failure> {
        self.drain(world)?;
        self.turn_until(world, "write-through", |session| {
            !matches!(session.write_through, WriteThrough::Turning { .. })
        })?;
        if !world.disk.is_powered() {
            return Ok(Closed::Cut);
        }
        self.queues.clear();
        let close = self.quiesce(world, Control::Close);
        self.turn_until(world, "close", |_| close.outcome.get().is_some())?;
        let Some(result) = close.outcome.get().filter(|_| world.disk.is_powered()) else {
            return Ok(Closed::Cut);
        };
        self.judge(world, "close", &close.flush, result)?;
        Ok(if result.is_ok() {
            Closed::Well
        } else {
            Closed::Badly
        })
    }

    /// The power is gone, or the process: lets go of everything. What is given back is
    /// the guest's: its requests, whose memory must go last.
    pub fn abandon(mut self) -> BTreeMap<u64, InFlight> {
        self.engine.abandon();
        self.queues.clear();
        drop(self.md);
        self.runners.clear();
        drop(self.fuse);
        drop(self.engine);
        self.requests
    }
}

/// How [`Session::close`] went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The power went before it was over.
    Cut,
    /// The image is closed.
    Well,
    /// The engine said that it could not.
    Badly,
}

impl World {
    fn index(&self, range: &std::ops::Range<u64>) -> std::ops::Range<u64> {
        let start = self.scenario.layout.index(range.start);
        let start = start.expect("requests stay inside an island");
        start..start + range.end - range.start
    }
}

fn random_piece(rng: &mut SmallRng) -> usize {
    *[512, 1536, 4096, usize::MAX].choose(rng).unwrap()
}

fn describe(command: &Command) -> String {
    match command {
        Command::Read { start, data } => format!("read {}+{}", start.0, data.len() / SECTOR),
        Command::Write { start, data } => format!("write {}+{}", start.0, data.len() / SECTOR),
        other => format!("{other:?}"),
    }
}
