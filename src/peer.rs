//! Who is at the other end of a socket of the Unix domain, as the kernel knows it.
//!
//! A process that another namespace of processes has, and not this one's, has no number
//! here: the kernel says 0 then.

use std::fmt;
use std::io;
use std::mem::size_of;
use std::num::NonZeroI32;
use std::os::fd::{AsFd, AsRawFd};

/// A process, or who started to listen where it listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Its number, if it has one here.
    pub pid: Option<NonZeroI32>,
    /// Its effective user.
    pub uid: u32,
}

impl Peer {
    /// The one that `socket` is connected with.
    ///
    /// # Errors
    /// Any of `getsockopt(2)`.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let mut credentials = libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the descriptor is open, and the kernel writes `len` bytes at most, which
        // is how long the structure is. Any bytes are a valid one.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut credentials).cast(),
                &raw mut len,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            pid: NonZeroI32::new(credentials.pid),
            uid: credentials.uid,
        })
    }
}

/// For the log.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid}"),
            None => f.write_str("a process of another namespace"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_peer_is_known_by_its_number_or_as_somebody_elses() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        let own = std::process::id();
        assert_eq!(peer.to_string(), format!("process {own}"));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        let peer = Peer { pid: None, ..peer };
        assert_eq!(peer.to_string(), "a process of another namespace");
        let file = tempfile::tempfile().unwrap();
        assert!(Peer::of(&file).is_err());
    }
}
