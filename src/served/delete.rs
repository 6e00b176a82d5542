//! Deleting a snapshot of a disk while that is served: one that no other lies on, which just
//! goes, or the one on which the top lies.
//!
//! What the latter has and the top lacks is copied into the top beside the guest, which
//! changes nothing of the snapshot ([`CopyUp`]). Then the disk needs it no more, and that is
//! stable: the descriptor is put in place that tells of a chain without it, the folder is
//! synced, and the file is removed. Until then the snapshot is what it was, so it can be given
//! up at any time; whoever opens the disk after a cut finds the old chain or the new one, and
//! both hold the same.
//!
//! As much is copied as the snapshot has, where host files cannot share data. So a base that
//! is nearly all of the disk is deleted better with nobody using the disk: then its child is
//! merged into it instead. So is any other snapshot, for what lies on it is read by many.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::job::{Job, JobError, Progress, Site, Step};
use crate::format::{Descriptor, Guid, SnapshotNote};
use crate::image::{self, Bundle, ImageError, Removal};
use crate::ploop::{CopyUp, CopyUpStep, Engine, EngineError};
use crate::storage::{Disk, FileId, HostDisk};

/// Copies under way, at most: the guest shall notice little of them.
const AT_ONCE: usize = 4;

/// How long a step takes at least, if there is so much to do.
const STEP: Duration = Duration::from_millis(20);

/// How long it waits at once for copies.
const PAUSE: Duration = Duration::from_millis(5);

/// How much a file is cut at once, in bytes: some file systems take seconds for much more.
const CUT_AT_ONCE: u64 = 32 << 20;

/// Which snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one of this name.
    Guid(Guid),
    /// The one that has all of these.
    Having {
        /// Its name.
        guid: Option<Guid>,
        /// What it is for.
        description: Option<String>,
    },
}

impl Which {
    fn find(&self, bundle: &Bundle) -> Result<Guid, JobError> {
        let (guid, description) = match self {
            Self::Guid(guid) => return Ok(*guid),
            Self::Having { guid, description } => (*guid, description.as_deref()),
        };
        let found = match (guid, description) {
            (_, Some(description)) => image::described(bundle, description)?,
            (Some(guid), None) => vec![guid],
            (None, None) => Vec::new(),
        };
        let top = bundle.descriptor().top();
        let is_it = |found: &Guid| {
            guid.is_none_or(|guid| guid == *found)
                && *found != top
                && bundle.descriptor().shot(*found).is_some()
        };
        let found: Vec<_> = found.into_iter().filter(is_it).collect();
        match found[..] {
            [guid] => Ok(guid),
            [] => Err(JobError::NoSuchSnapshot {
                guid,
                description: description.map(str::to_owned),
            }),
            _ => Err(JobError::Impossible(
                "several snapshots have this description: name one by its GUID",
            )),
        }
    }
}

/// A snapshot that is no more.
#[derive(Debug)]
pub struct Deleted {
    /// Its name.
    pub guid: Guid,
    /// What was noted of it.
    pub note: Option<SnapshotNote>,
    /// Its file, if the disk that is served lay on it: it does not any more.
    pub level: Option<PathBuf>,
    /// The descriptor does not name it any more. If there is something here, its file is still
    /// there, or a power cut may bring the old descriptor back, with which the disk is the same.
    pub doubt: Option<ImageError>,
    /// The file, whose space is to be given back: it has no name any more, and nobody else is
    /// known to use it.
    pub space: Option<Leftover>,
}

/// A file without a name that keeps its space, since this process has it open elsewhere.
#[derive(Debug)]
pub struct Leftover(File);

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

/// See the module's text.
pub struct Deletion {
    which: Which,
    stage: Stage,
    progress: Progress,
    deleted: Option<Deleted>,
}

enum Stage {
    Begin,
    Copying { guid: Guid, copies: CopyUp },
    Done,
}

impl Deletion {
    /// Of this snapshot. Nothing is looked at before the first step.
    pub fn new(which: Which) -> Self {
        Self {
            which,
            stage: Stage::Begin,
            progress: Progress::default(),
            deleted: None,
        }
    }

