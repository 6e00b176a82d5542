//! What guests have done with the disk: requests, bytes, errors and times.
//!
//! Each queue counts for itself, in memory that only its thread writes, and whoever asks
//! adds it up. So counting costs a queue a few stores to lines that are in its cache, and
//! a look at the clock for each batch of requests that begin or end together.
//!
//! The numbers go on when front-ends come and go, and begin anew with the process.

use std::array;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::MAX_QUEUES;
use super::histogram::{Histogram, Recorder};
use crate::ploop::Command;

/// What requests are counted as. Zeroing is a write, as it is in QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Unmap,
}

impl Kind {
    const COUNT: usize = 4;

    pub fn of(command: &Command) -> Self {
        match command {
            Command::Read { .. } => Self::Read,
            Command::Write { .. } | Command::WriteZeroes { .. } => Self::Write,
            Command::Flush => Self::Flush,
            Command::Discard { .. } => Self::Unmap,
        }
    }
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindCounts {
    /// That have succeeded.
    pub operations: u64,
    /// Of those.
    pub bytes: u64,
    /// That have failed.
    pub failed: u64,
    /// That were refused, since there cannot be such a request.
    pub invalid: u64,
    /// What those took that have succeeded or failed, from the ring to the answer, added
    /// up.
    pub total_time_ns: u64,
}

impl KindCounts {
    fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.bytes += other.bytes;
        self.failed += other.failed;
        self.invalid += other.invalid;
        self.total_time_ns += other.total_time_ns;
    }
}

/// Requests of all kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Reads.
    pub reads: KindCounts,
    /// Writes and zeroing.
    pub writes: KindCounts,
    /// Flushes.
    pub flushes: KindCounts,
    /// Discards.
    pub unmaps: KindCounts,
    /// The highest end of a write, in bytes.
    pub highest_write: u64,
    /// How long ago the last request ended; `None` if there was none.
    pub idle_time_ns: Option<u64>,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.reads.add(&other.reads);
        self.writes.add(&other.writes);
        self.flushes.add(&other.flushes);
        self.unmaps.add(&other.unmaps);
        self.highest_write = self.highest_write.max(other.highest_write);
        let idle = [self.idle_time_ns, other.idle_time_ns];
        self.idle_time_ns = idle.into_iter().flatten().min();
    }
}

/// How long requests of each kind took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    /// Reads.
    pub reads: Histogram,
    /// Writes and zeroing.
    pub writes: Histogram,
    /// Flushes.
    pub flushes: Histogram,
    /// Discards.
    pub unmaps: Histogram,
}

/// What somebody wants to know of latencies, of one kind of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bins {
    /// Between the intervals, in ns, ascending.
    pub boundaries: Vec<u64>,
    /// How many requests took so long, by intervals.
    pub counts: Vec<u64>,
}

/// Of each kind that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatencyBins {
    /// Reads.
    pub reads: Option<Bins>,
    /// Writes and zeroing.
    pub writes: Option<Bins>,
    /// Flushes.
    pub flushes: Option<Bins>,
}

/// Which intervals are counted, of each kind that was asked for.
#[derive(Debug, Default)]
struct Asked {
    reads: Option<AskedOfKind>,
    writes: Option<AskedOfKind>,
    flushes: Option<AskedOfKind>,
}

/// Of one kind.
#[derive(Debug)]
struct AskedOfKind {
    boundaries: Vec<u64>,
    /// What there was when somebody asked.
    before: Histogram,
}

impl AskedOfKind {
    fn bins(&self, now: &Histogram) -> Bins {
        Bins {
            counts: now.since(&self.before).bins(&self.boundaries),
            boundaries: self.boundaries.clone(),
        }
    }
}

/// One queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueReport {
    /// Which.
    pub index: usize,
    /// Whether its ring runs.
    pub runs: bool,
    /// Requests that were taken from the ring and have not ended.
    pub in_flight: u64,
    /// What has come by it.
    pub totals: Totals,
}

