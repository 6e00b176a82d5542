use super::*;
use crate::image::check::check_delta;
use crate::image::testing::{
    Entry, Medium, MemImage, cluster_content, header, image, read_cluster, set_word,
};
use Entry::{At, Hole, Raw};

const CLUSTERS: u64 = 300;

/// More than a sector of entries, two of which are mapped.
fn sample(version: Version) -> Vec<u8> {
    let header = header(Version::V2, CLUSTERS).in_version(version).unwrap();
    let mut entries = [Hole; CLUSTERS as usize];
    (entries[1], entries[299]) = (At(1), At(0));
    image(&header, &entries, 2)
}

fn other(version: Version) -> Version {
    match version {
        Version::V1 => Version::V2,
        Version::V2 => Version::V1,
    }
}

fn check_content(delta: &Delta<MemImage>) {
    assert!(read_cluster(delta, 1) == cluster_content(1));
    assert!(read_cluster(delta, 299) == cluster_content(0));
    assert_eq!(delta.bat().iter().filter(|entry| **entry != 0).count(), 2);
}

/// Changes the version, with the copy on the same medium.
fn change_sample(version: Version) -> (Medium, Delta<MemImage>) {
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", sample(version))).unwrap();
    let copy = medium.file("copy", Vec::new());
    change(&mut delta, other(version), |content| {
        copy.write_all_at(content, 0).unwrap();
        copy.sync().unwrap();
        Ok(())
    })
    .unwrap();
    (medium, delta)
}

#[test]
fn there_and_back() {
    for version in [Version::V1, Version::V2] {
        let (_, mut delta) = change_sample(version);
        assert_eq!(delta.geometry().version, other(version));
        check_content(&delta);
        let report = check_delta(&mut delta, None).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        change(&mut delta, version, |_| Ok(())).unwrap();
        check_content(&delta);
        let mut bytes = vec![0; sample(version).len()];
        delta.read(&mut bytes, 0).unwrap();
        assert!(bytes == sample(version));
    }
}

#[test]
fn a_cut_anywhere_can_be_undone() {
    for version in [Version::V1, Version::V2] {
        let (medium, _) = change_sample(version);
        let (mut old, mut new, mut undone) = (0, 0, 0);
        let cuts = medium.cut_everywhere(20, |mut files| {
            let copy = files.pop().unwrap();
            let medium = Medium::default();
            let mut delta = Delta::load(medium.file("image", files.remove(0))).unwrap();
            if delta.header().is_converting() {
                assert!(delta.require_readable().is_err());
                undo(&mut delta, &copy).unwrap();
                assert!(medium.contents()[0] == sample(version));
                undone += 1;
            }
            check_content(&delta);
            match delta.geometry().version == version {
                true => old += 1,
                false => new += 1,
            }
        });
        assert!(
            cuts > 20 && old > 5 && new > 1 && undone > 10,
            "{cuts} {old} {new} {undone}"
        );
    }
}

#[test]
fn a_wrong_copy_is_refused() {
    let (medium, _) = change_sample(Version::V2);
    let good = medium.contents().remove(1);
    let mut torn = good.clone();
    torn[500] ^= 1;
    let mut foreign =
        Delta::load(medium.file("b", image(&header(Version::V2, 5), &[], 0))).unwrap();
    let mut own = Delta::load(medium.file("c", sample(Version::V2))).unwrap();
    assert!(undo(&mut foreign, &good).is_err());
    for copy in [&torn[..], &good[..good.len() - 1], &good[..10], &[]] {
        assert!(undo(&mut own, copy).is_err());
    }
    undo(&mut own, &good).unwrap();
}

/// Each of them is whole, and could be that of an image.
#[test]
fn a_copy_of_another_image_is_refused() {
    let (medium, mut delta) = change_sample(Version::V1);
    let content = medium.contents().remove(1);
    let content = &content[..content.len() - CHECKSUM_LEN];
    let sealed = |content: &[u8]| [content, &Md5::digest(content)[..]].concat();
    let longer = [content, &[0; 4]].concat();
    let with_word = |content: &[u8], at: usize, word: u32| {
        let mut content = content.to_vec();
        set_word(&mut content, at, word);
        sealed(&content)
    };
    let now = *delta.geometry();
    let cluster = now.cluster.sectors() as u32;
    let (entries, disk_size) = (now.entries, now.disk_size.0 as u32);
    let data_start = (now.data_start / 512) as u32;
    for (what, copy) in [
        ("cluster", with_word(content, 28, 2 * cluster)),
        ("number of entries", with_word(&longer, 32, entries + 1)),
        ("disk size", with_word(content, 36, disk_size - 1)),
        (
            "start of data",
            with_word(content, 48, data_start + cluster),
        ),
        ("end", sealed(&content[..content.len() - 4])),
        ("length", sealed(&longer)),
    ] {
        assert!(undo(&mut delta, &copy).is_err(), "another {what}");
    }
    undo(&mut delta, &sealed(content)).unwrap();
    assert_eq!(delta.geometry().version, Version::V1);
    check_content(&delta);
}

#[test]
fn what_a_version_cannot_express_is_refused() {
    let refuses = |bytes: Vec<u8>, version| {
        let medium = Medium::default();
        let mut delta = Delta::load(medium.file("image", bytes.clone())).unwrap();
        let error = change(&mut delta, version, |_| panic!("too late")).unwrap_err();
        assert!(error.to_string().contains("ploop-img convert"), "{error}");
        assert!(medium.contents()[0] == bytes);
    };
    // Clusters that do not start at multiples of their size.
    refuses(image(&header(Version::V1, 5), &[], 0), Version::V2);
    // Host clusters behind what 32 bits of sectors reach.
    let far = image(&header(Version::V2, 5), &[Raw(1 << 27)], 0);
    refuses(far, Version::V1);
}

#[test]
fn a_copy_is_read_to_its_end_and_a_longer_one_is_none() {
    let medium = Medium::default();
    let mut delta = Delta::load(medium.file("image", sample(Version::V2))).unwrap();
    let copy = copy_of(&delta);
    let longest = copy_len(&delta);
    assert_eq!(longest, copy.len() as u64);
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    let put = |content: &[u8]| std::fs::write(place.path().join("copy"), content).unwrap();
    let read = || read_copy(&folder, Path::new("copy"), longest).unwrap();
    put(&copy);
    assert!(read() == copy);
    undo(&mut delta, &read()).unwrap();
    // Whatever it is, it is not read as far as it goes.
    put(&[&copy[..], &[0; 100]].concat());
    assert_eq!(read().len(), copy.len() + 1);
    assert!(undo(&mut delta, &read()).is_err());
}
