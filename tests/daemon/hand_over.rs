//! Two daemons with one image, which is open only while a ring runs (`--lock running`): what
//! hosts do between which a guest is migrated.

use std::ffi::OsStr;
use std::io::{Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::json;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::common::backend::Backend;
use crate::common::img::{LEAKS, image_file, ploop_img, qemu_img_check};
use crate::common::qmp::Qmp;
use crate::death::{CLUSTER, Region, begin, expect, reconnect, write};
use crate::front_end::*;
use crate::grow::{create, rig_of, with_snapshots};
use crate::{OK, Rig, jobs, wait_for};

const RUNNING: &[&str] = &["--lock=running", "--writeback-delay=60000"];

/// Two daemons of two hosts, as it were.
pub struct Hosts {
    pub rig: Rig,
    pub one: Backend,
    pub other: Backend,
}

impl Hosts {
    pub fn of(rig: Rig) -> Self {
        let one = serve(&rig, "one", &[]);
        let other = serve(&rig, "other", &[]);
        Self { rig, one, other }
    }

    pub fn end(self) {
        self.one.stop();
        self.other.stop();
        check(&self.rig.image);
    }
}

/// Serves it on a socket of that name.
fn serve(rig: &Rig, name: &str, options: &[&str]) -> Backend {
    let control = format!("--control={}", control(rig, name).display());
    let options = [RUNNING, &[&control], options].concat();
    Backend::start(&rig.image, &rig.folder.path().join(name), &options)
}

fn control(rig: &Rig, name: &str) -> PathBuf {
    rig.folder.path().join(format!("{name}.control"))
}

fn check(disk: &Path) {
    ploop_img(["check".as_ref(), disk.as_os_str()]).ok();
    qemu_img_check(&image_file(disk));
}

/// Whether the image was closed, and nobody has it open.
pub fn is_free(disk: &Path) -> bool {
    ploop_img(["check".as_ref(), disk.as_os_str()]).code == Some(0)
}

/// The same, but what was unmapped last may still take space: a hand-over in haste leaves that
/// to the next opening.
fn is_closed(disk: &Path) -> bool {
    let code = ploop_img(["check".as_ref(), disk.as_os_str()]).code;
    code == Some(0) || code == Some(LEAKS)
}

/// The front-end stops all rings, and keeps the connection.
pub fn stop_rings(front_end: &mut FrontEnd) {
    for index in 0..front_end.rings.len() {
        let base = front_end.vhost.get_vring_base(index).unwrap();
        let ring = &front_end.rings[index];
        assert_eq!(base, u32::from(ring.avail_idx()), "all is answered");
    }
}

/// What a driver tells its front-end of the ring that it uses; refused or not.
fn try_start(front_end: &mut FrontEnd) -> vhost::Result<()> {
    let base = front_end.rings[0].avail_idx();
    // A ring that was enabled before runs as soon as it has a kick.
    front_end.try_start_ring_at(0, base)?;
    front_end.vhost.set_vring_enable(0, true)
}

/// The same driver, by the front-end of another host: its memory goes along.
fn migrate(from: &FrontEnd, to: &Backend) -> FrontEnd {
    let mut front_end = FrontEnd::connect_with(to.socket(), from);
    front_end.negotiate(u64::MAX);
    front_end
}

/// A guest is refused for that. What a process has begun that was killed may have to end
/// first: until then the image is locked.
fn expect_refusal(backend: &Backend, why: &str, connect: impl Fn() -> FrontEnd) {
    wait_for(why, || {
        try_start(&mut connect()).unwrap_err();
        backend.log().contains(why)
    });
}

pub fn bare() -> Rig {
    Rig::new()
}

pub fn bundle() -> Rig {
    rig_of(|folder| Some(with_snapshots(folder))).unwrap()
}

/// Without snapshots.
fn plain_bundle() -> Rig {
    rig_of(|folder| Some(create(folder, "bundle", &[]))).unwrap()
}

#[test]
fn a_second_one_starts_while_the_first_serves_and_has_its_turn() {
    for rig in [bare(), bundle()] {
        let hosts = Hosts::of(rig);
        assert!(is_free(&hosts.rig.image), "nobody uses it yet");
        let (mut source, _region) = begin(&hosts.one);
        write(&mut source, 5 * CLUSTER, 1);
        let locked = ploop_img(["check".as_ref(), hosts.rig.image.as_os_str()]).fails();
        assert!(locked.contains("open for writing"), "{locked}");

        let mut early = FrontEnd::connect(hosts.other.socket());
        early.negotiate(u64::MAX);
        let capacity = u64::from_le_bytes(early.get_config(0, 8).try_into().unwrap());
        assert_eq!(capacity, (64 << 20) / 512);
        try_start(&mut early).unwrap_err();
        hosts.other.expect_to_say("has the image open for writing");
        write(&mut source, 6 * CLUSTER, 2);

        stop_rings(&mut source);
        assert!(is_free(&hosts.rig.image), "{}", hosts.one.log());
        let mut target = migrate(&source, &hosts.other);
        target.start_rings();
        expect(&mut target, 5 * CLUSTER, 1);
        expect(&mut target, 6 * CLUSTER, 2);
        write(&mut target, 6 * CLUSTER, 3);
        // A front-end that has stopped does not come to the image any more.
        try_start(&mut source).unwrap_err();
        hosts.one.expect_to_say("has the image open for writing");

        stop_rings(&mut target);
        drop(target.vhost.get_features());
        let mut back = migrate(&target, &hosts.one);
        back.start_rings();
        expect(&mut back, 6 * CLUSTER, 3);
        drop(back);
        wait_for("the end of the front-end", || is_free(&hosts.rig.image));
        hosts.end();
    }
}

#[test]
fn rings_that_start_again_find_what_another_host_has_written() {
    let hosts = Hosts::of(bundle());
    let (mut source, region) = begin(&hosts.one);
    write(&mut source, CLUSTER, 1);
    for round in 0..3 {
        // A migration that comes to nothing, after the destination has had the image.
        stop_rings(&mut source);
        let mut target = migrate(&source, &hosts.other);
        target.start_rings();
        write(&mut target, CLUSTER, 10 + round);
        write(&mut target, (20 + u64::from(round)) * CLUSTER, round);
        let moved = target.driver();
        drop(target);
        wait_for("the end of the front-end", || is_free(&hosts.rig.image));
        source.go_on_as(moved);
        if round == 1 {
            // QEMU gives the region again when it goes on, and another connection does.
            reconnect(&mut source, &hosts.one, Some(&region));
        }
        source.start_rings();
        expect(&mut source, CLUSTER, 10 + round);
        expect(&mut source, (20 + u64::from(round)) * CLUSTER, round);
        write(&mut source, 2 * CLUSTER, round);
    }
    drop(source);
    hosts.end();
}

#[test]
fn pauses_and_reboots_close_the_image_and_open_it_again() {
    let rig = bare();
    let one = serve(&rig, "one", &[]);
    let (mut front_end, region) = begin(&one);
    for round in 1..5 {
        write(&mut front_end, u64::from(round) * CLUSTER, round);
        match round {
            // As cloud-hypervisor pauses: the rings keep all else.
            1 => {
                for index in 0..front_end.rings.len() {
                    front_end.vhost.set_vring_enable(index, false).unwrap();
                }
                assert!(is_free(&rig.image));
                for index in 0..front_end.rings.len() {
                    front_end.vhost.set_vring_enable(index, true).unwrap();
                }
            }
            // As QEMU goes on after a pause.
            2 => {
                stop_rings(&mut front_end);
                assert!(is_free(&rig.image));
                crate::death::set_region(&mut front_end, &region).unwrap();
                front_end.start_rings();
            }
            // As a device is reset, by firmware and then by a kernel.
            3 => {
                stop_rings(&mut front_end);
                for ring in &mut front_end.rings {
                    ring.forget();
                }
                let region = crate::death::ask_for_region(&mut front_end);
                crate::death::set_region(&mut front_end, &region).unwrap();
                front_end.start_rings();
            }
            // Some rings stop, and one runs on.
            _ => {
                for index in 1..front_end.rings.len() {
                    front_end.vhost.get_vring_base(index).unwrap();
                }
                assert!(!is_free(&rig.image));
            }
        }
        expect(&mut front_end, u64::from(round) * CLUSTER, round);
    }
    drop(front_end);
    one.stop();
    check(&rig.image);
}

#[test]
fn what_a_killed_process_knew_comes_back_to_its_own_guest_alone() {
    let hosts = Hosts::of(bare());
    let (mut source, region) = begin(&hosts.one);
    write(&mut source, 7 * CLUSTER, 7);
    hosts.one.kill();
    // Nobody else goes on with that guest: only its region has the mapping.
    expect_refusal(&hosts.other, "has kept no in-flight region", || {
        migrate(&source, &hosts.other)
    });
    let one = serve(&hosts.rig, "one", &[]);
    reconnect(&mut source, &one, Some(&region));
    source.start_rings();
    expect(&mut source, 7 * CLUSTER, 7);
    stop_rings(&mut source);
    let mut target = migrate(&source, &hosts.other);
    target.start_rings();
    expect(&mut target, 7 * CLUSTER, 7);
    write(&mut target, 8 * CLUSTER, 8);
    // The other one dies, too, and its guest comes back without what that one knew.
    hosts.other.kill();
    drop(source);
    one.expect_to_say("has disconnected");
    expect_refusal(&one, "has kept no in-flight region", || {
        migrate(&target, &one)
    });
    one.stop();
    // Until somebody decides that this guest does not go on.
    let disk = hosts.rig.image.as_os_str();
    let checked = ploop_img(["check".as_ref(), disk]);
    assert!(
        checked.stdout.contains("was not closed cleanly"),
        "{checked:?}"
    );
    ploop_img(
        ["check", "--repair", "all"]
            .map(OsStr::new)
            .into_iter()
            .chain([disk]),
    )
    .ok();
    check(&hosts.rig.image);
}

#[test]
fn a_region_is_of_no_use_once_another_guest_was_served() {
    let rig = bare();
    let one = serve(&rig, "one", &[]);
    let (mut first, region): (FrontEnd, Region) = begin(&one);
    write(&mut first, CLUSTER, 1);
    let (nowhere, _) = UnixStream::pair().unwrap();
    first.vhost = vhost::vhost_user::Frontend::from_stream(nowhere, QUEUES.into());
    let mut second = crate::start_front_end(one.socket());
    write(&mut second, CLUSTER, 2);
    drop(second);
    wait_for("the end of the front-end", || is_free(&rig.image));
    reconnect(&mut first, &one, Some(&region));
    try_start(&mut first).unwrap_err();
    one.expect_to_say("the guest might not find data");
    one.stop();
    check(&rig.image);
}

#[test]
fn a_disk_that_became_larger_or_smaller_in_between() {
    for rig in [bare(), plain_bundle()] {
        let disk = rig.image.as_os_str();
        let one = serve(&rig, "one", &[]);
        let mut front_end = FrontEnd::connect(one.socket());
        front_end.negotiate(u64::MAX);
        front_end.get_config(0, 60);
        let resize = |size: &str| {
            ploop_img([
                OsStr::new("resize"),
                "--shrink".as_ref(),
                disk,
                size.as_ref(),
            ])
            .ok();
        };
        resize("80M");
        front_end.start_rings();
        // The whole of it is served, whatever the front-end has read.
        write(&mut front_end, (70 << 20) / 512, 7);
        expect(&mut front_end, (70 << 20) / 512, 7);
        stop_rings(&mut front_end);
        assert_eq!(
            u64::from_le_bytes(front_end.get_config(0, 8).try_into().unwrap()),
            (80 << 20) / 512
        );
        resize("48M");
        try_start(&mut front_end).unwrap_err();
        one.expect_to_say("it was made smaller");
        one.stop();
        check(&rig.image);
    }
}

#[test]
fn a_snapshot_that_was_made_in_between_is_served_below_the_new_top() {
    let rig = bundle();
    let one = serve(&rig, "one", &[]);
    let (mut front_end, _region) = begin(&one);
    write(&mut front_end, CLUSTER, 1);
    stop_rings(&mut front_end);
    ploop_img([
        "snapshot".as_ref(),
        "create".as_ref(),
        rig.image.as_os_str(),
    ])
    .ok();
    front_end.start_rings();
    expect(&mut front_end, CLUSTER, 1);
    write(&mut front_end, CLUSTER, 2);
    let mut qmp = Qmp::connect(&control(&rig, "one"));
    let nodes = qmp.ask("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 4, "{nodes}");
    // It can grow, too: its descriptor is read anew.
    qmp.ask(
        "block_resize",
        json!({ "device": "disk", "size": 80 << 20 }),
    );
    stop_rings(&mut front_end);
    let info = ploop_img(["info".as_ref(), rig.image.as_os_str()]).ok();
    assert!(info.contains("80 MiB"), "{info}");
    drop(front_end);
    one.stop();
    check(&rig.image);
}

#[test]
fn control_clients_are_answered_while_the_image_is_not_open() {
    let rig = bundle();
    let metrics = rig.folder.path().join("metrics");
    let one = serve(
        &rig,
        "one",
        &[&format!("--metrics=unix:{}", metrics.display())],
    );
    let mut qmp = Qmp::connect(&control(&rig, "one"));
    let queries = [
        "query-status",
        "query-block",
        "query-blockstats",
        "query-named-block-nodes",
        "query-engine",
        "query-latencies",
    ];
    let size = |qmp: &mut Qmp| {
        let block = qmp.ask("query-block", json!({}));
        block[0]["inserted"]["image"]["virtual-size"].clone()
    };
    let is_open = |qmp: &mut Qmp| qmp.ask("query-engine", json!({}))["image-open"].clone();
    let grow = json!({ "device": "disk", "size": 80 << 20 });
    for is_first in [true, false] {
        for query in queries {
            qmp.ask(query, json!({}));
        }
        let page = scrape(&metrics);
        let is_closed = |line: &str| line.starts_with("ploop_image_open{") && line.ends_with(" 0");
        assert!(page.lines().any(is_closed), "{page}");
        assert_eq!(size(&mut qmp), 64 << 20);
        assert_eq!(is_open(&mut qmp), false);
        for (command, arguments, tool) in [
            ("block_resize", grow.clone(), "'ploop-img resize'"),
            ("grow", json!({ "by": 1 << 20 }), "'ploop-img resize'"),
            ("snapshot-create", json!({}), "'ploop-img snapshot create'"),
        ] {
            let refused = qmp.answer(command, arguments);
            let desc = refused["error"]["desc"].as_str().unwrap();
            assert!(desc.contains("no guest uses the disk"), "{desc}");
            assert!(desc.contains(tool), "{desc}");
        }
        qmp.ask("flush", json!({}));
        qmp.ask("snapshot-list", json!({}));
        if is_first {
            let (mut front_end, _region) = begin(&one);
            write(&mut front_end, CLUSTER, 1);
            assert_eq!(is_open(&mut qmp), true);
            drop(front_end);
            wait_for("the end of the front-end", || is_free(&rig.image));
        }
    }
    let (mut front_end, _region) = begin(&one);
    qmp.ask("block_resize", grow);
    let source = [readable(DATA, 512)];
    let answer = front_end.rings[0].run(VIRTIO_BLK_T_OUT, (79 << 20) / 512, &source);
    assert_eq!(answer, (OK, 1));
    stop_rings(&mut front_end);
    assert_eq!(size(&mut qmp), 80 << 20);
    qmp.ask("quit", json!({}));
    drop(front_end);
    one.ends();
    check(&rig.image);
}

/// The snapshot's end is heard of by the main thread, and the image may be closed before.
#[test]
fn snapshots_of_a_running_disk_are_closed_with_it() {
    let hosts = Hosts::of(plain_bundle());
    let (mut front_end, _region) = begin(&hosts.one);
    let mut qmp = Qmp::connect(&control(&hosts.rig, "one"));
    let file_id = |qmp: &mut Qmp| qmp.ask("query-engine", json!({}))["file-id"].clone();
    let mut made = 0;
    for round in 0..12_u8 {
        let (first_id, cluster) = (file_id(&mut qmp), u64::from(round) + 1);
        write(&mut front_end, cluster * CLUSTER, round);
        qmp.begin(
            "snapshot-create",
            json!({ "description": format!("{round}") }),
        );
        if round < 4 {
            // Nobody else is in its way.
            assert!(qmp.end("snapshot-create")["return"]["guid"].is_string());
            assert_ne!(file_id(&mut qmp), first_id);
            write(&mut front_end, cluster * CLUSTER, 100 + round);
            stop_rings(&mut front_end);
        } else {
            std::thread::sleep(std::time::Duration::from_millis(3 * (u64::from(round) - 4)));
            stop_rings(&mut front_end);
        }
        let listed = snapshots(&hosts.rig.image);
        assert!(is_free(&hosts.rig.image), "{}", hosts.one.log());
        // It is the other one's at once.
        let mut target = migrate(&front_end, &hosts.other);
        target.start_rings();
        let expected = if round < 4 { 100 + round } else { round };
        expect(&mut target, cluster * CLUSTER, expected);
        write(&mut target, cluster * CLUSTER, 200 + round);
        let moved = target.driver();
        drop(target);
        wait_for("the end of the front-end", || is_free(&hosts.rig.image));
        if round >= 4 {
            let answer = qmp.end("snapshot-create");
            let is_made = answer["return"]["guid"].is_string();
            let reasons = ["called off", "no guest uses the disk", "opened or closed"];
            let desc = answer["error"]["desc"].as_str().unwrap_or_default();
            assert!(
                is_made || reasons.iter().any(|why| desc.contains(why)),
                "{answer}"
            );
            assert_eq!(listed, made + usize::from(is_made), "{answer}");
            assert_eq!(file_id(&mut qmp) != first_id, is_made);
        }
        made = listed;
        front_end.go_on_as(moved);
        front_end.start_rings();
        expect(&mut front_end, cluster * CLUSTER, 200 + round);
        let nodes = qmp.ask("query-named-block-nodes", json!({}));
        assert_eq!(nodes.as_array().unwrap().len(), made + 1, "{nodes}");
    }
    drop(front_end);
    hosts.end();
}

/// A job that is under way when the last ring stops, at its beginning or later.
#[test]
fn a_job_is_called_off_and_the_next_host_can_do_it() {
    let hosts = Hosts::of(jobs::rig());
    let (mut source, _region) = begin(&hosts.one);
    jobs::prepare(&mut source);
    let mut qmp = Qmp::connect(&control(&hosts.rig, "one"));
    for delay_ms in [None, Some(5), Some(15)] {
        match delay_ms {
            None => {
                jobs::begin_slowly(&mut qmp, json!({}));
                jobs::statuses(&mut qmp, "running");
            }
            Some(ms) => {
                qmp.ask(
                    "compact",
                    json!({ "job-id": "slow", "auto-dismiss": false }),
                );
                std::thread::sleep(std::time::Duration::from_millis(ms));
            }
        }
        stop_rings(&mut source);
        assert!(is_closed(&hosts.rig.image), "{}", hosts.one.log());
        jobs::statuses(&mut qmp, "concluded");
        let job = &jobs::jobs(&mut qmp)[0];
        assert_eq!(job["status"], "concluded", "{job}");
        if delay_ms.is_none() {
            assert_eq!(job["error"], "Operation canceled");
        }
        qmp.ask("job-dismiss", json!({ "id": "slow" }));

        let mut target = migrate(&source, &hosts.other);
        target.start_rings();
        jobs::expect_prepared(&mut target);
        let moved = target.driver();
        drop(target);
        wait_for("the end of the front-end", || is_closed(&hosts.rig.image));
        source.go_on_as(moved);
        source.start_rings();
    }
    stop_rings(&mut source);
    let mut target = migrate(&source, &hosts.other);
    target.start_rings();
    let mut qmp = Qmp::connect(&control(&hosts.rig, "other"));
    qmp.ask("compact", json!({}));
    jobs::statuses(&mut qmp, "null");
    jobs::expect_prepared(&mut target);
    drop((source, target));
    hosts.end();
}

/// How many there are.
fn snapshots(disk: &Path) -> usize {
    let args = ["snapshot", "list", "--output=json", disk.to_str().unwrap()];
    let list: serde_json::Value = serde_json::from_str(&ploop_img(args).ok()).unwrap();
    list.as_array().unwrap().len() - 1
}

/// A page of metrics.
fn scrape(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}

#[test]
fn what_cannot_be_is_refused_at_the_start() {
    let rig = bare();
    let folder = rig.folder.path();
    let image = format!("--blk-file={}", rig.image.display());
    let upgrade = format!("--upgrade-socket={}", folder.join("upgrade").display());
    let said = rig.refused(&[&image, "--lock=running", &upgrade]);
    assert!(said.contains("does not go with"), "{said}");
    let none = create(folder, "other.hds", &[]);
    std::fs::write(&none, "no image").unwrap();
    let none = format!("--blk-file={}", none.display());
    let said = rig.refused(&[&none, "--lock=running"]);
    assert!(said.contains("other.hds"), "{said}");
}

#[test]
fn a_disk_that_is_only_read_is_locked_while_a_ring_runs() {
    let rig = bundle();
    let one = serve(&rig, "one", &["--read-only"]);
    let write = || {
        let grow = [OsStr::new("resize"), rig.image.as_os_str(), "+1M".as_ref()];
        ploop_img(grow).code == Some(0)
    };
    assert!(write());
    let mut front_end = crate::start_front_end(one.socket());
    assert!(!write());
    expect(&mut front_end, 0, 0);
    stop_rings(&mut front_end);
    assert!(write());
    drop(front_end);
    one.stop();
    check(&rig.image);
}
