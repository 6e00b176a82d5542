//! Levels that go while the disk is in use, step by step: what the thread does that asks the
//! engine for it, and what a cut leaves of a descriptor whose name is not stable.
//!
//! A file that is gone stays here, as one with nothing in it: the chain then reads as it does
//! without it, and all others keep their numbers.

use rand::Rng;
use rustix::io::Errno;

use super::cases::Case;
use super::checker::Image;
use super::lift::Lifting;
use super::session::{Failure, Session, World};
use super::shot::Shot;
use crate::image::LiftStep;
use crate::ploop::rule::{self, Rule};
use crate::ploop::{CopyUp, CopyUpStep, EngineError, Needless, Redirect, RedirectStep};
use crate::storage::FileId;

/// How far it has come.
pub(super) enum Merge {
    No,
    /// Into the top.
    Copying(CopyUp),
    /// Into another one.
    Lifting(Box<Lifting>),
    Redirecting(Box<Lifting>, Redirect),
    /// The descriptor tells of a chain without the levels.
    Named(Needless),
    /// That is stable.
    Stable,
}

/// Levels of which the descriptor does not tell any more.
#[derive(Clone, Debug)]
pub struct Gone {
    levels: Vec<FileId>,
    /// Else a cut may leave the old descriptor.
    is_stable: bool,
    /// Their files are gone, too.
    are_emptied: bool,
}

impl Session {
    /// The next step, or none any more; or it goes on for a while.
    pub(super) fn merge(&mut self, world: &mut World) -> Result<(), Failure> {
        if world.is_merging {
            world.imagine_cut()?;
        }
        match std::mem::replace(&mut self.merge, Merge::No) {
            Merge::No => self.begin_merge(world)?,
            Merge::Copying(_) if world.rng.random_ratio(1, 40) => self.give_up_merge(world),
            Merge::Lifting(mut it) if world.rng.random_ratio(1, 40) => {
                if world.rng.random() && world.change_level(it.to, || it.lift.close()).is_ok() {
                    world.level_is_closed(it.to)?;
                }
                self.give_up_merge(world);
            }
            Merge::Copying(copies) => self.copy_more(world, copies)?,
            Merge::Lifting(it) => self.lift_more(world, it)?,
            Merge::Redirecting(..) if world.rng.random_ratio(1, 20) => self.give_up_merge(world),
            Merge::Redirecting(it, redirect) => self.redirect_more(world, it, redirect)?,
            Merge::Named(levels) => {
                let is_stable = rule::kept(Rule::NameBeforeFileGoes);
                if let Some(gone) = &mut world.gone {
                    gone.is_stable = is_stable;
                }
                world.disk.note(|| "the descriptor is stable".to_owned());
                levels.drop_from_chain(&self.engine);
                self.merge = Merge::Stable;
                world.imagine_cut()?;
            }
            Merge::Stable => {
                let gone = world.gone.as_ref().map_or(0, |gone| gone.levels.len());
                world.empty_gone()?;
                world.disk.change_medium(|medium| medium.stalled = None);
                world.is_merging = false;
                world.cases.count(Case::Merge);
                self.levels -= gone;
                world.imagine_cut()?;
            }
        }
        Ok(())
    }

    fn begin_merge(&mut self, world: &mut World) -> Result<(), Failure> {
        let levels: Vec<_> = self.engine.level_shapes().map(|level| level.file).collect();
        if levels.len() < 2 || self.engine.is_read_only() || !matches!(self.shot, Shot::No) {
            return Ok(());
        }
        let lower = &levels[..levels.len() - 1];
        // Mostly those of the neighbour.
        let count = *[1, 1, 2, 3].get(world.rng.random_range(0..4)).unwrap_or(&1);
        let count = lower.len().min(count);
        let begun = if lower.len() > count && world.rng.random() {
            let from = world.rng.random_range(0..lower.len() - count);
            match world.begin_lift(&lower[from..=from + count]) {
                Ok(lifting) => Merge::Lifting(Box::new(lifting)),
                // It cannot be read.
                Err(_) if self.trouble.may_fail() || !world.disk.is_powered() => return Ok(()),
                Err(error) => return Err(format!("I15: a level cannot be copied: {error}")),
            }
        } else {
            let lowest = lower[lower.len() - count];
            match CopyUp::new(&self.engine, Some(lowest)) {
                Ok(copies) => Merge::Copying(copies),
                Err(_) => return Ok(()),
            }
        };
        world.disk.note(|| "levels are to go".to_owned());
        world.is_merging = true;
        // Reads of the guest.
        let going = match &begun {
            Merge::Copying(copies) => copies.levels(&self.engine),
            Merge::Lifting(it) => vec![it.lowest],
            _ => Vec::new(),
        };
        let stalled = going.last().map(|level| (*level, self.first_queue_io()));
        let stalled = stalled.filter(|_| world.rng.random());
        world.disk.change_medium(|medium| medium.stalled = stalled);
        self.merge = begun;
        Ok(())
    }

    fn give_up_merge(&mut self, world: &mut World) {
        world.disk.note(|| "the levels stay".to_owned());
        world.disk.change_medium(|medium| medium.stalled = None);
        world.is_merging = false;
    }

