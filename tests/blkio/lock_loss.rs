//! A server that takes the locks on the image away, as servers do from a host that they have
//! not heard of for a while, and lets another daemon in. The first one must not write over
//! what that one has flushed, whatever it notices, and whichever way its I/O goes.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::client::{Client, Lane};
use crate::common::backend::Backend;
use crate::common::img::ploop_img;
use crate::common::qmp::Qmp;
use crate::frail_fs::Loss;
use crate::stable::{Disk, EIO, IMAGE, WAYS, flush, write};

const LOST: &str = "THE LOCK ON THE IMAGE IS LOST";

/// Mapped on disk before anything goes wrong.
const MAPPED: u64 = 3;
/// Not mapped then, or not on disk.
const UNMAPPED: [u64; 2] = [7, 9];

const PATIENCE: Duration = Duration::from_secs(60);

/// Long enough for several looks.
const A_WHILE: Duration = Duration::from_secs(4);

/// A daemon that has mapped a cluster and flushed, and its two queues.
struct Host {
    backend: Backend,
    client: Client,
    qmp: Qmp,
    place: TempDir,
}

impl Host {
    fn start(disk: &Disk, options: &[&str]) -> Self {
        let place = TempDir::new().unwrap();
        let control = place.path().join("control");
        let mut all = vec!["--control", control.to_str().unwrap()];
        all.extend(options);
        let backend = Backend::start(&disk.fs.path(IMAGE), &place.path().join("socket"), &all);
        Self {
            client: Client::connect(backend.socket(), 2),
            qmp: Qmp::connect(&control),
            backend,
            place,
        }
    }

    fn lock(&mut self) -> String {
        let engine = self.qmp.ask("query-engine", json!({}));
        engine["lock"].as_str().unwrap().to_owned()
    }
}

fn begin_write(lane: &mut Lane, cluster: u64, byte: u8, tag: usize) {
    lane.write(cluster * (64 << 10), &[byte; 4096], tag);
}

fn read(lane: &mut Lane, cluster: u64) -> Vec<u8> {
    lane.read(cluster * (64 << 10), 4096, 0);
    assert_eq!(lane.wait(1), [(0, 0)]);
    lane.bytes(0, 4096)
}

/// Does it for each kind of loss and two ways of I/O, if there is FUSE.
fn for_each_loss(test: impl Fn(&Disk, Loss, &[&str])) {
    for loss in Loss::ALL {
        for way in [WAYS[0], WAYS[3]] {
            let Some(disk) = Disk::new() else {
                return;
            };
            eprintln!("{loss:?}, {way:?}");
            test(&disk, loss, &way);
        }
    }
}

/// The lock goes, another daemon writes and flushes, and the first one goes on.
fn lose_to_another(disk: &Disk, loss: Loss, way: &[&str], policy: &str) {
    let mut options = way.to_vec();
    options.extend(["--on-lock-loss", policy]);
    let mut first = Host::start(disk, &options);
    for byte in [1, 2] {
        assert_eq!(write(&mut first.client.lanes[0], MAPPED, byte), 0);
        assert_eq!(flush(&mut first.client.lanes[0]), 0);
    }
    assert_eq!(first.lock(), "held");
    // Its mapping is still to be written.
    assert_eq!(write(&mut first.client.lanes[0], UNMAPPED[0], 2), 0);

    disk.fs.take_locks(loss);
    first.backend.expect_to_say(LOST);
    let event = first.qmp.event("LOCK_LOST");
    assert_eq!(event["action"], policy);
    assert_eq!(first.lock(), "lost");
    let mut second = Host::start(disk, way);
    assert_eq!(write(&mut second.client.lanes[0], MAPPED, 5), 0);
    assert_eq!(write(&mut second.client.lanes[0], UNMAPPED[1], 6), 0);
    assert_eq!(flush(&mut second.client.lanes[0]), 0);

    let [one, other] = &mut first.client.lanes[..] else {
        panic!("two queues");
    };
    begin_write(one, MAPPED, 9, 0);
    begin_write(one, UNMAPPED[1], 9, 1);
    one.discard(UNMAPPED[0] * (64 << 10), 64 << 10, 2);
    other.flush(0);
    match policy {
        "stop" => {
            assert_eq!(one.wait_for(1, A_WHILE), None, "{}", first.backend.log());
            assert_eq!(other.wait_for(1, Duration::ZERO), None);
        }
        _ => {
            let mut ended = Vec::new();
            while ended.len() < 3 {
                ended.extend(one.wait(1));
            }
            assert!(ended.iter().all(|(_, result)| *result == EIO), "{ended:?}");
            assert_eq!(other.wait(1), [(0, EIO)]);
        }
    }
    assert_eq!(read(&mut second.client.lanes[0], MAPPED), [5; 4096]);
    assert_eq!(read(&mut second.client.lanes[0], UNMAPPED[1]), [6; 4096]);
    drop(second.client);
    second.backend.stop();

    let left = disk.fs.read(IMAGE);
    drop(first.client);
    // Nobody who was fenced can see that the storage is there again.
    let log = match policy == "stop" && loss != Loss::Fenced {
        true => first.backend.ends_to_be_started_anew(),
        false => first.backend.stop_with_failure(),
    };
    assert_eq!(log.matches(LOST).count(), 1, "{log}");
    assert!(disk.fs.read(IMAGE) == left, "the first one has written");
    assert!(!disk.is_marked());
    assert!(!left.chunks(4096).any(|block| block == [9; 4096]));
    drop((first.place, second.place));
}

