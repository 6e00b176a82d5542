//! Regions as front-ends bring them, for a disk in a file.

use std::fs;
use std::os::unix::fs::FileExt;

use super::*;
use crate::device::{Queues, Serial};
use crate::format::{ClusterSize, Header, InUse, Sector};
use crate::ploop::{Chain, Engine, Level, Options, Running};
use crate::storage::{HostDisk, HostFile, HostOptions};

const QUEUES: u16 = 3;
const ENTRIES: u16 = 128;

/// A device that serves an image, and what belongs to it.
struct Rig {
    device: Arc<BlockDevice<HostDisk>>,
    running: Option<Running<HostDisk>>,
    _folder: tempfile::TempDir,
}

impl Rig {
    /// Of an image that was closed, or was not.
    fn new(found: InUse) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let cluster = ClusterSize::MIN;
        let mut header = Header::new(Sector(16 * cluster.sectors()), cluster).unwrap();
        header.in_use = found;
        fs::write(&path, header.to_bytes()).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.set_len(header.geometry().data_start).unwrap();
        let writable = true;
        let file = HostFile {
            file,
            path,
            writable,
        };
        let disk = HostDisk::new(vec![file], HostOptions::default()).unwrap();
        let levels = vec![Level::Ploop];
        let mut options = Options::default();
        // As when a guest may come that another process has served.
        options.awaits_take_over = true;
        let opened = Engine::open(disk, &Chain { levels }, options).unwrap();
        let running = Running::start(opened).unwrap();
        let serial: Serial = "serial".parse().unwrap();
        let queues = Queues::new(QUEUES, ENTRIES).unwrap();
        let device = BlockDevice::new(Arc::clone(running.engine()), serial, queues);
        Self {
            device: Arc::new(device),
            running: Some(running),
            _folder: folder,
        }
    }

    fn continuity(&self) -> Continuity<HostDisk> {
        Continuity::new(Arc::clone(&self.device))
    }

    fn note(&self) -> Option<u64> {
        self.device.engine().unwrap().note()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let closed = self.running.take().map(Running::close);
        assert!(std::thread::panicking() || closed.is_some_and(|closed| closed.is_ok()));
    }
}

fn asked(queues: u16, entries: u16) -> VhostUserInflight {
    VhostUserInflight {
        num_queues: queues,
        queue_size: entries,
        ..VhostUserInflight::default()
    }
}

type Region = (VhostUserInflight, File);

fn make(continuity: &mut Continuity<HostDisk>) -> Region {
    continuity.make(&asked(QUEUES, ENTRIES)).unwrap()
}

fn set(
    continuity: &mut Continuity<HostDisk>,
    region: &Region,
) -> Result<Option<bool>, ContinuityError> {
    continuity.take(&region.0, region.1.try_clone().unwrap(), false)
}

#[test]
fn a_region_is_made_for_as_much_as_there_can_be_and_no_more() {
    let rig = Rig::new(InUse::Closed);
    let mut continuity = rig.continuity();
    for (queues, entries) in [
        (0, ENTRIES),
        (QUEUES + 1, ENTRIES),
        (QUEUES, 0),
        (QUEUES, MAX_QUEUE_SIZE + 1),
        (u16::MAX, u16::MAX),
    ] {
        let made = continuity.make(&asked(queues, entries));
        assert!(matches!(made, Err(ContinuityError::Layout { .. })));
    }
    for (queues, entries) in [(1, 1), (QUEUES, ENTRIES), (QUEUES, MAX_QUEUE_SIZE)] {
        let (made, file) = continuity.make(&asked(queues, entries)).unwrap();
        let layout = Layout { queues, entries };
        let standard = SharedWords::aligned(layout.len());
        let len = standard + rig.device.engine().unwrap().remembered_len();
        assert_eq!((made.mmap_size, made.mmap_offset), (len, 0));
        assert_eq!((made.num_queues, made.queue_size), (queues, entries));
        assert_eq!(file.metadata().unwrap().len(), len);
        // Nobody can take it away under us.
        assert!(file.set_len(len - 1).is_err());
        file.set_len(len + 1).unwrap();
        assert!(continuity.export().unwrap().is_none() && !continuity.is_kept());
    }
}

