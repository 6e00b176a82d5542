//! `ploop-img` looks at disks that are being served.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_OUT};

use crate::common::img::{Ran, ploop_img_command};
use crate::common::qmp::Qmp;
use crate::front_end::*;
use crate::grow::create;
use crate::stat::{Host, VARIABLE};
use crate::{OK, start_front_end};

const SECTORS: u64 = 1 << 11;

fn ploop_img(host: &Host, args: &[&str]) -> Ran {
    let mut command = ploop_img_command();
    command.env(VARIABLE, &host.runtime).args(args);
    command.arg(&host.rig.image).stdin(Stdio::null());
    command.output().unwrap().into()
}

/// The map, as qemu-img prints it.
fn map(host: &Host) -> Value {
    serde_json::from_str(&ploop_img(host, &["map", "--output=json"]).ok()).unwrap()
}

fn write(front_end: &mut FrontEnd, cluster: u64) {
    let data = [readable(DATA, 4096)];
    let ring = &mut front_end.rings[0];
    assert_eq!(ring.run(VIRTIO_BLK_T_OUT, cluster * SECTORS, &data).0, OK);
}

fn discard(front_end: &mut FrontEnd, cluster: u64) {
    let mut range = (cluster * SECTORS).to_le_bytes().to_vec();
    range.extend((SECTORS as u32).to_le_bytes());
    range.extend([0; 4]);
    front_end.fill(DATA + 8192, &range);
    let data = [readable(DATA + 8192, 16)];
    assert_eq!(front_end.rings[0].run(VIRTIO_BLK_T_DISCARD, 0, &data).0, OK);
}

fn with_bundle() -> Host {
    let mut host = Host::new();
    host.rig.image = create(host.rig.folder.path(), "bundle", &[]);
    ploop_img_command()
        .args(["snapshot", "create"])
        .arg(&host.rig.image)
        .status()
        .unwrap();
    host
}

#[test]
fn a_running_disk_is_mapped_and_checked_as_it_is() {
    let host = with_bundle();
    // What is written stays in memory for as long as nobody asks.
    let backend = host.serve(&["--writeback-delay=60000"]);
    let mut front_end = start_front_end(backend.socket());
    front_end.fill(DATA, &[7; 4096]);
    for cluster in [9, 3, 4] {
        write(&mut front_end, cluster);
    }
    let shown = map(&host);
    let present = |map: &Value| -> Vec<u64> {
        let entries = map.as_array().unwrap().iter();
        let present = entries.filter(|entry| entry["present"] == true && entry["depth"] == 0);
        present
            .map(|it| it["start"].as_u64().unwrap() >> 20)
            .collect()
    };
    // Host clusters are given out in turn, so two that follow each other are one.
    assert_eq!(present(&shown), [3, 9], "{shown}");
    let shown_check = ploop_img(&host, &["check"]).ok();
    assert!(shown_check.contains("The disk is clean."), "{shown_check}");
    assert!(shown_check.contains("is being served"), "{shown_check}");
    let as_json: Value =
        serde_json::from_str(&ploop_img(&host, &["check", "--output=json"]).ok()).unwrap();
    assert_eq!(
        (&as_json["corruptions"], &as_json["leaks"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(as_json["levels"].as_array().unwrap().len(), 2, "{as_json}");
    // A repair would change what the process has in memory.
    let said = ploop_img(&host, &["check", "--repair=all"]).fails();
    assert!(said.contains("stop it first"), "{said}");
    let listed = ploop_img(&host, &["snapshot", "list", "--output=json"]).ok();
    let control = Path::new(&host.runtime).join(
        fs::read_dir(&host.runtime)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .file_name(),
    );
    let mut qmp = Qmp::connect(&control.join("control"));
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let told = qmp.ask("snapshot-list", json!({}));
    // What the two call the folder is theirs to say.
    let plain = |list: &Value| -> Vec<Value> {
        let names = ["guid", "parent", "current", "depth", "date"];
        let nodes = list.as_array().unwrap().iter();
        nodes
            .map(|node| names.iter().map(|name| node[*name].clone()).collect())
            .collect()
    };
    assert_eq!(plain(&told), plain(&listed));
    assert_eq!(plain(&told).len(), 2);
    drop(front_end);
    backend.stop();
    assert_eq!(map(&host), shown);
    let after: Value =
        serde_json::from_str(&ploop_img(&host, &["check", "--output=json"]).ok()).unwrap();
    assert_eq!(after["allocated-clusters"], as_json["allocated-clusters"]);
}

#[test]
fn a_check_of_a_running_disk_raises_no_alarm_but_a_true_one() {
    let host = with_bundle();
    let backend = host.serve(&["--writeback-delay=0"]);
    let mut front_end = start_front_end(backend.socket());
    front_end.fill(DATA, &[7; 4096]);
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Clusters go round: each is unmapped, given out again, and mapped elsewhere.
            for round in (0_u64..).take_while(|_| !ends.load(Relaxed)) {
                write(&mut front_end, round * 7 % 50);
                discard(&mut front_end, (round * 7 + 13) % 50);
            }
        });
        let checked = scope.spawn(|| {
            for _ in 0..10 {
                ploop_img(&host, &["check"]).ok();
                ploop_img(&host, &["map"]).ok();
            }
        });
        let checked = checked.join();
        ends.store(true, Relaxed);
        checked.unwrap();
    });
    // In a level that nobody changes nothing is hidden.
    let entries = fs::read_dir(&host.rig.image).unwrap();
    let names = entries.map(|entry| entry.unwrap().path());
    let base = names.filter(|path| path.extension().is_some_and(|it| it == "hds"));
    let base = base.into_iter().next().expect("there is a base");
    let mut base = OpenOptions::new().append(true).open(base).unwrap();
    base.write_all(&vec![1; 1 << 20]).unwrap();
    assert_eq!(ploop_img(&host, &["check"]).code, Some(3));
    drop(front_end);
    backend.stop();
    assert_eq!(ploop_img(&host, &["check"]).code, Some(3));
}

#[test]
fn a_process_that_is_hidden_is_found_by_its_socket() {
    let host = Host::new();
    let control = host.rig.folder.path().join("control");
    let named = format!("--control={}", control.display());
    let backend = host.serve(&[&named]);
    for verb in ["check", "map"] {
        let said = ploop_img(&host, &[verb]).fails();
        assert!(said.contains("stop it first"), "{said}");
        ploop_img(&host, &[verb, &named]).ok();
        let other = format!("{named}-other");
        let said = ploop_img(&host, &[verb, &other]).fails();
        assert!(said.contains("cannot connect"), "{said}");
    }
    backend.stop();
}
