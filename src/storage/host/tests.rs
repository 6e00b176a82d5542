//! Both back ends on real files: on a disk's file system and on one in memory,
//! around the page cache and through it.

#[cfg(not(ploop_loom))]
mod lost_writes;

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::direct::Alignment;
use super::file::Fallocation;
use super::job::{Job, Step, Verdict};
use super::*;
use crate::storage::ZeroMode;
use crate::storage::lock::{ImageLock, LockError, LockMode};

/// A way to ask the kernel, for tests of all.
#[derive(Clone, Copy, Debug)]
enum Way {
    Psync,
    Ring(Generation),
}

const WAYS: [Way; 4] = [
    Way::Psync,
    Way::Ring(Generation::Cooperative),
    Way::Ring(Generation::Restricted),
    Way::Ring(Generation::Plain),
];

/// Of a thread of a disk that has no other.
fn pieces() -> Pieces {
    Pieces::new(Arc::default())
}

fn only(generation: Generation) -> &'static [Generation] {
    let at = Generation::ALL.iter().position(|&g| g == generation);
    at.map_or(&[], |at| &Generation::ALL[at..=at])
}

/// Access in a certain way; `None`, said aloud, if the kernel is too old for it.
fn open_way(disk: &HostDisk, way: Way, depth: u32) -> Option<HostIo> {
    access(Files::new(Arc::clone(&disk.files)), way, depth)
}

/// The same of a thread that cannot open the only file for itself.
fn share_way(disk: &HostDisk, way: Way) -> Option<HostIo> {
    let files = Files {
        open: vec![Some(Description::share(disk.files.top()))],
        shared: Arc::clone(&disk.files),
    };
    access(files, way, 4)
}

fn access(files: Files, way: Way, depth: u32) -> Option<HostIo> {
    match way {
        Way::Psync => Some(HostIo(Access::Psync(Psync::new(files, pieces(), depth)))),
        Way::Ring(generation) => match Uring::new(files, pieces(), depth, only(generation)) {
            Ok(ring) => Some(HostIo(Access::Uring(Box::new(ring)))),
            Err(error) => {
                eprintln!("LEFT OUT: io_uring, {generation:?}: {error}");
                None
            }
        },
    }
}

/// Folders on a disk and in memory, and in what `PLOOP_TEST_FOLDERS` names, with
/// colons between, for runs on other file systems.
fn folders() -> Vec<tempfile::TempDir> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let mut folders = vec![match tempfile::tempdir_in(target) {
        Ok(folder) => folder,
        Err(_) => tempfile::tempdir().expect("a temporary folder"),
    }];
    match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folders.push(folder),
        Err(error) => eprintln!("LEFT OUT: no files in memory: /dev/shm: {error}"),
    }
    if let Some(more) = std::env::var_os("PLOOP_TEST_FOLDERS") {
        folders.extend(
            std::env::split_paths(&more).map(|path| tempfile::tempdir_in(path).expect("a folder")),
        );
    }
    folders
}

fn host_file(path: &Path, writable: bool) -> HostFile {
    let file = File::options()
        .read(true)
        .write(writable)
        .open(path)
        .expect("open");
    HostFile {
        file,
        path: path.to_owned(),
        writable,
    }
}

fn disk_with(path: &Path, cache: Cache) -> HostDisk {
    let options = HostOptions {
        cache,
        aio: Aio::Psync,
    };
    HostDisk::new(vec![host_file(path, true)], options).expect("disk")
}

fn new_file(folder: &tempfile::TempDir, len: usize, seed: u64) -> (PathBuf, Vec<u8>) {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
    let path = folder.path().join(format!("{seed:x}-{len}"));
    std::fs::write(&path, &bytes).expect("write");
    (path, bytes)
}

/// Queues, submits and waits, as a thread with a poller does.
fn run_all(io: &mut HostIo, ops: Vec<Op>) -> Vec<(Result<(), Errno>, Op)> {
    let count = ops.len();
    let mut results: HashMap<u64, _> = HashMap::new();
    let mut done = Vec::new();
    let mut waiting = ops.into_iter().enumerate().collect::<Vec<_>>();
    waiting.reverse();
    while results.len() < count {
        while let Some((tag, op)) = waiting.pop() {
            if let Err(op) = io.queue(tag as u64, op) {
                assert!(io.in_flight() > 0, "full with nothing in flight");
                waiting.push((tag, op));
                break;
            }
        }
        io.submit();
        io.reap(&mut done);
        if done.is_empty() {
            assert!(wait_readable(io, 10_000), "no completion in 10 s");
        }
        for completion in done.drain(..) {
            let old = results.insert(completion.tag, (completion.result, completion.op));
            assert!(old.is_none(), "completed twice");
        }
    }
    assert_eq!(io.in_flight(), 0);
    (0..count as u64)
        .map(|tag| results.remove(&tag).expect("each has completed"))
        .collect()
}

fn run_one(io: &mut HostIo, op: Op) -> (Result<(), Errno>, Op) {
    run_all(io, vec![op]).remove(0)
}

fn wait_readable(io: &HostIo, timeout_ms: i64) -> bool {
    let Some(fd) = io.completion_fd() else {
        return false;
    };
    // SAFETY: the descriptor is open for as long as `io` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let timeout = Timespec {
        tv_sec: timeout_ms / 1000,
        tv_nsec: timeout_ms % 1000 * 1_000_000,
    };
    let start = Instant::now();
    loop {
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Err(Errno::INTR) => {}
            result => {
                // At the end of its time, poll looks once more: a completion that
                // it finds only then woke nobody.
                let late = start.elapsed() >= Duration::from_millis(timeout_ms as u64);
                return result.expect("poll") > 0 && (timeout_ms == 0 || !late);
            }
        }
    }
}

const TOP: FileId = FileId(0);

fn read_op(offset: u64, len: usize) -> Op {
    Op::Read {
        file: TOP,
        offset,
        buffer: Buffer::zeroed(len),
    }
}

fn write_op(offset: u64, bytes: &[u8], dsync: bool) -> Op {
    Op::Write {
        file: TOP,
        offset,
        buffer: Buffer::Owned(AlignedBuf::from_slice(4096, bytes)),
        dsync,
    }
}

fn bytes_of(op: Op) -> Vec<u8> {
    match op {
        Op::Read {
            buffer: Buffer::Owned(bytes),
            ..
        } => bytes.to_vec(),
        op => panic!("{op:?}"),
    }
}

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    file_len: usize,
    cache: Cache,
    depth: u32,
    batches: Vec<Vec<Act>>,
}

/// Something done in a region of its own of the file, so that the order in a
/// batch does not matter. Offset and length are in bytes.
#[derive(Clone, Debug)]
enum Act {
    Read {
        offset: usize,
        len: usize,
        owned: bool,
    },
    Write {
        offset: usize,
        len: usize,
        owned: bool,
        dsync: bool,
    },
    Zero {
        offset: usize,
        len: usize,
        keep: bool,
    },
    Allocate {
        len: usize,
    },
    Sync,
}

const REGION: usize = 40_000;

