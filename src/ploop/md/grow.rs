//! A larger disk while it is in use.
//!
//! [`Growth`] says what has to go and in which order; here it is done beside the I/O:
//!
//! 1. No cluster that lies where the larger BAT goes is given out any more. Whoever was
//!    given one before has mapped it or given it back: I/O of older epochs ends, then
//!    copies from lower deltas, then punches of freed clusters.
//! 2. The map is looked through for what is in the way. As many free clusters are taken, and
//!    where there are too few the file gets more.
//! 3. These move, some at a time: their runners lock and copy them, one sync makes the
//!    copies stable, their runners map them there (`runner/relocate.rs`).
//! 4. Reads of where they were end. A round takes the new map to the disk: neither there
//!    nor in memory is anything mapped where the BAT goes.
//! 5. That is zeroed, and the zeros are made stable. From here on everything is prepared.
//! 6. The sector with the header is written, by a round like any other, which makes it
//!    stable. Then there are more entries in memory, and a larger disk for the guest.
//!
//! Clusters in the way are kept out of the allocator by their number alone. If it comes to
//! nothing, those that are known to be free are given out again, so that the guest has the
//! space. What has moved stays where it is, and where it was goes the way of every cluster
//! that was unmapped. Clusters in the way that were to be punched are not used until the image
//! is opened again, when they are found like what a crash has leaked.
//!
//! A raw image has no BAT: its file is made longer.

use std::collections::VecDeque;

use rustix::io::Errno;

use super::super::EngineError;
use super::super::bat::BatSize;
use super::super::control::Outcome;
use super::super::entry::{Entry, Place};
use super::super::pio::{Home, MoveIf, Pio, Work};
use super::super::preempt;
use super::super::rule::{self, Rule};
use super::super::sync::atomic::Ordering;
use super::{MdOp, MdWriter, Waiter};
use crate::format::{
    Fate, Geometry, Growth, GuestCluster, Header, HeaderError, HostCluster, Packing, Sector,
};
use crate::storage::{Disk, Op, ZeroMode};

/// Entries that are looked at between two other things.
const SCAN_AT_ONCE: u32 = 1 << 20;

/// Bytes that are copied for one sync, at most; one cluster may have more.
const COPIES_BYTES: u64 = 16 << 20;

/// What clusters move for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A larger BAT goes where they are.
    Growth,
    /// The file is to become shorter; see [`super::compact`].
    Packing(Packing),
    /// Its end is cut off. None move.
    Cutting,
}

/// A disk on its way to another size, or whose clusters move for another reason.
pub(super) struct Growing {
    pub(super) purpose: Purpose,
    /// `None`: the top is plain.
    growth: Option<Growth>,
    /// Of the larger disk.
    geometry: Geometry,
    /// Who waits for it. Nobody does while it is prepared.
    outcome: Option<Outcome>,
    pub(super) stage: Stage,
    /// What was begun and has not ended: operations, errands of runners, rounds.
    waits: usize,
    /// What of it has failed.
    error: Option<EngineError>,
    /// To be moved to: nobody else is given them.
    pub(super) free: VecDeque<HostCluster>,
    /// Where clusters were that the disk may still have there, with the md pages that say so.
    left: Vec<(u32, HostCluster)>,
    /// It shall come to nothing, for this reason if there is one.
    stop: bool,
    failed: Option<EngineError>,
}

pub(super) enum Stage {
    /// I/O that may have been given a cluster in the way ends.
    OldIo {
        epoch: u64,
    },
    /// Copies from lower deltas end that were begun to such clusters.
    Copies,
    /// Punches of such clusters end.
    Punches,
    /// Looking for what is in the way.
    Scan {
        next: u32,
        moves: VecDeque<Move>,
    },
    /// The file is about to become longer, or is being made so, up to this cluster.
    Space {
        moves: VecDeque<Move>,
        new_end: Option<u32>,
    },
    Moving(Moving),
    /// Reads of where clusters were end.
    LastReads {
        epoch: u64,
    },
    /// The map goes to the disk.
    Mapping,
    Zeroing,
    Stabilizing,
    Prepared,
    /// The header goes to the disk.
    Committing,
    /// Whoever still sees the old size ends.
    OldSize {
        epoch: u64,
    },
    /// Before the end is cut off: clusters on their way back arrive.
    Draining {
        before: u64,
    },
    /// Nothing is given out at the end any more, and who was about to be given something
    /// ends.
    Closing {
        epoch: u64,
        old_end: u32,
    },
    /// The end was cut off, and who still knows the old one ends.
    Cut {
        epoch: u64,
        result: Result<(), EngineError>,
    },
}

