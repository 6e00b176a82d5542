//! How a disk lies in its files, added up in parts that a picture has room for.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::delta::Delta;
use super::error::{IoContext, Result};
use super::file::{HostImage, ImageFile};
use super::map::{each_extent, entries_of};
use super::open::OpenMode;
use super::reader::{DiskReader, ReaderLevel};

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// In bytes.
    pub disk_size: u64,
    /// In bytes.
    pub cluster: u64,
    /// How long each of the `parts` is, in bytes; the last may be shorter.
    pub part: u64,
    /// The disk from its start to its end.
    pub parts: Vec<Part>,
    /// How long each of the stretches of the files is, in bytes; the last may be shorter.
    pub stretch: u64,
    /// The top first.
    pub levels: Vec<LevelLayout>,
}

/// How much of a part of the disk is read from which level.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Bytes by depth, 0 being the top; what reads as zeros because no level has it, or
    /// because the file has a hole there, is not among them. In no order.
    pub held: Vec<(usize, u64)>,
}

impl Part {
    fn add(&mut self, depth: usize, bytes: u64) {
        match self.held.iter_mut().find(|(at, _)| *at == depth) {
            Some((_, held)) => *held += bytes,
            None => self.held.push((depth, bytes)),
        }
    }
}

/// One level, and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LevelLayout {
    /// Of the file.
    pub filename: PathBuf,
    /// Of a raw image: it has no clusters, and is in one piece.
    pub is_raw: bool,
    /// Of the file, in bytes.
    pub length: u64,
    /// What it has, be it hidden by levels above or not, in bytes.
    pub held: u64,
    /// What is read from it, in bytes.
    pub seen: u64,
    /// How many clusters it has.
    pub clusters: u64,
    /// In how many pieces they are: clusters that follow each other on the disk, holes left
    /// out, and lie behind each other in the file, are one.
    pub pieces: u64,
    /// The file from its start to its end.
    pub stretches: Vec<Stretch>,
}

/// What is in a stretch of a file, in bytes; the rest is not used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// Header and BAT.
    pub metadata: u64,
    /// Clusters that begin a piece.
    pub begun: u64,
    /// The others, which follow the one before them; all data of a raw image.
    pub following: u64,
}

/// Looks at all entries of all BATs of the disk at `path`, and adds them up: in at most so
/// many `parts` of the disk, and `stretches` of its longest file.
///
/// # Errors
/// Whatever keeps it from being opened and read so.
pub fn layout(path: &Path, mode: OpenMode, parts: u64, stretches: u64) -> Result<Layout> {
    let (_image, disk) = DiskReader::open(path, mode)?;
    let cluster = disk.cluster().bytes();
    let disk_size = disk.disk_size().bytes();
    let part = whole_clusters(disk_size, parts, cluster);
    let mut layout = Layout {
        disk_size,
        cluster,
        part,
        parts: vec![Part::default(); disk_size.div_ceil(part) as usize],
        stretch: cluster,
        levels: Vec::new(),
    };
    each_extent(&disk, |extent| {
        for entry in entries_of(&disk, extent)? {
            if entry.data {
                let range = entry.start..entry.start + entry.length;
                split(range, part, |index, bytes| {
                    layout.parts[index].add(entry.depth, bytes);
                });
            }
        }
        Ok(())
    })?;
    let mut lengths = Vec::new();
    for level in (0..disk.depth()).rev() {
        let len = disk.file(level).file_len();
        lengths.push(len.context(disk.path(level), "get the length")?);
    }
    let longest = lengths.iter().copied().max().unwrap_or_default();
    layout.stretch = whole_clusters(longest, stretches, cluster);
    for (depth, length) in lengths.into_iter().enumerate() {
        let mut level = look_at(&disk, disk.depth() - 1 - depth, length, layout.stretch)?;
        let held = layout.parts.iter().flat_map(|part| &part.held);
        let seen = held.filter(|(at, _)| *at == depth);
        level.seen = seen.map(|(_, bytes)| bytes).sum();
        layout.levels.push(level);
    }
    Ok(layout)
}

