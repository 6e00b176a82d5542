//! How long a queue thread looks for work before it sleeps.
//!
//! A sleep and a wake-up cost more than a short wait. So the thread goes on looking
//! for a while if the last sleeps were shorter than such a while, and does not if
//! they were longer: under load it hardly sleeps, and an idle one costs nothing. It
//! is how KVM polls before it halts a vCPU.

use std::time::{Duration, Instant};

/// The shortest while that is tried.
const SHORTEST: Duration = Duration::from_micros(8);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Spin {
    longest: Duration,
    /// How long to look now; zero: not at all.
    window: Duration,
    /// Since when nothing was found.
    idle_since: Option<Instant>,
    asleep_since: Option<Instant>,
}

impl Spin {
    /// Never longer than `longest`; zero: never.
    pub fn new(longest: Duration) -> Self {
        Self {
            longest,
            window: Duration::ZERO,
            idle_since: None,
            asleep_since: None,
        }
    }

    /// The thread was woken.
    pub fn wake(&mut self) {
        if let Some(slept) = self.asleep_since.take().map(|since| since.elapsed()) {
            self.adapt(slept);
        }
    }

    fn adapt(&mut self, slept: Duration) {
        self.window = if slept <= self.longest {
            (self.window * 2).max(SHORTEST).min(self.longest)
        } else if self.window > SHORTEST {
            self.window / 2
        } else {
            Duration::ZERO
        };
    }

    /// There was something to do.
    pub fn found(&mut self) {
        self.idle_since = None;
    }

    /// There is nothing to do: whether to look again.
    pub fn goes_on(&mut self) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let since = *self.idle_since.get_or_insert_with(Instant::now);
        since.elapsed() < self.window
    }

    /// The thread is about to sleep until what is under way has ended, which says
    /// nothing about the driver.
    pub fn break_off(&mut self) {
        self.idle_since = None;
    }

    /// The thread is about to sleep until the driver has something.
    pub fn sleep(&mut self) {
        self.idle_since = None;
        self.asleep_since = (!self.longest.is_zero()).then(Instant::now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_make_it_look_longer_and_long_ones_shorter() {
        let longest = Duration::from_micros(50);
        let mut spin = Spin::new(longest);
        assert!(!spin.goes_on());
        for window in [8, 16, 32, 50, 50] {
            spin.adapt(Duration::from_micros(20));
            assert_eq!(spin.window, Duration::from_micros(window));
        }
        while !spin.window.is_zero() {
            let before = spin.window;
            spin.adapt(Duration::from_millis(1));
            assert!(spin.window < before);
        }
        assert!(!spin.goes_on());
    }

    #[test]
    fn a_sleep_for_what_is_under_way_does_not_count() {
        let mut spin = Spin::new(Duration::from_micros(50));
        spin.adapt(Duration::ZERO);
        let window = spin.window;
        spin.break_off();
        std::thread::sleep(Duration::from_millis(1));
        spin.wake();
        assert_eq!(spin.window, window);
    }

    #[test]
    fn looking_ends() {
        let mut spin = Spin::new(Duration::from_micros(50));
        spin.adapt(Duration::ZERO);
        while spin.goes_on() {}
        spin.sleep();
        assert!(spin.idle_since.is_none() && spin.asleep_since.is_some());
    }

    #[test]
    fn none_allowed_is_none_done() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.sleep();
        spin.wake();
        assert!(!spin.goes_on());
    }
}
