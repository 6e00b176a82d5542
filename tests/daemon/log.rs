//! What the daemon says, and that it depends on nobody who listens.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, fallocate, ftruncate, memfd_create};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, kill_process};
use vhost::VhostBackend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::img::ploop_img;
use super::common::sockets::is_listened_on;
use super::common::{require_tool, tool};
use super::front_end::{A_WHILE, DATA, FAR, FrontEnd, REGION_LEN, SEAM, writable};
use super::{Rig, daemon, expect_service, refused, start_front_end, wait_for};

/// A pipe whose reader has stopped reading: not one byte more fits.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    for chunk in [4096, 1] {
        while rustix::io::write(&writer, &vec![b'x'; chunk]).is_ok() {}
    }
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let rig = Rig::new();
    let (_reader, writer) = full_pipe();
    let mut child = daemon(&["--log-level=trace"])
        .arg("--socket-path")
        .arg(&rig.socket)
        .arg("--blk-file")
        .arg(&rig.image)
        .stderr(writer)
        .spawn()
        .unwrap();
    wait_for("the socket", || is_listened_on(&rig.socket));
    expect_service(&mut start_front_end(&rig.socket));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    wait_for("its end", || child.try_wait().unwrap().is_some());
    assert!(child.wait().unwrap().success());
    assert!(!rig.socket.exists());
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();

    // Nor does it keep the program from failing.
    let (_reader, writer) = full_pipe();
    let mut child = daemon(&["--socket-path=/nowhere/socket"])
        .arg("--blk-file")
        .arg(&rig.image)
        .stderr(writer)
        .spawn()
        .unwrap();
    wait_for("its end", || child.try_wait().unwrap().is_some());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn the_log_is_json_if_that_is_wanted() {
    let rig = Rig::new();
    let backend = rig.serve(&["--log-format=json", "--read-only"]);
    let log = rig.socket.with_extension("log");
    let said = || fs::read_to_string(&log).unwrap();
    wait_for("the log", || said().contains("ready"));
    backend.stop();
    let lines: Vec<serde_json::Value> = said()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let ready = lines[0]["message"].as_str().unwrap();
    for part in [
        rig.socket.to_str().unwrap(),
        rig.image.to_str().unwrap(),
        "67108864 bytes",
        "read-only",
        env!("CARGO_PKG_VERSION"),
    ] {
        assert!(ready.contains(part), "{part}: {ready}");
    }
    assert_eq!(lines[0]["level"], "info");
    assert_eq!(lines.last().unwrap()["message"], "shutting down");

    let why = rig.refused(&["--log-format=json", "--blk-file=/nowhere/x\u{1b}[2J"]);
    let why: serde_json::Value = serde_json::from_str(&why).unwrap();
    assert_eq!(why["level"], "error");
    let message = why["message"].as_str().unwrap();
    assert!(message.contains("No such file"), "{message}");
}

