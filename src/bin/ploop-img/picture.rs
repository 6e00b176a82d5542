//! A picture of a disk: which level each part of it is read from, and what is where in the
//! files.
//!
//! What there is to be drawn is decided here, as boxes and lines of text; `svg` and `png` know
//! how to write those, and nothing of disks.

mod png;
mod svg;
pub mod terminal;

use std::fs;
use std::path::Path;

use vhost_user_ploop::image::{ImageError, Layout, LevelLayout, Part, Stretch};
use vhost_user_ploop::printable::Printable;

use crate::args::Output;
use crate::size::human;

/// How a picture is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Svg,
    Png,
}

impl Kind {
    /// As the name of the file says.
    ///
    /// # Errors
    /// In words.
    pub fn of(path: &Path) -> Result<Self, String> {
        let extension = path.extension().map(|e| e.to_ascii_lowercase());
        match extension.as_ref().and_then(|e| e.to_str()) {
            Some("svg") => Ok(Self::Svg),
            Some("png") => Ok(Self::Png),
            _ => Err(format!(
                "{}: a picture's name ends in .svg or .png, which says what is made",
                path.display()
            )),
        }
    }
}

/// Into so many parts a disk is divided at most.
pub const PARTS: u64 = COLUMNS * 32;

/// Into so many stretches a file is divided at most.
pub const STRETCHES: u64 = GRID_WIDTH as u64;

/// Cells beside each other.
const COLUMNS: u64 = 128;

const MARGIN: u32 = 24;
const CELL: u32 = 8;
const CELL_HEIGHT: u32 = 12;
/// Room for the offset at which a row begins.
const LABEL_WIDTH: u32 = 88;
const GRID_WIDTH: u32 = COLUMNS as u32 * CELL;
const WIDTH: u32 = MARGIN + LABEL_WIDTH + GRID_WIDTH + MARGIN;
const LINE: u32 = 20;
const BAR_HEIGHT: u32 = 24;
const SWATCH: u32 = 12;
/// How many characters of a font that is 7 pixels wide there is room for.
const TEXT_MAX: usize = ((LABEL_WIDTH + GRID_WIDTH - SWATCH) / 7) as usize;

/// Red, green, blue.
pub type Color = [u8; 3];

const INK: Color = [0x22, 0x26, 0x2b];
const FAINT: Color = [0x6b, 0x72, 0x7b];
const PAPER: Color = [0xff, 0xff, 0xff];
const NOTHING: Color = [0xe6, 0xe9, 0xed];
const METADATA: Color = [0x22, 0x26, 0x2b];
const UNUSED: Color = [0xfb, 0xd5, 0xd9];

/// Colours that those who see few can tell apart as well (Okabe and Ito's); the last is for
/// all levels further down.
const LEVELS: [Color; 8] = [
    [0x00, 0x72, 0xb2],
    [0xe6, 0x9f, 0x00],
    [0x00, 0x9e, 0x73],
    [0xcc, 0x79, 0xa7],
    [0x56, 0xb4, 0xe9],
    [0xd5, 0x5e, 0x00],
    [0xf0, 0xe4, 0x42],
    [0x8a, 0x8f, 0x96],
];

/// All levels from this depth on are drawn alike.
const REST: usize = LEVELS.len() - 1;

fn color_of(depth: usize) -> Color {
    LEVELS[depth.min(REST)]
}

fn darker(color: Color) -> Color {
    color.map(|part| (u16::from(part) * 11 / 20) as u8)
}

/// Something to be drawn; all lengths are in pixels, from the left top.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Shape {
    Box {
        x: u32,
        y: u32,
        width: u32,
        height: u32,
        color: Color,
    },
    Text {
        x: u32,
        /// Of the line that letters stand on.
        baseline: u32,
        text: String,
        style: Style,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Title,
    Plain,
    /// Ends at its place, and is paler.
    Label,
}

/// A picture, not yet in any format.
#[derive(Debug)]
struct Drawing {
    width: u32,
    height: u32,
    shapes: Vec<Shape>,
}

/// That nobody has asked for what programs read.
///
/// # Errors
/// In words.
pub fn require_human(output: Output) -> Result<(), String> {
    match output {
        Output::Human => Ok(()),
        Output::Json => {
            Err("--picture is for people, --output json for programs: give one of them".to_owned())
        }
    }
}

/// Writes a picture of the disk at `disk` to `file`, in place of what was there.
///
/// # Errors
/// Any of the writing.
pub fn save(file: &Path, kind: Kind, disk: &Path, layout: &Layout) -> Result<(), ImageError> {
    let drawing = draw(disk, layout);
    let bytes = match kind {
        Kind::Svg => svg::encode(&drawing),
        Kind::Png => png::encode(&drawing),
    };
    let written = bytes.and_then(|bytes| fs::write(file, bytes));
    written.map_err(|source| ImageError::Io {
        path: file.to_owned(),
        action: "write the picture",
        source,
    })
}

