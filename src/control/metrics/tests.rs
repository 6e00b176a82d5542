//! The page as it is written, and those that ask for it in every way.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use event_manager::EventSet;

use super::client::{Client, Stay};
use super::http::Format;
use super::page::{Snapshot, write};
use crate::control::Level;
use crate::device::{Histogram, KindCounts, Latencies, QueueReport, ThrottleLimits, Totals};
use crate::ploop::EngineReport;

const KINDS: [&str; 4] = ["read", "write", "flush", "discard"];

fn counts(number: u64) -> KindCounts {
    KindCounts {
        operations: number,
        bytes: number << 12,
        failed: number + 1,
        invalid: number + 2,
        total_time_ns: number * 1_500_000,
    }
}

fn queue(index: usize) -> QueueReport {
    let number = |kind: u64| counts(100 * index as u64 + kind);
    QueueReport {
        index,
        runs: index == 0,
        in_flight: index as u64,
        totals: Totals {
            reads: number(1),
            writes: number(2),
            flushes: number(3),
            unmaps: number(4),
            ..Totals::default()
        },
    }
}

/// A disk with a snapshot below it, and a name that has to be escaped.
fn snapshot() -> Snapshot {
    let level = |file: &str, is_writable| Level {
        file: PathBuf::from(file),
        is_ploop: is_writable,
        is_writable,
        is_direct: true,
        virtual_size: 1 << 30,
        actual_size: 12 << 20,
        cluster_size: 1 << 20,
    };
    Snapshot {
        serial: "web 1".to_owned(),
        file_id: "fe00-20d3".to_owned(),
        levels: vec![
            level("/vz/base", false),
            level("/vz/a \"top\"\\\n\u{e4}.hds", true),
        ],
        queues: vec![queue(0), queue(3)],
        latencies: Latencies {
            reads: Histogram::of(&[1, 4095, 4096, 5_000_000, 1 << 33, 60_000_000_000]),
            ..Latencies::default()
        },
        is_open: true,
        engine: EngineReport {
            runners: 2,
            parked: 5,
            is_host_full: true,
            rounds: 7,
            syncs: 6,
            clusters_available: 127,
            ..EngineReport::default()
        },
        limits: "iops_rd=500,iops_wr=400,bps=1048576"
            .parse::<ThrottleLimits>()
            .unwrap(),
    }
}

fn page(format: Format) -> String {
    write("/vz/\"1\"", snapshot(), format).unwrap()
}

#[test]
fn the_page_is_written_in_both_formats() {
    for (format, name, expected) in [
        (
            Format::OpenMetrics,
            "openmetrics.txt",
            include_str!("tests/openmetrics.txt"),
        ),
        (Format::Text, "text.txt", include_str!("tests/text.txt")),
    ] {
        let expected = expected.replace("VERSION", env!("CARGO_PKG_VERSION"));
        let page = page(format);
        let lines = page.lines().zip(expected.lines());
        if let Some((is, expected)) = lines.into_iter().find(|(is, expected)| is != expected) {
            panic!("{name}: {is}\ninstead of {expected}");
        }
        assert_eq!(page.len(), expected.len(), "{name}");
    }
}

/// Of each metric its type, and its samples: names and labels, and the values.
fn parse(page: &str) -> BTreeMap<String, (String, Vec<(String, f64)>)> {
    let mut metrics = BTreeMap::<String, (String, Vec<(String, f64)>)>::new();
    let mut current = String::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            let before = metrics.insert(name.to_owned(), (kind.to_owned(), Vec::new()));
            assert_eq!(before, None, "{name} twice");
            current = name.to_owned();
        } else if !line.starts_with('#') {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            assert!(sample.starts_with(&current), "{sample} below {current}");
            let samples = &mut metrics.get_mut(&current).unwrap().1;
            samples.push((sample.to_owned(), value.parse().unwrap()));
        }
    }
    metrics
}

/// The parts of a sample's name and labels, whatever their order and the way in which bounds
/// are written.
fn parts(sample: &str) -> BTreeSet<String> {
    let parts = sample.trim_end_matches('}').split(['{', ',']);
    let part = |part: &str| match part.strip_prefix("le=\"") {
        Some(bound) => bound_of(bound.trim_end_matches('"')).to_string(),
        None => part.to_owned(),
    };
    parts.map(part).collect()
}

fn bound_of(text: &str) -> f64 {
    text.replace("+Inf", "inf").parse().unwrap()
}

#[test]
fn both_formats_have_the_same_samples() {
    let samples = |format| {
        let metrics = parse(&page(format)).into_values();
        let samples = metrics.flat_map(|(_, samples)| samples);
        let samples = samples.map(|(sample, value)| (parts(&sample), value.to_string()));
        samples.collect::<BTreeSet<_>>()
    };
    let [new, old] = [Format::OpenMetrics, Format::Text].map(samples);
    assert!(new.len() > 100, "{}", new.len());
    let differences: Vec<_> = new.symmetric_difference(&old).take(4).collect();
    assert!(differences.is_empty(), "{differences:?}");
}

