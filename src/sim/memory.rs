//! Memory of a simulated guest.

use crate::storage::Segments;

/// One piece of memory that requests point into. Only ever copied from and to,
/// as a guest's.
pub struct Memory {
    bytes: *mut [u8],
}

impl Memory {
    /// Holds these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Box::into_raw(bytes.into_boxed_slice()),
        }
    }

    /// The whole of it, in pieces of which each but the last has `piece` bytes.
    /// The value must outlive every use of the segments.
    pub fn segments(&self, piece: usize) -> Segments {
        let mut segments = Segments::new();
        let start: *mut u8 = self.bytes.cast();
        for at in (0..self.bytes.len()).step_by(piece) {
            let len = piece.min(self.bytes.len() - at);
            // SAFETY: the memory was allocated by `new` and is freed when this
            // value is dropped, which the driver does after the request has ended
            // or the engine is gone; no reference to it is ever made.
            unsafe { segments.push(start.wrapping_add(at), len) };
        }
        segments
    }

    /// A copy of what it holds.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes.len()];
        self.segments(usize::MAX).copy_to(0, &mut bytes);
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `new`, and freed only here.
        drop(unsafe { Box::from_raw(self.bytes) });
    }
}
