//! What of a disk shows from outside, and what its levels are: known from the headers alone,
//! before anybody opens it.

use super::engine::Engine;
use super::error::OpenError;
use super::open::{Chain, read_levels};
use super::remembered::Identity;
use crate::format::{ClusterSize, Geometry, Sector};
use crate::storage::Disk;

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Of each level, base first, and whether it is a ploop image. There is one at least.
    levels: Vec<(Geometry, bool)>,
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
            .map(|level| (level.geometry, !level.plain))
            .collect();
        Ok(Self {
            disk_size: levels[levels.len() - 1].0.disk_size,
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

    /// Of each level, base first, and whether it is a ploop image.
    pub fn level_geometries(&self) -> impl Iterator<Item = (&Geometry, bool)> {
        self.levels
            .iter()
            .map(|(geometry, is_ploop)| (geometry, *is_ploop))
    }

    /// As [`Engine::remembered_len`].
    pub fn remembered_len(&self) -> u64 {
        let identity = Identity {
            geometry: *self.top(),
            levels: self.levels.len(),
            has_bat: self.levels.last().is_some_and(|(_, is_ploop)| *is_ploop),
        };
        identity.bytes()
    }

    fn top(&self) -> &Geometry {
        &self.levels[self.levels.len() - 1].0
    }
}

impl<D: Disk> Engine<D> {
    /// What of it shows, as of now.
    pub fn shape(&self) -> Shape {
        let geometries = self.level_geometries();
        let mut levels: Vec<_> = geometries.collect();
        if let Some((top, _)) = levels.last_mut() {
            *top = self.geometry();
        }
        Shape {
            disk_size: self.disk_size(),
            levels,
            zero_granularity: self.zero_granularity(),
            is_read_only: self.is_read_only(),
        }
    }
}
