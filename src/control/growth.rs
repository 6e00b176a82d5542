//! The thread that makes the disk larger while it is served.
//!
//! It is there from the start, since it alone may put a new descriptor in the place of the
//! old one: whoever serves guests cannot even start such a thread. It sleeps until
//! something is asked of it, and does one thing at a time.
//!
//! Knows threads and [`served`]; what the disk is, and who asks, it is told.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::sandbox::KeepTo;
use super::{Error as StartError, with_causes};
use crate::format::Sector;
use crate::image::{Bundle, ImageError};
use crate::ploop::{Engine, EngineError};
use crate::served::{self, CallOff, GrowError};
use crate::storage::HostDisk;
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
    /// The thread has ended in a panic.
    #[error("the thread that makes disks larger has failed; see the log")]
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

/// See the module's text. Dropped, the thread ends with what it is at.
pub(super) struct Grower {
    /// Taken when it is to end.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    hidden: Option<Arc<ImageError>>,
}

struct Job {
    /// Dropped last, whatever happens.
    ending: Ending,
    engine: Arc<Engine<HostDisk>>,
    size: Sector,
    call_off: Arc<CallOff>,
    tell: SyncSender<Result<Sector, GrowError>>,
}

/// Tells of the end of a job when it is dropped.
struct Ending(Arc<EventFd>);

impl Drop for Ending {
    fn drop(&mut self) {
        // It can only fail when the descriptor is readable anyway.
        let _ = self.0.write(1);
    }
}

impl Grower {
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
        let (jobs, take) = channel::<Job>();
        let (tell, told) = sync_channel(1);
        let thread = threads::start(Role::Grow, "grow", move || {
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
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            hidden: hidden.map(Arc::new),
        })
    }

    /// Has the disk of this engine made larger. Returns at once.
    ///
    /// # Errors
    /// It must not become larger, there are no more descriptors, or the thread has ended.
    pub fn grow(&self, engine: Arc<Engine<HostDisk>>, size: Sector) -> Result<Growth, GrowthError> {
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
        let job = Job {
            ending: Ending(is_over),
            engine,
            size,
            call_off: Arc::clone(&growth.call_off),
            tell,
        };
        let jobs = self.jobs.as_ref().ok_or(GrowthError::Gone)?;
        jobs.send(job).map_err(|_| GrowthError::Gone)?;
        Ok(growth)
    }
}

fn work(jobs: &Receiver<Job>, mut bundle: Option<Bundle>) {
    for job in jobs {
        let Job {
            ending: _ending,
            engine,
            size,
            call_off,
            tell,
        } = job;
        let result = served::grow(&engine, bundle.as_mut(), size, &call_off);
        // Who hears of the end may close the image.
        drop(engine);
        // Nobody may wait for it any more.
        let _ = tell.send(result);
    }
}

impl Drop for Grower {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that makes disks larger has ended in a panic");
        }
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
    /// It is to end soon, well or not. Returns at once.
    pub fn call_off(&self) {
        self.call_off.call_off(&self.engine);
    }

    /// What has come of it. Waits until it is over.
    ///
    /// # Errors
    /// The disk is not larger.
    pub fn result(self) -> Result<Sector, GrowthError> {
        let result = self.result.recv().map_err(|_| GrowthError::Gone)?;
        Ok(result?)
    }
}

impl AsRawFd for Growth {
    fn as_raw_fd(&self) -> RawFd {
        self.is_over.as_raw_fd()
    }
}
