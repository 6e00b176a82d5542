//! The engine on a simulated disk, all its threads driven by the test.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use smallvec::smallvec;

use super::control::Control;
use super::*;
use crate::format::{ClusterSize, Header, Sector};
use crate::sim::disk::{Medium, SimDisk};
use crate::storage::{Disk, FileId, Segments};

mod close;
mod compact;
mod copies;
mod failed_pages;
mod grow;
mod lost_copy;
mod plain;
mod queues;
mod reuse;
mod space;
mod take_over;
mod threads;
mod tracking;
mod writeback;

const CLUSTER: u64 = 32 << 10;

/// An engine, its queues, and the memory of their client. The actors can be driven
/// by whoever has a share of it: also while another one of them is in the midst of a
/// step and preempted.
struct Rig {
    disk: SimDisk,
    engine: Arc<Engine<SimDisk>>,
    runners: Vec<RefCell<Runner<SimDisk>>>,
    md: RefCell<MdWriter<SimDisk>>,
    queues: Vec<RefCell<Queue<SimDisk>>>,
    /// Memory of requests, kept until the end.
    memory: RefCell<Vec<Box<[u8]>>>,
    done: RefCell<Vec<Done>>,
    now: Cell<Duration>,
    next_tag: Cell<u64>,
}

/// An image for a disk of so many bytes, and nothing in it.
fn empty_image(medium: Medium, files: usize, bytes: u64) -> SimDisk {
    empty_image_on(SimDisk::new(files, medium, 1), files, bytes)
}

fn empty_image_on(disk: SimDisk, files: usize, bytes: u64) -> SimDisk {
    let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
    let header = Header::new(Sector(bytes / 512), cluster).unwrap();
    for file in (0..files as u8).map(FileId) {
        disk.set_len(file, header.geometry().data_start).unwrap();
        disk.write_all_at(file, &header.to_bytes(), 0).unwrap();
        disk.sync(file).unwrap();
    }
    disk
}

fn options() -> Options {
    Options {
        preallocation: 8 * CLUSTER,
        ..Options::default()
    }
}

impl Rig {
    fn open(disk: &SimDisk, levels: usize, options: Options) -> Self {
        Self::open_chain(disk, vec![Level::Ploop; levels], options)
    }

    fn open_chain(disk: &SimDisk, levels: Vec<Level>, options: Options) -> Self {
        let chain = Chain { levels };
        Self::of(disk, Engine::open(disk.clone(), &chain, options).unwrap())
    }

    fn of(disk: &SimDisk, opened: Opened<SimDisk>) -> Self {
        let Opened {
            engine,
            runners,
            md,
        } = opened;
        Self {
            disk: disk.clone(),
            queues: vec![RefCell::new(engine.queue().unwrap())],
            engine,
            runners: runners.into_iter().map(RefCell::new).collect(),
            md: RefCell::new(md),
            memory: RefCell::default(),
            done: RefCell::default(),
            now: Cell::default(),
            next_tag: Cell::default(),
        }
    }

    fn new(bytes: u64) -> Self {
        Self::open(&empty_image(Medium::default(), 1, bytes), 1, options())
    }

    /// The same with one more queue.
    fn and_a_queue(mut self) -> Self {
        let queue = self.engine.queue().unwrap();
        self.queues.push(RefCell::new(queue));
        self
    }

    fn poll_queue(&self, queue: usize) {
        if let Ok(mut queue) = self.queues[queue].try_borrow_mut() {
            queue.submit();
            queue.poll(&mut self.done.borrow_mut());
        }
    }

    fn poll_runners(&self) {
        for runner in &self.runners {
            if let Ok(mut runner) = runner.try_borrow_mut() {
                runner.poll(self.now.get());
            }
        }
    }

    fn poll_md(&self) {
        if let Ok(mut md) = self.md.try_borrow_mut() {
            md.poll(self.now.get());
        }
    }

    fn step_disk(&self) {
        if self.disk.is_busy() {
            self.disk.step();
        }
        self.now.set(self.now.get() + Duration::from_millis(1));
    }

    /// Lets every thread that is not preempted have its turn.
    fn turn(&self) {
        (0..self.queues.len()).for_each(|queue| self.poll_queue(queue));
        self.poll_runners();
        self.poll_md();
        self.step_disk();
    }

