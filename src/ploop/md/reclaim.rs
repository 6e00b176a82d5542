//! The way of an unmapped host cluster back to the allocator (I2).
//!
//! It may be given out again only when (a) its removal from the BAT is stable,
//! (b) no I/O that started before the removal is in flight, and (c) its hole is
//! punched, after (b), and that is stable. Clusters go this way in batches; one
//! sync serves for (a) and (c).
//!
//! What held the data of a guest cluster that has moved, and was not discarded, comes to
//! its hole only when (a) is over: a power cut before brings the old entry back (I5).

use std::collections::{HashMap, VecDeque};

use super::super::alloc::Extent;
use super::super::rule::{self, Rule};
use super::{MdOp, MdWriter};
use crate::format::HostCluster;
use crate::storage::{Disk, Op, ZeroMode};

/// A number of a round of the metadata thread; they count up.
pub(super) type RoundNumber = u64;

/// Extents in a batch of leaked clusters.
const LEAKED_AT_ONCE: usize = 64;

/// Batches of leaked clusters under way.
const LEAKED_BATCHES: usize = 2;

/// Holes that are punched at the same time, at most: they wait for each other in
/// the kernel, and pages and syncs for them.
const PUNCHES: usize = 2;

/// Bytes of one, at most, unless a cluster has more: who waits for one that is under way,
/// to close the image for instance, shall not wait for long.
const HOLE_BYTES: u64 = 32 << 20;

/// What a batch waits for next.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// The writes of its md pages, and then the start of a sync: the disk may have the
    /// data of guest clusters here. Then I/O of older epochs.
    Moved { epoch: u64 },
    /// The end of that sync.
    MovedSyncing { epoch: u64 },
    /// I/O of older epochs.
    Grace { epoch: u64 },
    /// Its holes; `left` are being punched.
    Punching { left: usize },
    /// The writes of its md pages, and then the start of a sync.
    Punched,
    /// The end of that sync.
    Syncing,
}

struct Batch {
    id: u64,
    stage: Stage,
    leaked: bool,
    extents: Vec<Extent>,
    /// Md pages whose write, in that round or a later one, makes removals reach
    /// the disk.
    pages: HashMap<u32, RoundNumber>,
}

/// All batches on the way.
#[derive(Default)]
pub(super) struct Reclaim {
    /// Clusters unmapped since the youngest batch was made.
    clusters: Vec<u32>,
    pages: HashMap<u32, RoundNumber>,
    batches: Vec<Batch>,
    /// Clusters that were found leaked and are in no batch yet.
    leaked: VecDeque<Extent>,
    next_id: u64,
}

impl Reclaim {
    /// Clusters that nobody maps, on disk or in memory, and no I/O uses: left by
    /// a crash or by another tool.
    pub fn add_leaked(&mut self, extents: &[Extent]) {
        self.leaked.extend(extents);
    }

    /// In small batches, few at a time: the first ones come back while others are
    /// punched, and there may be millions.
    fn batch_leaked(&mut self) {
        let under_way = self.batches.iter().filter(|batch| batch.leaked).count();
        for _ in under_way..LEAKED_BATCHES {
            if self.leaked.is_empty() {
                break;
            }
            let count = LEAKED_AT_ONCE.min(self.leaked.len());
            let extents = self.leaked.drain(..count).collect();
            self.add_batch(Stage::Grace { epoch: 0 }, extents, HashMap::new());
        }
    }

    /// How many clusters are in no batch yet, and how many batches there are.
    pub fn counts(&self) -> (u64, u64) {
        (self.clusters.len() as u64, self.batches.len() as u64)
    }

    /// A cluster was unmapped; the write of `page` in `round` will contain that.
    pub fn add_freed(&mut self, host: HostCluster, page: u32, round: RoundNumber) {
        self.clusters.push(host.0);
        let needed = self.pages.entry(page).or_insert(round);
        *needed = (*needed).max(round);
    }

