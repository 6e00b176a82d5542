//! Opening a chain of deltas: makes the top ready for being changed, and the
//! engine from what was read of all levels ([`mod@load`]).

mod load;

use std::io;
use std::sync::Arc;

pub(super) use self::load::read_levels;
use self::load::{Loaded, TopImage, is_full, load, read_bat_tail, write_bat_again};
use super::alloc::{Allocator, Extent};
use super::engine::{Engine, Shared};
use super::error::OpenError;
use super::md::{MdWriter, Metadata};
use super::options::Options;
use super::rule::{self, Rule};
use super::runner::Runner;
use super::take_over::{Beginning, refuse_take_over};
use super::tracking::saved;
use crate::format::{
    BatScan, ClusterSize, Geometry, GuestCluster, Header, HostCluster, InUse, Sector,
};
use crate::storage::opening::{NO_OPENING, new_opening};
use crate::storage::{Disk, FileId};

/// What the files of a [`Disk`] are, base first: the index is the [`FileId`].
#[derive(Clone, Debug)]
pub struct Chain {
    /// At least one. Only the first may be [`Level::Plain`].
    pub levels: Vec<Level>,
}

/// What one file of a chain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// A ploop image ("Compressed" or "expandable").
    Ploop,
    /// A raw image: every cluster is where it is on the guest's disk. It may be
    /// the only level. A file that ends before the disk does reads as zeros from
    /// there on; what it has beyond is left alone.
    Plain {
        /// Of the guest's disk.
        size: Sector,
        /// The unit in which it is looked up: that of the levels above, if there
        /// are any.
        cluster: ClusterSize,
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
    /// in use, and clusters of it that nothing maps are made ready for use; a top
    /// that is plain is made as long as its disk. A wrong BAT is refused and
    /// nothing is changed.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(disk: D, chain: &Chain, mut options: Options) -> Result<Opened<D>, OpenError> {
        options.runners = options.runners.max(1);
        options.max_queues = options.max_queues.max(1);
        let loaded = load(&disk, chain)?;
        let top = loaded.top();
        let geometry = *loaded.geometry();
        let step = options.preallocation >> geometry.cluster.shift();
        options.low_water = u32::try_from(step / 2)
            .unwrap_or(u32::MAX)
            .min(geometry.entries / 4);
        if !is_aligned(&disk, &geometry) {
            disk.forgo_direct();
        }
        let beginning = beginning(&disk, top, loaded.image.as_ref(), &options);
        if let Some(image) = &loaded.image {
            let understood = saved::require_understood(&disk, top, &image.header);
            understood.map_err(|source| OpenError::Feature {
                level: top.0,
                source,
            })?;
        }
        // Before the mark says that they miss what is written from now on.
        let bitmaps = match &loaded.image {
            Some(image) if !options.read_only => saved::load(&disk, top, &image.header),
            _ => Vec::new(),
        };
        if !options.read_only {
            // To read all of that may have taken longer than a server waits for a host.
            disk.require_lock(top)
                .map_err(OpenError::io("rely on the lock", top))?;
        }
        let (alloc, metadata) = match &loaded.image {
            Some(image) => prepare_image(&disk, top, image, &options)?,
            None => prepare_plain(&disk, top, &geometry, &options)?,
        };
        let Loaded { levels, bat, .. } = loaded;
        let shared = Shared {
            bitmaps,
            levels,
            bat,
            alloc,
            beginning,
        };
        start(disk, shared, options, metadata).map_err(OpenError::Setup)
    }
}

/// Whether direct I/O can write all of the top as it likes it.
fn is_aligned(disk: &impl Disk, geometry: &Geometry) -> bool {
    let align = u64::from(disk.write_alignment());
    // Another than a multiple in version 1 only.
    let start = geometry.data_start.is_multiple_of(align);
    // A raw image need not have more than the disk: its last block may be cut.
    let end = geometry.data_start > 0 || geometry.disk_size.bytes().is_multiple_of(align);
    start && end
}

