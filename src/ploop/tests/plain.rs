//! A disk whose only image is a raw file.

use super::*;

/// No multiple of the cluster, nor of a block.
const SIZE: u64 = 4 * CLUSTER + 1536;

fn level(bytes: u64) -> Level {
    Level::Plain {
        size: Sector(bytes / 512),
        cluster: ClusterSize::from_bytes(CLUSTER).unwrap(),
    }
}

fn open(disk: &SimDisk) -> Rig {
    Rig::open_chain(disk, vec![level(SIZE)], options())
}

/// A file of so many bytes, all 5.
fn file(medium: Medium, bytes: u64) -> SimDisk {
    let disk = SimDisk::new(1, medium, 1);
    disk.prepare(FileId(0), 0, &vec![5; bytes as usize]);
    disk
}

fn len(disk: &SimDisk) -> u64 {
    disk.live_len(FileId(0))
}

#[test]
fn every_cluster_is_where_it_is_on_the_disk() {
    let disk = file(Medium::default(), SIZE);
    let rig = open(&disk);
    assert_eq!(rig.read(SIZE - 1536, 1536), [5; 1536]);
    rig.write(CLUSTER - 512, &[7; 1024]).unwrap();
    rig.write(SIZE - 512, &[9; 512]).unwrap();
    assert!(rig.write(SIZE - 512, &[9; 1024]).is_err());
    rig.flush().unwrap();
    rig.control(Control::Close).unwrap();
    let mut expected = vec![5; SIZE as usize];
    expected[CLUSTER as usize - 512..][..1024].fill(7);
    expected[SIZE as usize - 512..].fill(9);
    assert_eq!(disk.read_live(FileId(0), 0, SIZE as usize), expected);
    assert_eq!(len(&disk), SIZE, "nothing is added, nothing is cut");
    assert!(!disk.is_unsynced());
}

#[test]
fn discards_and_zeroes_are_done_in_place() {
    let disk = file(Medium::default(), SIZE);
    let rig = open(&disk);
    let full = disk.used_blocks();
    rig.discard(0, 2 * CLUSTER).unwrap();
    assert_eq!(disk.used_blocks(), full - 2 * CLUSTER / 4096);
    assert_eq!(
        rig.read(0, 2 * CLUSTER as usize),
        vec![0; 2 * CLUSTER as usize]
    );
    rig.zero(3 * CLUSTER + 512, SIZE - 3 * CLUSTER - 512, true)
        .unwrap();
    rig.zero(2 * CLUSTER, 1024, false).unwrap();
    let mut expected = vec![0; SIZE as usize];
    expected[2 * CLUSTER as usize + 1024..3 * CLUSTER as usize + 512].fill(5);
    assert_eq!(rig.read(0, SIZE as usize), expected);
    // What was given back is there to be written to.
    rig.write(512, &[8; 512]).unwrap();
    assert_eq!(rig.read(512, 512), [8; 512]);
    assert_eq!(len(&disk), SIZE);
}

#[test]
fn a_misaligned_end_is_written_without_what_is_behind_it() {
    let medium = Medium {
        write_alignment: 4096,
        ..Medium::default()
    };
    let disk = file(medium, SIZE + 4096);
    let rig = open(&disk);
    rig.write(SIZE - 512, &[7; 512]).unwrap();
    rig.zero(SIZE - 1024, 512, true).unwrap();
    rig.control(Control::Close).unwrap();
    let mut expected = [5; 1536 + 4096];
    expected[512..1024].fill(0);
    expected[1024..1536].fill(7);
    assert_eq!(
        disk.read_live(FileId(0), SIZE - 1536, 1536 + 4096),
        expected
    );
}

#[test]
fn a_file_that_is_too_short_reads_as_zeros_and_is_made_long_enough_to_write() {
    let disk = file(Medium::default(), CLUSTER + 512);
    disk.change_medium(|medium| medium.first_writable = FileId(1));
    let read_only = Options {
        read_only: true,
        ..options()
    };
    let rig = Rig::open_chain(&disk, vec![level(SIZE)], read_only);
    assert_eq!(rig.read(CLUSTER + 512, 1024), [0; 1024]);
    rig.control(Control::Close).unwrap();
    drop(rig);
    assert_eq!(disk.take_violations(), Vec::<String>::new());
    assert_eq!(len(&disk), CLUSTER + 512);

    disk.change_medium(|medium| medium.first_writable = FileId(0));
    let rig = open(&disk);
    assert_eq!(len(&disk), SIZE);
    assert!(!disk.is_unsynced());
    rig.write(SIZE - 512, &[7; 512]).unwrap();
    assert_eq!(rig.read(SIZE - 1024, 512), [0; 512]);
}

