//! How many copies from a lower delta are made at a time.

use super::*;
use crate::format::Version;

/// Of such clusters a runner copies four at a time.
const LARGE: u64 = 16 << 20;
const AT_ONCE: usize = 4;
const COPIES: usize = AT_ONCE + 1;

/// A copy takes the memory of a cluster. Those that are too many wait for the end of
/// others, and are made.
#[test]
fn copies_that_are_too_many_at_a_time_wait_and_are_made() {
    // So that a copy moves little here.
    let medium = Medium {
        can_clone: true,
        ..Medium::default()
    };
    let disk = SimDisk::new(2, medium, 1);
    let cluster = ClusterSize::from_bytes(LARGE).unwrap();
    // The last cluster is short.
    let size = Sector((AT_ONCE as u64 * LARGE + 16384) / 512);
    disk.prepare(FileId(0), size.bytes() - 512, &[7; 512]);
    let header = Header::new(size, cluster).unwrap();
    disk.prepare(FileId(1), 0, &header.to_bytes());
    disk.set_len(FileId(1), header.geometry().data_start)
        .unwrap();
    let levels = vec![Level::Plain { size, cluster }, Level::Ploop];
    let options = Options {
        smallest_clone: 0,
        preallocation: COPIES as u64 * LARGE,
        max_queues: COPIES,
        ..Options::default()
    };
    let mut rig = Rig::open_chain(&disk, levels, options);
    // A queue has one as large as these under way.
    for _ in 1..COPIES {
        rig = rig.and_a_queue();
    }
    let at = |copy: usize| copy as u64 * LARGE + 4096;
    let tags: Vec<u64> = (0..COPIES)
        .map(|copy| rig.push_write_to(copy, at(copy), &[3; 4096]))
        .collect();
    let mut most = 0;
    while rig.done.borrow().len() < COPIES {
        assert!(
            rig.now.get() < Duration::from_secs(10),
            "some are forgotten"
        );
        rig.turn();
        let of_runners = (0..rig.runners.len()).map(|io| rig.disk.in_flight(io));
        most = most.max(of_runners.sum());
    }
    for tag in tags {
        assert_eq!(rig.ended(tag), Some(Ok(())));
    }
    assert_eq!(most, AT_ONCE);
    for copy in 0..COPIES {
        assert_eq!(rig.read(at(copy), 4096), [3; 4096]);
        assert_eq!(rig.read(at(copy) + 4096, 512), [0; 512]);
    }
    assert_eq!(rig.read(size.bytes() - 512, 512), [7; 512]);
}

fn over_a_base(medium: Medium) -> Rig {
    over_a_base_with(medium, 0)
}

fn over_a_base_with(medium: Medium, smallest_clone: u64) -> Rig {
    let disk = empty_image(medium, 2, 4 * CLUSTER);
    let base = Rig::open(&disk, 1, options());
    base.write(0, &vec![1; 2 * CLUSTER as usize]).unwrap();
    base.control(Control::Close).unwrap();
    drop(base);
    let options = Options {
        smallest_clone,
        ..options()
    };
    let rig = Rig::open(&disk, 2, options);
    // So that the file has grown ahead.
    rig.write(3 * CLUSTER, &[3; 512]).unwrap();
    rig.flush().unwrap();
    rig
}

#[test]
fn a_copy_that_could_not_be_read_gives_its_cluster_back() {
    let rig = over_a_base(Medium::default());
    let before = rig.engine.alloc().available();
    assert!(before > 0);
    rig.disk.change_medium(|medium| medium.faults.read = 1.0);
    for _ in 0..3 {
        assert_eq!(rig.write(0, &[2; 512]), Err(EngineError::Io(Errno::IO)));
    }
    assert_eq!(rig.engine.alloc().available(), before);
    rig.disk.change_medium(|medium| medium.faults.read = 0.0);
    rig.write(0, &[2; 512]).unwrap();
    assert_eq!(rig.engine.alloc().available(), before - 1);
}

