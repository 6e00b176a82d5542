//! Changes of bundles, killed at every step.

use std::collections::BTreeMap;
use std::fs;

use super::common::img::{names_in, ploop_img, ploop_img_command, run};
use super::disk::{CLUSTER, Disk, has_qemu};
use super::kill::{is_passing, kill_everywhere};

/// Runs a command, killed before each of its changes: the disk and the snapshots
/// that stay are what they were; a repair leaves nothing over.
fn kill(disk: &Disk, arguments: &[String], may_change_top: bool) {
    let copy = disk.folder.path().join("copy");
    let contents = |disk: &Disk| {
        let shots = disk.list();
        let shots = shots.iter().filter(|shot| shot["merging"] == false);
        let guids = shots.map(|shot| shot["guid"].as_str().unwrap().to_owned());
        let contents = guids.map(|guid| {
            let is_top = disk
                .list()
                .iter()
                .any(|s| s["guid"] == *guid && s["current"] == true);
            let content = disk.sha256(Some(&guid));
            (if is_top { "top".to_owned() } else { guid }, content)
        });
        contents.collect::<BTreeMap<_, _>>()
    };
    fs::rename(&disk.path, &copy).unwrap();
    let restore = || {
        let _ = fs::remove_dir_all(&disk.path);
        run("cp", ["-a", copy.to_str().unwrap(), &disk.path]).ok();
    };
    restore();
    let old = contents(disk);
    ploop_img(arguments).ok();
    let new = contents(disk);
    if !may_change_top {
        assert_eq!(old["top"], new["top"], "{arguments:?}");
    }
    let killed = kill_everywhere(
        || {
            restore();
            arguments.to_vec()
        },
        |step, ended| {
            let now = contents(disk);
            assert!(
                now == old || now == new,
                "{arguments:?}: step {step}: {now:?}"
            );
            assert!(!ended || now == new);
            ploop_img(["check", "--repair", "all", &disk.path]).ok();
            assert_eq!(
                contents(disk),
                now,
                "{arguments:?}: repair after step {step}"
            );
            disk.check();
            assert!(
                names_in(disk.path.as_ref())
                    .iter()
                    .all(|name| !is_passing(name))
            );
            assert!(disk.list().iter().all(|shot| shot["merging"] == false));
        },
    );
    assert!(killed.is_none_or(|killed| killed >= 5), "{killed:?}");
}

fn guid_of(disk: &Disk, index: usize) -> String {
    disk.list()[index]["guid"].as_str().unwrap().to_owned()
}

/// Two snapshots and a top, each with data of its own.
fn three_levels(disk: &Disk) {
    disk.write(3, 4, 1);
    disk.create();
    disk.write(5, 4, 2);
    disk.create();
    disk.write(0, 3, 3);
}

/// `snapshot` and what to do, on the disk, and the rest.
fn command(disk: &Disk, args: &[&str]) -> Vec<String> {
    let mut args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
    args.insert(2, disk.path.clone());
    args
}

/// A command with the disk at its end.
fn command_on(disk: &Disk, args: &[&str]) -> Vec<String> {
    let args = args.iter().copied().chain([disk.path.as_str()]);
    args.map(str::to_owned).collect()
}

#[test]
fn creating_can_be_cut_anywhere() {
    let Some(disk) = Disk::fixture("v2") else {
        return;
    };
    let guid = "{12345678-1234-1234-1234-123456789abc}";
    kill(
        &disk,
        &command(&disk, &["snapshot", "create", "--guid", guid]),
        false,
    );
}

#[test]
fn switching_can_be_cut_anywhere() {
    if has_qemu() {
        let disk = Disk::new("2M");
        three_levels(&disk);
        kill(
            &disk,
            &command(&disk, &["snapshot", "switch", &guid_of(&disk, 0)]),
            true,
        );
    }
}

#[test]
fn deleting_can_be_cut_anywhere() {
    if !has_qemu() {
        return;
    }
    let Some(mapped) = Disk::fixture("prealloc") else {
        return;
    };
    let Some(plain) = Disk::fixture("plain") else {
        return;
    };
    // A guest does not write to a plain image.
    plain.create();
    for (disk, index) in [(mapped, 0), (plain, 0), (Disk::new("2M"), 1)] {
        three_levels(&disk);
        kill(
            &disk,
            &command(&disk, &["snapshot", "delete", &guid_of(&disk, index)]),
            false,
        );
    }
}

