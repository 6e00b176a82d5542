//! Processes that take the disk over from each other under load. The client has one
//! connection all the time, and notices nothing.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use tempfile::TempDir;

use crate::client::{BUFFER, Client, DEPTH, Lane};
use crate::common::{backend::Backend, img::ploop_img};
use crate::frail_fs::FrailFs;
use crate::model::Model;
use crate::{Rig, expect_image, models, read_back};

/// How many processes serve, one after the other, after the first.
const TAKE_OVERS: usize = 50;

const LANES: usize = 4;

const MIB: u64 = 1 << 20;

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is varied from one process to the next.
const OPTIONS: [&[&str]; 4] = [
    &[],
    &["--cache", "writeback", "--writeback-delay", "5000"],
    &["--aio", "psync"],
    &["--runners", "1", "--writeback-delay", "0"],
];

/// Starts as much as may be until it is over, and waits for all of it.
fn load_until(lane: &mut Lane, model: &mut Model, over: &AtomicBool) -> u64 {
    let mut requests = 0;
    loop {
        let is_over = over.load(Ordering::Acquire);
        while !is_over && model.in_flight() < DEPTH {
            model.start(lane);
        }
        if model.in_flight() == 0 {
            return requests;
        }
        for (tag, result) in lane.wait(1) {
            assert_eq!(result, 0, "request {tag} failed");
            model.ended(lane, tag);
            requests += 1;
        }
    }
}

/// Says that it is over, also when a test fails: or the load would go on for ever.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Loads all lanes as long as `work` takes.
fn under_load<T>(client: &mut Client, models: &mut [Model], work: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let lanes = client.lanes.iter_mut().zip(models);
        let loads: Vec<_> = lanes
            .map(|(lane, model)| scope.spawn(|| load_until(lane, model, &over)))
            .collect();
        let ended = Over(&over);
        let done = work();
        drop(ended);
        for load in loads {
            assert!(load.join().unwrap() > 0);
        }
        done
    })
}

/// How long the processes say that the guest has waited for each.
fn say_waits(backend: &Backend) {
    let log = backend.log();
    let waits: Vec<f64> = log
        .lines()
        .filter_map(|line| line.split_once("has waited for "))
        .filter_map(|(_, ms)| ms.trim_end_matches(" ms").parse().ok())
        .collect();
    eprintln!("the guest has waited for (ms): {waits:?}");
}

#[test]
fn a_load_does_not_notice_that_another_process_serves() {
    let rig = Rig::ploop_img("64M", "64K");
    let upgrades = rig.folder.path().join("upgrade");
    let mut rng = SmallRng::seed_from_u64(14);
    let mut backend = rig.serve(&["--upgrade-socket", upgrades.to_str().unwrap()]);
    let mut client = Client::connect(backend.socket(), LANES);
    let mut models = models(LANES, 64 * MIB, 14);
    let serving = |pid: u32| format!("process {pid} has taken over; the guest has waited");
    let backend = under_load(&mut client, &mut models, || {
        for number in 0..TAKE_OVERS {
            thread::sleep(Duration::from_millis(rng.random_range(0..60)));
            let options = OPTIONS[number % OPTIONS.len()];
            backend = backend.taken_over(&rig.image, &upgrades, options);
            backend.expect_to_say(&serving(backend.pid()));
        }
        backend
    });
    say_waits(&backend);
    let bytes = read_back(&mut client, &mut models);
    drop(client);
    // Others can come as before, and the last one removes the sockets.
    let mut client = Client::connect(backend.socket(), LANES);
    read_back(&mut client, &mut models);
    drop(client);
    backend.stop();
    assert!(!upgrades.exists());
    expect_image(&rig, &bytes);
}

/// Random reads and writes of 4 KiB until it is over; the longest that one has taken, since
/// it was asked for last.
fn small_load(lane: &mut Lane, seed: u64, over: &AtomicBool, longest: &AtomicU64) {
    const LEN: usize = 4096;
    const DEPTH: usize = 16;
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut started = [Instant::now(); DEPTH];
    let mut free: Vec<_> = (0..DEPTH).collect();
    loop {
        let is_over = over.load(Ordering::Acquire);
        while let Some(tag) = free.pop_if(|_| !is_over) {
            let offset = rng.random_range(0..64 * MIB / LEN as u64) * LEN as u64;
            started[tag] = Instant::now();
            match rng.random_bool(0.5) {
                true => lane.write(offset, &[tag as u8; LEN], tag),
                false => lane.read(offset, LEN, tag),
            }
        }
        if free.len() == DEPTH {
            return;
        }
        for (tag, result) in lane.wait(1) {
            assert_eq!(result, 0, "request {tag} failed");
            let micros = started[tag].elapsed().as_micros() as u64;
            longest.fetch_max(micros, Ordering::Relaxed);
            free.push(tag);
        }
    }
}

