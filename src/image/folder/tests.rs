use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;

fn folder() -> (tempfile::TempDir, Folder) {
    let place = tempfile::tempdir().expect("a folder");
    let folder = Folder::open(place.path()).expect("open");
    (place, folder)
}

#[test]
fn a_file_gets_its_name_where_renames_can_only_replace() {
    let (place, folder) = folder();
    let path = |name: &str| place.path().join(name);
    fs::write(path("new"), "new").expect("write");
    fs::write(path("taken"), "old").expect("write");
    let taken = rename_new_file(folder.file(), "new", OsStr::new("taken"));
    assert_eq!(taken, Err(Errno::EXIST));
    assert_eq!(fs::read(path("taken")).expect("read"), b"old");
    rename_new_file(folder.file(), "new", OsStr::new("free")).expect("rename");
    assert_eq!(fs::read(path("free")).expect("read"), b"new");
    assert!(!path("new").exists());
    assert_eq!(fs::metadata(path("free")).expect("look").nlink(), 1);
}

#[test]
fn a_folder_gets_its_name_where_renames_can_only_replace() {
    let (place, folder) = folder();
    let path = |name: &str| place.path().join(name);
    fs::create_dir(path("new")).expect("make");
    fs::write(path("new/image"), "new").expect("write");
    // Not even in place of an empty one.
    fs::create_dir(path("taken")).expect("make");
    let taken = rename_new_folder(folder.file(), "new", OsStr::new("taken"));
    assert_eq!(taken, Err(Errno::EXIST));
    rename_new_folder(folder.file(), "new", OsStr::new("free")).expect("rename");
    assert_eq!(fs::read(path("free/image")).expect("read"), b"new");
    assert!(!path("new").exists());
    // Nothing is left where it fails.
    assert!(rename_new_folder(folder.file(), "missing", OsStr::new("other")).is_err());
    assert!(!path("other").exists());
}

#[test]
fn a_file_that_has_lost_its_name_is_stale() {
    let (place, folder) = folder();
    let path = place.path().join("image");
    fs::write(&path, "old").expect("write");
    let name = rustix::path::Arg::into_c_str("image").expect("a name");
    let there = look_up(folder.file(), &name, OFlags::NOFOLLOW, &path).expect("there");
    open_again(there.as_fd(), true).expect("it has its name");
    fs::write(place.path().join("other"), "new").expect("write");
    fs::rename(place.path().join("other"), &path).expect("replace");
    let opened = open_again(there.as_fd(), false);
    assert_eq!(opened.map(|_| ()), Err(Errno::STALE));
    // Who opens it by its name finds the new one.
    let file = folder.open_image(Path::new("image"), false).expect("open");
    assert_eq!(std::io::read_to_string(file).expect("read"), "new");
}
