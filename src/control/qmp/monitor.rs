//! All clients of the control socket.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use event_manager::{Error, EventOps, Events};

use super::client::{Client, Stay};
use super::commands::Wish;
use super::event::Event;
use super::subject::Subject;

/// Most clients at a time. What each can make the process hold is bounded, too.
const MAX_CLIENTS: usize = 16;

/// See the module's text.
pub(in crate::control) struct Monitor {
    clients: Vec<Client>,
    /// By which their events are known in the main loop.
    data: u32,
}

impl Monitor {
    /// None yet. The main loop knows their events by `data`.
    pub fn new(data: u32) -> Self {
        let clients = Vec::new();
        Self { clients, data }
    }

    /// What is waited for when a main loop begins.
    pub fn first_events(&self) -> impl Iterator<Item = Events> {
        self.clients.iter().map(|client| client.events(self.data))
    }

    /// One more has connected.
    ///
    /// # Errors
    /// Any of `epoll_ctl(2)` that is not about this client.
    pub fn admit(
        &mut self,
        socket: UnixStream,
        subject: &dyn Subject,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        if self.clients.len() >= MAX_CLIENTS {
            log::warn!("a control client is turned away: there are {MAX_CLIENTS} already");
            return Ok(());
        }
        let client = match Client::new(socket) {
            Ok(client) => client,
            Err(error) => {
                log::warn!("a control client cannot be served: {error}");
                return Ok(());
            }
        };
        let fd = client.as_raw_fd();
        if let Err(error) = ops.add(client.events(self.data)) {
            log::warn!("a control client cannot be served: {error}");
            return Ok(());
        }
        self.clients.push(client);
        // Greets it. It can have said nothing that ends the program yet.
        self.serve(fd, subject, ops).map(drop)
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
    ) -> Result<Wish, Error> {
        let is_it = |client: &Client| client.as_raw_fd() == fd;
        let Some(at) = self.clients.iter().position(is_it) else {
            return Ok(Wish::Nothing);
        };
        let (stay, wish) = self.clients[at].serve(subject);
        self.go_on(at, stay, ops)?;
        Ok(wish)
    }

    /// Tells all that have introduced themselves.
    ///
    /// # Errors
    /// See [`Self::admit`].
    pub fn tell(&mut self, event: &Event, ops: &mut EventOps) -> Result<(), Error> {
        let line = event.line();
        // From the last one on: it takes the place of one that goes.
        for at in (0..self.clients.len()).rev() {
            let stay = self.clients[at].tell(&line);
            if stay == Stay::Goes {
                log::warn!("a control client is hung up on: it does not read");
            }
            self.go_on(at, stay, ops)?;
        }
        Ok(())
    }

    /// When [`Self::take_stalled`] has something to give.
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.iter().filter_map(Client::until).min()
    }

    /// Those that have read nothing for too long; to be hung up on.
    pub fn take_stalled(&mut self) -> Vec<Client> {
        let now = Instant::now();
        let is_stalled = |client: &Client| client.until().is_some_and(|until| until <= now);
        let (stalled, rest) = std::mem::take(&mut self.clients)
            .into_iter()
            .partition(is_stalled);
        self.clients = rest;
        stalled
    }

    /// Waits from now on for what this client needs, or hangs up on it.
    fn go_on(&mut self, at: usize, stay: Stay, ops: &mut EventOps) -> Result<(), Error> {
        let stays = stay == Stay::Stays && ops.modify(self.clients[at].events(self.data)).is_ok();
        if !stays {
            let client = self.clients.swap_remove(at);
            ops.remove(client.events(self.data))?;
        }
        Ok(())
    }
}
