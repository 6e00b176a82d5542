//! Dirty bitmaps of a disk that nobody serves.
//!
//! The engine keeps them, and does here what it does for a guest, without one: it opens the
//! image, changes bitmaps and closes it. The format has no place for it that one does not
//! record, so that cannot be changed here.

use std::io;
use std::path::Path;

use super::delta::Delta;
use super::error::{ImageError, IoContext, Result};
use super::open::{Access, OpenMode, image_of, open};
use crate::ploop::{
    BitmapAction, BitmapError, BitmapInfo, Engine, Level, OpenError, Options, Running,
    check_saved_bitmaps, read_bitmaps,
};
use crate::storage::{FileId, HostDisk, HostFile, HostOptions};

/// Those of the top of the disk at `path`, or of the snapshot that `mode` names.
///
/// # Errors
/// Whatever keeps it from being opened for reading so.
pub fn list_bitmaps(path: &Path, mode: OpenMode) -> Result<Vec<BitmapInfo>> {
    let image = open(path, mode)?;
    let top = image.files.last().zip(image.chain.levels.last());
    top.map_or(Ok(Vec::new()), |(file, level)| bitmaps_of(file, *level))
}

/// Those of one image file; none unless it was closed with them.
pub(super) fn bitmaps_of(file: &HostFile, level: Level) -> Result<Vec<BitmapInfo>> {
    if level != Level::Ploop {
        return Ok(Vec::new());
    }
    let disk = disk_of(&[file], false)?;
    read_bitmaps(&disk, FileId(0)).context(&file.path, "read the header")
}

/// Does all of this to the bitmaps of the disk at `path`, or nothing.
///
/// # Errors
/// A disk that is in use or was not closed, an action that cannot be done, or that the format
/// cannot store; any I/O error.
pub fn change_bitmaps(path: &Path, actions: &[BitmapAction]) -> Result<()> {
    let is_of_process = |action: &BitmapAction| {
        matches!(action, BitmapAction::Enable(_) | BitmapAction::Disable(_))
    };
    let image = open(path, OpenMode::new(Access::Serve))?;
    let Some(top) = image.files.last() else {
        return Ok(());
    };
    if actions.iter().any(is_of_process) {
        return Err(ImageError::Unsupported {
            path: path.to_owned(),
            why: "a disk that nobody serves cannot say that a bitmap does not record: each does \
                  when it is served"
                .to_owned(),
        });
    }
    let wrong = |source: BitmapError| ImageError::Bitmap {
        path: top.path.clone(),
        source,
    };
    if image.chain.levels.last() != Some(&Level::Ploop) {
        return Err(wrong(BitmapError::Raw));
    }
    Delta::load(image_of(top)?)?.require_sound()?;
    // What is refused changes nothing: while they are written anew, a cut takes all of them.
    let checked = check_saved_bitmaps(&disk_of(&[top], false)?, FileId(0), actions);
    let checked = checked.context(&top.path, "read the header")?;
    checked.map_err(wrong)?;
    let files: Vec<_> = image.files.iter().collect();
    let mut options = Options::default();
    options.runners = 1;
    options.max_queues = 1;
    // Nothing is going to be written by a guest.
    options.preallocation = 0;
    let opened = Engine::open(disk_of(&files, true)?, &image.chain, options);
    let opened = opened.map_err(|source: OpenError| ImageError::Engine {
        path: top.path.clone(),
        source,
    })?;
    let running = Running::start(opened).context(&top.path, "start a thread for")?;
    let changed = running.engine().change_bitmaps(actions);
    let mut expected = running.engine().bitmaps();
    expected.retain(|bitmap| bitmap.is_persistent);
    let closed = running.close();
    changed.map_err(wrong)?;
    closed.map_err(|error| wrong(error.into()))?;
    if bitmaps_of(top, Level::Ploop)?.len() == expected.len() {
        return Ok(());
    }
    let full = io::Error::other("the host had no space for them, and all are lost");
    Err(full).context(&top.path, "keep the dirty bitmaps of")
}

/// A disk of files that are open already. The last may be written to.
fn disk_of(files: &[&HostFile], is_changed: bool) -> Result<HostDisk> {
    let again = |(index, file): (usize, &&HostFile)| {
        Ok(HostFile {
            file: file.file.try_clone().context(&file.path, "open")?,
            path: file.path.clone(),
            writable: is_changed && index + 1 == files.len(),
        })
    };
    let copies = files.iter().enumerate().map(again).collect::<Result<_>>()?;
    let path = files.last().map_or(Path::new(""), |file| &file.path);
    HostDisk::new(copies, HostOptions::default()).context(path, "open")
}

#[cfg(all(test, not(ploop_loom)))]
mod tests;