/// Whether a guest may come back that lives on after a process that was killed.
fn beginning(
    disk: &impl Disk,
    top: FileId,
    image: Option<&TopImage>,
    options: &Options,
) -> Beginning {
    if options.read_only {
        return beginning_of_reader(disk, top, image);
    }
    let opening = disk.opening(top).unwrap_or_else(|error| {
        log::warn!("cannot read the attributes of the image: {error}");
        None
    });
    let opening = opening.filter(|opening| *opening != NO_OPENING);
    Beginning::Awaited {
        // A raw image has no mark.
        unclosed: image.map_or(opening.is_some(), |image| {
            image.header.in_use == InUse::Open
        }),
        opening,
        leaked: image.map_or_else(Vec::new, |image| {
            let leaked = leaked(&image.scan, image.header.geometry());
            report_unclosed(&image.header, &leaked);
            leaked
        }),
    }
}

/// Who only reads takes nothing over and gives nothing out again. But it has to know as well
/// whether a guest was told of more than the disk has.
fn beginning_of_reader(disk: &impl Disk, top: FileId, image: Option<&TopImage>) -> Beginning {
    let is_named = || matches!(disk.opening(top), Ok(Some(opening)) if opening != NO_OPENING);
    Beginning::Awaited {
        // A raw image has no mark.
        unclosed: image.map_or_else(is_named, |image| image.header.in_use == InUse::Open),
        opening: None,
        leaked: Vec::new(),
    }
}

/// Makes a top with a BAT ready: for the allocator and the metadata thread.
fn prepare_image(
    disk: &impl Disk,
    top: FileId,
    image: &TopImage,
    options: &Options,
) -> Result<(Allocator, Option<Metadata>), OpenError> {
    let geometry = image.header.geometry();
    let mut metadata = Metadata {
        bat_tail: read_bat_tail(disk, top, geometry)?,
        header: image.header.clone(),
    };
    // A file may end before its data area starts.
    let end = HostCluster(image.scan.used.len() as u32).max(geometry.first_host_cluster());
    if !options.read_only {
        let found_as = image.header.in_use;
        if found_as != InUse::Open && !options.is_passed_on {
            refuse_former_guest(disk, top)?;
        }
        if matches!(found_as, InUse::Open | InUse::OpenByOthers) && !options.is_passed_on {
            write_again(disk, top, geometry, end)?;
        }
        mark_in_use(disk, top, &mut metadata.header, image.file_len)?;
    }
    let used_end = image.scan.used.end().max(geometry.first_host_cluster());
    Ok((Allocator::new(end, used_end), Some(metadata)))
}

/// Whoever left the image marked may have done so after a failed sync. What that covered, the
/// kernel takes for written, and no later sync writes it: it can be read, and a cut takes it
/// away (I3). So what the next sync is to make stable is written once more: the map, and the length
/// of the file, by a cluster behind its end that nobody knows of. A process that is passed the image
/// knows better.
fn write_again(
    disk: &impl Disk,
    top: FileId,
    geometry: &Geometry,
    end: HostCluster,
) -> Result<(), OpenError> {
    write_bat_again(disk, top, geometry)?;
    if end.0 >= geometry.host_cluster_limit() {
        return Ok(());
    }
    match disk.set_len(top, geometry.host_offset(HostCluster(end.0 + 1))) {
        // It is as long as it may be.
        Err(error) if is_full(&error) || error.kind() == io::ErrorKind::FileTooLarge => Ok(()),
        set => set.map_err(OpenError::io("extend the file", top)),
    }
}

/// Makes a raw top ready. It has no mark, nothing to be allocated, and nothing for
/// the metadata thread to write.
fn prepare_plain(
    disk: &impl Disk,
    top: FileId,
    geometry: &Geometry,
    options: &Options,
) -> Result<(Allocator, Option<Metadata>), OpenError> {
    let size = geometry.disk_size.bytes();
    let len = disk
        .len(top)
        .map_err(OpenError::io("get the length", top))?;
    if !options.read_only && len < size {
        disk.set_len(top, size)
            .map_err(OpenError::io("extend the file", top))?;
        // Before anything is written behind the old end (I8).
        sync_first(disk, top).map_err(OpenError::io("extend the file", top))?;
    }
    let end = HostCluster(geometry.entries);
    Ok((Allocator::new(end, end), None))
}

