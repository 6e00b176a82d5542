//! How often each invariant was put to the test.
//!
//! A run without a violation says something only about the situations in which
//! one could have happened. Each is counted here; what is written to header and
//! BAT is looked at for that, and two rules are checked on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::disk::{MetadataWrite, SimDisk};
use super::scenario::Scenario;
use super::session::Failure;
use crate::format::GuestCluster;
use crate::ploop::Engine;

/// A situation in which an invariant could be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Case {
    /// I1: a host cluster was mapped that another guest cluster had had.
    Moved,
    /// I2: a host cluster was mapped that had been mapped before.
    Reused,
    /// I3: a flush succeeded before which something was not stable.
    Flush,
    /// I4: a change succeeded in write-through.
    WriteThrough,
    /// I5: at a cut, some sectors could read one of several values.
    Undecided,
    /// I6: a mapping was written that hides a cluster of a lower delta.
    Copied,
    /// I5, I6: the power went while a cluster was being copied up.
    CopyCut,
    /// I5, I6: the host failed a read or a write of a copy.
    CopyFailed,
    /// I7: the host failed a sync or a write of metadata.
    HostFailed,
    /// I7: the sync of a stable write failed, and what others had written may be lost.
    LostOfOthers,
    /// I7: a flush failed.
    FailedFlush,
    /// I8: a mapping was written into a part that the file did not have when it
    /// was opened.
    Grown,
    /// I11: a page was written while one of its entries had to be held back.
    HeldBack,
    /// I12: the power went while the image was being opened or closed.
    Marking,
    /// I12: the image was closed for somebody who has opened it at once.
    Passed,
    /// I12: the power went and the format extension was still valid.
    ExtensionKept,
    /// I12: the power went and the format extension was not valid any more.
    ExtensionDropped,
    /// I12: the image was closed with bitmaps.
    ClosedWithBitmaps,
    /// I12: the disk became larger.
    Larger,
    /// I12: a cluster moved for that.
    MovedForBat,
    /// I12: the power went while the disk was becoming larger.
    LargerCut,
    /// I13: the process was killed meanwhile.
    LargerKilled,
    /// I15: a snapshot was made.
    Snapshot,
    /// I15: the power went while one was under way.
    SnapshotCut,
    /// I15: a level has gone.
    Merge,
    /// I15: a level has gone from which another one than the top has got what it had.
    Lift,
    /// I15: the power went while one was about to.
    MergeCut,
    /// I13: the process was killed meanwhile.
    MergeKilled,
    /// I13: the process was killed meanwhile.
    SnapshotKilled,
    /// I15: the file became shorter while it was used.
    Shorter,
    /// I15: the power went while space was being given back.
    CompactionCut,
    /// I13: the process was killed meanwhile.
    CompactionKilled,
    /// I13: it was killed in the midst of the step that changes the top.
    KilledInChange,
    /// I13: the process was killed while the guest lived on.
    Killed,
    /// I13: the process was killed, its guest with it, and the image opened again.
    Abandoned,
    /// I13: what it left changed the map that the disk had.
    TakenOver,
}

impl Case {
    const ALL: [(Self, &'static str); 36] = [
        (Self::Moved, "I1  cluster passed to another guest cluster"),
        (Self::Reused, "I2  freed cluster mapped again"),
        (Self::Flush, "I3  flush with something to flush"),
        (Self::WriteThrough, "I4  write-through change"),
        (Self::Undecided, "I5  cut with undecided sectors"),
        (Self::Copied, "I6  lower cluster copied up"),
        (Self::CopyCut, "I6  cut in the midst of a copy"),
        (Self::CopyFailed, "I6  error in the midst of a copy"),
        (Self::HostFailed, "I7  failed sync or metadata write"),
        (
            Self::LostOfOthers,
            "I7  failed stable write that may lose what others wrote",
        ),
        (Self::FailedFlush, "I7  flush that had to fail"),
        (Self::Grown, "I8  mapping in a part that was added"),
        (Self::HeldBack, "I11 page written with an entry held back"),
        (Self::Marking, "I12 cut while opening or closing"),
        (Self::Passed, "I12 closed for another process"),
        (Self::ExtensionKept, "I12 cut that left a format extension"),
        (Self::ExtensionDropped, "I12 cut after one was dropped"),
        (Self::ClosedWithBitmaps, "I12 image closed with bitmaps"),
        (Self::Larger, "I12 disk that became larger"),
        (Self::MovedForBat, "I12 cluster that moved for a larger BAT"),
        (
            Self::LargerCut,
            "I12 cut while the disk was becoming larger",
        ),
        (
            Self::LargerKilled,
            "I13 process killed while the disk was becoming larger",
        ),
        (Self::Snapshot, "I15 snapshot of a disk in use"),
        (Self::SnapshotCut, "I15 cut while a snapshot was being made"),
        (Self::Merge, "I15 level that has gone from a disk in use"),
        (Self::Lift, "I15 level that has gone from below another one"),
        (Self::MergeCut, "I15 cut while a level was about to go"),
        (
            Self::MergeKilled,
            "I13 process killed while a level was about to go",
        ),
        (
            Self::SnapshotKilled,
            "I13 process killed while a snapshot was being made",
        ),
        (Self::Shorter, "I15 file that became shorter"),
        (
            Self::CompactionCut,
            "I15 cut while space was being given back",
        ),
        (
            Self::CompactionKilled,
            "I13 process killed while space was being given back",
        ),
        (
            Self::KilledInChange,
            "I13 process killed in the midst of a change of the top",
        ),
        (Self::Killed, "I13 process killed under a living guest"),
        (
            Self::Abandoned,
            "I13 process killed together with its guest",
        ),
        (Self::TakenOver, "I13 map taken over from a killed process"),
    ];
}

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cases {
    counts: BTreeMap<Case, u64>,
    /// Header and BAT as they were last written.
    metadata: Vec<u8>,
    /// Which guest clusters each host cluster was ever mapped for, by BAT value.
    owners: BTreeMap<u32, BTreeSet<u32>>,
    /// The length of the file when it was opened.
    opened_len: u64,
}

impl Cases {
    /// One more.
    pub fn count(&mut self, case: Case) {
        *self.counts.entry(case).or_default() += 1;
    }

