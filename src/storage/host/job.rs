//! One operation as a sequence of steps for the kernel.
//!
//! Both back ends ask a [`Job`] what to do next and tell it how that ended, so
//! they cannot differ in what they make of short transfers, of the end of the
//! file, of memory that direct I/O cannot use, or of a file system that lacks
//! something. Knows no system call but `fstat` and `ftruncate`; never blocks on
//! data.

#[cfg(test)]
mod tests;
mod zero_fill;

use std::os::fd::RawFd;

use rustix::io::Errno;

use super::direct::{Alignment, refuses_direct};
use super::errno;
use super::file::{Description, Fallocation, SharedFile};
use super::lease;
use super::pieces::{PIECE_LEN, Piece, Pieces};
use crate::storage::{Buffer, FileId, Op, Segment, ZeroMode};
use zero_fill::ZeroFill;

/// How many segments the kernel takes at once (`IOV_MAX`).
const MAX_SEGMENTS: usize = 1024;
/// How many bytes are taken at once: what Linux transfers at most, which is also
/// a multiple of every alignment.
const MAX_TRANSFER: usize = 0x7fff_f000;
/// How often a step may make no progress before that is an error.
const PATIENCE: u8 = 100;

/// What the kernel is to do next.
#[derive(Debug)]
pub(super) enum Step {
    /// Fill the memory.
    Read { offset: u64, memory: Memory },
    /// Write the memory; stable at once if `dsync`.
    Write {
        offset: u64,
        memory: Memory,
        dsync: bool,
    },
    /// `fallocate(2)`.
    Fallocate {
        what: Fallocation,
        offset: u64,
        len: u64,
    },
    /// `fdatasync(2)`, or `fsync(2)` where that leaves something out.
    Sync {
        /// `fsync(2)`.
        whole: bool,
        /// Not by way of what a ring was told of: since then another thread may have put
        /// another description in the place of the one that all share.
        fd: RawFd,
    },
    /// Nothing yet: it is in doubt whether the file may be used. It is to be asked again when
    /// this is readable.
    Undecided {
        /// See [`SharedFile::decided_fd`].
        decided: RawFd,
    },
    /// Nothing yet: there is no piece of memory that it can go through. It is to be
    /// asked again when another operation of this thread has given one back.
    Wait,
    /// Nothing: the operation ends like this.
    Nothing(Result<(), Errno>),
}

/// The memory of a step, valid until the job is told how the step ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Memory {
    /// In one piece.
    One { ptr: *mut u8, len: u32 },
    /// In several, laid out like `struct iovec`.
    Many { list: *const Segment, count: u32 },
}

/// What the end of a step means for the operation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It takes another step.
    Again,
    /// It ends like this.
    Done(Result<(), Errno>),
    /// It ends with this error, which may be that of a lock that is lost: when that is known.
    Doubted {
        /// Of the operation.
        error: Errno,
        /// See [`SharedFile::decided_fd`].
        decided: RawFd,
    },
}

/// An operation on its way.
#[derive(Debug)]
pub(super) struct Job {
    op: Op,
    route: Route,
    /// How much of the current transfer is through, in bytes.
    through: usize,
    /// The alignment of the step under way, if that is direct.
    direct: Option<Alignment>,
    /// Steps in a row that made no progress.
    stalls: u8,
    /// What a stable write failed with that was direct: either its data or its sync. The
    /// data alone is tried, to know which.
    refused_stable: Option<Errno>,
    /// What a sync was made by last: see [`Description::next_to_sync`].
    synced: Option<RawFd>,
}

/// The way that the bytes take.
#[derive(Debug)]
enum Route {
    /// Between the file and the memory of the operation.
    Straight,
    /// The same, from the middle on: what is left of the memory.
    Rest(Vec<Segment>),
    /// Through memory of our own, because direct I/O cannot use that of the
    /// operation, or not from where it starts to where it ends.
    Bounce(Box<Bounce>),
    /// Zeros are written, because the file system cannot make them: all of them, or where
    /// there is anything else, as the mode wants it.
    ZeroFill(Box<ZeroFill>),
}

/// What is left of a transfer, a piece of memory at a time.
#[derive(Debug)]
struct Bounce {
    /// Absent until there is one.
    piece: Option<Piece>,
    /// The current part, in bytes of the file.
    start: u64,
    len: usize,
    /// Of the last part.
    end: u64,
}

