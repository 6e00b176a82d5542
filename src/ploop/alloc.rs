//! Host clusters to give out.
//!
//! Everything in here reads as zeros on the host and is mapped nowhere: fresh
//! space at the end of the file, and clusters that went all the way through the
//! reclaim of the metadata thread (I2). Does no I/O and takes no lock.

use crossbeam_queue::SegQueue;
use crossbeam_utils::CachePadded;

use super::sabotage::{self, Sabotage};
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
}

/// See the module's text.
pub struct Allocator {
    /// The first cluster of the file that was never given out.
    next: CachePadded<AtomicU32>,
    /// The end of the file.
    end: CachePadded<AtomicU32>,
    /// Below this, the length of the file is stable (I8).
    stable_end: AtomicU32,
    reclaimed: SegQueue<Extent>,
    /// Clusters in [`Self::reclaimed`].
    reclaimed_count: CachePadded<AtomicU32>,
}

impl Allocator {
    /// For a file whose end, at this cluster, is stable.
    pub fn new(end: HostCluster) -> Self {
        Self {
            next: CachePadded::new(AtomicU32::new(end.0)),
            end: CachePadded::new(AtomicU32::new(end.0)),
            stable_end: AtomicU32::new(end.0),
            reclaimed: SegQueue::new(),
            reclaimed_count: CachePadded::new(AtomicU32::new(0)),
        }
    }

    /// A cluster that reads as zeros and is mapped nowhere, if there is one.
    pub fn take(&self) -> Option<HostCluster> {
        if let Some(extent) = self.reclaimed.pop() {
            self.reclaimed_count.fetch_sub(1, Ordering::Relaxed);
            if extent.len() > 1 {
                self.reclaimed.push(Extent {
                    start: extent.start + 1,
                    end: extent.end,
                });
            }
            return Some(HostCluster(extent.start));
        }
        let end = self.end.load(Ordering::Acquire);
        self.next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                (next < end).then_some(next + 1)
            })
            .ok()
            .map(HostCluster)
    }

    /// Gives back clusters that still read as zeros and are mapped nowhere.
    pub fn put(&self, extent: Extent) {
        if extent.len() > 0 {
            // First: it may be taken the moment that it is there.
            self.reclaimed_count
                .fetch_add(extent.len(), Ordering::Relaxed);
            self.reclaimed.push(extent);
        }
    }

    /// How many clusters there are to be given out.
    pub fn available(&self) -> u32 {
        let end = self.end.load(Ordering::Acquire);
        let fresh = end.saturating_sub(self.next.load(Ordering::Relaxed));
        fresh.saturating_add(self.reclaimed_count.load(Ordering::Relaxed))
    }

    /// The end of the file.
    pub fn end(&self) -> u32 {
        self.end.load(Ordering::Acquire)
    }

    /// The file was made longer.
    pub fn extend(&self, end: u32) {
        self.end.fetch_max(end, Ordering::Release);
        if sabotage::is(Sabotage::MapBeyondLength) {
            self.set_stable_end(end);
        }
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
    }

    /// Whether a sync would make more clusters fit for being mapped on disk.
    pub fn has_unstable_length(&self) -> bool {
        // Only what was given out can be mapped.
        self.stable_end.load(Ordering::Acquire) < self.next.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    #[test]
    fn gives_each_cluster_once_reclaimed_first() {
        let alloc = Allocator::new(HostCluster(5));
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
    fn knows_what_length_is_stable() {
        let alloc = Allocator::new(HostCluster(5));
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
