//! `convert`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

use super::common::img::{
    image_file, names_in, ploop_img, ploop_img_command, qemu_img_check, qemu_img_compare, run,
};
use super::common::{left_out, require_tool};

/// A raw disk of `size` bytes with `pieces` pieces of random data in it.
fn raw_disk(path: &Path, size: u64, pieces: u32, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for _ in 0..pieces {
        let mut data = vec![0; rng.random_range(1..100_000)];
        rng.fill(&mut data[..]);
        let at = rng.random_range(0..size - data.len() as u64);
        file.write_all_at(&data, at).unwrap();
    }
}

fn same(a: &Path, b: &Path) {
    assert!(
        fs::read(a).unwrap() == fs::read(b).unwrap(),
        "{a:?} and {b:?} differ"
    );
}

#[test]
fn there_and_back_with_every_cluster_size() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let raw = path("disk.raw");
    raw_disk(&raw, 128 << 20, 30, 1);
    for cluster in ["32k", "64k", "1M", "8M", "64M"] {
        for name in ["out.hds", "out"] {
            let out = path(name);
            let args = [raw.to_str().unwrap(), out.to_str().unwrap()];
            ploop_img(["convert", "--cluster-size", cluster, args[0], args[1]]).ok();
            ploop_img(["check", args[1]]).ok();
            let back = path("back.raw");
            ploop_img(["convert", args[1], back.to_str().unwrap()]).ok();
            same(&raw, &back);
            if require_tool("qemu-img") {
                qemu_img_check(&image_file(&out));
                qemu_img_compare(&raw, &image_file(&out));
            }
            fs::remove_file(&back).unwrap();
            fs::remove_file(image_file(&out)).unwrap();
            let _ = fs::remove_dir_all(&out);
        }
    }
}

#[test]
fn sizes_that_are_no_multiple_of_anything() {
    let folder = TempDir::new().unwrap();
    for (index, size) in [1u64, 511, 512, 4097, (1 << 20) + 1, (4 << 20) + 512]
        .into_iter()
        .enumerate()
    {
        let path = |name: &str| folder.path().join(format!("{index}{name}"));
        let raw = path("disk.raw");
        fs::write(&raw, vec![0xA5; size as usize]).unwrap();
        let (image, back) = (path("disk.hds"), path("back.raw"));
        ploop_img([Path::new("convert"), &raw, &image]).ok();
        ploop_img([Path::new("convert"), &image, &back]).ok();
        // A disk that is made consists of clusters.
        let mut expected = fs::read(&raw).unwrap();
        expected.resize(size.next_multiple_of(1 << 20) as usize, 0);
        assert!(fs::read(&back).unwrap() == expected, "{size}");
    }
}

#[test]
fn zeros_take_no_space() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let raw = path("disk.raw");
    // Written, all zeros but for one block in the middle.
    let mut content = vec![0; 16 << 20];
    content[5 << 20] = 1;
    fs::write(&raw, content).unwrap();
    ploop_img([Path::new("convert"), &raw, &path("disk.hds")]).ok();
    // Header, BAT and one cluster, of which one block is there.
    let image = fs::metadata(path("disk.hds")).unwrap();
    assert_eq!(image.len(), 2 << 20);
    assert!(image.blocks() * 512 <= 128 << 10, "{}", image.blocks());
    ploop_img([Path::new("convert"), &path("disk.hds"), &path("back.raw")]).ok();
    let back = fs::metadata(path("back.raw")).unwrap();
    assert!(back.blocks() * 512 <= 128 << 10, "{}", back.blocks());
    same(&raw, &path("back.raw"));
}

#[test]
fn images_of_qemu_are_read() {
    if !require_tool("qemu-img") || !require_tool("qemu-io") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let image = path("qemu.hds");
    run(
        "qemu-img",
        [
            "create",
            "-q",
            "-f",
            "parallels",
            "-o",
            "cluster_size=65536",
            &image,
            "100M",
        ],
    )
    .ok();
    for command in [
        "write -P 1 0 1M",
        "write -P 2 50M 3M",
        "discard 51M 1M",
        "write -P 3 104857088 512",
    ] {
        run("qemu-io", ["-f", "parallels", "-c", command, &image]).ok();
    }
    ploop_img(["check", &image]).ok();
    ploop_img(["convert", &image, &path("out.raw")]).ok();
    qemu_img_compare(&PathBuf::from(path("out.raw")), &PathBuf::from(&image));
}

#[test]
fn what_is_there_stays() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("a.raw"), [1; 4096]).unwrap();
    fs::write(path("b.raw"), "precious").unwrap();
    let error = ploop_img(["convert", &path("a.raw"), &path("b.raw")]).fails();
    assert!(error.contains("already exists"), "{error}");
    assert_eq!(fs::read(path("b.raw")).unwrap(), b"precious");
    ploop_img(["convert", &path("a.raw"), &path("a.raw")]).fails();
}

