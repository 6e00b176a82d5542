//! Rounds: pages are written and the file is synced in them, one after the other, so
//! that of each page one write is in flight at a time (I11) and what a sync covers
//! is known. A round has up to three phases:
//!
//! 1. a sync, if entries of the pages to be written wait for one before they may reach
//!    the disk: copies (I6), or clusters in a part of the file whose length is not
//!    stable (I8);
//! 2. the writes of the pages, neighbours in one;
//! 3. a sync, if a flush waits or clusters can be reclaimed by it.
//!
//! What a round decides it reads where it is true: which entries wait, in the BAT;
//! what has completed, in the counts of [`Epochs`](crate::ploop::epoch::Epochs). And in this
//! order: first the count, then the dirty pages, then their entries. So whatever was
//! counted is in the pages, and no entry that it relies on is left out. No message
//! tells of either: one that is late would let the round promise too much.

use std::collections::BTreeSet;
use std::mem;
use std::ops::Range;
use std::time::Duration;

use rustix::io::Errno;

use super::super::options::OnEnospc;
use super::control::ControlStage;
use super::{MdOp, MdWriter, Waiter};
use crate::format::{Geometry, GuestCluster};
use crate::ploop::EngineError;
use crate::ploop::entry::Entry;
use crate::ploop::pio::QueueMessage;
use crate::ploop::preempt;
use crate::ploop::rule::{self, Rule};
use crate::storage::{AlignedBuf, Buffer, Disk, Op};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Idle,
    PreSync,
    Pages { left: usize },
    FinalSync,
}

/// The round under way.
pub(super) struct Round {
    pub number: u64,
    pub phase: Phase,
    /// The flushes that it answers.
    pub waiters: Vec<Waiter>,
    /// [`Epochs::completed`](crate::ploop::epoch::Epochs::completed) when it started.
    pub completed: u64,
    /// [`Engine::barriers_up`](crate::ploop::engine::Engine::barriers_up) when it started.
    pub barriers: u64,
    /// It writes every page that was dirty when it started: only then does its final
    /// sync cover all that had completed.
    pub writes_all: bool,
    pub error: Option<EngineError>,
    /// There was no space for one of its pages, and its flushes wait for some.
    pub lacks_space: bool,
    /// Its sync has succeeded, and counts when the outcome of stable writes is known; see
    /// [`StableWrites`](crate::ploop::stable_writes::StableWrites).
    pub awaits_stable_writes: bool,
}

impl Round {
    /// Whether a queue waits for it, and not only the control thread.
    fn is_flush(&self) -> bool {
        let mut waiters = self.waiters.iter();
        waiters.any(|waiter| matches!(waiter, Waiter::Queue(_)))
    }
}

/// What the sync in flight makes stable.
#[derive(Default)]
pub(super) struct Covered {
    pub file_end: u32,
    pub copies: Vec<(GuestCluster, Entry)>,
    pub pages: BTreeSet<u32>,
}

/// When a page that could not be written is tried again, at the earliest.
const RETRY: Duration = Duration::from_millis(500);

/// Pages that are written at once, at most: 1 MiB.
const PAGES_PER_WRITE: usize = 256;

impl<D: Disk> MdWriter<D> {
    /// Whether the next round has to wait: of a page one write is in flight at a time
    /// (I11).
    fn is_round_under_way(&self) -> bool {
        let is_alone = self.ops.len() == 1 && self.round.waiters.is_empty();
        match self.round.phase {
            Phase::Idle => false,
            Phase::Pages { .. } if is_alone => rule::kept(Rule::OneWriteOfPage),
            _ => true,
        }
    }

    pub(super) fn step_round(&mut self, now: Duration) {
        if self.is_round_under_way() {
            return;
        }
        if self.engine.has_sync_failed() && !self.waiters.is_empty() {
            let waiters = mem::take(&mut self.waiters);
            self.answer(waiters, Err(EngineError::SyncFailed));
        }
        let reclaims = self.wants_reclaim_sync() && self.retry_at <= now;
        if self.waiters.is_empty() && !reclaims && !self.has_due(now) {
            return;
        }
        self.round.number += 1;
        self.round.waiters = mem::take(&mut self.waiters);
        self.round.error = None;
        self.round.lacks_space = false;
        self.round.writes_all = !self.round.waiters.is_empty() || self.wants_reclaim_pages();
        // Before the pages are collected: what has completed until now is in them.
        self.round.completed = self.engine.epochs.completed();
        self.round.barriers = self.engine.barriers_up();
        preempt::point("counted");
        self.collect_dirtied(now);
        if !self.engine.has_sync_failed() && self.needs_sync(now) {
            self.begin_sync(Phase::PreSync);
        } else {
            self.write_pages(now);
        }
    }

