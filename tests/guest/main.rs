//! Guests under QEMU use disks that `vhost-user-ploop` serves.
//!
//! Nothing here looks inside the daemon: what counts is what a stock guest
//! sees, what is in the image file, and what `qemu-img` thinks of it.

#[path = "../common/mod.rs"]
mod common;
mod qemu;

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use common::backend::Backend;
use common::img::{ploop_img, qemu_img_check, run};
use qemu::{Guest, Image, Running};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A folder with one disk, and the guest image to use it with.
struct Rig {
    guest: Image,
    folder: TempDir,
    disk: PathBuf,
}

impl Rig {
    /// Makes a disk of 1 GiB; `None`, said aloud, if this machine can't run
    /// guests.
    fn new() -> Option<Self> {
        let guest = Image::find()?;
        let folder = TempDir::new().expect("a folder can be made");
        let disk = folder.path().join("disk.hds");
        create(&disk, "1G");
        Some(Self {
            guest,
            folder,
            disk,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&self, options: &[&str]) -> Backend {
        Backend::start(&self.disk, &self.path("vhost.sock"), options)
    }

    /// A guest with no disk yet that runs `script`.
    fn guest(&self, script: &str) -> Guest<'_> {
        Guest::new(&self.guest, self.folder.path(), script)
    }

    /// Ends the back-end and looks at what it leaves.
    fn close(&self, backend: Backend) {
        backend.stop();
        check(&self.disk);
    }

    /// What the image file takes on the host, in bytes.
    fn space(&self) -> u64 {
        fs::metadata(&self.disk).expect("it is there").blocks() * 512
    }

    /// Waits until the image file takes `bytes` or less: space is given back
    /// after the guest has its answer.
    fn wait_for_space(&self, bytes: u64) {
        let start = Instant::now();
        while self.space() > bytes {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "the image takes {} bytes, not the {bytes} that it should",
                self.space()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether the image as it is on the host now, with its in-use mark, has
    /// `pattern` in all of the 4 KiB at `offset`, read by another program.
    fn qemu_io_finds(&self, pattern: u8, offset: u64) -> bool {
        let copy = self.path("copy.hds");
        fs::copy(&self.disk, &copy).expect("the image can be copied");
        let read = format!("read -P {pattern} {offset} 4k");
        let args = ["-r", "-f", "parallels", "-c", &read].map(OsStr::new);
        let ran = run("qemu-io", args.into_iter().chain([copy.as_os_str()]));
        assert!(ran.stdout.contains("read 4096/4096"), "{ran:?}");
        ran.code == Some(0) && !ran.stdout.contains("Pattern verification failed")
    }
}

fn create(disk: &Path, size: &str) {
    ploop_img(["create".as_ref(), disk.as_os_str(), size.as_ref()]).ok();
}

/// Asks both tools whether an image is clean.
fn check(disk: &Path) {
    ploop_img(["check".as_ref(), disk.as_os_str()]).ok();
    qemu_img_check(disk);
}

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
        .start();
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

#[test]
fn gives_space_back_on_fstrim() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    let mut guest = rig
        .guest(
            r"
            # ext4 trims what was deleted only when its journal is done with it.
            trim() {
                umount /mnt
                mount /dev/vda /mnt
                fstrim /mnt
            }
            mkfs.ext4 -q /dev/vda
            mount /dev/vda /mnt
            fio --name=big --filename=/mnt/big --rw=write --bs=1M --size=300M --minimal
            for n in $(seq 200); do dd if=/mnt/big of=/mnt/$n bs=64k count=1 2>/dev/null; done
            sync
            meet_host full
            rm /mnt/big
            trim
            meet_host trimmed
            # Every other one: holes smaller than a cluster.
            for n in $(seq 1 2 200); do rm /mnt/$n; done
            trim
            meet_host thinned
            umount /mnt
            e2fsck -fn /dev/vda
            ",
        )
        .disk(backend.socket(), "")
        .start();
    guest.wait_at("full");
    let full = rig.space();
    assert!(full > 300 * MIB);
    guest.go_on();

    guest.wait_at("trimmed");
    rig.wait_for_space(full - 290 * MIB);
    let trimmed = rig.space();
    guest.go_on();

    guest.wait_at("thinned");
    rig.wait_for_space(trimmed - 100 * 65536 * 9 / 10);
    guest.go_on();
    guest.finish();
    rig.close(backend);
}

#[test]
fn discards_and_zeroes_what_it_is_asked_to() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    rig.guest(
        r#"
        # bytes OFFSET LENGTH: how many of them are not zero
        filled() {
            dd if=/dev/vda bs=512 skip=$(($1 / 512)) count=$(($2 / 512)) 2>/dev/null | tr -d '\0' | wc -c
        }
        M=1048576
        tr '\0' y </dev/zero | dd of=/dev/vda bs=1M count=12 iflag=fullblock conv=fsync
        blkdiscard -o $((2 * M)) -l $((2 * M)) /dev/vda
        blkdiscard -o $((5 * M + 65536)) -l 131072 /dev/vda
        blkdiscard -z -o $((6 * M)) -l $M /dev/vda
        blkdiscard -z -o $((7 * M + 512)) -l 1536 /dev/vda
        fallocate -p -o $((8 * M)) -l $M /dev/vda
        fallocate -p -o $((10 * M - 4096)) -l 8192 /dev/vda
        echo 3 >/proc/sys/vm/drop_caches

        [ "$(filled 0 $((2 * M)))" = $((2 * M)) ]
        [ "$(filled $((2 * M)) $((2 * M)))" = 0 ]
        [ "$(filled $((4 * M)) $M)" = $M ]
        [ "$(filled $((5 * M)) $M)" = $((M - 131072)) ]
        [ "$(filled $((5 * M + 65536)) 131072)" = 0 ]
        [ "$(filled $((6 * M)) $M)" = 0 ]
        [ "$(filled $((7 * M)) $M)" = $((M - 1536)) ]
        [ "$(filled $((7 * M + 512)) 1536)" = 0 ]
        [ "$(filled $((8 * M)) $M)" = 0 ]
        [ "$(filled $((9 * M)) $((2 * M)))" = $((2 * M - 8192)) ]
        [ "$(filled $((11 * M)) $((2 * M)))" = $M ]
        "#,
    )
    .disk(backend.socket(), "")
    .run();
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
        .start();
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
        .start();
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

#[test]
fn finds_data_after_the_guest_rebooted() {
    finds_data_after("killall fio; wait; reboot -f", |_, mut guest, _| {
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
        .start();
    guest.wait_at("idle");
    backend.stop();
    let backend = rig.serve(&[]);
    guest.go_on();
    guest.finish();
    rig.close(backend);
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
