//! What a simulated disk looks like at first, how the engine is set up for it,
//! and what is done to it. All of it random.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use md5::{Digest, Md5};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

use super::bitmap::Bitmaps;
use super::checker::{CLOSED_WITH_EXTENSION, Image};
use super::disk::{Faults, Medium, SimDisk};
use super::file::SECTOR;
use super::pattern::{self, Value};
use super::view::View;
use crate::format::{ClusterSize, Sector};
use crate::ploop::{Chain, Level, OnEnospc, Options};
use crate::storage::FileId;

/// BAT entries of an image, at most: six md pages and a part of the next.
pub const ENTRIES_MAX: u32 = 6136;

/// Deltas of a chain, at most.
pub const DELTAS_MAX: usize = 8;

/// Where requests go: around the border between two runners, between the first two md
/// pages, and, if there are more, in two of these that are no neighbours of others. The
/// rest of the disk is never touched, so that the disk is small. The last one is at the
/// end of the disk.
const BORDERS: [&[u32]; 2] = [&[64, 1008], &[64, 1008, 3200, 6128]];

/// The sectors that a scenario uses, counted through.
#[derive(Clone, Debug)]
pub struct Layout {
    islands: Vec<Range<u64>>,
}

impl Layout {
    /// Ranges of sectors of the guest's disk.
    pub fn islands(&self) -> &[Range<u64>] {
        &self.islands
    }

    /// Those that lie inside a disk of so many sectors.
    pub fn islands_within(&self, sectors: u64) -> Vec<Range<u64>> {
        let islands = self.islands.iter();
        islands
            .filter(|island| island.end <= sectors)
            .cloned()
            .collect()
    }

    /// How many sectors there are in all.
    pub fn len(&self) -> u64 {
        self.islands
            .iter()
            .map(|island| island.end - island.start)
            .sum()
    }

    /// The number of a sector of an island, counted from the first island on.
    pub fn index(&self, sector: u64) -> Option<u64> {
        let mut before = 0;
        for island in &self.islands {
            if island.contains(&sector) {
                return Some(before + sector - island.start);
            }
            before += island.end - island.start;
        }
        None
    }

