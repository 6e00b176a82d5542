//! Opening a chain of deltas: reads headers and BATs, checks them, merges them
//! into the BAT in memory, and marks the top delta as in use.

use std::io;
use std::sync::Arc;

use super::alloc::{Allocator, Extent};
use super::bat::Bat;
use super::engine::{Engine, LevelMap};
use super::entry::Entry;
use super::error::OpenError;
use super::md::{MdWriter, Metadata};
use super::options::Options;
use super::runner::Runner;
use super::sabotage::{self, Sabotage};
use crate::format::{BatScan, Geometry, Header, HostCluster, InUse, Sector, Version, scan_bat};
use crate::storage::{Disk, FileId};

/// The most deltas in a chain.
const LEVELS_MAX: usize = 126;

/// Bytes of BAT that are read at once.
const READ_AT_ONCE: usize = 1 << 20;

/// What the files of a [`Disk`] are, base first: the index is the [`FileId`].
#[derive(Clone, Debug)]
pub struct Chain {
    /// At least one. Only the first may be [`Level::Plain`], and only under
    /// another.
    pub levels: Vec<Level>,
}

/// What one file of a chain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// A ploop image ("Compressed" or "expandable").
    Ploop,
    /// A raw image.
    Plain {
        /// Of the guest's disk.
        size: Sector,
    },
}

/// An open disk, and the state machines of its threads.
pub struct Opened<D: Disk> {
    /// What they share. Makes [`Queue`](super::Queue)s.
    pub engine: Arc<Engine<D>>,
    /// To be driven by a thread each.
    pub runners: Vec<Runner<D>>,
    /// To be driven by a thread.
    pub md: MdWriter<D>,
}

impl<D: Disk> Engine<D> {
    /// Opens a chain. Unless `options` say read-only, the top delta is marked as
    /// in use, and clusters of it that nothing maps are made ready for use. A
    /// wrong BAT is refused and nothing is changed.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(disk: D, chain: &Chain, mut options: Options) -> Result<Opened<D>, OpenError> {
        options.runners = options.runners.max(1);
        options.max_queues = options.max_queues.max(1);
        let loaded = load(&disk, chain)?;
        let geometry = loaded.header.geometry();
        let step = options.preallocation >> geometry.cluster.shift();
        options.low_water = u32::try_from(step / 2)
            .unwrap_or(u32::MAX)
            .min(geometry.entries / 4);
        let mut metadata = Metadata {
            bat_tail: read_bat_tail(&disk, loaded.top, geometry)?,
            leaked: Vec::new(),
            header: loaded.header.clone(),
        };
        if !geometry
            .data_start
            .is_multiple_of(u64::from(disk.write_alignment()))
        {
            // Version 1 only.
            disk.forgo_direct();
        }
        // A file may end before its data area starts.
        let end = HostCluster(loaded.scan.used.len() as u32).max(geometry.first_host_cluster());
        if !options.read_only {
            metadata.leaked = leaked(&loaded.scan, geometry);
            report_unclosed(&loaded.header, &metadata.leaked);
            mark_in_use(&disk, loaded.top, &mut metadata.header, loaded.file_len)?;
        }
        let pages = geometry.md_pages();
        let bat = Bat::new(loaded.entries.into_iter(), pages);
        let alloc = Allocator::new(end);
        start(disk, loaded.levels, bat, alloc, options, metadata).map_err(OpenError::Setup)
    }
}

fn start<D: Disk>(
    disk: D,
    levels: Vec<LevelMap>,
    bat: Bat,
    alloc: Allocator,
    options: Options,
    metadata: Metadata,
) -> io::Result<Opened<D>> {
    let engine = Arc::new(Engine::new(disk, levels, bat, alloc, options)?);
    let runners = (0..engine.runners.len())
        .map(|index| Runner::new(engine.clone(), index))
        .collect::<io::Result<_>>()?;
    let md = MdWriter::new(engine.clone(), metadata)?;
    Ok(Opened {
        engine,
        runners,
        md,
    })
}

/// A chain as it was read.
struct Loaded {
    levels: Vec<LevelMap>,
    /// Of the top, for all of its disk, merged from all levels.
    entries: Vec<Entry>,
    top: FileId,
    header: Header,
    scan: BatScan,
    file_len: u64,
}

