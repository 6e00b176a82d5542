//! Which system calls make something stable, seen by a file system of our own: that
//! they are made, in which order, and what becomes of one that fails. Every way of I/O
//! on its own, since each has calls of its own.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::client::{Client, Lane};
use crate::common::{backend::Backend, img::ploop_img};
use crate::frail_fs::{Event, FrailFs};
use crate::write_through::Relay;

/// Every way in which the daemon can ask the kernel.
pub const WAYS: [[&str; 4]; 4] = [
    ["--aio", "io_uring", "--cache", "none"],
    ["--aio", "io_uring", "--cache", "writeback"],
    ["--aio", "psync", "--cache", "none"],
    ["--aio", "psync", "--cache", "writeback"],
];

pub const IMAGE: &str = "disk.hds";

const CLUSTER: u64 = 64 << 10;

/// Where the header has the mark that says that the image is in use, and the mark.
const MARK_AT: usize = 44;
const IN_USE: [u8; 4] = 0x746F_6E59_u32.to_le_bytes();

pub const EIO: i32 = -libc::EIO;

/// An image on the frail file system.
pub struct Disk {
    pub fs: FrailFs,
    place: TempDir,
}

impl Disk {
    pub fn new() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let image = folder.path().join(IMAGE);
        let image = image.to_str().unwrap();
        ploop_img(["create", image, "16M", "--cluster-size", "64K"]).ok();
        Some(Self {
            fs: FrailFs::mount(folder.path(), 1)?,
            place: TempDir::new().unwrap(),
        })
    }

    pub fn serve(&self, options: &[&str]) -> Backend {
        Backend::start(&self.fs.path(IMAGE), &self.socket(), options)
    }

    fn socket(&self) -> PathBuf {
        self.place.path().join("socket")
    }

    pub fn is_marked(&self) -> bool {
        self.fs.read(IMAGE)[MARK_AT..MARK_AT + 4] == IN_USE
    }

    fn events(&self) -> Vec<Event> {
        self.fs.take_events(IMAGE)
    }

    /// That what was written cannot be lost any more.
    #[track_caller]
    fn expect_stable(&self, when: &str) {
        let unsynced = self.fs.has_unsynced_bytes(IMAGE);
        assert!(!unsynced, "{when}: {:?}", self.events());
    }
}

pub fn write(lane: &mut Lane, cluster: u64, byte: u8) -> i32 {
    lane.write(cluster * CLUSTER, &[byte; 4096], 0);
    lane.wait(1)[0].1
}

pub fn flush(lane: &mut Lane) -> i32 {
    lane.flush(0);
    lane.wait(1)[0].1
}

fn is_header(event: &Event) -> bool {
    matches!(event, Event::Write { offset: 0, .. })
}

/// Does it with a disk for each way of I/O, if there is FUSE.
pub fn in_every_way(test: impl Fn(Disk, &[&str])) {
    for way in WAYS {
        let Some(disk) = Disk::new() else {
            return;
        };
        eprintln!("{way:?}");
        test(disk, &way);
    }
}

#[test]
fn the_mark_is_stable_before_the_first_change() {
    in_every_way(|disk, way| {
        let backend = disk.serve(way);
        let events = disk.events();
        assert!(disk.is_marked());
        let [mark, then, ..] = events[..] else {
            panic!("{events:?}");
        };
        assert!(is_header(&mark), "{events:?}");
        assert_eq!(then, Event::Sync { good: true }, "{events:?}");
        backend.stop();
    });
}

#[test]
fn the_closed_mark_comes_last_and_is_stable() {
    in_every_way(|disk, way| {
        let backend = disk.serve(way);
        let mut client = Client::connect(backend.socket(), 1);
        assert_eq!(write(&mut client.lanes[0], 3, 7), 0);
        drop(client);
        disk.events();
        backend.stop();
        assert!(!disk.is_marked());
        let events = disk.events();
        let sync = Event::Sync { good: true };
        let [.., before, mark, after] = events[..] else {
            panic!("{events:?}");
        };
        assert!(is_header(&mark), "{events:?}");
        assert_eq!([before, after], [sync, sync], "{events:?}");
        disk.expect_stable("closed");
    });
}