    /// A cluster was written to and never mapped.
    pub fn add_dropped(&mut self, host: HostCluster) {
        self.clusters.push(host.0);
    }

    /// Whether clusters wait for [`Self::close_batch`].
    pub fn has_open(&self) -> bool {
        !self.clusters.is_empty()
    }

    /// Makes a batch of what was unmapped so far; all of it before `epoch`.
    pub fn close_batch(&mut self, epoch: u64) {
        let clusters = std::mem::take(&mut self.clusters);
        let pages = std::mem::take(&mut self.pages);
        self.add_batch(Stage::Grace { epoch }, extents_of(clusters), pages);
    }

    /// Clusters that the disk maps for guest clusters which have moved, and no I/O uses that
    /// began with `epoch` or later; writes of `pages` in these rounds will contain where to.
    pub fn add_moved(&mut self, clusters: Vec<u32>, pages: HashMap<u32, RoundNumber>, epoch: u64) {
        if !clusters.is_empty() {
            self.add_batch(Stage::Moved { epoch }, extents_of(clusters), pages);
        }
    }

    fn add_batch(&mut self, stage: Stage, extents: Vec<Extent>, pages: HashMap<u32, RoundNumber>) {
        let id = self.next_id;
        self.next_id += 1;
        self.batches.push(Batch {
            id,
            leaked: matches!(stage, Stage::Grace { epoch: 0 }),
            stage,
            extents,
            pages,
        });
    }

    /// Whether any cluster is on the way.
    pub fn is_under_way(&self) -> bool {
        self.has_open() || !self.leaked.is_empty() || !self.batches.is_empty()
    }

    /// What is on the way now, by a mark.
    pub fn mark(&self) -> u64 {
        self.next_id + u64::from(self.has_open())
    }

    /// Whether something is still on the way that was so at that mark. What was found leaked has
    /// been on it from the beginning, whichever batch it gets into.
    pub fn is_under_way_before(&self, mark: u64) -> bool {
        let is_open = self.has_open() && self.next_id < mark;
        is_open || self.has_leaked() || self.batches.iter().any(|batch| batch.id < mark)
    }

    /// Whether clusters that were found leaked are on the way: they need no page.
    pub fn has_leaked(&self) -> bool {
        !self.leaked.is_empty() || self.batches.iter().any(|batch| batch.leaked)
    }

    /// Whether a batch waits for the end of older I/O.
    pub fn awaits_io(&self) -> bool {
        let awaits = |batch: &Batch| matches!(batch.stage, Stage::Grace { .. });
        self.batches.iter().any(awaits)
    }

    /// The holes to punch now, of so many clusters at most, with the batch that each belongs
    /// to. What lies in front of cluster `first` is given up: the BAT of a larger disk goes
    /// there.
    pub fn begin_punching(
        &mut self,
        first: u32,
        at_most: u32,
        is_reached: impl Fn(u64) -> bool,
    ) -> Vec<(u64, Extent)> {
        self.batch_leaked();
        let mut holes = Vec::new();
        for batch in &mut self.batches {
            if matches!(batch.stage, Stage::Grace { epoch } if is_reached(epoch) || !rule::kept(Rule::OldIoBeforePunch))
            {
                batch.extents = std::mem::take(&mut batch.extents)
                    .into_iter()
                    .filter_map(|extent| extent.from(first))
                    .flat_map(|extent| extent.pieces(at_most))
                    .collect();
                batch.stage = match batch.extents.len() {
                    0 => Stage::Punched,
                    left => Stage::Punching { left },
                };
                holes.extend(batch.extents.iter().map(|extent| (batch.id, *extent)));
            }
        }
        holes
    }

