//! A disk that grows while it is served, by a command on the control socket: of each kind,
//! and whatever comes in between.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::io::Errno;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::common::backend::Backend;
use crate::common::fixtures::fixture;
use crate::common::img::{ploop_img, qemu_img_check};
use crate::common::qmp::Qmp;
use crate::common::{left_out, require_tool};
use crate::control::{control, serve};
use crate::death::{self, CLUSTER, NEVER, begin, expect, reconnect};
use crate::front_end::*;
use crate::upgrade::{Fake, STATE, upgrades};
use crate::{IOERR, NOBODY, OK, Rig, descriptors, expect_service, start_front_end, wait_for};

const SECTOR: u64 = 512;
const MIB_OF_DISK: u64 = 1 << 20;

/// A rig for the disk that `make` makes, in a folder that it is given.
pub fn rig_of(make: impl FnOnce(&Path) -> Option<PathBuf>) -> Option<Rig> {
    let folder = TempDir::new().unwrap();
    let image = make(folder.path())?;
    Some(Rig {
        socket: folder.path().join("socket"),
        image,
        folder,
    })
}

pub fn create(folder: &Path, name: &str, args: &[&str]) -> PathBuf {
    let path = folder.join(name);
    let text = path.to_str().unwrap();
    ploop_img([&["create"], args, &[text, "64M"]].concat()).ok();
    path
}

pub fn with_snapshots(folder: &Path) -> PathBuf {
    let bundle = create(folder, "bundle", &["--cluster-size", "64K"]);
    for _ in 0..2 {
        ploop_img(["snapshot", "create", bundle.to_str().unwrap()]).ok();
    }
    bundle
}

/// One of each kind.
fn rigs() -> Vec<(&'static str, Rig)> {
    type Make = fn(&Path) -> Option<PathBuf>;
    let kinds: [(&str, Make); 7] = [
        ("bare", |folder| Some(create(folder, "disk.hds", &[]))),
        ("bare of version 1", |folder| {
            let disk = create(folder, "disk.hds", &[]);
            let args = ["convert", "--format-version", "1", disk.to_str().unwrap()];
            ploop_img(args).ok();
            Some(disk)
        }),
        ("member", |folder| {
            // Named by itself, though a descriptor says how large it is.
            Some(create(folder, "bundle", &[]).join("root.hds"))
        }),
        ("v1", |folder| fixture("v1").unpack(folder)),
        ("v2", |folder| fixture("v2").unpack(folder)),
        ("raw", |folder| fixture("plain").unpack(folder)),
        ("chain", |folder| Some(with_snapshots(folder))),
    ];
    let rigs = kinds.into_iter();
    rigs.filter_map(|(kind, make)| Some((kind, rig_of(make)?)))
        .collect()
}

/// The bundle that the disk is in, if it is in one.
fn bundle_of(rig: &Rig) -> Option<&Path> {
    let around = if rig.image.is_dir() {
        Some(&*rig.image)
    } else {
        rig.image.parent()
    };
    around.filter(|folder| folder.join(DESCRIPTOR).exists())
}

const DESCRIPTOR: &str = "DiskDescriptor.xml";

fn descriptor(bundle: &Path) -> String {
    fs::read_to_string(bundle.join(DESCRIPTOR)).unwrap()
}

/// In bytes, as other programs find it, once nobody serves it.
fn size_of(disk: &Path) -> u64 {
    let disk = disk.to_str().unwrap();
    let info = ploop_img(["info", "--output=json", disk]).ok();
    let info: Value = serde_json::from_str(&info).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

fn size_served(qmp: &mut Qmp) -> u64 {
    let block = qmp.ask("query-block", json!({}));
    block[0]["inserted"]["image"]["virtual-size"]
        .as_u64()
        .unwrap()
}

fn to(bytes: u64) -> Value {
    json!({ "device": "disk", "size": bytes })
}

const RESIZE: &str = "block_resize";

fn desc(answer: &Value) -> &str {
    answer["error"]["desc"].as_str().unwrap_or_default()
}

/// Everything in a folder, by name: how long it is, and a digest of its start.
fn contents(folder: &Path) -> BTreeMap<String, (u64, Vec<u8>)> {
    let content = |path: PathBuf| {
        let file = File::open(path).unwrap();
        let len = file.metadata().unwrap().len();
        let mut digest = Sha256::new();
        // What is behind that are holes. Not all at once: others measure what they take.
        let mut start = file.take(64 << 20);
        let mut bytes = vec![0; 64 << 10];
        loop {
            match start.read(&mut bytes).unwrap() {
                0 => break,
                count => digest.update(&bytes[..count]),
            }
        }
        (len, digest.finalize().to_vec())
    };
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
    files
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, content(entry.path()))
        })
        .collect()
}

