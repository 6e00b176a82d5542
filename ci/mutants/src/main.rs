//! Judges mutants by the hundred: all that `cargo mutants --list --json` names are
//! built into one program, each behind a switch, and the tests that reach one run
//! with it on.
//!
//! `ci/mutants.sh` is how it is called, and says what the tests are.

mod build;
mod judge;
mod list;
mod schemata;

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::build::Built;
use crate::judge::{Fate, Test};
use crate::list::Mutant;

/// The exit code if a mutant survived. 1 is that of an error.
const SOME_SURVIVED: u8 = 3;

/// Judges the mutants of a list of cargo-mutants.
#[derive(Parser)]
struct Args {
    /// The output of `cargo mutants --list --json`.
    list: PathBuf,
    /// For the copy of the sources, what is built, and what was found.
    #[arg(long, default_value = "target/mutants")]
    work: PathBuf,
    /// What cargo is to build, as `--lib` or `--test=NAME`; several times.
    #[arg(long, required = true, allow_hyphen_values = true)]
    build: Vec<String>,
    /// Tests whose name has this in it are left out.
    #[arg(long)]
    skip: Vec<String>,
    /// Of those, judge only the ones whose names this file has, one a line. All are
    /// built all the same, as they may be built already.
    #[arg(long)]
    only: Option<PathBuf>,
    /// Only every N-th mutant, from the K-th on: K/N.
    #[arg(long, value_parser = parse_shard)]
    shard: Option<(usize, usize)>,
    /// So many at a time.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Tests that take more seconds than this do not judge.
    #[arg(long)]
    longest: Option<u64>,
    /// Judge those again that survived before.
    #[arg(long)]
    again: bool,
    /// Begin no other mutant after so many seconds: what is left then is said, and no
    /// failure, unless it is all of them. Those that are judged are from all over the list.
    #[arg(long)]
    seconds: Option<u64>,
}

fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('/').and_then(|(part, of)| {
        let (part, of) = (part.parse().ok()?, of.parse().ok()?);
        (part < of).then_some((part, of))
    });
    parts.ok_or_else(|| format!("'{text}' is not K/N with K from 0 to N - 1"))
}

/// A line of the record that makes a run go on where one before has ended.
#[derive(Deserialize, Serialize)]
struct Judged {
    name: String,
    /// Of the source file, so that it does not outlive a change of it.
    file_hash: u64,
    fate: Fate,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let mut mutants = list::read(&args.list)?;
    if let Some((part, of)) = args.shard {
        let mut number = 0;
        mutants.retain(|_| {
            number += 1;
            (number - 1) % of == part
        });
    }
    if mutants.is_empty() {
        println!("no mutants");
        return Ok(ExitCode::SUCCESS);
    }
    fs::create_dir_all(&args.work)?;
    let mut record = Record::open(&args.work.join("judged.jsonl"), args.again, &mutants)?;
    let start = Instant::now();
    let built = build::build(&mutants, &args.work, &args.build)?;
    println!(
        "{} mutants, {} of them built into one program in {:.0?}",
        mutants.len(),
        built.mutants.len(),
        start.elapsed()
    );
    let tests = judge::tests(&built, mutants.len(), &args.work, &args.skip, args.jobs)?;
    println!("{} tests alone, after {:.0?}", tests.len(), start.elapsed());
    let mut numbers: Vec<usize> = built.mutants.iter().copied().collect();
    if let Some(only) = &args.only {
        let names =
            fs::read_to_string(only).with_context(|| format!("cannot read {}", only.display()))?;
        let names: HashSet<&str> = names.lines().collect();
        numbers.retain(|&number| names.contains(mutants[number].name.as_str()));
    }
    // In an order that has nothing to do with that of the sources.
    numbers.sort_by_key(|&number| fnv(mutants[number].name.as_bytes()));
    let deadline = args
        .seconds
        .map(|seconds| start + Duration::from_secs(seconds));
    let todo = Todo {
        mutants: &mutants,
        numbers: &numbers,
        tests: &tests,
        tree: &built.tree,
        deadline,
        longest: args.longest.map(Duration::from_secs),
    };
    todo.judge_all(&mut record, args.jobs)?;
    report(&mutants, &built, &record, &args.work)
}

struct Todo<'a> {
    mutants: &'a [Mutant],
    numbers: &'a [usize],
    tests: &'a [Test],
    tree: &'a Path,
    deadline: Option<Instant>,
    longest: Option<Duration>,
}

