//! What a guest notices of work on its disk: what is left of its rate beside a job, and how
//! long its requests are held for a snapshot or a larger disk.
//!
//! A job of ours is set beside what is most like it at QEMU: `block-commit` moves as much data
//! along a chain of qcow2 images as the deletion of our snapshot does, the other way.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bed::Bed;
use crate::contestant::{Contestant, OURS, QSD_QCOW2, backing_node};
use crate::image::{self, Geometry, Image};
use crate::measure::{Setting, turn};
use crate::opening::{CLUSTER_BYTES, DISK_BYTES};
use crate::qmp::Qmp;
use crate::run::Plan;
use crate::scenario;
use crate::scratch;
use crate::station::{self, PREPARED, Station};
use crate::stats::{Estimate, median};
use crate::workload::Workload;

/// Rounds unless `--rounds` says.
pub const ROUNDS: u32 = 8;

/// So much is moved: more than in all rounds together, or there would be nothing beside the
/// last ones.
const GEOMETRY: Geometry = Geometry {
    disk_bytes: 4 << 30,
    cluster_bytes: None,
};

/// Of the disk whose requests are held: small clusters are soon copied, and a copy is not what
/// is looked for.
const HELD: Geometry = Geometry {
    disk_bytes: 1 << 30,
    cluster_bytes: Some(64 << 10),
};

/// By how much a disk grows.
const GROWTH: u64 = 64 << 20;

/// The share of its rate that a guest is to keep beside a job.
const SHARE: f64 = 0.7;

/// What is done to the disk as a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Delete,
    Compact,
    Commit,
}

impl Work {
    fn label(self) -> &'static str {
        match self {
            Self::Delete => "snapshot-delete",
            Self::Compact => "compact",
            Self::Commit => "block-commit",
        }
    }

    fn contestant(self) -> Contestant {
        match self {
            Self::Delete | Self::Compact => OURS,
            Self::Commit => QSD_QCOW2,
        }
    }

    fn begin(self, qmp: &mut Qmp, guid: Option<&Value>) -> Result<()> {
        let mut arguments = json!({ "job-id": JOB, "auto-dismiss": false });
        match self {
            Self::Delete => arguments["guid"] = guid.context("no snapshot")?.clone(),
            Self::Compact => {}
            Self::Commit => {
                arguments["device"] = "fmt".into();
                arguments["top-node"] = backing_node(0).into();
                arguments["base-node"] = backing_node(1).into();
            }
        }
        qmp.ask(self.label(), arguments).map(drop)
    }
}

const JOB: &str = "job";

/// A guest's rate beside a job.
pub struct Beside {
    bed: Bed,
    work: Work,
    workload: String,
    /// Requests a second of each round, without the job and beside it.
    alone: Vec<f64>,
    beside: Vec<f64>,
    /// Bytes a second that the job moved, beside the guest, and without it.
    moved: Vec<f64>,
    moved_alone: f64,
}

/// How long requests were held.
pub struct Holds {
    disk: String,
    what: &'static str,
    /// The longest request of each run in which it was done, and of each run in which the
    /// host's files were synced in its place, in milliseconds.
    longest: Vec<f64>,
    beside_sync: Vec<f64>,
    /// What these syncs took, in milliseconds.
    syncs: Vec<f64>,
    /// How much longer than a sync it may take, in milliseconds.
    target: f64,
}

/// What was measured.
pub struct Changes {
    besides: Vec<Beside>,
    holds: Vec<Holds>,
    /// From 1 TiB to 8 TiB, all mapped, in seconds.
    growth: f64,
}

