//! A host file system that is really full, and has space again.

use std::{
    fs,
    ops::Range,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tempfile::TempDir;

use crate::client::{BUFFER, Client, DEPTH, Lane};
use crate::common::{
    backend::Backend,
    img::ploop_img,
    qmp::Qmp,
    small_fs::{Ballast, SmallFs},
};
use crate::model::Model;
use crate::{MIB, Rig, expect_image, models, read_back};

/// What the daemon says when the host is full.
const FULL: &str = "the host file system is full";
const FULL_NO_MORE: &str = "the host file system has space again";

/// Lanes that load the disk.
const LANES: usize = 4;

/// The part of the disk that they load.
const LOADED: u64 = 32 * MIB;

/// The part behind it is mapped and written before the host is full.
const MAPPED: Range<u64> = LOADED..LOADED + MIB;

/// Of the file system: enough for all of the disk.
const FS_SIZE: u64 = 96 * MIB;

/// What there is of it at first, less than the load needs.
const LEFT: u64 = 6 * MIB;

/// Requests of each lane.
const REQUESTS: usize = 800;

/// How long the daemon may take to notice something.
const PATIENCE: Duration = Duration::from_secs(60);

/// An image on a file system without enough space for it.
struct Full {
    rig: Rig,
    models: Vec<Model>,
    ballast: Ballast,
    _fs: SmallFs,
}

impl Full {
    fn new(fs: SmallFs, seed: u64) -> Self {
        let folder = TempDir::new().unwrap();
        let rig = Rig {
            image: fs.root().join("disk.hds"),
            socket: folder.path().join("socket"),
            folder,
        };
        let image = rig.image.to_str().unwrap();
        let size = MAPPED.end.to_string();
        ploop_img(["create", image, &size, "--cluster-size", "64K"]).ok();
        let mut models = models(LANES, LOADED, seed);
        for model in &mut models {
            model.keep_space();
        }
        Self {
            ballast: fs.fill_but(LEFT),
            models,
            rig,
            _fs: fs,
        }
    }

    /// The daemon, and a connection with one queue more than there are lanes.
    fn serve(&self, options: &[&str]) -> (Backend, Client) {
        let control = format!("--control={}", self.control().display());
        let backend = self.rig.serve(&[&[control.as_str()], options].concat());
        let mut client = Client::connect(backend.socket(), LANES + 1);
        map(&mut client.lanes[LANES]);
        (backend, client)
    }
}

impl Full {
    fn control(&self) -> PathBuf {
        self.rig.folder.path().join("control")
    }
}

/// Writes all of the range that shall be mapped.
fn map(lane: &mut Lane) {
    for offset in MAPPED.step_by(BUFFER) {
        lane.write(offset, &[1; BUFFER], 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
    }
}

/// Requests that need no space are done.
fn expect_service(lane: &mut Lane) {
    for round in 2..30 {
        for (tag, offset) in MAPPED.step_by(BUFFER).enumerate() {
            lane.write(offset, &[round; BUFFER], tag);
            assert_eq!(lane.wait(1), [(tag, 0)]);
            lane.read(offset, BUFFER, tag);
            assert_eq!(lane.wait(1), [(tag, 0)]);
            assert_eq!(lane.bytes(tag, BUFFER), [round; BUFFER]);
        }
        lane.flush(0);
        assert_eq!(lane.wait(1), [(0, 0)]);
    }
}

fn count(backend: &Backend, message: &str) -> usize {
    backend.log().matches(message).count()
}

/// Waits until the daemon says it.
fn wait_for(backend: &Backend, message: &str) {
    let start = Instant::now();
    while count(backend, message) == 0 {
        let log = backend.log();
        assert!(start.elapsed() < PATIENCE, "{message} is not said:\n{log}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A load that needs more space than there is waits, nothing else does, and it ends
/// once there is space.
fn expect_patience(fs: Option<SmallFs>, options: &[&str], seed: u64) {
    let Some(fs) = fs else {
        return;
    };
    let mut full = Full::new(fs, seed);
    let (backend, mut client) = full.serve(options);
    let mut qmp = Qmp::connect(&full.control());
    let ended = AtomicUsize::new(0);
    let (spare, lanes) = client.lanes.split_last_mut().expect("there are several");
    thread::scope(|scope| {
        for (lane, model) in lanes.iter_mut().zip(&mut full.models) {
            let ended = &ended;
            scope.spawn(move || {
                model.load(lane, REQUESTS);
                ended.fetch_add(1, Ordering::Relaxed);
            });
        }
        wait_for(&backend, FULL);
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!(
            (&event["action"], &event["nospace"]),
            (&json!("stop"), &json!(true))
        );
        expect_service(spare);
        assert_eq!(qmp.ask("query-status", json!({}))["status"], "io-error");
        // At times all of them have a try.
        let parked = |qmp: &mut Qmp| qmp.ask("query-engine", json!({}))["parked"].as_u64();
        let start = Instant::now();
        while parked(&mut qmp) == Some(0) {
            assert!(start.elapsed() < PATIENCE, "nothing waits");
        }
        assert!(ended.load(Ordering::Relaxed) < LANES, "nothing waits");
        assert_eq!(count(&backend, FULL_NO_MORE), 0);
        full.ballast.remove();
    });
    wait_for(&backend, FULL_NO_MORE);
    qmp.event("HOST_HAS_SPACE");
    assert_eq!(qmp.ask("query-status", json!({}))["status"], "running");
    let said = (count(&backend, FULL), count(&backend, FULL_NO_MORE));
    assert_eq!(said, (1, 1), "{}", backend.log());
    let bytes = read_back(&mut client, &mut full.models);
    drop(client);
    backend.stop();
    expect_image(&full.rig, &bytes);
}

#[test]
fn a_full_tmpfs_makes_writes_wait() {
    expect_patience(SmallFs::tmpfs(FS_SIZE), &[], 11);
}

#[test]
fn a_full_ext4_makes_writes_wait() {
    expect_patience(SmallFs::ext4(FS_SIZE), &[], 12);
}

#[test]
fn a_full_ext4_behind_the_page_cache_makes_writes_wait() {
    let options = ["--cache", "writeback", "--aio", "psync"];
    expect_patience(SmallFs::ext4(FS_SIZE), &options, 13);
}

/// Writes that need space fail, nothing else does, and what was done stays.
fn expect_report(fs: Option<SmallFs>, seed: u64) {
    let Some(fs) = fs else {
        return;
    };
    let mut full = Full::new(fs, seed);
    let (backend, mut client) = full.serve(&["--on-enospc", "report"]);
    let mut qmp = Qmp::connect(&full.control());
    let failed: usize = thread::scope(|scope| {
        let lanes = client.lanes.iter_mut().zip(&mut full.models);
        let loads: Vec<_> = lanes
            .map(|(lane, model)| scope.spawn(move || load_with_failures(lane, model)))
            .collect();
        loads.into_iter().map(|load| load.join().unwrap()).sum()
    });
    assert!(failed > 0, "there was space enough");
    let event = qmp.event("BLOCK_IO_ERROR");
    assert_eq!(
        (&event["action"], &event["nospace"]),
        (&json!("report"), &json!(true))
    );
    let stats = &qmp.ask("query-blockstats", json!({}))[0]["stats"];
    assert_eq!(stats["failed_wr_operations"], failed);
    assert_eq!(count(&backend, FULL), 1, "{}", backend.log());
    expect_service(&mut client.lanes[LANES]);
    read_back(&mut client, &mut full.models);
    drop(client);
    backend.stop();
    // It can be closed and opened without any more space.
    let backend = full.rig.serve(&[]);
    let mut client = Client::connect(backend.socket(), 1);
    let bytes = read_back(&mut client, &mut full.models);
    drop(client);
    backend.stop();
    expect_image(&full.rig, &bytes);
}

/// Returns how many requests that need space have failed; nothing else may.
fn load_with_failures(lane: &mut Lane, model: &mut Model) -> usize {
    let (mut started, mut failed) = (0, 0);
    while started < REQUESTS || model.in_flight() > 0 {
        while started < REQUESTS && model.in_flight() < DEPTH {
            model.start(lane);
            started += 1;
        }
        for (tag, result) in lane.wait(1) {
            if result == 0 {
                model.ended(lane, tag);
            } else {
                model.failed(tag);
                failed += 1;
            }
        }
    }
    failed
}

#[test]
fn a_full_tmpfs_is_reported_if_that_is_wanted() {
    expect_report(SmallFs::tmpfs(FS_SIZE), 14);
}

#[test]
fn a_full_ext4_is_reported_if_that_is_wanted() {
    expect_report(SmallFs::ext4(FS_SIZE), 15);
}

/// SIGTERM ends the daemon though requests wait for space, and what was completed
/// is there.
fn expect_end(fs: Option<SmallFs>, seed: u64) {
    let Some(fs) = fs else {
        return;
    };
    let mut full = Full::new(fs, seed);
    let (backend, mut client) = full.serve(&[]);
    thread::scope(|scope| {
        for (lane, model) in client.lanes.iter_mut().zip(&mut full.models) {
            scope.spawn(move || load_until_dead(lane, model));
        }
        wait_for(&backend, FULL);
        // It is checked that the daemon ends in order.
        backend.stop();
    });
    drop(client);
    for model in &mut full.models {
        model.forget_in_flight();
    }
    fs::remove_file(full.rig.socket.with_extension("log")).unwrap();
    let backend = full.rig.serve(&[]);
    assert_eq!(count(&backend, "not closed cleanly"), 0);
    let mut client = Client::connect(backend.socket(), 1);
    let bytes = read_back(&mut client, &mut full.models);
    drop(client);
    backend.stop();
    expect_image(&full.rig, &bytes);
}

/// Goes on until nothing ends any more. Those that wait for space fail in the end.
fn load_until_dead(lane: &mut Lane, model: &mut Model) {
    loop {
        while model.in_flight() < DEPTH {
            model.start(lane);
        }
        let Some(ended) = lane.wait_for(1, Duration::from_secs(2)) else {
            return;
        };
        for (tag, result) in ended {
            if result == 0 {
                model.ended(lane, tag);
            } else {
                model.failed(tag);
            }
        }
    }
}

#[test]
fn a_daemon_ends_though_writes_wait_for_a_full_tmpfs() {
    expect_end(SmallFs::tmpfs(FS_SIZE), 16);
}

#[test]
fn a_daemon_ends_though_writes_wait_for_a_full_ext4() {
    expect_end(SmallFs::ext4(FS_SIZE), 17);
}

/// Other processes take over while requests wait for space: none is lost or done twice, and
/// all are done once there is some.
fn expect_take_overs(fs: Option<SmallFs>, options: &[&str], seed: u64) {
    const TAKE_OVERS: usize = 4;
    let Some(fs) = fs else {
        return;
    };
    let mut full = Full::new(fs, seed);
    let upgrades = full.rig.folder.path().join("upgrade");
    let socket = ["--upgrade-socket", upgrades.to_str().unwrap()];
    let (mut backend, mut client) = full.serve(&[&socket, options].concat());
    let ended = AtomicUsize::new(0);
    let (spare, lanes) = client.lanes.split_last_mut().expect("there are several");
    let image = full.rig.image.clone();
    let backend = thread::scope(|scope| {
        for (lane, model) in lanes.iter_mut().zip(&mut full.models) {
            let ended = &ended;
            scope.spawn(move || {
                model.load(lane, REQUESTS);
                ended.fetch_add(1, Ordering::Relaxed);
            });
        }
        wait_for(&backend, FULL);
        for number in 1..=TAKE_OVERS {
            backend = backend.taken_over(&image, &upgrades, options);
            // The one that serves now finds that out for itself.
            let start = Instant::now();
            while count(&backend, FULL) == number {
                let log = backend.log();
                assert!(start.elapsed() < PATIENCE, "nothing waits:\n{log}");
                thread::sleep(Duration::from_millis(10));
            }
            expect_service(spare);
            assert!(ended.load(Ordering::Relaxed) < LANES, "nothing waits");
        }
        full.ballast.remove();
        backend
    });
    wait_for(&backend, FULL_NO_MORE);
    let bytes = read_back(&mut client, &mut full.models);
    drop(client);
    backend.stop();
    expect_image(&full.rig, &bytes);
}

#[test]
fn writes_that_wait_for_a_full_tmpfs_go_from_process_to_process() {
    expect_take_overs(SmallFs::tmpfs(FS_SIZE), &[], 18);
}

#[test]
fn writes_that_wait_for_a_full_ext4_go_from_process_to_process() {
    expect_take_overs(SmallFs::ext4(FS_SIZE), &["--aio", "psync"], 19);
}
