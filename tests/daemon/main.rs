//! The daemon as a process: its command line, its socket, its threads, its end.

mod bitmaps;
mod cloud_hypervisor;
#[path = "../common/mod.rs"]
mod common;
mod control;
mod death;
mod deletions;
mod footprint;
#[path = "../common/front_end.rs"]
mod front_end;
mod grow;
mod hand_over;
mod huge;
mod jobs;
mod like_qemu;
mod log;
mod looked_at;
mod merges;
mod metrics;
mod nonsense;
mod options;
mod prometheus;
#[cfg(target_arch = "x86_64")]
mod sandbox;
mod small_host;
mod snapshots;
mod stat;
#[path = "../common/survivor.rs"]
mod survivor;
mod switches;
mod top;
mod turns;
mod upgrade;
mod vanishing;

use std::{
    fs::{self, Permissions},
    io::{Read, Write},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    os::unix::fs::{FileExt, PermissionsExt, chown},
    os::unix::net::{UnixListener, UnixStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{backend::Backend, img::ploop_img, sockets::is_listened_on};
use front_end::*;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use tempfile::TempDir;
use vhost::VhostBackend;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_RO, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

const OK: u8 = 0;
const IOERR: u8 = 1;

/// Somebody who is not root.
const NOBODY: u32 = 65_534;

/// How many front-ends talk nonsense, each in its own way.
const FRONT_ENDS: u64 = 200;

struct Rig {
    folder: TempDir,
    image: PathBuf,
    socket: PathBuf,
}

impl Rig {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let image = folder.path().join("disk.hds");
        ploop_img(["create", image.to_str().unwrap(), "64M"]).ok();
        Self {
            socket: folder.path().join("socket"),
            image,
            folder,
        }
    }

    fn serve(&self, options: &[&str]) -> Backend {
        Backend::start(&self.image, &self.socket, options)
    }

    /// The same where these system calls fail with `errno`.
    fn serve_without(&self, calls: &[i64], errno: Errno, options: &[&str]) -> Backend {
        let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
        let refusal = SeccompAction::Errno(errno.raw_os_error() as u32);
        let (arch, other) = (TargetArch::x86_64, SeccompAction::Allow);
        let filter = SeccompFilter::new(rules, other, refusal, arch).unwrap();
        let filter: BpfProgram = filter.try_into().unwrap();
        thread::scope(|scope| {
            // The daemon inherits what its parent's thread has.
            let started = scope.spawn(|| {
                seccompiler::apply_filter(&filter).unwrap();
                self.serve(options)
            });
            started.join().unwrap()
        })
    }

    /// Runs the daemon to its end, which should come at once.
    fn refused(&self, args: &[&str]) -> String {
        let socket = format!("--socket-path={}", self.socket.display());
        refused(&[&[socket.as_str()], args].concat())
    }
}

fn daemon(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
    command.args(args).stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> Output {
    daemon(args).output().unwrap()
}

/// Runs the daemon, which must fail in order; returns what it says.
fn refused(args: &[&str]) -> String {
    let output = output(args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{args:?}: {said}");
    assert!(output.status.code().is_some(), "{args:?}: {said}");
    assert!(!said.contains("panicked"), "{args:?}: {said}");
    assert!(output.stdout.is_empty(), "{args:?}");
    said
}

fn start_front_end(socket: &Path) -> FrontEnd {
    let mut front_end = FrontEnd::connect(socket);
    front_end.negotiate(u64::MAX);
    front_end.start_rings();
    front_end
}

fn wait_for(what: &str, mut has_come: impl FnMut() -> bool) {
    let start = Instant::now();
    while !has_come() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn expect_service(front_end: &mut FrontEnd) {
    front_end.fill(DATA, &[7; 512]);
    let ring = &mut front_end.rings[0];
    assert_eq!(
        ring.run(VIRTIO_BLK_T_OUT, 5, &[readable(DATA, 512)]),
        (OK, 1)
    );
    let target = [writable(DATA + 512, 512)];
    assert_eq!(ring.run(VIRTIO_BLK_T_IN, 5, &target), (OK, 513));
    assert_eq!(front_end.bytes(DATA + 512, 512), [7; 512]);
}

#[test]
fn capabilities_are_printed_whatever_else_is_given() {
    for args in [
        &["--print-capabilities"][..],
        &["--nonsense", "--print-capabilities", "--fd=x"],
    ] {
        let output = output(args);
        assert!(output.status.success());
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n"
        );
    }
}

#[test]
fn what_cannot_be_served_is_refused() {
    let rig = Rig::new();
    let at = |name: &str| rig.folder.path().join(name);
    fs::write(at("empty"), "").unwrap();
    fs::write(at("text"), "not an image".repeat(100)).unwrap();
    fs::create_dir(at("folder")).unwrap();
    let header = &fs::read(&rig.image).unwrap()[..64];
    fs::write(at("cut"), header).unwrap();
    let fifo = at("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).unwrap();
    for name in ["absent", "empty", "text", "folder", "cut", "fifo"] {
        for read_only in [&[][..], &["--read-only"]] {
            let file = format!("--blk-file={}", at(name).display());
            let said = rig.refused(&[&[file.as_str()], read_only].concat());
            assert!(said.contains(name), "{said}");
            assert!(!rig.socket.exists(), "{name}");
        }
    }
}

#[test]
fn a_file_without_permission_is_refused() {
    const NOBODY: u32 = 65_534;
    let rig = Rig::new();
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    mode(rig.folder.path(), 0o777);
    let socket = format!("--socket-path={}", rig.socket.display());
    let file = format!("--blk-file={}", rig.image.display());
    let mut command = daemon(&[&socket, &file]);
    mode(&rig.image, 0o000);
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let Ok(output) = command.output() else {
        let _ = common::left_out("nobody cannot run programs from the build's folder");
        return;
    };
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Permission denied"), "{said}");
    assert!(!rig.socket.exists());
}

/// Overwrites a word of an image's metadata.
fn set_word(image: &Path, at: u64, word: u32) {
    let file = fs::OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(&word.to_le_bytes(), at).unwrap();
}

#[test]
fn a_corrupt_image_is_refused_with_the_command_to_run() {
    let rig = Rig::new();
    // The first entry of the BAT, beyond the end of the file.
    set_word(&rig.image, 64, 1000);
    let before = fs::read(&rig.image).unwrap();
    let file = format!("--blk-file={}", rig.image.display());
    for read_only in [&[][..], &["--read-only"]] {
        let said = rig.refused(&[&[file.as_str()], read_only].concat());
        assert!(said.contains("ploop-img check --repair all"), "{said}");
        assert!(fs::read(&rig.image).unwrap() == before);
    }
    ploop_img(["check", "--repair", "all", rig.image.to_str().unwrap()]).ok();
    let backend = rig.serve(&[]);
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
}

#[test]
fn another_format_is_named_with_the_command_that_converts() {
    let rig = Rig::new();
    let place = |name: &str| rig.folder.path().join(name).display().to_string();
    fs::write(place("a.qcow2"), [&b"QFI\xfb"[..], &[0; 100]].concat()).unwrap();
    fs::write(place("a.raw"), [7; 4096]).unwrap();
    for (name, what, command) in [
        (
            "a.qcow2",
            "is a qcow2 image",
            "qemu-img convert -f qcow2 -O parallels",
        ),
        ("a.raw", "is not a ploop image", "ploop-img convert -f raw"),
    ] {
        let said = rig.refused(&[&format!("--blk-file={}", place(name))]);
        assert!(said.contains(what) && said.contains(command), "{said}");
    }
}

#[test]
fn wrong_usage_ends_as_that_of_ploop_img_does() {
    let ends_with = |args: &[&str]| output(args).status.code();
    assert_eq!(ends_with(&["--nonsense"]), Some(1));
    assert_eq!(ends_with(&[]), Some(1));
    assert_eq!(ends_with(&["--help"]), Some(0));
}

#[test]
fn an_image_that_was_not_closed_is_checked_and_served() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    expect_service(&mut start_front_end(backend.socket()));
    backend.kill();
    let arg = rig.image.to_str().unwrap();
    let found = ploop_img(["check", arg]);
    assert_eq!(found.code, Some(2), "{found:?}");
    assert!(found.stdout.contains("can serve the disk"), "{found:?}");

    // A socket that is there before the daemon says nothing about it.
    fs::remove_file(&rig.socket).unwrap();
    let backend = rig.serve(&[]);
    wait_for("the warning", || {
        backend.log().contains("not closed cleanly")
    });
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
    ploop_img(["check", arg]).ok();
    let backend = rig.serve(&[]);
    let log = backend.log();
    assert_eq!(log.matches("not closed cleanly").count(), 1, "{log}");
    backend.stop();
}

#[test]
fn an_image_in_use_is_refused() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let other = format!(
        "--socket-path={}",
        rig.folder.path().join("other").display()
    );
    let file = format!("--blk-file={}", rig.image.display());
    let said = refused(&[&other, &file]);
    assert_eq!(said.matches("another process").count(), 1, "{said}");
    let said = refused(&[&other, &file, "--read-only"]);
    assert!(said.contains("stop it first"), "{said}");
    assert!(!said.contains("--"), "an option of another program: {said}");
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let rig = Rig::new();
    rig.serve(&[]).kill();
    assert!(rig.socket.exists(), "it had no chance to remove it");
    let mut child = daemon(&[])
        .arg("--socket-path")
        .arg(&rig.socket)
        .arg("--blk-file")
        .arg(&rig.image)
        .spawn()
        .unwrap();
    let start = Instant::now();
    while UnixStream::connect(&rig.socket).is_err() {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }

    let other = Rig::new();
    let file = format!("--blk-file={}", other.image.display());
    let said = rig.refused(&[&file]);
    assert!(said.contains("listens"), "{said}");
    expect_service(&mut start_front_end(&rig.socket));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_listening_socket_is_inherited_and_no_other() {
    let rig = Rig::new();
    let file = format!("--blk-file={}", rig.image.display());
    let listener = UnixListener::bind(&rig.socket).unwrap();
    let (connected, _peer) = UnixStream::pair().unwrap();
    let inherit = |fd: OwnedFd| {
        fcntl_setfd(&fd, FdFlags::empty()).unwrap();
        fd
    };
    let (listening, connected) = (inherit(listener.into()), inherit(connected.into()));
    let argument = |fd: &OwnedFd| format!("--fd={}", fd.as_raw_fd());

    let said = refused(&[&argument(&connected), &file]);
    assert!(said.contains("not a listening one"), "{said}");
    let said = refused(&["--fd=999", &file]);
    assert!(said.contains("999"), "{said}");

    let mut child = daemon(&[&argument(&listening), &file]).spawn().unwrap();
    drop(listening);
    let mut front_end = start_front_end(&rig.socket);
    expect_service(&mut front_end);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(rig.socket.exists(), "who made it removes it");
    ploop_img(["check".as_ref(), rig.image.as_os_str()]).ok();
}

/// Whether the other end hangs up within that time.
fn hangs_up(socket: &UnixStream, time: Duration) -> bool {
    let mut byte = [0];
    is_readable(socket, time) && matches!((&*socket).read(&mut byte), Ok(0) | Err(_))
}

#[test]
fn a_second_front_end_is_turned_away_at_once() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let mut first = start_front_end(backend.socket());
    expect_service(&mut first);
    for _ in 0..20 {
        let start = Instant::now();
        let second = UnixStream::connect(backend.socket()).unwrap();
        assert!(hangs_up(&second, PATIENCE));
        assert!(start.elapsed() < Duration::from_secs(1));
    }
    let said = "is turned away: another front-end is being served";
    wait_for("the refusal", || backend.log().contains(said));
    expect_service(&mut first);
    drop(first);
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
}

#[test]
fn silent_front_ends_keep_nobody_from_being_served() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let silent = UnixStream::connect(backend.socket()).unwrap();
    let mut half = UnixStream::connect(backend.socket()).unwrap();
    half.write_all(&[1, 0, 0, 0, 1]).unwrap();
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    // Whoever of them speaks now is too late.
    half.write_all(&[0; 7]).unwrap();
    assert!(hangs_up(&half, PATIENCE));
    drop(front_end);
    // A message that does not end is not waited for.
    let mut endless = UnixStream::connect(backend.socket()).unwrap();
    endless
        .write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0])
        .unwrap();
    assert!(hangs_up(&endless, PATIENCE));
    // Too many of them, and the first have to go.
    let crowd: Vec<_> = (0..40)
        .map(|_| UnixStream::connect(backend.socket()).unwrap())
        .collect();
    assert!(hangs_up(&silent, PATIENCE));
    assert!(hangs_up(&crowd[0], PATIENCE));
    assert!(!hangs_up(&crowd[39], A_WHILE));
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
}

