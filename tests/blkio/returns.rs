//! The storage of an image goes and comes back. The guest that has waited goes on, by itself, with
//! a process that is started when the one before has ended: here the test is what starts it.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::{backend::Backend, img::ploop_img, qmp::Qmp};
use crate::frail_fs::Loss;
use crate::front_end::*;
use crate::stable::{Disk, IMAGE, WAYS};
use crate::survivor::{Region, begin, expect, reconnect, write};

pub const OK: u8 = 0;
const IOERR: u8 = 1;

/// Sectors.
const MAPPED: u64 = 3 * 128;
const UNMAPPED: u64 = 7 * 128;

const PATIENCE: Duration = Duration::from_secs(60);

/// Long enough for several looks.
const A_WHILE: Duration = Duration::from_secs(4);

const LOST: &str = "THE LOCK ON THE IMAGE IS LOST";

/// Where a daemon serves an image again and again, with the same options.
pub struct Place {
    folder: TempDir,
    image: PathBuf,
    options: Vec<String>,
}

impl Place {
    pub fn new(image: &Path, options: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let control = format!("--control={}", folder.path().join("control").display());
        let options = options.iter().map(|&option| option.to_owned());
        Self {
            options: options.chain([control]).collect(),
            image: image.to_owned(),
            folder,
        }
    }

    pub fn serve(&self) -> Backend {
        Backend::start(
            &self.image,
            &self.folder.path().join("socket"),
            &self.options,
        )
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.folder.path().join("control"))
    }
}

/// A disk whose opening can have a name, without which no guest can go on.
fn named_disk() -> Option<Disk> {
    Disk::new().inspect(|disk| disk.fs.keep_attributes())
}

pub fn flush(front_end: &mut FrontEnd) -> u8 {
    front_end.rings[0].run(VIRTIO_BLK_T_FLUSH, 0, &[]).0
}

/// A write that nobody waits for yet.
pub fn begin_write(front_end: &mut FrontEnd, sector: u64, byte: u8) -> u16 {
    let data = DATA + 0x1000;
    front_end.fill(data, &[byte; 512]);
    let head = front_end.rings[0].request(VIRTIO_BLK_T_OUT, sector, &[readable(data, 512)]);
    front_end.rings[0].kick();
    head
}

fn expect_no_answer(front_end: &mut FrontEnd, backend: &Backend) {
    thread::sleep(A_WHILE);
    assert_eq!(front_end.rings[0].take_used(), None, "{}", backend.log());
}

/// What was under way has its answer.
pub fn expect_end_of(front_end: &mut FrontEnd, head: u16) {
    let used = front_end.rings[0].wait_used();
    assert_eq!((used.0, front_end.rings[0].status(head)), (head, OK));
}

/// Another process is started, and the front-end connects to it.
pub fn go_on(front_end: &mut FrontEnd, place: &Place, region: &Region) -> Backend {
    let backend = place.serve();
    reconnect(front_end, &backend, Some(region));
    front_end.start_rings();
    backend
}

/// Whether the first ring may not go on.
fn is_refused(front_end: &mut FrontEnd) -> bool {
    let base = front_end.rings[0].avail_idx();
    let started = front_end.try_start_ring_at(0, base);
    started
        .and_then(|()| front_end.vhost.set_vring_enable(0, true))
        .is_err()
}

/// For how long the image is locked.
const LOCKS: [&str; 2] = ["--lock=start", "--lock=running"];

#[test]
fn a_guest_goes_on_when_the_file_system_is_mounted_anew() {
    for (way, lock) in [WAYS[0], WAYS[3]].iter().zip(LOCKS) {
        let Some(mut disk) = named_disk() else {
            return;
        };
        eprintln!("{way:?}, {lock}");
        let place = Place::new(&disk.fs.path(IMAGE), &[&way[..], &[lock]].concat());
        let backend = place.serve();
        let (mut front_end, region) = begin(&backend);
        let mut qmp = place.qmp();
        write(&mut front_end, MAPPED, 1);
        assert_eq!(flush(&mut front_end), OK);

        // Under way when the program dies: one that it has taken, and one that it has not.
        disk.fs.stall();
        let target = [writable(DATA + 0x2000, 512)];
        let read = front_end.rings[0].request(VIRTIO_BLK_T_IN, MAPPED, &target);
        front_end.rings[0].kick();
        thread::sleep(Duration::from_millis(100));
        let head = begin_write(&mut front_end, MAPPED + 1, 2);
        thread::sleep(Duration::from_millis(100));
        disk.fs.kill();
        backend.expect_to_say("the lock on the image may be lost");
        expect_no_answer(&mut front_end, &backend);
        assert!(!backend.log().contains(LOST), "{}", backend.log());
        let start = Instant::now();
        disk.fs.mount_again();
        assert_eq!(qmp.event("LOCK_LOST")["action"], "stop");
        assert!(
            qmp.event("STORAGE_BACK")["file"]
                .as_str()
                .unwrap()
                .ends_with(IMAGE)
        );
        let log = backend.ends_to_be_started_anew();
        assert!(start.elapsed() < PATIENCE);
        assert!(log.contains("its file system was mounted anew"), "{log}");
        assert!(log.contains("a new process has to open it"), "{log}");

        let backend = go_on(&mut front_end, &place, &region);
        let ended = [0; 2].map(|_| front_end.rings[0].wait_used().0);
        assert!(ended == [read, head] || ended == [head, read], "{ended:?}");
        let status = [read, head].map(|head| front_end.rings[0].status(head));
        assert_eq!(status, [OK; 2]);
        assert!(front_end.bytes(DATA + 0x2000, 512) == [1; 512]);
        expect(&mut front_end, MAPPED + 1, 2);
        write(&mut front_end, UNMAPPED, 3);
        assert_eq!(flush(&mut front_end), OK);
        drop(front_end);
        backend.stop();
        assert!(!disk.is_marked());
        ploop_img(["check", disk.fs.path(IMAGE).to_str().unwrap()]).ok();
    }
}

