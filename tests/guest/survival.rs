//! Data outlives guests, QEMU and the back-end.

use crate::common::backend::Backend;
use crate::qemu::Running;
use crate::rig::Rig;

/// First boot: writes files, remembers their checksums, starts more writing and
/// meets the host at "busy". Any later boot: finds them.
const WRITE_OR_FIND: &str = r"
    if ! mount -t ext4 /dev/vda /mnt; then
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        for n in 1 2 3 4 5; do head -c 3m /dev/urandom >/mnt/$n; done
        (cd /mnt && sha256sum ? >sums)
        sync
        fio --name=load --directory=/mnt --size=64M --rw=randwrite --bsrange=4k-128k \
            --ioengine=libaio --direct=1 --iodepth=16 --time_based --runtime=1000 --minimal &
        while [ ! -s /mnt/load.0.0 ]; do sleep 0.1; done
        sleep 1
        meet_host busy
        BEFORE_THE_END
    fi
    (cd /mnt && sha256sum -c sums)
    umount /mnt
    e2fsck -fn /dev/vda
    report found yes
";

/// Lets `disturb` do something to a guest that writes, and expects that the
/// data of before is there afterwards.
fn finds_data_after(last_line: &str, disturb: impl FnOnce(&Rig, Running, &Backend)) {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    let script = WRITE_OR_FIND.replace("BEFORE_THE_END", last_line);
    let mut guest = rig
        .guest(&script)
        .cpus(2)
        .disk(backend.socket(), "")
        .may_reboot()
        .boot();
    guest.wait_at("busy");
    disturb(&rig, guest, &backend);
    rig.close(backend);
}

/// A new QEMU on the back-end that the former one used.
fn boot_again(rig: &Rig, backend: &Backend) {
    let outcome = rig
        .guest(WRITE_OR_FIND)
        .cpus(2)
        .disk(backend.socket(), "")
        .run();
    assert_eq!(outcome.value("found"), "yes");
}

/// fio is killed, not ended by SIGTERM: then it may wait for ever for its last requests
/// when the disk, QEMU's own raw one as well, has answered all of them.
#[test]
fn finds_data_after_the_guest_rebooted() {
    finds_data_after("killall -9 fio; wait; reboot -f", |_, mut guest, _| {
        guest.go_on();
        assert_eq!(guest.finish().value("found"), "yes");
    });
}

#[test]
fn finds_data_after_a_reset() {
    finds_data_after("", |_, guest, _| {
        guest.reset();
        assert_eq!(guest.finish().value("found"), "yes");
    });
}

#[test]
fn finds_data_after_qemu_quit() {
    finds_data_after("", |rig, guest, backend| {
        guest.quit();
        boot_again(rig, backend);
    });
}

#[test]
fn finds_data_after_qemu_was_killed() {
    finds_data_after("", |rig, guest, backend| {
        guest.kill();
        boot_again(rig, backend);
    });
}

#[test]
fn finds_data_after_the_back_end_was_restarted() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    let mut guest = rig
        .guest(
            r"
            mkfs.ext4 -q /dev/vda
            mount /dev/vda /mnt
            head -c 8m /dev/urandom >/mnt/file
            sha256sum /mnt/file >/mnt/sum
            sync
            meet_host idle
            echo 3 >/proc/sys/vm/drop_caches
            sha256sum -c /mnt/sum
            fio --name=job --directory=/mnt --size=16M --rw=randrw --bsrange=4k-64k \
                --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --minimal
            umount /mnt
            e2fsck -fn /dev/vda
            ",
        )
        .cpus(2)
        .reconnecting_disk(backend.socket())
        .boot();
    guest.wait_at("idle");
    backend.stop();
    let backend = rig.serve(&[]);
    guest.go_on();
    guest.finish();
    rig.close(backend);
}
