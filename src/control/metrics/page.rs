//! The page: all metrics, in either format.
//!
//! It is made anew each time, of numbers that are there already: there is no registry of
//! counters beside them that could be wrong.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, MetricEncoder, NoLabelSet, prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::http::Format;
use crate::control::Args;
use crate::control::subject::{Level, Subject};
use crate::device::{Histogram, KindCounts, Latencies, QueueReport, ThrottleLimits};
use crate::ploop::EngineReport;
use crate::storage::LockStanding;

/// Before the name of each metric.
const PREFIX: &str = "ploop";

/// Where latencies are told apart, in ns, as powers of two: from 4 µs to 8.6 s. Requests are
/// counted by narrower intervals that have borders there, so these counts are exact.
const BOUNDARIES: std::ops::RangeInclusive<u32> = 12..=33;

/// What the disk is called by those who look at many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::control) struct Names {
    /// The label of all metrics: what is served, as this process was told.
    pub disk: String,
    /// What the guest calls it.
    pub serial: String,
}

impl Names {
    /// As the command line has them. The image's path counts from the root, so this is for
    /// the start, which may ask where it is.
    pub fn of(args: &Args) -> Self {
        let path = std::path::absolute(&args.blk_file).unwrap_or_else(|_| args.blk_file.clone());
        let mut disk = path.to_string_lossy().into_owned();
        if let Some(snapshot) = &args.snapshot {
            // Others may serve the present state, or another one.
            disk = format!("{disk}@{snapshot}");
        }
        let serial = args.serial_number();
        let serial = serial.as_bytes().split(|&byte| byte == 0).next();
        let serial = String::from_utf8_lossy(serial.unwrap_or_default()).into_owned();
        Self { disk, serial }
    }
}

/// Everything that the page tells, as of one moment or nearly so.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub serial: String,
    pub file_id: String,
    /// Base first.
    pub levels: Vec<Level>,
    pub queues: Vec<QueueReport>,
    pub latencies: Latencies,
    pub is_open: bool,
    pub engine: EngineReport,
    pub limits: ThrottleLimits,
}

/// The page on this disk.
///
/// # Errors
/// If a number cannot be written.
pub(super) fn page(
    names: &Names,
    subject: &dyn Subject,
    format: Format,
) -> Result<String, fmt::Error> {
    let snapshot = Snapshot {
        serial: names.serial.clone(),
        file_id: subject.file_id(),
        levels: subject.levels(),
        queues: subject.queues(),
        latencies: subject.latencies(),
        is_open: subject.is_open(),
        engine: subject.engine(),
        limits: subject.limits(),
    };
    write(&names.disk, snapshot, format)
}

/// The page on the disk of this name.
///
/// # Errors
/// See [`page`].
pub(super) fn write(disk: &str, snapshot: Snapshot, format: Format) -> Result<String, fmt::Error> {
    let labels = [("disk".into(), disk.to_owned().into())];
    let mut registry = Registry::with_prefix_and_labels(PREFIX, labels.into_iter());
    registry.register_collector(Box::new(snapshot));
    let mut page = String::new();
    match format {
        Format::OpenMetrics => text::encode(&mut page, &registry)?,
        Format::Text => prometheus_text::encode(&mut page, &registry)?,
    }
    Ok(page)
}

