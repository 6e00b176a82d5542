//! Cutting requests into parts: transfers at cluster borders, ranges where the runner
//! changes.
//!
//! A request is cut as its parts end, not all at once: what is under way is bounded
//! (see [`allowance`](super::super::allowance)), and what is not can be dropped when
//! the ring stops. Requests that are cut over a longer time take turns.

use smallvec::SmallVec;

use super::super::EngineError;
use super::super::entry::Place;
use super::super::pio::{Work, ZeroKind};
use super::super::request::{Command, SectorRange};
use super::Queue;
use crate::format::{GuestCluster, SECTOR_SIZE, Sector};
use crate::storage::{Disk, Segments};

/// The largest part of a transfer, and of zeros that may have to be written, in bytes.
/// Of the latter a whole cluster, if that is more.
const MAX_PART: u64 = 1 << 20;

/// What is looked up and started for requests at a time, in bytes, before others have a
/// turn. It bounds what a read of holes, which needs no disk, does at once.
const TURN: u64 = 4 << 20;

/// What taking a cluster away costs a disk, as if so many bytes were moved.
const UNMAP_CHARGE: u64 = 4096;

/// What is left of a request.
pub(super) struct Rest {
    pub key: usize,
    work: RestWork,
}

enum RestWork {
    Data {
        /// In bytes from the start of the disk.
        at: u64,
        data: Segments,
        is_write: bool,
    },
    Zero {
        /// That do not touch each other, the first at the end.
        ranges: SmallVec<[SectorRange; 1]>,
        kind: ZeroKind,
    },
}

impl Rest {
    /// All of a command; `None` of a flush, which has no parts.
    pub fn all(key: usize, command: Command) -> Option<Self> {
        let data = |start: Sector, data, is_write| RestWork::Data {
            at: start.bytes(),
            data,
            is_write,
        };
        let zero = |ranges, kind| RestWork::Zero {
            ranges: merged(ranges),
            kind,
        };
        let work = match command {
            Command::Flush => return None,
            Command::Read { start, data: to } => data(start, to, false),
            Command::Write { start, data: from } => data(start, from, true),
            Command::Discard { ranges } => zero(ranges, ZeroKind::Discard),
            Command::WriteZeroes {
                ranges,
                unmap: true,
            } => zero(ranges, ZeroKind::Unmap),
            Command::WriteZeroes { ranges, .. } => zero(ranges, ZeroKind::KeepAllocated),
        };
        Some(Self { key, work })
    }

    fn is_empty(&self) -> bool {
        match &self.work {
            RestWork::Data { data, .. } => data.is_empty(),
            RestWork::Zero { ranges, .. } => ranges.is_empty(),
        }
    }

    fn is_zeroing(&self) -> bool {
        let RestWork::Zero { kind, .. } = self.work else {
            return false;
        };
        kind != ZeroKind::Discard
    }

    pub fn is_discard(&self) -> bool {
        let RestWork::Zero { kind, .. } = self.work else {
            return false;
        };
        kind == ZeroKind::Discard
    }

    pub fn is_transfer(&self) -> bool {
        matches!(self.work, RestWork::Data { .. })
    }
}

/// Ranges of one request, in which order does not matter: each byte once, so that a
/// request never costs more than the disk has. The first range is at the end.
fn merged(mut ranges: SmallVec<[SectorRange; 1]>) -> SmallVec<[SectorRange; 1]> {
    ranges.retain(|range| range.count.0 > 0);
    if ranges.len() < 2 {
        return ranges;
    }
    ranges.sort_unstable_by_key(|range| std::cmp::Reverse(range.start.0));
    let mut merged: SmallVec<[SectorRange; 1]> = SmallVec::with_capacity(ranges.len());
    while let Some(next) = ranges.pop() {
        match merged.last_mut() {
            Some(last) if next.start.0 <= last.start.0 + last.count.0 => {
                let end = (next.start.0 + next.count.0).max(last.start.0 + last.count.0);
                last.count = Sector(end - last.start.0);
            }
            _ => merged.push(next),
        }
    }
    merged.reverse();
    merged
}

/// What came of the attempt to start a part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// It was started.
    Part,
    /// As much is under way as may be.
    Full,
}

impl<D: Disk> Queue<D> {
    /// Starts parts of a new request, all of them if they may be. None of them fails
    /// before it has been started.
    pub(super) fn cut(&mut self, mut rest: Rest) {
        let mut turn = TURN;
        while !rest.is_empty() {
            let is_next = !self.is_held && self.rests.is_empty();
            if is_next && turn == 0 {
                self.has_more_to_cut = true;
            }
            if !is_next || turn == 0 || self.cut_part(&mut rest, &mut turn) == Cut::Full {
                return self.rests.push_back(rest);
            }
        }
        self.part_done(rest.key);
    }

    /// Starts more parts of requests that are not cut yet, one of each in turn.
    pub(super) fn cut_more(&mut self) {
        self.has_more_to_cut = false;
        // Whoever suspends waits for what is under way, and not for what could be.
        if self.is_held || self.rests.is_empty() || self.engine.is_suspended() {
            return;
        }
        let mut turn = TURN;
        while let Some(mut rest) = self.rests.pop_front() {
            if !self.is_cut(&rest) {
                let is_over = turn == 0;
                if is_over || self.cut_part(&mut rest, &mut turn) == Cut::Full {
                    self.has_more_to_cut = is_over;
                    self.rests.push_front(rest);
                    return;
                }
            }
            self.put_off(rest);
        }
    }