    fn segments(&self, bytes: &[u8]) -> Segments {
        let mut memory: Box<[u8]> = bytes.into();
        let mut segments = Segments::new();
        // SAFETY: the box lives until the rig is dropped, after its queues, and is
        // not touched but by `read`, when the request has ended.
        unsafe { segments.push(memory.as_mut_ptr(), memory.len()) };
        self.memory.borrow_mut().push(memory);
        segments
    }

    fn push(&self, command: Command) -> u64 {
        self.push_to(0, command)
    }

    fn push_to(&self, queue: usize, command: Command) -> u64 {
        let tag = self.next_tag.get() + 1;
        self.next_tag.set(tag);
        let mut queue = self.queues[queue].borrow_mut();
        queue.push(Request { tag, command });
        queue.submit();
        tag
    }

    fn push_write_to(&self, queue: usize, start: u64, bytes: &[u8]) -> u64 {
        let data = self.segments(bytes);
        let start = Sector(start / 512);
        self.push_to(queue, Command::Write { start, data })
    }

    /// How a request has ended, if it has.
    fn ended(&self, tag: u64) -> Option<Result<(), EngineError>> {
        let mut done = self.done.borrow_mut();
        let at = done.iter().position(|done| done.tag == tag)?;
        Some(done.remove(at).result)
    }

    /// Has `turn` done until the request has ended.
    fn result_by(&self, tag: u64, turn: impl Fn(&Self)) -> Result<(), EngineError> {
        for _ in 0..100_000 {
            if let Some(result) = self.ended(tag) {
                return result;
            }
            turn(self);
        }
        panic!("request {tag} did not end");
    }

    fn result(&self, tag: u64) -> Result<(), EngineError> {
        self.result_by(tag, Self::turn)
    }

    fn run(&self, command: Command) -> Result<(), EngineError> {
        let tag = self.push(command);
        self.result(tag)
    }

    fn write(&self, start: u64, bytes: &[u8]) -> Result<(), EngineError> {
        let tag = self.push_write_to(0, start, bytes);
        self.result(tag)
    }

    fn read(&self, start: u64, len: usize) -> Vec<u8> {
        let data = self.segments(&vec![0xee; len]);
        let start = Sector(start / 512);
        self.run(Command::Read { start, data }).unwrap();
        self.memory.borrow_mut().pop().unwrap().into()
    }

    fn discard(&self, start: u64, len: u64) -> Result<(), EngineError> {
        let ranges = smallvec![range(start, len)];
        self.run(Command::Discard { ranges })
    }

    fn zero(&self, start: u64, len: u64, unmap: bool) -> Result<(), EngineError> {
        let ranges = smallvec![range(start, len)];
        self.run(Command::WriteZeroes { ranges, unmap })
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.run(Command::Flush)
    }

    fn control(&self, what: Control) -> Result<(), EngineError> {
        let outcome = self.engine.control(what);
        for _ in 0..100_000 {
            if let Some(result) = outcome.get() {
                return result;
            }
            self.turn();
        }
        panic!("{what:?} did not end");
    }

    /// Closes the image and opens it again.
    fn reopen(self) -> Self {
        self.control(Control::Close).unwrap();
        let levels = self.engine.levels.len();
        Self::open(&self.disk.clone(), levels, options())
    }

    /// The power goes and comes back; what is left is opened.
    fn cut(&self) -> Self {
        self.disk.power_off();
        self.engine.abandon();
        self.disk.power_on();
        Self::open(&self.disk, self.engine.levels.len(), options())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.engine.abandon();
        if !thread::panicking() {
            assert_eq!(self.disk.take_violations(), [""; 0]);
        }
    }
}

fn range(start: u64, len: u64) -> SectorRange {
    SectorRange {
        start: Sector(start / 512),
        count: Sector(len / 512),
    }
}