fn start<D: Disk>(
    disk: D,
    shared: Shared,
    options: Options,
    metadata: Option<Metadata>,
) -> io::Result<Opened<D>> {
    let awaits_take_over = options.awaits_take_over;
    let engine = Arc::new(Engine::new(disk, shared, options)?);
    if !awaits_take_over {
        engine.begin();
    }
    // Another process may have died before it synced what it wrote, and its guest may
    // go on with this one. Opening an image with a mark syncs that, opening others not.
    if !engine.has_bat() && !engine.is_read_only() {
        engine.uncover();
    }
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

/// Clusters of the file that nothing maps: left by a crash, by a discard, or by
/// another tool.
fn leaked(scan: &BatScan, geometry: &Geometry) -> Vec<Extent> {
    let gaps = scan.used.gaps(geometry.first_host_cluster());
    gaps.map(|gap| Extent {
        start: gap.start.0,
        end: gap.end.0,
    })
    .collect()
}

/// Says so if the image was not closed: its check has come to a good end by now.
fn report_unclosed(header: &Header, leaked: &[Extent]) {
    if matches!(header.in_use, InUse::Open | InUse::OpenByOthers) {
        let clusters: u64 = leaked.iter().map(|extent| u64::from(extent.len())).sum();
        log::warn!(
            "the image was not closed cleanly; its mapping is sound, and clusters that it \
             does not map ({clusters}) will be used again"
        );
    }
}

/// Of an image that somebody has closed: a name that the opening before has left is that of
/// a guest whose process was killed, and of a program after it that knows no names. The mark
/// which is about to be made would have the next process believe that guest.
fn refuse_former_guest(disk: &impl Disk, file: FileId) -> Result<(), OpenError> {
    match disk.opening(file) {
        Ok(Some(name)) if name != NO_OPENING => disk.set_opening(file, new_opening()).map_err(
            OpenError::io("change the attribute user.ploop.opening", file),
        ),
        // What cannot be read was said before, and cannot be believed later either.
        _ => Ok(()),
    }
}

/// Before anything else of the file changes, the mark is stable (I12). The format
/// extension is not valid from then on, and forgotten: its bitmaps were read. A last cluster
/// that is not whole, left by an extension that was cut off, is made whole; a file that cannot
/// be made so long gets its old header back.
fn mark_in_use(
    disk: &impl Disk,
    file: FileId,
    header: &mut Header,
    file_len: u64,
) -> Result<(), OpenError> {
    let before = header.to_bytes();
    header.in_use = InUse::Open;
    if rule::kept(Rule::BitmapsEndWithUse) {
        header.extension = Sector(0);
    }
    header.clear_empty();
    let failed = || OpenError::io("mark the image as in use", file);
    disk.write_all_at(file, &header.to_bytes(), 0)
        .map_err(failed())?;
    if rule::kept(Rule::MarkBeforeChange) {
        sync_first(disk, file).map_err(failed())?;
    }
    let geometry = header.geometry();
    // A sparse BAT would have to be filled when the host may be full. Of entries
    // that no cluster of the disk has, none will.
    let last = GuestCluster(geometry.disk_clusters() as u32 - 1);
    let pages = (u64::from(geometry.md_page(last)) + 1) * Geometry::MD_PAGE;
    if let Err(error) = disk.allocate(file, 0, pages.min(geometry.data_start).min(file_len)) {
        log::warn!("cannot allocate space for the whole BAT: {error}");
    }
    make_last_cluster_whole(disk, file, geometry, file_len).inspect_err(|_| {
        // What is refused is not changed, where that can still be had. The mark that
        // stays otherwise costs a check.
        let undone = disk.write_all_at(file, &before, 0);
        if let Err(error) = undone.and_then(|()| sync_first(disk, file)) {
            log::warn!("the image stays marked as in use: {error}");
        }
    })
}

fn make_last_cluster_whole(
    disk: &impl Disk,
    file: FileId,
    geometry: &Geometry,
    file_len: u64,
) -> Result<(), OpenError> {
    let end = geometry
        .host_clusters_below(file_len)
        .max(u64::from(geometry.first_host_cluster().0));
    let end = u32::try_from(end).unwrap_or(u32::MAX);
    let whole = geometry.host_offset(HostCluster(end));
    if whole <= file_len {
        return Ok(());
    }
    let failed = || OpenError::io("extend the file", file);
    disk.set_len(file, whole).map_err(failed())?;
    sync_first(disk, file).map_err(failed())
}

/// A sync before anybody is served, which also says what became of the writes of a process
/// that was killed. It says so once: if it fails, this process ends, and the next one's
/// succeeds. So the guest of those writes must not go on with the next one (I7, I13).
fn sync_first(disk: &impl Disk, file: FileId) -> io::Result<()> {
    disk.sync(file)
        .inspect_err(|_| refuse_take_over(disk, file))
}
