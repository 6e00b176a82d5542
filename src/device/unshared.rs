//! Whether what the guest writes to its memory can be seen here at all.
//!
//! A front-end may share a file that it has mapped privately (QEMU: a memory backend with
//! `share=off`). All messages go well, the guest's writes stay with the front-end, and the
//! guest waits for ever. What shows of it is a ring that was kicked and stays empty, in
//! memory that nobody has written to.
//!
//! Knows the layout of a ring. Must not know what is in a request.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::memory::GuestMap;

/// How long after a kick a ring has to be empty. The first kick is often the front-end's
/// own, before the driver has anything.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the file of memory takes on the host, in bytes, if only rings were looked at:
/// reading allocates. So much for each queue, and for anything else.
const LOOKED_AT_PER_QUEUE: u64 = 16 << 10;
const LOOKED_AT: u64 = 64 << 10;

/// Sizes of a ring's parts, in bytes (virtio 1.2, 2.7).
const DESCRIPTOR_LEN: usize = 16;
const AVAIL_HEAD_LEN: usize = 4;
const AVAIL_ENTRY_LEN: usize = 2;

/// What is to be said then.
pub(super) const WARNING: &str = "the ring was kicked and stays empty, and nobody seems to have \
    written to the memory that the front-end shares: is it mapped privately? With QEMU the \
    guest's memory backend needs share=on, else the guest hangs at its first look at the disk";

/// What is known of one ring since it has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Nothing was there so far.
    Open,
    /// Nor was it at a kick.
    Kicked(Instant),
    /// There was something, or it was looked into.
    Settled,
}

impl Sharing {
    /// The driver has said that there is something.
    pub fn kicked(&mut self) {
        if *self == Self::Open {
            *self = Self::Kicked(Instant::now());
        }
    }

    /// After which time it is to be looked into, if at all.
    pub fn due_in(&self) -> Option<Duration> {
        match self {
            Self::Kicked(at) => Some(PATIENCE.saturating_sub(at.elapsed())),
            Self::Open | Self::Settled => None,
        }
    }

    /// Looks into it once if it is time to. `queues` run.
    pub fn looks_private(&mut self, ring: &Queue, map: &GuestMap, queues: usize) -> bool {
        if self.due_in() != Some(Duration::ZERO) {
            return false;
        }
        *self = Self::Settled;
        is_untouched(ring, map) && is_file_empty(ring, map, queues)
    }
}

/// Whether table and available ring, which only the driver writes, are all zero.
fn is_untouched(ring: &Queue, map: &GuestMap) -> bool {
    let size = usize::from(ring.size());
    let is_zero = |at, len| {
        let mut bytes = vec![0xff; len];
        let read = map.read_slice(&mut bytes, GuestAddress(at));
        read.is_ok() && bytes.iter().all(|&byte| byte == 0)
    };
    is_zero(ring.avail_ring(), AVAIL_HEAD_LEN + AVAIL_ENTRY_LEN * size)
        && is_zero(ring.desc_table(), DESCRIPTOR_LEN * size)
}

/// Whether the file that the ring lies in has no more in it than looking at rings brings.
fn is_file_empty(ring: &Queue, map: &GuestMap, queues: usize) -> bool {
    let region = map.find_region(GuestAddress(ring.avail_ring()));
    let file = region.and_then(GuestMemoryRegion::file_offset);
    let metadata = file.and_then(|it| it.file().metadata().ok());
    let bound = LOOKED_AT + LOOKED_AT_PER_QUEUE * queues as u64;
    metadata.is_some_and(|metadata| metadata.blocks() * 512 <= bound)
}
