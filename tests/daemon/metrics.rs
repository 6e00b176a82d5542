//! Metrics: who asks for them, well and badly, while a disk is served.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType, sockopt};
use serde_json::json;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::backend::Backend;
use crate::common::qmp::Qmp;
use crate::control::control;
use crate::front_end::*;
use crate::upgrade::{Fake, GO, SERVING, upgrades};
use crate::{OK, Rig, descriptors, expect_service, hangs_up, start_front_end, wait_for};

const DOCUMENT: &str = include_str!("../../docs/metrics.md");

const OPEN_METRICS: &str = "application/openmetrics-text;version=1.0.0";

fn metrics(rig: &Rig) -> PathBuf {
    rig.folder.path().join("metrics")
}

fn on_unix(rig: &Rig) -> String {
    format!("--metrics=unix:{}", metrics(rig).display())
}

/// On a port of this host that the kernel has chosen.
pub const ON_TCP: &str = "--metrics=127.0.0.1:0";

/// Which it is.
pub fn address(backend: &Backend) -> String {
    const BEFORE: &str = "metrics are at http://";
    backend.expect_to_say(BEFORE);
    let log = backend.log();
    let (_, rest) = log.split_once(BEFORE).unwrap();
    rest.split_once('/').expect("a path follows").0.to_owned()
}

