//! The 64-byte header of an image file and the geometry that follows from it.
//!
//! Source: `docs/interop/parallels.rst` of QEMU; dm-ploop for the stricter rule
//! on the first block offset that [`Header::new`] follows.

use thiserror::Error;

use super::{ClusterSize, GuestCluster, HostCluster, SECTOR_SIZE, Sector};

const SIGNATURE_V1: &[u8; 16] = b"WithoutFreeSpace";
const SIGNATURE_V2: &[u8; 16] = b"WithouFreSpacExt";
const TYPE: u32 = 2;
/// Of the geometry that headers and descriptors state; nobody relies on it.
pub(super) const HEADS: u32 = 16;
/// See [`HEADS`].
pub(super) const SECTORS_PER_TRACK: u64 = 32;
const IN_USE_OPEN: u32 = 0x746F_6E59;
const IN_USE_CLOSED_V21: u32 = 0x312e_3276;
const FLAG_EMPTY: u32 = 1;
const FLAG_CONVERTING: u32 = 2;

/// What is wrong with a header.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// The first 16 bytes are neither signature.
    #[error("not a ploop image: the signature is not one of version 1 or 2")]
    Signature,
    /// The type field is not 2.
    #[error("header type is {0}, expected {TYPE}")]
    Type(u32),
    /// The cluster size is no power of two from 32 KiB to 64 MiB.
    #[error(
        "cluster size of {0} sectors is not a power of two from 64 (32 KiB) to 131072 (64 MiB)"
    )]
    ClusterSize(u32),
    /// The disk has no sector or more than this format can map.
    #[error("disk size of {0} sectors is not one that the format can hold")]
    DiskSize(u64),
    /// A new disk, or one that shall grow, would be larger than what its version
    /// and its clusters can map.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// A disk would get smaller.
    #[error("a disk of {from} sectors cannot become one of {to}")]
    Smaller {
        /// In sectors.
        from: u64,
        /// In sectors.
        to: u64,
    },
    /// The BAT is too short for the disk.
    #[error("{entries} BAT entries cannot map a disk that needs {needed}")]
    TooFewEntries {
        /// As the header says.
        entries: u32,
        /// What the disk size takes.
        needed: u64,
    },
    /// The BAT is longer than any tool makes or reads.
    #[error("{0} BAT entries are more than the {max} that the format is used with", max = Header::ENTRIES_MAX)]
    TooManyEntries(u32),
    /// The data area starts inside header or BAT, or off the cluster grid.
    #[error("first block offset of {sectors} sectors is {why}")]
    FirstBlock {
        /// As the header says.
        sectors: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The in-use mark has no known value.
    #[error("in-use mark {0:#x} is unknown")]
    InUse(u32),
}

/// A disk size that is too large, and what would hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// As asked for.
    pub disk_size: Sector,
    /// What maps it.
    pub cluster: ClusterSize,
    /// Whose limits count.
    pub version: Version,
}

impl TooLarge {
    /// The largest disk with these clusters.
    pub fn max(&self) -> Sector {
        self.version.disk_size_max(self.cluster)
    }

    /// The smallest clusters that could map it, in version 2, if any can.
    pub fn cluster_that_fits(&self) -> Option<ClusterSize> {
        let sizes = (self.cluster.shift()..=ClusterSize::MAX.shift()).map(|shift| 1 << shift);
        sizes
            .filter_map(ClusterSize::from_bytes)
            .find(|cluster| self.disk_size <= Version::V2.disk_size_max(*cluster))
    }
}

impl std::error::Error for TooLarge {}

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let wanted = u128::from(self.disk_size.0) * u128::from(SECTOR_SIZE);
        let (version, cluster, max) = (self.version, self.cluster, self.max().bytes());
        // Whole TiB but for the last cluster or sector.
        let about = max.div_ceil(1 << 40);
        write!(
            f,
            "a disk of {wanted} bytes is too large: version {version} of the format holds at \
             most {max} bytes ({about} TiB) with clusters of {cluster}"
        )
    }
}

