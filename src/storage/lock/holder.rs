//! Who holds a lock.
//!
//! The kernel tells the process of a process lock. A lock of an open file
//! description has none, but each process that has the description open shows the
//! lock in its `/proc/PID/fdinfo`, as far as we may look there.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Who holds the lock that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// As far as it is known.
    pub pid: Option<i32>,
    /// The byte that is locked.
    pub(super) byte: i64,
}

impl Holder {
    /// Looks for the process among all that we may look into, if it is not known
    /// yet. Takes its time.
    pub(super) fn identify(&mut self, file: &File) {
        if self.pid.is_none() {
            self.pid = search(file, self.byte);
        }
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "another process (pid {pid})"),
            None => f.write_str("another process"),
        }
    }
}

fn search(file: &File, byte: i64) -> Option<i32> {
    let file = file.metadata().ok()?;
    let is_same = |path: &Path| {
        let there = fs::metadata(path);
        there.is_ok_and(|there| (there.dev(), there.ino()) == (file.dev(), file.ino()))
    };
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // Of other users', or gone meanwhile.
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        for descriptor in descriptors.flatten().filter(|fd| is_same(&fd.path())) {
            let info = process.path().join("fdinfo").join(descriptor.file_name());
            if fs::read_to_string(info).is_ok_and(|info| has_lock(&info, byte)) {
                return Some(pid);
            }
        }
    }
    None
}

/// Whether a text of `fdinfo` names a lock of the description on a byte, as in
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 100`.
fn has_lock(info: &str, byte: i64) -> bool {
    info.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let ["lock:", _, "OFDLCK", _, _, _, _, start, end] = fields[..] else {
            return false;
        };
        let start = start.parse().unwrap_or(i64::MAX);
        let end = match end {
            "EOF" => i64::MAX,
            end => end.parse().unwrap_or(i64::MIN),
        };
        (start..=end).contains(&byte)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_found_in_fdinfo() {
        let info = "pos:\t0\nino:\t7\n\
                    lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:7 100 101\n\
                    lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:7 203 EOF\n\
                    lock:\t3: POSIX  ADVISORY  READ 12 fe:00:7 150 150\n";
        let found: Vec<_> = [99, 100, 101, 102, 150, 202, 203, 1 << 40]
            .into_iter()
            .filter(|byte| has_lock(info, *byte))
            .collect();
        assert_eq!(found, [100, 101, 203, 1 << 40]);
        assert!(!has_lock("lock: x\nlock:\t1: OFDLCK A R -1 7 a b", 0));
    }
}
