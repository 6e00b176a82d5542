//! The control socket: its clients, good and bad, while a disk is served.

use std::fs;
use std::io::{Read, Write};
use std::iter;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::backend::Backend;
use crate::common::qmp::Qmp;
use crate::front_end::*;
use crate::grow::Halt;
use crate::{IOERR, OK, Rig, descriptors, expect_service, start_front_end, wait_for};

pub fn control(rig: &Rig) -> PathBuf {
    rig.folder.path().join("control")
}

pub fn serve(rig: &Rig, options: &[&str]) -> Backend {
    let socket = format!("--control={}", control(rig).display());
    rig.serve(&[&[socket.as_str()], options].concat())
}

#[test]
fn the_disk_can_be_asked_and_told_to_end() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mode = fs::metadata(control(&rig)).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let mut qmp = Qmp::connect(&control(&rig));
    let status = qmp.ask("query-status", json!({}));
    assert_eq!(status, json!({ "status": "running", "running": true }));
    let block = &qmp.ask("query-block", json!({}))[0];
    assert_eq!(block["inserted"]["file"], rig.image.to_str().unwrap());
    assert_eq!(block["inserted"]["ro"], false);
    assert_eq!(block["inserted"]["image"]["virtual-size"], 64 << 20);
    assert_eq!(block["inserted"]["image"]["format"], "ploop");
    assert_eq!(
        qmp.ask("query-named-block-nodes", json!({}))[0]["drv"],
        "ploop"
    );
    let version = qmp.ask("query-version", json!({}));
    assert!(version["package"].as_str().unwrap().contains("ploop"));
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    // It is answered before the process ends.
    let status = qmp.ask("quit", json!({}));
    assert_eq!(status, json!({}));
    while qmp.hear().is_some() {}
    // By then all is closed.
    crate::ploop_img(["check", rig.image.to_str().unwrap()]).ok();
    drop(front_end);
    backend.ends();
    assert!(!control(&rig).exists());
}

#[test]
fn what_a_guest_does_is_counted() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let stats = |qmp: &mut Qmp| qmp.ask("query-blockstats", json!({}))[0]["stats"].clone();
    assert_eq!(stats(&mut qmp)["rd_operations"], 0);
    assert!(stats(&mut qmp)["idle_time_ns"].is_null());
    let mut front_end = start_front_end(backend.socket());
    let connected = qmp.event("FRONT_END_CONNECTED");
    assert_eq!(connected["pid"], std::process::id());
    // Of 64 MiB.
    let end = 64 << 11;
    let [first, second, ..] = &mut front_end.rings[..] else {
        panic!("there are several");
    };
    for sector in [8, 80] {
        let source = [readable(DATA, 4096)];
        assert_eq!(first.run(VIRTIO_BLK_T_OUT, sector, &source).0, OK);
        let target = [writable(DATA, 512)];
        assert_eq!(second.run(VIRTIO_BLK_T_IN, sector, &target).0, OK);
    }
    assert_eq!(first.run(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    let beyond = [writable(DATA, 512)];
    assert_eq!(second.run(VIRTIO_BLK_T_IN, end, &beyond).0, IOERR);
    let now = stats(&mut qmp);
    for (name, expected) in [
        ("wr_operations", 2),
        ("wr_bytes", 8192),
        ("rd_operations", 2),
        ("rd_bytes", 1024),
        ("flush_operations", 1),
        ("unmap_operations", 0),
        ("failed_rd_operations", 0),
        ("invalid_rd_operations", 1),
        ("wr_highest_offset", 80 * 512 + 4096),
    ] {
        assert_eq!(now[name], expected, "{name} in {now}");
    }
    assert!(now["wr_total_time_ns"].as_u64() > Some(1_000), "{now}");
    assert!(now["idle_time_ns"].as_u64() > Some(0), "{now}");
    let engine = qmp.ask("query-engine", json!({}));
    let queues = engine["queues"].as_array().unwrap();
    assert_eq!(queues.len(), usize::from(QUEUES));
    assert!(
        queues
            .iter()
            .all(|queue| queue["runs"] == true && queue["in-flight"] == 0)
    );
    assert_eq!(
        (&queues[0]["writes"], &queues[1]["reads"]),
        (&json!(2), &json!(2))
    );
    assert!(engine["syncs"].as_u64() > Some(0), "{engine}");
    drop(front_end);
    qmp.event("FRONT_END_GONE");
    // The numbers outlive the front-end.
    assert_eq!(stats(&mut qmp)["wr_operations"], 2);
    let engine = qmp.ask("query-engine", json!({}));
    assert_eq!(engine["queues"][0]["runs"], false);
    expect_service(&mut start_front_end(backend.socket()));
    assert_eq!(stats(&mut qmp)["wr_operations"], 3);
    backend.stop();
}

#[test]
fn the_file_is_told_of_when_it_is_used_behind_a_threshold() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let mut front_end = start_front_end(backend.socket());
    front_end.fill(DATA, &[7; 4096]);
    let ring = &mut front_end.rings[0];
    // Clusters of 1 MiB; the first one of the file is that of the BAT.
    let mut write = |cluster: u64, qmp: &mut Qmp| {
        let data = [readable(DATA, 4096)];
        assert_eq!(ring.run(VIRTIO_BLK_T_OUT, cluster << 11, &data).0, OK);
        qmp.ask("query-named-block-nodes", json!({}))[0]["write_threshold"].clone()
    };
    let set = |qmp: &mut Qmp, bytes: u64| {
        let arguments = json!({ "node-name": "disk", "write-threshold": bytes });
        assert_eq!(qmp.ask("block-set-write-threshold", arguments), json!({}));
    };
    assert_eq!(write(9, &mut qmp), 0);
    set(&mut qmp, 3 << 20);
    // The end of the second one is the threshold, and nothing is behind it.
    for cluster in [5, 5, 9] {
        assert_eq!(write(cluster, &mut qmp), 3 << 20);
    }
    assert_eq!(write(0, &mut qmp), 0);
    assert_eq!(
        qmp.event("BLOCK_WRITE_THRESHOLD"),
        json!({ "node-name": "disk", "write-threshold": 3 << 20, "amount-exceeded": 1 << 20 })
    );
    // Once.
    assert_eq!(write(1, &mut qmp), 0);
    // Used already: at once.
    set(&mut qmp, (5 << 20) - 1);
    assert_eq!(
        qmp.event("BLOCK_WRITE_THRESHOLD"),
        json!({ "node-name": "disk", "write-threshold": (5 << 20) - 1, "amount-exceeded": 1 })
    );
    set(&mut qmp, 5 << 20);
    assert_eq!(write(1, &mut qmp), 5 << 20);
    set(&mut qmp, 0);
    assert_eq!(write(2, &mut qmp), 0);
    set(&mut qmp, 6 << 20);
    drop(front_end);
    backend.stop();
    // What is in the file when it is opened counts, and not how long it is.
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    set(&mut qmp, 6 << 20);
    set(&mut qmp, (6 << 20) - 1);
    assert_eq!(
        qmp.event("BLOCK_WRITE_THRESHOLD"),
        json!({ "node-name": "disk", "write-threshold": (6 << 20) - 1, "amount-exceeded": 1 })
    );
    backend.stop();
}

