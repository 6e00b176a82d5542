//! Another process goes on in this one's place, and the front-end does not notice.
//!
//! Who serves listens on the socket of `--upgrade-socket`. Who is started with
//! `--take-over` connects there, and the two come to terms while the guest is served:
//! same image, same view of it, same protocol. Then the one drains the rings, closes the
//! image and hands over what it has; the other opens the image and goes on; and only when
//! it does, the one ends. Whatever goes wrong before, the one opens the image again and
//! goes on itself.
//!
//! At no time do both write the image, and at no time is it unlocked. Until "go" the
//! image is the one's; from then on it is the other's until its end of the socket is
//! closed, which it is when that process dies. Before it says "serving" it has touched no
//! ring, so the state that was handed over is still what it was.
//!
//! `docs/upgrade.md` describes the messages.

mod give;
mod take;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::AddressFamily;
use thiserror::Error;

pub(super) use give::{Given, Step, Successor, hand_over};
pub(super) use take::{Taken, take_over};

use super::Args;
use super::bound::Bound;
use super::socket::{MadeFile, ServerSocket, SocketError, UNIX, UNIX_OR_TCP, check_listener};
use crate::device::{Suspended, ThrottleLimits};
use crate::format::Sector;
use crate::parcel::{ParcelError, Reader, Writer};
use crate::storage::HostFile;

/// Of the messages here. Another number is another language.
const VERSION: u32 = 2;

/// What a message is.
mod kind {
    /// From who takes over, until "welcome": who it is and what it would serve.
    pub const HELLO: u32 = 1;
    pub const WELCOME: u32 = 2;
    /// And why.
    pub const REFUSED: u32 = 3;
    /// All is prepared that can be.
    pub const READY: u32 = 4;
    /// All that there is to be handed over.
    pub const STATE: u32 = 5;
    /// It has been understood.
    pub const PREPARED: u32 = 6;
    /// The image is yours.
    pub const GO: u32 = 7;
    /// The front-end is mine.
    pub const SERVING: u32 = 8;
}

/// What of the state not every process knows, as bits. Who takes over says in "ready" what it
/// knows, and is told only of that, behind all the rest. One that says nothing knows nothing:
/// so the messages stay of one version.
mod part {
    /// Limits that were set while the disk was served.
    pub const LIMITS: u64 = 1;
    /// Where metrics are asked for.
    pub const METRICS: u64 = 2;
    /// What of the file is to be told of when it is used.
    pub const WRITE_THRESHOLD: u64 = 4;
    /// What this program knows.
    pub const ALL: u64 = LIMITS | METRICS | WRITE_THRESHOLD;
}

/// How long a message may take whose sender has nothing else to do.
const ANSWER_TIME: Duration = Duration::from_secs(3);

/// Why no process goes on in the place of another.
#[derive(Debug, Error)]
pub enum UpgradeError {
    /// Nobody listens there, most likely.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It could make us do anything.
    #[error("{} belongs to a process of another user, {uid}", path.display())]
    Stranger {
        /// As given.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// It says why.
    #[error("the process that serves now refuses: {0}")]
    Refused(String),
    /// The state that came is about another disk.
    #[error("the disk has {here} bytes, and the process that served it says {there}")]
    OtherSize {
        /// As it was opened.
        here: u64,
        /// As it was served.
        there: u64,
    },
    /// A socket came that is not the one at the path that was named with it: its file could
    /// be anybody's.
    #[error("the socket that was handed over is not the one at {}", .0.display())]
    OtherSocket(PathBuf),
    /// What came is no socket to listen on.
    #[error(transparent)]
    NoSocket(#[from] SocketError),
    /// A message did not come, or cannot be.
    #[error("{0}")]
    Message(String),
}

impl From<ParcelError> for UpgradeError {
    fn from(error: ParcelError) -> Self {
        Self::Message(error.to_string())
    }
}

/// What both processes have to agree on: the image, and how a guest sees it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// Device and inode of each file, base first, and whether it is written to.
    files: Vec<(u64, u64, bool)>,
    num_queues: u16,
    queue_size: u16,
    logical_block: u32,
    serial: Vec<u8>,
}

impl Terms {
    pub fn of(args: &Args, files: &[HostFile]) -> io::Result<Self> {
        Ok(Self {
            files: identities(files)?,
            num_queues: args.num_queues,
            queue_size: args.queue_size,
            logical_block: args.logical_block_size.bytes(),
            serial: args.serial_number().as_bytes().to_vec(),
        })
    }

