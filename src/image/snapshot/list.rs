//! The tree of snapshots.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::format::{Descriptor, Guid, SECTOR_SIZE, Shot};
use crate::image::bundle::{Bundle, Location};
use crate::image::error::{IoContext, Result};
use crate::image::open::{not_a_bundle, open_level};

/// A node of the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Its name.
    pub guid: String,
    /// What it lies on; `None` for the base.
    pub parent: Option<String>,
    /// Whether it is what a guest gets.
    pub current: bool,
    /// Whether it was deleted, and the merge that belongs to that was cut off.
    pub merging: bool,
    /// How far from the base it is.
    pub depth: usize,
    /// The file with what it adds to its parent.
    pub filename: PathBuf,
    /// What that takes on the host, in bytes.
    pub actual_size: u64,
}

/// All nodes of the bundle at `path`, each right before those that lie on it, the
/// base first.
///
/// # Errors
/// A bare image, a bundle that is not valid, or any I/O error.
pub fn list_snapshots(path: &Path) -> Result<Vec<SnapshotInfo>> {
    let Location::Bundle(bundle) = Location::of(path)? else {
        return Err(not_a_bundle(path));
    };
    let descriptor = bundle.descriptor();
    let is_base = |shot: &&Shot| shot.parent.is_none();
    let mut list = Vec::new();
    // Depth first, without recursion: a chain may be long.
    let mut open: Vec<(usize, Guid)> = descriptor
        .shots()
        .iter()
        .filter(is_base)
        .map(|shot| (0, shot.guid))
        .collect();
    while let Some((depth, guid)) = open.pop() {
        list.extend(describe(&bundle, descriptor, guid, depth)?);
        let children = descriptor.children(guid).map(|shot| (depth + 1, shot.guid));
        let mut children: Vec<_> = children.collect();
        // The last is taken first.
        children.reverse();
        open.extend(children);
    }
    Ok(list)
}

fn describe(
    bundle: &Bundle,
    descriptor: &Descriptor,
    guid: Guid,
    depth: usize,
) -> Result<Option<SnapshotInfo>> {
    let (Some(shot), Some(image)) = (descriptor.shot(guid), descriptor.image(guid)) else {
        return Ok(None);
    };
    let file = open_level(bundle, image, false)?;
    let metadata = file.file.metadata().context(&file.path, "look at")?;
    Ok(Some(SnapshotInfo {
        guid: guid.to_string(),
        parent: shot.parent.map(|parent| parent.to_string()),
        current: guid == descriptor.top(),
        merging: shot.merging,
        depth,
        filename: file.path,
        actual_size: metadata.blocks() * SECTOR_SIZE,
    }))
}
