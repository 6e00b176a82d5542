//! Everything that one call of the benchmark measures, one after another.
//!
//! A measurement that fails does not end the others, which may take hours; it is
//! reported at once and again at the end.

use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};

use crate::idle;
use crate::machine::Machine;
use crate::measure::{Lab, Setting};
use crate::opening;
use crate::report::{self, Failure, IdleSummary, OpeningSummary, Report, ScenarioSummary, Verdict};
use crate::scenario::Scenario;

/// The name of the measurement of [`opening`].
pub const OPENING: &str = "opening an 8 TiB image";
/// The name of the measurement of [`idle`].
pub const IDLE: &str = "idle";

/// What to measure.
pub struct Todo {
    /// The name of the mode, for the report.
    pub mode: &'static str,
    /// The scenarios, those of a bed together.
    pub scenarios: Vec<Scenario>,
    /// How often to open the large image; `None` for not at all.
    pub opening_rounds: Option<u32>,
    /// How long to watch idle servers; `None` for not at all.
    pub idle_time: Option<Duration>,
    /// Whether to compare with the targets.
    pub is_judged: bool,
}

/// Measures everything, or what there is time for until the user wants to stop. What
/// fails is in the report. What `earlier` has is taken from there.
///
/// # Errors
/// `earlier` is of something else.
pub fn run(setting: &Setting, todo: &Todo, earlier: Option<Report>) -> Result<Report> {
    let mut report = Report::new(
        Machine::look(&setting.programs, &setting.directories),
        todo.mode,
        u64::try_from(setting.run_time.as_millis())?,
        &setting.programs.server_args,
    );
    let resumed = earlier.as_ref().map(|it| report.resume(it)).transpose()?;
    let mut session = Session {
        setting,
        todo,
        earlier,
        resumed,
        start: Instant::now(),
        report,
    };
    // An error here is the user's wish.
    if let Err(error) = session.measure_all() {
        session.note_failure("the rest", &error);
    }
    Ok(session.report)
}

struct Session<'a> {
    setting: &'a Setting,
    todo: &'a Todo,
    earlier: Option<Report>,
    /// The date of today, until something is measured that `earlier` lacks.
    resumed: Option<String>,
    start: Instant,
    report: Report,
}

impl Session<'_> {
    fn measure_all(&mut self) -> Result<()> {
        self.measure_scenarios()?;
        if let Some(rounds) = self.todo.opening_rounds {
            self.measure_opening(rounds)?;
        }
        if let Some(time) = self.todo.idle_time {
            self.measure_idle(time)?;
        }
        Ok(())
    }

    fn measure_scenarios(&mut self) -> Result<()> {
        let mut lab = Lab::new(self.setting);
        for scenario in &self.todo.scenarios {
            if let Some(summary) = self.take_earlier(scenario) {
                self.add(summary);
                continue;
            }
            self.announce(&scenario.title());
            lab.keep_only(scenario.bed);
            let summary = lab.measure(scenario).and_then(|sides| {
                ScenarioSummary::new(scenario, &sides).context("a figure is missing")
            });
            match summary {
                Ok(summary) => {
                    println!("{}", report::scenario_table(&summary));
                    self.add(summary);
                }
                Err(error) => {
                    self.fail(&scenario.title(), &error)?;
                    self.judge(|| Verdict::missing(scenario));
                }
            }
        }
        Ok(())
    }

    /// The figures of the scenario that were taken earlier.
    fn take_earlier(&mut self, scenario: &Scenario) -> Option<ScenarioSummary> {
        let earlier = &mut self.earlier.as_mut()?.scenarios;
        let at = earlier.iter().position(|summary| {
            let disk = (summary.rounds, summary.disk_bytes);
            let who = summary.sides.iter().map(|side| side.contestant);
            summary.title == scenario.title()
                && disk == (scenario.rounds, scenario.disk_bytes)
                && who.eq(scenario.contestants.iter().copied())
        })?;
        Some(earlier.swap_remove(at))
    }

    fn add(&mut self, summary: ScenarioSummary) {
        self.judge(|| summary.verdicts());
        self.report.scenarios.push(summary);
    }

    fn measure_opening(&mut self, rounds: u32) -> Result<()> {
        let earlier = self
            .earlier
            .as_mut()
            .map(|it| std::mem::take(&mut it.opening));
        let openings = match earlier.filter(|openings| !openings.is_empty()) {
            Some(openings) => openings,
            None => {
                self.announce(OPENING);
                match opening::measure(self.setting, rounds) {
                    Ok(openings) => openings.iter().filter_map(OpeningSummary::new).collect(),
                    Err(error) => return self.fail(OPENING, &error),
                }
            }
        };
        let verdicts = openings.first().map(OpeningSummary::verdicts);
        self.report.opening = openings;
        self.judge(|| verdicts.into_iter().flatten().collect());
        Ok(())
    }

    fn measure_idle(&mut self, time: Duration) -> Result<()> {
        let earlier = self.earlier.as_mut().map(|it| std::mem::take(&mut it.idle));
        let idles = match earlier.filter(|idles| !idles.is_empty()) {
            Some(idles) => idles,
            None => {
                self.announce(IDLE);
                match idle::measure(self.setting, time) {
                    Ok(idles) => idles.iter().map(IdleSummary::new).collect(),
                    Err(error) => return self.fail(IDLE, &error),
                }
            }
        };
        let verdict = idles.first().map(IdleSummary::verdict);
        self.report.idle = idles;
        self.judge(|| verdict.into_iter().collect());
        Ok(())
    }

    fn announce(&mut self, what: &str) {
        self.report.resumed.extend(self.resumed.take());
        eprintln!("[{:5.0} s] {what}", self.start.elapsed().as_secs_f64());
    }

    fn judge(&mut self, verdicts: impl FnOnce() -> Vec<Verdict>) {
        if self.todo.is_judged {
            self.report.verdicts.extend(verdicts());
        }
    }

    /// Notes a failure. Being told to stop is none.
    fn fail(&mut self, what: &str, error: &Error) -> Result<()> {
        self.setting.check_interrupted()?;
        self.note_failure(what, error);
        Ok(())
    }

    fn note_failure(&mut self, what: &str, error: &Error) {
        eprintln!("FAILED: {what}: {error:#}");
        self.report.failures.push(Failure {
            what: what.into(),
            error: format!("{error:#}"),
        });
    }
}
