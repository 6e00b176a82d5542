//! The files of the chain as the engine knows them.
//!
//! The list only becomes longer: a snapshot puts a new top on it while every thread holds
//! its requests, and a level that is part of the chain no more keeps its place. So whoever
//! finds an entry of the map finds its level, and no entry changes when a snapshot is made.
//! What belongs to a top alone, as its allocator, comes and goes with its level. Does no I/O.

use std::sync::OnceLock;
// Not those of the models: nobody looks at them while they change.
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::alloc::Allocator;
use super::engine::Engine;
use super::entry::Place;
use super::error::EngineError;
use crate::format::{Descriptor, Geometry, HostCluster, Sector};
use crate::storage::{Disk, FileId};

/// The most deltas in a chain.
pub(super) const LEVELS_MAX: usize = Descriptor::LEVELS_MAX;

/// When a process can have so many levels more, the log says so.
const FEW_NUMBERS: usize = 16;

/// Where the clusters of one file of the chain are.
#[derive(Clone, Copy, Debug)]
pub(super) struct LevelMap {
    /// Of the file, as it was opened. A plain one has its data from the first byte on.
    pub geometry: Geometry,
    /// A raw image: guest cluster and host cluster are the same.
    pub plain: bool,
}

/// One file of the chain.
pub(super) struct Level {
    map: LevelMap,
    /// In sectors; see [`Self::disk_bytes`].
    disk_size: AtomicU64,
    /// It is part of the chain no more. Its number is not given to another.
    is_dropped: AtomicBool,
    /// Used as long as it is the top.
    alloc: Allocator,
}

impl Level {
    fn new(map: LevelMap, alloc: Allocator) -> Self {
        Self {
            disk_size: AtomicU64::new(map.geometry.disk_size.0),
            is_dropped: AtomicBool::new(false),
            map,
            alloc,
        }
    }

    /// No entry of the map is in it any more, and the chain goes on without it.
    pub fn drop_from_chain(&self) {
        self.is_dropped.store(true, Ordering::Relaxed);
    }

    /// Whether it is part of the chain no more.
    pub fn is_dropped(&self) -> bool {
        self.is_dropped.load(Ordering::Relaxed)
    }

    pub fn offset(&self, host: HostCluster) -> u64 {
        self.map.geometry.host_offset(host)
    }

    /// As the file was opened: how large the disk is, and where data begins, may be
    /// different since.
    pub fn geometry(&self) -> &Geometry {
        &self.map.geometry
    }

    pub fn is_plain(&self) -> bool {
        self.map.plain
    }

    /// Bytes of the disk of a lower level: beyond, it reads as zeros.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_size().bytes()
    }

    /// How many of these bytes of the disk, from `start` on, the disk of a lower level has.
    pub fn valid_bytes(&self, start: u64, len: u64) -> u64 {
        self.disk_bytes().saturating_sub(start).min(len)
    }

    /// As [`Self::disk_bytes`].
    pub fn disk_size(&self) -> Sector {
        Sector(self.disk_size.load(Ordering::Relaxed))
    }
}

/// See the module's text.
pub(super) struct Levels {
    /// Base first.
    list: Box<[OnceLock<Box<Level>>]>,
    count: AtomicUsize,
}

impl Levels {
    /// At least one level, base first; `top` is the allocator of the last.
    pub fn new(maps: Vec<LevelMap>, top: Allocator) -> Self {
        let levels = Self {
            list: (0..LEVELS_MAX.max(maps.len()))
                .map(|_| OnceLock::new())
                .collect(),
            count: AtomicUsize::new(0),
        };
        let mut maps = maps;
        let last = maps.pop();
        for map in maps {
            levels.push(map, Allocator::new(HostCluster(0), HostCluster(0)));
        }
        if let Some(map) = last {
            levels.push(map, top);
        }
        levels
    }

    /// A new top. `false` if there is no room for another level.
    pub fn push(&self, map: LevelMap, alloc: Allocator) -> bool {
        let count = self.len();
        let Some(free) = self.list.get(count) else {
            return false;
        };
        let is_new = free.set(Box::new(Level::new(map, alloc))).is_ok();
        if is_new {
            self.count.store(count + 1, Ordering::Release);
        }
        is_new
    }

    /// Whether there is room for another level.
    ///
    /// # Errors
    /// Why there is none.
    pub fn require_room(&self) -> Result<(), EngineError> {
        match self.numbers_left() {
            0 if self.iter().any(Level::is_dropped) => Err(EngineError::NoLevelNumber),
            0 => Err(EngineError::TooDeep),
            _ => Ok(()),
        }
    }

    /// How many levels more this process can have.
    fn numbers_left(&self) -> usize {
        self.list.len() - self.len()
    }