    fn begin(&mut self, site: &mut Site<'_, HostDisk>) -> Result<Step, JobError> {
        let engine = site.engine;
        let bundle = bundle_of(site.bundle.as_deref_mut())?;
        bundle.refresh()?;
        let guid = self.which.find(bundle)?;
        // Nor may the descriptor be replaced by who may have lost the disk since the last look.
        if !engine.disk().can_retire() {
            return Err(JobError::Impossible(
                "a server may take the lock of the disk away, and a file that is deleted would \
                 look like that; 'ploop-img snapshot delete' deletes it when nobody uses the disk",
            ));
        }
        if Removal::of(bundle, guid)? == Removal::Leaf {
            let note = image::note_of(bundle, guid);
            image::remove_leaf_beside(bundle, guid)?;
            log::info!("deleted the snapshot {guid}");
            self.deleted = Some(Deleted {
                guid,
                note,
                level: None,
                doubt: None,
                space: None,
            });
            return Ok(Step::Done);
        }
        bundle.without_parent_of_top(guid)?;
        engine.open_for_growth()?;
        let copies = CopyUp::new(engine)?;
        require_same(engine, bundle, copies.level(), guid)?;
        require_nothing_hidden(engine, &copies)?;
        let (_, clusters) = copies.progress();
        self.progress.total = clusters * cluster_of(engine);
        if !has_space(engine, self.progress.total) {
            return Err(JobError::Impossible(
                "the host has not enough space for what the snapshot has and the disk has not",
            ));
        }
        self.stage = Stage::Copying { guid, copies };
        Ok(Step::More { bytes: 0 })
    }

    fn copy(
        &mut self,
        site: &mut Site<'_, HostDisk>,
        guid: Guid,
        mut copies: CopyUp,
    ) -> Result<Step, JobError> {
        let engine = site.engine;
        let (before, total) = copies.progress();
        if !has_space(engine, (total - before) * cluster_of(engine)) {
            // What is left is the guest's.
            self.stage = Stage::Copying { guid, copies };
            return Ok(Step::HostFull);
        }
        let end = Instant::now() + STEP;
        let limit = (site.at_most / cluster_of(engine)).max(1);
        let refusal = loop {
            let left = limit.saturating_sub(copies.progress().0 - before);
            if left == 0 {
                break None;
            }
            let at_once = usize::try_from(left).map_or(AT_ONCE, |left| left.min(AT_ONCE));
            match copies.step(engine, at_once) {
                Ok(CopyUpStep::On) => {}
                Ok(CopyUpStep::Waits) => copies.wait(PAUSE),
                Ok(CopyUpStep::Full) => break Some(Step::HostFull),
                // Requests are held: what was begun for it begins anew.
                Ok(CopyUpStep::Held) | Err(EngineError::Suspended) => break Some(Step::Later),
                Ok(CopyUpStep::Ready) => {
                    self.progress.done = self.progress.total;
                    self.deleted = Some(commit(site, copies, guid)?);
                    return Ok(Step::Done);
                }
                Err(error) => return Err(error.into()),
            }
            if Instant::now() >= end {
                break None;
            }
        };
        let (now, total) = copies.progress();
        let cluster = cluster_of(engine);
        self.progress = Progress {
            done: now * cluster,
            total: total * cluster,
        };
        self.stage = Stage::Copying { guid, copies };
        Ok(refusal.unwrap_or(Step::More {
            bytes: (now - before) * cluster,
        }))
    }
}

impl Job<HostDisk> for Deletion {
    fn step(&mut self, site: &mut Site<'_, HostDisk>) -> Result<Step, JobError> {
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Begin => self.begin(site),
            Stage::Copying { guid, copies } => self.copy(site, guid, copies),
            Stage::Done => Ok(Step::Done),
        }
    }

    fn progress(&self) -> Progress {
        self.progress
    }

    /// The snapshot stays. What was copied is found in both files, which takes space until the
    /// snapshot is deleted.
    fn cancel(&mut self, _: &mut Site<'_, HostDisk>) {
        if let Stage::Copying { copies, .. } = std::mem::replace(&mut self.stage, Stage::Done) {
            copies.give_up();
        }
    }

    fn take_deleted(&mut self) -> Option<Deleted> {
        self.deleted.take()
    }
}

