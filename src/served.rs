//! A disk that is being served: engine and bundle together, and what can be done to it
//! meanwhile.
//!
//! Each operation is prepared beside the I/O and then committed. It can be cut off
//! anywhere, and leaves the old or the new state.

pub mod compact;
pub mod delete;
pub mod job;
pub mod snapshot;

use std::error::Error as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::format::{Sector, Version};
use crate::image::{Bundle, ImageError, NewDescriptor};
use crate::ploop::{Engine, EngineError, Outcome};
use crate::storage::Disk;

/// Why a disk did not become larger.
#[derive(Debug, Error)]
pub enum GrowError {
    /// The engine cannot, or the host.
    #[error("the disk keeps its size")]
    Engine(#[from] EngineError),
    /// The descriptor of the bundle cannot be read, is another one by now, or cannot be
    /// replaced.
    #[error("the disk keeps its size")]
    Descriptor(#[source] ImageError),
    /// Something else came first; see [`CallOff`].
    #[error("the disk keeps its size: the resize was cancelled")]
    CalledOff,
}

/// By which a growth, or a snapshot, can be called off from another thread, before it begins
/// or while it is prepared.
#[derive(Debug, Default)]
pub struct CallOff(Mutex<Progress>);

#[derive(Debug, Default)]
struct Progress {
    stage: Stage,
    is_called_off: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    NotBegun,
    /// It is looked whether the disk may become larger.
    Begins,
    /// The engine prepares it, and nobody else does anything.
    Prepares,
    /// It goes through, or fails, in the time that some writes take.
    Commits,
}

impl CallOff {
    /// Calls it off, if that is still possible. Returns at once. `true` if there is nothing
    /// to wait for: it is called off, and nothing is done for it any more but by the engine,
    /// which can be closed. Else [`grow`], or [`snapshot::create`], ends soon.
    pub fn call_off<D: Disk>(&self, engine: &Engine<D>) -> bool {
        self.call_off_with(|| engine.abandon_growth())
    }

    /// The same for who may not have the engine any more, by which a growth is abandoned.
    pub(crate) fn call_off_with(&self, abandon: impl FnOnce()) -> bool {
        let mut progress = self.lock();
        match progress.stage {
            Stage::Commits => return false,
            // Behind what the engine was asked for under this lock.
            Stage::Prepares if !progress.is_called_off => abandon(),
            _ => {}
        }
        progress.is_called_off = true;
        matches!(progress.stage, Stage::NotBegun | Stage::Prepares)
    }

    fn begin(&self) -> Result<(), GrowError> {
        self.go_on_to(Stage::Begins).map(drop)
    }

    fn prepare<D: Disk>(&self, engine: &Engine<D>, size: Sector) -> Result<Outcome, GrowError> {
        let _progress = self.go_on_to(Stage::Prepares)?;
        Ok(engine.begin_growth(size))
    }

    fn commit(&self) -> Result<(), GrowError> {
        self.go_on_to(Stage::Commits).map(drop)
    }

    fn go_on_to(&self, stage: Stage) -> Result<MutexGuard<'_, Progress>, GrowError> {
        let mut progress = self.lock();
        if progress.is_called_off {
            return Err(GrowError::CalledOff);
        }
        progress.stage = stage;
        Ok(progress)
    }

    fn is_called_off(&self) -> bool {
        self.lock().is_called_off
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the disk of at least `size` while it is served: in whole clusters, unless it has
/// that size already. Gives back what the size is then; who has a front-end tells it. Blocks,
/// for long if there is much to move.
///
/// The new descriptor is written, beside the old one, before anything is changed that cannot
/// be taken back. Of an image with a header the header has the last word, so its descriptor
/// follows: a crash in between leaves a disk of the new size, and the next change of the
/// descriptor makes it say so. A raw image has no header: first the file is longer, then its
/// descriptor says so, then it is used.
///
/// # Errors
/// See [`GrowError`]. The disk has its old size then, unless only the last step has
/// failed, which can be tried again.
pub fn grow<D: Disk>(
    engine: &Engine<D>,
    bundle: Option<&mut Bundle>,
    size: Sector,
    call_off: &CallOff,
) -> Result<Sector, GrowError> {
    grow_beside(engine, bundle, size, call_off, Outcome::wait)
}

/// The same for who has something else to do while it is prepared, which takes longest:
/// `wait` waits for that.
pub(crate) fn grow_beside<D: Disk>(
    engine: &Engine<D>,
    mut bundle: Option<&mut Bundle>,
    size: Sector,
    call_off: &CallOff,
    wait: impl FnOnce(&Outcome) -> Result<(), EngineError>,
) -> Result<Sector, GrowError> {
    call_off.begin()?;
    if let Some(bundle) = &mut bundle {
        bundle.refresh().map_err(GrowError::Descriptor)?;
    }
    let size = whole_clusters(engine, size);
    engine.open_for_growth()?;
    let prepared = wait(&call_off.prepare(engine, size)?);
    if prepared.is_err() && call_off.is_called_off() {
        return Err(GrowError::CalledOff);
    }
    prepared?;
    // If it is too late, what was prepared is forgotten already.
    call_off.commit()?;
    let descriptor = match new_descriptor(engine, bundle, size) {
        Ok(descriptor) => descriptor,
        Err(error) => {
            engine.abandon_growth();
            return Err(GrowError::Descriptor(error));
        }
    };
    commit(engine, descriptor)?;
    log::info!("the disk has {} bytes from now on", size.bytes());
    Ok(size)
}

/// The descriptor of the disk of that size, to be [put in place](put_in_place); `None` if there is
/// none, or nothing is new. Since the last look at the old one minutes may have passed. One that
/// says so already, though the disk is not so large, was put there when its folder could not be
/// synced: that is made good by no later sync (I3), but by putting it there once more.
fn new_descriptor<'a, D: Disk>(
    engine: &Engine<D>,
    bundle: Option<&'a mut Bundle>,
    size: Sector,
) -> Result<Option<NewDescriptor<'a>>, ImageError> {
    let Some(bundle) = bundle else {
        return Ok(None);
    };
    if bundle.descriptor().disk_size == size && engine.disk_size() == size {
        return Ok(None);
    }
    let descriptor = bundle.prepare_disk_size(size)?;
    descriptor.require_unchanged()?;
    Ok(Some(descriptor))
}

/// The last step. Until it has succeeded the guest has the old size.
fn commit<D: Disk>(
    engine: &Engine<D>,
    descriptor: Option<NewDescriptor<'_>>,
) -> Result<(), GrowError> {
    let put_descriptor = || descriptor.map_or(Ok(Ok(())), |it| put_in_place(engine, it));
    if let Err(error) = engine.require_lock() {
        engine.abandon_growth();
        return Err(error.into());
    }
    if engine.is_raw() {
        let is_stable = |put: Result<_, _>| put.map_err(GrowError::Descriptor);
        if let Err(error) = put_descriptor().and_then(is_stable) {
            engine.abandon_growth();
            return Err(error);
        }
        engine.commit_growth()?;
    } else {
        engine.commit_growth()?;
        match put_descriptor() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::warn!(
                "the descriptor has the new size of the disk, and may have the old one after a \
                 power cut, though the image has the new one: {error}"
            ),
            // What it says itself is not so here.
            Err(error) => warn_of_old_size(error.source().unwrap_or(&error)),
        }
    }
    Ok(())
}

