//! What a running disk says of itself, and what that comes to in a time.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};
use vhost_user_ploop::control::{AskError, Asker};
use vhost_user_ploop::device::ThrottleLimits;

/// All that is asked of the process that serves a disk, at some moment.
#[derive(Clone, Debug)]
pub struct Sample {
    at: Instant,
    nodes: Value,
    status: Value,
    stats: Value,
    engine: Value,
    latencies: Value,
}

/// A kind of requests: as it is called in `query-blockstats`, and in `query-latencies`.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    stats: &'static str,
    latencies: &'static str,
}

pub const READS: Kind = Kind {
    stats: "rd",
    latencies: "reads",
};
pub const WRITES: Kind = Kind {
    stats: "wr",
    latencies: "writes",
};
pub const FLUSHES: Kind = Kind {
    stats: "flush",
    latencies: "flushes",
};
pub const DISCARDS: Kind = Kind {
    stats: "unmap",
    latencies: "unmaps",
};

/// Requests of one kind, since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub operations: u64,
    pub bytes: u64,
    pub failed: u64,
    /// Of all of them together.
    pub time_ns: u64,
}

impl Counts {
    /// Of one request that has ended, one way or the other.
    pub fn average_ns(&self) -> Option<u64> {
        let ended = self.operations.saturating_add(self.failed);
        self.time_ns.checked_div(ended)
    }

    /// What has been done since; `None` if counting has begun anew.
    fn since(&self, before: &Self) -> Option<Self> {
        Some(Self {
            operations: self.operations.checked_sub(before.operations)?,
            bytes: self.bytes.checked_sub(before.bytes)?,
            failed: self.failed.checked_sub(before.failed)?,
            time_ns: self.time_ns.checked_sub(before.time_ns)?,
        })
    }
}

impl Sample {
    pub fn take(asker: &mut Asker) -> Result<Self, AskError> {
        Ok(Self {
            at: Instant::now(),
            nodes: asker.ask("query-named-block-nodes")?,
            status: asker.ask("query-status")?,
            stats: {
                let mut devices = asker.ask("query-blockstats")?;
                let stats = devices.pointer_mut("/0/stats").map(Value::take);
                stats.unwrap_or_default()
            },
            engine: asker.ask("query-engine")?,
            latencies: asker.ask("query-latencies")?,
        })
    }

    /// Everything, as the process has said it.
    pub fn json(&self) -> Value {
        json!({
            "status": self.status["status"],
            "node": self.nodes[0],
            "stats": self.stats,
            "engine": self.engine,
            "latencies": self.latencies,
        })
    }

    /// The file of the top level, by the path that the process has opened.
    pub fn file(&self) -> &str {
        self.nodes[0]["file"].as_str().unwrap_or_default()
    }

    pub fn is_of_the_same_disk(&self, other: &Self) -> bool {
        self.engine["file-id"] == other.engine["file-id"]
    }

    pub fn status(&self) -> &str {
        self.status["status"].as_str().unwrap_or_default()
    }

    /// In bytes.
    pub fn virtual_size(&self) -> u64 {
        number(&self.nodes[0]["image"]["virtual-size"])
    }

    /// What the file of the top level takes on the host, in bytes.
    pub fn actual_size(&self) -> u64 {
        number(&self.nodes[0]["image"]["actual-size"])
    }

    pub fn in_flight(&self) -> u64 {
        let queues = self.engine["queues"].as_array();
        let queues = queues.into_iter().flatten();
        let in_flight = queues.map(|queue| number(&queue["in-flight"]));
        in_flight.fold(0, u64::saturating_add)
    }

    /// A number of `query-engine`.
    pub fn engine(&self, name: &str) -> u64 {
        number(&self.engine[name])
    }

    pub fn counts(&self, Kind { stats, .. }: Kind) -> Counts {
        let number = |name: String| number(&self.stats[name]);
        Counts {
            operations: number(format!("{stats}_operations")),
            bytes: number(format!("{stats}_bytes")),
            failed: number(format!("failed_{stats}_operations")),
            time_ns: number(format!("{stats}_total_time_ns")),
        }
    }

    pub fn latencies(&self, kind: Kind) -> Buckets {
        Buckets::of(&self.latencies[kind.latencies])
    }

