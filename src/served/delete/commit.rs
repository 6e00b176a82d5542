//! The end of a deletion: the descriptor tells of a disk without the snapshots, and then their
//! files go.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::which::Levels;
use super::{JobError, Site};
use crate::format::{Descriptor, Guid, SnapshotNote};
use crate::image::{self, Bundle, ImageError};
use crate::ploop::{Engine, Needless};
use crate::storage::{FileId, HostDisk, lock};

/// How much a file is cut at once, in bytes: some file systems take seconds for much more.
pub(super) const CUT_AT_ONCE: u64 = 32 << 20;

/// Snapshots that are no more.
#[derive(Debug)]
pub struct Deleted {
    /// Their names, and what was noted of them.
    pub snapshots: Vec<(Guid, Option<SnapshotNote>)>,
    /// Those of them on which the disk lay that is served: it does not any more. Base first.
    pub levels: Vec<GoneLevel>,
    /// The descriptor does not name them any more. If there is something here, a file is still
    /// there, or a power cut may bring the old descriptor back, with which the disk is the same.
    pub doubt: Option<ImageError>,
    /// Files whose space is to be given back: they have no names any more, and nobody else is
    /// known to use them.
    pub space: Vec<Leftover>,
}

/// An image that the disk which is served does not lie on any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoneLevel {
    /// How many images were below it.
    pub depth: usize,
    /// Its file.
    pub path: PathBuf,
}

/// A file without a name that keeps its space, since this process has it open elsewhere.
#[derive(Debug)]
pub struct Leftover(pub(super) File);

impl Leftover {
    /// Gives back some of the space, in a time that whoever waits does not notice. `true` if
    /// there is more.
    ///
    /// # Errors
    /// Any of `fstat(2)` and `ftruncate(2)`.
    pub fn give_back_some(&self) -> io::Result<bool> {
        let left = self.0.metadata()?.len().saturating_sub(CUT_AT_ONCE);
        self.0.set_len(left)?;
        Ok(left > 0)
    }
}

/// Nothing needs the snapshots any more: neither `to`, of which they were parts, nor, of the disk
/// that is served, the levels.
pub(super) fn commit(
    site: &mut Site<'_, HostDisk>,
    (guids, to): (&[Guid], Guid),
    levels: Option<Needless>,
) -> Result<Deleted, JobError> {
    let engine = site.engine;
    let bundle = super::bundle_of(site.bundle.as_deref_mut())?;
    bundle.refresh()?;
    let known = Levels::of(engine, bundle)?;
    let files = levels.map(|levels| levels.files(engine));
    let expected: Vec<_> = guids.iter().filter_map(|guid| known.file(*guid)).collect();
    if files.unwrap_or_default() != expected {
        return Err(JobError::Impossible(
            "the disk has other snapshots than when this was begun",
        ));
    }
    let descriptor = bundle.descriptor();
    let images = guids.iter().map(|guid| {
        let image = descriptor.image(*guid);
        (known.file(*guid), image.map(|image| image.file.clone()))
    });
    let images: Vec<_> = images.collect();
    let gone = guids.iter().filter_map(|guid| {
        let path = engine.disk().path(known.file(*guid)?)?.to_owned();
        let depth = known.depth(*guid)?;
        Some(GoneLevel { depth, path })
    });
    let mut deleted = Deleted {
        levels: gone.collect(),
        snapshots: guids
            .iter()
            .map(|guid| (*guid, image::note_of(bundle, *guid)))
            .collect(),
        doubt: None,
        space: Vec::new(),
    };
    let without = bundle.without(guids, to)?;
    deleted.doubt = put(bundle, without)?.err();
    if let Some(levels) = levels {
        levels.drop_from_chain(engine);
    }
    for (level, _) in &images {
        level.iter().for_each(|level| engine.disk().retire(*level));
    }
    // If that is not stable, a power cut may bring the old chain back, which has to find its files
    // then, and reads the same.
    if deleted.doubt.is_none() {
        for (level, file) in images {
            match file.map(|file| remove(engine, bundle, level, &file)) {
                Some(Ok(leftover)) => deleted.space.extend(leftover),
                Some(Err(error)) => deleted.doubt = Some(error),
                None => {}
            }
        }
    }
    for guid in guids {
        log::info!("deleted the snapshot {guid}");
    }
    Ok(deleted)
}

/// Nobody finds the file any more by the descriptor. Another one that has its name stays.
fn remove(
    engine: &Engine<HostDisk>,
    bundle: &Bundle,
    level: Option<FileId>,
    file: &Path,
) -> Result<Option<Leftover>, ImageError> {
    let is_it = |opened: &File| {
        level.is_none_or(|level| engine.disk().is_file(level, opened).unwrap_or(true))
    };
    // Before its name goes.
    let opened = match bundle.folder().open_image(file, true) {
        Ok(opened) if !is_it(&opened) => {
            log::warn!(
                "{}: another file has the name of the snapshot's, and stays",
                file.display()
            );
            return Ok(None);
        }
        opened => opened.ok(),
    };
    bundle.folder().remove(file)?;
    let is_used = |opened: &File| match level {
        Some(level) => engine.disk().is_used_by_others(level),
        None => lock::is_used_by_others(opened),
    };
    let keeps_space = match opened {
        Some(opened) => match is_used(&opened) {
            Ok(false) if is_nameless(&opened) => return Ok(Some(Leftover(opened))),
            Ok(false) => "it has another name",
            Ok(true) => "another process uses it",
            Err(_) => "it cannot be found out who uses it",
        },
        None => "it cannot be opened for writing",
    };
    log::info!(
        "{}: the deleted file keeps its space until it is closed: {keeps_space}",
        file.display()
    );
    Ok(None)
}

fn is_nameless(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    file.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
}

/// Puts the descriptor in place; what comes back says whether that is stable.
fn put(bundle: &mut Bundle, descriptor: Descriptor) -> Result<Result<(), ImageError>, ImageError> {
    let new = bundle.prepare(descriptor)?;
    new.require_unchanged()?;
    new.put()
}