/// Asks, and reads until it is hung up on.
fn ask(mut socket: impl Read + Write, question: &str) -> String {
    socket.write_all(question.as_bytes()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

fn question(accept: &str) -> String {
    format!("GET /metrics HTTP/1.1\r\nHost: disk\r\nAccept: {accept}\r\n\r\n")
}

/// What is answered to somebody who accepts this.
#[track_caller]
fn page(socket: impl Read + Write, accept: &str) -> String {
    let answer = ask(socket, &question(accept));
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains(&format!("Content-Length: {}\r\n", body.len())),
        "{head}"
    );
    body.to_owned()
}

fn connect(rig: &Rig) -> UnixStream {
    let socket = UnixStream::connect(metrics(rig)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

pub fn text(rig: &Rig) -> String {
    page(connect(rig), "text/plain")
}

/// The value of the one sample that has all of these in its name and labels.
#[track_caller]
fn value(page: &str, parts: &[&str]) -> f64 {
    let is_it = |line: &&str| {
        let name = line.split(['{', ' ']).next().unwrap();
        name == parts[0] && parts.iter().all(|part| line.contains(part))
    };
    let samples: Vec<_> = page.lines().filter(is_it).collect();
    let [sample] = samples[..] else {
        panic!("{parts:?}: {samples:?}");
    };
    sample.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// The names of the metrics on a page, in the older format.
fn names(page: &str) -> BTreeSet<String> {
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect()
}

pub fn write_and_read(front_end: &mut FrontEnd) {
    let ring = &mut front_end.rings[1];
    for sector in [8, 80] {
        let source = [readable(DATA, 4096)];
        assert_eq!(ring.run(VIRTIO_BLK_T_OUT, sector, &source).0, OK);
    }
    let target = [writable(DATA, 512)];
    assert_eq!(ring.run(VIRTIO_BLK_T_IN, 8, &target).0, OK);
    assert_eq!(ring.run(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
}

#[test]
fn a_page_says_what_the_control_socket_says() {
    let rig = Rig::new();
    let control_option = format!("--control={}", control(&rig).display());
    let backend = rig.serve(&[&on_unix(&rig), &control_option, "--serial=web1"]);
    let mode = fs::metadata(metrics(&rig)).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let mut front_end = start_front_end(backend.socket());
    write_and_read(&mut front_end);

    let page = text(&rig);
    let count = |name: &str, operation: &str| {
        let operation = format!("operation=\"{operation}\"");
        value(&page, &[name, "queue=\"1\"", &operation])
    };
    assert_eq!(count("ploop_requests_total", "write"), 2.0);
    assert_eq!(count("ploop_request_bytes_total", "write"), 8192.0);
    assert_eq!(count("ploop_requests_total", "read"), 1.0);
    assert_eq!(count("ploop_requests_total", "flush"), 1.0);
    assert_eq!(count("ploop_request_errors_total", "write"), 0.0);
    let duration = "ploop_request_duration_seconds";
    let writes = "operation=\"write\"";
    assert_eq!(value(&page, &[&format!("{duration}_count"), writes]), 2.0);
    let all = [&format!("{duration}_bucket"), writes, "le=\"+Inf\""];
    assert_eq!(value(&page, &all), 2.0);
    assert!(value(&page, &[&format!("{duration}_sum"), writes]) > 1e-6);
    assert_eq!(value(&page, &["ploop_queue_running", "queue=\"1\""]), 1.0);
    let info = [
        "ploop_disk_info",
        "format=\"ploop\"",
        "access=\"rw\"",
        "serial=\"web1\"",
        &format!("file=\"{}\"", rig.image.display()),
    ];
    assert_eq!(value(&page, &info), 1.0);
    assert_eq!(value(&page, &["ploop_capacity_bytes"]), f64::from(64 << 20));
    let label = format!("{{disk=\"{}\"", rig.image.display());
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    assert!(samples.clone().all(|line| line.contains(&label)), "{page}");

    // The same numbers elsewhere, of what stands still by now.
    let mut qmp = Qmp::connect(&control(&rig));
    let stats = qmp.ask("query-blockstats", json!({}))[0]["stats"].clone();
    let sum = value(&page, &[&format!("{duration}_sum"), writes]);
    let elsewhere = stats["wr_total_time_ns"].as_f64().unwrap() / 1e9;
    assert!((sum - elsewhere).abs() < 1e-9, "{sum} {elsewhere}");
    let block = qmp.ask("query-named-block-nodes", json!({}));
    let allocated = value(&page, &["ploop_allocated_bytes", "level=\"0\""]);
    assert_eq!(block[0]["image"]["actual-size"].as_f64(), Some(allocated));
    let engine = qmp.ask("query-engine", json!({}));
    let id = format!("file_id=\"{}\"", engine["file-id"].as_str().unwrap());
    assert_eq!(value(&page, &["ploop_disk_info", &id]), 1.0);

    drop(front_end);
    backend.stop();
    assert!(!metrics(&rig).exists());
}

/// Most of an answer stays with who has sent it.
fn connect_with_little_room(address: &str) -> TcpStream {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_recv_buffer_size(&socket, 2048).unwrap();
    let address: SocketAddr = address.parse().unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    socket.into()
}

#[test]
fn metrics_are_asked_for_by_network_and_in_either_format() {
    let rig = Rig::new();
    let backend = rig.serve(&[ON_TCP]);
    let address = address(&backend);
    assert!(
        !backend.log().contains("whoever can reach"),
        "{}",
        backend.log()
    );
    let mut front_end = start_front_end(backend.socket());
    write_and_read(&mut front_end);
    let connect = || TcpStream::connect(&address).unwrap();
    let old = page(connect(), "*/*");
    let new = page(connect(), OPEN_METRICS);
    assert!(
        new.ends_with("\n# EOF\n") && !old.contains("# EOF"),
        "{new}"
    );
    let samples = |page: &str, name: &str| -> Vec<_> {
        let samples = page.lines().filter(|line| line.starts_with(name));
        samples.map(str::to_owned).collect()
    };
    for name in ["ploop_requests_total{", "ploop_request_bytes_total{"] {
        assert_eq!(samples(&old, name), samples(&new, name));
        assert!(!samples(&old, name).is_empty());
    }
    for (question, status) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "404"),
        ("DELETE /metrics HTTP/1.1\r\nHost: a\r\n\r\n", "405"),
        ("GET /metrics HTTP/1.1\r\n\r\n", "400"),
    ] {
        let answer = ask(connect(), question);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    let answer = ask(connect(), "HEAD /metrics HTTP/1.0\r\n\r\n");
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\n"),
        "{answer}"
    );
    // One that sends more than it has to, and has little room, loses nothing of its answer.
    let mut chatty = connect_with_little_room(&address);
    let long = question("*/*") + &"x".repeat(20_000);
    chatty.write_all(long.as_bytes()).unwrap();
    // Who hangs up on it would have done so by then.
    thread::sleep(A_WHILE);
    let mut answer = String::new();
    chatty.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("ploop_syncs_total{"), "{answer}");

    // Nobody else gets that port, and the program says so before it serves.
    let other = Rig::new();
    let file = format!("--blk-file={}", other.image.display());
    let said = other.refused(&[&file, &format!("--metrics={address}")]);
    assert!(
        said.contains(&format!("cannot listen on {address}")),
        "{said}"
    );
    let said = other.refused(&[&file, ON_TCP, "--metrics-mode=660"]);
    assert!(said.contains("are for --metrics=unix:PATH"), "{said}");
    drop(front_end);
    backend.stop();
    TcpStream::connect(&address).unwrap_err();
}

#[test]
fn a_socket_for_metrics_has_its_mode() {
    let rig = Rig::new();
    let backend = rig.serve(&[&on_unix(&rig), "--metrics-mode=666"]);
    let mode = fs::metadata(metrics(&rig)).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o666);
    backend.stop();
}

/// What somebody sends who means no good, and whether an answer is due.
fn nonsense() -> Vec<(Vec<u8>, bool)> {
    vec![
        (b"{\"execute\":\"quit\"}".to_vec(), true),
        (vec![0; 100_000], true),
        (vec![0xff; 10], true),
        (b"x".repeat(1_000_000), true),
        (b"\r\n".repeat(100_000), true),
        (
            [
                &b"GET /metrics HTTP/1.1\r\n"[..],
                &b"a: b\r\n".repeat(100_000),
            ]
            .concat(),
            true,
        ),
        ([&b"GET /"[..], &b"m".repeat(100_000)].concat(), true),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), true),
        (b"\x16\x03\x01\x02\x00\x01\x00".to_vec(), true),
        (b"GET /metrics HTT".to_vec(), false),
        (Vec::new(), false),
    ]
}

