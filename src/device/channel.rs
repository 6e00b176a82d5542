//! The channel by which a front-end hears of what it has not asked for: that the
//! configuration space has changed.
//!
//! The front-end gives us a socket for it. The library that reads the messages keeps that
//! to itself and has no message of this kind, so the descriptor is looked up in the message
//! before the library reads it. Nothing is waited for: neither that the front-end reads,
//! nor an answer. With an answer asked for, QEMU would first ask for the configuration on
//! the main channel, and both would wait for ever.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

/// Of messages on both channels: this version of the protocol, no answer wanted.
const FLAGS: u32 = 1;

/// Whether a message with this code brings a channel.
pub(super) fn brings_channel(code: u32) -> bool {
    code == u32::from(FrontendReq::SET_BACKEND_REQ_FD)
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// The one in the next message on a front-end's `socket`, which is not read. `None` if
    /// it brings none.
    ///
    /// # Errors
    /// Any of `recvmsg(2)`.
    pub fn peek(socket: &UnixStream) -> io::Result<Option<Self>> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut byte = [0];
        recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            flags,
        )?;
        let mut files = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        Ok(files.next().map(Self))
    }

    /// One that another process had.
    pub fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// A copy of its descriptor, for another process.
    ///
    /// # Errors
    /// Any of `fcntl(2)`.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Says that the configuration space has changed. If there is no room for it, there is
    /// much that the front-end has not read yet: it will look when it does.
    ///
    /// # Errors
    /// Any other of `send(2)`.
    pub fn tell_of_change(&self) -> io::Result<()> {
        let words = [u32::from(BackendReq::CONFIG_CHANGE_MSG), FLAGS, 0];
        let message: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match send(&self.0, &message, flags) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
