//! Measures vhost-user-ploop against qemu-storage-daemon and against the plain file.
//!
//! `ci/bench.sh` builds what it needs and calls it. How the figures are taken, and
//! what they are: `docs/performance.md`.

mod bed;
mod changes;
mod client;
mod content;
mod contestant;
mod cost;
mod fleet;
mod guest;
mod idle;
mod image;
mod machine;
mod measure;
mod opening;
mod qmp;
mod report;
mod run;
mod scenario;
mod scratch;
mod server;
mod session;
mod siege;
mod stall;
mod station;
mod stats;
mod stock;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use bed::{Bed, Directories};
use contestant::{Contestant, Programs};
use machine::Machine;
use measure::Setting;
use report::Report;
use scenario::{FULL, Scale, Scenario, TINY};
use session::{IDLE, OPENING, Todo};

/// Measures vhost-user-ploop against qemu-storage-daemon and the plain file.
///
/// All sides are measured in turn within one run, on images of the same size, by
/// the same client. Prints tables; `--out` writes JSON, Markdown and SVG plots.
#[derive(Parser)]
#[command(version)]
#[command(group = clap::ArgGroup::new("mode").required(true))]
struct Arguments {
    /// See that everything runs, in about two minutes. Judges nothing.
    #[arg(long, group = "mode")]
    short: bool,
    /// Measure what has a target, in about twenty minutes, and judge it.
    #[arg(long, group = "mode")]
    targets: bool,
    /// Measure everything, in about two hours.
    #[arg(long, group = "mode")]
    all: bool,
    /// Measure what has a target on storage that hosts share, in --disk-dir, in about four
    /// minutes, and judge it.
    #[arg(long, group = "mode")]
    shared: bool,
    /// Count instructions, system calls and context switches of each path through
    /// the servers, in about five minutes.
    #[arg(long, group = "mode")]
    cost: bool,
    /// Kill the server under a guest, hand its disk to another, 20 times each, and
    /// say how long the guest's requests wait, in about five minutes. Needs QEMU 10.
    #[arg(long, group = "mode")]
    stalls: bool,
    /// Compare how fast a disk is served beside control clients that ask all the time, do not
    /// read, or send garbage, with how fast it is without, in about five minutes.
    #[arg(long, group = "mode")]
    siege: bool,
    /// Serve many disks at once, and say what starting, idling and clients cost the host, in
    /// about three minutes.
    #[arg(long, group = "mode")]
    fleet: bool,
    /// Compare how fast a disk is served while a snapshot of it is deleted, or it is compacted,
    /// with how fast it is without, and say how long requests are held when a snapshot is made or
    /// the disk becomes larger, in about ten minutes.
    #[arg(long, group = "mode")]
    changes: bool,
    /// How many disks those are.
    #[arg(long, value_name = "N", default_value_t = fleet::DISKS, requires = "fleet",
          value_parser = clap::value_parser!(u32).range(1..))]
    disks: u32,
    /// Print the names of the scenarios of the mode, and measure nothing.
    #[arg(long)]
    list: bool,
    /// Measure only the scenarios whose name contains TEXT (one of them, if given
    /// several times).
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Rounds of each scenario, in place of the mode's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Length of a run in milliseconds, in place of the mode's.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    run_ms: Option<u64>,
    /// Make the disks smaller by this factor, to try something out.
    #[arg(long, value_name = "FACTOR", value_parser = clap::value_parser!(u64).range(1..=64))]
    shrink: Option<u64>,
    /// Our back-end.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "target/release/vhost-user-ploop"
    )]
    server: PathBuf,
    /// One more argument for our back-end; may be given several times.
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    server_arg: Vec<String>,
    /// Measure this build of our back-end beside ours wherever scenarios are
    /// measured: figures of different calls say nothing about each other. It gets
    /// none of the arguments of --server-arg, so that it can be the same program.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["document", "resume"])]
    against: Option<PathBuf>,
    /// Our image tool.
    #[arg(long, value_name = "PATH", default_value = "target/release/ploop-img")]
    img: PathBuf,
    /// What qemu/guest/build.sh has made, to be attached to an idle server.
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    guest: PathBuf,
    /// A directory on a real file system, with 20 GiB free (3 GiB for --short).
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    disk_dir: PathBuf,
    /// A directory on tmpfs, with 18 GiB free (3 GiB for --short).
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    tmpfs_dir: PathBuf,
    /// Write figures.json, figures.md and the plots into DIR; also those of a
    /// benchmark that is stopped.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Take over what FILE has, a figures.json of the same mode, machine and
    /// programs, and measure only what failed then or was not reached.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["only", "cost"])]
    resume: Option<PathBuf>,
    /// Put the figures into FILE, between its marks, and the plots beside it.
    #[arg(long, value_name = "FILE")]
    document: Option<PathBuf>,
}

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Short,
    Targets,
    All,
    Shared,
    Cost,
    Stalls,
    Siege,
    Fleet,
    Changes,
}

