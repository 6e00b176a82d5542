//! Where a running disk is asked by whoever knows its image.
//!
//! In a run-time folder of the host each process has a folder of its own, named by the
//! file that it serves when it begins, with its control socket in it: `DEVICE-INODE/control`, or
//! `DEVICE-INODE.2/control` if another process serves the same file. A folder
//! for each, since a process may remove what is in the folder of its socket. Nobody makes
//! the run-time folder but whoever sets up the host: without it there are no such sockets.

use std::env;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid, chownat, mkdirat, unlinkat};
use rustix::io::Errno;

use super::asker::{AskError, Asker};
use super::reach::connect_in_time;
use super::sandbox::RunAs;
use crate::image::{self, Access, ImageError, OpenMode};
use crate::storage::HostFile;

/// Of the whole host.
const HOST: &str = "/run/vhost-user-ploop";

/// Names another one.
const VARIABLE: &str = "PLOOP_RUNTIME_DIR";

/// In which a user's programs have theirs.
const OF_USER: &str = "XDG_RUNTIME_DIR";

/// How long a process may take to answer that most likely serves another disk.
const STRANGER_PATIENCE: Duration = Duration::from_secs(1);

/// Where sockets may be, the place where they are made first.
fn folders() -> Vec<PathBuf> {
    let named = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty());
    if let Some(folder) = named(VARIABLE) {
        return vec![folder.into()];
    }
    let is_root = rustix::process::geteuid().is_root();
    let of_user = named(OF_USER).filter(|_| !is_root);
    let of_user = of_user.map(|folder| Path::new(&folder).join("vhost-user-ploop"));
    of_user.into_iter().chain([HOST.into()]).collect()
}

/// What a file is called whatever its path: `DEVICE-INODE`, in hexadecimal.
pub fn file_id(file: &Metadata) -> String {
    format!("{:x}-{:x}", file.dev(), file.ino())
}

/// Processes that serve the same file, for reading most likely, which have a socket each.
const MAX_NUMBER: u32 = 16;

/// Where the sockets of processes that serve a file may be: the first one, and those of others
/// that came while it was there.
fn sockets_in(folder: &Path, file: &Metadata) -> impl Iterator<Item = PathBuf> + use<> {
    let (folder, id) = (folder.to_owned(), file_id(file));
    (1..=MAX_NUMBER).map(move |number| {
        let name = match number {
            1 => id.clone(),
            number => format!("{id}.{number}"),
        };
        folder.join(name).join("control")
    })
}

/// Whether somebody listens there.
fn is_taken(socket: &Path) -> bool {
    !matches!(
        connect_in_time(socket, Duration::ZERO),
        Err(error) if error.kind() != io::ErrorKind::TimedOut
    )
}

/// Where the control socket of a process that serves these files is to be made; `None` if
/// the host has no place for it. The folder is there then.
///
/// # Errors
/// Any of `mkdir(2)` and `chown(2)`.
pub(super) fn make(files: &[HostFile], run_as: RunAs) -> io::Result<Option<PathBuf>> {
    let (Some(top), Some(folder)) = (files.last(), folders().into_iter().find(|it| it.is_dir()))
    else {
        return Ok(None);
    };
    remove_left_over(&folder);
    let mut sockets = sockets_in(&folder, &top.file.metadata()?);
    let Some(socket) = sockets.find(|socket| !is_taken(socket)) else {
        return Ok(None);
    };
    let own = super::upgrade::folder_of(&socket);
    match mkdirat(CWD, &own, Mode::RWXU) {
        // Of a process that has served it before, maybe as somebody else.
        Err(Errno::EXIST) if fs::symlink_metadata(&own)?.is_dir() => {}
        made => made?,
    }
    if run_as.is_other() {
        let (user, group) = (
            run_as.user.map(Uid::from_raw),
            run_as.group.map(Gid::from_raw),
        );
        chownat(CWD, &own, user, group, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(Some(socket))
}

/// Since when a folder has to be empty for nobody to be about to make his socket in it.
const LEFT_FOR: Duration = Duration::from_secs(60);

/// Removes folders of processes that have ended. They cannot do so themselves: who is confined
/// can remove what is in its folder, and nothing beside it.
fn remove_left_over(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // Others may have folders there, and want them empty.
        if !is_name_of_folder(&entry.file_name().to_string_lossy()) {
            continue;
        }
        let changed = entry.metadata().and_then(|metadata| metadata.modified());
        let age = changed.ok().and_then(|changed| changed.elapsed().ok());
        if age.is_some_and(|age| age >= LEFT_FOR) {
            // Of one that lives it is not empty.
            let _ = unlinkat(CWD, entry.path(), AtFlags::REMOVEDIR);
        }
    }
}

/// Whether a folder of this name is one that [`make`] has made: `fe00-20d3` or `fe00-20d3.2`.
fn is_name_of_folder(name: &str) -> bool {
    let (id, number) = match name.split_once('.') {
        Some((id, number)) => (id, Some(number)),
        None => (name, None),
    };
    let is_hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_id = id
        .split_once('-')
        .is_some_and(|(device, inode)| is_hex(device) && is_hex(inode));
    is_id && number.is_none_or(|number| number.parse::<u8>().is_ok())
}

/// Where a running disk is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// See [`file_id`].
    pub file_id: String,
    /// Somebody listens there, or has.
    pub socket: PathBuf,
}