type Labels = Vec<(&'static str, String)>;

fn labels<const N: usize>(labels: [(&'static str, &str); N]) -> Labels {
    labels.map(|(name, value)| (name, value.to_owned())).into()
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut metrics = Writer(encoder);
        self.write_identity(&mut metrics)?;
        self.write_space(&mut metrics)?;
        self.write_queues(&mut metrics)?;
        self.write_latencies(&mut metrics)?;
        self.write_engine(&mut metrics)?;
        self.write_limits(&mut metrics)
    }
}

impl Snapshot {
    fn write_identity(&self, metrics: &mut Writer<'_>) -> fmt::Result {
        let version = labels([("version", env!("CARGO_PKG_VERSION"))]);
        metrics.info("build", "The program that serves the disk.", version)?;
        let Some(top) = self.levels.last() else {
            return Ok(());
        };
        let disk = labels([
            ("file", &top.file.to_string_lossy()),
            ("file_id", &self.file_id),
            ("format", if top.is_ploop { "ploop" } else { "raw" }),
            ("access", if top.is_writable { "rw" } else { "ro" }),
            ("serial", &self.serial),
        ]);
        metrics.info("disk", "The file of the disk's top level.", disk)
    }

    fn write_space(&self, metrics: &mut Writer<'_>) -> fmt::Result {
        let level = |(index, level): (usize, &Level)| {
            let labels = labels([("level", &index.to_string())]);
            (labels, level.actual_size)
        };
        let allocated: Vec<_> = self.levels.iter().enumerate().map(level).collect();
        if let Some(top) = self.levels.last() {
            let what = "What the guest sees of the disk, in bytes.";
            metrics.gauge("capacity", Some(Unit::Bytes), what, top.virtual_size)?;
            let what = "A cluster of the top level, in bytes.";
            metrics.gauge("cluster_size", Some(Unit::Bytes), what, top.cluster_size)?;
        }
        let what = "What the file of each level takes on the host, 0 being the base.";
        metrics.gauges("allocated", Some(Unit::Bytes), what, &allocated)?;
        let engine = &self.engine;
        for (name, what, value) in [
            (
                "clusters_available",
                "Clusters of the top level's file that can be given out at once.",
                engine.clusters_available.into(),
            ),
            (
                "reclaim_clusters",
                "Unmapped clusters that wait to be made available again.",
                engine.reclaim_clusters,
            ),
            (
                "reclaim_batches",
                "Groups of unmapped clusters that are being made available again.",
                engine.reclaim_batches,
            ),
        ] {
            metrics.gauge(name, None, what, value)?;
        }
        Ok(())
    }

    fn write_queues(&self, metrics: &mut Writer<'_>) -> fmt::Result {
        let of_queues = |value: fn(&QueueReport) -> u64| -> Vec<_> {
            let queues = self.queues.iter();
            let of_queue = |queue: &QueueReport| {
                let labels = labels([("queue", &queue.index.to_string())]);
                (labels, value(queue))
            };
            queues.map(of_queue).collect()
        };
        let running = of_queues(|queue| queue.runs.into());
        let what = "Whether the ring of the queue runs.";
        metrics.gauges("queue_running", None, what, &running)?;
        let in_flight = of_queues(|queue| queue.in_flight);
        let what = "Requests that were taken from the ring and are not answered.";
        metrics.gauges("requests_in_flight", None, what, &in_flight)?;

        let what = "Requests that have succeeded.";
        let requests = self.of_operations(&OPERATIONS, |counts| counts.operations);
        metrics.counters("requests", None, what, &requests)?;
        let what = "Bytes of requests that have succeeded, but for flushes.";
        // A flush is about everything.
        let with_bytes = OPERATIONS.into_iter().filter(|(name, _)| *name != "flush");
        let with_bytes: Vec<_> = with_bytes.collect();
        let bytes = self.of_operations(&with_bytes, |counts| counts.bytes);
        metrics.counters("request", Some(Unit::Bytes), what, &bytes)?;
        let what = "Requests that have failed.";
        let failed = self.of_operations(&OPERATIONS, |counts| counts.failed);
        metrics.counters("request_errors", None, what, &failed)?;
        let what = "Requests that were refused, such as those beyond the end of the disk.";
        let invalid = self.of_operations(&OPERATIONS, |counts| counts.invalid);
        metrics.counters("invalid_requests", None, what, &invalid)
    }

    /// A number of each queue and operation.
    fn of_operations(
        &self,
        operations: &[Operation],
        value: fn(&KindCounts) -> u64,
    ) -> Vec<(Labels, u64)> {
        let mut samples = Vec::new();
        for queue in &self.queues {
            let index = queue.index.to_string();
            samples.extend(operations.iter().map(|(name, counts)| {
                let labels = labels([("queue", &index), ("operation", name)]);
                (labels, value(counts(queue)))
            }));
        }
        samples
    }

    fn write_latencies(&self, metrics: &mut Writer<'_>) -> fmt::Result {
        let histograms = [
            &self.latencies.reads,
            &self.latencies.writes,
            &self.latencies.flushes,
            &self.latencies.unmaps,
        ];
        let histograms = OPERATIONS.into_iter().zip(histograms);
        let samples: Vec<_> = histograms
            .map(|((name, counts), histogram)| {
                let times = self.queues.iter().map(|queue| counts(queue).total_time_ns);
                let sum = times.sum::<u64>() as f64 / NANOSECONDS;
                let labels = labels([("operation", name)]);
                (labels, sum, intervals(histogram))
            })
            .collect();
        let what = "How long requests took, failed ones included, from the ring to the answer.";
        metrics.histograms("request_duration", Unit::Seconds, what, &samples)
    }

    fn write_engine(&self, metrics: &mut Writer<'_>) -> fmt::Result {
        let engine = &self.engine;
        for (name, what, value) in [
            (
                "runners",
                "Threads for what changes the mapping.",
                engine.runners as u64,
            ),
            (
                "dispatched_parts",
                "Parts of requests that are with runners.",
                engine.dispatched as u64,
            ),
            (
                "parked_parts",
                "Parts of requests that wait for space on the host.",
                engine.parked,
            ),
            (
                "dirty_pages",
                "Pages of the block allocation table that are to be written.",
                engine.dirty_pages,
            ),
            (
                "host_full",
                "Whether the file system of the host is full, as far as is known.",
                engine.is_host_full.into(),
            ),
            (
                "sync_failed",
                "Whether a sync has failed: flushes fail until the image is opened again.",
                engine.has_sync_failed.into(),
            ),
            (
                "image_open",
                "Whether the image is open: with --lock=running it is while a ring runs.",
                self.is_open.into(),
            ),
            (
                "lock_in_doubt",
                "Whether the lock on the image may be lost: nothing is begun.",
                (engine.lock == LockStanding::InDoubt).into(),
            ),
            (
                "lock_lost",
                "Whether the lock on the image is lost: nothing is read or written any more.",
                (engine.lock == LockStanding::Lost).into(),
            ),
            (
                "suspended",
                "Whether new requests are held.",
                engine.is_suspended.into(),
            ),
            (
                "write_through",
                "Whether each write is stable when it completes.",
                engine.is_write_through.into(),
            ),
        ] {
            metrics.gauge(name, None, what, value)?;
        }
        for (name, what, value) in [
            (
                "metadata_rounds",
                "Rounds in which metadata was written or synced.",
                engine.rounds,
            ),
            (
                "syncs",
                "Syncs of the image, those of single stable writes not counted.",
                engine.syncs,
            ),
        ] {
            metrics.counters(name, None, what, &[(Labels::new(), value)])?;
        }
        Ok(())
    }

    /// Those that there are.
    fn write_limits(&self, metrics: &mut Writer<'_>) -> fmt::Result {
        let of_unit = |unit: &str| -> Vec<_> {
            let limits = self.limits.named().filter(|(_, limit)| limit.avg > 0);
            let limit = |(name, limit): (&'static str, &crate::device::Limit)| {
                let operation = match name.strip_prefix(unit)? {
                    "" => "all",
                    "_rd" => "read",
                    "_wr" => "write",
                    _ => return None,
                };
                Some((labels([("operation", operation)]), limit.avg))
            };
            limits.filter_map(limit).collect()
        };
        let what = "The limit on bytes, if there is one.";
        metrics.gauges("limit_bytes_per_second", None, what, &of_unit("bps"))?;
        let what = "The limit on requests, if there is one.";
        metrics.gauges("limit_requests_per_second", None, what, &of_unit("iops"))
    }
}

/// What is counted for itself, and where a queue has it.
type Operation = (&'static str, fn(&QueueReport) -> &KindCounts);

const OPERATIONS: [Operation; 4] = [
    ("read", |queue| &queue.totals.reads),
    ("write", |queue| &queue.totals.writes),
    ("flush", |queue| &queue.totals.flushes),
    ("discard", |queue| &queue.totals.unmaps),
];

const NANOSECONDS: f64 = 1e9;

/// Each upper bound in seconds, and how much is between it and the one before.
type Intervals = Vec<(f64, u64)>;

fn intervals(histogram: &Histogram) -> Intervals {
    let boundaries: Vec<_> = BOUNDARIES.map(|power| 1_u64 << power).collect();
    let bounds = boundaries.iter().map(|&ns| ns as f64 / NANOSECONDS);
    let bounds = bounds.chain([f64::INFINITY]);
    bounds.zip(histogram.bins(&boundaries)).collect()
}

/// Writes metrics, each with all its samples; those without any are left out.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn metric<S>(
        &mut self,
        (name, unit, what): (&str, Option<Unit>, &str),
        kind: MetricType,
        samples: &[S],
        write: impl Fn(&mut MetricEncoder<'_>, &S) -> fmt::Result,
    ) -> fmt::Result {
        if samples.is_empty() {
            return Ok(());
        }
        let encoder = &mut self.0;
        let mut metric = encoder.encode_descriptor(name, what, unit.as_ref(), kind)?;
        samples
            .iter()
            .try_for_each(|sample| write(&mut metric, sample))
    }

    fn info(&mut self, name: &str, what: &str, labels: Labels) -> fmt::Result {
        let metric = (name, None, what);
        self.metric(metric, MetricType::Info, &[labels], |metric, labels| {
            metric.encode_info(labels)
        })
    }

    fn gauge(&mut self, name: &str, unit: Option<Unit>, what: &str, value: u64) -> fmt::Result {
        self.gauges(name, unit, what, &[(Labels::new(), value)])
    }

    fn gauges(
        &mut self,
        name: &str,
        unit: Option<Unit>,
        what: &str,
        samples: &[(Labels, u64)],
    ) -> fmt::Result {
        let metric = (name, unit, what);
        self.metric(metric, MetricType::Gauge, samples, |metric, sample| {
            let (labels, value) = sample;
            metric.encode_family(labels)?.encode_gauge(value)
        })
    }

    fn counters(
        &mut self,
        name: &str,
        unit: Option<Unit>,
        what: &str,
        samples: &[(Labels, u64)],
    ) -> fmt::Result {
        let metric = (name, unit, what);
        self.metric(metric, MetricType::Counter, samples, |metric, sample| {
            let (labels, value) = sample;
            let mut sample = metric.encode_family(labels)?;
            sample.encode_counter::<NoLabelSet, _, u64>(value, None)
        })
    }

    /// Of each its labels, its sum, and what is in its intervals.
    fn histograms(
        &mut self,
        name: &str,
        unit: Unit,
        what: &str,
        samples: &[(Labels, f64, Intervals)],
    ) -> fmt::Result {
        let metric = (name, Some(unit), what);
        self.metric(metric, MetricType::Histogram, samples, |metric, sample| {
            let (labels, sum, intervals) = sample;
            let count = intervals.iter().map(|(_, count)| count).sum();
            let mut sample = metric.encode_family(labels)?;
            sample.encode_histogram::<NoLabelSet>(*sum, count, intervals, None)
        })
    }
}
