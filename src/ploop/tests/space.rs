//! Hosts that are full, in ways that a simple disk is not: where overwrites need space
//! as well, where clusters are shared, where an allocation is done in part.

use super::*;

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
    assert!(!rig.engine.is_in_doubt());
    rig.flush().unwrap();
    rig.make_room();
    assert_eq!(rig.result(waiting), Ok(()));
    rig.flush().unwrap();
    let rig = rig.cut();
    assert!(rig.read(0, 4096) == [2; 4096]);
}

#[test]
fn a_flush_fails_while_there_is_no_space_for_the_mapping() {
    let rig = copying_on_write();
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
    // The file has grown ahead of what is written; a clone gives that space back.
    rig.turn_for(SOON);
    rig.fill_up();
    let waiting = rig.push_write_to(0, 4096, &[2; 4096]);
    // Others take what the clone has given back.
    for _ in 0..SOON {
        rig.fill_up();
        rig.turn();
        assert!(!rig.has_ended(waiting));
    }
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
