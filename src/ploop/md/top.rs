//! A new top while the disk is in use: what becomes of the old one, and how the new one
//! takes its place.
//!
//! 1. Requests are held, and what is under way ends: I/O, copies, punches, and all that makes
//!    the file longer. What the file has behind the last cluster that was ever given out is
//!    cut off.
//! 2. A round with a sync: the disk has everything.
//! 3. The memory that outlives the process says so. From here to step 6 it belongs to no
//!    image: who comes after a kill believes the disk alone, whichever top that has.
//! 4. The closed mark is written and synced. The top has the name of no opening any more.
//!    Whoever has asked for this puts the new top in place, or does not.
//! 5. In memory there is a new top, empty and marked as in use, as its file is. No entry of
//!    the map changes: each says in which level its cluster is. Clusters of the old top that
//!    were to be freed stay there.
//! 6. The new top gets the name of an opening, the memory that outlives the process that
//!    name, and requests are taken again.
//!
//! Where the top is kept after all, it is marked as in use again and synced, in place of
//! step 5.
//!
//! Nothing here looks at the whole map: requests are held for no longer than the syncs of
//! steps 2 and 4 take, and what is done between these.

use super::super::EngineError;
use super::super::alloc::Allocator;
use super::super::levels::LevelMap;
use super::super::preempt;
use super::super::rule::{self, Rule};
use super::close::{cannot_mark, mark_closed};
use super::control::ControlStage;
use super::grow::tail_len;
use super::reclaim::Reclaim;
use super::round::Phase;
use super::{MdWriter, Metadata, Waiter};
use crate::format::{Header, InUse, Sector};
use crate::storage::{Disk, FileId};

impl<D: Disk> MdWriter<D> {
    /// Whether the top may be closed for another one.
    pub(super) fn check_may_close_top(&self) -> Result<(), EngineError> {
        let engine = &self.engine;
        if engine.is_read_only() {
            Err(EngineError::ReadOnly)
        } else if engine.has_sync_failed() {
            Err(EngineError::SyncFailed)
        } else if let Err(error) = engine.levels.require_room() {
            Err(error)
        } else if self.growing.is_some() {
            Err(EngineError::Growing)
        } else if self.geometry.disk_size != engine.disk_size() {
            Err(EngineError::HalfGrown)
        } else if engine.is_suspended() {
            // Who asks may be the one who would resume it.
            Err(EngineError::Suspended)
        } else {
            Ok(())
        }
    }

    /// The end of step 1, and step 2. The sync of the round makes the cut stable; one that began
    /// before is over, as it would vouch for a length that the file has no more.
    pub(super) fn flush_top(&mut self) {
        if let Err(error) = self.cut_top() {
            return self.go_on(Err(error));
        }
        let flushes = rule::kept(Rule::FlushBeforeNewTop);
        if let Some(job) = self.control.front_mut() {
            job.stage = match flushes {
                true => ControlStage::Flush,
                false => ControlStage::Flushed(Ok(())),
            };
        }
        if flushes {
            self.waiters.push(Waiter::Control);
        }
    }

    fn cut_top(&self) -> Result<(), EngineError> {
        let engine = &self.engine;
        let len = match engine.has_bat() {
            true => {
                let end = engine.alloc().cut();
                let end = end.max(self.geometry.first_host_cluster());
                self.geometry.host_offset(end)
            }
            // What lies behind was never the guest's, and must not come to light when the
            // disk grows above it.
            false => self.geometry.disk_size.bytes(),
        };
        let top = engine.top();
        let cut = || match engine.disk.len(top)? > len {
            true => engine.disk.set_len(top, len),
            false => Ok(()),
        };
        cut().map_err(|error| {
            log::error!("cannot cut the image file: {error}");
            EngineError::Io(super::close::errno_of(&error))
        })
    }

