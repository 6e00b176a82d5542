//! What is read as a whole disk: any ploop disk, or a raw one, which may be a block
//! device.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::bundle::Location;
use super::create::is_bare_name;
use super::error::{ImageError, IoContext, Result};
use super::file::HostImage;
use super::folder::open_regular;
use super::open::{OpenImage, OpenMode, lock_file};
use super::ownership::Ownership;
use super::reader::DiskReader;
use crate::format::{ForeignFormat, Header};
use crate::storage::HostFile;
use crate::storage::lock::{ImageLock, LockMode};

/// How a disk lies in its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// Byte for byte.
    Raw,
    /// A ploop image or bundle.
    Ploop,
}

/// An open disk; the locks last as long as it does.
pub(super) struct Source {
    pub disk: DiskReader<HostImage>,
    /// Of its image, the top if there are several; `None` of a device.
    pub ownership: Option<Ownership>,
    _image: Option<OpenImage>,
    _lock: Option<ImageLock>,
}

impl Source {
    /// Opens the disk at `path`, which is looked at where no format is given.
    pub fn open(path: &Path, format: Option<DiskFormat>, mode: OpenMode) -> Result<Self> {
        let format = match format {
            Some(format) => format,
            None => probe(path)?,
        };
        if format == DiskFormat::Ploop {
            let (image, disk) = DiskReader::open(path, mode)?;
            let top = &image.files[image.files.len() - 1];
            return Ok(Self {
                ownership: Ownership::of_image(&top.file, &top.path)?,
                disk,
                _image: Some(image),
                _lock: None,
            });
        }
        if mode.wants_snapshot() {
            return Err(unsupported(path, "is raw, so it has no snapshots"));
        }
        let file = HostFile {
            file: open_raw(path, false)?,
            path: path.to_owned(),
            writable: false,
        };
        let lock = match mode.is_force_share() {
            true => None,
            false => Some(lock_file(&file, LockMode::ReadOnly, true)?),
        };
        Ok(Self {
            ownership: Ownership::of_image(&file.file, &file.path)?,
            disk: DiskReader::of_raw(HostImage::new(file.file, file.path))?,
            _image: None,
            _lock: lock,
        })
    }
}

/// Opens a file or a block device that is there. A device is opened for writing only
/// if nothing on this host has it mounted or otherwise for itself.
pub(super) fn open_raw(path: &Path, writable: bool) -> Result<File> {
    let look = OFlags::PATH | OFlags::CLOEXEC;
    let there = rustix::fs::open(path, look, Mode::empty()).context(path, "open")?;
    let stat = rustix::fs::fstat(&there).context(path, "look at")?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return open_regular(rustix::fs::CWD, path, OFlags::empty(), writable, path);
    }
    let access = match writable {
        true => OFlags::RDWR | OFlags::EXCL,
        false => OFlags::RDONLY,
    };
    let same = format!("/proc/self/fd/{}", there.as_raw_fd());
    match rustix::fs::open(same, access | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::BUSY) => Err(unsupported(
            path,
            "is in use on this host: it is mounted, or part of another device",
        )),
        opened => Ok(File::from(opened.context(path, "open")?)),
    }
}

/// The format of a source that was not named. Where that would be a guess which a
/// guest could have brought about, by writing what looks like a header to its raw
/// disk, it is refused.
fn probe(path: &Path) -> Result<DiskFormat> {
    if matches!(Location::of(path)?, Location::Bundle(_)) {
        return Ok(DiskFormat::Ploop);
    }
    let mut start = Vec::new();
    open_raw(path, false)?
        .take(Header::LEN as u64)
        .read_to_end(&mut start)
        .context(path, "read")?;
    let path = path.to_owned();
    if let Some(format) = ForeignFormat::of(&start) {
        return Err(ImageError::ForeignSource { path, format });
    }
    match Header::has_signature(&start) {
        true if is_bare_name(&path) => Ok(DiskFormat::Ploop),
        true => Err(unsupported(
            &path,
            "has a ploop header but no name that ends in .hds, so a guest may have written that \
             header to a raw disk; say -f ploop or -f raw",
        )),
        false => Ok(DiskFormat::Raw),
    }
}

/// The format of what is there and is to be overwritten, if it was not named. What
/// looks like an image of ours is not taken for raw without a word.
pub(super) fn format_of_existing(path: &Path) -> Result<DiskFormat> {
    if matches!(Location::of(path)?, Location::Bundle(_)) {
        return Ok(DiskFormat::Ploop);
    }
    let mut start = Vec::new();
    open_raw(path, false)?
        .take(Header::LEN as u64)
        .read_to_end(&mut start)
        .context(path, "read")?;
    match (Header::has_signature(&start), is_bare_name(path)) {
        (true, true) => Ok(DiskFormat::Ploop),
        (false, false) => Ok(DiskFormat::Raw),
        _ => Err(unsupported(
            path,
            "may be a ploop image or a raw one, by its name and its first bytes; say -O ploop or \
             -O raw",
        )),
    }
}

pub(super) fn unsupported(path: &Path, why: &str) -> ImageError {
    ImageError::Unsupported {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}
