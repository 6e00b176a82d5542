//! Images whose headers and BATs say anything: scanned, opened, read, written, and opened
//! again after a crash.
#![no_main]

use arbitrary::Arbitrary;
use fuzz::disk::MemDisk;
use fuzz::engine::Driven;
use libfuzzer_sys::fuzz_target;
use smallvec::smallvec;
use vhost_user_ploop::format::{ClusterSize, GuestCluster, Header, Sector, Version, scan_bat};
use vhost_user_ploop::image::Delta;
use vhost_user_ploop::ploop::{Chain, Command, Engine, Level, Options, SectorRange};

/// Of all images here, in bytes.
const CLUSTER: u64 = 32 << 10;

/// The largest disk, in clusters.
const CLUSTERS_MAX: u64 = 12;

#[derive(Arbitrary, Debug)]
struct Input {
    disk_sectors: u16,
    levels: Vec<File>,
    read_only: bool,
    requests: Vec<Change>,
}

#[derive(Arbitrary, Debug)]
struct File {
    is_v1: bool,
    /// Sectors less than the top has.
    smaller_by: u8,
    /// In units of half a cluster, less a sector if odd.
    data_len: u8,
    /// Words of the header that say something else.
    words: Vec<(u8, u32)>,
    bat: Vec<Entry>,
}

#[derive(Arbitrary, Debug)]
enum Entry {
    Unmapped,
    /// A cluster of the data area.
    Mapped(u8),
    Raw(u32),
}

#[derive(Arbitrary, Debug)]
enum Change {
    Write {
        start: u16,
        sectors: u8,
    },
    Discard {
        start: u16,
        sectors: u8,
    },
    Zero {
        start: u16,
        sectors: u8,
        unmap: bool,
    },
    Flush,
}

fuzz_target!(|input: Input| run(input));

fn run(input: Input) {
    let cluster = ClusterSize::from_bytes(CLUSTER).expect("it is one");
    let disk_sectors = 1 + u64::from(input.disk_sectors) % (CLUSTERS_MAX * cluster.sectors());
    let files: Vec<_> = input
        .levels
        .iter()
        .take(3)
        .enumerate()
        .map(|(level, file)| make(file, level as u8, disk_sectors, cluster))
        .collect();
    if files.is_empty() {
        return;
    }
    for file in 0..files.len() {
        scan(&MemDisk::new(files.clone()), file as u8);
    }
    let chain = Chain {
        levels: vec![Level::Ploop; files.len()],
    };
    let mut options = Options::default();
    options.read_only = input.read_only;
    options.preallocation = 4 * CLUSTER;
    let disk = MemDisk::new(files.clone());
    let Ok(opened) = Engine::open(disk.clone(), &chain, options.clone()) else {
        let after: Vec<_> = (0..files.len())
            .map(|file| disk.content(file as u8))
            .collect();
        assert_eq!(after, files, "what is refused is not changed");
        return;
    };
    let size = opened.engine.disk_size().0;
    let mut model = content(&files, size);
    let mut engine = Driven::new(opened);
    compare(&mut engine, &model);
    if input.read_only {
        return;
    }
    for (number, change) in input.requests.into_iter().take(16).enumerate() {
        apply(&mut engine, &mut model, change, number);
    }
    engine.run(Command::Flush).expect("the disk is not full");
    compare(&mut engine, &model);
    // The process dies, and its memory with it.
    drop(engine);
    let opened = Engine::open(disk, &chain, options).expect("it was opened before");
    compare(&mut Driven::new(opened), &model);
}

