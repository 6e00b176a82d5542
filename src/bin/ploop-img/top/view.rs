//! What `top` looks like.

use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{
    Block, Cell, Clear, Padding, Paragraph, RenderDirection, Row, Sparkline, Table, TableState,
};
use vhost_user_ploop::printable::Printable;

use super::App;
use super::disks::{Column, Disk, Moment};
use crate::sample::{Report, duration};
use crate::size::human;

/// Lines of the part about the selected disk.
const DETAILS: u16 = 9;

/// With fewer lines than this there is only the list.
const ROOM_FOR_DETAILS: u16 = 20;

/// Least width of the names of disks.
const NAME_WIDTH: u16 = 16;

/// Columns that are always there, in their order, and how wide they are.
const COLUMNS: [(Column, u16); 7] = [
    (Column::Disk, NAME_WIDTH),
    (Column::Reads, 7),
    (Column::ReadBytes, 9),
    (Column::Writes, 7),
    (Column::WrittenBytes, 9),
    (Column::P99, 7),
    (Column::Depth, 6),
];

/// Further ones, as far as there is room, the most important first.
const MORE_COLUMNS: [(Column, u16); 4] = [
    (Column::Bytes, 12),
    (Column::Status, 10),
    (Column::Size, 9),
    (Column::Dirty, 6),
];

/// Keys, and what they do.
const KEYS: [(&str, &str); 8] = [
    ("q, Esc", "end"),
    ("Up, Down, PgUp, PgDn, Home, End", "select a disk"),
    ("Left, Right", "sort by another column"),
    ("r", "sort the other way round"),
    ("+, -", "longer or shorter intervals"),
    ("Space", "stop the picture, go on"),
    ("h, ?", "this help, and back"),
    (
        "",
        "depth: requests under way on average; dirty: pages of the map to be written",
    ),
];

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, app: &App, now: Instant) {
    let area = frame.area();
    let has_details = area.height >= ROOM_FOR_DETAILS && app.disks.selected().is_some();
    let details = if has_details { DETAILS } else { 0 };
    let [head, list, below, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(details),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(summary(app, now), head);
    match app.disks.all() {
        [] => frame.render_widget(nothing(), list),
        _ => draw_list(frame, app, list, now),
    }
    if let Some(disk) = app.disks.selected().filter(|_| has_details) {
        draw_details(frame, disk, below);
    }
    frame.render_widget(footer(), foot);
    if app.shows_help {
        draw_help(frame, area);
    }
}

/// All together; of those that do not answer nothing is known.
fn summary(app: &App, now: Instant) -> Paragraph<'_> {
    let disks = app.disks.all();
    let seconds = app.pace.seconds();
    let pause = Duration::from_secs(seconds);
    let sum = |rate: fn(&Report) -> f64| {
        let known = disks.iter().filter(|disk| !disk.is_silent(now, pause));
        let sum: f64 = known.map(|disk| rate(&disk.report)).sum();
        sum.round() as u64
    };
    let state = if app.stopped_at.is_some() {
        ", stopped"
    } else {
        ""
    };
    let plural = if disks.len() == 1 { "" } else { "s" };
    Paragraph::new(format!(
        "{} disk{plural}: {} reads/s {}/s, {} writes/s {}/s; every {seconds} s, by {}{state}",
        disks.len(),
        sum(|report| report.reads.operations_per_second),
        human(sum(|report| report.reads.bytes_per_second)),
        sum(|report| report.writes.operations_per_second),
        human(sum(|report| report.writes.bytes_per_second)),
        heading(app.disks.order().by),
    ))
}

fn nothing() -> Paragraph<'static> {
    let why = "No disk is being served here that may be asked, or none of those that were named.";
    Paragraph::new(why).alignment(Alignment::Center)
}

fn footer() -> Paragraph<'static> {
    let keys = " q end   h help   arrows select and sort   r reverse   +/- interval   space stop ";
    Paragraph::new(keys).style(Style::new().add_modifier(Modifier::DIM))
}

/// Those that there is room for.
fn columns(width: u16) -> Vec<(Column, u16)> {
    let mut columns = COLUMNS.to_vec();
    let width_of =
        |columns: &[(Column, u16)]| columns.iter().map(|(_, width)| width + 1).sum::<u16>();
    for column in MORE_COLUMNS {
        if width_of(&columns) + column.1 <= width {
            columns.push(column);
        }
    }
    columns
}

