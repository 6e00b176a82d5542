//! `ploop-img` finds the process that serves an image.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_user_ploop::image::{self, Access, OpenImage, OpenMode};

use crate::common::backend::Backend;
use crate::common::img::{Ran, ploop_img, ploop_img_command};
use crate::common::qmp::Qmp;
use crate::grow::{create, with_snapshots};
use crate::{Rig, expect_service, start_front_end, wait_for};

pub const VARIABLE: &str = "PLOOP_RUNTIME_DIR";

pub struct Host {
    pub rig: Rig,
    pub runtime: PathBuf,
}

impl Host {
    pub fn new() -> Self {
        let rig = Rig::new();
        let runtime = rig.folder.path().join("run");
        fs::create_dir(&runtime).unwrap();
        Self { rig, runtime }
    }

    pub fn serve(&self, options: &[&str]) -> Backend {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        command.env(VARIABLE, &self.runtime);
        Backend::start_as(command, &self.rig.image, &self.rig.socket, options)
    }

    fn ploop_img(&self, args: &[&str]) -> Ran {
        let mut command = ploop_img_command();
        command.env(VARIABLE, &self.runtime).args(args);
        command.arg(&self.rig.image).stdin(Stdio::null());
        command.output().unwrap().into()
    }

    fn resize(&self, options: &[&str], size: &str) -> Ran {
        let mut command = ploop_img_command();
        command.env(VARIABLE, &self.runtime).arg("resize");
        command.args(options).arg(&self.rig.image).arg(size);
        command.stdin(Stdio::null()).output().unwrap().into()
    }

