//! The BAT in memory: every entry of the disk, and the state of its md pages.
//!
//! A look-up is one atomic load. An entry changes by compare-and-exchange, which
//! locks nothing, not even the page: the page only remembers that it is dirty.
//! When the disk grows, the list grows where it is: a look-up does not notice.
//! Knows entries and pages; does no I/O and knows no thread.

use super::entry::Entry;
use super::reserved::Reserved;
use super::rule::{self, Rule};
use super::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use crate::format::{Geometry, GuestCluster};

/// A write of the page is in flight.
const WRITEBACK: u8 = 1;
/// Somebody waits for the write of the page ("high priority" in the series).
const URGENT: u8 = 2;

/// How large a BAT is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatSize {
    /// How many entries it has.
    pub entries: u32,
    /// How many md pages they and the header take.
    pub pages: u32,
}

impl BatSize {
    /// That of an image.
    pub const fn of(geometry: &Geometry) -> Self {
        Self {
            entries: geometry.entries,
            pages: geometry.md_pages(),
        }
    }

    /// That of the largest disk which the image could have.
    pub fn largest(geometry: &Geometry) -> Self {
        let max = geometry.version.disk_size_max(geometry.cluster);
        let entries = geometry.cluster.count_for(max.bytes()) as u32;
        let entries = entries.max(geometry.entries);
        Self::of(&Geometry {
            entries,
            ..*geometry
        })
    }
}

/// See the module's text.
pub struct Bat {
    entries: Reserved<AtomicU64>,
    pages: Reserved<AtomicU8>,
    /// A bit for each page: in memory it differs from what was last submitted to
    /// the disk. A list would do no better: between the mark of a page and its
    /// being in the list, a flush could miss it.
    dirty: Reserved<AtomicU64>,
    /// How many of them there are: nobody looks behind these, but who asks for one.
    entries_now: AtomicU32,
    pages_now: AtomicU32,
}

impl Bat {
    /// So many holes, clean, and room for as many as there are at `most`, or at least
    /// for these; `None` if there is not the memory.
    ///
    /// They take eight bytes each, but only where there is something else than
    /// holes: a BAT that claims to be huge costs what it holds.
    pub fn holes(now: BatSize, most: BatSize) -> Option<Self> {
        Self::with_room(now, most).or_else(|| Self::with_room(now, now))
    }

    fn with_room(now: BatSize, most: BatSize) -> Option<Self> {
        let words = |pages: u32| pages.div_ceil(u64::BITS);
        Some(Self {
            entries: reserve(most.entries, now.entries)?,
            pages: reserve(most.pages, now.pages)?,
            dirty: reserve(words(most.pages), words(now.pages))?,
            entries_now: AtomicU32::new(now.entries),
            pages_now: AtomicU32::new(now.pages),
        })
    }

    /// Whether there is room for so many.
    pub fn can_hold(&self, more: BatSize) -> bool {
        more.entries as usize <= self.entries.len() && more.pages as usize <= self.pages.len()
    }

    /// From now on there are so many, if there is room for them; the new ones are holes.
    pub fn grow(&self, more: BatSize) {
        if self.can_hold(more) {
            self.entries_now.fetch_max(more.entries, Ordering::AcqRel);
            self.pages_now.fetch_max(more.pages, Ordering::AcqRel);
        }
    }

    /// Most of these entries are about to be set.
    #[cfg_attr(ploop_loom, expect(unused_variables, reason = "it has no mapping"))]
    pub fn expect(&self, clusters: std::ops::Range<u32>) {
        #[cfg(not(ploop_loom))]
        self.entries
            .expect(clusters.start as usize..clusters.end as usize);
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
    /// read; it may have changed since, also to another one of the same place, whose
    /// changer has not come to its own mark.
    pub fn set_written(&self, cluster: GuestCluster, read: Entry) {
        self.update(cluster, |now| {
            if now.is_same_change(read) && now.is_unstable() == read.is_unstable() {
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
        let words = self.pages_now.load(Ordering::Acquire).div_ceil(u64::BITS);
        let words = &self.dirty[..words as usize];
        (0..).zip(words).flat_map(|(index, word)| {
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
            before.is_ok_and(|status| status & WRITEBACK == 0) || !rule::kept(Rule::OneWriteOfPage),
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

    /// How many entries there are.
    pub fn len(&self) -> u32 {
        self.entries_now.load(Ordering::Acquire)
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = Entry> {
        self.range(0..u32::MAX)
    }

    /// Those of these clusters that there are, in order.
    pub fn range(&self, clusters: std::ops::Range<u32>) -> impl Iterator<Item = Entry> {
        let end = self.entries_now.load(Ordering::Acquire).min(clusters.end);
        let start = clusters.start.min(end);
        self.entries[start as usize..end as usize]
            .iter()
            .map(|entry| Entry::from_bits(entry.load(Ordering::Acquire)))
    }
}

/// Zeros, which are the bits of [`Entry::HOLE`], as memory that the system has not
/// provided yet.
#[cfg(not(ploop_loom))]
fn reserve<T: zerocopy::FromZeros>(most: u32, now: u32) -> Option<Reserved<T>> {
    Reserved::zeroed(most as usize, now as usize)
}

#[cfg(ploop_loom)]
fn reserve<T: Default>(most: u32, _: u32) -> Option<Reserved<T>> {
    Some((0..most).map(|_| T::default()).collect())
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;
    use crate::format::HostCluster;
    use crate::storage::FileId;

    #[test]
    fn the_write_of_a_page_vouches_for_no_later_change_that_looks_the_same() {
        let size = BatSize {
            entries: 1,
            pages: 1,
        };
        let bat = Bat::holes(size, size).unwrap();
        let cluster = GuestCluster(0);
        let mapped = Entry::mapped(FileId(0), HostCluster(7));
        let read = Entry::HOLE.changed().after(mapped).marked();
        bat.load(cluster, read);
        let between = mapped.changed().after(read);
        bat.replace(cluster, read, between).unwrap();
        let now = Entry::HOLE.changed().after(between);
        bat.replace(cluster, between, now).unwrap();
        bat.set_written(cluster, read);
        assert_eq!(bat.get(cluster), now);
        bat.set_written(cluster, now);
        assert!(!bat.get(cluster).is_unmarked());
        bat.set_synced(cluster);
        assert!(!bat.get(cluster).is_changed());
    }

    #[test]
    fn a_bat_grows_where_it_is_as_far_as_there_is_room() {
        let size = |entries, pages| BatSize { entries, pages };
        let bat = Bat::holes(size(1008, 1), size(10_000, 100)).unwrap();
        let before = bat.entry(GuestCluster(5)) as *const _;
        bat.mark_dirty(0);
        bat.grow(size(10_000, 100));
        assert_eq!(bat.entry(GuestCluster(5)) as *const _, before);
        assert_eq!(bat.iter().count(), 10_000);
        bat.mark_dirty(99);
        assert_eq!(bat.dirty_pages().collect::<Vec<_>>(), [0, 99]);
        bat.grow(size(10_001, 100));
        assert_eq!(bat.iter().count(), 10_000, "there is no room for more");
    }
}
