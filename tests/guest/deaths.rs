//! The back-end is killed under a guest that works, again and again.

use std::thread;
use std::time::Duration;

use crate::rig::Rig;

/// How often.
const KILLS: u64 = 10;

/// Writes to new clusters at depth 64, with discards and flushes among them, and
/// compares all of it.
const WRITE_AND_VERIFY: &str = r"
    meet_host busy
    fio --name=trim --filename=/dev/vda --offset=800M --size=200M --rw=randtrim --bs=1M \
        --ioengine=libaio --direct=1 --iodepth=4 --time_based --runtime=20 --minimal &
    fio --name=load --filename=/dev/vda --size=700M --io_size=96M --rw=randwrite --bs=16k \
        --ioengine=libaio --direct=1 --iodepth=64 --fdatasync=500 --verify=crc32c \
        --verify_fatal=1 --loops=2 --minimal
    wait
    if dmesg | grep -E 'I/O error|is not a head|blk_update|hung task'; then exit 1; fi
    report verified yes
";

#[test]
fn a_guest_does_not_notice_that_its_back_end_was_killed() {
    let Some(rig) = Rig::new() else { return };
    let mut backend = rig.serve(&["--writeback-delay=5000"]);
    let mut guest = rig
        .guest(WRITE_AND_VERIFY)
        .cpus(2)
        .reconnecting_disk(backend.socket())
        .start();
    guest.wait_at("busy");
    guest.go_on();
    for kill in 0..KILLS {
        thread::sleep(Duration::from_millis(700 + 290 * (kill % 4)));
        backend.kill();
        backend = rig.serve(&["--writeback-delay=5000"]);
    }
    assert_eq!(guest.finish().value("verified"), "yes");
    let taken_over = backend.log().matches("took over").count();
    assert!(taken_over > 3, "{taken_over} were taken over");
    rig.close(backend);
}
