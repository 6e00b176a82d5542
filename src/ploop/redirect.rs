//! Makes levels needless while the disk is in use that have nothing which a level right above
//! them, not the top, does not have, too: what of the map is in them goes on in that one.
//!
//! That level got it from who has asked for this: a copy of each cluster that it lacked, stable,
//! its own map included. So it does not matter for any cluster in which of the two it is read,
//! nor when, and nobody is held for it:
//!
//! 1. The map is looked through, and each entry that is in one of the levels is exchanged for one
//!    in the level above, unless it is locked: who copies it into the top goes on with what it
//!    was.
//! 2. That is done again until there is none, locked or not.
//! 3. I/O ends that may have found such a level in the map before.
//! 4. From here on the levels are needed by nobody; see `copy_up.rs`.
//!
//! On disk nothing changes: in the top such an entry is a hole.

use std::time::Duration;

use super::EngineError;
use super::control::{Control, Outcome};
use super::engine::Engine;
use super::entry::Entry;
use super::levels::Needless;
use super::rule::{self, Rule};
use crate::format::{GuestCluster, HostCluster};
use crate::storage::{Disk, FileId};

/// Entries that are looked at in a step.
const SCAN_AT_ONCE: u32 = 1 << 20;

/// See the module's text. Dropped, it is given up: entries that were exchanged stay.
pub struct Redirect {
    levels: Needless,
    /// The one above them.
    to: FileId,
    stage: Stage,
}

enum Stage {
    Looking {
        /// Where to look on.
        next: u32,
        /// Something was left since the map was looked at from its start.
        has_left: bool,
    },
    Settling(Outcome),
    Ready,
}

/// What a step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedirectStep {
    /// There is more to do at once.
    On,
    /// There is nothing to do until something ends that others have under way.
    Waits,
    /// The disk needs the levels no more.
    Ready,
}

impl Redirect {
    /// From all levels from `lowest` on to the one above them, which is not the top.
    pub fn new(lowest: FileId, to: FileId) -> Self {
        Self {
            levels: Needless::new(lowest, to),
            to,
            stage: Stage::begin(),
        }
    }

    /// Goes on; `place` says where the level above has a cluster that one of them has, and that it
    /// has none for it is to mean that it is a hole. Never blocks.
    ///
    /// # Errors
    /// The lock is lost, or the disk cannot be flushed: it is what it was.
    pub fn step<D: Disk>(
        &mut self,
        engine: &Engine<D>,
        place: impl Fn(GuestCluster) -> Option<HostCluster>,
    ) -> Result<RedirectStep, EngineError> {
        if engine.has_lost_lock() {
            return Err(EngineError::LockLost);
        }
        match &mut self.stage {
            Stage::Looking { next, has_left } => {
                let end = next.saturating_add(SCAN_AT_ONCE);
                for entry in engine.bat.range(*next..end) {
                    let cluster = GuestCluster(*next);
                    *next += 1;
                    if !self.levels.has(entry.place()) {
                        continue;
                    }
                    let to = match place(cluster) {
                        Some(host) => Entry::mapped(self.to, host),
                        None => Entry::HOLE,
                    };
                    let is_exchanged = !entry.is_locked()
                        && engine.bat.replace(cluster, entry, to.after(entry)).is_ok();
                    *has_left |= !is_exchanged;
                }
                if *next < engine.bat.len() {
                    return Ok(RedirectStep::On);
                }
                if *has_left && rule::kept(Rule::CopiesEndBeforeDrop) {
                    self.stage = Stage::begin();
                    return Ok(RedirectStep::Waits);
                }
                self.stage = Stage::Settling(engine.control(Control::Barrier));
                Ok(RedirectStep::Waits)
            }
            Stage::Settling(outcome) => match outcome.get() {
                None => Ok(RedirectStep::Waits),
                Some(Ok(())) => {
                    self.stage = Stage::Ready;
                    Ok(RedirectStep::Ready)
                }
                Some(Err(error)) => {
                    self.stage = Stage::begin();
                    Err(error)
                }
            },
            Stage::Ready => Ok(RedirectStep::Ready),
        }
    }

    /// Waits for what others have under way, but not for longer than this.
    pub fn wait(&self, at_most: Duration) {
        match &self.stage {
            Stage::Looking { .. } => std::thread::sleep(at_most),
            Stage::Settling(outcome) => drop(outcome.wait_for(at_most)),
            Stage::Ready => {}
        }
    }

    /// The levels, once nobody needs them.
    pub fn into_levels(self) -> Needless {
        self.levels
    }
}

impl Stage {
    fn begin() -> Self {
        Self::Looking {
            next: 0,
            has_left: false,
        }
    }
}