/// A cluster that has to move.
pub(super) struct Move {
    pub(super) cluster: GuestCluster,
    pub(super) keep: u64,
}

pub(super) struct Moving {
    todo: VecDeque<Move>,
    /// Those that are locked, or may be.
    batch: Vec<GuestCluster>,
    phase: Phase,
}

impl Moving {
    pub(super) fn new(todo: VecDeque<Move>) -> Self {
        Self {
            todo,
            batch: Vec::new(),
            phase: Phase::Ending,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Copying,
    Syncing,
    Ending,
}

impl Growing {
    pub(super) fn new(
        growth: Option<Growth>,
        geometry: Geometry,
        outcome: Outcome,
        stage: Stage,
    ) -> Self {
        Self {
            purpose: Purpose::Growth,
            growth,
            geometry,
            outcome: Some(outcome),
            stage,
            waits: 0,
            error: None,
            free: VecDeque::new(),
            left: Vec::new(),
            stop: false,
            failed: None,
        }
    }

    /// Whether clusters are locked for it.
    pub fn has_locked(&self) -> bool {
        matches!(&self.stage, Stage::Moving(moving) if !moving.batch.is_empty())
    }

    /// Whether it has to be looked at again though nothing wakes the thread.
    pub fn polls(&self) -> bool {
        self.waits == 0 && !matches!(self.stage, Stage::Prepared)
    }

    fn tell(&mut self, result: Result<(), EngineError>) {
        if let Some(outcome) = self.outcome.take() {
            outcome.set(result);
        }
    }
}

/// What a step leads to.
pub(super) enum Step {
    /// Another one.
    On(Stage),
    /// There is nothing to do for now.
    Wait(Stage),
    Failed(EngineError),
    Done,
}

// Asked for.
impl<D: Disk> MdWriter<D> {
    pub(super) fn prepare_growth(&mut self, size: Sector, outcome: Outcome) {
        if let Err(error) = self.begin_growth(size, &outcome) {
            outcome.set(Err(error));
        }
    }

    fn begin_growth(&mut self, size: Sector, outcome: &Outcome) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        if self.closed {
            return Err(EngineError::Stopped);
        }
        if engine.is_read_only() {
            return Err(EngineError::ReadOnly);
        }
        if engine.has_sync_failed() {
            return Err(EngineError::SyncFailed);
        }
        if self.growing.is_some() {
            return Err(EngineError::Growing);
        }
        // Who asks may be the one who would resume it.
        if engine.is_suspended() {
            return Err(EngineError::Suspended);
        }
        let old = self.geometry.disk_size;
        if size < old {
            let (from, to) = (old.0, size.0);
            return Err(EngineError::Smaller { from, to });
        }
        // Other tools round down to whole clusters.
        let size = match size == old {
            true => size,
            false => self.geometry.cluster.round_up(size),
        };
        let growth = match &self.metadata {
            Some(metadata) => Some(Growth::new(&metadata.header, size).map_err(refusal)?),
            None => None,
        };
        let geometry = match &growth {
            Some(growth) => *growth.header().geometry(),
            None => plain_growth(&self.geometry, size)?,
        };
        if !engine.has_room_for(&geometry) {
            return Err(EngineError::Memory);
        }
        let (bytes, cluster) = (geometry.disk_size.bytes(), geometry.cluster.bytes());
        engine.tracking.require_room(bytes, cluster)?;
        let stage = match &growth {
            // Either there is nothing to do, or all but the last step was done before.
            _ if size == old => Stage::Prepared,
            None => {
                self.lengthen(size)?;
                Stage::Stabilizing
            }
            Some(growth) => {
                if rule::kept(Rule::NothingNewInTheWay) {
                    let first = growth.first_host_cluster();
                    engine.alloc().keep_below(first);
                    // The BAT is written up to there.
                    engine.check_write_threshold(HostCluster(first.0.saturating_sub(1)));
                }
                preempt::point("kept out");
                Stage::OldIo {
                    epoch: engine.epochs.advance(),
                }
            }
        };
        let mut growing = Growing::new(growth, geometry, outcome.clone(), stage);
        match growing.stage {
            Stage::Prepared => growing.tell(Ok(())),
            Stage::Stabilizing => self.await_round(&mut growing),
            _ => {}
        }
        self.growing = Some(growing);
        Ok(())
    }

    /// What the raw file has behind the end of the disk was never the guest's.
    fn lengthen(&self, size: Sector) -> Result<(), EngineError> {
        let (disk, top) = (&self.engine.disk, self.engine.top());
        let old = self.geometry.disk_size;
        let made = disk
            .set_len(top, old.bytes())
            .and_then(|()| disk.set_len(top, size.bytes()));
        made.map_err(|error| EngineError::of_host(super::close::errno_of(&error)))
    }

    pub(super) fn commit_growth(&mut self, outcome: Outcome) {
        let Some(mut growing) = self.growing.take() else {
            return outcome.set(Err(EngineError::NotPrepared));
        };
        if !matches!(growing.stage, Stage::Prepared) {
            self.growing = Some(growing);
            return outcome.set(Err(EngineError::Growing));
        }
        growing.outcome = Some(outcome);
        if self.engine.is_suspended() {
            return self.give_up_growth(growing, EngineError::Suspended);
        }
        if growing.geometry.disk_size == self.engine.disk_size() {
            return growing.tell(Ok(()));
        }
        if rule::kept(Rule::RoomOutlivesProcess)
            && let Err(error) = self.engine.make_room(&growing.geometry)
        {
            log::error!("a larger disk cannot be remembered: {error}");
            return self.give_up_growth(growing, EngineError::Memory);
        }
        self.engine.bat.grow(BatSize::of(&growing.geometry));
        let old = std::mem::replace(&mut self.geometry, growing.geometry);
        match (&growing.growth, &mut self.metadata) {
            (Some(growth), Some(metadata)) => {
                // It says that the image is in use, as the one before does.
                metadata.header = growth.header().clone();
                metadata.bat_tail = vec![0; tail_len(&growing.geometry)];
                self.engine.bat.mark_dirty(0);
                growing.stage = Stage::Committing;
                if rule::kept(Rule::SizeBeforeUse) {
                    self.await_round(&mut growing);
                }
            }
            _ => {
                let top = self.engine.top();
                for cluster in old.entries..growing.geometry.entries {
                    let itself = Entry::mapped(top, HostCluster(cluster));
                    self.engine.bat.load(GuestCluster(cluster), itself);
                }
                growing.stage = self.publish(&growing.geometry);
            }
        }
        self.growing = Some(growing);
    }

    pub(super) fn abandon_growth(&mut self, outcome: Outcome) {
        match &mut self.growing {
            // At once: whoever asks next does not find it in the way.
            Some(Growing {
                stage: Stage::Prepared,
                ..
            }) => self.fail_growth(EngineError::Stopped),
            Some(growing) => growing.stop = true,
            None => {}
        }
        outcome.set(Ok(()));
    }
}

// What was begun has ended.
impl<D: Disk> MdWriter<D> {
    fn growth_went_on(&mut self, result: Result<(), EngineError>) {
        if let Some(growing) = &mut self.growing {
            growing.waits -= 1;
            growing.error = growing.error.or(result.err());
        }
    }

