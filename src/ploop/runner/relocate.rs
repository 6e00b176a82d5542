//! Clusters that have to move, because a larger BAT goes where they are or the file is to
//! become shorter.
//!
//! The cluster is locked, I/O that started before is waited for, and its data is copied
//! to a cluster of zeros. It stays locked until the copy is stable, which
//! the metadata thread sees to, together with others; then it is mapped there. So the new
//! mapping may reach the disk at any time, like every other. Reads go on where the data
//! was; what would change the cluster waits with its runner, and nothing else does.

use std::collections::VecDeque;
use std::ops::Range;

use super::super::EngineError;
use super::super::engine::{Engine, MdMessage};
use super::super::entry::Place;
use super::super::pio::{MoveIf, Pio};
use super::super::rule::{self, Rule};
use super::cow::CopyBuffers;
use super::{Busy, Job, Runner, Then};
use crate::format::{GuestCluster, HostCluster};
use crate::storage::zeros::{BLOCK, first_data};
use crate::storage::{AlignedBuf, Buffer, Completion, Disk, Op};

/// A cluster on its way.
pub(super) struct Relocation {
    old: HostCluster,
    to: HostCluster,
    /// As many bytes of it as belong to the disk.
    keep: u64,
    /// What is there, while parts of it are to be written.
    bytes: Option<AlignedBuf>,
    /// Those parts: all but zeros, which the new cluster has already.
    parts: VecDeque<Range<usize>>,
    /// The new cluster may not read as zeros any more.
    touched: bool,
    /// Who wants it copied; `None` when it is.
    pio: Option<Pio>,
}

impl Relocation {
    /// The read of the whole cluster.
    pub fn read<D: Disk>(&self, engine: &Engine<D>, buffers: &mut CopyBuffers) -> Op {
        Op::Read {
            file: engine.top(),
            offset: engine.grid().host_offset(self.old),
            buffer: Buffer::Owned(buffers.take()),
        }
    }
}

impl<D: Disk> Runner<D> {
    /// Begins the copy of a cluster, unless it is not there any more or may stay.
    pub(super) fn begin_relocation(
        &mut self,
        pio: Pio,
        cluster: GuestCluster,
        (to, keep): (HostCluster, u64),
        only_if: MoveIf,
    ) {
        let engine = self.engine.clone();
        let is_cut = keep < engine.grid().cluster().bytes();
        let entry = engine.bat.get(cluster);
        let old = match entry.place() {
            Place::In(file, old) if file == engine.top() => old,
            // Discarded meanwhile.
            _ => return self.end_unmoved(pio, to),
        };
        let is_there = match only_if {
            MoveIf::InTheWay => is_cut || old.0 < engine.alloc().first(),
            MoveIf::Behind(packing) => packing.is_behind(old),
        };
        if !is_there {
            // Discarded and written anew.
            return self.end_unmoved(pio, to);
        }
        if !self.lock(cluster, entry) {
            return self.run(pio);
        }
        let relocation = Relocation {
            old,
            to,
            keep,
            bytes: None,
            parts: VecDeque::new(),
            touched: false,
            pio: Some(pio),
        };
        let job = Job::AwaitIo {
            epoch: engine.epochs.advance(),
            then: Then::Relocation(relocation),
        };
        let waiting = VecDeque::new();
        self.busy.insert(cluster, Busy { job, waiting });
    }

    /// Nothing is to be copied: the new cluster can be had by others.
    fn end_unmoved(&self, pio: Pio, to: HostCluster) {
        self.engine.put_back(to);
        self.complete(pio, Ok(()));
    }

    pub(super) fn step_relocation(
        &mut self,
        cluster: GuestCluster,
        mut relocation: Relocation,
        waiting: VecDeque<Pio>,
        completion: Completion,
    ) {
        let result = completion.result;
        match (result, completion.op) {
            (
                Ok(()),
                Op::Read {
                    buffer: Buffer::Owned(mut bytes),
                    ..
                },
            ) => {
                if rule::kept(Rule::EndIsCut) {
                    bytes[relocation.keep as usize..].fill(0);
                }
                let to = self.engine.grid().host_offset(relocation.to);
                relocation.parts = match self.engine.write_alignment() as usize <= BLOCK {
                    true => data_of(&bytes, to),
                    false => std::iter::once(0..bytes.len()).collect(),
                };
                relocation.bytes = Some(bytes);
                self.write_next_part(cluster, relocation, waiting);
            }
            (Ok(()), op) => {
                self.buffers.give_back(op);
                self.write_next_part(cluster, relocation, waiting);
            }
            (Err(errno), op) => {
                self.buffers.give_back(op);
                if let Some(bytes) = relocation.bytes.take() {
                    self.buffers.keep(bytes);
                }
                let error = EngineError::of_host(errno);
                let pio = relocation.pio.take();
                self.drop_relocation(cluster, &relocation, waiting);
                if let Some(pio) = pio {
                    self.complete(pio, Err(error));
                }
            }
        }
    }

