//! The command line of the daemon: QEMU's back-end program conventions and what
//! is ours.

use std::ffi::OsStr;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Parser, ValueEnum};
use log::LevelFilter;
use nix::unistd::{Group, Uid, User};

use super::logging::LogFormat;
use super::metrics::MetricsAddress;
use super::sandbox::{RunAs, SandboxOptions, SeccompMode};
use super::socket::SocketAccess;
use crate::device::{
    DEFAULT_POLL, LogicalBlock, MAX_QUEUE_SIZE, MAX_QUEUES, MIN_QUEUE_SIZE, Queues, Serial,
    ThrottleLimits,
};
use crate::format::Guid;
use crate::ploop::{self, OnEnospc, OnLockLoss};
use crate::storage::{Aio, Cache, HostOptions};

/// What `--print-capabilities` prints.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

const PRINT_CAPABILITIES: &str = "--print-capabilities";

/// Most runners: more threads than that only get in each other's way.
const MAX_RUNNERS: u64 = 64;

/// Longest `--poll-us`: a wait worth sleeping for.
const MAX_POLL_US: u64 = 1000;

/// Longest `--writeback-delay`, in ms: a minute.
const MAX_WRITEBACK_DELAY_MS: u64 = 60_000;

const AFTER_HELP: &str = "\
Examples:
  ploop-img create disk 10G
  vhost-user-ploop --socket-path=/run/disk.sock --blk-file=disk

  A guest's memory must be shared with the back-end. QEMU:
    -object memory-backend-memfd,id=mem,size=4G,share=on -machine memory-backend=mem
    -chardev socket,id=disk,path=/run/disk.sock
    -device vhost-user-blk-pci,chardev=disk
  cloud-hypervisor:
    --memory size=4G,shared=on --disk vhost_user=true,socket=/run/disk.sock

SIGTERM and SIGINT complete what is in flight, close the image and remove the
socket. A second one ends the program at once, which the image survives as it
survives a power cut.";

