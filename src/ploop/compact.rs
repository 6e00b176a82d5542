//! Giving back space while the disk is in use: what the engine does for it, cluster by
//! cluster.
//!
//! [`Engine::squeeze`] makes holes of the zeros in a cluster, or unmaps it; see
//! `runner/squeeze.rs`. [`Engine::move_down`] moves clusters from the end of the file into
//! those that are free in front of it, and [`Engine::cut_tail`] cuts off what is free at the
//! end: both are the metadata thread's, see `md/compact.rs`. Who calls them, in which order
//! and how fast, is for others to say.

use std::time::Duration;

use super::EngineError;
use super::control::{Control, Outcome};
use super::engine::{Engine, MdMessage};
use super::entry::{Entry, Place};
use crate::format::{GuestCluster, Packing};
use crate::storage::{Disk, FileId};

/// How often it is looked, while something is waited for, whether that may go on.
const LOOK: Duration = Duration::from_millis(50);

impl<D: Disk> Engine<D> {
    /// Where a cluster is in the file of the top, in bytes, if it is there.
    pub(crate) fn place_in_top(&self, cluster: GuestCluster) -> Option<(FileId, u64)> {
        match self.bat.get(cluster).place() {
            Place::In(file, host) if file == self.top() => {
                Some((file, self.level(file).offset(host)))
            }
            _ => None,
        }
    }

    /// Has the zeros of a cluster given back, if the top has it.
    pub(crate) fn squeeze(&self, cluster: GuestCluster) -> Outcome {
        let outcome = Outcome::default();
        // By way of the thread that knows whether anything may be begun.
        self.ask_md(MdMessage::Squeeze {
            cluster,
            outcome: outcome.clone(),
        });
        outcome
    }

    /// Whether a cluster of zeros may be unmapped.
    pub(crate) fn can_unmap_zeros(&self) -> bool {
        self.can_unmap()
    }

    /// How many clusters of the top are mapped now.
    pub(crate) fn mapped_in_top(&self) -> u32 {
        let top = self.top();
        let in_top = |entry: &Entry| matches!(entry.place(), Place::In(file, _) if file == top);
        let mapped = self.bat.iter().filter(in_top).count();
        u32::try_from(mapped).unwrap_or(u32::MAX)
    }

    /// Where the file of the top would end without gaps, as of now.
    pub(crate) fn packing(&self) -> Packing {
        Packing::new(&self.geometry(), self.mapped_in_top())
    }

    /// Clusters that lie behind that end, at most so many, and how many there are in all.
    pub(crate) fn behind(&self, packing: Packing, at_most: usize) -> (Vec<GuestCluster>, usize) {
        let entries = (0..).map(GuestCluster).zip(self.bat.iter());
        let behind = entries.filter(|(_, entry)| match entry.place() {
            Place::In(file, host) => file == self.top() && packing.is_behind(host),
            Place::Hole => false,
        });
        let mut behind = behind.map(|(cluster, _)| cluster);
        let first: Vec<_> = behind.by_ref().take(at_most).collect();
        let count = first.len() + behind.count();
        (first, count)
    }

    /// Moves these clusters in front of that end, as far as clusters are free there. What is
    /// free there for others is not taken from them for long: if it is needed, they get more.
    pub(crate) fn move_down(&self, clusters: Vec<GuestCluster>, packing: Packing) -> Outcome {
        let outcome = Outcome::default();
        self.ask_md(MdMessage::MoveDown {
            clusters,
            packing,
            outcome: outcome.clone(),
        });
        outcome
    }

    /// Makes clusters free that were used, and cuts off those that are free at the end of the
    /// file.
    pub(crate) fn cut_tail(&self) -> Outcome {
        self.control(Control::CutTail)
    }

    /// Waits for one of these, unless the engine is suspended or has lost its lock: then it
    /// comes to nothing.
    pub(crate) fn wait_unless_held(&self, outcome: &Outcome) -> Result<(), EngineError> {
        loop {
            if let Some(result) = outcome.wait_for(LOOK) {
                return result;
            }
            if self.is_suspended() || self.has_lost_lock() {
                self.abandon_growth();
            }
        }
    }
}
