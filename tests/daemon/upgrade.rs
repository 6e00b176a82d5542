//! Another process is to take over, and something goes wrong: the one that serves goes on.

use std::fs;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::json;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::{self, backend::Backend, qmp::Qmp, small_fs::SmallFs};
use crate::control;
use crate::death::{self, CLUSTER};
use crate::front_end::*;
use crate::{OK, Rig, daemon, descriptors, expect_service, ploop_img, start_front_end, wait_for};

/// What messages are: see docs/upgrade.md.
const HELLO: u32 = 1;
const WELCOME: u32 = 2;
pub const REFUSED: u32 = 3;
const READY: u32 = 4;
pub const STATE: u32 = 5;
const PREPARED: u32 = 6;
pub const GO: u32 = 7;
pub const SERVING: u32 = 8;

/// Descriptors that go with one byte.
const GROUP: usize = 64;

pub fn upgrades(rig: &Rig) -> PathBuf {
    rig.folder.path().join("upgrade")
}

/// Serves with a socket for upgrades, and a long delay of changes of the map.
fn serve(rig: &Rig) -> Backend {
    let socket = format!("--upgrade-socket={}", upgrades(rig).display());
    rig.serve(&[&[socket.as_str()], death::NEVER].concat())
}

/// A process that takes over, played by the test.
pub struct Fake(UnixStream);

impl Fake {
    pub fn connect(rig: &Rig) -> Self {
        let socket = UnixStream::connect(upgrades(rig)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket)
    }

    pub fn say(&mut self, kind: u32, body: &[u8]) {
        let header = [kind, body.len() as u32, 0].map(u32::to_le_bytes);
        let message = [&header.concat(), body].concat();
        self.0.write_all(&message).unwrap();
    }

    /// The next message, without its descriptors; `None` at the end.
    pub fn hear(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).ok()?;
        let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let groups = (number(8) as usize).div_ceil(GROUP);
        let mut body = vec![0; number(4) as usize];
        self.0.read_exact(&mut body).unwrap();
        // Descriptors that come with what is read like this are closed.
        self.0.read_exact(&mut vec![0; groups]).unwrap();
        Some((number(0), body))
    }

    #[track_caller]
    fn expect(&mut self, kind: u32) -> Vec<u8> {
        let (heard, body) = self.hear().expect("a message comes");
        let text = String::from_utf8_lossy(&body);
        assert_eq!(heard, kind, "{text}");
        body
    }

    /// As a process that would serve the same in the same way.
    fn hello(&mut self, rig: &Rig) {
        self.hello_for(std::slice::from_ref(&rig.image), "disk");
    }

    /// The same of a disk in these files, base first, called so.
    fn hello_for(&mut self, files: &[PathBuf], name: &str) {
        let count = files.len() as u32;
        let mut hello = [2_u32.to_le_bytes(), count.to_le_bytes()].concat();
        for (index, file) in (1..).zip(files) {
            let meta = fs::metadata(file).unwrap();
            hello.extend([meta.dev(), meta.ino()].map(u64::to_le_bytes).concat());
            hello.push(u8::from(index == count));
        }
        hello.extend(64_u16.to_le_bytes());
        hello.extend(1024_u16.to_le_bytes());
        hello.extend(512_u32.to_le_bytes());
        hello.extend(20_u32.to_le_bytes());
        let mut serial = name.as_bytes().to_vec();
        serial.resize(20, 0);
        hello.extend(serial);
        self.say(HELLO, &hello);
    }

    /// Says and hears everything until then, `until` included.
    pub fn come_to(&mut self, rig: &Rig, until: u32) {
        self.hello(rig);
        self.go_on_to(until);
    }

    /// The same for a disk in these files, base first, called so.
    pub fn come_to_with(&mut self, files: &[PathBuf], name: &str, until: u32) {
        self.hello_for(files, name);
        self.go_on_to(until);
    }

    fn go_on_to(&mut self, until: u32) {
        self.expect(WELCOME);
        for kind in [READY, STATE, PREPARED, GO] {
            if kind > until {
                return;
            }
            match kind {
                READY | PREPARED => self.say(kind, &[]),
                _ => drop(self.expect(kind)),
            }
        }
    }
}

