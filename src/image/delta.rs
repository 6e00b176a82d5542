//! One image file in the ploop format, off line: header and BAT in memory, and
//! the order in which a change of them reaches the disk.

use std::path::Path;

use zerocopy::FromZeros;

use super::error::{ImageError, IoContext, Result};
use super::file::{ImageFile, rename_opening};
use crate::format::{
    BatScan, Extension, ExtensionError, Geometry, GuestCluster, Header, HeaderError, HostCluster,
    InUse, SECTOR_SIZE, scan_bat,
};

/// Bytes of BAT that are read at once.
const READ_AT_ONCE: usize = 1 << 20;

/// An image file whose header was checked and whose BAT was read. The entries
/// may still say anything: [`Self::require_sound`] or `check` judge them.
#[derive(Debug)]
pub struct Delta<F> {
    file: F,
    header: Header,
    bat: Vec<u32>,
    /// A valid format extension was there when the change began.
    had_extension: bool,
    /// The mark that is there is from here: see [`Self::begin`].
    is_begun: bool,
}

impl<F: ImageFile> Delta<F> {
    /// Reads header and BAT.
    ///
    /// # Errors
    /// No ploop image, one with a wrong header, one that ends inside its BAT, or
    /// an I/O error.
    pub fn load(file: F) -> Result<Self> {
        let header = read_header(&file)?;
        let needed = header.geometry().metadata_len();
        let len = file.file_len().context(file.path(), "get the length")?;
        if len < needed {
            return Err(ImageError::CutOff {
                path: file.path().to_owned(),
                len,
                needed,
            });
        }
        let bat = read_bat(&file, header.geometry().entries)?;
        Ok(Self {
            file,
            header,
            bat,
            had_extension: false,
            is_begun: false,
        })
    }

