//! One front-end, from its connection to its end.
//!
//! A thread reads its messages one after another, obeys them, and takes everything
//! down when the front-end has gone, has sent what cannot be obeyed, or is asked to
//! stop.

use std::io::{self, IoSliceMut, Write};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::Level;
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{DupFlags, Errno, dup3};
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, recv, recvmsg};
use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::BlockDevice;
use super::channel::{Channel, brings_channel};
use super::gate::{Gate, Keeper, Release};
use super::mailbox::Parked;
use super::ratelimit::{guest_log, log_line};
use super::session::{Refusal, Session};
use super::suspended::{SessionState, Suspended};
use super::vanishing::Alarm;
use crate::headroom;
use crate::peer::Peer;
use crate::storage::Disk;
use crate::threads::{self, Role};

/// Name of the thread that serves the messages of a front-end.
const MESSAGES_THREAD: &str = "messages";

/// Of a message: this version of the protocol, no answer wanted.
const MESSAGE_FLAGS: u32 = 1;

/// Bytes of a message's header: request, flags, size of the rest.
const HEADER_LEN: usize = 12;

/// Most bytes that follow a header: what the library takes.
const MAX_REST_LEN: u64 = 0x1000;

/// Most descriptors that come with a message: what the library takes.
const MAX_FILES: usize = 32;

/// How long the rest of a message may take to come, once its first byte is there.
const MESSAGE_TIME: Duration = Duration::from_secs(5);

/// How often is looked for the rest of a message.
const MESSAGE_POLL: Duration = Duration::from_millis(5);

/// How long a front-end has to have said nothing before it is told of a change. In the
/// midst of a start of its rings it may be waiting for an answer, and read what it is told
/// only to take it for that (QEMU before 8.0).
const QUIET: Duration = Duration::from_millis(100);

/// How often is looked whether a connection that is to be suspended has ended instead.
const SUSPENSION_POLL: Duration = Duration::from_millis(20);

/// How long a front-end that is to be left may take to read the answers that it waits
/// for.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// Why a front-end could not be left: see [`Connection::suspend`].
const NO_PAUSE: &str =
    "it does not read its answers, or has taken memory of its rings away and not given it back";

/// Why a front-end cannot be served.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// No descriptors or threads are left, most likely.
    #[error("cannot set up a connection")]
    Resources(#[from] io::Error),
    /// It cannot go on where it was left.
    #[error("cannot go on serving the front-end: {0}")]
    Restore(String),
}

/// A connection that goes on as it was, since it could not be suspended.
pub struct NotSuspended {
    /// The connection.
    pub connection: Connection,
    /// What was missing.
    pub why: io::Error,
}

/// Why a connection has ended.
#[derive(Debug, Error)]
enum End {
    #[error("the front-end has disconnected")]
    Disconnected,
    #[error("it is to be left")]
    Stopped,
    #[error("it goes on elsewhere")]
    Suspended,
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Message(VhostError),
    #[error("a message brings more than {MAX_FILES} descriptors, or more than there may be here")]
    Descriptors,
    #[error("the front-end sent a part of a message and not the rest within {} s", MESSAGE_TIME.as_secs())]
    HalfMessage,
    #[error(
        "guest memory has vanished: the front-end has cut its file short, or the host has \
         no more huge pages for it"
    )]
    MemoryGone,
    #[error("the socket fails: {0}")]
    Socket(#[from] Errno),
}

/// How a connection is asked to end.
#[derive(Debug, Default)]
struct Stop {
    is_wanted: AtomicBool,
    /// What becomes of requests that wait for space.
    parked: Mutex<Option<Parked>>,
    /// To whom the connection goes that is to be suspended.
    receiver: Mutex<Option<SyncSender<io::Result<Suspended>>>>,
}

impl Stop {
    fn order(&self, parked: Parked) {
        *self.parked() = Some(parked);
        self.is_wanted.store(true, Ordering::Release);
    }

    fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Acquire)
    }

    fn order_suspension(&self, receiver: SyncSender<io::Result<Suspended>>) {
        *self.receiver() = Some(receiver);
    }

    fn is_suspension_wanted(&self) -> bool {
        self.receiver().is_some()
    }

    fn receiver(&self) -> MutexGuard<'_, Option<SyncSender<io::Result<Suspended>>>> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Wakes the thread.
    news: Arc<EventFd>,
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
        let messages = |socket, stop, news| Messages::new(device, socket, stop, news);
        Self::start_with(socket, messages, |messages| {
            messages.serve();
        })
    }

    /// Goes on where a connection was left, by this process or another one. All is ready
    /// then to serve the front-end, and it is not served before [`Resumed::begin`].
    ///
    /// # Errors
    /// See [`ConnectionError`].
    pub fn resume<D: Disk>(
        device: Arc<BlockDevice<D>>,
        suspended: Suspended,
    ) -> Result<Resumed, ConnectionError> {
        let Suspended {
            socket,
            channel,
            session,
        } = suspended;
        let keeper = Keeper::default();
        let gate = keeper.gate();
        let messages = |socket, stop, news| {
            let mut messages = Messages::new(device, socket, stop, news)?;
            messages.channel = channel.map(Channel::of);
            messages.release = Some(Release::of(&gate));
            messages.restore(session, &gate)?;
            Ok(messages)
        };
        let connection = Self::start_with(socket, messages, {
            let gate = keeper.gate();
            move |messages| {
                if gate.wait() {
                    messages.serve();
                }
            }
        })?;
        Ok(Resumed(Some((keeper, connection))))
    }

    fn start_with<D: Disk>(
        socket: UnixStream,
        make: impl FnOnce(
            Arc<UnixStream>,
            Arc<Stop>,
            Arc<EventFd>,
        ) -> Result<Messages<D>, ConnectionError>,
        serve: impl FnOnce(Messages<D>) + Send + 'static,
    ) -> Result<Self, ConnectionError> {
        headroom::check()?;
        socket.set_nonblocking(false)?;
        let ended = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let news = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let stop = Arc::new(Stop::default());
        let socket = Arc::new(socket);
        let messages = make(Arc::clone(&socket), Arc::clone(&stop), Arc::clone(&news))?;
        let thread = threads::start(Role::Messages, MESSAGES_THREAD, {
            let ended = Arc::clone(&ended);
            move || {
                serve(messages);
                // It can only fail when the descriptor is readable anyway.
                let _ = ended.write(1);
            }
        })?;
        Ok(Self {
            stop,
            socket,
            thread: Some(thread),
            ended,
            news,
        })
    }

    /// A descriptor that is readable once the front-end has gone and all that
    /// served it has been taken down.
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        event_fd(&self.ended)
    }

    /// To be called when the size of the disk has changed and the new end can be served:
    /// tells the front-end of a driver that runs, if it can be told. Returns at once.
    pub fn config_changed(&self) {
        // It can only fail when the descriptor is readable anyway.
        let _ = self.news.write(1);
    }

    /// Whether the front-end has not hung up.
    pub fn has_front_end(&self) -> bool {
        !has_hung_up(&self.socket)
    }

    /// Ends to serve the front-end, between two of its messages and with nothing in flight,
    /// so that somebody else can [go on](Self::resume). It does not notice, but for the
    /// time that it takes. `None` if it has gone meanwhile.
    ///
    /// # Errors
    /// If there are not enough descriptors, or the front-end comes to no pause between its
    /// messages within 2 s. The connection goes on then.
    pub fn suspend(mut self) -> Result<Option<Suspended>, NotSuspended> {
        let (give, given) = sync_channel(1);
        self.stop.order_suspension(give);
        // Wakes it from waiting for a message.
        let _ = self.news.write(1);
        let start = Instant::now();
        let suspended = loop {
            match given.recv_timeout(SUSPENSION_POLL) {
                Ok(suspended) => break suspended.map(Some),
                Err(RecvTimeoutError::Timeout) if !self.has_ended() => {
                    // A front-end that reads no answers, or has taken the memory of its rings
                    // away, would hold us up for ever. Unless the thread has begun.
                    let is_late = start.elapsed() > ANSWER_TIME;
                    if is_late && self.stop.receiver().take().is_some() {
                        break Err(io::Error::new(io::ErrorKind::TimedOut, NO_PAUSE));
                    }
                }
                // It may have come in between.
                Err(_) => break given.try_recv().ok().transpose(),
            }
        };
        match suspended {
            Ok(suspended) => {
                if let Some(thread) = self.thread.take() {
                    join(thread);
                }
                Ok(suspended)
            }
            Err(why) => Err(NotSuspended {
                connection: self,
                why,
            }),
        }
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
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
        join(thread);
    }

    fn has_ended_within(&self, time: Duration) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.ended_fd(), PollFlags::IN)];
        poll(&mut fds, Some(&time_spec(time))) == Ok(1)
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        log_line(
            Level::Error,
            0,
            format_args!("a connection ended in a panic"),
        );
    }
}

/// A connection that waits to be served. Dropped, it has never been: nobody hangs up on the
/// front-end, which somebody else may go on to serve.
pub struct Resumed(Option<(Keeper, Connection)>);

impl Resumed {
    /// Serves it from now on. Cannot fail.
    ///
    /// # Panics
    /// Never: it is there until it is dropped.
    pub fn begin(mut self) -> Connection {
        let (keeper, connection) = self.0.take().expect("it is taken once");
        keeper.open();
        connection
    }
}

