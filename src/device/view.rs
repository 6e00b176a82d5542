//! Guest memory for many look-ups of a few bytes, which is what a ring consists of.
//!
//! Each request takes a dozen: entries of rings, descriptors, header, data, status. A look-up
//! in the library's table searches the regions, then makes an iterator over pieces, of which
//! there is nearly always one. Here the region found last is looked at first.
//!
//! Knows nothing of rings and requests, nor of how long the table is needed: see
//! [`QueueMemory`](super::memory::QueueMemory).

use std::cell::Cell;
use std::iter::FusedIterator;
use std::sync::Arc;

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, Permissions, VolatileSlice,
};

use super::memory::{GuestMap, GuestRegion};

/// A table of guest memory, for one thread.
#[derive(Debug)]
pub(super) struct GuestView {
    /// Its regions, lowest first. They go before it.
    regions: Box<[Placed]>,
    /// Which of them was found last.
    recent: Cell<usize>,
    map: Arc<GuestMap>,
}

#[derive(Debug)]
struct Placed {
    start: u64,
    len: u64,
    mapped: Arc<GuestRegionMmap<()>>,
}

impl Placed {
    /// How far behind the region's start the address is, if it is in the region.
    #[inline]
    fn offset_of(&self, address: GuestAddress) -> Option<u64> {
        let offset = address.0.wrapping_sub(self.start);
        (offset < self.len).then_some(offset)
    }
}

impl GuestView {
    pub fn new(map: Arc<GuestMap>) -> Self {
        let placed = |region: &GuestRegion| Placed {
            start: region.start_addr().0,
            len: region.len(),
            mapped: region.mapped(),
        };
        let mut regions: Box<[_]> = map.iter().map(placed).collect();
        regions.sort_by_key(|placed| placed.start);
        Self {
            regions,
            recent: Cell::new(0),
            map,
        }
    }

    /// The table itself.
    pub fn map(&self) -> &GuestMap {
        &self.map
    }

    #[inline]
    fn find(&self, address: GuestAddress) -> Option<(&Placed, u64)> {
        let recent = self.regions.get(self.recent.get());
        if let Some(placed) = recent
            && let Some(offset) = placed.offset_of(address)
        {
            return Some((placed, offset));
        }
        self.search(address)
    }

    #[cold]
    fn search(&self, address: GuestAddress) -> Option<(&Placed, u64)> {
        let above = self
            .regions
            .partition_point(|placed| placed.start <= address.0);
        let index = above.checked_sub(1)?;
        let placed = &self.regions[index];
        let offset = placed.offset_of(address)?;
        self.recent.set(index);
        Some((placed, offset))
    }
}

impl GuestMemory for GuestView {
    type PhysicalMemory = GuestMap;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, _: Permissions) -> bool {
        GuestMemoryBackend::check_range(&*self.map, address, count)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>, GuestMemoryError> {
        Ok(Pieces {
            view: self,
            address,
            left: count,
        })
    }

    fn physical_memory(&self) -> Option<&GuestMap> {
        Some(&self.map)
    }
}

/// The pieces of a range of guest memory.
struct Pieces<'a> {
    view: &'a GuestView,
    address: GuestAddress,
    /// Bytes.
    left: usize,
}

impl<'a> Pieces<'a> {
    #[inline]
    fn piece(&mut self) -> Result<VolatileSlice<'a>, GuestMemoryError> {
        let (placed, offset) = (self.view.find(self.address))
            .ok_or(GuestMemoryError::InvalidGuestAddress(self.address))?;
        let len =
            usize::try_from(placed.len - offset).map_or(self.left, |room| room.min(self.left));
        let slice = placed.mapped.get_slice(MemoryRegionAddress(offset), len)?;
        self.left -= len;
        if self.left > 0 {
            let next = self.address.0.checked_add(len as u64);
            self.address = GuestAddress(next.ok_or(GuestMemoryError::GuestAddressOverflow)?);
        }
        Ok(slice)
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Result<VolatileSlice<'a>, GuestMemoryError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let piece = self.piece();
        if piece.is_err() {
            self.left = 0;
        }
        Some(piece)
    }
}

impl FusedIterator for Pieces<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Pieces<'a> {
    #[inline]
    fn stop_on_error(
        mut self,
    ) -> Result<impl Iterator<Item = VolatileSlice<'a>>, GuestMemoryError> {
        let first = self.next().transpose()?;
        Ok(first.into_iter().chain(self.map_while(Result::ok)))
    }
}

#[cfg(test)]
mod tests;
