//! Results, for people and for programs.

use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;
use vhost_user_ploop::format::{ClusterSize, Guid, Sector};
use vhost_user_ploop::image::{
    BitmapNote, CheckReport, Comparison, Difference, DiskInfo, ImageError, ImageInfo, MapEntry,
    Measure, SnapshotInfo,
};

use vhost_user_ploop::printable::{Printable, is_obeyed};

use crate::args::Output;
use crate::size::human;

/// Prints a line to standard output; a reader that has gone away is no error of ours.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let line = Printable(format_args!($($arg)*));
        let _ = writeln!(std::io::stdout(), "{line}");
    }};
}

pub fn json(value: &impl Serialize) {
    // Our reports have string keys and finite numbers: they serialise.
    if let Ok(text) = serde_json::to_string_pretty(value) {
        for line in text.lines() {
            say!("{}", json_printable(line));
        }
    }
}

/// The same on one line.
pub fn json_line(value: &impl Serialize) {
    if let Ok(text) = serde_json::to_string(value) {
        say!("{}", json_printable(&text));
    }
}

/// The same JSON, without what a terminal would obey. JSON itself demands that of
/// some characters only; all of them can only be inside strings.
fn json_printable(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    for character in line.chars() {
        match is_obeyed(character) {
            true => text += &format!("\\u{:04x}", u32::from(character)),
            false => text.push(character),
        }
    }
    text
}

/// One line.
pub fn print(line: impl std::fmt::Display) {
    say!("{line}");
}

/// Waits so long, but no longer than somebody reads standard output; `false` if nobody does
/// any more. For what would go on for ever.
pub fn has_reader_after(pause: Duration) -> bool {
    let output = std::io::stdout();
    let end = Instant::now() + pause;
    loop {
        // The end of its reader is told without being asked for.
        let mut fds = [PollFd::new(&output, PollFlags::empty())];
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or(Timespec::default());
        match poll(&mut fds, Some(&left)) {
            Err(Errno::INTR) => {}
            Ok(0) => return true,
            Ok(_) => return false,
            Err(_) => {
                std::thread::sleep(pause);
                return true;
            }
        }
    }
}

/// `info`: the top alone, or the whole chain.
pub fn info(info: &DiskInfo, whole_chain: bool, output: Output) {
    let Some(top) = info.levels.first() else {
        return;
    };
    match (output, whole_chain) {
        (Output::Json, true) => json(&info.levels),
        (Output::Json, false) => json(top),
        (Output::Human, true) => {
            for (index, level) in info.levels.iter().enumerate() {
                if index > 0 {
                    say!("");
                }
                level_info(level);
            }
        }
        (Output::Human, false) => {
            level_info(top);
            if let Some(snapshots) = info.snapshots.filter(|n| *n > 0) {
                say!("snapshots: {snapshots} (see 'ploop-img snapshot list')");
            }
        }
    }
}

fn level_info(info: &ImageInfo) {
    say!("image: {}", info.filename.display());
    say!("file format: {}", info.format);
    say!(
        "virtual size: {} ({} bytes)",
        human(info.virtual_size),
        info.virtual_size
    );
    say!("disk size: {}", human(info.actual_size));
    if let Some(cluster) = info.cluster_size {
        say!("cluster_size: {cluster}");
        if !info.virtual_size.is_multiple_of(cluster) {
            say!(
                "not a whole number of clusters: other tools leave the end of the disk out; \
                 'ploop-img resize' to {} makes it whole",
                info.virtual_size.next_multiple_of(cluster)
            );
        }
    }
    if info.dirty_flag {
        say!("not closed cleanly, or in use");
    }
    if let Some(backing) = &info.backing_filename {
        say!("backing file: {}", backing.display());
    }
    if let Some(specific) = &info.format_specific {
        let data = &specific.data;
        say!("Format specific information:");
        say!("    version: {}", data.version);
        say!(
            "    allocated clusters: {} of {}",
            data.allocated_clusters,
            data.bat_entries
        );
        say!("    data offset: {}", data.data_offset);
        say!("    in use: {}", data.in_use);
        if !data.bitmaps.is_empty() {
            say!("    dirty bitmaps:");
        }
        for note in &data.bitmaps {
            bitmap(note, "");
        }
        if let Some(guid) = &data.guid {
            say!("    GUID: {guid}");
        }
    }
}

/// One dirty bitmap, and what else there is to say of it.
pub fn bitmap(bitmap: &BitmapNote, state: &str) {
    let BitmapNote {
        name,
        granularity,
        count,
    } = bitmap;
    let (granularity, count) = (human(*granularity), human(*count));
    say!("{name}  {count} changed, in units of {granularity}{state}");
}

