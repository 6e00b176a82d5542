//! Checking images, and what repairs find to do.

mod bundle;
mod sizes;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread;

use serde::Serialize;

use super::delta::{Delta, read_header_for_repair};
use super::error::{IoContext, Result};
use super::file::{HostImage, ImageFile};
use super::open::{Access, LOOK_PAUSE, LOOKS, OpenImage, OpenMode, image_of, look_at, open};
use super::progress::Progress;
use super::{repair, version};
use crate::format::{BatScan, ClusterSet, Extension, Geometry, HostCluster, InUse, SECTOR_SIZE};
use crate::ploop::Level;
use crate::storage::HostFile;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Space that nothing uses.
    Leaks,
    /// Everything that can be; data may be lost where it was lost already.
    All,
}

/// What a check found in one image file, or in all of a disk; serialised it has
/// the keys of `qemu-img check --output=json`.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// As given, or of the image file.
    pub filename: PathBuf,
    /// Always "ploop".
    pub format: &'static str,
    /// What could not be checked. Always 0: such a check is an error.
    pub check_errors: u32,
    /// Where the last cluster in use ends, in bytes of the file.
    pub image_end_offset: u64,
    /// What is wrong and was not repaired.
    pub corruptions: u64,
    /// Of them, marks that say that an image was not closed cleanly: what a crash
    /// leaves, and harmless by itself.
    #[serde(skip)]
    pub unclosed: u64,
    /// Clusters and files that waste space and were not repaired.
    pub leaks: u64,
    /// What was wrong and is repaired.
    pub corruptions_fixed: u64,
    /// What wasted space and no longer does.
    pub leaks_fixed: u64,
    /// Of the guest's disk; of a bundle with several images, the sum of what each
    /// could have.
    pub total_clusters: u64,
    /// Of them, those that have a place in the file.
    pub allocated_clusters: u64,
    /// Of them, those that follow another on the disk but not in the file.
    pub fragmented_clusters: u64,
    /// Each finding and each repair in words.
    pub messages: Vec<String>,
    /// One for each image file of a bundle with several: those that only other
    /// snapshots use, then those of the disk, base first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub levels: Vec<CheckReport>,
}

impl CheckReport {
    fn new(filename: &Path) -> Self {
        Self {
            filename: filename.to_owned(),
            format: "ploop",
            ..Self::default()
        }
    }

    pub(super) fn corruption(&mut self, message: impl ToString) {
        self.corruptions += 1;
        self.messages.push(message.to_string());
    }

    pub(super) fn leak(&mut self, count: u64, message: impl ToString) {
        self.leaks += count;
        self.messages.push(message.to_string());
    }

    /// The sum of `levels`, with what concerns the disk as a whole.
    fn sum(mut self, levels: Vec<Self>) -> Self {
        for level in &levels {
            self.corruptions += level.corruptions;
            self.unclosed += level.unclosed;
            self.leaks += level.leaks;
            self.corruptions_fixed += level.corruptions_fixed;
            self.leaks_fixed += level.leaks_fixed;
            self.total_clusters += level.total_clusters;
            self.allocated_clusters += level.allocated_clusters;
            self.fragmented_clusters += level.fragmented_clusters;
            let name = level.filename.display();
            let named = level.messages.iter().map(|text| format!("{name}: {text}"));
            self.messages.extend(named);
        }
        if let Some(top) = levels.last() {
            self.image_end_offset = top.image_end_offset;
        }
        if levels.len() > 1 {
            self.levels = levels;
        }
        self
    }
}

/// Checks the disk at `path`, all levels of it, and repairs what `repair` says.
/// A repair that has to finish a merge copies data, which takes its time.
///
/// # Errors
/// Whatever keeps it from being opened and read so, or repaired.
pub fn check(
    path: &Path,
    repair: Option<Repair>,
    mode: OpenMode,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let mut whole = CheckReport::new(path);
    if repair.is_some() {
        bundle::finish_merges(path, &mut whole, progress)?;
    }
    let image = match repair {
        None => open(path, mode.to_check())?,
        Some(_) => open(path, OpenMode::new(Access::Repair).to_check())?,
    };
    let mut levels = Vec::new();
    if image.is_top() {
        // First, as they are not the last level, which the sums are about.
        let check = |file: &HostFile| check_level(Level::Ploop, file, repair);
        levels = bundle::check_branches(&image, repair.is_some(), mode, check)?;
    }
    for (level, file) in image.chain.levels.iter().zip(&image.files) {
        levels.push(check_level(*level, file, repair)?);
    }
    sizes::check_sizes(&image, repair, &mut whole)?;
    if image.is_top() {
        bundle::check_bundle(image, repair, &mut whole)?;
    }
    Ok(whole.sum(levels))
}