    /// Writes what is left of the copy; when that is nothing, whoever wants it hears so.
    fn write_next_part(
        &mut self,
        cluster: GuestCluster,
        mut relocation: Relocation,
        waiting: VecDeque<Pio>,
    ) {
        if let Some(part) = relocation.parts.pop_front()
            && let Some(bytes) = relocation.bytes.take()
        {
            let offset = self.engine.grid().host_offset(relocation.to) + part.start as u64;
            let buffer = match part.len() == bytes.len() {
                true => bytes,
                false => {
                    let copy = AlignedBuf::from_iter(BLOCK, bytes[part].iter().copied());
                    relocation.bytes = Some(bytes);
                    copy
                }
            };
            relocation.touched = true;
            let op = Op::Write {
                file: self.engine.top(),
                offset,
                buffer: Buffer::Owned(buffer),
                dsync: false,
            };
            return self.queue_job(cluster, Job::Relocation(relocation), waiting, op);
        }
        if let Some(bytes) = relocation.bytes.take() {
            self.buffers.keep(bytes);
        }
        let pio = relocation.pio.take();
        let job = Job::Relocation(relocation);
        self.busy.insert(cluster, Busy { job, waiting });
        if let Some(pio) = pio {
            self.complete(pio, Ok(()));
        }
    }

    /// The cluster stays where it is.
    fn drop_relocation(
        &mut self,
        cluster: GuestCluster,
        relocation: &Relocation,
        waiting: VecDeque<Pio>,
    ) {
        if relocation.touched {
            let host = relocation.to;
            self.engine.md.post(MdMessage::Dropped { host });
        } else {
            self.engine.put_back(relocation.to);
        }
        self.unlock(cluster, waiting);
    }

    /// If the cluster was copied: maps it there, or not.
    pub(super) fn end_relocation(&mut self, pio: Pio, cluster: GuestCluster, is_stable: bool) {
        let is_copied = |busy: &Busy| matches!(&busy.job, Job::Relocation(relocation) if relocation.pio.is_none());
        if self.busy.get(&cluster).is_some_and(is_copied)
            && let Some(Busy {
                job: Job::Relocation(relocation),
                waiting,
            }) = self.busy.remove(&cluster)
        {
            if is_stable {
                self.engine.relocate(cluster, relocation.to);
                let host = relocation.old;
                let page = self.engine.grid().md_page(cluster);
                self.engine.md.post(MdMessage::Moved { host, page });
                self.run_waiting(waiting);
            } else {
                self.drop_relocation(cluster, &relocation, waiting);
            }
        }
        self.complete(pio, Ok(()));
    }

    /// Waits for copies from lower deltas whose new cluster lies where the BAT goes.
    pub(super) fn await_end_of_copies(&mut self, pio: Pio) {
        self.awaits_end.push(pio);
        self.end_waits_for_copies();
    }

    pub(super) fn end_waits_for_copies(&mut self) {
        if self.awaits_end.is_empty() {
            return;
        }
        let first = self.engine.alloc().first();
        let is_in_the_way = |busy: &Busy| matches!(&busy.job, Job::Cow(cow) if cow.is_below(first));
        let must_wait = rule::kept(Rule::CopiesInTheWayEnd);
        if must_wait && self.busy.values().any(is_in_the_way) {
            return;
        }
        for pio in std::mem::take(&mut self.awaits_end) {
            self.complete(pio, Ok(()));
        }
    }
}

/// Where in bytes that go to `offset` of a file there is anything but zeros.
fn data_of(bytes: &[u8], offset: u64) -> VecDeque<Range<usize>> {
    let mut parts = VecDeque::new();
    let mut from = 0;
    while let Some(part) = first_data(&bytes[from..], offset + from as u64) {
        let end = from + part.end;
        parts.push_back(from + part.start..end);
        from = end;
    }
    parts
}
