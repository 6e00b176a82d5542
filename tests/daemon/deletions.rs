//! Snapshots of disks that are being served are deleted.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::io::Errno;
use serde_json::{Value, json};
use vhost::VhostBackend;
use vhost_user_ploop::image::{self, Access, OpenMode};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::backend::Backend;
use crate::common::img::{Ran, names_in, ploop_img_command, qemu_img_check};
use crate::common::qmp::Qmp;
use crate::common::require_tool;
use crate::control::{control, serve};
use crate::death::{NEVER, begin, expect, reconnect, write};
use crate::front_end::*;
use crate::grow::{Halt, create, rig_of};
use crate::stat::{Host, VARIABLE};
use crate::upgrade::{Fake, GO, REFUSED, SERVING, relay_until, upgrades};
use crate::{OK, Rig, expect_service, start_front_end, wait_for};

pub const CREATE: &str = "snapshot-create";
pub const DELETE: &str = "snapshot-delete";
const QEMUS: &str = "blockdev-snapshot-delete-internal-sync";

pub const CLUSTER: u64 = 64 << 10;
pub const SECTORS: u64 = CLUSTER / 512;
/// Of the disk, so many are used.
pub const CLUSTERS: u64 = 128;

pub fn bundle() -> Rig {
    let small = ["--cluster-size", "64K"];
    rig_of(|folder| Some(create(folder, "bundle", &small))).unwrap()
}

pub fn host() -> Host {
    let mut host = Host::new();
    let small = ["--cluster-size", "64K"];
    host.rig.image = create(host.rig.folder.path(), "bundle", &small);
    host
}

pub fn ploop_img(host: &Host, args: &[&str]) -> Command {
    let mut command = ploop_img_command();
    command.env(VARIABLE, &host.runtime).args(args);
    command.stdin(Stdio::null());
    command
}

pub fn delete_by_name(host: &Host, guid: &str) -> Command {
    let image = host.rig.image.to_str().unwrap();
    ploop_img(host, &["snapshot", "delete", image, guid])
}

pub fn ran(mut command: Command) -> Ran {
    command.output().unwrap().into()
}

pub fn desc(answer: &Value) -> &str {
    answer["error"]["desc"].as_str().expect("it is an error")
}

pub fn take(qmp: &mut Qmp) -> String {
    let made = qmp.ask(CREATE, json!({}));
    made["guid"].as_str().unwrap().to_owned()
}

pub fn of(guid: &str) -> Value {
    json!({ "guid": guid })
}

/// The statuses that a job comes to, up to this one.
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

/// Has one deleted, which succeeds.
#[track_caller]
pub fn delete(qmp: &mut Qmp, guid: &str) {
    assert_eq!(qmp.ask(DELETE, of(guid)), json!({}));
    assert_eq!(qmp.event("SNAPSHOT_DELETED"), of(guid));
}

/// What a job that was begun so has come to: its error, if any.
pub fn end_of_job(qmp: &mut Qmp, command: &str, mut arguments: Value) -> Option<String> {
    arguments["job-id"] = "one".into();
    arguments["auto-dismiss"] = false.into();
    qmp.ask(command, arguments);
    let ended = json!({ "id": "one", "status": "concluded" });
    while qmp.event("JOB_STATUS_CHANGE") != ended {}
    let job = qmp.ask("query-jobs", json!({}))[0].clone();
    qmp.ask("job-dismiss", json!({ "id": "one" }));
    job["error"].as_str().map(str::to_owned)
}

pub fn list(image: &Path) -> Vec<Value> {
    let args = ["snapshot", "list", "--output=json", image.to_str().unwrap()];
    serde_json::from_str(&crate::ploop_img(args).ok()).unwrap()
}

pub fn images(bundle: &Path) -> Vec<PathBuf> {
    let names = names_in(bundle).into_iter();
    let images = names.filter(|name| name.contains(".hds"));
    images.map(|name| bundle.join(name)).collect()
}

/// All that is there is sound, and belongs to the disk.
#[track_caller]
pub fn expect_sound(bundle: &Path, snapshots: usize) {
    crate::ploop_img(["check", bundle.to_str().unwrap()]).ok();
    assert_eq!(list(bundle).len(), snapshots + 1);
    let images = images(bundle);
    assert_eq!(images.len(), snapshots + 1, "{images:?}");
    if require_tool("qemu-img") {
        images.iter().for_each(|image| qemu_img_check(image));
    }
}

/// Of files that the descriptor does not name `check` tells: they go. A base it does not remove.
pub fn remove_left_over(bundle: &Path) {
    crate::ploop_img(["check", "--repair", "leaks", bundle.to_str().unwrap()]).ok();
    let descriptor = fs::read_to_string(bundle.join("DiskDescriptor.xml")).unwrap();
    for image in images(bundle) {
        let name = image.file_name().unwrap().to_str().unwrap();
        if !descriptor.contains(&format!("{name}</File>")) {
            let checked = crate::ploop_img(["check", bundle.to_str().unwrap()]).stdout;
            assert!(checked.contains("not part of the disk"), "{checked}");
            fs::remove_file(image).unwrap();
        }
    }
}

