//! One thread does what it is asked for, one thing after the other.

use std::path::PathBuf;

use super::*;
use crate::control::jobs::Terms;
use crate::format::{ClusterSize, Guid};
use crate::image::{Access, OpenImage, OpenMode};
use crate::ploop::{Options, Running};
use crate::served::job::{Site, Step};
use crate::storage::HostOptions;
use crate::storage::lock::ImageLock;

const SIZE: Sector = Sector(24 * ClusterSize::MIN.sectors());
const MORE: Sector = Sector(25 * ClusterSize::MIN.sectors());

/// A bundle whose disk runs.
struct Rig {
    caretaker: Option<Caretaker>,
    running: Running<HostDisk>,
    _locks: Vec<ImageLock>,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new(hidden: Option<ImageError>) -> Self {
        Self::new_of(hidden, false)
    }

    /// A raw one has something behind the end of its disk.
    fn new_of(hidden: Option<ImageError>, is_raw: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        image::create(&path, SIZE, ClusterSize::MIN).unwrap();
        if is_raw {
            let xml = path.join("DiskDescriptor.xml");
            let text = std::fs::read_to_string(&xml).unwrap();
            std::fs::write(xml, text.replace("Compressed", "Plain")).unwrap();
            let len = SIZE.bytes() as usize + 4096;
            std::fs::write(path.join("root.hds"), vec![7; len]).unwrap();
        }
        let opened = image::open(&path, OpenMode::new(Access::Serve)).unwrap();
        let OpenImage {
            files,
            chain,
            bundle,
            locks,
            ..
        } = opened;
        let disk = HostDisk::new(files, HostOptions::default()).unwrap();
        let opened = Engine::open(disk, &chain, Options::default()).unwrap();
        let keeps = KeepTo::what_all_have();
        Self {
            caretaker: Some(Caretaker::start(bundle, hidden, keeps).unwrap()),
            running: Running::start(opened).unwrap(),
            _locks: locks,
            folder,
        }
    }

    fn begin(&self, task: Task) -> Operation {
        let caretaker = self.caretaker.as_ref().unwrap();
        caretaker.begin(self.running.engine(), task).unwrap()
    }

    fn grow(&self, size: Sector) -> Result<Done, TaskError> {
        self.begin(Task::Grow(size)).result()
    }

    fn descriptor(&self) -> PathBuf {
        self.folder.path().join("disk/DiskDescriptor.xml")
    }

    /// The thread does what it is asked for, and no more.
    fn end(mut self) {
        drop(self.caretaker.take());
        self.running.close().unwrap();
    }
}

fn snapshot(description: &str, is_unique: bool) -> Task {
    Task::Snapshot {
        new: NewSnapshot {
            guid: None,
            description: Some(description.to_owned()),
        },
        is_unique,
        bitmaps: Vec::new(),
    }
}