/// Serves a ploop disk image to a virtual machine, as a vhost-user-blk back-end.
#[derive(Clone, Debug, Parser)]
#[command(name = "vhost-user-ploop", version, after_help = AFTER_HELP)]
#[command(group(ArgGroup::new("socket").required(true).args(["socket_path", "fd", "take_over"])))]
pub struct Args {
    /// Make the socket here and accept front-ends on it, one after the other.
    ///
    /// A socket that a dead process has left is replaced; one that somebody
    /// listens on is not.
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Who may connect to the socket of --socket-path: its permission bits, in octal.
    /// They are in force when the socket appears. A front-end must be able to write.
    /// [default: 777 less the umask]
    #[arg(long, value_name = "MODE", conflicts_with_all = ["fd", "take_over"],
          value_parser = socket_mode)]
    pub socket_mode: Option<u32>,

    /// The group of the socket of --socket-path, as a name or a number: the one that
    /// the virtual machines run with, for example.
    #[arg(long, value_name = "GROUP", conflicts_with_all = ["fd", "take_over"],
          value_parser = group_id)]
    pub socket_group: Option<u32>,

    /// Accept front-ends on this inherited descriptor, a listening socket.
    #[arg(long, value_name = "N", value_parser = |text: &str| number(text, 0..=RawFd::MAX))]
    pub fd: Option<RawFd>,

    /// Listen here for a process that is to go on in this one's place: see --take-over.
    /// Only this user and root can connect.
    #[arg(long, value_name = "PATH", conflicts_with = "take_over")]
    pub upgrade_socket: Option<PathBuf>,

    /// Go on in the place of the process whose --upgrade-socket this is, with its
    /// sockets and its front-end, which notices nothing. That process ends when this
    /// one serves; if this one cannot, it goes on itself. The image and what a guest
    /// sees of it must be the same.
    #[arg(long, value_name = "PATH")]
    pub take_over: Option<PathBuf>,

    /// Listen here for programs that ask, watch and steer the disk while it is served,
    /// in QMP, the protocol of QEMU's monitor; `none`: nowhere.
    /// [default: where ploop-img looks, if the host has a run-time folder for it]
    #[arg(long, value_name = "PATH", conflicts_with = "take_over")]
    pub control: Option<PathBuf>,

    /// Who may connect to the socket of --control: its permission bits, in octal. Whoever
    /// may connect can end the program. [default: 600]
    #[arg(long, value_name = "MODE", requires = "control", value_parser = socket_mode)]
    pub control_mode: Option<u32>,

    /// The group of the socket of --control, as a name or a number. The default mode
    /// leaves it out.
    #[arg(long, value_name = "GROUP", requires = "control", value_parser = group_id)]
    pub control_group: Option<u32>,

    /// Tell Prometheus how the disk is doing, by HTTP, under /metrics: on a Unix socket
    /// that is made at `unix:PATH`, or on `ADDRESS:PORT`, such as `127.0.0.1:9620`,
    /// `[::1]:9620` or `localhost:9620`. A port alone is one of 127.0.0.1. Whoever
    /// can connect can read the metrics.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "take_over",
          value_parser = metrics_address())]
    pub metrics: Option<MetricsAddress>,

    /// Who may connect to the Unix socket of --metrics: its permission bits, in octal.
    /// [default: 600]
    #[arg(long, value_name = "MODE", requires = "metrics", value_parser = socket_mode)]
    pub metrics_mode: Option<u32>,

    /// The group of the Unix socket of --metrics, as a name or a number. The default mode
    /// leaves it out.
    #[arg(long, value_name = "GROUP", requires = "metrics", value_parser = group_id)]
    pub metrics_group: Option<u32>,

    /// Print what this program can do, as JSON, and exit. Other options are ignored then.
    #[arg(long)]
    pub print_capabilities: bool,

    /// The image: a bundle (its folder or its DiskDescriptor.xml) or a bare file.
    #[arg(long, value_name = "PATH")]
    pub blk_file: PathBuf,

    /// Refuse writes, and change nothing in the image.
    #[arg(long)]
    pub read_only: bool,

    /// Serve this snapshot of a bundle instead of its present state; as with
    /// --read-only.
    #[arg(long, value_name = "GUID")]
    pub snapshot: Option<Guid>,

    /// When the image is open, and locked so that nobody else opens it for writing: from the
    /// `start` of this program on, or while a ring is `running`, which lets a guest be
    /// migrated to another QEMU: its back-end can start while this one serves.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = LockTime::Start)]
    pub lock: LockTime,

    /// How many virtqueues to offer, 1 to 64. One that no guest uses costs nearly
    /// nothing; QEMU asks for one per vCPU.
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUES,
          value_parser = |text: &str| number(text, 1..=MAX_QUEUES))]
    pub num_queues: u16,

    /// Largest virtqueue to accept, in descriptors: a power of two from 4 to 1024.
    /// The guest chooses; QEMU's `queue-size` says what.
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUE_SIZE, value_parser = queue_size)]
    pub queue_size: u16,

    /// The disk's sector size as the guest sees it, in bytes. What was partitioned with
    /// one size is not found with the other.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = logical_block())]
    pub logical_block_size: LogicalBlock,

    /// How many threads make new mappings (first writes, discards, copies), 1 to
    /// 64. Reads and overwrites do not need them.
    #[arg(long, value_name = "N", default_value_t = ploop::Options::default().runners as u64,
          value_parser = |text: &str| number(text, 1..=MAX_RUNNERS))]
    pub runners: u64,

    /// Whether the host's page cache is used; as QEMU's `cache`. `none` is O_DIRECT
    /// where the file system can do that. What a guest flushes is stable in both.
    #[arg(long, value_name = "MODE", value_enum, default_value_t = CacheMode::None)]
    pub cache: CacheMode,

    /// How the host does I/O. `auto` is io_uring, unless the kernel lacks it or the
    /// image lies in memory (tmpfs), where plain calls are faster.
    #[arg(long, value_name = "HOW", value_enum, default_value_t = AioMode::Auto)]
    pub aio: AioMode,

    /// The disk's serial number, up to 20 visible ASCII characters.
    /// [default: the beginning of the image's name]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<Serial>,

    /// How long a changed mapping may wait, in ms, before it is written to the
    /// image, so that many changes go in one write. 0: at once. What a guest
    /// flushes never waits.
    #[arg(long, value_name = "MS",
          default_value_t = ploop::Options::default().writeback_delay.as_millis() as u64,
          value_parser = |text: &str| number(text, 0..=MAX_WRITEBACK_DELAY_MS))]
    pub writeback_delay: u64,

    /// How long a queue's thread that has nothing under way looks for new requests
    /// before it sleeps, at most, in microseconds. It does so only under load; 0:
    /// never.
    #[arg(long, value_name = "US",
          default_value_t = DEFAULT_POLL.as_micros() as u64,
          value_parser = |text: &str| number(text, 0..=MAX_POLL_US))]
    pub poll_us: u64,

    /// What happens to writes that need space when the host's disk is full.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = EnospcPolicy::Stop)]
    pub on_enospc: EnospcPolicy,

    /// What happens to requests when the lock on the image is lost, as a server can take it
    /// away. Nothing is read or written any more in either case. Where they wait, the process
    /// ends with status 75 when one that is started anew can go on with them.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = LockLossPolicy::Stop)]
    pub on_lock_loss: LockLossPolicy,

    /// Limits on what guests may do, as `iops=500,bps=100M`: operations and bytes a
    /// second, of reads alone with `_rd`, of writes with `_wr`; in a burst with `_max`, of
    /// so many seconds with `_max_length`. --control can change them.
    #[arg(long, value_name = "LIMITS", value_parser = |text: &str| text.parse::<ThrottleLimits>())]
    pub throttle: Option<ThrottleLimits>,

    /// What happens when this program makes a system call that it never makes by itself,
    /// as it might once a guest has taken it over.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = SeccompMode::Kill)]
    pub seccomp: SeccompMode,

    /// Whether the program, once the image is open, gives up access to all files but
    /// the image and the sockets, drops its capabilities, and hides from other
    /// processes of the same user.
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t = SandboxMode::Auto)]
    pub sandbox: SandboxMode,

    /// Become this user, a name or a number, once the image is open. The user must be
    /// able to make the socket in its folder. [default: whoever starts the program]
    #[arg(long, value_name = "USER", value_parser = user_id)]
    pub user: Option<UserId>,

    /// Become a member of this group, a name or a number, and of no other, once the
    /// image is open. [default: with --user, that user's]
    #[arg(long, value_name = "GROUP", value_parser = group_id)]
    pub group: Option<u32>,

    /// How much to say on standard error.
    /// [default: what RUST_LOG says, else info]
    #[arg(long, value_name = "LEVEL", value_parser = log_level())]
    pub log_level: Option<LevelFilter>,

    /// What a line on standard error looks like. Where nobody reads them, lines are
    /// lost, and nothing waits.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Auto)]
    pub log_format: LogFormat,
}