/// Checks the disk at `path`, which a process serves to a guest that may be writing: as far as
/// it can be known. `mode` is what of it is looked at.
///
/// The mark of the top says that it is in use, and that is right. Space that it does not use
/// is given out at any moment, and files of the bundle may be in the making, so neither is
/// looked for. And since nobody waits while the BAT is read, a cluster that went from one
/// place to another meanwhile can be seen in both: what is wrong is so at each look.
///
/// # Errors
/// As [`check`].
pub fn check_served(path: &Path, mode: OpenMode) -> Result<CheckReport> {
    let mode = mode.force_share(true).to_check();
    let mut looks = 1;
    loop {
        let report = look_at(path, mode, |image| look_at_served(path, image, mode))?;
        if report.corruptions == 0 || looks == LOOKS {
            return Ok(report);
        }
        looks += 1;
        thread::sleep(LOOK_PAUSE);
    }
}

fn look_at_served(path: &Path, image: OpenImage, mode: OpenMode) -> Result<CheckReport> {
    let mut whole = CheckReport::new(path);
    let is_top = image.bundle.is_none() || image.is_top();
    let mut levels = Vec::new();
    if image.is_top() {
        let check = |file: &HostFile| check_served_level(Level::Ploop, file);
        levels = bundle::check_branches(&image, false, mode, check)?;
    }
    let top = image.files.len().saturating_sub(1);
    for (index, (level, file)) in image.chain.levels.iter().zip(&image.files).enumerate() {
        levels.push(match level {
            Level::Ploop if index == top && is_top => check_served_top(file)?,
            _ => check_served_level(*level, file)?,
        });
    }
    sizes::check_sizes(&image, None, &mut whole)?;
    if image.is_top() {
        bundle::check_served_bundle(image, &mut whole)?;
    }
    if is_top {
        let text = "the disk is being served, so space that it does not use is not looked for";
        whole.messages.push(text.to_owned());
    }
    Ok(whole.sum(levels))
}

fn check_served_top(file: &HostFile) -> Result<CheckReport> {
    let delta = Delta::load_for_repair(image_of(file)?)?;
    let mut findings = examine(&delta)?;
    findings.leaks.clear();
    let mut report = findings.report(&delta);
    report.corruptions -= report.unclosed;
    report.unclosed = 0;
    report.messages.retain(|message| message != UNCLOSED);
    Ok(report)
}

/// A lower level, or one of another branch, may be getting what one below it has.
fn check_served_level(level: Level, file: &HostFile) -> Result<CheckReport> {
    let is_marked =
        || Ok(read_header_for_repair(&image_of(file)?)?.in_use == InUse::Open) as Result<bool>;
    if level != Level::Ploop || !is_marked()? {
        return check_level(level, file, None);
    }
    let mut report = check_served_top(file)?;
    let text = "it gets what a snapshot below it has, or did when a process was killed: deleting \
                that, or a repair when nobody uses the disk, closes it";
    report.messages.push(text.to_owned());
    Ok(report)
}

fn check_level(level: Level, file: &HostFile, repair: Option<Repair>) -> Result<CheckReport> {
    match level {
        Level::Ploop => check_image(&mut Delta::load_for_repair(image_of(file)?)?, repair),
        Level::Plain { .. } => check_plain(file),
    }
}

/// Checks an image in the ploop format, and what a change of its version may have
/// left beside it.
fn check_image(delta: &mut Delta<HostImage>, repair: Option<Repair>) -> Result<CheckReport> {
    let was_converting = delta.header().is_converting();
    let text = "a change of the format version was cut off half-way";
    if was_converting && repair != Some(Repair::All) {
        // Nobody knows what the entries mean.
        let mut report = CheckReport::new(delta.path());
        report.corruption(text);
        return Ok(report);
    }
    if was_converting {
        version::undo_change(delta)?;
    }
    let mut report = check_delta(delta, repair)?;
    if was_converting {
        report.messages.push(format!("{text}; it is undone"));
        report.corruptions_fixed += 1;
    } else if version::has_idx(delta.path())? {
        report.messages.push(format!(
            "{}{} is a copy of the BAT that another tool makes before it changes the version of \
             the format; it is no longer of use, and is left alone",
            delta.path().display(),
            version::IDX_SUFFIX
        ));
    }
    if !was_converting && version::has_copy(delta.path())? {
        report.leak(
            1,
            "beside the image lies a copy of its BAT that is no longer of use",
        );
        if repair.is_some() {
            version::remove_copy(delta.path())?;
            report.leaks -= 1;
            report.leaks_fixed += 1;
        }
    }
    Ok(report)
}

/// There is nothing to be wrong in a raw image.
fn check_plain(file: &HostFile) -> Result<CheckReport> {
    let metadata = file.file.metadata().context(&file.path, "look at")?;
    let mut report = CheckReport::new(&file.path);
    report.image_end_offset = metadata.len();
    Ok(report)
}