fn act() -> impl Strategy<Value = Act> {
    let place = (0..REGION / 2, 0..REGION / 2);
    prop_oneof![
        4 => (place.clone(), any::<bool>())
            .prop_map(|((offset, len), owned)| Act::Read { offset, len, owned }),
        4 => (place.clone(), any::<bool>(), prop::bool::weighted(0.2)).prop_map(
            |((offset, len), owned, dsync)| Act::Write { offset, len, owned, dsync }
        ),
        2 => (place, any::<bool>())
            .prop_map(|((offset, len), keep)| Act::Zero { offset, len, keep }),
        1 => (1..REGION).prop_map(|len| Act::Allocate { len }),
        1 => Just(Act::Sync),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    (
        any::<u64>(),
        0..4 * REGION,
        prop_oneof![Just(Cache::None), Just(Cache::Writeback)],
        1..9_u32,
        prop::collection::vec(prop::collection::vec(act(), 1..6), 1..4),
    )
        .prop_map(|(seed, file_len, cache, depth, batches)| Case {
            seed,
            file_len: file_len & !511,
            cache,
            depth,
            batches,
        })
}

/// Memory of a client, for the length of a batch.
struct Client(Vec<Vec<u8>>);

impl Client {
    /// Two pieces that start anywhere.
    fn buffer(&mut self, bytes: &[u8], rng: &mut StdRng) -> Buffer {
        let mut segments = Segments::new();
        let middle = rng.random_range(0..=bytes.len());
        for piece in [&bytes[..middle], &bytes[middle..]] {
            let skew = rng.random_range(0..9);
            let mut memory = vec![0; skew];
            memory.extend_from_slice(piece);
            // SAFETY: the memory lives as long as `self`, which outlives the
            // batch, and does not move with its vector.
            unsafe { segments.push(memory[skew..].as_mut_ptr(), piece.len()) };
            self.0.push(memory);
        }
        Buffer::Client(segments)
    }
}

/// What became of a batch: the bytes that were read.
fn run_batch(
    io: &mut HostIo,
    disk: &HostDisk,
    batch: &[Act],
    rng: &mut StdRng,
    model: &mut Vec<u8>,
) {
    let mut client = Client(Vec::new());
    let mut ops = Vec::new();
    let mut expected = Vec::new();
    let align = disk.write_alignment() as usize;
    let before = model.clone();
    for (number, act) in batch.iter().enumerate() {
        let base = number * REGION;
        let mut filled = |len: usize, owned: bool, rng: &mut StdRng| {
            let mut bytes = vec![0; len];
            rng.fill(&mut bytes[..]);
            let buffer = if owned {
                Buffer::Owned(AlignedBuf::from_slice(4096, &bytes))
            } else {
                client.buffer(&bytes, rng)
            };
            (bytes, buffer)
        };
        let mut reads = None;
        ops.push(match *act {
            Act::Read { offset, len, owned } => {
                let at = base + offset;
                let mut wanted = vec![0; len];
                let (from, to) = (at.min(before.len()), (at + len).min(before.len()));
                wanted[..to - from].copy_from_slice(&before[from..to]);
                reads = Some(wanted);
                Op::Read {
                    file: TOP,
                    offset: at as u64,
                    buffer: filled(len, owned, rng).1,
                }
            }
            Act::Write {
                offset,
                len,
                owned,
                dsync,
            } => {
                let at = base.next_multiple_of(align) + offset / align * align;
                let (bytes, buffer) = filled(len / align * align, owned, rng);
                put(model, at, &bytes);
                Op::Write {
                    file: TOP,
                    offset: at as u64,
                    buffer,
                    dsync,
                }
            }
            Act::Zero { offset, len, keep } => {
                // Inside the file, and away from the block of a neighbour.
                let at = (base + 4096 + offset).min(before.len());
                let len = len.min(before.len() - at);
                model[at..at + len].fill(0);
                Op::Zero {
                    file: TOP,
                    offset: at as u64,
                    len: len as u64,
                    mode: if keep {
                        ZeroMode::KeepAllocated
                    } else {
                        ZeroMode::Punch
                    },
                }
            }
            Act::Allocate { len } => {
                let len = len.next_multiple_of(512);
                if model.len() < base + len {
                    model.resize(base + len, 0);
                }
                Op::Allocate {
                    file: TOP,
                    offset: base as u64,
                    len: len as u64,
                }
            }
            Act::Sync => Op::Sync { file: TOP },
        });
        expected.push(reads);
    }
    for ((result, op), expected) in run_all(io, ops).into_iter().zip(expected) {
        assert_eq!(result, Ok(()), "{op:?}");
        if let (Op::Read { buffer, .. }, Some(expected)) = (op, expected) {
            let mut bytes = vec![0; expected.len()];
            match buffer {
                Buffer::Client(segments) => segments.copy_to(0, &mut bytes),
                Buffer::Owned(owned) => bytes.copy_from_slice(&owned),
            }
            assert!(bytes == expected, "wrong bytes read");
        }
    }
}

fn put(model: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    if model.len() < at + bytes.len() {
        model.resize(at + bytes.len(), 0);
    }
    model[at..at + bytes.len()].copy_from_slice(bytes);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn all_ways_do_the_same(case in case()) {
        for folder in folders() {
            for way in WAYS {
                let (path, mut model) = new_file(&folder, case.file_len, case.seed);
                let disk = disk_with(&path, case.cache);
                let Some(mut io) = open_way(&disk, way, case.depth) else { continue };
                let mut rng = StdRng::seed_from_u64(case.seed);
                for batch in &case.batches {
                    run_batch(&mut io, &disk, batch, &mut rng, &mut model);
                    let content = std::fs::read(&path).expect("read");
                    prop_assert_eq!(content.len(), model.len());
                    prop_assert!(content == model, "{way:?}");
                }
            }
        }
    }

    #[test]
    fn blocking_methods_take_any_range(
        seed: u64,
        cache in prop_oneof![Just(Cache::None), Just(Cache::Writeback)],
        file_len in 0..20_000_usize,
        places in prop::collection::vec((0..20_000_usize, 0..10_000_usize), 1..6),
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        for folder in folders() {
            let (path, mut model) = new_file(&folder, file_len, seed);
            let disk = disk_with(&path, cache);
            for &(offset, len) in &places {
                let mut bytes = vec![0; len];
                let read = disk.read_exact_at(TOP, &mut bytes, offset as u64);
                if offset + len <= model.len() {
                    read.expect("read");
                    prop_assert!(bytes == model[offset..offset + len]);
                } else {
                    let kind = read.expect_err("beyond the end").kind();
                    prop_assert_eq!(kind, io::ErrorKind::UnexpectedEof);
                }
                rng.fill(&mut bytes[..]);
                disk.write_all_at(TOP, &bytes, offset as u64).expect("write");
                put(&mut model, offset, &bytes);
                disk.sync(TOP).expect("sync");
                prop_assert!(std::fs::read(&path).expect("read") == model);
                prop_assert_eq!(disk.len(TOP).expect("len"), model.len() as u64);
            }
        }
    }
}

/// Runs a test on each folder in each way, with a file of 1 MiB.
fn in_all_ways(cache: Cache, depth: u32, test: impl Fn(HostDisk, HostIo, &[u8])) {
    for folder in folders() {
        for way in WAYS {
            let (path, bytes) = new_file(&folder, 1 << 20, 7);
            let disk = disk_with(&path, cache);
            if let Some(io) = open_way(&disk, way, depth) {
                test(disk, io, &bytes);
            }
        }
    }
}

/// `first` is what meets the cut first, and must not hide it.
fn expect_no_zeros_where_a_file_was_cut(first: impl Fn() -> Op) {
    const CUT: u64 = 512 << 10;
    for folder in folders() {
        for way in WAYS {
            let (path, bytes) = new_file(&folder, 1 << 20, 8);
            let disk = disk_with(&path, Cache::None);
            let Some(mut io) = open_way(&disk, way, 8) else {
                continue;
            };
            assert_eq!(run_one(&mut io, read_op(CUT, 8192)).0, Ok(()));
            let other = File::options().write(true).open(&path).expect("open");
            other.set_len(CUT).expect("cut");
            assert_eq!(run_one(&mut io, first()).0, Err(Errno::IO), "{way:?}");
            for op in [
                read_op(CUT, 8192),
                read_op(CUT - 4096, 8192),
                write_op(CUT, &[1; 4096], false),
                Op::Zero {
                    file: TOP,
                    offset: CUT,
                    len: 4096,
                    mode: ZeroMode::Punch,
                },
                Op::Allocate {
                    file: TOP,
                    offset: 1 << 20,
                    len: 4096,
                },
                Op::Sync { file: TOP },
            ] {
                let (result, op) = run_one(&mut io, op);
                assert_eq!(result, Err(Errno::IO), "{way:?}: {op:?}");
            }
            assert!(disk.set_len(TOP, 1 << 20).is_err());
            assert_eq!(disk.len(TOP).expect("len"), CUT);
            // What is still there can be read and written.
            let (result, op) = run_one(&mut io, read_op(CUT - 4096, 4096));
            assert_eq!(result, Ok(()));
            assert!(bytes_of(op) == bytes[CUT as usize - 4096..CUT as usize]);
            assert_eq!(run_one(&mut io, write_op(0, &[1; 4096], false)).0, Ok(()));
        }
    }
}

#[test]
fn a_read_of_what_was_cut_off_fails() {
    expect_no_zeros_where_a_file_was_cut(|| read_op(768 << 10, 4096));
}

#[test]
fn a_read_that_reaches_into_what_was_cut_off_fails() {
    expect_no_zeros_where_a_file_was_cut(|| read_op((512 << 10) - 4096, 8192));
}

#[test]
fn a_file_that_was_cut_does_not_grow_again() {
    expect_no_zeros_where_a_file_was_cut(|| Op::Allocate {
        file: TOP,
        offset: 1 << 20,
        len: 1 << 20,
    });
}

#[test]
fn an_operation_that_finds_no_room_comes_back() {
    in_all_ways(Cache::None, 4, |_disk, mut io, _| {
        let mut taken = 0;
        let refused = loop {
            match io.queue(taken, read_op(taken * 4096, 4096)) {
                Ok(()) => taken += 1,
                Err(op) => break op,
            }
            assert!(taken < 100);
        };
        assert!(taken >= 4);
        match refused {
            Op::Read { offset, buffer, .. } => {
                assert_eq!((offset, buffer.len()), (taken * 4096, 4096));
            }
            op => panic!("{op:?}"),
        }
        assert_eq!(io.in_flight(), taken as usize);
        io.submit();
        let mut done = Vec::new();
        while io.in_flight() > 0 {
            io.reap(&mut done);
        }
        assert_eq!(done.len(), taken as usize);
        run_one(&mut io, read_op(0, 4096)).0.expect("room again");
    });
}

#[test]
fn a_batch_of_cached_reads_is_one_system_call() {
    let folder = &folders()[0];
    let (path, bytes) = new_file(folder, 1 << 20, 8);
    let disk = disk_with(&path, Cache::Writeback);
    disk.read_exact_at(TOP, &mut vec![0; bytes.len()], 0)
        .expect("now it is cached");
    let files = Files::new(Arc::clone(&disk.files));
    let mut ring = Uring::new(files, pieces(), 64, &Generation::ALL).expect("io_uring");
    for round in 1..=3 {
        for n in 0..32_u64 {
            ring.queue(n, read_op(n * 8192, 4096)).expect("room");
        }
        ring.submit();
        let mut done = Vec::new();
        ring.reap(&mut done);
        assert_eq!(done.len(), 32, "served in line");
        assert_eq!(ring.calls, round);
        for completion in done {
            let at = completion.tag as usize * 8192;
            completion.result.expect("read");
            assert!(bytes_of(completion.op) == bytes[at..at + 4096]);
        }
    }
    ring.submit();
    ring.reap(&mut Vec::new());
    assert_eq!(ring.calls, 3, "nothing to do is no call");
}

#[test]
fn a_ring_does_nothing_but_what_it_is_there_for() {
    use io_uring::{opcode, squeue, types};

    let folder = &folders()[0];
    let (path, _) = new_file(folder, 1 << 20, 9);
    let given = host_file(&path, true);
    let disk = HostDisk::new(vec![given], HostOptions::default()).expect("disk");
    let files = Files::new(Arc::clone(&disk.files));
    let mut ring = Uring::new(files, pieces(), 8, only(Generation::Restricted)).expect("io_uring");
    let there = c"/proc/version";
    let here = types::Fd(libc::AT_FDCWD);
    let others = [
        opcode::OpenAt::new(here, there.as_ptr()).build(),
        opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
        opcode::UnlinkAt::new(here, there.as_ptr()).build(),
        opcode::Nop::new().build().flags(squeue::Flags::IO_DRAIN),
    ];
    for entry in &others {
        // SAFETY: what it points to is static.
        unsafe { ring.ring.submission().push(entry) }.expect("there is room");
        ring.ring.submit_and_wait(1).expect("submitted");
        let end = ring.ring.completion().next().expect("waited for");
        assert_eq!(end.result(), -libc::EACCES, "{entry:?}");
    }

    let refused = ring.ring.submitter().register_eventfd(0);
    let refused = refused
        .expect_err("not one of those that are used")
        .raw_os_error();
    assert_eq!(refused, Some(libc::EACCES));
    let refused = ring.ring.submitter().register_files(&[0]);
    assert!(refused.is_err());
}

#[test]
fn a_ring_keeps_the_locks_until_it_is_gone() {
    let folder = &folders()[0];
    let (path, _) = new_file(folder, 1 << 20, 9);
    let given = host_file(&path, true);
    let lock = ImageLock::acquire(&given.file, LockMode::ReadWrite).expect("nobody else");
    let disk = HostDisk::new(vec![given], HostOptions::default()).expect("disk");
    let files = Files::new(Arc::clone(&disk.files));
    let ring = Uring::new(files, pieces(), 4, &Generation::ALL).expect("io_uring");
    // What a ring with requests in flight is when its process has been killed: all
    // descriptors are closed, and it is still there.
    // SAFETY: the ring is open.
    let kept = unsafe { BorrowedFd::borrow_raw(ring.ring.as_raw_fd()) };
    let kept = kept
        .try_clone_to_owned()
        .expect("a descriptor can be copied");
    lock.abandon();
    drop((ring, disk));
    let other = host_file(&path, true).file;
    let refused = ImageLock::acquire(&other, LockMode::ReadOnly);
    assert!(matches!(refused, Err(LockError::Writer(_))), "{refused:?}");
    drop(kept);
    let start = Instant::now();
    while ImageLock::acquire(&other, LockMode::ReadOnly).is_err() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it is still locked"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn errors_are_those_of_their_operation() {
    in_all_ways(Cache::None, 8, |_disk, mut io, bytes| {
        let elsewhere = FileId(1);
        let results = run_all(
            &mut io,
            vec![
                read_op(0, 4096),
                Op::Sync { file: elsewhere },
                read_op(u64::MAX, 4096),
                read_op(4096, 4096),
                read_op(8192, 0),
            ],
        );
        let [good, no_file, no_range, good_too, nothing] =
            results.try_into().expect("five of them");
        assert_eq!(good.0, Ok(()));
        assert!(bytes_of(good.1) == bytes[..4096]);
        assert_eq!(no_file.0, Err(Errno::BADF));
        assert_eq!(no_range.0, Err(Errno::INVAL));
        assert_eq!(good_too.0, Ok(()));
        assert_eq!(nothing.0, Ok(()));
    });
}

#[test]
fn a_file_opened_for_reading_is_not_written_to() {
    for folder in folders() {
        let (path, bytes) = new_file(&folder, 8192, 9);
        let options = HostOptions::default();
        let disk = HostDisk::new(vec![host_file(&path, false)], options).expect("disk");
        for way in WAYS {
            let Some(mut io) = open_way(&disk, way, 4) else {
                continue;
            };
            let (result, _) = run_one(&mut io, write_op(0, &[1; 4096], false));
            assert_eq!(result, Err(Errno::BADF));
            run_one(&mut io, read_op(0, 4096)).0.expect("read");
        }
        disk.write_all_at(TOP, &[1; 512], 0).expect_err("read-only");
        assert!(std::fs::read(&path).expect("read") == bytes);
    }
}

/// The memory of a process is a file that fails with EIO where nothing is mapped.
#[test]
fn an_io_error_of_the_kernel_goes_to_its_operation_alone() {
    let memory = host_file(Path::new("/proc/self/mem"), false);
    let shared = SharedFile::new(memory, Cache::Writeback, None).expect("open");
    let disk = HostDisk::of_shared(vec![Arc::new(shared)], super::Way::Plain);
    let good = [42_u8; 64];
    for way in WAYS {
        let Some(mut io) = open_way(&disk, way, 4) else {
            continue;
        };
        let results = run_all(
            &mut io,
            vec![read_op(0, 64), read_op(good.as_ptr() as u64, good.len())],
        );
        let [bad, fine] = results.try_into().expect("two of them");
        assert_eq!(bad.0, Err(Errno::IO), "{way:?}");
        assert_eq!(fine.0, Ok(()), "{way:?}");
        assert_eq!(bytes_of(fine.1), good);
    }
}

#[test]
fn the_descriptor_polls_readable_for_each_kind_of_completion() {
    in_all_ways(Cache::None, 8, |_disk, mut io, _| {
        if io.completion_fd().is_none() {
            return;
        }
        assert!(!wait_readable(&io, 0), "nothing was asked for");
        for op in [
            read_op(0, 4096),
            read_op(1, 1),
            read_op(8192, 0),
            read_op(u64::MAX, 1),
            write_op(0, &[3; 4096], true),
            Op::Sync { file: TOP },
            Op::Sync { file: FileId(9) },
            Op::Zero {
                file: TOP,
                offset: 3,
                len: 10_000,
                mode: ZeroMode::KeepAllocated,
            },
            Op::Allocate {
                file: TOP,
                offset: 0,
                len: 2 << 20,
            },
        ] {
            io.queue(1, op).expect("room");
            io.submit();
            let mut done = Vec::new();
            while done.is_empty() {
                assert!(wait_readable(&io, 10_000));
                io.reap(&mut done);
            }
            assert!(!wait_readable(&io, 0), "all was given out");
        }
    });
}

#[test]
fn direct_io_that_does_not_work_is_given_up_by_all_threads() {
    for folder in &folders() {
        for way in WAYS {
            let (path, bytes) = new_file(folder, 1 << 16, 10);
            let file = File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(&path);
            let Ok(file) = file else {
                eprintln!("LEFT OUT: no direct I/O in {}", folder.path().display());
                continue;
            };
            // The file system demands more than this, and will say so.
            let none = Alignment {
                memory: 1,
                offset: 1,
            };
            let shared = Arc::new(SharedFile::pretend_direct(file, none));
            let disk = HostDisk::of_shared(vec![shared], super::Way::Plain);
            let (Some(mut io), Some(mut other)) =
                (open_way(&disk, way, 4), open_way(&disk, way, 4))
            else {
                continue;
            };
            let (result, op) = run_one(&mut io, read_op(3, 100));
            assert_eq!(result, Ok(()), "{way:?}");
            assert!(bytes_of(op) == bytes[3..103]);
            let (result, _) = run_one(&mut other, write_op(5, b"other", false));
            assert_eq!(result, Ok(()), "{way:?}");
            let mut five = [0; 5];
            disk.read_exact_at(TOP, &mut five, 5).expect("read");
            assert_eq!(&five, b"other");
            assert_eq!(disk.write_alignment(), 1);
        }
    }
}

/// A server with a file that is opened for direct I/O and taken to be direct.
#[cfg(not(ploop_loom))]
fn direct_at_server() -> Option<(crate::storage::one_file_fs::OneFileFs, HostDisk)> {
    let served = crate::storage::one_file_fs::OneFileFs::mount()?;
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(served.path())
        .expect("it takes that");
    let none = Alignment {
        memory: 1,
        offset: 1,
    };
    let shared = Arc::new(SharedFile::pretend_direct(file, none));
    let disk = HostDisk::of_shared(vec![shared], super::Way::Plain);
    served.take_uses();
    Some((served, disk))
}

/// A server may tell of a lost write only where that was made.
#[cfg(not(ploop_loom))]
#[test]
fn without_direct_io_what_is_written_is_synced_where_it_was_written() {
    use crate::storage::one_file_fs::{Answers, Use};
    let Some((served, disk)) = direct_at_server() else {
        return;
    };
    disk.forgo_direct();
    for _ in 0..2 {
        disk.write_all_at(TOP, b"mark", 0).expect("write");
        disk.sync(TOP).expect("sync");
    }
    let uses = served.take_uses();
    let is_open = |what: &&Use| matches!(what, Use::Open(_));
    assert_eq!(uses.iter().filter(is_open).count(), 1, "{uses:?}");
    assert_eq!(
        uses.iter().filter(|what| **what == Use::Write(1)).count(),
        2
    );
    assert_eq!(uses.iter().filter(|what| **what == Use::Sync(1)).count(), 2);
    served.answer(Answers {
        loses_writes: true,
        ..Answers::default()
    });
    disk.write_all_at(TOP, b"mark", 0).expect("write");
    disk.sync(TOP).expect_err("it is lost");
    disk.sync(TOP).expect("it was told");
}

#[cfg(not(ploop_loom))]
#[test]
fn what_was_written_directly_is_synced_after_direct_io_was_given_up() {
    use crate::storage::one_file_fs::Answers;
    let loses = Answers {
        loses_writes: true,
        ..Answers::default()
    };
    let Some((served, disk)) = direct_at_server() else {
        return;
    };
    served.answer(loses);
    disk.write_all_at(TOP, b"mark", 0).expect("write");
    served.answer(Answers::default());
    disk.forgo_direct();
    disk.write_all_at(TOP, b"mark", 0).expect("write");
    disk.sync(TOP).expect_err("the first is lost");
    disk.sync(TOP).expect("it was told");

    for way in WAYS {
        let (served, disk) = direct_at_server().expect("as before");
        let Some(mut io) = open_way(&disk, way, 4) else {
            continue;
        };
        served.answer(loses);
        assert_eq!(run_one(&mut io, write_op(0, b"data", false)).0, Ok(()));
        served.answer(Answers::default());
        disk.forgo_direct();
        assert_eq!(run_one(&mut io, write_op(0, b"data", false)).0, Ok(()));
        let sync = || Op::Sync { file: TOP };
        assert_eq!(run_one(&mut io, sync()).0, Err(Errno::IO), "{way:?}");
        assert_eq!(run_one(&mut io, sync()).0, Ok(()), "{way:?}");
        // And what is written now.
        served.answer(loses);
        assert_eq!(run_one(&mut io, write_op(0, b"data", false)).0, Ok(()));
        assert_eq!(run_one(&mut io, sync()).0, Err(Errno::IO), "{way:?}");
    }
}

/// A thread that could not open the file for itself goes on with what all have.
#[cfg(not(ploop_loom))]
#[test]
fn a_shared_description_is_synced_before_and_after_direct_io_was_given_up() {
    use crate::storage::one_file_fs::Answers;
    let loses = Answers {
        loses_writes: true,
        ..Answers::default()
    };
    for way in WAYS {
        let Some((served, disk)) = direct_at_server() else {
            return;
        };
        let Some(mut io) = share_way(&disk, way) else {
            continue;
        };
        let sync = || Op::Sync { file: TOP };
        served.answer(loses);
        assert_eq!(run_one(&mut io, write_op(0, b"data", false)).0, Ok(()));
        served.answer(Answers::default());
        disk.forgo_direct();
        // All switch with the first; this thread does not know yet.
        disk.write_all_at(TOP, b"mark", 0).expect("write");
        assert_eq!(run_one(&mut io, sync()).0, Err(Errno::IO), "{way:?}");
        served.answer(loses);
        assert_eq!(run_one(&mut io, write_op(0, b"data", false)).0, Ok(()));
        assert_eq!(run_one(&mut io, sync()).0, Err(Errno::IO), "{way:?}");
        assert_eq!(run_one(&mut io, sync()).0, Ok(()), "{way:?}");
    }
}

/// The ring is told of what was opened as soon as it listens.
#[cfg(not(ploop_loom))]
#[test]
fn a_description_that_a_ring_could_not_be_told_of_is_told_later() {
    use crate::storage::one_file_fs::Answers;
    for way in &WAYS[1..] {
        let Some((served, disk)) = direct_at_server() else {
            return;
        };
        let Some(mut io) = open_way(&disk, *way, 4) else {
            continue;
        };
        served.answer(Answers {
            direct_write: Some(fuser::Errno::EINVAL),
            ..Answers::default()
        });
        disk.forgo_direct();
        let register = libc::SYS_io_uring_register;
        let refused = where_io_uring_fails(register, libc::ENOMEM, || {
            run_one(&mut io, write_op(0, b"data", false)).0
        });
        assert_eq!(refused, Err(Errno::NOMEM), "{way:?}");
        let result = run_one(&mut io, write_op(0, b"data", false)).0;
        assert_eq!(result, Ok(()), "{way:?}");
    }
    // The same of a lower file that is opened when it is read.
    let folder = &folders()[0];
    let (path, bytes) = new_file(folder, 8192, 25);
    let shared = || {
        let file = SharedFile::new(host_file(&path, false), Cache::Writeback, None);
        Arc::new(file.expect("opens"))
    };
    let disk = HostDisk::of_shared(vec![shared(), shared()], super::Way::Plain);
    for way in &WAYS[1..] {
        let Some(mut io) = open_way(&disk, *way, 4) else {
            continue;
        };
        let read = || Op::Read {
            file: FileId(0),
            offset: 0,
            buffer: Buffer::Owned(AlignedBuf::from_slice(4096, &[0; 8192])),
        };
        let register = libc::SYS_io_uring_register;
        let refused = where_io_uring_fails(register, libc::ENOMEM, || run_one(&mut io, read()).0);
        assert_eq!(refused, Err(Errno::NOMEM), "{way:?}");
        let (result, op) = run_one(&mut io, read());
        assert_eq!(result, Ok(()), "{way:?}");
        assert!(bytes_of(op) == bytes);
    }
}

/// As long as a shard is at least.
#[cfg(not(ploop_loom))]
const SHARD: u64 = 4 << 20;

#[cfg(not(ploop_loom))]
#[test]
fn a_file_whose_tail_could_not_be_zeroed_is_not_taken_for_cut() {
    use crate::storage::one_file_fs::{Answers, OneFileFs};
    let Some(served) = OneFileFs::mount() else {
        return;
    };
    // From the start: the kernel remembers a server that knows no `lseek` at all.
    served.answer(Answers {
        keeps_shards: true,
        write: Some(fuser::Errno::EIO),
        ..Answers::default()
    });
    let disk = disk_with(&served.path(), Cache::Writeback);
    disk.set_len(TOP, 2 * SHARD).expect("extend");
    disk.set_len(TOP, SHARD).expect_err("old data may be there");
    assert_eq!(served.len(), SHARD + crate::storage::filesystem::KEPT_TAIL);
    let file = disk.file(FileId(0)).unwrap();
    assert!(!file.seems_cut() && !file.is_found_cut());
}

#[cfg(not(ploop_loom))]
#[test]
fn a_tail_that_direct_io_cannot_zero_is_zeroed_without() {
    use crate::storage::one_file_fs::{Answers, OneFileFs, Use};
    let Some(served) = OneFileFs::mount() else {
        return;
    };
    served.answer(Answers {
        keeps_shards: true,
        direct_write: Some(fuser::Errno::EINVAL),
        ..Answers::default()
    });
    let disk = disk_with(&served.path(), Cache::None);
    assert_ne!(disk.write_alignment(), 1, "it is direct");
    disk.set_len(TOP, 2 * SHARD).expect("extend");
    served.take_uses();
    disk.set_len(TOP, SHARD).expect("cut");
    assert_eq!(served.len(), SHARD + crate::storage::filesystem::KEPT_TAIL);
    let uses = served.take_uses();
    assert!(
        matches!(uses[..], [Use::Write(_), Use::Open(new), Use::Write(last)] if last == new),
        "{uses:?}"
    );
}

/// Files of proc cannot be opened with `O_DIRECT`.
#[test]
fn a_file_that_cannot_be_opened_directly_is_served_through_the_cache() {
    let memory = host_file(Path::new("/proc/self/mem"), false);
    let shared = SharedFile::new(memory, Cache::None, None).expect("opens without");
    let disk = HostDisk::of_shared(vec![Arc::new(shared)], super::Way::Plain);
    assert_eq!(disk.write_alignment(), 1);
    let secret = *b"secret";
    for way in WAYS {
        let Some(mut io) = open_way(&disk, way, 4) else {
            continue;
        };
        let (result, op) = run_one(&mut io, read_op(secret.as_ptr() as u64, 6));
        assert_eq!(result, Ok(()), "{way:?}");
        assert_eq!(bytes_of(op), secret);
    }
}

#[test]
fn writes_that_are_not_whole_blocks_are_refused_where_they_are_direct() {
    for folder in &folders() {
        let (path, bytes) = new_file(folder, 1 << 16, 11);
        let disk = disk_with(&path, Cache::None);
        let align = disk.write_alignment();
        if align == 1 {
            eprintln!("LEFT OUT: {folder:?} takes writes of any alignment");
            continue;
        }
        assert!(align.is_power_of_two());
        for way in WAYS {
            let Some(mut io) = open_way(&disk, way, 4) else {
                continue;
            };
            let (result, _) = run_one(&mut io, write_op(1, &[1; 7], false));
            assert_eq!(result, Err(Errno::INVAL));
        }
        assert_eq!(disk.write_alignment(), align, "direct I/O goes on");
        assert!(std::fs::read(&path).expect("read") == bytes);
    }
}

#[test]
fn dropping_waits_for_what_is_in_flight() {
    const LEN: usize = 32 << 10;
    const COUNT: usize = 32;
    let folder = &folders()[0];
    let (path, _) = new_file(folder, LEN * COUNT, 12);
    let disk = disk_with(&path, Cache::None);
    for way in WAYS {
        for round in 0..10 {
            let mut memory = AlignedBuf::new(4096);
            memory.resize(LEN * COUNT, 0);
            let Some(mut io) = open_way(&disk, way, COUNT as u32) else {
                break;
            };
            for n in 0..COUNT {
                let mut segments = Segments::new();
                // SAFETY: the memory outlives `io`, which is the point.
                unsafe { segments.push(memory[n * LEN..].as_mut_ptr(), LEN) };
                let op = Op::Read {
                    file: TOP,
                    offset: (n * LEN) as u64,
                    buffer: Buffer::Client(segments),
                };
                io.queue(n as u64, op).expect("room");
                if n == round * 3 {
                    io.submit();
                }
            }
            drop(io);
            memory.fill(0xee);
            std::thread::sleep(Duration::from_millis(2));
            let intact = memory.iter().all(|&byte| byte == 0xee);
            assert!(intact, "the kernel wrote after the drop: {way:?}");
        }
    }
}

#[test]
fn an_io_passes_to_another_thread_while_nothing_is_in_flight() {
    in_all_ways(Cache::None, 8, |_disk, mut io, bytes| {
        for round in 0..3_usize {
            io = std::thread::scope(|scope| {
                let worker = scope.spawn(move || {
                    let at = round * 4096;
                    let ops = vec![read_op(at as u64, 4096), Op::Sync { file: TOP }];
                    let mut results = run_all(&mut io, ops);
                    let (result, op) = results.remove(0);
                    assert_eq!(result, Ok(()));
                    assert!(bytes_of(op) == bytes[at..at + 4096]);
                    io
                });
                worker.join().expect("no panic")
            });
        }
    });
}

#[test]
fn lower_files_are_opened_when_they_are_read() {
    for folder in folders() {
        let (base, base_bytes) = new_file(&folder, 8192, 13);
        let (middle, _) = new_file(&folder, 8192, 14);
        let (top, top_bytes) = new_file(&folder, 8192, 15);
        let files = vec![
            host_file(&base, false),
            host_file(&middle, false),
            host_file(&top, true),
        ];
        let disk = HostDisk::new(files, HostOptions::default()).expect("disk");
        for way in WAYS {
            let Some(mut io) = open_way(&disk, way, 4) else {
                continue;
            };
            let mut read = |file: u8| {
                let op = Op::Read {
                    file: FileId(file),
                    offset: 0,
                    buffer: Buffer::zeroed(8192),
                };
                let (result, op) = run_one(&mut io, op);
                result.expect("read");
                bytes_of(op)
            };
            assert!(read(2) == top_bytes);
            assert!(read(0) == base_bytes);
            assert!(read(0) == base_bytes);
            let open = match &io.0 {
                Access::Uring(io) => io.opened(),
                Access::Psync(io) => io.opened(),
            };
            assert_eq!(open, [true, false, true]);
        }
    }
}

#[test]
fn a_file_that_cannot_be_opened_again_is_shared() {
    for folder in &folders() {
        let (path, bytes) = new_file(folder, 8192, 16);
        let given = host_file(&path, true);
        let shared = Arc::new(SharedFile::new(given, Cache::None, None).expect("open"));
        let disk = HostDisk::of_shared(vec![shared], super::Way::Plain);
        for way in WAYS {
            let Some(mut io) = share_way(&disk, way) else {
                continue;
            };
            let (result, op) = run_one(&mut io, read_op(0, 8192));
            assert_eq!(result, Ok(()));
            assert!(bytes_of(op) == bytes);
        }
    }
}

#[test]
fn a_broken_ring_fails_its_operations_and_does_not_hang() {
    let folder = &folders()[0];
    let (path, _) = new_file(folder, 8192, 17);
    let disk = disk_with(&path, Cache::None);
    let files = Files::new(Arc::clone(&disk.files));
    let mut ring = Uring::new(files, pieces(), 4, &Generation::ALL).expect("io_uring");
    ring.queue(1, read_op(0, 4096)).expect("room");
    ring.give_up(Errno::NOMEM);
    ring.queue(2, read_op(0, 4096)).expect("room");
    ring.submit();
    let mut done = Vec::new();
    ring.reap(&mut done);
    assert_eq!(done.len(), 2);
    assert!(done.iter().all(|c| c.result == Err(Errno::NOMEM)));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn auto_takes_plain_calls_for_files_in_memory_and_the_ring_for_others() {
    for folder in folders() {
        let in_memory = folder.path().starts_with("/dev/shm");
        let (path, _) = new_file(&folder, 8192, 18);
        for cache in [Cache::None, Cache::Writeback] {
            let options = HostOptions {
                cache,
                aio: Aio::Auto,
            };
            let disk = HostDisk::new(vec![host_file(&path, true)], options).expect("disk");
            let io = disk.open_io(8).expect("open_io");
            assert_eq!(io.completion_fd().is_none(), in_memory, "{folder:?}");
        }
    }
}

/// In a thread of its own, in which the kernel has no io_uring.
fn without_io_uring<R: Send>(test: impl FnOnce() -> R + Send) -> R {
    where_io_uring_fails(libc::SYS_io_uring_setup, libc::ENOSYS, test)
}

/// In a thread of its own, in which this system call fails so.
fn where_io_uring_fails<R: Send>(call: i64, error: i32, test: impl FnOnce() -> R + Send) -> R {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let refused = [(call, Vec::new())];
            let refusal = SeccompAction::Errno(error as u32);
            let arch = std::env::consts::ARCH.try_into().expect("a known one");
            let filter = SeccompFilter::new(refused.into(), SeccompAction::Allow, refusal, arch);
            let filter: BpfProgram = filter.and_then(BpfProgram::try_from).expect("a filter");
            seccompiler::apply_filter(&filter).expect("a thread may restrict itself");
            test()
        });
        thread.join().expect("no panic")
    })
}

