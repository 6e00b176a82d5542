//! Guests with this or that many queues verify what they wrote.

use std::{thread, time::Duration};

use crate::rig::Rig;

/// Formats the disk and lets fio verify what it wrote, with as many jobs as
/// there are processors.
const FORMAT_AND_VERIFY: &str = r"
    report queues $(ls /sys/block/vda/mq | wc -l)
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    fio --name=job --directory=/mnt --numjobs=$(nproc) --size=16M --rw=randrw --bsrange=512-64k \
        --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 --minimal
    umount /mnt
    e2fsck -fn /dev/vda
";

/// Runs [`FORMAT_AND_VERIFY`] and returns how many queues the guest had.
fn format_and_verify(rig: &Rig, cpus: u32, properties: &str) -> u64 {
    let backend = rig.serve(&[]);
    let outcome = rig
        .guest(FORMAT_AND_VERIFY)
        .cpus(cpus)
        .disk(backend.socket(), properties)
        .run();
    rig.close(backend);
    outcome.number("queues")
}

#[test]
fn verifies_with_one_queue() {
    let Some(rig) = Rig::new() else { return };
    assert_eq!(format_and_verify(&rig, 1, ",num-queues=1"), 1);
}

#[test]
fn verifies_with_four_queues() {
    let Some(rig) = Rig::new() else { return };
    assert_eq!(format_and_verify(&rig, 4, ",num-queues=4"), 4);
}

#[test]
fn verifies_with_eight_queues_of_sixteen_descriptors() {
    let Some(rig) = Rig::new() else { return };
    let queues = format_and_verify(&rig, 8, ",num-queues=8,queue-size=16");
    assert_eq!(queues, 8);
}

#[test]
fn verifies_with_as_many_queues_as_qemu_chooses() {
    let Some(rig) = Rig::new() else { return };
    assert_eq!(format_and_verify(&rig, 4, ""), 4);
}

#[test]
fn verifies_with_more_queues_than_processors() {
    let Some(rig) = Rig::new() else { return };
    assert_eq!(format_and_verify(&rig, 2, ",num-queues=5"), 2);
}

#[test]
fn verifies_in_a_driver_of_old() {
    // Neither VERSION_1 nor the registers of virtio 1.0.
    let Some(rig) = Rig::new() else { return };
    assert_eq!(format_and_verify(&rig, 2, ",disable-modern=on"), 2);
}

#[test]
fn verifies_while_qemu_stops_and_continues() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    let mut guest = rig
        .guest(
            r"
            meet_host start
            fio --name=job --filename=/dev/vda --numjobs=2 --size=48M --offset_increment=64M \
                --rw=randrw --bsrange=4k-64k --ioengine=libaio --direct=1 --iodepth=16 \
                --verify=crc32c --verify_fatal=1 --time_based --runtime=10 --minimal
            ",
        )
        .cpus(2)
        .disk(backend.socket(), "")
        .boot();
    guest.wait_at("start");
    guest.go_on();
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(300));
        guest.pause();
        thread::sleep(Duration::from_millis(50));
        guest.resume();
    }
    guest.finish();
    rig.close(backend);
}
