//! The figures of a whole run, ready to be shown.
//!
//! [`summary`] makes them of samples, [`table`] prints them, [`plot`] draws them.
//! None of them measures anything.

mod plot;
mod summary;
mod table;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::bed::Bed;
use crate::cost::Cost;
use crate::machine::Machine;
use crate::scenario::Metric;

pub use summary::{IdleSummary, OpeningSummary, ScenarioSummary, Verdict};

/// What can be put into a document: between a mark with its name at the beginning
/// and one at the end.
const FIGURES: &str = "figures";
const COSTS: &str = "costs";

/// All figures of a run.
#[derive(Serialize, Deserialize)]
pub struct Report {
    /// On what.
    pub machine: Machine,
    /// How much was measured: short, targets or all.
    pub mode: String,
    /// Length of a run in milliseconds.
    pub run_ms: u64,
    /// When it went on with what lacked.
    #[serde(default)]
    pub resumed: Vec<String>,
    /// More arguments that our server got.
    pub server_args: Vec<String>,
    /// The scenarios.
    pub scenarios: Vec<ScenarioSummary>,
    /// Opening a large image; empty if it was not measured.
    pub opening: Vec<OpeningSummary>,
    /// Idling; empty if it was not measured.
    pub idle: Vec<IdleSummary>,
    /// What was to be reached. Empty in short mode, which judges nothing.
    pub verdicts: Vec<Verdict>,
    /// What could not be measured.
    pub failures: Vec<Failure>,
}

/// A measurement that failed.
#[derive(Serialize, Deserialize)]
pub struct Failure {
    /// Its name.
    pub what: String,
    /// Why.
    pub error: String,
}

