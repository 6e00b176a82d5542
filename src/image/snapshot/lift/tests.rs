use super::*;
use crate::format::{Header, Version};
use crate::image::check::check_delta;
use crate::image::testing::{
    CLUSTER, Entry, Medium, MemImage, cluster_content, header, image, read_cluster,
};
use Entry::{At, Hole};

/// Images below one that gets what they have.
struct Case {
    upper: Vec<u8>,
    /// The highest first, and whether it is raw.
    lower: Vec<(Vec<u8>, bool)>,
    is_base: bool,
}

impl Case {
    fn load(&self, files: &[Vec<u8>]) -> (Medium, Delta<MemImage>, Vec<Level<MemImage>>) {
        let medium = Medium::default();
        let upper = Delta::load(medium.file("upper", files[0].clone())).unwrap();
        let lower = files[1..].iter().zip(&self.lower);
        let lower = lower.map(|(bytes, (_, is_plain))| {
            let file = medium.file("lower", bytes.clone());
            match is_plain {
                true => Level::Plain(file),
                false => Level::Ploop(Delta::load(file).unwrap()),
            }
        });
        let lower = lower.collect();
        (medium, upper, lower)
    }

    fn files(&self) -> Vec<Vec<u8>> {
        let lower = self.lower.iter().map(|(bytes, _)| bytes.clone());
        [self.upper.clone()].into_iter().chain(lower).collect()
    }

    /// How much of the disk a raw image has: what the image above it says.
    fn plain_size(&self, files: &[Vec<u8>]) -> u64 {
        let (_, upper, lower) = self.load(files);
        let mut size = upper.geometry().disk_size.bytes();
        for level in &lower {
            if let Level::Ploop(delta) = level {
                size = delta.geometry().disk_size.bytes();
            }
        }
        size
    }

    fn begin(&self, files: &[Vec<u8>]) -> (Medium, Result<Lift<MemImage>>) {
        let plain_size = self.plain_size(files);
        let (medium, upper, lower) = self.load(files);
        (medium, Lift::new(upper, lower, plain_size, self.is_base))
    }

    /// What a guest reads: through all, or of the upper image alone.
    fn view(&self, files: &[Vec<u8>], with_lower: bool) -> Vec<u8> {
        let plain_size = self.plain_size(files);
        let (_, upper, lower) = self.load(files);
        let size = upper.geometry().disk_size.bytes() as usize;
        let mut disk = vec![0; size.next_multiple_of(CLUSTER)];
        for (guest, cluster) in (0..).map(GuestCluster).zip(disk.chunks_mut(CLUSTER)) {
            let start = u64::from(guest.0) * CLUSTER as u64;
            if let Some(offset) = upper.lookup(guest) {
                upper.read(cluster, offset).unwrap();
                continue;
            }
            let mut lower = lower.iter().filter(|_| with_lower);
            let found = lower.find_map(|level| match level {
                Level::Ploop(delta) => {
                    let offset = delta.lookup(guest)?;
                    delta.read(cluster, offset).unwrap();
                    Some(delta.geometry().disk_size.bytes())
                }
                Level::Plain(file) => {
                    read_or_zeros(file, cluster, start).unwrap();
                    Some(plain_size)
                }
            });
            let end = found.unwrap_or_default().saturating_sub(start) as usize;
            cluster[end.min(CLUSTER)..].fill(0);
        }
        disk.truncate(size);
        disk
    }

    /// Does it, and again after each of many cuts. Returns their number.
    #[track_caller]
    fn run(&self) -> usize {
        let files = self.files();
        let expected = self.view(&files, true);
        assert!(expected != self.view(&files, false), "nothing to do");
        let (medium, lift) = self.begin(&files);
        self.end(&medium, lift.unwrap(), &expected);
        medium.cut_everywhere(6, |files| {
            assert!(files[1..] == self.files()[1..], "a lower image was changed");
            assert!(self.view(&files, true) == expected, "the disk was changed");
            let (medium, lift) = self.begin(&files);
            self.end(&medium, lift.unwrap(), &expected);
        })
    }

    #[track_caller]
    fn end(&self, medium: &Medium, mut lift: Lift<MemImage>, expected: &[u8]) {
        while lift.step().unwrap() != LiftStep::Done {}
        let (done, total) = lift.progress();
        assert_eq!(done, total);
        let files = medium.contents();
        assert!(self.view(&files, !self.is_base) == expected);
        let (_, mut upper, _) = self.load(&files);
        let report = check_delta(&mut upper, None).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    }
}

/// An image for a disk that ends inside its last cluster.
fn odd(version: Version, sectors: u32) -> Header {
    let whole = header(version, u64::from(sectors.div_ceil(64)));
    let mut bytes = whole.to_bytes();
    bytes[36..40].copy_from_slice(&sectors.to_le_bytes());
    Header::parse(&bytes).unwrap()
}

