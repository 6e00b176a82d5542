//! Whether the driver has the write cache on, over resets and connections.
//!
//! A driver is told of its cache once, and sets it once. A front-end that connects
//! again for a driver that runs does neither again, nor does one whose guest resets
//! the device: QEMU answers such a guest from its own copy of the field. So where it
//! is not known what the driver believes, each write is stable: that is never wrong.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

/// From what the field `writeback` has its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// From nothing: another process or connection may know of a driver's mode.
    Unknown,
    /// From before a reset. The next look at the field finds the default.
    Past,
    /// The driver was told the default.
    Told,
    /// The driver has set it.
    Set,
}

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WriteCache {
    is_on: bool,
    source: Source,
    acked_features: u64,
}

impl WriteCache {
    /// Of a driver that nothing is known of.
    pub fn new() -> Self {
        Self {
            is_on: false,
            source: Source::Unknown,
            acked_features: 0,
        }
    }

    /// What is to outlive the connection, if anything is known.
    pub fn known(&self) -> Option<bool> {
        (self.source != Source::Unknown).then_some(self.is_on)
    }

    /// A driver that goes on has this mode.
    pub fn remembered(&mut self, is_on: bool) {
        self.write(is_on);
    }

    /// The driver has acknowledged these features.
    pub fn negotiated(&mut self, features: u64) {
        self.acked_features = features;
        if self.source == Source::Told {
            self.is_on = self.default();
        }
    }

    /// The driver is told what the field holds.
    pub fn read(&mut self) -> bool {
        if matches!(self.source, Source::Unknown | Source::Past) {
            self.source = Source::Told;
            self.is_on = self.default();
        }
        self.is_on
    }

    /// What the field holds, for a front-end that does not ask for it.
    pub fn peek(&self) -> bool {
        self.is_on
    }

    /// The driver sets the field.
    pub fn write(&mut self, is_on: bool) {
        self.source = Source::Set;
        self.is_on = is_on;
    }

    /// The device is reset.
    pub fn reset(&mut self) {
        if self.source != Source::Unknown {
            self.source = Source::Past;
        }
        self.acked_features = 0;
    }

    /// On, unless the driver cannot flush it (virtio 1.2, 5.2.5.1).
    fn default(&self) -> bool {
        !self.has(VIRTIO_BLK_F_CONFIG_WCE) || self.has(VIRTIO_BLK_F_FLUSH)
    }

    /// Whether each write must be stable when it completes (virtio 1.2, 5.2.6.2): when
    /// the cache is off, and when the driver can neither flush nor turn it off.
    pub fn is_write_through(&self) -> bool {
        if self.has(VIRTIO_BLK_F_CONFIG_WCE) {
            !self.is_on
        } else {
            !self.has(VIRTIO_BLK_F_FLUSH)
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.acked_features & (1 << bit) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
    const WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

    fn told(features: u64) -> WriteCache {
        let mut cache = WriteCache::new();
        assert!(cache.read());
        cache.negotiated(features);
        cache
    }

    #[test]
    fn write_through_follows_what_was_negotiated() {
        assert!(told(0).is_write_through());
        assert!(!told(FLUSH).is_write_through());
        assert!(!told(FLUSH | WCE).is_write_through());
        let mut off = told(FLUSH | WCE);
        off.write(false);
        assert!(off.is_write_through());
        off.write(true);
        assert!(!off.is_write_through());
    }

    #[test]
    fn a_cache_that_cannot_be_flushed_starts_off() {
        let mut cache = told(WCE);
        assert!(cache.is_write_through());
        assert!(!cache.read());
        cache.write(true);
        cache.negotiated(WCE);
        assert!(!cache.is_write_through(), "the driver wants it so");
    }

    #[test]
    fn a_driver_that_nobody_has_told_gets_stable_writes() {
        let mut cache = WriteCache::new();
        cache.negotiated(FLUSH | WCE);
        assert!(cache.is_write_through());
        assert!(cache.read());
        assert!(!cache.is_write_through());
    }

    #[test]
    fn a_reset_changes_nothing_until_the_driver_looks() {
        let mut cache = told(FLUSH | WCE);
        cache.write(false);
        cache.reset();
        cache.negotiated(FLUSH | WCE);
        assert!(cache.is_write_through());
        assert!(cache.read());
        assert!(!cache.is_write_through());
        cache.reset();
        cache.negotiated(FLUSH | WCE);
        assert!(!cache.is_write_through());
    }
}
