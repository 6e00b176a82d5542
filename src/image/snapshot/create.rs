//! Making a snapshot: a new, empty top above what was the top.

use std::path::Path;

use super::{Held, NewSnapshot, header_on_top};
use crate::format::{Guid, ImageKind};
use crate::image::delta::Delta;
use crate::image::error::{IoContext, Result};
use crate::image::file::{ImageFile, rename_opening};
use crate::image::open::image_of;

/// Keeps the present state of the bundle at `path` as a snapshot; gives back its
/// name, which is `guid` or a random one. The date is noted, and the `description`, one
/// line of text. The guest's disk does not change.
///
/// # Errors
/// A bare image, one in use, a name that is taken, a chain that is as long as it
/// may be, notes that are damaged, or any I/O error.
pub fn create_snapshot(path: &Path, guid: Option<Guid>, description: Option<&str>) -> Result<Guid> {
    let mut held = Held::open(path, |_| Ok(Vec::new()))?;
    let top = held.bundle.descriptor().top();
    let file = held.file(top)?;
    let kind = held.bundle.descriptor().image(top).map(|image| image.kind);
    if kind == Some(ImageKind::Expandable) {
        // It will be read only from now on: nobody would repair it any more.
        Delta::load(image_of(file)?)?.require_sound()?;
    }
    let header = header_on_top(&held.bundle, top, file)?;
    if kind == Some(ImageKind::Plain) {
        // What lies behind the end of the disk was never the guest's, and must not
        // come to light when the disk grows above it.
        let image = image_of(file)?;
        rename_opening(&image)?;
        image
            .set_len(header.geometry().disk_size.bytes())
            .and_then(|()| image.sync())
            .context(image.path(), "cut off")?;
    }
    let guid = guid.unwrap_or_else(Guid::random);
    let new = NewSnapshot {
        guid: Some(guid),
        description: description.map(str::to_owned),
    };
    held.add_delta(&header, |bundle, name| new.descriptor(bundle, guid, name))?;
    Ok(guid)
}