#[test]
fn a_kernel_without_io_uring_is_found_out_before_anything_is_served() {
    let folder = &folders()[0];
    let (path, bytes) = new_file(folder, 8192, 19);
    let open = |aio| {
        let cache = Cache::None;
        HostDisk::new(vec![host_file(&path, true)], HostOptions { cache, aio })
    };
    open(Aio::IoUring).expect("this kernel has it");
    without_io_uring(|| {
        open(Aio::IoUring).expect_err("it was asked for by name");
        let disk = open(Aio::Auto).expect("there is another way");
        let mut io = disk.open_io(8).expect("open_io");
        assert_eq!(io.completion_fd(), None);
        let (result, op) = run_one(&mut io, read_op(0, 8192));
        assert_eq!(result, Ok(()));
        assert!(bytes_of(op) == bytes);
    });
}

#[test]
fn a_disk_says_what_clones_and_writes_must_be_multiples_of_until_they_need_not() {
    let folder = &folders()[0];
    let (path, _) = new_file(folder, 64 << 10, 20);
    let disk = disk_with(&path, Cache::None);
    let block = disk.zero_granularity();
    assert!(block.is_power_of_two() && block >= 512);
    assert_eq!(disk.clone_unit(), Some(block));
    disk.file(FileId(0)).unwrap().cannot_clone(Errno::XDEV);
    assert_eq!(disk.clone_unit(), None);
    if disk.write_alignment() == 1 {
        eprintln!("LEFT OUT: {folder:?} takes writes of any alignment");
    }
    disk.forgo_direct();
    assert_eq!(disk.write_alignment(), 1);
}

