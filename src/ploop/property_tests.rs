//! The running engine, with its threads, on real files, against a model: any
//! sequence of requests reads what the model says, on io_uring and on plain calls,
//! whatever the cluster size, and also after the image was opened again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::path::Path;

use proptest::prelude::*;
use smallvec::smallvec;

use super::*;
use crate::format::{ClusterSize, Header, Sector};
use crate::storage::{Aio, Cache, HostDisk, HostFile, HostOptions, Segments};

/// What the tests do to a disk. Positions and lengths are taken modulo what the
/// disk has.
#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, sectors: u64, value: u8 },
    Read { at: u64, sectors: u64 },
    Discard { at: u64, sectors: u64 },
    Zero { at: u64, sectors: u64, unmap: bool },
    Flush,
    Reopen,
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
                _ if range.start <= first && end <= range.end => Value::Is(0),
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

/// A disk that runs, with one queue.
struct Served {
    queue: Option<Queue<HostDisk>>,
    running: Option<Running<HostDisk>>,
}

impl Served {
    fn open(path: &Path, options: HostOptions) -> Self {
        let file = HostFile {
            file: OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap(),
            path: path.into(),
            writable: true,
        };
        let disk = HostDisk::new(vec![file], options).unwrap();
        let chain = Chain {
            levels: vec![Level::Ploop],
        };
        let options = Options {
            preallocation: 4 << 20,
            ..Options::default()
        };
        let running = Running::start(Engine::open(disk, &chain, options).unwrap()).unwrap();
        Self {
            queue: Some(running.engine().queue().unwrap()),
            running: Some(running),
        }
    }

    fn run(&mut self, command: Command) {
        let queue = self.queue.as_mut().unwrap();
        let mut done = Vec::new();
        queue.push(Request { tag: 1, command });
        queue.drain(&mut done);
        assert_eq!(done.len(), 1);
        done[0].result.as_ref().unwrap();
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

fn check(folder: &Path, host: HostOptions, cluster: ClusterSize, size: u64, steps: &[Step]) {
    let file = tempfile::NamedTempFile::new_in(folder).unwrap();
    let header = Header::new(Sector(size), cluster).unwrap();
    let image = File::options().write(true).open(file.path()).unwrap();
    image.set_len(header.geometry().data_start).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &header.to_bytes(), 0).unwrap();

    let mut model = Model {
        sectors: HashMap::new(),
        cluster: cluster.sectors(),
        size,
    };
    let mut served = Served::open(file.path(), host);
    for step in steps {
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
                let mut memory = vec![0xa5; (range.end - range.start) as usize * 512];
                served.run(Command::Read {
                    start: Sector(range.start),
                    data: segments(&mut memory),
                });
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
                served = Served::open(file.path(), host);
            }
        }
    }
    let written: Vec<u64> = model.sectors.keys().copied().collect();
    for sector in written {
        let mut memory = [0; 512];
        served.run(Command::Read {
            start: Sector(sector),
            data: segments(&mut memory),
        });
        model.check(sector, &memory);
    }
    served.close();
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
        clusters in 0..6_u64,
        rest in 1..64_u64,
        steps in steps(),
    ) {
        let size = clusters * cluster.sectors() + rest;
        let folder = std::env::temp_dir();
        for aio in [Aio::IoUring, Aio::Psync] {
            for cache in [Cache::None, Cache::Writeback] {
                check(&folder, HostOptions { cache, aio }, cluster, size, &steps);
            }
        }
    }
}
