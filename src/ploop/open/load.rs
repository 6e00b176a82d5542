//! Reading a chain: headers and BATs of all levels are checked, and merged into
//! one mapping. Writes nothing.

use std::cell::Cell;
use std::io;

use super::super::bat::{Bat, BatSize};
use super::super::entry::Entry;
use super::super::error::OpenError;
use super::super::levels::{LEVELS_MAX, LevelMap};
use super::{Chain, Level};
use crate::format::{
    BatScan, BatScanner, ClusterSize, Geometry, GuestCluster, Header, HostCluster, Sector,
};
use crate::storage::{AlignedBuf, Disk, FileId};

/// Bytes of BAT that are read at once.
const READ_AT_ONCE: usize = 1 << 20;

/// What most of a large BAT is, if the disk is thin.
const ZEROS: [u8; 4096] = [0; 4096];

/// A chain as it was read.
pub(super) struct Loaded {
    /// Base first; at least one.
    pub levels: Vec<LevelMap>,
    /// Of the top, for all of its disk, merged from all levels.
    pub bat: Bat,
    /// Of the top, unless it is plain.
    pub image: Option<TopImage>,
}

/// What the file of the top says of itself.
pub(super) struct TopImage {
    pub header: Header,
    pub scan: BatScan,
    pub file_len: u64,
}

impl Loaded {
    pub fn top(&self) -> FileId {
        FileId((self.levels.len() - 1) as u8)
    }

    /// Of the top.
    pub fn geometry(&self) -> &Geometry {
        &self.levels[self.levels.len() - 1].geometry
    }
}

pub(super) fn load(disk: &impl Disk, chain: &Chain) -> Result<Loaded, OpenError> {
    let count = chain.levels.len();
    if count == 0 || count > LEVELS_MAX {
        return Err(OpenError::Levels(count));
    }
    let top = FileId((count - 1) as u8);
    let (header, top_geometry) = match chain.levels[count - 1] {
        Level::Plain { size, cluster } => (None, plain_geometry(top, size, cluster)?),
        Level::Ploop => {
            let header = read_header(disk, top)?;
            let geometry = *header.geometry();
            (Some(header), geometry)
        }
    };
    let entries = top_geometry.entries;
    let size = BatSize::of(&top_geometry);
    let largest = BatSize::largest(&top_geometry);
    let bat = Bat::holes(size, largest).ok_or(OpenError::Memory { entries })?;
    let mut levels = Vec::with_capacity(count);
    let mut image = None;
    for (level, file) in chain.levels.iter().zip((0..).map(FileId)) {
        let geometry = match *level {
            Level::Plain { size, cluster } => plain_geometry(file, size, cluster)?,
            Level::Ploop if file == top => top_geometry,
            Level::Ploop => *read_header(disk, file)?.geometry(),
        };
        check_fit(file, &geometry, &top_geometry)?;
        let plain = *level != Level::Ploop;
        levels.push(LevelMap { geometry, plain });
        if plain {
            map_plain(file, &geometry, &bat);
            continue;
        }
        let (scan, file_len) = load_bat(disk, file, &geometry, &bat)?;
        image = header
            .clone()
            .filter(|_| file == top)
            .map(|header| TopImage {
                header,
                scan,
                file_len,
            });
    }
    Ok(Loaded { levels, bat, image })
}

/// What the headers say of each level, base first.
pub(in crate::ploop) fn read_levels(
    disk: &impl Disk,
    chain: &Chain,
) -> Result<Vec<LevelMap>, OpenError> {
    let count = chain.levels.len();
    if count == 0 || count > LEVELS_MAX {
        return Err(OpenError::Levels(count));
    }
    let read = |(level, file): (&Level, FileId)| {
        let geometry = match *level {
            Level::Plain { size, cluster } => plain_geometry(file, size, cluster)?,
            Level::Ploop => *read_header(disk, file)?.geometry(),
        };
        let plain = *level != Level::Ploop;
        Ok(LevelMap { geometry, plain })
    };
    let levels = chain.levels.iter().zip((0..).map(FileId)).map(read);
    let levels = levels.collect::<Result<Vec<_>, OpenError>>()?;
    let top = levels[count - 1].geometry;
    let mut lower = levels.iter().zip((0..).map(FileId));
    lower.try_for_each(|(level, file)| check_fit(file, &level.geometry, &top))?;
    Ok(levels)
}

