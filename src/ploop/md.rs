//! The metadata thread: everything about the image that is not one pio's business.
//!
//! - writeback of dirty md pages, after their delay or when somebody waits;
//! - flush: all waiting ones share one round, whose sync starts after them;
//! - the way of unmapped clusters back to the allocator ([`reclaim`]);
//! - growing the file, and the pios that wait for space ([`space`]);
//! - what a larger disk takes ([`grow`]), and a new top ([`top`]);
//! - what a shorter file takes ([`compact`]);
//! - suspend, resume and close, and what [`hand_over`] is.
//!
//! Pages are written and the file is synced in *rounds*, one after the other, so
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
//! what has completed, in the counts of [`Epochs`](super::epoch::Epochs). And in this
//! order: first the count, then the dirty pages, then their entries. So whatever was
//! counted is in the pages, and no entry that it relies on is left out. No message
//! tells of either: one that is late would let the round promise too much.

mod compact;
mod grow;
mod hand_over;
mod reclaim;
mod space;
mod top;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;
use slab::Slab;

use self::grow::Growing;
use self::reclaim::{Reclaim, RoundNumber};
use self::space::{Space, SpaceStep};
use super::EngineError;
use super::alloc::Extent;
use super::control::{Control, Outcome};
use super::engine::{Engine, MdMessage};
use super::entry::{Entry, Place};
use super::inbox::{Inbox, Waker};
use super::options::OnEnospc;
use super::pio::{Home, Pio, QueueMessage, Work};
use super::preempt;
use super::rule::{self, Rule};
use super::tracking::{Bitmap, saved};
use crate::format::{Geometry, GuestCluster, Header, HostCluster, InUse, Sector};
use crate::notices::Notice;
use crate::storage::{AlignedBuf, Buffer, Completion, Disk, FileId, Io, Op, ZeroMode};

/// Operations that the thread keeps in flight.
const DEPTH: u32 = 64;

/// How often it looks whether older I/O is over, while somebody waits for that.
const GRACE_POLL: Duration = Duration::from_millis(1);

/// When a page that could not be written is tried again, at the earliest.
const RETRY: Duration = Duration::from_millis(500);

/// Holes that are punched at the same time, at most: they wait for each other in
/// the kernel, and pages and syncs for them.
const PUNCHES: usize = 2;

/// Bytes of one, at most, unless a cluster has more: who waits for one that is under way,
/// to close the image for instance, shall not wait for long.
const HOLE_BYTES: u64 = 32 << 20;

/// Pages that are written at once, at most: 1 MiB.
const PAGES_PER_WRITE: usize = 256;

/// What of the file the metadata thread alone writes.
pub(super) struct Metadata {
    pub header: Header,
    /// What follows the last entry of the BAT, up to the end of its md page or to
    /// the first data, whichever comes first.
    pub bat_tail: Vec<u8>,
}

/// Who waits for a round.
enum Waiter {
    Queue(Arc<Inbox<QueueMessage>>, usize),
    Control,
    Growth,
}

enum MdOp {
    Pages(Range<u32>),
    Sync,
    Punch {
        batch: u64,
        extent: Extent,
    },
    Extend {
        clusters: u32,
    },
    /// A step of a growth.
    Grow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    PreSync,
    Pages { left: usize },
    FinalSync,
}

/// The round under way.
struct Round {
    number: u64,
    phase: Phase,
    /// The flushes that it answers.
    waiters: Vec<Waiter>,
    /// [`super::epoch::Epochs::completed`] when it started.
    completed: u64,
    /// [`Engine::barriers_up`] when it started.
    barriers: u64,
    /// It writes every page that was dirty when it started: only then does its final
    /// sync cover all that had completed.
    writes_all: bool,
    error: Option<EngineError>,
    /// Its sync has succeeded, and counts when the outcome of stable writes is known; see
    /// [`StableWrites`](super::stable_writes::StableWrites).
    awaits_stable_writes: bool,
}

impl Round {
    /// Whether a queue waits for it, and not only the control thread.
    fn is_flush(&self) -> bool {
        let mut waiters = self.waiters.iter();
        waiters.any(|waiter| matches!(waiter, Waiter::Queue(..)))
    }
}

/// What the sync in flight makes stable.
#[derive(Default)]
struct Covered {
    file_end: u32,
    copies: Vec<(GuestCluster, Entry)>,
    pages: BTreeSet<u32>,
}

/// A control operation under way.
struct ControlJob {
    what: Control,
    outcome: Outcome,
    stage: ControlStage,
}

