//! Tests of the simulation itself: the disk loses what it may and nothing else,
//! and model and checker see what a wrong engine does, and pass a right one.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::io::Errno;

use super::checker::{self, Image};
use super::disk::{Faults, Medium, SimDisk};
use super::file::SECTOR;
use super::model::{Flush, Model};
use super::pattern::{self, Value};
use crate::format::{ClusterSize, Header, SECTOR_SIZE, Sector};
use crate::storage::{AlignedBuf, Buffer, Completion, Disk, FileId, Io, Op, ZeroMode};

const FILE: FileId = FileId(0);

fn disk(medium: Medium, seed: u64) -> SimDisk {
    SimDisk::new(1, medium, seed)
}

fn buffer(byte: u8, len: usize) -> Buffer {
    Buffer::Owned(AlignedBuf::from_iter(4096, std::iter::repeat_n(byte, len)))
}

fn write(offset: u64, byte: u8, dsync: bool) -> Op {
    Op::Write {
        file: FILE,
        offset,
        buffer: buffer(byte, SECTOR),
        dsync,
    }
}

fn run(disk: &SimDisk, io: &mut impl Io, op: Op) -> Completion {
    io.queue(7, op).unwrap();
    io.submit();
    let mut done = Vec::new();
    while done.is_empty() {
        disk.step();
        io.reap(&mut done);
    }
    done.remove(0)
}

fn first_byte(disk: &SimDisk, offset: u64) -> u8 {
    disk.read_live(FILE, offset, 1)[0]
}

