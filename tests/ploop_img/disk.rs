//! A bundle, and what tests do with it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use super::common::fixtures::fixture;
use super::common::img::{Ran, names_in, ploop_img, qemu_img_check, run, sha256};
use super::common::require_tool;

/// Of new disks and the fixtures, in bytes.
pub const CLUSTER: usize = 64 << 10;

/// A bundle, and a place for copies of what is in it.
pub struct Disk {
    pub folder: TempDir,
    pub path: String,
}

impl Disk {
    /// An empty one.
    pub fn new(size: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk").to_str().unwrap().to_owned();
        ploop_img(["create", "--cluster-size", "64k", &path, size]).ok();
        Self { folder, path }
    }

    /// A disk of the official tool.
    pub fn fixture(name: &str) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let path = fixture(name).unpack(folder.path())?;
        let path = path.to_str().unwrap().to_owned();
        Some(Self { folder, path })
    }

    /// The nodes of its tree.
    pub fn list(&self) -> Vec<Value> {
        let list = ploop_img(["snapshot", "list", "--output", "json", &self.path]).ok();
        serde_json::from_str(&list).unwrap()
    }

    /// The image that a guest writes to.
    pub fn top_file(&self) -> PathBuf {
        let list = self.list();
        let top = list.iter().find(|shot| shot["current"] == true).unwrap();
        top["filename"].as_str().unwrap().into()
    }

    /// Writes whole clusters into the top, as a guest would.
    pub fn write(&self, cluster: usize, count: usize, pattern: u8) {
        let command = format!(
            "write -P {pattern} {} {}",
            cluster * CLUSTER,
            count * CLUSTER
        );
        let top = self.top_file();
        run(
            "qemu-io",
            ["-f", "parallels", "-c", &command, top.to_str().unwrap()],
        )
        .ok();
    }

    /// Makes a snapshot, and gives back its name.
    pub fn create(&self) -> String {
        ploop_img(["snapshot", "create", &self.path])
            .ok()
            .trim()
            .to_owned()
    }

    /// Runs `snapshot` with the path after the first of `args`.
    pub fn snapshot(&self, args: &[&str]) -> Ran {
        let command = ["snapshot", args[0], &self.path].into_iter();
        ploop_img(command.chain(args[1..].iter().copied()))
    }

    /// What a guest reads, now or in a snapshot.
    pub fn read(&self, snapshot: Option<&str>) -> Vec<u8> {
        let raw = self.raw(snapshot);
        let content = fs::read(&raw).unwrap();
        fs::remove_file(raw).unwrap();
        content
    }

    /// The digest of [`Disk::read`].
    pub fn sha256(&self, snapshot: Option<&str>) -> String {
        let raw = self.raw(snapshot);
        let digest = sha256(&raw);
        fs::remove_file(raw).unwrap();
        digest
    }

    /// The same as a raw image.
    pub fn raw(&self, snapshot: Option<&str>) -> PathBuf {
        let raw = self.folder.path().join("read.raw");
        let mut args = vec!["convert", &self.path, raw.to_str().unwrap()];
        args.extend(snapshot.iter().flat_map(|guid| ["--snapshot", *guid]));
        ploop_img(args).ok();
        raw
    }

    /// Of all files in it, in bytes.
    pub fn len(&self) -> u64 {
        let names = names_in(self.path.as_ref()).into_iter();
        let lengths = names.map(|name| {
            let metadata = fs::metadata(Path::new(&self.path).join(name));
            metadata.unwrap().len()
        });
        lengths.sum()
    }

    /// Every image is clean, for us and for QEMU, and no file is left over.
    pub fn check(&self) {
        ploop_img(["check", &self.path]).ok();
        let list = self.list();
        for shot in &list {
            let file = Path::new(shot["filename"].as_str().unwrap());
            if fs::read(file).unwrap().starts_with(b"Withou") && require_tool("qemu-img") {
                qemu_img_check(file);
            }
        }
        let names = names_in(self.path.as_ref());
        let mut rest = names.iter().filter(|name| !name.contains(".hds"));
        assert!(rest.all(|name| name == "DiskDescriptor.xml" || name == "snapshots.json"));
        let images = names.iter().filter(|name| name.contains(".hds"));
        assert_eq!(images.count(), list.len());
    }
}

/// Whether there is what a guest can be played with.
pub fn has_qemu() -> bool {
    require_tool("qemu-io") && require_tool("qemu-img")
}
