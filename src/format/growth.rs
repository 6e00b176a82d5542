//! What it takes to give an image a larger disk: which clusters must go, what must be
//! zero, and the header that makes the disk larger.
//!
//! The order of the steps is such that a cut anywhere leaves the old or the new disk,
//! and it is the same for an image that nobody uses as for one that is being served:
//!
//! 1. every cluster for which [`Growth::fate`] says so is somewhere else or nowhere, and
//!    both data and entries are stable;
//! 2. [`Growth::bat_space`] holds zeros, and that is stable;
//! 3. number of entries, first block offset and disk size change in the write of one
//!    sector, that of [`Growth::header`] (I12).
//!
//! Knows numbers; does no I/O.

use std::ops::Range;

use super::{Geometry, GuestCluster, Header, HeaderError, HostCluster, Sector};

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Growth {
    old: Geometry,
    header: Header,
}

/// What must become of the host cluster that an entry maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It can stay where it is.
    Stays,
    /// It lies where the BAT has to go, or holds more than the disk: its data moves to a
    /// cluster of zeros at or behind [`Growth::first_host_cluster`].
    Moves {
        /// As many bytes as belong to the disk. What is behind them a guest has never
        /// seen, and shall not see when the disk is larger.
        keep: u64,
    },
    /// No sector of the disk belongs to it: the entry becomes zero.
    Goes,
}

impl Growth {
    /// Of the image with this header to a disk of `disk_size`.
    ///
    /// # Errors
    /// As [`Header::grown`].
    pub fn new(header: &Header, disk_size: Sector) -> Result<Self, HeaderError> {
        Ok(Self {
            old: *header.geometry(),
            header: header.grown(disk_size)?,
        })
    }

    /// Of the larger disk.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The first that data may be in.
    pub fn first_host_cluster(&self) -> HostCluster {
        self.header.geometry().first_host_cluster()
    }

    /// What must become of the cluster that this entry maps.
    pub fn fate(&self, guest: GuestCluster, host: HostCluster) -> Fate {
        let start = self.old.cluster_start(guest);
        let keep = self.old.disk_size.bytes().saturating_sub(start);
        if keep == 0 {
            return Fate::Goes;
        }
        let keep = keep.min(self.old.cluster.bytes());
        let is_in_the_way = host < self.first_host_cluster();
        if is_in_the_way || keep < self.old.cluster.bytes() {
            Fate::Moves { keep }
        } else {
            Fate::Stays
        }
    }

    /// Bytes of the file that new entries will be in, up to where data starts.
    pub fn bat_space(&self) -> Range<u64> {
        self.old.metadata_len()..self.header.geometry().data_start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ClusterSize;

    #[test]
    fn what_is_in_the_way_moves_and_what_no_guest_has_seen_goes() {
        let cluster = ClusterSize::MIN;
        let sectors = cluster.sectors();
        let header = Header::new(Sector(5 * sectors + 3), cluster).unwrap();
        let growth = Growth::new(&header, Sector(9000 * sectors)).unwrap();
        let whole = cluster.bytes();
        assert_eq!(growth.first_host_cluster(), HostCluster(2));
        let fate = |guest, host| growth.fate(GuestCluster(guest), HostCluster(host));
        assert_eq!(fate(0, 1), Fate::Moves { keep: whole });
        assert_eq!(fate(4, 2), Fate::Stays);
        assert_eq!(fate(5, 7), Fate::Moves { keep: 3 * 512 });
        assert_eq!(fate(6, 1), Fate::Goes);
        assert_eq!(growth.bat_space(), 64 + 4 * 6..2 * whole);
    }

    #[test]
    fn a_smaller_disk_is_no_growth() {
        let header = Header::new(Sector(640), ClusterSize::MIN).unwrap();
        let error = Growth::new(&header, Sector(639)).unwrap_err();
        assert_eq!(error, HeaderError::Smaller { from: 640, to: 639 });
    }
}
