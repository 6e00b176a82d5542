//! `create` and `info`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::Value;
use tempfile::TempDir;

use super::common::img::{image_file, names_in, ploop_img, qemu_img_check, run};
use super::common::require_tool;

#[test]
fn a_new_disk_is_what_qemu_img_expects() {
    if !require_tool("qemu-img") {
        return;
    }
    let folder = TempDir::new().unwrap();
    for (name, size, bytes, cluster) in [
        ("a.hds", "10G", 10u64 << 30, "1M"),
        ("b.hds", "1000", 32 << 10, "32k"),
        ("bundle", "100T", 100 << 40, "64M"),
        ("other.name", "1.5M", 3 << 19, "64k"),
    ] {
        let disk = folder.path().join(name);
        let disk_arg = disk.to_str().unwrap();
        ploop_img(["create", disk_arg, size, "--cluster-size", cluster]).ok();
        assert_eq!(disk.is_dir(), !name.ends_with(".hds"));
        let image = image_file(&disk);
        qemu_img_check(&image);
        let info = run(
            "qemu-img",
            [
                "info",
                "--output=json",
                "-f",
                "parallels",
                image.to_str().unwrap(),
            ],
        );
        let info: Value = serde_json::from_str(&info.ok()).unwrap();
        assert_eq!(info["virtual-size"], bytes);
        let ours = ploop_img(["info", "--output", "json", disk_arg]).ok();
        let ours: Value = serde_json::from_str(&ours).unwrap();
        assert_eq!(ours["virtual-size"], bytes);
        assert_eq!(ours["dirty-flag"], false);
        assert_eq!(ours["format-specific"]["data"]["version"], 2);
        ploop_img(["check", disk_arg]).ok();
        // Thin: whatever its size, header and BAT are all that there is, if that.
        assert!(fs::metadata(&image).unwrap().blocks() * 512 <= 1 << 20);
    }
}

#[test]
fn nothing_but_the_disk_is_made() {
    let folder = TempDir::new().unwrap();
    for name in ["a.hds", "bundle"] {
        ploop_img(["create", folder.path().join(name).to_str().unwrap(), "1M"]).ok();
    }
    assert_eq!(names_in(folder.path()), ["a.hds", "bundle"]);
    let bundle = folder.path().join("bundle");
    assert_eq!(names_in(&bundle), ["DiskDescriptor.xml", "root.hds"]);
}

#[test]
fn what_exists_is_not_overwritten() {
    let folder = TempDir::new().unwrap();
    let path = |name| folder.path().join(name);
    fs::write(path("file.hds"), "precious").unwrap();
    fs::create_dir(path("folder")).unwrap();
    fs::create_dir(path("folder.hds")).unwrap();
    std::os::unix::fs::symlink("nowhere", path("link.hds")).unwrap();
    for name in ["file.hds", "folder", "folder.hds", "link.hds"] {
        let error = ploop_img(["create", path(name).to_str().unwrap(), "1M"]).fails();
        assert!(error.contains("already exists"), "{error}");
    }
    assert_eq!(fs::read(path("file.hds")).unwrap(), b"precious");
    assert_eq!(
        names_in(folder.path()),
        ["file.hds", "folder", "folder.hds", "link.hds"]
    );
}

#[test]
fn sizes_that_make_no_sense() {
    let folder = TempDir::new().unwrap();
    let disk = folder.path().join("disk");
    let disk = disk.to_str().unwrap();
    for size in ["0", "", "x", "-1", "10GX", "9E", "99999999999999999999999"] {
        let ran = ploop_img(["create", disk, size]);
        assert_eq!(ran.code, Some(1), "{size}: {ran:?}");
        assert!(ran.stderr.contains(&format!("'{size}'")), "{ran:?}");
    }
    // What 64-bit bytes can say, but 1 MiB clusters cannot map.
    let error = ploop_img(["create", disk, "1E"]).fails();
    assert!(error.contains("too large"), "{error}");
    for cluster in ["16k", "128M", "100k", "0"] {
        let ran = ploop_img(["create", disk, "1M", "--cluster-size", cluster]);
        assert_eq!(ran.code, Some(1), "{cluster}: {ran:?}");
    }
    assert!(names_in(folder.path()).is_empty());
}

