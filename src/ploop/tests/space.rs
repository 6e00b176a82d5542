//! Hosts that are full, in ways that a simple disk is not: where overwrites need space
//! as well, where clusters are shared, where an allocation is done in part. And images
//! that cannot grow.

use std::sync::atomic::Ordering;

use super::*;
use crate::format::{HostCluster, Version};
use crate::ploop::alloc::Extent;

const FULL: Result<(), EngineError> = Err(EngineError::Metadata(Errno::NOSPC));
/// Long enough for what waits for space to be tried again, in turns.
const SOON: usize = 3_000;

impl Rig {
    fn has_ended(&self, tag: u64) -> bool {
        self.done.borrow().iter().any(|done| done.tag == tag)
    }

    fn fill_up(&self) {
        let used = self.disk.used_blocks();
        self.disk
            .change_medium(|medium| medium.capacity = Some(used));
    }

    fn make_room(&self) {
        self.disk.change_medium(|medium| medium.capacity = None);
    }

    fn turn_for(&self, turns: usize) {
        for _ in 0..turns {
            self.turn();
        }
    }
}

/// An image of 16 clusters where every write needs space of its own.
fn copying_on_write() -> Rig {
    let medium = Medium {
        copies_on_write: true,
        ..Medium::default()
    };
    let disk = empty_image(medium, 1, 16 * CLUSTER);
    Rig::open(&disk, 1, options())
}

#[test]
fn an_overwrite_that_needs_space_waits_and_holds_nobody_up() {
    let rig = copying_on_write();
    rig.write(0, &[1; 4096]).unwrap();
    rig.flush().unwrap();
    rig.fill_up();
    let waiting = rig.push_write_to(0, 0, &[2; 4096]);
    rig.turn_for(SOON);
    assert!(!rig.has_ended(waiting));
    // Parts of it may have been written.
    let meanwhile = rig.read(0, 4096);
    assert!(meanwhile.iter().all(|byte| [1, 2].contains(byte)));
    rig.flush().unwrap();
    rig.make_room();
    assert_eq!(rig.result(waiting), Ok(()));
    assert!(rig.read(0, 4096) == [2; 4096]);
}

#[test]
fn a_stable_overwrite_that_needs_space_waits_and_is_no_failed_sync() {
    let rig = copying_on_write();
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[1; 4096]).unwrap();
    rig.fill_up();
    let waiting = rig.push_write_to(0, 0, &[2; 4096]);
    rig.turn_for(SOON);
    assert!(!rig.has_ended(waiting));
    assert!(rig.engine.stable_writes.is_empty());
    rig.flush().unwrap();
    rig.make_room();
    assert_eq!(rig.result(waiting), Ok(()));
    rig.flush().unwrap();
    let rig = rig.cut();
    assert!(rig.read(0, 4096) == [2; 4096]);
}

/// As a CephFS that is full, where nothing can be overwritten either.
#[test]
fn a_flush_waits_while_there_is_no_space_for_the_mapping() {
    let rig = copying_on_write();
    rig.write(0, &[1; 512]).unwrap();
    rig.fill_up();
    let waiting = rig.push(Command::Flush);
    rig.turn_for(SOON);
    assert!(!rig.has_ended(waiting));
    assert!(rig.engine.report().waits_for_space);
    rig.make_room();
    assert_eq!(rig.result(waiting), Ok(()));
    assert!(!rig.disk.is_unsynced());
    // That nobody was told of.
    assert_eq!(rig.flush(), Ok(()));
    rig.turn_for(SOON);
    assert!(!rig.engine.report().waits_for_space);
    let rig = rig.cut();
    assert_eq!(rig.read(0, 512), [1; 512]);
}

#[test]
fn a_page_that_finds_space_before_a_flush_comes_costs_no_flush() {
    let rig = copying_on_write();
    rig.write(0, &[1; 512]).unwrap();
    rig.fill_up();
    rig.turn_for(SOON);
    assert!(rig.engine.report().waits_for_space);
    rig.make_room();
    rig.turn_for(SOON);
    assert!(!rig.engine.report().waits_for_space);
    assert_eq!(rig.flush(), Ok(()));
}

