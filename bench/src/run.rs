//! One run: a workload on an open device, timed.
//!
//! Knows the client and the workload. Must not know which server answers.

use std::ops::RangeInclusive;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use crate::client::{Device, Lane};
use crate::content::{self, BLOCK, Generation, STAMP, Stamp, WrongData};
use crate::workload::{Action, Places, Workload};

/// How many of its last writes each queue remembers for verification.
const REMEMBERED: usize = 64;

/// Latencies are kept to three digits up to a minute, in nanoseconds.
const LONGEST_NS: u64 = 60_000_000_000;
const DIGITS: u8 = 3;

/// An empty histogram of latencies in nanoseconds.
pub fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).expect("the bounds are fixed and valid")
}

/// How a run goes, besides its workload.
#[derive(Clone, Debug)]
pub struct Plan {
    /// No request starts later than this; `None` to go on until all places were
    /// visited.
    pub limit: Option<Duration>,
    /// No more requests than this on each queue.
    pub budget: Option<u64>,
    /// What the writes of this run are stamped with.
    pub generation: Generation,
    /// What reads must find; `None` if that is not known.
    pub expected: Option<RangeInclusive<Generation>>,
    /// Of the random numbers. The same for all sides of a pair.
    pub seed: u64,
}

/// What came out of a run.
pub struct Outcome {
    /// Requests that completed. Of [`Action::WriteFlush`], the writes.
    pub requests: u64,
    /// From the first request to the last completion, a final flush included
    /// where it counts.
    pub elapsed: Duration,
    /// Of each request, in nanoseconds. Of [`Action::WriteFlush`], of the flushes.
    pub latency: Histogram<u64>,
    /// Some of the blocks that were written last.
    pub written: Vec<u64>,
}

