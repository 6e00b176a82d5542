//! Whether two disks are alike, judged as `qemu-img compare` does.

use std::path::PathBuf;

use super::error::{ImageError, Result};
use super::file::HostImage;
use super::open::OpenMode;
use super::progress::{Progress, check_cancelled};
use super::reader::{DiskReader, Status};
use super::source::{DiskFormat, Source};
use crate::format::{SECTOR_SIZE, Sector};

/// What is read of each disk at once.
const CHUNK: u64 = 2 << 20;

/// One of two disks.
#[derive(Clone, Debug)]
pub struct Side {
    /// Of an image, a bundle or a block device.
    pub path: PathBuf,
    /// What it is; `None`: look at it.
    pub format: Option<DiskFormat>,
    /// How to open a ploop disk.
    pub mode: OpenMode,
}

/// How two disks differ first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// A sector reads differently.
    Content {
        /// Where it starts, in bytes of the disk.
        offset: u64,
    },
    /// Strict only: the one has a place for what the other has none for, or knows
    /// that it reads as zeros.
    Status {
        /// Where, in bytes of the disk.
        offset: u64,
    },
    /// Strict only: one is larger.
    Size,
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Whether one is larger, and what both have is alike: then what the one has more
    /// was compared with zeros.
    pub has_tail: bool,
    /// The first difference, if there is any.
    pub difference: Option<Difference>,
}

/// Why two disks could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// One of them cannot be opened.
    #[error(transparent)]
    Open(ImageError),
    /// One of them cannot be read.
    #[error(transparent)]
    Read(ImageError),
}

/// Compares two disks; `strict` also whether sizes and allocation are the same.
///
/// # Errors
/// See [`CompareError`].
pub fn compare(
    a: &Side,
    b: &Side,
    strict: bool,
    progress: &dyn Progress,
) -> std::result::Result<Comparison, CompareError> {
    let open = |side: &Side| Source::open(&side.path, side.format, side.mode);
    let first = open(a).map_err(CompareError::Open)?;
    let second = open(b).map_err(CompareError::Open)?;
    let sizes = [first.disk.disk_size(), second.disk.disk_size()];
    let sizes_differ = sizes[0] != sizes[1];
    let difference = if strict && sizes_differ {
        Some(Difference::Size)
    } else {
        let mut pair = Pair {
            a: Cursor::new(&first.disk),
            b: Cursor::new(&second.disk),
            strict,
        };
        let found = pair.first_difference(|| check_cancelled(progress, &a.path, NOTHING), progress);
        found.map_err(CompareError::Read)?
    };
    let common = sizes[0].min(sizes[1]).bytes();
    let in_common = matches!(
        difference,
        Some(Difference::Content { offset } | Difference::Status { offset }) if offset < common
    );
    Ok(Comparison {
        has_tail: sizes_differ && !in_common,
        difference,
    })
}

const NOTHING: &str = "nothing is known of what was not compared yet";

/// A disk, and the state of the part that is looked at.
struct Cursor<'a> {
    disk: &'a DiskReader<HostImage>,
    status: Option<Status>,
    buffer: Vec<u8>,
}

impl<'a> Cursor<'a> {
    fn new(disk: &'a DiskReader<HostImage>) -> Self {
        Self {
            disk,
            status: None,
            buffer: Vec::new(),
        }
    }

    /// Of the part at `offset`; behind the end of the disk nothing has a place.
    fn status(&mut self, offset: u64) -> Result<Status> {
        if let Some(status) = self.status.filter(|status| offset < status.end) {
            return Ok(status);
        }
        let status = self.disk.status(offset, 8 * CHUNK)?.unwrap_or(Status {
            end: u64::MAX,
            allocated: false,
            zero: true,
        });
        self.status = Some(status);
        Ok(status)
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<&[u8]> {
        self.buffer.resize(len, 0);
        self.disk.read(&mut self.buffer, offset)?;
        Ok(&self.buffer)
    }
}

struct Pair<'a> {
    a: Cursor<'a>,
    b: Cursor<'a>,
    strict: bool,
}

impl Pair<'_> {
    fn first_difference(
        &mut self,
        go_on: impl Fn() -> Result<()>,
        progress: &dyn Progress,
    ) -> Result<Option<Difference>> {
        let Sector(sectors) = self.a.disk.disk_size().max(self.b.disk.disk_size());
        let size = sectors * SECTOR_SIZE;
        progress.begin(size);
        let mut offset = 0;
        while offset < size {
            go_on()?;
            let (a, b) = (self.a.status(offset)?, self.b.status(offset)?);
            if self.strict && (a.allocated, a.zero) != (b.allocated, b.zero) {
                return Ok(Some(Difference::Status { offset }));
            }
            let mut end = a.end.min(b.end).min(size);
            if !(a.zero && b.zero) {
                end = end.min(offset + CHUNK);
                let len = (end - offset) as usize;
                let (a, b) = (self.a.read(offset, len)?, self.b.read(offset, len)?);
                if let Some(inside) = first_sector_that_differs(a, b) {
                    let offset = offset + inside;
                    return Ok(Some(Difference::Content { offset }));
                }
            }
            offset = end;
            progress.done(offset);
        }
        Ok(None)
    }
}

/// Where in two pieces of the same length the first sector starts that differs.
fn first_sector_that_differs(a: &[u8], b: &[u8]) -> Option<u64> {
    if a == b {
        return None;
    }
    let sector = SECTOR_SIZE as usize;
    let mut pairs = a.chunks(sector).zip(b.chunks(sector));
    let index = pairs.position(|(a, b)| a != b)?;
    Some(index as u64 * SECTOR_SIZE)
}