enum ControlStage {
    Grace(u64),
    Flush,
    Flushed(Result<(), EngineError>),
}

/// See the module's text.
pub struct MdWriter<D: Disk> {
    engine: Arc<Engine<D>>,
    io: D::Io,
    /// `None`: the top is plain and has none.
    metadata: Option<Metadata>,
    /// Of the top, with the header that is, or will be, written next.
    geometry: Geometry,
    growing: Option<Growing>,
    ops: Slab<MdOp>,
    /// Operations that the ring had no room for.
    backlog: VecDeque<(u64, Op)>,
    completions: Vec<Completion>,
    /// Dirty pages, with when they are due.
    dirty: BTreeMap<u32, Duration>,
    /// Pages written, and covered by no sync.
    written: BTreeSet<u32>,
    /// Entries that were seen to wait for a sync of their copy since one started last.
    unstable: Vec<(GuestCluster, Entry)>,
    waiters: Vec<Waiter>,
    round: Round,
    covered: Covered,
    reclaim: Reclaim,
    /// Holes to be punched, with the batch that each belongs to.
    holes: VecDeque<(u64, Extent)>,
    /// How many are being punched.
    punching: usize,
    /// The last one could not be, which was said in the log.
    punch_failed: bool,
    /// Where the disk has guest clusters that another process had moved before a sync
    /// failed: their new entries may have to be kept from the disk for ever.
    still_mapped: BTreeMap<GuestCluster, HostCluster>,
    space: Space,
    control: VecDeque<ControlJob>,
    /// Suspended by who resumes it.
    is_paused: bool,
    /// Requests are held until there is another one, or it is kept.
    is_top_closed: bool,
    /// That have begun.
    syncs: u64,
    /// After a failed write of a page: when pages are written again unasked.
    retry_at: Duration,
    /// A failed write of a page that no queue has been told of (I7). The next flush
    /// tells of it, even if the page has been written meanwhile.
    unreported: Option<EngineError>,
    closed: bool,
}

impl<D: Disk> MdWriter<D> {
    pub(super) fn new(engine: Arc<Engine<D>>, metadata: Option<Metadata>) -> io::Result<Self> {
        Ok(Self {
            io: engine.disk.open_io(DEPTH)?,
            metadata,
            geometry: engine.geometry(),
            growing: None,
            ops: Slab::with_capacity(DEPTH as usize),
            backlog: VecDeque::new(),
            completions: Vec::new(),
            dirty: BTreeMap::new(),
            written: BTreeSet::new(),
            unstable: Vec::new(),
            waiters: Vec::new(),
            round: Round {
                number: 0,
                phase: Phase::Idle,
                waiters: Vec::new(),
                completed: 0,
                barriers: 0,
                writes_all: false,
                error: None,
                awaits_stable_writes: false,
            },
            covered: Covered::default(),
            reclaim: Reclaim::default(),
            holes: VecDeque::new(),
            punching: 0,
            punch_failed: false,
            still_mapped: BTreeMap::new(),
            space: Space::default(),
            control: VecDeque::new(),
            is_paused: false,
            is_top_closed: false,
            syncs: 0,
            retry_at: Duration::ZERO,
            unreported: None,
            closed: false,
            engine,
        })
    }

    /// Does what there is to do, without waiting. `now` counts from any moment.
    /// Returns after how long it wants to be called again if nothing wakes it
    /// before.
    pub fn poll(&mut self, now: Duration) -> Option<Duration> {
        self.engine.md.waker().arm();
        let mut completions = mem::take(&mut self.completions);
        self.io.reap(&mut completions);
        for completion in completions.drain(..) {
            self.op_done(completion, now);
        }
        self.completions = completions;
        preempt::point("reaped");
        self.collect_dirtied(now);
        preempt::point("collected");
        self.hear_all(now);
        if self.round.awaits_stable_writes && self.engine.stable_writes.is_old_over() {
            self.round.awaits_stable_writes = false;
            self.count_sync(now);
        }
        preempt::point("heard");
        self.step_control();
        if self.closed {
            return None;
        }
        preempt::point("controlled");
        self.step_growth();
        preempt::point("grown");
        self.step_space(now);
        preempt::point("spaced");
        self.step_reclaim();
        preempt::point("reclaimed");
        self.step_round(now);
        self.queue_backlog();
        self.show();
        self.next_call(now)
    }