/// Cuts the power at the same point with many seeds; what was found afterwards.
fn outcomes(prepare: impl Fn(&SimDisk)) -> Vec<(u64, u8, u8)> {
    let mut found: Vec<_> = (0..2000)
        .map(|seed| {
            let disk = disk(Medium::default(), seed);
            disk.prepare(FILE, 0, &[1; 2 * SECTOR]);
            prepare(&disk);
            disk.power_off();
            disk.power_on();
            let second = first_byte(&disk, SECTOR_SIZE);
            (disk.live_len(FILE), first_byte(&disk, 0), second)
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[test]
fn a_cut_leaves_any_part_of_what_was_not_synced() {
    let found = outcomes(|disk| {
        disk.write_all_at(FILE, &[2; 2 * SECTOR], 0).unwrap();
        disk.write_all_at(FILE, &[3; SECTOR], 0).unwrap();
    });
    let all = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)];
    assert_eq!(found, all.map(|(a, b)| (1024, a, b)));
}

#[test]
fn a_cut_leaves_what_was_synced() {
    let found = outcomes(|disk| {
        disk.write_all_at(FILE, &[2; 3 * SECTOR], 0).unwrap();
        disk.sync(FILE).unwrap();
    });
    assert_eq!(found, [(3 * SECTOR_SIZE, 2, 2)]);
}

#[test]
fn length_and_data_are_lost_independently() {
    let found = outcomes(|disk| {
        disk.set_len(FILE, 8 * SECTOR_SIZE).unwrap();
        disk.write_all_at(FILE, &[2; SECTOR], 0).unwrap();
    });
    let (old, new) = (1024, 8 * SECTOR_SIZE);
    assert_eq!(found, [(old, 1, 1), (old, 2, 1), (new, 1, 1), (new, 2, 1)]);
}

#[test]
fn a_hole_is_punched_in_part() {
    let found = outcomes(|disk| {
        let mut io = disk.open_io(1).unwrap();
        let op = Op::Zero {
            file: FILE,
            offset: 0,
            len: 1024,
            mode: ZeroMode::Punch,
        };
        assert!(run(disk, &mut io, op).result.is_ok());
    });
    assert_eq!(
        found,
        [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(a, b)| (1024, a, b))
    );
}

#[test]
fn a_sync_need_not_cover_what_was_still_under_way() {
    let found = outcomes(|disk| {
        let mut io = disk.open_io(4).unwrap();
        io.queue(0, write(0, 2, false)).unwrap();
        io.queue(1, Op::Sync { file: FILE }).unwrap();
        io.submit();
        while disk.is_busy() {
            disk.step();
        }
    });
    assert_eq!(found, [(1024, 1, 1), (1024, 2, 1)]);
}

#[test]
fn a_dsync_write_makes_itself_stable_and_nothing_else() {
    let found = outcomes(|disk| {
        let mut io = disk.open_io(1).unwrap();
        assert!(run(disk, &mut io, write(0, 2, false)).result.is_ok());
        assert!(run(disk, &mut io, write(512, 2, true)).result.is_ok());
    });
    assert_eq!(found, [(1024, 1, 2), (1024, 2, 2)]);
}

#[test]
fn what_a_failed_sync_gave_up_no_later_sync_writes() {
    let found = outcomes(|disk| {
        disk.write_all_at(FILE, &[2; SECTOR], 0).unwrap();
        disk.change_medium(|medium| medium.faults.sync = 1.0);
        disk.sync(FILE).unwrap_err();
        disk.change_medium(|medium| medium.faults.sync = 0.0);
        disk.sync(FILE).unwrap();
        assert_eq!(first_byte(disk, 0), 2, "readers still see it");
    });
    assert_eq!(found, [(1024, 1, 1), (1024, 2, 1)]);
}

#[test]
fn a_stable_write_whose_sync_fails_loses_what_others_wrote_and_tells_one() {
    let found = outcomes(|disk| {
        let mut other = disk.open_io(2).unwrap();
        assert_eq!(run(disk, &mut other, write(0, 2, false)).result, Ok(()));
        let mut io = disk.open_io(1).unwrap();
        disk.change_medium(|medium| medium.faults.sync = 1.0);
        let failed = run(disk, &mut io, write(512, 2, true)).result;
        assert_eq!(failed, Err(Errno::IO));
        assert_eq!(disk.take_losses(), 1);
        disk.change_medium(|medium| medium.faults.sync = 0.0);
        assert_eq!(
            run(disk, &mut other, Op::Sync { file: FILE }).result,
            Ok(())
        );
    });
    let all = [(1, 1), (1, 2), (2, 1), (2, 2)];
    assert_eq!(found, all.map(|(a, b)| (1024, a, b)));
}

/// Or else it would look as if the first try had written nothing.
#[test]
fn a_write_whose_sync_has_failed_can_be_made_again_though_others_are_made_there() {
    let disk = disk(Medium::default(), 1);
    let mut io = disk.open_io(1).unwrap();
    let faults = |faults| disk.change_medium(|medium| medium.faults = faults);
    faults(Faults {
        stable_write: 1.0,
        ..Faults::default()
    });
    assert!(run(&disk, &mut io, write(0, 2, true)).result.is_err());
    faults(Faults::default());
    assert!(run(&disk, &mut io, write(0, 3, true)).result.is_ok());
    faults(Faults {
        write: 1.0,
        ..Faults::default()
    });
    assert!(run(&disk, &mut io, write(0, 2, false)).result.is_ok());
    assert!(run(&disk, &mut io, write(512, 2, false)).result.is_err());
}

#[test]
fn a_cut_leaves_the_sectors_of_the_device_whole() {
    for seed in 0..500 {
        let medium = Medium {
            sector: 4096,
            ..Medium::default()
        };
        let disk = disk(medium, seed);
        disk.prepare(FILE, 0, &[1; 8192]);
        for byte in [2, 3] {
            disk.write_all_at(FILE, &[byte; 8192], 0).unwrap();
        }
        disk.power_off();
        disk.power_on();
        for sector in disk.read_live(FILE, 0, 8192).chunks(4096) {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "seed {seed}");
        }
    }
}

#[test]
fn where_writes_need_space_of_their_own_a_full_disk_refuses_overwrites() {
    let medium = Medium {
        capacity: Some(2),
        copies_on_write: true,
        ..Medium::default()
    };
    let disk = disk(medium, 1);
    disk.prepare(FILE, 0, &[1; 8192]);
    let mut io = disk.open_io(1).unwrap();
    let full = Err(Errno::NOSPC);
    assert_eq!(run(&disk, &mut io, write(0, 2, false)).result, full);
    assert!(disk.write_all_at(FILE, &[2; SECTOR], 0).is_err());
    disk.change_medium(|medium| medium.capacity = Some(3));
    assert_eq!(run(&disk, &mut io, write(0, 2, false)).result, Ok(()));
    assert_eq!(disk.used_blocks(), 2, "the old one is free again");
}