    /// Steps 3 and 4.
    pub(super) fn close_top(&mut self) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        if engine.has_sync_failed() {
            return Err(EngineError::SyncFailed);
        }
        engine.begin_switch();
        preempt::point("settled");
        if rule::kept(Rule::MarkBeforeNewTop) {
            self.mark_top_closed()?;
        }
        engine.forget_opening();
        self.is_top_closed = true;
        Ok(())
    }

    fn mark_top_closed(&mut self) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        let Some(metadata) = &mut self.metadata else {
            return Ok(());
        };
        let top = engine.top();
        mark_closed(&engine.disk, top, &mut metadata.header, None).map_err(cannot_mark)?;
        preempt::point("mark written");
        engine.disk.sync(top).map_err(|error| {
            engine.set_sync_failed("the sync of the closed mark");
            cannot_mark(error)
        })
    }

    /// Whether nothing of the old top is under way any more.
    pub(super) fn may_change_top(&self) -> bool {
        self.ops.is_empty() && self.round.phase == Phase::Idle
    }

    /// Steps 5 and 6.
    pub(super) fn switch_top(&mut self) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        let header = engine.lock_new_top().take();
        let header = header.filter(|_| self.is_top_closed);
        let header = header.ok_or(EngineError::TopInUse)?;
        let geometry = *header.geometry();
        engine.levels.set_disk_size_of_top(engine.disk_size());
        let map = LevelMap {
            geometry,
            plain: false,
        };
        let old = engine.top();
        let first = geometry.first_host_cluster();
        if !engine.levels.push(map, Allocator::new(first, first)) {
            return Err(EngineError::TooDeep);
        }
        if let Some(left) = engine.levels.low_on_numbers() {
            log::warn!(
                "this process can make {left} snapshots more, however many are deleted: after \
                 that another one has to be started, or take over"
            );
        }
        *engine.lock_geometry() = geometry;
        self.geometry = geometry;
        if !rule::kept(Rule::MarkBeforeNewTop)
            && let Some(metadata) = &mut self.metadata
        {
            let _ = mark_closed(&engine.disk, old, &mut metadata.header, None);
        }
        self.metadata = Some(metadata_of(header));
        if rule::kept(Rule::OldTopIsLeftAlone) {
            self.reclaim = Reclaim::default();
            self.holes.clear();
            self.still_mapped.clear();
        }
        preempt::point("switched");
        engine.end_switch();
        self.is_top_closed = false;
        Ok(())
    }

    /// The top is in use again. If it cannot be marked, nothing counts as stable any more:
    /// who opens the image would not know that somebody has used it.
    pub(super) fn keep_top(&mut self) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        let result = match rule::kept(Rule::MarkBeforeKeptTop) {
            true => self.mark_top_in_use(),
            false => Ok(()),
        };
        if result.is_err() {
            engine.set_sync_failed("the mark of an image that is used on");
        }
        engine.end_switch();
        self.is_top_closed = false;
        result
    }

    fn mark_top_in_use(&mut self) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        let Some(metadata) = &mut self.metadata else {
            return Ok(());
        };
        let top = engine.top();
        metadata.header.in_use = InUse::Open;
        metadata.header.extension = Sector(0);
        let bytes = metadata.header.to_bytes();
        let error = match engine.disk.write_all_at(top, &bytes, 0) {
            Ok(()) => match engine.disk.sync(top) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            // The closed mark could not be written either, for want of space say.
            Err(_) if mark_of(&engine.disk, top) == Some(InUse::Open) => return Ok(()),
            Err(error) => error,
        };
        log::error!("cannot mark the image as in use again: {error}");
        Err(EngineError::Io(super::close::errno_of(&error)))
    }
}

/// What the file says of its use, as readers see it.
fn mark_of(disk: &impl Disk, file: FileId) -> Option<InUse> {
    let mut bytes = [0; Header::LEN];
    disk.read_exact_at(file, &mut bytes, 0).ok()?;
    Some(Header::parse(&bytes).ok()?.in_use)
}

/// What the metadata thread writes of an empty image.
fn metadata_of(header: Header) -> Metadata {
    Metadata {
        bat_tail: vec![0; tail_len(header.geometry())],
        header,
    }
}