impl Mode {
    fn label(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Targets => "targets",
            Self::All => "all",
            Self::Shared => "shared",
            Self::Cost => "cost",
            Self::Stalls => "stalls",
            Self::Siege => "siege",
            Self::Fleet => "fleet",
            Self::Changes => "changes",
        }
    }

    fn scenarios(self, shrink: Option<u64>) -> Vec<Scenario> {
        let with = |scale: Scale| Scale {
            shrink: shrink.unwrap_or(scale.shrink),
            ..scale
        };
        match self {
            Self::Short => scenario::targets(with(TINY)),
            Self::Targets => scenario::targets(with(FULL)),
            Self::All => scenario::all(with(FULL)),
            Self::Shared => scenario::shared(with(FULL)),
            Self::Cost => scenario::paths(),
            Self::Stalls | Self::Siege | Self::Fleet | Self::Changes => Vec::new(),
        }
    }

    fn run_time(self) -> Duration {
        match self {
            Self::Short => Duration::from_millis(200),
            _ => Duration::from_secs(1),
        }
    }

    fn opening_rounds(self) -> u32 {
        match self {
            Self::Short => 2,
            _ => 20,
        }
    }

    fn idle_time(self) -> Duration {
        match self {
            Self::Short => Duration::from_secs(1),
            _ => Duration::from_secs(10),
        }
    }
}

/// How often another process begins to serve a guest, or control clients come, unless
/// `--rounds` says.
const ROUNDS: u32 = 20;