#[test]
fn a_clone_takes_space_when_it_is_written_to() {
    let disk = SimDisk::new(2, Medium::default(), 1);
    disk.prepare(FILE, 0, &[1; 4096]);
    let mut io = disk.open_io(1).unwrap();
    let clone = Op::Clone {
        from: FILE,
        from_offset: 0,
        file: FileId(1),
        offset: 0,
        len: 4096,
    };
    assert_eq!(run(&disk, &mut io, clone).result, Ok(()));
    assert_eq!(disk.read_live(FileId(1), 0, 4096), [1; 4096]);
    assert_eq!(disk.used_blocks(), 1);
    disk.change_medium(|medium| medium.capacity = Some(1));
    let write_over = || Op::Write {
        file: FileId(1),
        offset: 0,
        buffer: buffer(2, SECTOR),
        dsync: false,
    };
    assert_eq!(run(&disk, &mut io, write_over()).result, Err(Errno::NOSPC));
    disk.change_medium(|medium| medium.capacity = Some(2));
    assert_eq!(run(&disk, &mut io, write_over()).result, Ok(()));
}

#[test]
fn an_allocation_that_finds_no_space_leaves_a_part_of_it() {
    let mut lengths = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let medium = Medium {
            capacity: Some(2),
            ..Medium::default()
        };
        let disk = disk(medium, seed);
        let mut io = disk.open_io(1).unwrap();
        let op = Op::Allocate {
            file: FILE,
            offset: 0,
            len: 4 * 4096,
        };
        assert_eq!(run(&disk, &mut io, op).result, Err(Errno::NOSPC));
        lengths.insert(disk.live_len(FILE));
    }
    assert_eq!(lengths.first(), Some(&0));
    assert_eq!(
        lengths.last(),
        Some(&8192),
        "no more than there was space for"
    );
    let is_odd = |len: &u64| !len.is_multiple_of(4096);
    assert!(lengths.iter().any(is_odd));
}

#[test]
fn transfers_are_short_now_and_then_and_go_on() {
    let (mut torn, mut whole) = (0, 0);
    for seed in 0..200 {
        let disk = disk(Medium::default(), seed);
        disk.prepare(FILE, 0, &[1; 4 * SECTOR]);
        let mut io = disk.open_io(1).unwrap();
        let read = Op::Read {
            file: FILE,
            offset: 0,
            buffer: buffer(0, 4 * SECTOR),
        };
        io.queue(0, read).unwrap();
        io.submit();
        let mut done = Vec::new();
        while done.is_empty() {
            disk.step();
            // Meanwhile somebody else writes.
            disk.write_all_at(FILE, &[2; 4 * SECTOR], 0).unwrap();
            io.reap(&mut done);
        }
        let Op::Read {
            buffer: Buffer::Owned(bytes),
            ..
        } = &done[0].op
        else {
            panic!("another operation came back");
        };
        assert!(bytes.iter().all(|byte| [1, 2].contains(byte)));
        if bytes[0] == bytes[bytes.len() - 1] {
            whole += 1;
        } else {
            torn += 1;
        }
    }
    assert!(torn > 0 && whole > torn, "{torn} torn, {whole} whole");
}

#[test]
fn completions_come_in_any_order_and_all_of_them() {
    let mut orders = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let disk = disk(Medium::default(), seed);
        let mut io = disk.open_io(3).unwrap();
        for tag in 0..3 {
            io.queue(tag, write(tag * 512, 2, false)).unwrap();
        }
        assert!(io.queue(3, write(0, 3, false)).is_err(), "it is full");
        io.submit();
        let mut done = Vec::new();
        while io.in_flight() > 0 {
            disk.step();
            io.reap(&mut done);
        }
        orders.insert(done.iter().map(|done| done.tag).collect::<Vec<_>>());
    }
    assert_eq!(orders.len(), 6);
}