    /// Puts where others can see it how things are, and tells of what they should hear.
    fn show(&self) {
        let gauges = &self.engine.gauges;
        let is_host_full = self.space.is_host_full();
        if is_host_full != gauges.is_host_full.swap(is_host_full, Ordering::Relaxed)
            && let Some(notices) = &self.engine.options.notices
        {
            let waits = self.engine.options.on_enospc == OnEnospc::Stop;
            notices.post(match is_host_full {
                true => Notice::HostFull { waits },
                false => Notice::HostHasSpace,
            });
        }
        let (clusters, batches) = self.reclaim.counts();
        for (gauge, value) in [
            (&gauges.parked, self.space.parked()),
            (&gauges.rounds, self.round.number),
            (&gauges.syncs, self.syncs),
            (&gauges.dirty_pages, self.dirty.len() as u64),
            (&gauges.reclaim_clusters, clusters),
            (&gauges.reclaim_batches, batches),
        ] {
            gauge.store(value, Ordering::Relaxed);
        }
    }

    /// Whether the engine was closed: there is nothing to do any more.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether clusters on their way back wait for the write of a page.
    #[cfg(all(test, not(ploop_loom)))]
    pub(crate) fn awaits_pages(&self) -> bool {
        self.reclaim.awaits_pages()
    }

    /// What wakes the thread, beside [`Io::completion_fd`].
    pub(super) fn waker(&self) -> &Waker {
        self.engine.md.waker()
    }

    /// Whether nothing has woken the thread since its last look.
    #[cfg(all(test, not(ploop_loom)))]
    pub(crate) fn is_asleep(&self) -> bool {
        self.waker().is_armed()
    }

    pub(super) fn io(&self) -> &D::Io {
        &self.io
    }