/// That both programs find nothing wrong with it, and its new size.
fn expect_sound(rig: &Rig, size: u64) {
    let disk = bundle_of(rig).unwrap_or(&rig.image);
    ploop_img(["check".as_ref(), disk.as_os_str()]).ok();
    assert_eq!(size_of(disk), size);
    let files = match bundle_of(rig) {
        Some(bundle) => {
            let says = format!("<Disk_size>{}</Disk_size>", size / SECTOR);
            let text = descriptor(bundle);
            assert!(text.contains(&says), "{text}");
            let names = contents(bundle).into_keys();
            names.map(|name| bundle.join(name)).collect()
        }
        None => vec![rig.image.clone()],
    };
    let is_ploop = |file: &PathBuf| {
        let mut start = [0; 6];
        let mut file = File::open(file).unwrap();
        file.read_exact(&mut start).is_ok() && start == *b"Withou"
    };
    if require_tool("qemu-img") {
        files
            .iter()
            .filter(|file| is_ploop(file))
            .for_each(|file| qemu_img_check(file));
    }
}

fn capacity(front_end: &mut FrontEnd) -> u64 {
    let space = front_end.get_config(0, 60);
    u64::from_le_bytes(space[..8].try_into().unwrap()) * SECTOR
}

fn write(front_end: &mut FrontEnd, offset: u64) -> u8 {
    let data = [readable(DATA, 512)];
    front_end.rings[0]
        .run(VIRTIO_BLK_T_OUT, offset / SECTOR, &data)
        .0
}

/// What a front-end is told on its channel next.
fn told(channel: &mut UnixStream) -> [u32; 3] {
    let mut bytes = [0; 12];
    channel.read_exact(&mut bytes).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    [word(0), word(4), word(8)]
}

#[test]
fn a_disk_grows_where_the_opening_can_have_no_name() {
    let rig = rig_of(|folder| Some(create(folder, "disk.hds", &[]))).unwrap();
    let socket = format!("--control={}", control(&rig).display());
    let backend = rig.serve_without(&[libc::SYS_fsetxattr], Errno::ACCESS, &[&socket]);
    let mut qmp = Qmp::connect(&control(&rig));
    let arguments = json!({ "node-name": "disk", "size": 128 * MIB_OF_DISK });
    assert_eq!(qmp.ask("block_resize", arguments), json!({}));
    drop(start_front_end(backend.socket()));
    backend.stop();
}