#[test]
fn what_is_written_is_read_also_after_reopening() {
    let rig = Rig::new(64 * CLUSTER + 512);
    assert_eq!(rig.read(0, 4096), [0; 4096]);
    rig.write(CLUSTER - 1024, &[7; 4096]).unwrap();
    rig.write(64 * CLUSTER, &[9; 512]).unwrap();
    let rig = rig.reopen();
    assert_eq!(rig.read(CLUSTER - 1024, 4096), [7; 4096]);
    assert_eq!(rig.read(CLUSTER + 3072, 512), [0; 512]);
    assert_eq!(rig.read(64 * CLUSTER, 512), [9; 512]);
}

#[test]
fn zeros_into_a_hole_allocate_nothing() {
    let rig = Rig::new(8 * CLUSTER);
    let before = rig.disk.live_len(FileId(0));
    rig.write(0, &[0; 8192]).unwrap();
    assert_eq!(rig.disk.live_len(FileId(0)), before);
}

#[test]
fn a_bat_that_is_longer_than_is_read_at_once_is_read_to_its_end() {
    const CLUSTERS: u64 = 300_000;
    // Some of them have their entries around the end of the first MiB.
    let clusters = [0, 262_127, 262_128, CLUSTERS - 1];
    let rig = Rig::new(CLUSTERS * CLUSTER);
    for (byte, cluster) in (1..).zip(clusters) {
        rig.write(cluster * CLUSTER, &[byte; 512]).unwrap();
    }
    let rig = rig.reopen();
    for (byte, cluster) in (1..).zip(clusters) {
        assert_eq!(rig.read(cluster * CLUSTER, 512), [byte; 512]);
    }
}

#[test]
fn requests_beyond_the_end_fail_and_the_next_one_works() {
    let rig = Rig::new(2 * CLUSTER);
    let error = rig.write(2 * CLUSTER - 512, &[1; 1024]).unwrap_err();
    assert_eq!(
        error,
        EngineError::PastEnd {
            start: 127,
            count: 2
        }
    );
    let data = rig.segments(&[1; 100]);
    let start = Sector(0);
    let error = rig.run(Command::Write { start, data }).unwrap_err();
    assert_eq!(error, EngineError::PartialSector(100));
    let ranges = smallvec![SectorRange {
        start: Sector(u64::MAX),
        count: Sector(2),
    }];
    assert!(rig.run(Command::Discard { ranges }).is_err());
    rig.write(0, &[1; 512]).unwrap();
}

#[test]
fn discarded_clusters_read_as_zeros_and_are_used_again() {
    let rig = Rig::new(8 * CLUSTER);
    for round in 1..20 {
        rig.write(0, &vec![round; 4 * CLUSTER as usize]).unwrap();
        rig.discard(0, 4 * CLUSTER).unwrap();
        assert_eq!(rig.read(CLUSTER, 512), [0; 512]);
        rig.flush().unwrap();
    }
    let header = CLUSTER;
    assert!(rig.disk.live_len(FileId(0)) <= header + 16 * CLUSTER);
}

#[test]
fn parts_of_clusters_are_zeroed_in_place() {
    let rig = Rig::new(4 * CLUSTER);
    rig.write(0, &vec![5; 2 * CLUSTER as usize]).unwrap();
    rig.zero(512, CLUSTER, true).unwrap();
    assert_eq!(rig.read(0, 512), [5; 512]);
    assert_eq!(rig.read(512, CLUSTER as usize), vec![0; CLUSTER as usize]);
    assert_eq!(rig.read(CLUSTER + 512, 512), [5; 512]);
    rig.zero(CLUSTER, CLUSTER, false).unwrap();
    assert_eq!(
        rig.read(CLUSTER, CLUSTER as usize),
        vec![0; CLUSTER as usize]
    );
}

/// What it leaves of the range is as it was: to zero it would be work for nothing.
#[test]
fn a_discard_of_a_part_of_a_cluster_takes_whole_host_blocks() {
    const BLOCK: u64 = 4096;
    for (start, end, gone) in [
        (512, 3 * BLOCK - 512, BLOCK..2 * BLOCK),
        (BLOCK, 3 * BLOCK, BLOCK..3 * BLOCK),
        (BLOCK - 512, 2 * BLOCK, BLOCK..2 * BLOCK),
        (BLOCK, 2 * BLOCK + 512, BLOCK..2 * BLOCK),
        (BLOCK + 512, 2 * BLOCK, 0..0),
        (BLOCK, 2 * BLOCK - 512, 0..0),
        (BLOCK - 512, BLOCK + 512, 0..0),
    ] {
        let rig = Rig::new(4 * CLUSTER);
        let mut expected = vec![5; CLUSTER as usize];
        rig.write(0, &expected).unwrap();
        rig.discard(start, end - start).unwrap();
        expected[gone.start as usize..gone.end as usize].fill(0);
        assert!(rig.read(0, CLUSTER as usize) == expected, "{start}..{end}");
    }
}