/// [`Cache`], as the command line has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Around the host's page cache.
    None,
    /// Through the host's page cache.
    Writeback,
}

/// [`Aio`], as the command line has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AioMode {
    /// What suits the image.
    Auto,
    /// One ring for each thread.
    #[value(name = "io_uring")]
    IoUring,
    /// Plain system calls, one after the other.
    Psync,
}

/// When an image is open and locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LockTime {
    /// From the start of the program to its end.
    Start,
    /// While a ring runs.
    Running,
}

/// [`OnEnospc`], as the command line has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EnospcPolicy {
    /// They wait until there is space, and the guest with them.
    Stop,
    /// They fail.
    Report,
}

/// [`OnLockLoss`], as the command line has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LockLossPolicy {
    /// They wait, and the guest with them.
    Stop,
    /// They fail.
    Report,
}

/// How far the program restricts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxMode {
    /// As far as the kernel lets it.
    Auto,
    /// Not at all.
    None,
}

/// A user as the command line names him.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserId {
    /// His number.
    pub user: u32,
    /// The number of his group, if he is known here.
    pub group: Option<u32>,
}

fn log_level() -> impl TypedValueParser<Value = LevelFilter> {
    let names = ["off", "error", "warn", "info", "debug", "trace"];
    PossibleValuesParser::new(names).try_map(|name| name.parse::<LevelFilter>())
}

