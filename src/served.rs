//! A disk that is being served: engine, bundle and front-end together, and what can be
//! done to it meanwhile.
//!
//! Each operation is prepared beside the I/O and then committed. It can be cut off
//! anywhere, and leaves the old or the new state.

use thiserror::Error;

use crate::device::Connection;
use crate::format::Sector;
use crate::image::{Bundle, ImageError};
use crate::ploop::{Engine, EngineError};
use crate::storage::Disk;

/// Why a disk did not become larger.
#[derive(Debug, Error)]
pub enum GrowError {
    /// The engine cannot, or the host.
    #[error("the disk keeps its size")]
    Engine(#[from] EngineError),
    /// A raw image is as large as the descriptor of its bundle says.
    #[error("the disk keeps its size: its descriptor cannot be written")]
    Descriptor(#[source] ImageError),
}

/// Makes the disk of at least `size` while it is served: in whole clusters. The front-end,
/// if there is one, is told of it. Gives back what the size is then. Blocks, for long if
/// there is much to move.
///
/// Of an image with a header the header has the last word, so its descriptor follows: a
/// crash in between leaves a disk of the new size, and the next change of the descriptor
/// makes it say so. A raw image has no header: first the file is longer, then its
/// descriptor says so, then it is used.
///
/// # Errors
/// See [`GrowError`]. The disk has its old size then, unless only the last step has
/// failed, which can be tried again.
pub fn grow<D: Disk>(
    engine: &Engine<D>,
    bundle: Option<&mut Bundle>,
    front_end: Option<&Connection>,
    size: Sector,
) -> Result<Sector, GrowError> {
    let cluster = engine.geometry().cluster;
    let size = match size == engine.disk_size() {
        true => size,
        false => cluster.round_up(size),
    };
    engine.prepare_growth(size)?;
    if engine.is_raw() {
        if let Some(bundle) = bundle
            && let Err(error) = bundle.set_disk_size(size)
        {
            engine.abandon_growth();
            return Err(GrowError::Descriptor(error));
        }
        engine.commit_growth()?;
    } else {
        engine.commit_growth()?;
        if let Some(bundle) = bundle
            && let Err(error) = bundle.set_disk_size(size)
        {
            log::warn!(
                "the descriptor still has the old size of the disk, though the image has the \
                 new one: {error}"
            );
        }
    }
    log::info!("the disk has {} bytes from now on", size.bytes());
    if let Some(front_end) = front_end {
        front_end.config_changed();
    }
    Ok(size)
}
