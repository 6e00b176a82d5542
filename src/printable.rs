//! Text of foreign origin on its way to a terminal or a log.
//!
//! Names of files, the content of descriptors and arguments can hold control
//! characters, which a terminal obeys and which forge lines of a log. Both programs
//! write what they have to say through this.

use std::fmt::{self, Display, Write};

/// Shows what it holds on one line, with nothing in it that a terminal would obey.
pub struct Printable<T>(pub T);

impl<T: Display> Display for Printable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaper { out: f, keep: "" }, "{}", self.0)
    }
}

/// As [`Printable`], of what is meant to have several lines.
pub struct PrintableLines<T>(pub T);

impl<T: Display> Display for PrintableLines<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keep = "\n";
        write!(Escaper { out: f, keep }, "{}", self.0)
    }
}

/// Whether a terminal would obey the character instead of showing it, or show
/// those around it in another order.
pub fn is_obeyed(character: char) -> bool {
    const ORDER: [std::ops::RangeInclusive<char>; 3] = [
        '\u{200e}'..='\u{200f}',
        '\u{202a}'..='\u{202e}',
        '\u{2066}'..='\u{2069}',
    ];
    let ends_line = matches!(character, '\u{2028}' | '\u{2029}');
    let is_order = ORDER.iter().any(|range| range.contains(&character));
    character.is_control() || ends_line || is_order
}

struct Escaper<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    /// Stay as they are.
    keep: &'static str,
}

impl Write for Escaper<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let keep = self.keep;
        let is_escaped = |character: char| is_obeyed(character) && !keep.contains(character);
        let mut rest = text;
        while let Some(at) = rest.find(is_escaped) {
            let (before, from) = rest.split_at(at);
            let mut characters = from.chars();
            self.out.write_str(before)?;
            if let Some(character) = characters.next() {
                write!(self.out, "{}", character.escape_default())?;
            }
            rest = characters.as_str();
        }
        self.out.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_obeyed_comes_through() {
        let text = "a\x1b[31mb\r\n\t\x7f\u{9b}2J\u{202e}é\u{2028}";
        let one = Printable(text).to_string();
        assert_eq!(one, r"a\u{1b}[31mb\r\n\t\u{7f}\u{9b}2J\u{202e}é\u{2028}");
        assert!(!one.chars().any(is_obeyed));
        let lines = PrintableLines(text).to_string();
        assert_eq!(lines, one.replace(r"\n", "\n"));
    }

    #[test]
    fn what_is_harmless_stays() {
        let text = r"C:\disk 'ä' {漢字}";
        assert_eq!(Printable(text).to_string(), text);
    }
}
