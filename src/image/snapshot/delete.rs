//! Deleting a snapshot: what lies on it must stay what it is.
//!
//! A snapshot that nothing lies on just goes. One with a single child gets the
//! child's clusters, and then takes the child's place; meanwhile it has no name,
//! so that nobody takes it for what it was. One with several children stays.
//!
//! While the disk is served, one that nothing lies on goes in the same way; the others go in
//! the other direction (`served/delete.rs`), which changes nothing that anybody may be reading.

use std::path::Path;

use super::Held;
use super::merge::{Level, check_mergeable, merge_into};
use super::open_for_change;
use crate::format::{Guid, ImageKind};
use crate::image::bundle::Bundle;
use crate::image::check::{Repair, check_delta};
use crate::image::delta::Delta;
use crate::image::error::{ImageError, Result};
use crate::image::file::HostImage;
use crate::image::open::{Access, OpenMode, image_of, lock};
use crate::image::progress::Progress;

/// Deletes the snapshot `guid` of the bundle at `path`; the disk, and all other
/// snapshots, stay what they are.
///
/// # Errors
/// No such snapshot, one that several others lie on, an image in use, or any I/O
/// error. Cut off in the middle of a merge, it is to be finished by
/// `ploop-img check --repair leaks`.
pub fn delete_snapshot(path: &Path, guid: Guid, progress: &dyn Progress) -> Result<()> {
    let mut held = Held::open(path, |bundle| {
        bundle.require(guid)?;
        let mut guids = vec![guid];
        guids.extend(bundle.descriptor().children(guid).map(|shot| shot.guid));
        Ok(guids)
    })?;
    delete(&mut held, guid, progress)
}

/// Deletes a node; it and its children are held.
fn delete(held: &mut Held, guid: Guid, progress: &dyn Progress) -> Result<()> {
    let descriptor = held.bundle.descriptor();
    let is_snapshot = descriptor.shot(guid).is_some() && guid != descriptor.top();
    match is_snapshot && descriptor.children(guid).next().is_none() {
        true => remove_leaf(&mut held.bundle, guid)?.map_err(deleted_but),
        false => collapse(held, guid, progress),
    }
}

/// Says of a snapshot that is no more what was not done.
fn deleted_but(source: ImageError) -> ImageError {
    ImageError::DeletedBut(Box::new(source))
}

/// Removes a snapshot that nothing lies on. Its image is held, or else nobody uses it. If what
/// comes back is an error within, the snapshot is no more.
fn remove_leaf(bundle: &mut Bundle, guid: Guid) -> Result<Result<()>> {
    let mut descriptor = bundle.descriptor().clone();
    let image = descriptor
        .remove_leaf(guid)
        .map_err(|error| bundle.edit_error(error))?;
    let new = bundle.prepare(descriptor)?;
    new.require_unchanged()?;
    // Until that is stable a power cut may bring back the one that names the file.
    let is_stable = new.put()?;
    Ok(is_stable.and_then(|()| bundle.folder().remove(&image.file)))
}

/// The same of a disk that the caller serves, so that nobody else changes its bundle.
///
/// # Errors
/// There is no such snapshot, others lie on it, somebody uses it, or any I/O error.
pub(crate) fn remove_leaf_beside(bundle: &mut Bundle, guid: Guid) -> Result<Result<()>> {
    let file = open_for_change(bundle, guid)?;
    // To look for who has it would take rights that are given up.
    let mode = OpenMode::new(Access::Change).names_no_holder();
    let _lock = lock(&file, mode)?;
    remove_leaf(bundle, guid)
}

/// Merges the only child of `guid` into it. Both must be held.
pub(super) fn collapse(held: &mut Held, guid: Guid, progress: &dyn Progress) -> Result<()> {
    let edit_error = |held: &Held, error| held.bundle.edit_error(error);
    let descriptor = held.bundle.descriptor();
    let child = descriptor
        .only_child(guid)
        .map_err(|error| edit_error(held, error))?;
    let is_resumed = descriptor.shot(guid).is_some_and(|shot| shot.merging);
    let is_base = descriptor.shot(guid).is_some_and(|s| s.parent.is_none());
    let mut lower = open_lower(held, guid, is_resumed)?;
    let upper = Delta::load(image_of(held.file(child)?)?)?;
    upper.require_sound()?;
    if !is_resumed {
        // While the old state is still there to be kept.
        check_mergeable(&lower, &upper)?;
    }
    let mut descriptor = held.bundle.descriptor().clone();
    let nameless = descriptor
        .begin_collapse(guid)
        .map_err(|error| edit_error(held, error))?;
    if !is_resumed {
        held.bundle.save(descriptor.clone())?;
    }
    merge_into(&mut lower, &upper, is_base, progress)?;

    let merged = descriptor
        .collapse(nameless)
        .map_err(|error| edit_error(held, error))?;
    held.bundle.save(descriptor)?;
    held.follow();
    let removed = held.bundle.folder().remove(&merged.file);
    removed.map_err(deleted_but)
}

/// Opens what is merged into; `is_resumed` says that a merge may have been cut off
/// in the middle.
pub(super) fn open_lower(held: &Held, guid: Guid, is_resumed: bool) -> Result<Level<HostImage>> {
    let file = image_of(held.file(guid)?)?;
    let image = held.bundle.descriptor().image(guid);
    if image.is_some_and(|image| image.kind == ImageKind::Plain) {
        return Ok(Level::Plain(file));
    }
    let mut delta = Delta::load(file)?;
    if is_resumed {
        // The merge that was cut off left its mark, and maybe clusters.
        check_delta(&mut delta, Some(Repair::All))?;
    }
    delta.require_sound()?;
    Ok(Level::Ploop(delta))
}

/// Finishes the merge of a deleted snapshot that was cut off, if there is one.
/// Says whether there was.
pub(in crate::image) fn finish_merge(path: &Path, progress: &dyn Progress) -> Result<bool> {
    let merging = |held: &Held| {
        let shots = held.bundle.descriptor().shots();
        shots.iter().find(|shot| shot.merging).map(|shot| shot.guid)
    };
    let mut held = Held::open(path, |bundle| {
        let descriptor = bundle.descriptor();
        let Some(shot) = descriptor.shots().iter().find(|shot| shot.merging) else {
            return Ok(Vec::new());
        };
        let children = descriptor.children(shot.guid).map(|child| child.guid);
        Ok(children.chain([shot.guid]).collect())
    })?;
    let Some(guid) = merging(&held) else {
        return Ok(false);
    };
    delete(&mut held, guid, progress).map(|()| true)
}
