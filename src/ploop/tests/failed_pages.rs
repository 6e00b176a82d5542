//! Pages of the BAT that the host could not write while nobody waited (I7).

use rustix::io::Errno;

use super::*;

const FAILED: Result<(), EngineError> = Err(EngineError::Metadata(Errno::IO));

/// Until the page of a write is due, and its write has ended.
const WRITEBACK: usize = 1_200;
/// Until it is tried again.
const RETRY: usize = 1_200;

impl Rig {
    fn turns(&self, count: usize) {
        for _ in 0..count {
            self.turn();
        }
    }

    fn set_faulty(&self, is: bool) {
        let rate = f64::from(u8::from(is));
        self.disk.change_medium(|medium| medium.faults.write = rate);
    }

    /// A write has completed, and then the host fails the write of its page.
    fn with_failed_page() -> Self {
        let rig = Self::new(16 * CLUSTER);
        // So that failures of metadata are counted.
        let metadata_len = rig.engine.geometry().metadata_len();
        rig.disk
            .change_medium(|medium| medium.metadata_len = metadata_len);
        rig.write(0, &[5; 512]).unwrap();
        rig.set_faulty(true);
        rig.turns(WRITEBACK);
        assert!(rig.disk.take_failures() > 0);
        rig.set_faulty(false);
        rig
    }

    fn entry_on_disk(&self) -> Vec<u8> {
        self.disk.read_live(FileId(0), 64, 4)
    }
}

#[test]
fn a_failed_page_is_reported_by_the_next_flush_once() {
    let rig = Rig::with_failed_page();
    assert_eq!(rig.flush(), FAILED);
    // All the same it was written, and what the flush was for is stable.
    assert_ne!(rig.entry_on_disk(), [0; 4]);
    assert!(!rig.disk.is_unsynced());
    assert_eq!(rig.flush(), Ok(()));
}

#[test]
fn a_page_that_was_written_at_the_second_try_is_reported_too() {
    let rig = Rig::with_failed_page();
    assert_eq!(rig.entry_on_disk(), [0; 4]);
    rig.turns(RETRY);
    assert_ne!(rig.entry_on_disk(), [0; 4]);
    // Neither is this what tells of it, nor does it make it forgotten.
    rig.control(Control::Suspend).unwrap();
    rig.control(Control::Resume).unwrap();
    assert_eq!(rig.flush(), FAILED);
    assert_eq!(rig.flush(), Ok(()));
}

#[test]
fn a_page_that_fails_again_and_again_stays_dirty_and_fails_every_flush() {
    let rig = Rig::with_failed_page();
    rig.set_faulty(true);
    for _ in 0..3 {
        assert_eq!(rig.flush(), FAILED);
    }
    rig.set_faulty(false);
    assert_eq!(rig.flush(), Ok(()));
    assert_ne!(rig.entry_on_disk(), [0; 4]);
}

#[test]
fn flushes_that_wait_together_all_hear_of_it() {
    let rig = Rig::with_failed_page();
    let tags = [rig.push(Command::Flush), rig.push(Command::Flush)];
    for tag in tags {
        assert_eq!(rig.result(tag), FAILED);
    }
    assert_eq!(rig.flush(), Ok(()));
}

#[test]
fn what_was_made_good_does_not_keep_the_image_from_being_closed() {
    let rig = Rig::with_failed_page();
    rig.control(Control::Close).unwrap();
    assert_eq!(rig.disk.read_live(FileId(0), 44, 4), [0; 4]);
    assert_ne!(rig.entry_on_disk(), [0; 4]);
}

