//! Requests of the guest: which are asked, where they go, and what the model hears of their ends.
//!
//! Knows nothing of the engine's threads but the queues that take them.

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use smallvec::{SmallVec, smallvec};

use super::{Failure, Session, World, WriteThrough};
use crate::format::{GuestCluster, Sector};
use crate::ploop::rule::{self, Rule};
use crate::ploop::{Command, Done, EngineError, Request, SectorRange};
use crate::sim::cases::Case;
use crate::sim::file::SECTOR;
use crate::sim::memory::Memory;
use crate::sim::model::{ChangeId, Flush, Read};
use crate::sim::pattern::{self, Value};
use crate::sim::scenario::Action;
use crate::storage::Segments;

pub enum Kind {
    Read { read: Read, first: u64 },
    Change { id: ChangeId, mode: Option<u32> },
    Flush { flush: Flush, has_work: bool },
}

/// A request under way.
pub struct InFlight {
    pub queue: usize,
    pub kind: Kind,
    pub ask: Ask,
    pub memory: Option<Memory>,
    /// It came in this suspension.
    pub held: Option<u32>,
    /// It came after a sync was known to have failed.
    pub after_failed_sync: bool,
    /// It came when a page of the BAT had failed, nobody had been told, and nobody else
    /// was about to be: the number of that failure.
    pub after_failed_page: Option<u32>,
}

/// What a request asks for: it may have to be asked again, of another process.
#[derive(Clone, Debug)]
pub enum Ask {
    Read {
        start: Sector,
    },
    Write {
        start: Sector,
    },
    Flush,
    Discard {
        ranges: SmallVec<[SectorRange; 1]>,
    },
    WriteZeroes {
        ranges: SmallVec<[SectorRange; 1]>,
        unmap: bool,
    },
}

impl Ask {
    pub fn command(&self, memory: Option<&Memory>, rng: &mut SmallRng) -> Command {
        let mut data = || {
            let piece = random_piece(rng);
            memory.map_or_else(Segments::new, |memory| memory.segments(piece))
        };
        match self.clone() {
            Self::Read { start } => Command::Read {
                start,
                data: data(),
            },
            Self::Write { start } => Command::Write {
                start,
                data: data(),
            },
            Self::Flush => Command::Flush,
            Self::Discard { ranges } => Command::Discard { ranges },
            Self::WriteZeroes { ranges, unmap } => Command::WriteZeroes { ranges, unmap },
        }
    }
}

impl Session {
    pub(super) fn push(
        &mut self,
        world: &mut World,
        max: u64,
        action: Action,
    ) -> Result<(), Failure> {
        let queue = world.rng.random_range(0..self.queue_count());
        if self.queue(queue).is_none() {
            return Ok(());
        }
        let (kind, memory, ask) = match action {
            Action::Read => {
                let range = self.choose_range(world, max);
                self.new_read(world, &range)
            }
            Action::Write => self.new_write(world, max),
            Action::Flush => {
                let kind = Kind::Flush {
                    flush: world.model.begin_flush(),
                    has_work: world.disk.is_unsynced(),
                };
                (kind, None, Ask::Flush)
            }
            discard => self.new_zeroing(world, max, discard == Action::Discard),
        };
        self.give(world, queue, (kind, memory, ask))
    }

    /// A new request goes to a queue.
    pub(in crate::sim) fn give(
        &mut self,
        world: &mut World,
        queue: usize,
        (kind, memory, ask): (Kind, Option<Memory>, Ask),
    ) -> Result<(), Failure> {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.requests.insert(
            tag,
            InFlight {
                queue,
                kind,
                ask,
                memory,
                held: self.suspension.number(),
                after_failed_sync: self.sync_failed,
                after_failed_page: self.page_failed.filter(|_| self.only_reads()),
            },
        );
        self.ask(world, tag)
    }

    /// The engine gets a request, whose queue is not in the midst of a step.
    pub(in crate::sim) fn ask(&mut self, world: &mut World, tag: u64) -> Result<(), Failure> {
        let Some(request) = self.requests.get(&tag) else {
            return Ok(());
        };
        let Some(free) = self.queue(request.queue) else {
            return Ok(());
        };
        let queue = request.queue;
        let command = request.ask.command(request.memory.as_ref(), &mut world.rng);
        world
            .disk
            .note(|| format!("vq{queue} takes {tag}: {}", describe(&command)));
        let submits = world.rng.random_bool(0.7);
        self.step_of(world, || {
            let mut queue = free.borrow_mut();
            queue.push(Request { tag, command });
            if submits {
                queue.submit();
            }
        })
    }

