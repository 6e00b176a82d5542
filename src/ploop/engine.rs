//! What all threads of the engine share.
//!
//! Holds the mapping, the space, the epochs and the inboxes, and the plans that
//! follow from them. Does no I/O: whoever made a plan carries it out on its own
//! ring, outside any lock.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use crossbeam_utils::CachePadded;

use super::EngineError;
use super::alloc::{Allocator, Extent};
use super::allowance;
use super::bat::{Bat, BatSize};
use super::control::{Control, Outcome};
use super::entry::{Entry, Place};
use super::epoch::Epochs;
use super::inbox::Inbox;
use super::levels::{Level, LevelMap, Levels};
use super::options::{OnEnospc, OnLockLoss, Options};
use super::pio::{Pio, QueueMessage, Work};
use super::preempt;
use super::queue::Queue;
use super::remembered::Remembered;
use super::report::{EngineReport, Gauges};
use super::rule::{self, Rule};
use super::shape::LevelShape;
use super::stable_writes::{Generation, StableWrites};
use super::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
use super::take_over::Beginning;
use super::tracking::{Bitmap, Tracking};
use crate::format::{
    ClusterSize, Geometry, GuestCluster, Header, HostCluster, InUse, Packing, Sector,
};
use crate::storage::{Disk, FileId, LockStanding, Segments};

/// What a change has to wait for before it completes.
mod before_end {
    /// Until it is stable: the write cache is off.
    pub const STABLE: u8 = 1;
    /// For ever: the lock on the image is lost.
    pub const NEVER: u8 = 2;
}

/// How many neighbouring clusters meet the same runner: a large discard goes to
/// few runners in few pios, and neighbours still spread over all runners.
const RUNNER_GROUP: u32 = 64;

/// One open disk. Shared by all threads that serve it.
pub struct Engine<D: Disk> {
    pub(super) disk: D,
    pub(super) levels: Levels,
    pub(super) bat: Bat,
    /// Of the top. What of it the ways of requests need is in [`Grid`] and in
    /// [`Self::disk_size`].
    geometry: Mutex<Geometry>,
    /// Of the guest's disk, in sectors. It only grows, when there is all that takes.
    disk_size: CachePadded<AtomicU64>,
    pub(super) epochs: Arc<Epochs>,
    /// What the queues share of the work that may be under way.
    pub(super) allowance: Arc<allowance::Shared>,
    pub(super) runners: Vec<Arc<Inbox<Pio>>>,
    pub(super) md: Arc<Inbox<MdMessage>>,
    pub(super) options: Options,
    /// A power of two: what the offset and length of a write must be multiples of.
    write_alignment: u32,
    /// What was changed, for whoever wants to know.
    pub(super) tracking: Tracking,
    /// See [`Disk::has_stable_writes`].
    has_stable_writes: bool,
    /// What a change has to wait for before it completes: bits of [`before_end`].
    before_end: AtomicU8,
    suspended: AtomicBool,
    /// The metadata thread has ended.
    closed: AtomicBool,
    /// A sync failed: nothing becomes stable any more (I7).
    sync_failed: AtomicBool,
    /// Those of queues.
    pub(super) stable_writes: CachePadded<StableWrites>,
    /// [`Epochs::completed`] at the start of the last good sync that covered the
    /// mapping too.
    covered: CachePadded<AtomicU64>,
    /// How often the write cache was to be turned off, how often it was, and how often
    /// everything from before was made stable.
    barriers: AtomicU64,
    barriers_up: AtomicU64,
    barriers_ended: AtomicU64,
    /// Pios on their way through runners; parked ones do not count.
    pub(super) dispatched: AtomicUsize,
    /// The metadata thread was woken because of [`Options::low_water`].
    pub(super) space_is_low: AtomicBool,
    /// What outlives the process, while there is something to keep it in.
    pub(super) remembered: ArcSwapOption<Remembered>,
    /// Locked by who begins and who is asked whether anybody has.
    pub(super) beginning: Mutex<Beginning>,
    /// The top is closed, and requests are held, until there is a new one. Changed under
    /// the lock of [`Self::beginning`].
    pub(super) switching: AtomicBool,
    /// What [`Control::SwitchTop`] is about.
    pub(super) new_top: Mutex<Option<Header>>,
    pub(super) gauges: Gauges,
    /// Of the queues, to tell them that requests are taken again.
    inboxes: Mutex<Vec<Weak<Inbox<QueueMessage>>>>,
    #[cfg(test)]
    abandoned: AtomicBool,
}

/// What an engine starts from.
pub(super) struct Shared {
    pub bitmaps: Vec<Bitmap>,
    pub levels: Vec<LevelMap>,
    pub bat: Bat,
    pub alloc: Allocator,
    pub beginning: Beginning,
}

