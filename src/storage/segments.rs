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

    /// Adds a piece at the end. A piece of zero bytes is not added.
    ///
    /// # Safety
    /// The `len` bytes at `ptr` must stay mapped, readable and writable, until
    /// this value, everything split off it, and every operation that it was
    /// given to are gone; and nothing in this process may hold a Rust reference
    /// to them meanwhile.
    pub unsafe fn push(&mut self, ptr: *mut u8, len: usize) {
        if len > 0 {
            self.list.push(Segment { ptr, len });
            self.len += len;
        }
    }

    /// In bytes, all pieces together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    pub fn as_slice(&self) -> &[Segment] {
        &self.list
    }

    /// Cuts the first `len` bytes off and returns them; all, if there are fewer.
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
