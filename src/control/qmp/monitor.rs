//! All clients of the control socket.

use std::cmp::Reverse;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use event_manager::{Error, EventOps, Events};

use serde_json::Value;

use super::allowance::Allowance;
use super::client::{Client, ClientId, Stay};
use super::commands::Wish;
use super::event::Event;
use super::message::Failure;
use crate::control::subject::Subject;
use crate::headroom;
use crate::peer::Peer;
use crate::threads::processor_time;

/// Most clients at a time. What each can make the process hold is bounded, too.
const MAX_CLIENTS: usize = 16;

/// After so long without a word a client loses its place to one that comes when there is no
/// other. Programs keep a connection for days, so this is no limit as long as there are
/// places.
pub(super) const IDLE: Duration = Duration::from_secs(10);

/// See the module's text.
pub(in crate::control) struct Monitor {
    clients: Vec<Client>,
    /// How many there have ever been.
    admitted: u64,
    allowance: Allowance,
    /// By which their events are known in the main loop.
    data: u32,
}

impl Monitor {
    /// None yet. The main loop knows their events by `data`.
    pub fn new(data: u32) -> Self {
        Self {
            clients: Vec::new(),
            admitted: 0,
            allowance: Allowance::default(),
            data,
        }
    }

    /// What is waited for when a main loop begins.
    pub fn first_events(&self) -> impl Iterator<Item = Events> {
        let awake = self
            .clients
            .iter()
            .filter(|client| client.rests_until().is_none());
        awake.map(|client| client.events(self.data))
    }

    /// One more has connected. It is greeted, and what it has sent already is read, when its
    /// first event comes.
    ///
    /// # Errors
    /// Any of `epoll_ctl(2)` that is not about this client.
    pub fn admit(&mut self, socket: UnixStream, ops: &mut EventOps) -> Result<(), Error> {
        let peer = Peer::of(&socket).ok();
        if self.clients.len() >= MAX_CLIENTS {
            self.clients.retain(|client| !client.has_left_at_rest());
        }
        if self.clients.len() >= MAX_CLIENTS {
            match most_idle(&self.clients, peer, Instant::now()) {
                Some(at) => {
                    log::warn!(
                        "disconnecting an idle control client: there are {MAX_CLIENTS} \
                         already, and another one wants to connect"
                    );
                    self.go_on(at, Stay::Goes, ops)?;
                }
                None => {
                    log::warn!("a control client is turned away: there are {MAX_CLIENTS} already");
                    return Ok(());
                }
            }
        }
        self.admitted += 1;
        let mut client = match Client::new(socket, ClientId(self.admitted), peer) {
            Ok(client) => client,
            Err(error) => {
                log::warn!("a control client cannot be served: {error}");
                return Ok(());
            }
        };
        // Who has had a turn and connects anew comes to another one no sooner.
        if let Some(until) = self.allowance.newcomers_wait_until(Instant::now()) {
            client.rest(until);
        } else if let Err(error) = ops.add(client.events(self.data)) {
            log::warn!("a control client cannot be served: {error}");
            return Ok(());
        }
        self.clients.push(client);
        Ok(())
    }

    /// Whether this client is still connected.
    pub fn has(&self, id: ClientId) -> bool {
        self.clients.iter().any(|client| client.id() == id)
    }

    /// Something is to be done for the client with that descriptor. Returns what it wishes
    /// for.
    ///
    /// # Errors
    /// See [`Self::admit`].
    pub fn serve(
        &mut self,
        fd: RawFd,
        subject: &dyn Subject,
        ops: &mut EventOps,
    ) -> Result<Option<(ClientId, Wish)>, Error> {
        let Some(at) = self.at(|client| client.as_raw_fd() == fd) else {
            return Ok(None);
        };
        let resting = self.clients.iter().filter_map(Client::rests_until).count();
        let client = &mut self.clients[at];
        let before = processor_time();
        let (stay, wish) = match has_memory() {
            true => client.serve(subject),
            false => (Stay::Goes, Wish::Nothing),
        };
        let cost = processor_time().saturating_sub(before) + client.take_debt();
        let rests_until = self.allowance.charge(cost, resting, Instant::now());
        let id = client.id();
        match (stay, rests_until) {
            (Stay::Stays, Some(until)) => {
                ops.remove(client.events(self.data))?;
                client.rest(until);
            }
            _ => self.go_on(at, stay, ops)?,
        }
        Ok((wish != Wish::Nothing).then_some((id, wish)))
    }

