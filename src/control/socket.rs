//! A listening socket: made at a path or an address, or inherited as a descriptor.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, chmodat, chownat, linkat, unlinkat};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use thiserror::Error;

/// Front-ends that may wait to be accepted, as many as the library's sockets have.
const BACKLOG: i32 = 128;

/// Why there is no socket to listen on.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody else listens there.
    #[error("cannot listen on {}: another process listens there", .0.display())]
    InUse(PathBuf),
    /// It is not for us to remove.
    #[error("cannot listen on {}: the path exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Any of `socket(2)`, `bind(2)`, `chown(2)`, `link(2)`, `unlink(2)`.
    #[error("cannot listen on {}", path.display())]
    Make {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Any of `socket(2)`, `bind(2)`, `listen(2)`.
    #[error("cannot listen on {address}")]
    Address {
        /// As given.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// It is closed, or not a socket.
    #[error("descriptor {fd} is not an open socket")]
    BadDescriptor {
        /// As given.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
    /// A TCP socket, for example, where a front-end is to connect.
    #[error("descriptor {0} is not a stream socket of the right domain")]
    WrongKind(RawFd),
    /// A connected one, most likely.
    #[error(
        "descriptor {0} is a socket, but not a listening one; pass the listening socket, not a connection"
    )]
    NotListening(RawFd),
}

/// Who may connect to a socket that is made at a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// The permission bits, or those that the umask leaves.
    pub mode: Option<u32>,
    /// The group, or this process's own.
    pub group: Option<u32>,
}

impl SocketAccess {
    /// As any other file that this process makes.
    pub const BY_UMASK: Self = Self {
        mode: None,
        group: None,
    };

    /// For its own user, and root.
    pub const PRIVATE: Self = Self {
        mode: Some(0o600),
        group: None,
    };
}

/// A socket to accept others on. One that was made at a path is removed when this is
/// dropped.
#[derive(Debug)]
pub struct ServerSocket {
    /// Does not block: another process may accept on it as well.
    listener: OwnedFd,
    /// Removed when it is dropped.
    made: Option<MadeFile>,
}

impl ServerSocket {
    /// Makes a socket at `path`. One that a dead process has left there is
    /// replaced; one that somebody listens on, or another kind of file, is not.
    ///
    /// Connecting takes the permission to write, as `access` says.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Make {
            path: path.to_owned(),
            source,
        };
        let make = || match access {
            SocketAccess::BY_UMASK => UnixListener::bind(path),
            _ => bind_with(path, access),
        };
        let listener = match make() {
            Err(error) if is_taken(&error) => {
                remove_stale(path)?;
                make()
            }
            result => result,
        };
        let listener = listener.map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            listener: listener.into(),
            made: Some(MadeFile::at(path).map_err(failed)?),
        })
    }

    /// Makes a socket that programs reach by network. Returns the address as well: the
    /// kernel chooses where the port is 0.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind_tcp(address: SocketAddr) -> Result<(Self, SocketAddr), SocketError> {
        let failed = |source| SocketError::Address { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let socket = Self {
            listener: listener.into(),
            made: None,
        };
        Ok((socket, bound))
    }

    /// Takes over a listening socket that was inherited as descriptor `fd`.
    ///
    /// # Errors
    /// See [`SocketError`].
    ///
    /// # Safety
    /// Nothing else in this process may own or close the descriptor.
    pub unsafe fn from_inherited(fd: RawFd) -> Result<Self, SocketError> {
        let bad = |error: Errno| SocketError::BadDescriptor {
            fd,
            source: error.into(),
        };
        if fd < 0 {
            return Err(bad(Errno::BADF));
        }
        // SAFETY: the caller says that it is ours, if it is open. If it is not,
        // the next call says so before anything is done with it.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        check_listener(borrowed, &UNIX)?;
        fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(bad)?;
        // SAFETY: it is open, and the caller says that it is ours.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        let listener = UnixListener::from(owned);
        listener
            .set_nonblocking(true)
            .map_err(|source| SocketError::BadDescriptor { fd, source })?;
        Ok(Self {
            listener: listener.into(),
            made: None,
        })
    }

    /// One that another process has listened on. `made` is removed in the end.
    pub(super) fn handed(listener: OwnedFd, made: Option<MadeFile>) -> Self {
        Self { listener, made }
    }

    /// Its file, if that is to be removed in the end and nobody else has done it.
    pub(super) fn made(&self) -> Option<&MadeFile> {
        self.made.as_ref().filter(|made| made.is_still_there())
    }

    /// Leaves its file to another process.
    pub(super) fn leave(&mut self) {
        if let Some(made) = self.made.take() {
            std::mem::forget(made);
        }
    }

    /// One that has connected. It blocks.
    ///
    /// # Errors
    /// `EAGAIN` if nobody has, or has any more; any other of `accept(2)`.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            match accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Err(Errno::INTR) => {}
                accepted => return Ok(accepted?),
            }
        }
    }
}