impl Report {
    /// A report without figures.
    pub fn new(machine: Machine, mode: &str, run_ms: u64, server_args: &[String]) -> Self {
        Self {
            machine,
            mode: mode.into(),
            run_ms,
            resumed: Vec::new(),
            server_args: server_args.into(),
            scenarios: Vec::new(),
            opening: Vec::new(),
            idle: Vec::new(),
            verdicts: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Reads the figures that [`Self::write`] has written.
    ///
    /// # Errors
    /// The file cannot be read, or is not of this version.
    pub fn read(file: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not a report of this benchmark", file.display()))
    }

    /// Begins where `earlier` ended. Figures are not taken over yet. Returns the date
    /// on which something is measured now, for [`Self::resumed`].
    ///
    /// # Errors
    /// It was measured on something else, or otherwise.
    pub fn resume(&mut self, earlier: &Self) -> Result<String> {
        let date = std::mem::replace(&mut self.machine.date, earlier.machine.date.clone());
        ensure!(
            self.machine == earlier.machine,
            "the earlier figures are of another machine or other versions: {:?}, now {:?}",
            earlier.machine,
            self.machine
        );
        ensure!(
            (&self.mode, self.run_ms, &self.server_args)
                == (&earlier.mode, earlier.run_ms, &earlier.server_args),
            "the earlier figures were taken otherwise: mode {}, runs of {} ms, arguments {:?}",
            earlier.mode,
            earlier.run_ms,
            earlier.server_args
        );
        self.resumed.clone_from(&earlier.resumed);
        Ok(date)
    }

    /// Writes everything into `dir`: `figures.json`, `figures.md` and the plots.
    ///
    /// # Errors
    /// Any of the file operations.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let json = serde_json::to_string_pretty(self)?;
        fs::write(dir.join("figures.json"), json + "\n")?;
        fs::write(dir.join("figures.md"), self.markdown(""))?;
        self.write_plots(dir)
    }

    /// Puts the figures into a document, between its two marks, and the plots into
    /// the folder beside it that has its name.
    ///
    /// # Errors
    /// The document has no marks, or any of the file operations.
    pub fn write_into(&self, document: &Path) -> Result<()> {
        let stem = document.file_stem().context("a document without a name")?;
        let folder = document.with_file_name(stem);
        let prefix = format!("{}/", stem.to_string_lossy());
        put(document, FIGURES, &self.markdown(&prefix))?;
        fs::create_dir_all(&folder)?;
        self.write_plots(&folder)?;
        let json = serde_json::to_string_pretty(self)?;
        fs::write(folder.join("figures.json"), json + "\n")?;
        Ok(())
    }

    fn write_plots(&self, dir: &Path) -> Result<()> {
        for (bed, metric) in groups() {
            if let Some(svg) = plot::group(&self.scenarios, bed, metric) {
                fs::write(dir.join(plot_name(bed, metric)), svg)?;
            }
        }
        Ok(())
    }

    /// The targets and how far they were reached, for a terminal too.
    pub fn verdict_table(&self) -> String {
        table::verdicts(&self.verdicts)
    }

    /// The opening and idling figures, for a terminal too.
    pub fn other_tables(&self) -> String {
        table::opening(&self.opening) + &table::idle(&self.idle)
    }

    /// Everything, with plots below `plot_prefix`.
    fn markdown(&self, plot_prefix: &str) -> String {
        let mut text = table::machine(&self.machine) + &table::mode(self);
        if !self.verdicts.is_empty() {
            text += &format!("\n### Targets\n\n{}", self.verdict_table());
        }
        for failure in &self.failures {
            text += &format!("\n**Failed**: {}\n", failure.what);
        }
        for bed in Bed::ALL {
            let on_bed: Vec<_> = self.scenarios.iter().filter(|s| s.bed == bed).collect();
            if on_bed.is_empty() {
                continue;
            }
            text += &format!("\n### On the bed \"{}\"\n", bed.label());
            for metric in [Metric::Rate, Metric::ServerCpu] {
                if plot::group(&self.scenarios, bed, metric).is_some() {
                    let name = plot_name(bed, metric);
                    let what = format!("{}, {}", bed.label(), metric.label());
                    text += &format!("\n![{what}: ratios]({plot_prefix}{name})\n");
                }
            }
            for scenario in on_bed {
                text += &format!("\n{}", table::scenario(scenario));
            }
        }
        if !self.opening.is_empty() || !self.idle.is_empty() {
            text += &format!("\n### Opening and idling\n\n{}", self.other_tables());
        }
        text
    }
}

/// A scenario's table, for a terminal too.
pub fn scenario_table(scenario: &ScenarioSummary) -> String {
    table::scenario(scenario)
}

fn groups() -> impl Iterator<Item = (Bed, Metric)> {
    Bed::ALL
        .into_iter()
        .flat_map(|bed| [Metric::Rate, Metric::ServerCpu].map(|metric| (bed, metric)))
}

fn plot_name(bed: Bed, metric: Metric) -> String {
    let metric = match metric {
        Metric::Rate => "rate",
        Metric::P50 => "latency",
        Metric::ServerCpu => "cpu",
    };
    format!("{}-{metric}.svg", bed.slug())
}

/// The costs of requests, for a terminal too.
pub fn cost_table(costs: &[Cost]) -> String {
    table::costs(costs)
}

/// Whether the figures, or the costs, can be put into a document: better known
/// before they are measured.
///
/// # Errors
/// It is not there, or has no marks.
pub fn check_document(document: &Path) -> Result<()> {
    let text =
        fs::read_to_string(document).with_context(|| format!("reading {}", document.display()))?;
    for name in [FIGURES, COSTS] {
        splice(&text, name, "").with_context(|| without_marks(document, name))?;
    }
    Ok(())
}

fn without_marks(document: &Path, name: &str) -> String {
    format!("{} has no marks for the {name}", document.display())
}

/// Puts the costs of requests into a document, between its marks.
///
/// # Errors
/// The document has no marks, or any of the file operations.
pub fn write_costs_into(document: &Path, machine: &Machine, costs: &[Cost]) -> Result<()> {
    let text = format!("{}\n{}", table::machine(machine), table::costs(costs));
    put(document, COSTS, &text)
}

fn put(document: &Path, name: &str, content: &str) -> Result<()> {
    let text =
        fs::read_to_string(document).with_context(|| format!("reading {}", document.display()))?;
    let text = splice(&text, name, content).with_context(|| without_marks(document, name))?;
    fs::write(document, text).with_context(|| format!("writing {}", document.display()))
}

/// `text` with what is between the marks of `name` replaced.
fn splice(text: &str, name: &str, content: &str) -> Option<String> {
    let mark = format!("<!-- {name}: begin -->");
    let begin = text.find(&mark)? + mark.len();
    let end = begin + text[begin..].find(&format!("<!-- {name}: end -->"))?;
    Some(format!("{}\n{content}{}", &text[..begin], &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contestant::{Contestant, OURS, QSD_QCOW2};
    use crate::idle::Attached;

    fn report(date: &str, kernel: &str) -> Report {
        let machine = Machine {
            cpu: "a".into(),
            cpus: 2,
            virtual_machine: true,
            memory_mib: 1,
            kernel: kernel.into(),
            disk: "b".into(),
            qemu: "c".into(),
            ploop: "d".into(),
            date: date.into(),
        };
        Report::new(machine, "all", 1000, &[])
    }

    #[test]
    fn what_is_written_can_be_read_and_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let four_runners = Contestant::Ours { runners: Some(4) };
        let mut first = report("monday", "6.1");
        first.idle = [OURS, four_runners, Contestant::OtherBuild, QSD_QCOW2]
            .map(|contestant| IdleSummary {
                contestant,
                attached: Attached::Guest,
                seconds: 1.0,
                cpu_us: 2.5,
                context_switches: 3,
            })
            .into();
        first.write(dir.path()).unwrap();
        let read = Report::read(&dir.path().join("figures.json")).unwrap();
        let who = |report: &Report| report.idle.iter().map(|i| i.contestant).collect::<Vec<_>>();
        assert_eq!(who(&read), who(&first));

        let mut second = report("tuesday", "6.1");
        assert_eq!(second.resume(&read).unwrap(), "tuesday");
        assert_eq!(second.machine.date, "monday");
        assert!(report("tuesday", "6.2").resume(&read).is_err());
        second.run_ms = 1;
        assert!(second.resume(&read).is_err());
    }

    #[test]
    fn content_replaces_what_is_between_its_marks_only() {
        let text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\n<!-- y: begin -->\nkept\n<!-- y: end -->\n";
        let spliced = splice(text, "x", "new\n").unwrap();
        assert_eq!(spliced, text.replace("old", "new"));
        assert_eq!(splice(&spliced, "x", "new\n").unwrap(), spliced);
        assert_eq!(splice(text, "z", "new"), None);
    }
}
