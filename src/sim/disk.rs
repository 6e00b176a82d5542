//! The files of a virtual disk, simulated, behind the storage trait.
//!
//! An operation that was submitted waits; then it takes effect, in one or two
//! steps; then it completes. When, and in which order, the caller of
//! [`SimDisk::step`] and the seed decide: so completions come late and reordered,
//! and operations overtake each other. Faults come by the seed as well. Calls
//! that block do all of it at once.
//!
//! What it assumes of the medium, no more than `docs/durability.md` does: a sync
//! makes stable what had completed when it was submitted, the length of the file
//! included; a write with `dsync` makes itself stable; a sector is written whole
//! or not; and nothing is ordered otherwise. A sync that fails, that of a stable
//! write included, may lose whatever was not stable, of all files' users, and tells
//! only those whose syncs end before anybody has heard of it.

mod access;
mod effects;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rustix::io::Errno;

use super::file::{Chosen, ContentId, Contents, Left, OpId, SECTOR, SimFile, Survivors};
use super::view::{Origins, View};
use crate::storage::{Buffer, Completion, FileId, Op};

pub use self::access::SimIo;

/// What goes wrong, and how often: each a probability for one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// `EIO` for a read.
    pub read: f64,
    /// `EIO` for a write, of which any part may have been done.
    pub write: f64,
    /// `EIO` for a write of the header or the BAT, beside [`Self::write`].
    pub page: f64,
    /// `EIO` for a zeroing, of which any part may have been done.
    pub zero: f64,
    /// `EIO` for an allocation.
    pub allocate: f64,
    /// `EIO` for a sync, that of a stable write included.
    pub sync: f64,
    /// `EIO` for the sync of a stable write.
    pub stable_write: f64,
    /// `ENOSPC` for the sync of a stable write.
    pub full_stable_write: f64,
}

/// What a simulated disk is like.
#[derive(Clone, Debug)]
pub struct Medium {
    /// What offset and length of a write must be multiples of, in bytes.
    pub write_alignment: u32,
    /// In bytes; the file system's block.
    pub block: u32,
    /// In bytes; what a cut leaves whole: the device's sector.
    pub sector: usize,
    /// How many blocks there is space for, in all files together.
    pub capacity: Option<u64>,
    /// What no file can be made longer than, in bytes: the file system's limit.
    pub len_max: u64,
    /// A write never goes to where the old data is: it needs space until it is done,
    /// whether or not it had some before (btrfs, ZFS, thin pools).
    pub copies_on_write: bool,
    /// Completions announce themselves, as those of a ring do.
    pub has_ring: bool,
    /// Whether files can share data.
    pub can_clone: bool,
    /// Whether it is told where files have holes.
    pub tells_holes: bool,
    /// See [`Disk::has_stable_writes`].
    pub has_stable_writes: bool,
    /// How many syncs come before one that fails, beside [`Faults::sync`].
    pub syncs_until_failure: Option<u32>,
    /// What goes wrong.
    pub faults: Faults,
    /// The next zeroing finds no space for its own bookkeeping.
    pub next_zero_is_full: bool,
    /// Reads of this file by threads from this one on, which are counted as
    /// [`SimDisk::io_count`] does it, take long.
    pub stalled: Option<(FileId, usize)>,
    /// Files below this one are never to be written to.
    pub first_writable: FileId,
    /// Bytes of header and BAT of the top file, for [`Survivors::Region`], and
    /// for the rule that of each page of it one write is in flight at a time.
    pub metadata_len: u64,
    /// Bytes that a copy from a lower file writes at once: a cluster.
    pub copy_len: u64,
}

impl Default for Medium {
    fn default() -> Self {
        Self {
            write_alignment: 512,
            block: 4096,
            sector: SECTOR,
            capacity: None,
            len_max: u64::MAX,
            copies_on_write: false,
            has_ring: false,
            can_clone: false,
            tells_holes: false,
            has_stable_writes: true,
            syncs_until_failure: None,
            faults: Faults::default(),
            next_zero_is_full: false,
            stalled: None,
            first_writable: FileId(0),
            metadata_len: 0,
            copy_len: u64::MAX,
        }
    }
}

