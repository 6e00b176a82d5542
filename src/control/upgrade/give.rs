//! The process that serves, when another one comes to take over.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{ANSWER_TIME, State, Terms, VERSION, kind, part, read_parts, say};
use crate::control::deadline;
use crate::control::main_loop::Carried;
use crate::control::served::{Image, Passed, Served};
use crate::control::signals::Signals;
use crate::control::socket::ServerSocket;
use crate::control::{Args, Doors, Error, with_causes};
use crate::device::{Connection, NotSuspended, Suspended, ThrottleLimits};
use crate::parcel::{ParcelError, Reader, Writer};
use crate::peer::Peer;

/// How long the main loop may wait for the rest of a message whose beginning is there.
const MESSAGE_TIME: Duration = Duration::from_millis(200);

/// How long a process may prepare itself.
const PREPARATION: Duration = Duration::from_secs(60);

/// How long the image may take to be synced while the guest goes on. The other process waits
/// for a minute.
const SYNC_TIME: Duration = Duration::from_secs(45);

/// How often is said that the other process neither serves nor ends.
const REMINDER: Duration = Duration::from_secs(10);

/// How long is tried to serve a front-end on for which something is missing.
const TIME_TO_GO_ON: Duration = Duration::from_secs(10);

/// The pause between two tries to go on.
const RETRY_PAUSE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// A process that wants to take over.
pub(in crate::control) struct Successor {
    socket: UnixStream,
    peer: Peer,
    until: Instant,
    is_welcome: bool,
    is_ready: bool,
    /// See [`part`].
    parts: u64,
}

/// What a message of it has led to.
pub(in crate::control) enum Step {
    /// It has more to say.
    Waits,
    /// It is to be handed everything.
    IsReady,
    /// It cannot take over.
    Ends,
}

impl Successor {
    /// One that has connected, if it may: of this user, or root. Nothing has been said yet.
    pub fn of(socket: UnixStream, user: u32) -> io::Result<Self> {
        let peer = Peer::of(&socket)?;
        let uid = peer.uid;
        if uid != user && uid != 0 {
            let what = format!("{peer} of user {uid} is not allowed to take over");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        Ok(Self {
            socket,
            peer,
            until: Instant::now() + PREPARATION,
            is_welcome: false,
            is_ready: false,
            parts: 0,
        })
    }

    /// When it has to be ready, or the image to be synced for it.
    pub fn until(&self) -> Instant {
        self.until
    }

    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Whether it waits for the image.
    pub fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Does what its next message asks for.
    pub fn hear(&mut self, terms: &Terms, doors: &Doors) -> Step {
        let message = Reader::receive(&self.socket, None, MESSAGE_TIME);
        let answered = message.and_then(|mut message| match message.kind {
            kind::HELLO => self.greet(message, terms, doors),
            kind::READY if self.is_welcome && !self.is_ready => {
                // What follows is for processes that are newer than this one.
                self.parts = read_parts(&mut message)?;
                self.is_ready = true;
                self.until = Instant::now() + SYNC_TIME;
                Ok(Step::IsReady)
            }
            _ => Err(ParcelError::Invalid("a message out of order")),
        });
        answered.unwrap_or_else(|error| {
            log::warn!("{} does not take over: {error}", self.peer);
            Step::Ends
        })
    }

    fn greet(
        &mut self,
        mut hello: Reader,
        terms: &Terms,
        doors: &Doors,
    ) -> Result<Step, ParcelError> {
        let version = hello.u32()?;
        if version != VERSION {
            let why = format!("it speaks version {VERSION} of the protocol, not {version}");
            return Ok(self.refuse(&why));
        }
        let theirs = Terms::read(&mut hello)?;
        hello.end()?;
        if let Some(difference) = terms.difference(&theirs) {
            return Ok(self.refuse(difference));
        }
        let mut welcome = Writer::default();
        let control = doors.control.as_ref();
        for door in [Some(&doors.front_ends), control] {
            welcome.optional(door.and_then(ServerSocket::made), |to, made| {
                to.text(made.path().as_os_str().as_encoded_bytes());
            });
        }
        welcome.send(&self.socket, kind::WELCOME, MESSAGE_TIME)?;
        self.is_welcome = true;
        Ok(Step::Waits)
    }

    /// It has not done what it should in time, or nobody could do it for it.
    pub fn is_late(&self) {
        if self.is_ready {
            self.refuse("the image could not be synced in time");
        } else {
            log::warn!("{} is not ready in time", self.peer);
        }
    }

    /// Limits that it is told of.
    fn limits_of(&self, image: &Image) -> Option<ThrottleLimits> {
        let limits = image.throttle().new_limits()?;
        if self.parts & part::LIMITS == 0 {
            log::warn!(
                "{} does not support limits that were set at run time, and applies its own",
                self.peer
            );
            return None;
        }
        Some(limits)
    }

    /// What of the file is to be told of, if the other one is told so.
    fn write_threshold_of(&self, image: &Image) -> Option<u64> {
        let bytes = Some(image.write_threshold().bytes()).filter(|bytes| *bytes > 0)?;
        if self.parts & part::WRITE_THRESHOLD == 0 {
            log::warn!(
                "{} does not know of the write threshold that was set, and tells of none",
                self.peer
            );
            return None;
        }
        Some(bytes)
    }

    /// The socket for metrics, if it is handed that.
    fn metrics_of<'a>(&self, doors: &'a Doors) -> Option<&'a ServerSocket> {
        let metrics = doors.metrics.as_ref()?;
        if self.parts & part::METRICS == 0 {
            log::warn!(
                "{} does not support metrics, and will provide none",
                self.peer
            );
            return None;
        }
        Some(metrics)
    }

    /// Whether it has hung up.
    fn has_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec::default())) == Ok(1)
    }

    /// Tells it that it cannot take over, and why.
    pub fn refuse(&self, why: &str) -> Step {
        log::warn!("{} is not allowed to take over: {why}", self.peer);
        let mut refusal = Writer::default();
        refusal.text(why.as_bytes());
        // It may have gone.
        let _ = refusal.send(&self.socket, kind::REFUSED, MESSAGE_TIME);
        Step::Ends
    }
}

