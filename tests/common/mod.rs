//! What the integration tests share.
//!
//! Each test file is a crate of its own and none uses everything here.
#![allow(dead_code)]

pub mod backend;
pub mod fixtures;
pub mod img;
pub mod small_fs;

use std::{
    env,
    io::{self, Write},
    path::Path,
};

/// Whether a missing peer is a failure: set by `ci/test.sh`, where a test that
/// did not run must not look like one that passed.
fn peers_required() -> bool {
    env::var_os("PLOOP_REQUIRE_PEERS").is_some_and(|value| value != "0")
}

/// Says whether `program` is on the PATH.
pub fn has_tool(program: &str) -> bool {
    // Debian keeps file system tools where an ordinary user's PATH ends short.
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    env::split_paths(&path).any(|folder| folder.join(program).is_file())
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
