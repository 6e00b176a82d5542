//! What an operation does to the files when its time has come, and what goes wrong then.

use rand::Rng;
use rand::seq::IndexedRandom;
use rustix::io::Errno;

use super::{NOT_COMPLETED, Pending, State};
use crate::sim::file::{Chosen, OpId, SECTOR};
use crate::storage::{Buffer, FileId, Op};

impl State {
    pub(super) fn take_effect(&mut self, pending: &mut Pending) {
        let id = pending.id;
        pending.effect = match &mut pending.op {
            Op::Read {
                file,
                offset,
                buffer,
            } => self.read_part(*file, *offset, buffer, &mut pending.done),
            Op::Write {
                file,
                offset,
                buffer,
                ..
            } => self.write_part(id, *file, *offset, buffer, &mut pending.done),
            Op::Zero {
                file,
                offset,
                len,
                mode,
            } => {
                let punch = *mode == crate::storage::ZeroMode::Punch;
                self.zero_part(id, *file, (*offset, *len), punch, &mut pending.done)
            }
            Op::Allocate { file, offset, len } => Some(self.allocate(id, *file, *offset, *len)),
            Op::Clone {
                from,
                from_offset,
                file,
                offset,
                len,
            } => Some(self.clone_range(id, (*from, *from_offset), (*file, *offset), *len)),
            Op::Sync { file } => Some(self.sync(*file, pending.submitted)),
        };
        if let Some(result) = pending.effect {
            let failed_copy = result.is_err() && self.is_of_copy(&pending.op);
            self.copies.failed += u64::from(failed_copy);
            self.note(|| format!("{} takes effect: {result:?}", id.0));
        }
    }

    /// Whether an operation is a step of a copy: memory of the engine's own is
    /// filled from a lower file, or goes to the data of the top a cluster at once.
    pub(super) fn is_of_copy(&self, op: &Op) -> bool {
        let top = FileId(self.files.len() as u8 - 1);
        match op {
            Op::Read {
                file,
                buffer: Buffer::Owned(_),
                ..
            } => *file < top,
            Op::Write {
                offset,
                buffer: Buffer::Owned(bytes),
                ..
            } => {
                let is_data = top > FileId(0) && *offset >= self.medium.metadata_len;
                is_data && bytes.len() as u64 == self.medium.copy_len
            }
            _ => false,
        }
    }

    pub(super) fn fails(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.rng.random_bool(probability)
    }

    /// Where the next part of an operation ends that is continued after short
    /// transfers, of so many sectors: mostly it is all there is.
    fn end_of_part(&mut self, done: u64, sectors: u64) -> u64 {
        if sectors > done + 1 && self.rng.random_ratio(1, 8) {
            self.rng.random_range(done + 1..sectors)
        } else {
            sectors
        }
    }

    /// Does the next part of a read; `None` if another is left.
    fn read_part(
        &mut self,
        file: FileId,
        offset: u64,
        buffer: &mut Buffer,
        done: &mut u64,
    ) -> Option<Result<(), Errno>> {
        if self.fails(self.medium.faults.read) {
            return Some(Err(Errno::IO));
        }
        let len = buffer.len();
        let sectors = len.div_ceil(SECTOR) as u64;
        let end = self.end_of_part(*done, sectors);
        let range = *done as usize * SECTOR..(end as usize * SECTOR).min(len);
        *done = end;
        let at = offset + range.start as u64;
        match buffer {
            Buffer::Owned(bytes) => self.read_bytes(file, at, &mut bytes[range]),
            Buffer::Client(segments) => {
                let mut bytes = vec![0; range.len()];
                self.read_bytes(file, at, &mut bytes);
                segments.copy_from(range.start, &bytes);
            }
        }
        (end == sectors).then_some(Ok(()))
    }