/// Writes this byte to all of some clusters.
pub fn fill(ring: &mut Ring, clusters: impl Iterator<Item = u64>, byte: u8) {
    for cluster in clusters {
        ring.fill(DATA, &[byte; CLUSTER as usize]);
        let data = [readable(DATA, CLUSTER as u32)];
        assert_eq!(ring.run(VIRTIO_BLK_T_OUT, cluster * SECTORS, &data).0, OK);
    }
}

/// A disk with a snapshot of ones, and every third cluster twos since: the bytes of each cluster.
pub fn prepare(front_end: &mut FrontEnd, qmp: &mut Qmp) -> (String, impl Fn(u64) -> u8 + use<>) {
    fill(&mut front_end.rings[0], 0..CLUSTERS / 2, 1);
    let guid = take(qmp);
    fill(&mut front_end.rings[0], (0..CLUSTERS).step_by(3), 2);
    let byte = |cluster: u64| match cluster {
        _ if cluster.is_multiple_of(3) => 2,
        _ if cluster < CLUSTERS / 2 => 1,
        _ => 0,
    };
    (guid, byte)
}

#[track_caller]
pub fn expect_disk(front_end: &mut FrontEnd, byte: impl Fn(u64) -> u8) {
    let ring = &mut front_end.rings[0];
    for cluster in 0..CLUSTERS {
        let data = [writable(DATA, CLUSTER as u32)];
        assert_eq!(ring.run(VIRTIO_BLK_T_IN, cluster * SECTORS, &data).0, OK);
        let (found, byte) = (ring.bytes(DATA, CLUSTER as usize), byte(cluster));
        assert!(found.iter().all(|it| *it == byte), "cluster {cluster}");
    }
}

/// What a snapshot, or the disk, holds now.
pub fn content(rig: &Rig, guid: Option<&str>) -> Vec<u8> {
    let raw = rig.folder.path().join("raw");
    let mut args = vec!["convert", "-O", "raw"];
    args.extend(guid.iter().flat_map(|guid| ["--snapshot", *guid]));
    let mut command = ploop_img_command();
    command.args(args).arg(&rig.image).arg(&raw);
    ran(command).ok();
    let disk = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    disk
}

/// How often each queue has written all of its clusters.
pub type Rounds = [AtomicU64; 2];

/// Has this done while two queues write parts of clusters, of which the rest has to come from
/// below, and compare all that they read. The first 64 clusters were never written before.
pub fn while_writing(front_end: &mut FrontEnd, act: impl FnOnce(&Rounds) + Send) {
    let ends = AtomicBool::new(false);
    let rounds: Rounds = Default::default();
    thread::scope(|scope| {
        for ((index, ring), rounds) in (0_u64..).zip(&mut front_end.rings).zip(&rounds) {
            let ends = &ends;
            scope.spawn(move || {
                // Each has clusters of its own, and memory.
                let at = DATA + index * CLUSTER;
                for round in 1_u64.. {
                    let byte = round as u8;
                    for cluster in (index..64).step_by(2) {
                        let sector = cluster * SECTORS + (round % 16) * 8;
                        ring.fill(at, &[byte; 4096]);
                        let data = [readable(at, 4096)];
                        assert_eq!(ring.run(VIRTIO_BLK_T_OUT, sector, &data).0, OK);
                    }
                    rounds.store(round, SeqCst);
                    for cluster in (index..64).step_by(2) {
                        let data = [writable(at, CLUSTER as u32)];
                        let sector = cluster * SECTORS;
                        assert_eq!(ring.run(VIRTIO_BLK_T_IN, sector, &data).0, OK);
                        let found = ring.bytes(at, CLUSTER as usize);
                        for block in 0..16_u64 {
                            // The last round in which it was written.
                            let age = (round + 16 - block) % 16;
                            let byte = round.saturating_sub(age) as u8;
                            let found = &found[block as usize * 4096..][..4096];
                            assert!(
                                found.iter().all(|it| *it == byte),
                                "cluster {cluster}, block {block} in round {round}: {}",
                                found[0]
                            );
                        }
                    }
                    if ends.load(SeqCst) {
                        break;
                    }
                }
            });
        }
        let rounds = &rounds;
        let acted = scope.spawn(move || act(rounds)).join();
        ends.store(true, SeqCst);
        acted.unwrap();
    });
}

/// Each queue writes all of its clusters twice.
pub fn wait_for_writes(rounds: &Rounds) {
    let seen = rounds.each_ref().map(|it| it.load(SeqCst));
    wait_for("writes", || {
        let now = rounds.each_ref().map(|it| it.load(SeqCst));
        now.iter().zip(seen).all(|(now, seen)| *now >= seen + 2)
    });
}

#[test]
fn the_snapshot_below_the_top_goes_while_all_queues_write() {
    let host = host();
    let backend = host.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    while_writing(&mut front_end, |rounds| {
        for turn in 0..6 {
            let image = host.rig.image.to_str().unwrap();
            let name = format!("turn {turn}");
            let create = ["snapshot", "create", "--description", &name, image];
            let guid = ran(ploop_img(&host, &create)).ok();
            wait_for_writes(rounds);
            // Also when all files are others than at the start.
            let said = match turn % 2 {
                0 => ran(delete_by_name(&host, guid.trim())).ok(),
                _ => ran(ploop_img(&host, &["snapshot", "-d", &name, image])).ok(),
            };
            assert_eq!(said, "", "as off line");
            assert_eq!(images(&host.rig.image).len(), 1);
        }
    });
    drop(front_end);
    backend.stop();
    expect_sound(&host.rig.image, 0);
}

