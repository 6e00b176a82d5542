//! Disk sizes: whole clusters for what is made, whole disks of what is there, and
//! what is too large.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use super::common::img::{image_file, ploop_img, run};
use super::common::require_tool;
use super::disk::{CLUSTER, Disk, has_qemu};
use super::kill::kill_everywhere;

const SECTORS: u64 = CLUSTER as u64 / 512;

fn virtual_size(disk: &str) -> u64 {
    let info = ploop_img(["info", "--output", "json", disk]).ok();
    let info: Value = serde_json::from_str(&info).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn what_is_made_has_whole_clusters_and_it_says_so() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let args = ["create", "--cluster-size", "64k"];
    for (name, size, bytes) in [
        ("a", "513", CLUSTER),
        ("b.hds", "65537", 2 * CLUSTER),
        ("c", "1M", 1 << 20),
    ] {
        let ran = ploop_img(args.iter().copied().chain([path(name).as_str(), size]));
        let is_said = ran.stderr.contains("rounded up");
        assert_eq!(is_said, size != "1M", "{ran:?}");
        assert!(!is_said || ran.stderr.contains(&format!("to {bytes} bytes")));
        ran.ok();
        assert_eq!(virtual_size(&path(name)), bytes as u64);
    }
    for name in ["c", "b.hds"] {
        let ran = ploop_img(["resize", &path(name), "1500000"]);
        assert!(ran.stderr.contains("to 1507328 bytes"), "{ran:?}");
        ran.ok();
        assert_eq!(virtual_size(&path(name)), 23 * CLUSTER as u64);
    }
    let descriptor = fs::read_to_string(path("c/DiskDescriptor.xml")).unwrap();
    assert!(descriptor.contains("<Disk_size>2944<"), "{descriptor}");

    let raw = vec![0xA5; 100_000];
    fs::write(path("d.raw"), &raw).unwrap();
    for name in ["d", "d.hds"] {
        let ran = ploop_img(["convert", &path("d.raw"), &path(name)]);
        assert!(ran.stderr.contains("to 1048576 bytes"), "{ran:?}");
        ran.ok();
        ploop_img(["convert", &path(name), &path("back.raw")]).ok();
        let back = fs::read(path("back.raw")).unwrap();
        assert_eq!(back.len(), 1 << 20);
        assert!(back.starts_with(&raw) && back[100_000..].iter().all(|byte| *byte == 0));
        fs::remove_file(path("back.raw")).unwrap();
    }
}

#[test]
fn odd_disks_are_read_whole_and_stay_as_they_are() {
    if !require_tool("qemu-img") || !require_tool("qemu-io") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let image = path("odd.hds");
    let size = 100_000 / 512 * 512;
    let create = ["create", "-q", "-f", "parallels", &image];
    run(
        "qemu-img",
        create.iter().copied().chain([size.to_string().as_str()]),
    )
    .ok();
    let info = ploop_img(["info", &image]).ok();
    assert!(info.contains("'ploop-img resize' to 1048576"), "{info}");
    let write = format!("write -P 5 {} 512", size - 512);
    run("qemu-io", ["-f", "parallels", "-c", &write, &image]).ok();
    assert_eq!(virtual_size(&image), size);
    ploop_img(["check", &image]).ok();
    ploop_img(["resize", &image, "+0"]).ok();
    ploop_img(["compact", &image]).ok();
    ploop_img(["convert", "--format-version", "1", &image]).ok();
    ploop_img(["check", "--repair", "all", &image]).ok();
    assert_eq!(virtual_size(&image), size);
    ploop_img(["convert", &image, &path("odd.raw")]).ok();
    let raw = fs::read(path("odd.raw")).unwrap();
    assert_eq!(raw.len() as u64, size);
    assert!(raw[raw.len() - 512..].iter().all(|byte| *byte == 5));
}

fn set_size(image: &Path, sectors: u64, entries: Option<u32>) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(&sectors.to_le_bytes(), 36).unwrap();
    if let Some(entries) = entries {
        file.write_all_at(&entries.to_le_bytes(), 32).unwrap();
    }
}

/// A disk that ends 10 sectors before its last cluster does, on which the official
/// tool has made `snapshots`: their images have whole clusters, rounded down.
fn cut_chain(snapshots: usize) -> (Disk, Vec<u8>) {
    let disk = Disk::new("1088k");
    disk.write(2, 3, 1);
    // To the end, so that there is something behind it that was never the guest's.
    disk.write(16, 1, 2);
    let odd = 17 * SECTORS - 10;
    let set_descriptor = |from: u64, to: u64| {
        let path = Path::new(&disk.path).join("DiskDescriptor.xml");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, text.replace(&format!(">{from}<"), &format!(">{to}<"))).unwrap();
    };
    set_size(&disk.top_file(), odd, None);
    set_descriptor(17 * SECTORS, odd);
    let mut content = disk.read(None);
    assert_eq!(content.len() as u64, odd * 512);
    content.resize(17 * CLUSTER, 0);
    for index in 0..snapshots {
        disk.create();
        set_size(&disk.top_file(), 16 * SECTORS, Some(16));
        set_descriptor(odd, 16 * SECTORS);
        disk.write(4 + index, 1, 7);
        content[(4 + index) * CLUSTER..(5 + index) * CLUSTER].fill(7);
    }
    (disk, content)
}

