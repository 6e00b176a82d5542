//! The images that scenarios start from; written ones are kept for the next scenario.
//!
//! Knows what state each start needs. Must not know what is measured on it.

use std::collections::HashMap;

use anyhow::Result;

use crate::bed::{Bed, Directories};
use crate::contestant::{Contestant, OURS, Programs};
use crate::image::{Geometry, Image};
use crate::scenario::Scenario;
use crate::station;
use crate::workload::Start;

/// Written images.
pub struct Stock<'a> {
    programs: &'a Programs,
    directories: &'a Directories,
    written: HashMap<Key, Image>,
}

/// What makes a written image fit.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    contestant: Contestant,
    bed: Bed,
    geometry: Geometry,
    role: Role,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Role {
    /// To be served.
    Disk,
    /// To lie below an overlay.
    Base,
}

impl Key {
    fn new(scenario: &Scenario, contestant: Contestant, role: Role) -> Self {
        Self {
            // The number of runners does not change the image.
            contestant: match contestant {
                Contestant::Ours { .. } => OURS,
                other => other,
            },
            bed: scenario.bed,
            geometry: scenario.geometry(),
            role,
        }
    }
}

impl<'a> Stock<'a> {
    /// An empty stock.
    pub fn new(programs: &'a Programs, directories: &'a Directories) -> Self {
        Self {
            programs,
            directories,
            written: HashMap::new(),
        }
    }

    /// Drops the images that are not of `bed`: nobody comes back to them.
    pub fn keep_only(&mut self, bed: Bed) {
        self.written.retain(|key, _| key.bed == bed);
    }

    /// An image that lasts, every block of it written and flushed.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn lasting(&mut self, scenario: &Scenario, contestant: Contestant) -> Result<&Image> {
        self.written(scenario, contestant, Role::Disk)
    }

    /// Drops a lasting image: the next one is made anew, and lies elsewhere.
    pub fn drop_lasting(&mut self, scenario: &Scenario, contestant: Contestant) {
        let key = Key::new(scenario, contestant, Role::Disk);
        self.written.remove(&key);
    }

    /// An image for one run, in the state that the scenario starts from.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn fresh(&mut self, scenario: &Scenario, contestant: Contestant) -> Result<Image> {
        let (bed, geometry) = (scenario.bed, scenario.geometry());
        let directories = self.directories;
        if scenario.workload.start == Start::Overlay {
            let base = self.written(scenario, contestant, Role::Base)?;
            return if contestant.is_ours() {
                base.clone_bundle(directories, bed)
            } else {
                base.qcow2_overlay(directories, bed, geometry)
            };
        }
        let image = Image::empty(directories, bed, contestant, geometry)?;
        if scenario.workload.start == Start::WrittenAnew {
            station::fill(self.programs, bed, contestant, &image)?;
        }
        Ok(image)
    }

    fn written(
        &mut self,
        scenario: &Scenario,
        contestant: Contestant,
        role: Role,
    ) -> Result<&Image> {
        let key = Key::new(scenario, contestant, role);
        if !self.written.contains_key(&key) {
            let image = self.write(key)?;
            self.written.insert(key, image);
        }
        Ok(&self.written[&key])
    }

    fn write(&self, key: Key) -> Result<Image> {
        let Key {
            contestant,
            bed,
            geometry,
            role,
        } = key;
        let is_bundle = role == Role::Base && contestant.is_ours();
        let image = if is_bundle {
            Image::empty_bundle(self.programs, self.directories, bed, geometry)?
        } else {
            Image::empty(self.directories, bed, contestant, geometry)?
        };
        station::fill(self.programs, bed, contestant, &image)?;
        if is_bundle {
            image.snapshot(self.programs)?;
        }
        Ok(image)
    }
}