/// Bytes of a page of the BAT that must not be written twice at a time (I11).
const MD_PAGE: u64 = 4096;

/// A write of metadata of the top file, as it was submitted.
#[derive(Clone, Debug)]
pub struct MetadataWrite {
    /// In bytes.
    pub offset: u64,
    /// What was written.
    pub bytes: Vec<u8>,
    /// The length that was sure to survive a cut at that moment.
    pub certain_len: u64,
}

/// What has happened to copies from lower files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Copies {
    /// Reads and writes that have failed.
    pub failed: u64,
    /// Times that the power went while one was under way.
    pub cut: u64,
}

/// See the module's text. Clones share the same files.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

struct State {
    rng: SmallRng,
    medium: Medium,
    files: Vec<SimFile>,
    contents: Contents,
    origins: Origins,
    /// Which blocks of each file take space.
    allocated: Vec<Vec<bool>>,
    used_blocks: u64,
    ios: Vec<IoState>,
    pending: Vec<Pending>,
    /// When each operation completed, by [`OpId`].
    completed: Vec<u64>,
    clock: u64,
    powered: bool,
    /// How often the power came back, or another process.
    life: u32,
    changes_left: Option<u64>,
    metadata_writes: Vec<MetadataWrite>,
    violations: Vec<String>,
    failures: u64,
    failed_pages: Vec<Errno>,
    losses: u64,
    copies: Copies,
    trace: Option<Vec<String>>,
    /// See [`Disk::opening`].
    openings: Vec<u64>,
    /// Stable writes that were done, and whose sync has failed so: where they were. They
    /// do not fail in this way when they are tried again, however many others are made there
    /// meanwhile; so nothing does until the power goes, or the process.
    undone: Vec<(FileId, u64, Errno)>,
}

#[derive(Default)]
struct IoState {
    queued: Vec<(u64, Op)>,
    ready: Vec<Completion>,
    in_flight: usize,
    depth: usize,
}

/// An operation under way.
struct Pending {
    io: usize,
    tag: u64,
    op: Op,
    id: OpId,
    submitted: u64,
    /// Seldom chosen while there are others.
    slow: bool,
    /// Sectors of a transfer that have been done.
    done: u64,
    effect: Option<Result<(), Errno>>,
}

const NOT_COMPLETED: u64 = u64::MAX;
/// Different sectors that are kept before [`SimDisk::tidy`] has something to do.
const CONTENTS_MAX: usize = 32 * 1024;