/// Checks one image file, repairs it, and checks it again.
pub(super) fn check_delta<F: ImageFile>(
    delta: &mut Delta<F>,
    repair: Option<Repair>,
) -> Result<CheckReport> {
    let before = examine(delta)?;
    let found = before.report(delta);
    let Some(repair) = repair.filter(|repair| match repair {
        // Where data starts, and so what is leaked, is nothing but a guess then.
        Repair::Leaks => found.leaks > 0 && !delta.header().first_block_is_wrong(),
        Repair::All => found.leaks > 0 || found.corruptions > 0,
    }) else {
        return Ok(found);
    };
    let mut done = Vec::new();
    repair::repair(delta, repair, &before, &mut done)?;
    let mut after = examine(delta)?.report(delta);
    after.corruptions_fixed = found.corruptions.saturating_sub(after.corruptions);
    after.leaks_fixed = found.leaks.saturating_sub(after.leaks);
    after.messages = [found.messages, done].concat();
    Ok(after)
}

/// What there is to say of one image file.
pub(super) struct Findings {
    /// Of the BAT; the format extension's clusters count as used.
    pub scan: BatScan,
    /// One after the highest host cluster that something uses: an entry, or the
    /// format extension.
    pub end: HostCluster,
    /// Host clusters that nothing uses and that take space, in order; what lies
    /// behind [`Self::end`] is the last of them.
    pub leaks: Vec<Range<HostCluster>>,
    /// Why the format extension is not valid, though it should be.
    bad_extension: Option<String>,
}

/// Looks at an image file, changes nothing.
pub(super) fn examine<F: ImageFile>(delta: &Delta<F>) -> Result<Findings> {
    let mut scan = delta.scan()?;
    let bad_extension = match extension_of(delta)? {
        Ok(clusters) => {
            for cluster in clusters {
                scan.used.insert(cluster);
            }
            None
        }
        Err(why) => Some(why),
    };
    let end = scan.end.max(scan.used.end());
    let leaks = find_leaks(delta, &scan.used, end)?;
    Ok(Findings {
        scan,
        end,
        leaks,
        bad_extension,
    })
}

