//! Snapshots, step by step: what the thread does that asks the engine for them, and what a
//! cut leaves of a descriptor whose name is not stable.
//!
//! The new file is there from the moment on in which a descriptor names it: before, it is
//! nobody's business.

use std::sync::atomic::Ordering;

use rand::Rng;
use rustix::io::Errno;

use super::cases::Case;
use super::checker::Image;
use super::file::{SECTOR, SimFile};
use super::judge::Before;
use super::model::Flush;
use super::scenario::DELTAS_MAX;
use super::session::{Failure, Session, World};
use super::view::View;
use crate::ploop::EngineError;
use crate::ploop::control::{Control, Outcome};
use crate::ploop::rule::{self, Rule};
use crate::storage::{FileId, SharedWords};

/// How far a snapshot has come.
pub(super) enum Shot {
    No,
    /// Requests are about to be held.
    Closing(Outcome, Flush),
    /// The top is closed.
    Closed,
    /// The descriptor names the new top.
    Named {
        is_stable: bool,
    },
    /// The new top is about to be used, or the old one again.
    Ending(Outcome),
}

impl Session {
    /// The next step to a snapshot, or back; or it goes on for a while.
    pub(super) fn snapshot(&mut self, world: &mut World) -> Result<(), Failure> {
        if world.is_snapshotting {
            for _ in 0..2 {
                world.imagine_cut()?;
            }
        }
        match &self.shot {
            Shot::No => {
                let is_read_only = self.engine.is_read_only();
                let is_changing = self.is_suspended() || self.is_naming();
                if world.scenario.levels >= DELTAS_MAX || is_read_only || is_changing {
                    return Ok(());
                }
                world.disk.note(|| "a snapshot begins".to_owned());
                world.is_snapshotting = true;
                if world.scenario.is_plain_top() {
                    world.scenario.forget_behind();
                    world.before.behind.clear();
                    let bytes = world.scenario.disk_sectors * SECTOR as u64;
                    world.raw_lens.push(bytes);
                }
                let flush = world.model.begin_flush();
                self.shot = Shot::Closing(self.engine.control(Control::CloseTop), flush);
            }
            Shot::Closed if world.rng.random_ratio(1, 6) => {
                let top = world.scenario.top();
                world
                    .disk
                    .change_medium(|medium| medium.first_writable = top);
                world.disk.note(|| "the old top is kept".to_owned());
                self.shot = Shot::Ending(self.engine.keep_top());
            }
            Shot::Closed => self.name_new_top(world)?,
            Shot::Named { is_stable: false } if rule::kept(Rule::NameBeforeUse) => {
                world.adopt_new_top()?;
                self.shot = Shot::Named { is_stable: true };
                world.imagine_cut()?;
            }
            Shot::Named { .. } => {
                world.disk.note(|| "the new top is to be used".to_owned());
                let header = self.new_header()?;
                self.shot = Shot::Ending(self.engine.switch_top(header, true));
            }
            // It takes some steps, and sessions are short.
            Shot::Closing(..) | Shot::Ending(_) => self.go_on_for_a_while(world)?,
        }
        Ok(())
    }

    fn new_header(&self) -> Result<crate::format::Header, Failure> {
        let header = self.engine.header_on_top();
        header.map_err(|error| format!("I15: there is no header for a new top: {error}"))
    }

    fn name_new_top(&mut self, world: &mut World) -> Result<(), Failure> {
        let header = self.new_header()?;
        let len = header.geometry().data_start;
        world
            .disk
            .note(|| "the descriptor names a new top".to_owned());
        let is_stable = rule::kept(Rule::NewTopBeforeName);
        world.disk.add_file(&header.to_bytes(), len, is_stable);
        world.is_either = true;
        self.shot = Shot::Named { is_stable: false };
        for _ in 0..3 {
            world.imagine_cut()?;
        }
        Ok(())
    }

    pub(super) fn hear_of_snapshot(&mut self, world: &mut World) -> Result<(), Failure> {
        let outcome = match &self.shot {
            Shot::Closing(outcome, _) | Shot::Ending(outcome) => outcome.get(),
            _ => None,
        };
        let Some(result) = outcome else {
            return Ok(());
        };
        world.disk.note(|| format!("snapshot: {result:?}"));
        match std::mem::replace(&mut self.shot, Shot::No) {
            Shot::Closing(_, flush) if result.is_ok() => {
                self.judge(world, "close the top", &flush, result)?;
                self.check_quiet(world, "the top is closed")?;
                let first_writable = FileId(world.scenario.top().0 + 1);
                world
                    .disk
                    .change_medium(|medium| medium.first_writable = first_writable);
                world.check_snapshot()?;
                self.shot = Shot::Closed;
                world.imagine_cut()?;
            }
            Shot::Closing(_, flush) => {
                world.is_snapshotting = false;
                let is_refused = matches!(
                    result,
                    Err(EngineError::Suspended
                        | EngineError::Growing
                        | EngineError::HalfGrown
                        | EngineError::Stopped)
                );
                if !is_refused {
                    self.judge(world, "close the top", &flush, result)?;
                }
            }
            Shot::Ending(_) => {
                world.is_snapshotting = false;
                let levels = self.engine.level_shapes().count();
                world.cases.count_if(Case::Snapshot, levels > self.levels);
                self.levels = levels;
                match result {
                    Ok(()) | Err(EngineError::Stopped) => {}
                    Err(error) if self.trouble.explains(error) => {}
                    Err(EngineError::Io(Errno::NOSPC)) if self.trouble.space_for_metadata => {}
                    Err(error) => {
                        return Err(format!("I15: no top is used any more: {error}"));
                    }
                }
                world.imagine_cut()?;
            }
            other => self.shot = other,
        }
        Ok(())
    }

