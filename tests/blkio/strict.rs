//! A server that was told of direct I/O when a file was opened, and hears no more of it.

use std::fs::{self, File};

use tempfile::TempDir;

use crate::client::Client;
use crate::common::{backend::Backend, fixtures::fixture};
use crate::frail_fs::FrailFs;

const SECTOR: u64 = 512;

/// No multiple of what direct I/O takes here.
const SIZE: u64 = (64 << 10) + SECTOR;

#[test]
fn a_disk_that_direct_io_cannot_write_whole_is_served_without_it() {
    let folder = TempDir::new().unwrap();
    let plain = fixture("plain");
    let Some(bundle) = plain.unpack(folder.path()) else {
        return;
    };
    let raw = File::create(bundle.join("root.hds")).unwrap();
    raw.set_len(SIZE).unwrap();
    let descriptor = bundle.join("DiskDescriptor.xml");
    let sectors = |bytes: u64| (bytes / SECTOR).to_string();
    let text = fs::read_to_string(&descriptor).unwrap();
    fs::write(
        &descriptor,
        text.replace(&sectors(plain.size), &sectors(SIZE)),
    )
    .unwrap();
    for aio in ["io_uring", "psync"] {
        let Some(fs) = FrailFs::mount(&bundle, 1) else {
            return;
        };
        fs.be_strict(4096);
        let socket = folder.path().join("socket");
        let backend = Backend::start(fs.root(), &socket, &["--aio", aio]);
        backend.expect_to_say("using the page cache");
        let mut client = Client::connect(backend.socket(), 2);
        for (lane, offset) in client.lanes.iter_mut().zip([SECTOR, SIZE - SECTOR]) {
            lane.write(offset, &[7; SECTOR as usize], 0);
            assert_eq!(lane.wait(1), [(0, 0)], "{aio}");
            lane.flush(0);
            assert_eq!(lane.wait(1), [(0, 0)], "{aio}");
        }
        drop(client);
        backend.stop();
        let bytes = fs.read("root.hds");
        assert_eq!(bytes.len() as u64, SIZE);
        let written = |at: u64| bytes[at as usize..].chunks(SECTOR as usize).next();
        for (at, byte) in [(0, 0), (SECTOR, 7), (2 * SECTOR, 0), (SIZE - SECTOR, 7)] {
            assert_eq!(
                written(at),
                Some(&[byte; SECTOR as usize][..]),
                "{aio}: {at}"
            );
        }
    }
}
