//! Change tracking: dirty bitmaps, which say what of the disk was changed since they were made
//! or cleared.
//!
//! The ways of requests know one [`Log`] alone: bits as fine as the finest bitmap that records,
//! set where a change is planned, with one look at a word that says that there is a log
//! ([`Tracking::terms`]). Whatever is asked of bitmaps first takes what the log has into all that
//! record. So their number costs a request nothing, and without any it costs none.
//!
//! Bitmaps change while requests are held and nothing is in flight: each change of the disk is
//! on one side of that. A write that waits for space is planned anew after it, or taken in by the
//! copy of its cluster, which marks it (`runner/cow.rs`). What is set too early, or though the change has failed, makes a backup copy more than it had to; what is
//! missed would make it wrong.
//!
//! The disk grows under a log that has room for the largest; what is new is clear.

pub(crate) mod bits;
pub(super) mod saved;

use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::ArcSwapOption;
use thiserror::Error;

use self::bits::{Bits, masks};
use super::EngineError;
use super::engine::Engine;
use super::rule::{self, Rule};
use super::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::format::{BitmapId, Extension};
use crate::storage::{Disk, FileId};

/// Bitmaps of a disk, at most.
pub const BITMAPS_MAX: usize = 16;

/// Bits of a bitmap, at most: 64 MiB of them.
const BITS_MAX: u64 = 1 << 29;

/// Bits of all, at most: an image that has many fine ones is not to take all memory.
const ALL_BITS_MAX: u64 = 1 << 31;

/// What a bit covers at least, as a power of two: a sector.
const SHIFT_MIN: u32 = 9;

/// As QEMU has it.
const NAME_MAX: usize = 1023;

/// What a bit covers if nobody says, in bytes, unless clusters are smaller.
const GRANULARITY: u64 = 64 << 10;

/// Words of the first segment of the log.
const SEGMENT: usize = 8192;

/// Enough for a bit of each sector of the largest disk: clusters of 64 MiB, of which there are
/// 2^32 at most.
const SEGMENTS: usize = 31;

/// Of [`Tracking::terms`]: there is a log.
const RECORDS: u32 = 1 << 31;

/// What can be done to bitmaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapAction {
    /// There is one more, with nothing set.
    Add {
        /// Its name.
        name: String,
        /// What a bit covers, in bytes.
        granularity: Option<u64>,
        /// It outlives the process, in the image.
        is_persistent: bool,
        /// It records changes.
        records: bool,
    },
    /// It is forgotten.
    Remove(String),
    /// Nothing of it is set any more.
    Clear(String),
    /// It records changes from now on.
    Enable(String),
    /// It records none any more.
    Disable(String),
    /// What is set in others is set in it as well.
    Merge {
        /// Which one changes.
        target: String,
        /// Those others.
        sources: Vec<String>,
    },
}

/// Why nothing was done; in QEMU's words where QEMU has any.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BitmapError {
    /// There is none of that name.
    #[error("Dirty bitmap '{0}' not found")]
    NotFound(String),
    /// There is one already.
    #[error("Bitmap already exists: {0}")]
    Exists(String),
    /// There has to be a name.
    #[error("Bitmap name cannot be empty")]
    NoName,
    /// It is longer than QEMU's may be.
    #[error("Bitmap name too long: {0}")]
    LongName(String),
    /// No power of two, or less than a sector.
    #[error("Granularity must be power of 2 and at least 512")]
    Granularity,
    /// There would be too many bits.
    #[error("a bitmap of so large a disk needs a granularity of {least} bytes at least")]
    Fine {
        /// In bytes.
        least: u64,
    },
    /// See [`BITMAPS_MAX`].
    #[error("a disk has {BITMAPS_MAX} dirty bitmaps at most")]
    TooMany,
    /// The format has room for a GUID.
    #[error(
        "a persistent bitmap of a ploop image is called by a GUID, like \
         c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5, and '{0}' is none"
    )]
    NoGuid(String),
    /// A raw image has no place for one.
    #[error("a raw image has no place for persistent bitmaps")]
    Raw,
    /// The engine cannot hold requests, or make stable what was written.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// All together would have too many bits.
    #[error(
        "the dirty bitmaps of the disk would take too much memory: remove one, or make it of a \
         larger granularity"
    )]
    ManyBits,
    /// The format has one cluster for the heads of all.
    #[error("the image has no place for another persistent bitmap of this granularity")]
    NoPlace,
}

