//! From a stream of bytes to objects.
//!
//! Clients send JSON objects one after another: several in one write, or one in many, with
//! or without anything between them. So where an object ends is found by its brackets,
//! not by lines. What is no object is answered once and skipped up to where the next one
//! may begin, and nothing of it is kept.

/// Longest object, in bytes: no command here needs a tenth of it.
pub(super) const MAX_LEN: usize = 64 << 10;

/// How deep brackets may stand in each other.
pub(super) const MAX_DEPTH: u64 = 32;

/// What has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// From its first bracket to its last one. Not looked at any further.
    Object(Vec<u8>),
    /// Something else, and what is wrong with it.
    Invalid(&'static str),
}

/// Where in the stream the next byte stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Outside,
    /// In what is no object, which was said.
    Garbage,
    /// In an object; `is_kept`: it may still be one.
    Inside {
        depth: u64,
        is_kept: bool,
        text: Text,
    },
}

/// Whether a byte in an object belongs to a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    No,
    Yes,
    /// And a backslash stands before it.
    Escaped,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Framer {
    place: Place,
    /// Of the object, as far as it has come.
    object: Vec<u8>,
}

impl Framer {
    /// Takes bytes from the front of `input` until something is complete. `None` if all
    /// were taken.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Frame> {
        while let Some((&byte, rest)) = input.split_first() {
            let frame = self.take(byte);
            // A byte that ends garbage is the first of what follows.
            if !(self.place == Place::Outside && frame.is_none() && byte == b'{') {
                *input = rest;
            }
            if frame.is_some() {
                return frame;
            }
        }
        None
    }

    fn take(&mut self, byte: u8) -> Option<Frame> {
        match self.place {
            Place::Outside => self.take_outside(byte),
            Place::Garbage => {
                if matches!(byte, b'{' | b'\n' | b'\r') {
                    self.place = Place::Outside;
                }
                None
            }
            Place::Inside {
                depth,
                is_kept,
                text,
            } => self.take_inside(byte, depth, is_kept, text),
        }
    }

    fn take_outside(&mut self, byte: u8) -> Option<Frame> {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => None,
            b'{' => {
                self.object.push(byte);
                self.place = Place::Inside {
                    depth: 1,
                    is_kept: true,
                    text: Text::No,
                };
                None
            }
            _ => {
                self.place = Place::Garbage;
                Some(Frame::Invalid("QMP input must be a JSON object"))
            }
        }
    }

    fn take_inside(&mut self, byte: u8, depth: u64, is_kept: bool, text: Text) -> Option<Frame> {
        let is_space = matches!(byte, b'\t' | b'\r' | b'\n') && text == Text::No;
        if (byte < b' ' && !is_space) || byte >= 0xfe {
            // No JSON has these: whatever was meant to be, it begins anew. So a client whose
            // quotation mark is missing is understood again, at the next line at the latest.
            self.forget(Place::Garbage);
            if byte == b'\n' || byte == b'\r' {
                self.place = Place::Outside;
            }
            return is_kept.then_some(Frame::Invalid("JSON parse error, invalid character"));
        }
        let (depth, text) = match (text, byte) {
            (Text::No, b'{' | b'[') => (depth + 1, Text::No),
            (Text::No, b'}' | b']') => (depth - 1, Text::No),
            (Text::No, b'"') | (Text::Escaped, _) => (depth, Text::Yes),
            (Text::Yes, b'"') => (depth, Text::No),
            (Text::Yes, b'\\') => (depth, Text::Escaped),
            _ => (depth, text),
        };
        if is_kept {
            self.object.push(byte);
        }
        if depth == 0 {
            let object = self.forget(Place::Outside);
            return is_kept.then_some(Frame::Object(object));
        }
        let wrong = if depth > MAX_DEPTH {
            Some("JSON nesting depth limit exceeded")
        } else if self.object.len() >= MAX_LEN {
            Some("JSON object size limit exceeded")
        } else {
            None
        };
        let wrong = wrong.filter(|_| is_kept);
        if wrong.is_some() {
            self.forget(Place::Outside);
        }
        self.place = Place::Inside {
            depth,
            is_kept: is_kept && wrong.is_none(),
            text,
        };
        wrong.map(Frame::Invalid)
    }

    /// Gives out what has come of an object, and keeps nothing.
    fn forget(&mut self, place: Place) -> Vec<u8> {
        self.place = place;
        std::mem::take(&mut self.object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(framer: &mut Framer, mut input: &[u8]) -> Vec<Frame> {
        let mut frames = Vec::new();
        while let Some(frame) = framer.next(&mut input) {
            frames.push(frame);
        }
        assert!(input.is_empty());
        frames
    }

    fn object(text: &str) -> Frame {
        Frame::Object(text.into())
    }

    fn is_invalid(frame: &Frame) -> bool {
        matches!(frame, Frame::Invalid(_))
    }

    #[test]
    fn objects_end_with_their_bracket_however_they_come() {
        let input = r#"{"a":"}\"{"}  {"b":[{}]}{}"#;
        let expected = [
            object(r#"{"a":"}\"{"}"#),
            object(r#"{"b":[{}]}"#),
            object("{}"),
        ];
        assert_eq!(frames(&mut Framer::default(), input.as_bytes()), expected);
        let mut framer = Framer::default();
        let bytes = input.as_bytes().chunks(1);
        let one_by_one: Vec<_> = bytes.flat_map(|byte| frames(&mut framer, byte)).collect();
        assert_eq!(one_by_one, expected);
    }

    #[test]
    fn what_is_no_object_is_said_once_and_skipped() {
        let mut framer = Framer::default();
        let found = frames(&mut framer, b"garbage 1 2 ]]]{\"a\":1}\nmore\n{\"b\":2}");
        assert!(is_invalid(&found[0]) && is_invalid(&found[2]), "{found:?}");
        assert_eq!(found[1], object(r#"{"a":1}"#));
        assert_eq!(found[3], object(r#"{"b":2}"#));
        assert_eq!(found.len(), 4);
    }

    #[test]
    fn a_million_bytes_without_an_end_are_one_error_and_no_memory() {
        for start in ["x", r#"{"a":""#, r#"{"a":["#] {
            let mut framer = Framer::default();
            let mut found = frames(&mut framer, start.as_bytes());
            for _ in 0..1_000 {
                found.extend(frames(&mut framer, &[b'1'; 1_000]));
                assert!(framer.object.len() <= MAX_LEN);
            }
            assert_eq!(found.len(), 1, "{start}");
            assert!(is_invalid(&found[0]));
            assert_eq!(framer.object.capacity(), 0);
            // Its end, if it comes, is where it should be.
            let end = frames(&mut framer, b"\"]}\n{}");
            assert!(end.contains(&object("{}")), "{start}: {end:?}");
        }
    }

    #[test]
    fn brackets_that_stand_too_deep_are_one_error() {
        for bracket in ["{", "["] {
            let mut framer = Framer::default();
            let depth = 10_000;
            let mut found = frames(&mut framer, b"{");
            found.extend(frames(&mut framer, bracket.repeat(depth).as_bytes()));
            assert_eq!(found.len(), 1);
            assert!(is_invalid(&found[0]));
            let rest = "}".repeat(depth + 1) + "{}";
            assert_eq!(frames(&mut framer, rest.as_bytes()), [object("{}")]);
        }
        let deepest = "{".to_owned() + &"[".repeat(MAX_DEPTH as usize - 1);
        let mut framer = Framer::default();
        assert_eq!(frames(&mut framer, deepest.as_bytes()), []);
        assert_eq!(frames(&mut framer, b"[").len(), 1);
    }

    #[test]
    fn bytes_that_no_json_has_begin_anew() {
        for odd in [&b"\0"[..], b"\xff", b"\xfe", b"\x1b", b"\x01"] {
            let mut framer = Framer::default();
            let input = [&b"{\"a\": "[..], odd, b"{\"b\":1}"].concat();
            let found = frames(&mut framer, &input);
            assert_eq!(found.len(), 2, "{odd:?}");
            assert!(is_invalid(&found[0]));
            assert_eq!(found[1], object(r#"{"b":1}"#));
        }
        // A quotation mark is missing.
        let found = frames(&mut Framer::default(), b"{\"a: 1}\n{\"b\":1}");
        assert!(is_invalid(&found[0]), "{found:?}");
        assert_eq!(found[1..], [object(r#"{"b":1}"#)]);
    }
}