/// Why no step can be taken.
enum Obstacle {
    /// See [`Step::Wait`].
    NoPiece,
    Error(Errno),
}

impl From<Errno> for Obstacle {
    fn from(error: Errno) -> Self {
        Self::Error(error)
    }
}

impl From<Obstacle> for Step {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::NoPiece => Self::Wait,
            Obstacle::Error(error) => Self::Nothing(Err(error)),
        }
    }
}

impl Job {
    pub(super) fn new(op: Op) -> Self {
        Self {
            op,
            route: Route::Straight,
            through: 0,
            direct: None,
            stalls: 0,
            refused_stable: None,
            synced: None,
        }
    }

    /// The file that it is about.
    pub(super) fn file(&self) -> FileId {
        self.op.file()
    }

    /// The operation.
    pub(super) fn op(&self) -> &Op {
        &self.op
    }

    /// What it has of [`Pieces`], to be given back when it has ended.
    pub(super) fn take_piece(&mut self) -> Option<Piece> {
        match &mut self.route {
            Route::Bounce(bounce) => bounce.piece.take(),
            Route::ZeroFill(fill) => fill.take_piece(),
            Route::Straight | Route::Rest(_) => None,
        }
    }

    /// Gives the operation back.
    pub(super) fn into_op(self) -> Op {
        self.op
    }

    /// Whether the last step could not be done without blocking.
    pub(super) fn may_block(&self) -> bool {
        self.stalls > 0
    }

    /// What to do next. Until [`Self::ended`] says otherwise, asking again gives
    /// the same step. If it takes memory of our own, that is one of `pieces`.
    pub(super) fn step(&mut self, file: &mut Description, pieces: &mut Pieces) -> Step {
        if let Some(end) = self.nothing_to_do() {
            return Step::Nothing(end);
        }
        if self.is_lost(file.shared()) {
            return refusal(file.shared());
        }
        match self.op {
            Op::Read { .. } | Op::Write { .. } => {
                self.transfer(file, pieces).unwrap_or_else(Step::from)
            }
            Op::Zero {
                offset, len, mode, ..
            } => {
                let what = Self::fallocation(mode);
                if matches!(self.route, Route::ZeroFill(_)) {
                    self.zero_fill(file, pieces).unwrap_or_else(Step::from)
                } else if file.shared().can(what) {
                    Step::Fallocate { what, offset, len }
                } else {
                    match self.start_zero_fill(file) {
                        Verdict::Again => self.zero_fill(file, pieces).unwrap_or_else(Step::from),
                        Verdict::Done(end) => Step::Nothing(end),
                        Verdict::Doubted { error, .. } => Step::Nothing(Err(error)),
                    }
                }
            }
            Op::Allocate { offset, len, .. } => {
                let what = Fallocation::Allocate;
                if file.shared().can(what) {
                    Step::Fallocate { what, offset, len }
                } else {
                    Step::Nothing(extend(file, offset + len))
                }
            }
            Op::Sync { .. } => match file.next_to_sync(self.synced) {
                Some(fd) => Step::Sync {
                    whole: file.shared().syncs_whole(),
                    fd,
                },
                None => Step::Nothing(Ok(())),
            },
            Op::Clone { .. } => Step::Nothing(Err(Errno::OPNOTSUPP)),
        }
    }

    /// Takes note of the end of a step: bytes transferred or zero, or the
    /// negative error number, as io_uring reports it.
    pub(super) fn ended(&mut self, result: i32, file: &mut Description) -> Verdict {
        let Ok(count) = usize::try_from(result) else {
            return self.failed(Errno::from_raw_os_error(result.saturating_neg()), file);
        };
        if self.refused_stable.is_some() {
            // Its data can be written.
            return match self.failed_sync(file) {
                Some(error) => Verdict::Done(Err(error)),
                None => Verdict::Again,
            };
        }
        match (&self.op, &self.route) {
            (Op::Read { .. } | Op::Write { .. }, _) | (Op::Zero { .. }, Route::ZeroFill(_)) => {
                self.transferred(count, file)
            }
            (Op::Allocate { offset, len, .. }, _) => {
                file.shared().has_grown_to(offset + len);
                Verdict::Done(Ok(()))
            }
            (Op::Sync { .. }, _) => {
                self.synced = file.next_to_sync(self.synced);
                match file.next_to_sync(self.synced) {
                    Some(_) => Verdict::Again,
                    None => Verdict::Done(Ok(())),
                }
            }
            _ => Verdict::Done(Ok(())),
        }
    }

