//! What a whole BAT says: which host clusters it uses, and what is wrong with it.
//!
//! Used by the engine when it opens an image and by `ploop-img check`. Knows
//! entries and the [`Geometry`]; does not read them from anywhere.

use std::ops::Range;

use thiserror::Error;

use super::{ClusterSet, Geometry, GuestCluster, HostCluster, SECTOR_SIZE, Version};

/// An entry that a good image does not have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BatProblem {
    /// Version 1 only: the sector is not one that a cluster starts at.
    #[error("BAT entry {guest} points at sector {value}, which is not the start of a cluster")]
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
    /// The host clusters of the file that some entry points at. As long as the file, a started last cluster included, so what is not set and
    /// not below [`Geometry::first_host_cluster`] is leaked.
    pub used: ClusterSet,
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
        let gaps = self.used.gaps(geometry.first_host_cluster());
        gaps.map(|gap| u64::from(gap.end.0 - gap.start.0)).sum()
    }
}

/// Looks at every entry of a BAT, in order.
///
/// `file_len` is the length of the image file in bytes. An iterator that is
/// longer than [`Geometry::entries`] is read no further than that.
///
/// Takes a bit of memory for each host cluster of the file: 32 MiB for a file of
/// 8 TiB with clusters of 32 KiB, and 512 MiB for the largest number of clusters
/// that the format can name. Of it the system provides only what entries touch.
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
    let mut scanner = BatScanner::new(geometry, file_len);
    for value in entries.into_iter().take(geometry.entries as usize) {
        let value = std::iter::once(value);
        scanner.look_at_all(value, |_, _| (), &mut report, || file_len);
    }
    scanner.end()
}

/// Looks at the entries of a BAT, some at a time, for who has other plans with them.
#[derive(Debug)]
pub struct BatScanner<'a> {
    geometry: &'a Geometry,
    disk_clusters: u64,
    /// The clusters of the data area that the file has as a whole.
    whole: Range<u32>,
    /// The entry to come.
    next: u32,
    scan: BatScan,
}

impl<'a> BatScanner<'a> {
    /// Before the first entry. `file_len` is the length of the image file in bytes.
    pub fn new(geometry: &'a Geometry, file_len: u64) -> Self {
        let (clusters, whole) = clusters_of(geometry, file_len);
        Self {
            geometry,
            disk_clusters: geometry.disk_clusters(),
            whole: geometry.first_host_cluster().0..whole,
            next: 0,
            scan: BatScan {
                used: ClusterSet::new(clusters),
                mapped: 0,
                beyond_disk: 0,
                end: geometry.first_host_cluster(),
                problems: Vec::new(),
                problem_count: 0,
            },
        }
    }

    /// The entry to come.
    pub const fn next(&self) -> GuestCluster {
        GuestCluster(self.next)
    }

    /// The next `count` entries are zero.
    pub fn skip(&mut self, count: u32) {
        self.next += count;
    }

    /// Looks at the next entries, and gives those that map a cluster to `map`, with the place,
    /// and those that are wrong to `report`.
    ///
    /// Before one counts as pointing behind the end of the file, `file_len` is asked how long that
    /// is now: somebody may be at work who makes the file longer first, and maps a cluster there
    /// then. So what it says has to be younger than the entries.
    ///
    /// There may be millions, and a guest that stands still until all were looked at: of a good
    /// one, this looks at nothing but its place.
    #[inline]
    pub fn look_at_all(
        &mut self,
        values: impl ExactSizeIterator<Item = u32>,
        mut map: impl FnMut(GuestCluster, HostCluster),
        mut report: impl FnMut(BatProblem),
        mut file_len: impl FnMut() -> u64,
    ) {
        let first = self.next;
        let end = u64::from(first) + values.len() as u64;
        let is_plain = self.geometry.version == Version::V2 && end <= self.disk_clusters;
        let whole = self.whole.clone();
        let mut mapped = 0;
        for (guest, value) in (first..).zip(values) {
            if value == 0 {
                continue;
            }
            let host = HostCluster(value);
            if is_plain && whole.contains(&value) && self.scan.used.insert(host) {
                mapped += 1;
                map(GuestCluster(guest), host);
                continue;
            }
            match self.judge(GuestCluster(guest), value, &mut file_len) {
                Ok(host) => map(GuestCluster(guest), host),
                Err(problem) => report(problem),
            }
        }
        self.scan.mapped += mapped;
        self.next = end as u32;
    }

    /// What an entry maps to, or what is wrong with it.
    #[cold]
    fn judge(
        &mut self,
        guest: GuestCluster,
        value: u32,
        file_len: impl FnOnce() -> u64,
    ) -> Result<HostCluster, BatProblem> {
        let host = self.geometry.host_cluster(value);
        if host.is_some_and(|host| host.0 >= self.whole.end) {
            self.lengthen(file_len());
        }
        match host.filter(|host| self.whole.contains(&host.0)) {
            Some(host) if self.scan.used.insert(host) => {
                self.count(guest);
                Ok(host)
            }
            _ => Err(self.problem_with(guest, value)),
        }
    }

    /// The file has this length now; it matters only if it is longer than it was.
    fn lengthen(&mut self, file_len: u64) {
        let (clusters, whole) = clusters_of(self.geometry, file_len);
        self.scan.used.lengthen(clusters);
        self.whole.end = self.whole.end.max(whole);
    }

    /// What is wrong with an entry that is not good.
    fn problem_with(&mut self, guest: GuestCluster, value: u32) -> BatProblem {
        self.scan.problem_count += 1;
        let Some(host) = self.geometry.host_cluster(value) else {
            return unmappable(self.geometry, guest, value);
        };
        if u64::from(host.0) >= self.scan.used.len() {
            return BatProblem::BeyondEnd { guest, host };
        }
        if self.whole.contains(&host.0) || !self.scan.used.insert(host) {
            return BatProblem::Duplicate { guest, host };
        }
        self.count(guest);
        BatProblem::Truncated { guest, host }
    }

    fn count(&mut self, guest: GuestCluster) {
        self.scan.mapped += 1;
        self.scan.beyond_disk += u32::from(u64::from(guest.0) >= self.disk_clusters);
    }

    /// What it all says; [`BatScan::problems`] is left to the caller.
    pub fn end(self) -> BatScan {
        let mut scan = self.scan;
        scan.end = scan.end.max(scan.used.end());
        scan
    }
}

/// How many host clusters a file of this length has, a started last one included, and how many
/// without that.
fn clusters_of(geometry: &Geometry, file_len: u64) -> (u64, u32) {
    let clusters = geometry
        .host_clusters_below(file_len)
        .min(u64::from(geometry.host_cluster_limit()));
    let is_last_whole = geometry.host_offset(HostCluster(clusters as u32)) <= file_len;
    let whole = clusters - u64::from(!is_last_whole && clusters > 0);
    (clusters, whole as u32)
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
