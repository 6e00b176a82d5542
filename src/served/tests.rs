//! A disk with a descriptor becomes larger; others look on, or are in the way.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::io::Errno;

use super::*;
use crate::format::{ClusterSize, Descriptor, Header, HostCluster, InUse};
use crate::image;
use crate::ploop::{Chain, Level, Options, Running};
use crate::sim::disk::{Medium, SimDisk};
use crate::storage::FileId;

pub(super) const CLUSTER: ClusterSize = ClusterSize::MIN;
pub(super) const TOP: FileId = FileId(0);

pub(super) const fn clusters(count: u64) -> Sector {
    Sector(count * CLUSTER.sectors())
}

/// Header and BAT take one cluster.
pub(super) const OLD: Sector = clusters(16);
/// They take three, so two clusters of data have to move.
const NEW: Sector = clusters(20_000);
const MORE: Sector = clusters(20_001);

/// A disk that is served, its files in memory, but for a descriptor in a folder.
pub(super) struct Rig {
    pub(super) disk: SimDisk,
    pub(super) running: Option<Running<SimDisk>>,
    /// Somebody has closed it.
    pub(super) is_closed: bool,
    /// Whether the disk gets on.
    pub(super) goes_on: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
    stepper: Option<JoinHandle<()>>,
    folder: tempfile::TempDir,
}

impl Rig {
    /// An image whose clusters are all mapped, or a raw one.
    fn new(is_raw: bool) -> Self {
        Self::of(is_raw, OLD, options())
    }

    fn of(is_raw: bool, size: Sector, options: Options) -> Self {
        let disk = SimDisk::new(1, Medium::default(), 1);
        let level = match is_raw {
            true => {
                disk.prepare(TOP, 0, &vec![7; size.bytes() as usize]);
                let cluster = CLUSTER;
                Level::Plain { size, cluster }
            }
            false => {
                disk.prepare(TOP, 0, &full_image(size, InUse::Closed));
                Level::Ploop
            }
        };
        Self::serve(disk, level, size, options)
    }

    pub(super) fn serve(disk: SimDisk, level: Level, size: Sector, options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        image::create(&folder.path().join("disk"), size, CLUSTER).unwrap();
        let chain = Chain {
            levels: vec![level],
        };
        let opened = Engine::open(disk.clone(), &chain, options).unwrap();
        let goes_on = Arc::new(AtomicBool::new(true));
        let is_over = Arc::new(AtomicBool::new(false));
        let stepper = thread::spawn({
            let (disk, goes_on, is_over) = (disk.clone(), goes_on.clone(), is_over.clone());
            move || {
                while !is_over.load(Ordering::Acquire) {
                    if goes_on.load(Ordering::Acquire) && disk.is_busy() {
                        disk.step();
                    }
                    thread::yield_now();
                }
            }
        });
        let rig = Self {
            disk,
            running: Some(Running::start(opened).unwrap()),
            is_closed: false,
            goes_on,
            is_over,
            stepper: Some(stepper),
            folder,
        };
        // Of a disk without whole clusters the tools would not make one.
        rig.change_descriptor(&clusters_of(size), &size.0.to_string());
        rig
    }

    pub(super) fn engine(&self) -> &Arc<Engine<SimDisk>> {
        self.running.as_ref().expect("it runs").engine()
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn bundle(&self) -> Bundle {
        Bundle::open(&self.path()).unwrap()
    }

    fn grow(&self, size: Sector, call_off: &CallOff) -> Result<Sector, GrowError> {
        grow(self.engine(), Some(&mut self.bundle()), size, call_off)
    }

    fn descriptor(&self) -> PathBuf {
        self.path().join(Descriptor::FILE_NAME)
    }

    /// What another program does, which asks nobody.
    fn change_descriptor(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.descriptor()).unwrap();
        fs::write(self.descriptor(), text.replace(from, to)).unwrap();
    }

    #[track_caller]
    fn expect_size(&self, size: Sector) {
        self.expect_sizes(size, size);
    }

    /// That of the disk, and what its descriptor says.
    #[track_caller]
    fn expect_sizes(&self, disk: Sector, descriptor: Sector) {
        assert_eq!(self.engine().disk_size(), disk);
        assert_eq!(self.bundle().descriptor().disk_size, descriptor);
        let files = fs::read_dir(self.path()).unwrap();
        assert_eq!(files.count(), 2, "image and descriptor, and no more");
    }

