use proptest::prelude::*;

use super::*;
use crate::format::{ClusterSize, Header, Sector, Version};

const CLUSTER: u64 = 1 << 15;

/// Version 2, 32 KiB clusters, 10 entries, one of which lies behind the disk;
/// header and BAT take host cluster 0.
fn v2() -> Geometry {
    Geometry {
        version: Version::V2,
        cluster: ClusterSize::MIN,
        entries: 10,
        disk_size: Sector(9 * 64 - 1),
        data_start: CLUSTER,
    }
}

/// The same in version 1; data starts at sector 1.
fn v1() -> Geometry {
    Geometry {
        version: Version::V1,
        data_start: 512,
        ..v2()
    }
}

fn used(scan: &BatScan) -> Vec<HostCluster> {
    let all = (0..scan.used.len() as u32).map(HostCluster);
    all.filter(|cluster| scan.used.contains(*cluster)).collect()
}

#[test]
fn a_clean_bat() {
    let geometry = v2();
    let scan = scan_bat(&geometry, 4 * CLUSTER, [0, 3, 0, 1, 0, 0, 0, 0, 0, 0]);
    assert!(scan.is_clean());
    assert_eq!(scan.mapped, 2);
    assert_eq!(scan.beyond_disk, 0);
    assert_eq!(scan.end, HostCluster(4));
    assert_eq!(used(&scan), [1, 3].map(HostCluster));
    assert_eq!(scan.leaked(&geometry), 1);
}

#[test]
fn an_empty_bat_of_an_empty_file_area() {
    for geometry in [v1(), v2()] {
        let scan = scan_bat(&geometry, geometry.data_start, [0; 10]);
        assert!(scan.is_clean());
        assert_eq!(scan.end, geometry.first_host_cluster());
        assert_eq!(scan.leaked(&geometry), 0);
        // Shorter than the data area's start: legal, nothing is there yet.
        let scan = scan_bat(&geometry, geometry.metadata_len(), [0; 10]);
        assert_eq!(scan.leaked(&geometry), 0);
    }
}

#[test]
fn a_file_may_become_longer_while_its_bat_is_looked_at() {
    let geometry = v2();
    let mut scanner = BatScanner::new(&geometry, 2 * CLUSTER);
    let (mut mapped, mut problems, mut asked) = (Vec::new(), Vec::new(), 0);
    scanner.look_at_all(
        [1, 3, 2, 4, 5].into_iter(),
        |guest, host| mapped.push((guest.0, host.0)),
        |problem| problems.push(problem),
        || {
            asked += 1;
            4 * CLUSTER + 1
        },
    );
    assert_eq!(mapped, [(0, 1), (1, 3), (2, 2)]);
    let (guest, host) = (GuestCluster(3), HostCluster(4));
    let cut = BatProblem::Truncated { guest, host };
    let (guest, host) = (GuestCluster(4), HostCluster(5));
    assert_eq!(problems, [cut, BatProblem::BeyondEnd { guest, host }]);
    assert_eq!(asked, 3, "only where it matters");
    let scan = scanner.end();
    assert_eq!(used(&scan), [1, 2, 3, 4].map(HostCluster));
    assert_eq!((scan.used.len(), scan.end), (5, HostCluster(5)));
}

