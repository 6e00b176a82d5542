//! Reading a disk off line: which file holds what, through all levels.

use std::ops::Range;
use std::path::Path;

use super::delta::{Delta, read_or_zeros};
use super::error::{ImageError, IoContext, Result};
use super::file::{HostImage, ImageFile};
use super::open::{OpenImage, OpenMode, image_of, look_at};
use crate::format::{ClusterSize, GuestCluster, Sector};
use crate::ploop::Level;

/// The levels of a disk, to be read as one.
#[derive(Debug)]
pub struct DiskReader<F> {
    /// Base first.
    levels: Vec<ReaderLevel<F>>,
    /// Of each file that nobody changes, how long it was: it is cut when the level is deleted.
    lens: Vec<u64>,
    disk_size: Sector,
    /// Of all expandable levels; what a disk without any is looked up in.
    cluster: ClusterSize,
}

/// One of them.
#[derive(Debug)]
pub(super) enum ReaderLevel<F> {
    Ploop(Delta<F>),
    /// A raw image, of which so much belongs to the disk.
    Plain {
        file: F,
        size: Sector,
    },
}

impl<F: ImageFile> ReaderLevel<F> {
    fn file(&self) -> &F {
        match self {
            Self::Ploop(delta) => delta.file(),
            Self::Plain { file, .. } => file,
        }
    }
}

/// Part of a disk that lies in one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// In bytes of the disk.
    pub range: Range<u64>,
    /// Where it is; `None` if no level has it, so that it reads as zeros.
    pub place: Option<Place>,
}

/// A place in one of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the level, 0 is the base.
    pub level: usize,
    /// In bytes of its file.
    pub offset: u64,
}

/// What is known of part of a disk without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Where the part ends, in bytes of the disk.
    pub end: u64,
    /// Whether any level has a place for it.
    pub allocated: bool,
    /// Whether it reads as zeros.
    pub zero: bool,
}

impl DiskReader<HostImage> {
    /// Opens the disk at `path` and reads all its BATs: see [`look_at`].
    ///
    /// # Errors
    /// Those of opening it, and of [`Self::load`].
    pub(super) fn open(path: &Path, mode: OpenMode) -> Result<(OpenImage, Self)> {
        look_at(path, mode, |image| {
            let disk = Self::load(&image)?;
            Ok((image, disk))
        })
    }

    /// Reads all BATs of an open disk.
    ///
    /// # Errors
    /// A level with wrong entries or a half-done change of its version, or an
    /// I/O error.
    pub fn load(image: &OpenImage) -> Result<Self> {
        let mut levels = Vec::new();
        for (level, file) in image.chain.levels.iter().zip(&image.files) {
            let file = image_of(file)?;
            levels.push(match *level {
                Level::Plain { size, .. } => ReaderLevel::Plain { file, size },
                Level::Ploop => ReaderLevel::Ploop(load_readable(file)?),
            });
        }
        Self::of(levels)?.ok_or_else(|| ImageError::Unsupported {
            path: image.files[0].path.clone(),
            why: "has no levels".into(),
        })
    }

    /// A raw image as a disk of one level, rounded up to whole sectors.
    ///
    /// # Errors
    /// Any of `fstat(2)`.
    pub fn of_raw(file: HostImage) -> Result<Self> {
        let len = file.file_len().context(file.path(), "get the length")?;
        let size = Sector(len.div_ceil(crate::format::SECTOR_SIZE));
        Ok(Self {
            levels: vec![ReaderLevel::Plain { file, size }],
            lens: Vec::new(),
            disk_size: size,
            cluster: ClusterSize::DEFAULT,
        })
    }
}

fn load_readable(file: HostImage) -> Result<Delta<HostImage>> {
    let delta = Delta::load(file)?;
    delta.require_readable()?;
    Ok(delta)
}

impl<F: ImageFile> DiskReader<F> {
    fn of(levels: Vec<ReaderLevel<F>>) -> Result<Option<Self>> {
        let Some((top, below)) = levels.split_last() else {
            return Ok(None);
        };
        let disk_size = match top {
            ReaderLevel::Ploop(delta) => delta.geometry().disk_size,
            ReaderLevel::Plain { size, .. } => *size,
        };
        let lens = below.iter().map(|level| {
            let file = level.file();
            file.file_len().context(file.path(), "get the length")
        });
        let lens = lens.collect::<Result<_>>()?;
        let clusters = levels.iter().filter_map(|level| match level {
            ReaderLevel::Ploop(delta) => Some(delta.geometry().cluster),
            ReaderLevel::Plain { .. } => None,
        });
        Ok(Some(Self {
            cluster: clusters.last().unwrap_or(ClusterSize::DEFAULT),
            levels,
            lens,
            disk_size,
        }))
    }

    /// That what has just been read of a level was there: one that is deleted meanwhile has no
    /// data any more, which looks like zeros.
    fn require_whole(&self, level: usize) -> Result<()> {
        let Some(len) = self.lens.get(level) else {
            return Ok(());
        };
        let file = self.file(level);
        match file.file_len().context(file.path(), "get the length")? < *len {
            true => Err(ImageError::Busy(file.path().to_owned())),
            false => Ok(()),
        }
    }

    /// Of the guest's disk.
    pub fn disk_size(&self) -> Sector {
        self.disk_size
    }

    /// Of the disk, as a level has it: those above may have more.
    pub fn size_of(&self, level: usize) -> Sector {
        match &self.levels[level] {
            ReaderLevel::Ploop(delta) => delta.geometry().disk_size,
            ReaderLevel::Plain { size, .. } => *size,
        }
    }

    /// Of the expandable levels, or the default if there is none.
    pub fn cluster(&self) -> ClusterSize {
        self.cluster
    }

