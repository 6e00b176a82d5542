//! Bundles with several images: all commands see the whole chain.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use quick_xml::events::Event;
use serde_json::Value;

use super::common::fixtures::{FIXTURES, fixture};
use super::common::img::{names_in, ploop_img, run};
use super::disk::{CLUSTER, Disk, has_qemu};

/// A fixture with a snapshot, on which a guest has written into three clusters,
/// one of which the fixture has too.
fn chain_on(name: &str) -> Option<Disk> {
    let disk = Disk::fixture(name)?;
    disk.create();
    disk.write(1, 1, 0x71);
    disk.write(100, 2, 0x72);
    Some(disk)
}

#[test]
fn every_command_goes_on_a_chain_of_any_kind() {
    if !has_qemu() {
        return;
    }
    for name in FIXTURES.map(|fixture| fixture.name) {
        let Some(disk) = chain_on(name) else { return };
        let content = disk.sha256(None);
        assert_ne!(content, fixture(name).sha256);
        for command in [
            ["convert", "--format-version=1", &disk.path],
            ["convert", "--format-version=2", &disk.path],
            ["check", "--repair=all", &disk.path],
        ] {
            ploop_img(command).ok();
            assert_eq!(disk.sha256(None), content, "{name}: {command:?}");
            disk.check();
        }
        let len = disk.len();
        ploop_img(["compact", &disk.path]).ok();
        assert!(disk.len() <= len);
        assert_eq!(disk.sha256(None), content, "{name}");
        disk.check();

        // The top grows, the image below it does not.
        let snapshot = disk.list()[0]["guid"].as_str().unwrap().to_owned();
        let old_size = fixture(name).size;
        ploop_img(["resize", &disk.path, "+1M"]).ok();
        let grown = disk.read(None);
        assert_eq!(grown.len() as u64, old_size + (1 << 20));
        assert!(grown[old_size as usize..].iter().all(|byte| *byte == 0));
        assert_eq!(disk.sha256(Some(&snapshot)), fixture(name).sha256);
        disk.check();
    }
}

#[test]
fn a_plain_base_ends_where_its_disk_ends() {
    let Some(disk) = Disk::fixture("plain") else {
        return;
    };
    let size = fixture("plain").size;
    let base = disk.top_file();
    let file = OpenOptions::new().write(true).open(&base).unwrap();
    file.set_len(size - 512).unwrap();
    for command in [["snapshot", "create"], ["check", "--repair=all"]] {
        let error = ploop_img(command.iter().chain(&[disk.path.as_str()])).fails();
        assert!(error.contains("bytes long, its disk takes"), "{error}");
    }
    assert_eq!(disk.list().len(), 1);

    file.set_len(size).unwrap();
    let before = disk.sha256(None);
    file.write_all_at(b"not the guest's", size).unwrap();
    let first = disk.create();
    ploop_img(["resize", &disk.path, "+1M"]).ok();
    let grown = disk.read(None);
    assert!(grown[size as usize..].iter().all(|byte| *byte == 0));
    assert_eq!(disk.sha256(Some(&first)), before);
    disk.check();
}

#[test]
fn a_merged_chain_is_what_its_flattened_copies_are() {
    if !has_qemu() {
        return;
    }
    for fixture in FIXTURES {
        let Some(disk) = chain_on(fixture.name) else {
            return;
        };
        disk.create();
        disk.write(101, 3, 0x73);
        let path = |name: &str| disk.folder.path().join(name);
        let (raw, bare) = (path("flat.raw"), path("flat.hds"));
        for target in [&raw, &bare] {
            ploop_img(["convert", &disk.path, target.to_str().unwrap()]).ok();
        }
        disk.snapshot(&["merge"]).ok();
        let merged = disk.top_file();
        let format = if fixture.is_ploop { "parallels" } else { "raw" };
        for (copy, copy_format) in [(raw, "raw"), (bare, "parallels")] {
            let [merged, copy] = [&merged, &copy].map(|path| path.to_str().unwrap());
            let arguments = ["compare", "-f", format, "-F", copy_format, merged, copy];
            run("qemu-img", arguments).ok();
        }
        disk.check();
    }
}

/// The names of all elements, each with its depth, in order.
fn elements(descriptor: &str) -> Vec<(usize, String)> {
    let mut reader = quick_xml::Reader::from_str(descriptor);
    let (mut depth, mut names) = (0, Vec::new());
    loop {
        let event = reader.read_event().unwrap();
        if let Event::Start(element) | Event::Empty(element) = &event {
            names.push((depth, element.name().as_ref().to_owned()));
        }
        match event {
            Event::Start(_) => depth += 1,
            Event::End(_) => depth -= 1,
            Event::Eof => return names,
            _ => {}
        }
    }
}

