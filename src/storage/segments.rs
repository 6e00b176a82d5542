//! Memory that I/O reads and fills.

use smallvec::SmallVec;

/// A piece of memory: an address and a length in bytes. The layout is that of
/// `struct iovec`, so that a slice of segments can be given to the kernel.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Segment {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: a segment is an address; whoever made the `Segments` that it is in
// promised that the memory may be accessed from any thread (see `Segments::push`).
unsafe impl Send for Segment {}

impl Segment {
    /// For this floor's own use: nobody promised anything about the memory yet.
    pub(super) fn new(ptr: *mut u8, len: usize) -> Self {
        Self { ptr, len }
    }

    /// Where it starts.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Memory of a client, in pieces: what the data descriptors of one request point
/// to. The client may change it at any time, so it is never borrowed as a slice,
/// only copied from and to.
#[derive(Debug, Default)]
pub struct Segments {
    list: SmallVec<[Segment; 4]>,
    len: usize,
}

impl Segments {
    /// No memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a piece at the end. A piece of zero bytes is not added, and one that
    /// follows the last in memory becomes part of that.
    ///
    /// # Safety
    /// The `len` bytes at `ptr` must stay mapped, readable and writable, until
    /// this value, everything split off it, and every operation that it was
    /// given to are gone; and nothing in this process may hold a Rust reference
    /// to them meanwhile.
    pub unsafe fn push(&mut self, ptr: *mut u8, len: usize) {
        if len == 0 {
            return;
        }
        self.len += len;
        match self.list.last_mut() {
            Some(last) if last.ptr.wrapping_add(last.len) == ptr => last.len += len,
            _ => self.list.push(Segment { ptr, len }),
        }
    }

    /// In bytes, all pieces together.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory that the list of the pieces takes beyond this value.
    pub fn list_bytes(&self) -> usize {
        if self.list.spilled() {
            self.list.capacity() * size_of::<Segment>()
        } else {
            0
        }
    }

    /// The pieces.
    pub fn as_slice(&self) -> &[Segment] {
        &self.list
    }

    /// Cuts the first `len` bytes off and returns them; all, if there are fewer.
    #[inline]
    pub fn take_front(&mut self, len: usize) -> Self {
        if len >= self.len {
            return std::mem::take(self);
        }
        let mut front = Self::new();
        let mut whole = 0;
        for segment in &mut self.list {
            let missing = len - front.len;
            if missing >= segment.len {
                front.list.push(*segment);
                front.len += segment.len;
                whole += 1;
                continue;
            }
            if missing > 0 {
                front.list.push(Segment {
                    ptr: segment.ptr,
                    len: missing,
                });
                front.len += missing;
                segment.ptr = segment.ptr.wrapping_add(missing);
                segment.len -= missing;
            }
            break;
        }
        self.list.drain(..whole);
        self.len -= len;
        front
    }

    /// The pieces without the first `skip` bytes; none, if there are no more.
    pub(super) fn list_from(&self, skip: usize) -> Vec<Segment> {
        let mut list = Vec::with_capacity(self.list.len());
        let skip = skip.min(self.len);
        self.for_range(skip, self.len - skip, |ptr, len| {
            list.push(Segment { ptr, len });
        });
        list
    }

    /// Fills everything with zeros.
    pub fn fill_zero(&self) {
        for segment in &self.list {
            // SAFETY: `push` was promised that the memory is mapped and writable
            // and that no Rust reference to it exists.
            unsafe { segment.ptr.write_bytes(0, segment.len) };
        }
    }

    /// Copies into `to`, from byte `from` on, as many bytes as `to` has.
    ///
    /// # Panics
    /// If there are not that many.
    pub fn copy_to(&self, from: usize, to: &mut [u8]) {
        let mut at = 0;
        self.for_range(from, to.len(), |ptr, len| {
            // SAFETY: `for_range` gives pieces that `push` was promised to be
            // mapped; `to` is a Rust slice, so it cannot overlap them.
            unsafe { ptr.copy_to_nonoverlapping(to[at..at + len].as_mut_ptr(), len) };
            at += len;
        });
    }

    /// Copies `from` to byte `to` and on.
    ///
    /// # Panics
    /// If there is no room for it.
    pub fn copy_from(&self, to: usize, from: &[u8]) {
        let mut at = 0;
        self.for_range(to, from.len(), |ptr, len| {
            // SAFETY: `for_range` gives pieces that `push` was promised to be
            // mapped; `from` is a Rust slice, so it cannot overlap them.
            unsafe { ptr.copy_from_nonoverlapping(from[at..at + len].as_ptr(), len) };
            at += len;
        });
    }

    /// Whether every byte is zero. The client can change its memory at any time:
    /// this is what was there at some moment during the call.
    pub fn is_zero(&self) -> bool {
        const CHUNK: usize = 4096;
        let mut chunk = [0_u8; CHUNK];
        let mut at = 0;
        while at < self.len {
            // Most data shows in its first bytes that it is not zero.
            let want = if at == 0 { 64 } else { CHUNK };
            let len = want.min(self.len - at);
            self.copy_to(at, &mut chunk[..len]);
            if chunk[..len].iter().any(|&byte| byte != 0) {
                return false;
            }
            at += len;
        }
        true
    }

    fn for_range(&self, from: usize, len: usize, mut each: impl FnMut(*mut u8, usize)) {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.len));
        let (mut skip, mut left) = (from, len);
        for segment in &self.list {
            if left == 0 {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let len = left.min(segment.len - skip);
            each(segment.ptr.wrapping_add(skip), len);
            left -= len;
            skip = 0;
        }
    }
}

