//! The running engine, with its threads, on real files, against a model: any
//! sequence of requests reads what the model says, on io_uring and on plain calls,
//! whatever the cluster size, the format and the number of deltas, and also after
//! the image was opened again.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use smallvec::smallvec;
use tempfile::TempDir;

use super::*;
use crate::format::{ClusterSize, Header, Sector, Version};
use crate::storage::{Aio, Cache, HostDisk, HostFile, HostOptions, Segments};

/// What the tests do to a disk. Positions and lengths are taken modulo what the
/// disk has.
#[derive(Clone, Debug)]
enum Step {
    Write {
        at: u64,
        sectors: u64,
        value: u8,
    },
    Read {
        at: u64,
        sectors: u64,
    },
    Discard {
        at: u64,
        sectors: u64,
    },
    Zero {
        at: u64,
        sectors: u64,
        unmap: bool,
    },
    Flush,
    Reopen,
    /// A new delta on top, for a disk of so many more sectors.
    Snapshot {
        growth: u64,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = any::<u32>().prop_map(u64::from);
    let short = prop_oneof![1..=8_u64, 1..=300_u64];
    let long = prop_oneof![1..=600_u64, Just(u64::MAX)];
    let step = prop_oneof![
        5 => (at.clone(), short.clone(), any::<u8>())
            .prop_map(|(at, sectors, value)| Step::Write { at, sectors, value }),
        4 => (at.clone(), short).prop_map(|(at, sectors)| Step::Read { at, sectors }),
        2 => (at.clone(), long.clone()).prop_map(|(at, sectors)| Step::Discard { at, sectors }),
        2 => (at, long, any::<bool>())
            .prop_map(|(at, sectors, unmap)| Step::Zero { at, sectors, unmap }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..60)
}

/// What the base of a chain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Plain,
    Version(Version),
}

/// What a sector holds: every byte of it is the same.
#[derive(Clone, Copy)]
enum Value {
    Is(u8),
    /// A part of a cluster was discarded: it is this or zero.
    MayBe(u8),
}

struct Model {
    sectors: HashMap<u64, Value>,
    cluster: u64,
    size: u64,
    /// A discarded cluster becomes a hole: there is a BAT, and nothing below.
    unmaps: bool,
}

impl Model {
    fn write(&mut self, range: std::ops::Range<u64>, value: u8) {
        self.sectors
            .extend(range.map(|sector| (sector, Value::Is(value))));
    }

    fn discard(&mut self, range: std::ops::Range<u64>) {
        for (sector, value) in &mut self.sectors {
            let first = sector - sector % self.cluster;
            let end = (first + self.cluster).min(self.size);
            if !range.contains(sector) {
                continue;
            }
            *value = match *value {
                _ if self.unmaps && range.start <= first && end <= range.end => Value::Is(0),
                Value::Is(value) | Value::MayBe(value) => Value::MayBe(value),
            };
        }
    }

    fn check(&mut self, sector: u64, found: &[u8]) {
        let first = found[0];
        assert!(
            found.iter().all(|byte| *byte == first),
            "sector {sector} is torn"
        );
        let value = self.sectors.entry(sector).or_insert(Value::Is(0));
        let good = match *value {
            Value::Is(value) => first == value,
            Value::MayBe(value) => first == value || first == 0,
        };
        assert!(good, "sector {sector} reads {first:#x}");
        *value = Value::Is(first);
    }
}

/// The files of a disk, base first.
struct Files {
    folder: TempDir,
    host: HostOptions,
    cluster: ClusterSize,
    base: Base,
    levels: u8,
    /// In sectors.
    base_size: u64,
}

impl Files {
    fn new(folder: &Path, host: HostOptions, cluster: ClusterSize, base: Base, size: u64) -> Self {
        let mut files = Self {
            folder: tempfile::tempdir_in(folder).unwrap(),
            host,
            cluster,
            base,
            levels: 0,
            base_size: size,
        };
        files.add(size);
        files
    }