fn tasks(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    tasks
        .filter_map(|task| Some(name(task.ok()?)?.trim().to_owned()))
        // The kernel's, for io_uring.
        .filter(|name| !name.starts_with("iou-"))
        .collect()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// What a terminal obeys, and what forges lines of a log.
#[test]
fn names_do_not_reach_a_terminal_or_the_log_raw() {
    let mut rig = Rig::new();
    let nasty = rig.folder.path().join("a\u{1b}[2J\n\u{9b}31m.hds");
    let shown = r"a\u{1b}[2J\n\u{9b}31m.hds";
    let check = |said: &str| {
        let is_bad = |c: char| c != '\n' && c.is_control();
        assert!(!said.contains(is_bad), "{said:?}");
        assert!(!said.contains("\n31m"), "{said:?}");
    };
    let option = format!("--blk-file={}", nasty.display());
    let said = rig.refused(&[&option]);
    assert!(said.contains(shown), "{said:?}");
    check(&said);
    check(&rig.refused(&[&option, nasty.to_str().unwrap()]));
    fs::rename(&rig.image, &nasty).unwrap();
    rig.image = nasty;
    let backend = rig.serve(&[]);
    let start = Instant::now();
    while !backend.log().contains(".hds") && start.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(10));
    }
    assert!(backend.log().contains(shown), "{}", backend.log());
    check(&backend.log());
    backend.stop();
}

