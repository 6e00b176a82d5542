//! What host file systems are like, where that cannot be found out by asking for
//! something and being refused.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, SeekFrom, Statx, StatxFlags};
use rustix::io::Errno;

use super::AlignedBuf;

/// `f_type` of `statfs(2)`, from the kernel's `magic.h` and the file systems'
/// own headers.
mod magic {
    pub const RAMFS: u32 = 0x8584_58f6;
    pub const TMPFS: u32 = 0x0102_1994;
    pub const FUSE: u32 = 0x6573_5546;
    pub const NFS: u32 = 0x6969;
    pub const CEPH: u32 = 0x00c3_6400;
    pub const SMB2: u32 = 0xfe53_4d42;
    pub const CIFS: u32 = 0xff53_4d42;
    pub const GFS2: u32 = 0x0116_1970;
    pub const OCFS2: u32 = 0x7461_636f;
    pub const V9FS: u32 = 0x0102_1997;
    pub const LUSTRE: u32 = 0x0bd0_0bd0;
    pub const GPFS: u32 = 0x4750_4653;
}

/// The kind of file system that a file lies in. Where a server is behind it, to find that out
/// takes a question to the server: who wants to know more than one thing asks once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(u32);

impl Kind {
    /// A file system that does not say is taken for FUSE: it is somebody else's
    /// program or server that fails to answer, and what is done there is safe everywhere.
    pub fn of(file: impl AsFd) -> Self {
        // The numbers have 32 bits; the field has more, and a sign, on most machines.
        Self(rustix::fs::fstatfs(file).map_or(magic::FUSE, |stat| stat.f_type as u32))
    }

    /// The same of what has a name now.
    pub fn at(path: &std::path::Path) -> Self {
        Self(rustix::fs::statfs(path).map_or(magic::FUSE, |stat| stat.f_type as u32))
    }

    /// Whether the file lies in memory and not on any device.
    pub fn is_in_memory(self) -> bool {
        matches!(self.0, magic::RAMFS | magic::TMPFS)
    }

    /// Whether a program in user space, as GlusterFS's or Ceph's client, is the file
    /// system, or may be.
    pub fn is_fuse(self) -> bool {
        self.0 == magic::FUSE
    }

    /// Whether a write-back that failed may be told to one description alone: the one that the
    /// write was made by, or the first that asks. So it is where a program has each description
    /// as a handle of its own (FUSE, 9P), and with Lustre, which keeps the error with the inode
    /// and forgets it when any description is closed (`ll_flush`, `ll_file_release`). The file
    /// systems that are part of Linux tell each description that was open at the time
    /// (`errseq_t`); GPFS counts as one of them, though nobody outside can see what it does.
    pub fn tells_lost_writes_once(self) -> bool {
        matches!(self.0, magic::FUSE | magic::V9FS | magic::LUSTRE)
    }

    /// Whether `fdatasync(2)` makes the length of a file stable, as POSIX has it. Ceph's client
    /// keeps the length to itself until `fsync(2)` (`Client::_fsync`; `ceph_fsync` of the
    /// kernel's). If it is cut off or dies before, the server looks where the data ends: a new
    /// cluster whose rest was never written is cut there. Any program in user space may do the
    /// same.
    pub fn keeps_length_with_data(self) -> bool {
        !matches!(self.0, magic::FUSE | magic::CEPH)
    }

    /// Whether others than this host may change the file, so that this host's page
    /// cache can be out of date. A program in user space counts as that, too: what it
    /// tells the kernel to keep is its own affair.
    pub fn may_be_shared(self) -> bool {
        matches!(
            self.0,
            magic::FUSE
                | magic::NFS
                | magic::CEPH
                | magic::SMB2
                | magic::CIFS
                | magic::GFS2
                | magic::OCFS2
                | magic::V9FS
                | magic::LUSTRE
                | magic::GPFS
        )
    }
}

