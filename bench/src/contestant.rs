//! Who is compared: the programs, the formats, and how each is started.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error};
use serde::{Deserialize, Serialize};

use crate::bed::Bed;

/// A format of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// ploop version 2, which QEMU calls parallels.
    Ploop,
    /// QEMU's own.
    Qcow2,
    /// The disk itself.
    Raw,
}

impl Format {
    /// The name that qemu-img knows it by.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Self::Ploop => "parallels",
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// One side of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Contestant {
    /// vhost-user-ploop; `None` leaves the number of runners at its default.
    Ours {
        /// `--runners`.
        runners: Option<u32>,
    },
    /// Another build of vhost-user-ploop, to be compared with this one.
    OtherBuild,
    /// qemu-storage-daemon with a driver for the format.
    Qsd(Format),
    /// No server: io_uring on the plain file, in the client. What the host can do.
    PlainFile,
}

/// vhost-user-ploop as it comes.
pub const OURS: Contestant = Contestant::Ours { runners: None };
/// qemu-storage-daemon on a ploop image.
pub const QSD_PARALLELS: Contestant = Contestant::Qsd(Format::Ploop);
/// qemu-storage-daemon on a qcow2 image.
pub const QSD_QCOW2: Contestant = Contestant::Qsd(Format::Qcow2);
/// qemu-storage-daemon on a raw image.
pub const QSD_RAW: Contestant = Contestant::Qsd(Format::Raw);
/// The limit of the host.
pub const PLAIN_FILE: Contestant = Contestant::PlainFile;

impl Contestant {
    /// Whether it is a build of vhost-user-ploop.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Ours { .. } | Self::OtherBuild)
    }

    /// Whether it is a server of others.
    pub fn is_peer(self) -> bool {
        matches!(self, Self::Qsd(_))
    }

    /// What its image is made as.
    pub fn format(self) -> Format {
        match self {
            Self::Ours { .. } | Self::OtherBuild => Format::Ploop,
            Self::Qsd(format) => format,
            Self::PlainFile => Format::Raw,
        }
    }

    /// As printed.
    pub fn label(self) -> String {
        match self {
            Self::Ours { runners: None } => "vhost-user-ploop".into(),
            Self::Ours {
                runners: Some(runners),
            } => format!(
                "vhost-user-ploop, {runners} runner{}",
                if runners == 1 { "" } else { "s" }
            ),
            Self::OtherBuild => "the other build".into(),
            Self::Qsd(format) => format!("qsd {}", format.qemu_name()),
            Self::PlainFile => "plain file".into(),
        }
    }
}

impl From<Contestant> for String {
    fn from(contestant: Contestant) -> Self {
        contestant.label()
    }
}

/// The contestant with that [label](Contestant::label).
impl TryFrom<String> for Contestant {
    type Error = Error;

    fn try_from(label: String) -> Result<Self, Error> {
        let known = [
            OURS,
            Self::OtherBuild,
            QSD_PARALLELS,
            QSD_QCOW2,
            QSD_RAW,
            PLAIN_FILE,
        ];
        let with_runners = || {
            let words = label.split_once(", ")?.1;
            let runners = Some(words.split_once(' ')?.0.parse().ok()?);
            Some(Self::Ours { runners })
        };
        known
            .into_iter()
            .chain(with_runners())
            .find(|contestant| contestant.label() == label)
            .with_context(|| format!("nobody is called {label:?}"))
    }
}

/// The programs and how they are called.
#[derive(Clone, Debug)]
pub struct Programs {
    /// vhost-user-ploop.
    pub server: PathBuf,
    /// More arguments for it, to try out an option.
    pub server_args: Vec<String>,
    /// What [`Contestant::OtherBuild`] is.
    pub other_build: Option<PathBuf>,
    /// ploop-img.
    pub img: PathBuf,
}

/// How a server is started.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// What it serves.
    pub image: &'a Path,
    /// The qcow2 images below it, the next one first.
    pub backing: &'a [PathBuf],
    /// Where it listens.
    pub socket: &'a Path,
    /// On what the image lies, which decides about O_DIRECT.
    pub bed: Bed,
    /// Virtqueues.
    pub queues: u32,
    /// Only for qemu-storage-daemon, whose exports write through when told so and
    /// do not look at what the client negotiated.
    pub write_through: bool,
}

impl Contestant {
    /// The command that serves an image; `None` where no server is needed, or there
    /// is none.
    pub fn command(self, programs: &Programs, launch: Launch<'_>) -> Option<Command> {
        match self {
            Self::Ours { runners } => {
                let mut command = ours(&programs.server, launch);
                if let Some(runners) = runners {
                    command.arg("--runners").arg(runners.to_string());
                }
                command.args(&programs.server_args);
                Some(command)
            }
            Self::OtherBuild => {
                let program = programs.other_build.as_deref()?;
                Some(ours(program, launch))
            }
            Self::Qsd(format) => Some(qsd(format, launch)),
            Self::PlainFile => None,
        }
    }
}

fn ours(program: &Path, launch: Launch<'_>) -> Command {
    let mut command = Command::new(program);
    command
        .arg("--socket-path")
        .arg(launch.socket)
        .arg("--blk-file")
        .arg(launch.image)
        .arg("--num-queues")
        .arg(launch.queues.to_string())
        .arg("--cache")
        .arg(if launch.bed.is_direct() {
            "none"
        } else {
            "writeback"
        });
    command
}

fn qsd(format: Format, launch: Launch<'_>) -> Command {
    let direct = if launch.bed.is_direct() { "on" } else { "off" };
    // The format's node needs discard=unmap too: without it, it drops discards.
    let write_through = if launch.write_through { "on" } else { "off" };
    let mut command = Command::new("qemu-storage-daemon");
    command
        .args(["--object", "iothread,id=iot0"])
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=prot,filename={},cache.direct={direct},aio=io_uring,discard=unmap",
            launch.image.display()
        ))
        .arg("--blockdev")
        .arg(format!(
            "driver={},node-name=fmt,file=prot,discard=unmap{}",
            format.qemu_name(),
            backing(launch, direct)
        ))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=fmt,addr.type=unix,addr.path={},\
             writable=on,writethrough={write_through},num-queues={},iothread=iot0",
            launch.socket.display(),
            launch.queues
        ));
    command
}

/// The name that qemu-storage-daemon has for a qcow2 image below the one that is served, so many
/// levels down.
pub fn backing_node(level: usize) -> String {
    format!("backing{level}")
}

/// A backing file does not inherit the cache mode of the image, so it is given.
fn backing(launch: Launch<'_>, direct: &str) -> String {
    let mut prefix = String::new();
    let mut options = String::new();
    for (level, path) in launch.backing.iter().enumerate() {
        prefix += "backing.";
        let _ = write!(
            options,
            ",{prefix}driver=qcow2,{prefix}node-name={},{prefix}read-only=on,\
             {prefix}file.driver=file,{prefix}file.filename={},\
             {prefix}file.cache.direct={direct},{prefix}file.aio=io_uring",
            backing_node(level),
            path.display()
        );
    }
    options
}