/// The version of the format, told by the signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `WithoutFreeSpace`: BAT entries count sectors.
    V1,
    /// `WithouFreSpacExt`: BAT entries count clusters.
    V2,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V1 => "1",
            Self::V2 => "2",
        })
    }
}

impl Version {
    /// The largest disk of whole clusters that an image can map.
    pub fn disk_size_max(self, cluster: ClusterSize) -> Sector {
        cluster.round_down(self.limit(cluster))
    }

    /// What BAT and disk size of the header can say.
    fn limit(self, cluster: ClusterSize) -> Sector {
        let mapped = u64::from(Header::ENTRIES_MAX) * cluster.sectors();
        let named = match self {
            Self::V1 => u64::from(u32::MAX),
            Self::V2 => Header::DISK_SIZE_MAX,
        };
        Sector(mapped.min(named))
    }
}

/// Whether the beginning of a file says that somebody has opened it as an image, and has not
/// closed it. Looks at nothing else.
pub fn is_marked_in_use(bytes: &[u8]) -> bool {
    let word = bytes.get(44..48).and_then(|word| word.try_into().ok());
    word.map(u32::from_le_bytes) == Some(IN_USE_OPEN)
}

/// The in-use mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InUse {
    /// Closed; a format extension, if any, is not valid.
    Closed,
    /// Closed, and the format extension is valid.
    ClosedWithExtension,
    /// Open for writing, or left so by a crash.
    Open,
    /// 1: some tools leave it; read as not cleanly closed.
    OpenByOthers,
}

/// A checked header. The only road from bytes to it is [`Header::parse`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    geometry: Geometry,
    heads: u32,
    cylinders: u32,
    first_block_sectors: u32,
    /// Version 1 leaves this word undefined: kept as found. Zero in version 2,
    /// where it is part of the disk size.
    disk_size_high: u32,
    flags: u32,
    /// What the file says is impossible, and [`Geometry::data_start`] computed anew.
    first_block_is_wrong: bool,
    /// The in-use mark.
    pub in_use: InUse,
    /// Where the format extension is; zero: none.
    pub extension: Sector,
}

/// Where everything is in an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Of the format.
    pub version: Version,
    /// The unit of the mapping.
    pub cluster: ClusterSize,
    /// Number of BAT entries, at least what [`Self::disk_size`] needs.
    pub entries: u32,
    /// Of the guest's disk; need not be a multiple of the cluster.
    pub disk_size: Sector,
    /// Byte offset of the first data cluster.
    pub data_start: u64,
}

impl Header {
    /// Length in bytes; the BAT follows at once.
    pub const LEN: usize = 64;

    /// The most entries that a BAT may have: `qemu-img` refuses a BAT of 2 GiB.
    pub const ENTRIES_MAX: u32 = i32::MAX as u32 / 4;

    /// The largest disk in sectors whose length in bytes is a file offset.
    const DISK_SIZE_MAX: u64 = i64::MAX as u64 / SECTOR_SIZE;

    /// A header for a new, closed, empty version 2 image, with the first block
    /// offset that dm-ploop demands: header and BAT rounded up to the cluster.
    ///
    /// # Errors
    /// [`HeaderError::DiskSize`] if `disk_size` is zero, [`HeaderError::TooLarge`] if
    /// it needs more than [`Self::ENTRIES_MAX`] BAT entries.
    pub fn new(disk_size: Sector, cluster: ClusterSize) -> Result<Self, HeaderError> {
        if disk_size.0 == 0 {
            return Err(HeaderError::DiskSize(0));
        }
        let entries = entries_for(disk_size, cluster, Version::V2)?;
        Self::empty(Version::V2, cluster, entries, disk_size)
            .ok_or(HeaderError::DiskSize(disk_size.0))
    }