#[test]
fn an_image_gets_what_those_below_it_have() {
    for version in [Version::V2, Version::V1] {
        let middle = [Hole, At(1), At(0), Hole, At(2)];
        let lowest = [At(2), Hole, At(0), At(1)];
        let case = Case {
            upper: image(&header(version, 9), &[Hole, At(0), Hole, Hole, Hole], 1),
            lower: vec![
                (image(&header(version, 9), &middle, 3), false),
                (image(&header(Version::V2, 6), &lowest, 3), false),
            ],
            is_base: true,
        };
        let cuts = case.run();
        assert!(cuts > 20, "{cuts}");
    }
}

#[test]
fn what_lies_below_them_shows_where_none_has_anything() {
    let case = Case {
        upper: image(&header(Version::V2, 9), &[Hole, At(0)], 1),
        lower: vec![(image(&header(Version::V2, 9), &[At(1), At(0)], 2), false)],
        is_base: false,
    };
    let (medium, lift) = case.begin(&case.files());
    let mut lift = lift.unwrap();
    assert_eq!(lift.progress(), (0, 1));
    while lift.step().unwrap() != LiftStep::Done {}
    assert!(lift.place(GuestCluster(0)).is_some() && lift.place(GuestCluster(2)).is_none());
    assert!(case.view(&medium.contents(), false) == case.view(&case.files(), true));
}

#[test]
fn zeros_are_copied_only_to_hide_what_is_below() {
    let mut lower = image(&header(Version::V2, 9), &[At(0), At(1)], 2);
    let second = lower.len() - CLUSTER;
    lower[second..].fill(0);
    for is_base in [true, false] {
        let case = Case {
            upper: image(&header(Version::V2, 9), &[], 0),
            lower: vec![(lower.clone(), false)],
            is_base,
        };
        let (_medium, lift) = case.begin(&case.files());
        let mut lift = lift.unwrap();
        while lift.step().unwrap() != LiftStep::Done {}
        assert_eq!(lift.place(GuestCluster(1)).is_some(), !is_base);
        case.run();
    }
}

#[test]
fn of_a_preallocated_image_only_what_is_no_hole_is_to_be_copied() {
    // Each of three clusters of the file is a hole, and one of a level above that is one, too.
    let mut base = image(&header(Version::V2, 9), &[At(3), At(1), At(0), At(2)], 4);
    for index in [0, 2, 3] {
        let start = base.len() - (4 - index) * CLUSTER;
        base[start..start + CLUSTER].fill(0);
    }
    let mut middle = image(&header(Version::V2, 9), &[Hole, At(0)], 1);
    let start = middle.len() - CLUSTER;
    middle[start..].fill(0);
    let upper = || image(&header(Version::V2, 9), &[Hole, Hole, Hole, Hole, At(0)], 1);
    for (lower, is_base, total) in [
        (vec![(base.clone(), false)], true, 1),
        // What lies below would show.
        (vec![(base.clone(), false)], false, 4),
        // One that hides something does so until that is gone.
        (vec![(middle, false), (base, false)], true, 1),
    ] {
        let upper = upper();
        let case = Case {
            upper,
            lower,
            is_base,
        };
        let (medium, lift) = case.begin(&case.files());
        let mut lift = lift.unwrap();
        assert_eq!(lift.progress(), (0, total));
        let before = case.view(&case.files(), true);
        while lift.step().unwrap() != LiftStep::Done {}
        assert_eq!(lift.progress(), (total, total));
        assert!(case.view(&medium.contents(), !is_base) == before);
    }
}

#[test]
fn behind_the_end_of_a_smaller_disk_there_are_zeros() {
    for version in [Version::V2, Version::V1] {
        let lower = image(&odd(version, 3 * 64 - 20), &[At(0), At(1), At(2)], 3);
        let case = Case {
            upper: image(&header(version, 9), &[At(0)], 1),
            lower: vec![(lower, false)],
            is_base: true,
        };
        let at = 3 * CLUSTER - 20 * 512;
        let before = case.view(&case.files(), true);
        assert!(before[at - 512..at].iter().all(|byte| *byte != 0));
        assert!(before[at..].iter().all(|byte| *byte == 0));
        case.run();
    }
}

#[test]
fn a_disk_that_ends_inside_a_cluster_keeps_its_end() {
    let header = odd(Version::V2, 5 * 64 - 7);
    let lower = image(&header, &[Hole, Hole, Hole, Hole, At(0)], 1);
    let case = Case {
        upper: image(&header, &[At(0)], 1),
        lower: vec![(lower, false)],
        is_base: true,
    };
    assert_eq!(case.view(&case.files(), true).len(), (5 * 64 - 7) * 512);
    case.run();
}