    /// Where the next request goes: whole clusters and host blocks now and then,
    /// any sectors else, never beyond the island.
    fn choose_range(&mut self, world: &mut World, max: u64) -> std::ops::Range<u64> {
        let size = world.scenario.disk_sectors;
        let islands = world.scenario.layout.islands_within(size);
        let island = islands.choose(&mut world.rng).unwrap().clone();
        if let Some(last) = self.last_range.clone()
            && (self.preempted > 0 || world.rng.random_ratio(1, self.profile.local))
        {
            // Races are between those who meet.
            return last.start..last.end.min(last.start + max);
        }
        let unit = *[1, 8, world.scenario.cluster / SECTOR as u64]
            .choose(&mut world.rng)
            .unwrap();
        let start = world.rng.random_range(island.clone());
        let start = (start - start % unit).max(island.start);
        let count = world.rng.random_range(1..=max).next_multiple_of(unit);
        let range = start..(start + count).min(island.end);
        self.last_range = Some(range.clone());
        range
    }

    pub(in crate::sim) fn new_read(
        &mut self,
        world: &mut World,
        range: &std::ops::Range<u64>,
    ) -> (Kind, Option<Memory>, Ask) {
        let len = (range.end - range.start) as usize * SECTOR;
        let ask = Ask::Read {
            start: Sector(range.start),
        };
        let kind = Kind::Read {
            read: world.model.begin_read(world.index(range)),
            first: range.start,
        };
        (kind, Some(Memory::new(vec![0xa5; len])), ask)
    }

    fn new_change(&self, world: &mut World) -> (ChangeId, Kind) {
        let id = world.model.begin();
        let mode = match self.write_through {
            WriteThrough::On(number) => Some(number),
            _ => None,
        };
        (id, Kind::Change { id, mode })
    }

    fn new_write(&mut self, world: &mut World, max: u64) -> (Kind, Option<Memory>, Ask) {
        let range = self.choose_range(world, max);
        let value = if world.rng.random_ratio(1, 12) {
            Value::ZEROS
        } else {
            world.new_value()
        };
        let mut bytes = vec![0; (range.end - range.start) as usize * SECTOR];
        pattern::fill(&mut bytes, value, range.start);
        let memory = Memory::new(bytes);
        let ask = Ask::Write {
            start: Sector(range.start),
        };
        let (id, kind) = self.new_change(world);
        world.bitmaps.change_begins(&range);
        let index = world.index(&range);
        world.model.touch(id, index, value, true);
        (kind, Some(memory), ask)
    }

    fn new_zeroing(
        &mut self,
        world: &mut World,
        max: u64,
        discard: bool,
    ) -> (Kind, Option<Memory>, Ask) {
        let (id, kind) = self.new_change(world);
        let mut ranges = smallvec![];
        for _ in 0..*[1, 1, 3].choose(&mut world.rng).unwrap() {
            let range = self.choose_range(world, 2 * max);
            ranges.push(SectorRange {
                start: Sector(range.start),
                count: Sector(range.end - range.start),
            });
            world.bitmaps.change_begins(&range);
            self.touch_zeroed(world, id, &range, discard);
        }
        let unmap = world.rng.random();
        let ask = if discard {
            Ask::Discard { ranges }
        } else {
            Ask::WriteZeroes { ranges, unmap }
        };
        (kind, None, ask)
    }

    /// A discard makes zeros for sure only of whole clusters that become holes.
    fn touch_zeroed(
        &self,
        world: &mut World,
        id: ChangeId,
        range: &std::ops::Range<u64>,
        discard: bool,
    ) {
        let per_cluster = world.scenario.cluster / SECTOR as u64;
        let mut at = range.start;
        while at < range.end {
            let cluster = at - at % per_cluster;
            // Of a disk that becomes larger meanwhile the last cluster is not whole.
            let disk_end = match world.scenario.can_grow() {
                true => u64::MAX,
                false => world.scenario.disk_sectors,
            };
            let cluster_end = (cluster + per_cluster).min(disk_end);
            let end = cluster_end.min(range.end);
            let is_whole = at == cluster && end == cluster_end;
            let unmaps = world.scenario.can_unmap() && !world.scenario.snapshots;
            let certain = !discard || (is_whole && unmaps);
            let index = world.index(&(at..end));
            world.model.touch(id, index, Value::ZEROS, certain);
            at = end;
        }
    }

