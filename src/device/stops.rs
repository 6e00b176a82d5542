//! Rings that are stopped one after another.
//!
//! A front-end that stops a guest stops its rings in turn, and waits for each. If the
//! others went on meanwhile, each would have as much under way as may be when its turn
//! comes. So while a ring stops, and for a moment after it, the others end what they have
//! begun and begin nothing; if no other stop follows, they go on.
//!
//! Knows times. Must not know what a ring does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

/// How long after a stop another one counts as its successor: more than a front-end needs
/// from an answer to its next message.
const GAP: Duration = Duration::from_millis(20);

/// How often is looked for the end of a stop.
const LOOK: Duration = Duration::from_millis(20);

/// For how long, since the first of the stops, what cannot be given back is gone on with.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// For how long, since the first of the stops, what limits have kept back is gone on with
/// where it cannot be given back: far longer than a disk needs for what an honest driver has
/// in its rings.
const PATIENCE: Duration = Duration::from_secs(30);

/// A stop is under way.
const STOPPING: u64 = u64::MAX;

/// The stops of a device.
#[derive(Debug)]
pub(super) struct Stops {
    /// What the times below are counted from.
    start: Instant,
    /// Until when nothing is begun, in microseconds; 0 if anything may be. Looked at by every
    /// queue, and written by nobody while rings run.
    quiet: CachePadded<AtomicU64>,
    /// When the first of the stops began, in microseconds.
    first: AtomicU64,
}

impl Stops {
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            quiet: CachePadded::default(),
            first: AtomicU64::default(),
        }
    }

    /// As if the first of them had begun so long ago.
    #[cfg(test)]
    pub fn since(ago: Duration) -> Self {
        Self {
            start: Instant::now() - ago,
            ..Self::new()
        }
    }

    /// A ring stops, until the value is dropped.
    pub fn begin(&self) -> Stopping<'_> {
        let now = self.now();
        if self.quiet.swap(STOPPING, Ordering::Relaxed) < now {
            self.first.store(now, Ordering::Relaxed);
        }
        Stopping(self)
    }

    /// Rings start again.
    pub fn are_over(&self) {
        self.quiet.store(0, Ordering::Relaxed);
    }

    /// For how long nothing is to be begun, if so. It can turn out to be longer.
    pub fn pause(&self) -> Option<Duration> {
        match self.quiet.load(Ordering::Relaxed) {
            0 => None,
            STOPPING => Some(LOOK),
            until => self.left(until),
        }
    }

    /// How long a ring that stops may go on with what cannot be given back.
    pub fn grace(&self) -> Duration {
        GRACE.saturating_sub(self.passed())
    }

    /// The same with what limits have kept back until then.
    pub fn patience(&self) -> Duration {
        PATIENCE.saturating_sub(self.passed())
    }

    /// Since the first of the stops.
    fn passed(&self) -> Duration {
        Duration::from_micros(self.now() - self.first.load(Ordering::Relaxed))
    }

    #[cold]
    fn left(&self, until: u64) -> Option<Duration> {
        let left = until.saturating_sub(self.now());
        if left == 0 {
            // Unless another stop has begun.
            let _ = self
                .quiet
                .compare_exchange(until, 0, Ordering::Relaxed, Ordering::Relaxed);
            return None;
        }
        Some(Duration::from_micros(left))
    }

    /// Never 0.
    fn now(&self) -> u64 {
        self.start.elapsed().as_micros() as u64 + 1
    }
}

/// See [`Stops::begin`].
#[must_use]
pub(super) struct Stopping<'a>(&'a Stops);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        let until = self.0.now() + GAP.as_micros() as u64;
        self.0.quiet.store(until, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::sleep;

    #[test]
    fn others_are_quiet_during_a_stop_and_a_moment_after_it() {
        let stops = Stops::new();
        assert_eq!(stops.pause(), None);
        let stopping = stops.begin();
        sleep(2 * GAP);
        assert!(stops.pause().is_some());
        drop(stopping);
        assert!(stops.pause().is_none_or(|left| left <= GAP));
        sleep(GAP);
        assert_eq!(stops.pause(), None);
    }

    #[test]
    fn stops_in_a_row_share_one_time_of_grace() {
        let stops = Stops::new();
        drop(stops.begin());
        let first = stops.first.load(Ordering::Relaxed);
        // Some time, and however long this thread was off its CPU.
        sleep(Duration::from_millis(1));
        stops.quiet.store(STOPPING - 1, Ordering::Relaxed);
        drop(stops.begin());
        assert_eq!(stops.first.load(Ordering::Relaxed), first);
        assert!(stops.grace() < GRACE && stops.patience() < PATIENCE);
        stops.are_over();
        assert_eq!(stops.pause(), None);
        drop(stops.begin());
        assert!(stops.first.load(Ordering::Relaxed) > first);
    }
}