#[test]
fn a_process_that_would_serve_something_else_is_refused() {
    let rig = Rig::new();
    let backend = serve(&rig);
    let mode = fs::metadata(upgrades(&rig)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut front_end = start_front_end(backend.socket());
    let other = Rig::new();
    for (image, options, why) in [
        (&other.image, &[][..], "the image is another one"),
        (&rig.image, &["--num-queues=8"], "--num-queues differs"),
        (&rig.image, &["--queue-size=256"], "--queue-size differs"),
        (&rig.image, &["--serial=x"], "--serial differs"),
        (&rig.image, &["--read-only"], "one of the two is read-only"),
    ] {
        let socket = upgrades(&rig);
        backend.spawn_successor(image, &socket, options).fails();
        // Both say so, each in its own time.
        wait_for(why, || backend.log().matches(why).count() == 2);
        expect_service(&mut front_end);
    }
    let mut fake = Fake::connect(&rig);
    fake.say(HELLO, &99_u32.to_le_bytes());
    let why = String::from_utf8(fake.expect(REFUSED)[4..].to_vec()).unwrap();
    assert!(why.contains("version 2") && why.contains("99"), "{why}");
    assert_eq!(fake.hear(), None);
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
    assert!(!upgrades(&rig).exists());
}

#[test]
fn nothing_is_taken_over_where_nobody_serves() {
    let rig = Rig::new();
    let socket = upgrades(&rig);
    let take_over = format!("--take-over={}", socket.display());
    let image = format!("--blk-file={}", rig.image.display());
    let said = crate::refused(&[&take_over, &image]);
    assert!(said.contains("cannot connect to"), "{said}");
    // Whoever is there and is somebody else.
    let listener = UnixListener::bind(&socket).unwrap();
    let silent = Instant::now();
    let said = crate::refused(&[&take_over, &image]);
    assert!(said.contains("does not answer"), "{said}");
    assert!(silent.elapsed() < PATIENCE);
    drop(listener);
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();
}

#[test]
fn nonsense_is_left_after_a_moment() {
    let rig = Rig::new();
    let backend = serve(&rig);
    let mut front_end = start_front_end(backend.socket());
    let messages: [&[u8]; 5] = [
        &[1],
        &[0xff; 12],
        &[READY, 0, 0].map(u32::to_le_bytes).concat(),
        &[HELLO, 3, 0].map(u32::to_le_bytes).concat(),
        &[HELLO, 0, 1].map(u32::to_le_bytes).concat(),
    ];
    for message in messages {
        let mut fake = Fake::connect(&rig);
        fake.0.write_all(message).unwrap();
        assert_eq!(fake.hear(), None, "{message:?}");
        expect_service(&mut front_end);
    }
    // One at a time, and the first one is not disturbed.
    let mut first = Fake::connect(&rig);
    first.hello(&rig);
    first.expect(WELCOME);
    assert_eq!(Fake::connect(&rig).hear(), None);
    first.say(READY, &[]);
    first.expect(STATE);
    drop(first);
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
}

/// A driver with requests that nobody was told of by a kick.
fn go_on(front_end: &mut FrontEnd, number: u64) {
    let sector = number * CLUSTER;
    front_end.fill(DATA + 512, &[number as u8; 512]);
    let source = [readable(DATA + 512, 512)];
    let head = front_end.rings[0].request(VIRTIO_BLK_T_OUT, sector, &source);
    let (used, _) = front_end.rings[0].wait_used();
    assert_eq!(used, head);
    assert_eq!(front_end.rings[0].status(head), OK);
}

#[test]
fn a_process_that_fails_at_any_step_changes_nothing() {
    for has_region in [true, false] {
        let rig = Rig::new();
        let backend = serve(&rig);
        let (mut front_end, _region) = if has_region {
            let (front_end, region) = death::begin(&backend);
            (front_end, Some(region))
        } else {
            (start_front_end(backend.socket()), None)
        };
        for (round, step) in (1_u64..).zip([READY, STATE, PREPARED, GO, READY, GO]) {
            death::write(&mut front_end, (20 + round) * CLUSTER, round as u8);
            let mut fake = Fake::connect(&rig);
            fake.come_to(&rig, step);
            drop(fake);
            // Until then another one would be turned away.
            wait_for("the end of it", || {
                let log = backend.log();
                let said = ["this one goes on", "does not take over", "has gone before"];
                let ends = said.map(|end| log.matches(end).count());
                ends.iter().sum::<usize>() == round as usize
            });
            death::expect(&mut front_end, (20 + round) * CLUSTER, round as u8);
            death::write(&mut front_end, (40 + round) * CLUSTER, 2 * round as u8);
        }
        // One that says nothing more, while a request waits that nobody was told of.
        let mut silent = Fake::connect(&rig);
        silent.come_to(&rig, STATE);
        let start = Instant::now();
        go_on(&mut front_end, 9);
        assert!(start.elapsed() > Duration::from_secs(2), "it did not wait");
        assert_eq!(silent.hear(), None);
        for round in 1..7 {
            death::expect(&mut front_end, (20 + round) * CLUSTER, round as u8);
            death::expect(&mut front_end, (40 + round) * CLUSTER, 2 * round as u8);
        }
        death::expect(&mut front_end, 9 * CLUSTER, 9);
        drop(front_end);
        // And then it is taken over all the same.
        let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
        expect_service(&mut start_front_end(backend.socket()));
        backend.stop();
        ploop_img(["check", rig.image.to_str().unwrap()]).ok();
    }
}

#[test]
fn a_process_that_has_given_the_image_away_ends_and_leaves_it_alone() {
    let rig = Rig::new();
    let backend = serve(&rig);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let mut fake = Fake::connect(&rig);
    fake.come_to(&rig, GO);
    // It is the other's now, whose first step may be under way.
    let before = fs::read(&rig.image).unwrap();
    let start = Instant::now();
    backend.stop_leaving_socket();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(upgrades(&rig).exists());
    assert!(fs::read(&rig.image).unwrap() == before);
}

/// A real process that takes over by way of the test.
struct Relay {
    theirs: UnixStream,
    ours: UnixStream,
    child: Child,
}

impl Relay {
    fn start(rig: &Rig, listener: &UnixListener, at: &Path) -> Self {
        let log = fs::File::create(rig.folder.path().join("successor.log")).unwrap();
        let mut command: Command = daemon(&[]);
        let child = command
            .arg("--take-over")
            .arg(at)
            .arg("--blk-file")
            .arg(&rig.image)
            .args(death::NEVER)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let (theirs, _) = listener.accept().unwrap();
        Self {
            theirs,
            ours: UnixStream::connect(upgrades(rig)).unwrap(),
            child,
        }
    }

    /// Relays everything up to *go*.
    fn go(&self) {
        relay_until(GO, &self.theirs, &self.ours);
    }

    /// Kills it. Returns whether it had begun to serve.
    fn kill(mut self) -> bool {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        relay(&self.theirs, &self.ours) == Some(SERVING)
    }

    /// Kills it, and nobody hears whether it had.
    fn end(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Passes everything on by which a process takes over from another one, up to this message.
pub fn relay_until(last: u32, theirs: &UnixStream, ours: &UnixStream) {
    for (from, to, kind) in [
        (theirs, ours, HELLO),
        (ours, theirs, WELCOME),
        (theirs, ours, READY),
        (ours, theirs, STATE),
        (theirs, ours, PREPARED),
        (ours, theirs, GO),
        (theirs, ours, SERVING),
    ] {
        if kind <= last {
            assert_eq!(relay(from, to), Some(kind));
        }
    }
}

/// Passes one message on, with its descriptors.
fn relay(mut from: &UnixStream, mut to: &UnixStream) -> Option<u32> {
    let mut header = [0; 12];
    from.read_exact(&mut header).ok()?;
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; number(4) as usize];
    from.read_exact(&mut body).unwrap();
    to.write_all(&[&header[..], &body].concat()).unwrap();
    for _ in 0..(number(8) as usize).div_ceil(GROUP) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(GROUP))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut bytes = [IoSliceMut::new(&mut byte)];
        recvmsg(from, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        let files: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(files) => Some(files),
                _ => None,
            })
            .flatten()
            .collect();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send_files(to, &files);
    }
    Some(number(0))
}