/// How long each of so many pieces of `whole` is at least, in whole clusters.
fn whole_clusters(whole: u64, pieces: u64, cluster: u64) -> u64 {
    let clusters = whole.div_ceil(cluster);
    clusters.div_ceil(pieces.max(1)).max(1) * cluster
}

/// Gives each piece that the range is in to `each`, with how many bytes of it are there.
fn split(range: Range<u64>, piece: u64, mut each: impl FnMut(usize, u64)) {
    let mut start = range.start;
    while start < range.end {
        let index = start / piece;
        let end = range.end.min((index + 1) * piece);
        each(index as usize, end - start);
        start = end;
    }
}

fn look_at(
    disk: &DiskReader<HostImage>,
    index: usize,
    length: u64,
    stretch: u64,
) -> Result<LevelLayout> {
    let mut level = LevelLayout {
        filename: disk.path(index).to_owned(),
        is_raw: disk.is_plain(index),
        length,
        held: 0,
        seen: 0,
        clusters: 0,
        pieces: 0,
        stretches: vec![Stretch::default(); length.div_ceil(stretch) as usize],
    };
    match disk.level(index) {
        ReaderLevel::Ploop(delta) => level.add_clusters(delta, stretch),
        ReaderLevel::Plain { file, size } => level.add_data(file, size.bytes(), stretch)?,
    }
    Ok(level)
}

impl LevelLayout {
    fn add_clusters<F: ImageFile>(&mut self, delta: &Delta<F>, stretch: u64) {
        let geometry = delta.geometry();
        self.add(0..geometry.data_start, stretch, |at| &mut at.metadata);
        let cluster = geometry.cluster.bytes();
        let mut before = None;
        let mapped = delta.bat().iter().filter(|value| **value != 0);
        for host in mapped.filter_map(|value| geometry.host_cluster(*value)) {
            let start = geometry.host_offset(host);
            let begins = before.is_none_or(|before| before + cluster != start);
            before = Some(start);
            self.clusters += 1;
            self.held += cluster;
            self.pieces += u64::from(begins);
            self.add(start..start + cluster, stretch, |at| match begins {
                true => &mut at.begun,
                false => &mut at.following,
            });
        }
    }

    /// Of a raw image, as the host's file system tells; up to `end`.
    fn add_data(&mut self, file: &impl ImageFile, end: u64, stretch: u64) -> Result<()> {
        let mut start = 0;
        while start < end {
            let data = file.next_data(start).context(file.path(), "seek in")?;
            let Some(data) = data.filter(|data| data.start < end) else {
                break;
            };
            let data = data.start..data.end.min(end);
            self.held += data.end - data.start;
            start = data.end;
            self.add(data, stretch, |at| &mut at.following);
        }
        Ok(())
    }

    /// What is behind the end of the file is left out: a cluster that was cut off, of an
    /// image that a guest writes to at present for instance.
    fn add(&mut self, range: Range<u64>, stretch: u64, kind: impl Fn(&mut Stretch) -> &mut u64) {
        let range = range.start.min(self.length)..range.end.min(self.length);
        split(range, stretch, |index, bytes| {
            *kind(&mut self.stretches[index]) += bytes;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_clusters_and_no_more_than_asked_for() {
        for (whole, pieces, expected) in [
            (0, 10, 4),
            (4, 10, 4),
            (40, 10, 4),
            (41, 10, 8),
            (u64::MAX / 2, 1000, (u64::MAX / 2).div_ceil(4000) * 4),
        ] {
            let piece = whole_clusters(whole, pieces, 4);
            assert_eq!(piece, expected, "{whole} in {pieces}");
            assert!(whole.div_ceil(piece) <= pieces);
        }
    }

    #[test]
    fn a_range_is_split_at_pieces() {
        let mut parts = Vec::new();
        split(3..25, 10, |index, bytes| parts.push((index, bytes)));
        assert_eq!(parts, [(0, 7), (1, 10), (2, 5)]);
        split(5..5, 10, |_, _| panic!("nothing"));
    }
}