    /// Where its control socket is to be.
    fn socket(&self) -> PathBuf {
        let image = fs::metadata(&self.rig.image).unwrap();
        let name = format!("{:x}-{:x}/control", image.dev(), image.ino());
        self.runtime.join(name)
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn the_process_that_serves_an_image_is_found_by_the_image() {
    let host = Host::new();
    let said = host.ploop_img(&["stat"]).fails();
    assert!(said.contains("no process that serves"), "{said}");
    let backend = host.serve(&[]);
    assert_eq!(mode(&host.socket()), 0o600);
    assert_eq!(mode(host.socket().parent().unwrap()), 0o700);
    expect_service(&mut start_front_end(backend.socket()));
    let shown = host.ploop_img(&["stat"]).ok();
    assert!(shown.contains("status: running"), "{shown}");
    assert!(shown.contains(host.rig.image.to_str().unwrap()), "{shown}");
    let line = |name: &str| {
        let line = shown.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(line("reads")[1..4], ["1", "512", "B"], "{shown}");
    assert_eq!(line("flushes")[1], "0", "{shown}");
    assert_ne!(line("writes").last().unwrap(), "-", "{shown}");
    let json: Value =
        serde_json::from_str(&host.ploop_img(&["stat", "--output=json"]).ok()).unwrap();
    assert_eq!(json["stats"]["wr_operations"], 1);
    assert_eq!(json["node"]["image"]["virtual-size"], 64 << 20);
    // As of a disk that nobody serves.
    let info = host.ploop_img(&["info"]).ok();
    assert!(info.contains("virtual size: 64 MiB"), "{info}");
    host.ploop_img(&["check"]).ok();
    // What changes it finds it in use as ever.
    host.ploop_img(&["check", "--repair=leaks"]).fails();
    backend.stop();
    assert!(!host.socket().exists());
    host.ploop_img(&["info"]).ok();
    // What a dead process has left is replaced, and tells nobody anything.
    host.serve(&[]).kill();
    assert!(host.socket().exists());
    let said = host.ploop_img(&["stat"]).fails();
    assert!(said.contains("cannot connect"), "{said}");
    let backend = host.serve(&[]);
    host.ploop_img(&["stat"]).ok();
    backend.stop();
}

#[test]
fn a_process_can_be_hidden_or_named() {
    let host = Host::new();
    let backend = host.serve(&["--control=none"]);
    assert_eq!(fs::read_dir(&host.runtime).unwrap().count(), 0);
    host.ploop_img(&["stat"]).fails();
    host.ploop_img(&["info"]).fails();
    backend.stop();
    let elsewhere = host.rig.folder.path().join("control");
    let option = format!("--control={}", elsewhere.display());
    let backend = host.serve(&[&option]);
    host.ploop_img(&["stat"]).fails();
    host.ploop_img(&["stat", &option]).ok();
    Qmp::connect(&elsewhere);
    backend.stop();
}

#[test]
fn processes_that_serve_one_file_have_a_socket_each() {
    let mut host = Host::new();
    host.rig.image = create(host.rig.folder.path(), "bundle", &[]);
    let serve = |name: &str, options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        command.env(VARIABLE, &host.runtime);
        let socket = host.rig.folder.path().join(name);
        Backend::start_as(command, &host.rig.image, &socket, options)
    };
    let first = serve("first", &[]);
    let guid = host.ploop_img(&["snapshot", "create"]).ok();
    let exports = ["second", "third"].map(|name| serve(name, &["--snapshot", guid.trim()]));
    // All three are called by the file that the first one began with.
    let place = |number: &str| {
        let file = fs::metadata(host.rig.image.join("root.hds")).unwrap();
        let name = format!("{:x}-{:x}{number}/control", file.dev(), file.ino());
        host.runtime.join(name)
    };
    assert!(["", ".2", ".3"].iter().all(|number| place(number).exists()));
    let ask = |path: &str| {
        let mut command = ploop_img_command();
        command.env(VARIABLE, &host.runtime);
        command
            .args(["stat", "--output=json", path])
            .stdin(Stdio::null());
        let said = Ran::from(command.output().unwrap()).ok();
        let stat: Value = serde_json::from_str(&said).unwrap();
        stat["node"]["ro"].clone()
    };
    let image = host.rig.image.to_str().unwrap();
    assert_eq!(ask(image), false);
    // The first one does not serve that any more.
    assert_eq!(ask(&format!("{image}/root.hds")), true);
    exports.into_iter().for_each(Backend::stop);
    first.stop();
    assert!(!place(".2").exists());
}

#[test]
fn folders_of_processes_that_have_ended_go_when_another_one_starts() {
    let host = Host::new();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(120);
    let make = |name: &str, is_old: bool| {
        let folder = host.runtime.join(name);
        fs::create_dir(&folder).unwrap();
        if is_old {
            let folder = fs::File::open(&folder).unwrap();
            folder.set_modified(long_ago).unwrap();
        }
        folder
    };
    let (old, young, used) = (make("1-1", true), make("1-2", false), make("1-3", true));
    fs::write(used.join("control"), "").unwrap();
    fs::File::open(&used)
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    host.serve(&[]).stop();
    assert!(!old.exists() && young.exists() && used.exists());
}

#[test]
fn a_copy_of_hard_links_is_not_taken_for_the_disk() {
    let mut host = Host::new();
    host.rig.image = create(host.rig.folder.path(), "bundle", &[]);
    let backend = host.serve(&[]);
    let copy = host.rig.folder.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(&host.rig.image).unwrap() {
        let entry = entry.unwrap();
        fs::hard_link(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let image = std::mem::replace(&mut host.rig.image, copy);
    for said in [
        host.resize(&[], "+64M").fails(),
        host.ploop_img(&["snapshot", "create"]).fails(),
    ] {
        assert!(said.contains("hard links"), "{said}");
    }
    host.rig.image = image;
    host.resize(&[], "+64M").ok();
    backend.stop();
}

/// What `ploop-img` says on both streams, without the file's name.
fn said(ran: Ran) -> (Option<i32>, String, String) {
    (ran.code, ran.stdout, ran.stderr)
}

#[test]
fn a_disk_is_resized_the_same_whether_it_is_served_or_not() {
    let served = Host::new();
    let backend = served.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    let idle = Host::new();
    for size in [
        "65M", "+1M", "+3k", "67M", "1M", "-5M", "1E", "+0", "nonsense", "1G",
    ] {
        let resize = |host: &Host| {
            let image = host.rig.image.to_str().unwrap();
            let (code, stdout, stderr) = said(host.resize(&[], size));
            (code, stdout, stderr.replace(image, "IMAGE"))
        };
        let on_line = resize(&served);
        assert_eq!(on_line, resize(&idle), "{size}");
        let is_wrong = ["1M", "-5M", "1E", "nonsense"].contains(&size);
        assert_eq!(on_line.0, Some(i32::from(is_wrong)), "{on_line:?}");
    }
    let said = served.resize(&["--quiet"], "+1M").ok();
    assert_eq!(said, "");
    let said = served.resize(&["--shrink"], "64M").fails();
    assert!(said.contains("when nobody serves it"), "{said}");
    let space = front_end.get_config(0, 60);
    let capacity = u64::from_le_bytes(space[..8].try_into().unwrap());
    assert_eq!(capacity, 1025 << 11);
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();
    let info = served.ploop_img(&["info", "--output=json"]).ok();
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], 1025 << 20);
    served.ploop_img(&["check"]).ok();
}

#[test]
fn a_disk_is_resized_only_by_who_serves_it() {
    let host = Host::new();
    let socket = host.rig.folder.path().join("control");
    let option = format!("--control={}", socket.display());
    let backend = host.serve(&[&option]);
    // It cannot be found.
    let error = host.resize(&[], "65M").fails();
    assert!(error.contains("stop it first"), "{error}");
    host.resize(&[&option], "65M").ok();
    let nowhere = format!("{option}-of-nobody");
    let error = host.resize(&[&nowhere], "66M").fails();
    assert!(error.contains("cannot connect"), "{error}");
    // Another disk's process.
    let other = Host::new();
    let second = other.serve(&[]);
    let option = format!("--control={}", other.socket().display());
    let error = host.resize(&[&option], "66M").fails();
    assert!(error.contains("is of another disk"), "{error}");
    second.stop();
    backend.stop();
    // Nobody is asked where nobody has to be.
    host.resize(&[&option], "67M").ok();
    let backend = host.serve(&["--read-only"]);
    let error = host.resize(&[], "68M").fails();
    assert!(error.contains("read-only"), "{error}");
    backend.stop();
    for (host, size) in [(&host, 67 << 20), (&other, 64 << 20)] {
        let info = host.ploop_img(&["info", "--output=json"]).ok();
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], size);
    }
}

