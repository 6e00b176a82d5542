//! What a request costs a server: system calls, instructions, context switches.
//!
//! Unlike times, the first two hardly depend on what else the machine does.
//! System calls are counted by perf at full speed. Instructions are those of user
//! space, counted by callgrind, which runs the server's threads one at a time and
//! slowly: batches are as large as the depth allows there.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};

use crate::content::Generation;
use crate::contestant::Contestant;
use crate::measure::Setting;
use crate::run::Plan;
use crate::scenario::Scenario;
use crate::scratch;
use crate::station::{self, PREPARED, Station};
use crate::stock::Stock;
use crate::workload::Start;

/// How long perf gets to attach.
const ATTACH: Duration = Duration::from_millis(500);

/// Requests of the two runs under callgrind, whose difference counts: starting and
/// stopping cancel out. A whole number of batches of any depth used here.
const FEW: u64 = 1 << 10;
const MANY: u64 = 1 << 12;

/// What a request costs one server on one path.
pub struct Cost {
    /// Who.
    pub contestant: Contestant,
    /// The workload's name.
    pub path: String,
    /// System calls; `None` without perf.
    pub system_calls: Option<f64>,
    /// Instructions in user space; `None` without valgrind, and for servers that do
    /// not run under it.
    pub instructions: Option<f64>,
    /// Context switches of all threads.
    pub context_switches: f64,
}

/// The tools that are there.
#[derive(Clone, Copy)]
struct Tools {
    perf: bool,
    valgrind: bool,
}

/// Measures the costs of every side of every scenario.
///
/// # Errors
/// A server that fails, or the user's wish to stop.
pub fn measure(setting: &Setting, scenarios: &[Scenario]) -> Result<Vec<Cost>> {
    let tools = Tools {
        perf: is_there("perf"),
        valgrind: is_there("valgrind"),
    };
    for (name, is_there) in [("perf", tools.perf), ("valgrind", tools.valgrind)] {
        if !is_there {
            eprintln!("LEFT OUT: what {name} counts, since it is not installed");
        }
    }
    let mut meter = Meter {
        setting,
        stock: Stock::new(&setting.programs, &setting.directories),
        generation: PREPARED,
    };
    let mut costs = Vec::new();
    for scenario in scenarios {
        for &contestant in &scenario.contestants {
            eprintln!("{}: {}", scenario.workload.name, contestant.label());
            let cost = meter.cost(scenario, contestant, tools);
            costs.push(
                cost.with_context(|| {
                    format!("{}: {}", scenario.workload.name, contestant.label())
                })?,
            );
        }
    }
    Ok(costs)
}