    /// How many more snapshots this process can make, if it is time to say so: those that are
    /// deleted do not count, though the chain could be longer.
    pub fn low_on_numbers(&self) -> Option<usize> {
        let left = self.numbers_left();
        let is_low = left <= FEW_NUMBERS && self.iter().any(Level::is_dropped);
        is_low.then_some(left)
    }

    pub fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    pub fn top_id(&self) -> FileId {
        FileId((self.len() - 1) as u8)
    }

    pub fn top(&self) -> &Level {
        self.get(self.top_id())
    }

    /// That of an entry of the map.
    pub fn get(&self, file: FileId) -> &Level {
        let level = self.list[usize::from(file.0)].get();
        level.expect("entries of the map are of levels that there are")
    }

    /// The one on which this one lies; `None` if it is the base.
    pub fn below(&self, file: FileId) -> Option<FileId> {
        let mut lower = (0..file.0).rev().map(FileId);
        lower.find(|file| !self.get(*file).is_dropped())
    }

    /// Base first, with those that are part of the chain no more.
    pub fn iter(&self) -> impl Iterator<Item = &Level> {
        let levels = self.list[..self.len()].iter();
        levels.filter_map(|level| level.get().map(Box::as_ref))
    }

    /// Of the top, for as long as it is that.
    pub fn alloc(&self) -> &Allocator {
        &self.top().alloc
    }

    /// The top is about to become a lower level, and its disk has this size: it may have
    /// grown since it was opened.
    pub fn set_disk_size_of_top(&self, size: Sector) {
        self.top().disk_size.store(size.0, Ordering::Relaxed);
    }
}

/// Levels of the chain, one right below the other, that are to go: the one above has, or is to
/// have, all that the disk needs of them.
#[derive(Clone, Copy, Debug)]
pub struct Needless {
    lowest: FileId,
    above: FileId,
}

impl Needless {
    pub(super) fn new(lowest: FileId, above: FileId) -> Self {
        Self { lowest, above }
    }

    /// The lowest of them.
    pub(super) fn lowest(self) -> FileId {
        self.lowest
    }

    /// The one of them that has such a cluster, if any has.
    pub(super) fn level_of(self, place: Place) -> Option<FileId> {
        match place {
            Place::In(file, _) if (self.lowest..self.above).contains(&file) => Some(file),
            _ => None,
        }
    }

    pub(super) fn has(self, place: Place) -> bool {
        self.level_of(place).is_some()
    }

    /// How many clusters of the disk are in them.
    pub(super) fn count<D: Disk>(self, engine: &Engine<D>) -> u64 {
        let entries = engine.bat.iter();
        entries.filter(|entry| self.has(entry.place())).count() as u64
    }

    /// Base first.
    pub fn files<D: Disk>(self, engine: &Engine<D>) -> Vec<FileId> {
        let files = (self.lowest.0..self.above.0).map(FileId);
        let is_there = |file: &FileId| !engine.levels.get(*file).is_dropped();
        files.filter(is_there).collect()
    }

    /// No entry of the map is in one of them any more, and the descriptor tells of a chain without
    /// them. Once that is stable, their files can go.
    pub fn drop_from_chain<D: Disk>(self, engine: &Engine<D>) {
        for file in self.files(engine) {
            engine.levels.get(file).drop_from_chain();
        }
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;
    use crate::format::{ClusterSize, Header};

    #[test]
    fn who_has_no_number_left_is_told_what_helps() {
        let header = Header::new(Sector(1 << 20), ClusterSize::DEFAULT).unwrap();
        let map = LevelMap {
            geometry: *header.geometry(),
            plain: false,
        };
        let none = || Allocator::new(HostCluster(0), HostCluster(0));
        let levels = Levels::new(vec![map], none());
        let count = |levels: &Levels| {
            let mut count = 0;
            while levels.require_room().is_ok() {
                assert!(levels.push(map, none()));
                count += 1;
            }
            count
        };
        assert_eq!(count(&levels), LEVELS_MAX - 1);
        assert!(!levels.push(map, none()));
        assert_eq!(levels.require_room(), Err(EngineError::TooDeep));
        assert_eq!(levels.low_on_numbers(), None, "the chain is so long");
        levels.get(FileId(5)).drop_from_chain();
        assert_eq!(levels.require_room(), Err(EngineError::NoLevelNumber));
        assert_eq!(levels.low_on_numbers(), Some(0));
        let levels = Levels::new(vec![map; 3], none());
        levels.get(FileId(1)).drop_from_chain();
        assert_eq!(levels.low_on_numbers(), None);
        while levels.low_on_numbers().is_none() {
            assert!(levels.push(map, none()));
        }
        assert_eq!(levels.len(), LEVELS_MAX - FEW_NUMBERS);
    }
}