    fn copy_more(&mut self, world: &mut World, mut copies: CopyUp) -> Result<(), Failure> {
        let at_most = world.rng.random_range(0..5);
        let step = copies.step(&self.engine, at_most);
        world.disk.note(|| format!("levels into the top: {step:?}"));
        match step {
            // Whoever changes the descriptor does one thing at a time.
            Ok(CopyUpStep::Ready) if matches!(self.shot, Shot::No) => {
                self.name(world, copies.into_levels())
            }
            Ok(_) => {
                self.merge = Merge::Copying(copies);
                self.go_on_for_a_while(world)
            }
            Err(error) => self.merge_fails(world, error),
        }
    }

    fn lift_more(&mut self, world: &mut World, mut it: Box<Lifting>) -> Result<(), Failure> {
        let step = world.change_level(it.to, || it.lift.step());
        world
            .disk
            .note(|| format!("into level {}: {step:?}", it.to.0));
        match step {
            Ok(LiftStep::Done) => {
                if rule::kept(Rule::LevelMapBeforeDrop) {
                    world.level_is_closed(it.to)?;
                }
                let redirect = Redirect::new(it.lowest, it.to);
                self.merge = Merge::Redirecting(it, redirect);
                world.imagine_cut()
            }
            Ok(_) => {
                self.merge = Merge::Lifting(it);
                world.imagine_cut()?;
                self.go_on_for_a_while(world)
            }
            Err(_) if self.trouble.may_fail() || !world.disk.is_powered() => {
                self.give_up_merge(world);
                Ok(())
            }
            Err(error) => Err(format!("I15: a level is not copied: {error}")),
        }
    }

    fn redirect_more(
        &mut self,
        world: &mut World,
        it: Box<Lifting>,
        mut redirect: Redirect,
    ) -> Result<(), Failure> {
        let step = redirect.step(&self.engine, |guest| it.lift.place(guest));
        world.disk.note(|| format!("redirected: {step:?}"));
        match step {
            Ok(RedirectStep::Ready) if matches!(self.shot, Shot::No) => {
                world.cases.count(Case::Lift);
                self.name(world, redirect.into_levels())
            }
            Ok(_) => {
                self.merge = Merge::Redirecting(it, redirect);
                self.go_on_for_a_while(world)
            }
            Err(error) => self.merge_fails(world, error),
        }
    }

    /// The descriptor tells of a chain without them.
    fn name(&mut self, world: &mut World, levels: Needless) -> Result<(), Failure> {
        world
            .disk
            .note(|| "the descriptor is without them".to_owned());
        world.gone = Some(Gone {
            levels: levels.files(&self.engine),
            is_stable: false,
            are_emptied: false,
        });
        self.merge = Merge::Named(levels);
        for _ in 0..3 {
            world.imagine_cut()?;
        }
        Ok(())
    }

    fn merge_fails(&mut self, world: &mut World, error: EngineError) -> Result<(), Failure> {
        world.is_merging = false;
        let is_full =
            matches!(error, EngineError::Io(Errno::NOSPC)) && self.trouble.space_for_metadata;
        let is_over = matches!(error, EngineError::TopChanged | EngineError::Stopped);
        match is_over || is_full || self.trouble.explains(error) {
            true => Ok(()),
            false => Err(format!("I15: a level does not go: {error}")),
        }
    }

    /// Whether the descriptor is being changed for it.
    pub(super) fn is_naming(&self) -> bool {
        matches!(self.merge, Merge::Named(_))
    }

    /// Nothing new is begun for it. What was put in place is left to who opens the disk next.
    pub(super) fn end_merge(&mut self, world: &World) {
        world.disk.change_medium(|medium| medium.stalled = None);
        if matches!(
            self.merge,
            Merge::Copying(_) | Merge::Lifting(_) | Merge::Redirecting(..)
        ) {
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
        let Some(gone) = self.gone.clone() else {
            return Ok(lower);
        };
        if gone.is_stable || self.rng.random() {
            for level in gone.levels {
                let image = &mut lower[usize::from(level.0)];
                image.plain = false;
                image.map.clear();
            }
        } else if gone.are_emptied {
            return Err("I15: the descriptor tells of a file that is gone".to_owned());
        }
        Ok(lower)
    }

    /// The power is back, or another process has come, and finds one of the descriptors.
    ///
    /// # Errors
    /// What cannot be opened.
    pub(super) fn find_gone(&mut self, may_be_old: bool) -> Result<(), Failure> {
        if let Some(gone) = &self.gone {
            if may_be_old && !gone.is_stable && self.rng.random() {
                if gone.are_emptied {
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

    /// The files of the levels are gone.
    fn empty_gone(&mut self) -> Result<(), Failure> {
        let Some(gone) = self.gone.clone() else {
            return Ok(());
        };
        for level in &gone.levels {
            let index = usize::from(level.0);
            let is_plain = self.lower[index].plain;
            self.disk.empty_file(*level, !is_plain);
            let image = self.disk.view(|view| self.read_image(view, *level))?;
            self.lower[index] = image;
            self.changing_is_over(*level);
        }
        self.gone = (!gone.is_stable).then_some(Gone {
            are_emptied: true,
            ..gone
        });
        Ok(())
    }
}
