//! What direct I/O demands of addresses, offsets and lengths, and descriptions that do it.
//!
//! Knows files, and nothing of who shares them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::{AtFlags, OFlags, StatxFlags};
use rustix::io::Errno;

use crate::storage::AlignedBuf;
use crate::storage::filesystem::Kind;

/// Every [`AlignedBuf`] starts at a multiple of this, in bytes. A file that
/// demands more of addresses is not accessed directly.
pub(super) const BUFFER_ALIGNMENT: u32 = 4096;

/// What direct transfers must be multiples of. In bytes, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// The addresses of memory.
    pub(super) memory: u32,
    /// The offsets in the file and the lengths, those of single segments too.
    pub(super) offset: u32,
}

impl Alignment {
    /// No demand at all.
    pub(super) const NONE: Self = Self {
        memory: 1,
        offset: 1,
    };

    /// `None` if transfers cannot be like that. Zeros say that there are no direct ones.
    fn usable(memory: u32, offset: u32) -> Option<Self> {
        let usable =
            memory.is_power_of_two() && memory <= BUFFER_ALIGNMENT && offset.is_power_of_two();
        usable.then_some(Self { memory, offset })
    }

    /// `value` rounded down to where a transfer may start.
    pub(super) fn floor(self, value: u64) -> u64 {
        value - self.beyond(value)
    }

    /// `value` rounded up to where a transfer may end.
    pub(super) fn ceil(self, value: u64) -> u64 {
        value.next_multiple_of(u64::from(self.offset))
    }

    /// How far `value` is beyond the last place where a transfer may start.
    pub(super) fn beyond(self, value: u64) -> u64 {
        value & u64::from(self.offset - 1)
    }

    /// Whether a transfer may start or end at `value`.
    pub(super) fn fits(self, value: u64) -> bool {
        self.beyond(value) == 0
    }

    /// Whether a transfer may use this piece of memory.
    pub(super) fn fits_memory(self, address: usize, len: usize) -> bool {
        address & (self.memory as usize - 1) == 0 && len & (self.offset as usize - 1) == 0
    }
}

/// The errors that say that a file, or a transfer, cannot be direct.
pub(super) fn refuses_direct(error: Errno) -> bool {
    matches!(error, Errno::INVAL | Errno::NOTBLK | Errno::OPNOTSUPP)
}

pub(super) fn is_refusal_of_direct(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(refuses_direct)
}

/// A direct description and its alignment, or the error that says that there is
/// no direct I/O.
pub(super) fn open_direct(
    given: &File,
    writable: bool,
    kind: Kind,
) -> io::Result<(File, Alignment)> {
    let file = reopen_or_share(given.try_clone()?, writable, true)?;
    let found = alignment_of(&file, kind).and_then(|alignment| {
        try_read(&file, alignment)?;
        Ok(alignment)
    });
    match found {
        Ok(alignment) => Ok((file, alignment)),
        Err(error) => {
            // It may be the caller's own description.
            set_direct(file.as_fd(), false)?;
            Err(error)
        }
    }
}

/// A new description of the same file; where that cannot be had, this one.
pub(super) fn reopen_or_share(file: File, writable: bool, direct: bool) -> io::Result<File> {
    match reopen(&file, writable, direct) {
        Ok(file) => Ok(file),
        Err(error) if is_refusal_of_direct(&error) => Err(error),
        Err(error) => {
            log::debug!("a file cannot be opened again ({error}), sharing its description");
            set_direct(file.as_fd(), direct)?;
            Ok(file)
        }
    }
}

pub(super) fn reopen(file: &File, writable: bool, direct: bool) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let direct = if direct { libc::O_DIRECT } else { 0 };
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(writable)
            .custom_flags(flags)
            .open(&path)
    };
    // Only the owner of a file may read it without a trace.
    match open(direct | libc::O_NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(direct),
        result => result,
    }
}

pub(super) fn set_direct(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(fd)?;
    if flags.contains(OFlags::DIRECT) != on {
        flags.set(OFlags::DIRECT, on);
        rustix::fs::fcntl_setfl(fd, flags)?;
    }
    Ok(())
}

/// What the file system says that direct I/O demands; where it does not say,
/// what is found by trying.
fn alignment_of(file: &File, kind: Kind) -> io::Result<Alignment> {
    // Not in rustix's set of names; since Linux 6.1.
    let wanted = StatxFlags::from_bits_retain(libc::STATX_DIOALIGN);
    let refused = || io::Error::from(Errno::OPNOTSUPP);
    if let Ok(stat) = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted)
        && stat.stx_mask & libc::STATX_DIOALIGN != 0
    {
        let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        return Alignment::usable(memory, offset).ok_or_else(refused);
    }
    if kind.is_in_memory() {
        return Ok(Alignment::NONE);
    }
    find_alignment(file)
}

