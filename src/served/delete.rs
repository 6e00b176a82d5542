//! Deleting snapshots of a disk while that is served: one that no other lies on, which just
//! goes, or some that are parts of the next one alone, one right below the other.
//!
//! What the latter have and that one lacks is copied into it, beside the guest and beside
//! whoever reads any of them: into the top by the engine ([`CopyUp`]), into another one by this
//! job alone, as nobody else writes to that (`Lift`). Of the snapshots nothing changes by that,
//! and the image that gets it reads the same at every moment. If the disk that is served lies on
//! it, the engine goes on with the copies ([`Redirect`]). Then nothing needs the snapshots any
//! more, and that is stable: the descriptor is put in place that tells of a disk without them, the
//! folder is synced, and the files are removed. Until then the snapshots are what they were, so it
//! can be given up at any time; whoever opens the disk after a cut finds the old tree or the new
//! one, and both hold the same. Several go all at once, and each cluster is copied once.
//!
//! It goes in no other direction: what is merged down changes what others may be reading, and
//! that has to be no snapshot any more before the first cluster is copied. As much is copied as
//! the snapshots have; into the top it takes no space where host files can share data. So a base
//! that is nearly all of the disk is deleted better with nobody using the disk: then its child is
//! merged into it instead.

mod commit;
mod which;

use std::time::{Duration, Instant};

use self::commit::commit;
pub use self::commit::{Deleted, GoneLevel, Leftover};
pub use self::which::Which;
use self::which::{Going, Levels};
use super::job::{Job, JobError, Progress, Site, Step};
use crate::format::Guid;
use crate::image::{self, Bundle, HostImage, Lift, LiftStep, LiftedImages};
use crate::ploop::{CopyUp, CopyUpStep, Engine, EngineError, Redirect, RedirectStep};
use crate::storage::lock::ImageLock;
use crate::storage::{Disk, FileId, HostDisk};

/// Copies under way, at most: the guest shall notice little of them.
const AT_ONCE: usize = 4;

/// How long a step takes at least, if there is so much to do.
const STEP: Duration = Duration::from_millis(20);

/// For so long a step waits for the copies that it has begun, in all: whoever steers the job is
/// heard between two steps.
const LONGEST_STEP: Duration = Duration::from_millis(500);

/// How long it waits at once for copies.
const PAUSE: Duration = Duration::from_millis(5);

const NO_SPACE: &str = "the host has not enough space for what would be copied: all that is \
    deleted and that the image above it has not; 'ploop-img snapshot delete' copies in the other \
    direction when nobody uses the disk, which can take less";

/// See the module's text.
pub struct Deletion {
    which: Which,
    stage: Stage,
    progress: Progress,
    /// The host has had space for the rest once something was copied. Not before is it known
    /// whether its files can share data.
    is_sure: bool,
    deleted: Option<Deleted>,
}

enum Stage {
    Begin,
    /// Into the top.
    Copying(Range, CopyUp),
    /// Into another one.
    Lifting(Range, Box<Lifting>),
    /// It has all. The disk that is served lies on it.
    Redirecting(Range, Box<Lifting>, Redirect),
    Done,
}

/// Snapshots that are to go, one right below the other, base first, and the one that stays.
struct Range {
    guids: Vec<Guid>,
    to: Guid,
}

struct Lifting {
    lift: Lift<HostImage>,
    /// The lowest that is to go and the one that stays, if the disk that is served lies on them.
    levels: Option<(FileId, FileId)>,
    /// Dropped last.
    _locks: Vec<ImageLock>,
}

impl Deletion {
    /// Of these snapshots. Nothing is looked at before the first step.
    pub fn new(which: Which) -> Self {
        Self {
            which,
            stage: Stage::Begin,
            progress: Progress::default(),
            is_sure: false,
            deleted: None,
        }
    }

    fn begin(&mut self, site: &mut Site<'_, HostDisk>) -> Result<Step, JobError> {
        let engine = site.engine;
        let bundle = bundle_of(site.bundle.as_deref_mut())?;
        bundle.refresh()?;
        // Nor may the descriptor be replaced by who may have lost the disk since the last look.
        if !engine.disk().can_retire() {
            return Err(JobError::Impossible(
                "a server may take the lock of the disk away, and a file that is deleted would \
                 look like that; 'ploop-img snapshot delete' deletes it when nobody uses the disk",
            ));
        }
        let range = match self.which.find(bundle)? {
            Going::Leaf(guid) => {
                self.deleted = Some(delete_leaf(bundle, guid)?);
                return Ok(Step::Done);
            }
            Going::Parts { guids, .. } if guids.is_empty() => return Ok(Step::Done),
            Going::Parts { guids, to } => Range { guids, to },
        };
        engine.open_for_growth()?;
        let levels = Levels::of(engine, bundle)?;
        self.stage = match range.to == bundle.descriptor().top() {
            true => begin_copying(engine, &levels, range)?,
            false => begin_lifting(bundle, &levels, range)?,
        };
        self.look_at_progress(engine);
        if !has_space(engine, &mut self.stage) {
            return Err(JobError::Impossible(NO_SPACE));
        }
        Ok(Step::More { bytes: 0 })
    }

