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

/// Where data begins in a file, for who asks mostly from its start to its end, cluster by cluster:
/// the host is asked once for each range of data, as it may look at all of a file's extents for
/// each question.
#[derive(Default)]
pub(crate) struct KnownData {
    /// Of this range the answer is known.
    known: Range<u64>,
    /// The data at its end, if there is any.
    data: Option<Range<u64>>,
}

impl KnownData {
    /// The first byte of data from here on, if there is any; `look` asks the host, as
    /// [`Disk::next_data`](super::Disk::next_data) does.
    ///
    /// # Errors
    /// Those of `look`.
    pub fn find<E>(
        &mut self,
        start: u64,
        look: impl FnOnce(u64) -> Result<Option<Range<u64>>, E>,
    ) -> Result<Option<u64>, E> {
        if !self.known.contains(&start) {
            self.data = look(start)?;
            let end = self.data.as_ref().map_or(u64::MAX, |data| data.end);
            self.known = start..end;
        }
        Ok(self.data.as_ref().map(|data| data.start.max(start)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_asked_once_for_each_range_of_data() {
        let mut asked = Vec::new();
        let mut known = KnownData::default();
        let mut find = |start| {
            let found = known.find(start, |at| {
                asked.push(at);
                let data = [10..20, 30..40].into_iter().find(|data| data.end > at);
                Ok::<_, ()>(data.map(|data: Range<u64>| data.start.max(at)..data.end))
            });
            found.unwrap()
        };
        assert_eq!([0, 5, 10, 19].map(&mut find), [10, 10, 10, 19].map(Some));
        assert_eq!([20, 35].map(&mut find), [30, 35].map(Some));
        assert_eq!([40, 1000].map(&mut find), [None; 2]);
        assert_eq!(find(15), Some(15), "not from its start on");
        assert_eq!(asked, [0, 20, 40, 15]);
    }

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