#[test]
fn a_flush_with_nothing_to_do_asks_nobody() {
    let rig = Rig::new(4 * CLUSTER);
    rig.write(0, &[5; 512]).unwrap();
    rig.flush().unwrap();
    let tag = rig.push(Command::Flush);
    // It has ended, and is there until it is given out.
    assert_eq!(rig.queues[0].borrow().in_flight(), 1);
    rig.poll_queue(0);
    assert_eq!(rig.queues[0].borrow().in_flight(), 0);
    assert_eq!(rig.ended(tag), Some(Ok(())));
}

#[test]
fn write_through_makes_stable_before_completion() {
    let rig = Rig::new(4 * CLUSTER);
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[5; 512]).unwrap();
    rig.write(512, &[6; 512]).unwrap();
    let rig = rig.cut();
    assert_eq!(rig.read(0, 512), [5; 512]);
    assert_eq!(rig.read(512, 512), [6; 512]);
}

#[test]
fn turning_the_cache_off_makes_stable_what_has_completed() {
    let turn_off = |rig: &Rig| {
        let engine = rig.engine.clone();
        let turned = thread::spawn(move || engine.set_write_through(true));
        while !turned.is_finished() {
            rig.turn();
        }
        assert!(rig.engine.is_write_through());
        turned.join().unwrap()
    };
    let rig = Rig::new(4 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    assert_eq!(turn_off(&rig), Ok(()));
    assert_eq!(rig.cut().read(0, 512), [1; 512]);

    let rig = Rig::new(4 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    rig.disk.change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(turn_off(&rig), Err(EngineError::SyncFailed));
}

#[test]
fn when_the_cache_has_been_turned_off_an_overwrite_is_one_stable_write() {
    let rig = Rig::new(4 * CLUSTER);
    rig.write(0, &[5; 4096]).unwrap();
    let flush = rig.engine.begin_write_through(true).expect("a flush");
    while flush.get().is_none() {
        rig.turn();
    }
    assert_eq!(flush.get(), Some(Ok(())));
    rig.disk.start_trace();
    rig.write(0, &[6; 4096]).unwrap();
    let trace = rig.disk.take_trace();
    let started = trace.iter().filter(|line| line.contains(" starts "));
    let started: Vec<_> = started.collect();
    assert_eq!(started.len(), 1, "{trace:?}");
    assert!(started[0].ends_with("dsync true"), "{trace:?}");
}

/// Its error could be the only word of what another write lost.
#[test]
fn where_only_one_may_sync_an_overwrite_is_made_stable_by_the_metadata_thread() {
    let medium = Medium {
        has_stable_writes: false,
        ..Medium::default()
    };
    let rig = Rig::open(&empty_image(medium, 1, 4 * CLUSTER), 1, options());
    rig.write(0, &[5; 4096]).unwrap();
    rig.flush().unwrap();
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.disk.start_trace();
    rig.write(0, &[6; 4096]).unwrap();
    let trace = rig.disk.take_trace();
    let started = trace.iter().filter(|line| line.contains(" starts "));
    let [write, sync] = started.collect::<Vec<_>>()[..] else {
        panic!("{trace:?}");
    };
    assert!(write.ends_with("dsync false"), "{trace:?}");
    assert!(sync.contains("Sync"), "{trace:?}");
    let rig = rig.cut();
    assert_eq!(rig.read(0, 4096), [6; 4096]);
}

#[test]
fn a_stable_write_whose_sync_fails_fails_all_that_would_be_stable() {
    let rig = Rig::new(4 * CLUSTER);
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[5; 512]).unwrap();
    rig.disk.change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(rig.write(0, &[6; 512]), Err(EngineError::SyncFailed));
    rig.disk.change_medium(|medium| medium.faults.sync = 0.0);
    assert_eq!(rig.write(512, &[7; 512]), Err(EngineError::SyncFailed));
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
    assert_eq!(rig.read(512, 512), [7; 512]);
}

#[test]
fn a_stable_write_whose_sync_finds_no_space_fails_all_that_would_be_stable() {
    let rig = Rig::new(4 * CLUSTER);
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[5; 512]).unwrap();
    rig.disk
        .change_medium(|medium| medium.faults.full_stable_write = 1.0);
    assert_eq!(rig.write(0, &[6; 512]), Err(EngineError::SyncFailed));
    assert!(rig.engine.stable_writes.is_empty());
    rig.disk
        .change_medium(|medium| medium.faults.full_stable_write = 0.0);
    assert_eq!(rig.write(512, &[7; 512]), Err(EngineError::SyncFailed));
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
    assert_eq!(rig.read(512, 512), [7; 512]);
}

