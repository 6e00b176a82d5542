//! What the sectors of a disk may hold, and a load that knows it.

use std::ops::Range;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use smallvec::{SmallVec, smallvec};

use crate::client::{BUFFER, DEPTH, Lane};
use crate::survivors::{Survivors, Witness};

pub const SECTOR: usize = 512;

/// Sectors of a unit of the first half of the disk: small, so that each cluster
/// belongs to all lanes.
const SMALL_UNIT: u64 = 32;

/// Sectors of a unit of the second half: so large that whole clusters can go.
const LARGE_UNIT: u64 = 4096;

/// Version of a sector that reads as zeros.
pub const ZEROS: u32 = 0;

/// The sectors that belong to one lane, up to a limit that need not be the end of the
/// disk. Lanes never touch each other's sectors, so
/// each knows what its own hold; but they share clusters.
pub struct Model {
    lane: u64,
    lanes: u64,
    /// Of all sectors of the disk: the versions of which it holds one.
    sectors: Vec<SmallVec<[u32; 3]>>,
    /// What they may hold if the daemon were killed now.
    survivors: Survivors,
    next_version: u32,
    rng: SmallRng,
    busy: Vec<Busy>,
    /// No request may give space back.
    keeps_space: bool,
    /// One that is being taken.
    picture: Option<Picture>,
}

/// What each sector of the disk may hold as it was at one moment of a span of time, as far as
/// sectors are those of one lane.
pub struct Picture(Vec<SmallVec<[u32; 3]>>);

/// A request in flight.
struct Busy {
    tag: usize,
    start: u64,
    count: u64,
    kind: Kind,
    /// From [`Survivors`]: of a change, its number; of a flush, what it covers.
    mark: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write(u32),
    Discard,
    Zeroes,
    Flush,
}

/// The bytes of a sector in a version.
pub fn content(sector: u64, version: u32) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if version != ZEROS {
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            let mixed = (sector << 32 | u64::from(version))
                .wrapping_add(index as u64)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&mixed.to_le_bytes());
        }
    }
    bytes
}

impl Model {
    /// Of an empty disk.
    pub fn new(lane: usize, lanes: usize, sectors: u64, seed: u64) -> Self {
        Self {
            lane: lane as u64,
            lanes: lanes as u64,
            sectors: vec![smallvec![ZEROS]; sectors as usize],
            survivors: Survivors::new(sectors),
            next_version: 1,
            rng: SmallRng::seed_from_u64(seed ^ (lane as u64) << 32),
            busy: Vec::new(),
            keeps_space: false,
            picture: None,
        }
    }

    /// The span of time begins in which a picture of the disk is taken.
    pub fn begin_picture(&mut self) {
        self.picture = Some(Picture(self.sectors.clone()));
    }

    /// That ends: what begins from now on is not in the picture.
    pub fn end_picture(&mut self) -> Picture {
        self.picture.take().expect("one is being taken")
    }

    /// Checks what a picture shows of this lane's sectors.
    pub fn check_picture(&self, picture: &Picture, bytes: &[u8]) {
        let sectors = picture.0.iter().zip(bytes.chunks_exact(SECTOR));
        for (sector, (possible, found)) in (0..).zip(sectors) {
            let holds = |version: &u32| content(sector, *version) == found;
            assert!(
                !self.owns(sector) || possible.iter().any(holds),
                "sector {sector} holds none of the versions {possible:?}: {:x?}",
                &found[..16]
            );
        }
    }

    /// From now on no request gives space back.
    pub fn keep_space(&mut self) {
        self.keeps_space = true;
    }

    fn owns(&self, sector: u64) -> bool {
        let sectors = self.sectors.len() as u64;
        let half = sectors / 2;
        let unit = if sector < half {
            sector / SMALL_UNIT
        } else {
            (sector - half) / LARGE_UNIT
        };
        sector < sectors && unit % self.lanes == self.lane
    }