#[test]
fn a_disk_is_not_taken_for_another_whose_files_have_the_same_names() {
    let folder = TempDir::new().unwrap();
    let [first, second] = ["first", "second"].map(|name| create(folder.path(), name, &[]));
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let size = |bundle: &Path| {
        let info = ploop_img(["info", "--output=json", &text(bundle)]).ok();
        serde_json::from_str::<Value>(&info).unwrap()["virtual-size"].clone()
    };
    // One file, by whatever path it was opened.
    for (blk_file, expected) in [(".", 65_u64), ("root.hds", 66), ("../first", 67)] {
        let start = |bundle: &Path, blk_file: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
            command.current_dir(bundle);
            let socket = bundle.with_extension("socket");
            Backend::start_as(command, blk_file.as_ref(), &socket, &["--control=control"])
        };
        let backends = [start(&first, blk_file), start(&second, ".")];
        let control = format!("--control={}", first.join("control").display());
        let larger = format!("{expected}M");
        let said = ploop_img(["resize", &text(&second), "80M", &control]).fails();
        assert!(said.contains("is of another disk"), "{said}");
        let said = ploop_img(["stat", &text(&second), &control]).fails();
        assert!(said.contains("is of another disk"), "{said}");
        ploop_img(["stat", &text(&first), &control]).ok();
        ploop_img(["resize", &text(&first), &larger, &control]).ok();
        backends.into_iter().for_each(Backend::stop);
        assert_eq!(size(&second), 64 << 20);
        assert_eq!(size(&first), expected << 20);
    }
}

#[test]
fn the_process_of_a_snapshot_tells_who_asks_for_its_disk() {
    let folder = TempDir::new().unwrap();
    let bundle = with_snapshots(folder.path());
    let disk = bundle.to_str().unwrap();
    let snapshots = ploop_img(["snapshot", "list", "--output=json", disk]).ok();
    let snapshots: Value = serde_json::from_str(&snapshots).unwrap();
    let guid = snapshots.as_array().unwrap()[0]["guid"].as_str().unwrap();
    let control = format!("--control={}", folder.path().join("control").display());
    let options = [
        format!("--snapshot={guid}"),
        "--read-only".to_owned(),
        control,
    ];
    let socket = folder.path().join("socket");
    let backend = Backend::start(&bundle, &socket, &options);
    ploop_img(["stat", disk, &options[2]]).ok();
    backend.stop();
}

