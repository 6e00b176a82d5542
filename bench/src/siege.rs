//! How fast a disk is served while control clients do all that they should not.
//!
//! A control socket is looked after by the main loop, which has nothing to do with requests.
//! What the clients take is CPU time: their own, and that of the answers. Where there are as
//! few CPUs as a queue and its guest need, theirs is taken with the lowest priority, as that is
//! not the server's to answer for; the server's is not.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::setpriority_process;

use crate::bed::Bed;
use crate::contestant::OURS;
use crate::image::{Geometry, Image};
use crate::measure::{Setting, turn};
use crate::run::Plan;
use crate::scenario;
use crate::scratch;
use crate::station::{self, PREPARED, Station};
use crate::stats::{Estimate, median};
use crate::workload::Workload;

const GEOMETRY: Geometry = Geometry {
    disk_bytes: 1 << 30,
    cluster_bytes: None,
};

/// How many clients there are of each kind.
const CLIENTS: usize = 4;

/// The share of the rate without them that is to be left.
const TARGET: f64 = 0.97;

/// How long a client may wait before it looks whether it is to end.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// How long the clients may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Assault {
    /// Nothing, once they are let in: what is lost beside these is not the answers' doing.
    Silence,
    /// Ask for all there is, and read the answers.
    Flood,
    /// Ask, and read no answer.
    Stall,
    /// Send what is no command, nor JSON.
    Garbage,
}

impl Assault {
    const ALL: [Self; 4] = [Self::Silence, Self::Flood, Self::Stall, Self::Garbage];

    fn label(self) -> &'static str {
        match self {
            Self::Silence => "say nothing",
            Self::Flood => "ask all the time",
            Self::Stall => "ask, and read no answer",
            Self::Garbage => "send garbage",
        }
    }

    fn reads(self) -> bool {
        self != Self::Stall
    }

    /// What is sent again and again.
    fn words(self) -> Vec<u8> {
        match self {
            Self::Silence => Vec::new(),
            Self::Flood | Self::Stall => {
                let questions = [
                    "query-blockstats",
                    "query-engine",
                    "query-named-block-nodes",
                ];
                let line = |command| format!("{{\"execute\":\"{command}\"}}\n");
                questions.map(line).concat().repeat(64).into_bytes()
            }
            Self::Garbage => {
                let mut random = fastrand::Rng::with_seed(17);
                let mut words: Vec<u8> = (0..1 << 16).map(|_| random.u8(..)).collect();
                // Some of it looks like something.
                words.extend(b"{\"execute\":\"\\u00".repeat(1 << 10));
                words
            }
        }
    }
}

/// What was measured on one bed.
pub struct Besieged {
    bed: Bed,
    workload: String,
    /// Requests a second of each round, without any client.
    alone: Vec<f64>,
    by_assault: Vec<(Assault, Assailed)>,
}

#[derive(Default)]
struct Assailed {
    /// Requests a second of each round.
    rates: Vec<f64>,
    /// Bytes that all clients have sent and heard in a second, of each round.
    sent: Vec<f64>,
    heard: Vec<f64>,
}

/// Measures `rounds` times, each time without clients and beside each kind.
///
/// # Errors
/// A server that fails, clients that it does not let in, or the user's wish to stop.
pub fn measure(setting: &Setting, rounds: u32) -> Result<Vec<Besieged>> {
    let of_bed = |bed| measure_on(setting, bed, rounds).with_context(|| format!("{bed:?}"));
    [Bed::Disk, Bed::PageCache]
        .into_iter()
        .map(of_bed)
        .collect()
}

fn measure_on(setting: &Setting, bed: Bed, rounds: u32) -> Result<Besieged> {
    let workload = scenario::random_read(32);
    let image = Image::empty(&setting.directories, bed, OURS, GEOMETRY)?;
    station::fill(&setting.programs, bed, OURS, &image)?;
    image.settle()?;
    let dir = scratch::for_socket()?;
    let control = dir.path().join("c");
    let shape = station::shape(&workload);
    let with_control = |mut command: std::process::Command| {
        command.arg("--control").arg(&control);
        command
    };
    let programs = &setting.programs;
    let mut station = Station::open_with(programs, bed, OURS, &image, shape, with_control)?;
    let mut besieged = Besieged {
        bed,
        workload: workload.name.clone(),
        alone: Vec::new(),
        by_assault: Assault::ALL.map(|kind| (kind, Assailed::default())).into(),
    };
    rate(setting, &mut station, &workload, u32::MAX)?;
    for round in 0..rounds {
        for index in turn(1 + Assault::ALL.len(), round) {
            setting.check_interrupted()?;
            let Some(index) = index.checked_sub(1) else {
                let rate = rate(setting, &mut station, &workload, round)?;
                besieged.alone.push(rate);
                continue;
            };
            let (kind, assailed) = &mut besieged.by_assault[index];
            let rate = || rate(setting, &mut station, &workload, round);
            let (rate, sent, heard) = Siege::default().measure(&control, *kind, rate)?;
            assailed.rates.push(rate);
            assailed.sent.push(sent);
            assailed.heard.push(heard);
        }
    }
    station.verify_sample(PREPARED)?;
    station.stop()?;
    Ok(besieged)
}

/// In requests a second.
fn rate(setting: &Setting, station: &mut Station, workload: &Workload, round: u32) -> Result<f64> {
    let plan = Plan {
        limit: Some(setting.run_time),
        budget: None,
        generation: PREPARED,
        expected: Some(PREPARED..=PREPARED),
        seed: u64::from(round) << 32,
    };
    let (outcome, _) = station.run(workload, &plan)?;
    Ok(outcome.requests as f64 / outcome.elapsed.as_secs_f64())
}

