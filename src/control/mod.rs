//! The daemon around the device: command line, socket, signals, main loop.
//!
//! Opens the floors below in order, serves, and closes them in reverse. Knows
//! sockets' paths, descriptors and signals. Must not know virtio requests or what
//! is in an image.

pub mod args;
mod logging;
mod main_loop;
mod signals;
mod socket;

use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

pub use args::Args;
pub use logging::{LogFormat, Logging};
pub use main_loop::run as serve_until_signal;
pub use signals::Signals;
pub use socket::{ServerSocket, SocketAccess, SocketError};

use crate::device::{BlockDevice, LogicalBlockError, Queues, QueuesError};
use crate::format::Sector;
use crate::image::{self, Access, ImageError, OpenMode};
use crate::ploop::{Engine, EngineError, OpenError, Running};
use crate::storage::{HostDisk, ease_limits};

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
    /// Threads, rings or descriptors could not be made.
    #[error("cannot set up I/O")]
    Setup(#[source] io::Error),
    /// There is nothing to listen on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The queues cannot be as asked for.
    #[error(transparent)]
    Queues(#[from] QueuesError),
    /// The disk has no whole number of blocks.
    #[error(transparent)]
    LogicalBlock(#[from] LogicalBlockError),
    /// The main loop has failed.
    #[error("the main loop failed")]
    MainLoop(#[from] event_manager::Error),
    /// Not everything could be made stable at the end.
    #[error("the image was not closed cleanly; it will be checked when it is next opened")]
    Close(#[source] EngineError),
}

/// Serves what the command line names until SIGTERM or SIGINT, and closes it.
///
/// # Errors
/// See [`enum@Error`]. The image is closed as well as it can be before any is returned.
pub fn run(args: &Args) -> Result<(), Error> {
    let signals = Signals::catch().map_err(Error::Setup)?;
    ease_limits();
    let access = if args.is_read_only() {
        Access::Read
    } else {
        Access::Serve
    };
    let image = image::open(
        &args.blk_file,
        OpenMode::new(access).snapshot(args.snapshot),
    )?;
    let disk = HostDisk::new(image.files, args.host_options()).map_err(Error::Setup)?;
    disk.watch_files().map_err(Error::Setup)?;
    let opened = Engine::open(disk, &image.chain, args.engine_options());
    let opened = opened.map_err(|source| Error::Engine {
        path: args.blk_file.clone(),
        source,
    })?;
    let running = Running::start(opened).map_err(Error::Setup)?;
    let served = serve(args, &running, &signals);
    // Whatever happened: the image is closed, and only then its locks go.
    let closed = running.close().map_err(Error::Close);
    drop(image.locks);
    // The socket goes last, so that who finds it gone finds the image free.
    let _socket = served?;
    closed
}

/// Serves until a signal comes. Gives the socket back, for its time to go.
fn serve(
    args: &Args,
    running: &Running<HostDisk>,
    signals: &Signals,
) -> Result<ServerSocket, Error> {
    let queues = Queues::new(args.num_queues, args.queue_size)?;
    let engine = Arc::clone(running.engine());
    let device = BlockDevice::new(engine, args.serial_number(), queues)
        .with_poll(args.longest_poll())
        .with_logical_block(args.logical_block_size)?;
    warn_of_small_rings(args.queue_size);
    let socket = open_socket(args)?;
    log::info!("{}", ready(args, running.engine().disk_size()));
    main_loop::run(Arc::new(device), &socket, signals)?;
    Ok(socket)
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
    let socket = match (&args.socket_path, args.fd) {
        (None, Some(fd)) => format!("descriptor {fd}"),
        (path, _) => path
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