#[test]
fn a_full_host_parks_writes_to_holes_until_there_is_space() {
    let disk = file(Medium::default(), 4096);
    let used = disk.used_blocks();
    disk.change_medium(|medium| medium.capacity = Some(used));
    let rig = open(&disk);
    let data = rig.segments(&[7; 4096]);
    let start = Sector(2 * CLUSTER / 512);
    let parked = rig.push(Command::Write { start, data });
    for _ in 0..3000 {
        rig.turn();
    }
    assert_eq!(rig.queues[0].borrow().in_flight(), 1);
    rig.write(512, &[6; 512]).unwrap();
    assert_eq!(rig.read(512, 512), [6; 512]);
    rig.flush().unwrap();
    disk.change_medium(|medium| medium.capacity = None);
    rig.result(parked).unwrap();
    assert_eq!(rig.read(2 * CLUSTER, 4096), [7; 4096]);
    assert_eq!(len(&disk), SIZE);

    let used = disk.used_blocks();
    disk.change_medium(|medium| medium.capacity = Some(used));
    let data = rig.segments(&[8; 4096]);
    let start = Sector(3 * CLUSTER / 512);
    let hopeless = rig.push(Command::Write { start, data });
    for _ in 0..3000 {
        rig.turn();
    }
    rig.queues[0].borrow_mut().give_up_parked();
    assert_eq!(rig.result(hopeless), Err(EngineError::NoSpace));
}

#[test]
fn write_through_writes_are_stable_when_they_complete() {
    let disk = file(Medium::default(), SIZE);
    let rig = open(&disk);
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[7; 512]).unwrap();
    rig.zero(512, 512, true).unwrap();
    assert!(!disk.is_unsynced());
}

#[test]
fn a_failed_sync_is_not_forgotten_when_the_file_is_closed() {
    let disk = file(Medium::default(), SIZE);
    let rig = open(&disk);
    rig.write(0, &[7; 512]).unwrap();
    disk.change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
    disk.change_medium(|medium| medium.faults.sync = 0.0);
    assert_eq!(rig.control(Control::Close), Err(EngineError::SyncFailed));
}

#[test]
fn only_the_base_may_be_plain() {
    let disk = empty_image(Medium::default(), 2, 4 * CLUSTER);
    let chain = Chain {
        levels: vec![Level::Ploop, level(4 * CLUSTER)],
    };
    let refused = Engine::open(disk, &chain, options()).err();
    assert!(matches!(refused, Some(OpenError::Misfit { level: 1, .. })));
}

#[test]
fn the_first_flush_covers_what_a_process_before_has_written() {
    let disk = file(Medium::default(), SIZE);
    let rig = open(&disk);
    rig.write(0, &[7; 512]).unwrap();
    drop(rig);
    assert!(disk.is_unsynced());
    let rig = open(&disk);
    rig.flush().unwrap();
    assert!(!disk.is_unsynced());
}

/// Else its last block could not be written without what is behind it.
#[test]
fn only_a_raw_disk_that_ends_within_a_block_is_not_written_directly() {
    let alignment = |level: Level, bytes: u64| {
        let medium = Medium {
            write_alignment: 4096,
            ..Medium::default()
        };
        let disk = match level {
            Level::Ploop => empty_image(medium, 1, bytes),
            Level::Plain { .. } => file(medium, bytes),
        };
        let _rig = Rig::open_chain(&disk, vec![level], options());
        disk.write_alignment()
    };
    assert_eq!(alignment(level(SIZE), SIZE), 1);
    assert_eq!(alignment(level(4 * CLUSTER), 4 * CLUSTER), 4096);
    for bytes in [SIZE, 4 * CLUSTER] {
        assert_eq!(alignment(Level::Ploop, bytes), 4096);
    }
}
