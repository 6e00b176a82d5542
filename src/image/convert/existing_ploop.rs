//! Copying into a ploop disk that is there.
//!
//! New clusters come from the end of the file only, and entries reach the disk once
//! everything else is stable, so a cut leaves an image that is sound and marked as in
//! use. Its content is then partly what it was, as in any target that is overwritten.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use super::output::{Output, Piece};
use super::write_data;
use crate::format::is_zero;
use crate::format::{GuestCluster, HostCluster, InUse, Sector};
use crate::image::delta::Delta;
use crate::image::error::Result;
use crate::image::file::HostImage;
use crate::image::open::{Access, OpenImage, OpenMode, image_of, open};
use crate::image::repair::{examine_as, free_leaks};
use crate::image::source::unsupported;
use crate::ploop::Level;

/// What was in it is overwritten as far as the disk reaches; what lies behind stays.
pub struct ExistingPloopOutput {
    delta: Delta<HostImage>,
    next: HostCluster,
    changed: BTreeSet<u32>,
    keep_zeros: bool,
    /// Up to here, everything is what the disk has.
    done: u64,
    /// Holds the locks.
    _image: OpenImage,
}

impl ExistingPloopOutput {
    /// Opens the disk at `path` for itself alone; changes nothing yet.
    pub fn open(path: &Path, keep_zeros: bool) -> Result<Self> {
        let image = open(path, OpenMode::new(Access::Change))?;
        let ([Level::Ploop], [file]) = (&image.chain.levels[..], &image.files[..]) else {
            return Err(unsupported(
                path,
                "is not one ploop image alone; delete its snapshots first, or convert into a new \
                 disk",
            ));
        };
        let delta = Delta::load(image_of(file)?)?;
        let scan = delta.require_sound()?;
        let file_end = delta.geometry().host_clusters_below(delta.file_len()?);
        let next = file_end.max(u64::from(scan.end.0)).min(u64::from(u32::MAX));
        Ok(Self {
            delta,
            next: HostCluster(next as u32),
            changed: BTreeSet::new(),
            keep_zeros,
            done: 0,
            _image: image,
        })
    }

    /// That a disk up to byte `end` fits.
    pub fn require_room(&self, end: u64) -> Result<()> {
        let size = self.delta.geometry().disk_size.bytes();
        if end <= size {
            return Ok(());
        }
        let why = format!("is a disk of {size} bytes, which is smaller than the source");
        Err(unsupported(self.delta.path(), &why))
    }

    /// A new cluster at the end of the file, which reads as zeros.
    fn allocate(&mut self, guest: GuestCluster) -> Result<u64> {
        let geometry = *self.delta.geometry();
        if self.next.0 >= geometry.host_cluster_limit() {
            return Err(unsupported(
                self.delta.path(),
                "has no room left in its file",
            ));
        }
        let host = self.next;
        self.next.0 += 1;
        self.delta.set_len(geometry.host_offset(self.next))?;
        self.delta.set_entry(guest, Some(host));
        self.changed.insert(guest.0);
        Ok(geometry.host_offset(host))
    }

    /// Puts `bytes` at the start of a cluster, whose rest stays what it is.
    fn put(&mut self, guest: GuestCluster, bytes: &[u8]) -> Result<()> {
        match (self.delta.lookup(guest), !self.keep_zeros && is_zero(bytes)) {
            (_, true) => self.zero(guest, bytes.len() as u64),
            (Some(offset), false) => self.delta.write(bytes, offset, "write"),
            (None, false) => {
                let offset = self.allocate(guest)?;
                match self.keep_zeros {
                    true => self.delta.write(bytes, offset, "write"),
                    false => write_data(self.delta.file(), bytes, offset),
                }
            }
        }
    }

    /// Makes the first `len` bytes of a cluster zeros.
    fn zero(&mut self, guest: GuestCluster, len: u64) -> Result<()> {
        let Some(offset) = self.delta.lookup(guest) else {
            return Ok(());
        };
        if len < self.unit() {
            return self.delta.punch(offset..offset + len);
        }
        // It is given back once that is stable.
        self.delta.set_entry(guest, None);
        self.changed.insert(guest.0);
        Ok(())
    }

    /// Makes what was skipped zeros; it starts at a cluster.
    fn zero_range(&mut self, range: Range<u64>) -> Result<()> {
        let mut start = range.start;
        while start < range.end {
            let len = (range.end - start).min(self.unit());
            self.zero(self.cluster_at(start), len)?;
            start += len;
        }
        Ok(())
    }

    fn cluster_at(&self, offset: u64) -> GuestCluster {
        GuestCluster((offset >> self.delta.geometry().cluster.shift()) as u32)
    }
}

impl Output for ExistingPloopOutput {
    type Made = ();

    fn unit(&self) -> u64 {
        self.delta.geometry().cluster.bytes()
    }

    fn write(&mut self, piece: Piece<'_>) -> Result<()> {
        let end = piece.start + piece.len as u64;
        self.require_room(end)?;
        if self.delta.header().in_use != InUse::Open {
            self.delta.begin()?;
        }
        self.zero_range(self.done..piece.start)?;
        let mut guest = self.cluster_at(piece.start);
        for bytes in piece.inside().chunks(self.unit() as usize) {
            self.put(guest, bytes)?;
            guest.0 += 1;
        }
        self.done = end;
        Ok(())
    }

    fn finish(&mut self, size: Sector) -> Result<()> {
        self.delta.begin()?;
        self.zero_range(self.done..size.bytes())?;
        self.delta.sync()?;
        self.delta.clear_empty();
        // Also where no entry has changed: of the flag.
        self.delta.write_header()?;
        let changed = self.changed.iter().copied().map(GuestCluster);
        self.delta.write_entries(changed)?;
        self.delta.sync()?;
        let findings = examine_as(&mut self.delta, InUse::Open)?;
        free_leaks(&self.delta, &findings)?;
        self.delta.finish(InUse::Closed)
    }
}
