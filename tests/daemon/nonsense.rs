//! A front-end that talks nonsense: messages of the protocol with random content,
//! in random order, with random descriptors.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Messages of one front-end, unless the back-end hangs up before.
const MESSAGES: usize = 60;

/// The highest request of the protocol, and some more.
const LAST_REQUEST: u32 = 48;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;

/// A front-end.
pub struct Nonsense {
    stream: UnixStream,
    rng: SmallRng,
}

impl Nonsense {
    /// Connects and talks until it has no more to say, or nobody listens.
    pub fn talk(socket: &Path, seed: u64) {
        let stream = UnixStream::connect(socket).unwrap();
        // What it says may need no answer.
        let patience = Some(Duration::from_millis(5));
        stream.set_read_timeout(patience).unwrap();
        stream.set_write_timeout(patience).unwrap();
        let rng = SmallRng::seed_from_u64(seed);
        let mut front_end = Self { stream, rng };
        front_end.introduce();
        for _ in 0..MESSAGES {
            let request = front_end.rng.random_range(0..=LAST_REQUEST);
            let payload = front_end.payload(request);
            let files = front_end.files();
            if front_end.say(request, &payload, &files).is_none() {
                return;
            }
        }
    }

    /// What nearly all messages need to have been said: owner, features, protocol
    /// features. Sometimes not.
    fn introduce(&mut self) {
        const SET_FEATURES: u32 = 2;
        const SET_OWNER: u32 = 3;
        const SET_PROTOCOL_FEATURES: u32 = 16;
        const GET_FEATURES: u32 = 1;
        const GET_PROTOCOL_FEATURES: u32 = 15;
        const PROTOCOL_FEATURES: u64 = 1 << 30;
        const VERSION_1: u64 = 1 << 32;
        if self.rng.random_bool(0.1) {
            return;
        }
        let features = PROTOCOL_FEATURES | VERSION_1;
        for (request, payload) in [
            (SET_OWNER, vec![]),
            (GET_FEATURES, vec![]),
            (GET_PROTOCOL_FEATURES, vec![]),
            (SET_PROTOCOL_FEATURES, 0xa209_u64.to_le_bytes().to_vec()),
            (SET_FEATURES, features.to_le_bytes().to_vec()),
        ] {
            self.say(request, &payload, &[]);
        }
    }

    /// Says one thing and listens for an answer; `None` if the other has hung up.
    fn say(&mut self, request: u32, payload: &[u8], files: &[OwnedFd]) -> Option<()> {
        let flags = VERSION | if self.rng.random() { NEED_REPLY } else { 0 };
        let size = if self.rng.random_bool(0.02) {
            self.rng.random()
        } else {
            payload.len() as u32
        };
        let words = [request, flags, size];
        let message: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        self.stream.send_with_fds(&[&message, payload], &fds).ok()?;
        match self.stream.read(&mut [0; 512]) {
            Ok(0) => None,
            Ok(_) => Some(()),
            Err(error) => matches!(error.kind(), std::io::ErrorKind::WouldBlock).then_some(()),
        }
    }

    /// A payload of about the length that the request has.
    fn payload(&mut self, request: u32) -> Vec<u8> {
        const SET_MEM_TABLE: u32 = 5;
        let mut words = match request {
            SET_MEM_TABLE => {
                let regions = self.rng.random_range(0..4_u64);
                let mut words = vec![regions];
                words.extend((0..regions * 4).map(|_| self.word()));
                words
            }
            _ => {
                let len = *[0_usize, 1, 1, 1, 2, 5, 5, 5]
                    .choose(&mut self.rng)
                    .unwrap();
                (0..len).map(|_| self.word()).collect()
            }
        };
        if self.rng.random_bool(0.3) && !words.is_empty() {
            // Pairs of small numbers: an index and a value.
            words[0] = self.rng.random_range(0..70_u64) << 32 | self.rng.random_range(0..5);
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn word(&mut self) -> u64 {
        match self.rng.random_range(0..8) {
            0 => 0,
            1 => self.rng.random_range(0..64),
            2 => 0x1000 * self.rng.random_range(0..32),
            3 => 1 << self.rng.random_range(0..64),
            4 => u64::MAX - self.rng.random_range(0..0x2000),
            5 => 0x10_0000,
            6 => self.rng.random_range(0..0x10_0000),
            _ => self.rng.random(),
        }
    }

    fn files(&mut self) -> Vec<OwnedFd> {
        let count = *[0, 0, 1, 1, 1, 2, 3].choose(&mut self.rng).unwrap();
        (0..count).map(|_| self.file()).collect()
    }

    fn file(&mut self) -> OwnedFd {
        match self.rng.random_range(0..5) {
            0 => File::open("/dev/null").unwrap().into(),
            1 => UnixStream::pair().unwrap().0.into(),
            2 => eventfd(3, EventfdFlags::empty()).unwrap(),
            3 => std::io::pipe().unwrap().0.into(),
            _ => {
                let file = tempfile::tempfile().unwrap();
                file.set_len(0x20_0000).unwrap();
                file.into()
            }
        }
    }
}
