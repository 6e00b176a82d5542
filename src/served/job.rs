//! Long work on a disk that is being served, done step by step.
//!
//! A [`Job`] knows what is to be done, and nothing of who has it done: that one calls
//! [`step`](Job::step) as long as there is more to do, always on the same thread, which makes
//! all changes of the bundle. Between two steps it decides whether the next one comes now,
//! later (a pause, a limit, a guest that has the disk to itself meanwhile) or never. So a step
//! should take a tenth of a second at most, but for the time that the host takes, and leave
//! nothing under way that could not stay so for hours; and the disk may be closed, handed
//! over, or lost to a power cut after each.
//!
//! By law I15 a job that is cut anywhere leaves the old or the new state, each complete.

use std::sync::Arc;

use thiserror::Error;

use super::delete::Deleted;
use crate::format::Guid;
use crate::image::{Bundle, ImageError};
use crate::ploop::{Engine, EngineError};
use crate::storage::Disk;

/// What a job works on.
pub struct Site<'a, D: Disk> {
    /// The disk.
    pub engine: &'a Arc<Engine<D>>,
    /// What it belongs to, if to any. Others may have changed the descriptor since the last
    /// step: see [`Bundle::refresh`].
    pub bundle: Option<&'a mut Bundle>,
    /// So many bytes should a step read or write at most, whichever is more; it may do with a
    /// cluster in any case.
    pub at_most: u64,
}

/// See the module's text.
pub trait Job<D: Disk>: Send {
    /// Does a part of the work.
    ///
    /// # Errors
    /// See [`JobError`]. It is not called again then, and what was not committed is taken back
    /// already: [`Self::cancel`] is not called either.
    fn step(&mut self, site: &mut Site<'_, D>) -> Result<Step, JobError>;

    /// How far it is.
    fn progress(&self) -> Progress;

    /// It is not to go on: takes back what is not committed, and waits for what it has under
    /// way. What was gained so far may stay. The job is dropped then. Never called in a step.
    fn cancel(&mut self, site: &mut Site<'_, D>);

    /// The snapshot that it has deleted, once, when it is done: whoever has the image open has
    /// to know.
    fn take_deleted(&mut self) -> Option<Deleted> {
        None
    }
}

/// What a step has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more to do.
    More {
        /// So many bytes of the disk were read or written for this step, the larger number of
        /// the two: what a limit on the speed of the job counts.
        bytes: u64,
    },
    /// The host has no space for the next step: it is tried again after a while.
    HostFull,
    /// Nothing can be done at present, for another reason: likewise.
    Later,
    /// All is done, committed and stable.
    Done,
}

/// How far a job is, in units of its own, usually bytes. Both may grow: a disk that is in use
/// changes meanwhile. Whoever shows it may rely on `done` never being more than `total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is done.
    pub done: u64,
    /// What there is to do in all, as far as is known.
    pub total: u64,
}

/// Why a job came to nothing.
#[derive(Debug, Error)]
pub enum JobError {
    /// The engine cannot, or the host.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A file of the bundle cannot be read, made or replaced, or the descriptor.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is nothing of the kind that it needs, in words.
    #[error("{0}")]
    Impossible(&'static str),
    /// No snapshot has all of these.
    #[error("there is no snapshot with {}", said_of(.guid, .description))]
    NoSuchSnapshot {
        /// Its name.
        guid: Option<Guid>,
        /// What it is for.
        description: Option<String>,
    },
}

fn said_of(guid: &Option<Guid>, description: &Option<String>) -> String {
    let guid = guid.map(|guid| format!("the GUID {guid}"));
    let description = description.as_ref();
    let description = description.map(|text| format!("the description {text:?}"));
    let said: Vec<_> = guid.into_iter().chain(description).collect();
    said.join(" and ")
}
