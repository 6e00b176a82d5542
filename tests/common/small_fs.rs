//! A small file system that a test can fill.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use tempfile::TempDir;

use super::{left_out, require_tool};

/// Mounted where only one process sees it, which waits: so that it is gone with the
/// test, however that ends.
pub struct SmallFs {
    /// Has the file system in its namespace, until its standard input ends.
    holder: Child,
    root: PathBuf,
    _folder: TempDir,
}

impl SmallFs {
    /// A tmpfs. `None`, which is said on the terminal, if it cannot be mounted.
    pub fn tmpfs(size: u64) -> Option<Self> {
        Self::mount(&format!("mount -t tmpfs -o size={size} none small"))
    }

    /// An ext4 in a file on a loop device. The same.
    pub fn ext4(size: u64) -> Option<Self> {
        // No blocks are kept for root.
        let options = "-q -m 0 -E lazy_itable_init=0,lazy_journal_init=0";
        require_tool("mkfs.ext4").then_some(())?;
        Self::mount(&format!(
            "truncate -s {size} disk && mkfs.ext4 {options} disk && mount -o loop disk small"
        ))
    }

    /// An XFS whose files can share data. The same.
    pub fn xfs(size: u64) -> Option<Self> {
        require_tool("mkfs.xfs").then_some(())?;
        Self::mount(&format!(
            "truncate -s {size} disk && mkfs.xfs -q -m reflink=1 disk && mount -o loop disk small"
        ))
    }

    /// What a file holds already, an ext4 or an XFS. The same.
    pub fn of(kind: &str, image: &Path) -> Option<Self> {
        // Other copies of an XFS may be mounted.
        let options = if kind == "xfs" { "loop,nouuid" } else { "loop" };
        let image = image.to_str().expect("test paths are UTF-8");
        Self::mount(&format!("mount -t {kind} -o {options} '{image}' small"))
    }

    /// `script` mounts something on the folder `small`.
    fn mount(script: &str) -> Option<Self> {
        require_tool("unshare").then_some(())?;
        // Where users have no namespaces, or may not mount this in theirs, root may.
        let ways: [&[&str]; 2] = [&["--user", "--map-root-user", "--mount"], &["--mount"]];
        let mounted = ways.iter().find_map(|options| hold(options, script));
        if mounted.is_none() {
            let _ = left_out("no file system can be mounted here");
        }
        mounted
    }

    /// Its root, as all processes can name it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes a file that takes all its space but so many bytes.
    pub fn fill_but(&self, left: u64) -> Ballast {
        let stat = statvfs(&self.root).unwrap();
        let available = stat.f_bavail * stat.f_frsize;
        let path = self.root.join("ballast");
        let file = fs::File::create(&path).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, available - left).unwrap();
        Ballast(path)
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

fn hold(unshare: &[&str], script: &str) -> Option<SmallFs> {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    let script = format!("{{ {script}; }} >&2 && echo mounted && read -r _");
    let mut holder = Command::new("unshare")
        .args(unshare)
        .args(["sh", "-c", &script])
        .current_dir(folder.path())
        // Debian keeps file system tools where an ordinary user's PATH ends short.
        .env("PATH", std::env::var("PATH").unwrap() + ":/usr/sbin:/sbin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let answers = holder.stdout.take().expect("it is a pipe");
    BufReader::new(answers).read_line(&mut said).unwrap();
    let root = PathBuf::from(format!("/proc/{}/root{}", holder.id(), small.display()));
    let mounted = SmallFs {
        holder,
        root,
        _folder: folder,
    };
    (said == "mounted\n").then_some(mounted)
}

/// A file that is in the way.
pub struct Ballast(PathBuf);

impl Ballast {
    /// Gives its space back.
    pub fn remove(self) {
        fs::remove_file(self.0).unwrap();
    }
}
