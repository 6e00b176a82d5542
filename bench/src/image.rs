//! Makes the images that are served.
//!
//! Knows formats and files. Must not know servers: what writes an image full is
//! in [`crate::station`].

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::FallocateFlags;
use tempfile::TempDir;

use crate::bed::{Bed, Directories};
use crate::contestant::{Contestant, Format, Programs};

/// An image in a directory of its own, removed when dropped.
pub struct Image {
    /// The file, or the folder of a bundle.
    pub path: PathBuf,
    /// The qcow2 images below, if it is an overlay: the next one first.
    pub backing: Vec<PathBuf>,
    /// Holds the image, and whatever else belongs to serving it.
    pub dir: TempDir,
    format: Format,
}

/// What an image shall be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cluster in bytes, or `None` for the format's default.
    pub cluster_bytes: Option<u32>,
}

/// The default of ploop and parallels, in bytes.
const PLOOP_CLUSTER: u32 = 1 << 20;

/// Files up to this size in bytes are copied when a bundle is cloned, larger ones
/// linked: an empty delta is small, a written base large.
const COPY_LIMIT: u64 = 8 << 20;

impl Image {
    /// A new image without data. ploop images are made by qemu-img for all: the
    /// servers get the same bytes. A plain file has its space allocated.
    ///
    /// # Errors
    /// qemu-img's, or no space.
    pub fn empty(
        directories: &Directories,
        bed: Bed,
        contestant: Contestant,
        geometry: Geometry,
    ) -> Result<Self> {
        let dir = directories.make(bed)?;
        let format = contestant.format();
        let path = file_in(&dir, format);
        match contestant {
            Contestant::PlainFile => allocate(&path, geometry.disk_bytes)?,
            _ => create(&path, format, geometry, None)?,
        }
        Ok(Self {
            path,
            backing: Vec::new(),
            dir,
            format,
        })
    }

    /// A new bundle without data, to become the base of an overlay.
    ///
    /// # Errors
    /// ploop-img's.
    pub fn empty_bundle(
        programs: &Programs,
        directories: &Directories,
        bed: Bed,
        geometry: Geometry,
    ) -> Result<Self> {
        let dir = directories.make(bed)?;
        let path = dir.path().join("bundle");
        let mut command = Command::new(&programs.img);
        command
            .arg("create")
            .arg(&path)
            .arg(geometry.disk_bytes.to_string());
        if let Some(bytes) = geometry.cluster_bytes {
            command.arg("--cluster-size").arg(bytes.to_string());
        }
        run(&mut command)?;
        Ok(Self {
            path,
            backing: Vec::new(),
            dir,
            format: Format::Ploop,
        })
    }

    /// Puts an empty delta on top of a bundle.
    ///
    /// # Errors
    /// ploop-img's.
    pub fn snapshot(&self, programs: &Programs) -> Result<()> {
        run(Command::new(&programs.img)
            .args(["snapshot", "create"])
            .arg(&self.path))
    }

    /// A bundle with the same lower deltas (not copied: they are only read) and a
    /// copy of the empty top.
    ///
    /// # Errors
    /// Any of the file operations.
    pub fn clone_bundle(&self, directories: &Directories, bed: Bed) -> Result<Self> {
        let dir = directories.make(bed)?;
        let path = dir.path().join("bundle");
        fs::create_dir(&path)?;
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let to = path.join(entry.file_name());
            if entry.metadata()?.len() > COPY_LIMIT {
                fs::hard_link(entry.path(), to).context("linking a delta")?;
            } else {
                fs::copy(entry.path(), to).context("copying a delta")?;
            }
        }
        Ok(Self {
            path,
            backing: Vec::new(),
            dir,
            format: Format::Ploop,
        })
    }

    /// An empty qcow2 image above this one.
    ///
    /// # Errors
    /// qemu-img's.
    pub fn qcow2_overlay(
        &self,
        directories: &Directories,
        bed: Bed,
        geometry: Geometry,
    ) -> Result<Self> {
        let dir = directories.make(bed)?;
        let path = file_in(&dir, Format::Qcow2);
        create(&path, Format::Qcow2, geometry, Some(&self.path))?;
        Ok(Self {
            path,
            backing: [&self.path]
                .into_iter()
                .chain(&self.backing)
                .cloned()
                .collect(),
            dir,
            format: Format::Qcow2,
        })
    }

    /// Looks for damage, where the format can have any: by qemu-img, or by our own
    /// tool in a bundle, which qemu-img does not know. Space that was not given
    /// back is no damage. Nobody may serve the image meanwhile.
    ///
    /// # Errors
    /// It is damaged.
    pub fn check(&self, programs: &Programs) -> Result<()> {
        /// What both tools say of an image that has leaks and nothing worse.
        const LEAKS: i32 = 3;
        let mut command = if self.path.is_dir() {
            Command::new(&programs.img)
        } else {
            Command::new("qemu-img")
        };
        command.arg("check");
        match self.format {
            Format::Raw => return Ok(()),
            Format::Ploop if self.path.is_dir() => {}
            format => {
                command.args(["-f", format.qemu_name()]);
            }
        }
        let output = command
            .arg(&self.path)
            .output()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        if !output.status.success() && output.status.code() != Some(LEAKS) {
            bail!("the image is damaged: {}", complaint(&command, &output));
        }
        Ok(())
    }

    /// Waits until what was done in its file system is on the disk, so that it
    /// does not weigh on the next run.
    ///
    /// # Errors
    /// The disk's.
    pub fn settle(&self) -> Result<()> {
        let dir = File::open(self.dir.path())?;
        rustix::fs::syncfs(&dir).context("syncfs")?;
        Ok(())
    }
}

