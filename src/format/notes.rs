//! `snapshots.json`: when the snapshots of a bundle were made, and what their makers
//! say of them.
//!
//! It is a file of its own because the official tool writes `DiskDescriptor.xml` anew
//! from what it knows, at each of its snapshots, and drops every other element; a
//! file that it does not know it leaves alone. A snapshot keeps its GUID through all
//! changes of the tree, by either tool, so the notes are found by that. Nothing
//! depends on them: without the file, snapshots have no dates and descriptions.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Guid;

/// What is noted of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotNote {
    /// When it was made.
    pub date: Timestamp,
    /// What for; one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// The notes of a bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotNotes(BTreeMap<Guid, SnapshotNote>);

impl SnapshotNotes {
    /// The name of the file in a bundle's folder.
    pub const FILE_NAME: &str = "snapshots.json";
    /// The longest text that is worth parsing, in bytes.
    pub const TEXT_MAX: usize = 1 << 20;
    /// The longest description, in bytes.
    pub const DESCRIPTION_MAX: usize = 1 << 10;

    /// Reads a text, at most [`Self::TEXT_MAX`] long.
    ///
    /// # Errors
    /// It is no JSON object of notes.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        let notes: BTreeMap<String, SnapshotNote> = serde_json::from_str(text)?;
        // What has no GUID for a name belongs to no snapshot.
        let notes = notes
            .into_iter()
            .filter_map(|(guid, note)| Some((guid.parse().ok()?, note)));
        Ok(Self(notes.collect()))
    }

    /// The text.
    pub fn to_json(&self) -> String {
        let notes: BTreeMap<String, &SnapshotNote> = self
            .0
            .iter()
            .map(|(guid, note)| (guid.to_string(), note))
            .collect();
        // Keys are strings and times are finite: it serialises.
        let mut text = serde_json::to_string_pretty(&notes).unwrap_or_default();
        text.push('\n');
        text
    }

    /// That of a snapshot.
    pub fn get(&self, guid: Guid) -> Option<&SnapshotNote> {
        self.0.get(&guid)
    }

    /// Puts one in place of what there was of that snapshot.
    pub fn insert(&mut self, guid: Guid, note: SnapshotNote) {
        self.0.insert(guid, note);
    }

    /// Drops those of snapshots for which `is_there` is false.
    pub fn retain(&mut self, mut is_there: impl FnMut(Guid) -> bool) {
        self.0.retain(|guid, _| is_there(*guid));
    }

    /// The snapshots with that description.
    pub fn described<'a>(&'a self, description: &'a str) -> impl Iterator<Item = Guid> + 'a {
        let is_it = move |note: &SnapshotNote| note.description.as_deref() == Some(description);
        let found = self.0.iter().filter(move |(_, note)| is_it(note));
        found.map(|(guid, _)| *guid)
    }

    /// Whether a text can be a description: one line, not too long.
    pub fn is_description(text: &str) -> bool {
        !text.is_empty() && text.len() <= Self::DESCRIPTION_MAX && !text.contains(char::is_control)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut notes = SnapshotNotes::default();
        let note = |text: Option<&str>| SnapshotNote {
            date: Timestamp::from_second(1_790_000_000).unwrap(),
            description: text.map(str::to_owned),
        };
        let guids = [Guid::random(), Guid::random()];
        notes.insert(guids[0], note(Some("before \"the\" upgrade, für später")));
        notes.insert(guids[1], note(None));
        let text = notes.to_json();
        assert!(text.contains("\"2026-09-21T14:13:20Z\""), "{text}");
        assert_eq!(SnapshotNotes::parse(&text).unwrap(), notes);
        notes.retain(|guid| guid == guids[1]);
        assert_eq!(notes.get(guids[0]), None);
        assert_eq!(notes.get(guids[1]), Some(&note(None)));
    }

    #[test]
    fn nonsense_is_refused_and_strangers_are_dropped() {
        for text in ["", "[]", "{\"x\": 1}", "{\"x\": {\"date\": \"soon\"}}"] {
            assert!(SnapshotNotes::parse(text).is_err(), "{text}");
        }
        let stranger = "{\"x\": {\"date\": \"2026-09-21T14:13:20Z\"}}";
        assert_eq!(
            SnapshotNotes::parse(stranger).unwrap(),
            SnapshotNotes::default()
        );
    }

    #[test]
    fn descriptions_are_one_line() {
        assert!(SnapshotNotes::is_description("before the upgrade"));
        let long = "x".repeat(1025);
        for text in ["", "two\nlines", "\u{1b}[2J", &long] {
            assert!(!SnapshotNotes::is_description(text), "{text:?}");
        }
    }
}
