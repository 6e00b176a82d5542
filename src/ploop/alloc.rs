//! Host clusters to give out.
//!
//! Everything in here reads as zeros on the host and is mapped nowhere: fresh
//! space at the end of the file, and clusters that went all the way through the
//! reclaim of the metadata thread (I2). Does no I/O and takes no lock.

use crossbeam_queue::SegQueue;
use crossbeam_utils::CachePadded;

use super::preempt;
use super::rule::{self, Rule};
use super::sync::atomic::{AtomicU32, Ordering};
use crate::format::HostCluster;

/// Consecutive host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first.
    pub start: u32,
    /// The one after the last.
    pub end: u32,
}

impl Extent {
    /// How many clusters.
    pub const fn len(self) -> u32 {
        self.end - self.start
    }

    /// The same in pieces of so many clusters at most.
    pub fn pieces(self, at_most: u32) -> impl Iterator<Item = Self> {
        let step = at_most.max(1);
        let starts = (self.start..self.end).step_by(step as usize);
        starts.map(move |start| Self {
            start,
            end: self.end.min(start.saturating_add(step)),
        })
    }

    /// What of it does not lie in front of this cluster, if anything.
    pub fn from(self, first: u32) -> Option<Self> {
        let start = self.start.max(first);
        (start < self.end).then_some(Self { start, ..self })
    }
}

/// See the module's text.
pub struct Allocator {
    /// The first cluster of the file that was never given out.
    next: CachePadded<AtomicU32>,
    /// The end of the file.
    end: CachePadded<AtomicU32>,
    /// What [`Self::next`] was in the beginning.
    old_end: u32,
    /// In front of that, one after the last cluster that is or was used.
    old_used_end: AtomicU32,
    /// Below this, the length of the file is stable (I8).
    stable_end: AtomicU32,
    /// Clusters below this are not given out: the BAT of a disk that grows goes there.
    first: AtomicU32,
    /// What would have been given out, but lies in front of that.
    kept: SegQueue<Extent>,
    reclaimed: SegQueue<Extent>,
    /// Clusters in [`Self::reclaimed`].
    reclaimed_count: CachePadded<AtomicU32>,
}

impl Allocator {
    /// For a file whose end, at this cluster, is stable, and that is used up to `used_end`.
    pub fn new(end: HostCluster, used_end: HostCluster) -> Self {
        Self {
            next: CachePadded::new(AtomicU32::new(end.0)),
            end: CachePadded::new(AtomicU32::new(end.0)),
            old_end: end.0,
            old_used_end: AtomicU32::new(used_end.0),
            stable_end: AtomicU32::new(end.0),
            first: AtomicU32::new(0),
            kept: SegQueue::new(),
            reclaimed: SegQueue::new(),
            reclaimed_count: CachePadded::new(AtomicU32::new(0)),
        }
    }

    /// A cluster that reads as zeros and is mapped nowhere, if there is one. To be called
    /// inside an epoch: see [`Self::keep_below`].
    pub fn take(&self) -> Option<HostCluster> {
        // First: who sees the old one is waited for.
        let first = self.first.load(Ordering::Acquire);
        while let Some(extent) = self.reclaimed.pop() {
            self.reclaimed_count
                .fetch_sub(extent.len(), Ordering::Relaxed);
            if let Some(extent) = self.keep(extent, first) {
                self.put(Extent {
                    start: extent.start + 1,
                    end: extent.end,
                });
                self.note_used(extent.start + 1);
                return Some(HostCluster(extent.start));
            }
        }
        let end = self.end.load(Ordering::Acquire);
        preempt::point("end seen");
        let take = |next: u32| {
            let next = next.max(first);
            (next < end).then_some(next + 1)
        };
        let next = self
            .next
            .fetch_update(Ordering::SeqCst, Ordering::Relaxed, take)
            .ok()?;
        if next < first {
            let end = first;
            self.kept.push(Extent { start: next, end });
        }
        Some(HostCluster(next.max(first)))
    }

    /// Gives back clusters that still read as zeros and are mapped nowhere.
    pub fn put(&self, extent: Extent) {
        let first = self.first.load(Ordering::Acquire);
        if let Some(extent) = self.keep(extent, first) {
            // First: it may be taken the moment that it is there.
            self.reclaimed_count
                .fetch_add(extent.len(), Ordering::Relaxed);
            self.reclaimed.push(extent);
        }
    }

    /// What of an extent may be given out; the rest is kept.
    fn keep(&self, extent: Extent, first: u32) -> Option<Extent> {
        let end = extent.end.min(first);
        if extent.start < end {
            self.kept.push(Extent { end, ..extent });
        }
        extent.from(first)
    }