#[test]
fn a_full_disk_has_room_again_where_holes_are_punched() {
    let medium = Medium {
        capacity: Some(2),
        ..Medium::default()
    };
    let disk = disk(medium, 1);
    let mut io = disk.open_io(1).unwrap();
    let allocate = |offset| Op::Allocate {
        file: FILE,
        offset,
        len: 8192,
    };
    assert_eq!(run(&disk, &mut io, allocate(0)).result, Ok(()));
    assert_eq!(
        run(&disk, &mut io, allocate(8192)).result,
        Err(Errno::NOSPC)
    );
    assert_eq!(run(&disk, &mut io, write(0, 1, false)).result, Ok(()));
    assert_eq!(
        run(&disk, &mut io, write(8192, 1, false)).result,
        Err(Errno::NOSPC)
    );
    let punch = Op::Zero {
        file: FILE,
        offset: 100,
        len: 8092,
        mode: ZeroMode::Punch,
    };
    assert_eq!(run(&disk, &mut io, punch).result, Ok(()));
    assert_eq!(disk.used_blocks(), 1, "only the second block was whole");
    assert_eq!(run(&disk, &mut io, write(8192, 1, false)).result, Ok(()));
}

#[test]
fn faults_come_as_often_as_asked_for() {
    let faults = Faults {
        write: 1.0,
        page: 0.0,
        read: 1.0,
        zero: 1.0,
        allocate: 1.0,
        sync: 1.0,
        stable_write: 0.0,
        full_stable_write: 0.0,
    };
    let disk = disk(
        Medium {
            faults,
            ..Medium::default()
        },
        1,
    );
    let mut io = disk.open_io(1).unwrap();
    let read = Op::Read {
        file: FILE,
        offset: 0,
        buffer: buffer(0, SECTOR),
    };
    for op in [write(0, 1, false), read, Op::Sync { file: FILE }] {
        assert_eq!(run(&disk, &mut io, op).result, Err(Errno::IO));
    }
}

#[test]
fn the_power_goes_after_so_many_changes_and_then_nothing_changes() {
    let disk = disk(Medium::default(), 1);
    disk.cut_after(Some(1));
    disk.write_all_at(FILE, &[1; SECTOR], 0).unwrap();
    assert!(disk.write_all_at(FILE, &[2; SECTOR], 0).is_err());
    assert!(!disk.is_powered());
    assert!(disk.sync(FILE).is_err());
    assert_eq!(first_byte(&disk, 0), 1);
}

#[test]
fn what_never_may_be_done_is_seen() {
    let medium = Medium {
        write_alignment: 4096,
        metadata_len: 4096,
        ..Medium::default()
    };
    let disk = disk(medium, 1);
    let mut io = disk.open_io(2).unwrap();
    io.queue(0, write(0, 1, false)).unwrap();
    io.queue(1, write(512, 1, false)).unwrap();
    io.submit();
    let seen = disk.take_violations().join("\n");
    assert!(
        seen.contains("misaligned") && seen.contains("I11"),
        "{seen}"
    );
    disk.change_medium(|medium| medium.first_writable = FileId(1));
    disk.set_len(FILE, 512).unwrap();
    assert!(disk.take_violations().join("\n").contains("lower level"));
}

/// What is wrong with a [`Toy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    MapsBeforeTheLengthIsStable,
    ReusesAtOnce,
    FlushesNothing,
}

/// An engine that does one thing at a time, each with calls that block. It never
/// reuses a cluster, unless it is a bug of it to do so at once.
struct Toy {
    disk: SimDisk,
    image: Image,
    free: Vec<u64>,
    bug: Bug,
}

const SECTORS: u64 = 64 * 8;

impl Toy {
    fn open(disk: SimDisk, bug: Bug) -> Result<Self, String> {
        Ok(Self {
            image: disk.view(|view| Image::read(view, FILE))?,
            disk,
            free: Vec::new(),
            bug,
        })
    }

    fn set_map(&mut self, guest: usize, offset: u64) -> std::io::Result<()> {
        self.image.map[guest] = offset;
        let entry = (offset / self.image.cluster) as u32;
        let at = 64 + 4 * guest as u64;
        self.disk.write_all_at(FILE, &entry.to_le_bytes(), at)
    }