    /// A header for a new, closed, empty image that is to lie on top of this one:
    /// of the same version, with as many entries.
    ///
    /// # Errors
    /// [`HeaderError::DiskSize`] if so many entries do not leave room for data.
    pub fn on_top(&self) -> Result<Self, HeaderError> {
        Self::on_top_of(&self.geometry)
    }

    /// As [`Self::on_top`], of an image with this geometry.
    ///
    /// # Errors
    /// The same.
    pub fn on_top_of(g: &Geometry) -> Result<Self, HeaderError> {
        Self::empty(g.version, g.cluster, g.entries, g.disk_size)
            .ok_or(HeaderError::DiskSize(g.disk_size.0))
    }

    /// `None` if header and BAT reach beyond what the first block offset can say.
    fn empty(
        version: Version,
        cluster: ClusterSize,
        entries: u32,
        disk_size: Sector,
    ) -> Option<Self> {
        let metadata = cluster.count_for(Self::LEN as u64 + 4 * u64::from(entries));
        let data_start = metadata * cluster.bytes();
        Some(Self {
            geometry: Geometry {
                version,
                cluster,
                entries,
                disk_size,
                data_start,
            },
            heads: HEADS,
            cylinders: cylinders(disk_size),
            first_block_sectors: u32::try_from(data_start / SECTOR_SIZE).ok()?,
            disk_size_high: 0,
            first_block_is_wrong: false,
            flags: FLAG_EMPTY,
            in_use: InUse::Closed,
            extension: Sector(0),
        })
    }

    /// Whether a file that starts with `bytes` says that it is a ploop image.
    pub fn has_signature(bytes: &[u8]) -> bool {
        bytes.starts_with(SIGNATURE_V1) || bytes.starts_with(SIGNATURE_V2)
    }

    /// The header of this image with a larger disk. The grid of host clusters
    /// stays; the data area starts later where the BAT needs the room, never
    /// earlier. [`Self::new`]'s rule on the first block offset is kept if this
    /// header keeps it.
    ///
    /// # Errors
    /// [`HeaderError::Smaller`] if the disk would be, [`HeaderError::TooLarge`] if the
    /// version cannot hold it with these clusters.
    pub fn grown(&self, disk_size: Sector) -> Result<Self, HeaderError> {
        let old = &self.geometry;
        if disk_size < old.disk_size {
            let (from, to) = (old.disk_size.0, disk_size.0);
            return Err(HeaderError::Smaller { from, to });
        }
        let entries = entries_for(disk_size, old.cluster, old.version)?.max(old.entries);
        let bat_end = Self::LEN as u64 + 4 * u64::from(entries);
        let moved_by = old
            .cluster
            .count_for(bat_end.saturating_sub(old.data_start));
        let data_start = old.data_start + moved_by * old.cluster.bytes();
        let mut grown = self.clone();
        grown.geometry.entries = entries;
        grown.geometry.disk_size = disk_size;
        grown.geometry.data_start = data_start;
        // Also where it was implied: with more entries, so would be another.
        grown.first_block_sectors = u32::try_from(data_start / SECTOR_SIZE)
            .map_err(|_| HeaderError::DiskSize(disk_size.0))?;
        grown.heads = HEADS;
        grown.cylinders = cylinders(disk_size);
        Ok(grown)
    }