#[test]
fn a_flush_that_is_given_up_fails_if_there_is_no_space() {
    let rig = copying_on_write();
    rig.write(0, &[1; 512]).unwrap();
    rig.fill_up();
    let waiting = rig.push(Command::Flush);
    rig.turn_for(SOON);
    rig.queues[0].borrow_mut().give_up_parked();
    assert_eq!(rig.result(waiting), FULL);
    let waiting = rig.push(Command::Flush);
    rig.turn_for(SOON);
    rig.make_room();
    rig.queues[0].borrow_mut().give_up_parked();
    assert_eq!(rig.result(waiting), Ok(()));
}

#[test]
fn a_flush_that_waits_for_space_ends_with_the_engine() {
    let rig = copying_on_write();
    rig.write(0, &[1; 512]).unwrap();
    rig.fill_up();
    let waiting = rig.push(Command::Flush);
    rig.turn_for(SOON);
    assert_eq!(rig.control(Control::Close), FULL);
    assert_eq!(rig.result(waiting), Err(EngineError::Stopped));
}

#[test]
fn a_flush_fails_while_there_is_no_space_for_the_mapping_if_that_is_asked_for() {
    let options = Options {
        on_enospc: OnEnospc::Report,
        ..options()
    };
    let rig = Rig::open(&copying_on_write().disk, 1, options);
    rig.write(0, &[1; 512]).unwrap();
    rig.fill_up();
    assert_eq!(rig.flush(), FULL);
    assert_eq!(rig.flush(), FULL);
    rig.make_room();
    rig.turn_for(SOON);
    // The failure of the last try, which nobody has heard of yet.
    let _ = rig.flush();
    assert_eq!(rig.flush(), Ok(()));
    assert!(!rig.disk.is_unsynced());
    let rig = rig.reopen();
    assert_eq!(rig.read(0, 512), [1; 512]);
}

#[test]
fn a_write_over_a_clone_that_finds_no_space_waits_with_its_data() {
    let medium = Medium {
        can_clone: true,
        ..Medium::default()
    };
    let disk = empty_image(medium, 2, 4 * CLUSTER);
    let base = Rig::open(&disk, 1, options());
    base.write(0, &vec![1; CLUSTER as usize]).unwrap();
    base.control(Control::Close).unwrap();
    let options = Options {
        smallest_clone: 0,
        ..options()
    };
    let rig = Rig::open(&disk, 2, options);
    // The file grows ahead of what is written; a clone gives that space back.
    rig.write(2 * CLUSTER, &[3; 512]).unwrap();
    rig.turn_for(SOON);
    assert!(rig.engine.alloc().available() > 0);
    rig.fill_up();
    rig.disk.start_trace();
    let waiting = rig.push_write_to(0, 4096, &[2; 4096]);
    // Others take what the clone has given back.
    for _ in 0..SOON {
        rig.fill_up();
        rig.turn();
        assert!(!rig.has_ended(waiting));
    }
    let trace = rig.disk.take_trace();
    assert!(trace.iter().any(|line| line.contains("Clone")));
    assert!(rig.read(4096, 4096) == [1; 4096]);
    rig.make_room();
    assert_eq!(rig.result(waiting), Ok(()));
    let mut expected = vec![1; CLUSTER as usize];
    expected[4096..8192].fill(2);
    assert!(rig.read(0, CLUSTER as usize) == expected);
}

