//! Snapshots: what they keep, and against a model.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::common::fixtures::fixture;
use super::common::img::ploop_img;
use super::disk::{CLUSTER, Disk, has_qemu};

#[test]
fn states_are_kept_and_found_again() {
    if !has_qemu() {
        return;
    }
    for name in ["v1", "v2", "plain", "prealloc"] {
        let Some(disk) = Disk::fixture(name) else {
            return;
        };
        let first = disk.create();
        assert_eq!(disk.sha256(None), fixture(name).sha256, "{name}");
        disk.write(3, 5, 0x11);
        let (second, with_second) = (disk.create(), disk.sha256(None));
        disk.write(0, 4, 0x22);
        disk.check();
        assert_eq!(disk.sha256(Some(&first)), fixture(name).sha256);
        assert_eq!(disk.sha256(Some(&second)), with_second);

        let with_third = disk.sha256(None);
        let third = disk.create();
        disk.snapshot(&["switch", &first]).ok();
        assert_eq!(disk.sha256(None), fixture(name).sha256);
        assert_eq!(disk.sha256(Some(&third)), with_third);
        disk.check();
        // First has two children now.
        let error = disk.snapshot(&["delete", &first]).fails();
        assert!(error.contains("2 snapshots lie on"), "{error}");

        disk.snapshot(&["delete", &second]).ok();
        assert_eq!(disk.sha256(Some(&third)), with_third);
        disk.snapshot(&["switch", &third]).ok();
        assert_eq!(disk.sha256(None), with_third);
        disk.snapshot(&["merge"]).ok();
        assert_eq!(disk.list().len(), 1);
        assert_eq!(disk.sha256(None), with_third, "{name}");
        disk.check();
    }
}

#[test]
fn the_tree_is_shown() {
    let disk = Disk::new("1M");
    let first = disk.create();
    let named = "{12345678-1234-1234-1234-123456789abc}";
    disk.snapshot(&["create", "--guid", named]).ok();
    let list = disk.list();
    assert_eq!(list.len(), 3);
    assert_eq!(list[0]["guid"], *first);
    assert_eq!(list[0]["parent"], Value::Null);
    assert_eq!(list[1]["guid"], *named);
    assert_eq!(list[1]["parent"], *first);
    assert_eq!(list[2]["current"], true);
    assert_eq!(list[2]["depth"], 2);
    let table = disk.snapshot(&["list"]).ok();
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[1].starts_with(&first), "{table}");
    assert!(lines[2].starts_with(&format!("  {named}")), "{table}");
    assert!(lines[3].ends_with("(current state)"), "{table}");

    let chain = ploop_img(["info", "--backing-chain", "--output", "json", &disk.path]).ok();
    let chain: Vec<Value> = serde_json::from_str(&chain).unwrap();
    assert_eq!(chain.len(), 3);
    assert_eq!(chain[0]["backing-filename"], chain[1]["filename"]);
    assert_eq!(chain[2]["backing-filename"], Value::Null);
}

#[test]
fn what_cannot_be_is_refused() {
    let disk = Disk::new("1M");
    let top = disk.list()[0]["guid"].as_str().unwrap().to_owned();
    let nobody = "{12345678-1234-1234-1234-123456789abc}";
    let before = fs::read(Path::new(&disk.path).join("DiskDescriptor.xml")).unwrap();
    for (args, what) in [
        (["switch", nobody], "there is no snapshot"),
        (["delete", nobody], "there is no snapshot"),
        (["switch", &top], "is the top"),
        (["delete", &top], "is the top"),
    ] {
        let error = disk.snapshot(&args).fails();
        assert!(error.contains(what), "{args:?}: {error}");
    }
    let error = disk.snapshot(&["create", "--guid", &top]).fails();
    assert!(error.contains("already"), "{error}");
    let after = fs::read(Path::new(&disk.path).join("DiskDescriptor.xml")).unwrap();
    assert_eq!(after, before);

    let bare = disk.folder.path().join("bare.hds");
    ploop_img(["create", bare.to_str().unwrap(), "1M"]).ok();
    for args in [
        vec!["create"],
        vec!["list"],
        vec!["merge"],
        vec!["delete", &top],
    ] {
        let args = ["snapshot", args[0], bare.to_str().unwrap()]
            .into_iter()
            .chain(args[1..].iter().copied());
        let error = ploop_img(args).fails();
        assert!(error.contains("bare image"), "{error}");
    }
    // One image of several is not to be written by itself.
    let first = disk.create();
    let lower = Path::new(&disk.path).join("root.hds");
    let error = ploop_img(["resize", lower.to_str().unwrap(), "2M"]).fails();
    assert!(error.contains("which has 2 images"), "{error}");
    let error = ploop_img(["resize", disk.top_file().to_str().unwrap(), "2M"]).fails();
    assert!(error.contains("which has 2 images"), "{error}");
    disk.snapshot(&["merge", "--from", nobody]).fails();
    disk.snapshot(&["merge", "--from", &top, "--to", &first])
        .fails();
    disk.snapshot(&["merge", "--from", &first]).ok();
}

