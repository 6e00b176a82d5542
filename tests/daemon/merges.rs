//! Snapshots of disks that are being served go into others that lie on them, and in ranges.

use std::fs;
use std::process::Command;

use rustix::process::Signal;
use serde_json::{Value, json};
use vhost_user_ploop::image::{self, Access, OpenMode};

use crate::common::backend::Backend;
use crate::common::qmp::Qmp;
use crate::common::small_fs::SmallFs;
use crate::control::{control, serve};
use crate::death::{NEVER, begin, expect, reconnect, write};
use crate::deletions::*;
use crate::front_end::FrontEnd;
use crate::grow::{create, rig_of};
use crate::upgrade::upgrades;
use crate::{Rig, start_front_end, wait_for};

const MERGE: &str = "snapshot-merge";

/// A snapshot and what it holds.
struct Shot {
    guid: String,
    content: Vec<u8>,
}

/// What of a snapshot, or of the disk, is ever written.
fn held(rig: &Rig, guid: Option<&str>) -> Vec<u8> {
    let mut content = content(rig, guid);
    content.truncate((CLUSTERS * CLUSTER) as usize);
    content
}

#[track_caller]
fn expect_shots(rig: &Rig, shots: &[Shot]) {
    for (index, shot) in shots.iter().enumerate() {
        let found = held(rig, Some(&shot.guid));
        assert!(found == shot.content, "snapshot {index} is another");
    }
}

/// So many snapshots one on another, and writes since. No cluster of the first half is written.
fn chain(rig: &Rig, front_end: &mut FrontEnd, qmp: &mut Qmp, count: usize) -> Vec<Shot> {
    let mut shots = Vec::new();
    for number in 0..=count {
        let step = number + 2;
        let clusters = (CLUSTERS / 2..CLUSTERS).step_by(step);
        fill(&mut front_end.rings[0], clusters, number as u8 + 1);
        if number < count {
            let guid = take(qmp);
            let content = held(rig, Some(&guid));
            shots.push(Shot { guid, content });
        }
    }
    shots
}

fn merge(qmp: &mut Qmp, arguments: Value) -> Option<String> {
    end_of_job(qmp, MERGE, arguments)
}

#[test]
fn any_level_goes_while_all_queues_write_and_others_read() {
    let host = host();
    let rig = &host.rig;
    let control_option = format!("--control={}", control(rig).display());
    let backend = host.serve(&[&control_option]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(rig));
    let mut shots = chain(rig, &mut front_end, &mut qmp, 2);
    while_writing(&mut front_end, |rounds| {
        for _ in 0..4 {
            let guid = take(&mut qmp);
            let content = held(rig, Some(&guid));
            shots.push(Shot { guid, content });
            wait_for_writes(rounds);
        }
        // Of six, the last of which the top lies on.
        for index in [1, 0, 2] {
            let guid = shots.remove(index).guid;
            let reader = rig.folder.path().join("reader");
            let options = ["--snapshot", &*shots[index].guid];
            let reader = Backend::start(&rig.image, &reader, &options);
            let mut command = delete_by_name(&host, &guid);
            command.arg(&control_option);
            assert_eq!(ran(command).ok(), "", "as off line");
            expect_shots(rig, &shots);
            wait_for_writes(rounds);
            reader.stop();
            assert_eq!(images(&rig.image).len(), shots.len() + 1);
        }
        let path = rig.image.to_str().unwrap();
        let mut command = ploop_img(&host, &["snapshot", "merge", path, &control_option]);
        command.args(["--to", &shots[1].guid]);
        assert_eq!(ran(command).ok(), "");
        expect_shots(rig, &shots[1..]);
        wait_for_writes(rounds);
        let command = ploop_img(&host, &["snapshot", "merge", path, &control_option]);
        assert_eq!(ran(command).ok(), "");
        wait_for_writes(rounds);
    });
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 0);
}

