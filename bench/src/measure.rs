//! Measures one scenario: alternated runs of all sides.
//!
//! Each round runs every side once, in an order that is drawn. Only figures of one
//! round are divided by each other: the host's speed drifts more between minutes than
//! the sides differ.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use crate::bed::{Bed, Directories};
use crate::content::Generation;
use crate::contestant::{Contestant, Programs};
use crate::image::Image;
use crate::run::{self, Outcome, Plan};
use crate::scenario::Scenario;
use crate::server::Ending;
use crate::station::{self, PREPARED, Station, Used};
use crate::stock::Stock;
use crate::workload::{Start, Unit, Workload};

/// How all scenarios are measured.
pub struct Setting {
    /// What is measured.
    pub programs: Programs,
    /// Where.
    pub directories: Directories,
    /// The folder of the guest that `qemu/guest/build.sh` has made.
    pub guest: PathBuf,
    /// Length of a run.
    pub run_time: Duration,
    /// Set when the user wants to stop.
    pub interrupted: Arc<AtomicBool>,
}

/// After so many rounds, the images of the disk bed are made anew.
const ROUNDS_OF_AN_IMAGE: u32 = 4;

/// How long to wait for space at most.
const SPACE_TIMEOUT: Duration = Duration::from_secs(300);

impl Setting {
    /// # Errors
    /// The user wants to stop.
    pub fn check_interrupted(&self) -> Result<()> {
        let interrupted = self.interrupted.load(Ordering::Relaxed);
        ensure!(!interrupted, "stopped by the user");
        Ok(())
    }

