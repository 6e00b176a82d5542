//! The requests of one queue, between its ring and the engine.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use slab::Slab;
use smallvec::SmallVec;
use vm_memory::GuestMemory;

use super::BlockDevice;
use super::gate::Parked;
use super::memory::{Hold, QueueMemory};
use super::ratelimit::guest_log;
use super::request::{ID_LEN, Operation, Rejected, Reply, Request, Status};
use crate::ploop::{self, Done, EngineError, Queue};
use crate::storage::{Disk, Segments};

/// An answered chain, for the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    /// Index of the chain's first descriptor, by which the driver knows it.
    pub head: u16,
    /// Bytes of guest memory written.
    pub len: u32,
}

/// A request that the engine has.
#[derive(Debug)]
struct InFlight {
    head: u16,
    reply: Reply,
    memory: Hold,
}

/// Every chain that comes in by [`Self::accept`] or [`Self::reject`] goes out once
/// as a [`Used`].
pub(super) struct Requests<D: Disk> {
    queue_index: usize,
    device: Arc<BlockDevice<D>>,
    /// The engine's side, once it is open.
    engine: Option<Queue<D>>,
    /// By the tag that the engine knows them by.
    in_flight: Slab<InFlight>,
    used: Vec<Used>,
    /// Empty; kept for its memory.
    done: Vec<Done>,
}

impl<D: Disk> Requests<D> {
    pub fn new(queue_index: usize, device: Arc<BlockDevice<D>>) -> Self {
        Self {
            queue_index,
            device,
            engine: None,
            in_flight: Slab::new(),
            used: Vec::new(),
            done: Vec::new(),
        }
    }

    /// Whether the engine's side is open.
    pub fn is_open(&self) -> bool {
        self.engine.is_some()
    }

    /// Opens the engine's side. Returns the descriptors that are readable while
    /// [`Self::poll`] has something to do.
    ///
    /// # Errors
    /// Any of [`Engine::queue`](ploop::Engine::queue).
    pub fn open(&mut self) -> io::Result<SmallVec<[RawFd; 2]>> {
        let engine = self.device.engine().queue()?;
        let fds = engine.fds();
        self.engine = Some(engine);
        let depth = usize::from(self.device.queue_size());
        self.in_flight.reserve(depth);
        self.used.reserve(depth);
        self.done.reserve(depth);
        Ok(fds)
    }

    /// Gives the engine's side back. Nothing may be in flight.
    pub fn close(&mut self) {
        debug_assert!(self.in_flight.is_empty());
        self.engine = None;
    }

    /// How many requests the engine has.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Starts a request that was parsed with the newest map of `memory`.
    pub fn accept(&mut self, head: u16, request: Request, memory: &QueueMemory) {
        let Request { operation, reply } = request;
        let (status, reply) = match (operation, &mut self.engine) {
            (Operation::Engine(command), Some(engine)) => {
                let tag = self.in_flight.insert(InFlight {
                    head,
                    reply,
                    memory: memory.hold(),
                }) as u64;
                engine.push(ploop::Request { tag, command });
                return;
            }
            (Operation::Engine(_), None) => (Status::IoError, reply),
            (Operation::GetId(target), _) => {
                write_id(&target, self.device.serial());
                (Status::Ok, reply)
            }
        };
        let len = reply.finish(memory.map(), status);
        self.used.push(Used { head, len });
    }

    /// Answers a chain that is no request.
    pub fn reject<M: GuestMemory>(&mut self, head: u16, rejected: Rejected, map: &M) {
        let Rejected { error, reply } = rejected;
        guest_log!(
            self.device.guest_limit(),
            Warn,
            "queue {}: request refused: {error}",
            self.queue_index
        );
        let len = reply.map_or(0, |reply| reply.finish(map, error.status()));
        self.used.push(Used { head, len });
    }

    /// Starts what was accepted and collects what has ended. Never blocks.
    pub fn poll(&mut self, memory: &mut QueueMemory) {
        if let Some(engine) = &mut self.engine {
            engine.submit();
            engine.poll(&mut self.done);
            self.settle(memory, Parked::Fail);
        }
    }

    /// Whether [`Self::poll`] has more to do at once: not all I/O ends with a
    /// descriptor that gets readable.
    pub fn has_ready(&self) -> bool {
        self.engine.as_ref().is_some_and(Queue::has_ready)
    }

    /// Waits until nothing is in flight any more.
    pub fn drain(&mut self, memory: &mut QueueMemory, parked: Parked) {
        if let Some(engine) = &mut self.engine {
            engine.drain(&mut self.done);
            self.settle(memory, parked);
        }
    }

    /// What is to be put into the used ring.
    pub fn take_used(&mut self) -> std::vec::Drain<'_, Used> {
        self.used.drain(..)
    }

    /// Whether there is something for [`Self::take_used`].
    pub fn has_used(&self) -> bool {
        !self.used.is_empty()
    }

    fn settle(&mut self, memory: &mut QueueMemory, parked: Parked) {
        for Done { tag, result } in self.done.drain(..) {
            let InFlight {
                head,
                reply,
                memory: hold,
            } = self.in_flight.remove(tag as usize);
            if let Err(error) = &result {
                guest_log!(
                    self.device.guest_limit(),
                    Warn,
                    "queue {}: request failed: {error}",
                    self.queue_index
                );
            }
            let was_waiting = matches!(result, Err(EngineError::NoSpace | EngineError::Stopped));
            if parked == Parked::Drop && was_waiting {
                reply.abandon();
            } else {
                let len = reply.finish(memory.held(hold), Status::of(&result));
                self.used.push(Used { head, len });
            }
            memory.release(hold);
        }
    }
}

/// Answers `VIRTIO_BLK_T_GET_ID`; `target` has at most [`ID_LEN`] bytes.
fn write_id(target: &Segments, serial: &[u8; ID_LEN]) {
    target.copy_from(0, &serial[..target.len()]);
}