#[test]
fn a_range_is_merged_with_the_same_result_as_off_line() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let mut other = Qmp::connect(&control(&rig));
    let shots = chain(&rig, &mut front_end, &mut qmp, 5);
    drop(front_end);
    backend.stop();
    let mut off_line = bundle();
    off_line.image = off_line.folder.path().join("copy");
    let mut copy = Command::new("cp");
    ran({
        copy.arg("-a").args([&rig.image, &off_line.image]);
        copy
    })
    .ok();
    let backend = serve(&rig, &[]);
    qmp = Qmp::connect(&control(&rig));
    drop(other);
    other = Qmp::connect(&control(&rig));
    let guid = |index: usize| shots[index].guid.as_str();
    let mut left: Vec<_> = (0..5).collect();
    for (from, to) in [(Some(1), Some(3)), (None, Some(3)), (Some(3), None)] {
        let mut arguments = json!({});
        let mut args = vec!["snapshot", "merge", off_line.image.to_str().unwrap()];
        for (name, index) in [("from", from), ("to", to)] {
            if let Some(index) = index {
                arguments[name] = guid(index).into();
                args.extend([if name == "from" { "--from" } else { "--to" }, guid(index)]);
            }
        }
        let is_gone = |index: &usize| {
            from.is_none_or(|from| *index >= from) && to.is_none_or(|to| *index < to)
        };
        assert_eq!(merge(&mut qmp, arguments), None);
        let ended = other.event("BLOCK_JOB_COMPLETED");
        assert_eq!(ended["type"], "commit");
        for index in left.iter().filter(|index| is_gone(index)) {
            assert_eq!(other.event("SNAPSHOT_DELETED"), of(guid(*index)));
        }
        left.retain(|index| !is_gone(index));
        crate::ploop_img(args).ok();
        let names = |rig: &Rig| {
            let list = list(&rig.image).into_iter();
            list.map(|shot| shot["guid"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&rig), names(&off_line));
        for index in &left {
            let content = &shots[*index].content;
            assert!(held(&rig, Some(guid(*index))) == *content);
            assert!(held(&off_line, Some(guid(*index))) == *content);
        }
    }
    assert!(left.is_empty());
    // There is nothing more to merge.
    assert_eq!(merge(&mut qmp, json!({})), None);
    let stranger = "{11111111-2222-3333-4444-555555555555}";
    let ended = merge(&mut qmp, json!({ "from": stranger })).unwrap();
    assert!(ended.contains("there is no snapshot"), "{ended}");
    let answer = qmp.answer(MERGE, json!({ "to": "x" }));
    assert!(desc(&answer).contains("'to' expects a GUID"), "{answer}");
    backend.stop();
    expect_sound(&rig.image, 0);
    assert!(held(&rig, None) == held(&off_line, None));
}

#[test]
fn snapshots_of_another_branch_go_while_the_disk_is_served() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let mut shots = chain(&rig, &mut front_end, &mut qmp, 4);
    drop(front_end);
    backend.stop();
    let path = rig.image.to_str().unwrap();
    crate::ploop_img(["snapshot", "switch", path, &shots[0].guid]).ok();
    let disk = held(&rig, None);
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let refused = merge(&mut qmp, json!({ "to": shots[2].guid })).unwrap();
    assert!(refused.contains("2 snapshots lie on"), "{refused}");
    delete(&mut qmp, &shots.remove(1).guid);
    expect_shots(&rig, &shots);
    let nodes = qmp.ask("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 2, "{nodes}");
    backend.stop();
    assert!(held(&rig, None) == disk);
    expect_shots(&rig, &shots);
    expect_sound(&rig.image, 3);
}

/// A disk with two snapshots, of which the first has some clusters for the second.
fn with_two(rig: &Rig) -> Vec<Shot> {
    let backend = serve(rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(rig));
    fill(&mut front_end.rings[0], [1, 2, 3].into_iter(), 1);
    let first = take(&mut qmp);
    fill(&mut front_end.rings[0], [3, 4].into_iter(), 2);
    let second = take(&mut qmp);
    fill(&mut front_end.rings[0], [2, 5].into_iter(), 3);
    drop(front_end);
    backend.stop();
    let shot = |guid: String| Shot {
        content: held(rig, Some(&guid)),
        guid,
    };
    vec![shot(first), shot(second)]
}

