//! From samples to figures.

use serde::{Deserialize, Serialize};

use crate::bed::Bed;
use crate::contestant::Contestant;
use crate::idle::{self, Attached, Idle, Seen};
use crate::measure::{Sample, Side};
use crate::opening::{self, Opening};
use crate::scenario::{Bound, Goal, Metric, Scenario};
use crate::stats::{Estimate, median};
use crate::workload::{Unit, Workload};

/// The figures of one scenario.
#[derive(Serialize, Deserialize)]
pub struct ScenarioSummary {
    /// For people.
    pub title: String,
    /// Where.
    pub bed: Bed,
    /// What.
    pub workload: Workload,
    /// Of the rates.
    pub unit: Unit,
    /// Runs of each side.
    pub rounds: u32,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Ours first.
    pub sides: Vec<SideSummary>,
    /// Ours divided by each other side's.
    pub ratios: Vec<Ratio>,
    /// The targets, for the plots.
    pub goals: Vec<Goal>,
}

/// The figures of one side.
#[derive(Serialize, Deserialize)]
pub struct SideSummary {
    /// Who.
    pub contestant: Contestant,
    /// In the unit of the scenario.
    pub rate: Estimate,
    /// Latency in microseconds, over all runs.
    pub p50_us: f64,
    /// As above, the 99th percentile.
    pub p99_us: f64,
    /// As above, the 99.9th percentile.
    pub p999_us: f64,
    /// CPU time of the server per request in microseconds.
    pub server_cpu_us: Option<f64>,
    /// CPU time of the client per request in microseconds.
    pub client_cpu_us: f64,
    /// The most memory of the server in MiB.
    pub peak_memory_mib: Option<f64>,
    /// The rate of each run.
    pub rates: Vec<f64>,
}

/// Ours divided by another side's, round by round.
#[derive(Serialize, Deserialize)]
pub struct Ratio {
    /// The other side.
    pub to: Contestant,
    /// Of what.
    pub metric: Metric,
    /// How much.
    pub estimate: Estimate,
}

/// A target and what was measured.
#[derive(Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// Where, or "any".
    pub bed: String,
    /// What.
    pub what: String,
    /// What is wanted, with its unit.
    pub target: String,
    /// What there is, with its unit.
    pub measured: String,
    /// Whether that is enough.
    pub judgement: Judgement,
    /// Whether the interval holds values on both sides of the target.
    pub within_noise: bool,
}

/// How a figure compares with its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Judgement {
    /// It is reached.
    Pass,
    /// It is not.
    Below,
    /// There is no figure.
    Missing,
}

impl Judgement {
    fn of(is_reached: bool) -> Self {
        if is_reached { Self::Pass } else { Self::Below }
    }
}

/// What opening an 8 TiB image took.
#[derive(Serialize, Deserialize)]
pub struct OpeningSummary {
    /// Who.
    pub contestant: Contestant,
    /// From the start of the program to its first answer, in seconds.
    pub seconds: Estimate,
    /// The most memory in MiB.
    pub peak_memory_mib: f64,
}

/// What idling cost.
#[derive(Serialize, Deserialize)]
pub struct IdleSummary {
    /// Who.
    pub contestant: Contestant,
    /// With whom attached.
    pub attached: Attached,
    /// How long it was watched, in seconds.
    pub seconds: f64,
    /// CPU time used, in microseconds.
    pub cpu_us: f64,
    /// How often one of its threads ran.
    pub context_switches: u64,
}

const MIB: f64 = 1048576.0;

impl Metric {
    fn of(self, sample: &Sample) -> Option<f64> {
        match self {
            Self::Rate => Some(sample.rate),
            Self::P50 => Some(sample.p50_us),
            Self::ServerCpu => sample.server_cpu_us,
        }
    }

    /// One figure a round; `None` if the side does not have it.
    fn series(self, side: &Side) -> Option<Vec<f64>> {
        side.samples.iter().map(|sample| self.of(sample)).collect()
    }
}

impl ScenarioSummary {
    /// Sums up; `None` if a side has no figures.
    pub fn new(scenario: &Scenario, sides: &[Side]) -> Option<Self> {
        let (ours, others) = sides.split_first()?;
        let mut ratios = Vec::new();
        for other in others {
            for metric in [Metric::Rate, Metric::P50, Metric::ServerCpu] {
                if let Some(estimate) = ratio(metric, ours, other) {
                    ratios.push(Ratio {
                        to: other.contestant,
                        metric,
                        estimate,
                    });
                }
            }
        }
        Some(Self {
            title: scenario.title(),
            bed: scenario.bed,
            workload: scenario.workload.clone(),
            unit: scenario.workload.unit(),
            rounds: scenario.rounds,
            disk_bytes: scenario.disk_bytes,
            sides: sides.iter().map(SideSummary::new).collect::<Option<_>>()?,
            ratios,
            goals: scenario.targets.clone(),
        })
    }

    /// The ratio to a side.
    pub fn ratio(&self, to: Contestant, metric: Metric) -> Option<Estimate> {
        self.ratios
            .iter()
            .find(|ratio| ratio.to == to && ratio.metric == metric)
            .map(|ratio| ratio.estimate)
    }