/// Nobody knows what a program that has died had of that.
#[test]
fn what_a_guest_was_told_and_had_not_flushed_counts_as_lost() {
    let Some(mut disk) = named_disk() else {
        return;
    };
    let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
    let backend = place.serve();
    let (mut front_end, region) = begin(&backend);
    write(&mut front_end, MAPPED, 1);
    disk.fs.kill();
    backend.expect_to_say("the lock on the image may be lost");
    disk.fs.mount_again();
    backend.ends_to_be_started_anew();
    let backend = go_on(&mut front_end, &place, &region);
    expect(&mut front_end, MAPPED, 1);
    assert_eq!(flush(&mut front_end), IOERR);
    drop(front_end);
    backend.stop_with_failure();
}

/// Before anybody knows whether the lock is lost.
#[test]
fn what_a_guest_had_not_flushed_counts_as_lost_though_its_process_ends_in_doubt() {
    for (is_flushed, is_killed) in [(false, true), (false, false), (true, true)] {
        let Some(mut disk) = named_disk() else {
            return;
        };
        eprintln!("flushed: {is_flushed}, killed: {is_killed}");
        let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
        let backend = place.serve();
        let (mut front_end, region) = begin(&backend);
        write(&mut front_end, MAPPED, 1);
        if is_flushed {
            assert_eq!(flush(&mut front_end), OK);
        }
        disk.fs.kill();
        backend.expect_to_say("the lock on the image may be lost");
        match is_killed {
            true => backend.kill(),
            false => drop(backend.stop_with_failure()),
        }
        disk.fs.mount_again();
        let backend = go_on(&mut front_end, &place, &region);
        expect(&mut front_end, MAPPED, 1);
        write(&mut front_end, MAPPED + 1, 2);
        let expected = if is_flushed { OK } else { IOERR };
        assert_eq!(flush(&mut front_end), expected, "{}", backend.log());
        drop(front_end);
        match is_flushed {
            true => backend.stop(),
            false => drop(backend.stop_with_failure()),
        }
    }
}

/// The one who was told of it is gone, and what comes next succeeds.
#[test]
fn a_sync_that_fails_is_not_forgotten_with_a_process_that_is_killed_in_doubt() {
    for way in WAYS {
        let Some(disk) = named_disk() else {
            return;
        };
        eprintln!("{way:?}");
        let place = Place::new(&disk.fs.path(IMAGE), &way);
        let backend = place.serve();
        let (mut front_end, region) = begin(&backend);
        write(&mut front_end, MAPPED, 1);
        disk.fs.fail_syncs(1);
        disk.fs.hold_looks();
        let head = front_end.rings[0].request(VIRTIO_BLK_T_FLUSH, 0, &[]);
        front_end.rings[0].kick();
        backend.expect_to_say("requests wait until it does");
        assert_eq!(front_end.rings[0].take_used(), None);
        let corpse = backend.kill_without_waiting();
        disk.fs.let_looks_go();
        drop(corpse);
        assert_eq!(disk.fs.syncs_to_fail(), 0);
        let backend = go_on(&mut front_end, &place, &region);
        let used = front_end.rings[0].wait_used();
        let status = front_end.rings[0].status(head);
        assert_eq!((used.0, status), (head, IOERR), "{}", backend.log());
        drop(front_end);
        backend.stop_with_failure();
    }
}

