//! One simulated file: what readers see, and what a power cut may leave.
//!
//! The unit is the sector of 512 bytes, which a cut leaves whole, as it does larger
//! ones if the device has such: of these all parts are of the same moment. Every sector
//! has a stable content and a list of newer ones that no sync has covered; a cut
//! leaves any one of them, for each sector on its own: writes are torn, holes
//! are punched in part, and a disk's cache may have kept an earlier version
//! than the last. The length is such a value, too, and is lost or kept
//! independently of the data, as in a file system that orders nothing.
//!
//! Knows nothing of operations in flight, nor of what the file is for.

use std::collections::BTreeMap;

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use smallvec::SmallVec;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// The content of a sector: a name in [`Contents`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ContentId(u32);

impl ContentId {
    /// All zero.
    pub const ZEROS: Self = Self(0);

    /// Its place among all contents.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Which operation changed something; they are numbered in the order in which
/// they were submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpId(pub u32);

/// The contents of all sectors that anybody remembers, each stored once.
pub struct Contents {
    sectors: Vec<[u8; SECTOR]>,
}

impl Contents {
    /// Zeros only.
    pub fn new() -> Self {
        Self {
            sectors: vec![[0; SECTOR]],
        }
    }

    /// A name for this content.
    pub fn add(&mut self, bytes: &[u8; SECTOR]) -> ContentId {
        if bytes.iter().all(|&byte| byte == 0) {
            return ContentId::ZEROS;
        }
        self.sectors.push(*bytes);
        ContentId(self.sectors.len() as u32 - 1)
    }

    /// The bytes.
    pub fn get(&self, id: ContentId) -> &[u8; SECTOR] {
        &self.sectors[id.0 as usize]
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sectors.len()
    }
}

#[derive(Clone, Copy, Debug)]
struct Version<T> {
    op: OpId,
    value: T,
    /// A sync failed on it: the kernel takes it for written and no later sync
    /// writes it again.
    given_up: bool,
}

type Versions<T> = SmallVec<[Version<T>; 2]>;

/// Something of which a cut may leave one of several values.
#[derive(Clone, Debug, Default)]
struct Unstable<T> {
    /// Oldest first.
    versions: Versions<T>,
}

impl<T: Copy> Unstable<T> {
    fn push(&mut self, op: OpId, value: T) {
        self.versions.push(Version {
            op,
            value,
            given_up: false,
        });
    }

    /// The newest value that is stable after a sync of what `covers` says;
    /// values older than it are forgotten.
    fn sync(&mut self, covers: impl Fn(OpId) -> bool) -> Option<T> {
        let newest = self
            .versions
            .iter()
            .rposition(|version| covers(version.op) && !version.given_up)?;
        let value = self.versions[newest].value;
        self.versions.drain(..=newest);
        Some(value)
    }

    fn give_up(&mut self, covers: impl Fn(OpId) -> bool) {
        for version in &mut self.versions {
            version.given_up |= covers(version.op);
        }
    }

    fn newest(&self, kept: impl Fn(OpId) -> bool) -> Option<T> {
        let kept = self.versions.iter().rev().find(|version| kept(version.op));
        kept.map(|version| version.value)
    }

    /// One of the values, or `None` for the stable one.
    fn any(&self, rng: &mut SmallRng) -> Option<T> {
        let index = rng.random_range(0..=self.versions.len());
        self.versions.get(index).map(|version| version.value)
    }
}

/// Some of all operations.
#[derive(Clone, Copy, Debug)]
pub enum Chosen {
    /// Every one, or none.
    All(bool),
    /// One alone, or all others.
    One(OpId, bool),
    /// Those before one, or those behind it.
    Side(OpId, bool),
    /// Each by a toss of a coin, which falls alike each time that it is asked.
    Tossed {
        /// Which coins these are.
        salt: u64,
        /// How many of 65,536 are chosen.
        share: u32,
    },
}

impl Chosen {
    /// Whether it is among them.
    pub fn has(self, op: OpId) -> bool {
        match self {
            Self::All(all) => all,
            Self::One(one, is_it) => (op == one) == is_it,
            Self::Side(one, before) => op != one && (op < one) == before,
            Self::Tossed { salt, share } => {
                let mixed = (salt ^ u64::from(op.0)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
                ((mixed >> 48) as u32) < share
            }
        }
    }
}

/// What a power cut leaves of the things that no sync has covered.
pub enum Survivors {
    /// The newest of what these operations did.
    Ops(Chosen),
    /// Of each sector, with this probability, one of its newer contents.
    Sectors(f64),
    /// Everything below this byte and nothing from there on; or the opposite.
    Region {
        /// Where data starts.
        border: u64,
        /// Whether it is the part below that survives.
        below: bool,
    },
}

/// What a cut leaves of a file: it is stable.
#[derive(Clone, Debug)]
pub struct Left {
    /// The content of each sector.
    pub sectors: Vec<ContentId>,
    /// In bytes.
    pub len: u64,
}

/// See the module's text.
#[derive(Clone, Default)]
pub struct SimFile {
    live: Vec<ContentId>,
    live_len: u64,
    stable: Vec<ContentId>,
    stable_len: u64,
    sectors: BTreeMap<u32, Unstable<ContentId>>,
    len: Unstable<u64>,
}

impl SimFile {
    /// Length in bytes, as readers see it.
    pub fn len(&self) -> u64 {
        self.live_len
    }

