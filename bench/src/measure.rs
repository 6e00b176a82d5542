//! Measures one scenario: alternated runs of all sides, and what follows from them.
//!
//! Each round runs every side once, starting with another one each time. Only
//! figures of one round are divided by each other: the host's speed drifts more
//! between minutes than the sides differ.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use tempfile::TempDir;

use crate::bed::{Bed, Directories};
use crate::client::{Device, Shape, Target};
use crate::content::Generation;
use crate::contestant::{Contestant, Launch, Programs};
use crate::image::{Geometry, Image};
use crate::run::{self, Outcome, Plan};
use crate::scenario::Scenario;
use crate::server::{self, Server};
use crate::workload::{Action, Cache, Start, Unit, Workload};

/// The generation that images are prepared with.
const PREPARED: Generation = 1;

/// Requests that fill an image: large, a few at a time.
const FILL: Shape = Shape {
    queues: 1,
    depth: 8,
    buffer_bytes: 1 << 20,
    cache: Cache::WriteBack,
};

/// Blocks of a written image that are compared whole at the end of a scenario.
const SAMPLED: usize = 256;

/// How all scenarios are measured.
pub struct Setting {
    /// What is measured.
    pub programs: Programs,
    /// Where.
    pub directories: Directories,
    /// Length of a run.
    pub run_time: Duration,
    /// Set when the user wants to stop.
    pub interrupted: Arc<AtomicBool>,
}

/// Measures scenarios, and keeps the written images that several of them use.
pub struct Lab<'a> {
    setting: &'a Setting,
    written: HashMap<Key, Image>,
    /// Of the last run. Images live longer than scenarios, so it is never reset.
    generation: Generation,
}

/// What makes a prepared image fit.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    contestant: Contestant,
    bed: Bed,
    disk_bytes: u64,
    cluster_bytes: Option<u32>,
    start: Prepared,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Prepared {
    /// To be served.
    Image,
    /// To lie below an overlay.
    Base,
}

/// What one side did in all rounds.
pub struct Side {
    /// Who.
    pub contestant: Contestant,
    /// One of each round.
    pub samples: Vec<Sample>,
    /// Of all rounds together, in nanoseconds.
    pub latency: Histogram<u64>,
    /// Most memory of the server in bytes; `None` without a server.
    pub peak_memory: Option<u64>,
}

/// The figures of one run.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// In the unit of the workload.
    pub rate: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// CPU time of the server per request in microseconds; `None` without one.
    pub server_cpu_us: Option<f64>,
    /// CPU time of this process per request in microseconds.
    pub client_cpu_us: f64,
}

/// A side that is ready to run.
struct Station {
    // In the order in which they must go.
    device: Device,
    server: Option<Server>,
    _socket_dir: TempDir,
    /// Of its last run.
    generation: Generation,
}

impl<'a> Lab<'a> {
    /// A lab without images.
    pub fn new(setting: &'a Setting) -> Self {
        Self {
            setting,
            written: HashMap::new(),
            generation: PREPARED,
        }
    }

    /// Drops the images that are not of `bed`: nobody comes back to them.
    pub fn keep_only(&mut self, bed: Bed) {
        self.written.retain(|key, _| key.bed == bed);
    }

    /// Measures a scenario.
    ///
    /// # Errors
    /// A server that fails, dies or answers wrongly, or the user's wish to stop.
    pub fn measure(&mut self, scenario: &Scenario) -> Result<Vec<Side>> {
        let mut sides: Vec<Side> = scenario
            .contestants
            .iter()
            .map(|&contestant| Side {
                contestant,
                samples: Vec::new(),
                latency: run::latencies(),
                peak_memory: None,
            })
            .collect();
        if scenario.workload.start.is_fresh() {
            self.measure_fresh(scenario, &mut sides)?;
        } else {
            self.measure_lasting(scenario, &mut sides)?;
        }
        Ok(sides)
    }

