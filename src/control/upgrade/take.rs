//! The process that takes over.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{
    ANSWER_TIME, State, Terms, UpgradeError, VERSION, bound_at, folder_of, kind, part, read_path,
    say,
};
use crate::control::bound::Bound;
use crate::control::main_loop::{Carried, Room};
use crate::control::reach::connect_in_time;
use crate::control::sandbox::Reached;
use crate::control::served::{Image, Served};
use crate::control::signals::Signals;
use crate::control::{Args, Doors, Error, Sandbox, deadline, own_user, start_ring_maker};
use crate::device::Connection;
use crate::parcel::{ParcelError, Reader, Writer};
use crate::peer::Peer;

/// How long the process that serves may need to drain its rings and close the image.
const DRAIN: Duration = Duration::from_secs(60);

/// How long the guest may wait for this process. Afterwards the other one goes on.
const TIME_TO_SERVE: Duration = Duration::from_secs(5);

/// What has been taken over, and is being served.
pub(in crate::control) struct Taken {
    pub image: Image,
    pub served: Served,
    pub doors: Doors,
    pub carried: Carried,
    /// For the main loop.
    pub room: Option<Room>,
}

/// Goes on in the place of the process that listens on `path`.
///
/// # Errors
/// Whatever keeps this process from it; the other one goes on.
pub(in crate::control) fn take_over(
    path: &Path,
    mut image: Image,
    (args, cpus): (&Args, usize),
    sandbox: &Sandbox,
    signals: &Signals,
) -> Result<Taken, Error> {
    let socket = connect(path, args)?;
    let signal_fd = signal_fd(signals);
    let receive =
        |time| Reader::receive(&socket, Some(signal_fd), time).map_err(UpgradeError::from);
    let terms = Terms::of(args, image.files()).map_err(Error::Setup)?;
    let paths = introduce(&socket, &terms, receive)?;
    // Only where a socket is of that process, its folder is to be reached from here.
    let [front_ends, control] = paths.map(|path| path.as_deref().and_then(bound_at));
    let upgrades = bound_at(path);
    let folders = [&front_ends, &control].map(|it| it.as_ref().map(Bound::path));
    let folders = folders.into_iter().chain([Some(path)]);
    let folders: Vec<PathBuf> = folders.flatten().map(folder_of).collect();
    sandbox.become_user()?;
    image.start_caretaker(args, sandbox)?;
    let files = Reached {
        files: image.files(),
        bundle: None,
    };
    sandbox.confine(files, &folders, false)?;
    start_ring_maker(args)?;
    let user = own_user();
    // The start is over: to open the image is what the other process can do as well, if
    // this one fails.
    sandbox.settle()?;
    let mut ready = Writer::default();
    ready.u64(part::ALL);
    ready
        .send(&socket, kind::READY, ANSWER_TIME)
        .map_err(UpgradeError::from)?;
    let state = expect(receive(DRAIN)?, kind::STATE)?;
    let state = State::read(state).map_err(UpgradeError::from)?;
    state.front_ends.check(front_ends.as_ref())?;
    let others = [(&state.upgrades, None), (&state.control, control.as_ref())];
    for (socket, bound) in others {
        socket.as_ref().map_or(Ok(()), |it| it.check(bound))?;
    }
    let metrics = state.metrics.as_ref();
    metrics.map_or(Ok(()), |it| it.check_anywhere())?;
    if let Some(limits) = state.limits {
        if args.throttle.is_some_and(|own| own != limits) {
            log::info!(
                "the limits that were set at run time stay in force, and --throttle is ignored"
            );
        }
        image.throttle().set(limits)?;
    }
    if let Some(bytes) = state.write_threshold {
        image.write_threshold().set(bytes);
    }
    say(&socket, kind::PREPARED).map_err(UpgradeError::from)?;
    expect(receive(ANSWER_TIME)?, kind::GO)?;

    let limit = deadline::Limit::start(TIME_TO_SERVE).map_err(Error::Setup)?;
    image.catch_up();
    image.set_raw_size(state.size).map_err(Error::Setup)?;
    // Not before: what it knows of the files would be old.
    let disk = image.disk(args)?;
    let served = image.serve_on(disk, args, cpus)?;
    let (here, there) = (served.device().disk_size().bytes(), state.size.bytes());
    if here != there {
        return Err(UpgradeError::OtherSize { here, there }.into());
    }
    let device = served.device();
    if let Some(engine) = served.engine().filter(|engine| engine.is_read_only()) {
        // The mark may have been there before the other process, which left it and would not
        // have been asked to go while it waited for somebody.
        engine.begin();
    }
    let resume = |suspended| Connection::resume(Arc::clone(device), suspended);
    let resumed = state.connection.map(resume).transpose();
    let resumed = resumed.map_err(Error::Connection)?;
    let room = Room::keep().map_err(Error::Setup)?;
    if !limit.lift() {
        return Err(UpgradeError::from(ParcelError::Late).into());
    }
    // From here on nothing fails. If the other process has gone away, nobody else serves.
    let _ = say(&socket, kind::SERVING);
    // Not before: dropped, they remove their files.
    let upgrades = state.upgrades.map(|it| {
        // The connection came from there, perhaps by way of somebody else.
        let bound = upgrades.filter(|bound| it.is(bound));
        it.own(bound)
    });
    let doors = Doors {
        front_ends: state.front_ends.own(front_ends),
        upgrades,
        control: state.control.map(|it| it.own(control)),
        metrics: state.metrics.map(|it| it.own(None)),
        terms: Some(terms),
        user,
    };
    Ok(Taken {
        doors,
        carried: Carried {
            connection: resumed.map(crate::device::Resumed::begin),
            waiting: state.waiting,
        },
        image,
        served,
        room: Some(room),
    })
}

