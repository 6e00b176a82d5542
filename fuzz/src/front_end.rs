//! The messages of a front-end, as bytes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How long an answer may take, on a machine with other work.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Numbers of messages.
pub mod message {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

const VERSION: u32 = 1;
const REPLY: u32 = 4;
pub const NEED_REPLY: u32 = 8;
const HEADER_LEN: usize = 12;

/// A front-end that has said nothing yet, and the socket for the device.
pub fn pair() -> (FrontEnd, UnixStream) {
    let (own, other) = UnixStream::pair().expect("there are descriptors left");
    (FrontEnd { socket: own }, other)
}

pub struct FrontEnd {
    pub socket: UnixStream,
}

/// The header of a message.
pub fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    for (to, word) in bytes.chunks_exact_mut(4).zip([request, flags, size]) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

impl FrontEnd {
    /// Sends bytes as they are.
    pub fn send_raw(&self, bytes: &[u8], files: &[OwnedFd]) -> io::Result<()> {
        let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = self.socket.send_with_fds(&[bytes], &fds);
        sent.map(drop)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    /// Sends a message and waits for what it is answered with; `None` if the connection
    /// has ended.
    pub fn ask(&self, request: u32, payload: &[u8], files: &[OwnedFd]) -> Option<Answer> {
        self.send(request, NEED_REPLY, payload, files)?;
        self.receive()
    }

    /// The same, where success is expected and says nothing more.
    pub fn tell(&self, request: u32, payload: &[u8], files: &[OwnedFd]) {
        let answer = self.ask(request, payload, files).expect("it is not left");
        assert_eq!(answer.payload, 0_u64.to_ne_bytes(), "message {request}");
    }

    /// Sends a message that is not answered.
    pub fn send(&self, request: u32, flags: u32, payload: &[u8], files: &[OwnedFd]) -> Option<()> {
        let header = header(request, VERSION | flags, payload.len() as u32);
        self.send_raw(&[&header, payload].concat(), files).ok()
    }

    fn receive(&self) -> Option<Answer> {
        let mut header = [0; HEADER_LEN];
        let (_, file) = self.read(&mut header)?;
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        assert_eq!(
            word(4) & (VERSION | REPLY),
            VERSION | REPLY,
            "it is an answer"
        );
        let mut payload = vec![0; word(8) as usize];
        self.read(&mut payload)?;
        Some(Answer { payload, file })
    }

    /// Fills `bytes`.
    fn read(&self, bytes: &mut [u8]) -> Option<((), Option<File>)> {
        let start = Instant::now();
        let mut at = 0;
        let mut file = None;
        while at < bytes.len() {
            assert!(start.elapsed() < PATIENCE, "there is no answer");
            if !is_readable(&self.socket, Duration::from_secs(1)) {
                continue;
            }
            match self.socket.recv_with_fd(&mut bytes[at..]) {
                Ok((0, _)) | Err(_) => return None,
                Ok((len, came)) => {
                    at += len;
                    file = came.or(file);
                }
            }
        }
        Some(((), file))
    }

    /// Owner, features and protocol features. Gives what is offered of the first.
    pub fn introduce(&self, features: u64) -> u64 {
        let none = &[][..];
        self.send(message::SET_OWNER, 0, &[], none)
            .expect("it listens");
        let offered = self
            .ask(message::GET_FEATURES, &[], none)
            .expect("it listens")
            .number();
        let protocol = self.ask(message::GET_PROTOCOL_FEATURES, &[], none);
        let protocol = protocol.expect("it listens").payload;
        self.send(message::SET_PROTOCOL_FEATURES, 0, &protocol, none)
            .expect("it listens");
        let wanted = offered & features;
        self.tell(message::SET_FEATURES, &wanted.to_ne_bytes(), none);
        offered
    }
}

/// What a message is answered with.
pub struct Answer {
    pub payload: Vec<u8>,
    pub file: Option<File>,
}

impl Answer {
    /// The payload, if it is one number.
    pub fn number(&self) -> u64 {
        u64::from_ne_bytes(self.payload[..].try_into().expect("it is a number"))
    }
}

/// Numbers as a payload.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The same for those that are half as long.
pub fn halves(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn event() -> OwnedFd {
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    eventfd(0, flags).expect("there are descriptors left")
}

/// A memfd of that length.
pub fn memory(len: u64) -> File {
    let memfd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let file = File::from(memfd.expect("there are descriptors left"));
    file.set_len(len).expect("there is memory");
    file
}

/// Whether it gets readable in that time.
pub fn is_readable(fd: &impl AsFd, time: Duration) -> bool {
    let time = Timespec::try_from(time).expect("it is short");
    // libFuzzer has an alarm now and then.
    let wait = || poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&time));
    rustix::io::retry_on_intr(wait) == Ok(1)
}
