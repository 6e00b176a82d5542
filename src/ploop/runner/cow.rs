//! Copy-on-write: a cluster that a lower delta has is copied up with the written
//! data over it.
//!
//! Read what the write does not cover, write the whole new cluster once, publish.
//! Where the host file system can share data between files and clusters are
//! large, the new cluster becomes a clone of the lower one instead, and only the
//! data of the write is written over it.
//!
//! The lower deltas never change, so readers go on reading there until the new
//! cluster is published; other writes wait, or become part of the copy if they
//! come in time. The new mapping reaches the disk after a sync of the copy (I6).

use std::collections::VecDeque;

use rustix::io::Errno;

use super::super::EngineError;
use super::super::engine::{Engine, Grid, MdMessage};
use super::super::entry::{Entry, Place};
use super::super::pio::{Pio, Work};
use super::super::rule::{self, Rule};
use super::{Job, Runner};
use crate::format::{GuestCluster, HostCluster};
use crate::storage::zeros::first_data;
use crate::storage::{AlignedBuf, Buffer, Completion, Disk, FileId, Op, Segments};

/// Reads of a lower level are made at whole blocks, as direct I/O likes it.
const BLOCK: u64 = 4096;

/// The memory that copies of one runner may take, in bytes; one may take more.
const COPIES_BYTES: u64 = 64 << 20;

/// The memory that a runner keeps for its next copies, in bytes.
const KEPT_BYTES: u64 = 4 << 20;

/// Buffers of a cluster each, kept so that not every copy has its memory made and
/// zeroed first.
pub(super) struct CopyBuffers {
    kept: Vec<AlignedBuf>,
    cluster: usize,
    /// How many are kept at most.
    most: usize,
}

impl CopyBuffers {
    pub(super) fn new(cluster: u64) -> Self {
        Self {
            kept: Vec::new(),
            cluster: cluster as usize,
            most: ((KEPT_BYTES / cluster) as usize).max(1),
        }
    }

    /// With anything in it.
    pub(super) fn take(&mut self) -> AlignedBuf {
        self.kept.pop().unwrap_or_else(|| {
            let mut buffer = AlignedBuf::with_capacity(BLOCK as usize, self.cluster);
            buffer.resize(self.cluster, 0);
            buffer
        })
    }

    /// With zeros.
    fn take_zeroed(&mut self) -> AlignedBuf {
        let mut buffer = self.take();
        buffer.fill(0);
        buffer
    }

    pub(super) fn give_back(&mut self, op: Op) {
        if let Op::Write {
            buffer: Buffer::Owned(bytes),
            ..
        } = op
        {
            self.keep(bytes);
        }
    }

    pub(super) fn keep(&mut self, bytes: AlignedBuf) {
        if bytes.len() == self.cluster && self.kept.len() < self.most {
            self.kept.push(bytes);
        }
    }
}

/// The copy of one cluster.
pub(super) struct Cow {
    /// The entry before it was locked.
    from: Entry,
    /// The new cluster.
    host: HostCluster,
    /// The writes that the copy contains, the one that made it necessary first.
    pios: Vec<Pio>,
    /// The new cluster may not read as zeros any more.
    touched: bool,
}

impl Cow {
    /// Whether the new cluster lies in front of this one.
    pub fn is_below(&self, first: u32) -> bool {
        self.host.0 < first
    }

    /// Whether nothing is to be written over what is below.
    fn only_copies(&self) -> bool {
        let first = self.pios.first();
        first.is_some_and(|pio| matches!(pio.work, Work::CopyUp { .. }))
    }

    /// The read of what the first write does not cover; `None` if that is nothing.
    fn read<D: Disk>(
        &self,
        engine: &Engine<D>,
        cluster: GuestCluster,
        buffers: &mut CopyBuffers,
    ) -> Option<Op> {
        let Place::In(file, host) = self.from.place() else {
            return None;
        };
        let grid = engine.grid();
        let level = engine.level(file);
        // Beyond the size that the disk had then, the lower level counts as zeros.
        let valid = level.valid_bytes(grid.cluster_start(cluster), grid.cluster().bytes());
        let covered = self.pios.first().map(|pio| covered(pio, cluster, grid))?;
        let wanted = match covered {
            (0, end) => end - end % BLOCK..valid,
            (start, end) if end >= valid => 0..start.next_multiple_of(BLOCK).min(valid),
            _ => 0..valid,
        };
        (wanted.start < wanted.end).then(|| Op::Read {
            file,
            offset: level.offset(host) + wanted.start,
            buffer: if wanted == (0..grid.cluster().bytes()) {
                Buffer::Owned(buffers.take())
            } else {
                Buffer::zeroed((wanted.end - wanted.start) as usize)
            },
        })
    }