#[test]
fn a_level_that_has_gone_is_gone_for_all_who_ask() {
    let rig = bundle();
    let metrics = format!(
        "--metrics=unix:{}",
        rig.folder.path().join("metrics").display()
    );
    let backend = serve(&rig, &[&metrics]);
    let mut front_end = start_front_end(backend.socket());
    let (mut qmp, mut other) = (Qmp::connect(&control(&rig)), Qmp::connect(&control(&rig)));
    let (first, byte) = prepare(&mut front_end, &mut qmp);
    let second = take(&mut qmp);
    fill(&mut front_end.rings[0], 0..1, 3);
    let nodes = |qmp: &mut Qmp| -> Vec<String> {
        let nodes = qmp.ask("query-named-block-nodes", json!({}));
        let name = |node: &Value| node["node-name"].as_str().unwrap().to_owned();
        nodes.as_array().unwrap().iter().map(name).collect()
    };
    assert_eq!(nodes(&mut qmp), ["disk", "level-1", "level-0"]);
    let gone = list(&rig.image)[1]["filename"].as_str().unwrap().to_owned();
    let open = File::open(&gone).unwrap();
    assert!(open.metadata().unwrap().blocks() > 0);
    assert_eq!(qmp.ask(DELETE, of(&second)), json!({}));
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
    assert_eq!(ended["type"], "snapshot-delete");
    assert_eq!(other.event("SNAPSHOT_DELETED"), of(&second));
    assert_eq!(qmp.event("SNAPSHOT_DELETED"), of(&second));
    assert_eq!(nodes(&mut qmp), ["disk", "level-0"]);
    let all = qmp.ask("query-named-block-nodes", json!({}));
    assert!(!all.to_string().contains(&gone), "{all}");
    assert!(!Path::new(&gone).exists());
    // Little by little, by another thread.
    wait_for("its space", || open.metadata().unwrap().blocks() == 0);
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    assert_eq!(
        qmp.ask("snapshot-list", json!({}))
            .as_array()
            .unwrap()
            .len(),
        2
    );
    // No more than a moment later: the next look at the files finds nothing wrong.
    delete(&mut qmp, &first);
    assert_eq!(nodes(&mut qmp), ["disk"]);
    fill(&mut front_end.rings[0], 1..2, 4);
    let byte = |cluster: u64| match cluster {
        0 => 3,
        1 => 4,
        _ => byte(cluster),
    };
    expect_disk(&mut front_end, byte);
    thread::sleep(std::time::Duration::from_secs(6));
    let log = backend.log();
    assert!(!log.contains("has been deleted while"), "{log}");
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 0);
    let backend = serve(&rig, &[]);
    expect_disk(&mut start_front_end(backend.socket()), byte);
    backend.stop();
}

#[test]
fn clients_learn_what_keeps_a_snapshot_from_being_deleted() {
    let host = host();
    let rig = &host.rig;
    let image = rig.image.to_str().unwrap();
    // Another branch: a tip that nothing lies on, on what the disk lies on as well.
    let off_line = |args: &[&str]| ran(ploop_img(&host, args)).ok().trim().to_owned();
    let base = off_line(&["snapshot", "create", image]);
    let tip = off_line(&["snapshot", "create", image]);
    off_line(&["snapshot", "switch", image, &base]);
    let backend = serve(rig, &[]);
    let mut qmp = Qmp::connect(&control(rig));
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let own = take(&mut qmp);
    let upper = take(&mut qmp);
    let top = list(&rig.image)
        .into_iter()
        .find(|it| it["current"] == true);
    let top = top.unwrap()["guid"].as_str().unwrap().to_owned();
    let stranger = "{11111111-2222-3333-4444-555555555555}";
    for (guid, why) in [
        (stranger, "there is no snapshot"),
        (&*top, "is the top"),
        (&*base, "2 snapshots lie on"),
    ] {
        let ended = end_of_job(&mut qmp, DELETE, of(guid));
        assert!(
            ended.as_ref().is_some_and(|it| it.contains(why)),
            "{ended:?}"
        );
    }
    assert_eq!(list(&rig.image).len(), 5, "{}", backend.log());
    for (arguments, why) in [
        (json!({}), "Parameter 'guid' is missing"),
        (json!({ "guid": "x" }), "Parameter 'guid' expects a GUID: x"),
        (
            json!({ "guid": own, "z": 1 }),
            "Parameter 'z' is unexpected",
        ),
        (json!({ "guid": own, "speed": -1 }), "non-negative"),
    ] {
        let answer = qmp.answer(DELETE, arguments);
        assert!(desc(&answer).contains(why), "{answer}");
    }
    let said = {
        let mut command = delete_by_name(&host, &base);
        command.arg("--control").arg(control(rig));
        ran(command).fails()
    };
    assert!(said.contains("2 snapshots lie on"), "{said}");
    // The tip of the other branch, unless somebody reads it.
    let reader = Backend::start(
        &rig.image,
        &rig.folder.path().join("reader"),
        &["--snapshot", &*tip],
    );
    let ended = end_of_job(&mut qmp, DELETE, of(&tip)).unwrap();
    assert!(ended.contains("has the image open"), "{ended}");
    reader.stop();
    delete(&mut qmp, &tip);
    let answer = qmp.answer("query-named-block-nodes", json!({}));
    assert_eq!(answer["return"].as_array().unwrap().len(), 4, "{answer}");
    // Then what is left is a chain, and goes from the top down.
    for guid in [&upper, &own, &base] {
        delete(&mut qmp, guid);
    }
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 0);
    // Where there are none.
    let bare = Rig::new();
    let backend = serve(&bare, &[]);
    let mut qmp = Qmp::connect(&control(&bare));
    let ended = end_of_job(&mut qmp, DELETE, of(&own)).unwrap();
    assert!(ended.contains("a bare image has no snapshots"), "{ended}");
    backend.stop();
    let backend = serve(rig, &["--read-only"]);
    let answer = Qmp::connect(&control(rig)).answer(DELETE, of(&own));
    assert!(desc(&answer).contains("read-only"), "{answer}");
    backend.stop();
}