/// What of the top's geometry stays as it is however the disk grows.
#[derive(Clone, Copy)]
pub(super) struct Grid<'a>(&'a Geometry);

impl Grid<'_> {
    /// The unit of the mapping.
    pub fn cluster(self) -> ClusterSize {
        self.0.cluster
    }

    /// As [`Geometry::cluster_start`].
    pub fn cluster_start(self, cluster: GuestCluster) -> u64 {
        self.0.cluster_start(cluster)
    }

    /// As [`Geometry::md_page`].
    pub fn md_page(self, cluster: GuestCluster) -> u32 {
        self.0.md_page(cluster)
    }

    /// As [`Geometry::host_offset`].
    pub fn host_offset(self, cluster: HostCluster) -> u64 {
        self.0.host_offset(cluster)
    }

    /// As [`Geometry::bat_value`].
    pub fn bat_value(self, cluster: HostCluster) -> u32 {
        self.0.bat_value(cluster)
    }
}

/// What the metadata thread is told.
pub(super) enum MdMessage {
    /// A flush, to be answered in the queue's inbox.
    Flush {
        inbox: Arc<Inbox<QueueMessage>>,
        request: usize,
    },
    /// A cluster was unmapped; posted before its md page is marked dirty.
    Freed { host: HostCluster, page: u32 },
    /// What the disk does not map is known: clusters that a lost process has unmapped,
    /// with their md pages, those that the disk maps for a guest cluster that such a
    /// process had mapped elsewhere, and those that nothing maps.
    Begin {
        freed: Vec<(u32, HostCluster)>,
        moved: Vec<(GuestCluster, HostCluster)>,
        leaked: Vec<Extent>,
    },
    /// Clusters were given out and then not used, but may have been written to.
    Dropped { host: HostCluster },
    /// A pio that needs space; `full` if the host answered that there is none.
    Park { pio: Pio, full: bool },
    /// Parked pios of this queue get one more try, then fail.
    GiveUp { inbox: Arc<Inbox<QueueMessage>> },
    /// The last one of a generation that a round waits for; see [`StableWrites`].
    StableWritesEnded,
    /// What it had dispatched for a growth has been done; see `Work`.
    ErrandDone(Result<(), EngineError>),
    /// The cluster is to be copied from this level into the top, if that is the same then.
    CopyUp {
        cluster: GuestCluster,
        level: FileId,
        top: FileId,
        outcome: Outcome,
    },
    /// For a growth a cluster has moved from here. The disk does not know of it before this
    /// md page is written.
    Moved { host: HostCluster, page: u32 },
    /// The zeros of a cluster are to be given back.
    Squeeze {
        cluster: GuestCluster,
        outcome: Outcome,
    },
    /// Clusters are to move in front of where the file would end without gaps.
    MoveDown {
        clusters: Vec<GuestCluster>,
        packing: Packing,
        outcome: Outcome,
    },
    /// From the control thread.
    Control(Control, Outcome),
}

impl MdMessage {
    /// Nobody will do what it asks for.
    fn turn_down(self) {
        let result = Err(EngineError::Stopped);
        match self {
            Self::Flush { inbox, request } => {
                inbox.post(QueueMessage::FlushDone { request, result });
            }
            Self::Park { pio, .. } => pio.home.complete(result),
            Self::Control(_, outcome)
            | Self::CopyUp { outcome, .. }
            | Self::Squeeze { outcome, .. }
            | Self::MoveDown { outcome, .. } => outcome.set(result),
            Self::Freed { .. }
            | Self::Begin { .. }
            | Self::Dropped { .. }
            | Self::GiveUp { .. }
            | Self::ErrandDone(_)
            | Self::Moved { .. }
            | Self::StableWritesEnded => {}
        }
    }
}

/// What to do for a write inside one cluster.
pub(super) enum WritePlan {
    /// Write there. `on_disk`: the mapping is stable on disk already.
    At { offset: u64, on_disk: bool },
    /// Zeros into a hole: nothing. `on_disk`: the disk knows of the hole.
    Nothing { on_disk: bool },
    /// The cluster's runner has to do it.
    Runner,
    /// There is no space at hand.
    Space,
}

