//! What is measured: the list of scenarios, and the targets that some have.

use serde::{Deserialize, Serialize};

use crate::bed::Bed;
use crate::contestant::{Contestant, OURS, PLAIN_FILE, QSD_PARALLELS, QSD_QCOW2, QSD_RAW};
use crate::image::Geometry;
use crate::workload::{Action, Cache, Order, Start, Workload};

/// A workload on a bed, by several sides.
#[derive(Clone, Debug, Serialize)]
pub struct Scenario {
    /// Where the images lie.
    pub bed: Bed,
    /// What is done.
    pub workload: Workload,
    /// By whom; the first is compared with each of the others.
    pub contestants: Vec<Contestant>,
    /// Runs of each.
    pub rounds: u32,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// What shall be reached.
    pub targets: Vec<Goal>,
}

impl Scenario {
    /// For people.
    pub fn title(&self) -> String {
        format!("{}: {}", self.bed.label(), self.workload.name)
    }

    /// The image that it needs.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            disk_bytes: self.disk_bytes,
            cluster_bytes: self.workload.cluster_bytes,
        }
    }
}

/// A figure that can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Requests or bytes per second.
    Rate,
    /// Median latency.
    P50,
    /// CPU time of the server per request.
    ServerCpu,
}

impl Metric {
    /// As printed.
    pub fn label(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::P50 => "p50 latency",
            Self::ServerCpu => "server CPU per I/O",
        }
    }
}

/// A bound of a ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// More is better.
    AtLeast(f64),
    /// Less is better.
    AtMost(f64),
}

impl Bound {
    /// Whether a ratio is good enough.
    pub fn holds(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(bound) => ratio >= bound,
            Self::AtMost(bound) => ratio <= bound,
        }
    }

    /// The number in it.
    pub fn value(self) -> f64 {
        let (Self::AtLeast(value) | Self::AtMost(value)) = self;
        value
    }
}

/// A target: ours divided by a peer's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Goal {
    /// Of what.
    pub metric: Metric,
    /// Whose; the best of them, if there are several.
    pub against: Vec<Contestant>,
    /// How much.
    pub bound: Bound,
}

fn at_least(against: &[Contestant], ratio: f64) -> Goal {
    Goal {
        metric: Metric::Rate,
        against: against.to_vec(),
        bound: Bound::AtLeast(ratio),
    }
}

fn at_most(metric: Metric, against: Contestant, ratio: f64) -> Goal {
    Goal {
        metric,
        against: vec![against],
        bound: Bound::AtMost(ratio),
    }
}

/// Sizes and repetitions of a mode.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Rounds of a scenario with a target.
    pub target_rounds: u32,
    /// Rounds of the others. Six are the fewest that give an interval of 95 %.
    pub other_rounds: u32,
    /// The disks are smaller by this factor than those that are to be measured.
    pub shrink: u64,
}

/// Enough to measure.
pub const FULL: Scale = Scale {
    target_rounds: 20,
    other_rounds: 6,
    shrink: 1,
};

/// Enough to see that everything runs.
pub const TINY: Scale = Scale {
    target_rounds: 2,
    other_rounds: 2,
    shrink: 8,
};

const GIB: u64 = 1 << 30;

impl Scale {
    /// Size of a disk in bytes. In memory, the images of all sides, their bases
    /// and one fresh image must fit together.
    fn disk_bytes(self, bed: Bed, start: Start) -> u64 {
        let full = match (start, bed) {
            (Start::Written | Start::WrittenAnew, Bed::Disk) => 2 * GIB,
            (Start::Written | Start::WrittenAnew, _) => GIB,
            // More than a run of a second can fill.
            (Start::Empty, _) => 4 * GIB,
            // 65536 clusters where copying is as fast as memory.
            (Start::Overlay, Bed::Tmpfs) => 4 * GIB,
            (Start::Overlay, _) => GIB,
        };
        full / self.shrink
    }
}