/// What a QEMU that was asked the same says is compared in `like_qemu.rs`.
#[test]
fn a_client_of_qemu_deletes_by_name_and_waits_for_the_end() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let mut other = Qmp::connect(&control(&rig));
    let mut front_end = start_front_end(backend.socket());
    fill(&mut front_end.rings[0], 0..4, 1);
    let make = |qmp: &mut Qmp, name: &str| {
        let arguments = json!({ "device": "disk", "name": name });
        qmp.ask("blockdev-snapshot-internal-sync", arguments);
    };
    make(&mut qmp, "one");
    make(&mut qmp, "two");
    let named = |name: &str| json!({ "device": "disk", "name": name });
    let does_not_exist = |id: &str, name: &str| {
        format!("Snapshot with id '{id}' and name '{name}' does not exist on device 'disk'")
    };
    for (arguments, why) in [
        (
            json!({ "device": "disk" }),
            "Name or id must be provided".to_owned(),
        ),
        (
            json!({ "device": "x", "name": "one" }),
            "Cannot find device='x' nor node-name='x'".to_owned(),
        ),
        (named("three"), does_not_exist("null", "three")),
        (
            json!({ "device": "disk", "id": "1" }),
            does_not_exist("1", "null"),
        ),
    ] {
        assert_eq!(desc(&qmp.answer(QEMUS, arguments)), why);
    }
    // Both have to be its own.
    let shown = list(&rig.image);
    let id = |at: usize| shown[at]["guid"].as_str().unwrap();
    let mixed = json!({ "device": "disk", "name": "two", "id": id(0) });
    assert_eq!(
        desc(&qmp.answer(QEMUS, mixed)),
        does_not_exist(id(0), "two")
    );
    let info = qmp.ask(QEMUS, named("two"));
    assert_eq!(
        (&info["name"], &info["id"]),
        (&json!("two"), &json!(id(1))),
        "{info}"
    );
    assert!(info["date-sec"].as_i64() > Some(1_500_000_000), "{info}");
    assert_eq!(images(&rig.image).len(), 2, "it is done");
    assert_eq!(other.event("SNAPSHOT_DELETED"), of(id(1)));
    // Meanwhile the disk is not changed otherwise.
    let halt = Halt::of_thread(&backend, "md");
    qmp.begin(QEMUS, json!({ "device": "disk", "id": id(0) }));
    let busy = "A snapshot of the disk is being deleted already";
    // Not by a command that would begin something if it came first.
    wait_for("its beginning", || {
        other.ask("query-jobs", json!({})) != json!([])
    });
    assert_eq!(
        desc(&other.answer("compact", json!({ "job-id": "x" }))),
        busy
    );
    assert_eq!(desc(&other.answer(CREATE, json!({}))), busy);
    // Others can see it, and stop it.
    let job = other.ask("query-jobs", json!({}))[0].clone();
    assert_eq!(
        (&job["id"], &job["type"]),
        (&json!("#snapshot-delete"), &json!("snapshot-delete"))
    );
    let busy = other.answer(
        DELETE,
        json!({ "guid": id(0), "job-id": "#snapshot-delete" }),
    );
    assert_eq!(
        desc(&busy),
        "A snapshot of the disk is being deleted already"
    );
    other.ask("job-cancel", json!({ "id": "#snapshot-delete" }));
    drop(halt);
    assert_eq!(desc(&qmp.end(QEMUS)), "Operation canceled");
    assert_eq!(
        other.event("BLOCK_JOB_CANCELLED")["device"],
        "#snapshot-delete"
    );
    assert_eq!(other.ask("query-jobs", json!({})), json!([]));
    let unasked = other.answer(
        DELETE,
        json!({ "guid": id(0), "job-id": "#snapshot-delete" }),
    );
    assert_eq!(desc(&unasked), "Invalid job ID '#snapshot-delete'");
    assert_eq!(
        qmp.ask(QEMUS, json!({ "device": "disk", "id": id(0) }))["id"],
        id(0)
    );
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 0);
}

