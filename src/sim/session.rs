//! One opening of an image: the engine's actors, the requests that are under way,
//! and what the model hears of them.

mod growth;
mod requests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rustix::io::Errno;

use super::bitmap::Bitmaps;
use super::cases::Cases;
use super::checker::Image;
use super::compaction::Compacting;
use super::disk::{Faults, SimDisk};
use super::file::SECTOR;
use super::judge::{Before, Cuts};
use super::lift::Changing;
use super::merge::{Gone, Merge};
use super::model::{Flush, Model};
use super::scenario::{Action, Profile, Scenario};
use super::shot::Shot;
use super::stage::{self, Stage};
use crate::ploop::control::{Control, Outcome};
use crate::ploop::preempt;
use crate::ploop::{Engine, EngineError, MdWriter, OnEnospc, Opened, Queue, Runner};
use crate::storage::SharedWords;

use self::growth::Larger;
pub use self::requests::{Ask, InFlight};

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
    /// How often what a cut leaves was judged.
    pub cuts: Cuts,
    /// The deltas below the top, base first: nobody changes them, but for those that are
    /// [`Self::changing`].
    pub lower: Vec<Image>,
    /// Levels that get what others have.
    pub changing: Vec<Changing>,
    /// See there.
    pub before: Before,
    /// Those of the top.
    pub bitmaps: Bitmaps,
    /// Sizes of which the disk of the top has one, in sectors.
    pub sizes: Vec<u64>,
    /// Lengths that a raw top may have while it grows, or after a cut.
    pub raw_lens: Vec<u64>,
    /// The disk is becoming larger.
    pub is_growing: bool,
    /// A snapshot is being made.
    pub is_snapshotting: bool,
    /// A level is about to go.
    pub is_merging: bool,
    /// One has, as far as the descriptor is concerned.
    pub gone: Option<Gone>,
    /// Space is being given back.
    pub is_compacting: bool,
    /// The memory that outlives the process, if that may die in the midst of a step.
    pub mortal: Option<SharedWords>,
    /// It has died so, and this is what was in that memory.
    pub relic: Option<SharedWords>,
    /// There is a new top, and a cut may leave the descriptor that names it or the old one.
    pub is_either: bool,
    /// Every write has another.
    pub next_value: u64,
}

impl World {
    /// The disk has this size for sure.
    pub fn set_size(&mut self, sectors: u64) {
        self.sizes = vec![sectors];
        self.use_size(sectors);
    }

    /// The disk looks as if it had this size.
    pub fn use_size(&mut self, sectors: u64) {
        self.scenario.set_size(sectors);
        if !self.scenario.is_plain_top() {
            let len = 64 + 4 * u64::from(self.scenario.top_entries());
            self.scenario.medium.metadata_len = len;
            self.disk.change_medium(|medium| medium.metadata_len = len);
            self.cases.grow(len);
        }
    }