/// Serves a guest until the daemon is asked to end, and gives back its log.
fn log_of(level: Option<&str>, option: Option<&str>) -> String {
    let rig = Rig::new();
    let log = rig.folder.path().join("log");
    let mut command = daemon(&[]);
    command.arg("--socket-path").arg(&rig.socket);
    command.arg("--blk-file").arg(&rig.image);
    command.args(option).stderr(fs::File::create(&log).unwrap());
    match level {
        Some(level) => command.env("RUST_LOG", level),
        None => command.env_remove("RUST_LOG"),
    };
    let mut child = command.spawn().unwrap();
    wait_for("the socket", || is_listened_on(&rig.socket));
    expect_service(&mut start_front_end(&rig.socket));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    fs::read_to_string(log).unwrap()
}

#[test]
fn the_log_level_comes_from_the_environment_or_the_command_line() {
    let usual = log_of(None, None);
    assert!(usual.contains(" INFO "), "{usual}");
    assert!(!usual.contains(" DEBUG "), "{usual}");
    let more = log_of(Some("debug"), None);
    assert!(more.contains(" DEBUG "), "{more}");
    assert_eq!(log_of(Some("error"), None), "");
    // Of one part of the program, as others write it.
    let part = log_of(Some("off,vhost_user_ploop::control=info"), None);
    assert!(part.contains(" INFO  vhost_user_ploop::control"), "{part}");
    // What is on the command line was said later.
    assert_eq!(log_of(Some("debug"), Some("--log-level=error")), "");
    let more = log_of(Some("error"), Some("--log-level=debug"));
    assert!(more.contains(" DEBUG "), "{more}");
}

