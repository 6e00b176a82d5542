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
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::build::{Built, Program};

/// A test may take so many times as long as it does without a mutant.
const SLOWER: u32 = 5;
/// And this in addition.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most memory that a mutant may ask for, in KiB of address space.
const MEMORY_KIB: u64 = 64 << 20;

/// A test by itself.
#[derive(Clone, Debug)]
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

/// Runs each test, without a mutant. Those with a part of `skip` in their names are left
/// out.
pub fn tests(
    built: &Built,
    mutants: usize,
    work: &Path,
    skip: &[String],
) -> anyhow::Result<Vec<Test>> {
    let map = std::path::absolute(work.join("reached"))?;
    let mut tests = Vec::new();
    for program in &built.programs {
        for name in names(program, &built.tree)? {
            if skip.iter().any(|part| name.contains(part.as_str())) {
                continue;
            }
            fs::write(&map, vec![0; mutants.max(1)])?;
            let start = Instant::now();
            let mut command = command(program, &name, &built.tree);
            command.env("MUTANTS_REACHED", &map);
            let passed = run(&mut command, Duration::from_secs(600))?;
            ensure!(passed, "{name} of {} fails without a mutant", program.name);
            tests.push(Test {
                program: program.clone(),
                name,
                takes: start.elapsed(),
                reached: fs::read(&map)?.iter().map(|&byte| byte != 0).collect(),
            });
        }
    }
    tests.sort_by_key(|test| test.takes);
    Ok(tests)
}

/// What the tests make of a mutant of this file. Those of its own module come first.
pub fn judge(mutant: usize, file: &str, tests: &[Test], tree: &Path) -> anyhow::Result<Fate> {
    let module = module_of(file);
    let mut reaching: Vec<&Test> = tests.iter().filter(|test| test.reached[mutant]).collect();
    reaching.sort_by_key(|test| (!test.name.starts_with(&module), test.takes));
    let met = reaching.len();
    for test in reaching {
        let mut command = command(&test.program, &test.name, tree);
        command.env("MUTANT", mutant.to_string());
        if !run(&mut command, PATIENCE + test.takes * SLOWER)? {
            return Ok(Fate::Caught(format!("{} {}", test.program.name, test.name)));
        }
    }
    Ok(Fate::Survived(met))
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

fn command(program: &Program, test: &str, tree: &Path) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -v {MEMORY_KIB}; exec \"$@\""), "sh"])
        .arg(&program.path)
        .args(["--exact", test, "--test-threads", "1"])
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

/// Whether it ends well within the time. Whatever it has started ends with it.
fn run(command: &mut Command, limit: Duration) -> anyhow::Result<bool> {
    let mut child = command.spawn().context("cannot start a test")?;
    let group = Pid::from_child(&child);
    let passed = wait(&mut child, limit);
    // Fails if nothing is left.
    let _ = kill_process_group(group, Signal::KILL);
    child.wait()?;
    passed
}

fn wait(child: &mut Child, limit: Duration) -> anyhow::Result<bool> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if start.elapsed() > limit {
            return Ok(false);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
