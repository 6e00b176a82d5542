//! Which socket listens at a path, as the kernel knows it.
//!
//! A path and a descriptor that come from another process need not belong together, and
//! the path need not be that process's own. The descriptor tells only the socket's number,
//! and the path only its file; the kernel's list of sockets (`sock_diag(7)`) has both.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// A listening socket and its file.
#[derive(Debug)]
pub(super) struct Bound {
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
    /// The socket's own inode.
    socket: u64,
}

impl Bound {
    /// The one at this path. `None` if nobody listens there, for all that can be seen from
    /// this network namespace.
    ///
    /// # Errors
    /// Whatever keeps this process from asking.
    pub fn at(path: &Path) -> io::Result<Option<Self>> {
        let path = fs::canonicalize(path)?;
        let metadata = fs::symlink_metadata(&path)?;
        if !metadata.file_type().is_socket() {
            return Ok(None);
        }
        let file = (metadata.dev(), metadata.ino());
        let mut found = None;
        each_listener(|listener| {
            if listener.is_bound_to(file) {
                found = Some(listener.socket.into());
            }
        })?;
        Ok(found.map(|socket| Self { path, file, socket }))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode of its file.
    pub fn file(&self) -> (u64, u64) {
        self.file
    }

    /// Whether it is this socket.
    pub fn is(&self, listener: &impl AsFd) -> bool {
        rustix::fs::fstat(listener).is_ok_and(|stat| stat.st_ino == self.socket)
    }
}

/// What the kernel says of a socket.
struct Listener {
    socket: u32,
    /// Inode and device of the file that it is bound to.
    file: Option<(u32, u32)>,
}

impl Listener {
    /// The kernel has only half of a long inode number here, and devices as it keeps them
    /// for itself. A file system that shows others to users (Btrfs) is not recognized.
    fn is_bound_to(&self, (device, inode): (u64, u64)) -> bool {
        const MINOR_BITS: u32 = 20;
        self.file.is_some_and(|(known_inode, known_device)| {
            let (major, minor) = (
                known_device >> MINOR_BITS,
                known_device & ((1 << MINOR_BITS) - 1),
            );
            known_inode == inode as u32 && libc::makedev(major, minor) == device
        })
    }
}

// From <linux/netlink.h>, <linux/sock_diag.h>, <linux/unix_diag.h>.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const TCP_LISTEN: u32 = 10;
const UDIAG_SHOW_VFS: u32 = 2;
const UNIX_DIAG_VFS: u16 = 1;
/// Bytes of `struct nlmsghdr`, `struct unix_diag_msg` and `struct nlattr`.
const HEADER_LEN: usize = 16;
const SOCKET_LEN: usize = 16;
const ATTRIBUTE_LEN: usize = 4;

/// Asks for all that listen in this network namespace.
fn each_listener(mut look: impl FnMut(Listener)) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let protocol = Some(netlink::SOCK_DIAG);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    send(&socket, &request(), SendFlags::empty())?;
    let mut buffer = vec![0; 32 << 10];
    loop {
        let answer = receive(&socket, &mut buffer)?;
        if read(answer, &mut look)? {
            return Ok(());
        }
    }
}

fn request() -> Vec<u8> {
    let body = [
        // Family, protocol and padding.
        u32::from_ne_bytes([libc::AF_UNIX as u8, 0, 0, 0]),
        1 << TCP_LISTEN,
        0,
        UDIAG_SHOW_VFS,
        // No cookie: any socket.
        u32::MAX,
        u32::MAX,
    ];
    let len = (HEADER_LEN + size_of_val(&body)) as u32;
    let kind = [SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP];
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend(kind.into_iter().flat_map(u16::to_ne_bytes));
    // Number of the request, and of who asks.
    bytes.extend([1_u32, 0].into_iter().flat_map(u32::to_ne_bytes));
    bytes.extend(body.into_iter().flat_map(u32::to_ne_bytes));
    bytes
}

fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let (len, _) = loop {
        match recv(socket, &mut *buffer, RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    Ok(&buffer[..len])
}

/// Reads the messages of one answer. Returns whether it was the last one.
fn read(mut bytes: &[u8], look: &mut impl FnMut(Listener)) -> io::Result<bool> {
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's list of sockets");
    while !bytes.is_empty() {
        let len = number(bytes, 0).ok_or_else(odd)? as usize;
        let message = bytes.get(..len).ok_or_else(odd)?;
        let body = message.get(HEADER_LEN..).ok_or_else(odd)?;
        match half(message, 4).ok_or_else(odd)? {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let errno = number(body, 0).ok_or_else(odd)?;
                return Err(io::Error::from_raw_os_error((errno as i32).wrapping_neg()));
            }
            SOCK_DIAG_BY_FAMILY => look(Listener {
                socket: number(body, 4).ok_or_else(odd)?,
                file: body.get(SOCKET_LEN..).and_then(file),
            }),
            _ => {}
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// Of the attributes of a socket.
fn file(mut attributes: &[u8]) -> Option<(u32, u32)> {
    loop {
        let len = usize::from(half(attributes, 0)?).max(ATTRIBUTE_LEN);
        if half(attributes, 2)? == UNIX_DIAG_VFS {
            let value = attributes.get(ATTRIBUTE_LEN..)?;
            return Some((number(value, 0)?, number(value, 4)?));
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};
    use tempfile::TempDir;

    #[test]
    fn a_path_is_that_of_the_socket_that_listens_there_and_of_no_other() {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        let one = UnixListener::bind(at("one")).unwrap();
        let other = UnixListener::bind(at("other")).unwrap();
        let bound = Bound::at(&at("one")).unwrap().expect("it listens");
        assert!(bound.is(&one) && !bound.is(&other));
        assert_eq!(bound.path(), fs::canonicalize(at("one")).unwrap());
        // Under another name, and by way of a link.
        fs::hard_link(at("one"), at("again")).unwrap();
        std::os::unix::fs::symlink(at("again"), at("link")).unwrap();
        let again = Bound::at(&at("link")).unwrap().expect("it listens");
        assert!(again.is(&one));
        assert_eq!(again.path(), fs::canonicalize(at("again")).unwrap());
        assert_eq!(again.file(), bound.file());
        // Nobody listens there any more.
        drop(one);
        assert!(Bound::at(&at("one")).unwrap().is_none());
        fs::write(at("file"), "").unwrap();
        assert!(Bound::at(&at("file")).unwrap().is_none());
        assert!(Bound::at(&at("nothing")).is_err());
        // A connection is no listener, though its other end has the path.
        let connection = UnixStream::connect(at("other")).unwrap();
        let accepted = other.accept().unwrap().0;
        let bound = Bound::at(&at("other")).unwrap().expect("it listens");
        assert!(bound.is(&other) && !bound.is(&connection) && !bound.is(&accepted));
    }

    #[test]
    fn what_the_kernel_would_not_say_is_refused() {
        let message = |len: u32, kind: u16, body: &[u8]| {
            let mut bytes = len.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.resize(HEADER_LEN, 0);
            bytes.extend(body);
            bytes
        };
        let mut nobody = |_: Listener| panic!("there is none");
        for (len, kind, body) in [
            (0, SOCK_DIAG_BY_FAMILY, &[][..]),
            (17, SOCK_DIAG_BY_FAMILY, &[]),
            (20, SOCK_DIAG_BY_FAMILY, &[0; 4]),
            (16, NLMSG_ERROR, &[]),
        ] {
            read(&message(len, kind, body), &mut nobody).unwrap_err();
        }
        let error = (-libc::ENOENT).to_ne_bytes();
        let error = read(&message(20, NLMSG_ERROR, &error), &mut nobody).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        assert!(read(&message(16, NLMSG_DONE, &[]), &mut nobody).unwrap());
        // Attributes that never end, or end too early.
        assert_eq!(file(&[0; 64]), None);
        assert_eq!(file(&[12, 0, 1, 0, 7]), None);
    }
}