/// A disk of 64 MiB that is in use, with a process that says what a test has it say.
struct Another {
    disk: String,
    control: String,
    asked: Arc<Mutex<Vec<Value>>>,
    _image: OpenImage,
    _folder: TempDir,
}

impl Another {
    /// `answer` gets the number of the connection, from 0, what is asked for, and the
    /// `file-id` of the disk. `None`: it hangs up.
    fn new(answer: impl Fn(usize, &str, &str) -> Option<Value> + Send + 'static) -> Self {
        let folder = TempDir::new().unwrap();
        let path = create(folder.path(), "disk.hds", &[]);
        let image = image::open(&path, OpenMode::new(Access::Serve)).unwrap();
        let socket = folder.path().join("control");
        let listener = UnixListener::bind(&socket).unwrap();
        let file = fs::metadata(&path).unwrap();
        let id = format!("{:x}-{:x}", file.dev(), file.ino());
        let asked = Arc::default();
        let another = Self {
            disk: path.to_str().unwrap().to_owned(),
            control: format!("--control={}", socket.display()),
            asked: Arc::clone(&asked),
            _image: image,
            _folder: folder,
        };
        std::thread::spawn(move || {
            for (number, client) in listener.incoming().enumerate() {
                let client = client.unwrap();
                // It may have gone.
                let say = |value: Value| drop(writeln!(&client, "{value}"));
                say(json!({ "QMP": {} }));
                for line in BufReader::new(&client).lines().map_while(Result::ok) {
                    let request: Value = serde_json::from_str(&line).unwrap();
                    let name = request["execute"].as_str().unwrap();
                    let answer = match name {
                        "qmp_capabilities" => returned(json!({})),
                        name => answer(number, name, &id),
                    };
                    asked.lock().unwrap().push(request);
                    match answer {
                        Some(answer) => say(answer),
                        None => break,
                    }
                }
            }
        });
        another
    }

    /// With which arguments it was asked for this last.
    fn asked(&self, command: &str) -> Option<Value> {
        let asked = self.asked.lock().unwrap();
        let last = asked.iter().rev().find(|it| it["execute"] == command);
        last.map(|request| request["arguments"].clone())
    }

    fn ploop_img(&self, command: &str, options: &[&str]) -> Ran {
        let first = [command, &self.disk, &self.control];
        ploop_img([&first, options].concat())
    }

    /// Watches the disk.
    fn watch(&self, options: &[&str]) -> Child {
        let mut command = ploop_img_command();
        command.args(["stat", &self.disk, &self.control]);
        let watching = command.args(options).stdout(Stdio::piped()).spawn();
        watching.unwrap()
    }
}

fn returned(value: Value) -> Option<Value> {
    Some(json!({ "return": value }))
}

/// Of a process that says little else.
fn file_id(command: &str, id: &str) -> Option<Value> {
    match command {
        "query-engine" => returned(json!({ "file-id": id })),
        _ => returned(json!([{}])),
    }
}

#[test]
fn who_resizes_a_disk_hears_of_the_end_of_its_process() {
    let process = Another::new(|_, command, id| match command {
        "block_resize" => None,
        other => file_id(other, id),
    });
    let said = process.ploop_img("resize", &["80M"]).fails();
    let asked = process.asked("block_resize").unwrap();
    assert_eq!(asked["size"], 80 << 20);
    assert!(said.contains("may be larger all the same"), "{said}");
}

#[test]
fn by_how_much_a_disk_grows_is_added_to_what_its_process_says_it_has() {
    let process = Another::new(|_, command, id| match command {
        // Others have made it larger since it was looked at.
        "grow" => returned(json!({ "size": 90 << 20 })),
        other => file_id(other, id),
    });
    let said = process.ploop_img("resize", &["+1M"]).ok();
    assert_eq!(process.asked("grow"), Some(json!({ "by": 1 << 20 })));
    assert!(said.contains("90 MiB"), "{said}");
}

