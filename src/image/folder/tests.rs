use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::storage::one_file_fs::{Answers, OneFileFs};

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
fn what_leads_out_of_the_folder_or_is_no_file_is_not_opened() {
    let (place, folder) = folder();
    let path = |name: &str| place.path().join(name);
    fs::create_dir(path("inside")).expect("make");
    fs::write(path("inside/image"), "yes").expect("write");
    std::os::unix::fs::symlink("inside", path("link")).expect("link");
    std::os::unix::fs::symlink("inside/image", path("linked")).expect("link");
    let mode = Mode::from_raw_mode(0o600);
    for fifo in ["fifo", "inside/fifo"] {
        let kind = FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, path(fifo), kind, mode, 0).expect("make");
    }
    let open = |name: &str| folder.open_image(Path::new(name), false);
    let file = open("inside/image").expect("open");
    assert_eq!(std::io::read_to_string(file).expect("read"), "yes");
    // A FIFO would be waited for if it were opened.
    for name in [
        "link/image",
        "linked",
        "inside/../inside/image",
        "/etc/passwd",
        "fifo",
        "fifo/image",
        "inside/fifo",
        "inside",
        "missing",
        "",
    ] {
        assert!(open(name).is_err(), "{name}");
    }
    let read_only = open("inside/image").expect("open");
    assert!(std::io::Write::write(&mut &read_only, b"no").is_err());
    let writable = folder
        .open_image(Path::new("inside/image"), true)
        .expect("open");
    std::io::Write::write_all(&mut &writable, b"YES").expect("write");
    assert_eq!(fs::read(path("inside/image")).expect("read"), b"YES");
}

#[test]
fn a_file_appears_whole_or_not_at_all() {
    use crate::image::file::ImageFile;
    let (place, folder) = folder();
    let path = |name: &str| place.path().join(name);
    let names = || folder.names().expect("list").len();
    // Also where all files have names.
    for has_passing_name in [false, true] {
        let make = || {
            let mut file = folder.new_file(OsStr::new("image")).expect("make");
            if has_passing_name {
                let name = temporary_name();
                fs::write(path(&name), "").expect("write");
                let named = File::options().read(true).write(true).open(path(&name));
                file.image = HostImage::new(named.expect("open"), path("image"));
                file.passing = Some(name);
            }
            file.image().write_all_at(b"whole", 0).expect("write");
            file
        };
        drop(make());
        assert_eq!(names(), 0, "it is gone");
        make().publish().expect("publish");
        assert_eq!(fs::read(path("image")).expect("read"), b"whole");
        assert!(matches!(make().publish(), Err(ImageError::Exists(_))));
        assert_eq!(names(), 1);
        folder.remove(Path::new("image")).expect("remove");
        assert!(!folder.contains(Path::new("image")).expect("look"));
        folder
            .remove(Path::new("image"))
            .expect("it need not be there");
    }
}

#[test]
fn a_folder_appears_whole_or_not_at_all() {
    let (place, folder) = folder();
    let new_folder = || {
        let new = folder.new_folder().expect("make");
        fs::write(new.inside().path().join("image"), "whole").expect("write");
        new
    };
    drop(new_folder());
    assert_eq!(folder.names().expect("list"), []);
    new_folder().publish(OsStr::new("disk")).expect("publish");
    assert_eq!(
        fs::read(place.path().join("disk/image")).expect("read"),
        b"whole"
    );
    let again = new_folder().publish(OsStr::new("disk"));
    assert!(matches!(again, Err(ImageError::Exists(_))));
    assert_eq!(folder.names().expect("list").len(), 1);
}

#[test]
fn content_is_replaced_in_one_step_and_its_mode_stays() {
    use std::os::unix::fs::PermissionsExt;
    let (place, folder) = folder();
    let path = place.path().join("text");
    folder.replace("text", b"first", None).expect("put");
    let mode = || fs::metadata(&path).expect("look").permissions().mode() & 0o777;
    assert_eq!(mode() & 0o077, 0, "it is for its maker alone");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("change");
    let old = fs::File::open(&path).expect("open");
    folder.replace("text", b"second", None).expect("put");
    assert_eq!(fs::read(&path).expect("read"), b"second");
    assert_eq!(mode(), 0o640);
    // Who has the old one open goes on reading that.
    assert_eq!(std::io::read_to_string(old).expect("read"), "first");
    assert_eq!(folder.names().expect("list").len(), 1);
}

#[test]
fn a_sync_that_the_kernel_refuses_is_no_success() {
    // The kernel's own folders cannot be synced.
    let folder = Folder::open(Path::new("/proc")).expect("open");
    assert!(folder.sync().is_err(), "it was never asked");
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

/// What a client of a network file system says from what it remembers is not enough.
#[test]
fn a_file_that_its_server_has_no_more_is_stale() {
    use fuser::Errno as Said;
    let Some(served) = OneFileFs::mount() else {
        return;
    };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let there = rustix::fs::open(served.path(), flags, Mode::empty()).expect("there");
    let open = |answers| {
        served.answer(answers);
        open_again(there.as_fd(), false).map(|_| ())
    };
    let usual = Answers::default();
    let directly = |error| Answers {
        direct_open: Some(error),
        ..usual
    };
    let look = |error| Answers {
        look: Some(error),
        ..usual
    };
    assert_eq!(open(usual), Ok(()));
    for said in [Said::ESTALE, Said::ENOENT] {
        assert_eq!(open(directly(said)), Err(Errno::STALE));
        assert_eq!(open(look(said)), Err(Errno::STALE));
    }
    // This has nothing to do with its name.
    for said in [Said::EINVAL, Said::EIO] {
        assert_eq!(open(directly(said)), Ok(()));
    }
    assert_eq!(open(look(Said::EIO)), Ok(()));
    let is_nameless = true;
    let nameless = Answers {
        is_nameless,
        ..usual
    };
    assert_eq!(open(nameless), Err(Errno::STALE));
}

/// A client of a network file system knows its new file a little later.
#[test]
fn a_name_that_leads_to_a_stale_file_is_tried_again_for_a_while() {
    let Some(served) = OneFileFs::mount() else {
        return;
    };
    let path = served.path();
    let open = || open_regular(rustix::fs::CWD, &path, OFlags::empty(), false, &path);
    let is_nameless = true;
    served.answer(Answers {
        is_nameless,
        ..Answers::default()
    });
    let opened = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(4 * STALE_NAME_PAUSE);
            served.answer(Answers::default());
        });
        open()
    });
    opened.expect("it is there by now");
    // Anything else is no matter of time.
    served.answer(Answers {
        open: Some(fuser::Errno::EIO),
        ..Answers::default()
    });
    let start = Instant::now();
    open().expect_err("it cannot be opened");
    assert!(start.elapsed() < STALE_NAME_PATIENCE);
}

#[test]
fn what_is_opened_here_no_other_program_gets() {
    let (place, folder) = folder();
    fs::write(place.path().join("image"), "x").expect("write");
    let image = folder.open_image(Path::new("image"), true).expect("open");
    let new = folder.new_file(OsStr::new("new")).expect("make");
    for file in [folder.file(), &image, new.image().file()] {
        let flags = rustix::io::fcntl_getfd(file).expect("flags");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
    // And a file is no folder.
    assert!(Folder::open(&place.path().join("image")).is_err());
}