impl<D: Disk> Engine<D> {
    pub(super) fn new(disk: D, shared: Shared, options: Options) -> io::Result<Self> {
        let Shared {
            bitmaps,
            levels,
            bat,
            alloc,
            beginning,
        } = shared;
        let runners = (0..options.runners)
            .map(|_| Ok(Arc::new(Inbox::new()?)))
            .collect::<io::Result<_>>()?;
        let write_alignment = disk.write_alignment();
        let has_stable_writes = disk.has_stable_writes();
        let levels = Levels::new(levels, alloc);
        let geometry = *levels.top().geometry();
        let engine = Self {
            disk,
            levels,
            bat,
            geometry: Mutex::new(geometry),
            disk_size: CachePadded::new(AtomicU64::new(geometry.disk_size.0)),
            epochs: Arc::new(Epochs::new(options.max_queues + options.runners)),
            allowance: Arc::new(allowance::Shared::new()),
            runners,
            md: Arc::new(Inbox::new()?),
            options,
            write_alignment,
            tracking: Tracking::new(write_alignment),
            has_stable_writes,
            before_end: AtomicU8::new(0),
            suspended: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            sync_failed: AtomicBool::new(false),
            stable_writes: CachePadded::default(),
            covered: CachePadded::new(AtomicU64::new(0)),
            barriers: AtomicU64::new(0),
            barriers_up: AtomicU64::new(0),
            barriers_ended: AtomicU64::new(0),
            dispatched: AtomicUsize::new(0),
            space_is_low: AtomicBool::new(false),
            remembered: ArcSwapOption::empty(),
            beginning: Mutex::new(beginning),
            switching: AtomicBool::new(false),
            new_top: Mutex::default(),
            gauges: Gauges::default(),
            inboxes: Mutex::default(),
            #[cfg(test)]
            abandoned: AtomicBool::new(false),
        };
        engine.have_bitmaps(bitmaps);
        engine.check_old_use();
        Ok(engine)
    }

    /// Of the top delta, as it is now.
    pub fn geometry(&self) -> Geometry {
        *self.lock_geometry()
    }

