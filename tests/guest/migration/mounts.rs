//! A guest goes from one host to another, each of which has a mount of its own of the storage
//! that they share.

use std::env;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::{Host, change, migrate};
use crate::common::img::ploop_img;
use crate::load;
use crate::rig::Rig;

/// How often the guest goes, unless `PLOOP_MIGRATIONS` says so.
const MIGRATIONS: u32 = 5;

/// The place of tests is one mount, `PLOOP_OTHER_MOUNT` the other.
#[test]
#[ignore = "needs a storage that two hosts share: run ci/gluster.sh"]
fn a_guest_goes_from_one_mount_to_the_other_and_back() {
    let other = PathBuf::from(env::var_os("PLOOP_OTHER_MOUNT").expect("PLOOP_OTHER_MOUNT is set"));
    let migrations = env::var("PLOOP_MIGRATIONS").ok();
    let migrations = migrations.map_or(MIGRATIONS, |text| text.parse().expect("a number"));
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(rig) = Rig::bundle_on(folder.path()) else {
        return;
    };
    let there = other.join(folder.path().file_name().unwrap()).join("disk");
    let hosts = [
        Host::with_disk(&rig, "one", rig.disk.clone()),
        Host::with_disk(&rig, "other", there),
    ];
    let load = &load::OVER_OLD;
    let patience = Duration::from_secs(60) * migrations;
    let mut guest = hosts[0].guest(&rig, load).patience(patience).boot();
    guest.wait_at("busy");
    guest.go_on();
    for migration in 1..=migrations {
        thread::sleep(Duration::from_secs(2));
        let (to, from) = (migration as usize % 2, (migration as usize + 1) % 2);
        // Not so often that all the guest does is to read one level below the other.
        let changes = migration <= 4 || migration % 10 == 0;
        if changes && migration % 2 == 0 {
            change(&hosts[from], migration);
        }
        (guest, _) = migrate(&rig, load, guest, &hosts[from], &hosts[to]);
        thread::sleep(Duration::from_millis(500));
        // Nobody has it open then, and both find it complete.
        guest.pause();
        for host in &hosts {
            crate::rig::check(&host.disk);
        }
        if changes {
            // By a third party, since the locks of a new file are not watched.
            let disk = hosts[from].disk.as_os_str();
            ploop_img(["snapshot".as_ref(), "create".as_ref(), disk]).ok();
        }
        guest.resume();
    }
    thread::sleep(Duration::from_secs(1));
    guest.go_on();
    let outcome = guest.finish();
    assert_eq!(outcome.value("verified"), "yes");
    for Host { backend, disk, .. } in hosts {
        backend.stop();
        crate::rig::check(&disk);
    }
}
