//! What users of `qemu-img` expect, with the real one as the judge.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::common::img::{Ran, image_file, ploop_img, ploop_img_command, qemu_img_check, run};
use super::common::{left_out, require_tool};
use super::disk::{CLUSTER, Disk, has_qemu};

/// A folder of raw, bare and QEMU-made images of one content.
struct Files(TempDir);

impl Files {
    /// `a.raw`, sparse, with 3 MiB of data at 1 MiB and some at its end; `a.hds`.
    fn new() -> Self {
        let files = Self(TempDir::new().unwrap());
        let raw = File::create(files.path("a.raw")).unwrap();
        raw.set_len(16 << 20).unwrap();
        raw.write_all_at(&vec![7; 3 << 20], 1 << 20).unwrap();
        raw.write_all_at(&[9; 512], (16 << 20) - 512).unwrap();
        ploop_img(["convert", &files.path("a.raw"), &files.path("a.hds")]).ok();
        files
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// A copy of `from` with `bytes` at `offset`.
    fn changed(&self, from: &str, name: &str, bytes: &[u8], offset: u64) -> String {
        fs::copy(self.path(from), self.path(name)).unwrap();
        let file = File::options().write(true).open(self.path(name)).unwrap();
        file.write_all_at(bytes, offset).unwrap();
        self.path(name)
    }
}

/// Runs both tools' `compare` on the same files, and finds them of one mind.
#[track_caller]
fn compare_with_both(options: &[&str], files: [(&str, &str); 2]) -> Ran {
    let [(a, a_format), (b, b_format)] = files;
    let all = [options, &["-f", a_format, "-F", b_format, a, b]].concat();
    let args = ["compare"].into_iter().chain(all);
    let ours = ploop_img(args.clone());
    let theirs = run("qemu-img", args);
    // In strict mode, qemu-img also counts where a hole ends the disk in one and not in
    // the other, so it may find a difference earlier.
    let is_strict = options.contains(&"-s");
    let said = |ran: &Ran| match is_strict {
        true => ran.stdout.replace(|c: char| c.is_ascii_digit(), ""),
        false => ran.stdout.clone(),
    };
    assert_eq!(
        (ours.code, said(&ours)),
        (theirs.code, said(&theirs)),
        "{options:?} {files:?}: {ours:?}, {theirs:?}"
    );
    ours
}

#[test]
fn compare_judges_as_qemu_img_does() {
    if !has_qemu() {
        return;
    }
    let files = Files::new();
    let raw = files.path("a.raw");
    let bare = files.path("a.hds");
    let in_hole = files.changed("a.raw", "in_hole.raw", &[1], 9_000_000);
    let in_data = files.changed("a.raw", "in_data.raw", &[1; 3], (2 << 20) + 1234);
    let zeros = files.changed("a.raw", "zeros.raw", &[0; 8192], 5 << 20);
    let longer = files.path("longer.raw");
    fs::copy(&raw, &longer).unwrap();
    let file = File::options().write(true).open(&longer).unwrap();
    file.set_len(20 << 20).unwrap();
    let tail = files.changed("longer.raw", "tail.raw", &[1], 18_000_000);
    let small = files.path("small.hds");
    run(
        "qemu-img",
        [
            "create",
            "-q",
            "-f",
            "parallels",
            "-o",
            "cluster_size=64k",
            &small,
            "16M",
        ],
    )
    .ok();
    run(
        "qemu-io",
        ["-f", "parallels", "-c", "write -P 7 1M 3M", &small],
    )
    .ok();

    let expected = [
        ((&raw, "raw"), (&bare, "parallels"), 0),
        ((&bare, "parallels"), (&zeros, "raw"), 0),
        ((&raw, "raw"), (&in_hole, "raw"), 1),
        ((&bare, "parallels"), (&in_hole, "raw"), 1),
        ((&in_data, "raw"), (&bare, "parallels"), 1),
        ((&bare, "parallels"), (&longer, "raw"), 0),
        ((&longer, "raw"), (&bare, "parallels"), 0),
        ((&tail, "raw"), (&bare, "parallels"), 1),
        ((&bare, "parallels"), (&tail, "raw"), 1),
        ((&in_data, "raw"), (&tail, "raw"), 1),
        ((&small, "parallels"), (&bare, "parallels"), 1),
        ((&bare, "parallels"), (&bare, "parallels"), 0),
    ];
    for ((a, a_format), (b, b_format), code) in expected {
        let pair = [(a.as_str(), a_format), (b.as_str(), b_format)];
        let ran = compare_with_both(&[], pair);
        assert_eq!(ran.code, Some(code), "{pair:?}: {ran:?}");
        compare_with_both(&["-s"], pair);
        assert_eq!(compare_with_both(&["-q"], pair).stdout, "");
    }
    let strict = compare_with_both(&["-s"], [(&raw, "raw"), (&longer, "raw")]);
    assert!(strict.stdout.contains("Strict mode"), "{strict:?}");
}

#[test]
fn compare_says_what_it_cannot_open_with_a_code_of_its_own() {
    if !has_qemu() {
        return;
    }
    let files = Files::new();
    let (raw, none) = (files.path("a.raw"), files.path("none.raw"));
    for pair in [[&raw, &none], [&none, &raw]] {
        let args = ["compare"].into_iter().chain(pair.map(String::as_str));
        let (ours, theirs) = (ploop_img(args.clone()), run("qemu-img", args));
        assert_eq!((ours.code, theirs.code), (Some(2), Some(2)), "{ours:?}");
        assert!(ours.stderr.contains("none.raw"), "{ours:?}");
    }
}

#[test]
fn compare_reads_bundles_and_snapshots() {
    if !has_qemu() {
        return;
    }
    let disk = Disk::new("4M");
    disk.write(1, 3, 5);
    let then = disk.raw(None);
    let guid = disk.create();
    let then = then.to_str().unwrap();
    assert_eq!(
        ploop_img(["compare", &disk.path, then]).ok(),
        "Images are identical.\n"
    );
    disk.write(2, 1, 6);
    let ran = ploop_img(["compare", &disk.path, then]);
    let said = format!("Content mismatch at offset {}!\n", 2 * CLUSTER);
    assert_eq!((ran.code, ran.stdout), (Some(1), said));
    ploop_img(["compare", "--snapshot", &guid, &disk.path, then]).ok();
    ploop_img(["compare", "--second-snapshot", &guid, then, &disk.path]).ok();
    let ran = ploop_img(["compare", "--snapshot", &guid, then, then]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("no snapshots"), "{ran:?}");
}

#[test]
fn measure_foretells_what_a_conversion_makes() {
    if !require_tool("qemu-img") {
        return;
    }
    let files = Files::new();
    let measure = |args: &[&str]| -> (u64, u64) {
        let said = ploop_img([&["measure", "--output=json"], args].concat()).ok();
        let measure: Value = serde_json::from_str(&said).unwrap();
        let bytes = |key: &str| measure[key].as_u64().unwrap();
        (bytes("required"), bytes("fully-allocated"))
    };
    let len = |name: &str| fs::metadata(files.path(name)).unwrap().len();
    for cluster in ["32k", "1M", "4M"] {
        let (required, full) = measure(&["--cluster-size", cluster, &files.path("a.raw")]);
        for (options, expected) in [(&[][..], required), (&["-S", "0"][..], full)] {
            let made = files.path("made.hds");
            let _ = fs::remove_file(&made);
            let option = format!("cluster_size={cluster}");
            let args = ["convert", "-o", &option, &files.path("a.raw"), &made];
            ploop_img([&args[..], options].concat()).ok();
            assert_eq!(len("made.hds"), expected, "{cluster} {options:?}");
            ploop_img(["check", &made]).ok();
            ploop_img(["compare", &files.path("a.raw"), &made]).ok();
        }
        let empty = measure(&["--cluster-size", cluster, "--size", "16M"]);
        assert_eq!((empty.1, empty.0 < required), (full, true));
    }
    for args in [["-O", "raw", "--size", "1G"], ["-O", "raw", "-f", "raw"]] {
        let mut args = args.map(str::to_owned).to_vec();
        if args[2] == "-f" {
            args.extend(["raw".to_owned(), files.path("a.raw")]);
            args.remove(3);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let ours = ploop_img([&["measure"], &args[..]].concat()).ok();
        let theirs = run("qemu-img", [&["measure"], &args[..]].concat()).ok();
        assert_eq!(ours, theirs, "{args:?}");
    }
    for args in [&["measure"][..], &["measure", "--size", "1G", "x.raw"]] {
        let (ours, theirs) = (ploop_img(args), run("qemu-img", args));
        assert_eq!((ours.code, theirs.code), (Some(1), Some(1)), "{ours:?}");
    }
}

/// Runs `ploop-img` with `input` on standard input; gives back standard output.
fn piped(args: &[&str], input: &[u8]) -> (Option<i32>, Vec<u8>, String) {
    let mut child = ploop_img_command()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // In pieces that nothing is aligned to; a reader may end early.
            let _ = input
                .chunks(77_777)
                .try_for_each(|part| stdin.write_all(part));
        });
        child.wait_with_output().unwrap()
    });
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), output.stdout, said)
}