#[test]
fn only_a_lack_of_memory_is_explained_as_one() {
    let of = |code| explain(io::Error::from_raw_os_error(code));
    assert!(of(libc::ENOMEM).to_string().contains("RLIMIT_MEMLOCK"));
    for other in [libc::EPERM, libc::ENOSYS, libc::EINVAL] {
        assert_eq!(of(other).raw_os_error(), Some(other));
    }
}

#[test]
fn a_clone_ends_in_all_ways_and_is_not_tried_where_it_was_refused() {
    in_all_ways(Cache::None, 8, |disk, mut io, bytes| {
        let len = 16 << 10;
        let clone = || Op::Clone {
            from: TOP,
            from_offset: 0,
            file: TOP,
            offset: len,
            len,
        };
        let (result, _) = run_one(&mut io, clone());
        let (read, op) = run_one(&mut io, read_op(len, len as usize));
        read.expect("read");
        let len = len as usize;
        match result {
            Ok(()) => assert!(bytes_of(op) == bytes[..len]),
            Err(error) => {
                assert_eq!(error, Errno::OPNOTSUPP);
                assert!(bytes_of(op) == bytes[len..2 * len]);
                assert_eq!(disk.clone_unit(), None);
                assert_eq!(run_one(&mut io, clone()).0, Err(Errno::OPNOTSUPP));
            }
        }
    });
}

