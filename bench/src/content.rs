//! What the benchmark writes, and how it knows what it reads.
//!
//! The disk is seen as blocks of 4 KiB. A block that was written starts with its
//! number and the generation of the write; the rest is the same noise everywhere,
//! so that preparing a write costs the client two stores and no server can take
//! it for zeros. Every read of a measured run has its stamps checked, and a
//! verification pass compares whole blocks.
//!
//! Knows bytes. Must not know how they are transferred.

use std::fmt;

/// The size of a block in bytes.
pub const BLOCK: usize = 4096;

/// Tells a stamp from accidental data.
const MAGIC: u64 = 0x9e37_79b9_7f4a_7c15;

/// Bytes of a stamp.
pub const STAMP: usize = 16;

/// Which write put a block there: 1 is the preparation of the image, each later
/// run has the next number.
pub type Generation = u64;

/// The stamp at the start of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the block on the disk.
    pub block: u64,
    /// When it was written.
    pub generation: Generation,
}

impl Stamp {
    /// As it lies in the block.
    pub fn to_bytes(self) -> [u8; STAMP] {
        let mut bytes = [0; STAMP];
        bytes[..8].copy_from_slice(&(self.block ^ MAGIC).to_le_bytes());
        bytes[8..].copy_from_slice(&self.generation.to_le_bytes());
        bytes
    }

    /// Reads the stamp of what should be `block`, written in one of the
    /// generations of `expected`.
    ///
    /// # Errors
    /// [`WrongData`] for anything else.
    pub fn check(
        bytes: &[u8; STAMP],
        block: u64,
        expected: std::ops::RangeInclusive<Generation>,
    ) -> Result<(), WrongData> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        if word(0) ^ MAGIC == block && expected.contains(&word(8)) {
            return Ok(());
        }
        Err(WrongData {
            block,
            expected,
            found: *bytes,
        })
    }
}

/// A server gave back something else than what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongData {
    /// Where.
    pub block: u64,
    /// The generations that it may have.
    pub expected: std::ops::RangeInclusive<Generation>,
    /// What was in place of the stamp.
    pub found: [u8; STAMP],
}

impl fmt::Display for WrongData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "wrong data in block {} (byte {}): expected generation {} to {}, found {:02x?}",
            self.block,
            self.block * BLOCK as u64,
            self.expected.start(),
            self.expected.end(),
            self.found,
        )
    }
}

impl std::error::Error for WrongData {}

/// The noise that follows every stamp, a whole block of it.
pub fn body() -> [u8; BLOCK] {
    let mut body = [0; BLOCK];
    // A seed of its own: the noise must be the same in every run and process.
    fastrand::Rng::with_seed(MAGIC).fill(&mut body);
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_recognised_and_anything_else_is_not() {
        let bytes = Stamp {
            block: 7,
            generation: 3,
        }
        .to_bytes();
        assert_eq!(Stamp::check(&bytes, 7, 1..=3), Ok(()));
        assert!(Stamp::check(&bytes, 8, 1..=3).is_err());
        assert!(Stamp::check(&bytes, 7, 4..=4).is_err());
        assert!(Stamp::check(&[0; STAMP], 0, 1..=1).is_err());
    }

    #[test]
    fn the_noise_is_the_same_every_time_and_never_zero() {
        assert_eq!(body(), body());
        let is_zero = |sector: &[u8]| sector.iter().all(|&byte| byte == 0);
        assert!(!body().chunks(512).any(is_zero));
    }
}