/// Of a disk.
#[derive(Debug)]
pub struct Statistics {
    /// What times are counted from.
    start: Instant,
    /// Those that have run.
    queues: [OnceLock<Arc<QueueCounters>>; MAX_QUEUES as usize],
    asked: Mutex<Asked>,
}

impl Default for Statistics {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            queues: array::from_fn(|_| OnceLock::new()),
            asked: Mutex::default(),
        }
    }
}

impl Statistics {
    /// All queues together.
    pub fn totals(&self) -> Totals {
        let mut sum = Totals::default();
        for queue in self.queues() {
            sum.add(&queue.totals);
        }
        sum
    }

    /// Each queue that has ever run.
    pub fn queues(&self) -> Vec<QueueReport> {
        let now = self.now();
        let queues = self.queues.iter().enumerate();
        let known = queues.filter_map(|(index, queue)| Some((index, queue.get()?)));
        known
            .map(|(index, queue)| queue.report(index, now))
            .collect()
    }

    /// How many requests have begun, as long as none is under way: another number means that
    /// guests have done something meanwhile. `None` while one is.
    pub fn activity(&self) -> Option<u64> {
        let mut sum = 0_u64;
        for queue in self.queues.iter().filter_map(OnceLock::get) {
            // In this order: it may end meanwhile, but not before it has begun.
            let ended = queue.ended.load(Ordering::Acquire);
            let begun = queue.begun.load(Ordering::Relaxed);
            if begun != ended {
                return None;
            }
            sum = sum.wrapping_add(begun);
        }
        Some(sum)
    }

    /// How long requests took, since the beginning.
    pub fn latencies(&self) -> Latencies {
        let mut sum = Latencies::default();
        for queue in self.queues.iter().filter_map(OnceLock::get) {
            let kinds = [
                &mut sum.reads,
                &mut sum.writes,
                &mut sum.flushes,
                &mut sum.unmaps,
            ];
            for (kind, counters) in kinds.into_iter().zip(&queue.kinds) {
                kind.add(&counters.latency);
            }
        }
        sum
    }

    /// Counts reads, writes and flushes from now on by intervals between these
    /// boundaries, in ns, which ascend; without any there is one interval. `None`: those go on
    /// as they are.
    pub fn ask_for_bins(&self, [reads, writes, flushes]: [Option<Vec<u64>>; 3]) {
        let now = self.latencies();
        let mut asked = self.asked();
        let Asked {
            reads: of_reads,
            writes: of_writes,
            flushes: of_flushes,
        } = &mut *asked;
        for (boundaries, before, of_kind) in [
            (reads, now.reads, of_reads),
            (writes, now.writes, of_writes),
            (flushes, now.flushes, of_flushes),
        ] {
            if let Some(boundaries) = boundaries {
                *of_kind = Some(AskedOfKind { boundaries, before });
            }
        }
    }

    /// Counts nothing by intervals any more.
    pub fn give_up_bins(&self) {
        *self.asked() = Asked::default();
    }

    /// What was asked for.
    pub fn bins(&self) -> LatencyBins {
        let now = self.latencies();
        let asked = self.asked();
        let bins = |asked: &Option<AskedOfKind>, now| asked.as_ref().map(|asked| asked.bins(now));
        LatencyBins {
            reads: bins(&asked.reads, &now.reads),
            writes: bins(&asked.writes, &now.writes),
            flushes: bins(&asked.flushes, &now.flushes),
        }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counters of a queue, for its thread.
    pub(super) fn queue(&self, index: usize) -> Arc<QueueCounters> {
        match self.queues.get(index) {
            Some(queue) => Arc::clone(queue.get_or_init(Arc::default)),
            // There is no such queue, and nothing to be counted.
            None => Arc::default(),
        }
    }

    /// Nanoseconds, from any moment on; never 0.
    pub(super) fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64 + 1
    }
}

/// Of one queue. Only the thread of the queue writes; the alignment keeps others off its
/// cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct QueueCounters {
    kinds: [KindCounters; Kind::COUNT],
    begun: AtomicU64,
    ended: AtomicU64,
    highest_write: AtomicU64,
    /// When a request ended last; 0 if none has.
    last_end: AtomicU64,
    runs: AtomicBool,
}

