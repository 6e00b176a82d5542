//! The process dies, and nothing else: the host keeps everything, stable or not, and
//! may still do what was submitted. The guest lives on, with what it was told, and
//! asks the next process for what was not answered (I13).

use rand::Rng;

use super::cases::Case;
use super::scenario::Profile;
use super::session::{Failure, InFlight, Session, World, WriteThrough};
use crate::ploop::{Engine, OnEnospc, Opened, Options};
use crate::sim::disk::{Faults, SimDisk};
use crate::storage::SharedWords;

/// Changes and syncs of the host's files, at most, until the power goes while the next
/// process takes over.
const CHANGES_MAX: u64 = 30;

/// What every process of a session needs.
pub struct Heritage {
    /// Held by the front-end.
    pub memory: SharedWords,
    /// How the image is opened.
    pub options: Options,
}

impl Heritage {
    /// New memory for the image that a first process has opened.
    pub fn new(engine: &Engine<SimDisk>, options: &Options) -> Self {
        let words = engine.remembered_len() as usize / size_of::<u64>();
        let memory = SharedWords::new(words).expect("there is memory");
        let heritage = Self {
            memory,
            options: options.clone(),
        };
        let memory = heritage.again(engine);
        engine.remember_in(memory).expect("the memory fits");
        heritage
    }

    /// The memory as it comes back: as long as the engine wants it.
    fn again(&self, engine: &Engine<SimDisk>) -> SharedWords {
        let words = engine.remembered_len() as usize / size_of::<u64>();
        self.memory.with_len(words).expect("there is memory")
    }

    /// The process is killed; another one takes over, and has answered everything that
    /// the last one had not when this returns, unless the power has gone. Gives the
    /// session back as it was if what the process knows cannot be known by another.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn pass_on(
        &mut self,
        mut session: Session,
        world: &mut World,
        profile: &Profile,
        policy: OnEnospc,
    ) -> Result<Session, Failure> {
        match world.relic.take() {
            Some(relic) => self.memory = relic,
            None if world.disk.has_unheard_failure() => return Ok(session),
            // It could not be marked as in use again: who comes next has to refuse the guest.
            None if session.is_unmarked(world)? => return Ok(session),
            None => {}
        }
        world.cases.count(Case::Killed);
        world.cases.count_if(Case::LargerKilled, world.is_growing);
        world.is_growing = false;
        let is_snapshotting = std::mem::take(&mut world.is_snapshotting);
        world.cases.count_if(Case::SnapshotKilled, is_snapshotting);
        let is_merging = std::mem::take(&mut world.is_merging);
        world.cases.count_if(Case::MergeKilled, is_merging);
        let faults = profile.faults;
        world.disk.kill();
        let mut will = Will::of(&mut session);
        will.requests = session.abandon();
        if Engine::<SimDisk>::is_settled_in(&self.memory) {
            will.forget_failed_sync();
        }
        if world.is_either {
            // Who opens it makes its name stable.
            world.adopt_new_top()?;
        }
        world.find_gone(false)?;
        let top = world.scenario.top();
        world
            .disk
            .change_medium(|medium| medium.first_writable = top);
        let mut opened = self.open(world)?;
        if world.rng.random_ratio(1, 4) {
            // Again, before it has taken over.
            opened.engine.abandon();
            world.disk.kill();
            drop(opened);
            opened = self.open(world)?;
        }
        world.disk.change_medium(|medium| medium.faults = faults);
        world.see_size(&opened.engine)?;
        if !profile.read_only {
            // The image was not closed, so it has none.
            world.bitmaps.end();
            world.bitmaps.are_loaded(&opened.engine, false)?;
        }
        let before = opened.engine.mapped_here();
        opened
            .engine
            .take_over(self.again(&opened.engine))
            .map_err(|error| format!("I13: nothing is taken over: {error}"))?;
        let changed = opened.engine.mapped_here() != before;
        world.cases.count_if(Case::TakenOver, changed);
        let mut session = Session::new(opened, world, profile, policy);
        // Everything that is asked again is answered before anything new is asked.
        session.is_ending = true;
        let executed = will.execute(&mut session, world);
        if world.rng.random_ratio(1, 6) {
            let changes = world.rng.random_range(0..CHANGES_MAX);
            world.disk.cut_after(Some(changes));
        }
        match executed.and_then(|()| session.catch_up(world)) {
            Ok(()) => {
                session.is_ending = false;
                Ok(session)
            }
            Err(failure) => {
                // Else what is in flight would be waited for.
                world.disk.power_off();
                session.abandon();
                Err(failure)
            }
        }
    }

    fn open(&self, world: &mut World) -> Result<Opened<SimDisk>, Failure> {
        world.disk.restart();
        // On a full disk that needs space to overwrite, opening fails until there is some.
        let mut capacity = None;
        world.disk.change_medium(|medium| {
            medium.faults = Faults::default();
            capacity = medium.capacity.take();
        });
        world.cases.begin(&world.disk, &world.scenario);
        let chain = world.scenario.chain();
        let opened = Engine::open(world.disk.clone(), &chain, self.options.clone());
        world
            .disk
            .change_medium(|medium| medium.capacity = capacity);
        opened.map_err(|error| format!("I13: the image is not opened again: {error}"))
    }
}

