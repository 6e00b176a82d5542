//! One that asks: its socket, what has come from it, and what it has not read of the answer.
//!
//! Nothing is waited for, and all of it ends in time: from its first byte to its last it has
//! [`PATIENCE`]. When the answer is sent, what it still sends is read and dropped until it
//! hangs up: who hangs up on unread bytes takes the end of the answer away from a client of
//! TCP.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use event_manager::{EventSet, Events};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::http::{self, Format, MAX_HEAD};

/// How long one may stay: as long as Prometheus waits for an answer unless told otherwise.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that are read at once.
const CHUNK: usize = 2 << 10;

/// Most bytes that are read and dropped.
const MAX_DROPPED: usize = 64 << 10;

/// Whether a client stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stay {
    Stays,
    /// It has gone, or has to go.
    Goes,
}

/// What writes the page.
pub(super) type Page<'a> = &'a dyn Fn(Format) -> Result<String, fmt::Error>;

/// See the module's text.
pub(in crate::control) struct Client {
    socket: OwnedFd,
    until: Instant,
    stage: Stage,
}

enum Stage {
    /// What has come of its question.
    Asks(Vec<u8>),
    /// The answer, and how much of it is sent.
    IsAnswered(Vec<u8>, usize),
    /// How much was dropped.
    Leaves(usize),
}

impl Client {
    /// One that has connected.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            until: Instant::now() + PATIENCE,
            stage: Stage::Asks(Vec::new()),
        }
    }

    /// When it has to go.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// What is to be waited for.
    pub fn events(&self, data: u32) -> Events {
        let interest = match self.stage {
            Stage::Asks(_) | Stage::Leaves(_) => EventSet::IN,
            Stage::IsAnswered(..) => EventSet::OUT,
        };
        Events::with_data(self, data, interest)
    }

    /// Does what can be done for it now: a bounded number of bytes.
    pub(super) fn serve(&mut self, page: Page<'_>) -> Stay {
        let done = match &mut self.stage {
            Stage::Asks(question) => hear(&self.socket, question).map(|()| {
                let question = http::read(question);
                question.map(|question| Stage::IsAnswered(http::answer(question, page), 0))
            }),
            Stage::IsAnswered(..) => Ok(None),
            Stage::Leaves(dropped) => drop_some(&self.socket, dropped).map(|()| None),
        };
        match done {
            Ok(Some(next)) => self.stage = next,
            Ok(None) => {}
            Err(Gone) => return Stay::Goes,
        }
        let Stage::IsAnswered(answer, sent) = &mut self.stage else {
            return Stay::Stays;
        };
        match tell(&self.socket, &answer[*sent..]) {
            Ok(now) => *sent += now,
            Err(Gone) => return Stay::Goes,
        }
        if *sent == answer.len() {
            // It may have gone.
            let _ = shutdown(&self.socket, Shutdown::Write);
            self.stage = Stage::Leaves(0);
        }
        Stay::Stays
    }
}

/// There is nobody any more, or nobody to be kept.
struct Gone;

/// Reads some of a question.
fn hear(socket: &OwnedFd, question: &mut Vec<u8>) -> Result<(), Gone> {
    let mut chunk = [0; CHUNK];
    let room = CHUNK.min(MAX_HEAD - question.len());
    match recv(socket, &mut chunk[..room], RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(Gone),
        Ok((len, _)) => {
            question.extend(&chunk[..len]);
            Ok(())
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(_) => Err(Gone),
    }
}

/// Sends some of an answer. Returns how much.
fn tell(socket: &OwnedFd, answer: &[u8]) -> Result<usize, Gone> {
    let mut sent = 0;
    while sent < answer.len() {
        match send(
            socket,
            &answer[sent..],
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Ok(now) => sent += now,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(_) => return Err(Gone),
        }
    }
    Ok(sent)
}

fn drop_some(socket: &OwnedFd, dropped: &mut usize) -> Result<(), Gone> {
    let mut chunk = [0; CHUNK];
    match recv(socket, &mut chunk, RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(Gone),
        Ok((len, _)) => {
            *dropped += len;
            if *dropped > MAX_DROPPED {
                Err(Gone)
            } else {
                Ok(())
            }
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(_) => Err(Gone),
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
