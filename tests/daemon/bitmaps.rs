//! Dirty bitmaps of disks that are served, and what others read of them afterwards.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::common::backend::Backend;
use crate::common::qmp::Qmp;
use crate::common::sockets::is_listened_on;
use crate::common::{require_tool, tool};
use crate::control::{control, serve};
use crate::front_end::*;
use crate::grow::{create, rig_of};
use crate::upgrade::{Fake, GO, STATE, upgrades};
use crate::{OK, Rig, ploop_img, start_front_end, wait_for};

const GUID: &str = "c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5";
const GRANULARITY: u64 = 65536;

fn bundle() -> Rig {
    rig_of(|folder| Some(create(folder, "bundle", &[]))).unwrap()
}

fn named(name: &str) -> Value {
    json!({ "node": "disk", "name": name })
}

fn write(backend: &Backend, sectors: &[u64]) {
    let mut front_end = start_front_end(backend.socket());
    front_end.fill(DATA, &[7; 512]);
    for sector in sectors {
        let data = [readable(DATA, 512)];
        let (status, _) = front_end.rings[0].run(VIRTIO_BLK_T_OUT, *sector, &data);
        assert_eq!(status, OK);
    }
}

fn bitmaps(qmp: &mut Qmp) -> Value {
    qmp.ask("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"].clone()
}

fn top_of(qmp: &mut Qmp) -> PathBuf {
    let block = qmp.ask("query-block", json!({}));
    block[0]["inserted"]["file"].as_str().unwrap().into()
}

/// Of a disk that nobody serves: the starts of what QEMU takes for changed.
fn changed(image: &Path, folder: &Path) -> Vec<u64> {
    let socket = folder.join("nbd");
    let mut server = tool("qemu-nbd")
        .args(["--read-only", "--format=parallels", "--bitmap", GUID])
        .arg("--socket")
        .args([&socket, image])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("its socket", || {
        is_listened_on(&socket) || server.try_wait().unwrap().is_some()
    });
    let nbd = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{GUID}",
        socket.display()
    );
    let map = tool("qemu-img")
        .args(["map", "--output=json", "--image-opts", &nbd])
        .output()
        .unwrap();
    let _ = server.kill();
    let _ = server.wait();
    assert!(map.status.success(), "{map:?}");
    let map: Value = serde_json::from_slice(&map.stdout).unwrap();
    let extents = map.as_array().unwrap().iter();
    let changed = extents.filter(|extent| extent["data"] == false);
    let parts = changed.flat_map(|extent| {
        let [start, length] = ["start", "length"].map(|name| extent[name].as_u64().unwrap());
        (start..start + length).step_by(GRANULARITY as usize)
    });
    parts.collect()
}

#[test]
fn a_persistent_bitmap_outlives_the_process_and_a_snapshot_begins_it_anew() {
    if !require_tool("qemu-nbd") || !require_tool("qemu-img") {
        return;
    }
    let rig = bundle();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let persistent = json!({ "node": "disk", "name": GUID, "persistent": true });
    qmp.ask("block-dirty-bitmap-add", persistent);
    qmp.ask("block-dirty-bitmap-add", named("until the end"));
    write(&backend, &[0, 2048]);
    let count = 2 * GRANULARITY;
    // The newest first.
    assert_eq!(bitmaps(&mut qmp)[1]["count"], count);
    let top = top_of(&mut qmp);
    drop(qmp);
    backend.stop();
    assert_eq!(changed(&top, rig.folder.path()), [0, 1 << 20]);

    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    assert_eq!(
        bitmaps(&mut qmp),
        json!([{
            "name": GUID, "count": count, "granularity": GRANULARITY, "recording": true,
            "persistent": true, "busy": false,
        }])
    );
    let clear = json!({ "type": "block-dirty-bitmap-clear", "data": named(GUID) });
    let shot = json!({
        "type": "blockdev-snapshot-internal-sync", "data": { "device": "disk", "name": "one" },
    });
    // All of it or nothing.
    let wrong = json!({ "type": "block-dirty-bitmap-clear", "data": named("x") });
    let refused = qmp.answer("transaction", json!({ "actions": [shot, clear, wrong] }));
    assert_eq!(refused["error"]["desc"], "Dirty bitmap 'x' not found");
    assert_eq!(bitmaps(&mut qmp)[0]["count"], count);
    assert_eq!(
        qmp.ask("snapshot-list", json!({}))
            .as_array()
            .unwrap()
            .len(),
        1
    );
    qmp.ask("transaction", json!({ "actions": [shot, clear] }));
    assert_eq!(bitmaps(&mut qmp)[0]["count"], 0);
    assert_eq!(
        qmp.ask("snapshot-list", json!({}))
            .as_array()
            .unwrap()
            .len(),
        2
    );
    write(&backend, &[4096]);
    let top = top_of(&mut qmp);
    drop(qmp);
    backend.stop();
    assert_eq!(changed(&top, rig.folder.path()), [2 << 20]);

    // Nobody has closed it, so nothing is known.
    serve(&rig, &[]).kill();
    let backend = serve(&rig, &[]);
    assert_eq!(bitmaps(&mut Qmp::connect(&control(&rig))), Value::Null);
    backend.stop();
}