/// What there is to know of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// What a bit covers, in bytes.
    pub granularity: u64,
    /// What is set, in bytes, in whole granules.
    pub count: u64,
    /// It records changes.
    pub records: bool,
    /// It outlives the process.
    pub is_persistent: bool,
}

/// One, as it is kept.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    pub name: String,
    pub bits: Bits,
    pub records: bool,
    pub is_persistent: bool,
}

impl Bitmap {
    fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: self.name.clone(),
            granularity: 1 << self.bits.shift(),
            count: self.bits.count() << self.bits.shift(),
            records: self.records,
            is_persistent: self.is_persistent,
        }
    }

    /// By what a file knows it.
    pub fn id(&self) -> Option<BitmapId> {
        BitmapId::parse(&self.name)
    }
}

/// What is marked by who changes the disk.
struct Log {
    shift: u32,
    /// Of [`SEGMENT`] words the first, each of the others of twice as many as the one before:
    /// there are as many as the disk takes, with room for those of the largest.
    segments: [OnceLock<Box<[AtomicU64]>>; SEGMENTS],
}

/// In which segment a word is, and where in it.
fn place_of(word: usize) -> (usize, usize) {
    let segment = (word / SEGMENT + 1).ilog2() as usize;
    (segment, word - first_of(segment))
}

/// The first word of a segment.
fn first_of(segment: usize) -> usize {
    SEGMENT * ((1 << segment) - 1)
}

impl Log {
    /// Ready for a disk of so many bytes.
    fn new(shift: u32, disk_bytes: u64) -> Self {
        let log = Self {
            shift,
            segments: std::array::from_fn(|_| OnceLock::new()),
        };
        log.reach(disk_bytes);
        log
    }

    /// Is ready for a larger disk.
    fn reach(&self, disk_bytes: u64) {
        let last = (disk_bytes.saturating_sub(1) >> self.shift) / 64;
        let (last, _) = place_of(last as usize);
        for (index, segment) in self.segments.iter().enumerate().take(last + 1) {
            let words = SEGMENT << index;
            segment.get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect());
        }
    }

    fn mark(&self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        for (index, mask) in masks(start >> self.shift, (end - 1) >> self.shift) {
            let (segment, index) = place_of(index);
            let segment = self.segments.get(segment).and_then(OnceLock::get);
            let Some(word) = segment.and_then(|words| words.get(index)) else {
                // Behind the end of the disk.
                return;
            };
            // What is set already is not written to: others read it.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Gives out what is set, and clears it.
    fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (segment, words) in self.segments.iter().enumerate() {
            for (index, word) in words.get().into_iter().flatten().enumerate() {
                if word.load(Ordering::Relaxed) != 0 {
                    each(first_of(segment) + index, word.swap(0, Ordering::AcqRel));
                }
            }
        }
    }
}

/// See the module's text.
pub(super) struct Tracking {
    /// What writes are multiples of, less one; and whether there is a log.
    terms: AtomicU32,
    log: ArcSwapOption<Log>,
    bitmaps: Mutex<Bitmaps>,
}

/// All that there are.
#[derive(Default)]
struct Bitmaps {
    list: Vec<Bitmap>,
    /// Whoever saves them has them: they change no more.
    are_given_out: bool,
}

/// What the image says of what it can hold.
#[derive(Clone, Copy)]
struct Room {
    disk_bytes: u64,
    cluster: u64,
    is_raw: bool,
}

impl Tracking {
    /// With no bitmap.
    pub fn new(write_alignment: u32) -> Self {
        Self {
            terms: AtomicU32::new(write_alignment - 1),
            log: ArcSwapOption::empty(),
            bitmaps: Mutex::default(),
        }
    }

    /// What writes are to be multiples of, less one, and whether [`Self::mark`] is to be called.
    pub fn terms(&self) -> (u32, bool) {
        let terms = self.terms.load(Ordering::Relaxed);
        (terms & !RECORDS, terms & RECORDS != 0)
    }