    /// Waits until there is space for another disk of so many bytes on a bed, and a
    /// quarter for what its format adds. A file system that discards what it frees
    /// gives it out again only then, long after the file was removed.
    pub fn wait_for_space(&self, bed: Bed, disk_bytes: u64) -> Result<()> {
        let needed = disk_bytes + disk_bytes / 4;
        let start = Instant::now();
        loop {
            let free = self.directories.free(bed)?;
            if free >= needed {
                return Ok(());
            }
            ensure!(
                start.elapsed() < SPACE_TIMEOUT,
                "{} has {} MiB free, and {} MiB are needed: --disk-dir and --tmpfs-dir take others",
                self.directories.of(bed).display(),
                free >> 20,
                needed >> 20
            );
            self.check_interrupted()?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Measures scenarios, one after another.
pub struct Lab<'a> {
    setting: &'a Setting,
    stock: Stock<'a>,
    /// Of the last run. Images live longer than scenarios, so it is never reset.
    generation: Generation,
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

impl Side {
    fn new(contestant: Contestant) -> Self {
        Self {
            contestant,
            samples: Vec::new(),
            latency: run::latencies(),
            peak_memory: None,
        }
    }

    fn note_memory(&mut self, station: &Station) -> Result<()> {
        if let Some(server) = station.server() {
            self.peak_memory = self.peak_memory.max(Some(server.peak_memory()?));
        }
        Ok(())
    }
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

impl<'a> Lab<'a> {
    /// A lab without images.
    pub fn new(setting: &'a Setting) -> Self {
        Self {
            setting,
            stock: Stock::new(&setting.programs, &setting.directories),
            generation: PREPARED,
        }
    }

    /// Drops the images that are not of `bed`: nobody comes back to them.
    pub fn keep_only(&mut self, bed: Bed) {
        self.stock.keep_only(bed);
    }

    /// Measures a scenario.
    ///
    /// # Errors
    /// A server that fails, dies or answers wrongly, or the user's wish to stop.
    pub fn measure(&mut self, scenario: &Scenario) -> Result<Vec<Side>> {
        let sides = scenario.contestants.iter().copied().map(Side::new);
        let mut sides: Vec<Side> = sides.collect();
        if scenario.workload.start.is_fresh() {
            self.measure_fresh(scenario, &mut sides)?;
        } else {
            self.measure_lasting(scenario, &mut sides)?;
        }
        Ok(sides)
    }

    /// Every run has an image and a server of its own.
    fn measure_fresh(&mut self, scenario: &Scenario, sides: &mut [Side]) -> Result<()> {
        for round in 0..scenario.rounds {
            for index in turn(sides.len(), round) {
                let side = &mut sides[index];
                self.wait_for_space(scenario)?;
                let image = self.stock.fresh(scenario, side.contestant)?;
                image.settle()?;
                let mut station = open(&self.setting.programs, scenario, side.contestant, &image)?;
                self.run_once(scenario, &mut station, side, round, self.setting.run_time)?;
                side.note_memory(&station)?;
                if station.stop()? == Ending::Clean {
                    check(&self.setting.programs, scenario, side.contestant, &image)?;
                }
            }
        }
        Ok(())
    }

    /// Images that last. On the disk bed they are made anew now and then, in another
    /// order: what lies in the host's cache, or on a fast part of the disk, is read at
    /// twice the speed, and that would be compared instead of servers.
    fn measure_lasting(&mut self, scenario: &Scenario, sides: &mut [Side]) -> Result<()> {
        let step = match scenario.bed {
            Bed::Disk => ROUNDS_OF_AN_IMAGE,
            Bed::PageCache | Bed::Tmpfs => scenario.rounds,
        };
        let starts = (0..scenario.rounds).step_by(step as usize);
        for (making, start) in (0..).zip(starts) {
            if scenario.bed == Bed::Disk {
                for side in sides.iter() {
                    self.stock.drop_lasting(scenario, side.contestant);
                }
            }
            // All images first: filling one shall not weigh on the servers of others.
            for index in turn(sides.len(), making) {
                self.wait_for_space(scenario)?;
                let image = self.stock.lasting(scenario, sides[index].contestant)?;
                image.settle()?;
            }
            let end = scenario.rounds.min(start + step);
            self.measure_rounds(scenario, sides, start..end)?;
        }
        Ok(())
    }

    /// All servers stay up, on the same images.
    fn measure_rounds(
        &mut self,
        scenario: &Scenario,
        sides: &mut [Side],
        rounds: Range<u32>,
    ) -> Result<()> {
        let mut stations = Vec::new();
        for side in sides.iter() {
            let mut station = self.open_lasting(scenario, side.contestant)?;
            self.warm_up(scenario, &mut station, side.contestant)?;
            stations.push(station);
        }
        for round in rounds {
            for index in turn(sides.len(), round) {
                let (station, side) = (&mut stations[index], &mut sides[index]);
                self.run_once(scenario, station, side, round, self.setting.run_time)?;
            }
        }
        for (mut station, side) in stations.into_iter().zip(sides) {
            station.verify_sample(self.generation)?;
            side.note_memory(&station)?;
            match station.stop()? {
                Ending::Clean => {
                    let image = self.stock.lasting(scenario, side.contestant)?;
                    check(&self.setting.programs, scenario, side.contestant, image)?;
                }
                Ending::Crash => self.stock.drop_lasting(scenario, side.contestant),
            }
        }
        Ok(())
    }

    fn wait_for_space(&self, scenario: &Scenario) -> Result<()> {
        self.setting
            .wait_for_space(scenario.bed, scenario.disk_bytes)
    }

    fn open_lasting(&mut self, scenario: &Scenario, contestant: Contestant) -> Result<Station> {
        let image = self.stock.lasting(scenario, contestant)?;
        open(&self.setting.programs, scenario, contestant, image)
    }

    /// A short run that is not counted: pages come into the cache, rings and pools
    /// get their size.
    fn warm_up(
        &mut self,
        scenario: &Scenario,
        station: &mut Station,
        contestant: Contestant,
    ) -> Result<()> {
        let mut uncounted = Side::new(contestant);
        let time = self.setting.run_time / 4;
        self.run_once(scenario, station, &mut uncounted, u32::MAX, time)
    }

    fn run_once(
        &mut self,
        scenario: &Scenario,
        station: &mut Station,
        side: &mut Side,
        round: u32,
        time: Duration,
    ) -> Result<()> {
        self.setting.check_interrupted()?;
        let workload = &scenario.workload;
        self.generation += 1;
        let plan = Plan {
            limit: (!workload.is_fixed_work()).then_some(time),
            budget: None,
            generation: self.generation,
            expected: (workload.start != Start::Empty).then_some(PREPARED..=self.generation),
            seed: u64::from(round) << 32,
        };
        let (outcome, used) = station
            .run(workload, &plan)
            .with_context(|| about(scenario, side.contestant))?;
        side.latency
            .add(&outcome.latency)
            .expect("all histograms have the same bounds");
        side.samples.push(sample(workload, &outcome, &used));
        station
            .verify_run(workload, &outcome, self.generation)
            .with_context(|| about(scenario, side.contestant))
    }
}

fn open(
    programs: &Programs,
    scenario: &Scenario,
    contestant: Contestant,
    image: &Image,
) -> Result<Station> {
    let shape = station::shape(&scenario.workload);
    Station::open(programs, scenario.bed, contestant, image, shape)
        .with_context(|| about(scenario, contestant))
}

fn check(
    programs: &Programs,
    scenario: &Scenario,
    contestant: Contestant,
    image: &Image,
) -> Result<()> {
    image
        .check(programs)
        .with_context(|| about(scenario, contestant))
}

fn about(scenario: &Scenario, contestant: Contestant) -> String {
    format!("{}: {}", scenario.title(), contestant.label())
}

fn sample(workload: &Workload, outcome: &Outcome, used: &Used) -> Sample {
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
        server_cpu_us: used.server_cpu.map(per_request_us),
        client_cpu_us: per_request_us(used.client_cpu),
    }
}

/// The order of the sides in a round: drawn, and in every second round that of the
/// round before, reversed. A run that uses up what a host's limiter allows leaves less
/// to the next one, so no side may always follow the same other.
pub fn turn(sides: usize, round: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sides).collect();
    fastrand::Rng::with_seed(u64::from(round / 2)).shuffle(&mut order);
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_every_side_once() {
        for round in 0..20 {
            let mut order = turn(5, round);
            order.sort_unstable();
            assert_eq!(order, [0, 1, 2, 3, 4]);
        }
    }

    #[test]
    fn a_side_is_as_often_before_another_as_behind_it() {
        let rounds: Vec<_> = (0..20).map(|round| turn(5, round)).collect();
        let place = |order: &[usize], side| order.iter().position(|&it| it == side);
        for (one, other) in [(0, 1), (0, 4), (2, 3)] {
            let before = |order: &&Vec<usize>| place(order, one) < place(order, other);
            assert_eq!(rounds.iter().filter(before).count(), 10);
        }
    }

    #[test]
    fn a_side_follows_any_other_in_some_round() {
        for (first, second) in (0..5).flat_map(|a| (0..5).map(move |b| (a, b))) {
            let follows = |order: Vec<usize>| order.windows(2).any(|w| w == [first, second]);
            assert!(first == second || (0..20).any(|round| follows(turn(5, round))));
        }
    }
}
