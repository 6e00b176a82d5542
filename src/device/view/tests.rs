use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemory, MmapRegion, Permissions};

use super::super::memory::{GuestMap, GuestRegion};
use super::GuestView;

const PAGE: u64 = 0x1000;

/// Regions of one or two pages at these pages.
fn table(pages: &[(u64, u64)]) -> Arc<GuestMap> {
    let region = |&(at, count): &(u64, u64)| {
        let mapped = MmapRegion::new((count * PAGE) as usize).unwrap();
        GuestRegion::new(mapped, GuestAddress(at * PAGE), None).unwrap()
    };
    Arc::new(GuestMap::from_regions(pages.iter().map(region).collect()).unwrap())
}

/// Where the pieces lie in the process, with their lengths, up to the first that is none.
fn pieces(memory: &impl GuestMemory, at: u64, count: usize) -> Vec<Option<(usize, usize)>> {
    let slices = memory.get_slices(GuestAddress(at), count, Permissions::Read);
    let piece = |slice: Result<vm_memory::VolatileSlice<'_, _>, _>| {
        let slice = slice.ok()?;
        Some((slice.ptr_guard().as_ptr() as usize, slice.len()))
    };
    slices.unwrap().map(piece).collect()
}

/// Two that touch, one further up, and one whose end is that of the address space.
const LAYOUT: [(u64, u64); 4] = [(1, 2), (3, 1), (6, 2), ((1 << 52) - 2, 1)];

proptest! {
    #[test]
    fn finds_what_the_table_finds(
        look_ups in prop::collection::vec(
            (
                prop_oneof![0..9 * PAGE, (u64::MAX - 3 * PAGE)..=u64::MAX],
                prop_oneof![0..20_usize, 0..3 * PAGE as usize],
            ),
            1..20,
        ),
    ) {
        let map = table(&LAYOUT);
        let view = GuestView::new(Arc::clone(&map));
        for (at, count) in look_ups {
            prop_assert_eq!(pieces(&view, at, count), pieces(&*map, at, count));
            let address = GuestAddress(at);
            prop_assert_eq!(
                view.check_range(address, count, Permissions::Read),
                GuestMemory::check_range(&*map, address, count, Permissions::Read)
            );
            let (mut seen, mut expected) = (vec![1; count], vec![1; count]);
            prop_assert_eq!(
                view.read(&mut seen, address).ok(),
                map.read(&mut expected, address).ok()
            );
            prop_assert_eq!(seen, expected);
        }
    }
}

#[test]
fn what_is_written_crosses_from_region_to_region() {
    let map = table(&LAYOUT);
    let view = GuestView::new(Arc::clone(&map));
    let bytes: Vec<u8> = (0..100).collect();
    let at = GuestAddress(3 * PAGE - 50);
    view.write_slice(&bytes, at).unwrap();
    let mut read = vec![0; 100];
    map.read_slice(&mut read, at).unwrap();
    assert_eq!(read, bytes);
    // Of this only the first half is there.
    let at = GuestAddress(4 * PAGE - 50);
    assert_eq!(view.write(&bytes, at).unwrap(), 50);
    assert!(view.write_slice(&bytes, at).is_err());
}

#[test]
fn no_memory_has_nothing() {
    let view = GuestView::new(Arc::new(GuestMap::new()));
    assert!(view.read_obj::<u32>(GuestAddress(0)).is_err());
    assert_eq!(pieces(&view, 0, 0), []);
}