#[test]
fn of_a_file_that_was_cut_the_front_is_zeroed_and_nothing_behind() {
    in_all_ways(Cache::None, 8, |disk, mut io, bytes| {
        let half = bytes.len() as u64 / 2;
        let path = disk.file(FileId(0)).unwrap().path().to_owned();
        let by_others = std::fs::File::options().write(true).open(path);
        by_others.expect("open").set_len(half).expect("cut");
        assert!(disk.file(FileId(0)).unwrap().is_found_cut());
        let mut zero = |offset, len| {
            let mode = ZeroMode::KeepAllocated;
            let file = TOP;
            let op = Op::Zero {
                file,
                offset,
                len,
                mode,
            };
            run_one(&mut io, op).0
        };
        assert_eq!(zero(4096, 8192), Ok(()));
        assert_eq!(zero(half - 4096, 4096), Ok(()));
        for (offset, len) in [(half - 4096, 8192), (half, 4096), (0, half + 4096)] {
            assert_eq!(zero(offset, len), Err(Errno::IO), "{len} from {offset}");
        }
        assert_eq!(disk.len(TOP).expect("length"), half);
    });
}

#[test]
fn a_thread_for_whose_ring_there_is_no_memory_does_without_unless_it_must_not() {
    let folder = &folders()[0];
    let (path, bytes) = new_file(folder, 8192, 21);
    let open = |aio| {
        let cache = Cache::None;
        let options = HostOptions { cache, aio };
        HostDisk::new(vec![host_file(&path, true)], options).expect("disk")
    };
    let (auto, by_name) = (open(Aio::Auto), open(Aio::IoUring));
    let setup = libc::SYS_io_uring_setup;
    where_io_uring_fails(setup, libc::ENOMEM, || {
        let mut io = auto.open_io(8).expect("plain calls");
        assert_eq!(io.completion_fd(), None);
        let (result, op) = run_one(&mut io, read_op(0, 8192));
        assert_eq!(result, Ok(()));
        assert!(bytes_of(op) == bytes);
        let error = by_name.open_io(8).expect_err("it was asked for by name");
        assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
    });
    where_io_uring_fails(setup, libc::EPERM, || {
        auto.open_io(8).expect_err("that is no matter of memory");
    });
}

