//! The disk as the engine sees it: the storage traits.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use rand::Rng;
use rustix::io::Errno;

use super::{IoState, SimDisk, State};
use crate::sim::file::OpId;
use crate::storage::{Completion, Disk, FileId, Io, Op};

/// One actor's access.
pub struct SimIo {
    disk: SimDisk,
    index: usize,
    /// When it was opened: what a power cut has left behind is no access any more.
    life: u32,
}

impl Io for SimIo {
    fn queue(&mut self, tag: u64, op: Op) -> Result<(), Op> {
        let mut guard = self.disk.state();
        let state = &mut *guard;
        let io = &mut state.ios[self.index];
        if io.in_flight >= io.depth {
            return Err(op);
        }
        io.in_flight += 1;
        io.queued.push((tag, op));
        if state.rng.random_ratio(1, 4) {
            state.submit(self.index);
        }
        Ok(())
    }

    fn submit(&mut self) {
        self.disk.state().submit(self.index);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut guard = self.disk.state();
        let state = &mut *guard;
        let io = &mut state.ios[self.index];
        io.in_flight -= io.ready.len();
        let metadata_len = state.medium.metadata_len;
        let is_page =
            |end: &&Completion| matches!(end.op, Op::Write { offset, .. } if offset < metadata_len);
        let pages = io.ready.iter().filter(is_page);
        let failed = pages.filter_map(|end| end.result.err());
        state.failed_pages.extend(failed);
        done.append(&mut io.ready);
    }

    fn in_flight(&self) -> usize {
        self.disk.state().ios[self.index].in_flight
    }

    /// Nobody polls it: who drives the actors asks [`SimDisk::has_completions`].
    fn completion_fd(&self) -> Option<RawFd> {
        let has_ring = self.disk.state().medium.has_ring;
        has_ring.then_some(RawFd::MAX)
    }
}

impl Drop for SimIo {
    fn drop(&mut self) {
        if self.disk.state().life != self.life {
            return;
        }
        self.submit();
        while self.disk.state().pending_of(self.index) {
            self.disk.step();
        }
    }
}

impl State {
    fn pending_of(&self, io: usize) -> bool {
        self.powered && self.pending.iter().any(|pending| pending.io == io)
    }

    /// One change by a call that blocks.
    pub(super) fn change_now(
        &mut self,
        file: FileId,
        what: &str,
        change: impl FnOnce(&mut Self, OpId),
    ) -> io::Result<()> {
        if !self.may_change(file, what) {
            return Err(Errno::IO.into());
        }
        let id = self.new_op();
        self.note(|| format!("{what} at once: {}", id.0));
        change(self, id);
        self.complete(id);
        Ok(())
    }
}

impl Disk for SimDisk {
    type Io = SimIo;

    fn open_io(&self, depth: u32) -> io::Result<SimIo> {
        let mut state = self.state();
        state.ios.push(IoState {
            depth: depth as usize,
            ..IoState::default()
        });
        Ok(SimIo {
            disk: self.clone(),
            index: state.ios.len() - 1,
            life: state.life,
        })
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        Ok(self.live_len(file))
    }

    fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        let mut state = self.state();
        if len > state.medium.len_max {
            return Err(Errno::FBIG.into());
        }
        state.change_now(file, "set_len", |state, id| {
            state.note(|| format!("to {len:#x}"));
            let before = state.file(file).len();
            state.file(file).set_len(id, len);
            state.give_back(file, len, before.saturating_sub(len));
        })
    }

    fn next_data(&self, file: FileId, offset: u64) -> io::Result<Option<Range<u64>>> {
        if self.state().medium.tells_holes {
            return Ok(self.data_from(file, offset));
        }
        let len = self.live_len(file);
        Ok((offset < len).then_some(offset..len))
    }

    fn read_exact_at(&self, file: FileId, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.state();
        let faults = state.medium.faults;
        if !state.powered || state.fails(faults.read) {
            return Err(Errno::IO.into());
        }
        if offset + bytes.len() as u64 > state.file(file).len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        state.read_bytes(file, offset, bytes);
        Ok(())
    }

    fn write_all_at(&self, file: FileId, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.state();
        let is_top = usize::from(file.0) + 1 == state.files.len();
        if is_top && offset < state.medium.metadata_len {
            state.record_metadata(file, offset, bytes.to_vec());
        }
        let rate = state.medium.faults.write;
        let fails = state.fails(rate);
        let mut has_space = true;
        state.change_now(file, "write", |state, id| {
            state.note(|| format!("{offset:#x}+{:#x}", bytes.len()));
            has_space = state.account_write(file, offset, bytes.len() as u64);
            if fails || !has_space {
                state.write_scraps(id, file, offset, bytes, fails);
            } else {
                state.write_bytes(id, file, offset, bytes);
            }
        })?;
        match (fails, has_space) {
            (true, _) => Err(Errno::IO.into()),
            (_, false) => Err(Errno::NOSPC.into()),
            _ => Ok(()),
        }
    }

    fn sync(&self, file: FileId) -> io::Result<()> {
        let mut state = self.state();
        if !state.powered {
            return Err(Errno::IO.into());
        }
        state.note(|| "sync at once".to_owned());
        let now = state.clock + 1;
        state.sync(file, now).map_err(io::Error::from)
    }

    /// Of no effect here but the space that is taken.
    fn allocate(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.state();
        if !state.powered {
            return Err(Errno::IO.into());
        }
        if state.account(file, offset, len) {
            Ok(())
        } else {
            Err(Errno::NOSPC.into())
        }
    }

    fn opening(&self, file: FileId) -> io::Result<Option<u64>> {
        Ok(Some(self.state().openings[usize::from(file.0)]))
    }

    fn set_opening(&self, file: FileId, opening: u64) -> io::Result<()> {
        let mut state = self.state();
        if !state.powered {
            return Err(Errno::IO.into());
        }
        state.openings[usize::from(file.0)] = opening;
        Ok(())
    }

    fn clone_unit(&self) -> Option<u32> {
        let state = self.state();
        state.medium.can_clone.then_some(state.medium.block)
    }

    fn write_alignment(&self) -> u32 {
        self.state().medium.write_alignment
    }

    fn has_stable_writes(&self) -> bool {
        self.state().medium.has_stable_writes
    }

    fn forgo_direct(&self) {
        self.state().medium.write_alignment = 1;
    }

    fn zero_granularity(&self) -> u32 {
        self.state().medium.block
    }
}