#[test]
fn a_disk_that_grew_keeps_its_smaller_snapshots() {
    if !has_qemu() {
        return;
    }
    let disk = Disk::new("1M");
    disk.write(0, 16, 1);
    let small = disk.create();
    ploop_img(["resize", &disk.path, "2M"]).ok();
    disk.write(20, 4, 2);
    let grown = disk.read(None);
    assert_eq!(grown.len(), 2 << 20);
    assert_eq!(disk.read(Some(&small)), vec![1; 1 << 20]);
    disk.check();
    let other = disk.create();
    disk.snapshot(&["switch", &small]).ok();
    assert_eq!(disk.read(None), vec![1; 1 << 20]);
    disk.check();
    disk.snapshot(&["switch", &other]).ok();
    disk.snapshot(&["merge"]).ok();
    assert!(disk.read(None) == grown);
    disk.check();
}

#[test]
fn the_map_names_the_level() {
    if !has_qemu() {
        return;
    }
    let disk = Disk::new("1M");
    disk.write(0, 4, 1);
    disk.create();
    disk.write(2, 4, 2);
    let map = ploop_img(["map", "--output", "json", &disk.path]).ok();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let found: Vec<_> = map
        .iter()
        .map(|e| {
            (
                e["start"].as_u64().unwrap() / 65_536,
                e["depth"].as_u64().unwrap(),
                e["present"] == true,
            )
        })
        .collect();
    assert_eq!(found, [(0, 1, true), (2, 0, true), (6, 1, false)]);
    assert_eq!(map[1]["filename"], disk.top_file().to_str().unwrap());
}

/// What was in the disk and has not changed, with what `map --since` gives copied over it.
fn brought_up_to_date(disk: &Disk, since: &str, snapshot: Option<&str>) -> Vec<u8> {
    let mut args = vec!["map", "--since", since, "--output", "json", &disk.path];
    args.extend(snapshot.iter().flat_map(|guid| ["--snapshot", *guid]));
    let changed: Vec<Value> = serde_json::from_str(&ploop_img(args).ok()).unwrap();
    let mut content = disk.read(Some(since));
    for entry in &changed {
        let [start, length] = ["start", "length"].map(|key| entry[key].as_u64().unwrap() as usize);
        let new = match entry["offset"].as_u64() {
            Some(offset) => {
                let file = fs::File::open(entry["filename"].as_str().unwrap()).unwrap();
                let mut new = vec![0; length];
                file.read_exact_at(&mut new, offset).unwrap();
                new
            }
            None => vec![0; length],
        };
        content.resize(content.len().max(start + length), 0);
        content[start..start + length].copy_from_slice(&new);
    }
    content
}

#[test]
fn an_old_copy_is_brought_up_to_date_by_what_has_changed_since() {
    if !has_qemu() {
        return;
    }
    for name in ["v1", "v2", "plain", "prealloc"] {
        let Some(disk) = Disk::fixture(name) else {
            return;
        };
        let first = disk.create();
        disk.write(3, 40, 0x11);
        let second = disk.create();
        ploop_img(["resize", &disk.path, "+3M"]).ok();
        disk.write(0, 4, 0x22);
        for (since, snapshot) in [(&first, None), (&second, None), (&first, Some(&*second))] {
            let content = brought_up_to_date(&disk, since, snapshot);
            assert!(content == disk.read(snapshot), "{name}, {since}");
        }
        let nothing = ["map", "--since", &second, "--snapshot", &second, &disk.path];
        assert_eq!(ploop_img(nothing).ok().lines().count(), 1);
        let json = ploop_img(nothing.into_iter().chain(["--output", "json"])).ok();
        assert_eq!(json, "[]\n");
        let top_file = disk.top_file();
        let changed = ploop_img(["map", "--since", &second, &disk.path]).ok();
        let files: Vec<_> = changed.lines().skip(1).map(|line| &line[48..]).collect();
        assert!(!files.is_empty(), "{changed}");
        assert!(files.iter().all(|file| *file == top_file.to_str().unwrap()));

        let error =
            ploop_img(["map", "--since", &second, "--snapshot", &first, &disk.path]).fails();
        assert!(error.contains("does not lie on snapshot"), "{error}");
    }
}