#[test]
fn a_kernel_that_is_busy_is_asked_again_for_a_while() {
    let folder = &folders()[0];
    let (path, _) = new_file(folder, 8192, 22);
    let disk = disk_with(&path, Cache::None);
    let enter = libc::SYS_io_uring_enter;
    let (result, waited) = where_io_uring_fails(enter, libc::EBUSY, || {
        let files = Files::new(Arc::clone(&disk.files));
        let mut ring = Uring::new(files, pieces(), 4, &Generation::ALL).expect("io_uring");
        ring.queue(1, read_op(0, 4096)).expect("room");
        let start = Instant::now();
        ring.submit();
        let mut done = Vec::new();
        ring.reap(&mut done);
        (done.pop().map(|done| done.result), start.elapsed())
    });
    assert_eq!(result, Some(Err(Errno::BUSY)));
    assert!(waited >= Duration::from_millis(500), "{waited:?}");
}

#[test]
fn space_is_taken_ahead_and_the_length_stays() {
    use std::os::unix::fs::MetadataExt;
    for folder in folders() {
        let path = folder.path().join("sparse");
        let file = std::fs::File::create(&path).expect("create");
        file.set_len(1 << 20).expect("set the length");
        let disk = disk_with(&path, Cache::None);
        let space = || std::fs::metadata(&path).expect("look").blocks() * 512;
        assert!(space() < 64 << 10);
        disk.allocate(TOP, 0, 512 << 10).expect("allocate");
        let taken = space();
        // GlusterFS with shards says that a file takes nothing, whatever it takes.
        let is_known = !filesystem::is_fuse(&file) || taken > 0;
        assert!(
            !is_known || (512 << 10..768 << 10).contains(&taken),
            "{taken}"
        );
        assert_eq!(disk.len(TOP).expect("length"), 1 << 20);
    }
}

