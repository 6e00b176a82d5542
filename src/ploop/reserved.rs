//! A list of atomics with room to grow where it is: nobody who reads it ever has to be
//! told that it has moved.
//!
//! Its address space is taken at once for all that it may ever hold, and its memory page
//! by page when it is first written to. Knows nothing of what is in it.

#[cfg(not(ploop_loom))]
pub use mapped::Reserved;

/// Loom's atomics are more than their bits, and nothing grows in the models.
#[cfg(ploop_loom)]
pub type Reserved<T> = Box<[T]>;

#[cfg(not(ploop_loom))]
mod mapped {
    use std::ops::{Deref, Range};
    use std::ptr::{self, NonNull};

    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
    use zerocopy::FromZeros;

    /// What the kernel may make one page of.
    const HUGE_PAGE: usize = 2 << 20;

    /// The least that a mapping is long.
    const PAGE: usize = 4096;

    /// See the module's text.
    pub struct Reserved<T> {
        start: NonNull<T>,
        len: usize,
    }

    // SAFETY: it owns its memory, as a box does.
    unsafe impl<T: Send> Send for Reserved<T> {}
    // SAFETY: likewise; it gives out shared references only.
    unsafe impl<T: Sync> Sync for Reserved<T> {}

    impl<T: FromZeros> Reserved<T> {
        /// So many, all of them zero; `None` if there is not the address space. `used`
        /// says how many will be in use at first.
        pub fn zeroed(len: usize, used: usize) -> Option<Self> {
            let bytes = len.max(1).checked_mul(size_of::<T>())?;
            // SAFETY: a new mapping at an address that the kernel chooses concerns no
            // other memory.
            let start = unsafe {
                mmap_anonymous(
                    ptr::null_mut(),
                    bytes,
                    ProtFlags::READ | ProtFlags::WRITE,
                    // Most of it is never touched: it does not count as memory in use.
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                )
            }
            .ok()?;
            if used * size_of::<T>() < HUGE_PAGE {
                // Or the first entry would take as much.
                // SAFETY: it is this mapping; the advice changes no content.
                let _ = unsafe { madvise(start, bytes, Advice::LinuxNoHugepage) };
            }
            Some(Self {
                start: NonNull::new(start.cast())?,
                len,
            })
        }
    }

    impl<T> Reserved<T> {
        /// Most of these will be set soon. The system may provide memory for them in large
        /// pieces, which takes it a fraction of the time; not so for few of them, which would
        /// take a whole such piece.
        pub fn expect(&self, these: Range<usize>) {
            if these.len() * size_of::<T>() < HUGE_PAGE / 2 {
                return;
            }
            let base = self.start.as_ptr() as usize;
            let mapped = base..base + (self.len.max(1) * size_of::<T>()).next_multiple_of(PAGE);
            let start = base + these.start * size_of::<T>();
            let end = base + these.end * size_of::<T>();
            let start = (start / HUGE_PAGE * HUGE_PAGE).max(mapped.start);
            let end = end.next_multiple_of(HUGE_PAGE).min(mapped.end);
            if start < end {
                let at = self.start.as_ptr().cast::<u8>().wrapping_add(start - base);
                // SAFETY: it is a part of this mapping; the advice changes no content.
                let _ = unsafe { madvise(at.cast(), end - start, Advice::LinuxHugepage) };
            }
        }
    }

    impl<T> Deref for Reserved<T> {
        type Target = [T];

        fn deref(&self) -> &[T] {
            // SAFETY: the mapping is aligned to pages, which is more than any atomic
            // needs, has so many of them, of which zeros are valid ones, and lives as
            // long as this.
            unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
        }
    }

    impl<T> Drop for Reserved<T> {
        fn drop(&mut self) {
            let bytes = self.len.max(1) * size_of::<T>();
            // SAFETY: it is the mapping that was made for this, and nobody has a
            // reference into it any more. Atomics need no drop.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), bytes) };
        }
    }

    #[cfg(test)]
    mod tests {
        use std::sync::atomic::{AtomicU64, Ordering};

        use super::*;

        #[test]
        fn there_is_room_for_the_largest_disk_and_it_takes_what_is_touched() {
            let len = 1 << 29;
            let list = Reserved::<AtomicU64>::zeroed(len, 1).unwrap();
            assert_eq!(list.len(), len);
            list[len - 1].store(7, Ordering::Relaxed);
            assert_eq!(list[len - 1].load(Ordering::Relaxed), 7);
            assert_eq!(list[0].load(Ordering::Relaxed), 0);
        }

        /// Whether the kernel has been advised to make huge pages of what is at an address.
        fn is_advised(address: usize) -> bool {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut is_here = false;
            for line in maps.lines() {
                let range = line
                    .split(' ')
                    .next()
                    .and_then(|range| range.split_once('-'));
                let hex = |text| usize::from_str_radix(text, 16).ok();
                if let Some((Some(start), Some(end))) =
                    range.map(|(start, end)| (hex(start), hex(end)))
                {
                    is_here = (start..end).contains(&address);
                } else if is_here && let Some(flags) = line.strip_prefix("VmFlags:") {
                    return flags.split(' ').any(|flag| flag == "hg");
                }
            }
            panic!("nothing is mapped at {address:#x}");
        }

        #[test]
        fn memory_comes_in_large_pieces_only_where_it_is_expected() {
            if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
                return;
            }
            let list = Reserved::<AtomicU64>::zeroed(1 << 24, 1 << 23).unwrap();
            let address = |index: usize| &raw const list[index] as usize;
            list[0].store(7, Ordering::Relaxed);
            let (here, last, far) = (address(1 << 20), address((1 << 21) - 1), address(1 << 22));
            assert!(![here, last, far].into_iter().any(is_advised));
            list.expect(1 << 20..1 << 21);
            assert!(is_advised(here) && is_advised(last));
            assert!(!is_advised(far) && !is_advised(address(1 << 19)));
            // Too few, and to the very end.
            list.expect((1 << 24) - 5..1 << 24);
            assert!(!is_advised(address((1 << 24) - 1)));
            list.expect((1 << 24) - (1 << 17)..1 << 24);
            assert!(is_advised(address((1 << 24) - 1)));
            assert_eq!(list[0].load(Ordering::Relaxed), 7);
            assert_eq!(list[1 << 20].load(Ordering::Relaxed), 0);
        }
    }
}
