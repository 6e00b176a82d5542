//! How many lines each part of the program may log.
//!
//! Who floods the log is not always ours to mend: the libraries log too, and what they
//! have to say a guest or a front-end may be able to provoke. So the limit is here,
//! where all lines come by.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

/// Length of an interval.
const INTERVAL: Duration = Duration::from_secs(5);

/// Lines that each target may log in an interval, of what an operator is to see. With
/// the longest messages that is 80 KiB a second; the device's own lines are fewer.
const MOST_LINES: u32 = 100;

/// The same of what somebody who looks for an error has asked for.
const MOST_DEBUG_LINES: u32 = 5_000;

/// Targets that are counted one by one; there are fewer modules that log.
const MOST_TARGETS: usize = 256;

/// Lines of each target and kind in its present interval.
#[derive(Debug, Default)]
pub(super) struct Limit(Mutex<HashMap<String, [Count; 2]>>);

#[derive(Clone, Copy, Debug)]
struct Count {
    since: Instant,
    lines: u32,
    left_out: u64,
}

impl Limit {
    /// Whether one more line may be logged now; if so, how many of its target were left
    /// out since the last one that was.
    pub fn admit(&self, level: Level, target: &str) -> Option<u64> {
        self.admit_at(level, target, Instant::now())
    }

    fn admit_at(&self, level: Level, target: &str, now: Instant) -> Option<u64> {
        let is_debug = level > Level::Info;
        let most = if is_debug {
            MOST_DEBUG_LINES
        } else {
            MOST_LINES
        };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = counts.contains_key(target);
        let target = if is_known || counts.len() < MOST_TARGETS {
            target
        } else {
            ""
        };
        let fresh = Count {
            since: now,
            lines: 0,
            left_out: 0,
        };
        if !counts.contains_key(target) {
            counts.insert(target.to_owned(), [fresh; 2]);
        }
        let count = &mut counts.get_mut(target)?[usize::from(is_debug)];
        if now.saturating_duration_since(count.since) >= INTERVAL {
            count.since = now;
            count.lines = 0;
        }
        if count.lines == most {
            count.left_out += 1;
            return None;
        }
        count.lines += 1;
        Some(std::mem::take(&mut count.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_one_target_is_cut_and_counted_and_hides_no_other() {
        let limit = Limit::default();
        let start = Instant::now();
        let flood = |at| {
            let lines = (0..1_000).map(|_| limit.admit_at(Level::Warn, "library", at));
            lines.flatten().collect::<Vec<_>>()
        };
        let most = MOST_LINES as usize;
        assert_eq!(flood(start), vec![0; most]);
        assert_eq!(limit.admit_at(Level::Error, "ours", start), Some(0));
        assert_eq!(limit.admit_at(Level::Debug, "library", start), Some(0));
        let next = flood(start + INTERVAL);
        assert_eq!((next.len(), next[0]), (most, 1_000 - most as u64));
        assert!(next[1..].iter().all(|&left_out| left_out == 0));
    }

    #[test]
    fn targets_without_number_are_one() {
        let limit = Limit::default();
        let now = Instant::now();
        let admitted = (0..10_000)
            .filter(|n| limit.admit_at(Level::Info, &n.to_string(), now).is_some())
            .count();
        assert_eq!(admitted, MOST_TARGETS + MOST_LINES as usize);
    }
}