/// Says how long a guest waits. What is right depends on the machine, so nothing is
/// expected: see "The wait at a take-over" in docs/performance.md.
#[test]
fn small_requests_wait_for_a_take_over_and_are_served() {
    let rig = Rig::ploop_img("64M", "1M");
    let upgrades = rig.folder.path().join("upgrade");
    let mut backend = rig.serve(&["--upgrade-socket", upgrades.to_str().unwrap()]);
    let mut client = Client::connect(backend.socket(), 2);
    // All of it is mapped.
    for offset in (0..64 * MIB).step_by(BUFFER) {
        client.lanes[0].write(offset, &[1; BUFFER], 0);
        assert_eq!(client.lanes[0].wait(1), [(0, 0)]);
    }
    let (over, longest) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut waits = Vec::new();
    let backend = thread::scope(|scope| {
        let ended = Over(&over);
        for (seed, lane) in (0..).zip(&mut client.lanes) {
            let (over, longest) = (&over, &longest);
            scope.spawn(move || small_load(lane, seed, over, longest));
        }
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(100));
            let usual = longest.swap(0, Ordering::Relaxed);
            backend = backend.taken_over(&rig.image, &upgrades, &[]);
            thread::sleep(Duration::from_millis(50));
            waits.push((usual, longest.swap(0, Ordering::Relaxed)));
        }
        drop(ended);
        backend
    });
    say_waits(&backend);
    eprintln!("longest request without and with a take-over (us): {waits:?}");
    drop(client);
    backend.stop();
}

/// An image on a file system that the test has in its hands, and a client of its disk.
struct Frail {
    fs: FrailFs,
    folder: TempDir,
    backend: Backend,
    client: Client,
}

impl Frail {
    fn serve() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let files = TempDir::new().unwrap();
        let image = files.path().join("disk.hds");
        ploop_img(["create", image.to_str().unwrap(), "64M"]).ok();
        let fs = FrailFs::mount(files.path(), 1)?;
        let socket = folder.path().join("socket");
        let upgrades = folder.path().join("upgrade");
        let options = ["--upgrade-socket", upgrades.to_str().unwrap()];
        let backend = Backend::start(&fs.path("disk.hds"), &socket, &options);
        let mut client = Client::connect(backend.socket(), 1);
        // There is something that a sync makes stable, and no more than a sync to be done.
        let lane = &mut client.lanes[0];
        lane.write(0, &[1; BUFFER], 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        lane.flush(0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        lane.write(0, &[2; BUFFER], 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        Some(Self {
            fs,
            folder,
            backend,
            client,
        })
    }

    fn spawn_successor(&self) -> Backend {
        let upgrades = self.folder.path().join("upgrade");
        let image = self.fs.path("disk.hds");
        self.backend.spawn_successor(&image, &upgrades, &[])
    }

    /// That the disk is served, and has this at its beginning.
    fn expect(&mut self, byte: u8) {
        let lane = &mut self.client.lanes[0];
        lane.read(0, BUFFER, 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        assert_eq!(lane.bytes(0, BUFFER), [byte; BUFFER]);
    }
}

#[test]
fn a_slow_sync_before_a_take_over_holds_nobody_up() {
    let Some(mut frail) = Frail::serve() else {
        return;
    };
    frail.fs.hold_syncs();
    let successor = frail.spawn_successor();
    let start = Instant::now();
    while frail.fs.held_syncs() == 0 {
        let log = frail.backend.log();
        assert!(start.elapsed() < PATIENCE, "nothing is synced: {log}");
        thread::sleep(Duration::from_millis(5));
    }
    // Who connects now is turned away at once, as always while somebody is served.
    let mut other = UnixStream::connect(frail.backend.socket()).unwrap();
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    let start = Instant::now();
    assert_eq!(other.read(&mut [0]).unwrap(), 0);
    assert!(start.elapsed() < Duration::from_secs(2));
    frail.expect(2);
    frail.fs.let_syncs_go();
    frail.backend = frail.backend.gives_way_to(successor);
    frail.expect(2);
    drop(frail.client);
    frail.backend.stop();
}

/// Among them one that comes when nobody is served any more.
#[test]
fn a_process_whose_sync_fails_is_not_taken_over_from_and_serves_on() {
    for passing in [0, 1] {
        let Some(mut frail) = Frail::serve() else {
            return;
        };
        frail.fs.fail_syncs_after(passing, 1);
        frail.spawn_successor().fails();
        frail.backend.expect_to_say("the image cannot be synced");
        let log = frail.backend.log();
        assert!(!log.contains("cannot be served"), "{log}");
        assert_eq!(frail.fs.syncs_to_fail(), 0);
        frail.expect(2);
        let lane = &mut frail.client.lanes[0];
        lane.write(0, &[3; BUFFER], 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        // Nothing becomes stable any more, and the guest hears of it.
        lane.flush(0);
        assert_eq!(lane.wait(1), [(0, -libc::EIO)]);
        frail.expect(3);
        // Not even later.
        frail.spawn_successor().fails();
        frail.expect(3);
        drop(frail.client);
        frail.backend.stop_with_failure();
    }
}
