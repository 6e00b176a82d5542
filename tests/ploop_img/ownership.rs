//! Owner, group and mode of what is made: nobody gets to read what they could not.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::common::img::{Ran, names_in, ploop_img, ploop_img_command};
use super::common::left_out;
use super::disk::{Disk, has_qemu};
use super::kill::kill_everywhere;

const OWNER: u32 = 1234;
const GROUP: u32 = 1235;

fn is_root() -> bool {
    rustix::process::geteuid().is_root() || left_out("only root gives files away")
}

fn files(folder: &str) -> Vec<PathBuf> {
    let names = names_in(folder.as_ref()).into_iter();
    names.map(|name| Path::new(folder).join(name)).collect()
}

/// Owner, group and mode.
fn ownership(path: &Path) -> (u32, u32, u32) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.uid(), metadata.gid(), metadata.mode() & 0o777)
}

/// All files of the disk belong to a user, with this mode.
fn give_away(disk: &Disk, mode: u32) {
    for file in files(&disk.path) {
        fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
        chown(&file, Some(OWNER), Some(GROUP)).unwrap();
    }
}

#[track_caller]
fn all_are(disk: &str, mode: u32) {
    for file in files(disk) {
        assert_eq!(ownership(&file), (OWNER, GROUP, mode), "{}", file.display());
    }
}

#[test]
fn what_takes_the_place_of_a_file_keeps_its_owner_and_mode() {
    if !is_root() || !has_qemu() {
        return;
    }
    for mode in [0o600, 0o640, 0o664] {
        let disk = Disk::new("2M");
        disk.write(1, 3, 1);
        give_away(&disk, mode);
        let first = disk.create();
        all_are(&disk.path, mode);
        disk.write(2, 3, 2);
        disk.create();
        disk.snapshot(&["switch", &first]).ok();
        all_are(&disk.path, mode);
        for command in [
            &["resize", &disk.path, "3M"][..],
            &["compact", &disk.path],
            &["convert", "--format-version", "1", &disk.path],
            &["check", "--repair", "all", &disk.path],
            &["snapshot", "delete", &disk.path, &first],
            &["snapshot", "merge", &disk.path],
        ] {
            let ran = ploop_img(command);
            assert!(matches!(ran.code, Some(0 | 1)), "{ran:?}");
            all_are(&disk.path, mode);
        }
        // What is copied is nobody else's either.
        for name in ["copy", "copy.hds", "copy.raw"] {
            let copy = disk.folder.path().join(name);
            let copy = copy.to_str().unwrap();
            ploop_img(["convert", &disk.path, copy]).ok();
            match Path::new(copy).is_dir() {
                true => all_are(copy, mode),
                false => assert_eq!(ownership(copy.as_ref()), (OWNER, GROUP, mode), "{name}"),
            }
        }
    }
}

#[test]
fn what_is_new_is_for_its_maker_alone() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    ploop_img(["create", &path("a.hds"), "1M"]).ok();
    ploop_img(["create", &path("b"), "1M"]).ok();
    for name in ["a.hds", "b/root.hds", "b/DiskDescriptor.xml"] {
        let mode = fs::metadata(path(name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

/// Whatever a change leaves when it is killed, and so at each of its steps.
#[test]
fn at_no_moment_others_can_read_what_they_could_not() {
    if !is_root() || !has_qemu() {
        return;
    }
    let guid = "{12345678-1234-1234-1234-123456789abc}";
    for command in [
        &["snapshot", "create", "--guid", guid][..],
        &["snapshot", "merge"],
        &["convert", "--format-version", "1"],
        &["compact"],
    ] {
        let mut disk = None;
        let prepare = || {
            let disk = Disk::new("1M");
            disk.write(1, 3, 1);
            disk.create();
            disk.write(2, 3, 2);
            give_away(&disk, 0o600);
            disk
        };
        let disks = std::cell::RefCell::new(&mut disk);
        kill_everywhere(
            || {
                let fresh = prepare();
                let path = fresh.path.clone();
                **disks.borrow_mut() = Some(fresh);
                let args = command.iter().copied().chain([path.as_str()]);
                args.map(str::to_owned).collect()
            },
            |step, _| {
                let disk = disks.borrow();
                for file in files(&disk.as_ref().unwrap().path) {
                    let (uid, _, mode) = ownership(&file);
                    assert_eq!(mode & 0o077, 0, "{command:?}, {step}: {}", file.display());
                    assert!([0, OWNER].contains(&uid));
                }
            },
        );
    }
}

#[test]
fn a_group_that_cannot_be_kept_is_not_replaced_by_another() {
    if !is_root() {
        return;
    }
    let disk = Disk::new("1M");
    give_away(&disk, 0o640);
    for folder in [disk.folder.path(), disk.path.as_ref()] {
        fs::set_permissions(folder, Permissions::from_mode(0o777)).unwrap();
    }
    let mut command = ploop_img_command();
    command.args(["snapshot", "create", &disk.path]);
    // In no group but one that has nothing to do with the disk.
    let Ok(output) = command.uid(OWNER).gid(4321).output() else {
        let _ = left_out("another user cannot run programs from the build's folder");
        return;
    };
    Ran::from(output).ok();
    assert_eq!(ownership(&disk.top_file()), (OWNER, 4321, 0o600));
}