fn guid_of(done: Result<Done, TaskError>) -> Guid {
    match done {
        Ok(Done::Snapshot {
            guid,
            new_chain,
            doubt: None,
        }) => {
            let is_it = |created: &snapshot::Created| created.guid == guid;
            assert!(matches!(new_chain.take(), Some(Change::Top(created)) if is_it(&created)));
            assert!(new_chain.take().is_none(), "it is one's own");
            guid
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_asked_for_is_done_in_turn() {
    let rig = Rig::new(None);
    let (first, second) = (rig.begin(snapshot("a", true)), rig.begin(Task::Grow(MORE)));
    assert!(first.task().is_under_way().contains("snapshot"));
    assert!(second.task().is_under_way().contains("resized"));
    let list = rig.caretaker.as_ref().unwrap().list_snapshots().unwrap();
    let guid = guid_of(first.result());
    assert!(matches!(second.result(), Ok(Done::Grown(MORE))));
    let list = list.answer().unwrap();
    assert_eq!(list[0]["guid"], guid.to_string());
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert_eq!(rig.running.engine().disk_size(), MORE);
    rig.end();
}

#[test]
fn a_name_that_is_taken_is_refused_to_who_wants_it_alone() {
    let rig = Rig::new(None);
    guid_of(rig.begin(snapshot("a", false)).result());
    guid_of(rig.begin(snapshot("a", false)).result());
    let refused = rig.begin(snapshot("a", true)).result().unwrap_err();
    assert!(
        refused.words().contains("'a' already exists"),
        "{refused:?}"
    );
    guid_of(rig.begin(snapshot("b", true)).result());
    rig.end();
}

#[test]
fn what_fails_changes_nothing_and_the_next_is_done() {
    let rig = Rig::new(None);
    let smaller = Sector(SIZE.0 - ClusterSize::MIN.sectors());
    let words = rig.grow(smaller).unwrap_err().words();
    assert!(words.contains("ploop-img resize --shrink"), "{words}");
    let aside = rig.folder.path().join("aside");
    std::fs::rename(rig.descriptor(), &aside).unwrap();
    rig.begin(snapshot("a", false)).result().unwrap_err();
    std::fs::rename(&aside, rig.descriptor()).unwrap();
    guid_of(rig.begin(snapshot("a", true)).result());
    rig.end();
}

#[test]
fn what_is_hidden_below_the_disk_keeps_its_size_and_nothing_else() {
    let why = ImageError::Unsupported {
        path: "base".into(),
        why: "hides something".to_owned(),
    };
    let rig = Rig::new(Some(why));
    let words = rig.grow(MORE).unwrap_err().words();
    assert!(words.contains("hides something"), "{words}");
    assert!(matches!(rig.grow(SIZE), Ok(Done::Grown(SIZE))));
    guid_of(rig.begin(snapshot("a", true)).result());
    // That one says how much of it is of the disk, and does not become larger.
    assert!(matches!(rig.grow(MORE), Ok(Done::Grown(MORE))));
    rig.end();
}

/// Who opens the disk next takes the size of the raw image from what lies on it.
#[test]
fn a_snapshot_leaves_nothing_behind_the_end_of_a_raw_image() {
    let rig = Rig::new_of(None, true);
    let root = rig.folder.path().join("disk/root.hds");
    let len = || root.metadata().unwrap().len();
    assert!(len() > SIZE.bytes());
    guid_of(rig.begin(snapshot("a", true)).result());
    assert_eq!(len(), SIZE.bytes());
    assert!(matches!(rig.grow(MORE), Ok(Done::Grown(MORE))));
    rig.end();
}

#[test]
fn what_is_called_off_before_it_begins_never_does() {
    let rig = Rig::new(None);
    let tasks = [snapshot("a", true), Task::Grow(MORE)];
    let operations = tasks.map(|task| {
        let engine = rig.running.engine().clone();
        let call_off = Arc::new(CallOff::default());
        assert!(call_off.call_off(&engine), "there is nothing to wait for");
        let is_over = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap());
        let (tell, result) = sync_channel(1);
        let errand = Errand {
            ending: Ending(is_over),
            engine: Arc::downgrade(&engine),
            task,
            call_off,
            new_chain: NewChain::default(),
            tell,
        };
        let orders = &rig.caretaker.as_ref().unwrap().orders;
        assert!(orders.send(Order::Do(errand)).is_ok());
        result
    });
    for result in operations {
        let error = result.recv().unwrap().unwrap_err();
        assert!(
            matches!(
                error,
                TaskError::Grow(GrowError::CalledOff)
                    | TaskError::Snapshot(SnapshotError::CalledOff)
            ),
            "{error:?}"
        );
    }
    assert_eq!(rig.running.engine().disk_size(), SIZE);
    rig.end();
}

#[test]
fn who_only_looks_changes_nothing() {
    let rig = Rig::new(None);
    let watcher = Caretaker::start_watching().unwrap();
    let engine = || rig.running.engine();
    for task in [snapshot("a", true), Task::Grow(MORE)] {
        assert!(watcher.begin(engine(), task).is_err());
    }
    assert!(watcher.list_snapshots().is_err());
    drop(watcher);
    rig.end();
}

#[test]
fn of_a_bare_image_there_are_no_snapshots() {
    let rig = Rig::new(None);
    let keeps = KeepTo::what_all_have();
    let caretaker = Caretaker::start(None, None, keeps).unwrap();
    let begun = caretaker.begin(rig.running.engine(), snapshot("a", true));
    let words = begun.unwrap().result().unwrap_err().words();
    assert!(words.contains("bare image"), "{words}");
    let why = caretaker.list_snapshots().unwrap().answer().unwrap_err();
    assert!(why.contains("bare image"), "{why}");
    drop(caretaker);
    rig.end();
}

/// A job whose first step waits for this, as for storage that does not answer.
struct Hangs(Receiver<()>);

impl served::job::Job<HostDisk> for Hangs {
    fn step(&mut self, _: &mut Site<'_, HostDisk>) -> Result<Step, JobError> {
        let _ = self.0.recv();
        Ok(Step::Done)
    }

    fn progress(&self) -> served::job::Progress {
        served::job::Progress::default()
    }

    fn cancel(&mut self, _: &mut Site<'_, HostDisk>) {}
}

#[test]
fn nobody_waits_for_a_job_that_has_not_begun_or_whose_image_is_lost() {
    let rig = Rig::new(None);
    let engine = rig.running.engine().clone();
    let orders = rig.caretaker.as_ref().unwrap().orders.clone();
    let event = || Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap());
    let begin = || {
        let (go_on, waits) = channel();
        let reins = Arc::new(Reins::new(&Terms::unnamed("test")));
        let (is_over, changed) = (event(), event());
        let (tell, result) = sync_channel(1);
        let new_chain = NewChain::default();
        let course = Course {
            ending: Ending(Arc::clone(&is_over)),
            engine: Arc::downgrade(&engine),
            job: Box::new(Hangs(waits)),
            reins: Arc::clone(&reins),
            changed: Arc::clone(&changed),
            new_chain: new_chain.clone(),
            tell,
            pace: Pace::new(Arc::new(|| None)),
        };
        let stop = Stop {
            engine: Arc::downgrade(&engine),
            call_off: Arc::default(),
            tether: Some(Tether {
                reins,
                changed,
                orders: orders.clone(),
            }),
            is_over,
            new_chain,
        };
        (course, stop, go_on, result)
    };
    let (course, stop, go_on, result) = begin();
    let reins = stop.tether.as_ref().unwrap().reins.clone();
    assert!(orders.send(Order::Begin(course)).is_ok());
    while !reins.held().has_begun {
        std::thread::yield_now();
    }
    let (unbegun, never, _go_on, called_off) = begin();
    assert!(stop.clone().end(|| true).is_none());
    // The thread will hear of it when it is free.
    assert!(never.call_off());
    assert!(never.end(|| false).is_none());
    drop(go_on);
    assert!(stop.end(|| false).is_none(), "it ends after all");
    assert!(matches!(result.recv(), Ok(Ok(Done::Job))));
    assert!(orders.send(Order::Begin(unbegun)).is_ok());
    assert!(matches!(called_off.recv(), Ok(Err(TaskError::Cancelled))));
    drop((engine, orders));
    rig.end();
}
