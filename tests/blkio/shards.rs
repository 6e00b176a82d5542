//! A file system that keeps files in pieces, and that loses all of a piece when a file
//! is cut to its end, as GlusterFS does. Nobody here may cut a file to such a length.

use std::fs::{self, File};
use std::path::PathBuf;

use tempfile::TempDir;

use crate::client::{BUFFER, Client};
use crate::common::{backend::Backend, img::ploop_img};
use crate::frail_fs::FrailFs;

const IMAGE: &str = "disk.hds";

const MIB: u64 = 1 << 20;

/// The least that GlusterFS takes.
const SHARD: u64 = 4 * MIB;

/// Clusters of 1 MiB that fill a piece together with the one of the header.
const CLUSTERS: u64 = 3;

struct Disk {
    fs: FrailFs,
    place: TempDir,
}

impl Disk {
    fn new() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let image = folder.path().join(IMAGE);
        ploop_img(["create", image.to_str().unwrap(), "16M"]).ok();
        let fs = FrailFs::mount(folder.path(), 1)?;
        fs.keep_shards(SHARD);
        Some(Self {
            fs,
            place: TempDir::new().unwrap(),
        })
    }

    fn image(&self) -> PathBuf {
        self.fs.path(IMAGE)
    }

    fn serve(&self) -> Backend {
        let socket = self.place.path().join("socket");
        // One that was killed has left it.
        let _ = fs::remove_file(&socket);
        Backend::start::<&str>(&self.image(), &socket, &[])
    }

    /// A daemon that has filled the first clusters, and a file that is longer than they
    /// need.
    fn fill(&self) -> Backend {
        let backend = self.serve();
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        for cluster in 0..CLUSTERS {
            for offset in [0, MIB - BUFFER as u64] {
                lane.write(cluster * MIB + offset, &[1 + cluster as u8; BUFFER], 0);
                assert_eq!(lane.wait(1), [(0, 0)]);
            }
        }
        lane.flush(0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        assert!(self.len() > SHARD, "there is something to be cut");
        backend
    }

    fn len(&self) -> u64 {
        fs::metadata(self.image()).unwrap().len()
    }

    /// That the guest finds what it wrote, and a check nothing to complain of.
    fn expect_filled(&self) {
        ploop_img(["check", self.image().to_str().unwrap()]).ok();
        let backend = self.serve();
        let mut client = Client::connect(backend.socket(), 1);
        let lane = &mut client.lanes[0];
        for cluster in 0..CLUSTERS {
            for offset in [0, MIB - BUFFER as u64] {
                lane.read(cluster * MIB + offset, BUFFER, 0);
                assert_eq!(lane.wait(1), [(0, 0)]);
                let found = lane.bytes(0, BUFFER);
                assert!(found == [1 + cluster as u8; BUFFER], "cluster {cluster}");
            }
        }
        drop(client);
        backend.stop();
    }
}

/// Otherwise the others here could not fail.
#[test]
fn a_cut_to_the_end_of_a_piece_loses_it() {
    let Some(disk) = Disk::new() else {
        return;
    };
    let file = File::options().write(true).open(disk.image()).unwrap();
    file.set_len(2 * SHARD).unwrap();
    file.set_len(SHARD + 1).unwrap();
    assert!(disk.fs.read(IMAGE).iter().any(|byte| *byte != 0));
    file.set_len(SHARD).unwrap();
    assert!(disk.fs.read(IMAGE).iter().all(|byte| *byte == 0));
}

#[test]
fn closing_an_image_loses_nothing_with_the_space_behind_it() {
    let Some(disk) = Disk::new() else {
        return;
    };
    disk.fill().stop();
    assert!(disk.len() < SHARD + MIB, "the space is given back");
    disk.expect_filled();
    // What was left behind the last cluster comes to nothing more.
    disk.expect_filled();
    assert!(disk.len() < SHARD + MIB);
}

#[test]
fn repairing_an_image_loses_nothing_with_the_space_behind_it() {
    let Some(disk) = Disk::new() else {
        return;
    };
    disk.fill().kill();
    let image = disk.image();
    ploop_img(["check", "--repair", "all", image.to_str().unwrap()]).ok();
    assert!(disk.len() < SHARD + MIB, "the space is given back");
    disk.expect_filled();
}
