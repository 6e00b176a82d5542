//! Levels that somebody else changes while they are read.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::sim::disk::{Medium, SimDisk, SimIo};

const CLUSTER: u64 = 32 << 10;

/// A disk whose first file gets a cluster, as [`Lift`](crate::image::Lift) gives it one: right
/// after it was asked how long the file is.
struct Growing {
    disk: SimDisk,
    is_late: AtomicBool,
    /// The file is made longer, too.
    is_whole: bool,
}

impl Disk for Growing {
    type Io = SimIo;

    fn open_io(&self, depth: u32) -> io::Result<SimIo> {
        self.disk.open_io(depth)
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        let len = self.disk.len(file)?;
        if file == FileId(0) && self.is_late.swap(false, Ordering::Relaxed) {
            let first = (len / CLUSTER) as u32;
            if self.is_whole {
                self.disk.set_len(file, len + 2 * CLUSTER)?;
            }
            let entries = [first + 1, first].map(u32::to_le_bytes).concat();
            self.disk
                .write_all_at(file, &entries, Header::LEN as u64 + 4)?;
        }
        Ok(len)
    }

    fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.disk.set_len(file, len)
    }

    fn read_exact_at(&self, file: FileId, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_exact_at(file, bytes, offset)
    }

    fn write_all_at(&self, file: FileId, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.write_all_at(file, bytes, offset)
    }

    fn allocate(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.disk.allocate(file, offset, len)
    }

    fn sync(&self, file: FileId) -> io::Result<()> {
        self.disk.sync(file)
    }

    fn zero_granularity(&self) -> u32 {
        self.disk.zero_granularity()
    }
}

/// The BAT of an empty level, read while it gets two clusters.
fn load_growing(is_whole: bool) -> Result<(BatScan, u64, Bat), OpenError> {
    let disk = SimDisk::new(1, Medium::default(), 1);
    let size = Sector(8 * CLUSTER / 512);
    let header = Header::new(size, ClusterSize::from_bytes(CLUSTER).unwrap()).unwrap();
    let geometry = header.geometry();
    disk.set_len(FileId(0), geometry.data_start).unwrap();
    disk.write_all_at(FileId(0), &header.to_bytes(), 0).unwrap();
    let growing = Growing {
        disk,
        is_late: AtomicBool::new(true),
        is_whole,
    };
    let bat = Bat::holes(BatSize::of(geometry), BatSize::largest(geometry)).unwrap();
    load_bat(&growing, FileId(0), geometry, &bat).map(|(scan, len)| (scan, len, bat))
}

#[test]
fn a_level_that_gets_copies_while_it_is_read_is_not_corrupt() {
    let (scan, len, bat) = load_growing(true).unwrap();
    assert_eq!(scan.mapped, 2);
    assert_eq!(len, scan.used.len() * CLUSTER, "as long as it is now");
    let places = [0, 1, 2].map(|guest| bat.get(GuestCluster(guest)));
    let first = scan.used.end().0 - 2;
    let at = |host| Entry::mapped(FileId(0), HostCluster(host));
    assert_eq!(places, [Entry::HOLE, at(first + 1), at(first)]);
}

#[test]
fn an_entry_behind_the_end_of_a_file_that_stays_as_it_is_is_corrupt() {
    let refused = load_growing(false).map(drop);
    let Err(OpenError::CorruptBat { problems, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(problems, 2);
}
