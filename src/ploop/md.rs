//! The metadata thread: everything about the image that is not one pio's business.
//!
//! - writeback of dirty md pages, after their delay or when somebody waits, and flush: all
//!   waiting ones share one round, whose sync starts after them ([`round`]);
//! - the way of unmapped clusters back to the allocator ([`reclaim`]);
//! - growing the file, and the pios that wait for space ([`space`]);
//! - what a larger disk takes ([`grow`]), and a new top ([`top`]);
//! - what a shorter file takes ([`compact`]);
//! - suspend and resume ([`control`]), [`close`], and what [`hand_over`] is.
//!
//! Here is what they share, and the loop that gives each its turn.

mod close;
mod compact;
mod control;
mod grow;
mod hand_over;
mod reclaim;
mod round;
mod space;
mod top;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use slab::Slab;

use self::control::{ControlJob, ControlStage};
use self::grow::Growing;
use self::reclaim::{Reclaim, RoundNumber};
use self::round::{Covered, Phase, Round};
use self::space::Space;
use super::EngineError;
use super::alloc::Extent;
use super::control::{Control, Outcome};
use super::engine::{Engine, MdMessage};
use super::entry::Entry;
use super::inbox::{Inbox, Waker};
use super::options::OnEnospc;
use super::pio::{Home, Pio, QueueMessage, Work};
use super::preempt;
use super::rule::{self, Rule};
use crate::format::{Geometry, GuestCluster, Header, HostCluster};
use crate::notices::Notice;
use crate::storage::{Completion, Disk, FileId, Io, Op};

/// Operations that the thread keeps in flight.
const DEPTH: u32 = 64;

/// How often it looks whether older I/O is over, while somebody waits for that.
const GRACE_POLL: Duration = Duration::from_millis(1);

/// What of the file the metadata thread alone writes.
pub(super) struct Metadata {
    pub header: Header,
    /// What follows the last entry of the BAT, up to the end of its md page or to
    /// the first data, whichever comes first.
    pub bat_tail: Vec<u8>,
}

/// Who waits for a round.
enum Waiter {
    Queue(Flush),
    Control,
    Growth,
}

/// A queue's.
struct Flush {
    inbox: Arc<Inbox<QueueMessage>>,
    request: usize,
    /// If there is no space for the pages it fails.
    last_try: bool,
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
                lacks_space: false,
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
                let waiter = Waiter::Queue(Flush {
                    inbox,
                    request,
                    last_try: false,
                });
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
                let flushes = self.space.give_up_flushes(&inbox);
                self.waiters.extend(flushes.into_iter().map(Waiter::Queue));
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
