//! Giving back space, step by step: what the job asks the engine for, in any order.

use rand::Rng;

use super::cases::Case;
use super::file::SECTOR;
use super::session::{Failure, Session, World};
use crate::format::GuestCluster;
use crate::ploop::{EngineError, Outcome};

/// What was asked for last.
pub(super) enum Compacting {
    No,
    Squeezing(Outcome),
    Moving(Outcome),
    Cutting(Outcome, u64),
}

impl Compacting {
    fn outcome(&self) -> Option<&Outcome> {
        match self {
            Self::No => None,
            Self::Squeezing(outcome) | Self::Moving(outcome) | Self::Cutting(outcome, _) => {
                Some(outcome)
            }
        }
    }
}

impl Session {
    /// The next step, or it goes on for a while.
    pub(super) fn compact(&mut self, world: &mut World) -> Result<(), Failure> {
        if !matches!(self.compacting, Compacting::No) {
            if world.rng.random_ratio(1, 40) {
                self.engine.abandon_growth();
            }
            world.imagine_cut()?;
            return self.go_on_for_a_while(world);
        }
        // The job asks for neither.
        if self.engine.is_read_only() || self.engine.open_for_growth().is_err() {
            return Ok(());
        }
        world.is_compacting = true;
        let what = world.rng.random_range(0..6);
        self.compacting = match what {
            0..4 => {
                let entries = self.engine.geometry().entries;
                let sectors = world.scenario.cluster / SECTOR as u64;
                let last = self.last_range.as_ref();
                let last = last.map(|range| (range.start / sectors) as u32);
                let cluster = last
                    .filter(|last| *last < entries && world.rng.random_ratio(3, 4))
                    .unwrap_or_else(|| world.rng.random_range(0..entries));
                let cluster = GuestCluster(cluster);
                world.disk.note(|| format!("{cluster:?} is squeezed"));
                Compacting::Squeezing(self.engine.squeeze(cluster))
            }
            4 if !self.engine.is_raw() => {
                let packing = self.engine.packing();
                let (clusters, _) = self.engine.behind(packing, 4);
                world.disk.note(|| format!("{clusters:?} move down"));
                Compacting::Moving(self.engine.move_down(clusters, packing))
            }
            _ if !self.engine.is_raw() => {
                world.disk.note(|| "the end is cut off".to_owned());
                let len = len_of_top(world);
                Compacting::Cutting(self.engine.cut_tail(), len)
            }
            _ => return Ok(()),
        };
        Ok(())
    }

    pub(super) fn hear_of_compaction(&mut self, world: &mut World) -> Result<(), Failure> {
        let Some(result) = self.compacting.outcome().and_then(Outcome::get) else {
            return Ok(());
        };
        world.disk.note(|| format!("that has ended: {result:?}"));
        if let Err(error) = result {
            let is_full = error == EngineError::NoSpace && self.trouble.space_in_doubt;
            // Closed or given up, or something else was at it when it was asked for.
            let is_ended = matches!(
                error,
                EngineError::Stopped | EngineError::Growing | EngineError::Suspended
            );
            if !is_full && !is_ended && !self.trouble.explains(error) {
                return Err(format!("I15: nothing was given back: {error}"));
            }
        }
        if result.is_ok() {
            let is_cut = match &self.compacting {
                Compacting::Cutting(_, len) => len_of_top(world) < *len,
                _ => false,
            };
            world.cases.count_if(Case::Shorter, is_cut);
            world.imagine_cut()?;
        }
        self.compacting = Compacting::No;
        world.is_compacting = false;
        Ok(())
    }
}

fn len_of_top(world: &World) -> u64 {
    let top = world.scenario.top();
    world.disk.view(|view| view.len(top))
}