#[test]
fn merging_can_be_cut_anywhere() {
    if !has_qemu() {
        return;
    }
    let Some(plain) = Disk::fixture("plain") else {
        return;
    };
    plain.create();
    three_levels(&plain);
    kill(&plain, &command(&plain, &["snapshot", "merge"]), false);

    let disk = Disk::new("2M");
    three_levels(&disk);
    kill(&disk, &command(&disk, &["snapshot", "merge"]), false);

    // A range with snapshots below and above it, one of which grew.
    let disk = Disk::new("2M");
    three_levels(&disk);
    disk.create();
    ploop_img(["resize", &disk.path, "+1M"]).ok();
    disk.write(33, 5, 4);
    disk.create();
    disk.write(6, 2, 5);
    let (from, to) = (guid_of(&disk, 1), guid_of(&disk, 3));
    let range = ["snapshot", "merge", "--from", &from, "--to", &to];
    kill(&disk, &command(&disk, &range), false);
}

#[test]
fn finishing_what_was_cut_can_be_cut_anywhere() {
    if !has_qemu() || !cfg!(debug_assertions) {
        return;
    }
    // In the first of the two copies, and in the second.
    for (step, left) in [(9, 2), (26, 1)] {
        let disk = Disk::new("2M");
        three_levels(&disk);
        let top = disk.sha256(None);
        let ran = ploop_img_command()
            .args(["snapshot", "merge", &disk.path])
            .env("PLOOP_IMG_KILL_AT", step.to_string())
            .output()
            .unwrap();
        assert_eq!(ran.status.code(), None, "{ran:?}");
        let list = disk.list();
        let merging = list.iter().filter(|shot| shot["merging"] == true);
        assert_eq!(merging.count(), left, "step {step}");
        assert_eq!(disk.sha256(None), top);
        kill(
            &disk,
            &command_on(&disk, &["check", "--repair", "leaks"]),
            false,
        );
    }
}

#[test]
fn deleting_a_leaf_can_be_cut_anywhere() {
    if has_qemu() {
        let disk = Disk::new("2M");
        three_levels(&disk);
        let leaf = disk.create();
        disk.snapshot(&["switch", &guid_of(&disk, 0)]).ok();
        kill(
            &disk,
            &command(&disk, &["snapshot", "delete", &leaf]),
            false,
        );
    }
}

#[test]
fn a_version_change_can_be_cut_anywhere() {
    if !has_qemu() {
        return;
    }
    let Some(disk) = Disk::fixture("prealloc") else {
        return;
    };
    three_levels(&disk);
    let copy = disk.folder.path().join("copy");
    fs::rename(&disk.path, &copy).unwrap();
    let restore = || {
        let _ = fs::remove_dir_all(&disk.path);
        run("cp", ["-a", copy.to_str().unwrap(), &disk.path]).ok();
    };
    restore();
    let content = disk.sha256(None);
    kill_everywhere(
        || {
            restore();
            ["convert", "--format-version", "1", &disk.path]
                .map(str::to_owned)
                .to_vec()
        },
        |step, _| {
            ploop_img(["check", "--repair", "all", &disk.path]).ok();
            assert_eq!(disk.sha256(None), content, "step {step}");
            disk.check();
        },
    );
}

#[test]
fn compacting_can_be_cut_anywhere() {
    if !has_qemu() {
        return;
    }
    let disk = Disk::new("2M");
    disk.write(0, 20, 7);
    disk.write(2, 3, 0);
    disk.write(9, 2, 0);
    let copy = disk.folder.path().join("copy");
    fs::rename(&disk.path, &copy).unwrap();
    let restore = || {
        let _ = fs::remove_dir_all(&disk.path);
        run("cp", ["-a", copy.to_str().unwrap(), &disk.path]).ok();
    };
    restore();
    let content = disk.sha256(None);
    let len = |disk: &Disk| fs::metadata(disk.top_file()).unwrap().len();
    let before = len(&disk);
    kill_everywhere(
        || {
            restore();
            ["compact", &disk.path].map(str::to_owned).to_vec()
        },
        |step, ended| {
            assert_eq!(disk.sha256(None), content, "step {step}");
            ploop_img(["check", "--repair", "all", &disk.path]).ok();
            assert_eq!(disk.sha256(None), content, "step {step}");
            disk.check();
            assert!(!ended || len(&disk) == before - 5 * CLUSTER as u64);
        },
    );
}