/// Measures `rounds` times.
///
/// # Errors
/// A server that fails, a job that is over too soon, or the user's wish to stop.
pub fn measure(setting: &Setting, rounds: u32) -> Result<Changes> {
    let mut besides = Vec::new();
    for bed in [Bed::Disk, Bed::PageCache] {
        for work in [Work::Delete, Work::Compact, Work::Commit] {
            let beside = measure_job(setting, bed, work, rounds);
            besides.push(beside.with_context(|| format!("{}, {}", work.label(), bed.label()))?);
        }
    }
    let mut holds = Vec::new();
    for bed in [Bed::Disk, Bed::PageCache] {
        let image = Image::empty_bundle(&setting.programs, &setting.directories, bed, HELD)?;
        station::fill(&setting.programs, bed, OURS, &image)?;
        let disk = format!("{}, 1 GiB", bed.label());
        holds.extend(measure_holds(setting, bed, &image, (disk, 20.0), rounds)?);
    }
    let bed = Bed::Tmpfs;
    let image = mapped_bundle(setting, bed, DISK_BYTES / 2)?;
    let disk = format!("{}, 4 TiB, all mapped", bed.label());
    holds.extend(measure_holds(setting, bed, &image, (disk, 50.0), rounds)?);
    Ok(Changes {
        besides,
        holds,
        growth: grow_by_far(setting)?,
    })
}

/// A run in which it is not looked what is read: after jobs a part of the disk is, in the end.
fn plan(setting: &Setting, round: u32) -> Plan {
    Plan {
        limit: Some(setting.run_time),
        budget: None,
        generation: PREPARED,
        expected: None,
        seed: u64::from(round) << 32,
    }
}

/// A server with its control socket, and a client of that.
struct Site {
    station: Station,
    qmp: Qmp,
    _dir: TempDir,
}

impl Site {
    fn open(
        setting: &Setting,
        bed: Bed,
        contestant: Contestant,
        image: &Image,
        workload: &Workload,
    ) -> Result<Self> {
        let dir = scratch::for_socket()?;
        let control = dir.path().join("c");
        let with_control = |mut command: Command| {
            command.args(control_arguments(contestant, &control));
            command
        };
        let shape = station::shape(workload);
        let programs = &setting.programs;
        let station = Station::open_with(programs, bed, contestant, image, shape, with_control)?;
        let qmp = Qmp::connect(&control)?;
        Ok(Self {
            station,
            qmp,
            _dir: dir,
        })
    }

    /// In requests a second, and the longest in milliseconds.
    fn run(&mut self, setting: &Setting, workload: &Workload, round: u32) -> Result<(f64, f64)> {
        setting.check_interrupted()?;
        let (outcome, _) = self.station.run(workload, &plan(setting, round))?;
        let rate = outcome.requests as f64 / outcome.elapsed.as_secs_f64();
        Ok((rate, outcome.latency.max() as f64 / 1e6))
    }

    fn job(&mut self) -> Result<Value> {
        let jobs = self.qmp.ask("query-jobs", json!({}))?;
        jobs.get(0).cloned().context("the job is gone")
    }

    /// How much the job has done of how much, in bytes.
    fn progress(&mut self) -> Result<(f64, f64)> {
        let job = self.job()?;
        let number = |name: &str| job[name].as_f64().context("a job without progress");
        Ok((number("current-progress")?, number("total-progress")?))
    }

    /// Ends the job, or waits for its end.
    fn end_job(&mut self, is_cancelled: bool) -> Result<()> {
        if is_cancelled {
            self.qmp.ask("job-cancel", json!({ "id": JOB }))?;
        }
        let job = loop {
            let job = self.job()?;
            if job["status"] == "concluded" {
                break job;
            }
            thread::sleep(Duration::from_millis(1));
        };
        let failed = !job["error"].is_null() && !is_cancelled;
        ensure!(!failed, "the job has failed: {job}");
        self.qmp.ask("job-dismiss", json!({ "id": JOB })).map(drop)
    }
}

fn control_arguments(contestant: Contestant, control: &Path) -> Vec<OsString> {
    match contestant.is_ours() {
        true => vec!["--control".into(), control.into()],
        false => {
            let chardev = format!(
                "socket,id=control,server=on,wait=off,path={}",
                control.display()
            );
            ["--chardev", &chardev, "--monitor", "chardev=control"]
                .map(OsString::from)
                .into()
        }
    }
}

