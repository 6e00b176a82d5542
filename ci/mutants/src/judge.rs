//! Has the tests judge the mutants, one after the other.
//!
//! First each test runs by itself with every switch off: that shows how long it
//! takes and which mutants it reaches. A mutant then meets only the tests that
//! reach it, the quickest first, until one fails.

use std::collections::HashMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::build::{Built, Program};

/// A test may take so many times as long as it does without a mutant.
const SLOWER: u32 = 5;
/// And this in addition.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a process is started for at least, if there is so much.
const AT_ONCE: Duration = Duration::from_millis(500);
/// The most memory that a mutant may ask for, in KiB of address space.
const MEMORY_KIB: u64 = 64 << 20;

/// A test by itself.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Test {
    program: Program,
    name: String,
    takes: Duration,
    /// By the number of the mutant.
    reached: Vec<bool>,
}

/// What became of a mutant.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Fate {
    /// This test failed, or did not end.
    Caught(String),
    /// So many tests reach it, and all succeed.
    Survived(usize),
}

/// What was found of the tests of programs that are still the same.
#[derive(Deserialize, Serialize)]
struct Alone {
    programs: Vec<(PathBuf, Option<SystemTime>)>,
    mutants: usize,
    /// What the tests are told.
    settings: Vec<Option<String>>,
    skip: Vec<String>,
    tests: Vec<Test>,
}

/// Settings that say how long some tests take.
const SETTINGS: [&str; 2] = ["PLOOP_SIM_CUTS", "PLOOP_SIM_SEED"];

/// As [`run_alone`], or what that has found before of the same programs.
pub fn tests(
    built: &Built,
    mutants: usize,
    work: &Path,
    skip: &[String],
    jobs: usize,
) -> anyhow::Result<Vec<Test>> {
    let path = work.join("alone.json");
    let programs = built.programs.iter().map(|program| {
        let made = fs::metadata(&program.path).and_then(|meta| meta.modified());
        (program.path.clone(), made.ok())
    });
    let mut now = Alone {
        programs: programs.collect(),
        mutants,
        settings: SETTINGS.map(|name| std::env::var(name).ok()).into(),
        skip: skip.to_vec(),
        tests: Vec::new(),
    };
    let before = fs::read(&path).ok();
    let before = before.and_then(|bytes| serde_json::from_slice::<Alone>(&bytes).ok());
    if let Some(before) = before
        && before.programs == now.programs
        && before.mutants == now.mutants
        && before.settings == now.settings
        && before.skip == now.skip
    {
        return Ok(before.tests);
    }
    now.tests = run_alone(built, mutants, work, skip, jobs)?;
    fs::write(path, serde_json::to_vec(&now)?)?;
    Ok(now.tests)
}

/// Runs each test, without a mutant. Those with a part of `skip` in their names are left
/// out; `jobs` run at a time.
fn run_alone(
    built: &Built,
    mutants: usize,
    work: &Path,
    skip: &[String],
    jobs: usize,
) -> anyhow::Result<Vec<Test>> {
    let mut all = Vec::new();
    for program in &built.programs {
        let names = names(program, &built.tree)?.into_iter();
        let wanted = names.filter(|name| !skip.iter().any(|part| name.contains(part.as_str())));
        all.extend(wanted.map(|name| (program, name)));
    }
    let next = AtomicUsize::new(0);
    let run_some = &|job: usize| {
        let map = std::path::absolute(work.join(format!("reached-{job}")))?;
        let mut tests = Vec::new();
        while let Some((program, name)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            fs::write(&map, vec![0; mutants.max(1)])?;
            let start = Instant::now();
            let mut command = command(program, &[name], &built.tree);
            command.env("MUTANTS_REACHED", &map);
            let limit = Duration::from_secs(600);
            // Once more: one that depends on the time has another chance.
            let mut passes = || anyhow::Ok(run(&mut command, limit)? == End::Passed);
            let passed = passes()? || passes()?;
            ensure!(passed, "{name} of {} fails without a mutant", program.name);
            tests.push(Test {
                program: (*program).clone(),
                name: name.clone(),
                takes: start.elapsed(),
                reached: fs::read(&map)?.iter().map(|&byte| byte != 0).collect(),
            });
        }
        anyhow::Ok(tests)
    };
    let mut tests = thread::scope(|scope| {
        let jobs: Vec<_> = (0..jobs.max(1))
            .map(|job| scope.spawn(move || run_some(job)))
            .collect();
        let parts = jobs.into_iter().map(|job| {
            let result = job.join();
            result.unwrap_or_else(|_| anyhow::bail!("a worker panicked"))
        });
        anyhow::Ok(parts.collect::<anyhow::Result<Vec<_>>>()?.concat())
    })?;
    tests.sort_by_key(|test| test.takes);
    Ok(tests)
}

