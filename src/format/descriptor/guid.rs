//! GUIDs as descriptors write them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;
use uuid::Uuid;

/// A GUID. Written in lower case and in braces; read without braces, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid(Uuid);

impl Guid {
    /// The official tool's name for the top of every disk.
    pub const TOP: Self = Self(Uuid::from_u128(0x5fbaabe3_6958_40ff_92a7_860e329aab41));
    /// All zeros: what a base names as its parent.
    pub const NONE: Self = Self(Uuid::nil());

    /// A new one, random.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.braced().fmt(f)
    }
}

/// A text is no GUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a GUID is written like {}", Guid::TOP)]
pub struct GuidError;

impl FromStr for Guid {
    type Err = GuidError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::try_parse(text).map(Self).map_err(|_| GuidError)
    }
}