    /// These bytes are about to change.
    #[cold]
    pub fn mark(&self, start: u64, len: u64) {
        if !rule::kept(Rule::ChangeIsRecorded) {
            return;
        }
        if let Some(log) = &*self.log.load() {
            log.mark(start, start.saturating_add(len));
        }
    }

    /// That the disk may be so large, as far as its bitmaps are concerned.
    ///
    /// # Errors
    /// One would have too many bits, or those that are persistent no place in the image.
    pub fn require_room(&self, disk_bytes: u64, cluster: u64) -> Result<(), EngineError> {
        let bitmaps = self.lock();
        let is_fine = |bitmap: &Bitmap| bits_of(bitmap, disk_bytes) > BITS_MAX;
        if bitmaps.list.iter().any(is_fine) || are_too_many(&bitmaps.list, disk_bytes) {
            return Err(EngineError::FineBitmap);
        }
        match have_place(&bitmaps.list, disk_bytes, cluster) {
            true => Ok(()),
            false => Err(EngineError::ManyBitmaps),
        }
    }

    /// Is ready for a larger disk, before anybody sees it.
    pub fn reach(&self, disk_bytes: u64) {
        if let Some(log) = &*self.log.load() {
            log.reach(disk_bytes);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Bitmaps> {
        self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that were given out are used on.
    pub fn go_on(&self) {
        self.lock().are_given_out = false;
    }

    /// All, with what was changed until now.
    fn up_to_date(&self) -> MutexGuard<'_, Bitmaps> {
        let mut bitmaps = self.lock();
        if let Some(log) = &*self.log.load() {
            log.take(|index, word| {
                for bitmap in bitmaps.list.iter_mut().filter(|bitmap| bitmap.records) {
                    bitmap.bits.add_word(log.shift, index, word);
                }
            });
        }
        bitmaps
    }

    /// These are all. To be called while nothing changes the disk.
    ///
    /// # Errors
    /// Others were given out.
    fn put(&self, bitmaps: Vec<Bitmap>, room: &Room) -> Result<(), EngineError> {
        let mut all = self.up_to_date();
        if all.are_given_out {
            return Err(EngineError::Stopped);
        }
        let recording = bitmaps.iter().filter(|bitmap| bitmap.records);
        let finest = recording.map(|bitmap| bitmap.bits.shift()).min();
        let log = self.log.load();
        if log.as_ref().map(|log| log.shift) != finest {
            let new = finest.map(|shift| Log::new(shift, room.disk_bytes));
            self.log.store(new.map(std::sync::Arc::new));
        }
        match finest {
            Some(_) => self.terms.fetch_or(RECORDS, Ordering::AcqRel),
            None => self.terms.fetch_and(!RECORDS, Ordering::AcqRel),
        };
        all.list = bitmaps;
        Ok(())
    }
}

/// Does this to the bitmaps of a disk, or nothing.
fn apply(bitmaps: &mut Vec<Bitmap>, action: &BitmapAction, room: &Room) -> Result<(), BitmapError> {
    match action {
        BitmapAction::Add {
            name,
            granularity,
            is_persistent,
            records,
        } => {
            let bitmap = Bitmap {
                name: name.clone(),
                bits: Bits::new(shift_of(*granularity, room)?),
                records: *records,
                is_persistent: *is_persistent,
            };
            check_name(bitmaps, name)?;
            if bitmaps.len() >= BITMAPS_MAX {
                return Err(BitmapError::TooMany);
            }
            bitmaps.push(bitmap);
            if are_too_many(bitmaps, room.disk_bytes) {
                return Err(BitmapError::ManyBits);
            }
            if *is_persistent {
                check_place(bitmaps, name, room)?;
            }
        }
        BitmapAction::Remove(name) => {
            find(bitmaps, name)?;
            bitmaps.retain(|bitmap| bitmap.name != *name);
        }
        BitmapAction::Clear(name) => find(bitmaps, name)?.bits.clear(),
        BitmapAction::Enable(name) => find(bitmaps, name)?.records = true,
        BitmapAction::Disable(name) => find(bitmaps, name)?.records = false,
        BitmapAction::Merge { target, sources } => {
            let mut merged = find(bitmaps, target)?.bits.clone();
            for source in sources {
                merged.add(&find(bitmaps, source)?.bits);
            }
            find(bitmaps, target)?.bits = merged;
        }
    }
    Ok(())
}

fn find<'a>(bitmaps: &'a mut [Bitmap], name: &str) -> Result<&'a mut Bitmap, BitmapError> {
    let found = bitmaps.iter_mut().find(|bitmap| bitmap.name == name);
    found.ok_or_else(|| BitmapError::NotFound(name.to_owned()))
}