    /// The write of the new cluster: what was read, the data of the first write
    /// over it, and that of others which came in time.
    fn write<D: Disk>(
        &mut self,
        engine: &Engine<D>,
        cluster: GuestCluster,
        read: Option<(u64, AlignedBuf)>,
        waiting: &mut VecDeque<Pio>,
        buffers: &mut CopyBuffers,
    ) -> Op {
        while waiting
            .front()
            .is_some_and(|pio| matches!(pio.work, Work::Write { .. }))
        {
            self.pios.extend(waiting.pop_front());
        }
        let grid = engine.grid();
        if engine.tracking.terms().1 {
            // Of those that came in time nobody has looked again whether they are recorded, and
            // since they were planned a bitmap may have been cleared.
            for pio in &self.pios {
                let (start, end) = covered(pio, cluster, grid);
                let from = grid.cluster_start(cluster) + start;
                engine.tracking.mark(from, end - start);
            }
        }
        let size = grid.cluster().bytes() as usize;
        let mut bytes = match read {
            Some((0, mut bytes)) => {
                bytes.resize(size, 0);
                bytes
            }
            Some((from, read)) => {
                let mut bytes = buffers.take_zeroed();
                let from = from as usize;
                bytes[from..from + read.len()].copy_from_slice(&read);
                bytes
            }
            None => buffers.take_zeroed(),
        };
        for pio in &self.pios {
            let (start, end) = covered(pio, cluster, grid);
            let place = &mut bytes[start as usize..end as usize];
            match &pio.work {
                Work::Write { data, .. } => data.copy_to(0, place),
                _ => place.fill(0),
            }
        }
        self.touched = true;
        Op::Write {
            file: engine.top(),
            offset: engine.level(engine.top()).offset(self.host),
            buffer: Buffer::Owned(bytes),
            dsync: false,
        }
    }

    /// The clone of the lower cluster, if that is possible and worth it.
    fn clone_lower<D: Disk>(&mut self, engine: &Engine<D>, cluster: GuestCluster) -> Option<Op> {
        let unit = u64::from(engine.disk.clone_unit()?);
        let Place::In(from, lower) = self.from.place() else {
            return None;
        };
        let grid = engine.grid();
        let size = grid.cluster().bytes();
        let pio = self.pios.first()?;
        let (start, end) = covered(pio, cluster, grid);
        let aligned = (start | end).is_multiple_of(u64::from(engine.write_alignment()));
        if !engine.may_share_clusters() || (start, end) == (0, size) || !aligned {
            return None;
        }
        let (Work::Write { .. } | Work::CopyUp { .. }) = pio.work else {
            return None;
        };
        let level = engine.level(from);
        let (from_offset, offset) = (level.offset(lower), grid.host_offset(self.host));
        let valid = level.valid_bytes(grid.cluster_start(cluster), size);
        if valid == 0 || !(from_offset | offset | valid).is_multiple_of(unit) {
            return None;
        }
        self.touched = true;
        Some(Op::Clone {
            from,
            from_offset,
            file: engine.top(),
            offset,
            len: valid,
        })
    }

    /// The write of the data of the first write over the clone.
    fn write_over_clone<D: Disk>(&mut self, engine: &Engine<D>) -> Option<Op> {
        let Work::Write { offset, data, .. } = &mut self.pios.first_mut()?.work else {
            return None;
        };
        Some(Op::Write {
            file: engine.top(),
            offset: engine.grid().host_offset(self.host) + u64::from(*offset),
            buffer: Buffer::Client(std::mem::take(data)),
            dsync: false,
        })
    }

