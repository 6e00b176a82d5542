//! The thread that looks after the files of a disk while it is served: it looks whether they
//! are still what they were, and makes the disk larger when that is asked of it.
//!
//! It is there from the start, since it alone may put a new descriptor in the place of the
//! old one: whoever serves guests cannot even start such a thread. To look at files takes no
//! right that it has not, and no time to speak of; so that is left to it, and no other thread
//! is needed. It does one thing at a time, and looks on while a growth waits.
//!
//! A look can take for ever, and what has been asked for then waits. Nobody waits for the end
//! of the thread.
//!
//! Knows threads and [`served`]; what the disk is, and who asks, it is told.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::question::{Answerer, Ending, Question};
use super::sandbox::KeepTo;
use super::{Error as StartError, with_causes};
use crate::format::Sector;
use crate::image::{self, Bundle, ImageError};
use crate::ploop::{Engine, EngineError, Outcome};
use crate::served::{self, CallOff, GrowError};
use crate::storage::{FileWatch, HostDisk};
use crate::threads::{self, Role};

/// Why a disk was not made larger.
#[derive(Debug, Error)]
pub(super) enum GrowthError {
    /// It cannot be.
    #[error(transparent)]
    Grow(#[from] GrowError),
    /// Something is hidden below it; see
    /// [`require_nothing_hidden`](crate::image::require_nothing_hidden).
    #[error("the disk keeps its size")]
    Hidden(#[source] Arc<ImageError>),
    /// There are no more descriptors, most likely.
    #[error("cannot prepare for the new size")]
    Setup(#[from] io::Error),
    /// No ring runs, and so nobody here has the image open.
    #[error(
        "the disk keeps its size: no guest uses it, so its image is not open (--lock running); \
         'ploop-img resize' makes it larger now"
    )]
    NotOpen,
    /// The thread has ended in a panic.
    #[error("the thread that makes the disk larger has failed; see the log")]
    Gone,
}

impl GrowthError {
    /// For the client, with what can be done.
    pub fn words(&self) -> String {
        let words = with_causes(self);
        match self {
            Self::Grow(GrowError::Engine(EngineError::Smaller { .. })) => {
                format!("{words}; when nobody serves it, 'ploop-img resize --shrink' does it")
            }
            _ => words,
        }
    }
}

/// See the module's text. Dropped, the thread ends when it has done what it is at.
pub(super) struct Caretaker {
    jobs: Sender<Job>,
    /// Of a disk that is written to.
    can_grow: bool,
    hidden: Option<Arc<ImageError>>,
}

enum Job {
    /// Look at these from now on, and at no others.
    Watch(FileWatch),
    /// The image was opened anew.
    ReadBundle,
    Grow(Order),
    ListSnapshots(Answerer),
}

struct Order {
    /// Dropped last, whatever happens.
    ending: Ending,
    engine: Arc<Engine<HostDisk>>,
    size: Sector,
    call_off: Arc<CallOff>,
    tell: SyncSender<Result<Sector, GrowError>>,
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
        Ok(Self {
            jobs: start(Role::Caretaker, bundle, keeps)?,
            can_grow: true,
            hidden: hidden.map(Arc::new),
        })
    }

    /// Starts one that looks at files and does nothing else.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn start_watching() -> Result<Self, StartError> {
        Ok(Self {
            jobs: start(Role::Watch, None, KeepTo::what_all_have())?,
            can_grow: false,
            hidden: None,
        })
    }

    /// Has these files looked at, and no others any more.
    pub fn watch(&self, files: FileWatch) {
        if self.jobs.send(Job::Watch(files)).is_err() {
            log::error!("the image files are no longer watched");
        }
    }

    /// Has the snapshots of the disk looked up. Returns at once.
    ///
    /// # Errors
    /// In words: the disk is only read, or there are no more descriptors.
    pub fn list_snapshots(&self) -> Result<Question, String> {
        if !self.can_grow {
            return Err("a process that only reads a disk does not know its snapshots".to_owned());
        }
        let (question, answerer) = Question::new().map_err(|error| error.to_string())?;
        // If the thread has ended, the question says so.
        let _ = self.jobs.send(Job::ListSnapshots(answerer));
        Ok(question)
    }

    /// The image was opened anew, perhaps after others have changed its bundle.
    pub fn read_bundle_anew(&self) {
        if self.jobs.send(Job::ReadBundle).is_err() {
            log::error!("the disk cannot become larger any more: a thread has failed");
        }
    }

    /// Has the disk of this engine made larger. Returns at once.
    ///
    /// # Errors
    /// It must not become larger, there are no more descriptors, or the thread has ended.
    pub fn grow(&self, engine: Arc<Engine<HostDisk>>, size: Sector) -> Result<Growth, GrowthError> {
        if !self.can_grow {
            return Err(GrowError::Engine(EngineError::ReadOnly).into());
        }
        if let Some(hidden) = &self.hidden
            && size > engine.disk_size()
        {
            return Err(GrowthError::Hidden(Arc::clone(hidden)));
        }
        let is_over = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let (tell, result) = sync_channel(1);
        let growth = Growth {
            engine: Arc::clone(&engine),
            call_off: Arc::default(),
            is_over: Arc::clone(&is_over),
            result,
        };
        let order = Order {
            ending: Ending(is_over),
            engine,
            size,
            call_off: Arc::clone(&growth.call_off),
            tell,
        };
        let sent = self.jobs.send(Job::Grow(order));
        sent.map_err(|_| GrowthError::Gone)?;
        Ok(growth)
    }
}

