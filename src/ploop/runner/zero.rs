//! Discards and zeroing, on a runner: whole clusters are unmapped, parts of them
//! are punched or zeroed in place.

use super::super::entry::{Entry, Place};
use super::super::pio::{Pio, Work, ZeroKind};
use super::{Runner, RunnerOp};
use crate::format::GuestCluster;
use crate::storage::{Disk, FileId, Op, ZeroMode};

/// What is left to do for a piece of a cluster.
enum ZeroPlan {
    Nothing,
    InPlace(Op),
    /// A lower level has the cluster, and part of it stays: copy it up.
    Copy(Entry),
    /// There is no space at hand.
    Space,
}

impl<D: Disk> Runner<D> {
    /// Zeroes or discards cluster by cluster, until one needs I/O or has to wait.
    pub(super) fn zero(&mut self, mut pio: Pio) {
        loop {
            let Work::Zero { start, len, kind } = &mut pio.work else {
                return self.write(pio);
            };
            if *len == 0 {
                return self.complete(pio, Ok(()));
            }
            let shift = self.engine.grid().cluster().shift();
            let cluster = GuestCluster((*start >> shift) as u32);
            if let Some(busy) = self.busy.get_mut(&cluster) {
                return busy.waiting.push_back(pio);
            }
            let (from, kind) = (*start, *kind);
            let piece = (*len).min(((u64::from(cluster.0) + 1) << shift) - from);
            let plan = self.plan_zero(cluster, from, piece, kind);
            match plan {
                ZeroPlan::Nothing => pio.work.advance(piece),
                ZeroPlan::InPlace(op) => return self.queue(RunnerOp::Zero(pio, piece), op),
                ZeroPlan::Space => return self.park(pio, false),
                ZeroPlan::Copy(entry) => return self.begin_cow(pio, cluster, entry),
            }
        }
    }

    /// What zeroing a piece of a cluster takes; unmaps or maps it where that does.
    fn plan_zero(&self, cluster: GuestCluster, from: u64, len: u64, kind: ZeroKind) -> ZeroPlan {
        let engine = &self.engine;
        let grid = engine.grid();
        if engine.tracking.terms().1 {
            engine.tracking.mark(from, len);
        }
        let offset = from - grid.cluster_start(cluster);
        // Read inside the epoch: a disk that has become larger is not used beyond its old
        // end before this is over.
        let is_whole = offset == 0
            && (len == grid.cluster().bytes() || from + len == engine.disk_size().bytes());
        loop {
            let entry = engine.rely_on(cluster);
            match entry.place() {
                Place::Hole => return ZeroPlan::Nothing,
                Place::In(file, host) if file == engine.top() => {
                    let unmap = is_whole && kind != ZeroKind::KeepAllocated && engine.can_unmap();
                    if !unmap {
                        let at = engine.level(file).offset(host) + offset;
                        return self.zero_in_place(file, at, len, kind);
                    }
                    if engine.unmap(cluster, entry, host) {
                        return ZeroPlan::Nothing;
                    }
                }
                // As dm-ploop: the data below stays what it is.
                Place::In(..) if kind == ZeroKind::Discard => return ZeroPlan::Nothing,
                Place::In(..) if !is_whole => return ZeroPlan::Copy(entry),
                Place::In(..) => {
                    let Some(host) = engine.allocate() else {
                        return ZeroPlan::Space;
                    };
                    if engine.change(cluster, entry, Entry::mapped(engine.top(), host)) {
                        return ZeroPlan::Nothing;
                    }
                    engine.put_back(host);
                }
            }
        }
    }

    fn zero_in_place(&self, file: FileId, offset: u64, len: u64, kind: ZeroKind) -> ZeroPlan {
        let (mut start, mut end) = (offset, offset + len);
        if kind == ZeroKind::Discard {
            // Only whole host blocks give space back; zeroing the rest would be
            // work for nothing.
            let block = u64::from(self.engine.zero_granularity());
            start = start.next_multiple_of(block);
            end -= end % block;
        }
        if start >= end {
            return ZeroPlan::Nothing;
        }
        ZeroPlan::InPlace(Op::Zero {
            file,
            offset: start,
            len: end - start,
            mode: match kind {
                ZeroKind::KeepAllocated => ZeroMode::KeepAllocated,
                ZeroKind::Discard | ZeroKind::Unmap => ZeroMode::Punch,
            },
        })
    }
}
