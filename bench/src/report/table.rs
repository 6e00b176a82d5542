//! Tables in Markdown, aligned so that they can be read in a terminal.

use super::Report;
use super::summary::{
    IdleSummary, Judgement, OpeningSummary, ScenarioSummary, SideSummary, Verdict,
};
use crate::cost::Cost;
use crate::machine::Machine;
use crate::scenario::Metric;
use crate::stats::Estimate;

/// Which way the cells of a column lean.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lean {
    Left,
    Right,
}

fn render(columns: &[(&str, Lean)], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells
            .chain([columns[column].0.chars().count(), 3])
            .max()
            .unwrap_or(3)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |cells: Vec<String>| {
        let cells: Vec<String> = cells
            .iter()
            .zip(&widths)
            .zip(columns)
            .map(|((cell, &width), (_, lean))| match lean {
                Lean::Left => format!("{cell:<width$}"),
                Lean::Right => format!("{cell:>width$}"),
            })
            .collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule = |(&(_, lean), &width): (&(&str, Lean), &usize)| match lean {
        Lean::Left => "-".repeat(width),
        Lean::Right => "-".repeat(width - 1) + ":",
    };
    let mut text = line(columns.iter().map(|(name, _)| (*name).to_owned()).collect());
    text += &line(columns.iter().zip(&widths).map(rule).collect());
    for row in rows {
        text += &line(row.clone());
    }
    text
}

/// On what, with what.
pub fn machine(machine: &Machine) -> String {
    format!(
        "{} × {}{}, {} MiB of memory, Linux {}, disk bed on {}; {}; {}; {} UTC.\n",
        machine.cpus,
        machine.cpu,
        if machine.virtual_machine {
            " (virtual machine)"
        } else {
            ""
        },
        machine.memory_mib,
        machine.kernel,
        machine.disk,
        machine.ploop,
        machine.qemu,
        machine.date,
    )
}

/// How.
pub fn mode(report: &Report) -> String {
    let mut text = format!("Mode \"{}\", runs of {} ms.", report.mode, report.run_ms);
    if !report.server_args.is_empty() {
        text += &format!(" Our server with `{}`.", report.server_args.join(" "));
    }
    for date in &report.resumed {
        text += &format!(" What lacked then was measured from {date} UTC on.");
    }
    text + "\n"
}

/// One scenario: a row a side.
pub fn scenario(scenario: &ScenarioSummary) -> String {
    let columns = [
        ("who", Lean::Left),
        (scenario.unit.label(), Lean::Right),
        ("p50 µs", Lean::Right),
        ("p99 µs", Lean::Right),
        ("p99.9 µs", Lean::Right),
        ("server CPU µs/IO", Lean::Right),
        ("client CPU µs/IO", Lean::Right),
        ("peak MiB", Lean::Right),
        ("rate, ours ÷ it", Lean::Right),
        ("CPU, ours ÷ it", Lean::Right),
    ];
    let rows: Vec<Vec<String>> = scenario
        .sides
        .iter()
        .map(|side| side_row(scenario, side))
        .collect();
    let intervals = match scenario.ratios.first() {
        Some(ratio) => format!(", intervals of {:.0} %", ratio.estimate.coverage * 100.0),
        None => String::new(),
    };
    format!(
        "**{}** ({} rounds{intervals}, disk of {} MiB)\n\n{}",
        scenario.title,
        scenario.rounds,
        scenario.disk_bytes >> 20,
        render(&columns, &rows)
    )
}

fn side_row(scenario: &ScenarioSummary, side: &SideSummary) -> Vec<String> {
    let optional = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
    let ratio = |metric| {
        let estimate = scenario.ratio(side.contestant, metric);
        estimate.map_or(String::new(), interval)
    };
    vec![
        side.contestant.label(),
        format!("{:.0}", side.rate.median),
        format!("{:.1}", side.p50_us),
        format!("{:.1}", side.p99_us),
        format!("{:.1}", side.p999_us),
        optional(side.server_cpu_us),
        format!("{:.2}", side.client_cpu_us),
        side.peak_memory_mib
            .map_or("-".into(), |mib| format!("{mib:.0}")),
        ratio(Metric::Rate),
        ratio(Metric::ServerCpu),
    ]
}

fn interval(estimate: Estimate) -> String {
    format!(
        "{:.2} [{:.2}, {:.2}]",
        estimate.median, estimate.low, estimate.high
    )
}

/// The targets.
pub fn verdicts(verdicts: &[Verdict]) -> String {
    let columns = [
        ("bed", Lean::Left),
        ("what", Lean::Left),
        ("target", Lean::Right),
        ("measured", Lean::Right),
        ("verdict", Lean::Left),
    ];
    let rows: Vec<Vec<String>> = verdicts
        .iter()
        .map(|verdict| {
            let word = match verdict.judgement {
                Judgement::Pass => "PASS",
                Judgement::Below => "BELOW",
                Judgement::Missing => "MISSING",
            };
            let noise = if verdict.within_noise {
                ", within noise"
            } else {
                ""
            };
            vec![
                verdict.bed.clone(),
                verdict.what.clone(),
                verdict.target.clone(),
                verdict.measured.clone(),
                format!("{word}{noise}"),
            ]
        })
        .collect();
    render(&columns, &rows)
}

/// Opening a large image; nothing if it was not measured.
pub fn opening(openings: &[OpeningSummary]) -> String {
    if openings.is_empty() {
        return String::new();
    }
    let columns = [
        ("opening 8 TiB, 1 MiB clusters, all mapped", Lean::Left),
        ("seconds", Lean::Right),
        ("peak MiB", Lean::Right),
    ];
    let row = |opening: &OpeningSummary| {
        let seconds = opening.seconds;
        vec![
            opening.contestant.label(),
            format!(
                "{:.3} [{:.3}, {:.3}]",
                seconds.median, seconds.low, seconds.high
            ),
            format!("{:.1}", opening.peak_memory_mib),
        ]
    };
    let rows: Vec<Vec<String>> = openings.iter().map(row).collect();
    render(&columns, &rows) + "\n"
}

/// Costs of requests.
pub fn costs(costs: &[Cost]) -> String {
    let columns = [
        ("path", Lean::Left),
        ("who", Lean::Left),
        ("instructions/IO", Lean::Right),
        ("system calls/IO", Lean::Right),
        ("context switches/IO", Lean::Right),
    ];
    let row = |cost: &Cost| {
        let optional = |value: Option<f64>, digits| {
            value.map_or("-".into(), |value| format!("{value:.digits$}"))
        };
        vec![
            cost.path.clone(),
            cost.contestant.label(),
            optional(cost.instructions, 0),
            optional(cost.system_calls, 2),
            optional(Some(cost.context_switches), 3),
        ]
    };
    let rows: Vec<Vec<String>> = costs.iter().map(row).collect();
    render(&columns, &rows)
}

/// Idling; nothing if it was not measured.
pub fn idle(idles: &[IdleSummary]) -> String {
    if idles.is_empty() {
        return String::new();
    }
    let columns = [
        ("idle", Lean::Left),
        ("with", Lean::Left),
        ("watched, s", Lean::Right),
        ("CPU, µs", Lean::Right),
        ("context switches", Lean::Right),
    ];
    let row = |idle: &IdleSummary| {
        vec![
            idle.contestant.label(),
            idle.attached.label().into(),
            format!("{:.0}", idle.seconds),
            format!("{:.0}", idle.cpu_us),
            idle.context_switches.to_string(),
        ]
    };
    let rows: Vec<Vec<String>> = idles.iter().map(row).collect();
    render(&columns, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lean() {
        let columns = [("name", Lean::Left), ("µ", Lean::Right)];
        let rows = vec![vec!["a".into(), "12.5".into()]];
        assert_eq!(
            render(&columns, &rows),
            "| name |    µ |\n| ---- | ---: |\n| a    | 12.5 |\n"
        );
    }
}
