//! Log lines for what a guest or front-end can provoke at will.
//!
//! A guest that sends rubbish as fast as it can must not fill the host's log. All
//! logging in this module's parent goes through [`guest_log`]; `clippy.toml` and a
//! lint in the parent see to it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// Lines let through in each interval.
const BURST: u32 = 10;

/// Length of the interval in ms.
const INTERVAL_MS: u64 = 5_000;

/// Counts the log lines of one source. Shared by threads; exact only to a few
/// lines when several log at the same moment.
#[derive(Debug)]
pub(super) struct RateLimit {
    made: Instant,
    /// Start of the current interval in ms since `made`.
    interval_ms: AtomicU64,
    /// Lines asked for in the current interval.
    asked: AtomicU32,
}

impl RateLimit {
    pub fn new() -> Self {
        Self {
            made: Instant::now(),
            interval_ms: AtomicU64::new(0),
            asked: AtomicU32::new(0),
        }
    }

    /// Whether one more line may be logged now; if so, how many were left out
    /// since the last one that was.
    pub fn admit(&self) -> Option<u32> {
        self.admit_at(self.made.elapsed().as_millis() as u64)
    }

    fn admit_at(&self, now_ms: u64) -> Option<u32> {
        let interval_ms = self.interval_ms.load(Ordering::Relaxed);
        if now_ms.saturating_sub(interval_ms) >= INTERVAL_MS {
            self.interval_ms.store(now_ms, Ordering::Relaxed);
            let asked = self.asked.swap(1, Ordering::Relaxed);
            return Some(asked.saturating_sub(BURST));
        }
        // Below the burst there is nothing to lose by a wrap-around: it would take
        // a line every nanosecond.
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        (asked < BURST).then_some(0)
    }
}

/// Logs at a level unless the [`RateLimit`] forbids it:
/// `guest_log!(limit, Warn, "format {}", arguments)`.
macro_rules! guest_log {
    ($limit:expr, $level:ident, $($arg:tt)+) => {
        if let Some(left_out) = $limit.admit() {
            $crate::device::ratelimit::log_line(
                log::Level::$level,
                left_out,
                format_args!($($arg)+),
            );
        }
    };
}
pub(super) use guest_log;

/// Logs what nobody sees who does not look for a fault. The logger bounds it.
macro_rules! debug_log {
    ($($arg:tt)+) => {
        $crate::device::ratelimit::log_line(log::Level::Debug, 0, format_args!($($arg)+))
    };
}
pub(super) use debug_log;

/// The one place in the device that logs.
#[expect(
    clippy::disallowed_macros,
    reason = "only reached through a rate limit or by what happens once"
)]
pub(super) fn log_line(level: log::Level, left_out: u32, line: std::fmt::Arguments<'_>) {
    if left_out > 0 {
        log::log!(target: "vhost_user_ploop::device", level, "{left_out} lines like the next were left out");
    }
    log::log!(target: "vhost_user_ploop::device", level, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_a_burst_per_interval_and_counted() {
        let limit = RateLimit::new();
        let admitted = (0..1000).filter(|_| limit.admit_at(0).is_some()).count();
        assert_eq!(admitted, BURST as usize);
        assert_eq!(limit.admit_at(INTERVAL_MS - 1), None);
        assert_eq!(limit.admit_at(INTERVAL_MS), Some(1001 - BURST));
        assert_eq!(limit.admit_at(INTERVAL_MS), Some(0));
    }
}