#[test]
fn nothing_is_written_after_the_lock_was_taken_away_and_the_guest_waits() {
    for_each_loss(|disk, loss, way| lose_to_another(disk, loss, way, "stop"));
}

#[test]
fn nothing_is_written_after_the_lock_was_taken_away_and_the_guest_hears_of_it() {
    for_each_loss(|disk, loss, way| lose_to_another(disk, loss, way, "report"));
}

/// While it is not known whether the lock is there, nothing is begun; when it turns out to
/// be, everything goes on.
#[test]
fn requests_wait_as_long_as_the_server_does_not_say_whether_the_lock_is_there() {
    for way in WAYS {
        let Some(disk) = Disk::new() else {
            return;
        };
        let mut host = Host::start(&disk, &way);
        assert_eq!(write(&mut host.client.lanes[0], MAPPED, 1), 0);
        assert_eq!(flush(&mut host.client.lanes[0]), 0);
        disk.fs.hold_looks();
        host.backend.expect_to_say("requests wait until it does");
        assert_eq!(host.lock(), "in-doubt");
        disk.fs.take_events(IMAGE);
        begin_write(&mut host.client.lanes[0], MAPPED, 2, 0);
        begin_write(&mut host.client.lanes[1], UNMAPPED[0], 3, 0);
        for lane in &mut host.client.lanes {
            assert_eq!(lane.wait_for(1, Duration::from_secs(1)), None);
        }
        assert_eq!(disk.fs.take_events(IMAGE), []);
        disk.fs.let_looks_go();
        for lane in &mut host.client.lanes {
            assert_eq!(lane.wait(1), [(0, 0)]);
        }
        host.backend.expect_to_say("requests go on");
        assert_eq!(host.lock(), "held");
        assert_eq!(flush(&mut host.client.lanes[0]), 0);
        assert_eq!(read(&mut host.client.lanes[0], MAPPED), [2; 4096]);
        drop(host.client);
        host.backend.stop();
        drop(host.place);
        assert!(!disk.is_marked());
        // The rings of a process that has ended have them for a moment longer.
        let start = Instant::now();
        while disk.fs.locks() > 0 {
            assert!(start.elapsed() < PATIENCE, "{} locks", disk.fs.locks());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A storage that is slow is no storage that has given the lock to somebody else.
#[test]
fn requests_go_on_though_each_look_is_late() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let mut host = Host::start(&disk, &WAYS[0]);
    disk.fs.delay_looks(Duration::from_millis(2100));
    host.backend.expect_to_say("requests wait until it does");
    for byte in 1..4 {
        begin_write(&mut host.client.lanes[0], MAPPED, byte, 0);
        let ended = host.client.lanes[0].wait_for(1, Duration::from_secs(15));
        assert_eq!(ended, Some(vec![(0, 0)]), "{}", host.backend.log());
        thread::sleep(Duration::from_secs(2));
    }
    disk.fs.delay_looks(Duration::ZERO);
    assert_eq!(flush(&mut host.client.lanes[0]), 0);
    assert_eq!(read(&mut host.client.lanes[0], MAPPED), [3; 4096]);
    drop(host.client);
    host.backend.stop();
    drop(host.place);
}

/// Others had all that time.
#[test]
fn who_has_stood_still_begins_nothing_before_the_lock_was_found() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let mut host = Host::start(&disk, &WAYS[0]);
    assert_eq!(write(&mut host.client.lanes[0], MAPPED, 1), 0);
    host.backend.signal(Signal::STOP);
    thread::sleep(Duration::from_secs(6));
    host.backend.signal(Signal::CONT);
    host.backend.expect_to_say("has stood still");
    host.backend.expect_to_say("requests go on");
    assert_eq!(host.lock(), "held");
    assert_eq!(write(&mut host.client.lanes[0], MAPPED, 2), 0);
    assert_eq!(flush(&mut host.client.lanes[0]), 0);
    drop(host.client);
    host.backend.stop();
    drop(host.place);
}

/// Nobody looks after a lock until the image is open.
#[test]
fn an_image_whose_lock_goes_while_it_is_opened_is_not_served() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let place = TempDir::new().unwrap();
    disk.fs.hold_syncs();
    thread::scope(|scope| {
        let image = disk.fs.path(IMAGE);
        let refused = scope.spawn({
            let socket = place.path().join("socket");
            move || Backend::refuses(&image, &socket, &WAYS[0])
        });
        let start = Instant::now();
        while disk.fs.held_syncs() == 0 {
            assert!(start.elapsed() < PATIENCE, "no sync");
            thread::sleep(Duration::from_millis(10));
        }
        disk.fs.take_locks(Loss::Silent);
        let left = disk.fs.read(IMAGE);
        disk.fs.let_syncs_go();
        let log = refused.join().unwrap();
        assert!(disk.fs.read(IMAGE) == left, "it has written: {log}");
        assert!(
            log.contains("was taken away while the image was opened"),
            "{log}"
        );
    });
}