#[test]
fn a_file_that_may_not_grow_is_an_error_of_the_write() {
    for aio in ["io_uring", "psync"] {
        let rig = Rig::new();
        let backend = rig.serve(&["--aio", aio]);
        let mut front_end = start_front_end(backend.socket());
        let pid = Pid::from_raw(backend.pid() as i32);
        let may_have = |current| {
            let limit = Rlimit {
                current,
                maximum: None,
            };
            prlimit(pid, Resource::Fsize, limit).unwrap();
        };
        may_have(Some(fs::metadata(&rig.image).unwrap().len()));
        front_end.fill(DATA, &[1; 512]);
        let ring = &mut front_end.rings[0];
        let write = ring.run(VIRTIO_BLK_T_OUT, 0, &[readable(DATA, 512)]);
        assert_eq!(write, (IOERR, 1));
        let read = ring.run(VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]);
        assert_eq!(read, (OK, 513));
        may_have(None);
        expect_service(&mut front_end);
        drop(front_end);
        backend.stop();
        ploop_img(["check", rig.image.to_str().unwrap()]).ok();
    }
}

#[test]
fn as_many_descriptors_are_allowed_as_can_be() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", backend.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let words: Vec<_> = line.unwrap().split_whitespace().collect();
    assert_eq!(words[3], words[4], "soft and hard");
    backend.stop();
}

