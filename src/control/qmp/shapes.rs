//! Answers in the shapes that QEMU gives them (`qapi/block-core.json`).

use serde_json::{Value, json};

use super::names::{DISK, lower_level};
use crate::control::subject::{Level, Subject};
use crate::device::{
    Bins, Histogram, KindCounts, Latencies, LatencyBins, QueueReport, ThrottleLimits, Totals,
};
use crate::format::{Guid, SnapshotNote};
use crate::ploop::{BitmapInfo, EngineReport};
use crate::storage::LockStanding;

/// `BlockInfo`: the one device.
pub(super) fn device(subject: &dyn Subject) -> Value {
    let levels = subject.levels();
    let top = levels.len().saturating_sub(1);
    let mut device = json!({
        "device": DISK,
        "type": "unknown",
        "removable": false,
        "locked": false,
        "io-status": io_status(&subject.engine()),
    });
    if let Some(node) = node(subject, &levels, top) {
        device["inserted"] = node;
    }
    device
}

fn io_status(engine: &EngineReport) -> &'static str {
    match (engine.is_host_full, engine.has_sync_failed) {
        _ if engine.lock == LockStanding::Lost => "failed",
        (true, _) => "nospace",
        (_, true) => "failed",
        _ => "ok",
    }
}

/// `BlockDeviceInfo` of each level, the top first.
pub(super) fn nodes(subject: &dyn Subject) -> Value {
    let levels = subject.levels();
    let indexes = (0..levels.len()).rev();
    let nodes = indexes.filter_map(|index| node(subject, &levels, index));
    nodes.collect()
}

/// The name of the node of a level.
pub(super) fn node_name(levels: usize, index: usize) -> String {
    match index + 1 == levels {
        true => DISK.to_owned(),
        false => lower_level(index),
    }
}

/// Which of so many levels has the node of that name.
pub(super) fn index_of_node(levels: usize, name: &str) -> Option<usize> {
    (0..levels).find(|index| node_name(levels, *index) == name)
}

fn node(subject: &dyn Subject, levels: &[Level], index: usize) -> Option<Value> {
    let level = levels.get(index)?;
    let is_top = index + 1 == levels.len();
    let below = index.checked_sub(1).and_then(|below| levels.get(below));
    let mut node = json!({
        "node-name": node_name(levels.len(), index),
        "drv": format_name(level),
        "file": level.file.to_string_lossy(),
        "ro": !level.is_writable,
        "active": true,
        "encrypted": false,
        "detect_zeroes": "off",
        "backing_file_depth": index,
        "write_threshold": if is_top { subject.write_threshold() } else { 0 },
        "cache": {
            "direct": level.is_direct,
            "no-flush": false,
            "writeback": subject.has_write_cache(),
        },
        "image": image(level, below),
    });
    let limits = if is_top {
        subject.limits()
    } else {
        ThrottleLimits::default()
    };
    add_limits(&mut node, &limits);
    let bitmaps = if is_top {
        subject.bitmaps()
    } else {
        Vec::new()
    };
    if !bitmaps.is_empty() {
        // The newest first.
        node["dirty-bitmaps"] = bitmaps.iter().rev().map(bitmap).collect();
    }
    if let Some(below) = below {
        node["backing_file"] = below.file.to_string_lossy().into();
    }
    Some(node)
}

/// `SnapshotInfo`: here it has no state of a machine, and no clock of one.
pub(in crate::control) fn snapshot_info(guid: Guid, note: Option<&SnapshotNote>) -> Value {
    let description = note.and_then(|note| note.description.as_deref());
    json!({
        "id": guid.to_string(),
        "name": description.unwrap_or_default(),
        "vm-state-size": 0,
        "date-sec": note.map_or(0, |note| note.date.as_second()),
        "date-nsec": note.map_or(0, |note| note.date.subsec_nanosecond()),
        "vm-clock-sec": 0,
        "vm-clock-nsec": 0,
    })
}

/// `BlockDirtyInfo`.
fn bitmap(bitmap: &BitmapInfo) -> Value {
    json!({
        "name": bitmap.name,
        "count": bitmap.count,
        "granularity": bitmap.granularity,
        "recording": bitmap.records,
        "persistent": bitmap.is_persistent,
        // Nobody but a command uses one.
        "busy": false,
    })
}

fn add_limits(node: &mut Value, limits: &ThrottleLimits) {
    for (name, limit) in limits.named() {
        node[name] = limit.avg.into();
        if limit.max > 0 {
            node[format!("{name}_max")] = limit.max.into();
            node[format!("{name}_max_length")] = limit.max_length.into();
        }
    }
    if limits.iops_size > 0 {
        node["iops_size"] = limits.iops_size.into();
    }
}

