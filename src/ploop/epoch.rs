//! Epochs: when is all I/O that may still use an old mapping over?
//!
//! Every thread that looks mappings up and does I/O on them owns a slot, a cache
//! line that only it writes. The slot tells the epoch of the oldest I/O that the
//! thread has in flight. Whoever changed something that older I/O may not have
//! seen (a cluster was unmapped, a lock bit set, the write cache turned off)
//! calls [`Epochs::advance`] and waits until no slot is older than the result.
//!
//! Why that is enough: a thread that was idle publishes its epoch, then passes a
//! sequentially consistent fence, then looks up. The changer changes, passes such
//! a fence, then reads the slots. Whichever fence came first: either the look-up
//! sees the change, or the changer sees the slot. A thread that was busy has an
//! older epoch published all the while.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_utils::CachePadded;

use super::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

/// The epoch of a thread with nothing in flight: newer than all.
const IDLE: u64 = u64::MAX;

/// The shared half. One for each engine.
pub struct Epochs {
    /// Read by all, written only by [`Self::advance`].
    current: CachePadded<AtomicU64>,
    slots: Box<[CachePadded<Slot>]>,
    /// Slots at and above this were never handed out.
    used: AtomicUsize,
    free: Mutex<Vec<usize>>,
}

struct Slot {
    /// Epoch of the oldest I/O in flight, or [`IDLE`].
    oldest: AtomicU64,
    /// How many requests that change the disk this thread has completed. It goes
    /// on when the slot changes hands: only differences count.
    completed: AtomicU64,
}

impl Epochs {
    /// With room for so many threads.
    pub fn new(slots: usize) -> Self {
        let slot = || {
            CachePadded::new(Slot {
                oldest: AtomicU64::new(IDLE),
                completed: AtomicU64::new(0),
            })
        };
        Self {
            current: CachePadded::new(AtomicU64::new(1)),
            slots: std::iter::repeat_with(slot).take(slots).collect(),
            used: AtomicUsize::new(0),
            free: Mutex::new((0..slots).rev().collect()),
        }
    }

    /// A slot for the calling thread, if there is one left.
    pub fn join(self: &Arc<Self>) -> Option<Participant> {
        let slot = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()?;
        self.used.fetch_max(slot + 1, Ordering::Release);
        Some(Participant {
            epochs: self.clone(),
            slot,
            live: VecDeque::with_capacity(8),
            look_ups: Vec::with_capacity(4),
        })
    }

    /// Starts a new epoch. Everything that starts in it or later sees what the
    /// caller changed before; see [`Self::all_reached`].
    pub fn advance(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.current.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The newest.
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::Relaxed)
    }

    /// Whether all I/O that started before `epoch` is over.
    pub fn all_reached(&self, epoch: u64) -> bool {
        fence(Ordering::SeqCst);
        self.in_use()
            .iter()
            .all(|slot| slot.oldest.load(Ordering::Acquire) >= epoch)
    }

    /// How many changing requests have completed in all. Two equal sums, one
    /// taken after the other, mean that none completed in between: each addend
    /// only grows.
    pub fn completed(&self) -> u64 {
        self.in_use()
            .iter()
            .map(|slot| slot.completed.load(Ordering::Acquire))
            .sum()
    }

    fn in_use(&self) -> &[CachePadded<Slot>] {
        &self.slots[..self.used.load(Ordering::Acquire)]
    }
}

/// One thread's half.
pub struct Participant {
    epochs: Arc<Epochs>,
    slot: usize,
    /// The epochs with something in flight, oldest first, with how much.
    live: VecDeque<(u64, usize)>,
    /// Of the look-ups under way, the innermost last.
    look_ups: Vec<u64>,
}

/// A promise that the epoch is published. Give it back to [`Participant::leave`]
/// when the I/O is over.
#[must_use = "an epoch that is not left holds up everyone who waits for it"]
#[derive(Debug)]
pub struct Epoch(u64);

impl Participant {
    /// To be called before a look-up; what is looked up then may be used until
    /// [`Self::leave`].
    pub fn enter(&mut self) -> Epoch {
        let epoch = self.epochs.current.load(Ordering::Acquire);
        match self.live.back_mut() {
            Some((newest, count)) if *newest == epoch => *count += 1,
            Some(_) => self.live.push_back((epoch, 1)),
            None => {
                self.live.push_back((epoch, 1));
                // Release: it may be this value by which others see that older
                // I/O of this thread is over.
                self.shared().oldest.store(epoch, Ordering::Release);
                fence(Ordering::SeqCst);
            }
        }
        Epoch(epoch)
    }