fn signal_fd(signals: &Signals) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as `signals` is borrowed.
    unsafe { BorrowedFd::borrow_raw(signals.as_raw_fd()) }
}

fn connect(path: &Path, args: &Args) -> Result<UnixStream, UpgradeError> {
    let failed = |source| UpgradeError::Connect {
        path: path.to_owned(),
        source,
    };
    let socket = connect_in_time(path, ANSWER_TIME).map_err(failed)?;
    let Peer { uid, .. } = Peer::of(&socket).map_err(failed)?;
    let own = own_user();
    let later = args.user.map(|user| user.user);
    if uid != 0 && uid != own && Some(uid) != later {
        let path = path.to_owned();
        return Err(UpgradeError::Stranger { path, uid });
    }
    Ok(socket)
}

/// Comes to terms. Returns where the sockets of front-ends and of control clients are, if
/// they were made.
fn introduce(
    socket: &UnixStream,
    terms: &Terms,
    receive: impl Fn(Duration) -> Result<Reader, UpgradeError>,
) -> Result<[Option<PathBuf>; 2], UpgradeError> {
    let mut hello = Writer::default();
    hello.u32(VERSION);
    terms.write(&mut hello);
    hello.send(socket, kind::HELLO, ANSWER_TIME)?;
    let mut welcome = expect(receive(ANSWER_TIME)?, kind::WELCOME)?;
    let mut path = || {
        let path = welcome.optional(read_path)?;
        // Another one would be looked up from here.
        Ok::<_, UpgradeError>(path.filter(|path| path.is_absolute()))
    };
    let paths = [path()?, path()?];
    welcome.end()?;
    Ok(paths)
}

/// The message, if it is of this kind.
fn expect(mut message: Reader, kind: u32) -> Result<Reader, UpgradeError> {
    if message.kind == kind {
        return Ok(message);
    }
    if message.kind == kind::REFUSED {
        let why = message.text()?;
        return Err(UpgradeError::Refused(
            String::from_utf8_lossy(&why).into_owned(),
        ));
    }
    Err(ParcelError::Invalid("a message out of order").into())
}
