//! Clients, well-behaved and not, against a disk that is none.

use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZeroI32;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event_manager::EventSet;
use serde_json::{Value, json};

use super::client::{Client, ClientId, Stay};
use super::monitor::{IDLE, most_idle};
use super::*;
use crate::control::{Level, Subject};
use crate::device::{
    KindCounts, Latencies, LatencyBins, LimitsError, QueueReport, Statistics, Throttle,
    ThrottleLimits, Totals,
};
use crate::format::Sector;
use crate::peer::Peer;
use crate::ploop::{BitmapInfo, EngineReport};

/// A disk with a snapshot.
#[derive(Default)]
struct Fake {
    engine: EngineReport,
    statistics: Statistics,
    throttle: Throttle,
    write_threshold: AtomicU64,
}

impl Subject for Fake {
    fn levels(&self) -> Vec<Level> {
        let level = |name: &str, is_writable| Level {
            file: format!("/vz/{name}").into(),
            is_ploop: true,
            is_writable,
            is_direct: true,
            virtual_size: 1 << 30,
            actual_size: 12 << 20,
            cluster_size: 1 << 20,
        };
        vec![level("base.hds", false), level("top.hds", true)]
    }

    fn is_open(&self) -> bool {
        true
    }

    fn file_id(&self) -> String {
        "fe00-20d3".to_owned()
    }

    fn folder_id(&self) -> Option<String> {
        Some("fe00-1000".to_owned())
    }

    fn has_write_cache(&self) -> bool {
        true
    }

    fn totals(&self) -> Totals {
        let reads = KindCounts {
            operations: 3,
            bytes: 4096,
            ..KindCounts::default()
        };
        Totals {
            reads,
            idle_time_ns: Some(5),
            ..Totals::default()
        }
    }

    fn queues(&self) -> Vec<QueueReport> {
        vec![QueueReport {
            index: 1,
            runs: true,
            in_flight: 2,
            totals: self.totals(),
        }]
    }

    fn engine(&self) -> EngineReport {
        self.engine
    }

    fn latencies(&self) -> Latencies {
        self.statistics.latencies()
    }

    fn bins(&self) -> LatencyBins {
        self.statistics.bins()
    }

    fn ask_for_bins(&self, boundaries: [Option<Vec<u64>>; 3]) {
        self.statistics.ask_for_bins(boundaries);
    }

    fn give_up_bins(&self) {
        self.statistics.give_up_bins();
    }

    fn write_threshold(&self) -> u64 {
        self.write_threshold.load(Ordering::Relaxed)
    }

    fn set_write_threshold(&self, bytes: u64) {
        self.write_threshold.store(bytes, Ordering::Relaxed);
    }

    fn bitmaps(&self) -> Vec<BitmapInfo> {
        Vec::new()
    }

    fn limits(&self) -> ThrottleLimits {
        self.throttle.limits()
    }

    fn set_limits(&self, limits: ThrottleLimits) -> Result<(), LimitsError> {
        self.throttle.set(limits)
    }
}

/// All that is answered to this.
fn answers(session: &mut Session, input: &str, subject: &Fake) -> Vec<(Value, Wish)> {
    let mut input = input.as_bytes();
    let mut answers = Vec::new();
    while let Some((line, wish)) = session.answer_next(&mut input, subject) {
        let line = line.strip_suffix("\r\n").expect("it ends a line");
        assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        answers.push((serde_json::from_str(line).unwrap(), wish));
    }
    answers
}

fn ask(session: &mut Session, input: &str) -> Value {
    ask_of(session, input, &Fake::default())
}

fn ask_of(session: &mut Session, input: &str, subject: &Fake) -> Value {
    let mut answers = answers(session, input, subject);
    assert_eq!(answers.len(), 1, "{answers:?}");
    answers.remove(0).0
}

