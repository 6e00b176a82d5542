//! How an engine is doing, for people and programs that look after it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::storage::LockStanding;

/// A snapshot; its parts are of slightly different moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineReport {
    /// Threads for what changes the mapping.
    pub runners: usize,
    /// Parts of requests that are with them.
    pub dispatched: usize,
    /// Parts of requests that wait for space.
    pub parked: u64,
    /// Whether the host file system is full, as far as is known.
    pub is_host_full: bool,
    /// It is, and writes that need space wait for it; else they fail.
    pub waits_for_space: bool,
    /// In which metadata was written or synced, since the image was opened.
    pub rounds: u64,
    /// Of the image file, since then, those for stable single writes not counted.
    pub syncs: u64,
    /// Pages of the BAT that are to be written.
    pub dirty_pages: u64,
    /// A sync has failed: nothing becomes stable any more.
    pub has_sync_failed: bool,
    /// What is known of the locks on the image.
    pub lock: LockStanding,
    /// New requests are held.
    pub is_suspended: bool,
    /// Each write is stable when it completes.
    pub is_write_through: bool,
    /// That can be given out at once.
    pub clusters_available: u32,
    /// Unmapped ones that have not begun their way back.
    pub reclaim_clusters: u64,
    /// Groups of them that are on it.
    pub reclaim_batches: u64,
    /// By which is known when older I/O is over.
    pub epoch: u64,
    /// Requests that have changed the disk, of all queues; it may begin anywhere.
    pub changes: u64,
}

/// What only the metadata thread knows, put where others can see it. It alone writes;
/// nothing is decided by these.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    pub parked: AtomicU64,
    pub is_host_full: AtomicBool,
    pub rounds: AtomicU64,
    pub syncs: AtomicU64,
    pub dirty_pages: AtomicU64,
    pub reclaim_clusters: AtomicU64,
    pub reclaim_batches: AtomicU64,
}

impl Gauges {
    pub fn fill(&self, report: &mut EngineReport) {
        let load = |gauge: &AtomicU64| gauge.load(Ordering::Relaxed);
        report.parked = load(&self.parked);
        report.is_host_full = self.is_host_full.load(Ordering::Relaxed);
        report.rounds = load(&self.rounds);
        report.syncs = load(&self.syncs);
        report.dirty_pages = load(&self.dirty_pages);
        report.reclaim_clusters = load(&self.reclaim_clusters);
        report.reclaim_batches = load(&self.reclaim_batches);
    }
}
