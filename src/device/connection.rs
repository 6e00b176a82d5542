//! One front-end, from its connection to its end.
//!
//! A thread reads its messages one after another, obeys them, and takes everything
//! down when the front-end has gone, has sent what cannot be obeyed, or is asked to
//! stop.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::Level;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvFlags, recv};
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::BlockDevice;
use super::mailbox::Parked;
use super::ratelimit::{guest_log, log_line};
use super::session::{Refusal, Session};
use crate::storage::Disk;

/// Name of the thread that serves the messages of a front-end.
const MESSAGES_THREAD: &str = "messages";

/// Bytes of a message's header: request, flags, size of the rest.
const HEADER_LEN: usize = 12;

/// Most bytes that follow a header: what the library takes.
const MAX_REST_LEN: u64 = 0x1000;

/// How long the rest of a message may take to come, once its first byte is there.
const MESSAGE_TIME: Duration = Duration::from_secs(5);

/// How often is looked for the rest of a message.
const MESSAGE_POLL: Duration = Duration::from_millis(5);

/// How long a front-end that is to be left may take to read the answers that it waits
/// for.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// Why a front-end cannot be served.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// No descriptors or threads are left, most likely.
    #[error("what a connection needs cannot be made")]
    Resources(#[from] io::Error),
}

/// Why a connection has ended.
#[derive(Debug, Error)]
enum End {
    #[error("the front-end has disconnected")]
    Disconnected,
    #[error("it is to be left")]
    Stopped,
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Message(VhostError),
    #[error("a message was begun and not ended within {} s", MESSAGE_TIME.as_secs())]
    HalfMessage,
    #[error("the socket fails: {0}")]
    Socket(#[from] Errno),
}

/// How a connection is asked to end.
#[derive(Debug, Default)]
struct Stop {
    is_wanted: AtomicBool,
    /// What becomes of requests that wait for space.
    parked: Mutex<Option<Parked>>,
}

impl Stop {
    fn order(&self, parked: Parked) {
        *self.parked() = Some(parked);
        self.is_wanted.store(true, Ordering::Release);
    }

    fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Acquire)
    }

    fn parked(&self) -> MutexGuard<'_, Option<Parked>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A front-end that is being served. Dropping it stops it, as [`Self::stop`] does
/// with [`Parked::Drop`].
pub struct Connection {
    stop: Arc<Stop>,
    socket: Arc<UnixStream>,
    /// Taken when it is joined.
    thread: Option<JoinHandle<()>>,
    ended: Arc<EventFd>,
}

impl Connection {
    /// Starts to serve the front-end at the other end of `socket`.
    ///
    /// # Errors
    /// See [`ConnectionError`].
    pub fn start<D: Disk>(
        device: Arc<BlockDevice<D>>,
        socket: UnixStream,
    ) -> Result<Self, ConnectionError> {
        socket.set_nonblocking(false)?;
        let ended = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let stop = Arc::new(Stop::default());
        let socket = Arc::new(socket);
        let messages = Messages::new(device, Arc::clone(&socket), Arc::clone(&stop))?;
        let thread = thread::Builder::new()
            .name(MESSAGES_THREAD.to_owned())
            .spawn({
                let ended = Arc::clone(&ended);
                move || {
                    messages.serve();
                    // It can only fail when the descriptor is readable anyway.
                    let _ = ended.write(1);
                }
            })?;
        Ok(Self {
            stop,
            socket,
            thread: Some(thread),
            ended,
        })
    }

    /// A descriptor that is readable once the front-end has gone and all that
    /// served it has been taken down.
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ended.as_raw_fd()) }
    }

    /// Whether the front-end has not hung up.
    pub fn has_front_end(&self) -> bool {
        !has_hung_up(&self.socket)
    }

    /// Completes what is in flight, hangs up, and waits until all is taken down.
    pub fn stop(mut self, parked: Parked) {
        self.take_down(parked);
    }

    fn take_down(&mut self, parked: Parked) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.stop.order(parked);
        // Ends the wait for a message. The other direction stays open, so that the
        // front-end finds every answer in the rings when it notices that we go.
        let _ = self.socket.shutdown(Shutdown::Read);
        if !self.has_ended_within(ANSWER_TIME) {
            // A front-end that reads no answers would hold us up for ever.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        if thread.join().is_err() {
            log_line(
                Level::Error,
                0,
                format_args!("a connection ended in a panic"),
            );
        }
    }

    fn has_ended_within(&self, time: Duration) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.ended_fd(), PollFlags::IN)];
        let time = Timespec {
            tv_sec: time.as_secs() as i64,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&time)) == Ok(1)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.take_down(Parked::Drop);
    }
}

impl<D: Disk> BlockDevice<D> {
    /// Says that a front-end is turned away because another one is being served.
    pub fn tell_of_other(&self, socket: &UnixStream) {
        guest_log!(
            self.host_limit(),
            Warn,
            "{} is turned away: another front-end is being served",
            peer(socket)
        );
    }

