//! A relay between `blkio` and the daemon that hides the write cache: `blkio` takes
//! every feature that it knows, and without FLUSH and CONFIG_WCE the daemon must
//! write through (virtio 1.2, 5.2.6.2).

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

/// Length of a message's header: request, flags, length of what follows.
const HEADER: usize = 12;

/// The request that asks for the features; its answer bears the same number.
const GET_FEATURES: u32 = 1;

/// File descriptors that come with one message, at most.
const DESCRIPTORS: usize = 8;

/// Serves one connection. Its end is that of either side.
pub struct Relay {
    socket: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Listens beside the daemon's socket.
    pub fn start(daemon: &Path) -> Self {
        let socket = daemon.with_extension("relay");
        let listener = UnixListener::bind(&socket).unwrap();
        let back = UnixStream::connect(daemon).unwrap();
        let thread = thread::spawn(move || {
            let (front, _) = listener.accept().unwrap();
            let (front_in, mut back_out) = (front.try_clone().unwrap(), back.try_clone().unwrap());
            let forward = thread::spawn(move || {
                // Either side may end at any time.
                let _ = pass_on(&front_in, &back_out);
                let _ = back_out.flush();
                let _ = back_out.shutdown(std::net::Shutdown::Both);
            });
            let _ = pass_answers(&back, &front);
            let _ = front.shutdown(std::net::Shutdown::Both);
            let _ = forward.join();
        });
        Self {
            socket,
            thread: Some(thread),
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Relay {
    /// Waits for the end of the connection.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
        let joined = self.thread.take().map(JoinHandle::join);
        if !thread::panicking() {
            assert!(matches!(joined, Some(Ok(()))), "the relay failed");
        }
    }
}

/// Bytes and descriptors, as they come.
fn pass_on(from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    let mut bytes = [0; 4096];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let buffers = &mut [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(from, buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if received.bytes == 0 {
            return Ok(());
        }
        let fds: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let bytes = &bytes[..received.bytes];
        let sent = sendmsg(
            to,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        let mut to = to;
        to.write_all(&bytes[sent..])?;
    }
}

/// Answers, one by one; the offered features without those of the write cache.
fn pass_answers(mut from: &UnixStream, mut to: &UnixStream) -> io::Result<()> {
    loop {
        let mut message = vec![0; HEADER];
        from.read_exact(&mut message)?;
        let word = |at: usize| u32::from_le_bytes(message[at..at + 4].try_into().unwrap());
        let (request, len) = (word(0), word(8) as usize);
        message.resize(HEADER + len, 0);
        from.read_exact(&mut message[HEADER..])?;
        if request == GET_FEATURES {
            let bytes: [u8; 8] = message[HEADER..].try_into().unwrap();
            let hidden = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
            let features = u64::from_le_bytes(bytes) & !hidden;
            message[HEADER..].copy_from_slice(&features.to_le_bytes());
        }
        to.write_all(&message)?;
    }
}
