//! As much of XML as a descriptor needs: elements in elements, text in leaves.
//!
//! Elements that we do not know are kept and written back, so the text goes
//! through a small tree instead of straight into the descriptor's fields.

use std::fmt::{Display, Write as _};

use quick_xml::escape::partial_escape;
use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};
use thiserror::Error;

/// Why a text is not XML that a descriptor may be.
#[derive(Debug, Error)]
pub enum XmlError {
    /// Not well-formed.
    #[error(transparent)]
    Syntax(#[from] quick_xml::Error),
    /// It has a document type, which could define entities.
    #[error("a document type is not allowed")]
    DocType,
    /// An entity other than those of XML itself.
    #[error("unknown entity '&{0};'")]
    Entity(String),
    /// Elements nested deeper than any descriptor has them.
    #[error("elements are nested more than {DEPTH_MAX} deep")]
    Depth,
    /// Text or a second element outside of the root.
    #[error("there is content outside the root element")]
    OutsideRoot,
    /// It ends before the root element does.
    #[error("the text ends inside an element")]
    Truncated,
}

const DEPTH_MAX: usize = 16;

/// An element with all that is in it; comments are lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    pub name: String,
    /// As written, escapes included.
    attributes: String,
    /// Of a leaf, trimmed and unescaped.
    pub text: String,
    pub children: Vec<Element>,
}

impl Element {
    /// An element that holds others.
    pub fn parent(name: &str, children: Vec<Self>) -> Self {
        Self {
            name: name.to_owned(),
            children,
            ..Self::default()
        }
    }

    /// An element that holds text.
    pub fn leaf(name: &str, text: impl Display) -> Self {
        Self {
            name: name.to_owned(),
            text: text.to_string(),
            ..Self::default()
        }
    }

    /// The one root element of a document.
    pub fn parse(text: &str) -> Result<Self, XmlError> {
        let mut reader = Reader::from_str(text.trim_start_matches('\u{feff}'));
        let mut open: Vec<Self> = Vec::new();
        let mut root = None;
        loop {
            match reader.read_event()? {
                Event::Start(start) => {
                    if open.len() == DEPTH_MAX {
                        return Err(XmlError::Depth);
                    }
                    open.push(Self::started(&start));
                }
                Event::Empty(start) => close(Self::started(&start), &mut open, &mut root)?,
                Event::End(_) => {
                    let element = open.pop().ok_or(XmlError::OutsideRoot)?;
                    close(element, &mut open, &mut root)?;
                }
                Event::Text(text) => add_text(&text.xml10_content(), &mut open)?,
                Event::CData(text) => add_text(&text.xml10_content(), &mut open)?,
                Event::GeneralRef(reference) => {
                    let character = match reference.resolve_char_ref()? {
                        Some(character) => character,
                        None => predefined(&reference.xml_content(XmlVersion::Implicit1_0))?,
                    };
                    add_text(character.encode_utf8(&mut [0; 4]), &mut open)?;
                }
                Event::DocType(_) => return Err(XmlError::DocType),
                Event::Comment(_) | Event::Decl(_) | Event::PI(_) => {}
                Event::Eof if open.is_empty() => return root.ok_or(XmlError::Truncated),
                Event::Eof => return Err(XmlError::Truncated),
            }
        }
    }

    fn started(start: &BytesStart<'_>) -> Self {
        Self {
            name: start.name().as_ref().to_owned(),
            attributes: start.attributes_raw().trim().to_owned(),
            ..Self::default()
        }
    }

    /// Appends the element as text, indented by two spaces a level.
    pub fn write(&self, depth: usize, out: &mut String) {
        let Self { name, text, .. } = self;
        let indent = 2 * depth;
        let space = if self.attributes.is_empty() { "" } else { " " };
        let tag = format_args!("{:indent$}<{name}{space}{}", "", self.attributes);
        // Writing to a `String` does not fail.
        let _ = if !self.children.is_empty() {
            let _ = writeln!(out, "{tag}>");
            for child in &self.children {
                child.write(depth + 1, out);
            }
            writeln!(out, "{:indent$}</{name}>", "")
        } else if text.is_empty() {
            writeln!(out, "{tag}/>")
        } else {
            writeln!(out, "{tag}>{}</{name}>", partial_escape(text.as_str()))
        };
    }
}

fn close(
    mut element: Element,
    open: &mut [Element],
    root: &mut Option<Element>,
) -> Result<(), XmlError> {
    element.text = element.text.trim().to_owned();
    match open.last_mut() {
        Some(parent) => parent.children.push(element),
        None if root.is_none() => *root = Some(element),
        None => return Err(XmlError::OutsideRoot),
    }
    Ok(())
}

fn add_text(text: &str, open: &mut [Element]) -> Result<(), XmlError> {
    match open.last_mut() {
        Some(element) => element.text.push_str(text),
        None if text.trim().is_empty() => {}
        None => return Err(XmlError::OutsideRoot),
    }
    Ok(())
}

fn predefined(name: &str) -> Result<char, XmlError> {
    match name {
        "amp" => Ok('&'),
        "lt" => Ok('<'),
        "gt" => Ok('>'),
        "apos" => Ok('\''),
        "quot" => Ok('"'),
        _ => Err(XmlError::Entity(name.to_owned())),
    }
}