    /// As [`Self::load`], but a first block offset that cannot be is computed anew; a
    /// repair writes it.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_for_repair(file: F) -> Result<Self> {
        let mut header = read_header_for_repair(&file)?;
        let needed = header.geometry().metadata_len();
        let len = file.file_len().context(file.path(), "get the length")?;
        if len < needed {
            return Err(ImageError::CutOff {
                path: file.path().to_owned(),
                len,
                needed,
            });
        }
        let bat = read_bat(&file, header.geometry().entries)?;
        header.repair_first_block(len, &bat);
        Ok(Self {
            file,
            header,
            bat,
            had_extension: false,
            is_begun: false,
        })
    }

    /// The file.
    pub fn file(&self) -> &F {
        &self.file
    }

    /// The file, without what was read of it.
    pub fn into_file(self) -> F {
        self.file
    }

    /// For messages.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The header as it is in memory.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where everything is.
    pub fn geometry(&self) -> &Geometry {
        self.header.geometry()
    }

    /// The entries as they are in memory.
    pub fn bat(&self) -> &[u32] {
        &self.bat
    }

    /// Length of the file in bytes.
    ///
    /// # Errors
    /// Any of `fstat(2)`.
    pub fn file_len(&self) -> Result<u64> {
        self.file.file_len().context(self.path(), "get the length")
    }

    /// Looks at every entry.
    ///
    /// # Errors
    /// The length of the file cannot be had.
    pub fn scan(&self) -> Result<BatScan> {
        let entries = self.bat.iter().copied();
        Ok(scan_bat(self.geometry(), self.file_len()?, entries))
    }

    /// Where a guest cluster lies, in bytes of the file. `None` if it has no
    /// cluster here, be it beyond the BAT or behind an entry that cannot be right.
    pub fn lookup(&self, guest: GuestCluster) -> Option<u64> {
        let host = self.host_cluster(guest)?;
        Some(self.geometry().host_offset(host))
    }

    /// As [`Self::lookup`], the cluster.
    pub fn host_cluster(&self, guest: GuestCluster) -> Option<HostCluster> {
        match *self.bat.get(guest.0 as usize)? {
            0 => None,
            value => self.geometry().host_cluster(value),
        }
    }

    /// That the image was closed cleanly and no entry is wrong: what every change
    /// but a repair asks for.
    ///
    /// # Errors
    /// What is wrong, with the command that helps.
    pub fn require_sound(&self) -> Result<BatScan> {
        if matches!(self.header.in_use, InUse::Open | InUse::OpenByOthers) {
            return Err(ImageError::InUse(self.path().to_owned()));
        }
        self.require_readable()
    }

    /// That no entry is wrong. The image may be in use, or left so by a crash:
    /// what is stable in it is consistent at any time.
    ///
    /// # Errors
    /// What is wrong, with the command that helps.
    pub fn require_readable(&self) -> Result<BatScan> {
        let path = || self.path().to_owned();
        if self.header.is_converting() {
            return Err(ImageError::Converting(path()));
        }
        let scan = self.scan()?;
        if let Some(first) = scan.problems.first() {
            return Err(ImageError::Corrupt {
                path: path(),
                count: scan.problem_count,
                first: first.to_string(),
            });
        }
        Ok(scan)
    }

    /// See [`rename_opening`].
    ///
    /// # Errors
    /// As that.
    pub(super) fn rename_opening(&self) -> Result<()> {
        rename_opening(&self.file)
    }

    /// The first step of every change: the in-use mark, made stable.
    ///
    /// Whoever left the image marked may have done so after a failed sync. What that covered, the
    /// kernel takes for written, and no later sync writes it: it can be read, and a cut takes it
    /// away, entries among it that the caller relies on. So all are written once more.
    ///
    /// # Errors
    /// Any of `fsetxattr(2)`, `lseek(2)`, `pwrite(2)` and `fdatasync(2)`.
    pub fn begin(&mut self) -> Result<()> {
        self.rename_opening()?;
        self.had_extension =
            self.header.in_use == InUse::ClosedWithExtension && self.header.extension.0 != 0;
        let before = self.header.in_use;
        self.require_understood()?;
        self.write_again_if_left()?;
        if before != InUse::Open {
            self.header.in_use = InUse::Open;
            if let Err(error) = self.write_header() {
                // Whoever tries again marks it.
                self.header.in_use = before;
                return Err(error);
            }
        }
        self.is_begun = false;
        self.sync()?;
        self.is_begun = true;
        Ok(())
    }

    /// That the image has no feature which must be understood to change it, and is not: a change
    /// drops the format extension.
    fn require_understood(&self) -> Result<()> {
        let offset = self.header.extension.0.saturating_mul(SECTOR_SIZE);
        if !self.had_extension || offset >= self.file_len()? {
            return Ok(());
        }
        let mut cluster = vec![0; self.geometry().cluster.bytes() as usize];
        self.read(&mut cluster, offset)?;
        match Extension::parse(&cluster) {
            Err(error @ ExtensionError::Necessary(_)) => Err(ImageError::Unsupported {
                path: self.path().to_owned(),
                why: format!("cannot be changed: {error}"),
            }),
            _ => Ok(()),
        }
    }

    /// What [`Self::begin`] does first.
    ///
    /// # Errors
    /// Any of `lseek(2)` and `pwrite(2)`: it can be tried again.
    pub(super) fn write_again_if_left(&mut self) -> Result<()> {
        if !self.is_begun && matches!(self.header.in_use, InUse::Open | InUse::OpenByOthers) {
            self.write_again()?;
            self.is_begun = true;
        }
        Ok(())
    }

    /// Header and BAT as they were read, but for holes.
    fn write_again(&self) -> Result<()> {
        const PIECE: u64 = 1 << 20;
        self.write_header()?;
        let end = Header::LEN as u64 + 4 * self.bat.len() as u64;
        let entry_at = |offset: u64| (offset - Header::LEN as u64) as usize / 4;
        let mut at = SECTOR_SIZE;
        while at < end {
            let data = self.file.next_data(at);
            let data = data.context(self.path(), "look for data in")?;
            let Some(data) = data.filter(|data| data.start < end) else {
                break;
            };
            let start = data.start.max(at) / SECTOR_SIZE * SECTOR_SIZE;
            let stop = data.end.min(start + PIECE).next_multiple_of(SECTOR_SIZE);
            let stop = stop.min(end);
            let entries = &self.bat[entry_at(start)..entry_at(stop)];
            let bytes: Vec<u8> = entries.iter().flat_map(|it| it.to_le_bytes()).collect();
            self.write(&bytes, start, "write the BAT")?;
            at = stop;
        }
        Ok(())
    }

    /// The last step of every change that went well: everything stable, then
    /// `mark`, then that stable too.
    ///
    /// # Errors
    /// Any of `pwrite(2)` and `fdatasync(2)`; and when a server has taken the lock away.
    pub fn finish(&mut self, mark: InUse) -> Result<()> {
        self.is_begun = false;
        self.sync()?;
        let locked = self.file.require_lock();
        locked.context(self.file.path(), "say that the image is closed")?;
        if mark == InUse::Closed {
            // The mark says that it is not valid; nothing may find it later.
            self.header.extension.0 = 0;
            if self.had_extension {
                log::info!(
                    "{}: its dirty bitmaps were dropped, as they do not cover this change: the \
                     next backup has to be a full one",
                    self.path().display()
                );
            }
        }
        self.had_extension = false;
        self.header.in_use = mark;
        self.write_header()?;
        self.sync()?;
        self.is_begun = mark == InUse::Open;
        Ok(())
    }

    /// Puts another header in place of the present one, in memory.
    pub fn set_header(&mut self, header: Header) {
        self.bat.resize(header.geometry().entries as usize, 0);
        self.header = header;
    }

    /// Says, in memory, that the disk may hold data.
    pub(super) fn clear_empty(&mut self) {
        self.header.clear_empty();
    }

    /// What was computed anew goes to the file with the header.
    pub(super) fn accept_first_block(&mut self) {
        self.header.accept_first_block();
    }

    /// Changes the in-use mark in memory.
    pub(super) fn set_mark(&mut self, mark: InUse) {
        self.header.in_use = mark;
    }

    /// Writes the sector that holds the header, entries included, in one piece.
    ///
    /// # Errors
    /// Any of `pwrite(2)`.
    pub fn write_header(&self) -> Result<()> {
        let mut sector = self.header.to_bytes().to_vec();
        let room = (SECTOR_SIZE as usize - Header::LEN) / 4;
        for entry in self.bat.iter().take(room) {
            sector.extend(entry.to_le_bytes());
        }
        self.write(&sector, 0, "write the header")
    }

    /// Puts other entries in place of the present ones, in memory, as they are.
    pub(super) fn set_bat(&mut self, entries: Vec<u32>) {
        self.bat = entries;
        self.bat.resize(self.geometry().entries as usize, 0);
    }

    /// Changes an entry in memory; [`Self::write_entries`] takes it to the file.
    pub fn set_entry(&mut self, guest: GuestCluster, to: Option<HostCluster>) {
        let value = to.map_or(0, |host| self.geometry().bat_value(host));
        if let Some(entry) = self.bat.get_mut(guest.0 as usize) {
            *entry = value;
        }
    }

    /// Writes the entries of `guests`, which is in ascending order, sector by
    /// sector; each sector holds whole entries, so none is ever torn.
    ///
    /// # Errors
    /// Any of `pwrite(2)`.
    pub fn write_entries(&self, guests: impl IntoIterator<Item = GuestCluster>) -> Result<()> {
        let mut written = None;
        for guest in guests {
            let offset = Header::LEN as u64 + 4 * u64::from(guest.0);
            let sector = offset / SECTOR_SIZE;
            if written == Some(sector) {
                continue;
            }
            written = Some(sector);
            if sector == 0 {
                self.write_header()?;
                continue;
            }
            let first = (sector * SECTOR_SIZE - Header::LEN as u64) as usize / 4;
            let end = (first + SECTOR_SIZE as usize / 4).min(self.bat.len());
            let bytes: Vec<u8> = self.bat[first..end]
                .iter()
                .flat_map(|entry| entry.to_le_bytes())
                .collect();
            self.write(&bytes, sector * SECTOR_SIZE, "write the BAT")?;
        }
        Ok(())
    }

    /// Fills `bytes` from `offset` of the file; beyond its end there are zeros.
    ///
    /// # Errors
    /// Any of `pread(2)`.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        read_or_zeros(&self.file, bytes, offset).context(self.path(), "read")
    }

    /// Writes data.
    ///
    /// # Errors
    /// Any of `pwrite(2)`.
    pub fn write(&self, bytes: &[u8], offset: u64, action: &'static str) -> Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        written.context(self.path(), action)
    }

    /// Cuts or extends the file.
    ///
    /// # Errors
    /// Any of `ftruncate(2)`.
    pub fn set_len(&self, len: u64) -> Result<()> {
        let set = self.file.set_len(len);
        set.context(self.path(), "set the length")
    }

    /// Gives the space of a range back.
    ///
    /// # Errors
    /// Any of `fallocate(2)`.
    pub fn punch(&self, range: std::ops::Range<u64>) -> Result<()> {
        let punched = self.file.punch(range);
        punched.context(self.path(), "punch a hole")
    }

    /// Makes all changes stable.
    ///
    /// # Errors
    /// Any of `fdatasync(2)`.
    pub fn sync(&self) -> Result<()> {
        self.file.sync().context(self.path(), "sync")
    }

    /// Copies `len` bytes, a cluster at most, inside the file.
    ///
    /// # Errors
    /// Any of `pread(2)` and `pwrite(2)`.
    pub fn copy(&self, from: u64, to: u64, len: u64) -> Result<()> {
        let mut bytes = vec![0; len as usize];
        self.read(&mut bytes, from)?;
        self.write(&bytes, to, "write a cluster")
    }
}

