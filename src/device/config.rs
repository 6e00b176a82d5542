//! What the device tells a driver about itself: feature bits, the configuration
//! space and the limits in it. Field names are those of `struct virtio_blk_config`
//! (virtio 1.2, 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use crate::format::{SECTOR_SIZE, Sector};

/// Most data segments of a request: what fits a ring of 128 with header and
/// status, the ring that QEMU makes unless told otherwise.
const MAX_SEGMENTS: u16 = 126;

/// Descriptors of a request that are not data: header and status.
pub(super) const FRAME_DESCRIPTORS: u16 = 2;

/// Most ranges of a discard or write-zeroes.
pub(super) const MAX_RANGES: u32 = 64;

/// Most sectors of such a range: 2 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Offset of `capacity` in the configuration space.
pub(super) const CAPACITY_OFFSET: u32 = 0;

/// Offset of `writeback` in the configuration space, the only field that a driver
/// may write.
pub(super) const WRITEBACK_OFFSET: u32 = 32;

/// Bytes of the configuration space, up to the fields that this device has.
pub(super) const CONFIG_LEN: usize = 60;

/// What the configuration space is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConfigSpace {
    /// Capacity.
    pub disk_size: Sector,
    /// The smallest unit that the driver is to use, in bytes.
    pub logical_block: u32,
    pub num_queues: u16,
    /// Largest ring.
    pub queue_size: u16,
    /// In which the image gives space back and is best read and written, in bytes.
    pub host_block: u32,
    /// In bytes.
    pub cluster: u32,
    /// Whether the driver has the write cache on.
    pub writeback: bool,
}

/// Most data segments of a request on a device whose largest ring has `queue_size`
/// descriptors.
pub(super) fn seg_max(queue_size: u16) -> u16 {
    MAX_SEGMENTS.min(queue_size.saturating_sub(FRAME_DESCRIPTORS))
}

impl ConfigSpace {
    /// Exactly `size` bytes from `offset`; what lies beyond the fields that this
    /// device has reads as zeros, as fields of absent features do.
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let fields = self.encode();
        let start = (offset as usize).min(fields.len());
        let end = start.saturating_add(size as usize).min(fields.len());
        let mut bytes = fields[start..end].to_vec();
        bytes.resize(size as usize, 0);
        bytes
    }

    fn encode(&self) -> [u8; CONFIG_LEN] {
        let block = self.logical_block;
        let physical = self.host_block.max(block);
        let per_physical = physical / block;
        let seg_max = seg_max(self.queue_size);
        let mut out = Fields::default();
        out.put(self.disk_size.0.to_le_bytes()); // capacity
        out.put(0_u32.to_le_bytes()); // size_max
        out.put(u32::from(seg_max).to_le_bytes());
        out.put([0; 4]); // geometry
        out.put(block.to_le_bytes()); // blk_size
        out.put([per_physical.ilog2() as u8, 0]); // physical_block_exp, alignment_offset
        out.put(
            u16::try_from(per_physical)
                .unwrap_or(u16::MAX)
                .to_le_bytes(),
        ); // min_io_size
        out.put((self.cluster / block).to_le_bytes()); // opt_io_size
        out.put([u8::from(self.writeback), 0]); // writeback, unused0
        out.put(self.num_queues.to_le_bytes());
        out.put(MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        out.put(MAX_RANGES.to_le_bytes()); // max_discard_seg
        // The host's block and not the cluster: a guest skips extents that are
        // smaller, and space comes back in host blocks.
        out.put((physical / SECTOR_SIZE as u32).to_le_bytes()); // discard_sector_alignment
        out.put(MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        out.put(MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        out.put([1, 0, 0, 0]); // write_zeroes_may_unmap, unused1
        debug_assert_eq!(out.len, CONFIG_LEN);
        out.bytes
    }
}

/// Bytes that are appended to.
struct Fields {
    bytes: [u8; CONFIG_LEN],
    len: usize,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            bytes: [0; CONFIG_LEN],
            len: 0,
        }
    }
}