const KIB: u32 = 1 << 10;
/// The cluster size of the overlay scenario, on both sides.
const OVERLAY_CLUSTER: u32 = 64 * KIB;
/// Writes between two flushes.
const FLUSH_EVERY: u32 = 32;
/// A discard request: a default cluster.
const DISCARD: u32 = 1 << 20;

fn workload(name: &str, action: Action, order: Order, request_bytes: u32, depth: u32) -> Workload {
    Workload {
        name: name.into(),
        action,
        order,
        request_bytes,
        depth,
        queues: 1,
        start: Start::Written,
        cache: Cache::WriteBack,
        cluster_bytes: None,
    }
}

/// Reads of 4 KiB, anywhere.
pub fn random_read(depth: u32) -> Workload {
    let name = format!("4 KiB random read, depth {depth}");
    workload(&name, Action::Read, Order::Random, 4 * KIB, depth)
}

fn random_overwrite(depth: u32) -> Workload {
    let name = format!("4 KiB random overwrite, depth {depth}");
    workload(&name, Action::Write, Order::Random, 4 * KIB, depth)
}

fn sequential_read() -> Workload {
    let name = "128 KiB sequential read, depth 8";
    workload(name, Action::Read, Order::Sequential, 128 * KIB, 8)
}

fn sequential_overwrite() -> Workload {
    let name = "128 KiB sequential overwrite, depth 8";
    workload(name, Action::Write, Order::Sequential, 128 * KIB, 8)
}

fn read_on_queues(queues: u32) -> Workload {
    Workload {
        name: format!("4 KiB random read, depth 32, {queues} queues"),
        queues,
        ..random_read(32)
    }
}

fn random_into_empty() -> Workload {
    Workload {
        start: Start::Empty,
        ..workload(
            "4 KiB random write into an empty image, depth 32",
            Action::Write,
            Order::ShuffledOnce,
            4 * KIB,
            32,
        )
    }
}

fn sequential_into_empty() -> Workload {
    Workload {
        start: Start::Empty,
        ..workload(
            "128 KiB sequential write into an empty image, depth 8",
            Action::Write,
            Order::SequentialOnce,
            128 * KIB,
            8,
        )
    }
}

fn first_writes_over_lower() -> Workload {
    Workload {
        start: Start::Overlay,
        cluster_bytes: Some(OVERLAY_CLUSTER),
        ..workload(
            "first 4 KiB write to each cluster over a lower delta, depth 32",
            Action::Write,
            Order::EachOnce {
                stride: OVERLAY_CLUSTER,
            },
            4 * KIB,
            32,
        )
    }
}

/// Reads and writes of 4 KiB, anywhere.
pub fn mix(depth: u32) -> Workload {
    let name = format!("4 KiB random 70 % read, 30 % overwrite, depth {depth}");
    workload(&name, Action::Mix, Order::Random, 4 * KIB, depth)
}

fn overwrite_and_flush() -> Workload {
    let name = format!("4 KiB random overwrite, a flush after each {FLUSH_EVERY}, depth 32");
    let action = Action::WriteFlush { every: FLUSH_EVERY };
    workload(&name, action, Order::Random, 4 * KIB, 32)
}

fn write_through(depth: u32) -> Workload {
    let name = format!("4 KiB random overwrite, write-through, depth {depth}");
    Workload {
        cache: Cache::WriteThrough,
        ..workload(&name, Action::Write, Order::Random, 4 * KIB, depth)
    }
}

fn discard() -> Workload {
    Workload {
        start: Start::WrittenAnew,
        ..workload(
            "discard of a full disk, 1 MiB each, depth 8",
            Action::Discard,
            Order::SequentialOnce,
            DISCARD,
            8,
        )
    }
}

fn runners_into_empty() -> Workload {
    Workload {
        name: "4 KiB random write into an empty image, depth 32, 2 queues".into(),
        queues: 2,
        ..random_into_empty()
    }
}