    pub(super) fn end(
        &mut self,
        world: &mut World,
        queue: usize,
        done: &Done,
    ) -> Result<(), Failure> {
        let tag = done.tag;
        world.disk.note(|| format!("{tag} ends: {:?}", done.result));
        let request = self
            .requests
            .remove(&tag)
            .filter(|request| request.queue == queue)
            .ok_or_else(|| format!("I10: request {tag} ends twice, or on another queue"))?;
        if let Err(error) = done.result {
            self.sync_failed |= error == EngineError::SyncFailed;
            if matches!(error, EngineError::Metadata(_)) {
                // The metadata thread may be in the midst of the step that tells of it.
                self.see_failed_pages(world);
                // All who wait together hear of it, and nobody who comes later has to.
                self.page_failed = None;
            }
            if !self.trouble.explains_end(error) {
                return Err(format!("I10: request {tag} failed for no reason: {error}"));
            }
            if let Ask::Write { start } = request.ask
                && !rule::kept(Rule::FailedWriteStaysMapped)
            {
                let cluster = start.bytes() / world.scenario.cluster;
                self.engine
                    .unmap_after_failure(GuestCluster(cluster as u32));
            }
        } else if request.held.is_some() && request.held == self.suspension.number() {
            return Err(format!("S22: request {tag} was done while suspended"));
        }
        let good = done.result.is_ok();
        if good {
            let per_cluster = world.scenario.cluster / SECTOR as u64;
            world.bitmaps.change_ended(tag, &request, per_cluster);
        }
        match request.kind {
            Kind::Read { read, first } if good => {
                let bytes = request.memory.map(|memory| memory.to_vec());
                let bytes = bytes.unwrap_or_default();
                let offset = world.scenario.layout.index(first).unwrap_or(0);
                let found = |index: u64| {
                    let at = (index - offset) as usize;
                    pattern::tell(&bytes[at * SECTOR..][..SECTOR], first + at as u64)
                };
                world
                    .model
                    .end_read(&read, found)
                    .map_err(|wrong| format!("read {tag} from sector {first} on: {wrong:?}"))?;
            }
            Kind::Read { .. } => {}
            Kind::Change { id, mode } => {
                let on = matches!(self.write_through, WriteThrough::On(now) if Some(now) == mode);
                world.model.end(id, good, on);
                world.cases.count_if(Case::WriteThrough, good && on);
                if good && on && world.rng.random_ratio(1, 4) {
                    world.imagine_cut()?;
                }
            }
            Kind::Flush { .. } if good && request.after_failed_sync => {
                return Err(format!(
                    "I7: flush {tag} came after a failed sync and succeeded"
                ));
            }
            Kind::Flush { .. } if good && self.owes_failure(request.after_failed_page) => {
                return Err(format!(
                    "I7: flush {tag} came after a failed write of the BAT that nobody was told of, and succeeded"
                ));
            }
            Kind::Flush { flush, has_work } if good => {
                world.model.end_flush(&flush);
                world.cases.count_if(Case::Flush, has_work);
                if world.rng.random_ratio(1, 2) {
                    world.imagine_cut()?;
                }
            }
            Kind::Flush { .. } => world.cases.count(Case::FailedFlush),
        }
        Ok(())
    }

    /// Whether a request that came after this failure of a page, and has ended, should have
    /// told of it: nobody else has, or can have been told without having ended.
    fn owes_failure(&self, came_after: Option<u32>) -> bool {
        came_after.is_some() && came_after == self.page_failed && self.only_reads()
    }

    /// Whether nothing is under way that could be told of a failure.
    pub(super) fn only_reads(&self) -> bool {
        let mut requests = self.requests.values();
        requests.all(|request| matches!(request.kind, Kind::Read { .. }))
    }
}

impl World {
    fn new_value(&mut self) -> Value {
        self.next_value += 1;
        Value(self.next_value)
    }

    fn index(&self, range: &std::ops::Range<u64>) -> std::ops::Range<u64> {
        let start = self.scenario.layout.index(range.start);
        let start = start.expect("requests stay inside an island");
        start..start + range.end - range.start
    }
}

fn random_piece(rng: &mut SmallRng) -> usize {
    *[512, 1536, 4096, usize::MAX].choose(rng).unwrap()
}

fn describe(command: &Command) -> String {
    match command {
        Command::Read { start, data } => format!("read {}+{}", start.0, data.len() / SECTOR),
        Command::Write { start, data } => format!("write {}+{}", start.0, data.len() / SECTOR),
        other => format!("{other:?}"),
    }
}