#[test]
fn a_guess_is_never_one_that_a_guest_could_have_planted() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    ploop_img(["create", &path("real.hds"), "1M"]).ok();
    fs::copy(path("real.hds"), path("disk.raw")).unwrap();
    let error = ploop_img(["convert", &path("disk.raw"), &path("x")]).fails();
    assert!(error.contains("-f ploop or -f raw"), "{error}");
    ploop_img(["convert", "-f", "raw", &path("disk.raw"), &path("x.raw")]).ok();
    same(Path::new(&path("disk.raw")), Path::new(&path("x.raw")));
    ploop_img(["convert", "-f", "ploop", &path("disk.raw"), &path("y.raw")]).ok();
    assert_eq!(fs::metadata(path("y.raw")).unwrap().len(), 1 << 20);

    fs::write(path("other.img"), b"QFI\xfb and more").unwrap();
    let error = ploop_img(["convert", &path("other.img"), &path("z")]).fails();
    assert!(error.contains("qcow2"), "{error}");
    assert!(!Path::new(&path("x")).exists() && !Path::new(&path("z")).exists());
}

#[test]
fn the_target_format_goes_by_name_or_is_given() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("a.raw"), [1; 4096]).unwrap();
    ploop_img(["convert", &path("a.raw"), &path("b.img")]).ok();
    assert_eq!(fs::read(path("b.img")).unwrap(), [1; 4096]);
    ploop_img(["convert", &path("a.raw"), &path("B.RAW")]).ok();
    assert_eq!(fs::read(path("B.RAW")).unwrap(), [1; 4096]);
    ploop_img(["convert", "-O", "raw", &path("a.raw"), &path("c")]).ok();
    assert_eq!(fs::read(path("c")).unwrap(), [1; 4096]);
    ploop_img(["convert", "-O", "ploop", &path("a.raw"), &path("d.img")]).ok();
    assert_eq!(
        names_in(Path::new(&path("d.img"))),
        ["DiskDescriptor.xml", "root.hds"]
    );
    fs::write(path("empty.raw"), "").unwrap();
    let error = ploop_img(["convert", &path("empty.raw"), &path("e")]).fails();
    assert!(error.contains("empty"), "{error}");
}

#[test]
fn a_name_of_another_format_needs_to_be_meant() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("a.raw"), [1; 4096]).unwrap();
    for suffix in [
        "qcow2", "qcow", "vmdk", "vdi", "vhd", "vhdx", "qed", "QCOW2",
    ] {
        let target = path(&format!("out.{suffix}"));
        let error = ploop_img(["convert", &path("a.raw"), &target]).fails();
        let name = format!("a {} image", suffix.to_lowercase());
        assert!(error.contains(&name), "{error}");
        assert!(error.contains("-O raw or -O ploop"), "{error}");
        assert_eq!(names_in(folder.path()), ["a.raw"]);
    }
    let target = path("out.qcow2");
    ploop_img(["convert", "-O", "raw", &path("a.raw"), &target]).ok();
    assert_eq!(fs::read(&target).unwrap(), [1; 4096]);
    fs::remove_file(&target).unwrap();
    ploop_img(["convert", "-O", "ploop", &path("a.raw"), &target]).ok();
    ploop_img(["check", &target]).ok();
    // A format that nobody has a name for.
    ploop_img(["convert", &path("a.raw"), &path("out.v2")]).ok();
    ploop_img(["check", &path("out.v2")]).ok();
}

#[test]
fn an_interrupted_conversion_leaves_nothing_behind() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    // Long enough to be caught at work.
    fs::write(path("a.raw"), vec![7; 400 << 20]).unwrap();
    for target in ["out", "out.hds", "out.raw"] {
        let mut child = ploop_img_command()
            .args(["convert", &path("a.raw"), &path(target)])
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(60));
        let pid = rustix::process::Pid::from_child(&child);
        let interrupted = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let deadline = Instant::now() + Duration::from_secs(20);
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = child.wait_with_output().unwrap();
        if interrupted.is_err() || output.status.success() {
            let _ = left_out("this machine converts faster than it interrupts");
            return;
        }
        assert_eq!(output.status.code(), Some(1));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("interrupted"), "{error}");
        assert_eq!(names_in(folder.path()), ["a.raw"]);
    }
}

#[test]
fn no_space_leaves_nothing_behind() {
    let folder = TempDir::new().unwrap();
    let raw = folder.path().join("a.raw");
    fs::write(&raw, vec![7; 8 << 20]).unwrap();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    // In a mount namespace of its own, gone with the shell.
    let script = format!(
        "mount -t tmpfs -o size=4m none {small} || exit 99
         for target in out out.hds out.raw; do
             {exe} convert {raw} {small}/$target && exit 98
         done
         ls -A {small}",
        small = small.display(),
        raw = raw.display(),
        exe = env!("CARGO_BIN_EXE_ploop-img"),
    );
    if !require_tool("unshare") {
        return;
    }
    let ran = run(
        "unshare",
        ["--user", "--map-root-user", "--mount", "sh", "-c", &script],
    );
    let ran = match ran.code {
        Some(0) => ran,
        // Where users have no namespaces, root may have.
        _ => run("unshare", ["--mount", "sh", "-c", &script]),
    };
    if ran.code == Some(99) || ran.stderr.contains("unshare") {
        let _ = left_out("no file system can be mounted here");
        return;
    }
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{ran:?}");
    assert_eq!(ran.stderr.matches("No space left").count(), 3, "{ran:?}");
}