#[test]
fn a_disk_of_each_kind_grows_under_the_default_sandbox_and_its_front_end_is_told() {
    /// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, of version 1, nothing behind it.
    const CHANGE: [u32; 3] = [2, 1, 0];
    for (kind, rig) in rigs() {
        eprintln!("{kind}");
        let before = bundle_of(&rig).map(contents);
        let backend = serve(&rig, &[]);
        let mut qmp = Qmp::connect(&control(&rig));
        let (mut channel, theirs) = UnixStream::pair().unwrap();
        channel.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut front_end = FrontEnd::connect(backend.socket());
        front_end.negotiate(u64::MAX);
        front_end.vhost.set_backend_request_fd(&theirs).unwrap();
        front_end.start_rings();
        expect_service(&mut front_end);
        let mut size = capacity(&mut front_end);
        // Inside the first cluster of the BAT, and far beyond.
        for wanted in [size + 3 * SECTOR, 300 << 30] {
            assert_eq!(write(&mut front_end, size), IOERR);
            assert_eq!(qmp.ask(RESIZE, to(wanted)), json!({}), "{kind}");
            assert_eq!(told(&mut channel), CHANGE);
            let rounded = capacity(&mut front_end);
            assert!(
                rounded >= wanted && rounded < wanted + MIB_OF_DISK,
                "{kind}: {rounded}"
            );
            assert_eq!(rounded % (64 << 10), 0, "whole clusters");
            assert_eq!(size_served(&mut qmp), rounded);
            for offset in [size, rounded - SECTOR] {
                assert_eq!(write(&mut front_end, offset), OK);
            }
            assert_eq!(write(&mut front_end, rounded), IOERR);
            size = rounded;
            expect_service(&mut front_end);
        }
        // It has that size already.
        assert_eq!(qmp.ask(RESIZE, to(size)), json!({}));
        assert_eq!(capacity(&mut front_end), size);
        // By as much more, and told what that comes to.
        let grow = |qmp: &mut Qmp, by| qmp.ask("grow", json!({ "by": by }));
        assert_eq!(grow(&mut qmp, 0), json!({ "size": size }));
        let more = 2 * MIB_OF_DISK;
        for _ in 0..2 {
            let grown = grow(&mut qmp, more - SECTOR);
            size += more;
            assert_eq!(grown, json!({ "size": size }), "{kind}");
            assert_eq!(capacity(&mut front_end), size);
        }
        drop(front_end);
        backend.stop();
        expect_sound(&rig, size);
        let (Some(before), Some(bundle)) = (before, bundle_of(&rig)) else {
            continue;
        };
        let after = contents(bundle);
        assert!(before.keys().eq(after.keys()), "{:?}", after.keys());
        // All but the top and the descriptor are as they were.
        let changed = before.iter().filter(|(name, is)| after[*name] != **is);
        assert_eq!(changed.count(), 2, "{kind}");
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_and_change_nothing() {
    for (kind, rig) in rigs() {
        eprintln!("{kind}");
        let disk = bundle_of(&rig).unwrap_or(&rig.image).to_owned();
        let size = size_of(&disk);
        let folder = bundle_of(&rig).unwrap_or(rig.folder.path()).to_owned();
        let names = contents(&folder).into_keys().collect::<Vec<_>>();
        let text = bundle_of(&rig).map(descriptor);
        let backend = serve(&rig, &[]);
        let mut qmp = Qmp::connect(&control(&rig));
        let mut front_end = start_front_end(backend.socket());
        let largest = i64::MAX as u64 / SECTOR * SECTOR;
        for (wanted, expected) in [
            (size - SECTOR, "ploop-img resize --shrink"),
            (SECTOR, "ploop-img resize --shrink"),
            (size + 1, "no multiple of 512"),
            (largest, "holds at most"),
            (1 << 60, "holds at most"),
        ] {
            let answer = qmp.answer(RESIZE, to(wanted));
            assert!(desc(&answer).contains(expected), "{wanted}: {answer}");
            assert_eq!(answer["error"]["class"], "GenericError");
        }
        let answer = qmp.answer("grow", json!({ "by": largest }));
        assert!(desc(&answer).contains("holds at most"), "{answer}");
        if kind.contains("version 1") || kind == "v1" {
            let answer = qmp.answer(RESIZE, to(3 << 40));
            assert!(desc(&answer).contains("version 1"), "{answer}");
        }
        assert_eq!(size_served(&mut qmp), size);
        assert_eq!(capacity(&mut front_end), size);
        expect_service(&mut front_end);
        drop(front_end);
        backend.stop();
        assert_eq!(size_of(&disk), size);
        assert_eq!(bundle_of(&rig).map(descriptor), text);
        let is_left = |name: &String| !name.ends_with("log");
        let left: Vec<_> = contents(&folder).into_keys().filter(is_left).collect();
        assert_eq!(left, names.into_iter().filter(is_left).collect::<Vec<_>>());
        ploop_img(["check".as_ref(), disk.as_os_str()]).ok();
    }
    let rig = Rig::new();
    let backend = serve(&rig, &["--read-only"]);
    let mut qmp = Qmp::connect(&control(&rig));
    let answer = qmp.answer(RESIZE, to(1 << 30));
    assert!(desc(&answer).contains("read-only"), "{answer}");
    backend.stop();
}

/// The thread that makes the disk larger, which stands still until this is dropped: what
/// comes in between comes in between.
pub struct Halt(Pid);

impl Halt {
    pub fn of(backend: &Backend) -> Self {
        Self::of_thread(backend, "watch")
    }

    pub fn of_thread(backend: &Backend, name: &str) -> Self {
        let task = task(backend, name);
        let id = task.file_name().unwrap().to_str().unwrap();
        let thread = Pid::from_raw(id.parse().unwrap());
        ptrace::attach(thread).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        Self(thread)
    }

    pub fn thread(&self) -> Pid {
        self.0
    }
}

/// Where the kernel tells of a thread.
fn task(backend: &Backend, name: &str) -> PathBuf {
    let folder = format!("/proc/{}/task", backend.pid());
    let mut tasks = fs::read_dir(folder).unwrap().map(|it| it.unwrap().path());
    let is_it = |path: &PathBuf| {
        let comm = fs::read_to_string(path.join("comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    };
    tasks.find(is_it).expect("it is there")
}

/// How many bytes a thread has read.
fn has_read(task: &Path) -> u64 {
    let io = fs::read_to_string(task.join("io")).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

impl Drop for Halt {
    fn drop(&mut self) {
        if ptrace::detach(self.0, None).is_err() {
            // It has ended with its process, which waits for this.
            let _ = waitpid(self.0, Some(WaitPidFlag::__WALL));
        }
    }
}

/// Asks for a larger disk, and returns when the program has heard it.
fn begin_resize(backend: &Backend, qmp: &mut Qmp, bytes: u64) {
    let before = descriptors(backend.pid());
    qmp.begin(RESIZE, to(bytes));
    wait_for("what it takes", || descriptors(backend.pid()) > before);
}

/// The same of a disk with this descriptor. Returns when that has been looked at, and all
/// waits for the engine: which does nothing until what is returned is dropped.
fn begin_resize_up_to_engine(backend: &Backend, qmp: &mut Qmp, bytes: u64, text: &str) -> Halt {
    let watch = task(backend, "watch");
    let before = has_read(&watch);
    let halt = Halt::of_thread(backend, "md");
    begin_resize(backend, qmp, bytes);
    let wanted = before + text.len() as u64;
    wait_for("its look", || has_read(&watch) >= wanted);
    halt
}

const RESIZING: &str = "The disk is being resized already";

#[test]
fn while_a_disk_is_made_larger_its_client_waits_and_nobody_else() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut first = Qmp::connect(&control(&rig));
    let mut other = Qmp::connect(&control(&rig));
    let halt = Halt::of(&backend);
    begin_resize(&backend, &mut first, 80 * MIB_OF_DISK);
    first.begin("query-status", json!({}));
    first.begin(RESIZE, to(90 * MIB_OF_DISK));
    assert_eq!(desc(&other.answer(RESIZE, to(1 << 30))), RESIZING);
    assert_eq!(other.ask("query-status", json!({}))["running"], true);
    expect_service(&mut front_end);
    assert_eq!(capacity(&mut front_end), 64 * MIB_OF_DISK);
    // Front-ends may come and go.
    drop(front_end);
    other.event("FRONT_END_GONE");
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    // One that asks and goes.
    let mut hasty = UnixStream::connect(control(&rig)).unwrap();
    let request = json!({ "execute": RESIZE, "arguments": to(1 << 30) });
    write!(hasty, "{{\"execute\":\"qmp_capabilities\"}}{request}").unwrap();
    drop(hasty);
    other.ask("query-status", json!({}));
    drop(halt);
    assert_eq!(first.end(RESIZE)["return"], json!({}));
    assert_eq!(first.end("query-status")["return"]["running"], true);
    assert_eq!(first.end(RESIZE)["return"], json!({}));
    assert_eq!(size_served(&mut first), 90 * MIB_OF_DISK);
    assert_eq!(write(&mut front_end, 90 * MIB_OF_DISK - SECTOR), OK);
    drop(front_end);
    backend.stop();
    expect_sound(&rig, 90 * MIB_OF_DISK);
}

/// How many the program has.
fn sockets(backend: &Backend) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", backend.pid())).unwrap();
    let is_socket = |path: PathBuf| {
        let to = fs::read_link(path).unwrap_or_default();
        to.to_string_lossy().starts_with("socket:")
    };
    fds.filter(|fd| is_socket(fd.as_ref().unwrap().path()))
        .count()
}

#[test]
fn a_client_that_goes_does_not_keep_the_disk_from_growing() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    let mut other = Qmp::connect(&control(&rig));
    let before = sockets(&backend);
    let mut qmp = Qmp::connect(&control(&rig));
    let halt = Halt::of(&backend);
    begin_resize(&backend, &mut qmp, 80 * MIB_OF_DISK);
    qmp.begin("quit", json!({}));
    assert_eq!(sockets(&backend), before + 1);
    drop(qmp);
    // It is hung up on at once, and nothing more of it is done.
    wait_for("its end", || sockets(&backend) == before);
    drop(halt);
    wait_for("the larger disk", || {
        size_served(&mut other) == 80 * MIB_OF_DISK
    });
    backend.stop();
    expect_sound(&rig, 80 * MIB_OF_DISK);
}

#[test]
fn files_are_watched_also_while_a_disk_is_made_larger() {
    let rig = rig_of(|folder| Some(create(folder, "bundle", &[]))).unwrap();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let text = descriptor(&rig.image);
    let halt = begin_resize_up_to_engine(&backend, &mut qmp, 1 << 30, &text);
    let top = rig.image.join("root.hds");
    let elsewhere = rig.image.join("elsewhere");
    fs::rename(&top, &elsewhere).unwrap();
    assert_eq!(qmp.event("IMAGE_VANISHED")["how"], "moved");
    fs::rename(&elsewhere, &top).unwrap();
    drop(halt);
    assert_eq!(qmp.end(RESIZE)["return"], json!({}));
    backend.stop();
    expect_sound(&rig, 1 << 30);
}

fn terminate(backend: &Backend) {
    let pid = rustix::process::Pid::from_raw(backend.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

#[test]
fn the_end_of_the_program_calls_growing_off() {
    // Before anything was done, and while all waits for the engine.
    for (thread, by_client) in [("watch", false), ("md", true)] {
        for (kind, rig) in rigs() {
            eprintln!("{kind}, {thread}, {by_client}");
            let disk = bundle_of(&rig).unwrap_or(&rig.image).to_owned();
            let size = size_of(&disk);
            let backend = serve(&rig, &[]);
            let mut qmp = Qmp::connect(&control(&rig));
            let mut other = Qmp::connect(&control(&rig));
            let halt = Halt::of_thread(&backend, thread);
            begin_resize(&backend, &mut qmp, 1 << 30);
            assert_eq!(desc(&other.answer(RESIZE, to(1 << 30))), RESIZING);
            if by_client {
                other.ask("quit", json!({}));
            } else {
                terminate(&backend);
            }
            // Nobody waits for that thread.
            let answer = qmp.end(RESIZE);
            assert!(desc(&answer).contains("cancelled"), "{answer}");
            drop(halt);
            backend.ends();
            expect_sound(&rig, size);
        }
    }
}

#[test]
fn a_guest_is_not_served_any_more_while_the_program_ends_in_the_midst_of_a_growth() {
    let rig = rig_of(|folder| Some(create(folder, "bundle", &[]))).unwrap();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    let text = descriptor(&rig.image);
    let halt = begin_resize_up_to_engine(&backend, &mut qmp, 1 << 30, &text);
    terminate(&backend);
    let hangs_up = || front_end.vhost.get_queue_num().is_err();
    wait_for("the end of the connection", hangs_up);
    // Not because the program had to be cut short.
    drop(halt);
    backend.ends();
    expect_sound(&rig, 64 * MIB_OF_DISK);
}

#[test]
fn a_process_that_takes_over_calls_growing_off_and_can_do_it_itself() {
    for (kind, rig) in rigs() {
        eprintln!("{kind}");
        let socket = upgrades(&rig);
        let backend = serve(&rig, &[&format!("--upgrade-socket={}", socket.display())]);
        let mut front_end = start_front_end(backend.socket());
        expect_service(&mut front_end);
        let size = capacity(&mut front_end);
        // After it has grown once already.
        let mut qmp = Qmp::connect(&control(&rig));
        let size = size + 2 * MIB_OF_DISK;
        qmp.ask(RESIZE, to(size));
        let halt = Halt::of(&backend);
        begin_resize(&backend, &mut qmp, 1 << 30);
        let successor = backend.spawn_successor(&rig.image, &socket, &[]);
        backend.expect_to_say("is about to take over");
        // The guest is served all the while.
        expect_service(&mut front_end);
        drop(halt);
        let answer = qmp.end(RESIZE);
        if answer["error"].is_null() {
            // It was not ready yet when that went through.
            assert_eq!(answer["return"], json!({}));
        } else {
            assert!(desc(&answer).contains("cancelled"), "{answer}");
        }
        let now = capacity(&mut front_end);
        let backend = backend.gives_way_to(successor);
        expect_service(&mut front_end);
        assert_eq!(capacity(&mut front_end), now, "{kind}");
        let mut qmp = Qmp::connect(&control(&rig));
        let size = 2 << 30;
        assert_eq!(qmp.ask(RESIZE, to(size)), json!({}));
        assert_eq!(capacity(&mut front_end), size);
        assert_eq!(write(&mut front_end, size - SECTOR), OK);
        drop(front_end);
        backend.stop();
        expect_sound(&rig, size);
    }
}

#[test]
fn a_raw_disk_that_has_grown_keeps_its_size_when_nobody_takes_over() {
    let unpacked = rig_of(|folder| Some(fixture("plain").unpack(folder)?.join("root.hds")));
    let Some(mut rig) = unpacked else { return };
    let raw = rig.image.clone();
    rig.image = raw.parent().unwrap().to_owned();
    let upgrade = format!("--upgrade-socket={}", upgrades(&rig).display());
    let backend = serve(&rig, &[&upgrade, "--serial=disk"]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let mut qmp = Qmp::connect(&control(&rig));
    let size = capacity(&mut front_end) + 5 * MIB_OF_DISK;
    qmp.ask(RESIZE, to(size));
    // It gets to where the image was closed for it, and goes.
    let mut rig = rig;
    let bundle = std::mem::replace(&mut rig.image, raw);
    let mut fake = Fake::connect(&rig);
    fake.come_to(&rig, STATE);
    drop(fake);
    backend.expect_to_say("this one goes on");
    expect_service(&mut front_end);
    assert_eq!(capacity(&mut front_end), size);
    assert_eq!(write(&mut front_end, size - SECTOR), OK);
    let size = size + MIB_OF_DISK;
    qmp.ask(RESIZE, to(size));
    assert_eq!(write(&mut front_end, size - SECTOR), OK);
    drop(front_end);
    backend.stop();
    rig.image = bundle;
    expect_sound(&rig, size);
}

#[test]
fn a_disk_whose_guest_may_come_back_keeps_its_size_until_it_has() {
    let rig = Rig::new();
    let backend = serve(&rig, &[]);
    expect_service(&mut start_front_end(backend.socket()));
    backend.kill();
    fs::remove_file(&rig.socket).unwrap();
    fs::remove_file(control(&rig)).unwrap();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let answer = qmp.answer(RESIZE, to(1 << 30));
    assert!(desc(&answer).contains("may come back"), "{answer}");
    expect_service(&mut start_front_end(backend.socket()));
    qmp.ask(RESIZE, to(1 << 30));
    backend.stop();
    expect_sound(&rig, 1 << 30);
}

#[test]
fn a_process_that_dies_at_any_step_of_the_descriptor_leaves_the_old_or_the_new_disk() {
    if !cfg!(debug_assertions) {
        let _ = left_out("only debug builds die where they are told to");
        return;
    }
    /// In which the image is opened.
    const STEPS_BEFORE: u64 = 1;
    /// In which the descriptor is written, and put in place.
    const STEPS: u64 = 4;
    for name in ["v2", "plain"] {
        for step in 1..=STEPS + 1 {
            let Some(rig) = rig_of(|folder| fixture(name).unpack(folder)) else {
                return;
            };
            let size = fixture(name).size;
            let grown = size + 8 * MIB_OF_DISK;
            let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
            let step_of_all = STEPS_BEFORE + step;
            command.env("PLOOP_IMG_KILL_AT", step_of_all.to_string());
            let option = format!("--control={}", control(&rig).display());
            let backend = Backend::start_as(command, &rig.image, &rig.socket, &[option]);
            expect_service(&mut start_front_end(backend.socket()));
            let mut qmp = Qmp::connect(&control(&rig));
            qmp.begin(RESIZE, to(grown));
            if step > STEPS {
                assert_eq!(qmp.end(RESIZE)["return"], json!({}));
                backend.stop();
            } else {
                let answers = qmp.last_words().into_iter();
                let mut answers = answers.filter(|line| line["event"].is_null());
                assert_eq!(answers.next(), None, "it was not over");
                backend.wait_for_signal();
                fs::remove_file(&rig.socket).unwrap();
                fs::remove_file(control(&rig)).unwrap();
            }
            let is_said = descriptor(&rig.image).contains(&format!(">{}<", grown / SECTOR));
            // It is put in place with the last but one, and a header is written before.
            assert_eq!(is_said, step >= STEPS, "{name}, {step}");
            let is_grown = is_said || (name == "v2" && step == STEPS - 1);
            let backend = serve(&rig, &[]);
            let mut front_end = start_front_end(backend.socket());
            let expected = if is_grown { grown } else { size };
            assert_eq!(capacity(&mut front_end), expected, "{name}, {step}");
            assert_eq!(write(&mut front_end, expected - SECTOR), OK);
            drop(front_end);
            // The same once more, which mends a descriptor that lags behind.
            Qmp::connect(&control(&rig)).ask(RESIZE, to(grown));
            backend.stop();
            // What was to be put in place is left.
            let args = ["check", "--repair", "leaks", rig.image.to_str().unwrap()];
            ploop_img(args).ok();
            assert_eq!(contents(&rig.image).len(), 2);
            expect_sound(&rig, grown);
        }
    }
}

#[test]
fn a_disk_whose_descriptor_cannot_be_replaced_keeps_its_size() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tried: only root can become another user");
        return;
    }
    let rig = rig_of(|folder| Some(create(folder, "bundle", &[]))).unwrap();
    chown(rig.folder.path(), Some(NOBODY), None).unwrap();
    let user = format!("--user={NOBODY}");
    let backend = serve(&rig, &[&user]);
    let mut qmp = Qmp::connect(&control(&rig));
    for _ in 0..2 {
        let answer = qmp.answer(RESIZE, to(1 << 30));
        assert!(desc(&answer).contains("Permission denied"), "{answer}");
        assert_eq!(size_served(&mut qmp), 64 * MIB_OF_DISK);
    }
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
    expect_sound(&rig, 64 * MIB_OF_DISK);
    assert_eq!(contents(&rig.image).len(), 2);
}

#[test]
fn what_lies_behind_a_plain_base_does_not_come_to_light() {
    let Some(rig) = rig_of(|folder| fixture("plain").unpack(folder)) else {
        return;
    };
    let raw = rig.image.join("root.hds");
    let size = fs::metadata(&raw).unwrap().len();
    let mut base = File::options().append(true).open(&raw).unwrap();
    ploop_img(["snapshot", "create", rig.image.to_str().unwrap()]).ok();
    // By another program.
    base.write_all(&[7; 1 << 20]).unwrap();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let answer = qmp.answer(RESIZE, to(size + MIB_OF_DISK));
    assert!(desc(&answer).contains("truncate --size="), "{answer}");
    qmp.ask(RESIZE, to(size));
    assert_eq!(size_served(&mut qmp), size);
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
    base.set_len(size).unwrap();
    let backend = serve(&rig, &[]);
    Qmp::connect(&control(&rig)).ask(RESIZE, to(size + MIB_OF_DISK));
    backend.stop();
    let backend = serve(&rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    expect(&mut front_end, size / SECTOR, 0);
    drop(front_end);
    backend.stop();
}

/// What the guest has when its process is killed after the disk has grown.
#[test]
fn a_guest_goes_on_after_a_kill_with_the_disk_that_grew_under_it() {
    let rig = Rig::new();
    let mut backend = serve(&rig, NEVER);
    let (mut front_end, region) = begin(&backend);
    death::write(&mut front_end, 0, 3);
    // The part of the region that is for the map is rounded up; the last is beyond.
    for (round, size) in (10..).zip([65 * MIB_OF_DISK, 8 << 30, 64 << 30]) {
        Qmp::connect(&control(&rig)).ask(RESIZE, to(size));
        assert_eq!(capacity(&mut front_end), size);
        let last = size / SECTOR - 1;
        // Known to this process alone.
        death::write(&mut front_end, last, round);
        backend.kill();
        fs::remove_file(control(&rig)).unwrap();
        backend = serve(&rig, NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        assert_eq!(capacity(&mut front_end), size);
        front_end.start_rings();
        expect(&mut front_end, last, round);
        expect(&mut front_end, 0, 3);
        death::write(&mut front_end, last - CLUSTER, round);
        expect(&mut front_end, last - CLUSTER, round);
        assert_eq!(write(&mut front_end, size), IOERR);
    }
    drop(front_end);
    backend.stop();
    expect_sound(&rig, 64 << 30);
}

#[test]
fn a_descriptor_that_somebody_else_has_changed_is_left_alone() {
    let rig = rig_of(|folder| Some(with_snapshots(folder))).unwrap();
    let backend = serve(&rig, &[]);
    let mut qmp = Qmp::connect(&control(&rig));
    let text = descriptor(&rig.image);
    let changed = text.replacen("<File>root.hds.", "<File>other.hds.", 1);
    assert_ne!(text, changed, "{text}");
    for now in [Some(&changed), None] {
        let path = rig.image.join(DESCRIPTOR);
        match now {
            Some(text) => fs::write(&path, text).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let answer = qmp.answer(RESIZE, to(1 << 30));
        let expected = [
            "was changed by another program",
            "without a DiskDescriptor.xml",
        ];
        let is_said = expected.iter().any(|words| desc(&answer).contains(words));
        assert!(is_said, "{answer}");
        assert_eq!(fs::read_to_string(&path).ok().as_ref(), now);
    }
    assert_eq!(size_served(&mut qmp), 64 * MIB_OF_DISK);
    fs::write(rig.image.join(DESCRIPTOR), &text).unwrap();
    qmp.ask(RESIZE, to(1 << 30));
    backend.stop();
    expect_sound(&rig, 1 << 30);
}

#[test]
fn a_descriptor_that_is_changed_while_a_disk_is_made_larger_is_left_alone() {
    for (kind, rig) in rigs() {
        let Some(bundle) = bundle_of(&rig) else {
            continue;
        };
        eprintln!("{kind}");
        let text = descriptor(bundle);
        let size = size_of(bundle);
        let wanted = size + 80 * MIB_OF_DISK;
        let names = contents(bundle).into_keys().collect::<Vec<_>>();
        let backend = serve(&rig, &[]);
        let mut front_end = start_front_end(backend.socket());
        let mut qmp = Qmp::connect(&control(&rig));
        // It has looked at the descriptor, and waits for what the other does.
        let halt = begin_resize_up_to_engine(&backend, &mut qmp, wanted, &text);
        let changed = text.replacen("root.hds", "other.hds", 1);
        fs::write(bundle.join(DESCRIPTOR), &changed).unwrap();
        drop(halt);
        let answer = qmp.end(RESIZE);
        let expected = "was changed by another program";
        assert!(desc(&answer).contains(expected), "{answer}");
        assert_eq!(descriptor(bundle), changed);
        assert!(contents(bundle).into_keys().eq(names));
        assert_eq!(size_served(&mut qmp), size);
        assert_eq!(capacity(&mut front_end), size);
        expect_service(&mut front_end);
        fs::write(bundle.join(DESCRIPTOR), &text).unwrap();
        qmp.ask(RESIZE, to(wanted));
        drop(front_end);
        backend.stop();
        expect_sound(&rig, wanted);
    }
}

#[test]
fn a_descriptor_keeps_its_owner_whoever_serves() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tried: only root can give files away");
        return;
    }
    for option in [None, Some(format!("--user={NOBODY}"))] {
        let rig = rig_of(|folder| Some(create(folder, "bundle", &[]))).unwrap();
        for path in [rig.folder.path(), &rig.image, &rig.image.join(DESCRIPTOR)] {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let path = rig.image.join(DESCRIPTOR);
        // More than that is not kept, and ends nobody.
        fs::set_permissions(&path, Permissions::from_mode(0o6640)).unwrap();
        let options: Vec<_> = option.iter().map(String::as_str).collect();
        let backend = serve(&rig, &options);
        Qmp::connect(&control(&rig)).ask(RESIZE, to(1 << 30));
        backend.stop();
        expect_sound(&rig, 1 << 30);
        let is = fs::metadata(&path).unwrap();
        assert_eq!(
            (is.uid(), is.gid(), is.mode() & 0o7777),
            (NOBODY, NOBODY, 0o640)
        );
    }
}
