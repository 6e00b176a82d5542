//! The log of guest memory that was written, which a live migration copies again.
//!
//! The front-end gives a file with a bit for each page of the guest's memory. While it has
//! logging turned on, each queue thread has [`Marks`] and sets the bits of what it has
//! written: after the I/O, and before the driver or the front-end can see that it has
//! ended (I16). Without marks it does nothing for it. Marks are replaced by mail that is
//! waited for: once a message about the log is answered, nothing is set in the log from
//! before.
//!
//! Which memory a request had written is read from its descriptors again when it ends. So
//! requests that were under way when logging began count as well, and those before cost
//! nothing. A driver that changes them meanwhile harms its own guest.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use thiserror::Error;
use vhost::vhost_user::message::VhostUserLog;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::memory_table::{self, MemoryError};
use super::vanishing::{Alarm, Watch};

/// Bytes of guest memory for each bit, whatever pages guest and host have.
const LOG_PAGE: u64 = 4096;

/// A log that cannot be used.
#[derive(Debug, Error)]
pub(super) enum LogError {
    #[error("the log of written memory: {0}")]
    File(#[from] MemoryError),
    #[error("the log of written memory cannot be mapped: {0}")]
    Map(MmapRegionError),
    #[error("the log of written memory cannot be watched: {0}")]
    Watch(io::Error),
}

/// The bits.
#[derive(Debug)]
pub(super) struct Log {
    /// Goes before the mapping.
    _watch: Watch,
    mapped: MmapRegion,
}

impl Log {
    /// Maps what the front-end has given.
    pub fn map(given: &VhostUserLog, file: File, alarm: Arc<Alarm>) -> Result<Self, LogError> {
        let (size, offset) = (given.mmap_size, given.mmap_offset);
        memory_table::check(&file, size, offset)?;
        let mapped: MmapRegion =
            MmapRegion::from_file(FileOffset::new(file, offset), size as usize)
                .map_err(LogError::Map)?;
        // SAFETY: it was mapped in the line above, in its whole length, and the watch is
        // dropped first. Bits that are lost with the file are the front-end's loss.
        let watch = unsafe { Watch::start(mapped.as_ptr(), mapped.size(), alarm) };
        Ok(Self {
            _watch: watch.map_err(LogError::Watch)?,
            mapped,
        })
    }

    /// The log as it was given, with a copy of its descriptor.
    ///
    /// # Errors
    /// Any of `fcntl(2)`.
    pub fn export(&self) -> io::Result<(VhostUserLog, File)> {
        let at = self.mapped.file_offset();
        // It was mapped from a file.
        let at = at.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let given = VhostUserLog::new(self.mapped.size() as u64, at.start());
        Ok((given, at.file().try_clone()?))
    }

    /// So many bytes from a guest address on were written. What the log has no bits for is
    /// not the front-end's memory.
    fn mark(&self, address: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else {
            return;
        };
        let pages = address / LOG_PAGE..=address.saturating_add(last) / LOG_PAGE;
        for page in pages {
            let byte = usize::try_from(page / 8).ok();
            let byte = byte.and_then(|at| self.mapped.get_atomic_ref::<AtomicU8>(at).ok());
            let Some(byte) = byte else {
                return;
            };
            // What was written comes before its mark.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

/// What one queue thread marks.
#[derive(Clone, Debug)]
pub(super) struct Marks {
    pub log: Arc<Log>,
    /// Where the log has the used ring, if it is to be marked.
    pub used_ring: Option<u64>,
}

impl Marks {
    /// A request has written there.
    pub fn mark(&self, address: u64, len: u32) {
        self.log.mark(address, len.into());
    }

    /// The used ring of so many descriptors was written.
    pub fn mark_used_ring(&self, ring_size: u16) {
        if let Some(address) = self.used_ring {
            self.log.mark(address, used_ring_len(ring_size));
        }
    }
}

/// Bytes of a used ring: flags, index, elements, the index for kicks (virtio 1.2, 2.7.8).
fn used_ring_len(ring_size: u16) -> u64 {
    4 + 8 * u64::from(ring_size) + 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn each_page_has_its_bit() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1000).unwrap();
        let (socket, _theirs) = UnixStream::pair().unwrap();
        let alarm = Arc::new(Alarm::new(Arc::new(socket)));
        let given = VhostUserLog::new(0x1000, 0);
        let log = Log::map(&given, file.try_clone().unwrap(), alarm).unwrap();
        log.mark(0x1fff, 2);
        log.mark(0x9000, 0);
        log.mark(0xa000, 1);
        // The last page that has a bit, and the first that has none.
        log.mark((0x1000 * 8 - 1) * 4096, 8192);
        log.mark(u64::MAX, u64::MAX);
        let mut bits = [0; 0x1000];
        file.read_exact_at(&mut bits, 0).unwrap();
        let mut expected = [0; 0x1000];
        expected[0] = 0b110;
        expected[1] = 0b100;
        expected[0xfff] = 0x80;
        assert!(bits == expected, "{:x?}", &bits[..4]);
    }
}
