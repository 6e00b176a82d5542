//! The thread that looks after the files of a disk while it is served: it looks whether they
//! are still what they were, and carries out what changes the disk as a whole.
//!
//! It is there from the start, since it alone may make files in the folder of the disk and put
//! a new descriptor in the place of the old one: whoever serves guests cannot even start such a
//! thread. To look at files takes no right that it has not, and no time to speak of; so that is
//! left to it, and no other thread is needed. It does one thing at a time, and looks on while a
//! growth waits. A [job](crate::served::job) it does step by step, and everything else in between.
//!
//! A look can take for ever, and what has been asked for then waits. Nobody waits for the end
//! of the thread.
//!
//! Knows threads and [`served`]; what the disk is, and who asks, it is told.

mod course;
mod task;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(super) use self::course::Activity;
use self::course::{Course, Pace};
pub(super) use self::task::{Change, Done, NewChain, Plan, Task, TaskError};
use super::jobs::Reins;
use super::question::{Answerer, Ending, Question};
use super::sandbox::KeepTo;
use super::{Error as StartError, with_causes};
use crate::format::Sector;
use crate::image::{self, Bundle, ImageError, NewSnapshot};
use crate::ploop::{BitmapAction, BitmapError, Engine, EngineError, Outcome};
use crate::served::delete::Leftover;
use crate::served::job::JobError;
use crate::served::snapshot::{self, SnapshotError};
use crate::served::{self, CallOff, GrowError};
use crate::storage::{FileWatch, HostDisk};
use crate::threads::{self, Role};

/// See the module's text. Dropped, the thread ends when it has done what it is at.
pub(super) struct Caretaker {
    orders: Sender<Order>,
    /// The disk is written to.
    can_change: bool,
}

enum Order {
    /// Look at these from now on, and at no others.
    Watch(FileWatch),
    /// The image was opened anew, or is not open: others may have changed its bundle.
    ReadBundle,
    /// Others may have changed what of it is no part of the disk.
    CatchUp,
    /// Why the disk may not become larger, if there is such a reason.
    Hides(Option<ImageError>),
    Do(Errand),
    /// There is nothing else under way.
    Begin(Course),
    /// Something else is wanted of what is under way.
    Look,
    ListSnapshots(Answerer),
    ChangeBitmaps(Weak<Engine<HostDisk>>, Vec<BitmapAction>, Answerer),
}

struct Errand {
    /// Dropped last, whatever happens.
    ending: Ending,
    /// Whoever closes the image meanwhile calls it off.
    engine: Weak<Engine<HostDisk>>,
    task: Task,
    call_off: Arc<CallOff>,
    new_chain: NewChain,
    tell: SyncSender<Result<Done, TaskError>>,
}

impl Caretaker {
    /// Starts the thread, which gives up all but `keeps`. `bundle` is what the disk belongs
    /// to, if to any; `hidden` is why it may not become larger, if there is such a reason.
    ///
    /// # Errors
    /// When there can be no more threads, or this one could not be restricted.
    pub fn start(
        bundle: Option<Bundle>,
        hidden: Option<ImageError>,
        keeps: KeepTo,
    ) -> Result<Self, StartError> {
        let hidden = hidden.map(Arc::new);
        let disk = Kept {
            bundle,
            hidden,
            leftovers: Vec::new(),
        };
        Ok(Self {
            orders: start(Role::Caretaker, disk, keeps)?,
            can_change: true,
        })
    }