#[test]
fn where_a_clone_fails_the_cluster_is_copied() {
    let mut copied = 0;
    for turns in 0..40 {
        let medium = Medium {
            can_clone: true,
            ..Medium::default()
        };
        let rig = over_a_base(medium);
        rig.disk.start_trace();
        rig.disk.change_medium(|medium| medium.faults.write = 1.0);
        let write = rig.push_write_to(0, 4096, &[2; 4096]);
        (0..turns).for_each(|_| rig.turn());
        rig.disk.change_medium(|medium| medium.faults.write = 0.0);
        let result = rig.result(write);
        let trace = rig.disk.take_trace();
        let has = |what| trace.iter().any(|line| line.contains(what));
        assert!(has("Clone"));
        if result.is_ok() && has("read file 0 ") {
            copied += 1;
            let mut expected = vec![1; CLUSTER as usize];
            expected[4096..8192].fill(2);
            assert!(rig.read(0, CLUSTER as usize) == expected);
        }
    }
    assert!(copied > 0, "each failed with its clone");
}

#[test]
fn a_write_that_is_not_aligned_is_not_made_over_a_clone() {
    let medium = Medium {
        can_clone: true,
        write_alignment: 4096,
        ..Medium::default()
    };
    let rig = over_a_base(medium);
    // Its end is as far behind a block as its start.
    rig.write(512, &[2; 4096]).unwrap();
    let mut expected = vec![1; CLUSTER as usize];
    expected[512..4608].fill(2);
    assert!(rig.read(0, CLUSTER as usize) == expected);
}

/// A header of the older version whose data area starts right behind the BAT: no cluster
/// lies on a border of blocks of the file system.
fn off_the_blocks(size: Sector) -> Header {
    let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
    let header = Header::new(size, cluster).unwrap();
    let header = header.in_version(Version::V1).unwrap();
    let mut bytes = header.to_bytes();
    bytes[48..52].fill(0);
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.geometry().data_start, 512);
    header
}

/// Whether the first write to a cluster of the base, of 4096 bytes inside the cluster, is
/// made over a clone; the cluster is right all the same.
fn is_cloned(rig: &Rig, cluster: u64, expected: &[u8]) -> bool {
    rig.disk.start_trace();
    rig.write(cluster * CLUSTER + 4096, &[2; 4096]).unwrap();
    let trace = rig.disk.take_trace();
    let mut expected = expected.to_vec();
    expected[4096..8192].fill(2);
    assert!(rig.read(cluster * CLUSTER, CLUSTER as usize) == expected);
    trace.iter().any(|line| line.contains("Clone"))
}

#[test]
fn a_cluster_that_is_not_on_blocks_is_not_cloned() {
    let medium = || Medium {
        can_clone: true,
        ..Medium::default()
    };
    let size = Sector(4 * CLUSTER / 512);
    let make = |disk: &SimDisk, file, header: &Header| {
        disk.prepare(file, 0, &header.to_bytes());
        disk.set_len(file, header.geometry().data_start).unwrap();
        disk.sync(file).unwrap();
    };

    // In both images clusters are as far behind a block.
    let disk = SimDisk::new(2, medium(), 1);
    make(&disk, FileId(0), &off_the_blocks(size));
    let base = Rig::open(&disk, 1, options());
    base.write(0, &vec![1; CLUSTER as usize]).unwrap();
    base.control(Control::Close).unwrap();
    drop(base);
    make(&disk, FileId(1), &off_the_blocks(size));
    let whole = vec![1; CLUSTER as usize];
    let options = Options {
        smallest_clone: 0,
        ..options()
    };
    let rig = Rig::open(&disk, 2, options.clone());
    assert!(!is_cloned(&rig, 0, &whole));

    // The end of the base is behind one, and in the top clusters are as far.
    let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
    let end = CLUSTER + 8192 + 512;
    let mut last = vec![0; CLUSTER as usize];
    last[..8192 + 512].fill(1);
    for header in [off_the_blocks(size), Header::new(size, cluster).unwrap()] {
        let disk = SimDisk::new(2, medium(), 1);
        disk.prepare(FileId(0), 0, &vec![1; end as usize]);
        make(&disk, FileId(1), &header);
        let base = Level::Plain {
            size: Sector(end / 512),
            cluster,
        };
        let rig = Rig::open_chain(&disk, vec![base, Level::Ploop], options.clone());
        assert!(!is_cloned(&rig, 1, &last));
    }
}

#[test]
fn small_clusters_are_not_cloned() {
    for (smallest_clone, may_clone) in [(CLUSTER - 1, true), (CLUSTER, true), (CLUSTER + 1, false)]
    {
        let medium = Medium {
            can_clone: true,
            ..Medium::default()
        };
        let rig = over_a_base_with(medium, smallest_clone);
        let whole = vec![1; CLUSTER as usize];
        let cloned = is_cloned(&rig, 0, &whole);
        assert_eq!(cloned, may_clone, "from {smallest_clone} bytes on");
    }
}