#[test]
fn an_image_that_vanishes_is_told_of() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    fs::remove_file(&rig.image).unwrap();
    let gone = qmp.event("IMAGE_VANISHED");
    assert_eq!(
        gone,
        json!({ "file": rig.image.to_str().unwrap(), "how": "deleted" })
    );
    backend.stop();
}

/// What a client sends that means no good.
fn nonsense() -> Vec<Vec<u8>> {
    vec![
        b"{".repeat(1_000_000),
        b"[".repeat(100_000),
        b"1".repeat(1_000_000),
        [&b"{\"a\":\""[..], &b"x".repeat(1_000_000)].concat(),
        vec![0; 100_000],
        vec![0xff; 100_000],
        b"{\"execute\":\"\xc3\x28\xf0\x90\"}".to_vec(),
        b"{\"execute\": \"query-st".to_vec(),
        b"{} ".repeat(50_000),
        b"{\"execute\":\"qmp_capabilities\"}{\"execute\":1}{\"id\":[[[[]]]]}".to_vec(),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
    ]
}

#[test]
fn nonsense_is_answered_with_errors_and_disturbs_nobody() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut good = Qmp::connect(&control(&rig));
    let mut front_end = start_front_end(backend.socket());
    for bytes in nonsense() {
        let mut bad = UnixStream::connect(control(&rig)).unwrap();
        let reader = bad.try_clone().unwrap();
        let heard = thread::spawn(move || {
            let mut heard = Vec::new();
            let mut reader = reader;
            reader.set_read_timeout(Some(PATIENCE)).unwrap();
            // It may be hung up on while it sends.
            let _ = reader.read_to_end(&mut heard);
            heard
        });
        bad.write_all(&bytes).unwrap();
        bad.shutdown(Shutdown::Write).unwrap();
        let heard = heard.join().unwrap();
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(20)]).into_owned();
        let text = String::from_utf8(heard).expect("answers are ASCII");
        let lines: Vec<_> = text.split_terminator("\r\n").collect();
        assert!(lines[0].contains("\"QMP\""), "{start}: {text}");
        let is_error = |line: &&str| line.contains("\"error\"");
        if start.contains("qmp_capa") {
            assert!(!is_error(&lines[1]), "{text}");
            assert!(lines[2..].iter().all(is_error), "{text}");
        } else {
            assert!(lines[1..].iter().all(is_error), "{start}: {text}");
        }
        expect_service(&mut front_end);
        good.ask("query-status", json!({}));
    }
    backend.stop();
}

