//! One client: its socket, and what waits on either side of it.
//!
//! Nothing is waited for. A client that does not read its answers is not asked for more
//! commands, and one that stays so, or that events pile up for, is hung up on. No client
//! keeps the others waiting either: of what it has sent, a little is done at a time, and
//! while it rests nothing.

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use event_manager::{EventSet, Events};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::Value;

use super::commands::Wish;
use super::message::Failure;
use super::session::Session;
use crate::control::subject::Subject;
use crate::peer::Peer;

/// Bytes that are read at once.
const CHUNK: usize = 16 << 10;

/// With so many bytes waiting for the client to read them, no command of it is obeyed.
const HIGH_WATER: usize = 64 << 10;

/// So many commands are obeyed before everybody else has a turn.
const TURN: usize = 64;

/// With so many bytes waiting for the client to read them it is hung up on.
const MAX_WAITING: usize = 1 << 20;

/// How long a client may read nothing of what there is for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether a client stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) enum Stay {
    Stays,
    /// It has gone, or has to go.
    Goes,
}

/// Tells a client from all that ever were: another one may get its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) struct ClientId(pub(super) u64);

impl ClientId {
    /// One that there might be.
    #[cfg(test)]
    pub(in crate::control) const fn of(number: u64) -> Self {
        Self(number)
    }
}

/// See the module's text.
pub(in crate::control) struct Client {
    socket: UnixStream,
    id: ClientId,
    /// Who it is, if the kernel has told.
    peer: Option<Peer>,
    session: Session,
    /// What has come and was not looked at.
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    /// When it has last said something that was answered, been answered late, or connected.
    heard_at: Instant,
    /// Since when it has read nothing though there is something.
    stalled_since: Option<Instant>,
    /// Processor time that was taken for it since its last turn.
    debt: Duration,
    /// When it has its next turn, if it has to wait for that.
    rests_until: Option<Instant>,
    /// It sends no more.
    has_ended: bool,
}