/// The disk, with all of it in what is to be merged.
fn chain_of(setting: &Setting, bed: Bed, work: Work) -> Result<Vec<Image>> {
    let contestant = work.contestant();
    let (programs, directories) = (&setting.programs, &setting.directories);
    setting.wait_for_space(bed, 2 * GEOMETRY.disk_bytes)?;
    let chain = match contestant.is_ours() {
        true => {
            let bundle = Image::empty_bundle(programs, directories, bed, GEOMETRY)?;
            station::fill(programs, bed, contestant, &bundle)?;
            if work == Work::Delete {
                bundle.snapshot(programs)?;
            }
            vec![bundle]
        }
        false => {
            let base = Image::empty(directories, bed, contestant, GEOMETRY)?;
            let mid = base.qcow2_overlay(directories, bed, GEOMETRY)?;
            station::fill(programs, bed, contestant, &mid)?;
            let top = mid.qcow2_overlay(directories, bed, GEOMETRY)?;
            vec![top, mid, base]
        }
    };
    chain[0].settle()?;
    Ok(chain)
}

fn measure_job(setting: &Setting, bed: Bed, work: Work, rounds: u32) -> Result<Beside> {
    let workload = scenario::random_read(32);
    let chain = chain_of(setting, bed, work)?;
    let guid = snapshot_of(setting, work, &chain[0])?;
    let mut site = Site::open(setting, bed, work.contestant(), &chain[0], &workload)?;
    if bed == Bed::PageCache {
        chain
            .iter()
            .try_for_each(|image| read_all(image.dir.path()))?;
    }
    site.run(setting, &workload, u32::MAX)?;
    let mut beside = Beside {
        bed,
        work,
        workload: workload.name.clone(),
        alone: Vec::new(),
        beside: Vec::new(),
        moved: Vec::new(),
        moved_alone: 0.0,
    };
    for round in 0..rounds {
        let rate = |site: &mut Site| site.run(setting, &workload, round).map(|run| run.0);
        // What follows what shall not matter.
        let is_first = round % 2 == 0;
        if is_first {
            beside.alone.push(rate(&mut site)?);
        }
        work.begin(&mut site.qmp, guid.as_ref())?;
        let (before, _) = site.progress()?;
        let start = Instant::now();
        beside.beside.push(rate(&mut site)?);
        let time = start.elapsed();
        let job = site.job()?;
        let is_running = job["status"] == "running";
        ensure!(is_running, "{} is over too soon: {job}", work.label());
        let (after, _) = site.progress()?;
        beside.moved.push((after - before) / time.as_secs_f64());
        site.end_job(true)?;
        if !is_first {
            beside.alone.push(rate(&mut site)?);
        }
    }
    let start = Instant::now();
    work.begin(&mut site.qmp, guid.as_ref())?;
    let mut total = 0.0;
    while site.job()?["status"] != "concluded" {
        setting.check_interrupted()?;
        total = site.progress()?.1;
        thread::sleep(Duration::from_millis(1));
    }
    beside.moved_alone = total / start.elapsed().as_secs_f64();
    site.end_job(false)?;
    site.station.verify_sample(PREPARED)?;
    site.station.stop()?;
    Ok(beside)
}

/// Has the host know all files of a folder, and of the folders in it.
fn read_all(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => read_all(&path)?,
            false => drop(io::copy(&mut File::open(path)?, &mut io::sink())?),
        }
    }
    Ok(())
}

fn snapshot_of(setting: &Setting, work: Work, image: &Image) -> Result<Option<Value>> {
    if work != Work::Delete {
        return Ok(None);
    }
    let output = Command::new(&setting.programs.img)
        .args(["snapshot", "list", "--output=json"])
        .arg(&image.path)
        .output()?;
    let list: Value = serde_json::from_slice(&output.stdout)?;
    let snapshots = list.as_array().context("no list of snapshots")?;
    let is_it = |it: &&Value| it["current"] != true;
    let found = snapshots.iter().find(is_it).context("no snapshot")?;
    Ok(Some(found["guid"].clone()))
}