    /// A hole was punched, or could not be: then its clusters are not used again.
    pub fn punched(&mut self, id: u64, extent: Extent, succeeded: bool) {
        let Some(batch) = self.batches.iter_mut().find(|batch| batch.id == id) else {
            return;
        };
        if !succeeded {
            batch.extents.retain(|other| *other != extent);
        }
        if let Stage::Punching { left } = &mut batch.stage {
            *left -= 1;
            if *left == 0 {
                batch.stage = Stage::Punched;
            }
        }
    }

    /// A write of `page` in `round` is complete.
    pub fn page_written(&mut self, page: u32, round: RoundNumber) {
        let open = std::iter::once(&mut self.pages);
        let closed = self.batches.iter_mut().map(|batch| &mut batch.pages);
        for pages in open.chain(closed) {
            if pages.get(&page).is_some_and(|needed| *needed <= round) {
                pages.remove(&page);
            }
        }
    }

    /// Whether clusters wait for the write of a page.
    #[cfg(all(test, not(ploop_loom)))]
    pub fn awaits_pages(&self) -> bool {
        let closed = self.batches.iter().map(|batch| &batch.pages);
        closed.chain([&self.pages]).any(|pages| !pages.is_empty())
    }

    /// Whether a sync would give clusters back to the allocator.
    pub fn wants_sync(&self) -> bool {
        self.batches.iter().any(Batch::is_ready)
    }

    /// A sync starts.
    pub fn begin_sync(&mut self) {
        for batch in self.batches.iter_mut().filter(|batch| batch.is_ready()) {
            batch.stage = match batch.stage {
                Stage::Moved { epoch } => Stage::MovedSyncing { epoch },
                _ => Stage::Syncing,
            };
        }
    }

    /// The sync has succeeded: these may be given out.
    pub fn end_sync(&mut self) -> Vec<Extent> {
        let (synced, rest) = std::mem::take(&mut self.batches)
            .into_iter()
            .partition(Batch::is_synced);
        self.batches = rest;
        for batch in &mut self.batches {
            if let Stage::MovedSyncing { epoch } = batch.stage {
                batch.stage = Stage::Grace { epoch };
            }
        }
        let synced: Vec<Batch> = synced;
        synced.into_iter().flat_map(|batch| batch.extents).collect()
    }
}

impl Batch {
    /// Whether the sync that has just ended began late enough.
    fn is_synced(&self) -> bool {
        let is_punched = self.stage == Stage::Punched && self.is_ready();
        self.stage == Stage::Syncing || (is_punched && !rule::kept(Rule::SyncBeforeReuse))
    }

    fn is_ready(&self) -> bool {
        let removed = self.pages.is_empty() || !rule::kept(Rule::RemovalBeforeReuse);
        matches!(self.stage, Stage::Moved { .. } | Stage::Punched) && removed
    }
}

fn extents_of(mut clusters: Vec<u32>) -> Vec<Extent> {
    clusters.sort_unstable();
    let mut extents: Vec<Extent> = Vec::new();
    for cluster in clusters {
        match extents.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => extents.push(Extent {
                start: cluster,
                end: cluster + 1,
            }),
        }
    }
    extents
}