    /// Says that a front-end is hung up on because it could not be served in time.
    pub fn tell_of_silent(&self, socket: &UnixStream) {
        guest_log!(
            self.host_limit(),
            Warn,
            "{} has connected and asked for nothing in time: it is turned away",
            peer(socket)
        );
    }
}

/// Whether so much has come from a front-end that it wants to be served: a whole
/// header of a message. `Err` if it has gone.
///
/// # Errors
/// Any of `recv(2)`; `NOTCONN` if the other end is closed.
pub fn has_spoken(socket: &UnixStream) -> io::Result<bool> {
    let mut header = [0; HEADER_LEN];
    match peek(socket, &mut header) {
        Ok(0) => Err(Errno::NOTCONN.into()),
        Ok(len) => Ok(len == HEADER_LEN),
        Err(Errno::AGAIN) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The process at the other end, as the kernel knows it: for the log.
fn peer(socket: &UnixStream) -> String {
    match socket_peercred(socket) {
        Ok(credentials) => format!("process {}", credentials.pid),
        Err(_) => "an unknown process".to_owned(),
    }
}

fn has_hung_up(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())) == Ok(1)
}

fn peek(socket: &UnixStream, bytes: &mut [u8]) -> Result<usize, Errno> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    recv(socket, bytes, flags).map(|(len, _)| len)
}

/// The thread of a connection.
struct Messages<D: Disk> {
    device: Arc<BlockDevice<D>>,
    session: Arc<Mutex<Session<D>>>,
    handler: BackendReqHandler<Mutex<Session<D>>>,
    socket: Arc<UnixStream>,
    stop: Arc<Stop>,
}

impl<D: Disk> Messages<D> {
    fn new(
        device: Arc<BlockDevice<D>>,
        socket: Arc<UnixStream>,
        stop: Arc<Stop>,
    ) -> Result<Self, ConnectionError> {
        let session = Session::new(Arc::clone(&device)).map_err(io::Error::other)?;
        let session = Arc::new(Mutex::new(session));
        let handler = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&session));
        Ok(Self {
            device,
            session,
            handler,
            socket,
            stop,
        })
    }

    /// Serves the connection to its end.
    fn serve(mut self) {
        let peer = peer(&self.socket);
        let device = Arc::clone(&self.device);
        let limit = device.host_limit();
        guest_log!(limit, Info, "a front-end has connected: {peer}");
        let end = loop {
            if let Err(end) = self.obey_next() {
                break end;
            }
        };
        match end {
            End::Disconnected => guest_log!(limit, Info, "{end}"),
            End::Stopped => {}
            _ => guest_log!(limit, Error, "the connection was ended: {end}"),
        }
        let parked = self.stop.parked().unwrap_or(Parked::Drop);
        self.session().close(parked);
    }

    fn session(&self) -> MutexGuard<'_, Session<D>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a message and does what it says.
    fn obey_next(&mut self) -> Result<(), End> {
        self.wait_for_message()?;
        match self.handler.handle_request() {
            Ok(()) => Ok(()),
            Err(VhostError::Disconnected | VhostError::PartialMessage) => Err(End::Disconnected),
            Err(error) => match self.session().take_refusal() {
                Some(refusal) if refusal.is_harmless() => {
                    guest_log!(self.device.guest_limit(), Warn, "{refusal}");
                    Ok(())
                }
                Some(refusal) => Err(refusal.into()),
                None => Err(End::Message(error)),
            },
        }
    }

    /// Waits until a whole message can be read without waiting.
    fn wait_for_message(&self) -> Result<(), End> {
        let mut begun = None;
        loop {
            if self.stop.is_wanted() {
                return Err(End::Stopped);
            }
            let mut header = [0; HEADER_LEN];
            match peek(&self.socket, &mut header) {
                Ok(0) => return Err(End::Disconnected),
                Ok(HEADER_LEN) if self.has_rest_of(&header)? => return Ok(()),
                Ok(_) if has_hung_up(&self.socket) => return Err(End::Disconnected),
                Ok(_) => {
                    let since = *begun.get_or_insert_with(Instant::now);
                    if since.elapsed() > MESSAGE_TIME {
                        return Err(End::HalfMessage);
                    }
                    thread::sleep(MESSAGE_POLL);
                }
                Err(Errno::AGAIN) => {
                    let _ = poll(&mut [PollFd::new(&*self.socket, PollFlags::IN)], None);
                }
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(End::Disconnected),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether all is there that a header says. What is no header is left to the
    /// library.
    fn has_rest_of(&self, header: &[u8; HEADER_LEN]) -> Result<bool, End> {
        let [.., s0, s1, s2, s3] = *header;
        let rest = u64::from(u32::from_ne_bytes([s0, s1, s2, s3]));
        let there = rustix::io::ioctl_fionread(&*self.socket)?;
        Ok(rest > MAX_REST_LEN || there >= HEADER_LEN as u64 + rest)
    }
}