/// A page that failed was written at once, by a flush. Then older I/O ends, and clusters
/// on their way back need a sync, which waits until pages may be tried again.
#[test]
fn clusters_whose_sync_waits_for_the_time_of_a_retry_are_not_forgotten() {
    let rig = Rig::with_failed_page().and_a_queue();
    assert_eq!(rig.flush(), FAILED);
    // Then clusters are few, and there will be no more of them.
    rig.write(CLUSTER, &vec![5; 13 * CLUSTER as usize]).unwrap();
    rig.flush().unwrap();
    let data = rig.segments(&[0; 512]);
    let start = Sector(0);
    let older = rig.push_to(1, Command::Read { start, data });
    let others_turn = |rig: &Rig| {
        rig.poll_queue(0);
        rig.poll_runners();
        rig.poll_md();
        rig.step_disk();
    };
    let ranges = smallvec![range(0, CLUSTER)];
    for command in [Command::Discard { ranges }, Command::Flush] {
        let tag = rig.push(command);
        assert_eq!(rig.result_by(tag, others_turn), Ok(()));
    }
    assert_eq!(rig.result(older), Ok(()));
    // Until the hole is punched.
    rig.turns(20);
    assert!(!rig.disk.is_busy());
    let after = rig.md.borrow_mut().poll(rig.now.get());
    assert!(after.is_some(), "nothing would wake the metadata thread");
}

/// A sync for something else says nothing of a page whose write has failed.
#[test]
fn what_a_failed_page_contained_is_not_on_disk_after_the_next_sync_either() {
    const CLUSTERS: u64 = 24;
    let rig = Rig::new(CLUSTERS * CLUSTER);
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.turns(100);
    let metadata_len = rig.engine.geometry().metadata_len();
    rig.disk.change_medium(|medium| {
        medium.metadata_len = metadata_len;
        medium.faults.page = 1.0;
    });
    // The file grows meanwhile, which is synced before its clusters are mapped.
    for cluster in 0..CLUSTERS {
        assert!(rig.write(cluster * CLUSTER, &[6; 512]).is_err());
    }
    for cluster in 0..CLUSTERS {
        let again = rig.write(cluster * CLUSTER, &[7; 512]);
        assert!(again.is_err(), "{cluster}: no disk has it mapped");
    }
    rig.disk.change_medium(|medium| medium.faults.page = 0.0);
    rig.turns(RETRY);
    // Somebody hears of it, and then all is well.
    let _ = rig.write(0, &[8; 512]);
    rig.write(0, &[8; 512]).unwrap();
    assert_eq!(rig.cut().read(0, 512), [8; 512]);
}

/// What the failed sync covered, the kernel takes for written: the next process reads it, and no
/// sync of its own writes it. Its guest's flushes are worth no less for that.
#[test]
fn what_a_failed_sync_may_have_lost_is_stable_for_whoever_opens_the_image_next() {
    // More entries than the first sectors have: the mark is written with those.
    const FAR: u64 = 2000 * CLUSTER;
    for seed in 0..50 {
        let disk = SimDisk::new(1, Medium::default(), seed);
        let disk = empty_image_on(disk, 1, 4000 * CLUSTER);
        let rig = Rig::open(&disk, 1, options());
        rig.write(0, &[1; 512]).unwrap();
        rig.write(FAR, &[2; 512]).unwrap();
        disk.change_medium(|medium| medium.faults.sync = 1.0);
        assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
        disk.change_medium(|medium| medium.faults.sync = 0.0);
        rig.engine.abandon();
        disk.kill();
        drop(rig);
        disk.restart();
        let rig = Rig::open(&disk, 1, options());
        rig.write(FAR, &[3; 512]).unwrap();
        rig.write(0, &[4; 512]).unwrap();
        rig.flush().unwrap();
        let rig = rig.cut();
        assert_eq!(rig.read(FAR, 512), [3; 512], "seed {seed}");
        assert_eq!(rig.read(0, 512), [4; 512], "seed {seed}");
    }
}

/// Where holes are not told apart, a BAT that has them is no reason to need space.
#[test]
fn an_image_that_was_left_in_use_is_opened_on_a_full_host() {
    let medium = Medium {
        tells_holes: false,
        ..Medium::default()
    };
    let disk = empty_image(medium, 1, 4000 * CLUSTER);
    let full = disk.used_blocks();
    disk.change_medium(|medium| medium.capacity = Some(full));
    for _ in 0..2 {
        let rig = Rig::open(&disk, 1, options());
        assert_eq!(rig.read(0, 512), [0; 512]);
        rig.engine.abandon();
        disk.kill();
        drop(rig);
        disk.restart();
    }
}
