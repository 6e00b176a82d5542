//! Snapshots of a disk are deleted while its guest uses it.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::backend::Backend;
use crate::common::img::{names_in, ploop_img, qemu_img_check, sha256};
use crate::common::qmp::Qmp;
use crate::qemu::Outcome;
use crate::rig::Rig;

fn make(_: &Path, disk: &Path) {
    let disk = disk.to_str().unwrap();
    ploop_img(["create", "--cluster-size", "64K", disk, "192M"]).ok();
}

/// Files that stay, and others that are written and compared while the host makes snapshots and
/// deletes them. In the end the sum of all of the disk is reported.
const LOAD: &str = r#"
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    head -c 40m /dev/urandom >/mnt/old
    sha256sum /mnt/old >/mnt/sums
    sync
    touch /busy
    (
        while [ -e /busy ]; do
            fio --name=load --filename=/mnt/load --size=20M --rw=randwrite --bsrange=4k-64k \
                --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 \
                --fdatasync=100 --minimal >/tmp/fio || touch /bad
            echo verified >>/tmp/rounds
        done
        touch /over
    ) &
    meet_host loaded
    rm /busy
    while [ ! -e /over ]; do sleep 0.1; done
    [ ! -e /bad ]
    report verified "$(wc -l </tmp/rounds)"
    if dmesg | grep -E 'I.O.error|is.not.a.head|blk_update|hung.task'; then exit 1; fi
    umount /mnt
    e2fsck -fn /dev/vda
    echo 3 >/proc/sys/vm/drop_caches
    mount -o ro /dev/vda /mnt
    (cd / && sha256sum -c /mnt/sums)
    umount /mnt
    report sum "$(dd if=/dev/vda bs=1M iflag=direct | sha256sum | cut -d ' ' -f 1)"
"#;

/// The host's side.
struct Host {
    rig: Rig,
    control: PathBuf,
}

impl Host {
    fn serve(&self) -> Backend {
        let control = format!("--control={}", self.control.display());
        self.rig.serve(&[&control, "--writeback-delay=5000"])
    }

    fn snapshots(&self, qmp: &mut Qmp) -> Vec<Value> {
        let all = qmp.ask("snapshot-list", json!({}));
        let all = all.as_array().unwrap().iter();
        all.filter(|shot| shot["current"] == false)
            .cloned()
            .collect()
    }

    /// Has one deleted, which is tried until the guest is back.
    fn delete(&self, qmp: &mut Qmp, guid: &str) {
        let start = Instant::now();
        loop {
            qmp.ask("snapshot-delete", json!({ "guid": guid, "job-id": "d" }));
            while qmp.event("JOB_STATUS_CHANGE")["status"] != "null" {}
            let shots = self.snapshots(qmp);
            if shots.iter().all(|shot| shot["guid"] != guid) {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{shots:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn end(self, backend: Backend, outcome: &Outcome) {
        assert!(outcome.number("verified") > 0);
        self.rig.close(backend);
        let disk = &self.rig.disk;
        let images = names_in(disk).into_iter();
        let images: Vec<_> = images.filter(|name| name.contains(".hds")).collect();
        assert_eq!(images.len(), 1, "{images:?}");
        images
            .iter()
            .for_each(|image| qemu_img_check(&disk.join(image)));
        let raw = self.rig.path("raw");
        let args = ["convert".as_ref(), "-O".as_ref(), "raw".as_ref()];
        let paths = [disk.as_os_str(), raw.as_os_str()];
        ploop_img(args.into_iter().chain(paths)).ok();
        assert_eq!(sha256(&raw), outcome.value("sum"));
    }
}

fn guid_of(made: &Value) -> String {
    made["guid"].as_str().unwrap().to_owned()
}

#[test]
fn a_mounted_file_system_outlives_its_snapshots_and_deaths_amid_their_deletion() {
    let Some(rig) = Rig::with_bundle_of(&make) else {
        return;
    };
    let control = rig.path("control");
    let host = Host { rig, control };
    let mut backend = host.serve();
    let guest = host.rig.guest(LOAD).cpus(2);
    let guest = guest
        .reconnecting_disk(backend.socket())
        .patience(Duration::from_secs(60));
    let mut guest = guest.boot();
    guest.wait_at("loaded");
    let mut amid = 0;
    for round in 0..6_u64 {
        let mut qmp = Qmp::connect(&host.control);
        let mut made = vec![guid_of(&qmp.ask("snapshot-create", json!({})))];
        if round % 3 == 2 {
            thread::sleep(Duration::from_millis(300));
            made.push(guid_of(&qmp.ask("snapshot-create", json!({}))));
        }
        thread::sleep(Duration::from_millis(500));
        if round % 2 == 1 {
            // In the midst, sometimes near the end: of the lower one if there are two.
            qmp.ask("snapshot-delete", json!({ "guid": made[0] }));
            let part = [1, 2, 99][round as usize / 2];
            loop {
                let job = qmp.ask("query-jobs", json!({}))[0].clone();
                let number = |name: &str| job[name].as_u64().unwrap_or(u64::MAX);
                let (done, total) = (number("current-progress"), number("total-progress"));
                if total == u64::MAX || (total > 0 && done * 100 >= total * part) {
                    break;
                }
            }
            backend.kill();
            backend = host.serve();
            qmp = Qmp::connect(&host.control);
            let left = host.snapshots(&mut qmp);
            made.retain(|guid| left.iter().any(|shot| shot["guid"] == **guid));
            assert_eq!(left.len(), made.len(), "{left:?}");
            amid += usize::from(!left.is_empty());
        }
        // Into the top, or into the other one first.
        if round % 2 == 1 {
            made.reverse();
        }
        for guid in made.iter().rev() {
            host.delete(&mut qmp, guid);
        }
    }
    assert!(amid > 0, "no death met a deletion");
    guest.go_on();
    let outcome = guest.finish();
    host.end(backend, &outcome);
}