#[test]
fn a_file_that_was_made_longer_in_part_is_used_to_its_end() {
    for seed in 0..20 {
        let medium = Medium::default();
        let disk = empty_image(medium, 1, 16 * CLUSTER);
        let options = Options {
            preallocation: 4 * CLUSTER,
            ..options()
        };
        let rig = Rig::open(&disk, 1, options);
        let room = rig.disk.used_blocks() + seed;
        rig.disk
            .change_medium(|medium| medium.capacity = Some(room));
        let tags: Vec<u64> = (0..16)
            .map(|cluster| rig.push_write_to(0, cluster * CLUSTER, &[cluster as u8 + 1; 512]))
            .collect();
        rig.turn_for(SOON);
        rig.make_room();
        for tag in tags {
            assert_eq!(rig.result(tag), Ok(()));
        }
        rig.flush().unwrap();
        let rig = rig.reopen();
        for cluster in 0..16 {
            assert_eq!(rig.read(cluster * CLUSTER, 512), [cluster as u8 + 1; 512]);
            assert_eq!(rig.read(cluster * CLUSTER + 512, 512), [0; 512]);
        }
    }
}

/// More than any list in the engine has room for at first.
#[test]
fn one_flush_covers_thousands_of_copies() {
    const COPIES: u64 = 2_200;
    const SMALL: u64 = ClusterSize::MIN.bytes();
    let disk = SimDisk::new(2, Medium::default(), 1);
    let size = Sector(COPIES * SMALL / 512);
    let header = Header::new(size, ClusterSize::MIN).unwrap();
    disk.prepare(FileId(0), size.bytes() - 512, &[7; 512]);
    disk.prepare(FileId(1), 0, &header.to_bytes());
    disk.set_len(FileId(1), header.geometry().data_start)
        .unwrap();
    let base = Level::Plain {
        size,
        cluster: ClusterSize::MIN,
    };
    // So that no page is due before the flush.
    let options = Options {
        writeback_delay: Duration::from_secs(3600),
        ..options()
    };
    let rig = Rig::open_chain(&disk, vec![base, Level::Ploop], options.clone());
    let tags: Vec<u64> = (0..COPIES)
        .map(|cluster| rig.push_write_to(0, cluster * SMALL, &[3; 512]))
        .collect();
    while rig.done.borrow().len() < tags.len() {
        rig.turn();
    }
    assert!(rig.done.borrow().iter().all(|done| done.result.is_ok()));
    rig.done.borrow_mut().clear();
    let entries = 64..64 + 4 * COPIES as usize;
    let map = |disk: &SimDisk| disk.read_live(FileId(1), 0, entries.end)[64..].to_vec();
    assert!(map(&disk).iter().all(|byte| *byte == 0));
    rig.flush().unwrap();
    assert!(map(&disk).chunks(4).all(|entry| entry != [0; 4]));
    assert!(!disk.is_unsynced());
    disk.power_off();
    rig.engine.abandon();
    disk.power_on();
    let rig = Rig::open_chain(&disk, vec![base, Level::Ploop], options);
    for cluster in (0..COPIES).step_by(100) {
        assert_eq!(rig.read(cluster * SMALL, 512), [3; 512]);
    }
    assert_eq!(rig.read(COPIES * SMALL - 512, 512), [7; 512]);
}

#[test]
fn clusters_that_come_back_are_enough_until_it_is_said_again_that_they_are_few() {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &vec![5; 16 * CLUSTER as usize]).unwrap();
    assert!(rig.engine.space_is_low.load(Ordering::Relaxed));
    rig.discard(0, 8 * CLUSTER).unwrap();
    rig.flush().unwrap();
    rig.turn_for(SOON);
    assert!(rig.engine.alloc().available() > rig.engine.options.low_water);
    assert!(!rig.engine.space_is_low.load(Ordering::Relaxed));
}