    /// All sectors, in order.
    pub fn sectors(&self) -> impl Iterator<Item = u64> {
        self.islands.iter().flat_map(Clone::clone)
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Of the top's format.
    pub version: u8,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Of the guest's disk, at present.
    pub disk_sectors: u64,
    /// What it may become, the next one first.
    pub sizes_to_come: Vec<u64>,
    /// Deltas, the top included.
    pub levels: usize,
    /// The first of them is a raw image. It may be the top, too.
    pub plain_base: bool,
    /// Where requests go.
    pub layout: Layout,
    /// What the host is like when nothing goes wrong.
    pub medium: Medium,
    /// Number of queues.
    pub queues: usize,
    /// Of the disks of the lower deltas, base first: a disk may have grown since.
    lower_sectors: Vec<u64>,
    /// Of their formats.
    lower_versions: Vec<u8>,
    /// What a raw top has behind the end of the disk, in sectors: nobody's business.
    behind: u64,
    /// Snapshots are made of the disk.
    pub snapshots: bool,
    /// Guest clusters that a lower delta has.
    lower: BTreeSet<u64>,
    /// The top is closed and has a format extension when it is opened first.
    extension: bool,
    /// The last cluster of the top's file is there in part, and holds something.
    odd_end: bool,
}

impl Scenario {
    /// One deck of cards.
    pub fn random(rng: &mut SmallRng, mix: Mix) -> Self {
        let chains = mix.chains;
        let version = random_version(rng);
        let cluster: u64 = *[32 << 10, 32 << 10, 64 << 10].choose(rng).unwrap();
        let per_cluster = cluster / SECTOR as u64;
        let short = rng.random_range(0..per_cluster);
        let levels = if chains && (rng.random() || mix.merges) {
            rng.random_range(2..=DELTAS_MAX)
        } else {
            1
        };
        let plain_base = rng.random_ratio(1, if levels > 1 { 3 } else { 8 });
        // A raw file is as long as its disk.
        let is_large = !plain_base && rng.random_ratio(1, 3);
        let entries = if is_large { ENTRIES_MAX } else { 1016 };
        let disk_sectors = u64::from(entries) * per_cluster - short;
        let mut islands = Vec::new();
        for border in BORDERS[usize::from(is_large)] {
            let before = u64::from(border - rng.random_range(1..=3));
            let after = u64::from(border + rng.random_range(1..=8));
            let end = (after * per_cluster).min(disk_sectors);
            islands.push(before * per_cluster..end);
        }
        let is_plain = plain_base && levels == 1;
        let sizes_to_come = random_growth(rng, mix.grows, is_plain, disk_sectors, per_cluster);
        let mut old_end = disk_sectors;
        for &size in &sizes_to_come {
            // What was behind the end, and the new end.
            let behind = (old_end + rng.random_range(1..=3 * per_cluster)).min(size);
            islands.push(old_end..behind);
            let end = size - rng.random_range(0..=size - behind).min(2 * per_cluster);
            if behind < end && end < size {
                islands.push(end..size);
            }
            old_end = size;
        }
        let scenario = Self {
            version,
            cluster,
            disk_sectors,
            sizes_to_come,
            levels,
            plain_base,
            layout: Layout { islands },
            medium: Medium::default(),
            queues: rng.random_range(1..=3),
            lower_sectors: random_sizes(rng, levels - 1, disk_sectors),
            lower_versions: (1..levels).map(|_| random_version(rng)).collect(),
            behind: if rng.random() {
                rng.random_range(1..20)
            } else {
                0
            },
            snapshots: mix.snapshots,
            lower: BTreeSet::new(),
            extension: version == 2 && rng.random_ratio(1, 4),
            odd_end: rng.random_ratio(1, 4),
        };
        let metadata_len = 64 + 4 * u64::from(entries);
        // Of a device with sectors of 4 KiB nothing smaller can be written.
        let (sector, write_alignment) = *[(512, 512), (512, 512), (512, 4096), (4096, 4096)]
            .choose(rng)
            .unwrap();
        let medium = Medium {
            sector,
            write_alignment,
            copies_on_write: rng.random_ratio(1, 3),
            first_writable: scenario.top(),
            metadata_len: if scenario.is_plain_top() {
                0
            } else {
                metadata_len
            },
            copy_len: cluster,
            has_ring: rng.random(),
            can_clone: rng.random(),
            tells_holes: rng.random(),
            // From a copy, so that a seed goes on giving the image that it gave.
            has_stable_writes: rng.clone().random_ratio(3, 4),
            ..Medium::default()
        };
        Self { medium, ..scenario }
    }

    /// The delta that is written to.
    pub fn top(&self) -> FileId {
        FileId((self.levels - 1) as u8)
    }

    /// BAT entries of the top.
    pub fn top_entries(&self) -> u32 {
        self.entries_of(self.levels - 1)
    }

    /// Whether the image has no BAT.
    pub fn is_plain_top(&self) -> bool {
        self.levels == 1 && self.plain_base
    }

    /// Whether a discarded cluster becomes a hole.
    pub fn can_unmap(&self) -> bool {
        self.levels == 1 && !self.plain_base
    }

    /// What the lowest delta is.
    pub fn base(&self) -> &'static str {
        match self.version_of(0) {
            _ if self.plain_base => "plain",
            1 => "version 1",
            _ => "version 2",
        }
    }

    /// Whether the disk may become larger.
    pub fn can_grow(&self) -> bool {
        !self.sizes_to_come.is_empty()
    }

    /// The disk has become, or is to become, of this size.
    pub fn set_size(&mut self, sectors: u64) {
        self.disk_sectors = sectors;
        self.sizes_to_come.retain(|size| *size > sectors);
    }

    /// The top, which is `image`, has become a lower delta.
    pub fn push_level(&mut self, image: &Image) {
        let is_plain = self.is_plain_top();
        self.lower_sectors.push(self.disk_sectors);
        self.lower_versions.push(self.version);
        let clusters = 0..u64::from(self.top_entries());
        let per_cluster = self.cluster / SECTOR as u64;
        let has = |guest: &u64| image.offset(guest * per_cluster).is_some();
        self.lower.extend(clusters.filter(has));
        if is_plain {
            self.version = 2;
        }
        self.levels += 1;
        self.extension = false;
        self.odd_end = false;
        self.behind = 0;
    }

