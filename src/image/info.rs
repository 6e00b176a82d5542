//! What an image says about itself.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::bitmaps::bitmaps_of;
use super::delta::Delta;
use super::error::{IoContext, Result};
use super::open::{OpenMode, image_of, open};
use crate::format::{Guid, Header, InUse, SECTOR_SIZE, Version};
use crate::ploop::{BitmapInfo, Level};
use crate::storage::HostFile;

/// One image file; serialised it has the keys of `qemu-img info --output=json`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Of the image file.
    pub filename: PathBuf,
    /// "ploop" or "raw".
    pub format: &'static str,
    /// Of the guest's disk, in bytes.
    pub virtual_size: u64,
    /// What it takes on the host, in bytes.
    pub actual_size: u64,
    /// In bytes; of ploop images only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// In use, or left so.
    pub dirty_flag: bool,
    /// Of ploop images only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// The level below, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<PathBuf>,
}

/// The envelope that `qemu-img` puts around what one format alone has.
#[derive(Clone, Debug, Serialize)]
pub struct FormatSpecific {
    #[serde(rename = "type")]
    format: &'static str,
    /// What is inside.
    pub data: PloopInfo,
}

/// What only ploop images have.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PloopInfo {
    /// 1 or 2.
    pub version: u32,
    /// Number of BAT entries.
    pub bat_entries: u32,
    /// Those that are not zero.
    pub allocated_clusters: u32,
    /// Where data starts, in bytes.
    pub data_offset: u64,
    /// Length of the file in bytes.
    pub file_length: u64,
    /// "closed", "open", or "closed, with a valid extension".
    pub in_use: &'static str,
    /// Dirty bitmaps that it was closed with.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapNote>,
    /// Of the level in its bundle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guid: Option<String>,
}

/// A dirty bitmap; serialised it has keys that `qemu-img info --output=json` has of qcow2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapNote {
    /// A GUID.
    pub name: String,
    /// What a bit covers, in bytes.
    pub granularity: u64,
    /// What of the disk was changed, in bytes.
    pub count: u64,
}

impl From<BitmapInfo> for BitmapNote {
    fn from(bitmap: BitmapInfo) -> Self {
        let BitmapInfo {
            name,
            granularity,
            count,
            ..
        } = bitmap;
        Self {
            name,
            granularity,
            count,
        }
    }
}

/// Everything that is known about a disk.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// The path as given.
    pub path: PathBuf,
    /// The top first, as `qemu-img info --backing-chain` has it.
    pub levels: Vec<ImageInfo>,
    /// How many snapshots the bundle has, in this chain or elsewhere in the tree;
    /// `None` for a bare image.
    pub snapshots: Option<usize>,
}

/// Describes the disk at `path`.
///
/// # Errors
/// Whatever keeps it from being opened for reading so.
pub fn info(path: &Path, mode: OpenMode) -> Result<DiskInfo> {
    let image = open(path, mode)?;
    let levels = image
        .chain
        .levels
        .iter()
        .zip(&image.files)
        .zip(image.guids());
    let mut levels = levels
        .map(|((level, file), guid)| describe(*level, file, guid))
        .collect::<Result<Vec<_>>>()?;
    for index in 1..levels.len() {
        levels[index].backing_filename = Some(levels[index - 1].filename.clone());
    }
    levels.reverse();
    Ok(DiskInfo {
        path: path.to_owned(),
        levels,
        snapshots: image
            .bundle
            .map(|bundle| bundle.descriptor().shots().len() - 1),
    })
}

fn describe(level: Level, file: &HostFile, guid: Option<Guid>) -> Result<ImageInfo> {
    let metadata = file.file.metadata().context(&file.path, "look at")?;
    let mut info = ImageInfo {
        filename: file.path.clone(),
        format: "raw",
        virtual_size: 0,
        actual_size: metadata.blocks() * SECTOR_SIZE,
        cluster_size: None,
        dirty_flag: false,
        format_specific: None,
        backing_filename: None,
    };
    match level {
        Level::Plain { size, .. } => info.virtual_size = size.bytes(),
        Level::Ploop => {
            let delta = Delta::load(image_of(file)?)?;
            let geometry = *delta.geometry();
            info.format = "ploop";
            info.virtual_size = geometry.disk_size.bytes();
            info.cluster_size = Some(geometry.cluster.bytes());
            info.dirty_flag = matches!(delta.header().in_use, InUse::Open | InUse::OpenByOthers);
            info.format_specific = Some(FormatSpecific {
                format: "ploop",
                data: PloopInfo {
                    version: match geometry.version {
                        Version::V1 => 1,
                        Version::V2 => 2,
                    },
                    bat_entries: geometry.entries,
                    allocated_clusters: delta.bat().iter().filter(|e| **e != 0).count() as u32,
                    data_offset: geometry.data_start,
                    file_length: metadata.len(),
                    in_use: in_use(delta.header()),
                    bitmaps: bitmaps_of(file, level)?
                        .into_iter()
                        .map(Into::into)
                        .collect(),
                    guid: guid.map(|guid| guid.to_string()),
                },
            });
        }
    }
    Ok(info)
}

fn in_use(header: &Header) -> &'static str {
    match header.in_use {
        InUse::Closed => "closed",
        InUse::ClosedWithExtension => "closed, with a valid extension",
        InUse::Open | InUse::OpenByOthers => "open",
    }
}