#[test]
fn a_disk_streams_out_and_in() {
    let files = Files::new();
    let content = files.read("a.raw");
    for source in ["a.raw", "a.hds"] {
        let (code, stdout, said) = piped(&["convert", &files.path(source), "-"], &[]);
        assert_eq!((code, said.as_str()), (Some(0), ""));
        assert!(stdout == content, "{source}");
    }
    for target in ["in.hds", "in", "in.raw"] {
        let target = files.path(target);
        let (code, _, said) = piped(&["convert", "-", &target], &content);
        assert_eq!((code, said.as_str()), (Some(0), ""), "{target}");
        ploop_img(["compare", &target, &files.path("a.raw")]).ok();
        if !target.ends_with(".raw") {
            ploop_img(["check", &target]).ok();
        }
    }
    if require_tool("qemu-img") {
        qemu_img_check(Path::new(&files.path("in.hds")));
    }
    // From end to end, and of a size that is no multiple of a sector.
    let (code, stdout, _) = piped(&["convert", "-", "-"], &content[..1_000_001]);
    assert_eq!((code, stdout.len()), (Some(0), 1_000_448));
    assert!(stdout[..1_000_001] == content[..1_000_001]);
}

#[test]
fn a_stream_of_unknown_size_makes_way_for_its_bat() {
    let files = Files(TempDir::new().unwrap());
    // Header and BAT of 300 MiB in the smallest clusters take two of them.
    let mut content = vec![0; 300 << 20];
    content[..200_000].fill(3);
    let middle = content.len() / 2;
    content[middle..middle + 100].fill(4);
    let target = files.path("in.hds");
    let args = ["convert", "--cluster-size", "32k", "-", &target];
    assert_eq!(piped(&args, &content).0, Some(0));
    ploop_img(["check", &target]).ok();
    if require_tool("qemu-img") {
        qemu_img_check(Path::new(&target));
    }
    let (_, back, _) = piped(&["convert", &target, "-"], &[]);
    assert!(back == content);
}

