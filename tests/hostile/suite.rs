//! What each case of the hostile front-end suite runs against: a daemon under its usual
//! restrictions, and a front-end whose queues work before and after.

use std::{
    fs::File,
    io::{ErrorKind, Read},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    os::unix::net::UnixStream,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;
use vhost::VhostBackend;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::common::{backend::Backend, img::ploop_img};
use crate::front_end::*;

/// Flags of a message's header: the version, and that an answer is wanted.
pub const VERSION: u32 = 1;
pub const NEED_REPLY: u32 = 8;

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
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is ended by the daemon.
    Ends,
    /// It goes on, and its queues work.
    GoesOn,
}

/// A daemon and its image.
pub struct Suite {
    pub backend: Backend,
    _folder: TempDir,
}

impl Suite {
    pub fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let image: PathBuf = folder.path().join("disk.hds");
        ploop_img(["create", image.to_str().unwrap(), "64M"]).ok();
        let socket = folder.path().join("socket");
        Self {
            backend: Backend::start::<&str>(&image, &socket, &[]),
            _folder: folder,
        }
    }

    /// A front-end whose queues have all worked.
    pub fn connect(&self) -> FrontEnd {
        let mut front_end = self.connect_in_turn();
        front_end.negotiate(u64::MAX);
        front_end.start_rings();
        expect_service(&mut front_end, 0);
        expect_service(&mut front_end, 1);
        front_end
    }

    /// Once the front-end before has gone for the daemon, too: a program that another test
    /// is about to start may still have its socket.
    fn connect_in_turn(&self) -> FrontEnd {
        let start = Instant::now();
        loop {
            let front_end = FrontEnd::connect(self.backend.socket());
            match front_end.vhost.get_features() {
                Ok(_) => return front_end,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// One case: `attack` on a connection whose queues work. Then either that connection
    /// or the next one is served.
    pub fn expect(&self, name: &str, outcome: Outcome, attack: impl FnOnce(&mut FrontEnd)) {
        let mut front_end = self.connect();
        attack(&mut front_end);
        let is = outcome_of(&front_end);
        assert_eq!(is, outcome, "{name}");
        if is == Outcome::GoesOn {
            expect_service(&mut front_end, 0);
            expect_service(&mut front_end, 1);
        }
        drop(front_end);
        drop(self.connect());
    }

    /// The daemon has come through all of it.
    pub fn end(self) {
        self.backend.stop();
    }
}

/// A write and a read, with data that tells which.
pub fn expect_service(front_end: &mut FrontEnd, queue: usize) {
    let data: Vec<u8> = (0..512).map(|at| (at as u8) ^ queue as u8).collect();
    let place = DATA + 0x1000 * queue as u64;
    front_end.fill(place, &data);
    front_end.fill(place + 512, &[0; 512]);
    let ring = &mut front_end.rings[queue];
    let sector = 100 + queue as u64;
    let write = ring.run(VIRTIO_BLK_T_OUT, sector, &[readable(place, 512)]);
    assert_eq!(write, (0, 1), "queue {queue}");
    let read = ring.run(VIRTIO_BLK_T_IN, sector, &[writable(place + 512, 512)]);
    assert_eq!(read, (0, 513), "queue {queue}");
    assert_eq!(front_end.bytes(place + 512, 512), data, "queue {queue}");
}

/// Whether the daemon has hung up: asks for something, and reads what comes until that
/// is answered.
fn outcome_of(front_end: &FrontEnd) -> Outcome {
    let mut socket = socket_of(front_end);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let sent = send(&socket, message::GET_FEATURES, VERSION, &[], &[]);
    let is_over =
        |error: ErrorKind| matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
    if sent.is_err_and(|error| is_over(error.kind())) {
        return Outcome::Ends;
    }
    loop {
        let mut header = [0; 12];
        let read = socket.read_exact(&mut header);
        match read.map_err(|error| error.kind()) {
            Ok(()) => {}
            Err(ErrorKind::UnexpectedEof) => return Outcome::Ends,
            Err(kind) if is_over(kind) => return Outcome::Ends,
            Err(kind) => panic!("neither an answer nor an end: {kind}"),
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        socket.read_exact(&mut payload).unwrap();
        if word(0) == message::GET_FEATURES {
            return Outcome::GoesOn;
        }
    }
}

/// The front-end's end of the connection, for bytes of any kind.
pub fn socket_of(front_end: &FrontEnd) -> UnixStream {
    // SAFETY: the descriptor is open as long as the front-end is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(front_end.vhost.as_raw_fd()) };
    UnixStream::from(fd.try_clone_to_owned().unwrap())
}

/// Sends a message.
pub fn send(
    socket: &UnixStream,
    request: u32,
    flags: u32,
    payload: &[u8],
    files: &[RawFd],
) -> std::io::Result<()> {
    let len = payload.len() as u32;
    send_as(socket, [request, flags, len], payload, files)
}

/// Sends a message with any words in its header.
pub fn send_as(
    socket: &UnixStream,
    header: [u32; 3],
    payload: &[u8],
    files: &[RawFd],
) -> std::io::Result<()> {
    let header: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let sent = socket.send_with_fds(&[&header[..], payload], files);
    sent.map(drop)
        .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
}

/// Numbers as a payload.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The same for those that are half as long.
pub fn halves(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A memfd of that length.
pub fn memory(len: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}