/// Some kernels count the memory of rings, for a user who may not lock what he likes.
#[test]
fn a_limit_of_locked_memory_costs_no_queue() {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let folder = tempfile::tempdir_in(target).unwrap();
    let image = folder.path().join("disk.hds");
    ploop_img(["create", image.to_str().unwrap(), "64M"]).ok();
    let mut options = Vec::new();
    if rustix::process::geteuid().is_root() {
        let nobody = Some(NOBODY);
        chown(folder.path(), nobody, nobody).unwrap();
        chown(&image, nobody, nobody).unwrap();
        options.push(format!("--user={NOBODY}"));
    }
    // Enough to see that there is io_uring, and for no queue.
    let limit = "--memlock=16384:16384";
    let socket = folder.path().join("socket");
    let backend = Backend::start_below(limit, &image, &socket, &options);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    drop(front_end);
    let are_counted = backend.log().contains("LimitMEMLOCK=");
    backend.stop();
    if !are_counted {
        return;
    }
    let program = env!("CARGO_BIN_EXE_vhost-user-ploop");
    let output = Command::new("prlimit")
        .args([limit, program, "--aio=io_uring", "--socket-path"])
        .args([socket.as_os_str(), "--blk-file".as_ref(), image.as_os_str()])
        .args(&options)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("LimitMEMLOCK="),
        "{said}"
    );
}

/// Else other processes of the user could use it up.
#[test]
fn root_has_no_limit_of_locked_memory() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let of = |file: &str, what: &str| {
        let text = fs::read_to_string(format!("/proc/{}/{file}", backend.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(what));
        line.unwrap().split_whitespace().next().unwrap().to_owned()
    };
    let capabilities = u64::from_str_radix(&of("status", "CapEff:"), 16).unwrap();
    let may_lock = capabilities & (1 << 14) != 0;
    let is_unlimited = of("limits", "Max locked memory") == "unlimited";
    assert!(may_lock != is_unlimited, "{capabilities:#x}");
    backend.stop();
}

