//! `ploop-img`, and QEMU's tools beside it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output};

use sha2::{Digest, Sha256};

use super::tool;

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
    let args = ["check", "-f", "parallels"].map(OsStr::new);
    run("qemu-img", args.into_iter().chain([image.as_os_str()])).ok();
}

/// That `qemu-img compare` finds a raw and a bare ploop image alike.
#[track_caller]
pub fn qemu_img_compare(raw: &Path, image: &Path) {
    let args = ["compare", "-f", "raw", "-F", "parallels"].map(OsStr::new);
    let files = [raw.as_os_str(), image.as_os_str()];
    run("qemu-img", args.into_iter().chain(files)).ok();
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
