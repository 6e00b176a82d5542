//! Guest data from which each sector can be told again.

use super::file::SECTOR;

/// What a sector of the guest's disk holds: 0 is zeros, anything else the number
/// of the write that it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Value(pub u64);

impl Value {
    /// All zero.
    pub const ZEROS: Self = Self(0);
}

fn word(value: Value, sector: u64, index: usize) -> u64 {
    match index {
        0 => value.0,
        1 => sector,
        _ => (value.0 ^ sector.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64,
    }
}

/// Fills whole sectors, the first of which is `sector` of the guest's disk.
pub fn fill(bytes: &mut [u8], value: Value, sector: u64) {
    for (number, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR)) {
        if value == Value::ZEROS {
            bytes.fill(0);
            continue;
        }
        for (index, bytes) in bytes.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(value, number, index).to_le_bytes());
        }
    }
}

/// From where a sector that somebody wrote, and that is not all zero, is: the value and
/// the sector of the guest's disk. `None` if nobody wrote it so.
pub fn origin(bytes: &[u8]) -> Option<(Value, u64)> {
    let word = |index: usize| bytes[8 * index..8 * (index + 1)].try_into().unwrap();
    let sector = u64::from_le_bytes(word(1));
    let value = tell(bytes, sector)?;
    (value != Value::ZEROS).then_some((value, sector))
}

/// What `bytes`, read as sector `sector` of the guest's disk, hold; `None` if
/// nobody ever wrote that there.
pub fn tell(bytes: &[u8], sector: u64) -> Option<Value> {
    let words = || {
        bytes
            .chunks_exact(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
    };
    let first = Value(words().next()?);
    if first == Value::ZEROS {
        return words().all(|word| word == 0).then_some(first);
    }
    let expected = (0..).map(|index| word(first, sector, index));
    words().zip(expected).all(|(a, b)| a == b).then_some(first)
}

#[test]
fn a_sector_is_told_again_only_where_it_was_written() {
    let mut bytes = vec![0xff; 2 * SECTOR];
    fill(&mut bytes, Value(77), 5);
    assert_eq!(tell(&bytes[..SECTOR], 5), Some(Value(77)));
    assert_eq!(tell(&bytes[SECTOR..], 6), Some(Value(77)));
    assert_eq!(tell(&bytes[SECTOR..], 5), None);
    bytes[SECTOR - 1] ^= 1;
    assert_eq!(tell(&bytes[..SECTOR], 5), None);
    fill(&mut bytes, Value::ZEROS, 5);
    assert_eq!(tell(&bytes[SECTOR..], 9), Some(Value::ZEROS));
}
