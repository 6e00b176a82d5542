use std::collections::BTreeMap;

use super::*;
use crate::format::{Sector, Version};
use crate::image::check::{Repair, check_delta};
use crate::image::testing::{
    CLUSTER, Entry, Medium, MemImage, cluster_content, header, image, read_cluster,
};
use Entry::{At, Hole};

/// The clusters that a guest reads and that are not all zeros.
type Disk = BTreeMap<u32, Vec<u8>>;

/// What the guest reads: the upper image, and below it the lower one as far as
/// its own disk goes.
fn view(lower: &Level<MemImage>, upper: Option<&Delta<MemImage>>, size: u64) -> Disk {
    let mut disk = Disk::new();
    for guest in 0..size.div_ceil(CLUSTER as u64) as u32 {
        let mut cluster = match upper {
            Some(upper) if upper.lookup(GuestCluster(guest)).is_some() => {
                read_cluster(upper, guest)
            }
            _ if is_hole(lower, guest) => continue,
            _ => read_lower(lower, guest),
        };
        let inside = size - u64::from(guest) * CLUSTER as u64;
        cluster.truncate(inside.min(CLUSTER as u64) as usize);
        if cluster.iter().any(|byte| *byte != 0) {
            disk.insert(guest, cluster);
        }
    }
    disk
}

fn is_hole(lower: &Level<MemImage>, guest: u32) -> bool {
    match lower {
        Level::Ploop(delta) => delta.lookup(GuestCluster(guest)).is_none(),
        Level::Plain(_) => false,
    }
}

fn read_lower(lower: &Level<MemImage>, guest: u32) -> Vec<u8> {
    let (mut cluster, size) = match lower {
        Level::Ploop(delta) => (
            read_cluster(delta, guest),
            delta.geometry().disk_size.bytes(),
        ),
        Level::Plain(file) => {
            let mut cluster = vec![0; CLUSTER];
            let start = u64::from(guest) * CLUSTER as u64;
            crate::image::delta::read_or_zeros(file, &mut cluster, start).unwrap();
            (cluster, file.file_len().unwrap())
        }
    };
    let inside = size.saturating_sub(u64::from(guest) * CLUSTER as u64);
    let inside = inside.min(CLUSTER as u64) as usize;
    cluster[inside..].fill(0);
    cluster
}

/// What is merged into what.
struct Case {
    lower: Vec<u8>,
    is_plain: bool,
    upper: Vec<u8>,
}

impl Case {
    fn load(&self, lower: Vec<u8>) -> (Medium, Level<MemImage>, Delta<MemImage>) {
        let medium = Medium::default();
        let file = medium.file("lower", lower);
        let lower = match self.is_plain {
            true => Level::Plain(file),
            false => Level::Ploop(Delta::load(file).unwrap()),
        };
        let upper = Delta::load(medium.file("upper", self.upper.clone())).unwrap();
        (medium, lower, upper)
    }

    fn size(&self) -> u64 {
        let (_, _, upper) = self.load(self.lower.clone());
        upper.geometry().disk_size.bytes()
    }

    /// Merges, and merges again after each of many cuts. Returns their number.
    fn run(&self) -> usize {
        let size = self.size();
        let (medium, mut lower, upper) = self.load(self.lower.clone());
        let expected = view(&lower, Some(&upper), size);
        assert!(expected.len() >= 2);
        check_mergeable(&lower, &upper).unwrap();
        merge_into(&mut lower, &upper, true, &()).unwrap();
        self.check_merged(&medium, &expected);
        medium.cut_everywhere(6, |files| {
            assert!(files[1] == self.upper, "the upper image was changed");
            let (medium, mut lower, upper) = self.load(files.into_iter().next().unwrap());
            assert!(
                view(&lower, Some(&upper), size) == expected,
                "the disk was changed"
            );
            if let Level::Ploop(lower) = &mut lower {
                check_delta(lower, Some(Repair::All)).unwrap();
                assert!(lower.require_sound().is_ok());
            }
            assert!(
                view(&lower, Some(&upper), size) == expected,
                "the repair changed the disk"
            );
            merge_into(&mut lower, &upper, true, &()).unwrap();
            self.check_merged(&medium, &expected);
        })
    }

    /// The lower image alone is the disk now.
    fn check_merged(&self, medium: &Medium, expected: &Disk) {
        let (_, mut lower, _) = self.load(medium.contents().remove(0));
        assert!(view(&lower, None, self.size()) == *expected);
        if let Level::Ploop(lower) = &mut lower {
            let report = check_delta(lower, None).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            assert_eq!(lower.geometry().disk_size.bytes(), self.size());
        }
    }
}

/// The upper image has 1 and 2, and zeros in 3.
fn upper(clusters: u64) -> Vec<u8> {
    let header = header(Version::V2, clusters);
    let mut bytes = image(&header, &[Hole, At(1), At(0), At(2), Hole], 3);
    let zeros = bytes.len() - CLUSTER;
    bytes[zeros..].fill(0);
    bytes
}

#[test]
fn images_of_one_size() {
    for version in [Version::V1, Version::V2] {
        for lower in [
            [Hole, Hole, Hole, Hole, Hole],
            [At(0), Hole, At(1), Hole, At(2)],
            [At(2), At(1), At(0), At(3), Hole],
        ] {
            let mapped = lower.iter().filter(|entry| matches!(entry, At(_))).count();
            let case = Case {
                lower: image(&header(version, 5), &lower, mapped as u32),
                is_plain: false,
                upper: upper(5),
            };
            let cuts = case.run();
            assert!(cuts > 15, "{cuts}");
        }
    }
}

