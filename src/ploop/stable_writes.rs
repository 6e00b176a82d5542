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