    fn look_at_progress(&mut self, engine: &Engine<HostDisk>) {
        let (done, total) = match &self.stage {
            Stage::Copying(_, copies) => copies.progress(),
            Stage::Lifting(_, it) | Stage::Redirecting(_, it, _) => it.lift.progress(),
            Stage::Begin | Stage::Done => return,
        };
        let cluster = cluster_of(engine);
        self.progress = Progress {
            done: done * cluster,
            total: total * cluster,
        };
    }

    fn go_on(&mut self, site: &mut Site<'_, HostDisk>) -> Result<Step, JobError> {
        let engine = site.engine;
        let is_full = self.is_sure && !has_space(engine, &mut self.stage);
        self.look_at_progress(engine);
        if is_full {
            // What is left is the guest's.
            return Ok(Step::HostFull);
        }
        let before = self.progress.done;
        let (stage, step) = match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Copying(range, copies) => {
                let limit = if self.is_sure { limit_of(site) } else { 1 };
                copy(site, range, copies, limit)?
            }
            Stage::Lifting(range, it) => lift(site, range, it)?,
            Stage::Redirecting(range, it, redirect) => self::redirect(site, range, it, redirect)?,
            Stage::Begin | Stage::Done => return Ok(Step::Done),
        };
        match stage {
            Next::Stage(stage) => self.stage = stage,
            Next::Deleted(deleted) => {
                self.progress.done = self.progress.total;
                self.deleted = Some(*deleted);
                return Ok(Step::Done);
            }
        }
        self.look_at_progress(engine);
        if !self.is_sure && !has_space(engine, &mut self.stage) {
            self.cancel(site);
            return Err(JobError::Impossible(NO_SPACE));
        }
        self.is_sure |= self.progress.done > 0;
        Ok(step.unwrap_or(Step::More {
            bytes: self.progress.done.saturating_sub(before),
        }))
    }
}

/// What a step has led to.
enum Next {
    Stage(Stage),
    Deleted(Box<Deleted>),
}

/// That, and why nothing more was done, if there is a reason.
type Gone = Result<(Next, Option<Step>), JobError>;

fn begin_copying(
    engine: &Engine<HostDisk>,
    levels: &Levels,
    range: Range,
) -> Result<Stage, JobError> {
    let lowest = range.guids.first().and_then(|guid| levels.file(*guid));
    let copies = CopyUp::new(engine, lowest)?;
    require_nothing_hidden(engine, &copies)?;
    Ok(Stage::Copying(range, copies))
}

fn begin_lifting(bundle: &Bundle, levels: &Levels, range: Range) -> Result<Stage, JobError> {
    let images = LiftedImages::open(bundle, &range.guids, range.to)?;
    let (lift, locks) = images.lift()?;
    let lowest = range.guids.first().and_then(|guid| levels.file(*guid));
    let lifting = Box::new(Lifting {
        lift,
        levels: lowest.zip(levels.file(range.to)),
        _locks: locks,
    });
    Ok(Stage::Lifting(range, lifting))
}

/// So many clusters, at most.
fn copy(site: &mut Site<'_, HostDisk>, range: Range, mut copies: CopyUp, limit: u64) -> Gone {
    let engine = site.engine;
    let start = Instant::now();
    let (before, _) = copies.progress();
    let was_looking = copies.is_looking();
    let refusal = loop {
        if was_looking && !copies.is_looking() {
            // Whether there is space for it comes first.
            break None;
        }
        let left = limit.saturating_sub(copies.progress().0 - before);
        let took = start.elapsed();
        let begins = left > 0 && took < STEP;
        // The rest that follows is the guest's alone, and is as long as the step took.
        if !begins && (copies.under_way() == 0 || took >= LONGEST_STEP) {
            break None;
        }
        // Those that end now are not begun anew.
        let at_once = usize::try_from(left).map_or(AT_ONCE, |left| {
            left.saturating_sub(copies.under_way()).min(AT_ONCE)
        });
        let at_once = if begins { at_once } else { 0 };
        match copies.step(engine, at_once) {
            Ok(CopyUpStep::On) => {}
            Ok(CopyUpStep::Waits) => copies.wait(PAUSE),
            Ok(CopyUpStep::Full) => break Some(Step::HostFull),
            // Requests are held: what was begun for it begins anew.
            Ok(CopyUpStep::Held) | Err(EngineError::Suspended) => break Some(Step::Later),
            Ok(CopyUpStep::Ready) => {
                let levels = Some(copies.into_levels());
                let deleted = commit(site, (&range.guids, range.to), levels)?;
                return Ok((Next::Deleted(Box::new(deleted)), None));
            }
            Err(error) => return Err(error.into()),
        }
    };
    Ok((Next::Stage(Stage::Copying(range, copies)), refusal))
}

