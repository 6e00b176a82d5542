//! Bits for parts of a disk, all of one size: what a dirty bitmap has, and what a file of it
//! holds.

use std::sync::Arc;

/// One bit for each granule of `1 << shift` bytes; those behind the end of `words` are clear.
/// Copies share the words until one changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bits {
    shift: u32,
    words: Arc<Vec<u64>>,
}

impl Bits {
    /// None set.
    pub fn new(shift: u32) -> Self {
        Self {
            shift,
            words: Arc::default(),
        }
    }

    /// The granularity as a power of two, in bytes.
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// How many are set.
    pub fn count(&self) -> u64 {
        let ones = self.words.iter().map(|word| u64::from(word.count_ones()));
        ones.sum()
    }

    /// None is set any more.
    pub fn clear(&mut self) {
        self.words = Arc::default();
    }

    /// Sets those of a range of bytes, in whole or in part.
    pub fn set(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (first, last) = (start >> self.shift, (end - 1) >> self.shift);
        let words = Arc::make_mut(&mut self.words);
        let needed = (last / 64 + 1) as usize;
        if words.len() < needed {
            words.resize(needed, 0);
        }
        for (index, mask) in masks(first, last) {
            words[index] |= mask;
        }
    }

    /// Sets what is set in others, of any granularity.
    pub fn add(&mut self, others: &Self) {
        for (index, word) in others.words.iter().enumerate() {
            self.add_word(others.shift, index, *word);
        }
    }

    /// The same with 64 neighbours.
    pub fn add_word(&mut self, shift: u32, index: usize, word: u64) {
        if word == 0 {
            return;
        }
        if shift == self.shift {
            let words = Arc::make_mut(&mut self.words);
            if words.len() <= index {
                words.resize(index + 1, 0);
            }
            words[index] |= word;
            return;
        }
        let mut left = word;
        let mut at = 0;
        while left != 0 {
            let clear = left.trailing_zeros();
            left >>= clear;
            let ones = left.trailing_ones();
            at += clear;
            let first = index as u64 * 64 + u64::from(at);
            self.set(first << shift, (first + u64::from(ones)) << shift);
            at += ones;
            left = left.checked_shr(ones).unwrap_or(0);
        }
    }

    /// Sets those that a file has in these bytes, the first of which is that of word `word`.
    pub fn add_bytes(&mut self, word: u64, bytes: &[u8]) {
        for (index, chunk) in (word as usize..).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add_word(self.shift, index, u64::from_le_bytes(word));
        }
    }

    /// None is set behind the end of a disk of so many bytes.
    pub fn cut(&mut self, disk_bytes: u64) {
        let count = disk_bytes.div_ceil(1 << self.shift);
        let words = Arc::make_mut(&mut self.words);
        words.truncate(count.div_ceil(64) as usize);
        if !count.is_multiple_of(64)
            && let Some(last) = words.get_mut((count / 64) as usize)
        {
            *last &= (1 << (count % 64)) - 1;
        }
    }

    /// Those of a disk of so many bytes as a file has them: bit 0 of byte 0 first.
    pub fn to_bytes(&self, disk_bytes: u64) -> Vec<u8> {
        let bits = disk_bytes.div_ceil(1 << self.shift);
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|it| it.to_le_bytes()).collect();
        bytes.resize(bits.div_ceil(8) as usize, 0);
        // None behind the end of the disk.
        if !bits.is_multiple_of(8)
            && let Some(last) = bytes.last_mut()
        {
            *last &= (1 << (bits % 8)) - 1;
        }
        bytes
    }

    /// Whether the one that this byte belongs to is set.
    #[cfg(test)]
    pub fn has(&self, byte: u64) -> bool {
        let bit = byte >> self.shift;
        let word = self.words.get((bit / 64) as usize);
        word.is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }
}

/// For bits from `first` to `last`, that one included, the words that they are in and what of
/// each.
pub(super) fn masks(first: u64, last: u64) -> impl Iterator<Item = (usize, u64)> {
    (first / 64..=last / 64).map(move |word| {
        let from = first.max(word * 64) % 64;
        let to = last.min(word * 64 + 63) % 64;
        (word as usize, (u64::MAX << from) & (u64::MAX >> (63 - to)))
    })
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK: u64 = 1 << 20;

    proptest! {
        #[test]
        fn they_are_what_was_set(
            ranges in prop::collection::vec((0..DISK, 0..DISK / 4, 0..3_usize), 0..12),
        ) {
            let shifts = [9, 12, 15];
            let mut all = shifts.map(Bits::new);
            let mut sectors = vec![[false; 3]; (DISK / 512) as usize];
            for (start, len, which) in ranges {
                let end = (start + len).min(DISK);
                all[which].set(start, end);
                for (index, sector) in sectors.iter_mut().enumerate() {
                    let at = index as u64 * 512;
                    sector[which] |= at < end && start < at + 512 && start < end;
                }
            }
            for (to, shift) in shifts.into_iter().enumerate() {
                // Into one of each granularity.
                let mut merged = all[to].clone();
                for (from, bits) in all.iter().enumerate() {
                    if from != to {
                        merged.add(bits);
                    }
                }
                let granule = |bytes: u64, of: usize| {
                    let unit = 1_u64 << shifts[of];
                    let from = bytes / unit * unit / 512;
                    let range = from as usize..((from + unit / 512) as usize).min(sectors.len());
                    sectors[range].iter().any(|sector| sector[of])
                };
                let mut count = 0;
                for at in (0..DISK).step_by(1 << shift) {
                    prop_assert_eq!(all[to].has(at), granule(at, to));
                    let mut parts = (at..at + (1 << shift)).step_by(512);
                    let expected = parts.any(|at| (0..3).any(|of| granule(at, of)));
                    prop_assert_eq!(merged.has(at), expected, "{} at {}", shift, at);
                    count += u64::from(expected);
                }
                prop_assert_eq!(merged.count(), count);
                let bytes = merged.to_bytes(DISK);
                prop_assert_eq!(bytes.len() as u64, DISK >> shift >> 3);
                let mut read = Bits::new(shift);
                read.add_bytes(0, &bytes);
                prop_assert!((0..DISK).step_by(512).all(|at| read.has(at) == merged.has(at)));
            }
        }
    }

    #[test]
    fn none_is_told_of_behind_the_end_of_the_disk() {
        let mut bits = Bits::new(12);
        bits.set(0, 1 << 20);
        assert_eq!(bits.to_bytes(3 * 4096 + 1), [0b1111]);
        assert_eq!(bits.to_bytes(8 * 4096), [0xff]);
        assert_eq!(Bits::new(12).to_bytes(9 * 4096), [0, 0]);
        bits.clear();
        assert_eq!((bits.count(), bits.to_bytes(4096)), (0, vec![0]));
    }
}
