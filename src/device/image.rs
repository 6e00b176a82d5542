//! The image behind the disk, which is open as long as the device lives, or only while a
//! ring runs.
//!
//! In the second case somebody else, a [`Holder`], opens it when the first ring is to run,
//! and closes it when the last one has stopped. Another host may have changed it meanwhile.
//! All that is known of it then is what it was like last. Only the thread of the messages,
//! of which there is one at a time, has it opened and closed.

use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;
use thiserror::Error;

use crate::format::Sector;
use crate::ploop::{Engine, EngineError, LeftMemory, Shape};
use crate::storage::Disk;

/// Why an image cannot be opened.
#[derive(Debug, Error)]
#[error(transparent)]
pub struct HoldError(#[from] Box<dyn Error + Send + Sync>);

/// Whether somebody waits for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    /// A guest that is being migrated stands still until another host has the image: what can
    /// be left to that one is.
    Guest,
    /// Nobody in particular.
    Nobody,
}

/// Opens an image for a device, and closes it.
pub trait Holder<D: Disk>: Send + Sync {
    /// Locks the image, reads it anew, and opens it.
    ///
    /// # Errors
    /// Somebody else has it, or it cannot be opened; it is not locked then.
    fn hold(&self) -> Result<Arc<Engine<D>>, HoldError>;

    /// Makes all of the image stable, marks it as closed, closes and unlocks it.
    ///
    /// # Errors
    /// Not everything could be made stable, the mark included: it is held on, as it was.
    fn release(&self, haste: Haste) -> Result<(), EngineError>;
}

/// See the module's text.
pub(super) struct Image<D: Disk> {
    /// While the image is open.
    engine: ArcSwapOption<Engine<D>>,
    /// What it was like last, while it is not.
    shape: Mutex<Shape>,
    holder: Option<Arc<dyn Holder<D>>>,
    /// In which the engine before has remembered.
    left: Mutex<Option<LeftMemory>>,
}

impl<D: Disk> Image<D> {
    /// One that is open.
    pub fn open(engine: Arc<Engine<D>>) -> Self {
        Self {
            shape: Mutex::new(engine.shape()),
            engine: ArcSwapOption::new(Some(engine)),
            holder: None,
            left: Mutex::default(),
        }
    }

    /// One that is opened when it is needed; `shape` is what it is like now.
    pub fn held_by(holder: Arc<dyn Holder<D>>, shape: Shape) -> Self {
        Self {
            engine: ArcSwapOption::empty(),
            shape: Mutex::new(shape),
            holder: Some(holder),
            left: Mutex::default(),
        }
    }

    pub fn engine(&self) -> Option<Arc<Engine<D>>> {
        self.engine.load_full()
    }

    /// As it is now, or was last.
    pub fn shape(&self) -> Shape {
        match &*self.engine.load() {
            Some(engine) => engine.shape(),
            None => self.lock_shape().clone(),
        }
    }

    pub fn disk_size(&self) -> Sector {
        match &*self.engine.load() {
            Some(engine) => engine.disk_size(),
            None => self.lock_shape().disk_size(),
        }
    }

    pub fn is_read_only(&self) -> bool {
        match &*self.engine.load() {
            Some(engine) => engine.is_read_only(),
            None => self.lock_shape().is_read_only(),
        }
    }

    /// Has it opened, unless it is open.
    pub fn hold(&self) -> Result<(), HoldError> {
        let (None, Some(holder)) = (&*self.engine.load(), &self.holder) else {
            return Ok(());
        };
        let engine = holder.hold()?;
        *self.lock_shape() = engine.shape();
        self.engine.store(Some(engine));
        Ok(())
    }

    /// Has it closed, if it is open only while a ring runs. `true` if it was open and is not
    /// any more.
    ///
    /// # Errors
    /// As [`Holder::release`].
    pub fn release(&self, haste: Haste) -> Result<bool, EngineError> {
        let (Some(engine), Some(holder)) = (self.engine(), &self.holder) else {
            return Ok(false);
        };
        *self.lock_shape() = engine.shape();
        // First, so that nobody begins to do anything with it.
        self.engine.store(None);
        match holder.release(haste) {
            Ok(()) => {
                *self.lock_left() = engine.leave_memory();
                Ok(true)
            }
            Err(error) => {
                self.engine.store(Some(engine));
                Err(error)
            }
        }
    }

    /// A guest is about to be served, for whom memory that came back has been looked at: of
    /// the memory before, if it is another, nothing counts any more.
    pub fn forget_left_memory(&self) {
        if let (Some(engine), Some(left)) = (self.engine(), self.lock_left().take()) {
            left.strike_out_unless_of(&engine);
        }
    }

    fn lock_shape(&self) -> MutexGuard<'_, Shape> {
        self.shape.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_left(&self) -> MutexGuard<'_, Option<LeftMemory>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
