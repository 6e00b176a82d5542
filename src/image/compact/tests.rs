use super::*;
use crate::format::Version;
use crate::image::check::{Repair, check_delta};
use crate::image::testing::{
    CLUSTER, Entry, Medium, MemImage, cluster_content, header, image, read_cluster,
};
use Entry::{At, Hole};

/// Cluster 1 is zeros, cluster 4 zeros but for its end; three clusters of the
/// file are used by nothing.
fn sparse(version: Version) -> Vec<u8> {
    let header = header(version, 8);
    let entries = [At(2), At(4), Hole, At(6), At(7), At(0)];
    let mut bytes = image(&header, &entries, 8);
    let start = header.geometry().data_start as usize;
    let at = |index: usize| start + index * CLUSTER;
    bytes[at(4)..at(5)].fill(0);
    bytes[at(7)..at(8) - 512].fill(0);
    bytes
}

fn disk(delta: &Delta<MemImage>) -> Vec<Vec<u8>> {
    (0..8).map(|guest| read_cluster(delta, guest)).collect()
}

fn run(delta: &mut Delta<MemImage>, is_base: bool) {
    let mut meter = Meter {
        progress: &(),
        done: 0,
    };
    compact_delta(delta, is_base, &mut meter).unwrap();
}

#[test]
fn the_file_gets_as_short_as_it_can() {
    for version in [Version::V1, Version::V2] {
        for (is_base, clusters) in [(true, 4), (false, 5)] {
            let medium = Medium::default();
            let mut delta = Delta::load(medium.file("image", sparse(version))).unwrap();
            let before = disk(&delta);
            run(&mut delta, is_base);
            assert!(disk(&delta) == before);
            assert!(before[0] == cluster_content(2));
            let data = delta.file_len().unwrap() - delta.geometry().data_start;
            assert_eq!(data, clusters * CLUSTER as u64);
            // Above another image, a cluster of zeros hides what that has.
            assert_eq!(delta.lookup(GuestCluster(1)).is_some(), !is_base);
            let report = check_delta(&mut delta, None).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        }
    }
}

#[test]
fn a_cut_anywhere_changes_nothing_that_a_guest_sees() {
    for version in [Version::V1, Version::V2] {
        let medium = Medium::default();
        let mut delta = Delta::load(medium.file("image", sparse(version))).unwrap();
        let before = disk(&delta);
        run(&mut delta, true);
        let cuts = medium.cut_everywhere(8, |mut files| {
            let medium = Medium::default();
            let mut delta = Delta::load(medium.file("image", files.remove(0))).unwrap();
            assert!(disk(&delta) == before);
            let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            assert!(disk(&delta) == before);
            run(&mut delta, true);
            assert!(disk(&delta) == before);
        });
        assert!(cuts > 30, "{cuts}");
    }
}

#[test]
fn a_full_image_stays_as_it_is() {
    let medium = Medium::default();
    let bytes = image(&header(Version::V2, 3), &[At(1), At(0), At(2)], 3);
    let mut delta = Delta::load(medium.file("image", bytes.clone())).unwrap();
    run(&mut delta, true);
    assert!(medium.contents()[0] == bytes);
}

#[test]
fn holes_are_made_in_a_plain_image() {
    let medium = Medium::default();
    let mut bytes = [cluster_content(1), vec![0; CLUSTER], cluster_content(2)].concat();
    bytes.truncate(2 * CLUSTER + 5000);
    let file = medium.file("plain", bytes.clone());
    let mut meter = Meter {
        progress: &(),
        done: 0,
    };
    compact_plain(&file, &mut meter).unwrap();
    assert!(medium.contents()[0] == bytes);
}
