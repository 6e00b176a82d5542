//! What one process hands to another one over a socket: numbers, bytes and descriptors.
//!
//! All of it is one message: a header of three numbers of 32 bits (what it is, how many
//! bytes, how many descriptors), the bytes, and the descriptors, with a byte for each
//! group of them. Numbers are little-endian, and texts begin with their length.
//! `docs/upgrade.md` says what is in the messages.
//!
//! What comes in is checked like any input: sizes before they are believed, and each
//! wait has an end. Knows sockets; must not know what is handed over.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType, recv, recvmsg, send, sendmsg,
};
use thiserror::Error;

/// Bytes of a header.
const HEADER_LEN: usize = 12;

/// Most bytes of a message: 64 rings with all their requests waiting, 509 regions of
/// memory and a path are a good deal less.
const MAX_BYTES: u32 = 4 << 20;

/// Most descriptors of a message, likewise.
const MAX_FILES: u32 = 2048;

/// Descriptors that go with one byte. The kernel takes 253.
const GROUP: usize = 64;

/// What did not come, or not as it should.
#[derive(Debug, Error)]
pub(crate) enum ParcelError {
    /// The other end is closed.
    #[error("the other process has gone away")]
    Gone,
    /// It took too long.
    #[error("the other process does not answer")]
    Late,
    /// Something else has become readable that ends the wait.
    #[error("interrupted")]
    BrokenOff,
    /// It does not fit the description in `docs/upgrade.md`.
    #[error("the other process sent an invalid message: {0}")]
    Invalid(&'static str),
    /// Any of `sendmsg(2)` and `recvmsg(2)`.
    #[error("the socket fails: {0}")]
    Socket(#[from] Errno),
}

/// A message that is being written.
#[derive(Debug, Default)]
pub(crate) struct Writer<'a> {
    bytes: Vec<u8>,
    files: Vec<BorrowedFd<'a>>,
}

impl<'a> Writer<'a> {
    pub fn u8(&mut self, number: u8) {
        self.bytes.push(number);
    }

    pub fn bool(&mut self, is_so: bool) {
        self.u8(is_so.into());
    }

    pub fn u16(&mut self, number: u16) {
        self.bytes.extend(number.to_le_bytes());
    }

    pub fn u32(&mut self, number: u32) {
        self.bytes.extend(number.to_le_bytes());
    }

    pub fn u64(&mut self, number: u64) {
        self.bytes.extend(number.to_le_bytes());
    }

    /// So many things follow.
    pub fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub fn text(&mut self, text: &[u8]) {
        self.count(text.len());
        self.bytes.extend(text);
    }

    /// A descriptor, which stays open here.
    pub fn file(&mut self, file: BorrowedFd<'a>) {
        self.files.push(file);
    }

    /// Whether there is one, and it.
    pub fn optional<T: Copy>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.bool(value.is_some());
        if let Some(value) = value {
            write(self, value);
        }
    }

    /// Sends it. Waits until the other end has taken all of it, if that does not take
    /// too long.
    ///
    /// # Errors
    /// See [`ParcelError`].
    pub fn send(&self, socket: &UnixStream, kind: u32, time: Duration) -> Result<(), ParcelError> {
        let until = Instant::now() + time;
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        let files = u32::try_from(self.files.len()).unwrap_or(u32::MAX);
        if len > MAX_BYTES || files > MAX_FILES {
            return Err(ParcelError::Invalid("too much"));
        }
        let header = [kind, len, files].map(u32::to_le_bytes).concat();
        let mut left = [header, self.bytes.clone()].concat();
        while !left.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(socket, &left, flags) {
                Ok(sent) => drop(left.drain(..sent)),
                Err(errno) => wait_after(errno, socket, PollFlags::OUT, None, until)?,
            }
        }
        for group in self.files.chunks(GROUP) {
            while let Err(errno) = send_group(socket, group) {
                wait_after(errno, socket, PollFlags::OUT, None, until)?;
            }
        }
        Ok(())
    }
}

fn send_group(socket: &UnixStream, group: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(GROUP))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    // There is room for a whole group.
    control.push(SendAncillaryMessage::ScmRights(group));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&[0])], &mut control, flags).map(drop)
}

/// A message that has come.
#[derive(Debug)]
pub(crate) struct Reader {
    /// What it is.
    pub kind: u32,
    bytes: VecDeque<u8>,
    files: VecDeque<OwnedFd>,
}

