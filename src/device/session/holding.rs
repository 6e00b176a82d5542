//! What a session does about an image that is open only while a ring runs.

use std::error::Error as _;

use super::{Refusal, Session, has_logging};
use crate::device::image::{Haste, HoldError};
use crate::device::ring::Ring;
use crate::format::Sector;
use crate::storage::Disk;

/// The size of the disk, in sectors, as the front-end knows it.
#[derive(Debug, Default)]
pub(super) struct KnownSize {
    /// That it has read.
    pub read: Option<Sector>,
    /// At which it was told to read it.
    pub told: Option<Sector>,
}

impl<D: Disk> Session<D> {
    /// Before a ring runs: has the image opened, if it is not, and looks at what it is by now.
    pub(super) fn hold_image(&mut self) -> Result<(), Refusal> {
        if self.device.engine().is_some() {
            return Ok(());
        }
        self.device.image().hold()?;
        self.device.check_blocks()?;
        let now = self.device.disk_size();
        // Of a larger one it is told when the ring runs, if it can be.
        if let Some(read) = self.known_size.read.filter(|read| *read > now) {
            return Err(Refusal::Smaller {
                read: read.bytes(),
                now: now.bytes(),
            });
        }
        if let Some(cache_is_on) = self.continuity.image_opened()? {
            self.write_cache.remembered(cache_is_on);
        }
        Ok(())
    }

    /// When no ring runs: has the image closed, if it is open only for them. `true` if it was
    /// open, and has everything.
    pub(super) fn release_image(&mut self, haste: Haste) -> bool {
        // What goes wrong there is said there.
        let is_closed = self.device.image().release(haste).unwrap_or(false);
        if is_closed {
            self.continuity.image_closed();
        }
        is_closed
    }

    /// After a ring that ran has stopped: the front-end may give up its region without a word
    /// when none runs any more.
    pub(super) fn ring_stopped(&mut self) {
        if self.rings.iter().any(Ring::is_running) {
            return;
        }
        // While written memory is marked, another host gets what is written.
        let haste = match has_logging(self.acked_features) {
            true => Haste::Guest,
            false => Haste::Nobody,
        };
        if !self.release_image(haste) && self.continuity.is_kept() {
            self.continuity.settle();
        }
        // What it was told before may not have been heard.
        self.known_size.told = None;
    }
}

/// What went wrong, and why.
pub(super) fn with_causes(error: &HoldError) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    let causes: String = causes.map(|cause| format!(": {cause}")).collect();
    format!("{error}{causes}")
}
