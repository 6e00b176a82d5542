//! Stable writes under way: whose outcome is not known, no sync counts before.
//!
//! A stable write is a write and a sync in one. When that sync fails, it may have lost
//! what others have written, and nobody else is told of it: a sync that begins after it has
//! failed may well succeed. Its own thread learns of the failure when it looks, which may
//! be much later. So whoever counts a sync waits, when it has ended, until the outcome is
//! known of all stable writes that had begun by then.
//!
//! They are counted by generation, of which two are told apart. Every sync starts a new
//! one and waits for the old one to be over; later stable writes do not hold it up.

use super::preempt;
use super::sync::atomic::{AtomicU32, Ordering, fence};

/// The shared count. One for each engine.
#[derive(Default)]
pub struct StableWrites {
    generation: AtomicU32,
    /// How many are under way of an even and of an odd generation.
    under_way: [AtomicU32; 2],
}

/// The generation of a stable write. Give it back to [`StableWrites::end`].
#[must_use = "a stable write that does not end holds up every sync"]
#[derive(Clone, Copy, Debug)]
pub struct Generation(u32);

impl StableWrites {
    /// One begins. To be called before it is submitted. `tell` as for [`Self::end`].
    pub fn begin(&self, tell: impl Fn()) -> Generation {
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            self.count(generation).fetch_add(1, Ordering::AcqRel);
            fence(Ordering::SeqCst);
            preempt::point("stable write counted");
            // Who starts a new generation after this sees the count.
            if self.generation.load(Ordering::Acquire) == generation {
                return Generation(generation);
            }
            self.end(Generation(generation), &tell);
        }
    }

    /// Its outcome is known, and noted where it concerns others. `tell` is called if that was
    /// the last of an old generation: somebody may wait for it.
    pub fn end(&self, Generation(generation): Generation, tell: impl Fn()) {
        let is_last = self.count(generation).fetch_sub(1, Ordering::AcqRel) == 1;
        fence(Ordering::SeqCst);
        // Who starts a new generation after this sees that none is left.
        if is_last && self.generation.load(Ordering::Acquire) != generation {
            tell();
        }
    }

    /// Starts a new generation; see [`Self::is_old_over`], which must be true of the last
    /// one. By one thread only.
    pub fn advance(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    /// Whether the outcome is known of all that began before the newest generation.
    pub fn is_old_over(&self) -> bool {
        let generation = self.generation.load(Ordering::Acquire);
        self.count(generation.wrapping_sub(1))
            .load(Ordering::Acquire)
            == 0
    }

    /// Whether there is none.
    #[cfg(all(test, not(ploop_loom)))]
    pub fn is_empty(&self) -> bool {
        let count = |count: &AtomicU32| count.load(Ordering::Relaxed);
        self.under_way.iter().map(count).sum::<u32>() == 0
    }

    fn count(&self, generation: u32) -> &AtomicU32 {
        &self.under_way[(generation % 2) as usize]
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    #[test]
    fn a_sync_waits_for_those_that_had_begun_by_its_end_and_for_no_others() {
        let writes = StableWrites::default();
        let told = Cell::new(0);
        let tell = || told.set(told.get() + 1);
        for _ in 0..3 {
            told.set(0);
            assert!(writes.is_old_over() && writes.is_empty());
            let (first, second) = (writes.begin(tell), writes.begin(tell));
            writes.advance();
            let later = writes.begin(tell);
            writes.end(first, tell);
            assert!(!writes.is_old_over());
            // The last of those that nobody waits for.
            writes.end(later, tell);
            assert_eq!(told.get(), 0);
            let later = writes.begin(tell);
            writes.end(second, tell);
            assert!(writes.is_old_over());
            assert_eq!(told.get(), 1);
            writes.advance();
            assert!(!writes.is_old_over());
            writes.end(later, tell);
            assert!(writes.is_old_over());
            assert_eq!(told.get(), 2);
        }
    }

    /// The sync may have looked before it was counted.
    #[test]
    fn one_that_begins_while_a_sync_ends_is_waited_for_by_the_next() {
        let writes = Rc::new(StableWrites::default());
        let sync = writes.clone();
        let _hook = preempt::once("stable write counted", move || sync.advance());
        let told = Cell::new(0);
        let tell = || told.set(told.get() + 1);
        let write = writes.begin(tell);
        assert!(writes.is_old_over());
        assert_eq!(told.get(), 1, "whoever saw it counted waits");
        writes.advance();
        assert!(!writes.is_old_over());
        writes.end(write, tell);
        assert!(writes.is_old_over() && writes.is_empty());
    }

    #[test]
    fn generations_are_told_apart_also_where_their_number_starts_anew() {
        let writes = StableWrites {
            generation: AtomicU32::new(u32::MAX),
            ..StableWrites::default()
        };
        for _ in 0..3 {
            let write = writes.begin(|| ());
            writes.advance();
            assert!(!writes.is_old_over());
            writes.end(write, || ());
            assert!(writes.is_old_over());
        }
    }
}
