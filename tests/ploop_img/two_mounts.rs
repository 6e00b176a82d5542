//! One volume of a network file system, mounted twice as if by two hosts.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::common::img::ploop_img;

/// How many snapshots `ploop-img` sees.
fn snapshots(bundle: &Path) -> usize {
    let list = ploop_img([
        "snapshot",
        "list",
        "--output=json",
        bundle.to_str().unwrap(),
    ])
    .ok();
    let list: Vec<serde_json::Value> = serde_json::from_str(&list).unwrap();
    list.len()
}

/// The place of tests is one mount, `PLOOP_OTHER_MOUNT` the other.
#[test]
#[ignore = "needs a volume that is mounted twice: run ci/gluster.sh"]
fn what_one_host_changes_the_other_sees_at_once() {
    let other = std::env::var_os("PLOOP_OTHER_MOUNT").expect("PLOOP_OTHER_MOUNT is set");
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let here = folder.path().join("disk");
    let there = PathBuf::from(other)
        .join(folder.path().file_name().unwrap())
        .join("disk");
    ploop_img(["create", here.to_str().unwrap(), "64M"]).ok();
    for count in 1..6 {
        // Each keeps what it has seen.
        for bundle in [&here, &there] {
            assert_eq!(snapshots(bundle), count, "{}", bundle.display());
            ploop_img(["check", bundle.to_str().unwrap()]).ok();
        }
        let changed = [&here, &there][count % 2];
        ploop_img(["snapshot", "create", changed.to_str().unwrap()]).ok();
    }
}