impl Drop for Resumed {
    fn drop(&mut self) {
        if let Some((keeper, mut connection)) = self.0.take() {
            // Its threads go home.
            drop(keeper);
            if let Some(thread) = connection.thread.take() {
                join(thread);
            }
        }
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
            "{} connected and sent nothing in time: it is turned away",
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

fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn time_spec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}

/// The process at the other end, as the kernel knows it: for the log.
fn peer(socket: &UnixStream) -> String {
    let known = Peer::of(socket).map(|peer| peer.to_string());
    known.unwrap_or_else(|_| "an unknown process".to_owned())
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
    /// Goes before the session, which waits for the ends of its threads.
    release: Option<Release>,
    device: Arc<BlockDevice<D>>,
    session: Arc<Mutex<Session<D>>>,
    handler: BackendReqHandler<Mutex<Session<D>>>,
    socket: Arc<UnixStream>,
    alarm: Arc<Alarm>,
    stop: Arc<Stop>,
    /// Readable when there may be something to tell the front-end.
    news: Arc<EventFd>,
    /// By which it can be told.
    channel: Option<Channel>,
}

impl<D: Disk> Messages<D> {
    fn new(
        device: Arc<BlockDevice<D>>,
        socket: Arc<UnixStream>,
        stop: Arc<Stop>,
        news: Arc<EventFd>,
    ) -> Result<Self, ConnectionError> {
        let alarm = Arc::new(Alarm::new(Arc::clone(&socket)));
        let session = Session::new(Arc::clone(&device), Arc::clone(&alarm));
        let session = session.map_err(io::Error::other)?;
        let session = Arc::new(Mutex::new(session));
        let handler = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&session));
        Ok(Self {
            release: None,
            device,
            session,
            handler,
            socket,
            alarm,
            stop,
            news,
            channel: None,
        })
    }

    /// Makes a new session what another one was, and the library believe that it has read
    /// the messages that led there.
    fn restore(&mut self, state: SessionState, gate: &Arc<Gate>) -> Result<(), ConnectionError> {
        let (negotiated, protocol) = (state.negotiated, state.protocol_features);
        self.restore_handler(negotiated, protocol)?;
        // It has heard those as well.
        let alarm = Arc::clone(&self.alarm);
        let fresh = Session::new(Arc::clone(&self.device), alarm).map_err(io::Error::other)?;
        let mut session = self.session();
        *session = fresh;
        let restored = session.restore(state, gate);
        restored.map_err(|refusal| ConnectionError::Restore(refusal.to_string()))
    }

    /// The library keeps to itself which features there are, and learns of them only from
    /// messages: so it is sent them, by a socket whose place the front-end's then takes.
    fn restore_handler(
        &mut self,
        negotiated: Option<u64>,
        protocol_features: Option<u64>,
    ) -> Result<(), ConnectionError> {
        let (theirs, ours) = UnixStream::pair()?;
        let session = Arc::clone(&self.session);
        let mut handler = BackendReqHandler::from_stream(ours, session);
        let messages = [
            (FrontendReq::GET_FEATURES, None),
            (FrontendReq::SET_PROTOCOL_FEATURES, protocol_features),
            (FrontendReq::SET_FEATURES, negotiated),
        ];
        for (request, value) in messages {
            if request != FrontendReq::GET_FEATURES && value.is_none() {
                continue;
            }
            let body = value.map(u64::to_ne_bytes);
            let body = body.as_ref().map_or(&[][..], |body| body);
            let header = [u32::from(request), MESSAGE_FLAGS, body.len() as u32];
            let header = header.map(u32::to_ne_bytes).concat();
            (&theirs).write_all(&[&header, body].concat())?;
            let handled = handler.handle_request();
            handled.map_err(|error| ConnectionError::Restore(error.to_string()))?;
        }
        // SAFETY: the handler owns the descriptor of that number and lives on. It goes on
        // to own the number; what is open under it is replaced, and nothing else is done.
        let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(handler.as_raw_fd()) });
        dup3(&*self.socket, &mut place, DupFlags::CLOEXEC).map_err(io::Error::from)?;
        self.handler = handler;
        Ok(())
    }

    /// Serves the connection until its end, or until it is to go on elsewhere.
    fn serve(mut self) {
        let peer = peer(&self.socket);
        let device = Arc::clone(&self.device);
        let limit = device.host_limit();
        let how = if self.session().is_new() {
            "has connected"
        } else {
            "is served on"
        };
        guest_log!(limit, Info, "a front-end {how}: {peer}");
        let end = loop {
            match self.obey_next() {
                Ok(()) => {}
                Err(End::Suspended) => {
                    if self.suspend() {
                        return;
                    }
                }
                Err(end) => break end,
            }
        };
        match end {
            End::Disconnected => guest_log!(limit, Info, "{end}"),
            End::Stopped | End::Suspended => {}
            _ => guest_log!(limit, Error, "the connection was ended: {end}"),
        }
        let parked = self.stop.parked().unwrap_or(Parked::Drop);
        self.session().close(parked);
    }

    /// Gives the connection to who has asked for it. `false` if it goes on here.
    fn suspend(&mut self) -> bool {
        let Some(receiver) = self.stop.receiver().take() else {
            return false;
        };
        let suspended = self.try_suspend();
        let is_suspended = suspended.is_ok();
        // Who waits for it is there until it comes.
        let _ = receiver.send(suspended);
        is_suspended
    }

    fn try_suspend(&mut self) -> io::Result<Suspended> {
        let socket = self.socket.try_clone()?;
        let channel = self.channel.as_ref();
        Ok(Suspended {
            socket,
            channel: channel.map(Channel::try_clone).transpose()?,
            session: self.session().suspend()?,
        })
    }

    fn session(&self) -> MutexGuard<'_, Session<D>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a message and does what it says.
    fn obey_next(&mut self) -> Result<(), End> {
        let code = self.wait_for_message()?;
        self.check_descriptors()?;
        let channel = if brings_channel(code) {
            Channel::peek(&self.socket).unwrap_or_default()
        } else {
            None
        };
        match self.handler.handle_request() {
            Ok(()) => {
                self.channel = channel.or(self.channel.take());
                Ok(())
            }
            Err(_) if self.alarm.has_rung() => Err(End::MemoryGone),
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

    /// Waits until a whole message can be read without waiting. Returns what it asks for.
    fn wait_for_message(&mut self) -> Result<u32, End> {
        let mut begun = None;
        loop {
            if self.alarm.has_rung() {
                return Err(End::MemoryGone);
            }
            if self.stop.is_wanted() {
                return Err(End::Stopped);
            }
            if self.stop.is_suspension_wanted() && !self.session().is_amid_change() {
                return Err(End::Suspended);
            }
            let mut header = [0; HEADER_LEN];
            match peek(&self.socket, &mut header) {
                Ok(0) => return Err(End::Disconnected),
                Ok(HEADER_LEN) if self.has_rest_of(&header)? => {
                    let [c0, c1, c2, c3, ..] = header;
                    return Ok(u32::from_ne_bytes([c0, c1, c2, c3]));
                }
                Ok(_) if has_hung_up(&self.socket) => return Err(End::Disconnected),
                Ok(_) => {
                    let since = *begun.get_or_insert_with(Instant::now);
                    if since.elapsed() > MESSAGE_TIME {
                        return Err(End::HalfMessage);
                    }
                    thread::sleep(MESSAGE_POLL);
                }
                Err(Errno::AGAIN) => self.wait_for_socket(),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(End::Disconnected),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// That the descriptors of the next message can be received. When they cannot, the
    /// library loses the part of the message that it has read, and waits for ever for as
    /// much again.
    fn check_descriptors(&self) -> Result<(), End> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut byte = [0];
        let mut bytes = [IoSliceMut::new(&mut byte)];
        // What has come is closed with `control`; the library receives it once more.
        let message = recvmsg(&*self.socket, &mut bytes, &mut control, flags)?;
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(End::Descriptors);
        }
        Ok(())
    }

    /// Waits until something comes, and tells the front-end meanwhile what it should know.
    fn wait_for_socket(&mut self) {
        let owes_size = self.channel.is_some() && self.session().owes_size();
        let patience = match self.stop.is_suspension_wanted() {
            true => Some(time_spec(MESSAGE_POLL)),
            false => owes_size.then(|| time_spec(QUIET)),
        };
        let mut fds = [
            PollFd::new(&*self.socket, PollFlags::IN),
            PollFd::from_borrowed_fd(event_fd(&self.news), PollFlags::IN),
        ];
        match poll(&mut fds, patience.as_ref()) {
            Ok(0) if owes_size && !self.stop.is_suspension_wanted() => self.tell_size(),
            Ok(_) if !fds[1].revents().is_empty() => drop(self.news.read()),
            _ => {}
        }
    }

    fn tell_size(&mut self) {
        self.session().has_told_size();
        let told = self
            .channel
            .as_ref()
            .map_or(Ok(()), Channel::tell_of_change);
        if let Err(error) = told {
            guest_log!(
                self.device.host_limit(),
                Warn,
                "cannot tell the front-end the new size of the disk: {error}"
            );
            self.channel = None;
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
