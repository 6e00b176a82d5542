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
/// fails is in the report.
///
/// # Errors
/// The machine cannot be looked at.
pub fn run(setting: &Setting, todo: &Todo) -> Result<Report> {
    let mut session = Session {
        setting,
        todo,
        start: Instant::now(),
        report: Report {
            machine: Machine::look(&setting.programs, &setting.directories),
            mode: todo.mode.into(),
            run_ms: u64::try_from(setting.run_time.as_millis())?,
            server_args: setting.programs.server_args.clone(),
            scenarios: Vec::new(),
            opening: Vec::new(),
            idle: Vec::new(),
            verdicts: Vec::new(),
            failures: Vec::new(),
        },
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
            self.announce(&scenario.title());
            lab.keep_only(scenario.bed);
            let summary = lab.measure(scenario).and_then(|sides| {
                ScenarioSummary::new(scenario, &sides).context("a figure is missing")
            });
            match summary {
                Ok(summary) => {
                    println!("{}", report::scenario_table(&summary));
                    self.judge(|| summary.verdicts());
                    self.report.scenarios.push(summary);
                }
                Err(error) => {
                    self.fail(&scenario.title(), &error)?;
                    self.judge(|| Verdict::missing(scenario));
                }
            }
        }
        Ok(())
    }

    fn measure_opening(&mut self, rounds: u32) -> Result<()> {
        self.announce(OPENING);
        match opening::measure(self.setting, rounds) {
            Ok(openings) => {
                self.report.opening = openings.iter().filter_map(OpeningSummary::new).collect();
                let verdicts = self.report.opening.first().map(OpeningSummary::verdicts);
                self.judge(|| verdicts.into_iter().flatten().collect());
                Ok(())
            }
            Err(error) => self.fail(OPENING, &error),
        }
    }

    fn measure_idle(&mut self, time: Duration) -> Result<()> {
        self.announce(IDLE);
        match idle::measure(self.setting, time) {
            Ok(idles) => {
                self.report.idle = idles.iter().map(IdleSummary::new).collect();
                let verdict = self.report.idle.first().map(IdleSummary::verdict);
                self.judge(|| verdict.into_iter().collect());
                Ok(())
            }
            Err(error) => self.fail(IDLE, &error),
        }
    }

    fn announce(&self, what: &str) {
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
