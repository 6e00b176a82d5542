//! The table of guest memory as the front-end makes it.
//!
//! A region is a file that the front-end has sent. Touching it must not depend on
//! anybody's good will: what it is is looked at before it is mapped, and what it becomes
//! is watched.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion,
    GuestRegionCollectionError, MmapRegion, mmap::MmapRegionError,
};

use super::memory::{GuestMap, GuestRegion, SharedMemory};
use super::vanishing::{Alarm, Watch};
use crate::headroom;

/// Most regions of a front-end that adds them one by one, as many as libvhost-user and
/// the library allow.
pub(super) const MAX_REGIONS: usize = 509;

/// How long after a region was taken away others are expected to follow, or to come: more
/// than a front-end needs from an answer to its next message.
const CHANGE_TIME: Duration = Duration::from_millis(100);

/// `f_type` of a FUSE file system, of any kind.
const FUSE: u32 = 0x6573_5546;

/// Memory that cannot be used.
#[derive(Debug, Error)]
pub(super) enum MemoryError {
    #[error("the file of a memory region cannot be examined: {0}")]
    File(io::Error),
    #[error(
        "a memory region is {0}, whose owner could block every access to it: memory must \
         be a memfd, hugetlbfs, tmpfs or an ordinary file"
    )]
    Kind(&'static str),
    #[error(
        "a memory region of {size:#x} bytes at {offset:#x} of its file lies beyond the end at {len:#x}"
    )]
    TooShort { size: u64, offset: u64, len: u64 },
    #[error("a memory region at guest address {at:#x} cannot be mapped: {why}")]
    Map { at: u64, why: MmapRegionError },
    #[error("a memory region at guest address {at:#x} leaves no memory for anything else: {why}")]
    NoneLeft { at: u64, why: io::Error },
    #[error("a memory region at guest address {at:#x} cannot be watched: {why}")]
    Watch { at: u64, why: io::Error },
    #[error("a memory region at guest address {at:#x} extends beyond the address space")]
    Address { at: u64 },
    #[error("memory regions do not fit together: {0}")]
    Regions(GuestRegionCollectionError),
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    #[error(
        "the front-end has shared no memory of the guest: with QEMU, give the guest \
         `-object memory-backend-memfd,share=on` memory"
    )]
    NotShared,
    #[error("address {0:#x} of the front-end lies in no memory region")]
    NotThere(u64),
}

/// A region in the address space of the front-end.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    front_end: u64,
    size: u64,
    guest: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct MemoryTable {
    shared: Arc<SharedMemory>,
    mappings: Vec<Mapping>,
    /// When a region was taken away, if nothing has come since.
    removed: Option<Instant>,
    /// For memory that vanishes.
    alarm: Arc<Alarm>,
}

impl MemoryTable {
    /// Without a region.
    pub fn new(alarm: Arc<Alarm>) -> Self {
        Self {
            alarm,
            shared: Arc::new(SharedMemory::new()),
            mappings: Vec::new(),
            removed: None,
        }
    }

    /// Whether regions have just been taken away, and others may come for them.
    pub fn is_being_changed(&self) -> bool {
        self.removed.is_some_and(|at| at.elapsed() < CHANGE_TIME)
    }

    /// For other memory of the front-end's.
    pub fn alarm(&self) -> &Arc<Alarm> {
        &self.alarm
    }

    /// What queues look addresses up in.
    pub fn shared(&self) -> &Arc<SharedMemory> {
        &self.shared
    }

    /// Replaces all regions.
    pub fn set(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<(), MemoryError> {
        let mapped = regions
            .iter()
            .zip(files)
            .map(|(region, file)| map(region, file, &self.alarm));
        let mapped = mapped.collect::<Result<Vec<_>, _>>()?;
        let table = GuestMap::from_regions(mapped).map_err(MemoryError::Regions)?;
        self.shared.replace(table);
        self.mappings = regions.iter().map(Mapping::of).collect();
        self.removed = None;
        Ok(())
    }

    /// Adds one region.
    pub fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<(), MemoryError> {
        if self.mappings.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let mapped = Arc::new(map(region, file, &self.alarm)?);
        let table = self.shared.atomic().memory().insert_region(mapped);
        self.shared.replace(table.map_err(MemoryError::Regions)?);
        self.mappings.push(Mapping::of(region));
        self.removed = None;
        Ok(())
    }

    /// Takes one region away.
    pub fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), MemoryError> {
        let at = GuestAddress(region.guest_phys_addr);
        let old = self.shared.atomic().memory();
        let (table, _) = old
            .remove_region(at, region.memory_size)
            .map_err(MemoryError::Regions)?;
        self.shared.replace(table);
        self.mappings.retain(|mapping| mapping.guest != at.0);
        self.removed = Some(Instant::now());
        Ok(())
    }

