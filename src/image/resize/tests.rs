use super::*;
use crate::format::Version;
use crate::image::check::{Repair, check_delta};
use crate::image::testing::{
    Entry, Medium, cluster_content, delta as delta_of, header, image, read_cluster, with_extension,
};

const OLD: u64 = 6;
/// Takes three clusters for header and BAT.
const NEW: u64 = 20_000;

/// Guest clusters 1, 2, 4 and 5 are mapped; nothing is leaked.
fn sample(version: Version) -> Vec<u8> {
    use Entry::{At, Hole};
    image(
        &header(version, OLD),
        &[Hole, At(1), At(0), Hole, At(3), At(2)],
        4,
    )
}

/// The disk has one of its sizes, and all that was there is there.
fn check_content(bytes: &[u8], from: Version) -> Sector {
    let delta = delta_of(bytes.to_vec());
    assert!(delta.scan().unwrap().is_clean());
    assert_eq!(delta.geometry().version, from);
    for (guest, index) in [(1, 1), (2, 0), (4, 3), (5, 2)] {
        assert!(
            read_cluster(&delta, guest) == cluster_content(index),
            "{guest}"
        );
    }
    let zeros = delta.bat().iter().filter(|value| **value == 0).count();
    assert_eq!(zeros, delta.bat().len() - 4);
    delta.geometry().disk_size
}

#[test]
fn grows_and_relocates() {
    for version in [Version::V1, Version::V2] {
        let medium = Medium::default();
        let mut delta = Delta::load(medium.file("image", sample(version))).unwrap();
        let grid = delta.geometry().data_start % 32_768;
        grow(&mut delta, Sector(NEW * 64 - 1)).unwrap();
        let content = medium.contents().remove(0);
        assert_eq!(check_content(&content, version), Sector(NEW * 64 - 1));
        let mut delta = Delta::load(medium.file("again", content)).unwrap();
        assert_eq!(delta.header().in_use, InUse::Closed);
        assert_eq!(delta.geometry().entries, NEW as u32);
        assert_eq!(delta.geometry().data_start % 32_768, grid);
        let report = check_delta(&mut delta, None).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    }
}

#[test]
fn a_cut_anywhere_leaves_the_old_or_the_new_size() {
    for version in [Version::V1, Version::V2] {
        let medium = Medium::default();
        let mut delta = Delta::load(medium.file("image", sample(version))).unwrap();
        grow(&mut delta, Sector(NEW * 64)).unwrap();
        let (mut old, mut new) = (0, 0);
        let ends = [sample(version), medium.contents().remove(0)];
        let cuts = medium.cut_everywhere(8, |mut files| {
            let bytes = files.remove(0);
            if !ends.contains(&bytes) {
                let mark = delta_of(bytes.clone()).header().in_use;
                assert_eq!(mark, InUse::Open, "nobody would look");
            }
            match check_content(&bytes, version) {
                Sector(size) if size == OLD * 64 => old += 1,
                Sector(size) if size == NEW * 64 => new += 1,
                size => panic!("{size:?}"),
            }
            repairs(bytes, version);
        });
        assert!(old > 20 && new > 5 && cuts > 40, "{old} {new} {cuts}");
    }
}

/// After a cut, a repair leaves a clean image with the same content.
fn repairs(bytes: Vec<u8>, version: Version) {
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", bytes)).unwrap();
    let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    check_content(&medium.contents()[0], version);
}

#[test]
fn a_growth_inside_the_first_cluster_moves_nothing() {
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", sample(Version::V2))).unwrap();
    let before = delta.bat().to_vec();
    grow(&mut delta, Sector(8000 * 64)).unwrap();
    assert_eq!(delta.bat()[..6], before);
    assert_eq!(
        check_content(&medium.contents()[0], Version::V2),
        Sector(8000 * 64)
    );
}

