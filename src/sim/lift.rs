//! A level that gets what others below it have, while the disk is in use: its file as off-line
//! work sees it, and what a cut may leave of it.

use std::io;
use std::ops::Range;
use std::path::Path;

use rand::Rng;

use super::checker::Image;
use super::disk::SimDisk;
use super::file::{ContentId, SECTOR, SimFile};
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
    /// What it was then.
    image: Image,
    before: SimFile,
    /// As it is now.
    live: SimFile,
}

impl Changing {
    /// Whether the level, marked as closed, may be this image.
    fn may_be(&self, view: &View<'_>, image: &Image) -> bool {
        let has_data_of = |other: &SimFile| {
            let may_have = |sector, content| self.was_undecided(sector, content);
            view.has_data_but(self.level, image, other, may_have)
        };
        (self.image.closed && has_data_of(&self.before)) || has_data_of(&self.live)
    }

    /// Whether the sector had data which a cut could leave so, or otherwise. When the level was the
    /// top, a write to it has failed, perhaps, and left some of what it should have written to
    /// clusters that were mapped: no sync makes that stable, nor is it made stable because others
    /// are copied beside it.
    fn was_undecided(&self, sector: u64, content: ContentId) -> bool {
        let offset = sector * SECTOR as u64;
        let mut mapped = self.image.map.iter().filter(|start| **start != 0);
        mapped.any(|start| (*start..start + self.image.cluster).contains(&offset))
            && self.before.may_become(sector, content)
    }
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
                image: self.lower[usize::from(to.0)].clone(),
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
            if image.closed && !changing.may_be(view, &image) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{ClusterSize, GuestCluster, Header, HostCluster, Sector};
    use crate::sim::disk::Medium;

    const LEVEL: FileId = FileId(0);
    const CLUSTER: u64 = 32 << 10;

    /// A closed level with one cluster and room for a second one.
    fn level(seed: u64) -> (SimDisk, Delta<SimImage>, Changing) {
        let disk = SimDisk::new(1, Medium::default(), seed);
        let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
        let header = Header::new(Sector(8 * 64), cluster).unwrap();
        let start = header.geometry().data_start;
        let entry = header
            .geometry()
            .bat_value(header.geometry().first_host_cluster());
        disk.prepare(LEVEL, 0, &header.to_bytes());
        disk.prepare(LEVEL, Header::LEN as u64, &entry.to_le_bytes());
        disk.prepare(LEVEL, start, &vec![1; CLUSTER as usize]);
        disk.prepare(LEVEL, start + CLUSTER, &vec![0; CLUSTER as usize]);
        // What a write that failed has left of itself.
        disk.write_all_at(LEVEL, &[2; 4 * SECTOR], start + 512)
            .unwrap();
        let delta = Delta::load(SimImage {
            disk: disk.clone(),
            file: LEVEL,
        });
        let changing = Changing {
            level: LEVEL,
            image: disk.view(|view| Image::read(view, LEVEL)).unwrap(),
            before: disk.snapshot(LEVEL),
            live: disk.snapshot(LEVEL),
        };
        (disk, delta.unwrap(), changing)
    }

    fn may_be_after_cut(disk: &SimDisk, changing: &Changing) -> bool {
        disk.view_after_cut(LEVEL, |view, _| {
            let image = Image::read(view, LEVEL).unwrap();
            !image.closed || changing.may_be(view, &image)
        })
    }

    #[test]
    fn what_was_undecided_before_a_level_changes_may_be_so_afterwards() {
        for seed in 0..200 {
            let (disk, _, changing) = level(seed);
            assert!(may_be_after_cut(&disk, &changing), "seed {seed}");
        }
    }

    #[test]
    fn a_level_that_is_closed_without_what_it_got_is_noticed() {
        let noticed = (0..200).filter(|seed| {
            let (disk, mut delta, mut changing) = level(*seed);
            let second = HostCluster(delta.geometry().first_host_cluster().0 + 1);
            let at = delta.geometry().host_offset(second);
            // Nothing of this is in order: the mark does not wait for it.
            delta.write(&[3; SECTOR], at, "write").unwrap();
            delta.set_entry(GuestCluster(1), Some(second));
            delta.write_header().unwrap();
            changing.live = disk.snapshot(LEVEL);
            !may_be_after_cut(&disk, &changing)
        });
        assert!(noticed.count() > 20);
    }
}
