//! One file that off-line work reads and changes: the seam where tests cut the
//! power and count the steps.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::fault;

/// A file with blocking access. Changes may reach the disk in any order, or not
/// at all, until [`Self::sync`] says that they have.
pub trait ImageFile {
    /// For messages.
    fn path(&self) -> &Path;

    /// Length in bytes.
    ///
    /// # Errors
    /// Any of `fstat(2)`.
    fn file_len(&self) -> io::Result<u64>;

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// Any of `pread(2)`; `UnexpectedEof` beyond the end.
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// Any of `pwrite(2)`.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Cuts or extends the file; what is new reads as zeros.
    ///
    /// # Errors
    /// Any of `ftruncate(2)`.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes a range inside the file read as zeros and gives its space back
    /// where the file system can.
    ///
    /// # Errors
    /// Any of `fallocate(2)` and `pwrite(2)`.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes all changes stable, the length included.
    ///
    /// # Errors
    /// Any of `fdatasync(2)`; after one, nothing changed before is to be relied on.
    fn sync(&self) -> io::Result<()>;

    /// The first range at or after `offset` that may hold anything but zeros, as
    /// far as the file system tells; `None` if only holes follow.
    ///
    /// # Errors
    /// Any of `lseek(2)`.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
}

/// A file of the host.
#[derive(Debug)]
pub struct HostImage {
    file: File,
    path: PathBuf,
}

impl HostImage {
    /// `path` is for messages.
    pub fn new(file: File, path: PathBuf) -> Self {
        Self { file, path }
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl ImageFile for HostImage {
    fn path(&self) -> &Path {
        &self.path
    }

    fn file_len(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        if metadata.file_type().is_block_device() {
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(metadata.len())
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        fault::point();
        self.file.write_all_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        fault::point();
        self.file.set_len(len)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        fault::point();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start) {
            Err(Errno::OPNOTSUPP) => write_zeros(&self.file, range),
            result => Ok(result?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        fault::point();
        self.file.sync_data()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // Beyond the last data, or beyond the end.
            Err(Errno::NXIO) => return Ok(None),
            // Neither block devices nor all file systems tell holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                let end = self.file_len()?;
                return Ok((offset < end).then_some(offset..end));
            }
            Err(errno) => return Err(errno.into()),
        };
        match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) => Ok(Some(start..end)),
            // Cut off in between.
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn write_zeros(file: &File, range: Range<u64>) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut offset = range.start;
    while offset < range.end {
        let len = (range.end - offset).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..len as usize], offset)?;
        offset += len;
    }
    Ok(())
}