#[test]
fn clients_that_read_nothing_come_and_go_and_stay_too_many_disturb_nobody() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut good = Qmp::connect(&control(&rig));
    let mut front_end = start_front_end(backend.socket());
    // One that never reads, and asks as long as it is let.
    let mut deaf = UnixStream::connect(control(&rig)).unwrap();
    deaf.set_nonblocking(true).unwrap();
    deaf.write_all(b"{\"execute\":\"qmp_capabilities\"}")
        .unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        let _ = deaf.write(&b"{\"execute\":\"query-commands\"}".repeat(50));
        good.ask("query-status", json!({}));
    }
    expect_service(&mut front_end);
    let before = descriptors(backend.pid());
    for round in 0..200 {
        let mut client = UnixStream::connect(control(&rig)).unwrap();
        if round % 2 == 0 {
            let _ = client.write_all(b"{\"execute\":");
        }
    }
    let crowd: Vec<_> = (0..40)
        .map(|_| UnixStream::connect(control(&rig)).unwrap())
        .collect();
    good.ask("query-status", json!({}));
    wait_for("the line that says so", || {
        backend.log().contains("a control client is turned away")
    });
    expect_service(&mut front_end);
    drop(crowd);
    wait_for("their end", || descriptors(backend.pid()) <= before);
    Qmp::connect(&control(&rig)).ask("query-version", json!({}));
    backend.stop();
}

#[test]
fn clients_that_say_nothing_keep_no_other_out() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let connect = || Qmp::connect(&control(&rig));
    let mut first = connect();
    let mut busy = connect();
    let mut others: Vec<_> = (2..MAX_CLIENTS).map(|_| connect()).collect();
    wait_for("a place", || {
        busy.ask("query-status", json!({}));
        let mut newcomer = UnixStream::connect(control(&rig)).unwrap();
        newcomer.set_read_timeout(Some(PATIENCE)).unwrap();
        newcomer.read(&mut [0]).unwrap() > 0
    });
    assert_eq!(first.hear(), None, "it has been silent for longest");
    for other in &mut others {
        other.ask("query-status", json!({}));
    }
    backend.stop();
}

/// Reads what it is answered and throws it away, until the end.
fn read_all(mut socket: UnixStream) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 64 << 10];
        while matches!(socket.read(&mut buffer), Ok(1..)) {}
    })
}

#[test]
fn a_client_that_is_refused_one_thing_after_another_keeps_nobody_waiting() {
    let rig = Rig::new();
    let backend = serve(&rig, &["--read-only"]);
    let floods: Vec<_> = [
        json!({ "execute": "grow", "arguments": { "by": 512 } }),
        json!({ "execute": "block_resize", "arguments": { "device": "disk", "size": 512 } }),
        json!({ "execute": "query-status" }),
    ]
    .into_iter()
    .map(|command| {
        let command = command.to_string();
        let mut client = Qmp::connect(&control(&rig)).socket;
        let reader = read_all(client.try_clone().unwrap());
        let writer = thread::spawn(move || {
            // Sent faster than it can be looked at, and answered with less.
            let commands = format!("{command:4000}").repeat(10);
            while client.write_all(commands.as_bytes()).is_ok() {}
        });
        (reader, writer)
    })
    .collect();
    let mut other = Qmp::connect(&control(&rig));
    for _ in 0..20 {
        other.ask("query-status", json!({}));
    }
    expect_reads(&mut start_front_end(backend.socket()));
    backend.stop();
    for (reader, writer) in floods {
        reader.join().unwrap();
        writer.join().unwrap();
    }
}

/// What takes the main loop long enough that whoever asks has to wait for the next turn.
const FLOOD: usize = 1_200;

#[test]
fn a_client_that_asks_for_much_at_once_is_answered_to_the_end() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut client = Qmp::connect(&control(&rig));
    let mut socket = client.socket.try_clone().unwrap();
    let writer = thread::spawn(move || {
        let question = json!({ "execute": "query-named-block-nodes", "id": 1 });
        let all = question.to_string().repeat(FLOOD);
        socket.write_all(all.as_bytes()).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
    });
    let answers = iter::from_fn(|| client.hear()).filter(|answer| answer["return"].is_array());
    assert_eq!(answers.count(), FLOOD);
    writer.join().unwrap();
    backend.stop();
}

