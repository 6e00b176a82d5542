//! A copy of the sources with all mutants in it, and its test programs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::list::Mutant;
use crate::schemata::{self, Blame, Woven};

/// A test program, and where cargo would run it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Program {
    /// Of the target: the library's is the package's.
    pub name: String,
    pub path: PathBuf,
}

/// What was built.
#[derive(Debug)]
pub struct Built {
    pub tree: PathBuf,
    pub programs: Vec<Program>,
    /// The numbers of the mutants that are in it.
    pub mutants: BTreeSet<usize>,
    /// Of those that do not compile wherever they are.
    pub unviable: BTreeSet<usize>,
}

/// Where the names of those are kept that are not to be tried again.
const UNVIABLE: &str = "unviable.txt";
const LEFT: &str = "left.txt";
/// Where the switch becomes a module.
const ROOT: &str = "src/lib.rs";
/// Where the names of functions are kept that constants need.
const CONSTANT: &str = "constant.txt";

/// The numbers of the mutants whose names were kept there.
fn kept(mutants: &[Mutant], path: &Path) -> BTreeSet<usize> {
    let names = fs::read_to_string(path).unwrap_or_default();
    let names: BTreeSet<&str> = names.lines().collect();
    let is_kept = |(_, mutant): &(usize, &Mutant)| names.contains(mutant.name.as_str());
    let found = mutants.iter().enumerate().filter(is_kept);
    found.map(|(number, _)| number).collect()
}

/// Builds the tests of the package with as many of the mutants as compile.
/// `targets` is what cargo is to build (`--lib`, `--test NAME`).
pub fn build(mutants: &[Mutant], work: &Path, targets: &[String]) -> anyhow::Result<Built> {
    let tree = work.join("tree");
    let woven: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.file.as_str()).collect();
    copy_sources(&tree, &woven)?;
    // Where tests make their files.
    fs::create_dir_all(tree.join("target"))?;
    let mut unviable = kept(mutants, &work.join(UNVIABLE));
    let mut left = kept(mutants, &work.join(LEFT));
    let constant = fs::read_to_string(work.join(CONSTANT)).unwrap_or_default();
    let mut constant: BTreeSet<String> = constant.lines().map(str::to_owned).collect();
    loop {
        let out = &unviable | &left;
        let constants = constant.len();
        let woven = weave_all(mutants, &out, &constant, &tree)?;
        let inside: BTreeSet<usize> = woven.values().flat_map(Woven::mutants).collect();
        let (programs, complaints) = cargo(&tree, &work.join("target"), targets)?;
        if complaints.is_empty() {
            let all: BTreeSet<usize> = (0..mutants.len()).collect();
            left = &(&all - &inside) - &unviable;
            keep(mutants, &unviable, &work.join(UNVIABLE))?;
            keep(mutants, &left, &work.join(LEFT))?;
            let constant: String = constant.iter().map(|name| format!("{name}\n")).collect();
            fs::write(work.join(CONSTANT), constant)?;
            return Ok(Built {
                tree,
                programs,
                mutants: inside,
                unviable,
            });
        }
        let places = complaints.iter().flat_map(|complaint| &complaint.places);
        for (file, bytes) in places {
            match woven
                .get(file)
                .map_or(Blame::Nobody, |woven| woven.blame(bytes))
            {
                Blame::Variant(mutant) => unviable.extend([mutant]),
                Blame::Switch(mutants) => left.extend(mutants),
                Blame::Nobody => {}
            }
        }
        constant.extend(complaints.iter().filter_map(Complaint::constant));
        if (&unviable | &left).len() == out.len() && constant.len() == constants {
            bail!("the sources do not compile: {}", complaints[0].text);
        }
        eprintln!(
            "  {} are not viable, {} cannot be switched",
            unviable.len(),
            left.len()
        );
    }
}

fn keep(mutants: &[Mutant], which: &BTreeSet<usize>, path: &Path) -> anyhow::Result<()> {
    let names: String = which
        .iter()
        .map(|&number| format!("{}\n", mutants[number].name))
        .collect();
    fs::write(path, names).with_context(|| format!("cannot write {}", path.display()))
}

