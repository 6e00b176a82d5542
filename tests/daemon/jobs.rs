//! Jobs: long work on a disk that is being served.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use crate::common::img::{Ran, ploop_img_command};
use crate::common::qmp::Qmp;
use crate::common::{require_tool, tool};
use crate::control::{control, serve};
use crate::front_end::*;
use crate::grow::{Halt, create, rig_of};
use crate::stat::{Host, VARIABLE};
use crate::upgrade::upgrades;
use crate::{OK, Rig, start_front_end, wait_for};

const CLUSTER: u64 = 64 << 10;
const SECTORS: u64 = CLUSTER / 512;
const CLUSTERS: u64 = (64 << 20) / CLUSTER;

pub fn rig() -> Rig {
    let small = ["--cluster-size", "64K"];
    rig_of(|folder| Some(create(folder, "bundle", &small))).unwrap()
}

fn top(rig: &Rig) -> PathBuf {
    rig.image.join("root.hds")
}

/// Writes this byte to all of a cluster; zeros too, wherever there was something before.
fn fill(ring: &mut Ring, cluster: u64, byte: u8) {
    ring.fill(DATA, &[byte; CLUSTER as usize]);
    let data = [readable(DATA, CLUSTER as u32)];
    assert_eq!(ring.run(VIRTIO_BLK_T_OUT, cluster * SECTORS, &data).0, OK);
}

fn discard(ring: &mut Ring, cluster: u64) {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&(cluster * SECTORS).to_le_bytes());
    range[8..12].copy_from_slice(&(SECTORS as u32).to_le_bytes());
    ring.fill(DATA, &range);
    assert_eq!(
        ring.run(VIRTIO_BLK_T_DISCARD, 0, &[readable(DATA, 16)]).0,
        OK
    );
}

/// Of the clusters every third is zeros, every third discarded.
pub fn prepare(front_end: &mut FrontEnd) {
    let ring = &mut front_end.rings[0];
    for cluster in 0..CLUSTERS {
        fill(ring, cluster, 1 + (cluster % 200) as u8);
    }
    for cluster in 0..CLUSTERS {
        match cluster % 3 {
            1 => fill(ring, cluster, 0),
            2 => discard(ring, cluster),
            _ => {}
        }
    }
    assert_eq!(ring.run(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
}

pub fn expect_prepared(front_end: &mut FrontEnd) {
    let ring = &mut front_end.rings[0];
    for cluster in 0..CLUSTERS {
        let data = [writable(DATA, CLUSTER as u32)];
        assert_eq!(ring.run(VIRTIO_BLK_T_IN, cluster * SECTORS, &data).0, OK);
        let byte = match cluster % 3 {
            0 => 1 + (cluster % 200) as u8,
            _ => 0,
        };
        let found = ring.bytes(DATA, CLUSTER as usize);
        assert!(found.iter().all(|it| *it == byte), "cluster {cluster}");
    }
}

fn desc(answer: &Value) -> &str {
    answer["error"]["desc"].as_str().expect("it is an error")
}

pub fn jobs(qmp: &mut Qmp) -> Vec<Value> {
    let jobs = qmp.ask("query-jobs", json!({}));
    jobs.as_array().unwrap().clone()
}

/// The statuses that it comes to, up to this one.
pub fn statuses(qmp: &mut Qmp, last: &str) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        let event = qmp.event("JOB_STATUS_CHANGE");
        all.push(event["status"].as_str().unwrap().to_owned());
        if event["status"] == last {
            return all;
        }
    }
}

fn expect_sound(image: &Path) {
    crate::ploop_img(["check", image.to_str().unwrap()]).ok();
    if require_tool("qemu-img") {
        let file = image.join("root.hds");
        let args = ["check", "-f", "parallels", file.to_str().unwrap()];
        let checked = tool("qemu-img").args(args).output().unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }
}