    /// The disk consists of other files by now.
    pub fn follow(&mut self, files: &[HostFile]) {
        match identities(files) {
            Ok(files) => self.files = files,
            // Then nobody agrees to these.
            Err(error) => log::error!("the files of the disk cannot be looked at: {error}"),
        }
    }

    fn write(&self, to: &mut Writer<'_>) {
        to.count(self.files.len());
        for &(device, inode, writable) in &self.files {
            to.u64(device);
            to.u64(inode);
            to.bool(writable);
        }
        to.u16(self.num_queues);
        to.u16(self.queue_size);
        to.u32(self.logical_block);
        to.text(&self.serial);
    }

    fn read(from: &mut Reader) -> Result<Self, ParcelError> {
        Ok(Self {
            files: from.list(|from| Ok((from.u64()?, from.u64()?, from.bool()?)))?,
            num_queues: from.u16()?,
            queue_size: from.u16()?,
            logical_block: from.u32()?,
            serial: from.text()?,
        })
    }

    /// What is different, if anything.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        let same_files = |it: &(u64, u64, bool)| (it.0, it.1);
        let files = |terms: &Self| terms.files.iter().map(same_files).collect::<Vec<_>>();
        [
            (files(self) != files(other), "the image is another one"),
            (
                self.files != other.files,
                "one of the two is read-only and the other is not",
            ),
            (self.num_queues != other.num_queues, "--num-queues differs"),
            (self.queue_size != other.queue_size, "--queue-size differs"),
            (
                self.logical_block != other.logical_block,
                "--logical-block-size differs",
            ),
            (self.serial != other.serial, "--serial differs"),
        ]
        .into_iter()
        .find_map(|(differs, what)| differs.then_some(what))
    }
}

/// See [`Terms::files`].
fn identities(files: &[HostFile]) -> io::Result<Vec<(u64, u64, bool)>> {
    let identity = |file: &HostFile| {
        let meta = file.file.metadata()?;
        Ok((meta.dev(), meta.ino(), file.writable))
    };
    files.iter().map(identity).collect()
}

/// All that goes from one process to the other.
struct State<S> {
    /// Of the disk.
    size: Sector,
    /// Where front-ends connect.
    front_ends: S,
    /// Where a process connects that takes over.
    upgrades: Option<S>,
    /// Where control clients connect.
    control: Option<S>,
    /// Front-ends that have connected and are not served.
    waiting: Vec<UnixStream>,
    /// The one that is.
    connection: Option<Suspended>,
    /// See [`part::LIMITS`].
    limits: Option<ThrottleLimits>,
    /// See [`part::METRICS`].
    metrics: Option<S>,
    /// See [`part::WRITE_THRESHOLD`].
    write_threshold: Option<u64>,
}

impl State<&ServerSocket> {
    fn write<'a>(&'a self, to: &mut Writer<'a>) {
        to.u64(self.size.0);
        write_socket(to, self.front_ends);
        to.optional(self.upgrades, write_socket);
        to.optional(self.control, write_socket);
        to.count(self.waiting.len());
        self.waiting.iter().for_each(|one| to.file(one.as_fd()));
        to.bool(self.connection.is_some());
        if let Some(connection) = &self.connection {
            connection.write(to);
        }
        let parts = [
            (part::LIMITS, self.limits.is_some()),
            (part::METRICS, self.metrics.is_some()),
            (part::WRITE_THRESHOLD, self.write_threshold.is_some()),
        ];
        let parts = parts.into_iter().filter(|(_, is_there)| *is_there);
        let parts = parts.fold(0, |all, (part, _)| all | part);
        if parts != 0 {
            to.u64(parts);
        }
        if let Some(limits) = &self.limits {
            limits.write(to);
        }
        if let Some(metrics) = self.metrics {
            write_socket(to, metrics);
        }
        if let Some(bytes) = self.write_threshold {
            to.u64(bytes);
        }
    }
}

fn write_socket<'a>(to: &mut Writer<'a>, socket: &'a ServerSocket) {
    to.file(socket.as_fd());
    to.optional(socket.made(), |to, made| {
        to.text(made.path().as_os_str().as_encoded_bytes());
        let (device, inode) = made.identity();
        to.u64(device);
        to.u64(inode);
    });
}

/// A listening socket that has come.
struct HandedSocket {
    listener: OwnedFd,
    /// If its file is to be removed in the end: its path, device and inode, as they are said
    /// to be.
    made: Option<(PathBuf, u64, u64)>,
}

