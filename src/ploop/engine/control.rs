//! What the control thread asks of the whole disk, and how it gets its answer.
//!
//! All of it is done by the metadata thread; here it is asked.

use std::sync::{MutexGuard, PoisonError};

use super::super::EngineError;
use super::super::control::{Control, Outcome};
use super::super::preempt;
use super::super::sync::atomic::{Ordering, fence};
use super::message::MdMessage;
use super::{Engine, before_end};
use crate::format::{Header, InUse, Sector};
use crate::storage::Disk;

impl<D: Disk> Engine<D> {
    /// Write-through on: every request that changes the disk is stable when it
    /// completes; turning it on makes what completed before stable first. Blocks
    /// until no request of the old mode is left; for the control thread.
    ///
    /// # Errors
    /// What went wrong with that flush; the mode is on all the same.
    pub fn set_write_through(&self, on: bool) -> Result<(), EngineError> {
        let flush = self.begin_write_through(on);
        flush.map_or(Ok(()), |outcome| outcome.wait())
    }

    /// The same without blocking. If there has to be a flush, its end will be told
    /// in the result.
    pub(crate) fn begin_write_through(&self, on: bool) -> Option<Outcome> {
        if on == self.is_write_through() {
            return None;
        }
        if on && !self.options.read_only {
            // First: who sees the new mode knows that its barrier is not over.
            self.barriers.fetch_add(1, Ordering::AcqRel);
        }
        preempt::point("barrier opened");
        let before = match on {
            true => self
                .before_end
                .fetch_or(before_end::STABLE, Ordering::AcqRel),
            false => self
                .before_end
                .fetch_and(!before_end::STABLE, Ordering::AcqRel),
        };
        let before = before & before_end::STABLE != 0;
        if on && !self.options.read_only {
            // Last: a round that starts before this may miss what ends in the old mode.
            self.barriers_up.fetch_add(1, Ordering::AcqRel);
        }
        let needs_flush = on && !before && !self.options.read_only;
        needs_flush.then(|| self.control(Control::Barrier))
    }

    /// Holds new requests, waits for those under way (parked ones stay parked)
    /// and makes everything stable. Blocks; for the control thread.
    ///
    /// # Errors
    /// What went wrong with the flush; the engine is suspended all the same.
    pub fn suspend(&self) -> Result<(), EngineError> {
        self.control(Control::Suspend).wait()
    }

    /// Takes requests again, those held since [`Self::suspend`] first.
    pub fn resume(&self) {
        drop(self.control(Control::Resume));
    }

    /// Makes the disk larger while it is in use: all that takes, but the guest sees the
    /// old size until [`Self::commit_growth`]. Blocks, and for long if there is much to
    /// move; only one growth is under way at a time. Nothing is given up by it: without a
    /// commit the disk stays as large as it is.
    ///
    /// # Errors
    /// A size that the disk cannot have; a host that has no space; I/O errors. The disk
    /// is as it was then, though clusters may have moved.
    pub fn prepare_growth(&self, size: Sector) -> Result<(), EngineError> {
        self.open_for_growth()?;
        self.begin_growth(size).wait()
    }

    /// What comes before [`Self::begin_growth`], and may wait for the host.
    pub(crate) fn open_for_growth(&self) -> Result<(), EngineError> {
        if self.is_read_only() {
            return Err(EngineError::ReadOnly);
        }
        if self.awaits_take_over() {
            // What the disk does not map may be a guest's all the same.
            return Err(EngineError::GuestAwaited);
        }
        self.begin();
        Ok(())
    }

    /// [`Self::prepare_growth`] without blocking.
    pub(crate) fn begin_growth(&self, size: Sector) -> Outcome {
        self.control(Control::PrepareGrowth(size))
    }

