//! The figures of a whole run, ready to be shown.
//!
//! [`summary`] makes them of samples, [`table`] prints them, [`plot`] draws them.
//! None of them measures anything.

mod plot;
mod summary;
mod table;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::bed::Bed;
use crate::machine::Machine;
use crate::scenario::Metric;

pub use summary::{IdleSummary, OpeningSummary, ScenarioSummary, Verdict};

/// Where the figures go in a document that shows them.
const BEGIN: &str = "<!-- figures: begin -->";
const END: &str = "<!-- figures: end -->";

/// All figures of a run.
#[derive(Serialize)]
pub struct Report {
    /// On what.
    pub machine: Machine,
    /// How much was measured: short, targets or all.
    pub mode: String,
    /// Length of a run in milliseconds.
    pub run_ms: u64,
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
}

impl Report {
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
        let text = fs::read_to_string(document)
            .with_context(|| format!("reading {}", document.display()))?;
        let stem = document.file_stem().context("a document without a name")?;
        let folder = document.with_file_name(stem);
        let prefix = format!("{}/", stem.to_string_lossy());
        let text = splice(&text, &self.markdown(&prefix))
            .with_context(|| format!("{} lacks {BEGIN} and {END}", document.display()))?;
        fs::create_dir_all(&folder)?;
        self.write_plots(&folder)?;
        let json = serde_json::to_string_pretty(self)?;
        fs::write(folder.join("figures.json"), json + "\n")?;
        fs::write(document, text)?;
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
        let mut text = table::machine(self);
        if !self.verdicts.is_empty() {
            text += &format!("\n### Targets\n\n{}", self.verdict_table());
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

/// `text` with what is between the marks replaced.
fn splice(text: &str, figures: &str) -> Option<String> {
    let begin = text.find(BEGIN)? + BEGIN.len();
    let end = begin + text[begin..].find(END)?;
    Some(format!("{}\n{figures}{}", &text[..begin], &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_replace_what_is_between_the_marks() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let spliced = splice(&text, "new\n").unwrap();
        assert_eq!(spliced, format!("a\n{BEGIN}\nnew\n{END}\nb\n"));
        assert_eq!(splice(&spliced, "new\n").unwrap(), spliced);
        assert_eq!(splice("a", "new"), None);
    }
}
