//! The requests of one queue, between its ring and the engine.

use std::os::fd::RawFd;
use std::sync::Arc;

use slab::Slab;
use smallvec::SmallVec;
use vm_memory::GuestMemory;

use super::BlockDevice;
use super::mailbox::Parked;
use super::memory::{Hold, QueueMemory};
use super::ratelimit::guest_log;
use super::request::{ID_LEN, Operation, Rejected, Reply, Request, Status};
use crate::ploop::{self, Command, Done, EngineError, Queue};
use crate::storage::{Disk, Segments};

/// An answered chain, for the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    /// Index of the chain's first descriptor, by which the driver knows it.
    pub head: u16,
    /// Bytes of guest memory written.
    pub len: u32,
}

/// What the engine may have of one queue at a time, in bytes that are read or
/// written, before no more is taken from the ring. One request may be larger. It
/// bounds the memory that a guest can make the engine use; what a disk can do at a
/// time is far below.
const MAX_LOAD: u64 = 512 << 20;

/// A discard or write-zeroes of so many bytes weighs as much as a transfer of one:
/// it is done in larger pieces.
const RANGE_BYTES_PER_BYTE: u64 = 64;

/// How much of [`MAX_LOAD`] a command takes.
fn weight(command: &Command) -> u64 {
    match command {
        Command::Read { data, .. } | Command::Write { data, .. } => data.len() as u64,
        Command::Flush => 0,
        Command::Discard { ranges } | Command::WriteZeroes { ranges, .. } => {
            let bytes = ranges.iter().map(|range| range.count.bytes());
            bytes.sum::<u64>() / RANGE_BYTES_PER_BYTE
        }
    }
}

/// A request that the engine has.
#[derive(Debug)]
struct InFlight {
    weight: u64,
    head: u16,
    reply: Reply,
    memory: Hold,
}

/// Every chain that comes in by [`Self::accept`] or [`Self::reject`] goes out once
/// as a [`Used`].
pub(super) struct Requests<D: Disk> {
    queue_index: usize,
    device: Arc<BlockDevice<D>>,
    engine: Queue<D>,
    /// By the tag that the engine knows them by.
    in_flight: Slab<InFlight>,
    /// The weight of all of them.
    load: u64,
    used: Vec<Used>,
    /// The weight that [`Self::used`] had.
    used_load: u64,
    /// Empty; kept for its memory.
    done: Vec<Done>,
}

impl<D: Disk> Requests<D> {
    /// Of a queue whose engine's side is `engine`.
    pub fn new(queue_index: usize, device: Arc<BlockDevice<D>>, engine: Queue<D>) -> Self {
        let depth = usize::from(device.queue_size());
        device.queue_opened();
        Self {
            queue_index,
            device,
            engine,
            in_flight: Slab::with_capacity(depth),
            load: 0,
            used: Vec::with_capacity(depth),
            used_load: 0,
            done: Vec::with_capacity(depth),
        }
    }

    /// Which queue of the device it is.
    pub fn queue_index(&self) -> usize {
        self.queue_index
    }

    /// Descriptors that are readable while [`Self::poll`] has something to do.
    pub fn fds(&self) -> SmallVec<[RawFd; 2]> {
        self.engine.fds()
    }

    /// Whether the engine should have one more request, of a ring of that size. If
    /// not, it has some that will end.
    pub fn has_room(&self, ring_size: u16) -> bool {
        self.in_flight.len() < usize::from(ring_size) && self.load < MAX_LOAD
    }

    /// Starts a request that was parsed with the newest map of `memory`.
    pub fn accept(&mut self, head: u16, request: Request, memory: &QueueMemory) {
        let Request { operation, reply } = request;
        match operation {
            Operation::Engine(command) => {
                let weight = weight(&command);
                self.load += weight;
                let tag = self.in_flight.insert(InFlight {
                    weight,
                    head,
                    reply,
                    memory: memory.hold(),
                }) as u64;
                self.engine.push(ploop::Request { tag, command });
            }
            Operation::GetId(target) => {
                write_id(&target, self.device.serial());
                let len = reply.finish(memory.map(), Status::Ok);
                self.used.push(Used { head, len });
            }
        }
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
        self.engine.submit();
        self.engine.poll(&mut self.done);
        self.settle(memory, Parked::Fail);
    }

    /// Whether [`Self::poll`] has more to do at once: not all I/O ends with a
    /// descriptor that gets readable.
    pub fn has_ready(&self) -> bool {
        self.engine.has_ready()
    }

    /// To be called before the thread sleeps. False if [`Self::poll`] has something
    /// to do already.
    pub fn may_sleep(&mut self) -> bool {
        self.engine.may_sleep()
    }

    /// Waits until nothing is in flight any more.
    pub fn drain(&mut self, memory: &mut QueueMemory, parked: Parked) {
        self.engine.drain(&mut self.done);
        self.settle(memory, parked);
    }

    /// What is to be put into the used ring.
    pub fn take_used(&mut self) -> std::vec::Drain<'_, Used> {
        self.used_load = 0;
        self.used.drain(..)
    }

    /// How much there is for [`Self::take_used`].
    pub fn used(&self) -> usize {
        self.used.len()
    }

    /// How many bytes the requests have read or written that there are for
    /// [`Self::take_used`].
    pub fn used_load(&self) -> u64 {
        self.used_load
    }

    /// How many bytes the engine has to read or write.
    pub fn load(&self) -> u64 {
        self.load
    }

    /// Requests that the engine has.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn settle(&mut self, memory: &mut QueueMemory, parked: Parked) {
        for Done { tag, result } in self.done.drain(..) {
            let InFlight {
                weight,
                head,
                reply,
                memory: hold,
            } = self.in_flight.remove(tag as usize);
            self.load -= weight;
            self.used_load += weight;
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

impl<D: Disk> Drop for Requests<D> {
    fn drop(&mut self) {
        debug_assert!(self.in_flight.is_empty() || std::thread::panicking());
        self.device.queue_closed();
    }
}

/// Answers `VIRTIO_BLK_T_GET_ID`; `target` has at most [`ID_LEN`] bytes.
fn write_id(target: &Segments, serial: &[u8; ID_LEN]) {
    target.copy_from(0, &serial[..target.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::config::{MAX_RANGE_SECTORS, MAX_RANGES};
    use crate::format::Sector;
    use crate::ploop::SectorRange;

    #[test]
    fn a_ring_full_of_the_largest_discards_weighs_more_than_is_allowed_at_a_time() {
        let range = SectorRange {
            start: Sector(0),
            count: Sector(MAX_RANGE_SECTORS.into()),
        };
        let ranges = (0..MAX_RANGES).map(|_| range).collect();
        let largest = weight(&Command::Discard { ranges });
        assert_eq!(largest, (128 << 30) / 64);
        assert!(largest * 8 > MAX_LOAD);
    }

    #[test]
    fn a_flush_weighs_nothing() {
        assert_eq!(weight(&Command::Flush), 0);
    }
}
