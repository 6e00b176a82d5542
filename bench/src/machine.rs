//! What the figures were taken on: they mean nothing without.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::bed::Directories;
use crate::contestant::Programs;

/// The machine and the versions of what ran on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the processor.
    pub cpu: String,
    /// How many of them the benchmark may use.
    pub cpus: usize,
    /// Whether it is a virtual machine itself.
    pub virtual_machine: bool,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Type and options of the file system of the disk bed.
    pub disk: String,
    /// What qemu-storage-daemon says it is.
    pub qemu: String,
    /// What vhost-user-ploop says it is.
    pub ploop: String,
    /// When the run started, UTC.
    pub date: String,
}

impl Machine {
    /// Looks at everything; what cannot be read is "unknown".
    pub fn look(programs: &Programs, directories: &Directories) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let value = |text: &str, key: &str| {
            text.lines()
                .find(|line| line.starts_with(key))
                .and_then(|line| line.split_once(':'))
                .map(|(_, value)| value.trim().to_owned())
        };
        let memory_kib: Option<u64> = value(&meminfo, "MemTotal")
            .and_then(|text| text.split_whitespace().next()?.parse().ok());
        let flags = value(&cpuinfo, "flags").unwrap_or_default();
        Self {
            cpu: value(&cpuinfo, "model name").unwrap_or_else(unknown),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            virtual_machine: flags.split(' ').any(|flag| flag == "hypervisor"),
            memory_mib: memory_kib.unwrap_or(0) / 1024,
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            disk: file_system(&directories.disk),
            qemu: version(Path::new("qemu-storage-daemon")),
            ploop: version(&programs.server),
            date: jiff::Timestamp::now()
                .strftime("%Y-%m-%d %H:%M")
                .to_string(),
        }
    }
}

fn unknown() -> String {
    "unknown".into()
}

/// The first line of what `--version` prints.
fn version(program: &Path) -> String {
    Command::new(program)
        .arg("--version")
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Some(text.lines().next()?.trim().to_owned())
        })
        .unwrap_or_else(unknown)
}

/// Type and mount options of the file system that holds `path`.
fn file_system(path: &Path) -> String {
    let Ok(path) = path.canonicalize() else {
        return unknown();
    };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, point, kind, options) = (
                fields.next()?,
                fields.next()?,
                fields.next()?,
                fields.next()?,
            );
            path.starts_with(point)
                .then(|| (point.len(), format!("{kind} ({options})")))
        })
        // The last of those mounted at the deepest place hides the others.
        .max_by_key(|(depth, _)| *depth)
        .map_or_else(unknown, |(_, text)| text)
}
