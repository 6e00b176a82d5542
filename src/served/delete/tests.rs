//! Deletions on disks that run on files of the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use super::*;
use crate::format::Version;
use crate::image::{self, Access, OpenMode};
use crate::ploop::EngineError;
use crate::served::snapshot::tests::{CLUSTER, CLUSTERS, Rig, fill, read_all, write};

impl Rig {
    /// Has the job done, but for so many steps; gives back what the last one has come to.
    fn step(&mut self, job: &mut Deletion) -> Result<Step, JobError> {
        self.step_within(job, u64::MAX)
    }

    fn step_within(&mut self, job: &mut Deletion, at_most: u64) -> Result<Step, JobError> {
        let engine = self.engine();
        job.step(&mut Site {
            engine: &engine,
            bundle: Some(&mut self.bundle),
            at_most,
        })
    }

    fn delete(&mut self, guid: Guid) -> Result<Progress, JobError> {
        let mut job = Deletion::new(Which::Guid(guid));
        while self.step(&mut job)? != Step::Done {}
        if let Some(leftover) = job.take_deleted().and_then(|deleted| deleted.space) {
            while leftover.give_back_some().unwrap() {}
        }
        let progress = job.progress();
        assert_eq!(progress.done, progress.total);
        Ok(progress)
    }

    fn open_old_top(&self, guid: Guid) -> fs::File {
        fs::File::open(self.old_top(guid)).unwrap()
    }
}

fn check_deletions_of(mut rig: Rig) {
    let engine = rig.engine();
    fill(&engine, 1, 2);
    let first = rig.create().unwrap();
    fill(&engine, 2, 3);
    let at_second = read_all(&engine);
    let second = rig.create().unwrap();
    fill(&engine, 3, 5);
    let now = read_all(&engine);
    let file = rig.open_old_top(second);

    // The one below it stays.
    let refused = rig.delete(first);
    assert!(matches!(refused, Err(JobError::Image(_))), "{refused:?}");
    assert_eq!(rig.read_snapshot(second), at_second);
    rig.delete(second).unwrap();
    assert_eq!(read_all(&engine), now);
    assert_eq!(
        rig.files().len(),
        4,
        "two images, descriptor and notes: {:?}",
        rig.files()
    );
    let gone = file.metadata().unwrap();
    assert_eq!((gone.nlink(), gone.blocks()), (0, 0), "its space is back");
    let files: Vec<_> = engine.level_shapes().map(|level| level.file.0).collect();
    assert_eq!(files, [0, 2]);

    // Then that is the one below the top.
    rig.delete(first).unwrap();
    assert_eq!(read_all(&engine), now);
    let none = rig.delete(first);
    assert!(matches!(none, Err(JobError::Image(_))), "{none:?}");
    fill(&engine, 4, 7);
    let now = read_all(&engine);
    drop(engine);
    let mut rig = rig.serve_again();
    let engine = rig.engine();
    assert_eq!(read_all(&engine), now);

    // And so on, in this process and the next.
    for byte in 5..9 {
        let guid = rig.create().unwrap();
        fill(&engine, byte, u64::from(byte));
        let now = read_all(&engine);
        rig.delete(guid).unwrap();
        assert_eq!(read_all(&engine), now);
    }
    let now = read_all(&engine);
    drop(engine);
    let mut rig = rig.serve_again();
    assert_eq!(read_all(&rig.engine()), now);
    assert_eq!(rig.engine().level_shapes().count(), 1);
    rig.close();
}

#[test]
fn the_snapshot_below_the_top_can_be_deleted() {
    check_deletions_of(Rig::new(Version::V2));
}

#[test]
fn that_of_an_old_image_and_of_a_raw_one_too() {
    check_deletions_of(Rig::new(Version::V1));
    check_deletions_of(Rig::raw());
}

#[test]
fn a_step_copies_no_more_than_it_may() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    fill(&engine, 1, 1);
    let guid = rig.create().unwrap();
    let now = read_all(&engine);
    let mut job = Deletion::new(Which::Guid(guid));
    rig.step(&mut job).unwrap();
    let total = job.progress().total / CLUSTER.bytes();
    for (at_most, clusters) in [(0, 1), (1, 1), (3, 3), (u64::MAX / CLUSTER.bytes(), total)] {
        let before = job.progress().done;
        let step = rig.step_within(&mut job, at_most * CLUSTER.bytes());
        if matches!(step, Ok(Step::Done)) {
            break;
        }
        // Copies that a step leaves under way are those of the next one.
        let copied = (job.progress().done - before) / CLUSTER.bytes();
        assert!(copied <= clusters, "{copied} of {at_most}");
        assert!(matches!(step, Ok(Step::More { bytes }) if bytes == copied * CLUSTER.bytes()));
    }
    while rig.step(&mut job).unwrap() != Step::Done {}
    assert_eq!(read_all(&engine), now);
    drop(engine);
    rig.close();
}

#[test]
fn a_deletion_that_is_given_up_leaves_the_snapshot() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    fill(&engine, 1, 1);
    let at_first = read_all(&engine);
    let guid = rig.create().unwrap();
    fill(&engine, 2, 2);
    let now = read_all(&engine);
    let mut job = Deletion::new(Which::Guid(guid));
    rig.step(&mut job).unwrap();
    assert_eq!(job.progress().total, CLUSTERS / 2 * CLUSTER.bytes());
    job.cancel(&mut Site {
        engine: &engine,
        bundle: Some(&mut rig.bundle),
        at_most: u64::MAX,
    });
    assert_eq!(rig.step(&mut job).unwrap(), Step::Done, "nothing is done");
    assert_eq!(rig.read_snapshot(guid), at_first);
    drop(engine);
    let mut rig = rig.serve_again();
    assert_eq!(read_all(&rig.engine()), now);
    assert_eq!(rig.read_snapshot(guid), at_first);
    rig.delete(guid).unwrap();
    assert_eq!(read_all(&rig.engine()), now);
    rig.close();
}

