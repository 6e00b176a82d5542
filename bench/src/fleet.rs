//! What many disks on one host cost it: started all at once, with nobody attached, with a
//! client each, asked for their metrics, and started once more when all were killed.
//!
//! The figures of `docs/scale.md`. Rates are no matter of it.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use crate::bed::Bed;
use crate::client::{Device, Shape, Target};
use crate::contestant::{Launch, OURS};
use crate::image;
use crate::measure::Setting;
use crate::opening;
use crate::scratch;
use crate::server::Server;
use crate::workload::Cache;

/// How many disks, unless `--disks` says.
pub const DISKS: u32 = 500;

/// A real file system: a tmpfs has no locks that cost anything and nothing to read.
const BED: Bed = Bed::Disk;

/// 1 TiB in clusters of 1 MiB, all mapped: a BAT of 4 MiB.
const DISK_BYTES: u64 = 1 << 40;
const CLUSTER_BYTES: u32 = 1 << 20;

/// How long they are left alone before it is looked at what idling costs, and then watched.
const SETTLE: Duration = Duration::from_secs(7);
const IDLE: Duration = Duration::from_secs(20);

/// Descriptors of this process for each disk: those of its client.
const DESCRIPTORS_EACH: u64 = 16;

/// One client's queue: it only shows that the disk works.
const SHAPE: Shape = Shape {
    queues: 1,
    depth: 1,
    buffer_bytes: 4096,
    cache: Cache::WriteBack,
};

/// What was seen of one start of all.
struct Start {
    /// Until the last one answered.
    time: Duration,
    /// CPU time of all.
    cpu: Duration,
}

/// What all cost together while nothing happens.
struct Rest {
    /// Of one CPU.
    share: f64,
    /// Context switches in a second.
    switches: f64,
    /// Memory in bytes, what they share counted once, and what of it belongs to one alone.
    proportional: u64,
    private: u64,
    threads: usize,
    descriptors: usize,
}

/// What was measured.
pub struct Fleet {
    disks: u32,
    /// Whether the host's page cache was emptied before each start.
    is_cold: bool,
    closed: Start,
    alone: Rest,
    attached: Rest,
    /// What the host has less of, in bytes, with a client each: the kernel's share included,
    /// and this process'.
    taken: u64,
    /// One look at the metrics of all, one after the other, and how many bytes they are.
    scrape: Duration,
    metrics: usize,
    killed: Start,
    /// From the signal to the last one's end.
    stop: Duration,
}

/// One disk, its server and where that is reached.
struct Disk {
    image: PathBuf,
    dir: TempDir,
}

impl Disk {
    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn metrics(&self) -> PathBuf {
        self.dir.path().join("m")
    }

    fn start(&self, setting: &Setting) -> Result<Server> {
        let launch = Launch {
            image: &self.image,
            backing: &[],
            socket: &self.socket(),
            bed: BED,
            queues: 1,
            write_through: false,
        };
        let command = OURS.command(&setting.programs, launch);
        let mut command = command.context("a contestant without a server")?;
        let metrics = format!("unix:{}", self.metrics().display());
        command.args(["--metrics", &metrics]);
        Server::start(OURS.label(), command, self.dir.path())
    }
}

