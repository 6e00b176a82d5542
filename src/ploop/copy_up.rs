//! Makes the level below the top needless while the disk is in use, or it and some below it: what
//! they have and the top lacks is copied into the top.
//!
//! 1. The map is looked through for clusters of these levels. Runners copy them as they do before
//!    a part of one is written (`runner/cow.rs`): the cluster is locked, reads go on below, and
//!    the copy is stable before its mapping reaches the disk (I6). The guest may come first;
//!    then there is nothing to copy.
//! 2. That is done again until there is none, locked or not. Nothing is ever mapped in a lower
//!    level anew.
//! 3. I/O ends that may have found such a level in the map before, and a flush follows: the disk
//!    has all copies, mapping included.
//! 4. From here on the levels are needed by nobody, now or after a cut. Whoever has asked for
//!    this has the descriptor tell of a chain without them, and makes that stable. Then their
//!    files can go.
//!
//! What is zeros in the base of the chain takes no copy: where nothing lies below, a hole of the map
//! reads the same, whoever reads it and wherever, as long as the base is there and when it is not.
//! On disk nothing changes by that. A level above the base may hide with its zeros what lies below:
//! those are copied.
//!
//! Until step 4 nothing but the top has changed, and it reads as it did: whatever comes in
//! between, and be it that nobody goes on, the chain is what it was. In memory a level keeps
//! its number.
//!
//! It never blocks. Copies are begun by the metadata thread: so none is begun while requests
//! are held, or for a top that is none any more.

use std::collections::VecDeque;
use std::time::Duration;

use rustix::io::Errno;

use super::EngineError;
use super::control::{Control, Outcome};
use super::engine::{Engine, MdMessage};
use super::entry::{Entry, Place};
use super::levels::Needless;
use super::rule::{self, Rule};
use super::sync::atomic::Ordering;
use crate::format::GuestCluster;
use crate::storage::zeros::KnownData;
use crate::storage::{Disk, FileId};

/// Entries that are looked at in a step.
const SCAN_AT_ONCE: u32 = 1 << 20;

/// Questions to the host in a step, where the base has data: each may go to a server.
const QUESTIONS_AT_ONCE: u32 = 16;

/// See the module's text. Dropped, it is given up: copies that were made stay.
pub struct CopyUp {
    /// Up to the one below the top.
    levels: Needless,
    top: FileId,
    stage: Stage,
    /// Clusters that they had for the disk at first.
    total: u64,
    /// Of these, those that they have, as far as is known: what the guest has copied counts
    /// until they are counted again.
    left: u64,
}

enum Stage {
    /// What is zeros in the base is found, so that it is neither copied nor counted.
    Looking {
        /// Where to look on.
        next: u32,
        data: KnownData,
    },
    Copying {
        /// Where to look on.
        next: u32,
        /// Something was found since the map was looked at from its start.
        has_found: bool,
        under_way: VecDeque<Outcome>,
    },
    Settling(Outcome),
    Ready,
}

/// What a step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyUpStep {
    /// There is more to do at once.
    On,
    /// There is nothing to do until something ends that is under way.
    Waits,
    /// The host has no space for a copy. The next step tries again.
    Full,
    /// Requests are held. The next step tries again.
    Held,
    /// The disk needs the levels no more, and that is stable.
    Ready,
}

impl CopyUp {
    /// For the level below the top, or for all below it down to this one.
    ///
    /// # Errors
    /// There is none, or nothing can be written.
    pub fn new<D: Disk>(engine: &Engine<D>, lowest: Option<FileId>) -> Result<Self, EngineError> {
        if engine.is_read_only() {
            return Err(EngineError::ReadOnly);
        }
        let top = engine.top();
        let below = engine.levels.below(top).ok_or(EngineError::NoLevelBelow)?;
        let lowest = lowest.unwrap_or(below);
        let mut copies = Self {
            levels: Needless::new(lowest, top),
            top,
            stage: Stage::Looking {
                next: 0,
                data: KnownData::default(),
            },
            total: 0,
            left: 0,
        };
        if !engine.is_base(lowest) {
            copies.begin_copying(engine);
        }
        Ok(copies)
    }

    fn begin_copying<D: Disk>(&mut self, engine: &Engine<D>) {
        self.total = self.levels.count(engine);
        self.left = self.total;
        self.stage = Stage::begin();
    }

    /// Whether it is not known yet what there is to be copied, so that nothing is.
    pub fn is_looking(&self) -> bool {
        matches!(self.stage, Stage::Looking { .. })
    }

