//! Jobs on a host that has little space: what is left of it is the guest's.

use serde_json::{Value, json};

use crate::common::img::ploop_img;
use crate::common::qmp::Qmp;
use crate::common::small_fs::SmallFs;
use crate::control::{control, serve};
use crate::death::expect;
use crate::deletions::raw_bundle;
use crate::front_end::*;
use crate::grow::rig_of;
use crate::{OK, Rig, expect_service, start_front_end, wait_for};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

/// What the snapshot has.
const NEEDED: u64 = 16 << 20;

/// In pieces of so many bytes.
const PIECE: u64 = 64 << 10;

fn write(ring: &mut Ring, piece: u64, byte: u8) {
    ring.fill(DATA, &[byte; PIECE as usize]);
    let data = [readable(DATA, PIECE as u32)];
    let sector = piece * PIECE / 512;
    assert_eq!(ring.run(VIRTIO_BLK_T_OUT, sector, &data), (OK, 1));
}

fn byte_of(piece: u64) -> u8 {
    1 + (piece % 200) as u8
}

fn rig(small: &SmallFs, cluster: u64) -> Rig {
    let mut rig = Rig::new();
    rig.image = small.root().join("bundle");
    let image = rig.image.to_str().unwrap();
    let cluster = cluster.to_string();
    ploop_img(["create", "--cluster-size", &cluster, image, "64M"]).ok();
    rig
}

fn job(qmp: &mut Qmp) -> Value {
    qmp.ask("query-jobs", json!({}))[0].clone()
}

fn progress(qmp: &mut Qmp) -> u64 {
    job(qmp)["current-progress"].as_u64().unwrap()
}

/// How the job has ended.
fn error_of(qmp: &mut Qmp) -> Option<String> {
    wait_for("its end", || job(qmp)["status"] == "concluded");
    let error = job(qmp)["error"].as_str().map(str::to_owned);
    qmp.ask("job-dismiss", json!({ "id": "job" }));
    error
}

#[test]
fn a_deletion_leaves_what_space_there_is_to_the_guest() {
    expect_space_for_the_guest(64 << 10);
}

/// As far as is known before the first of them, these might share their data.
#[test]
fn a_deletion_that_copies_large_clusters_too() {
    expect_space_for_the_guest(1 << 20);
}

fn expect_space_for_the_guest(cluster: u64) {
    let Some(small) = SmallFs::tmpfs(64 << 20) else {
        return;
    };
    let rig = rig(&small, cluster);
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    for piece in 0..NEEDED / PIECE {
        write(&mut front_end.rings[0], piece, byte_of(piece));
    }
    let mut qmp = Qmp::connect(&control(&rig));
    let guid = qmp.ask("snapshot-create", json!({}))["guid"].clone();
    let with_speed = |speed: u64| json!({ "guid": guid, "job-id": "job", "speed": speed, "auto-dismiss": false });

    // It does not begin where it cannot end.
    let ballast = small.fill_but(NEEDED - cluster);
    qmp.ask("snapshot-delete", with_speed(0));
    let error = error_of(&mut qmp).unwrap();
    assert!(error.contains("not enough space"), "{error}");
    ballast.remove();

    // One cluster, and then none for a day.
    qmp.ask("snapshot-delete", with_speed(1));
    wait_for("a step", || progress(&mut qmp) > 0);
    let ballast = small.fill_but(NEEDED / 2);
    qmp.ask(
        "block-job-set-speed",
        json!({ "device": "job", "speed": 0 }),
    );
    wait_for("its pause", || {
        qmp.ask("query-block-jobs", json!({}))[0]["io-status"] == "nospace"
    });
    // It has not taken what is left: that is there for the guest.
    for piece in 0..NEEDED / PIECE / 4 {
        write(&mut front_end.rings[0], NEEDED / PIECE + piece, 7);
    }
    let copied = progress(&mut qmp);
    assert!(copied < NEEDED / 2, "{copied}");
    ballast.remove();
    assert_eq!(error_of(&mut qmp), None);
    for piece in 0..NEEDED / PIECE {
        expect(&mut front_end, piece * PIECE / 512, byte_of(piece));
    }
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();
}