/// The table alone can take longer to read than a server waits.
#[test]
fn an_image_whose_lock_goes_while_it_is_read_is_not_written_to() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let place = TempDir::new().unwrap();
    disk.fs.hold_reads();
    thread::scope(|scope| {
        let image = disk.fs.path(IMAGE);
        let refused = scope.spawn({
            let socket = place.path().join("socket");
            move || Backend::refuses(&image, &socket, &WAYS[0])
        });
        let start = Instant::now();
        while disk.fs.held_reads() == 0 {
            assert!(start.elapsed() < PATIENCE, "no read");
            thread::sleep(Duration::from_millis(10));
        }
        disk.fs.take_locks(Loss::Silent);
        disk.fs.take_events(IMAGE);
        disk.fs.let_reads_go();
        let log = refused.join().unwrap();
        assert_eq!(disk.fs.take_events(IMAGE), [], "{log}");
        assert!(log.contains("has taken the lock away"), "{log}");
    });
    assert!(!disk.is_marked());
}

/// It watches no locks, and looks for its own before it says that all is well.
#[test]
fn a_command_whose_lock_goes_does_not_mark_the_image_as_closed() {
    let Some(disk) = Disk::new() else {
        return;
    };
    disk.fs.hold_syncs();
    thread::scope(|scope| {
        let image = disk.fs.path(IMAGE);
        let failed = scope.spawn(move || {
            let image = image.to_str().unwrap();
            ploop_img(["resize", image, "32M"]).fails()
        });
        let start = Instant::now();
        while disk.fs.held_syncs() == 0 {
            assert!(start.elapsed() < PATIENCE, "no sync");
            thread::sleep(Duration::from_millis(10));
        }
        disk.fs.take_locks(Loss::Silent);
        disk.fs.let_syncs_go();
        let why = failed.join().unwrap();
        assert!(why.contains("has taken the lock away"), "{why}");
    });
    assert!(disk.is_marked());
}

/// One answer that is an error is no proof that the lock has gone; many are.
#[test]
fn an_error_of_a_look_has_to_last_for_the_lock_to_be_lost() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let mut host = Host::start(&disk, &WAYS[0]);
    disk.fs.fail_looks(2);
    host.backend.expect_to_say("requests go on");
    assert_eq!(host.lock(), "held");
    assert_eq!(write(&mut host.client.lanes[0], MAPPED, 1), 0);
    assert_eq!(flush(&mut host.client.lanes[0]), 0);
    disk.fs.fail_looks(usize::MAX);
    host.backend.expect_to_say(LOST);
    begin_write(&mut host.client.lanes[0], MAPPED, 2, 0);
    assert_eq!(host.client.lanes[0].wait_for(1, A_WHILE), None);
    drop(host.client);
    host.backend.stop_with_failure();
    drop(host.place);
}

/// What is odd only since the server is back has not been so for long, however long that was away.
#[test]
fn an_error_has_to_last_also_after_the_way_to_the_server_was_lost() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let mut host = Host::start(&disk, &WAYS[0]);
    disk.fs.lose_the_way();
    host.backend
        .expect_to_say("the lock on the image may be lost");
    thread::sleep(A_WHILE);
    disk.fs.fail_looks(2);
    host.backend.expect_to_say("requests go on");
    assert_eq!(host.lock(), "held");
    assert_eq!(write(&mut host.client.lanes[0], MAPPED, 1), 0);
    assert_eq!(flush(&mut host.client.lanes[0]), 0);
    disk.fs.lose_the_way();
    thread::sleep(A_WHILE);
    assert_eq!(host.lock(), "in-doubt");
    disk.fs.fail_looks(usize::MAX);
    host.backend.expect_to_say(LOST);
    drop(host.client);
    host.backend.stop_with_failure();
    drop(host.place);
}