/// See [`Kind::is_fuse`].
pub fn is_fuse(file: impl AsFd) -> bool {
    Kind::of(file).is_fuse()
}

/// See [`Kind::keeps_length_with_data`].
pub fn keeps_length_with_data(file: impl AsFd) -> bool {
    Kind::of(file).keeps_length_with_data()
}

/// See [`Kind::may_be_shared`].
pub fn may_be_shared(file: impl AsFd) -> bool {
    Kind::of(file).may_be_shared()
}

/// Whether Ceph is the file system, in the kernel or by its client in user space. That one
/// tells by an attribute that each of its files has.
pub fn is_ceph(file: impl AsFd) -> bool {
    let mut layout = [0; 256];
    let mut has_layout = || rustix::fs::fgetxattr(&file, "ceph.file.layout", &mut layout).is_ok();
    match Kind::of(&file).0 {
        magic::CEPH => true,
        magic::FUSE => has_layout(),
        _ => false,
    }
}

/// Bit of `statx(2)`'s flags: ask the server, where there is one.
const FORCE_SYNC: u32 = libc::AT_STATX_FORCE_SYNC as u32;

/// What is known of an open file where it is kept, and not only in this host's
/// cache.
///
/// # Errors
/// Any of `statx(2)`.
pub fn stat_now(file: impl AsFd) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::from_bits_retain(FORCE_SYNC);
    Ok(rustix::fs::statx(file, "", flags, StatxFlags::BASIC_STATS)?)
}

/// The same of what has a name now.
///
/// # Errors
/// Any of `statx(2)`.
pub fn stat_path_now(path: &std::path::Path) -> io::Result<Statx> {
    let flags = AtFlags::from_bits_retain(FORCE_SYNC);
    let cwd = rustix::fs::CWD;
    Ok(rustix::fs::statx(
        cwd,
        path,
        flags,
        StatxFlags::BASIC_STATS,
    )?)
}

/// The length of an open file in bytes, as [`stat_now`].
///
/// # Errors
/// Any of `statx(2)`.
pub fn len_now(file: impl AsFd) -> io::Result<u64> {
    Ok(stat_now(file)?.stx_size)
}

/// How many bytes [`len_to_set`] leaves behind the end that a file was to get, where a cut
/// there could take what is in front of it: a block, zeroed.
pub const KEPT_TAIL: u64 = 4096;

/// Shards are so large at least, in bytes, and made of whole units: `features.shard-block-size`
/// is given in MB, which are MiB.
const SHARD_MIN: u64 = 4 << 20;
const SHARD_UNIT: u64 = 1 << 20;

/// Whether the file is kept in pieces by GlusterFS (`features.shard`), as far as can be
/// told from here: the file system is a program, and it refuses to look for data.
pub fn keeps_shards(file: impl AsFd) -> bool {
    is_fuse(&file) && rustix::fs::seek(&file, SeekFrom::Data(0)) == Err(Errno::OPNOTSUPP)
}

/// How long a file is to be made that should be `len` bytes long: more where a cut to
/// there could take what is in front of it. What is behind `len` then has to be overwritten
/// with [`zeroed_tail`]: it was somebody's, and must not come to light when the file grows.
/// `known_len` is a length that it is known to have, whatever the server says.
///
/// GlusterFS's shards lose data: of a file that is cut to the very end of a shard, the
/// last shard that should stay is made empty, so that up to 64 MiB in front of the cut
/// read as zeros (`shard_truncate_last_shard` cuts it to the remainder of length and shard
/// size, which is 0; seen with 10.3, and the source of 11.1 and later is the same). Nobody
/// tells how large shards are. So such a file keeps a tail wherever a shard may end.
///
/// # Errors
/// Any of `statx(2)`.
pub fn len_to_set(file: &File, len: u64, known_len: u64) -> io::Result<u64> {
    let may_end_shard = len >= SHARD_MIN && len.is_multiple_of(SHARD_UNIT);
    let is_cut = || Ok::<_, io::Error>(len_now(file)?.max(known_len) > len);
    if may_end_shard && keeps_shards(file) && is_cut()? {
        Ok(len + KEPT_TAIL)
    } else {
        Ok(len)
    }
}

