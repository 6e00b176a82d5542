//! Whether a ring can hold the longest request that the device allows.
//!
//! The configuration space says how many segments a request may have before anybody
//! knows how large the driver's rings are. Where requests cannot lie in indirect
//! tables, a ring that is smaller than the longest one never has room for it, and
//! Linux waits for that for ever at its first large write.

use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::config::FRAME_DESCRIPTORS;

/// Warns of the first ring that is too small, for as long as this lives.
#[derive(Debug, Default)]
pub(super) struct RingSizes {
    warned: AtomicBool,
}

impl RingSizes {
    /// A ring of `size` descriptors starts, of a driver with `acked_features` whose
    /// requests may have up to `seg_max` segments. What to log, if anything.
    pub fn started(&self, size: u16, acked_features: u64, seg_max: u16) -> Option<String> {
        let longest = seg_max + FRAME_DESCRIPTORS;
        let has_indirect = acked_features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        if has_indirect || size >= longest || self.warned.swap(true, Ordering::Relaxed) {
            return None;
        }
        Some(format!(
            "a ring of {size} descriptors without indirect ones has no room for the longest \
             request, which takes {longest}: a driver that makes one hangs. Make the front-end's \
             rings larger (in QEMU: queue-size=128), turn indirect descriptors on \
             (indirect_desc=on), or start this program with --queue-size={}",
            largest_power_of_two(size)
        ))
    }
}

/// What `--queue-size` may be, at most `size`.
fn largest_power_of_two(size: u16) -> u16 {
    1 << size.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_rings_without_indirect_descriptors_are_said_once() {
        let indirect = 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let sizes = RingSizes::default();
        assert_eq!(sizes.started(128, 0, 126), None);
        assert_eq!(sizes.started(64, indirect, 126), None);
        // The device was told to allow no longer requests than these.
        assert_eq!(sizes.started(64, 0, 62), None);
        let said = sizes.started(127, 0, 126).expect("a warning");
        assert!(said.contains("127") && said.contains("128"), "{said}");
        assert!(said.contains("--queue-size=64"), "{said}");
        assert_eq!(sizes.started(64, 0, 126), None);
    }
}