/// Reads and checks the header alone.
///
/// # Errors
/// No ploop image, one with a wrong header, or an I/O error.
pub fn read_header(file: &impl ImageFile) -> Result<Header> {
    let (bytes, len) = read_header_bytes(file)?;
    let header = Header::parse(&bytes);
    let header = header.and_then(|header| header.check_file_len(len).map(|()| header));
    header.map_err(|source| header_error(file, source))
}

/// As [`read_header`], but the first block offset may be wrong.
pub(super) fn read_header_for_repair(file: &impl ImageFile) -> Result<Header> {
    let (bytes, _) = read_header_bytes(file)?;
    Header::parse_for_repair(&bytes).map_err(|source| header_error(file, source))
}

/// The bytes of the header, and the length of the file.
fn read_header_bytes(file: &impl ImageFile) -> Result<([u8; Header::LEN], u64)> {
    let path = file.path();
    let mut bytes = [0; Header::LEN];
    let len = file.file_len().context(path, "get the length")?;
    if len < Header::LEN as u64 {
        return Err(ImageError::CutOff {
            path: path.to_owned(),
            len,
            needed: Header::LEN as u64,
        });
    }
    file.read_exact_at(&mut bytes, 0)
        .context(path, "read the header")?;
    Ok((bytes, len))
}