#[test]
fn a_compaction_gives_back_zeros_gaps_and_the_end_of_the_file() {
    let rig = rig();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    let (mut qmp, mut other) = (Qmp::connect(&control(&rig)), Qmp::connect(&control(&rig)));
    let before = fs::metadata(top(&rig)).unwrap();
    assert_eq!(qmp.ask("compact", json!({})), json!({}));
    let expected = [
        "created",
        "running",
        "waiting",
        "pending",
        "concluded",
        "null",
    ];
    assert_eq!(statuses(&mut qmp, "null"), expected);
    let ended = other.event("BLOCK_JOB_COMPLETED");
    assert_eq!(
        (&ended["type"], &ended["device"]),
        (&json!("compact"), &json!("disk"))
    );
    assert_eq!(ended["len"], ended["offset"]);
    assert_eq!(jobs(&mut qmp), [] as [Value; 0]);
    let after = fs::metadata(top(&rig)).unwrap();
    // A third of the clusters has data.
    let needed = CLUSTERS / 3 * CLUSTER + 2 * CLUSTER;
    assert!(before.len() > CLUSTERS * CLUSTER && after.len() <= needed);
    assert!(after.blocks() * 512 <= needed, "{}", after.blocks());
    expect_prepared(&mut front_end);
    // It can be written to as before.
    prepare(&mut front_end);
    expect_prepared(&mut front_end);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image);
}

#[test]
fn a_compaction_leaves_what_queues_write_meanwhile() {
    let rig = rig();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    let ends = AtomicBool::new(false);
    let mut qmp = Qmp::connect(&control(&rig));
    let rounds = AtomicU64::new(0);
    let queues = front_end.rings.len();
    thread::scope(|scope| {
        for (index, ring) in (0_u64..).zip(&mut front_end.rings) {
            let (ends, rounds) = (&ends, &rounds);
            scope.spawn(move || {
                // Each has clusters of its own, and memory.
                let at = DATA + index * CLUSTER;
                let mine = || {
                    let mine = (index..CLUSTERS).step_by(queues);
                    mine.filter(|cluster| cluster % 5 != 0)
                };
                let mut bytes = vec![0_u8; 2048];
                for round in 1_u64.. {
                    for cluster in mine() {
                        let byte = (round + cluster) as u8;
                        ring.fill(at, &[byte; 4096]);
                        let sector = cluster * SECTORS + 8;
                        let data = [readable(at, 4096)];
                        if byte.is_multiple_of(7) {
                            ring.fill(at, &[0; 4096]);
                        }
                        assert_eq!(ring.run(VIRTIO_BLK_T_OUT, sector, &data).0, OK);
                        bytes[cluster as usize] = if byte.is_multiple_of(7) { 0 } else { byte };
                    }
                    rounds.fetch_add(1, SeqCst);
                    for cluster in mine() {
                        let data = [writable(at, 4096)];
                        let sector = cluster * SECTORS + 8;
                        assert_eq!(ring.run(VIRTIO_BLK_T_IN, sector, &data).0, OK);
                        let expected = bytes[cluster as usize];
                        let found = ring.bytes(at, 4096);
                        assert!(
                            found.iter().all(|it| *it == expected),
                            "cluster {cluster} in round {round}: {} for {expected}",
                            found[0]
                        );
                    }
                    if ends.load(SeqCst) {
                        break;
                    }
                }
            });
        }
        for _ in 0..3 {
            let seen = rounds.load(SeqCst);
            qmp.ask("compact", json!({ "guest-share": 20 }));
            statuses(&mut qmp, "null");
            wait_for("the queues to go on", || rounds.load(SeqCst) >= seen + 2);
        }
        ends.store(true, SeqCst);
    });
    // What nobody has written meanwhile.
    let ring = &mut front_end.rings[0];
    for cluster in (0..CLUSTERS).filter(|it| it % 15 == 0) {
        let data = [writable(DATA, CLUSTER as u32)];
        assert_eq!(ring.run(VIRTIO_BLK_T_IN, cluster * SECTORS, &data).0, OK);
        let byte = 1 + (cluster % 200) as u8;
        assert!(
            ring.bytes(DATA, CLUSTER as usize)
                .iter()
                .all(|it| *it == byte)
        );
    }
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image);
}

/// Begins one that takes its time.
pub fn begin_slowly(qmp: &mut Qmp, arguments: Value) {
    let mut slow = json!({ "job-id": "slow", "speed": 1, "auto-dismiss": false });
    for (name, value) in arguments.as_object().unwrap() {
        slow[name] = value.clone();
    }
    qmp.ask("compact", slow);
}