fn lift(site: &mut Site<'_, HostDisk>, range: Range, mut it: Box<Lifting>) -> Gone {
    let end = Instant::now() + STEP;
    let limit = limit_of(site);
    let (before, _) = it.lift.progress();
    let refusal = loop {
        match it.lift.step()? {
            LiftStep::More => {}
            LiftStep::Full => break Some(Step::HostFull),
            LiftStep::Done => {
                let Some((lowest, to)) = it.levels else {
                    // Or else they would count as somebody who uses the files.
                    drop(it);
                    let deleted = commit(site, (&range.guids, range.to), None)?;
                    return Ok((Next::Deleted(Box::new(deleted)), None));
                };
                let redirect = Redirect::new(lowest, to);
                let stage = Stage::Redirecting(range, it, redirect);
                return Ok((Next::Stage(stage), None));
            }
        }
        if Instant::now() >= end || it.lift.progress().0 - before >= limit {
            break None;
        }
    };
    Ok((Next::Stage(Stage::Lifting(range, it)), refusal))
}

fn redirect(
    site: &mut Site<'_, HostDisk>,
    range: Range,
    it: Box<Lifting>,
    mut redirect: Redirect,
) -> Gone {
    let engine = site.engine;
    let end = Instant::now() + STEP;
    while Instant::now() < end {
        match redirect.step(engine, |guest| it.lift.place(guest)) {
            Ok(RedirectStep::On) => {}
            Ok(RedirectStep::Waits) => redirect.wait(PAUSE),
            Ok(RedirectStep::Ready) => {
                drop(it);
                let levels = Some(redirect.into_levels());
                let deleted = commit(site, (&range.guids, range.to), levels)?;
                return Ok((Next::Deleted(Box::new(deleted)), None));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok((Next::Stage(Stage::Redirecting(range, it, redirect)), None))
}

impl Job<HostDisk> for Deletion {
    fn step(&mut self, site: &mut Site<'_, HostDisk>) -> Result<Step, JobError> {
        match self.stage {
            Stage::Begin => {
                self.stage = Stage::Done;
                self.begin(site)
            }
            _ => self.go_on(site),
        }
    }

    fn progress(&self) -> Progress {
        self.progress
    }

    /// The snapshots stay. What was copied is found in both files, which takes space until they
    /// are deleted.
    fn cancel(&mut self, _: &mut Site<'_, HostDisk>) {
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Copying(_, copies) => copies.give_up(),
            Stage::Lifting(_, mut it) => {
                if let Err(error) = it.lift.close() {
                    log::warn!("a snapshot could not be closed: {error}");
                }
            }
            Stage::Redirecting(..) | Stage::Begin | Stage::Done => {}
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

/// How many clusters a step should copy at most.
fn limit_of(site: &Site<'_, HostDisk>) -> u64 {
    (site.at_most / cluster_of(site.engine)).max(1)
}

/// Whether the host has so much space as what is left to be copied takes.
fn has_space(engine: &Engine<HostDisk>, stage: &mut Stage) -> bool {
    let (done, total) = match stage {
        Stage::Copying(_, copies) if copies.is_looking() || engine.may_share_clusters() => {
            return true;
        }
        Stage::Copying(_, copies) => copies.progress(),
        Stage::Lifting(_, it) => it.lift.progress(),
        Stage::Redirecting(..) | Stage::Begin | Stage::Done => return true,
    };
    let has_space_for = |clusters: u64| {
        let free = engine.disk().free_space();
        free.is_ok_and(|free| free >= clusters * cluster_of(engine))
    };
    match stage {
        _ if has_space_for(total - done) => true,
        // The guest has copied some of them, perhaps, and that has taken its space.
        Stage::Copying(_, copies) => has_space_for(copies.count_left(engine)),
        _ => false,
    }
}

/// One that nothing lies on: nothing has to be copied.
fn delete_leaf(bundle: &mut Bundle, guid: Guid) -> Result<Deleted, JobError> {
    let note = image::note_of(bundle, guid);
    let doubt = image::remove_leaf_beside(bundle, guid)?.err();
    log::info!("deleted the snapshot {guid}");
    Ok(Deleted {
        snapshots: vec![(guid, note)],
        levels: Vec::new(),
        doubt,
        space: Vec::new(),
    })
}

/// That the levels hide nothing that is behind the end of a raw image below them: how much of such
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

#[cfg(all(test, not(ploop_loom)))]
mod tests;
