//! `resize`.

use std::fs;
use std::io::Write;

use serde_json::Value;
use tempfile::TempDir;

use super::common::fixtures::{FIXTURES, fixture};
use super::common::img::{image_file, names_in, ploop_img, qemu_img_check, sha256};
use super::common::require_tool;

fn virtual_size(disk: &str) -> u64 {
    let info = ploop_img(["info", "--output", "json", disk]).ok();
    let info: Value = serde_json::from_str(&info).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn old_content_stays_and_new_space_is_zero() {
    let folder = TempDir::new().unwrap();
    for fixture in FIXTURES {
        let Some(bundle) = fixture.unpack(folder.path()) else {
            return;
        };
        let disk = bundle.to_str().unwrap();
        let raw = folder.path().join("out.raw");
        let mut size = fixture.size;
        // Inside the first cluster of the BAT, into the second, far beyond.
        for (argument, new_size) in [
            ("+512".to_owned(), size + (64 << 10)),
            ("3G".to_owned(), 3 << 30),
            ("+97G".to_owned(), 100 << 30),
        ] {
            ploop_img(["resize", disk, &argument]).ok();
            assert_eq!(virtual_size(disk), new_size);
            let descriptor = fs::read_to_string(bundle.join("DiskDescriptor.xml")).unwrap();
            let sectors = format!("<Disk_size>{}<", new_size / 512);
            assert!(descriptor.contains(&sectors), "{descriptor}");
            ploop_img(["check", disk]).ok();
            if fixture.is_ploop && require_tool("qemu-img") {
                qemu_img_check(&image_file(&bundle));
            }
            size = new_size;
        }
        ploop_img(["convert", disk, raw.to_str().unwrap()]).ok();
        let file = fs::OpenOptions::new().write(true).open(&raw).unwrap();
        assert_eq!(file.metadata().unwrap().len(), size);
        file.set_len(fixture.size).unwrap();
        assert_eq!(sha256(&raw), fixture.sha256, "{}", fixture.name);
        fs::remove_file(raw).unwrap();
    }
}

#[test]
fn smaller_is_refused_and_the_same_is_nothing() {
    let folder = TempDir::new().unwrap();
    for name in ["bundle", "bare.hds"] {
        let disk = folder.path().join(name);
        let arg = disk.to_str().unwrap();
        ploop_img(["create", arg, "10M"]).ok();
        let before = sha256(&image_file(&disk));
        let error = ploop_img(["resize", arg, "9M"]).fails();
        assert!(error.contains("smaller"), "{error}");
        ploop_img(["resize", arg, "10M"]).ok();
        assert_eq!(sha256(&image_file(&disk)), before);
        ploop_img(["resize", arg, "+0"]).ok();
        for less in ["-1M", "-1.5k", "-0x400"] {
            let ran = ploop_img(["resize", arg, less]);
            let said = ran.fails();
            assert!(said.contains("--shrink"), "{said}");
        }
        for nonsense in ["0", "+-1M", "++1M", "+", "--shrink", "9E", "+9E"] {
            let ran = ploop_img(["resize", arg, nonsense]);
            assert_eq!(ran.code, Some(1), "{ran:?}");
            assert!(ran.stderr.contains("SIZE"), "{ran:?}");
        }
        assert_eq!(sha256(&image_file(&disk)), before);
        // What 64-bit bytes can say, but 1 MiB clusters cannot map.
        for absurd in ["1E", "+7.9E"] {
            ploop_img(["resize", arg, absurd]).fails();
        }
        assert_eq!(sha256(&image_file(&disk)), before);
    }
}

#[test]
fn sizes_have_fractions_and_may_be_relative() {
    let folder = TempDir::new().unwrap();
    let disk = folder.path().join("bare.hds");
    let arg = disk.to_str().unwrap();
    ploop_img(["create", arg, "1.5M"]).ok();
    assert_eq!(virtual_size(arg), 2 << 20);
    for (size, bytes) in [
        ("2M", 2 << 20),
        ("+5M", 7 << 20),
        ("+1.5k", 8 << 20),
        ("+1", 9 << 20),
        ("0xA00000", 10 << 20),
        ("1.5G", 3 << 29),
        ("+.5g", 2 << 30),
    ] {
        let said = ploop_img(["resize", arg, size]).ok();
        assert!(said.contains(&format!("({bytes} bytes)")), "{size}: {said}");
        assert_eq!(virtual_size(arg), bytes, "{size}");
        ploop_img(["check", arg]).ok();
    }
}

#[test]
fn an_image_in_use_is_not_resized() {
    let folder = TempDir::new().unwrap();
    let disk = folder.path().join("bare.hds");
    let arg = disk.to_str().unwrap();
    ploop_img(["create", arg, "10M"]).ok();
    let mut bytes = fs::read(&disk).unwrap();
    bytes[44..48].copy_from_slice(&0x746F_6E59u32.to_le_bytes());
    fs::write(&disk, &bytes).unwrap();
    let error = ploop_img(["resize", arg, "20M"]).fails();
    assert!(error.contains("--repair all"), "{error}");
    assert_eq!(fs::read(&disk).unwrap(), bytes);
    ploop_img(["check", "--repair", "all", arg]).ok();
    ploop_img(["resize", arg, "20M"]).ok();
}

#[test]
fn what_lies_behind_a_plain_disk_does_not_come_to_light() {
    let folder = TempDir::new().unwrap();
    let fixture = fixture("plain");
    let Some(bundle) = fixture.unpack(folder.path()) else {
        return;
    };
    let raw = bundle.join("root.hds");
    let mut bytes = fs::read(&raw).unwrap();
    bytes.extend([7; 8192]);
    fs::write(&raw, &bytes).unwrap();
    ploop_img(["resize", bundle.to_str().unwrap(), "+4096"]).ok();
    bytes.truncate(fixture.size as usize);
    bytes.extend([0; 64 << 10]);
    assert!(fs::read(&raw).unwrap() == bytes);
}

#[test]
fn what_lies_behind_a_plain_base_does_not_come_to_light() {
    let folder = TempDir::new().unwrap();
    let fixture = fixture("plain");
    let Some(bundle) = fixture.unpack(folder.path()) else {
        return;
    };
    let disk = bundle.to_str().unwrap();
    let base = fs::OpenOptions::new()
        .append(true)
        .open(bundle.join("root.hds"))
        .unwrap();
    ploop_img(["snapshot", "create", disk]).ok();
    // By another program.
    (&base).write_all(&[7; 64 << 10]).unwrap();
    let said = ploop_img(["resize", disk, "+64k"]).fails();
    let remedy = format!("truncate --size={}", fixture.size);
    assert!(said.contains(&remedy), "{said}");
    assert_eq!(virtual_size(disk), fixture.size);
    ploop_img(["resize", disk, "+0"]).ok();
    base.set_len(fixture.size).unwrap();
    // A hole is as good as nothing.
    base.set_len(2 * fixture.size).unwrap();
    ploop_img(["resize", disk, "+64k"]).ok();
    let raw = folder.path().join("out.raw");
    ploop_img(["convert", disk, raw.to_str().unwrap()]).ok();
    let bytes = fs::read(&raw).unwrap();
    assert!(bytes[fixture.size as usize..] == [0; 64 << 10]);
    // Above a snapshot that ends where the disk did, nothing of it is to be seen.
    (&base).write_all(&[7; 4096]).unwrap();
    ploop_img(["snapshot", "create", disk]).ok();
    ploop_img(["resize", disk, "+64M"]).ok();
    fs::remove_file(&raw).unwrap();
    ploop_img(["convert", disk, raw.to_str().unwrap()]).ok();
    let bytes = fs::read(&raw).unwrap();
    assert!(bytes[fixture.size as usize..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_disk_shrinks_only_where_that_is_meant() {
    let folder = TempDir::new().unwrap();
    let raw = folder.path().join("a.raw");
    // No zero anywhere.
    let content: Vec<u8> = (0..10 << 20).map(|at| (at >> 12) as u8 | 1).collect();
    fs::write(&raw, &content).unwrap();
    for name in ["bundle", "bare.hds"] {
        let disk = folder.path().join(name);
        let arg = disk.to_str().unwrap();
        ploop_img(["convert", raw.to_str().unwrap(), arg]).ok();
        let before = sha256(&image_file(&disk));
        for size in ["6M", "-4M"] {
            let error = ploop_img(["resize", arg, size]).fails();
            assert!(error.contains("--shrink"), "{error}");
        }
        let error = ploop_img(["resize", "--shrink", arg, "-10M"]).fails();
        assert!(error.contains("nothing would be left"), "{error}");
        assert_eq!(sha256(&image_file(&disk)), before);

        let said = ploop_img(["resize", "--shrink", arg, "-4M"]).ok();
        assert!(said.contains("(6291456 bytes)"), "{said}");
        assert_eq!(virtual_size(arg), 6 << 20);
        ploop_img(["check", arg]).ok();
        // Header and BAT, and what is left.
        assert_eq!(fs::metadata(image_file(&disk)).unwrap().len(), 7 << 20);
        if require_tool("qemu-img") {
            qemu_img_check(&image_file(&disk));
        }
        ploop_img(["resize", arg, "10M"]).ok();
        let back = folder.path().join("back.raw");
        ploop_img(["convert", arg, back.to_str().unwrap()]).ok();
        let mut expected = content.clone();
        expected[6 << 20..].fill(0);
        assert!(fs::read(&back).unwrap() == expected, "{name}");
        fs::remove_file(back).unwrap();
    }
}

#[test]
fn a_plain_disk_shrinks_and_its_snapshots_keep_it_from_that() {
    let folder = TempDir::new().unwrap();
    let fixture = fixture("plain");
    let Some(bundle) = fixture.unpack(folder.path()) else {
        return;
    };
    let disk = bundle.to_str().unwrap();
    let before = fs::read(bundle.join("root.hds")).unwrap();
    let cluster = 1 << 20;
    ploop_img(["resize", "--shrink", disk, "-1M"]).ok();
    let now = fs::read(bundle.join("root.hds")).unwrap();
    assert!(now[..] == before[..before.len() - cluster]);
    assert_eq!(virtual_size(disk), now.len() as u64);
    ploop_img(["check", disk]).ok();

    ploop_img(["snapshot", "create", disk]).ok();
    let state = || {
        let names = names_in(&bundle).into_iter();
        names
            .map(|name| sha256(&bundle.join(name)))
            .collect::<Vec<_>>()
    };
    let before = state();
    let error = ploop_img(["resize", "--shrink", disk, "-1M"]).fails();
    assert!(error.contains("has snapshots"), "{error}");
    assert_eq!(state(), before);
    ploop_img(["snapshot", "merge", disk]).ok();
    ploop_img(["resize", "--shrink", disk, "-1M"]).ok();
    ploop_img(["check", disk]).ok();
}