    /// How far the targets are reached.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.goals.iter().map(|goal| self.verdict(goal)).collect()
    }

    fn verdict(&self, goal: &Goal) -> Verdict {
        let rate_of = |contestant: Contestant| {
            let side = self.sides.iter().find(|side| side.contestant == contestant);
            side.map_or(0.0, |side| side.rate.median)
        };
        let best = goal
            .against
            .iter()
            .copied()
            .max_by(|&a, &b| rate_of(a).total_cmp(&rate_of(b)));
        let mut verdict = Verdict::without_figure(self.bed, &self.workload, goal, best);
        if let Some(ratio) = best.and_then(|best| self.ratio(best, goal.metric)) {
            verdict.measured =
                format!("{:.2}× [{:.2}, {:.2}]", ratio.median, ratio.low, ratio.high);
            verdict.judgement = Judgement::of(goal.bound.holds(ratio.median));
            verdict.within_noise = goal.bound.holds(ratio.low) != goal.bound.holds(ratio.high);
        }
        verdict
    }
}

impl Verdict {
    /// Of a scenario that could not be measured.
    pub fn missing(scenario: &Scenario) -> Vec<Self> {
        let without_figure = |goal: &Goal| {
            let against = goal.against.first().copied();
            Self::without_figure(scenario.bed, &scenario.workload, goal, against)
        };
        scenario.targets.iter().map(without_figure).collect()
    }

    fn without_figure(
        bed: Bed,
        workload: &Workload,
        goal: &Goal,
        against: Option<Contestant>,
    ) -> Self {
        let sign = match goal.bound {
            Bound::AtLeast(_) => '≥',
            Bound::AtMost(_) => '≤',
        };
        let peer = against.map_or("nobody".into(), Contestant::label);
        Self {
            bed: bed.label().into(),
            what: format!("{}: {} to {peer}", workload.name, goal.metric.label()),
            target: format!("{sign} {}×", goal.bound.value()),
            measured: "-".into(),
            judgement: Judgement::Missing,
            within_noise: false,
        }
    }
}

fn ratio(metric: Metric, ours: &Side, other: &Side) -> Option<Estimate> {
    Estimate::of_ratio(&metric.series(ours)?, &metric.series(other)?)
}

impl SideSummary {
    fn new(side: &Side) -> Option<Self> {
        let percentile = |p: f64| side.latency.value_at_quantile(p) as f64 / 1e3;
        let rates = Metric::Rate.series(side)?;
        let client: Vec<f64> = side.samples.iter().map(|s| s.client_cpu_us).collect();
        Some(Self {
            contestant: side.contestant,
            rate: Estimate::of(&rates)?,
            p50_us: percentile(0.5),
            p99_us: percentile(0.99),
            p999_us: percentile(0.999),
            server_cpu_us: Metric::ServerCpu.series(side).and_then(|s| median(&s)),
            client_cpu_us: median(&client)?,
            peak_memory_mib: side.peak_memory.map(|bytes| bytes as f64 / MIB),
            rates,
        })
    }
}

impl OpeningSummary {
    /// Sums up; `None` if it was never opened.
    pub fn new(opening: &Opening) -> Option<Self> {
        Some(Self {
            contestant: opening.contestant,
            seconds: Estimate::of(&opening.seconds)?,
            peak_memory_mib: opening.peak_memory as f64 / MIB,
        })
    }

    /// How far the targets are reached: of time, and of memory.
    pub fn verdicts(&self) -> [Verdict; 2] {
        let what = "opening an 8 TiB image, 1 MiB clusters, all mapped";
        let seconds = self.seconds;
        let wanted_mib = opening::TARGET_MEMORY as f64 / MIB;
        [
            Verdict {
                bed: Bed::Tmpfs.label().into(),
                what: format!("{what}: time"),
                target: format!("≤ {} s", opening::TARGET_SECONDS),
                measured: format!(
                    "{:.3} s [{:.3}, {:.3}]",
                    seconds.median, seconds.low, seconds.high
                ),
                judgement: Judgement::of(seconds.median <= opening::TARGET_SECONDS),
                within_noise: (seconds.low <= opening::TARGET_SECONDS)
                    != (seconds.high <= opening::TARGET_SECONDS),
            },
            Verdict {
                bed: Bed::Tmpfs.label().into(),
                what: format!("{what}: memory"),
                target: format!("≤ {wanted_mib:.0} MiB"),
                measured: format!("{:.1} MiB", self.peak_memory_mib),
                judgement: Judgement::of(self.peak_memory_mib <= wanted_mib),
                within_noise: false,
            },
        ]
    }
}

impl IdleSummary {
    /// Sums up.
    pub fn new(idle: &Idle) -> Self {
        let Seen {
            time,
            cpu,
            context_switches,
        } = idle.seen;
        Self {
            contestant: idle.contestant,
            attached: idle.attached,
            seconds: time.as_secs_f64(),
            cpu_us: cpu.as_secs_f64() * 1e6,
            context_switches,
        }
    }

    /// How far the target is reached.
    pub fn verdict(&self) -> Verdict {
        let share = self.cpu_us / 1e6 / self.seconds;
        Verdict {
            bed: "any".into(),
            what: format!(
                "an idle back-end with {} attached: CPU",
                self.attached.label()
            ),
            target: "none".into(),
            measured: format!("{:.0} µs in {:.0} s", self.cpu_us, self.seconds),
            judgement: Judgement::of(share <= idle::TARGET_SHARE),
            within_noise: false,
        }
    }
}