#[test]
fn a_stable_write_that_fails_by_itself_concerns_nobody_else() {
    let rig = Rig::new(4 * CLUSTER);
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[5; 512]).unwrap();
    rig.disk.change_medium(|medium| medium.faults.write = 1.0);
    assert_eq!(rig.write(0, &[6; 512]), Err(EngineError::Io(Errno::IO)));
    rig.disk.change_medium(|medium| medium.faults.write = 0.0);
    rig.write(512, &[7; 512]).unwrap();
    rig.flush().unwrap();
    assert_eq!(rig.read(512, 512), [7; 512]);
}

/// Its sync may have lost what the flush is to cover, and the flush's own would not tell.
#[test]
fn a_flush_waits_until_it_is_known_what_has_failed_of_a_stable_write() {
    let rig = Rc::new(Rig::new(4 * CLUSTER).and_a_queue());
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[5; 512]).unwrap();
    rig.disk
        .change_medium(|medium| medium.faults.stable_write = 1.0);
    let write = rig.push_write_to(1, 0, &[6; 512]);
    while rig.disk.is_busy() {
        rig.step_disk();
    }
    rig.disk
        .change_medium(|medium| medium.faults.stable_write = 0.0);
    // It hears of the failure, and tries again.
    rig.poll_queue(1);
    rig.engine.uncover();
    let flush = rig.push(Command::Flush);
    let sync = |rig: &Rig| {
        for _ in 0..200 {
            rig.poll_md();
            rig.step_disk();
        }
    };
    sync(&rig);
    rig.poll_queue(0);
    assert_eq!((rig.ended(write), rig.ended(flush)), (None, None));
    // The metadata thread goes on the moment that it may.
    let others = rig.clone();
    let hook = preempt::once("stable write ended", move || sync(&others));
    rig.poll_queue(1);
    drop(hook);
    rig.poll_queue(0);
    let failed = Err(EngineError::SyncFailed);
    assert_eq!(rig.ended(flush), Some(failed));
    assert_eq!(rig.result(write), failed);
}

/// That it could not be written the second time says nothing about the first.
#[test]
fn a_stable_write_that_fails_for_another_reason_the_second_time_was_a_failed_sync() {
    let rig = Rig::new(4 * CLUSTER);
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[5; 512]).unwrap();
    rig.disk
        .change_medium(|medium| medium.faults.full_stable_write = 1.0);
    let write = rig.push_write_to(0, 0, &[6; 512]);
    while rig.disk.take_failures() == 0 {
        rig.step_disk();
    }
    rig.poll_queue(0);
    rig.disk.change_medium(|medium| medium.faults.write = 1.0);
    assert_eq!(rig.result(write), Err(EngineError::SyncFailed));
    rig.disk
        .change_medium(|medium| medium.faults = crate::sim::disk::Faults::default());
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
}

#[test]
fn misaligned_writes_are_read_modify_writes() {
    let medium = Medium {
        write_alignment: 4096,
        ..Medium::default()
    };
    let disk = empty_image(medium, 1, 4 * CLUSTER);
    let rig = Rig::open(&disk, 1, options());
    rig.write(512, &[1; 512]).unwrap();
    rig.write(4096, &[2; 4096]).unwrap();
    rig.write(3584, &[3; 1024]).unwrap();
    let mut expected = [0; 8192];
    expected[512..1024].fill(1);
    expected[4096..].fill(2);
    expected[3584..4608].fill(3);
    assert_eq!(rig.read(0, 8192), expected);
}

