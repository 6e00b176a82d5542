//! What the disk adds to the time that a guest stands still when it is migrated.

use std::env;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use super::{CLOSED, Host, OPENED, Stall, migrate, switch_over, wait_for_guest};
use crate::load;
use crate::qemu::Running;
use crate::rig::Rig;

/// How often each of two guests goes, unless `PLOOP_MIGRATIONS` says so.
const MIGRATIONS: u32 = 50;

/// In which QEMU means to send the last of the memory, in milliseconds: its own choice of 300
/// would hide all else.
const DOWNTIME_LIMIT: u32 = 30;

/// Smallest, median and largest.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let middle = values[values.len() / 2];
    format!(
        "{:.0} .. {middle:.0} .. {:.0} ms",
        values[0],
        values[values.len() - 1]
    )
}

fn load_of_machine() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").expect("the kernel tells of its load");
    load.split(' ').next().unwrap_or_default().to_owned()
}

/// A guest that has no disk, which goes between two folders.
struct Diskless {
    folders: [PathBuf; 2],
    at: usize,
    guest: Option<Running>,
}

impl Diskless {
    fn boot(rig: &Rig, patience: Duration) -> Self {
        let folders = ["without", "without-other"].map(|name| rig.path(name));
        for folder in &folders {
            std::fs::create_dir(folder).expect("a folder can be made");
        }
        let guest = rig.guest_in(&folders[0], &load::in_memory_alone());
        let mut guest = guest.cpus(2).patience(patience).boot();
        guest.wait_at("busy");
        guest.go_on();
        Self {
            folders,
            at: 0,
            guest: Some(guest),
        }
    }

    /// Returns the time that it stood still.
    fn migrate(&mut self, rig: &Rig, patience: Duration) -> f64 {
        self.at = 1 - self.at;
        let folder = &self.folders[self.at];
        let incoming = folder.join("incoming");
        let target = rig.guest_in(folder, &load::in_memory_alone()).cpus(2);
        let target = wait_for_guest(target.patience(patience), &incoming);
        let source = self.guest.replace(target).expect("it runs");
        prepare(&source);
        switch_over(source, self.guest(), &incoming)
    }

    fn guest(&self) -> &Running {
        self.guest.as_ref().expect("it runs")
    }
}

fn prepare(source: &Running) {
    source.command(&format!(
        "migrate_set_parameter downtime-limit {DOWNTIME_LIMIT}"
    ));
    source.command("migrate_set_parameter max-bandwidth 10G");
}

/// Two guests in turn, with our disk and without any.
#[test]
#[ignore = "measures: for minutes, and best where nothing else runs"]
fn what_the_disk_adds_to_the_downtime() {
    let migrations = env::var("PLOOP_MIGRATIONS").ok();
    let migrations = migrations.map_or(MIGRATIONS, |text| text.parse().expect("a number"));
    let Some(rig) = Rig::with_bundle() else {
        return;
    };
    let patience = Duration::from_secs(60) * migrations;
    let load = &load::OVER_OLD_AND_IN_MEMORY;
    let hosts = [Host::new(&rig, "one"), Host::new(&rig, "other")];
    let mut guest = hosts[0].guest(&rig, load).patience(patience).boot();
    // Nobody has opened the disk since but the firmware, and then the kernel.
    let (closed, opened) = (hosts[0].last(CLOSED), hosts[0].last(OPENED));
    eprintln!("from firmware to kernel: closed in {closed} ms, opened in {opened} ms");
    guest.wait_at("busy");
    guest.go_on();
    guest.pause();
    let mut other = Diskless::boot(&rig, patience);
    let mut stalls = Vec::new();
    let mut without = Vec::new();
    for migration in 1..=migrations {
        other.guest().pause();
        guest.resume();
        thread::sleep(Duration::from_secs(2));
        let (to, from) = (migration as usize % 2, (migration as usize + 1) % 2);
        prepare(&guest);
        let stall;
        (guest, stall) = migrate(&rig, load, guest, &hosts[from], &hosts[to]);
        stalls.push(stall);
        guest.pause();
        other.guest().resume();
        thread::sleep(Duration::from_secs(2));
        without.push(other.migrate(&rig, patience));
        eprintln!(
            "{migration}: {stall:?}, without a disk {} ms, at a load of {}",
            without[without.len() - 1],
            load_of_machine()
        );
    }
    let of = |what: fn(&Stall) -> f64| stalls.iter().map(what).collect::<Vec<_>>();
    let added = stalls.iter().zip(&without);
    let added = added.map(|(stall, without)| stall.downtime + stall.opened - without);
    eprintln!("QEMU's downtime: {}", spread(of(|stall| stall.downtime)));
    eprintln!("closed in {}", spread(of(|stall| stall.closed)));
    eprintln!("opened in {}", spread(of(|stall| stall.opened)));
    eprintln!("both: {}", spread(of(|stall| stall.closed + stall.opened)));
    eprintln!(
        "QEMU's downtime without a disk: {}",
        spread(without.clone())
    );
    eprintln!("added by the disk: {}", spread(added.collect()));
    guest.resume();
    guest.go_on();
    let outcome = guest.finish();
    assert_eq!(outcome.value("verified"), "yes");
    for Host { backend, .. } in hosts {
        backend.stop();
    }
    crate::rig::check(&rig.disk);
}