    /// A range of own sectors.
    fn pick(&mut self) -> (u64, u64) {
        let half = self.sectors.len() as u64 / 2;
        loop {
            // Each time anew: the few large units may all be busy.
            let (first, unit) = if self.rng.random_bool(0.6) {
                (0, SMALL_UNIT)
            } else {
                (half, LARGE_UNIT)
            };
            let units = half / unit / self.lanes;
            let start = first + (self.rng.random_range(0..units) * self.lanes + self.lane) * unit;
            let end = (start + unit).min(self.sectors.len() as u64);
            let mut pick = || self.rng.random_range(start..end);
            let (a, b) = (pick(), pick());
            let (a, b) = if self.rng.random_bool(0.2) {
                (start, end - 1)
            } else {
                (a.min(b), a.max(b))
            };
            let overlaps = |busy: &Busy| busy.start <= b && a < busy.start + busy.count;
            if !self.busy.iter().any(overlaps) {
                return (a, b - a + 1);
            }
        }
    }

    fn pick_kind(&mut self) -> Kind {
        match self.rng.random_range(0..100) {
            0..35 => Kind::Read,
            35..75 => {
                self.next_version += 1;
                Kind::Write(self.next_version)
            }
            75..85 if self.keeps_space => Kind::Read,
            75..85 => Kind::Discard,
            85..95 => Kind::Zeroes,
            _ => Kind::Flush,
        }
    }

    /// Has up to [`DEPTH`] requests in flight until `count` are done, then none.
    pub fn load(&mut self, lane: &mut Lane, count: usize) {
        for _ in 0..count {
            while self.busy.len() == DEPTH {
                self.collect(lane, 1);
            }
            self.start(lane);
        }
        self.finish(lane);
    }

    /// Starts one request.
    pub fn start(&mut self, lane: &mut Lane) {
        let free = |tag: &usize| self.busy.iter().all(|busy| busy.tag != *tag);
        let tag = (0..DEPTH).find(free).expect("there is room");
        let (start, mut count) = self.pick();
        let kind = self.pick_kind();
        if matches!(kind, Kind::Read | Kind::Write(_)) {
            count = count.min((BUFFER / SECTOR) as u64);
        }
        // Before anybody can see the request.
        let mark = match kind {
            Kind::Read => 0,
            Kind::Flush => self.survivors.flush_starts(),
            Kind::Write(version) => self.may_become(start..start + count, version),
            Kind::Discard | Kind::Zeroes => self.may_become(start..start + count, ZEROS),
        };
        let (offset, len) = (start * SECTOR as u64, count * SECTOR as u64);
        match kind {
            Kind::Read => lane.read(offset, len as usize, tag),
            Kind::Write(version) => {
                let sectors = start..start + count;
                let bytes: Vec<u8> = sectors.flat_map(|at| content(at, version)).collect();
                lane.write(offset, &bytes, tag);
            }
            Kind::Discard => lane.discard(offset, len, tag),
            Kind::Zeroes => {
                let may_unmap = !self.keeps_space && self.rng.random();
                lane.write_zeroes(offset, len, may_unmap, tag);
            }
            Kind::Flush => lane.flush(tag),
        }
        self.busy.push(Busy {
            tag,
            start,
            count,
            kind,
            mark,
        });
    }

    /// From now on the sectors may hold this version.
    fn may_become(&mut self, sectors: Range<u64>, version: u32) -> u64 {
        let now = Some(&mut self.sectors);
        let picture = self.picture.as_mut().map(|picture| &mut picture.0);
        for all in now.into_iter().chain(picture) {
            for possible in &mut all[sectors.start as usize..sectors.end as usize] {
                if !possible.contains(&version) {
                    possible.push(version);
                }
            }
        }
        self.survivors.change_starts(sectors, version)
    }

    /// Waits for ends and checks what they bring.
    pub fn collect(&mut self, lane: &mut Lane, min: usize) {
        for (tag, result) in lane.wait(min) {
            assert_eq!(result, 0, "request {tag} failed");
            self.ended(lane, tag);
        }
    }