#[test]
fn clients_that_have_hung_up_before_their_next_turn_keep_nobody_out() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut clients: Vec<_> = stopped(&backend, || {
        let connect = |_| UnixStream::connect(control(&rig)).unwrap();
        (0..MAX_CLIENTS).map(connect).collect()
    });
    for client in &mut clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(client.read(&mut [0; 1 << 10]).unwrap() > 0, "it is greeted");
    }
    let question = json!({ "execute": "query-status" }).to_string();
    for client in &mut clients {
        // Refused, for want of an introduction, which costs no less.
        client.set_nonblocking(true).unwrap();
        let _ = client.write(question.repeat(1_000).as_bytes());
    }
    thread::sleep(Duration::from_millis(500));
    // Hung up on together: a place that is left free is not what is tried.
    stopped(&backend, || drop(clients));
    Qmp::connect(&control(&rig)).ask("query-status", json!({}));
    backend.stop();
}

fn expect_reads(front_end: &mut FrontEnd) {
    let target = [writable(DATA, 512)];
    assert_eq!(front_end.rings[0].run(VIRTIO_BLK_T_IN, 0, &target).0, OK);
}

#[test]
fn of_what_a_client_has_sent_a_little_is_done_at_a_time() {
    // Few enough that it can be told all answers without reading any.
    const MANY: usize = 150;
    for command in [
        json!({ "execute": "grow", "arguments": { "by": 512 } }),
        json!({ "execute": "block_resize", "arguments": { "device": "disk", "size": 512 } }),
        json!({ "execute": "query-status" }),
    ] {
        let rig = Rig::new();
        let backend = serve(&rig, &["--read-only"]);
        let [mut busy, mut other] = [(); 2].map(|()| Qmp::connect(&control(&rig)));
        stopped(&backend, || {
            let commands = command.to_string().repeat(MANY);
            busy.socket.write_all(commands.as_bytes()).unwrap();
            other.begin("quit", json!({}));
        });
        other.end("quit");
        backend.ends();
        let answered = busy.last_words().len();
        assert!((1..MANY).contains(&answered), "{command}: {answered}");
    }
}

/// Does something while the process does nothing: it finds it all there at once.
fn stopped<T>(backend: &Backend, act: impl FnOnce() -> T) -> T {
    let pid = Pid::from_raw(backend.pid().cast_signed()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    wait_for("its stop", || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", backend.pid())).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('T')
    });
    let done = act();
    kill_process(pid, Signal::CONT).unwrap();
    done
}

#[test]
fn who_says_all_at_once_is_heard() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let at_once = |command: Value| {
        let mut client = stopped(&backend, || {
            let mut client = UnixStream::connect(control(&rig)).unwrap();
            let all = format!("{}{command}", json!({ "execute": "qmp_capabilities" }));
            client.write_all(all.as_bytes()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            client
        });
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut heard = String::new();
        client.read_to_string(&mut heard).unwrap();
        let last = heard.lines().last().unwrap();
        serde_json::from_str::<Value>(last).unwrap()
    };
    let grown = at_once(json!({ "execute": "grow", "arguments": { "by": 1 << 20 } }));
    assert_eq!(grown["return"]["size"], 65 << 20, "{grown}");
    at_once(json!({ "execute": "quit" }));
    backend.ends();
}

/// Of the control socket.
const MAX_CLIENTS: usize = 16;

#[test]
fn who_takes_over_is_asked_at_the_same_place() {
    let rig = Rig::new();
    let upgrades = rig.folder.path().join("upgrade");
    let backend = serve(&rig, &[&format!("--upgrade-socket={}", upgrades.display())]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    let backend = backend.taken_over(&rig.image, &upgrades, &[]);
    assert_eq!(qmp.hear(), None, "its server has gone");
    expect_service(&mut front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    let stats = &qmp.ask("query-blockstats", json!({}))[0]["stats"];
    assert_eq!(stats["wr_operations"], 1, "{stats}");
    drop(front_end);
    backend.stop();
    assert!(!control(&rig).exists());
}

#[test]
fn questions_of_clients_that_have_hung_up_are_only_so_many() {
    let rig = crate::jobs::rig();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let sockets = || {
        let folder = format!("/proc/{}/fd", backend.pid());
        let links = fs::read_dir(folder).unwrap().map(|entry| {
            let link = fs::read_link(entry.unwrap().path());
            link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
        });
        links.filter(|is_socket| *is_socket).count()
    };
    let before = sockets();
    let halt = Halt::of(&backend);
    for _ in 0..16 {
        let mut gone = Qmp::connect(&control(&rig));
        gone.begin("snapshot-list", json!({}));
        drop(gone);
        wait_for("it to be gone", || sockets() == before);
    }
    for question in ["snapshot-list", "flush"] {
        let answer = qmp.answer(question, json!({}));
        let desc = answer["error"]["desc"].as_str().unwrap();
        assert!(desc.contains("16 questions"), "{desc}");
    }
    drop(halt);
    wait_for("the answers", || {
        qmp.answer("snapshot-list", json!({}))["error"].is_null()
    });
    qmp.ask("flush", json!({}));
    backend.stop();
}