fn load(disk: &impl Disk, chain: &Chain) -> Result<Loaded, OpenError> {
    let count = chain.levels.len();
    if count == 0 || count > LEVELS_MAX {
        return Err(OpenError::Levels(count));
    }
    let top = FileId((count - 1) as u8);
    if matches!(chain.levels[count - 1], Level::Plain { .. }) {
        return Err(OpenError::Misfit {
            level: top.0,
            why: "the top must be a ploop image, not a plain one",
        });
    }
    let header = read_header(disk, top)?;
    let top_geometry = *header.geometry();
    let mut entries = vec![Entry::HOLE; top_geometry.entries as usize];
    let mut levels = Vec::with_capacity(count);
    for (level, file) in chain.levels[..count - 1].iter().zip((0..).map(FileId)) {
        levels.push(match level {
            Level::Plain { size } => load_plain(file, *size, &top_geometry, &mut entries)?,
            Level::Ploop => {
                let geometry = *read_header(disk, file)?.geometry();
                check_fit(file, &geometry, &top_geometry)?;
                load_bat(disk, file, &geometry, &mut entries)?;
                LevelMap {
                    geometry,
                    plain: false,
                }
            }
        });
    }
    let (scan, file_len) = load_bat(disk, top, &top_geometry, &mut entries)?;
    levels.push(LevelMap {
        geometry: top_geometry,
        plain: false,
    });
    Ok(Loaded {
        levels,
        entries,
        top,
        header,
        scan,
        file_len,
    })
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

/// Maps every cluster of a raw base to itself.
fn load_plain(
    file: FileId,
    size: Sector,
    top: &Geometry,
    entries: &mut [Entry],
) -> Result<LevelMap, OpenError> {
    let misfit = |why| Err(OpenError::Misfit { level: file.0, why });
    if file != FileId(0) {
        return misfit("only the base may be plain");
    }
    if size > top.disk_size {
        return misfit("its disk is larger than that of the top");
    }
    let clusters = top.cluster.count_for(size.bytes()) as usize;
    for (entry, cluster) in entries[..clusters].iter_mut().zip(0..) {
        *entry = Entry::mapped(file, HostCluster(cluster));
    }
    Ok(LevelMap {
        geometry: Geometry {
            version: Version::V2,
            cluster: top.cluster,
            entries: clusters as u32,
            disk_size: size,
            data_start: 0,
        },
        plain: true,
    })
}

/// Reads, checks and merges the BAT of one level; says how long its file is, too.
fn load_bat(
    disk: &impl Disk,
    file: FileId,
    geometry: &Geometry,
    entries: &mut [Entry],
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
    let mut reader = BatReader {
        disk,
        file,
        at: Header::LEN as u64,
        end: needed,
        chunk: Vec::new(),
        error: None,
    };
    let values = std::iter::from_fn(|| reader.next_chunk()).flatten();
    let merged = values.zip(entries.iter_mut()).map(|(value, entry)| {
        if let Some(host) = geometry.host_cluster(value).filter(|_| value != 0) {
            *entry = Entry::mapped(file, host);
        }
        value
    });
    let scan = scan_bat(geometry, len, merged);
    if let Some(error) = reader.error {
        return Err(OpenError::io("read the BAT", file)(error));
    }
    match scan.problems.first() {
        None => Ok((scan, len)),
        Some(first) => Err(OpenError::CorruptBat {
            level: file.0,
            problems: scan.problem_count,
            first: first.to_string(),
        }),
    }
}

/// Gives a BAT in chunks; ends early at an error.
struct BatReader<'a, D> {
    disk: &'a D,
    file: FileId,
    at: u64,
    end: u64,
    chunk: Vec<u8>,
    error: Option<io::Error>,
}

impl<D: Disk> BatReader<'_, D> {
    fn next_chunk(&mut self) -> Option<Vec<u32>> {
        let len = (self.end - self.at).min(READ_AT_ONCE as u64);
        if len == 0 {
            return None;
        }
        self.chunk.resize(len as usize, 0);
        let result = self.disk.read_exact_at(self.file, &mut self.chunk, self.at);
        if let Err(error) = result {
            self.error = Some(error);
            return None;
        }
        self.at += len;
        let words = self.chunk.chunks_exact(4).map(|bytes| {
            let mut word = [0; 4];
            word.copy_from_slice(bytes);
            u32::from_le_bytes(word)
        });
        Some(words.collect())
    }
}

/// What follows the BAT in its last md page: it stays what it is.
fn read_bat_tail(
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

/// Clusters of the file that nothing maps: left by a crash, by a discard, or by
/// another tool.
fn leaked(scan: &BatScan, geometry: &Geometry) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    let first = geometry.first_host_cluster().0;
    let unused = scan.used.zeroes().map(|cluster| cluster as u32);
    for cluster in unused.filter(|cluster| *cluster >= first) {
        match extents.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => extents.push(Extent {
                start: cluster,
                end: cluster + 1,
            }),
        }
    }
    extents
}

/// Says so if the image was not closed: its check has come to a good end by now.
fn report_unclosed(header: &Header, leaked: &[Extent]) {
    if matches!(header.in_use, InUse::Open | InUse::OpenByOthers) {
        let clusters: u64 = leaked.iter().map(|extent| u64::from(extent.len())).sum();
        log::warn!(
            "the image was not closed cleanly; its mapping is sound, and leaked clusters \
             ({clusters}) will be used again"
        );
    }
}

/// Before anything else of the file changes, the mark is stable (I12). The format
/// extension is not valid from then on, and dropped. A last cluster that is not
/// whole, left by an extension that was cut off, is made whole.
fn mark_in_use(
    disk: &impl Disk,
    file: FileId,
    header: &mut Header,
    file_len: u64,
) -> Result<(), OpenError> {
    let io = |what| OpenError::io(what, file);
    header.in_use = InUse::Open;
    header.extension = Sector(0);
    header.clear_empty();
    disk.write_all_at(file, &header.to_bytes(), 0)
        .map_err(io("mark the image as in use"))?;
    if !sabotage::is(Sabotage::ChangeBeforeMark) {
        disk.sync(file).map_err(io("mark the image as in use"))?;
    }
    let geometry = header.geometry();
    // A sparse BAT would have to be filled when the host may be full.
    if let Err(error) = disk.allocate(file, 0, geometry.data_start.min(file_len)) {
        log::warn!("cannot allocate space for the whole BAT: {error}");
    }
    let end = geometry
        .host_clusters_below(file_len)
        .max(u64::from(geometry.first_host_cluster().0));
    let end = u32::try_from(end).unwrap_or(u32::MAX);
    let whole = geometry.host_offset(HostCluster(end));
    if whole > file_len {
        disk.set_len(file, whole).map_err(io("extend the file"))?;
        disk.sync(file).map_err(io("extend the file"))?;
    }
    Ok(())
}
