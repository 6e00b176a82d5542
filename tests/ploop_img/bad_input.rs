//! Images that are none, or wrong: an orderly error, quickly, and nothing is
//! changed.

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;

use tempfile::TempDir;

use super::common::img::{Ran, image_file, ploop_img, ploop_img_command};
use super::common::terminal::Terminal;
use super::common::{left_out, require_tool};

/// Runs everything that opens an image; all of it must fail in an orderly way.
/// Gives back what `info` said.
#[track_caller]
fn all_refuse(disk: &Path, folder: &TempDir) -> String {
    let disk = disk.to_str().unwrap();
    let target = folder.path().join("never");
    let commands: [&[&str]; 6] = [
        &["check", disk],
        &["check", "--repair", "all", disk],
        &["map", disk],
        &["resize", disk, "+1G"],
        &["convert", "-f", "ploop", disk, target.to_str().unwrap()],
        &["info", disk],
    ];
    let mut error = String::new();
    for command in commands {
        error = ploop_img(command).fails();
        assert!(error.contains(disk), "{error}");
    }
    assert!(!target.exists());
    error
}

fn good_image(folder: &TempDir) -> std::path::PathBuf {
    let disk = folder.path().join("disk.hds");
    ploop_img([
        "create",
        "--cluster-size",
        "32k",
        disk.to_str().unwrap(),
        "1M",
    ])
    .ok();
    disk
}

#[test]
fn headers() {
    let word = |at: usize, word: u32| (at, word.to_le_bytes().to_vec());
    let long = |at: usize, long: u64| (at, long.to_le_bytes().to_vec());
    let cases = [
        ("signature", word(0, 0)),
        ("header type", word(16, 1)),
        ("cluster size of 0", word(28, 0)),
        ("cluster size of 65", word(28, 65)),
        ("cluster size", word(28, u32::MAX)),
        ("BAT entries", word(32, u32::MAX)),
        ("BAT entries", word(32, 0)),
        ("cut off", word(32, 0x1fff_ffff)),
        ("disk size of 0", long(36, 0)),
        ("disk size", long(36, u64::MAX)),
        ("BAT entries", long(36, 1 << 40)),
        ("in-use mark", word(44, 7)),
    ];
    let folder = TempDir::new().unwrap();
    for (what, (at, bytes)) in cases {
        let disk = good_image(&folder);
        let mut file = OpenOptions::new().write(true).open(&disk).unwrap();
        file.write_all_at(&bytes, at as u64).unwrap();
        if what == "cut off" {
            // So many entries need a first block that is as far away.
            file.write_all_at(&(1u32 << 23).to_le_bytes(), 48).unwrap();
        }
        let error = all_refuse(&disk, &folder);
        assert!(error.contains(what), "{what}: {error}");
        file = OpenOptions::new().read(true).open(&disk).unwrap();
        let mut there = vec![0; bytes.len()];
        file.read_exact_at(&mut there, at as u64).unwrap();
        assert_eq!(there, bytes, "{what}");
        fs::remove_file(&disk).unwrap();
    }
}

#[test]
fn truncated_files() {
    let folder = TempDir::new().unwrap();
    let disk = good_image(&folder);
    let whole = fs::read(&disk).unwrap();
    for len in [0, 1, 63, 64, 64 + 4 * 32 - 1] {
        fs::write(&disk, &whole[..len]).unwrap();
        let error = all_refuse(&disk, &folder);
        assert!(error.contains("cut off"), "{error}");
    }
    // The BAT is whole: nothing is lost.
    fs::write(&disk, &whole[..64 + 4 * 32]).unwrap();
    ploop_img([Path::new("check"), &disk]).ok();
}