    /// Serves an image that was just written, with a client attached, while `look`
    /// looks at the server.
    ///
    /// # Errors
    /// Those of the server, and of `look`.
    pub fn with_attached<T>(
        &self,
        contestant: Contestant,
        look: impl FnOnce(&Server) -> Result<T>,
    ) -> Result<T> {
        let bed = Bed::Tmpfs;
        let geometry = Geometry {
            disk_bytes: 128 << 20,
            cluster_bytes: None,
        };
        let image = Image::empty(&self.setting.directories, bed, contestant, geometry)?;
        let mut station = self.open(bed, contestant, &image, FILL)?;
        let filled = run::fill(&mut station.device, PREPARED, FILL.buffer_bytes as usize);
        filled.map_err(|error| station.explain(error))?;
        let server = station
            .server
            .as_ref()
            .context("a contestant without a server")?;
        let seen = look(server)?;
        station.verify_sample()?;
        station.stop()?;
        Ok(seen)
    }

    /// Every run has an image and a server of its own.
    fn measure_fresh(&mut self, scenario: &Scenario, sides: &mut [Side]) -> Result<()> {
        for round in 0..scenario.rounds {
            for index in turn(sides.len(), round) {
                let side = &mut sides[index];
                let image = self.fresh_image(scenario, side.contestant)?;
                image.settle()?;
                let mut station = self.station(scenario, side.contestant, &image)?;
                self.run_once(scenario, &mut station, side, round, self.setting.run_time)?;
                station.close(side)?;
                image.check()?;
            }
        }
        Ok(())
    }

    /// All servers stay up, on images that last.
    fn measure_lasting(&mut self, scenario: &Scenario, sides: &mut [Side]) -> Result<()> {
        for side in sides.iter() {
            self.prepare_written(scenario, side.contestant)?;
        }
        let mut stations = Vec::new();
        for side in sides.iter_mut() {
            let image = &self.written[&key(scenario, side.contestant, Prepared::Image)];
            image.settle()?;
            let mut station = self.station(scenario, side.contestant, image)?;
            self.warm_up(scenario, &mut station, side)?;
            stations.push(station);
        }
        for round in 0..scenario.rounds {
            for index in turn(sides.len(), round) {
                let station = &mut stations[index];
                let side = &mut sides[index];
                self.run_once(scenario, station, side, round, self.setting.run_time)?;
            }
        }
        for (mut station, side) in stations.into_iter().zip(sides) {
            station.verify_sample()?;
            station.close(side)?;
            self.written[&key(scenario, side.contestant, Prepared::Image)].check()?;
        }
        Ok(())
    }

    /// A short run that is not counted: pages come into the cache, rings and pools
    /// get their size.
    fn warm_up(&mut self, scenario: &Scenario, station: &mut Station, side: &Side) -> Result<()> {
        let mut discarded = Side {
            contestant: side.contestant,
            samples: Vec::new(),
            latency: run::latencies(),
            peak_memory: None,
        };
        let time = self.setting.run_time / 4;
        self.run_once(scenario, station, &mut discarded, u32::MAX, time)
    }

    fn run_once(
        &mut self,
        scenario: &Scenario,
        station: &mut Station,
        side: &mut Side,
        round: u32,
        time: Duration,
    ) -> Result<()> {
        if self.setting.interrupted.load(Ordering::Relaxed) {
            bail!("stopped by the user");
        }
        let workload = &scenario.workload;
        self.generation += 1;
        station.generation = self.generation;
        let plan = Plan {
            limit: (!workload.is_fixed_work()).then_some(time),
            generation: station.generation,
            expected: (workload.start != Start::Empty).then_some(PREPARED..=station.generation),
            seed: u64::from(round) << 32,
        };
        let (outcome, sample) = station
            .timed_run(workload, &plan)
            .map_err(|error| station.explain(error))
            .with_context(|| format!("{}: {}", scenario.title(), side.contestant.label()))?;
        side.latency
            .add(&outcome.latency)
            .expect("all histograms have the same bounds");
        side.samples.push(sample);
        station
            .verify_written(workload, &outcome)
            .with_context(|| format!("{}: {}", scenario.title(), side.contestant.label()))
    }