/// Serves `count` disks.
///
/// # Errors
/// A server that fails, a limit of descriptors that is too low, or the user's wish to stop.
pub fn measure(setting: &Setting, count: u32) -> Result<Fleet> {
    allow_descriptors(u64::from(count))?;
    let images = setting.directories.make(BED)?;
    let make = |index: u32| {
        let image = images.path().join(format!("{index}.hds"));
        image::write_fully_mapped(&image, DISK_BYTES, CLUSTER_BYTES).context("writing an image")?;
        let dir = scratch::for_socket()?;
        Ok(Disk { image, dir })
    };
    let disks: Vec<Disk> = (0..count).map(make).collect::<Result<_>>()?;

    let (servers, closed) = start(setting, &disks)?;
    let alone = rest(setting, &servers)?;
    let before = available()?;
    let devices: Vec<Device> = disks.iter().map(attach).collect::<Result<_>>()?;
    let attached = rest(setting, &servers)?;
    let taken = before.saturating_sub(available()?);
    let begin = Instant::now();
    let metrics = disks.iter().map(|disk| scrape(&disk.metrics()));
    let metrics = metrics.sum::<Result<usize>>()?;
    let scrape = begin.elapsed();

    // Killed, each with an image in use. A client that is dropped first would have it closed.
    let is_cold = empty_page_cache();
    drop(servers);
    drop(devices);
    let (servers, killed) = start(setting, &disks)?;
    let begin = Instant::now();
    thread::scope(|scope| {
        let stop = |server: Server| scope.spawn(|| server.stop());
        let stops: Vec<_> = servers.into_iter().map(stop).collect();
        let mut ends = stops.into_iter().map(|stop| stop.join().expect("no panic"));
        ends.try_for_each(|end| end.map(drop))
    })?;
    Ok(Fleet {
        disks: count,
        is_cold,
        closed,
        alone,
        attached,
        taken,
        scrape,
        metrics,
        killed,
        stop: begin.elapsed(),
    })
}

/// Lets this process have what `count` clients need.
fn allow_descriptors(count: u64) -> Result<()> {
    let needed = count * DESCRIPTORS_EACH;
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    ensure!(
        maximum.is_none_or(|maximum| maximum >= needed),
        "{count} disks need {needed} descriptors: ulimit -Hn {needed}, or fewer --disks"
    );
    let current = maximum.or(Some(needed));
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).context("raising RLIMIT_NOFILE")
}

/// Starts them all and waits until each has answered.
fn start(setting: &Setting, disks: &[Disk]) -> Result<(Vec<Server>, Start)> {
    empty_page_cache();
    let begin = Instant::now();
    let servers = disks.iter().map(|disk| disk.start(setting));
    let mut servers: Vec<Server> = servers.collect::<Result<_>>()?;
    for (disk, server) in disks.iter().zip(&mut servers) {
        setting.check_interrupted()?;
        server.once_listening(|| opening::ask_for_features(&disk.socket()))?;
    }
    let time = begin.elapsed();
    let cpu = cpu(&servers)?;
    Ok((servers, Start { time, cpu }))
}

/// Attaches a client that writes something, and has it stable.
fn attach(disk: &Disk) -> Result<Device> {
    let mut device = Device::open(Target::Socket(&disk.socket()), SHAPE)?;
    let lane = &mut device.lanes()[0];
    lane.write(0, SHAPE.buffer_bytes as usize, 0);
    lane.drain()?;
    device.flush()?;
    Ok(device)
}

/// Has the host forget what files hold; whether it could.
fn empty_page_cache() -> bool {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// Memory that programs could still have, in bytes.
fn available() -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    Ok(kib(&meminfo, "MemAvailable:")? * 1024)
}

fn cpu(servers: &[Server]) -> Result<Duration> {
    servers.iter().map(Server::cpu_time).sum()
}

fn rest(setting: &Setting, servers: &[Server]) -> Result<Rest> {
    thread::sleep(SETTLE);
    let switches = servers.iter().map(Server::context_switches);
    let switches: Vec<_> = switches.collect::<Result<_>>()?;
    let (begin, before) = (Instant::now(), cpu(servers)?);
    while begin.elapsed() < IDLE {
        setting.check_interrupted()?;
        thread::sleep(Duration::from_millis(100));
    }
    let (time, cpu) = (begin.elapsed(), cpu(servers)? - before);
    let mut rest = Rest {
        share: cpu.as_secs_f64() / time.as_secs_f64(),
        switches: 0.0,
        proportional: 0,
        private: 0,
        threads: 0,
        descriptors: 0,
    };
    for (server, before) in servers.iter().zip(&switches) {
        let since = server.context_switches()?.since(before);
        rest.switches += since as f64 / time.as_secs_f64();
        let of_process = |file: &str| PathBuf::from(format!("/proc/{}/{file}", server.id()));
        let rollup = fs::read_to_string(of_process("smaps_rollup"))?;
        rest.proportional += kib(&rollup, "Pss:")? * 1024;
        rest.private += kib(&rollup, "Private_Dirty:")? * 1024;
        rest.threads += fs::read_dir(of_process("task"))?.count();
        rest.descriptors += fs::read_dir(of_process("fd"))?.count();
    }
    Ok(rest)
}

