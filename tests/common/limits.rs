//! A control group of the kernel's: limits for a daemon.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{major, minor};

use crate::common::left_out;

/// Where groups are, in either version of them.
const ROOT: &str = "/sys/fs/cgroup";

/// Removed when dropped, once nobody is in it any more.
pub struct Limits {
    /// One of version 2, or one for each controller.
    groups: Vec<PathBuf>,
}

/// What may be had.
pub struct Most {
    /// Memory, in bytes, what the kernel has of its files included.
    pub memory: u64,
    /// What may be read from the device in a second, and what may be written to it, in
    /// bytes.
    pub transfer: u64,
}

impl Limits {
    /// For those who use the disk that `folder` is on. `None`, which is said on the
    /// terminal, where this cannot be had.
    pub fn new(most: &Most, folder: &Path) -> Option<Self> {
        let made = Self::of_version_2(most, folder).or_else(|| Self::of_version_1(most, folder));
        if made.is_none() {
            let _ = left_out("no control group with memory and I/O can be made");
        }
        made
    }

    fn of_version_2(most: &Most, folder: &Path) -> Option<Self> {
        let root = Path::new(ROOT);
        let control = root.join("cgroup.subtree_control");
        fs::write(control, "+memory +io").ok()?;
        let group = new_group(root)?;
        let limits = Self {
            groups: vec![group.clone()],
        };
        let Most { memory, transfer } = most;
        let (major, minor) = device_of(folder)?;
        let io = format!("{major}:{minor} rbps={transfer} wbps={transfer}");
        fs::write(group.join("memory.max"), memory.to_string()).ok()?;
        fs::write(group.join("io.max"), io).ok()?;
        Some(limits)
    }

    fn of_version_1(most: &Most, folder: &Path) -> Option<Self> {
        let mut limits = Self { groups: Vec::new() };
        let memory = new_group(&Path::new(ROOT).join("memory"))?;
        limits.groups.push(memory.clone());
        let io = new_group(&Path::new(ROOT).join("blkio"))?;
        limits.groups.push(io.clone());
        let limit = most.memory.to_string();
        fs::write(memory.join("memory.limit_in_bytes"), limit).ok()?;
        let (major, minor) = device_of(folder)?;
        for file in ["read", "write"] {
            let file = io.join(format!("blkio.throttle.{file}_bps_device"));
            fs::write(file, format!("{major}:{minor} {}", most.transfer)).ok()?;
        }
        Some(limits)
    }

    /// Starts what follows below these limits.
    pub fn command(&self) -> Command {
        let mut command = Command::new("sh");
        let mut script = String::new();
        for group in &self.groups {
            script += &format!("echo $$ >'{}/cgroup.procs' && ", group.display());
        }
        script += "exec \"$@\"";
        command.args(["-c", &script, "sh"]);
        command
    }
}

fn new_group(parent: &Path) -> Option<PathBuf> {
    let group = parent.join(format!("ploop-test-{}", std::process::id()));
    fs::create_dir(&group).ok()?;
    Some(group)
}

/// The whole disk, if it is on one: limits are not for parts of it.
fn device_of(folder: &Path) -> Option<(u32, u32)> {
    let device = fs::metadata(folder).ok()?.dev();
    let (major, minor) = (major(device), minor(device));
    Path::new(&format!("/sys/dev/block/{major}:{minor}/queue"))
        .exists()
        .then_some((major, minor))
}

impl Drop for Limits {
    fn drop(&mut self) {
        let start = Instant::now();
        for group in &self.groups {
            while fs::remove_dir(group).is_err() && start.elapsed() < Duration::from_secs(5) {
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