/// The host clusters of a valid format extension, or why it is not valid.
fn extension_of<F: ImageFile>(
    delta: &Delta<F>,
) -> Result<std::result::Result<Vec<HostCluster>, String>> {
    let header = delta.header();
    let geometry = delta.geometry();
    if header.in_use != InUse::ClosedWithExtension || header.extension.0 == 0 {
        return Ok(Ok(Vec::new()));
    }
    let file_len = delta.file_len()?;
    let cluster_at = |sector: u64| {
        let offset = sector.checked_mul(SECTOR_SIZE)?;
        let end = offset.checked_add(geometry.cluster.bytes())?;
        let into_data = offset.checked_sub(geometry.data_start)?;
        let host = geometry.host_clusters_below(offset);
        let is_cluster = into_data.is_multiple_of(geometry.cluster.bytes())
            && end <= file_len
            && host < u64::from(geometry.host_cluster_limit());
        is_cluster.then_some(HostCluster(host as u32))
    };
    let Some(first) = cluster_at(header.extension.0) else {
        return Ok(Err(
            "the format extension is not a cluster of the file".into()
        ));
    };
    let mut bytes = vec![0; geometry.cluster.bytes() as usize];
    delta.read(&mut bytes, header.extension.0 * SECTOR_SIZE)?;
    let extension = match Extension::parse(&bytes) {
        Ok(extension) => extension,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let mut clusters = vec![first];
    for sector in extension.clusters() {
        match cluster_at(sector.0) {
            Some(cluster) => clusters.push(cluster),
            None => return Ok(Err("a dirty bitmap is not a cluster of the file".into())),
        }
    }
    Ok(Ok(clusters))
}

/// Clusters that nothing uses: those that hold data, and all behind the last one
/// in use. A hole between used clusters is what a discard leaves; it takes no
/// space and is used again.
fn find_leaks<F: ImageFile>(
    delta: &Delta<F>,
    used: &ClusterSet,
    end: HostCluster,
) -> Result<Vec<Range<HostCluster>>> {
    let geometry = delta.geometry();
    let path = delta.path();
    let end_offset = geometry.host_offset(end);
    let mut leaks: Vec<Range<HostCluster>> = Vec::new();
    let mut push = |leak: Range<u32>| match leaks.last_mut() {
        Some(last) if last.end.0 == leak.start => last.end.0 = leak.end,
        _ => leaks.push(HostCluster(leak.start)..HostCluster(leak.end)),
    };
    let mut offset = geometry.data_start;
    while offset < end_offset {
        let data = delta.file().next_data(offset).context(path, "seek in")?;
        let Some(data) = data.filter(|data| data.start < end_offset) else {
            break;
        };
        let first = geometry.host_clusters_below(data.start + 1) as u32 - 1;
        let after = geometry.host_clusters_below(data.end.min(end_offset)) as u32;
        for cluster in first..after {
            let inner = whole_blocks(geometry, HostCluster(cluster));
            let takes_space = data.start < inner.end && inner.start < data.end;
            let is_unused = takes_space && !used.contains(HostCluster(cluster));
            if is_unused && !is_hidden_hole(delta, HostCluster(cluster))? {
                push(cluster..cluster + 1);
            }
        }
        // The rest of a cluster that is known to hold data tells nothing new.
        offset = geometry.host_offset(HostCluster(after));
    }
    let file_len = delta.file_len()?;
    let file_end = geometry.host_clusters_below(file_len);
    let file_end = file_end.min(u64::from(u32::MAX)) as u32;
    let has_tail = file_len.saturating_sub(end_offset) > delta.file().kept_tail();
    if has_tail && file_end > end.0 {
        push(end.0..file_end);
    }
    Ok(leaks)
}

/// Whether a cluster is taken for a hole that the file system does not tell: where it
/// tells none, all that reads as zeros is, since a hole cannot be told from a leak.
fn is_hidden_hole<F: ImageFile>(delta: &Delta<F>, cluster: HostCluster) -> Result<bool> {
    if delta.file().tells_holes() {
        return Ok(false);
    }
    let geometry = delta.geometry();
    let mut bytes = vec![0; geometry.cluster.bytes() as usize];
    delta.read(&mut bytes, geometry.host_offset(cluster))?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

/// The part of a cluster that shares no block of the host's file system with its
/// neighbours. In version 1 clusters may start anywhere, and then a block that is
/// half used cannot be given back.
fn whole_blocks(geometry: &Geometry, cluster: HostCluster) -> Range<u64> {
    const BLOCK: u64 = 4096;
    let start = geometry.host_offset(cluster);
    let end = start + geometry.cluster.bytes();
    start.next_multiple_of(BLOCK)..end / BLOCK * BLOCK
}

/// Also what the mark of an image says that is in use.
const UNCLOSED: &str = "the image was not closed cleanly";

impl Findings {
    /// Whether entries and format extension are right.
    pub fn is_sound(&self) -> bool {
        self.scan.is_clean() && self.bad_extension.is_none()
    }

    fn report<F: ImageFile>(&self, delta: &Delta<F>) -> CheckReport {
        let geometry = delta.geometry();
        let mut report = CheckReport::new(delta.path());
        report.image_end_offset = geometry.host_offset(self.end);
        report.total_clusters = geometry.cluster.count_for(geometry.disk_size.bytes());
        report.allocated_clusters = u64::from(self.scan.mapped);
        report.fragmented_clusters = fragmented(geometry, delta.bat());
        if matches!(delta.header().in_use, InUse::Open | InUse::OpenByOthers) {
            report.corruption(UNCLOSED);
            report.unclosed = 1;
        }
        if delta.header().first_block_is_wrong() {
            report.corruption(format!(
                "the first block offset is impossible; by the BAT it is {} sectors",
                geometry.data_start / SECTOR_SIZE
            ));
        }
        if let Some(why) = &self.bad_extension {
            report.corruption(why);
        }
        let listed = self.scan.problems.len();
        report.corruptions += u64::from(self.scan.problem_count);
        report
            .messages
            .extend(self.scan.problems.iter().map(ToString::to_string));
        if self.scan.problem_count as usize > listed {
            let more = self.scan.problem_count as usize - listed;
            report
                .messages
                .push(format!("{more} more BAT entries are wrong"));
        }
        for leak in &self.leaks {
            let count = u64::from(leak.end.0 - leak.start.0);
            report.leak(count, leak_message(leak));
        }
        report
    }
}

fn leak_message(leak: &Range<HostCluster>) -> String {
    match leak.end.0 - leak.start.0 {
        1 => format!("host cluster {} is not used", leak.start),
        _ => format!(
            "host clusters {} to {} are not used",
            leak.start,
            leak.end.0 - 1
        ),
    }
}

/// Entries whose cluster does not follow that of the entry before, as QEMU counts
/// them: after a hole it starts anew.
fn fragmented(geometry: &Geometry, bat: &[u32]) -> u64 {
    let host_of = |value: u32| geometry.host_cluster(value).filter(|_| value != 0);
    let hosts = bat.iter().map(|value| host_of(*value));
    let pairs = hosts.clone().zip(hosts.skip(1));
    let is_break = |(before, after): &(Option<HostCluster>, Option<HostCluster>)| {
        let pair = before.zip(*after);
        pair.is_some_and(|(before, after)| before.0.wrapping_add(1) != after.0)
    };
    pairs.filter(is_break).count() as u64
}

#[cfg(test)]
mod tests;
