//! Image files that somebody deletes, replaces or cuts while they are served.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::common::backend::Backend;
use crate::{MIB, Rig};

/// Time for several looks at the files.
const A_WHILE: Duration = Duration::from_secs(12);

const BLOCK: usize = 64 << 10;

/// Waits until the log has the text; how often it is there a while later.
fn said(backend: &Backend, text: &str) -> usize {
    let start = Instant::now();
    while !backend.log().contains(text) {
        let log = backend.log();
        assert!(start.elapsed() < Duration::from_secs(30), "{text:?}: {log}");
        thread::sleep(Duration::from_millis(50));
    }
    thread::sleep(A_WHILE);
    backend.log().matches(text).count()
}

fn write(client: &mut Client, offset: u64, byte: u8) -> i32 {
    let lane = &mut client.lanes[0];
    lane.write(offset, &[byte; BLOCK], 0);
    lane.wait(1)[0].1
}

fn read(client: &mut Client, offset: u64) -> (i32, Vec<u8>) {
    let lane = &mut client.lanes[0];
    lane.read(offset, BLOCK, 0);
    let result = lane.wait(1)[0].1;
    (result, lane.bytes(0, BLOCK))
}

fn flush(client: &mut Client) -> i32 {
    let lane = &mut client.lanes[0];
    lane.flush(0);
    lane.wait(1)[0].1
}

/// What happens to an image is said once, and the guest goes on.
fn expect_said_once(happens: impl FnOnce(&Path), text: &str) {
    let rig = Rig::ploop_img("64M", "1M");
    let backend = rig.serve(&[]);
    let mut client = Client::connect(backend.socket(), 1);
    assert_eq!(write(&mut client, 0, 1), 0);
    happens(&rig.image);
    assert_eq!(said(&backend, text), 1, "{}", backend.log());
    assert_eq!(write(&mut client, MIB, 2), 0);
    assert_eq!(flush(&mut client), 0);
    assert_eq!(read(&mut client, 0), (0, vec![1; BLOCK]));
    drop(client);
    backend.stop();
}

#[test]
fn a_deleted_image_is_said_once() {
    let deleted = "the file has been deleted while it is being served";
    expect_said_once(|image| fs::remove_file(image).unwrap(), deleted);
}

#[test]
fn a_replaced_image_is_said_once() {
    let replace = |image: &Path| {
        let other = image.with_extension("other");
        fs::write(&other, "another").unwrap();
        fs::rename(other, image).unwrap();
    };
    expect_said_once(replace, "another file has replaced it");
}

#[test]
fn an_image_that_is_cut_gives_errors_and_not_zeros() {
    let rig = Rig::ploop_img("64M", "1M");
    let backend = rig.serve(&[]);
    let mut client = Client::connect(backend.socket(), 1);
    for cluster in 0..8 {
        assert_eq!(write(&mut client, cluster * MIB, 1), 0);
    }
    assert_eq!(flush(&mut client), 0);
    // Header, BAT, and four or so of the clusters.
    let image = fs::File::options().write(true).open(&rig.image).unwrap();
    image.set_len(5 * MIB).unwrap();
    assert_eq!(said(&backend, "the file was cut from"), 1);
    let (mut errors, mut intact) = (0, 0);
    for cluster in 0..8 {
        match read(&mut client, cluster * MIB) {
            (0, bytes) => {
                assert!(bytes == [1; BLOCK], "zeros in cluster {cluster}");
                intact += 1;
            }
            _ => errors += 1,
        }
    }
    assert!(
        errors >= 3 && intact >= 3,
        "{errors} errors, {intact} intact"
    );
    // It does not grow again, and nothing is called stable.
    assert_ne!(write(&mut client, 7 * MIB, 2), 0);
    assert_ne!(flush(&mut client), 0);
    assert_eq!(fs::metadata(&rig.image).unwrap().len(), 5 * MIB);
    drop(client);
    // It ends, and says that the image is not closed.
    let log = backend.stop_with_failure();
    assert!(log.contains("was not closed cleanly"), "{log}");
}
