//! Snapshots of disks that are being served.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::backend::Backend;
use crate::common::img::{Ran, ploop_img_command};
use crate::common::qmp::Qmp;
use crate::control::{control, serve};
use crate::front_end::*;
use crate::grow::{Halt, create, rig_of};
use crate::stat::{Host, VARIABLE};
use crate::upgrade::upgrades;
use crate::{OK, Rig, descriptors, expect_service, start_front_end, wait_for};

const CREATE: &str = "snapshot-create";
const SECTORS: u64 = 1 << 11;

fn bundle() -> Rig {
    rig_of(|folder| Some(create(folder, "bundle", &[]))).unwrap()
}

fn host() -> Host {
    let mut host = Host::new();
    host.rig.image = create(host.rig.folder.path(), "bundle", &[]);
    host
}

fn ploop_img(host: &Host, args: &[&str]) -> Ran {
    let mut command = ploop_img_command();
    command.env(VARIABLE, &host.runtime).args(args);
    command.arg(&host.rig.image).stdin(Stdio::null());
    command.output().unwrap().into()
}

fn desc(answer: &Value) -> String {
    answer["error"]["desc"]
        .as_str()
        .expect("it is an error")
        .to_owned()
}

fn list(image: &Path) -> Vec<Value> {
    let args = ["snapshot", "list", "--output=json", image.to_str().unwrap()];
    let shown = crate::ploop_img(args).ok();
    serde_json::from_str(&shown).unwrap()
}

fn expect_sound(rig: &Rig, snapshots: usize) {
    crate::ploop_img(["check", rig.image.to_str().unwrap()]).ok();
    assert_eq!(list(&rig.image).len(), snapshots + 1);
}

/// What of a disk a writer has done: numbers in turn, each to the start of its part of the
/// disk and somewhere else in it.
#[derive(Default)]
struct Writer {
    begun: AtomicU64,
    completed: AtomicU64,
}

impl Writer {
    /// First cluster of the part of the `index`-th, which has as many as this.
    const CLUSTERS: u64 = 12;

    fn write(&self, index: u64, ring: &mut Ring, ends: &AtomicBool) {
        let first = index * Self::CLUSTERS * SECTORS;
        let source = DATA + index * 4096;
        for number in (1_u64..).take_while(|_| !ends.load(SeqCst)) {
            ring.fill(source, &number.to_le_bytes().repeat(64));
            self.begun.store(number, SeqCst);
            let elsewhere = first + (1 + number % (Self::CLUSTERS - 1)) * SECTORS;
            for sector in [elsewhere, first] {
                let data = [readable(source, 512)];
                assert_eq!(ring.run(VIRTIO_BLK_T_OUT, sector, &data).0, OK);
            }
            self.completed.store(number, SeqCst);
        }
    }

    /// The last number that the disk has, and that the other place has it as well, or its
    /// successor.
    fn check(index: u64, disk: &[u8]) -> u64 {
        let first = (index * Self::CLUSTERS) << 20;
        let at = |offset: u64| {
            let bytes = &disk[offset as usize..][..8];
            u64::from_le_bytes(bytes.try_into().unwrap())
        };
        let last = at(first);
        if last > 0 {
            let elsewhere = at(first + ((1 + last % (Self::CLUSTERS - 1)) << 20));
            assert_eq!(elsewhere, last, "what was written before is there");
        }
        last
    }
}

