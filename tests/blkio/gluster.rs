//! A GlusterFS volume whose servers are away for a while. Its write-behind says that writes
//! are well all the same, and tells what became of them to whoever asks first. And one of
//! whose hosts one is cut off for longer than its locks last.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_user_ploop::storage::lock::{ImageLock, LockMode};

use crate::client::{Client, Lane};
use crate::common::{backend::Backend, img::ploop_img};
use crate::stable::{EIO, WAYS, flush, write};

const CLUSTER: u64 = 3;

/// How long a client of the volume may take to find its servers again.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of the helpers of `ci/gluster.sh`.
fn bed(helper: &str, argument: &[&str]) {
    let status = Command::new(helper).args(argument).status();
    assert!(status.unwrap().success(), "{helper} {argument:?}");
}

/// Waits until what is written in a folder becomes stable again.
fn wait_for_servers(folder: &Path) {
    let start = Instant::now();
    let path = folder.join("probe");
    let try_it = || {
        let mut file = File::create(&path)?;
        file.write_all(b"probe")?;
        file.sync_all()
    };
    while let Err(error) = try_it() {
        assert!(start.elapsed() < PATIENCE, "{error}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// The place of tests is one mount, `PLOOP_OTHER_MOUNT` the other.
#[test]
#[ignore = "needs a GlusterFS volume: run ci/gluster.sh"]
fn a_flush_tells_the_truth_of_what_was_written_while_the_servers_were_away() {
    let other = std::env::var_os("PLOOP_OTHER_MOUNT").expect("PLOOP_OTHER_MOUNT is set");
    for way in WAYS {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = folder.path().join("disk.hds");
        ploop_img([
            "create",
            image.to_str().unwrap(),
            "16M",
            "--cluster-size",
            "64K",
        ])
        .ok();
        let place = TempDir::new().unwrap();
        let mut options = way.to_vec();
        // The lock goes with the bricks.
        options.extend(["--on-lock-loss", "report"]);
        let backend = Backend::start(&image, &place.path().join("socket"), &options);
        let mut client = Client::connect(backend.socket(), 1);
        assert_eq!(write(&mut client.lanes[0], CLUSTER, 1), 0);
        assert_eq!(flush(&mut client.lanes[0]), 0);

        bed("bed_kill_brick", &["2"]);
        bed("bed_kill_brick", &["3"]);
        // Said to be well, unless the lock, which is gone with the bricks, is known to be lost.
        let written = write(&mut client.lanes[0], CLUSTER, 2);
        assert!([0, EIO].contains(&written), "{way:?}: {written}");
        // The thread that wrote it ends.
        drop(client);
        bed("bed_start_bricks", &[]);
        wait_for_servers(folder.path());

        let mut client = Client::connect(backend.socket(), 1);
        let flushed = flush(&mut client.lanes[0]) == 0;
        eprintln!("{way:?}: flushed: {flushed}");
        if flushed {
            let there = PathBuf::from(&other)
                .join(folder.path().file_name().unwrap())
                .join("disk.hds");
            let bytes = fs::read(there).unwrap();
            let written = bytes.chunks(4096).any(|block| block == [2; 4096]);
            assert!(written, "{way:?}");
        }
        drop(client);
        match flushed {
            true => backend.stop(),
            false => drop(backend.stop_with_failure()),
        }
    }
}

/// Mapped by the first host, and written by the second.
const CLUSTERS: [u64; 3] = [3, 4, 5];

/// Writes and flushes one after the other as long as that is to be gone on with, or until one
/// gets no answer; what they ended with.
fn write_while(lane: &mut Lane, mut goes_on: impl FnMut() -> bool) -> Vec<i32> {
    let mut results = Vec::new();
    while goes_on() {
        for cluster in CLUSTERS {
            lane.write(cluster * (64 << 10), &[9; 4096], 0);
            lane.flush(1);
            let mut left = 2;
            while left > 0 {
                let Some(ended) = lane.wait_for(1, PATIENCE) else {
                    return results;
                };
                left -= ended.len();
                results.extend(ended.into_iter().map(|(_, result)| result));
            }
        }
    }
    results
}

/// Waits until the server would give a lock on the image to this host.
fn wait_for_lock(image: &Path) {
    let start = Instant::now();
    loop {
        let file = File::options().read(true).write(true).open(image);
        let lock = ImageLock::acquire(&file.unwrap(), LockMode::ReadWrite);
        match lock {
            Ok(_) => return,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// The link of one host is cut under load, the other one is let in, writes and flushes, and
/// the link comes back. Each way of I/O is a test of its own: Ceph lets a host that it has
/// fenced come back with another mount only.
fn host_that_comes_back(way: [&str; 4], policy: &str) {
    let other = std::env::var_os("PLOOP_OTHER_MOUNT").expect("PLOOP_OTHER_MOUNT is set");
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = folder.path().join("disk.hds");
    let create = [
        "create",
        image.to_str().unwrap(),
        "16M",
        "--cluster-size",
        "64K",
    ];
    ploop_img(create).ok();
    let place = TempDir::new().unwrap();
    let mut options = way.to_vec();
    options.extend(["--on-lock-loss", policy]);
    let first = Backend::start(&image, &place.path().join("first"), &options);
    let mut client = Client::connect(first.socket(), 1);
    let lane = &mut client.lanes[0];
    let is_over = AtomicBool::new(false);
    let results = thread::scope(|scope| {
        let load = scope.spawn(|| write_while(lane, || !is_over.load(Relaxed)));
        thread::sleep(Duration::from_secs(2));
        bed("bed_cut", &[]);
        let there = PathBuf::from(&other)
            .join(folder.path().file_name().unwrap())
            .join("disk.hds");
        wait_for_lock(&there);
        let second = Backend::start(&there, &place.path().join("second"), &way);
        let mut client = Client::connect(second.socket(), 1);
        for cluster in CLUSTERS {
            assert_eq!(write(&mut client.lanes[0], cluster, 5), 0);
        }
        assert_eq!(flush(&mut client.lanes[0]), 0);
        bed("bed_mend", &[]);
        first.expect_to_say("THE LOCK ON THE IMAGE IS LOST");
        // Long enough for the client of the volume to find its servers again.
        thread::sleep(Duration::from_secs(10));
        is_over.store(true, Relaxed);
        for cluster in CLUSTERS {
            let lane = &mut client.lanes[0];
            lane.read(cluster * (64 << 10), 4096, 0);
            assert_eq!(lane.wait(1), [(0, 0)]);
            assert!(lane.bytes(0, 4096) == [5; 4096], "{way:?}: {}", first.log());
        }
        drop(client);
        second.stop();
        let bytes = fs::read(&there).unwrap();
        assert!(
            !bytes.chunks(4096).any(|block| block == [9; 4096]),
            "{way:?}"
        );
        load.join().unwrap()
    });
    let failed = results.iter().filter(|result| **result != 0).count();
    eprintln!("{way:?}: {} requests, {failed} failed", results.len());
    assert!(results.iter().filter(|result| **result == 0).count() > 4);
    assert_eq!(failed > 0, policy == "report");
    drop(client);
    first.stop_with_failure();
}

#[test]
#[ignore = "needs a volume: run ci/gluster.sh or ci/ceph.sh"]
fn a_host_that_comes_back_writes_nothing_over_what_the_next_one_has_flushed() {
    host_that_comes_back(WAYS[0], "stop");
}

#[test]
#[ignore = "needs a volume: run ci/gluster.sh or ci/ceph.sh"]
fn a_host_that_comes_back_with_plain_calls_writes_nothing_over_it_either() {
    host_that_comes_back(WAYS[2], "report");
}

#[test]
#[ignore = "needs a volume: run ci/gluster.sh or ci/ceph.sh"]
fn a_host_that_comes_back_with_the_page_cache_writes_nothing_over_it_either() {
    host_that_comes_back(WAYS[1], "report");
}

/// A new image on the first mount; the second path is the same on the other one.
fn image_on_both(folder: &TempDir) -> (PathBuf, PathBuf) {
    let other = std::env::var_os("PLOOP_OTHER_MOUNT").expect("PLOOP_OTHER_MOUNT is set");
    let image = folder.path().join("disk.hds");
    let path = image.to_str().unwrap();
    ploop_img(["create", path, "16M", "--cluster-size", "64K"]).ok();
    let there = PathBuf::from(other)
        .join(folder.path().file_name().unwrap())
        .join("disk.hds");
    (image, there)
}

const LOST: &str = "THE LOCK ON THE IMAGE IS LOST";

#[test]
#[ignore = "needs a GlusterFS volume: run ci/gluster.sh"]
fn another_host_is_refused_until_the_process_that_has_the_image_was_killed() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, there) = image_on_both(&folder);
    let place = TempDir::new().unwrap();
    let first = Backend::start(&image, &place.path().join("first"), &WAYS[0]);
    let mut client = Client::connect(first.socket(), 1);
    assert_eq!(write(&mut client.lanes[0], CLUSTER, 1), 0);
    assert_eq!(flush(&mut client.lanes[0]), 0);
    let start = Instant::now();
    let why = Backend::refuses(&there, &place.path().join("second"), &WAYS[0]);
    eprintln!("refused in {:?}", start.elapsed());
    assert!(why.contains("has the image open for writing"), "{why}");
    first.kill();
    let start = Instant::now();
    wait_for_lock(&there);
    eprintln!("unlocked in {:?}", start.elapsed());
    let second = Backend::start(&there, &place.path().join("second"), &WAYS[0]);
    let mut client = Client::connect(second.socket(), 1);
    let lane = &mut client.lanes[0];
    lane.read(CLUSTER * (64 << 10), 4096, 0);
    assert_eq!(lane.wait(1), [(0, 0)]);
    assert!(lane.bytes(0, 4096) == [1; 4096]);
    drop(client);
    second.stop();
}

/// Each server forgets the locks when it is started anew; nobody else takes them.
#[test]
#[ignore = "needs a GlusterFS volume: run ci/gluster.sh"]
fn servers_that_are_started_anew_one_after_the_other_cost_nobody_the_lock() {
    for way in [WAYS[0], WAYS[2]] {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (image, there) = image_on_both(&folder);
        let place = TempDir::new().unwrap();
        let backend = Backend::start(&image, &place.path().join("first"), &way);
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        let is_over = AtomicBool::new(false);
        let results = thread::scope(|scope| {
            let load = scope.spawn(|| write_while(lane, || !is_over.load(Relaxed)));
            for brick in ["1", "2", "3"] {
                thread::sleep(Duration::from_secs(3));
                bed("bed_kill_brick", &[brick]);
                thread::sleep(Duration::from_secs(3));
                bed("bed_start_bricks", &[]);
                wait_for_servers(folder.path());
                // Until what it has missed was written to it: the next one goes then.
                bed("bed_heal", &[]);
            }
            thread::sleep(Duration::from_secs(3));
            let why = Backend::refuses(&there, &place.path().join("second"), &way);
            assert!(why.contains("has the image open for writing"), "{why}");
            is_over.store(true, Relaxed);
            load.join().unwrap()
        });
        let log = backend.log();
        assert!(!log.contains(LOST), "{log}");
        let failed = results.iter().filter(|result| **result != 0).count();
        eprintln!("{way:?}: {} requests, {failed} failed", results.len());
        assert_eq!(failed, 0, "{log}");
        drop(client);
        backend.stop();
    }
}

/// Two of three servers are away while nothing is under way, and what comes waits for them.
#[test]
#[ignore = "needs a GlusterFS volume: run ci/gluster.sh"]
fn a_guest_that_has_waited_for_the_servers_goes_on() {
    for way in [WAYS[0], WAYS[2]] {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (image, _) = image_on_both(&folder);
        let place = TempDir::new().unwrap();
        let backend = Backend::start(&image, &place.path().join("first"), &way);
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        assert_eq!(write(lane, CLUSTER, 1), 0);
        assert_eq!(flush(lane), 0);
        bed("bed_kill_brick", &["2"]);
        bed("bed_kill_brick", &["3"]);
        backend.expect_to_say("requests wait until that is known");
        lane.write(CLUSTER * (64 << 10), &[2; 4096], 0);
        assert_eq!(lane.wait_for(1, Duration::from_secs(5)), None);
        bed("bed_start_bricks", &[]);
        let start = Instant::now();
        assert_eq!(lane.wait(1), [(0, 0)], "{}", backend.log());
        eprintln!("{way:?}: went on after {:?}", start.elapsed());
        assert_eq!(flush(lane), 0);
        lane.read(CLUSTER * (64 << 10), 4096, 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        assert!(lane.bytes(0, 4096) == [2; 4096]);
        drop(client);
        assert!(!backend.log().contains(LOST), "{}", backend.log());
        backend.stop();
        wait_for_servers(folder.path());
        bed("bed_heal", &[]);
    }
}

/// The other host had the image, and has closed it, when the first one comes back.
#[test]
#[ignore = "needs a GlusterFS volume: run ci/gluster.sh"]
fn a_host_that_comes_back_finds_that_another_one_has_come_and_gone() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, there) = image_on_both(&folder);
    let place = TempDir::new().unwrap();
    for is_killed in [false, true] {
        let first = Backend::start(&image, &place.path().join("first"), &WAYS[0]);
        let mut client = Client::connect(first.socket(), 1);
        assert_eq!(write(&mut client.lanes[0], CLUSTER, 1), 0);
        assert_eq!(flush(&mut client.lanes[0]), 0);
        bed("bed_cut", &[]);
        wait_for_lock(&there);
        let second = Backend::start(&there, &place.path().join("second"), &WAYS[0]);
        let mut other = Client::connect(second.socket(), 1);
        assert_eq!(write(&mut other.lanes[0], CLUSTER, 5), 0);
        assert_eq!(flush(&mut other.lanes[0]), 0);
        match is_killed {
            true => second.kill(),
            false => {
                drop(other);
                second.stop();
            }
        }
        wait_for_lock(&there);
        bed("bed_mend", &[]);
        first.expect_to_say(LOST);
        client.lanes[0].write(CLUSTER * (64 << 10), &[9; 4096], 0);
        let waited = client.lanes[0].wait_for(1, Duration::from_secs(5));
        assert_eq!(waited, None, "{}", first.log());
        // Nor is it kept from others, though the process is still there.
        wait_for_lock(&there);
        assert!(
            !fs::read(&there)
                .unwrap()
                .chunks(4096)
                .any(|block| block == [9; 4096])
        );
        drop(client);
        first.stop_with_failure();
        wait_for_servers(folder.path());
    }
}
