//! Copies what some images of a chain have into the one that lies on them, step by step, while
//! anybody reads any of them: afterwards nobody needs these any more.
//!
//! The image that gets it reads the same at every moment, with them below it and, at the end,
//! without: where it has a cluster already, nothing is done, and where it has none, it gets what
//! was read through it. A cluster is written where the file had nothing, its data and the length
//! are stable before its entry is written, and entries only come. So whoever reads the image
//! meanwhile, whatever he knows of its BAT, reads the same; and a cut leaves some copies more, or
//! space behind the last cluster that the next one who does this uses.
//!
//! Nobody else may write to the image. It is marked as in use from before the first change to
//! after the last, as any that changes.

use std::io;

use super::merge::{Level, no_room};
use super::open_for_change;
use crate::format::{Geometry, GuestCluster, Guid, HostCluster, ImageKind, InUse, is_zero};
use crate::image::bundle::Bundle;
use crate::image::convert::write_data;
use crate::image::delta::{Delta, read_header, read_or_zeros};
use crate::image::error::{ImageError, IoContext, Result};
use crate::image::file::{HostImage, ImageFile};
use crate::image::open::{image_of, lock_to_read, open_level};
use crate::ploop::rule::{self, Rule};
use crate::storage::HostFile;
use crate::storage::lock::ImageLock;
use crate::storage::zeros::KnownData;

/// So many bytes are copied before they are made stable, and then mapped: a guest whose flush
/// has to wait for that on the same file system shall not wait long.
const UNMAPPED_BYTES: u64 = 8 << 20;

/// Entries that are looked at between two looks at the clock.
const LOOKS: u32 = 1 << 16;

/// See the module's text. Dropped, it leaves the image as a cut does: see [`Self::close`].
pub(crate) struct Lift<F> {
    upper: Delta<F>,
    /// The highest first.
    lower: Vec<Level<F>>,
    /// Bytes of the disk that a raw one of them has.
    plain_size: u64,
    /// Nothing lies below them: a cluster of zeros need not be there that hides nothing of them.
    is_base: bool,
    /// Of each of them.
    data: Vec<KnownData>,
    /// Where to look on.
    next: u32,
    /// The next cluster of the file.
    host: u32,
    file_len: u64,
    /// What was copied and is not mapped yet.
    unmapped: Vec<(GuestCluster, HostCluster)>,
    /// See [`UNMAPPED_BYTES`].
    unmapped_bytes: u64,
    buffer: Vec<u8>,
    is_begun: bool,
    /// It is marked as in use, or may be so: closing it is not over.
    is_marked: bool,
    /// Somebody else who did not come to an end has left it marked, and not all that is read of
    /// it need be on the disk: see [`Self::doubt_length`].
    is_inherited: bool,
    /// Zeros are written as any other data: see [`Self::doubt_length`].
    writes_zeros: bool,
    /// A sync may have failed: nothing that was written is to be relied on.
    is_lost: bool,
    total: u64,
    done: u64,
}

/// What a step has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LiftStep {
    /// There is more to do.
    More,
    /// The host has no space. The next step tries again.
    Full,
    /// The image has all that it needs, stable, and is closed.
    Done,
}

impl<F: ImageFile> Lift<F> {
    /// Into `upper` from the images below it, the highest first; of a raw one among them so many
    /// bytes are of the disk. `is_base` says that nothing lies below them.
    ///
    /// # Errors
    /// A wrong BAT; more clusters than the image can have; an I/O error.
    pub fn new(
        upper: Delta<F>,
        lower: Vec<Level<F>>,
        plain_size: u64,
        is_base: bool,
    ) -> Result<Self> {
        let scan = upper.require_readable()?;
        let geometry = *upper.geometry();
        let is_marked = upper.header().in_use == InUse::Open;
        let first = geometry.first_host_cluster().max(scan.used.end());
        let mut lift = Self {
            file_len: upper.file_len()?,
            buffer: vec![0; geometry.cluster.bytes() as usize],
            upper,
            data: lower.iter().map(|_| KnownData::default()).collect(),
            lower,
            plain_size,
            is_base,
            next: 0,
            host: first.0,
            unmapped: Vec::new(),
            unmapped_bytes: UNMAPPED_BYTES,
            is_begun: false,
            is_marked,
            is_inherited: is_marked,
            writes_zeros: is_marked,
            is_lost: false,
            total: 0,
            done: 0,
        };
        for level in &lift.lower {
            if let Level::Ploop(delta) = level {
                delta.require_readable()?;
            }
        }
        let mut next = 0;
        while let Some((guest, _)) = lift.find(next, u32::MAX)?.found() {
            lift.total += 1;
            next = guest.0 + 1;
        }
        let clusters = u64::from(first.0) + lift.total;
        if clusters > u64::from(geometry.host_cluster_limit()) {
            return Err(no_room(lift.upper.path()));
        }
        Ok(lift)
    }

