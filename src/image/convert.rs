//! Copying a disk into another format, holes left out on both sides.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::bundle::Location;
use super::create::{
    is_raw_name, new_header, publish_disk, publish_file, refuse_existing, refuse_foreign_name,
    write_empty,
};
use super::error::{ImageError, IoContext, Result};
use super::file::{HostImage, ImageFile};
use super::folder::{Folder, open_regular};
use super::open::{OpenImage, OpenMode, lock_file, open};
use super::progress::{Progress, check_cancelled};
use super::reader::DiskReader;
use crate::format::{ClusterSize, Header, HostCluster, Sector};
use crate::storage::HostFile;
use crate::storage::lock::LockMode;

/// What is read and written at once, unless the cluster is larger.
const CHUNK: u64 = 4 << 20;
/// What is left out if it is all zeros: the block size of most file systems.
const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// How a disk lies in its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// Byte for byte.
    Raw,
    /// A ploop image or bundle.
    Ploop,
}

/// What to convert to what.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// Path of the source.
    pub source: PathBuf,
    /// Of the source; `None`: look at it.
    pub source_format: Option<DiskFormat>,
    /// How to open a ploop source.
    pub mode: OpenMode,
    /// Path to make; nothing may be there.
    pub target: PathBuf,
    /// Of the target; `None`: by its name.
    pub target_format: Option<DiskFormat>,
    /// Of a ploop target; `None`: that of a ploop source, else the default.
    pub cluster: Option<ClusterSize>,
}

impl Conversion {
    /// Does it. The target has its name only when it is whole and stable; on an
    /// error nothing is left behind.
    ///
    /// # Errors
    /// Whatever keeps the source from being read or the target from being made; a
    /// target with the name of a format that is not made here, unless its format is
    /// given.
    pub fn run(&self, progress: &dyn Progress) -> Result<()> {
        let target_format = self.target_format()?;
        let (folder, name) = Folder::of(&self.target)?;
        refuse_existing(&folder, name)?;
        let source = Source::open(self)?;
        if source.disk.disk_size() == Sector(0) {
            return Err(unsupported(
                &self.source,
                "is empty: there is no disk in it",
            ));
        }
        progress.begin(source.disk.disk_size().bytes());
        match target_format {
            DiskFormat::Raw => publish_file(&folder, name, |file| {
                let output = RawOutput::new(file, source.disk.disk_size())?;
                self.copy(&source.disk, output, progress)
            }),
            DiskFormat::Ploop => {
                let cluster = self.cluster.unwrap_or(source.disk.cluster());
                let header = new_header(&self.target, source.disk.disk_size(), cluster)?;
                publish_disk(&self.target, &header, |file| {
                    let output = PloopOutput::new(file, header.clone())?;
                    self.copy(&source.disk, output, progress)
                })
            }
        }
    }

    /// By the name, unless said: `.raw` and `.img` are raw, all else is ploop that
    /// has not the name of a third format.
    fn target_format(&self) -> Result<DiskFormat> {
        if let Some(format) = self.target_format {
            return Ok(format);
        }
        refuse_foreign_name(
            &self.target,
            "say -O raw or -O ploop if it shall have that name, or choose another",
        )?;
        Ok(match is_raw_name(&self.target) {
            true => DiskFormat::Raw,
            false => DiskFormat::Ploop,
        })
    }

    fn copy(
        &self,
        source: &DiskReader<HostImage>,
        mut output: impl Output,
        progress: &dyn Progress,
    ) -> Result<()> {
        let unit = output.unit().max(CHUNK);
        let size = source.disk_size().bytes();
        let mut buffer = vec![0; unit.min(size.next_multiple_of(output.unit())) as usize];
        let mut done = 0;
        while let Some(data) = source.next_data(done, unit)? {
            check_cancelled(progress, &self.target, "nothing was left behind")?;
            let start = data.range.start / unit * unit;
            // What is before the data was found to be zeros, or is done.
            let bytes = &mut buffer[..];
            source.read(bytes, start)?;
            output.write(bytes, start)?;
            done = start + unit;
            progress.done(done.min(size));
        }
        output.finish()?;
        progress.done(size);
        Ok(())
    }
}

/// An open source; the locks last as long as it does.
struct Source {
    disk: DiskReader<HostImage>,
    _image: Option<OpenImage>,
    _lock: Option<crate::storage::lock::ImageLock>,
}

impl Source {
    fn open(conversion: &Conversion) -> Result<Self> {
        let path = &conversion.source;
        let format = match conversion.source_format {
            Some(format) => format,
            None => probe(path)?,
        };
        if format == DiskFormat::Ploop {
            let image = open(path, conversion.mode)?;
            return Ok(Self {
                disk: DiskReader::load(&image)?,
                _image: Some(image),
                _lock: None,
            });
        }
        let file = HostFile {
            file: open_source(path)?,
            path: path.clone(),
            writable: false,
        };
        let lock = match conversion.mode.is_force_share() {
            true => None,
            false => Some(lock_file(&file, LockMode::ReadOnly, true)?),
        };
        Ok(Self {
            disk: DiskReader::of_raw(HostImage::new(file.file, file.path))?,
            _image: None,
            _lock: lock,
        })
    }
}

fn open_source(path: &Path) -> Result<File> {
    open_regular(rustix::fs::CWD, path, OFlags::empty(), false, path)
}