#[test]
fn only_a_region_that_could_be_ours_is_taken() {
    let rig = Rig::new(InUse::Closed);
    let mut continuity = rig.continuity();
    let region = make(&mut continuity);
    let is_foreign = |given: VhostUserInflight, file: File| {
        let taken = rig.continuity().take(&given, file, false);
        matches!(taken, Err(ContinuityError::Foreign(_)))
    };
    let elsewhere = VhostUserInflight {
        mmap_offset: 4096,
        ..region.0
    };
    assert!(is_foreign(elsewhere, region.1.try_clone().unwrap()));
    // It can be cut.
    let file = tempfile::tempfile().unwrap();
    file.set_len(region.0.mmap_size).unwrap();
    assert!(is_foreign(region.0, file));
    let wrong = VhostUserInflight {
        num_queues: QUEUES + 1,
        ..region.0
    };
    let taken = continuity.take(&wrong, region.1.try_clone().unwrap(), false);
    assert!(matches!(taken, Err(ContinuityError::Layout { .. })));
}

#[test]
fn a_region_of_a_smaller_disk_becomes_as_long_as_it_must() {
    let rig = Rig::new(InUse::Closed);
    let mut continuity = rig.continuity();
    let (given, _) = make(&mut continuity);
    let own_len = rig.device.engine().unwrap().remembered_len();
    // Just the standard part, all but a byte, and more than all.
    for len in [
        given.mmap_size - own_len,
        given.mmap_size - 1,
        given.mmap_size + 100,
    ] {
        let file = make_file(len).unwrap();
        assert_eq!(set(&mut continuity, &(given, file)).unwrap(), None);
        let kept = continuity.export().unwrap().unwrap();
        let now = kept.file.metadata().unwrap().len();
        assert_eq!(now, len.max(given.mmap_size));
    }
}

#[test]
fn a_region_has_a_part_for_each_queue_and_keeps_what_is_noted() {
    let rig = Rig::new(InUse::Closed);
    let mut continuity = rig.continuity();
    assert!(continuity.queue(0).is_none());
    let region = make(&mut continuity);
    assert_eq!(set(&mut continuity, &region).unwrap(), None);
    assert!(continuity.is_kept());
    let kept = continuity.export().unwrap().unwrap();
    let (len, size) = (kept.given.mmap_size, kept.given.queue_size);
    assert_eq!((len, size), (region.0.mmap_size, region.0.queue_size));
    assert!(!kept.is_used);
    let last = usize::from(QUEUES) - 1;
    assert!(continuity.queue(last).is_some() && continuity.queue(last + 1).is_none());
    // Nothing is noted before a ring starts.
    continuity.note_mode(true);
    assert_eq!(rig.note(), None);
    continuity.admit(false).unwrap();
    continuity.admit(true).unwrap();
    assert!(continuity.export().unwrap().unwrap().is_used);
    assert_eq!(rig.note(), Some(0));
    for (is_on, note) in [(true, NOTE_MODE | NOTE_ON), (false, NOTE_MODE)] {
        continuity.note_mode(is_on);
        assert_eq!(rig.note(), Some(note));
        // It comes back: to this connection, or to another one.
        assert_eq!(set(&mut continuity, &region).unwrap(), Some(is_on));
        let mut other = rig.continuity();
        assert_eq!(set(&mut other, &region).unwrap(), Some(is_on));
        other.admit(true).unwrap();
    }
    continuity.forget();
    assert_eq!(rig.note(), None);
    assert!(!continuity.is_kept() && continuity.queue(0).is_none());
}

/// The front-end can have put anything there.
#[test]
fn a_mode_is_known_only_if_it_was_noted() {
    let rig = Rig::new(InUse::Closed);
    let mut continuity = rig.continuity();
    let region = make(&mut continuity);
    set(&mut continuity, &region).unwrap();
    continuity.admit(false).unwrap();
    let others = !(NOTE_MODE | NOTE_ON);
    for (note, mode) in [
        (0, None),
        (NOTE_ON, None),
        (NOTE_MODE, Some(false)),
        (NOTE_MODE | NOTE_ON, Some(true)),
    ] {
        for note in [note, note | others] {
            rig.device.engine().unwrap().set_note(note);
            let taken = set(&mut rig.continuity(), &region).unwrap();
            assert_eq!(taken, mode, "{note:#x}");
        }
    }
    continuity.forget();
}

