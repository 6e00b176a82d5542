//! The BAT in memory: every entry of the disk, and the state of its md pages.
//!
//! A look-up is one atomic load. An entry changes by compare-and-exchange, which
//! locks nothing, not even the page: the page only remembers that it is dirty.
//! Knows entries and pages; does no I/O and knows no thread.

use super::entry::Entry;
use super::llist::{LockFreeList, Taken};
use super::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use crate::format::GuestCluster;

/// In memory the page differs from what was last submitted to the disk.
const DIRTY: u8 = 1;
/// A write of the page is in flight.
const WRITEBACK: u8 = 2;
/// The page is in the list of dirty pages, or the writer knows of it.
const LISTED: u8 = 4;
/// Somebody waits for the write of the page ("high priority" in the series).
const URGENT: u8 = 8;

/// See the module's text.
pub struct Bat {
    entries: Box<[AtomicU64]>,
    pages: Box<[AtomicU8]>,
    /// Pages that became dirty, for the metadata thread.
    dirtied: LockFreeList<u32>,
}

impl Bat {
    /// From its entries, clean.
    pub fn new(entries: impl ExactSizeIterator<Item = Entry>, pages: u32) -> Self {
        Self {
            entries: entries.map(|entry| AtomicU64::new(entry.bits())).collect(),
            pages: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            dirtied: LockFreeList::default(),
        }
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

    /// The copy of a cluster is stable now; the entry may reach the disk.
    pub fn set_stable(&self, cluster: GuestCluster) {
        self.update(cluster, Entry::stable);
    }

    /// The cluster is any thread's again.
    pub fn unlock(&self, cluster: GuestCluster) {
        self.update(cluster, Entry::unlocked);
    }

    /// The md page of the entry was marked dirty since the entry changed.
    pub fn set_marked(&self, cluster: GuestCluster) {
        self.update(cluster, Entry::marked);
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

    /// An entry of the page has changed. Returns whether the metadata thread has
    /// to hear of it.
    pub fn mark_dirty(&self, page: u32) -> bool {
        let before = self.page(page).fetch_or(DIRTY | LISTED, Ordering::AcqRel);
        let news = before & LISTED == 0;
        if news {
            self.dirtied.push(page);
        }
        news
    }

    /// Somebody waits for the page: it shall not wait for its delay.
    pub fn mark_urgent(&self, page: u32) {
        self.page(page).fetch_or(URGENT, Ordering::AcqRel);
    }

    /// Whether somebody waits for the page.
    pub fn is_urgent(&self, page: u32) -> bool {
        self.page(page).load(Ordering::Acquire) & URGENT != 0
    }

    /// Pages that became dirty since the last call. The metadata thread's.
    pub fn take_dirtied(&self) -> Taken<u32> {
        self.dirtied.take_all()
    }

    /// A write of the page is about to be made from the entries as they are now;
    /// whatever changes from now on makes it dirty again.
    pub fn begin_writeback(&self, page: u32) {
        let update = |status| Some(status & !(DIRTY | LISTED | URGENT) | WRITEBACK);
        let before = self
            .page(page)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
        debug_assert!(before.is_ok_and(|status| status & WRITEBACK == 0), "I11");
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

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = Entry> {
        self.entries
            .iter()
            .map(|entry| Entry::from_bits(entry.load(Ordering::Acquire)))
    }
}