/// A group of descriptors.
fn send_files(to: &UnixStream, files: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(GROUP))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(files)));
    let zero = [0];
    let byte = [IoSlice::new(&zero)];
    sendmsg(to, &byte, &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn a_process_that_is_killed_before_it_serves_changes_nothing() {
    /// How many are killed, and when at the latest.
    const KILLS: u64 = 24;
    const LATEST_US: u64 = 80_000;
    let mut rng = SmallRng::seed_from_u64(15);
    let rig = Rig::new();
    let at = rig.folder.path().join("relay");
    let listener = UnixListener::bind(&at).unwrap();
    let mut backend = serve(&rig);
    let (mut front_end, region) = death::begin(&backend);
    let (mut killed_before, mut killed_after) = (0, 0);
    for round in 1..=KILLS {
        let sector = |number: u64| number % 60 * CLUSTER;
        death::write(&mut front_end, sector(round), round as u8);
        let relay = Relay::start(&rig, &listener, &at);
        relay.go();
        // Half of them early: on a machine that has nothing else to do it does not take long.
        let latest = if round % 2 == 0 {
            LATEST_US
        } else {
            LATEST_US / 16
        };
        thread::sleep(Duration::from_micros(rng.random_range(0..latest)));
        if relay.kill() {
            killed_after += 1;
            // It was the one that served: as after any kill.
            wait_for("the end", || backend.log().contains("has taken over"));
            backend.kill();
            let _ = fs::remove_file(upgrades(&rig));
            fs::remove_file(rig.folder.path().join("socket.log")).unwrap();
            backend = serve(&rig);
            death::reconnect(&mut front_end, &backend, Some(&region));
            front_end.start_rings();
        } else {
            killed_before += 1;
        }
        for before in 1..=round {
            death::expect(&mut front_end, sector(before), before as u8);
        }
    }
    eprintln!("{killed_before} killed before they served, {killed_after} after");
    assert!(killed_before > 3, "{killed_before}, {killed_after}");
    drop(front_end);
    backend.stop();
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();
}

/// Waits until the process that serves has gone on so many times.
fn expect_to_go_on(backend: &Backend, times: usize) {
    wait_for("the one to go on", || {
        backend.log().matches("the guest has waited for").count() == times
    });
}

#[test]
fn a_failed_process_costs_a_guest_nothing_where_no_attributes_are_kept() {
    for has_region in [true, false] {
        let rig = Rig::new();
        let at = rig.folder.path().join("relay");
        let listener = UnixListener::bind(&at).unwrap();
        let backend = serve(&rig);
        let (mut front_end, _region) = match has_region {
            true => {
                let (front_end, region) = death::begin(&backend);
                (front_end, Some(region))
            }
            false => (start_front_end(backend.socket()), None),
        };
        for round in 1..=3_u8 {
            death::write(&mut front_end, u64::from(round) * CLUSTER, round);
            let relay = Relay::start(&rig, &listener, &at);
            relay.go();
            // As far as it can come before it serves.
            let mut header = [0; 12];
            (&relay.theirs).read_exact(&mut header).unwrap();
            assert_eq!(header[..4], SERVING.to_le_bytes());
            let one = Pid::from_raw(backend.pid() as i32).unwrap();
            kill_process(one, Signal::STOP).unwrap();
            relay.end();
            let image = fs::File::open(&rig.image).unwrap();
            rustix::fs::fremovexattr(&image, "user.ploop.opening").unwrap();
            kill_process(one, Signal::CONT).unwrap();
            expect_to_go_on(&backend, round.into());
            for round in 1..=round {
                death::expect(&mut front_end, u64::from(round) * CLUSTER, round);
            }
        }
        drop(front_end);
        backend.stop();
        ploop_img(["check", rig.image.to_str().unwrap()]).ok();
    }
}

#[test]
fn a_process_that_a_guest_may_come_back_to_stays() {
    let rig = Rig::new();
    let backend = serve(&rig);
    let (mut front_end, region) = death::begin(&backend);
    death::write(&mut front_end, CLUSTER, 1);
    backend.kill();
    fs::remove_file(upgrades(&rig)).unwrap();
    let backend = serve(&rig);
    wait_for("the socket", || upgrades(&rig).exists());
    for refusals in 1..=2 {
        let successor = backend.spawn_successor(&rig.image, &upgrades(&rig), &[]);
        successor.fails();
        let why = "may come back for what is not in the image";
        // Both say so, each in its own time.
        wait_for(why, || backend.log().matches(why).count() == 2 * refusals);
    }
    death::reconnect(&mut front_end, &backend, Some(&region));
    front_end.start_rings();
    death::expect(&mut front_end, CLUSTER, 1);
    // It has come.
    let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    death::expect(&mut front_end, CLUSTER, 1);
    drop(front_end);
    backend.stop();
}

/// Makes the image one that nobody can open, or takes that back: the first entry of its map
/// is beyond the end of the file.
fn spoil(rig: &Rig) -> u32 {
    let mut image = fs::File::options();
    let image = image.read(true).write(true).open(&rig.image).unwrap();
    let mut entry = [0; 4];
    image.read_exact_at(&mut entry, 64).unwrap();
    image.write_all_at(&1000_u32.to_le_bytes(), 64).unwrap();
    u32::from_le_bytes(entry)
}

#[test]
fn a_process_that_cannot_open_the_image_again_tries_until_it_can() {
    const AGAIN: &str = "cannot go on yet, and tries again";
    let rig = Rig::new();
    let backend = serve(&rig);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let mut fake = Fake::connect(&rig);
    fake.come_to(&rig, GO);
    let entry = spoil(&rig);
    drop(fake);
    wait_for(AGAIN, || backend.log().matches(AGAIN).count() == 2);
    // The guest waits meanwhile, with a request that nobody was told of.
    front_end.fill(DATA, &[9; 512]);
    let source = [readable(DATA, 512)];
    let ring = &mut front_end.rings[0];
    let head = ring.request(VIRTIO_BLK_T_OUT, 9, &source);
    thread::sleep(A_WHILE);
    assert_eq!(ring.take_used(), None);
    crate::set_word(&rig.image, 64, entry);
    assert_eq!(ring.wait_used(), (head, 1));
    expect_service(&mut front_end);
    // One that never can is told to end, and does.
    let mut fake = Fake::connect(&rig);
    fake.come_to(&rig, GO);
    spoil(&rig);
    drop(fake);
    wait_for(AGAIN, || backend.log().matches(AGAIN).count() > 3);
    let start = Instant::now();
    backend.stop_with_failure();
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_process_of_another_namespace_takes_over_and_is_taken_over_from() {
    let rig = Rig::new();
    let backend = serve(&rig);
    let mut front_end = start_front_end(backend.socket());
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-current-user"]);
    }
    command.args(["--pid", "--fork", "--kill-child"]);
    if !common::require_tool("unshare") || !is_allowed(&command) {
        let _ = common::left_out("there can be no namespace of processes");
        return;
    }
    command.arg(env!("CARGO_BIN_EXE_vhost-user-ploop"));
    let backend = backend.taken_over_by(command, &rig.image, &upgrades(&rig), &[]);
    expect_service(&mut front_end);
    // Neither this process nor the next one has a number there.
    drop(front_end);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    expect_service(&mut front_end);
    for said in [
        "a front-end has connected: a process of another namespace",
        "a process of another namespace is about to take over",
        "a process of another namespace has taken over",
    ] {
        backend.expect_to_say(said);
    }
    drop(front_end);
    backend.stop();
}

/// Whether what it does works here.
fn is_allowed(command: &Command) -> bool {
    let mut attempt = Command::new(command.get_program());
    let output = attempt.args(command.get_args()).arg("true").output();
    output.is_ok_and(|output| output.status.success())
}

#[test]
fn a_process_that_accepts_nobody_is_not_waited_for() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let rig = Rig::new();
    let address = SocketAddrUnix::new(upgrades(&rig)).unwrap();
    let socket = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    };
    let listener = socket();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    // As many as may wait, and no more.
    let waiting: Vec<_> = std::iter::repeat_with(socket)
        .take_while(|socket| rustix::net::connect(socket, &address).is_ok())
        .collect();
    assert!(!waiting.is_empty());
    let log = rig.folder.path().join("successor.log");
    let mut child = daemon(&[])
        .arg("--take-over")
        .arg(upgrades(&rig))
        .arg("--blk-file")
        .arg(&rig.image)
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut status = None;
    let start = Instant::now();
    while status.is_none() && start.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(10));
        status = child.try_wait().unwrap();
    }
    let _ = child.kill();
    let _ = child.wait();
    let log = fs::read_to_string(log).unwrap();
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{log}");
    assert!(log.contains("cannot connect to"), "{log}");
}

