//! How a disk lies in its files.

use super::*;

const PART: u64 = CLUSTER as u64;

#[test]
fn a_layout_says_what_is_read_from_where_and_what_is_in_the_files() {
    // Of six clusters, by level: 1 1 1 . . . / . 2 . 2 . . / . . 3 3 3 .
    let (disk, [first, _]) = three_levels();
    let mode = OpenMode::new(Access::Read);
    let fine = layout(&disk.path, mode, 100, 100).unwrap();
    assert_eq!((fine.part, fine.disk_size), (PART, 6 * PART));
    let held = fine.parts.iter().map(|part| &part.held[..]);
    let expected: [&[(usize, u64)]; 6] = [
        &[(2, PART)],
        &[(1, PART)],
        &[(0, PART)],
        &[(0, PART)],
        &[(0, PART)],
        &[],
    ];
    assert!(held.eq(expected), "{:?}", fine.parts);
    let sums = |layout: &Layout| {
        let levels = layout.levels.iter();
        let sums = levels.map(|level| (level.clusters, level.held, level.seen));
        sums.collect::<Vec<_>>()
    };
    let expected = [
        (3, 3 * PART, 3 * PART),
        (2, 2 * PART, PART),
        (3, 3 * PART, PART),
    ];
    assert_eq!(sums(&fine), expected);
    for level in &fine.levels {
        assert_eq!(level.length, PART * (1 + level.clusters));
        assert_eq!(level.stretches.len() as u64, 1 + level.clusters);
        assert_eq!(level.stretches[0].metadata, PART);
        assert_eq!(level.stretches[1].begun, PART);
        assert!(level.stretches[2..].iter().all(|at| at.following == PART));
        assert_eq!(level.pieces, 1);
    }

    // The same in fewer parts, and of a snapshot.
    let coarse = layout(&disk.path, mode, 2, 2).unwrap();
    assert_eq!((coarse.part, coarse.parts.len()), (3 * PART, 2));
    assert_eq!(sums(&coarse), expected);
    let then = layout(&disk.path, mode.snapshot(Some(first)), 2, 2).unwrap();
    assert_eq!(then.levels.len(), 1);
    assert_eq!(then.parts[0].held, [(0, 3 * PART)]);
}

#[test]
fn clusters_that_lie_behind_each_other_are_one_piece() {
    let disk = Disk::new(6);
    disk.write([1], 1);
    disk.write([0], 2);
    disk.write([2, 3], 3);
    disk.write([5], 4);
    let layout = layout(&disk.path, OpenMode::new(Access::Read), 100, 100).unwrap();
    let level = &layout.levels[0];
    // 1 is in front of 0, 2 behind 0, and 5 behind 3, with a hole between.
    assert_eq!((level.clusters, level.pieces), (5, 3));
    let begun = level.stretches.iter().map(|at| at.begun / PART);
    assert!(begun.eq([0, 1, 1, 1, 0, 0]), "{:?}", level.stretches);
}

#[test]
fn holes_of_a_raw_image_hold_nothing() {
    let disk = raw_disk(4);
    let file = fs::File::options().write(true).open(disk.top_file());
    let file = file.unwrap();
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        PART,
        PART,
    )
    .unwrap();
    let layout = layout(&disk.path, OpenMode::new(Access::Read), 2, 4).unwrap();
    let level = &layout.levels[0];
    assert!(level.is_raw);
    assert_eq!((level.held, level.seen), (3 * PART, 3 * PART));
    // A raw image has no clusters, and counts in those of new disks.
    assert_eq!(layout.parts.len(), 1);
    assert_eq!(layout.parts[0].held, [(0, 3 * PART)]);
}