#[test]
fn a_job_is_paused_resumed_hurried_and_dismissed() {
    let rig = rig();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    begin_slowly(&mut qmp, json!({}));
    assert_eq!(statuses(&mut qmp, "running"), ["created", "running"]);
    let id = json!({ "id": "slow" });
    assert_eq!(qmp.ask("job-pause", id.clone()), json!({}));
    assert_eq!(statuses(&mut qmp, "paused"), ["paused"]);
    let info = &qmp.ask("query-block-jobs", json!({}))[0];
    assert_eq!(
        (&info["paused"], &info["speed"]),
        (&json!(true), &json!(1)),
        "{info}"
    );
    assert!(info["offset"].as_u64() < info["len"].as_u64(), "{info}");
    assert_eq!(
        desc(&qmp.answer("job-pause", id.clone())),
        "Job is already paused"
    );
    let refused = qmp.answer("job-complete", id.clone());
    let expected = "Job 'slow' in state 'paused' cannot accept command verb 'complete'";
    assert_eq!(desc(&refused), expected);
    // One thing at a time.
    let busy = "The disk is being compacted already";
    for (command, arguments) in [
        ("compact", json!({})),
        ("snapshot-create", json!({})),
        ("grow", json!({ "by": 1 << 20 })),
    ] {
        assert_eq!(desc(&qmp.answer(command, arguments)), busy);
    }
    assert_eq!(qmp.ask("snapshot-list", json!({}))[0]["current"], true);
    assert_eq!(qmp.ask("job-resume", id.clone()), json!({}));
    assert_eq!(statuses(&mut qmp, "running"), ["running"]);
    let speed = json!({ "device": "slow", "speed": 0 });
    assert_eq!(qmp.ask("block-job-set-speed", speed), json!({}));
    statuses(&mut qmp, "concluded");
    let job = &jobs(&mut qmp)[0];
    assert_eq!(
        (&job["status"], &job["type"]),
        (&json!("concluded"), &json!("compact"))
    );
    assert_eq!(job["current-progress"], job["total-progress"]);
    assert!(job["error"].is_null());
    assert_eq!(qmp.ask("job-dismiss", id), json!({}));
    assert_eq!(statuses(&mut qmp, "null"), ["null"]);
    expect_prepared(&mut front_end);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image);
}

#[test]
fn a_job_that_is_cancelled_says_so_and_leaves_the_disk_complete() {
    let rig = rig();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    begin_slowly(&mut qmp, json!({}));
    let id = json!({ "id": "slow" });
    assert_eq!(qmp.ask("job-cancel", id.clone()), json!({}));
    let ended = qmp.event("BLOCK_JOB_CANCELLED");
    assert!(ended["error"].is_null(), "{ended}");
    statuses(&mut qmp, "concluded");
    assert_eq!(jobs(&mut qmp)[0]["error"], "Operation canceled");
    qmp.ask("job-dismiss", id);
    expect_prepared(&mut front_end);
    // And another one.
    qmp.ask("compact", json!({}));
    statuses(&mut qmp, "null");
    expect_prepared(&mut front_end);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image);
}

/// Has one done whose client is to dismiss it.
fn compact_and_keep(qmp: &mut Qmp, id: &str) {
    qmp.ask("compact", json!({ "job-id": id, "auto-dismiss": false }));
    // It hears of those of others, too.
    let concluded = json!({ "id": id, "status": "concluded" });
    while qmp.event("JOB_STATUS_CHANGE") != concluded {}
}

#[test]
fn jobs_of_clients_that_have_hung_up_make_room_for_others() {
    let rig = rig();
    let backend = serve(&rig, &[]);
    let mut gone = Qmp::connect(&control(&rig));
    let mut qmp = Qmp::connect(&control(&rig));
    compact_and_keep(&mut qmp, "mine");
    for index in 1..16 {
        compact_and_keep(&mut gone, &format!("j{index}"));
    }
    let more = || json!({ "job-id": "more", "auto-dismiss": false });
    let refused = qmp.answer("compact", more());
    let expected = "There are 16 jobs that nobody has dismissed";
    assert_eq!(desc(&refused), expected);
    drop(gone);
    wait_for("the client to be gone", || {
        qmp.answer("compact", more())["error"].is_null()
    });
    let all = jobs(&mut qmp);
    assert_eq!(all.len(), 16);
    assert_eq!(
        (&all[0]["id"], &all[1]["id"]),
        (&json!("mine"), &json!("j2"))
    );
    backend.stop();
}