    /// What is left of requests is not done, unless it is zeroing that may go on.
    pub(super) fn drop_rests(&mut self, with_zeroing: bool) {
        for rest in std::mem::take(&mut self.rests) {
            if !with_zeroing && rest.is_zeroing() {
                self.rests.push_back(rest);
                continue;
            }
            let request = &mut self.active[rest.key];
            request.result = request.result.and(Err(EngineError::Undone));
            self.part_done(rest.key);
        }
        self.has_more_to_cut &= !self.rests.is_empty();
    }

    /// Whether there is nothing left to be started: a request that has failed is not
    /// gone on with.
    fn is_cut(&self, rest: &Rest) -> bool {
        rest.is_empty() || self.active[rest.key].result.is_err()
    }

    fn put_off(&mut self, rest: Rest) {
        if self.is_cut(&rest) {
            self.part_done(rest.key);
        } else {
            self.rests.push_back(rest);
        }
    }

    fn cut_part(&mut self, rest: &mut Rest, turn: &mut u64) -> Cut {
        let key = rest.key;
        match &mut rest.work {
            RestWork::Data { at, data, is_write } => self.cut_data(key, at, data, *is_write, turn),
            RestWork::Zero { ranges, kind } => self.cut_zero(key, ranges, *kind, turn),
        }
    }

    fn cut_data(
        &mut self,
        key: usize,
        at: &mut u64,
        data: &mut Segments,
        is_write: bool,
        turn: &mut u64,
    ) -> Cut {
        let cluster_size = self.engine.grid().cluster();
        let offset = *at & (cluster_size.bytes() - 1);
        let cluster = GuestCluster((*at >> cluster_size.shift()) as u32);
        let end = (cluster_size.bytes() - offset).min(MAX_PART - *at % MAX_PART);
        let len = end.min(data.len() as u64);
        let copies = is_write && self.needs_copy(cluster);
        let charge = if copies { self.copy_charge() } else { len };
        if !self.allowance.begin(charge) {
            return Cut::Full;
        }
        if copies {
            self.copied = Some(cluster);
        }
        let part = data.take_front(len as usize);
        *at += len;
        *turn = turn.saturating_sub(len);
        if is_write {
            self.write(key, cluster, offset as u32, part, charge);
        } else {
            self.read(key, cluster, offset as u32, part, charge);
        }
        Cut::Part
    }

    fn cut_zero(
        &mut self,
        key: usize,
        ranges: &mut SmallVec<[SectorRange; 1]>,
        kind: ZeroKind,
        turn: &mut u64,
    ) -> Cut {
        let Some(range) = ranges.last_mut() else {
            return Cut::Part;
        };
        let start = range.start.bytes();
        let len = range.count.bytes().min(self.zero_span(start, kind));
        let charge = self.zero_charge(start, len, kind);
        if !self.allowance.begin(charge) {
            return Cut::Full;
        }
        range.start.0 += len / SECTOR_SIZE;
        range.count.0 -= len / SECTOR_SIZE;
        if range.count.0 == 0 {
            ranges.pop();
        }
        *turn = turn.saturating_sub(charge);
        self.dispatch(key, Work::Zero { start, len, kind }, charge);
        Cut::Part
    }

    /// How many bytes from byte `start` on are one part.
    fn zero_span(&self, start: u64, kind: ZeroKind) -> u64 {
        let span = self.engine.runner_span(start);
        if kind != ZeroKind::KeepAllocated {
            return span;
        }
        let unit = MAX_PART.max(self.engine.grid().cluster().bytes());
        span.min(unit - start % unit)
    }

    /// What zeroing costs, at the worst.
    fn zero_charge(&self, start: u64, len: u64, kind: ZeroKind) -> u64 {
        let cluster = self.engine.grid().cluster().bytes();
        let zeroing = match kind {
            ZeroKind::KeepAllocated => len.max(UNMAP_CHARGE),
            ZeroKind::Discard | ZeroKind::Unmap => len.div_ceil(cluster) * UNMAP_CHARGE,
        };
        if kind == ZeroKind::Discard || !self.engine.has_lower_levels() {
            return zeroing;
        }
        let is_cut = |at: u64| u64::from(!at.is_multiple_of(cluster));
        zeroing + (is_cut(start) + is_cut(start + len)) * self.copy_charge()
    }

    /// Whether a write there has a cluster copied that is not being copied yet.
    fn needs_copy(&self, cluster: GuestCluster) -> bool {
        if !self.engine.has_lower_levels() || self.copied == Some(cluster) {
            return false;
        }
        let entry = self.engine.bat.get(cluster);
        let top = self.engine.top();
        !entry.is_locked() && matches!(entry.place(), Place::In(file, _) if file != top)
    }

    /// What copying a cluster costs: it is read and written.
    fn copy_charge(&self) -> u64 {
        2 * self.engine.grid().cluster().bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(list: &[(u64, u64)]) -> SmallVec<[SectorRange; 1]> {
        let range = |&(start, count): &(u64, u64)| SectorRange {
            start: Sector(start),
            count: Sector(count),
        };
        list.iter().map(range).collect()
    }

    #[test]
    fn ranges_of_a_request_become_each_sector_once() {
        let same = [(8, 64); 64];
        assert_eq!(merged(ranges(&same)), ranges(&[(8, 64)]));
        type List = &'static [(u64, u64)];
        let cases: [(List, List); 6] = [
            (&[], &[]),
            (&[(5, 0)], &[]),
            (&[(5, 1)], &[(5, 1)]),
            (&[(0, 4), (8, 4), (4, 4)], &[(0, 12)]),
            (&[(0, 10), (2, 3), (20, 1)], &[(20, 1), (0, 10)]),
            (&[(30, 2), (0, 4), (3, 5), (31, 9)], &[(30, 10), (0, 8)]),
        ];
        for (given, expected) in cases {
            assert_eq!(merged(ranges(given)), ranges(expected));
        }
    }
}
