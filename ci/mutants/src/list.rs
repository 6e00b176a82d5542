//! Mutants as `cargo mutants --list --json` names them.

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

/// A change of one place that the tests should notice.
#[derive(Clone, Debug, Deserialize)]
pub struct Mutant {
    /// Where and what, in words; no two have the same.
    pub name: String,
    /// From the top of the repository.
    pub file: String,
    pub genre: Genre,
    /// The text that takes the place of `span`.
    pub replacement: String,
    pub span: Span,
}

/// What cargo-mutants replaces.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Genre {
    FnValue,
    BinaryOperator,
    UnaryOperator,
    MatchArm,
    MatchArmGuard,
    StructField,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct Span {
    pub start: Place,
    pub end: Place,
}

/// Both from 1, the column in characters.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

/// Reads a list.
pub fn read(path: &Path) -> anyhow::Result<Vec<Mutant>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is no list of cargo-mutants", path.display()))
}
