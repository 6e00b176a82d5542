//! The buffers of a queue, in memory that the server sees too.

use std::ptr;

/// The unit in which memory is shared.
const PAGE: usize = 4096;

/// `bytes`, rounded up to whole pages.
pub fn round_up_to_page(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE)
}

/// Equal buffers, one after another. The memory is shared with another process,
/// so it is only ever copied from and to, never borrowed.
pub struct Slots {
    base: *mut u8,
    count: usize,
    bytes: usize,
}

// SAFETY: the pointer is to a shared mapping that no thread is tied to, and
// nobody else has a `Slots` of the same range (`new` demands it).
unsafe impl Send for Slots {}

impl Slots {
    /// Buffers from `address`.
    ///
    /// # Safety
    /// `count * bytes` bytes from `address` must be mapped, readable and writable
    /// for as long as the value lives, and belong to no other one.
    pub unsafe fn new(address: usize, count: u32, bytes: u32) -> Self {
        Self {
            base: ptr::with_exposed_provenance_mut(address),
            count: count as usize,
            bytes: bytes as usize,
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Size of each in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The start of a buffer, of which `len` bytes will be used.
    ///
    /// # Panics
    /// If there is no such buffer or it is smaller.
    pub fn pointer(&self, slot: usize, len: usize) -> *mut u8 {
        self.pointer_in(slot, 0, len)
    }

    /// Copies `bytes` into a buffer at `offset`.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn store(&mut self, slot: usize, offset: usize, bytes: &[u8]) {
        let to = self.pointer_in(slot, offset, bytes.len());
        // SAFETY: `pointer_in` has checked the range; `bytes` is not in shared memory.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies from a buffer at `offset`.
    ///
    /// # Panics
    /// If the buffer ends before `bytes` is full.
    pub fn load(&self, slot: usize, offset: usize, bytes: &mut [u8]) {
        let from = self.pointer_in(slot, offset, bytes.len());
        // SAFETY: `pointer_in` has checked the range; `bytes` is not in shared memory.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
    }

    fn pointer_in(&self, slot: usize, offset: usize, len: usize) -> *mut u8 {
        assert!(slot < self.count, "buffer {slot} of {}", self.count);
        assert!(
            offset <= self.bytes && len <= self.bytes - offset,
            "{len} bytes at {offset} of a buffer of {}",
            self.bytes
        );
        self.base.wrapping_add(slot * self.bytes + offset)
    }
}