    /// The header of this image with a smaller disk, and a BAT that is as long as that
    /// needs: what no entry says any more is gone in the write of this header alone.
    /// The grid of host clusters stays. The data area starts earlier where that keeps
    /// [`Self::new`]'s rule on the first block offset.
    ///
    /// # Errors
    /// [`HeaderError::DiskSize`] if the disk would be larger, or have no sector.
    pub fn shrunk(&self, disk_size: Sector) -> Result<Self, HeaderError> {
        let old = &self.geometry;
        if disk_size.0 == 0 || disk_size > old.disk_size {
            return Err(HeaderError::DiskSize(disk_size.0));
        }
        let needed = old.cluster.count_for(disk_size.bytes());
        // As the disk is not larger than it was, the entries are not more.
        let entries = u32::try_from(needed)
            .unwrap_or(old.entries)
            .min(old.entries);
        let metadata_of = |entries: u32| {
            let len = Self::LEN as u64 + 4 * u64::from(entries);
            old.cluster.count_for(len) * old.cluster.bytes()
        };
        let data_start = match old.version {
            Version::V2 if old.data_start == metadata_of(old.entries) => metadata_of(entries),
            _ => old.data_start,
        };
        let mut shrunk = self.clone();
        shrunk.geometry.entries = entries;
        shrunk.geometry.disk_size = disk_size;
        shrunk.geometry.data_start = data_start;
        // Also where it was implied: with fewer entries, so would be another.
        shrunk.first_block_sectors = u32::try_from(data_start / SECTOR_SIZE)
            .map_err(|_| HeaderError::DiskSize(disk_size.0))?;
        shrunk.heads = HEADS;
        shrunk.cylinders = cylinders(disk_size);
        Ok(shrunk)
    }