    /// The end of an operation on no byte, or on bytes that no file can have.
    fn nothing_to_do(&self) -> Option<Result<(), Errno>> {
        let (offset, len) = match &self.op {
            Op::Read { offset, buffer, .. } | Op::Write { offset, buffer, .. } => {
                (*offset, buffer.len() as u64)
            }
            Op::Zero { offset, len, .. } | Op::Allocate { offset, len, .. } => (*offset, *len),
            Op::Sync { .. } => return None,
            // Of two files, and done beside: see `super::clone`.
            Op::Clone { .. } => return Some(Err(Errno::OPNOTSUPP)),
        };
        if offset
            .checked_add(len)
            .is_none_or(|end| end > i64::MAX as u64)
        {
            return Some(Err(Errno::INVAL));
        }
        (len == 0).then_some(Ok(()))
    }

    /// Whether it concerns what may not be used, or what somebody has cut off the file. Nothing may make such
    /// a file longer: zeros would then be where data was. And nothing that was
    /// written to it can be called stable.
    fn is_lost(&self, file: &SharedFile) -> bool {
        match &self.op {
            Op::Read { offset, buffer, .. } | Op::Write { offset, buffer, .. } => {
                !file.is_usable_up_to(offset + buffer.len() as u64)
            }
            Op::Zero { offset, len, .. } => !file.is_usable_up_to(offset + len),
            // Rare enough for a look each time, before it hides the cut.
            Op::Allocate { .. } => !file.is_usable() || file.is_found_cut(),
            Op::Clone { .. } | Op::Sync { .. } => !file.is_usable(),
        }
    }

    fn failed(&mut self, error: Errno, file: &mut Description) -> Verdict {
        if error == Errno::AGAIN && self.stalled(error) == Verdict::Again {
            return Verdict::Again;
        }
        match (error, &self.op) {
            (Errno::INTR, _) => Verdict::Again,
            (error, op) if self.direct.is_some() && refuses_direct(error) => {
                let is_stable = matches!(op, Op::Write { dsync: true, .. });
                if is_stable && self.refused_stable.is_none() {
                    self.refused_stable = Some(error);
                } else {
                    self.refused_stable = None;
                    file.stop_direct(error);
                }
                Verdict::Again
            }
            (Errno::OPNOTSUPP | Errno::NOSYS, Op::Zero { mode, .. })
                if !matches!(self.route, Route::ZeroFill(_)) =>
            {
                file.shared().cannot(Self::fallocation(*mode), error);
                self.start_zero_fill(file)
            }
            (Errno::OPNOTSUPP | Errno::NOSYS, Op::Allocate { offset, len, .. }) => {
                file.shared().cannot(Fallocation::Allocate, error);
                Verdict::Done(extend(file, offset + len))
            }
            // Whoever tries the write without its sync, and finds this error, knows more.
            _ => {
                let error = self.failed_sync(file).unwrap_or(error);
                doubt(file.shared(), &self.op, error).unwrap_or(Verdict::Done(Err(error)))
            }
        }
    }

    /// What the sync of a stable write failed with, since its data alone is not refused.
    /// Nothing, if direct I/O was given up meanwhile: then its data may have been refused as
    /// well, and a ring may have taken the last step by another description.
    fn failed_sync(&mut self, file: &mut Description) -> Option<Errno> {
        let error = self.refused_stable.take()?;
        file.direct().is_some().then_some(error)
    }

    /// Another try, if there were not too many.
    fn stalled(&mut self, error: Errno) -> Verdict {
        self.stalls += 1;
        if self.stalls < PATIENCE {
            Verdict::Again
        } else {
            Verdict::Done(Err(error))
        }
    }

    fn fallocation(mode: ZeroMode) -> Fallocation {
        match mode {
            ZeroMode::Punch => Fallocation::Punch,
            ZeroMode::KeepAllocated => Fallocation::ZeroRange,
        }
    }
}