    /// What a raw top has behind its disk goes when the disk grows.
    pub fn forget_behind(&mut self) {
        self.behind = 0;
    }

    /// What a raw top has behind the end of the disk.
    pub fn bytes_behind(&self, view: &View<'_>) -> Vec<u8> {
        let end = self.disk_sectors * SECTOR as u64;
        view.read(FileId(0), end, self.behind as usize * SECTOR)
    }

    /// The length in bytes of the file of a raw image, once it was opened.
    pub fn plain_len(&self) -> u64 {
        let behind = if self.is_plain_top() { self.behind } else { 0 };
        (self.sectors_of(0) + behind) * SECTOR as u64
    }

    /// For the engine.
    pub fn chain(&self) -> Chain {
        let mut levels = vec![Level::Ploop; self.levels];
        if self.plain_base {
            levels[0] = Level::Plain {
                size: Sector(self.sectors_of(0)),
                cluster: ClusterSize::from_bytes(self.cluster).unwrap(),
            };
        }
        Chain { levels }
    }

    /// For the engine: another set each time.
    pub fn options(&self, rng: &mut SmallRng) -> Options {
        let delays_ms = [0, 1, 20, 100];
        let mut options = Options::default();
        options.runners = rng.random_range(1..=2);
        options.max_queues = self.queues;
        options.queue_depth = *[1, 2, 64].choose(rng).unwrap();
        options.writeback_delay = Duration::from_millis(*delays_ms.choose(rng).unwrap());
        options.smallest_clone = 0;
        options.preallocation = self.cluster * rng.random_range(0..=4);
        if rng.random_ratio(1, 3) {
            options.on_enospc = OnEnospc::Report;
        }
        options
    }

    /// Makes the files. `value` gives what the sectors of lower deltas hold.
    pub fn prepare(
        &mut self,
        disk: &SimDisk,
        rng: &mut SmallRng,
        mut value: impl FnMut() -> Value,
    ) {
        for level in 0..self.levels {
            let file = FileId(level as u8);
            if level == 0 && self.plain_base {
                self.prepare_plain(disk, rng, &mut value);
                continue;
            }
            disk.prepare(file, 0, &self.header(level));
            let data_start = self.data_start(level);
            // The last sector before the data, so that the file is long enough.
            disk.prepare(file, data_start - SECTOR as u64, &[0; SECTOR]);
            if file != self.top() {
                self.fill_lower(disk, file, rng, &mut value);
                continue;
            }
            if self.extension {
                disk.prepare(file, data_start, &self.extension_bytes());
            }
            if self.can_grow() {
                self.fill_behind_end(disk);
            }
            if self.odd_end {
                let sectors = rng.random_range(1..self.cluster as usize / SECTOR);
                let end = disk.live_len(file);
                disk.prepare(file, end, &vec![0xdd; sectors * SECTOR]);
            }
        }
    }

    /// Maps the last cluster, of which only a part belongs to the disk: behind it there is
    /// what no guest has written.
    fn fill_behind_end(&self, disk: &SimDisk) {
        let per_cluster = self.cluster / SECTOR as u64;
        let inside = self.disk_sectors % per_cluster;
        let last = self.disk_sectors / per_cluster;
        if inside == 0 {
            return;
        }
        let top = self.top();
        let offset = disk.live_len(top);
        let mut bytes = vec![0xcc; self.cluster as usize];
        bytes[..inside as usize * SECTOR].fill(0);
        disk.prepare(top, offset, &bytes);
        let unit = if self.version == 1 {
            SECTOR as u64
        } else {
            self.cluster
        };
        let entry = (offset / unit) as u32;
        disk.prepare(top, 64 + 4 * last, &entry.to_le_bytes());
    }