    /// Ends what [`Self::prepare_growth`] has begun: when this returns, the larger size is
    /// stable and can be used. Blocks.
    ///
    /// # Errors
    /// Nothing was prepared, or the last step could not be made stable: the size is the
    /// old one for the guest, and which of the two the image has shows when it is opened
    /// again. It can be prepared and committed once more.
    pub fn commit_growth(&self) -> Result<(), EngineError> {
        self.control(Control::CommitGrowth).wait()
    }

    /// Forgets what [`Self::prepare_growth`] has begun, which fails if it is under way.
    /// Returns at once.
    pub fn abandon_growth(&self) {
        drop(self.control(Control::AbandonGrowth));
    }

    /// The header of an empty image, in use, that could be put on the top.
    ///
    /// # Errors
    /// The format cannot hold a disk of this size.
    pub fn header_on_top(&self) -> Result<Header, EngineError> {
        let geometry = self.geometry();
        let header = match self.is_raw() {
            // A raw image has no version.
            true => Header::new(geometry.disk_size, geometry.cluster),
            false => Header::on_top_of(&geometry),
        };
        let mut header = header.map_err(|_| EngineError::ImageFull)?;
        header.in_use = InUse::Open;
        Ok(header)
    }

    /// What comes before [`Self::close_top`], and may take long: it begins, and makes stable
    /// what has completed, so that requests need not wait for that.
    ///
    /// # Errors
    /// No snapshot can be made of this disk now.
    pub(crate) fn open_for_snapshot(&self) -> Result<(), EngineError> {
        self.open_for_growth()?;
        self.levels.require_room()?;
        self.settle()
    }

    /// Holds requests, makes stable what has completed, and marks the top as closed; the
    /// memory that outlives the process says that the disk has everything. From then on
    /// nothing is written to it until [`Self::keep_top`]. If it fails, requests are taken
    /// again as if nothing had been asked.
    pub(crate) fn close_top(&self) -> Outcome {
        self.control(Control::CloseTop)
    }

    /// Puts an empty image on the top that was [closed](Self::close_top), and takes requests
    /// again: `header` is what the next file of the [`Disk`] begins with, and its file ends
    /// where data begins. All of it is stable, and who opens the disk from now on finds it.
    ///
    /// If it is not known whether the last of that is stable, nothing counts as stable any
    /// more, as after a failed sync.
    pub(crate) fn switch_top(&self, header: Header, is_stable: bool) -> Outcome {
        if !is_stable {
            self.set_sync_failed("the sync of the image's folder");
        }
        *self.lock_new_top() = Some(header);
        self.control(Control::SwitchTop)
    }

    /// Goes on with the top that was [closed](Self::close_top), and takes requests again.
    pub(crate) fn keep_top(&self) -> Outcome {
        self.control(Control::KeepTop)
    }

    pub(in crate::ploop) fn lock_new_top(&self) -> MutexGuard<'_, Option<Header>> {
        self.new_top.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the metadata thread for something; the result is where the answer
    /// will be.
    pub(crate) fn control(&self, what: Control) -> Outcome {
        let outcome = Outcome::default();
        self.ask_md(MdMessage::Control(what, outcome.clone()));
        outcome
    }

    /// A message that somebody waits for an answer to. When the metadata thread has
    /// ended, it is turned down.
    pub(in crate::ploop) fn ask_md(&self, message: MdMessage) {
        self.md.post(message);
        // One of the two sees the other: this the end, or the end this message.
        fence(Ordering::SeqCst);
        if self.has_ended() {
            self.turn_down_all();
        }
    }

    /// The metadata thread listens no more.
    pub(in crate::ploop) fn end_md(&self) {
        self.closed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.turn_down_all();
    }

    /// Whether the metadata thread has ended, or is about to: the image is closed, or could
    /// not be.
    pub(in crate::ploop) fn has_ended(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Each message is taken by one thread, so it is answered once.
    fn turn_down_all(&self) {
        for message in self.md.take_all() {
            message.turn_down();
        }
    }
}