impl SimDisk {
    /// So many files, all empty.
    pub fn new(files: usize, medium: Medium, seed: u64) -> Self {
        let state = State {
            rng: SmallRng::seed_from_u64(seed),
            medium,
            files: vec![SimFile::default(); files],
            contents: Contents::new(),
            origins: Origins::default(),
            allocated: vec![Vec::new(); files],
            used_blocks: 0,
            ios: Vec::new(),
            pending: Vec::new(),
            completed: Vec::new(),
            clock: 0,
            powered: true,
            life: 0,
            changes_left: None,
            metadata_writes: Vec::new(),
            violations: Vec::new(),
            failures: 0,
            failed_pages: Vec::new(),
            losses: 0,
            copies: Copies::default(),
            trace: None,
            openings: vec![0; files],
            undone: Vec::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `bytes` and makes them stable, whatever the medium is like: for
    /// preparing an image.
    pub fn prepare(&self, file: FileId, offset: u64, bytes: &[u8]) {
        let mut state = self.state();
        let id = state.new_op();
        state.write_bytes(id, file, offset, bytes);
        state.account(file, offset, bytes.len() as u64);
        state.complete(id);
        state.files[usize::from(file.0)].sync(|_| true);
    }

    /// One more file, the top from now on: it begins with these bytes and is so long. It may
    /// be stable.
    pub fn add_file(&self, start: &[u8], len: u64, is_stable: bool) {
        let mut guard = self.state();
        let state = &mut *guard;
        let file = FileId(state.files.len() as u8);
        state.files.push(SimFile::default());
        state.allocated.push(Vec::new());
        state.openings.push(0);
        let id = state.new_op();
        state.write_bytes(id, file, 0, start);
        state.file(file).extend(id, len);
        // Its space was taken before.
        let capacity = state.medium.capacity.take();
        state.account(file, 0, len);
        state.medium.capacity = capacity;
        state.complete(id);
        if is_stable {
            state.file(file).sync(|_| true);
        }
    }

    /// The last file has no name any more.
    pub fn drop_last_file(&self) {
        let mut state = self.state();
        state.files.pop();
        state.openings.pop();
        let allocated = state.allocated.pop().unwrap_or_default();
        let blocks = allocated.iter().filter(|is| **is).count() as u64;
        state.used_blocks = state.used_blocks.saturating_sub(blocks);
    }

    /// The same disk without one of its files: those above have other numbers there.
    pub fn without(&self, file: FileId) -> Self {
        let mut state = self.state();
        let index = usize::from(file.0);
        state.files.remove(index);
        state.allocated.remove(index);
        state.openings.remove(index);
        drop(state);
        self.clone()
    }

    /// Nothing is left in the file but, if it has one, its header, and that is stable.
    pub fn empty_file(&self, file: FileId, has_header: bool) {
        let mut state = self.state();
        let len = state.file(file).len();
        let mut header = [0; 64];
        state.read_bytes(file, 0, &mut header);
        let id = state.new_op();
        state.zero_bytes(id, file, 0, len);
        if has_header {
            state.write_bytes(id, file, 0, &header);
        }
        state.complete(id);
        state.file(file).sync(|_| true);
        state.give_back(file, 0, len);
    }

    /// Makes a range read as zeros, at once, and gives its space back.
    ///
    /// # Errors
    /// The power is off.
    pub fn punch(&self, file: FileId, range: std::ops::Range<u64>) -> io::Result<()> {
        let (offset, len) = (range.start, range.end - range.start);
        let mut state = self.state();
        state.change_now(file, "punch", |state, id| {
            state.zero_bytes(id, file, offset, len);
            state.give_back(file, offset, len);
        })
    }

    /// Where the first data from here on begins and ends, to whole sectors.
    pub fn data_from(&self, file: FileId, offset: u64) -> Option<std::ops::Range<u64>> {
        let state = self.state();
        let file = &state.files[usize::from(file.0)];
        let is_data = |sector: &u64| file.sector(*sector) != ContentId::ZEROS;
        let first = offset / SECTOR as u64;
        let end = file.len().div_ceil(SECTOR as u64);
        let start = (first..end).find(is_data)?;
        let end = (start..end).find(|sector| !is_data(sector)).unwrap_or(end);
        Some((start * SECTOR as u64).max(offset)..end * SECTOR as u64)
    }

    /// Changes what the medium is like.
    pub fn change_medium(&self, change: impl FnOnce(&mut Medium)) {
        change(&mut self.state().medium);
    }

    /// Whether the space is limited.
    pub fn is_tight(&self) -> bool {
        self.state().medium.capacity.is_some()
    }

    /// Blocks in use, in all files together.
    pub fn used_blocks(&self) -> u64 {
        self.state().used_blocks
    }

    /// How many threads have opened the disk since the power came.
    pub fn io_count(&self) -> usize {
        self.state().ios.len()
    }

    /// Whether a thread's [`Io::reap`] has something to give; threads are counted
    /// in the order in which they opened the disk.
    pub fn has_completions(&self, io: usize) -> bool {
        !self.state().ios[io].ready.is_empty()
    }

    /// Forgets contents that no file has any more. To be called while everything is
    /// stable; copies of files cannot be compared with afterwards.
    pub fn tidy(&self) {
        let mut guard = self.state();
        let state = &mut *guard;
        if state.contents.len() > CONTENTS_MAX {
            let old = std::mem::replace(&mut state.contents, Contents::new());
            for file in &mut state.files {
                file.repack(&old, &mut state.contents);
            }
            state.origins = Origins::default();
        }
    }

    /// Whether there is anything for [`Self::step`] to do.
    pub fn is_busy(&self) -> bool {
        !self.state().pending.is_empty()
    }

    /// Lets one operation take effect or complete.
    pub fn step(&self) {
        self.state().step();
    }

    /// The power shall go after so many more changes and syncs, whoever makes them.
    pub fn cut_after(&self, changes: Option<u64>) {
        self.state().changes_left = changes;
    }

    /// Whether the power is on. While it is off, every call fails and nothing
    /// changes.
    pub fn is_powered(&self) -> bool {
        self.state().powered
    }

    /// Whether a cut now could lose something.
    pub fn is_unsynced(&self) -> bool {
        self.state().files.iter().any(SimFile::is_unsynced)
    }

    /// Turns the power off: nothing completes any more, and the memory of what
    /// was in flight is let go.
    pub fn power_off(&self) {
        let mut state = self.state();
        state.power_off();
    }

    /// Turns the power on again; chooses what has survived.
    pub fn power_on(&self) {
        self.state().power_on();
    }

    /// The process that uses it dies: of what it had submitted, each operation may
    /// still be done, and nobody hears of its end. Nothing can be done until
    /// [`Self::restart`].
    pub fn kill(&self) {
        self.state().kill();
    }

    /// Whether a sync has failed and nobody has heard of it: what a process that is
    /// killed now should have told cannot be known by the next one.
    pub fn has_unheard_failure(&self) -> bool {
        let state = self.state();
        let is_sync = |op: &Op| matches!(op, Op::Sync { .. } | Op::Write { dsync: true, .. });
        let mut ready = state.ios.iter().flat_map(|io| &io.ready);
        let mut pending = state.pending.iter();
        ready.any(|end| end.result.is_err() && is_sync(&end.op))
            || pending.any(|one| matches!(one.effect, Some(Err(_))) && is_sync(&one.op))
    }

    /// Another process opens the disk, on which everything is as the last one has
    /// left it, stable or not.
    pub fn restart(&self) {
        let mut state = self.state();
        state.powered = true;
        state.life += 1;
        state.changes_left = None;
        state.undone.clear();
        state.ios.clear();
        state.metadata_writes.clear();
    }

    /// Looks at what readers see now. The disk cannot be used meanwhile.
    pub fn view<R>(&self, look: impl FnOnce(&View<'_>) -> R) -> R {
        let state = self.state();
        let State {
            files,
            contents,
            origins,
            ..
        } = &*state;
        look(&View::new(files, &[], contents, origins))
    }

    /// Looks at what a cut now could leave, beside the top file as readers see it. There
    /// is no cut, and everything goes on. The disk cannot be used meanwhile.
    pub fn view_after_cut<R>(&self, top: FileId, look: impl FnOnce(&View<'_>, &SimFile) -> R) -> R {
        let mut guard = self.state();
        let state = &mut *guard;
        let left = state.after_cut();
        let State {
            files,
            contents,
            origins,
            ..
        } = state;
        let view = View::new(files, &left, contents, origins);
        look(&view, &files[usize::from(top.0)])
    }

    /// What a reader sees of a range now.
    pub fn read_live(&self, file: FileId, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.state().read_bytes(file, offset, &mut bytes);
        bytes
    }

    /// The length of a file, as readers see it.
    pub fn live_len(&self, file: FileId) -> u64 {
        self.state().files[usize::from(file.0)].len()
    }

    /// A copy of a file as readers see it, to compare with later.
    pub fn snapshot(&self, file: FileId) -> SimFile {
        self.state().files[usize::from(file.0)].clone()
    }

    /// Writes of metadata that were submitted since the last call.
    pub fn take_metadata_writes(&self) -> Vec<MetadataWrite> {
        std::mem::take(&mut self.state().metadata_writes)
    }

    /// What was done that never may be.
    pub fn take_violations(&self) -> Vec<String> {
        std::mem::take(&mut self.state().violations)
    }

    /// How many syncs and writes of metadata have failed since the last call.
    pub fn take_failures(&self) -> u64 {
        std::mem::take(&mut self.state().failures)
    }

    /// With what writes of metadata have failed whose error was taken note of, since the last
    /// call.
    pub fn take_failed_pages(&self) -> Vec<Errno> {
        std::mem::take(&mut self.state().failed_pages)
    }

    /// How many operations of a thread were begun and not given back.
    pub fn in_flight(&self, io: usize) -> usize {
        self.state().ios[io].in_flight
    }

    /// How many stable writes have failed in their sync since the last call, when
    /// others had written what was not stable.
    pub fn take_losses(&self) -> u64 {
        std::mem::take(&mut self.state().losses)
    }

    /// What has happened to copies since the last call.
    pub fn take_copies(&self) -> Copies {
        std::mem::take(&mut self.state().copies)
    }

    /// Starts to keep a record of everything that is done.
    pub fn start_trace(&self) {
        self.state().trace = Some(Vec::new());
    }

    /// Adds a line to the record, if there is one.
    pub fn note(&self, line: impl FnOnce() -> String) {
        self.state().note(line);
    }

    /// The record.
    pub fn take_trace(&self) -> Vec<String> {
        self.state().trace.take().unwrap_or_default()
    }
}

impl State {
    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    fn new_op(&mut self) -> OpId {
        self.completed.push(NOT_COMPLETED);
        OpId(self.completed.len() as u32 - 1)
    }

    fn complete(&mut self, id: OpId) {
        self.clock += 1;
        self.completed[id.0 as usize] = self.clock;
    }

    fn file(&mut self, file: FileId) -> &mut SimFile {
        &mut self.files[usize::from(file.0)]
    }

    /// To be called before a change: false if the power has gone.
    fn may_change(&mut self, file: FileId, what: &str) -> bool {
        if file < self.medium.first_writable {
            self.violations.push(format!("{what} of a lower level"));
        }
        self.spend_power()
    }

    /// To be called before a change or a sync: false if the power has gone.
    fn spend_power(&mut self) -> bool {
        match &mut self.changes_left {
            Some(0) => self.power_off(),
            Some(left) => *left -= 1,
            None => {}
        }
        self.powered
    }

    fn power_off(&mut self) {
        if std::mem::replace(&mut self.powered, false) {
            self.note(|| "the power goes".to_owned());
            let mut under_way = self.pending.iter();
            let is_copying = under_way.any(|pending| self.is_of_copy(&pending.op));
            self.copies.cut += u64::from(is_copying);
        }
        self.pending.clear();
        for io in &mut self.ios {
            io.queued.clear();
            io.ready.clear();
            io.in_flight = 0;
        }
    }

    // --- bytes ---

    fn read_bytes(&self, file: FileId, offset: u64, bytes: &mut [u8]) {
        let file = &self.files[usize::from(file.0)];
        for_sectors(offset, bytes.len() as u64, |sector, within, range| {
            let content = self.contents.get(file.sector(sector));
            bytes[range].copy_from_slice(&content[within]);
        });
    }

    fn write_bytes(&mut self, id: OpId, file: FileId, offset: u64, bytes: &[u8]) {
        for_sectors(offset, bytes.len() as u64, |sector, within, range| {
            let file = &mut self.files[usize::from(file.0)];
            let mut whole = *self.contents.get(file.sector(sector));
            whole[within].copy_from_slice(&bytes[range]);
            file.write(id, sector, self.contents.add(&whole));
        });
    }

    fn zero_bytes(&mut self, id: OpId, file: FileId, offset: u64, len: u64) {
        let end = (offset + len).min(self.file(file).len());
        for_sectors(offset, end.saturating_sub(offset), |sector, within, _| {
            let file = &mut self.files[usize::from(file.0)];
            if within.len() == SECTOR {
                file.zero(id, sector);
            } else {
                let mut whole = *self.contents.get(file.sector(sector));
                whole[within].fill(0);
                file.write(id, sector, self.contents.add(&whole));
            }
        });
    }

    // --- space ---

    /// The blocks that a range touches.
    fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        let block = u64::from(self.medium.block);
        (offset / block) as usize..(offset + len).div_ceil(block) as usize
    }

    /// Takes space for a write; false if there is not enough, and then nothing is
    /// taken.
    fn account_write(&mut self, file: FileId, offset: u64, len: u64) -> bool {
        let needed = self.blocks(offset, len).len() as u64;
        let capacity = self.medium.capacity.filter(|_| self.medium.copies_on_write);
        capacity.is_none_or(|capacity| self.used_blocks + needed <= capacity)
            && self.account(file, offset, len)
    }

    /// Takes space for a range; false if there is not enough, and then nothing
    /// is taken.
    fn account(&mut self, file: FileId, offset: u64, len: u64) -> bool {
        let blocks = self.blocks(offset, len);
        let allocated = &mut self.allocated[usize::from(file.0)];
        if allocated.len() < blocks.end {
            allocated.resize(blocks.end, false);
        }
        let missing = allocated[blocks.clone()].iter().filter(|&&is| !is).count() as u64;
        if let Some(capacity) = self.medium.capacity
            && missing > 0
            && self.used_blocks + missing > capacity
        {
            return false;
        }
        allocated[blocks].fill(true);
        self.used_blocks += missing;
        true
    }

    /// Gives the space of whole blocks inside a range back.
    fn give_back(&mut self, file: FileId, offset: u64, len: u64) {
        let block = u64::from(self.medium.block);
        let allocated = &mut self.allocated[usize::from(file.0)];
        let first = offset.div_ceil(block) as usize;
        let end = (((offset + len) / block) as usize).min(allocated.len());
        for is in allocated.get_mut(first..end).unwrap_or_default() {
            self.used_blocks -= u64::from(*is);
            *is = false;
        }
    }

    // --- operations ---

    fn submit(&mut self, io: usize) {
        if !self.powered {
            return;
        }
        for (tag, op) in std::mem::take(&mut self.ios[io].queued) {
            self.start(io, tag, op);
        }
    }

    fn start(&mut self, io: usize, tag: u64, op: Op) {
        let id = self.new_op();
        self.clock += 1;
        self.note(|| format!("io{io} starts {}: {}", id.0, describe(&op)));
        if let Op::Write {
            file,
            offset,
            buffer,
            ..
        } = &op
        {
            self.look_at_write(*file, *offset, buffer);
        }
        self.pending.push(Pending {
            io,
            tag,
            op,
            id,
            submitted: self.clock,
            slow: self.rng.random_ratio(1, 4),
            done: 0,
            effect: None,
        });
    }

    /// Watches for what no engine may do, and for what the counters want to know.
    fn look_at_write(&mut self, file: FileId, offset: u64, buffer: &Buffer) {
        let align = u64::from(self.medium.write_alignment);
        if !offset.is_multiple_of(align) || !(buffer.len() as u64).is_multiple_of(align) {
            let line = format!("write of {} bytes at {offset} is misaligned", buffer.len());
            self.violations.push(line);
        }
        if usize::from(file.0) + 1 != self.files.len() || offset >= self.medium.metadata_len {
            return;
        }
        let mine = self.md_pages(offset, buffer.len());
        let clash = self.pending.iter().any(|other| match &other.op {
            Op::Write {
                file: its_file,
                offset,
                buffer,
                ..
            } => {
                let its = self.md_pages(*offset, buffer.len());
                *its_file == file && its.start.max(mine.start) < its.end.min(mine.end)
            }
            _ => false,
        });
        if clash {
            let line = format!("I11: a second write of the md page at {offset} is in flight");
            self.violations.push(line);
        }
        if let Buffer::Owned(bytes) = buffer {
            self.record_metadata(file, offset, bytes.to_vec());
        }
    }

    /// The md pages that a write touches; the last one may end with data.
    fn md_pages(&self, offset: u64, len: usize) -> std::ops::Range<u64> {
        if offset >= self.medium.metadata_len {
            return 0..0;
        }
        offset / MD_PAGE..(offset + len as u64).div_ceil(MD_PAGE)
    }

    fn record_metadata(&mut self, file: FileId, offset: u64, bytes: Vec<u8>) {
        let certain_len = self.file(file).certain_len();
        self.metadata_writes.push(MetadataWrite {
            offset,
            bytes,
            certain_len,
        });
    }

    fn step(&mut self) {
        if self.pending.is_empty() || !self.powered {
            return;
        }
        let index = self.choose_pending();
        if self.is_stalled(&self.pending[index]) && !self.rng.random_ratio(1, 500) {
            return;
        }
        let mut pending = self.pending.swap_remove(index);
        if pending.effect.is_none() {
            self.take_effect(&mut pending);
        }
        if !self.powered {
            return;
        }
        match pending.effect {
            Some(result) if self.rng.random_bool(0.6) => self.finish(pending, result),
            _ => self.pending.push(pending),
        }
    }

    fn is_stalled(&self, pending: &Pending) -> bool {
        let is_read = |file| matches!(pending.op, Op::Read { file: of, .. } if of == file);
        let stalled = self.medium.stalled;
        stalled.is_some_and(|(file, first)| pending.io >= first && is_read(file))
    }

    /// Which operation goes on: seldom a slow one while there are others.
    fn choose_pending(&mut self) -> usize {
        let fast = self.pending.iter().filter(|pending| !pending.slow).count();
        if fast == 0 || self.rng.random_ratio(1, 16) {
            return self.rng.random_range(0..self.pending.len());
        }
        let chosen = self.rng.random_range(0..fast);
        let mut all = self.pending.iter().enumerate();
        let nth = all
            .by_ref()
            .filter(|(_, pending)| !pending.slow)
            .nth(chosen);
        nth.map_or(0, |(index, _)| index)
    }

    fn finish(&mut self, pending: Pending, mut result: Result<(), Errno>) {
        let id = pending.id;
        if let Op::Write {
            file,
            offset,
            dsync: true,
            ..
        } = &pending.op
        {
            let (file, offset) = (*file, *offset);
            if result.is_err() {
                self.file(file).fail_sync(|op| op == id, |_| false);
            } else if let Some(errno) = self.stable_write_error() {
                result = Err(errno);
                self.undone.push((file, offset, errno));
                self.lose(file, id);
            } else {
                self.file(file).sync(|op| op == id);
            }
        }
        // What a failed one has done is synced with the rest.
        self.complete(id);
        self.note(|| format!("{} ends: {result:?}", id.0));
        let io = &mut self.ios[pending.io];
        io.ready.push(Completion {
            tag: pending.tag,
            result,
            op: pending.op,
        });
    }

    /// The kernel ends what has started, and may give up what has not.
    fn kill(&mut self) {
        self.note(|| "the process is killed".to_owned());
        self.changes_left = None;
        // Nobody would hear of it: see `has_unheard_failure`.
        self.medium.faults.sync = 0.0;
        self.medium.faults.stable_write = 0.0;
        self.medium.faults.full_stable_write = 0.0;
        while !self.pending.is_empty() {
            let index = self.rng.random_range(0..self.pending.len());
            let mut pending = self.pending.swap_remove(index);
            let has_started = pending.effect.is_some() || pending.done > 0;
            if !has_started && self.rng.random() {
                self.complete(pending.id);
                continue;
            }
            while pending.effect.is_none() {
                self.take_effect(&mut pending);
            }
            if let Some(result) = pending.effect {
                self.finish(pending, result);
            }
        }
        self.power_off();
    }

    // --- power ---

    fn power_on(&mut self) {
        self.power_off();
        let left = self.after_cut();
        for (file, left) in self.files.iter_mut().zip(left) {
            if let Some(left) = left {
                file.settle(left);
            }
        }
        self.recover();
    }

    /// What a cut now could leave of the files that could lose something.
    fn after_cut(&mut self) -> Vec<Option<Left>> {
        let survivors = self.choose_survivors();
        let sector = self.medium.sector;
        let rng = &mut self.rng;
        let mut left = |file: &SimFile| file.after_cut(&survivors, sector, rng);
        let files = self.files.iter();
        files
            .map(|file| file.is_unsynced().then(|| left(file)))
            .collect()
    }

    fn choose_survivors(&mut self) -> Survivors {
        let survivors = self.rng.random_range(0..10);
        self.note(|| format!("of what is not stable survives: {survivors}"));
        let top = self.files.len() - 1;
        let ops: Vec<OpId> = self.files[top].unsynced_ops();
        let one = ops.choose(&mut self.rng).copied().unwrap_or(OpId(0));
        match survivors {
            0 | 1 => Survivors::Ops(Chosen::All(survivors == 1)),
            2 | 3 => Survivors::Ops(Chosen::One(one, survivors == 2)),
            4 | 5 => Survivors::Ops(Chosen::Side(one, survivors == 4)),
            6 => Survivors::Ops(self.toss(0.5)),
            7 => {
                let each = [0.05, 0.5, 0.95].choose(&mut self.rng);
                Survivors::Sectors(*each.unwrap_or(&0.5))
            }
            _ => Survivors::Region {
                border: self.medium.metadata_len,
                below: survivors == 8,
            },
        }
    }

    /// What a file system does when it is mounted again: it knows again which
    /// blocks take space.
    fn recover(&mut self) {
        self.powered = true;
        self.life += 1;
        self.changes_left = None;
        self.undone.clear();
        self.ios.clear();
        self.completed.clear();
        self.metadata_writes.clear();
        let per_block = self.medium.block as usize / SECTOR;
        self.used_blocks = 0;
        for (file, allocated) in self.files.iter().zip(&mut self.allocated) {
            let blocks = file.len().div_ceil(u64::from(self.medium.block)) as usize;
            allocated.resize(blocks, false);
            for (block, is) in allocated.iter_mut().enumerate() {
                let first = (block * per_block) as u64;
                *is |= (first..first + per_block as u64)
                    .any(|sector| file.sector(sector) != super::file::ContentId::ZEROS);
                self.used_blocks += u64::from(*is);
            }
        }
    }
}

/// Calls `each` with every sector that a range of bytes touches, the part of the
/// sector that is in the range, and that part's place in the range.
pub(super) fn for_sectors(
    offset: u64,
    len: u64,
    mut each: impl FnMut(u64, std::ops::Range<usize>, std::ops::Range<usize>),
) {
    let mut at = offset;
    while at < offset + len {
        let within = (at % SECTOR as u64) as usize;
        let piece = (SECTOR - within).min((offset + len - at) as usize);
        let done = (at - offset) as usize;
        each(
            at / SECTOR as u64,
            within..within + piece,
            done..done + piece,
        );
        at += piece as u64;
    }
}

fn describe(op: &Op) -> String {
    match op {
        Op::Read {
            file,
            offset,
            buffer,
        } => format!("read file {} {offset:#x}+{:#x}", file.0, buffer.len()),
        Op::Write {
            file,
            offset,
            buffer,
            dsync,
        } => format!(
            "write file {} {offset:#x}+{:#x} dsync {dsync}",
            file.0,
            buffer.len()
        ),
        other => format!("{other:x?}"),
    }
}
