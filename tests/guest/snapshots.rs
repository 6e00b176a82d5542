//! A guest's disk is kept, changed, looked at as it was, and taken back.

use serde_json::json;

use crate::common::backend::Backend;
use crate::common::img::{names_in, ploop_img, sha256};
use crate::common::qmp::Qmp;
use crate::qemu::Outcome;
use crate::rig::{Rig, check};

/// `look DISK`: mounts it as it is, without a look at its journal, and reports
/// the digests of what is there.
const LOOK: &str = r#"
    look() {
        report "$1_read_only" "$(cat /sys/block/$1/ro)"
        mount -o ro,noload "/dev/$1" /mnt
        report "$1_digest" "$(sha256sum </mnt/old | cut -d ' ' -f 1)"
        report "$1_files" "$(ls /mnt | tr '\n' ' ')"
        umount /mnt
    }
"#;

/// What a look at a disk shows.
#[derive(Debug, PartialEq, Eq)]
struct Sight {
    digest: String,
    files: String,
}

impl Sight {
    /// What the guest saw on `disk`, "vda" the first.
    fn of(outcome: &Outcome, disk: &str, is_snapshot: bool) -> Self {
        let read_only = outcome.number(&format!("{disk}_read_only"));
        assert_eq!(read_only, u64::from(is_snapshot), "{disk}");
        let value = |what| outcome.value(&format!("{disk}_{what}")).to_owned();
        Self {
            digest: value("digest"),
            files: value("files"),
        }
    }
}

/// Changes the disk in a guest, and looks at it.
fn change(rig: &Rig, script: &str) -> Sight {
    let backend = rig.serve(&[]);
    let outcome = rig
        .guest(&format!("{LOOK}{script}look vda"))
        .cpus(2)
        .disk(backend.socket(), "")
        .run();
    rig.close(backend);
    Sight::of(&outcome, "vda", false)
}

fn look(rig: &Rig) -> Sight {
    change(rig, "")
}

/// Changes the disk in a guest that has a snapshot of it beside, read-only, looks
/// at both, and finds the snapshot as it was before.
fn change_beside(rig: &Rig, snapshot: &str, script: &str) -> (Sight, Sight) {
    let backend = rig.serve(&[]);
    let options = ["--snapshot", snapshot];
    let of_snapshot = Backend::start(&rig.disk, &rig.path("snapshot.sock"), &options);
    let outcome = rig
        .guest(&format!(
            "{LOOK}
             head -c 40m /dev/vdb | sha256sum >/sum
             {script}
             look vda
             echo 3 >/proc/sys/vm/drop_caches
             look vdb
             head -c 40m /dev/vdb | sha256sum -c /sum"
        ))
        .cpus(2)
        .disk(backend.socket(), "")
        .disk(of_snapshot.socket(), "")
        .run();
    of_snapshot.stop();
    rig.close(backend);
    let of_disk = Sight::of(&outcome, "vda", false);
    (of_disk, Sight::of(&outcome, "vdb", true))
}

/// Runs `ploop-img snapshot` on the disk, which leaves all of its images clean.
fn snapshot(rig: &Rig, command: &str, arguments: &[&str]) -> String {
    let disk = rig.disk.to_str().expect("test paths are UTF-8");
    let args = ["snapshot", command, disk];
    let said = ploop_img(args.iter().chain(arguments)).ok();
    check(&rig.disk);
    said.trim().to_owned()
}

fn images(rig: &Rig) -> usize {
    let names = names_in(&rig.disk);
    names.iter().filter(|name| name.contains(".hds")).count()
}