    fn next_call(&self, now: Duration) -> Option<Duration> {
        let has_completions = self.io.completion_fd().is_none() && self.io.in_flight() > 0;
        let can_start = self.round.phase == Phase::Idle && !self.waiters.is_empty();
        if has_completions || can_start {
            return Some(Duration::ZERO);
        }
        let steps = |job: &ControlJob| !matches!(job.stage, ControlStage::Flush);
        let awaits_io = self.reclaim.awaits_io()
            || self.control.front().is_some_and(steps)
            || self.growing.as_ref().is_some_and(Growing::polls);
        let due = (self.round.phase == Phase::Idle)
            .then(|| self.dirty.values().min())
            .flatten()
            .map(|due| (*due).max(self.retry_at));
        let reclaims = self.round.phase == Phase::Idle && self.wants_reclaim_sync();
        let reclaim_due = reclaims.then_some(self.retry_at);
        [
            awaits_io.then_some(GRACE_POLL),
            due.map(|due| due.saturating_sub(now)),
            reclaim_due.map(|due| due.saturating_sub(now)),
            self.space.deadline().map(|at| at.saturating_sub(now)),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn collect_dirtied(&mut self, now: Duration) {
        let due = now + self.engine.options.writeback_delay;
        for page in self.engine.bat.dirty_pages() {
            self.dirty.entry(page).or_insert(due);
        }
    }

    fn hear_all(&mut self, now: Duration) {
        let engine = self.engine.clone();
        for message in engine.md.take_all() {
            self.hear(message, now);
        }
    }

    fn hear(&mut self, message: MdMessage, now: Duration) {
        match message {
            MdMessage::Flush { inbox, request } => {
                let waiter = Waiter::Queue(inbox, request);
                self.waiters_from_now_on().push(waiter);
            }
            MdMessage::Freed { host, page } => self.add_freed(host, page),
            MdMessage::Begin {
                freed,
                moved,
                leaked,
            } => {
                self.reclaim.add_leaked(&leaked);
                for (page, host) in freed {
                    self.add_freed(host, page);
                }
                self.add_moved(moved);
            }
            MdMessage::Dropped { host } => self.reclaim.add_dropped(host),
            MdMessage::Park { pio, full } => self.park(pio, full, now),
            MdMessage::GiveUp { inbox } => {
                let pios = self.space.give_up(&inbox);
                self.try_again(pios);
            }
            // It is looked at when the messages were heard.
            MdMessage::StableWritesEnded => {}
            MdMessage::ErrandDone(result) => self.errand_done(result),
            MdMessage::Moved { host, page } => self.cluster_moved(host, page),
            MdMessage::CopyUp {
                cluster,
                level,
                top,
                outcome,
            } => self.copy_up(cluster, level, top, outcome),
            MdMessage::Control(Control::PrepareGrowth(size), outcome) => {
                self.prepare_growth(size, outcome);
            }
            MdMessage::Control(Control::CommitGrowth, outcome) => self.commit_growth(outcome),
            MdMessage::Control(Control::AbandonGrowth, outcome) => self.abandon_growth(outcome),
            MdMessage::Control(Control::CutTail, outcome) => self.begin_cut(outcome),
            MdMessage::Squeeze { cluster, outcome } => self.begin_squeeze(cluster, outcome),
            MdMessage::MoveDown {
                clusters,
                packing,
                outcome,
            } => self.begin_move_down(clusters, packing, outcome),
            MdMessage::Control(what, outcome) => self.begin_control(what, outcome),
        }
    }

    /// Here and not where it is asked for: nothing may be begun while requests are held.
    fn copy_up(&self, cluster: GuestCluster, level: FileId, top: FileId, outcome: Outcome) {
        let may_begin = match self.closed {
            true => Err(EngineError::Stopped),
            false => self.engine.check_copy_up(top),
        };
        if let Err(error) = may_begin {
            return outcome.set(Err(error));
        }
        let pio = Pio {
            home: Home::of_other(outcome),
            work: Work::CopyUp {
                cluster,
                level,
                top,
            },
            // Who asks waits by himself where there is no space.
            last_try: true,
        };
        self.engine.dispatch(cluster, pio);
    }

    /// Those of the next round: the sync of one under way may have started before what
    /// they wait for (I3).
    fn waiters_from_now_on(&mut self) -> &mut Vec<Waiter> {
        if self.round.phase == Phase::FinalSync && !rule::kept(Rule::FlushSyncIsNew) {
            return &mut self.round.waiters;
        }
        &mut self.waiters
    }

    fn add_freed(&mut self, host: HostCluster, page: u32) {
        let round = self.next_write();
        self.reclaim.add_freed(host, page, round);
    }

    /// The first round whose write of a page surely contains what is in memory now: while
    /// the pages of a round are being written, its write may be without.
    fn next_write(&self) -> RoundNumber {
        let writing = matches!(self.round.phase, Phase::Pages { .. });
        self.round.number + u64::from(writing)
    }

    /// The disk maps these for guest clusters that are elsewhere since.
    fn add_moved(&mut self, moved: Vec<(GuestCluster, HostCluster)>) {
        let round = self.next_write();
        let grid = self.engine.grid();
        let pages = moved.iter().map(|(cluster, _)| grid.md_page(*cluster));
        let pages = pages.map(|page| (page, round)).collect();
        let hosts = moved.iter().map(|(_, host)| host.0).collect();
        // Of I/O none is left: the process has ended.
        self.reclaim.add_moved(hosts, pages, 0);
        // Then these are never punched, nor given out.
        if self.engine.has_sync_failed() {
            self.still_mapped.extend(moved);
        }
    }

    fn queue(&mut self, op: MdOp, io: Op) {
        let tag = self.ops.insert(op) as u64;
        self.backlog.push_back((tag, io));
        self.queue_backlog();
    }

    fn queue_backlog(&mut self) {
        while let Some((tag, op)) = self.backlog.pop_front() {
            if let Err(op) = self.io.queue(tag, op) {
                self.backlog.push_front((tag, op));
                break;
            }
        }
        self.io.submit();
    }

    fn op_done(&mut self, completion: Completion, now: Duration) {
        let result = completion.result;
        match self.ops.remove(completion.tag as usize) {
            MdOp::Pages(pages) => self.pages_written(pages, result, now),
            MdOp::Sync => self.synced(result, now),
            MdOp::Punch { batch, extent } => {
                if let (Err(errno), false) = (result, self.punch_failed) {
                    log::warn!(
                        "cannot punch {} clusters at host cluster {}: {errno}; they are not used again until the image is reopened",
                        extent.len(),
                        extent.start
                    );
                }
                self.punch_failed = result.is_err();
                self.punching -= 1;
                self.reclaim.punched(batch, extent, result.is_ok());
            }
            MdOp::Extend { clusters } => self.extended(clusters, result, now),
            MdOp::Grow => self.growth_op_done(result),
        }
    }
}

// Rounds.
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

    fn step_round(&mut self, now: Duration) {
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
    fn wants_reclaim_sync(&self) -> bool {
        self.reclaim.wants_sync() && !self.engine.has_sync_failed() && self.needs_back()
    }

    fn begin_sync(&mut self, phase: Phase) {
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

    fn synced(&mut self, result: Result<(), Errno>, now: Duration) {
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
    fn count_sync(&mut self, now: Duration) {
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

    fn pages_written(&mut self, pages: Range<u32>, result: Result<(), Errno>, now: Duration) {
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
        }
        if let Phase::Pages { left } = &mut self.round.phase {
            *left -= 1;
            if *left == 0 {
                self.pages_done();
            }
        }
    }

    fn page_failed(&mut self, errno: Errno, now: Duration) {
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

    fn end_round(&mut self, result: Result<(), EngineError>) {
        self.round.phase = Phase::Idle;
        let waiters = mem::take(&mut self.round.waiters);
        self.answer(waiters, result);
    }

    fn answer(&mut self, waiters: Vec<Waiter>, result: Result<(), EngineError>) {
        let unreported = self.unreported;
        for waiter in waiters {
            match waiter {
                Waiter::Queue(inbox, request) => {
                    // All that wait together hear of it, none that comes later.
                    self.unreported = None;
                    let result = result.and(unreported.map_or(Ok(()), Err));
                    inbox.post(QueueMessage::FlushDone { request, result });
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

// Space and reclaim.
impl<D: Disk> MdWriter<D> {
    fn step_reclaim(&mut self) {
        // Who opens an image next that is passed on finds what is left.
        if self.is_closing() || self.leaves_file_alone() {
            return;
        }
        let engine = self.engine.clone();
        if self.reclaim.has_open() && !self.reclaim.awaits_io() {
            self.reclaim.close_batch(engine.epochs.advance());
        }
        let first = match rule::kept(Rule::NoPunchInTheWay) {
            true => engine.alloc().first(),
            false => 0,
        };
        let at_most = HOLE_BYTES >> engine.grid().cluster().shift();
        let at_most = u32::try_from(at_most).unwrap_or(u32::MAX);
        let holes = self
            .reclaim
            .begin_punching(first, at_most, |epoch| engine.epochs.all_reached(epoch));
        self.holes.extend(holes);
        while self.punching < PUNCHES
            && let Some((batch, extent)) = self.holes.pop_front()
        {
            self.punching += 1;
            let shift = engine.grid().cluster().shift();
            let is_punched = rule::kept(Rule::PunchBeforeReuse);
            let clusters = if is_punched { extent.len() } else { 0 };
            let op = Op::Zero {
                file: engine.top(),
                offset: engine.grid().host_offset(HostCluster(extent.start)),
                len: u64::from(clusters) << shift,
                mode: ZeroMode::Punch,
            };
            self.queue(MdOp::Punch { batch, extent }, op);
        }
    }

    fn step_space(&mut self, now: Duration) {
        if self.is_closing() || self.leaves_file_alone() {
            return;
        }
        let pios = self.space.due(now);
        self.try_again(pios);
        if self.engine.alloc().available() > 0 {
            let pios = self.space.waiting_for_clusters();
            self.try_again(pios);
        }
        // Also of those that were given up while nothing could be tried.
        self.fail_hopeless();
        let engine = self.engine.clone();
        if engine.alloc().available() > engine.options.low_water {
            // Who takes of it from now on tells again when it gets low.
            engine.space_is_low.store(false, Ordering::Release);
        }
        // Space that is in the file already comes before more of it.
        if self.reclaim.has_leaked() && !engine.has_sync_failed() {
            return;
        }
        let step = self.extension();
        // Where the file is long enough for the whole disk, growing ahead is over.
        let low_water = engine.options.low_water.min(self.missing());
        // In a raw image it is the holes that lack space: trying again is all.
        if engine.has_bat()
            && let SpaceStep::Extend(clusters) =
                self.space
                    .step(engine.alloc().available(), low_water, step, now)
        {
            self.extend(clusters, now);
        }
    }

    /// By how many clusters the file usually grows.
    fn extension(&self) -> u32 {
        let shift = self.geometry.cluster.shift();
        let step = self.engine.options.preallocation >> shift;
        u32::try_from(step).unwrap_or(u32::MAX).max(1)
    }

    /// How many clusters the file lacks for the whole disk to be mapped.
    fn missing(&self) -> u32 {
        let geometry = &self.geometry;
        // While the disk grows, what lies where its BAT goes maps nothing.
        let first = geometry
            .first_host_cluster()
            .0
            .max(self.engine.alloc().first());
        let in_file = self.engine.alloc().end().saturating_sub(first);
        geometry.entries.saturating_sub(in_file)
    }

    /// Why the file cannot become longer any more, if it cannot.
    fn no_growth(&self) -> Option<EngineError> {
        let engine = &self.engine;
        if engine.alloc().end() >= self.geometry.host_cluster_limit() {
            Some(EngineError::ImageFull)
        } else if engine.has_sync_failed() {
            Some(EngineError::SyncFailed)
        } else {
            None
        }
    }

    /// Whether clusters are on their way back. After a failed sync none will arrive.
    fn can_reclaim(&self) -> bool {
        self.reclaim.is_under_way() && !self.engine.has_sync_failed()
    }

    fn extend(&mut self, clusters: u32, now: Duration) {
        let engine = self.engine.clone();
        self.space.begin_extending(now);
        if let Some(error) = self.no_growth() {
            self.space.extension_ended();
            if !self.can_reclaim() {
                for pio in self.space.take_all() {
                    pio.home.complete(Err(error));
                }
            }
            return;
        }
        let end = engine.alloc().end();
        let room = self.geometry.host_cluster_limit() - end;
        // At least one: some may be on their way through reclaim.
        let clusters = clusters.min(room).min(self.missing().max(1));
        let op = Op::Allocate {
            file: engine.top(),
            offset: self.geometry.host_offset(HostCluster(end)),
            len: u64::from(clusters) << self.geometry.cluster.shift(),
        };
        self.queue(MdOp::Extend { clusters }, op);
    }

    fn extended(&mut self, clusters: u32, result: Result<(), Errno>, now: Duration) {
        match result {
            Ok(()) => {
                self.engine
                    .alloc()
                    .extend(self.engine.alloc().end() + clusters);
                let pios = self.space.extended(clusters, self.extension());
                self.try_again(pios);
            }
            Err(Errno::NOSPC | Errno::DQUOT) => {
                let policy = self.engine.options.on_enospc;
                if self.space.extension_failed(clusters, policy, now) {
                    self.extend(1, now);
                }
            }
            Err(errno) => {
                if !self.engine.has_lost_lock() {
                    log::error!("cannot make the image file longer: {errno}");
                }
                self.space.extension_ended();
                for pio in self.space.take_all() {
                    pio.home.complete(Err(EngineError::Io(errno)));
                }
            }
        }
        self.fail_hopeless();
    }

    fn park(&mut self, pio: Pio, full: bool, now: Duration) {
        if self.closed {
            return pio.home.complete(Err(EngineError::Stopped));
        }
        if !full && self.engine.alloc().available() > 0 {
            return self.try_again([pio]);
        }
        let waits = full || (self.can_reclaim() && !pio.last_try);
        if let Some(error) = self.no_growth().filter(|_| !waits) {
            return pio.home.complete(Err(error));
        }
        let policy = self.engine.options.on_enospc;
        self.space.park(pio, full, policy, now);
        self.fail_hopeless();
    }

    fn fail_hopeless(&mut self) {
        for pio in self.space.take_hopeless() {
            pio.home.complete(Err(EngineError::NoSpace));
        }
    }

    fn try_again(&mut self, pios: impl IntoIterator<Item = Pio>) {
        for pio in pios {
            if self.engine.is_suspended() {
                self.space.keep(pio);
                continue;
            }
            let cluster = pio.work.cluster(self.engine.grid());
            self.engine.dispatch(cluster, pio);
        }
    }
}

// Suspend, resume, close.
impl<D: Disk> MdWriter<D> {
    fn is_closing(&self) -> bool {
        self.closed
            || self.control.front().is_some_and(|job| {
                job.what.is_end() && matches!(job.stage, ControlStage::Flushed(_))
            })
    }

    /// Whether it is to be closed, or has been.
    fn is_ending(&self) -> bool {
        self.is_closing() || (self.control.front()).is_some_and(|job| job.what.is_end())
    }

    /// Whether the file is to be changed by rounds alone: it is about to be somebody else's,
    /// or nobody's.
    fn leaves_file_alone(&self) -> bool {
        let job = self.control.front();
        self.is_top_closed || job.is_some_and(|job| job.what.leaves_file_alone())
    }

    /// Whether anything but a round changes the file, which no sync of a round waits for.
    fn is_changing_the_file(&self) -> bool {
        let is_of_round = |op: &MdOp| matches!(op, MdOp::Pages(_) | MdOp::Sync);
        self.growing.is_some() || !self.ops.iter().all(|(_, op)| is_of_round(op))
    }

    fn begin_control(&mut self, what: Control, outcome: Outcome) {
        if self.closed {
            return outcome.set(Err(EngineError::Stopped));
        }
        self.control.push_back(ControlJob {
            what,
            outcome,
            stage: ControlStage::Grace(0),
        });
        if self.control.len() == 1 {
            self.start_control();
        }
    }

    fn start_control(&mut self) {
        let what = self.control.front().map(|job| job.what);
        if what == Some(Control::CloseTop)
            && let Err(error) = self.check_may_close_top()
        {
            return self.end_control(Err(error));
        }
        let Some(job) = self.control.front_mut() else {
            return;
        };
        self.is_paused |= job.what == Control::Suspend;
        let holds = match job.what {
            Control::Suspend => true,
            what if what.is_end() => true,
            Control::CloseTop => rule::kept(Rule::HeldForNewTop),
            _ => false,
        };
        if holds {
            self.engine.set_suspended(true);
        }
        job.stage = ControlStage::Grace(self.engine.epochs.advance());
    }

    fn step_control(&mut self) {
        // What ends after the sync of an image that is passed on, or is not the top any more, is
        // not as stable as its mark.
        let is_changing = self.leaves_file_alone() && self.is_changing_the_file();
        let may_change_top = self.may_change_top();
        let Some(job) = self.control.front_mut() else {
            return;
        };
        match job.stage {
            _ if job.what == Control::Resume => {
                self.is_paused = false;
                self.go_on(Ok(()));
            }
            _ if matches!(job.what, Control::SwitchTop | Control::KeepTop) => {
                if may_change_top {
                    let is_new = job.what == Control::SwitchTop;
                    self.end_hold(is_new);
                }
            }
            ControlStage::Grace(epoch) => {
                // In this order: a queue that has not seen the suspension yet may
                // dispatch a pio until it leaves its epoch.
                let awaits_io =
                    job.what != Control::Barrier || rule::kept(Rule::ReadsEndBeforeFileGoes);
                let is_quiet = (self.engine.epochs.all_reached(epoch) || !awaits_io)
                    && !is_changing
                    && (job.what == Control::Barrier
                        || (self.engine.dispatched.load(Ordering::Acquire) == 0
                            && !self.growing.as_ref().is_some_and(Growing::has_locked)));
                if is_quiet && job.what == Control::CloseTop {
                    if may_change_top {
                        self.flush_top();
                    }
                } else if is_quiet && job.what == (Control::HandOver { trims: false }) {
                    if may_change_top {
                        self.flush_in_haste();
                    }
                } else if is_quiet {
                    job.stage = ControlStage::Flush;
                    self.waiters.push(Waiter::Control);
                }
            }
            ControlStage::Flush => {}
            ControlStage::Flushed(Err(error)) if job.what.can_go_on() => {
                self.go_on(Err(error));
            }
            ControlStage::Flushed(Ok(())) if job.what == Control::CloseTop => {
                if !self.ops.is_empty() {
                    return;
                }
                match self.close_top() {
                    Ok(()) => self.end_control(Ok(())),
                    Err(error) => {
                        // Said before, if it went wrong.
                        let _ = self.keep_top();
                        self.go_on(Err(error));
                    }
                }
            }
            ControlStage::Flushed(_) if let Control::HandOver { trims } = job.what => {
                if self.ops.is_empty() {
                    self.hand_over(trims);
                }
            }
            ControlStage::Flushed(result) if matches!(job.what, Control::Close | Control::Pass) => {
                let is_passed = job.what == Control::Pass;
                // Holes being punched and space being added must be over before
                // the tail is cut, or somebody else has the file.
                if self.ops.is_empty() {
                    let result = result.and_then(|()| self.close_file(is_passed));
                    self.closed = true;
                    let job = self.control.pop_front();
                    self.dismiss();
                    // Last: who hears of it finds an engine that has ended.
                    if let Some(job) = job {
                        job.outcome.set(result);
                    }
                }
            }
            ControlStage::Flushed(result) => self.end_control(result),
        }
    }

    /// There is a new top, or the old one is kept.
    fn end_hold(&mut self, is_new: bool) {
        if !self.is_top_closed {
            return self.end_control(Err(EngineError::TopInUse));
        }
        let switched = is_new.then(|| self.switch_top());
        let result = match switched {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => self.keep_top().and(Err(error)),
            None => self.keep_top(),
        };
        self.go_on(result);
    }

    /// Requests are taken again, unless somebody else wants them held.
    fn go_on(&mut self, result: Result<(), EngineError>) {
        if !self.is_paused && !self.is_top_closed {
            self.engine.end_suspension();
            let pios = self.space.take_all();
            self.try_again(pios);
        }
        self.end_control(result);
    }

    fn end_control(&mut self, result: Result<(), EngineError>) {
        if let Some(job) = self.control.pop_front() {
            job.outcome.set(result);
        }
        self.start_control();
    }

    /// Nothing that waits now will get what it waits for.
    fn dismiss(&mut self) {
        self.fail_hopeless();
        for pio in self.space.take_all() {
            pio.home.complete(Err(EngineError::Stopped));
        }
        let waiters = mem::take(&mut self.waiters);
        self.answer(waiters, Err(EngineError::Stopped));
        for job in mem::take(&mut self.control) {
            job.outcome.set(Err(EngineError::Stopped));
        }
        self.fail_growth(EngineError::Stopped);
        self.engine.end_md();
    }

    /// Gives back the space behind the last mapped cluster and marks the image as
    /// closed, last and after a sync (I12). Everything is flushed, so what the
    /// disk maps is what memory maps; for a raw image that is all.
    ///
    /// One that is passed on is marked after the sync of that flush, and nothing else: before
    /// the next one changes anything, it makes its own mark, in the same sector, and syncs
    /// that. Until then either mark is true. The name of the opening stays where there is a
    /// mark, which comes before it: to change it would have the next sync wait for a journal.
    fn close_file(&mut self, is_passed: bool) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        if engine.is_read_only() {
            return Ok(());
        }
        if engine.has_sync_failed() {
            return Err(EngineError::SyncFailed);
        }
        if engine.awaits_take_over() {
            // Nobody has come, and a guest may yet that was told of writes which are not in
            // the image: the next process has to see that, too.
            return Ok(());
        }
        engine.note_settled();
        if self.is_top_closed {
            return Ok(());
        }
        let Some(metadata) = &mut self.metadata else {
            engine.forget_opening();
            return Ok(());
        };
        let top = engine.top();
        let bitmaps = engine.all_bitmaps();
        let disk = &engine.disk;
        if is_passed {
            let end = HostCluster(engine.alloc().end());
            let extension = save_bitmaps(disk, top, &self.geometry, (&bitmaps, end));
            if extension.is_some() && rule::kept(Rule::BitmapsBeforeMark) {
                disk.sync(top).map_err(cannot_mark)?;
            }
            return mark_closed(disk, top, &mut metadata.header, extension).map_err(cannot_mark);
        }
        let end = used_end(&engine, &self.geometry);
        cut_and_mark(disk, top, (end, &bitmaps), &mut metadata.header).map_err(cannot_mark)?;
        engine.forget_opening();
        Ok(())
    }
}

/// One behind the last cluster that the top has. Nothing changes that meanwhile.
fn used_end<D: Disk>(engine: &Engine<D>, geometry: &Geometry) -> HostCluster {
    let top = engine.top();
    let ends = engine.bat.iter().filter_map(|entry| match entry.place() {
        Place::In(file, host) if file == top => Some(host.0 + 1),
        _ => None,
    });
    HostCluster(ends.max().unwrap_or(geometry.first_host_cluster().0))
}

fn cannot_mark(error: io::Error) -> EngineError {
    log::error!("cannot mark the image as closed: {error}");
    EngineError::Io(errno_of(&error))
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn cut_and_mark(
    disk: &impl Disk,
    top: FileId,
    (end, bitmaps): (HostCluster, &[Bitmap]),
    header: &mut Header,
) -> io::Result<()> {
    let geometry = *header.geometry();
    let len = geometry.host_offset(end);
    if disk.len(top)? > len {
        disk.set_len(top, len)?;
    }
    let extension = save_bitmaps(disk, top, &geometry, (bitmaps, end));
    let is_synced = extension.is_none() || rule::kept(Rule::BitmapsBeforeMark);
    if is_synced && rule::kept(Rule::SyncBeforeMark) {
        disk.sync(top)?;
    }
    mark_closed(disk, top, header, extension)?;
    preempt::point("mark written");
    disk.sync(top)
}

/// Those that are persistent, behind all else. Where the extension is, if there is one now.
fn save_bitmaps(
    disk: &impl Disk,
    top: FileId,
    geometry: &Geometry,
    bitmaps: (&[Bitmap], HostCluster),
) -> Option<Sector> {
    saved::save(disk, top, geometry, bitmaps)?.extension
}

fn mark_closed(
    disk: &impl Disk,
    top: FileId,
    header: &mut Header,
    extension: Option<Sector>,
) -> io::Result<()> {
    header.in_use = match extension {
        Some(_) => InUse::ClosedWithExtension,
        None => InUse::Closed,
    };
    header.extension = extension.unwrap_or(Sector(0));
    disk.write_all_at(top, &header.to_bytes(), 0)
}