    /// Held by who changes it, or what must be as large as it says.
    pub(super) fn lock_geometry(&self) -> MutexGuard<'_, Geometry> {
        self.geometry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of the top's geometry never changes.
    pub(super) fn grid(&self) -> Grid<'_> {
        Grid(self.levels.top().geometry())
    }

    /// Of the guest's disk.
    pub fn disk_size(&self) -> Sector {
        Sector(self.disk_size.load(Ordering::Acquire))
    }

    /// The disk has become larger, and all is ready for it.
    pub(super) fn set_disk_size(&self, size: Sector) {
        self.disk_size.store(size.0, Ordering::Release);
    }

    /// Whether the disk can become one of this geometry while it is served.
    pub(super) fn has_room_for(&self, geometry: &Geometry) -> bool {
        self.bat.can_hold(BatSize::of(geometry))
    }

    /// What the disk lies in.
    pub fn disk(&self) -> &D {
        &self.disk
    }

    /// The levels of the chain, base first. Of the top the geometry is as the file was opened.
    pub fn level_shapes(&self) -> impl Iterator<Item = LevelShape> {
        let levels = self.levels.iter().enumerate();
        let levels = levels.filter(|(_, level)| !level.is_dropped());
        levels.map(|(index, level)| LevelShape {
            file: FileId(index as u8),
            geometry: Geometry {
                disk_size: level.disk_size(),
                ..*level.geometry()
            },
            is_ploop: !level.is_plain(),
        })
    }

    /// How it is doing.
    pub fn report(&self) -> EngineReport {
        let mut report = EngineReport {
            runners: self.runners.len(),
            dispatched: self.dispatched.load(Ordering::Relaxed),
            has_sync_failed: self.has_sync_failed(),
            lock: self.disk.lock_standing(),
            is_suspended: self.is_suspended(),
            is_write_through: self.is_write_through(),
            clusters_available: self.alloc().available(),
            epoch: self.epochs.current(),
            changes: self.epochs.completed(),
            ..EngineReport::default()
        };
        self.gauges.fill(&mut report);
        report.waits_for_space = report.is_host_full && self.options.on_enospc == OnEnospc::Stop;
        report
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// Whether the top is a raw image.
    pub fn is_raw(&self) -> bool {
        !self.has_bat()
    }

    /// The unit in bytes in which discards give space back.
    pub fn zero_granularity(&self) -> u32 {
        self.disk.zero_granularity()
    }

    /// A new submitter, for one thread.
    ///
    /// # Errors
    /// When its ring cannot be made, or there are more than
    /// [`Options::max_queues`] at a time.
    pub fn queue(self: &Arc<Self>) -> io::Result<Queue<D>> {
        Queue::new(self.clone())
    }

    /// What writes to a top of this geometry will be multiples of, in bytes.
    pub(crate) fn alignment_for(&self, geometry: &Geometry) -> u32 {
        match geometry
            .data_start
            .is_multiple_of(u64::from(self.write_alignment))
        {
            true => self.write_alignment,
            false => 1,
        }
    }

    pub(super) fn write_alignment(&self) -> u32 {
        self.write_alignment
    }

    pub(super) fn top(&self) -> FileId {
        self.levels.top_id()
    }

    /// Of the top.
    pub(super) fn alloc(&self) -> &Allocator {
        self.levels.alloc()
    }

    /// Whether the top has a BAT. A raw one has none: all of its clusters are
    /// mapped, each to itself, and stay so. Then nothing is allocated or unmapped,
    /// no md page is ever dirty, and there is no mark and no tail.
    pub(super) fn has_bat(&self) -> bool {
        !self.levels.top().is_plain()
    }

    /// Whether a cluster that becomes a hole reads as zeros, and its space comes
    /// back: there is a BAT to say so, and nothing below that would show.
    pub(super) fn can_unmap(&self) -> bool {
        self.has_bat() && self.levels.len() == 1
    }

    /// Whether clusters of the top may be copies.
    pub(super) fn has_lower_levels(&self) -> bool {
        self.levels.len() > 1
    }

    pub(super) fn level(&self, file: FileId) -> &Level {
        self.levels.get(file)
    }

    pub(super) fn runner(&self, cluster: GuestCluster) -> &Inbox<Pio> {
        &self.runners[(cluster.0 / RUNNER_GROUP) as usize % self.runners.len()]
    }

    /// How many bytes, from byte `start` of the disk on, belong to one runner.
    pub(super) fn runner_span(&self, start: u64) -> u64 {
        let group = u64::from(RUNNER_GROUP) << self.grid().cluster().shift();
        group - start % group
    }

    pub(super) fn dispatch(&self, cluster: GuestCluster, pio: Pio) {
        self.dispatched.fetch_add(1, Ordering::AcqRel);
        preempt::point("dispatching");
        self.runner(cluster).post(pio);
    }

    pub(super) fn park(&self, pio: Pio, full: bool) {
        self.ask_md(MdMessage::Park { pio, full });
    }

    pub(super) fn is_write_through(&self) -> bool {
        self.before_end.load(Ordering::Acquire) & before_end::STABLE != 0
    }

    /// Whether a change completes when its I/O has ended. If not, it is to be asked why.
    pub(super) fn ends_at_once(&self) -> bool {
        self.before_end.load(Ordering::Acquire) == 0
    }

    /// Whether the lock on the image is gone. Who finds it out first tells all others.
    #[cold]
    pub(crate) fn has_lost_lock(&self) -> bool {
        if self.before_end.load(Ordering::Acquire) & before_end::NEVER != 0 {
            return true;
        }
        let is_lost = self.disk.lock_standing() == LockStanding::Lost;
        if is_lost {
            self.lose_lock();
        }
        is_lost
    }

    /// The lock on the image is gone: nobody is served any more, and nothing becomes stable.
    /// To be called once more a while later: what a thread was about to tell its guest of has
    /// been told by then.
    pub fn lose_lock(&self) {
        self.before_end
            .fetch_or(before_end::NEVER, Ordering::AcqRel);
        // Requests that come wait, or are refused by who would take them.
        self.set_suspended(true);
        self.sync_failed.store(true, Ordering::Release);
        self.note_loss();
    }

    /// A guest that goes on with another process must know that what it was told is written
    /// may be lost, unless all of it is stable.
    fn note_loss(&self) {
        if !self.is_covered() && !self.is_read_only() {
            self.note_failed_sync();
        }
    }

    /// Whether requests wait for a lock that is lost, or may be.
    pub fn is_locked_out(&self) -> bool {
        self.options.on_lock_loss == OnLockLoss::Stop
            && (self.disk.lock_standing() == LockStanding::InDoubt || self.has_lost_lock())
    }

    /// Whether requests fail since the lock is lost. Else they wait.
    pub(super) fn reports_loss(&self) -> bool {
        self.options.on_lock_loss == OnLockLoss::Report && self.has_lost_lock()
    }

    /// Whether what is mapped on disk is to be written and made stable at once.
    pub(super) fn wants_stable_write(&self) -> bool {
        self.is_write_through() && self.has_stable_writes
    }

    /// How often the write cache was turned off. Whoever saw the old mode before such a
    /// time had all its I/O behind it.
    pub(super) fn barriers_up(&self) -> u64 {
        self.barriers_up.load(Ordering::Acquire)
    }

    /// A round that started when there were so many up has made everything stable.
    pub(super) fn end_barrier(&self, barriers: u64) {
        self.barriers_ended.fetch_max(barriers, Ordering::AcqRel);
    }

    /// Whether something from before the write cache was turned off may not be
    /// stable: the flush of that moment is not over, or has failed. Until one
    /// succeeds, no write takes the short way.
    pub(super) fn is_barrier_open(&self) -> bool {
        self.barriers_ended.load(Ordering::Acquire) < self.barriers.load(Ordering::Acquire)
    }

    pub(crate) fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Acquire)
    }

    pub(super) fn set_suspended(&self, on: bool) {
        self.suspended.store(on, Ordering::Release);
    }

    /// A queue wants to hear of the end of a suspension.
    pub(super) fn add_inbox(&self, inbox: &Arc<Inbox<QueueMessage>>) {
        let mut inboxes = self.inboxes.lock().unwrap_or_else(PoisonError::into_inner);
        inboxes.retain(|inbox| inbox.strong_count() > 0);
        inboxes.push(Arc::downgrade(inbox));
    }

    /// Takes requests again.
    pub(super) fn end_suspension(&self) {
        if self.has_lost_lock() {
            return;
        }
        self.set_suspended(false);
        if self.has_lost_lock() {
            // In between.
            return self.set_suspended(true);
        }
        let inboxes = self.inboxes.lock().unwrap_or_else(PoisonError::into_inner);
        for inbox in inboxes.iter().filter_map(Weak::upgrade) {
            inbox.post(QueueMessage::Resumed);
        }
    }

    pub(super) fn has_sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire) && rule::kept(Rule::FailedSyncIsKept)
    }

    /// From now on nothing can be called stable. `what` has failed.
    pub(super) fn set_sync_failed(&self, what: &str) {
        if self.has_lost_lock() {
            // It was refused. What is lost by that was told when the lock was.
            return self.note_loss();
        }
        // First: whoever fails because of it tells the guest.
        self.note_failed_sync();
        if !self.sync_failed.swap(true, Ordering::AcqRel) {
            log::error!("{what} has failed; flushes fail until the image is opened again");
        }
        // Memory that was given to us in between was not told.
        self.note_failed_sync();
    }

    /// A stable write is about to be submitted; no sync counts until
    /// [`Self::end_stable_write`].
    pub(super) fn begin_stable_write(&self) -> Generation {
        self.stable_writes.begin(|| self.tell_of_stable_writes())
    }

    /// The outcome of a stable write is known; if its sync has failed,
    /// [`Self::set_sync_failed`] was called before.
    pub(super) fn end_stable_write(&self, generation: Generation) {
        self.stable_writes
            .end(generation, || self.tell_of_stable_writes());
    }

    fn tell_of_stable_writes(&self) {
        self.md.post(MdMessage::StableWritesEnded);
    }

    /// Whether a flush has nothing to do: no changing request has completed since
    /// the start of the last good sync.
    pub(super) fn is_covered(&self) -> bool {
        self.covered.load(Ordering::Acquire) == self.epochs.completed()
    }

    pub(super) fn set_covered(&self, completed: u64) {
        self.covered.store(completed, Ordering::Release);
    }

    /// The next flush has to go to the metadata thread, whatever has completed.
    pub(super) fn uncover(&self) {
        self.set_covered(u64::MAX);
    }

    /// The entry of a cluster, for a request that relies on it: from then on a
    /// flush of the client covers the entry, even if whoever changed it has not
    /// come to marking its page dirty.
    pub(super) fn rely_on(&self, cluster: GuestCluster) -> Entry {
        let entry = self.bat.get(cluster);
        preempt::point("looked up");
        if entry.is_unmarked() && rule::kept(Rule::MarkForOthers) {
            self.note_change(cluster, entry);
            preempt::point("noted");
            self.mark_dirty(cluster);
        }
        entry
    }

    /// What a write inside a cluster takes. To be called, and carried out, inside
    /// an epoch. May map the cluster: then other threads see it at once, though
    /// nothing is written yet, as the new cluster reads as zeros (I2).
    pub(super) fn plan_write(
        &self,
        cluster: GuestCluster,
        offset: u32,
        data: &Segments,
    ) -> WritePlan {
        let (align, is_tracked) = self.tracking.terms();
        if is_tracked {
            let start = self.grid().cluster_start(cluster) + u64::from(offset);
            self.tracking.mark(start, data.len() as u64);
        }
        if (offset as usize | data.len()) & align as usize != 0 {
            return WritePlan::Runner;
        }
        loop {
            let entry = self.rely_on(cluster);
            if entry.is_locked() {
                return WritePlan::Runner;
            }
            let at = |file: FileId, host, on_disk: bool| {
                if !on_disk && self.is_write_through() {
                    // The write will wait for its mapping.
                    self.bat.mark_urgent(self.grid().md_page(cluster));
                }
                WritePlan::At {
                    offset: self.level(file).offset(host) + u64::from(offset),
                    on_disk,
                }
            };
            match entry.place() {
                Place::In(file, host) if file == self.top() => {
                    return at(file, host, !entry.is_changed());
                }
                Place::In(..) => return WritePlan::Runner,
                Place::Hole if data.is_zero() => {
                    return WritePlan::Nothing {
                        on_disk: !entry.is_changed(),
                    };
                }
                Place::Hole => {
                    let Some(host) = self.allocate() else {
                        return WritePlan::Space;
                    };
                    if self.change(cluster, entry, Entry::mapped(self.top(), host)) {
                        return at(self.top(), host, false);
                    }
                    self.put_back(host);
                }
            }
        }
    }

    /// A cluster that reads as zeros and is mapped nowhere.
    pub(super) fn allocate(&self) -> Option<HostCluster> {
        let host = self.take_cluster();
        preempt::point("allocated");
        let low = self.alloc().available() <= self.options.low_water;
        if low && !self.space_is_low.swap(true, Ordering::AcqRel) {
            self.md.waker().wake();
        }
        host
    }

    /// One of those that are there; whoever may take the last has [others](Self::allocate)
    /// made.
    pub(super) fn take_cluster(&self) -> Option<HostCluster> {
        let host = self.alloc().take()?;
        self.check_write_threshold(host);
        Some(host)
    }

    /// This cluster of the top's file is used from now on.
    pub(super) fn check_write_threshold(&self, host: HostCluster) {
        let end = self.grid().host_offset(host) + self.grid().cluster().bytes();
        self.options.write_threshold.check(end);
    }

    /// Whoever it was made for is told once when something behind this place in the file of
    /// the top is used, which a raw image always is; at once, if it is so already. 0 is none.
    pub fn set_write_threshold(&self, bytes: u64) {
        self.options.write_threshold.set(bytes);
        self.check_old_use();
    }

    /// Where that is; 0 if it is nowhere, or was told of.
    pub fn write_threshold(&self) -> u64 {
        self.options.write_threshold.bytes()
    }

    fn check_old_use(&self) {
        if self.has_bat()
            && let Some(last) = self.alloc().used_end().checked_sub(1)
        {
            self.check_write_threshold(HostCluster(last));
        }
    }

    /// Gives back a cluster that was not written to.
    pub(super) fn put_back(&self, host: HostCluster) {
        self.alloc().put(Extent {
            start: host.0,
            end: host.0 + 1,
        });
    }

    /// The value of an entry in the BAT of the top.
    pub(super) fn bat_value(&self, entry: Entry) -> u32 {
        match entry.place() {
            Place::In(file, host) if file == self.top() => self.grid().bat_value(host),
            _ => 0,
        }
    }

    /// Whether the length of the top's file that covers the entry's cluster is stable
    /// (I8), if it is in the top at all.
    pub(super) fn is_length_stable(&self, entry: Entry) -> bool {
        match entry.place() {
            Place::In(file, host) if file == self.top() => self.alloc().is_length_stable(host),
            _ => true,
        }
    }

    /// Changes an entry and has its page written; false if it was not `from` any
    /// more.
    pub(super) fn change(&self, cluster: GuestCluster, from: Entry, to: Entry) -> bool {
        self.change_and_tell(cluster, from, to, None)
    }

    /// Maps a cluster that the caller has locked to where its data was copied; it is
    /// locked no more.
    pub(super) fn relocate(&self, cluster: GuestCluster, to: HostCluster) {
        let to = Entry::mapped(self.top(), to);
        // The metadata thread may note meanwhile what has become of the last change.
        while !self.change(cluster, self.bat.get(cluster), to) {}
    }

    /// Makes a cluster a hole. False if it was not `from` any more.
    pub(super) fn unmap(&self, cluster: GuestCluster, from: Entry, host: HostCluster) -> bool {
        let page = self.grid().md_page(cluster);
        let freed = MdMessage::Freed { host, page };
        self.change_and_tell(cluster, from, Entry::HOLE, Some(freed))
    }

    /// The message is posted before the page is marked dirty: so the write of the
    /// page that takes the mark is known to contain the change (see `MdWriter`).
    fn change_and_tell(
        &self,
        cluster: GuestCluster,
        from: Entry,
        to: Entry,
        message: Option<MdMessage>,
    ) -> bool {
        debug_assert!(self.has_bat(), "a raw image stays as it is");
        let to = to.changed().after(from);
        if self.bat.replace(cluster, from, to).is_err() {
            return false;
        }
        preempt::point("published");
        self.note_change(cluster, to);
        let tells_first = rule::kept(Rule::TellBeforeMark);
        if !tells_first {
            self.mark_dirty(cluster);
            preempt::point("marked");
        }
        if let Some(message) = message {
            self.md.post(message);
        }
        preempt::point("told");
        if tells_first {
            self.mark_dirty(cluster);
            preempt::point("marked");
        }
        // Unless it is another's change by now: that one's page is not marked.
        let _ = self.bat.replace(cluster, to, to.marked());
        true
    }

    pub(super) fn mark_dirty(&self, cluster: GuestCluster) {
        if self.bat.mark_dirty(self.grid().md_page(cluster)) {
            self.md.waker().wake();
        }
    }

    /// Write-through on: every request that changes the disk is stable when it
    /// completes; turning it on makes what completed before stable first. Blocks
    /// until no request of the old mode is left; for the control thread.
    ///
    /// # Errors
    /// What went wrong with that flush; the mode is on all the same.
    pub fn set_write_through(&self, on: bool) -> Result<(), EngineError> {
        let flush = self.begin_write_through(on);
        flush.map_or(Ok(()), |outcome| outcome.wait())
    }

    /// The same without blocking. If there has to be a flush, its end will be told
    /// in the result.
    pub(crate) fn begin_write_through(&self, on: bool) -> Option<Outcome> {
        if on == self.is_write_through() {
            return None;
        }
        if on && !self.options.read_only {
            // First: who sees the new mode knows that its barrier is not over.
            self.barriers.fetch_add(1, Ordering::AcqRel);
        }
        preempt::point("barrier opened");
        let before = match on {
            true => self
                .before_end
                .fetch_or(before_end::STABLE, Ordering::AcqRel),
            false => self
                .before_end
                .fetch_and(!before_end::STABLE, Ordering::AcqRel),
        };
        let before = before & before_end::STABLE != 0;
        if on && !self.options.read_only {
            // Last: a round that starts before this may miss what ends in the old mode.
            self.barriers_up.fetch_add(1, Ordering::AcqRel);
        }
        let needs_flush = on && !before && !self.options.read_only;
        needs_flush.then(|| self.control(Control::Barrier))
    }

    /// Holds new requests, waits for those under way (parked ones stay parked)
    /// and makes everything stable. Blocks; for the control thread.
    ///
    /// # Errors
    /// What went wrong with the flush; the engine is suspended all the same.
    pub fn suspend(&self) -> Result<(), EngineError> {
        self.control(Control::Suspend).wait()
    }

    /// Takes requests again, those held since [`Self::suspend`] first.
    pub fn resume(&self) {
        drop(self.control(Control::Resume));
    }

    /// Whether the simulated power is gone: nobody is left to drain anything.
    #[cfg(test)]
    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Whether the cluster is mapped in the top delta, in memory.
    #[cfg(test)]
    pub(crate) fn is_mapped_here(&self, cluster: GuestCluster) -> bool {
        matches!(self.bat.get(cluster).place(), Place::In(file, _) if file == self.top())
    }

    /// What is mapped in the top delta, in memory.
    #[cfg(all(test, not(ploop_loom)))]
    pub(crate) fn mapped_here(&self) -> Vec<(u32, HostCluster)> {
        let entries = (0..).zip(self.bat.iter());
        let mapped = entries.filter_map(|(cluster, entry)| match entry.place() {
            Place::In(file, host) if file == self.top() => Some((cluster, host)),
            _ => None,
        });
        mapped.collect()
    }

    /// Whether a BAT entry points at a cluster that is not given out any more, as a larger
    /// BAT goes there.
    #[cfg(all(test, not(ploop_loom)))]
    pub(crate) fn keeps_out(&self, value: u32) -> bool {
        let first = HostCluster(self.alloc().first());
        self.geometry()
            .host_cluster(value)
            .is_some_and(|host| host < first)
    }

    /// A cluster whose entry somebody has changed who has not come to marking its page.
    #[cfg(all(test, not(ploop_loom)))]
    pub(crate) fn in_the_midst(&self) -> Option<GuestCluster> {
        let mut entries = (0..).map(GuestCluster).zip(self.bat.iter());
        let unmarked = entries.find(|(_, entry)| entry.is_unmarked());
        unmarked.map(|(cluster, _)| cluster)
    }

    /// Breaks [`Rule::FailedWriteStaysMapped`].
    #[cfg(all(test, not(ploop_loom)))]
    pub(crate) fn unmap_after_failure(&self, cluster: GuestCluster) {
        let entry = self.bat.get(cluster);
        if let Place::In(file, host) = entry.place()
            && file == self.top()
            && self.has_bat()
        {
            self.unmap(cluster, entry, host);
        }
    }

    /// The simulated power is gone.
    #[cfg(test)]
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
    }

    /// Makes the disk larger while it is in use: all that takes, but the guest sees the
    /// old size until [`Self::commit_growth`]. Blocks, and for long if there is much to
    /// move; only one growth is under way at a time. Nothing is given up by it: without a
    /// commit the disk stays as large as it is.
    ///
    /// # Errors
    /// A size that the disk cannot have; a host that has no space; I/O errors. The disk
    /// is as it was then, though clusters may have moved.
    pub fn prepare_growth(&self, size: Sector) -> Result<(), EngineError> {
        self.open_for_growth()?;
        self.begin_growth(size).wait()
    }

    /// What comes before [`Self::begin_growth`], and may wait for the host.
    pub(crate) fn open_for_growth(&self) -> Result<(), EngineError> {
        if self.is_read_only() {
            return Err(EngineError::ReadOnly);
        }
        if self.awaits_take_over() {
            // What the disk does not map may be a guest's all the same.
            return Err(EngineError::GuestAwaited);
        }
        self.begin();
        Ok(())
    }

    /// [`Self::prepare_growth`] without blocking.
    pub(crate) fn begin_growth(&self, size: Sector) -> Outcome {
        self.control(Control::PrepareGrowth(size))
    }

    /// Ends what [`Self::prepare_growth`] has begun: when this returns, the larger size is
    /// stable and can be used. Blocks.
    ///
    /// # Errors
    /// Nothing was prepared, or the last step could not be made stable: the size is the
    /// old one for the guest, and which of the two the image has shows when it is opened
    /// again. It can be prepared and committed once more.
    pub fn commit_growth(&self) -> Result<(), EngineError> {
        self.control(Control::CommitGrowth).wait()
    }

    /// Forgets what [`Self::prepare_growth`] has begun, which fails if it is under way.
    /// Returns at once.
    pub fn abandon_growth(&self) {
        drop(self.control(Control::AbandonGrowth));
    }

    /// The header of an empty image, in use, that could be put on the top.
    ///
    /// # Errors
    /// The format cannot hold a disk of this size.
    pub fn header_on_top(&self) -> Result<Header, EngineError> {
        let geometry = self.geometry();
        let header = match self.is_raw() {
            // A raw image has no version.
            true => Header::new(geometry.disk_size, geometry.cluster),
            false => Header::on_top_of(&geometry),
        };
        let mut header = header.map_err(|_| EngineError::ImageFull)?;
        header.in_use = InUse::Open;
        Ok(header)
    }

    /// What comes before [`Self::close_top`], and may take long: it begins, and makes stable
    /// what has completed, so that requests need not wait for that.
    ///
    /// # Errors
    /// No snapshot can be made of this disk now.
    pub(crate) fn open_for_snapshot(&self) -> Result<(), EngineError> {
        self.open_for_growth()?;
        self.levels.require_room()?;
        self.settle()
    }

    /// Holds requests, makes stable what has completed, and marks the top as closed; the
    /// memory that outlives the process says that the disk has everything. From then on
    /// nothing is written to it until [`Self::keep_top`]. If it fails, requests are taken
    /// again as if nothing had been asked.
    pub(crate) fn close_top(&self) -> Outcome {
        self.control(Control::CloseTop)
    }

    /// Puts an empty image on the top that was [closed](Self::close_top), and takes requests
    /// again: `header` is what the next file of the [`Disk`] begins with, and its file ends
    /// where data begins. All of it is stable, and who opens the disk from now on finds it.
    ///
    /// If it is not known whether the last of that is stable, nothing counts as stable any
    /// more, as after a failed sync.
    pub(crate) fn switch_top(&self, header: Header, is_stable: bool) -> Outcome {
        if !is_stable {
            self.set_sync_failed("the sync of the image's folder");
        }
        *self.lock_new_top() = Some(header);
        self.control(Control::SwitchTop)
    }

    /// Goes on with the top that was [closed](Self::close_top), and takes requests again.
    pub(crate) fn keep_top(&self) -> Outcome {
        self.control(Control::KeepTop)
    }

    pub(super) fn lock_new_top(&self) -> MutexGuard<'_, Option<Header>> {
        self.new_top.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the metadata thread for something; the result is where the answer
    /// will be.
    pub(crate) fn control(&self, what: Control) -> Outcome {
        let outcome = Outcome::default();
        self.ask_md(MdMessage::Control(what, outcome.clone()));
        outcome
    }

    /// A message that somebody waits for an answer to. When the metadata thread has
    /// ended, it is turned down.
    pub(super) fn ask_md(&self, message: MdMessage) {
        self.md.post(message);
        // One of the two sees the other: this the end, or the end this message.
        fence(Ordering::SeqCst);
        if self.has_ended() {
            self.turn_down_all();
        }
    }

    /// The metadata thread listens no more.
    pub(super) fn end_md(&self) {
        self.closed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.turn_down_all();
    }

    /// Whether the metadata thread has ended, or is about to: the image is closed, or could
    /// not be.
    pub(super) fn has_ended(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Each message is taken by one thread, so it is answered once.
    fn turn_down_all(&self) {
        for message in self.md.take_all() {
            message.turn_down();
        }
    }
}

impl Work {
    /// The cluster whose runner has to do it.
    pub(super) fn cluster(&self, grid: Grid<'_>) -> GuestCluster {
        match self {
            Self::Write { cluster, .. }
            | Self::CopyUp { cluster, .. }
            | Self::Move { cluster, .. }
            | Self::Squeeze { cluster }
            | Self::EndMove { cluster, .. } => *cluster,
            Self::Zero { start, .. } => GuestCluster((start >> grid.cluster().shift()) as u32),
            Self::EndCopies => GuestCluster(0),
        }
    }
}