impl Todo<'_> {
    fn judge_all(&self, record: &mut Record, jobs: usize) -> anyhow::Result<()> {
        let next = AtomicUsize::new(0);
        let record = Mutex::new(record);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs.max(1))
                .map(|_| scope.spawn(|| self.work(&next, &record)))
                .collect();
            workers.into_iter().try_for_each(|worker| {
                let result = worker.join();
                result.unwrap_or_else(|_| anyhow::bail!("a worker panicked"))
            })
        })
    }

    fn work(&self, next: &AtomicUsize, record: &Mutex<&mut Record>) -> anyhow::Result<()> {
        let lock = || {
            record
                .lock()
                .map_err(|_| anyhow::anyhow!("a worker panicked"))
        };
        while let Some(&number) = self.numbers.get(next.fetch_add(1, Ordering::Relaxed)) {
            if self
                .deadline
                .is_some_and(|deadline| Instant::now() > deadline)
            {
                break;
            }
            let mutant = &self.mutants[number];
            if lock()?.fate(mutant).is_some() {
                continue;
            }
            let fate = judge::judge(number, &mutant.file, self.tests, self.tree, self.longest)?;
            if let Fate::Survived(tests) = fate {
                println!("SURVIVED {tests} tests: {}", mutant.name);
            }
            lock()?.add(mutant, fate)?;
        }
        Ok(())
    }
}

/// Says how it went, and leaves the names of those that survived in `survived.txt`.
fn report(
    mutants: &[Mutant],
    built: &Built,
    record: &Record,
    work: &Path,
) -> anyhow::Result<ExitCode> {
    let (mut caught, mut open) = (0, 0);
    let mut survived = String::new();
    for &number in &built.mutants {
        let mutant = &mutants[number];
        match record.fate(mutant) {
            Some(Fate::Caught(_)) => caught += 1,
            Some(Fate::Survived(_)) => survived += &format!("{}\n", mutant.name),
            None => open += 1,
        }
    }
    fs::write(work.join("survived.txt"), &survived)?;
    let viable = mutants.len() - built.unviable.len();
    println!(
        "{viable} mutants (and {} that do not compile): {caught} caught, {} survived, \
         {} cannot be switched, {open} were not judged for want of time",
        built.unviable.len(),
        survived.lines().count(),
        viable - built.mutants.len(),
    );
    print!("{survived}");
    ensure!(
        open == 0 || caught > 0 || !survived.is_empty(),
        "there was no time to judge a single mutant"
    );
    Ok(if survived.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(SOME_SURVIVED)
    })
}

/// What was found, in this run and before.
struct Record {
    file: fs::File,
    fates: HashMap<(String, u64), Fate>,
    /// Of the source files, as they were when they were built.
    hashes: HashMap<String, u64>,
}

impl Record {
    fn open(path: &Path, again: bool, mutants: &[Mutant]) -> anyhow::Result<Self> {
        let mut hashes = HashMap::new();
        for mutant in mutants {
            if !hashes.contains_key(&mutant.file) {
                hashes.insert(mutant.file.clone(), file_hash(&mutant.file)?);
            }
        }
        let mut fates = HashMap::new();
        for line in fs::read_to_string(path).unwrap_or_default().lines() {
            // The last one may be cut off.
            let Ok(judged) = serde_json::from_str::<Judged>(line) else {
                continue;
            };
            fates.insert((judged.name, judged.file_hash), judged.fate);
        }
        if again {
            fates.retain(|_, fate| matches!(fate, Fate::Caught(_)));
        }
        let file = OpenOptions::new().append(true).create(true).open(path);
        Ok(Self {
            file: file.with_context(|| format!("cannot open {}", path.display()))?,
            fates,
            hashes,
        })
    }

    fn fate(&self, mutant: &Mutant) -> Option<&Fate> {
        let key = (mutant.name.clone(), self.hashes[&mutant.file]);
        self.fates.get(&key)
    }

    fn add(&mut self, mutant: &Mutant, fate: Fate) -> anyhow::Result<()> {
        let judged = Judged {
            name: mutant.name.clone(),
            file_hash: self.hashes[&mutant.file],
            fate,
        };
        writeln!(self.file, "{}", serde_json::to_string(&judged)?)?;
        self.fates
            .insert((judged.name, judged.file_hash), judged.fate);
        Ok(())
    }
}

fn file_hash(file: &str) -> anyhow::Result<u64> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {file}"))?;
    Ok(fnv(&bytes))
}

/// FNV-1a: the same in every run.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