    /// Whether entries of the pages to be written wait for a sync. One that begins to
    /// wait later is of a request that this round need not cover.
    fn needs_sync(&mut self, now: Duration) -> bool {
        let pages = self.choose_pages(now);
        self.find_unstable(pages.into_iter().flatten());
        !self.unstable.is_empty() || self.engine.alloc().has_unstable_length()
    }

    fn find_unstable(&mut self, pages: impl Iterator<Item = u32>) {
        let engine = &self.engine;
        if !engine.has_lower_levels() {
            return;
        }
        for page in pages {
            for cluster in self.geometry.md_page_entries(page).map(GuestCluster) {
                let entry = engine.bat.get(cluster);
                let is_seen = rule::kept(Rule::UnmarkedIsSeen) || !entry.is_unmarked();
                if entry.is_unstable() && is_seen {
                    self.unstable.push((cluster, entry));
                }
            }
        }
    }

    fn has_due(&self, now: Duration) -> bool {
        self.dirty.keys().any(|page| self.is_due(*page, now))
    }

    fn is_due(&self, page: u32, now: Duration) -> bool {
        let due = self.dirty.get(&page).is_some_and(|due| *due <= now);
        (due || self.engine.bat.is_urgent(page)) && self.retry_at <= now
    }

    /// Whether clusters can come back by writing pages and a sync, and are needed.
    fn wants_reclaim_pages(&self) -> bool {
        self.reclaim.is_under_way() && self.needs_back()
    }

    /// Whether what is on its way back is needed.
    fn needs_back(&self) -> bool {
        self.wants_all_back() || self.engine.alloc().available() <= self.engine.options.low_water
    }

    /// Whether clusters can come back by a sync, and are needed.
    pub(super) fn wants_reclaim_sync(&self) -> bool {
        self.reclaim.wants_sync() && !self.engine.has_sync_failed() && self.needs_back()
    }

    pub(super) fn begin_sync(&mut self, phase: Phase) {
        self.round.phase = phase;
        self.syncs += 1;
        self.covered = Covered {
            file_end: self.engine.alloc().end(),
            copies: mem::take(&mut self.unstable),
            pages: mem::take(&mut self.written),
        };
        self.reclaim.begin_sync();
        let file = self.engine.top();
        self.queue(MdOp::Sync, Op::Sync { file });
    }

    pub(super) fn synced(&mut self, result: Result<(), Errno>, now: Duration) {
        if let Err(errno) = result {
            self.engine.refuse_whoever_is_awaited();
            let what = format!("a sync of the image ({errno})");
            self.engine.set_sync_failed(&what);
            return self.end_round(Err(EngineError::SyncFailed));
        }
        // Before or meanwhile one of them may have lost what this sync was to cover.
        self.engine.stable_writes.advance();
        self.round.awaits_stable_writes =
            !self.engine.stable_writes.is_old_over() && rule::kept(Rule::StableWritesHoldSync);
        if !self.round.awaits_stable_writes {
            self.count_sync(now);
        }
    }

    /// It covers what it was to cover, unless something of that was lost.
    pub(super) fn count_sync(&mut self, now: Duration) {
        if self.engine.has_sync_failed() {
            return self.end_round(Err(EngineError::SyncFailed));
        }
        let engine = self.engine.clone();
        let covered = mem::take(&mut self.covered);
        engine.alloc().set_stable_end(covered.file_end);
        // Their pages are dirty: they were to be written, or were without these.
        for (cluster, read) in covered.copies {
            engine.bat.set_stable(cluster, read);
        }
        for page in covered.pages {
            for cluster in self.geometry.md_page_entries(page) {
                engine.bat.set_synced(GuestCluster(cluster));
            }
        }
        self.give_reclaimed();
        if self.round.phase == Phase::PreSync {
            self.write_pages(now);
        } else {
            let completed = if rule::kept(Rule::CountBeforeRound) {
                self.round.completed
            } else {
                engine.epochs.completed()
            };
            if self.round.error.is_none() && self.round.writes_all {
                engine.end_barrier(self.round.barriers);
                if self.unreported.is_none() || self.round.is_flush() {
                    engine.set_covered(completed);
                }
            }
            self.end_round(self.round.error.map_or(Ok(()), Err));
        }
    }