#[test]
fn snapshots_under_load_have_what_was_acknowledged_before_and_nothing_from_after() {
    let host = host();
    let backend = host.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    let writers = [Writer::default(), Writer::default()];
    let ends = AtomicBool::new(false);
    let mut shots = Vec::new();
    thread::scope(|scope| {
        for ((index, writer), ring) in (0..).zip(&writers).zip(&mut front_end.rings) {
            let ends = &ends;
            scope.spawn(move || writer.write(index, ring, ends));
        }
        let taken = scope.spawn(|| {
            let mut shots = Vec::new();
            for round in 0..5 {
                let wanted = writers.each_ref().map(|it| it.completed.load(SeqCst) + 5);
                wait_for("writes", || {
                    let now = writers.each_ref().map(|it| it.completed.load(SeqCst));
                    now.iter().zip(wanted).all(|(now, wanted)| *now >= wanted)
                });
                let before = writers.each_ref().map(|it| it.completed.load(SeqCst));
                let name = format!("round {round}");
                let made = match round % 2 {
                    0 => ploop_img(&host, &["snapshot", "create", "--description", &name]),
                    _ => ploop_img(&host, &["snapshot", "-c", &name]),
                };
                let guid = made.ok().trim().to_owned();
                let after = writers.each_ref().map(|it| it.begun.load(SeqCst));
                shots.push((guid, before, after));
            }
            shots
        });
        let taken = taken.join();
        ends.store(true, SeqCst);
        shots = taken.unwrap();
    });
    // The process is found, though its top is another by now.
    ploop_img(&host, &["stat"]).ok();
    ploop_img(&host, &["check"]).ok();
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
    expect_sound(&host.rig, 5);
    for (guid, before, after) in &shots {
        let raw = host.rig.folder.path().join("raw");
        let args = ["convert", "-O", "raw", "--snapshot", guid];
        let mut command = ploop_img_command();
        command.args(args).arg(&host.rig.image).arg(&raw);
        Ran::from(command.output().unwrap()).ok();
        let disk = fs::read(&raw).unwrap();
        fs::remove_file(&raw).unwrap();
        for (index, (before, after)) in (0..).zip(before.iter().zip(after)) {
            let last = Writer::check(index, &disk);
            assert!(
                (*before..=*after).contains(&last),
                "{last}: {before} to {after}"
            );
        }
    }
    let nodes = list(&host.rig.image);
    let names: Vec<_> = nodes
        .iter()
        .filter_map(|node| node["description"].as_str())
        .collect();
    assert_eq!(
        names,
        ["round 0", "round 1", "round 2", "round 3", "round 4"]
    );
}

#[test]
fn clients_learn_of_snapshots_and_of_what_keeps_them_from_being_made() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let mut other = Qmp::connect(&control(&rig));
    let made = qmp.ask(CREATE, json!({ "description": "before" }));
    assert_eq!(other.event("SNAPSHOT_CREATED"), made);
    let shown = qmp.ask("snapshot-list", json!({}));
    assert_eq!(
        (&shown[0]["guid"], &shown[0]["description"]),
        (&made["guid"], &json!("before"))
    );
    assert_eq!(shown[1]["current"], true);
    let nodes = qmp.ask("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 2);
    assert_eq!(
        (&nodes[0]["ro"], &nodes[1]["ro"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(nodes[0]["backing_file"], nodes[1]["file"]);
    // QEMU's.
    let internal = "blockdev-snapshot-internal-sync";
    let named = |device: &str, name: &str| json!({ "device": device, "name": name });
    assert_eq!(qmp.ask(internal, named("disk", "qemus")), json!({}));
    for (arguments, why) in [
        (
            named("disk", "qemus"),
            "Snapshot with name 'qemus' already exists",
        ),
        (named("x", "a"), "Cannot find device='x' nor node-name='x'"),
        (named("disk", ""), "Name is empty"),
        (named("disk", "a\nb"), "one line"),
    ] {
        let answer = desc(&qmp.answer(internal, arguments));
        assert!(answer.contains(why), "{answer}");
    }
    // A description, unlike a name, is nobody's alone.
    qmp.ask(CREATE, json!({ "description": "qemus" }));
    for (arguments, why) in [
        (json!({ "guid": "x" }), "Parameter 'guid' expects a GUID"),
        (
            json!({ "guid": made["guid"] }),
            made["guid"].as_str().unwrap(),
        ),
        (json!({ "description": "a\u{7}" }), "one line"),
    ] {
        let answer = desc(&qmp.answer(CREATE, arguments));
        assert!(answer.contains(why), "{answer}");
    }
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    // It grows all the same, and lower levels do not.
    let size = json!({ "node-name": "disk", "size": 128 << 20 });
    assert_eq!(qmp.ask("block_resize", size), json!({}));
    let text = Qmp::connect(&control(&rig))
        .ask("snapshot-list", json!({}))
        .to_string();
    assert_eq!(text.matches("\"guid\"").count(), 4);
    drop(front_end);
    backend.stop();
    expect_sound(&rig, 3);
}

#[test]
fn of_a_bare_image_and_of_one_that_is_only_read_there_are_none() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let why = desc(&Qmp::connect(&control(&rig)).answer(CREATE, json!({})));
    assert!(why.contains("bare image"), "{why}");
    backend.stop();
    let rig = bundle();
    let backend = serve(&rig, &["--read-only"]);
    let why = desc(&Qmp::connect(&control(&rig)).answer(CREATE, json!({})));
    assert!(why.contains("only read"), "{why}");
    backend.stop();
    expect_sound(&rig, 0);
}

#[test]
fn a_chain_gets_as_long_as_it_may_be_and_no_longer() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let mut front_end = start_front_end(backend.socket());
    let mut made = 0;
    let why = loop {
        expect_service(&mut front_end);
        let answer = qmp.answer(CREATE, json!({}));
        if answer["error"].is_object() {
            break desc(&answer);
        }
        made += 1;
        assert!(made < 130);
    };
    assert_eq!(made, 126, "{why}");
    assert!(why.contains("more than 127 levels"), "{why}");
    let sector = [writable(DATA + 512, 512)];
    assert_eq!(front_end.rings[0].run(VIRTIO_BLK_T_IN, 5, &sector).0, OK);
    assert_eq!(front_end.bytes(DATA + 512, 512), [7; 512]);
    drop(front_end);
    backend.stop();
    expect_sound(&rig, made);
}

/// Asks for a snapshot, and returns when the program has heard it: nothing gets on until what is
/// returned is dropped.
fn begin(backend: &Backend, qmp: &mut Qmp) -> Halt {
    let halt = Halt::of_thread(backend, "md");
    let before = descriptors(backend.pid());
    qmp.begin(CREATE, json!({}));
    wait_for("what it takes", || descriptors(backend.pid()) > before);
    halt
}

#[test]
fn nothing_else_is_done_to_the_disk_meanwhile() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let (mut qmp, mut other) = (Qmp::connect(&control(&rig)), Qmp::connect(&control(&rig)));
    let halt = begin(&backend, &mut qmp);
    let size = json!({ "node-name": "disk", "size": 128 << 20 });
    let making = "A snapshot of the disk is being made already";
    assert_eq!(desc(&other.answer("block_resize", size.clone())), making);
    assert_eq!(desc(&other.answer(CREATE, json!({}))), making);
    assert_eq!(other.ask("query-status", json!({}))["running"], true);
    drop(halt);
    assert!(qmp.end(CREATE)["return"]["guid"].is_string());
    let halt = Halt::of_thread(&backend, "md");
    let before = descriptors(backend.pid());
    qmp.begin("block_resize", size);
    wait_for("what it takes", || descriptors(backend.pid()) > before);
    let resizing = "The disk is being resized already";
    assert_eq!(desc(&other.answer(CREATE, json!({}))), resizing);
    drop(halt);
    assert_eq!(qmp.end("block_resize")["return"], json!({}));
    backend.stop();
    expect_sound(&rig, 1);
}