impl AsRawFd for Successor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// How it went.
pub(in crate::control) enum Given {
    /// The other process serves.
    Away,
    /// This one does, still or again.
    Kept(Box<Served>, Carried),
}

/// What becomes of the image after the other process has failed.
enum Failure {
    /// It never was the other's.
    Before(ParcelError),
    /// It was, and is no more.
    After(ParcelError),
}

/// Hands everything to `successor`, which is ready; the image was synced a moment ago. If
/// that fails, all is as before.
///
/// # Errors
/// If the image cannot be opened again.
pub(in crate::control) fn hand_over(
    successor: &Successor,
    served: Served,
    carried: Carried,
    image: &mut Image,
    doors: &mut Doors,
    (args, cpus): (&Args, usize),
    signals: &Signals,
) -> Result<Given, Error> {
    // The main loop does not look at signals meanwhile.
    let _watch = deadline::watch(signals);
    let Carried {
        connection,
        waiting,
    } = carried;
    let kept = |served, connection, waiting| {
        let carried = Carried {
            connection,
            waiting,
        };
        Ok(Given::Kept(Box::new(served), carried))
    };
    if successor.has_gone() {
        log::warn!("{} went away before it could take over", successor.peer);
        return kept(served, connection, waiting);
    }
    let start = Instant::now();
    let suspended = match connection.map(Connection::suspend).transpose() {
        Ok(suspended) => suspended.flatten(),
        Err(NotSuspended { connection, why }) => {
            successor.refuse(&format!("the front-end cannot be handed over: {why}"));
            return kept(served, Some(connection), waiting);
        }
    };
    // Nobody is served now. Once this is done the disk has all that anybody was told of, and
    // the image can be opened again by whoever gets to it.
    let size = served.device().disk_size();
    let (closed, bitmaps) = match served.pass() {
        Passed::Kept(served, error) => {
            successor.refuse(&format!("the image cannot be synced: {error}"));
            let connection = go_on(&served, suspended, signals);
            return kept(served, connection, waiting);
        }
        Passed::Lost => {
            successor.refuse("the lock on the image is lost");
            return Err(Error::LockLost);
        }
        Passed::Unmarked(error, bitmaps) => (Err(error), Some(bitmaps)),
        Passed::Closed(bitmaps) => (Ok(()), bitmaps),
    };
    let state = State {
        size,
        front_ends: &doors.front_ends,
        upgrades: doors.upgrades.as_ref(),
        control: doors.control.as_ref(),
        waiting,
        connection: suspended,
        limits: successor.limits_of(image),
        metrics: successor.metrics_of(doors),
        write_threshold: successor.write_threshold_of(image),
    };
    let given = match &closed {
        Ok(()) => give(successor, &state, signals),
        Err(error) => {
            log::error!("cannot hand the image over: {error}");
            successor.refuse("the image could not be closed");
            Err(Failure::Before(ParcelError::Gone))
        }
    };
    let State {
        waiting,
        connection: mut suspended,
        ..
    } = state;
    match given {
        Ok(()) => {
            log::info!(
                "{} has taken over; the guest has waited for {:.1} ms",
                successor.peer,
                start.elapsed().as_secs_f64() * 1e3
            );
            doors.leave(successor.parts & part::METRICS != 0);
            return Ok(Given::Away);
        }
        Err(Failure::Before(error)) => {
            log::warn!(
                "{} has not taken over, this one goes on: {error}",
                successor.peer
            );
        }
        Err(Failure::After(error)) => {
            log::warn!(
                "{} has failed to take over, this one goes on: {error}",
                successor.peer
            );
            try_until_signal(signals, || image.wait_until_alone().map_err(Error::Lock))?;
        }
    }
    // A process that waits for an answer gets the end of the socket for one.
    let _ = successor.socket.shutdown(std::net::Shutdown::Both);
    // Whatever keeps the image from being opened (no space for its mark, say), its guest
    // waits better than it loses its disk.
    try_until_signal(signals, || image.set_raw_size(size).map_err(Error::Setup))?;
    let served = try_until_signal(signals, || {
        let disk = image.disk(args)?;
        image.serve_on(disk, args, cpus)
    })?;
    // The image may have a mark that the other process has made, and the guest's region what
    // it has written there. But nothing has completed since the disk had everything.
    if let Some(suspended) = &mut suspended {
        suspended.set_settled();
    }
    // Nor has anything changed since that the bitmaps would have to know.
    if let (Some(engine), Some(bitmaps)) = (served.engine(), bitmaps) {
        engine.have_bitmaps(bitmaps);
    }
    let has_used_region = suspended.as_ref().is_some_and(Suspended::has_used_region);
    if let Some(engine) = served.engine().filter(|_| !has_used_region) {
        engine.begin();
    }
    let connection = go_on(&served, suspended, signals);
    log::info!(
        "the guest has waited for {:.1} ms",
        start.elapsed().as_secs_f64() * 1e3
    );
    kept(served, connection, waiting)
}

