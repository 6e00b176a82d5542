//! How much of the disk's work may be under way at a time.
//!
//! A host that stops a ring waits for what the ring has started, so what all queues
//! have started together is bounded in bytes that a disk has to move. Each queue has a
//! part of that for itself, which costs it no look at memory that others write; what
//! it needs beyond that it borrows from what all share, a good deal at a time. A queue
//! that gets none goes on as its own parts end: nobody ever waits for another queue.
//!
//! Knows numbers. Must not know what they are counted of.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

/// What each queue has for itself, in bytes: 64 blocks of 4 KiB.
const OWN: u64 = 256 << 10;

/// What all queues share, in bytes: more than a disk needs to be busy. With [`OWN`] for
/// each of 64 queues a disk of 100 MB/s has done it all in a third of a second.
const SHARED: u64 = 16 << 20;

/// What is borrowed at once, in bytes.
const LOAN: u64 = 1 << 20;

/// How many parts a queue has at most, however small they are. It bounds the memory
/// of those that wait for space on the host, which take nothing of the disk.
const MAX_PARTS: usize = 4096;

/// What is left of [`SHARED`], for all queues of a disk.
pub(super) struct Shared(CachePadded<AtomicU64>);

impl Shared {
    pub fn new() -> Self {
        Self(CachePadded::new(AtomicU64::new(SHARED)))
    }

    fn lend(&self, amount: u64) -> bool {
        let take = |left: u64| left.checked_sub(amount);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
    }

    fn take_back(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }
}

/// What one queue may have under way.
pub(super) struct Allowance {
    shared: Arc<Shared>,
    borrowed: u64,
    charged: u64,
    parts: usize,
}

impl Allowance {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            borrowed: 0,
            charged: 0,
            parts: 0,
        }
    }

    /// A part that costs so many bytes begins; false if it must wait until another part
    /// of this queue has ended. There is one: a part that is alone always begins.
    pub fn begin(&mut self, charge: u64) -> bool {
        let missing = (self.charged + charge).saturating_sub(OWN + self.borrowed);
        if missing > 0 && self.charged > 0 && !self.borrow(missing) {
            return false;
        }
        if self.parts >= MAX_PARTS {
            return false;
        }
        self.charged += charge;
        self.parts += 1;
        true
    }

    /// A part has ended.
    pub fn end(&mut self, charge: u64) {
        self.parts -= 1;
        self.uncharge(charge);
    }

    /// A part goes on, and takes nothing of the disk.
    pub fn uncharge(&mut self, charge: u64) {
        self.charged -= charge;
        if self.borrowed == 0 {
            return;
        }
        // One loan is kept while there is work: who has borrowed is likely to do so
        // again.
        let idle = (OWN + self.borrowed).saturating_sub(self.charged + LOAN);
        let back = match self.charged {
            0 => self.borrowed,
            _ => (idle - idle % LOAN).min(self.borrowed),
        };
        if back > 0 {
            self.borrowed -= back;
            self.shared.take_back(back);
        }
    }

    fn borrow(&mut self, missing: u64) -> bool {
        let loan = missing.next_multiple_of(LOAN);
        let lent = self.shared.lend(loan);
        if lent {
            self.borrowed += loan;
        }
        lent
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        self.shared.take_back(self.borrowed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(shared: &Shared) -> u64 {
        shared.0.load(Ordering::Relaxed)
    }

    /// Begins parts until none may.
    fn fill(allowance: &mut Allowance, charge: u64) -> u64 {
        (0..).take_while(|_| allowance.begin(charge)).count() as u64
    }

    #[test]
    fn small_parts_never_touch_what_is_shared() {
        let shared = Arc::new(Shared::new());
        let mut queue = Allowance::new(Arc::clone(&shared));
        for _ in 0..OWN / 4096 {
            assert!(queue.begin(4096));
        }
        assert_eq!(left(&shared), SHARED);
    }

    #[test]
    fn one_queue_can_have_all_that_is_shared_and_others_still_go_on() {
        let shared = Arc::new(Shared::new());
        let mut greedy = Allowance::new(Arc::clone(&shared));
        assert_eq!(fill(&mut greedy, 1 << 20), (OWN + SHARED) >> 20);
        assert_eq!(left(&shared), 0);
        let mut other = Allowance::new(Arc::clone(&shared));
        assert_eq!(fill(&mut other, 256 << 10), OWN / (256 << 10));
        other.end(256 << 10);
        assert!(other.begin(256 << 10));
        drop(greedy);
        assert_eq!(left(&shared), SHARED);
    }

    #[test]
    fn a_part_larger_than_all_is_done_alone() {
        let shared = Arc::new(Shared::new());
        let mut queue = Allowance::new(shared);
        assert!(queue.begin(1 << 40));
        assert!(!queue.begin(1));
        queue.end(1 << 40);
        assert!(queue.begin(1));
    }

    #[test]
    fn what_was_borrowed_goes_back_when_it_is_not_used() {
        let shared = Arc::new(Shared::new());
        let mut queue = Allowance::new(Arc::clone(&shared));
        let count = fill(&mut queue, 1 << 20);
        for _ in 0..count {
            queue.end(1 << 20);
        }
        assert_eq!(left(&shared), SHARED);
        // Some of it before all has ended, and one loan not.
        fill(&mut queue, 4 << 20);
        queue.end(4 << 20);
        queue.end(4 << 20);
        assert!(
            (SHARED / 4..SHARED).contains(&left(&shared)),
            "{}",
            left(&shared)
        );
    }

    #[test]
    fn parts_that_cost_nothing_are_counted_all_the_same() {
        let mut queue = Allowance::new(Arc::new(Shared::new()));
        for _ in 0..MAX_PARTS {
            assert!(queue.begin(4096));
            queue.uncharge(4096);
        }
        assert!(!queue.begin(4096));
        queue.end(0);
        assert!(queue.begin(4096));
    }
}
