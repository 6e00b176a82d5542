//! What the guest is told about its disks, and what it may change.

use std::{fs, os::unix::fs::MetadataExt};

use crate::common::{self, backend::Backend};
use crate::rig::{MIB, Rig, check, create};

#[test]
fn shows_serial_and_limits() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&["--serial", "ploop-0123456789abcd"]);
    let outcome = rig
        .guest(
            r#"
            cd /sys/block/vda
            report serial "$(cat serial)"
            report sectors "$(cat size)"
            report read_only "$(cat ro)"
            report cache "$(cat cache_type)"
            report block "$(cat queue/logical_block_size)"
            report optimal "$(cat queue/optimal_io_size)"
            report discard_granularity "$(cat queue/discard_granularity)"
            report discard_max "$(cat queue/discard_max_bytes)"
            report zeroes_max "$(cat queue/write_zeroes_max_bytes)"
            report segments "$(cat queue/max_segments)"
            "#,
        )
        .disk(backend.socket(), "")
        .run();
    assert_eq!(outcome.value("serial"), "ploop-0123456789abcd");
    assert_eq!(outcome.number("sectors"), 2048 * 1024);
    assert_eq!(outcome.number("read_only"), 0);
    assert_eq!(outcome.value("cache"), "write back");
    assert_eq!(outcome.number("block"), 512);
    assert_eq!(outcome.number("optimal"), MIB, "the cluster");
    let host_block = fs::metadata(&rig.disk).expect("it is there").blksize();
    assert_eq!(outcome.number("discard_granularity"), host_block);
    assert!(outcome.number("discard_max") >= MIB);
    assert!(outcome.number("zeroes_max") >= MIB);
    assert!(outcome.number("segments") >= 126, "of 128 descriptors");
    rig.close(backend);
}

/// Writes 4 KiB straight to the disk, without a flush, and meets the host.
const WRITE_CACHE: &str = r#"
    # put PATTERN OFFSET
    put() {
        fio --name=put --filename=/dev/vda --rw=write --bs=4k --size=4k --direct=1 \
            --offset="$2" --buffer_pattern="$1" --minimal >/dev/null
    }
    echo "write through" >/sys/block/vda/cache_type
    report through "$(cat /sys/block/vda/queue/write_cache)"
    put 0x5a 100M
    meet_host through
    echo "write back" >/sys/block/vda/cache_type
    report back "$(cat /sys/block/vda/queue/write_cache)"
    put 0xa5 200M
    sync
    fio --name=flush --filename=/dev/vda --rw=write --bs=4k --size=4k --offset=300M \
        --buffer_pattern=0x77 --direct=1 --end_fsync=1 --minimal >/dev/null
    meet_host flushed
    put 0x66 400M
    echo "write through" >/sys/block/vda/cache_type
    meet_host through_again
"#;

#[test]
fn obeys_the_write_cache_switch() {
    let Some(rig) = Rig::new() else { return };
    if !common::require_tool("qemu-io") {
        return;
    }
    // So long that the mapping is in the file only if something asked for it.
    let backend = rig.serve(&["--writeback-delay", "60000"]);
    let mut guest = rig
        .guest(WRITE_CACHE)
        .disk(backend.socket(), ",config-wce=on")
        .boot();
    guest.wait_at("through");
    assert!(rig.qemu_io_finds(0x5a, 100 * MIB), "write-through");
    guest.go_on();

    guest.wait_at("flushed");
    assert!(rig.qemu_io_finds(0xa5, 200 * MIB), "before the flush");
    assert!(rig.qemu_io_finds(0x77, 300 * MIB), "flushed");
    guest.go_on();

    guest.wait_at("through_again");
    assert!(rig.qemu_io_finds(0x66, 400 * MIB), "the switch flushes");
    guest.go_on();

    let outcome = guest.finish();
    assert_eq!(outcome.value("through"), "write through");
    assert_eq!(outcome.value("back"), "write back");
    rig.close(backend);
}

#[test]
fn serves_a_read_only_disk_and_leaves_it_as_it_was() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    rig.guest(
        r"
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        head -c 5m /dev/urandom >/mnt/file
        cd /mnt && sha256sum file >sum
        cd / && umount /mnt
        ",
    )
    .disk(backend.socket(), "")
    .run();
    rig.close(backend);

    let before = fs::read(&rig.disk).expect("the image can be read");
    let modified = fs::metadata(&rig.disk).and_then(|m| m.modified());
    let backend = rig.serve(&["--read-only"]);
    let outcome = rig
        .guest(
            r"
            report read_only $(cat /sys/block/vda/ro)
            mount -o ro /dev/vda /mnt
            cd /mnt && sha256sum -c sum
            cd / && umount /mnt
            ! dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync
            ! blkdiscard -o 0 -l 1048576 /dev/vda
            e2fsck -fn /dev/vda
            ",
        )
        .disk(backend.socket(), "")
        .run();
    assert_eq!(outcome.number("read_only"), 1);
    rig.close(backend);
    assert!(fs::read(&rig.disk).expect("it can be read") == before);
    assert_eq!(
        fs::metadata(&rig.disk).and_then(|m| m.modified()).ok(),
        modified.ok()
    );
}

#[test]
fn serves_two_disks_to_one_guest() {
    let Some(rig) = Rig::new() else { return };
    let second = rig.path("second.hds");
    create(&second, "512M");
    let backend = rig.serve(&[]);
    let second_backend = Backend::start::<&str>(&second, &rig.path("second.sock"), &[]);
    rig.guest(
        r"
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        head -c 20m /dev/urandom >/mnt/file
        dd if=/mnt/file of=/dev/vdb bs=64k conv=fsync
        umount /mnt
        mount /dev/vda /mnt
        cmp /mnt/file /dev/vdb 2>&1 | grep -q 'EOF on /mnt/file'
        umount /mnt
        ",
    )
    .cpus(2)
    .disk(backend.socket(), "")
    .disk(second_backend.socket(), "")
    .run();
    rig.close(backend);
    second_backend.stop();
    check(&second);
}