#[test]
fn a_write_over_a_lower_delta_copies_the_cluster() {
    let disk = empty_image(Medium::default(), 2, 4 * CLUSTER);
    let base = Rig::open(&disk, 1, options());
    base.write(0, &vec![1; 2 * CLUSTER as usize]).unwrap();
    base.control(Control::Close).unwrap();
    let lower = disk.snapshot(FileId(0)).len();

    let rig = Rig::open(&disk, 2, options());
    assert_eq!(rig.read(512, 512), [1; 512]);
    rig.write(1024, &[2; 512]).unwrap();
    rig.write(CLUSTER, &vec![3; CLUSTER as usize]).unwrap();
    rig.discard(2 * CLUSTER, CLUSTER).unwrap();
    let rig = rig.reopen();
    let mut expected = vec![1; CLUSTER as usize];
    expected[1024..1536].fill(2);
    assert_eq!(rig.read(0, CLUSTER as usize), expected);
    assert_eq!(
        rig.read(CLUSTER, CLUSTER as usize),
        vec![3; CLUSTER as usize]
    );
    rig.discard(0, CLUSTER).unwrap();
    assert_eq!(rig.read(0, CLUSTER as usize), vec![0; CLUSTER as usize]);
    assert_eq!(disk.live_len(FileId(0)), lower);
}

#[test]
fn a_full_host_parks_writes_until_there_is_space() {
    let medium = Medium {
        capacity: Some(8 * CLUSTER / 4096),
        ..Medium::default()
    };
    let disk = empty_image(medium, 1, 64 * CLUSTER);
    let rig = Rig::open(&disk, 1, options());
    let mut tags = Vec::new();
    for cluster in 0..16 {
        let data = rig.segments(&vec![cluster as u8 + 1; CLUSTER as usize]);
        let start = Sector(cluster * CLUSTER / 512);
        tags.push(rig.push(Command::Write { start, data }));
    }
    for _ in 0..3000 {
        rig.turn();
    }
    assert!(rig.queues[0].borrow().in_flight() > 0);
    rig.read(0, 512);
    disk.change_medium(|medium| medium.capacity = None);
    for tag in tags {
        rig.result(tag).unwrap();
    }
    let rig = rig.reopen();
    for cluster in 0..16 {
        assert_eq!(rig.read(cluster * CLUSTER, 512), [cluster as u8 + 1; 512]);
    }
}

#[test]
fn suspension_holds_requests_and_resuming_does_them() {
    let rig = Rig::new(4 * CLUSTER);
    rig.write(0, &[5; 512]).unwrap();
    rig.control(Control::Suspend).unwrap();
    let data = rig.segments(&[6; 512]);
    let start = Sector(0);
    let tag = rig.push(Command::Write { start, data });
    for _ in 0..100 {
        rig.turn();
    }
    assert!(rig.done.borrow().is_empty());
    {
        let queue = rig.queues[0].borrow();
        assert_eq!((queue.in_flight(), queue.held()), (1, 1));
    }
    rig.control(Control::Resume).unwrap();
    rig.result(tag).unwrap();
    assert_eq!(rig.queues[0].borrow().in_flight(), 0);
    assert_eq!(rig.read(0, 512), [6; 512]);
}

#[test]
fn a_queue_that_sleeps_is_woken_by_the_end_of_a_suspension() {
    let rig = Rig::new(4 * CLUSTER);
    rig.control(Control::Suspend).unwrap();
    let write = rig.push_write_to(0, 0, &[6; 512]);
    rig.poll_queue(0);
    assert!(rig.queues[0].borrow_mut().may_sleep());
    let resumed = rig.engine.control(Control::Resume);
    while resumed.get().is_none() {
        rig.poll_md();
    }
    assert!(!rig.queues[0].borrow().is_asleep());
    rig.result(write).unwrap();
}

