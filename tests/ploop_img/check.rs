//! `check`: exit codes and reports. What it finds and repairs is tested where it
//! is written.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;
use vhost_user_ploop::storage::lock::{ImageLock, LockMode};

use super::common::fixtures::fixture;
use super::common::img::{ploop_img, qemu_img_check, run};
use super::common::require_tool;

fn report(disk: &str) -> Value {
    let ran = ploop_img(["check", "--output", "json", disk]);
    serde_json::from_str(&ran.stdout).unwrap()
}

/// A fixture with 64 KiB clusters, whose entry 0 is host cluster 1.
fn disk(folder: &TempDir) -> Option<String> {
    let bundle = fixture("v2").unpack(folder.path())?;
    Some(bundle.join("root.hds").to_str().unwrap().to_owned())
}

fn set_word(disk: &str, at: u64, word: u32) {
    let file = OpenOptions::new().write(true).open(disk).unwrap();
    file.write_all_at(&word.to_le_bytes(), at).unwrap();
}

#[test]
fn leaks_exit_with_3() {
    let folder = TempDir::new().unwrap();
    let Some(disk) = disk(&folder) else { return };
    let len = fs::metadata(&disk).unwrap().len();
    let file = OpenOptions::new().write(true).open(&disk).unwrap();
    file.write_all_at(&[1; 100_000], len).unwrap();
    assert_eq!(ploop_img(["check", &disk]).code, Some(3));
    assert_eq!(report(&disk)["leaks"], 2);
    ploop_img(["check", "-r", "leaks", &disk]).ok();
    assert_eq!(fs::metadata(&disk).unwrap().len(), len);
    ploop_img(["check", &disk]).ok();
}

#[test]
fn corruption_exits_with_2() {
    let folder = TempDir::new().unwrap();
    let Some(disk) = disk(&folder) else { return };
    set_word(&disk, 64, 2);
    let ran = ploop_img(["check", &disk]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stdout.contains("host cluster 2"), "{ran:?}");
    let found = report(&disk);
    assert_eq!(
        (&found["corruptions"], &found["leaks"]),
        (&1.into(), &1.into())
    );
    assert_eq!(
        ploop_img(["check", "--repair", "leaks", &disk]).code,
        Some(2)
    );
    ploop_img(["check", "--repair", "all", &disk]).ok();
    ploop_img(["check", &disk]).ok();
    if require_tool("qemu-img") {
        qemu_img_check(Path::new(&disk));
    }
}

#[test]
fn a_check_that_cannot_be_made_exits_with_1() {
    ploop_img(["check", "/nonexistent"]).fails();
    assert_eq!(ploop_img(["check"]).code, Some(1));
    assert_eq!(ploop_img(["check", "--repair", "some", "x"]).code, Some(1));
    assert_eq!(ploop_img(["check", "--help"]).code, Some(0));
}

#[test]
fn an_image_left_in_use_is_repaired_by_all_only() {
    let folder = TempDir::new().unwrap();
    let Some(disk) = disk(&folder) else { return };
    set_word(&disk, 44, 0x746F_6E59);
    assert_eq!(ploop_img(["check", &disk]).code, Some(2));
    assert_eq!(
        ploop_img(["check", "--repair", "leaks", &disk]).code,
        Some(2)
    );
    let repaired = ploop_img(["check", "--repair", "all", "--output", "json", &disk]).ok();
    let repaired: Value = serde_json::from_str(&repaired).unwrap();
    assert_eq!(repaired["corruptions-fixed"], 1);
    ploop_img(["check", &disk]).ok();
}