    /// Starts one that looks at files and does nothing else.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn start_watching() -> Result<Self, StartError> {
        Ok(Self {
            orders: start(Role::Watch, Kept::default(), KeepTo::what_all_have())?,
            can_change: false,
        })
    }

    /// Has these files looked at, and no others any more.
    pub fn watch(&self, files: FileWatch) {
        if self.orders.send(Order::Watch(files)).is_err() {
            log::error!("the image files are no longer watched");
        }
    }

    /// Has the snapshots of the disk looked up. Returns at once.
    ///
    /// # Errors
    /// In words: the disk is only read, or there are no more descriptors.
    pub fn list_snapshots(&self) -> Result<Question, String> {
        if !self.can_change {
            return Err("a process that only reads a disk does not know its snapshots".to_owned());
        }
        let (question, answerer) = Question::new().map_err(|error| error.to_string())?;
        // If the thread has ended, the question says so.
        let _ = self.orders.send(Order::ListSnapshots(answerer));
        Ok(question)
    }

    /// Has all of this done to the dirty bitmaps of this engine's disk, at one moment, between
    /// steps of a job. Returns at once.
    ///
    /// # Errors
    /// In words: the disk is only read, or there are no more descriptors.
    pub fn change_bitmaps(
        &self,
        engine: &Arc<Engine<HostDisk>>,
        actions: Vec<BitmapAction>,
    ) -> Result<Question, String> {
        if !self.can_change {
            return Err(EngineError::ReadOnly.to_string());
        }
        let (question, answerer) = Question::new().map_err(|error| error.to_string())?;
        // If the thread has ended, the question says so.
        let order = Order::ChangeBitmaps(Arc::downgrade(engine), actions, answerer);
        let _ = self.orders.send(order);
        Ok(question)
    }

    /// Others may have changed the bundle of the disk, which is not open here, or was not.
    pub fn read_bundle_anew(&self) {
        self.tell(Order::ReadBundle);
    }

    /// Another process has served the disk since the bundle was read, of whose images nothing has
    /// changed.
    pub fn catch_up(&self) {
        self.tell(Order::CatchUp);
    }

    /// The image was opened anew; `hidden` is why its disk may not become larger now, if there
    /// is such a reason.
    pub fn image_opened(&self, hidden: Option<ImageError>) {
        self.tell(Order::ReadBundle);
        self.tell(Order::Hides(hidden));
    }

    fn tell(&self, order: Order) {
        if self.orders.send(order).is_err() {
            log::error!("the disk cannot be changed any more: a thread has failed");
        }
    }

    /// Has something done to the disk of this engine. Returns at once.
    ///
    /// # Errors
    /// It is only read, there are no more descriptors, or the thread has ended.
    pub fn begin(
        &self,
        engine: &Arc<Engine<HostDisk>>,
        task: Task,
    ) -> Result<Operation, TaskError> {
        if !self.can_change {
            return Err(match task {
                Task::Grow(_) => GrowError::Engine(EngineError::ReadOnly).into(),
                Task::Snapshot { .. } => TaskError::ReadOnly,
                Task::Job(_) => JobError::Engine(EngineError::ReadOnly).into(),
            });
        }
        let is_over = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let (tell, result) = sync_channel(1);
        let stop = Stop {
            engine: Arc::downgrade(engine),
            call_off: Arc::default(),
            tether: None,
            is_over: Arc::clone(&is_over),
            new_chain: NewChain::default(),
        };
        let errand = Errand {
            ending: Ending(is_over),
            engine: Arc::downgrade(engine),
            task: task.clone(),
            call_off: Arc::clone(&stop.call_off),
            new_chain: stop.new_chain.clone(),
            tell,
        };
        let operation = Operation { stop, task, result };
        let sent = self.orders.send(Order::Do(errand));
        sent.map_err(|_| TaskError::Gone)?;
        Ok(operation)
    }

    /// Has a job done on the disk of this engine, held by these reins. `activity` is what the
    /// guest does meanwhile. Returns at once.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub fn begin_job(
        &self,
        engine: &Arc<Engine<HostDisk>>,
        (plan, reins): (Plan, Arc<Reins>),
        activity: Activity,
    ) -> Result<Operation, TaskError> {
        if !self.can_change {
            return Err(JobError::Engine(EngineError::ReadOnly).into());
        }
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Arc::new);
        let (is_over, changed) = (event()?, event()?);
        let (tell, result) = sync_channel(1);
        let new_chain = NewChain::default();
        let course = Course {
            ending: Ending(Arc::clone(&is_over)),
            engine: Arc::downgrade(engine),
            job: plan.job(),
            reins: Arc::clone(&reins),
            changed: Arc::clone(&changed),
            new_chain: new_chain.clone(),
            tell,
            pace: Pace::new(activity),
        };
        let sent = self.orders.send(Order::Begin(course));
        sent.map_err(|_| TaskError::Gone)?;
        let stop = Stop {
            engine: Arc::downgrade(engine),
            call_off: Arc::default(),
            tether: Some(Tether {
                reins,
                changed,
                orders: self.orders.clone(),
            }),
            is_over,
            new_chain,
        };
        Ok(Operation {
            stop,
            task: Task::Job(plan),
            result,
        })
    }
}