/// What the disk and its snapshots should be.
#[derive(Clone, Default)]
struct Model {
    top: Vec<u8>,
    /// What the top lies on.
    parent: Option<String>,
    /// Content and parent.
    snapshots: BTreeMap<String, (Vec<u8>, Option<String>)>,
}

impl Model {
    fn children(&self, guid: &str) -> usize {
        let is_child = |parent: &Option<String>| parent.as_deref() == Some(guid);
        let shots = self
            .snapshots
            .values()
            .filter(|(_, parent)| is_child(parent));
        shots.count() + usize::from(is_child(&self.parent))
    }

    fn remove(&mut self, guid: &str) {
        let (_, below) = self.snapshots.remove(guid).unwrap();
        let parents = self.snapshots.values_mut().map(|(_, parent)| parent);
        for parent in parents.chain([&mut self.parent]) {
            if parent.as_deref() == Some(guid) {
                parent.clone_from(&below);
            }
        }
    }

    fn compare(&self, disk: &Disk) {
        assert!(disk.read(None) == self.top);
        for (guid, (content, _)) in &self.snapshots {
            assert!(disk.read(Some(guid)) == *content, "{guid}");
        }
        assert_eq!(disk.list().len(), self.snapshots.len() + 1);
        disk.check();
    }

    /// Makes a random change to both.
    fn step(&mut self, disk: &Disk, rng: &mut StdRng) {
        let guids: Vec<_> = self.snapshots.keys().cloned().collect();
        let chosen = guids.choose(rng);
        match (rng.random_range(0..12), chosen) {
            (0..5, _) => {
                let count = rng.random_range(1..6);
                let clusters = self.top.len() / CLUSTER;
                let at = rng.random_range(0..=clusters - count);
                let pattern = rng.random_range(0..4);
                disk.write(at, count, pattern);
                self.top[at * CLUSTER..(at + count) * CLUSTER].fill(pattern);
            }
            (5..8, _) => {
                let guid = disk.create();
                let state = (self.top.clone(), self.parent.take());
                self.snapshots.insert(guid.clone(), state);
                self.parent = Some(guid);
            }
            (8, Some(guid)) => {
                disk.snapshot(&["switch", guid]).ok();
                self.top.clone_from(&self.snapshots[guid].0);
                self.parent = Some(guid.clone());
            }
            (9, Some(guid)) if self.children(guid) > 1 => {
                disk.snapshot(&["delete", guid]).fails();
            }
            (9, Some(guid)) => {
                disk.snapshot(&["delete", guid]).ok();
                self.remove(guid);
            }
            (10, _) => {
                ploop_img(["resize", &disk.path, "+100000"]).ok();
                self.top.resize(self.top.len() + 2 * CLUSTER, 0);
            }
            _ => {
                let version = if rng.random() { "1" } else { "2" };
                ploop_img(["compact", &disk.path]).ok();
                ploop_img(["convert", "--format-version", version, &disk.path]).ok();
            }
        }
    }
}

#[test]
fn random_changes_against_a_model() {
    if !has_qemu() {
        return;
    }
    for seed in 0..3 {
        let mut rng = StdRng::seed_from_u64(seed);
        let disk = Disk::new("1M");
        let mut model = Model {
            top: vec![0; 1 << 20],
            ..Model::default()
        };
        for step in 0..25 {
            println!("seed {seed}, step {step}");
            model.step(&disk, &mut rng);
            model.compare(&disk);
        }
    }
}

