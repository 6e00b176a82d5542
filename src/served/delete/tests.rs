//! Deletions on disks that run on files of the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use super::commit::CUT_AT_ONCE;
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

    /// Up to where it is known what is to be copied, and nothing is.
    fn look(&mut self, job: &mut Deletion) {
        self.step(job).unwrap();
        while matches!(&job.stage, Stage::Copying(_, copies) if copies.is_looking()) {
            self.step(job).unwrap();
            assert_eq!(job.progress().done, 0);
        }
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
        self.do_it(Which::Guid(guid))
    }

    fn merge(&mut self, from: Option<Guid>, to: Option<Guid>) -> Result<Progress, JobError> {
        self.do_it(Which::Range { from, to })
    }

    fn do_it(&mut self, which: Which) -> Result<Progress, JobError> {
        let mut job = Deletion::new(which);
        while self.step(&mut job)? != Step::Done {}
        let deleted = job.take_deleted();
        for leftover in deleted.into_iter().flat_map(|deleted| deleted.space) {
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
    rig.look(&mut job);
    let total = job.progress().total / CLUSTER.bytes();
    for (at_most, clusters) in [(0, 1), (1, 1), (3, 3), (u64::MAX / CLUSTER.bytes(), total)] {
        let before = job.progress().done;
        let step = rig.step_within(&mut job, at_most * CLUSTER.bytes());
        if matches!(step, Ok(Step::Done)) {
            break;
        }
        let copied = (job.progress().done - before) / CLUSTER.bytes();
        assert!(copied <= clusters, "{copied} of {at_most}");
        let Stage::Copying(_, copies) = &job.stage else {
            panic!("there is more to copy");
        };
        assert_eq!(
            copies.under_way(),
            0,
            "the rest after a step is the guest's"
        );
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
    rig.look(&mut job);
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

/// What was there when a snapshot was made.
struct Moment {
    guid: Guid,
    content: Vec<u8>,
}

impl Rig {
    /// So many snapshots one on another, and something since.
    fn with_chain(mut self, count: u8) -> (Self, Vec<Moment>) {
        let engine = self.engine();
        let mut moments = Vec::new();
        for number in 1..=count {
            fill(&engine, number, u64::from(number) + 1);
            let content = read_all(&engine);
            let guid = self.create().unwrap();
            moments.push(Moment { guid, content });
        }
        fill(&engine, count + 1, 7);
        (self, moments)
    }

    #[track_caller]
    fn expect(&self, moments: &[Moment]) {
        for moment in moments {
            let found = self.read_snapshot(moment.guid);
            assert!(found == moment.content, "{} is another", moment.guid);
        }
    }

    fn level_count(&self) -> usize {
        self.engine().level_shapes().count()
    }
}

fn check_lifts_of(rig: Rig) {
    let (mut rig, mut moments) = rig.with_chain(4);
    let now = read_all(&rig.engine());
    // A reader from before, and one that comes in the midst.
    let mode = OpenMode::new(Access::Read).snapshot(Some(moments[3].guid));
    let opened = image::open(&rig.path(), mode).unwrap();
    let files: Vec<_> = opened.files.iter().map(|file| file.path.clone()).collect();
    // The base, one in between, and what is the base then.
    for (index, left) in [(0, 4), (1, 3), (0, 2)] {
        let guid = moments.remove(index).guid;
        let mut job = Deletion::new(Which::Guid(guid));
        while rig.step_within(&mut job, CLUSTER.bytes()).unwrap() != Step::Done {
            rig.expect(&moments);
            assert!(read_all(&rig.engine()) == now);
        }
        let deleted = job.take_deleted().unwrap();
        assert_eq!(deleted.snapshots[0].0, guid);
        assert_eq!(deleted.levels.len(), 1);
        assert!(deleted.doubt.is_none());
        assert_eq!(rig.level_count(), left);
        assert!(read_all(&rig.engine()) == now);
        rig.expect(&moments);
    }
    assert_eq!(files.iter().filter(|file| file.exists()).count(), 1);
    drop(opened);
    // And after another process has opened it.
    let mut rig = rig.serve_again();
    assert!(read_all(&rig.engine()) == now);
    rig.expect(&moments);
    rig.delete(moments[0].guid).unwrap();
    assert_eq!(rig.level_count(), 1);
    assert!(read_all(&rig.engine()) == now);
    rig.close();
}

#[test]
fn a_snapshot_goes_into_the_one_that_lies_on_it() {
    check_lifts_of(Rig::new(Version::V2));
}

#[test]
fn one_of_an_old_image_and_a_raw_one_too() {
    check_lifts_of(Rig::new(Version::V1));
    check_lifts_of(Rig::raw());
}

#[test]
fn a_range_goes_at_once() {
    let (mut rig, mut moments) = Rig::new(Version::V2).with_chain(7);
    let now = read_all(&rig.engine());
    let guid = |moments: &[Moment], index: usize| Some(moments[index].guid);
    // In the midst.
    rig.merge(guid(&moments, 1), guid(&moments, 3)).unwrap();
    moments.drain(1..3);
    rig.expect(&moments);
    assert_eq!(rig.level_count(), 6);
    // From the base on.
    rig.merge(None, guid(&moments, 2)).unwrap();
    moments.drain(0..2);
    rig.expect(&moments);
    // Nothing lies between one and itself.
    let nothing = rig.merge(guid(&moments, 0), guid(&moments, 0)).unwrap();
    assert_eq!(nothing, Progress::default());
    // The other way round it is no range.
    let refused = rig.merge(guid(&moments, 2), guid(&moments, 0));
    assert!(matches!(refused, Err(JobError::Image(_))), "{refused:?}");
    assert_eq!(rig.level_count(), 4);
    // Up to the top.
    rig.merge(guid(&moments, 1), None).unwrap();
    moments.truncate(1);
    rig.expect(&moments);
    assert!(read_all(&rig.engine()) == now);
    let mut rig = rig.serve_again();
    rig.merge(None, None).unwrap();
    assert_eq!(rig.level_count(), 1);
    assert_eq!(rig.files().len(), 3, "{:?}", rig.files());
    assert!(read_all(&rig.engine()) == now);
    rig.close();
}

#[test]
fn nothing_of_a_range_goes_if_others_lie_on_a_part_of_it() {
    let (mut rig, moments) = Rig::new(Version::V2).with_chain(4);
    rig.close();
    image::switch_snapshot(&rig.path(), moments[1].guid).unwrap();
    let mut rig = rig.serve_again();
    let files = rig.files();
    let refused = rig.merge(None, Some(moments[3].guid));
    assert!(matches!(refused, Err(JobError::Image(_))), "{refused:?}");
    assert_eq!(rig.files(), files);
    rig.expect(&moments);
    rig.close();
}

/// The disk that is served does not lie on them.
#[test]
fn snapshots_of_another_branch_go_as_well() {
    let (mut rig, mut moments) = Rig::new(Version::V2).with_chain(4);
    rig.close();
    image::switch_snapshot(&rig.path(), moments[0].guid).unwrap();
    let mut rig = rig.serve_again();
    fill(&rig.engine(), 9, 3);
    let now = read_all(&rig.engine());
    let guid = moments.remove(1).guid;
    let file = rig.open_old_top(guid);
    let mode = OpenMode::new(Access::Read).snapshot(Some(guid));
    let reader = image::open(&rig.path(), mode).unwrap();
    let mut job = Deletion::new(Which::Guid(guid));
    while rig.step(&mut job).unwrap() != Step::Done {}
    let deleted = job.take_deleted().unwrap();
    assert!(deleted.levels.is_empty() && deleted.doubt.is_none());
    assert!(deleted.space.is_empty(), "somebody reads it");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert!(file.metadata().unwrap().len() > 0);
    drop(reader);
    rig.expect(&moments);
    assert!(read_all(&rig.engine()) == now);
    assert_eq!(rig.level_count(), 2);
    let mut rig = rig.serve_again();
    rig.expect(&moments);
    // And without a reader its space comes back.
    let file = rig.open_old_top(moments[1].guid);
    rig.delete(moments[1].guid).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
    moments.remove(1);
    rig.expect(&moments);
    rig.close();
}

#[test]
fn one_that_goes_into_another_can_be_given_up() {
    let (mut rig, moments) = Rig::new(Version::V2).with_chain(2);
    let engine = rig.engine();
    let now = read_all(&engine);
    let mut job = Deletion::new(Which::Guid(moments[0].guid));
    rig.step(&mut job).unwrap();
    let total = job.progress().total;
    for _ in 0..2 {
        rig.step_within(&mut job, CLUSTER.bytes()).unwrap();
    }
    let done = job.progress().done;
    assert_eq!(done, 2 * CLUSTER.bytes());
    job.cancel(&mut Site {
        engine: &engine,
        bundle: Some(&mut rig.bundle),
        at_most: u64::MAX,
    });
    assert_eq!(rig.step(&mut job).unwrap(), Step::Done, "nothing is done");
    assert!(job.take_deleted().is_none());
    rig.expect(&moments);
    drop(engine);
    // All is in order.
    let mut rig = rig.serve_again();
    rig.expect(&moments);
    assert!(read_all(&rig.engine()) == now);
    // What was copied need not be copied again.
    let progress = rig.delete(moments[0].guid).unwrap();
    assert_eq!(progress.total, total - done);
    rig.expect(&moments[1..]);
    rig.close();
}

/// Whoever opens the disk next finds an image below the top that was not closed.
#[test]
fn one_whose_process_was_killed_goes_later() {
    let (mut rig, moments) = Rig::new(Version::V2).with_chain(2);
    let now = read_all(&rig.engine());
    let mut job = Deletion::new(Which::Guid(moments[0].guid));
    for _ in 0..3 {
        rig.step_within(&mut job, CLUSTER.bytes()).unwrap();
    }
    drop(job);
    let mut rig = rig.serve_again_unchecked();
    rig.expect(&moments);
    assert!(read_all(&rig.engine()) == now);
    rig.delete(moments[0].guid).unwrap();
    rig.expect(&moments[1..]);
    // And is sound, without leaks.
    let mut rig = rig.serve_again();
    assert!(read_all(&rig.engine()) == now);
    rig.close();
}

/// Whatever the guest copies from below meanwhile.
#[test]
fn a_guest_that_writes_notices_nothing_of_levels_below() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    let is_over = Arc::new(AtomicBool::new(false));
    let writer = {
        let (engine, is_over) = (engine.clone(), is_over.clone());
        thread::spawn(move || {
            let mut queue = engine.queue().unwrap();
            for number in 1_u32.. {
                let start = crate::format::Sector(u64::from(number) % CLUSTERS * CLUSTER.sectors());
                write(&mut queue, start, number as u8, 4096);
                if is_over.load(Ordering::SeqCst) && number > 2 * CLUSTERS as u32 {
                    return number;
                }
            }
            unreachable!()
        })
    };
    let mut kept = Vec::new();
    for _ in 0..8 {
        let (gone, stays) = (rig.create().unwrap(), rig.create().unwrap());
        kept.push((stays, rig.read_snapshot(stays)));
        rig.delete(gone).unwrap();
        for (guid, content) in &kept {
            assert!(rig.read_snapshot(*guid) == *content);
        }
    }
    is_over.store(true, Ordering::SeqCst);
    let last = writer.join().unwrap();
    let check = |bytes: &[u8]| {
        for number in last - CLUSTERS as u32 + 1..=last {
            let at = (u64::from(number) % CLUSTERS * CLUSTER.bytes()) as usize;
            assert_eq!(bytes[at..at + 4096], [number as u8; 4096]);
        }
    };
    check(&read_all(&engine));
    drop(engine);
    let mut rig = rig.serve_again();
    check(&read_all(&rig.engine()));
    rig.close();
}

impl Rig {
    fn set(&self, clusters: impl IntoIterator<Item = u64>, byte: u8) {
        let mut queue = self.engine().queue().unwrap();
        for cluster in clusters {
            let start = crate::format::Sector(cluster * CLUSTER.sectors());
            write(&mut queue, start, byte, CLUSTER.bytes() as usize);
        }
    }

    fn cancel(&mut self, mut job: Deletion) {
        let engine = self.engine();
        job.cancel(&mut Site {
            engine: &engine,
            bundle: Some(&mut self.bundle),
            at_most: u64::MAX,
        });
    }

    /// What the top has, in clusters of the disk.
    fn has(&self) -> Vec<u64> {
        let mapped = self.engine().mapped_here().into_iter();
        mapped.map(|(cluster, _)| u64::from(cluster)).collect()
    }
}

#[test]
fn zeros_of_the_base_take_no_space_above_it() {
    for mut rig in [Rig::new(Version::V2), Rig::raw()] {
        let is_raw = rig.engine().is_raw();
        rig.set(0..8, 1);
        rig.set(0..4, 0);
        if is_raw {
            rig.set(8..CLUSTERS, 0);
        }
        let guid = rig.create().unwrap();
        rig.set([1, 5, 9], 2);
        let now = read_all(&rig.engine());
        rig.delete(guid).unwrap();
        assert_eq!(rig.has(), [1, 4, 5, 6, 7, 9]);
        assert!(read_all(&rig.engine()) == now);
        // Holes are written to as any.
        rig.set([0, 10], 3);
        let now = read_all(&rig.engine());
        let mut rig = rig.serve_again();
        assert!(read_all(&rig.engine()) == now);
        rig.close();
    }
}

/// Whatever was begun with them before.
#[test]
fn zeros_above_the_base_hide_what_it_has() {
    let chain = || {
        let mut rig = Rig::new(Version::V2);
        rig.set(0..8, 1);
        rig.create().unwrap();
        rig.set(2..6, 0);
        let second = rig.create().unwrap();
        rig.set([4], 2);
        let third = rig.create().unwrap();
        rig.set([5], 3);
        (rig, second, third)
    };
    // Into the top, of which nothing comes.
    let (mut rig, second, _) = chain();
    let now = read_all(&rig.engine());
    let mut job = Deletion::new(Which::Range {
        from: None,
        to: None,
    });
    rig.step(&mut job).unwrap();
    rig.cancel(job);
    rig.merge(Some(second), None).unwrap();
    let mut rig = rig.serve_again();
    assert!(read_all(&rig.engine()) == now);
    rig.close();
    // Into another one, to the last moment.
    let (mut rig, second, third) = chain();
    let now = read_all(&rig.engine());
    let mut job = Deletion::new(Which::Range {
        from: None,
        to: Some(third),
    });
    while !matches!(&job.stage, Stage::Redirecting(..)) {
        rig.step(&mut job).unwrap();
    }
    let Stage::Redirecting(_, it, redirect) = &mut job.stage else {
        unreachable!()
    };
    redirect
        .step(&rig.engine(), |guest| it.lift.place(guest))
        .unwrap();
    rig.cancel(job);
    rig.merge(Some(second), None).unwrap();
    let mut rig = rig.serve_again();
    assert!(read_all(&rig.engine()) == now);
    rig.close();
}

/// As it gives the space of one back that has gone.
#[test]
fn a_disk_is_looked_at_while_levels_go() {
    let mut rig = Rig::new(Version::V2);
    rig.set(0..CLUSTERS, 1);
    let is_over = Arc::new(AtomicBool::new(false));
    let looker = {
        let (path, is_over) = (rig.path(), is_over.clone());
        thread::spawn(move || {
            let mode = || OpenMode::new(Access::Read).force_share(true);
            let mut looks = 0;
            while !is_over.load(Ordering::SeqCst) {
                let report = image::check_served(&path, mode());
                assert_eq!(report.map(|report| report.corruptions).unwrap(), 0);
                image::map(&path, mode(), |_| {}).unwrap();
                looks += 1;
            }
            looks
        })
    };
    for _ in 0..60 {
        let guid = rig.create().unwrap();
        rig.delete(guid).unwrap();
        if looker.is_finished() {
            break;
        }
    }
    is_over.store(true, Ordering::SeqCst);
    assert!(looker.join().unwrap() > 0);
    rig.close();
}