fn check_name(bitmaps: &[Bitmap], name: &str) -> Result<(), BitmapError> {
    if name.is_empty() {
        return Err(BitmapError::NoName);
    }
    if name.len() > NAME_MAX {
        return Err(BitmapError::LongName(name.to_owned()));
    }
    match bitmaps.iter().any(|bitmap| bitmap.name == name) {
        true => Err(BitmapError::Exists(name.to_owned())),
        false => Ok(()),
    }
}

/// What a bit covers, as a power of two.
fn shift_of(asked: Option<u64>, room: &Room) -> Result<u32, BitmapError> {
    let least = room.disk_bytes.div_ceil(BITS_MAX).next_power_of_two();
    let least = least.max(1 << SHIFT_MIN);
    let granularity = asked.unwrap_or_else(|| room.cluster.min(GRANULARITY).max(least));
    let is_usable = granularity.is_power_of_two() && u32::try_from(granularity).is_ok();
    if !is_usable || granularity < 1 << SHIFT_MIN {
        return Err(BitmapError::Granularity);
    }
    match granularity >= least {
        true => Ok(granularity.trailing_zeros()),
        false => Err(BitmapError::Fine { least }),
    }
}

/// Whether the image can hold all that are persistent, this one included.
fn check_place(bitmaps: &[Bitmap], name: &str, room: &Room) -> Result<(), BitmapError> {
    if room.is_raw {
        return Err(BitmapError::Raw);
    }
    if BitmapId::parse(name).is_none() {
        return Err(BitmapError::NoGuid(name.to_owned()));
    }
    match have_place(bitmaps, room.disk_bytes, room.cluster) {
        true => Ok(()),
        false => Err(BitmapError::NoPlace),
    }
}

/// How many bits one has of a disk of so many bytes.
fn bits_of(bitmap: &Bitmap, disk_bytes: u64) -> u64 {
    disk_bytes.div_ceil(1 << bitmap.bits.shift())
}

fn are_too_many(bitmaps: &[Bitmap], disk_bytes: u64) -> bool {
    let bits = bitmaps.iter().map(|bitmap| bits_of(bitmap, disk_bytes));
    bits.fold(0, u64::saturating_add) > ALL_BITS_MAX
}

/// Whether all of this could be done to the bitmaps that an image has, which is not changed.
///
/// # Errors
/// There is no header that can be read.
pub fn check_saved_bitmaps(
    disk: &impl Disk,
    file: FileId,
    actions: &[BitmapAction],
) -> io::Result<Result<(), BitmapError>> {
    let header = saved::read_header(disk, file)?;
    let geometry = header.geometry();
    let room = Room {
        disk_bytes: geometry.disk_size.bytes(),
        cluster: geometry.cluster.bytes(),
        is_raw: false,
    };
    let mut bitmaps = saved::load(disk, file, &header);
    let mut actions = actions.iter();
    Ok(actions.try_for_each(|action| apply(&mut bitmaps, action, &room)))
}

/// Whether an image of such clusters can hold those that are persistent, of a disk of so many
/// bytes.
fn have_place(bitmaps: &[Bitmap], disk_bytes: u64, cluster: u64) -> bool {
    let persistent = bitmaps.iter().filter(|bitmap| bitmap.is_persistent);
    let clusters =
        persistent.map(|bitmap| bits_of(bitmap, disk_bytes).div_ceil(8).div_ceil(cluster));
    Extension::fits(clusters, cluster)
}

impl<D: Disk> Engine<D> {
    /// Of an image that has these.
    pub(crate) fn have_bitmaps(&self, bitmaps: Vec<Bitmap>) {
        // If it is being closed already, none of them is missed.
        let _ = self.tracking.put(bitmaps, &self.room());
    }