fn is_there(tool: &str) -> bool {
    let mut command = Command::new(tool);
    command.arg("--version").stdout(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

struct Meter<'a> {
    setting: &'a Setting,
    stock: Stock<'a>,
    generation: Generation,
}

/// How the server is watched during a run.
enum Watch<'a> {
    /// At full speed, by perf if it is there.
    Perf(bool),
    /// Under callgrind, which writes its log there.
    Callgrind(&'a Path),
}

struct Counts {
    requests: u64,
    system_calls: Option<u64>,
    context_switches: u64,
}

impl Meter<'_> {
    fn cost(&mut self, scenario: &Scenario, contestant: Contestant, tools: Tools) -> Result<Cost> {
        let counts = self.run(scenario, contestant, None, &Watch::Perf(tools.perf))?;
        // QEMU's coroutines switch stacks behind valgrind's back; it crashes.
        let can_be_counted = contestant.is_ours();
        let instructions = if tools.valgrind && can_be_counted {
            let few = self.instructions(scenario, contestant, FEW)?;
            let many = self.instructions(scenario, contestant, MANY)?;
            Some((many.1 as f64 - few.1 as f64) / (many.0 - few.0) as f64)
        } else {
            None
        };
        let per_request = |count: u64| count as f64 / counts.requests as f64;
        Ok(Cost {
            contestant,
            path: scenario.workload.name.clone(),
            system_calls: counts.system_calls.map(per_request),
            instructions,
            context_switches: per_request(counts.context_switches),
        })
    }

    /// Requests made, and instructions of the whole life of the server.
    fn instructions(
        &mut self,
        scenario: &Scenario,
        contestant: Contestant,
        requests: u64,
    ) -> Result<(u64, u64)> {
        let dir = scratch::for_socket()?;
        let log = dir.path().join("callgrind.log");
        let watch = Watch::Callgrind(&log);
        let counts = self.run(scenario, contestant, Some(requests), &watch)?;
        let log = fs::read_to_string(&log).context("reading callgrind's log")?;
        let instructions = log
            .lines()
            .find_map(|line| line.split_once("Collected :"))
            .and_then(|(_, number)| number.trim().parse().ok())
            .context("callgrind has counted nothing")?;
        Ok((counts.requests, instructions))
    }

    fn run(
        &mut self,
        scenario: &Scenario,
        contestant: Contestant,
        budget: Option<u64>,
        watch: &Watch<'_>,
    ) -> Result<Counts> {
        self.setting.check_interrupted()?;
        let workload = &scenario.workload;
        self.generation += 1;
        let plan = Plan {
            limit: budget.is_none().then_some(self.setting.run_time),
            budget,
            generation: self.generation,
            expected: (workload.start != Start::Empty).then_some(PREPARED..=self.generation),
            seed: 0,
        };
        let fresh;
        let image = if workload.start.is_fresh() {
            fresh = self.stock.fresh(scenario, contestant)?;
            &fresh
        } else {
            self.stock.lasting(scenario, contestant)?
        };
        let mut station = Station::open_with(
            &self.setting.programs,
            scenario.bed,
            contestant,
            image,
            station::shape(workload),
            |command| wrapped(command, watch),
        )?;
        let server = station.server().context("a contestant without a server")?;
        let perf = match watch {
            Watch::Perf(true) => Some(Perf::attach(server.id())?),
            _ => None,
        };
        let before = server.context_switches()?;
        let (outcome, _) = station.run(workload, &plan)?;
        let server = station.server().context("a contestant without a server")?;
        let context_switches = server.context_switches()?.since(&before);
        let system_calls = perf.map(Perf::finish).transpose()?;
        station.verify_run(workload, &outcome, self.generation)?;
        station.stop()?;
        ensure!(outcome.requests > 0, "no request was made");
        Ok(Counts {
            requests: outcome.requests,
            system_calls,
            context_switches,
        })
    }
}

fn wrapped(command: Command, watch: &Watch<'_>) -> Command {
    let Watch::Callgrind(log) = watch else {
        return command;
    };
    let can_be_restricted = knows_seccomp(&command);
    let mut valgrind = Command::new("valgrind");
    valgrind
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(format!("--log-file={}", log.display()))
        .arg(command.get_program())
        .args(command.get_args());
    if can_be_restricted {
        // valgrind does not know that call, and refuses it.
        valgrind.args(["--seccomp", "none"]);
    }
    valgrind
}

/// Whether the program can be told to leave its system calls unrestricted; a build from before
/// it restricted them cannot.
fn knows_seccomp(command: &Command) -> bool {
    let help = Command::new(command.get_program()).arg("--help").output();
    help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("--seccomp"))
}

/// perf, counting the system calls of a process.
struct Perf {
    child: Child,
}

impl Perf {
    fn attach(pid: u32) -> Result<Self> {
        let child = Command::new("perf")
            .args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p"])
            .arg(pid.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting perf")?;
        thread::sleep(ATTACH);
        Ok(Self { child })
    }

    fn finish(mut self) -> Result<u64> {
        let pid = Pid::from_raw(self.child.id() as i32).context("a process without an id")?;
        rustix::process::kill_process(pid, Signal::INT)?;
        let mut said = String::new();
        let stderr = self.child.stderr.take().context("perf's output")?;
        std::io::Read::read_to_string(&mut { stderr }, &mut said)?;
        self.child.wait()?;
        match parse_perf(&said) {
            Some(count) => Ok(count),
            None => bail!("perf cannot count system calls here: {}", said.trim()),
        }
    }
}

impl Drop for Perf {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse_perf(said: &str) -> Option<u64> {
    said.lines()
        .find(|line| line.contains("raw_syscalls:sys_enter"))?
        .split(',')
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_of_perf_is_read_and_a_refusal_is_not() {
        let line = "4242,,raw_syscalls:sys_enter,1000,100.00,,\n";
        assert_eq!(parse_perf(line), Some(4242));
        let line = "<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n";
        assert_eq!(parse_perf(line), None);
        assert_eq!(parse_perf(""), None);
    }
}
