//! `ploop-img` killed before each change that it makes to a file or folder. Debug
//! builds count these changes, and die where they are told to.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::common::fixtures::fixture;
use super::common::img::{names_in, ploop_img, ploop_img_command, sha256};
use super::common::left_out;
use super::disk::CLUSTER;

/// Runs a command as often as it makes changes, and kills it before each of them.
/// `prepare` gives the arguments, `check` sees what is left, and whether the
/// command came to its end. Returns how often it was killed.
pub fn kill_everywhere(
    prepare: impl Fn() -> Vec<String>,
    mut check: impl FnMut(u64, bool),
) -> Option<u64> {
    if !cfg!(debug_assertions) {
        let _ = left_out("only debug builds die where they are told to");
        return None;
    }
    for step in 1.. {
        let output = ploop_img_command()
            .args(prepare())
            .env("PLOOP_IMG_KILL_AT", step.to_string())
            .output()
            .unwrap();
        let ended = output.status.success();
        assert!(ended || output.status.code().is_none(), "{output:?}");
        check(step, ended);
        if ended {
            return Some(step - 1);
        }
    }
    unreachable!("a command makes finitely many changes")
}

/// Passing names begin with this.
pub fn is_passing(name: &str) -> bool {
    name.starts_with(".ploop-img-")
}

#[test]
fn create_and_convert_never_leave_half_a_disk() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let mut content = [[1; 40 << 10], [0; 40 << 10], [2; 40 << 10]].concat();
    content.resize(1 << 20, 0);
    fs::write(path("a.raw"), content).unwrap();
    let commands: [&[&str]; 5] = [
        &["create", &path("out"), "1M"],
        &["create", &path("out.hds"), "1M"],
        &[
            "convert",
            &path("a.raw"),
            &path("out"),
            "--cluster-size",
            "32k",
        ],
        &["convert", &path("a.raw"), &path("out.hds")],
        &["convert", &path("a.raw"), &path("out.raw")],
    ];
    for command in commands {
        let target = Path::new(command.iter().find(|arg| arg.contains("/out")).unwrap());
        let clean_up = || {
            for name in names_in(folder.path())
                .iter()
                .filter(|name| *name != "a.raw")
            {
                let path = folder.path().join(name);
                fs::remove_dir_all(&path)
                    .or_else(|_| fs::remove_file(&path))
                    .unwrap();
            }
        };
        let killed = kill_everywhere(
            || {
                clean_up();
                command.iter().map(|arg| (*arg).to_owned()).collect()
            },
            |step, ended| {
                let strangers = names_in(folder.path());
                let mut strangers = strangers
                    .iter()
                    .filter(|name| *name != "a.raw" && !name.starts_with("out"));
                assert!(strangers.clone().all(|name| is_passing(name)), "{step}");
                assert!(!ended || strangers.next().is_none(), "{step}");
                // Under the final name there is all or nothing.
                assert!(!ended || target.exists());
                if target.extension().is_some_and(|e| e == "raw") && target.exists() {
                    let content = fs::read(target).unwrap();
                    assert!(content == fs::read(path("a.raw")).unwrap());
                } else if target.exists() {
                    ploop_img(["check".as_ref(), target.as_os_str()]).ok();
                    if command[0] == "convert" {
                        let _ = fs::remove_file(path("b.raw"));
                        ploop_img(["convert", target.to_str().unwrap(), &path("b.raw")]).ok();
                        assert_eq!(
                            sha256(path("b.raw").as_ref()),
                            sha256(path("a.raw").as_ref())
                        );
                    }
                }
            },
        );
        assert!(
            killed.is_none_or(|killed| killed >= 4),
            "{command:?}: {killed:?}"
        );
        clean_up();
    }
}