/// The number of KiB after `name`.
fn kib(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    let number = number.with_context(|| format!("no {name}"))?;
    number.parse().with_context(|| format!("{name} {number}"))
}

/// One look at the metrics of a disk: how many bytes they are.
fn scrape(socket: &Path) -> Result<usize> {
    let mut stream = UnixStream::connect(socket).context("connecting to --metrics")?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: disk\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "no metrics");
    Ok(answer.len())
}

/// A table for a terminal.
pub fn table(fleet: &Fleet) -> String {
    let disks = f64::from(fleet.disks);
    let mut text = format!(
        "| {} disks of 1 TiB, all mapped{} | all | each |\n|---|---:|---:|\n",
        fleet.disks,
        if fleet.is_cold { "" } else { ", warm cache" }
    );
    let mut row = |what: &str, unit: &str, all: f64| {
        let each = all / disks;
        let _ = writeln!(text, "| {what} | {all:.1} {unit} | {each:.3} {unit} |");
    };
    let starts = [
        (&fleet.closed, "images that were closed"),
        (&fleet.killed, "after SIGKILL, images in use"),
    ];
    for (start, images) in starts {
        row(
            &format!("start, {images}: until the last answers"),
            "s",
            start.time.as_secs_f64(),
        );
        row(
            &format!("start, {images}: CPU"),
            "s",
            start.cpu.as_secs_f64(),
        );
    }
    const MIB: f64 = (1 << 20) as f64;
    let rests = [
        (&fleet.alone, "nobody attached"),
        (&fleet.attached, "a client each"),
    ];
    for (rest, who) in rests {
        row(&format!("idle, {who}: CPU"), "%", 100.0 * rest.share);
        row(
            &format!("idle, {who}: context switches"),
            "/s",
            rest.switches,
        );
        let memory = rest.proportional as f64 / MIB;
        row(&format!("{who}: memory (Pss)"), "MiB", memory);
        let memory = rest.private as f64 / MIB;
        row(
            &format!("{who}: of it nobody else's, written"),
            "MiB",
            memory,
        );
        row(&format!("{who}: threads"), "", rest.threads as f64);
        row(&format!("{who}: descriptors"), "", rest.descriptors as f64);
    }
    row(
        "a client each: what the host has less of, clients and kernel included",
        "MiB",
        fleet.taken as f64 / MIB,
    );
    row(
        "metrics, one after the other",
        "s",
        fleet.scrape.as_secs_f64(),
    );
    row("metrics", "KiB", fleet.metrics as f64 / 1024.0);
    row(
        "SIGTERM to all, until the last has ended",
        "s",
        fleet.stop.as_secs_f64(),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_a_share_of_all() {
        let start = || Start {
            time: Duration::from_secs(4),
            cpu: Duration::from_secs(2),
        };
        let rest = || Rest {
            share: 0.5,
            switches: 8.0,
            proportional: 4 << 20,
            private: 2 << 20,
            threads: 36,
            descriptors: 100,
        };
        let table = table(&Fleet {
            disks: 4,
            is_cold: true,
            closed: start(),
            alone: rest(),
            attached: rest(),
            taken: 0,
            scrape: Duration::from_secs(1),
            metrics: 4096,
            killed: start(),
            stop: Duration::from_secs(1),
        });
        for row in [
            "| start, images that were closed: until the last answers | 4.0 s | 1.000 s |",
            "| idle, a client each: CPU | 50.0 % | 12.500 % |",
            "| nobody attached: threads | 36.0  | 9.000  |",
            "| metrics | 4.0 KiB | 1.000 KiB |",
        ] {
            assert!(table.contains(row), "{row} is not in\n{table}");
        }
    }

    #[test]
    fn a_number_of_kib_is_found_by_its_name() {
        let text = "Pss:   12 kB\nPss_Dirty:  7 kB\n";
        assert_eq!(kib(text, "Pss:").unwrap(), 12);
        assert_eq!(kib(text, "Pss_Dirty:").unwrap(), 7);
        assert!(kib(text, "Rss:").is_err());
    }
}