    /// All regions, with copies of their descriptors.
    ///
    /// # Errors
    /// Any of `fcntl(2)`.
    pub fn export(&self) -> io::Result<Vec<(VhostUserMemoryRegion, File)>> {
        let map = self.shared.atomic().memory();
        let export = |mapping: &Mapping| {
            let region = map.find_region(GuestAddress(mapping.guest));
            // Each was mapped from a file.
            let file = region.and_then(GuestMemoryRegion::file_offset);
            let file = file.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            let region = VhostUserMemoryRegion::new(
                mapping.guest,
                mapping.size,
                mapping.front_end,
                file.start(),
            );
            Ok((region, file.file().try_clone()?))
        };
        self.mappings.iter().map(export).collect()
    }

    /// The guest address of what the front-end has at an address of its own.
    pub fn guest_address(&self, front_end: u64) -> Result<u64, MemoryError> {
        if self.mappings.is_empty() {
            return Err(MemoryError::NotShared);
        }
        let offset = |mapping: &Mapping| {
            let offset = front_end.checked_sub(mapping.front_end)?;
            (offset < mapping.size).then_some(mapping.guest + offset)
        };
        let found = self.mappings.iter().find_map(offset);
        found.ok_or(MemoryError::NotThere(front_end))
    }
}

/// For the log: where in the guest, and how much.
impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} regions", self.mappings.len())?;
        for Mapping { guest, size, .. } in &self.mappings {
            write!(f, ", {size:#x} bytes at {guest:#x}")?;
        }
        Ok(())
    }
}

impl Mapping {
    fn of(region: &VhostUserMemoryRegion) -> Self {
        Self {
            front_end: region.user_addr,
            size: region.memory_size,
            guest: region.guest_phys_addr,
        }
    }
}

fn map(
    region: &VhostUserMemoryRegion,
    file: File,
    alarm: &Arc<Alarm>,
) -> Result<GuestRegion, MemoryError> {
    let (at, size, offset) = (
        region.guest_phys_addr,
        region.memory_size,
        region.mmap_offset,
    );
    check(&file, size, offset)?;
    let mapped: MmapRegion = MmapRegion::from_file(FileOffset::new(file, offset), size as usize)
        .map_err(|why| MemoryError::Map { at, why })?;
    headroom::check().map_err(|why| MemoryError::NoneLeft { at, why })?;
    // SAFETY: it was mapped above, in its whole length, and `GuestRegion` drops
    // the watch first. What the guest finds in its memory is no promise of ours.
    let watch = unsafe { Watch::start(mapped.as_ptr(), mapped.size(), Arc::clone(alarm)) };
    let watch = watch.map_err(|why| MemoryError::Watch { at, why })?;
    let region = GuestRegion::new(mapped, GuestAddress(at), Some(watch));
    region.ok_or(MemoryError::Address { at })
}

/// Whether a file of the front-end's may be mapped.
pub(super) fn check(file: &File, size: u64, offset: u64) -> Result<(), MemoryError> {
    let meta = file.metadata().map_err(MemoryError::File)?;
    let kind = meta.file_type();
    if !kind.is_file() {
        return Err(MemoryError::Kind(
            if kind.is_char_device() || kind.is_block_device() {
                "a device"
            } else {
                "not a file"
            },
        ));
    }
    let file_system = rustix::fs::fstatfs(file).map_err(|errno| MemoryError::File(errno.into()))?;
    if file_system.f_type as u32 == FUSE {
        return Err(MemoryError::Kind("a file of a FUSE file system"));
    }
    let len = meta.len();
    if offset.checked_add(size).is_none_or(|end| end > len) {
        return Err(MemoryError::TooShort { size, offset, len });
    }
    Ok(())
}