#[test]
fn threads_have_names() {
    let rig = Rig::new();
    let backend = rig.serve(&["--runners=3"]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let tasks = tasks(backend.pid());
    for name in [
        "vq0", "vq3", "runner0", "runner2", "md", "messages", "watch", "rings",
    ] {
        assert!(tasks.iter().any(|task| task == name), "{name}: {tasks:?}");
    }
    assert!(!tasks.iter().any(|task| task == "vq4"), "{tasks:?}");
}

#[test]
fn a_ring_too_small_for_the_longest_request_is_said_once() {
    let rig = Rig::new();
    let text = "no room for the longest request";
    for (features, times) in [(u64::MAX, 0), (!(1 << VIRTIO_RING_F_INDIRECT_DESC), 1)] {
        let backend = rig.serve(&[]);
        let mut front_end = FrontEnd::connect(backend.socket());
        front_end.negotiate(features);
        front_end.start_rings();
        for queue in 0..usize::from(QUEUES) {
            let flush = front_end.rings[queue].run(VIRTIO_BLK_T_FLUSH, 0, &[]);
            assert_eq!(flush, (OK, 1));
        }
        let log = backend.log();
        assert_eq!(log.matches(text).count(), times, "{log}");
        drop(front_end);
        backend.stop();
        fs::remove_file(rig.socket.with_extension("log")).unwrap();
    }
}

#[test]
fn front_ends_leave_nothing_behind() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let settle = || {
        let start = Instant::now();
        while tasks(backend.pid()).iter().any(|task| task == "messages") {
            assert!(start.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(5));
        }
        // The end is noticed after the thread has gone.
        thread::sleep(Duration::from_millis(20));
        (tasks(backend.pid()).len(), descriptors(backend.pid()))
    };
    expect_service(&mut start_front_end(backend.socket()));
    let before = settle();
    for _ in 0..20 {
        let mut front_end = start_front_end(backend.socket());
        expect_service(&mut front_end);
        // With requests in flight.
        for ring in &mut front_end.rings {
            ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
            ring.kick();
        }
        drop(front_end);
        drop(UnixStream::connect(backend.socket()).unwrap());
    }
    // All twenty have been served when one more has.
    expect_service(&mut start_front_end(backend.socket()));
    assert_eq!(settle(), before);
    backend.stop();
}

/// Of all threads together, in clock ticks.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn an_idle_daemon_uses_no_cpu() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    // What the write leaves to be done is done by then.
    thread::sleep(Duration::from_millis(500));
    let before = cpu_ticks(backend.pid());
    thread::sleep(Duration::from_secs(2));
    assert!(cpu_ticks(backend.pid()) - before <= 1);
    backend.stop();
}

#[test]
fn a_read_only_image_is_not_touched() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();

    let state = || {
        let metadata = fs::metadata(&rig.image).unwrap();
        (fs::read(&rig.image).unwrap(), metadata.modified().unwrap())
    };
    let before = state();
    let backend = rig.serve(&["--read-only"]);
    let mut front_end = start_front_end(backend.socket());
    let features = front_end.vhost.get_features().unwrap();
    assert_ne!(features & (1 << VIRTIO_BLK_F_RO), 0);
    let ring = &mut front_end.rings[0];
    assert_eq!(
        ring.run(VIRTIO_BLK_T_IN, 5, &[writable(DATA, 512)]),
        (OK, 513)
    );
    assert_eq!(
        ring.run(VIRTIO_BLK_T_OUT, 5, &[readable(DATA, 512)]),
        (IOERR, 1)
    );
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(ring.run(kind, 0, &[readable(DATA, 16)]), (IOERR, 1));
    }
    assert_eq!(ring.run(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(front_end.bytes(DATA, 512), [7; 512]);
    drop(front_end);
    backend.stop();
    assert!(state() == before, "the file was changed");
}

#[test]
fn ending_with_a_front_end_closes_the_image() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    backend.stop();
    ploop_img(["check".as_ref(), rig.image.as_os_str()]).ok();
    // The front-end notices, and can come back.
    assert!(front_end.vhost.get_features().is_err());
    let backend = rig.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    let ring = &mut front_end.rings[0];
    assert_eq!(
        ring.run(VIRTIO_BLK_T_IN, 5, &[writable(DATA, 512)]),
        (OK, 513)
    );
    assert_eq!(front_end.bytes(DATA, 512), [7; 512]);
    backend.stop();
}

