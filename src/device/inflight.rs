//! The in-flight region of the vhost-user specification, for split rings: which
//! requests of a ring have been taken and not answered, in memory that the front-end
//! keeps when this process dies.
//!
//! Each store to it matters to a reader that comes after the death of its writer, so
//! the order of the program is enough. A completion is, for each advance of the used
//! index: link the entry into the batch, make it the batch's head, advance the used
//! index, clear the entry, note the used index. Whatever of that was done, the reader
//! finds out what is left.
//!
//! What comes back was in the hands of the front-end, and is checked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use crate::storage::SharedWords;

/// Words of a queue's header and of each entry.
const HEADER_WORDS: usize = 2;
const ENTRY_WORDS: usize = 2;

/// What a queue's part is rounded up to, in words.
const ROUNDING: usize = 8;

/// The only version there is; 0: nothing has been written yet.
const VERSION: u16 = 1;

/// How many queues of what size a region is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub queues: u16,
    /// Entries of each queue; its ring may be smaller.
    pub entries: u16,
}

impl Layout {
    fn words_of_queue(self) -> usize {
        (HEADER_WORDS + ENTRY_WORDS * usize::from(self.entries)).next_multiple_of(ROUNDING)
    }

    /// Of all queues together.
    pub fn words(self) -> usize {
        self.words_of_queue() * usize::from(self.queues)
    }

    /// The same in bytes.
    pub fn len(self) -> u64 {
        (self.words() * size_of::<u64>()) as u64
    }
}

/// What a queue's part says about its ring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Recovery {
    /// Taken and not answered, in the order in which they were taken.
    pub heads: Vec<u16>,
    /// Whether a process has served this ring with this region before.
    pub is_old: bool,
    /// Whether what it said could not be, and was dropped.
    pub is_stale: bool,
}

/// The part of one queue.
#[derive(Debug)]
pub(super) struct InFlightQueue {
    words: Arc<SharedWords>,
    first: usize,
    entries: u16,
    /// How many requests have been taken so far.
    counter: u64,
    last_batch_head: u16,
    used_idx: u16,
}

impl InFlightQueue {
    /// The part of queue `index`; `None` if the region has none for it.
    pub fn new(words: Arc<SharedWords>, layout: Layout, index: usize) -> Option<Self> {
        let queue = Self {
            words,
            first: index.checked_mul(layout.words_of_queue())?,
            entries: layout.entries,
            counter: 0,
            last_batch_head: 0,
            used_idx: 0,
        };
        let is_there = index < usize::from(layout.queues)
            && queue.first + layout.words_of_queue() <= queue.words.len();
        is_there.then_some(queue)
    }

    /// Whether a process has served the ring with this region.
    pub fn is_old(&self) -> bool {
        let [version, ..] = self.header();
        version == VERSION
    }

