//! Whether what the guest writes to its memory can be seen here at all.
//!
//! A front-end may share a file that it has mapped privately (QEMU: a memory backend with
//! `share=off`). All messages go well, the guest's writes stay with the front-end, and the
//! guest waits for ever. What shows of it is a ring that was kicked and stays empty, in
//! memory that nobody has written to.
//!
//! Knows the layout of a ring. Must not know what is in a request.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::memory::GuestMap;

/// How long after a kick a ring has to be empty. The first kick is often the front-end's
/// own, before the driver has anything.
const PATIENCE: Duration = Duration::from_secs(1);

/// How much of each file of memory is read, from its start on, in bytes. All kinds of
/// machines have something of their firmware's or their kernel's there. What a file takes
/// on the host says nothing: who reads memory that is mapped privately allocates it.
const LOOKED_AT: usize = 16 << 20;
const CHUNK: usize = 64 << 10;

/// Sizes of a ring's parts, in bytes (virtio 1.2, 2.7).
const DESCRIPTOR_LEN: usize = 16;
const AVAIL_HEAD_LEN: usize = 4;
const AVAIL_ENTRY_LEN: usize = 2;

/// What is to be said then.
pub(super) const WARNING: &str = "the ring was kicked and stays empty, and nobody seems to have \
    written to the memory that the front-end shares: is it mapped privately? With QEMU the \
    guest's memory backend needs share=on, or the guest hangs at its first access to the disk";

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

    /// Looks into it once if it is time to.
    pub fn looks_private(&mut self, ring: &Queue, map: &GuestMap) -> bool {
        if self.due_in() != Some(Duration::ZERO) {
            return false;
        }
        *self = Self::Settled;
        is_untouched(ring, map) && map.iter().all(is_file_empty)
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

/// Whether nothing but zeros is found in the file of a region. One that cannot be read
/// may have anything.
fn is_file_empty(region: &impl GuestMemoryRegion) -> bool {
    let is_empty = |file: &File| {
        let mut chunk = vec![0; CHUNK];
        for at in (0..LOOKED_AT).step_by(CHUNK) {
            match file.read_at(&mut chunk, at as u64) {
                Ok(0) => return true,
                Ok(len) if chunk[..len].iter().all(|&byte| byte == 0) => {}
                _ => return false,
            }
        }
        true
    };
    region
        .file_offset()
        .is_some_and(|offset| is_empty(offset.file()))
}
