//! The back-end is killed under a guest that works, again and again: `ci/deaths.sh` does
//! it more often than is done here by itself.

use std::{
    env,
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::common::backend::Backend;
use crate::common::img::ploop_img;
use crate::common::small_fs::SmallFs;
use crate::load::{self, Load};
use crate::qemu::{Outcome, Running};
use crate::rig::{MIB, Rig};

/// Says how often the back-end is killed in each test, in place of what the test says.
const HOW_OFTEN: &str = "PLOOP_KILLS";

/// The longest that a kill and what belongs to it take, on a busy machine.
const PATIENCE_FOR_A_KILL: Duration = Duration::from_secs(10);

/// What the daemon says when the host is full.
const FULL: &str = "the host file system is full";

/// How often to kill.
fn kills(by_itself: u32) -> u32 {
    let said = env::var(HOW_OFTEN).ok();
    said.map_or(by_itself, |text| {
        let number = text.parse();
        number.unwrap_or_else(|_| panic!("{HOW_OFTEN} is {text:?}, not a number"))
    })
}

/// A time to let pass before the next kill: it should meet anything that goes on.
fn work_for_a_while(kill: u32) {
    thread::sleep(Duration::from_millis(
        700 + 290 * u64::from(kill % 4) + u64::from(kill),
    ));
}

/// A back-end that dies, and comes back.
struct Mortal<'a> {
    rig: &'a Rig,
    options: &'a [&'a str],
    backend: Backend,
    /// How many front-ends had come by its last death.
    connected: usize,
}