fn read_header(disk: &impl Disk, file: FileId) -> Result<Header, OpenError> {
    let len = disk
        .len(file)
        .map_err(OpenError::io("get the length", file))?;
    let needed = Header::LEN as u64;
    if len < needed {
        return Err(OpenError::Truncated {
            level: file.0,
            needed,
            len,
        });
    }
    let mut bytes = [0; Header::LEN];
    disk.read_exact_at(file, &mut bytes, 0)
        .map_err(OpenError::io("read the header", file))?;
    let header = Header::parse(&bytes).map_err(|source| OpenError::Header {
        level: file.0,
        source,
    })?;
    if header.is_converting() {
        return Err(OpenError::Converting { level: file.0 });
    }
    Ok(header)
}

fn check_fit(file: FileId, lower: &Geometry, top: &Geometry) -> Result<(), OpenError> {
    let why = if lower.cluster != top.cluster {
        "its cluster size is another than that of the top"
    } else if lower.disk_size > top.disk_size || lower.entries > top.entries {
        "its disk is larger than that of the top"
    } else {
        return Ok(());
    };
    Err(OpenError::Misfit { level: file.0, why })
}

/// Of a raw image: data from its first byte on, and an entry for each cluster.
fn plain_geometry(file: FileId, size: Sector, cluster: ClusterSize) -> Result<Geometry, OpenError> {
    let misfit = |why| OpenError::Misfit { level: file.0, why };
    if file != FileId(0) {
        return Err(misfit("only the base may be plain"));
    }
    // The largest disk that a ploop image can have, too.
    let header = Header::new(size, cluster);
    let header = header.map_err(|_| misfit("its disk has no sector, or too many"))?;
    Ok(Geometry {
        data_start: 0,
        ..*header.geometry()
    })
}

/// Maps every cluster of a raw base to itself.
fn map_plain(file: FileId, geometry: &Geometry, bat: &Bat) {
    for cluster in 0..geometry.entries {
        bat.load(
            GuestCluster(cluster),
            Entry::mapped(file, HostCluster(cluster)),
        );
    }
}

/// Reads, checks and merges the BAT of one level; says how long its file is, too. One that gets
/// what others have while it is read (`image/snapshot/lift.rs`) becomes longer first, and has the
/// entries then.
fn load_bat(
    disk: &impl Disk,
    file: FileId,
    geometry: &Geometry,
    bat: &Bat,
) -> Result<(BatScan, u64), OpenError> {
    let len = disk
        .len(file)
        .map_err(OpenError::io("get the length", file))?;
    let needed = geometry.metadata_len();
    if len < needed {
        return Err(OpenError::Truncated {
            level: file.0,
            needed,
            len,
        });
    }
    let mut scanner = BatScanner::new(geometry, len);
    let len = Cell::new(len);
    let mut first_problem = None;
    for_pieces(disk, file, needed, |entries| {
        let chunks = || entries.chunks(ZEROS.len());
        let used = chunks().filter(|words| !is_zero(words)).count();
        if used > chunks().len() / 2 {
            let first = scanner.next().0;
            bat.expect(first..first + entries.len() as u32 / 4);
        }
        for words in chunks() {
            if is_zero(words) {
                scanner.skip(words.len() as u32 / 4);
                continue;
            }
            let words = words.chunks_exact(4);
            // Once for all of them is enough: they were read before.
            let mut is_asked = false;
            scanner.look_at_all(
                words.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])),
                // Others are not written down: the memory for them may not even be there.
                |guest, host| bat.load(guest, Entry::mapped(file, host)),
                |problem| {
                    first_problem.get_or_insert(problem);
                },
                || {
                    if !std::mem::replace(&mut is_asked, true) {
                        // If it is not known, it is what it was.
                        len.set(disk.len(file).unwrap_or(0).max(len.get()));
                    }
                    len.get()
                },
            );
        }
    })
    .map_err(OpenError::io("read the BAT", file))?;
    let scan = scanner.end();
    match first_problem {
        None => Ok((scan, len.get())),
        Some(first) => Err(OpenError::CorruptBat {
            level: file.0,
            problems: scan.problem_count,
            first: first.to_string(),
        }),
    }
}

