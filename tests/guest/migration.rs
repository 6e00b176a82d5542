//! A guest is migrated to another QEMU, with another back-end and the same image, while fio
//! works on the disk and compares what it reads.

mod downtime;
mod mounts;
mod stages;

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use self::stages::{End, Stage};
use crate::common::backend::Backend;
use crate::common::img::ploop_img;
use crate::common::qmp::Qmp;
use crate::common::sockets::is_listened_on;
use crate::load::{self, Load};
use crate::qemu::{Guest, Running};
use crate::rig::Rig;

/// How often the guest goes from one to the other.
const MIGRATIONS: u32 = 5;

/// The longest that one may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a back-end says, before a time.
const CLOSED: &str = "the image was closed and unlocked in ";
const OPENED: &str = "the image was locked, read and opened in ";

/// What it says of a front-end.
const CONNECTED: &str = "has connected";

const OPTIONS: &[&str] = &["--lock=running", "--writeback-delay=5000"];

/// A back-end with the disk as it has it, and where its QEMU keeps its files.
struct Host {
    backend: Backend,
    disk: PathBuf,
    folder: PathBuf,
}

impl Host {
    fn new(rig: &Rig, name: &str) -> Self {
        Self::with_disk(rig, name, rig.disk.clone())
    }

    /// On which the disk has another path.
    fn with_disk(rig: &Rig, name: &str, disk: PathBuf) -> Self {
        let folder = rig.path(name);
        std::fs::create_dir(&folder).expect("a folder can be made");
        let backend = Self::serve(&disk, &folder);
        Self {
            backend,
            disk,
            folder,
        }
    }

    fn serve(disk: &Path, folder: &Path) -> Backend {
        let control = format!("--control={}", folder.join("control").display());
        let options = [OPTIONS, &[&control]].concat();
        Backend::start(disk, &folder.join("vhost.sock"), &options)
    }

    /// Kills the back-end, and starts another one in its place.
    fn replace_backend(self) -> Self {
        let Self {
            backend,
            disk,
            folder,
        } = self;
        backend.kill();
        let backend = Self::serve(&disk, &folder);
        Self {
            backend,
            disk,
            folder,
        }
    }

    fn incoming(&self) -> PathBuf {
        self.folder.join("incoming")
    }

    fn guest<'a>(&'a self, rig: &'a Rig, load: &Load) -> Guest<'a> {
        rig.guest_in(&self.folder, &load.script())
            .cpus(2)
            .patience(PATIENCE * MIGRATIONS)
            .reconnecting_disk(self.backend.socket())
    }

    fn control(&self) -> PathBuf {
        self.folder.join("control")
    }

    /// How long it took last to close the image, or to open it, as the log says, in
    /// milliseconds.
    fn last(&self, what: &str) -> f64 {
        let log = self.backend.log();
        let mut lines = log.lines().rev();
        let line = lines.find_map(|line| line.split_once(what));
        let (_, time) = line.unwrap_or_else(|| panic!("{what}?\n{log}"));
        time.trim_end_matches(" ms").parse().expect("it is a time")
    }

    /// How often its log, which all of its back-ends have in common, says something.
    fn has_said(&self, what: &str) -> usize {
        self.backend.log().matches(what).count()
    }