    /// What the format extension of the top is, if it has one: its cluster and, behind
    /// it, one with the bits of a dirty bitmap. Neither is in the BAT.
    fn extension_bytes(&self) -> Vec<u8> {
        const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
        const DIRTY_BITMAP: u64 = 0x2038_5FAE_252C_B34A;
        let bits_at = (self.data_start(self.levels - 1) + self.cluster) / SECTOR as u64;
        let mut features = Vec::new();
        // The feature: flags, the size of what follows; then the bitmap: size, name,
        // granularity, number of entries, and the one entry.
        for word in [DIRTY_BITMAP, 0, 32 + 8, self.disk_sectors, 7, 7] {
            features.extend(word.to_le_bytes());
        }
        features.extend(128_u32.to_le_bytes());
        features.extend(1_u32.to_le_bytes());
        features.extend(bits_at.to_le_bytes());
        features.resize(self.cluster as usize - 24, 0);
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend(Md5::digest(&features).as_slice());
        bytes.extend(features);
        bytes.resize(2 * self.cluster as usize, 0xee);
        bytes
    }

    /// The bitmap of that: every byte of bits is 0xee.
    pub fn tell_bitmap(&self, bitmaps: &mut Bitmaps, last_value: u64) {
        if !self.extension || self.is_plain_top() {
            return;
        }
        let mut id = [0; 16];
        (id[0], id[8]) = (7, 7);
        let granules = 0..self.disk_sectors.div_ceil(128);
        let set = granules.filter(|granule| 0xee_u32 >> (granule % 8) & 1 == 1);
        let set = set.map(|granule| granule * 128..(granule + 1) * 128);
        bitmaps.come_with((id, 128), set.collect(), Value(last_value));
    }

    /// Whether a lower delta has the cluster.
    pub fn lower_has(&self, guest: u32) -> bool {
        self.lower.contains(&u64::from(guest))
    }

    /// A raw base, seen as an image that maps every cluster to itself.
    pub fn plain_image(&self) -> Image {
        Image {
            cluster: self.cluster,
            sectors: self.sectors_of(0),
            data_start: 0,
            closed: false,
            extension: None,
            map: Vec::new(),
            plain: true,
        }
    }

    fn version_of(&self, level: usize) -> u8 {
        let lower = self.lower_versions.get(level);
        lower.copied().unwrap_or(self.version)
    }

    /// As many as the disk of the level needs; of the top up to [`ENTRIES_MAX`].
    fn entries_of(&self, level: usize) -> u32 {
        let per_cluster = self.cluster / SECTOR as u64;
        self.sectors_of(level).div_ceil(per_cluster) as u32
    }

    fn data_start(&self, level: usize) -> u64 {
        let bat_end = 64 + 4 * u64::from(self.entries_of(level));
        match self.version_of(level) {
            1 => bat_end.next_multiple_of(SECTOR as u64),
            _ => bat_end.next_multiple_of(self.cluster),
        }
    }

    /// Of the disk of a level, in sectors.
    fn sectors_of(&self, level: usize) -> u64 {
        let lower = self.lower_sectors.get(level);
        lower.copied().unwrap_or(self.disk_sectors)
    }

