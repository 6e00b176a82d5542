//! A disk grows, and its guest gets to know.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::img::{ploop_img, sha256};
use crate::common::qmp::Qmp;
use crate::rig::{MIB, Rig};

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
        .boot();
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

/// A disk with a file system on it, in a bundle; its clusters and so its BAT are small.
fn make(_: &Path, disk: &Path) {
    let disk = disk.to_str().unwrap();
    ploop_img(["create", "--cluster-size", "32K", disk, "96M"]).ok();
}

const FILL: &str = r"
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    head -c 20m /dev/urandom >/mnt/old
    sha256sum /mnt/old >/mnt/sums
    umount /mnt
";

/// Of the disk, in MiB: in the first cluster of the BAT, in more of them, in many.
const SIZES: [u64; 3] = [200, 400, 20 << 10];

/// Grows the file system each time that the disk has grown, while others write to it, and
/// writes more than there was room for before.
const GROW: &str = r#"
    mount /dev/vda /mnt
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
    before=$(cat /sys/block/vda/size)
    report size_0 $before
    for round in 1 2 3; do
        meet_host "round $round"
        for try in $(seq 600); do
            after=$(cat /sys/block/vda/size)
            [ $after = $before ] || break
            sleep 0.1
        done
        report "size_$round" $after
        before=$after
        resize2fs /dev/vda
        report "room_$round" "$(df -m /mnt | tail -n 1 | awk '{ print $2 }')"
        dd if=/dev/urandom "of=/mnt/new$round" bs=1M count=40 conv=fsync
        sha256sum "/mnt/new$round" >>/mnt/sums
    done
    rm /busy
    while [ ! -e /over ]; do sleep 0.1; done
    [ ! -e /bad ]
    report verified "$(wc -l </tmp/rounds)"
    umount /mnt
    e2fsck -fn /dev/vda
    echo 3 >/proc/sys/vm/drop_caches
    mount /dev/vda /mnt
    sha256sum -c /mnt/sums
    umount /mnt
"#;

/// Which sums are right when the disk is served anew.
const LOOK: &str = r"
    mount -o ro /dev/vda /mnt
    sha256sum -c /mnt/sums
    report files $(wc -l </mnt/sums)
    umount /mnt
    e2fsck -fn /dev/vda
";

#[test]
fn a_mounted_file_system_grows_with_its_disk_under_load() {
    let Some(rig) = Rig::with_bundle_of(&make) else {
        return;
    };
    let backend = rig.serve(&[]);
    rig.guest(FILL).disk(backend.socket(), "").run();
    rig.close(backend);
    let disk = rig.disk.to_str().unwrap();
    ploop_img(["snapshot", "create", disk]).ok();
    let lower = sha256(&rig.disk.join("root.hds"));

    let control = rig.path("control");
    let backend = rig.serve(&[&format!("--control={}", control.display())]);
    let guest = rig.guest(GROW).cpus(2).disk(backend.socket(), "");
    let mut guest = guest.boot();
    let mut qmp = Qmp::connect(&control);
    for (round, size) in (1..).zip(SIZES) {
        guest.wait_at(&format!("round {round}"));
        let arguments = json!({ "node-name": "disk", "size": size * MIB });
        assert_eq!(qmp.ask("block_resize", arguments), json!({}));
        guest.go_on();
    }
    let outcome = guest.finish();
    assert_eq!(outcome.number("size_0"), 96 * MIB / 512);
    for (round, size) in (1..).zip(SIZES) {
        assert_eq!(outcome.number(&format!("size_{round}")), size * MIB / 512);
        let room = outcome.number(&format!("room_{round}"));
        assert!(room > size * 3 / 4 && room <= size, "{room} of {size} MiB");
    }
    assert!(outcome.number("verified") > 0);
    rig.close(backend);
    let info: Value =
        serde_json::from_str(&ploop_img(["info", "--output=json", disk]).ok()).unwrap();
    assert_eq!(info["virtual-size"], SIZES[2] * MIB);
    let descriptor = fs::read_to_string(rig.disk.join("DiskDescriptor.xml")).unwrap();
    let says = format!("<Disk_size>{}</Disk_size>", SIZES[2] * MIB / 512);
    assert!(descriptor.contains(&says), "{descriptor}");
    assert_eq!(sha256(&rig.disk.join("root.hds")), lower);

    let backend = rig.serve(&[]);
    let outcome = rig.guest(LOOK).disk(backend.socket(), "").run();
    assert_eq!(outcome.number("files"), 4);
    rig.close(backend);
}