/// Of at most as many bytes as [`ZEROS`] has.
fn is_zero(bytes: &[u8]) -> bool {
    bytes == &ZEROS[..bytes.len()]
}

/// Gives the entries of the BAT, which ends at `end`, to `each`, as many as are read at once.
fn for_pieces(
    disk: &impl Disk,
    file: FileId,
    end: u64,
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    // With the header, and into memory of that kind: what is read around the page cache has to
    // begin where a block does, or it is copied.
    let mut buffer = AlignedBuf::new(4096);
    buffer.resize(READ_AT_ONCE.min(end as usize), 0);
    let mut at = 0;
    while at < end {
        let len = (end - at).min(buffer.len() as u64);
        disk.read_exact_at(file, &mut buffer[..len as usize], at)?;
        let skip = (Header::LEN as u64).saturating_sub(at);
        each(&buffer[skip as usize..len as usize]);
        at += len;
    }
    Ok(())
}

/// Writes header and BAT as they are read, but for holes.
pub(super) fn write_bat_again(
    disk: &impl Disk,
    file: FileId,
    geometry: &Geometry,
) -> Result<(), OpenError> {
    let end = geometry.metadata_len();
    let mut buffer = AlignedBuf::new(4096);
    let mut at = 0;
    while at < end {
        let data = disk.next_data(file, at);
        let data = data.map_err(OpenError::io("look for data of the BAT", file))?;
        let Some(data) = data.filter(|data| data.start < end) else {
            break;
        };
        let start = data.start.max(at) / Geometry::MD_PAGE * Geometry::MD_PAGE;
        let stop = data.end.min(start + READ_AT_ONCE as u64);
        let stop = stop.next_multiple_of(Geometry::MD_PAGE).min(end);
        buffer.resize((stop - start) as usize, 0);
        disk.read_exact_at(file, &mut buffer, start)
            .map_err(OpenError::io("read the BAT", file))?;
        let written = match disk.write_all_at(file, &buffer, start) {
            Err(error) if is_full(&error) => write_pages_again(disk, file, &buffer, start),
            written => written,
        };
        written.map_err(OpenError::io("write the BAT", file))?;
        at = stop;
    }
    Ok(())
}

/// The same one by one, on a host that is full. A page of zeros that finds no space has none: the
/// file system does not tell holes.
fn write_pages_again(disk: &impl Disk, file: FileId, bytes: &[u8], start: u64) -> io::Result<()> {
    let pages = bytes.chunks(ZEROS.len());
    for (at, page) in (start..).step_by(ZEROS.len()).zip(pages) {
        match disk.write_all_at(file, page, at) {
            Err(error) if is_full(&error) && is_zero(page) => {}
            written => written?,
        }
    }
    Ok(())
}

/// Whether the host has no space, or none for this user.
pub(super) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// What follows the BAT in its last md page: it stays what it is.
pub(super) fn read_bat_tail(
    disk: &impl Disk,
    file: FileId,
    geometry: &Geometry,
) -> Result<Vec<u8>, OpenError> {
    let start = geometry.metadata_len();
    let end = start
        .next_multiple_of(Geometry::MD_PAGE)
        .min(geometry.data_start);
    let len = disk
        .len(file)
        .map_err(OpenError::io("get the length", file))?;
    let mut tail = vec![0; (end - start) as usize];
    let in_file = (end.min(len) - start.min(len)) as usize;
    disk.read_exact_at(file, &mut tail[..in_file], start)
        .map_err(OpenError::io("read the BAT", file))?;
    Ok(tail)
}

#[cfg(all(test, not(ploop_loom)))]
mod tests;
