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
use crate::format::{Descriptor, Geometry, HostCluster, Sector};
use crate::storage::{Disk, FileId};

/// The most deltas in a chain.
pub(super) const LEVELS_MAX: usize = Descriptor::LEVELS_MAX;

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
    pub fn is_full(&self) -> bool {
        self.len() >= self.list.len()
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

    /// Base first.
    pub fn files<D: Disk>(self, engine: &Engine<D>) -> Vec<FileId> {
        let files = (self.lowest.0..self.above.0).map(FileId);
        let is_there = |file: &FileId| !engine.levels.get(*file).is_dropped();
        files.filter(is_there).collect()
    }

    /// No entry of the map is in one of them any more, and the descriptor tells of a chain without
    /// them, which is stable: their files can go.
    pub fn drop_from_chain<D: Disk>(self, engine: &Engine<D>) {
        for file in self.files(engine) {
            engine.levels.get(file).drop_from_chain();
        }
    }
}