impl Reader {
    /// Waits for the next message, until `time` is over or `alarm` is readable.
    ///
    /// # Errors
    /// See [`ParcelError`].
    pub fn receive(
        socket: &UnixStream,
        alarm: Option<BorrowedFd<'_>>,
        time: Duration,
    ) -> Result<Self, ParcelError> {
        let until = Instant::now() + time;
        let header = receive_bytes(socket, HEADER_LEN, alarm, until)?;
        let mut numbers = header.chunks_exact(4).map(|four| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(four);
            u32::from_le_bytes(bytes)
        });
        let mut next = || numbers.next().unwrap_or_default();
        let (kind, len, count) = (next(), next(), next());
        if len > MAX_BYTES || count > MAX_FILES {
            return Err(ParcelError::Invalid("too much"));
        }
        let bytes = receive_bytes(socket, len as usize, alarm, until)?;
        let mut files = VecDeque::new();
        while files.len() < count as usize {
            let group = GROUP.min(count as usize - files.len());
            match receive_group(socket) {
                Ok(Some(some)) if some.len() == group => files.extend(some),
                Ok(Some(_)) => return Err(ParcelError::Invalid("other descriptors")),
                Ok(None) => return Err(ParcelError::Gone),
                Err(errno) => wait_after(errno, socket, PollFlags::IN, alarm, until)?,
            }
        }
        Ok(Self {
            kind,
            bytes: bytes.into(),
            files,
        })
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ParcelError> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            let next = self.bytes.pop_front();
            *byte = next.ok_or(ParcelError::Invalid("a message that is too short"))?;
        }
        Ok(bytes)
    }

    pub fn u8(&mut self) -> Result<u8, ParcelError> {
        self.take().map(u8::from_le_bytes)
    }

    pub fn bool(&mut self) -> Result<bool, ParcelError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(ParcelError::Invalid("neither yes nor no")),
        }
    }

    pub fn u16(&mut self) -> Result<u16, ParcelError> {
        self.take().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, ParcelError> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, ParcelError> {
        self.take().map(u64::from_le_bytes)
    }

    /// So many things follow. Each takes a byte or a descriptor at least.
    pub fn count(&mut self) -> Result<usize, ParcelError> {
        let count = self.u32()? as usize;
        if count > self.bytes.len() + self.files.len() {
            return Err(ParcelError::Invalid("more than there is"));
        }
        Ok(count)
    }

    pub fn text(&mut self) -> Result<Vec<u8>, ParcelError> {
        let len = self.count()?;
        if len > self.bytes.len() {
            return Err(ParcelError::Invalid("a message that is too short"));
        }
        Ok(self.bytes.drain(..len).collect())
    }

    /// As many as were counted.
    pub fn list<T>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<T, ParcelError>,
    ) -> Result<Vec<T>, ParcelError> {
        let count = self.count()?;
        (0..count).map(|_| read(self)).collect()
    }

    pub fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, ParcelError>,
    ) -> Result<Option<T>, ParcelError> {
        match self.bool()? {
            true => read(self).map(Some),
            false => Ok(None),
        }
    }

    pub fn file(&mut self) -> Result<OwnedFd, ParcelError> {
        let file = self.files.pop_front();
        file.ok_or(ParcelError::Invalid("too few descriptors"))
    }

    /// The same, which must be a stream socket of the Unix domain: others cannot be waited
    /// for, or block.
    pub fn socket(&mut self) -> Result<UnixStream, ParcelError> {
        let file = self.file()?;
        let is_one = socket_domain(&file) == Ok(AddressFamily::UNIX)
            && socket_type(&file) == Ok(SocketType::STREAM);
        match is_one {
            true => Ok(file.into()),
            false => Err(ParcelError::Invalid("a descriptor that is no socket")),
        }
    }

    /// Whether all bytes were read.
    pub fn is_at_end(&self) -> bool {
        self.bytes.is_empty()
    }

    /// That there is nothing else in it.
    ///
    /// # Errors
    /// If there is.
    pub fn end(self) -> Result<(), ParcelError> {
        match self.bytes.is_empty() && self.files.is_empty() {
            true => Ok(()),
            false => Err(ParcelError::Invalid("a message that is too long")),
        }
    }
}

fn receive_bytes(
    socket: &UnixStream,
    len: usize,
    alarm: Option<BorrowedFd<'_>>,
    until: Instant,
) -> Result<Vec<u8>, ParcelError> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match recv(socket, &mut bytes[done..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(ParcelError::Gone),
            Ok((count, _)) => done += count,
            Err(errno) => wait_after(errno, socket, PollFlags::IN, alarm, until)?,
        }
    }
    Ok(bytes)
}

/// The next byte with its descriptors; `None` at the end.
fn receive_group(socket: &UnixStream) -> rustix::io::Result<Option<Vec<OwnedFd>>> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(GROUP))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut byte = [0];
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        flags,
    )?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            files.extend(some);
        }
    }
    // Cut short where the process may have no more descriptors.
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::MFILE);
    }
    Ok(Some(files))
}

