//! `stat`: what a guest does with its disk, and how the process that serves it fares.

use std::path::Path;
use std::time::Duration;

use vhost_user_ploop::control::{AskError, Asker};

use crate::args::Output;
use crate::sample::{self, Activity, Report, Sample, duration};
use crate::served::{self, Purpose, Server};
use crate::show::{self, print};
use crate::size::human;

/// How many lines stand below a heading.
const PAGE: u64 = 20;

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
    let mut server = served::connect(path, control, Purpose::Look)?;
    let first = Sample::take(&mut server.asker).map_err(|error| error.to_string())?;
    match (watch, output) {
        (Some(pause), _) => return watch_every(pause, server, first, output),
        (None, Output::Json) => show::json(&first.json()),
        (None, Output::Human) => once(&first),
    }
    Ok(())
}

fn watch_every(
    pause: Duration,
    mut server: Server,
    mut last: Sample,
    output: Output,
) -> Result<(), String> {
    let mut lines = 0;
    loop {
        if output == Output::Human && lines % PAGE == 0 {
            print(heading());
        }
        if !show::has_reader_after(pause) {
            return Ok(());
        }
        let now = match Sample::take(&mut server.asker) {
            Err(error @ AskError::Io(_)) => {
                let next = connect_again(&server, &last).ok_or_else(|| error.to_string())?;
                server.asker = next.0;
                Ok(next.1)
            }
            taken => taken,
        };
        let now = now.map_err(|error| error.to_string())?;
        let report = Report::of(&last, &now);
        match output {
            Output::Json => show::json_line(&report),
            Output::Human => print(line(&report)),
        }
        last = now;
        lines += 1;
    }
}

/// Asks who listens at the same place: another process that has taken the disk over, or the
/// same one, which has hung up on a client that was silent for too long.
fn connect_again(server: &Server, last: &Sample) -> Option<(Asker, Sample)> {
    let mut asker = Asker::connect(&server.socket).ok()?;
    let sample = Sample::take(&mut asker).ok()?;
    sample.is_of_the_same_disk(last).then_some((asker, sample))
}

fn once(sample: &Sample) {
    print(format!("image: {}", sample.file()));
    print(format!("status: {}", sample.status()));
    print(format!(
        "virtual size: {}, disk size: {}",
        human(sample.virtual_size()),
        human(sample.actual_size())
    ));
    print(format!(
        "{:<10}{:>12}{:>12}{:>8}{:>10}{:>10}{:>10}",
        "", "operations", "bytes", "failed", "average", "p50", "p99"
    ));
    for (name, kind) in [
        ("reads", sample::READS),
        ("writes", sample::WRITES),
        ("flushes", sample::FLUSHES),
        ("discards", sample::DISCARDS),
    ] {
        let counts = sample.counts(kind);
        let buckets = sample.latencies(kind);
        print(format!(
            "{name:<10}{:>12}{:>12}{:>8}{:>10}{:>10}{:>10}",
            counts.operations,
            human(counts.bytes),
            counts.failed,
            duration(counts.average_ns()),
            duration(buckets.quantile(50)),
            duration(buckets.quantile(99)),
        ));
    }
    print(format!(
        "in flight: {}, waiting for space: {}",
        sample.in_flight(),
        sample.engine("parked")
    ));
    print(format!(
        "metadata: {} rounds, {} syncs, {} pages to be written",
        sample.engine("rounds"),
        sample.engine("syncs"),
        sample.engine("dirty-pages")
    ));
    let limits = sample.limits();
    if limits.are_any() {
        print(format!("limits: {limits}"));
    }
}

fn heading() -> String {
    let kind = |operations: &str, bytes: &str| {
        format!("{operations:>9}{bytes:>11}{:>8}{:>8}", "p50", "p99")
    };
    format!(
        "{}{}{:>9}{:>11}{:>7}{:>7}{:>7}{:>8}{:>7}{:>11}",
        kind("reads/s", "read/s"),
        kind("writes/s", "written/s"),
        "flushes/s",
        "discards/s",
        "depth",
        "flight",
        "dirty",
        "syncs/s",
        "parked",
        "disk size",
    )
}

fn line(report: &Report) -> String {
    let whole = |rate: f64| rate.round() as u64;
    let kind = |activity: &Activity| {
        format!(
            "{:>9}{:>11}{:>8}{:>8}",
            whole(activity.operations_per_second),
            human(whole(activity.bytes_per_second)),
            duration(activity.p50_ns),
            duration(activity.p99_ns)
        )
    };
    let status = match report.status.as_str() {
        "running" => String::new(),
        other => format!("  {other}"),
    };
    format!(
        "{}{}{:>9}{:>11}{:>7.1}{:>7}{:>7}{:>8}{:>7}{:>11}{status}",
        kind(&report.reads),
        kind(&report.writes),
        whole(report.flushes.operations_per_second),
        whole(report.discards.operations_per_second),
        report.queue_depth,
        report.in_flight,
        report.dirty_pages,
        whole(report.syncs_per_second),
        report.parked,
        human(report.actual_size),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::tests::sample;

    #[test]
    fn what_is_shown_stands_below_its_name() {
        let mut report = Report::of(&sample("/a", 1, 0), &sample("/a", 2, 1234));
        let (heading, line_) = (heading(), line(&report));
        assert_eq!(heading.len(), line_.len(), "{heading}\n{line_}");
        for (name, expected) in [
            (" reads/s", "1234"),
            (" read/s", "4.82 MiB"),
            ("p99", "104 us"),
            (" writes/s", "0"),
            ("depth", "0.1"),
            ("flight", "3"),
            ("dirty", "7"),
            ("disk size", "3 MiB"),
        ] {
            let end = heading.find(name).unwrap() + name.len();
            let found = line_[..end].rsplit("  ").next().unwrap().trim();
            assert_eq!(found, expected, "{name}\n{heading}\n{line_}");
        }
        report.status = "io-error".to_owned();
        assert!(line(&report).ends_with("  io-error"));
    }
}