    fn path(&self, level: u8) -> PathBuf {
        self.folder.path().join(level.to_string())
    }

    /// A new top, for a disk of so many sectors.
    fn add(&mut self, size: u64) {
        let file = File::create_new(self.path(self.levels)).unwrap();
        let is_base = self.levels == 0;
        self.levels += 1;
        let version = match self.base {
            // It is made as long as the disk when it is opened.
            Base::Plain if is_base => return,
            Base::Plain => Version::V2,
            Base::Version(version) => version,
        };
        let header = Header::new(Sector(size), self.cluster).unwrap();
        let header = header.in_version(version).unwrap();
        file.set_len(header.geometry().data_start).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &header.to_bytes(), 0).unwrap();
    }

    fn chain(&self) -> Chain {
        let mut levels = vec![Level::Ploop; usize::from(self.levels)];
        if self.base == Base::Plain {
            levels[0] = Level::Plain {
                size: Sector(self.base_size),
                cluster: self.cluster,
            };
        }
        Chain { levels }
    }

    fn unmaps(&self) -> bool {
        self.levels == 1 && self.base != Base::Plain
    }

    fn open(&self) -> Served {
        let files = (0..self.levels).map(|level| {
            let path = self.path(level);
            let writable = level + 1 == self.levels;
            HostFile {
                file: File::options()
                    .read(true)
                    .write(writable)
                    .open(&path)
                    .unwrap(),
                path,
                writable,
            }
        });
        let disk = HostDisk::new(files.collect(), self.host).unwrap();
        let options = Options {
            preallocation: 4 << 20,
            ..Options::default()
        };
        let running = Running::start(Engine::open(disk, &self.chain(), options).unwrap()).unwrap();
        Served {
            queue: Some(running.engine().queue().unwrap()),
            running: Some(running),
        }
    }
}

/// A disk that runs, with one queue.
struct Served {
    queue: Option<Queue<HostDisk>>,
    running: Option<Running<HostDisk>>,
}

impl Served {
    fn run(&mut self, command: Command) {
        let queue = self.queue.as_mut().unwrap();
        let mut done = Vec::new();
        queue.push(Request { tag: 1, command });
        while queue.in_flight() > 0 {
            queue.submit();
            queue.poll(&mut done);
            std::thread::yield_now();
        }
        assert_eq!(done.len(), 1);
        done[0].result.as_ref().unwrap();
    }

    fn read(&mut self, range: std::ops::Range<u64>) -> Vec<u8> {
        let mut memory = vec![0xa5; (range.end - range.start) as usize * 512];
        self.run(Command::Read {
            start: Sector(range.start),
            data: segments(&mut memory),
        });
        memory
    }

    fn close(mut self) {
        drop(self.queue.take());
        self.running.take().unwrap().close().unwrap();
    }
}

fn segments(memory: &mut [u8]) -> Segments {
    let mut segments = Segments::new();
    let (first, second) = memory.split_at_mut(memory.len() / 3);
    // SAFETY: the request has ended before the memory is used again.
    unsafe { segments.push(first.as_mut_ptr(), first.len()) };
    // SAFETY: as above.
    unsafe { segments.push(second.as_mut_ptr(), second.len()) };
    segments
}