#[test]
fn a_process_without_descriptors_turns_others_away_and_sleeps() {
    let rig = Rig::new();
    let backend = serve(&rig);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let pid = Pid::from_raw(backend.pid() as i32);
    let fds = fs::read_dir(format!("/proc/{}/fd", backend.pid())).unwrap();
    let fds = fds.map(|fd| fd.unwrap().file_name().into_string().unwrap());
    let fds: Vec<u64> = fds.map(|fd| fd.parse().unwrap()).collect();
    let first_free = (0..).find(|fd| !fds.contains(fd)).unwrap();
    let most = most_descriptors(backend.pid());
    let may_have = |count| {
        let limit = Rlimit {
            current: Some(count),
            maximum: Some(most),
        };
        prlimit(pid, Resource::Nofile, limit).unwrap();
    };
    may_have(first_free);
    let mut fakes: Vec<_> = (0..3).map(|_| Fake::connect(&rig)).collect();
    for fake in &mut fakes {
        assert_eq!(fake.hear(), None, "it is turned away");
    }
    let ticks = crate::cpu_ticks(backend.pid());
    thread::sleep(Duration::from_secs(1));
    let ticks = crate::cpu_ticks(backend.pid()) - ticks;
    assert!(ticks <= 10, "{ticks}");
    let log = backend.log();
    assert!(log.contains("cannot be accepted"), "{log}");
    may_have(most);
    let backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
}