    /// After [`Self::write_over_clone`].
    fn give_back_data(&mut self, written: Segments) {
        if let Some(Work::Write { data, .. }) = self.pios.first_mut().map(|pio| &mut pio.work) {
            *data = written;
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    first_data(bytes, 0).is_none()
}

/// The bytes of the cluster that a pio writes.
fn covered(pio: &Pio, cluster: GuestCluster, grid: Grid<'_>) -> (u64, u64) {
    match &pio.work {
        Work::Write { offset, data, .. } => {
            (u64::from(*offset), u64::from(*offset) + data.len() as u64)
        }
        Work::Zero { start, len, .. } => {
            let start = start - grid.cluster_start(cluster);
            (start, (start + len).min(grid.cluster().bytes()))
        }
        // None of them makes a copy from a lower delta necessary.
        Work::EndCopies | Work::Squeeze { .. } | Work::Move { .. } | Work::EndMove { .. } => (0, 0),
        // Nothing is written.
        Work::CopyUp { .. } => (0, 0),
    }
}

impl<D: Disk> Runner<D> {
    /// How many copies may be under way: a guest shall not decide how much memory
    /// they take.
    pub(super) fn copies_max(&self) -> usize {
        let cluster = self.engine.grid().cluster().bytes();
        ((COPIES_BYTES / cluster) as usize).max(1)
    }

    /// Copies a cluster that nobody writes to, if `level` still has it.
    pub(super) fn copy_up(&mut self, pio: Pio, cluster: GuestCluster, level: FileId, top: FileId) {
        if self.engine.top() != top {
            return self.complete(pio, Err(EngineError::TopChanged));
        }
        let entry = self.engine.bat.get(cluster);
        match entry.place() {
            Place::In(file, _) if file == level => self.begin_cow(pio, cluster, entry),
            // The guest came first.
            _ => self.complete(pio, Ok(())),
        }
    }

    pub(super) fn begin_cow(&mut self, pio: Pio, cluster: GuestCluster, entry: Entry) {
        if self.copies >= self.copies_max() {
            return self.awaits_copy.push_back(pio);
        }
        let Some(host) = self.engine.allocate() else {
            return self.park(pio, false);
        };
        if !self.lock(cluster, entry) {
            self.engine.put_back(host);
            return self.run(pio);
        }
        let mut cow = Cow {
            from: entry,
            host,
            pios: vec![pio],
            touched: false,
        };
        self.copies += 1;
        match cow.clone_lower(&self.engine, cluster) {
            Some(op) => self.queue_job(cluster, Job::Cow(cow), VecDeque::new(), op),
            None => self.copy(cluster, cow, VecDeque::new()),
        }
    }

    /// Begins the copy itself.
    fn copy(&mut self, cluster: GuestCluster, mut cow: Cow, mut waiting: VecDeque<Pio>) {
        let buffers = &mut self.buffers;
        let op = match cow.read(&self.engine, cluster, buffers) {
            Some(read) => read,
            None => cow.write(&self.engine, cluster, None, &mut waiting, buffers),
        };
        self.queue_job(cluster, Job::Cow(cow), waiting, op);
    }

    pub(super) fn step_cow(
        &mut self,
        cluster: GuestCluster,
        mut cow: Cow,
        mut waiting: VecDeque<Pio>,
        completion: Completion,
    ) {
        match (completion.result, completion.op) {
            (
                Ok(()),
                Op::Read {
                    file,
                    offset,
                    buffer: Buffer::Owned(bytes),
                },
            ) => {
                let Place::In(_, host) = cow.from.place() else {
                    return self.end_cow(cluster, cow, waiting, Err(Errno::IO));
                };
                if cow.only_copies() && self.engine.is_base(file) && is_zero(&bytes) {
                    self.buffers.keep(bytes);
                    return self.end_as_hole(cluster, cow, waiting);
                }
                let from = offset - self.engine.level(file).offset(host);
                let read = Some((from, bytes));
                let buffers = &mut self.buffers;
                let op = cow.write(&self.engine, cluster, read, &mut waiting, buffers);
                self.queue_job(cluster, Job::Cow(cow), waiting, op);
            }
            (Ok(()), Op::Clone { .. }) if cow.only_copies() => {
                self.end_cow(cluster, cow, waiting, Ok(()));
            }
            (Ok(()), Op::Clone { .. }) => match cow.write_over_clone(&self.engine) {
                Some(op) => self.queue_job(cluster, Job::Cow(cow), waiting, op),
                None => self.end_cow(cluster, cow, waiting, Err(Errno::IO)),
            },
            // Whatever is the matter, it may be possible to copy.
            (Err(errno), Op::Clone { .. }) if !matches!(errno, Errno::NOSPC | Errno::DQUOT) => {
                self.copy(cluster, cow, waiting);
            }
            (
                result,
                Op::Write {
                    buffer: Buffer::Client(data),
                    ..
                },
            ) => {
                cow.give_back_data(data);
                self.end_cow(cluster, cow, waiting, result);
            }
            (result, op) => {
                self.buffers.give_back(op);
                self.end_cow(cluster, cow, waiting, result);
            }
        }
    }

    fn end_cow(
        &mut self,
        cluster: GuestCluster,
        cow: Cow,
        mut waiting: VecDeque<Pio>,
        result: Result<(), Errno>,
    ) {
        self.copies -= 1;
        match result {
            Ok(()) => {
                let copy = Entry::mapped(self.engine.top(), cow.host);
                let waits = rule::kept(Rule::CopyBeforeMapping);
                let copy = if waits { copy.unstable() } else { copy };
                let published = self.engine.change(cluster, cow.from.locked(), copy);
                debug_assert!(published, "nobody else changes a locked entry");
                for pio in cow.pios {
                    self.finish_copied(pio, cluster);
                }
                return self.run_waiting(waiting);
            }
            Err(errno) => {
                // Something of the copy may have been written.
                if cow.touched {
                    self.engine.md.post(MdMessage::Dropped { host: cow.host });
                } else {
                    self.engine.put_back(cow.host);
                }
                let mut pios = cow.pios.into_iter();
                if let Some(first) = pios.next() {
                    self.fail(first, errno);
                }
                // The others did not ask for the copy: each tries for itself.
                for pio in pios.rev() {
                    waiting.push_front(pio);
                }
            }
        }
        self.unlock(cluster, waiting);
    }

    /// The cluster is one of zeros, and nothing lies below the level that has it: it need not be
    /// anywhere (`copy_up.rs`).
    fn end_as_hole(&mut self, cluster: GuestCluster, cow: Cow, waiting: VecDeque<Pio>) {
        self.copies -= 1;
        self.engine.put_back(cow.host);
        let locked = cow.from.locked();
        let hole = Entry::HOLE.after(locked);
        let published = self.engine.bat.replace(cluster, locked, hole);
        debug_assert!(published.is_ok(), "nobody else changes a locked entry");
        for pio in cow.pios {
            self.complete(pio, Ok(()));
        }
        self.run_waiting(waiting);
    }

    /// A pio of a copy is done; one that zeroes may have more to do behind.
    fn finish_copied(&mut self, mut pio: Pio, cluster: GuestCluster) {
        let grid = self.engine.grid();
        let end = grid.cluster_start(cluster) + grid.cluster().bytes();
        if let Work::Zero { start, len, .. } = &mut pio.work {
            let done = (*len).min(end - *start);
            *start += done;
            *len -= done;
            if *len > 0 {
                return self.run(pio);
            }
        }
        self.complete(pio, Ok(()));
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    fn write_of(bytes: AlignedBuf) -> Op {
        Op::Write {
            file: FileId(1),
            offset: 0,
            buffer: Buffer::Owned(bytes),
            dsync: false,
        }
    }

    #[test]
    fn a_few_buffers_of_a_cluster_are_kept_and_nothing_else() {
        let cluster = KEPT_BYTES / 4;
        let mut buffers = CopyBuffers::new(cluster);
        let taken: Vec<AlignedBuf> = (0..6).map(|_| buffers.take()).collect();
        for mut buffer in taken {
            assert_eq!(buffer.len() as u64, cluster);
            buffer.fill(7);
            buffers.give_back(write_of(buffer));
        }
        assert_eq!(buffers.kept.len(), 4);
        assert!(buffers.take_zeroed().iter().all(|byte| *byte == 0));
        assert_eq!(buffers.kept.len(), 3, "it was one of those");
        let short = AlignedBuf::from_iter(4096, std::iter::repeat_n(0, 4096));
        buffers.give_back(write_of(short));
        let file = FileId(1);
        buffers.give_back(Op::Sync { file });
        assert_eq!(buffers.kept.len(), 3);
        // One is kept however large it is.
        assert_eq!(CopyBuffers::new(2 * KEPT_BYTES).most, 1);
    }
}