#[test]
fn the_end_of_the_program_does_not_wait_for_a_snapshot_that_has_hardly_begun() {
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let halt = begin(&backend, &mut qmp);
    backend.signal(rustix::process::Signal::TERM);
    wait_for("its word", || backend.log().contains("shutting down"));
    drop(halt);
    let words = qmp.last_words();
    let answer = words
        .iter()
        .find(|word| word["id"] == CREATE)
        .expect("it is told");
    let made = answer["return"]["guid"].is_string();
    assert!(made || desc(answer).contains("called off"), "{answer}");
    backend.ends();
    expect_sound(&rig, usize::from(made));
}

#[test]
fn another_process_takes_over_a_disk_with_snapshots_or_what_it_was_before() {
    let rig = bundle();
    let socket = format!("--upgrade-socket={}", upgrades(&rig).display());
    let mut backend = serve(&rig, &[&socket]);
    let mut qmp = Qmp::connect(&control(&rig));
    qmp.ask(CREATE, json!({}));
    expect_service(&mut start_front_end(backend.socket()));
    backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    expect_service(&mut start_front_end(backend.socket()));
    qmp.event("FRONT_END_GONE");
    // One that comes while a snapshot is made serves what there is then, or nothing.
    let halt = begin(&backend, &mut qmp);
    let successor = backend.spawn_successor(&rig.image, &upgrades(&rig), &[]);
    wait_for("its coming", || {
        backend.log().contains("is about to take over")
    });
    drop(halt);
    let (backend, _) = backend.settle_with(successor);
    let mut front_end = start_front_end(backend.socket());
    let sector = [writable(DATA + 512, 512)];
    assert_eq!(front_end.rings[0].run(VIRTIO_BLK_T_IN, 5, &sector).0, OK);
    assert_eq!(front_end.bytes(DATA + 512, 512), [7; 512]);
    Qmp::connect(&control(&rig)).ask(CREATE, json!({}));
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
    let shots = list(&rig.image).len();
    assert!((3..=4).contains(&shots), "{shots}");
    // A level may keep space that a process had ready when it gave the disk to another.
    let checked = crate::ploop_img(["check", "--output=json", rig.image.to_str().unwrap()]);
    let report: Value = serde_json::from_str(&checked.stdout).unwrap();
    assert_eq!(report["corruptions"], 0, "{report}");
}