fn bundle_of(bundle: Option<&mut Bundle>) -> Result<&mut Bundle, JobError> {
    bundle.ok_or(JobError::Impossible("a bare image has no snapshots"))
}

fn cluster_of(engine: &Engine<HostDisk>) -> u64 {
    engine.geometry().cluster.bytes()
}

/// Whether the host has so much space, in bytes, if that is what copies take.
fn has_space(engine: &Engine<HostDisk>, needed: u64) -> bool {
    let disk = engine.disk();
    disk.clone_unit().is_some() || disk.free_space().is_ok_and(|free| free >= needed)
}

/// That the level which the engine has below the top is this snapshot.
fn require_same(
    engine: &Engine<HostDisk>,
    bundle: &Bundle,
    level: FileId,
    guid: Guid,
) -> Result<(), JobError> {
    let image = bundle.descriptor().image(guid);
    let name = image.and_then(|image| image.file.file_name());
    match name.is_some() && engine.disk().path(level).and_then(|path| path.file_name()) == name {
        true => Ok(()),
        false => Err(JobError::Impossible(
            "the descriptor has another image below the top than the one that is served",
        )),
    }
}

/// That the level hides nothing that is behind the end of a raw image below it: how much of such
/// an image is of the disk, only what lies on it says, and that would be the top.
fn require_nothing_hidden(engine: &Engine<HostDisk>, copies: &CopyUp) -> Result<(), JobError> {
    let Some((raw, end)) = copies.raw_below(engine) else {
        return Ok(());
    };
    match engine.disk().next_data(raw, end) {
        Ok(None) => Ok(()),
        _ => Err(JobError::Impossible(
            "the raw image below the snapshot holds data behind the end of its disk, which the \
             disk would show without the snapshot; 'ploop-img snapshot delete' deletes it when \
             nobody uses the disk",
        )),
    }
}

/// Nothing needs the snapshot any more.
fn commit(site: &mut Site<'_, HostDisk>, copies: CopyUp, guid: Guid) -> Result<Deleted, JobError> {
    let engine = site.engine;
    let bundle = bundle_of(site.bundle.as_deref_mut())?;
    bundle.refresh()?;
    let level = copies.level();
    require_same(engine, bundle, level, guid)?;
    let file = bundle
        .descriptor()
        .image(guid)
        .map(|image| image.file.clone());
    let note = image::note_of(bundle, guid);
    let without = bundle.without_parent_of_top(guid)?;
    // If that is not stable, a power cut may bring the old chain back, file and all: then it
    // stays part of the one in memory, too.
    let mut doubt = put(bundle, without)?.err();
    let mut space = None;
    if doubt.is_none() {
        copies.end(engine);
        engine.disk().retire(level);
        match file.map(|file| remove(engine, bundle, level, &file)) {
            Some(Ok(leftover)) => space = leftover,
            Some(Err(error)) => doubt = Some(error),
            None => {}
        }
    }
    log::info!("deleted the snapshot {guid}");
    Ok(Deleted {
        guid,
        note,
        level: engine.disk().path(level).map(Path::to_owned),
        doubt,
        space,
    })
}

/// Nobody finds the file any more by the descriptor. Another one that has its name stays.
fn remove(
    engine: &Engine<HostDisk>,
    bundle: &Bundle,
    level: FileId,
    file: &Path,
) -> Result<Option<Leftover>, ImageError> {
    // Before its name goes.
    let opened = match bundle.folder().open_image(file, true) {
        Ok(opened) if !engine.disk().is_file(level, &opened).unwrap_or(true) => {
            log::warn!(
                "{}: another file has the name of the snapshot's, and stays",
                file.display()
            );
            return Ok(None);
        }
        opened => opened.ok(),
    };
    bundle.folder().remove(file)?;
    let keeps_space = match opened {
        Some(opened) => match engine.disk().is_used_by_others(level) {
            Ok(false) if is_nameless(&opened) => return Ok(Some(Leftover(opened))),
            Ok(false) => "it has another name",
            Ok(true) => "another process uses it",
            Err(_) => "it cannot be found out who uses it",
        },
        None => "it cannot be opened for writing",
    };
    log::info!(
        "{}: the deleted file keeps its space until the disk is closed: {keeps_space}",
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

#[cfg(all(test, not(ploop_loom)))]
mod tests;