/// The format of a source that was not named. Where that would be a guess which a
/// guest could have brought about, by writing what looks like a header to its raw
/// disk, it is refused.
fn probe(path: &Path) -> Result<DiskFormat> {
    if matches!(Location::of(path)?, Location::Bundle(_)) {
        return Ok(DiskFormat::Ploop);
    }
    let mut start = Vec::new();
    open_source(path)?
        .take(Header::LEN as u64)
        .read_to_end(&mut start)
        .context(path, "read")?;
    let other = FOREIGN.iter().find(|(magic, _)| start.starts_with(magic));
    if let Some((_, name)) = other {
        return Err(unsupported(
            path,
            &format!(
                "looks like a {name} image; make a raw one of it with qemu-img first, or say -f raw if it is one"
            ),
        ));
    }
    match Header::has_signature(&start) {
        true if super::is_bare_name(path) => Ok(DiskFormat::Ploop),
        true => Err(unsupported(
            path,
            "has a ploop header but no name that ends in .hds, so a guest may have written that \
             header to a raw disk; say -f ploop or -f raw",
        )),
        false => Ok(DiskFormat::Raw),
    }
}

/// First bytes of formats that one may take for raw by mistake.
const FOREIGN: [(&[u8], &str); 6] = [
    (b"QFI\xfb", "qcow2"),
    (b"QED\0", "QED"),
    (b"KDMV", "VMDK"),
    (b"conectix", "VHD"),
    (b"vhdxfile", "VHDX"),
    (b"<<< ", "VDI"),
];

fn unsupported(path: &Path, why: &str) -> ImageError {
    ImageError::Unsupported {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}

/// Takes a disk piece by piece, in ascending order.
trait Output {
    /// Pieces start at multiples of it and are multiples of it long, in bytes.
    fn unit(&self) -> u64;

    /// What is not written, or written as zeros, shall read as zeros; the last
    /// piece may go beyond the end of the disk, with zeros.
    fn write(&mut self, bytes: &[u8], start: u64) -> Result<()>;

    fn finish(self) -> Result<()>;
}

struct RawOutput<'a> {
    file: &'a HostImage,
}

impl<'a> RawOutput<'a> {
    fn new(file: &'a HostImage, size: Sector) -> Result<Self> {
        let set = file.set_len(size.bytes());
        set.context(file.path(), "set the length")?;
        Ok(Self { file })
    }
}

impl Output for RawOutput<'_> {
    fn unit(&self) -> u64 {
        BLOCK as u64
    }

    fn write(&mut self, bytes: &[u8], start: u64) -> Result<()> {
        let len = self.file.file_len().context(self.file.path(), "look at")?;
        let inside = len.saturating_sub(start).min(bytes.len() as u64);
        write_data(self.file, &bytes[..inside as usize], start)
    }

    fn finish(self) -> Result<()> {
        Ok(())
    }
}

/// Clusters are allocated one after the other, as data comes.
struct PloopOutput<'a> {
    file: &'a HostImage,
    header: Header,
    bat: Vec<u32>,
    next: HostCluster,
}

impl<'a> PloopOutput<'a> {
    fn new(file: &'a HostImage, header: Header) -> Result<Self> {
        write_empty(file, &header)?;
        Ok(Self {
            file,
            bat: vec![0; header.geometry().entries as usize],
            next: header.geometry().first_host_cluster(),
            header,
        })
    }

    /// Writes clusters that follow each other on the disk and in the file.
    fn write_run(&self, bytes: &[u8], clusters: Range<usize>, host: HostCluster) -> Result<()> {
        let cluster = self.unit() as usize;
        let bytes = &bytes[clusters.start * cluster..clusters.end * cluster];
        let offset = self.header.geometry().host_offset(host);
        write_data(self.file, bytes, offset)
    }
}

impl Output for PloopOutput<'_> {
    fn unit(&self) -> u64 {
        self.header.geometry().cluster.bytes()
    }

    fn write(&mut self, bytes: &[u8], start: u64) -> Result<()> {
        let first_guest = (start / self.unit()) as usize;
        let mut run = 0..0;
        let mut run_host = self.next;
        for (index, cluster) in bytes.chunks_exact(self.unit() as usize).enumerate() {
            // The last piece may have clusters that the disk does not.
            let entry = self.bat.get_mut(first_guest + index);
            let Some(entry) = entry.filter(|_| !is_zero(cluster)) else {
                continue;
            };
            *entry = self.header.geometry().bat_value(self.next);
            if run.end != index {
                self.write_run(bytes, run, run_host)?;
                (run, run_host) = (index..index, self.next);
            }
            run.end = index + 1;
            self.next.0 += 1;
        }
        self.write_run(bytes, run, run_host)
    }

    fn finish(mut self) -> Result<()> {
        let geometry = *self.header.geometry();
        if self.next > geometry.first_host_cluster() {
            self.header.clear_empty();
        }
        let path = self.file.path();
        let end = geometry.host_offset(self.next);
        self.file.set_len(end).context(path, "set the length")?;
        let mut bytes = self.header.to_bytes().to_vec();
        bytes.extend(self.bat.iter().flat_map(|entry| entry.to_le_bytes()));
        write_data(self.file, &bytes, 0)
    }
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(BLOCK)
        .all(|block| block == &ZEROS[..block.len()])
}

/// Writes all blocks that are not zeros, those that follow each other at once.
pub(super) fn write_data(file: &impl ImageFile, bytes: &[u8], offset: u64) -> Result<()> {
    let mut run = 0..0;
    let write = |run: Range<usize>| {
        if run.is_empty() {
            return Ok(());
        }
        let written = file.write_all_at(&bytes[run.clone()], offset + run.start as u64);
        written.context(file.path(), "write")
    };
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        if is_zero(block) {
            continue;
        }
        let start = index * BLOCK;
        if run.end != start {
            write(std::mem::replace(&mut run, start..start))?;
        }
        run.end = start + block.len();
    }
    write(run)
}