    /// A clone is a write of what is there at that moment. It takes no space, but the
    /// next write to it does.
    fn clone_range(
        &mut self,
        id: OpId,
        (from, from_offset): (FileId, u64),
        (file, offset): (FileId, u64),
        len: u64,
    ) -> Result<(), Errno> {
        let unit = u64::from(self.medium.block);
        if !(from_offset | offset | len).is_multiple_of(unit) {
            self.violations
                .push(format!("clone to {offset} is misaligned"));
        }
        if !self.may_change(file, "clone") {
            return Err(Errno::IO);
        }
        let mut bytes = vec![0; len as usize];
        self.read_bytes(from, from_offset, &mut bytes);
        let is_tight = self.medium.capacity.is_some();
        let has_space = !is_tight || self.rng.random_ratio(15, 16);
        let fails = self.fails(self.medium.faults.write);
        if !has_space || fails {
            self.write_scraps(id, file, offset, &bytes, fails);
            return Err(if fails { Errno::IO } else { Errno::NOSPC });
        }
        self.write_bytes(id, file, offset, &bytes);
        self.give_back(file, offset, len);
        Ok(())
    }

    /// Does the next part of a write; `None` if another is left.
    fn write_part(
        &mut self,
        id: OpId,
        file: FileId,
        offset: u64,
        buffer: &Buffer,
        done: &mut u64,
    ) -> Option<Result<(), Errno>> {
        if !self.may_change(file, "write") {
            return None;
        }
        let mut bytes = vec![0; buffer.len()];
        match buffer {
            Buffer::Owned(data) => bytes.copy_from_slice(data),
            Buffer::Client(segments) => segments.copy_to(0, &mut bytes),
        }
        let sectors = bytes.len().div_ceil(SECTOR) as u64;
        let end = self.end_of_part(*done, sectors);
        let range = *done as usize * SECTOR..(end as usize * SECTOR).min(bytes.len());
        let at = offset + range.start as u64;
        let is_page = offset < self.medium.metadata_len;
        let undone = |errno| self.undone.contains(&(file, offset, errno));
        let (spares_space, spares_error) = (undone(Errno::NOSPC), undone(Errno::IO));
        let has_space = self.account_write(file, at, range.len() as u64) || spares_space;
        let fails = (self.fails(self.medium.faults.write)
            || (is_page && self.fails(self.medium.faults.page)))
            && !spares_error;
        if !has_space || fails {
            self.write_scraps(id, file, at, &bytes[range], fails);
            self.failures += u64::from(is_page);
            return Some(Err(if fails { Errno::IO } else { Errno::NOSPC }));
        }
        self.write_bytes(id, file, at, &bytes[range]);
        *done = end;
        if end < sectors {
            return None;
        }
        Some(Ok(()))
    }

    /// Any part of a write that has failed may have been done; for want of space,
    /// only where there was space before.
    pub(super) fn write_scraps(
        &mut self,
        id: OpId,
        file: FileId,
        offset: u64,
        bytes: &[u8],
        any: bool,
    ) {
        if self.rng.random() {
            return;
        }
        for (index, piece) in bytes.chunks(SECTOR).enumerate() {
            let at = offset + (index * SECTOR) as u64;
            let block = self.blocks(at, 1).start;
            let allocated = &self.allocated[usize::from(file.0)];
            let has_space = allocated.get(block).is_some_and(|is| *is);
            if self.rng.random() && (has_space || (any && self.account(file, at, 1))) {
                self.write_bytes(id, file, at, piece);
            }
        }
    }

    /// Does the next part of a zeroing; `None` if another is left.
    fn zero_part(
        &mut self,
        id: OpId,
        file: FileId,
        (offset, len): (u64, u64),
        punch: bool,
        done: &mut u64,
    ) -> Option<Result<(), Errno>> {
        if !self.may_change(file, "zeroing") {
            return Some(Err(Errno::IO));
        }
        if std::mem::take(&mut self.medium.next_zero_is_full) {
            return Some(Err(Errno::NOSPC));
        }
        let sectors = len.div_ceil(SECTOR as u64);
        let fails = self.fails(self.medium.faults.zero);
        let end = if fails {
            self.rng.random_range(*done..=sectors)
        } else {
            self.end_of_part(*done, sectors)
        };
        let (from, to) = (*done * SECTOR as u64, (end * SECTOR as u64).min(len));
        self.zero_bytes(id, file, offset + from, to - from);
        *done = end;
        if fails {
            return Some(Err(Errno::IO));
        }
        if end < sectors {
            return None;
        }
        if punch {
            self.give_back(file, offset, len);
        }
        Some(Ok(()))
    }