fn check(mut files: Files, steps: &[Step]) {
    let size = files.base_size;
    let mut model = Model {
        sectors: HashMap::new(),
        cluster: files.cluster.sectors(),
        size,
        unmaps: files.unmaps(),
    };
    let mut served = files.open();
    for step in steps {
        let size = model.size;
        let range = |at: u64, sectors: u64| {
            let start = at % size;
            start..start + sectors.min(size - start)
        };
        let ranges = |range: &std::ops::Range<u64>| {
            smallvec![SectorRange {
                start: Sector(range.start),
                count: Sector(range.end - range.start),
            }]
        };
        match *step {
            Step::Write { at, sectors, value } => {
                let range = range(at, sectors);
                let mut memory = vec![value; (range.end - range.start) as usize * 512];
                served.run(Command::Write {
                    start: Sector(range.start),
                    data: segments(&mut memory),
                });
                model.write(range, value);
            }
            Step::Read { at, sectors } => {
                let range = range(at, sectors);
                let memory = served.read(range.clone());
                for (sector, bytes) in range.zip(memory.chunks(512)) {
                    model.check(sector, bytes);
                }
            }
            Step::Discard { at, sectors } => {
                let range = range(at, sectors);
                let ranges = ranges(&range);
                served.run(Command::Discard { ranges });
                model.discard(range);
            }
            Step::Zero { at, sectors, unmap } => {
                let range = range(at, sectors);
                let ranges = ranges(&range);
                served.run(Command::WriteZeroes { ranges, unmap });
                for (_, value) in model
                    .sectors
                    .iter_mut()
                    .filter(|(at, _)| range.contains(at))
                {
                    *value = Value::Is(0);
                }
            }
            Step::Flush => served.run(Command::Flush),
            Step::Reopen => {
                served.close();
                served = files.open();
            }
            Step::Snapshot { growth } => {
                served.close();
                model.size += growth;
                files.add(model.size);
                model.unmaps = files.unmaps();
                served = files.open();
            }
        }
    }
    let written: Vec<u64> = model.sectors.keys().copied().collect();
    for sector in written {
        model.check(sector, &served.read(sector..sector + 1));
    }
    // Beyond what any level below has, and never written to.
    for sector in [model.size - 1, size.min(model.size - 1)] {
        model.check(sector, &served.read(sector..sector + 1));
    }
    served.close();
    if files.base == Base::Plain {
        let len = files.path(0).metadata().unwrap().len();
        assert_eq!(len, size * 512, "a raw image is as long as its disk");
    }
}

/// Puts `deltas` - 1 snapshots among the steps, at equal distances.
fn with_snapshots(steps: Vec<Step>, deltas: usize, growth: &[u64]) -> Vec<Step> {
    let apart = steps.len() / deltas + 1;
    let mut all = Vec::new();
    for (index, steps) in steps.chunks(apart).enumerate() {
        if index > 0 {
            let growth = growth[index % growth.len()];
            all.push(Step::Snapshot { growth });
        }
        all.extend_from_slice(steps);
    }
    all
}

fn bases() -> impl Strategy<Value = Base> {
    prop::sample::select(vec![
        Base::Plain,
        Base::Version(Version::V1),
        Base::Version(Version::V2),
    ])
}

fn check_everywhere(cluster: ClusterSize, base: Base, size: u64, steps: &[Step]) {
    let folder = std::env::temp_dir();
    for aio in [Aio::IoUring, Aio::Psync] {
        for cache in [Cache::None, Cache::Writeback] {
            let host = HostOptions { cache, aio };
            check(Files::new(&folder, host, cluster, base, size), steps);
        }
    }
}

fn cluster_sizes() -> impl Strategy<Value = ClusterSize> {
    prop::sample::select(vec![15_u32, 16, 18, 20, 23, 26])
        .prop_map(|shift| ClusterSize::from_bytes(1 << shift).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_engine_reads_what_was_written(
        cluster in cluster_sizes(),
        base in bases(),
        clusters in 0..6_u64,
        rest in 1..64_u64,
        steps in steps(),
    ) {
        let size = clusters * cluster.sectors() + rest;
        check_everywhere(cluster, base, size, &steps);
    }

    #[test]
    fn chains_read_what_was_written(
        cluster in prop::sample::select(vec![15_u32, 16, 20]),
        base in bases(),
        clusters in 0..6_u64,
        rest in 1..64_u64,
        deltas in 2..=8_usize,
        growth in prop::collection::vec(prop_oneof![Just(0), 1..200_u64], 1..8),
        steps in steps(),
    ) {
        let cluster = ClusterSize::from_bytes(1 << cluster).unwrap();
        let size = clusters * cluster.sectors() + rest;
        let steps = with_snapshots(steps, deltas, &growth);
        check_everywhere(cluster, base, size, &steps);
    }
}