/// `ImageInfo`, without the one below it.
fn image(level: &Level, below: Option<&Level>) -> Value {
    let mut image = json!({
        "filename": level.file.to_string_lossy(),
        "format": format_name(level),
        "virtual-size": level.virtual_size,
        "actual-size": level.actual_size,
        "dirty-flag": level.is_ploop && level.is_writable,
    });
    if level.is_ploop {
        image["cluster-size"] = level.cluster_size.into();
    }
    if let Some(below) = below {
        image["backing-filename"] = below.file.to_string_lossy().into();
        image["backing-filename-format"] = format_name(below).into();
    }
    image
}

fn format_name(level: &Level) -> &'static str {
    if level.is_ploop { "ploop" } else { "raw" }
}

/// `BlockStats`: of the device, or of its node.
pub(super) fn statistics(totals: &Totals, bins: &LatencyBins, of_nodes: bool) -> Value {
    let mut stats = json!({
        "node-name": DISK,
        "stats": device_stats(totals),
    });
    for (kind, bins) in [
        ("rd", &bins.reads),
        ("wr", &bins.writes),
        ("flush", &bins.flushes),
    ] {
        if let Some(Bins { boundaries, counts }) = bins {
            let histogram = json!({ "boundaries": boundaries, "bins": counts });
            stats["stats"][format!("{kind}_latency_histogram")] = histogram;
        }
    }
    if !of_nodes {
        stats["device"] = DISK.into();
    }
    stats
}

/// `BlockDeviceStats`.
fn device_stats(totals: &Totals) -> Value {
    let mut stats = json!({
        "wr_highest_offset": totals.highest_write,
        "account_invalid": true,
        "account_failed": true,
        "timed_stats": [],
    });
    let none = KindCounts::default();
    let kinds = [
        ("rd", &totals.reads),
        ("wr", &totals.writes),
        ("flush", &totals.flushes),
        ("unmap", &totals.unmaps),
        // There are no zones.
        ("zone_append", &none),
    ];
    for (kind, counts) in kinds {
        stats[format!("{kind}_operations")] = counts.operations.into();
        stats[format!("{kind}_total_time_ns")] = counts.total_time_ns.into();
        stats[format!("failed_{kind}_operations")] = counts.failed.into();
        stats[format!("invalid_{kind}_operations")] = counts.invalid.into();
        if kind != "flush" {
            stats[format!("{kind}_bytes")] = counts.bytes.into();
            // Requests reach the engine as they come.
            stats[format!("{kind}_merged")] = 0.into();
        }
    }
    if let Some(idle_ns) = totals.idle_time_ns {
        stats["idle_time_ns"] = idle_ns.into();
    }
    stats
}

/// All of them, those that are none included.
pub(super) fn limits(mut limits: ThrottleLimits) -> Value {
    let number = |name: &str| {
        let value = limits.field(name).map(|value| *value);
        (name.to_owned(), json!(value))
    };
    Value::Object(ThrottleLimits::NUMBERS.into_iter().map(number).collect())
}

/// Of each kind, where buckets begin that have something, and how much.
pub(super) fn latencies(latencies: &Latencies) -> Value {
    let buckets = |histogram: &Histogram| -> Value {
        let buckets = histogram.buckets();
        buckets
            .map(|(start, count)| json!([start, count]))
            .collect()
    };
    json!({
        "reads": buckets(&latencies.reads),
        "writes": buckets(&latencies.writes),
        "flushes": buckets(&latencies.flushes),
        "unmaps": buckets(&latencies.unmaps),
    })
}

fn lock(standing: LockStanding) -> &'static str {
    match standing {
        LockStanding::Unwatched => "unwatched",
        LockStanding::Held => "held",
        LockStanding::InDoubt => "in-doubt",
        LockStanding::Lost => "lost",
    }
}

/// What only this program has.
pub(super) fn engine(
    file_id: &str,
    is_open: bool,
    report: &EngineReport,
    queues: &[QueueReport],
) -> Value {
    let queues: Vec<_> = queues.iter().map(queue).collect();
    json!({
        "file-id": file_id,
        "image-open": is_open,
        "queues": queues,
        "runners": report.runners,
        "dispatched": report.dispatched,
        "parked": report.parked,
        "host-full": report.is_host_full,
        "rounds": report.rounds,
        "syncs": report.syncs,
        "dirty-pages": report.dirty_pages,
        "sync-failed": report.has_sync_failed,
        "lock": lock(report.lock),
        "suspended": report.is_suspended,
        "write-through": report.is_write_through,
        "clusters-available": report.clusters_available,
        "reclaim": {
            "clusters": report.reclaim_clusters,
            "batches": report.reclaim_batches,
        },
        "epoch": report.epoch,
        "changes": report.changes,
    })
}

fn queue(queue: &QueueReport) -> Value {
    json!({
        "queue": queue.index,
        "runs": queue.runs,
        "in-flight": queue.in_flight,
        "reads": queue.totals.reads.operations,
        "writes": queue.totals.writes.operations,
        "flushes": queue.totals.flushes.operations,
        "unmaps": queue.totals.unmaps.operations,
        "read-bytes": queue.totals.reads.bytes,
        "write-bytes": queue.totals.writes.bytes,
        "unmap-bytes": queue.totals.unmaps.bytes,
    })
}
