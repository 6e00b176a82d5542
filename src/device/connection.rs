//! One front-end, from its connection to its end.
//!
//! The library's daemon serves a connection on a thread of its own and starts one
//! thread per queue. It can serve one connection only (a second `SET_OWNER` fails),
//! so each front-end gets a new one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::thread::{self, JoinHandle};

use log::Level;
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;
use vhost::vhost_user::{Error as VhostError, Listener};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};

use super::BlockDevice;
use super::backend::Backend;
use super::gate::Parked;
use super::ratelimit::{guest_log, log_line};
use crate::storage::Disk;

/// Name of the thread that serves the messages of a front-end.
const MESSAGES_THREAD: &str = "messages";

/// Name of the thread that takes a connection down when it has ended.
const SUPERVISOR_THREAD: &str = "connection";

/// Why a front-end cannot be served.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// No descriptors or threads are left, most likely.
    #[error("what a connection needs cannot be made")]
    Resources(#[from] io::Error),
    /// The library says so.
    #[error("the connection cannot be served: {0}")]
    Daemon(DaemonError),
    /// It ended before it was served.
    #[error("the connection ended before it was served")]
    Ended,
}

impl From<DaemonError> for ConnectionError {
    fn from(error: DaemonError) -> Self {
        Self::Daemon(error)
    }
}

type Daemon<D> = VhostUserDaemon<Arc<Backend<D>>>;

/// A front-end that is being served. Dropping it stops it, as [`Self::stop`] does
/// with [`Parked::Drop`].
pub struct Connection<D: Disk> {
    backend: Arc<Backend<D>>,
    shutdown: ShutdownHandle,
    /// Taken when it is joined.
    supervisor: Option<JoinHandle<()>>,
    ended: Arc<OwnedFd>,
}

impl<D: Disk> Connection<D> {
    /// Accepts the next connection of `listener`, which must be in blocking mode
    /// and should be readable, and starts to serve it.
    ///
    /// # Errors
    /// See [`ConnectionError`].
    pub fn accept(
        device: Arc<BlockDevice<D>>,
        listener: &UnixListener,
    ) -> Result<Self, ConnectionError> {
        let listener = Listener::from(listener.try_clone()?);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let ended = Arc::new(eventfd(0, flags).map_err(io::Error::from)?);
        let (tell, told) = mpsc::sync_channel(1);
        let supervisor = thread::Builder::new()
            .name(SUPERVISOR_THREAD.to_owned())
            .spawn({
                let ended = Arc::clone(&ended);
                move || {
                    supervise(device, listener, &tell);
                    // It can only fail when the descriptor is readable anyway.
                    let _ = rustix::io::write(&ended, &1_u64.to_ne_bytes());
                }
            })?;
        let started = told.recv().unwrap_or(Err(ConnectionError::Ended))?;
        Ok(Self {
            backend: started.backend,
            shutdown: started.shutdown,
            supervisor: Some(supervisor),
            ended,
        })
    }

    /// A descriptor that is readable once the front-end has gone and all that
    /// served it has been taken down.
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Completes what is in flight, hangs up, and waits until all is taken down.
    pub fn stop(mut self, parked: Parked) {
        self.take_down(parked);
    }

    fn take_down(&mut self, parked: Parked) {
        let Some(supervisor) = self.supervisor.take() else {
            return;
        };
        // In this order, so that the front-end finds every answer in the rings
        // when it notices that we are gone.
        self.backend.close(parked);
        self.shutdown.shutdown();
        if supervisor.join().is_err() {
            log_line(
                Level::Error,
                0,
                format_args!("a connection ended in a panic"),
            );
        }
    }
}

impl<D: Disk> Drop for Connection<D> {
    fn drop(&mut self) {
        self.take_down(Parked::Drop);
    }
}

/// What is needed to end a connection from outside.
struct Started<D: Disk> {
    backend: Arc<Backend<D>>,
    shutdown: ShutdownHandle,
}

/// Serves a connection to its end.
fn supervise<D: Disk>(
    device: Arc<BlockDevice<D>>,
    listener: Listener,
    tell: &SyncSender<Result<Started<D>, ConnectionError>>,
) {
    let (mut daemon, started) = match start(Arc::clone(&device), listener) {
        Ok(started) => started,
        Err(error) => {
            let _ = tell.send(Err(error));
            return;
        }
    };
    let backend = Arc::clone(&started.backend);
    let _ = tell.send(Ok(started));
    guest_log!(device.host_limit(), Info, "a front-end has connected");
    match daemon.wait() {
        Ok(())
        | Err(DaemonError::HandleRequest(VhostError::Disconnected | VhostError::PartialMessage)) => {
            guest_log!(device.host_limit(), Info, "the front-end has disconnected");
        }
        Err(error) => {
            guest_log!(
                device.host_limit(),
                Error,
                "the connection was ended: {error}"
            );
        }
    }
    backend.close(Parked::Drop);
    // Waits for the queue threads.
    drop(daemon);
}

/// Makes the threads of a connection and accepts it.
fn start<D: Disk>(
    device: Arc<BlockDevice<D>>,
    mut listener: Listener,
) -> Result<(Daemon<D>, Started<D>), ConnectionError> {
    let backend = Arc::new(Backend::new(device)?);
    let mut daemon: Daemon<D> = VhostUserDaemon::new(
        MESSAGES_THREAD.to_owned(),
        Arc::clone(&backend),
        backend.memory(),
    )?;
    if let Err(error) = backend.attach(&daemon.get_epoll_handlers()) {
        // Threads that cannot be woken cannot be waited for either.
        std::mem::forget(daemon);
        return Err(error.into());
    }
    let accepted = daemon.start(&mut listener);
    match (accepted, daemon.shutdown_handle()) {
        (Ok(()), Some(shutdown)) => Ok((daemon, Started { backend, shutdown })),
        (accepted, _) => {
            backend.close(Parked::Drop);
            Err(accepted.map_or_else(ConnectionError::from, |()| ConnectionError::Ended))
        }
    }
}