/// What was withheld until then may not have been told yet, also if the next look begins at once.
#[test]
fn a_doubt_counts_for_who_is_killed_right_after_a_slow_look_has_ended_it() {
    // Where the machine is busy, the kill comes too late now and then.
    for is_last in [false, false, false, true] {
        let Some(disk) = named_disk() else {
            return;
        };
        let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
        let backend = place.serve();
        let (mut front_end, region) = begin(&backend);
        write(&mut front_end, MAPPED, 1);
        disk.fs.delay_looks(Duration::from_millis(2200));
        backend.expect_to_say("requests go on");
        // Without the second the next look has begun long since.
        thread::sleep(Duration::from_millis(100));
        let age = age_of(&backend.log(), "requests go on");
        let corpse = backend.kill_without_waiting();
        let was_in_time = age_of(&corpse.log(), "requests go on") < Duration::from_millis(900);
        disk.fs.delay_looks(Duration::ZERO);
        drop(corpse);
        let backend = go_on(&mut front_end, &place, &region);
        expect(&mut front_end, MAPPED, 1);
        let flushed = flush(&mut front_end);
        drop(front_end);
        if was_in_time {
            assert_eq!(flushed, IOERR, "{age:?}: {}", backend.log());
            backend.stop_with_failure();
            return;
        }
        assert!(!is_last, "it was never killed in time: {age:?}");
        backend.kill();
    }
}

/// How long ago a line with this was written.
fn age_of(log: &str, what: &str) -> Duration {
    let line = log.lines().rfind(|line| line.contains(what));
    let time = line.and_then(|line| line.strip_prefix('[')?.split_once(' '));
    let (time, _) = time.expect("a line begins with its time");
    let written: jiff::Timestamp = time.parse().expect("it is a time");
    let age = jiff::Timestamp::now().duration_since(written);
    age.try_into().unwrap_or_default()
}

/// A doubt that has passed is not held against whoever comes next.
#[test]
fn a_guest_goes_on_after_a_doubt_that_has_passed() {
    let Some(disk) = named_disk() else {
        return;
    };
    let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
    let backend = place.serve();
    let (mut front_end, region) = begin(&backend);
    write(&mut front_end, MAPPED, 1);
    disk.fs.fail_looks(2);
    backend.expect_to_say("requests go on");
    thread::sleep(A_WHILE);
    backend.kill();
    let backend = go_on(&mut front_end, &place, &region);
    expect(&mut front_end, MAPPED, 1);
    assert_eq!(flush(&mut front_end), OK);
    drop(front_end);
    backend.stop();
}

/// A process may open no more than the files of the mount that there was at its start, also one
/// that opens them only when a ring is to run.
#[test]
fn an_image_that_nobody_has_open_is_served_when_its_file_system_is_mounted_anew() {
    let Some(mut disk) = named_disk() else {
        return;
    };
    let place = Place::new(
        &disk.fs.path(IMAGE),
        &[&WAYS[0][..], &["--lock=running"]].concat(),
    );
    let backend = place.serve();
    let (mut front_end, region) = begin(&backend);
    write(&mut front_end, MAPPED, 1);
    for index in 0..front_end.rings.len() {
        front_end.vhost.get_vring_base(index).unwrap();
    }
    disk.fs.kill();
    // There is nothing to be opened yet.
    assert!(is_refused(&mut front_end));
    reconnect(&mut front_end, &backend, Some(&region));
    disk.fs.mount_again();
    assert!(is_refused(&mut front_end));
    backend.ends_to_be_started_anew();
    let backend = go_on(&mut front_end, &place, &region);
    expect(&mut front_end, MAPPED, 1);
    assert_eq!(flush(&mut front_end), OK);
    drop(front_end);
    backend.stop();
}

/// As servers do that are started anew.
#[test]
fn locks_that_a_server_has_forgotten_and_given_to_nobody_are_taken_once_more() {
    let Some(disk) = named_disk() else {
        return;
    };
    let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
    let backend = place.serve();
    let mut front_end = begin(&backend).0;
    write(&mut front_end, MAPPED, 1);
    disk.fs.take_locks(Loss::Silent);
    backend.expect_to_say("it was taken once more");
    write(&mut front_end, UNMAPPED, 2);
    assert_eq!(flush(&mut front_end), OK);
    assert_eq!(place.qmp().ask("query-engine", json!({}))["lock"], "held");
    drop(front_end);
    backend.stop();
}

/// Waits until the lock is asked for that is given only later.
fn hold_next_lock(disk: &Disk, backend: &Backend) {
    disk.fs.hold_next_lock();
    let start = Instant::now();
    while !disk.fs.holds_lock() {
        assert!(start.elapsed() < PATIENCE, "{}", backend.log());
        thread::sleep(Duration::from_millis(10));
    }
}

