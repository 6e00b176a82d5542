//! The listening socket: made at a path, or inherited as a descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use thiserror::Error;

/// Why there is no socket to listen on.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody else listens there.
    #[error("{}: another process listens on this socket", .0.display())]
    InUse(PathBuf),
    /// It is not for us to remove.
    #[error("{}: this exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Any of `socket(2)`, `bind(2)`, `unlink(2)`.
    #[error("{}: the socket cannot be made", path.display())]
    Make {
        /// Where.
        path: PathBuf,
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
    /// A TCP socket, for example.
    #[error("descriptor {0} is not a stream socket of the Unix domain")]
    WrongKind(RawFd),
    /// A connected one, most likely.
    #[error("descriptor {0} is a socket, but not a listening one; connections are accepted here")]
    NotListening(RawFd),
}

/// A socket to accept front-ends on. One that was made at a path is removed when
/// this is dropped.
#[derive(Debug)]
pub struct ServerSocket {
    listener: UnixListener,
    /// Removed when it is dropped.
    _made: Option<MadeFile>,
}

impl ServerSocket {
    /// Makes a socket at `path`. One that a dead process has left there is
    /// replaced; one that somebody listens on, or another kind of file, is not.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Make {
            path: path.to_owned(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path)
            }
            result => result,
        };
        let listener = listener.map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            listener,
            _made: Some(MadeFile::at(path).map_err(failed)?),
        })
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
        let domain = socket_domain(borrowed).map_err(bad)?;
        let kind = socket_type(borrowed).map_err(bad)?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(SocketError::WrongKind(fd));
        }
        if !socket_acceptconn(borrowed).map_err(bad)? {
            return Err(SocketError::NotListening(fd));
        }
        fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(bad)?;
        // SAFETY: it is open, and the caller says that it is ours.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        let listener = UnixListener::from(owned);
        listener
            .set_nonblocking(true)
            .map_err(|source| SocketError::BadDescriptor { fd, source })?;
        Ok(Self {
            listener,
            _made: None,
        })
    }

    /// The socket. It does not block: another process may accept on it as well.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl AsRawFd for ServerSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
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
struct MadeFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl MadeFile {
    fn at(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    fn is_still_there(&self) -> bool {
        std::fs::symlink_metadata(&self.path)
            .is_ok_and(|now| (now.dev(), now.ino()) == (self.device, self.inode))
    }
}

impl Drop for MadeFile {
    fn drop(&mut self) {
        if self.is_still_there()
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!("{}: cannot be removed: {error}", self.path.display());
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
        let socket = ServerSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_stays() {
        let (_folder, path) = folder();
        let other = UnixListener::bind(&path).unwrap();
        let error = ServerSocket::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse(_)), "{error}");
        drop(other);
        assert!(path.exists());
    }

    #[test]
    fn other_files_stay() {
        let (_folder, path) = folder();
        std::fs::write(&path, "precious").unwrap();
        let error = ServerSocket::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_replaced_ours_stays() {
        let (_folder, path) = folder();
        let socket = ServerSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        UnixStream::connect(&path).unwrap();
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
        inherited.listener().accept().unwrap();
        drop(inherited);
        assert!(path.exists(), "it was not made here");

        let (connected, _peer) = UnixStream::pair().unwrap();
        let error = inherit(connected.into()).unwrap_err();
        assert!(matches!(error, SocketError::NotListening(_)), "{error}");

        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = inherit(tcp.into()).unwrap_err();
        assert!(matches!(error, SocketError::WrongKind(_)), "{error}");

        let file = tempfile::tempfile().unwrap();
        let error = inherit(file.into()).unwrap_err();
        assert!(
            matches!(error, SocketError::BadDescriptor { .. }),
            "{error}"
        );
    }
}
