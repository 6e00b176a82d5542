//! The BAT in memory: every entry of the disk, and the state of its md pages.
//!
//! A look-up is one atomic load. An entry changes by compare-and-exchange, which
//! locks nothing, not even the page: the page only remembers that it is dirty.
//! Knows entries and pages; does no I/O and knows no thread.

use super::entry::Entry;
use super::sabotage::{self, Sabotage};
use super::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use crate::format::GuestCluster;

/// A write of the page is in flight.
const WRITEBACK: u8 = 1;
/// Somebody waits for the write of the page ("high priority" in the series).
const URGENT: u8 = 2;

/// See the module's text.
pub struct Bat {
    entries: Box<[AtomicU64]>,
    pages: Box<[AtomicU8]>,
    /// A bit for each page: in memory it differs from what was last submitted to
    /// the disk. A list would do no better: between the mark of a page and its
    /// being in the list, a flush could miss it.
    dirty: Box<[AtomicU64]>,
}

impl Bat {
    /// So many holes, clean; `None` if there is not the memory for as many entries.
    ///
    /// They take eight bytes each, but only where there is something else than
    /// holes: a BAT that claims to be huge costs what it holds.
    pub fn holes(entries: u32, pages: u32) -> Option<Self> {
        Some(Self {
            entries: zeroed(entries as usize)?,
            pages: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            dirty: (0..pages.div_ceil(u64::BITS))
                .map(|_| AtomicU64::new(0))
                .collect(),
        })
    }

    /// Sets an entry that is what the disk has, before any other thread looks.
    pub fn load(&self, cluster: GuestCluster, entry: Entry) {
        self.entry(cluster).store(entry.bits(), Ordering::Relaxed);
    }

    /// The entry of a cluster of the disk.
    pub fn get(&self, cluster: GuestCluster) -> Entry {
        Entry::from_bits(self.entry(cluster).load(Ordering::Acquire))
    }

    /// Changes an entry that still is `from`; else says what it is now.
    ///
    /// # Errors
    /// The entry as it is, if it is not `from`.
    pub fn replace(&self, cluster: GuestCluster, from: Entry, to: Entry) -> Result<(), Entry> {
        self.entry(cluster)
            .compare_exchange(from.bits(), to.bits(), Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(Entry::from_bits)
    }

    /// The copy that the entry told of when it was `read` is stable now; the entry may
    /// reach the disk, if it still tells of that copy.
    pub fn set_stable(&self, cluster: GuestCluster, read: Entry) {
        self.update(cluster, |now| {
            if now.is_same_change(read) {
                now.stable()
            } else {
                now
            }
        });
    }

    /// The cluster is any thread's again.
    pub fn unlock(&self, cluster: GuestCluster) {
        self.update(cluster, Entry::unlocked);
    }

    /// The write of the page that is being made contains the entry as it was
    /// read; it may have changed since.
    pub fn set_written(&self, cluster: GuestCluster, read: Entry) {
        self.update(cluster, |now| {
            if now.place() == read.place() && now.is_unstable() == read.is_unstable() {
                now.written()
            } else {
                now
            }
        });
    }

    /// A sync has covered the writes made of the entry's page before it.
    pub fn set_synced(&self, cluster: GuestCluster) {
        if self.get(cluster) != self.get(cluster).synced() {
            self.update(cluster, Entry::synced);
        }
    }

    fn update(&self, cluster: GuestCluster, to: impl Fn(Entry) -> Entry) {
        let update = |bits| Some(to(Entry::from_bits(bits)).bits());
        let _ = self
            .entry(cluster)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
    }

    fn entry(&self, cluster: GuestCluster) -> &AtomicU64 {
        &self.entries[cluster.0 as usize]
    }

    /// An entry of the page has changed. Returns whether the page was clean.
    pub fn mark_dirty(&self, page: u32) -> bool {
        let (word, bit) = self.dirty_bit(page);
        word.fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    fn dirty_bit(&self, page: u32) -> (&AtomicU64, u64) {
        let word = &self.dirty[(page / u64::BITS) as usize];
        (word, 1 << (page % u64::BITS))
    }

    /// The dirty pages, in order.
    pub fn dirty_pages(&self) -> impl Iterator<Item = u32> {
        (0..).zip(&self.dirty).flat_map(|(index, word)| {
            let mut bits = word.load(Ordering::Acquire);
            std::iter::from_fn(move || {
                let bit = (bits != 0).then(|| bits.trailing_zeros())?;
                bits &= bits - 1;
                Some(index * u64::BITS + bit)
            })
        })
    }

    /// Somebody waits for the page: it shall not wait for its delay.
    pub fn mark_urgent(&self, page: u32) {
        self.page(page).fetch_or(URGENT, Ordering::AcqRel);
    }

    /// Whether somebody waits for the page.
    pub fn is_urgent(&self, page: u32) -> bool {
        self.page(page).load(Ordering::Acquire) & URGENT != 0
    }

    /// A write of the page is about to be made from the entries as they are now;
    /// whatever changes from now on makes it dirty again.
    pub fn begin_writeback(&self, page: u32) {
        let update = |status| Some(status & !URGENT | WRITEBACK);
        let before = self
            .page(page)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
        debug_assert!(
            before.is_ok_and(|status| status & WRITEBACK == 0)
                || sabotage::is(Sabotage::WritePageTwice),
            "I11"
        );
        let (word, bit) = self.dirty_bit(page);
        word.fetch_and(!bit, Ordering::AcqRel);
    }

    /// The write of the page has ended; a failed one leaves it dirty.
    pub fn end_writeback(&self, page: u32, written: bool) {
        self.page(page).fetch_and(!WRITEBACK, Ordering::AcqRel);
        if !written {
            self.mark_dirty(page);
        }
    }

    fn page(&self, page: u32) -> &AtomicU8 {
        &self.pages[page as usize]
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = Entry> {
        self.entries
            .iter()
            .map(|entry| Entry::from_bits(entry.load(Ordering::Acquire)))
    }
}

/// The bits of [`Entry::HOLE`], as memory that the system has not provided yet.
#[cfg(not(ploop_loom))]
fn zeroed(count: usize) -> Option<Box<[AtomicU64]>> {
    use zerocopy::FromZeros;
    <[AtomicU64]>::new_box_zeroed_with_elems(count).ok()
}

/// Loom's atomics are more than their bits.
#[cfg(ploop_loom)]
fn zeroed(count: usize) -> Option<Box<[AtomicU64]>> {
    Some((0..count).map(|_| AtomicU64::new(0)).collect())
}