/// [`KEPT_TAIL`] zeros.
pub fn zeroed_tail() -> AlignedBuf {
    AlignedBuf::from_slice(KEPT_TAIL as usize, &[0; KEPT_TAIL as usize])
}

/// Makes a file that is not used around the page cache `len` bytes long, or a little more
/// ([`len_to_set`]).
///
/// # Errors
/// Any of `statx(2)`, `ftruncate(2)` and `pwrite(2)`.
pub fn set_len(file: &File, len: u64) -> io::Result<()> {
    let end = len_to_set(file, len, 0)?;
    file.set_len(end)?;
    if end > len {
        file.write_all_at(&zeroed_tail(), len)?;
    }
    Ok(())
}

/// Where the first data at or behind `offset` begins and ends; `None` behind the last.
///
/// # Errors
/// Any of `lseek(2)`; see [`refuses_seek`].
pub fn next_data(file: &File, offset: u64) -> Result<Option<Range<u64>>, Errno> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        // Beyond the last data, or beyond the end.
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    match rustix::fs::seek(file, SeekFrom::Hole(start)) {
        Ok(end) => Ok(Some(start..end)),
        // Cut off in between.
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Whether this is what those answer that know no `SEEK_DATA`: GlusterFS with shards
/// `EOPNOTSUPP`, block devices and others `EINVAL`. Then all may be data.
pub fn refuses_seek(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(not(ploop_loom))]
    use crate::storage::one_file_fs::{Answers, OneFileFs};

    #[test]
    #[cfg(not(ploop_loom))]
    fn what_a_program_serves_may_change_behind_the_cache() {
        let Some(served) = OneFileFs::mount() else {
            return;
        };
        let file = File::open(served.path()).unwrap();
        let kind = Kind::of(&file);
        assert!(kind.is_fuse() && kind.may_be_shared() && !kind.is_in_memory());
        assert!(kind.tells_lost_writes_once());
    }

    #[test]
    #[cfg(not(ploop_loom))]
    fn what_does_not_say_what_it_is_is_taken_for_a_program() {
        let Some(served) = OneFileFs::mount() else {
            return;
        };
        let file = File::open(served.path()).unwrap();
        served.answer(Answers {
            statfs: Some(fuser::Errno::ENOSYS),
            ..Answers::default()
        });
        assert!(rustix::fs::fstatfs(&file).is_err());
        let kind = Kind::of(&file);
        assert!(kind.is_fuse() && kind.may_be_shared() && !kind.is_in_memory());
        assert!(kind.tells_lost_writes_once());
    }

    #[test]
    fn what_tells_lost_writes_once_is_known_by_its_number() {
        for magic in [magic::FUSE, magic::V9FS, magic::LUSTRE] {
            assert!(Kind(magic).tells_lost_writes_once(), "{magic:#x}");
        }
        for magic in [magic::TMPFS, magic::NFS, magic::CEPH, magic::SMB2] {
            assert!(!Kind(magic).tells_lost_writes_once(), "{magic:#x}");
        }
    }

    #[test]
    fn file_systems_are_told_from_each_other() {
        let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let memory = Kind::of(&memory);
        assert_eq!(memory, Kind(magic::TMPFS));
        assert!(memory.is_in_memory() && !memory.is_fuse() && !memory.may_be_shared());
        let kernels_own = File::open("/proc/version").unwrap();
        let kernels_own = Kind::of(&kernels_own);
        assert!(!kernels_own.is_in_memory() && !kernels_own.is_fuse());
        assert!(!memory.tells_lost_writes_once() && !kernels_own.tells_lost_writes_once());
    }
}