/// What is done while requests are under way.
const HOLDING: [&str; 2] = ["snapshot-create", "block_resize"];

fn measure_holds(
    setting: &Setting,
    bed: Bed,
    image: &Image,
    (disk, target): (String, f64),
    rounds: u32,
) -> Result<Vec<Holds>> {
    let workload = scenario::mix(8);
    let mut site = Site::open(setting, bed, OURS, image, &workload)?;
    site.run(setting, &workload, u32::MAX)?;
    let mut all = HOLDING.map(|what| Holds {
        disk: disk.clone(),
        what,
        longest: Vec::new(),
        beside_sync: Vec::new(),
        syncs: Vec::new(),
        target,
    });
    for round in 0..rounds {
        for index in turn(all.len(), round) {
            let holds = &mut all[index];
            let plan = plan(setting, round);
            let Site { station, qmp, .. } = &mut site;
            let (longest, time) = longest_beside(setting, station, (&workload, &plan), || {
                sync_all(&image.path)
            })?;
            holds.beside_sync.push(longest);
            holds.syncs.push(time);
            let arguments = match holds.what {
                "block_resize" => {
                    let nodes = qmp.ask("query-named-block-nodes", json!({}))?;
                    let size = nodes[0]["image"]["virtual-size"].as_u64();
                    let size = size.context("a node without a size")? + GROWTH;
                    json!({ "node-name": nodes[0]["node-name"], "size": size })
                }
                _ => json!({}),
            };
            let (longest, _) = longest_beside(setting, station, (&workload, &plan), || {
                qmp.ask(holds.what, arguments).map(drop)
            })?;
            holds.longest.push(longest);
        }
    }
    site.station.stop()?;
    Ok(all.into())
}

/// The longest request of a run amid which something is done, and how long that takes, both in
/// milliseconds.
fn longest_beside(
    setting: &Setting,
    station: &mut Station,
    (workload, plan): (&Workload, &Plan),
    doing: impl FnOnce() -> Result<()> + Send,
) -> Result<(f64, f64)> {
    setting.check_interrupted()?;
    let (run, time) = thread::scope(|scope| {
        let doing = scope.spawn(|| {
            thread::sleep(setting.run_time / 3);
            let start = Instant::now();
            doing().map(|()| start.elapsed())
        });
        let run = station.run(workload, plan);
        (run, doing.join().expect("no panic"))
    });
    let (outcome, _) = run?;
    Ok((
        outcome.latency.max() as f64 / 1e6,
        time?.as_secs_f64() * 1e3,
    ))
}

/// Syncs the files of a bundle.
fn sync_all(bundle: &Path) -> Result<()> {
    for entry in fs::read_dir(bundle)? {
        let path = entry?.path();
        if path.is_file() {
            File::open(path)?.sync_data()?;
        }
    }
    Ok(())
}

/// A bundle whose only image maps everything.
fn mapped_bundle(setting: &Setting, bed: Bed, disk_bytes: u64) -> Result<Image> {
    let geometry = Geometry {
        disk_bytes,
        cluster_bytes: Some(CLUSTER_BYTES),
    };
    let bundle = Image::empty_bundle(&setting.programs, &setting.directories, bed, geometry)?;
    let image = bundle.path.join("root.hds");
    fs::remove_file(&image).context("the image of a new bundle")?;
    image::write_fully_mapped(&image, disk_bytes, CLUSTER_BYTES)?;
    Ok(bundle)
}