#[test]
fn a_deletion_is_paused_hurried_and_cancelled_and_the_snapshot_stays() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    fill(&mut front_end.rings[0], 0..CLUSTERS / 2, 1);
    let half = (CLUSTERS / 2 * CLUSTER) as usize;
    let is_first = |disk: &[u8]| {
        let (ones, rest) = disk.split_at(half);
        ones.iter().all(|it| *it == 1) && rest.iter().all(|it| *it == 0)
    };
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    let slow = |id: &str| json!({ "guid": guid, "job-id": id, "speed": 1, "auto-dismiss": false });
    qmp.ask(DELETE, slow("a"));
    let id = json!({ "id": "a" });
    statuses(&mut qmp, "running");
    // It gets as far as its first bytes, and no further: more than a cluster it may not copy.
    wait_for("a step", || {
        qmp.ask("query-jobs", json!({}))[0]["current-progress"].as_u64() > Some(0)
    });
    qmp.ask("job-pause", id.clone());
    statuses(&mut qmp, "paused");
    let job = &qmp.ask("query-block-jobs", json!({}))[0];
    assert_eq!(
        (&job["type"], &job["paused"]),
        (&json!("snapshot-delete"), &json!(true))
    );
    assert!(job["offset"].as_u64() < job["len"].as_u64(), "{job}");
    expect_disk(&mut front_end, &byte);
    assert!(is_first(&content(&rig, Some(&guid))), "it reads as ever");
    qmp.ask("job-cancel", id.clone());
    statuses(&mut qmp, "concluded");
    assert_eq!(
        qmp.ask("query-jobs", json!({}))[0]["error"],
        "Operation canceled"
    );
    qmp.ask("job-dismiss", id);
    assert!(is_first(&content(&rig, Some(&guid))), "it is there");
    expect_disk(&mut front_end, &byte);
    // And then it goes.
    qmp.ask(DELETE, slow("b"));
    qmp.ask("block-job-set-speed", json!({ "device": "b", "speed": 0 }));
    statuses(&mut qmp, "concluded");
    let job = &qmp.ask("query-jobs", json!({}))[0];
    assert_eq!(job["current-progress"], job["total-progress"]);
    assert!(job["error"].is_null(), "{job}");
    expect_disk(&mut front_end, &byte);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 0);
}

#[test]
fn who_interrupts_ploop_img_keeps_the_snapshot() {
    let host = host();
    let control = format!("--control={}", control(&host.rig).display());
    let backend = host.serve(&[&control]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&crate::control::control(&host.rig));
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    let halt = Halt::of(&backend);
    let mut command = delete_by_name(&host, &guid);
    command.args([control.as_str(), "--progress"]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let child: Child = child.unwrap();
    wait_for("the job", || qmp.ask("query-jobs", json!({})) != json!([]));
    let name = qmp.ask("query-jobs", json!({}))[0]["id"].clone();
    qmp.ask("block-job-set-speed", json!({ "device": name, "speed": 1 }));
    drop(halt);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("interrupted; the snapshot stays"), "{said}");
    assert_eq!(qmp.ask("query-jobs", json!({})), json!([]));
    assert_eq!(list(&host.rig.image).len(), 2);
    expect_disk(&mut front_end, &byte);
    let mut command = delete_by_name(&host, &guid);
    command.args([control.as_str(), "--progress"]);
    ran(command).ok();
    expect_disk(&mut front_end, &byte);
    drop(front_end);
    backend.stop();
    expect_sound(&host.rig.image, 0);
}

