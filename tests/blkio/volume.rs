//! A storage of three servers that two hosts have mounted, GlusterFS or CephFS: one of the hosts is
//! cut off for longer than its locks last, servers die, a mount dies, the storage is full.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use vhost_user_ploop::storage::lock::{ImageLock, LockMode};

use crate::client::{BUFFER, Client, Lane};
use crate::common::backend::Backend;
use crate::common::img::ploop_img;
use crate::common::qmp::Qmp;
use crate::gluster::wait_for_servers;
use crate::returns::{self, Place, begin_write, expect_end_of, go_on};
use crate::stable::{WAYS, flush, write};
use crate::survivor::{self, begin};

pub const CLUSTER: u64 = 3;

pub const LOST: &str = "THE LOCK ON THE IMAGE IS LOST";

/// How long a client of the volume may take to find its servers again.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One of the helpers of `ci/gluster.sh` and `ci/ceph.sh`.
pub fn bed(helper: &str, argument: &[&str]) {
    let status = Command::new(helper).args(argument).status();
    assert!(status.unwrap().success(), "{helper} {argument:?}");
}

/// Mapped by the first host, and written by the second.
const CLUSTERS: [u64; 3] = [3, 4, 5];

/// Writes and flushes one after the other as long as that is to be gone on with, or until one
/// gets no answer; what they ended with.
pub fn write_while(lane: &mut Lane, mut goes_on: impl FnMut() -> bool) -> Vec<i32> {
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
pub fn wait_for_lock(image: &Path) {
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

/// What a daemon says at its start where that is not so.
const LATE: &str = "lets a host write that has lost its lock";

/// The kind of GlusterFS's volume; that of CephFS has none.
fn kind() -> Option<String> {
    std::env::var("BED_KIND").ok()
}

/// Whether the servers refuse what a host has had under way when it lost its locks: CephFS and,
/// of GlusterFS's volumes, one.
fn refuses_late_writes() -> bool {
    kind().is_none_or(|kind| kind == "strict")
}

/// The link of one host is cut under load, the other one is let in, writes and flushes, and
/// the link comes back. Each way of I/O is a test of its own: Ceph lets a host that it has
/// fenced come back with another mount only.
///
/// What was under way when the link was cut reaches the servers of a storage that does not refuse
/// it, whatever this host does: that is one write here. What was begun later does not.
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
    let late_writes = match refuses_late_writes() {
        true => 0,
        false => {
            first.expect_to_say(LATE);
            1
        }
    };
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
        let mut over = 0;
        for cluster in CLUSTERS {
            let lane = &mut client.lanes[0];
            lane.read(cluster * (64 << 10), 4096, 0);
            assert_eq!(lane.wait(1), [(0, 0)]);
            let bytes = lane.bytes(0, 4096);
            let is_late = bytes == [9; 4096];
            assert!(is_late || bytes == [5; 4096], "{way:?}: {}", first.log());
            over += usize::from(is_late);
        }
        eprintln!("{way:?}: {over} blocks were written over");
        assert!(over <= late_writes, "{way:?}: {}", first.log());
        drop(client);
        second.stop();
        let bytes = fs::read(&there).unwrap();
        let late = bytes.chunks(4096).filter(|block| *block == [9; 4096]);
        assert!(late.count() <= late_writes, "{way:?}");
        load.join().unwrap()
    });
    let failed = results.iter().filter(|result| **result != 0).count();
    eprintln!("{way:?}: {} requests, {failed} failed", results.len());
    assert!(results.iter().filter(|result| **result == 0).count() > 4);
    assert_eq!(failed > 0, policy == "report");
    drop(client);
    first.stop_after_loss();
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
pub fn image_on_both(folder: &TempDir) -> (PathBuf, PathBuf) {
    let other = std::env::var_os("PLOOP_OTHER_MOUNT").expect("PLOOP_OTHER_MOUNT is set");
    let image = folder.path().join("disk.hds");
    let path = image.to_str().unwrap();
    ploop_img(["create", path, "16M", "--cluster-size", "64K"]).ok();
    let there = PathBuf::from(other)
        .join(folder.path().file_name().unwrap())
        .join("disk.hds");
    (image, there)
}

#[test]
#[ignore = "needs a volume: run ci/gluster.sh or ci/ceph.sh"]
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