    pub(super) fn errand_done(&mut self, result: Result<(), EngineError>) {
        self.growth_went_on(result);
    }

    /// Its data is there as well until the disk has the new mapping: what comes to nothing
    /// before leaves it so.
    pub(super) fn cluster_moved(&mut self, host: HostCluster, page: u32) {
        if let Some(growing) = &mut self.growing {
            growing.left.push((page, host));
        }
    }

    pub(super) fn growth_flushed(&mut self, result: Result<(), EngineError>) {
        self.growth_went_on(result);
    }

    pub(super) fn growth_op_done(&mut self, result: Result<(), Errno>) {
        if let Some(growing) = &mut self.growing
            && let Stage::Space {
                moves,
                new_end: Some(new_end),
            } = &mut growing.stage
        {
            self.space.extension_ended();
            if result.is_ok() {
                // At once: others make the file longer from the end that is known.
                let moves = std::mem::take(moves);
                let count = (moves.len() - growing.free.len()) as u32;
                let first = self.engine.alloc().claim(*new_end, count).0;
                self.engine.check_write_threshold(HostCluster(*new_end - 1));
                let claimed = (first..first + count).map(HostCluster);
                growing.free.extend(claimed);
                growing.stage = Stage::Moving(Moving::new(moves));
            }
        }
        self.growth_went_on(result.map_err(EngineError::of_host));
    }

