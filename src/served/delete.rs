//! Deleting the snapshot on which the top of a disk lies, while that is served.
//!
//! What the snapshot has and the top lacks is copied into the top beside the guest, which
//! changes nothing of the snapshot ([`CopyUp`]). Then the disk needs it no more, and that is
//! stable: the descriptor is put in place that tells of a chain without it, the folder is
//! synced, and the file is removed. Until then the snapshot is what it was, so it can be given
//! up at any time; whoever opens the disk after a cut finds the old chain or the new one, and
//! both hold the same.
//!
//! As much is copied as the snapshot has, where host files cannot share data. So a base that
//! is nearly all of the disk is deleted better with nobody using the disk: then its child is
//! merged into it instead.

use std::time::{Duration, Instant};

use super::job::{Job, JobError, Progress, Site, Step};
use crate::format::{Descriptor, Guid};
use crate::image::{Bundle, ImageError};
use crate::ploop::{CopyUp, CopyUpStep, Engine};
use crate::storage::{Disk, FileId, HostDisk};

/// Copies under way, at most: the guest shall notice little of them.
const AT_ONCE: usize = 4;

/// How long a step takes at least, if there is so much to do.
const STEP: Duration = Duration::from_millis(20);

/// How long it waits at once for copies.
const PAUSE: Duration = Duration::from_millis(5);

/// See the module's text.
pub struct Deletion {
    guid: Guid,
    stage: Stage,
    progress: Progress,
}

enum Stage {
    Begin,
    Copying(CopyUp),
    Done,
}

impl Deletion {
    /// Of this snapshot. Nothing is looked at before the first step.
    pub fn new(guid: Guid) -> Self {
        Self {
            guid,
            stage: Stage::Begin,
            progress: Progress::default(),
        }
    }

    fn begin(&mut self, site: &mut Site<'_, HostDisk>) -> Result<Step, JobError> {
        let engine = site.engine;
        let bundle = bundle_of(site.bundle.as_deref_mut())?;
        bundle.refresh()?;
        bundle.without_parent_of_top(self.guid)?;
        engine.open_for_growth()?;
        if !engine.disk().can_retire() {
            return Err(JobError::Impossible(
                "a server may take the lock of the disk away, and a file that is deleted would \
                 look like that",
            ));
        }
        let copies = CopyUp::new(engine)?;
        require_same(engine, bundle, copies.level(), self.guid)?;
        let (_, clusters) = copies.progress();
        self.progress.total = clusters * cluster_of(engine);
        let is_shared = engine.disk().clone_unit().is_some();
        if !is_shared
            && engine
                .disk()
                .free_space()
                .is_ok_and(|free| free < self.progress.total)
        {
            return Err(JobError::Impossible(
                "the host has not enough space for what the snapshot has and the disk has not",
            ));
        }
        self.stage = Stage::Copying(copies);
        Ok(Step::More { bytes: 0 })
    }

    fn copy(
        &mut self,
        site: &mut Site<'_, HostDisk>,
        mut copies: CopyUp,
    ) -> Result<Step, JobError> {
        let engine = site.engine;
        let (before, _) = copies.progress();
        let end = Instant::now() + STEP;
        let mut is_full = false;
        loop {
            match copies.step(engine, AT_ONCE)? {
                CopyUpStep::On => {}
                CopyUpStep::Waits => copies.wait(PAUSE),
                CopyUpStep::Full => {
                    is_full = true;
                    break;
                }
                CopyUpStep::Held => {
                    std::thread::sleep(PAUSE);
                    break;
                }
                CopyUpStep::Ready => {
                    self.progress.done = self.progress.total;
                    commit(site, copies, self.guid)?;
                    return Ok(Step::Done);
                }
            }
            if Instant::now() >= end {
                break;
            }
        }
        let (now, total) = copies.progress();
        let cluster = cluster_of(engine);
        self.progress = Progress {
            done: now * cluster,
            total: total * cluster,
        };
        self.stage = Stage::Copying(copies);
        Ok(match is_full {
            true => Step::HostFull,
            false => Step::More {
                bytes: (now - before) * cluster,
            },
        })
    }
}

impl Job<HostDisk> for Deletion {
    fn step(&mut self, site: &mut Site<'_, HostDisk>) -> Result<Step, JobError> {
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Begin => self.begin(site),
            Stage::Copying(copies) => self.copy(site, copies),
            Stage::Done => Ok(Step::Done),
        }
    }

    fn progress(&self) -> Progress {
        self.progress
    }

    /// The snapshot stays. What was copied is found in both files, which takes space until the
    /// snapshot is deleted.
    fn cancel(&mut self, _: &mut Site<'_, HostDisk>) {
        if let Stage::Copying(copies) = std::mem::replace(&mut self.stage, Stage::Done) {
            copies.give_up();
        }
    }
}

fn bundle_of(bundle: Option<&mut Bundle>) -> Result<&mut Bundle, JobError> {
    bundle.ok_or(JobError::Impossible("a bare image has no snapshots"))
}

fn cluster_of(engine: &Engine<HostDisk>) -> u64 {
    engine.geometry().cluster.bytes()
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

/// Nothing needs the snapshot any more.
fn commit(site: &mut Site<'_, HostDisk>, copies: CopyUp, guid: Guid) -> Result<(), JobError> {
    let engine = site.engine;
    let bundle = bundle_of(site.bundle.as_deref_mut())?;
    bundle.refresh()?;
    let level = copies.level();
    require_same(engine, bundle, level, guid)?;
    let file = bundle
        .descriptor()
        .image(guid)
        .map(|image| image.file.clone());
    let without = bundle.without_parent_of_top(guid)?;
    let is_stable = put(bundle, without)?;
    // Nobody finds the snapshot any more, and everybody a chain without it.
    copies.end(engine);
    engine.disk().retire(level);
    is_stable?;
    if let Some(file) = file {
        // Before its name goes.
        let opened = bundle.folder().open_image(&file, true);
        bundle.folder().remove(&file)?;
        let is_used = engine.disk().is_used_by_others(level);
        if let Ok(opened) = opened
            && matches!(is_used, Ok(false))
            && let Err(error) = crate::storage::empty_nameless(&opened)
        {
            log::warn!(
                "the space of a deleted snapshot comes back when the disk is closed: {error}"
            );
        }
    }
    log::info!("deleted the snapshot {guid}");
    Ok(())
}

/// Puts the descriptor in place; what comes back says whether that is stable.
fn put(bundle: &mut Bundle, descriptor: Descriptor) -> Result<Result<(), ImageError>, ImageError> {
    let new = bundle.prepare(descriptor)?;
    new.require_unchanged()?;
    new.put()
}

#[cfg(all(test, not(ploop_loom)))]
mod tests;