    /// How many clusters have to be copied yet, counted anew: the guest has copied some of them,
    /// perhaps.
    pub fn count_left<D: Disk>(&mut self, engine: &Engine<D>) -> u64 {
        self.left = self.left.min(self.levels.count(engine));
        self.left
    }

    /// Which it is about, base first.
    pub fn levels<D: Disk>(&self, engine: &Engine<D>) -> Vec<FileId> {
        self.levels.files(engine)
    }

    /// The raw image on which they lie, if they lie on one, and where the disk ends for which
    /// they are: behind that nothing of the file is part of the chain, in bytes.
    pub fn raw_below<D: Disk>(&self, engine: &Engine<D>) -> Option<(FileId, u64)> {
        let lowest = *self.levels(engine).first()?;
        let below = engine.levels.below(lowest)?;
        let end = engine.levels.get(lowest).disk_bytes();
        engine.levels.get(below).is_plain().then_some((below, end))
    }

    /// How many clusters there are to be copied, and how many of them were, by whomever.
    pub fn progress(&self) -> (u64, u64) {
        (self.total.saturating_sub(self.left), self.total)
    }

    /// How many copies are under way.
    pub fn under_way(&self) -> usize {
        match &self.stage {
            Stage::Copying { under_way, .. } => under_way.len(),
            Stage::Looking { .. } | Stage::Settling(_) | Stage::Ready => 0,
        }
    }

    /// Waits until something ends that is under way, but not for longer than this.
    pub fn wait(&self, at_most: Duration) {
        let first = match &self.stage {
            Stage::Copying { under_way, .. } => under_way.front(),
            Stage::Settling(outcome) => Some(outcome),
            Stage::Looking { .. } | Stage::Ready => None,
        };
        if let Some(outcome) = first {
            let _ = outcome.wait_for(at_most);
        }
    }

    /// Copies no more, and waits for what is under way. Copies that were made stay.
    pub fn give_up(self) {
        match self.stage {
            Stage::Copying { under_way, .. } => under_way.iter().for_each(|outcome| {
                let _ = outcome.wait();
            }),
            Stage::Settling(outcome) => drop(outcome.wait()),
            Stage::Looking { .. } | Stage::Ready => {}
        }
    }

    /// Goes on, with so many copies under way at most; none for who is to pause. Never blocks.
    ///
    /// # Errors
    /// An I/O error, or a new top. The disk is what it was, and it can be begun again.
    pub fn step<D: Disk>(
        &mut self,
        engine: &Engine<D>,
        at_most: usize,
    ) -> Result<CopyUpStep, EngineError> {
        if engine.has_lost_lock() {
            return Err(EngineError::LockLost);
        }
        if engine.top() != self.top {
            return Err(EngineError::TopChanged);
        }
        match &mut self.stage {
            Stage::Looking { next, data } => {
                let base = self.levels.lowest();
                *next = engine.forget_holes(base, *next, data)?;
                if *next >= engine.bat.len() {
                    self.begin_copying(engine);
                }
                Ok(CopyUpStep::On)
            }
            Stage::Copying { .. } => self.copy(engine, at_most),
            Stage::Settling(outcome) => match outcome.get() {
                None => Ok(CopyUpStep::Waits),
                Some(Ok(())) => {
                    self.stage = Stage::Ready;
                    self.left = 0;
                    Ok(CopyUpStep::Ready)
                }
                Some(Err(error)) => {
                    self.stage = Stage::begin();
                    Err(error)
                }
            },
            Stage::Ready => Ok(CopyUpStep::Ready),
        }
    }

