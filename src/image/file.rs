//! One file that off-line work reads and changes: the seam where tests cut the
//! power and count the steps.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use super::error::{IoContext, Result};
use super::fault;
use crate::storage::zeros::first_data;
use crate::storage::{
    Aio, Cache, Disk, FileId, HostDisk, HostFile, HostOptions, filesystem, opening,
};

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

    /// Cuts or extends the file; what is new reads as zeros. A cut file may keep
    /// [`Self::kept_tail`].
    ///
    /// # Errors
    /// Any of `ftruncate(2)`.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// How many bytes, all zero, may stay behind the place where the file is cut.
    fn kept_tail(&self) -> u64 {
        0
    }

    /// Makes a range inside the file read as zeros and gives its space back
    /// where the file system can; where it cannot, none is taken.
    ///
    /// # Errors
    /// Any of `fallocate(2)` and `pwrite(2)`.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes all changes stable, the length included.
    ///
    /// # Errors
    /// Any of `fsync(2)`; after one, nothing changed before is to be relied on.
    fn sync(&self) -> io::Result<()>;

    /// The first range at or after `offset` that may hold anything but zeros, as
    /// far as the file system tells; `None` if only holes follow.
    ///
    /// # Errors
    /// Any of `lseek(2)`.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// The file becomes another than the one that a killed process has left: who has served
    /// a guest from it must not go on with what he knows of it.
    ///
    /// # Errors
    /// Any of `fgetxattr(2)` and `fsetxattr(2)`.
    fn rename_opening(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes sure that nobody else has got the lock on the file meanwhile, where a server can
    /// take it away and says so.
    ///
    /// # Errors
    /// When it is gone, or that cannot be found out. Nothing can be written any more then.
    fn require_lock(&self) -> io::Result<()> {
        Ok(())
    }

    /// Whether the file system says where holes are. If not, all of the file may
    /// look like data to [`Self::next_data`].
    fn tells_holes(&self) -> bool {
        true
    }
}

/// A file of the host.
///
/// Where other hosts may change the file too, it is read and written around the page
/// cache: on some of these file systems (Ceph's FUSE client, for one) the cache
/// does not learn of what was written around it, not even by the same host, and a
/// full image looked empty. Everywhere else the cache is right and faster.
#[derive(Debug)]
pub struct HostImage {
    file: File,
    path: PathBuf,
    direct: Option<HostDisk>,
    /// `SEEK_DATA` was refused.
    hides_holes: Cell<bool>,
}

/// The file of [`HostImage::direct`].
const ONLY: FileId = FileId(0);

impl HostImage {
    /// `path` is for messages.
    pub fn new(file: File, path: PathBuf) -> Self {
        let is_shared = filesystem::may_be_shared(&file);
        let image = Self {
            hides_holes: Cell::new(is_shared),
            file,
            path,
            direct: None,
        };
        if is_shared {
            image.around_the_cache()
        } else {
            image
        }
    }

    /// The same file, read and written directly; as before where it cannot be opened
    /// so.
    fn around_the_cache(self) -> Self {
        let writable =
            rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| flags.contains(OFlags::RDWR));
        let open = |file| {
            let file = HostFile {
                file,
                path: self.path.clone(),
                writable,
            };
            let options = HostOptions {
                cache: Cache::None,
                aio: Aio::Psync,
            };
            HostDisk::new(vec![file], options)
        };
        let direct = self.file.try_clone().and_then(open).ok();
        Self { direct, ..self }
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// As [`ImageFile::sync`], and its owner and mode as well.
    ///
    /// # Errors
    /// Any of `fsync(2)`; after one, nothing changed before is to be relied on.
    pub fn sync_all(&self) -> io::Result<()> {
        self.sync_direct()?;
        self.file.sync_all()
    }

    /// Syncs by way of what was written directly: a server may tell of a lost write only
    /// there ([`filesystem::Kind::tells_lost_writes_once`]).
    fn sync_direct(&self) -> io::Result<()> {
        let direct = self.direct.as_ref();
        direct.map_or(Ok(()), |disk| disk.sync(ONLY))
    }
}

impl ImageFile for HostImage {
    fn require_lock(&self) -> io::Result<()> {
        let direct = self.direct.as_ref();
        direct.map_or(Ok(()), HostDisk::require_locks)
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn file_len(&self) -> io::Result<u64> {
        if self.file.metadata()?.file_type().is_block_device() {
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        filesystem::len_now(&self.file)
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(disk) => disk.read_exact_at(ONLY, bytes, offset),
            None => self.file.read_exact_at(bytes, offset),
        }
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        fault::point();
        match &self.direct {
            Some(disk) => disk.write_all_at(ONLY, bytes, offset),
            None => self.file.write_all_at(bytes, offset),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        fault::point();
        match &self.direct {
            Some(disk) => disk.set_len(ONLY, len),
            None => filesystem::set_len(&self.file, len),
        }
    }

    fn kept_tail(&self) -> u64 {
        match filesystem::keeps_shards(&self.file) {
            true => filesystem::KEPT_TAIL,
            false => 0,
        }
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        fault::point();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start) {
            Err(Errno::OPNOTSUPP) => write_zeros(self, range),
            result => Ok(result?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        fault::point();
        self.sync_direct()?;
        match filesystem::keeps_length_with_data(&self.file) {
            true => self.file.sync_data(),
            false => self.file.sync_all(),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        match filesystem::next_data(&self.file, offset) {
            Err(errno) if filesystem::refuses_seek(errno) => {
                self.hides_holes.set(true);
                let end = self.file_len()?;
                Ok((offset < end).then_some(offset..end))
            }
            data => Ok(data?),
        }
    }

    fn rename_opening(&self) -> io::Result<()> {
        fault::point();
        opening::rename_opening(&self.file)
    }

    fn tells_holes(&self) -> bool {
        !self.hides_holes.get()
    }
}

/// Over what is anything else, so that no space is taken that was not taken before.
fn write_zeros(image: &HostImage, range: Range<u64>) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut bytes = vec![0; ZEROS.len()];
    let end = range.end.min(image.file_len()?);
    let mut offset = range.start;
    while offset < end {
        let len = (end - offset).min(ZEROS.len() as u64) as usize;
        image.read_exact_at(&mut bytes[..len], offset)?;
        let mut from = 0;
        while let Some(data) = first_data(&bytes[from..len], offset + from as u64) {
            image.write_all_at(&ZEROS[..data.len()], offset + (from + data.start) as u64)?;
            from += data.end;
        }
        offset += len as u64;
    }
    Ok(())
}

/// To come before the first change of a file. A guest whose process was killed remembers
/// what is not in the file (clusters that look unused, writes that were under way), and
/// another process would serve it on: not any more.
///
/// # Errors
/// Any of [`ImageFile::rename_opening`]; nothing is changed then.
pub(super) fn rename_opening(file: &impl ImageFile) -> Result<()> {
    let renamed = file.rename_opening();
    renamed.context(file.path(), "note that the image is changed")
}

#[cfg(test)]
mod tests;
