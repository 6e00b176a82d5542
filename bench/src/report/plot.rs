//! Ratios as dots with error bars, as SVG.
//!
//! Written by hand: a plot is a few dozen elements, which is less than any plotting
//! library would have to be told.

use std::fmt::Write;

use super::summary::ScenarioSummary;
use crate::bed::Bed;
use crate::scenario::Metric;
use crate::stats::Estimate;

const WIDTH: f64 = 900.0;
const LABELS: f64 = 330.0;
const VALUES: f64 = 130.0;
const ROW: f64 = 20.0;
const TOP: f64 = 70.0;
const BOTTOM: f64 = 30.0;

/// Values that may get a tick, the most important first.
const TICKS: [f64; 20] = [
    1.0, 2.0, 0.5, 5.0, 0.2, 10.0, 0.1, 20.0, 0.05, 3.0, 0.3, 1.5, 0.7, 1.2, 0.8, 0.9, 1.1, 0.6,
    50.0, 0.02,
];
/// How close two ticks may be.
const TICK_DISTANCE: f64 = 36.0;

enum Row {
    Heading(String),
    Dot {
        label: String,
        ratio: Estimate,
        target: Option<f64>,
    },
}

/// The ratios of all scenarios of a bed; `None` if there are none.
pub fn group(scenarios: &[ScenarioSummary], bed: Bed, metric: Metric) -> Option<String> {
    let mut rows = Vec::new();
    for scenario in scenarios.iter().filter(|scenario| scenario.bed == bed) {
        let mut dots = dots(scenario, metric).peekable();
        if dots.peek().is_some() {
            rows.push(Row::Heading(scenario.workload.name.clone()));
            rows.extend(dots);
        }
    }
    if rows.is_empty() {
        return None;
    }
    let better = match metric {
        Metric::Rate => "more is better",
        Metric::P50 | Metric::ServerCpu => "less is better",
    };
    let title = format!(
        "{}: {}, vhost-user-ploop ÷ each ({better})",
        bed.label(),
        metric.label()
    );
    Some(draw(&title, &rows))
}

fn dots(scenario: &ScenarioSummary, metric: Metric) -> impl Iterator<Item = Row> {
    scenario
        .ratios
        .iter()
        .filter(move |ratio| ratio.metric == metric)
        .map(move |ratio| Row::Dot {
            label: ratio.to.label(),
            ratio: ratio.estimate,
            target: scenario
                .goals
                .iter()
                .find(|goal| goal.metric == metric && goal.against.contains(&ratio.to))
                .map(|goal| goal.bound.value()),
        })
}

/// A logarithmic axis, so that twice and half are equally far from 1.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    /// Covers all rows, the number 1, and a little more.
    fn of(rows: &[Row]) -> Self {
        let mut axis = Self {
            low: 0.8,
            high: 1.25,
        };
        for row in rows {
            if let Row::Dot { ratio, target, .. } = row {
                let values = [Some(ratio.low), Some(ratio.high), *target];
                for value in values.into_iter().flatten().filter(|&value| value > 0.0) {
                    axis.low = axis.low.min(value / 1.1);
                    axis.high = axis.high.max(value * 1.1);
                }
            }
        }
        axis
    }

    fn x(&self, value: f64) -> f64 {
        let clamped = value.clamp(self.low, self.high);
        let part = (clamped / self.low).ln() / (self.high / self.low).ln();
        LABELS + part * (WIDTH - LABELS - VALUES)
    }

    /// Those that have room.
    fn ticks(&self) -> Vec<f64> {
        let mut ticks: Vec<f64> = Vec::new();
        for tick in TICKS {
            let is_free = |other: &f64| (self.x(*other) - self.x(tick)).abs() >= TICK_DISTANCE;
            if (self.low..=self.high).contains(&tick) && ticks.iter().all(is_free) {
                ticks.push(tick);
            }
        }
        ticks
    }
}

fn draw(title: &str, rows: &[Row]) -> String {
    let axis = Axis::of(rows);
    let bottom = TOP + rows.len() as f64 * ROW;
    let height = bottom + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\" font-weight=\"bold\">{}</text>\n\
         <text x=\"10\" y=\"40\" fill=\"#555555\">dot: median of the pairs; bar: its \
         interval; ◇: target</text>\n",
        escape(title)
    );
    for tick in axis.ticks() {
        push_tick(&mut svg, tick, axis.x(tick), bottom);
    }
    for (index, row) in rows.iter().enumerate() {
        push_row(&mut svg, row, &axis, TOP + (index as f64 + 0.5) * ROW);
    }
    svg + "</svg>\n"
}

fn push_tick(svg: &mut String, tick: f64, x: f64, bottom: f64) {
    let (colour, width) = if tick == 1.0 {
        ("#333333", 1.5)
    } else {
        ("#dddddd", 1.0)
    };
    let above = TOP - 6.0;
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" stroke=\"{colour}\" \
         stroke-width=\"{width}\"/>\n<text x=\"{x:.1}\" y=\"{above}\" text-anchor=\"middle\" \
         fill=\"#555555\">{tick}×</text>"
    );
}

fn push_row(svg: &mut String, row: &Row, axis: &Axis, y: f64) {
    let base = y + 4.0;
    let (label, ratio, target) = match row {
        Row::Heading(text) => {
            let _ = writeln!(
                svg,
                "<text x=\"10\" y=\"{base}\" font-weight=\"bold\">{}</text>",
                escape(text)
            );
            return;
        }
        Row::Dot {
            label,
            ratio,
            target,
        } => (label, ratio, target),
    };
    let (low, middle, high) = (axis.x(ratio.low), axis.x(ratio.median), axis.x(ratio.high));
    let values = WIDTH - 10.0;
    let _ = writeln!(
        svg,
        "<text x=\"24\" y=\"{base}\">{}</text>\n\
         <line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{y}\" y2=\"{y}\" stroke=\"#1f5fa8\" \
         stroke-width=\"2\"/>\n\
         <circle cx=\"{middle:.1}\" cy=\"{y}\" r=\"4\" fill=\"#1f5fa8\"/>\n\
         <text x=\"{values}\" y=\"{base}\" text-anchor=\"end\">{:.2} [{:.2}, {:.2}]</text>",
        escape(label),
        ratio.median,
        ratio.low,
        ratio.high
    );
    if let Some(target) = target {
        let x = axis.x(*target);
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {:.1} l5 5 l-5 5 l-5 -5 z\" fill=\"none\" stroke=\"#c2571a\" \
             stroke-width=\"1.5\"/>",
            y - 5.0
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_and_half_are_equally_far_from_one() {
        let axis = Axis {
            low: 0.25,
            high: 4.0,
        };
        let distance = |a: f64, b: f64| axis.x(a) - axis.x(b);
        assert!((distance(2.0, 1.0) - distance(1.0, 0.5)).abs() < 1e-9);
        assert_eq!(axis.x(100.0), axis.x(4.0));
        assert!(axis.ticks().contains(&2.0) && !axis.ticks().contains(&5.0));
    }

    #[test]
    fn a_plot_holds_its_rows_and_nothing_unescaped() {
        let rows = [
            Row::Heading("a < b".into()),
            Row::Dot {
                label: "c & d".into(),
                ratio: Estimate::of(&[2.0, 2.5, 3.0]).unwrap(),
                target: Some(2.0),
            },
        ];
        let svg = draw("t", &rows);
        assert!(svg.contains("a &lt; b") && svg.contains("c &amp; d"));
        assert_eq!(svg.matches("<circle").count(), 1);
        assert_eq!(svg.matches("<path").count(), 1);
    }
}