    /// The next round answers when all that is in memory now is stable.
    pub(super) fn await_round(&mut self, growing: &mut Growing) {
        growing.waits += 1;
        self.waiters.push(Waiter::Growth);
    }

    fn send_on_errand(&self, growing: &mut Growing, runner: usize, work: Work) {
        growing.waits += 1;
        self.engine.dispatched.fetch_add(1, Ordering::AcqRel);
        self.engine.runners[runner].post(self.errand(work));
    }

    fn errand(&self, work: Work) -> Pio {
        Pio {
            home: Home::of_metadata(self.engine.md.clone()),
            work,
            last_try: false,
        }
    }
}

// Step by step.
impl<D: Disk> MdWriter<D> {
    /// It comes to nothing.
    pub(super) fn fail_growth(&mut self, error: EngineError) {
        if let Some(growing) = self.growing.take() {
            self.give_up_growth(growing, error);
        }
    }

    /// The same, when nothing of it is under way any more. What the header already says,
    /// or may say on disk, keeps its place.
    fn give_up_growth(&mut self, mut growing: Growing, error: EngineError) {
        for host in growing.free.drain(..) {
            self.engine.put_back(host);
        }
        self.give_back_left(&growing.left);
        let first = self.geometry.first_host_cluster();
        self.engine.alloc().keep_no_more_from(first);
        growing.tell(Err(error));
    }

    /// These are free when the disk knows where their data is now. Who opens the image next
    /// finds them by himself.
    fn give_back_left(&mut self, left: &[(u32, HostCluster)]) {
        if left.is_empty() || self.is_ending() || self.engine.has_sync_failed() {
            return;
        }
        let round = self.next_write();
        for (page, _) in left {
            // It may have been written since, and nobody has taken note of that.
            self.engine.bat.mark_dirty(*page);
        }
        let pages = left.iter().map(|(page, _)| (*page, round)).collect();
        let hosts = left.iter().map(|(_, host)| host.0).collect();
        // Reads of what was there may be under way.
        let epoch = self.engine.epochs.advance();
        self.reclaim.add_moved(hosts, pages, epoch);
    }

    pub(super) fn step_growth(&mut self) {
        while let Some(mut growing) = self.growing.take() {
            growing.stop |= self.is_ending();
            // These change nothing of the image any more, and who waits for them may be
            // the one who would resume it.
            let is_ending = matches!(
                growing.stage,
                Stage::Committing | Stage::OldSize { .. } | Stage::Cut { .. }
            );
            let is_held = self.engine.is_suspended() && !growing.stop && !is_ending;
            if growing.waits > 0 || (is_held && !growing.has_locked()) {
                self.growing = Some(growing);
                return;
            }
            let error = growing.error.take();
            let stage = std::mem::replace(&mut growing.stage, Stage::Prepared);
            let step = match stage {
                // These end by themselves, well or not.
                Stage::Moving(moving) => self.step_moving(&mut growing, moving, error),
                stage @ Stage::Cut { .. } => self.step_cut(stage),
                stage => match error {
                    None if !growing.stop => self.step(&mut growing, stage),
                    error => {
                        self.reopen_end(&stage);
                        Step::Failed(error.unwrap_or(EngineError::Stopped))
                    }
                },
            };
            match step {
                Step::On(stage) => {
                    if matches!(stage, Stage::Prepared) {
                        growing.tell(Ok(()));
                    }
                    growing.stage = stage;
                    self.growing = Some(growing);
                }
                Step::Wait(stage) => {
                    growing.stage = stage;
                    self.growing = Some(growing);
                    return;
                }
                Step::Failed(error) => self.give_up_growth(growing, error),
                Step::Done => growing.tell(Ok(())),
            }
        }
    }