/// An image file of that level.
fn make(file: &File, level: u8, disk_sectors: u64, cluster: ClusterSize) -> Vec<u8> {
    let size = disk_sectors
        .saturating_sub(u64::from(file.smaller_by))
        .max(1);
    let header = Header::new(Sector(size), cluster).expect("such a disk can be");
    let version = if file.is_v1 { Version::V1 } else { Version::V2 };
    let header = header.in_version(version).expect("it is small");
    let geometry = *header.geometry();
    let mut bytes = header.to_bytes().to_vec();
    for &(word, value) in file.words.iter().take(3) {
        let at = 4 * usize::from(word % 16);
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    let first = geometry.first_host_cluster().0;
    for entry in file.bat.iter().take(geometry.entries as usize) {
        let value = match entry {
            Entry::Unmapped => 0,
            Entry::Mapped(number) => geometry.bat_value(vhost_user_ploop::format::HostCluster(
                first + u32::from(number % 12),
            )),
            Entry::Raw(value) => *value,
        };
        bytes.extend(value.to_le_bytes());
    }
    let data_len = u64::from(file.data_len % 26) * CLUSTER / 2;
    let len = geometry.data_start + data_len - 512 * u64::from(file.data_len % 2);
    bytes.resize(len as usize, 0);
    let data_start = geometry.data_start as usize;
    if let Some(data) = bytes.get_mut(data_start..) {
        for (index, sector) in data.chunks_mut(512).enumerate() {
            sector.fill(mark(index / 64, level));
        }
    }
    bytes
}

/// What a cluster of a file holds.
fn mark(cluster: usize, level: u8) -> u8 {
    1 + (cluster % 60) as u8 + 64 * level
}

fn scan(disk: &MemDisk, file: u8) {
    if let Ok(delta) = Delta::load_for_repair(disk.image(file)) {
        let _ = delta.scan();
    }
    let Ok(delta) = Delta::load(disk.image(file)) else {
        return;
    };
    let geometry = *delta.geometry();
    let len = delta.file_len().expect("it has one");
    let scan = scan_bat(&geometry, len, delta.bat().iter().copied());
    assert_eq!(scan.is_clean(), scan.problems.is_empty());
    if delta.require_sound().is_err() {
        return;
    }
    assert!(scan.is_clean());
    let mut hosts = Vec::new();
    for guest in 0..geometry.entries {
        let Some(offset) = delta.lookup(GuestCluster(guest)) else {
            continue;
        };
        assert!(offset >= geometry.data_start);
        assert!(offset + CLUSTER.min(geometry.cluster.bytes()) <= len);
        hosts.push(offset);
    }
    hosts.sort_unstable();
    let step = geometry.cluster.bytes();
    assert!(hosts.windows(2).all(|pair| pair[0] + step <= pair[1]));
}

/// The disk as the format says it is, by sectors: worked out from the bytes.
fn content(files: &[Vec<u8>], size: u64) -> Vec<u8> {
    let mut sectors = vec![0; size as usize];
    for file in files {
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("4 bytes"));
        let is_v2 = file.starts_with(b"WithouFreSpacExt");
        let cluster = word(28) as usize;
        let in_file = |value: u32| match is_v2 {
            true => value as usize * cluster,
            false => value as usize,
        };
        for guest in 0..word(32) as usize {
            let value = word(64 + 4 * guest);
            if value == 0 {
                continue;
            }
            for sector in 0..cluster {
                let byte = file.get(512 * (in_file(value) + sector));
                let place = sectors.get_mut(guest * cluster + sector);
                // A lower level may end inside a cluster: its disk is what it says.
                let is_there = (guest * cluster + sector) < word(36) as usize;
                if let (Some(place), Some(&byte), true) = (place, byte, is_there) {
                    *place = byte;
                }
            }
        }
    }
    sectors
}

fn compare(engine: &mut Driven, model: &[u8]) {
    for start in (0..model.len()).step_by(64) {
        let expected = &model[start..model.len().min(start + 64)];
        let read = engine.read(Sector(start as u64), expected.len());
        let read = read.expect("the disk can be read");
        let read = read.chunks(512).map(|sector| {
            assert!(sector[1..] == sector[..511], "a sector of two minds");
            sector[0]
        });
        let read: Vec<u8> = read.collect();
        assert_eq!(read, expected, "from sector {start} on");
    }
}

fn apply(engine: &mut Driven, model: &mut [u8], change: Change, number: usize) {
    let end = model.len() as u64;
    let range = |start: u16, sectors: u8| {
        let start = u64::from(start) % end;
        let count = (1 + u64::from(sectors)).min(end - start);
        (start, count)
    };
    let one = |(start, count)| {
        smallvec![SectorRange {
            start: Sector(start),
            count: Sector(count),
        }]
    };
    match change {
        Change::Write { start, sectors } => {
            let (start, count) = range(start, sectors);
            let byte = 200 + number as u8;
            let mut bytes = vec![byte; 512 * count as usize];
            engine
                .write(Sector(start), &mut bytes)
                .expect("there is space");
            model[start as usize..][..count as usize].fill(byte);
        }
        Change::Discard { start, sectors } => {
            let (start, count) = range(start, sectors);
            let ranges = one((start, count));
            engine
                .run(Command::Discard { ranges })
                .expect("it is on the disk");
            // What is left of it is either what it was or zeros: whatever it is, it stays.
            for sector in start..start + count {
                let read = engine.read(Sector(sector), 1).expect("it can be read");
                let place = &mut model[sector as usize];
                assert!(read[0] == 0 || read[0] == *place);
                *place = read[0];
            }
        }
        Change::Zero {
            start,
            sectors,
            unmap,
        } => {
            let (start, count) = range(start, sectors);
            let ranges = one((start, count));
            let command = Command::WriteZeroes { ranges, unmap };
            engine.run(command).expect("there is space");
            model[start as usize..][..count as usize].fill(0);
        }
        Change::Flush => engine.run(Command::Flush).expect("nothing fails"),
    }
}
