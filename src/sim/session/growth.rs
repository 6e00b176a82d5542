//! Disks that become larger while they are used, step by step.

use rand::Rng;

use super::{Failure, Session, World};
use crate::format::Sector;
use crate::ploop::EngineError;
use crate::ploop::control::{Control, Outcome};
use crate::sim::cases::Case;
use crate::sim::file::SECTOR;

/// A disk on its way to be so many sectors large.
pub(super) enum Larger {
    No,
    Preparing(Outcome, u64),
    Prepared(u64),
    Committing(Outcome, u64),
}

impl Session {
    /// The next step to a larger disk, or none any more; or it goes on for a while.
    pub(super) fn grow(&mut self, world: &mut World) -> Result<(), Failure> {
        match &self.larger {
            Larger::No => {
                // Once more, perhaps, of what could not be made stable.
                let pending = world.sizes.iter().copied().max();
                let pending = pending.filter(|size| *size > world.scenario.disk_sectors);
                let next = world.scenario.sizes_to_come.first().copied();
                let Some(size) = pending.or(next) else {
                    return Ok(());
                };
                if world.scenario.is_plain_top() && !self.profile.read_only {
                    world.scenario.forget_behind();
                    world.before.behind.clear();
                    let bytes = |sectors: u64| sectors * SECTOR as u64;
                    world.raw_lens.push(bytes(world.scenario.disk_sectors));
                    world.raw_lens.push(bytes(size));
                }
                world
                    .disk
                    .note(|| format!("a disk of {size} sectors is prepared"));
                world.is_growing = true;
                let outcome = self.engine.control(Control::PrepareGrowth(Sector(size)));
                self.larger = Larger::Preparing(outcome, size);
            }
            Larger::Prepared(size) => {
                let size = *size;
                if world.rng.random_ratio(1, 8) {
                    self.engine.abandon_growth();
                    world.is_growing = false;
                    self.larger = Larger::No;
                    return Ok(());
                }
                world.sizes.push(size);
                let outcome = self.engine.control(Control::CommitGrowth);
                self.larger = Larger::Committing(outcome, size);
            }
            Larger::Preparing(..) if world.rng.random_ratio(1, 40) => {
                self.engine.abandon_growth();
            }
            // It takes many steps, and sessions are short.
            Larger::Preparing(..) | Larger::Committing(..) => self.go_on_for_a_while(world)?,
        }
        Ok(())
    }

    pub(super) fn hear_of_growth(&mut self, world: &mut World) -> Result<(), Failure> {
        let (outcome, size) = match &self.larger {
            Larger::Preparing(outcome, size) | Larger::Committing(outcome, size) => {
                (outcome, *size)
            }
            Larger::No | Larger::Prepared(_) => return Ok(()),
        };
        let Some(result) = outcome.get() else {
            return Ok(());
        };
        world
            .disk
            .note(|| format!("disk of {size} sectors: {result:?}"));
        let was_committing = matches!(self.larger, Larger::Committing(..));
        self.larger = match (result, was_committing) {
            (Ok(()), false) => Larger::Prepared(size),
            (Ok(()), true) => {
                world.set_size(size);
                world.cases.count(Case::Larger);
                // What the disk has from now on is judged at once.
                world.imagine_cut()?;
                Larger::No
            }
            (Err(error), _) => {
                let is_full = error == EngineError::NoSpace && self.trouble.space_in_doubt;
                // Closed, given up, or one that was given up is not over.
                let is_ended = matches!(
                    error,
                    EngineError::Stopped | EngineError::NotPrepared | EngineError::Growing
                );
                // Sent before it was, perhaps.
                let is_ended = is_ended || error == EngineError::Suspended;
                if !is_full && !is_ended && !self.trouble.explains(error) {
                    return Err(format!("I15: the disk did not grow: {error}"));
                }
                Larger::No
            }
        };
        world.is_growing = !matches!(self.larger, Larger::No);
        Ok(())
    }
}