    /// Checks the first 64 bytes of a file.
    ///
    /// The caller still has to compare [`Geometry::metadata_len`] with the length
    /// of the file before it believes [`Geometry::entries`].
    ///
    /// # Errors
    /// The first thing that is wrong, from the start of the header.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Result<Self, HeaderError> {
        Self::parse_with(bytes, Allow::Nothing)
    }

    /// As [`Self::parse`], but a first block offset that cannot be is computed anew,
    /// as QEMU does: the least that it could be. See [`Self::first_block_is_wrong`].
    ///
    /// # Errors
    /// The first other thing that is wrong.
    pub fn parse_for_repair(bytes: &[u8; Self::LEN]) -> Result<Self, HeaderError> {
        Self::parse_with(bytes, Allow::WrongFirstBlock)
    }

    fn parse_with(bytes: &[u8; Self::LEN], allow: Allow) -> Result<Self, HeaderError> {
        let version = match bytes.first_chunk::<16>() {
            Some(SIGNATURE_V1) => Version::V1,
            Some(SIGNATURE_V2) => Version::V2,
            _ => return Err(HeaderError::Signature),
        };
        let word = |at: usize| {
            let mut field = [0; 4];
            field.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(field)
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;

        if word(16) != TYPE {
            return Err(HeaderError::Type(word(16)));
        }
        let cluster = ClusterSize::from_bytes(u64::from(word(28)) * SECTOR_SIZE)
            .ok_or(HeaderError::ClusterSize(word(28)))?;
        let entries = word(32);
        let disk_size = Sector(match version {
            Version::V1 => u64::from(word(36)),
            Version::V2 => long(36),
        });
        if disk_size.0 == 0 || disk_size.0 > Self::DISK_SIZE_MAX {
            return Err(HeaderError::DiskSize(disk_size.0));
        }
        let needed = cluster.count_for(disk_size.bytes());
        if u64::from(entries) < needed {
            return Err(HeaderError::TooFewEntries { entries, needed });
        }
        if entries > Self::ENTRIES_MAX {
            return Err(HeaderError::TooManyEntries(entries));
        }
        let in_use = match word(44) {
            0 => InUse::Closed,
            1 => InUse::OpenByOthers,
            IN_USE_OPEN => InUse::Open,
            IN_USE_CLOSED_V21 => InUse::ClosedWithExtension,
            other => return Err(HeaderError::InUse(other)),
        };
        let first_block_sectors = word(48);
        let data_start = match data_start(version, cluster, entries, first_block_sectors) {
            Err(_) if allow == Allow::WrongFirstBlock => None,
            data_start => Some(data_start?),
        };
        let (first_block_is_wrong, data_start) = match data_start {
            Some(data_start) => (false, data_start),
            None => (true, least_data_start(version, cluster, entries)),
        };
        let first_block_sectors = match first_block_is_wrong {
            false => first_block_sectors,
            true => u32::try_from(data_start / SECTOR_SIZE)
                .map_err(|_| HeaderError::DiskSize(disk_size.0))?,
        };
        // Nobody takes it for a conversion unless the image is in use.
        let is_open = matches!(in_use, InUse::Open | InUse::OpenByOthers);
        let flags = match is_open {
            true => word(52),
            false => word(52) & !FLAG_CONVERTING,
        };
        Ok(Self {
            geometry: Geometry {
                version,
                cluster,
                entries,
                disk_size,
                data_start,
            },
            heads: word(20),
            cylinders: word(24),
            first_block_sectors,
            disk_size_high: match version {
                Version::V1 => word(40),
                Version::V2 => 0,
            },
            flags,
            first_block_is_wrong,
            in_use,
            extension: Sector(long(56)),
        })
    }

    /// The bytes of this header.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let g = &self.geometry;
        let disk_size_high = match g.version {
            Version::V1 => self.disk_size_high,
            Version::V2 => (g.disk_size.0 >> 32) as u32,
        };
        let signature = match g.version {
            Version::V1 => SIGNATURE_V1,
            Version::V2 => SIGNATURE_V2,
        };
        let in_use = match self.in_use {
            InUse::Closed => 0,
            InUse::ClosedWithExtension => IN_USE_CLOSED_V21,
            InUse::Open => IN_USE_OPEN,
            InUse::OpenByOthers => 1,
        };
        let words = [
            TYPE,
            self.heads,
            self.cylinders,
            g.cluster.sectors() as u32,
            g.entries,
            g.disk_size.0 as u32,
            disk_size_high,
            in_use,
            self.first_block_sectors,
            self.flags,
            self.extension.0 as u32,
            (self.extension.0 >> 32) as u32,
        ];
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(signature);
        for (field, word) in bytes[16..].chunks_exact_mut(4).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Where everything is.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// That the first block offset does not lie behind the end of a file of `file_len`
    /// bytes that holds the BAT, unless that ends before any data could.
    ///
    /// # Errors
    /// [`HeaderError::FirstBlock`].
    pub fn check_file_len(&self, file_len: u64) -> Result<(), HeaderError> {
        match self.is_first_block_behind(file_len) {
            false => Ok(()),
            true => Err(HeaderError::FirstBlock {
                sectors: self.first_block_sectors,
                why: "behind the end of the file",
            }),
        }
    }

    fn is_first_block_behind(&self, file_len: u64) -> bool {
        let g = &self.geometry;
        g.metadata_len() <= file_len
            && g.data_start > file_len
            && g.data_start > least_data_start(g.version, g.cluster, g.entries)
    }

    /// Whether what the file said of the first block offset was replaced.
    pub fn first_block_is_wrong(&self) -> bool {
        self.first_block_is_wrong
    }

    /// The first block offset is right now, or will be with the next write.
    pub fn accept_first_block(&mut self) {
        self.first_block_is_wrong = false;
    }

    /// Computes a first block offset anew that cannot be, in a file of `file_len` bytes
    /// with these BAT entries: the least one, on the grid that the entries of version 1
    /// are on.
    pub fn repair_first_block(&mut self, file_len: u64, bat: &[u32]) {
        let g = &self.geometry;
        if !self.first_block_is_wrong && !self.is_first_block_behind(file_len) {
            return;
        }
        let least = least_data_start(g.version, g.cluster, g.entries) / SECTOR_SIZE;
        let behind_bat = |value: &u64| *value >= least;
        let first = bat.iter().map(|value| u64::from(*value)).find(behind_bat);
        let sectors = match (g.version, first) {
            (Version::V1, Some(first)) => least + (first - least) % g.cluster.sectors(),
            _ => least,
        };
        // Below an entry, or below the data area that an image of this size has.
        if let Ok(first_block_sectors) = u32::try_from(sectors) {
            self.first_block_sectors = first_block_sectors;
            self.geometry.data_start = sectors * SECTOR_SIZE;
            self.first_block_is_wrong = true;
        }
    }

    /// Says that the disk may hold data: clears the "empty" flag.
    pub fn clear_empty(&mut self) {
        self.flags &= !FLAG_EMPTY;
    }

    /// Says that the version is being changed, so that the BAT means nothing.
    pub fn set_converting(&mut self) {
        self.flags |= FLAG_CONVERTING;
    }

    /// The header of this image in another version, everything in its place. The
    /// entries have to follow: [`Geometry::bat_value`] gives them.
    ///
    /// # Errors
    /// [`HeaderError::FirstBlock`] if clusters start where version 2 has none,
    /// [`HeaderError::TooLarge`] if the disk is larger than version 1 can say.
    pub fn in_version(&self, version: Version) -> Result<Self, HeaderError> {
        let g = &self.geometry;
        let mut other = self.clone();
        other.geometry.version = version;
        other.disk_size_high = 0;
        // Version 1 may leave it to be worked out.
        let sectors = g.data_start / SECTOR_SIZE;
        other.first_block_sectors =
            u32::try_from(sectors).map_err(|_| HeaderError::DiskSize(g.disk_size.0))?;
        if version == Version::V2 && !g.data_start.is_multiple_of(g.cluster.bytes()) {
            return Err(HeaderError::FirstBlock {
                sectors: other.first_block_sectors,
                why: "not a multiple of the cluster, as version 2 has it",
            });
        }
        if version == Version::V1 && g.disk_size.0 > u64::from(u32::MAX) {
            let (disk_size, cluster) = (g.disk_size, g.cluster);
            return Err(TooLarge {
                disk_size,
                cluster,
                version,
            }
            .into());
        }
        Ok(other)
    }

    /// Whether a conversion between versions was cut off half-way.
    pub fn is_converting(&self) -> bool {
        self.flags & FLAG_CONVERTING != 0
    }
}