#[test]
fn whoever_asks_for_a_region_has_given_up_the_one_before() {
    let rig = Rig::new(InUse::Closed);
    let mut before = rig.continuity();
    let region = make(&mut before);
    set(&mut before, &region).unwrap();
    before.admit(false).unwrap();
    assert_eq!(rig.note(), Some(0));
    // Also of a connection that is gone.
    let mut continuity = rig.continuity();
    make(&mut continuity);
    assert_eq!(rig.note(), None);
}

#[test]
fn a_region_is_of_no_use_once_somebody_without_one_was_served() {
    // A ring that begins, and one that goes on with this process.
    for is_under_way in [false, true] {
        let rig = Rig::new(InUse::Closed);
        let mut before = rig.continuity();
        let region = make(&mut before);
        set(&mut before, &region).unwrap();
        before.admit(false).unwrap();
        // The driver begins anew: another one of the same guest.
        before.admit(false).unwrap();
        drop(before);
        let mut another = rig.continuity();
        another.admit(is_under_way).unwrap();
        assert_eq!(rig.note(), None);
        another.admit(false).unwrap();
        drop(another);
        let mut after = rig.continuity();
        assert_eq!(set(&mut after, &region).unwrap(), None);
        let lost = after.admit(true).unwrap_err();
        assert!(matches!(lost, ContinuityError::Lost(TakeOverError::Begun)));
        after.admit(false).unwrap();
        assert_eq!(rig.note(), Some(0));
    }
}

#[test]
fn without_what_a_process_knew_only_a_guest_that_begins_anew_is_served() {
    let not_kept = |result| matches!(result, Err(ContinuityError::NotKept));
    // No region at all.
    let rig = Rig::new(InUse::Open);
    let mut continuity = rig.continuity();
    assert!(not_kept(continuity.admit(true)));
    continuity.admit(false).unwrap();
    // From then on it is this process whom rings go on with.
    continuity.admit(true).unwrap();

    // One that is new.
    let rig = Rig::new(InUse::Open);
    let mut continuity = rig.continuity();
    let region = make(&mut continuity);
    set(&mut continuity, &region).unwrap();
    assert!(not_kept(continuity.admit(true)));
    continuity.admit(false).unwrap();
    continuity.note_mode(true);
    assert_eq!(rig.note(), Some(NOTE_MODE | NOTE_ON));

    // One whose standard part says that somebody has served a ring, whatever the
    // front-end says.
    let rig = Rig::new(InUse::Open);
    let mut continuity = rig.continuity();
    let region = make(&mut continuity);
    set(&mut continuity, &region).unwrap();
    continuity.queue(1).unwrap().recover(ENTRIES, 0, 0);
    assert!(not_kept(continuity.admit(false)));

    // And where the image was closed nobody knew more than it.
    let rig = Rig::new(InUse::Closed);
    rig.continuity().admit(true).unwrap();
    let mut continuity = rig.continuity();
    let region = make(&mut continuity);
    set(&mut continuity, &region).unwrap();
    continuity.admit(true).unwrap();
}

#[test]
fn a_region_with_something_else_in_it_is_of_no_use_to_who_goes_on() {
    let rig = Rig::new(InUse::Open);
    let mut continuity = rig.continuity();
    let region = make(&mut continuity);
    let own_at = region.0.mmap_size - rig.device.engine().unwrap().remembered_len();
    region.1.write_all_at(b"something", own_at).unwrap();
    assert_eq!(set(&mut continuity, &region).unwrap(), None);
    let lost = continuity.admit(true).unwrap_err();
    assert!(matches!(
        lost,
        ContinuityError::Lost(TakeOverError::Foreign)
    ));
    // What was wrong is said once.
    let again = continuity.admit(true).unwrap_err();
    assert!(matches!(again, ContinuityError::NotKept));
    // A guest that begins anew has no use for it either, but for its memory.
    continuity.admit(false).unwrap();
    continuity.note_mode(false);
    assert_eq!(set(&mut continuity, &region).unwrap(), Some(false));
}