fn draw(disk: &Path, layout: &Layout) -> Drawing {
    let mut page = Page {
        y: MARGIN,
        shapes: Vec::new(),
    };
    page.text(Style::Title, &clipped(&disk.display(), TEXT_MAX * 7 / 10));
    page.text(Style::Plain, &summary(layout));
    page.gap();
    page.text(
        Style::Plain,
        &format!(
            "The disk: which level each part is read from. A cell is {}, a row {}.",
            human(layout.part),
            human(layout.part.saturating_mul(COLUMNS))
        ),
    );
    page.grid(layout);
    page.gap();
    page.text(
        Style::Plain,
        &format!(
            "The levels, the top first, and what is where in their files. A column is {}.",
            human(layout.stretch)
        ),
    );
    for (depth, level) in layout.levels.iter().enumerate().take(REST) {
        page.level(depth, level, layout.stretch);
    }
    if let Some(rest) = layout.levels.get(REST..).filter(|rest| !rest.is_empty()) {
        page.rest(rest);
    }
    page.gap();
    page.legend();
    Drawing {
        width: WIDTH,
        height: page.y + MARGIN - LINE / 2,
        shapes: page.shapes,
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

fn summary(layout: &Layout) -> String {
    let seen = layout.levels.iter().map(|level| level.seen).sum();
    format!(
        "{} in clusters of {}, {}; {} of it ({:.1} %) hold data",
        human(layout.disk_size),
        human(layout.cluster),
        count(layout.levels.len() as u64, "level"),
        human(seen),
        percent(seen, layout.disk_size)
    )
}

/// Without what a terminal or XML would obey, and with dots in place of the middle of what is
/// too long.
fn clipped(text: &impl std::fmt::Display, max: usize) -> String {
    let text = Printable(text).to_string();
    // These two are in no XML.
    let text = text.replace(['\u{fffe}', '\u{ffff}'], "?");
    let text: Vec<char> = text.chars().collect();
    if text.len() <= max {
        return text.into_iter().collect();
    }
    let end = max * 2 / 3;
    let start = text[..max - 3 - end].iter().collect::<String>();
    start + "..." + &text[text.len() - end..].iter().collect::<String>()
}

/// What is drawn, from the top down.
struct Page {
    y: u32,
    shapes: Vec<Shape>,
}

impl Page {
    fn gap(&mut self) {
        self.y += LINE / 2;
    }

    fn text(&mut self, style: Style, text: &str) {
        self.text_at(MARGIN, style, text);
        self.y += match style {
            Style::Title => LINE * 3 / 2,
            _ => LINE,
        };
    }

    fn text_at(&mut self, x: u32, style: Style, text: &str) {
        self.shapes.push(Shape::Text {
            x,
            baseline: self.y
                + match style {
                    Style::Title => 16,
                    _ => 12,
                },
            text: text.to_owned(),
            style,
        });
    }

    fn fill(&mut self, x: u32, y: u32, (width, height): (u32, u32), color: Color) {
        self.shapes.push(Shape::Box {
            x,
            y,
            width,
            height,
            color,
        });
    }

    fn grid(&mut self, layout: &Layout) {
        for (row, parts) in layout.parts.chunks(COLUMNS as usize).enumerate() {
            let start = row as u64 * COLUMNS * layout.part;
            let label_x = MARGIN + LABEL_WIDTH - 8;
            if row % 2 == 0 {
                self.text_at(label_x, Style::Label, &human(start));
            }
            for (column, part) in parts.iter().enumerate() {
                let x = MARGIN + LABEL_WIDTH + column as u32 * CELL;
                let index = row as u64 * COLUMNS + column as u64;
                let len = layout.part.min(layout.disk_size - index * layout.part);
                let pieces = levels_in(part);
                let pieces = pieces.iter().map(|(color, bytes)| (*color, *bytes));
                let size = (CELL - 1, CELL_HEIGHT - 1);
                self.stack(x, self.y, size, (NOTHING, len), pieces);
            }
            self.y += CELL_HEIGHT;
        }
        self.y += 6;
        let end = format!("ends at {}", human(layout.disk_size));
        self.text_at(MARGIN + LABEL_WIDTH + GRID_WIDTH, Style::Label, &end);
        self.y += LINE;
    }

    /// A box of which each piece takes its share of what `whole` bytes there are, from the
    /// bottom up; the rest is of the colour that is given with them.
    fn stack(
        &mut self,
        x: u32,
        y: u32,
        (width, height): (u32, u32),
        (rest, whole): (Color, u64),
        pieces: impl Iterator<Item = (Color, u64)>,
    ) {
        let mut left = height;
        for (color, bytes) in pieces.filter(|(_, bytes)| *bytes > 0) {
            let share = (f64::from(height) * bytes as f64 / whole.max(1) as f64).round() as u32;
            // Little is more than nothing.
            let share = share.max(1).min(left);
            if share > 0 {
                left -= share;
                self.fill(x, y + left, (width, share), color);
            }
        }
        if left > 0 {
            self.fill(x, y, (width, left), rest);
        }
    }

    fn level(&mut self, depth: usize, level: &LevelLayout, stretch: u64) {
        let name = level.filename.file_name().unwrap_or_default();
        let order = match level.is_raw {
            true => "raw".to_owned(),
            false => format!(
                "{} in {}",
                count(level.clusters, "cluster"),
                count(level.pieces, "piece")
            ),
        };
        let said = format!(
            "{depth}: {}; {} ({order}), {} of it read from here",
            clipped(&name.display(), TEXT_MAX / 2),
            human(level.held),
            human(level.seen),
        );
        self.swatch(MARGIN, color_of(depth));
        self.text_at(MARGIN + SWATCH + 8, Style::Plain, &clipped(&said, TEXT_MAX));
        self.y += LINE - 2;
        self.bar(depth, level, stretch);
        self.y += BAR_HEIGHT + 8;
    }

    fn bar(&mut self, depth: usize, level: &LevelLayout, stretch: u64) {
        let color = color_of(depth);
        let label_x = MARGIN + LABEL_WIDTH - 8;
        self.text_at(label_x, Style::Label, &human(level.length));
        let mut column = 0;
        // Columns that are alike are one box.
        let is_last = |index| index + 1 == level.stretches.len();
        let mut stretches = level.stretches.iter().enumerate().peekable();
        while let Some((index, at)) = stretches.next() {
            let mut width = 1;
            let is_alike = |next: &(usize, &Stretch)| next.1 == at && !is_last(next.0);
            while !is_last(index) && stretches.next_if(is_alike).is_some() {
                width += 1;
            }
            let start = index as u64 * stretch;
            let len = stretch.min(level.length - start);
            let pieces = [
                (METADATA, at.metadata),
                (color, at.following),
                (darker(color), at.begun),
            ];
            let unused = match level.is_raw {
                true => NOTHING,
                false => UNUSED,
            };
            let x = MARGIN + LABEL_WIDTH + column;
            let size = (width, BAR_HEIGHT);
            self.stack(x, self.y, size, (unused, len), pieces.into_iter());
            column += width;
        }
    }

    fn rest(&mut self, rest: &[LevelLayout]) {
        let sum = |of: fn(&LevelLayout) -> u64| rest.iter().map(of).sum::<u64>();
        let said = format!(
            "{REST} and further down: {}; {} ({} in {}), {} of it read from here",
            count(rest.len() as u64, "level"),
            human(sum(|level| level.held)),
            count(sum(|level| level.clusters), "cluster"),
            count(sum(|level| level.pieces), "piece"),
            human(sum(|level| level.seen))
        );
        self.swatch(MARGIN, color_of(REST));
        self.text_at(MARGIN + SWATCH + 8, Style::Plain, &said);
        self.y += LINE;
    }

    fn swatch(&mut self, x: u32, color: Color) {
        self.fill(x, self.y + 2, (SWATCH, SWATCH), color);
    }

    fn legend(&mut self) {
        let mut x = MARGIN;
        for (color, text) in [
            (NOTHING, "reads as zeros"),
            (METADATA, "header and BAT"),
            (
                darker(LEVELS[0]),
                "begins a piece: not behind the cluster that is before it on the disk",
            ),
            (UNUSED, "in the file, but not used"),
        ] {
            self.swatch(x, color);
            self.text_at(x + SWATCH + 6, Style::Plain, text);
            x += SWATCH + 6 + 7 * text.len() as u32 + 24;
        }
        self.y += LINE;
    }
}

/// The colours of a part, the base's first, as it is at the bottom.
fn levels_in(part: &Part) -> Vec<(Color, u64)> {
    let mut by_color = [0; LEVELS.len()];
    for (depth, bytes) in &part.held {
        by_color[(*depth).min(REST)] += bytes;
    }
    let colors = LEVELS.into_iter().zip(by_color);
    colors.rev().filter(|(_, bytes)| *bytes > 0).collect()
}

#[cfg(test)]
mod tests;
