//! Whole operations on real bundles, in this process: what the disk and its snapshots
//! read afterwards, and what lies in the folder.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::check::{Repair, check};
use super::delta::Delta;
use super::layout::layout;
use super::map::{map, map_since};
use super::open::{Access, LOOK_PAUSE, LOOKS, OpenMode, image_of, look_at, open};
use super::reader::DiskReader;
use super::source::Source;
use super::*;
use crate::format::{ClusterSize, GuestCluster, Guid, HostCluster, InUse, Sector, Version};
use crate::storage::lock::{ImageLock, LockMode};
use crate::storage::opening::{self, NO_OPENING};

const CLUSTER: usize = 32 << 10;
const CLUSTER_SECTORS: u64 = 64;
/// How many clusters of a disk are looked at.
const SHOWN: usize = 8;

/// A bundle in a folder of its own.
struct Disk {
    folder: tempfile::TempDir,
    path: PathBuf,
}

impl Disk {
    fn new(clusters: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        create(&path, Sector(clusters * CLUSTER_SECTORS), ClusterSize::MIN).unwrap();
        Self { folder, path }
    }

    fn bundle(&self) -> Bundle {
        Bundle::open(&self.path).unwrap()
    }

    fn image_file(&self, guid: Guid) -> PathBuf {
        let bundle = self.bundle();
        self.path
            .join(&bundle.descriptor().image(guid).unwrap().file)
    }

    fn top_file(&self) -> PathBuf {
        self.image_file(self.bundle().descriptor().top())
    }

    /// As a guest does: fills whole clusters with a byte.
    fn write(&self, clusters: impl IntoIterator<Item = u32>, byte: u8) {
        let image = open(&self.path, OpenMode::new(Access::Serve)).unwrap();
        let file = image_of(image.files.last().unwrap()).unwrap();
        let mut delta = Delta::load(file).unwrap();
        delta.begin().unwrap();
        for guest in clusters.into_iter().map(GuestCluster) {
            let geometry = *delta.geometry();
            let offset = delta.lookup(guest).unwrap_or_else(|| {
                let end = geometry.host_clusters_below(delta.file_len().unwrap());
                let host = HostCluster((end as u32).max(geometry.first_host_cluster().0));
                let offset = geometry.host_offset(host);
                delta.set_len(offset + CLUSTER as u64).unwrap();
                delta.set_entry(guest, Some(host));
                offset
            });
            delta.write(&[byte; CLUSTER], offset, "write").unwrap();
            delta.clear_empty();
            delta.write_entries([guest]).unwrap();
        }
        delta.finish(InUse::Closed).unwrap();
    }

    /// What each of the first clusters is full of: of a snapshot, or of the disk.
    fn read(&self, snapshot: Option<Guid>) -> Vec<u8> {
        let mode = OpenMode::new(Access::Read).snapshot(snapshot);
        let image = open(&self.path, mode).unwrap();
        let reader = DiskReader::load(&image).unwrap();
        let clusters = reader.disk_size().bytes() as usize / CLUSTER;
        let mut bytes = vec![0xff; clusters.min(SHOWN) * CLUSTER];
        reader.read(&mut bytes, 0).unwrap();
        let clusters = bytes.chunks(CLUSTER);
        clusters
            .map(|cluster| {
                assert!(
                    cluster.iter().all(|byte| *byte == cluster[0]),
                    "a torn cluster"
                );
                cluster[0]
            })
            .collect()
    }

    fn check(&self, repair: Option<Repair>) -> CheckReport {
        check(&self.path, repair, OpenMode::new(Access::Read), &()).unwrap()
    }

    #[track_caller]
    fn expect_clean(&self) {
        let report = self.check(None);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        assert_eq!(report.messages, Vec::<String>::new());
    }

    fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.path).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    /// Descriptor and images, and no more.
    #[track_caller]
    fn expect_no_strays(&self) {
        let bundle = self.bundle();
        let images = bundle.descriptor().images().iter();
        let images = images.map(|image| image.file.to_str().unwrap().to_owned());
        let expected: BTreeSet<_> = images.chain(["DiskDescriptor.xml".to_owned()]).collect();
        let mut names = self.names();
        // What is said of snapshots.
        names.retain(|name| !name.ends_with(".notes") && !name.ends_with(".json"));
        assert_eq!(names, expected);
    }
}

fn snapshot(disk: &Disk) -> Guid {
    create_snapshot(&disk.path, None, None).unwrap()
}

/// Two snapshots and a top, each with data of its own.
fn three_levels() -> (Disk, [Guid; 2]) {
    let disk = Disk::new(6);
    disk.write([0, 1, 2], 1);
    let first = snapshot(&disk);
    disk.write([1, 3], 2);
    let second = snapshot(&disk);
    disk.write([2, 3, 4], 3);
    (disk, [first, second])
}

const FIRST: [u8; 6] = [1, 1, 1, 0, 0, 0];
const SECOND: [u8; 6] = [1, 2, 1, 2, 0, 0];
const TOP: [u8; 6] = [1, 2, 3, 3, 3, 0];