impl Client {
    /// One that has connected. It is greeted when it is [served](Self::serve).
    pub fn new(socket: UnixStream, id: ClientId, peer: Option<Peer>) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        let mut client = Self {
            socket,
            id,
            peer,
            session: Session::default(),
            input: VecDeque::new(),
            output: VecDeque::new(),
            heard_at: Instant::now(),
            stalled_since: None,
            debt: Duration::ZERO,
            rests_until: None,
            has_ended: false,
        };
        client.put(&Session::greeting());
        Ok(client)
    }

    pub fn id(&self) -> ClientId {
        self.id
    }

    pub fn peer(&self) -> Option<Peer> {
        self.peer
    }

    /// Answers the command that waits for it. What has come since has to wait for its turn:
    /// whoever asks again and again for what is refused would never let go.
    pub fn answer(&mut self, answer: Result<Value, Failure>) -> Stay {
        let line = self.session.answer(answer);
        self.put(&line);
        self.heard_at = Instant::now();
        match self.send() {
            Stay::Stays if !self.is_over() => Stay::Stays,
            _ => Stay::Goes,
        }
    }

    /// Does what can be done for it now, as far as others need not wait for long.
    pub fn serve(&mut self, subject: &dyn Subject) -> (Stay, Wish) {
        let stay = self.send();
        if stay == Stay::Goes {
            return (stay, Wish::Nothing);
        }
        // One that is not listened to is not heard to go.
        if self.session.awaits_answer() && has_hung_up(&self.socket) {
            return (Stay::Goes, Wish::Nothing);
        }
        if self.wants_input() && self.receive() == Stay::Goes {
            return (Stay::Goes, Wish::Nothing);
        }
        let wish = self.obey(subject);
        match self.send() {
            Stay::Stays if !self.is_over() => (Stay::Stays, wish),
            _ => (Stay::Goes, wish),
        }
    }

    /// Whether it has said all that it wanted, and has been answered.
    fn is_over(&self) -> bool {
        let is_answered = self.output.is_empty() && !self.session.awaits_answer();
        self.has_ended && self.input.is_empty() && is_answered
    }

    /// Tells it of an event, if it wants to hear of any.
    pub fn tell(&mut self, event: &str) -> Stay {
        if !self.session.hears_events() {
            return Stay::Stays;
        }
        self.put(event);
        match self.send() {
            Stay::Stays if self.output.len() <= MAX_WAITING => Stay::Stays,
            _ => Stay::Goes,
        }
    }

    /// Since when it has wanted nothing; `None` while there is something to be done for it,
    /// heard of it or told to it.
    pub fn idle_since(&self) -> Option<Instant> {
        let waits = self.session.awaits_answer() || !self.output.is_empty();
        let has_sent = !self.input.is_empty() || has_sent(&self.socket);
        (!waits && !has_sent).then_some(self.heard_at)
    }

    /// Whether it has introduced itself.
    pub fn is_introduced(&self) -> bool {
        self.session.hears_events()
    }

    /// When it has to go unless it reads something before. While it rests it is not asked
    /// whether it has.
    pub fn until(&self) -> Option<Instant> {
        let since = self.stalled_since.filter(|_| self.rests_until.is_none())?;
        Some(since + PATIENCE)
    }

    /// Something was done for it outside its turns, at this cost of the processor.
    pub fn owe(&mut self, cost: Duration) {
        self.debt += cost;
    }

    /// What it [owes](Self::owe), which is to be counted now.
    pub fn take_debt(&mut self) -> Duration {
        mem::take(&mut self.debt)
    }

    /// It has no turn until then, and the main loop waits for nothing of it: where nothing is
    /// wanted it would still be told that the other side has hung up, again and again.
    pub fn rest(&mut self, until: Instant) {
        self.rests_until = Some(until);
    }

    /// Its next turn has come.
    pub fn has_rested(&mut self) {
        self.rests_until = None;
    }

    /// When its [rest](Self::rest) is over.
    pub fn rests_until(&self) -> Option<Instant> {
        self.rests_until
    }

    /// Whether it has hung up while nobody waits for that. What it has sent before is worth
    /// less than the place that it takes.
    pub fn has_left_at_rest(&self) -> bool {
        self.rests_until.is_some() && has_hung_up(&self.socket)
    }

    /// What is to be waited for.
    pub fn interest(&self) -> EventSet {
        let mut events = EventSet::empty();
        if self.wants_input() {
            events |= EventSet::IN;
        }
        // What has come already is gone on with when there is room for an answer.
        let goes_on = !self.input.is_empty() && !self.session.awaits_answer();
        if goes_on || !self.output.is_empty() {
            events |= EventSet::OUT;
        }
        events
    }

    /// The same in the event manager's terms.
    pub fn events(&self, data: u32) -> Events {
        Events::with_data(self, data, self.interest())
    }

    fn wants_input(&self) -> bool {
        let waits = self.output.len() >= HIGH_WATER || self.session.awaits_answer();
        !self.has_ended && self.input.is_empty() && !waits
    }

    fn put(&mut self, line: &str) {
        self.output.extend(line.as_bytes());
    }

    fn receive(&mut self) -> Stay {
        let mut chunk = [0; CHUNK];
        match recv(&self.socket, &mut chunk, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.has_ended = true,
            Ok((len, _)) => self.input.extend(&chunk[..len]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return Stay::Goes,
        }
        Stay::Stays
    }

    /// Obeys what has come, as long as there is room for answers, and a [`TURN`] at most.
    fn obey(&mut self, subject: &dyn Subject) -> Wish {
        for _ in 0..TURN {
            let is_full = self.output.len() >= HIGH_WATER;
            if is_full || self.input.is_empty() || self.session.awaits_answer() {
                break;
            }
            let input = self.input.make_contiguous();
            let mut rest = &*input;
            let answer = self.session.answer_next(&mut rest, subject);
            let taken = input.len() - rest.len();
            self.input.drain(..taken);
            if let Some((line, wish)) = answer {
                self.heard_at = Instant::now();
                self.put(&line);
                if wish != Wish::Nothing {
                    return wish;
                }
            }
        }
        Wish::Nothing
    }

    fn send(&mut self) -> Stay {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while !self.output.is_empty() {
            let (first, _) = self.output.as_slices();
            match send(&self.socket, first, flags) {
                Ok(sent) => {
                    self.output.drain(..sent);
                    self.stalled_since = None;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.stalled_since.get_or_insert_with(Instant::now);
                    return Stay::Stays;
                }
                Err(_) => return Stay::Goes,
            }
        }
        // Kept memory would stay as large as the longest answer.
        self.output.shrink_to(HIGH_WATER);
        Stay::Stays
    }
}

/// Whether nobody is there any more to be answered.
fn has_hung_up(socket: &UnixStream) -> bool {
    is_any(socket, PollFlags::HUP | PollFlags::ERR)
}

/// Whether something has come that was not read, if only the end.
fn has_sent(socket: &UnixStream) -> bool {
    is_any(socket, PollFlags::IN)
}

fn is_any(socket: &UnixStream, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(socket, events)];
    poll(&mut fds, Some(&Timespec::default())) == Ok(1) && fds[0].revents().intersects(events)
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