    fn fresh_image(&mut self, scenario: &Scenario, contestant: Contestant) -> Result<Image> {
        let directories = &self.setting.directories;
        let geometry = scenario.geometry();
        match scenario.workload.start {
            Start::Overlay => {
                self.prepare_base(scenario, contestant)?;
                let base = &self.written[&key(scenario, contestant, Prepared::Base)];
                match contestant {
                    Contestant::Ours { .. } => base.clone_bundle(directories, scenario.bed),
                    _ => base.qcow2_overlay(directories, scenario.bed, geometry),
                }
            }
            start => {
                let image = Image::empty(directories, scenario.bed, contestant, geometry)?;
                if start == Start::WrittenAnew {
                    self.fill(scenario, contestant, &image)?;
                }
                Ok(image)
            }
        }
    }

    fn prepare_written(&mut self, scenario: &Scenario, contestant: Contestant) -> Result<()> {
        let key = key(scenario, contestant, Prepared::Image);
        if self.written.contains_key(&key) {
            return Ok(());
        }
        let directories = &self.setting.directories;
        let image = Image::empty(directories, scenario.bed, contestant, scenario.geometry())?;
        self.fill(scenario, contestant, &image)?;
        self.written.insert(key, image);
        Ok(())
    }

    fn prepare_base(&mut self, scenario: &Scenario, contestant: Contestant) -> Result<()> {
        let key = key(scenario, contestant, Prepared::Base);
        if self.written.contains_key(&key) {
            return Ok(());
        }
        let setting = self.setting;
        let (bed, geometry) = (scenario.bed, scenario.geometry());
        let image = match contestant {
            Contestant::Ours { .. } => {
                Image::empty_bundle(&setting.programs, &setting.directories, bed, geometry)?
            }
            _ => Image::empty(&setting.directories, bed, contestant, geometry)?,
        };
        self.fill(scenario, contestant, &image)?;
        if let Contestant::Ours { .. } = contestant {
            image.snapshot(&setting.programs)?;
        }
        self.written.insert(key, image);
        Ok(())
    }

    /// Writes an image full, through the server that it is for.
    fn fill(&self, scenario: &Scenario, contestant: Contestant, image: &Image) -> Result<()> {
        let mut station = self.open(scenario.bed, contestant, image, FILL)?;
        let filled = run::fill(&mut station.device, PREPARED, FILL.buffer_bytes as usize);
        filled
            .map_err(|error| station.explain(error))
            .with_context(|| format!("filling the image of {}", contestant.label()))?;
        station.stop()
    }

    fn station(
        &self,
        scenario: &Scenario,
        contestant: Contestant,
        image: &Image,
    ) -> Result<Station> {
        let shape = Shape {
            queues: scenario.workload.queues,
            depth: scenario.workload.depth,
            buffer_bytes: scenario.workload.request_bytes,
            cache: scenario.workload.cache,
        };
        self.open(scenario.bed, contestant, image, shape)
            .with_context(|| format!("{}: {}", scenario.title(), contestant.label()))
    }

    fn open(
        &self,
        bed: Bed,
        contestant: Contestant,
        image: &Image,
        shape: Shape,
    ) -> Result<Station> {
        // Not beside the image: a socket's path must be short.
        let socket_dir = tempfile::Builder::new().prefix("ploop-bench-").tempdir()?;
        let socket = socket_dir.path().join("s");
        let launch = Launch {
            image: &image.path,
            backing: image.backing.as_deref(),
            socket: &socket,
            bed,
            queues: shape.queues,
            write_through: shape.cache == Cache::WriteThrough,
        };
        let (device, server) = match contestant.command(&self.setting.programs, launch) {
            Some(command) => {
                let mut server = Server::start(contestant.label(), command, socket_dir.path())?;
                let device =
                    server.once_listening(|| Device::open(Target::Socket(&socket), shape))?;
                (device, Some(server))
            }
            None => {
                let target = Target::File {
                    path: &image.path,
                    direct: bed.is_direct(),
                };
                (Device::open(target, shape)?, None)
            }
        };
        Ok(Station {
            device,
            server,
            _socket_dir: socket_dir,
            generation: PREPARED,
        })
    }
}

