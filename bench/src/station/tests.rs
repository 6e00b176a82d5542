//! The whole way of a run, with servers that are not ours: what is tested is that
//! the benchmark sees what they do.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::bed::Directories;
use crate::contestant::{PLAIN_FILE, QSD_PARALLELS, QSD_QCOW2};
use crate::image::Geometry;
use crate::workload::Order;

const GEOMETRY: Geometry = Geometry {
    disk_bytes: 16 << 20,
    cluster_bytes: None,
};

/// Whether the peer is there; where it has to be, a failure instead.
fn has_qsd() -> bool {
    let output = Command::new("qemu-storage-daemon")
        .arg("--version")
        .output();
    if output.is_ok() {
        return true;
    }
    assert!(
        std::env::var_os("PLOOP_REQUIRE_PEERS").is_none(),
        "qemu-storage-daemon is not installed"
    );
    eprintln!("LEFT OUT: qemu-storage-daemon is not installed");
    false
}

fn programs() -> Programs {
    Programs {
        server: PathBuf::new(),
        server_args: Vec::new(),
        other_build: None,
        img: PathBuf::new(),
    }
}

struct Rig {
    image: Image,
    contestant: Contestant,
}

impl Rig {
    fn filled(contestant: Contestant) -> Self {
        let directories = Directories {
            disk: std::env::temp_dir(),
            tmpfs: std::env::temp_dir(),
        };
        let image = Image::empty(&directories, Bed::PageCache, contestant, GEOMETRY).unwrap();
        fill(&programs(), Bed::PageCache, contestant, &image).unwrap();
        Self { image, contestant }
    }

    fn open(&self, workload: &Workload) -> Station {
        let shape = shape(workload);
        Station::open(
            &programs(),
            Bed::PageCache,
            self.contestant,
            &self.image,
            shape,
        )
        .unwrap()
    }
}

fn workload(action: Action) -> Workload {
    Workload {
        name: "test".into(),
        action,
        order: Order::Random,
        request_bytes: 8192,
        depth: 4,
        queues: 2,
        start: Start::Written,
        cache: Cache::WriteBack,
        cluster_bytes: None,
    }
}

fn plan(generation: Generation) -> Plan {
    Plan {
        limit: Some(Duration::from_secs(10)),
        budget: Some(500),
        generation,
        expected: Some(PREPARED..=generation),
        seed: 1,
    }
}

#[test]
fn a_run_is_counted_verified_and_leaves_a_sound_image() {
    if !has_qsd() {
        return;
    }
    for contestant in [QSD_PARALLELS, QSD_QCOW2, PLAIN_FILE] {
        let rig = Rig::filled(contestant);
        for action in [
            Action::Read,
            Action::Write,
            Action::Mix,
            Action::WriteFlush { every: 10 },
        ] {
            let workload = workload(action);
            let mut station = rig.open(&workload);
            let (outcome, used) = station.run(&workload, &plan(2)).unwrap();
            assert_eq!(outcome.requests, 1000);
            let latencies = match action {
                Action::WriteFlush { .. } => 100,
                _ => 1000,
            };
            assert_eq!(outcome.latency.len(), latencies);
            assert_eq!(used.server_cpu.is_some(), contestant != PLAIN_FILE);
            station.verify_run(&workload, &outcome, 2).unwrap();
            station.verify_sample(2).unwrap();
            station.stop().unwrap();
        }
        rig.image.check(&programs()).unwrap();
    }
}

#[test]
fn write_through_runs_too() {
    if !has_qsd() {
        return;
    }
    for contestant in [QSD_PARALLELS, PLAIN_FILE] {
        let rig = Rig::filled(contestant);
        let workload = Workload {
            cache: Cache::WriteThrough,
            ..workload(Action::Write)
        };
        let mut station = rig.open(&workload);
        let (outcome, _) = station.run(&workload, &plan(2)).unwrap();
        assert_eq!(outcome.requests, 1000);
        station.verify_run(&workload, &outcome, 2).unwrap();
        station.stop().unwrap();
    }
}

#[test]
fn lost_writes_and_wrong_blocks_are_found() {
    let rig = Rig::filled(PLAIN_FILE);
    let write = workload(Action::Write);
    let mut station = rig.open(&write);
    let (outcome, _) = station.run(&write, &plan(2)).unwrap();
    // As if the server had dropped the writes of another run.
    let error = station.verify_run(&write, &outcome, 3).unwrap_err();
    assert!(error.is::<crate::content::WrongData>(), "{error}");

    // As if it had written everything one block too far.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&rig.image.path)
        .unwrap();
    let mut bytes = vec![0; GEOMETRY.disk_bytes as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.rotate_right(BLOCK);
    file.write_all_at(&bytes, 0).unwrap();
    let error = station.verify_sample(2).unwrap_err();
    assert!(error.is::<crate::content::WrongData>(), "{error}");
    let read = workload(Action::Read);
    let Err(error) = station.run(&read, &plan(2)) else {
        panic!("a run has read wrong data and not noticed");
    };
    assert!(error.is::<crate::content::WrongData>(), "{error}");
}

#[test]
fn a_server_that_is_killed_ends_the_run() {
    if !has_qsd() {
        return;
    }
    let rig = Rig::filled(QSD_PARALLELS);
    let workload = workload(Action::Read);
    let mut station = rig.open(&workload);
    let pid = station.server().unwrap().id() as i32;
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let Err(error) = station.run(&workload, &plan(2)) else {
        panic!("a run was served by a dead server");
    };
    assert!(
        format!("{error:#}").contains("ended by itself"),
        "{error:#}"
    );
}