/// As `ploop-img snapshot list --output json` shows them.
fn list_snapshots(bundle: Option<&mut Bundle>) -> Result<Value, String> {
    let bundle = bundle.ok_or("the disk is a bare image, which has no snapshots")?;
    let list = bundle.refresh().and_then(|()| image::list_of(bundle));
    let list = list.map_err(|error| with_causes(&error))?;
    serde_json::to_value(list).map_err(|error| error.to_string())
}

fn start(role: Role, bundle: Option<Bundle>, keeps: KeepTo) -> Result<Sender<Job>, StartError> {
    let (jobs, take) = channel();
    let (tell, told) = sync_channel(1);
    threads::start(role, "watch", move || {
        let kept = keeps.apply();
        let goes_on = kept.is_ok();
        // Who has started it waits for this.
        let _ = tell.send(kept);
        if goes_on {
            work(&take, bundle);
        }
    })
    .map_err(StartError::Setup)?;
    let kept = told
        .recv()
        .map_err(|gone| StartError::Setup(io::Error::other(gone)))?;
    kept?;
    Ok(jobs)
}

fn work(jobs: &Receiver<Job>, mut bundle: Option<Bundle>) {
    let mut rounds = Rounds::default();
    loop {
        let job = match rounds.time_left() {
            Some(time) => jobs.recv_timeout(time),
            None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match job {
            Ok(Job::Watch(files)) => rounds = Rounds::of(files),
            Ok(Job::ReadBundle) => {
                let read = bundle.as_mut().map_or(Ok(()), Bundle::read_anew);
                if let Err(error) = read {
                    log::error!("the disk cannot become larger: {}", with_causes(&error));
                }
            }
            Ok(Job::Grow(order)) => order.carry_out(bundle.as_mut(), &mut rounds),
            Ok(Job::ListSnapshots(answerer)) => answerer.answer(list_snapshots(bundle.as_mut())),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
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

impl Order {
    fn carry_out(self, bundle: Option<&mut Bundle>, rounds: &mut Rounds) {
        let Self {
            ending: _ending,
            engine,
            size,
            call_off,
            tell,
        } = self;
        let wait = |outcome: &Outcome| rounds.wait_for(outcome);
        let result = served::grow_beside(&engine, bundle, size, &call_off, wait);
        // Who hears of the end may close the image.
        drop(engine);
        // Nobody may wait for it any more.
        let _ = tell.send(result);
    }
}

/// One that is under way. Its descriptor is readable when it is over.
pub(super) struct Growth {
    engine: Arc<Engine<HostDisk>>,
    call_off: Arc<CallOff>,
    is_over: Arc<EventFd>,
    result: Receiver<Result<Sector, GrowError>>,
}

impl Growth {
    /// It is to end soon, well or not. Returns at once: `true` if it has ended, and came to
    /// nothing.
    pub fn call_off(&self) -> bool {
        self.call_off.call_off(&self.engine)
    }

    /// What has come of it. Waits until it is over.
    ///
    /// # Errors
    /// The disk is not larger.
    pub fn result(self) -> Result<Sector, GrowthError> {
        let result = self.result.recv().map_err(|_| GrowthError::Gone)?;
        Ok(result?)
    }

    /// Calls it off and waits until it is over; what has come of it.
    ///
    /// # Errors
    /// The disk is not larger.
    pub fn end(self) -> Result<Sector, GrowthError> {
        match self.call_off() {
            true => Err(GrowError::CalledOff.into()),
            false => self.result(),
        }
    }
}

impl Growth {
    /// For who closes the image meanwhile.
    pub fn call_off_handle(&self) -> CallOffHandle {
        CallOffHandle {
            engine: Arc::clone(&self.engine),
            call_off: Arc::clone(&self.call_off),
            is_over: Arc::clone(&self.is_over),
        }
    }
}

/// By which a growth is called off by another than who waits for it.
pub(super) struct CallOffHandle {
    engine: Arc<Engine<HostDisk>>,
    call_off: Arc<CallOff>,
    is_over: Arc<EventFd>,
}

impl CallOffHandle {
    /// Calls it off, and waits for its end if it is too late for that. Then the image can be
    /// closed.
    pub fn end(self) {
        if !self.call_off.call_off(&self.engine) {
            // SAFETY: the descriptor is open as long as `self` is there.
            let is_over = unsafe { BorrowedFd::borrow_raw(self.is_over.as_raw_fd()) };
            let mut fds = [PollFd::from_borrowed_fd(is_over, PollFlags::IN)];
            // Nobody reads it, so it stays readable.
            while poll(&mut fds, None).is_err() {}
        }
    }
}

impl AsRawFd for Growth {
    fn as_raw_fd(&self) -> RawFd {
        self.is_over.as_raw_fd()
    }
}