#[test]
fn who_asks_nonsense_disturbs_nobody() {
    let rig = Rig::new();
    let backend = rig.serve(&[ON_TCP]);
    let address = address(&backend);
    let mut front_end = start_front_end(backend.socket());
    for (bytes, is_answered) in nonsense() {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(20)]).into_owned();
        let mut bad = TcpStream::connect(&address).unwrap();
        bad.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reader = bad.try_clone().unwrap();
        let heard = thread::spawn(move || {
            let mut heard = Vec::new();
            // It may be hung up on while it sends.
            let _ = reader.read_to_end(&mut heard);
            heard
        });
        let _ = bad.write_all(&bytes);
        let _ = bad.shutdown(std::net::Shutdown::Write);
        let heard = heard.join().unwrap();
        let heard = String::from_utf8(heard).expect("answers are text");
        // Where it has sent too much, the answer may be lost with the connection.
        if is_answered && bytes.len() < 1000 {
            assert!(heard.starts_with("HTTP/1.1 "), "{start}: {heard}");
        }
        let is_error = heard.starts_with("HTTP/1.1 4") || heard.starts_with("HTTP/1.1 5");
        assert!(heard.is_empty() || is_error, "{start}: {heard}");
        expect_service(&mut front_end);
        page(TcpStream::connect(&address).unwrap(), "*/*");
    }
    backend.stop();
}