/// A number in `allowed`. Whatever is wrong with another text, the error says what
/// is right.
fn number<T: FromStr + PartialOrd + Display>(
    text: &str,
    allowed: RangeInclusive<T>,
) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| allowed.contains(number));
    number.ok_or_else(|| {
        format!(
            "it must be a number from {} to {}",
            allowed.start(),
            allowed.end()
        )
    })
}

fn queue_size(text: &str) -> Result<u16, String> {
    let size = text.parse().ok();
    size.filter(|&size| Queues::new(1, size).is_ok())
        .ok_or_else(|| {
            format!("it must be a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}")
        })
}

fn logical_block() -> impl TypedValueParser<Value = LogicalBlock> {
    PossibleValuesParser::new(["512", "4096"]).map(|size| match size.as_str() {
        "4096" => LogicalBlock::Bytes4096,
        _ => LogicalBlock::Bytes512,
    })
}

fn metrics_address() -> impl TypedValueParser<Value = MetricsAddress> {
    OsStringValueParser::new().try_map(|text| MetricsAddress::parse(&text))
}

fn socket_mode(text: &str) -> Result<u32, String> {
    let digits = text.bytes().all(|digit| digit.is_ascii_digit());
    let mode = u32::from_str_radix(text, 8).ok();
    mode.filter(|&mode| digits && mode <= 0o777)
        .ok_or_else(|| "it must be an octal number up to 777, such as 660".to_owned())
}

/// The number of a group that is given by number or name.
fn group_id(text: &str) -> Result<u32, String> {
    if let Ok(id) = text.parse() {
        // The highest one means "no change" to chown(2).
        return Some(id)
            .filter(|&id| id != u32::MAX)
            .ok_or_else(|| format!("the number of a group is at most {}", u32::MAX - 1));
    }
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err("this host has no such group".to_owned()),
        Err(error) => Err(format!("cannot look up the group: {error}")),
    }
}

/// The number of a user that is given by number or name, and of his group.
fn user_id(text: &str) -> Result<UserId, String> {
    let number = text.parse().ok();
    if number == Some(u32::MAX) {
        return Err(format!("the number of a user is at most {}", u32::MAX - 1));
    }
    let found = match number {
        Some(number) => User::from_uid(Uid::from_raw(number)),
        None => User::from_name(text),
    };
    match (found, number) {
        (Ok(Some(user)), _) => Ok(UserId {
            user: user.uid.as_raw(),
            group: Some(user.gid.as_raw()),
        }),
        (_, Some(user)) => Ok(UserId { user, group: None }),
        (Ok(None), None) => Err("this host has no such user".to_owned()),
        (Err(error), None) => Err(format!("cannot look up the user: {error}")),
    }
}

/// Whether the capabilities are asked for; then nothing else on the command line
/// counts, not even what is wrong with it.
pub fn asks_for_capabilities<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> bool {
    args.into_iter()
        .any(|arg| arg.as_ref() == PRINT_CAPABILITIES)
}

