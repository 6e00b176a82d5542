//! A disk grows under load, again and again, and is what the model says all the while.
//!
//! The device is in this process: so it can be asked to grow at any moment.

use std::{
    os::unix::net::UnixListener,
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use vhost_user_ploop::device::{BlockDevice, Connection, Parked, Queues};
use vhost_user_ploop::format::Sector;
use vhost_user_ploop::image::{self, Access, OpenImage, OpenMode};
use vhost_user_ploop::ploop::{Engine, Options, Running};
use vhost_user_ploop::served::{self, CallOff};
use vhost_user_ploop::storage::{HostDisk, HostOptions};

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng};
use serde_json::json;

use super::common::img::{expect_no_corruption, ploop_img};
use super::common::{fixtures::fixture, qmp::Qmp};
use super::kill::load_and_kill;
use super::plain::unpack;
use super::*;

const LANES: usize = 4;

/// Of the disk, in MiB: the second one needs no other cluster for the BAT, the others do.
const SIZES: [u64; 5] = [64, 100, 300, 520, 800];

/// What is served, and to whom.
struct Device {
    engine: Running<HostDisk>,
    connection: Option<Connection>,
    image: OpenImage,
}

impl Device {
    /// Serves the image to a client of so many queues.
    fn serve(path: &Path, socket: &Path, lanes: usize) -> (Self, Client) {
        let mut image = image::open(path, OpenMode::new(Access::Serve)).unwrap();
        let files = std::mem::take(&mut image.files);
        let disk = HostDisk::new(files, HostOptions::default()).unwrap();
        let mut options = Options::default();
        options.writeback_delay = Duration::from_millis(20);
        options.preallocation = 4 * MIB;
        let opened = Engine::open(disk, &image.chain, options).unwrap();
        let engine = Running::start(opened).unwrap();
        let queues = Queues::new(lanes as u16, 128).unwrap();
        let serial = "growing".parse().unwrap();
        let device = Arc::new(BlockDevice::new(
            Arc::clone(engine.engine()),
            serial,
            queues,
        ));
        let _ = fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        // The client talks to it before it is there.
        let accepting = thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            Connection::start(device, socket).unwrap()
        });
        let client = Client::connect(socket, lanes);
        let connection = Some(accepting.join().unwrap());
        let device = Self {
            engine,
            connection,
            image,
        };
        (device, client)
    }

    fn grow(&mut self, mib: u64) {
        let size = Sector(mib * MIB / SECTOR as u64);
        let bundle = self.image.bundle.as_mut();
        let grown = served::grow(self.engine.engine(), bundle, size, &CallOff::default());
        assert_eq!(grown.unwrap(), size);
        self.connection.as_ref().unwrap().config_changed();
    }

    fn close(mut self, client: Client) {
        drop(client);
        self.connection.take().unwrap().stop(Parked::Fail);
        self.engine.close().unwrap();
    }
}

/// Grows a disk under load; what it holds in the end.
fn grow_under_load(path: &Path, socket: &Path, seed: u64) -> Vec<u8> {
    let (mut device, mut client) = Device::serve(path, socket, LANES);
    let mut models = models(LANES, SIZES[0] * MIB, seed);
    load(&mut client, &mut models, REQUESTS);
    for size in &SIZES[1..] {
        let is_larger = AtomicBool::new(false);
        thread::scope(|scope| {
            for (lane, model) in client.lanes.iter_mut().zip(&mut models) {
                let is_larger = &is_larger;
                scope.spawn(move || {
                    while !is_larger.load(Ordering::Relaxed) {
                        model.load(lane, 100);
                    }
                });
            }
            thread::sleep(Duration::from_millis(50));
            device.grow(*size);
            is_larger.store(true, Ordering::Relaxed);
        });
        read_back(&mut client, &mut models);
    }
    device.close(client);

    let (device, mut client) = Device::serve(path, socket, LANES);
    assert_eq!(client.capacity, SIZES[SIZES.len() - 1] * MIB);
    // Behind the old end too.
    let lane = &mut client.lanes[0];
    let last = client.capacity - SECTOR as u64;
    for offset in [SIZES[0] * MIB, 500 * MIB, last] {
        lane.write(offset, &model::content(offset, 7), 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
    }
    load(&mut client, &mut models, REQUESTS);
    let bytes = read_back(&mut client, &mut models);
    let (old, new) = bytes.split_at((SIZES[0] * MIB) as usize);
    assert_eq!(old.len() as u64, SIZES[0] * MIB);
    let written = new.chunks(SECTOR).filter(|sector| *sector != [0; SECTOR]);
    assert_eq!(written.count(), 3);
    device.close(client);
    bytes
}

#[test]
fn a_disk_that_grows_under_load_is_true_to_the_model() {
    let rig = Rig::ploop_img("64M", "32K");
    let bytes = grow_under_load(&rig.image, &rig.socket, 21);
    expect_image(&rig, &bytes);
}

#[test]
fn an_image_of_version_1_grows_under_load_too() {
    let rig = Rig::ploop_img("64M", "32K");
    let program = env!("CARGO_BIN_EXE_ploop-img");
    run(Command::new(program)
        .args(["convert", "--format-version", "1"])
        .arg(&rig.image));
    let bytes = grow_under_load(&rig.image, &rig.socket, 22);
    expect_image(&rig, &bytes);
}

/// Grows the disk of a bundle under load: its descriptor follows.
fn expect_bundle_to_grow(folder: &TempDir, bundle: &Path, seed: u64) {
    let bytes = grow_under_load(bundle, &folder.path().join("socket"), seed);
    ploop_img(["check".as_ref(), bundle.as_os_str()]).ok();
    let descriptor = fs::read_to_string(bundle.join("DiskDescriptor.xml")).unwrap();
    let size = SIZES[SIZES.len() - 1] * MIB / SECTOR as u64;
    let says = format!("<Disk_size>{size}</Disk_size>");
    assert!(descriptor.contains(&says), "{descriptor}");
    let copy = folder.path().join("copy");
    let args = ["convert", "-O", "raw"].map(std::ffi::OsStr::new);
    ploop_img(
        args.into_iter()
            .chain([bundle.as_os_str(), copy.as_os_str()]),
    )
    .ok();
    assert!(fs::read(&copy).unwrap() == bytes);
}

#[test]
fn a_disk_with_snapshots_grows_under_load_and_these_stay_as_they_are() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let bundle = folder.path().join("bundle");
    let path = bundle.to_str().unwrap();
    ploop_img(["create", "--cluster-size", "32K", path, "64M"]).ok();
    for _ in 0..2 {
        ploop_img(["snapshot", "create", path]).ok();
    }
    let lower = || {
        let files = fs::read_dir(&bundle).unwrap();
        let mut files: Vec<_> = files
            .map(|file| file.unwrap())
            .map(|file| (file.metadata().unwrap().len(), file.file_name()))
            .filter(|(_, name)| name.to_str().unwrap().contains(".hds"))
            .collect();
        files.sort();
        files
    };
    let before = lower();
    expect_bundle_to_grow(&folder, &bundle, 23);
    // The top has got longer than they are. Before, which one it is, its name alone says.
    for file in &lower()[..2] {
        assert!(before.contains(file), "{file:?} is not one of {before:?}");
    }
}

