//! What the fuzz targets reach that no front-end reaches by itself: the parser of
//! requests and the reader of in-flight regions. Built with `--cfg fuzzing` only, and
//! no part of it changes what the device does.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::GuestMemoryMmap;

use super::inflight::{InFlightQueue, Layout};
use super::request::{self, Limits, Operation, Status};
use crate::format::Sector;
use crate::ploop::{Command, SectorRange};
use crate::storage::{Segments, SharedWords};

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Its end, in sectors.
    pub size: u64,
    /// Whether it refuses changes.
    pub read_only: bool,
    /// Most ranges of a discard or write-zeroes.
    pub max_ranges: u32,
    /// Most sectors of such a range.
    pub max_range_sectors: u32,
}

/// What became of one chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The descriptor that it starts with.
    pub head: u16,
    /// What it asks for; `None` if it is refused.
    pub asks_for: Option<Asked>,
    /// What would be put into the used ring, and the status byte, if there is one.
    pub answer: Option<(u32, u8)>,
}

/// An accepted request. Memory is given as host addresses and lengths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Fill the memory.
    Read {
        /// From this sector on.
        start: u64,
        /// In pieces.
        memory: Vec<(usize, usize)>,
    },
    /// Write the memory.
    Write {
        /// From this sector on.
        start: u64,
        /// In pieces.
        memory: Vec<(usize, usize)>,
    },
    /// Flush.
    Flush,
    /// Sectors and their counts.
    Discard(Vec<(u64, u64)>),
    /// Sectors and their counts, and whether space may be given back.
    WriteZeroes(Vec<(u64, u64)>, bool),
    /// The serial number.
    GetId {
        /// In pieces.
        memory: Vec<(usize, usize)>,
    },
}

/// Parses each chain that the ring has available, and answers it at once: as done, or
/// as refused.
pub fn parse_all(memory: &GuestMemoryMmap, ring: &mut Queue, disk: Disk) -> Vec<Parsed> {
    let limits = Limits {
        disk_size: Sector(disk.size),
        read_only: disk.read_only,
        max_ranges: disk.max_ranges,
        max_range_sectors: disk.max_range_sectors,
    };
    let Ok(chains) = ring.iter(memory) else {
        return Vec::new();
    };
    let parse = |chain: virtio_queue::DescriptorChain<&GuestMemoryMmap>| {
        let head = chain.head_index();
        // SAFETY: `memory` outlives what is made of it here.
        match unsafe { request::parse(chain, memory, &limits) } {
            Ok(request) => Parsed {
                head,
                asks_for: Some(asked(&request.operation)),
                answer: Some((request.reply.finish(Status::Ok), Status::Ok as u8)),
            },
            Err(rejected) => Parsed {
                head,
                asks_for: None,
                answer: rejected.reply.map(|reply| {
                    let status = rejected.error.status();
                    (reply.finish(status), status as u8)
                }),
            },
        }
    };
    chains.map(parse).collect()
}

fn asked(operation: &Operation) -> Asked {
    let pairs = |ranges: &[SectorRange]| {
        let ranges = ranges.iter();
        ranges.map(|range| (range.start.0, range.count.0)).collect()
    };
    match operation {
        Operation::Engine(Command::Read { start, data }) => Asked::Read {
            start: start.0,
            memory: pieces(data),
        },
        Operation::Engine(Command::Write { start, data }) => Asked::Write {
            start: start.0,
            memory: pieces(data),
        },
        Operation::Engine(Command::Flush) => Asked::Flush,
        Operation::Engine(Command::Discard { ranges }) => Asked::Discard(pairs(ranges)),
        Operation::Engine(Command::WriteZeroes { ranges, unmap }) => {
            Asked::WriteZeroes(pairs(ranges), *unmap)
        }
        Operation::GetId(memory) => Asked::GetId {
            memory: pieces(memory),
        },
    }
}

fn pieces(memory: &Segments) -> Vec<(usize, usize)> {
    let pieces = memory.as_slice().iter();
    pieces
        .map(|piece| (piece.as_ptr() as usize, piece.len()))
        .collect()
}

/// The part of one queue in an in-flight region.
#[derive(Debug)]
pub struct InFlight {
    words: Arc<SharedWords>,
    layout: Layout,
    index: usize,
    queue: InFlightQueue,
}

impl InFlight {
    /// Of queue `index` in a region for `queues` queues of `entries` entries that says
    /// `bytes`, or zeros where there are no more. `None` if there can be no such region.
    pub fn new(queues: u16, entries: u16, index: usize, bytes: &[u8]) -> Option<Self> {
        let layout = Layout { queues, entries };
        let words = Arc::new(SharedWords::new(layout.words().max(1)).ok()?);
        for (at, bytes) in bytes.chunks_exact(8).enumerate() {
            let value = u64::from_ne_bytes(bytes.try_into().ok()?);
            if let Some(word) = words.word(at) {
                word.store(value, Ordering::Relaxed);
            }
        }
        let queue = InFlightQueue::new(Arc::clone(&words), layout, index)?;
        Some(Self {
            words,
            layout,
            index,
            queue,
        })
    }

    /// All of the region.
    pub fn bytes(&self) -> Vec<u8> {
        let words = (0..self.words.len()).filter_map(|at| self.words.word(at));
        words
            .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
            .collect()
    }

    /// As a process sees it that comes after this one has died.
    #[must_use]
    pub fn after_death(&self) -> Option<Self> {
        Some(Self {
            words: Arc::clone(&self.words),
            layout: self.layout,
            index: self.index,
            queue: InFlightQueue::new(Arc::clone(&self.words), self.layout, self.index)?,
        })
    }

    /// Heads that are left to be done in their order; whether a process has been here
    /// before, and whether what it said was dropped.
    pub fn recover(&mut self, size: u16, used: u16, avail: u16) -> (Vec<u16>, bool, bool) {
        let recovery = self.queue.recover(size, used, avail);
        (recovery.heads, recovery.is_old, recovery.is_stale)
    }

    /// A request is taken from the ring.
    pub fn take(&mut self, head: u16) {
        self.queue.take(head);
    }

    /// It goes back into the ring.
    pub fn give_back(&mut self, head: u16) {
        self.queue.give_back(head);
    }

    /// The used index is about to be advanced by it.
    pub fn begin_answer(&mut self, head: u16) {
        self.queue.begin_answer(head);
    }

    /// The used index is now this.
    pub fn end_answer(&mut self, head: u16, used: u16) {
        self.queue.end_answer(head, used);
    }

    /// The used index is now this, without a request.
    pub fn note_used(&mut self, used: u16) {
        self.queue.note_used(used);
    }
}
