//! The daemon around the device: command line, sockets, signals, main loop.
//!
//! Opens the floors below in order, serves, and closes them in reverse. Knows
//! sockets' paths, descriptors and signals. Must not know virtio requests or what
//! is in an image.

pub mod args;
mod asker;
mod bound;
mod caretaker;
mod deadline;
mod holding;
mod jobs;
mod lock_keeper;
mod logging;
mod main_loop;
mod metrics;
mod place;
pub mod qmp;
mod question;
mod reach;
mod sandbox;
mod served;
mod signals;
mod socket;
mod subject;
mod upgrade;

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use thiserror::Error;

pub use args::{Args, LockTime};
pub use asker::{AskError, Asker, JobEnd};
pub use logging::{LogFormat, Logging};
pub use metrics::MetricsAddress;
#[cfg(fuzzing)]
pub use metrics::fuzzing;
pub use place::{
    Place as ControlPlace, all as control_places, file_id, find as find_control_socket,
    find_likely as find_likely_control_socket,
};
pub use sandbox::{RunAs, Sandbox, SandboxError, SandboxOptions, SeccompMode};
pub use signals::Signals;
pub use socket::{ServerSocket, SocketAccess, SocketError};
pub use subject::{Level, Subject};
pub use upgrade::UpgradeError;

use crate::device::{ConnectionError, LimitsError, LogicalBlockError, QueuesError};
use crate::format::Sector;
use crate::image::{self, Access, ImageError, OpenMode};
use crate::ploop::{EngineError, OpenError};
use crate::storage::lock::LockError;
use crate::storage::{Aio, ease_limits, start_maker};
use main_loop::{Carried, Desk, Left};
use metrics::Names;
use sandbox::Reached;
use served::Image;
use upgrade::{Given, Taken, Terms, folder_of};

/// The length of rings that QEMU's vhost-user-blk has unless told otherwise.
const QEMU_QUEUE_SIZE: u16 = 128;

