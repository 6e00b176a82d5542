//! SIGTERM and SIGINT as something that the main loop can wait for.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{flag, low_level::pipe};

/// Exit status when a second signal cuts the end of the program short.
const CUT_SHORT: i32 = 1;

/// Readable from the first SIGTERM or SIGINT on. The second ends the program at
/// once, as a power cut would: for a person who does not want to wait.
#[derive(Debug)]
pub struct Signals(UnixStream);

impl Signals {
    /// Catches the signals from now on.
    ///
    /// # Errors
    /// Any of `socketpair(2)` and `sigaction(2)`.
    pub fn catch() -> io::Result<Self> {
        let (readable, writable) = UnixStream::pair()?;
        let again = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            // In this order: the first looks at what earlier signals have set.
            flag::register_conditional_shutdown(signal, CUT_SHORT, Arc::clone(&again))?;
            flag::register(signal, Arc::clone(&again))?;
            pipe::register(signal, writable.try_clone()?)?;
        }
        Ok(Self(readable))
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
