//! Who the process is, and what it may do because of that.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use rustix::fs::AtFlags;
use rustix::process::{DumpableBehavior, Resource};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::format::Descriptor;
use crate::storage::HostFile;

/// Who to be once the image is open. Nobody else, by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunAs {
    /// The number of the user.
    pub user: Option<u32>,
    /// The number of the group: the only one from then on.
    pub group: Option<u32>,
}

impl RunAs {
    /// Whether this is somebody else.
    pub fn is_other(self) -> bool {
        self != Self::default()
    }

    /// Becomes that user. With the number goes everything that root could do.
    pub(super) fn apply(self) -> io::Result<()> {
        if let Some(group) = self.group {
            setgroups(&[])?;
            setgid(Gid::from_raw(group))?;
        }
        if let Some(user) = self.user {
            setuid(Uid::from_raw(user))?;
        }
        Ok(())
    }
}

/// Whether permissions alone, without a capability, let this process open the files
/// again and remove its sockets.
pub(super) fn are_all_ours(files: &[HostFile], folders: &[PathBuf]) -> bool {
    let us = rustix::process::geteuid().as_raw();
    let is_ours = |owner: io::Result<u32>| owner.is_ok_and(|owner| owner == us);
    let files = files
        .iter()
        .map(|file| file.file.metadata().map(|it| it.uid()));
    let folders = folders
        .iter()
        .map(|folder| folder.metadata().map(|it| it.uid()));
    files.chain(folders).all(is_ours)
}

/// Keeps those of these capabilities that the process has: to reach files of somebody
/// else where permissions would not let it, to give the socket away, and to have rings
/// whose memory nobody counts, where that could not be had by lifting the limit.
pub(super) fn drop_capabilities(own: bool, gives_socket_away: bool) -> io::Result<()> {
    let mut kept = CapabilitySet::empty();
    if !own {
        kept |= CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER;
    }
    if gives_socket_away {
        kept |= CapabilitySet::CHOWN;
    }
    if rustix::process::getrlimit(Resource::Memlock)
        .maximum
        .is_some()
    {
        // The rings of all processes of the user would count.
        kept |= CapabilitySet::IPC_LOCK;
    }
    keep(kept)
}

/// Those that it takes to replace files in this folder by new ones of the same owner, where
/// permissions would not let this process.
pub(super) fn to_replace_in(folder: Option<&File>) -> io::Result<CapabilitySet> {
    let mut needed = CapabilitySet::empty();
    let Some(folder) = folder else {
        return Ok(needed);
    };
    let us = rustix::process::geteuid().as_raw();
    if folder.metadata()?.uid() != us {
        needed |= CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER;
    }
    let descriptor = rustix::fs::statat(folder, Descriptor::FILE_NAME, AtFlags::SYMLINK_NOFOLLOW)?;
    let ours = (us, rustix::process::getegid().as_raw());
    if (descriptor.st_uid, descriptor.st_gid) != ours {
        needed |= CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER | CapabilitySet::CHOWN;
    }
    Ok(needed)
}

/// What it takes to look at these files by their paths, where permissions would not let this
/// process pass through their folders.
pub(super) fn to_look_at(files: &[HostFile]) -> CapabilitySet {
    match are_all_ours(files, &[]) {
        true => CapabilitySet::empty(),
        false => CapabilitySet::DAC_READ_SEARCH,
    }
}

/// Keeps those of these capabilities that the calling thread has.
pub(super) fn keep(kept: CapabilitySet) -> io::Result<()> {
    let present = rustix::thread::capabilities(None)?;
    rustix::thread::clear_ambient_capability_set().or_else(ignore_unknown)?;
    let kept = present.permitted & kept;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: present.effective & kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

/// What a kernel does not know, it has not given.
fn ignore_unknown(errno: rustix::io::Errno) -> rustix::io::Result<()> {
    match errno {
        rustix::io::Errno::INVAL => Ok(()),
        errno => Err(errno),
    }
}

/// Other processes of the same user cannot look into this one any more, and there is
/// no core dump, in which the guest's memory would be.
pub(super) fn hide() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}