/// Copies what git knows or would take; what is the same keeps its time. Those that are
/// written with their mutants are left to that, or they would be new each time.
fn copy_sources(tree: &Path, woven: &BTreeSet<&str>) -> anyhow::Result<()> {
    let listed = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .output()
        .context("cannot run git")?;
    ensure!(listed.status.success(), "git ls-files failed");
    for name in String::from_utf8(listed.stdout)?.split_terminator('\0') {
        let from = Path::new(name);
        if from.is_file() && name != ROOT && !woven.contains(name) {
            write_if_changed(&tree.join(from), &fs::read(from)?)?;
            fs::set_permissions(tree.join(from), fs::metadata(from)?.permissions())?;
        }
    }
    Ok(())
}

fn write_if_changed(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes every source file that has mutants; gives them by name.
fn weave_all(
    mutants: &[Mutant],
    left_out: &BTreeSet<usize>,
    constant: &BTreeSet<String>,
    tree: &Path,
) -> anyhow::Result<HashMap<String, Woven>> {
    let mut by_file: BTreeMap<&str, Vec<(usize, &Mutant)>> = BTreeMap::new();
    for (number, mutant) in mutants.iter().enumerate() {
        let in_file = by_file.entry(&mutant.file).or_default();
        if !left_out.contains(&number) {
            in_file.push((number, mutant));
        }
    }
    let mut all = HashMap::new();
    for (file, in_file) in by_file {
        let source = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
        let woven =
            schemata::weave(&source, &in_file, constant).with_context(|| file.to_owned())?;
        write_if_changed(&tree.join(file), woven.text.as_bytes())?;
        all.insert(file.to_owned(), woven);
    }
    let switch = include_str!("../switch/mutant_switch.rs");
    write_if_changed(&tree.join("src/mutant_switch.rs"), switch.as_bytes())?;
    let root = fs::read_to_string(ROOT).with_context(|| format!("cannot read {ROOT}"))?;
    let root = format!("{root}\n#[doc(hidden)]\npub mod mutant_switch;\n");
    write_if_changed(&tree.join(ROOT), root.as_bytes())?;
    Ok(all)
}

/// An error of the compiler.
struct Complaint {
    text: String,
    /// In one line.
    message: String,
    /// Files and ranges of bytes, the primary ones only.
    places: Vec<(String, Range<usize>)>,
}

impl Complaint {
    /// The function that a constant needs, if that is what it is about: "cannot call
    /// non-const method `format::Entry::locked` in constants".
    fn constant(&self) -> Option<String> {
        let (_, rest) = self.message.split_once("cannot call non-const ")?;
        let path = rest.split('`').nth(1)?;
        let name = path.rsplit("::").find(|part| !part.ends_with('>'))?;
        Some(name.to_owned())
    }
}

fn cargo(
    tree: &Path,
    target: &Path,
    targets: &[String],
) -> anyhow::Result<(Vec<Program>, Vec<Complaint>)> {
    let output = Command::new("cargo")
        .args(["test", "--locked", "--no-run", "--profile", "mutants"])
        .args(["--quiet", "--message-format", "json"])
        .args(targets)
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", std::path::absolute(target)?)
        .env("RUSTFLAGS", "--cap-lints allow")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    let mut programs = Vec::new();
    let mut complaints = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        if let Some(path) = message["executable"].as_str()
            && message["profile"]["test"] == true
        {
            programs.push(Program {
                name: message["target"]["name"]
                    .as_str()
                    .unwrap_or_default()
                    .into(),
                path: path.into(),
            });
        }
        let told = &message["message"];
        if message["reason"] == "compiler-message" && told["level"] == "error" {
            complaints.extend(complaint(told));
        }
    }
    ensure!(
        output.status.success() || !complaints.is_empty(),
        "cargo failed in {}",
        tree.display()
    );
    Ok((programs, complaints))
}

/// `None` for "aborting due to 3 errors".
fn complaint(told: &Value) -> Option<Complaint> {
    let spans = told["spans"].as_array()?;
    let mut places = Vec::new();
    for span in spans.iter().filter(|span| span["is_primary"] == true) {
        // Of a macro: where it is used.
        let mut span = span;
        while span["expansion"]["span"].is_object() {
            span = &span["expansion"]["span"];
        }
        let byte = |end: &str| span[end].as_u64().unwrap_or(0) as usize;
        let file = span["file_name"].as_str().unwrap_or_default().to_owned();
        places.push((file, byte("byte_start")..byte("byte_end")));
    }
    (!places.is_empty()).then(|| Complaint {
        text: told["rendered"].as_str().unwrap_or_default().to_owned(),
        message: told["message"].as_str().unwrap_or_default().to_owned(),
        places,
    })
}
