//! Zeros by writing, where the file system cannot make them otherwise.
//!
//! Where space is to be kept, all of it is written. Where it is to be given back, and cannot
//! be, none must be taken: so what is there is read, and zeros are written over what is
//! anything else.

use std::ops::Range;

use rustix::io::Errno;

use super::super::direct::Alignment;
use super::super::errno;
use super::super::file::Description;
use super::super::pieces::{PIECE_LEN, Piece, Pieces};
use super::{Job, Memory, Obstacle, Route, Step, Verdict, memory_from, zero};
use crate::storage::zeros::first_data;
use crate::storage::{Op, ZeroMode};

/// Zeros from `at` to `end`, one chunk at a time. Where only whole blocks can be
/// written, a file that ends inside a block is made to end with it.
#[derive(Debug)]
pub(super) struct ZeroFill {
    at: u64,
    end: u64,
    /// Nothing is written where there are zeros.
    spares_zeros: bool,
    /// All zero, but for what was read. Absent until there is one.
    piece: Option<Piece>,
    /// Where the current chunk, which has the piece of memory to itself, begins in the file.
    chunk_start: u64,
    chunk_len: usize,
    /// What of it is transferred now.
    part: Range<usize>,
    /// The chunk is a block that is zeroed in part, or zeros are spared: it is being read
    /// first.
    reading: bool,
}

impl Job {
    pub(super) fn start_zero_fill(&mut self, file: &mut Description) -> Verdict {
        let Op::Zero {
            offset, len, mode, ..
        } = self.op
        else {
            return Verdict::Done(Err(Errno::INVAL));
        };
        // Writes beyond the end would make the file longer.
        let file_len = match file.shared().len_at_least() {
            Ok(len) => len,
            Err(error) => return Verdict::Done(Err(errno(error))),
        };
        let end = file_len.min(offset + len);
        if offset >= end {
            return Verdict::Done(Ok(()));
        }
        let mut fill = ZeroFill {
            at: offset,
            end,
            spares_zeros: mode == ZeroMode::Punch,
            piece: None,
            chunk_start: 0,
            chunk_len: 0,
            part: 0..0,
            reading: false,
        };
        fill.plan_chunk(file.direct());
        self.route = Route::ZeroFill(Box::new(fill));
        Verdict::Again
    }

    pub(super) fn zero_fill(
        &mut self,
        file: &mut Description,
        pieces: &mut Pieces,
    ) -> Result<Step, Obstacle> {
        let through = self.through;
        let Route::ZeroFill(fill) = &mut self.route else {
            return Err(Errno::INVAL.into());
        };
        self.direct = file.direct();
        let (start, ..) = fill.extent();
        let offset = start + through as u64;
        let memory = fill.memory(through, pieces)?;
        Ok(if fill.reading {
            Step::Read { offset, memory }
        } else {
            Step::Write {
                offset,
                memory,
                dsync: false,
            }
        })
    }
}

impl ZeroFill {
    /// The start in the file and the length of the current transfer, in bytes, and whether it
    /// is a read.
    pub(super) fn extent(&self) -> (u64, usize, bool) {
        let start = self.chunk_start + self.part.start as u64;
        (start, self.part.len(), self.reading)
    }

    /// What the current transfer has not read are zeros.
    pub(super) fn zero_from(&mut self, through: usize) {
        let Range { start, end } = self.part;
        zero(&mut self.piece, start + through, end);
    }

    /// What the current transfer should have read is to become zeros anyway, and is written
    /// over whatever it is. `false` if some of it stays, and has to be read.
    pub(super) fn takes_for_data(&mut self, through: usize) -> bool {
        let (from, to) = self.to_be_zeroed();
        let unread = self.part.start + through..self.part.end;
        let goes = self.reading && self.spares_zeros && from <= unread.start && unread.end <= to;
        if let Some(piece) = self.piece.as_mut().filter(|_| goes) {
            piece.memory[unread].fill(0xff);
        }
        goes
    }

    /// What of the chunk.
    fn to_be_zeroed(&self) -> (usize, usize) {
        let from = self.at.saturating_sub(self.chunk_start) as usize;
        let to = (self.end - self.chunk_start).min(self.chunk_len as u64) as usize;
        (from, to)
    }

    /// To be given back.
    pub(super) fn take_piece(&mut self) -> Option<Piece> {
        self.piece.take()
    }

    /// The memory of the current transfer without its first `through` bytes.
    fn memory(&mut self, through: usize, pieces: &mut Pieces) -> Result<Memory, Obstacle> {
        if self.piece.is_none() {
            self.piece = Some(pieces.take()?.ok_or(Obstacle::NoPiece)?);
            zero(&mut self.piece, 0, PIECE_LEN);
        }
        let piece = self.piece.as_mut().ok_or(Obstacle::NoPiece)?;
        Ok(memory_from(&mut piece.memory[self.part.clone()], through))
    }

    /// Chooses the chunk at `at`: a block that is zeroed in part, or as many
    /// whole ones as there is memory for.
    fn plan_chunk(&mut self, alignment: Option<Alignment>) {
        let block = block_of(alignment);
        let start = self.at - self.at % block;
        let len = self.end - self.at;
        self.chunk_start = start;
        let is_in_part = start < self.at || len < block;
        self.chunk_len = if is_in_part {
            block as usize
        } else {
            let whole = (PIECE_LEN as u64).min(len);
            (whole - whole % block) as usize
        };
        self.reading = is_in_part || self.spares_zeros;
        self.part = 0..self.chunk_len;
    }

    /// After the current transfer: whether there is anything left to do.
    pub(super) fn part_is_through(&mut self, alignment: Option<Alignment>) -> bool {
        let (from, to) = self.to_be_zeroed();
        if std::mem::take(&mut self.reading) {
            if !self.spares_zeros {
                zero(&mut self.piece, from, to);
                return true;
            }
            self.part = 0..0;
        } else if !self.spares_zeros {
            zero(&mut self.piece, 0, self.chunk_len);
        }
        let next = self.part.end.max(from);
        if self.spares_zeros
            && let Some(piece) = &mut self.piece
            && let Some(bytes) = piece.memory.get_mut(next..to)
            && let Some(data) = first_data(bytes, self.chunk_start + next as u64)
        {
            bytes[data.clone()].fill(0);
            let block = block_of(alignment) as usize;
            let (start, end) = (next + data.start, next + data.end);
            self.part = start - start % block..end.next_multiple_of(block);
            return true;
        }
        self.at = self.chunk_start + self.chunk_len as u64;
        if self.at >= self.end {
            return false;
        }
        self.plan_chunk(alignment);
        true
    }
}

/// What transfers have to be multiples of, in bytes.
fn block_of(alignment: Option<Alignment>) -> u64 {
    alignment.map_or(1, |alignment| u64::from(alignment.offset))
}