#[test]
fn an_older_process_that_cannot_add_is_told_the_sum() {
    let process = Another::new(|_, command, id| match command {
        "grow" => Some(json!({ "error": {
            "class": "CommandNotFound",
            "desc": "The command grow has not been found",
        } })),
        other => file_id(other, id),
    });
    let said = process.ploop_img("resize", &["+1M"]).ok();
    let sum = json!({ "node-name": "disk", "size": 65 << 20 });
    assert_eq!(process.asked("block_resize"), Some(sum));
    assert!(said.contains("65 MiB"), "{said}");
    // One that can, and does not do it, is told nothing else.
    let process = Another::new(|_, command, id| match command {
        "grow" => Some(json!({ "error": { "class": "GenericError", "desc": "no" } })),
        other => file_id(other, id),
    });
    process.ploop_img("resize", &["+1M"]).fails();
    assert_eq!(process.asked("block_resize"), None);
}

#[test]
fn limits_are_those_of_the_disk_that_is_named_or_of_none() {
    let process = Another::new(|_, command, id| file_id(command, id));
    let nowhere = "/no/such/disk";
    let throttle = |options: &[&str]| {
        let first = ["throttle", nowhere, &process.control];
        ploop_img([&first, options].concat())
    };
    for change in [&["--iops=1"][..], &["--none"], &["--bps-max=5", "--bps=1"]] {
        let said = throttle(change).fails();
        assert!(said.contains(nowhere), "{said}");
        assert!(said.contains("cannot be told"), "{said}");
        assert_eq!(process.asked("throttle"), None);
    }
    // Who may not see the image may look.
    throttle(&[]).ok();
    assert_eq!(process.asked("throttle"), Some(json!({})));
    ploop_img(["stat", nowhere, &process.control]).ok();
    process.ploop_img("throttle", &["--iops=1"]).ok();
    assert_eq!(process.asked("throttle"), Some(json!({ "iops": 1 })));
}

#[test]
fn who_changes_limits_hears_of_the_end_of_the_process() {
    let process = Another::new(|_, command, id| match command {
        "throttle" => None,
        other => file_id(other, id),
    });
    let hint = "may hold all the same";
    let said = process.ploop_img("throttle", &["--iops=5"]).fails();
    assert!(said.contains(hint), "{said}");
    let said = process.ploop_img("throttle", &[]).fails();
    assert!(!said.contains(hint), "nothing was to be changed: {said}");
}

#[test]
fn whatever_a_process_says_is_shown_or_refused() {
    for odd in [
        json!(null),
        json!(7),
        json!("odd"),
        json!([]),
        json!([[]]),
        json!({ "stats": 7, "reads": [7, [], [u64::MAX, u64::MAX], [0, u64::MAX]] }),
        json!([{ "stats": {
            "rd_operations": u64::MAX, "failed_rd_operations": u64::MAX,
            "rd_bytes": u64::MAX, "rd_total_time_ns": u64::MAX, "wr_total_time_ns": u64::MAX,
        } }]),
    ] {
        let process = Another::new(move |_, command, id| match command {
            "query-engine" => {
                let queue = json!({ "in-flight": u64::MAX });
                returned(json!({ "file-id": id, "queues": [queue, queue, odd] }))
            }
            _ => returned(odd.clone()),
        });
        for command in ["stat", "throttle"] {
            process.ploop_img(command, &[]).ok();
            process.ploop_img(command, &["--output=json"]).ok();
        }
    }
}

