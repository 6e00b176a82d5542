use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::*;

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("open")
}

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    file.as_file().set_len(1 << 20).expect("set_len");
    file
}

/// Locks through a description of its own.
fn lock(path: &Path, mode: LockMode) -> Result<ImageLock, LockError> {
    ImageLock::acquire(&open(path), mode)
}

/// Says that nothing was tested, or fails where that may not be (tests/common).
fn leave_out(why: &str) {
    let required = std::env::var_os("PLOOP_REQUIRE_PEERS");
    assert!(required.is_none_or(|value| value == "0"), "{why}");
    eprintln!("LEFT OUT: {why}");
}

/// Whether QEMU's tools are here; says loudly if not.
fn have_qemu() -> bool {
    let found = ["qemu-img", "qemu-io"].iter().all(|tool| {
        Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_ok()
    });
    if !found {
        leave_out("qemu-img and qemu-io are not installed, locks were not tested with them");
    }
    found
}

#[test]
fn readers_share_and_writers_do_not() {
    use LockMode::{Exclusive, ReadOnly, ReadWrite};
    let image = image();
    for (first, second, together) in [
        (ReadOnly, ReadOnly, true),
        (ReadOnly, ReadWrite, false),
        (ReadOnly, Exclusive, false),
        (ReadWrite, ReadOnly, false),
        (ReadWrite, ReadWrite, false),
        (ReadWrite, Exclusive, false),
        (Exclusive, ReadOnly, false),
        (Exclusive, ReadWrite, false),
        (Exclusive, Exclusive, false),
    ] {
        let held = lock(image.path(), first).expect("nobody else is there");
        let result = lock(image.path(), second);
        assert_eq!(result.is_ok(), together, "{first:?} then {second:?}");
        drop(result);
        drop(held);
        lock(image.path(), second).expect("free again");
    }
}

#[test]
fn locks_that_are_shared_are_locks_and_show_when_they_are_gone() {
    use LockMode::{ReadOnly, ReadWrite};
    for mode in [ReadOnly, ReadWrite] {
        let image = image();
        let one = lock(image.path(), mode).expect("nobody else is there");
        one.is_alone().expect("nobody else is there");
        let other = ImageLock::share(&open(image.path()), mode).expect("it can be locked");
        if mode == ReadWrite {
            one.is_alone().expect_err("the other one has it too");
        }
        drop(other);
        one.is_alone().expect("the other one is gone");
        let other = ImageLock::share(&open(image.path()), mode).expect("it can be locked");
        drop(one);
        lock(image.path(), ReadWrite).expect_err("the other one has it");
        drop(other);
        lock(image.path(), ReadWrite).expect("it is free");
    }
}

#[test]
fn the_error_says_what_the_other_does() {
    let image = image();
    let error = |first, second| {
        let _held = lock(image.path(), first).expect("nobody else is there");
        lock(image.path(), second)
            .expect_err("not together")
            .to_string()
    };
    assert_eq!(
        error(LockMode::ReadWrite, LockMode::ReadWrite),
        "another process has the image open for writing"
    );
    assert_eq!(
        error(LockMode::ReadWrite, LockMode::ReadOnly),
        "another process has the image open for writing"
    );
    assert_eq!(
        error(LockMode::ReadOnly, LockMode::ReadWrite),
        "another process has the image open and does not let others write to it"
    );
    assert_eq!(
        error(LockMode::Exclusive, LockMode::ReadOnly),
        "another process has locked the image exclusively"
    );
    assert_eq!(
        error(LockMode::ReadOnly, LockMode::Exclusive),
        "another process has the image open and does not let others write to it"
    );
}

#[test]
fn a_failed_attempt_leaves_no_lock() {
    let image = image();
    let reader = lock(image.path(), LockMode::ReadOnly).expect("free");
    let file = open(image.path());
    ImageLock::acquire(&file, LockMode::ReadWrite).expect_err("a reader is there");
    drop(reader);
    // `file` is still open: had the attempt left locks on it, this would fail.
    lock(image.path(), LockMode::Exclusive).expect("free again");
}

#[test]
fn closing_another_descriptor_does_not_unlock() {
    let image = image();
    let file = open(image.path());
    let held = ImageLock::acquire(&file, LockMode::ReadWrite).expect("free");
    drop(open(image.path()));
    drop(file);
    lock(image.path(), LockMode::ReadOnly).expect_err("still held");
    drop(held);
    lock(image.path(), LockMode::ReadOnly).expect("free again");
}

