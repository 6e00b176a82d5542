//! The disks of the official tool in `tests/fixtures`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::require_tool;

/// A disk that no code of ours had a hand in.
#[derive(Clone, Copy, Debug)]
pub struct Fixture {
    /// Of the archive, and of the bundle in it.
    pub name: &'static str,
    /// Of the disk, in bytes.
    pub size: u64,
    /// SHA-256 of the whole disk.
    pub sha256: &'static str,
    /// Whether its image file is in the ploop format.
    pub is_ploop: bool,
}

/// All of them.
pub const FIXTURES: [Fixture; 4] = [
    Fixture {
        name: "v1",
        size: 64 << 20,
        sha256: "217b1ee98fc833d528112d379b42d54d42db8d103c32e021e454fd8a9c5143b2",
        is_ploop: true,
    },
    Fixture {
        name: "v2",
        size: 64 << 20,
        sha256: "1aa5112ab379b3e1ecca5b024dc9e564266889d0aae755e46ea2ecc77a38e7be",
        is_ploop: true,
    },
    Fixture {
        name: "plain",
        size: 16 << 20,
        sha256: "46def4e02e6f2e44793331c38caa63a55c372a47c5fbbe9632c79795f3699d52",
        is_ploop: false,
    },
    Fixture {
        name: "prealloc",
        size: 8 << 20,
        sha256: "675e7a5125936c69dd19bf060d91828e3dd82760a9b3bbf86938705868ce8b21",
        is_ploop: true,
    },
];

/// The fixture of that name.
pub fn fixture(name: &str) -> Fixture {
    *FIXTURES.iter().find(|f| f.name == name).unwrap()
}

impl Fixture {
    /// Unpacks the bundle into `folder`; `None` where that is not possible, which
    /// has been announced.
    pub fn unpack(&self, folder: &Path) -> Option<PathBuf> {
        if !require_tool("tar") || !require_tool("xz") {
            return None;
        }
        let archive = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(format!("{}.tar.xz", self.name));
        let status = Command::new("tar")
            .arg("-xJf")
            .args([&archive, Path::new("-C"), folder])
            .status()
            .unwrap();
        assert!(status.success(), "{}", archive.display());
        Some(folder.join(self.name))
    }
}