/// Two of three servers are away while nothing is under way, and what comes waits for them.
#[test]
#[ignore = "needs a volume: run ci/gluster.sh or ci/ceph.sh"]
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
        bed("bed_kill_server", &["2"]);
        bed("bed_kill_server", &["3"]);
        backend.expect_to_say("requests wait until");
        lane.write(CLUSTER * (64 << 10), &[2; 4096], 0);
        assert_eq!(lane.wait_for(1, Duration::from_secs(5)), None);
        bed("bed_start_servers", &[]);
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

/// One of three servers is not needed.
#[test]
#[ignore = "needs a volume: run ci/gluster.sh or ci/ceph.sh"]
fn a_server_that_is_killed_under_load_costs_nobody_an_error() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, _) = image_on_both(&folder);
    let place = TempDir::new().unwrap();
    let backend = Backend::start(&image, &place.path().join("first"), &WAYS[0]);
    let mut client = Client::connect(backend.socket(), 1);
    let lane = &mut client.lanes[0];
    let is_over = AtomicBool::new(false);
    let results = thread::scope(|scope| {
        let load = scope.spawn(|| write_while(lane, || !is_over.load(Relaxed)));
        thread::sleep(Duration::from_secs(2));
        bed("bed_kill_server", &["2"]);
        thread::sleep(Duration::from_secs(15));
        is_over.store(true, Relaxed);
        load.join().unwrap()
    });
    let failed = results.iter().filter(|result| **result != 0).count();
    eprintln!("{} requests, {failed} failed", results.len());
    assert_eq!(failed, 0, "{}", backend.log());
    assert!(results.len() > 4);
    drop(client);
    assert!(!backend.log().contains(LOST), "{}", backend.log());
    backend.stop();
    bed("bed_start_servers", &[]);
    wait_for_servers(folder.path());
    bed("bed_heal", &[]);
}

/// The program dies that is the mount, and another one takes its place. The image is not in the
/// place of tests, which is that mount by another path.
#[test]
#[ignore = "needs a volume: run ci/gluster.sh or ci/ceph.sh"]
fn a_mount_that_is_made_anew_under_load_lets_the_guest_go_on() {
    for way in [WAYS[0], WAYS[2]] {
        let mount = PathBuf::from(std::env::var_os("BED").expect("BED is set")).join("m1");
        let folder = TempDir::new_in(&mount).unwrap();
        let (image, _) = image_on_both(&folder);
        let place = Place::new(&image, &way);
        let mut backend = place.serve();
        let (mut front_end, region) = begin(&backend);
        // With its cache off, all that a guest was told of is stable.
        front_end.set_config(32, &[0]);
        let mut sector = 0;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            survivor::write(&mut front_end, sector % 64, 1);
            sector += 1;
        }
        let head = begin_write(&mut front_end, 100, 2);
        bed("bed_kill_client", &["1"]);
        backend.expect_to_say("the lock on the image may be lost");
        thread::sleep(Duration::from_secs(3));
        let start = Instant::now();
        bed("bed_mount", &["1"]);
        let log = backend.ends_to_be_started_anew();
        assert!(log.contains(LOST), "{log}");
        backend = go_on(&mut front_end, &place, &region);
        expect_end_of(&mut front_end, head);
        eprintln!(
            "{way:?}: {sector} writes, went on after {:?}",
            start.elapsed()
        );
        for sector in 0..sector.min(64) {
            survivor::expect(&mut front_end, sector, 1);
        }
        survivor::expect(&mut front_end, 100, 2);
        assert_eq!(
            returns::flush(&mut front_end),
            returns::OK,
            "{}",
            backend.log()
        );
        drop(front_end);
        backend.stop();
        ploop_img(["check", image.to_str().unwrap()]).ok();
    }
}

/// Bytes of the disk that is written to the end.
const FULL_DISK: u64 = 96 << 20;

/// Bytes that are left for it by a file which is removed then. CephFS takes what comes in some two
/// seconds more, until all servers know that they are full.
const LEFT: u64 = 30 << 20;

/// Between two writes of the disk: no more than 6 MiB come in a second.
const PAUSE: Duration = Duration::from_millis(10);

/// Bytes that files in this folder may still take, as its servers say, some seconds late.
fn free(folder: &Path) -> u64 {
    let all = rustix::fs::statvfs(folder).unwrap();
    all.f_bavail * all.f_frsize
}

/// Waits until the servers have given back what was removed.
fn wait_for_space(folder: &Path, bytes: u64) {
    let start = Instant::now();
    while free(folder) < bytes {
        assert!(start.elapsed() < PATIENCE, "{} are free", free(folder));
        thread::sleep(Duration::from_millis(200));
    }
}

