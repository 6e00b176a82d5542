use proptest::prelude::*;

use super::*;
use crate::format::Version;
use crate::image::testing::{
    CLUSTER, Entry, Medium, cluster_content, delta, header, image, read_cluster, set_word,
    with_extension,
};
use Entry::{At, Hole, Raw};

fn load(bytes: Vec<u8>) -> (Medium, Delta<crate::image::testing::MemImage>) {
    let medium = Medium::default();
    let delta = Delta::load(medium.file("image", bytes)).unwrap();
    (medium, delta)
}

/// Duplicates, entries to nowhere, leaks in the middle and at the end, a tail
/// that is not whole, and no clean close.
fn wreck(version: Version) -> Vec<u8> {
    let header = header(version, 12);
    let beyond = match version {
        Version::V1 => Raw(1 + 64 * 100),
        Version::V2 => Raw(100),
    };
    // In front of the data area in both versions: sector 0 would be a hole.
    let in_metadata = match version {
        Version::V1 => Raw(u32::MAX),
        Version::V2 => Hole,
    };
    let entries = [At(1), Hole, At(1), At(3), beyond, At(1), in_metadata, At(4)];
    let mut bytes = image(&header, &entries, 7);
    bytes.truncate(bytes.len() - CLUSTER / 2);
    set_word(&mut bytes, 44, 0x746F_6E59);
    bytes
}

/// The content that repairs must keep, whatever else they do.
fn check_kept(bytes: &[u8]) {
    let delta = delta(bytes.to_vec());
    for (guest, index) in [(0, 1), (2, 1), (3, 3), (5, 1), (7, 4)] {
        assert!(
            read_cluster(&delta, guest) == cluster_content(index),
            "{guest}"
        );
    }
}

#[test]
fn a_clean_image() {
    for version in [Version::V1, Version::V2] {
        let bytes = image(&header(version, 6), &[At(1), Hole, At(0)], 2);
        let (medium, mut delta) = load(bytes.clone());
        for repair in [None, Some(Repair::Leaks), Some(Repair::All)] {
            let report = check_delta(&mut delta, repair).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0));
            assert_eq!(report.messages, [""; 0]);
            assert_eq!(report.total_clusters, 6);
            assert_eq!(report.allocated_clusters, 2);
            assert_eq!(report.fragmented_clusters, 0);
            assert_eq!(report.image_end_offset, bytes.len() as u64);
        }
        assert!(medium.contents()[0] == bytes, "a clean image was changed");
    }
}

#[test]
fn findings_are_counted() {
    let (medium, mut delta) = load(wreck(Version::V2));
    let report = check_delta(&mut delta, None).unwrap();
    // Not closed, two duplicates, one beyond the end.
    assert_eq!(report.corruptions, 4, "{report:?}");
    // 0 and 2, and 5 and half of 6 at the end.
    assert_eq!(report.leaks, 4, "{report:?}");
    assert!(medium.contents()[0] == wreck(Version::V2));
}

#[test]
fn repair_leaks_repairs_nothing_else() {
    let (medium, mut delta) = load(wreck(Version::V2));
    let report = check_delta(&mut delta, Some(Repair::Leaks)).unwrap();
    assert_eq!((report.corruptions, report.leaks), (4, 0), "{report:?}");
    assert_eq!((report.corruptions_fixed, report.leaks_fixed), (0, 4));
    assert_eq!(delta.header().in_use, InUse::Open);
    assert_eq!(
        delta.bat(),
        super::super::testing::delta(wreck(Version::V2)).bat()
    );
    check_kept(&medium.contents()[0]);
}

#[test]
fn repair_all_repairs_all() {
    for version in [Version::V1, Version::V2] {
        let (medium, mut delta) = load(wreck(version));
        let found = check_delta(&mut delta, None).unwrap();
        let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        assert_eq!(report.corruptions_fixed, found.corruptions);
        assert_eq!(report.leaks_fixed, found.leaks);
        assert_eq!(delta.header().in_use, InUse::Closed);
        check_kept(&medium.contents()[0]);
        assert_eq!(delta.bat()[4], 0);
        assert_eq!(delta.bat()[6], 0);
    }
}

#[test]
fn a_repair_can_be_cut_anywhere_and_run_again() {
    for version in [Version::V1, Version::V2] {
        let (medium, mut delta) = load(wreck(version));
        check_delta(&mut delta, Some(Repair::All)).unwrap();
        let cuts = medium.cut_everywhere(8, |mut files| {
            let bytes = files.remove(0);
            check_kept(&bytes);
            let (medium, mut delta) = load(bytes);
            let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            check_kept(&medium.contents()[0]);
        });
        assert!(cuts > 40, "{cuts}");
    }
}

