//! What of an image can be given back to the host: blocks of zeros, and gaps between
//! clusters.
//!
//! The same for an image that nobody uses as for one that is being served. Knows numbers and
//! bytes; does no I/O.

use std::ops::Range;

use super::{Geometry, HostCluster};

/// The unit of the holes that are looked for inside clusters, in bytes.
const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Where an image would end if it had no gaps: clusters that lie behind move into gaps in
/// front of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    end: u32,
}

impl Packing {
    /// Of an image with so many mapped clusters.
    pub fn new(geometry: &Geometry, mapped: u32) -> Self {
        Self {
            end: geometry.first_host_cluster().0.saturating_add(mapped),
        }
    }

    /// The first cluster behind it.
    pub const fn end(self) -> u32 {
        self.end
    }

    /// Whether this cluster lies behind it.
    pub const fn is_behind(self, host: HostCluster) -> bool {
        host.0 >= self.end
    }
}

/// Whether there is nothing but zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(BLOCK)
        .all(|block| block == &ZEROS[..block.len()])
}

/// Where there are whole blocks of zeros in bytes that lie at `offset` of a file, neighbours as
/// one range of the file. Blocks that the bytes have in part count with that, beside others:
/// bytes that are nothing but zeros are one range. What gives back less than a block is left
/// out.
pub fn zero_blocks(bytes: &[u8], offset: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let place = (offset % BLOCK as u64) as usize + at;
        let len = (BLOCK - place % BLOCK).min(bytes.len() - at);
        let start = offset + at as u64;
        if bytes[at..at + len] == ZEROS[..len] {
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += len as u64,
                _ => ranges.push(start..start + len as u64),
            }
        }
        at += len;
    }
    ranges.retain(|range| range.end - range.start >= BLOCK as u64);
    ranges
}

#[cfg(test)]
mod tests {
    use super::super::{ClusterSize, Header, Sector};
    use super::*;

    #[test]
    fn blocks_of_zeros_are_found_at_their_borders() {
        let mut bytes = vec![0; 5 * BLOCK];
        let whole = 8192..8192 + 5 * 4096;
        assert_eq!(zero_blocks(&bytes, 8192), std::slice::from_ref(&whole));
        bytes[2 * BLOCK] = 1;
        assert_eq!(zero_blocks(&bytes, 0), [0..8192, 3 * 4096..5 * 4096]);
        // The middle of a block is none of zeros, nor are its halves worth anything.
        assert_eq!(
            zero_blocks(&bytes, 512),
            [512..8192, 3 * 4096..5 * 4096 + 512]
        );
        assert_eq!(zero_blocks(&bytes[2 * BLOCK..][..BLOCK], 0), []);
        assert_eq!(zero_blocks(&[0; 4095], 0), []);
        let block = 100..4196;
        assert_eq!(zero_blocks(&[0; 4096], 100), std::slice::from_ref(&block));
        assert_eq!(zero_blocks(&[], 100), []);
    }

    #[test]
    fn what_lies_behind_the_end_without_gaps_is_behind() {
        let header = Header::new(Sector(20 * 2048), ClusterSize::DEFAULT).unwrap();
        let packing = Packing::new(header.geometry(), 3);
        assert_eq!(packing.end(), 4);
        assert!(packing.is_behind(HostCluster(4)) && !packing.is_behind(HostCluster(3)));
    }
}