/// Why the daemon ends with a failure.
#[derive(Debug, Error)]
pub enum Error {
    /// The image is not there, not an image, or in use.
    #[error("cannot open the image")]
    Image(#[from] ImageError),
    /// The image cannot be served.
    #[error("cannot serve {}", path.display())]
    Engine {
        /// As given.
        path: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// The image is to be opened again when a ring runs, and could not be.
    #[error("cannot open {} with the rights that this process keeps", path.display())]
    OpenAgain {
        /// One of its files.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process that takes over finds the image locked.
    #[error("--lock=running does not go with --upgrade-socket and --take-over")]
    UnlockedUpgrade,
    /// Threads, rings or descriptors could not be made.
    #[error("cannot set up I/O")]
    Setup(#[source] io::Error),
    /// There is nothing to listen on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// An address is no file.
    #[error("--metrics-mode and --metrics-group are for --metrics=unix:PATH, not for {0}")]
    NoFile(SocketAddr),
    /// The queues cannot be as asked for.
    #[error(transparent)]
    Queues(#[from] QueuesError),
    /// The disk has no whole number of blocks.
    #[error(transparent)]
    LogicalBlock(#[from] LogicalBlockError),
    /// Limits that cannot be.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// The process has more rights than it should.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The main loop has failed.
    #[error("the main loop failed")]
    MainLoop(#[from] event_manager::Error),
    /// The front-end of another process cannot be served.
    #[error(transparent)]
    Connection(ConnectionError),
    /// Nothing was taken over from another process, which goes on.
    #[error("cannot take over")]
    Upgrade(#[from] UpgradeError),
    /// Another process uses the image that this one has served.
    #[error("the image is in use")]
    Lock(#[source] LockError),
    /// A server has taken the lock on the image away.
    #[error("the lock on the image is lost: another host may use it")]
    LockLost,
    /// The same before anybody looked after it.
    #[error(
        "the lock on {} was taken away while the image was opened: another host may use it",
        .0.display()
    )]
    LockGone(PathBuf),
    /// The lock on the image was lost, and now it can be opened anew; or it is to be opened since
    /// a ring is to run, and is not what it was at the start. Not by this process: it
    /// may open no more than the files that it had from the start, which may have been those of
    /// another mount (Landlock knows files, not paths). And what one that starts does is what
    /// has to be done: it locks the image or does not, reads all anew, and goes on with a guest
    /// whose memory fits.
    #[error(
        "the storage of the image is there again, or another one is: a new process has to open it"
    )]
    StorageBack,
    /// Not everything could be made stable at the end.
    #[error("the image was not closed cleanly; it will be checked when it is next opened")]
    Close(#[source] EngineError),
}

/// Exit status with [`Error::StorageBack`]: that of who may be tried again (`EX_TEMPFAIL` of
/// sysexits.h).
const STORAGE_BACK: u8 = 75;

impl Error {
    /// What the program is to end with.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::StorageBack => STORAGE_BACK,
            _ => deadline::NOT_CLOSED,
        }
    }
}

/// Serves what the command line names until SIGTERM or SIGINT, and closes it; or until
/// another process has taken over.
///
/// # Errors
/// See [`enum@Error`]. The image is closed as well as it can be before any is returned.
pub fn run(args: &Args, sandbox: &Sandbox) -> Result<(), Error> {
    let signals = Signals::catch().map_err(Error::Setup)?;
    ease_limits();
    // Who is confined does not know its folder.
    let names = Names::of(args);
    // Who is confined cannot see what a control group allows.
    let cpus = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let locks_for_rings = args.lock == LockTime::Running;
    if locks_for_rings && args.can_be_upgraded() {
        return Err(Error::UnlockedUpgrade);
    }
    let access = if args.is_read_only() || locks_for_rings {
        Access::Read
    } else {
        Access::Serve
    };
    let mode = OpenMode::new(access)
        .snapshot(args.snapshot)
        .force_share(locks_for_rings)
        .share_locks(args.take_over.is_some())
        .outlasts_the_dead();
    let image = image::open(&args.blk_file, mode)?;
    let image = Image::new(image, !args.is_read_only()).map_err(Error::Setup)?;
    if let Some(limits) = args.throttle {
        image.throttle().begin_with(limits)?;
    }
    let taken = match &args.take_over {
        Some(path) => upgrade::take_over(path, image, (args, cpus), sandbox, &signals)?,
        None => begin(image, args, cpus, sandbox)?,
    };
    log::info!("{}", ready(args, taken.served.device().disk_size()));
    serve(taken, names, args, cpus, &signals)
}

/// Opens the image and makes the sockets.
fn begin(mut image: Image, args: &Args, cpus: usize, sandbox: &Sandbox) -> Result<Taken, Error> {
    let control = control_socket(args, &image);
    let sockets = [
        args.socket_path.as_deref(),
        args.upgrades(),
        control.as_ref().map(|control| control.path.as_path()),
        args.metrics.as_ref().and_then(MetricsAddress::path),
    ];
    let folders: Vec<_> = sockets.into_iter().flatten().map(folder_of).collect();
    // Whoever is confined has no network, and only root has the low ports.
    let network = bind_network(args)?;
    let opens_again = args.lock == LockTime::Running;
    let folder = opens_again.then(|| image.folder(args)).transpose();
    let folder = folder.map_err(Error::Setup)?.flatten();
    sandbox.become_user()?;
    if opens_again {
        image.set_writable(args);
    }
    image.start_caretaker(args, sandbox)?;
    let files = Reached {
        files: image.files(),
        bundle: folder.as_ref(),
    };
    sandbox.confine(files, &folders, args.gives_sockets_away())?;
    start_ring_maker(args)?;
    let terms = args
        .can_be_upgraded()
        .then(|| Terms::of(args, image.files()));
    let terms = terms.transpose().map_err(Error::Setup)?;
    let served = if opens_again {
        image.serve_rings(args, cpus)?
    } else {
        let disk = image.disk(args)?;
        image.serve(disk, args, cpus)?
    };
    let opened = open_doors(args, control, network).and_then(|mut doors| {
        doors.terms = terms;
        sandbox.settle()?;
        Ok(doors)
    });
    match opened {
        Ok(doors) => {
            warn_of_small_rings(args.queue_size);
            Ok(Taken {
                image,
                served,
                doors,
                carried: Carried::default(),
                room: None,
            })
        }
        Err(error) => {
            // Before the locks go.
            let closed = served.close();
            drop(image);
            closed.and(Err(error))
        }
    }
}

/// To be called before the right to make rings is given up.
fn start_ring_maker(args: &Args) -> Result<(), Error> {
    match args.host_options().aio {
        Aio::Psync => Ok(()),
        Aio::Auto | Aio::IoUring => start_maker().map_err(Error::Setup),
    }
}

/// Serves until a signal comes or another process has taken over.
fn serve(
    taken: Taken,
    names: Names,
    args: &Args,
    cpus: usize,
    signals: &Signals,
) -> Result<(), Error> {
    let Taken {
        mut image,
        mut served,
        mut doors,
        mut carried,
        room,
    } = taken;
    let mut desk = Desk::new(Arc::clone(image.notices()), names);
    drop(room);
    let left = loop {
        let disk = (&mut served, &mut image);
        match main_loop::run(disk, &mut doors, signals, carried, &mut desk) {
            Ok(Left::For(successor, left)) => {
                let host = (args, cpus);
                let given = upgrade::hand_over(
                    &successor, served, left, &mut image, &mut doors, host, signals,
                )?;
                match given {
                    Given::Away => return Ok(()),
                    Given::Kept(kept, left) => (served, carried) = (*kept, left),
                }
            }
            Ok(Left::Signalled) => break Ok(()),
            Ok(Left::StorageBack) => break Err(Error::StorageBack),
            Err(error) => break Err(Error::from(error)),
        }
    };
    // Whatever happened: the image is closed, and only then its locks go.
    let closed = served.close();
    drop(image);
    // Clients and sockets go last, so that who finds them gone finds the image free.
    left?;
    closed
}

/// Where others come from.
pub(crate) struct Doors {
    front_ends: ServerSocket,
    /// For processes that take over.
    upgrades: Option<ServerSocket>,
    /// For programs that ask, watch and steer.
    control: Option<ServerSocket>,
    /// For programs that ask for metrics.
    metrics: Option<ServerSocket>,
    /// What a process that takes over has to agree to. It is known before anybody is served:
    /// nothing may fail any more when another process has given its place.
    terms: Option<Terms>,
    /// Who may take over, besides root. It cannot be asked for later.
    user: u32,
}

impl Doors {
    /// Leaves the sockets' files to another process, which may not know of metrics.
    fn leave(&mut self, knows_metrics: bool) {
        self.front_ends.leave();
        let metrics = self.metrics.as_mut().filter(|_| knows_metrics);
        let others = [self.upgrades.as_mut(), self.control.as_mut(), metrics];
        others.into_iter().flatten().for_each(ServerSocket::leave);
    }
}

/// Where control clients are to connect.
struct ControlSocket {
    path: PathBuf,
    /// The disk is served in any case.
    is_optional: bool,
}

/// As the command line says, or where others look for it.
fn control_socket(args: &Args, image: &Image) -> Option<ControlSocket> {
    match &args.control {
        Some(path) if path.as_os_str() == NO_CONTROL => None,
        Some(path) => Some(ControlSocket {
            path: path.clone(),
            is_optional: false,
        }),
        None => match place::make(image.files(), args.sandbox_options().run_as) {
            Ok(path) => path.map(|path| ControlSocket {
                path,
                is_optional: true,
            }),
            Err(error) => {
                log::warn!("cannot make a control socket in the run-time folder: {error}");
                None
            }
        },
    }
}

/// In the place of a path: none is wanted.
const NO_CONTROL: &str = "none";

fn bind_control(args: &Args, control: &ControlSocket) -> Result<Option<ServerSocket>, SocketError> {
    match ServerSocket::bind(&control.path, args.control_access()) {
        Ok(socket) => Ok(Some(socket)),
        // Another one serves the same image for reading, most likely.
        Err(error) if control.is_optional => {
            log::warn!("running without a control socket: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The socket for metrics, if it is reached by network.
fn bind_network(args: &Args) -> Result<Option<ServerSocket>, Error> {
    let Some(MetricsAddress::Tcp(address)) = args.metrics else {
        return Ok(None);
    };
    if args.metrics_mode.is_some() || args.metrics_group.is_some() {
        return Err(Error::NoFile(address));
    }
    let (socket, address) = ServerSocket::bind_tcp(address)?;
    log::info!("metrics are at http://{address}/metrics");
    if !address.ip().is_loopback() {
        log::warn!("whoever can reach {address} can read the metrics");
    }
    Ok(Some(socket))
}

fn open_doors(
    args: &Args,
    control: Option<ControlSocket>,
    network: Option<ServerSocket>,
) -> Result<Doors, Error> {
    let upgrades = args.upgrade_socket.as_deref();
    let upgrades = upgrades.map(|path| ServerSocket::bind(path, SocketAccess::PRIVATE));
    let upgrades = upgrades.transpose()?;
    let control = control.map(|control| bind_control(args, &control));
    let control = control.transpose()?.flatten();
    let metrics = args.metrics.as_ref().and_then(MetricsAddress::path);
    let metrics = metrics.map(|path| ServerSocket::bind(path, args.metrics_access()));
    let metrics = metrics.transpose()?.or(network);
    // Last: who sees it finds the others, too.
    let front_ends = open_socket(args)?;
    Ok(Doors {
        front_ends,
        upgrades,
        control,
        metrics,
        terms: None,
        user: own_user(),
    })
}

/// What went wrong, and why.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    for cause in std::iter::successors(error.source(), |&cause| cause.source()) {
        let cause = cause.to_string();
        // Some say their cause themselves.
        if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// QEMU's guest makes its rings as QEMU says, not as this program would accept them.
fn warn_of_small_rings(queue_size: u16) {
    if queue_size < QEMU_QUEUE_SIZE {
        log::warn!(
            "--queue-size {queue_size} is smaller than QEMU's default of {QEMU_QUEUE_SIZE}: a guest \
             hangs at boot unless its device has queue-size={queue_size} too"
        );
    }
}

/// What is served, to whom, and by what.
fn ready(args: &Args, size: Sector) -> String {
    let socket = match (&args.socket_path, args.fd, &args.take_over) {
        (None, Some(fd), _) => format!("descriptor {fd}"),
        (None, None, Some(path)) => format!("the sockets of {}", path.display()),
        (path, ..) => path
            .as_deref()
            .unwrap_or(Path::new(""))
            .display()
            .to_string(),
    };
    format!(
        "ready: {} listens on {socket} and serves {}, {} bytes, {}",
        concat!("vhost-user-ploop ", env!("CARGO_PKG_VERSION")),
        args.blk_file.display(),
        size.bytes(),
        if args.is_read_only() {
            "read-only"
        } else {
            "read-write"
        },
    )
}

fn open_socket(args: &Args) -> Result<ServerSocket, SocketError> {
    match (&args.socket_path, args.fd) {
        (Some(path), _) => ServerSocket::bind(path, args.socket_access()),
        // SAFETY: who started this program gave it the descriptor; nothing here
        // has heard of it before.
        (None, fd) => unsafe { ServerSocket::from_inherited(fd.unwrap_or(NO_DESCRIPTOR)) },
    }
}

/// What the command line cannot lead to, as it asks for one of the two.
const NO_DESCRIPTOR: RawFd = -1;