impl AsFd for ServerSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl AsRawFd for ServerSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

/// Where front-ends, control clients and other processes connect.
pub(super) const UNIX: [AddressFamily; 1] = [AddressFamily::UNIX];

/// Where metrics are asked for.
pub(super) const UNIX_OR_TCP: [AddressFamily; 3] = [
    AddressFamily::UNIX,
    AddressFamily::INET,
    AddressFamily::INET6,
];

/// That it is a socket of ours to accept on.
pub(super) fn check_listener(
    socket: BorrowedFd<'_>,
    domains: &[AddressFamily],
) -> Result<(), SocketError> {
    let fd = socket.as_raw_fd();
    let bad = |error: Errno| SocketError::BadDescriptor {
        fd,
        source: error.into(),
    };
    let domain = socket_domain(socket).map_err(bad)?;
    let kind = socket_type(socket).map_err(bad)?;
    if !domains.contains(&domain) || kind != SocketType::STREAM {
        return Err(SocketError::WrongKind(fd));
    }
    if !socket_acceptconn(socket).map_err(bad)? {
        return Err(SocketError::NotListening(fd));
    }
    Ok(())
}

/// Whether there is a file already, as `bind(2)` and `link(2)` say it.
fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists
    )
}

/// Makes a listening socket that appears at `path` with its mode and group in force:
/// it gets them under a private name, before it listens.
fn bind_with(path: &Path, access: SocketAccess) -> io::Result<UnixListener> {
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::from(Errno::INVAL))?;
    let folder = rustix::fs::open(
        folder,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let private = PrivateName::new(&folder);
    // An address has room for some 100 bytes, which the path may need for itself.
    let address = format!("/proc/self/fd/{}/{}", folder.as_raw_fd(), private.name);
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(address)?)?;
    if let Some(group) = access.group {
        let group = Some(Gid::from_raw(group));
        chownat(&folder, &private.name, None, group, AtFlags::empty())?;
    }
    if let Some(mode) = access.mode {
        let mode = Mode::from_raw_mode(mode);
        chmodat(&folder, &private.name, mode, AtFlags::empty())?;
    }
    listen(&socket, BACKLOG)?;
    linkat(&folder, &private.name, &folder, name, AtFlags::empty())?;
    Ok(UnixListener::from(socket))
}

/// A name in a folder for what is not ready to be seen. Removed on drop.
struct PrivateName<'a> {
    folder: &'a OwnedFd,
    name: String,
}

impl<'a> PrivateName<'a> {
    fn new(folder: &'a OwnedFd) -> Self {
        let name = format!(".{}", uuid::Uuid::new_v4());
        Self { folder, name }
    }
}

impl Drop for PrivateName<'_> {
    fn drop(&mut self) {
        // It need not have been made.
        let _ = unlinkat(self.folder, &self.name, AtFlags::empty());
    }
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |source: io::Error| SocketError::Make {
        path: path.to_owned(),
        source,
    };
    let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    // Not blocking, since a listener that is busy may have a full backlog.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|error| failed(error.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    match connect(probe.as_fd(), &address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(failed),
        Ok(()) | Err(Errno::AGAIN) => Err(SocketError::InUse(path.to_owned())),
        Err(error) => Err(failed(error.into())),
    }
}