#[test]
fn sizes_are_those_of_qemu_img() {
    if !require_tool("qemu-img") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let both = |size: &str| {
        let (raw, ours) = (path("qemu.raw"), path("ours.hds"));
        let theirs = run("qemu-img", ["create", "-q", "-f", "raw", &raw, size]);
        let ran = ploop_img(["create", &ours, "--", size]);
        let made = [&theirs, &ran].map(|ran| ran.code == Some(0));
        assert_eq!(made[0], made[1], "{size}: {theirs:?}, {ran:?}");
        made[0].then(|| {
            let info = run(
                "qemu-img",
                ["info", "--output=json", "-f", "parallels", &ours],
            );
            let info: Value = serde_json::from_str(&info.ok()).unwrap();
            fs::remove_file(&ours).unwrap();
            let len = fs::metadata(&raw).unwrap().len();
            fs::remove_file(&raw).unwrap();
            (len, info["virtual-size"].as_u64().unwrap())
        })
    };
    // Left out: older versions want digits on both sides of a point, and take a
    // suffix after hexadecimal digits. What ends in B or iB, all of them refuse.
    for size in [
        "1", "513", "7b", "1B", "1k", "3K", "1.5M", "1.5m", "2G", "2g", "0.001T", "1T", "1.0",
        "1.99999k", "0x400", "0X1F000",
    ] {
        let lengths = both(size).unwrap_or_else(|| panic!("{size} was refused"));
        assert_eq!(lengths.0.next_multiple_of(1 << 20), lengths.1, "{size}");
    }
    for size in [
        "",
        "k",
        ".",
        ".k",
        "1kk",
        "1.5",
        "1.5b",
        "1e3",
        "1k ",
        "1X",
        "8E",
        "inf",
        "nan",
        "99999999999999999999",
    ] {
        assert_eq!(both(size), None, "{size}");
    }
}

#[test]
fn a_name_of_another_format_is_refused() {
    let folder = TempDir::new().unwrap();
    for suffix in ["qcow2", "vmdk", "vhdx", "raw", "img", "Img"] {
        let disk = folder.path().join(format!("disk.{suffix}"));
        let error = ploop_img(["create", disk.to_str().unwrap(), "1M"]).fails();
        let name = format!("a {} image", suffix.to_lowercase());
        assert!(error.contains(&name), "{error}");
        assert!(error.contains(".hds"), "{error}");
    }
    assert!(names_in(folder.path()).is_empty());
}

#[test]
fn places_where_nothing_can_be_made() {
    let folder = TempDir::new().unwrap();
    let path = |name| folder.path().join(name).to_str().unwrap().to_owned();
    let error = ploop_img(["create", &path("none/disk"), "1M"]).fails();
    assert!(error.contains("No such file"), "{error}");
    let error = ploop_img(["create", &path(".."), "1M"]).fails();
    assert!(error.contains("name"), "{error}");
    fs::write(path("file"), "").unwrap();
    let error = ploop_img(["create", &path("file/disk"), "1M"]).fails();
    assert!(error.contains("Not a directory"), "{error}");
}

#[test]
fn info_for_people_names_the_facts() {
    let folder = TempDir::new().unwrap();
    let disk = folder.path().join("disk");
    ploop_img(["create", disk.to_str().unwrap(), "2G"]).ok();
    for path in [
        disk.clone(),
        disk.join("DiskDescriptor.xml"),
        disk.join("root.hds"),
    ] {
        let info = ploop_img(["info", path.to_str().unwrap()]).ok();
        for fact in ["ploop", "2 GiB (2147483648 bytes)", "1048576", "0 of 2048"] {
            assert!(info.contains(fact), "{fact}: {info}");
        }
    }
}

#[test]
fn a_file_larger_than_allowed_is_an_error() {
    let folder = TempDir::new().unwrap();
    let disk = folder.path().join("a.hds");
    let exe = env!("CARGO_BIN_EXE_ploop-img");
    // The BAT of the disk takes more than that.
    let script = format!("ulimit -f 100; exec {exe} create {} 1T", disk.display());
    let said = run("sh", ["-c", &script]).fails();
    assert!(said.contains("File too large"), "{said}");
    assert!(names_in(folder.path()).is_empty());
}