#[test]
fn entries() {
    let folder = TempDir::new().unwrap();
    // Data is from cluster 1 to 2.
    for (entries, what) in [
        ([3, 0], "beyond the end"),
        ([u32::MAX, 0], "beyond the end"),
        ([1, 1], "another entry"),
    ] {
        let disk = good_image(&folder);
        let file = OpenOptions::new().write(true).open(&disk).unwrap();
        file.write_all_at(&[9; 2 << 15], 1 << 15).unwrap();
        for (index, entry) in (0..).zip(entries) {
            let entry: u32 = entry;
            file.write_all_at(&entry.to_le_bytes(), 64 + 4 * index)
                .unwrap();
        }
        let before = fs::read(&disk).unwrap();
        let arg = disk.to_str().unwrap();
        let target = folder.path().join("never");
        for command in [
            &["map", arg][..],
            &["resize", arg, "+1G"],
            &["convert", arg, target.to_str().unwrap()],
        ] {
            let error = ploop_img(command).fails();
            assert!(
                error.contains(what) && error.contains("--repair all"),
                "{error}"
            );
        }
        assert!(!target.exists());
        assert_eq!(ploop_img(["check", arg]).code, Some(2));
        assert!(fs::read(&disk).unwrap() == before);
        ploop_img(["check", "--repair", "all", arg]).ok();
        ploop_img(["convert", arg, target.to_str().unwrap()]).ok();
        fs::remove_dir_all(target).unwrap();
        fs::remove_file(disk).unwrap();
    }
}

#[test]
fn things_that_are_no_files() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let fifo = path("fifo");
    if require_tool("mkfifo") {
        super::common::img::run("mkfifo", [&fifo]).ok();
        let error = all_refuse(&fifo, &folder);
        assert!(error.contains("is a FIFO"), "{error}");
    }
    let _listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    let error = all_refuse(&path("socket"), &folder);
    assert!(error.contains("is a socket"), "{error}");
    let error = all_refuse(Path::new("/dev/zero"), &folder);
    assert!(error.contains("is a character device"), "{error}");
    let error = all_refuse(&path("nothing"), &folder);
    assert!(error.contains("No such file"), "{error}");
    fs::create_dir(path("folder")).unwrap();
    let error = all_refuse(&path("folder"), &folder);
    assert!(error.contains("DiskDescriptor.xml"), "{error}");
}

#[test]
fn no_permission() {
    const NOBODY: u32 = 65_534;
    let folder = TempDir::new().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let disk = good_image(&folder);
    fs::set_permissions(&disk, Permissions::from_mode(0o600)).unwrap();
    let mut command = ploop_img_command();
    command.arg("info").arg(&disk);
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    } else {
        fs::set_permissions(&disk, Permissions::from_mode(0o000)).unwrap();
    }
    let Ok(output) = command.output() else {
        let _ = left_out("nobody cannot run programs from the build's folder");
        return;
    };
    let error = Ran::from(output).fails();
    assert!(error.contains("Permission denied"), "{error}");
}

/// A bundle whose descriptor is changed by `edit`.
fn bundle(folder: &TempDir, edit: impl FnOnce(String) -> String) -> std::path::PathBuf {
    let disk = folder.path().join("bundle");
    let _ = fs::remove_dir_all(&disk);
    ploop_img(["create", disk.to_str().unwrap(), "2M"]).ok();
    let descriptor = disk.join("DiskDescriptor.xml");
    let text = fs::read_to_string(&descriptor).unwrap();
    fs::write(&descriptor, edit(text)).unwrap();
    disk
}

#[test]
fn descriptors() {
    let folder = TempDir::new().unwrap();
    let error_of = |edit: &dyn Fn(String) -> String| all_refuse(&bundle(&folder, edit), &folder);
    let error = error_of(&|_| String::new());
    assert!(error.contains("not well-formed"), "{error}");
    let error = error_of(&|_| "x".repeat(2 << 20));
    assert!(error.contains("longer than"), "{error}");
    let error = error_of(&|text| text.replace("root.hds", "../disk.hds"));
    assert!(error.contains("not a path inside"), "{error}");
    let error = error_of(&|text| text.replace("root.hds", "/etc/passwd"));
    assert!(error.contains("not a path inside"), "{error}");
    let error = error_of(&|text| text.replace("root.hds", "missing.hds"));
    assert!(error.contains("No such file"), "{error}");
    let error = error_of(&|text| text.replace("root.hds", "DiskDescriptor.xml"));
    assert!(error.contains("signature"), "{error}");
    let error = error_of(&|text| text.replace("<Blocksize>2048<", "<Blocksize>128<"));
    assert!(error.contains("cluster size"), "{error}");
    let error = error_of(&|text| text.replace("Compressed", "Plain"));
    assert!(
        error.is_empty() || error.contains("takes") || error.contains("long"),
        "{error}"
    );
}