    /// The shortest length that a cut now could leave.
    pub fn certain_len(&self) -> u64 {
        let versions = self.len.versions.iter().map(|version| version.value);
        versions.fold(self.stable_len, u64::min)
    }

    /// The content of a sector, as readers see it; zeros beyond the end.
    pub fn sector(&self, sector: u64) -> ContentId {
        let content = self.live.get(sector as usize);
        content.copied().unwrap_or(ContentId::ZEROS)
    }

    /// The contents of all sectors, as readers see them.
    pub fn sectors(&self) -> &[ContentId] {
        &self.live
    }

    /// Whether a cut could leave this content in a sector, and another one as well.
    pub fn may_become(&self, sector: u64, content: ContentId) -> bool {
        let Some(unstable) = self.sectors.get(&(sector as u32)) else {
            return false;
        };
        let mut versions = unstable.versions.iter();
        let stable = self.stable.get(sector as usize).copied();
        stable.unwrap_or(ContentId::ZEROS) == content
            || versions.any(|version| version.value == content)
    }

    /// Whether something would be lost if the power went now and nothing
    /// survived.
    pub fn is_unsynced(&self) -> bool {
        !self.sectors.is_empty() || !self.len.versions.is_empty()
    }

    /// Operations that changed something which no sync has covered, in order.
    pub fn unsynced_ops(&self) -> Vec<OpId> {
        let sectors = self.sectors.values().flat_map(|sector| &sector.versions);
        let ops = sectors.map(|version| version.op);
        let mut ops: Vec<OpId> = ops
            .chain(self.len.versions.iter().map(|version| version.op))
            .collect();
        ops.sort_unstable();
        ops.dedup();
        ops
    }

    /// Changes one sector, and makes the file longer if it lies beyond the end.
    pub fn write(&mut self, op: OpId, sector: u64, content: ContentId) {
        self.extend(op, (sector + 1) * SECTOR as u64);
        self.set(op, sector, content);
    }

    /// Makes one sector inside the file read as zeros.
    pub fn zero(&mut self, op: OpId, sector: u64) {
        if sector < self.live.len() as u64 {
            self.set(op, sector, ContentId::ZEROS);
        }
    }

    /// Makes the file at least `len` bytes long.
    pub fn extend(&mut self, op: OpId, len: u64) {
        if len > self.live_len {
            self.change_len(op, len);
        }
    }

    /// Makes the file `len` bytes long; what is cut off reads as zeros should it
    /// come back.
    pub fn set_len(&mut self, op: OpId, len: u64) {
        for sector in len.div_ceil(SECTOR as u64)..self.live.len() as u64 {
            self.set(op, sector, ContentId::ZEROS);
        }
        if len != self.live_len {
            self.change_len(op, len);
        }
    }

    fn change_len(&mut self, op: OpId, len: u64) {
        debug_assert!(len.is_multiple_of(SECTOR as u64), "lengths are in sectors");
        self.live_len = len;
        let sectors = (len / SECTOR as u64) as usize;
        self.live.resize(sectors, ContentId::ZEROS);
        if self.stable.len() < sectors {
            self.stable.resize(sectors, ContentId::ZEROS);
        }
        self.len.push(op, len);
    }

    fn set(&mut self, op: OpId, sector: u64, content: ContentId) {
        let live = &mut self.live[sector as usize];
        if *live == content && content == ContentId::ZEROS {
            // Zeros over zeros: nothing that a cut could tell apart, unless an
            // older version could come back.
            if !self.sectors.contains_key(&(sector as u32)) {
                return;
            }
        }
        *live = content;
        let unstable = self.sectors.entry(sector as u32).or_default();
        unstable.push(op, content);
    }