impl<D: Disk> MdWriter<D> {
    pub(super) fn step_reclaim(&mut self) {
        // Who opens an image next that is passed on finds what is left.
        if self.is_closing() || self.leaves_file_alone() {
            return;
        }
        let engine = self.engine.clone();
        if self.reclaim.has_open() && !self.reclaim.awaits_io() {
            self.reclaim.close_batch(engine.epochs.advance());
        }
        let first = match rule::kept(Rule::NoPunchInTheWay) {
            true => engine.alloc().first(),
            false => 0,
        };
        let at_most = HOLE_BYTES >> engine.grid().cluster().shift();
        let at_most = u32::try_from(at_most).unwrap_or(u32::MAX);
        let holes = self
            .reclaim
            .begin_punching(first, at_most, |epoch| engine.epochs.all_reached(epoch));
        self.holes.extend(holes);
        while self.punching < PUNCHES
            && let Some((batch, extent)) = self.holes.pop_front()
        {
            self.punching += 1;
            let shift = engine.grid().cluster().shift();
            let is_punched = rule::kept(Rule::PunchBeforeReuse);
            let clusters = if is_punched { extent.len() } else { 0 };
            let op = Op::Zero {
                file: engine.top(),
                offset: engine.grid().host_offset(HostCluster(extent.start)),
                len: u64::from(clusters) << shift,
                mode: ZeroMode::Punch,
            };
            self.queue(MdOp::Punch { batch, extent }, op);
        }
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    fn extent(start: u32, end: u32) -> Extent {
        Extent { start, end }
    }

    #[test]
    fn a_cluster_comes_back_after_page_write_grace_punch_and_sync() {
        let mut reclaim = Reclaim::default();
        for host in [9, 7, 8, 3] {
            reclaim.add_freed(HostCluster(host), 5, 2);
        }
        reclaim.close_batch(10);
        assert!(
            reclaim
                .begin_punching(0, u32::MAX, |epoch| epoch < 10)
                .is_empty()
        );
        let holes = reclaim.begin_punching(0, u32::MAX, |epoch| epoch <= 10);
        assert_eq!(holes, [(0, extent(3, 4)), (0, extent(7, 10))]);
        for (id, hole) in holes {
            reclaim.punched(id, hole, true);
        }
        reclaim.page_written(5, 1);
        assert!(
            !reclaim.wants_sync(),
            "that write was made before the removal"
        );
        reclaim.begin_sync();
        assert!(reclaim.end_sync().is_empty());
        reclaim.page_written(5, 2);
        assert!(reclaim.wants_sync());
        reclaim.begin_sync();
        assert_eq!(reclaim.end_sync(), [extent(3, 4), extent(7, 10)]);
    }

    #[test]
    fn where_a_cluster_was_before_it_moved_is_punched_after_a_sync_of_where_it_is() {
        let mut reclaim = Reclaim::default();
        reclaim.add_moved(vec![4, 3], HashMap::from([(5, 2)]), 10);
        for round in [1, 2] {
            assert!(reclaim.begin_punching(0, u32::MAX, |_| true).is_empty());
            assert!(!reclaim.wants_sync() && reclaim.is_under_way());
            reclaim.page_written(5, round);
        }
        assert!(reclaim.wants_sync());
        assert!(reclaim.begin_punching(0, u32::MAX, |_| true).is_empty());
        reclaim.begin_sync();
        assert!(reclaim.begin_punching(0, u32::MAX, |_| true).is_empty());
        assert!(reclaim.end_sync().is_empty());
        let is_reached = |epoch| epoch < 10;
        assert!(reclaim.begin_punching(0, u32::MAX, is_reached).is_empty() && reclaim.awaits_io());
        let holes = reclaim.begin_punching(0, u32::MAX, |epoch| epoch <= 10);
        assert_eq!(holes, [(0, extent(3, 5))]);
        reclaim.punched(0, extent(3, 5), true);
        reclaim.begin_sync();
        assert_eq!(reclaim.end_sync(), [extent(3, 5)]);
        assert!(!reclaim.is_under_way());
    }

    #[test]
    fn clusters_are_on_the_way_until_they_are_given_back() {
        let mut reclaim = Reclaim::default();
        assert!(!reclaim.is_under_way() && !reclaim.has_leaked());
        reclaim.add_dropped(HostCluster(3));
        assert!(reclaim.is_under_way() && !reclaim.awaits_io());
        reclaim.close_batch(10);
        assert!(reclaim.is_under_way() && reclaim.awaits_io());
        assert!(!reclaim.has_open() && !reclaim.has_leaked());
        for (id, hole) in reclaim.begin_punching(0, u32::MAX, |_| true) {
            assert!(reclaim.is_under_way() && !reclaim.awaits_io());
            reclaim.punched(id, hole, true);
        }
        reclaim.begin_sync();
        assert!(reclaim.is_under_way());
        assert_eq!(reclaim.end_sync(), [extent(3, 4)]);
        assert!(!reclaim.is_under_way());

        // Leaked ones need no page: more than are punched at a time.
        let count = 1 + LEAKED_AT_ONCE * LEAKED_BATCHES;
        let apart = |index: usize| extent(2 * index as u32, 2 * index as u32 + 1);
        let leaked: Vec<Extent> = (0..count).map(apart).collect();
        reclaim.add_leaked(&leaked);
        assert!(reclaim.is_under_way() && reclaim.has_leaked());
        let mark = reclaim.mark();
        let mut given_back = Vec::new();
        for at_once in [LEAKED_AT_ONCE * LEAKED_BATCHES, 1] {
            let holes = reclaim.begin_punching(0, u32::MAX, |_| true);
            assert_eq!(holes.len(), at_once);
            for (id, hole) in holes {
                assert!(reclaim.is_under_way() && reclaim.has_leaked());
                assert!(reclaim.is_under_way_before(mark));
                reclaim.punched(id, hole, true);
            }
            reclaim.begin_sync();
            given_back.extend(reclaim.end_sync());
        }
        assert_eq!(given_back, leaked);
        assert!(!reclaim.is_under_way() && !reclaim.has_leaked());
        assert!(!reclaim.is_under_way_before(mark));
    }

    #[test]
    fn what_lies_where_the_bat_goes_is_not_punched() {
        let mut reclaim = Reclaim::default();
        reclaim.add_leaked(&[extent(1, 2), extent(3, 6)]);
        assert_eq!(
            reclaim.begin_punching(4, u32::MAX, |_| true),
            [(0, extent(4, 6))]
        );
        reclaim.punched(0, extent(4, 6), true);
        reclaim.begin_sync();
        assert_eq!(reclaim.end_sync(), [extent(4, 6)]);
        reclaim.add_leaked(&[extent(2, 3)]);
        assert!(reclaim.begin_punching(4, u32::MAX, |_| true).is_empty());
        reclaim.begin_sync();
        assert!(reclaim.end_sync().is_empty() && !reclaim.is_under_way());
    }

    #[test]
    fn a_long_hole_is_punched_in_pieces() {
        let mut reclaim = Reclaim::default();
        reclaim.add_leaked(&[extent(1, 8), extent(9, 10)]);
        let holes = reclaim.begin_punching(2, 3, |_| true);
        let pieces = [extent(2, 5), extent(5, 8), extent(9, 10)];
        assert_eq!(holes, pieces.map(|piece| (0, piece)));
        for (id, hole) in holes {
            assert!(!reclaim.wants_sync());
            reclaim.punched(id, hole, hole.start != 5);
        }
        reclaim.begin_sync();
        assert_eq!(reclaim.end_sync(), [extent(2, 5), extent(9, 10)]);
    }

    #[test]
    fn what_could_not_be_punched_does_not_come_back() {
        let mut reclaim = Reclaim::default();
        reclaim.add_leaked(&[extent(1, 2), extent(4, 6)]);
        for (id, hole) in reclaim.begin_punching(0, u32::MAX, |_| true) {
            reclaim.punched(id, hole, hole.start != 4);
        }
        reclaim.begin_sync();
        assert_eq!(reclaim.end_sync(), [extent(1, 2)]);
    }

    #[test]
    fn what_is_punched_after_the_start_of_a_sync_waits_for_the_next() {
        let mut reclaim = Reclaim::default();
        reclaim.add_leaked(&[extent(1, 2)]);
        let holes = reclaim.begin_punching(0, u32::MAX, |_| true);
        reclaim.begin_sync();
        reclaim.punched(holes[0].0, holes[0].1, true);
        assert!(reclaim.end_sync().is_empty());
        reclaim.begin_sync();
        assert_eq!(reclaim.end_sync(), [extent(1, 2)]);
    }
}