/// What the guest has written meanwhile takes no space any more, wherever that is.
#[test]
fn a_deletion_asks_for_no_space_for_what_the_guest_has_copied() {
    let Some(small) = SmallFs::tmpfs(64 << 20) else {
        return;
    };
    let cluster = 64 << 10;
    let rig = rig(&small, cluster);
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    for piece in 0..NEEDED / PIECE {
        write(&mut front_end.rings[0], piece, byte_of(piece));
    }
    let mut qmp = Qmp::connect(&control(&rig));
    let guid = qmp.ask("snapshot-create", json!({}))["guid"].clone();
    let _ballast = small.fill_but(NEEDED + (4 << 20));
    let slow = json!({ "guid": guid, "job-id": "job", "speed": 1, "auto-dismiss": false });
    qmp.ask("snapshot-delete", slow);
    wait_for("a step", || progress(&mut qmp) > 0);
    // Far from where the job is, which has not enough left for all of it then.
    for piece in NEEDED / PIECE / 2..NEEDED / PIECE {
        write(&mut front_end.rings[0], piece, 7);
    }
    let speed = json!({ "device": "job", "speed": 0 });
    qmp.ask("block-job-set-speed", speed);
    assert_eq!(error_of(&mut qmp), None);
    for piece in 0..NEEDED / PIECE {
        let byte = if piece < NEEDED / PIECE / 2 {
            byte_of(piece)
        } else {
            7
        };
        expect(&mut front_end, piece * PIECE / 512, byte);
    }
    drop(front_end);
    backend.stop();
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();
}

/// What a raw image does not have takes no space in the image above it, either.
#[test]
fn a_raw_image_goes_where_there_is_space_for_what_it_has() {
    let Some(small) = SmallFs::tmpfs(64 << 20) else {
        return;
    };
    let rig = rig_of(|_| Some(raw_bundle(small.root()))).unwrap();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    // Here and there.
    let pieces: Vec<u64> = (0..64).map(|index| 16 * index + index % 3).collect();
    for piece in &pieces {
        write(&mut front_end.rings[0], *piece, byte_of(*piece));
    }
    let mut qmp = Qmp::connect(&control(&rig));
    let guid = qmp.ask("snapshot-create", json!({}))["guid"].clone();
    // Twice what there is, for what the file grows ahead.
    let _ballast = small.fill_but(8 << 20);
    let delete = json!({ "guid": guid, "job-id": "job", "auto-dismiss": false });
    qmp.ask("snapshot-delete", delete);
    assert_eq!(error_of(&mut qmp), None);
    for piece in 0..1024 {
        let byte = if pieces.contains(&piece) {
            byte_of(piece)
        } else {
            0
        };
        expect(&mut front_end, piece * PIECE / 512, byte);
    }
    drop(front_end);
    backend.stop();
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();
}

/// Those that are there stay until they are written anew, so they are lost then.
#[test]
fn who_changes_bitmaps_where_there_is_no_space_is_told_that_all_are_lost() {
    let Some(small) = SmallFs::tmpfs(16 << 20) else {
        return;
    };
    let rig = rig(&small, 64 << 10);
    let image = rig.image.to_str().unwrap();
    let name = ploop_img(["bitmap", "add", image]).ok();
    let other = ploop_img(["bitmap", "add", image]).ok();
    let backend = serve(&rig, &[]);
    write(&mut start_front_end(backend.socket()).rings[0], 0, 1);
    let clear = json!({ "node": "disk", "name": other.trim() });
    Qmp::connect(&control(&rig)).ask("block-dirty-bitmap-clear", clear);
    backend.stop();
    let ballast = small.fill_but(0);
    // What is refused is no change.
    let refused = ploop_img(["bitmap", "add", image, name.trim()]).fails();
    assert!(refused.contains("already exists"), "{refused}");
    assert!(
        ploop_img(["bitmap", "list", image])
            .ok()
            .contains(name.trim())
    );
    // What is the other's takes more than there is.
    let merge = ["bitmap", "merge", image, other.trim(), name.trim()];
    let failed = ploop_img(merge).fails();
    assert!(failed.contains("all are lost"), "{failed}");
    assert_eq!(ploop_img(["bitmap", "list", image]).ok(), "");
    ploop_img(["check", image]).ok();
    ballast.remove();
    ploop_img(["bitmap", "add", image]).ok();
    ploop_img(["check", image]).ok();
}
