//! The end of the image's use: the space behind its last cluster goes back, and it is marked.
//!
//! [`super::control`] says when; here is in which order it reaches the disk (I12), which a top
//! that another one follows ([`super::top`]) and an image that another host opens
//! ([`super::hand_over`]) share.

use std::io;

use rustix::io::Errno;

use super::MdWriter;
use crate::format::{Geometry, Header, HostCluster, InUse, Sector};
use crate::ploop::EngineError;
use crate::ploop::engine::Engine;
use crate::ploop::entry::Place;
use crate::ploop::preempt;
use crate::ploop::rule::{self, Rule};
use crate::ploop::tracking::{Bitmap, saved};
use crate::storage::{Disk, FileId};

impl<D: Disk> MdWriter<D> {
    /// Gives back the space behind the last mapped cluster and marks the image as
    /// closed, last and after a sync (I12). Everything is flushed, so what the
    /// disk maps is what memory maps; for a raw image that is all.
    ///
    /// One that is passed on is marked after the sync of that flush, and nothing else: before
    /// the next one changes anything, it makes its own mark, in the same sector, and syncs
    /// that. Until then either mark is true. The name of the opening stays where there is a
    /// mark, which comes before it: to change it would have the next sync wait for a journal.
    pub(super) fn close_file(&mut self, is_passed: bool) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        if engine.is_read_only() {
            return Ok(());
        }
        if engine.has_sync_failed() {
            return Err(EngineError::SyncFailed);
        }
        if engine.awaits_take_over() {
            // Nobody has come, and a guest may yet that was told of writes which are not in
            // the image: the next process has to see that, too.
            return Ok(());
        }
        engine.note_settled();
        if self.is_top_closed {
            return Ok(());
        }
        let marked = self.mark_file(is_passed);
        if marked.is_err() && engine.has_lost_lock() {
            engine.unsettle_after_loss();
        }
        marked
    }

    /// The last steps of that, when the memory that outlives the process says that the disk has
    /// everything.
    fn mark_file(&mut self, is_passed: bool) -> Result<(), EngineError> {
        let engine = self.engine.clone();
        let Some(metadata) = &mut self.metadata else {
            engine.forget_opening();
            return Ok(());
        };
        let top = engine.top();
        let bitmaps = engine.all_bitmaps();
        let disk = &engine.disk;
        if is_passed {
            let end = HostCluster(engine.alloc().end());
            let extension = save_bitmaps(disk, top, &self.geometry, (&bitmaps, end));
            if extension.is_some() && rule::kept(Rule::BitmapsBeforeMark) {
                disk.sync(top).map_err(cannot_mark)?;
            }
            return mark_closed(disk, top, &mut metadata.header, extension).map_err(cannot_mark);
        }
        let end = used_end(&engine, &self.geometry);
        cut_and_mark(disk, top, (end, &bitmaps), &mut metadata.header).map_err(cannot_mark)?;
        engine.forget_opening();
        Ok(())
    }
}

/// One behind the last cluster that the top has. Nothing changes that meanwhile.
pub(super) fn used_end<D: Disk>(engine: &Engine<D>, geometry: &Geometry) -> HostCluster {
    let top = engine.top();
    let ends = engine.bat.iter().filter_map(|entry| match entry.place() {
        Place::In(file, host) if file == top => Some(host.0 + 1),
        _ => None,
    });
    HostCluster(ends.max().unwrap_or(geometry.first_host_cluster().0))
}

pub(super) fn cannot_mark(error: io::Error) -> EngineError {
    log::error!("cannot mark the image as closed: {error}");
    EngineError::Io(errno_of(&error))
}

pub(super) fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn cut_and_mark(
    disk: &impl Disk,
    top: FileId,
    (end, bitmaps): (HostCluster, &[Bitmap]),
    header: &mut Header,
) -> io::Result<()> {
    let geometry = *header.geometry();
    let len = geometry.host_offset(end);
    if disk.len(top)? > len {
        disk.set_len(top, len)?;
    }
    let extension = save_bitmaps(disk, top, &geometry, (bitmaps, end));
    let is_synced = extension.is_none() || rule::kept(Rule::BitmapsBeforeMark);
    if is_synced && rule::kept(Rule::SyncBeforeMark) {
        disk.sync(top)?;
    }
    mark_closed(disk, top, header, extension)?;
    preempt::point("mark written");
    disk.sync(top)
}

/// Those that are persistent, behind all else. Where the extension is, if there is one now.
fn save_bitmaps(
    disk: &impl Disk,
    top: FileId,
    geometry: &Geometry,
    bitmaps: (&[Bitmap], HostCluster),
) -> Option<Sector> {
    saved::save(disk, top, geometry, bitmaps)?.extension
}

pub(super) fn mark_closed(
    disk: &impl Disk,
    top: FileId,
    header: &mut Header,
    extension: Option<Sector>,
) -> io::Result<()> {
    header.in_use = match extension {
        Some(_) => InUse::ClosedWithExtension,
        None => InUse::Closed,
    };
    header.extension = extension.unwrap_or(Sector(0));
    disk.write_all_at(top, &header.to_bytes(), 0)
}
