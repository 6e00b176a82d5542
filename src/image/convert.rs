//! Copying a disk into another format, holes left out on both sides.

mod existing;
mod existing_ploop;
mod input;
mod output;

use std::io::IsTerminal;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::create::{
    is_raw_name, publish_disk, publish_file, refuse_existing, refuse_foreign_name,
};
use super::error::{ImageError, IoContext, Result};
use super::file::{HostImage, ImageFile};
use super::folder::Folder;
use super::open::OpenMode;
use super::ownership::Ownership;
use super::progress::{Progress, check_cancelled};
use super::source::{DiskFormat, Source, format_of_existing, unsupported};
use crate::format::{ClusterSize, Geometry, Sector, is_zero};
use existing::ExistingOutput;
use existing_ploop::ExistingPloopOutput;
use input::{DiskInput, Input, StreamInput};
use output::{Output, Piece, PloopOutput, RawOutput, StreamOutput};

/// What is read and written at once, unless the cluster is larger.
const CHUNK: u64 = 4 << 20;
/// What is left out if it is all zeros: the block size of most file systems.
const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Where a disk is copied from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// An image, a bundle or a block device.
    Path(PathBuf),
    /// A raw disk from standard input, up to its end.
    StandardInput,
}

/// Where a disk is copied to.
#[derive(Clone, Debug)]
pub enum Destination {
    /// An image or a bundle that is made; nothing may be there.
    New(PathBuf),
    /// A raw file, a block device or a ploop disk without snapshots that is there, and
    /// at least as large; what lies behind the end of the disk stays.
    Existing(PathBuf),
    /// A raw disk, from its first byte to its last.
    StandardOutput,
}

/// What to convert to what.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// The source.
    pub source: Origin,
    /// Of the source; `None`: look at it.
    pub source_format: Option<DiskFormat>,
    /// How to open a ploop source.
    pub mode: OpenMode,
    /// The target.
    pub target: Destination,
    /// Of the target; `None`: by its name, or raw where nothing else can be.
    pub target_format: Option<DiskFormat>,
    /// Of a ploop target; `None`: that of a ploop source, else the default.
    pub cluster: Option<ClusterSize>,
    /// Zeros take space in the target, as anything else does.
    pub keep_zeros: bool,
}

impl Conversion {
    /// Does it. A new target has its name only when it is whole and stable; on an
    /// error nothing is left behind. One that was there is of no use after an error.
    ///
    /// # Errors
    /// Whatever keeps the source from being read or the target from being made; a
    /// target with the name of a format that is not made here, unless its format is
    /// given; anything but raw where only that can be.
    pub fn run(&self, progress: &dyn Progress) -> Result<()> {
        // Before anything is read: what cannot be made is not worth the time.
        let target_format = self.target_format()?;
        if let Destination::New(path) = &self.target {
            let (folder, name) = Folder::of(path)?;
            match refuse_existing(&folder, name) {
                // The one kind of target for which there is another way.
                Err(ImageError::Exists(_)) if target_format == DiskFormat::Raw => {
                    return Err(unsupported(
                        path,
                        "already exists; remove it first, choose another name, or write into it \
                         with -n",
                    ));
                }
                refused => refused?,
            }
        }
        match &self.source {
            Origin::StandardInput => {
                if self.source_format == Some(DiskFormat::Ploop) {
                    return Err(unsupported(
                        Path::new(STANDARD_INPUT),
                        "can only give a raw disk",
                    ));
                }
                let stream = std::io::stdin().lock();
                let mut input = StreamInput::new(stream);
                self.write_target(target_format, &mut input, None, progress)
            }
            Origin::Path(path) => {
                let source = Source::open(path, self.source_format, self.mode)?;
                let disk = &source.disk;
                if disk.disk_size() == Sector(0) {
                    return Err(unsupported(path, EMPTY));
                }
                let keep_zeros = self.keep_zeros;
                let mut input = DiskInput { disk, keep_zeros };
                self.write_target(target_format, &mut input, source.ownership, progress)
            }
        }
    }