    fn allocate(&mut self, id: OpId, file: FileId, offset: u64, len: u64) -> Result<(), Errno> {
        if !self.may_change(file, "allocation") {
            return Err(Errno::IO);
        }
        let fails = self.fails(self.medium.faults.allocate);
        if fails || !self.account(file, offset, len) {
            self.allocate_in_part(id, file, offset, len);
            return Err(if fails { Errno::IO } else { Errno::NOSPC });
        }
        self.file(file).extend(id, offset + len);
        Ok(())
    }

    /// What an allocation that failed leaves: as ext4 does, any part of it, from the
    /// start on, and the file ends with that part.
    fn allocate_in_part(&mut self, id: OpId, file: FileId, offset: u64, len: u64) {
        let sectors = self.rng.random_range(0..=len / SECTOR as u64);
        let len = sectors * SECTOR as u64;
        if self.rng.random() && len > 0 && self.account(file, offset, len) {
            self.file(file).extend(id, offset + len);
        }
    }

    /// A sync covers what had completed when it was submitted; it may cover more.
    pub(super) fn sync(&mut self, file: FileId, submitted: u64) -> Result<(), Errno> {
        if !self.spend_power() {
            return Err(Errno::IO);
        }
        let fails = self.sync_fails();
        let more: f64 = *[0.0, 0.0, 0.5, 1.0].choose(&mut self.rng).unwrap_or(&0.0);
        let more = self.toss(more);
        let completed = std::mem::take(&mut self.completed);
        let covers = |op: OpId| completed[op.0 as usize] < submitted || more.has(op);
        if fails {
            self.fail_sync(file, covers);
        } else {
            self.file(file).sync(covers);
        }
        self.completed = completed;
        if fails { Err(Errno::IO) } else { Ok(()) }
    }

    /// Some operations, each with this probability.
    pub(super) fn toss(&mut self, probability: f64) -> Chosen {
        Chosen::Tossed {
            salt: self.rng.random(),
            share: (probability * 65_536.0) as u32,
        }
    }

    /// Whether the next sync fails.
    fn sync_fails(&mut self) -> bool {
        let is_its_turn = self.medium.syncs_until_failure == Some(0);
        let left = &mut self.medium.syncs_until_failure;
        *left = left.and_then(|left| left.checked_sub(1));
        let fails = self.fails(self.medium.faults.sync) || is_its_turn;
        self.failures += u64::from(fails);
        fails
    }

    /// What the sync of a stable write fails with, alone or as any sync.
    pub(super) fn stable_write_error(&mut self) -> Option<Errno> {
        let faults = self.medium.faults;
        let alone = [
            (faults.stable_write, Errno::IO),
            (faults.full_stable_write, Errno::NOSPC),
        ];
        for (probability, errno) in alone {
            if self.fails(probability) {
                self.failures += 1;
                return Some(errno);
            }
        }
        self.sync_fails().then_some(Errno::IO)
    }

    /// The sync of a stable write has failed, and what was written before it by
    /// anybody may be lost. Later syncs succeed, and do not tell of it.
    pub(super) fn lose(&mut self, file: FileId, id: OpId) {
        let before = self.file(file).unsynced_ops();
        let completed = std::mem::take(&mut self.completed);
        let has_completed = |op: OpId| completed[op.0 as usize] != NOT_COMPLETED;
        let others = before.iter().any(|&op| op != id && has_completed(op));
        self.losses += u64::from(others);
        self.fail_sync(file, |op| op == id || has_completed(op));
        self.completed = completed;
    }

    /// Of what is covered, some is stable all the same and the rest is lost.
    fn fail_sync(&mut self, file: FileId, covers: impl Fn(OpId) -> bool) {
        let lucky: f64 = *[0.0, 0.5, 1.0].choose(&mut self.rng).unwrap_or(&0.0);
        let written = self.toss(lucky);
        self.file(file).fail_sync(covers, |op| written.has(op));
    }
}