#[test]
fn links_out_of_a_bundle() {
    let folder = TempDir::new().unwrap();
    let disk = bundle(&folder, |text| text);
    fs::rename(image_file(&disk), folder.path().join("outside.hds")).unwrap();
    symlink("../outside.hds", disk.join("root.hds")).unwrap();
    let error = all_refuse(&disk, &folder);
    assert!(error.contains("is a symbolic link"), "{error}");

    let disk = bundle(&folder, |text| text.replace("root.hds", "sub/outside.hds"));
    symlink("..", disk.join("sub")).unwrap();
    let error = all_refuse(&disk, &folder);
    assert!(error.contains("cannot open"), "{error}");

    // The way to the bundle itself may well be a link.
    let disk = bundle(&folder, |text| text);
    symlink(&disk, folder.path().join("link")).unwrap();
    ploop_img([Path::new("check"), &folder.path().join("link")]).ok();
}

/// What a terminal obeys, and what forges lines of a log.
#[test]
fn names_do_not_reach_a_terminal_raw() {
    let folder = TempDir::new().unwrap();
    let nasty = "a\u{1b}]0;owned\u{7}\n\u{9b}31m\u{202e}.hds";
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    #[track_caller]
    fn check(args: &[&str], code: i32) -> String {
        let ran = ploop_img(args);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        let said = ran.stdout + &ran.stderr;
        let is_bad = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(!said.contains(is_bad), "{said:?}");
        assert!(said.lines().all(|line| !line.starts_with("31m")), "{said}");
        said
    }
    let bare = path(nasty);
    let said = check(&["info", &bare], 1);
    assert!(said.contains(r"a\u{1b}]0;owned\u{7}\n\u{9b}31m"), "{said}");
    check(&["create", &bare, "1M"], 0);
    for command in ["info", "map", "check"] {
        check(&[command, &bare], 0);
        let said = check(&[command, "--output", "json", &bare], 0);
        let json: serde_json::Value = serde_json::from_str(&said).unwrap();
        let entry = json.get(0).unwrap_or(&json);
        assert!(entry["filename"] == *bare || command == "map", "{said}");
    }
    check(&["resize", &bare, nasty], 1);
    check(&[nasty], 1);
    // On a terminal, too, where messages have colours of their own.
    for name in [nasty, "b\u{1b}[31m\u{1b}]0;owned\u{7}"] {
        let (terminal, line) = Terminal::new(100, 24);
        let mut command = ploop_img_command();
        let output = command.args(["info", name, name]).stderr(line).output();
        drop(command);
        assert_eq!(output.unwrap().status.code(), Some(1));
        let said = terminal.end();
        let is_bad = |c: char| !"\r\n".contains(c) && c.is_control();
        assert!(!said.contains(is_bad), "{said:?}");
        assert!(said.contains(r"\u{1b}]0;owned\u{7}"), "{said:?}");
    }

    let disk = bundle(&folder, |text| text.replace("root.hds", nasty));
    fs::rename(disk.join("root.hds"), disk.join(nasty)).unwrap();
    let disk = disk.to_str().unwrap();
    check(&["snapshot", "list", disk], 0);
    check(&["check", disk], 0);
    for text in ["<Disk_size>&#27;[2J&#155;</Disk_size>", "<a\u{1b}\u{9b}>"] {
        let disk = bundle(&folder, |_| {
            format!("<Parallels_disk_image>{text}</Parallels_disk_image>")
        });
        check(&["info", disk.to_str().unwrap()], 1);
    }
}
