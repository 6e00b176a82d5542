//! Connecting to another process, which may be stopped.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

/// The pause between two tries to connect to a process that has much to accept.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// Connects to who listens at `path`, and waits no longer than that for it: who accepts nobody
/// has only room for so many. The socket does not block.
///
/// # Errors
/// Any of `socket(2)` and `connect(2)`; `TimedOut` if there was no room.
pub(super) fn connect_in_time(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let until = Instant::now() + patience;
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket.into()),
            Err(Errno::AGAIN) if Instant::now() < until => thread::sleep(CONNECT_PAUSE),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