fn header_error(file: &impl ImageFile, source: HeaderError) -> ImageError {
    let path = file.path().to_owned();
    match source {
        HeaderError::FirstBlock { .. } => ImageError::FirstBlock { path, source },
        source => ImageError::Header { path, source },
    }
}

/// Reads all entries. The system provides memory only for those that are not zero:
/// a BAT that claims to be huge costs what it holds.
fn read_bat(file: &impl ImageFile, entries: u32) -> Result<Vec<u32>> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let no_memory = |_| std::io::Error::from(std::io::ErrorKind::OutOfMemory);
    let mut bat = <[u32]>::new_box_zeroed_with_elems(entries as usize)
        .map_err(no_memory)
        .context(file.path(), "hold the BAT")?;
    let mut bytes = vec![0; READ_AT_ONCE.min(4 * entries as usize)];
    let mut offset = Header::LEN as u64;
    for part in bat.chunks_mut(READ_AT_ONCE / 4) {
        let bytes = &mut bytes[..4 * part.len()];
        file.read_exact_at(bytes, offset)
            .context(file.path(), "read the BAT")?;
        offset += bytes.len() as u64;
        let pieces = bytes
            .chunks(ZEROS.len())
            .zip(part.chunks_mut(ZEROS.len() / 4));
        for (bytes, part) in pieces.filter(|(bytes, _)| **bytes != ZEROS[..bytes.len()]) {
            for (entry, word) in part.iter_mut().zip(bytes.chunks_exact(4)) {
                *entry = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            }
        }
    }
    Ok(bat.into_vec())
}

/// Fills `bytes` from `offset`; beyond the end of the file there are zeros.
pub(super) fn read_or_zeros(
    file: &impl ImageFile,
    bytes: &mut [u8],
    offset: u64,
) -> std::io::Result<()> {
    let there = file.file_len()?.saturating_sub(offset);
    let len = (bytes.len() as u64).min(there) as usize;
    bytes[len..].fill(0);
    if len == 0 {
        return Ok(());
    }
    file.read_exact_at(&mut bytes[..len], offset)
}