#[test]
fn snapshots_keep_what_the_disk_was() {
    let (disk, [first, second]) = three_levels();
    assert_eq!(disk.read(Some(first)), FIRST);
    assert_eq!(disk.read(Some(second)), SECOND);
    assert_eq!(disk.read(None), TOP);
    disk.expect_clean();
    disk.expect_no_strays();
}

#[test]
fn a_snapshot_with_one_child_goes_and_nothing_else_changes() {
    for index in 0..2 {
        let (disk, shots) = three_levels();
        delete_snapshot(&disk.path, shots[index], &()).unwrap();
        assert_eq!(disk.read(None), TOP);
        let other = 1 - index;
        assert_eq!(disk.read(Some(shots[other])), [FIRST, SECOND][other]);
        assert!(
            open(
                &disk.path,
                OpenMode::new(Access::Read).snapshot(Some(shots[index]))
            )
            .is_err()
        );
        assert_eq!(disk.bundle().descriptor().images().len(), 2);
        disk.expect_clean();
        disk.expect_no_strays();
    }
}

#[test]
fn a_snapshot_that_nothing_lies_on_goes_with_its_file() {
    let (disk, [first, second]) = three_levels();
    switch_snapshot(&disk.path, first).unwrap();
    assert_eq!(disk.read(None), FIRST);
    disk.expect_no_strays();
    delete_snapshot(&disk.path, second, &()).unwrap();
    assert_eq!(disk.read(None), FIRST);
    assert_eq!(disk.bundle().descriptor().images().len(), 2);
    disk.expect_clean();
    disk.expect_no_strays();
}

#[test]
fn a_chain_becomes_one_image() {
    let (disk, shots) = three_levels();
    merge_snapshots(&disk.path, None, None, &()).unwrap();
    assert_eq!(disk.read(None), TOP);
    assert_eq!(disk.bundle().descriptor().images().len(), 1);
    for shot in shots {
        assert!(disk.bundle().require(shot).is_err());
    }
    disk.expect_clean();
    disk.expect_no_strays();

    // A part of one: the second snapshot takes in the first.
    let (disk, [first, second]) = three_levels();
    merge_snapshots(&disk.path, Some(first), Some(second), &()).unwrap();
    assert_eq!(disk.read(Some(second)), SECOND);
    assert_eq!(disk.read(None), TOP);
    assert!(disk.bundle().require(first).is_err());
    assert!(merge_snapshots(&disk.path, Some(first), None, &()).is_err());
}