    /// From now on no cluster below this one is given out. Who was about to take one has
    /// it by the end of its epoch.
    pub fn keep_below(&self, first: HostCluster) {
        self.first.fetch_max(first.0, Ordering::AcqRel);
        self.note_used(first.0);
        // What lies there counts as available no more.
        for _ in 0..self.reclaimed.len() {
            if let Some(extent) = self.reclaimed.pop() {
                self.reclaimed_count
                    .fetch_sub(extent.len(), Ordering::Relaxed);
                self.put(extent);
            }
        }
    }

    /// Nothing goes where clusters were kept, from this one on: they are given out again,
    /// as far as they are known to be free.
    pub fn keep_no_more_from(&self, first: HostCluster) {
        self.first.store(first.0, Ordering::Release);
        for _ in 0..self.kept.len() {
            if let Some(extent) = self.kept.pop() {
                self.put(extent);
            }
        }
    }

    /// The first cluster that may be given out.
    pub fn first(&self) -> u32 {
        self.first.load(Ordering::Acquire)
    }

    /// The file was made longer, up to `end`, and of what is new `count` clusters at its
    /// end are the caller's: nobody else is given them. The first of them.
    pub fn claim(&self, end: u32, count: u32) -> HostCluster {
        let mine = end - count;
        let fresh = self.next.swap(end, Ordering::SeqCst);
        self.end.fetch_max(end, Ordering::Release);
        if fresh < mine {
            self.put(Extent {
                start: fresh,
                end: mine,
            });
        }
        HostCluster(mine)
    }

    /// The file is about to be cut behind the last cluster that was ever given out: at this
    /// one. To be called while nobody takes any.
    pub fn cut(&self) -> HostCluster {
        let end = self.next.load(Ordering::Relaxed);
        let end = end.min(self.end.load(Ordering::Acquire));
        self.end.store(end, Ordering::Release);
        self.doubt_length(HostCluster(end));
        HostCluster(end)
    }

    /// At most so many clusters in front of this one, for the caller alone.
    pub fn take_below(&self, limit: u32, count: usize) -> Vec<HostCluster> {
        let mut taken = Vec::new();
        for _ in 0..self.reclaimed.len() {
            if taken.len() >= count {
                break;
            }
            let Some(extent) = self.reclaimed.pop() else {
                break;
            };
            self.reclaimed_count
                .fetch_sub(extent.len(), Ordering::Relaxed);
            let left = (count - taken.len()) as u32;
            let end = extent.end.min(limit).max(extent.start);
            let end = end.min(extent.start.saturating_add(left));
            taken.extend((extent.start..end).map(HostCluster));
            if end > extent.start {
                self.note_used(end);
            }
            if let Some(rest) = extent.from(end) {
                self.put(rest);
            }
        }
        taken
    }

    /// From now on nothing is given out behind what was given out already. Who was about to
    /// take a cluster there has it by the end of its epoch. Where the file ends; until that is
    /// [known](Self::extend) again, nothing is.
    pub fn close_end(&self) -> u32 {
        let next = self.next.load(Ordering::SeqCst);
        self.end.fetch_min(next, Ordering::AcqRel)
    }

    /// Takes what is free at the end of the file, which is to end at this cluster from now on:
    /// after [`Self::close_end`], when older epochs are over. Nothing behind that is given out
    /// until [`Self::open_end`], when epochs from before this are over, too: who is in one may
    /// still know an older end.
    pub fn cut_free(&self) -> HostCluster {
        let mut end = self.next.load(Ordering::SeqCst);
        let mut free = Vec::new();
        while let Some(extent) = self.reclaimed.pop() {
            self.reclaimed_count
                .fetch_sub(extent.len(), Ordering::Relaxed);
            free.push(extent);
        }
        free.sort_unstable_by_key(|extent| extent.end);
        while let Some(last) = free.pop() {
            if last.end != end {
                free.push(last);
                break;
            }
            end = last.start;
        }
        for extent in free {
            self.put(extent);
        }
        self.end.store(end, Ordering::Release);
        self.doubt_length(HostCluster(end));
        HostCluster(end)
    }

    /// What the file gets behind its end from now on can be given out.
    pub fn open_end(&self) {
        let end = self.end.load(Ordering::Acquire);
        self.next.fetch_min(end, Ordering::SeqCst);
    }

    /// How many clusters there are to be given out.
    pub fn available(&self) -> u32 {
        let end = self.end.load(Ordering::Acquire);
        let next = self.next.load(Ordering::Relaxed).max(self.first());
        let fresh = end.saturating_sub(next);
        fresh.saturating_add(self.reclaimed_count.load(Ordering::Relaxed))
    }

    fn note_used(&self, end: u32) {
        // A fresh cluster says so itself, by the next one.
        if end > self.old_used_end.load(Ordering::Relaxed) {
            self.old_used_end.fetch_max(end, Ordering::SeqCst);
        }
    }