    /// The same call again does it: nothing is left of the one before.
    #[track_caller]
    fn expect_to_grow(&self, size: Sector) {
        let grown = self.grow(size, &CallOff::default());
        assert_eq!(grown.unwrap(), size);
        self.expect_size(size);
    }

    /// Asks for a larger disk, and has `meanwhile` run when that is under way.
    fn grow_and(&self, call_off: &CallOff, meanwhile: impl FnOnce()) -> Result<Sector, GrowError> {
        self.goes_on.store(false, Ordering::Release);
        thread::scope(|scope| {
            let growing = scope.spawn(|| self.grow(NEW, call_off));
            while !self.disk.is_busy() && !growing.is_finished() {
                thread::yield_now();
            }
            meanwhile();
            self.goes_on.store(true, Ordering::Release);
            growing.join().unwrap()
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.goes_on.store(true, Ordering::Release);
        let closed = self.running.take().map(Running::close);
        self.is_over.store(true, Ordering::Release);
        let stepped = self.stepper.take().map(JoinHandle::join);
        if !thread::panicking() {
            assert_eq!(closed, (!self.is_closed).then_some(Ok(())));
            assert!(stepped.is_some_and(|stepped| stepped.is_ok()));
            assert_eq!(self.disk.take_violations(), [""; 0]);
        }
    }
}

/// Its file does not become longer by itself.
pub(super) fn options() -> Options {
    let mut options = Options::default();
    options.preallocation = 0;
    options
}

fn clusters_of(size: Sector) -> String {
    CLUSTER.round_up(size).0.to_string()
}

fn full_image(size: Sector, in_use: InUse) -> Vec<u8> {
    let mut header = Header::new(size, CLUSTER).unwrap();
    header.in_use = in_use;
    let geometry = *header.geometry();
    let first = geometry.first_host_cluster().0;
    let mut bytes = header.to_bytes().to_vec();
    for host in (first..).map(HostCluster).take(geometry.entries as usize) {
        bytes.extend(geometry.bat_value(host).to_le_bytes());
    }
    let end = u64::from(geometry.entries) * CLUSTER.bytes();
    bytes.resize((geometry.data_start + end) as usize, 0);
    bytes
}

fn is_called_off(result: &Result<Sector, GrowError>) -> bool {
    matches!(result, Err(GrowError::CalledOff))
}

fn is_of_descriptor<T>(result: &Result<T, GrowError>) -> bool {
    matches!(result, Err(GrowError::Descriptor(_)))
}

#[test]
fn a_disk_grows_in_whole_clusters_and_its_descriptor_follows() {
    for is_raw in [false, true] {
        let rig = Rig::new(is_raw);
        let mut bundle = rig.bundle();
        let mut grow_to = |size| {
            let call_off = CallOff::default();
            grow(rig.engine(), Some(&mut bundle), size, &call_off)
        };
        assert_eq!(grow_to(Sector(NEW.0 - 1)).unwrap(), NEW);
        rig.expect_size(NEW);
        assert_eq!(grow_to(NEW).unwrap(), NEW);
        assert_eq!(grow_to(MORE).unwrap(), MORE);
        rig.expect_size(MORE);
        let (from, to) = (MORE.0, MORE.0 - 1);
        match grow_to(Sector(to)) {
            Err(GrowError::Engine(error)) => assert_eq!(error, EngineError::Smaller { from, to }),
            other => panic!("{other:?}"),
        }
        rig.expect_size(MORE);
    }
}

#[test]
fn a_disk_keeps_a_size_that_it_has_though_it_is_in_the_midst_of_a_cluster() {
    let odd = Sector(OLD.0 - 3);
    let rig = Rig::of(false, odd, options());
    rig.expect_to_grow(odd);
    rig.expect_to_grow(OLD);
}

#[test]
fn a_disk_without_a_descriptor_grows_too() {
    let rig = Rig::new(false);
    let grown = grow(rig.engine(), None, NEW, &CallOff::default());
    assert_eq!(grown.unwrap(), NEW);
    rig.expect_sizes(NEW, OLD);
}

#[test]
fn a_growth_that_is_called_off_comes_to_nothing_and_the_next_one_does_not() {
    let rig = Rig::new(false);
    let call_off = CallOff::default();
    assert!(call_off.call_off(rig.engine()));
    assert!(is_called_off(&rig.grow(NEW, &call_off)));
    rig.expect_size(OLD);

    let call_off = CallOff::default();
    let grown = rig.grow_and(&call_off, || assert!(call_off.call_off(rig.engine())));
    assert!(is_called_off(&grown), "{grown:?}");
    rig.expect_size(OLD);

    // All is prepared, and nothing of it can be seen.
    let call_off = CallOff::default();
    let prepared = call_off.prepare(rig.engine(), NEW).unwrap().wait();
    assert_eq!(prepared, Ok(()));
    assert!(call_off.call_off(rig.engine()));
    assert!(matches!(call_off.commit(), Err(GrowError::CalledOff)));
    assert_eq!(
        rig.engine().commit_growth(),
        Err(EngineError::NotPrepared),
        "it is forgotten"
    );
    rig.expect_to_grow(NEW);
}

#[test]
fn who_calls_off_too_late_harms_no_other_growth() {
    let rig = Rig::new(false);
    let call_off = CallOff::default();
    assert_eq!(rig.grow(NEW, &call_off).unwrap(), NEW);
    rig.engine().prepare_growth(MORE).unwrap();
    assert!(!call_off.call_off(rig.engine()));
    rig.engine().commit_growth().unwrap();
    assert_eq!(rig.engine().disk_size(), MORE);
}

#[test]
fn a_disk_that_cannot_be_larger_says_why() {
    let rig = Rig::new(false);
    let used = rig.disk.used_blocks();
    rig.disk
        .change_medium(|medium| medium.capacity = Some(used));
    let grown = rig.grow(NEW, &CallOff::default());
    assert!(
        matches!(grown, Err(GrowError::Engine(EngineError::NoSpace))),
        "{grown:?}"
    );
    rig.expect_size(OLD);
    rig.disk.change_medium(|medium| medium.capacity = None);
    rig.expect_to_grow(NEW);
}

#[test]
fn a_disk_whose_guest_may_come_back_keeps_its_size_until_that_is_known() {
    let disk = SimDisk::new(1, Medium::default(), 1);
    disk.prepare(TOP, 0, &full_image(OLD, InUse::Open));
    let mut options = options();
    options.awaits_take_over = true;
    let rig = Rig::serve(disk, Level::Ploop, OLD, options);
    let grown = rig.grow(NEW, &CallOff::default());
    assert!(
        matches!(grown, Err(GrowError::Engine(EngineError::GuestAwaited))),
        "{grown:?}"
    );
    assert!(rig.engine().awaits_take_over());
    rig.engine().begin();
    rig.expect_to_grow(NEW);
}

/// Of what others say in it only a size is what ours may have written.
#[test]
fn a_descriptor_that_was_changed_before_is_not_replaced() {
    for is_raw in [false, true] {
        let rig = Rig::new(is_raw);
        let mut bundle = rig.bundle();
        let mut grow_to_new = || {
            let call_off = CallOff::default();
            grow(rig.engine(), Some(&mut bundle), NEW, &call_off)
        };
        rig.change_descriptor("root.hds", "other.hds");
        assert!(is_of_descriptor(&grow_to_new()));
        rig.expect_size(OLD);
        rig.change_descriptor("other.hds", "root.hds");
        rig.change_descriptor(&OLD.0.to_string(), &clusters(17).0.to_string());
        assert_eq!(grow_to_new().unwrap(), NEW);
        rig.expect_size(NEW);
    }
}

#[test]
fn a_descriptor_that_is_changed_while_the_disk_is_prepared_is_not_replaced() {
    let rig = Rig::new(false);
    let call_off = CallOff::default();
    let grown = rig.grow_and(&call_off, || {
        rig.change_descriptor("root.hds", "other.hds");
    });
    assert!(is_of_descriptor(&grown), "{grown:?}");
    rig.expect_size(OLD);
    rig.change_descriptor("other.hds", "root.hds");
    rig.expect_to_grow(NEW);
}

/// How the last step ends when the descriptor is changed right before it.
fn commit_changed(rig: &Rig) -> Result<(), GrowError> {
    rig.engine().prepare_growth(NEW).unwrap();
    let mut bundle = rig.bundle();
    let descriptor = new_descriptor(rig.engine(), Some(&mut bundle), NEW).unwrap();
    assert!(descriptor.is_some());
    rig.change_descriptor("root.hds", "other.hds");
    commit(rig.engine(), descriptor)
}

/// There is another word on the size: that of the header.
#[test]
fn a_descriptor_that_is_changed_in_the_last_moment_stays_and_the_image_is_larger() {
    let rig = Rig::new(false);
    commit_changed(&rig).unwrap();
    rig.expect_sizes(NEW, OLD);
    rig.change_descriptor("other.hds", "root.hds");
    rig.expect_to_grow(NEW);
}

/// It has the only word on the size.
#[test]
fn a_raw_disk_keeps_its_size_when_its_descriptor_is_changed_in_the_last_moment() {
    let rig = Rig::new(true);
    assert!(is_of_descriptor(&commit_changed(&rig)));
    rig.expect_size(OLD);
    rig.change_descriptor("other.hds", "root.hds");
    rig.expect_to_grow(NEW);
}

/// Another host may have the disk by then.
#[test]
fn a_descriptor_stays_as_it_is_once_the_lock_is_lost() {
    let mut rig = Rig::new(true);
    let mut bundle = rig.bundle();
    let descriptor = bundle.prepare_disk_size(NEW).unwrap();
    rig.engine().lose_lock();
    let put = put_in_place(rig.engine(), descriptor);
    assert!(
        matches!(put, Err(GrowError::Engine(EngineError::LockLost))),
        "{put:?}"
    );
    rig.expect_size(OLD);
    let _ = rig.running.take().map(Running::close);
    rig.is_closed = true;
}

#[test]
fn the_descriptor_of_an_image_does_not_say_what_its_header_does_not() {
    let rig = Rig::new(false);
    rig.engine().prepare_growth(NEW).unwrap();
    let mut bundle = rig.bundle();
    let descriptor = new_descriptor(rig.engine(), Some(&mut bundle), NEW).unwrap();
    rig.disk.change_medium(|medium| medium.faults.write = 1.0);
    match commit(rig.engine(), descriptor) {
        Err(GrowError::Engine(error)) => assert_eq!(error, EngineError::Metadata(Errno::IO)),
        other => panic!("{other:?}"),
    }
    rig.disk.change_medium(|medium| medium.faults.write = 0.0);
    rig.expect_size(OLD);
    rig.expect_to_grow(NEW);
}

/// The new top would be smaller than the one below says that it is.
#[test]
fn no_snapshot_is_made_of_a_disk_whose_header_may_say_that_it_is_larger() {
    let rig = Rig::new(false);
    let engine = rig.engine();
    engine.prepare_growth(NEW).unwrap();
    rig.disk.change_medium(|medium| medium.faults.write = 1.0);
    let failed = Err(EngineError::Metadata(Errno::IO));
    assert_eq!(engine.commit_growth(), failed);
    rig.disk.change_medium(|medium| medium.faults.write = 0.0);
    assert_eq!(engine.close_top().wait(), Err(EngineError::HalfGrown));
    rig.expect_to_grow(NEW);
    assert_eq!(engine.close_top().wait(), Ok(()));
    assert_eq!(engine.keep_top().wait(), Ok(()));
}

/// A sync of the folder failed after it was put there: the next one does not make that good.
#[test]
fn a_descriptor_that_says_so_already_is_put_in_place_again() {
    let rig = Rig::new(true);
    rig.engine().prepare_growth(NEW).unwrap();
    let mut bundle = rig.bundle();
    bundle.set_disk_size(NEW).unwrap();
    let file = bundle.path().join(Descriptor::FILE_NAME);
    let before = fs::File::open(&file).unwrap();
    let descriptor = new_descriptor(rig.engine(), Some(&mut bundle), NEW).unwrap();
    commit(rig.engine(), descriptor).unwrap();
    let [before, after] = [before.metadata(), fs::metadata(&file)].map(|it| it.unwrap().ino());
    assert_ne!(before, after, "it is the same file");
    rig.expect_size(NEW);
    let without = new_descriptor(rig.engine(), None, NEW).unwrap();
    assert!(without.is_none());
    // The disk is so large, too, by now.
    let nothing_new = new_descriptor(rig.engine(), Some(&mut bundle), NEW).unwrap();
    assert!(nothing_new.is_none());
}
