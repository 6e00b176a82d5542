//! How long requests took: how many of which duration.
//!
//! Durations are sorted into buckets that are an eighth of a power of two wide, so what is
//! read from them is off by a sixteenth at most, however long or short it is, and sorting
//! one in costs a few instructions and no look at any setting.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};

/// The shift that makes buckets of the shortest durations: each has 128 ns.
const SHORTEST_SHIFT: u32 = 7;

/// Buckets for each doubling, as a shift.
const PART_SHIFT: u32 = 3;
const PARTS: usize = 1 << PART_SHIFT;

/// The doubling that the last bucket is in: what took longer than 68 s is in it, too.
const LAST_DOUBLING: u32 = 35;

/// The first doubling whose buckets are wider than the shortest ones.
const FIRST_DOUBLING: u32 = SHORTEST_SHIFT + PART_SHIFT;

const BUCKETS: usize = PARTS * (LAST_DOUBLING - FIRST_DOUBLING + 2) as usize;

fn bucket_of(ns: u64) -> usize {
    let ns = ns.min((2 << LAST_DOUBLING) - 1);
    if ns < 1 << FIRST_DOUBLING {
        return (ns >> SHORTEST_SHIFT) as usize;
    }
    let doubling = ns.ilog2();
    let part = (ns >> (doubling - PART_SHIFT)) as usize % PARTS;
    PARTS * (doubling - FIRST_DOUBLING + 1) as usize + part
}

/// The shortest duration in a bucket, or where the last one ends.
fn start_of(bucket: usize) -> u64 {
    let part = (bucket % PARTS) as u64;
    match (bucket / PARTS) as u32 {
        0 => part << SHORTEST_SHIFT,
        n => (PARTS as u64 + part) << (SHORTEST_SHIFT + n - 1),
    }
}

/// Durations, sorted in by one thread and read by others.
#[derive(Debug)]
pub(super) struct Recorder([AtomicU64; BUCKETS]);

impl Default for Recorder {
    fn default() -> Self {
        Self(array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Recorder {
    /// One more; by the one thread.
    pub fn record(&self, ns: u64) {
        let bucket = &self.0[bucket_of(ns)];
        let count = bucket.load(Ordering::Relaxed) + 1;
        bucket.store(count, Ordering::Relaxed);
    }
}

/// Durations, as they were at some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram([u64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

impl Histogram {
    /// Of these, in ns.
    #[cfg(test)]
    pub(crate) fn of(durations: &[u64]) -> Self {
        let recorder = Recorder::default();
        durations.iter().for_each(|&ns| recorder.record(ns));
        let mut histogram = Self::default();
        histogram.add(&recorder);
        histogram
    }

    pub(super) fn add(&mut self, recorder: &Recorder) {
        for (sum, count) in self.0.iter_mut().zip(&recorder.0) {
            *sum += count.load(Ordering::Relaxed);
        }
    }

    /// What has come since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self(array::from_fn(|at| {
            self.0[at].saturating_sub(earlier.0[at])
        }))
    }

    /// Where each bucket begins that has something, in ns, and how much it has.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let all = self.0.iter().enumerate();
        all.filter(|(_, count)| **count > 0)
            .map(|(bucket, &count)| (start_of(bucket), count))
    }

    /// How many there are in each of the intervals that begin with 0 and these, in ns,
    /// which ascend. A bucket that lies in two counts where its middle is.
    #[must_use]
    pub fn bins(&self, boundaries: &[u64]) -> Vec<u64> {
        let mut bins = vec![0; boundaries.len() + 1];
        for (bucket, &count) in self.0.iter().enumerate() {
            let middle = start_of(bucket).midpoint(start_of(bucket + 1));
            bins[boundaries.partition_point(|&boundary| boundary <= middle)] += count;
        }
        bins
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_and_are_narrow() {
        for bucket in 0..BUCKETS {
            let (start, end) = (start_of(bucket), start_of(bucket + 1));
            assert!(start < end);
            assert_eq!(bucket_of(start), bucket);
            assert_eq!(bucket_of(end - 1), bucket);
            assert!(
                end - start <= (start / PARTS as u64).max(128),
                "{start} to {end}"
            );
        }
        assert_eq!(start_of(BUCKETS), 2 << LAST_DOUBLING);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn durations_are_found_in_the_intervals_that_were_asked_for() {
        let recorder = Recorder::default();
        for us in [1, 9, 11, 90, 110, 5_000_000] {
            recorder.record(us * 1000);
        }
        let mut before = Histogram::default();
        before.add(&recorder);
        assert_eq!(before.bins(&[10_000, 100_000, 1_000_000]), [2, 2, 1, 1]);
        assert_eq!(before.bins(&[]), [6]);
        // On either side of the middle of the bucket that it is in.
        assert_eq!(before.bins(&[4_950_000_000]), [5, 1]);
        assert_eq!(before.bins(&[5_250_000_000]), [6, 0]);
        recorder.record(50_000);
        let mut after = Histogram::default();
        after.add(&recorder);
        let buckets: Vec<_> = after.since(&before).buckets().collect();
        let [(start, 1)] = buckets[..] else {
            panic!("{buckets:?}");
        };
        assert!((45_000..=50_000).contains(&start), "{start}");
    }
}