    /// By the name, unless said: `.raw` and `.img` are raw, all else is ploop that
    /// has not the name of a third format.
    fn target_format(&self) -> Result<DiskFormat> {
        let path = match &self.target {
            Destination::New(path) => path,
            Destination::Existing(path) => {
                return match self.target_format {
                    Some(format) => Ok(format),
                    None => format_of_existing(path),
                };
            }
            Destination::StandardOutput => {
                return match self.target_format {
                    Some(DiskFormat::Ploop) => Err(unsupported(
                        self.target_path(),
                        "can only be written as a raw disk; the BAT of a ploop image is known in \
                         the end and lies at its start",
                    )),
                    _ => Ok(DiskFormat::Raw),
                };
            }
        };
        if let Some(format) = self.target_format {
            return Ok(format);
        }
        refuse_foreign_name(
            path,
            "say -O raw or -O ploop if it shall have that name, or choose another",
        )?;
        Ok(match is_raw_name(path) {
            true => DiskFormat::Raw,
            false => DiskFormat::Ploop,
        })
    }

    /// For messages.
    fn target_path(&self) -> &Path {
        match &self.target {
            Destination::New(path) | Destination::Existing(path) => path,
            Destination::StandardOutput => Path::new("standard output"),
        }
    }

    fn write_target(
        &self,
        format: DiskFormat,
        input: &mut dyn Input,
        // Of the source: nobody gets to read a copy who could not read that.
        ownership: Option<Ownership>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let give_ownership = |file: &HostImage| match ownership {
            Some(ownership) => ownership.give(file.file(), file.path()),
            None => Ok(()),
        };
        match (&self.target, format) {
            (Destination::StandardOutput, _) => {
                if std::io::stdout().is_terminal() {
                    let why = "is a terminal; redirect it to a file or into another program";
                    return Err(unsupported(self.target_path(), why));
                }
                self.copy(input, &mut StreamOutput::standard()?, progress)
            }
            (Destination::Existing(path), DiskFormat::Ploop) => {
                if self.cluster.is_some() {
                    return Err(unsupported(path, "has its cluster size already"));
                }
                let mut output = ExistingPloopOutput::open(path, self.keep_zeros)?;
                if let Some(size) = input.size() {
                    output.require_room(size.bytes())?;
                }
                self.copy(input, &mut output, progress)
            }
            (Destination::Existing(path), DiskFormat::Raw) => {
                let mut output = ExistingOutput::open(path, self.keep_zeros)?;
                if let Some(size) = input.size() {
                    output.require_room(size.bytes())?;
                }
                output.begin()?;
                self.copy(input, &mut output, progress)
            }
            (Destination::New(path), DiskFormat::Raw) => {
                let (folder, name) = Folder::of(path)?;
                publish_file(&folder, name, |file| {
                    give_ownership(file)?;
                    let keep_zeros = self.keep_zeros;
                    self.copy(input, &mut RawOutput { file, keep_zeros }, progress)
                })
            }
            (Destination::New(path), DiskFormat::Ploop) => publish_disk(path, |file| {
                give_ownership(file)?;
                self.fill_ploop(file, path, input, progress)
            }),
        }
    }

    fn fill_ploop(
        &self,
        file: &HostImage,
        path: &Path,
        input: &mut dyn Input,
        progress: &dyn Progress,
    ) -> Result<Geometry> {
        let cluster = self.cluster.unwrap_or(input.cluster());
        let size = input.size();
        let mut output = PloopOutput::new(file, path, cluster, size, self.keep_zeros)?;
        self.copy(input, &mut output, progress)
    }

    /// Gives back what the output says of what it made.
    fn copy<O: Output>(
        &self,
        input: &mut dyn Input,
        output: &mut O,
        progress: &dyn Progress,
    ) -> Result<O::Made> {
        let unit = output.unit().max(CHUNK);
        let size = input.size().map(Sector::bytes);
        if let Some(size) = size {
            progress.begin(size);
        }
        let largest = size.map_or(unit, |size| size.next_multiple_of(output.unit()));
        let mut buffer = vec![0; unit.min(largest) as usize];
        let mut done = 0;
        while let Some((start, len)) = input.next(done, &mut buffer)? {
            check_cancelled(progress, self.target_path(), self.after_a_cut())?;
            let bytes = &buffer[..];
            output.write(Piece { start, bytes, len })?;
            done = start + buffer.len() as u64;
            progress.done(start + len as u64);
        }
        let size = input.size().unwrap_or_default();
        if size == Sector(0) {
            return Err(unsupported(Path::new(STANDARD_INPUT), EMPTY));
        }
        let made = output.finish(size)?;
        progress.done(size.bytes());
        Ok(made)
    }

    fn after_a_cut(&self) -> &'static str {
        match self.target {
            Destination::New(_) => "nothing was left behind",
            Destination::StandardOutput => "what was written so far is of no use",
            Destination::Existing(_) => "the target holds part of the source",
        }
    }
}

const STANDARD_INPUT: &str = "standard input";
const EMPTY: &str = "is empty: there is no disk in it";

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
