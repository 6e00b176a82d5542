//! What sectors may hold after the daemon has been killed: the last flushed value,
//! or that of any later change (I3, I5).

use std::collections::VecDeque;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use crate::model::ZEROS;

/// What happens to the sectors. A number is that of a change, or what
/// [`Survivors::flush_starts`] has returned.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    ChangeStarts {
        change: u64,
        sectors: Range<u64>,
        version: u32,
    },
    ChangeEnds(u64),
    FlushStarts(u64),
    FlushEnds(u64),
}

/// Who is told of each event: before a request is submitted, and when its end is known.
pub type Witness = Box<dyn Fn(Event) + Send>;

/// A change of a sector that may be what survives.
#[derive(Clone, Copy)]
struct Given {
    /// Changes are numbered in the order in which they start.
    change: u64,
    version: u32,
}

/// A change that has ended, and that no flush covers yet.
struct Ended {
    sectors: Range<u64>,
    change: u64,
}

/// See the module's text. Changes of the same sector must not overlap in time.
pub struct Survivors {
    /// Of each sector: what is stable, and all that may follow it, in order.
    sectors: Vec<SmallVec<[Given; 4]>>,
    next_change: u64,
    ended: VecDeque<Ended>,
    /// How many changes have ended and are covered.
    covered: u64,
    /// Changes are stable when they end.
    pub write_through: bool,
    witness: Option<Witness>,
}

impl Survivors {
    /// Of an empty disk.
    pub fn new(sectors: u64) -> Self {
        let mut new = Self {
            sectors: Vec::new(),
            next_change: 1,
            ended: VecDeque::new(),
            covered: 0,
            write_through: false,
            witness: None,
        };
        new.reset((0..sectors).map(|_| ZEROS));
        new
    }

    /// From now on somebody is told of all that happens.
    pub fn set_witness(&mut self, witness: Witness) {
        self.witness = Some(witness);
    }

    fn tell(&self, event: impl FnOnce() -> Event) {
        if let Some(witness) = &self.witness {
            witness(event());
        }
    }

    /// Sectors hold just these versions, and that is stable.
    pub fn reset(&mut self, versions: impl Iterator<Item = u32>) {
        let given = |version| Given { change: 0, version };
        self.sectors = versions.map(|version| smallvec![given(version)]).collect();
        self.covered += self.ended.len() as u64;
        self.ended.clear();
    }

    /// Returns the number of the change.
    pub fn change_starts(&mut self, sectors: Range<u64>, version: u32) -> u64 {
        let change = self.next_change;
        self.next_change += 1;
        self.tell(|| Event::ChangeStarts {
            change,
            sectors: sectors.clone(),
            version,
        });
        for given in &mut self.sectors[sectors.start as usize..sectors.end as usize] {
            given.push(Given { change, version });
        }
        change
    }

    pub fn change_ends(&mut self, sectors: Range<u64>, change: u64) {
        self.push_ended(sectors, change);
        if self.write_through {
            self.flush_ends(self.flush_starts());
        }
    }

    /// A sector was seen to hold that version, while no change of it was under way.
    pub fn is_seen(&mut self, sector: u64, version: u32) {
        let change = self.change_starts(sector..sector + 1, version);
        // Not `change_ends`: when a discard is stable is only said of flushes.
        let sectors = sector..sector + 1;
        self.push_ended(sectors, change);
    }

    fn push_ended(&mut self, sectors: Range<u64>, change: u64) {
        self.tell(|| Event::ChangeEnds(change));
        self.ended.push_back(Ended { sectors, change });
    }

    /// Returns what [`Self::flush_ends`] is to be told.
    pub fn flush_starts(&self) -> u64 {
        let until = self.covered + self.ended.len() as u64;
        self.tell(|| Event::FlushStarts(until));
        until
    }

    /// A flush that covers the first `until` changes that have ended is over.
    pub fn flush_ends(&mut self, until: u64) {
        while self.covered < until {
            let Ended { sectors, change } = self.ended.pop_front().expect("all are kept");
            self.covered += 1;
            for given in &mut self.sectors[sectors.start as usize..sectors.end as usize] {
                given.retain(|given| given.change >= change);
            }
        }
        self.tell(|| Event::FlushEnds(until));
    }

    /// The versions of which a sector may hold one.
    pub fn of(&self, sector: usize) -> SmallVec<[u32; 3]> {
        let mut versions: SmallVec<[u32; 3]> = SmallVec::new();
        for given in &self.sectors[sector] {
            if !versions.contains(&given.version) {
                versions.push(given.version);
            }
        }
        versions
    }
}

#[test]
fn survivors_are_what_was_flushed_and_what_came_later() {
    let mut survivors = Survivors::new(2);
    let first = survivors.change_starts(0..2, 1);
    survivors.change_ends(0..2, first);
    let flush = survivors.flush_starts();
    let second = survivors.change_starts(1..2, ZEROS);
    survivors.change_ends(1..2, second);
    survivors.change_starts(1..2, 3);
    assert_eq!(survivors.of(1)[..], [ZEROS, 1, 3]);
    survivors.flush_ends(flush);
    assert_eq!(survivors.of(0)[..], [1]);
    assert_eq!(survivors.of(1)[..], [1, ZEROS, 3]);
    survivors.write_through = true;
    survivors.change_ends(0..0, 0);
    assert_eq!(survivors.of(1)[..], [ZEROS, 3]);
}
