//! qemu-storage-daemon and this program are asked the same, and their answers have the same
//! members of the same types: what is different is listed here, with the reason. Errors have
//! the same class and the same words.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::common::qmp::Qmp;
use crate::common::sockets::is_listened_on;
use crate::common::{require_tool, tool};
use crate::control::{control, serve};
use crate::front_end::*;
use crate::grow::{create, rig_of};
use crate::{OK, Rig, start_front_end, wait_for};

/// Who has something that the other one lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Only {
    Ours,
    /// Of QEMU.
    Theirs,
    /// And of a QEMU that is newer than some that are in use.
    NewQemuToo,
}

/// A question, where in its answer, who has it, and why.
type Difference = (&'static str, &'static str, Only, &'static str);

const DIFFERENCES: &[Difference] = &[
    (
        "node",
        ".image.cluster-size",
        Only::Ours,
        "QEMU's driver for the format does not say it of an open image, others' do",
    ),
    (
        "node",
        ".image.dirty-flag",
        Only::Ours,
        "QEMU says it of other formats; here it is whether the image is marked as in use",
    ),
    (
        "node",
        ".active",
        Only::NewQemuToo,
        "QEMU has it since version 10.0",
    ),
    (
        "statistics",
        ".parent",
        Only::Theirs,
        "what is below a format is no node of its own here",
    ),
    (
        "statistics",
        ".stats.zone_append_",
        Only::NewQemuToo,
        "QEMU has it since version 8.1",
    ),
    (
        "statistics",
        "_zone_append_operations",
        Only::NewQemuToo,
        "QEMU has it since version 8.1",
    ),
];

/// What is wrong, and is answered with the same words.
fn mistakes() -> Vec<Value> {
    let run =
        |command: &str, arguments: Value| json!({ "execute": command, "arguments": arguments });
    let threshold = "block-set-write-threshold";
    let too_large: Value = serde_json::from_str("18446744073709551616").unwrap();
    vec![
        run("no-such", json!({})),
        run("query-jobs", json!({ "z": 1 })),
        run("query-named-block-nodes", json!({ "flat": 1 })),
        run("qmp_capabilities", json!({})),
        run("block_resize", json!({ "node-name": "disk" })),
        run("block_resize", json!({ "node-name": "x", "size": 1 << 20 })),
        run("block_resize", json!({ "device": "x", "size": 1 << 20 })),
        run("block_resize", json!({ "size": 1 << 20 })),
        run("block_resize", json!({ "node-name": "disk", "size": -1 })),
        run("block_resize", json!({ "node-name": "disk", "size": "1" })),
        run("block_resize", json!({ "node-name": 5, "size": 1 })),
        run(threshold, json!({ "node-name": "x", "write-threshold": 1 })),
        run(threshold, json!({ "node-name": "disk" })),
        run(threshold, json!({ "write-threshold": 1 })),
        run(
            threshold,
            json!({ "node-name": "disk", "write-threshold": too_large }),
        ),
        run(
            threshold,
            json!({ "node-name": "disk", "write-threshold": "1" }),
        ),
        run("job-cancel", json!({ "id": "x" })),
        run("job-pause", json!({ "id": "x" })),
        run("job-dismiss", json!({})),
        run("block-job-set-speed", json!({ "device": "x", "speed": 1 })),
        run("block-job-set-speed", json!({ "device": "x" })),
        json!({ "execute": "query-jobs", "z": 1 }),
        json!({ "execute": 5 }),
        json!({ "arguments": {} }),
        json!({ "execute": "query-jobs", "arguments": 5 }),
    ]
}

/// Where there is what, as `.name` of objects and `[]` of lists.
type Shape = BTreeMap<String, &'static str>;

fn shape_of(value: &Value) -> Shape {
    fn add(value: &Value, path: &str, shape: &mut Shape) {
        let kind = match value {
            Value::Object(members) => {
                for (name, value) in members {
                    add(value, &format!("{path}.{name}"), shape);
                }
                "object"
            }
            Value::Array(values) => {
                for value in values {
                    add(value, &format!("{path}[]"), shape);
                }
                "array"
            }
            Value::String(_) => "string",
            Value::Number(_) => "number",
            Value::Bool(_) => "boolean",
            Value::Null => "null",
        };
        shape.insert(path.to_owned(), kind);
    }
    let mut shape = Shape::new();
    add(value, "", &mut shape);
    shape
}

/// The two are of the same shape, but for what is listed.
#[track_caller]
fn compare(question: &str, theirs: &Value, ours: &Value) {
    let shapes = [shape_of(theirs), shape_of(ours)];
    let listed = |path: &str| {
        let of_question = DIFFERENCES.iter().filter(|(of, ..)| *of == question);
        of_question
            .filter(|(_, place, ..)| path.contains(place))
            .map(|(_, _, only, _)| *only)
            .next()
    };
    let [their_shape, our_shape] = &shapes;
    for (path, kind) in their_shape {
        match (our_shape.get(path), listed(path)) {
            (None, Some(Only::Theirs)) => {}
            (Some(our_kind), None | Some(Only::NewQemuToo)) if our_kind == kind => {}
            (found, listed) => panic!(
                "{question}: QEMU has {path}, a {kind}; here it is {found:?}, and {listed:?} is \
                 listed\ntheirs: {theirs}\nours: {ours}"
            ),
        }
    }
    for path in our_shape
        .keys()
        .filter(|path| !their_shape.contains_key(*path))
    {
        let is_listed = matches!(listed(path), Some(Only::Ours | Only::NewQemuToo));
        assert!(
            is_listed,
            "{question}: only here is {path}\ntheirs: {theirs}\nours: {ours}"
        );
    }
    // What is the same by now is to be struck off.
    for (_, place, only, _) in DIFFERENCES.iter().filter(|(of, ..)| *of == question) {
        let has = shapes
            .each_ref()
            .map(|it| it.keys().any(|path| path.contains(place)));
        let expected = match only {
            Only::Theirs => has == [true, false],
            Only::Ours => has == [false, true],
            Only::NewQemuToo => has[1],
        };
        assert!(expected, "{question}: {place} is listed as {only:?}");
    }
}

/// It serves an image as the node `disk`.
struct Peer {
    child: Child,
    monitor: PathBuf,
    nbd: PathBuf,
}

impl Peer {
    /// Of the format `parallels`, which is ours.
    fn start(folder: &Path) -> Self {
        let image = folder.join("theirs.hds");
        crate::ploop_img(["create", image.to_str().unwrap(), "64M"]).ok();
        Self::serve(folder, &image, "parallels")
    }

    /// Of its own, which has snapshots.
    fn with_snapshots(folder: &Path) -> Self {
        let image = folder.join("theirs.qcow2");
        let args = [
            "create",
            "-q",
            "-f",
            "qcow2",
            image.to_str().unwrap(),
            "64M",
        ];
        let created = tool("qemu-img").args(args).output().unwrap();
        assert!(created.status.success(), "{created:?}");
        Self::serve(folder, &image, "qcow2")
    }

    fn serve(folder: &Path, image: &Path, driver: &str) -> Self {
        let monitor = folder.join("monitor");
        let child = tool("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=file,filename={},node-name=file",
                image.display()
            ))
            .arg("--blockdev")
            .arg(format!("driver={driver},file=file,node-name=disk"))
            .arg("--chardev")
            .arg(format!(
                "socket,path={},server=on,wait=off,id=m",
                monitor.display()
            ))
            .args(["--monitor", "chardev=m"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("its monitor", || is_listened_on(&monitor));
        let nbd = folder.join("nbd");
        Self {
            child,
            monitor,
            nbd,
        }
    }

    /// Writes to the start of the disk.
    fn write(&self, qmp: &mut Qmp) {
        let addr = json!({ "type": "unix", "data": { "path": self.nbd.to_str().unwrap() } });
        qmp.ask("nbd-server-start", json!({ "addr": addr }));
        let export = json!({ "type": "nbd", "id": "e", "node-name": "disk", "writable": true });
        qmp.ask("block-export-add", export);
        let address = format!("nbd+unix:///disk?socket={}", self.nbd.display());
        let written = tool("qemu-io")
            .args(["-f", "raw", "-c", "write 0 1M", &address])
            .output();
        let written = written.unwrap();
        assert!(written.status.success(), "{written:?}");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It has been told to end, unless the test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn disk_of(nodes: &Value) -> Value {
    let mut nodes = nodes.as_array().unwrap().iter();
    nodes
        .find(|node| node["node-name"] == "disk")
        .expect("there is the disk")
        .clone()
}

/// Each has a job, of another kind: it is asked about when it is over, and dismissed.
fn compare_jobs(them: &mut Qmp, us: &mut Qmp) {
    let null = json!({ "driver": "null-co", "node-name": "null", "size": 64 << 20 });
    them.ask("blockdev-add", null);
    let backup = json!({
        "job-id": "j", "device": "disk", "target": "null", "sync": "full", "auto-dismiss": false,
    });
    them.ask("blockdev-backup", backup);
    us.ask("compact", json!({ "job-id": "j", "auto-dismiss": false }));
    for qmp in [&mut *them, &mut *us] {
        wait_for("the end", || {
            qmp.ask("query-jobs", json!({}))[0]["status"] == "concluded"
        });
    }
    for command in ["query-jobs", "query-block-jobs"] {
        let [theirs, ours] = [&mut *them, &mut *us].map(|qmp| qmp.ask(command, json!({})));
        compare(command, &theirs, &ours);
    }
    let speed = |speed: i64| json!({ "device": "j", "speed": speed });
    let id = json!({ "id": "j" });
    for (command, arguments) in [
        ("job-pause", id.clone()),
        ("job-resume", id.clone()),
        ("job-cancel", id.clone()),
        ("job-complete", id.clone()),
        ("job-finalize", id.clone()),
        ("block-job-set-speed", speed(-1)),
        ("block-job-set-speed", speed(1)),
        ("job-dismiss", id.clone()),
        ("job-dismiss", id),
    ] {
        let [theirs, ours] =
            [&mut *them, &mut *us].map(|qmp| qmp.answer(command, arguments.clone()));
        assert_eq!(theirs, ours, "{command}");
    }
    let turns = [&mut *them, &mut *us].map(|qmp| {
        let mut turns = Vec::new();
        while turns.last() != Some(&json!("null")) {
            turns.push(qmp.event("JOB_STATUS_CHANGE")["status"].clone());
        }
        // QEMU pauses its jobs for a moment now and then, for reasons of its own.
        turns.retain(|turn| turn != "paused");
        turns.dedup();
        turns
    });
    assert_eq!(turns[0], turns[1]);
}

#[test]
fn answers_are_those_of_qemu_storage_daemon_but_for_what_is_listed() {
    if !require_tool("qemu-storage-daemon") || !require_tool("qemu-io") {
        return;
    }
    let rig = Rig::new();
    let peer = Peer::start(rig.folder.path());
    let backend = serve(&rig, &[]);
    let (mut them, mut us) = (Qmp::connect(&peer.monitor), Qmp::connect(&control(&rig)));
    for command in [
        "query-version",
        "query-commands",
        "query-jobs",
        "query-block-jobs",
    ] {
        compare(
            command,
            &them.ask(command, json!({})),
            &us.ask(command, json!({})),
        );
    }
    let nodes = "query-named-block-nodes";
    for arguments in [json!({}), json!({ "flat": true }), json!({ "flat": false })] {
        let theirs = disk_of(&them.ask(nodes, arguments.clone()));
        compare("node", &theirs, &disk_of(&us.ask(nodes, arguments)));
    }
    // It has no device that has a name, so it has nothing to say of one.
    let theirs = disk_of(&them.ask(nodes, json!({})));
    compare(
        "node",
        &theirs,
        &us.ask("query-block", json!({}))[0]["inserted"],
    );
    let of_nodes = json!({ "query-nodes": true });
    let theirs = disk_of(&them.ask("query-blockstats", of_nodes.clone()));
    compare(
        "statistics",
        &theirs,
        &us.ask("query-blockstats", of_nodes)[0],
    );
    for mistake in mistakes() {
        let [theirs, ours] = [&mut them, &mut us].map(|qmp| qmp.answer_to(&mistake));
        assert!(theirs["error"].is_object(), "{theirs}");
        assert_eq!(theirs, ours, "{mistake}");
    }
    let threshold = "block-set-write-threshold";
    let arguments = |node: &str| json!({ "node-name": node, "write-threshold": 4096 });
    // There the file below the format is a node of its own.
    let set = them.ask(threshold, arguments("file"));
    compare(threshold, &set, &us.ask(threshold, arguments("disk")));
    peer.write(&mut them);
    let mut front_end = start_front_end(backend.socket());
    front_end.fill(DATA, &[7; 512]);
    let data = [readable(DATA, 512)];
    assert_eq!(front_end.rings[0].run(VIRTIO_BLK_T_OUT, 0, &data).0, OK);
    let event = "BLOCK_WRITE_THRESHOLD";
    compare(event, &them.event(event), &us.event(event));
    compare_jobs(&mut them, &mut us);
    drop(front_end);
    assert_eq!(them.ask("quit", json!({})), us.ask("quit", json!({})));
    backend.ends();
}

#[test]
fn snapshots_are_made_and_deleted_as_by_qemu_storage_daemon() {
    if !require_tool("qemu-storage-daemon") || !require_tool("qemu-img") {
        return;
    }
    let rig = rig_of(|folder| Some(create(folder, "bundle", &[]))).unwrap();
    let peer = Peer::with_snapshots(rig.folder.path());
    let backend = serve(&rig, &[]);
    let (mut them, mut us) = (Qmp::connect(&peer.monitor), Qmp::connect(&control(&rig)));
    let (make, delete) = (
        "blockdev-snapshot-internal-sync",
        "blockdev-snapshot-delete-internal-sync",
    );
    let named = |name: &str| json!({ "device": "disk", "name": name });
    for name in ["one", "two"] {
        let made = them.ask(make, named(name));
        assert_eq!(made, us.ask(make, named(name)));
    }
    for (command, arguments) in [
        (make, named("one")),
        (make, named("")),
        (make, json!({ "device": "x", "name": "one" })),
        (make, json!({ "device": "disk" })),
        (delete, json!({ "device": "x", "name": "one" })),
        (delete, json!({ "device": "x" })),
        (delete, json!({ "device": "disk" })),
        (delete, named("three")),
        (delete, named("")),
        (delete, json!({ "device": "disk", "id": "9" })),
        (
            delete,
            json!({ "device": "disk", "id": "9", "name": "two" }),
        ),
        (delete, json!({ "name": "two" })),
        (delete, json!({ "device": "disk", "name": "two", "z": 1 })),
        (delete, json!({ "device": "disk", "name": 2 })),
    ] {
        let theirs = them.answer(command, arguments.clone());
        assert!(theirs["error"].is_object(), "{theirs}");
        assert_eq!(theirs, us.answer(command, arguments));
    }
    let gone = them.ask(delete, named("two"));
    compare(delete, &gone, &us.ask(delete, named("two")));
    assert_eq!(gone["name"], "two");
    // It is gone.
    let theirs = them.answer(delete, named("two"));
    assert_eq!(theirs, us.answer(delete, named("two")));
    let id = us.ask("snapshot-list", json!({}))[0]["guid"].clone();
    let ours = us.ask(delete, json!({ "device": "disk", "id": id }));
    let theirs = them.ask(delete, json!({ "device": "disk", "id": "1" }));
    compare(delete, &theirs, &ours);
    assert_eq!((&ours["name"], &ours["id"]), (&json!("one"), &id));
    assert_eq!(them.ask("quit", json!({})), us.ask("quit", json!({})));
    backend.ends();
}

#[test]
fn bitmaps_are_those_of_qemu_storage_daemon() {
    if !require_tool("qemu-storage-daemon") || !require_tool("qemu-img") {
        return;
    }
    let rig = Rig::new();
    let peer = Peer::with_snapshots(rig.folder.path());
    let backend = serve(&rig, &[]);
    let (mut them, mut us) = (Qmp::connect(&peer.monitor), Qmp::connect(&control(&rig)));
    let nodes = |qmp: &mut Qmp| disk_of(&qmp.ask("query-named-block-nodes", json!({})));
    for (command, arguments) in things_to_do_to_bitmaps() {
        let [theirs, ours] =
            [&mut them, &mut us].map(|qmp| qmp.answer(&command, arguments.clone()));
        assert_eq!(theirs, ours, "{command} {arguments}");
        let [theirs, ours] = [&mut them, &mut us].map(|qmp| nodes(qmp)["dirty-bitmaps"].clone());
        assert_eq!(theirs, ours, "after {command} {arguments}");
    }
    assert_eq!(them.ask("quit", json!({})), us.ask("quit", json!({})));
    backend.ends();
}

fn things_to_do_to_bitmaps() -> Vec<(String, Value)> {
    const GUID: &str = "c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5";
    let run = |verb: &str, arguments: Value| (format!("block-dirty-bitmap-{verb}"), arguments);
    let named = |name: &str| json!({ "node": "disk", "name": name });
    let granular =
        |granularity: Value| json!({ "node": "disk", "name": "x", "granularity": granularity });
    let merge = |bitmaps: Value| {
        let merged = json!({ "node": "disk", "target": "a", "bitmaps": bitmaps });
        run("merge", merged)
    };
    let act = |actions: Value| ("transaction".to_owned(), json!({ "actions": actions }));
    let action = |verb: &str, data: Value| json!({ "type": format!("block-dirty-bitmap-{verb}"), "data": data });
    let abort = json!({ "type": "abort", "data": {} });
    let mut all = vec![
        run("add", named("a")),
        run("add", named("a")),
        run("add", named("")),
        run("add", named(&"x".repeat(1024))),
        run("add", json!({ "node": "x", "name": "b" })),
        run("add", json!({ "node": "x", "name": "" })),
        run("add", json!({ "name": "b" })),
        run("add", json!({ "node": "disk" })),
        run("add", json!({ "node": "disk", "name": "b", "z": 1 })),
        run(
            "add",
            json!({ "node": "disk", "name": "b", "persistent": 5 }),
        ),
        run(
            "add",
            json!({ "node": "disk", "name": "d", "disabled": true, "granularity": 4096 }),
        ),
        run(
            "add",
            json!({ "node": "disk", "name": GUID, "persistent": true }),
        ),
        run(
            "add",
            json!({ "node": "disk", "name": GUID, "persistent": true }),
        ),
    ];
    for odd in [
        json!(1000),
        json!(256),
        json!(0),
        json!(-1),
        json!(1_u64 << 32),
        json!("4096"),
        json!(4096.5),
    ] {
        all.push(run("add", granular(odd)));
    }
    for verb in ["clear", "enable", "disable", "remove"] {
        all.extend([
            run(verb, named("x")),
            run(verb, named("")),
            run(verb, json!({ "node": "x", "name": "a" })),
            run(verb, json!({ "name": "a" })),
            run(verb, json!({ "node": "disk", "name": 1 })),
        ]);
    }
    all.extend([
        run("enable", named("d")),
        run("enable", named("d")),
        run("disable", named("a")),
        run("disable", named("a")),
        run("clear", named("a")),
        merge(json!(["d", GUID])),
        merge(json!(["d", "x"])),
        merge(json!([{ "node": "disk", "name": "d" }])),
        merge(json!([{ "node": "x", "name": "d" }])),
        merge(json!([{ "name": "d" }])),
        merge(json!([5])),
        merge(json!("d")),
        run(
            "merge",
            json!({ "node": "disk", "target": "x", "bitmaps": ["d"] }),
        ),
        run(
            "merge",
            json!({ "node": "x", "target": "a", "bitmaps": ["d"] }),
        ),
        run("merge", json!({ "node": "disk", "target": "a" })),
        act(json!([])),
        act(json!([
            action("add", named("e")),
            action("enable", named("a")),
            action("clear", named("d"))
        ])),
        act(json!([
            action("add", named("f")),
            action("clear", named("x"))
        ])),
        act(json!([action("add", named("f")), abort])),
        act(json!([
            action("remove", named("e")),
            action("add", named("g")),
            abort
        ])),
        act(json!([
            action("remove", named("e")),
            action("add", named("g"))
        ])),
        act(json!([action("add", json!({ "node": "disk" }))])),
        act(json!([action(
            "add",
            json!({ "node": "disk", "name": "h", "z": 1 })
        )])),
        act(json!([action(
            "merge",
            json!({ "node": "disk", "target": "a", "bitmaps": [1] })
        )])),
        act(json!([action("add", named("h")), { "type": "no-such", "data": {} }])),
        act(json!([{ "type": "abort" }])),
        act(json!([{ "type": "abort", "data": 1 }])),
        act(json!([{ "type": 5, "data": {} }])),
        act(json!([{ "data": {} }])),
        act(json!([{ "type": "abort", "data": {}, "z": 1 }])),
        act(json!([{ "type": "abort", "data": { "z": 1 } }])),
        act(json!([5])),
        act(json!(5)),
        ("transaction".to_owned(), json!({})),
        ("transaction".to_owned(), json!({ "actions": [], "z": 1 })),
        (
            "transaction".to_owned(),
            json!({ "actions": [], "properties": { "completion-mode": "individual" } }),
        ),
        (
            "transaction".to_owned(),
            json!({ "actions": [], "properties": { "completion-mode": "x" } }),
        ),
        (
            "transaction".to_owned(),
            json!({
                "actions": [action("clear", named("a"))],
                "properties": { "completion-mode": "grouped" },
            }),
        ),
        run("remove", named("a")),
        run("remove", named(GUID)),
        run("remove", named("d")),
        run("remove", named("g")),
    ]);
    all
}
