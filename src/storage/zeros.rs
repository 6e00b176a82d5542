//! What of a file is anything but zeros, as far as that takes space of its own.

use std::ops::Range;

/// What takes its space as a whole on most file systems.
pub(crate) const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Of bytes that lie at `offset` of a file, the first neighbouring blocks, or parts of blocks,
/// that have anything but zeros.
pub(crate) fn first_data(bytes: &[u8], offset: u64) -> Option<Range<usize>> {
    let mut data: Option<Range<usize>> = None;
    let mut at = 0;
    while at < bytes.len() {
        let place = (offset % BLOCK as u64) as usize + at;
        let end = bytes.len().min(at + BLOCK - place % BLOCK);
        let is_zero = bytes[at..end] == ZEROS[..end - at];
        match &mut data {
            Some(data) if !is_zero => data.end = end,
            Some(_) => break,
            None if !is_zero => data = Some(at..end),
            None => {}
        }
        at = end;
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_found_block_by_block() {
        let mut bytes = vec![0; 5 * BLOCK];
        assert_eq!(first_data(&bytes, 0), None);
        assert_eq!(first_data(&[], 7), None);
        bytes[BLOCK + 5] = 1;
        bytes[2 * BLOCK] = 1;
        bytes[4 * BLOCK] = 1;
        assert_eq!(first_data(&bytes, 0), Some(BLOCK..3 * BLOCK));
        assert_eq!(first_data(&bytes[3 * BLOCK..], 0), Some(BLOCK..2 * BLOCK));
        // Where blocks begin is for the file to say.
        let shifted = BLOCK - 512..3 * BLOCK - 512;
        assert_eq!(first_data(&bytes, 512), Some(shifted));
        assert_eq!(first_data(&bytes[BLOCK + 5..][..7], 5), Some(0..7));
    }
}