#[test]
fn an_entry_behind_the_disk_is_used_and_no_problem() {
    let scan = scan_bat(&v2(), 2 * CLUSTER, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert!(scan.is_clean());
    assert_eq!((scan.mapped, scan.beyond_disk), (1, 1));
    assert!(scan.used.contains(HostCluster(1)));
}

#[test]
fn entries_behind_the_bat_are_not_looked_at() {
    let scan = scan_bat(&v2(), 2 * CLUSTER, std::iter::repeat_n(u32::MAX, 11));
    assert_eq!(scan.problem_count, 10);
}

#[test]
fn every_problem_of_version_2() {
    let geometry = Geometry {
        data_start: 2 * CLUSTER,
        ..v2()
    };
    let scan = scan_bat(&geometry, 3 * CLUSTER + 1, [1, 2, 2, 3, 4, u32::MAX]);
    let guest = GuestCluster;
    let host = HostCluster;
    assert_eq!(
        scan.problems,
        [
            BatProblem::InMetadata {
                guest: guest(0),
                value: 1
            },
            BatProblem::Duplicate {
                guest: guest(2),
                host: host(2)
            },
            BatProblem::Truncated {
                guest: guest(3),
                host: host(3)
            },
            BatProblem::BeyondEnd {
                guest: guest(4),
                host: host(4)
            },
            BatProblem::BeyondEnd {
                guest: guest(5),
                host: host(u32::MAX)
            },
        ]
    );
    assert_eq!(scan.mapped, 2);
    assert_eq!(scan.end, host(4));
}

#[test]
fn every_problem_of_version_1() {
    let geometry = v1();
    // Host cluster 0 is at sector 1, cluster 1 at sector 65.
    let scan = scan_bat(&geometry, 512 + CLUSTER, [1, 2, 65, 1]);
    assert_eq!(
        scan.problems,
        [
            BatProblem::OffGrid {
                guest: GuestCluster(1),
                value: 2
            },
            BatProblem::BeyondEnd {
                guest: GuestCluster(2),
                host: HostCluster(1)
            },
            BatProblem::Duplicate {
                guest: GuestCluster(3),
                host: HostCluster(0)
            },
        ]
    );
    let late = Geometry {
        data_start: 1024,
        ..geometry
    };
    let scan = scan_bat(&late, 1024 + CLUSTER, [1]);
    assert_eq!(
        scan.problems,
        [BatProblem::InMetadata {
            guest: GuestCluster(0),
            value: 1
        }]
    );
}

#[test]
fn a_hostile_bat_is_listed_only_so_far() {
    let header = Header::new(Sector(64 * 5000), ClusterSize::MIN).unwrap();
    let geometry = header.geometry();
    let scan = scan_bat(geometry, 1 << 20, std::iter::repeat_n(u32::MAX, 5000));
    assert_eq!(scan.problems.len(), BatScan::LISTED_MAX);
    assert_eq!(scan.problem_count, 5000);
}

#[test]
fn an_absurd_file_length_is_no_panic() {
    for geometry in [v1(), v2()] {
        let scan = scan_bat(&geometry, i64::MAX as u64, [u32::MAX; 10]);
        assert!(scan.used.len() <= u64::from(u32::MAX));
    }
}

/// Host cluster of each entry by the plainest reading of the format document.
fn model(geometry: &Geometry, file_len: u64, entries: &[u32]) -> (Vec<u64>, usize) {
    let mut offsets = Vec::new();
    let mut problems = 0;
    for &value in entries.iter().filter(|&&value| value != 0) {
        let offset = match geometry.version {
            Version::V1 => u64::from(value) * 512,
            Version::V2 => u64::from(value) * geometry.cluster.bytes(),
        };
        let on_grid = offset >= geometry.data_start
            && (offset - geometry.data_start).is_multiple_of(geometry.cluster.bytes());
        if !on_grid || offset >= file_len || offsets.contains(&offset) {
            problems += 1;
            continue;
        }
        problems += usize::from(offset + geometry.cluster.bytes() > file_len);
        offsets.push(offset);
    }
    offsets.sort_unstable();
    (offsets, problems)
}

proptest! {
    #[test]
    fn agrees_with_the_model(
        version_1: bool,
        start in 0u64..4,
        file_len in 0u64..12 * CLUSTER,
        entries in prop::collection::vec(
            prop_oneof![4 => 0u32..12, 4 => (0u32..12).prop_map(|c| 1 + 64 * c), 1 => any::<u32>()],
            0..=10,
        ),
        cut in 0usize..=10,
    ) {
        let mut geometry = if version_1 { v1() } else { v2() };
        geometry.data_start += start * CLUSTER;
        let scan = scan_bat(&geometry, file_len, entries.iter().copied());
        let (offsets, problems) = model(&geometry, file_len, &entries);
        let used = used(&scan).into_iter();
        let used: Vec<u64> = used.map(|cluster| geometry.host_offset(cluster)).collect();
        prop_assert_eq!(used, offsets);
        prop_assert_eq!(scan.problem_count as usize, problems);
        prop_assert_eq!(scan.problems.len(), problems);

        // As many at once as it likes makes no difference.
        let (mut listed, mut mapped) = (Vec::new(), Vec::new());
        let mut scanner = BatScanner::new(&geometry, file_len);
        let (front, back) = entries.split_at(cut.min(entries.len()));
        for piece in [front, back] {
            scanner.look_at_all(
                piece.iter().copied(),
                |guest, host| mapped.push((guest, host)),
                |problem| listed.push(problem),
                || file_len,
            );
        }
        let pieces = scanner.end();
        prop_assert_eq!(&listed, &scan.problems);
        prop_assert_eq!(pieces.used, scan.used);
        prop_assert_eq!(
            (pieces.mapped, pieces.beyond_disk, pieces.end, pieces.problem_count),
            (scan.mapped, scan.beyond_disk, scan.end, scan.problem_count)
        );
        let good = (0..).map(GuestCluster).zip(&entries).filter(|(guest, value)| {
            **value != 0 && listed.iter().all(|problem| problem.guest() != *guest)
        });
        let good = good.map(|(guest, value)| (guest, geometry.host_cluster(*value).unwrap()));
        prop_assert_eq!(mapped, good.collect::<Vec<_>>());
    }
}