/// What is done with what may not be used at present.
#[cold]
fn refusal(file: &SharedFile) -> Step {
    match (file.why_unusable(), file.decided_fd()) {
        (None, Some(decided)) => Step::Undecided { decided },
        (error, _) => Step::Nothing(Err(error.unwrap_or(Errno::IO))),
    }
}

/// If an error may be that of a lock that is lost, has that found out.
fn doubt(file: &SharedFile, op: &Op, error: Errno) -> Option<Verdict> {
    let lease = file.lease().filter(|_| lease::tells_of_loss(error))?;
    let decided = lease.decided_fd();
    let is_doubted = match op {
        Op::Sync { .. } | Op::Write { dsync: true, .. } => lease.doubt_by_sync(),
        _ => lease.doubt(),
    };
    is_doubted.then_some(Verdict::Doubted { error, decided })
}

/// Transfers.
impl Job {
    /// The next part of a read or a write.
    fn transfer(&mut self, file: &mut Description, pieces: &mut Pieces) -> Result<Step, Obstacle> {
        self.direct = file.direct();
        if self.direct.is_none() {
            // See `failed_sync`.
            self.refused_stable = None;
        }
        if let Some(alignment) = self.direct
            && matches!(self.route, Route::Straight)
            && !is_usable(&self.op, alignment)
        {
            self.bounce(alignment)?;
        }
        let through = self.through;
        let (start, memory) = match (&mut self.op, &mut self.route) {
            (
                Op::Read { offset, buffer, .. } | Op::Write { offset, buffer, .. },
                Route::Straight,
            ) => (*offset, memory_of(buffer)),
            (op, Route::Rest(rest)) => (op_offset(op), memory_of_list(rest)),
            (op, Route::Bounce(bounce)) => (bounce.start, bounce.memory(op, through, pieces)?),
            // Not reached: these are not transfers of the operation's own bytes.
            _ => return Err(Errno::INVAL.into()),
        };
        let offset = start + through as u64;
        Ok(match self.op {
            Op::Write { dsync, .. } => Step::Write {
                offset,
                memory,
                dsync: dsync && self.refused_stable.is_none(),
            },
            _ => Step::Read { offset, memory },
        })
    }

    /// Changes to memory of our own. A write can only be bounced if it starts
    /// and ends where a transfer may: what else is in its first and last block
    /// is the caller's to know, since it must not change between.
    fn bounce(&mut self, alignment: Alignment) -> Result<(), Errno> {
        let (start, end) = match &self.op {
            Op::Read { offset, buffer, .. } => (
                alignment.floor(*offset),
                alignment.ceil(*offset + buffer.len() as u64),
            ),
            Op::Write { offset, buffer, .. } => {
                if !alignment.fits(*offset) || !alignment.fits(buffer.len() as u64) {
                    return Err(Errno::INVAL);
                }
                (*offset, *offset + buffer.len() as u64)
            }
            _ => return Err(Errno::INVAL),
        };
        let mut bounce = Box::new(Bounce {
            piece: None,
            start,
            len: 0,
            end,
        });
        bounce.choose_len();
        self.route = Route::Bounce(bounce);
        Ok(())
    }

    /// The start in the file and the length of the current transfer, in bytes,
    /// and whether it is a read.
    fn extent(&self) -> (u64, usize, bool) {
        let is_read = matches!(self.op, Op::Read { .. });
        match (&self.op, &self.route) {
            (_, Route::Bounce(bounce)) => (bounce.start, bounce.len, is_read),
            (_, Route::ZeroFill(fill)) => fill.extent(),
            (Op::Read { offset, buffer, .. } | Op::Write { offset, buffer, .. }, _) => {
                (*offset, buffer.len(), is_read)
            }
            _ => (0, 0, false),
        }
    }