    fn step(&mut self, growing: &mut Growing, stage: Stage) -> Step {
        let engine = self.engine.clone();
        match stage {
            Stage::OldIo { epoch } if engine.epochs.all_reached(epoch) => {
                for runner in 0..engine.runners.len() {
                    self.send_on_errand(growing, runner, Work::EndCopies);
                }
                Step::On(Stage::Copies)
            }
            Stage::Copies => Step::On(Stage::Punches),
            Stage::Punches if !self.is_punched_below(engine.alloc().first()) => {
                Step::On(Stage::Scan {
                    next: 0,
                    moves: VecDeque::new(),
                })
            }
            Stage::Scan { next, moves } => self.scan(growing, next, moves),
            Stage::Space { moves, .. } => self.get_space(growing, moves),
            // Those are waited for before holes are made there.
            Stage::LastReads { .. } if growing.purpose != Purpose::Growth => {
                if rule::kept(Rule::MappingBeforeLeaving) {
                    self.await_round(growing);
                }
                Step::On(Stage::Mapping)
            }
            Stage::LastReads { epoch }
                if engine.epochs.all_reached(epoch) || !rule::kept(Rule::OldIoBeforeZeroing) =>
            {
                if let Some(metadata) = &mut self.metadata {
                    metadata.bat_tail.fill(0);
                }
                engine.bat.mark_dirty(self.geometry.md_pages() - 1);
                if rule::kept(Rule::MappingBeforeZeroing) {
                    self.await_round(growing);
                }
                Step::On(Stage::Mapping)
            }
            Stage::Mapping => {
                // Those where the BAT goes are kept out.
                for (_, host) in std::mem::take(&mut growing.left) {
                    self.reclaim.add_dropped(host);
                }
                if growing.purpose != Purpose::Growth {
                    return Step::Done;
                }
                self.zero(growing);
                Step::On(Stage::Zeroing)
            }
            Stage::Zeroing => {
                if rule::kept(Rule::StableBeforeSize) {
                    self.await_round(growing);
                }
                Step::On(Stage::Stabilizing)
            }
            Stage::Stabilizing => Step::On(Stage::Prepared),
            Stage::Committing => Step::On(self.publish(&growing.geometry)),
            Stage::OldSize { epoch } if engine.epochs.all_reached(epoch) => Step::Done,
            stage @ (Stage::Draining { .. } | Stage::Closing { .. } | Stage::Cut { .. }) => {
                self.step_cut(stage)
            }
            stage => Step::Wait(stage),
        }
    }

    /// Whether a hole is being punched, or about to be, in front of this cluster.
    fn is_punched_below(&self, first: u32) -> bool {
        let mut under_way = self.ops.iter();
        self.holes.iter().any(|(_, extent)| extent.start < first)
            || under_way
                .any(|(_, op)| matches!(op, MdOp::Punch { extent, .. } if extent.start < first))
    }

    fn scan(&mut self, growing: &Growing, next: u32, mut moves: VecDeque<Move>) -> Step {
        let engine = self.engine.clone();
        let Some(growth) = &growing.growth else {
            return Step::Failed(EngineError::NotPrepared);
        };
        let end = next.saturating_add(SCAN_AT_ONCE);
        let entries = engine.bat.range(next..end);
        for (cluster, entry) in (next..).map(GuestCluster).zip(entries) {
            let Place::In(file, host) = entry.place() else {
                continue;
            };
            if file != engine.top() {
                continue;
            }
            match growth.fate(cluster, host) {
                Fate::Stays => {}
                Fate::Moves { keep } => moves.push_back(Move { cluster, keep }),
                // Nobody but this thread touches it.
                Fate::Goes if engine.can_unmap() => {
                    engine.unmap(cluster, entry, host);
                }
                // Where a lower delta might show in its place.
                Fate::Goes => moves.push_back(Move { cluster, keep: 0 }),
            }
        }
        match end < self.geometry.entries {
            true => Step::Wait(Stage::Scan { next: end, moves }),
            false => Step::On(Stage::Space {
                moves,
                new_end: None,
            }),
        }
    }

    /// Makes the file reach over the larger BAT, and takes as many clusters as have to move:
    /// those that are free, as a gap would be left in front of any that are behind these.
    fn get_space(&mut self, growing: &mut Growing, moves: VecDeque<Move>) -> Step {
        while growing.free.len() < moves.len()
            && let Some(host) = self.engine.take_cluster()
        {
            growing.free.push_back(host);
        }
        let count = (moves.len() - growing.free.len()) as u32;
        let end = self.engine.alloc().end();
        let start = end.max(growing.geometry.first_host_cluster().0);
        let Some(new_end) = start
            .checked_add(count)
            .filter(|end| *end <= self.geometry.host_cluster_limit())
        else {
            return Step::Failed(EngineError::ImageFull);
        };
        if new_end == end {
            return Step::On(Stage::Moving(Moving::new(moves)));
        }
        if self.space.is_extending() {
            return Step::Wait(Stage::Space {
                moves,
                new_end: None,
            });
        }
        self.space.begin_other_extension();
        growing.waits += 1;
        let op = Op::Allocate {
            file: self.engine.top(),
            offset: self.geometry.host_offset(HostCluster(end)),
            len: u64::from(new_end - end) << self.geometry.cluster.shift(),
        };
        self.queue(MdOp::Grow, op);
        Step::On(Stage::Space {
            moves,
            new_end: Some(new_end),
        })
    }

