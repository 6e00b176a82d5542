//! All that ask for metrics.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use event_manager::{Error, EventOps, Events};

use super::client::{Client, Stay};
use super::page::{Names, page};
use crate::control::subject::Subject;
use crate::headroom;

/// Most clients at a time.
const MAX_CLIENTS: usize = 16;

/// See the module's text.
pub(in crate::control) struct Server {
    names: Names,
    /// In the order in which they have come.
    clients: VecDeque<Client>,
    /// By which their events are known in the main loop.
    data: u32,
}

impl Server {
    /// Nobody yet. The main loop knows their events by `data`.
    pub fn new(names: Names, data: u32) -> Self {
        Self {
            names,
            clients: VecDeque::new(),
            data,
        }
    }

    /// What is waited for when a main loop begins.
    pub fn first_events(&self) -> impl Iterator<Item = Events> {
        self.clients.iter().map(|client| client.events(self.data))
    }

    /// One more has connected. Where there are too many, the first has to go: who means it
    /// has his answer by then.
    ///
    /// # Errors
    /// Any of `epoll_ctl(2)` that is not about this client.
    pub fn admit(&mut self, socket: OwnedFd, ops: &mut EventOps) -> Result<(), Error> {
        if self.clients.len() >= MAX_CLIENTS
            && let Some(first) = self.clients.pop_front()
        {
            ops.remove(Events::empty(&first))?;
        }
        let client = Client::new(socket);
        match ops.add(client.events(self.data)) {
            Ok(()) => self.clients.push_back(client),
            Err(error) => log::debug!("a client for metrics cannot be served: {error}"),
        }
        Ok(())
    }

    /// Something is to be done for the client with that descriptor.
    ///
    /// # Errors
    /// See [`Self::admit`].
    pub fn serve(
        &mut self,
        fd: RawFd,
        subject: &dyn Subject,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        let mut clients = self.clients.iter();
        let Some(at) = clients.position(|client| client.as_raw_fd() == fd) else {
            return Ok(());
        };
        let client = &mut self.clients[at];
        let stay = match headroom::check() {
            Ok(()) => client.serve(&|format| page(&self.names, subject, format)),
            Err(error) => {
                log::error!("a client for metrics cannot be served: {error}");
                Stay::Goes
            }
        };
        let stays = stay == Stay::Stays && ops.modify(client.events(self.data)).is_ok();
        if !stays && let Some(client) = self.clients.remove(at) {
            ops.remove(Events::empty(&client))?;
        }
        Ok(())
    }

    /// When [`Self::take_overdue`] has something to give.
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.iter().map(Client::until).min()
    }

    /// Those that have been there for too long; to be hung up on.
    pub fn take_overdue(&mut self) -> Vec<Client> {
        let now = Instant::now();
        // All have the same time: the first that came are the first to go.
        let overdue = self.clients.partition_point(|client| client.until() <= now);
        self.clients.drain(..overdue).collect()
    }
}