#[test]
fn another_process_takes_over_what_is_left_of_the_chain() {
    let rig = bundle();
    let socket = format!("--upgrade-socket={}", upgrades(&rig).display());
    let mut backend = serve(&rig, &[&socket]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    let upper = take(&mut qmp);
    delete(&mut qmp, &upper);
    backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    expect_disk(&mut front_end, &byte);
    let mut qmp = Qmp::connect(&control(&rig));
    delete(&mut qmp, &guid);
    // One that fails when it has the image: this one opens again what it has by now.
    let upper = take(&mut qmp);
    let next = take(&mut qmp);
    fill(&mut front_end.rings[0], 4..5, 8);
    let byte = |cluster: u64| if cluster == 4 { 8 } else { byte(cluster) };
    delete(&mut qmp, &next);
    let chain = list(&rig.image);
    let files: Vec<PathBuf> = chain
        .iter()
        .map(|level| level["filename"].as_str().unwrap().into())
        .collect();
    assert_eq!(files.len(), 2);
    let mut failing = Fake::connect(&rig);
    failing.come_to_with(&files, "bundle", GO);
    drop(failing);
    expect_disk(&mut front_end, byte);
    delete(&mut qmp, &upper);
    expect_disk(&mut front_end, byte);
    // A deletion that is under way is called off.
    let guid = take(&mut qmp);
    fill(&mut front_end.rings[0], 3..4, 9);
    let byte = |cluster: u64| if cluster == 3 { 9 } else { byte(cluster) };
    qmp.ask(DELETE, json!({ "guid": guid, "speed": 1 }));
    let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    expect_disk(&mut front_end, byte);
    let mut qmp = Qmp::connect(&control(&rig));
    assert_eq!(qmp.ask("query-jobs", json!({})), json!([]));
    assert_eq!(list(&rig.image).len(), 2);
    delete(&mut qmp, &guid);
    expect_disk(&mut front_end, byte);
    drop(front_end);
    backend.stop();
    // What a process has ready for the next writes may be in a level that it handed over.
    expect_sound(&rig.image, 0);
}

#[test]
fn a_process_that_came_before_a_deletion_does_not_take_over_after_it() {
    let rig = bundle();
    let socket = format!("--upgrade-socket={}", upgrades(&rig).display());
    let backend = serve(&rig, &[&socket]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    // One that has opened the image, perhaps, and says so later.
    let upper = take(&mut qmp);
    let mut early = Fake::connect(&rig);
    wait_for("its coming", || {
        backend.log().contains("is about to take over")
    });
    delete(&mut qmp, &upper);
    let (kind, why) = early.hear().expect("it is told");
    let why = String::from_utf8_lossy(&why);
    assert_eq!(kind, REFUSED, "{why}");
    assert!(why.contains("start it again"), "{why}");
    drop(early);
    let halt = Halt::of(&backend);
    qmp.ask(DELETE, of(&guid));
    // Let the deletion begin before the other one is ready, which looks at the old chain.
    let successor = backend.spawn_successor(&rig.image, &upgrades(&rig), &[]);
    wait_for("its coming", || {
        backend.log().matches("is about to take over").count() == 2
    });
    drop(halt);
    let (backend, _) = backend.settle_with(successor);
    expect_disk(&mut front_end, &byte);
    let mut qmp = Qmp::connect(&control(&rig));
    if list(&rig.image).len() == 2 {
        delete(&mut qmp, &guid);
    }
    expect_disk(&mut front_end, &byte);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 0);
}

/// Of the disk it has opened nothing has changed, so it takes over.
#[test]
fn a_process_that_came_before_a_branch_went_can_change_the_disk() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let (stays, goes) = (take(&mut qmp), take(&mut qmp));
    backend.stop();
    let path = rig.image.to_str().unwrap();
    crate::ploop_img(["snapshot", "switch", path, &stays]).ok();
    let socket = format!("--upgrade-socket={}", upgrades(&rig).display());
    let backend = serve(&rig, &[&socket]);
    let at = rig.folder.path().join("relay");
    let listener = UnixListener::bind(&at).unwrap();
    let successor = backend.spawn_successor(&rig.image, &at, &[]);
    // By now it has read the descriptor.
    let (theirs, _) = listener.accept().unwrap();
    delete(&mut Qmp::connect(&control(&rig)), &goes);
    let ours = UnixStream::connect(upgrades(&rig)).unwrap();
    relay_until(SERVING, &theirs, &ours);
    let backend = backend.gives_way_to(successor);
    let mut qmp = Qmp::connect(&control(&rig));
    delete(&mut qmp, &stays);
    take(&mut qmp);
    backend.stop();
    expect_sound(&rig.image, 1);
}

#[test]
fn an_image_that_is_closed_between_guests_is_opened_without_the_level() {
    let rig = bundle();
    let backend = serve(&rig, &["--lock=running"]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    let upper = take(&mut qmp);
    delete(&mut qmp, &upper);
    for index in 0..front_end.rings.len() {
        front_end.vhost.get_vring_base(index).unwrap();
    }
    let levels = |qmp: &mut Qmp| {
        let nodes = qmp.ask("query-named-block-nodes", json!({}));
        nodes.as_array().unwrap().len()
    };
    assert_eq!(levels(&mut qmp), 2);
    let ended = qmp.answer(DELETE, of(&guid));
    assert!(
        desc(&ended).contains("'ploop-img snapshot delete' does it now"),
        "{ended}"
    );
    drop(front_end);
    qmp.event("FRONT_END_GONE");
    let mut front_end = start_front_end(backend.socket());
    expect_disk(&mut front_end, &byte);
    delete(&mut qmp, &guid);
    assert_eq!(levels(&mut qmp), 1);
    drop(front_end);
    qmp.event("FRONT_END_GONE");
    let mut front_end = start_front_end(backend.socket());
    expect_disk(&mut front_end, &byte);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 0);
}

#[test]
fn the_end_of_the_program_calls_a_deletion_off() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    qmp.ask(DELETE, json!({ "guid": guid, "speed": 1 }));
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 1);
    let backend = serve(&rig, &[]);
    expect_disk(&mut start_front_end(backend.socket()), byte);
    backend.stop();
}

/// A disk that is a raw image with nothing in it, in a new bundle there.
pub fn raw_bundle(folder: &Path) -> PathBuf {
    let bundle = create(folder, "bundle", &["--cluster-size", "64K"]);
    let root = bundle.join("root.hds");
    fs::remove_file(&root).unwrap();
    File::create(&root).unwrap().set_len(64 << 20).unwrap();
    let descriptor = bundle.join("DiskDescriptor.xml");
    let text = fs::read_to_string(&descriptor).unwrap();
    fs::write(&descriptor, text.replace("Compressed", "Plain")).unwrap();
    bundle
}