impl<'a> Mortal<'a> {
    fn new(rig: &'a Rig, options: &'a [&'a str]) -> Self {
        let backend = rig.serve(options);
        Self {
            rig,
            options,
            backend,
            connected: 0,
        }
    }

    fn die(self) -> Self {
        let Self { rig, options, .. } = self;
        let connected = self.has_said("connected");
        self.backend.kill();
        Self {
            connected,
            ..Self::new(rig, options)
        }
    }

    /// How often its log, which all of its lives have in common, says something.
    fn has_said(&self, what: &str) -> usize {
        self.backend.log().matches(what).count()
    }

    fn wait_until_it_says(&self, what: &str, times: usize) {
        let start = Instant::now();
        while self.has_said(what) < times {
            let log = self.backend.log();
            assert!(start.elapsed() < Duration::from_secs(60), "{what}?\n{log}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts a guest that works on the disk, and waits until it begins.
    fn start_guest(&self, cpus: u32, load: &Load, kills: u32) -> Running {
        let mut guest = self
            .rig
            .guest(&load.script())
            .cpus(cpus)
            .reconnecting_disk(self.backend.socket())
            .may_reboot()
            .patience(PATIENCE_FOR_A_KILL * kills)
            .boot();
        guest.wait_at("busy");
        guest.go_on();
        guest
    }

    /// Tells the guest that it is enough, and looks at what it and the disk say of it.
    fn end(self, mut guest: Running) -> Outcome {
        // A guest that has just come to the end of its work may be gone before QEMU has
        // connected again, and then nobody has come for what the image lacks.
        self.wait_until_it_says("connected", self.connected + 1);
        guest.go_on();
        let outcome = guest.finish();
        assert_eq!(outcome.value("verified"), "yes");
        let requests_in_flight = self.has_said("took over");
        assert!(requests_in_flight > 0, "no death met a request");
        self.rig.close(self.backend);
        outcome
    }
}

/// Has a guest work, and kills again and again.
fn die_often(rig: &Rig, options: &[&str], cpus: u32, load: &Load, kills: u32) {
    let mut mortal = Mortal::new(rig, options);
    let guest = mortal.start_guest(cpus, load, kills);
    for kill in 0..kills {
        work_for_a_while(kill);
        mortal = mortal.die();
    }
    mortal.end(guest);
}

#[test]
fn a_guest_does_not_notice_that_its_back_end_was_killed() {
    let Some(rig) = Rig::new() else { return };
    die_often(&rig, &["--writeback-delay=5000"], 2, &load::NEW, kills(10));
}

#[test]
fn deaths_under_four_queues_and_the_page_cache() {
    let Some(rig) = Rig::new() else { return };
    let options = ["--cache=writeback", "--writeback-delay=5000"];
    die_often(&rig, &options, 4, &load::NEW, kills(4));
}

#[test]
fn deaths_while_clusters_of_a_chain_are_copied() {
    let Some(rig) = Rig::with_bundle_of(&content_for_copies) else {
        return;
    };
    die_often(
        &rig,
        &["--writeback-delay=5000"],
        2,
        &load::OVER_OLD,
        kills(4),
    );
}

/// A disk with something in most of its first part, and two snapshots of it.
fn content_for_copies(folder: &Path, disk: &Path) {
    let raw = folder.join("raw");
    let file = File::create(&raw).expect("a file can be made");
    file.set_len(1 << 30).expect("it can be made longer");
    for at in (0..700).step_by(2) {
        let bytes = vec![at as u8 | 1; MIB as usize];
        file.write_all_at(&bytes, at * MIB)
            .expect("it can be written");
    }
    let convert = ["convert", "--cluster-size=64K"].map(str::as_ref);
    ploop_img(
        convert
            .into_iter()
            .chain([raw.as_os_str(), disk.as_os_str()]),
    )
    .ok();
    for _ in 0..2 {
        ploop_img(["snapshot".as_ref(), "create".as_ref(), disk.as_os_str()]).ok();
    }
}

#[test]
fn deaths_in_quick_succession() {
    let Some(rig) = Rig::new() else { return };
    let kills = kills(4);
    let mut mortal = Mortal::new(&rig, &["--writeback-delay=5000"]);
    let guest = mortal.start_guest(2, &load::NEW, kills);
    for kill in 0..kills {
        work_for_a_while(kill);
        let connected = mortal.has_said("connected");
        mortal = mortal.die();
        // While it opens the image, while it is told of the rings, and soon after.
        if kill % 3 > 0 {
            mortal.wait_until_it_says("connected", connected + 1);
            thread::sleep(Duration::from_millis(u64::from(kill % 3 - 1) * 20));
        }
        mortal = mortal.die();
    }
    mortal.end(guest);
}

#[test]
fn deaths_while_the_machine_is_paused() {
    let Some(rig) = Rig::new() else { return };
    let kills = kills(4);
    let mut mortal = Mortal::new(&rig, &["--writeback-delay=5000"]);
    let guest = mortal.start_guest(2, &load::NEW, kills);
    for kill in 0..kills {
        work_for_a_while(kill);
        let goes_on_without = kill % 2 > 0;
        guest.pause();
        mortal.backend.kill();
        if goes_on_without {
            guest.resume();
        }
        mortal.backend = rig.serve(mortal.options);
        if !goes_on_without {
            guest.resume();
        }
    }
    // So that a request is met for sure.
    work_for_a_while(0);
    mortal.die().end(guest);
}

#[test]
fn deaths_while_the_firmware_and_the_kernel_start() {
    let Some(rig) = Rig::new() else { return };
    let kills = kills(6);
    let mut mortal = Mortal::new(&rig, &["--writeback-delay=5000"]);
    let mut guest = mortal.start_guest(2, &load::NEW, kills);
    for kill in 0..kills {
        // The processors, the devices and the back-end's rings stop at the button.
        let started = mortal.has_said("connected");
        work_for_a_while(kill);
        guest.reset();
        if kill % 2 == 0 {
            thread::sleep(Duration::from_millis(u64::from(kill % 8) * 10));
            mortal = mortal.die();
        }
        // From then on until the kernel has seen the disk.
        thread::sleep(Duration::from_millis(150 * u64::from(kill % 20)));
        mortal = mortal.die();
        mortal.wait_until_it_says("connected", started + 1);
        guest.wait_at("busy");
        guest.go_on();
    }
    work_for_a_while(0);
    mortal.die().end(guest);
}

#[test]
fn deaths_on_a_full_host() {
    let Some(fs) = SmallFs::ext4(1100 * MIB) else {
        return;
    };
    let Some(rig) = Rig::on(fs.root()) else {
        return;
    };
    let kills = kills(4);
    let ballast = fs.fill_but(8 * MIB);
    let mut mortal = Mortal::new(&rig, &["--writeback-delay=5000"]);
    let guest = mortal.start_guest(2, &load::NEW, kills);
    mortal.wait_until_it_says(FULL, 1);
    for kill in 0..kills {
        work_for_a_while(kill);
        let full = mortal.has_said(FULL);
        mortal = mortal.die();
        mortal.wait_until_it_says(FULL, full + 1);
    }
    ballast.remove();
    work_for_a_while(0);
    mortal.end(guest);
}