/// What the guest knows, and goes on with.
struct Will {
    requests: std::collections::BTreeMap<u64, InFlight>,
    next_tag: u64,
    write_through: WriteThrough,
    times_on: u32,
    times_suspended: u32,
    trouble: super::session::Trouble,
    sync_failed: bool,
}

impl Will {
    fn of(session: &mut Session) -> Self {
        Self {
            requests: Default::default(),
            next_tag: session.next_tag,
            write_through: std::mem::replace(&mut session.write_through, WriteThrough::Off),
            times_on: session.times_on,
            times_suspended: session.times_suspended,
            trouble: session.trouble,
            sync_failed: session.sync_failed,
        }
    }

    /// It failed when the disk had everything, and nothing was written since: for the next
    /// process it is as if the image had been closed.
    fn forget_failed_sync(&mut self) {
        self.sync_failed = false;
        for request in self.requests.values_mut() {
            request.after_failed_sync = false;
        }
    }

    fn execute(self, session: &mut Session, world: &mut World) -> Result<(), Failure> {
        session.requests = self.requests;
        session.next_tag = self.next_tag;
        session.times_on = self.times_on;
        session.times_suspended = self.times_suspended;
        session.trouble = self.trouble;
        session.sync_failed = self.sync_failed;
        // As the device does before a ring starts.
        session.write_through = match self.write_through {
            WriteThrough::Off => WriteThrough::Off,
            WriteThrough::Turning { flush, .. } => match session.engine.begin_write_through(true) {
                Some(outcome) => WriteThrough::Turning { outcome, flush },
                None => WriteThrough::Off,
            },
            WriteThrough::On(number) => {
                session.engine.begin_write_through(true);
                WriteThrough::On(number)
            }
        };
        let tags: Vec<u64> = session.requests.keys().copied().collect();
        for tag in tags {
            if let Some(request) = session.requests.get_mut(&tag) {
                request.held = None;
                // The next process knows nothing of it.
                request.after_failed_page = None;
                session.ask(world, tag)?;
            }
        }
        Ok(())
    }
}

impl Session {
    /// Everything that was asked again is answered. Then the whole disk is read.
    fn catch_up(&mut self, world: &mut World) -> Result<(), Failure> {
        self.drain(world)?;
        if !world.disk.is_powered() {
            return Ok(());
        }
        let size = world.scenario.disk_sectors;
        for island in world.scenario.layout.islands_within(size) {
            let read = self.new_read(world, &island);
            let queue = world.rng.random_range(0..self.queue_count());
            self.give(world, queue, read)?;
        }
        self.drain(world)
    }
}