fn draw_list(frame: &mut Frame<'_>, app: &App, area: Rect, now: Instant) {
    let columns = columns(area.width);
    let order = app.disks.order();
    let header = columns.iter().map(|&(column, _)| {
        let mark = match (column == order.by, order.is_reversed) {
            (true, false) => "▾",
            (true, true) => "▴",
            (false, _) => "",
        };
        let style = match column == order.by {
            true => Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED),
            false => Style::new().add_modifier(Modifier::BOLD),
        };
        let text = format!("{}{mark}", heading(column));
        Cell::from(aligned(text, column)).style(style)
    });
    let pause = Duration::from_secs(app.pace.seconds());
    let name_width = area.width.saturating_sub(
        columns
            .iter()
            .skip(1)
            .map(|(_, width)| width + 1)
            .sum::<u16>(),
    );
    let rows = app.disks.all().iter().map(|disk| {
        let is_silent = disk.is_silent(now, pause);
        let cells = columns.iter().map(|&(column, width)| {
            let width = if column == Column::Disk {
                name_width
            } else {
                width
            };
            Cell::from(aligned(shown(column, width, disk, is_silent), column))
        });
        Row::new(cells.collect::<Vec<_>>()).style(style_of(disk, is_silent))
    });
    let widths = columns.iter().map(|&(column, width)| match column {
        Column::Disk => Constraint::Min(width),
        _ => Constraint::Length(width),
    });
    let table = Table::new(rows.collect::<Vec<_>>(), widths)
        .header(Row::new(header.collect::<Vec<_>>()))
        .column_spacing(1)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(app.disks.selected_index());
    frame.render_stateful_widget(table, area, &mut state);
}

fn style_of(disk: &Disk, is_silent: bool) -> Style {
    match disk.report.status.as_str() {
        _ if is_silent => Style::new().fg(Color::Yellow),
        "running" => Style::new(),
        _ => Style::new().fg(Color::Red),
    }
}

/// Names on the left, numbers on the right.
fn aligned(text: String, column: Column) -> Line<'static> {
    let line = Line::from(text);
    match column {
        Column::Disk | Column::Status => line,
        _ => line.alignment(Alignment::Right),
    }
}

fn heading(column: Column) -> &'static str {
    match column {
        Column::Disk => "DISK",
        Column::Reads => "R/S",
        Column::ReadBytes => "READ/S",
        Column::Writes => "W/S",
        Column::WrittenBytes => "WRITE/S",
        Column::P99 => "P99",
        Column::Depth => "DEPTH",
        Column::Bytes => "BYTES/S",
        Column::Size => "SIZE",
        Column::Dirty => "DIRTY",
        Column::Status => "STATUS",
    }
}

fn shown(column: Column, width: u16, disk: &Disk, is_silent: bool) -> String {
    let report = &disk.report;
    let count = |rate: f64| (rate.round() as u64).to_string();
    let bytes = |rate: f64| human(rate.round() as u64);
    match column {
        Column::Disk => name(report, width),
        Column::Reads => count(report.reads.operations_per_second),
        Column::ReadBytes => bytes(report.reads.bytes_per_second),
        Column::Writes => count(report.writes.operations_per_second),
        Column::WrittenBytes => bytes(report.writes.bytes_per_second),
        Column::P99 => duration(report.p99_ns),
        Column::Depth => format!("{:.1}", report.queue_depth),
        Column::Bytes => bars(disk.history().map(Moment::bytes), width.into()),
        Column::Size => human(report.actual_size),
        Column::Dirty => report.dirty_pages.to_string(),
        Column::Status if is_silent => "no answer".to_owned(),
        Column::Status => Printable(&report.status).to_string(),
    }
}

/// The end of the path, which tells disks apart, with a mark where there is more of it.
fn name(report: &Report, width: u16) -> String {
    let path = Printable(&report.file).to_string();
    let count = path.chars().count();
    let width = usize::from(width);
    if count <= width {
        return path;
    }
    let end = path.chars().skip(count + 1 - width.max(1));
    std::iter::once('…').chain(end).collect()
}

/// A small chart of one line, the latest on the right.
fn bars(latest_first: impl Iterator<Item = u64>, width: usize) -> String {
    const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let values: Vec<_> = latest_first.take(width).collect();
    let most = values.iter().copied().max().unwrap_or_default().max(1);
    let bar = |value: &u64| {
        // What is more than nothing is seen.
        let level = (*value as u128 * 8).div_ceil(most.into()) as usize;
        LEVELS[level.min(8)]
    };
    let bars = values.iter().rev().map(bar);
    std::iter::repeat_n(' ', width - values.len())
        .chain(bars)
        .collect()
}