#[test]
fn a_raw_disk_grows_under_load() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some((bundle, raw)) = unpack(&folder) else {
        return;
    };
    let descriptor = bundle.join("DiskDescriptor.xml");
    let text = fs::read_to_string(&descriptor).unwrap();
    let sectors = |bytes: u64| (bytes / SECTOR as u64).to_string();
    let text = text.replace(&sectors(fixture("plain").size), &sectors(SIZES[0] * MIB));
    fs::write(&descriptor, text).unwrap();
    // What is behind the end of the disk is nobody's.
    let mut bytes = vec![0; (SIZES[0] * MIB) as usize];
    bytes.extend([7; 4096]);
    fs::write(&raw, bytes).unwrap();
    expect_bundle_to_grow(&folder, &bundle, 24);
}

/// Lives of a daemon that is asked to grow its disk.
const LIVES: u64 = 12;

/// In MiB: where the BAT needs another cluster, and where not.
const BEFORE: u64 = 250;
const AFTER: [u64; 2] = [253, 300];

/// The models' part of the disk, in bytes.
const LOADED: u64 = 16 * MIB;

#[test]
fn a_daemon_that_dies_or_ends_while_its_disk_grows_leaves_the_old_or_the_new_size() {
    let mut rng = SmallRng::seed_from_u64(25);
    let mut sizes = [0; 2];
    for life in 0..LIVES {
        let rig = Rig::ploop_img(&format!("{BEFORE}M"), "32K");
        let control = rig.folder.path().join("control");
        let backend = rig.serve(&[&format!("--control={}", control.display())]);
        let mut client = Client::connect(backend.socket(), LANES);
        let mut models = models(LANES, LOADED, life);
        load(&mut client, &mut models, REQUESTS / 10);
        let mut qmp = Qmp::connect(&control);
        let after = AFTER[(life % 2) as usize] * MIB;
        let is_killed = life % 4 < 2;
        // How long it takes depends on the host.
        let delay = Duration::from_micros(rng.random_range(0..20_000) << (life / 2));
        let has_ended = life >= LIVES - 4;
        eprintln!("life {life}: {after}, killed: {is_killed}, after {delay:?}");
        load_and_kill(&mut client, &mut models, 20, || {
            qmp.begin(
                "block_resize",
                json!({ "node-name": "disk", "size": after }),
            );
            match has_ended {
                true => assert!(qmp.end("block_resize")["return"].is_object()),
                false => thread::sleep(delay),
            }
            match is_killed {
                true => backend.kill(),
                false => backend.stop(),
            }
        });
        drop(client);
        // What it was told before the end is true.
        let is_told = has_ended
            || qmp
                .last_words()
                .iter()
                .any(|line| line["return"].is_object());
        let _ = fs::remove_file(&rig.socket);
        expect_no_corruption(&rig.image, &rig.image);

        let _ = fs::remove_file(&control);
        let backend = rig.serve(&[&format!("--control={}", control.display())]);
        let mut client = Client::connect(backend.socket(), LANES);
        let size = client.capacity;
        assert!(size == BEFORE * MIB || size == after, "{size}");
        assert!(size == after || !is_told, "it was said to be larger");
        sizes[usize::from(size == after)] += 1;
        for model in &mut models {
            match is_killed {
                true => drop(model.killed()),
                false => model.forget_in_flight(),
            }
        }
        let bytes = read_back(&mut client, &mut models);
        let mut beyond = bytes[LOADED as usize..].chunks(SECTOR);
        assert!(beyond.all(|sector| sector == [0; SECTOR]));
        // It can grow now.
        let lane = &mut client.lanes[0];
        Qmp::connect(&control).ask("block_resize", json!({ "device": "disk", "size": after }));
        lane.write(after - SECTOR as u64, &model::content(0, 7), 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        drop(client);
        backend.stop();
        ploop_img(["check".as_ref(), rig.image.as_os_str()]).ok();
        if require_tool("qemu-img") {
            qemu_img_check(&rig.image);
        }
    }
    eprintln!("{} kept their size, {} grew", sizes[0], sizes[1]);
    assert!(sizes.iter().all(|count| *count > 0), "{sizes:?}");
}
