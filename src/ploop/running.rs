//! The engine's threads.

use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{io, process};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::EngineError;
use super::control::Control;
use super::engine::Engine;
use super::inbox::Waker;
use super::md::MdWriter;
use super::open::Opened;
use super::runner::Runner;
use crate::storage::{Disk, Io};
use crate::threads::{self, Role};

/// An open disk whose threads run. Make [`Queue`](super::Queue)s of its engine,
/// drop them, then [`Self::close`] it. A panic in one of the threads ends the process.
pub struct Running<D: Disk> {
    engine: Arc<Engine<D>>,
    stopped: Arc<AtomicBool>,
    runners: Vec<JoinHandle<()>>,
    md: Option<JoinHandle<()>>,
}

impl<D: Disk> Running<D> {
    /// Starts the threads.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(opened: Opened<D>) -> io::Result<Self> {
        let mut running = Self {
            engine: opened.engine,
            stopped: Arc::default(),
            runners: Vec::new(),
            md: None,
        };
        let md = opened.md;
        running.md = Some(threads::start(Role::Metadata, "md", move || run_md(md))?);
        for (index, runner) in opened.runners.into_iter().enumerate() {
            let stopped = running.stopped.clone();
            let runner = threads::start(Role::Runner, format!("runner{index}"), move || {
                run_runner(runner, &stopped);
            })?;
            running.runners.push(runner);
        }
        Ok(running)
    }

    /// What the threads share.
    pub fn engine(&self) -> &Arc<Engine<D>> {
        &self.engine
    }

    /// Waits for what is in flight, makes it stable, gives unused space back,
    /// marks the image as closed and ends the threads. All queues must have been
    /// dropped.
    ///
    /// # Errors
    /// When not everything could be made stable: then the image stays marked as
    /// in use.
    pub fn close(mut self) -> Result<(), EngineError> {
        self.stop()
    }

    /// The same for somebody who opens the image at once, in the same process or another
    /// one: nothing that takes longer is done to it, and it is marked as closed, though that
    /// is not stable. All queues must have been dropped.
    ///
    /// # Errors
    /// When not everything could be made stable: then it goes on as before, held if its lock is
    /// lost. Or when the image could not be marked, and has everything nevertheless: then it
    /// has ended.
    pub fn pass(self) -> Result<(), (Option<Self>, EngineError)> {
        self.leave(Control::Pass)
    }

    /// The same as [`Self::close`] for somebody on another host, perhaps, who opens the image
    /// next. With `trims`, unused space is given back, which may take seconds. All queues must
    /// have been dropped.
    ///
    /// # Errors
    /// When not everything could be made stable, the mark included: then it goes on as before,
    /// held if its lock is lost. It is not given back only if it had ended before.
    pub fn hand_over(self, trims: bool) -> Result<(), (Option<Self>, EngineError)> {
        self.leave(Control::HandOver { trims })
    }

    fn leave(mut self, how: Control) -> Result<(), (Option<Self>, EngineError)> {
        let result = self.engine.control(how).wait();
        if let Err(error) = result
            && !self.engine.has_ended()
        {
            return Err((Some(self), error));
        }
        self.end_threads();
        result.map_err(|error| (None, error))
    }

    fn stop(&mut self) -> Result<(), EngineError> {
        if self.md.is_none() {
            return Ok(());
        }
        let result = self.engine.control(Control::Close).wait();
        self.end_threads();
        result
    }

    /// Once the image is closed.
    fn end_threads(&mut self) {
        if let Some(md) = self.md.take() {
            let _ = md.join();
        }
        self.stopped.store(true, Ordering::Release);
        for inbox in &self.engine.runners {
            inbox.waker().wake();
        }
        for runner in self.runners.drain(..) {
            let _ = runner.join();
        }
    }
}

impl<D: Disk> Drop for Running<D> {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::error!("the image was not closed cleanly: {error}");
        }
    }
}

/// While it lives, a panic of this thread ends the process: others wait for what only
/// this thread does, and would wait for ever. The image survives that as it survives a
/// power cut.
struct Indispensable;

impl Drop for Indispensable {
    fn drop(&mut self) {
        if thread::panicking() {
            let thread = thread::current();
            let name = thread.name().unwrap_or("a thread of the engine");
            log::error!("{name} panicked, and nothing can go on without it: the process aborts");
            process::abort();
        }
    }
}

pub(super) fn run_md<D: Disk>(mut md: MdWriter<D>) {
    // Dropped before `md`, which would wait for its I/O.
    let _indispensable = Indispensable;
    let start = Instant::now();
    while !md.is_closed() {
        let at_most = md.poll(start.elapsed());
        if !md.is_closed() {
            sleep(md.waker(), md.io().completion_fd(), at_most);
        }
    }
}

pub(super) fn run_runner<D: Disk>(mut runner: Runner<D>, stopped: &AtomicBool) {
    // Dropped before `runner`, which would wait for its I/O.
    let _indispensable = Indispensable;
    let start = Instant::now();
    loop {
        let at_most = runner.poll(start.elapsed());
        if stopped.load(Ordering::Acquire) && runner.is_idle() {
            break;
        }
        sleep(runner.waker(), runner.io().completion_fd(), at_most);
    }
}

/// Sleeps until the thread is woken, its ring has something, or time is over.
fn sleep(waker: &Waker, completions: Option<RawFd>, at_most: Option<Duration>) {
    if at_most == Some(Duration::ZERO) {
        return;
    }
    let at_most = at_most.map(|time| Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    let waker = PollFd::from_borrowed_fd(waker.as_fd(), PollFlags::IN);
    let _ = match completions {
        None => poll(&mut [waker], at_most.as_ref()),
        Some(fd) => {
            // SAFETY: the descriptor is that of the ring of the calling thread,
            // which outlives this call.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let ring = PollFd::from_borrowed_fd(fd, PollFlags::IN);
            poll(&mut [waker, ring], at_most.as_ref())
        }
    };
}
