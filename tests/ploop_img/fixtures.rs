//! The disks of the official tool.

use std::fs;

use serde_json::Value;
use tempfile::TempDir;
use vhost_user_ploop::format::Descriptor;

use super::common::fixtures::FIXTURES;
use super::common::img::{ploop_img, qemu_img_compare, run, sha256};
use super::common::require_tool;

#[test]
fn they_are_clean_and_read_as_they_should() {
    let folder = TempDir::new().unwrap();
    for fixture in FIXTURES {
        let Some(bundle) = fixture.unpack(folder.path()) else {
            return;
        };
        let bundle = bundle.to_str().unwrap();
        ploop_img(["check", bundle]).ok();
        let raw = folder.path().join("out.raw");
        ploop_img(["convert", bundle, raw.to_str().unwrap()]).ok();
        assert_eq!(fs::metadata(&raw).unwrap().len(), fixture.size);
        assert_eq!(sha256(&raw), fixture.sha256, "{}", fixture.name);
        if require_tool("qemu-img") {
            let image = folder.path().join("out.hds");
            ploop_img(["convert", bundle, image.to_str().unwrap()]).ok();
            qemu_img_compare(&raw, &image);
            fs::remove_file(image).unwrap();
        }
        fs::remove_file(raw).unwrap();
    }
}

#[test]
fn reading_changes_nothing() {
    let folder = TempDir::new().unwrap();
    for fixture in FIXTURES {
        let Some(bundle) = fixture.unpack(folder.path()) else {
            return;
        };
        let before = sha256(&bundle.join("root.hds"));
        for command in ["info", "check", "map"] {
            ploop_img([command, bundle.to_str().unwrap()]).ok();
        }
        assert_eq!(sha256(&bundle.join("root.hds")), before);
    }
}

#[test]
fn descriptors_are_written_as_the_official_tool_writes_them() {
    let folder = TempDir::new().unwrap();
    for fixture in FIXTURES {
        let Some(bundle) = fixture.unpack(folder.path()) else {
            return;
        };
        let text = fs::read_to_string(bundle.join("DiskDescriptor.xml")).unwrap();
        let descriptor = Descriptor::parse(&text).unwrap();
        assert_eq!(descriptor.to_xml(), text, "{}", fixture.name);
    }
}

#[test]
fn the_map_is_that_of_qemu_img() {
    if !require_tool("qemu-img") {
        return;
    }
    let folder = TempDir::new().unwrap();
    for fixture in FIXTURES {
        let Some(bundle) = fixture.unpack(folder.path()) else {
            return;
        };
        let image = bundle.join("root.hds");
        let format = if fixture.is_ploop { "parallels" } else { "raw" };
        let theirs = [
            "map",
            "--output=json",
            "-f",
            format,
            image.to_str().unwrap(),
        ];
        let theirs: Vec<Value> = serde_json::from_str(&run("qemu-img", theirs).ok()).unwrap();
        let ours = ploop_img(["map", "--output", "json", bundle.to_str().unwrap()]).ok();
        let mut ours: Vec<Value> = serde_json::from_str(&ours).unwrap();
        // QEMU says so since version 8.2.
        let says_compressed = theirs[0].get("compressed").is_some();
        for entry in &mut ours {
            let fields = entry.as_object_mut().unwrap();
            let file = fields.remove("filename");
            if !says_compressed {
                assert_eq!(fields.remove("compressed"), Some(false.into()));
            }
            assert_eq!(file.is_some(), entry["present"].as_bool().unwrap());
        }
        assert_eq!(ours, theirs, "{}", fixture.name);
    }
}

#[test]
fn the_map_for_people_is_that_of_qemu_img() {
    if !require_tool("qemu-img") {
        return;
    }
    let folder = TempDir::new().unwrap();
    for fixture in FIXTURES {
        let Some(bundle) = fixture.unpack(folder.path()) else {
            return;
        };
        let image = bundle.join("root.hds");
        let image = image.to_str().unwrap();
        let format = if fixture.is_ploop { "parallels" } else { "raw" };
        let theirs = run("qemu-img", ["map", "-f", format, image]).ok();
        let ours = ploop_img(["map", bundle.to_str().unwrap()]).ok();
        assert!(theirs.contains("\n0 "), "{theirs}");
        assert_eq!(ours, theirs, "{}", fixture.name);
    }
}