#[test]
fn how_long_a_file_was_made_is_known_and_no_more() {
    in_all_ways(Cache::None, 8, |disk, mut io, bytes| {
        let len = bytes.len() as u64;
        let op = Op::Allocate {
            file: TOP,
            offset: len,
            len: 8192,
        };
        assert_eq!(run_one(&mut io, op).0, Ok(()));
        let file = disk.file(FileId(0)).unwrap();
        assert!(file.reaches_beyond(len + 8191) && !file.reaches_beyond(len + 8192));
        assert!(!file.seems_cut() && !file.is_found_cut());
        assert_eq!(disk.len(TOP).expect("length"), len + 8192);
    });
}

#[test]
fn what_is_more_than_a_piece_goes_where_it_belongs() {
    for folder in folders() {
        let (path, _) = new_file(&folder, 5 << 20, 23);
        let disk = disk_with(&path, Cache::None);
        let bytes: Vec<u8> = (0..(2 << 20) + 512).map(|at| (at >> 9) as u8).collect();
        for offset in [0, 4096, 1 << 20] {
            disk.write_all_at(TOP, &bytes, offset).expect("write");
            let mut read = vec![0; bytes.len()];
            disk.read_exact_at(TOP, &mut read, offset).expect("read");
            assert!(read == bytes, "at {offset}");
            let content = std::fs::read(&path).expect("read");
            assert!(content[offset as usize..][..bytes.len()] == bytes);
        }
    }
}

#[cfg(not(ploop_loom))]
#[test]
fn a_file_of_a_server_that_cannot_be_asked_not_to_wait_has_a_ring_all_the_same() {
    use crate::storage::one_file_fs::OneFileFs;
    let Some(served) = OneFileFs::mount() else {
        return;
    };
    let file = SharedFile::new(host_file(&served.path(), false), Cache::Writeback, None);
    assert!(!file.expect("open").is_served_best_by_plain_calls());
}

/// The server hears of each write, and of the sync that a stable one asks for.
#[cfg(not(ploop_loom))]
#[test]
fn a_stable_write_is_followed_by_a_sync_in_all_ways_and_another_is_not() {
    use crate::storage::one_file_fs::OneFileFs;
    let Some(served) = OneFileFs::mount() else {
        return;
    };
    let disk = disk_with(&served.path(), Cache::Writeback);
    for way in WAYS {
        let Some(mut io) = open_way(&disk, way, 4) else {
            continue;
        };
        let mut memory = vec![7_u8; 8192];
        let start = memory.as_mut_ptr();
        let in_two = |dsync| {
            let mut pieces = Segments::new();
            for at in [0, 4096] {
                // SAFETY: inside `memory`, which outlives the operation.
                unsafe { pieces.push(start.wrapping_add(at), 2048) };
            }
            let buffer = Buffer::Client(pieces);
            let (file, offset) = (TOP, 0);
            Op::Write {
                file,
                offset,
                buffer,
                dsync,
            }
        };
        for (op, syncs) in [
            (write_op(0, &[7; 4096], false), 0),
            (write_op(0, &[7; 4096], true), 1),
            (in_two(false), 0),
            (in_two(true), 1),
            (Op::Sync { file: TOP }, 1),
        ] {
            let before = served.syncs();
            let (result, op) = run_one(&mut io, op);
            assert_eq!(result, Ok(()), "{way:?} {op:?}");
            assert_eq!(served.syncs() - before, syncs, "{way:?} {op:?}");
        }
    }
}