    /// Waits until it has said it that often.
    fn wait_to_say(&self, what: &str, times: usize) {
        let start = Instant::now();
        while self.has_said(what) < times {
            let log = self.backend.log();
            assert!(start.elapsed() < PATIENCE, "{what}?\n{log}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts a QEMU that waits for the guest.
    fn waits_for_guest(&self, rig: &Rig, load: &Load) -> Running {
        wait_for_guest(self.guest(rig, load), &self.incoming())
    }
}

/// Starts a QEMU that waits for a guest at this socket.
fn wait_for_guest(guest: Guest<'_>, incoming: &Path) -> Running {
    // A former one's.
    let _ = std::fs::remove_file(incoming);
    let waits = guest.incoming(incoming).start();
    let start = Instant::now();
    while !is_listened_on(incoming) {
        assert!(start.elapsed() < PATIENCE, "QEMU does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    waits
}

/// Waits until a migration has ended. Returns what QEMU says of it.
fn end_of(source: &Running) -> String {
    let start = Instant::now();
    loop {
        let said = source.migration();
        if ["completed", "failed", "cancelled"]
            .iter()
            .any(|end| said.contains(end))
        {
            return said;
        }
        assert!(start.elapsed() < PATIENCE, "{said}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// How long a guest stood still, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Stall {
    /// As QEMU says it on the source: the image is closed within it, and opened after it.
    downtime: f64,
    closed: f64,
    opened: f64,
}

/// Moves a guest to a QEMU that waits for it. Returns the time that it stood still, as the
/// source says it, in milliseconds.
fn switch_over(source: Running, target: &Running, incoming: &Path) -> f64 {
    source.migrate(incoming);
    let said = end_of(&source);
    assert!(said.contains("completed"), "{said}");
    let start = Instant::now();
    while !target.runs() {
        assert!(start.elapsed() < PATIENCE, "the guest does not go on");
        thread::sleep(Duration::from_millis(20));
    }
    source.quit();
    let mut lines = said.lines().map(str::trim);
    let time = lines.find_map(|line| line.strip_prefix("downtime: ")?.split(' ').next());
    let time = time.unwrap_or_else(|| panic!("no downtime: {said}"));
    time.parse().expect("it is a number")
}

/// Moves the guest, which works.
fn migrate(rig: &Rig, load: &Load, source: Running, from: &Host, to: &Host) -> (Running, Stall) {
    let target = to.waits_for_guest(rig, load);
    let downtime = switch_over(source, &target, &to.incoming());
    let stall = Stall {
        downtime,
        closed: from.last(CLOSED),
        opened: to.last(OPENED),
    };
    eprintln!("{stall:?}");
    (target, stall)
}

fn works_over_migrations(rig: &Rig, load: &Load) {
    let hosts = [Host::new(rig, "one"), Host::new(rig, "other")];
    let mut guest = hosts[0].guest(rig, load).boot();
    guest.wait_at("busy");
    guest.go_on();
    for migration in 1..=MIGRATIONS {
        thread::sleep(Duration::from_secs(2));
        let (to, from) = (migration as usize % 2, (migration as usize + 1) % 2);
        if rig.disk.is_dir() {
            change(&hosts[from], migration);
        }
        (guest, _) = migrate(rig, load, guest, &hosts[from], &hosts[to]);
    }
    thread::sleep(Duration::from_secs(1));
    guest.go_on();
    let outcome = guest.finish();
    assert_eq!(outcome.value("verified"), "yes");
    // Both have let it go, though they are there.
    crate::rig::check(&rig.disk);
    for Host { backend, .. } in hosts {
        backend.stop();
    }
    crate::rig::check(&rig.disk);
}

/// Something is done to the disk while it is served, before the guest goes elsewhere.
fn change(host: &Host, number: u32) {
    let mut qmp = Qmp::connect(&host.control());
    if number % 2 == 1 {
        let name = format!("before migration {number}");
        qmp.ask("snapshot-create", json!({ "description": name }));
    } else {
        qmp.ask("grow", json!({ "by": 64 << 20 }));
    }
}

#[test]
fn a_guest_that_writes_is_migrated() {
    let Some(rig) = Rig::new() else { return };
    works_over_migrations(&rig, &load::NEW);
}

#[test]
fn a_guest_is_migrated_whose_disk_grows_and_is_snapshotted_in_between() {
    let Some(rig) = Rig::with_bundle() else {
        return;
    };
    works_over_migrations(&rig, &load::OVER_OLD);
    // As the last one has left it.
    let info = ploop_img(["info".as_ref(), rig.disk.as_os_str()]).ok();
    assert!(
        info.contains("1.125 GiB") || info.contains("1207959552"),
        "{info}"
    );
}

/// What can become of a migration but an end that is well: each time the guest goes on, on the
/// one host or the other.
#[test]
fn destinations_die_and_wait_and_a_source_loses_its_back_end() {
    let Some(rig) = Rig::with_bundle() else {
        return;
    };
    let load = &load::OVER_OLD;
    let hosts = [Host::new(&rig, "one"), Host::new(&rig, "other")];
    let mut guest = hosts[0].guest(&rig, load).boot();
    guest.wait_at("busy");
    guest.go_on();

    // A destination that is killed in the midst.
    let target = hosts[1].waits_for_guest(&rig, load);
    guest.command("migrate_set_parameter max-bandwidth 4M");
    guest.migrate(&hosts[1].incoming());
    thread::sleep(Duration::from_secs(1));
    target.kill();
    let said = end_of(&guest);
    assert!(said.contains("failed"), "{said}");
    assert!(guest.runs());
    guest.command("migrate_set_parameter max-bandwidth 10G");
    thread::sleep(Duration::from_secs(1));

    // A destination that is to wait: the image is nobody's meanwhile.
    let target = hosts[1].waits_for_guest(&rig, load);
    target.pause();
    guest.migrate(&hosts[1].incoming());
    let said = end_of(&guest);
    assert!(said.contains("completed"), "{said}");
    assert!(!target.runs());
    let free = ploop_img(["check".as_ref(), rig.disk.as_os_str()]);
    assert_eq!(free.code, Some(0), "{free:?}");
    guest.quit();
    target.resume();
    guest = target;
    thread::sleep(Duration::from_secs(2));

    // The source's back-end is killed in the midst, and QEMU meets the next one.
    let target = hosts[0].waits_for_guest(&rig, load);
    guest.command("migrate_set_parameter max-bandwidth 4M");
    guest.migrate(&hosts[0].incoming());
    thread::sleep(Duration::from_secs(1));
    let [one, other] = hosts;
    let opened = other.has_said(OPENED);
    let hosts = [one, other.replace_backend()];
    hosts[1].wait_to_say(OPENED, opened + 1);
    guest.command("migrate_set_parameter max-bandwidth 10G");
    let said = end_of(&guest);
    assert!(said.contains("completed"), "{said}");
    guest.quit();
    guest = target;
    thread::sleep(Duration::from_secs(2));

    // The destination's is, which has nothing open, and QEMU meets the next one there, too.
    let target = hosts[1].waits_for_guest(&rig, load);
    guest.command("migrate_set_parameter max-bandwidth 4M");
    guest.migrate(&hosts[1].incoming());
    thread::sleep(Duration::from_secs(1));
    let [one, other] = hosts;
    let connected = other.has_said(CONNECTED);
    let hosts = [one, other.replace_backend()];
    hosts[1].wait_to_say(CONNECTED, connected + 1);
    guest.command("migrate_set_parameter max-bandwidth 10G");
    let said = end_of(&guest);
    assert!(said.contains("completed"), "{said}");
    guest.quit();
    guest = target;
    thread::sleep(Duration::from_secs(1));

    // A source that is killed takes the guest along, and leaves the image as at its end.
    let target = hosts[0].waits_for_guest(&rig, load);
    guest.command("migrate_set_parameter max-bandwidth 4M");
    guest.migrate(&hosts[0].incoming());
    thread::sleep(Duration::from_secs(1));
    let closed = hosts[1].has_said(CLOSED);
    guest.kill();
    hosts[1].wait_to_say(CLOSED, closed + 1);
    target.kill();
    crate::rig::check(&rig.disk);
    let mut guest = hosts[0].guest(&rig, load).boot();
    guest.wait_at("busy");
    guest.go_on();
    guest.go_on();
    let outcome = guest.finish();
    assert_eq!(outcome.value("verified"), "yes");
    for Host { backend, .. } in hosts {
        backend.stop();
    }
    crate::rig::check(&rig.disk);
}

#[test]
fn a_migration_comes_to_nothing_at_each_stage_and_another_meets_a_killed_back_end() {
    let Some(rig) = Rig::with_bundle() else {
        return;
    };
    ploop_img(["snapshot".as_ref(), "create".as_ref(), rig.disk.as_os_str()]).ok();
    let load = &load::OVER_OLD;
    let hosts = [Host::new(&rig, "one"), Host::new(&rig, "other")];
    let mut guest = hosts[0].guest(&rig, load).boot();
    guest.wait_at("busy");
    guest.go_on();
    thread::sleep(Duration::from_secs(1));

    // It goes on where it is.
    for stage in Stage::ALL {
        for end in [End::Cancelled, End::Failed] {
            stages::comes_to_nothing(&rig, &guest, &hosts[0], stage, end);
        }
    }
    (guest, _) = migrate(&rig, load, guest, &hosts[0], &hosts[1]);
    thread::sleep(Duration::from_secs(1));

    // A destination whose back-end has gone: the guest waits there until it is back.
    let target = hosts[0].waits_for_guest(&rig, load);
    let [one, other] = hosts;
    let Host {
        backend, folder, ..
    } = one;
    backend.kill();
    guest.migrate(&folder.join("incoming"));
    let said = end_of(&guest);
    let backend = Host::serve(&rig.disk, &folder);
    if said.contains("completed") {
        guest.quit();
        guest = target;
    } else {
        // QEMU would not go on without it: the guest goes on where it was.
        target.kill();
        guest.resume();
    }
    thread::sleep(Duration::from_secs(2));
    guest.go_on();
    let outcome = guest.finish();
    assert_eq!(outcome.value("verified"), "yes");
    backend.stop();
    other.backend.stop();
    crate::rig::check(&rig.disk);
}