/// The hard limit.
fn most_descriptors(pid: u32) -> u64 {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let hard = line.unwrap().split_whitespace().nth(4);
    hard.unwrap().parse().unwrap()
}

/// A process that serves, played by the test, and the one that takes over from it.
struct FakeOne {
    socket: UnixStream,
    child: Child,
}

impl FakeOne {
    fn start(rig: &Rig) -> Self {
        let listener = UnixListener::bind(upgrades(rig)).unwrap();
        let log = fs::File::create(rig.folder.path().join("successor.log")).unwrap();
        let child = daemon(&[])
            .arg("--take-over")
            .arg(upgrades(rig))
            .arg("--blk-file")
            .arg(&rig.image)
            .stderr(log)
            .spawn()
            .unwrap();
        let (socket, _) = listener.accept().unwrap();
        // Nobody else is served here.
        fs::remove_file(upgrades(rig)).unwrap();
        Self { socket, child }
    }

    fn hear(&mut self) -> Option<u32> {
        let mut header = [0; 12];
        self.socket.read_exact(&mut header).ok()?;
        let [kind, len, _] =
            [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        self.socket.read_exact(&mut vec![0; len as usize]).unwrap();
        Some(kind)
    }

    fn say(&mut self, kind: u32, body: &[u8], files: &[BorrowedFd<'_>]) {
        let numbers = [kind, body.len() as u32, files.len() as u32];
        let header = numbers.map(u32::to_le_bytes).concat();
        self.socket.write_all(&[&header, body].concat()).unwrap();
        if !files.is_empty() {
            send_files(&self.socket, files);
        }
    }

    /// Welcomes it to the socket of front-ends at `path`, and hands one over that is said to
    /// be `made` there.
    fn hand_over(&mut self, path: &Path, listener: &UnixListener, made: Option<&Path>) {
        self.hand_over_with(&[], path, listener, made);
    }

    /// The same, with something behind the state as the first processes knew it.
    fn hand_over_with(
        &mut self,
        parts: &[u8],
        path: &Path,
        listener: &UnixListener,
        made: Option<&Path>,
    ) {
        let text = |path: &Path| {
            let bytes = path.as_os_str().as_encoded_bytes();
            [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
        };
        assert_eq!(self.hear(), Some(HELLO));
        self.say(WELCOME, &[vec![1], text(path), vec![0]].concat(), &[]);
        assert_eq!(self.hear(), Some(READY));
        let mut state = (64_u64 << 11).to_le_bytes().to_vec();
        state.push(made.is_some().into());
        if let Some(made) = made {
            let meta = fs::symlink_metadata(made).unwrap();
            state.extend(text(made));
            state.extend([meta.dev(), meta.ino()].map(u64::to_le_bytes).concat());
        }
        // No other sockets, nobody who waits, no connection.
        state.extend([0; 7]);
        state.extend(parts);
        self.say(STATE, &state, &[listener.as_fd()]);
    }

    /// Lets it serve.
    fn go(&mut self) {
        assert_eq!(self.hear(), Some(PREPARED));
        self.say(GO, &[], &[]);
        assert_eq!(self.hear(), Some(SERVING));
    }

    /// Its exit status.
    fn end(mut self, signal: Option<Signal>) -> Option<i32> {
        if let Some(signal) = signal {
            kill_process(Pid::from_child(&self.child), signal).unwrap();
        }
        self.child.wait().unwrap().code()
    }
}

/// Limits, as one process tells another of them.
fn limits(iops: u64, iops_size: u64) -> Vec<u8> {
    let none = [0_u64, 0, 1];
    let numbers = [none, none, none, [iops, 0, 1], none, none].concat();
    let numbers = [&[1], &numbers[..], &[iops_size]].concat();
    numbers.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[test]
fn limits_that_were_set_go_along_to_processes_that_know_of_them() {
    let rig = Rig::new();
    let socket = format!("--upgrade-socket={}", upgrades(&rig).display());
    let options = [socket.as_str(), "--throttle=iops=9000"];
    let mut backend = control::serve(&rig, &options);
    let shown = || {
        let nodes = Qmp::connect(&control::control(&rig)).ask("query-named-block-nodes", json!({}));
        ["iops", "iops_max", "bps"].map(|name| nodes[0][name].as_u64().unwrap_or_default())
    };
    let take_over = |backend: Backend| {
        backend.taken_over(&rig.image, &upgrades(&rig), &["--throttle=bps=80000000"])
    };
    let state = |parts: &[u8]| {
        let mut fake = Fake::connect(&rig);
        fake.hello(&rig);
        fake.expect(WELCOME);
        fake.say(READY, parts);
        fake.expect(STATE)
    };
    let knows = 1_u64.to_le_bytes();
    let longer = [u64::MAX; 2].map(u64::to_le_bytes).concat();
    // None were set, and the next one has its own.
    assert_eq!(shown(), [9000, 0, 0]);
    assert_eq!(state(&knows), state(&[]));
    backend = take_over(backend);
    assert_eq!(shown(), [0, 0, 80_000_000]);
    let plain = state(&[]);
    let arguments = json!({
        "id": "disk", "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": 7000, "iops_rd": 0, "iops_wr": 0, "iops_size": 4096,
    });
    Qmp::connect(&control::control(&rig)).ask("block_set_io_throttle", arguments);
    for _ in 0..2 {
        assert_eq!(state(&[]), plain, "one that is older is told what it knows");
        for knows in [&knows[..], &longer] {
            let state = state(knows);
            assert_eq!(state[..plain.len()], plain);
            assert_eq!(state[plain.len()..], limits(7000, 4096));
        }
        backend = take_over(backend);
        assert_eq!(shown(), [7000, 0, 0]);
    }
    let log = backend.log();
    assert!(log.contains("does not support limits"), "{log}");
    backend.stop();
}

#[test]
fn a_write_threshold_goes_along_to_processes_that_know_of_it() {
    let rig = Rig::new();
    let socket = format!("--upgrade-socket={}", upgrades(&rig).display());
    let mut backend = control::serve(&rig, &[socket.as_str()]);
    let threshold = 2_u64 << 20;
    let arguments = json!({ "node-name": "disk", "write-threshold": threshold });
    Qmp::connect(&control::control(&rig)).ask("block-set-write-threshold", arguments);
    let state = |parts: u64| {
        let mut fake = Fake::connect(&rig);
        fake.hello(&rig);
        fake.expect(WELCOME);
        fake.say(READY, &parts.to_le_bytes());
        fake.expect(STATE)
    };
    let (plain, whole) = (state(3), state(7));
    assert_eq!(whole[..plain.len()], plain);
    let expected = [4, threshold].map(u64::to_le_bytes).concat();
    assert_eq!(whole[plain.len()..], expected);
    backend = backend.taken_over(&rig.image, &upgrades(&rig), &[]);
    let mut qmp = Qmp::connect(&control::control(&rig));
    let nodes = qmp.ask("query-named-block-nodes", json!({}));
    assert_eq!(nodes[0]["write_threshold"], threshold);
    let mut front_end = start_front_end(backend.socket());
    front_end.fill(DATA, &[7; 4096]);
    for cluster in 0..2 {
        let data = [readable(DATA, 4096)];
        assert_eq!(
            front_end.rings[0]
                .run(VIRTIO_BLK_T_OUT, cluster << 11, &data)
                .0,
            OK
        );
    }
    let told = qmp.event("BLOCK_WRITE_THRESHOLD");
    assert_eq!(told["write-threshold"], threshold);
    drop(front_end);
    backend.stop();
}

#[test]
fn limits_that_cannot_be_are_refused() {
    let others = tempfile::tempdir().unwrap();
    let at = others.path().join("own");
    let own = UnixListener::bind(&at).unwrap();
    own.set_nonblocking(true).unwrap();
    let unknown = [(1_u64 << 63).to_le_bytes().to_vec(), limits(0, 0)].concat();
    let short = limits(7000, 0);
    for odd in [
        &limits(0, 512)[..],
        &limits(u64::MAX, 0),
        &unknown,
        &short[..short.len() - 1],
        &short[..1],
        &[short.clone(), vec![0]].concat(),
    ] {
        let rig = Rig::new();
        let mut one = FakeOne::start(&rig);
        one.hand_over_with(odd, &at, &own, None);
        assert_eq!(one.hear(), None, "{odd:?}");
        assert_eq!(one.end(None), Some(1));
    }
    let rig = Rig::new();
    let mut one = FakeOne::start(&rig);
    one.hand_over_with(&short, &at, &own, Some(&at));
    one.go();
    expect_service(&mut start_front_end(&at));
    assert_eq!(one.end(Some(Signal::TERM)), Some(0));
}

#[test]
fn a_socket_that_is_not_the_one_at_its_path_is_refused() {
    let others = tempfile::tempdir().unwrap();
    let at = |name: &str| others.path().join(name);
    let _other = UnixListener::bind(at("other")).unwrap();
    let own = UnixListener::bind(at("own")).unwrap();
    for made in [Some(at("other")), Some(at("own")), None] {
        let rig = Rig::new();
        let mut one = FakeOne::start(&rig);
        one.hand_over(&at("other"), &own, made.as_deref());
        assert_eq!(one.hear(), None, "it does not take over: {made:?}");
        assert_eq!(one.end(None), Some(1));
        let log = fs::read_to_string(rig.folder.path().join("successor.log")).unwrap();
        assert!(log.contains("is not the one at"), "{log}");
        // Nor is what is no socket to listen on taken for one.
        let mut one = FakeOne::start(&rig);
        let connection = UnixStream::connect(at("own")).unwrap();
        let connection = UnixListener::from(OwnedFd::from(connection));
        one.hand_over(&at("nothing"), &connection, None);
        assert_eq!(one.hear(), None);
        assert_eq!(one.end(None), Some(1));
    }
    assert!(at("other").exists() && at("own").exists());
}

#[test]
fn files_that_cannot_be_seen_to_be_of_the_process_before_are_left_alone() {
    let others = tempfile::tempdir().unwrap();
    let at = |name: &str| others.path().join(name);
    // Nobody listens there any more.
    drop(UnixListener::bind(at("stale")).unwrap());
    fs::write(at("file"), "precious").unwrap();
    let own = UnixListener::bind(at("own")).unwrap();
    own.set_nonblocking(true).unwrap();
    for (path, is_left) in [
        (at("stale"), true),
        (at("file"), true),
        (at("nothing"), true),
        (PathBuf::from("socket"), true),
        (at("own"), false),
    ] {
        let rig = Rig::new();
        let mut one = FakeOne::start(&rig);
        let there = path.exists();
        let made = there.then_some(&*path);
        one.hand_over(&path, &own, made);
        one.go();
        expect_service(&mut start_front_end(&at("own")));
        assert_eq!(one.end(Some(Signal::TERM)), Some(0));
        assert_eq!(path.exists(), there && is_left, "{}", path.display());
        ploop_img(["check", rig.image.to_str().unwrap()]).ok();
    }
}

#[test]
fn writes_of_a_kept_region_that_wait_for_space_are_done_by_the_next_process() {
    const WRITES: u64 = 16;
    const LEN: u32 = 64 << 10;
    const FULL: &str = "the host file system is full";
    for has_region in [true, false] {
        let Some(small) = SmallFs::tmpfs(64 << 20) else {
            return;
        };
        let mut rig = Rig::new();
        rig.image = small.root().join("disk.hds");
        ploop_img(["create", rig.image.to_str().unwrap(), "64M"]).ok();
        let mut backend = serve(&rig);
        let (mut front_end, _region) = match has_region {
            true => {
                let (front_end, region) = death::begin(&backend);
                (front_end, Some(region))
            }
            false => (start_front_end(backend.socket()), None),
        };
        // For a few of them.
        let ballast = small.fill_but(4 * u64::from(LEN));
        let ring = &mut front_end.rings[0];
        for number in 0..WRITES {
            let at = SEAM + u64::from(LEN) * number;
            ring.fill(at, &[1 + number as u8; LEN as usize]);
            ring.request(VIRTIO_BLK_T_OUT, number * CLUSTER, &[readable(at, LEN)]);
        }
        ring.kick();
        for number in 1..=3 {
            let is_said = || backend.log().matches(FULL).count() == number;
            wait_for(FULL, is_said);
            backend = backend.taken_over(&rig.image, &upgrades(&rig), death::NEVER);
        }
        let ring = &mut front_end.rings[0];
        let mut answers: Vec<_> = std::iter::from_fn(|| ring.take_used()).collect();
        assert!(answers.len() < WRITES as usize, "none has to wait");
        ballast.remove();
        while answers.len() < WRITES as usize {
            answers.push(ring.wait_used());
        }
        thread::sleep(A_WHILE);
        assert_eq!(ring.take_used(), None);
        answers.sort_unstable();
        answers.dedup();
        assert_eq!(answers.len(), WRITES as usize, "each has one answer");
        for (head, _) in answers {
            assert_eq!(front_end.rings[0].status(head), OK);
        }
        for number in 0..WRITES {
            death::expect(&mut front_end, number * CLUSTER, 1 + number as u8);
        }
        drop(front_end);
        backend.stop();
        ploop_img(["check", rig.image.to_str().unwrap()]).ok();
    }
}

/// A log of written memory, as a migration has it.
struct DirtyLog(fs::File);

impl DirtyLog {
    const LEN: u64 = 4096;

    fn give(front_end: &FrontEnd) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(Self::LEN).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: Self::LEN,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        front_end.vhost.set_log_base(0, Some(region)).unwrap();
        Self(file)
    }

    fn clear(&self) {
        self.0.write_all_at(&[0; Self::LEN as usize], 0).unwrap();
    }

    fn is_marked(&self, address: u64) -> bool {
        let page = address / 4096;
        let mut byte = [0];
        self.0.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] & 1 << (page % 8) != 0
    }
}

#[test]
fn what_is_written_to_memory_is_marked_by_the_next_process_as_well() {
    let rig = Rig::new();
    let mut backend = serve(&rig);
    let (mut front_end, _region) = death::begin(&backend);
    death::write(&mut front_end, CLUSTER, 7);
    let log = DirtyLog::give(&front_end);
    let features = front_end.vhost.get_features().unwrap();
    front_end.vhost.set_features(features).unwrap();
    for index in 0..front_end.rings.len() {
        front_end.set_addresses(index, true);
    }
    let read = |front_end: &mut FrontEnd, at| {
        let target = [writable(at, 512)];
        let ring = &mut front_end.rings[0];
        assert_eq!(ring.run(VIRTIO_BLK_T_IN, CLUSTER, &target), (OK, 513));
        assert_eq!(front_end.bytes(at, 512), [7; 512]);
    };
    for round in 0..4 {
        log.clear();
        let at = FAR + round * 0x2000;
        read(&mut front_end, at);
        let used = front_end.rings[0].used();
        assert!(log.is_marked(at) && log.is_marked(used), "round {round}");
        assert!(!log.is_marked(at + 0x1000) && !log.is_marked(DATA));
        backend = backend.taken_over(&rig.image, &upgrades(&rig), death::NEVER);
    }
    // A request that nobody was told of, which the next process finds.
    log.clear();
    let at = FAR + 0x1_0000;
    let target = [writable(at, 512)];
    front_end.rings[0].request(VIRTIO_BLK_T_IN, CLUSTER, &target);
    backend = backend.taken_over(&rig.image, &upgrades(&rig), death::NEVER);
    front_end.rings[0].wait_used();
    assert!(log.is_marked(at) && log.is_marked(front_end.rings[0].used()));
    // The migration is over: the log is not touched any more.
    front_end.vhost.set_features(features & !LOG_ALL).unwrap();
    log.clear();
    backend = backend.taken_over(&rig.image, &upgrades(&rig), death::NEVER);
    read(&mut front_end, at);
    assert!(!log.is_marked(at) && !log.is_marked(front_end.rings[0].used()));
    drop(front_end);
    backend.stop();
}

#[test]
fn a_guest_keeps_its_disk_whatever_number_of_descriptors_the_next_process_may_have() {
    if !common::require_tool("prlimit") {
        return;
    }
    let rig = Rig::new();
    let mut backend = serve(&rig);
    let mut front_end = start_front_end(backend.socket());
    // More and more, until there are enough.
    let mut refused = 0;
    for most in descriptors(backend.pid()) / 2.. {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={most}:{most}"));
        command.arg(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        let successor = backend.spawn_successor_by(command, &rig.image, &upgrades(&rig), &[]);
        let is_taken;
        (backend, is_taken) = backend.settle_with(successor);
        expect_service(&mut front_end);
        if is_taken {
            break;
        }
        refused += 1;
    }
    assert!(refused > 5, "{refused}");
    drop(front_end);
    backend.stop();
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();
}