    /// Look-ups begin; the I/O that follows from them begins with [`Self::begin_io`].
    pub fn begin_look_up(&mut self) -> Epoch {
        let epoch = self.enter();
        self.look_ups.push(epoch.0);
        epoch
    }

    /// They are over, and so is what they led to, but for I/O.
    pub fn end_look_up(&mut self, epoch: Epoch) {
        self.look_ups.pop();
        self.leave(epoch);
    }

    /// I/O begins. It belongs to the epoch of the look-up that it follows from: by now
    /// there may be another, and what was found may have been changed in between.
    pub fn begin_io(&mut self) -> Epoch {
        let Some(&epoch) = self.look_ups.last() else {
            return self.enter();
        };
        if let Some(count) = self.count_of(epoch) {
            *count += 1;
        }
        Epoch(epoch)
    }

    /// How much is in flight in an epoch, which is nearly always the newest.
    #[inline]
    fn count_of(&mut self, epoch: u64) -> Option<&mut usize> {
        let is_newest = self.live.back().is_some_and(|(e, _)| *e == epoch);
        let entry = if is_newest {
            self.live.back_mut()
        } else {
            self.live.iter_mut().find(|(e, _)| *e == epoch)
        };
        entry.map(|(_, count)| count)
    }

    /// The I/O that was entered with `epoch` is over.
    pub fn leave(&mut self, epoch: Epoch) {
        if let Some(count) = self.count_of(epoch.0) {
            *count -= 1;
            // Those of which nothing is left have gone already.
            if *count > 0 {
                return;
            }
        }
        let before = self.live.front().map(|(e, _)| *e);
        while self.live.front().is_some_and(|(_, count)| *count == 0) {
            self.live.pop_front();
        }
        let oldest = self.live.front().map(|(e, _)| *e);
        if oldest != before {
            let oldest = oldest.unwrap_or(IDLE);
            self.shared().oldest.store(oldest, Ordering::Release);
        }
    }

    /// Counts a completed request that changed the disk. To be called before its
    /// client is told.
    pub fn count_completed(&mut self) {
        let completed = &self.shared().completed;
        // Only this thread writes it.
        let count = completed.load(Ordering::Relaxed);
        completed.store(count + 1, Ordering::Release);
    }

    fn shared(&self) -> &Slot {
        &self.epochs.slots[self.slot]
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.shared().oldest.store(IDLE, Ordering::Release);
        self.epochs
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self.slot);
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_reached_when_all_older_io_is_over() {
        let epochs = Arc::new(Epochs::new(2));
        let mut a = epochs.join().unwrap();
        let mut b = epochs.join().unwrap();
        assert!(epochs.join().is_none());

        let old = a.enter();
        let removal = epochs.advance();
        let new = a.enter();
        let other = b.enter();
        assert!(!epochs.all_reached(removal));
        a.leave(old);
        assert!(epochs.all_reached(removal));
        let later = epochs.advance();
        a.leave(new);
        assert!(!epochs.all_reached(later));
        b.leave(other);
        assert!(epochs.all_reached(later));
    }

    #[test]
    fn io_may_end_in_any_order() {
        let epochs = Arc::new(Epochs::new(1));
        let mut a = epochs.join().unwrap();
        let first = a.enter();
        let second_epoch = epochs.advance();
        let second = a.enter();
        let third_epoch = epochs.advance();
        let third = a.enter();
        a.leave(second);
        assert!(!epochs.all_reached(second_epoch));
        a.leave(first);
        assert!(epochs.all_reached(third_epoch));
        a.leave(third);
        assert!(epochs.all_reached(epochs.advance()));
    }

    #[test]
    fn io_belongs_to_the_epoch_of_its_look_up() {
        let epochs = Arc::new(Epochs::new(1));
        let mut a = epochs.join().unwrap();
        let look_up = a.begin_look_up();
        let removal = epochs.advance();
        let io = a.begin_io();
        a.end_look_up(look_up);
        assert!(!epochs.all_reached(removal));
        a.leave(io);
        assert!(epochs.all_reached(removal));
    }

    #[test]
    fn a_slot_is_used_again_and_its_count_goes_on() {
        let epochs = Arc::new(Epochs::new(1));
        let mut a = epochs.join().unwrap();
        a.count_completed();
        drop(a);
        let mut b = epochs.join().unwrap();
        b.count_completed();
        assert_eq!(epochs.completed(), 2);
    }
}
