//! A queue's thread: it starts when its ring starts to run and ends with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use smallvec::SmallVec;
use vhost_user_backend::{VringMutex, VringT};

use super::BlockDevice;
use super::inflight::{InFlightQueue, Recovery};
use super::mailbox::{Mail, Mailbox, Parked};
use super::memory::{Memory, QueueMemory, SharedMemory};
use super::requests::Requests;
use super::worker::{Events, Next, Worker};
use crate::storage::Disk;

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
}

/// Seen from the thread that serves the front-end's messages. To be ended by
/// [`Self::join`].
pub(super) struct QueueThread {
    mailbox: Arc<Mailbox>,
    thread: JoinHandle<()>,
}

impl QueueThread {
    /// Starts to serve the ring. The thread keeps the ring locked until it ends: nobody
    /// else has anything to do with a ring that runs.
    ///
    /// # Errors
    /// Any of [`Engine::queue`](crate::ploop::Engine::queue), and when there can be no
    /// more threads.
    pub fn start<D: Disk>(start: Start<'_, D>) -> io::Result<Self> {
        let Start {
            index,
            device,
            memory,
            vring,
            events,
            in_flight,
            recovery,
        } = start;
        let engine = device.engine().queue()?;
        let mailbox = Arc::new(Mailbox::new(engine.waker()));
        let worker = Worker::new(
            Arc::clone(device),
            Arc::clone(&mailbox),
            events,
            QueueMemory::new(Arc::clone(memory)),
            Requests::new(index, Arc::clone(device), engine),
            in_flight,
        );
        let thread = thread::Builder::new()
            .name(format!("vq{index}"))
            .spawn(move || run(worker, &vring, &recovery))?;
        Ok(Self { mailbox, thread })
    }

    /// Tells it something.
    pub fn post(&self, mail: Mail) {
        self.mailbox.post(mail);
    }

    /// Asks it to complete what is in flight and to end.
    pub fn ask_to_stop(&self, parked: Parked) {
        self.post(Mail::Stop(parked));
    }

    /// Waits for the end that it was asked for.
    pub fn join(self) {
        // A panic ends the daemon; in tests it shows in the lock of the ring.
        let _ = self.thread.join();
    }
}

fn run<D: Disk>(mut worker: Worker<D>, vring: &VringMutex<Memory>, recovery: &Recovery) {
    let mut state = vring.get_mut();
    let ring = state.get_queue_mut();
    if recovery.is_old {
        worker.resume(ring, &recovery.heads);
    }
    while worker.serve(ring) == Next::Sleep {
        sleep(&worker);
    }
}

/// Sleeps until there may be something to do.
fn sleep<D: Disk>(worker: &Worker<D>) {
    let engine = worker.fds();
    let kick = worker.kick();
    let mut fds: SmallVec<[PollFd<'_>; 3]> = SmallVec::new();
    fds.push(PollFd::from_borrowed_fd(kick.as_fd(), PollFlags::IN));
    for &fd in &engine {
        // SAFETY: the descriptors are those of the engine's queue, which `worker` owns.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
    }
    let woken = poll(&mut fds, None);
    if woken.is_ok() && !fds[0].revents().is_empty() {
        kick.clear();
    }
}