#[test]
fn a_sync_that_fails_leaves_the_mark() {
    in_every_way(|disk, way| {
        let backend = disk.serve(way);
        let mut client = Client::connect(backend.socket(), 1);
        assert_eq!(write(&mut client.lanes[0], 3, 7), 0);
        disk.fs.fail_syncs(1);
        drop(client);
        let log = backend.stop_with_failure();
        assert_eq!(disk.fs.syncs_to_fail(), 0, "{log}");
        assert!(disk.is_marked(), "{log}");
    });
}

#[test]
fn an_image_whose_mark_cannot_be_made_stable_is_not_served() {
    in_every_way(|disk, way| {
        disk.fs.fail_syncs(1);
        let log = Backend::refuses(&disk.fs.path(IMAGE), &disk.socket(), way);
        assert_eq!(disk.fs.syncs_to_fail(), 0, "{log}");
    });
}

#[test]
fn a_flush_syncs_data_and_mapping() {
    in_every_way(|disk, way| {
        let backend = disk.serve(way);
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        for (cluster, byte) in [(3, 1), (4, 2), (3, 3)] {
            assert_eq!(write(lane, cluster, byte), 0);
            assert_eq!(flush(lane), 0);
            disk.expect_stable("flushed");
        }
        drop(client);
        backend.stop();
    });
}

#[test]
fn a_flush_whose_sync_fails_fails_and_so_does_every_later_one() {
    in_every_way(|disk, way| {
        let backend = disk.serve(way);
        let mut client = Client::connect(backend.socket(), 2);
        assert_eq!(write(&mut client.lanes[0], 3, 1), 0);
        assert_eq!(flush(&mut client.lanes[0]), 0);
        // Mapped on disk already: what fails is not the sync before a mapping.
        assert_eq!(write(&mut client.lanes[0], 3, 2), 0);
        disk.fs.fail_syncs(1);
        for lane in &mut client.lanes {
            assert_eq!(flush(lane), EIO);
        }
        assert_eq!(disk.fs.syncs_to_fail(), 0);
        drop(client);
        backend.stop_with_failure();
        assert!(disk.is_marked());
    });
}

#[test]
fn a_write_in_write_through_is_stable_when_it_ends() {
    in_every_way(|disk, way| {
        let backend = disk.serve(way);
        let relay = Relay::start(backend.socket());
        let mut client = Client::connect(relay.socket(), 1);
        let lane = &mut client.lanes[0];
        // Over a hole and over what is mapped on disk, on FUSE both by a round.
        for (cluster, byte) in [(3, 1), (3, 2), (4, 3), (3, 4)] {
            assert_eq!(write(lane, cluster, byte), 0);
            disk.expect_stable("written");
        }
        // In one piece and in several.
        disk.events();
        lane.write_in_pieces(3 * CLUSTER, &[5; 8192], 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        disk.expect_stable("written from several pieces");
        drop(client);
        drop(relay);
        backend.stop();
    });
}

#[test]
fn a_write_in_write_through_whose_sync_fails_fails() {
    in_every_way(|disk, way| {
        let backend = disk.serve(way);
        let relay = Relay::start(backend.socket());
        let mut client = Client::connect(relay.socket(), 1);
        let lane = &mut client.lanes[0];
        assert_eq!(write(lane, 3, 1), 0);
        disk.fs.fail_syncs(1);
        assert_eq!(write(lane, 3, 2), EIO);
        assert_eq!(disk.fs.syncs_to_fail(), 0);
        // It may have lost what others wrote.
        assert_eq!(write(lane, 3, 3), EIO);
        drop(client);
        drop(relay);
        backend.stop_with_failure();
        assert!(disk.is_marked());
    });
}

/// See [`FrailFs::find_lengths`]: the rest of a new cluster is in no data.
#[test]
fn what_is_flushed_makes_the_file_as_long_as_its_clusters() {
    in_every_way(|disk, way| {
        let backend = disk.serve(way);
        let mut client = Client::connect(backend.socket(), 1);
        assert_eq!(write(&mut client.lanes[0], 3, 7), 0);
        assert_eq!(flush(&mut client.lanes[0]), 0);
        drop(client);
        backend.kill();
        disk.fs.find_lengths();
        let backend = disk.serve(way);
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        lane.read(3 * CLUSTER, 4096, 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        assert!(lane.bytes(0, 4096) == [7; 4096], "{way:?}");
        drop(client);
        backend.stop();
    });
}