#[test]
fn a_runner_is_not_idle_before_it_has_looked_at_what_was_posted() {
    let rig = Rig::new(4 * CLUSTER);
    let are_idle = || rig.runners.iter().all(|runner| runner.borrow().is_idle());
    assert!(are_idle());
    let write = rig.push(Command::WriteZeroes {
        ranges: smallvec![range(512, 512)],
        unmap: false,
    });
    assert!(!are_idle());
    rig.result(write).unwrap();
    assert!(are_idle());
}

/// The mapping on disk may still have what the discard has taken away in memory.
#[test]
fn stable_zeros_into_a_hole_wait_for_the_hole_to_be_stable() {
    let rig = Rig::new(4 * CLUSTER);
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[5; 4096]).unwrap();
    let ranges = smallvec![range(0, CLUSTER)];
    let discard = rig.push(Command::Discard { ranges });
    let without_md = || {
        rig.poll_queue(0);
        rig.poll_runners();
        rig.step_disk();
    };
    (0..50).for_each(|_| without_md());
    assert!(rig.engine.mapped_here().is_empty());
    let zeros = rig.push_write_to(0, 0, &[0; 4096]);
    (0..50).for_each(|_| without_md());
    assert_eq!((rig.ended(discard), rig.ended(zeros)), (None, None));
    rig.result(zeros).unwrap();
    assert_eq!(rig.cut().read(0, 4096), [0; 4096]);
}

#[test]
fn a_file_that_is_shorter_than_its_header_is_said_to_be() {
    let disk = SimDisk::new(1, Medium::default(), 1);
    let levels = vec![Level::Ploop];
    let opened = Engine::open(disk, &Chain { levels }, options());
    let Err(OpenError::Truncated { needed, len, .. }) = opened else {
        panic!("it was opened, or refused for another reason");
    };
    assert_eq!((needed, len), (64, 0));
}

#[test]
fn closing_cuts_the_tail_and_clears_the_mark() {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &[5; 512]).unwrap();
    assert!(rig.disk.live_len(FileId(0)) > 2 * CLUSTER);
    rig.control(Control::Close).unwrap();
    assert_eq!(rig.disk.live_len(FileId(0)), 2 * CLUSTER);
    assert_eq!(rig.disk.read_live(FileId(0), 44, 4), [0; 4]);
}

#[test]
fn closing_cuts_the_tail_of_a_top_that_is_shorter_than_what_is_below() {
    let disk = empty_image(Medium::default(), 2, 16 * CLUSTER);
    let base = Rig::open(&disk, 1, options());
    base.write(0, &vec![1; 12 * CLUSTER as usize]).unwrap();
    base.control(Control::Close).unwrap();
    let rig = Rig::open(&disk, 2, options());
    rig.write(0, &[5; 512]).unwrap();
    assert!(disk.live_len(FileId(1)) > 2 * CLUSTER);
    rig.control(Control::Close).unwrap();
    assert_eq!(disk.live_len(FileId(1)), 2 * CLUSTER);
    assert_eq!(disk.live_len(FileId(0)), 13 * CLUSTER);
}

#[test]
fn leaked_clusters_are_used_before_the_file_grows() {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &vec![5; 8 * CLUSTER as usize]).unwrap();
    rig.discard(0, 6 * CLUSTER).unwrap();
    let rig = rig.reopen();
    let before = rig.disk.live_len(FileId(0));
    rig.write(8 * CLUSTER, &[6; 512]).unwrap();
    assert_eq!(rig.read(8 * CLUSTER + 512, 512), [0; 512]);
    assert_eq!(rig.disk.live_len(FileId(0)), before);
}

#[test]
fn a_zeroing_that_finds_no_space_is_done_later() {
    for unmap in [false, true] {
        let rig = Rig::new(16 * CLUSTER);
        rig.write(0, &[7; 16384]).unwrap();
        rig.disk
            .change_medium(|medium| medium.next_zero_is_full = true);
        rig.zero(0, 8192, unmap).unwrap();
        assert_eq!(rig.read(0, 8192), [0; 8192]);
        assert_eq!(rig.read(8192, 8192), [7; 8192]);
    }
}

