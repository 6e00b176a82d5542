//! What a run does: which requests, where, how many at a time.
//!
//! Knows block numbers and request kinds. Must not know who serves them.

use serde::{Deserialize, Serialize};

use crate::content::BLOCK;

/// The kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Reads only.
    Read,
    /// Writes only.
    Write,
    /// 70 % reads, 30 % writes.
    Mix,
    /// Writes, and a flush after each `every` of them, before the next.
    WriteFlush {
        /// Writes between two flushes, at least 1.
        every: u32,
    },
    /// Discards.
    Discard,
}

/// Share of the reads of [`Action::Mix`], in percent.
pub const MIX_READS_PERCENT: u8 = 70;

impl Action {
    /// Whether it changes the disk.
    pub fn writes(self) -> bool {
        self != Self::Read
    }
}

/// Where the requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Anywhere, with repeats.
    Random,
    /// One after another, from the start again at the end. Each queue has a part
    /// of the disk of its own.
    Sequential,
    /// One after another, the disk once.
    SequentialOnce,
    /// In a random order, each place once.
    ShuffledOnce,
    /// In a random order, the first block of each piece of `stride` bytes once.
    EachOnce {
        /// In bytes, a multiple of the request size.
        stride: u32,
    },
}

/// The state of the image when a run starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Every block was written through the server under test, then flushed. The
    /// image lives through all runs.
    Written,
    /// As [`Self::Written`], made anew for each run.
    WrittenAnew,
    /// Nothing was written; made anew for each run. A plain file is
    /// fallocate'd and never written.
    Empty,
    /// An empty delta (or qcow2 overlay) above a written one; made anew for each
    /// run.
    Overlay,
}

impl Start {
    /// Whether each run gets an image and a server of its own.
    pub fn is_fresh(self) -> bool {
        self != Self::Written
    }
}

/// When a write is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// When it can be read back; a flush makes it stable.
    WriteBack,
    /// When it is stable.
    WriteThrough,
}

/// One kind of load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    /// For people, and to select it by.
    pub name: String,
    /// The kind of requests.
    pub action: Action,
    /// Where they go.
    pub order: Order,
    /// Size of each in bytes, a multiple of [`BLOCK`].
    pub request_bytes: u32,
    /// Requests in flight on each queue, at least 1.
    pub depth: u32,
    /// Queues, each driven by a thread of its own.
    pub queues: u32,
    /// What is there before.
    pub start: Start,
    /// When a write counts as done.
    pub cache: Cache,
    /// Cluster size in bytes, for the formats that have clusters; `None` for the
    /// default of each (ploop and parallels 1 MiB, qcow2 64 KiB).
    pub cluster_bytes: Option<u32>,
}

impl Workload {
    /// Whether a run ends only when every place was visited, however long that
    /// takes: a run cut short would show the beginning only.
    pub fn is_fixed_work(&self) -> bool {
        matches!(self.order, Order::EachOnce { .. }) || self.action == Action::Discard
    }

    /// Whether the time of a flush at the end counts. It does wherever the run
    /// makes a mapping that a server may write later.
    pub fn flush_counts(&self) -> bool {
        self.start.is_fresh()
    }

    /// What its rate is given in.
    pub fn unit(&self) -> Unit {
        if self.request_bytes >= 64 << 10 {
            Unit::MebibytesPerSecond
        } else {
            Unit::RequestsPerSecond
        }
    }
}

/// The unit of a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Requests per second.
    #[serde(rename = "IOPS")]
    RequestsPerSecond,
    /// 2^20 bytes per second.
    #[serde(rename = "MiB/s")]
    MebibytesPerSecond,
}

impl Unit {
    /// As printed.
    pub fn label(self) -> &'static str {
        match self {
            Self::RequestsPerSecond => "IOPS",
            Self::MebibytesPerSecond => "MiB/s",
        }
    }
}

