//! The main thread: waits for front-ends, for their end, and for the signal to
//! end the program. Never blocks on a front-end.
//!
//! One front-end is served at a time, since two guests on one disk would destroy
//! it. While one is, whoever else connects is turned away at once: a program that waits
//! for an answer may stand still, as QEMU's main loop does with the guest in it. Only
//! when the one has hung up, and its last requests are being completed, does the next
//! one wait, for a short time. One that connects and says nothing (QEMU does while it
//! prepares a guest's memory) keeps nobody else from being served, and nothing here but
//! a descriptor for a while.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use super::signals::Signals;
use super::socket::ServerSocket;
use crate::device::{BlockDevice, Connection, Parked, has_spoken};
use crate::storage::Disk;

/// How long to wait after a front-end could not be accepted: what was missing,
/// descriptors or threads, is not there again at once.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// How long a front-end may be silent after it has connected.
const SILENCE: Duration = Duration::from_secs(60);

/// How long one that wants to be served may have to wait for the end of the one before.
const TURN: Duration = Duration::from_secs(5);

/// How many may wait at a time. One more, and the first of them has to go.
const MAX_WAITING: usize = 16;

/// Events of the main loop.
mod event {
    pub const SIGNAL: u32 = 0;
    pub const FRONT_END: u32 = 1;
    pub const CONNECTION_ENDED: u32 = 2;
    pub const SPOKEN: u32 = 3;
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
        waiting: VecDeque::new(),
        connection: None,
        outcome: None,
    });
    let mut waited = Ok(0);
    while waited.is_ok() && manager.subscriber_mut(id)?.outcome.is_none() {
        let at_most = manager.subscriber_mut(id)?.time_left_ms();
        waited = manager.run_with_timeout(at_most);
        while let Some(socket) = manager.subscriber_mut(id)?.take_overdue() {
            manager.event_ops(id)?.remove(Events::empty(&socket))?;
        }
    }
    let main_loop = manager.remove_subscriber(id)?;
    if let Some(connection) = main_loop.connection {
        connection.stop(Parked::Fail);
    }
    waited?;
    main_loop.outcome.unwrap_or(Ok(()))
}

/// A front-end that has connected and is not served yet.
struct Waiting {
    socket: UnixStream,
    until: Instant,
}

struct MainLoop<'a, D: Disk> {
    device: Arc<BlockDevice<D>>,
    socket: &'a ServerSocket,
    signals: &'a Signals,
    /// The oldest first.
    waiting: VecDeque<Waiting>,
    connection: Option<Connection>,
    /// Of the loop, when it is to end.
    outcome: Option<Result<(), event_manager::Error>>,
}

impl<D: Disk> MainLoop<'_, D> {
    fn handle(&mut self, events: Events, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        match events.data() {
            event::SIGNAL => {
                log::info!("shutting down");
                self.outcome = Some(Ok(()));
                Ok(())
            }
            event::FRONT_END => self.accept(ops),
            event::SPOKEN => self.hear(events.fd(), ops),
            event::CONNECTION_ENDED => self.forget_connection(ops),
            _ => Ok(()),
        }
    }

    fn accept(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let socket = match self.socket.listener().accept() {
            Ok((socket, _)) => socket,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => {
                log::error!("a front-end cannot be accepted: {error}");
                thread::sleep(RETRY_DELAY);
                return Ok(());
            }
        };
        if self.is_busy() {
            self.device.tell_of_other(&socket);
            return Ok(());
        }
        if self.waiting.len() >= MAX_WAITING
            && let Some(oldest) = self.leave(0)
        {
            ops.remove(Events::empty(&oldest))?;
        }
        // Told once for each piece that comes: the first may be less than a message.
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        ops.add(Events::with_data(&socket, event::SPOKEN, events))?;
        self.waiting.push_back(Waiting {
            socket,
            until: Instant::now() + SILENCE,
        });
        Ok(())
    }

    /// Whether a front-end is being served that has not hung up.
    fn is_busy(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(Connection::has_front_end)
    }

    /// Something has come from one that waits.
    fn hear(&mut self, fd: RawFd, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let is_it = |one: &Waiting| one.socket.as_raw_fd() == fd;
        let Some(position) = self.waiting.iter().position(is_it) else {
            return Ok(());
        };
        let spoken = has_spoken(&self.waiting[position].socket);
        let is_busy = self.is_busy();
        match spoken {
            Ok(false) => return Ok(()),
            Ok(true) if self.connection.is_some() && !is_busy => {
                let turn = Instant::now() + TURN;
                let one = &mut self.waiting[position];
                one.until = one.until.min(turn);
                return Ok(());
            }
            Ok(true) | Err(_) => {}
        }
        let Some(Waiting { socket, .. }) = self.waiting.remove(position) else {
            return Ok(());
        };
        ops.remove(Events::empty(&socket))?;
        if is_busy {
            self.device.tell_of_other(&socket);
        } else if spoken.is_ok() {
            self.serve(socket, ops)?;
        }
        Ok(())
    }

    fn serve(
        &mut self,
        socket: UnixStream,
        ops: &mut EventOps,
    ) -> Result<(), event_manager::Error> {
        match Connection::start(Arc::clone(&self.device), socket) {
            Ok(connection) => {
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
        }
        // Who has spoken meanwhile is not told of again.
        let fds: Vec<_> = self
            .waiting
            .iter()
            .map(|one| one.socket.as_raw_fd())
            .collect();
        fds.into_iter().try_for_each(|fd| self.hear(fd, ops))
    }

    /// How long to wait for events, in the event manager's terms.
    fn time_left_ms(&self) -> i32 {
        let Some(first) = self.waiting.iter().map(|one| one.until).min() else {
            return -1;
        };
        let left = first.saturating_duration_since(Instant::now());
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    }

    /// One that is not waited for any more; to be hung up on.
    fn take_overdue(&mut self) -> Option<UnixStream> {
        let now = Instant::now();
        let overdue = self.waiting.iter().position(|one| one.until <= now)?;
        self.leave(overdue)
    }

    fn leave(&mut self, position: usize) -> Option<UnixStream> {
        let Waiting { socket, .. } = self.waiting.remove(position)?;
        self.device.tell_of_silent(&socket);
        Some(socket)
    }

    fn front_end_events(&self) -> Events {
        Events::with_data(self.socket, event::FRONT_END, EventSet::IN)
    }
}

fn ended_events(connection: &Connection) -> Events {
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
        if let Err(error) = self.handle(events, ops) {
            self.outcome = Some(Err(error));
        }
    }
}