    fn transferred(&mut self, count: usize, file: &mut Description) -> Verdict {
        let (start, total, is_read) = self.extent();
        if count == 0 {
            return if is_read {
                self.reached_end_of_file(file)
            } else {
                Verdict::Done(Err(Errno::IO))
            };
        }
        self.through = total.min(self.through.saturating_add(count));
        if self.through == total {
            return self.transfer_is_whole(file);
        }
        let mut progress = count;
        if let Some(alignment) = self.direct {
            let position = start + self.through as u64;
            let beyond = alignment.beyond(position) as usize;
            if beyond > 0 {
                // A direct transfer cannot go on from here. A read that ends in
                // the middle of a block has usually met the end of the file.
                if is_read && matches!(file.shared().len(), Ok(len) if len <= position) {
                    return self.reached_end_of_file(file);
                }
                self.through -= beyond;
                progress = count.saturating_sub(beyond);
            }
        }
        if progress > 0 {
            self.stalls = 0;
        } else if self.stalled(Errno::IO) != Verdict::Again {
            return Verdict::Done(Err(Errno::IO));
        }
        self.point_at_rest();
        Verdict::Again
    }

    /// After a part went through the memory of the operation itself.
    fn point_at_rest(&mut self) {
        if let (
            Op::Read { buffer, .. } | Op::Write { buffer, .. },
            Route::Straight | Route::Rest(_),
        ) = (&mut self.op, &self.route)
        {
            self.route = Route::Rest(segments_from(buffer, self.through));
        }
    }

    /// What is left of a read is beyond the end of the file: zeros, if nothing was
    /// ever there.
    fn reached_end_of_file(&mut self, file: &mut Description) -> Verdict {
        let through = self.through;
        let (start, ..) = self.extent();
        let position = start + through as u64;
        if file.shared().reaches_beyond(position)
            && let Route::ZeroFill(fill) = &mut self.route
            && fill.takes_for_data(through)
        {
            return self.transfer_is_whole(file);
        }
        if file.shared().misses_data_at(position) {
            return Verdict::Done(Err(Errno::IO));
        }
        if file.shared().reaches_beyond(position) {
            // The end was behind that all the time, and a server late (GlusterFS with shards),
            // or the file has become longer meanwhile. These are no zeros of ours to make up.
            return self.stalled(Errno::IO);
        }
        match (&mut self.op, &mut self.route) {
            (_, Route::Bounce(bounce)) => {
                let len = bounce.len;
                zero(&mut bounce.piece, through, len);
            }
            (_, Route::ZeroFill(fill)) => fill.zero_from(through),
            (Op::Read { buffer, .. }, _) => fill_zero_from(buffer, through),
            _ => {}
        }
        self.transfer_is_whole(file)
    }

    fn transfer_is_whole(&mut self, file: &mut Description) -> Verdict {
        match (&mut self.op, &mut self.route) {
            (op, Route::Bounce(bounce)) => {
                bounce.copy_out(op);
                self.through = 0;
                if bounce.is_last() {
                    Verdict::Done(Ok(()))
                } else {
                    bounce.go_on();
                    bounce.copy_in(op);
                    Verdict::Again
                }
            }
            (_, Route::ZeroFill(fill)) => {
                self.through = 0;
                if fill.part_is_through(file.direct()) {
                    Verdict::Again
                } else {
                    Verdict::Done(Ok(()))
                }
            }
            _ => Verdict::Done(Ok(())),
        }
    }
}

impl Bounce {
    /// The memory of the current part without its first `through` bytes.
    fn memory(&mut self, op: &Op, through: usize, pieces: &mut Pieces) -> Result<Memory, Obstacle> {
        if self.piece.is_none() {
            self.piece = Some(pieces.take()?.ok_or(Obstacle::NoPiece)?);
            self.copy_in(op);
        }
        let piece = self.piece.as_mut().ok_or(Obstacle::NoPiece)?;
        Ok(memory_from(&mut piece.memory[..self.len], through))
    }

    fn choose_len(&mut self) {
        // Start and end are aligned, and so is the length of a piece.
        self.len = (self.end - self.start).min(PIECE_LEN as u64) as usize;
    }

    fn is_last(&self) -> bool {
        self.start + self.len as u64 == self.end
    }

    fn go_on(&mut self) {
        self.start += self.len as u64;
        self.choose_len();
    }

    /// The bytes of a write into the piece.
    fn copy_in(&mut self, op: &Op) {
        if let (Op::Write { offset, buffer, .. }, Some(piece)) = (op, &mut self.piece) {
            let from = (self.start - offset) as usize;
            copy_from_buffer(buffer, from, &mut piece.memory[..self.len]);
        }
    }