/// See [`HEADS`].
pub(super) fn cylinders(disk_size: Sector) -> u32 {
    let cylinders = disk_size.0 / (u64::from(HEADS) * SECTORS_PER_TRACK);
    u32::try_from(cylinders).unwrap_or(u32::MAX)
}

/// How many BAT entries a disk needs, if its version can have so many.
fn entries_for(disk_size: Sector, cluster: ClusterSize, version: Version) -> Result<u32, TooLarge> {
    if disk_size > version.limit(cluster) {
        return Err(TooLarge {
            disk_size,
            cluster,
            version,
        });
    }
    // Not more than `ENTRIES_MAX`: they map no more than the limit.
    Ok(cluster.count_for(disk_size.bytes()) as u32)
}

/// What a parser lets pass.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Allow {
    Nothing,
    WrongFirstBlock,
}

/// Where data starts at the earliest: behind the BAT, at a cluster in version 2.
fn least_data_start(version: Version, cluster: ClusterSize, entries: u32) -> u64 {
    let bat_end = Header::LEN as u64 + 4 * u64::from(entries);
    match version {
        Version::V1 => bat_end.next_multiple_of(SECTOR_SIZE),
        Version::V2 => bat_end.next_multiple_of(cluster.bytes()),
    }
}

fn data_start(
    version: Version,
    cluster: ClusterSize,
    entries: u32,
    first_block_sectors: u32,
) -> Result<u64, HeaderError> {
    let bad = |why| {
        Err(HeaderError::FirstBlock {
            sectors: first_block_sectors,
            why,
        })
    };
    let bat_end = Header::LEN as u64 + 4 * u64::from(entries);
    let start = u64::from(first_block_sectors) * SECTOR_SIZE;
    match version {
        Version::V1 if start == 0 => Ok(bat_end.next_multiple_of(SECTOR_SIZE)),
        _ if start < bat_end => bad("inside the header or the BAT"),
        Version::V2 if !start.is_multiple_of(cluster.bytes()) => {
            bad("not a multiple of the cluster")
        }
        _ => Ok(start),
    }
}

impl Geometry {
    /// Bytes of one in-memory unit of BAT writeback, header included in the first.
    pub const MD_PAGE: u64 = 4096;

