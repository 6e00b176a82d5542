//! The tree of snapshots.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;

use super::notes;
use crate::format::{Guid, SECTOR_SIZE, Shot, SnapshotNote, SnapshotNotes};
use crate::image::bundle::{Bundle, Location};
use crate::image::error::{ImageError, IoContext, Result};
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
    /// When it was made, where that is noted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub date: Option<Timestamp>,
    /// What for, where that is noted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// All nodes of the bundle at `path`, each right before those that lie on it, the
/// base first.
///
/// # Errors
/// A bare image, a bundle or notes that are not valid, or any I/O error.
pub fn list_snapshots(path: &Path) -> Result<Vec<SnapshotInfo>> {
    match Location::of(path)? {
        Location::Bundle(bundle) => list_of(&bundle),
        Location::Bare(_) => Err(not_a_bundle(path)),
    }
}

/// The same of a bundle that is open, as its descriptor was last read.
pub(crate) fn list_of(bundle: &Bundle) -> Result<Vec<SnapshotInfo>> {
    let descriptor = bundle.descriptor();
    let notes = notes::load(bundle)?;
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
        list.extend(describe(bundle, &notes, guid, depth)?);
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
    notes: &SnapshotNotes,
    guid: Guid,
    depth: usize,
) -> Result<Option<SnapshotInfo>> {
    let descriptor = bundle.descriptor();
    let note = notes.get(guid);
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
        date: note.map(|note| note.date),
        description: note.and_then(|note| note.description.clone()),
    }))
}

/// Whether a snapshot of the bundle, as its descriptor was last read, has this description.
pub(crate) fn is_described(bundle: &Bundle, description: &str) -> Result<bool> {
    Ok(!described(bundle, description)?.is_empty())
}

/// Which snapshots of the bundle, as its descriptor was last read, have this description.
pub(crate) fn described(bundle: &Bundle, description: &str) -> Result<Vec<Guid>> {
    let notes = notes::load(bundle)?;
    let found = notes.described(description);
    let is_there = |guid: &Guid| bundle.descriptor().shot(*guid).is_some();
    Ok(found.filter(is_there).collect())
}

/// What is noted of a snapshot, if anything is that can be read.
pub(crate) fn note_of(bundle: &Bundle, guid: Guid) -> Option<SnapshotNote> {
    notes::load(bundle).ok()?.get(guid).cloned()
}

/// The snapshot of the bundle at `path` that is meant by `name`: its GUID, or the
/// description that no other has.
///
/// # Errors
/// There is none, or there are several; a bare image, a bundle or notes that are not
/// valid, or any I/O error.
pub fn find_snapshot(path: &Path, name: &str) -> Result<Guid> {
    if let Ok(guid) = name.parse() {
        return Ok(guid);
    }
    let Location::Bundle(bundle) = Location::of(path)? else {
        return Err(not_a_bundle(path));
    };
    let found = described(&bundle, name)?;
    let how_many = match found[..] {
        [guid] => return Ok(guid),
        [] => "no snapshot has",
        _ => "several snapshots have",
    };
    Err(ImageError::Unsupported {
        path: path.to_owned(),
        why: format!(
            "{how_many} the description {name:?}; give the GUID of one that 'ploop-img snapshot \
             list' shows"
        ),
    })
}