    /// An engine was opened, which makes stable what it has found.
    ///
    /// # Errors
    /// The disk has another size than it can have.
    pub fn see_size(&mut self, engine: &Engine<SimDisk>) -> Result<(), Failure> {
        let size = engine.disk_size().0;
        if !self.scenario.is_plain_top() && !self.sizes.contains(&size) {
            return Err(format!("I12: the disk was opened with {size} sectors"));
        }
        self.set_size(size);
        Ok(())
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

/// The threads of the engine. One that is in the midst of a step is borrowed, and is
/// given no turn until it is done.
struct Actors {
    queues: RefCell<Vec<Rc<RefCell<Queue<SimDisk>>>>>,
    runners: Vec<RefCell<Runner<SimDisk>>>,
    md: RefCell<MdWriter<SimDisk>>,
}

/// Threads that are preempted at a time, at most.
const PREEMPTED_MAX: u32 = 3;

/// Turns that a request of [`Session::rush`] has to end.
const RUSH_TURNS: u32 = 60;

/// See the module's text.
pub struct Session {
    fuse: Fuse,
    /// Gives others a turn where a thread can be preempted.
    hook: preempt::Hook,
    profile: Profile,
    /// How many threads are preempted.
    preempted: u32,
    /// Nothing new is begun any more.
    pub(super) is_ending: bool,
    is_closing: bool,
    /// How often one was.
    preemptions: u32,
    /// What went wrong while one was.
    failure: Option<Failure>,
    /// Where the last request went.
    pub(super) last_range: Option<std::ops::Range<u64>>,
    pub(super) requests: BTreeMap<u64, InFlight>,
    pub(super) next_tag: u64,
    pub(super) engine: Arc<Engine<SimDisk>>,
    actors: Rc<Actors>,
    now: Duration,
    pub(super) write_through: WriteThrough,
    pub(super) times_on: u32,
    suspension: Suspension,
    larger: Larger,
    pub(super) shot: Shot,
    pub(super) merge: Merge,
    pub(super) compacting: Compacting,
    /// How many there were when it was looked at last.
    pub(super) levels: usize,
    pub(super) times_suspended: u32,
    pub(super) trouble: Trouble,
    pub(super) sync_failed: bool,
    /// A page of the BAT has failed, and no client was told of that yet.
    page_failed: Option<u32>,
    /// How often one has.
    pages_failed: u32,
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
    pub(super) space_for_metadata: bool,
    /// What waits for space fails.
    reports_space: bool,
    /// The host is full. A write in write-through to what was punched needs space; if it
    /// finds some when it is tried again, that looks like a failed sync.
    pub(super) space_in_doubt: bool,
    read_only: bool,
    /// The engine is closed while requests are under way.
    stops: bool,
}

impl Trouble {
    /// Whether calls that block may fail.
    pub(super) fn may_fail(self) -> bool {
        self.faults || self.space_in_doubt
    }

    pub(super) fn explains(self, error: EngineError) -> bool {
        match error {
            EngineError::NoSpace => self.space,
            EngineError::Metadata(Errno::NOSPC) if self.space_for_metadata => true,
            EngineError::SyncFailed if self.space_in_doubt => true,
            EngineError::Io(_) | EngineError::Metadata(_) | EngineError::SyncFailed => self.faults,
            EngineError::ReadOnly => self.read_only,
            EngineError::Stopped => self.stops,
            _ => false,
        }
    }

    /// The same of a request's end. One that needs space waits, unless it need not or must not.
    pub(super) fn explains_end(self, error: EngineError) -> bool {
        let waits = error == EngineError::Metadata(Errno::NOSPC) && !self.space;
        self.explains(error) && (!waits || self.faults)
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
            .map(|queue| Rc::new(RefCell::new(queue)))
            .collect();
        let alarms = (0..world.disk.io_count())
            .map(|io| Alarm {
                io,
                at: Some(Duration::ZERO),
            })
            .collect();
        Self {
            shot: Shot::No,
            merge: Merge::No,
            compacting: Compacting::No,
            levels: world.scenario.levels,
            fuse: Fuse {
                disk: world.disk.clone(),
                engine: opened.engine.clone(),
            },
            requests: BTreeMap::new(),
            next_tag: 0,
            engine: opened.engine,
            hook: preempt::each(stage::preempted),
            profile: profile.clone(),
            preempted: 0,
            preemptions: 0,
            is_ending: false,
            is_closing: false,
            failure: None,
            last_range: None,
            actors: Rc::new(Actors {
                queues: RefCell::new(queues),
                runners: opened.runners.into_iter().map(RefCell::new).collect(),
                md: RefCell::new(opened.md),
            }),
            now: Duration::ZERO,
            write_through: WriteThrough::Off,
            times_on: 0,
            suspension: Suspension::No,
            larger: Larger::No,
            times_suspended: 0,
            trouble: Trouble {
                faults: profile.faults != Faults::default(),
                space: profile.is_tight && policy == OnEnospc::Report,
                space_for_metadata: profile.is_tight && world.scenario.medium.copies_on_write,
                reports_space: policy == OnEnospc::Report,
                space_in_doubt: profile.is_tight,
                read_only: profile.read_only,
                stops: false,
            },
            sync_failed: false,
            page_failed: None,
            pages_failed: 0,
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
                let queue = rng.random_range(0..self.queue_count().max(1));
                self.poll_queue(world, queue)?;
            }
            Action::PollRunner => {
                let runner = rng.random_range(0..self.actors.runners.len());
                self.poll_runner(world, runner)?;
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
            Action::Grow => self.grow(world)?,
            Action::Snapshot => self.snapshot(world)?,
            Action::Merge => self.merge(world)?,
            Action::Compact => self.compact(world)?,
            Action::GiveUp => {
                let queue = rng.random_range(0..self.queue_count());
                self.give_up(queue);
            }
            request if self.requests.len() < profile.depth => {
                self.push(world, profile.sectors, request)?;
            }
            _ => {}
        }
        self.hear_controls(world)?;
        self.imagine_cut(world)
    }

    /// Now and then the power could go here.
    fn imagine_cut(&self, world: &mut World) -> Result<(), Failure> {
        if world.rng.random_ratio(1, self.profile.imagined) {
            world.imagine_cut()?;
        }
        Ok(())
    }

    // --- threads ---

    /// Has an actor do a step, and others in the midst of it, if it is preempted.
    fn step_of<R>(&mut self, world: &mut World, step: impl FnOnce() -> R) -> Result<R, Failure> {
        let result = Stage::lend(self, world, step);
        self.failure.take().map_or(Ok(result), Err)
    }

    /// A thread is at a point where it can be preempted: others may go on.
    pub fn preempt(&mut self, world: &mut World, at: &'static str) {
        if !matches!(self.shot, Shot::No) && world.dies_at(at) {
            return;
        }
        if self.is_closing && world.rng.random_ratio(1, 8) {
            self.failure = self.failure.take().or(world.imagine_cut().err());
        }
        let Some(preemption) = self.profile.preempted else {
            return;
        };
        let is_over = self.preempted >= PREEMPTED_MAX
            || self.preemptions >= preemption.at_most
            || self.failure.is_some();
        let one_in = preemption.one_in(at);
        if is_over || !world.disk.is_powered() || !world.rng.random_ratio(1, one_in) {
            return;
        }
        self.preempted += 1;
        self.preemptions += 1;
        world.disk.note(|| format!("preempted: {at}"));
        let result = if !self.is_ending && world.rng.random_ratio(1, 4) {
            self.rush(world)
        } else {
            self.go_on(world)
        };
        if let Err(failure) = result {
            self.failure = Some(failure);
        }
        world.disk.note(|| format!("goes on: {at}"));
        self.preempted -= 1;
    }

    /// Others do anything.
    fn go_on(&mut self, world: &mut World) -> Result<(), Failure> {
        let actions = *[1, 8, 60].choose(&mut world.rng).unwrap();
        let profile = self.profile.clone();
        for _ in 0..world.rng.random_range(1..=actions) {
            if !world.disk.is_powered() {
                break;
            }
            let action = profile.choose(&mut world.rng);
            if self.is_ending && !action.is_a_turn() {
                continue;
            }
            self.act(world, &profile, action)?;
        }
        Ok(())
    }

    /// Others do as much as they can: a write to the cluster whose change the thread has
    /// not finished, or where the last request went, ends, then a flush, and then the
    /// power could go.
    fn rush(&mut self, world: &mut World) -> Result<(), Failure> {
        let sectors = self.profile.sectors;
        if let Some(cluster) = self.engine.in_the_midst() {
            let per_cluster = world.scenario.cluster / SECTOR as u64;
            let start = u64::from(cluster.0) * per_cluster;
            let islands = world.scenario.layout.islands().iter();
            // A runner's pio may have changed a cluster that ends outside.
            let mut inside = islands.filter(|island| island.contains(&start));
            if let Some(island) = inside.next() {
                self.last_range = Some(start..(start + 8).min(island.end));
            }
        }
        for action in [Action::Write, Action::Flush] {
            if !self.profile.read_only {
                self.push(world, sectors, action)?;
            }
            let last = self.next_tag - u64::from(self.next_tag > 0);
            for _ in 0..RUSH_TURNS {
                if !world.disk.is_powered() || !self.requests.contains_key(&last) {
                    break;
                }
                self.turn(world)?;
            }
        }
        world.imagine_cut()
    }

    fn held(&self) -> usize {
        let queues = self.actors.queues.borrow();
        queues.iter().map(|queue| queue.borrow().held()).sum()
    }

    /// Threads from this one on that have opened the disk are queues.
    pub(super) fn first_queue_io(&self) -> usize {
        self.actors.runners.len() + 1
    }

    pub(super) fn queue_count(&self) -> usize {
        self.actors.queues.borrow().len()
    }

    /// A queue, unless its thread is preempted or it is closed.
    fn queue(&self, queue: usize) -> Option<Rc<RefCell<Queue<SimDisk>>>> {
        let queue = self.actors.queues.borrow().get(queue)?.clone();
        let is_free = queue.try_borrow_mut().is_ok();
        is_free.then_some(queue)
    }

    // --- queues ---

    fn poll_queue(&mut self, world: &mut World, queue: usize) -> Result<(), Failure> {
        let alarm = self.actors.runners.len() + 1 + queue;
        let Some(free) = self.queue(queue) else {
            return Ok(());
        };
        let is_woken = !free.borrow().is_asleep() || free.borrow().has_ready();
        if !is_woken && !self.has_alarm(world, alarm) {
            return Ok(());
        }
        let done = self.step_of(world, || {
            let mut done = Vec::new();
            let mut queue = free.borrow_mut();
            queue.poll(&mut done);
            queue.may_sleep();
            done
        })?;
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

    // --- the metadata thread, and what it was asked for ---

    fn poll_md(&mut self, world: &mut World) -> Result<(), Failure> {
        let alarm = self.actors.runners.len();
        let actors = self.actors.clone();
        let is_asleep = match actors.md.try_borrow_mut() {
            Ok(md) => md.is_asleep(),
            Err(_) => return Ok(()),
        };
        if is_asleep && !self.has_alarm(world, alarm) {
            return Ok(());
        }
        let now = self.now;
        let after = self.step_of(world, || actors.md.borrow_mut().poll(now))?;
        self.alarms[alarm].at = after.map(|after| self.now + after);
        self.see_failed_pages(world);
        world
            .cases
            .look_at_metadata(&world.disk, &world.scenario, &self.engine)
    }

    /// The metadata thread may have heard of a page of the BAT that has failed. Who waits for
    /// space need not be told that there is none.
    fn see_failed_pages(&mut self, world: &World) {
        let failed = world.disk.take_failed_pages();
        let is_told = |errno: &Errno| *errno != Errno::NOSPC || self.trouble.reports_space;
        if failed.iter().any(is_told) {
            self.pages_failed += 1;
            self.page_failed = Some(self.pages_failed);
        }
    }

    /// Whether an actor that nothing woke wants to be polled.
    fn has_alarm(&self, world: &World, alarm: usize) -> bool {
        let Alarm { io, at } = &self.alarms[alarm];
        !self.is_lazy || at.is_some_and(|at| at <= self.now) || world.disk.has_completions(*io)
    }

    fn poll_runner(&mut self, world: &mut World, runner: usize) -> Result<(), Failure> {
        let actors = self.actors.clone();
        let is_asleep = match actors.runners[runner].try_borrow_mut() {
            Ok(runner) => runner.is_asleep(),
            Err(_) => return Ok(()),
        };
        if is_asleep && !self.has_alarm(world, runner) {
            return Ok(());
        }
        let now = self.now;
        let step = || actors.runners[runner].borrow_mut().poll(now);
        let after = self.step_of(world, step)?;
        self.alarms[runner].at = after.map(|after| self.now + after);
        Ok(())
    }

    fn give_up(&mut self, queue: usize) {
        self.trouble.space = true;
        if let Some(queue) = self.queue(queue) {
            queue.borrow_mut().give_up_parked();
        }
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

    pub(super) fn go_on_for_a_while(&mut self, world: &mut World) -> Result<(), Failure> {
        if self.preempted == 0 {
            for _ in 0..world.rng.random_range(0..40) {
                self.turn(world)?;
            }
        }
        Ok(())
    }

    pub(super) fn is_suspended(&self) -> bool {
        !matches!(self.suspension, Suspension::No)
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
        self.hear_of_growth(world)?;
        self.hear_of_snapshot(world)?;
        self.hear_of_compaction(world)?;
        if let Suspension::Under(quiesce) = &self.suspension
            && let Some(result) = quiesce.outcome.get()
        {
            self.judge(world, "suspend", &quiesce.flush, result)?;
            if result.is_ok() {
                self.change_bitmaps(world)?;
            }
            self.check_quiet(world, "suspended")?;
            self.times_suspended += 1;
            self.suspension = Suspension::Yes(self.times_suspended);
        }
        Ok(())
    }

    /// Nothing that a client has asked for is in flight on the host.
    pub(super) fn check_quiet(&self, world: &World, what: &str) -> Result<(), Failure> {
        let md = self.actors.runners.len();
        let others = (0..world.disk.io_count()).filter(|io| *io != md);
        match others.map(|io| world.disk.in_flight(io)).sum() {
            0 => Ok(()),
            busy => Err(format!("S22: {what}, and {busy} operations are in flight")),
        }
    }

    pub(super) fn judge(
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
            self.turn(world)?;
            if turn % 64 == 0 {
                self.now += Duration::from_millis(10);
            }
        }
        Err(format!("I10: {what} hangs; {}", self.describe_hang(world)))
    }

    /// Every thread that is not preempted gets a turn, and the host.
    fn turn(&mut self, world: &mut World) -> Result<(), Failure> {
        if !world.disk.is_powered() {
            return Ok(());
        }
        for queue in 0..self.queue_count() {
            if let Some(queue) = self.queue(queue) {
                queue.borrow_mut().submit();
            }
            self.poll_queue(world, queue)?;
        }
        for runner in 0..self.actors.runners.len() {
            self.poll_runner(world, runner)?;
        }
        self.poll_md(world)?;
        self.hear_controls(world)?;
        world.disk.step();
        self.imagine_cut(world)
    }

    fn describe_hang(&self, world: &World) -> String {
        let tags: Vec<_> = self.requests.keys().collect();
        let queues = self.actors.queues.borrow();
        let held: Vec<_> = queues.iter().map(|queue| queue.borrow().held()).collect();
        let runners = self.actors.runners.iter();
        let asleep: Vec<_> = runners.map(|runner| runner.borrow().is_asleep()).collect();
        let alarms: Vec<_> = self.alarms.iter().map(|alarm| alarm.at).collect();
        format!(
            "under way: {tags:?}, held: {held:?}, runners asleep: {asleep:?}, md asleep: {}, alarms: {alarms:?} at {:?}, host busy: {}",
            self.actors.md.borrow().is_asleep(),
            self.now,
            world.disk.is_busy()
        )
    }

    /// Nothing new is asked, and what was held back by a suspension goes on.
    fn take_requests_again(&mut self, world: &mut World) -> Result<(), Failure> {
        self.is_ending = true;
        self.end_snapshot(world)?;
        self.end_merge(world);
        self.turn_until(world, "suspend", |session| {
            !matches!(session.suspension, Suspension::Under(_))
        })?;
        if self.suspension.number().is_some() {
            self.toggle_suspension(world);
        }
        Ok(())
    }

    /// Waits for every request; parked ones have to end.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn drain(&mut self, world: &mut World) -> Result<(), Failure> {
        self.take_requests_again(world)?;
        let is_tight = world.disk.is_tight();
        // A write may find only now that there is no space.
        for _ in 0..PATIENCE {
            let in_flight = self.requests.len();
            if in_flight == 0 || !world.disk.is_powered() {
                return Ok(());
            }
            if is_tight {
                (0..self.queue_count()).for_each(|queue| self.give_up(queue));
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
    pub fn close(&mut self, world: &mut World, how: Control) -> Result<Closed, Failure> {
        // Queues may live on, with requests under way: these end, well or not.
        let has_queues = world.rng.random_ratio(1, 3);
        if has_queues {
            self.take_requests_again(world)?;
            self.trouble.stops = true;
        } else {
            self.drain(world)?;
        }
        self.turn_until(world, "write-through", |session| {
            !matches!(session.write_through, WriteThrough::Turning { .. })
        })?;
        if !world.disk.is_powered() {
            return Ok(Closed::Cut);
        }
        if !has_queues {
            self.actors.queues.borrow_mut().clear();
        }
        self.is_closing = true;
        let close = self.quiesce(world, how);
        self.turn_until(world, "close", |_| close.outcome.get().is_some())?;
        let Some(result) = close.outcome.get().filter(|_| world.disk.is_powered()) else {
            return Ok(Closed::Cut);
        };
        self.judge(world, "close", &close.flush, result)?;
        if result.is_ok() || !how.can_go_on() {
            // Else requests are taken again.
            self.check_quiet(world, "closed")?;
        }
        if result.is_err() && how.can_go_on() {
            // Those that wait for space are not given up then.
            world.disk.change_medium(|medium| medium.capacity = None);
        }
        // Those that were held back end with their queue.
        let is_over = |session: &Self| session.requests.len() == session.held();
        self.turn_until(world, "a request", is_over)?;
        if !world.disk.is_powered() {
            return Ok(Closed::Cut);
        }
        if result.is_ok() && self.actors.md.borrow().awaits_pages() {
            return Err("I2: freed clusters wait for a page that was written already".to_owned());
        }
        Ok(match result {
            Ok(()) if how == (Control::HandOver { trims: false }) => Closed::InHaste,
            Ok(()) => Closed::Well,
            Err(_) => Closed::Badly,
        })
    }

    /// The image could not be handed over, and is used on for a while; the host is as it should
    /// be. `false` if it cannot be closed any more.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn use_on(&mut self, world: &mut World) -> Result<bool, Failure> {
        world.disk.change_medium(|medium| {
            medium.faults = Faults::default();
            medium.capacity = None;
        });
        if !world.disk.is_powered() {
            return Ok(false);
        }
        if self.engine.report().has_sync_failed {
            world.bitmaps.are_void();
            return Ok(false);
        }
        for _ in 0..world.rng.random_range(0..6) {
            if self.queue_count() > 0 {
                self.push(world, 64, Action::Write)?;
            }
        }
        Ok(true)
    }

    /// The power is gone, or the process: lets go of everything. What is given back is
    /// the guest's: its requests, whose memory must go last.
    pub fn abandon(self) -> BTreeMap<u64, InFlight> {
        self.engine.abandon();
        drop(self.hook);
        drop(self.actors);
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
    /// The image is closed, and unused space may be behind its last cluster.
    InHaste,
    /// The engine said that it could not.
    Badly,
}
