//! Which images fit into a chain.

use super::*;
use crate::format::Version;
use crate::image::testing::{header, set_word};

const CLUSTER: u64 = 64;

fn file_with(bytes: &[u8]) -> HostFile {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    HostFile {
        file,
        path: "image".into(),
        writable: false,
    }
}

#[test]
fn a_plain_image_is_all_of_the_disk_or_its_start() {
    let size = |len: usize, disk_size, is_disk| {
        let size = plain_size(&file_with(&vec![1; len]), Sector(disk_size), is_disk);
        size.ok()
    };
    for is_disk in [true, false] {
        assert_eq!(size(8 * 512, 8, is_disk), Some(Sector(8)));
        assert_eq!(size(8 * 512 + 100, 8, is_disk), Some(Sector(8)));
        assert_eq!(size(10 * 512, 8, is_disk), Some(Sector(8)));
    }
    assert_eq!(size(8 * 512, 9, true), None);
    assert_eq!(size(9 * 512 - 1, 9, true), None);
    assert_eq!(size(8 * 512, 9, false), Some(Sector(8)));
    assert_eq!(size(9 * 512 - 1, 9, false), Some(Sector(8)));
    assert_eq!(size(0, 9, false), Some(Sector(0)));
}

/// An image with so many sectors of disk and so many entries.
fn expandable(disk_size: u64, entries: u32) -> HostFile {
    let mut bytes = header(Version::V2, 5).to_bytes().to_vec();
    set_word(&mut bytes, 32, entries);
    bytes[36..44].copy_from_slice(&disk_size.to_le_bytes());
    bytes.resize(ClusterSize::MIN.bytes() as usize, 0);
    file_with(&bytes)
}

const READ: OpenMode = OpenMode::new(Access::Read);

/// With what lies above it.
fn check_below(file: &HostFile, above: (u64, u32), mode: OpenMode) -> Result<(u64, u32)> {
    let above = Some((Sector(above.0), above.1));
    let fits = check_expandable(ClusterSize::MIN, above, file, mode.read_header(file), mode);
    fits.map(|(disk_size, entries)| (disk_size.0, entries))
}

#[test]
fn an_image_has_the_clusters_of_its_disk() {
    let image = expandable(5 * CLUSTER, 7);
    let top = |cluster| check_expandable(cluster, None, &image, READ.read_header(&image), READ);
    assert_eq!(
        top(ClusterSize::MIN).unwrap(),
        (Sector(5 * CLUSTER), 7),
        "nothing limits the top"
    );
    let error = top(ClusterSize::DEFAULT).unwrap_err().to_string();
    assert!(error.contains("cluster size"), "{error}");
}

#[test]
fn an_image_is_no_larger_than_what_lies_on_it() {
    let odd = 5 * CLUSTER - 10;
    for mode in [READ, READ.to_check()] {
        for (disk_size, above) in [
            (3 * CLUSTER, 5 * CLUSTER),
            (odd, 5 * CLUSTER),
            (odd, odd),
            (5 * CLUSTER, 5 * CLUSTER),
        ] {
            let fits = check_below(&expandable(disk_size, 5), (above, 5), mode);
            assert_eq!(fits.unwrap(), (disk_size, 5), "below {above}");
        }
        for (disk_size, above) in [(5 * CLUSTER, 4 * CLUSTER), (odd, 3 * CLUSTER)] {
            let fits = check_below(&expandable(disk_size, 5), (above, 5), mode);
            let error = fits.unwrap_err().to_string();
            assert!(error.contains("its disk is larger"), "{error}");
        }
    }
}

#[test]
fn what_was_rounded_down_is_opened_for_a_check_only() {
    let odd = 5 * CLUSTER - 10;
    let fits = |mode| check_below(&expandable(odd, 5), (4 * CLUSTER, 4), mode);
    match fits(READ) {
        Err(ImageError::CutDisk {
            disk_size, above, ..
        }) => assert_eq!((disk_size.0, above.0), (odd, 4 * CLUSTER)),
        other => panic!("{other:?}"),
    }
    assert_eq!(fits(READ.to_check()).unwrap(), (odd, 5));
}

#[test]
fn an_image_has_no_more_entries_than_what_lies_on_it_or_than_it_needs() {
    let fits = |entries, above| {
        let below = expandable(4 * CLUSTER, entries);
        check_below(&below, (4 * CLUSTER, above), READ)
    };
    for (entries, above) in [(7, 7), (7, 9), (4, 4), (4, 3)] {
        assert_eq!(fits(entries, above).unwrap(), (4 * CLUSTER, entries));
    }
    for (entries, above) in [(8, 7), (5, 4), (5, 3)] {
        let error = fits(entries, above).unwrap_err().to_string();
        assert!(error.contains("its BAT is longer"), "{error}");
    }
}

#[test]
fn who_is_about_to_go_is_waited_for_on_each_level() {
    use crate::image::{create, create_snapshot};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    create(&path, Sector(16 * CLUSTER), ClusterSize::MIN).unwrap();
    create_snapshot(&path, None, None).unwrap();
    let images = open(&path, READ).unwrap().files;
    let [base, top] = &images[..] else {
        panic!("it has two levels");
    };
    let lock = |image: &HostFile| {
        let file = File::options().read(true).write(true).open(&image.path);
        ImageLock::acquire(&file.unwrap(), LockMode::Exclusive)
    };
    for image in [base, top] {
        let held = lock(image).unwrap();
        let mode = OpenMode::new(Access::Serve);
        let (opened, took) = thread::scope(|scope| {
            let start = Instant::now();
            let opened = scope.spawn(|| open(&path, mode).map(|opened| opened.files.len()));
            thread::sleep(PATIENCE / 5);
            drop(held);
            (opened.join().unwrap(), start.elapsed())
        });
        assert_eq!(opened.unwrap(), 2);
        assert!(took >= PATIENCE / 5, "{took:?}");
    }
    // Nor does it keep those that it has found free.
    let held = lock(base).unwrap();
    let refused = open(&path, OpenMode::new(Access::Serve)).unwrap_err();
    assert!(matches!(refused, ImageError::Locked { .. }), "{refused}");
    lock(top).unwrap();
    drop(held);
}

/// Snapshots are deleted beside those who read the disk.
#[test]
fn who_finds_a_level_gone_reads_the_descriptor_again() {
    use crate::image::{create, create_snapshot, delete_snapshot};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    create(&path, Sector(16 * CLUSTER), ClusterSize::MIN).unwrap();
    create_snapshot(&path, None, None).unwrap();
    let before = Bundle::open(&path).unwrap();
    let [base, _] = before.descriptor().images() else {
        panic!("it has two levels");
    };
    let base = base.guid;
    delete_snapshot(&path, base, &()).unwrap();
    assert_eq!(open_bundle(before, READ).unwrap().files.len(), 1);
    // A file that is not there, and no other descriptor either.
    let bundle = Bundle::open(&path).unwrap();
    std::fs::remove_file(path.join(&bundle.descriptor().images()[0].file)).unwrap();
    let refused = open_bundle(bundle, READ).unwrap_err();
    assert!(refused.to_string().contains("No such file"), "{refused}");
}