/// `check`: each finding, then the sum.
pub fn check(report: &CheckReport, output: Output) {
    if output == Output::Json {
        return json(report);
    }
    for message in &report.messages {
        say!("{message}");
    }
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        say!(
            "Repaired: {}, {}.",
            count(report.corruptions_fixed, "error"),
            count(report.leaks_fixed, "leak")
        );
    }
    match (report.corruptions, report.leaks) {
        (0, 0) => say!("The disk is clean."),
        (0, leaks) => say!(
            "{} of space; no data is in danger. \
             'ploop-img check --repair leaks' gives the space back.",
            count(leaks, "leak")
        ),
        (errors, leaks) if errors == report.unclosed => say!(
            "Not closed cleanly, as after a crash, and nothing else is wrong; {}. \
             vhost-user-ploop can serve the disk; 'ploop-img check --repair all' tidies it up.",
            count(leaks, "leak")
        ),
        (errors, leaks) => say!(
            "{}, {}. Do not serve the disk before 'ploop-img check --repair all'.",
            count(errors, "error"),
            count(leaks, "leak")
        ),
    }
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    say!(
        "{}/{} clusters allocated ({:.2}%), {:.2}% of them out of order",
        report.allocated_clusters,
        report.total_clusters,
        percent(report.allocated_clusters, report.total_clusters),
        percent(report.fragmented_clusters, report.allocated_clusters)
    );
    say!("Image end offset: {}", report.image_end_offset);
}

fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// `map`: `entries` is called with what takes each entry.
pub fn map(
    output: Output,
    entries: impl FnOnce(&mut dyn FnMut(MapEntry)) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    match output {
        Output::Human => {
            // The heading comes with the first entry: nothing is printed of what cannot be
            // read.
            let mut heading = Some(format!(
                "{:<16}{:<16}{:<16}File",
                "Offset", "Length", "Mapped to"
            ));
            entries(&mut |entry| {
                heading.take().iter().for_each(|heading| say!("{heading}"));
                map_line(&entry);
            })?;
            heading.iter().for_each(|heading| say!("{heading}"));
        }
        Output::Json => {
            // A line each, like qemu-img: a map may have millions of entries.
            let mut before = "[";
            entries(&mut |entry| {
                if let Ok(text) = serde_json::to_string(&entry) {
                    say!("{before}{}", json_printable(&text));
                    before = ",";
                }
            })?;
            match before {
                "[" => say!("[]"),
                _ => say!("]"),
            }
        }
    }
    Ok(())
}

fn map_line(entry: &MapEntry) {
    let (Some(offset), Some(file), true) = (entry.offset, &entry.filename, entry.data) else {
        return;
    };
    say!(
        "{:<16}{:<16}{:<16}{}",
        hex(entry.start),
        hex(entry.length),
        hex(offset),
        file.display()
    );
}

/// As C prints it: zero has no prefix.
fn hex(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        _ => format!("{number:#x}"),
    }
}

/// `create`: what was made, in the words of `qemu-img create`.
pub fn new_disk(path: &Path, size: Sector, cluster: ClusterSize) {
    say!(
        "Formatting '{}', fmt=parallels size={} cluster_size={}",
        path.display(),
        size.bytes(),
        cluster.bytes()
    );
}

/// `compare`, in the words of `qemu-img compare`.
pub fn comparison(comparison: &Comparison, strict: bool) {
    if comparison.has_tail && !strict {
        say!("Warning: Image size mismatch!");
    }
    match comparison.difference {
        None => say!("Images are identical."),
        Some(Difference::Content { offset }) => say!("Content mismatch at offset {offset}!"),
        Some(Difference::Status { offset }) => {
            say!("Strict mode: Offset {offset} block status mismatch!");
        }
        Some(Difference::Size) => say!("Strict mode: Image size mismatch!"),
    }
}

/// `measure`, in the words of `qemu-img measure`.
pub fn measure(measure: &Measure, output: Output) {
    if output == Output::Json {
        return json(measure);
    }
    say!("required size: {}", measure.required);
    say!("fully allocated size: {}", measure.fully_allocated);
}

/// `resize`: the size that the disk has now.
pub fn resized(size: Sector) {
    say!(
        "The disk is {} ({} bytes) now.",
        human(size.bytes()),
        size.bytes()
    );
}

/// `snapshot create`: the name alone, for scripts.
pub fn created(guid: Guid) {
    say!("{guid}");
}

/// `snapshot list`: the tree.
pub fn snapshots(list: &[SnapshotInfo], output: Output) {
    if output == Output::Json {
        return json(&list);
    }
    let width = |info: &SnapshotInfo| 2 * info.depth + info.guid.len();
    let widest = list.iter().map(width).max().unwrap_or_default();
    say!(
        "{:<widest$}  {:>9}  {:<19}  File",
        "Snapshot",
        "Disk size",
        "Date"
    );
    for info in list {
        let name = format!("{:indent$}{}", "", info.guid, indent = 2 * info.depth);
        let mark = match (info.current, info.merging) {
            (true, _) => "  (current state)",
            (_, true) => "  (deleted, to be merged: see 'ploop-img check')",
            _ => "",
        };
        let description = info.description.as_deref();
        let description = description.map_or(String::new(), |text| {
            // Whoever can write the file may have put anything there.
            format!("  \"{}\"", text.replace(char::is_control, "?"))
        });
        say!(
            "{name:<widest$}  {:>9}  {:<19}  {}{mark}{description}",
            human(info.actual_size),
            info.date.map_or("-".to_owned(), local_time),
            info.filename.display()
        );
    }
}

/// As `qemu-img snapshot -l` shows it: to the second, where the user is.
fn local_time(date: Timestamp) -> String {
    let date = date.to_zoned(TimeZone::system());
    date.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// `compact`: what it was good for.
pub fn compacted(gained: u64) {
    say!("{} given back.", human(gained));
}