/// What a chart shows.
type Value = fn(&Moment) -> u64;

/// How such a value is written.
type Unit = fn(u64) -> String;

fn draw_details(frame: &mut Frame<'_>, disk: &Disk, area: Rect) {
    let report = &disk.report;
    let title = format!(" {} ", Printable(&report.file));
    let block = Block::bordered()
        .title(title)
        .padding(Padding::horizontal(1));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let [text, charts] = Layout::vertical([Constraint::Length(4), Constraint::Min(0)]).areas(inner);
    frame.render_widget(Paragraph::new(description(report)), text);
    let areas = Layout::horizontal([Constraint::Ratio(1, 3); 3])
        .spacing(2)
        .split(charts);
    let charts: [(&str, Value, Unit); 3] = [
        ("read/s", |moment| moment.read_bytes, human),
        ("written/s", |moment| moment.written_bytes, human),
        ("p99", |moment| moment.p99_ns, |ns| duration(Some(ns))),
    ];
    for ((name, value, unit), area) in charts.into_iter().zip(areas.iter()) {
        draw_chart(frame, disk.history().map(value), name, unit, *area);
    }
}

fn draw_chart(
    frame: &mut Frame<'_>,
    latest_first: impl Iterator<Item = u64>,
    name: &str,
    unit: Unit,
    area: Rect,
) {
    let values: Vec<_> = latest_first.take(area.width.into()).collect();
    let most = values.iter().copied().max().unwrap_or_default();
    let [title, chart] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(area);
    let title_text = format!("{name}, at most {}", unit(most));
    frame.render_widget(Paragraph::new(title_text), title);
    let sparkline = Sparkline::default()
        .data(values)
        .max(most.max(1))
        .direction(RenderDirection::RightToLeft)
        .style(Style::new().fg(Color::Cyan));
    frame.render_widget(sparkline, chart);
}

