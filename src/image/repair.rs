//! Repairs of one image file.
//!
//! Each can be cut off anywhere and run again: the in-use mark stands from the
//! first change to the last, a cluster is copied and stable before an entry
//! points at it, and entries are stable before what they pointed at is given
//! back.

use std::ops::Range;

use super::check::{Findings, Repair, examine};
use super::delta::Delta;
use super::error::{ImageError, Result};
use super::file::ImageFile;
use crate::format::{
    BatProblem, Geometry, GuestCluster, HostCluster, InUse, SECTOR_SIZE, Version, scan_bat_with,
};

/// Repairs what `what` says of what was `found`; says in `done` what it did about
/// entries.
pub(super) fn repair<F: ImageFile>(
    delta: &mut Delta<F>,
    what: Repair,
    found: &Findings,
    done: &mut Vec<String>,
) -> Result<()> {
    let found_as = delta.header().in_use;
    let leave_as = match (what, found_as) {
        // Only what is known to be sound is closed.
        (Repair::Leaks, mark) => mark,
        // Where no entry changes, dirty bitmaps stay right.
        (Repair::All, InUse::ClosedWithExtension) if found.is_sound() => found_as,
        (Repair::All, _) => InUse::Closed,
    };
    if delta.header().first_block_is_wrong() {
        delta.rename_opening()?;
        delta.accept_first_block();
        // With the mark, in one sector, whatever the mark was.
        delta.set_mark(InUse::Open);
        delta.write_header()?;
    }
    delta.begin()?;
    if what == Repair::All {
        repair_entries(delta, done)?;
    }
    let findings = examine_as(delta, leave_as)?;
    free_leaks(delta, &findings)?;
    delta.finish(leave_as)
}

/// Looks at the image as if it had another mark, which says whether the format
/// extension is in use.
pub(super) fn examine_as<F: ImageFile>(delta: &mut Delta<F>, mark: InUse) -> Result<Findings> {
    delta.set_mark(mark);
    let findings = examine(delta);
    delta.set_mark(InUse::Open);
    findings
}

/// What to do about wrong entries.
#[derive(Default)]
struct Plan {
    /// They get a cluster of their own, with a copy of what is at that offset.
    copies: Vec<(GuestCluster, u64)>,
    /// They become zero: there is nothing to be saved.
    drops: Vec<GuestCluster>,
}

fn repair_entries<F: ImageFile>(delta: &mut Delta<F>, done: &mut Vec<String>) -> Result<()> {
    let geometry = *delta.geometry();
    let file_len = delta.file_len()?;
    let mut plan = Plan::default();
    let entries = delta.bat().iter().copied();
    let scan = scan_bat_with(&geometry, file_len, entries, |problem| {
        plan.add(&geometry, file_len, problem);
    });
    if scan.is_clean() {
        return Ok(());
    }
    // Behind everything, so that no copy overwrites what another one reads; a
    // cluster that the end of the file cuts becomes whole by it.
    let first_new = geometry
        .host_clusters_below(file_len)
        .max(u64::from(scan.end.0));
    let end = first_new + plan.copies.len() as u64;
    if end > u64::from(geometry.host_cluster_limit()) {
        return Err(ImageError::Unsupported {
            path: delta.path().to_owned(),
            why: "has no room for the clusters that a repair would copy".into(),
        });
    }
    delta.set_len(geometry.host_offset(HostCluster(end as u32)))?;
    for (new, (guest, from)) in (first_new as u32..).zip(&plan.copies) {
        let host = HostCluster(new);
        let to = geometry.host_offset(host);
        delta.copy(*from, to, geometry.cluster.bytes())?;
        delta.set_entry(*guest, Some(host));
        done.push(format!(
            "BAT entry {guest} got a cluster of its own, {host}"
        ));
    }
    // Length and copies are on disk before an entry points at them.
    delta.sync()?;
    for guest in &plan.drops {
        delta.set_entry(*guest, None);
        done.push(format!(
            "BAT entry {guest} was dropped, it reads as zeros now"
        ));
    }
    delta.write_entries(plan.guests())?;
    delta.sync()
}

/// Where an entry leads by itself, in bytes of the file.
fn stated_offset(geometry: &Geometry, value: u32) -> u64 {
    let unit = match geometry.version {
        Version::V1 => SECTOR_SIZE,
        Version::V2 => geometry.cluster.bytes(),
    };
    u64::from(value) * unit
}

fn is_behind_bat(geometry: &Geometry, file_len: u64, value: u32) -> bool {
    (geometry.metadata_len()..file_len).contains(&stated_offset(geometry, value))
}

/// Gives up a valid format extension, and the space of its clusters, before a change
/// that it does not survive.
pub(super) fn drop_extension<F: ImageFile>(delta: &mut Delta<F>) -> Result<()> {
    if delta.header().in_use != InUse::ClosedWithExtension {
        return Ok(());
    }
    delta.begin()?;
    let findings = examine_as(delta, InUse::Closed)?;
    free_leaks(delta, &findings)?;
    delta.finish(InUse::Closed)
}

impl Plan {
    fn add(&mut self, geometry: &Geometry, file_len: u64, problem: BatProblem) {
        match problem {
            BatProblem::Duplicate { guest, host } => {
                self.copies.push((guest, geometry.host_offset(host)));
            }
            // Other tools read such an entry as what it says, so there may be data.
            BatProblem::OffGrid { guest, value } if u64::from(value) * SECTOR_SIZE < file_len => {
                self.copies.push((guest, u64::from(value) * SECTOR_SIZE));
            }
            // So does QEMU with one that lies behind the BAT, where the first block
            // offset says that there is no data yet.
            BatProblem::InMetadata { guest, value } if is_behind_bat(geometry, file_len, value) => {
                self.copies.push((guest, stated_offset(geometry, value)));
            }
            BatProblem::OffGrid { guest, .. }
            | BatProblem::InMetadata { guest, .. }
            | BatProblem::BeyondEnd { guest, .. } => self.drops.push(guest),
            // A longer file is all that it takes.
            BatProblem::Truncated { .. } => {}
        }
    }

    /// All entries that change, in order.
    fn guests(&self) -> Vec<GuestCluster> {
        let copied = self.copies.iter().map(|(guest, _)| *guest);
        let mut guests: Vec<_> = copied.chain(self.drops.iter().copied()).collect();
        guests.sort_unstable();
        guests
    }
}

/// Punches what nothing uses and cuts the file behind the last cluster in use.
pub(super) fn free_leaks<F: ImageFile>(delta: &Delta<F>, findings: &Findings) -> Result<()> {
    let geometry = delta.geometry();
    let end = geometry.host_offset(findings.end);
    for Range { start, end: after } in &findings.leaks {
        if *start < findings.end {
            let after = geometry.host_offset(*after).min(end);
            delta.punch(geometry.host_offset(*start)..after)?;
        }
    }
    if delta.file_len()? > end {
        delta.set_len(end)?;
    }
    Ok(())
}