/// A lock that shows and cannot be taken again is not there on all servers, and what would be
/// written with it would not be either.
#[test]
fn a_lock_that_cannot_be_taken_again_is_lost_though_it_still_shows() {
    for way in [WAYS[0], WAYS[3]] {
        let Some(disk) = Disk::new() else {
            return;
        };
        let mut host = Host::start(&disk, &way);
        assert_eq!(write(&mut host.client.lanes[0], MAPPED, 1), 0);
        assert_eq!(flush(&mut host.client.lanes[0]), 0);
        disk.fs.refuse_locks_taken_again();
        host.backend
            .expect_to_say("the lock on the image may be lost");
        begin_write(&mut host.client.lanes[0], MAPPED, 2, 0);
        host.backend.expect_to_say(LOST);
        assert_eq!(host.client.lanes[0].wait_for(1, Duration::ZERO), None);
        drop(host.client);
        let log = host.backend.ends_to_be_started_anew();
        assert!(!log.contains("requests go on"), "{log}");
        let is_written = disk
            .fs
            .read(IMAGE)
            .chunks(4096)
            .any(|block| block == [2; 4096]);
        assert!(!is_written, "{log}");
        drop(host.place);
    }
}

/// Of an image that is open only while a ring runs, the locks come and go, and the watch on
/// them with them.
#[test]
fn locks_that_are_given_up_are_not_lost_and_those_that_are_taken_again_are_watched() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let options = [&WAYS[0][..], &["--lock=running"]].concat();
    let mut host = Host::start(&disk, &options);
    let let_go = |backend: &Backend, qmp: &mut Qmp| {
        let start = Instant::now();
        let mut engine = qmp.ask("query-engine", json!({}));
        while engine["image-open"] == true {
            assert!(start.elapsed() < PATIENCE, "{}", backend.log());
            thread::sleep(Duration::from_millis(10));
            engine = qmp.ask("query-engine", json!({}));
        }
        assert_eq!(engine["lock"], "unwatched");
    };
    for byte in 1..4 {
        assert_eq!(write(&mut host.client.lanes[0], MAPPED, byte), 0);
        assert_eq!(host.lock(), "held");
        // At different times of a look.
        thread::sleep(Duration::from_millis(300) * u32::from(byte));
        drop(host.client);
        host.backend.expect_to_say("has disconnected");
        let_go(&host.backend, &mut host.qmp);
        assert!(!disk.is_marked());
        thread::sleep(Duration::from_secs(2));
        host.client = Client::connect(host.backend.socket(), 2);
        assert_eq!(read(&mut host.client.lanes[0], MAPPED), [byte; 4096]);
    }
    assert!(!host.backend.log().contains(LOST), "{}", host.backend.log());

    disk.fs.take_locks(Loss::ALL[0]);
    host.backend.expect_to_say(LOST);
    drop(host.client);
    host.backend.expect_to_say("is let go as it is");
    let_go(&host.backend, &mut host.qmp);
    assert!(disk.is_marked());
    // Nobody else has opened it.
    host.client = Client::connect(host.backend.socket(), 2);
    assert_eq!(read(&mut host.client.lanes[0], MAPPED), [3; 4096]);
    assert_eq!(write(&mut host.client.lanes[0], UNMAPPED[0], 4), 0);
    assert_eq!(host.lock(), "held");
    drop(host.client);
    assert_eq!(host.backend.log().matches(LOST).count(), 1);
    host.backend.stop();
    drop(host.place);
    assert!(!disk.is_marked());
}

/// I/O fails as it does without the lock, and the lock is there.
#[test]
fn an_error_that_has_nothing_to_do_with_the_lock_is_passed_on() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let mut host = Host::start(&disk, &WAYS[0]);
    assert_eq!(write(&mut host.client.lanes[0], MAPPED, 1), 0);
    disk.fs.fail_syncs(1);
    assert_eq!(flush(&mut host.client.lanes[0]), EIO);
    assert_eq!(host.lock(), "held");
    assert_eq!(read(&mut host.client.lanes[0], MAPPED), [1; 4096]);
    drop(host.client);
    let log = host.backend.stop_with_failure();
    assert!(!log.contains(LOST), "{log}");
    drop(host.place);
}