    fn header(&self, level: usize) -> Vec<u8> {
        let sectors = self.sectors_of(level);
        let mut header = vec![0; 64];
        let (signature, first_block) = match self.version_of(level) {
            1 => (b"WithoutFreeSpace", 0),
            _ => (
                b"WithouFreSpacExt",
                self.data_start(level) as u32 / SECTOR as u32,
            ),
        };
        header[..16].copy_from_slice(signature);
        let words = [
            (16, 2),
            (20, 16),
            (24, (sectors / (16 * 32)) as u32),
            (28, (self.cluster / SECTOR as u64) as u32),
            (32, self.entries_of(level)),
            (36, sectors as u32),
            (48, first_block),
            (52, 1),
        ];
        for (at, word) in words {
            header[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
        }
        if self.extension && level + 1 == self.levels {
            let at = self.data_start(level) / SECTOR as u64;
            header[44..48].copy_from_slice(&CLOSED_WITH_EXTENSION.to_le_bytes());
            header[56..64].copy_from_slice(&at.to_le_bytes());
        }
        header
    }

    /// The guest clusters of the islands that a level has.
    fn clusters(&self, level: usize) -> Vec<u64> {
        let per_cluster = self.cluster / SECTOR as u64;
        let end = self.sectors_of(level).div_ceil(per_cluster);
        let islands = self.layout.islands().iter();
        islands
            .flat_map(|island| island.start / per_cluster..island.end.div_ceil(per_cluster))
            .filter(|cluster| *cluster < end)
            .collect()
    }

    fn fill_cluster(
        &mut self,
        disk: &SimDisk,
        file: FileId,
        guest: u64,
        offset: u64,
        value: Value,
    ) {
        let sector = guest * self.cluster / SECTOR as u64;
        let mut bytes = vec![0; self.cluster as usize];
        pattern::fill(&mut bytes, value, sector);
        disk.prepare(file, offset, &bytes);
        self.lower.insert(guest);
    }

    fn fill_lower(
        &mut self,
        disk: &SimDisk,
        file: FileId,
        rng: &mut SmallRng,
        value: &mut impl FnMut() -> Value,
    ) {
        let level = usize::from(file.0);
        let mut offset = self.data_start(level);
        let unit = if self.version_of(level) == 1 {
            SECTOR as u64
        } else {
            self.cluster
        };
        for guest in self.clusters(level) {
            if rng.random_ratio(1, 3) {
                let value = match rng.random_ratio(1, 6) {
                    true => Value::ZEROS,
                    false => value(),
                };
                self.fill_cluster(disk, file, guest, offset, value);
                let entry = (offset / unit) as u32;
                disk.prepare(file, 64 + 4 * guest, &entry.to_le_bytes());
                offset += self.cluster;
            }
        }
    }

    fn prepare_plain(
        &mut self,
        disk: &SimDisk,
        rng: &mut SmallRng,
        value: &mut impl FnMut() -> Value,
    ) {
        for guest in self.clusters(0) {
            if rng.random_ratio(1, 2) {
                self.fill_cluster(disk, FileId(0), guest, guest * self.cluster, value());
            }
        }
        let end = self.sectors_of(0) * SECTOR as u64;
        if self.is_plain_top() {
            let bytes = vec![0xbb; self.behind as usize * SECTOR];
            disk.prepare(FileId(0), end, &bytes);
        } else {
            disk.prepare(FileId(0), end - SECTOR as u64, &[0; SECTOR]);
        }
    }
}

fn random_version(rng: &mut SmallRng) -> u8 {
    if rng.random_ratio(1, 4) { 1 } else { 2 }
}

/// Each at most that of the level above. The last sectors of a disk are those of
/// an island.
fn random_sizes(rng: &mut SmallRng, levels: usize, sectors: u64) -> Vec<u64> {
    let mut sizes: Vec<u64> = (0..levels)
        .map(|_| sectors - u64::from(rng.random::<bool>()) * rng.random_range(0..700))
        .collect();
    sizes.sort_unstable();
    sizes
}

/// Sizes of a disk that grows now and then, in whole clusters. The BAT of some takes more
/// clusters than that of the one before.
fn random_growth(
    rng: &mut SmallRng,
    always: bool,
    is_plain: bool,
    sectors: u64,
    per_cluster: u64,
) -> Vec<u64> {
    let mut sizes = Vec::new();
    let mut size = sectors;
    while sizes.len() < 3 && (always || rng.random_ratio(1, 2)) {
        let more = match is_plain {
            true => rng.random_range(1..40),
            false => *[1, 20, 1100, 9000, 12_000].choose(rng).unwrap(),
        };
        size = (size + more * per_cluster).next_multiple_of(per_cluster);
        sizes.push(size);
    }
    sizes
}

/// What the driver may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A new request.
    Read,
    /// Data, or zeros now and then.
    Write,
    /// A barrier.
    Flush,
    /// The guest has no use for a range.
    Discard,
    /// Zeros, with or without giving space back.
    WriteZeroes,
    /// An actor's turn.
    PollQueue,
    /// An actor's turn.
    PollRunner,
    /// An actor's turn.
    PollMd,
    /// An operation of the host takes effect or completes.
    Disk,
    /// Time passes.
    Time,
    /// The write cache is turned off or on.
    WriteThrough,
    /// Suspend, or resume.
    Suspend,
    /// The host gets space, or loses it.
    Space,
    /// Parked requests of a queue have to end.
    GiveUp,
    /// The disk becomes larger, in two steps, or not after the first one.
    Grow,
    /// A snapshot comes one step further.
    Snapshot,
    /// The end of a level comes one step nearer.
    Merge,
    /// Space is given back, a step of it.
    Compact,
}