#[test]
fn a_chain_that_was_cut_by_rounding_down_is_made_whole() {
    if !has_qemu() {
        return;
    }
    for snapshots in [1, 3] {
        let (disk, content) = cut_chain(snapshots);
        for command in ["info", "map"] {
            let error = ploop_img([command, &disk.path]).fails();
            assert!(error.contains("rounds down"), "{error}");
            assert!(error.contains("--repair all"), "{error}");
        }
        for command in [&["check"][..], &["check", "--repair", "leaks"]] {
            let ran = ploop_img(command.iter().chain(&[disk.path.as_str()]));
            assert_eq!(ran.code, Some(2), "{ran:?}");
            assert!(ran.stdout.contains("rounds down"), "{ran:?}");
        }
        let ran = ploop_img(["check", "--repair", "all", &disk.path]);
        assert!(ran.stdout.contains("Repaired: 1 error"), "{ran:?}");
        ran.ok();
        assert!(disk.read(None) == content);
        assert_eq!(virtual_size(&disk.path), 17 * CLUSTER as u64);
        disk.check();
        disk.snapshot(&["merge"]).ok();
        assert!(disk.read(None) == content);
        disk.check();
    }
}

#[test]
fn making_a_cut_chain_whole_can_be_cut_anywhere() {
    if !has_qemu() {
        return;
    }
    let (disk, content) = cut_chain(2);
    let copy = disk.folder.path().join("copy");
    fs::rename(&disk.path, &copy).unwrap();
    let restore = || {
        let _ = fs::remove_dir_all(&disk.path);
        run("cp", ["-a", copy.to_str().unwrap(), &disk.path]).ok();
    };
    let killed = kill_everywhere(
        || {
            restore();
            ["check", "--repair", "all", &disk.path]
                .map(str::to_owned)
                .to_vec()
        },
        |step, _| {
            let found = ploop_img(["check", &disk.path]);
            assert!(matches!(found.code, Some(0 | 2 | 3)), "{step}: {found:?}");
            ploop_img(["check", "--repair", "all", &disk.path]).ok();
            assert!(disk.read(None) == content, "step {step}");
            disk.check();
        },
    );
    assert!(killed.is_none_or(|killed| killed > 10), "{killed:?}");
}

/// What does not come from rounding is nobody's to guess.
#[test]
fn a_chain_of_another_misfit_is_refused() {
    if !has_qemu() {
        return;
    }
    let (disk, _) = cut_chain(1);
    set_size(&disk.top_file(), 15 * SECTORS, Some(15));
    for command in [&["check"][..], &["check", "--repair", "all"], &["info"]] {
        let error = ploop_img(command.iter().chain(&[disk.path.as_str()])).fails();
        assert!(error.contains("its disk is larger"), "{error}");
        assert!(!error.contains("--repair"), "{error}");
    }
}

#[test]
fn what_is_too_large_names_the_limit_and_a_way() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let error = ploop_img(["create", &path("a"), "1P"]).fails();
    for text in ["562949952372736 bytes", "512 TiB", "--cluster-size 4M"] {
        assert!(error.contains(text), "{error}");
    }
    let (size, args) = ("1P", ["create", "--cluster-size", "2M"]);
    let error = ploop_img(args.into_iter().chain([path("a").as_str(), size])).fails();
    assert!(error.contains("--cluster-size 4M"), "{error}");
    let error = ploop_img(["create", &path("a"), "1E"]).fails();
    assert!(error.contains("36028796951855104 bytes"), "{error}");
    assert!(!error.contains("--cluster-size"), "{error}");
    // The largest there is, and with the clusters that the message names.
    ploop_img(["create", &path("max.hds"), "562949952372736"]).ok();

    ploop_img(["create", &path("b.hds"), "1M"]).ok();
    let error = ploop_img(["resize", &path("b.hds"), "1P"]).fails();
    let copy = "'ploop-img convert --cluster-size 4M'";
    assert!(error.contains("512 TiB") && error.contains(copy), "{error}");

    ploop_img(["convert", "--format-version", "1", &path("b.hds")]).ok();
    let error = ploop_img(["resize", &path("b.hds"), "3T"]).fails();
    assert!(error.contains("(2 TiB)"), "{error}");
    assert!(
        error.contains("'ploop-img convert --format-version 2'"),
        "{error}"
    );
    ploop_img(["convert", "--format-version", "2", &path("b.hds")]).ok();
    ploop_img(["resize", &path("b.hds"), "3T"]).ok();
    let error = ploop_img(["convert", "--format-version", "1", &path("b.hds")]).fails();
    assert!(error.contains("(2 TiB)"), "{error}");
    // A copy has version 2 as well.
    assert!(!error.contains("copy it"), "{error}");
    assert!(image_file(Path::new(&path("b.hds"))).exists());
}