    /// How many levels there are.
    pub fn depth(&self) -> usize {
        self.levels.len()
    }

    /// The name of the file of a level, for messages and reports.
    pub fn path(&self, level: usize) -> &Path {
        self.file(level).path()
    }

    /// One of the levels.
    pub(super) fn level(&self, level: usize) -> &ReaderLevel<F> {
        &self.levels[level]
    }

    pub(super) fn file(&self, level: usize) -> &F {
        self.levels[level].file()
    }

    /// Whether a level is a raw image.
    pub fn is_plain(&self, level: usize) -> bool {
        matches!(self.levels[level], ReaderLevel::Plain { .. })
    }

    /// The extent that starts at byte `start` of the disk, at most to the end of
    /// its cluster.
    fn extent_in_cluster(&self, start: u64) -> Extent {
        let cluster = GuestCluster((start >> self.cluster.shift()) as u32);
        let cluster_start = u64::from(cluster.0) << self.cluster.shift();
        let mut end = (cluster_start + self.cluster.bytes()).min(self.disk_size.bytes());
        for (level, from) in self.levels.iter().enumerate().rev() {
            let (size, place) = match from {
                ReaderLevel::Plain { size, .. } => (size.bytes(), Some(cluster_start)),
                ReaderLevel::Ploop(delta) => {
                    (delta.geometry().disk_size.bytes(), delta.lookup(cluster))
                }
            };
            let Some(offset) = place.filter(|_| start < size) else {
                continue;
            };
            // A lower level that is shorter than the disk ends here.
            end = end.min(size);
            let offset = offset + (start - cluster_start);
            return Extent {
                range: start..end,
                place: Some(Place { level, offset }),
            };
        }
        Extent {
            range: start..end,
            place: None,
        }
    }

    /// The extent that starts at byte `start` of the disk, as long as it lies in
    /// one piece but not longer than `limit` bytes and the cluster it ends in;
    /// `None` at the end of the disk.
    pub fn extent(&self, start: u64, limit: u64) -> Option<Extent> {
        if start >= self.disk_size.bytes() {
            return None;
        }
        let mut extent = self.extent_in_cluster(start);
        while extent.range.end < self.disk_size.bytes()
            && extent.range.end - extent.range.start < limit
        {
            let next = self.extent_in_cluster(extent.range.end);
            let len = extent.range.end - extent.range.start;
            let follows = extent.place.map(|place| Place {
                offset: place.offset + len,
                ..place
            });
            if next.place != follows {
                break;
            }
            extent.range.end = next.range.end;
        }
        Some(extent)
    }

    /// The first range of the disk at or after `start` that may hold anything but
    /// zeros, as far as mapping and host file system tell; at most `limit` bytes
    /// and a cluster long. `None` if only zeros follow.
    ///
    /// # Errors
    /// Any of `lseek(2)`.
    pub fn next_data(&self, start: u64, limit: u64) -> Result<Option<Extent>> {
        let mut start = start;
        while let Some(extent) = self.extent(start, limit) {
            start = extent.range.end;
            let Some(place) = extent.place else { continue };
            let file = self.file(place.level);
            let len = extent.range.end - extent.range.start;
            let data = file.next_data(place.offset);
            let data = data.context(file.path(), "seek in")?;
            self.require_whole(place.level)?;
            let Some(data) = data.filter(|data| data.start < place.offset + len) else {
                continue;
            };
            let skipped = data.start - place.offset;
            let data_end = data.end.min(place.offset + len);
            let range_start = extent.range.start + skipped;
            return Ok(Some(Extent {
                range: range_start..range_start + (data_end - data.start),
                place: Some(Place {
                    offset: data.start,
                    ..place
                }),
            }));
        }
        Ok(None)
    }

    /// What is known of the part of the disk that starts at byte `start`, as mapping
    /// and host file system tell; it ends after `limit` bytes and a cluster at the
    /// latest. `None` at the end of the disk.
    ///
    /// # Errors
    /// Any of `lseek(2)`.
    pub fn status(&self, start: u64, limit: u64) -> Result<Option<Status>> {
        let Some(Extent { range, place }) = self.extent(start, limit) else {
            return Ok(None);
        };
        let status = |end, zero| Status {
            end,
            allocated: place.is_some(),
            zero,
        };
        let Some(place) = place else {
            return Ok(Some(status(range.end, true)));
        };
        let file = self.file(place.level);
        let data = file.next_data(place.offset);
        let data = data.context(file.path(), "seek in")?;
        self.require_whole(place.level)?;
        let on_disk = |offset: u64| (range.start + (offset - place.offset)).min(range.end);
        Ok(Some(match data {
            None => status(range.end, true),
            Some(data) if data.start > place.offset => status(on_disk(data.start), true),
            Some(data) => status(on_disk(data.end), false),
        }))
    }

    /// Fills `bytes` from byte `start` of the disk; beyond its end with zeros.
    ///
    /// # Errors
    /// Any of `pread(2)`.
    pub fn read(&self, bytes: &mut [u8], start: u64) -> Result<()> {
        let mut rest = bytes;
        let mut start = start;
        while !rest.is_empty() {
            let Some(extent) = self.extent(start, rest.len() as u64) else {
                rest.fill(0);
                return Ok(());
            };
            let len = (extent.range.end - start).min(rest.len() as u64) as usize;
            let (piece, after) = rest.split_at_mut(len);
            match extent.place {
                None => piece.fill(0),
                Some(place) => {
                    let file = self.file(place.level);
                    let read = read_or_zeros(file, piece, place.offset);
                    read.context(file.path(), "read")?;
                    self.require_whole(place.level)?;
                }
            }
            rest = after;
            start += len as u64;
        }
        Ok(())
    }
}
