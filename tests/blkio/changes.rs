//! What is done to a disk that is served from storage which hosts share, where a server may take
//! the lock of each file away.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Client, Lane};
use crate::common::backend::Backend;
use crate::common::img::{names_in, ploop_img};
use crate::common::qmp::Qmp;
use crate::frail_fs::FrailFs;
use crate::stable::{flush, write};

fn expect(lane: &mut Lane, cluster: u64, byte: u8) {
    lane.read(cluster * (64 << 10), 4096, 0);
    assert_eq!(lane.wait(1), [(0, 0)]);
    assert_eq!(lane.bytes(0, 4096), [byte; 4096]);
}

#[test]
fn a_disk_on_shared_storage_grows_and_no_snapshot_is_made_of_it() {
    for lock in ["--lock=start", "--lock=running"] {
        let place = TempDir::new().unwrap();
        let bundle = place.path().join("disk");
        let small = ["--cluster-size", "64K", "16M"];
        ploop_img([&["create", bundle.to_str().unwrap()], &small[..]].concat()).ok();
        let Some(disk) = FrailFs::mount(&bundle, 1) else {
            return;
        };
        let control = place.path().join("control");
        let options = [lock, "--control", control.to_str().unwrap()];
        let backend = Backend::start(disk.root(), &place.path().join("socket"), &options);
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        let mut qmp = Qmp::connect(&control);
        for round in 1..4 {
            let refused = qmp.answer("snapshot-create", json!({}));
            let desc = refused["error"]["desc"].as_str().unwrap();
            assert!(desc.contains("is not watched yet"), "{desc}");
            assert_eq!(write(lane, 7, round), 0);
            qmp.ask("grow", json!({ "by": 1 << 20 }));
            // Where it ends now.
            assert_eq!(write(lane, 16 * (16 + u64::from(round)) - 1, round), 0);
            assert_eq!(flush(lane), 0);
            assert_eq!(qmp.ask("query-engine", json!({}))["lock"], "held");
            expect(lane, 7, round);
        }
        drop(client);
        // Once, and of what it sees when it starts.
        let log = backend.log();
        assert_eq!(log.matches("(type fuse) refuses").count(), 1, "{log}");
        assert!(!log.contains("(type unknown)"), "{log}");
        backend.stop();
        // Nothing is left of what was tried.
        let names = names_in(disk.root());
        let images = names.iter().filter(|name| name.contains("hds"));
        assert_eq!(images.collect::<Vec<_>>(), ["root.hds"], "{names:?}");
        ploop_img(["check".as_ref(), disk.root().as_os_str()]).ok();
    }
}

/// The one on which the top lies, and one that nothing lies on.
#[test]
fn no_snapshot_of_a_disk_on_shared_storage_is_deleted_beside_its_guest() {
    let place = TempDir::new().unwrap();
    let bundle = place.path().join("disk");
    let name = bundle.to_str().unwrap();
    ploop_img(["create", name, "16M"]).ok();
    for _ in 0..2 {
        ploop_img(["snapshot", "create", name]).ok();
    }
    let list = ploop_img(["snapshot", "list", "--output=json", name]).ok();
    let list: Vec<Value> = serde_json::from_str(&list).unwrap();
    let guids = list.iter().filter(|shot| shot["current"] == false);
    let guids: Vec<&str> = guids.map(|shot| shot["guid"].as_str().unwrap()).collect();
    assert_eq!(guids.len(), 2, "{list:?}");
    ploop_img(["snapshot", "switch", name, guids[0]]).ok();
    let Some(disk) = FrailFs::mount(&bundle, 1) else {
        return;
    };
    let control = place.path().join("control");
    let options = ["--control", control.to_str().unwrap()];
    let backend = Backend::start(disk.root(), &place.path().join("socket"), &options);
    let before = names_in(disk.root());
    let mut qmp = Qmp::connect(&control);
    for guid in guids {
        let of = json!({ "device": "disk", "id": guid });
        let refused = qmp.answer("blockdev-snapshot-delete-internal-sync", of);
        let desc = refused["error"]["desc"].as_str().unwrap();
        assert!(
            desc.contains("may take the lock of the disk away"),
            "{desc}"
        );
    }
    assert_eq!(names_in(disk.root()), before);
    backend.stop();
}
