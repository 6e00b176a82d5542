//! A queue's thread: it starts when its ring starts to run and ends with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smallvec::SmallVec;
use vhost_user_backend::{VringMutex, VringT};

use super::BlockDevice;
use super::dirty_log::Marks;
use super::gate::Gate;
use super::inflight::{InFlightQueue, Recovery};
use super::mailbox::{Mail, Mailbox, Parked};
use super::memory::{Memory, QueueMemory, SharedMemory};
use super::requests::{Left, Requests, Used};
use super::signalled::{Signalled, UNBLOCK_INTERVAL};
use super::worker::{Events, Next, Worker};
use crate::headroom;
use crate::storage::Disk;
use crate::threads::{self, Role};

/// What a queue thread starts with.
pub(super) struct Start<'a, D: Disk> {
    pub index: usize,
    pub device: &'a Arc<BlockDevice<D>>,
    pub memory: &'a Arc<SharedMemory>,
    pub vring: VringMutex<Memory>,
    pub events: Events,
    /// Where it notes what is in flight.
    pub in_flight: Option<InFlightQueue>,
    /// What a process that is gone has left to it.
    pub recovery: Recovery,
    /// What the thread before it could not put into the used ring.
    pub unanswered: Vec<Used>,
    /// What it marks of what it writes to guest memory.
    pub marks: Option<Marks>,
    /// What it waits at before it touches the ring.
    pub gate: Option<Arc<Gate>>,
}

/// Seen from the thread that serves the front-end's messages. To be ended by
/// [`Self::join`].
pub(super) struct QueueThread {
    mailbox: Arc<Mailbox>,
    thread: JoinHandle<Left>,
    /// How much mail it has got that it is to confirm.
    to_confirm: u64,
}

impl QueueThread {
    /// Starts to serve the ring. The thread keeps the ring locked until it ends: nobody
    /// else has anything to do with a ring that runs.
    ///
    /// # Errors
    /// Any of [`Engine::queue`](crate::ploop::Engine::queue), and when there can be no
    /// more threads or is no memory left for a queue.
    pub fn start<D: Disk>(start: Start<'_, D>) -> io::Result<Self> {
        let Start {
            index,
            device,
            memory,
            vring,
            events,
            in_flight,
            recovery,
            unanswered,
            marks,
            gate,
        } = start;
        headroom::check()?;
        let engine = device.engine();
        let engine = engine.ok_or_else(|| io::Error::other("the image is not open"))?;
        let engine = engine.queue()?;
        let mailbox = Arc::new(Mailbox::new(engine.waker()));
        let worker = Worker::new(
            Arc::clone(device),
            Arc::clone(&mailbox),
            events,
            QueueMemory::new(Arc::clone(memory)),
            Requests::new(index, Arc::clone(device), engine, unanswered),
            in_flight,
            marks,
        );
        let thread = threads::start(Role::Queue, format!("vq{index}"), {
            let ending = Ending(Arc::clone(&mailbox));
            move || {
                let _ending = ending;
                if gate.is_some_and(|gate| !gate.wait()) {
                    return worker.into_left();
                }
                run(worker, &vring, recovery)
            }
        })?;
        Ok(Self {
            mailbox,
            thread,
            to_confirm: 0,
        })
    }

    /// Tells it something.
    pub fn post(&self, mail: Mail) {
        self.mailbox.post(mail);
    }

    /// Lets it mark otherwise what it writes to guest memory. To be waited for with
    /// [`Self::wait_for_marks`].
    pub fn set_marks(&mut self, marks: Option<Marks>) {
        self.to_confirm += 1;
        self.post(Mail::Marks(marks));
    }

    /// Waits until it does.
    pub fn wait_for_marks(&self, signalled: &Signalled) {
        let is_done = || {
            self.mailbox
                .has_confirmed_within(self.to_confirm, UNBLOCK_INTERVAL)
        };
        while !is_done() {
            signalled.unblock();
        }
    }

    /// Asks it to complete what is in flight and to end.
    pub fn ask_to_stop(&self, parked: Parked) {
        self.post(Mail::Stop(parked));
    }

    /// Waits for the end that it was asked for. Returns what it could not bring to its end.
    pub fn join(self, signalled: &Signalled) -> Left {
        while !self.mailbox.has_ended_within(UNBLOCK_INTERVAL) {
            signalled.unblock();
        }
        // A panic ends the daemon; in tests it shows in the lock of the ring.
        self.thread.join().unwrap_or_default()
    }
}

/// Tells of the end of a thread when it is dropped, with all that the thread has.
struct Ending(Arc<Mailbox>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn run<D: Disk>(mut worker: Worker<D>, vring: &VringMutex<Memory>, recovery: Recovery) -> Left {
    let mut state = vring.get_mut();
    let ring = state.get_queue_mut();
    if recovery.is_old {
        worker.resume(recovery.heads);
    }
    worker.begin(ring);
    while worker.serve(ring) == Next::Sleep {
        if sleep(&worker) == Woken::ByKick {
            worker.kicked();
        }
    }
    worker.into_left()
}

/// By whom a sleep was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    /// The driver, maybe others as well.
    ByKick,
    ByOthers,
}

/// Sleeps until there may be something to do.
fn sleep<D: Disk>(worker: &Worker<D>) -> Woken {
    let engine = worker.fds();
    let kick = worker.kick();
    let mut fds: SmallVec<[PollFd<'_>; 3]> = SmallVec::new();
    fds.push(PollFd::from_borrowed_fd(kick.as_fd(), PollFlags::IN));
    for &fd in &engine {
        // SAFETY: the descriptors are those of the engine's queue, which `worker` owns.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
    }
    let pause = worker.pause().map(|pause| Timespec {
        tv_sec: pause.as_secs() as i64,
        tv_nsec: i64::from(pause.subsec_nanos()),
    });
    let woken = poll(&mut fds, pause.as_ref());
    if woken.is_ok() && !fds[0].revents().is_empty() {
        kick.clear();
        return Woken::ByKick;
    }
    Woken::ByOthers
}