    /// One more, perhaps.
    pub fn count_if(&mut self, case: Case, is: bool) {
        if is {
            self.count(case);
        }
    }

    /// It has happened so many times.
    pub fn count_many(&mut self, case: Case, times: u64) {
        *self.counts.entry(case).or_default() += times;
    }

    /// How often.
    pub fn get(&self, case: Case) -> u64 {
        self.counts.get(&case).copied().unwrap_or(0)
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Self) {
        for (case, count) in &other.counts {
            *self.counts.entry(*case).or_default() += count;
        }
    }

    /// An image is about to be opened.
    pub fn begin(&mut self, disk: &SimDisk, scenario: &Scenario) {
        let top = scenario.top();
        self.opened_len = disk.live_len(top);
        self.metadata = disk.read_live(top, 0, scenario.medium.metadata_len as usize);
        disk.take_metadata_writes();
        let entries: Vec<(u32, u32)> =
            entries(&self.metadata, 64, scenario.top_entries()).collect();
        for (guest, value) in entries.into_iter().filter(|(_, value)| *value != 0) {
            self.owners.entry(value).or_default().insert(guest);
        }
    }

    /// There is a new top.
    pub fn begin_anew(&mut self, disk: &SimDisk, scenario: &Scenario) {
        self.owners.clear();
        self.begin(disk, scenario);
    }

    /// Header and BAT take so many bytes now.
    pub fn grow(&mut self, metadata_len: u64) {
        self.metadata.resize(metadata_len as usize, 0);
    }

    /// Looks at what was written to header and BAT since the last call.
    ///
    /// # Errors
    /// If it breaks I8 or I11.
    pub fn look_at_metadata(
        &mut self,
        disk: &SimDisk,
        scenario: &Scenario,
        engine: &Engine<SimDisk>,
    ) -> Result<(), Failure> {
        for write in disk.take_metadata_writes() {
            let mut is_held_back = false;
            for (guest, value) in entries(&write.bytes, write.offset, scenario.top_entries()) {
                if value != 0 {
                    self.look_at_entry(scenario, &write, guest, value)?;
                    let had = self.entry(guest);
                    let is_moved = had != 0 && had != value && engine.keeps_out(had);
                    self.count_if(Case::MovedForBat, is_moved);
                }
                let mapped = engine.is_mapped_here(GuestCluster(guest));
                is_held_back |= value == 0 && mapped;
            }
            self.count_if(Case::HeldBack, is_held_back);
            let at = write.offset as usize;
            let end = (at + write.bytes.len()).min(self.metadata.len());
            self.metadata[at..end].copy_from_slice(&write.bytes[..end - at]);
        }
        Ok(())
    }

    /// What the disk has for a guest cluster.
    fn entry(&self, guest: u32) -> u32 {
        let at = 64 + 4 * guest as usize;
        u32::from_le_bytes(self.metadata[at..at + 4].try_into().unwrap())
    }

    fn look_at_entry(
        &mut self,
        scenario: &Scenario,
        write: &MetadataWrite,
        guest: u32,
        value: u32,
    ) -> Result<(), Failure> {
        if self.entry(guest) == value {
            return Ok(());
        }
        let unit = if scenario.version == 1 {
            512
        } else {
            scenario.cluster
        };
        let end = u64::from(value) * unit + scenario.cluster;
        if end > write.certain_len {
            return Err(format!(
                "I8: the entry of {guest} is written, its cluster ends at {end:#x}, and only {:#x} bytes of the file are certain",
                write.certain_len
            ));
        }
        let owners = self.owners.entry(value).or_default();
        let (reused, moved) = (
            !owners.is_empty(),
            owners.iter().any(|owner| *owner != guest),
        );
        owners.insert(guest);
        self.count_if(Case::Reused, reused);
        self.count_if(Case::Moved, moved);
        self.count_if(Case::Grown, end > self.opened_len);
        self.count_if(Case::Copied, scenario.lower_has(guest));
        Ok(())
    }
}

/// The entries in a piece of header and BAT that starts at `offset`; the BAT has `count`.
fn entries(bytes: &[u8], offset: u64, count: u32) -> impl Iterator<Item = (u32, u32)> {
    let skip = 64_u64.saturating_sub(offset) as usize;
    let first = (offset.max(64) - 64) as u32 / 4;
    let words = bytes.get(skip..).unwrap_or_default().chunks_exact(4);
    let values = words.map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    (first..count).zip(values)
}

impl fmt::Display for Cases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (case, text) in Case::ALL {
            writeln!(f, "  {:>10}  {text}", self.get(case))?;
        }
        Ok(())
    }
}
