//! What runs in the guest: the daemon on a file system whose device is logged, and the
//! load.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use serde::{Deserialize, Serialize};

use crate::client::{Client, DEPTH, Lane};
use crate::common::{backend::Backend, img::ploop_img};
use crate::dm::Device;
use crate::journal::Journal;
use crate::model::{Model, SECTOR};
use crate::write_through::Relay;

/// Name of the variable that has the [`Plan`].
pub const PLAN: &str = "PLOOP_REPLAY_PLAN";

/// Name of the test that is the guest's program.
pub const NAME: &str = "load::runs_in_the_guest";

/// Bytes of the disk that is served.
pub const DISK: u64 = 24 << 20;

const LANES: usize = 3;

/// What happens in a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Of the file system: `ext4` or `xfs`.
    pub fs: String,
    /// Between the two loads a snapshot is made.
    pub is_chain: bool,
    pub cluster: String,
    /// Of the daemon.
    pub options: Vec<String>,
    /// In the second load.
    pub write_through: bool,
    /// Of each of the two loads.
    pub seconds: u64,
    pub seed: u64,
    /// The daemon's syncs do nothing, and say that they have.
    pub without_syncs: bool,
}

impl Plan {
    /// Where the disk is, in the file system.
    pub fn disk(&self) -> &'static str {
        if self.is_chain { "disk" } else { "disk.hds" }
    }
}

#[test]
#[ignore = "it is for the guests of the other tests"]
fn runs_in_the_guest() {
    let plan = std::env::var(PLAN).expect("the other tests have a plan");
    let plan: Plan = serde_json::from_str(&plan).unwrap();
    let device = Device::create(Path::new("/dev/vda"), Path::new("/dev/vdb"));
    mount(
        device.path(),
        "/mnt",
        plan.fs.as_str(),
        MountFlags::empty(),
        None,
    )
    .unwrap();
    let disk = Path::new("/mnt").join(plan.disk());
    let path = disk.to_str().unwrap();
    let size = DISK.to_string();
    ploop_img(["create", path, &size, "--cluster-size", &plan.cluster]).ok();

    let journal = Arc::new(Mutex::new(Journal::new(device)));
    journal.lock().unwrap().mark();
    let mut models: Vec<_> = (0..LANES)
        .map(|lane| Model::new(lane, LANES, DISK / SECTOR as u64, plan.seed))
        .collect();
    for (lane, model) in models.iter_mut().enumerate() {
        Journal::follow(&journal, lane, model);
    }
    run_load(&plan, &disk, false, &mut models);
    if plan.is_chain {
        ploop_img(["snapshot", "create", path]).ok();
    }
    run_load(&plan, &disk, plan.write_through, &mut models);

    unmount_when_free("/mnt");
    let journal = journal.lock().unwrap().finish();
    let mut to = File::options().write(true).open("/dev/vdc").unwrap();
    to.write_all(&journal).unwrap();
    to.sync_all().unwrap();
}

/// Unmounts a file system that a process had files on which has ended: its rings, and what
/// they hold, the kernel takes down a little later.
fn unmount_when_free(path: &str) {
    let start = Instant::now();
    loop {
        match unmount(path, UnmountFlags::empty()) {
            Err(Errno::BUSY) if start.elapsed() < Duration::from_secs(60) => {
                thread::sleep(Duration::from_millis(50));
            }
            result => return result.unwrap(),
        }
    }
}

/// One life of the daemon, which ends in order.
fn run_load(plan: &Plan, disk: &Path, write_through: bool, models: &mut [Model]) {
    let socket = Path::new("/tmp/socket");
    let backend = if plan.without_syncs {
        let (disk, options) = (disk.to_owned(), plan.options.clone());
        // The daemon inherits what its parent's thread has.
        let started = thread::spawn(move || {
            pretend_to_sync();
            Backend::start(&disk, socket, &options)
        });
        started.join().unwrap()
    } else {
        Backend::start(disk, socket, &plan.options)
    };
    let relay = write_through.then(|| Relay::start(backend.socket()));
    let mut client = Client::connect(relay.as_ref().map_or(socket, Relay::socket), LANES);
    let end = Instant::now() + Duration::from_secs(plan.seconds);
    thread::scope(|scope| {
        for (lane, model) in client.lanes.iter_mut().zip(&mut *models) {
            model.set_write_through(write_through);
            scope.spawn(move || load_until(lane, model, end));
        }
    });
    drop(client);
    drop(relay);
    backend.stop();
    models.iter_mut().for_each(Model::closed);
}

fn load_until(lane: &mut Lane, model: &mut Model, end: Instant) {
    while Instant::now() < end {
        while model.in_flight() < DEPTH {
            model.start(lane);
        }
        model.collect(lane, 1);
    }
    model.finish(lane);
}

/// From now on `fdatasync` does nothing in this thread and what it starts.
fn pretend_to_sync() {
    let calls = [libc::SYS_fdatasync, libc::SYS_fsync];
    let rules: BTreeMap<_, _> = calls.map(|call| (call, Vec::new())).into();
    // "Fails", with error 0.
    let (other, these) = (SeccompAction::Allow, SeccompAction::Errno(0));
    let filter = SeccompFilter::new(rules, other, these, TargetArch::x86_64).unwrap();
    let filter: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&filter).unwrap();
}