#[test]
fn the_end_of_the_program_calls_a_job_off() {
    let rig = rig();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    drop(front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    begin_slowly(&mut qmp, json!({}));
    backend.stop();
    let words = qmp.last_words();
    let has = |name: &str, data: Value| {
        let mut events = words.iter().filter(|word| word["event"] == name);
        let is_it = |event: &Value| {
            let mut members = data.as_object().unwrap().iter();
            members.all(|(name, value)| event["data"][name] == *value)
        };
        assert!(events.any(is_it), "{name} {data}: {words:?}");
    };
    has("BLOCK_JOB_CANCELLED", json!({ "device": "slow" }));
    has("JOB_STATUS_CHANGE", json!({ "status": "concluded" }));
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    expect_prepared(&mut front_end);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image);
}

#[test]
fn a_process_that_takes_over_calls_a_job_off() {
    let rig = rig();
    let option = format!("--upgrade-socket={}", upgrades(&rig).display());
    let backend = serve(&rig, &[&option]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    begin_slowly(&mut qmp, json!({}));
    let next = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    expect_prepared(&mut front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    assert_eq!(jobs(&mut qmp), [] as [Value; 0]);
    drop(front_end);
    next.stop();
    expect_sound(&rig.image);
}

#[test]
fn only_what_is_written_to_can_be_compacted() {
    let rig = rig();
    let backend = serve(&rig, &["--read-only"]);
    let mut qmp = Qmp::connect(&control(&rig));
    let answer = qmp.answer("compact", json!({}));
    assert_eq!(desc(&answer), "the disk is read-only");
    backend.stop();
}

fn host() -> Host {
    let mut host = Host::new();
    let small = ["--cluster-size", "64K"];
    host.rig.image = create(host.rig.folder.path(), "bundle", &small);
    host
}

fn compact_by_name(host: &Host) -> Command {
    let mut command = ploop_img_command();
    command.env(VARIABLE, &host.runtime).arg("compact");
    command.arg(&host.rig.image).stdin(Stdio::null());
    command
}

fn socket_of(host: &Host) -> PathBuf {
    let folders = fs::read_dir(&host.runtime).unwrap();
    let mut sockets = folders.map(|folder| folder.unwrap().path().join("control"));
    sockets
        .find(|socket| socket.exists())
        .expect("there is one")
}

#[test]
fn ploop_img_compacts_whether_the_disk_is_served_or_not() {
    let host = host();
    let backend = host.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    let said = Ran::from(compact_by_name(&host).output().unwrap()).ok();
    // Two thirds of 64 MiB, of which a third was discarded before.
    assert!(said.contains("given back"), "{said}");
    let after = fs::metadata(top(&host.rig)).unwrap();
    assert!(after.len() <= CLUSTERS / 3 * CLUSTER + 2 * CLUSTER);
    expect_prepared(&mut front_end);
    drop(front_end);
    backend.stop();
    let said = Ran::from(compact_by_name(&host).output().unwrap()).ok();
    assert!(said.contains("given back"), "{said}");
    expect_sound(&host.rig.image);
}

/// Has `ploop-img` compact the disk, and says what the job is called.
fn begin_compaction_by_name(host: &Host, qmp: &mut Qmp) -> (Child, String) {
    let child = compact_by_name(host)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("the job", || !jobs(qmp).is_empty());
    let name = jobs(qmp)[0]["id"].as_str().unwrap().to_owned();
    (child, name)
}

#[test]
fn who_interrupts_ploop_img_cancels_the_job() {
    let host = host();
    let backend = host.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    let mut qmp = Qmp::connect(&socket_of(&host));
    let halt = Halt::of(&backend);
    let (child, name) = begin_compaction_by_name(&host, &mut qmp);
    qmp.ask("block-job-set-speed", json!({ "device": name, "speed": 1 }));
    drop(halt);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("what was gained so far stays"), "{said}");
    assert_eq!(jobs(&mut qmp), [] as [Value; 0]);
    expect_prepared(&mut front_end);
    drop(front_end);
    backend.stop();
    expect_sound(&host.rig.image);
}

#[test]
fn ploop_img_knows_how_a_job_has_ended_that_somebody_else_dismisses() {
    let host = host();
    let backend = host.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    prepare(&mut front_end);
    let mut qmp = Qmp::connect(&socket_of(&host));
    let halt = Halt::of(&backend);
    let (child, name) = begin_compaction_by_name(&host, &mut qmp);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    drop(halt);
    statuses(&mut qmp, "concluded");
    qmp.ask("job-dismiss", json!({ "id": name }));
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    let said = Ran::from(child.wait_with_output().unwrap()).ok();
    assert!(said.contains("given back"), "{said}");
    drop(front_end);
    backend.stop();
}
