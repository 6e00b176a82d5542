//! Going back to a snapshot: a new, empty top on it in place of the present one.

use std::path::Path;

use super::{Held, header_on_top};
use crate::format::{EditError, Guid, Header};
use crate::image::bundle::Bundle;
use crate::image::error::{ImageError, Result};
use crate::image::open::{lock_file, open_level};
use crate::storage::lock::LockMode;

/// Makes the snapshot `guid` the state of the bundle at `path`. What was written
/// since the last snapshot is lost.
///
/// # Errors
/// No such snapshot, an image in use, or any I/O error.
pub fn switch_snapshot(path: &Path, guid: Guid) -> Result<()> {
    let mut held = Held::open(path, |bundle| {
        require_whole(bundle, guid)?;
        Ok(Vec::new())
    })?;
    let header = header_on(&held.bundle, guid)?;
    let mut old_top = None;
    held.add_delta(&header, |bundle, name| {
        let mut descriptor = bundle.descriptor().clone();
        let dropped = descriptor
            .switch_top(guid, name)
            .map_err(|error| bundle.edit_error(error))?;
        // The disk may have grown since.
        descriptor.disk_size = header.geometry().disk_size;
        old_top = Some(dropped.file);
        Ok(descriptor)
    })?;
    match old_top {
        Some(file) => held.bundle.folder().remove(&file),
        None => Ok(()),
    }
}

/// That `guid` is a snapshot, and not one that is about to be merged.
fn require_whole(bundle: &Bundle, guid: Guid) -> Result<()> {
    bundle.require(guid)?;
    let descriptor = bundle.descriptor();
    if guid == descriptor.top() {
        return Err(bundle.edit_error(EditError::IsTop(guid)));
    }
    if descriptor.shot(guid).is_some_and(|shot| shot.merging) {
        return Err(ImageError::Unsupported {
            path: bundle.path().to_owned(),
            why: format!(
                "snapshot {guid} was deleted and is about to be merged; \
                 'ploop-img check --repair leaks' finishes that"
            ),
        });
    }
    Ok(())
}

/// Of an empty image on the snapshot, which others may be reading meanwhile.
fn header_on(bundle: &Bundle, guid: Guid) -> Result<Header> {
    let Some(image) = bundle.descriptor().image(guid) else {
        return Err(bundle.edit_error(EditError::NotFound(guid)));
    };
    let file = open_level(bundle, image, false)?;
    let _lock = lock_file(&file, LockMode::ReadOnly, false)?;
    header_on_top(bundle, guid, &file)
}