#[test]
fn what_was_behind_the_end_does_not_come_to_light() {
    use Entry::{At, Hole};
    // The last cluster is mapped, and full of what the guest never wrote.
    let mut bytes = image(
        &header(Version::V2, OLD),
        &[Hole, Hole, Hole, Hole, Hole, At(0)],
        1,
    );
    let sectors = OLD * 64 - 10;
    bytes[36..44].copy_from_slice(&sectors.to_le_bytes());
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", bytes)).unwrap();
    grow(&mut delta, Sector(NEW * 64)).unwrap();
    medium.cut_everywhere(4, |mut files| {
        let delta = delta_of(files.remove(0));
        let cluster = read_cluster(&delta, 5);
        let visible = match delta.geometry().disk_size {
            Sector(size) if size == sectors => 54 * 512,
            _ => cluster.len(),
        };
        assert!(cluster[..54 * 512] == cluster_content(0)[..54 * 512]);
        assert!(cluster[54 * 512..visible].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn clusters_that_no_sector_of_the_disk_belongs_to_do_not_come_to_light_either() {
    use Entry::{At, Hole};
    // Of six entries the disk needs four.
    let mut bytes = image(
        &header(Version::V2, OLD),
        &[Hole, Hole, Hole, At(1), Hole, At(0)],
        2,
    );
    bytes[36..44].copy_from_slice(&(4 * 64_u64).to_le_bytes());
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", bytes)).unwrap();
    grow(&mut delta, Sector(OLD * 64)).unwrap();
    assert!(read_cluster(&delta, 3) == cluster_content(1));
    assert!(read_cluster(&delta, 5).iter().all(|byte| *byte == 0));
    let report = check_delta(&mut delta, None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}

#[test]
fn what_is_not_sound_is_not_grown() {
    use Entry::At;
    let mut open = sample(Version::V2);
    open[44..48].copy_from_slice(&0x746F_6E59u32.to_le_bytes());
    let doubled = image(&header(Version::V2, OLD), &[At(0), At(0)], 1);
    let mut converting = sample(Version::V2);
    // By itself the flag means nothing.
    converting[52] |= 2;
    converting[44] = 1;
    for bytes in [open, doubled, converting] {
        let medium = Medium::default();
        let mut delta = Delta::load(medium.file("image", bytes.clone())).unwrap();
        assert!(grow(&mut delta, Sector(NEW * 64)).is_err());
        assert!(medium.contents()[0] == bytes);
    }
}

#[test]
fn sizes_that_cannot_be() {
    for (version, size) in [
        (Version::V2, u64::MAX / 512),
        (Version::V1, 1 << 32),
        (Version::V2, OLD * 64 - 1),
    ] {
        let medium = Medium::default();
        let mut delta = Delta::load(medium.file("image", sample(version))).unwrap();
        let error = grow(&mut delta, Sector(size)).unwrap_err();
        assert!(
            matches!(
                error,
                ImageError::Header { .. } | ImageError::TooLarge { .. }
            ),
            "{error}"
        );
        assert!(medium.contents()[0] == sample(version));
    }
}

#[test]
fn relative_and_absolute_sizes() {
    let old = Sector(100);
    let apply = |size: NewSize| size.apply(Path::new("x"), old, ClusterSize::MIN, Shrink::Allowed);
    let ok = |size| apply(size).unwrap();
    assert_eq!(ok(NewSize::Exactly(Sector(100))), Sector(100));
    assert_eq!(ok(NewSize::Exactly(Sector(99))), old);
    assert_eq!(ok(NewSize::Exactly(Sector(63))), Sector(64));
    assert_eq!(ok(NewSize::Exactly(Sector(101))), Sector(128));
    assert_eq!(ok(NewSize::GrowBy(Sector(64))), Sector(192));
    assert_eq!(ok(NewSize::GrowBy(Sector(u64::MAX))), Sector(u64::MAX));
    assert_eq!(ok(NewSize::ShrinkBy(Sector(99))), Sector(64));
    assert!(apply(NewSize::ShrinkBy(Sector(100))).is_err());
}

/// Of the samples' clusters, those below `size` are there, and the rest of the disk
/// reads as zeros.
fn check_shrunk(bytes: &[u8], size: u64) {
    let delta = delta_of(bytes.to_vec());
    assert!(delta.scan().unwrap().is_clean());
    assert_eq!(delta.geometry().disk_size, Sector(size));
    for (guest, index) in [(1, 1), (2, 0), (4, 3), (5, 2)] {
        let inside = (size * 512).saturating_sub(u64::from(guest) * 32_768);
        let inside = inside.min(32_768) as usize;
        let expected = &cluster_content(index)[..inside];
        assert!(
            read_cluster(&delta, guest)[..inside] == *expected,
            "{guest}"
        );
    }
}

#[test]
fn a_smaller_disk_takes_less_and_keeps_what_is_left() {
    for version in [Version::V1, Version::V2] {
        for size in [5 * 64, 4 * 64 + 7, 3 * 64, 64, 1] {
            let medium = Medium::default();
            let mut delta = Delta::load(medium.file("image", sample(version))).unwrap();
            cut_down(&mut delta, Sector(size)).unwrap();
            let content = medium.contents().remove(0);
            assert!(bytes_in(&content) < bytes_in(&sample(version)));
            check_shrunk(&content, size);
            let mut delta = Delta::load(medium.file("again", content.clone())).unwrap();
            assert_eq!(delta.header().in_use, InUse::Closed);
            let report = check_delta(&mut delta, None).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            // Nothing of what was given up comes back.
            grow(&mut delta, Sector(OLD * 64)).unwrap();
            check_zero_from(&delta, size);
        }
    }
}

fn bytes_in(content: &[u8]) -> usize {
    content.iter().filter(|byte| **byte != 0).count()
}

fn check_zero_from<F: ImageFile>(delta: &Delta<F>, size: u64) {
    let content: Vec<u8> = (0..OLD as u32)
        .flat_map(|guest| read_cluster(delta, guest))
        .collect();
    assert!(
        content[(size * 512) as usize..]
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn a_shorter_bat_makes_room_for_data() {
    // Three clusters of header and BAT become one.
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", sample(Version::V2))).unwrap();
    grow(&mut delta, Sector(NEW * 64)).unwrap();
    let long = delta.geometry().data_start;
    cut_down(&mut delta, Sector(OLD * 64)).unwrap();
    assert_eq!((long, delta.geometry().data_start), (3 * 32_768, 32_768));
    check_content(&medium.contents()[0], Version::V2);
    grow(&mut delta, Sector(NEW * 64)).unwrap();
    check_content(&medium.contents()[0], Version::V2);
}

#[test]
fn a_cut_while_shrinking_leaves_the_old_or_the_new_disk() {
    let small = 4 * 64 + 7;
    for version in [Version::V1, Version::V2] {
        let medium = Medium::default();
        let mut delta = Delta::load(medium.file("image", sample(version))).unwrap();
        cut_down(&mut delta, Sector(small)).unwrap();
        let (mut old, mut new) = (0, 0);
        let cuts = medium.cut_everywhere(8, |mut files| {
            let bytes = files.remove(0);
            match delta_of(bytes.clone()).geometry().disk_size {
                Sector(size) if size == OLD * 64 => {
                    check_content(&bytes, version);
                    old += 1;
                }
                Sector(size) => {
                    check_shrunk(&bytes, size);
                    assert_eq!(size, small);
                    new += 1;
                }
            }
            let medium = Medium::default();
            let mut delta = Delta::load(medium.file("image", bytes)).unwrap();
            let size = delta.geometry().disk_size;
            let report = check_delta(&mut delta, Some(Repair::All)).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            grow(&mut delta, Sector(NEW * 64)).unwrap();
            check_zero_from(&delta, size.0);
        });
        assert!(old > 3 && new > 10 && cuts > 10, "{old} {new} {cuts}");
    }
}

#[test]
fn what_is_not_sound_is_not_shrunk() {
    let mut open = sample(Version::V2);
    open[44..48].copy_from_slice(&0x746F_6E59u32.to_le_bytes());
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", open.clone())).unwrap();
    assert!(cut_down(&mut delta, Sector(64)).is_err());
    assert!(medium.contents()[0] == open);
}

#[test]
fn the_descriptor_of_a_raw_disk_never_says_more_than_there_is() {
    // Behind the end of the disk is what was never the guest's.
    let (disk, tail) = (8 * 512, 100);
    for (new, seen) in [(6 * 512, disk + tail), (10 * 512, 10 * 512), (disk, disk)] {
        let medium = Medium::default();
        let file = medium.file("disk", vec![1; disk + tail]);
        let (old_size, new_size) = (disk as u64 / 512, new as u64 / 512);
        let mut lens = Vec::new();
        resize_raw(&file, Sector(old_size), Sector(new_size), || {
            lens.push(file.file_len().unwrap() as usize);
            Ok(())
        })
        .unwrap();
        assert_eq!(lens, [seen], "when a disk of {disk} bytes gets {new}");
        let mut expected = vec![1; disk.min(new)];
        expected.resize(new, 0);
        assert!(medium.contents()[0] == expected);
    }

    // A file that cannot get longer.
    let medium = Medium::default();
    let file = medium.file("disk", vec![1; 512]);
    let error = resize_raw(&file, Sector(1), Sector(1 << 40), || {
        panic!("the descriptor says more than there is")
    });
    assert!(error.is_err());
}

#[test]
fn what_a_format_extension_took_is_given_back_by_a_growth() {
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", with_extension())).unwrap();
    assert_eq!(delta.header().in_use, InUse::ClosedWithExtension);
    grow(&mut delta, Sector(8000 * 64)).unwrap();
    assert_eq!(delta.header().in_use, InUse::Closed);
    let report = check_delta(&mut delta, None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    for (guest, index) in [(0, 0), (1, 3)] {
        assert!(read_cluster(&delta, guest) == cluster_content(index));
    }
}

#[test]
fn a_file_that_ends_in_front_of_the_new_data_area_is_made_longer() {
    let medium = Medium::default();
    let empty = image(&header(Version::V2, OLD), &[], 0);
    let mut delta = Delta::load(medium.file("image", empty)).unwrap();
    grow(&mut delta, Sector(NEW * 64)).unwrap();
    let delta = delta_of(medium.contents().remove(0));
    let geometry = delta.geometry();
    assert_eq!(geometry.disk_size, Sector(NEW * 64));
    assert_eq!(delta.file_len().unwrap(), geometry.data_start);
    assert!(delta.bat().iter().all(|entry| *entry == 0));
}