fn negotiated() -> Session {
    let mut session = Session::default();
    let answer = ask(&mut session, r#"{"execute":"qmp_capabilities"}"#);
    assert_eq!(answer, json!({ "return": {} }));
    session
}

#[test]
fn nothing_is_done_before_the_introduction() {
    let greeting: Value = serde_json::from_str(&Session::greeting()).unwrap();
    assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 10);
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    let mut session = Session::default();
    assert!(!session.hears_events());
    let refused = ask(&mut session, r#"{"execute":"quit","id":1}"#);
    assert_eq!(refused["error"]["class"], "CommandNotFound");
    assert_eq!(refused["id"], 1);
    let with = |enable: &str| {
        format!(r#"{{"execute":"qmp_capabilities","arguments":{{"enable":{enable}}}}}"#)
    };
    for odd in [r#"["oob"]"#, "[1]", "1"] {
        let refused = ask(&mut session, &with(odd));
        assert_eq!(refused["error"]["class"], "GenericError", "{refused}");
        assert!(!session.hears_events());
    }
    assert_eq!(ask(&mut session, &with("[]")), json!({ "return": {} }));
    assert!(session.hears_events());
    let again = ask(&mut session, &with("[]"));
    assert_eq!(again["error"]["class"], "CommandNotFound");
}

#[test]
fn unknown_commands_and_arguments_are_errors_with_the_clients_name_for_them() {
    let mut session = negotiated();
    let answer = ask(&mut session, r#"{"execute":"no-such","id":{"a":[1]}}"#);
    let expected = json!({
        "error": {
            "class": "CommandNotFound",
            "desc": "The command no-such has not been found",
        },
        "id": { "a": [1] },
    });
    assert_eq!(answer, expected);
    let commands = ask(&mut session, r#"{"execute":"query-commands"}"#);
    let names = commands["return"].as_array().unwrap().iter();
    for name in names.map(|command| command["name"].as_str().unwrap()) {
        // These have arguments that are missed first.
        let has_own = [
            "grow",
            "qmp_capabilities",
            "snapshot-delete",
            "snapshot-switch",
            "transaction",
        ];
        let has_own = has_own.contains(&name);
        if has_own || name.starts_with("block") || name.starts_with("job-") {
            continue;
        }
        let input = format!(r#"{{"execute":"{name}","arguments":{{"z":1}},"id":7}}"#);
        let found = answers(&mut session, &input, &Fake::default());
        let (answer, wish) = &found[0];
        assert_eq!(
            answer["error"]["desc"], "Parameter 'z' is unexpected",
            "{name}"
        );
        assert_eq!(answer["id"], 7);
        assert_eq!(*wish, Wish::Nothing, "{name}");
    }
}

#[test]
fn the_disk_is_described_in_qemus_shapes() {
    let mut session = negotiated();
    let block = &ask(&mut session, r#"{"execute":"query-block"}"#)["return"][0];
    assert_eq!(block["device"], "disk");
    assert_eq!(block["io-status"], "ok");
    let top = &block["inserted"];
    assert_eq!(top["file"], "/vz/top.hds");
    assert_eq!(top["backing_file"], "/vz/base.hds");
    assert_eq!(top["backing_file_depth"], 1);
    assert_eq!(top["image"]["virtual-size"], 1 << 30);
    let nodes = &ask(&mut session, r#"{"execute":"query-named-block-nodes"}"#)["return"];
    let names: Vec<_> = (0..2).map(|at| &nodes[at]["node-name"]).collect();
    assert_eq!(names, ["disk", "level-0"]);
    assert_eq!(
        (&nodes[0]["ro"], &nodes[1]["ro"]),
        (&json!(false), &json!(true))
    );
    let stats = &ask(&mut session, r#"{"execute":"query-blockstats"}"#)["return"][0];
    assert_eq!(stats["device"], "disk");
    assert_eq!(stats["stats"]["rd_bytes"], 4096);
    assert_eq!(stats["stats"]["idle_time_ns"], 5);
    let engine = &ask(&mut session, r#"{"execute":"query-engine"}"#)["return"];
    assert_eq!(engine["queues"][0]["in-flight"], 2);
    assert_eq!(engine["file-id"], "fe00-20d3");
    assert_eq!(engine["folder-id"], "fe00-1000");
}

/// The answer to a command with these arguments.
fn obey(session: &mut Session, fake: &Fake, command: &str, arguments: Value) -> Value {
    let request = json!({ "execute": command, "arguments": arguments });
    ask_of(session, &request.to_string(), fake)
}

#[test]
fn limits_are_set_and_shown_as_in_qemu() {
    let mut session = negotiated();
    let fake = Fake::default();
    let mut set = |arguments: Value| {
        let command = "block_set_io_throttle";
        let answer = obey(&mut session, &fake, command, arguments);
        answer["error"]["desc"].as_str().map(str::to_owned)
    };
    let with = |more: Value| {
        let mut arguments = json!({
            "id": "disk", "bps": 0, "bps_rd": 0, "bps_wr": 0,
            "iops": 100, "iops_rd": 0, "iops_wr": 0,
        });
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        arguments
    };
    let missing = set(json!({ "id": "disk", "bps": 0 }));
    assert_eq!(missing.as_deref(), Some("Parameter 'bps_rd' is missing"));
    for (more, expected) in [
        (json!({ "id": "x" }), "Device 'x' not found"),
        (json!({ "device": "disk" }), "Need exactly one"),
        (json!({ "iops_rd": 5 }), "at the same time"),
        (json!({ "iops_max": 50 }), "cannot be lower"),
        (json!({ "bps_max": 50 }), "require corresponding"),
        (json!({ "iops_max_length": 5 }), "without burst rate"),
        (
            json!({ "iops_max": 200, "iops_max_length": 0 }),
            "cannot be 0",
        ),
        (
            json!({ "iops": 0, "iops_size": 5 }),
            "requires an iops value",
        ),
        (
            json!({ "iops": 2_000_000_000_000_000_u64 }),
            "must be within",
        ),
        (json!({ "iops": -1 }), "negative"),
        (json!({ "group": "all" }), "Groups"),
        (json!({ "z": 1 }), "'z' is unexpected"),
    ] {
        let desc = set(with(more)).expect("it is refused");
        assert!(desc.contains(expected), "{desc}");
        assert_eq!(fake.limits(), ThrottleLimits::default());
    }
    assert_eq!(
        set(with(json!({ "iops_max": 500, "iops_max_length": 3 }))),
        None
    );
    let node =
        &ask_of(&mut session, r#"{"execute":"query-block"}"#, &fake)["return"][0]["inserted"];
    let shown = ["iops", "iops_max", "iops_max_length", "bps"].map(|name| node[name].as_u64());
    assert_eq!(shown, [Some(100), Some(500), Some(3), Some(0)]);
    assert!(node["bps_max"].is_null());
}

#[test]
fn a_write_threshold_is_of_a_file_that_grows() {
    let (mut session, fake) = (negotiated(), Fake::default());
    let mut set = |node: &str, bytes: Value| {
        let arguments = json!({ "node-name": node, "write-threshold": bytes });
        let answer = obey(&mut session, &fake, "block-set-write-threshold", arguments);
        let nodes = obey(&mut session, &fake, "query-named-block-nodes", json!({}));
        let shown = &nodes["return"];
        assert_eq!(shown[1]["write_threshold"], 0);
        let shown = shown[0]["write_threshold"].as_u64().unwrap();
        (answer["error"]["desc"].as_str().map(str::to_owned), shown)
    };
    assert_eq!(set("disk", json!(4097)), (None, 4097));
    for (node, bytes, why) in [
        ("x", json!(1), "Device 'x' not found"),
        ("level-0", json!(1), "Node 'level-0' is only read"),
        (
            "disk",
            json!(-1),
            "Parameter 'write-threshold' expects uint64",
        ),
        (
            "disk",
            json!(1e30),
            "Parameter 'write-threshold' expects uint64",
        ),
        (
            "disk",
            json!("1"),
            "Parameter 'write-threshold' expects uint64",
        ),
    ] {
        assert_eq!(set(node, bytes), (Some(why.to_owned()), 4097));
    }
    assert_eq!(set("disk", json!(u64::MAX)), (None, u64::MAX));
    assert_eq!(set("disk", json!(0)), (None, 0));
}

#[test]
fn what_is_to_be_resized_is_looked_up_and_sizes_are_checked_as_in_qemu() {
    let mut session = negotiated();
    let mut refused = |arguments: Value| {
        let answer = obey(&mut session, &Fake::default(), "block_resize", arguments);
        answer["error"]["desc"].as_str().unwrap().to_owned()
    };
    for (arguments, expected) in [
        (json!({ "device": "disk" }), "Parameter 'size' is missing"),
        (
            json!({ "size": 512 }),
            "Cannot find device='' nor node-name=''",
        ),
        (
            json!({ "device": "x", "node-name": "y", "size": 512 }),
            "Cannot find device='x' nor node-name='y'",
        ),
        (
            json!({ "node-name": "level-0", "size": 512 }),
            "Node 'level-0' is of a snapshot, which keeps its size",
        ),
        (
            json!({ "node-name": "level-1", "size": 512 }),
            "Cannot find device='' nor node-name='level-1'",
        ),
        (
            json!({ "device": "disk", "size": "5" }),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            json!({ "device": "disk", "size": 0.5 }),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            json!({ "device": "disk", "size": u64::MAX }),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            json!({ "device": "disk", "size": -512 }),
            "Parameter 'size' expects a >0 size",
        ),
        (
            json!({ "device": "disk", "size": 0 }),
            "Parameter 'size' expects a >0 size",
        ),
        (
            json!({ "device": "disk", "size": 513 }),
            "The size is no multiple of 512 bytes: 513",
        ),
        (
            json!({ "device": "disk", "size": 512, "z": 1 }),
            "Parameter 'z' is unexpected",
        ),
    ] {
        assert_eq!(refused(arguments), expected);
    }
}

#[test]
fn limits_are_changed_by_who_knows_no_others() {
    let mut session = negotiated();
    let fake = Fake::default();
    let mut throttle = |arguments: Value| obey(&mut session, &fake, "throttle", arguments);
    let none = throttle(json!({}))["return"].clone();
    assert_eq!(none.as_object().unwrap().len(), 19);
    assert_eq!(
        (&none["bps"], &none["iops_wr_max_length"]),
        (&json!(0), &json!(1))
    );
    assert_eq!(fake.throttle.new_limits(), None, "nothing was set");
    throttle(json!({ "iops": 500, "iops_max": 2000, "iops_max_length": 10 }));
    let all = throttle(json!({ "bps_rd": 7 }))["return"].clone();
    let expected = json!([500, 2000, 10, 7, 0]);
    assert_eq!(
        json!([
            all["iops"],
            all["iops_max"],
            all["iops_max_length"],
            all["bps_rd"],
            all["bps"]
        ]),
        expected
    );
    for (arguments, expected) in [
        (json!({ "iops_rd": 5 }), "at the same time"),
        (
            json!({ "iops_size": "x" }),
            "Invalid parameter type for 'iops_size'",
        ),
        (json!({ "iops": -1 }), "negative"),
        (json!({ "iops": 5, "id": "disk" }), "'id' is unexpected"),
    ] {
        let answer = throttle(arguments);
        let desc = answer["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(expected), "{desc}");
    }
    assert_eq!(
        throttle(json!({}))["return"],
        all,
        "what fails changes nothing"
    );
    assert_eq!(throttle(json!({ "iops": 0, "bps_rd": 0 }))["return"], none);
}

#[test]
fn a_resize_is_answered_when_it_is_over_and_nothing_else_before() {
    for name in [
        json!({ "device": "disk" }),
        json!({ "node-name": "disk" }),
        json!({ "device": "x", "node-name": "disk" }),
    ] {
        let mut session = negotiated();
        let mut arguments = name;
        arguments["size"] = (5 << 20).into();
        let resize = json!({ "execute": "block_resize", "arguments": arguments, "id": [7] });
        let input = format!("{resize} {}", json!({ "execute": "query-status", "id": 8 }));
        let mut rest = input.as_bytes();
        let fake = Fake::default();
        let wish = Wish::Resize(Sector(5 << 11));
        let begun = session.answer_next(&mut rest, &fake);
        assert_eq!(begun, Some((String::new(), wish)));
        assert!(session.awaits_answer());
        let len = rest.len();
        assert_eq!(session.answer_next(&mut rest, &fake), None);
        assert_eq!(rest.len(), len, "nothing is taken meanwhile");
        let answer = session.answer(Err(Failure::generic("no")));
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let error = json!({ "class": "GenericError", "desc": "no" });
        assert_eq!(answer, json!({ "error": error, "id": [7] }));
        assert!(!session.awaits_answer());
        assert_eq!(session.answer(Ok(json!({}))), "", "it was answered");
        let (next, wish) = session.answer_next(&mut rest, &fake).unwrap();
        assert!(next.contains("\"id\":8"), "{next}");
        assert_eq!(wish, Wish::Nothing);
    }
}

#[test]
fn a_disk_is_grown_by_as_much_as_is_asked_for() {
    let fake = Fake::default();
    for (by, expected) in [
        (json!(0), Wish::Grow(Sector(0))),
        (json!(3 << 10), Wish::Grow(Sector(6))),
        (json!(i64::MAX - 511), Wish::Grow(Sector((1 << 54) - 1))),
    ] {
        let mut session = negotiated();
        let request = json!({ "execute": "grow", "arguments": { "by": by } }).to_string();
        let begun = session.answer_next(&mut request.as_bytes(), &fake);
        assert_eq!(begun, Some((String::new(), expected)));
    }
    let mut session = negotiated();
    for (arguments, expected) in [
        (json!({}), "Parameter 'by' is missing"),
        (json!({ "by": -512 }), "Parameter 'by' is negative"),
        (json!({ "by": 513 }), "no multiple of 512"),
        (json!({ "by": 512, "size": 5 }), "'size' is unexpected"),
    ] {
        let answer = obey(&mut session, &fake, "grow", arguments);
        let desc = answer["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(expected), "{desc}");
    }
}

#[test]
fn latencies_are_counted_by_intervals_that_a_client_has_set() {
    let mut session = negotiated();
    let fake = Fake::default();
    let command = "block-latency-histogram-set";
    let mut set =
        |arguments: Value| obey(&mut session, &fake, command, arguments)["error"]["desc"].clone();
    for odd in [json!([0]), json!([5, 5]), json!([9, 3])] {
        for (name, kind) in [
            ("boundaries", "read"),
            ("boundaries-write", "write"),
            ("boundaries-flush", "flush"),
        ] {
            let refused = set(json!({ "id": "disk", name: odd }));
            assert_eq!(refused, format!("Device 'disk' set {kind} boundaries fail"));
        }
        let refused = set(json!({ "id": "disk", "boundaries-flush": [1], "boundaries-zap": odd }));
        assert_eq!(refused, "Device 'disk' set append write boundaries fail");
    }
    let boundaries = |fake: &Fake| {
        let LatencyBins {
            reads,
            writes,
            flushes,
        } = fake.bins();
        [reads, writes, flushes].map(|bins| bins.map(|bins| bins.boundaries))
    };
    let unset = [const { None }; 3];
    assert_eq!(boundaries(&fake), unset);
    assert!(
        set(json!({ "id": "disk", "boundaries": [10, 50], "boundaries-write": [7] })).is_null()
    );
    assert_eq!(
        boundaries(&fake),
        [Some(vec![10, 50]), Some(vec![7]), Some(vec![10, 50])]
    );
    assert!(set(json!({ "id": "disk", "boundaries-read": [] })).is_null());
    assert_eq!(
        boundaries(&fake),
        [Some(vec![]), Some(vec![7]), Some(vec![10, 50])]
    );
    let query = json!({ "execute": "query-blockstats" }).to_string();
    let stats = ask_of(&mut session, &query, &fake)["return"][0]["stats"].clone();
    let expected = json!({ "boundaries": [7], "bins": [0, 0] });
    assert_eq!(stats["wr_latency_histogram"], expected);
    let answer = obey(&mut session, &fake, command, json!({ "id": "disk" }));
    assert_eq!(answer, json!({ "return": {} }));
    assert_eq!(boundaries(&fake), unset);
    // As QEMU does it.
    let all = json!({ "id": "disk", "boundaries": [5] });
    obey(&mut session, &fake, command, all);
    let zap = json!({ "id": "disk", "boundaries-zap": [0] });
    let answer = obey(&mut session, &fake, command, zap);
    assert_eq!(answer, json!({ "return": {} }));
    assert_eq!(boundaries(&fake), unset);
}

#[test]
fn a_disk_that_waits_for_space_does_not_run() {
    let mut session = negotiated();
    let mut fake = Fake::default();
    let status = |session: &mut Session, fake: &Fake| {
        ask_of(session, r#"{"execute":"query-status"}"#, fake)["return"].clone()
    };
    let running = json!({ "status": "running", "running": true });
    assert_eq!(status(&mut session, &fake), running);
    // Where writes fail, the guest goes on.
    fake.engine.is_host_full = true;
    assert_eq!(status(&mut session, &fake), running);
    fake.engine.waits_for_space = true;
    let full = json!({ "status": "io-error", "running": false });
    assert_eq!(status(&mut session, &fake), full);
}

/// A client and its other end.
fn connected() -> (Client, UnixStream) {
    connected_by(1)
}

/// The same, with the number of the process at the other end.
fn connected_by(pid: i32) -> (Client, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    (Client::new(ours, ClientId(1), peer(pid)).unwrap(), theirs)
}

fn peer(pid: i32) -> Option<Peer> {
    let pid = NonZeroI32::new(pid);
    Some(Peer { pid, uid: 0 })
}

fn negotiate(client: &mut Client, theirs: &mut UnixStream) {
    theirs
        .write_all(br#"{"execute":"qmp_capabilities"}"#)
        .unwrap();
    assert_eq!(client.serve(&Fake::default()), (Stay::Stays, Wish::Nothing));
    let mut lines = BufReader::new(theirs).lines();
    assert!(lines.next().unwrap().unwrap().contains("QMP"));
    assert!(lines.next().unwrap().unwrap().contains("return"));
}

#[test]
fn a_client_hears_the_answer_to_quit_and_one_that_has_sent_all_goes() {
    let (mut client, mut theirs) = connected();
    negotiate(&mut client, &mut theirs);
    theirs
        .write_all(br#"{"execute":"quit","id":1} {"execute":"query-status"}"#)
        .unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.serve(&Fake::default()), (Stay::Stays, Wish::Quit));
    drop(client);
    let mut rest = String::new();
    theirs.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "{\"id\":1,\"return\":{}}\r\n");

    let (mut client, mut theirs) = connected();
    theirs.write_all(b"{").unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let start = Instant::now();
    while client.serve(&Fake::default()).0 == Stay::Stays {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

const RESIZE: &[u8] =
    br#"{"execute":"block_resize","arguments":{"device":"disk","size":1024},"id":1}"#;

#[test]
fn a_client_whose_resize_is_under_way_is_not_listened_to_and_may_go() {
    let fake = Fake::default();
    let (mut client, mut theirs) = connected();
    negotiate(&mut client, &mut theirs);
    theirs.write_all(RESIZE).unwrap();
    theirs.write_all(br#"{"execute":"quit","id":2}"#).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let wish = Wish::Resize(Sector(2));
    assert_eq!(client.serve(&fake), (Stay::Stays, wish.clone()));
    assert!(client.interest().is_empty());
    assert_eq!(client.serve(&fake), (Stay::Stays, Wish::Nothing));
    // Events may come before the answer.
    assert_eq!(client.tell("event\r\n"), Stay::Stays);
    assert_eq!(client.answer(Ok(json!({}))), Stay::Stays);
    assert_eq!(client.interest(), EventSet::OUT);
    assert_eq!(client.serve(&fake), (Stay::Stays, Wish::Quit));
    drop(client);
    let mut heard = String::new();
    theirs.read_to_string(&mut heard).unwrap();
    let expected = "event\r\n{\"id\":1,\"return\":{}}\r\n{\"id\":2,\"return\":{}}\r\n";
    assert_eq!(heard, expected);

    let (mut client, mut theirs) = connected();
    negotiate(&mut client, &mut theirs);
    theirs.write_all(RESIZE).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    // Before it hears the end, and after.
    assert_eq!(client.serve(&fake), (Stay::Stays, wish.clone()));
    assert_eq!(client.answer(Ok(json!({}))), Stay::Stays);
    assert_eq!(client.serve(&fake), (Stay::Goes, Wish::Nothing));

    let (mut client, mut theirs) = connected();
    negotiate(&mut client, &mut theirs);
    theirs.write_all(RESIZE).unwrap();
    assert_eq!(client.serve(&fake), (Stay::Stays, wish.clone()));
    theirs.write_all(br#"{"execute":"quit"}"#).unwrap();
    drop(theirs);
    // What it has asked for behind that is of no use to anybody.
    assert_eq!(client.serve(&fake), (Stay::Goes, Wish::Nothing));
}

#[test]
fn the_client_that_has_been_idle_for_longest_loses_its_place() {
    let mut pairs: Vec<_> = (0..4).map(|_| connected()).collect();
    for (client, theirs) in pairs.iter_mut().skip(1) {
        negotiate(client, theirs);
    }
    // The second one is heard last, and the third waits.
    pairs[2].1.write_all(RESIZE).unwrap();
    for at in [2, 3, 1] {
        let (client, theirs) = &mut pairs[at];
        if at != 2 {
            let question = br#"{"execute":"query-status"}"#;
            theirs.write_all(question).unwrap();
        }
        assert_eq!(client.serve(&Fake::default()).0, Stay::Stays);
    }
    pairs[0].0.serve(&Fake::default());
    let (mut clients, _theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let fds: Vec<_> = clients.iter().map(AsRawFd::as_raw_fd).collect();
    assert_eq!(
        most_idle(&clients, peer(1), Instant::now()),
        None,
        "none is yet"
    );
    let later = Instant::now() + IDLE;
    // First who has not introduced himself.
    let mut gone = Vec::new();
    while let Some(at) = most_idle(&clients, peer(1), later) {
        gone.push(clients.remove(at).as_raw_fd());
    }
    assert_eq!(gone, [fds[0], fds[3], fds[1]]);
    assert_eq!(clients.len(), 1, "one waits for an answer");
    clients[0].answer(Ok(json!({})));
    assert_eq!(
        most_idle(&clients, peer(1), later),
        None,
        "it was answered just now"
    );
    assert_eq!(most_idle(&clients, peer(1), Instant::now() + IDLE), Some(0));
}

const STATUS: &[u8] = br#"{"execute":"query-status"}"#;

#[test]
fn a_client_is_not_idle_while_something_is_to_be_done_for_it() {
    let is_idle = |client: &Client| client.idle_since().is_some();
    let (mut client, mut theirs) = connected();
    assert!(!is_idle(&client), "it is to be greeted");
    negotiate(&mut client, &mut theirs);
    assert!(is_idle(&client));
    theirs.write_all(STATUS).unwrap();
    assert!(!is_idle(&client), "it has sent something");
    client.serve(&Fake::default());
    assert!(is_idle(&client));
    // More than is done at a time.
    theirs.write_all(&STATUS.repeat(100)).unwrap();
    client.serve(&Fake::default());
    assert!(!is_idle(&client), "not all of it was done");
    assert_eq!(client.interest(), EventSet::OUT);
    client.serve(&Fake::default());
    assert!(is_idle(&client));
    assert_eq!(client.interest(), EventSet::IN);
    // More than it reads.
    let event = "x".repeat(64 << 10);
    while client.until().is_none() {
        client.tell(&event);
    }
    assert!(!is_idle(&client), "there is something to tell it");
    let mut told = vec![0; 1 << 20];
    while !is_idle(&client) {
        assert!(theirs.read(&mut told).unwrap() > 0);
        client.serve(&Fake::default());
    }
}

#[test]
fn only_what_is_complete_counts_as_heard() {
    let (mut client, mut theirs) = connected();
    negotiate(&mut client, &mut theirs);
    let since = client.idle_since().unwrap();
    for part in [&b"\r\n  "[..], b"{", b"\"execute\":"] {
        theirs.write_all(part).unwrap();
        assert_eq!(client.serve(&Fake::default()), (Stay::Stays, Wish::Nothing));
        assert_eq!(client.idle_since(), Some(since));
    }
    theirs.write_all(b"\"query-status\"}").unwrap();
    client.serve(&Fake::default());
    assert!(client.idle_since() > Some(since));
}

#[test]
fn a_process_that_forgets_its_connections_takes_no_place_of_others() {
    let (listener, leaking, late) = (1, 2, 3);
    let (mut clients, mut others) = (Vec::new(), Vec::new());
    let mut connect = |clients: &mut Vec<Client>, pid| {
        let (mut client, mut theirs) = connected_by(pid);
        negotiate(&mut client, &mut theirs);
        others.push(theirs);
        clients.push(client);
    };
    connect(&mut clients, listener);
    for _ in 0..3 {
        connect(&mut clients, leaking);
    }
    let later = Instant::now() + IDLE;
    let stays = |clients: &mut Vec<Client>, newcomer| {
        let at = most_idle(clients, peer(newcomer), later);
        at.is_none_or(|at| clients.remove(at).peer() == peer(leaking))
    };
    // Whoever comes, it has to make room itself.
    for newcomer in [leaking, late] {
        assert!(stays(&mut clients, newcomer));
        assert_eq!(
            clients
                .iter()
                .filter(|it| it.peer() == peer(leaking))
                .count(),
            2
        );
        connect(&mut clients, newcomer);
    }
    // Also while none but the listener is idle.
    clients.retain(|it| it.peer() == peer(listener));
    for _ in 0..3 {
        connect(&mut clients, leaking);
    }
    let now = clients[0].idle_since().unwrap() + IDLE;
    assert_eq!(most_idle(&clients, peer(leaking), now), None);
    assert_eq!(most_idle(&clients, peer(late), now), Some(0));
}

#[test]
fn a_client_that_never_reads_is_not_asked_for_more_and_then_hung_up_on() {
    let (mut client, mut theirs) = connected();
    negotiate(&mut client, &mut theirs);
    theirs.set_nonblocking(true).unwrap();
    let question = br#"{"execute":"query-commands"}"#.repeat(100);
    // Until nothing of it goes in any more.
    let mut turns = 0;
    while client.until().is_none() || client.interest().contains(EventSet::IN) {
        let _ = theirs.write(&question);
        assert_eq!(client.serve(&Fake::default()), (Stay::Stays, Wish::Nothing));
        turns += 1;
        assert!(turns < 100_000, "it is asked on and on");
    }
    assert_eq!(client.interest(), EventSet::OUT);
    assert!(client.until().is_some());
    // Events do not wait for it for ever.
    let event = "x".repeat(1000);
    let told = (0..100_000).take_while(|_| client.tell(&event) == Stay::Stays);
    let told = told.count() * event.len();
    assert!((500_000..2_000_000).contains(&told), "{told}");
}

#[test]
fn a_client_that_reads_late_misses_nothing() {
    let (mut client, mut theirs) = connected();
    negotiate(&mut client, &mut theirs);
    let (count, at_once) = (5_000, 250);
    let writer = std::thread::spawn({
        let mut theirs = theirs.try_clone().unwrap();
        move || {
            let ids: Vec<_> = (0..count).collect();
            for ids in ids.chunks(at_once) {
                let request = |id| format!(r#"{{"execute":"query-commands","id":{id}}}"#);
                let requests: String = ids.iter().map(request).collect();
                theirs.write_all(requests.as_bytes()).unwrap();
            }
        }
    });
    let reader = std::thread::spawn(move || {
        let mut lines = BufReader::new(theirs).lines();
        for id in 0..count {
            if id % 500 == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
            let line = lines.next().unwrap().unwrap();
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(answer["id"], id);
        }
    });
    // Until both of them have gone.
    while client.serve(&Fake::default()).0 == Stay::Stays {
        let something = !client.interest().is_empty();
        assert!(something, "it would be waited for in vain");
    }
    reader.join().unwrap();
    writer.join().unwrap();
}