fn description(report: &Report) -> Vec<Line<'static>> {
    let label = |text: &'static str| Span::styled(text, Style::new().add_modifier(Modifier::DIM));
    let line = |parts: Vec<(&'static str, String)>| {
        let spans = parts
            .into_iter()
            .flat_map(|(name, value)| [label(name), Span::raw(format!(" {value}   "))]);
        Line::from(spans.collect::<Vec<_>>())
    };
    let rate = |rate: f64| format!("{rate:.0}/s");
    let limits = report.limits.iter();
    let limits: Vec<_> = limits
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let limits = match limits.is_empty() {
        true => "none".to_owned(),
        false => limits.join(","),
    };
    vec![
        line(vec![
            ("status", Printable(&report.status).to_string()),
            ("disk", human(report.virtual_size)),
            ("on the host", human(report.actual_size)),
            ("in flight", report.in_flight.to_string()),
            ("waiting for space", report.parked.to_string()),
        ]),
        line(vec![
            ("reads p50", duration(report.reads.p50_ns)),
            ("p99", duration(report.reads.p99_ns)),
            ("writes p50", duration(report.writes.p50_ns)),
            ("p99", duration(report.writes.p99_ns)),
            ("flushes", rate(report.flushes.operations_per_second)),
            ("p99", duration(report.flushes.p99_ns)),
        ]),
        line(vec![
            ("discards", rate(report.discards.operations_per_second)),
            ("metadata", rate(report.rounds_per_second)),
            ("syncs", rate(report.syncs_per_second)),
            ("pages to be written", report.dirty_pages.to_string()),
        ]),
        line(vec![("limits", limits)]),
    ]
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let lines = KEYS.map(|(key, what)| match key {
        "" => Line::from(what),
        _ => Line::from(format!("{key:<32} {what}")),
    });
    let (width, height) = (82.min(area.width), (KEYS.len() as u16 + 2).min(area.height));
    let popup = Rect {
        x: area.x + (area.width - width) / 2,
        y: area.y + (area.height - height) / 2,
        width,
        height,
    };
    frame.render_widget(Clear, popup);
    let block = Block::bordered()
        .title(" Keys ")
        .padding(Padding::horizontal(1));
    frame.render_widget(Paragraph::new(lines.to_vec()).block(block), popup);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::disks::tests::did;
    use super::super::tests::app;
    use super::*;

    /// What is on the screen, line by line.
    fn screen(app: &App, width: u16, height: u16) -> Vec<String> {
        screen_at(app, width, height, Instant::now())
    }

    fn screen_at(app: &App, width: u16, height: u16, now: Instant) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, app, now)).unwrap();
        let buffer = terminal.backend().buffer();
        let cells = buffer.content();
        let lines = cells.chunks(usize::from(width.max(1)));
        let line =
            |cells: &[ratatui::buffer::Cell]| cells.iter().map(|cell| cell.symbol()).collect();
        lines.map(line).collect()
    }

    #[test]
    fn the_busiest_disk_is_above_and_what_it_does_stands_below_the_names() {
        let app = app(&[("quiet", 5), ("busy", 20_000)]);
        let lines = screen(&app, 120, 30);
        let find = |text: &str| lines.iter().position(|line| line.contains(text));
        assert!(
            lines[0].starts_with("2 disks: 20005 reads/s 78.1 MiB/s, 0 writes/s"),
            "{lines:#?}"
        );
        let (busy, quiet) = (find("/vz/busy/root.hds"), find("/vz/quiet/root.hds"));
        assert_eq!((busy, quiet), (Some(2), Some(3)), "{lines:#?}");
        let end = |name: &str| {
            let at = lines[1].find(name).unwrap();
            lines[1][..at].chars().count() + name.chars().count()
        };
        let under = |name: &str| {
            let line: Vec<_> = lines[2].chars().take(end(name)).collect();
            let text: String = line.into_iter().collect();
            text.rsplit("  ").next().unwrap().trim().to_owned()
        };
        assert_eq!(under(" R/S"), "20000");
        assert_eq!(under("READ/S"), "78.1 MiB");
        assert_eq!(under("P99"), "104 us");
        assert_eq!(under("DEPTH▾"), "2.0");
        assert!(
            lines[2].contains('█') && lines[2].contains("running"),
            "{lines:#?}"
        );
        // Of the selected one.
        assert!(find("limits iops=500,iops_max=900").is_some(), "{lines:#?}");
        assert!(find("read/s, at most 78.1 MiB").is_some(), "{lines:#?}");
        assert!(find("p99, at most 104 us").is_some(), "{lines:#?}");
    }

    #[test]
    fn columns_and_details_are_left_out_where_there_is_no_room() {
        let app = app(&[("a", 5)]);
        let lines = screen(&app, 80, 24);
        assert!(
            lines[1].contains("DEPTH") && !lines[1].contains("STATUS"),
            "{lines:#?}"
        );
        let lines = screen(&app, 80, 10);
        assert!(
            lines.iter().all(|line| !line.contains("limits")),
            "{lines:#?}"
        );
        // Nowhere too little to be drawn.
        for width in [0, 1, 2, 3, 5, 9, 17, 33, 65, 97, 129, 257] {
            for height in [0, 1, 2, 3, 5, 19, 20, 21] {
                screen(&app, width, height);
            }
        }
    }

    #[test]
    fn long_paths_lose_their_beginning_and_odd_ones_their_effect() {
        let mut app = app(&[]);
        assert!(
            screen(&app, 100, 10)
                .iter()
                .any(|line| line.contains("No disk"))
        );
        let mut news = did("a", 1);
        if let super::super::watch::What::Did(report) = &mut news.what {
            report.file = format!("/{}/end\u{1b}[2J\u{202e}.hds", "x".repeat(100));
        }
        app.disks.hear(news, Instant::now());
        let lines = screen(&app, 80, 10);
        assert!(lines[2].starts_with('…'), "{lines:#?}");
        assert!(lines[2].contains(r"\u{202e}.hds "), "{lines:#?}");
        assert!(!lines.concat().contains(['\u{1b}', '\u{202e}']));
    }

    #[test]
    fn a_process_that_does_not_answer_and_the_help_are_seen() {
        let mut app = app(&[("a", 5)]);
        let later = Instant::now() + Duration::from_secs(60);
        let lines = screen_at(&app, 120, 24, later);
        assert!(lines[2].contains("no answer"), "{lines:#?}");
        assert!(lines[0].contains(" 0 reads/s"), "{lines:#?}");
        app.shows_help = true;
        let lines = screen(&app, 100, 24);
        assert!(
            lines
                .iter()
                .any(|line| line.contains("sort by another column")),
            "{lines:#?}"
        );
    }

    #[test]
    fn bars_are_as_high_as_what_they_stand_for() {
        assert_eq!(bars([8, 4, 1, 0].into_iter(), 6), "   ▁▄█");
        assert_eq!(bars([0, 0].into_iter(), 2), "  ");
        assert_eq!(bars([1, u64::MAX].into_iter(), 1), "█");
        assert_eq!(bars([].into_iter(), 0), "");
    }
}