    /// One after the last cluster of the file that is used: mapped when it was opened, given
    /// out since, or of the BAT. (SeqCst, there too: who is given one and then looks for
    /// something either finds what was put there before this was called, or is seen by this.)
    pub fn used_end(&self) -> u32 {
        let next = self.next.load(Ordering::SeqCst);
        let old = self.old_used_end.load(Ordering::SeqCst);
        if next > self.old_end {
            next.max(old)
        } else {
            old
        }
    }

    /// The end of the file.
    pub fn end(&self) -> u32 {
        self.end.load(Ordering::Acquire)
    }

    /// The file was made longer.
    pub fn extend(&self, end: u32) {
        self.end.fetch_max(end, Ordering::Release);
    }

    /// The file's length up to here is stable.
    pub fn set_stable_end(&self, end: u32) {
        self.stable_end.fetch_max(end, Ordering::Release);
    }

    /// The file's length is not known to be stable beyond this cluster.
    pub fn doubt_length(&self, from: HostCluster) {
        self.stable_end.fetch_min(from.0, Ordering::AcqRel);
    }

    /// Whether the length of the file that covers the cluster is stable, so that
    /// it may be mapped on disk (I8).
    pub fn is_length_stable(&self, cluster: HostCluster) -> bool {
        cluster.0 < self.stable_end.load(Ordering::Acquire)
            || !rule::kept(Rule::LengthBeforeMapping)
    }

