//! What a client asks of the engine, and what it hears back.

use smallvec::SmallVec;

use super::EngineError;
use crate::format::Sector;
use crate::storage::Segments;

/// A range of sectors of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    /// The first.
    pub start: Sector,
    /// How many.
    pub count: Sector,
}

/// What shall be done.
#[derive(Debug)]
pub enum Command {
    /// Fill the memory, whose length is a multiple of a sector, from `start`.
    Read {
        /// From where.
        start: Sector,
        /// To where.
        data: Segments,
    },
    /// Write the memory, whose length is a multiple of a sector, at `start`.
    Write {
        /// To where.
        start: Sector,
        /// What.
        data: Segments,
    },
    /// Make every write, discard and zeroing that completed before stable.
    Flush,
    /// The content is of no more use: give the space back. Whole clusters read as
    /// zeros afterwards, unless there are lower levels or the disk is a raw file:
    /// then, what was not a whole block of the host may be as it was.
    Discard {
        /// Of one or more ranges.
        ranges: SmallVec<[SectorRange; 1]>,
    },
    /// Zeros shall be read from now on.
    WriteZeroes {
        /// In one or more ranges.
        ranges: SmallVec<[SectorRange; 1]>,
        /// Whether the space may be given back.
        unmap: bool,
    },
}

/// A command with the client's name for it.
#[derive(Debug)]
pub struct Request {
    /// Comes back in [`Done::tag`].
    pub tag: u64,
    /// What shall be done.
    pub command: Command,
}

/// The end of a request. Every request ends exactly once.
#[derive(Debug)]
pub struct Done {
    /// As given in [`Request::tag`].
    pub tag: u64,
    /// How it went.
    pub result: Result<(), EngineError>,
}