/// Memory of our own, aligned to 4096 bytes for direct I/O.
pub type AlignedBuf = aligned_vec::AVec<u8, aligned_vec::ConstAlign<4096>>;

/// The memory of one operation.
#[derive(Debug)]
pub enum Buffer {
    /// A client's.
    Client(Segments),
    /// Our own.
    Owned(AlignedBuf),
}

impl Buffer {
    /// `len` bytes of our own, all zero.
    pub fn zeroed(len: usize) -> Self {
        let mut bytes = AlignedBuf::with_capacity(4096, len);
        bytes.resize(len, 0);
        Self::Owned(bytes)
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Client(segments) => segments.len(),
            Self::Owned(bytes) => bytes.len(),
        }
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three pieces of one buffer, which outlives them.
    fn pieces(memory: &mut [u8]) -> Segments {
        let start = memory.as_mut_ptr();
        let mut segments = Segments::new();
        for (at, len) in [(0, 3), (4, 5), (10, 6)] {
            // SAFETY: inside `memory`, which is not looked at while the pieces live.
            unsafe { segments.push(start.wrapping_add(at), len) };
        }
        segments
    }

    fn lengths(segments: &Segments) -> Vec<usize> {
        segments.as_slice().iter().map(Segment::len).collect()
    }

    fn bytes(segments: &Segments) -> Vec<u8> {
        let mut bytes = vec![0; segments.len()];
        segments.copy_to(0, &mut bytes);
        bytes
    }

    fn counting() -> [u8; 16] {
        std::array::from_fn(|at| at as u8)
    }

    #[test]
    fn nothing_is_cut_off_as_an_empty_piece() {
        let mut memory = counting();
        let mut all = pieces(&mut memory);
        for (len, front) in [
            (0, vec![]),
            (3, vec![3]),
            (2, vec![2]),
            (3, vec![3]),
            (0, vec![]),
        ] {
            assert_eq!(lengths(&all.take_front(len)), front);
        }
        assert_eq!(lengths(&all), [6]);
    }

    const ALL: [u8; 14] = [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15];

    #[test]
    fn the_front_and_the_rest_are_the_whole_wherever_it_is_cut() {
        for cut in 0..=16 {
            let mut memory = counting();
            let mut rest = pieces(&mut memory);
            let front = rest.take_front(cut);
            let cut = cut.min(14);
            assert_eq!((front.len(), rest.len()), (cut, 14 - cut));
            assert_eq!(lengths(&front).iter().sum::<usize>(), cut);
            assert_eq!(lengths(&rest).iter().sum::<usize>(), 14 - cut);
            assert_eq!(bytes(&front), ALL[..cut]);
            assert_eq!(bytes(&rest), ALL[cut..]);
        }
    }

    #[test]
    fn neighbours_in_memory_are_one_piece_and_cost_nothing() {
        let mut memory = vec![0_u8; 4096];
        let mut segments = Segments::new();
        for at in (0..4096).step_by(4) {
            // SAFETY: inside `memory`, which is not looked at while the pieces live.
            unsafe { segments.push(memory.as_mut_ptr().wrapping_add(at), 4) };
        }
        assert_eq!(lengths(&segments), [4096]);
        assert_eq!(segments.list_bytes(), 0);
        let mut segments = Segments::new();
        for at in (0..4096).step_by(8) {
            // SAFETY: the same.
            unsafe { segments.push(memory.as_mut_ptr().wrapping_add(at), 4) };
        }
        assert_eq!(segments.len(), 2048);
        assert!(segments.list_bytes() >= 512 * 16);
    }

    #[test]
    fn a_list_from_the_middle_has_what_is_behind() {
        let mut memory = counting();
        let segments = pieces(&mut memory);
        for skip in 0..=16 {
            let list = segments.list_from(skip);
            let len: usize = list.iter().map(Segment::len).sum();
            assert_eq!(len, 14 - skip.min(14));
            assert!(list.iter().all(|segment| !segment.is_empty()));
        }
        let starts = segments.list_from(4);
        assert_eq!(
            starts[0].as_ptr(),
            segments.as_slice()[1].as_ptr().wrapping_add(1)
        );
    }

    #[test]
    fn bytes_are_copied_from_and_to_the_middle() {
        let mut memory = counting();
        let segments = pieces(&mut memory);
        let mut three = [0; 3];
        segments.copy_to(2, &mut three);
        assert_eq!(three, [2, 4, 5]);
        segments.copy_from(7, &[70, 71, 72]);
        assert_eq!(bytes(&segments)[6..11], [7, 70, 71, 72, 12]);
        segments.fill_zero();
        assert_eq!(bytes(&segments), [0; 14]);
        drop(segments);
        assert_eq!((memory[3], memory[9]), (3, 9), "between the pieces");
    }

    #[test]
    fn one_byte_anywhere_makes_it_not_zero() {
        const LEN: usize = 3 * 4096 + 100;
        let mut memory = vec![0; LEN];
        for place in [
            0,
            1,
            63,
            64,
            65,
            4095,
            4096,
            4159,
            4160,
            4161,
            8256,
            LEN - 1,
        ] {
            memory[place] = 1;
            let mut segments = Segments::new();
            // SAFETY: the memory outlives the segments and is not looked at meanwhile.
            unsafe { segments.push(memory.as_mut_ptr(), LEN) };
            assert!(!segments.is_zero(), "at {place}");
            drop(segments);
            memory[place] = 0;
        }
        for len in [0, 1, 64, 65, 4160, 4161, LEN] {
            let mut segments = Segments::new();
            // SAFETY: the same.
            unsafe { segments.push(memory.as_mut_ptr(), len) };
            assert!(segments.is_zero(), "{len} bytes");
        }
    }
}