/// An image of one page whose data area begins with the tenth cluster.
fn image_without_data_area(medium: Medium) -> SimDisk {
    let disk = SimDisk::new(1, medium, 1);
    let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
    let header = Header::new(Sector(16 * CLUSTER / 512), cluster).unwrap();
    let mut bytes = header.to_bytes();
    bytes[48..52].copy_from_slice(&((10 * CLUSTER / 512) as u32).to_le_bytes());
    disk.set_len(FileId(0), 4096).unwrap();
    disk.write_all_at(FileId(0), &bytes, 0).unwrap();
    disk.sync(FileId(0)).unwrap();
    disk
}

#[test]
fn a_file_that_ends_before_its_data_area_is_made_whole() {
    let disk = image_without_data_area(Medium::default());
    let rig = Rig::open(&disk, 1, options());
    rig.write(0, &[7; 4096]).unwrap();
    rig.flush().unwrap();
    let rig = rig.reopen();
    assert_eq!(rig.read(0, 4096), [7; 4096]);
}

#[test]
fn an_image_whose_file_cannot_be_made_whole_is_refused_and_not_changed() {
    let disk = image_without_data_area(Medium {
        len_max: 10 * CLUSTER - 1,
        ..Medium::default()
    });
    let before = disk.read_live(FileId(0), 0, 4096);
    let levels = vec![Level::Ploop];
    let error = Engine::open(disk.clone(), &Chain { levels }, options()).err();
    assert!(matches!(error, Some(OpenError::Io { .. })), "{error:?}");
    assert_eq!(disk.live_len(FileId(0)), 4096);
    assert!(disk.read_live(FileId(0), 0, 4096) == before);
    assert!(!disk.is_unsynced());
}

#[test]
fn parked_writes_stay_parked_while_the_engine_is_suspended() {
    let medium = Medium {
        capacity: Some(4 * CLUSTER / 4096),
        ..Medium::default()
    };
    let disk = empty_image(medium, 1, 64 * CLUSTER);
    let rig = Rig::open(&disk, 1, options());
    let data = rig.segments(&vec![1; 8 * CLUSTER as usize]);
    let start = Sector(0);
    let tag = rig.push(Command::Write { start, data });
    for _ in 0..3000 {
        rig.turn();
    }
    rig.control(Control::Suspend).unwrap();
    disk.change_medium(|medium| medium.capacity = None);
    for _ in 0..3000 {
        rig.turn();
    }
    assert!(rig.done.borrow().is_empty());
    rig.control(Control::Resume).unwrap();
    rig.result(tag).unwrap();
    assert_eq!(rig.read(7 * CLUSTER, 512), [1; 512]);
}

#[test]
fn a_file_with_room_for_the_whole_disk_does_not_grow() {
    const CLUSTERS: u64 = 32;
    let rig = Rig::new(CLUSTERS * CLUSTER);
    for cluster in 0..CLUSTERS {
        rig.write(cluster * CLUSTER, &[5; 512]).unwrap();
    }
    for _ in 0..100 {
        rig.turn();
    }
    let first = rig.engine.geometry().first_host_cluster();
    let in_file = rig.engine.alloc().end() - first.0;
    assert!(u64::from(in_file) <= CLUSTERS + 1, "{in_file} clusters");
}

#[test]
fn pios_of_a_cluster_go_to_the_same_runner() {
    let rig = Rig::new(1024 * CLUSTER);
    rig.turn();
    let mut used = vec![false; rig.runners.len()];
    assert!(used.len() > 1);
    for cluster in (0..1024).step_by(37) {
        // Both are for runners, and neither has run when the second is pushed.
        for part in [512, 4096] {
            let ranges = smallvec![range(cluster * CLUSTER + part, 512)];
            let unmap = false;
            rig.push(Command::WriteZeroes { ranges, unmap });
        }
        let woken = |runner: &RefCell<Runner<SimDisk>>| !runner.borrow().is_asleep();
        let woken: Vec<bool> = rig.runners.iter().map(woken).collect();
        assert_eq!(woken.iter().filter(|is| **is).count(), 1, "{cluster}");
        for (used, woken) in used.iter_mut().zip(woken) {
            *used |= woken;
        }
        for _ in 0..50 {
            rig.turn();
        }
    }
    assert!(used.iter().all(|used| *used), "{used:?}");
}