    /// How many descriptors its ring may have.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Nothing of the ring is noted from now on: as if nobody had served it.
    pub fn forget(&self) {
        for index in 0..self.entries {
            self.set_entry(index, false, 0);
        }
        if let Some(word) = self.words.word(self.first + 1) {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Finds out what is left to be done of a ring of `size` descriptors whose indexes
    /// in guest memory are these, and notes that nothing else is. A ring cannot have
    /// more descriptors than there are entries.
    pub fn recover(&mut self, size: u16, used_idx: u16, avail_idx: u16) -> Recovery {
        let [version, _, last_batch_head, noted] = self.header();
        let mut recovery = Recovery {
            is_old: version == VERSION,
            ..Recovery::default()
        };
        self.used_idx = used_idx;
        let found = if version == VERSION {
            self.last_batch_head = last_batch_head;
            let unnoted = used_idx.wrapping_sub(noted);
            self.in_flight(size, unnoted, last_batch_head)
                .filter(|heads| {
                    let left = avail_idx.wrapping_sub(used_idx);
                    left <= size && heads.len() <= usize::from(left)
                })
        } else {
            Some(Vec::new())
        };
        recovery.is_stale = found.is_none();
        let heads = found.unwrap_or_default();
        for index in 0..self.entries {
            let (_, next) = self.entry(index);
            self.set_entry(index, heads.contains(&index), next);
        }
        if recovery.is_stale {
            self.last_batch_head = 0;
        }
        self.count_anew(&heads);
        self.set_header();
        recovery.heads = heads;
        recovery
    }

    /// Counts those that are in flight from 0 on: what the region says may be so high that
    /// the next count would be one that is there. Whatever has been done of this when the
    /// process dies, the order is the same, as no count becomes higher.
    fn count_anew(&mut self, heads: &[u16]) {
        self.counter = 0;
        for (count, &head) in (0..).zip(heads) {
            if let Some(word) = self.word_of(head, 1) {
                word.store(count, Ordering::Relaxed);
                compiler_fence(Ordering::SeqCst);
            }
            self.counter = count;
        }
    }

    /// Entries in flight in the order of their counters, without the `unnoted` last ones
    /// that were answered. `None` if that cannot be.
    fn in_flight(&self, size: u16, unnoted: u16, last: u16) -> Option<Vec<u16>> {
        if unnoted > size {
            return None;
        }
        let mut answered = Vec::with_capacity(unnoted.into());
        let mut at = last;
        for _ in 0..unnoted {
            if at >= size || answered.contains(&at) {
                return None;
            }
            answered.push(at);
            (_, at) = self.entry(at);
        }
        let is_in_flight = |index: &u16| self.entry(*index).0 && !answered.contains(index);
        let mut heads: Vec<_> = (0..self.entries).filter(is_in_flight).collect();
        if heads.iter().any(|&head| head >= size) {
            return None;
        }
        heads.sort_by_key(|&head| self.count_of(head));
        // Two at the same place in the order have not been taken by anybody.
        let counts = heads.iter().map(|&head| self.count_of(head));
        let is_sound = counts
            .clone()
            .zip(counts.skip(1))
            .all(|(one, next)| one < next);
        is_sound.then_some(heads)
    }

    /// A request is taken from the ring.
    pub fn take(&mut self, head: u16) {
        self.counter = self.counter.wrapping_add(1);
        if let Some(count) = self.word_of(head, 1) {
            count.store(self.counter, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            let (_, next) = self.entry(head);
            self.set_entry(head, true, next);
            // Before anything is done for it, and before the next one is taken.
            compiler_fence(Ordering::SeqCst);
        }
    }

    /// A request goes back into the ring as if it had not been taken.
    pub fn give_back(&mut self, head: u16) {
        let (_, next) = self.entry(head);
        self.set_entry(head, false, next);
        compiler_fence(Ordering::SeqCst);
    }

    /// The used index is about to be advanced by this request.
    pub fn begin_answer(&mut self, head: u16) {
        self.set_entry(head, true, self.last_batch_head);
        compiler_fence(Ordering::SeqCst);
        self.last_batch_head = head;
        self.set_header();
        compiler_fence(Ordering::SeqCst);
    }

    /// The used index is now this.
    pub fn end_answer(&mut self, head: u16, used_idx: u16) {
        compiler_fence(Ordering::SeqCst);
        let (_, next) = self.entry(head);
        self.set_entry(head, false, next);
        compiler_fence(Ordering::SeqCst);
        self.used_idx = used_idx;
        self.set_header();
        compiler_fence(Ordering::SeqCst);
    }

    /// The used index is now this, by an entry that no request was taken for.
    pub fn note_used(&mut self, used_idx: u16) {
        compiler_fence(Ordering::SeqCst);
        self.used_idx = used_idx;
        self.set_header();
    }

    fn word_of(&self, entry: u16, word: usize) -> Option<&AtomicU64> {
        if entry >= self.entries {
            return None;
        }
        let at = self.first + HEADER_WORDS + ENTRY_WORDS * usize::from(entry);
        self.words.word(at + word)
    }

    /// Whether it is in flight, and the entry after it in its batch.
    fn entry(&self, index: u16) -> (bool, u16) {
        let word = self.word_of(index, 0);
        let bytes = word
            .map_or(0, |word| word.load(Ordering::Relaxed))
            .to_ne_bytes();
        (bytes[0] != 0, u16::from_ne_bytes([bytes[6], bytes[7]]))
    }

    fn set_entry(&self, index: u16, is_in_flight: bool, next: u16) {
        let [n0, n1] = next.to_ne_bytes();
        let bytes = [u8::from(is_in_flight), 0, 0, 0, 0, 0, n0, n1];
        if let Some(word) = self.word_of(index, 0) {
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
    }

    fn count_of(&self, index: u16) -> u64 {
        self.word_of(index, 1)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Version, number of entries, last batch head, used index.
    fn header(&self) -> [u16; 4] {
        let word = self.words.word(self.first + 1);
        let bytes = word
            .map_or(0, |word| word.load(Ordering::Relaxed))
            .to_ne_bytes();
        let [a, b, c, d, e, f, g, h] = bytes;
        [[a, b], [c, d], [e, f], [g, h]].map(u16::from_ne_bytes)
    }

    fn set_header(&self) {
        let fields = [VERSION, self.entries, self.last_batch_head, self.used_idx];
        let [[a, b], [c, d], [e, f], [g, h]] = fields.map(u16::to_ne_bytes);
        if let Some(word) = self.words.word(self.first + 1) {
            let bytes = [a, b, c, d, e, f, g, h];
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