/// Whether a storage that is full refuses every write, also where something lies already. The BAT
/// is written over, so a flush waits there as well.
fn overwrites_need_space() -> bool {
    kind().is_none()
}

/// Writes that need space wait for it, nothing else does, and nothing is lost.
#[test]
#[ignore = "needs a volume: run ci/gluster.sh or ci/ceph.sh"]
fn a_full_volume_lets_the_guest_wait_until_there_is_space() {
    let mount = PathBuf::from(std::env::var_os("BED").expect("BED is set")).join("m1");
    let ballast_len = free(&mount) - LEFT;
    for way in [WAYS[0], WAYS[2]] {
        wait_for_space(&mount, ballast_len + LEFT - (8 << 20));
        let folder = TempDir::new_in(&mount).unwrap();
        let ballast = folder.path().join("ballast");
        write_all(&ballast, ballast_len);
        let image = folder.path().join("disk.hds");
        let (path, size) = (image.to_str().unwrap(), FULL_DISK.to_string());
        ploop_img(["create", path, &size, "--cluster-size", "64K"]).ok();
        let place = TempDir::new().unwrap();
        let control = place.path().join("control");
        let option = format!("--control={}", control.display());
        let options = [&way[..], &[option.as_str()]].concat();
        let backend = Backend::start(&image, &place.path().join("socket"), &options);
        let mut qmp = Qmp::connect(&control);
        let mut client = Client::connect(backend.socket(), 2);
        let [lane, other] = &mut client.lanes[..] else {
            panic!("two queues");
        };
        let block = |number: u64| [(number % 251) as u8 + 1; BUFFER];
        let mut number = 0;
        loop {
            lane.write(number * BUFFER as u64, &block(number), 0);
            match lane.wait_for(1, Duration::from_secs(8)) {
                Some(ended) => assert_eq!(ended, [(0, 0)], "{}", backend.log()),
                None => break,
            }
            number += 1;
            thread::sleep(PAUSE);
            assert!(number * (BUFFER as u64) < FULL_DISK, "it is never full");
        }
        let event = qmp.event("BLOCK_IO_ERROR");
        assert_eq!(
            (&event["nospace"], &event["action"]),
            (&json!(true), &json!("stop"))
        );
        other.flush(0);
        if overwrites_need_space() {
            assert_eq!(other.wait_for(1, Duration::from_secs(5)), None);
        } else {
            assert_eq!(other.wait(1), [(0, 0)], "{}", backend.log());
        }
        other.read(0, BUFFER, 1);
        assert_eq!(other.wait(1), [(1, 0)]);
        assert!(other.bytes(1, BUFFER) == block(0));
        eprintln!(
            "{way:?}: full after {number} clusters of {}",
            FULL_DISK / BUFFER as u64
        );

        fs::remove_file(&ballast).unwrap();
        assert_eq!(lane.wait(1), [(0, 0)], "{}", backend.log());
        if overwrites_need_space() {
            assert_eq!(other.wait(1), [(0, 0)], "{}", backend.log());
        }
        qmp.event("HOST_HAS_SPACE");
        for number in number + 1..FULL_DISK / BUFFER as u64 {
            lane.write(number * BUFFER as u64, &block(number), 0);
            assert_eq!(lane.wait(1), [(0, 0)], "{}", backend.log());
        }
        assert_eq!(flush(lane), 0, "{}", backend.log());
        drop(client);
        backend.stop();
        ploop_img(["check", path]).ok();

        let there = PathBuf::from(std::env::var_os("BED").unwrap())
            .join("m2")
            .join(folder.path().file_name().unwrap())
            .join("disk.hds");
        let backend = Backend::start(&there, &place.path().join("other"), &way);
        let mut client = Client::connect(backend.socket(), 1);
        for number in 0..FULL_DISK / BUFFER as u64 {
            let lane = &mut client.lanes[0];
            lane.read(number * BUFFER as u64, BUFFER, 0);
            assert_eq!(lane.wait(1), [(0, 0)]);
            assert!(
                lane.bytes(0, BUFFER) == block(number),
                "{way:?}: block {number}"
            );
        }
        drop(client);
        backend.stop();
    }
}

/// A file without a hole.
fn write_all(path: &Path, len: u64) {
    use std::io::Write;
    let mut file = File::create(path).unwrap();
    for _ in 0..len >> 20 {
        file.write_all(&[0xba; 1 << 20]).unwrap();
    }
    file.sync_all().unwrap();
}