/// How long it takes, in seconds, with a guest that does nothing.
fn grow_by_far(setting: &Setting) -> Result<f64> {
    let bed = Bed::Tmpfs;
    let image = mapped_bundle(setting, bed, DISK_BYTES / 8)?;
    let workload = scenario::random_read(1);
    let mut site = Site::open(setting, bed, OURS, &image, &workload)?;
    let nodes = site.qmp.ask("query-named-block-nodes", json!({}))?;
    let arguments = json!({ "node-name": nodes[0]["node-name"], "size": DISK_BYTES });
    let start = Instant::now();
    site.qmp.ask("block_resize", arguments)?;
    let time = start.elapsed().as_secs_f64();
    site.station.stop()?;
    match image.check(&setting.programs) {
        Ok(()) => Ok(time),
        Err(error) => bail!("a disk that has grown: {error:#}"),
    }
}

/// Tables for a terminal.
pub fn table(changes: &Changes) -> String {
    let middle = |sample: &[f64]| median(sample).unwrap_or_default();
    let highest = |sample: &[f64]| sample.iter().copied().fold(0.0, f64::max);
    let mut text = String::from(
        "| bed | load | job | rate beside it | of the rate alone | target | \
         the job MiB/s | without load MiB/s |\n|---|---|---|---:|---:|---:|---:|---:|\n",
    );
    for seen in &changes.besides {
        let ratio = Estimate::of_ratio(&seen.beside, &seen.alone);
        let ratio = ratio.map_or("-".to_owned(), |ratio| {
            let Estimate {
                median, low, high, ..
            } = ratio;
            format!("{median:.3} [{low:.3}, {high:.3}]")
        });
        let target = match seen.work.contestant().is_ours() {
            true => format!("{SHARE:.1}"),
            false => "-".to_owned(),
        };
        let mebibytes = |bytes: f64| bytes / f64::from(1 << 20);
        let _ = writeln!(
            text,
            "| {} | {} | {}, {} | {:.0} | {ratio} | {target} | {:.0} | {:.0} |",
            seen.bed.label(),
            seen.workload,
            seen.work.contestant().label(),
            seen.work.label(),
            middle(&seen.beside),
            mebibytes(middle(&seen.moved)),
            mebibytes(seen.moved_alone),
        );
    }
    text.push_str(
        "\n| disk | operation | longest request ms, median | longest ms | beside a sync ms, \
         median | longest ms | that sync ms, median | longest ms | target: median below ms |\n\
         |---|---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for seen in &changes.holds {
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} |",
            seen.disk,
            seen.what,
            middle(&seen.longest),
            highest(&seen.longest),
            middle(&seen.beside_sync),
            highest(&seen.beside_sync),
            middle(&seen.syncs),
            highest(&seen.syncs),
            middle(&seen.syncs) + seen.target,
        );
    }
    let _ = writeln!(
        text,
        "\n1 TiB, all mapped, to 8 TiB: {:.2} s (target: 1 s besides moving what is in the way)",
        changes.growth
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_compared_by_round_and_holds_with_a_sync() {
        let changes = Changes {
            besides: vec![Beside {
                bed: Bed::Disk,
                work: Work::Delete,
                workload: "reads".into(),
                alone: vec![100.0, 1000.0],
                beside: vec![80.0, 800.0],
                moved: vec![f64::from(1 << 20); 2],
                moved_alone: 2.0 * f64::from(1 << 20),
            }],
            holds: vec![Holds {
                disk: "a disk".into(),
                what: HOLDING[0],
                longest: vec![3.0, 9.0],
                beside_sync: vec![1.0, 2.0],
                syncs: vec![2.0, 3.0],
                target: 20.0,
            }],
            growth: 0.5,
        };
        let table = table(&changes);
        let rows = [
            "| disk | reads | vhost-user-ploop, snapshot-delete | 440 | 0.800 [0.800, 0.800] | 0.7 | 1 | 2 |",
            "| a disk | snapshot-create | 6.0 | 9.0 | 1.5 | 2.0 | 2.5 | 3.0 | 22.5 |",
            "1 TiB, all mapped, to 8 TiB: 0.50 s (target: 1 s besides moving what is in the way)",
        ];
        for row in rows {
            assert!(table.lines().any(|line| line == row), "{table}");
        }
    }
}
