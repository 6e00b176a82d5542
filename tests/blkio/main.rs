//! The daemon under a load from `blkio`, without a guest: random requests of all
//! kinds on several queues at once, compared byte for byte with a model, and what
//! the image holds in the end read by `qemu-img`.

#[path = "../common/mod.rs"]
mod common;

mod changes;
mod client;
mod clones;
mod dead_disk;
mod frail_fs;
#[path = "../common/front_end.rs"]
mod front_end;
mod full_disk;
mod gluster;
mod gone;
mod grow;
mod kill;
mod limits;
mod lock_loss;
mod lost_write;
mod model;
mod operations;
mod plain;
mod power_cut;
mod returns;
mod shards;
mod stable;
mod strict;
#[path = "../common/survivor.rs"]
mod survivor;
mod survivors;
mod take_over;
mod volume;
mod write_through;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Barrier,
    thread,
    time::Duration,
};

use client::{BUFFER, Client, DEPTH};
use common::{
    backend::Backend,
    fixtures::FIXTURES,
    img::{qemu_img_check, qemu_img_compare},
    require_tool, tool,
};
use model::{Model, SECTOR};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Requests of each lane in one run.
const REQUESTS: usize = 600;

const MIB: u64 = 1 << 20;

/// An image and a place for what belongs to it.
struct Rig {
    folder: TempDir,
    image: PathBuf,
    socket: PathBuf,
}

impl Rig {
    /// Not on tmpfs, if there is another place: direct I/O shall be what it is.
    fn new(make: impl FnOnce(&Path)) -> Self {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = folder.path().join("disk.hds");
        make(&image);
        Self {
            socket: folder.path().join("socket"),
            folder,
            image,
        }
    }

    fn ploop_img(size: &str, cluster: &str) -> Self {
        Self::new(|image| {
            let args = ["--cluster-size", cluster];
            let program = env!("CARGO_BIN_EXE_ploop-img");
            run(Command::new(program)
                .arg("create")
                .arg(image)
                .arg(size)
                .args(args));
        })
    }