#[test]
fn streams_that_cannot_be() {
    let files = Files::new();
    let path = |name: &str| files.path(name);
    let (code, _, said) = piped(&["convert", "-", &path("empty.hds")], &[]);
    assert_eq!(code, Some(1));
    assert!(said.contains("standard input: is empty"), "{said}");
    let (code, _, said) = piped(&["convert", "-O", "ploop", &path("a.raw"), "-"], &[]);
    assert_eq!(code, Some(1));
    assert!(said.contains("only be written as a raw disk"), "{said}");
    let (code, _, said) = piped(&["convert", "-f", "ploop", "-", &path("x.hds")], &[1]);
    assert_eq!(code, Some(1));
    assert!(said.contains("only give a raw disk"), "{said}");
    assert!(!Path::new(&path("empty.hds")).exists() && !Path::new(&path("x.hds")).exists());
    // Who reads has had enough.
    let mut child = ploop_img_command()
        .args(["convert", &path("a.raw"), "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ran: Ran = child.wait_with_output().unwrap().into();
    assert!(ran.fails().contains("Broken pipe"));
}

#[test]
fn convert_n_overwrites_what_is_there_and_no_more() {
    let files = Files::new();
    let content = files.read("a.raw");
    for (options, source) in [(&[][..], "a.raw"), (&[], "a.hds"), (&["-S", "0"], "a.hds")] {
        let target = files.path("there.raw");
        fs::write(&target, vec![0xEE; 18 << 20]).unwrap();
        let args = ["convert", "-n", &files.path(source), &target];
        ploop_img([&args[..], options].concat()).ok();
        let now = files.read("there.raw");
        assert!(now[..content.len()] == content, "{options:?} {source}");
        assert!(now[content.len()..].iter().all(|byte| *byte == 0xEE));
        assert_eq!(now.len(), 18 << 20);
    }
    let small = files.path("small.raw");
    fs::write(&small, [0xEE; 4096]).unwrap();
    let error = ploop_img(["convert", "-n", &files.path("a.hds"), &small]).fails();
    assert!(error.contains("smaller than the source"), "{error}");
    assert_eq!(files.read("small.raw"), [0xEE; 4096]);
    let error = ploop_img(["convert", "-n", &files.path("a.hds"), &files.path("none")]).fails();
    assert!(error.contains("No such file"), "{error}");
}

#[test]
fn convert_n_overwrites_a_ploop_disk_as_qemu_img_does() {
    if !has_qemu() {
        return;
    }
    let files = Files::new();
    let raw = files.path("a.raw");
    // Data where the source has some and where it has none, and behind its end.
    let make = |name: &str| {
        let image = files.path(name);
        ploop_img(["create", "-q", "--cluster-size", "64k", &image, "17M"]).ok();
        let file = image_file(Path::new(&image));
        for write in [
            "write -P 1 2M 1M",
            "write -P 2 6M 300k",
            "write -P 3 15M 2M",
        ] {
            let file = file.to_str().unwrap();
            run("qemu-io", ["-f", "parallels", "-c", write, file]).ok();
        }
        (image, file)
    };
    let odd = files.path("odd.raw");
    fs::write(&odd, &files.read("a.raw")[..(3 << 20) + 1536]).unwrap();
    let zeros = files.path("zeros.raw");
    let file = File::create(&zeros).unwrap();
    file.set_len(7 << 20).unwrap();
    for source in [&raw, &odd, &zeros] {
        let (judge, _) = make("judge.hds");
        let args = [
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "parallels",
            source,
            &judge,
        ];
        run("qemu-img", args).ok();
        for (name, options) in [("to.hds", &[][..]), ("to", &[]), ("to.hds", &["-S", "0"])] {
            let (target, file) = make(name);
            let args = ["convert", "-n", "-f", "raw", source, &target];
            ploop_img([&args[..], options].concat()).ok();
            ploop_img(["check", &target]).ok();
            qemu_img_check(&file);
            ploop_img(["compare", &target, &judge]).ok();
            let _ = fs::remove_dir_all(&target);
            let _ = fs::remove_file(&target);
        }
        fs::remove_file(judge).unwrap();
    }
    let (small, file) = make("small");
    let before = fs::read(&file).unwrap();
    let large = files.path("large.raw");
    fs::write(&large, vec![1; 18 << 20]).unwrap();
    let error = ploop_img(["convert", "-n", &large, &small]).fails();
    assert!(error.contains("smaller than the source"), "{error}");
    ploop_img(["snapshot", "create", &small]).ok();
    let error = ploop_img(["convert", "-n", &raw, &small]).fails();
    assert!(error.contains("snapshots"), "{error}");
    assert!(fs::read(&file).unwrap() == before);
}

#[test]
fn convert_n_does_not_guess_what_it_overwrites() {
    let files = Files::new();
    let image = files.read("a.hds");
    fs::write(files.path("guess.img"), &image).unwrap();
    fs::write(files.path("guess.hds"), [7; 4096]).unwrap();
    for name in ["guess.img", "guess.hds"] {
        let error = ploop_img(["convert", "-n", &files.path("a.raw"), &files.path(name)]).fails();
        assert!(error.contains("-O ploop or -O raw"), "{error}");
    }
    assert!(files.read("guess.img") == image);
}

/// A loop device on a file, gone in the end.
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &str) -> Option<Self> {
        if !require_tool("losetup") {
            return None;
        }
        let ran = run("losetup", ["-f", "--show", file]);
        if ran.code != Some(0) {
            let _ = left_out("no loop device can be set up");
            return None;
        }
        Some(Self(ran.stdout.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn block_devices_are_read_and_written() {
    let files = Files::new();
    let back = files.path("back");
    fs::write(&back, vec![0xEE; 18 << 20]).unwrap();
    let Some(device) = LoopDevice::new(&back) else {
        return;
    };
    let error = ploop_img(["convert", "-O", "raw", &files.path("a.hds"), &device.0]).fails();
    assert!(
        error.contains("already exists") && error.contains("-n"),
        "{error}"
    );
    ploop_img(["convert", "-n", &files.path("a.hds"), &device.0]).ok();
    let content = files.read("a.raw");
    let now = files.read("back");
    assert!(now[..content.len()] == content);
    assert!(now[content.len()..].iter().all(|byte| *byte == 0xEE));

    let longer = files.path("longer.raw");
    fs::write(&longer, &now).unwrap();
    ploop_img(["compare", &device.0, &longer]).ok();
    let ran = ploop_img(["compare", &device.0, &files.path("a.hds")]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    ploop_img(["convert", &device.0, &files.path("from.hds")]).ok();
    ploop_img(["compare", &files.path("from.hds"), &longer]).ok();
    let said = ploop_img(["measure", "-O", "raw", &device.0]).ok();
    assert!(said.contains(&(18 << 20).to_string()), "{said}");

    fs::write(files.path("large.raw"), vec![1; 19 << 20]).unwrap();
    let error = ploop_img(["convert", "-n", &files.path("large.raw"), &device.0]).fails();
    assert!(error.contains("smaller than the source"), "{error}");
    // Somebody has it for himself.
    let busy = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL;
    let _busy = rustix::fs::open(device.0.as_str(), busy, rustix::fs::Mode::empty()).unwrap();
    let error = ploop_img(["convert", "-n", &files.path("a.hds"), &device.0]).fails();
    assert!(error.contains("in use on this host"), "{error}");
}

#[test]
fn options_that_change_nothing_are_accepted() {
    let files = Files::new();
    let convert = |options: &[&str]| {
        let target = files.path("out.hds");
        let args = ["convert", &files.path("a.raw"), &target];
        let ran = ploop_img([&args[..], options].concat());
        let _ = fs::remove_file(target);
        ran
    };
    for options in [
        &[
            "-f",
            "raw",
            "-O",
            "parallels",
            "-t",
            "none",
            "-T",
            "writeback",
            "-W",
        ][..],
        &["-q", "-m", "8", "-S", "64k"],
        &["-q", "-p", "-C"],
        &["-O", "ploop", "-t", "unsafe", "-o", "cluster_size=65536"],
    ] {
        let ran = convert(options);
        assert_eq!(
            (ran.stdout.as_str(), ran.stderr.as_str()),
            ("", ""),
            "{options:?}"
        );
        assert_eq!(ran.code, Some(0), "{options:?}");
    }
    for (options, said) in [
        (&["-t", "sometimes"][..], "sometimes"),
        (&["-m", "17"], "17"),
        (&["-o", "compression_type=zstd"], "cluster_size=SIZE"),
        (&["-O", "qcow2"], "qcow2"),
        (&["-c"], "-c"),
    ] {
        let ran = convert(options);
        assert_eq!(ran.code, Some(1), "{options:?}");
        assert!(ran.stderr.contains(said), "{ran:?}");
    }
    let bare = files.path("a.hds");
    ploop_img(["info", "-f", "parallels", &bare]).ok();
    ploop_img(["map", "-f", "parallels", &bare]).ok();
    assert_eq!(
        ploop_img(["check", "-q", "-f", "parallels", "-T", "none", &bare]).ok(),
        ""
    );
    assert_eq!(
        ploop_img(["resize", "-q", "-f", "parallels", &bare, "20M"]).ok(),
        ""
    );
    ploop_img(["resize", "--preallocation=off", &bare, "30M"]).ok();
    // Not wrong usage, whose code would say that they differ.
    assert_eq!(ploop_img(["compare", "-q", "-p", &bare, &bare]).ok(), "");
}

#[test]
fn create_says_what_it_made_as_qemu_img_does() {
    if !require_tool("qemu-img") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.hds").to_str().unwrap().to_owned();
    for options in [
        &[][..],
        &["-o", "cluster_size=65536"],
        &["-o", "cluster_size=64k"],
        &["-q"],
    ] {
        let args = [&["create", "-f", "parallels"], options, &[&path, "10M"]].concat();
        let ours = ploop_img(&args).ok();
        fs::remove_file(&path).unwrap();
        assert_eq!(ours, run("qemu-img", &args).ok(), "{options:?}");
        fs::remove_file(&path).unwrap();
    }
    let said = ploop_img(["create", &path, "10GB"]).ok();
    assert!(said.contains("size=10000"), "{said}");
    fs::remove_file(&path).unwrap();
    let said = ploop_img(["create", &path, "10GiB"]).ok();
    assert!(said.contains("size=10737418240 "), "{said}");
}

#[test]
fn wrong_usage_ends_as_with_qemu_img() {
    if !require_tool("qemu-img") {
        return;
    }
    for args in [
        &["nonsense"][..],
        &["create"],
        &["create", "--nonsense", "x", "1M"],
        &["compare", "one"],
        &["check", "--nonsense", "x"],
        &["check"],
        &["resize", "x"],
    ] {
        let (ours, theirs) = (ploop_img(args), run("qemu-img", args));
        assert_eq!((ours.code, theirs.code), (Some(1), Some(1)), "{args:?}");
    }
    for help in ["--help", "--version"] {
        let (ours, theirs) = (ploop_img([help]), run("qemu-img", [help]));
        assert_eq!((ours.code, theirs.code), (Some(0), Some(0)), "{help}");
    }
}

#[test]
fn an_image_of_another_format_is_named_with_the_command_that_helps() {
    if !require_tool("qemu-img") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("a.raw"), vec![5; 3 << 20]).unwrap();
    for (format, name) in [
        ("qcow2", "qcow2"),
        ("vmdk", "VMDK"),
        ("vdi", "VDI"),
        ("vhdx", "VHDX"),
    ] {
        let image = path(&format!("my disk.{format}"));
        run(
            "qemu-img",
            ["convert", "-f", "raw", "-O", format, &path("a.raw"), &image],
        )
        .ok();
        for command in [&["info"][..], &["check"], &["convert"]] {
            let mut args = [command, &[&image]].concat();
            let target = path("target");
            if command == ["convert"] {
                args.push(&target);
            }
            let error = ploop_img(args).fails();
            assert!(error.contains(&format!(" a {name} image")), "{error}");
            // What it advises is done, to the letter.
            let advice = error.split('\'').nth(1).unwrap();
            assert!(advice.starts_with("qemu-img convert -f"), "{error}");
            run("sh", ["-c", advice]).ok();
            let made = path("my disk.hds");
            ploop_img(["check", &made]).ok();
            ploop_img(["compare", &path("a.raw"), &made]).ok();
            fs::remove_file(made).unwrap();
        }
    }
    let error = ploop_img(["info", &path("a.raw")]).fails();
    let advice = error.split('\'').nth(1).unwrap().to_owned();
    let advice = advice.replacen("ploop-img", env!("CARGO_BIN_EXE_ploop-img"), 1);
    run("sh", ["-c", &advice]).ok();
    ploop_img(["compare", &path("a.raw"), &path("a.hds")]).ok();
}