#[test]
fn ploop_img_does_the_same_whether_the_disk_is_served_or_not() {
    let rig = bundle();
    let control_option = format!("--control={}", control(&rig).display());
    let path = rig.image.to_str().unwrap();
    let bitmap = |verb: &str, names: &[&str]| {
        let args = ["bitmap", verb, path, &control_option];
        ploop_img(args.iter().chain(names))
    };
    let listed = || -> Value {
        let args = ["bitmap", "list", path, &control_option, "--output=json"];
        serde_json::from_str(&ploop_img(args).ok()).unwrap()
    };
    let mut backend = None;
    for is_served in [false, true] {
        if is_served {
            backend = Some(serve(&rig, &[]));
        }
        let name = bitmap("add", &[]).ok().trim().to_owned();
        assert_eq!(name.len(), GUID.len());
        assert_eq!(bitmap("add", &[GUID, "-g", "128k"]).ok(), "");
        let twice = bitmap("add", &[GUID]).fails();
        assert!(twice.contains("already exists"), "{twice}");
        let all = listed();
        assert_eq!(
            (&all[0]["name"], &all[1]["name"]),
            (&json!(name), &json!(GUID))
        );
        assert_eq!(all[1]["granularity"], 2 * GRANULARITY);
        if let Some(backend) = &backend {
            write(backend, &[0]);
            assert_eq!(bitmap("disable", &[GUID]).ok(), "");
            write(backend, &[1 << 12]);
            assert_eq!(bitmap("enable", &[GUID]).ok(), "");
            let count = |index: usize| listed()[index]["count"].as_u64().unwrap();
            assert_eq!((count(0), count(1)), (2 * GRANULARITY, 2 * GRANULARITY));
            assert_eq!(bitmap("clear", &[&name]).ok(), "");
            assert_eq!(count(0), 0);
        } else {
            let refused = bitmap("disable", &[GUID]).fails();
            assert!(refused.contains("each does when it is served"), "{refused}");
        }
        assert_eq!(bitmap("merge", &[GUID, &name]).ok(), "");
        for name in [&name, GUID] {
            assert_eq!(bitmap("remove", &[name]).ok(), "");
        }
        let gone = bitmap("clear", &[GUID]).fails();
        assert!(gone.contains("not found"), "{gone}");
        assert_eq!(listed(), json!([]));
    }
    if let Some(backend) = backend {
        backend.stop();
    }
    ploop_img(["check", path]).ok();
}

#[test]
fn a_process_that_goes_on_after_all_has_all_bitmaps_that_it_had() {
    let rig = bundle();
    let socket = format!("--upgrade-socket={}", upgrades(&rig).display());
    let backend = serve(&rig, &[&socket]);
    let mut qmp = Qmp::connect(&control(&rig));
    let add = |name: &str, is_persistent: bool| json!({ "node": "disk", "name": name, "persistent": is_persistent });
    for (name, is_persistent) in [(GUID, true), ("transient", false), ("disabled", false)] {
        qmp.ask("block-dirty-bitmap-add", add(name, is_persistent));
    }
    write(&backend, &[0, 1 << 12]);
    for name in [GUID, "disabled"] {
        qmp.ask("block-dirty-bitmap-disable", named(name));
    }
    let before = bitmaps(&mut qmp);
    let top = top_of(&mut qmp);
    // Before the other one has the image, and after.
    for (turn, until) in (1..).zip([STATE, GO]) {
        let mut failing = Fake::connect(&rig);
        failing.come_to_with(std::slice::from_ref(&top), "bundle", until);
        drop(failing);
        wait_for("its going on", || {
            backend.log().matches("has waited for").count() == turn
        });
        assert_eq!(bitmaps(&mut qmp), before);
    }
    write(&backend, &[1 << 13]);
    let counts = |bitmaps: &Value| -> Vec<u64> {
        let all = bitmaps.as_array().unwrap().iter();
        all.map(|bitmap| bitmap["count"].as_u64().unwrap())
            .collect()
    };
    let expected = counts(&before).into_iter().zip([0, 1, 0]);
    let expected: Vec<_> = expected
        .map(|(count, more)| count + more * GRANULARITY)
        .collect();
    assert_eq!(counts(&bitmaps(&mut qmp)), expected);
    backend.stop();
}
