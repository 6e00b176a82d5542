//! Levels that go while the disk is in use, step by step: what the thread does that asks the
//! engine for it, and what a cut leaves of a descriptor whose name is not stable.
//!
//! A file that is gone stays here, as one with nothing in it: the chain then reads as it does
//! without it, and all others keep their numbers.

use rand::Rng;
use rustix::io::Errno;

use super::cases::Case;
use super::checker::Image;
use super::session::{Failure, Session, World};
use super::shot::Shot;
use crate::ploop::rule::{self, Rule};
use crate::ploop::{CopyUp, CopyUpStep, EngineError};
use crate::storage::FileId;

/// How far it has come.
pub(super) enum Merge {
    No,
    Copying(CopyUp),
    /// The descriptor tells of a chain without the level.
    Named(CopyUp),
    /// That is stable.
    Stable,
}

/// A level of which the descriptor does not tell any more.
#[derive(Clone, Copy, Debug)]
pub struct Gone {
    level: FileId,
    /// Else a cut may leave the old descriptor.
    is_stable: bool,
    /// Its file is gone, too.
    is_emptied: bool,
}

impl Session {
    /// The next step, or none any more; or it goes on for a while.
    pub(super) fn merge(&mut self, world: &mut World) -> Result<(), Failure> {
        if world.is_merging {
            world.imagine_cut()?;
        }
        match std::mem::replace(&mut self.merge, Merge::No) {
            Merge::No => {
                let may_begin = world.scenario.levels > 1 && !self.engine.is_read_only();
                if may_begin && let Ok(copies) = CopyUp::new(&self.engine) {
                    world.disk.note(|| "a level is to go".to_owned());
                    world.is_merging = true;
                    // Those of the guest.
                    let stalled = Some((copies.level(), self.first_queue_io()));
                    let stalled = stalled.filter(|_| world.rng.random());
                    world.disk.change_medium(|medium| medium.stalled = stalled);
                    self.merge = Merge::Copying(copies);
                }
            }
            Merge::Copying(_) if world.rng.random_ratio(1, 40) => {
                world.disk.note(|| "the level stays".to_owned());
                world.disk.change_medium(|medium| medium.stalled = None);
                world.is_merging = false;
            }
            Merge::Copying(copies) => self.copy_more(world, copies)?,
            Merge::Named(copies) => {
                let is_stable = rule::kept(Rule::NameBeforeFileGoes);
                if let Some(gone) = &mut world.gone {
                    gone.is_stable = is_stable;
                }
                world.disk.note(|| "the descriptor is stable".to_owned());
                copies.end(&self.engine);
                self.merge = Merge::Stable;
                world.imagine_cut()?;
            }
            Merge::Stable => {
                world.empty_gone()?;
                world.disk.change_medium(|medium| medium.stalled = None);
                world.is_merging = false;
                world.cases.count(Case::Merge);
                self.levels -= 1;
                world.imagine_cut()?;
            }
        }
        Ok(())
    }

    fn copy_more(&mut self, world: &mut World, mut copies: CopyUp) -> Result<(), Failure> {
        let at_most = world.rng.random_range(0..5);
        let step = copies.step(&self.engine, at_most);
        world
            .disk
            .note(|| format!("level {}: {step:?}", copies.level().0));
        match step {
            // Whoever changes the descriptor does one thing at a time.
            Ok(CopyUpStep::Ready) if matches!(self.shot, Shot::No) => {
                world
                    .disk
                    .note(|| "the descriptor is without it".to_owned());
                world.gone = Some(Gone {
                    level: copies.level(),
                    is_stable: false,
                    is_emptied: false,
                });
                self.merge = Merge::Named(copies);
                for _ in 0..3 {
                    world.imagine_cut()?;
                }
                Ok(())
            }
            Ok(_) => {
                self.merge = Merge::Copying(copies);
                self.go_on_for_a_while(world)
            }
            Err(error) => {
                world.is_merging = false;
                let is_full = matches!(error, EngineError::Io(Errno::NOSPC))
                    && self.trouble.space_for_metadata;
                let is_over = matches!(error, EngineError::TopChanged | EngineError::Stopped);
                match is_over || is_full || self.trouble.explains(error) {
                    true => Ok(()),
                    false => Err(format!("I15: a level does not go: {error}")),
                }
            }
        }
    }

    /// Whether the descriptor is being changed for it.
    pub(super) fn is_naming(&self) -> bool {
        matches!(self.merge, Merge::Named(_))
    }

    /// Nothing new is begun for it. What was put in place is left to who opens the disk next.
    pub(super) fn end_merge(&mut self, world: &World) {
        world.disk.change_medium(|medium| medium.stalled = None);
        if matches!(self.merge, Merge::Copying(_)) {
            self.merge = Merge::No;
        }
    }
}

impl World {
    /// The lower levels as whoever opens the disk after a cut may find them.
    ///
    /// # Errors
    /// What cannot be opened.
    pub(super) fn choose_lower(&mut self) -> Result<Vec<Image>, Failure> {
        let mut lower = self.lower.clone();
        let Some(gone) = self.gone else {
            return Ok(lower);
        };
        if gone.is_stable || self.rng.random() {
            let image = &mut lower[usize::from(gone.level.0)];
            image.plain = false;
            image.map.clear();
        } else if gone.is_emptied {
            return Err("I15: the descriptor tells of a file that is gone".to_owned());
        }
        Ok(lower)
    }

    /// The power is back, or another process has come, and finds one of the descriptors.
    ///
    /// # Errors
    /// What cannot be opened.
    pub(super) fn find_gone(&mut self, may_be_old: bool) -> Result<(), Failure> {
        if let Some(gone) = self.gone {
            if may_be_old && !gone.is_stable && self.rng.random() {
                if gone.is_emptied {
                    return Err("I15: the descriptor tells of a file that is gone".to_owned());
                }
                self.gone = None;
                return Ok(());
            }
            self.empty_gone()?;
            self.gone = None;
        }
        Ok(())
    }

    /// The file of the level is gone.
    fn empty_gone(&mut self) -> Result<(), Failure> {
        let Some(gone) = self.gone else {
            return Ok(());
        };
        let index = usize::from(gone.level.0);
        let is_plain = self.lower[index].plain;
        self.disk.empty_file(gone.level, !is_plain);
        let image = self.disk.view(|view| self.read_image(view, gone.level))?;
        self.lower[index] = image;
        self.gone = (!gone.is_stable).then_some(Gone {
            is_emptied: true,
            ..gone
        });
        Ok(())
    }
}
