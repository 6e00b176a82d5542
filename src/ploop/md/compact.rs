//! A shorter file while the disk is in use.
//!
//! Clusters at its end move into free ones in front of them, as they do for a larger disk
//! (`grow`): their runners lock and copy them, a sync makes the copies stable, the runners map
//! them there, and a round takes the new map to the disk. Only then are the clusters where
//! they were given up, which go the way of every cluster that was unmapped ([`super::reclaim`]).
//!
//! The end of the file is cut off in steps of its own:
//!
//! 1. Clusters on their way back arrive: their pages are written, their holes punched, a sync
//!    makes that stable.
//! 2. Nothing is given out any more behind what was; whoever is about to take a cluster there
//!    has it by the end of its epoch.
//! 3. What is free at the end is taken out of the allocator, and the file is cut: nobody maps
//!    it, on disk or in memory, and no I/O uses it. How long the file is counts as stable up to
//!    the cut and no further, whatever sync is under way.
//! 4. Epochs end once more, for those who had looked where the file ends before that. Then it
//!    may become longer again.
//!
//! The file does not grow ahead of its writers any more until one of them needs space.

use std::collections::VecDeque;

use super::super::EngineError;
use super::super::control::Outcome;
use super::super::pio::{Home, Pio, Work};
use super::super::preempt;
use super::super::rule::{self, Rule};
use super::MdWriter;
use super::grow::{Growing, Move, Moving, Purpose, Stage, Step};
use crate::format::{GuestCluster, HostCluster, Packing};
use crate::storage::Disk;

impl<D: Disk> MdWriter<D> {
    pub(super) fn begin_squeeze(&self, cluster: GuestCluster, outcome: Outcome) {
        if let Err(error) = self.check_may_change() {
            return outcome.set(Err(error));
        }
        let pio = Pio {
            home: Home::of_other(outcome),
            work: Work::Squeeze { cluster },
            last_try: false,
        };
        self.engine.dispatch(cluster, pio);
    }

    pub(super) fn begin_move_down(
        &mut self,
        clusters: Vec<GuestCluster>,
        packing: Packing,
        outcome: Outcome,
    ) {
        if let Err(error) = self.check_may_compact() {
            return outcome.set(Err(error));
        }
        let free = self
            .engine
            .alloc()
            .take_below(packing.end(), clusters.len());
        // All of it, whether it belongs to the disk or not.
        let keep = self.geometry.cluster.bytes();
        let todo: VecDeque<_> = clusters
            .into_iter()
            .take(free.len())
            .map(|cluster| Move { cluster, keep })
            .collect();
        let stage = Stage::Moving(Moving::new(todo));
        let mut growing = Growing::new(None, self.geometry, outcome, stage);
        growing.purpose = Purpose::Packing(packing);
        growing.free = free.into();
        self.growing = Some(growing);
    }

    pub(super) fn begin_cut(&mut self, outcome: Outcome) {
        if let Err(error) = self.check_may_compact() {
            return outcome.set(Err(error));
        }
        let stage = Stage::Draining {
            before: self.reclaim.mark(),
        };
        let mut growing = Growing::new(None, self.geometry, outcome, stage);
        growing.purpose = Purpose::Cutting;
        self.await_round(&mut growing);
        self.growing = Some(growing);
    }

    fn check_may_compact(&self) -> Result<(), EngineError> {
        match self.growing {
            Some(_) => Err(EngineError::Growing),
            None => self.check_may_change(),
        }
    }

    /// While requests are held nothing is begun, so that all is quiet.
    fn check_may_change(&self) -> Result<(), EngineError> {
        let engine = &self.engine;
        if self.closed {
            Err(EngineError::Stopped)
        } else if engine.is_read_only() {
            Err(EngineError::ReadOnly)
        } else if engine.has_sync_failed() {
            Err(EngineError::SyncFailed)
        } else if engine.is_suspended() || self.is_top_closed {
            Err(EngineError::Suspended)
        } else {
            Ok(())
        }
    }

    /// Whether clusters are to come back though nobody needs them.
    pub(super) fn wants_all_back(&self) -> bool {
        let stage = self.growing.as_ref().map(|growing| &growing.stage);
        matches!(stage, Some(Stage::Draining { .. }))
    }

    pub(super) fn step_cut(&mut self, stage: Stage) -> Step {
        let engine = self.engine.clone();
        if engine.has_sync_failed() && !matches!(stage, Stage::Cut { .. }) {
            self.reopen_end(&stage);
            return Step::Failed(EngineError::SyncFailed);
        }
        match stage {
            Stage::Draining { before } if !self.reclaim.is_under_way_before(before) => {
                if self.space.is_extending() {
                    return Step::Wait(Stage::Draining { before });
                }
                self.space.begin_other_extension();
                let old_end = engine.alloc().close_end();
                preempt::point("end closed");
                Step::On(Stage::Closing {
                    epoch: engine.epochs.advance(),
                    old_end,
                })
            }
            Stage::Closing { epoch, old_end }
                if engine.epochs.all_reached(epoch) || !rule::kept(Rule::OldIoBeforeCut) =>
            {
                let result = self.cut_end(old_end);
                Step::On(Stage::Cut {
                    epoch: engine.epochs.advance(),
                    result,
                })
            }
            Stage::Cut { epoch, result }
                if engine.epochs.all_reached(epoch) || !rule::kept(Rule::OldIoBeforeCut) =>
            {
                self.reopen_end(&Stage::Cut { epoch, result });
                match result {
                    Ok(()) => Step::Done,
                    Err(error) => Step::Failed(error),
                }
            }
            stage => Step::Wait(stage),
        }
    }

    fn cut_end(&mut self, old_end: u32) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        let end = engine.alloc().cut_free();
        let end = end.max(self.geometry.first_host_cluster());
        // A sync under way vouches for no length behind the cut.
        self.covered.file_end = self.covered.file_end.min(end.0);
        if end.0 >= old_end {
            return Ok(());
        }
        preempt::point("end cut");
        let (top, len) = (engine.top(), self.geometry.host_offset(HostCluster(end.0)));
        // If it stays longer, what is behind is not used until the file is made longer.
        engine.disk.set_len(top, len).map_err(|error| {
            log::error!("cannot cut the image file: {error}");
            EngineError::Io(super::close::errno_of(&error))
        })
    }

    /// The file may become longer again, and where nothing was cut off, that is given out
    /// again.
    pub(super) fn reopen_end(&mut self, stage: &Stage) {
        match stage {
            Stage::Closing { old_end, .. } => self.engine.alloc().extend(*old_end),
            Stage::Cut { .. } => {
                self.engine.alloc().open_end();
                self.space.grow_ahead_no_more();
            }
            _ => return,
        }
        self.space.extension_ended();
    }
}