/// How often who waits for the end of an operation looks whether the image is lost.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Between two times that some space of a deleted snapshot is given back.
const REST: Duration = Duration::from_millis(5);

/// What the thread knows of the disk.
#[derive(Default)]
struct Kept {
    bundle: Option<Bundle>,
    hidden: Option<Arc<ImageError>>,
    /// Of snapshots that were deleted. When the process ends, their space comes back in any case.
    leftovers: Vec<Leftover>,
}

impl Kept {
    /// When more space of deleted snapshots can be given back.
    fn time_to_give_back(&self) -> Option<Duration> {
        (!self.leftovers.is_empty()).then_some(REST)
    }

    fn give_back_some(&mut self) {
        let Some(leftover) = self.leftovers.last() else {
            return;
        };
        let has_more = leftover.give_back_some().unwrap_or_else(|error| {
            log::warn!("a deleted snapshot keeps its space until the disk is closed: {error}");
            false
        });
        if !has_more {
            self.leftovers.pop();
        }
    }

    fn read_bundle(&mut self) {
        let read = self.bundle.as_mut().map_or(Ok(()), Bundle::read_anew);
        if let Err(error) = read {
            log::error!("the disk cannot be changed: {}", with_causes(&error));
        }
    }

    fn catch_up(&mut self) {
        let read = self.bundle.as_mut().map_or(Ok(()), Bundle::catch_up);
        if let Err(error) = read {
            log::error!("the disk cannot be changed: {}", with_causes(&error));
        }
    }

    /// As `ploop-img snapshot list --output json` shows them.
    fn list_snapshots(&mut self) -> Result<Value, String> {
        let bundle = self.bundle.as_mut();
        let bundle = bundle.ok_or("the disk is a bare image, which has no snapshots")?;
        let list = bundle.refresh().and_then(|()| image::list_of(bundle));
        let list = list.map_err(|error| with_causes(&error))?;
        serde_json::to_value(list).map_err(|error| error.to_string())
    }

    fn grow(
        &mut self,
        engine: &Engine<HostDisk>,
        size: Sector,
        call_off: &CallOff,
        rounds: &mut Rounds,
    ) -> Result<Sector, TaskError> {
        if let Some(hidden) = &self.hidden
            && size > engine.disk_size()
        {
            return Err(TaskError::Hidden(Arc::clone(hidden)));
        }
        let wait = |outcome: &Outcome| rounds.wait_for(outcome);
        let bundle = self.bundle.as_mut();
        Ok(served::grow_beside(engine, bundle, size, call_off, wait)?)
    }

    fn make_snapshot(
        &mut self,
        engine: &Engine<HostDisk>,
        (new, is_unique, bitmaps): (&NewSnapshot, bool, &[BitmapAction]),
        call_off: &CallOff,
        new_chain: &NewChain,
    ) -> Result<Done, TaskError> {
        let bundle = self.bundle.as_mut().ok_or(TaskError::NoBundle)?;
        if is_unique && let Some(name) = &new.description {
            let refreshed = bundle.refresh();
            let is_taken = refreshed.and_then(|()| image::is_described(bundle, name));
            if is_taken.map_err(TaskError::Names)? {
                return Err(TaskError::NameTaken(name.clone()));
            }
        }
        let (created, doubt) = match snapshot::create(engine, bundle, (new, bitmaps), call_off) {
            Ok(created) => (Box::new(created), None),
            // The disk has another top all the same.
            Err(error) => {
                let doubt = Some(with_causes(&error));
                match error {
                    SnapshotError::Unstable { created, .. } => (created, doubt),
                    error => return Err(error.into()),
                }
            }
        };
        // What lies just below the top now says itself how much of what is below it is of the disk, and
        // a raw image was cut to the disk.
        self.hidden = None;
        let guid = created.guid;
        new_chain.put(Change::Top(created));
        Ok(Done::Snapshot {
            guid,
            new_chain: new_chain.clone(),
            doubt,
        })
    }
}

