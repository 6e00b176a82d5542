//! The disk goes from process to process under a guest that works, whose QEMU is not told
//! to connect again: it has one connection all the time.

use std::thread;
use std::time::Duration;

use crate::load;
use crate::rig::Rig;

/// How often, unless `PLOOP_TAKE_OVERS` says so.
const TAKE_OVERS: u64 = 5;

#[test]
fn a_guest_does_not_notice_that_another_process_serves() {
    let Some(rig) = Rig::new() else { return };
    let upgrades = rig.path("upgrade");
    let socket = format!("--upgrade-socket={}", upgrades.display());
    let mut backend = rig.serve(&[&socket, "--writeback-delay=5000"]);
    let mut guest = rig
        .guest(&load::NEW.script())
        .cpus(2)
        .disk(backend.socket(), "")
        .start();
    // While the firmware or the kernel starts, too.
    backend = backend.taken_over(&rig.disk, &upgrades, &["--writeback-delay=5000"]);
    guest.wait_at("busy");
    guest.go_on();
    let take_overs = std::env::var("PLOOP_TAKE_OVERS").ok();
    let take_overs = take_overs.map_or(TAKE_OVERS, |number| number.parse().unwrap());
    for number in 0..take_overs {
        thread::sleep(Duration::from_millis(700 + 290 * (number % 4)));
        backend = backend.taken_over(&rig.disk, &upgrades, &["--writeback-delay=5000"]);
    }
    // A machine that is stopped and goes on sends messages of its own.
    guest.pause();
    backend = backend.taken_over(&rig.disk, &upgrades, &["--writeback-delay=5000"]);
    guest.resume();
    guest.go_on();
    assert_eq!(guest.finish().value("verified"), "yes");
    rig.close(backend);
}