#[test]
fn a_lower_image_that_has_to_grow() {
    // Its disk ends inside cluster 3, which is full of what no guest wrote; and
    // the BAT of the upper takes the place of its first clusters.
    for version in [Version::V1, Version::V2] {
        let mut lower = image(&header(version, 4), &[At(0), At(1), Hole, At(2)], 3);
        lower[36..40].copy_from_slice(&(4u32 * 64 - 20).to_le_bytes());
        let case = Case {
            lower,
            is_plain: false,
            upper: {
                let header = header(Version::V2, 9000);
                image(&header, &[Hole, At(1), At(0), Hole, At(2)], 3)
            },
        };
        let cuts = case.run();
        assert!(cuts > 30, "{cuts}");
    }
}

#[test]
fn a_plain_base() {
    let content: Vec<u8> = (10..14).flat_map(cluster_content).collect();
    for len in [content.len(), 2 * CLUSTER + 512, 0] {
        let case = Case {
            lower: content[..len].to_vec(),
            is_plain: true,
            upper: upper(5),
        };
        let cuts = case.run();
        assert!(cuts > 5, "{cuts}");
    }
}

#[test]
fn zeros_hide_what_lies_below_a_lower_image_that_is_no_base() {
    let medium = Medium::default();
    let lower = image(&header(Version::V2, 5), &[], 0);
    let mut lower = Level::Ploop(Delta::load(medium.file("lower", lower)).unwrap());
    let upper = Delta::load(medium.file("upper", upper(5))).unwrap();
    merge_into(&mut lower, &upper, false, &()).unwrap();
    let Level::Ploop(lower) = lower else {
        unreachable!();
    };
    assert!(lower.lookup(GuestCluster(3)).is_some());
    assert!(read_cluster(&lower, 3) == vec![0; CLUSTER]);
    assert!(lower.lookup(GuestCluster(4)).is_none());
}

#[test]
fn a_disk_too_large_for_version_1_is_found_before() {
    let medium = Medium::default();
    let lower = image(&header(Version::V1, 5), &[], 0);
    let lower = Level::Ploop(Delta::load(medium.file("lower", lower)).unwrap());
    // 2 TiB, with an upper image whose header says so; no need for all of its BAT.
    let mut upper = Delta::load(medium.file("upper", upper(5))).unwrap();
    let huge = upper.header().grown(Sector(1 << 32)).unwrap();
    upper.set_header(huge);
    assert!(check_mergeable(&lower, &upper).is_err());
}

/// The kernel takes for written what a failed sync covered: also what the repair reads between the
/// two merges, and relies on.
#[test]
fn what_a_failed_sync_may_have_lost_is_merged_once_more() {
    // Their entries are in two sectors, so that not all are written with the mark.
    let mut entries = vec![Hole; 201];
    (entries[1], entries[150], entries[200]) = (At(1), At(0), At(2));
    let case = Case {
        lower: image(&header(Version::V2, 250), &[At(1), At(0)], 2),
        is_plain: false,
        upper: image(&header(Version::V2, 250), &entries, 3),
    };
    let mut failures = 0;
    loop {
        let (medium, mut lower, upper) = case.load(case.lower.clone());
        let expected = view(&lower, Some(&upper), case.size());
        medium.fail_sync_after(Some(failures));
        if merge_into(&mut lower, &upper, true, &()).is_ok() {
            break;
        }
        failures += 1;
        let load = |index| Delta::load(medium.reopen(index)).unwrap();
        let (mut lower, upper) = (load(0), load(1));
        check_delta(&mut lower, Some(Repair::All)).unwrap();
        let mut lower = Level::Ploop(lower);
        merge_into(&mut lower, &upper, true, &()).unwrap();
        let (_, lower, _) = case.load(medium.stable().remove(0));
        assert!(
            view(&lower, None, case.size()) == expected,
            "failure {failures}"
        );
    }
    // The mark, the clusters, the entries, and the closed mark.
    assert_eq!(failures, 4);
}

/// Whoever looks wants it to end.
struct Interrupted;

impl Progress for Interrupted {
    fn is_cancelled(&self) -> bool {
        true
    }
}

#[test]
fn a_merge_that_is_interrupted_leaves_the_disk_as_it_was() {
    let ploop = image(&header(Version::V2, 5), &[At(0), Hole, At(1)], 2);
    let plain: Vec<u8> = (10..14).flat_map(cluster_content).collect();
    for (lower, is_plain) in [(ploop, false), (plain, true)] {
        let case = Case {
            lower,
            is_plain,
            upper: upper(5),
        };
        let size = case.size();
        let (_medium, mut lower, upper) = case.load(case.lower.clone());
        let before = view(&lower, None, size);
        let expected = view(&lower, Some(&upper), size);
        let merged = merge_into(&mut lower, &upper, true, &Interrupted);
        assert!(matches!(merged, Err(ImageError::Interrupted { .. })));
        assert!(view(&lower, None, size) == before, "clusters were copied");
        assert!(view(&lower, Some(&upper), size) == expected);
    }
}
