//! Where a copied disk comes from: an open disk, or a stream.

use std::io::Read;
use std::path::Path;

use crate::format::{ClusterSize, SECTOR_SIZE, Sector};
use crate::image::error::{IoContext, Result};
use crate::image::file::HostImage;
use crate::image::reader::DiskReader;

/// Gives a disk piece by piece, in ascending order.
pub trait Input {
    /// Of the disk; `None` as long as it is not known.
    fn size(&self) -> Option<Sector>;

    /// Of the source, where it has one.
    fn cluster(&self) -> ClusterSize;

    /// Fills `buffer` with the first piece at or after byte `from`, a multiple of the
    /// buffer's length, that may hold anything but zeros. Gives back where it starts,
    /// a multiple again, and how much of it belongs to the disk; the rest is zeros.
    /// `None` if only zeros follow.
    fn next(&mut self, from: u64, buffer: &mut [u8]) -> Result<Option<(u64, usize)>>;
}

/// An open disk.
pub struct DiskInput<'a> {
    pub disk: &'a DiskReader<HostImage>,
    /// Pieces that are known to hold zeros are given, too.
    pub keep_zeros: bool,
}

impl Input for DiskInput<'_> {
    fn size(&self) -> Option<Sector> {
        Some(self.disk.disk_size())
    }

    fn cluster(&self) -> ClusterSize {
        self.disk.cluster()
    }

    fn next(&mut self, from: u64, buffer: &mut [u8]) -> Result<Option<(u64, usize)>> {
        let unit = buffer.len() as u64;
        let size = self.disk.disk_size().bytes();
        let start = match self.keep_zeros {
            true => Some(from).filter(|from| *from < size),
            false => {
                let data = self.disk.next_data(from, unit)?;
                // What is before the data was found to be zeros, or is done.
                data.map(|data| data.range.start / unit * unit)
            }
        };
        let Some(start) = start else { return Ok(None) };
        self.disk.read(buffer, start)?;
        Ok(Some((start, (size - start).min(unit) as usize)))
    }
}

/// A pipe, or whatever else gives bytes in order.
pub struct StreamInput<R> {
    stream: R,
    read: u64,
    at_end: bool,
}

impl<R: Read> StreamInput<R> {
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            read: 0,
            at_end: false,
        }
    }
}

impl<R: Read> Input for StreamInput<R> {
    fn size(&self) -> Option<Sector> {
        let sectors = Sector(self.read.div_ceil(SECTOR_SIZE));
        self.at_end.then_some(sectors)
    }

    fn cluster(&self) -> ClusterSize {
        ClusterSize::DEFAULT
    }

    fn next(&mut self, from: u64, buffer: &mut [u8]) -> Result<Option<(u64, usize)>> {
        if self.at_end {
            return Ok(None);
        }
        let mut filled = 0;
        while filled < buffer.len() {
            let read = match self.stream.read(&mut buffer[filled..]) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                read => read.context(Path::new("standard input"), "read")?,
            };
            self.at_end = read == 0;
            if self.at_end {
                break;
            }
            filled += read;
        }
        buffer[filled..].fill(0);
        self.read += filled as u64;
        let len = filled.next_multiple_of(SECTOR_SIZE as usize);
        Ok((filled > 0).then_some((from, len)))
    }
}
