//! A disk is compacted while its guest uses it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;

use crate::common::img::ploop_img;
use crate::common::qmp::Qmp;
use crate::rig::{MIB, Rig};

fn make(_: &Path, disk: &Path) {
    let disk = disk.to_str().unwrap();
    ploop_img(["create", "--cluster-size", "64K", disk, "192M"]).ok();
}

/// Half of what was there is zeros, and another part is gone without a discard; then others
/// write and compare while the host compacts.
const LOAD: &str = r#"
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    head -c 30m /dev/urandom >/mnt/old
    sha256sum /mnt/old >/mnt/sums
    head -c 40m /dev/urandom >/mnt/zeros
    sync
    dd if=/dev/zero of=/mnt/zeros bs=1M count=40 conv=notrunc,fsync
    head -c 20m /dev/urandom >/mnt/gone
    sync
    rm /mnt/gone
    sync
    fstrim /mnt || true
    touch /busy
    (
        while [ -e /busy ]; do
            fio --name=load --filename=/mnt/load --size=20M --rw=randwrite --bsrange=4k-64k \
                --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 \
                --minimal >/tmp/fio || touch /bad
            echo verified >>/tmp/rounds
        done
        touch /over
    ) &
    meet_host loaded
    rm /busy
    while [ ! -e /over ]; do sleep 0.1; done
    [ ! -e /bad ]
    report verified "$(wc -l </tmp/rounds)"
    umount /mnt
    e2fsck -fn /dev/vda
    echo 3 >/proc/sys/vm/drop_caches
    mount /dev/vda /mnt
    sha256sum -c /mnt/sums
    cmp /mnt/zeros /dev/zero 2>&1 | grep EOF
    umount /mnt
"#;

#[test]
fn a_mounted_file_system_under_load_is_compacted() {
    let Some(rig) = Rig::with_bundle_of(&make) else {
        return;
    };
    let control = rig.path("control");
    let backend = rig.serve(&[&format!("--control={}", control.display())]);
    let guest = rig.guest(LOAD).cpus(2).disk(backend.socket(), "");
    let mut guest = guest.boot();
    let mut qmp = Qmp::connect(&control);
    guest.wait_at("loaded");
    let space = || fs::metadata(rig.disk.join("root.hds")).unwrap().blocks() * 512;
    let before = space();
    for _ in 0..3 {
        qmp.ask("compact", json!({}));
        while qmp.event("JOB_STATUS_CHANGE")["status"] != "null" {}
    }
    let ended = space();
    assert!(ended + 30 * MIB < before, "{before} bytes, then {ended}");
    guest.go_on();
    let outcome = guest.finish();
    assert!(outcome.number("verified") > 0);
    rig.close(backend);
}