    /// Everything that the operations in `covers` did is stable now.
    pub fn sync(&mut self, covers: impl Fn(OpId) -> bool) {
        let stable = &mut self.stable;
        self.sectors.retain(|&sector, unstable| {
            if let Some(content) = unstable.sync(&covers) {
                stable[sector as usize] = content;
            }
            !unstable.versions.is_empty()
        });
        if let Some(len) = self.len.sync(&covers) {
            self.stable_len = len;
        }
    }

    /// A sync has failed: of what `covers` says, `written` has become stable all
    /// the same, and the rest will not by any later sync.
    pub fn fail_sync(&mut self, covers: impl Fn(OpId) -> bool, written: impl Fn(OpId) -> bool) {
        self.sync(|op| covers(op) && written(op));
        for unstable in self.sectors.values_mut() {
            unstable.give_up(&covers);
        }
        self.len.give_up(&covers);
    }

    /// The power goes and comes back: this is what is left.
    pub fn settle(&mut self, left: Left) {
        self.stable = left.sectors;
        self.stable_len = left.len;
        self.sectors.clear();
        self.len.versions.clear();
        self.live.clone_from(&self.stable);
        self.live_len = self.stable_len;
    }

    /// What a cut now leaves. `whole` is what the device writes at once, in bytes.
    pub fn after_cut(&self, survivors: &Survivors, whole: usize, rng: &mut SmallRng) -> Left {
        let mut sectors = self.stable.clone();
        if whole > SECTOR {
            let per_whole = (whole / SECTOR) as u32;
            self.cut_wholes(&mut sectors, survivors, per_whole, rng);
        } else {
            self.cut_sectors(&mut sectors, survivors, rng);
        }
        let len = match survivors {
            Survivors::Ops(kept) => self.len.newest(|op| kept.has(op)),
            Survivors::Sectors(_) | Survivors::Region { .. } => self.len.any(rng),
        };
        let len = len.unwrap_or(self.stable_len);
        sectors.resize((len / SECTOR as u64) as usize, ContentId::ZEROS);
        Left { sectors, len }
    }

    /// Of every sector of the device, what it was after one of the operations, or none.
    fn cut_wholes(
        &self,
        stable: &mut [ContentId],
        survivors: &Survivors,
        per_whole: u32,
        rng: &mut SmallRng,
    ) {
        let mut last_ops: BTreeMap<u32, Option<OpId>> = BTreeMap::new();
        let mut all_ops: BTreeMap<u32, Vec<OpId>> = BTreeMap::new();
        for (&sector, unstable) in &self.sectors {
            let ops = all_ops.entry(sector / per_whole).or_default();
            ops.extend(unstable.versions.iter().map(|version| version.op));
        }
        for (whole, ops) in all_ops {
            let newest = ops.iter().copied().max();
            let start = u64::from(whole * per_whole) * SECTOR as u64;
            let last = match survivors {
                Survivors::Ops(kept) => ops.iter().copied().filter(|op| kept.has(*op)).max(),
                Survivors::Sectors(p) if rng.random_bool(*p) => ops.choose(rng).copied(),
                Survivors::Sectors(_) => None,
                Survivors::Region { border, below } => {
                    newest.filter(|_| (start < *border) == *below)
                }
            };
            last_ops.insert(whole, last);
        }
        for (&sector, unstable) in &self.sectors {
            if let Some(last) = last_ops[&(sector / per_whole)]
                && let Some(content) = unstable.newest(|op| op <= last)
            {
                stable[sector as usize] = content;
            }
        }
    }

    fn cut_sectors(&self, stable: &mut [ContentId], survivors: &Survivors, rng: &mut SmallRng) {
        for (&sector, unstable) in &self.sectors {
            let content = match survivors {
                Survivors::Ops(kept) => unstable.newest(|op| kept.has(op)),
                Survivors::Sectors(p) => rng.random_bool(*p).then(|| unstable.any(rng)).flatten(),
                Survivors::Region { border, below } => {
                    let is_below = u64::from(sector) * (SECTOR as u64) < *border;
                    (is_below == *below)
                        .then(|| unstable.newest(|_| true))
                        .flatten()
                }
            };
            if let Some(content) = content {
                stable[sector as usize] = content;
            }
        }
    }

    /// Moves what the file holds into a fresh store of contents; to be called
    /// when nothing is unsynced.
    pub fn repack(&mut self, from: &Contents, to: &mut Contents) {
        debug_assert!(!self.is_unsynced());
        for content in &mut self.stable {
            *content = to.add(from.get(*content));
        }
        self.live.clone_from(&self.stable);
    }
}