/// The places that one queue visits, in their order.
pub struct Places {
    order: Order,
    rng: fastrand::Rng,
    /// First block of this queue's part.
    first: u64,
    /// Blocks from one place to the next.
    stride: u64,
    /// Places in this queue's part.
    count: u64,
    /// How many were given out.
    next: u64,
    /// The order of the places, where each is visited once.
    shuffled: Vec<u32>,
}

impl Places {
    /// The places of queue `queue` on a disk of `disk_bytes`.
    pub fn new(workload: &Workload, disk_bytes: u64, queue: u32, seed: u64) -> Self {
        let stride_bytes = match workload.order {
            Order::EachOnce { stride } => stride,
            _ => workload.request_bytes,
        };
        let all = disk_bytes / u64::from(stride_bytes);
        let stride = u64::from(stride_bytes) / BLOCK as u64;
        // Random queues share the whole disk; the others divide it.
        let (first, count) = match workload.order {
            Order::Random => (0, all),
            _ => {
                let part = all / u64::from(workload.queues);
                (u64::from(queue) * part * stride, part)
            }
        };
        let mut rng = fastrand::Rng::with_seed(seed);
        let shuffled = match workload.order {
            Order::ShuffledOnce | Order::EachOnce { .. } => {
                let mut places: Vec<u32> = (0..count as u32).collect();
                rng.shuffle(&mut places);
                places
            }
            _ => Vec::new(),
        };
        Self {
            order: workload.order,
            rng,
            first,
            stride,
            count,
            next: 0,
            shuffled,
        }
    }

    /// The block at which the next request starts; `None` when all were visited.
    pub fn next(&mut self) -> Option<u64> {
        let index = self.next;
        let place = match self.order {
            Order::Random => self.rng.u64(..self.count),
            Order::Sequential => index % self.count,
            Order::SequentialOnce => (index < self.count).then_some(index)?,
            Order::ShuffledOnce | Order::EachOnce { .. } => {
                u64::from(*self.shuffled.get(usize::try_from(index).ok()?)?)
            }
        };
        self.next += 1;
        Some(self.first + place * self.stride)
    }

    /// Whether the next request of [`Action::Mix`] is a read.
    pub fn mix_is_read(&mut self) -> bool {
        self.rng.u8(..100) < MIX_READS_PERCENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(order: Order, request_bytes: u32, queues: u32) -> Workload {
        Workload {
            name: String::new(),
            action: Action::Write,
            order,
            request_bytes,
            depth: 1,
            queues,
            start: Start::Empty,
            cache: Cache::WriteBack,
            cluster_bytes: None,
        }
    }

    fn all(mut places: Places) -> Vec<u64> {
        std::iter::from_fn(|| places.next()).collect()
    }

    #[test]
    fn each_place_is_visited_once_by_one_queue() {
        for order in [Order::ShuffledOnce, Order::SequentialOnce] {
            let workload = workload(order, 8192, 2);
            let mut seen = Vec::new();
            for queue in 0..2 {
                seen.extend(all(Places::new(&workload, 16 * 8192, queue, 1)));
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..16).map(|i| i * 2).collect::<Vec<u64>>());
        }
    }

    #[test]
    fn a_stride_visits_the_first_block_of_each_piece() {
        let workload = workload(Order::EachOnce { stride: 65536 }, 4096, 1);
        let mut seen = all(Places::new(&workload, 4 * 65536, 0, 1));
        seen.sort_unstable();
        assert_eq!(seen, [0, 16, 32, 48]);
    }

    #[test]
    fn sequential_starts_again_and_random_stays_inside() {
        let mut places = Places::new(&workload(Order::Sequential, 4096, 1), 8192, 0, 1);
        assert_eq!([0; 3].map(|_| places.next().unwrap()), [0, 1, 0]);
        let mut places = Places::new(&workload(Order::Random, 4096, 1), 5 * 4096, 0, 1);
        assert!((0..1000).all(|_| places.next().unwrap() < 5));
    }
}