#[test]
fn numbers_are_those_of_qemu_img() {
    if !require_tool("qemu-img") || !require_tool("qemu-io") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let Some(disk) = disk(&folder) else { return };
    // Holes and clusters in all orders: written backwards, forwards, and with gaps.
    let mut writes = (200..230)
        .rev()
        .chain((300..340).step_by(2))
        .chain(301..310);
    let writes: Vec<_> = writes
        .by_ref()
        .map(|cluster| format!("write -P 1 {} 64k", cluster << 16))
        .collect();
    let args = ["-f", "parallels"].into_iter().map(str::to_owned);
    let commands = writes
        .into_iter()
        .flat_map(|write| ["-c".to_owned(), write]);
    run("qemu-io", args.chain(commands).chain([disk.clone()])).ok();
    let theirs = run(
        "qemu-img",
        ["check", "-f", "parallels", "--output=json", &disk],
    )
    .ok();
    let theirs: Value = serde_json::from_str(&theirs).unwrap();
    let ours = report(&disk);
    assert_ne!(theirs["fragmented-clusters"], 0);
    for key in [
        "image-end-offset",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "check-errors",
        "filename",
    ] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
}

#[test]
fn a_locked_image_says_so() {
    let folder = TempDir::new().unwrap();
    let Some(disk) = disk(&folder) else { return };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&disk)
        .unwrap();
    let lock = ImageLock::acquire(&file, LockMode::ReadWrite).unwrap();
    for command in ["info", "check", "map"] {
        let error = ploop_img([command, &disk]).fails();
        assert!(error.contains("open for writing"), "{error}");
        assert!(error.contains("--force-share"), "{error}");
        let holder = format!("another process (pid {})", std::process::id());
        assert!(error.contains(&holder), "{error}");
        ploop_img([command, "-U", &disk]).ok();
    }
    let error = ploop_img(["check", "--repair", "all", &disk]).fails();
    assert!(!error.contains("--force-share"), "{error}");
    ploop_img(["resize", &disk, "+1M"]).fails();
    let target = folder.path().join("x");
    ploop_img(["convert", &disk, target.to_str().unwrap()]).fails();
    assert!(!target.exists());
    drop(lock);
    ploop_img(["check", &disk]).ok();
}

#[test]
fn a_reader_keeps_changes_away() {
    let folder = TempDir::new().unwrap();
    let Some(disk) = disk(&folder) else { return };
    let file = OpenOptions::new().read(true).open(&disk).unwrap();
    let _lock = ImageLock::acquire(&file, LockMode::ReadOnly).unwrap();
    ploop_img(["check", &disk]).ok();
    ploop_img(["resize", &disk, "+1M"]).fails();
}

/// `qemu-io` puts the first cluster of such an image where its own rules have
/// none: a version 1 image whose data area starts right behind the BAT.
#[test]
fn what_qemu_puts_off_the_grid_is_kept() {
    if !require_tool("qemu-img") || !require_tool("qemu-io") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let mut header = b"WithoutFreeSpace".to_vec();
    for word in [2u32, 16, 16, 128, 64, 64 * 128, 0, 0, 0, 0, 0, 0] {
        header.extend(word.to_le_bytes());
    }
    header.resize(512, 0);
    fs::write(path("odd.hds"), header).unwrap();
    for write in [
        "write -P 1 0 64k",
        "write -P 2 1M 128k",
        "write -P 3 300k 4k",
    ] {
        run(
            "qemu-io",
            ["-f", "parallels", "-c", write, &path("odd.hds")],
        )
        .ok();
    }
    let convert = [
        "convert",
        "-f",
        "parallels",
        "-O",
        "raw",
        &path("odd.hds"),
        &path("theirs.raw"),
    ];
    run("qemu-img", convert).ok();
    ploop_img(["check", "--repair", "all", &path("odd.hds")]).ok();
    ploop_img(["convert", &path("odd.hds"), &path("ours.raw")]).ok();
    assert!(fs::read(path("theirs.raw")).unwrap() == fs::read(path("ours.raw")).unwrap());
    qemu_img_check(Path::new(&path("odd.hds")));
}

#[test]
fn the_image_of_a_bundle_is_not_resized_by_itself() {
    let folder = TempDir::new().unwrap();
    let Some(disk) = disk(&folder) else { return };
    let error = ploop_img(["resize", &disk, "+1M"]).fails();
    assert!(error.contains("give that path instead"), "{error}");
    // But it may be repaired: that is no business of the descriptor's.
    ploop_img(["check", "--repair", "all", &disk]).ok();
}
