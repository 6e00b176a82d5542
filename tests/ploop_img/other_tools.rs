//! Disks as the official tool leaves them. It is not there, so what it does to
//! images and descriptors is done here by hand.

use std::fs;
use std::path::{Path, PathBuf};

use super::common::fixtures::fixture;
use super::common::img::{names_in, ploop_img};
use super::disk::{Disk, has_qemu};

impl Disk {
    fn descriptor(&self) -> PathBuf {
        Path::new(&self.path).join("DiskDescriptor.xml")
    }

    fn edit_descriptor(&self, edit: impl FnOnce(String) -> String) {
        let text = fs::read_to_string(self.descriptor()).unwrap();
        fs::write(self.descriptor(), edit(text)).unwrap();
    }
}

/// Once the base is raw, the official tool calls every image `Plain`.
#[test]
fn plain_above_the_base_is_expandable() {
    if !has_qemu() {
        return;
    }
    let Some(disk) = Disk::fixture("plain") else {
        return;
    };
    let first = disk.create();
    disk.write(3, 2, 0x71);
    let second = disk.create();
    let content = disk.sha256(None);
    let call_all_plain = || disk.edit_descriptor(|text| text.replace("Compressed", "Plain"));
    call_all_plain();
    for command in ["check", "info", "map"] {
        ploop_img([command, &disk.path]).ok();
    }
    assert_eq!(disk.sha256(None), content);
    assert_eq!(disk.sha256(Some(&first)), fixture("plain").sha256);
    disk.create();
    // Both read it so: one image that is Plain makes the base raw.
    let text = fs::read_to_string(disk.descriptor()).unwrap();
    let count = |kind: &str| text.matches(&format!("<Type>{kind}</Type>")).count();
    assert_eq!((count("Plain"), count("Compressed")), (1, 3), "{text}");
    call_all_plain();
    disk.snapshot(&["delete", &second]).ok();
    disk.check();
    assert_eq!(disk.sha256(None), content);

    // What has no signature is raw indeed, and above the base there is no such thing.
    call_all_plain();
    fs::write(disk.top_file(), vec![0; 1 << 20]).unwrap();
    let error = ploop_img(["info", &disk.path]).fails();
    assert!(error.contains("signature"), "{error}");
}

/// A disk with so many levels, all of them empty but for the first.
fn deep_disk(levels: usize) -> Disk {
    let disk = Disk::new("1M");
    disk.write(3, 1, 7);
    disk.create();
    let name = |index: usize| format!("root.hds.{index}");
    let guid = |index: usize| format!("{{00000000-0000-0000-0000-{index:012}}}");
    let top = disk.top_file();
    let (mut images, mut shots) = (String::new(), String::new());
    let mut parent = disk.list()[0]["guid"].as_str().unwrap().to_owned();
    for index in 2..levels {
        fs::copy(&top, Path::new(&disk.path).join(name(index))).unwrap();
        let (guid, file) = (guid(index), name(index));
        images += &format!(
            "<Image><GUID>{guid}</GUID><Type>Compressed</Type><File>{file}</File></Image>"
        );
        shots += &format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>");
        parent = guid;
    }
    let old_parent = disk.list()[0]["guid"].as_str().unwrap().to_owned();
    disk.edit_descriptor(|text| {
        text.replace(
            &format!("<ParentGUID>{old_parent}<"),
            &format!("<ParentGUID>{parent}<"),
        )
        .replace("</Storage>", &format!("{images}</Storage>"))
        .replace("</Snapshots>", &format!("{shots}</Snapshots>"))
    });
    disk
}

#[test]
fn no_chain_is_too_long_for_the_way_back() {
    if !has_qemu() {
        return;
    }
    // The most that the official tool makes, and more than anybody serves.
    for levels in [127, 131] {
        let disk = deep_disk(levels);
        let list = disk.list();
        assert_eq!(list.len(), levels);
        let content = disk.read(None);
        assert!(content[3 << 16..4 << 16].iter().all(|byte| *byte == 7));
        for command in ["check", "info", "map"] {
            ploop_img([command, &disk.path]).ok();
        }
        let error = disk.snapshot(&["create"]).fails();
        assert!(error.contains("127 levels"), "{error}");
        let guid = list[levels / 2]["guid"].as_str().unwrap();
        disk.snapshot(&["delete", guid]).ok();
        disk.snapshot(&["switch", list[0]["guid"].as_str().unwrap()])
            .ok();
        let deepest = list[levels - 2]["guid"].as_str().unwrap();
        disk.snapshot(&["delete", deepest]).ok();
        disk.check();

        let disk = deep_disk(levels);
        disk.snapshot(&["merge"]).ok();
        assert!(disk.read(None) == content);
        disk.check();
    }
}

/// After a switch of its own to a snapshot from before a resize, the official tool
/// leaves the size in the descriptor as it was.
#[test]
fn a_size_in_the_descriptor_that_is_not_the_tops_is_a_note() {
    let disk = Disk::new("1M");
    let old = fs::read_to_string(disk.descriptor()).unwrap();
    ploop_img(["resize", &disk.path, "2M"]).ok();
    let new = fs::read_to_string(disk.descriptor()).unwrap();
    for repair in [&["check"][..], &["check", "--repair", "leaks"]] {
        fs::write(disk.descriptor(), &old).unwrap();
        let said = ploop_img(repair.iter().chain(&[disk.path.as_str()])).ok();
        assert!(said.contains("2048 sectors, its top says 4096"), "{said}");
        assert!(said.contains("The disk is clean"), "{said}");
        assert!(!said.contains("Do not serve"), "{said}");
        assert_eq!(fs::read_to_string(disk.descriptor()).unwrap(), old);
    }
    assert_eq!(disk.read(None).len(), 2 << 20);
    let said = ploop_img(["check", "--repair", "all", &disk.path]).ok();
    assert!(said.contains("its top says 4096"), "{said}");
    assert_eq!(fs::read_to_string(disk.descriptor()).unwrap(), new);
    assert_eq!(names_in(disk.path.as_ref()).len(), 2);
}
