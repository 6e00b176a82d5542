//! What all threads of the engine share.
//!
//! Holds the mapping, the space, the epochs and the inboxes, and the plans that
//! follow from them. Does no I/O: whoever made a plan carries it out on its own
//! ring, outside any lock.

mod control;
mod mapping;
mod message;
#[cfg(test)]
mod probe;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use crossbeam_utils::CachePadded;

use super::alloc::Allocator;
use super::allowance;
use super::bat::{Bat, BatSize};
use super::epoch::Epochs;
use super::error::EngineError;
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
use super::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use super::take_over::Beginning;
use super::tracking::{Bitmap, Tracking};
use crate::format::{ClusterSize, Geometry, GuestCluster, Header, HostCluster, Sector};
use crate::storage::{Disk, FileId, LockStanding};

pub(super) use self::mapping::WritePlan;
pub(super) use self::message::MdMessage;

/// What a change has to wait for before it completes.
mod before_end {
    /// Until it is stable: the write cache is off.
    pub const STABLE: u8 = 1;
    /// For ever: the lock on the image is lost.
    pub const NEVER: u8 = 2;
    /// Until what outlives the process says that it may be lost: it is in doubt whether the lock
    /// on the image is.
    pub const DOUBTED: u8 = 4;
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
    /// What [`SwitchTop`](super::control::Control::SwitchTop) is about.
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

    /// It is in doubt whether the lock on the image is lost. A guest that goes on with another
    /// process, if this one ends in doubt, must know what it would have to know after a loss;
    /// and that a sync has failed, if there is one whose end is withheld until the doubt is over.
    /// To be called again and again meanwhile.
    pub fn doubt_lock(&self, has_failed_sync: bool) {
        self.before_end
            .fetch_or(before_end::DOUBTED, Ordering::AcqRel);
        if has_failed_sync && !self.is_read_only() {
            self.note_lock_doubt(true);
        }
        self.note_unstable_in_doubt();
    }

    /// The lock is there, and whoever waited for a sync that had failed has been told.
    pub fn trust_lock(&self) {
        self.before_end
            .fetch_and(!before_end::DOUBTED, Ordering::AcqRel);
        self.note_lock_doubt(false);
    }

    fn is_lock_doubted(&self) -> bool {
        self.before_end.load(Ordering::Acquire) & before_end::DOUBTED != 0
    }

    pub(super) fn note_unstable_in_doubt(&self) {
        if !self.is_covered() && !self.is_read_only() {
            self.note_change_in_doubt();
        }
    }

    /// A change that is not stable is about to complete.
    #[cold]
    pub(super) fn note_change_in_doubt(&self) {
        if self.is_lock_doubted() {
            self.note_lock_doubt(true);
            if !self.is_lock_doubted() {
                // Since then, and nobody else would take it back.
                self.note_lock_doubt(false);
            }
        }
    }

    /// Whether something may be changed that belongs to the disk and is no part of its files.
    /// Blocks as long as the lock on the image is in doubt.
    ///
    /// # Errors
    /// It is lost.
    pub fn require_lock(&self) -> Result<(), EngineError> {
        self.disk.wait_for_locks();
        match self.has_lost_lock() {
            true => Err(EngineError::LockLost),
            false => Ok(()),
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
