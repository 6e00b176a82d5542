//! The image goes to whoever opens it next, on another host perhaps.
//!
//! That one believes the mark: a guest that comes to it from elsewhere goes on only if the
//! image was closed. So it is handed over only marked (I14). If anything of that fails, it is
//! marked as in use again, and served on: everybody else finds it locked.
//!
//! The steps, while requests are held:
//!
//! 1. a flush: all that has completed is stable, the mapping included;
//! 2. the memory that outlives the process is said to add nothing;
//! 3. the file is cut behind its last cluster and synced;
//! 4. the mark, and a sync.
//!
//! While a guest stands still and another host waits for the image, the cut comes first, so that
//! the sync of the flush is its sync, too, and takes away only the space that the file had grown
//! ahead: a file system that gives hundreds of MiB back while others write has been seen to take
//! 9 s. What is left, the next opening finds as space that nothing uses.

use super::close::{cannot_mark, errno_of, mark_closed, used_end};
use super::control::ControlStage;
use super::{MdWriter, Waiter};
use crate::format::HostCluster;
use crate::ploop::EngineError;
use crate::ploop::preempt;
use crate::ploop::rule::{self, Rule};
use crate::ploop::tracking::saved;
use crate::storage::Disk;

impl<D: Disk> MdWriter<D> {
    /// The quick cut, and step 1. A sync that began before is over, as it would vouch for a
    /// length that the file has no more.
    pub(super) fn flush_in_haste(&mut self) {
        let engine = &self.engine;
        let changes = !engine.is_read_only() && !engine.awaits_take_over();
        if changes && self.metadata.is_some() {
            // Not behind what is used now: what the mapping on disk still says is used reaches
            // further, until the flush.
            let given = engine.alloc().cut().max(self.geometry.first_host_cluster());
            if let Err(error) = self.cut(given) {
                return self.go_on(Err(error));
            }
        }
        if let Some(job) = self.control.front_mut() {
            job.stage = ControlStage::Flush;
        }
        self.waiters.push(Waiter::Control);
    }

    /// `true` if the file was longer.
    fn cut(&self, end: HostCluster) -> Result<bool, EngineError> {
        let engine = &self.engine;
        let (top, len) = (engine.top(), self.geometry.host_offset(end));
        let cut = || match engine.disk.len(top)? > len {
            true => engine.disk.set_len(top, len).map(|()| true),
            false => Ok(false),
        };
        // If it is used on, nothing behind is there for good.
        engine.alloc().doubt_length(end);
        cut().map_err(|error| {
            log::error!("cannot cut the image file: {error}");
            EngineError::Io(errno_of(&error))
        })
    }

    /// The image is used on: what the allocator may give out is in the file again, or the next
    /// sync would vouch for a length that it has not.
    fn lengthen_again(&self, trims: bool) {
        let engine = &self.engine;
        if !trims || self.metadata.is_none() {
            return;
        }
        let top = engine.top();
        let len = self.geometry.host_offset(HostCluster(engine.alloc().end()));
        let lengthen = || match engine.disk.len(top)? < len {
            true => engine.disk.set_len(top, len),
            false => Ok(()),
        };
        if let Err(error) = lengthen() {
            log::error!("the image file was cut and cannot be made longer again: {error}");
            engine.set_sync_failed("the length of an image that is used on");
        }
    }

    /// Steps 2 to 4, once nothing changes the file any more.
    pub(super) fn hand_over(&mut self, trims: bool) {
        let engine = self.engine.clone();
        if engine.has_sync_failed() && !engine.is_read_only() {
            return self.go_on(Err(EngineError::SyncFailed));
        }
        // Of the others see where an image is closed.
        let changes = !engine.is_read_only() && !engine.awaits_take_over() && !self.is_top_closed;
        if changes {
            engine.begin_switch();
            if let Err(error) = self.trim_and_mark(trims) {
                engine.tracking.go_on();
                self.lengthen_again(trims);
                // Said before, if it went wrong.
                let _ = self.keep_top();
                return self.go_on(Err(error));
            }
            engine.forget_opening();
        }
        self.closed = true;
        let job = self.control.pop_front();
        self.dismiss();
        // Last: who hears of it finds an engine that has ended.
        if let Some(job) = job {
            job.outcome.set(Ok(()));
        }
    }

    fn trim_and_mark(&mut self, trims: bool) -> Result<(), EngineError> {
        if self.metadata.is_none() {
            return Ok(());
        }
        let engine = self.engine.clone();
        let top = engine.top();
        let failed_sync = |error| {
            engine.set_sync_failed("the sync of the closed mark");
            cannot_mark(error)
        };
        let is_cut = trims && self.cut(used_end(&engine, &self.geometry))?;
        if is_cut {
            log::debug!("the file was cut behind its last cluster");
        }
        // Nowhere where clusters may be given out if the image is served on.
        let behind = (&*engine.all_bitmaps(), HostCluster(engine.alloc().end()));
        let saved = saved::save(&engine.disk, top, &self.geometry, behind);
        let extension = saved.and_then(|saved| saved.extension);
        let is_saved = extension.is_some() && rule::kept(Rule::BitmapsBeforeMark);
        let mut mark = || {
            if (is_cut && rule::kept(Rule::SyncBeforeMark)) || is_saved {
                engine.disk.sync(top).map_err(failed_sync)?;
            }
            if let Some(metadata) = &mut self.metadata {
                mark_closed(&engine.disk, top, &mut metadata.header, extension)
                    .map_err(cannot_mark)?;
            }
            preempt::point("mark written");
            engine.disk.sync(top).map_err(failed_sync)
        };
        let marked = mark();
        match (&marked, saved) {
            (Ok(()), _) => log::debug!("the closed mark is stable"),
            (Err(_), Some(saved)) if saved.end > saved.start => {
                // What was written there are no zeros.
                let alloc = engine.alloc();
                alloc.claim(saved.end, saved.end - saved.start);
                alloc.doubt_length(HostCluster(saved.start));
            }
            (Err(_), _) => {}
        }
        marked
    }
}