#[derive(Debug, Default)]
struct KindCounters {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    total_time_ns: AtomicU64,
    latency: Recorder,
}

/// Adds to a counter that nobody else writes.
fn count(counter: &AtomicU64, more: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(more);
    counter.store(sum, Ordering::Relaxed);
}

impl QueueCounters {
    /// The thread begins or ends.
    pub fn set_runs(&self, runs: bool) {
        self.runs.store(runs, Ordering::Relaxed);
    }

    /// A request goes to the engine.
    pub fn begin(&self) {
        count(&self.begun, 1);
    }

    fn count_end(&self) {
        let ended = self.ended.load(Ordering::Relaxed).wrapping_add(1);
        // Whoever sees an end sees the beginning, too.
        self.ended.store(ended, Ordering::Release);
    }

    /// It has ended without an answer: somebody may do it again.
    pub fn give_up(&self) {
        self.count_end();
    }

    /// A request has ended after this time.
    pub fn end(&self, ended: &Ended, is_ok: bool, time_ns: u64) {
        self.count_end();
        let counters = &self.kinds[ended.kind as usize];
        count(&counters.total_time_ns, time_ns);
        counters.latency.record(time_ns);
        if !is_ok {
            return count(&counters.failed, 1);
        }
        count(&counters.operations, 1);
        count(&counters.bytes, ended.bytes);
        if ended.write_end > self.highest_write.load(Ordering::Relaxed) {
            self.highest_write.store(ended.write_end, Ordering::Relaxed);
        }
    }

    /// Some have ended at this moment.
    pub fn note_end(&self, now: u64) {
        self.last_end.store(now, Ordering::Relaxed);
    }

    /// One of this kind was refused.
    pub fn refuse(&self, kind: Kind) {
        count(&self.kinds[kind as usize].invalid, 1);
    }

    fn report(&self, index: usize, now: u64) -> QueueReport {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // In this order: it may end meanwhile, but not before it has begun.
        let ended = self.ended.load(Ordering::Acquire);
        let in_flight = load(&self.begun).wrapping_sub(ended);
        let [reads, writes, flushes, unmaps] = self.kinds.each_ref().map(|kind| KindCounts {
            operations: load(&kind.operations),
            bytes: load(&kind.bytes),
            failed: load(&kind.failed),
            invalid: load(&kind.invalid),
            total_time_ns: load(&kind.total_time_ns),
        });
        let last_end = load(&self.last_end);
        QueueReport {
            index,
            runs: self.runs.load(Ordering::Relaxed),
            in_flight,
            totals: Totals {
                reads,
                writes,
                flushes,
                unmaps,
                highest_write: load(&self.highest_write),
                idle_time_ns: (last_end > 0).then(|| now.saturating_sub(last_end)),
            },
        }
    }
}

/// What of a request is counted at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    kind: Kind,
    bytes: u64,
    /// Where a write ends on the disk, in bytes; else 0.
    write_end: u64,
}

impl Ended {
    /// Of a request for this.
    pub fn of(command: &Command) -> Self {
        let (bytes, write_end) = match command {
            Command::Read { data, .. } => (data.len() as u64, 0),
            Command::Write { start, data } => {
                let len = data.len() as u64;
                (len, start.bytes() + len)
            }
            Command::Flush => (0, 0),
            Command::Discard { ranges } => (ranges.iter().map(|it| it.count.bytes()).sum(), 0),
            Command::WriteZeroes { ranges, .. } => {
                let end =
                    |range: &crate::ploop::SectorRange| range.start.bytes() + range.count.bytes();
                let bytes = ranges.iter().map(|range| range.count.bytes()).sum();
                (bytes, ranges.iter().map(end).max().unwrap_or_default())
            }
        };
        Self {
            kind: Kind::of(command),
            bytes,
            write_end,
        }
    }

    /// What it counts as.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How much of the disk it is about.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Sector;
    use crate::ploop::SectorRange;