impl Station {
    fn timed_run(&mut self, workload: &Workload, plan: &Plan) -> Result<(Outcome, Sample)> {
        let server_before = self.server_cpu()?;
        let client_before = server::cpu_time(std::process::id())?;
        let outcome = run::run(&mut self.device, workload, plan)?;
        let client_cpu = server::cpu_time(std::process::id())? - client_before;
        let server_cpu = match (server_before, self.server_cpu()?) {
            (Some(before), Some(after)) => Some(after - before),
            _ => None,
        };
        if let Some(server) = &mut self.server {
            server.check_alive()?;
        }
        let sample = sample(workload, &outcome, server_cpu, client_cpu);
        // What is left to be written shall not weigh on the next run.
        if workload.action.writes() && !workload.flush_counts() {
            self.device.flush()?;
        }
        Ok((outcome, sample))
    }

    fn server_cpu(&self) -> Result<Option<Duration>> {
        self.server.as_ref().map(Server::cpu_time).transpose()
    }

    /// Compares some of what was just written, and what lies beside it where it
    /// was copied from below.
    fn verify_written(&mut self, workload: &Workload, outcome: &Outcome) -> Result<()> {
        if matches!(workload.action, Action::Read | Action::Discard) {
            return Ok(());
        }
        let generation = self.generation;
        let written = outcome.written.iter().copied();
        run::verify(&mut self.device, written, &(generation..=generation))?;
        if workload.start == Start::Overlay {
            let beside = outcome.written.iter().map(|block| block + 1);
            run::verify(&mut self.device, beside, &(PREPARED..=PREPARED))?;
        }
        Ok(())
    }

    fn verify_sample(&mut self) -> Result<()> {
        let blocks = self.device.capacity() / crate::content::BLOCK as u64;
        let sample: Vec<u64> = (0..SAMPLED).map(|_| fastrand::u64(..blocks)).collect();
        let expected = PREPARED..=self.generation;
        run::verify(&mut self.device, sample, &expected)
    }

    fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        match &mut self.server {
            Some(server) => server.explain(error),
            None => error,
        }
    }

    /// Notes what the server used, and ends it.
    fn close(self, side: &mut Side) -> Result<()> {
        if let Some(server) = &self.server {
            side.peak_memory = side.peak_memory.max(Some(server.peak_memory()?));
        }
        self.stop()
    }

    fn stop(self) -> Result<()> {
        drop(self.device);
        self.server.map_or(Ok(()), Server::stop)
    }
}

fn sample(
    workload: &Workload,
    outcome: &Outcome,
    server_cpu: Option<Duration>,
    client_cpu: Duration,
) -> Sample {
    let requests = outcome.requests as f64;
    let per_second = requests / outcome.elapsed.as_secs_f64();
    let rate = match workload.unit() {
        Unit::RequestsPerSecond => per_second,
        Unit::MebibytesPerSecond => {
            per_second * f64::from(workload.request_bytes) / f64::from(1 << 20)
        }
    };
    let per_request_us = |time: Duration| time.as_secs_f64() * 1e6 / requests;
    Sample {
        rate,
        p50_us: outcome.latency.value_at_quantile(0.5) as f64 / 1e3,
        server_cpu_us: server_cpu.map(per_request_us),
        client_cpu_us: per_request_us(client_cpu),
    }
}

fn key(scenario: &Scenario, contestant: Contestant, start: Prepared) -> Key {
    let Geometry {
        disk_bytes,
        cluster_bytes,
    } = scenario.geometry();
    Key {
        // The number of runners does not change the image.
        contestant: match contestant {
            Contestant::Ours { .. } => crate::contestant::OURS,
            other => other,
        },
        bed: scenario.bed,
        disk_bytes,
        cluster_bytes,
        start,
    }
}

/// The order of the sides in a round: another one is first each time.
fn turn(sides: usize, round: u32) -> impl Iterator<Item = usize> {
    (0..sides).map(move |index| (index + round as usize) % sides)
}