#[test]
fn a_disk_has_files() {
    let error = HostDisk::new(Vec::new(), HostOptions::default()).expect_err("no file");
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn punching_gives_space_back_and_keeping_does_not() {
    use std::os::unix::fs::MetadataExt;
    for folder in &folders() {
        for way in WAYS {
            let (path, _) = new_file(folder, 1 << 20, 19);
            let disk = disk_with(&path, Cache::None);
            let Some(mut io) = open_way(&disk, way, 4) else {
                continue;
            };
            let zero = |mode| Op::Zero {
                file: TOP,
                offset: 4096,
                len: (1 << 20) - 8192,
                mode,
            };
            disk.sync(TOP).expect("sync");
            let used = || std::fs::metadata(&path).expect("stat").blocks() * 512;
            let full = used();
            assert!(full >= 1 << 20);
            run_one(&mut io, zero(ZeroMode::KeepAllocated))
                .0
                .expect("zero");
            if disk.file(FileId(0)).unwrap().can(Fallocation::ZeroRange) {
                assert!(used() >= 1 << 20, "{}", used());
            }
            run_one(&mut io, zero(ZeroMode::Punch)).0.expect("punch");
            if disk.file(FileId(0)).unwrap().can(Fallocation::Punch) {
                assert!(used() < 1 << 16, "{}", used());
            } else {
                eprintln!("LEFT OUT: {} cannot punch holes", folder.path().display());
            }
            assert_eq!(disk.len(TOP).expect("len"), 1 << 20);
        }
    }
}

/// A limit on the length of files cuts a write short for real. It holds for a
/// whole process, so the test runs itself again as a child.
#[test]
fn a_write_cut_short_by_the_system_fails_with_its_error() {
    const CHILD: &str = "PLOOP_TEST_FILE_SIZE_LIMIT";
    const LIMIT: u64 = 64 << 10;
    if std::env::var_os(CHILD).is_none() {
        let me = std::env::current_exe().expect("own path");
        let name = std::thread::current().name().map(str::to_owned);
        let output = std::process::Command::new(me)
            .args(["--exact", &name.expect("tests have names"), "--nocapture"])
            .env(CHILD, "1")
            .output()
            .expect("child");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(text.contains("1 passed"), "{text}");
        return;
    }
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let limit = libc::rlimit {
        rlim_cur: LIMIT,
        rlim_max: libc::RLIM_INFINITY,
    };
    let folder = &folders()[0];
    for (number, way) in WAYS.into_iter().enumerate() {
        let path = folder.path().join(number.to_string());
        std::fs::write(&path, vec![0; 4096]).expect("write");
        let disk = disk_with(&path, Cache::Writeback);
        // SAFETY: the structure outlives the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
        // Kernel workers are made with the limit of the thread at that time.
        let Some(mut io) = open_way(&disk, way, 4) else {
            continue;
        };
        let bytes = vec![7; 2 * LIMIT as usize];
        let (result, _) = run_one(&mut io, write_op(LIMIT / 2, &bytes, false));
        assert_eq!(result, Err(Errno::FBIG), "{way:?}");
        assert_eq!(disk.len(TOP).expect("len"), LIMIT, "the part that fits");
        let mut last = [0];
        let file = File::open(&path).expect("open");
        file.read_exact_at(&mut last, LIMIT - 1).expect("read");
        assert_eq!(last, [7]);
    }
}

#[test]
fn writes_of_many_threads_do_not_meet() {
    const THREADS: usize = 4;
    const EACH: usize = 64;
    for folder in folders() {
        for way in WAYS {
            let (path, _) = new_file(&folder, THREADS * EACH * 4096, 20);
            let disk = disk_with(&path, Cache::None);
            let start = Instant::now();
            std::thread::scope(|scope| {
                for thread in 0..THREADS {
                    let disk = &disk;
                    scope.spawn(move || {
                        let Some(mut io) = open_way(disk, way, 16) else {
                            return;
                        };
                        let ops = (0..EACH).map(|n| {
                            let at = (n * THREADS + thread) * 4096;
                            write_op(at as u64, &[thread as u8; 4096], n % 16 == 0)
                        });
                        for (result, _) in run_all(&mut io, ops.collect()) {
                            result.expect("write");
                        }
                    });
                }
            });
            assert!(start.elapsed() < Duration::from_secs(60));
            if open_way(&disk, way, 1).is_some() {
                let content = std::fs::read(&path).expect("read");
                for (n, block) in content.chunks(4096).enumerate() {
                    let thread = (n % THREADS) as u8;
                    assert!(block.iter().all(|&byte| byte == thread));
                }
            }
        }
    }
}

#[test]
fn a_file_keeps_the_name_of_its_opening() {
    let file = tempfile::NamedTempFile::new_in(".").unwrap();
    let disk = HostDisk::new(
        vec![HostFile {
            file: file.reopen().unwrap(),
            path: file.path().to_owned(),
            writable: true,
        }],
        HostOptions::default(),
    )
    .unwrap();
    assert_eq!(disk.opening(FileId(0)).unwrap(), None);
    disk.set_opening(FileId(0), 5).unwrap();
    disk.set_opening(FileId(0), 7).unwrap();
    assert_eq!(disk.opening(FileId(0)).unwrap(), Some(7));
}

/// A read or write to memory that direct I/O cannot use, of `len` bytes.
fn odd(memory: &mut [u8], len: usize) -> Buffer {
    let mut segments = Segments::new();
    // SAFETY: inside `memory`, which outlives the operation and is not looked at
    // meanwhile.
    unsafe { segments.push(memory.as_mut_ptr().wrapping_add(1), len) };
    Buffer::Client(segments)
}

/// Many long transfers at odd addresses at a time, on two threads' rings, of which the
/// first takes all that is shared: all of them end, and right.
#[test]
fn transfers_at_odd_addresses_share_memory_that_is_bounded() {
    const LEN: usize = (384 << 10) + 4096;
    const COUNT: usize = 140;
    let folder = &folders()[0];
    let (path, bytes) = new_file(folder, LEN, 23);
    for aio in [Aio::IoUring, Aio::Psync] {
        let file = host_file(&path, true);
        let options = HostOptions {
            cache: Cache::None,
            aio,
        };
        let disk = HostDisk::new(vec![file], options).expect("disk");
        let mut memory: Vec<_> = (0..2 * COUNT).map(|_| vec![0; LEN + 1]).collect();
        let mut ios = [disk.open_io(256).unwrap(), disk.open_io(256).unwrap()];
        for (index, memory) in memory.iter_mut().enumerate() {
            let op = Op::Read {
                file: TOP,
                offset: 0,
                buffer: odd(memory, LEN),
            };
            ios[index / COUNT].queue(index as u64, op).expect("room");
        }
        let mut done = Vec::new();
        ios.iter_mut().for_each(Io::submit);
        let start = std::time::Instant::now();
        // The second first: the first holds what it has, as its ends are not looked at.
        for io in ios.iter_mut().rev() {
            while io.in_flight() > 0 {
                io.reap(&mut done);
                assert!(start.elapsed().as_secs() < 60, "{} have ended", done.len());
            }
        }
        let ends: Vec<_> = done
            .into_iter()
            .map(|done| (done.tag, done.result))
            .collect();
        assert_eq!(ends.len(), 2 * COUNT);
        assert!(ends.iter().all(|(_, result)| result.is_ok()));
        assert!(memory.iter().all(|memory| memory[1..] == bytes[..LEN]));

        let [io, _] = &mut ios;
        let other: Vec<u8> = memory[0].iter().map(|byte| !byte).collect();
        memory[0].copy_from_slice(&other);
        let op = Op::Write {
            file: TOP,
            offset: 0,
            buffer: odd(&mut memory[0], LEN),
            dsync: false,
        };
        let (result, _) = run_one(io, op);
        assert_eq!(result, Ok(()));
        assert!(std::fs::read(&path).unwrap()[..LEN] == other[1..]);
        std::fs::write(&path, &bytes).unwrap();
    }
}

/// A server can be late to know how long a file is.
#[test]
fn a_read_that_ends_before_the_file_does_is_made_again() {
    let folder = &folders()[0];
    let (path, _) = new_file(folder, 1 << 13, 11);
    let shared = SharedFile::new(host_file(&path, false), Cache::Writeback, None).expect("opens");
    let mut file = Description::share(&Arc::new(shared));
    let mut pieces = pieces();
    let mut end_of_file_at = |offset| {
        let mut job = Job::new(read_op(offset, 4096));
        let mut verdicts = Vec::new();
        loop {
            let step = job.step(&mut file, &mut pieces);
            assert!(matches!(step, Step::Read { .. }));
            match job.ended(0, &mut file) {
                Verdict::Again => verdicts.push(()),
                Verdict::Done(end) => return (verdicts.len(), end),
                Verdict::Doubted { .. } => panic!("it has no lock"),
            }
        }
    };
    let (tries, end) = end_of_file_at(4096);
    assert!(tries > 10);
    assert_eq!(end, Err(Errno::IO));
    assert_eq!(end_of_file_at(8192), (0, Ok(())));
}

/// What lies in front of a cut stays, also where a file system takes more (GlusterFS with
/// shards, of 64 MiB if nobody has chosen).
#[test]
fn a_file_that_is_cut_keeps_what_is_in_front_of_the_cut() {
    const SHARD: u64 = 64 << 20;
    for folder in &folders() {
        let (path, block) = new_file(folder, 1 << 16, 12);
        let disk = disk_with(&path, Cache::None);
        let places = [0, SHARD - (1 << 16), 2 * SHARD - (1 << 16), 2 * SHARD];
        for end in [2 * SHARD, SHARD] {
            disk.set_len(TOP, end + (1 << 17)).expect("extend");
            let kept = |place: &&u64| **place < end;
            for place in places.iter().filter(kept).chain(&[end]) {
                disk.write_all_at(TOP, &block, *place).expect("write");
            }
            disk.set_len(TOP, end).expect("cut");
            let len = disk.len(TOP).expect("a length");
            assert!((end..end + (1 << 16)).contains(&len), "{len}");
            let mut found = vec![0; 1 << 16];
            for place in places.iter().filter(kept) {
                disk.read_exact_at(TOP, &mut found, *place).expect("read");
                assert!(
                    found == block,
                    "{place} of {end} in {}",
                    folder.path().display()
                );
            }
            // What is left behind the cut, if anything, is no old data.
            disk.set_len(TOP, end + (1 << 16)).expect("extend");
            disk.read_exact_at(TOP, &mut found, end).expect("read");
            assert!(found.iter().all(|byte| *byte == 0), "{end}");
        }
    }
}

/// A server can be late to know how long a file is: what this process has made it counts.
#[test]
fn zeros_are_written_up_to_where_the_file_is_known_to_reach() {
    for (fallocation, mode) in [
        (Fallocation::Punch, ZeroMode::Punch),
        (Fallocation::ZeroRange, ZeroMode::KeepAllocated),
    ] {
        let folder = &folders()[0];
        let (path, _) = new_file(folder, 4096, 13);
        let shared =
            SharedFile::new(host_file(&path, true), Cache::Writeback, None).expect("opens");
        shared.has_grown_to(1 << 13);
        shared.cannot(fallocation, Errno::OPNOTSUPP);
        let disk = HostDisk::of_shared(vec![Arc::new(shared)], super::Way::Plain);
        let mut io = open_way(&disk, Way::Psync, 1).expect("plain calls");
        let zero = Op::Zero {
            file: TOP,
            offset: 2048,
            len: 1 << 14,
            mode,
        };
        assert_eq!(run_one(&mut io, zero).0, Ok(()));
        let bytes = std::fs::read(&path).expect("read");
        assert_eq!(bytes.len(), 1 << 13, "not beyond");
        assert!(bytes[2048..].iter().all(|byte| *byte == 0));
    }
}