    /// Waits for all that is in flight.
    pub fn finish(&mut self, lane: &mut Lane) {
        while !self.busy.is_empty() {
            self.collect(lane, 1);
        }
    }

    /// How many requests are in flight.
    pub fn in_flight(&self) -> usize {
        self.busy.len()
    }

    /// What is in flight will not end any more; it may have been done or not.
    pub fn forget_in_flight(&mut self) {
        self.busy.clear();
    }

    /// A request has failed, which only those may that can need space. It may have
    /// been done in part.
    pub fn failed(&mut self, tag: usize) {
        let kind = self.take_busy(tag).kind;
        let may_fail = matches!(kind, Kind::Write(_) | Kind::Zeroes);
        assert!(may_fail, "{kind:?} failed");
    }

    fn take_busy(&mut self, tag: usize) -> Busy {
        let index = self.busy.iter().position(|busy| busy.tag == tag);
        self.busy.swap_remove(index.expect("a request ends once"))
    }

    /// A request has ended well.
    pub fn ended(&mut self, lane: &Lane, tag: usize) {
        let busy = self.take_busy(tag);
        let sectors = busy.start..busy.start + busy.count;
        let version = match busy.kind {
            // It may have had an effect or not.
            Kind::Discard => return,
            Kind::Flush => return self.survivors.flush_ends(busy.mark),
            Kind::Read => {
                let bytes = lane.bytes(tag, busy.count as usize * SECTOR);
                return self.check(busy.start, &bytes);
            }
            Kind::Write(version) => version,
            Kind::Zeroes => ZEROS,
        };
        for sector in sectors.clone() {
            self.sectors[sector as usize] = smallvec![version];
        }
        self.survivors.change_ends(sectors, busy.mark);
    }

    /// From now on the daemon promises, or not, that what is completed is stable.
    pub fn set_write_through(&mut self, on: bool) {
        self.survivors.write_through = on;
    }

    /// From now on somebody is told of all that happens to the sectors.
    #[allow(dead_code, reason = "tests/replay uses it")]
    pub fn set_witness(&mut self, witness: Witness) {
        self.survivors.set_witness(witness);
    }

    /// All that has ended is stable, for the image was closed.
    #[allow(dead_code, reason = "tests/replay uses it")]
    pub fn closed(&mut self) {
        let all = self.survivors.flush_starts();
        self.survivors.flush_ends(all);
    }

    /// The daemon was killed: sectors hold what was flushed, or anything later.
    /// Returns how many of its sectors may have lost a completed change.
    pub fn killed(&mut self) -> usize {
        self.forget_in_flight();
        let mut at_risk = 0;
        for (sector, possible) in self.sectors.iter_mut().enumerate() {
            let survivors = self.survivors.of(sector);
            at_risk += usize::from(!survivors.iter().all(|version| possible.contains(version)));
            *possible = survivors;
        }
        at_risk
    }

    /// All sectors have been checked since the daemon was killed. What was read then
    /// is in the file, and no other kill takes it away.
    pub fn survived(&mut self) {
        let held = |possible: &SmallVec<[u32; 3]>| possible[0];
        self.survivors.reset(self.sectors.iter().map(held));
    }

    /// Checks what sectors were found to hold, as far as they are this lane's; from
    /// then on they hold no other of the possible versions.
    pub fn check(&mut self, start: u64, bytes: &[u8]) {
        for (sector, found) in (start..).zip(bytes.chunks_exact(SECTOR)) {
            if !self.owns(sector) {
                continue;
            }
            let possible = &mut self.sectors[sector as usize];
            let held = possible
                .iter()
                .copied()
                .find(|&version| content(sector, version) == found);
            let Some(version) = held else {
                panic!(
                    "sector {sector} holds none of the versions {possible:?}: {:x?}",
                    &found[..16]
                );
            };
            if possible.len() > 1 {
                *possible = smallvec![version];
                // What a discard was seen to have done is as good as written.
                self.survivors.is_seen(sector, version);
            }
        }
    }
}