/// `elements` with those of another image, or of another snapshot, after each that
/// there is: what a second one adds.
fn with_another(elements: &[(usize, String)], name: &str) -> Vec<(usize, String)> {
    let start = elements.iter().position(|(_, n)| n == name).unwrap();
    let depth = elements[start].0;
    let after = elements[start + 1..].iter().position(|(d, _)| *d <= depth);
    let end = after.map_or(elements.len(), |len| start + 1 + len);
    [&elements[..end], &elements[start..]].concat()
}

#[test]
fn descriptors_have_the_elements_of_the_official_tool_in_its_order() {
    let Some(official) = Disk::fixture("v2") else {
        return;
    };
    let read = |disk: &Disk| {
        let path = Path::new(&disk.path).join("DiskDescriptor.xml");
        elements(&fs::read_to_string(path).unwrap())
    };
    let one = read(&official);
    let two = with_another(&with_another(&one, "Image"), "Shot");
    let ours = Disk::new("64M");
    assert_eq!(read(&ours), one, "create");
    for disk in [official, ours] {
        let first = disk.create();
        assert_eq!(read(&disk), two, "snapshot create");
        disk.snapshot(&["switch", &first]).ok();
        assert_eq!(read(&disk), two, "snapshot switch");
        ploop_img(["resize", &disk.path, "+1M"]).ok();
        ploop_img(["convert", "--format-version", "1", &disk.path]).ok();
        assert_eq!(read(&disk), two, "resize, convert");
        disk.snapshot(&["delete", &first]).ok();
        assert_eq!(read(&disk), one, "snapshot delete");
        disk.create();
        disk.create();
        disk.snapshot(&["merge"]).ok();
        assert_eq!(read(&disk), one, "snapshot merge");
    }
}

#[test]
fn stray_files_are_named_and_only_our_own_removed() {
    let disk = Disk::new("1M");
    disk.create();
    let place = |name: &str| Path::new(&disk.path).join(name);
    let ours = [
        "root.hds.{12345678-1234-1234-1234-123456789abc}",
        ".ploop-img-0123",
    ];
    // Somebody's copy, and somebody's notes.
    fs::copy(disk.top_file(), place("copy.hds")).unwrap();
    fs::write(place("notes.txt"), "mine").unwrap();
    let before = names_in(disk.path.as_ref());
    ploop_img(["check", &disk.path]).ok();
    fs::copy(disk.top_file(), place(ours[0])).unwrap();
    fs::write(place(ours[1]), "half").unwrap();

    for options in [&["check"][..], &["check", "--output=json"]] {
        let found = ploop_img([options, &[&disk.path]].concat());
        assert_eq!(found.code, Some(3), "{found:?}");
        for name in ours.iter().chain(&["copy.hds"]) {
            assert!(found.stdout.contains(name), "{found:?}");
        }
        assert!(!found.stdout.contains("notes.txt"), "{found:?}");
    }
    let repaired = ploop_img(["check", "--repair", "leaks", &disk.path]).ok();
    assert!(repaired.contains("2 leaks"), "{repaired}");
    assert_eq!(names_in(disk.path.as_ref()), before);
    ploop_img(["check", &disk.path]).ok();
}

#[test]
fn a_check_goes_through_all_levels_and_branches() {
    if !has_qemu() {
        return;
    }
    let Some(disk) = chain_on("v2") else { return };
    let lower = disk.list()[0]["filename"].as_str().unwrap().to_owned();
    let other = disk.top_file();
    let first = disk.list()[0]["guid"].as_str().unwrap().to_owned();
    disk.create();
    disk.snapshot(&["switch", &first]).ok();
    disk.write(7, 1, 0x77);
    let top = disk.top_file();
    let content = disk.sha256(None);
    for image in [Path::new(&lower), &other, &top] {
        // A cluster that nothing uses, behind the end.
        let file = OpenOptions::new().write(true).open(image).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(len + CLUSTER as u64).unwrap();
        let name = image.file_name().unwrap().to_str().unwrap();
        let found = ploop_img(["check", &disk.path]);
        assert_eq!(found.code, Some(3), "{found:?}");
        assert!(found.stdout.contains(name), "{name}: {found:?}");
        ploop_img(["check", "--repair", "leaks", &disk.path]).ok();
        assert_eq!(file.metadata().unwrap().len(), len);

        // An entry that is beyond the end.
        let file = OpenOptions::new().read(true).write(true).open(image);
        let file = file.unwrap();
        let mut entry = [0; 4];
        file.read_exact_at(&mut entry, 64 + 4 * 500).unwrap();
        file.write_all_at(&[1, 1, 0, 0], 64 + 4 * 500).unwrap();
        let found = ploop_img(["check", &disk.path]);
        assert_eq!(found.code, Some(2), "{found:?}");
        assert!(found.stdout.contains(name), "{name}: {found:?}");
        file.write_all_at(&entry, 64 + 4 * 500).unwrap();
        ploop_img(["check", &disk.path]).ok();
    }
    assert_eq!(disk.sha256(None), content);

    // Each image counts with what it has, and with what it could have.
    let report = ploop_img(["check", "--output", "json", &disk.path]).ok();
    let report: Value = serde_json::from_str(&report).unwrap();
    let levels = report["levels"].as_array().unwrap();
    assert_eq!(levels.len(), 3);
    for key in ["total-clusters", "allocated-clusters"] {
        let sum: u64 = levels
            .iter()
            .map(|level| level[key].as_u64().unwrap())
            .sum();
        assert_eq!(report[key], sum, "{key}");
    }
}