/// A disk whose base is a raw image, with so many snapshots.
pub fn on_raw_image(snapshots: usize) -> Rig {
    let rig = rig_of(|folder| Some(raw_bundle(folder))).unwrap();
    for _ in 0..snapshots {
        crate::ploop_img(["snapshot", "create", rig.image.to_str().unwrap()]).ok();
    }
    rig
}

/// Another program puts something there that is not part of the disk.
pub fn hide(rig: &Rig) -> File {
    let root = rig.image.join("root.hds");
    let root = File::options().write(true).open(root).unwrap();
    root.write_all_at(&[7; 512], 70 << 20).unwrap();
    root
}

#[test]
fn a_level_that_hides_the_rest_of_a_raw_image_stays() {
    let rig = on_raw_image(2);
    crate::ploop_img(["resize", rig.image.to_str().unwrap(), "80M"]).ok();
    let root = hide(&rig);
    let hides = list(&rig.image)[1]["guid"].as_str().unwrap().to_owned();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let ended = end_of_job(&mut qmp, DELETE, of(&hides)).unwrap();
    assert!(ended.contains("behind the end of its disk"), "{ended}");
    expect(&mut front_end, (70 << 20) / 512, 0);
    root.set_len(64 << 20).unwrap();
    delete(&mut qmp, &hides);
    expect(&mut front_end, (70 << 20) / 512, 0);
    drop(front_end);
    backend.stop();
    let disk = content(&rig, None);
    assert_eq!(disk.len(), 80 << 20);
    assert!(disk.iter().all(|it| *it == 0));
}

#[test]
fn a_disk_may_grow_once_the_raw_image_that_hides_something_is_deleted() {
    let rig = on_raw_image(1);
    hide(&rig);
    let base = list(&rig.image)[0]["guid"].as_str().unwrap().to_owned();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let size = json!({ "device": "disk", "size": 80 << 20 });
    let answer = qmp.answer("block_resize", size.clone());
    assert!(
        desc(&answer).contains("behind the end of its disk"),
        "{answer}"
    );
    delete(&mut qmp, &base);
    assert_eq!(qmp.ask("block_resize", size), json!({}));
    expect(&mut front_end, (70 << 20) / 512, 0);
    drop(front_end);
    backend.stop();
    let disk = content(&rig, None);
    assert_eq!(disk.len(), 80 << 20);
    assert!(disk.iter().all(|it| *it == 0));
    expect_sound(&rig.image, 0);
}

/// Calls by which the thread changes the folder, in order.
const STEPS: [(&str, i64); 4] = [
    ("rename", libc::SYS_renameat),
    ("sync of the folder", libc::SYS_fsync),
    ("unlink", libc::SYS_unlinkat),
    ("cut", libc::SYS_ftruncate),
];

/// Lets the thread run up to the given one of the calls above: it is about to be made.
fn run_up_to(thread: Pid, step: usize) {
    let mut at = 0;
    // What it sees first is the end or the beginning of the call in which it was stopped.
    loop {
        ptrace::syscall(thread, None).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        let registers = ptrace::getregs(thread).unwrap();
        let is_entry = registers.rax as i64 == -i64::from(libc::ENOSYS);
        if registers.orig_rax as i64 != STEPS[at].1 || !is_entry {
            continue;
        }
        if at == step {
            return;
        }
        at += 1;
    }
}

/// Kills the process there: the call is made, or not.
fn kill_at(backend: Backend, begin: impl FnOnce(), step: usize, is_made: bool) {
    let halt = Halt::of(&backend);
    let thread = halt.thread();
    begin();
    run_up_to(thread, step);
    if is_made {
        ptrace::syscall(thread, None).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
    }
    backend.signal(rustix::process::Signal::KILL);
    drop(halt);
    backend.kill();
}

#[test]
fn a_guest_lives_on_when_the_process_is_killed_at_any_step_of_a_deletion() {
    for (step, (name, _)) in STEPS.iter().enumerate() {
        for is_made in [false, true] {
            eprintln!("{name}, {is_made}");
            let rig = bundle();
            let backend = serve(&rig, NEVER);
            let (mut front_end, region) = begin(&backend);
            let mut qmp = Qmp::connect(&control(&rig));
            let (guid, byte) = prepare(&mut front_end, &mut qmp);
            // What only the memory knows.
            write(&mut front_end, 5 * SECTORS, 8);
            kill_at(backend, || drop(qmp.ask(DELETE, of(&guid))), step, is_made);
            // Its last I/O keeps the locks.
            let mode = OpenMode::new(Access::Read);
            wait_for("its end", || image::open(&rig.image, mode).is_ok());
            let backend = serve(&rig, NEVER);
            reconnect(&mut front_end, &backend, Some(&region));
            front_end.start_rings();
            expect(&mut front_end, 5 * SECTORS, 8);
            fill(&mut front_end.rings[0], 5..6, byte(5));
            expect_disk(&mut front_end, &byte);
            let is_there = list(&rig.image).len() == 2;
            assert_eq!(is_there, step == 0 && !is_made, "the name decides");
            let mut qmp = Qmp::connect(&control(&rig));
            if is_there {
                delete(&mut qmp, &guid);
            }
            expect_disk(&mut front_end, &byte);
            // It can be used on as ever.
            let next = take(&mut qmp);
            fill(&mut front_end.rings[0], 7..8, 6);
            delete(&mut qmp, &next);
            let byte = |cluster: u64| if cluster == 7 { 6 } else { byte(cluster) };
            expect_disk(&mut front_end, byte);
            drop(front_end);
            backend.stop();
            let is_removed = step > 2 || (step == 2 && is_made);
            let is_left = images(&rig.image).len() == 2;
            assert_eq!(is_left, !is_there && !is_removed);
            remove_left_over(&rig.image);
            expect_sound(&rig.image, 0);
        }
    }
}