fn start(role: Role, disk: Kept, keeps: KeepTo) -> Result<Sender<Order>, StartError> {
    let (orders, take) = channel();
    let (tell, told) = sync_channel(1);
    threads::start(role, "watch", move || {
        let kept = keeps.apply();
        let goes_on = kept.is_ok();
        // Who has started it waits for this.
        let _ = tell.send(kept);
        if goes_on {
            work(&take, disk);
        }
    })
    .map_err(StartError::Setup)?;
    let kept = told
        .recv()
        .map_err(|gone| StartError::Setup(io::Error::other(gone)))?;
    kept?;
    Ok(orders)
}

fn work(orders: &Receiver<Order>, mut disk: Kept) {
    let mut rounds = Rounds::default();
    let mut course: Option<Course> = None;
    loop {
        let until_step = course.as_ref().and_then(Course::time_left);
        let until_space = disk.time_to_give_back();
        let times = [rounds.time_left(), until_step, until_space];
        let order = match times.into_iter().flatten().min() {
            Some(time) => orders.recv_timeout(time),
            None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match order {
            Ok(Order::Watch(files)) => rounds = Rounds::of(files),
            Ok(Order::ReadBundle) => disk.read_bundle(),
            Ok(Order::CatchUp) => disk.catch_up(),
            Ok(Order::Hides(hidden)) => disk.hidden = hidden.map(Arc::new),
            Ok(Order::Do(errand)) => errand.carry_out(&mut disk, &mut rounds),
            Ok(Order::Begin(begun)) => course = Some(begun),
            Ok(Order::ListSnapshots(answerer)) => answerer.answer(disk.list_snapshots()),
            Ok(Order::ChangeBitmaps(engine, actions, answerer)) => {
                answerer.answer(change_bitmaps(&engine, &actions));
            }
            Ok(Order::Look) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        course = course.and_then(|course| course.go_on(&mut disk));
        disk.give_back_some();
    }
}

fn change_bitmaps(
    engine: &Weak<Engine<HostDisk>>,
    actions: &[BitmapAction],
) -> Result<Value, String> {
    // The image was closed since, perhaps.
    let engine = engine.upgrade().ok_or(EngineError::Stopped);
    let changed = engine
        .map_err(BitmapError::from)
        .and_then(|engine| engine.change_bitmaps(actions));
    match changed {
        Ok(()) => Ok(json!({})),
        Err(error) => Err(with_causes(&error)),
    }
}

/// Looks at files, each at its time.
#[derive(Default)]
struct Rounds {
    files: Option<FileWatch>,
    /// When the next look is due.
    next: Option<Instant>,
}

impl Rounds {
    fn of(files: FileWatch) -> Self {
        let mut rounds = Self {
            files: Some(files),
            next: None,
        };
        rounds.plan();
        rounds
    }

    fn plan(&mut self) {
        let pause = self.files.as_ref().and_then(FileWatch::pause);
        self.next = pause.map(|pause| Instant::now() + pause);
    }

    /// Until the next look, if there is to be one. One that is due is taken before.
    fn time_left(&mut self) -> Option<Duration> {
        if let Some(files) = &mut self.files
            && self.next.is_some_and(|next| next <= Instant::now())
        {
            files.look();
            self.plan();
        }
        let next = self.next?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Looks until this is over.
    fn wait_for(&mut self, outcome: &Outcome) -> Result<(), EngineError> {
        loop {
            match self.time_left() {
                Some(time) => {
                    if let Some(result) = outcome.wait_for(time) {
                        return result;
                    }
                }
                None => return outcome.wait(),
            }
        }
    }
}

impl Errand {
    fn carry_out(self, disk: &mut Kept, rounds: &mut Rounds) {
        let Self {
            ending: _ending,
            engine,
            task,
            call_off,
            new_chain,
            tell,
        } = self;
        let engine = engine.upgrade();
        let result = match (&task, &engine) {
            // The image was closed since.
            (_, None) => Err(task.called_off()),
            (Task::Grow(size), Some(engine)) => {
                let grown = disk.grow(engine, *size, &call_off, rounds);
                grown.map(Done::Grown)
            }
            (
                Task::Snapshot {
                    new,
                    is_unique,
                    bitmaps,
                },
                Some(engine),
            ) => disk.make_snapshot(engine, (new, *is_unique, bitmaps), &call_off, &new_chain),
            // That is begun in another way.
            (Task::Job(_), _) => Err(TaskError::Gone),
        };
        // Who hears of the end may close the image.
        drop(engine);
        // Nobody may wait for it any more.
        let _ = tell.send(result);
    }
}

/// Something that is being done. Its descriptor is readable when it is over.
pub(super) struct Operation {
    stop: Stop,
    task: Task,
    result: Receiver<Result<Done, TaskError>>,
}

/// By which a job is held.
#[derive(Clone)]
struct Tether {
    reins: Arc<Reins>,
    changed: Arc<EventFd>,
    orders: Sender<Order>,
}

impl Tether {
    /// Whoever runs it looks what is wanted of it.
    fn look(&self) {
        // If the thread has ended, so has the job.
        let _ = self.orders.send(Order::Look);
    }
}

impl Operation {
    /// What is being done.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// It is to end soon, well or not. Returns at once: `true` if it has ended, and came to
    /// nothing.
    pub fn call_off(&self) -> bool {
        self.stop.call_off()
    }

    /// Something else is wanted of a job by its reins.
    pub fn look(&self) {
        if let Some(tether) = &self.stop.tether {
            tether.look();
        }
    }

    /// What is readable when the status of a job may have changed.
    pub fn changed(&self) -> Option<&EventFd> {
        self.stop.tether.as_ref().map(|tether| &*tether.changed)
    }

    /// What has come of it. Waits until it is over.
    ///
    /// # Errors
    /// Nothing.
    pub fn result(self) -> Result<Done, TaskError> {
        self.result.recv().map_err(|_| TaskError::Gone)?
    }

    /// Calls it off and waits until it is over; what has come of it.
    ///
    /// # Errors
    /// Nothing.
    pub fn end(self) -> Result<Done, TaskError> {
        match self.call_off() {
            true => Err(self.task.called_off()),
            false => self.result(),
        }
    }

    /// For who closes the image meanwhile.
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }
}

impl AsRawFd for Operation {
    fn as_raw_fd(&self) -> RawFd {
        self.stop.is_over.as_raw_fd()
    }
}

/// By which an operation is called off by another than who waits for it. Keeps nothing open.
#[derive(Clone)]
pub(super) struct Stop {
    engine: Weak<Engine<HostDisk>>,
    call_off: Arc<CallOff>,
    /// Of a job.
    tether: Option<Tether>,
    is_over: Arc<EventFd>,
    new_chain: NewChain,
}

impl Stop {
    fn call_off(&self) -> bool {
        if let Some(tether) = &self.tether {
            let has_ended = tether.reins.cancel();
            tether.look();
            // One that has begun ends with the step that is under way.
            return has_ended;
        }
        self.call_off.call_off_with(|| {
            if let Some(engine) = self.engine.upgrade() {
                engine.abandon_growth();
            }
        })
    }

    /// Calls it off, and waits for its end if it is too late for that, unless the image `is_lost`
    /// meanwhile: what waits for storage that does not answer may do so for ever. Then the image
    /// can be closed, or let go. Gives back what has become of its levels, unless that was taken
    /// already.
    pub fn end(self, is_lost: impl Fn() -> bool) -> Option<Change> {
        let mut has_ended = self.call_off();
        while !has_ended && !is_lost() {
            // SAFETY: the descriptor is open as long as `self` is there.
            let is_over = unsafe { BorrowedFd::borrow_raw(self.is_over.as_raw_fd()) };
            let mut fds = [PollFd::from_borrowed_fd(is_over, PollFlags::IN)];
            // Nobody reads it, so it stays readable.
            has_ended = poll(&mut fds, Some(&LOOK)).is_ok_and(|ready| ready > 0);
        }
        self.new_chain.take()
    }

    /// Whether this is where what it does to the levels is put.
    pub fn puts_into(&self, new_chain: &NewChain) -> bool {
        self.new_chain.is_same(new_chain)
    }
}