/// Lets the next signal of ring 0 block: its counter is full, and the flag that makes
/// writes fail then is taken away after the daemon has looked.
fn block_signals(front_end: &FrontEnd) {
    let call = front_end.rings[0].call();
    // SAFETY: the event lives as long as the front-end.
    let fd = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
    fcntl_setfl(fd, OFlags::NONBLOCK).unwrap();
    let _ = call.read();
    call.write(u64::MAX - 1).unwrap();
    fcntl_setfl(fd, OFlags::empty()).unwrap();
}

#[test]
fn a_front_end_that_lets_signals_block_cannot_keep_the_daemon_from_its_end() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    block_signals(&front_end);
    let ring = &mut front_end.rings[0];
    ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    ring.kick();
    wait_for("the answer", || ring.take_used().is_some());
    // Messages are obeyed all the same.
    let start = Instant::now();
    front_end.vhost.get_vring_base(0).unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    front_end.start_ring_at(0, front_end.rings[0].avail_idx());
    block_signals(&front_end);
    let ring = &mut front_end.rings[0];
    ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    ring.kick();
    wait_for("the answer", || ring.take_used().is_some());
    let start = Instant::now();
    backend.stop();
    assert!(start.elapsed() < Duration::from_secs(5));
    ploop_img(["check".as_ref(), rig.image.as_os_str()]).ok();
}

#[test]
fn a_front_end_that_talks_nonsense_harms_only_itself() {
    let rig = Rig::new();
    let backend = rig.serve(&["--log-level=off", "--num-queues=4"]);
    for seed in 0..FRONT_ENDS {
        nonsense::Nonsense::talk(backend.socket(), seed);
    }
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
    ploop_img(["check".as_ref(), rig.image.as_os_str()]).ok();
}

#[test]
fn a_snapshot_is_served_beside_the_present_state() {
    let folder = TempDir::new().unwrap();
    let bundle = folder.path().join("bundle");
    let path = bundle.to_str().unwrap();
    ploop_img(["create", path, "64M"]).ok();
    let write = |front_end: &mut FrontEnd, byte: u8| {
        front_end.fill(DATA, &[byte; 512]);
        let source = [readable(DATA, 512)];
        front_end.rings[0].run(VIRTIO_BLK_T_OUT, 9, &source)
    };
    let read = |front_end: &mut FrontEnd| {
        let target = [writable(DATA, 512)];
        let answer = front_end.rings[0].run(VIRTIO_BLK_T_IN, 9, &target);
        assert_eq!(answer, (OK, 513));
        front_end.bytes(DATA, 1)[0]
    };
    let nothing: [&str; 0] = [];

    let backend = Backend::start(&bundle, &folder.path().join("first"), &nothing);
    assert_eq!(write(&mut start_front_end(backend.socket()), 1), (OK, 1));
    backend.stop();
    let guid = ploop_img(["snapshot", "create", path]).ok();
    let top = Backend::start(&bundle, &folder.path().join("top"), &nothing);
    let option = ["--snapshot", guid.trim()];
    let snapshot = Backend::start(&bundle, &folder.path().join("snapshot"), &option);
    let mut of_top = start_front_end(top.socket());
    let mut of_snapshot = start_front_end(snapshot.socket());
    assert_eq!(write(&mut of_top, 2), (OK, 1));
    assert_eq!(write(&mut of_snapshot, 3), (IOERR, 1));
    assert_eq!(read(&mut of_top), 2);
    assert_eq!(read(&mut of_snapshot), 1);
    top.stop();
    snapshot.stop();
}