#[test]
fn going_back_leaves_other_branches_what_they_are() {
    let (disk, [first, second]) = three_levels();
    switch_snapshot(&disk.path, first).unwrap();
    disk.write([5], 9);
    assert_eq!(disk.read(None), [1, 1, 1, 0, 0, 9]);
    assert_eq!(disk.read(Some(second)), SECOND);
    disk.expect_clean();
    // Two lie on it now.
    assert!(delete_snapshot(&disk.path, first, &()).is_err());
    assert!(switch_snapshot(&disk.path, disk.bundle().descriptor().top()).is_err());
    // What only the other branch uses is checked as well.
    let file = disk.image_file(second);
    let mut bytes = fs::read(&file).unwrap();
    bytes[64..68].copy_from_slice(&0xffff_u32.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    assert_eq!(disk.check(None).corruptions, 1);
    assert_eq!(disk.check(Some(Repair::All)).corruptions_fixed, 1);
    disk.expect_clean();
}

#[test]
fn a_merge_that_was_cut_off_is_finished_by_a_repair() {
    let (disk, [first, second]) = three_levels();
    let mut bundle = disk.bundle();
    let mut descriptor = bundle.descriptor().clone();
    descriptor.begin_collapse(first).unwrap();
    bundle.save(descriptor).unwrap();
    assert_eq!(disk.read(None), TOP);
    assert_eq!(disk.check(None).leaks, 1);
    let report = disk.check(Some(Repair::Leaks));
    assert_eq!((report.leaks, report.leaks_fixed), (0, 1), "{report:?}");
    assert_eq!(disk.read(None), TOP);
    assert_eq!(disk.read(Some(second)), SECOND);
    assert_eq!(disk.bundle().descriptor().images().len(), 2);
    disk.expect_clean();
    disk.expect_no_strays();
}

#[test]
fn only_what_a_change_has_left_is_removed() {
    let disk = Disk::new(2);
    disk.write([0], 1);
    let put = |name: &str, content: &[u8]| fs::write(disk.path.join(name), content).unwrap();
    let image = fs::read(disk.top_file()).unwrap();
    let guid = Guid::random();
    let delta = format!("root.hds.{guid}");
    put(&delta, b"left");
    put(".ploop-img-0123", b"left");
    let kept = [
        "notes.txt",
        "root.hds.{12}",
        "root.hds.12}",
        "root.hds.{12",
        "other.hds",
    ];
    for name in kept {
        put(name, b"kept");
    }
    put("old.hds", &image);
    let folder = format!("root.hds.{}", Guid::random());
    fs::create_dir(disk.path.join(&folder)).unwrap();
    let report = disk.check(None);
    assert_eq!((report.corruptions, report.leaks), (0, 2), "{report:?}");
    let of_image = |text: &&String| text.contains("is an image but not part of the disk");
    let told: Vec<_> = report.messages.iter().filter(of_image).collect();
    assert!(told.len() == 1 && told[0].contains("old.hds"), "{told:?}");
    let report = disk.check(Some(Repair::Leaks));
    assert_eq!((report.leaks, report.leaks_fixed), (0, 2), "{report:?}");
    let names = disk.names();
    assert!(!names.contains(&delta) && !names.contains(".ploop-img-0123"));
    for name in kept.into_iter().chain(["old.hds", &folder]) {
        assert!(names.contains(name), "{name}");
    }
    assert_eq!(disk.read(None), [1, 0]);
}

#[test]
fn a_disk_grows_and_shrinks_and_its_descriptor_follows() {
    let size = |clusters: u64| NewSize::Exactly(Sector(clusters * CLUSTER_SECTORS));
    let (disk, [first, _]) = three_levels();
    resize(&disk.path, NewSize::GrowBy(Sector(0)), Shrink::Refused).unwrap();
    assert_eq!(disk.read(None), TOP);
    resize(&disk.path, size(9000), Shrink::Refused).unwrap();
    let mut expected = TOP.to_vec();
    expected.resize(SHOWN, 0);
    assert_eq!(disk.read(None), expected);
    assert_eq!(disk.read(Some(first)), FIRST);
    assert_eq!(
        disk.bundle().descriptor().disk_size,
        Sector(9000 * CLUSTER_SECTORS)
    );
    disk.expect_clean();
    assert!(
        resize(&disk.path, size(3), Shrink::Allowed).is_err(),
        "it has snapshots"
    );
    merge_snapshots(&disk.path, None, None, &()).unwrap();
    assert_eq!(disk.read(None), expected);
    assert!(resize(&disk.path, size(3), Shrink::Refused).is_err());
    resize(&disk.path, size(3), Shrink::Allowed).unwrap();
    assert_eq!(disk.read(None), TOP[..3]);
    assert_eq!(
        disk.bundle().descriptor().disk_size,
        Sector(3 * CLUSTER_SECTORS)
    );
    disk.expect_clean();
    // And nothing of what was given up comes back.
    resize(
        &disk.path,
        NewSize::GrowBy(Sector(3 * CLUSTER_SECTORS)),
        Shrink::Refused,
    )
    .unwrap();
    assert_eq!(disk.read(None), [1, 2, 3, 0, 0, 0]);
    let less = NewSize::ShrinkBy(Sector(6 * CLUSTER_SECTORS));
    assert!(
        resize(&disk.path, less, Shrink::Allowed).is_err(),
        "nothing is left"
    );
    let less = NewSize::ShrinkBy(Sector(5 * CLUSTER_SECTORS));
    resize(&disk.path, less, Shrink::Allowed).unwrap();
    assert_eq!(disk.read(None), [1]);
}

/// Full of ones.
fn raw_disk(clusters: u64) -> Disk {
    let disk = Disk::new(clusters);
    let descriptor = disk.path.join("DiskDescriptor.xml");
    let text = fs::read_to_string(&descriptor).unwrap();
    assert!(text.contains(">Compressed<"));
    fs::write(&descriptor, text.replace(">Compressed<", ">Plain<")).unwrap();
    fs::write(disk.top_file(), vec![1; clusters as usize * CLUSTER]).unwrap();
    disk
}

#[test]
fn a_raw_disk_grows_and_shrinks_and_its_descriptor_follows() {
    let disk = raw_disk(4);
    assert_eq!(disk.read(None), [1; 4]);
    let size = |clusters: u64| NewSize::Exactly(Sector(clusters * CLUSTER_SECTORS));
    assert!(resize(&disk.path, size(3), Shrink::Refused).is_err());
    for (clusters, content) in [(6, &[1, 1, 1, 1, 0, 0][..]), (3, &[1; 3]), (3, &[1; 3])] {
        let resized = resize(&disk.path, size(clusters), Shrink::Allowed).unwrap();
        assert_eq!(resized, Sector(clusters * CLUSTER_SECTORS));
        assert_eq!(disk.bundle().descriptor().disk_size, resized);
        assert_eq!(disk.top_file().metadata().unwrap().len(), resized.bytes());
        assert_eq!(disk.read(None), content);
    }
}

#[test]
fn a_descriptor_that_a_resize_did_not_reach_follows_in_a_repair() {
    let disk = Disk::new(4);
    let mut bundle = disk.bundle();
    let mut descriptor = bundle.descriptor().clone();
    descriptor.disk_size = Sector(3 * CLUSTER_SECTORS);
    bundle.save(descriptor).unwrap();
    for repair in [None, Some(Repair::Leaks)] {
        let report = disk.check(repair);
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        assert!(report.messages[0].contains("which counts"), "{report:?}");
    }
    let report = disk.check(Some(Repair::All));
    assert!(
        report.messages[0].ends_with("which counts; corrected"),
        "{report:?}"
    );
    disk.expect_clean();
}

#[test]
fn zeros_and_unused_space_are_given_back() {
    let (disk, [first, second]) = three_levels();
    disk.write([4], 0);
    let len = fs::metadata(disk.top_file()).unwrap().len();
    compact(&disk.path, &()).unwrap();
    assert_eq!(disk.read(None), [1, 2, 3, 3, 0, 0]);
    assert_eq!(disk.read(Some(first)), FIRST);
    assert_eq!(disk.read(Some(second)), SECOND);
    disk.expect_clean();
    assert_eq!(
        fs::metadata(disk.top_file()).unwrap().len(),
        len,
        "zeros hide what lies below"
    );

    let disk = Disk::new(4);
    disk.write([0, 1, 2, 3], 1);
    disk.write([0, 2], 0);
    let len = fs::metadata(disk.top_file()).unwrap().len();
    let freed = compact(&disk.path, &()).unwrap();
    assert!(freed >= 2 * CLUSTER as u64, "{freed}");
    assert_eq!(
        fs::metadata(disk.top_file()).unwrap().len(),
        len - 2 * CLUSTER as u64
    );
    assert_eq!(disk.read(None), [0, 1, 0, 1]);
    disk.expect_clean();
}

fn version_of(path: &Path) -> u8 {
    let start = fs::read(path).unwrap();
    if start.starts_with(b"WithoutFreeSpace") {
        1
    } else {
        2
    }
}

#[test]
fn the_version_changes_in_all_images() {
    let (disk, [first, second]) = three_levels();
    for (version, number) in [(Version::V1, 1), (Version::V2, 2)] {
        change_version(&disk.path, version).unwrap();
        assert_eq!(disk.read(None), TOP);
        assert_eq!(disk.read(Some(first)), FIRST);
        assert_eq!(disk.read(Some(second)), SECOND);
        for image in disk.bundle().descriptor().images() {
            assert_eq!(version_of(&disk.path.join(&image.file)), number);
        }
        disk.expect_clean();
        disk.expect_no_strays();
    }
}

/// An image in the midst of a change of its version, with the copy that was made before.
fn half_converted() -> (Disk, Vec<u8>, Vec<u8>) {
    let disk = Disk::new(6);
    disk.write([3, 1], 1);
    let old = fs::read(disk.top_file()).unwrap();
    let bat = old[..64 + 4 * 6].to_vec();
    change_version(&disk.path, Version::V1).unwrap();
    let mut half = fs::read(disk.top_file()).unwrap();
    // In use, and converting; of the entries one is old and the others new.
    half[44..48].copy_from_slice(&0x746f_6e59_u32.to_le_bytes());
    half[52] |= 2;
    half[64 + 4..64 + 8].copy_from_slice(&old[64 + 4..64 + 8]);
    fs::write(disk.top_file(), half).unwrap();
    (disk, old, bat)
}

#[test]
fn a_change_of_the_version_that_was_cut_off_is_undone() {
    use md5::{Digest, Md5};
    let (disk, old, bat) = half_converted();
    assert_eq!(disk.check(None).corruptions, 1);
    assert!(
        open(&disk.path, OpenMode::new(Access::Read))
            .is_ok_and(|image| { DiskReader::load(&image).is_err() })
    );
    // Without the copy, nobody knows what the entries mean.
    let mode = OpenMode::new(Access::Read);
    assert!(check(&disk.path, Some(Repair::All), mode, &()).is_err());
    let mut copy = bat.clone();
    copy.extend_from_slice(&Md5::digest(&bat));
    let copy_file = disk.path.join("root.hds.old-bat");
    // Nor with one that is damaged, or of another image.
    let mut damaged = copy.clone();
    damaged[70] ^= 1;
    let mut foreign = bat.clone();
    foreign[32] += 1;
    foreign.extend_from_slice(&[0; 4]);
    let digest = Md5::digest(&foreign);
    foreign.extend_from_slice(&digest);
    for wrong in [damaged, foreign, copy[..copy.len() - 1].to_vec()] {
        fs::write(&copy_file, wrong).unwrap();
        assert!(check(&disk.path, Some(Repair::All), mode, &()).is_err());
    }
    fs::write(&copy_file, &copy).unwrap();
    let report = disk.check(Some(Repair::All));
    assert_eq!(
        (report.corruptions, report.corruptions_fixed),
        (0, 1),
        "{report:?}"
    );
    assert_eq!(fs::read(disk.top_file()).unwrap(), old);
    disk.expect_no_strays();
    disk.expect_clean();
    // A copy that is of no more use.
    fs::write(&copy_file, &copy).unwrap();
    assert_eq!(disk.check(None).leaks, 1);
    assert_eq!(disk.check(Some(Repair::Leaks)).leaks_fixed, 1);
    disk.expect_no_strays();
}

#[test]
fn a_change_by_the_official_tool_is_undone_from_its_copy() {
    let (disk, old, mut idx) = half_converted();
    idx.resize(CLUSTER, 0);
    let idx_file = disk.path.join("root.hds.idx");
    let mode = OpenMode::new(Access::Read);
    // Of an image with another cluster size, BAT, disk size, or other entries.
    for (at, change) in [(28, 0x80), (32, 1), (36, 1), (64 + 4, 1), (64 + 12, 1)] {
        let mut foreign = idx.clone();
        foreign[at] ^= change;
        fs::write(&idx_file, &foreign).unwrap();
        assert!(
            check(&disk.path, Some(Repair::All), mode, &()).is_err(),
            "{at}"
        );
    }
    fs::write(&idx_file, &idx[..64 + 8]).unwrap();
    assert!(check(&disk.path, Some(Repair::All), mode, &()).is_err());
    fs::write(&idx_file, &idx).unwrap();
    disk.check(Some(Repair::All));
    assert_eq!(fs::read(disk.top_file()).unwrap(), old);
    assert_eq!(disk.read(None), [0, 1, 0, 1, 0, 0]);
    disk.expect_no_strays();
}

/// That the image file is not any more what a guest knows that was served from it before
/// `change`.
fn expect_new_opening(file: &Path, change: impl FnOnce()) {
    let opening = || opening::opening(&fs::File::open(file).unwrap()).unwrap();
    let writable = fs::OpenOptions::new().write(true).open(file).unwrap();
    let old = 7;
    opening::set_opening(&writable, old).unwrap();
    change();
    assert!(!matches!(opening(), None | Some(NO_OPENING)));
    assert_ne!(opening(), Some(old));
}

#[test]
fn a_change_of_the_version_and_its_end_give_the_opening_another_name() {
    let disk = Disk::new(6);
    expect_new_opening(&disk.top_file(), || {
        change_version(&disk.path, Version::V1).unwrap();
    });
    for is_official in [false, true] {
        use md5::{Digest, Md5};
        let (disk, _, mut copy) = half_converted();
        let name = match is_official {
            false => {
                let digest = Md5::digest(&copy);
                copy.extend_from_slice(&digest);
                "root.hds.old-bat"
            }
            true => {
                copy.resize(CLUSTER, 0);
                "root.hds.idx"
            }
        };
        fs::write(disk.path.join(name), copy).unwrap();
        expect_new_opening(&disk.top_file(), || {
            let report = disk.check(Some(Repair::All));
            assert_eq!(report.corruptions_fixed, 1, "{report:?}");
        });
    }
}

#[test]
fn each_change_of_a_raw_file_gives_the_opening_another_name() {
    let size = |clusters| NewSize::Exactly(Sector(clusters * CLUSTER_SECTORS));
    let disk = raw_disk(6);
    let file = disk.top_file();
    let path = &disk.path;
    expect_new_opening(&file, || {
        resize(path, size(7), Shrink::Refused).unwrap();
    });
    expect_new_opening(&file, || {
        resize(path, size(5), Shrink::Allowed).unwrap();
    });
    expect_new_opening(&file, || {
        compact(path, &()).unwrap();
    });
    expect_new_opening(&file, || {
        let source = disk.folder.path().join("other.raw");
        fs::write(&source, [1; 1000]).unwrap();
        let conversion = Conversion {
            source: Origin::Path(source),
            source_format: Some(DiskFormat::Raw),
            mode: OpenMode::new(Access::Read),
            target: Destination::Existing(file.clone()),
            target_format: Some(DiskFormat::Raw),
            cluster: None,
            keep_zeros: false,
        };
        conversion.run(&()).unwrap();
    });
    expect_new_opening(&file, || {
        create_snapshot(path, None, None).unwrap();
    });
    expect_new_opening(&file, || {
        merge_snapshots(path, None, None, &()).unwrap();
    });
}

#[test]
fn who_is_in_the_way_is_in_the_way() {
    let (disk, [first, second]) = three_levels();
    let open_for = |access| open(&disk.path, OpenMode::new(access));
    let serving = open_for(Access::Serve).unwrap();
    assert!(serving.is_top());
    let names = [first, second, disk.bundle().descriptor().top()];
    assert_eq!(serving.guids(), names.map(Some));
    let writable: Vec<_> = serving.files.iter().map(|file| file.writable).collect();
    assert_eq!(writable, [false, false, true]);
    for access in [Access::Read, Access::Repair] {
        assert!(open_for(access).is_err(), "{access:?}");
    }
    // A snapshot may be read meanwhile, and anything without locks.
    let read = OpenMode::new(Access::Read);
    let shot = open(&disk.path, read.snapshot(Some(first))).unwrap();
    assert!(!shot.is_top());
    open(&disk.path, read.force_share(true)).unwrap();
    assert!(create_snapshot(&disk.path, None, None).is_err());
    drop((serving, shot));

    // Readers share, and keep writers away.
    let (one, other) = (
        open_for(Access::Read).unwrap(),
        open_for(Access::Read).unwrap(),
    );
    assert!(one.files.iter().all(|file| !file.writable));
    for access in [Access::Serve, Access::Change] {
        assert!(open_for(access).is_err(), "{access:?}");
    }
    drop((one, other));
    let repairing = open_for(Access::Repair).unwrap();
    assert!(repairing.files.iter().all(|file| file.writable));
    drop(repairing);

    for access in [Access::Serve, Access::Change, Access::Repair] {
        let mode = OpenMode::new(access).snapshot(Some(first));
        assert!(open(&disk.path, mode).is_err(), "a snapshot for {access:?}");
    }
    // An image of a bundle alone is only to be read.
    let top = disk.top_file();
    assert!(!open(&top, read).unwrap().files[0].writable);
    for access in [Access::Serve, Access::Change, Access::Repair] {
        assert!(open(&top, OpenMode::new(access)).is_err(), "{access:?}");
    }
    let alone = Disk::new(1);
    for access in [Access::Serve, Access::Repair] {
        let image = open(&alone.top_file(), OpenMode::new(access)).unwrap();
        assert!(image.files[0].writable);
    }
    assert!(open(&alone.top_file(), OpenMode::new(Access::Change)).is_err());
}

#[test]
fn a_bundle_that_was_changed_since_shows() {
    let disk = Disk::new(1);
    let bundle = disk.bundle();
    assert!(bundle.is_current().unwrap());
    create_snapshot(&disk.path, None, None).unwrap();
    assert!(!bundle.is_current().unwrap());
    assert!(disk.bundle().is_current().unwrap());
}

#[test]
fn a_new_descriptor_knows_whether_the_old_one_was_changed_since() {
    let disk = Disk::new(1);
    let (mut bundle, mut other) = (disk.bundle(), disk.bundle());
    let new = bundle.prepare_disk_size(Sector(4096)).unwrap();
    new.require_unchanged().unwrap();
    other.set_disk_size(Sector(8192)).unwrap();
    let error = new.require_unchanged().unwrap_err().to_string();
    assert!(error.contains("by another program"), "{error}");
    drop(new);
    assert_eq!(disk.bundle().descriptor().disk_size, Sector(8192));
    assert_eq!(bundle.folder().names().unwrap().len(), 2);
}

#[test]
fn a_bat_of_many_entries_is_read_entry_by_entry() {
    const ENTRIES: u32 = 300_000;
    let disk = Disk::new(u64::from(ENTRIES));
    let at = [
        0,
        1023,
        1024,
        2047,
        4096,
        5000,
        262_127,
        262_128,
        ENTRIES - 1,
    ];
    let mut file = fs::read(disk.top_file()).unwrap();
    for (index, &entry) in at.iter().enumerate() {
        let word = 64 + 4 * entry as usize;
        file[word..word + 4].copy_from_slice(&(1000 + index as u32).to_le_bytes());
    }
    let path = disk.folder.path().join("copy");
    fs::write(&path, file).unwrap();
    let image = super::file::HostImage::new(fs::File::open(&path).unwrap(), path);
    let delta = Delta::load(image).unwrap();
    let mapped = (0..).zip(delta.bat()).filter(|(_, value)| **value != 0);
    let mapped: Vec<_> = mapped.map(|(entry, value)| (entry, *value)).collect();
    let expected: Vec<_> = at.into_iter().zip(1000..).collect();
    assert_eq!(mapped, expected);
}

#[test]
fn a_file_that_is_shorter_than_a_header_is_said_to_be_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    for len in [0, 10, 63] {
        let path = folder.path().join("short");
        fs::write(&path, vec![1; len]).unwrap();
        let image = super::file::HostImage::new(fs::File::open(&path).unwrap(), path);
        let error = Delta::load(image).expect_err("it has no header");
        let ImageError::CutOff {
            len: said, needed, ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((said, needed), (len as u64, 64));
    }
}

#[test]
fn a_path_means_a_bundle_or_an_image() {
    let disk = Disk::new(1);
    let bundle_of = |path: &Path| match Location::of(path) {
        Ok(Location::Bundle(bundle)) => bundle.path().to_owned(),
        other => panic!("{}: {other:?}", path.display()),
    };
    assert_eq!(bundle_of(&disk.path), disk.path);
    assert_eq!(bundle_of(&disk.path.join("DiskDescriptor.xml")), disk.path);
    for path in [disk.top_file(), disk.path.join("nothing is here")] {
        match Location::of(&path) {
            Ok(Location::Bare(bare)) => assert_eq!(bare, path),
            other => panic!("{}: {other:?}", path.display()),
        }
    }
    // The folder that tests run in is no disk.
    match Location::of(Path::new("DiskDescriptor.xml")) {
        Err(ImageError::NoDescriptor(folder)) => assert_eq!(folder, Path::new(".")),
        other => panic!("{other:?}"),
    }
}

fn set_size(image: &Path, sectors: u64, entries: u32) {
    let file = fs::File::options().write(true).open(image).unwrap();
    file.write_all_at(&entries.to_le_bytes(), 32).unwrap();
    file.write_all_at(&sectors.to_le_bytes(), 36).unwrap();
}

/// A disk that ends 10 sectors before its fifth cluster does, and snapshots of it by a tool
/// whose images have whole clusters, rounded down.
fn rounded_down(snapshots: u8) -> Disk {
    let disk = Disk::new(5);
    disk.write([1, 4], 2);
    for number in 0..snapshots {
        snapshot(&disk);
        disk.write([2], 3 + number);
    }
    let mut bundle = disk.bundle();
    let mut descriptor = bundle.descriptor().clone();
    let images = descriptor.chain(descriptor.top());
    let files: Vec<_> = images
        .iter()
        .map(|image| disk.path.join(&image.file))
        .collect();
    set_size(&files[0], 5 * CLUSTER_SECTORS - 10, 5);
    for file in &files[1..] {
        set_size(file, 4 * CLUSTER_SECTORS, 4);
    }
    descriptor.disk_size = Sector(4 * CLUSTER_SECTORS);
    bundle.save(descriptor).unwrap();
    disk
}

#[test]
fn a_chain_that_was_rounded_down_is_made_whole() {
    for snapshots in [1, 3] {
        let disk = rounded_down(snapshots);
        let opened = open(&disk.path, OpenMode::new(Access::Read));
        assert!(matches!(opened, Err(ImageError::CutDisk { .. })));
        for repair in [None, Some(Repair::Leaks)] {
            let report = disk.check(repair);
            let found = (report.corruptions, report.corruptions_fixed);
            assert_eq!(found, (1, 0), "{report:?}");
        }
        let report = disk.check(Some(Repair::All));
        let found = (report.corruptions, report.corruptions_fixed);
        assert_eq!(found, (0, 1), "{report:?}");
        disk.expect_clean();

        let image = open(&disk.path, OpenMode::new(Access::Read)).unwrap();
        let reader = DiskReader::load(&image).unwrap();
        let mut content = vec![0xff; 5 * CLUSTER];
        assert_eq!(reader.disk_size().bytes() as usize, content.len());
        reader.read(&mut content, 0).unwrap();
        let written = [(1, 2), (2, 2 + snapshots), (4, 2)];
        let mut expected = vec![0; 5 * CLUSTER];
        for (cluster, byte) in written {
            expected[cluster * CLUSTER..(cluster + 1) * CLUSTER].fill(byte);
        }
        // What was behind the end was never the guest's.
        expected[5 * CLUSTER - 10 * 512..].fill(0);
        assert!(content == expected);
    }
}

/// What another branch lies on as well stays as large as it is, or that branch could not be
/// made whole any more.
#[test]
fn a_chain_is_made_whole_beside_another_branch() {
    let disk = Disk::new(5);
    disk.write([1, 4], 2);
    let base = snapshot(&disk);
    disk.write([2], 3);
    let branch = snapshot(&disk);
    switch_snapshot(&disk.path, base).unwrap();
    disk.write([3], 4);
    let mut bundle = disk.bundle();
    let mut descriptor = bundle.descriptor().clone();
    let cut = 5 * CLUSTER_SECTORS - 10;
    set_size(&disk.image_file(base), cut, 5);
    for above in [branch, descriptor.top()] {
        set_size(&disk.image_file(above), 4 * CLUSTER_SECTORS, 4);
    }
    descriptor.disk_size = Sector(4 * CLUSTER_SECTORS);
    bundle.save(descriptor).unwrap();

    let report = disk.check(Some(Repair::All));
    let found = (report.corruptions, report.corruptions_fixed);
    assert_eq!(found, (0, 1), "{report:?}");
    let read = OpenMode::new(Access::Read);
    let image = open(&disk.path, read).unwrap();
    let reader = DiskReader::load(&image).unwrap();
    assert_eq!(reader.disk_size().0, 5 * CLUSTER_SECTORS);
    for (cluster, byte) in [0, 2, 0, 4, 2].into_iter().enumerate() {
        let mut sector = [0xff; 512];
        reader
            .read(&mut sector, (cluster * CLUSTER) as u64)
            .unwrap();
        assert_eq!(sector, [byte; 512], "{cluster}");
    }
    match open(&disk.path, read.snapshot(Some(branch))) {
        Err(ImageError::CutDisk { disk_size, .. }) => assert_eq!(disk_size.0, cut),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_raw_disk_has_no_snapshots() {
    use super::source::{DiskFormat, Source};
    let disk = Disk::new(1);
    let raw = disk.folder.path().join("disk.raw");
    fs::write(&raw, [1; 4096]).unwrap();
    let mode = OpenMode::new(Access::Read);
    let open = |mode| Source::open(&raw, Some(DiskFormat::Raw), mode);
    assert!(open(mode).is_ok());
    let shot = Some(disk.bundle().descriptor().top());
    let error = open(mode.snapshot(shot)).err().expect("there are none");
    assert!(error.to_string().contains("no snapshots"), "{error}");
    // Whoever writes to it.
    let file = fs::File::options().read(true).write(true).open(&raw);
    let writer = ImageLock::acquire(&file.unwrap(), LockMode::ReadWrite).unwrap();
    assert!(open(mode).is_err());
    assert!(open(mode.force_share(true)).is_ok());
    drop(writer);
}

#[test]
fn a_new_disk_takes_no_name_that_is_taken() {
    let disk = Disk::new(1);
    let size = Sector(CLUSTER_SECTORS);
    assert!(matches!(
        create(&disk.path, size, ClusterSize::MIN),
        Err(ImageError::Exists(_))
    ));
    let bare = disk.folder.path().join("bare.hds");
    create(&bare, size, ClusterSize::MIN).unwrap();
    assert!(create(&bare, size, ClusterSize::MIN).is_err());
    let names = fs::read_dir(disk.folder.path()).unwrap().count();
    assert_eq!(names, 2, "something was left over");
    assert_eq!(disk.read(None), [0]);
}

mod layouts;
mod since;

/// Locks a file for writing for so long with no process to be seen that has it open, as I/O
/// of one that was killed may: its description is on its way through a socket.
fn locked_by_the_dead(path: &Path, time: Duration) -> thread::JoinHandle<()> {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let lock = ImageLock::acquire(&file, LockMode::ReadWrite).unwrap();
    let socket = UnixStream::pair().unwrap();
    let fds = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let byte = [IoSlice::new(&[0])];
    sendmsg(&socket.0, &byte, &mut control, SendFlags::empty()).unwrap();
    lock.abandon();
    thread::spawn(move || {
        thread::sleep(time);
        drop(socket);
    })
}

#[test]
fn a_server_outlasts_what_a_killed_one_has_left_behind() {
    let disk = Disk::new(8);
    let left_behind = locked_by_the_dead(&disk.top_file(), Duration::from_secs(3));
    // Others say at once that somebody is in the way.
    let start = Instant::now();
    let mode = OpenMode::new(Access::Serve);
    let refused = open(&disk.path, mode);
    assert!(matches!(refused, Err(ImageError::Locked { .. })));
    assert!(open(&disk.path, mode.outlasts_the_dead()).is_ok());
    assert!(start.elapsed() > Duration::from_secs(2));
    left_behind.join().unwrap();

    // A process that lives, this one, is not waited for.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(disk.top_file())
        .unwrap();
    let _lock = ImageLock::acquire(&file, LockMode::ReadWrite).unwrap();
    let start = Instant::now();
    let refused = open(&disk.path, mode.outlasts_the_dead());
    assert!(matches!(refused, Err(ImageError::Locked { .. })));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_level_that_is_emptied_is_not_read_as_zeros() {
    let disk = Disk::new(8);
    disk.write([1], 7);
    let base = disk.top_file();
    create_snapshot(&disk.path, None, None).unwrap();
    let mode = OpenMode::new(Access::Read).force_share(true);
    let image = open(&disk.path, mode).unwrap();
    let reader = DiskReader::load(&image).unwrap();
    let mut bytes = vec![0; 512];
    reader.read(&mut bytes, CLUSTER as u64).unwrap();
    assert_eq!(bytes, [7; 512]);
    // As the end of its deletion does.
    let file = fs::File::options().write(true).open(base).unwrap();
    file.set_len(0).unwrap();
    let read = reader.read(&mut bytes, CLUSTER as u64);
    assert!(matches!(read, Err(ImageError::Busy(_))), "{read:?}");
    assert!(reader.status(CLUSTER as u64, 512).is_err());
    assert!(reader.next_data(0, u64::MAX).is_err());
}

/// A disk with a snapshot, the file of that, and what it has: as it is, and with an entry more for
/// a cluster that has another one.
fn with_a_cluster_at_two_places() -> (Disk, PathBuf, Vec<u8>, Vec<u8>) {
    const BAT: usize = 64;
    let disk = Disk::new(8);
    disk.write([1], 7);
    let base = disk.top_file();
    create_snapshot(&disk.path, None, None).unwrap();
    let sound = fs::read(&base).unwrap();
    let mut torn = sound.clone();
    torn.copy_within(BAT + 4..BAT + 8, BAT + 8);
    fs::write(&base, &torn).unwrap();
    (disk, base, sound, torn)
}

/// Whoever serves a disk moves clusters of it, and does not wait for who reads the entries.
#[test]
fn entries_that_were_read_while_a_cluster_moved_are_read_again() {
    let (disk, base, sound, torn) = with_a_cluster_at_two_places();
    let mode = OpenMode::new(Access::Read);
    for (is_shared, looks_until_sound, expected) in [
        (true, 1, 2),
        (true, LOOKS - 1, LOOKS),
        (true, u32::MAX, LOOKS),
        (false, 1, 1),
    ] {
        fs::write(&base, &torn).unwrap();
        let looks = Cell::new(0);
        let looked = look_at(&disk.path, mode.force_share(is_shared), |image| {
            looks.set(looks.get() + 1);
            let disk = DiskReader::load(&image);
            if looks.get() == looks_until_sound {
                fs::write(&base, &sound).unwrap();
            }
            disk
        });
        assert_eq!(looks.get(), expected);
        match looks_until_sound < expected {
            true => drop(looked.unwrap()),
            false => assert!(matches!(looked, Err(ImageError::Corrupt { .. }))),
        }
    }
}

#[test]
fn what_reads_a_running_disk_looks_again_before_it_calls_it_corrupt() {
    let (disk, ..) = with_a_cluster_at_two_places();
    let snapshot = disk.bundle().descriptor().images()[0].guid;
    let mode = OpenMode::new(Access::Read).force_share(true);
    let path = &disk.path;
    let readers: [(&str, &dyn Fn() -> Result<()>); 4] = [
        ("map", &|| map(path, mode, |_| {})),
        ("map --since", &|| map_since(path, mode, snapshot, |_| {})),
        ("layout", &|| layout(path, mode, 1, 1).map(drop)),
        ("a copy", &|| Source::open(path, None, mode).map(drop)),
    ];
    for (name, read) in readers {
        let start = Instant::now();
        let result = read();
        assert!(
            matches!(result, Err(ImageError::Corrupt { .. })),
            "{name}: {result:?}"
        );
        assert!(start.elapsed() >= LOOK_PAUSE * (LOOKS - 1), "{name}");
    }
}
