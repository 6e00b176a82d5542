//! Clusters whose zeros are given back to the host: holes where whole blocks are zero, and
//! none at all where nothing else is and nothing below would show.
//!
//! The cluster is locked and I/O that started before is waited for, so that what is read is
//! what there is until the cluster is unlocked. Reads go on meanwhile; what would change the
//! cluster waits with its runner. Unmapping is the same as for a discard by the guest, and goes
//! the same way (I2); a hole where there were zeros changes nothing that anybody could see,
//! whenever it reaches the disk.

use std::collections::VecDeque;
use std::ops::Range;

use super::super::EngineError;
use super::super::engine::Engine;
use super::super::entry::Place;
use super::super::pio::Pio;
use super::super::rule::{self, Rule};
use super::cow::CopyBuffers;
use super::{Busy, Job, Runner, Then};
use crate::format::{GuestCluster, HostCluster, zero_blocks};
use crate::storage::{Buffer, Completion, Disk, FileId, Op, ZeroMode};

/// A cluster that is being looked at.
pub(super) struct Squeeze {
    file: FileId,
    host: HostCluster,
    pio: Pio,
    /// Holes to be made, in bytes from the start of the file.
    holes: VecDeque<Range<u64>>,
}

impl Squeeze {
    /// The read of the whole cluster.
    pub fn read<D: Disk>(&self, engine: &Engine<D>, buffers: &mut CopyBuffers) -> Op {
        Op::Read {
            file: self.file,
            offset: engine.level(self.file).offset(self.host),
            buffer: Buffer::Owned(buffers.take()),
        }
    }
}

impl<D: Disk> Runner<D> {
    /// Begins with a cluster, unless the top has none there any more.
    pub(super) fn begin_squeeze(&mut self, pio: Pio, cluster: GuestCluster) {
        let entry = self.engine.bat.get(cluster);
        let (file, host) = match entry.place() {
            Place::In(file, host) if file == self.engine.top() => (file, host),
            _ => return self.complete(pio, Ok(())),
        };
        if !self.lock(cluster, entry) {
            return self.run(pio);
        }
        let squeeze = Squeeze {
            file,
            host,
            pio,
            holes: VecDeque::new(),
        };
        let job = Job::AwaitIo {
            epoch: self.engine.epochs.advance(),
            then: Then::Squeeze(squeeze),
        };
        let waiting = VecDeque::new();
        self.busy.insert(cluster, Busy { job, waiting });
    }

    pub(super) fn step_squeeze(
        &mut self,
        cluster: GuestCluster,
        mut squeeze: Squeeze,
        waiting: VecDeque<Pio>,
        completion: Completion,
    ) {
        let result = completion.result.map_err(EngineError::of_host);
        if let (
            Ok(()),
            Op::Read {
                offset,
                buffer: Buffer::Owned(bytes),
                ..
            },
        ) = (result, completion.op)
        {
            squeeze.holes = zero_blocks(&bytes, offset).into();
            let whole = offset..offset + bytes.len() as u64;
            self.buffers.keep(bytes);
            let is_zero = squeeze.holes.front() == Some(&whole);
            let may_unmap = self.engine.can_unmap() || !rule::kept(Rule::ZerosHideBelow);
            if is_zero && may_unmap && self.engine.has_bat() {
                // The metadata thread may note meanwhile what has become of the last change.
                while !self
                    .engine
                    .unmap(cluster, self.engine.bat.get(cluster), squeeze.host)
                {}
                self.complete(squeeze.pio, Ok(()));
                return self.run_waiting(waiting);
            }
        }
        let hole = squeeze.holes.pop_front().filter(|_| result.is_ok());
        match hole {
            Some(hole) => {
                let op = Op::Zero {
                    file: squeeze.file,
                    offset: hole.start,
                    len: hole.end - hole.start,
                    mode: ZeroMode::Punch,
                };
                self.queue_job(cluster, Job::Squeeze(squeeze), waiting, op);
            }
            None => {
                self.unlock(cluster, waiting);
                self.complete(squeeze.pio, result);
            }
        }
    }
}
