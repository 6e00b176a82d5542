//! The guest's memory as one queue sees it.
//!
//! The front-end may replace the memory table while requests are in flight. A
//! request keeps the map that its addresses were looked up in; it does so with one
//! shared reference per queue and table, not one per request.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use vm_memory::bitmap::BS;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryError,
    GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, MmapRegion, VolatileSlice,
};

use super::vanishing::Watch;
use super::view::GuestView;

/// A table of guest memory. It is mapped as long as a reference to it is held.
pub(super) type GuestMap = GuestRegionCollection<GuestRegion>;

/// A region of guest memory, which may vanish.
#[derive(Debug)]
pub(super) struct GuestRegion {
    /// Goes before the mapping.
    _watch: Option<Watch>,
    mapped: Arc<GuestRegionMmap<()>>,
}

impl GuestRegion {
    /// `None` if it leaves the address space.
    pub fn new(mapped: MmapRegion, at: GuestAddress, watch: Option<Watch>) -> Option<Self> {
        Some(Self {
            _watch: watch,
            mapped: Arc::new(GuestRegionMmap::new(mapped, at)?),
        })
    }

    /// The mapping. Who keeps it gives it back before the region goes.
    pub fn mapped(&self) -> Arc<GuestRegionMmap<()>> {
        Arc::clone(&self.mapped)
    }
}

impl GuestMemoryRegion for GuestRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapped.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapped.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, at: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        self.mapped.get_host_address(at)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.mapped.file_offset()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, ()>>, GuestMemoryError> {
        self.mapped.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for GuestRegion {}

/// One region of anonymous memory.
#[cfg(test)]
pub(super) fn anonymous(at: GuestAddress, len: usize) -> GuestMap {
    let mapped = MmapRegion::new(len).unwrap();
    GuestMap::from_regions(vec![GuestRegion::new(mapped, at, None).unwrap()]).unwrap()
}

/// What the rings of the library want to know of it.
pub(super) type Memory = GuestMemoryAtomic<GuestMap>;

/// The memory of a connection.
#[derive(Debug)]
pub(super) struct SharedMemory {
    atomic: Memory,
    /// Counts the tables, so that a queue sees cheaply that there is a new one.
    generation: AtomicU64,
    /// A queue has said that it may not be shared at all.
    is_doubted: AtomicBool,
}

impl SharedMemory {
    /// No memory yet.
    pub fn new() -> Self {
        Self {
            atomic: GuestMemoryAtomic::new(GuestMap::new()),
            generation: AtomicU64::new(0),
            is_doubted: AtomicBool::new(false),
        }
    }

    /// The table, for the rings of the library.
    pub fn atomic(&self) -> Memory {
        self.atomic.clone()
    }

    /// Replaces the table.
    pub fn replace(&self, table: GuestMap) {
        // Nothing panics with the lock held.
        let guard = self.atomic.lock().unwrap_or_else(PoisonError::into_inner);
        guard.replace(table);
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// Which table a request was parsed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the table is kept until the hold is released"]
pub(super) struct Hold(u64);

/// A table and the number of requests that hold it.
#[derive(Debug)]
struct Held {
    generation: u64,
    view: GuestView,
    holds: Cell<usize>,
}

/// The tables that one queue uses: the newest, and older ones that requests in
/// flight still hold.
#[derive(Debug)]
pub(super) struct QueueMemory {
    shared: Arc<SharedMemory>,
    newest: Held,
    older: Vec<Held>,
}

impl QueueMemory {
    pub fn new(shared: Arc<SharedMemory>) -> Self {
        let newest = Held::load(&shared);
        Self {
            shared,
            newest,
            older: Vec::new(),
        }
    }

    /// The newest table known here.
    pub fn map(&self) -> &GuestMap {
        self.newest.view.map()
    }

    /// The same for many look-ups.
    pub fn view(&self) -> &GuestView {
        &self.newest.view
    }

    /// Whether the front-end has replaced the table that [`Self::map`] gives.
    pub fn is_stale(&self) -> bool {
        self.shared.generation.load(Ordering::Acquire) != self.newest.generation
    }

    /// Says that it may not be shared at all; false if that was said before.
    pub fn doubt(&self) -> bool {
        !self.shared.is_doubted.swap(true, Ordering::Relaxed)
    }

    /// Takes over a new table, if there is one.
    pub fn refresh(&mut self) {
        if !self.is_stale() {
            return;
        }
        let old = std::mem::replace(&mut self.newest, Held::load(&self.shared));
        if old.holds.get() > 0 {
            self.older.push(old);
        }
    }

    /// Keeps the newest table until [`Self::release`].
    pub fn hold(&self) -> Hold {
        self.newest.holds.set(self.newest.holds.get() + 1);
        Hold(self.newest.generation)
    }

    /// The table of a hold.
    #[cfg(test)]
    pub fn held(&self, hold: Hold) -> &GuestMap {
        if hold.0 == self.newest.generation {
            return self.map();
        }
        self.older
            .iter()
            .find(|held| held.generation == hold.0)
            .map(|held| held.view.map())
            .expect("a table stays until its last hold is released")
    }

    /// Ends a hold.
    pub fn release(&mut self, hold: Hold) {
        if hold.0 == self.newest.generation {
            self.newest.drop_one();
            return;
        }
        self.older.retain(|held| {
            if held.generation == hold.0 {
                held.drop_one();
            }
            held.holds.get() > 0
        });
    }
}

impl Held {
    fn load(shared: &SharedMemory) -> Self {
        // The count first: at worst the table is newer than it says, and is loaded
        // once more.
        let generation = shared.generation.load(Ordering::Acquire);
        Self {
            generation,
            view: GuestView::new(shared.atomic.memory().into_inner()),
            holds: Cell::new(0),
        }
    }

    fn drop_one(&self) {
        self.holds.set(self.holds.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use vm_memory::GuestMemoryBackend;

    use super::*;

    fn replace(shared: &SharedMemory, len: usize) {
        shared.replace(anonymous(GuestAddress(0), len));
    }

    fn weak(memory: &QueueMemory) -> Weak<GuestMap> {
        Arc::downgrade(&memory.shared.atomic.memory().into_inner())
    }

    #[test]
    fn a_replaced_table_stays_mapped_until_its_last_request_ends() {
        let shared = Arc::new(SharedMemory::new());
        replace(&shared, 0x1000);
        let mut memory = QueueMemory::new(Arc::clone(&shared));
        let first = memory.hold();
        let second = memory.hold();
        let old = weak(&memory);

        replace(&shared, 0x2000);
        assert!(memory.is_stale());
        memory.refresh();
        assert!(!memory.is_stale());
        let third = memory.hold();
        assert_eq!(memory.map().last_addr(), GuestAddress(0x1fff));
        assert_eq!(memory.held(first).last_addr(), GuestAddress(0xfff));
        assert_eq!(memory.held(third).last_addr(), GuestAddress(0x1fff));

        memory.release(first);
        assert!(old.upgrade().is_some());
        memory.release(second);
        assert!(old.upgrade().is_none());
        memory.release(third);
    }

    #[test]
    fn a_table_that_nobody_holds_goes_at_once() {
        let shared = Arc::new(SharedMemory::new());
        let mut memory = QueueMemory::new(Arc::clone(&shared));
        let old = weak(&memory);
        replace(&shared, 0x1000);
        memory.refresh();
        assert!(old.upgrade().is_none());
    }
}