/// What the clients of one run have in common.
#[derive(Default)]
struct Siege {
    is_over: AtomicBool,
    sent: AtomicU64,
    heard: AtomicU64,
}

impl Siege {
    /// A rate beside the clients, and how many bytes they have sent and heard in a second.
    fn measure(
        &self,
        control: &Path,
        kind: Assault,
        rate: impl FnOnce() -> Result<f64>,
    ) -> Result<(f64, f64, f64)> {
        let words = kind.words();
        thread::scope(|scope| {
            let join = || self.join(control, &words, kind.reads());
            let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(join)).collect();
            let measured = self.once_begun(rate);
            self.is_over.store(true, Ordering::Relaxed);
            for client in clients {
                client.join().expect("a client panicked")?;
            }
            measured
        })
    }

    fn once_begun(&self, rate: impl FnOnce() -> Result<f64>) -> Result<(f64, f64, f64)> {
        let begin = Instant::now();
        let bytes = |of: &AtomicU64| of.load(Ordering::Relaxed);
        while bytes(&self.sent) == 0 || bytes(&self.heard) == 0 {
            ensure!(begin.elapsed() < PATIENCE, "nobody answers the clients");
            thread::sleep(Duration::from_millis(1));
        }
        let (start, sent, heard) = (Instant::now(), bytes(&self.sent), bytes(&self.heard));
        let rate = rate()?;
        let per_second = |bytes: u64| bytes as f64 / start.elapsed().as_secs_f64();
        let (sent, heard) = (bytes(&self.sent) - sent, bytes(&self.heard) - heard);
        Ok((rate, per_second(sent), per_second(heard)))
    }

    /// One client. When it is hung up on, it comes again.
    fn join(&self, control: &Path, words: &[u8], reads: bool) -> Result<()> {
        setpriority_process(Some(rustix::thread::gettid()), 19).context("lower the priority")?;
        while !self.is_over.load(Ordering::Relaxed) {
            let mut socket = UnixStream::connect(control).context("connecting to --control")?;
            // The greeting, and the leave to ask.
            socket.set_read_timeout(Some(PATIENCE))?;
            let mut answer = [0; 1 << 16];
            self.heard
                .fetch_add(socket.read(&mut answer)? as u64, Ordering::Relaxed);
            let leave = b"{\"execute\":\"qmp_capabilities\"}";
            socket.write_all(leave)?;
            self.sent.fetch_add(leave.len() as u64, Ordering::Relaxed);
            socket.set_nonblocking(true)?;
            self.bother(&mut socket, words, reads)?;
        }
        Ok(())
    }

    /// Until it is hung up on, or all is over.
    fn bother(&self, socket: &mut UnixStream, words: &[u8], reads: bool) -> Result<()> {
        let mut answer = [0; 1 << 16];
        let mut at = 0;
        while !self.is_over.load(Ordering::Relaxed) {
            let mut wants = PollFlags::empty();
            wants.set(PollFlags::OUT, !words.is_empty());
            wants.set(PollFlags::IN, reads);
            let mut fds = [PollFd::new(socket, wants)];
            poll(&mut fds, Some(&TICK))?;
            let revents = fds[0].revents();
            if revents.contains(PollFlags::IN) {
                match socket.read(&mut answer) {
                    Ok(0) => return Ok(()),
                    Ok(len) => drop(self.heard.fetch_add(len as u64, Ordering::Relaxed)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return Ok(()),
                }
            }
            if revents.contains(PollFlags::OUT) {
                match socket.write(&words[at..]) {
                    Ok(len) => {
                        self.sent.fetch_add(len as u64, Ordering::Relaxed);
                        at = (at + len) % words.len();
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return Ok(()),
                }
            } else if revents.intersects(PollFlags::HUP | PollFlags::ERR) {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// A table for a terminal.
pub fn table(all: &[Besieged]) -> String {
    let mut text = format!(
        "| bed | load | {CLIENTS} control clients | rate | of the rate alone | target | \
         sent MiB/s | heard MiB/s |\n|---|---|---|---:|---:|---:|---:|---:|\n",
    );
    let middle = |sample: &[f64]| median(sample).unwrap_or_default();
    for seen in all {
        for (kind, assailed) in &seen.by_assault {
            let ratio = Estimate::of_ratio(&assailed.rates, &seen.alone);
            let ratio = ratio.map_or("-".to_owned(), |ratio| {
                let Estimate {
                    median, low, high, ..
                } = ratio;
                format!("{median:.3} [{low:.3}, {high:.3}]")
            });
            let mebibytes = |sample: &[f64]| middle(sample) / f64::from(1 << 20);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {:.0} | {ratio} | {TARGET} | {:.1} | {:.1} |",
                seen.bed.label(),
                seen.workload,
                kind.label(),
                middle(&assailed.rates),
                mebibytes(&assailed.sent),
                mebibytes(&assailed.heard),
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_compared_with_the_one_of_its_round() {
        let assailed = Assailed {
            rates: vec![90.0, 450.0],
            sent: vec![2.0 * f64::from(1 << 20); 2],
            heard: vec![0.0; 2],
        };
        let table = table(&[Besieged {
            bed: Bed::Disk,
            workload: "reads".into(),
            alone: vec![100.0, 500.0],
            by_assault: vec![(Assault::Stall, assailed)],
        }]);
        let row = table.lines().last().unwrap();
        let expected = "| disk | reads | ask, and read no answer | 270 | 0.900 [0.900, 0.900] \
                        | 0.97 | 2.0 | 0.0 |";
        assert_eq!(row, expected);
    }
}