    fn serve(&self, options: &[&str]) -> Backend {
        Backend::start(&self.image, &self.socket, options)
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().expect("the program can be started");
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// Loads all lanes at once.
fn load(client: &mut Client, models: &mut [Model], requests: usize) {
    thread::scope(|scope| {
        for (lane, model) in client.lanes.iter_mut().zip(models) {
            scope.spawn(move || model.load(lane, requests));
        }
    });
}

fn models(lanes: usize, capacity: u64, seed: u64) -> Vec<Model> {
    (0..lanes)
        .map(|lane| Model::new(lane, lanes, capacity / SECTOR as u64, seed))
        .collect()
}

/// Reads the whole disk and lets every model check its sectors; returns it.
fn read_back(client: &mut Client, models: &mut [Model]) -> Vec<u8> {
    let lane = &mut client.lanes[0];
    let mut all = Vec::new();
    for offset in (0..client.capacity).step_by(BUFFER) {
        let len = (client.capacity - offset).min(BUFFER as u64) as usize;
        lane.read(offset, len, 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        let bytes = lane.bytes(0, len);
        for model in &mut *models {
            model.check(offset / SECTOR as u64, &bytes);
        }
        all.extend(bytes);
    }
    all
}

/// What `qemu-img` thinks of the image: it is sound and holds these bytes.
fn expect_image(rig: &Rig, bytes: &[u8]) {
    let raw = rig.folder.path().join("raw");
    fs::write(&raw, bytes).unwrap();
    let ploop_img = env!("CARGO_BIN_EXE_ploop-img");
    run(Command::new(ploop_img).arg("check").arg(&rig.image));
    if require_tool("qemu-img") {
        qemu_img_check(&rig.image);
        qemu_img_compare(&raw, &rig.image);
    }
}

/// A load, a look at all of it, a second load by another process on the same
/// image, and another look.
fn expect_true_to_model(rig: &Rig, lanes: usize, options: &[&str], seed: u64) {
    let backend = rig.serve(options);
    let mut client = Client::connect(backend.socket(), lanes);
    let mut models = models(lanes, client.capacity, seed);
    load(&mut client, &mut models, REQUESTS);
    read_back(&mut client, &mut models);
    drop(client);
    backend.stop();

    let backend = rig.serve(options);
    let mut client = Client::connect(backend.socket(), lanes);
    read_back(&mut client, &mut models);
    load(&mut client, &mut models, REQUESTS);
    let bytes = read_back(&mut client, &mut models);
    drop(client);
    backend.stop();
    expect_image(rig, &bytes);
}

#[test]
fn direct_io_is_true_to_the_model() {
    let rig = Rig::ploop_img("64M", "1M");
    expect_true_to_model(&rig, 4, &["--cache", "none", "--aio", "io_uring"], 1);
}

#[test]
fn the_page_cache_is_true_to_the_model() {
    let rig = Rig::ploop_img("64M", "64K");
    expect_true_to_model(&rig, 4, &["--cache", "writeback", "--aio", "io_uring"], 2);
}

#[test]
fn plain_calls_are_true_to_the_model() {
    let rig = Rig::ploop_img("64M", "256K");
    expect_true_to_model(&rig, 2, &["--cache", "none", "--aio", "psync"], 3);
}

#[test]
fn one_queue_and_one_runner_are_true_to_the_model() {
    let rig = Rig::ploop_img("64M", "32K");
    let options = [
        "--runners",
        "1",
        "--writeback-delay",
        "0",
        "--num-queues",
        "1",
    ];
    expect_true_to_model(&rig, 1, &options, 4);
}

#[test]
fn an_image_of_qemus_is_true_to_the_model() {
    if !require_tool("qemu-img") {
        return;
    }
    // Its size is no multiple of the cluster.
    let rig = Rig::new(|image| {
        let size = (64 * MIB + 5 * SECTOR as u64).to_string();
        run(tool("qemu-img")
            .args(["create", "-q", "-f", "parallels"])
            .arg(image)
            .arg(size));
    });
    expect_true_to_model(&rig, 3, &["--runners", "4"], 5);
}

#[test]
fn disks_of_the_official_tool_are_served_as_they_are() {
    for fixture in FIXTURES {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let Some(bundle) = fixture.unpack(folder.path()) else {
            return;
        };
        // As it came, and as it was closed.
        for _ in 0..2 {
            let socket = folder.path().join("socket");
            let backend = Backend::start::<&str>(&bundle, &socket, &[]);
            let mut client = Client::connect(backend.socket(), 1);
            assert_eq!(client.capacity, fixture.size, "{}", fixture.name);
            let bytes = read_back(&mut client, &mut []);
            let digest: String = Sha256::digest(&bytes)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert_eq!(digest, fixture.sha256, "{}", fixture.name);
            drop(client);
            backend.stop();
        }
    }
}

#[test]
fn ending_under_load_loses_nothing_that_was_completed() {
    let rig = Rig::ploop_img("64M", "1M");
    let lanes = 4;
    let mut models = models(lanes, 64 * MIB, 6);
    for _ in 0..5 {
        let backend = rig.serve(&[]);
        let mut client = Client::connect(backend.socket(), lanes);
        let loaded = Barrier::new(lanes + 1);
        thread::scope(|scope| {
            for (lane, model) in client.lanes.iter_mut().zip(&mut models) {
                let loaded = &loaded;
                scope.spawn(move || {
                    model.load(lane, REQUESTS / 10);
                    loaded.wait();
                    load_until_dead(lane, model);
                });
            }
            loaded.wait();
            thread::sleep(Duration::from_millis(50));
            // It is checked that the daemon ends in order.
            backend.stop();
        });
        drop(client);
        let backend = rig.serve(&[]);
        for model in &mut models {
            model.forget_in_flight();
        }
        let mut client = Client::connect(backend.socket(), lanes);
        let bytes = read_back(&mut client, &mut models);
        drop(client);
        backend.stop();
        expect_image(&rig, &bytes);
    }
}

/// Goes on until nothing ends any more.
fn load_until_dead(lane: &mut client::Lane, model: &mut Model) {
    loop {
        while model.in_flight() < DEPTH {
            model.start(lane);
        }
        let Some(ended) = lane.wait_for(1, Duration::from_secs(2)) else {
            return;
        };
        for (tag, result) in ended {
            assert_eq!(result, 0, "request {tag} failed");
            model.ended(lane, tag);
        }
    }
}
