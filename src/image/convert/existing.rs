//! Copying into a raw file or a block device that is there.

use std::ops::Range;
use std::path::Path;

use super::output::{Output, Piece};
use super::{BLOCK, ZEROS};
use crate::format::Sector;
use crate::format::is_zero;
use crate::image::error::{IoContext, Result};
use crate::image::file::{HostImage, ImageFile, rename_opening};
use crate::image::open::lock_file;
use crate::image::source::{open_raw, unsupported};
use crate::storage::HostFile;
use crate::storage::lock::{ImageLock, LockMode};

/// What was in it is overwritten as far as the disk reaches; what lies behind stays.
pub struct ExistingOutput {
    file: HostImage,
    len: u64,
    keep_zeros: bool,
    /// Up to here, everything is what the disk has.
    done: u64,
    _lock: ImageLock,
}

impl ExistingOutput {
    /// Opens what is at `path` for itself alone.
    pub fn open(path: &Path, keep_zeros: bool) -> Result<Self> {
        let file = HostFile {
            file: open_raw(path, true)?,
            path: path.to_owned(),
            writable: true,
        };
        let lock = lock_file(&file, LockMode::Exclusive, false)?;
        let file = HostImage::new(file.file, file.path);
        Ok(Self {
            len: file.file_len().context(path, "get the length")?,
            file,
            keep_zeros,
            done: 0,
            _lock: lock,
        })
    }

    /// Before anything is written.
    ///
    /// # Errors
    /// As [`rename_opening`].
    pub fn begin(&self) -> Result<()> {
        rename_opening(&self.file)
    }

    /// That a disk up to byte `end` fits.
    pub fn require_room(&self, end: u64) -> Result<()> {
        if end <= self.len {
            return Ok(());
        }
        Err(unsupported(
            self.file.path(),
            &format!(
                "is {} bytes long, which is smaller than the source",
                self.len
            ),
        ))
    }

    /// Makes a range read as zeros, whatever it held.
    fn zero(&self, range: Range<u64>) -> Result<()> {
        let block = BLOCK as u64;
        // Devices take whole blocks only; pieces start at them.
        let whole_end = match self.keep_zeros {
            true => range.start,
            false => range.end / block * block,
        };
        let path = self.file.path();
        if range.start < whole_end {
            let punched = self.file.punch(range.start..whole_end);
            punched.context(path, "write zeros")?;
        }
        let mut at = range.start.max(whole_end);
        while at < range.end {
            let len = (range.end - at).min(ZEROS.len() as u64);
            let written = self.file.write_all_at(&ZEROS[..len as usize], at);
            written.context(path, "write zeros")?;
            at += len;
        }
        Ok(())
    }

    /// Writes or zeroes a run of blocks that are all alike in that.
    fn put(&self, piece: Piece<'_>, run: Range<usize>, is_zero: bool) -> Result<()> {
        let start = piece.start + run.start as u64;
        match is_zero {
            true => self.zero(start..start + run.len() as u64),
            false => {
                let written = self.file.write_all_at(&piece.bytes[run], start);
                written.context(self.file.path(), "write")
            }
        }
    }
}

impl Output for ExistingOutput {
    type Made = ();

    fn unit(&self) -> u64 {
        BLOCK as u64
    }

    fn write(&mut self, piece: Piece<'_>) -> Result<()> {
        let end = piece.start + piece.len as u64;
        self.require_room(end)?;
        self.zero(self.done..piece.start)?;
        let (mut run, mut run_is_zero) = (0..0, false);
        for block in piece.inside().chunks(BLOCK) {
            let block_is_zero = is_zero(block);
            if block_is_zero != run_is_zero {
                self.put(piece, run.clone(), run_is_zero)?;
                (run, run_is_zero) = (run.end..run.end, block_is_zero);
            }
            run.end += block.len();
        }
        self.put(piece, run, run_is_zero)?;
        self.done = end;
        Ok(())
    }

    fn finish(&mut self, size: Sector) -> Result<()> {
        self.zero(self.done..size.bytes())?;
        self.file.sync().context(self.file.path(), "sync")
    }
}
