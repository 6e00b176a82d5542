//! What becomes of files that others delete, replace, move and cut.

use std::fs::{self, File};
use std::path::Path;

use super::*;
use crate::storage::host::{Cache, HostFile};

fn shared(path: &Path) -> Arc<SharedFile> {
    let file = File::options().read(true).write(true).open(path);
    let host_file = HostFile {
        file: file.expect("open"),
        path: path.to_owned(),
        writable: true,
    };
    Arc::new(SharedFile::new(host_file, Cache::Writeback, None).expect("a shared file"))
}

/// A file, what happens to it, and what is found then.
fn after(change: impl FnOnce(&Path, &Path)) -> Option<Gone> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("served");
    fs::write(&path, [1; 100]).expect("write");
    let file = shared(&path);
    let watched = Watched::new(&file);
    assert_eq!(watched.gone(&file), None);
    change(&path, &folder.path().join("other"));
    watched.gone(&file)
}

#[test]
fn files_that_go_are_found_out() {
    assert_eq!(after(|_, _| ()), None);
    let deleted = after(|path, _| fs::remove_file(path).expect("remove"));
    assert_eq!(deleted, Some(Gone::Deleted));
    let replaced = after(|path, other| {
        fs::write(other, "another").expect("write");
        fs::rename(other, path).expect("rename");
    });
    assert_eq!(replaced, Some(Gone::Replaced));
    let moved = after(|path, other| fs::rename(path, other).expect("rename"));
    assert_eq!(moved, Some(Gone::Moved));
    let with_a_new_one = after(|path, other| {
        fs::rename(path, other).expect("rename");
        fs::write(path, "another").expect("write");
    });
    assert_eq!(with_a_new_one, Some(Gone::Moved));
    // A second name does no harm, and one that is a link is as good.
    assert_eq!(
        after(|path, other| fs::hard_link(path, other).expect("link")),
        None
    );
    let behind_a_link = after(|path, other| {
        fs::rename(path, other).expect("rename");
        std::os::unix::fs::symlink(other, path).expect("link");
    });
    assert_eq!(behind_a_link, None);
}

#[test]
fn a_path_that_never_led_to_the_file_tells_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("served");
    fs::write(&path, [1; 100]).expect("write");
    let file = shared(&path);
    fs::rename(&path, folder.path().join("other")).expect("rename");
    assert_eq!(Watched::new(&file).gone(&file), None);
}

#[test]
fn a_file_is_taken_to_be_cut_at_the_second_look() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("served");
    fs::write(&path, [1; 100]).expect("write");
    let file = shared(&path);
    let mut watched = Watched::new(&file);
    let cut_to = |len| {
        let opened = File::options().write(true).open(&path);
        opened.and_then(|opened| opened.set_len(len)).expect("cut");
    };
    // What it does to itself is no matter, nor that it grows.
    file.set_len(50).expect("cut");
    assert!(watched.look());
    cut_to(120);
    assert!(watched.look() && watched.look());
    assert!(!file.is_cut());
    // A server that was late.
    cut_to(60);
    assert!(watched.look());
    assert!(!file.is_cut());
    cut_to(120);
    assert!(watched.look());
    cut_to(110);
    assert!(watched.look());
    assert!(!file.is_cut());
    assert!(watched.look());
    assert!(file.is_cut());
    assert!(file.is_usable_up_to(110) && !file.is_usable_up_to(111));
    assert!(file.set_len(200).is_err() && file.extend_to(200).is_err());
    assert_eq!(fs::metadata(&path).expect("look").len(), 110);
    // It ends with the file.
    drop(file);
    assert!(!watched.look());
}

#[test]
fn a_file_that_was_made_longer_is_missed_at_its_new_end() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("served");
    fs::write(&path, [1; 100]).expect("write");
    let file = shared(&path);
    file.extend_to(200).expect("extend");
    assert!(file.reaches_beyond(199) && !file.reaches_beyond(200));
    assert!(!file.seems_cut());
    // It is still longer than it was at first.
    let by_others = File::options().write(true).open(&path).expect("open");
    by_others.set_len(150).expect("cut");
    assert!(file.seems_cut());
}

#[test]
fn the_descriptor_of_a_file_is_that_of_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("served");
    fs::write(&path, [1; 100]).expect("write");
    let file = shared(&path);
    let by_descriptor = fs::read_link(format!("/proc/self/fd/{}", file.raw_fd()));
    assert_eq!(by_descriptor.expect("it is open"), path);
}