fn warn_of_old_size(why: &dyn std::error::Error) {
    log::warn!(
        "the descriptor still has the old size of the disk, though the image has the new one: {why}"
    );
}

/// Unless another program has changed the old one. It still can between the two steps: no
/// lock keeps those from it that edit descriptors by hand.
///
/// As [`NewDescriptor::put`].
fn put_in_place<D: Disk>(
    engine: &Engine<D>,
    descriptor: NewDescriptor<'_>,
) -> Result<Result<(), ImageError>, GrowError> {
    descriptor
        .require_unchanged()
        .map_err(GrowError::Descriptor)?;
    // It lies beside the image, and no server refuses a change by who has no lock on that.
    engine.require_lock()?;
    descriptor.put().map_err(GrowError::Descriptor)
}

/// What a disk becomes for which `wanted` was asked.
fn whole_clusters<D: Disk>(engine: &Engine<D>, wanted: Sector) -> Sector {
    // A smaller one is refused, even if it ends in the same cluster.
    if wanted <= engine.disk_size() {
        return wanted;
    }
    let cluster = engine.geometry().cluster;
    let size = cluster.round_up(wanted);
    // What is too large for any disk is refused later.
    if size != wanted && size <= Version::V2.disk_size_max(cluster) {
        log::info!(
            "the size is rounded up to {} bytes, whole clusters of {cluster}",
            size.bytes()
        );
    }
    size
}

#[cfg(all(test, not(ploop_loom)))]
mod tests;