    fn copy<D: Disk>(
        &mut self,
        engine: &Engine<D>,
        at_most: usize,
    ) -> Result<CopyUpStep, EngineError> {
        let Stage::Copying {
            next,
            has_found,
            under_way,
        } = &mut self.stage
        else {
            return Ok(CopyUpStep::On);
        };
        let mut refusal = None;
        while let Some(result) = under_way.front().and_then(Outcome::get) {
            under_way.pop_front();
            match result {
                Ok(()) => self.left = self.left.saturating_sub(1),
                Err(EngineError::NoSpace) => refusal = Some(CopyUpStep::Full),
                Err(EngineError::Suspended) => refusal = Some(CopyUpStep::Held),
                Err(error) => return Err(error),
            }
        }
        if let Some(refusal) = refusal {
            return Ok(refusal);
        }
        let mut looks = SCAN_AT_ONCE;
        while under_way.len() < at_most && looks > 0 {
            let end = next.saturating_add(looks);
            let entries = engine.bat.range(*next..end);
            let mut looked_at = 0;
            let mut found = None;
            for entry in entries {
                looked_at += 1;
                if let Some(level) = self.levels.level_of(entry.place()) {
                    found = Some((GuestCluster(*next + looked_at - 1), level));
                    break;
                }
            }
            let is_at_end = found.is_none() && looked_at < looks;
            looks -= looked_at;
            *next += looked_at;
            if let Some((cluster, level)) = found {
                *has_found = true;
                under_way.push_back(engine.copy_up(cluster, level, self.top));
            } else if is_at_end {
                break;
            }
        }
        if *next < engine.bat.len() {
            return Ok(match under_way.len() < at_most {
                true => CopyUpStep::On,
                false => CopyUpStep::Waits,
            });
        }
        let is_over = under_way.is_empty() || !rule::kept(Rule::CopiesEndBeforeDrop);
        if !is_over {
            return Ok(CopyUpStep::Waits);
        }
        if *has_found && rule::kept(Rule::CopiesEndBeforeDrop) {
            self.stage = Stage::begin();
            return Ok(CopyUpStep::On);
        }
        if !rule::kept(Rule::FlushBeforeDrop) {
            self.stage = Stage::Ready;
            return Ok(CopyUpStep::Ready);
        }
        self.stage = Stage::Settling(engine.control(Control::Barrier));
        Ok(CopyUpStep::Waits)
    }

    /// The levels, once nobody needs them.
    pub fn into_levels(self) -> Needless {
        self.levels
    }
}

impl Stage {
    fn begin() -> Self {
        Self::Copying {
            next: 0,
            has_found: false,
            under_way: VecDeque::new(),
        }
    }
}

impl<D: Disk> Engine<D> {
    /// Whether copies may share the data of the host's files, and so take no space: as long as no
    /// other thing was found out, by the first copy at the latest.
    pub(crate) fn may_share_clusters(&self) -> bool {
        self.geometry().cluster.bytes() >= self.options.smallest_clone
            && self.disk.clone_unit().is_some()
    }

    /// Whether nothing lies below the level.
    pub(super) fn is_base(&self, level: FileId) -> bool {
        self.levels.below(level).is_none() || !rule::kept(Rule::ZerosHideBelow)
    }

    /// What of the base has no data is a hole of the map from now on, from this entry up to the
    /// one that is returned.
    ///
    /// # Errors
    /// The host does not say where there is data.
    fn forget_holes(
        &self,
        base: FileId,
        from: u32,
        data: &mut KnownData,
    ) -> Result<u32, EngineError> {
        let (level, grid) = (self.level(base), self.grid());
        let mut questions = 0;
        let mut next_entry = from;
        for entry in self.bat.range(from..from.saturating_add(SCAN_AT_ONCE)) {
            if questions >= QUESTIONS_AT_ONCE {
                break;
            }
            let cluster = GuestCluster(next_entry);
            next_entry += 1;
            let Place::In(file, host) = entry.place() else {
                continue;
            };
            // Who has locked it goes on with what it was.
            if file != base || entry.is_locked() {
                continue;
            }
            let start = level.offset(host);
            let look = |at| {
                questions += 1;
                self.disk.next_data(base, at)
            };
            let next = data.find(start, look).map_err(|error| {
                log::error!("cannot find out where the base of the disk has data: {error}");
                EngineError::Io(Errno::from_io_error(&error).unwrap_or(Errno::IO))
            })?;
            let valid = level.valid_bytes(grid.cluster_start(cluster), grid.cluster().bytes());
            if next.is_none_or(|next| next >= start + valid) {
                // Unless the guest comes first.
                let _ = self.bat.replace(cluster, entry, Entry::HOLE.after(entry));
            }
        }
        Ok(next_entry)
    }

    /// Has a cluster of `level` copied into the top, unless it is there or gets there before.
    fn copy_up(&self, cluster: GuestCluster, level: FileId, top: FileId) -> Outcome {
        let outcome = Outcome::default();
        self.ask_md(MdMessage::CopyUp {
            cluster,
            level,
            top,
            outcome: outcome.clone(),
        });
        outcome
    }

    /// For the metadata thread: whether such a copy may be begun now.
    pub(super) fn check_copy_up(&self, top: FileId) -> Result<(), EngineError> {
        if self.is_suspended() || self.switching.load(Ordering::Acquire) {
            Err(EngineError::Suspended)
        } else if self.top() != top {
            Err(EngineError::TopChanged)
        } else if self.has_sync_failed() {
            Err(EngineError::SyncFailed)
        } else {
            Ok(())
        }
    }
}