#[test]
fn a_resize_leaves_the_old_or_the_new_size() {
    for name in ["v1", "v2", "plain"] {
        let fixture = fixture(name);
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        if fixture.unpack(folder.path()).is_none() {
            return;
        }
        let (disk, raw) = (path(name), path("out.raw"));
        let (mut old, mut new) = (0, 0);
        kill_everywhere(
            || {
                fs::remove_dir_all(&disk).unwrap();
                fixture.unpack(folder.path()).unwrap();
                ["resize", &disk, "1G"].map(str::to_owned).to_vec()
            },
            |step, ended| {
                // Where it was cut in the middle, it says that it was.
                let found = ploop_img(["check", &disk]);
                assert!(matches!(found.code, Some(0 | 2 | 3)), "{step}: {found:?}");
                ploop_img(["check", "--repair", "all", &disk]).ok();
                ploop_img(["check", &disk]).ok();
                ploop_img(["convert", &disk, &raw]).ok();
                let file = fs::OpenOptions::new().write(true).open(&raw).unwrap();
                match file.metadata().unwrap().len() {
                    size if size == fixture.size && !ended => old += 1,
                    size if size == 1 << 30 => new += 1,
                    size => panic!("{step}: {size}"),
                }
                file.set_len(fixture.size).unwrap();
                assert_eq!(sha256(raw.as_ref()), fixture.sha256, "{name}, step {step}");
                fs::remove_file(&raw).unwrap();
                let strays = names_in(disk.as_ref());
                assert!(strays.iter().all(|n| !is_passing(n)), "{step}: {strays:?}");
            },
        );
        assert!(old > 1 && new > 1, "{name}: {old} old, {new} new");
    }
}

#[test]
fn shrinking_leaves_the_old_or_the_new_disk() {
    for name in ["v2", "plain"] {
        let fixture = fixture(name);
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        if fixture.unpack(folder.path()).is_none() {
            return;
        }
        let (disk, raw) = (path(name), path("out.raw"));
        let read = || {
            ploop_img(["convert", &disk, &raw]).ok();
            let content = fs::read(&raw).unwrap();
            fs::remove_file(&raw).unwrap();
            content
        };
        let content = read();
        // Something is given up.
        let last = content.iter().rposition(|byte| *byte != 0).unwrap();
        let less = last / CLUSTER * CLUSTER;
        let (mut old, mut new) = (0, 0);
        kill_everywhere(
            || {
                fs::remove_dir_all(&disk).unwrap();
                fixture.unpack(folder.path()).unwrap();
                let args = ["resize", "--shrink", &disk, &less.to_string()];
                args.map(str::to_owned).to_vec()
            },
            |step, ended| {
                let found = ploop_img(["check", &disk]);
                assert!(matches!(found.code, Some(0 | 2 | 3)), "{step}: {found:?}");
                ploop_img(["check", "--repair", "all", &disk]).ok();
                ploop_img(["check", &disk]).ok();
                let now = read();
                match now.len() {
                    len if len == content.len() && !ended => old += 1,
                    len if len == less => new += 1,
                    len => panic!("{step}: {len}"),
                }
                assert!(now[..] == content[..now.len()], "{name}, step {step}");
                // Nothing of what was given up comes back.
                ploop_img(["resize", &disk, &content.len().to_string()]).ok();
                if now.len() == less {
                    assert!(read()[less..].iter().all(|byte| *byte == 0), "{step}");
                }
            },
        );
        assert!(old > 1 && new > 1, "{name}: {old} old, {new} new");
    }
}

#[test]
fn converting_into_a_disk_leaves_an_image_that_can_be_repaired() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (old, source, disk) = (path("old.raw"), path("source.raw"), path("disk.hds"));
    // Each cluster of the target is overwritten, dropped, allocated or kept.
    let old_content = [[1; 65536], [2; 65536], [0; 65536], [3; 65536]].concat();
    fs::write(&old, &old_content).unwrap();
    let source_content = [[4; 65536], [0; 65536], [5; 65536]].concat();
    fs::write(&source, &source_content).unwrap();
    let killed = kill_everywhere(
        || {
            let _ = fs::remove_file(&disk);
            ploop_img(["convert", "-o", "cluster_size=64k", &old, &disk]).ok();
            let args = ["convert", "-n", &source, &disk];
            args.map(str::to_owned).to_vec()
        },
        |step, ended| {
            ploop_img(["check", "--repair", "all", &disk]).ok();
            ploop_img(["check", &disk]).ok();
            let back = path("back.raw");
            ploop_img(["convert", &disk, &back]).ok();
            let now = fs::read(&back).unwrap();
            fs::remove_file(&back).unwrap();
            for (index, cluster) in now.chunks(65536).enumerate() {
                let range = index * 65536..(index + 1) * 65536;
                let is_old = *cluster == old_content[range.clone()];
                let is_new = source_content.get(range).is_some_and(|new| cluster == new);
                let is_kept = index == 3;
                assert!(is_new || is_old && (!ended || is_kept), "{step}: {index}");
            }
        },
    );
    assert!(killed.is_none_or(|killed| killed >= 8), "{killed:?}");
}