    /// What was done for this client since its last turn has cost so much of the processor,
    /// which counts when it has the next one.
    pub fn charge(&mut self, id: ClientId, cost: Duration) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.id() == id) {
            client.owe(cost);
        }
    }

    /// Answers the command of this client that waits for it, if the client is still there.
    ///
    /// # Errors
    /// See [`Self::admit`].
    pub fn answer(
        &mut self,
        id: ClientId,
        answer: Result<Value, Failure>,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        match self.at(|client| client.id() == id) {
            Some(at) => {
                let stay = self.clients[at].answer(answer);
                self.go_on(at, stay, ops)
            }
            None => Ok(()),
        }
    }

    /// The same when nothing is waited for any more: it hears what it can be told at once.
    pub fn answer_last(&mut self, id: ClientId, answer: Result<Value, Failure>) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.id() == id) {
            let _ = client.answer(answer);
        }
    }

    /// Tells all of this when nothing is waited for any more, as far as they can be told at once.
    pub fn tell_last(&mut self, event: &Event) {
        let line = event.line();
        for client in &mut self.clients {
            let _ = client.tell(&line);
        }
    }

    fn at(&self, is_it: impl Fn(&Client) -> bool) -> Option<usize> {
        self.clients.iter().position(is_it)
    }

    /// Tells all that have introduced themselves.
    ///
    /// # Errors
    /// See [`Self::admit`].
    pub fn tell(&mut self, event: &Event, ops: &mut EventOps) -> Result<(), Error> {
        let line = event.line();
        let has_memory = self.clients.is_empty() || has_memory();
        // From the last one on: it takes the place of one that goes.
        for at in (0..self.clients.len()).rev() {
            let client = &mut self.clients[at];
            let stay = match has_memory {
                true => client.tell(&line),
                false => Stay::Goes,
            };
            if has_memory && stay == Stay::Goes {
                log::warn!("disconnecting a control client that does not read its answers");
            }
            self.go_on(at, stay, ops)?;
        }
        Ok(())
    }

    /// When [`Self::take_stalled`] or [`Self::take_rested`] has something to give.
    pub fn deadline(&self) -> Option<Instant> {
        let stalled = self.clients.iter().filter_map(Client::until);
        let rested = self.clients.iter().filter_map(Client::rests_until);
        stalled.chain(rested).min()
    }

    /// Those that have read nothing for too long; to be hung up on, and no more to be waited
    /// for.
    pub fn take_stalled(&mut self) -> Vec<Client> {
        let now = Instant::now();
        let is_stalled = |client: &Client| client.until().is_some_and(|until| until <= now);
        let (stalled, rest) = std::mem::take(&mut self.clients)
            .into_iter()
            .partition(is_stalled);
        self.clients = rest;
        stalled
    }

    /// Ends the rest of one whose turn it is. What it returns is to be waited for from now on;
    /// if that cannot be done, the client has to be [dropped](Self::drop_client).
    pub fn take_rested(&mut self) -> Option<Events> {
        let now = Instant::now();
        let is_rested = |client: &&mut Client| client.rests_until().is_some_and(|it| it <= now);
        let client = self.clients.iter_mut().find(is_rested)?;
        client.has_rested();
        Some(client.events(self.data))
    }

    /// Hangs up on the client with that descriptor, which is not waited for.
    pub fn drop_client(&mut self, fd: RawFd) {
        self.clients.retain(|client| client.as_raw_fd() != fd);
    }

    /// Waits from now on for what this client needs, or hangs up on it.
    fn go_on(&mut self, at: usize, stay: Stay, ops: &mut EventOps) -> Result<(), Error> {
        let client = &self.clients[at];
        let is_resting = client.rests_until().is_some();
        let stays =
            stay == Stay::Stays && (is_resting || ops.modify(client.events(self.data)).is_ok());
        if !stays {
            let client = self.clients.swap_remove(at);
            if !is_resting {
                ops.remove(client.events(self.data))?;
            }
        }
        Ok(())
    }
}

/// Whether there is some for what a client may want, which is said if not: the client has to
/// go then, and not the process.
fn has_memory() -> bool {
    let checked = headroom::check();
    if let Err(error) = &checked {
        log::error!("a control client cannot be served: {error}");
    }
    checked.is_ok()
}

/// The one that is missed least of those that have been [`IDLE`], if any has to make room for
/// a newcomer: of the process that has most of them; there, rather one that has not introduced
/// itself, else the one that has been so for longest. A process that forgets its connections
/// loses those, and not another one, which has said nothing for long either, its only one: who
/// has fewer places than the newcomer's process keeps them.
pub(super) fn most_idle(clients: &[Client], newcomer: Option<Peer>, now: Instant) -> Option<usize> {
    let places = |peer| clients.iter().filter(|it| it.peer() == peer).count();
    let newcomers = places(newcomer);
    let idle = clients.iter().enumerate().filter_map(|(at, client)| {
        let since = client.idle_since()?;
        let is_idle = now.saturating_duration_since(since) >= IDLE;
        let places = places(client.peer());
        let yields = client.peer() == newcomer || places > newcomers;
        let order = (Reverse(places), client.is_introduced(), since, at);
        (is_idle && yields).then_some(order)
    });
    idle.min().map(|(_, _, _, at)| at)
}