#[test]
fn clients_that_are_silent_slow_or_too_many_disturb_nobody() {
    let rig = Rig::new();
    let backend = rig.serve(&[&on_unix(&rig)]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let before = descriptors(backend.pid());

    // Too many of them: the first have to go, and who asks is answered.
    let crowd: Vec<_> = (0..40).map(|_| connect(&rig)).collect();
    assert!(hangs_up(&crowd[0], PATIENCE));
    text(&rig);
    assert!(!hangs_up(&crowd[39], A_WHILE));
    expect_service(&mut front_end);
    drop(crowd);
    for round in 0..200 {
        let mut client = connect(&rig);
        if round % 2 == 0 {
            let _ = client.write_all(b"GET /metrics HT");
        }
    }
    wait_for("their end", || descriptors(backend.pid()) <= before);

    let silent = connect(&rig);
    let mut half = connect(&rig);
    half.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
    let mut drip = connect(&rig);
    drip.set_nonblocking(true).unwrap();
    // One that reads nothing of its answer.
    let mut deaf = connect(&rig);
    deaf.write_all(question("*/*").as_bytes()).unwrap();
    let start = Instant::now();
    while !hangs_up(&silent, Duration::from_millis(50)) {
        let _ = drip.write(b"x");
        expect_service(&mut front_end);
        text(&rig);
        assert!(start.elapsed() < PATIENCE, "it is still there");
    }
    // Nobody is cut off at once.
    assert!(start.elapsed() > Duration::from_secs(5));
    assert!(hangs_up(&half, PATIENCE) && hangs_up(&drip, PATIENCE));
    wait_for("the end of all", || descriptors(backend.pid()) <= before);
    drop(deaf);
    // And one that has not gone does not keep the program from its end.
    let _last = connect(&rig);
    drop(front_end);
    backend.stop();
}

#[test]
fn a_flood_of_questions_disturbs_nobody_and_does_not_hold_up_the_end() {
    let rig = Rig::new();
    let control_option = format!("--control={}", control(&rig).display());
    let backend = rig.serve(&[ON_TCP, &control_option]);
    let address = address(&backend);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let answered = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            // Until there is nobody any more to be asked.
            scope.spawn(|| {
                while let Ok(mut socket) = TcpStream::connect(&address) {
                    let mut answer = Vec::new();
                    let asked = socket.write_all(question("*/*").as_bytes());
                    if asked.is_ok() && socket.read_to_end(&mut answer).is_ok() {
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        wait_for("many answers", || {
            expect_service(&mut front_end);
            qmp.ask("query-status", json!({}));
            answered.load(Ordering::Relaxed) >= 500
        });
        drop(front_end);
        let start = Instant::now();
        backend.stop();
        assert!(start.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn who_takes_over_is_asked_for_metrics_at_the_same_place() {
    for is_network in [false, true] {
        let rig = Rig::new();
        let option = if is_network {
            ON_TCP.to_owned()
        } else {
            on_unix(&rig)
        };
        let upgrade = format!("--upgrade-socket={}", upgrades(&rig).display());
        let backend = rig.serve(&[&option, &upgrade]);
        let mut front_end = start_front_end(backend.socket());
        write_and_read(&mut front_end);
        let address = is_network.then(|| address(&backend));
        let requests = || {
            let page = match &address {
                Some(address) => page(TcpStream::connect(address).unwrap(), OPEN_METRICS),
                None => text(&rig),
            };
            value(&page, &["ploop_requests_total", "queue=\"1\"", "\"write\""])
        };
        assert_eq!(requests(), 2.0);
        let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
        write_and_read(&mut front_end);
        // What the process before has counted is gone with it.
        assert_eq!(requests(), 2.0);
        // Twice, since the second got it in another way than the first.
        let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
        write_and_read(&mut front_end);
        assert_eq!(requests(), 2.0);
        drop(front_end);
        backend.stop();
        // It was not seen to be that process's own.
        assert_eq!(metrics(&rig).exists(), !is_network);
    }
}

#[test]
fn a_process_that_knows_of_no_metrics_takes_over_without_them() {
    let rig = Rig::new();
    let upgrade = format!("--upgrade-socket={}", upgrades(&rig).display());
    let backend = rig.serve(&[&on_unix(&rig), &upgrade]);
    let mut other = Fake::connect(&rig);
    other.come_to(&rig, GO);
    other.say(SERVING, &[]);
    backend.expect_to_say("does not support metrics");
    backend.stop_leaving_socket();
    assert!(!metrics(&rig).exists());
}

/// All metrics that there can be, of a disk that is in use.
pub fn every_name(rig: &Rig) -> (Backend, BTreeSet<String>) {
    let limits = "--throttle=bps=1000000000,iops=1000000";
    let backend = rig.serve(&[&on_unix(rig), limits]);
    write_and_read(&mut start_front_end(backend.socket()));
    (backend, names(&text(rig)))
}

#[test]
fn the_document_has_the_metrics_that_there_are() {
    let rig = Rig::new();
    let (backend, names) = every_name(&rig);
    let rows = DOCUMENT
        .lines()
        .filter_map(|line| line.strip_prefix("| `ploop_"));
    let documented: BTreeSet<_> = rows
        .map(|row| format!("ploop_{}", row.split(['`', '{']).next().unwrap()))
        .collect();
    assert_eq!(names, documented);
    backend.stop();
}
