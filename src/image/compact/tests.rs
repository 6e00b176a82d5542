use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;

use super::*;
use crate::format::Version;
use crate::image::check::{Repair, check_delta};
use crate::image::testing::{
    CLUSTER, Entry, Medium, MemImage, cluster_content, header, image, read_cluster,
};
use Entry::{At, Hole};

const BLOCK: u64 = 4096;

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

/// A file on a file system that has no holes, which notes those that are made.
struct Noted {
    file: MemImage,
    holes: RefCell<Vec<Range<u64>>>,
    most_at_once: Cell<usize>,
}

impl ImageFile for Noted {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn file_len(&self) -> io::Result<u64> {
        self.file.file_len()
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let most = self.most_at_once.get();
        self.most_at_once.set(most.max(bytes.len()));
        self.file.read_exact_at(bytes, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.holes.borrow_mut().push(range.clone());
        self.file.punch(range)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }
}

/// The holes that are made in so many bytes of zeros, but for ones at these places.
fn holes(len: usize, data: &[usize], looked_at: Range<u64>) -> Vec<Range<u64>> {
    let mut bytes = vec![0; len];
    for &at in data {
        bytes[at] = 1;
    }
    let medium = Medium::default();
    let file = Noted {
        file: medium.file("image", bytes.clone()).without_holes(),
        holes: RefCell::default(),
        most_at_once: Cell::default(),
    };
    let has_data = punch_zeros(&file, looked_at.start, looked_at.end).expect("punch");
    assert_eq!(has_data, !data.is_empty());
    assert!(medium.contents()[0] == bytes, "zeros stay what they are");
    file.holes.into_inner()
}

#[test]
fn whole_blocks_of_zeros_become_holes_as_few_as_possible() {
    let at = |block: usize| block * BLOCK as usize;
    let range = |start, end| at(start) as u64..at(end) as u64;
    let punched = holes(at(8), &[0, at(3), at(5) - 1, at(7)], range(0, 8));
    assert_eq!(punched, [range(1, 3), range(5, 7)]);
    assert_eq!(holes(at(2), &[at(1)], range(0, 2)), [range(0, 1)]);
    assert_eq!(holes(at(3), &[], range(0, 3)), [range(0, 3)]);
    // Less than a block gives nothing back: at the start, at the end, between data.
    let start = 1024;
    let looked_at = start..at(3) as u64 + 1024;
    assert_eq!(holes(at(4), &[at(1), at(2)], looked_at), []);
    // With a block beside it, it goes with that.
    let looked_at = start..at(3) as u64;
    let both = start..at(2) as u64;
    assert_eq!(holes(at(3), &[at(2)], looked_at), [both]);
}

#[test]
fn large_clusters_are_looked_at_in_pieces() {
    use crate::format::{ClusterSize, Header, Sector};
    const LARGE: u64 = 16 << 20;
    let cluster = ClusterSize::from_bytes(LARGE).unwrap();
    let header = Header::new(Sector(LARGE / 512), cluster).unwrap();
    let mut bytes = header.to_bytes().to_vec();
    // The only cluster is mapped, and all zeros but for its end.
    bytes.extend(1_u32.to_le_bytes());
    bytes.resize(2 * LARGE as usize, 0);
    *bytes.last_mut().unwrap() = 1;
    let medium = Medium::default();
    let file = Noted {
        file: medium.file("image", bytes).without_holes(),
        holes: RefCell::default(),
        most_at_once: Cell::default(),
    };
    let delta = Delta::load(file).unwrap();
    let mut meter = Meter {
        progress: &(),
        done: 0,
    };
    delta.file().most_at_once.set(0);
    assert_eq!(punch_clusters(&delta, &mut meter).unwrap(), []);
    assert_eq!(delta.file().most_at_once.get() as u64, CHUNK);
    let holes = delta.file().holes.borrow();
    let gained: u64 = holes.iter().map(|hole| hole.end - hole.start).sum();
    assert_eq!(gained, LARGE - BLOCK);
}

#[test]
fn a_plain_image_is_looked_at_to_its_end() {
    let medium = Medium::default();
    let len = 2 * CHUNK as usize + 3 * BLOCK as usize;
    let mut bytes = vec![0; len];
    bytes[0] = 1;
    *bytes.last_mut().unwrap() = 1;
    let file = Noted {
        file: medium.file("plain", bytes).without_holes(),
        holes: RefCell::default(),
        most_at_once: Cell::default(),
    };
    let mut meter = Meter {
        progress: &(),
        done: 0,
    };
    compact_plain(&file, &mut meter).unwrap();
    assert_eq!(meter.done, len as u64);
    let holes = file.holes.borrow();
    let gained: u64 = holes.iter().map(|hole| hole.end - hole.start).sum();
    assert_eq!(gained, len as u64 - 2 * BLOCK);
}
