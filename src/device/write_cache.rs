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

    /// In a byte, for another process; see [`Self::decode`].
    pub fn encode(&self) -> u8 {
        let source = match self.source {
            Source::Unknown => 0,
            Source::Past => 1,
            Source::Told => 2,
            Source::Set => 3,
        };
        source << 1 | u8::from(self.is_on)
    }

    /// What another process has encoded, for a driver that has acknowledged nothing yet.
    /// `None` if that cannot be.
    pub fn decode(byte: u8) -> Option<Self> {
        let source = match byte >> 1 {
            0 => Source::Unknown,
            1 => Source::Past,
            2 => Source::Told,
            3 => Source::Set,
            _ => return None,
        };
        Some(Self {
            is_on: byte & 1 != 0,
            source,
            acked_features: 0,
        })
    }

    /// The same for a driver that has these features in force.
    #[must_use]
    pub fn with_features(mut self, features: u64) -> Self {
        self.acked_features = features;
        self
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
        assert!(!off.peek());
        off.write(true);
        assert!(off.peek());
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
    fn a_driver_that_goes_on_has_the_mode_that_was_remembered() {
        for is_on in [false, true] {
            let mut cache = WriteCache::new();
            assert_eq!(cache.known(), None);
            cache.remembered(is_on);
            cache.negotiated(FLUSH | WCE);
            assert_eq!(cache.known(), Some(is_on));
            assert_eq!(cache.is_write_through(), !is_on);
            assert_eq!(cache.read(), is_on);
        }
    }

    #[test]
    fn another_process_knows_what_this_one_did() {
        let mut set = told(FLUSH | WCE);
        set.write(false);
        let mut past = set;
        past.reset();
        for cache in [WriteCache::new(), told(FLUSH | WCE), set, past] {
            let handed = WriteCache::decode(cache.encode()).unwrap();
            assert_eq!(handed.with_features(cache.acked_features), cache);
        }
        assert_eq!(WriteCache::decode(8), None);
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