/// Tries again and again, until it succeeds or the process is to end.
fn try_until_signal<T>(
    signals: &Signals,
    mut attempt: impl FnMut() -> Result<T, Error>,
) -> Result<T, Error> {
    loop {
        let error = match attempt() {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        // Another host may have had the image. A process that is started anew finds out.
        let is_lost = matches!(error, Error::LockGone(_));
        if is_lost || has_signal_within(signals, &RETRY_PAUSE) {
            return Err(error);
        }
        let words = with_causes(&error);
        log::error!("this process cannot go on yet, and tries again: {words}");
    }
}

fn give(
    successor: &Successor,
    state: &State<&ServerSocket>,
    signals: &Signals,
) -> Result<(), Failure> {
    let socket = &successor.socket;
    let prepare = || {
        let mut message = Writer::default();
        state.write(&mut message);
        message.send(socket, kind::STATE, ANSWER_TIME)?;
        let answer = Reader::receive(socket, Some(signal_fd(signals)), ANSWER_TIME)?;
        expect(answer, kind::PREPARED)?;
        // Whoever has read this may write.
        say(socket, kind::GO)
    };
    prepare().map_err(Failure::Before)?;
    loop {
        match Reader::receive(socket, Some(signal_fd(signals)), REMINDER) {
            Ok(answer) => return expect(answer, kind::SERVING).map_err(Failure::After),
            Err(ParcelError::Late) => log::error!(
                "{} has the image but neither serves it nor exits",
                successor.peer
            ),
            // This process is to end: the image is not its own any more.
            Err(ParcelError::BrokenOff) => return Ok(()),
            Err(error) => return Err(Failure::After(error)),
        }
    }
}

fn expect(answer: Reader, kind: u32) -> Result<(), ParcelError> {
    match answer.kind == kind {
        true => answer.end(),
        false => Err(ParcelError::Invalid("a message out of order")),
    }
}

fn signal_fd(signals: &Signals) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as `signals` is borrowed.
    unsafe { BorrowedFd::borrow_raw(signals.as_raw_fd()) }
}

/// Serves a front-end on that nobody else has served meanwhile. What was there for it a moment
/// ago may be taken by others now, and be there again soon.
fn go_on(served: &Served, suspended: Option<Suspended>, signals: &Signals) -> Option<Connection> {
    let suspended = suspended?;
    let resume = || {
        let copy = suspended.try_clone()?;
        Connection::resume(Arc::clone(served.device()), copy)
    };
    let start = Instant::now();
    loop {
        let error = match resume() {
            Ok(resumed) => return Some(resumed.begin()),
            Err(error) => error,
        };
        if start.elapsed() >= TIME_TO_GO_ON || has_signal_within(signals, &RETRY_PAUSE) {
            log::error!("{error}");
            return None;
        }
        log::error!("cannot go on serving the front-end yet: {error}");
    }
}

fn has_signal_within(signals: &Signals, time: &Timespec) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(signal_fd(signals), PollFlags::IN)];
    poll(&mut fds, Some(time)) == Ok(1)
}