#[test]
fn of_a_raw_image_only_what_is_no_hole_is_copied() {
    let mut raw = vec![0; 8 * CLUSTER];
    raw[CLUSTER..CLUSTER + 4096].fill(7);
    raw[5 * CLUSTER + 8192..6 * CLUSTER].fill(8);
    // Of this nothing is part of the disk.
    raw[7 * CLUSTER..].fill(9);
    let case = |lower: Vec<(Vec<u8>, bool)>| Case {
        upper: image(&header(Version::V2, 7), &[At(0)], 1),
        lower,
        is_base: true,
    };
    let alone = case(vec![(raw.clone(), true)]);
    let (_medium, lift) = alone.begin(&alone.files());
    assert_eq!(lift.unwrap().progress(), (0, 2));
    alone.run();
    let entries = [Hole, Hole, At(0), Hole, Hole, At(1)];
    let between = image(&header(Version::V2, 6), &entries, 2);
    let with_another = case(vec![(between, false), (raw, true)]);
    let (_medium, lift) = with_another.begin(&with_another.files());
    assert_eq!(lift.unwrap().progress(), (0, 3));
    with_another.run();
}

#[test]
fn one_that_needs_nothing_is_not_touched() {
    let case = Case {
        upper: image(&header(Version::V2, 9), &[At(0)], 1),
        lower: vec![(image(&header(Version::V2, 9), &[At(0)], 1), false)],
        is_base: true,
    };
    let (medium, lift) = case.begin(&case.files());
    assert_eq!(lift.unwrap().step().unwrap(), LiftStep::Done);
    assert_eq!(medium.cut_everywhere(1, |_| ()), 0, "nothing was written");
}

#[test]
fn one_that_is_given_up_is_closed_with_what_it_has_got() {
    let case = Case {
        upper: image(&header(Version::V2, 9), &[], 0),
        lower: vec![(image(&header(Version::V2, 9), &[At(1), At(0)], 2), false)],
        is_base: true,
    };
    let expected = case.view(&case.files(), true);
    let (medium, lift) = case.begin(&case.files());
    let mut lift = lift.unwrap();
    assert_eq!(lift.step().unwrap(), LiftStep::More);
    lift.close().unwrap();
    let files = medium.contents();
    let (_, mut upper, _) = case.load(&files);
    assert!(upper.require_sound().is_ok() && upper.lookup(GuestCluster(0)).is_some());
    assert_eq!(check_delta(&mut upper, None).unwrap().leaks, 0);
    assert!(case.view(&files, true) == expected);
    // And may go on.
    case.end(&medium, lift, &expected);
}

#[test]
fn a_wrong_map_is_refused() {
    let good = image(&header(Version::V2, 9), &[At(0)], 1);
    let bad = image(&header(Version::V2, 9), &[At(0), At(0)], 1);
    for (upper, lower) in [(&good, &bad), (&bad, &good)] {
        let case = Case {
            upper: upper.clone(),
            lower: vec![(lower.clone(), false)],
            is_base: true,
        };
        let (_medium, lift) = case.begin(&case.files());
        assert!(matches!(lift, Err(ImageError::Corrupt { .. })));
    }
}

/// A lift into an empty image, of clusters whose entries are in two sectors.
fn two_sectors() -> (Medium, Vec<u32>) {
    let guests = vec![0, 1, 120];
    let header = header(Version::V2, 130);
    let mut entries = vec![Hole; 121];
    for (index, guest) in (0..).zip(&guests) {
        entries[*guest as usize] = At(index);
    }
    let medium = Medium::default();
    medium.file("upper", image(&header, &[], 0));
    medium.file("lower", image(&header, &entries, 3));
    (medium, guests)
}

fn begin_again(medium: &Medium) -> Lift<MemImage> {
    let load = |index| Delta::load(medium.reopen(index)).unwrap();
    let lower = vec![Level::Ploop(load(1))];
    let mut lift = Lift::new(load(0), lower, 0, true).unwrap();
    lift.map_after(1);
    lift
}

/// How many of the clusters the image has, each as it should be.
#[track_caller]
fn count_right(upper: Vec<u8>, guests: &[u32]) -> (usize, bool) {
    let upper = crate::image::testing::delta(upper);
    upper.require_readable().unwrap();
    let mapped = (0..).zip(guests).filter(|(index, guest)| {
        let is_mapped = upper.lookup(GuestCluster(**guest)).is_some();
        assert!(!is_mapped || read_cluster(&upper, **guest) == cluster_content(*index));
        is_mapped
    });
    (mapped.count(), upper.require_sound().is_ok())
}