#[test]
fn a_mapped_cluster_that_the_file_cuts_is_kept() {
    let mut bytes = image(&header(Version::V2, 6), &[At(0), At(1)], 2);
    bytes.truncate(bytes.len() - CLUSTER / 4);
    let (medium, mut delta) = load(bytes.clone());
    let report = check_delta(&mut delta, None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (1, 0), "{report:?}");
    let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    let content = medium.contents().remove(0);
    assert_eq!(content.len(), bytes.len() + CLUSTER / 4);
    assert!(content[CLUSTER..bytes.len()] == bytes[CLUSTER..]);
}

#[test]
fn data_of_an_entry_off_the_grid_is_kept() {
    // Sector 2 of the data area: other tools read 32 KiB from there.
    let mut entries = [Hole; 6];
    entries[0] = At(2);
    entries[1] = Raw(1 + 2);
    let check_kept = |bytes: Vec<u8>| {
        let (_, mut delta) = load(bytes);
        let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        let data = [cluster_content(0), cluster_content(1)].concat();
        assert!(read_cluster(&delta, 1) == data[1024..1024 + CLUSTER]);
        assert!(read_cluster(&delta, 0) == cluster_content(2));
    };
    let bytes = image(&header(Version::V1, 6), &entries, 3);
    check_kept(bytes.clone());
    // Nothing else uses those clusters, so they are given back: only once the
    // entry that led there is gone for good.
    let (medium, mut delta) = load(bytes);
    check_delta(&mut delta, Some(Repair::All)).unwrap();
    let cuts = medium.cut_everywhere(8, |mut files| check_kept(files.remove(0)));
    assert!(cuts > 30, "{cuts}");
}

#[test]
fn a_hole_between_clusters_is_no_leak() {
    let mut bytes = image(&header(Version::V2, 6), &[At(2), At(0)], 3);
    bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    let (_, mut delta) = load(bytes);
    let report = check_delta(&mut delta, None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}

#[test]
fn where_holes_cannot_be_told_zeros_are_no_leak_and_data_is() {
    let mut bytes = image(&header(Version::V2, 6), &[At(3), At(0)], 4);
    bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    let file = Medium::default().file("image", bytes).without_holes();
    let mut delta = Delta::load(file).unwrap();
    let report = check_delta(&mut delta, None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 1), "{report:?}");
    assert_eq!(report.messages, ["host cluster 3 is not used"]);
}

#[test]
fn a_valid_extension_is_in_use() {
    let (medium, mut delta) = load(with_extension());
    for repair in [Repair::Leaks, Repair::All] {
        let report = check_delta(&mut delta, Some(repair)).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        assert_eq!(report.messages, [""; 0]);
    }
    assert!(medium.contents()[0] == with_extension());
}

#[test]
fn repairing_leaks_keeps_a_valid_extension() {
    for repair in [Repair::Leaks, Repair::All] {
        let mut bytes = with_extension();
        bytes.extend([1; CLUSTER]);
        let (medium, mut delta) = load(bytes);
        let report = check_delta(&mut delta, Some(repair)).unwrap();
        assert_eq!((report.leaks, report.leaks_fixed), (0, 1), "{report:?}");
        assert!(medium.contents()[0] == with_extension());
    }
}

#[test]
fn a_broken_extension_is_dropped() {
    let mut bytes = with_extension();
    bytes[2 * CLUSTER + 1000] = 1;
    let (_, mut delta) = load(bytes);
    let report = check_delta(&mut delta, None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (1, 2), "{report:?}");
    let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    assert_eq!(delta.header().in_use, InUse::Closed);
    assert_eq!(delta.header().extension.0, 0);
}

/// What is known of its clusters is known to somebody else.
#[test]
fn an_image_that_needs_what_is_not_known_is_not_repaired() {
    use md5::{Digest, Md5};

    let mut bytes = with_extension();
    let extension = &mut bytes[2 * CLUSTER..3 * CLUSTER];
    extension[24..32].copy_from_slice(&5_u64.to_le_bytes());
    // Necessary.
    extension[32..40].copy_from_slice(&1_u64.to_le_bytes());
    let checksum = Md5::digest(&extension[24..]);
    extension[8..24].copy_from_slice(&checksum);
    for repair in [Repair::Leaks, Repair::All] {
        let (medium, mut delta) = load(bytes.clone());
        let error = check_delta(&mut delta, Some(repair)).unwrap_err();
        assert!(error.to_string().contains("format feature 0x5"), "{error}");
        assert!(medium.contents()[0] == bytes);
    }
}

