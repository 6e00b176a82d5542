//! The disk, as those see it who tell others of it: numbers and names.
//!
//! What is behind them is another's.

use std::path::PathBuf;

use crate::device::{Latencies, LatencyBins, LimitsError, QueueReport, ThrottleLimits, Totals};
use crate::ploop::{BitmapInfo, EngineReport};

/// A disk that is being served.
pub trait Subject {
    /// Its levels, base first; there is one at least.
    fn levels(&self) -> Vec<Level>;

    /// Device and inode of the file of its top level, which can be called by many paths.
    fn file_id(&self) -> String;

    /// The same of the folder in which all is that belongs to it, if there is one.
    fn folder_id(&self) -> Option<String>;

    /// Whether its image is open here. While it is not, the rest is what was known last.
    fn is_open(&self) -> bool;

    /// Whether the guest's writes may be kept in a cache until it flushes.
    fn has_write_cache(&self) -> bool;

    /// What guests have done with it.
    fn totals(&self) -> Totals;

    /// The same by queues, those that have never run left out.
    fn queues(&self) -> Vec<QueueReport>;

    /// How the engine is doing.
    fn engine(&self) -> EngineReport;

    /// How long requests took.
    fn latencies(&self) -> Latencies;

    /// What of that was [asked for](Self::ask_for_bins).
    fn bins(&self) -> LatencyBins;

    /// Asks for intervals of reads, writes and flushes, where boundaries are given.
    fn ask_for_bins(&self, boundaries: [Option<Vec<u64>>; 3]);

    /// Asks for none any more.
    fn give_up_bins(&self);

    /// The first byte of the top level's file that whoever listens is told of when it, or one
    /// behind it, is used; 0 if there is none.
    fn write_threshold(&self) -> u64;

    /// Has that told of, once. Of a ploop image that is written to.
    fn set_write_threshold(&self, bytes: u64);

    /// Its dirty bitmaps, with what was changed until now. None while its image is not open.
    fn bitmaps(&self) -> Vec<BitmapInfo>;

    /// What guests may do.
    fn limits(&self) -> ThrottleLimits;

    /// Changes that.
    ///
    /// # Errors
    /// If there cannot be such limits.
    fn set_limits(&self, limits: ThrottleLimits) -> Result<(), LimitsError>;
}

/// One level of the disk.
#[derive(Clone, Debug)]
pub struct Level {
    /// Its file, as it was opened.
    pub file: PathBuf,
    /// Whether it is a ploop image; else a raw one.
    pub is_ploop: bool,
    /// Whether it is written to.
    pub is_writable: bool,
    /// Whether its file is used around the host's page cache.
    pub is_direct: bool,
    /// What of the disk it can have, in bytes.
    pub virtual_size: u64,
    /// What it takes on the host, in bytes, as of some seconds ago.
    pub actual_size: u64,
    /// In bytes.
    pub cluster_size: u64,
}