fn file_in(dir: &TempDir, format: Format) -> PathBuf {
    dir.path().join(match format {
        Format::Ploop => "disk.hds",
        Format::Qcow2 => "disk.qcow2",
        Format::Raw => "disk.raw",
    })
}

fn create(path: &Path, format: Format, geometry: Geometry, backing: Option<&Path>) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format.qemu_name()]);
    let cluster = match format {
        Format::Ploop => geometry.cluster_bytes.or(Some(PLOOP_CLUSTER)),
        Format::Qcow2 => geometry.cluster_bytes,
        Format::Raw => None,
    };
    if let Some(bytes) = cluster {
        command.arg("-o").arg(format!("cluster_size={bytes}"));
    }
    if let Some(backing) = backing {
        command.arg("-b").arg(backing).args(["-F", "qcow2"]);
    }
    run(command.arg(path).arg(geometry.disk_bytes.to_string()))
}

fn allocate(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create_new(path)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes).context("fallocate")?;
    file.sync_all()?;
    Ok(())
}

/// Runs a command that must succeed.
fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let output = command
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    if !output.status.success() {
        bail!(complaint(command, &output));
    }
    Ok(())
}

fn complaint(command: &Command, output: &Output) -> String {
    format!(
        "{command:?} failed ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A ploop image with every cluster mapped, to no data: the file is one hole
/// after its BAT. Which cluster lies where is shuffled, as in an image that has
/// lived.
///
/// # Errors
/// Any of the file operations; a size that the format cannot express.
pub fn write_fully_mapped(path: &Path, disk_bytes: u64, cluster_bytes: u32) -> Result<()> {
    const HEADER_BYTES: u64 = 64;
    const SECTOR: u64 = 512;
    /// Entries written at a time.
    const CHUNK: u32 = 1 << 16;

    let cluster = u64::from(cluster_bytes);
    let entries = u32::try_from(disk_bytes / cluster)?;
    ensure!(
        entries.is_power_of_two(),
        "the shuffle needs a power of two"
    );
    let data_start = (HEADER_BYTES + 4 * u64::from(entries)).div_ceil(cluster);
    let sectors_per_cluster = u32::try_from(cluster / SECTOR)?;

    let mut header = Vec::with_capacity(HEADER_BYTES as usize);
    header.write_all(b"WithouFreSpacExt")?;
    // Type, heads, cylinders, cluster size, number of entries.
    for word in [2, 16, entries, sectors_per_cluster, entries] {
        header.write_all(&word.to_le_bytes())?;
    }
    header.write_all(&(disk_bytes / SECTOR).to_le_bytes())?;
    // In use: no. First block offset, flags, extension offset.
    header.write_all(&0u32.to_le_bytes())?;
    let first_block = u32::try_from(data_start * u64::from(sectors_per_cluster))?;
    header.write_all(&first_block.to_le_bytes())?;
    header.write_all(&0u32.to_le_bytes())?;
    header.write_all(&0u64.to_le_bytes())?;
    ensure!(
        header.len() as u64 == HEADER_BYTES,
        "the header is 64 bytes"
    );

    let file = File::create_new(path)?;
    file.write_all_at(&header, 0)?;
    for start in (0..entries).step_by(CHUNK as usize) {
        let end = start.saturating_add(CHUNK).min(entries);
        let bytes: Vec<u8> = (start..end)
            .flat_map(|index| {
                // Odd, so a permutation of the powers of two.
                let place = index.wrapping_mul(0x9e37_79b1) & (entries - 1);
                (place + data_start as u32).to_le_bytes()
            })
            .collect();
        file.write_all_at(&bytes, HEADER_BYTES + 4 * u64::from(start))?;
    }
    file.set_len((data_start + u64::from(entries)) * cluster)?;
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fully_mapped_image_is_sound() {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("LEFT OUT: qemu-img is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = file_in(&dir, Format::Ploop);
        write_fully_mapped(&path, 1 << 30, 1 << 20).unwrap();
        let check = Command::new("qemu-img")
            .args(["check", "-f", "parallels"])
            .arg(&path)
            .status();
        assert!(check.unwrap().success());
        let output = Command::new("qemu-img")
            .args(["map", "--output=json", "-f", "parallels"])
            .arg(&path)
            .output()
            .unwrap();
        let map = String::from_utf8(output.stdout).unwrap();
        // Neighbours are never contiguous, so there is one extent a cluster.
        assert_eq!(map.matches("\"present\": true").count(), 1024, "{map}");
    }
}