    /// After so many bytes it maps them.
    #[cfg(test)]
    pub fn map_after(&mut self, bytes: u64) {
        self.unmapped_bytes = bytes;
    }

    /// How many clusters are copied, and how many there are to be copied.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.min(self.total), self.total)
    }

    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        self.upper.geometry().cluster.bytes()
    }

    /// Where the image has a cluster, once all is done. If it has none, one of those below may
    /// have zeros, with nothing below that one.
    pub fn place(&self, guest: GuestCluster) -> Option<HostCluster> {
        self.upper.host_cluster(guest)
    }

    /// Copies a cluster, or looks for one for a while; at the end closes the image.
    ///
    /// # Errors
    /// An I/O error. The image stays marked as in use.
    pub fn step(&mut self) -> Result<LiftStep> {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match self.try_step() {
            Err(ImageError::Io { source, .. })
                if !self.is_lost && matches!(source.kind(), StorageFull | QuotaExceeded) =>
            {
                Ok(LiftStep::Full)
            }
            step => step,
        }
    }

    fn try_step(&mut self) -> Result<LiftStep> {
        self.require_nothing_lost()?;
        let unmapped = self.unmapped.len() as u64 * self.cluster_bytes();
        if unmapped >= self.unmapped_bytes {
            self.map()?;
            return Ok(LiftStep::More);
        }
        match self.find(self.next, LOOKS)? {
            Found::Cluster(guest, at) => {
                self.copy(guest, at)?;
                self.next = guest.0 + 1;
                self.done += 1;
                Ok(LiftStep::More)
            }
            Found::NotYet(next) => {
                self.next = next;
                Ok(LiftStep::More)
            }
            Found::End => {
                match self.is_marked {
                    true => self.close()?,
                    // It says that it is closed: but whoever wrote that has failed at it, perhaps,
                    // and could not take it back.
                    false => self.upper.sync()?,
                }
                Ok(LiftStep::Done)
            }
        }
    }

    /// Copies no more: what was copied is mapped, and the image closed.
    ///
    /// # Errors
    /// An I/O error. The image stays marked as in use.
    pub fn close(&mut self) -> Result<()> {
        if !self.is_marked {
            return Ok(());
        }
        self.require_nothing_lost()?;
        self.begin()?;
        self.map()?;
        if rule::kept(Rule::LevelMapBeforeDrop) {
            let closed = self.upper.finish(InUse::Closed);
            closed.inspect_err(|_| self.take_back_mark())?;
        }
        self.is_begun = false;
        self.is_marked = false;
        Ok(())
    }

    /// A sync that failed is not made good by one that succeeds later.
    fn require_nothing_lost(&self) -> Result<()> {
        let lost = || io::Error::other("a sync of it has failed, and it may lack what it covered");
        match self.is_lost {
            true => Err(lost()).context(self.upper.path(), "go on with"),
            false => Ok(()),
        }
    }

    /// The first cluster from here on that is to be copied, and which of the images below has it
    /// where. So many are looked at.
    fn find(&mut self, from: u32, looks: u32) -> Result<Found> {
        let geometry = *self.upper.geometry();
        let end = geometry.disk_clusters() as u32;
        let size = geometry.cluster.bytes();
        let mut guest = GuestCluster(from);
        for _ in 0..looks {
            if guest.0 >= end {
                return Ok(Found::End);
            }
            if self.upper.lookup(guest).is_none() {
                for (index, level) in self.lower.iter().enumerate() {
                    match level {
                        Level::Ploop(delta) => {
                            let Some(offset) = delta.lookup(guest) else {
                                continue;
                            };
                            let file = delta.file();
                            // One that was preallocated, perhaps.
                            if self.is_base {
                                let data = find_data(&mut self.data[index], file, offset)?;
                                let is_hole = data.is_none_or(|data| data >= offset + size);
                                if is_hole && !self.hides(guest, index)? {
                                    break;
                                }
                            }
                            return Ok(Found::Cluster(guest, (index, offset)));
                        }
                        Level::Plain(file) => {
                            let start = geometry.cluster_start(guest);
                            let data = find_data(&mut self.data[index], file, start)?;
                            let data = data.unwrap_or(self.plain_size);
                            if data >= self.plain_size {
                                // It has nothing from here on.
                                guest = if index == 0 { GuestCluster(end) } else { guest };
                                break;
                            }
                            let first = GuestCluster((data >> geometry.cluster.shift()) as u32);
                            if first == guest {
                                return Ok(Found::Cluster(guest, (index, start)));
                            }
                            // Those in between may be in an image above it.
                            if index == 0 {
                                guest = GuestCluster(first.0 - 1);
                            }
                        }
                    }
                }
            }
            guest.0 = guest.0.saturating_add(1);
        }
        Ok(Found::NotYet(guest.0))
    }

    /// Whether something lies below the cluster of this image that would show without it. As long
    /// as that is there, the cluster has to be in the image that gets all, too, be it zeros: whoever
    /// does not need this image any more has a hole there else (`ploop/redirect.rs`), and would take
    /// nothing along if only the images above the lowest were deleted afterwards.
    fn hides(&mut self, guest: GuestCluster, index: usize) -> Result<bool> {
        let geometry = *self.upper.geometry();
        let start = geometry.cluster_start(guest);
        let end = (start + geometry.cluster.bytes()).min(self.plain_size);
        for (level, data) in self.lower.iter().zip(&mut self.data).skip(index + 1) {
            let has_it = match level {
                Level::Ploop(delta) => delta.lookup(guest).is_some(),
                Level::Plain(file) => find_data(data, file, start)?.is_some_and(|at| at < end),
            };
            if has_it {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn copy(&mut self, guest: GuestCluster, (index, offset): (usize, u64)) -> Result<()> {
        let geometry = *self.upper.geometry();
        let start = geometry.cluster_start(guest);
        let size = geometry.cluster.bytes();
        let (of_disk, file) = match &self.lower[index] {
            Level::Ploop(delta) => (delta.geometry().disk_size.bytes(), delta.file()),
            Level::Plain(file) => (self.plain_size, file),
        };
        // Behind the end of a disk that was smaller there are zeros.
        let valid = of_disk.saturating_sub(start).min(size) as usize;
        let read = read_or_zeros(file, &mut self.buffer[..valid], offset);
        read.context(file.path(), "read")?;
        self.buffer[valid..].fill(0);
        if self.is_base && is_zero(&self.buffer) && !self.hides(guest, index)? {
            return Ok(());
        }
        self.begin()?;
        let host = HostCluster(self.host);
        let at = geometry.host_offset(host);
        if self.file_len < at + size {
            if self.file_len > at {
                // Of a copy that was cut off, perhaps.
                self.upper.punch(at..self.file_len)?;
            }
            self.upper.set_len(at + size)?;
            self.file_len = at + size;
        } else {
            self.upper.punch(at..at + size)?;
        }
        match self.writes_zeros {
            true => self.upper.write(&self.buffer, at, "write a cluster")?,
            false => write_data(self.upper.file(), &self.buffer, at)?,
        }
        self.host += 1;
        self.unmapped.push((guest, host));
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        if !self.is_begun {
            // A write of the mark that fails may have been done.
            self.is_marked = true;
            if self.is_inherited {
                self.doubt_length()?;
                // Where there is no space for that, no sync has failed.
                self.upper.write_again_if_left()?;
            }
            if rule::kept(Rule::MarkBeforeLevelChanges) {
                let begun = self.upper.begin();
                // If the mark was written, its sync has failed.
                let is_marked = self.upper.header().in_use == InUse::Open;
                begun.inspect_err(|_| self.is_lost = is_marked)?;
            }
            self.is_begun = true;
            self.is_inherited = false;
        }
        Ok(())
    }

    /// Whoever left the image marked may have done so after a failed sync. [`Delta::begin`] writes
    /// the entries again; each entry's cluster was stable before its entry was written. Behind the
    /// last of these the length, too, is in doubt: it grows anew from there. But that the file was
    /// cut may be lost as well, and then what grows has the bytes of before on the disk, whatever
    /// is read now: so [`Self::writes_zeros`].
    fn doubt_length(&mut self) -> Result<()> {
        let end = self.upper.geometry().host_offset(HostCluster(self.host));
        if self.file_len > end {
            self.upper.set_len(end)?;
            self.file_len = end;
        }
        Ok(())
    }

    /// The closed mark may be in the kernel's memory alone, or not at all. For who comes next
    /// the image is in use, so that he writes it again.
    fn take_back_mark(&mut self) {
        self.is_lost = true;
        let is_held = self.upper.file().require_lock().is_ok();
        if is_held && self.upper.header().in_use == InUse::Closed {
            self.upper.set_mark(InUse::Open);
            if let Err(error) = self.upper.write_header() {
                log::warn!(
                    "{}: cannot be marked as in use: {error}",
                    self.upper.path().display()
                );
            }
        }
    }

    /// What was copied is made stable, then mapped.
    fn map(&mut self) -> Result<()> {
        if self.unmapped.is_empty() {
            return Ok(());
        }
        if rule::kept(Rule::CopyBeforeLevelMaps) {
            let synced = self.upper.sync();
            synced.inspect_err(|_| self.is_lost = true)?;
        }
        for (guest, host) in &self.unmapped {
            self.upper.set_entry(*guest, Some(*host));
        }
        self.upper.clear_empty();
        let guests = self.unmapped.iter().map(|(guest, _)| *guest);
        self.upper.write_entries(guests)?;
        self.unmapped.clear();
        Ok(())
    }
}

/// The first byte of data of a file from here on, if there is any.
fn find_data(data: &mut KnownData, file: &impl ImageFile, start: u64) -> Result<Option<u64>> {
    let found = data.find(start, |start| file.next_data(start));
    found.context(file.path(), "look for data in")
}

/// What is to be copied next.
enum Found {
    /// This one, from there: the number of the image, and bytes in its file.
    Cluster(GuestCluster, (usize, u64)),
    /// It is not known yet: to be looked for from here on.
    NotYet(u32),
    End,
}

impl Found {
    fn found(self) -> Option<(GuestCluster, (usize, u64))> {
        match self {
            Self::Cluster(guest, at) => Some((guest, at)),
            Self::NotYet(_) | Self::End => None,
        }
    }
}

/// What [`Lift`] needs of a bundle whose top the caller serves, so that nobody else changes it;
/// others may read any of the images meanwhile.
#[derive(Debug)]
pub(crate) struct LiftedImages {
    upper: HostFile,
    /// Base first.
    lower: Vec<(HostFile, ImageKind)>,
    is_base: bool,
    locks: Vec<ImageLock>,
}

impl LiftedImages {
    /// Those of `guids`, base first, one right below the other, and of `to`, which lies on the last.
    ///
    /// # Errors
    /// Somebody writes to one of them, or keeps others from it; any of `open(2)`.
    pub fn open(bundle: &Bundle, guids: &[Guid], to: Guid) -> Result<Self> {
        let descriptor = bundle.descriptor();
        let upper = open_for_change(bundle, to)?;
        let mut locks = vec![lock_to_read(&upper)?];
        let mut lower = Vec::new();
        for guid in guids {
            let image = descriptor.image(*guid);
            let image = image.ok_or_else(|| ImageError::NoSnapshot {
                path: bundle.path().to_owned(),
                guid: *guid,
            })?;
            let file = open_level(bundle, image, false)?;
            locks.push(lock_to_read(&file)?);
            lower.push((file, image.kind));
        }
        let lowest = guids.first().and_then(|guid| descriptor.shot(*guid));
        let parent = lowest.and_then(|shot| shot.parent);
        if let (Some(parent), Some((file, _))) = (parent, lower.first()) {
            require_nothing_behind(bundle, parent, file)?;
        }
        Ok(Self {
            upper,
            lower,
            is_base: parent.is_none(),
            locks,
        })
    }

    /// To be copied, under locks until those are dropped.
    ///
    /// # Errors
    /// As [`Lift::new`]; or the images do not fit on each other.
    pub fn lift(self) -> Result<(Lift<HostImage>, Vec<ImageLock>)> {
        let upper = Delta::load(image_of(&self.upper)?)?;
        let mut above = *upper.geometry();
        let mut plain_size = 0;
        let mut lower = Vec::new();
        for (file, kind) in self.lower.iter().rev() {
            let image = image_of(file)?;
            if *kind == ImageKind::Plain {
                plain_size = above.disk_size.bytes();
                lower.push(Level::Plain(image));
                continue;
            }
            let delta = Delta::load(image)?;
            require_fit(&delta, &above)?;
            above = *delta.geometry();
            lower.push(Level::Ploop(delta));
        }
        let lift = Lift::new(upper, lower, plain_size, self.is_base)?;
        Ok((lift, self.locks))
    }
}

fn require_fit(lower: &Delta<HostImage>, above: &Geometry) -> Result<()> {
    let why = if lower.geometry().cluster != above.cluster {
        "its cluster size is another than that of the image above it"
    } else if lower.geometry().disk_size > above.disk_size {
        "its disk is larger than that of the image above it"
    } else {
        return Ok(());
    };
    Err(ImageError::Misfit {
        path: lower.path().to_owned(),
        why,
    })
}

/// That the lowest image that is to go, `file`, hides nothing that is behind the end of a raw
/// image below it: how much of such an image is of the disk, only what lies on it says.
fn require_nothing_behind(bundle: &Bundle, below: Guid, file: &HostFile) -> Result<()> {
    let image = bundle.descriptor().image(below);
    let Some(image) = image.filter(|image| image.kind == ImageKind::Plain) else {
        return Ok(());
    };
    let end = read_header(&image_of(file)?)?.geometry().disk_size.bytes();
    let raw = image_of(&open_level(bundle, image, false)?)?;
    let data = raw.next_data(end).context(raw.path(), "look for data in")?;
    match data {
        None => Ok(()),
        Some(_) => Err(ImageError::Unsupported {
            path: raw.path().to_owned(),
            why: "holds data behind the end of its disk, which would show without the snapshot \
                  above it; 'ploop-img snapshot delete' deletes that when nobody uses the disk"
                .to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests;