/// All that there are on this host, as far as the caller may look.
pub fn all() -> Vec<Place> {
    let entries = folders().into_iter().flat_map(fs::read_dir).flatten();
    let place = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        Place {
            file_id: name.split('.').next().unwrap_or_default().to_owned(),
            socket: entry.path().join("control"),
        }
    };
    let places = entries.flatten().map(place);
    places.filter(|place| place.socket.exists()).collect()
}

/// The control socket of the process that serves the disk at `path`, if there is one where
/// it would be. If nobody else turns out to be that process, it is one that does not answer, or
/// cannot be asked.
///
/// # Errors
/// Whatever keeps the disk from being looked at.
pub fn find(path: &Path) -> Result<Option<PathBuf>, ImageError> {
    find_of(path, false)
}

/// The same for who looks for it again and again, and sees himself what he has found: of sockets
/// that are named by the disk's file the first one will do.
///
/// # Errors
/// See [`find`].
pub fn find_likely(path: &Path) -> Result<Option<PathBuf>, ImageError> {
    find_of(path, true)
}

fn find_of(path: &Path, will_any_do: bool) -> Result<Option<PathBuf>, ImageError> {
    let image = image::open(path, OpenMode::new(Access::Read).force_share(true))?;
    let files = image.files.iter().rev();
    let files: Vec<_> = files.filter_map(|file| file.file.metadata().ok()).collect();
    let Some((top, lower)) = files.split_first() else {
        return Ok(None);
    };
    let of = |file: &Metadata| -> Vec<PathBuf> {
        let sockets = folders().into_iter().flat_map(|it| sockets_in(&it, file));
        sockets.filter(|socket| socket.exists()).collect()
    };
    let own = of(top);
    if will_any_do && let Some(socket) = own.first() {
        return Ok(Some(socket.clone()));
    }
    let top = file_id(top);
    let mut last_resort = None;
    for socket in own {
        match serves(&socket, &top, Asker::PATIENCE) {
            Ok(true) => return Ok(Some(socket)),
            // Its disk has another top meanwhile, and this one may be another's.
            Ok(false) => {}
            // It has ended, or is of somebody else; what it is then is to be told.
            Err(AskError::Connect { .. }) => last_resort = last_resort.or(Some(socket)),
            Err(_) => return Ok(Some(socket)),
        }
    }
    // A process that has made snapshots since it began is where the top was then.
    let is_it =
        |socket: &PathBuf, patience| serves(socket, &top, patience).is_ok_and(|is_it| is_it);
    let mut lower = lower.iter().flat_map(of);
    if let Some(socket) = lower.find(|socket| is_it(socket, Asker::PATIENCE)) {
        return Ok(Some(socket));
    }
    // If that file has been deleted since, its name leads nowhere, and all have to be asked.
    let mut sockets = all().into_iter().map(|place| place.socket);
    let found = sockets.find(|socket| is_it(socket, STRANGER_PATIENCE));
    Ok(found.or(last_resort))
}

/// Whether who listens there serves the disk whose top is this file.
fn serves(socket: &Path, top: &str, patience: Duration) -> Result<bool, AskError> {
    let mut asker = Asker::connect_within(socket, patience)?;
    let engine = asker.ask("query-engine")?;
    Ok(engine["file-id"] == top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_of_such_processes_are_called_so() {
        for name in ["fe00-20d3", "fe00-20d3.2", "0-1.16"] {
            assert!(is_name_of_folder(name), "{name}");
        }
        for name in [
            "sshd",
            "web1",
            "fe00",
            "fe00-",
            "-1",
            "fe00-20d3.x",
            "fe00-20d3.",
            "vm-2",
            "",
        ] {
            assert!(!is_name_of_folder(name), "{name}");
        }
    }
}
