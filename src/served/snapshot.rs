//! A snapshot of a disk that is being served.
//!
//! The new top is made beside the I/O, with the descriptor that is going to name it, and both
//! are made stable. Then requests are held: what has completed is made stable in the old top,
//! which is closed; the descriptor is put in place, and that is made stable; the engine goes
//! on with the new top. So the snapshot is what was acknowledged at one moment, and whoever
//! opens the disk after a cut finds the old chain, or the new one with an empty top: both hold
//! the same.

use thiserror::Error;

use super::{CallOff, GrowError};
use crate::format::{Geometry, Guid, Header};
use crate::image::{Bundle, ImageError, NewDelta, NewDescriptor, NewSnapshot};
use crate::ploop::{BitmapAction, BitmapError, Engine, EngineError};
use crate::storage::lock::ImageLock;
use crate::storage::{Disk, HostDisk, HostFile, NewTop};

/// Why no snapshot was made.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The engine cannot, or the host.
    #[error("no snapshot was made")]
    Engine(#[from] EngineError),
    /// What is to be done to dirty bitmaps at its moment cannot be done.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// The new top cannot be made, or the descriptor of the bundle not be read or replaced.
    #[error("no snapshot was made")]
    Image(#[source] ImageError),
    /// The new top cannot be used beside the other files.
    #[error("no snapshot was made: the new image file cannot be used")]
    NewTop(#[source] std::io::Error),
    /// Something else came first; see [`CallOff`].
    #[error("no snapshot was made: it was called off")]
    CalledOff,
    /// It was made, and may be gone after a power cut. Like after any failed sync nothing
    /// becomes stable any more until the image is opened again.
    #[error("the snapshot {} was made, but that could not be made stable", created.guid)]
    Unstable {
        /// The caller has to know of the new top all the same.
        created: Box<Created>,
        /// What the kernel said.
        source: ImageError,
    },
}

/// A snapshot that was made, and what has become the top by it.
#[derive(Debug)]
pub struct Created {
    /// Its name.
    pub guid: Guid,
    /// The new top, open for writing: the same description as the engine's, to which the
    /// locks belong.
    pub top: HostFile,
    /// Its lock, until this is dropped: as long as the disk is served. Who has the lock of
    /// the old top calls [`ImageLock::stop_writing`] on it.
    pub lock: ImageLock,
}

/// Makes a snapshot of the disk while it is served: what the guest was told is written is in
/// it, what it asks for from then on is not. Blocks; requests are held for the last part of
/// that, for as long as two or three syncs of the image and its folder take. To be called by
/// one thread, which makes all changes of the bundle. The caller replaces what it knows of the
/// files: those that are [watched](HostDisk::watch), locked, given to another process.
///
/// `bitmaps` is done to the dirty bitmaps of the disk at the moment of which the snapshot is: one
/// that is cleared then has what was changed since.
///
/// `call_off` calls it off until requests are held.
///
/// # Errors
/// See [`SnapshotError`]. The disk is what it was, unless the last says otherwise, and no
/// request has failed.
pub fn create(
    engine: &Engine<HostDisk>,
    bundle: &mut Bundle,
    (new, bitmaps): (&NewSnapshot, &[BitmapAction]),
    call_off: &CallOff,
) -> Result<Created, SnapshotError> {
    begin(call_off)?;
    engine.check_bitmaps(bitmaps)?;
    bundle.refresh().map_err(SnapshotError::Image)?;
    engine.open_for_snapshot()?;
    let header = engine.header_on_top()?;
    let guid = new.guid.unwrap_or_else(Guid::random);
    let delta = engine
        .disk()
        .with_top(|top, path| NewDelta::above(bundle, (top, path), &header, guid, new))
        .map_err(SnapshotError::Image)?;
    let named = (guid, bitmaps);
    let created = create_above(engine, bundle, (&delta, header), named, call_off);
    if created.is_err() && bundle.descriptor() != delta.descriptor() {
        // Nothing names it.
        delta.remove(bundle);
    }
    let created = created?;
    log::info!("made the snapshot {guid}");
    Ok(created)
}

/// The delta is there, and nothing names it.
fn create_above(
    engine: &Engine<HostDisk>,
    bundle: &mut Bundle,
    (delta, header): (&NewDelta, Header),
    (guid, bitmaps): (Guid, &[BitmapAction]),
    call_off: &CallOff,
) -> Result<Created, SnapshotError> {
    let (file, lock) = delta.open(bundle).map_err(SnapshotError::Image)?;
    let top = HostFile {
        file: file.file.try_clone().map_err(SnapshotError::NewTop)?,
        path: file.path.clone(),
        writable: true,
    };
    let new_top = prepare_top(engine, file, header.geometry())?;
    let descriptor = bundle
        .prepare(delta.descriptor().clone())
        .and_then(|descriptor| {
            descriptor.require_unchanged()?;
            Ok(descriptor)
        })
        .map_err(SnapshotError::Image)?;
    // Once more: less is left to be made stable while requests are held.
    engine.settle()?;
    commit(call_off)?;
    let hold = Hold::begin(engine)?;
    let named = name(descriptor)?;
    if !bitmaps.is_empty()
        && let Err(error) = engine.change_bitmaps_now(bitmaps)
    {
        // It was possible before, and nobody else changes any.
        log::error!("the dirty bitmaps are not what was asked for: {error}");
    }
    hold.switch(new_top, header, named.is_ok())?;
    let created = Created { guid, top, lock };
    match named {
        Ok(()) => Ok(created),
        Err(source) => Err(SnapshotError::Unstable {
            created: Box::new(created),
            source,
        }),
    }
}

fn prepare_top(
    engine: &Engine<HostDisk>,
    file: HostFile,
    geometry: &Geometry,
) -> Result<NewTop, SnapshotError> {
    let disk = engine.disk();
    let prepared = disk.prepare(file, engine.alignment_for(geometry));
    prepared
        .and_then(|top| {
            // No mapping shall fail for want of space.
            top.allocate(0, geometry.data_start)?;
            Ok(top)
        })
        .map_err(SnapshotError::NewTop)
}

/// The last moment in which nothing has happened, if it fails. Unless another program has
/// changed the descriptor, which no lock keeps from it.
fn name(descriptor: NewDescriptor<'_>) -> Result<Result<(), ImageError>, SnapshotError> {
    descriptor
        .require_unchanged()
        .and_then(|()| descriptor.put())
        .map_err(SnapshotError::Image)
}

/// Requests are held. Dropped, the old top is used on.
struct Hold<'a, D: Disk> {
    engine: &'a Engine<D>,
    is_over: bool,
}

impl<'a, D: Disk> Hold<'a, D> {
    fn begin(engine: &'a Engine<D>) -> Result<Self, EngineError> {
        engine.close_top().wait()?;
        let is_over = false;
        Ok(Self { engine, is_over })
    }
}

impl Hold<'_, HostDisk> {
    fn switch(mut self, top: NewTop, header: Header, is_stable: bool) -> Result<(), SnapshotError> {
        self.engine.disk().add(top).map_err(SnapshotError::NewTop)?;
        self.is_over = true;
        Ok(self.engine.switch_top(header, is_stable).wait()?)
    }
}

impl<D: Disk> Drop for Hold<'_, D> {
    fn drop(&mut self) {
        if !self.is_over
            && let Err(error) = self.engine.keep_top().wait()
        {
            log::error!("the image that is used on could not be marked: {error}");
        }
    }
}

fn begin(call_off: &CallOff) -> Result<(), SnapshotError> {
    call_off.begin().map_err(called_off)
}

fn commit(call_off: &CallOff) -> Result<(), SnapshotError> {
    call_off.commit().map_err(called_off)
}

fn called_off(_: GrowError) -> SnapshotError {
    SnapshotError::CalledOff
}

#[cfg(all(test, not(ploop_loom)))]
pub(super) mod tests;