#[test]
fn follows_snapshots_there_and_back() {
    let Some(rig) = Rig::with_bundle() else {
        return;
    };
    let first = change(
        &rig,
        r"
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/old bs=1M count=12
        umount /mnt
        ",
    );
    let kept = snapshot(&rig, "create", &[]);
    assert_eq!(images(&rig), 2);

    // Parts of clusters that only the lower delta has, and new ones.
    let (second, beside) = change_beside(
        &rig,
        &kept,
        r"
        mount /dev/vda /mnt
        for n in 1 3 5 7 9; do
            dd if=/dev/urandom of=/mnt/old bs=12k seek=$((n * 80)) count=3 conv=notrunc
        done
        fio --name=new --filename=/mnt/new --size=12M --rw=randrw --bsrange=4k-64k \
            --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 --minimal
        umount /mnt
        e2fsck -fn /dev/vda
        ",
    );
    assert_eq!(beside, first);
    assert_ne!(second.digest, first.digest);
    assert_ne!(second.files, first.files);

    let second_kept = snapshot(&rig, "create", &[]);
    assert_eq!(look(&rig), second);
    snapshot(&rig, "switch", &[&kept]);
    assert_eq!(look(&rig), first);
    // The root, what was left, and the new top.
    assert_eq!(images(&rig), 3);
    let (third, beside) = change_beside(
        &rig,
        &second_kept,
        r"
        mount /dev/vda /mnt
        [ ! -e /mnt/new ]
        head -c 3m /dev/urandom >/mnt/other
        rm /mnt/old
        sync
        cp /mnt/other /mnt/old
        fstrim /mnt
        umount /mnt
        e2fsck -fn /dev/vda
        ",
    );
    assert_eq!(beside, second, "the branch that was left");
    assert_ne!(third, first);

    // The branch that was left goes, then the disk lies on one snapshot only.
    snapshot(&rig, "delete", &[&second_kept]);
    snapshot(&rig, "merge", &[]);
    assert_eq!(look(&rig), third);
    assert_eq!(images(&rig), 1);
}

/// How many are taken while the guest writes.
const SHOTS: usize = 5;

/// Under load, stands still for a moment so that its disk can be compared as it is then: the
/// sum of all of it is reported, and goes on when the snapshot is there. A snapshot in between
/// is taken of a disk that does not stand still.
const LOAD: &str = r#"
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    touch /busy
    (
        while [ -e /busy ]; do
            fio --name=load --filename=/mnt/load --size=16M --rw=randwrite --bsrange=4k-64k \
                --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 \
                --minimal >/tmp/fio || touch /bad
            echo verified >>/tmp/rounds
        done
        touch /over
    ) &
    for round in 1 2 3 4 5; do
        dd if=/dev/urandom "of=/mnt/new$round" bs=1M count=2 conv=fsync
        meet_host "busy $round"
        fsfreeze --freeze /mnt
        echo 3 >/proc/sys/vm/drop_caches
        report "sum_$round" "$(dd if=/dev/vda bs=1M iflag=direct | sha256sum | cut -d ' ' -f 1)"
        meet_host "still $round"
        fsfreeze --unfreeze /mnt
    done
    rm /busy
    while [ ! -e /over ]; do sleep 0.1; done
    [ ! -e /bad ]
    report verified "$(wc -l </tmp/rounds)"
    umount /mnt
    e2fsck -fn /dev/vda
"#;

#[test]
fn snapshots_of_a_running_disk_are_what_the_guest_saw() {
    let Some(rig) = Rig::with_bundle_of(&|_, disk| {
        let disk = disk.to_str().unwrap();
        ploop_img(["create", "--cluster-size", "64K", disk, "64M"]).ok();
    }) else {
        return;
    };
    let control = rig.path("control");
    let named = format!("--control={}", control.display());
    let backend = rig.serve(&[&named]);
    let disk = rig.disk.to_str().expect("test paths are UTF-8");
    let mut guest = rig.guest(LOAD).cpus(2).disk(backend.socket(), "").boot();
    let mut qmp = Qmp::connect(&control);
    let mut taken = Vec::new();
    for round in 1..=SHOTS {
        guest.wait_at(&format!("busy {round}"));
        qmp.ask(
            "snapshot-create",
            json!({ "description": format!("busy {round}") }),
        );
        guest.go_on();
        guest.wait_at(&format!("still {round}"));
        let made = ploop_img(["snapshot", "create", &named, disk]).ok();
        taken.push(made.trim().to_owned());
        guest.go_on();
    }
    let outcome = guest.finish();
    assert!(outcome.number("verified") > 0);
    rig.close(backend);
    check(&rig.disk);
    assert_eq!(images(&rig), 2 * SHOTS + 1);
    let raw = rig.path("raw");
    for (round, guid) in (1..).zip(&taken) {
        let target = raw.to_str().expect("test paths are UTF-8");
        ploop_img(["convert", "-O", "raw", "--snapshot", guid, disk, target]).ok();
        assert_eq!(
            sha256(&raw),
            outcome.value(&format!("sum_{round}")),
            "{round}"
        );
        std::fs::remove_file(&raw).unwrap();
    }
}