/// The official tool takes process locks on bytes 200 to 204 of the base delta.
/// A process never conflicts with its own, so another one takes them here.
#[test]
fn the_official_tools_lock_is_respected_and_named() {
    const TOOL: &str = "import fcntl,sys,time\n\
        f = open(sys.argv[1], 'rb')\n\
        fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB, 5, 200)\n\
        print('locked', flush=True)\n\
        sys.stdin.read()\n";
    let image = image();
    let Ok(child) = Command::new("python3")
        .args(["-c", TOOL])
        .arg(image.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
    else {
        leave_out("python3 is not installed, the official tool's lock was not tested");
        return;
    };
    let mut child = Reaped(child);
    child.wait_for("locked");
    let pid = i32::try_from(child.0.id()).expect("pid");
    for mode in [LockMode::ReadOnly, LockMode::ReadWrite, LockMode::Exclusive] {
        match lock(image.path(), mode) {
            Err(LockError::Exclusive(holder)) => assert_eq!(holder.pid, Some(pid)),
            other => panic!("{mode:?}: {other:?}"),
        }
    }
}

/// A child process that does not outlive the test.
struct Reaped(Child);

impl Reaped {
    /// Reads its output up to a line that contains `text`.
    fn wait_for(&mut self, text: &str) {
        let mut lines = BufReader::new(self.0.stdout.as_mut().expect("piped")).lines();
        assert!(
            lines.any(|line| line.expect("readable").contains(text)),
            "the child ended without saying {text:?}"
        );
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `qemu-io` with the image open, waiting for commands.
fn qemu_io(path: &Path, read_only: bool) -> Reaped {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "parallels"]);
    if read_only {
        command.arg("-r");
    }
    let mut child = Reaped(
        command
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io starts"),
    );
    let stdin = child.0.stdin.as_mut().expect("piped");
    stdin.write_all(b"length\n").expect("qemu-io reads");
    stdin.flush().expect("qemu-io reads");
    child.wait_for("1 MiB");
    child
}

/// An image of QEMU's making. Its raw driver lets others write, so locks are
/// tested with this one.
fn qemu_image() -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().expect("temporary file");
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "parallels"])
        .arg(image.path())
        .arg("1M")
        .status()
        .expect("qemu-img runs");
    assert!(created.success());
    image
}

/// `qemu-img info`, with extra arguments.
fn qemu_img(path: &Path, arguments: &[&str]) -> std::process::Output {
    Command::new("qemu-img")
        .args(["info", "-f", "parallels"])
        .args(arguments)
        .arg(path)
        .output()
        .expect("qemu-img runs")
}

#[test]
fn qemu_refuses_what_we_write_and_reads_what_we_read() {
    if !have_qemu() {
        return;
    }
    let image = qemu_image();
    let writer = lock(image.path(), LockMode::ReadWrite).expect("free");
    let refused = qemu_img(image.path(), &[]);
    assert!(!refused.status.success(), "{refused:?}");
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(message.contains("lock"), "{message}");
    let forced = qemu_img(image.path(), &["-U"]);
    assert!(forced.status.success(), "{forced:?}");
    drop(writer);

    let reader = lock(image.path(), LockMode::ReadOnly).expect("free");
    let shared = qemu_img(image.path(), &[]);
    assert!(shared.status.success(), "{shared:?}");
    let write = Command::new("qemu-io")
        .args(["-f", "parallels", "-c", "write 0 4096"])
        .arg(image.path())
        .output()
        .expect("qemu-io runs");
    assert!(!write.status.success(), "{write:?}");
    drop(reader);

    let alone = lock(image.path(), LockMode::Exclusive).expect("free");
    let refused = qemu_img(image.path(), &[]);
    assert!(!refused.status.success(), "{refused:?}");
    drop(alone);
    assert!(qemu_img(image.path(), &[]).status.success());
}

#[test]
fn we_refuse_what_qemu_writes_and_read_what_qemu_reads() {
    if !have_qemu() {
        return;
    }
    let image = qemu_image();
    let writer = qemu_io(image.path(), false);
    for mode in [LockMode::ReadOnly, LockMode::ReadWrite, LockMode::Exclusive] {
        match lock(image.path(), mode) {
            Err(LockError::Writer(_)) => {}
            other => panic!("{mode:?}: {other:?}"),
        }
    }
    drop(writer);

    let reader = qemu_io(image.path(), true);
    lock(image.path(), LockMode::ReadOnly).expect("two readers");
    match lock(image.path(), LockMode::ReadWrite) {
        Err(LockError::NoWriters(_)) => {}
        other => panic!("{other:?}"),
    }
    drop(reader);
    lock(image.path(), LockMode::Exclusive).expect("free again");
}

/// Who says no more than that it reads, as other programs may.
#[test]
fn a_reader_that_denies_nothing_is_named_as_one() {
    let image = image();
    let reader = open(image.path());
    let byte = USED_BASE + i64::from(Permissions::CONSISTENT_READ);
    set(&reader, byte, 1, libc::F_RDLCK).expect("lock");
    let error = lock(image.path(), LockMode::Exclusive).expect_err("somebody reads it");
    assert!(matches!(error, LockError::Reader(_)), "{error}");
    lock(image.path(), LockMode::ReadWrite).expect("it may be written meanwhile");
}