    pub fn limits(&self) -> ThrottleLimits {
        limits_in(&self.nodes[0])
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

/// The limits that an answer has, by their names.
pub fn limits_in(answer: &Value) -> ThrottleLimits {
    let mut limits = ThrottleLimits::default();
    for name in ThrottleLimits::NUMBERS {
        if let (Some(field), Some(value)) = (limits.field(name), answer[name].as_u64()) {
            *field = value;
        }
    }
    limits
}

/// How long requests took: where buckets begin, in ns, and how much they have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buckets(BTreeMap<u64, u64>);

impl Buckets {
    fn of(list: &Value) -> Self {
        let list = list.as_array().into_iter().flatten();
        let pairs = list.map(|pair| (number(&pair[0]), number(&pair[1])));
        Self(pairs.collect())
    }

    fn since(mut self, before: &Self) -> Self {
        for (start, count) in &before.0 {
            let bucket = self.0.entry(*start).or_default();
            *bucket = bucket.saturating_sub(*count);
        }
        self
    }

    fn and(mut self, other: &Self) -> Self {
        for (start, count) in &other.0 {
            let bucket = self.0.entry(*start).or_default();
            *bucket = bucket.saturating_add(*count);
        }
        self
    }

    /// A duration that so many in a hundred do not exceed, in ns.
    pub fn quantile(&self, percent: u64) -> Option<u64> {
        let all: u128 = self.0.values().copied().map(u128::from).sum();
        let mut left = (all * u128::from(percent)).div_ceil(100);
        let found = self.0.iter().find(|(_, count)| {
            left = left.saturating_sub(u128::from(**count));
            left == 0 && **count > 0
        });
        // The middle of a bucket that is an eighth of a power of two wide.
        found.map(|(&start, _)| start.saturating_add((start / 16).max(64)))
    }
}

/// What a disk has done between two samples, and how it was at the later one.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The file of the top level, by the path that the process has opened.
    pub file: String,
    /// As in `query-status`.
    pub status: String,
    /// Between the samples.
    pub seconds: f64,
    pub reads: Activity,
    pub writes: Activity,
    pub flushes: Activity,
    pub discards: Activity,
    /// Of reads and writes.
    pub p50_ns: Option<u64>,
    /// Of reads and writes.
    pub p99_ns: Option<u64>,
    /// Requests under way at the end.
    pub in_flight: u64,
    /// How many were under way on average, by the times of those that have ended.
    pub queue_depth: f64,
    /// Of the thread that writes metadata.
    pub rounds_per_second: f64,
    pub syncs_per_second: f64,
    /// Pages of the block allocation table that are to be written.
    pub dirty_pages: u64,
    /// Parts of requests that wait for space.
    pub parked: u64,
    pub virtual_size: u64,
    pub actual_size: u64,
    /// Those that there are.
    pub limits: BTreeMap<&'static str, u64>,
}

/// Requests of one kind in a time.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Activity {
    pub operations_per_second: f64,
    pub bytes_per_second: f64,
    pub failed: u64,
    pub average_ns: Option<u64>,
    pub p50_ns: Option<u64>,
    pub p99_ns: Option<u64>,
}

impl Report {
    /// What counts less than before is of a process that has taken over meanwhile, or of an
    /// engine that has: then all that it says has been done in this time.
    pub fn of(before: &Sample, now: &Sample) -> Self {
        let seconds = (now.at - before.at).as_secs_f64().max(f64::MIN_POSITIVE);
        let per_second = |more: u64| rounded(more as f64 / seconds);
        let activity = |kind: Kind| {
            let (more, latencies) = match now.counts(kind).since(&before.counts(kind)) {
                Some(more) => {
                    let latencies = now.latencies(kind).since(&before.latencies(kind));
                    (more, latencies)
                }
                None => (now.counts(kind), now.latencies(kind)),
            };
            let activity = Activity {
                operations_per_second: per_second(more.operations),
                bytes_per_second: per_second(more.bytes),
                failed: more.failed,
                average_ns: more.average_ns(),
                p50_ns: latencies.quantile(50),
                p99_ns: latencies.quantile(99),
            };
            (activity, latencies, more.time_ns)
        };
        let [reads, writes, flushes, discards] = [READS, WRITES, FLUSHES, DISCARDS].map(activity);
        let both = reads.1.and(&writes.1);
        let times = [reads.2, writes.2, flushes.2, discards.2];
        let time_ns = times.into_iter().fold(0, u64::saturating_add);
        let metadata = |name: &str| {
            let count = now.engine(name);
            per_second(count.checked_sub(before.engine(name)).unwrap_or(count))
        };
        let (limits, none) = (&mut now.limits(), &mut ThrottleLimits::default());
        let limit = |name| {
            let value = limits.field(name).map(|value| *value);
            let usual = none.field(name).map(|value| *value);
            Some((name, value.filter(|_| value != usual)?))
        };
        Self {
            file: now.file().to_owned(),
            status: now.status().to_owned(),
            seconds: rounded(seconds),
            reads: reads.0,
            writes: writes.0,
            flushes: flushes.0,
            discards: discards.0,
            p50_ns: both.quantile(50),
            p99_ns: both.quantile(99),
            in_flight: now.in_flight(),
            queue_depth: rounded(time_ns as f64 / 1e9 / seconds),
            rounds_per_second: metadata("rounds"),
            syncs_per_second: metadata("syncs"),
            dirty_pages: now.engine("dirty-pages"),
            parked: now.engine("parked"),
            virtual_size: now.virtual_size(),
            actual_size: now.actual_size(),
            limits: ThrottleLimits::NUMBERS
                .into_iter()
                .filter_map(limit)
                .collect(),
        }
    }
}