#[test]
fn the_map_for_people_names_each_file() {
    if !has_qemu() {
        return;
    }
    let Some(disk) = chain_on("v2") else { return };
    let map = ploop_img(["map", &disk.path]).ok();
    let files: Vec<_> = map.lines().skip(1).map(|line| &line[48..]).collect();
    let (lower, top) = (format!("{}/root.hds", disk.path), disk.top_file());
    let top = top.to_str().unwrap();
    // What the fixture has from 0 and at 5 MiB, with the top's cluster 1 in it; the
    // top's two; what the fixture has at the end.
    assert_eq!(files, [&lower, top, &lower, &lower, top, &lower]);
    let first = disk.list()[0]["guid"].as_str().unwrap().to_owned();
    let below = ploop_img(["map", "--snapshot", &first, &disk.path]).ok();
    assert!(!below.contains(top), "{below}");
}

#[test]
fn a_picture_shows_each_level() {
    if !has_qemu() {
        return;
    }
    let Some(disk) = chain_on("v2") else { return };
    let at = |name: &str| disk.folder.path().join(name).to_str().unwrap().to_owned();
    let (svg, png) = (at("disk.svg"), at("disk.png"));
    for file in [&svg, &png, &png] {
        let drawn = ploop_img(["map", "--picture", file, &disk.path]).ok();
        assert_eq!(drawn, "");
    }
    assert!(fs::read(&png).unwrap().starts_with(b"\x89PNG\r\n"));
    let svg = fs::read_to_string(&svg).unwrap();
    for name in names_in(disk.path.as_ref()) {
        assert_eq!(svg.contains(&name), name.contains(".hds"), "{name}");
    }
    let image = disk.top_file();
    let before = fs::read(&image).unwrap();
    for (file, more) in [(image.to_str().unwrap(), "human"), (&png, "json")] {
        let args = ["map", "--output", more, "--picture", file, &disk.path];
        ploop_img(args).fails();
    }
    assert!(fs::read(&image).unwrap() == before);

    let plain = ploop_img(["info", &disk.path]).ok();
    for (locale, is_ascii) in [("C", true), ("C.UTF-8", false)] {
        let info = run(
            "env",
            [
                &format!("LC_ALL={locale}"),
                env!("CARGO_BIN_EXE_ploop-img"),
                "info",
                "--picture",
                &disk.path,
            ],
        )
        .ok();
        let picture = info.strip_prefix(&plain).unwrap();
        assert_eq!(picture.is_ascii(), is_ascii, "{picture}");
        assert_eq!(picture.matches(" %\n").count(), 2, "{picture}");
        assert!(picture.lines().all(|line| line.chars().count() <= 80));
    }
    ploop_img(["info", "--picture", "--output", "json", &disk.path]).fails();
}

#[test]
fn what_has_no_snapshots_says_why() {
    let disk = Disk::new("1M");
    let nothing = disk.folder.path().join("nothing");
    let inside = Path::new(&disk.path).join("root.hds");
    let bare = disk.folder.path().join("bare.hds");
    ploop_img(["create", bare.to_str().unwrap(), "1M"]).ok();
    for (path, why) in [
        (nothing.as_path(), "No such file"),
        (inside.as_path(), "belongs to the disk"),
        (bare.as_path(), "is a bare image"),
        (disk.folder.path(), "without a DiskDescriptor.xml"),
    ] {
        for command in ["create", "list", "merge"] {
            let error = ploop_img(["snapshot", command, path.to_str().unwrap()]).fails();
            assert!(error.contains(why), "{command}: {error}");
        }
    }
    let ran = disk.snapshot(&["switch", "yesterday"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("a GUID is written like {"), "{ran:?}");
    // The descriptor names the disk as well as its folder.
    let descriptor = Path::new(&disk.path).join("DiskDescriptor.xml");
    ploop_img(["snapshot", "create", descriptor.to_str().unwrap()]).ok();
    assert_eq!(disk.list().len(), 2);
}