    /// The bytes of a read from the piece, without what is around them in the first
    /// and the last block.
    fn copy_out(&self, op: &mut Op) {
        if let (Op::Read { offset, buffer, .. }, Some(piece)) = (op, &self.piece) {
            let part_end = self.start + self.len as u64;
            let from = self.start.max(*offset);
            let to = part_end.min(*offset + buffer.len() as u64);
            let bytes = &piece.memory[(from - self.start) as usize..(to - self.start) as usize];
            copy_to_buffer(buffer, (from - *offset) as usize, bytes);
        }
    }
}

/// Makes the file longer where it cannot be allocated.
fn extend(file: &Description, len: u64) -> Result<(), Errno> {
    file.shared().extend_to(len).map_err(errno)
}

fn op_offset(op: &Op) -> u64 {
    match op {
        Op::Read { offset, .. }
        | Op::Write { offset, .. }
        | Op::Zero { offset, .. }
        | Op::Allocate { offset, .. } => *offset,
        Op::Clone { .. } | Op::Sync { .. } => 0,
    }
}

/// Whether the memory and the place of a transfer are as direct I/O wants them.
fn is_usable(op: &Op, alignment: Alignment) -> bool {
    let (Op::Read { offset, buffer, .. } | Op::Write { offset, buffer, .. }) = op else {
        return true;
    };
    alignment.fits(*offset)
        && match buffer {
            Buffer::Client(segments) => segments
                .as_slice()
                .iter()
                .all(|segment| alignment.fits_memory(segment.as_ptr() as usize, segment.len())),
            Buffer::Owned(bytes) => alignment.fits_memory(bytes.as_ptr() as usize, bytes.len()),
        }
}

fn zero(piece: &mut Option<Piece>, from: usize, to: usize) {
    if let Some(piece) = piece {
        piece.memory[from..to].fill(0);
    }
}

/// Fills `bytes` from the buffer, from its byte `from` on.
fn copy_from_buffer(buffer: &Buffer, from: usize, bytes: &mut [u8]) {
    match buffer {
        Buffer::Client(segments) => segments.copy_to(from, bytes),
        Buffer::Owned(own) => bytes.copy_from_slice(&own[from..from + bytes.len()]),
    }
}

/// Puts `bytes` into the buffer, from its byte `to` on.
fn copy_to_buffer(buffer: &mut Buffer, to: usize, bytes: &[u8]) {
    match buffer {
        Buffer::Client(segments) => segments.copy_from(to, bytes),
        Buffer::Owned(own) => own[to..to + bytes.len()].copy_from_slice(bytes),
    }
}

fn fill_zero_from(buffer: &mut Buffer, from: usize) {
    match buffer {
        Buffer::Client(segments) => {
            const ZEROES: [u8; 4096] = [0; 4096];
            let mut at = from;
            while at < segments.len() {
                let len = ZEROES.len().min(segments.len() - at);
                segments.copy_from(at, &ZEROES[..len]);
                at += len;
            }
        }
        Buffer::Owned(bytes) => bytes[from..].fill(0),
    }
}

fn one(ptr: *mut u8, len: usize) -> Memory {
    Memory::One {
        ptr,
        // Not larger than 31 bits.
        len: len.min(MAX_TRANSFER) as u32,
    }
}

fn memory_from(bytes: &mut [u8], from: usize) -> Memory {
    let rest = &mut bytes[from..];
    one(rest.as_mut_ptr(), rest.len())
}

fn memory_of(buffer: &mut Buffer) -> Memory {
    match buffer {
        Buffer::Client(segments) => memory_of_list(segments.as_slice()),
        Buffer::Owned(bytes) => one(bytes.as_mut_ptr(), bytes.len()),
    }
}

fn memory_of_list(list: &[Segment]) -> Memory {
    match list {
        [segment] => one(segment.as_ptr(), segment.len()),
        _ => Memory::Many {
            list: list.as_ptr(),
            count: list.len().min(MAX_SEGMENTS) as u32,
        },
    }
}

/// The memory of a buffer without its first `skip` bytes.
fn segments_from(buffer: &mut Buffer, skip: usize) -> Vec<Segment> {
    match buffer {
        Buffer::Client(segments) => segments.list_from(skip),
        Buffer::Owned(bytes) => {
            let rest = &mut bytes[skip..];
            vec![Segment::new(rest.as_mut_ptr(), rest.len())]
        }
    }
}
