//! Units as types: a sector, a guest cluster and a host cluster do not mix.

use std::fmt;

/// Bytes in a sector, the unit of virtio-blk and of the ploop header.
pub const SECTOR_SIZE: u64 = 512;

/// A position or a length on the guest's disk, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

impl Sector {
    /// The same in bytes. Disk sizes are checked to fit before a `Sector` is made.
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR_SIZE
    }
}

/// The number of a cluster of the guest's disk: the index of its BAT entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u32);

/// The number of a cluster of the image file, on the grid that
/// [`Geometry::host_offset`](super::Geometry::host_offset) defines. In version 2
/// it is the value of the BAT entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub u32);

impl fmt::Display for GuestCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for HostCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ClusterSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shift {
            20.. => write!(f, "{} MiB", self.bytes() >> 20),
            _ => write!(f, "{} KiB", self.bytes() >> 10),
        }
    }
}

/// A cluster size: a power of two from 32 KiB to 64 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterSize {
    shift: u8,
}

impl ClusterSize {
    /// 1 MiB, what the official tool and `qemu-img` choose.
    pub const DEFAULT: Self = Self { shift: 20 };
    /// The smallest cluster that the official tool makes.
    pub const MIN: Self = Self { shift: 15 };
    /// The largest cluster that the official tool makes.
    pub const MAX: Self = Self { shift: 26 };

    /// The size with `bytes` bytes, if it is one that the format allows here.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= Self::MIN.bytes() && bytes <= Self::MAX.bytes() {
            Some(Self {
                shift: bytes.trailing_zeros() as u8,
            })
        } else {
            None
        }
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// In sectors of 512 bytes.
    pub const fn sectors(self) -> u64 {
        self.bytes() / SECTOR_SIZE
    }

    /// log2 of the size in bytes.
    pub const fn shift(self) -> u32 {
        self.shift as u32
    }

    /// A disk size rounded up to whole clusters, unless that is larger than any disk.
    pub const fn round_up(self, disk_size: Sector) -> Sector {
        match disk_size.0.checked_next_multiple_of(self.sectors()) {
            Some(sectors) => Sector(sectors),
            None => disk_size,
        }
    }

    /// A disk size rounded down to whole clusters.
    pub const fn round_down(self, disk_size: Sector) -> Sector {
        Sector(disk_size.0 / self.sectors() * self.sectors())
    }

    /// How many clusters `bytes` bytes need, a started one counted whole.
    pub const fn count_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}