#[test]
fn what_a_failed_sync_may_have_lost_is_written_again() {
    let mut failures = 0;
    loop {
        let (medium, guests) = two_sectors();
        medium.fail_sync_after(Some(failures));
        let mut lift = begin_again(&medium);
        let failed = loop {
            match lift.step() {
                Ok(LiftStep::Done) => break false,
                step if step.is_err() => break true,
                _ => {}
            }
        };
        if !failed {
            break;
        }
        failures += 1;
        let mut lift = begin_again(&medium);
        while lift.step().unwrap() != LiftStep::Done {}
        let (count, is_closed) = count_right(medium.stable()[0].clone(), &guests);
        assert!(count == guests.len() && is_closed, "{count}, {is_closed}");
        medium.cut_everywhere(4, |files| {
            let (count, is_closed) = count_right(files[0].clone(), &guests);
            assert!(!is_closed || count == 0 || count == guests.len());
        });
    }
    // The mark, each cluster, all at the end, and the closed mark.
    assert_eq!(failures, 6);
}

/// That the file was cut is lost with the sync that failed, and the disk has the old bytes there.
#[test]
fn zeros_that_hide_something_do_not_rely_on_a_cut_that_may_be_lost() {
    let mut in_use = header(Version::V2, 9);
    in_use.in_use = InUse::Open;
    let mut lower = image(&header(Version::V2, 9), &[At(0)], 1);
    let cluster = lower.len() - CLUSTER;
    lower[cluster..].fill(0);
    let case = Case {
        upper: image(&in_use, &[], 1),
        lower: vec![(lower, false)],
        is_base: false,
    };
    let (medium, lift) = case.begin(&case.files());
    medium.fail_sync_after(Some(0));
    assert!(lift.unwrap().step().is_err());
    let load = |index| Delta::load(medium.reopen(index)).unwrap();
    let mut lift = Lift::new(load(0), vec![Level::Ploop(load(1))], 0, false).unwrap();
    while lift.step().unwrap() != LiftStep::Done {}
    for files in [medium.contents(), medium.stable()] {
        let upper = crate::image::testing::delta(files[0].clone());
        assert!(upper.lookup(GuestCluster(0)).is_some());
        assert!(is_zero(&read_cluster(&upper, 0)));
    }
}

#[test]
fn a_mark_that_may_have_been_written_is_taken_away_again() {
    let (medium, guests) = two_sectors();
    let mut lift = begin_again(&medium);
    medium.fail_next_write();
    assert_eq!(lift.step().unwrap(), LiftStep::Full);
    lift.close().unwrap();
    for files in [medium.contents(), medium.stable()] {
        assert_eq!(count_right(files[0].clone(), &guests), (0, true));
    }
}

/// Nor is a sync lost where a level that was left marked is to be written again.
#[test]
fn a_level_that_was_left_marked_waits_for_space_too() {
    let (medium, guests) = two_sectors();
    medium.fail_sync_after(Some(0));
    assert!(begin_again(&medium).step().is_err());
    let mut lift = begin_again(&medium);
    medium.fail_next_write();
    assert_eq!(lift.step().unwrap(), LiftStep::Full);
    while lift.step().unwrap() != LiftStep::Done {}
    let (count, is_closed) = count_right(medium.stable()[0].clone(), &guests);
    assert!(count == guests.len() && is_closed);
}

/// Nothing of what it could not make stable counts, however often it is told to come to an end.
#[test]
fn one_that_cannot_be_closed_when_it_is_given_up_stays_marked() {
    // The sync of what was copied, that of its entries, and that of the closed mark.
    for failures in 0..3 {
        let (medium, guests) = two_sectors();
        let mut lift = begin_again(&medium);
        lift.map_after(u64::MAX);
        assert_eq!(lift.step().unwrap(), LiftStep::More);
        medium.fail_sync_after(Some(failures));
        assert!(lift.close().is_err());
        assert!(lift.close().is_err() && lift.step().is_err());
        drop(lift);
        for files in [medium.contents(), medium.stable()] {
            let (_, is_closed) = count_right(files[0].clone(), &guests);
            assert!(!is_closed, "after {failures} syncs");
        }
        // Who deletes the image below later goes on with it.
        let mut lift = begin_again(&medium);
        while lift.step().unwrap() != LiftStep::Done {}
        assert_eq!(count_right(medium.stable()[0].clone(), &guests), (3, true));
    }
}

/// It was written, and the host said that it was not, nor could the other one be.
#[test]
fn a_closed_mark_that_is_there_already_becomes_stable() {
    let (medium, guests) = two_sectors();
    let mut lift = begin_again(&medium);
    while lift.step().unwrap() != LiftStep::Done {}
    let mut image = Delta::load(medium.reopen(0)).unwrap();
    image.begin().unwrap();
    image.set_mark(InUse::Closed);
    image.write_header().unwrap();
    assert_eq!(count_right(medium.stable()[0].clone(), &guests), (3, false));
    assert_eq!(begin_again(&medium).step().unwrap(), LiftStep::Done);
    assert_eq!(count_right(medium.stable()[0].clone(), &guests), (3, true));
}