fn find_alignment(file: &File) -> io::Result<Alignment> {
    const LARGEST: Alignment = Alignment {
        memory: BUFFER_ALIGNMENT,
        offset: 4096,
    };
    const SMALLEST: Alignment = Alignment {
        memory: 512,
        offset: 512,
    };
    // Reads beyond the end succeed whatever their alignment.
    if file.metadata()?.len() < u64::from(2 * LARGEST.offset) {
        return Ok(LARGEST);
    }
    match try_read(file, SMALLEST) {
        Ok(()) => Ok(SMALLEST),
        Err(error) if is_refusal_of_direct(&error) => Ok(LARGEST),
        Err(error) => Err(error),
    }
}

/// Reads with this alignment and no better one. Errors that have nothing to do
/// with direct I/O are left to those whom they concern.
fn try_read(file: &File, alignment: Alignment) -> io::Result<()> {
    let (memory, offset) = (alignment.memory as usize, alignment.offset as usize);
    let mut bytes = AlignedBuf::new(BUFFER_ALIGNMENT as usize);
    bytes.resize(memory + offset, 0);
    match file.read_at(&mut bytes[memory..], offset as u64) {
        Err(error) if is_refusal_of_direct(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn direct_io_needs_an_alignment_that_our_memory_has() {
        for (memory, offset) in [(1, 1), (4, 512), (512, 512), (4096, 65536)] {
            assert_eq!(
                Alignment::usable(memory, offset),
                Some(Alignment { memory, offset })
            );
        }
        for (memory, offset) in [
            (0, 0),
            (0, 512),
            (512, 0),
            (8192, 512),
            (3, 512),
            (512, 600),
        ] {
            assert_eq!(Alignment::usable(memory, offset), None);
        }
    }

    #[test]
    fn transfers_start_and_end_where_they_may() {
        let alignment = Alignment {
            memory: 4,
            offset: 512,
        };
        for (value, floor, ceil) in [(0, 0, 0), (1, 0, 512), (511, 0, 512), (512, 512, 512)] {
            assert_eq!(alignment.floor(value), floor);
            assert_eq!(alignment.ceil(value), ceil);
            assert_eq!(alignment.beyond(value), value - floor);
            assert_eq!(alignment.fits(value), floor == ceil);
        }
        assert!(alignment.fits_memory(4, 512) && alignment.fits_memory(8, 1024));
        assert!(!alignment.fits_memory(2, 512) && !alignment.fits_memory(4, 8));
    }

    #[test]
    fn where_the_file_system_does_not_say_it_what_direct_reads_need_is_found_by_trying() {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        let folder = tempfile::tempdir_in(target).expect("a folder");
        let path = folder.path().join("image");
        let found = |len: usize| {
            std::fs::write(&path, vec![1; len]).expect("write");
            let open = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(&path);
            let file = open.expect("direct I/O");
            (
                find_alignment(&file).expect("tried"),
                alignment_of(&file, Kind::of(&file)),
            )
        };
        // What the file system says has nothing to do with what is in the file.
        let said_of_long = found(1 << 20).1.expect("this file system says it");
        // Too short to tell.
        for len in [0, 4096, 8191] {
            let (found, said) = found(len);
            assert_eq!((found.memory, found.offset), (4096, 4096), "{len}");
            assert_eq!(said.expect("it says it"), said_of_long, "{len}");
        }
        for len in [8192, 1 << 20] {
            let (found, said) = found(len);
            let said = said.expect("this file system says it");
            assert!([512, 4096].contains(&found.offset), "{found:?}");
            assert!(found.offset >= said.offset, "{found:?} {said:?}");
            assert_eq!(
                found.offset == 512,
                said.offset <= 512,
                "{found:?} {said:?}"
            );
        }
    }

    #[test]
    fn a_read_that_fails_for_another_reason_says_nothing_of_direct_io() {
        let alignment = Alignment {
            memory: 512,
            offset: 512,
        };
        // Nothing is mapped at its start.
        let memory = File::open("/proc/self/mem").expect("open");
        let mut bytes = [0; 512];
        let error = memory
            .read_at(&mut bytes, 512)
            .expect_err("nothing is there");
        assert!(!is_refusal_of_direct(&error));
        assert!(try_read(&memory, alignment).is_ok());
    }
}