#[test]
fn requests_are_counted_below_exact_bounds() {
    let metrics = parse(&page(Format::OpenMetrics));
    let (kind, samples) = &metrics["ploop_request_duration_seconds"];
    assert_eq!(kind, "histogram");
    let of_reads = samples.iter().filter(|(name, _)| name.contains("\"read\""));
    let buckets: Vec<_> = of_reads
        .filter_map(|(name, count)| {
            let bound = name.split("le=\"").nth(1)?.split('"').next()?;
            Some((bound_of(bound), *count))
        })
        .collect();
    let expect = |seconds: f64, expected: f64| {
        let found = buckets.iter().find(|(bound, _)| *bound == seconds);
        assert_eq!(found, Some(&(seconds, expected)), "{buckets:?}");
    };
    // What took 4096 ns took longer than any time below that.
    expect(4.096e-6, 2.0);
    expect(8.192e-6, 3.0);
    expect(4.194_304e-3, 3.0);
    expect(8.388_608e-3, 4.0);
    expect(8.589_934_592, 4.0);
    expect(f64::INFINITY, 6.0);
    assert!(buckets.is_sorted_by(|one, next| one.0 < next.0 && one.1 <= next.1));
    for power in 12..=33 {
        let bound = 1_u64 << power;
        let bins = Histogram::of(&[bound - 1, bound]).bins(&[bound]);
        assert_eq!(bins, [1, 1], "{bound}");
    }
}

#[test]
fn a_disk_that_nobody_has_used_has_a_page() {
    let nothing = Snapshot {
        levels: Vec::new(),
        queues: Vec::new(),
        limits: ThrottleLimits::default(),
        ..snapshot()
    };
    let page = write("", nothing, Format::Text).unwrap();
    let metrics = parse(&page);
    assert!(metrics.values().all(|(_, samples)| !samples.is_empty()));
    assert!(!metrics.contains_key("ploop_requests_total"));
    assert!(!metrics.contains_key("ploop_limit_bytes_per_second"));
    let durations = &metrics["ploop_request_duration_seconds"].1;
    for kind in KINDS {
        assert!(durations.iter().any(|(name, _)| name.contains(kind)));
    }
}

/// The most that there can be, to bound what a client makes the process hold.
#[test]
fn a_page_is_of_a_size_that_is_known() {
    let busy = Snapshot {
        queues: (0..64).map(queue).collect(),
        ..snapshot()
    };
    let page = write(&"d".repeat(100), busy, Format::OpenMetrics).unwrap();
    assert!(page.len() < 256 << 10, "{}", page.len());
}

const QUESTION: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";

fn pair() -> (UnixStream, Client) {
    let (own, other) = UnixStream::pair().unwrap();
    (own, Client::new(other.into()))
}

fn serve(client: &mut Client, page: &str) -> Stay {
    client.serve(&|_| Ok(page.to_owned()))
}

fn is_asked(client: &Client) -> bool {
    client.events(0).event_set() == EventSet::IN
}

#[test]
fn a_question_may_come_in_pieces() {
    let (mut own, mut client) = pair();
    for byte in QUESTION {
        assert!(is_asked(&client));
        own.write_all(&[*byte]).unwrap();
        assert_eq!(serve(&mut client, "a 1\n"), Stay::Stays);
    }
    // The answer ends where the connection does, though the client is still there.
    let mut answer = String::new();
    own.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("\r\n\r\na 1\n"), "{answer}");
    assert_eq!(serve(&mut client, ""), Stay::Stays);
    drop(own);
    assert_eq!(serve(&mut client, ""), Stay::Goes);
}

#[test]
fn a_client_that_reads_nothing_holds_up_nobody_and_gets_all_in_the_end() {
    let (mut own, mut client) = pair();
    let page = "a 1\n".repeat(1 << 20);
    own.write_all(QUESTION).unwrap();
    for _ in 0..100 {
        assert_eq!(serve(&mut client, &page), Stay::Stays);
        assert_eq!(client.events(0).event_set(), EventSet::OUT);
    }
    let reader = thread::spawn(move || {
        let mut answer = Vec::new();
        own.read_to_end(&mut answer).unwrap();
        answer
    });
    while !is_asked(&client) {
        assert_eq!(serve(&mut client, ""), Stay::Stays);
    }
    assert!(reader.join().unwrap().ends_with(page.as_bytes()));
    assert_eq!(serve(&mut client, ""), Stay::Goes);
}

#[test]
fn a_client_that_hangs_up_goes_whenever_it_does() {
    // Before it has asked, in the middle of it, and with the answer under way.
    for (question, is_over) in [(&b""[..], true), (&QUESTION[..9], true), (QUESTION, false)] {
        let (mut own, mut client) = pair();
        own.write_all(question).unwrap();
        if !question.is_empty() {
            serve(&mut client, &"a 1\n".repeat(1 << 20));
        }
        if is_over {
            own.shutdown(Shutdown::Write).unwrap();
        } else {
            drop(own);
        }
        assert_eq!(serve(&mut client, ""), Stay::Goes);
    }
}

#[test]
fn who_has_ended_asking_is_answered() {
    let (mut own, mut client) = pair();
    own.write_all(QUESTION).unwrap();
    own.shutdown(Shutdown::Write).unwrap();
    assert_eq!(serve(&mut client, "a 1\n"), Stay::Stays);
    let mut answer = String::new();
    own.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("a 1\n"), "{answer}");
    assert_eq!(serve(&mut client, ""), Stay::Goes);
}

#[test]
fn a_flood_is_cut_off() {
    let (mut own, mut client) = pair();
    own.set_nonblocking(true).unwrap();
    let mut sent = 0;
    loop {
        // It never ends its question, and never stops.
        while let Ok(len) = own.write(&[b'x'; 1000]) {
            sent += len;
        }
        if serve(&mut client, "") == Stay::Goes {
            break;
        }
        assert!(sent < 10 << 20);
    }
    let mut answer = Vec::new();
    let _ = own.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

#[test]
fn a_page_that_cannot_be_written_is_said_to_be_so() {
    let (mut own, mut client) = pair();
    own.write_all(QUESTION).unwrap();
    assert_eq!(client.serve(&|_| Err(fmt::Error)), Stay::Stays);
    let mut answer = String::new();
    own.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
}