/// To a thousandth: more says nothing.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A duration in a unit that fits; `None` is that of nothing.
pub fn duration(ns: Option<u64>) -> String {
    let Some(ns) = ns else {
        return "-".to_owned();
    };
    let (value, unit) = match ns as f64 {
        ns @ ..1e3 => (ns, "ns"),
        ns @ ..1e6 => (ns / 1e3, "us"),
        ns @ ..1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    match value {
        ..10.0 => format!("{value:.1} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

#[cfg(test)]
pub mod tests {
    use std::time::Duration;

    use super::*;

    /// A sample of a disk that has read so much so many seconds after the first.
    pub fn sample(file: &str, seconds: u64, reads: u64) -> Sample {
        let limits = json!({ "iops": 500, "bps": 0, "iops_max": 900, "iops_max_length": 1 });
        let mut node = limits;
        node["file"] = file.into();
        node["image"] = json!({ "virtual-size": 64 << 20, "actual-size": 3 << 20 });
        Sample {
            at: *START + Duration::from_secs(seconds),
            nodes: json!([node]),
            status: json!({ "status": "running" }),
            stats: json!({
                "rd_operations": reads,
                "rd_bytes": reads * 4096,
                "rd_total_time_ns": reads * 100_000,
                "failed_rd_operations": seconds,
                "wr_operations": 5,
            }),
            engine: json!({
                "file-id": "1-2",
                "queues": [{ "in-flight": 2 }, { "in-flight": 1 }],
                "rounds": seconds * 3,
                "dirty-pages": 7,
            }),
            latencies: json!({ "reads": [[98_304, reads]], "writes": [[1 << 20, 1]] }),
        }
    }

    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);

    #[test]
    fn what_happens_between_two_samples_is_what_is_reported() {
        let report = Report::of(&sample("/a", 1, 1000), &sample("/a", 3, 21_000));
        assert_eq!((report.seconds, report.file.as_str()), (2.0, "/a"));
        assert_eq!(report.reads.operations_per_second, 10_000.0);
        assert_eq!(report.reads.bytes_per_second, 40_960_000.0);
        assert_eq!(
            (report.reads.failed, report.reads.average_ns),
            (2, Some(99_990))
        );
        assert_eq!(report.reads.p99_ns, Some(98_304 + 6144));
        assert_eq!(report.writes, Activity::default(), "there were none");
        assert_eq!(report.p99_ns, report.reads.p99_ns);
        assert_eq!((report.in_flight, report.queue_depth), (3, 1.0));
        assert_eq!((report.rounds_per_second, report.dirty_pages), (3.0, 7));
        assert_eq!(
            report.limits,
            BTreeMap::from([("iops", 500), ("iops_max", 900)])
        );
        // A process that has taken over begins anew.
        let report = Report::of(&sample("/a", 1, 1000), &sample("/a", 2, 10));
        assert_eq!(report.reads.operations_per_second, 10.0);
        assert_eq!((report.reads.failed, report.rounds_per_second), (2, 3.0));
        assert_eq!(report.reads.p99_ns, Some(98_304 + 6144));
        assert_eq!(report.writes, Activity::default(), "they may be the same");
        let report = Report::of(&sample("/a", 3, 0), &sample("/a", 4, 0));
        let line = serde_json::to_value(&report).unwrap();
        assert_eq!(line["reads"]["p99-ns"], Value::Null);
        assert_eq!(line["limits"], json!({ "iops": 500, "iops_max": 900 }));
    }

    #[test]
    fn quantiles_are_found_among_buckets() {
        let of = |list: &[(u64, u64)]| Buckets(list.iter().copied().collect());
        let buckets = of(&[(1_024, 50), (2_048, 49), (1 << 30, 1)]);
        assert_eq!(buckets.quantile(50), Some(1_088));
        assert_eq!(buckets.quantile(51), Some(2_176));
        assert_eq!(buckets.quantile(99), Some(2_176));
        assert_eq!(buckets.quantile(100), Some((1 << 30) + (1 << 26)));
        assert_eq!(of(&[]).quantile(50), None);
        assert_eq!(of(&[(512, 0)]).quantile(50), None);
        let both = buckets.and(&of(&[(512, 900)]));
        assert_eq!(both.quantile(90), Some(576));
        // Whatever a process says.
        let most = of(&[(0, u64::MAX), (u64::MAX, u64::MAX)]);
        let quantiles = [50, 51].map(|percent| most.quantile(percent));
        assert_eq!(quantiles, [Some(64), Some(u64::MAX)]);
        assert_eq!(most.clone().and(&most), most);
    }

    #[test]
    fn durations_have_a_unit_that_fits() {
        let shown = [
            None,
            Some(950),
            Some(1_500),
            Some(102_000),
            Some(2_000_000_000),
        ];
        let shown = shown.map(duration);
        assert_eq!(shown, ["-", "950 ns", "1.5 us", "102 us", "2.0 s"]);
    }
}
