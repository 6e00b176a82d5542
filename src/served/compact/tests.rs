//! The job step by step, on a disk that does what it is told.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::*;
use crate::format::{Header, HostCluster};
use crate::ploop::{Level, Running};
use crate::served::tests::{CLUSTER, OLD, Rig, TOP, clusters, options};
use crate::sim::disk::{Medium, SimDisk};

/// So many clusters are mapped, to where there are as many others in front of each.
const MAPPED: u32 = 12;

/// A disk whose clusters have bytes that are not zero, unless they are among `zeros`.
fn rig(zeros: &[u32]) -> Rig {
    rig_at(MAPPED..2 * MAPPED, zeros)
}

/// The same, with its clusters at these places of the data area.
fn rig_at(places: impl ExactSizeIterator<Item = u32>, zeros: &[u32]) -> Rig {
    let size = OLD.max(clusters(places.len() as u64));
    let header = Header::new(size, CLUSTER).unwrap();
    let geometry = *header.geometry();
    let first = geometry.first_host_cluster().0;
    let disk = SimDisk::new(1, Medium::default(), 1);
    let mut bytes = header.to_bytes().to_vec();
    for (cluster, place) in (0..).zip(places) {
        let host = HostCluster(first + place);
        bytes.extend(geometry.bat_value(host).to_le_bytes());
        let half = CLUSTER.bytes() as usize / 2;
        let second = u8::from(!zeros.contains(&cluster));
        let content = [vec![7; half], vec![second; half]].concat();
        disk.prepare(TOP, geometry.host_offset(host), &content);
    }
    bytes.resize(geometry.metadata_len() as usize, 0);
    disk.prepare(TOP, 0, &bytes);
    Rig::serve(disk, Level::Ploop, size, options())
}

/// Steps until it is over. How often the host was full.
fn run(rig: &Rig, job: &mut Compaction) -> usize {
    let mut full = 0;
    for _ in 0..100_000 {
        match step(rig, job).unwrap() {
            Step::Done => return full,
            Step::HostFull => full += 1,
            Step::More { .. } | Step::Later => {}
        }
    }
    panic!("it does not end");
}

fn step(rig: &Rig, job: &mut Compaction) -> Result<Step, JobError> {
    step_within(rig, job, u64::MAX)
}

fn step_within(rig: &Rig, job: &mut Compaction, at_most: u64) -> Result<Step, JobError> {
    job.step(&mut Site {
        engine: rig.engine(),
        bundle: None,
        at_most,
    })
}

fn clusters_in_file(rig: &Rig) -> u64 {
    rig.disk.live_len(TOP) / CLUSTER.bytes()
}

#[test]
fn what_lies_behind_gaps_moves_in_as_many_rounds_as_that_takes() {
    let rig = rig(&[]);
    let mut job = Compaction::new();
    job.found_at_once = 1;
    assert_eq!(run(&rig, &mut job), 0);
    assert_eq!(clusters_in_file(&rig), 1 + u64::from(MAPPED));
    let Progress { done, total } = <Compaction as Job<SimDisk>>::progress(&job);
    assert_eq!((done, total), (24 * CLUSTER.bytes(), 24 * CLUSTER.bytes()));
}

/// They come back to the allocator a few at a time, and no sooner than the compaction begins.
#[test]
fn gaps_are_filled_however_many_there_are() {
    const GAPS: u32 = 1000;
    let rig = rig_at((0..GAPS).map(|cluster| 2 * cluster + 1), &[]);
    let first = rig.engine().geometry().first_host_cluster().0;
    assert_eq!(run(&rig, &mut Compaction::new()), 0);
    assert_eq!(clusters_in_file(&rig), u64::from(first + GAPS));
}

