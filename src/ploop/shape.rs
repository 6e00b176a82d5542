//! What of a disk shows from outside, and what its levels are: known from the headers alone,
//! before anybody opens it.

use super::engine::Engine;
use super::error::OpenError;
use super::open::{Chain, read_levels};
use super::remembered::Identity;
use crate::format::{ClusterSize, Geometry, Sector};
use crate::storage::{Disk, FileId};

/// One level of the chain.
#[derive(Clone, Copy, Debug)]
pub struct LevelShape {
    /// Its file.
    pub file: FileId,
    /// What its header says.
    pub geometry: Geometry,
    /// Whether it is a ploop image; else a raw one.
    pub is_ploop: bool,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Base first. There is one at least.
    levels: Vec<LevelShape>,
    /// Of the guest's disk. The top was opened when it may have been smaller.
    disk_size: Sector,
    zero_granularity: u32,
    is_read_only: bool,
}

impl Shape {
    /// Reads it from the headers of `chain`. The disk may be in use by others.
    ///
    /// # Errors
    /// A header is not valid, or cannot be read; the levels do not fit on each other.
    pub fn read<D: Disk>(disk: &D, chain: &Chain, is_read_only: bool) -> Result<Self, OpenError> {
        let levels = read_levels(disk, chain)?;
        let levels: Vec<_> = levels
            .into_iter()
            .enumerate()
            .map(|(index, level)| LevelShape {
                file: FileId(index as u8),
                geometry: level.geometry,
                is_ploop: !level.plain,
            })
            .collect();
        Ok(Self {
            disk_size: levels[levels.len() - 1].geometry.disk_size,
            levels,
            zero_granularity: disk.zero_granularity(),
            is_read_only,
        })
    }

    /// Of the guest's disk.
    pub fn disk_size(&self) -> Sector {
        self.disk_size
    }

    /// The unit of its mapping.
    pub fn cluster(&self) -> ClusterSize {
        self.top().cluster
    }

    /// The unit in bytes in which discards give space back.
    pub fn zero_granularity(&self) -> u32 {
        self.zero_granularity
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// The levels, base first.
    pub fn levels(&self) -> &[LevelShape] {
        &self.levels
    }

    /// As [`Engine::remembered_len`].
    pub fn remembered_len(&self) -> u64 {
        let identity = Identity {
            geometry: *self.top(),
            levels: self.levels.len(),
            has_bat: self.levels.last().is_some_and(|top| top.is_ploop),
        };
        identity.bytes()
    }

    fn top(&self) -> &Geometry {
        &self.levels[self.levels.len() - 1].geometry
    }
}

impl<D: Disk> Engine<D> {
    /// What of it shows, as of now.
    pub fn shape(&self) -> Shape {
        let mut levels: Vec<_> = self.level_shapes().collect();
        if let Some(top) = levels.last_mut() {
            top.geometry = self.geometry();
        }
        Shape {
            disk_size: self.disk_size(),
            levels,
            zero_granularity: self.zero_granularity(),
            is_read_only: self.is_read_only(),
        }
    }
}