impl Args {
    /// Whether nothing is to be written: asked for, or a snapshot is served, on
    /// which others may depend.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.snapshot.is_some()
    }

    /// Where processes connect that are to take over, now or later.
    pub fn upgrades(&self) -> Option<&Path> {
        self.upgrade_socket.as_deref().or(self.take_over.as_deref())
    }

    /// Whether another process may take over one day.
    pub fn can_be_upgraded(&self) -> bool {
        self.upgrades().is_some()
    }

    /// Who may connect to the socket.
    pub fn socket_access(&self) -> SocketAccess {
        SocketAccess {
            mode: self.socket_mode,
            group: self.socket_group,
        }
    }

    /// Who may connect to the control socket.
    pub fn control_access(&self) -> SocketAccess {
        SocketAccess {
            mode: self.control_mode.or(SocketAccess::PRIVATE.mode),
            group: self.control_group,
        }
    }

    /// Who may connect to the Unix socket of metrics.
    pub fn metrics_access(&self) -> SocketAccess {
        SocketAccess {
            mode: self.metrics_mode.or(SocketAccess::PRIVATE.mode),
            group: self.metrics_group,
        }
    }

    /// Whether a socket is for another group than this process's own.
    pub fn gives_sockets_away(&self) -> bool {
        let groups = [self.socket_group, self.control_group, self.metrics_group];
        groups.iter().any(Option::is_some)
    }

    /// What the process gives up.
    pub fn sandbox_options(&self) -> SandboxOptions {
        SandboxOptions {
            seccomp: self.seccomp,
            confines: self.sandbox == SandboxMode::Auto,
            run_as: RunAs {
                user: self.user.map(|user| user.user),
                group: self.group.or(self.user.and_then(|user| user.group)),
            },
            opens_for_rings: self.lock == LockTime::Running,
        }
    }

    /// The engine's part.
    pub fn engine_options(&self) -> ploop::Options {
        let mut options = ploop::Options::default();
        options.read_only = self.is_read_only();
        options.runners = self.runners as usize;
        options.awaits_take_over = true;
        options.max_queues = usize::from(self.num_queues);
        // Most requests are one operation; what is more waits in the engine.
        options.queue_depth = u32::from(self.queue_size);
        options.writeback_delay = Duration::from_millis(self.writeback_delay);
        options.on_enospc = match self.on_enospc {
            EnospcPolicy::Stop => OnEnospc::Stop,
            EnospcPolicy::Report => OnEnospc::Report,
        };
        options.on_lock_loss = match self.on_lock_loss {
            LockLossPolicy::Stop => OnLockLoss::Stop,
            LockLossPolicy::Report => OnLockLoss::Report,
        };
        options
    }

    /// The storage's part.
    pub fn host_options(&self) -> HostOptions {
        HostOptions {
            cache: match self.cache {
                CacheMode::None => Cache::None,
                CacheMode::Writeback => Cache::Writeback,
            },
            aio: match self.aio {
                AioMode::Auto => Aio::Auto,
                AioMode::IoUring => Aio::IoUring,
                AioMode::Psync => Aio::Psync,
            },
        }
    }

    /// How long queue threads may look for work before they sleep.
    pub fn longest_poll(&self) -> Duration {
        Duration::from_micros(self.poll_us)
    }

    /// The serial number: as given, else from the image's name.
    pub fn serial_number(&self) -> Serial {
        self.serial
            .unwrap_or_else(|| Serial::from_file_name(&image_name(&self.blk_file)))
    }
}

