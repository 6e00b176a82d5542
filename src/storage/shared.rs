//! Memory that outlives the process: words of a memfd that somebody else holds too.
//!
//! Whoever dies in the midst of something leaves in it what the next process needs
//! to know. Knows mappings and holes; must not know what the words mean. All of it is
//! read and written by atomic operations, for another process may change it at any
//! moment, and what is read from it is to be checked like any input.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

const WORD: u64 = size_of::<u64>() as u64;

/// What a mapping starts at a multiple of, in the file: no page is larger.
const ALIGNMENT: u64 = 64 << 10;

/// A range of a memfd, mapped. See the module's text.
#[derive(Debug)]
pub struct SharedWords {
    region: MmapRegion,
    file: Arc<File>,
    offset: u64,
    len: usize,
}

impl SharedWords {
    /// Where in a file words can begin, at or after `offset`.
    pub const fn aligned(offset: u64) -> u64 {
        offset.next_multiple_of(ALIGNMENT)
    }

    /// Maps `len` words of `file`, from byte `offset` on.
    ///
    /// # Errors
    /// `InvalidInput` if the offset is no multiple of 64 KiB, there are no words, the
    /// file is shorter than that, or it can become shorter: an access would kill the
    /// process then. Any of `mmap(2)`.
    pub fn map(file: Arc<File>, offset: u64, len: usize) -> io::Result<Self> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let bytes = (len as u64).checked_mul(WORD).filter(|bytes| *bytes > 0);
        let end = bytes.and_then(|bytes| offset.checked_add(bytes));
        if end.is_none_or(|end| file.metadata().is_ok_and(|meta| meta.len() < end)) {
            return Err(invalid("the shared memory is too short"));
        }
        if !offset.is_multiple_of(ALIGNMENT) {
            return Err(invalid("the shared memory begins at an odd place"));
        }
        if !rustix::fs::fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(invalid("the shared memory could be cut short"));
        }
        let size = len * size_of::<u64>();
        let region = MmapRegion::from_file(FileOffset::from_arc(file.clone(), offset), size)
            .map_err(io::Error::other)?;
        Ok(Self {
            region,
            file,
            offset,
            len,
        })
    }

    /// So many words, all zero, in a memfd of their own.
    ///
    /// # Errors
    /// Any of `memfd_create(2)`, `ftruncate(2)` and `mmap(2)`.
    pub fn new(len: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("ploop-shared", flags)?);
        file.set_len(len as u64 * WORD)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK)?;
        Self::map(Arc::new(file), 0, len)
    }

    /// A mapping of the same memory and of what is behind it, `len` words in all; the file
    /// is made longer if need be.
    ///
    /// # Errors
    /// Any of `ftruncate(2)` and `mmap(2)`.
    pub fn with_len(&self, len: usize) -> io::Result<Self> {
        let end = self.offset + len as u64 * WORD;
        if self.file.metadata()?.len() < end {
            self.file.set_len(end)?;
        }
        Self::map(self.file.clone(), self.offset, len)
    }

    /// Another mapping of the same memory.
    ///
    /// # Errors
    /// Any of `mmap(2)`.
    pub fn map_again(&self) -> io::Result<Self> {
        Self::map(self.file.clone(), self.offset, self.len)
    }

    /// How many words.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A word; `None` beyond the last one.
    pub fn word(&self, index: usize) -> Option<&AtomicU64> {
        let offset = index.checked_mul(size_of::<u64>())?;
        self.region.get_atomic_ref(offset).ok()
    }

    /// Runs of words outside of which all are zero, as the memory was when this was
    /// called. Reading elsewhere would have the kernel provide the memory first.
    ///
    /// # Errors
    /// Any of `lseek(2)`.
    pub fn data(&self) -> io::Result<Vec<Range<usize>>> {
        let end = self.offset + self.len as u64 * WORD;
        let mut runs = Vec::new();
        let mut at = self.offset;
        while at < end {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start.min(end),
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            at = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?.min(end);
            if start < at {
                let index = |at| ((at - self.offset) / WORD) as usize;
                runs.push(index(start)..index(at));
            }
        }
        Ok(runs)
    }

    /// Makes all words from `first` on zero and gives their memory back.
    ///
    /// # Errors
    /// Any of `fallocate(2)`.
    pub fn clear_from(&self, first: usize) -> io::Result<()> {
        let words = self.len.saturating_sub(first) as u64;
        if words > 0 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let offset = self.offset + first as u64 * WORD;
            rustix::fs::fallocate(&self.file, flags, offset, words * WORD)?;
        }
        Ok(())
    }

    /// Whether both are the same memory.
    pub fn is_same(&self, other: &Self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let identity = |words: &Self| {
            let meta = words.file.metadata().ok()?;
            Some((meta.dev(), meta.ino(), words.offset))
        };
        let own = identity(self);
        own.is_some() && own == identity(other)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn what_one_mapping_stores_another_one_reads() {
        let words = SharedWords::new(1 << 20).unwrap();
        let again = words.map_again().unwrap();
        let other = SharedWords::new(1).unwrap();
        assert!(words.is_same(&again) && !words.is_same(&other));
        assert!(words.data().unwrap().is_empty());
        words.word(5).unwrap().store(7, Relaxed);
        words.word((1 << 20) - 1).unwrap().store(9, Relaxed);
        assert!(words.word(1 << 20).is_none());
        let runs = again.data().unwrap();
        assert_eq!(runs.len(), 2);
        assert!(runs[0].contains(&5) && runs[1].contains(&((1 << 20) - 1)));
        assert!(runs.iter().map(|run| run.len()).sum::<usize>() < 1 << 15);
        assert_eq!(again.word(5).unwrap().load(Relaxed), 7);
        again.clear_from(6).unwrap();
        assert_eq!(words.word(5).unwrap().load(Relaxed), 7);
        again.clear_from(0).unwrap();
        assert!(words.data().unwrap().is_empty());
        assert_eq!(words.word(5).unwrap().load(Relaxed), 0);
    }

    #[test]
    fn a_range_of_the_memory_ends_where_it_ends() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("test", flags).unwrap());
        file.set_len(2 * ALIGNMENT).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let file = Arc::new(file);
        let words = (ALIGNMENT / WORD) as usize;
        let first = SharedWords::map(file.clone(), 0, words).unwrap();
        let second = SharedWords::map(file, ALIGNMENT, words).unwrap();
        assert!(!first.is_same(&second) && !first.is_empty());
        second.word(0).unwrap().store(7, Relaxed);
        assert!(first.data().unwrap().is_empty());
        first.word(words - 1).unwrap().store(9, Relaxed);
        let [run] = first.data().unwrap().try_into().unwrap();
        assert_eq!(run.end, words);
        let [run] = second.data().unwrap().try_into().unwrap();
        assert_eq!(run.start, 0);
        first.clear_from(words).unwrap();
        first.clear_from(0).unwrap();
        assert_eq!(second.word(0).unwrap().load(Relaxed), 7);
    }

    #[test]
    fn memory_that_may_vanish_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(SharedWords::map(Arc::new(file), 0, 1).is_err());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("test", flags).unwrap());
        file.set_len(4096).unwrap();
        let file = Arc::new(file);
        assert!(SharedWords::map(file.clone(), 0, 1).is_err(), "no seal");
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        for (offset, len) in [(0, 513), (0, 0), (0, usize::MAX), (u64::MAX, 1), (8, 1)] {
            assert!(SharedWords::map(file.clone(), offset, len).is_err());
        }
        assert!(SharedWords::map(file, 0, 512).is_ok());
    }
}