    /// Clusters whose way was over with the last sync may be given out again.
    fn give_reclaimed(&mut self) {
        for extent in self.reclaim.end_sync() {
            self.engine.alloc().put(extent);
        }
        if self.space.has_parked() {
            let pios = self.space.take_all();
            self.try_again(pios);
        }
    }

    fn write_pages(&mut self, now: Duration) {
        self.collect_dirtied(now);
        let writes = self.choose_pages(now);
        for page in writes.iter().cloned().flatten() {
            self.dirty.remove(&page);
            self.engine.bat.begin_writeback(page);
            preempt::point("taken");
        }
        // Messages about changes whose mark was taken just now are here already:
        // they are posted before the mark is made.
        self.hear_all(now);
        self.round.phase = Phase::Pages { left: writes.len() };
        let nothing = writes.is_empty();
        for pages in writes {
            let op = Op::Write {
                file: self.engine.top(),
                offset: u64::from(pages.start) * Geometry::MD_PAGE,
                buffer: Buffer::Owned(self.page_bytes(pages.clone())),
                dsync: false,
            };
            self.queue(MdOp::Pages(pages), op);
        }
        if nothing {
            self.pages_done();
        }
    }

    /// The runs of neighbouring pages to write, those first that somebody waits
    /// for. For a flush these are all dirty pages; else those that are due, and
    /// their neighbours, which cost no further write.
    fn choose_pages(&self, now: Duration) -> Vec<Range<u32>> {
        let all = self.round.writes_all && rule::kept(Rule::FlushWritesBat);
        let pages: Vec<_> = self.dirty.keys().copied().collect();
        let mut runs: Vec<_> = pages
            .chunk_by(|a, b| a + 1 == *b)
            .filter(|run| all || run.iter().any(|page| self.is_due(*page, now)))
            .flat_map(|run| run.chunks(PAGES_PER_WRITE))
            .map(|run| run[0]..run[0] + run.len() as u32)
            .collect();
        let is_urgent = |run: &Range<u32>| run.clone().any(|page| self.engine.bat.is_urgent(page));
        runs.sort_by_cached_key(|run| !is_urgent(run));
        runs
    }

    /// Md pages as they may be on disk now. Entries that may not, keep the value that the
    /// disk has for them: "not allocated", or where the cluster was before it moved, if
    /// that was in another process.
    fn page_bytes(&mut self, pages: Range<u32>) -> AlignedBuf {
        let engine = self.engine.clone();
        let geometry = self.geometry;
        let start = u64::from(pages.start) * Geometry::MD_PAGE;
        let end = (u64::from(pages.end) * Geometry::MD_PAGE).min(geometry.data_start);
        let len = (end - start) as usize;
        let mut bytes = AlignedBuf::from_iter(4096, std::iter::repeat_n(0, len));
        let mut put = |at: u64, part: &[u8]| {
            let at = (at - start) as usize;
            bytes[at..at + part.len()].copy_from_slice(part);
        };
        if let Some(metadata) = &self.metadata {
            if pages.start == 0 {
                put(0, &metadata.header.to_bytes());
            }
            if pages.end == geometry.md_pages() {
                put(geometry.metadata_len(), &metadata.bat_tail);
            }
        }
        let has_sync_failed = engine.has_sync_failed();
        for page in pages {
            let mut withheld = false;
            for cluster in geometry.md_page_entries(page).map(GuestCluster) {
                let entry = engine.bat.get(cluster);
                let is_unstable = entry.is_unstable();
                // After a failed sync no entry will ever wait with success.
                if is_unstable && !has_sync_failed {
                    self.unstable.push((cluster, entry));
                }
                let waits = is_unstable || !engine.is_length_stable(entry);
                withheld |= waits;
                if !waits && entry.is_changed() {
                    if entry.is_unmarked() {
                        engine.note_change(cluster, entry);
                    }
                    engine.bat.set_written(cluster, entry);
                }
                let value = if !waits {
                    self.still_mapped.remove(&cluster);
                    engine.bat_value(entry)
                } else if let Some(host) = self.still_mapped.get(&cluster) {
                    geometry.bat_value(*host)
                } else {
                    0
                };
                put(geometry.entry_offset(cluster), &value.to_le_bytes());
            }
            if withheld && !has_sync_failed {
                engine.bat.mark_dirty(page);
            }
        }
        bytes
    }