    fn step_moving(
        &mut self,
        growing: &mut Growing,
        mut moving: Moving,
        error: Option<EngineError>,
    ) -> Step {
        if moving.batch.is_empty() || moving.phase == Phase::Ending {
            moving.batch.clear();
            return self.move_more(growing, moving);
        }
        if moving.phase == Phase::Copying && error.is_none() {
            moving.phase = Phase::Syncing;
            if rule::kept(Rule::MoveBeforeMapping) {
                self.await_round(growing);
            }
            return Step::On(Stage::Moving(moving));
        }
        moving.phase = Phase::Ending;
        let is_stable = error.is_none();
        for cluster in moving.batch.clone() {
            growing.waits += 1;
            let work = Work::EndMove { cluster, is_stable };
            self.engine.dispatch(cluster, self.errand(work));
        }
        // It fails when nothing is locked any more.
        growing.stop |= error.is_some();
        growing.failed = error;
        Step::On(Stage::Moving(moving))
    }

    fn move_more(&mut self, growing: &mut Growing, mut moving: Moving) -> Step {
        if growing.stop {
            return Step::Failed(growing.failed.unwrap_or(EngineError::Stopped));
        }
        if self.engine.is_suspended() {
            return Step::Wait(Stage::Moving(moving));
        }
        let at_once = (COPIES_BYTES >> self.geometry.cluster.shift()).max(1);
        while (moving.batch.len() as u64) < at_once
            && let Some(to) = growing.free.pop_front()
            && let Some(Move { cluster, keep }) = moving.todo.pop_front()
        {
            moving.batch.push(cluster);
            growing.waits += 1;
            let only_if = match growing.purpose {
                Purpose::Packing(packing) => MoveIf::Behind(packing),
                _ => MoveIf::InTheWay,
            };
            let work = Work::Move {
                cluster,
                to,
                keep,
                only_if,
            };
            self.engine.dispatch(cluster, self.errand(work));
        }
        moving.phase = Phase::Copying;
        match moving.batch.is_empty() {
            true => Step::On(Stage::LastReads {
                epoch: self.engine.epochs.advance(),
            }),
            false => Step::On(Stage::Moving(moving)),
        }
    }

    /// Zeros where new entries go, but for the end of the last page, which is written with
    /// the entries in it. They take their space: no mapping shall fail for want of it.
    fn zero(&mut self, growing: &mut Growing) {
        let old = &self.geometry;
        let file = self.engine.top();
        let offset = old.metadata_len() + tail_len(old) as u64;
        let len = growing.geometry.data_start.saturating_sub(offset);
        if len == 0 {
            return;
        }
        growing.waits += 1;
        self.queue(MdOp::Grow, Op::Allocate { file, offset, len });
        if rule::kept(Rule::ZerosBeforeSize) {
            growing.waits += 1;
            let op = Op::Zero {
                file,
                offset,
                len,
                mode: ZeroMode::KeepAllocated,
            };
            self.queue(MdOp::Grow, op);
        }
    }

    /// The larger size is stable: it can be used.
    fn publish(&mut self, geometry: &Geometry) -> Stage {
        self.engine.publish_size(geometry);
        preempt::point("published");
        Stage::OldSize {
            epoch: self.engine.epochs.advance(),
        }
    }
}

/// How many bytes of the last md page of a BAT, as far as it is not data, are behind it.
pub(super) fn tail_len(geometry: &Geometry) -> usize {
    let end = geometry.metadata_len();
    let page_end = end.next_multiple_of(Geometry::MD_PAGE);
    (page_end.min(geometry.data_start) - end) as usize
}

/// Of a raw image.
fn plain_growth(old: &Geometry, size: Sector) -> Result<Geometry, EngineError> {
    // The largest disk that a ploop image can have, too.
    let header = Header::new(size, old.cluster).map_err(refusal)?;
    Ok(Geometry {
        data_start: old.data_start,
        ..*header.geometry()
    })
}

fn refusal(error: HeaderError) -> EngineError {
    match error {
        HeaderError::Smaller { from, to } => EngineError::Smaller { from, to },
        HeaderError::TooLarge(error) => EngineError::TooLarge(error),
        // The first block offset could not say where its data begins.
        _ => EngineError::ImageFull,
    }
}