impl Fields {
    fn put<const N: usize>(&mut self, field: [u8; N]) {
        self.bytes[self.len..self.len + N].copy_from_slice(&field);
        self.len += N;
    }
}

/// The feature bits that the device offers.
pub(super) fn features(read_only: bool) -> u64 {
    let bits = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
    ];
    let only = if read_only {
        [VIRTIO_BLK_F_RO].as_slice()
    } else {
        &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]
    };
    let of_vhost = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
    let all = bits.iter().chain(only);
    all.fold(of_vhost.bits(), |all, bit| all | 1 << bit)
}

/// The protocol features that the device offers.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::LOG_SHMFD
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: ConfigSpace = ConfigSpace {
        disk_size: Sector(0x1234_5678),
        logical_block: 512,
        num_queues: 4,
        queue_size: 1024,
        host_block: 4096,
        cluster: 1 << 20,
        writeback: true,
    };

    #[test]
    fn fields_lie_where_the_standard_has_them() {
        let bytes = SPACE.read(0, CONFIG_LEN as u32);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes[..8], 0x1234_5678_u64.to_le_bytes());
        assert_eq!(u32_at(12), 126);
        assert_eq!(u32_at(20), 512);
        assert_eq!(bytes[24..26], [3, 0]);
        assert_eq!(bytes[26..28], 8_u16.to_le_bytes());
        assert_eq!(u32_at(28), 2048);
        assert_eq!(bytes[WRITEBACK_OFFSET as usize], 1);
        assert_eq!(bytes[34..36], 4_u16.to_le_bytes());
        assert_eq!(u32_at(36), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(40), MAX_RANGES);
        assert_eq!(u32_at(44), 8);
        assert_eq!(u32_at(48), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(52), MAX_RANGES);
        assert_eq!(bytes[56], 1);
    }

    #[test]
    fn only_some_fields_count_in_logical_blocks() {
        let space = ConfigSpace {
            logical_block: 4096,
            ..SPACE
        };
        let bytes = space.read(0, CONFIG_LEN as u32);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes[..8], 0x1234_5678_u64.to_le_bytes(), "capacity");
        assert_eq!(u32_at(20), 4096);
        assert_eq!(bytes[24..26], [0, 0], "a physical block is a logical one");
        assert_eq!(bytes[26..28], 1_u16.to_le_bytes(), "min_io_size");
        assert_eq!(u32_at(28), 256, "opt_io_size");
        assert_eq!(u32_at(44), 8, "discard_sector_alignment");
        let small = ConfigSpace {
            host_block: 512,
            ..space
        };
        assert_eq!(small.read(44, 4), 8_u32.to_le_bytes());
        assert_eq!(small.read(24, 2), [0, 0]);
    }

    #[test]
    fn any_part_of_the_space_has_the_length_asked_for() {
        let whole = SPACE.read(0, 256);
        for (offset, size) in [
            (0, 1),
            (32, 1),
            (0, 36),
            (8, 60),
            (59, 2),
            (60, 4),
            (250, 6),
        ] {
            let part = SPACE.read(offset, size);
            assert_eq!(part, whole[offset as usize..(offset + size) as usize]);
        }
        assert_eq!(SPACE.read(u32::MAX, 3), [0; 3]);
    }

    #[test]
    fn segments_leave_room_for_header_and_status() {
        for (queue_size, expected) in [(1024, 126), (128, 126), (64, 62), (2, 0), (1, 0)] {
            let space = ConfigSpace {
                queue_size,
                ..SPACE
            };
            assert_eq!(space.read(12, 4), u32::to_le_bytes(expected));
        }
    }

    #[test]
    fn a_read_only_disk_does_not_offer_to_be_changed() {
        let read_only = features(true);
        assert_ne!(read_only & (1 << VIRTIO_BLK_F_RO), 0);
        assert_eq!(read_only & (1 << VIRTIO_BLK_F_DISCARD), 0);
        assert_eq!(read_only & (1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        assert_eq!(features(false) & (1 << VIRTIO_BLK_F_RO), 0);
    }
}
