//! `stat`: what a guest does with its disk, and how the process that serves it fares.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vhost_user_ploop::control::{AskError, Asker};

use crate::args::Output;
use crate::served;
use crate::show::{self, print};
use crate::size::human;

/// How many lines stand below a heading.
const PAGE: u64 = 20;

/// Kinds of requests: as they are called here, in `query-blockstats`, and in
/// `query-latencies`.
const KINDS: [(&str, &str, &str); 4] = [
    ("reads", "rd", "reads"),
    ("writes", "wr", "writes"),
    ("flushes", "flush", "flushes"),
    ("discards", "unmap", "unmaps"),
];

/// All that is asked.
struct Sample {
    at: Instant,
    nodes: Value,
    status: Value,
    stats: Value,
    engine: Value,
    latencies: Value,
}

impl Sample {
    fn take(asker: &mut Asker) -> Result<Self, AskError> {
        Ok(Self {
            at: Instant::now(),
            nodes: asker.ask("query-named-block-nodes")?,
            status: asker.ask("query-status")?,
            stats: asker.ask("query-blockstats")?[0]["stats"].take(),
            engine: asker.ask("query-engine")?,
            latencies: asker.ask("query-latencies")?,
        })
    }

    fn stat(&self, name: &str) -> u64 {
        number(&self.stats[name])
    }

    fn in_flight(&self) -> u64 {
        let queues = self.engine["queues"].as_array();
        let queues = queues.into_iter().flatten();
        queues.map(|queue| number(&queue["in-flight"])).sum()
    }

    fn json(&self) -> Value {
        json!({
            "status": self.status["status"],
            "node": self.nodes[0],
            "stats": self.stats,
            "engine": self.engine,
            "latencies": self.latencies,
        })
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

/// Shows the disk at `path`, once or every so often until the process that serves it ends.
///
/// # Errors
/// In words.
pub fn run(
    path: &Path,
    control: Option<&Path>,
    watch: Option<Duration>,
    output: Output,
) -> Result<(), String> {
    let words = |error: AskError| error.to_string();
    let mut server = served::connect(path, control)?;
    let mut last = Sample::take(&mut server.asker).map_err(words)?;
    let Some(pause) = watch else {
        match output {
            Output::Json => show::json(&last.json()),
            Output::Human => once(&last),
        }
        return Ok(());
    };
    for line in 0.. {
        if output == Output::Human && line % PAGE == 0 {
            print(heading());
        }
        thread::sleep(pause);
        let now = Sample::take(&mut server.asker).map_err(words)?;
        match output {
            // A line each.
            Output::Json => print(now.json()),
            Output::Human => print(difference(&last, &now)),
        }
        last = now;
    }
    Ok(())
}

fn once(sample: &Sample) {
    let node = &sample.nodes[0];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    print(format!("image: {}", text(&node["file"])));
    print(format!("status: {}", text(&sample.status["status"])));
    print(format!(
        "virtual size: {}, disk size: {}",
        human(number(&node["image"]["virtual-size"])),
        human(number(&node["image"]["actual-size"]))
    ));
    print(format!(
        "{:<10}{:>12}{:>12}{:>8}{:>10}{:>10}{:>10}",
        "", "operations", "bytes", "failed", "average", "p50", "p99"
    ));
    for (name, stat, latency) in KINDS {
        let count = sample.stat(&format!("{stat}_operations"));
        let failed = sample.stat(&format!("failed_{stat}_operations"));
        let time = sample.stat(&format!("{stat}_total_time_ns"));
        let average = time.checked_div(count + failed);
        let buckets = buckets(&sample.latencies[latency]);
        print(format!(
            "{name:<10}{count:>12}{:>12}{failed:>8}{:>10}{:>10}{:>10}",
            human(sample.stat(&format!("{stat}_bytes"))),
            duration(average),
            duration(quantile(&buckets, 50)),
            duration(quantile(&buckets, 99)),
        ));
    }
    let engine = &sample.engine;
    print(format!(
        "in flight: {}, waiting for space: {}",
        sample.in_flight(),
        engine["parked"]
    ));
    print(format!(
        "metadata: {} rounds, {} syncs, {} pages to be written",
        engine["rounds"], engine["syncs"], engine["dirty-pages"]
    ));
}

fn heading() -> String {
    format!(
        "{:>9}{:>11}{:>9}{:>9}{:>9}{:>11}{:>9}{:>9}{:>8}{:>8}{:>7}{:>7}",
        "reads/s",
        "read/s",
        "p50",
        "p99",
        "writes/s",
        "written/s",
        "p50",
        "p99",
        "flush/s",
        "flight",
        "dirty",
        "parked"
    )
}

fn difference(before: &Sample, now: &Sample) -> String {
    let seconds = (now.at - before.at).as_secs_f64();
    let rate = |name: &str| {
        let more = now.stat(name).saturating_sub(before.stat(name));
        (more as f64 / seconds).round() as u64
    };
    let latency = |kind: &str| {
        let mut buckets = buckets(&now.latencies[kind]);
        for (start, count) in self::buckets(&before.latencies[kind]) {
            let bucket = buckets.entry(start).or_default();
            *bucket = bucket.saturating_sub(count);
        }
        [50, 99].map(|percent| duration(quantile(&buckets, percent)))
    };
    let ([read50, read99], [write50, write99]) = (latency("reads"), latency("writes"));
    format!(
        "{:>9}{:>11}{read50:>9}{read99:>9}{:>9}{:>11}{write50:>9}{write99:>9}{:>8}{:>8}{:>7}{:>7}",
        rate("rd_operations"),
        human(rate("rd_bytes")),
        rate("wr_operations"),
        human(rate("wr_bytes")),
        rate("flush_operations"),
        now.in_flight(),
        number(&now.engine["dirty-pages"]),
        number(&now.engine["parked"]),
    )
}

/// Where buckets begin, in ns, and how much they have.
fn buckets(list: &Value) -> BTreeMap<u64, u64> {
    let list = list.as_array().into_iter().flatten();
    list.map(|pair| (number(&pair[0]), number(&pair[1])))
        .collect()
}

/// A duration that so many in a hundred do not exceed, in ns.
fn quantile(buckets: &BTreeMap<u64, u64>, percent: u64) -> Option<u64> {
    let all: u64 = buckets.values().sum();
    let mut left = (all * percent).div_ceil(100);
    let found = buckets.iter().find(|(_, count)| {
        left = left.saturating_sub(**count);
        left == 0 && **count > 0
    });
    // The middle of a bucket that is an eighth of a power of two wide.
    found.map(|(&start, _)| start + (start / 16).max(64))
}

fn duration(ns: Option<u64>) -> String {
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
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_found_among_buckets() {
        let of = |list: &[(u64, u64)]| list.iter().copied().collect::<BTreeMap<_, _>>();
        let buckets = of(&[(1_024, 50), (2_048, 49), (1 << 30, 1)]);
        assert_eq!(quantile(&buckets, 50), Some(1_088));
        assert_eq!(quantile(&buckets, 51), Some(2_176));
        assert_eq!(quantile(&buckets, 99), Some(2_176));
        assert_eq!(quantile(&buckets, 100), Some((1 << 30) + (1 << 26)));
        assert_eq!(quantile(&of(&[]), 50), None);
        assert_eq!(quantile(&of(&[(512, 0)]), 50), None);
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
