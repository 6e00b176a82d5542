//! Real power cuts: the daemon runs in a guest whose kernel logs every write to the disk
//! below the file system that the image is on. The log is played up to a point; of what
//! was not flushed there, anything may be missing. The file system is mounted, the disk
//! is opened and must hold what the guest knows to be flushed.
//!
//! `ci/replay.sh` runs it.

#[path = "../blkio/client.rs"]
#[allow(dead_code, reason = "shared with other tests, as `common` is")]
mod client;
#[path = "../common/mod.rs"]
mod common;
mod cut;
mod dm;
mod journal;
mod load;
mod log;
#[path = "../blkio/model.rs"]
#[allow(dead_code, reason = "the same")]
mod model;
#[path = "../guest/qemu.rs"]
mod qemu;
#[path = "../blkio/survivors.rs"]
mod survivors;
#[path = "../blkio/write_through.rs"]
mod write_through;

use std::{
    any::Any,
    env,
    fs::{self, File},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    time::Instant,
};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use tempfile::TempDir;

use client::{BUFFER, Client};
use common::backend::Backend;
use common::img::{expect_no_corruption, ploop_img};
use common::small_fs::SmallFs;
use common::{require_tool, tool};
use cut::Device;
use journal::Truth;
use load::{DISK, PLAN, Plan};
use log::Log;
use model::{SECTOR, content};
use qemu::{Guest, Image};

/// Bytes of the logs, of which little is used: the files have holes.
const LOG: u64 = 4 << 30;
const JOURNAL: u64 = 64 << 20;

/// What is varied between runs of a kind.
const OPTIONS: [&[&str]; 4] = [
    &["--aio", "io_uring"],
    &["--aio", "psync", "--writeback-delay", "5"],
    &[
        "--cache",
        "writeback",
        "--aio",
        "io_uring",
        "--writeback-delay",
        "0",
    ],
    &["--cache", "writeback", "--aio", "psync"],
];

/// A number that `ci/replay.sh` says.
fn setting(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |value| value.parse().expect("it is a number"))
}

