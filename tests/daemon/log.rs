//! What the daemon says, and that it depends on nobody who listens.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, kill_process};

use super::common::img::ploop_img;
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
    wait_for("the socket", || rig.socket.exists());
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