impl HandedSocket {
    fn read(from: &mut Reader) -> Result<Self, ParcelError> {
        Ok(Self {
            listener: from.file()?,
            made: from.optional(|from| Ok((read_path(from)?, from.u64()?, from.u64()?)))?,
        })
    }

    /// Whether it is this socket, of a file that the other process would have removed.
    fn is(&self, bound: &Bound) -> bool {
        let said = self.made.as_ref();
        let said = said.map(|&(_, device, inode)| (device, inode));
        said == Some(bound.file()) && bound.is(&self.listener)
    }

    /// That it can be listened on, and is the one at its path, if it was seen to have one.
    fn check(&self, bound: Option<&Bound>) -> Result<(), UpgradeError> {
        self.check_as(&UNIX, bound)
    }

    /// That it can be listened on, also if it is reached by network. Where its file is, is
    /// said too late for that to be seen.
    fn check_anywhere(&self) -> Result<(), UpgradeError> {
        self.check_as(&UNIX_OR_TCP, None)
    }

    fn check_as(
        &self,
        domains: &[AddressFamily],
        bound: Option<&Bound>,
    ) -> Result<(), UpgradeError> {
        check_listener(self.listener.as_fd(), domains)?;
        match bound.filter(|bound| !self.is(bound)) {
            Some(bound) => Err(UpgradeError::OtherSocket(bound.path().to_owned())),
            None => Ok(()),
        }
    }

    /// From now on it is ours, and its file is removed when it is dropped, if it was
    /// [seen](Self::check) to be that. Other files are left alone, whatever was said of them.
    fn own(self, bound: Option<Bound>) -> ServerSocket {
        let made = bound.map(|bound| {
            let (device, inode) = bound.file();
            MadeFile::known(bound.path().to_owned(), device, inode)
        });
        ServerSocket::handed(self.listener, made)
    }
}

/// Who listens at a path, if that can be seen.
fn bound_at(path: &Path) -> Option<Bound> {
    let bound = Bound::at(path);
    if !matches!(bound, Ok(Some(_))) {
        let error = bound.as_ref().err().map(|error| format!(": {error}"));
        let error = error.unwrap_or_default();
        log::warn!(
            "cannot tell who listens at {}{error}; the file will be left there",
            path.display()
        );
    }
    bound.ok().flatten()
}

fn read_path(from: &mut Reader) -> Result<PathBuf, ParcelError> {
    use std::os::unix::ffi::OsStringExt;
    Ok(std::ffi::OsString::from_vec(from.text()?).into())
}

impl State<HandedSocket> {
    fn read(mut from: Reader) -> Result<Self, ParcelError> {
        let mut state = Self {
            size: Sector(from.u64()?),
            front_ends: HandedSocket::read(&mut from)?,
            upgrades: from.optional(HandedSocket::read)?,
            control: from.optional(HandedSocket::read)?,
            waiting: from.list(Reader::socket)?,
            connection: from.optional(Suspended::read)?,
            limits: None,
            metrics: None,
            write_threshold: None,
        };
        let parts = read_parts(&mut from)?;
        if parts & !part::ALL != 0 {
            return Err(ParcelError::Invalid("what was not asked for"));
        }
        if parts & part::LIMITS != 0 {
            state.limits = Some(ThrottleLimits::read(&mut from)?);
        }
        if parts & part::METRICS != 0 {
            state.metrics = Some(HandedSocket::read(&mut from)?);
        }
        if parts & part::WRITE_THRESHOLD != 0 {
            state.write_threshold = Some(from.u64()?);
        }
        from.end()?;
        Ok(state)
    }
}

/// Which parts there are, or are known, as the rest of a message begins with; a process that
/// knows of none does not say so.
fn read_parts(from: &mut Reader) -> Result<u64, ParcelError> {
    match from.is_at_end() {
        true => Ok(0),
        false => from.u64(),
    }
}

/// A message that says nothing but what it is.
fn say(socket: &UnixStream, kind: u32) -> Result<(), ParcelError> {
    Writer::default().send(socket, kind, ANSWER_TIME)
}

/// The folder that a socket is made in, and removed from in the end.
pub(super) fn folder_of(socket: &Path) -> PathBuf {
    let parent = socket.parent().filter(|parent| *parent != Path::new(""));
    parent.unwrap_or(Path::new(".")).to_owned()
}
