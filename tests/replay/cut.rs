//! What a device holds after its power was cut.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rand::Rng;
use rand::rngs::SmallRng;

use crate::log::{Entry, Log};

/// What is written of an unsynced write, or not: file systems expect no less of a device
/// on which they keep blocks of this size.
const PIECE: usize = 4096;

/// How much of what was not flushed the cut takes.
#[derive(Clone, Copy)]
enum Loss {
    Nothing,
    Everything,
    Writes,
    Pieces,
}

/// A device whose log is played on it, from cut to cut.
pub struct Device {
    log: Log,
    /// What is stable.
    path: PathBuf,
    file: File,
    /// How many of the log's entries are behind it.
    played: usize,
    /// Those of them that are not in the file yet.
    pending: Vec<usize>,
    /// How many pieces cuts have taken, of so many that they could.
    pub lost: (usize, usize),
}

impl Device {
    /// `path` is what the device held when the log began; it is written to.
    pub fn new(log: Log, path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path);
        Self {
            log,
            path: path.to_owned(),
            file: file.unwrap(),
            played: 0,
            pending: Vec::new(),
            lost: (0, 0),
        }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.log.entries
    }

    /// Cuts the power when the log had so many entries, not fewer than the last time;
    /// makes `to` of what is left.
    pub fn cut(&mut self, entries: usize, to: &Path, rng: &mut SmallRng) {
        for at in self.played..entries {
            if self.log.entries[at].is_flush {
                for pending in std::mem::take(&mut self.pending) {
                    let entry = &self.log.entries[pending];
                    let data = self.log.data(entry);
                    self.file.write_all_at(&data, entry.offset).unwrap();
                }
            }
            if self.log.entries[at].len > 0 {
                self.pending.push(at);
            }
        }
        self.played = entries;
        copy(&self.path, to);
        let left = File::options().write(true).open(to).unwrap();
        let loss = match rng.random_range(0..8) {
            0 => Loss::Nothing,
            1 => Loss::Everything,
            2..5 => Loss::Writes,
            _ => Loss::Pieces,
        };
        for &pending in &self.pending {
            let entry = &self.log.entries[pending];
            let lose_write: bool = rng.random();
            for (index, piece) in self.log.data(entry).chunks(PIECE).enumerate() {
                let is_lost = match loss {
                    _ if entry.is_fua => false,
                    Loss::Nothing => false,
                    Loss::Everything => true,
                    Loss::Writes => lose_write,
                    Loss::Pieces => rng.random(),
                };
                self.lost.0 += usize::from(is_lost);
                self.lost.1 += usize::from(!entry.is_fua);
                if !is_lost {
                    let offset = entry.offset + (index * PIECE) as u64;
                    left.write_all_at(piece, offset).unwrap();
                }
            }
        }
    }
}

/// Copies a file, but not its holes.
pub fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_file(to);
    let copied = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .args([from, to])
        .status();
    assert!(copied.unwrap().success());
}