fn byte(cluster: u64) -> u8 {
    [0, 1, 3, 2, 2, 3]
        .get(cluster as usize)
        .copied()
        .unwrap_or(0)
}

fn serve_until(rig: &Rig, changes: u32) -> Backend {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
    command.env("PLOOP_IMG_KILL_AT", changes.to_string());
    let control = format!("--control={}", control(rig).display());
    let options: Vec<_> = [control.as_str()].iter().chain(NEVER).copied().collect();
    Backend::start_as(command, &rig.image, &rig.socket, &options)
}

fn is_dead(backend: &Backend) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", backend.pid()));
    !status.is_ok_and(|status| !status.contains("State:\tZ"))
}

#[test]
fn a_guest_lives_on_when_the_process_is_killed_at_any_change_of_a_level_or_the_folder() {
    let template = bundle();
    let shots = with_two(&template);
    // The first is a sync of the folder, when it is opened. Of the rest every second one has to
    // do; the simulator takes them all.
    for changes in (3..).step_by(2) {
        let mut rig = bundle();
        rig.image = rig.folder.path().join("copy");
        let mut copy = Command::new("cp");
        copy.arg("-a").args([&template.image, &rig.image]);
        ran(copy).ok();
        let backend = serve_until(&rig, changes);
        let (mut front_end, region) = begin(&backend);
        // What only the memory knows.
        write(&mut front_end, 7 * (CLUSTER / 512), 8);
        let mut qmp = Qmp::connect(&control(&rig));
        qmp.begin("snapshot-delete", of(&shots[0].guid));
        wait_for("the end of either", || {
            let is_over = || list(&rig.image).len() == 2 && images(&rig.image).len() == 2;
            is_dead(&backend) || is_over()
        });
        if !is_dead(&backend) {
            drop(front_end);
            backend.stop();
            assert!(changes > 12, "only {changes}");
            break;
        }
        backend.wait_for_signal();
        let mode = OpenMode::new(Access::Read);
        wait_for("its end", || image::open(&rig.image, mode).is_ok());
        let backend = serve(&rig, NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        front_end.start_rings();
        expect(&mut front_end, 7 * (CLUSTER / 512), 8);
        fill(&mut front_end.rings[0], 7..8, 0);
        expect_disk(&mut front_end, byte);
        let mut qmp = Qmp::connect(&control(&rig));
        if list(&rig.image).len() == 3 {
            expect_shots(&rig, &shots);
            delete(&mut qmp, &shots[0].guid);
        }
        expect_shots(&rig, &shots[1..]);
        expect_disk(&mut front_end, byte);
        drop(front_end);
        backend.stop();
        remove_left_over(&rig.image);
        expect_sound(&rig.image, 1);
        expect_shots(&rig, &shots[1..]);
    }
}

#[test]
fn another_process_takes_over_amid_a_merge() {
    let rig = bundle();
    let socket = format!("--upgrade-socket={}", upgrades(&rig).display());
    let backend = serve(&rig, &[&socket]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let shots = chain(&rig, &mut front_end, &mut qmp, 4);
    let slow = json!({ "to": shots[2].guid, "job-id": "a", "speed": CLUSTER });
    qmp.ask(MERGE, slow);
    wait_for("a copy", || {
        qmp.ask("query-jobs", json!({}))[0]["current-progress"].as_u64() > Some(0)
    });
    qmp.ask("job-pause", json!({ "id": "a" }));
    statuses(&mut qmp, "paused");
    expect_shots(&rig, &shots);
    let control = control(&rig);
    let check = ["check", rig.image.to_str().unwrap(), "--control"];
    let checked = crate::ploop_img(check.iter().copied().chain(control.to_str())).ok();
    assert!(
        checked.contains("it gets what a snapshot below it has"),
        "{checked}"
    );
    let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    let mut qmp = Qmp::connect(&control);
    assert_eq!(qmp.ask("query-jobs", json!({})), json!([]));
    expect_shots(&rig, &shots);
    // Here it succeeds, and a third one finds what is left.
    assert_eq!(merge(&mut qmp, json!({ "to": shots[2].guid })), None);
    let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    let mut qmp = Qmp::connect(&control);
    expect_shots(&rig, &shots[2..]);
    delete(&mut qmp, &shots[2].guid);
    expect_shots(&rig, &shots[3..]);
    drop(front_end);
    backend.signal(Signal::TERM);
    backend.ends();
    expect_sound(&rig.image, 1);
}

#[test]
fn a_full_host_is_told_of_before_and_waited_for_in_the_midst() {
    let Some(small) = SmallFs::tmpfs(64 << 20) else {
        return;
    };
    let small_clusters = ["--cluster-size", "64K"];
    let rig = rig_of(|_| Some(create(small.root(), "bundle", &small_clusters))).unwrap();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let shots = chain(&rig, &mut front_end, &mut qmp, 2);
    let ballast = small.fill_but(4 * CLUSTER);
    let refused = end_of_job(&mut qmp, "snapshot-delete", of(&shots[0].guid)).unwrap();
    assert!(refused.contains("has not enough space"), "{refused}");
    assert!(refused.contains("when nobody uses the disk"), "{refused}");
    ballast.remove();
    let slow = json!({ "guid": shots[0].guid, "job-id": "a", "speed": 4 * CLUSTER });
    qmp.ask("snapshot-delete", slow);
    let done = |qmp: &mut Qmp| qmp.ask("query-jobs", json!({}))[0]["current-progress"].clone();
    wait_for("a copy", || done(&mut qmp).as_u64() > Some(0));
    let ballast = small.fill_but(CLUSTER);
    qmp.ask("block-job-set-speed", json!({ "device": "a", "speed": 0 }));
    // It waits, and the guest goes on.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let job = qmp.ask("query-jobs", json!({}))[0].clone();
    assert!(
        job["current-progress"].as_u64() < job["total-progress"].as_u64(),
        "{job}"
    );
    expect_shots(&rig, &shots);
    ballast.remove();
    assert_eq!(qmp.event("SNAPSHOT_DELETED"), of(&shots[0].guid));
    expect_shots(&rig, &shots[1..]);
    drop(front_end);
    backend.stop();
    expect_sound(&rig.image, 1);
}

#[test]
fn a_level_that_hides_the_rest_of_a_raw_image_goes_into_no_other_one() {
    let rig = on_raw_image(2);
    let image = rig.image.to_str().unwrap();
    crate::ploop_img(["resize", image, "80M"]).ok();
    crate::ploop_img(["snapshot", "create", image]).ok();
    let root = hide(&rig);
    let chain = list(&rig.image);
    let guid = |index: usize| chain[index]["guid"].as_str().unwrap();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&rig));
    let ended = end_of_job(&mut qmp, "snapshot-delete", of(guid(1))).unwrap();
    assert!(ended.contains("behind the end of its disk"), "{ended}");
    assert_eq!(list(&rig.image).len(), chain.len());
    root.set_len(64 << 20).unwrap();
    delete(&mut qmp, guid(1));
    expect(&mut front_end, (70 << 20) / 512, 0);
    // With the raw image itself, which has nothing, all goes into the one that stays.
    assert_eq!(merge(&mut qmp, json!({ "to": guid(2) })), None);
    drop(front_end);
    backend.stop();
    for guid in [None, Some(guid(2))] {
        let disk = content(&rig, guid);
        assert_eq!(disk.len(), 80 << 20);
        assert!(disk.iter().all(|it| *it == 0));
    }
    expect_sound(&rig.image, 1);
}