impl Scale {
    fn scenario(
        self,
        bed: Bed,
        workload: Workload,
        peers: &[Contestant],
        targets: Vec<Goal>,
    ) -> Scenario {
        let rounds = if targets.is_empty() {
            self.other_rounds
        } else {
            self.target_rounds
        };
        let disk_bytes = self.disk_bytes(bed, workload.start);
        let mut contestants = vec![OURS];
        contestants.extend_from_slice(peers);
        Scenario {
            bed,
            workload,
            contestants,
            rounds,
            disk_bytes,
            targets,
        }
    }
}

/// The scenarios that have targets.
pub fn targets(scale: Scale) -> Vec<Scenario> {
    let mut scenarios = page_cache_targets(scale);
    scenarios.extend(tmpfs_targets(scale));
    scenarios.extend(disk_targets(scale));
    scenarios
}

fn page_cache_targets(scale: Scale) -> Vec<Scenario> {
    let bed = Bed::PageCache;
    vec![
        scale.scenario(
            bed,
            random_read(32),
            &[QSD_PARALLELS, QSD_RAW],
            vec![
                at_least(&[QSD_PARALLELS], 2.0),
                at_least(&[QSD_RAW], 1.7),
                at_most(Metric::ServerCpu, QSD_PARALLELS, 0.5),
            ],
        ),
        scale.scenario(
            bed,
            random_read(1),
            &[QSD_PARALLELS],
            vec![at_most(Metric::P50, QSD_PARALLELS, 0.35)],
        ),
        scale.scenario(
            bed,
            read_on_queues(2),
            &[QSD_PARALLELS],
            vec![at_least(&[QSD_PARALLELS], 4.0)],
        ),
    ]
}

fn disk_targets(scale: Scale) -> Vec<Scenario> {
    let bed = Bed::Disk;
    let random = || {
        vec![
            at_least(&[PLAIN_FILE], 0.97),
            at_most(Metric::ServerCpu, QSD_PARALLELS, 0.45),
        ]
    };
    let sequential = || vec![at_least(&[PLAIN_FILE], 0.97)];
    let both = [PLAIN_FILE, QSD_PARALLELS];
    vec![
        scale.scenario(bed, random_read(32), &both, random()),
        scale.scenario(bed, random_overwrite(32), &both, random()),
        scale.scenario(bed, sequential_read(), &[PLAIN_FILE], sequential()),
        scale.scenario(bed, sequential_overwrite(), &[PLAIN_FILE], sequential()),
        scale.scenario(
            bed,
            sequential_into_empty(),
            &[PLAIN_FILE],
            vec![at_least(&[PLAIN_FILE], 0.95)],
        ),
        scale.scenario(
            bed,
            random_into_empty(),
            &[QSD_PARALLELS, QSD_QCOW2],
            vec![at_least(&[QSD_PARALLELS], 1.3), at_least(&[QSD_QCOW2], 2.0)],
        ),
    ]
}

fn tmpfs_targets(scale: Scale) -> Vec<Scenario> {
    let bed = Bed::Tmpfs;
    let parallels = |ratio| vec![at_least(&[QSD_PARALLELS], ratio)];
    vec![
        scale.scenario(bed, random_read(32), &[QSD_PARALLELS], parallels(2.5)),
        scale.scenario(bed, random_overwrite(32), &[QSD_PARALLELS], parallels(2.5)),
        scale.scenario(bed, random_into_empty(), &[QSD_PARALLELS], parallels(2.0)),
        scale.scenario(
            bed,
            sequential_into_empty(),
            &[QSD_PARALLELS, QSD_QCOW2],
            vec![at_least(&[QSD_PARALLELS, QSD_QCOW2], 1.3)],
        ),
        scale.scenario(
            bed,
            first_writes_over_lower(),
            &[QSD_QCOW2],
            vec![at_least(&[QSD_QCOW2], 2.0)],
        ),
    ]
}

/// The scenarios that have targets on storage that hosts share: against who serves from the same
/// mount.
pub fn shared(scale: Scale) -> Vec<Scenario> {
    let workloads = [random_read(32), random_overwrite(32)];
    let scenario = |workload| {
        let goals = vec![at_least(&[QSD_RAW], 1.0), at_least(&[QSD_PARALLELS], 1.5)];
        Scenario {
            disk_bytes: GIB / 2 / scale.shrink,
            ..scale.scenario(Bed::Disk, workload, &[QSD_RAW, QSD_PARALLELS], goals)
        }
    };
    workloads.map(scenario).into()
}