fn main() -> ExitCode {
    match bench(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ploop-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    let mode = if arguments.all {
        Mode::All
    } else if arguments.shared {
        Mode::Shared
    } else if arguments.cost {
        Mode::Cost
    } else if arguments.targets {
        Mode::Targets
    } else if arguments.stalls {
        Mode::Stalls
    } else if arguments.siege {
        Mode::Siege
    } else if arguments.fleet {
        Mode::Fleet
    } else if arguments.changes {
        Mode::Changes
    } else {
        Mode::Short
    };
    if mode == Mode::Fleet {
        let setting = setting(arguments, mode)?;
        print!(
            "{}",
            fleet::table(&fleet::measure(&setting, arguments.disks)?)
        );
        return Ok(());
    }
    if matches!(mode, Mode::Stalls | Mode::Siege | Mode::Changes) {
        let setting = setting(arguments, mode)?;
        let rounds = arguments.rounds.unwrap_or(match mode {
            Mode::Changes => changes::ROUNDS,
            _ => ROUNDS,
        });
        let table = match mode {
            Mode::Stalls => stall::table(&stall::measure(&setting, rounds)?),
            Mode::Changes => changes::table(&changes::measure(&setting, rounds)?),
            _ => siege::table(&siege::measure(&setting, rounds)?),
        };
        print!("{table}");
        return Ok(());
    }
    let todo = todo(arguments, mode);
    if arguments.list {
        list(&todo);
        return Ok(());
    }
    ensure!(
        !todo.scenarios.is_empty() || todo.opening_rounds.is_some() || todo.idle_time.is_some(),
        "nothing is called {:?}; --list shows the names",
        arguments.only
    );
    let setting = setting(arguments, mode)?;
    if mode == Mode::Cost {
        return count(&setting, arguments, &todo.scenarios);
    }
    let earlier = arguments.resume.as_deref().map(Report::read).transpose()?;
    let report = session::run(&setting, &todo, earlier)?;
    print!("{}", report.other_tables());
    if !report.verdicts.is_empty() {
        print!("\n{}", report.verdict_table());
    }
    if let Some(dir) = &arguments.out {
        report.write(dir)?;
    }
    // Half the figures shall not take the place of all.
    let is_stopped = setting.check_interrupted().is_err();
    if let Some(document) = arguments.document.as_ref().filter(|_| !is_stopped) {
        report.write_into(document)?;
    }
    match report.failures.as_slice() {
        [] => Ok(()),
        failures => {
            let names: Vec<&str> = failures.iter().map(|f| f.what.as_str()).collect();
            bail!("failed: {}", names.join("; "))
        }
    }
}

/// What of the mode was asked for.
fn todo(arguments: &Arguments, mode: Mode) -> Todo {
    let selected = |name: &str| {
        arguments.only.is_empty() || arguments.only.iter().any(|text| name.contains(text))
    };
    let mut scenarios = mode.scenarios(arguments.shrink);
    scenarios.retain(|scenario| selected(&scenario.title()));
    scenarios.sort_by_key(|scenario| scenario.bed);
    for scenario in &mut scenarios {
        scenario.rounds = arguments.rounds.unwrap_or(scenario.rounds);
        if arguments.against.is_some() {
            scenario.contestants.insert(1, Contestant::OtherBuild);
        }
    }
    let times = !matches!(mode, Mode::Cost | Mode::Shared);
    let rounds = arguments.rounds.unwrap_or(mode.opening_rounds());
    Todo {
        mode: mode.label(),
        scenarios,
        opening_rounds: (times && selected(OPENING)).then_some(rounds),
        idle_time: (times && selected(IDLE)).then_some(mode.idle_time()),
        is_judged: mode != Mode::Short,
    }
}

fn count(setting: &Setting, arguments: &Arguments, scenarios: &[Scenario]) -> Result<()> {
    let machine = Machine::look(&setting.programs, &setting.directories);
    let costs = cost::measure(setting, scenarios)?;
    print!("{}", report::cost_table(&costs));
    match &arguments.document {
        Some(document) => report::write_costs_into(document, &machine, &costs),
        None => Ok(()),
    }
}

fn list(todo: &Todo) {
    for scenario in &todo.scenarios {
        println!("{}", scenario.title());
    }
    if todo.opening_rounds.is_some() {
        println!("{OPENING}");
    }
    if todo.idle_time.is_some() {
        println!("{IDLE}");
    }
}

fn setting(arguments: &Arguments, mode: Mode) -> Result<Setting> {
    let programs = [&arguments.server, &arguments.img];
    for program in programs.into_iter().chain(&arguments.against) {
        ensure!(
            program.exists(),
            "{} is missing: cargo build --release, or --server, --img and --against",
            program.display()
        );
    }
    if let Some(document) = &arguments.document {
        report::check_document(document)?;
    }
    let directories = Directories {
        disk: arguments.disk_dir.clone(),
        tmpfs: arguments.tmpfs_dir.clone(),
    };
    for bed in Bed::ALL {
        check_kind(bed, &directories)?;
        scratch::sweep(directories.of(bed))?;
    }
    scratch::sweep(&std::env::temp_dir())?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("catching signals")?;
    }
    Ok(Setting {
        programs: Programs {
            server: arguments.server.clone(),
            server_args: arguments.server_arg.clone(),
            other_build: arguments.against.clone(),
            img: arguments.img.clone(),
        },
        directories,
        guest: arguments.guest.clone(),
        run_time: arguments
            .run_ms
            .map_or(mode.run_time(), Duration::from_millis),
        interrupted,
    })
}

/// A bed on the wrong kind of file system would measure something else under its
/// name.
fn check_kind(bed: Bed, directories: &Directories) -> Result<()> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let dir = directories.of(bed);
    let kind = rustix::fs::statfs(dir).with_context(|| format!("statfs of {}", dir.display()))?;
    let is_tmpfs = kind.f_type == TMPFS_MAGIC;
    match (bed, is_tmpfs) {
        (Bed::Tmpfs, false) => bail!("{} is not on tmpfs: --tmpfs-dir", dir.display()),
        (Bed::Disk | Bed::PageCache, true) => {
            bail!("{} is on tmpfs, not on a disk: --disk-dir", dir.display())
        }
        _ => Ok(()),
    }
}
