//! Files in memory that record what is done to them, and the states in which a
//! power cut may leave them.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::delta::Delta;
use super::file::ImageFile;
use crate::format::{ClusterSize, GuestCluster, Header, HostCluster, Sector, Version};

const SECTOR: usize = 512;
/// The disk that these files are on is full then.
const LEN_MAX: u64 = 1 << 26;
/// What a hole is made of.
const BLOCK: u64 = 4096;

/// A change, and the file that it was made to.
#[derive(Clone, Debug)]
struct Step {
    file: usize,
    change: Change,
}

#[derive(Clone, Debug)]
enum Change {
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    SetLen(u64),
    Zero(Range<u64>),
    Sync,
    /// What it covers no later sync makes stable.
    FailedSync,
}

#[derive(Default)]
struct State {
    initial: Vec<Vec<u8>>,
    current: Vec<Vec<u8>>,
    steps: Vec<Step>,
    syncs_until_failure: Option<usize>,
    next_write_is_full: bool,
}

/// Some files on one disk, whose power can fail.
#[derive(Clone, Default)]
pub struct Medium(Rc<RefCell<State>>);

/// A file on a [`Medium`].
pub struct MemImage {
    medium: Medium,
    index: usize,
    path: PathBuf,
    hides_holes: bool,
}

impl MemImage {
    /// The file on a file system that calls all of it data.
    pub fn without_holes(self) -> Self {
        Self {
            hides_holes: true,
            ..self
        }
    }
}

impl Medium {
    /// A file that is stable as it is.
    pub fn file(&self, name: &str, content: Vec<u8>) -> MemImage {
        let mut state = self.0.borrow_mut();
        state.initial.push(content.clone());
        state.current.push(content);
        MemImage {
            medium: self.clone(),
            index: state.current.len() - 1,
            path: name.into(),
            hides_holes: false,
        }
    }

    /// One of them, opened once more.
    pub fn reopen(&self, index: usize) -> MemImage {
        MemImage {
            medium: self.clone(),
            index,
            path: "again".into(),
            hides_holes: false,
        }
    }

    /// So many syncs succeed, and the one behind them fails.
    pub fn fail_sync_after(&self, syncs: Option<usize>) {
        self.0.borrow_mut().syncs_until_failure = syncs;
    }

    /// The next write is done, and fails for want of space.
    pub fn fail_next_write(&self) {
        self.0.borrow_mut().next_write_is_full = true;
    }

    /// What is left of all files if the power goes now and nothing survives but what is stable.
    pub fn stable(&self) -> Vec<Vec<u8>> {
        let state = self.0.borrow();
        state.cut(state.steps.len(), || false).0
    }

    /// All files as they are now.
    pub fn contents(&self) -> Vec<Vec<u8>> {
        self.0.borrow().current.clone()
    }

    /// Calls `check` with the files after each of many power cuts: at every step,
    /// with none of what was not synced, with all of it, and with `samples`
    /// random choices of it, torn at sectors. Returns how many of the cuts had
    /// anything unsynced.
    pub fn cut_everywhere(&self, samples: u64, mut check: impl FnMut(Vec<Vec<u8>>)) -> usize {
        let state = self.0.borrow();
        let mut cuts = 0;
        for end in 0..=state.steps.len() {
            for sample in 0..samples + 2 {
                let mut rng = StdRng::seed_from_u64(end as u64 * 1000 + sample);
                let keep = move || match sample {
                    0 => false,
                    1 => true,
                    _ => rng.random(),
                };
                let (files, unsynced) = state.cut(end, keep);
                cuts += usize::from(unsynced);
                check(files);
                if !unsynced {
                    break;
                }
            }
        }
        cuts
    }
}

impl State {
    fn cut(&self, end: usize, mut keep: impl FnMut() -> bool) -> (Vec<Vec<u8>>, bool) {
        let mut files = self.initial.clone();
        let mut unsynced = false;
        for (index, step) in self.steps[..end].iter().enumerate() {
            let mut later = self.steps[index..end].iter();
            let first_sync = later.find(|later| {
                let is_sync = matches!(later.change, Change::Sync | Change::FailedSync);
                later.file == step.file && is_sync
            });
            let synced = first_sync.is_some_and(|sync| matches!(sync.change, Change::Sync));
            unsynced |= !synced;
            apply(&mut files[step.file], &step.change, || synced || keep());
        }
        (files, unsynced)
    }
}

fn apply(file: &mut Vec<u8>, change: &Change, mut keep: impl FnMut() -> bool) {
    match change {
        Change::Write { offset, bytes } => {
            // Cut at the sectors of the file, not of the buffer.
            let mut at = *offset as usize;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(rest.len().min(SECTOR - at % SECTOR));
                if keep() {
                    file.resize(file.len().max(at + piece.len()), 0);
                    file[at..at + piece.len()].copy_from_slice(piece);
                }
                at += piece.len();
                rest = after;
            }
        }
        Change::SetLen(len) => {
            if keep() {
                file.resize(*len as usize, 0);
            }
        }
        Change::Zero(range) => {
            if keep() {
                let end = (range.end as usize).min(file.len());
                let start = (range.start as usize).min(end);
                file[start..end].fill(0);
            }
        }
        Change::Sync | Change::FailedSync => {}
    }
}

impl MemImage {
    fn change(&self, change: Change) -> io::Result<()> {
        let end = match &change {
            Change::Write { offset, bytes } => offset + bytes.len() as u64,
            Change::SetLen(len) => *len,
            Change::Zero(_) | Change::Sync | Change::FailedSync => 0,
        };
        if end > LEN_MAX {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut state = self.medium.0.borrow_mut();
        apply(&mut state.current[self.index], &change, || true);
        state.steps.push(Step {
            file: self.index,
            change,
        });
        Ok(())
    }
}

impl ImageFile for MemImage {
    fn path(&self) -> &Path {
        &self.path
    }