/// After a call that did not get on: waits until it may, or says why it will not.
fn wait_after(
    errno: Errno,
    socket: &UnixStream,
    events: PollFlags,
    alarm: Option<BorrowedFd<'_>>,
    until: Instant,
) -> Result<(), ParcelError> {
    match errno {
        Errno::AGAIN | Errno::INTR => {}
        Errno::PIPE | Errno::CONNRESET => return Err(ParcelError::Gone),
        errno => return Err(errno.into()),
    }
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ParcelError::Late);
    }
    let left = Timespec {
        tv_sec: left.as_secs() as i64,
        tv_nsec: left.subsec_nanos().into(),
    };
    let mut fds = vec![PollFd::from_borrowed_fd(socket.as_fd(), events)];
    fds.extend(alarm.map(|alarm| PollFd::from_borrowed_fd(alarm, PollFlags::IN)));
    match poll(&mut fds, Some(&left)) {
        Ok(_) if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) => {
            Err(ParcelError::BrokenOff)
        }
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    const SOON: Duration = Duration::from_millis(50);

    #[test]
    fn what_is_handed_over_arrives() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<_> = (0..150_u8)
            .map(|number| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&[number]).unwrap();
                file.rewind().unwrap();
                file
            })
            .collect();
        let mut writer = Writer::default();
        writer.u64(7 << 40);
        writer.text(b"path");
        writer.optional(Some(9), Writer::u16);
        writer.optional(None, Writer::u16);
        files.iter().for_each(|file| writer.file(file.as_fd()));
        writer.send(&ours, 3, SOON).unwrap();
        writer.send(&ours, 4, SOON).unwrap();
        for kind in [3, 4] {
            let mut reader = Reader::receive(&theirs, None, SOON).unwrap();
            assert_eq!(reader.kind, kind);
            assert_eq!(reader.u64().unwrap(), 7 << 40);
            assert_eq!(reader.text().unwrap(), b"path");
            assert_eq!(reader.optional(Reader::u16).unwrap(), Some(9));
            assert_eq!(reader.optional(Reader::u16).unwrap(), None);
            for number in 0..150 {
                let mut byte = [0];
                let mut file = File::from(reader.file().unwrap());
                // Both have the same place in the file.
                file.rewind().unwrap();
                file.read_exact(&mut byte).unwrap();
                assert_eq!(byte, [number]);
            }
            assert!(reader.u8().is_err() && reader.file().is_err());
            reader.end().unwrap();
        }
    }

    #[test]
    fn only_a_socket_is_taken_for_one() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let other = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let mut writer = Writer::default();
        writer.file(ours.as_fd());
        writer.file(file.as_fd());
        writer.file(other.as_fd());
        writer.send(&ours, 1, SOON).unwrap();
        let mut reader = Reader::receive(&theirs, None, SOON).unwrap();
        reader.socket().unwrap();
        reader.socket().unwrap_err();
        reader.socket().unwrap_err();
        reader.end().unwrap();
    }

    #[test]
    fn nothing_is_believed_and_no_wait_is_without_end() {
        let receive = |bytes: &[u8]| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            Reader::receive(&theirs, None, SOON)
        };
        let header = |numbers: [u32; 3]| numbers.map(u32::to_le_bytes).concat();
        assert!(matches!(receive(&[1; 11]), Err(ParcelError::Late)));
        let long = receive(&header([1, MAX_BYTES + 1, 0]));
        assert!(matches!(long, Err(ParcelError::Invalid(_))));
        let many = receive(&header([1, 0, MAX_FILES + 1]));
        assert!(matches!(many, Err(ParcelError::Invalid(_))));
        // A byte with no descriptors where there should be some.
        let none = receive(&[header([1, 0, 1]), vec![0]].concat());
        assert!(matches!(none, Err(ParcelError::Invalid(_))));
        let mut lies = receive(&[header([1, 5, 0]), vec![255, 255, 255, 255, 2]].concat()).unwrap();
        assert!(lies.count().is_err());
        assert!(lies.bool().is_err());
        lies.end().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        let gone = Reader::receive(&theirs, None, SOON);
        assert!(matches!(gone, Err(ParcelError::Gone)));
        let (alarm, mut ring) = UnixStream::pair().unwrap();
        ring.write_all(&[0]).unwrap();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let broken = Reader::receive(&theirs, Some(alarm.as_fd()), SOON);
        assert!(matches!(broken, Err(ParcelError::BrokenOff)));
    }
}