#[test]
fn a_file_stays_if_it_cannot_be_known_that_nobody_finds_it_after_a_power_cut() {
    const SYNC: usize = 1;
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    let halt = Halt::of(&backend);
    qmp.ask(DELETE, json!({ "guid": guid, "auto-dismiss": false }));
    run_up_to(halt.thread(), SYNC);
    // No such descriptor.
    let mut registers = ptrace::getregs(halt.thread()).unwrap();
    registers.rdi = u64::MAX;
    ptrace::setregs(halt.thread(), registers).unwrap();
    drop(halt);
    statuses(&mut qmp, "concluded");
    let error = qmp.ask("query-jobs", json!({}))[0]["error"].clone();
    let error = error.as_str().unwrap();
    assert!(error.contains("cannot sync the folder"), "{error}");
    assert_eq!(qmp.event("SNAPSHOT_DELETED"), of(&guid));
    // The descriptor that there may be then needs it.
    assert_eq!(list(&rig.image).len(), 1);
    assert_eq!(images(&rig.image).len(), 2);
    let nodes = qmp.ask("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 1, "{nodes}");
    expect_disk(&mut front_end, &byte);
    // The disk is changed on as ever.
    qmp.ask("job-dismiss", json!({ "id": "disk" }));
    let next = take(&mut qmp);
    fill(&mut front_end.rings[0], 7..8, 6);
    let byte = |cluster: u64| if cluster == 7 { 6 } else { byte(cluster) };
    delete(&mut qmp, &next);
    expect_disk(&mut front_end, byte);
    thread::sleep(std::time::Duration::from_secs(6));
    let log = backend.log();
    assert!(!log.contains("has been deleted while"), "{log}");
    drop(front_end);
    backend.stop();
    remove_left_over(&rig.image);
    expect_sound(&rig.image, 0);
    let backend = serve(&rig, &[]);
    expect_disk(&mut start_front_end(backend.socket()), byte);
    backend.stop();
}

#[test]
fn a_file_that_cannot_be_removed_is_told_of() {
    let rig = bundle();
    let socket = format!("--control={}", control(&rig).display());
    let backend = rig.serve(&[&socket]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    drop(front_end);
    backend.stop();
    // It cannot remove anything: the disk is as it should be, and the file is left.
    let backend = rig.serve_without(&[libc::SYS_unlinkat], Errno::ACCESS, &[&socket]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let ended = end_of_job(&mut qmp, DELETE, of(&guid)).unwrap();
    assert!(
        ended.contains("deleted, but not all of that is done"),
        "{ended}"
    );
    assert_eq!(qmp.event("SNAPSHOT_DELETED"), of(&guid));
    assert_eq!(list(&rig.image).len(), 1);
    assert_eq!(images(&rig.image).len(), 2);
    expect_disk(&mut front_end, &byte);
    drop(front_end);
    backend.signal(rustix::process::Signal::TERM);
    backend.ends();
    remove_left_over(&rig.image);
    expect_sound(&rig.image, 0);
}

#[test]
fn a_tip_whose_file_cannot_be_removed_is_deleted_all_the_same() {
    let rig = bundle();
    let image = rig.image.to_str().unwrap();
    let off_line = |args: &[&str]| crate::ploop_img(args).ok().trim().to_owned();
    let base = off_line(&["snapshot", "create", image]);
    let tip = off_line(&["snapshot", "create", image]);
    off_line(&["snapshot", "switch", image, &base]);
    let socket = format!("--control={}", control(&rig).display());
    let backend = rig.serve_without(&[libc::SYS_unlinkat], Errno::ACCESS, &[&socket]);
    let mut qmp = Qmp::connect(&control(&rig));
    let ended = end_of_job(&mut qmp, DELETE, of(&tip)).unwrap();
    let expected = "deleted, but not all of that is done";
    assert!(ended.contains(expected), "{ended}");
    assert_eq!(qmp.event("SNAPSHOT_DELETED"), of(&tip));
    assert_eq!(list(&rig.image).len(), 2);
    assert_eq!(images(&rig.image).len(), 3);
    backend.signal(rustix::process::Signal::TERM);
    backend.ends();
    remove_left_over(&rig.image);
    expect_sound(&rig.image, 1);
}