    fn file_len(&self) -> io::Result<u64> {
        Ok(self.medium.0.borrow().current[self.index].len() as u64)
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.medium.0.borrow();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let there = state.current[self.index].get(start..start + bytes.len());
        bytes.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let bytes = bytes.to_vec();
        self.change(Change::Write { offset, bytes })?;
        match std::mem::take(&mut self.medium.0.borrow_mut().next_write_is_full) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len))
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.change(Change::Zero(range))
    }

    fn sync(&self) -> io::Result<()> {
        let left = self.medium.0.borrow().syncs_until_failure;
        if left == Some(0) {
            self.medium.fail_sync_after(None);
            self.change(Change::FailedSync)?;
            return Err(rustix::io::Errno::IO.into());
        }
        self.medium.fail_sync_after(left.map(|left| left - 1));
        self.change(Change::Sync)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let state = self.medium.0.borrow();
        let file = &state.current[self.index];
        if self.hides_holes {
            let end = file.len() as u64;
            return Ok((offset < end).then_some(offset..end));
        }
        let block_is_data = |block: u64| {
            let start = (block * BLOCK) as usize;
            let end = (start + BLOCK as usize).min(file.len());
            file[start..end].iter().any(|byte| *byte != 0)
        };
        let blocks = (file.len() as u64).div_ceil(BLOCK);
        let Some(first) = (offset / BLOCK..blocks).find(|block| block_is_data(*block)) else {
            return Ok(None);
        };
        let end = (first..blocks).find(|block| !block_is_data(*block));
        let end = (end.unwrap_or(blocks) * BLOCK).min(file.len() as u64);
        Ok(Some((first * BLOCK).max(offset)..end))
    }

    fn tells_holes(&self) -> bool {
        !self.hides_holes
    }
}

/// The cluster of images made here.
pub const CLUSTER: usize = 32 << 10;

/// A header of either version for a disk of `clusters` clusters.
pub fn header(version: Version, clusters: u64) -> Header {
    let header = Header::new(Sector(clusters * 64), ClusterSize::MIN).unwrap();
    let mut bytes = header.to_bytes();
    if version == Version::V1 {
        bytes[..16].copy_from_slice(b"WithoutFreeSpace");
        // The data area starts right behind the BAT, off the clusters' grid.
        bytes[48..52].fill(0);
    }
    Header::parse(&bytes).unwrap()
}

/// An image file with these entries, given as host clusters, the first of the
/// data area being 0, or as they are; and so many clusters of data, each with
/// content of its own.
pub fn image(header: &Header, entries: &[Entry], clusters: u32) -> Vec<u8> {
    let geometry = header.geometry();
    let first = geometry.first_host_cluster().0;
    let mut bytes = header.to_bytes().to_vec();
    for entry in entries {
        let value = match *entry {
            Entry::Hole => 0,
            Entry::At(index) => geometry.bat_value(HostCluster(first + index)),
            Entry::Raw(value) => value,
        };
        bytes.extend(value.to_le_bytes());
    }
    bytes.resize(geometry.data_start as usize, 0);
    for index in 0..clusters {
        bytes.extend(cluster_content(index));
    }
    bytes
}

/// Puts a word of a header there.
pub fn set_word(bytes: &mut [u8], at: usize, word: u32) {
    bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

/// An image whose format extension is in cluster 1 of the data area, with a
/// dirty bitmap whose bits are in cluster 2.
pub fn with_extension() -> Vec<u8> {
    use md5::{Digest, Md5};
    let mut bytes = image(&header(Version::V2, 6), &[Entry::At(0), Entry::At(3)], 4);
    let at = 2 * CLUSTER;
    let mut extension = vec![0u8; CLUSTER];
    extension[..8].copy_from_slice(&0xAB23_4CEF_23DC_EA87u64.to_le_bytes());
    extension[24..32].copy_from_slice(&0x2038_5FAE_252C_B34Au64.to_le_bytes());
    extension[40..44].copy_from_slice(&40u32.to_le_bytes());
    extension[48 + 28..48 + 32].copy_from_slice(&1u32.to_le_bytes());
    extension[48 + 32..48 + 40].copy_from_slice(&(3 * CLUSTER as u64 / 512).to_le_bytes());
    let checksum = Md5::digest(&extension[24..]);
    extension[8..24].copy_from_slice(&checksum);
    bytes[at..at + CLUSTER].copy_from_slice(&extension);
    set_word(&mut bytes, 44, 0x312e_3276);
    set_word(&mut bytes, 56, (at / 512) as u32);
    bytes
}

/// What is to be in the BAT.
#[derive(Clone, Copy, Debug)]
pub enum Entry {
    Hole,
    /// The n-th cluster of the data area.
    At(u32),
    /// Whatever this means.
    Raw(u32),
}

/// What [`image`] puts into the n-th cluster of the data area.
pub fn cluster_content(index: u32) -> Vec<u8> {
    let seed = index as u8 + 1;
    (0..CLUSTER)
        .map(|at| seed ^ (at / SECTOR) as u8 | 1)
        .collect()
}

/// Opens bytes as an image on a medium of its own.
pub fn delta(bytes: Vec<u8>) -> Delta<MemImage> {
    Delta::load(Medium::default().file("image", bytes)).unwrap()
}

/// What guest cluster `guest` reads.
pub fn read_cluster<F: ImageFile>(delta: &Delta<F>, guest: u32) -> Vec<u8> {
    let mut bytes = vec![0; CLUSTER];
    if let Some(offset) = delta.lookup(GuestCluster(guest)) {
        delta.read(&mut bytes, offset).unwrap();
    }
    bytes
}