#[test]
fn a_step_reads_and_moves_no_more_than_it_may() {
    let rig = rig(&[]);
    let mut job = Compaction::new();
    let mut moved = 0;
    // What may be moved becomes more while a batch is under way, and less.
    for at_most in (0..4).cycle().take(100_000) {
        let before = matches!(job.stage, Stage::Move { .. });
        match step_within(&rig, &mut job, at_most * CLUSTER.bytes()).unwrap() {
            Step::Done => break,
            Step::More { bytes } => {
                assert!(bytes <= 3 * CLUSTER.bytes(), "{bytes}");
                moved += if before { bytes } else { 0 };
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(clusters_in_file(&rig), 1 + u64::from(MAPPED));
    assert!(moved >= u64::from(MAPPED) * CLUSTER.bytes(), "{moved}");
    let Progress { done, total } = <Compaction as Job<SimDisk>>::progress(&job);
    assert_eq!(done, total);
}

#[test]
fn rounds_end_when_they_gain_too_little() {
    let search = Search {
        passes: 0,
        at_most: usize::MAX,
    };
    assert!(search.next(0, 0).is_none());
    let full = search.next(100, 1000).unwrap();
    assert!(full.next(100, 950).is_some_and(|next| next.passes == 0));
    assert!(full.next(100, 951).is_none(), "half of them did not move");
    let mut all = search.next(100, 100).unwrap();
    assert!(all.next(100, 100).is_none());
    for count in (90..100).rev().take(PASSES as usize - 1) {
        all = all.next(count, count).unwrap();
    }
    assert!(all.next(1, 1).is_none(), "there are always others");
}

/// It is done at once, or the disk would have to go on for that.
fn step_in_time(rig: &Rig, job: &mut Compaction) -> Result<Step, JobError> {
    thread::scope(|scope| {
        let (tell, told) = channel();
        scope.spawn(move || tell.send(step(rig, job)));
        let stepped = told.recv_timeout(Duration::from_secs(10));
        // Else nothing here would end.
        rig.goes_on.store(true, Ordering::Release);
        match stepped {
            Err(RecvTimeoutError::Timeout) => panic!("nobody can call it off"),
            stepped => stepped.unwrap(),
        }
    })
}

#[test]
fn cutting_and_moving_can_be_called_off_however_long_they_take() {
    for moves in [false, true] {
        let rig = rig(&[]);
        let mut job = Compaction::new();
        let is_it = |job: &Compaction| match &job.stage {
            Stage::Cut { .. } => !moves,
            Stage::Move { .. } => moves,
            _ => false,
        };
        while !is_it(&job) {
            step(&rig, &mut job).unwrap();
        }
        rig.goes_on.store(false, Ordering::Release);
        let stepped = step_in_time(&rig, &mut job);
        assert!(matches!(stepped, Ok(Step::More { bytes: 0 })));
        job.cancel(&mut Site {
            engine: rig.engine(),
            bundle: None,
            at_most: u64::MAX,
        });
        // Nothing is left under way that another operation would meet.
        rig.engine().prepare_growth(clusters(17)).unwrap();
        rig.engine().abandon_growth();
        assert_eq!(run(&rig, &mut Compaction::new()), 0);
        assert_eq!(clusters_in_file(&rig), 1 + u64::from(MAPPED));
    }
}

#[test]
fn a_host_that_is_full_is_waited_for_and_nothing_is_left_out() {
    let zeros = [2, 3, 7];
    let rig = rig(&zeros);
    let before = rig.disk.used_blocks();
    // Until it knows all gaps, the engine makes holes of its own.
    let engine = rig.engine();
    engine.begin();
    engine.wait_unless_held(&engine.cut_tail()).unwrap();
    let mut job = Compaction::new();
    while !matches!(job.stage, Stage::Zeros { .. }) {
        step(&rig, &mut job).unwrap();
    }
    rig.disk
        .change_medium(|medium| medium.next_zero_is_full = true);
    assert_eq!(run(&rig, &mut job), 1);
    let halves = zeros.len() as u64 * CLUSTER.bytes() / 2;
    let gained = (before - rig.disk.used_blocks()) * 4096;
    assert!(gained >= halves, "{gained} of {halves}");
    let Progress { done, total } = <Compaction as Job<SimDisk>>::progress(&job);
    assert_eq!(done, total);
}

#[test]
fn it_fails_when_the_lock_is_lost() {
    for steps in [0, 1, 4] {
        let mut rig = rig(&[]);
        let mut job = Compaction::new();
        for _ in 0..steps {
            step(&rig, &mut job).unwrap();
        }
        rig.engine().lose_lock();
        match step(&rig, &mut job) {
            Err(JobError::Engine(error)) => assert_eq!(error, EngineError::LockLost),
            other => panic!("{other:?}"),
        }
        let closed = rig.running.take().map(Running::close);
        assert!(closed.is_some_and(|closed| closed.is_err()));
        rig.is_closed = true;
    }
}