/// What the tests make of a mutant of this file. Those of its own module come first.
/// Tests that are slower than `longest` are left out.
pub fn judge(
    mutant: usize,
    file: &str,
    tests: &[Test],
    tree: &Path,
    longest: Option<Duration>,
) -> anyhow::Result<Fate> {
    let module = module_of(file);
    let is_short = |test: &&Test| longest.is_none_or(|longest| test.takes <= longest);
    let reaches = |test: &&Test| test.reached[mutant];
    let mut reaching: Vec<&Test> = tests.iter().filter(reaches).filter(is_short).collect();
    reaching.sort_by_key(|test| (!test.name.starts_with(&module), test.takes));
    let met = reaching.len();
    for group in groups(&reaching) {
        if notices(mutant, group, tree)? {
            let named = match group {
                [first, rest @ ..] if !rest.is_empty() => {
                    format!("{} or {} more", first.name, rest.len())
                }
                _ => group[0].name.clone(),
            };
            return Ok(Fate::Caught(format!("{} {named}", group[0].program.name)));
        }
    }
    Ok(Fate::Survived(met))
}

/// Whether some of these tests fail with the mutant. That counts only while they succeed
/// without it, and so does that they take long only in comparison with how long they take
/// without it at the same time: the machine may have other work.
fn notices(mutant: usize, tests: &[&Test], tree: &Path) -> anyhow::Result<bool> {
    let names: Vec<&str> = tests.iter().map(|test| test.name.as_str()).collect();
    let takes = tests.iter().map(|test| test.takes).sum::<Duration>();
    let run = |mutant: Option<usize>, takes: Duration| {
        let mut command = command(&tests[0].program, &names, tree);
        if let Some(mutant) = mutant {
            command.env("MUTANT", mutant.to_string());
        }
        run(&mut command, PATIENCE + takes * SLOWER)
    };
    let with = run(Some(mutant), takes)?;
    if with == End::Passed {
        return Ok(false);
    }
    let start = Instant::now();
    let without = run(None, takes * SLOWER)?;
    if without != End::Passed {
        println!(
            "not believed: {} does not succeed without a mutant",
            names[0]
        );
        return Ok(false);
    }
    Ok(with == End::Failed || run(Some(mutant), takes.max(start.elapsed()))? != End::Passed)
}

/// Runs of tests that take little time together: to start a process for each would take
/// longer than the tests.
fn groups<'a>(tests: &'a [&'a Test]) -> impl Iterator<Item = &'a [&'a Test]> {
    let mut rest = tests;
    std::iter::from_fn(move || {
        let first = rest.first()?;
        let mut takes = Duration::ZERO;
        let fits = |test: &&&Test| {
            takes += test.takes;
            test.program.path == first.program.path && takes <= AT_ONCE
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (group, behind) = rest.split_at(count);
        rest = behind;
        Some(group)
    })
}

/// The path of a module of the library: `format::bat` for `src/format/bat.rs`.
fn module_of(file: &str) -> String {
    let path = file.strip_prefix("src/").unwrap_or(file);
    let path = path.strip_suffix(".rs").unwrap_or(path);
    path.strip_suffix("/mod").unwrap_or(path).replace('/', "::")
}

/// The tests of a program that are not to be ignored.
fn names(program: &Program, tree: &Path) -> anyhow::Result<Vec<String>> {
    let list = |more: &[&str]| {
        let output = Command::new(&program.path)
            .args(["--list", "--format", "terse"])
            .args(more)
            .current_dir(tree)
            .output()
            .with_context(|| format!("cannot run {}", program.path.display()))?;
        let text = String::from_utf8(output.stdout)?;
        let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
        anyhow::Ok(names.map(str::to_owned).collect::<Vec<_>>())
    };
    let ignored = list(&["--ignored"])?;
    let mut all = list(&[])?;
    all.retain(|name| !ignored.contains(name));
    Ok(all)
}

fn command(program: &Program, tests: &[&str], tree: &Path) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -v {MEMORY_KIB}; exec \"$@\""), "sh"])
        .arg(&program.path)
        .args(["--exact", "--test-threads", "1"])
        .args(tests)
        .current_dir(tree)
        .envs(cargo_environment(tree))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    command
}

/// What cargo would tell the tests.
fn cargo_environment(tree: &Path) -> HashMap<&'static str, PathBuf> {
    let tree = std::path::absolute(tree).unwrap_or_else(|_| tree.to_owned());
    HashMap::from([("CARGO_MANIFEST_DIR", tree)])
}

/// How a run of tests has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Passed,
    Failed,
    /// It had to be ended.
    TooLong,
}

/// Whatever it has started ends with it.
fn run(command: &mut Command, limit: Duration) -> anyhow::Result<End> {
    let mut child = command.spawn().context("cannot start a test")?;
    let group = Pid::from_child(&child);
    let end = wait(&mut child, limit);
    // Fails if nothing is left.
    let _ = kill_process_group(group, Signal::KILL);
    child.wait()?;
    end
}

fn wait(child: &mut Child, limit: Duration) -> anyhow::Result<End> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(match status.success() {
                true => End::Passed,
                false => End::Failed,
            });
        }
        if start.elapsed() > limit {
            return Ok(End::TooLong);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
