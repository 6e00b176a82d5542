//! Dates and descriptions of snapshots, in a file beside the descriptor.

use std::io::Read;
use std::path::Path;

use jiff::Timestamp;

use crate::format::{Descriptor, Guid, SnapshotNote, SnapshotNotes};
use crate::image::bundle::Bundle;
use crate::image::error::{ImageError, IoContext, Result};
use crate::image::ownership::Ownership;

/// Reads the notes of a bundle; without a file, there are none.
pub(super) fn load(bundle: &Bundle) -> Result<SnapshotNotes> {
    let name = Path::new(SnapshotNotes::FILE_NAME);
    if !bundle.folder().contains(name)? {
        return Ok(SnapshotNotes::default());
    }
    let path = bundle.path().join(name);
    let file = bundle.folder().open_image(name, false)?;
    let mut bytes = Vec::new();
    // One byte more tells a text that is too long from one that is not.
    let mut limited = file.take(SnapshotNotes::TEXT_MAX as u64 + 1);
    limited.read_to_end(&mut bytes).context(&path, "read")?;
    let parsed = match std::str::from_utf8(&bytes) {
        Ok(text) if text.len() <= SnapshotNotes::TEXT_MAX => {
            SnapshotNotes::parse(text).map_err(|error| error.to_string())
        }
        Ok(_) => Err(format!("longer than {} bytes", SnapshotNotes::TEXT_MAX)),
        Err(error) => Err(error.to_string()),
    };
    parsed.map_err(|why| ImageError::Unsupported {
        path,
        why: format!(
            "is damaged: {why}; it holds the dates and descriptions of snapshots, nothing else: \
             move it away to go on without them"
        ),
    })
}

/// Notes that `guid` is being made; drops the notes of snapshots that are no more.
/// It comes first: of a snapshot that is then not made, a note does no harm.
pub(super) fn add(bundle: &Bundle, guid: Guid, description: Option<&str>) -> Result<()> {
    let mut notes = load(bundle)?;
    notes.retain(|noted| bundle.descriptor().shot(noted).is_some());
    let note = SnapshotNote {
        // Fractions of a second tell people nothing.
        date: Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default(),
        description: description.map(str::to_owned),
    };
    notes.insert(guid, note);
    let text = notes.to_json();
    let folder = bundle.folder();
    // Who may read the descriptor may read what belongs to it.
    let descriptor = folder.open_image(Path::new(Descriptor::FILE_NAME), false)?;
    let ownership = Ownership::of(&descriptor, bundle.path())?;
    folder.replace(SnapshotNotes::FILE_NAME, text.as_bytes(), Some(ownership))
}