    /// All, for whoever saves those that are persistent. Nothing changes the disk any more, nor
    /// them.
    pub(crate) fn all_bitmaps(&self) -> Vec<Bitmap> {
        let mut all = self.tracking.up_to_date();
        all.are_given_out = true;
        all.list.clone()
    }

    fn room(&self) -> Room {
        let geometry = self.geometry();
        Room {
            disk_bytes: self.disk_size().bytes(),
            cluster: geometry.cluster.bytes(),
            is_raw: self.is_raw(),
        }
    }

    /// The bitmaps that there are, with what was changed until now.
    pub fn bitmaps(&self) -> Vec<BitmapInfo> {
        let all = self.tracking.up_to_date();
        all.list.iter().map(Bitmap::info).collect()
    }

    /// What of the disk is set in a bitmap, as the file of one has it.
    pub fn bits_of(&self, name: &str) -> Option<Vec<u8>> {
        let all = self.tracking.up_to_date();
        let bitmap = all.list.iter().find(|bitmap| bitmap.name == name)?;
        Some(bitmap.bits.to_bytes(self.disk_size().bytes()))
    }

    /// Does all of this to the bitmaps of the disk, at one moment, or nothing. Requests are
    /// held for that, as long as those under way and one sync take. Blocks.
    ///
    /// # Errors
    /// See [`BitmapError`]. Nothing has changed then.
    pub fn change_bitmaps(&self, actions: &[BitmapAction]) -> Result<(), BitmapError> {
        if self.is_read_only() {
            return Err(EngineError::ReadOnly.into());
        }
        // What is refused holds nobody up.
        self.changed_bitmaps(actions)?;
        // So that requests wait for little of it.
        self.settle()?;
        let quiet = self.suspend();
        let changed = match quiet {
            Ok(()) => self.change_bitmaps_now(actions),
            Err(error) => Err(error.into()),
        };
        self.resume();
        changed
    }

    /// Whether all of this could be done now.
    ///
    /// # Errors
    /// See [`BitmapError`].
    pub fn check_bitmaps(&self, actions: &[BitmapAction]) -> Result<(), BitmapError> {
        self.changed_bitmaps(actions).map(drop)
    }

    /// The same while requests are held.
    pub(crate) fn change_bitmaps_now(&self, actions: &[BitmapAction]) -> Result<(), BitmapError> {
        let bitmaps = self.changed_bitmaps(actions)?;
        Ok(self.tracking.put(bitmaps, &self.room())?)
    }

    fn changed_bitmaps(&self, actions: &[BitmapAction]) -> Result<Vec<Bitmap>, BitmapError> {
        let room = self.room();
        let mut bitmaps = self.tracking.up_to_date().list.clone();
        for action in actions {
            apply(&mut bitmaps, action, &room)?;
        }
        Ok(bitmaps)
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    #[test]
    fn each_word_has_a_place_of_its_own() {
        assert_eq!(place_of(0), (0, 0));
        assert_eq!(place_of(SEGMENT - 1), (0, SEGMENT - 1));
        assert_eq!(place_of(SEGMENT), (1, 0));
        assert_eq!(place_of(3 * SEGMENT - 1), (1, 2 * SEGMENT - 1));
        assert_eq!(place_of(3 * SEGMENT), (2, 0));
        // Sectors of 2^32 clusters of 64 MiB.
        let last = (1_usize << 58) / 512 / 64 - 1;
        assert!(place_of(last).0 < SEGMENTS);
    }

    #[test]
    fn what_is_marked_is_given_out_once() {
        let log = Log::new(12, 1 << 20);
        log.mark(0, 1);
        log.mark(4095, 4097);
        // Behind the end, until the disk is larger.
        log.mark(8 << 30, (8 << 30) + 1);
        let taken = || {
            let mut taken = Vec::new();
            log.take(|index, word| taken.push((index, word)));
            taken
        };
        assert_eq!(taken(), [(0, 3)]);
        log.reach((8 << 30) + 512);
        log.mark(8 << 30, (8 << 30) + 1);
        assert_eq!(taken(), [((8 << 30) / 4096 / 64, 1)]);
        assert_eq!(taken(), []);
    }
}
