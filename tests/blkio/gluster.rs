//! What GlusterFS has of its own: its write-behind says that writes are well, and tells what became
//! of them to whoever asks first; bricks forget the locks when they are started anew, and with
//! `client.strict-locks` what had a lock is not opened there again; a host that was cut off finds
//! its way back. What other storage has, too, is in `volume.rs`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::client::Client;
use crate::common::{backend::Backend, img::ploop_img};
use crate::returns::{self, Place, begin_write, expect_end_of, go_on};
use crate::stable::{EIO, WAYS, flush, write};
use crate::survivor;
use crate::volume::{CLUSTER, LOST, PATIENCE, bed, image_on_both, wait_for_lock, write_while};

/// Waits until what is written in a folder becomes stable again.
pub fn wait_for_servers(folder: &Path) {
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
        let mut options = way.to_vec();
        // The lock goes with the bricks.
        options.extend(["--on-lock-loss", "report"]);
        let backend = Backend::start(&image, &place.path().join("socket"), &options);
        let mut client = Client::connect(backend.socket(), 1);
        assert_eq!(write(&mut client.lanes[0], CLUSTER, 1), 0);
        assert_eq!(flush(&mut client.lanes[0]), 0);

        bed("bed_kill_server", &["2"]);
        bed("bed_kill_server", &["3"]);
        // Said to be well, unless the lock, which is gone with the bricks, is known to be lost.
        let written = write(&mut client.lanes[0], CLUSTER, 2);
        assert!([0, EIO].contains(&written), "{way:?}: {written}");
        // The thread that wrote it ends.
        drop(client);
        bed("bed_start_servers", &[]);
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

/// Each server forgets the locks when it is started anew; nobody else takes them.
#[test]
#[ignore = "needs a GlusterFS volume: run ci/gluster.sh"]
fn servers_that_are_started_anew_one_after_the_other_cost_nobody_the_lock() {
    for way in [WAYS[0], WAYS[2]] {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (image, there) = image_on_both(&folder);
        let place = TempDir::new().unwrap();
        let backend = Backend::start(&image, &place.path().join("first"), &way);
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        let is_over = AtomicBool::new(false);
        let results = thread::scope(|scope| {
            let load = scope.spawn(|| write_while(lane, || !is_over.load(Relaxed)));
            for brick in ["1", "2", "3"] {
                thread::sleep(Duration::from_secs(3));
                bed("bed_kill_server", &[brick]);
                thread::sleep(Duration::from_secs(3));
                bed("bed_start_servers", &[]);
                wait_for_servers(folder.path());
                // Until what it has missed was written to it: the next one goes then.
                bed("bed_heal", &[]);
            }
            thread::sleep(Duration::from_secs(3));
            let why = Backend::refuses(&there, &place.path().join("second"), &way);
            assert!(why.contains("has the image open for writing"), "{why}");
            is_over.store(true, Relaxed);
            load.join().unwrap()
        });
        let log = backend.log();
        assert!(!log.contains(LOST), "{log}");
        let failed = results.iter().filter(|result| **result != 0).count();
        eprintln!("{way:?}: {} requests, {failed} failed", results.len());
        assert_eq!(failed, 0, "{log}");
        drop(client);
        backend.stop();
    }
}

/// The other host had the image, and has closed it, when the first one comes back.
#[test]
#[ignore = "needs a GlusterFS volume: run ci/gluster.sh"]
fn a_host_that_comes_back_finds_that_another_one_has_come_and_gone() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, there) = image_on_both(&folder);
    let place = TempDir::new().unwrap();
    for is_killed in [false, true] {
        let first = Backend::start(&image, &place.path().join("first"), &WAYS[0]);
        let mut client = Client::connect(first.socket(), 1);
        assert_eq!(write(&mut client.lanes[0], CLUSTER, 1), 0);
        assert_eq!(flush(&mut client.lanes[0]), 0);
        bed("bed_cut", &[]);
        wait_for_lock(&there);
        let second = Backend::start(&there, &place.path().join("second"), &WAYS[0]);
        let mut other = Client::connect(second.socket(), 1);
        assert_eq!(write(&mut other.lanes[0], CLUSTER, 5), 0);
        assert_eq!(flush(&mut other.lanes[0]), 0);
        match is_killed {
            true => second.kill(),
            false => {
                drop(other);
                second.stop();
            }
        }
        wait_for_lock(&there);
        bed("bed_mend", &[]);
        first.expect_to_say(LOST);
        client.lanes[0].write(CLUSTER * (64 << 10), &[9; 4096], 0);
        let waited = client.lanes[0].wait_for(1, Duration::from_secs(5));
        assert_eq!(waited, None, "{}", first.log());
        // Nor is it kept from others, though the process is still there.
        wait_for_lock(&there);
        assert!(
            !fs::read(&there)
                .unwrap()
                .chunks(4096)
                .any(|block| block == [9; 4096])
        );
        drop(client);
        first.stop_after_loss();
        wait_for_servers(folder.path());
    }
}

/// A brick that was started anew is not used any more by what has had a lock there, so when
/// another one goes there are not enough of them. Who opens the image anew has enough.
#[test]
#[ignore = "needs a GlusterFS volume with client.strict-locks: run ci/gluster.sh strict"]
fn a_guest_whose_servers_do_not_take_what_was_locked_goes_on() {
    let lose = |folder: &Path| {
        bed("bed_kill_server", &["1"]);
        bed("bed_start_servers", &[]);
        wait_for_servers(folder);
        bed("bed_heal", &[]);
        bed("bed_kill_server", &["2"]);
    };
    goes_on_with_the_next_process(lose, || {});
}

/// Nor are two of three that were away. Until they are back, nobody could open the image anew.
#[test]
#[ignore = "needs a GlusterFS volume with client.strict-locks: run ci/gluster.sh strict"]
fn a_guest_whose_servers_were_away_and_do_not_take_what_was_locked_goes_on() {
    let lose = |_: &Path| {
        bed("bed_kill_server", &["2"]);
        bed("bed_kill_server", &["3"]);
    };
    let come_back = || {
        // Long enough for the lock to be given up.
        thread::sleep(Duration::from_secs(5));
        bed("bed_start_servers", &[]);
    };
    goes_on_with_the_next_process(lose, come_back);
}

/// A guest whose disk loses its servers: when enough of them are there, the process ends, and the
/// guest goes on with the next one.
fn goes_on_with_the_next_process(lose: impl FnOnce(&Path), come_back: impl FnOnce()) {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, _) = image_on_both(&folder);
    let place = Place::new(&image, &WAYS[0]);
    let backend = place.serve();
    let (mut front_end, region) = survivor::begin(&backend);
    survivor::write(&mut front_end, 0, 1);
    assert_eq!(returns::flush(&mut front_end), returns::OK);
    lose(folder.path());
    backend.expect_to_say("the lock on the image may be lost");
    let head = begin_write(&mut front_end, 1, 2);
    come_back();
    let log = backend.ends_to_be_started_anew();
    eprintln!("{log}");
    wait_for_servers(folder.path());
    let backend = go_on(&mut front_end, &place, &region);
    expect_end_of(&mut front_end, head);
    survivor::expect(&mut front_end, 0, 1);
    survivor::expect(&mut front_end, 1, 2);
    assert_eq!(returns::flush(&mut front_end), returns::OK);
    drop(front_end);
    backend.stop();
    bed("bed_start_servers", &[]);
    wait_for_servers(folder.path());
    bed("bed_heal", &[]);
}