    fn ended(kind: Kind, bytes: u64, write_end: u64) -> Ended {
        Ended {
            kind,
            bytes,
            write_end,
        }
    }

    #[test]
    fn queues_are_added_up() {
        let statistics = Statistics::default();
        assert_eq!(statistics.totals(), Totals::default());
        let [first, third] = [0, 2].map(|index| statistics.queue(index));
        first.begin();
        first.end(&ended(Kind::Read, 512, 0), true, 100);
        first.begin();
        first.end(&ended(Kind::Write, 1024, 4096), true, 50);
        third.begin();
        third.end(&ended(Kind::Write, 4096, 9000), true, 7);
        third.begin();
        third.end(&ended(Kind::Write, 4096, 1 << 40), false, 3);
        third.refuse(Kind::Unmap);
        third.begin();
        third.set_runs(true);
        third.note_end(statistics.now());

        let totals = statistics.totals();
        let expected = KindCounts {
            operations: 2,
            bytes: 5120,
            failed: 1,
            invalid: 0,
            total_time_ns: 60,
        };
        assert_eq!(totals.writes, expected);
        assert_eq!((totals.reads.operations, totals.reads.bytes), (1, 512));
        assert_eq!(totals.unmaps.invalid, 1);
        assert_eq!(totals.highest_write, 9000, "what failed was not written");
        assert!(totals.idle_time_ns.is_some());
        let queues = statistics.queues();
        let seen: Vec<_> = queues.iter().map(|it| (it.index, it.in_flight)).collect();
        assert_eq!(seen, [(0, 0), (2, 1)]);
        assert!(queues[1].runs && !queues[0].runs);
        let latencies = statistics.latencies();
        assert_eq!(latencies.writes.bins(&[]), [3]);
        assert_eq!(latencies.reads.bins(&[]), [1]);
        assert_eq!(queues[0].totals.idle_time_ns, None);
    }

    #[test]
    fn latencies_are_counted_from_when_they_are_asked_for() {
        let statistics = Statistics::default();
        let queue = statistics.queue(0);
        assert_eq!(statistics.bins(), LatencyBins::default());
        let read = |ns| queue.end(&ended(Kind::Read, 512, 0), true, ns);
        read(1_000_000);
        statistics.ask_for_bins([Some(vec![10_000, 100_000]), None, Some(vec![5])]);
        read(50_000);
        read(2_000);
        read(3_000);
        let bins = statistics.bins();
        assert_eq!(bins.reads.map(|bins| bins.counts), Some(vec![2, 1, 0]));
        assert_eq!(bins.writes, None);
        assert_eq!(bins.flushes.map(|bins| bins.counts), Some(vec![0, 0]));
        // Others go on.
        statistics.ask_for_bins([None, Some(Vec::new()), None]);
        let bins = statistics.bins();
        assert_eq!(bins.reads.map(|bins| bins.counts), Some(vec![2, 1, 0]));
        assert_eq!(bins.writes.map(|bins| bins.counts), Some(vec![0]));
        statistics.ask_for_bins([Some(vec![10_000]), None, None]);
        let bins = statistics.bins();
        assert_eq!(bins.reads.map(|bins| bins.counts), Some(vec![0, 0]));
        statistics.give_up_bins();
        assert_eq!(statistics.bins(), LatencyBins::default());
    }

    #[test]
    fn a_request_counts_as_what_it_is_to_the_guest() {
        let range = |start, count| SectorRange {
            start: Sector(start),
            count: Sector(count),
        };
        let ranges = || [range(8, 2), range(1, 1)].into_iter().collect();
        let zeroes = Command::WriteZeroes {
            ranges: ranges(),
            unmap: true,
        };
        assert_eq!(Ended::of(&zeroes), ended(Kind::Write, 1536, 5120));
        let discard = Command::Discard { ranges: ranges() };
        assert_eq!(Ended::of(&discard), ended(Kind::Unmap, 1536, 0));
        assert_eq!(Ended::of(&Command::Flush), ended(Kind::Flush, 0, 0));
    }
}