#[test]
fn what_is_watched_is_complete_though_its_process_hangs_up_on_the_client() {
    let samples = AtomicUsize::new(0);
    let process = Another::new(move |number, command, id| match command {
        // All that is known of the first one is one sample.
        "query-named-block-nodes" if samples.fetch_add(1, Relaxed) == 1 => None,
        "query-blockstats" => {
            let reads = [1_000_000, 1_500_000][number.min(1)];
            returned(json!([{ "stats": { "rd_operations": reads } }]))
        }
        other => file_id(other, id),
    });
    let mut watching = process.watch(&["--watch=1", "--output=json"]);
    let mut line = String::new();
    let mut output = BufReader::new(watching.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    let report: Value = serde_json::from_str(&line).unwrap();
    let rate = report["reads"]["operations-per-second"].as_f64().unwrap();
    let reads = rate * report["seconds"].as_f64().unwrap();
    assert!((reads - 500_000.0).abs() < 5_000.0, "{report}");
    drop(output);
    assert!(watching.wait().unwrap().success());
}

#[test]
fn what_is_watched_ends_when_nobody_reads_it_any_more() {
    let process = Another::new(|_, command, id| file_id(command, id));
    for options in [&["--watch=1"][..], &["--watch=86400"]] {
        let mut watching = process.watch(options);
        let mut output = BufReader::new(watching.stdout.take().unwrap());
        output.read_line(&mut String::new()).unwrap();
        drop(output);
        wait_for("its end", || watching.try_wait().unwrap().is_some());
        assert!(watching.wait().unwrap().success());
    }
}

#[test]
fn limits_are_shown_and_changed_while_a_disk_is_served() {
    let host = Host::new();
    let throttle = |options: &[&str]| host.ploop_img(&[&["throttle"], options].concat());
    let said = throttle(&[]).fails();
    assert!(said.contains("no process that serves"), "{said}");
    let backend = host.serve(&["--throttle=iops_rd=77"]);
    assert_eq!(throttle(&[]).ok(), "iops_rd=77\n");
    assert_eq!(throttle(&["--none"]).ok(), "no limits\n");
    assert_eq!(
        throttle(&["--iops=500", "--bps=100M"]).ok(),
        "bps=104857600,iops=500\n"
    );
    let burst = "bps=104857600,iops=500,iops_max=2000,iops_max_length=10";
    let shown = throttle(&["--iops-max", "2000", "--iops_max_length", "10"]).ok();
    assert_eq!(shown, format!("{burst}\n"));
    for (options, why) in [
        (&["--iops-rd=5"][..], "cannot be used at the same time"),
        (&["--iops-max=5"], "cannot be lower"),
        (&["--bps-max-length=5"], "without burst rate"),
    ] {
        let said = throttle(options).fails();
        assert!(said.contains(why), "{said}");
    }
    // They are those of the disk, and all that is refused has changed nothing.
    let nodes = Qmp::connect(&host.socket()).ask("query-named-block-nodes", json!({}));
    assert_eq!(
        (&nodes[0]["iops"], &nodes[0]["iops_max"]),
        (&json!(500), &json!(2000))
    );
    let json: Value = serde_json::from_str(&throttle(&["--output=json"]).ok()).unwrap();
    assert_eq!(json["bps"], 100 << 20);
    assert_eq!(json["bps_max_length"], 1);
    assert_eq!(json.as_object().unwrap().len(), 19);
    assert_eq!(throttle(&["--iops=0"]).ok(), "bps=104857600\n");
    assert_eq!(throttle(&["--none", "--iops-wr=9"]).ok(), "iops_wr=9\n");
    backend.stop();
    // What is shown can be given.
    let backend = host.serve(&[&format!("--throttle={burst}")]);
    assert_eq!(throttle(&[]).ok(), format!("{burst}\n"));
    backend.stop();
}

#[test]
fn what_is_watched_goes_on_until_nobody_serves_the_disk_any_more() {
    let host = Host::new();
    let upgrades = host.rig.folder.path().join("upgrade");
    let mut backend = host.serve(&[&format!("--upgrade-socket={}", upgrades.display())]);
    let mut front_end = start_front_end(backend.socket());
    let mut command = ploop_img_command();
    command.env(VARIABLE, &host.runtime);
    command
        .args(["stat", "--watch=1", "--output=json"])
        .arg(&host.rig.image);
    let mut watching = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let mut reports = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    for _ in 0..2 {
        reports.next().unwrap();
        // Until an interval has it in it: the first one may be from before the process began.
        let busy = (0..30).find_map(|_| {
            expect_service(&mut front_end);
            reports.next().filter(|it| {
                let is_any = |kind: &str| it[kind]["p50-ns"].is_u64();
                is_any("reads") && is_any("writes")
            })
        });
        let busy = busy.expect("what is done is shown");
        assert_eq!(busy["status"], "running");
        assert!(
            busy["writes"]["bytes-per-second"].as_f64() > Some(0.0),
            "{busy}"
        );
        assert_eq!(busy["virtual-size"], 64 << 20);
        backend = backend.taken_over(&host.rig.image, &upgrades, &[]);
    }
    reports.next().unwrap();
    drop(front_end);
    backend.stop();
    while reports.next().is_some() {}
    let watched: Ran = watching.wait_with_output().unwrap().into();
    assert!(watched.fails().contains("does not answer"));
}
