//! A GlusterFS volume whose servers are away for a while. Its write-behind says that writes
//! are well all the same, and tells what became of them to whoever asks first.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::client::Client;
use crate::common::{backend::Backend, img::ploop_img};
use crate::stable::{WAYS, flush, write};

const CLUSTER: u64 = 3;

/// How long a client of the volume may take to find its servers again.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of the helpers of `ci/gluster.sh`.
fn bed(helper: &str, argument: &[&str]) {
    let status = Command::new(helper).args(argument).status();
    assert!(status.unwrap().success(), "{helper} {argument:?}");
}

/// Waits until what is written in a folder becomes stable again.
fn wait_for_servers(folder: &Path) {
    let start = Instant::now();
    let path = folder.join("probe");
    let try_it = || {
        let mut file = File::create(&path)?;
        file.write_all(b"probe")?;
        file.sync_all()
    };
    while let Err(error) = try_it() {
        assert!(start.elapsed() < PATIENCE, "{error}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// The place of tests is one mount, `PLOOP_OTHER_MOUNT` the other.
#[test]
#[ignore = "needs a GlusterFS volume: run ci/gluster.sh"]
fn a_flush_tells_the_truth_of_what_was_written_while_the_servers_were_away() {
    let other = std::env::var_os("PLOOP_OTHER_MOUNT").expect("PLOOP_OTHER_MOUNT is set");
    for way in WAYS {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = folder.path().join("disk.hds");
        ploop_img([
            "create",
            image.to_str().unwrap(),
            "16M",
            "--cluster-size",
            "64K",
        ])
        .ok();
        let place = TempDir::new().unwrap();
        let backend = Backend::start(&image, &place.path().join("socket"), &way);
        let mut client = Client::connect(backend.socket(), 1);
        assert_eq!(write(&mut client.lanes[0], CLUSTER, 1), 0);
        assert_eq!(flush(&mut client.lanes[0]), 0);

        bed("bed_kill_brick", &["2"]);
        bed("bed_kill_brick", &["3"]);
        assert_eq!(write(&mut client.lanes[0], CLUSTER, 2), 0, "{way:?}");
        // The thread that wrote it ends.
        drop(client);
        bed("bed_start_bricks", &[]);
        wait_for_servers(folder.path());

        let mut client = Client::connect(backend.socket(), 1);
        let flushed = flush(&mut client.lanes[0]) == 0;
        eprintln!("{way:?}: flushed: {flushed}");
        if flushed {
            let there = PathBuf::from(&other)
                .join(folder.path().file_name().unwrap())
                .join("disk.hds");
            let bytes = fs::read(there).unwrap();
            let written = bytes.chunks(4096).any(|block| block == [2; 4096]);
            assert!(written, "{way:?}");
        }
        drop(client);
        match flushed {
            true => backend.stop(),
            false => drop(backend.stop_with_failure()),
        }
    }
}
