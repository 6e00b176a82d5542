//! What the integration tests share.
//!
//! Each test file is a crate of its own and none uses everything here.
#![allow(dead_code)]

pub mod backend;
pub mod fixtures;
pub mod img;
pub mod qmp;
pub mod small_fs;
pub mod sockets;
pub mod terminal;

use std::{
    env,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

/// Whether a missing peer is a failure: set by `ci/test.sh`, where a test that
/// did not run must not look like one that passed.
fn peers_required() -> bool {
    env::var_os("PLOOP_REQUIRE_PEERS").is_some_and(|value| value != "0")
}

/// Where a program of others is: on the PATH, or among those that
/// `qemu/install-tools.sh` unpacked because it could not install them.
fn find_tool(program: &str) -> Option<PathBuf> {
    // cargo's folder for the files of tests is target/tmp.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?;
    // Debian keeps file system tools where an ordinary user's PATH ends short.
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    env::split_paths(&path)
        .chain([target.join("tools/bin")])
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// Says whether `program` is on this machine.
pub fn has_tool(program: &str) -> bool {
    find_tool(program).is_some()
}

/// `program`, ready to be given arguments.
pub fn tool(program: &str) -> Command {
    Command::new(find_tool(program).unwrap_or_else(|| program.into()))
}

/// Says whether the test can use `program`. If it can't, that is said on the
/// terminal, past the test harness that would swallow the message.
///
/// # Panics
///
/// Where `PLOOP_REQUIRE_PEERS` is set, a missing program fails the test.
#[must_use]
pub fn require_tool(program: &str) -> bool {
    has_tool(program) || left_out(&format!("there is no {program}"))
}

/// Says whether the test can use the file `path`, which `maker` makes; see
/// [`require_tool`].
#[must_use]
pub fn require_file(path: &Path, maker: &str) -> bool {
    path.is_file() || left_out(&format!("{} is missing: run {maker}", path.display()))
}

/// Announces that the running test is left out; always false.
#[must_use]
pub fn left_out(reason: &str) -> bool {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    assert!(!peers_required(), "{test} can't run: {reason}");
    // Not eprintln!, which the harness captures.
    let _ = writeln!(io::stderr(), "LEFT OUT: {test}: {reason}");
    false
}