#[test]
fn absurd_extension_offsets_are_named() {
    for sector in [1u64, 64, 129, u64::MAX / 512, u64::MAX] {
        let mut bytes = with_extension();
        bytes[56..64].copy_from_slice(&sector.to_le_bytes());
        let (_, mut delta) = load(bytes);
        let report = check_delta(&mut delta, None).unwrap();
        assert_eq!(report.corruptions, 1, "{sector}: {report:?}");
    }
}

/// Words that are interesting in headers and BATs of small images.
fn words() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..12,
        2 => (0u32..12).prop_map(|cluster| 1 + 64 * cluster),
        1 => any::<u32>(),
        1 => Just(u32::MAX),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever an image says: no panic, and what is repaired is clean.
    #[test]
    fn any_image_can_be_checked_and_repaired(
        version_1: bool,
        entries in prop::collection::vec(words(), 10),
        fields in prop::collection::vec((9usize..16, words()), 0..3),
        len in 0usize..9 * CLUSTER,
        fill: u8,
    ) {
        let version = if version_1 { Version::V1 } else { Version::V2 };
        let entries: Vec<_> = entries.into_iter().map(Raw).collect();
        let mut bytes = image(&header(version, 10), &entries, 0);
        for (field, word) in fields {
            set_word(&mut bytes, 4 * field, word);
        }
        bytes.resize(len, fill);
        let medium = Medium::default();
        let Ok(mut delta) = Delta::load(medium.file("image", bytes)) else {
            return Ok(());
        };
        if check_delta(&mut delta, Some(Repair::All)).is_ok() {
            let (_, mut again) = load(medium.contents().remove(0));
            let report = check_delta(&mut again, None).unwrap();
            prop_assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report);
        }
    }
}

#[test]
fn where_nothing_is_leaked_repairing_leaks_writes_nothing() {
    for version in [Version::V1, Version::V2] {
        let bytes = image(&header(version, 4), &[At(0), Hole, At(1)], 2);
        let (medium, mut delta) = load(bytes);
        check_delta(&mut delta, Some(Repair::Leaks)).unwrap();
        assert_eq!(medium.cut_everywhere(1, |_| ()), 0);
    }
}

#[test]
fn an_entry_off_the_grid_that_leads_behind_the_end_is_dropped() {
    let bytes = image(&header(Version::V1, 6), &[At(0), Raw(1_000_003)], 1);
    let (medium, mut delta) = load(bytes);
    let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    assert_eq!(delta.bat()[1], 0);
    assert!(read_cluster(&delta, 0) == cluster_content(0));
    let geometry = delta.geometry();
    let len = medium.contents()[0].len();
    assert_eq!(
        len,
        geometry.data_start as usize + CLUSTER,
        "nothing was copied"
    );
}

#[test]
fn data_in_front_of_the_first_block_is_kept() {
    // By the first block offset the first cluster belongs to the BAT, which does not reach
    // so far: other tools read what the entry says.
    for (version, first_block, inside, behind) in [
        (Version::V1, 1 + 64, Raw(1), Raw(1 + 64)),
        (Version::V2, 2 * 64, Raw(1), Raw(2)),
    ] {
        let mut bytes = image(&header(version, 6), &[Hole, inside, behind], 2);
        set_word(&mut bytes, 48, first_block);
        let (medium, mut delta) = load(bytes);
        let report = check_delta(&mut delta, None).unwrap();
        assert_eq!(report.corruptions, 1, "{report:?}");
        let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        let (_, delta) = load(medium.contents().remove(0));
        assert!(read_cluster(&delta, 1) == cluster_content(0));
        assert!(read_cluster(&delta, 2) == cluster_content(1));
    }
}

#[test]
fn a_first_block_offset_that_was_repaired_is_right_from_then_on() {
    let mut bytes = image(&header(Version::V2, 6), &[At(1), Hole, At(0)], 2);
    set_word(&mut bytes, 48, 1);
    let medium = Medium::default();
    let mut delta = Delta::load_for_repair(medium.file("image", bytes)).unwrap();
    let report = check_delta(&mut delta, None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (1, 0), "{report:?}");
    let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    let (_, delta) = load(medium.contents().remove(0));
    assert!(read_cluster(&delta, 0) == cluster_content(1));
    assert!(read_cluster(&delta, 2) == cluster_content(0));
}
