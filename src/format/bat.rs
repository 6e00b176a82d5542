//! What a whole BAT says: which host clusters it uses, and what is wrong with it.
//!
//! Used by the engine when it opens an image and by `ploop-img check`. Knows
//! entries and the [`Geometry`]; does not read them from anywhere.

use fixedbitset::FixedBitSet;
use thiserror::Error;

use super::{Geometry, GuestCluster, HostCluster, SECTOR_SIZE};

/// An entry that a good image does not have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BatProblem {
    /// Version 1 only: the sector is not one that a cluster starts at.
    #[error("BAT entry {guest} points at sector {value}, which no cluster starts at")]
    OffGrid {
        /// Index of the entry.
        guest: GuestCluster,
        /// The entry as it is in the file.
        value: u32,
    },
    /// It points into the header or the BAT.
    #[error("BAT entry {guest} ({value}) points into the header or the BAT")]
    InMetadata {
        /// Index of the entry.
        guest: GuestCluster,
        /// The entry as it is in the file.
        value: u32,
    },
    /// The cluster starts at or behind the end of the file.
    #[error("BAT entry {guest} points at host cluster {host}, beyond the end of the file")]
    BeyondEnd {
        /// Index of the entry.
        guest: GuestCluster,
        /// What it maps to.
        host: HostCluster,
    },
    /// The file ends inside the cluster: the end of its data was lost.
    #[error("BAT entry {guest} points at host cluster {host}, which the end of the file cuts")]
    Truncated {
        /// Index of the entry.
        guest: GuestCluster,
        /// What it maps to.
        host: HostCluster,
    },
    /// An earlier entry points at the same host cluster.
    #[error("BAT entry {guest} points at host cluster {host}, as another entry does")]
    Duplicate {
        /// Index of the later entry.
        guest: GuestCluster,
        /// What both map to.
        host: HostCluster,
    },
}

impl BatProblem {
    /// The entry that is wrong.
    pub const fn guest(&self) -> GuestCluster {
        match *self {
            Self::OffGrid { guest, .. }
            | Self::InMetadata { guest, .. }
            | Self::BeyondEnd { guest, .. }
            | Self::Truncated { guest, .. }
            | Self::Duplicate { guest, .. } => guest,
        }
    }
}

/// What a BAT says, from [`scan_bat`].
#[derive(Clone, Debug)]
pub struct BatScan {
    /// The host clusters of the file that some entry points at, by number. As
    /// long as the file, a started last cluster included, so what is not set and
    /// not below [`Geometry::first_host_cluster`] is leaked.
    pub used: FixedBitSet,
    /// Entries that point at a host cluster of their own, whole or cut.
    pub mapped: u32,
    /// Of [`Self::mapped`], those that no sector of the disk belongs to: the BAT
    /// may have more entries than the disk needs. They do no harm, are kept, and
    /// their clusters are not free.
    pub beyond_disk: u32,
    /// One after the highest host cluster that is used; the first of the data
    /// area if none is. Nothing may be cut from the file below it.
    pub end: HostCluster,
    /// The first [`BatScan::LISTED_MAX`] bad entries, in the order of the BAT.
    pub problems: Vec<BatProblem>,
    /// How many bad entries there are.
    pub problem_count: u32,
}

impl BatScan {
    /// How many bad entries are listed; the others are counted.
    pub const LISTED_MAX: usize = 1000;

    /// Whether every entry is good.
    pub const fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    /// How many host clusters of the data area no entry points at, a started
    /// last cluster included.
    pub fn leaked(&self, geometry: &Geometry) -> u64 {
        let first = geometry.first_host_cluster().0 as usize;
        let in_data_area = self.used.len().saturating_sub(first);
        (in_data_area - self.used.count_ones(..)) as u64
    }
}

/// Looks at every entry of a BAT, in order.
///
/// `file_len` is the length of the image file in bytes. An iterator that is
/// longer than [`Geometry::entries`] is read no further than that.
///
/// Takes a bit of memory for each host cluster of the file: for the largest
/// number of clusters that the format can name 512 MiB, of which the system
/// provides only what entries touch.
pub fn scan_bat(
    geometry: &Geometry,
    file_len: u64,
    entries: impl IntoIterator<Item = u32>,
) -> BatScan {
    let mut problems = Vec::new();
    let mut scan = scan_bat_with(geometry, file_len, entries, |problem| {
        if problems.len() < BatScan::LISTED_MAX {
            problems.push(problem);
        }
    });
    scan.problems = problems;
    scan
}

/// As [`scan_bat`], but gives every bad entry to `report` instead of listing the
/// first of them.
pub fn scan_bat_with(
    geometry: &Geometry,
    file_len: u64,
    entries: impl IntoIterator<Item = u32>,
    mut report: impl FnMut(BatProblem),
) -> BatScan {
    let clusters = geometry
        .host_clusters_below(file_len)
        .min(u64::from(geometry.host_cluster_limit()));
    let disk_clusters = geometry.cluster.count_for(geometry.disk_size.bytes());
    let first = geometry.first_host_cluster();
    let mut scan = BatScan {
        used: FixedBitSet::with_capacity(clusters as usize),
        mapped: 0,
        beyond_disk: 0,
        end: first,
        problems: Vec::new(),
        problem_count: 0,
    };
    let mut problem_count = 0;
    let mut report = |problem| {
        problem_count += 1;
        report(problem);
    };
    for (guest, value) in (0..geometry.entries).zip(entries) {
        if value == 0 {
            continue;
        }
        let guest = GuestCluster(guest);
        let Some(host) = geometry.host_cluster(value) else {
            report(unmappable(geometry, guest, value));
            continue;
        };
        let index = host.0 as usize;
        if index >= scan.used.len() {
            report(BatProblem::BeyondEnd { guest, host });
            continue;
        }
        if scan.used.put(index) {
            report(BatProblem::Duplicate { guest, host });
            continue;
        }
        if geometry.host_offset(host) + geometry.cluster.bytes() > file_len {
            report(BatProblem::Truncated { guest, host });
        }
        scan.mapped += 1;
        scan.beyond_disk += u32::from(u64::from(guest.0) >= disk_clusters);
        // `host` is below `used.len()`, so one more fits.
        scan.end = scan.end.max(HostCluster(host.0 + 1));
    }
    scan.problem_count = problem_count;
    scan
}

fn unmappable(geometry: &Geometry, guest: GuestCluster, value: u32) -> BatProblem {
    let in_metadata = match geometry.version {
        super::Version::V2 => true,
        super::Version::V1 => u64::from(value) * SECTOR_SIZE < geometry.data_start,
    };
    if in_metadata {
        BatProblem::InMetadata { guest, value }
    } else {
        BatProblem::OffGrid { guest, value }
    }
}

#[cfg(test)]
mod tests;
