//! Judges what a power cut leaves, or would leave.
//!
//! A cut that is made ends the session. Most are only imagined: at a moment that the
//! seed chooses, what a cut could leave is judged as if there had been one, and
//! everything goes on. So a moment that is dangerous for an instant only, as between a
//! flush and the next write of the BAT, is looked at while it lasts.

use rand::Rng;

use super::cases::Case;
use super::checker::{self, Image};
use super::file::SimFile;
use super::session::{Failure, World};
use super::view::View;
use crate::storage::FileId;

/// How the top was before it was opened last.
pub struct Before {
    /// Its mark said so.
    pub closed: bool,
    /// It had a format extension.
    pub extension: bool,
    /// Header, BAT and data.
    pub file: SimFile,
    /// See [`Scenario::bytes_behind`](super::scenario::Scenario::bytes_behind).
    pub behind: Vec<u8>,
    /// The host may fail since, and may give up what a failed write has left.
    pub is_troubled: bool,
}

/// How many cuts there were, by whether something was not stable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cuts {
    /// Cuts that could lose something.
    pub made: u64,
    /// Likewise, but only imagined.
    pub imagined: u64,
    /// Cuts that could lose nothing, as everything was synced.
    pub idle: u64,
}

impl Cuts {
    /// Those that could lose something.
    pub fn all(self) -> u64 {
        self.made + self.imagined
    }

    /// Adds others.
    pub fn add(&mut self, other: Self) {
        self.made += other.made;
        self.imagined += other.imagined;
        self.idle += other.idle;
    }
}

impl World {
    /// Judges what a cut just now would leave.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn imagine_cut(&mut self) -> Result<(), Failure> {
        if !self.disk.is_powered() || !self.disk.is_unsynced() {
            return Ok(());
        }
        self.cuts.imagined += 1;
        self.cases.count_if(Case::LargerCut, self.is_growing);
        self.cases.count_if(Case::SnapshotCut, self.is_snapshotting);
        self.cases.count_if(Case::MergeCut, self.is_merging);
        let lower = self.choose_lower()?;
        let top = self.scenario.top();
        let is_new = self.is_either && self.rng.random();
        let judged = match is_new {
            true => self.disk.view_after_cut(FileId(top.0 + 1), |view, live| {
                self.judge_new(view, live, lower)
            }),
            false => self
                .disk
                .view_after_cut(top, |view, live| self.judge_as(view, live, top, &lower)),
        };
        judged
            .map(drop)
            .map_err(|wrong| format!("if the power went now: {wrong}"))
    }

    /// Judges what a cut has left, of the top which was `live` before; gives back how it
    /// looks now.
    ///
    /// # Errors
    /// What the engine did wrong.
    pub fn judge(&self, view: &View<'_>, live: &SimFile) -> Result<Image, Failure> {
        self.judge_as(view, live, self.scenario.top(), &self.lower)
    }

    /// The same of a disk with this top on these lower deltas.
    pub(super) fn judge_as(
        &self,
        view: &View<'_>,
        live: &SimFile,
        top: FileId,
        lower: &[Image],
    ) -> Result<Image, Failure> {
        let mut lower = lower.to_vec();
        self.judge_levels(view, &mut lower)?;
        let image = self.read_image(view, top)?;
        if !image.plain && !self.sizes.contains(&image.sectors) {
            return Err(format!(
                "I12: the disk has {} sectors, and should have one of {:?}",
                image.sectors, self.sizes
            ));
        }
        for (index, sector) in (0..).zip(self.scenario.layout.sectors()) {
            let found = checker::guest_sector(view, &lower, &image, sector);
            let judged = self.model.check_after_cut(index, found);
            judged.map_err(|wrong| format!("after the cut, guest sector {sector}: {wrong:?}"))?;
        }
        let found = self.scenario.layout.sectors().map(|sector| {
            let value = checker::guest_sector(view, &lower, &image, sector);
            (sector, value)
        });
        let found: Vec<_> = match image.extension {
            Some(_) => found.collect(),
            None => Vec::new(),
        };
        self.bitmaps
            .judge(view, (top, &image), found.iter().copied())?;
        let Before { closed, file, .. } = &self.before;
        let is_old = *closed && view.has_data_of(top, &image, file);
        if image.closed
            && !self.before.is_troubled
            && !view.has_data_of(top, &image, live)
            && !is_old
        {
            return Err("I12: the image is marked as closed, and its content is neither the old nor the new one".to_owned());
        }
        if image.plain {
            self.judge_plain(view)?;
        }
        Ok(image)
    }

    /// A raw file never becomes another length than that of its disk, and what it has
    /// behind the disk stays.
    fn judge_plain(&self, view: &View<'_>) -> Result<(), Failure> {
        let (old, now) = (self.before.file.len(), view.len(FileId(0)));
        if now != old && now != self.scenario.plain_len() && !self.raw_lens.contains(&now) {
            return Err(format!(
                "I12: the raw file had {old} bytes and now has {now}"
            ));
        }
        if self.scenario.bytes_behind(view) != self.before.behind {
            return Err("I5: what is behind the disk in its raw file has changed".to_owned());
        }
        Ok(())
    }

    /// One of the files, read without the engine.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read_image(&self, view: &View<'_>, file: FileId) -> Result<Image, Failure> {
        match file.0 {
            0 if self.scenario.plain_base => Ok(self.scenario.plain_image()),
            _ => Image::read(view, file),
        }
    }

    /// The files below the top, base first.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read_lower(&self, view: &View<'_>) -> Result<Vec<Image>, Failure> {
        let lower = 0..self.scenario.top().0;
        lower
            .map(|file| self.read_image(view, FileId(file)))
            .collect()
    }
}
