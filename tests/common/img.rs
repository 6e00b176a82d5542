//! `ploop-img`, and QEMU's tools beside it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{require_tool, tool};

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// That it went well; gives back what it printed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// That it failed in an orderly way; gives back what it said about it.
    #[track_caller]
    pub fn fails(self) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert!(self.stderr.starts_with("ploop-img: "), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        self.stderr
    }
}

/// `ploop-img`, ready to be given arguments.
pub fn ploop_img_command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ploop-img"))
}

/// Runs `ploop-img`.
pub fn ploop_img<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    ploop_img_command().args(args).output().unwrap().into()
}

/// Runs `qemu-img`, `qemu-io` or another.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Ran {
    tool(program).args(args).output().unwrap().into()
}

/// That `qemu-img check` finds nothing wrong with a bare image.
#[track_caller]
pub fn qemu_img_check(image: &Path) {
    let args = ["check", "-f", "parallels", "-T", cache_for(image)].map(OsStr::new);
    let ran = run("qemu-img", args.into_iter().chain([image.as_os_str()]));
    if ran.code == Some(LEAKS) && has_kept_tail(image) {
        return;
    }
    ran.ok();
}

/// QEMU's name for how a file is to be read. What is on a server is read around the page cache:
/// ceph-fuse goes on showing there what was in the file before a direct write.
fn cache_for(image: &Path) -> &'static str {
    /// `f_type` of a program that is the file system, from `magic.h`.
    const FUSE: u32 = 0x6573_5546;
    match rustix::fs::statfs(image).unwrap().f_type as u32 {
        FUSE => "none",
        _ => "writeback",
    }
}

/// How `check` ends, QEMU's or ours, that finds leaked clusters and nothing worse.
pub const LEAKS: i32 = 3;

/// Whether a file ends a block behind where it could be cut with danger: QEMU calls that
/// a leaked cluster (docs/architecture.md, "On network file systems").
fn has_kept_tail(image: &Path) -> bool {
    fs::metadata(image).unwrap().len() % (1 << 20) == 4096
}

/// That `qemu-img compare` finds a raw and a bare ploop image alike.
#[track_caller]
pub fn qemu_img_compare(raw: &Path, image: &Path) {
    let cache = cache_for(image);
    let args = ["compare", "-f", "raw", "-F", "parallels", "-T", cache].map(OsStr::new);
    let files = [raw.as_os_str(), image.as_os_str()];
    run("qemu-img", args.into_iter().chain(files)).ok();
}

/// Apart from the mark that says that its top image is in use, the disk has leaks at most.
#[track_caller]
pub fn expect_no_corruption(disk: &Path, top: &Path) {
    let found = ploop_img(["check".as_ref(), "--output=json".as_ref(), disk.as_os_str()]);
    let report: Value = serde_json::from_str(&found.stdout).unwrap();
    let marked = found.stdout.contains("not closed cleanly");
    assert_eq!(report["corruptions"], u64::from(marked), "{found:?}");
    if require_tool("qemu-img") {
        let args = [
            "check",
            "-f",
            "parallels",
            "--output=json",
            "-T",
            cache_for(top),
        ];
        let args = args.map(OsStr::new);
        let found = run("qemu-img", args.into_iter().chain([top.as_os_str()]));
        let report: Value = serde_json::from_str(&found.stdout).unwrap();
        let corruptions = report["corruptions"].as_u64().unwrap_or(0);
        assert_eq!(corruptions, u64::from(marked), "{found:?}");
        assert_eq!(report["check-errors"], 0, "{found:?}");
    }
}

/// Digest of a whole file.
pub fn sha256(path: &Path) -> String {
    let mut file = File::open(path).unwrap();
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        digest.update(&buffer[..read]);
    }
    digest
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// The names in a folder, in order.
pub fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The image file of a disk that has one: the path itself, or `root.hds` in it.
pub fn image_file(disk: &Path) -> std::path::PathBuf {
    if disk.is_dir() {
        disk.join("root.hds")
    } else {
        disk.to_owned()
    }
}
