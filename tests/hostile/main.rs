//! Hostile front-ends and guests: what they say ([`messages`], [`rings`]), and what they
//! cost: memory, the time of a stop, and other queues' time.
//!
//! `docs/limits.md` has the bounds. `PLOOP_HOSTILE_LONG=1` takes more time and a larger
//! disk and prints what was measured.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/front_end.rs"]
mod front_end;
mod guest;
#[path = "../common/limits.rs"]
mod limits;
mod messages;
mod rings;
mod suite;

use std::{
    env, fs,
    io::{Read, Write},
    net::Shutdown,
    os::unix::{fs::chown, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use common::backend::Backend;
use common::img::ploop_img;
use guest::{Attack, DATA, Guest, QUEUES, RING_SIZE};
use limits::{Limits, Most};

/// What all may take together, in bytes: this, and so much for each entry of a ring.
const BASE_BYTES: u64 = 64 << 20;
const ENTRY_BYTES: u64 = 16 << 10;

/// How long the stop of all rings may take, one after another, for a disk of 100 MB/s.
const LONGEST_STOP: Duration = Duration::from_secs(2);

fn is_long() -> bool {
    env::var_os("PLOOP_HOSTILE_LONG").is_some()
}

fn disk_mib() -> u64 {
    if is_long() { 1024 } else { 64 }
}

/// The bounds are those of a disk that has one hostile guest.
static DISK: Mutex<()> = Mutex::new(());

/// What a daemon is to serve.
struct Bed {
    folder: TempDir,
    alone: MutexGuard<'static, ()>,
}

impl Bed {
    fn make() -> Self {
        let alone = DISK.lock().unwrap_or_else(PoisonError::into_inner);
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        let folder = tempfile::tempdir_in(target).unwrap();
        let bed = Self { folder, alone };
        let raw = bed.folder.path().join("raw");
        let bytes = vec![0x5a_u8; 1 << 20];
        let mut file = fs::File::create(&raw).unwrap();
        for _ in 0..disk_mib() {
            file.write_all(&bytes).unwrap();
        }
        drop(file);
        let image = bed.image();
        let paths = [&raw, &image].map(|path: &PathBuf| path.to_str().unwrap());
        ploop_img(["convert", "-O", "ploop", paths[0], paths[1]]).ok();
        fs::remove_file(&raw).unwrap();
        bed
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image.hds")
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn with(self, backend: Backend) -> Rig {
        Rig {
            backend,
            _limits: None,
            _folder: self.folder,
            _alone: self.alone,
        }
    }
}

struct Rig {
    backend: Backend,
    _limits: Option<Limits>,
    _folder: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Rig {
    /// A disk with data all over it.
    fn start(options: &[&str]) -> Self {
        let bed = Bed::make();
        let backend = Backend::start(&bed.image(), &bed.socket(), options);
        bed.with(backend)
    }

    /// The same in a folder of that user's, below a limit of `prlimit(1)`.
    fn start_below(user: u32, limit: Option<&str>, options: &[String]) -> Self {
        let bed = Bed::make();
        let (image, socket) = (bed.image(), bed.socket());
        chown(bed.folder.path(), Some(user), None).unwrap();
        let backend = match limit {
            Some(limit) => Backend::start_below(limit, &image, &socket, options),
            None => Backend::start(&image, &socket, options),
        };
        bed.with(backend)
    }

    /// Below limits for memory and the disk; `None`, which is said, where there are none.
    fn start_limited(most: &Most, options: &[&str]) -> Option<Self> {
        let bed = Bed::make();
        let limits = Limits::new(most, bed.folder.path())?;
        let (image, socket) = (bed.image(), bed.socket());
        let backend = Backend::start_by(limits.command(), &image, &socket, options);
        let mut rig = bed.with(backend);
        rig._limits = Some(limits);
        Some(rig)
    }

    fn guest(&self) -> Guest {
        Guest::connect(self.backend.socket())
    }

    /// Memory of the process's own, in bytes: not the guest's.
    fn memory(&self) -> u64 {
        let status = format!("/proc/{}/status", self.backend.pid());
        let status = fs::read_to_string(status).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:"));
        let kib = line.and_then(|line| line.split_ascii_whitespace().nth(1));
        kib.unwrap().parse::<u64>().unwrap() << 10
    }

    /// Fills all queues, looks at the memory for a while, and stops all rings.
    fn endure(&self, name: &str, attack: &Attack) {
        let mut guest = self.guest();
        guest.fill(DATA, &vec![0x33; 1 << 20]);
        for queue in 0..QUEUES {
            assert!(guest.start(queue, 0));
        }
        let before = self.memory();
        guest.attack(0..QUEUES, attack);
        let start = Instant::now();
        let time = Duration::from_secs(if is_long() { 20 } else { 1 });
        let mut most = 0;
        while start.elapsed() < time {
            most = most.max(self.memory());
            thread::sleep(Duration::from_millis(5));
        }
        let stops: Duration = (0..QUEUES).map(|queue| guest.stop(queue)).sum();
        println!(
            "{name}: {} MiB before, {} MiB at most; all stops {stops:?}",
            before >> 20,
            most >> 20,
        );
        let bound = BASE_BYTES + ENTRY_BYTES * QUEUES as u64 * u64::from(RING_SIZE);
        assert!(most < bound, "{name}: {most} bytes");
        assert!(stops < LONGEST_STOP, "{name}: {stops:?}");
        drop(guest);
        // The next one is served.
        let mut guest = self.guest();
        assert!(guest.start(0, 0));
        guest.run(0, 0, &read_of_a_page(0));
    }
}

fn read_of_a_page(sector: u64) -> Attack {
    Attack {
        kind: VIRTIO_BLK_T_IN,
        sector,
        parts: vec![(DATA, 4096)],
        is_read: true,
    }
}

fn write_of_a_page(sector: u64) -> Attack {
    Attack {
        kind: VIRTIO_BLK_T_OUT,
        is_read: false,
        ..read_of_a_page(sector)
    }
}

fn flush() -> Attack {
    Attack {
        kind: VIRTIO_BLK_T_FLUSH,
        sector: 0,
        parts: Vec::new(),
        is_read: false,
    }
}

/// Ranges for discards and zeroing, at [`DATA`].
fn ranges(guest: &Guest, list: &[(u64, u32)]) -> Vec<(u64, u32)> {
    let range = |&(start, count): &(u64, u32)| {
        let fields = [start.to_le_bytes(), u64::from(count).to_le_bytes()];
        fields.concat()
    };
    let bytes: Vec<_> = list.iter().flat_map(range).collect();
    guest.fill(DATA, &bytes);
    vec![(DATA, bytes.len() as u32)]
}

#[test]
fn transfers_at_odd_addresses() {
    for aio in ["io_uring", "psync"] {
        let rig = Rig::start(&["--aio", aio]);
        let attack = Attack {
            kind: VIRTIO_BLK_T_IN,
            sector: 0,
            // Of memory that is not aligned for direct I/O, and no two in one piece.
            parts: vec![(DATA + 1, 64 << 10); 64],
            is_read: true,
        };
        rig.endure(&format!("odd addresses, {aio}"), &attack);
    }
}

#[test]
fn chains_as_long_as_can_be() {
    let rig = Rig::start(&["--aio", "io_uring"]);
    for count in [1022, 65_000] {
        let attack = Attack {
            kind: VIRTIO_BLK_T_OUT,
            sector: 0,
            parts: vec![(DATA, 512); count],
            is_read: false,
        };
        rig.endure(&format!("{count} descriptors"), &attack);
    }
}

#[test]
fn huge_reads_into_one_page() {
    let rig = Rig::start(&["--aio", "io_uring"]);
    let attack = Attack {
        kind: VIRTIO_BLK_T_IN,
        sector: 0,
        parts: vec![(DATA, 128 << 10); 1000],
        is_read: true,
    };
    rig.endure("huge reads", &attack);
}

/// Reads of pages, and transfers of the costliest kinds.
fn transfers() -> [(&'static str, Attack); 5] {
    let transfer = |kind, parts| Attack {
        kind,
        sector: 0,
        parts,
        is_read: kind == VIRTIO_BLK_T_IN,
    };
    let read = |parts| transfer(VIRTIO_BLK_T_IN, parts);
    let write = |parts| transfer(VIRTIO_BLK_T_OUT, parts);
    [
        ("pages", read(vec![(DATA, 4096)])),
        ("odd addresses", read(vec![(DATA + 1, 64 << 10); 64])),
        ("huge reads", read(vec![(DATA, 128 << 10); 1000])),
        ("huge writes", write(vec![(DATA, 64 << 10); 1000])),
        ("many parts", write(vec![(DATA, 512); 1022])),
    ]
}

/// What the bounds are promised for.
const SLOW_AND_SMALL: Most = Most {
    memory: 512 << 20,
    transfer: 100_000_000,
};

#[test]
fn half_a_gigabyte_and_a_slow_disk_are_enough() {
    let Some(rig) = Rig::start_limited(&SLOW_AND_SMALL, &["--aio", "io_uring"]) else {
        return;
    };
    for (name, attack) in transfers() {
        rig.endure(&format!("slow disk, {name}"), &attack);
    }
    let whole = (0, (disk_mib() << 11) as u32);
    let mut attack = Attack {
        kind: VIRTIO_BLK_T_WRITE_ZEROES,
        sector: 0,
        parts: Vec::new(),
        is_read: false,
    };
    rig.endure_ranges("slow disk, write zeroes", &mut attack, &[whole; 64]);
    rig.backend.stop();
}

/// What limits keep back cannot go back into the ring where something else was taken behind
/// it, and is far more than the disk does before the program has to have ended.
#[test]
fn what_limits_keep_back_does_not_keep_the_image_from_being_closed() {
    let options = ["--aio", "io_uring", "--throttle", "iops_wr=1"];
    let Some(rig) = Rig::start_limited(&SLOW_AND_SMALL, &options) else {
        return;
    };
    let guest = {
        let mut guest = rig.guest();
        for queue in 0..QUEUES {
            assert!(guest.start(queue, 0));
        }
        guest
    };
    let write = Attack {
        kind: VIRTIO_BLK_T_OUT,
        sector: 0,
        // In one piece, which costs no list of pieces: the whole ring can be taken.
        parts: vec![(DATA, 32 << 20)],
        is_read: false,
    };
    guest.attack_before(0..QUEUES, &write, &read_of_a_page(0));
    // Each queue has come to the end of its ring.
    let start = Instant::now();
    while (0..QUEUES).any(|queue| guest.used(queue) == 0) {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    rig.backend.stop();
}

/// How many of the queues attack while another one's reads are timed.
const ATTACKERS: usize = 16;

/// How much longer a read may take than beside reads of pages.
const MOST_TIMES: f64 = 10.0;

/// The rings of the attackers are full all the time. Times are those of a quiet machine.
#[test]
#[ignore = "compares times: PLOOP_HOSTILE_LONG=1 with nothing else running"]
fn a_costly_neighbour_costs_little_more_than_a_busy_one() {
    let rig = Rig::start(&["--aio", "io_uring"]);
    let mut medians = Vec::new();
    for (name, attack) in transfers() {
        let mut guest = rig.guest();
        for queue in 0..=ATTACKERS {
            assert!(guest.start(queue, 0));
        }
        guest.attack(0..ATTACKERS, &attack);
        let mut times: Vec<_> = (0..200)
            .map(|count| {
                guest.refill(0..ATTACKERS);
                guest.run(ATTACKERS, count, &read_of_a_page(8 * u64::from(count)))
            })
            .collect();
        times.sort();
        let median = times[times.len() / 2].as_secs_f64();
        println!(
            "a read beside {name}: median {:.2} ms, longest {:?}",
            median * 1e3,
            times[199]
        );
        medians.push(median);
        for queue in 0..=ATTACKERS {
            guest.stop(queue);
        }
    }
    let worst = medians[1..].iter().copied().fold(0.0, f64::max) / medians[0];
    assert!(worst <= MOST_TIMES, "{worst} times as long");
}

#[test]
fn zeroing_the_whole_disk_again_and_again() {
    let rig = Rig::start(&["--aio", "io_uring"]);
    let guest = rig.guest();
    let whole = (0, (disk_mib() << 11) as u32);
    let tiny: Vec<_> = (0..64).map(|n| (n * 4096, 1)).collect();
    drop(guest);
    for (name, kind, list) in [
        ("write zeroes", VIRTIO_BLK_T_WRITE_ZEROES, vec![whole; 64]),
        ("tiny write zeroes", VIRTIO_BLK_T_WRITE_ZEROES, tiny.clone()),
        ("tiny discards", VIRTIO_BLK_T_DISCARD, tiny),
    ] {
        // The same bytes are there when the guest of the attack has its memory.
        let mut attack = Attack {
            kind,
            sector: 0,
            parts: Vec::new(),
            is_read: false,
        };
        rig.endure_ranges(name, &mut attack, &list);
    }
}

impl Rig {
    fn endure_ranges(&self, name: &str, attack: &mut Attack, list: &[(u64, u32)]) {
        let mut guest = self.guest();
        attack.parts = ranges(&guest, list);
        for queue in 0..QUEUES {
            assert!(guest.start(queue, 0));
        }
        guest.attack(0..QUEUES - 1, attack);
        thread::sleep(Duration::from_millis(500));
        let most = self.memory();
        let waited = (0..5).map(|count| guest.run(QUEUES - 1, count, &read_of_a_page(0)));
        let waited = waited.max().unwrap();
        let stops: Duration = (0..QUEUES).map(|queue| guest.stop(queue)).sum();
        println!(
            "{name}: {} MiB; a read of another queue took {waited:?}; all stops {stops:?}",
            most >> 20
        );
        let bound = BASE_BYTES + ENTRY_BYTES * QUEUES as u64 * u64::from(RING_SIZE);
        assert!(most < bound, "{name}: {most} bytes");
        assert!(stops < LONGEST_STOP, "{name}: {stops:?}");
        assert!(waited < LONGEST_STOP, "{name}: {waited:?}");
    }
}

/// The daemon must not have more than this from now on.
fn limit(rig: &Rig, what: &str) {
    let pid = rig.backend.pid().to_string();
    let status = Command::new("prlimit")
        .args(["--pid", &pid, what])
        .status()
        .expect("util-linux has prlimit");
    assert!(status.success());
}

/// Of the daemon, in bytes.
fn address_space(rig: &Rig) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", rig.backend.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmSize:"));
    let kib = line.and_then(|line| line.split_ascii_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

/// How long a front-end waits for an answer or the end.
const PATIENCE: Duration = Duration::from_secs(60);

/// `None` if the connection ends before it comes to them.
fn queues_that_start(rig: &Rig) -> Option<usize> {
    let socket = rig.backend.socket().to_owned();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut guest = Guest::connect(&socket);
        let started = (0..QUEUES).take_while(|&queue| guest.start(queue, 0));
        let _ = tell.send(started.count());
    });
    match told.recv_timeout(PATIENCE) {
        Ok(started) => Some(started),
        Err(mpsc::RecvTimeoutError::Disconnected) => None,
        Err(mpsc::RecvTimeoutError::Timeout) => {
            panic!("neither an answer nor an end:\n{}", rig.backend.log())
        }
    }
}

#[test]
fn memory_that_the_host_does_not_give_ends_the_connection_and_not_the_process() {
    let rig = Rig::start(&["--aio", "io_uring"]);
    let size = address_space(&rig);
    // Of the soft limit only, which can be raised again.
    for mib in [1, 8, 24, 70, 90, 100, 120, 160] {
        limit(&rig, &format!("--as={}:", size + (mib << 20)));
        let started = queues_that_start(&rig);
        println!("{mib} MiB more: {started:?} queues");
    }
    limit(&rig, "--as=unlimited:");
    let mut guest = rig.guest();
    assert!(guest.start(0, 0));
    guest.run(0, 0, &read_of_a_page(0));
    drop(guest);
    rig.backend.stop();
}

/// What clients of the control socket and of the metrics may have at most, at the same time:
/// they have all connected and asked before any is listened to.
fn crowd(rig: &Rig) {
    const CLIENTS: usize = 16;
    let folder = rig.backend.socket().parent().unwrap();
    let connect = |name| UnixStream::connect(folder.join(name)).unwrap();
    let ask = |name, words: &[u8]| {
        let mut client = connect(name);
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may hang up at once.
        let _ = client.write_all(words);
        client
    };
    let queries = [
        "{\"execute\":\"qmp_capabilities\"}".to_owned(),
        "{\"execute\":\"query-engine\"}".repeat(50),
        format!("{{\"execute\":\"{}\"}}", "x".repeat(60 << 10)),
    ];
    let queries = queries.concat();
    let scrape = b"GET /metrics HTTP/1.0\r\n\r\n";
    let clients: Vec<_> = (0..CLIENTS)
        .flat_map(|_| [ask("control", queries.as_bytes()), ask("metrics", scrape)])
        .collect();
    for mut client in clients {
        // Whatever it is, and if it is nothing.
        let _ = client.shutdown(Shutdown::Write);
        let _ = client.read_to_end(&mut Vec::new());
    }
}

#[test]
fn clients_for_whom_there_is_no_memory_do_not_end_the_process() {
    let bed = Bed::make();
    let options = ["control", "metrics"].map(|name| {
        let path = bed.folder.path().join(name);
        let kind = if name == "metrics" { "unix:" } else { "" };
        format!("--{name}={kind}{}", path.display())
    });
    let (image, socket) = (bed.image(), bed.socket());
    let backend = Backend::start(&image, &socket, &options);
    let rig = bed.with(backend);
    // Without queues, whose threads have memory in reserve that others can use as well.
    let size = address_space(&rig);
    for mib in [0, 1, 4, 20] {
        limit(&rig, &format!("--as={}:", size + (mib << 20)));
        crowd(&rig);
    }
    limit(&rig, "--as=unlimited:");
    let mut guest = rig.guest();
    assert!(guest.start(0, 0));
    guest.run(0, 0, &read_of_a_page(0));
    let mut client = UnixStream::connect(rig.backend.socket().with_file_name("metrics")).unwrap();
    client.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    client.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200 "), "{page}");
    drop(guest);
    rig.backend.stop();
}

/// How many descriptors or threads the daemon has. The kernel's own threads, which do its
/// I/O, come and go.
fn count_of(rig: &Rig, what: &str) -> usize {
    let folder = format!("/proc/{}/{what}", rig.backend.pid());
    let is_kernels = |entry: &fs::DirEntry| {
        let name = fs::read_to_string(entry.path().join("comm"));
        name.is_ok_and(|name| name.starts_with("iou-"))
    };
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.filter(|entry| !is_kernels(entry)).count()
}

/// The same while nobody is served, once all is made that the first one makes it have.
fn settled_count_of(rig: &Rig, what: &str) -> usize {
    assert!(rig.guest().start(0, 0));
    let start = Instant::now();
    let mut counts = Vec::new();
    while counts.len() < 5 || counts.iter().any(|count| count != &counts[0]) {
        assert!(start.elapsed() < PATIENCE, "{what}: {counts:?}");
        thread::sleep(Duration::from_millis(100));
        counts.push(count_of(rig, what));
        counts = counts.split_off(counts.len().saturating_sub(5));
    }
    counts[0]
}

#[test]
fn descriptors_that_the_host_does_not_give_end_the_connection_and_not_the_process() {
    let rig = Rig::start(&["--aio", "io_uring"]);
    let before = settled_count_of(&rig, "fd");
    let mut least = None;
    for more in [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 40, 100] {
        limit(&rig, &format!("--nofile={}:", before + more));
        let started = queues_that_start(&rig);
        println!("{more} descriptors more: {started:?} queues");
        assert_ne!(started, Some(QUEUES), "with {more} descriptors");
        least = least.or(started);
        // What it had is closed before the next limit.
        wait_for_as_few(&rig, "fd", before);
    }
    assert!(least.is_some(), "none came as far as its queues");
    limit(&rig, "--nofile=4096:");
    let mut guest = rig.guest();
    assert!(guest.start(0, 0));
    guest.run(0, 0, &read_of_a_page(0));
    drop(guest);
    rig.backend.stop();
}

#[test]
fn threads_that_the_host_does_not_give_end_the_connection_and_not_the_process() {
    /// Nobody else's: the limit is for all processes of a user, and there is none for root.
    const USER: u32 = 54_322;
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tried: only root can become another user");
        return;
    }
    let options = [format!("--user={USER}"), format!("--group={USER}")];
    let before = {
        let rig = Rig::start_below(USER, None, &options);
        let before = settled_count_of(&rig, "task");
        rig.backend.stop();
        before
    };
    // One of them is for the messages.
    for more in [0, 1, 2, 3, 8, 20] {
        let limit = format!("--nproc={}", before + more);
        let rig = Rig::start_below(USER, Some(&limit), &options);
        for _ in 0..2 {
            let started = queues_that_start(&rig);
            println!("{more} threads more: {started:?} queues");
            // Fewer, if the kernel has made some for io_uring meanwhile.
            assert!(started.is_none_or(|started| started < more));
            assert!(started.is_some_and(|started| started > 0) || more < 8);
            wait_for_as_few(&rig, "task", before);
        }
        if more >= 8 {
            let mut guest = rig.guest();
            assert!(guest.start(0, 0));
            guest.run(0, 0, &read_of_a_page(0));
            // The kernel would like a thread of its own for these.
            guest.run(0, 1, &write_of_a_page(0));
            guest.run(0, 2, &flush());
        }
        rig.backend.stop();
    }
}

/// Waits until what a front-end has made the daemon have is gone.
fn wait_for_as_few(rig: &Rig, what: &str, count: usize) {
    let start = Instant::now();
    while count_of(rig, what) > count {
        assert!(start.elapsed() < PATIENCE, "some are left of its {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