    /// Whether the top is used on and could not be marked so, which counts as a failed sync.
    pub(super) fn is_unmarked(&self, world: &World) -> Result<bool, Failure> {
        let top = world.scenario.top();
        let image = world.disk.view(|view| world.read_image(view, top))?;
        Ok(image.closed && self.engine.report().has_sync_failed)
    }

    /// One that is under way comes to its end.
    pub(super) fn end_snapshot(&mut self, world: &mut World) -> Result<(), Failure> {
        while !matches!(self.shot, Shot::No) && world.disk.is_powered() {
            self.snapshot(world)?;
            self.turn_until(world, "a snapshot", |session| {
                !matches!(session.shot, Shot::Closing(..) | Shot::Ending(_))
            })?;
        }
        Ok(())
    }
}

/// Where the thread that changes the top can be killed in the midst of it.
const STEPS_OF_CHANGE: [&str; 5] = ["settled", "mark written", "switched", "named", "renewed"];

fn copy_of(memory: &SharedWords) -> SharedWords {
    let copy = SharedWords::new(memory.len()).expect("there is memory");
    let runs = memory.data().expect("the memory can be read");
    for index in runs.into_iter().flatten() {
        if let (Some(from), Some(to)) = (memory.word(index), copy.word(index)) {
            to.store(from.load(Ordering::Acquire), Ordering::Release);
        }
    }
    copy
}

impl World {
    /// Whether the process dies here, while the top changes.
    pub(super) fn dies_at(&mut self, at: &str) -> bool {
        let Some(memory) = &self.mortal else {
            return false;
        };
        let may_die = STEPS_OF_CHANGE.contains(&at)
            && self.disk.is_powered()
            && !self.disk.has_unheard_failure();
        if !may_die || !self.rng.random_ratio(1, 12) {
            return false;
        }
        self.disk.note(|| format!("killed: {at}"));
        // What the thread still does to the memory until the step is over is not done.
        self.relic = Some(copy_of(memory));
        self.disk.kill();
        self.cases.count(Case::KilledInChange);
        true
    }

    /// The top is closed, and nothing is under way: what it and the lower deltas hold is a
    /// snapshot.
    fn check_snapshot(&mut self) -> Result<(), Failure> {
        let read = self.model.begin_read(0..self.scenario.layout.len());
        let sectors: Vec<u64> = self.scenario.layout.sectors().collect();
        let top = self.scenario.top();
        let judged = self.disk.view(|view| {
            let image = self.read_image(view, top)?;
            let found = |index: u64| {
                let sector = sectors[index as usize];
                super::checker::guest_sector(view, &self.lower, &image, sector)
            };
            let judged = self.model.end_read(&read, found);
            judged.map_err(|wrong| format!("{wrong:?}"))
        });
        judged
            .map_err(|wrong: Failure| format!("I15: the snapshot is not what was written: {wrong}"))
    }

    /// The name of the new top is stable, or nobody cares any more: whoever opens the disk
    /// finds it.
    pub(super) fn adopt_new_top(&mut self) -> Result<(), Failure> {
        self.is_either = false;
        let old = self.scenario.top();
        let image = self.disk.view(|view| self.read_closed(view, old))?;
        self.scenario.push_level(&image);
        self.lower.push(image);
        self.use_size(self.scenario.disk_sectors);
        let top = self.scenario.top();
        self.before = Before {
            closed: false,
            extension: false,
            file: self.disk.snapshot(top),
            behind: Vec::new(),
            is_troubled: self.before.is_troubled,
        };
        self.raw_lens.clear();
        self.disk
            .change_medium(|medium| medium.first_writable = top);
        self.cases.begin_anew(&self.disk, &self.scenario);
        Ok(())
    }

    /// The image that has been the top, in which nothing may be missing.
    fn read_closed(&self, view: &View<'_>, old: FileId) -> Result<Image, Failure> {
        let image = self.read_image(view, old)?;
        match image.closed || image.plain {
            true => Ok(image),
            false => Err("I12: a new top is named, and the old one is not closed".to_owned()),
        }
    }

    /// The power has gone while a name was not stable; it is back, and it is there or not.
    /// Gives back how the top was before.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn find_name(&mut self, old: SimFile, new: Option<SimFile>) -> Result<SimFile, Failure> {
        let Some(new) = new.filter(|_| self.is_either) else {
            return Ok(old);
        };
        if self.rng.random() {
            self.adopt_new_top()?;
            return Ok(new);
        }
        self.is_either = false;
        self.disk.drop_last_file();
        Ok(old)
    }

    /// Judges what a cut would leave if it left the new name.
    pub(super) fn judge_new(
        &self,
        view: &View<'_>,
        live: &SimFile,
        mut lower: Vec<Image>,
    ) -> Result<Image, Failure> {
        let old = self.scenario.top();
        lower.push(self.read_closed(view, old)?);
        self.judge_as(view, live, FileId(old.0 + 1), &lower)
    }
}
