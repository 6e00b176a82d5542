//! Dirty bitmaps: what those of an image have to say, and what they may say, once it is closed.
//!
//! Each that was made, or that the image came with, is known here by what was changed since. An
//! image that says that it has bitmaps has all of these, each of them misses no change that was
//! answered, nor any of which there is something to be read, and has nothing set where nobody has
//! asked for a change. After a crash there are none. Bits are read without a line of the code
//! under test.

use std::ops::Range;

use md5::{Digest, Md5};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

use super::checker::Image;
use super::disk::SimDisk;
use super::file::SECTOR;
use super::pattern::Value;
use super::session::{Ask, Failure, InFlight, Session, World};
use super::view::View;
use crate::ploop::{BitmapAction, Engine};
use crate::storage::FileId;

/// Bitmaps of an image, at most.
const BITMAPS_MAX: usize = 3;

/// Sectors of the guest's disk.
type Sectors = Range<u64>;

/// What there is to know of one.
#[derive(Clone, Debug)]
struct Bitmap {
    id: [u8; 16],
    /// Sectors that a bit covers.
    granularity: u64,
    /// Changed, and answered.
    must: Vec<Sectors>,
    /// Asked for, or more.
    may: Vec<Sectors>,
    /// Requests with a lower tag came before it was made or cleared.
    since: u64,
    /// So did writes of values up to this one.
    since_value: Value,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Bitmaps {
    all: Vec<Bitmap>,
    /// The image could not be marked as in use again, which counts as a failed sync: it may say
    /// that it was closed before what was done since.
    are_void: bool,
    made: u8,
}

/// What the file has of one.
struct Found {
    id: [u8; 16],
    sectors: u64,
    granularity: u64,
    bits: Vec<bool>,
}

/// The bitmaps of a file.
struct Extension {
    all: Vec<Found>,
    /// Where their clusters start in the file.
    clusters: Vec<u64>,
}

impl Session {
    /// Nothing is under way.
    pub(super) fn change_bitmaps(&self, world: &mut World) -> Result<(), Failure> {
        if self.engine.is_read_only() || self.engine.is_raw() || world.rng.random() {
            return Ok(());
        }
        let held: Vec<_> = self.requests.values().flat_map(asked).collect();
        let since = (self.next_tag, Value(world.next_value));
        world
            .bitmaps
            .change(&self.engine, &mut world.rng, since, &held)
    }
}

impl Bitmaps {
    /// The image comes with one; nothing that was written has a value above this one.
    pub fn come_with(
        &mut self,
        (id, granularity): ([u8; 16], u64),
        is_set: Vec<Sectors>,
        since_value: Value,
    ) {
        self.all.push(Bitmap {
            id,
            granularity,
            may: is_set.clone(),
            must: is_set,
            since: 0,
            since_value,
        });
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// There are none any more.
    pub fn end(&mut self) {
        self.all.clear();
        self.are_void = false;
    }

    /// See the field.
    pub fn are_void(&mut self) {
        self.are_void = true;
    }

    /// The image was opened.
    ///
    /// # Errors
    /// There are others than it had, and nothing had gone wrong.
    pub fn are_loaded(&mut self, engine: &Engine<SimDisk>, is_faulty: bool) -> Result<(), Failure> {
        self.are_void = false;
        let loaded: Vec<String> = engine.bitmaps().into_iter().map(|it| it.name).collect();
        let had = self.all.len();
        self.all.retain(|it| loaded.contains(&name_of(it.id)));
        if loaded.len() != self.all.len() || (self.all.len() < had && !is_faulty) {
            return Err(format!(
                "bitmaps: the image had {had}, and was opened with {loaded:?}"
            ));
        }
        for bitmap in &mut self.all {
            bitmap.since = 0;
            if is_faulty {
                // What cannot be read has everything set.
                bitmap.may.push(0..u64::MAX);
            }
        }
        Ok(())
    }

    /// Something is done to them, while nothing is under way.
    ///
    /// # Errors
    /// The engine refuses it.
    pub fn change(
        &mut self,
        engine: &Engine<SimDisk>,
        rng: &mut SmallRng,
        (next_tag, value): (u64, Value),
        held: &[Sectors],
    ) -> Result<(), Failure> {
        let chosen = self.all.choose(rng).map(|it| it.id);
        let action = match chosen {
            Some(id) if rng.random_ratio(1, 3) => BitmapAction::Clear(name_of(id)),
            Some(id) if rng.random_ratio(1, 6) => BitmapAction::Remove(name_of(id)),
            Some(id) if self.all.len() > 1 && rng.random_ratio(1, 4) => BitmapAction::Merge {
                target: name_of(id),
                sources: vec![name_of(self.all[0].id)],
            },
            _ if self.all.len() < BITMAPS_MAX => self.another(rng),
            _ => return Ok(()),
        };
        let done = engine.change_bitmaps_now(std::slice::from_ref(&action));
        done.map_err(|error| format!("bitmaps: {action:?} is refused: {error}"))?;
        let begin = |bitmap: &mut Bitmap| {
            bitmap.must.clear();
            bitmap.may = held.to_vec();
            (bitmap.since, bitmap.since_value) = (next_tag, value);
        };
        let first = self.all.first().cloned();
        match action {
            BitmapAction::Add {
                name, granularity, ..
            } => {
                let mut bitmap = Bitmap {
                    id: [self.made; 16],
                    granularity: granularity.unwrap_or(0) / SECTOR as u64,
                    must: Vec::new(),
                    may: Vec::new(),
                    since: 0,
                    since_value: value,
                };
                debug_assert_eq!(name, name_of(bitmap.id));
                begin(&mut bitmap);
                self.all.push(bitmap);
            }
            BitmapAction::Clear(name) => {
                self.all
                    .iter_mut()
                    .filter(|it| name_of(it.id) == name)
                    .for_each(begin);
            }
            BitmapAction::Remove(name) => self.all.retain(|it| name_of(it.id) != name),
            BitmapAction::Merge { target, .. } => {
                let mut all = self.all.iter_mut();
                if let (Some(target), Some(source)) =
                    (all.find(|it| name_of(it.id) == target), first)
                {
                    target.must.extend(source.must.iter().cloned());
                    // In granules of the source.
                    let whole = |it: &Sectors| {
                        let unit = source.granularity;
                        it.start / unit * unit..it.end.div_ceil(unit).saturating_mul(unit)
                    };
                    target.may.extend(source.may.iter().map(whole));
                    target.may.extend(source.must.iter().map(whole));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn another(&mut self, rng: &mut SmallRng) -> BitmapAction {
        self.made += 1;
        BitmapAction::Add {
            name: name_of([self.made; 16]),
            granularity: [512, 4096, 65536, 1 << 20].choose(rng).copied(),
            is_persistent: true,
            records: true,
        }
    }

    /// A request may change these.
    pub fn change_begins(&mut self, sectors: &Sectors) {
        for bitmap in &mut self.all {
            bitmap.may.push(sectors.clone());
        }
    }

    /// It has.
    pub(super) fn change_ended(&mut self, tag: u64, request: &InFlight, cluster_sectors: u64) {
        for bitmap in &mut self.all {
            if tag >= bitmap.since {
                bitmap.must.extend(changed(request, cluster_sectors));
            }
        }
    }

    /// Judges what the image, as it is in this view, says of them. `found` are the values of
    /// sectors of the guest's disk.
    ///
    /// # Errors
    /// What is wrong.
    pub fn judge(
        &self,
        view: &View<'_>,
        (top, image): (FileId, &Image),
        found: impl Iterator<Item = (u64, Option<Value>)> + Clone,
    ) -> Result<(), Failure> {
        let Some(at) = image.extension.filter(|_| !self.are_void) else {
            return Ok(());
        };
        let extension = read(view, top, (image, at)).map_err(|wrong| format!("I12: {wrong}"))?;
        if extension.all.len() != self.all.len() {
            return Err(format!(
                "I12: the image has {} bitmaps, and should have {}",
                extension.all.len(),
                self.all.len()
            ));
        }
        for known in &self.all {
            let its = extension.all.iter().find(|it| it.id == known.id);
            let Some(its) = its else {
                return Err(format!("I12: bitmap {} is not there", name_of(known.id)));
            };
            if (its.sectors, its.granularity) != (image.sectors, known.granularity) {
                return Err(format!(
                    "I12: a bitmap is of {} sectors, and a bit of {}",
                    its.sectors, its.granularity
                ));
            }
            known.compare(&its.bits, image.sectors, found.clone())?;
        }
        Ok(())
    }

    /// The image is closed, or cut: what it has of them is what there is from now on.
    ///
    /// # Errors
    /// What is wrong with what it has.
    pub fn settle(&mut self, view: &View<'_>, top: FileId, image: &Image) -> Result<(), Failure> {
        let Some(at) = image.extension.filter(|_| !self.are_void) else {
            self.end();
            return Ok(());
        };
        for its in read(view, top, (image, at))?.all {
            let unit = its.granularity;
            let set = (0..).zip(&its.bits).filter(|(_, is_set)| **is_set);
            let set: Vec<Sectors> = set.map(|(at, _)| at * unit..(at + 1) * unit).collect();
            for known in self.all.iter_mut().filter(|it| it.id == its.id) {
                known.must.clone_from(&set);
                known.may.clone_from(&set);
            }
        }
        Ok(())
    }
}

impl Bitmap {
    fn compare(
        &self,
        bits: &[bool],
        sectors: u64,
        found: impl Iterator<Item = (u64, Option<Value>)>,
    ) -> Result<(), Failure> {
        let granules = |range: &Sectors| {
            let end = range.end.min(sectors).div_ceil(self.granularity);
            range.start / self.granularity..end
        };
        let is_set = |granule: u64| bits.get(granule as usize).copied().unwrap_or(false);
        let missed = self.must.iter().find(|it| !granules(it).all(is_set));
        if let Some(missed) = missed {
            return Err(format!(
                "bitmaps: sectors {missed:?} were changed, and a bitmap misses that"
            ));
        }
        for (sector, value) in found {
            let is_newer = value.is_some_and(|value| value > self.since_value);
            if is_newer && sector < sectors && !is_set(sector / self.granularity) {
                return Err(format!(
                    "bitmaps: sector {sector} reads {value:?}, and a bitmap misses that"
                ));
            }
        }
        let mut left = bits.to_vec();
        for range in self.may.iter().chain(&self.must) {
            let range = granules(range);
            let range = range.start as usize..(range.end as usize).min(left.len());
            if let Some(left) = left.get_mut(range) {
                left.fill(false);
            }
        }
        match left.iter().position(|is_set| *is_set) {
            Some(granule) => Err(format!(
                "bitmaps: bit {granule} is set, and nobody has asked for a change there"
            )),
            None => Ok(()),
        }
    }
}

/// Of a request that may be done, or is.
pub(super) fn asked(request: &InFlight) -> Vec<Sectors> {
    match &request.ask {
        Ask::Write { start } => {
            let bytes = request.memory.as_ref().map_or(0, |it| it.to_vec().len());
            let range = start.0..start.0 + (bytes / SECTOR) as u64;
            Vec::from_iter([range])
        }
        Ask::Discard { ranges } | Ask::WriteZeroes { ranges, .. } => ranges
            .iter()
            .map(|it| it.start.0..it.start.0 + it.count.0)
            .collect(),
        Ask::Read { .. } | Ask::Flush => Vec::new(),
    }
}

/// Of one that ended well. What a discard does to a part of a cluster is open.
fn changed(request: &InFlight, cluster_sectors: u64) -> Vec<Sectors> {
    let asked = asked(request).into_iter();
    match request.ask {
        Ask::Discard { .. } => asked
            .map(|it| {
                let start = it.start.next_multiple_of(cluster_sectors);
                start..(it.end / cluster_sectors * cluster_sectors).max(start)
            })
            .filter(|it| !it.is_empty())
            .collect(),
        _ => asked.collect(),
    }
}

fn name_of(id: [u8; 16]) -> String {
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    [&id[..4], &id[4..6], &id[6..8], &id[8..10], &id[10..]]
        .map(hex)
        .join("-")
}

/// The first byte of the clusters of bitmaps, and the one behind the last.
///
/// # Errors
/// What is wrong with them.
pub fn place(view: &View<'_>, top: FileId, image: &Image) -> Result<Option<Range<u64>>, Failure> {
    let Some(at) = image.extension else {
        return Ok(None);
    };
    let clusters = read(view, top, (image, at))?.clusters;
    let first = clusters.iter().min().copied().unwrap_or(at);
    let last = clusters.iter().max().copied().unwrap_or(at);
    Ok(Some(first..last + image.cluster))
}

/// Reads the extension that starts at this byte, and its bitmaps.
fn read(view: &View<'_>, top: FileId, (image, at): (&Image, u64)) -> Result<Extension, Failure> {
    const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
    const DIRTY_BITMAP: u64 = 0x2038_5FAE_252C_B34A;
    let len = image.cluster as usize;
    let bytes = view.read(top, at, len);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    if word(0) != MAGIC || bytes[8..24] != *Md5::digest(&bytes[24..]).as_slice() {
        return Err(format!("there is no format extension at {at:#x}"));
    }
    let mut clusters = vec![at];
    let mut all = Vec::new();
    let mut next = 24;
    while word(next) == DIRTY_BITMAP {
        let head = next + 24;
        let (sectors, granularity) = (word(head), u64::from(half(head + 24)));
        let entries = half(head + 28) as usize;
        let mut bits = Vec::new();
        for entry in (0..entries).map(|index| word(head + 32 + 8 * index)) {
            let part = match entry {
                0 | 1 => vec![[0, 0xff][entry as usize]; len],
                sector => {
                    clusters.push(sector * SECTOR as u64);
                    view.read(top, sector * SECTOR as u64, len)
                }
            };
            let each = part
                .iter()
                .flat_map(|byte| (0..8).map(move |at| byte >> at & 1 == 1));
            bits.extend(each);
        }
        let count = sectors.div_ceil(granularity.max(1)) as usize;
        if bits.len() < count {
            return Err("a bitmap is shorter than the disk".to_owned());
        }
        bits.truncate(count);
        let id = bytes[head + 8..head + 24].try_into().unwrap();
        all.push(Found {
            id,
            sectors,
            granularity,
            bits,
        });
        next = head + (half(next + 16) as usize).next_multiple_of(8);
    }
    let mut sorted = clusters.clone();
    sorted.sort_unstable();
    sorted.dedup();
    let is_cluster = |at: &u64| {
        *at >= image.data_start
            && (at - image.data_start).is_multiple_of(image.cluster)
            && at + image.cluster <= view.len(top)
            && !image.map.contains(at)
    };
    match sorted.len() == clusters.len() && sorted.iter().all(is_cluster) {
        true => Ok(Extension { all, clusters }),
        false => Err(format!("bitmaps are at {clusters:x?}, and others may be")),
    }
}