    pub(super) fn pages_written(
        &mut self,
        pages: Range<u32>,
        result: Result<(), Errno>,
        now: Duration,
    ) {
        let error = result.err();
        let error = error.filter(|_| rule::kept(Rule::FailedPageStaysDirty));
        let is_written = error.is_none();
        for page in pages {
            self.engine.bat.end_writeback(page, is_written);
            if is_written || !rule::kept(Rule::FailedPageIsNotOnDisk) {
                self.written.insert(page);
            } else {
                // Entries that the failed write contained are not on disk.
                self.written.remove(&page);
            }
            if is_written || !rule::kept(Rule::FailedPageRemovesNothing) {
                self.reclaim.page_written(page, self.round.number);
            }
        }
        if let Some(errno) = error {
            self.page_failed(errno, now);
        } else if !self.round.lacks_space {
            self.space.pages_have_space();
        }
        if let Phase::Pages { left } = &mut self.round.phase {
            *left -= 1;
            if *left == 0 {
                self.pages_done();
            }
        }
    }

    fn page_failed(&mut self, errno: Errno, now: Duration) {
        let policy = self.engine.options.on_enospc;
        let is_full = matches!(errno, Errno::NOSPC | Errno::DQUOT);
        if is_full && policy == OnEnospc::Stop && !self.engine.has_lost_lock() {
            // Nothing to be told of: what waits for the page goes on waiting.
            self.round.lacks_space = true;
            self.round.error.get_or_insert(EngineError::Metadata(errno));
            self.space.pages_lack_space(policy, now);
            self.retry_at = now + RETRY;
            return;
        }
        if self.retry_at <= now && !self.engine.has_lost_lock() {
            log::error!("cannot write the BAT: {errno}; retrying");
        }
        self.retry_at = now + RETRY;
        let error = EngineError::Metadata(errno);
        let is_last = matches!(self.round.phase, Phase::Pages { left: 1 });
        if is_last || rule::kept(Rule::EveryPageCounts) {
            self.round.error = Some(error);
        }
        self.unreported = Some(error);
        // The next flush has something to tell. Without the lock there is none here, and a guest
        // that goes on with the next process knows what the page was to say.
        if !self.engine.has_lost_lock() {
            self.engine.uncover();
        }
    }

    fn pages_done(&mut self) {
        if self.round.lacks_space && self.unreported.is_none() {
            self.hold_flushes();
        }
        let wants_sync = !self.round.waiters.is_empty() || self.wants_reclaim_sync();
        let error = self.round.error;
        let reclaims_all_the_same = self.round.waiters.is_empty() && self.wants_reclaim_sync();
        if let Some(error) = error.filter(|_| !reclaims_all_the_same) {
            self.end_round(Err(error));
        } else if wants_sync && !self.engine.is_read_only() {
            self.begin_sync(Phase::FinalSync);
        } else {
            self.end_round(Ok(()));
        }
    }

    /// The flushes of the round wait for space, but for those that are not to wait any more.
    fn hold_flushes(&mut self) {
        for waiter in mem::take(&mut self.round.waiters) {
            match waiter {
                Waiter::Queue(flush) if !flush.last_try => self.space.hold(flush),
                other => self.round.waiters.push(other),
            }
        }
    }

    fn end_round(&mut self, result: Result<(), EngineError>) {
        self.round.phase = Phase::Idle;
        let waiters = mem::take(&mut self.round.waiters);
        self.answer(waiters, result);
    }

    pub(super) fn answer(&mut self, waiters: Vec<Waiter>, result: Result<(), EngineError>) {
        let unreported = self.unreported;
        for waiter in waiters {
            match waiter {
                Waiter::Queue(flush) => {
                    // All that wait together hear of it, none that comes later.
                    self.unreported = None;
                    let result = result.and(unreported.map_or(Ok(()), Err));
                    let request = flush.request;
                    flush
                        .inbox
                        .post(QueueMessage::FlushDone { request, result });
                }
                Waiter::Growth => self.growth_flushed(result),
                Waiter::Control => {
                    if let Some(job) = self.control.front_mut() {
                        job.stage = ControlStage::Flushed(result);
                    }
                }
            }
        }
    }
}
