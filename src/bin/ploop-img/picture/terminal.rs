//! A small picture in letters: for each level, how much of each part of the disk is read from
//! it.

use std::env;
use std::io::{IsTerminal, stdout};

use vhost_user_ploop::image::Layout;

use crate::size::human;

/// Where the width is not known.
const USUAL_WIDTH: usize = 80;

/// Around the bars.
const FRAME: usize = "  7+ |".len() + "| 100.0 %".len();

/// More would be no small picture.
const BAR_MAX: usize = 128;

/// Levels that have a bar of their own; those further down share one.
const OWN: usize = 7;

/// From little to all.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const ASCII: [char; 8] = ['.', ':', '-', '=', '+', '*', '#', '@'];

/// How wide the bars may be: as wide as the terminal, if there is one.
pub fn bar_width() -> usize {
    let of_terminal = || {
        let (columns, _) = ratatui::crossterm::terminal::size().ok()?;
        Some(usize::from(columns)).filter(|columns| *columns > 0)
    };
    let is_terminal = stdout().is_terminal();
    let width = is_terminal.then(of_terminal).flatten();
    let width = width.unwrap_or(USUAL_WIDTH);
    width.saturating_sub(FRAME).clamp(1, BAR_MAX)
}

/// Whether more than ASCII is understood.
pub fn is_utf8() -> bool {
    let set = |name| env::var(name).ok().filter(|value| !value.is_empty());
    // The order that setlocale(3) has.
    let locale = set("LC_ALL")
        .or_else(|| set("LC_CTYPE"))
        .or_else(|| set("LANG"));
    locale.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// The lines of the picture.
pub fn lines(layout: &Layout, is_utf8: bool) -> Vec<String> {
    let ramp = if is_utf8 { BLOCKS } else { ASCII };
    let depths = layout.levels.len().min(OWN + 1);
    let mut lines = vec![format!(
        "read from which level, 0 being the top; a column is {}:",
        human(layout.part)
    )];
    for depth in 0..depths {
        let is_in = |at: usize| at.min(OWN) == depth;
        let mut bar = String::new();
        let mut start = 0;
        for part in &layout.parts {
            let held = part.held.iter().filter(|(at, _)| is_in(*at));
            let held = held.map(|(_, bytes)| bytes).sum();
            let len = layout.part.min(layout.disk_size - start);
            bar.push(letter(held, len, ramp));
            start += layout.part;
        }
        let seen = layout.levels.iter().enumerate();
        let seen = seen.filter(|(at, _)| is_in(*at));
        let seen: u64 = seen.map(|(_, level)| level.seen).sum();
        let more = if depth == OWN && layout.levels.len() > depths {
            "+"
        } else {
            " "
        };
        let percent = 100.0 * seen as f64 / layout.disk_size.max(1) as f64;
        lines.push(format!("  {depth:>2}{more}|{bar}| {percent:5.1} %"));
    }
    let end = human(layout.disk_size);
    let width = layout.parts.len().saturating_sub(1).max(end.len() + 1);
    lines.push(format!("      0{end:>width$}"));
    let clusters: u64 = layout.levels.iter().map(|level| level.clusters).sum();
    let pieces: u64 = layout.levels.iter().map(|level| level.pieces).sum();
    if clusters > 0 {
        lines.push(format!(
            "fragmentation: {clusters} clusters in {pieces} pieces"
        ));
    }
    lines
}

/// How much of a part is held, little being more than nothing.
fn letter(held: u64, len: u64, ramp: [char; 8]) -> char {
    let share = held as f64 / len.max(1) as f64;
    match (share * ramp.len() as f64).ceil() as usize {
        0 => ' ',
        step => ramp[(step - 1).min(ramp.len() - 1)],
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{chain, two_levels};
    use super::*;

    #[test]
    fn each_level_has_a_bar() {
        let expected = [
            "read from which level, 0 being the top; a column is 2 MiB:",
            "   0 |▄  ▁|  14.1 %",
            "   1 |▄█  |  37.5 %",
            "      0 8 MiB",
            "fragmentation: 8 clusters in 3 pieces",
        ];
        assert_eq!(lines(&two_levels(), true), expected);
        let ascii = lines(&two_levels(), false);
        assert_eq!(ascii[1..3], ["   0 |=  .|  14.1 %", "   1 |=@  |  37.5 %"]);
    }

    #[test]
    fn levels_far_down_share_a_bar() {
        for (levels, bars, last) in [(1, 1, "   0 |"), (8, 8, "   7 |"), (126, 8, "   7+|")] {
            let lines = lines(&chain(levels), false);
            assert_eq!(lines.len(), bars + 3);
            assert!(lines[bars].starts_with(last), "{lines:#?}");
            assert!(lines.iter().all(|line| line.is_ascii()));
        }
    }
}
