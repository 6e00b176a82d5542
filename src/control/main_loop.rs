//! The main thread: waits for front-ends, for their end, and for the signal to
//! end the program.
//!
//! One front-end is served at a time, since two guests on one disk would destroy
//! it. Others wait in the socket's backlog and are served when it has gone, as
//! with QEMU's own exports.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use super::signals::Signals;
use super::socket::ServerSocket;
use crate::device::{BlockDevice, Connection, Parked};
use crate::storage::Disk;

/// How long to wait after a front-end could not be accepted: what was missing,
/// descriptors or threads, is not there again at once.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// Events of the main loop.
mod event {
    pub const SIGNAL: u32 = 0;
    pub const FRONT_END: u32 = 1;
    pub const CONNECTION_ENDED: u32 = 2;
}

/// Serves `device` to one front-end after the other until a signal comes. When it
/// returns, nothing is in flight.
///
/// # Errors
/// Any of `epoll_create(2)`, `epoll_ctl(2)`, `epoll_wait(2)`.
pub fn run<D: Disk>(
    device: Arc<BlockDevice<D>>,
    socket: &ServerSocket,
    signals: &Signals,
) -> Result<(), event_manager::Error> {
    let mut manager = EventManager::new()?;
    let id = manager.add_subscriber(MainLoop {
        device,
        socket,
        signals,
        connection: None,
        outcome: None,
    });
    let mut waited = Ok(0);
    while waited.is_ok() && manager.subscriber_mut(id)?.outcome.is_none() {
        waited = manager.run();
    }
    let main_loop = manager.remove_subscriber(id)?;
    if let Some(connection) = main_loop.connection {
        connection.stop(Parked::Fail);
    }
    waited?;
    main_loop.outcome.unwrap_or(Ok(()))
}

struct MainLoop<'a, D: Disk> {
    device: Arc<BlockDevice<D>>,
    socket: &'a ServerSocket,
    signals: &'a Signals,
    connection: Option<Connection<D>>,
    /// Of the loop, when it is to end.
    outcome: Option<Result<(), event_manager::Error>>,
}

impl<D: Disk> MainLoop<'_, D> {
    fn handle(&mut self, event: u32, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        match event {
            event::SIGNAL => {
                log::info!("asked to end");
                self.outcome = Some(Ok(()));
                Ok(())
            }
            event::FRONT_END => self.accept(ops),
            event::CONNECTION_ENDED => self.forget_connection(ops),
            _ => Ok(()),
        }
    }

    fn accept(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        match Connection::accept(Arc::clone(&self.device), self.socket.listener()) {
            Ok(connection) => {
                ops.remove(self.front_end_events())?;
                ops.add(ended_events(&connection))?;
                self.connection = Some(connection);
            }
            Err(error) => {
                log::error!("a front-end cannot be served: {error}");
                thread::sleep(RETRY_DELAY);
            }
        }
        Ok(())
    }

    fn forget_connection(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        if let Some(connection) = self.connection.take() {
            ops.remove(ended_events(&connection))?;
            connection.stop(Parked::Drop);
            ops.add(self.front_end_events())?;
        }
        Ok(())
    }

    fn front_end_events(&self) -> Events {
        Events::with_data(self.socket, event::FRONT_END, EventSet::IN)
    }
}

fn ended_events<D: Disk>(connection: &Connection<D>) -> Events {
    let fd = connection.ended_fd().as_raw_fd();
    Events::with_data_raw(fd, event::CONNECTION_ENDED, EventSet::IN)
}

impl<D: Disk> MutEventSubscriber for MainLoop<'_, D> {
    fn init(&mut self, ops: &mut EventOps) {
        let signals = Events::with_data(self.signals, event::SIGNAL, EventSet::IN);
        let added = ops
            .add(signals)
            .and_then(|()| ops.add(self.front_end_events()));
        if let Err(error) = added {
            self.outcome = Some(Err(error));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(error) = self.handle(events.data(), ops) {
            self.outcome = Some(Err(error));
        }
    }
}