/// That the lock is seen says nothing if who looks has taken it once more.
#[test]
fn a_lock_that_was_taken_again_too_late_does_not_show_that_nobody_else_has_had_it() {
    for is_asked_late in [false, true] {
        let Some(disk) = named_disk() else {
            return;
        };
        eprintln!("asked late: {is_asked_late}");
        let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
        let backend = place.serve();
        let mut front_end = begin(&backend).0;
        write(&mut front_end, MAPPED, 1);
        assert_eq!(flush(&mut front_end), OK);
        match is_asked_late {
            true => disk.fs.hold_looks(),
            false => {
                hold_next_lock(&disk, &backend);
            }
        }
        backend.expect_to_say("requests wait until it does");
        disk.fs.take_locks(Loss::Silent);
        let other = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
        let second = other.serve();
        let mut guest = begin(&second).0;
        write(&mut guest, MAPPED, 5);
        begin_write(&mut front_end, MAPPED, 9);
        // What it takes it cannot give back either.
        disk.fs.refuse_unlocks();
        match is_asked_late {
            true => disk.fs.let_looks_go(),
            false => disk.fs.let_lock_go(),
        }
        expect_no_answer(&mut front_end, &backend);
        backend.expect_to_say(LOST);
        expect(&mut guest, MAPPED, 5);
        drop((guest, front_end));
        backend.stop_after_loss();
        second.kill();
        let left = disk.fs.read(IMAGE);
        assert!(!left.chunks(512).any(|sector| sector == [9; 512]));
    }
}

/// The clock of a machine can stand still while other hosts go on.
#[test]
fn a_lock_that_was_taken_again_in_time_does_not_count_if_the_image_was_opened_meanwhile() {
    let Some(disk) = named_disk() else {
        return;
    };
    let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
    let backend = place.serve();
    let mut front_end = begin(&backend).0;
    write(&mut front_end, MAPPED, 1);
    hold_next_lock(&disk, &backend);
    disk.fs.take_locks(Loss::Silent);
    let opening = 7_u64.to_le_bytes();
    let none = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(disk.fs.path(IMAGE), "user.ploop.opening", &opening, none).unwrap();
    disk.fs.let_lock_go();
    backend.expect_to_say(LOST);
    drop(front_end);
    backend.stop_after_loss();
}

/// I/O by what had the lock fails for good, and the files can be opened anew where they are.
#[test]
fn a_guest_goes_on_when_its_lock_was_taken_away_and_nobody_else_came() {
    for loss in [Loss::Strict, Loss::Denied] {
        let Some(disk) = named_disk() else {
            return;
        };
        eprintln!("{loss:?}");
        let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
        let backend = place.serve();
        let (mut front_end, region) = begin(&backend);
        write(&mut front_end, MAPPED, 1);
        assert_eq!(flush(&mut front_end), OK);
        disk.fs.take_locks(loss);
        backend.expect_to_say("the lock on the image may be lost");
        let head = begin_write(&mut front_end, UNMAPPED, 2);
        backend.ends_to_be_started_anew();
        let backend = go_on(&mut front_end, &place, &region);
        expect_end_of(&mut front_end, head);
        expect(&mut front_end, MAPPED, 1);
        expect(&mut front_end, UNMAPPED, 2);
        assert_eq!(flush(&mut front_end), OK);
        drop(front_end);
        backend.stop();
    }
}

/// As long as another host has the image, nothing is to be had by a new process. Then it is, and
/// that one sees whose image it was.
#[test]
fn a_guest_whose_image_another_host_has_had_is_refused() {
    for loss in [Loss::Strict, Loss::Denied] {
        let Some(disk) = named_disk() else {
            return;
        };
        eprintln!("{loss:?}");
        let place = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
        let mut backend = place.serve();
        let (mut front_end, region) = begin(&backend);
        write(&mut front_end, MAPPED, 1);
        assert_eq!(flush(&mut front_end), OK);
        disk.fs.take_locks(loss);
        let other = Place::new(&disk.fs.path(IMAGE), &WAYS[0]);
        let second = other.serve();
        backend.expect_to_say(LOST);
        backend.expect_to_say("has the image open for writing");
        let mut guest = begin(&second).0;
        write(&mut guest, MAPPED, 5);
        begin_write(&mut front_end, MAPPED, 9);
        expect_no_answer(&mut front_end, &backend);
        assert_eq!(place.qmp().ask("query-engine", json!({}))["lock"], "lost");
        drop(guest);
        second.stop();
        backend.ends_to_be_started_anew();

        backend = place.serve();
        reconnect(&mut front_end, &backend, Some(&region));
        assert!(is_refused(&mut front_end));
        backend.stop();
        let left = disk.fs.read(IMAGE);
        assert!(left.chunks(512).any(|sector| sector == [5; 512]));
        assert!(!left.chunks(512).any(|sector| sector == [9; 512]));
    }
}