/// Runs `workload` once on all queues.
///
/// # Errors
/// A request that fails, takes too long or reads something wrong.
pub fn run(device: &mut Device, workload: &Workload, plan: &Plan) -> Result<Outcome> {
    let capacity = device.capacity();
    let lanes = device.lanes();
    ensure!(
        lanes.len() == workload.queues as usize,
        "the device has {} queues",
        lanes.len()
    );
    let barrier = Barrier::new(lanes.len());
    let loads: Vec<Result<Load>> = thread::scope(|scope| {
        let threads: Vec<_> = lanes
            .iter_mut()
            .zip(0..)
            .map(|(lane, queue)| {
                let seed = plan.seed.wrapping_add(u64::from(queue));
                let places = Places::new(workload, capacity, queue, seed);
                let barrier = &barrier;
                scope.spawn(move || {
                    let driver = Driver::new(lane, workload, plan, places);
                    barrier.wait();
                    driver.drive()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a client thread panicked"))
            .collect()
    });
    let loads = loads.into_iter().collect::<Result<Vec<_>>>()?;
    let start = loads.iter().map(|load| load.start).min();
    let start = start.context("a run without queues")?;
    let mut end = loads.iter().map(|load| load.end).max().unwrap_or(start);
    if workload.flush_counts() {
        device.flush()?;
        end = Instant::now();
    }
    Ok(merge(loads, end - start))
}

fn merge(loads: Vec<Load>, elapsed: Duration) -> Outcome {
    let mut outcome = Outcome {
        requests: 0,
        elapsed,
        latency: latencies(),
        written: Vec::new(),
    };
    for load in loads {
        outcome.requests += load.requests;
        outcome
            .latency
            .add(&load.latency)
            .expect("all histograms have the same bounds");
        outcome.written.extend(load.written);
    }
    outcome
}

/// What one queue did.
struct Load {
    start: Instant,
    end: Instant,
    requests: u64,
    latency: Histogram<u64>,
    written: Vec<u64>,
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Issued {
    at: Instant,
    block: u64,
    is_read: bool,
}

/// Drives one queue.
struct Driver<'a> {
    lane: &'a mut Lane,
    workload: &'a Workload,
    plan: &'a Plan,
    places: Places,
    /// By tag.
    issued: Vec<Issued>,
    /// Requests that may still start.
    budget: u64,
    load: Load,
}

impl<'a> Driver<'a> {
    fn new(lane: &'a mut Lane, workload: &'a Workload, plan: &'a Plan, places: Places) -> Self {
        let now = Instant::now();
        if workload.action.writes() {
            fill_with_noise(lane, workload.request_bytes as usize);
        }
        let idle = Issued {
            at: now,
            block: 0,
            is_read: false,
        };
        Self {
            lane,
            workload,
            plan,
            places,
            issued: vec![idle; workload.depth as usize],
            budget: plan.budget.unwrap_or(u64::MAX),
            load: Load {
                start: now,
                end: now,
                requests: 0,
                latency: latencies(),
                written: Vec::new(),
            },
        }
    }

    fn drive(mut self) -> Result<Load> {
        self.load.start = Instant::now();
        match self.workload.action {
            Action::WriteFlush { every } => self.drive_batches(every)?,
            _ => self.drive_steadily()?,
        }
        Ok(self.load)
    }

    fn is_over(&self, now: Instant) -> bool {
        self.plan
            .limit
            .is_some_and(|limit| now - self.load.start >= limit)
    }

    /// Keeps the depth in flight. The clock is read once for all that completes
    /// together: that is when the next requests start.
    fn drive_steadily(&mut self) -> Result<()> {
        let mut now = self.load.start;
        for tag in 0..self.workload.depth as usize {
            if !self.issue(tag, now) {
                break;
            }
        }
        let mut done = Vec::new();
        while self.lane.in_flight() > 0 {
            done.clear();
            self.lane.wait(&mut done)?;
            now = Instant::now();
            let is_over = self.is_over(now);
            for &tag in &done {
                self.complete(tag)?;
                self.record_latency(now - self.issued[tag].at);
                if !is_over {
                    self.issue(tag, now);
                }
            }
        }
        self.load.end = now;
        Ok(())
    }

    /// `every` writes, at most the depth at a time, then a flush, again and again.
    fn drive_batches(&mut self, every: u32) -> Result<()> {
        let mut now = self.load.start;
        while !self.is_over(now) && self.budget > 0 {
            let mut left = every;
            while left > 0 {
                let together = left.min(self.workload.depth);
                for tag in 0..together as usize {
                    self.issue(tag, now);
                }
                left -= together;
                self.finish_all()?;
            }
            let before = Instant::now();
            self.lane.flush(0);
            self.lane.drain()?;
            now = Instant::now();
            self.record_latency(now - before);
        }
        self.load.end = now;
        Ok(())
    }

    fn finish_all(&mut self) -> Result<()> {
        let mut done = Vec::new();
        while self.lane.in_flight() > 0 {
            done.clear();
            self.lane.wait(&mut done)?;
            for &tag in &done {
                self.complete(tag)?;
            }
        }
        Ok(())
    }

    /// Starts the next request; false if there is none.
    fn issue(&mut self, tag: usize, now: Instant) -> bool {
        let Some(budget) = self.budget.checked_sub(1) else {
            return false;
        };
        let Some(block) = self.places.next() else {
            return false;
        };
        self.budget = budget;
        let is_read = match self.workload.action {
            Action::Read => true,
            Action::Mix => self.places.mix_is_read(),
            Action::Write | Action::WriteFlush { .. } | Action::Discard => false,
        };
        self.issued[tag] = Issued {
            at: now,
            block,
            is_read,
        };
        let offset = block * BLOCK as u64;
        let len = self.workload.request_bytes as usize;
        if is_read {
            self.lane.read(offset, len, tag);
        } else if self.workload.action == Action::Discard {
            self.lane.discard(offset, len as u64, tag);
        } else {
            stamp(self.lane, tag, block, len, self.plan.generation);
            self.lane.write(offset, len, tag);
        }
        true
    }

    fn complete(&mut self, tag: usize) -> Result<()> {
        let Issued { block, is_read, .. } = self.issued[tag];
        if is_read {
            self.check_read(tag, block)?;
        } else if self.workload.action != Action::Discard {
            let slot = self.load.requests as usize % REMEMBERED;
            if slot < self.load.written.len() {
                self.load.written[slot] = block;
            } else {
                self.load.written.push(block);
            }
        }
        self.load.requests += 1;
        Ok(())
    }

    /// Looks at the stamps of the first and the last block.
    fn check_read(&self, tag: usize, block: u64) -> Result<(), WrongData> {
        let Some(expected) = &self.plan.expected else {
            return Ok(());
        };
        let last = self.workload.request_bytes as usize / BLOCK - 1;
        for index in [0, last] {
            let mut bytes = [0; STAMP];
            self.lane.slots.load(tag, index * BLOCK, &mut bytes);
            Stamp::check(&bytes, block + index as u64, expected.clone())?;
        }
        Ok(())
    }

    fn record_latency(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(LONGEST_NS);
        self.load.latency.saturating_record(ns.max(1));
    }
}

/// Gives every block of every buffer its noise; stamps come with each write.
fn fill_with_noise(lane: &mut Lane, len: usize) {
    let body = content::body();
    for slot in 0..lane.slots.count() {
        for offset in (0..len.min(lane.slots.bytes())).step_by(BLOCK) {
            lane.slots.store(slot, offset, &body);
        }
    }
}

fn stamp(lane: &mut Lane, slot: usize, block: u64, len: usize, generation: Generation) {
    for (offset, block) in (0..len).step_by(BLOCK).zip(block..) {
        let stamp = Stamp { block, generation };
        lane.slots.store(slot, offset, &stamp.to_bytes());
    }
}

/// Writes every block of the disk, with stamps of `generation`, and flushes.
///
/// # Errors
/// A request that fails or takes too long.
pub fn fill(device: &mut Device, generation: Generation, request_bytes: usize) -> Result<()> {
    let capacity = device.capacity();
    let lane = device
        .lanes()
        .first_mut()
        .context("a device without queues")?;
    fill_with_noise(lane, request_bytes);
    let mut free: Vec<usize> = (0..lane.slots.count()).collect();
    let mut offset = 0;
    while offset < capacity {
        let Some(tag) = free.pop() else {
            lane.wait(&mut free)?;
            continue;
        };
        let len = request_bytes.min(usize::try_from(capacity - offset)?);
        stamp(lane, tag, offset / BLOCK as u64, len, generation);
        lane.write(offset, len, tag);
        offset += len as u64;
    }
    lane.drain()?;
    device.flush()
}

/// Reads whole blocks and compares every byte.
///
/// # Errors
/// A request that fails, or [`WrongData`].
pub fn verify(
    device: &mut Device,
    blocks: impl IntoIterator<Item = u64>,
    expected: &RangeInclusive<Generation>,
) -> Result<()> {
    let lane = device
        .lanes()
        .first_mut()
        .context("a device without queues")?;
    let mut bytes = [0; BLOCK];
    for block in blocks {
        lane.read(block * BLOCK as u64, BLOCK, 0);
        lane.drain()?;
        lane.slots.load(0, 0, &mut bytes);
        let wrong = |found: [u8; STAMP]| WrongData {
            block,
            expected: expected.clone(),
            found,
        };
        let found: [u8; STAMP] = std::array::from_fn(|i| bytes[i]);
        Stamp::check(&found, block, expected.clone())?;
        ensure!(bytes[STAMP..] == content::body()[STAMP..], wrong(found));
    }
    Ok(())
}