    fn write(&mut self, sector: u64, value: Value) -> std::io::Result<()> {
        let guest = (sector * SECTOR_SIZE / self.image.cluster) as usize;
        if self.image.map[guest] == 0 {
            let offset = match self.free.pop() {
                Some(offset) => offset,
                None => self.grow()?,
            };
            self.set_map(guest, offset)?;
        }
        let mut bytes = [0; SECTOR];
        pattern::fill(&mut bytes, value, sector);
        let offset = self.image.offset(sector).unwrap();
        self.disk.write_all_at(FILE, &bytes, offset)
    }

    fn grow(&self) -> std::io::Result<u64> {
        let offset = self
            .disk
            .live_len(FILE)
            .next_multiple_of(self.image.cluster);
        self.disk.set_len(FILE, offset + self.image.cluster)?;
        if self.bug != Bug::MapsBeforeTheLengthIsStable {
            self.disk.sync(FILE)?;
        }
        Ok(offset)
    }

    fn discard(&mut self, guest: usize) -> std::io::Result<()> {
        let offset = self.image.map[guest];
        self.set_map(guest, 0)?;
        if self.bug == Bug::ReusesAtOnce && offset != 0 {
            self.free.push(offset);
        }
        Ok(())
    }

    fn flush(&self) -> std::io::Result<()> {
        if self.bug == Bug::FlushesNothing {
            return Ok(());
        }
        self.disk.sync(FILE)
    }
}

fn random_step(toy: &mut Toy, model: &mut Model, rng: &mut SmallRng) -> std::io::Result<()> {
    let value = Value(rng.random_range(1..u64::MAX));
    match rng.random_range(0..8) {
        0 => {
            let flush: Flush = model.begin_flush();
            toy.flush()?;
            model.end_flush(&flush);
        }
        1 => {
            let guest = rng.random_range(0..8);
            let change = model.begin();
            model.touch(change, guest * 64..guest * 64 + 64, Value::ZEROS, true);
            toy.discard(guest as usize)?;
            model.end(change, true, false);
        }
        _ => {
            let sector = rng.random_range(0..SECTORS);
            let change = model.begin();
            model.touch(change, sector..sector + 1, value, true);
            toy.write(sector, value)?;
            model.end(change, true, false);
        }
    }
    Ok(())
}

/// Runs and cuts a toy until something is wrong, or a hundred times.
fn torture(bug: Bug, seed: u64) -> Result<(), String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let disk = disk(Medium::default(), seed);
    let header = Header::new(Sector(SECTORS), ClusterSize::MIN).unwrap();
    disk.prepare(FILE, 0, &header.to_bytes());
    disk.prepare(FILE, 32 * 1024 - 512, &[0; SECTOR]);
    let mut model = Model::new(SECTORS);
    for _ in 0..100 {
        let mut toy = Toy::open(disk.clone(), bug)?;
        disk.cut_after(Some(rng.random_range(0..60)));
        while random_step(&mut toy, &mut model, &mut rng).is_ok() {}
        disk.power_on();
        let image = disk.view(|view| Image::read(view, FILE))?;
        let value = |sector| disk.view(|view| checker::guest_sector(view, &[], &image, sector));
        for sector in 0..SECTORS {
            let found = value(sector);
            model
                .check_after_cut(sector, found)
                .map_err(|wrong| format!("{wrong:?}"))?;
        }
        model.rebase(&|sector| value(sector).unwrap());
    }
    Ok(())
}

#[test]
fn a_right_engine_passes() {
    for seed in 0..5 {
        assert_eq!(torture(Bug::None, seed), Ok(()));
    }
}

#[test]
fn wrong_engines_are_caught() {
    for seed in 0..5 {
        let caught = |bug| torture(bug, seed).unwrap_err();
        assert!(caught(Bug::MapsBeforeTheLengthIsStable).contains("I8"));
        let reuse = caught(Bug::ReusesAtOnce);
        assert!(reuse.contains("I1") || reuse.contains("Wrong"), "{reuse}");
        assert!(caught(Bug::FlushesNothing).contains("Wrong"));
    }
}