#[test]
fn the_journal_gets_priorities_and_no_control_characters() {
    let rig = Rig::new();
    let file = fs::File::create(rig.folder.path().join("journal")).unwrap();
    let stat = rustix::fs::fstat(&file).unwrap();
    let output = daemon(&["--fd=0", "--blk-file=/nowhere/x\u{1b}[2J\n"])
        .env("JOURNAL_STREAM", format!("{}:{}", stat.st_dev, stat.st_ino))
        .stderr(file)
        .status()
        .unwrap();
    assert_eq!(output.code(), Some(1));
    let said = fs::read_to_string(rig.folder.path().join("journal")).unwrap();
    assert!(said.starts_with("<3>"), "{said}");
    assert!(said.contains("/nowhere/x\\u{1b}[2J\\n"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");

    // Somebody else's stream.
    let said = refused(&["--fd=0", "--blk-file=/nowhere/x"]);
    assert!(said.starts_with("vhost-user-ploop: "), "{said}");
}

/// What the log says of memory that looks as if nobody shared it.
const STAYS_EMPTY: &str = "share=on";

/// Longer than it takes until it says so.
const LONG_ENOUGH: Duration = Duration::from_millis(1500);

#[test]
fn memory_that_nobody_shares_is_told_of_once() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let mut front_end = FrontEnd::connect(&rig.socket);
    front_end.negotiate(u64::MAX);
    // What a front-end has mapped privately, its file never sees.
    let files = [0, 1, 2].map(|_| memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    let mut regions = [0, 1, 2].map(|index| front_end.region(index));
    for (region, file) in regions.iter_mut().zip(&files) {
        ftruncate(file, REGION_LEN).unwrap();
        region.mmap_handle = file.as_raw_fd();
    }
    // Reading what nobody has written makes the file take space, too.
    for file in &files {
        fallocate(file, FallocateFlags::empty(), 0, REGION_LEN).unwrap();
    }
    front_end.vhost.set_mem_table(&regions).unwrap();
    front_end.start_rings();
    for ring in &mut front_end.rings[..2] {
        ring.request(VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]);
        ring.kick();
    }
    wait_for("a word of it", || backend.log().contains(STAYS_EMPTY));
    thread::sleep(A_WHILE);
    for ring in &front_end.rings[..2] {
        ring.kick();
    }
    thread::sleep(LONG_ENOUGH);
    let log = backend.log();
    assert_eq!(log.matches(STAYS_EMPTY).count(), 1, "{log}");
    drop(front_end);
    backend.stop();
}

struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The firmware looks for something to boot, and waits for the disk for ever.
#[test]
fn memory_that_qemu_maps_privately_is_told_of() {
    if !require_tool("qemu-system-x86_64") {
        return;
    }
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let qemu = tool("qemu-system-x86_64")
        .args("-nodefaults -no-user-config -display none -accel tcg -m 256M".split(' '))
        .args("-machine q35,memory-backend=mem -device vhost-user-blk-pci,chardev=c".split(' '))
        .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=off"])
        .arg("-chardev")
        .arg(format!("socket,id=c,path={}", rig.socket.display()))
        .stdin(Stdio::null())
        .spawn();
    let qemu = Qemu(qemu.unwrap());
    backend.expect_to_say(STAYS_EMPTY);
    drop(qemu);
    backend.stop();
}

#[test]
fn a_guest_that_has_nothing_to_do_is_not_taken_for_one_whose_memory_is_not_shared() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let front_end = start_front_end(&rig.socket);
    for region in [DATA, SEAM, FAR] {
        front_end.fill(region, &[1; 512 << 10]);
    }
    for ring in &front_end.rings {
        ring.kick();
    }
    thread::sleep(LONG_ENOUGH);
    assert!(!backend.log().contains(STAYS_EMPTY), "{}", backend.log());
    drop(front_end);
    backend.stop();
}

#[test]
fn memory_features_and_rings_are_shown_to_who_looks_for_a_fault() {
    let rig = Rig::new();
    let backend = rig.serve(&["--log-level=debug"]);
    let mut front_end = start_front_end(&rig.socket);
    expect_service(&mut front_end);
    front_end.vhost.get_vring_base(0).unwrap();
    for word in [
        "memory of the guest: 3 regions, 0x100000 bytes at 0x0, 0x100000 bytes at 0x100000",
        "are accepted",
        "queue 0 starts: 64 descriptors",
        "queue 0 has stopped",
    ] {
        backend.expect_to_say(word);
    }
    drop(front_end);
    backend.stop();
}

#[test]
fn bitmaps_that_are_dropped_are_said() {
    let rig = Rig::new();
    let file = fs::File::options().write(true).open(&rig.image).unwrap();
    // The mark says that an extension is valid; it lies behind the table.
    file.write_all_at(&0x312e_3276_u32.to_le_bytes(), IN_USE_OFFSET)
        .unwrap();
    file.write_all_at(&2048_u64.to_le_bytes(), EXTENSION_OFFSET)
        .unwrap();
    for (options, is_said) in [(&["--read-only"][..], false), (&[], true), (&[], false)] {
        let backend = rig.serve(options);
        // The line would come before this one.
        backend.expect_to_say("ready:");
        let log = backend.log();
        assert_eq!(log.contains("bitmaps"), is_said, "{options:?}: {log}");
        backend.stop();
        fs::remove_file(rig.socket.with_extension("log")).unwrap();
    }
}

/// Of the header, in bytes (QEMU's `docs/interop/parallels.rst`).
const IN_USE_OFFSET: u64 = 44;
const EXTENSION_OFFSET: u64 = 56;