    /// Bytes of header and BAT.
    pub const fn metadata_len(&self) -> u64 {
        Header::LEN as u64 + 4 * self.entries as u64
    }

    /// How many clusters the disk has, a started last one counted whole: at most
    /// [`Self::entries`].
    pub fn disk_clusters(&self) -> u64 {
        self.cluster.count_for(self.disk_size.bytes())
    }

    /// How many md pages header and BAT fill, a started one counted whole.
    pub const fn md_pages(&self) -> u32 {
        self.metadata_len().div_ceil(Self::MD_PAGE) as u32
    }

    /// Byte offset of a guest cluster on the guest's disk.
    pub const fn cluster_start(&self, cluster: GuestCluster) -> u64 {
        (cluster.0 as u64) << self.cluster.shift()
    }

    /// The md page that holds the entry of `cluster`.
    pub const fn md_page(&self, cluster: GuestCluster) -> u32 {
        ((Header::LEN as u64 + 4 * cluster.0 as u64) / Self::MD_PAGE) as u32
    }

    /// Byte offset in the file of the entry of a guest cluster.
    pub const fn entry_offset(&self, cluster: GuestCluster) -> u64 {
        Header::LEN as u64 + 4 * cluster.0 as u64
    }

    /// The first guest cluster of md page `page` and the one after its last.
    pub fn md_page_entries(&self, page: u32) -> std::ops::Range<u32> {
        let first = |page: u64| {
            (page * Self::MD_PAGE)
                .saturating_sub(Header::LEN as u64)
                .div_ceil(4)
        };
        let end = first(u64::from(page) + 1).min(u64::from(self.entries));
        first(u64::from(page)) as u32..end as u32
    }

    /// Where the grid of host clusters starts, in bytes: host cluster 0 is at
    /// this offset (and in version 2 never holds data).
    const fn grid_start(&self) -> u64 {
        self.data_start % self.cluster.bytes()
    }

    /// Byte offset of a host cluster in the image file.
    pub const fn host_offset(&self, cluster: HostCluster) -> u64 {
        self.grid_start() + ((cluster.0 as u64) << self.cluster.shift())
    }

    /// The host cluster that data starts with.
    pub const fn first_host_cluster(&self) -> HostCluster {
        HostCluster((self.data_start >> self.cluster.shift()) as u32)
    }

    /// How many host clusters lie below byte `len` of the file, a started one
    /// counted whole (data must not be allocated in it twice).
    pub fn host_clusters_below(&self, len: u64) -> u64 {
        self.cluster
            .count_for(len.saturating_sub(self.grid_start()))
    }

    /// The highest host cluster that a BAT entry of this version can name, plus one.
    pub fn host_cluster_limit(&self) -> u32 {
        match self.version {
            Version::V2 => u32::MAX,
            Version::V1 => {
                ((u64::from(u32::MAX) * SECTOR_SIZE - self.grid_start()) >> self.cluster.shift())
                    as u32
            }
        }
    }

    /// The value of a BAT entry that maps to `cluster`.
    pub const fn bat_value(&self, cluster: HostCluster) -> u32 {
        match self.version {
            Version::V2 => cluster.0,
            Version::V1 => (self.host_offset(cluster) / SECTOR_SIZE) as u32,
        }
    }

    /// What a BAT entry other than zero maps to; `None` if it is off the grid
    /// or in front of the data area.
    pub fn host_cluster(&self, bat_value: u32) -> Option<HostCluster> {
        let cluster = match self.version {
            Version::V2 => bat_value,
            Version::V1 => {
                let offset = (u64::from(bat_value) * SECTOR_SIZE).checked_sub(self.grid_start())?;
                if !offset.is_multiple_of(self.cluster.bytes()) {
                    return None;
                }
                (offset >> self.cluster.shift()) as u32
            }
        };
        (cluster >= self.first_host_cluster().0).then_some(HostCluster(cluster))
    }
}

#[cfg(test)]
mod tests;
