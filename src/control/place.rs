//! Where a running disk is asked by whoever knows its image.
//!
//! In a run-time folder of the host each process has a folder of its own, named by the
//! file that it serves when it begins, with its control socket in it: `DEVICE-INODE/control`. A folder
//! for each, since a process may remove what is in the folder of its socket. Nobody makes
//! the run-time folder but whoever sets up the host: without it there are no such sockets.

use std::env;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid, chownat, mkdirat};
use rustix::io::Errno;

use super::asker::Asker;
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

fn socket_in(folder: &Path, file: &Metadata) -> PathBuf {
    folder.join(file_id(file)).join("control")
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
    let socket = socket_in(&folder, &top.file.metadata()?);
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
    let place = |entry: fs::DirEntry| Place {
        file_id: entry.file_name().to_string_lossy().into_owned(),
        socket: entry.path().join("control"),
    };
    let places = entries.flatten().map(place);
    places.filter(|place| place.socket.exists()).collect()
}

/// The control socket of the process that serves the disk at `path`, if there is one where
/// it would be.
///
/// # Errors
/// Whatever keeps the disk from being looked at.
pub fn find(path: &Path) -> Result<Option<PathBuf>, ImageError> {
    let image = image::open(path, OpenMode::new(Access::Read).force_share(true))?;
    let files = image.files.iter().rev();
    let files: Vec<_> = files.filter_map(|file| file.file.metadata().ok()).collect();
    let Some((top, lower)) = files.split_first() else {
        return Ok(None);
    };
    let of = |file: &Metadata| -> Vec<PathBuf> {
        let sockets = folders().into_iter().map(|folder| socket_in(&folder, file));
        sockets.filter(|socket| socket.exists()).collect()
    };
    if let Some(socket) = of(top).into_iter().next() {
        return Ok(Some(socket));
    }
    // A process that has made snapshots since it began is where the top was then.
    let top = file_id(top);
    let serves = |socket: &PathBuf, patience: Duration| {
        let asker = Asker::connect_within(socket, patience);
        let engine = asker.and_then(|mut asker| asker.ask("query-engine"));
        engine.is_ok_and(|engine| engine["file-id"] == top)
    };
    let mut lower = lower.iter().flat_map(of);
    if let Some(socket) = lower.find(|socket| serves(socket, Asker::PATIENCE)) {
        return Ok(Some(socket));
    }
    // If that file has been deleted since, its name leads nowhere, and all have to be asked.
    let mut sockets = all().into_iter().map(|place| place.socket);
    Ok(sockets.find(|socket| serves(socket, STRANGER_PATIENCE)))
}
