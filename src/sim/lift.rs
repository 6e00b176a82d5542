//! A level that gets what others below it have, while the disk is in use: its file as off-line
//! work sees it, and what a cut may leave of it.

use std::io;
use std::ops::Range;
use std::path::Path;

use rand::Rng;

use super::checker::Image;
use super::disk::SimDisk;
use super::file::{SECTOR, SimFile};
use super::session::{Failure, World};
use super::view::View;
use crate::image::{Delta, ImageError, ImageFile, Lift, MergeLevel};
use crate::storage::{Disk, FileId};

/// One of the files, for who reads and writes it by calls that block.
pub struct SimImage {
    disk: SimDisk,
    file: FileId,
}

impl ImageFile for SimImage {
    fn path(&self) -> &Path {
        Path::new("level")
    }

    fn file_len(&self) -> io::Result<u64> {
        self.disk.len(self.file)
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_exact_at(self.file, bytes, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.write_all_at(self.file, bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(self.file, len)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.disk.punch(self.file, range)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync(self.file)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.disk.data_from(self.file, offset))
    }
}

/// A level that gets what others have. Its file may be another than it was until a cut, or until
/// it is closed.
pub struct Changing {
    level: FileId,
    /// It was closed then.
    was_closed: bool,
    before: SimFile,
    /// As it is now.
    live: SimFile,
}

/// A level on its way to have what others below it have.
pub struct Lifting {
    pub lift: Lift<SimImage>,
    /// The lowest of these.
    pub lowest: FileId,
    /// The one that gets it.
    pub to: FileId,
}

impl World {
    /// Begins it for levels of a chain, base first, of which none is the top.
    pub(super) fn begin_lift(&mut self, levels: &[FileId]) -> Result<Lifting, ImageError> {
        let load = |file: FileId| {
            let disk = self.disk.clone();
            SimImage { disk, file }
        };
        let (&lowest, &to) = (&levels[0], &levels[levels.len() - 1]);
        let upper = Delta::load(load(to))?;
        let mut plain_size = 0;
        let mut lower = Vec::new();
        for &file in levels[..levels.len() - 1].iter().rev() {
            let image = &self.lower[usize::from(file.0)];
            if image.plain {
                plain_size = image.sectors * SECTOR as u64;
                lower.push(MergeLevel::Plain(load(file)));
                continue;
            }
            lower.push(MergeLevel::Ploop(Delta::load(load(file))?));
        }
        let mut lift = Lift::new(upper, lower, plain_size, lowest == FileId(0))?;
        lift.map_after(self.rng.random_range(1..6) * self.scenario.cluster);
        if !self.changing.iter().any(|changing| changing.level == to) {
            self.changing.push(Changing {
                level: to,
                was_closed: self.lower[usize::from(to.0)].closed,
                before: self.disk.snapshot(to),
                live: self.disk.snapshot(to),
            });
        }
        Ok(Lifting { lift, lowest, to })
    }

    /// Has this done to the level, which nobody else changes.
    pub(super) fn change_level<R>(&mut self, level: FileId, change: impl FnOnce() -> R) -> R {
        let top = self.scenario.top();
        self.disk
            .change_medium(|medium| medium.first_writable = level);
        let result = change();
        self.disk
            .change_medium(|medium| medium.first_writable = top);
        let live = self.disk.snapshot(level);
        let mut changing = self.changing.iter_mut();
        if let Some(changing) = changing.find(|changing| changing.level == level) {
            changing.live = live;
        }
        result
    }

    /// The level is closed, and nothing can be lost of it any more.
    pub(super) fn level_is_closed(&mut self, level: FileId) -> Result<(), Failure> {
        let image = self.disk.view(|view| self.read_image(view, level))?;
        self.lower[usize::from(level.0)] = image;
        self.changing_is_over(level);
        Ok(())
    }

    /// The level has gone.
    pub(super) fn changing_is_over(&mut self, level: FileId) {
        self.changing.retain(|changing| changing.level != level);
    }

    /// The power is back: what is there now stays.
    pub(super) fn levels_are_settled(&mut self) -> Result<(), Failure> {
        for changing in std::mem::take(&mut self.changing) {
            self.level_is_closed(changing.level)?;
        }
        Ok(())
    }

    /// The lower levels as they are in this view, and whether that may be.
    pub(super) fn judge_levels(&self, view: &View<'_>, lower: &mut [Image]) -> Result<(), Failure> {
        for changing in &self.changing {
            let level = changing.level;
            let Some(found) = lower.get_mut(usize::from(level.0)) else {
                continue;
            };
            // It has gone, too.
            if found.map.is_empty() {
                continue;
            }
            let image = self.read_image(view, level)?;
            let is_old = changing.was_closed && view.has_data_of(level, &image, &changing.before);
            if image.closed && !is_old && !view.has_data_of(level, &image, &changing.live) {
                return Err(format!(
                    "I12: level {} is marked as closed, and its content is neither the old nor \
                     the new one",
                    level.0
                ));
            }
            *found = image;
        }
        Ok(())
    }
}