#[test]
fn a_snapshot_that_is_made_meanwhile_ends_a_deletion() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    fill(&engine, 1, 1);
    let first = rig.create().unwrap();
    let mut job = Deletion::new(Which::Guid(first));
    rig.step(&mut job).unwrap();
    let second = rig.create().unwrap();
    let ended = loop {
        match rig.step(&mut job) {
            Ok(Step::More { .. }) => {}
            other => break other,
        }
    };
    let is_changed = matches!(ended, Err(JobError::Engine(EngineError::TopChanged)));
    assert!(is_changed, "{ended:?}");
    assert_eq!(rig.read_snapshot(first), rig.read_snapshot(second));
    rig.close();
}

/// A file that is put where the snapshot's was is somebody's, and stays.
#[test]
fn another_file_by_the_name_of_the_snapshots_stays() {
    let mut rig = Rig::new(Version::V2);
    fill(&rig.engine(), 1, 1);
    let guid = rig.create().unwrap();
    let path = rig.old_top(guid);
    let aside = path.with_extension("aside");
    fs::rename(&path, &aside).unwrap();
    fs::write(&path, "somebody's").unwrap();
    rig.delete(guid).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"somebody's");
    assert!(fs::metadata(&aside).unwrap().len() > 0);
    rig.close();
}

#[test]
fn space_is_given_back_a_little_at_a_time() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * CUT_AT_ONCE + 1).unwrap();
    let leftover = Leftover(file.try_clone().unwrap());
    let steps: Vec<_> = (0..3).map(|_| leftover.give_back_some().unwrap()).collect();
    assert_eq!(steps, [true, true, false]);
    assert_eq!(file.metadata().unwrap().len(), 0);
}

/// A process that reads the snapshot goes on with the file that has no name any more.
#[test]
fn who_reads_a_snapshot_that_is_deleted_reads_on() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    fill(&engine, 1, 1);
    let guid = rig.create().unwrap();
    let file = rig.open_old_top(guid);
    let len = file.metadata().unwrap().len();
    let mode = OpenMode::new(Access::Read).snapshot(Some(guid));
    let reader = image::open(&rig.path(), mode).unwrap();
    rig.delete(guid).unwrap();
    let gone = file.metadata().unwrap();
    assert_eq!((gone.nlink(), gone.len()), (0, len));
    drop(reader);
    rig.close();
}

#[test]
fn one_that_others_lie_on_stays() {
    let mut rig = Rig::new(Version::V2);
    let first = rig.create().unwrap();
    let second = rig.create().unwrap();
    rig.close();
    image::switch_snapshot(&rig.path(), first).unwrap();
    let mut rig = rig.serve_again();
    let top = rig.bundle.descriptor().top();
    for guid in [first, top] {
        let refused = rig.delete(guid);
        assert!(matches!(refused, Err(JobError::Image(_))), "{refused:?}");
    }
    assert_eq!(rig.files().len(), 5);
    // On the other branch's end none lies; then the top alone lies on the first.
    let now = read_all(&rig.engine());
    let mode = OpenMode::new(Access::Read).snapshot(Some(second));
    let reader = image::open(&rig.path(), mode).unwrap();
    let refused = rig.delete(second);
    assert!(matches!(refused, Err(JobError::Image(_))), "{refused:?}");
    drop(reader);
    rig.delete(second).unwrap();
    assert_eq!(rig.engine().level_shapes().count(), 2);
    assert_eq!(rig.files().len(), 4);
    rig.delete(first).unwrap();
    assert_eq!(rig.files().len(), 3);
    assert_eq!(read_all(&rig.engine()), now);
    rig.close();
}

/// What each writer was told is written is there, whatever is copied meanwhile.
#[test]
fn a_guest_that_writes_loses_nothing() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    fill(&engine, 1, 1);
    let is_over = Arc::new(AtomicBool::new(false));
    let last: Arc<[AtomicU32; 2]> = Arc::default();
    let writers = [0, 1].map(|index: usize| {
        let (engine, is_over, last) = (engine.clone(), is_over.clone(), last.clone());
        thread::spawn(move || {
            let mut queue = engine.queue().unwrap();
            for number in 1_u32.. {
                let at = u64::from(number % 12) * 2 + index as u64;
                let start = crate::format::Sector(at * CLUSTER.sectors());
                write(&mut queue, start, number as u8, 4096);
                last[index].store(number, Ordering::SeqCst);
                if is_over.load(Ordering::SeqCst) && number > 12 {
                    return;
                }
            }
        })
    });
    for _ in 0..12 {
        let guid = rig.create().unwrap();
        rig.delete(guid).unwrap();
    }
    is_over.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.join().unwrap();
    }
    let check = |bytes: &[u8]| {
        for index in 0..2 {
            let last = last[index as usize].load(Ordering::SeqCst);
            for number in last - 11..=last {
                let cluster = u64::from(number % 12) * 2 + index;
                let at = (cluster * CLUSTER.bytes()) as usize;
                assert_eq!(bytes[at..at + 4096], [number as u8; 4096]);
            }
        }
    };
    check(&read_all(&engine));
    drop(engine);
    let mut rig = rig.serve_again();
    check(&read_all(&rig.engine()));
    rig.close();
}