impl Action {
    /// Whether it only lets what is under way go on.
    pub fn is_a_turn(self) -> bool {
        matches!(
            self,
            Self::PollQueue | Self::PollRunner | Self::PollMd | Self::Disk | Self::Time
        )
    }
}

/// Which lives are lived: any, or of all that there are only some.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mix {
    /// Half of the images have lower deltas, or none has.
    pub chains: bool,
    /// What goes wrong on the host; `None`: anything, or mostly nothing.
    pub trouble: Option<HostTrouble>,
    /// Disks always become larger; else some do.
    pub grows: bool,
    /// Snapshots are made of disks; else of none.
    pub snapshots: bool,
    /// Levels go while disks are in use; else none does.
    pub merges: bool,
    /// Space is given back; else of none.
    pub compacts: bool,
}

/// What may be wrong with a host, and nothing else then.
#[derive(Clone, Copy, Debug)]
pub enum HostTrouble {
    /// Pages of the BAT fail, now and then or every other time.
    Pages,
    /// Syncs of stable writes fail, and may lose what others have written.
    StableWrites,
}

/// How often a thread is preempted at a point where it can be: one time in so many, and
/// at a few points, which are others each time, far more often.
#[derive(Clone, Copy, Debug)]
pub struct Preemption {
    usually: u32,
    /// Which points are hot, and how often there.
    hot: u64,
    when_hot: u32,
    /// How often in a session.
    pub at_most: u32,
}

impl Preemption {
    /// Of so many points one is hot.
    const HOT_ONE_IN: u64 = 8;

    fn random(rng: &mut SmallRng) -> Option<Self> {
        if rng.random_ratio(1, 5) {
            return None;
        }
        Some(Self {
            usually: *[40, 200, 1000].choose(rng).unwrap(),
            hot: rng.random_range(0..Self::HOT_ONE_IN),
            when_hot: *[2, 5, 20].choose(rng).unwrap(),
            at_most: *[2, 8, 24].choose(rng).unwrap(),
        })
    }

