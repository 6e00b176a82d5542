//! The name under which a file was opened for writing last, kept with the file.
//!
//! By it a process knows whether the file is what another one has left that was killed:
//! see [`Disk::set_opening`](super::Disk::set_opening).

use std::fs::File;
use std::io;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

/// The extended attribute.
const ATTRIBUTE: &str = "user.ploop.opening";

/// The name of no opening.
pub const NO_OPENING: u64 = 0;

/// Of an opening; nobody has had it.
pub fn new_opening() -> u64 {
    let (name, _) = uuid::Uuid::new_v4().as_u64_pair();
    name.max(NO_OPENING + 1)
}

/// The name that the file has. `None` if it has none, or can have none.
///
/// # Errors
/// Any of `fgetxattr(2)` but that there is none.
pub fn opening(file: &File) -> io::Result<Option<u64>> {
    let mut bytes = [0; size_of::<u64>()];
    match rustix::fs::fgetxattr(file, ATTRIBUTE, &mut bytes) {
        Ok(len) if len == bytes.len() => Ok(Some(u64::from_le_bytes(bytes))),
        // Another length: not ours.
        Ok(_) | Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether the file can have one, as far as can be seen.
pub fn can_be_named(file: &File) -> bool {
    let mut bytes = [0; size_of::<u64>()];
    let found = rustix::fs::fgetxattr(file, ATTRIBUTE, &mut bytes);
    matches!(found, Ok(_) | Err(Errno::NODATA | Errno::RANGE))
}

/// Gives the file a name.
///
/// # Errors
/// `Unsupported` where the file system keeps no attributes; any of `fsetxattr(2)`.
pub fn set_opening(file: &File, name: u64) -> io::Result<()> {
    rustix::fs::fsetxattr(file, ATTRIBUTE, &name.to_le_bytes(), XattrFlags::empty())?;
    Ok(())
}

/// Gives the file another name if it has one: nobody who has had it open may go on with
/// what he knows of it.
///
/// # Errors
/// Any of `fgetxattr(2)` and `fsetxattr(2)`.
pub fn rename_opening(file: &File) -> io::Result<()> {
    match opening(file)? {
        None | Some(NO_OPENING) => Ok(()),
        Some(_) => set_opening(file, new_opening()),
    }
}