fn plan(is_chain: bool, run: usize, seed: u64) -> Plan {
    let fs = if run % 3 == 2 { "xfs" } else { "ext4" };
    // From 256 KiB on XFS clones what is copied from a lower delta.
    let cluster = if run % 3 == 2 { "256K" } else { "64K" };
    let options = OPTIONS[run % OPTIONS.len()];
    Plan {
        fs: fs.to_owned(),
        is_chain,
        cluster: cluster.to_owned(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        write_through: run % 2 == 1,
        seconds: setting("PLOOP_REPLAY_SECONDS", 10),
        seed,
        without_syncs: false,
    }
}

/// What a guest has left.
struct Run {
    plan: Plan,
    folder: TempDir,
}

impl Run {
    /// `None`, which is said on the terminal, if there can be no guests here.
    fn new(plan: Plan) -> Option<Self> {
        let guest = Image::find()?;
        let mkfs = format!("mkfs.{}", plan.fs);
        require_tool(&mkfs).then_some(())?;
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let run = Self { plan, folder };
        let device = run.file("device");
        // As small as the file systems can be.
        let size = if run.plan.fs == "xfs" { 320 } else { 128 } << 20;
        for (name, size) in [("device", size), ("log", LOG), ("journal", JOURNAL)] {
            File::create(run.file(name)).unwrap().set_len(size).unwrap();
        }
        let made = tool(&mkfs).arg("-q").arg(&device).status();
        assert!(made.unwrap().success());
        cut::copy(&device, &run.file("stable"));

        // The guest finds everything where the host's tests do.
        let program = env::current_exe().unwrap();
        let built = Path::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        let daemon = env::var_os("PLOOP_REPLAY_DAEMON").map_or(built.into(), PathBuf::from);
        let img = Path::new(env!("CARGO_BIN_EXE_ploop-img"));
        let plan = serde_json::to_string(&run.plan).unwrap();
        let script = format!(
            "load_modules replay\nexport {PLAN}='{plan}'\n{} --exact {} --ignored --nocapture",
            program.display(),
            load::NAME
        );
        Guest::new(&guest, run.folder.path(), &script)
            .cpus(2)
            .memory_mib(1024)
            .program(&program, &program)
            .program(&daemon, built)
            .program(img, img)
            .raw_disk(&device)
            .raw_disk(&run.file("log"))
            .raw_disk(&run.file("journal"))
            .run();
        Some(run)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Cuts the power at so many points. Returns what is wrong after cuts.
    fn cut(&self, points: usize) -> Vec<String> {
        let journal = fs::read(self.file("journal")).unwrap();
        let end = journal.iter().position(|&byte| byte == 0).unwrap();
        let mut truth = Truth::new(&journal[..end], DISK / SECTOR as u64);
        let mut device = Device::new(Log::open(&self.file("log")), &self.file("stable"));
        let mut rng = SmallRng::seed_from_u64(self.plan.seed);
        let points = choose(&device, points, &mut rng);
        let marks = marks(&device);
        assert_eq!(marks.len(), truth.marks(), "all marks are in the log");
        let mut violations = Vec::new();
        for (number, &point) in points.iter().enumerate() {
            let left = self.file(&format!("left-{number}"));
            device.cut(point, &left, &mut rng);
            truth.advance(marks.partition_point(|&mark| mark < point));
            let check = AssertUnwindSafe(|| self.check(&left, &truth));
            if let Err(said) = panic::catch_unwind(check) {
                violations.push(format!("point {point}: {}", message(&*said)));
            } else {
                fs::remove_file(left).unwrap();
            }
        }
        let (lost, possible) = device.lost;
        let (entries, marks) = (device.entries().len(), marks.len());
        println!(
            "{entries} entries, {marks} marks, {} points: {} violations; \
             {lost} of {possible} pieces lost",
            points.len(),
            violations.len()
        );
        assert!(lost > 0 && lost < possible, "the points were no test");
        violations
    }

    /// Opens the disk that a cut has left.
    fn check(&self, left: &Path, truth: &Truth) {
        let fs = SmallFs::of(&self.plan.fs, left).expect("the file system can be mounted");
        let disk = fs.root().join(self.plan.disk());
        let info = ["info", "--output", "json"].map(str::as_ref);
        let info = ploop_img(info.into_iter().chain([disk.as_os_str()])).ok();
        let info: Value = serde_json::from_str(&info).unwrap();
        let top = Path::new(info["filename"].as_str().unwrap());
        expect_no_corruption(&disk, top);

        let place = TempDir::new().unwrap();
        let backend = Backend::start::<&str>(&disk, &place.path().join("socket"), &[]);
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        for offset in (0..DISK).step_by(BUFFER) {
            lane.read(offset, BUFFER, 0);
            assert_eq!(lane.wait(1), [(0, 0)]);
            let first = offset as usize / SECTOR;
            for (sector, found) in (first..).zip(lane.bytes(0, BUFFER).chunks(SECTOR)) {
                let versions = truth.of(sector);
                let is_one = |&version: &u32| content(sector as u64, version) == found;
                assert!(
                    versions.iter().any(is_one),
                    "sector {sector} holds none of the versions {versions:?}: {:x?}",
                    &found[..16]
                );
            }
        }
        drop(client);
        backend.stop();
        // A cut amid `snapshot create` leaves a file that is part of no disk.
        expect_no_corruption(&disk, top);
    }
}

/// Of each mark of the journal, its entry in the log.
fn marks(device: &Device) -> Vec<usize> {
    let numbers = device
        .entries()
        .iter()
        .enumerate()
        .filter_map(|(at, entry)| {
            // The device makes one of its own when it ends.
            let number: usize = entry.mark.as_ref()?.parse().ok()?;
            Some((at, number))
        });
    let marks: Vec<_> = numbers.collect();
    assert!(marks.iter().map(|mark| mark.1).eq(1..=marks.len()));
    marks.into_iter().map(|mark| mark.0).collect()
}

/// Points in the log, from the first mark on: a third each behind marks, where
/// everything before was just flushed; before or behind what makes something stable; and
/// anywhere.
fn choose(device: &Device, count: usize, rng: &mut SmallRng) -> Vec<usize> {
    let marks = marks(device);
    let all = marks[0] + 1..=device.entries().len();
    let syncs: Vec<_> = all
        .clone()
        .filter(|&at| {
            let entry = device.entries().get(at);
            entry.is_some_and(|entry| entry.is_flush || entry.is_fua)
        })
        .collect();
    let mut points: Vec<_> = (0..count)
        .map(|point| match point % 3 {
            0 => marks.choose(rng).unwrap() + 1,
            1 => syncs.choose(rng).unwrap() + rng.random_range(0..2),
            _ => rng.random_range(all.clone()),
        })
        .collect();
    points.sort_unstable();
    points
}

fn message(said: &(dyn Any + Send)) -> String {
    let text = said.downcast_ref::<String>().cloned();
    let text = text.or_else(|| said.downcast_ref::<&str>().map(|&text| text.to_owned()));
    text.unwrap_or_default()
}

/// As many runs of this kind as `ci/replay.sh` was asked for.
fn expect_flushed_data_to_survive(is_chain: bool) {
    let runs = setting("PLOOP_REPLAY_RUNS", 2) as usize;
    let points = setting("PLOOP_REPLAY_POINTS", 8) as usize;
    let seed = setting("PLOOP_REPLAY_SEED", rand::random::<u32>().into());
    let mut all = Vec::new();
    let first = setting("PLOOP_REPLAY_FIRST", 0) as usize;
    for run in (first..runs).filter(|run| (run % 2 == 1) == is_chain) {
        let plan = plan(is_chain, run / 2, seed + run as u64);
        println!("run {run}: {plan:?}");
        let started = Instant::now();
        let Some(done) = Run::new(plan) else { return };
        let violations = done.cut(points);
        println!("run {run} took {} s", started.elapsed().as_secs());
        if !violations.is_empty() {
            let Run { folder, .. } = done;
            println!("run {run} is kept in {}", folder.keep().display());
        }
        all.extend(violations);
    }
    assert!(all.is_empty(), "{all:#?}");
}

#[test]
#[ignore = "ci/replay.sh runs it"]
fn a_power_cut_takes_nothing_flushed_from_a_single_image() {
    expect_flushed_data_to_survive(false);
}

#[test]
#[ignore = "ci/replay.sh runs it"]
fn a_power_cut_takes_nothing_flushed_from_a_chain() {
    expect_flushed_data_to_survive(true);
}

/// Or the other tests prove nothing.
#[test]
#[ignore = "ci/replay.sh runs it"]
fn syncs_that_do_nothing_are_noticed() {
    let plan = Plan {
        // Not those that a write asks for, nor those of io_uring.
        write_through: false,
        without_syncs: true,
        ..plan(false, 1, 1)
    };
    let Some(run) = Run::new(plan) else { return };
    let violations = run.cut(12);
    println!("{violations:#?}");
    let lost = |said: &String| said.contains("holds none of the versions");
    assert!(violations.iter().any(lost), "{violations:#?}");
}
