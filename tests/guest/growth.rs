//! A disk grows, and its guest gets to know.

use crate::common::img::ploop_img;
use crate::rig::Rig;

/// Waits for another size, and writes and reads where only the larger disk has sectors.
const WAIT_FOR_MORE: &str = r"
    before=$(cat /sys/block/vda/size)
    echo hello >/tmp/word
    dd if=/tmp/word of=/dev/vda bs=512 count=1 conv=sync oflag=direct
    report before $before
    meet_host small
    for try in $(seq 600); do
        after=$(cat /sys/block/vda/size)
        [ $after = $before ] || break
        sleep 0.1
    done
    report after $after
    dd if=/tmp/word of=/dev/vda bs=512 count=1 seek=$((after - 1)) conv=sync oflag=direct
    echo 3 >/proc/sys/vm/drop_caches
    for at in 0 $((after - 1)); do
        dd if=/dev/vda bs=512 count=1 skip=$at iflag=direct | grep hello
    done
";

#[test]
fn a_guest_sees_that_its_disk_has_grown_while_nobody_served_it() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    let mut guest = rig
        .guest(WAIT_FOR_MORE)
        .reconnecting_disk(backend.socket())
        .start();
    guest.wait_at("small");
    backend.stop();
    ploop_img(["resize".as_ref(), rig.disk.as_os_str(), "40G".as_ref()]).ok();
    let backend = rig.serve(&[]);
    guest.go_on();
    let outcome = guest.finish();
    assert_eq!(outcome.number("before"), 1 << 21);
    assert_eq!(outcome.number("after"), 40 << 21);
    rig.close(backend);
}
