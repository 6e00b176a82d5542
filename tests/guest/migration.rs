//! A guest is migrated to another QEMU, with another back-end and the same image, while fio
//! works on the disk and compares what it reads.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::backend::Backend;
use crate::common::img::ploop_img;
use crate::load::{self, Load};
use crate::qemu::{Guest, Running};
use crate::rig::Rig;

/// How often the guest goes from one to the other.
const MIGRATIONS: u32 = 3;

/// The longest that one may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

const OPTIONS: &[&str] = &["--lock=running", "--writeback-delay=5000"];

/// A back-end, and where its QEMU keeps its files.
struct Host {
    backend: Backend,
    folder: PathBuf,
}

impl Host {
    fn new(rig: &Rig, name: &str) -> Self {
        let folder = rig.path(name);
        std::fs::create_dir(&folder).expect("a folder can be made");
        let socket = folder.join("vhost.sock");
        Self {
            backend: Backend::start(&rig.disk, &socket, OPTIONS),
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

    /// Starts a QEMU that waits for the guest.
    fn waits_for_guest(&self, rig: &Rig, load: &Load) -> Running {
        let incoming = self.incoming();
        // A former one's.
        let _ = std::fs::remove_file(&incoming);
        let waits = self.guest(rig, load).incoming(&incoming).start();
        let start = Instant::now();
        while !incoming.exists() {
            assert!(start.elapsed() < PATIENCE, "QEMU does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        waits
    }
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

/// The time that the guest stood still, as QEMU says it.
fn downtime(said: &str) -> &str {
    let line = said
        .lines()
        .find(|line| line.contains("downtime:") && !line.contains("expected"));
    line.map_or("downtime: not said", str::trim)
}

/// Moves the guest, which works.
fn migrate(rig: &Rig, load: &Load, source: Running, to: &Host) -> Running {
    let target = to.waits_for_guest(rig, load);
    source.migrate(&to.incoming());
    let said = end_of(&source);
    assert!(said.contains("completed"), "{said}");
    eprintln!("{}", downtime(&said));
    let start = Instant::now();
    while !target.runs() {
        assert!(start.elapsed() < PATIENCE, "the guest does not go on");
        thread::sleep(Duration::from_millis(20));
    }
    source.quit();
    target
}

fn works_over_migrations(rig: &Rig, load: &Load) {
    let hosts = [Host::new(rig, "one"), Host::new(rig, "other")];
    let mut guest = hosts[0].guest(rig, load).boot();
    guest.wait_at("busy");
    guest.go_on();
    for migration in 1..=MIGRATIONS {
        thread::sleep(Duration::from_secs(2));
        guest = migrate(rig, load, guest, &hosts[migration as usize % 2]);
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

#[test]
fn a_guest_that_writes_is_migrated() {
    let Some(rig) = Rig::new() else { return };
    works_over_migrations(&rig, &load::NEW);
}

#[test]
fn a_migration_is_cancelled_and_another_one_meets_a_killed_back_end() {
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
    let target = hosts[1].waits_for_guest(&rig, load);
    guest.command("migrate_set_parameter max-bandwidth 1M");
    guest.migrate(&hosts[1].incoming());
    thread::sleep(Duration::from_secs(1));
    guest.command("migrate_cancel");
    let said = end_of(&guest);
    assert!(said.contains("cancelled"), "{said}");
    target.kill();
    guest.command("migrate_set_parameter max-bandwidth 10G");

    // A destination whose back-end has gone: the guest waits there until it is back.
    let target = hosts[1].waits_for_guest(&rig, load);
    let [one, Host { backend, folder }] = hosts;
    backend.kill();
    guest.migrate(&folder.join("incoming"));
    let said = end_of(&guest);
    let other = Backend::start(&rig.disk, &folder.join("vhost.sock"), OPTIONS);
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
    one.backend.stop();
    other.stop();
    crate::rig::check(&rig.disk);
}