    /// Whether a sync would make more clusters fit for being mapped on disk.
    pub fn has_unstable_length(&self) -> bool {
        // Only what was given out can be mapped.
        self.stable_end.load(Ordering::Acquire) < self.next.load(Ordering::Relaxed)
            && rule::kept(Rule::LengthBeforeMapping)
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    #[test]
    fn gives_each_cluster_once_reclaimed_first() {
        let alloc = Allocator::new(HostCluster(5), HostCluster(2));
        assert_eq!(alloc.take(), None);
        alloc.extend(7);
        assert_eq!(alloc.available(), 2);
        assert_eq!(alloc.take(), Some(HostCluster(5)));
        alloc.put(Extent { start: 2, end: 4 });
        assert_eq!(alloc.take(), Some(HostCluster(2)));
        assert_eq!(alloc.take(), Some(HostCluster(3)));
        assert_eq!(alloc.take(), Some(HostCluster(6)));
        assert_eq!(alloc.take(), None);
    }

    #[test]
    fn nothing_is_given_out_that_lies_where_the_bat_goes() {
        let alloc = Allocator::new(HostCluster(3), HostCluster(2));
        alloc.extend(6);
        alloc.put(Extent { start: 1, end: 3 });
        alloc.keep_below(HostCluster(5));
        assert_eq!(alloc.available(), 1);
        alloc.put(Extent { start: 2, end: 3 });
        assert_eq!(alloc.take(), Some(HostCluster(5)));
        assert_eq!(alloc.take(), None);
        alloc.put(Extent { start: 3, end: 6 });
        assert_eq!(alloc.take(), Some(HostCluster(5)));
        assert_eq!((alloc.take(), alloc.available()), (None, 0));
    }

    #[test]
    fn what_was_kept_is_given_out_when_nothing_goes_there() {
        let alloc = Allocator::new(HostCluster(3), HostCluster(2));
        alloc.extend(9);
        alloc.put(Extent { start: 1, end: 3 });
        alloc.keep_below(HostCluster(7));
        assert_eq!(alloc.take(), Some(HostCluster(7)));
        assert_eq!(alloc.available(), 1);
        alloc.keep_no_more_from(HostCluster(2));
        assert_eq!(alloc.available(), 6);
        let mut rest: Vec<_> = std::iter::from_fn(|| alloc.take()).collect();
        rest.sort_unstable();
        assert_eq!(rest, [2, 3, 4, 5, 6, 8].map(HostCluster));
        // What is kept for good stays so.
        alloc.keep_no_more_from(HostCluster(2));
        assert_eq!((alloc.take(), alloc.available()), (None, 0));
    }

    #[test]
    fn what_is_used_ends_behind_the_last_that_was_given_out() {
        let alloc = Allocator::new(HostCluster(6), HostCluster(2));
        assert_eq!(alloc.used_end(), 2);
        alloc.extend(9);
        alloc.put(Extent { start: 4, end: 6 });
        assert_eq!(alloc.used_end(), 2);
        assert_eq!((alloc.take(), alloc.used_end()), (Some(HostCluster(4)), 5));
        alloc.put(Extent { start: 1, end: 2 });
        assert_eq!((alloc.take(), alloc.used_end()), (Some(HostCluster(5)), 6));
        assert_eq!((alloc.take(), alloc.used_end()), (Some(HostCluster(1)), 6));
        assert_eq!((alloc.take(), alloc.used_end()), (Some(HostCluster(6)), 7));
        assert_eq!(
            (alloc.claim(12, 1), alloc.used_end()),
            (HostCluster(11), 12)
        );
        alloc.keep_below(HostCluster(20));
        assert_eq!(alloc.used_end(), 20);
    }

    #[test]
    fn what_lies_below_is_taken_and_nothing_else_is_lost() {
        let alloc = Allocator::new(HostCluster(9), HostCluster(9));
        for (start, end) in [(2, 4), (7, 9), (5, 6), (4, 5)] {
            alloc.put(Extent { start, end });
        }
        let mut taken = alloc.take_below(6, 3);
        assert_eq!((taken.len(), alloc.available()), (3, 3));
        taken.extend(alloc.take_below(6, 3));
        taken.sort_unstable();
        assert_eq!(taken, [2, 3, 4, 5].map(HostCluster));
        assert_eq!((alloc.take_below(6, 3), alloc.available()), (Vec::new(), 2));
        assert_eq!(alloc.take_below(8, 3), [HostCluster(7)]);
        assert_eq!((alloc.take(), alloc.take()), (Some(HostCluster(8)), None));
    }

    #[test]
    fn the_end_is_cut_where_the_last_cluster_is_that_is_not_free() {
        let alloc = Allocator::new(HostCluster(5), HostCluster(5));
        alloc.extend(12);
        alloc.set_stable_end(12);
        assert_eq!(alloc.take(), Some(HostCluster(5)));
        assert_eq!(alloc.take(), Some(HostCluster(6)));
        // Who is about to take one has it.
        assert_eq!(alloc.close_end(), 12);
        assert_eq!((alloc.available(), alloc.take()), (0, None));
        for (start, end) in [(1, 2), (3, 4), (4, 5)] {
            alloc.put(Extent { start, end });
        }
        assert_eq!(alloc.cut_free(), HostCluster(7));
        alloc.open_end();
        assert_eq!((alloc.end(), alloc.available()), (7, 3));
        for (start, end) in [(6, 7), (5, 6)] {
            alloc.put(Extent { start, end });
        }
        assert_eq!(alloc.close_end(), 7);
        assert_eq!(alloc.cut_free(), HostCluster(3));
        assert_eq!((alloc.end(), alloc.available()), (3, 1));
        alloc.open_end();
        assert_eq!((alloc.end(), alloc.available()), (3, 1));
        assert!(!alloc.is_length_stable(HostCluster(3)));
        assert!(alloc.is_length_stable(HostCluster(2)));
        // It comes to nothing: all behind is fresh again.
        alloc.extend(7);
        assert_eq!(alloc.available(), 5);
        assert_eq!(alloc.take(), Some(HostCluster(1)));
        assert_eq!(alloc.take(), Some(HostCluster(3)));
    }

    #[test]
    fn what_is_claimed_goes_to_nobody_else() {
        let alloc = Allocator::new(HostCluster(3), HostCluster(2));
        alloc.extend(5);
        assert_eq!(alloc.take(), Some(HostCluster(3)));
        assert_eq!(alloc.claim(9, 2), HostCluster(7));
        assert_eq!(alloc.available(), 3);
        for host in 4..7 {
            assert_eq!(alloc.take(), Some(HostCluster(host)));
        }
        assert_eq!(alloc.take(), None);
        alloc.extend(10);
        assert_eq!(alloc.take(), Some(HostCluster(9)));
    }

    #[test]
    fn what_was_never_given_out_is_cut_off() {
        let alloc = Allocator::new(HostCluster(5), HostCluster(2));
        alloc.extend(8);
        assert_eq!(alloc.take(), Some(HostCluster(5)));
        alloc.put(Extent { start: 2, end: 3 });
        assert_eq!(alloc.cut(), HostCluster(6));
        assert_eq!((alloc.end(), alloc.available()), (6, 1));
        alloc.extend(7);
        assert_eq!(alloc.take(), Some(HostCluster(2)));
        let cluster = alloc.take().unwrap();
        assert_eq!(cluster, HostCluster(6));
        assert!(!alloc.is_length_stable(cluster), "it is new again");
    }

    #[test]
    fn knows_what_length_is_stable() {
        let alloc = Allocator::new(HostCluster(5), HostCluster(2));
        alloc.extend(8);
        assert!(!alloc.has_unstable_length(), "nothing was given out");
        let cluster = alloc.take().unwrap();
        assert!(!alloc.is_length_stable(cluster));
        assert!(alloc.has_unstable_length());
        alloc.set_stable_end(8);
        assert!(alloc.is_length_stable(cluster));
        assert!(!alloc.has_unstable_length());
    }
}
