//! What QEMU mends, or takes for harmless, and so do we; and what is given up by a
//! change of an image.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use md5::{Digest, Md5};
use tempfile::TempDir;

use super::common::fixtures::fixture;
use super::common::img::{ploop_img, qemu_img_check, run, sha256};
use super::disk::{CLUSTER, Disk, has_qemu};
use super::kill::kill_everywhere;

fn set_word(image: &Path, at: u64, word: u32) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(&word.to_le_bytes(), at).unwrap();
}

fn word(image: &Path, at: usize) -> u32 {
    let bytes = fs::read(image).unwrap();
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn digest(disk: &str, folder: &TempDir) -> String {
    let raw = folder.path().join("digest.raw");
    ploop_img(["convert", disk, raw.to_str().unwrap()]).ok();
    let digest = sha256(&raw);
    fs::remove_file(raw).unwrap();
    digest
}

#[test]
fn a_first_block_offset_that_cannot_be_is_computed_anew() {
    if !has_qemu() {
        return;
    }
    for name in ["v1", "v2"] {
        for wrong in [u32::MAX, 0xffff_f800, 0x0010_0000, 1] {
            let folder = TempDir::new().unwrap();
            let fixture = fixture(name);
            let Some(disk) = fixture.unpack(folder.path()) else {
                return;
            };
            let image = disk.join("root.hds");
            let (disk, right) = (disk.to_str().unwrap(), word(&image, 48));
            set_word(&image, 48, wrong);
            let theirs = ["check", "-f", "parallels", image.to_str().unwrap()];
            assert_eq!(run("qemu-img", theirs).code, Some(2), "{wrong:#x}");
            let error = ploop_img(["info", disk]).fails();
            assert!(error.contains("--repair all"), "{error}");
            for command in [&["check", disk][..], &["check", "-r", "leaks", disk]] {
                let ran = ploop_img(command);
                assert_eq!(ran.code, Some(2), "{ran:?}");
                assert!(ran.stdout.contains("first block offset"), "{ran:?}");
            }
            assert_eq!(word(&image, 48), wrong);
            ploop_img(["check", "--repair", "all", disk]).ok();
            assert_eq!(word(&image, 48), right, "{name} {wrong:#x}");
            assert_eq!(digest(disk, &folder), fixture.sha256, "{name} {wrong:#x}");
            ploop_img(["check", disk]).ok();
            qemu_img_check(&image);
        }
    }
}

#[test]
fn mending_the_first_block_offset_can_be_cut_anywhere() {
    let folder = TempDir::new().unwrap();
    let fixture = fixture("v1");
    let disk = folder.path().join("v1");
    let arg = disk.to_str().unwrap();
    if fixture.unpack(folder.path()).is_none() {
        return;
    }
    let killed = kill_everywhere(
        || {
            fs::remove_dir_all(&disk).unwrap();
            fixture.unpack(folder.path()).unwrap();
            set_word(&disk.join("root.hds"), 48, u32::MAX);
            set_word(&disk.join("root.hds"), 44, 0x746F_6E59);
            ["check", "--repair", "all", arg]
                .map(str::to_owned)
                .to_vec()
        },
        |step, _| {
            ploop_img(["check", "--repair", "all", arg]).ok();
            assert_eq!(digest(arg, &folder), fixture.sha256, "step {step}");
        },
    );
    assert!(killed.is_none_or(|killed| killed >= 3), "{killed:?}");
}

#[test]
fn a_conversion_flag_on_a_closed_image_is_none() {
    let folder = TempDir::new().unwrap();
    let Some(disk) = fixture("v2").unpack(folder.path()) else {
        return;
    };
    let image = disk.join("root.hds");
    let disk = disk.to_str().unwrap();
    let flag = || set_word(&image, 52, 2 | word(&image, 52));
    flag();
    ploop_img(["check", disk]).ok();
    assert_eq!(digest(disk, &folder), fixture("v2").sha256);
    // Nor is it one when a change of the image is cut off.
    kill_everywhere(
        || {
            flag();
            set_word(&image, 44, 0);
            ["compact", disk].map(str::to_owned).to_vec()
        },
        |step, _| {
            let ran = ploop_img(["check", "--repair", "all", disk]);
            assert!(!ran.stdout.contains("version"), "{step}: {ran:?}");
            ran.ok();
            assert_eq!(digest(disk, &folder), fixture("v2").sha256, "step {step}");
        },
    );
}

/// What the official tool leaves of a change of the version that was cut off: the
/// copy of header and BAT, a mark and a flag, and entries of both kinds.
fn half_converted() -> Option<(Disk, std::path::PathBuf)> {
    let disk = Disk::fixture("v2")?;
    let image = disk.top_file();
    let idx = Path::new(&disk.path).join("root.hds.idx");
    let metadata = word(&image, 48) as usize * 512;
    fs::write(&idx, &fs::read(&image).unwrap()[..metadata]).unwrap();
    set_word(&image, 44, 0x746F_6E59);
    set_word(&image, 52, 2 | word(&image, 52));
    for entry in 0..8 {
        let at = 64 + 4 * entry;
        let sectors = word(&image, at as usize) * (CLUSTER / 512) as u32;
        set_word(&image, at, sectors);
    }
    Some((disk, idx))
}

#[test]
fn a_change_of_the_version_by_the_official_tool_is_undone() {
    let Some((disk, idx)) = half_converted() else {
        return;
    };
    let ran = ploop_img(["check", &disk.path]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stdout.contains("cut off half-way"), "{ran:?}");
    assert!(!ran.stdout.contains("part of the disk"), "{ran:?}");

    // A copy of another image, or a damaged one, is no help.
    let good = fs::read(&idx).unwrap();
    let mut bad = good.clone();
    bad[64] ^= 1;
    for bytes in [&bad[..], &good[..100], b""] {
        fs::write(&idx, bytes).unwrap();
        let before = fs::read(disk.top_file()).unwrap();
        let error = ploop_img(["check", "--repair", "all", &disk.path]).fails();
        assert!(error.contains(".idx"), "{error}");
        assert!(fs::read(disk.top_file()).unwrap() == before);
    }
    fs::write(&idx, &good).unwrap();
    ploop_img(["check", "--repair", "all", &disk.path]).ok();
    assert_eq!(disk.sha256(None), fixture("v2").sha256);
    assert!(!idx.exists());
    disk.check();

    // Left over, it is nobody's rubbish but the official tool's.
    fs::write(&idx, &good).unwrap();
    let said = ploop_img(["check", "--repair", "all", &disk.path]).ok();
    assert!(said.contains("no longer of use"), "{said}");
    assert!(!said.contains("part of the disk"), "{said}");
    assert!(idx.exists());
}

#[test]
fn undoing_a_change_of_the_official_tool_can_be_cut_anywhere() {
    let Some((disk, idx)) = half_converted() else {
        return;
    };
    let image = disk.top_file();
    let before = [&image, &idx].map(|path| fs::read(path).unwrap());
    let killed = kill_everywhere(
        || {
            fs::write(&image, &before[0]).unwrap();
            fs::write(&idx, &before[1]).unwrap();
            ["check", "--repair", "all", &disk.path]
                .map(str::to_owned)
                .to_vec()
        },
        |step, _| {
            ploop_img(["check", "--repair", "all", &disk.path]).ok();
            assert_eq!(disk.sha256(None), fixture("v2").sha256, "step {step}");
        },
    );
    assert!(killed.is_none_or(|killed| killed >= 5), "{killed:?}");
}

/// Gives an image a dirty bitmap: an extension in one new cluster, its bits in another.
fn add_bitmap(image: &Path) {
    let mut bytes = fs::read(image).unwrap();
    let disk_size = u64::from(word(image, 36));
    bytes.resize(bytes.len().next_multiple_of(CLUSTER), 0);
    let at = bytes.len();
    let mut extension = vec![0u8; CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| extension[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &0xAB23_4CEF_23DC_EA87u64.to_le_bytes());
    put(24, &0x2038_5FAE_252C_B34Au64.to_le_bytes());
    put(40, &40u32.to_le_bytes());
    put(48, &disk_size.to_le_bytes());
    put(56, b"the bitmap's id.");
    put(72, &128u32.to_le_bytes());
    put(76, &1u32.to_le_bytes());
    put(80, &((at + CLUSTER) as u64 / 512).to_le_bytes());
    let checksum = Md5::digest(&extension[24..]);
    extension[8..24].copy_from_slice(&checksum);
    bytes.extend(extension);
    bytes.extend(vec![0x55; CLUSTER]);
    bytes[44..48].copy_from_slice(&0x312e_3276u32.to_le_bytes());
    bytes[56..64].copy_from_slice(&(at as u64 / 512).to_le_bytes());
    fs::write(image, bytes).unwrap();
}

#[test]
fn bitmaps_that_are_dropped_are_named_and_take_no_space() {
    if !has_qemu() {
        return;
    }
    let Some(disk) = Disk::fixture("v2") else {
        return;
    };
    let image = disk.top_file();
    let bare = fs::read(&image).unwrap();
    add_bitmap(&image);
    // QEMU reads it, so it is one: with a wrong checksum it would not. Its check takes
    // the clusters of bitmaps for leaks.
    let theirs = ["check", "-f", "parallels", image.to_str().unwrap()];
    assert_eq!(run("qemu-img", theirs).code, Some(3));
    ploop_img(["check", &disk.path]).ok();
    let with_bitmap = fs::read(&image).unwrap();
    let mut damaged = with_bitmap.clone();
    damaged[bare.len() + 100] ^= 1;
    fs::write(&image, damaged).unwrap();
    assert_eq!(run("qemu-img", theirs).code, Some(1));

    for command in [
        &["compact", &disk.path][..],
        &["resize", &disk.path, "+1M"],
        &["convert", "--format-version", "1", &disk.path],
    ] {
        fs::write(&image, &with_bitmap).unwrap();
        let ran = ploop_img(command);
        assert!(ran.stderr.contains("dirty bitmaps were dropped"), "{ran:?}");
        ran.ok();
        assert!(fs::metadata(&image).unwrap().len() <= bare.len() as u64);
        assert_eq!((word(&image, 44), word(&image, 56)), (0, 0));
        assert_eq!(
            ploop_img(["check", &disk.path]).code,
            Some(0),
            "{command:?}"
        );
        let ran = ploop_img(command);
        assert!(!ran.stderr.contains("bitmaps"), "{ran:?}");
    }

    // What is merged into, too.
    let disk = Disk::fixture("v2").unwrap();
    add_bitmap(&disk.top_file());
    disk.create();
    disk.write(50, 1, 9);
    let content = disk.sha256(None);
    let ran = disk.snapshot(&["merge"]);
    assert!(ran.stderr.contains("dirty bitmaps were dropped"), "{ran:?}");
    ran.ok();
    assert_eq!(disk.sha256(None), content);
    disk.check();
}