/// Everything: each workload on each bed against all peers. Those with targets
/// keep their rounds.
pub fn all(scale: Scale) -> Vec<Scenario> {
    let with_targets = targets(scale);
    let mut scenarios = Vec::new();
    for bed in Bed::ALL {
        let on_bed = with_targets.iter().filter(|scenario| scenario.bed == bed);
        for workload in every_workload() {
            let targets: Vec<Goal> = on_bed
                .clone()
                .filter(|scenario| scenario.workload.name == workload.name)
                .flat_map(|scenario| scenario.targets.clone())
                .collect();
            let peers = peers(&workload);
            scenarios.push(scale.scenario(bed, workload, &peers, targets));
        }
        scenarios.push(runners(scale, bed));
    }
    scenarios
}

fn every_workload() -> Vec<Workload> {
    vec![
        random_read(1),
        random_read(32),
        read_on_queues(2),
        read_on_queues(4),
        random_overwrite(1),
        random_overwrite(32),
        mix(32),
        sequential_read(),
        sequential_overwrite(),
        random_into_empty(),
        sequential_into_empty(),
        first_writes_over_lower(),
        overwrite_and_flush(),
        write_through(1),
        write_through(32),
        discard(),
    ]
}

fn peers(workload: &Workload) -> Vec<Contestant> {
    match workload.start {
        // QEMU's parallels driver has no backing files.
        Start::Overlay => vec![QSD_QCOW2],
        // The client's io_uring driver discards as on a block device, with a flag
        // that file systems refuse.
        Start::WrittenAnew => vec![QSD_PARALLELS, QSD_QCOW2, QSD_RAW],
        _ => vec![QSD_PARALLELS, QSD_QCOW2, QSD_RAW, PLAIN_FILE],
    }
}

/// The ways that a request can take through a server, each on its own.
pub fn paths() -> Vec<Scenario> {
    let first_writes = Workload {
        start: Start::Empty,
        ..workload(
            "first 4 KiB write to each 1 MiB of an empty image, depth 32",
            Action::Write,
            Order::EachOnce { stride: 1 << 20 },
            4 * KIB,
            32,
        )
    };
    let workloads = [
        random_read(1),
        random_read(32),
        sequential_read(),
        random_overwrite(32),
        overwrite_and_flush(),
        write_through(32),
        first_writes,
    ];
    let scale = Scale { shrink: 1, ..TINY };
    workloads
        .into_iter()
        .map(|workload| scale.scenario(Bed::Disk, workload, &[QSD_PARALLELS], Vec::new()))
        .collect()
}

/// How the number of runners matters where the mapping changes.
fn runners(scale: Scale, bed: Bed) -> Scenario {
    let with = |runners| Contestant::Ours {
        runners: Some(runners),
    };
    Scenario {
        contestants: vec![with(2), with(1), with(4), QSD_PARALLELS],
        ..scale.scenario(bed, runners_into_empty(), &[], Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_names_a_contestant_of_its_scenario() {
        for scenario in all(FULL).into_iter().chain(targets(FULL)) {
            for goal in &scenario.targets {
                let there = |peer| scenario.contestants.contains(peer);
                assert!(goal.against.iter().all(there), "{}", scenario.title());
            }
        }
    }

    #[test]
    fn everything_includes_every_target() {
        let count = |scenarios: Vec<Scenario>| -> usize {
            scenarios
                .iter()
                .map(|scenario| scenario.targets.len())
                .sum()
        };
        assert_eq!(count(all(FULL)), count(targets(FULL)));
    }

    #[test]
    fn titles_are_unique() {
        let mut titles: Vec<String> = all(FULL).iter().map(Scenario::title).collect();
        let count = titles.len();
        titles.sort();
        titles.dedup();
        assert_eq!(titles.len(), count);
    }
}