/// A file that this process made. It is removed on drop unless it was replaced.
#[derive(Debug)]
pub(super) struct MadeFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl MadeFile {
    fn at(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(Self {
            // A process that takes over may be elsewhere.
            path: std::path::absolute(path)?,
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    /// One that another process has made.
    pub fn known(path: PathBuf, device: u64, inode: u64) -> Self {
        Self {
            path,
            device,
            inode,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode.
    pub fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    fn is_still_there(&self) -> bool {
        // Another process may have named it.
        std::fs::symlink_metadata(&self.path).is_ok_and(|now| {
            now.file_type().is_socket() && (now.dev(), now.ino()) == (self.device, self.inode)
        })
    }
}

impl Drop for MadeFile {
    fn drop(&mut self) {
        if self.is_still_there()
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use tempfile::TempDir;

    fn folder() -> (TempDir, PathBuf) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        (folder, path)
    }

    #[test]
    fn a_stale_socket_is_replaced_and_ours_removed() {
        let (_folder, path) = folder();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = ServerSocket::bind(&path, SocketAccess::BY_UMASK).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_stays() {
        let (_folder, path) = folder();
        let other = UnixListener::bind(&path).unwrap();
        let error = ServerSocket::bind(&path, SocketAccess::BY_UMASK).unwrap_err();
        assert!(matches!(error, SocketError::InUse(_)), "{error}");
        drop(other);
        assert!(path.exists());
    }

    #[test]
    fn other_files_stay() {
        let (_folder, path) = folder();
        std::fs::write(&path, "precious").unwrap();
        let error = ServerSocket::bind(&path, SocketAccess::BY_UMASK).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_replaced_ours_stays() {
        let (_folder, path) = folder();
        let socket = ServerSocket::bind(&path, SocketAccess::BY_UMASK).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn mode_and_group_are_in_force_when_the_socket_appears() {
        let folder = TempDir::new().unwrap();
        // As long as an address can be.
        let name = "s".repeat(107 - folder.path().as_os_str().len() - 1);
        let path = folder.path().join(name);
        let own_group = rustix::process::getegid().as_raw();
        let group = if rustix::process::geteuid().is_root() {
            own_group + 1
        } else {
            own_group
        };
        let access = SocketAccess {
            mode: Some(0o620),
            group: Some(group),
        };
        for _ in 0..2 {
            let socket = ServerSocket::bind(&path, access).unwrap();
            let metadata = std::fs::metadata(&path).unwrap();
            assert_eq!(metadata.mode() & 0o7777, 0o620);
            assert_eq!(metadata.gid(), group);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
            UnixStream::connect(&path).unwrap();
            let error = ServerSocket::bind(&path, access).unwrap_err();
            assert!(matches!(error, SocketError::InUse(_)), "{error}");
            // As if the process had died.
            std::mem::forget(socket.made);
            drop(socket.listener);
        }
        assert!(path.exists());
    }

    #[test]
    fn whoever_sees_the_socket_can_use_it_at_once() {
        let (_folder, path) = folder();
        let access = SocketAccess {
            mode: Some(0o600),
            group: None,
        };
        for _ in 0..20 {
            let watcher = std::thread::spawn({
                let path = path.clone();
                move || loop {
                    if let Ok(metadata) = std::fs::symlink_metadata(&path) {
                        let connected = UnixStream::connect(&path).map(drop);
                        return (metadata.mode() & 0o7777, connected);
                    }
                }
            });
            let socket = ServerSocket::bind(&path, access).unwrap();
            let (mode, connected) = watcher.join().unwrap();
            assert_eq!(mode, 0o600);
            connected.unwrap();
            drop(socket);
        }
    }

    #[test]
    fn only_a_listening_unix_socket_is_inherited() {
        use std::os::fd::IntoRawFd;
        let (_folder, path) = folder();
        let inherit = |fd: OwnedFd| {
            let fd = fd.into_raw_fd();
            // SAFETY: it was given up in the line above.
            unsafe { ServerSocket::from_inherited(fd) }
        };
        let listener = UnixListener::bind(&path).unwrap();
        let inherited = inherit(listener.into()).unwrap();
        UnixStream::connect(&path).unwrap();
        inherited.accept().unwrap();
        drop(inherited);
        assert!(path.exists(), "it was not made here");

        let (connected, _peer) = UnixStream::pair().unwrap();
        let error = inherit(connected.into()).unwrap_err();
        assert!(matches!(error, SocketError::NotListening(_)), "{error}");

        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        check_listener(tcp.as_fd(), &UNIX_OR_TCP).unwrap();
        let error = inherit(tcp.into()).unwrap_err();
        assert!(matches!(error, SocketError::WrongKind(_)), "{error}");
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let error = check_listener(udp.as_fd(), &UNIX_OR_TCP).unwrap_err();
        assert!(matches!(error, SocketError::WrongKind(_)), "{error}");

        let file = tempfile::tempfile().unwrap();
        let error = inherit(file.into()).unwrap_err();
        assert!(
            matches!(error, SocketError::BadDescriptor { .. }),
            "{error}"
        );
    }
}