    /// One time in so many at this point.
    pub fn one_in(self, at: &str) -> u32 {
        let mixed = at.bytes().fold(0_u64, |mixed, byte| {
            mixed.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        if mixed % Self::HOT_ONE_IN == self.hot {
            self.when_hot
        } else {
            self.usually
        }
    }
}

/// How a generation goes: some actions often, some never, so that generations
/// differ more than their random choices alone would make them.
#[derive(Clone, Debug)]
pub struct Profile {
    actions: Vec<(Action, u32)>,
    /// Requests in flight, at most.
    pub depth: usize,
    /// Sectors of a request, at most.
    pub sectors: u64,
    /// What goes wrong on the host.
    pub faults: Faults,
    /// The host's space is short.
    pub is_tight: bool,
    /// Actors get their turn only when something has woken them, as threads do;
    /// else at any time.
    pub is_lazy: bool,
    /// The image is opened for reading only.
    pub read_only: bool,
    /// How often the process may be killed while the guest goes on; `None`: nothing
    /// outlives it.
    pub deaths: Option<u32>,
    /// How often a thread is preempted where it can be.
    pub preempted: Option<Preemption>,
    /// One time in so many a request goes where the last one went.
    pub local: u32,
    /// One time in so many actions what a cut would leave is judged.
    pub imagined: u32,
    /// Actions until the end.
    pub actions_left: u32,
}

impl Profile {
    /// Another one each time.
    pub fn random(rng: &mut SmallRng, cluster: u64, mix: Mix) -> Self {
        use Action::*;
        let mut weight = |common: u32| *[0, common, common, 4 * common].choose(rng).unwrap();
        let mut actions = vec![
            (Read, weight(2)),
            (Write, 4 + weight(8)),
            (Flush, weight(1)),
            (Discard, weight(2)),
            (WriteZeroes, weight(2)),
            (Time, 1 + weight(2)),
        ];
        actions.extend([(PollQueue, 6), (PollRunner, 4), (PollMd, 4), (Disk, 16)]);
        let is_tight = rng.random_ratio(1, 6);
        if rng.random_ratio(2, 5) {
            actions.push((WriteThrough, *[1, 4].choose(rng).unwrap()));
        }
        if rng.random_ratio(1, 8) {
            actions.push((Suspend, 1));
        }
        if is_tight {
            actions.extend([(Space, 1), (GiveUp, 1)]);
        }
        if mix.grows || rng.random_ratio(1, 2) {
            actions.push((Grow, *[1, 2, 8].choose(rng).unwrap()));
        }
        if mix.snapshots {
            actions.push((Snapshot, *[4, 12, 24].choose(rng).unwrap()));
        }
        if mix.merges {
            actions.push((Merge, *[4, 12, 24].choose(rng).unwrap()));
        }
        if mix.compacts {
            actions.push((Compact, *[2, 6, 12].choose(rng).unwrap()));
            actions.push((Discard, 2));
        }
        let faults = random_faults(rng, mix.trouble);
        if faults.stable_write + faults.full_stable_write > 0.0 {
            actions.extend([(WriteThrough, 1), (Write, 8)]);
        }
        if faults.page > 0.0 {
            actions.extend([(WriteThrough, 3), (Flush, 2), (Discard, 2), (Write, 8)]);
        }
        let sectors = cluster / SECTOR as u64;
        Self {
            actions,
            depth: rng.random_range(1..=24),
            sectors: *[8, sectors, 3 * sectors].choose(rng).unwrap(),
            faults,
            is_tight,
            is_lazy: rng.random(),
            read_only: rng.random_ratio(1, 24),
            deaths: rng.random_ratio(1, 3).then(|| rng.random_range(0..3)),
            local: if faults.page > 0.0 { 2 } else { 4 },
            preempted: Preemption::random(rng),
            imagined: *[32, 128, 512].choose(rng).unwrap(),
            actions_left: *[60, 200, 200, 600].choose(rng).unwrap(),
        }
    }

    /// The next action.
    pub fn choose(&self, rng: &mut SmallRng) -> Action {
        let chosen = self.actions.choose_weighted(rng, |(_, weight)| *weight);
        chosen.map_or(Action::Disk, |(action, _)| *action)
    }

    /// Whether requests may fail.
    pub fn has_trouble(&self) -> bool {
        self.is_tight || self.faults != Faults::default()
    }
}

fn faults_of(trouble: HostTrouble, rng: &mut SmallRng) -> Faults {
    let mut faults = Faults::default();
    match trouble {
        HostTrouble::Pages => faults.page = *[0.1, 0.5, 0.5].choose(rng).unwrap(),
        HostTrouble::StableWrites => faults.stable_write = *[0.05, 0.2].choose(rng).unwrap(),
    }
    faults
}

fn random_faults(rng: &mut SmallRng, trouble: Option<HostTrouble>) -> Faults {
    let mut faults = Faults::default();
    let drawn = match rng.random_range(0..12) {
        0..8 => return trouble.map_or(faults, |trouble| faults_of(trouble, rng)),
        8 | 9 => Some(HostTrouble::Pages),
        10 => Some(HostTrouble::StableWrites),
        _ => None,
    };
    if let Some(trouble) = trouble.or(drawn) {
        return faults_of(trouble, rng);
    }
    let rate = *[0.01, 0.1].choose(rng).unwrap();
    let all = [
        &mut faults.read,
        &mut faults.write,
        &mut faults.zero,
        &mut faults.allocate,
        &mut faults.sync,
        &mut faults.stable_write,
        &mut faults.full_stable_write,
    ];
    for fault in all {
        if rng.random_ratio(1, 3) {
            *fault = rate;
        }
    }
    faults
}