/// Nothing that is unmapped comes back any more either, so nobody waits for it.
#[test]
fn who_needs_space_after_a_failed_sync_does_not_wait_for_it() {
    let failed = Err(EngineError::SyncFailed);
    let rig = Rig::new(32 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    rig.disk.change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(rig.flush(), failed);
    rig.disk.change_medium(|medium| medium.faults.sync = 0.0);
    let write = |cluster| rig.write(cluster * CLUSTER, &[2; 512]);
    // What the file has by now is given out.
    let more = (1..32)
        .take_while(|&cluster| write(cluster).is_ok())
        .count();
    assert!(more < 31);
    rig.discard(0, CLUSTER).unwrap();
    rig.turn_for(SOON);
    assert_eq!(write(31), failed);
    assert_eq!(rig.read(CLUSTER, 512), [2; 512]);
}

/// It is not the file that has to grow for it.
#[test]
fn an_overwrite_that_needs_space_waits_for_it_after_a_failed_sync_too() {
    let rig = copying_on_write();
    rig.write(0, &[1; 4096]).unwrap();
    rig.disk.change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
    rig.disk.change_medium(|medium| medium.faults.sync = 0.0);
    rig.fill_up();
    let waiting = rig.push_write_to(0, 0, &[2; 4096]);
    rig.turn_for(SOON);
    assert!(!rig.has_ended(waiting));
    rig.make_room();
    assert_eq!(rig.result(waiting), Ok(()));
    assert!(rig.read(0, 4096) == [2; 4096]);
}

/// It was looked for in vain, and has come back before that was heard.
#[test]
fn who_needs_a_cluster_gets_the_one_that_came_back_meanwhile() {
    let rig = Rig::new(32 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    rig.disk.change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
    let HostCluster(start) = rig.engine.alloc().take().expect("the file grows ahead");
    while rig.engine.alloc().take().is_some() {}
    let write = rig.push_write_to(0, CLUSTER, &[2; 512]);
    rig.poll_queue(0);
    rig.poll_runners();
    let end = start + 1;
    rig.engine.alloc().put(Extent { start, end });
    assert_eq!(rig.result(write), Ok(()));
    assert_eq!(rig.read(CLUSTER, 512), [2; 512]);
}

/// An image in the older version, whose entries count sectors: with the largest clusters
/// there are few that they can name.
fn image_that_cannot_grow() -> Rig {
    const LARGE: ClusterSize = ClusterSize::MAX;
    let disk = SimDisk::new(1, Medium::default(), 1);
    let header = Header::new(Sector(4 * LARGE.sectors()), LARGE).unwrap();
    let header = header.in_version(Version::V1).unwrap();
    disk.prepare(FileId(0), 0, &header.to_bytes());
    disk.set_len(FileId(0), header.geometry().data_start)
        .unwrap();
    disk.sync(FileId(0)).unwrap();
    let rig = Rig::open(&disk, 1, options());
    rig.write(0, &[1; 512]).unwrap();
    rig.flush().unwrap();
    // The others are in use for something else, as far as the engine knows.
    let alloc = &rig.engine.alloc();
    alloc.extend(rig.engine.geometry().host_cluster_limit());
    while alloc.take().is_some() {}
    rig
}

#[test]
fn an_image_that_cannot_grow_waits_for_what_is_on_its_way_back() {
    let rig = image_that_cannot_grow();
    rig.discard(0, ClusterSize::MAX.bytes()).unwrap();
    assert_eq!(rig.write(ClusterSize::MAX.bytes(), &[2; 512]), Ok(()));
    assert_eq!(rig.read(ClusterSize::MAX.bytes(), 512), [2; 512]);
}

#[test]
fn an_image_that_cannot_grow_is_full_when_nothing_comes_back() {
    let rig = image_that_cannot_grow();
    let write = || rig.write(ClusterSize::MAX.bytes(), &[2; 512]);
    assert_eq!(write(), Err(EngineError::ImageFull));
    // What cannot be punched does not come back either.
    rig.disk.change_medium(|medium| medium.faults.zero = 1.0);
    rig.discard(0, ClusterSize::MAX.bytes()).unwrap();
    assert_eq!(write(), Err(EngineError::ImageFull));
}

/// In steps, before what the file has is given out.
#[test]
fn the_file_grows_ahead_of_its_writers() {
    const STEP: u32 = 8;
    let rig = Rig::new(64 * CLUSTER);
    rig.disk.start_trace();
    for cluster in 0..24 {
        rig.write(cluster * CLUSTER, &[1; 512]).unwrap();
        rig.turn_for(2_000);
        let available = rig.engine.alloc().available();
        assert!((STEP / 2..=2 * STEP).contains(&available), "{available}");
    }
    let trace = rig.disk.take_trace();
    let steps = trace.iter().filter(|line| line.contains("llocate"));
    let steps: Vec<_> = steps.collect();
    assert!(steps.len() <= 2 * 24 / STEP as usize, "{steps:?}");
}

/// A file may have no space for its BAT yet.
#[test]
fn the_mapping_of_what_is_in_the_file_finds_space_on_a_full_host() {
    const PAGES: u64 = 5;
    let rig = Rig::new(PAGES * 1024 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    rig.flush().unwrap();
    rig.fill_up();
    // The file has grown ahead by these.
    for page in 1..PAGES {
        rig.write(page * 1024 * CLUSTER, &[2; 512]).unwrap();
    }
    assert_eq!(rig.flush(), Ok(()));
    assert_eq!(rig.cut().read((PAGES - 1) * 1024 * CLUSTER, 512), [2; 512]);
}

#[test]
fn on_a_full_host_writes_fail_at_once_where_that_is_wanted() {
    let disk = empty_image(Medium::default(), 1, 16 * CLUSTER);
    let options = Options {
        on_enospc: OnEnospc::Report,
        ..options()
    };
    let rig = Rig::open(&disk, 1, options);
    rig.fill_up();
    for cluster in 0..3 {
        let full = rig.write(cluster * CLUSTER, &[1; 512]);
        assert_eq!(full, Err(EngineError::NoSpace));
    }
    assert!(rig.now.get() < Duration::from_millis(500), "they waited");
    rig.make_room();
    rig.write(0, &[1; 512]).unwrap();
}

/// What they would move, if there were space, keeps nobody from the disk.
#[test]
fn however_much_waits_for_space_the_others_go_on() {
    const COUNT: u64 = 48;
    let disk = SimDisk::new(1, Medium::default(), 1);
    let cluster = ClusterSize::DEFAULT;
    let header = Header::new(Sector(2 * COUNT * cluster.sectors()), cluster).unwrap();
    disk.prepare(FileId(0), 0, &header.to_bytes());
    disk.set_len(FileId(0), header.geometry().data_start)
        .unwrap();
    let rig = Rig::open(&disk, 1, options());
    rig.write(0, &[7; 4096]).unwrap();
    rig.flush().unwrap();
    rig.fill_up();
    let start = COUNT * cluster.bytes();
    // More than may be under way at a time.
    let write = rig.push_write_to(0, start, &vec![1; (COUNT * cluster.bytes()) as usize]);
    rig.turn_for(SOON);
    assert!(!rig.has_ended(write));
    let data = rig.segments(&[0; 4096]);
    let read = rig.push(Command::Read {
        start: Sector(0),
        data,
    });
    rig.turn_for(SOON);
    assert!(rig.has_ended(read));
    rig.make_room();
    assert_eq!(rig.result(write), Ok(()));
}

#[test]
fn who_waits_for_an_end_gives_up_what_is_parked() {
    let medium = Medium {
        capacity: Some(4 * CLUSTER / 4096),
        ..Medium::default()
    };
    let rig = Rig::open(&empty_image(medium, 1, 64 * CLUSTER), 1, options());
    let write = rig.push_write_to(0, 0, &vec![1; 8 * CLUSTER as usize]);
    (0..3000).for_each(|_| rig.turn());
    assert_eq!(rig.ended(write), None, "it is parked");
    rig.queues[0].borrow_mut().wait_for_an_end();
    (0..3000).for_each(|_| rig.turn());
    assert_eq!(rig.ended(write), Some(Err(EngineError::NoSpace)));
}