/// The name of a bundle's folder or of a bare image, without its extension.
fn image_name(path: &Path) -> String {
    let is_descriptor = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("xml"));
    let named = if is_descriptor {
        path.parent().filter(|folder| folder.file_name().is_some())
    } else {
        None
    };
    let stem = named.unwrap_or(path).file_stem();
    stem.unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(args: &[&str]) -> Result<Args, String> {
        let always = [
            "vhost-user-ploop",
            "--socket-path=s",
            "--blk-file=dir/disk.hds",
        ];
        Args::try_parse_from(always.iter().chain(args)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_description_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn one_socket_is_needed() {
        let parse = |args: &[&str]| Args::try_parse_from(args);
        assert!(parse(&["x", "--blk-file=f"]).is_err());
        assert!(parse(&["x", "--blk-file=f", "--fd=3"]).is_ok());
        assert!(parse(&["x", "--blk-file=f", "--fd=3", "--socket-path=s"]).is_err());
        assert!(parse(&["x", "--socket-path=s"]).is_err());
    }

    #[test]
    fn wrong_values_are_named_with_what_is_allowed() {
        for (arg, allowed) in [
            ("--num-queues=0", "1 to 64"),
            ("--num-queues=65", "1 to 64"),
            ("--num-queues=many", "1 to 64"),
            ("--queue-size=100", "a power of two from 4 to 1024"),
            ("--queue-size=2048", "a power of two from 4 to 1024"),
            ("--queue-size=99999", "a power of two from 4 to 1024"),
            ("--queue-size=1k", "a power of two from 4 to 1024"),
            ("--runners=0", "1 to 64"),
            ("--runners=-1", "1 to 64"),
            ("--cache=magic", "none, writeback"),
            ("--aio=magic", "auto, io_uring, psync"),
            ("--lock=magic", "start, running"),
            ("--serial=123456789012345678901", "at most 20 bytes"),
            ("--on-enospc=magic", "stop, report"),
            ("--writeback-delay=60001", "0 to 60000"),
            ("--writeback-delay=1s", "0 to 60000"),
            ("--poll-us=1001", "0 to 1000"),
            ("--fd=-1", "0 to 2147483647"),
            ("--socket-mode=668", "an octal number up to 777"),
            ("--socket-mode=1777", "an octal number up to 777"),
            ("--socket-mode=+660", "an octal number up to 777"),
            ("--socket-mode=rw", "an octal number up to 777"),
            ("--control-mode=668", "an octal number up to 777"),
            ("--metrics=example.org:9620", "an IP address before"),
            ("--metrics=:9620", "an IP address before"),
            ("--metrics=/run/socket", "unix:"),
            ("--metrics=unix:", "unix:PATH"),
            ("--metrics=127.0.0.1:65536", "needs a port"),
            ("--metrics=::1", "needs a port"),
            ("--metrics-mode=668", "an octal number up to 777"),
            ("--throttle=fast", "no limit"),
            ("--throttle=iops=many", "no number"),
            ("--throttle=bps=many", "not a size"),
            ("--throttle=iops_max=5", "require corresponding"),
            ("--socket-group=no such", "has no such group"),
            ("--socket-group=4294967295", "at most 4294967294"),
            ("--logical-block-size=1024", "512, 4096"),
            ("--log-format=loud", "auto, text, journal, json"),
            ("--log-level=loud", "off, error, warn, info, debug, trace"),
        ] {
            let message = parse(&[arg]).unwrap_err();
            let value = arg.split('=').nth(1).unwrap();
            assert!(message.contains(value), "{message}");
            assert!(message.contains(allowed), "{message}");
        }
    }

    #[test]
    fn the_group_of_the_socket_is_a_name_or_a_number() {
        let access = |args: &[&str]| parse(args).unwrap().socket_access();
        assert_eq!(access(&[]), SocketAccess::BY_UMASK);
        let expected = SocketAccess {
            mode: Some(0o660),
            group: Some(0),
        };
        assert_eq!(
            access(&["--socket-mode=0660", "--socket-group=0"]),
            expected
        );
        assert_eq!(
            access(&["--socket-mode=660", "--socket-group=root"]),
            expected
        );
        let inherited = ["x", "--blk-file=f", "--fd=3", "--socket-mode=660"];
        assert!(Args::try_parse_from(inherited).is_err());
    }

    #[test]
    fn capabilities_win_over_anything() {
        assert!(asks_for_capabilities([
            "x",
            "--nonsense",
            "--print-capabilities"
        ]));
        assert!(!asks_for_capabilities(["x", "--fd=3"]));
        let value: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        assert_eq!(value["type"], "block");
    }

    #[test]
    fn the_serial_number_comes_from_the_image() {
        let serial = |file: &str| {
            let args = ["x", "--fd=3", "--blk-file", file];
            Args::try_parse_from(args).unwrap().serial_number()
        };
        let expected = |text: &str| text.parse::<Serial>().unwrap();
        assert_eq!(serial("a/disk.hds"), expected("disk"));
        assert_eq!(serial("a/bundle"), expected("bundle"));
        assert_eq!(serial("a/bundle/DiskDescriptor.xml"), expected("bundle"));
        assert_eq!(serial("DiskDescriptor.xml"), expected("DiskDescriptor"));
        assert_eq!(
            parse(&["--serial=abc"]).unwrap().serial_number(),
            expected("abc")
        );
    }
}