#[test]
fn dates_and_descriptions_outlive_the_official_tool() {
    let disk = Disk::new("2M");
    let before = Timestamp::now().as_second();
    let text = "before \"the\" upgrade, für später";
    let guid = disk.snapshot(&["create", "--description", text]).ok();
    let guid = guid.trim();
    let plain = disk.create();
    let noted = |guid: &str| {
        let list = disk.list();
        let shot = list
            .iter()
            .find(|shot| shot["guid"] == guid)
            .unwrap()
            .clone();
        let date = shot["date"].as_str().map(|date| {
            let date: Timestamp = date.parse().unwrap();
            date.as_second()
        });
        (date, shot["description"].as_str().map(str::to_owned))
    };
    let (date, description) = noted(guid);
    assert_eq!(description.as_deref(), Some(text));
    let now = Timestamp::now().as_second();
    assert!((before..=now).contains(&date.unwrap()), "{date:?}");
    assert!(noted(&plain).0.is_some() && noted(&plain).1.is_none());
    let shown = disk.snapshot(&["list"]).ok();
    assert!(shown.contains(text), "{shown}");

    // The official tool writes the descriptor anew from what it knows of it, which is
    // what we write into it: nothing else survives there.
    let descriptor = fs::read_to_string(Path::new(&disk.path).join("DiskDescriptor.xml"));
    let descriptor = descriptor.unwrap();
    assert!(!descriptor.contains("upgrade"), "{descriptor}");
    // Through other changes of the tree, too.
    disk.snapshot(&["delete", &plain]).ok();
    assert_eq!(noted(guid).1.as_deref(), Some(text));
    disk.check();
    // What is gone is no more noted after the next one.
    disk.create();
    let notes = fs::read_to_string(Path::new(&disk.path).join("snapshots.json")).unwrap();
    assert!(notes.contains(guid) && !notes.contains(&plain), "{notes}");
}

#[test]
fn notes_that_are_damaged_lose_nothing() {
    let disk = Disk::new("2M");
    let guid = disk.snapshot(&["create", "--description", "x"]).ok();
    let notes = Path::new(&disk.path).join("snapshots.json");
    for damaged in ["{", "[1]", "\u{0}"] {
        fs::write(&notes, damaged).unwrap();
        let list = disk.snapshot(&["list"]).fails();
        assert!(
            list.contains("snapshots.json") && list.contains("move it away"),
            "{list}"
        );
        disk.snapshot(&["create"]).fails();
        assert_eq!(fs::read_to_string(&notes).unwrap(), damaged);
    }
    fs::remove_file(&notes).unwrap();
    assert_eq!(disk.list().len(), 2);
    // A text that somebody else put there does not reach the terminal as it is.
    let text = format!(
        "{{\"{}\": {{\"date\": \"2026-01-02T03:04:05Z\", \"description\": \"a\\u001b[2Jb\"}}}}",
        guid.trim()
    );
    fs::write(&notes, text).unwrap();
    let list = disk.snapshot(&["list"]).ok();
    assert!(
        list.contains("2026-01-0") && !list.contains('\u{1b}'),
        "{list:?}"
    );
    for text in ["", "two\nlines"] {
        let ran = disk.snapshot(&["create", "--description", text]);
        assert_eq!(ran.code, Some(1), "{ran:?}");
    }
}

#[test]
fn the_letters_of_qemu_img_work() {
    let disk = Disk::new("2M");
    let path = disk.path.as_str();
    let letters = |args: &[&str]| ploop_img([&["snapshot"], args, &[path]].concat());
    let first = letters(&["-c", "before upgrade"]).ok();
    let second = "{12345678-1234-1234-1234-123456789abc}";
    assert_eq!(letters(&["-c", second]).ok().trim(), second);
    assert_eq!(letters(&["-q", "-c", "twice"]).ok(), "");
    letters(&["-c", "twice"]).ok();
    let list = letters(&["-l"]).ok();
    assert_eq!(letters(&[]).ok(), list);
    assert_eq!(disk.snapshot(&["list"]).ok(), list);
    assert!(
        list.contains("before upgrade") && list.contains(second),
        "{list}"
    );
    assert!(
        letters(&["-d", "twice"])
            .fails()
            .contains("several snapshots")
    );
    assert!(
        letters(&["-a", "never"])
            .fails()
            .contains("no snapshot has")
    );
    assert_eq!(disk.list().len(), 5);
    letters(&["-f", "parallels", "-d", second]).ok();
    letters(&["-a", "before upgrade"]).ok();
    let list = disk.list();
    let top = list.iter().find(|shot| shot["current"] == true).unwrap();
    assert_eq!(top["parent"], first.trim());
    for wrong in [&["-l", "-d", "x"][..], &["-c"], &["-x"]] {
        let ran = letters(wrong);
        assert_eq!(ran.code, Some(1), "{ran:?}");
    }
    let ran = ploop_img(["snapshot"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
}
