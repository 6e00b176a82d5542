//! Lends the driver to the threads that it drives, for the time of a step.
//!
//! A thread that is preempted in the midst of a step ([`preempt`](crate::ploop::preempt))
//! knows nothing of the driver that gave it its turn. So the driver leaves word of where
//! it is before each step, and does not look at itself until the step is over.

use std::cell::Cell;
use std::ptr::NonNull;

use super::session::{Session, World};

thread_local! {
    /// Of the driver of this thread, while it waits for the end of a step.
    static STAGE: Cell<Option<Stage>> = const { Cell::new(None) };
}

/// A driver that waits for the end of a step.
#[derive(Clone, Copy)]
pub struct Stage {
    session: NonNull<Session>,
    world: NonNull<World>,
}

impl Stage {
    /// Does a step, in the midst of which [`preempted`] finds these two.
    pub fn lend<R>(session: &mut Session, world: &mut World, step: impl FnOnce() -> R) -> R {
        let stage = Self {
            session: NonNull::from(session),
            world: NonNull::from(world),
        };
        let before = STAGE.replace(Some(stage));
        let result = step();
        STAGE.set(before);
        result
    }
}

/// The thread that does a step is at this point: others go on, if the driver wants.
pub fn preempted(at: &'static str) {
    // Taken: while they are used here nobody else finds them.
    let Some(mut stage) = STAGE.take() else {
        return;
    };
    // SAFETY: made from an exclusive reference by `lend`, which is waiting for the end
    // of the step that called this and uses the reference no more until then; nobody
    // else has the pointer, as it was taken.
    let session = unsafe { stage.session.as_mut() };
    // SAFETY: as above.
    let world = unsafe { stage.world.as_mut() };
    session.preempt(world, at);
    STAGE.set(Some(stage));
}
