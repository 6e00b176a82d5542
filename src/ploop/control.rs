//! Operations on the running engine as a whole, asked by the control thread and
//! carried out by the metadata thread.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::EngineError;
use crate::format::Sector;

/// What the control thread can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    /// Wait for all I/O that has started, then flush.
    Barrier,
    /// Hold new requests, wait for those under way, flush.
    Suspend,
    /// Take requests again.
    Resume,
    /// Suspend for good, trim the file and mark it closed.
    Close,
    /// The same for somebody who opens the file at once: it is not trimmed, and nothing is
    /// synced after the flush. If that fails, requests are taken again as after
    /// [`Self::Resume`].
    Pass,
    /// The same as [`Self::Close`] for somebody on another host, perhaps, whose guest goes on
    /// only if the mark says that everything is there. If not everything can be made stable,
    /// the mark included, requests are taken again as after [`Self::Resume`], of an image that
    /// is marked as in use.
    HandOver {
        /// Whether all of the file is trimmed that is not used. That may take seconds, in which
        /// a guest stands still.
        trims: bool,
    },
    /// Do all that a larger disk takes, beside the I/O.
    PrepareGrowth(Sector),
    /// Make the disk as large as it was prepared for.
    CommitGrowth,
    /// Leave the disk as it is.
    AbandonGrowth,
    /// Cut off what is free at the end of the top's file.
    CutTail,
    /// Hold new requests, wait for those under way, flush, and mark the top as closed: a new
    /// one is about to be put on it. Requests are held until [`Self::SwitchTop`] or
    /// [`Self::KeepTop`]; if this fails, they are taken again at once.
    CloseTop,
    /// The new top of [`Engine::switch_top`](super::Engine::switch_top) takes the place of the
    /// closed one, and requests are taken again.
    SwitchTop,
    /// Requests are taken again, and go to the top as before [`Self::CloseTop`].
    KeepTop,
}

impl Control {
    /// Whether the engine ends with it, if it succeeds.
    pub const fn is_end(self) -> bool {
        matches!(self, Self::Close | Self::Pass | Self::HandOver { .. })
    }

    /// Whether nothing is done to the file that another opening would find as well.
    pub const fn leaves_file_alone(self) -> bool {
        matches!(
            self,
            Self::Pass | Self::CloseTop | Self::HandOver { trims: false }
        )
    }

    /// Whether requests are taken again if what is under way cannot be made stable.
    pub const fn can_go_on(self) -> bool {
        matches!(self, Self::Pass | Self::CloseTop | Self::HandOver { .. })
    }
}

/// The answer, sooner or later.
#[derive(Clone, Default)]
pub(crate) struct Outcome {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    result: Mutex<Option<Result<(), EngineError>>>,
    is_there: Condvar,
}

impl Outcome {
    pub fn set(&self, result: Result<(), EngineError>) {
        let mut outcome = self
            .shared
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *outcome = Some(result);
        self.shared.is_there.notify_all();
    }

    /// The answer, if it is there.
    pub fn get(&self) -> Option<Result<(), EngineError>> {
        *self
            .shared
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::wait`], if it is there in time.
    pub fn wait_for(&self, at_most: Duration) -> Option<Result<(), EngineError>> {
        let outcome = self
            .shared
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (outcome, _) = self
            .shared
            .is_there
            .wait_timeout_while(outcome, at_most, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        *outcome
    }

    pub fn wait(&self) -> Result<(), EngineError> {
        let outcome = self
            .shared
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let outcome = self
            .shared
            .is_there
            .wait_while(outcome, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        outcome.unwrap_or(Err(EngineError::Stopped))
    }
}
