//! Directories that do not outlive the benchmark: images are large.
//!
//! They are removed when dropped. A benchmark that was killed cannot do that, so the
//! next one does: the name tells whose they are.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::process::Pid;
use tempfile::TempDir;

const PREFIX: &str = "ploop-bench-";

/// A new directory in `parent`, removed with all that is in it when dropped.
///
/// # Errors
/// It cannot be made.
pub fn make(parent: &Path) -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix(&format!("{PREFIX}{}-", std::process::id()))
        .tempdir_in(parent)
        .with_context(|| format!("making a directory in {}", parent.display()))
}

/// A new directory for a socket, whose path must be short.
///
/// # Errors
/// It cannot be made.
pub fn for_socket() -> Result<TempDir> {
    make(&std::env::temp_dir())
}

/// Removes what killed benchmarks have left in `parent`.
///
/// # Errors
/// The directory cannot be read, or something in it that is ours not removed.
pub fn sweep(parent: &Path) -> Result<()> {
    let entries = fs::read_dir(parent).with_context(|| format!("reading {}", parent.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_stale) {
            let path = entry.path();
            eprintln!(
                "removing {}, left by a benchmark that was killed",
                path.display()
            );
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Whether it is the name of a directory whose owner is gone.
fn is_stale(name: &str) -> bool {
    let owner = || {
        let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
        Pid::from_raw(pid.parse().ok()?)
    };
    owner()
        .is_some_and(|pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_dead_benchmarks_left_is_swept() {
        let parent = tempfile::tempdir().unwrap();
        let alive = make(parent.path()).unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let dead = parent.path().join(format!("{PREFIX}{}-x", child.id()));
        let foreign = parent.path().join("ploop-bench-notes");
        fs::create_dir(&dead).unwrap();
        fs::create_dir(&foreign).unwrap();
        sweep(parent.path()).unwrap();
        assert!(!dead.exists() && foreign.exists() && alive.path().exists());
    }
}
