//! Writes that direct I/O does not take as they are: the blocks that they touch are
//! read, changed and written back, while the cluster is locked.
//!
//! Other writes to the same blocks would be lost if they came between the read and
//! the write. So the lock sends new ones to this runner, and I/O that started
//! before it is waited for.

use std::collections::VecDeque;

use super::super::engine::Engine;
use super::super::entry::{Entry, Place};
use super::super::pio::{Pio, Work};
use super::{Busy, Job, Runner, Then};
use crate::format::GuestCluster;
use crate::storage::{Buffer, Completion, Disk, Op};

/// One such write.
pub(super) struct Rmw {
    pio: Pio,
    /// The blocks that it touches, in bytes of the file.
    start: u64,
    len: usize,
    /// Where in them its data goes.
    inset: usize,
    writing: bool,
}

impl Rmw {
    /// The read of the blocks.
    pub fn read<D: Disk>(&self, engine: &Engine<D>) -> Op {
        Op::Read {
            file: engine.top(),
            offset: self.start,
            buffer: Buffer::zeroed(self.len),
        }
    }
}

impl<D: Disk> Runner<D> {
    pub(super) fn begin_rmw(
        &mut self,
        pio: Pio,
        cluster: GuestCluster,
        offset: u32,
        entry: Entry,
        place: Place,
    ) {
        let Place::In(file, host) = place else {
            return self.map_zeros(pio, cluster, entry);
        };
        let Work::Write { data, .. } = &pio.work else {
            return self.run(pio);
        };
        if !self.lock(cluster, entry) {
            return self.run(pio);
        }
        let at = self.engine.level(file).offset(host) + u64::from(offset);
        let align = u64::from(self.engine.write_alignment());
        let start = at - at % align;
        let end = (at + data.len() as u64).next_multiple_of(align);
        let rmw = Rmw {
            pio,
            start,
            len: (end - start) as usize,
            inset: (at - start) as usize,
            writing: false,
        };
        let job = Job::AwaitIo {
            epoch: self.engine.epochs.advance(),
            then: Then::Rmw(rmw),
        };
        let waiting = VecDeque::new();
        self.busy.insert(cluster, Busy { job, waiting });
    }

    /// Maps a hole to a cluster of zeros, for the pio to write into.
    fn map_zeros(&mut self, pio: Pio, cluster: GuestCluster, entry: Entry) {
        if matches!(&pio.work, Work::Write { data, .. } if data.is_zero()) {
            return self.complete(pio, Ok(()));
        }
        let Some(host) = self.engine.allocate() else {
            return self.park(pio, false);
        };
        let mapped = Entry::mapped(self.engine.top(), host);
        if !self.engine.change(cluster, entry, mapped) {
            self.engine.put_back(host);
        }
        self.run(pio);
    }

    pub(super) fn step_rmw(
        &mut self,
        cluster: GuestCluster,
        mut rmw: Rmw,
        waiting: VecDeque<Pio>,
        completion: Completion,
    ) {
        match (completion.result, completion.op) {
            (
                Ok(()),
                Op::Read {
                    file,
                    offset,
                    buffer: Buffer::Owned(mut bytes),
                },
            ) if !rmw.writing => {
                if let Work::Write { data, .. } = &rmw.pio.work {
                    data.copy_to(0, &mut bytes[rmw.inset..rmw.inset + data.len()]);
                }
                rmw.writing = true;
                let op = Op::Write {
                    file,
                    offset,
                    buffer: Buffer::Owned(bytes),
                    dsync: false,
                };
                return self.queue_job(cluster, Job::Rmw(rmw), waiting, op);
            }
            (Ok(()), _) => self.complete(rmw.pio, Ok(())),
            (Err(errno), _) => self.fail(rmw.pio, errno),
        }
        self.unlock(cluster, waiting);
    }
}
