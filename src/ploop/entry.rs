//! A BAT entry in memory: where a guest cluster is, in one atomic word.

use crate::format::HostCluster;
use crate::storage::FileId;

const LEVEL_SHIFT: u32 = 32;
const MAPPED: u64 = 1 << 40;
const LOCKED: u64 = 1 << 41;
const UNSTABLE: u64 = 1 << 42;
const CHANGED: u64 = 1 << 43;
const UNMARKED: u64 = 1 << 44;
const WRITTEN: u64 = 1 << 45;
const CHANGE_SHIFT: u32 = 46;

/// What an entry says. The whole of it is read and changed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

/// Where the data of a guest cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: it reads as zeros.
    Hole,
    /// In this cluster of this file of the chain.
    In(FileId, HostCluster),
}

impl Entry {
    /// Reads as zeros; also the bits of a fresh entry.
    pub const HOLE: Self = Self(0);

    /// Mapped to a cluster of a level of the chain.
    pub const fn mapped(file: FileId, host: HostCluster) -> Self {
        Self(MAPPED | (file.0 as u64) << LEVEL_SHIFT | host.0 as u64)
    }

    /// From the bits of the atomic.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// For the atomic.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Where the data is. A lock does not matter to readers: what is locked is
    /// about to move, and stays valid where it was until it has.
    pub const fn place(self) -> Place {
        if self.0 & MAPPED == 0 {
            Place::Hole
        } else {
            Place::In(
                FileId((self.0 >> LEVEL_SHIFT) as u8),
                HostCluster(self.0 as u32),
            )
        }
    }

    /// Whether the cluster's runner alone may write to it or change it: a
    /// copy-on-write or a read-modify-write is under way.
    pub const fn is_locked(self) -> bool {
        self.0 & LOCKED != 0
    }

    /// The same, locked.
    pub const fn locked(self) -> Self {
        Self(self.0 | LOCKED)
    }

    /// The same, not locked.
    pub const fn unlocked(self) -> Self {
        Self(self.0 & !LOCKED)
    }

    /// Whether the cluster was copied from a lower level and the copy is not
    /// known to be stable: the entry may not reach the disk yet (I6).
    pub const fn is_unstable(self) -> bool {
        self.0 & UNSTABLE != 0
    }

    /// The same, marked as a copy that is not stable yet.
    pub const fn unstable(self) -> Self {
        Self(self.0 | UNSTABLE)
    }

    /// The same, fit for the disk.
    pub const fn stable(self) -> Self {
        Self(self.0 & !UNSTABLE)
    }

    /// Whether the entry on disk may be another: no sync has covered its write.
    pub const fn is_changed(self) -> bool {
        self.0 & CHANGED != 0
    }

    /// The same, just changed: not on disk, and its md page not marked dirty yet.
    pub const fn changed(self) -> Self {
        Self(self.0 | CHANGED | UNMARKED)
    }

    /// The same, told from `before`, and from what was before that, by the number
    /// of the change: an entry that was changed and changed back is another one.
    pub const fn after(self, before: Self) -> Self {
        let below = (1 << CHANGE_SHIFT) - 1;
        let number = (before.0 >> CHANGE_SHIFT) + 1;
        Self(self.0 & below | number << CHANGE_SHIFT)
    }

    /// Whether both are of the same change: all else that may differ is what has
    /// become of it.
    pub const fn is_same_change(self, other: Self) -> bool {
        const FLAGS: u64 = LOCKED | UNSTABLE | CHANGED | UNMARKED | WRITTEN;
        self.0 & !FLAGS == other.0 & !FLAGS
    }

    /// The same; a write of its page contains it: who relies on it finds it there,
    /// or on its way.
    pub const fn written(self) -> Self {
        Self((self.0 | WRITTEN) & !UNMARKED)
    }

    /// The same after a sync: on disk, if a write of its page contained it.
    pub const fn synced(self) -> Self {
        if self.0 & WRITTEN != 0 {
            Self(self.0 & !(CHANGED | WRITTEN))
        } else {
            self
        }
    }

    /// Whether whoever changed the entry has not marked its md page dirty yet.
    /// Who relies on the entry meanwhile has to mark the page instead: else a
    /// flush of theirs could miss it.
    pub const fn is_unmarked(self) -> bool {
        self.0 & UNMARKED != 0
    }

    /// What outlives the process: where the cluster is and the number of the change.
    /// Never zero.
    pub const fn remembered(self) -> u64 {
        self.0 & !(LOCKED | UNSTABLE | UNMARKED | WRITTEN) | CHANGED
    }

    /// The same, known to be on disk.
    pub const fn on_disk(self) -> Self {
        Self(self.0 & !(CHANGED | UNMARKED | WRITTEN | UNSTABLE))
    }

    /// The entry that was remembered so; `None` if nothing was, or not by us.
    pub const fn from_remembered(bits: u64) -> Option<Self> {
        let entry = Self(bits);
        let empty_hole = bits & MAPPED != 0 || bits & (MAPPED - 1) == 0;
        if bits == entry.remembered() && empty_hole {
            Some(entry)
        } else {
            None
        }
    }

    /// The same, with the cluster in this file. What is remembered is of the top, whose
    /// number is another when levels below have gone.
    pub const fn in_file(self, file: FileId) -> Self {
        if self.0 & MAPPED == 0 {
            return self;
        }
        let numbers = 0xff << LEVEL_SHIFT;
        Self(self.0 & !numbers | (file.0 as u64) << LEVEL_SHIFT)
    }

    /// Whether its change came before that of `other`, which is of the same cluster
    /// and not more than half the numbers away.
    pub const fn is_older_than(self, other: Self) -> bool {
        let ahead = (other.0 >> CHANGE_SHIFT).wrapping_sub(self.0 >> CHANGE_SHIFT);
        let numbers = 1 << (u64::BITS - CHANGE_SHIFT);
        let ahead = ahead & (numbers - 1);
        ahead != 0 && ahead < numbers / 2
    }

    /// The same, its page marked.
    pub const fn marked(self) -> Self {
        Self(self.0 & !UNMARKED)
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    #[test]
    fn keeps_cluster_level_and_flags_apart() {
        for (level, host) in [(0, 0), (0, u32::MAX), (255, 0), (125, 0x8000_0001)] {
            let place = Place::In(FileId(level), HostCluster(host));
            let entry = Entry::mapped(FileId(level), HostCluster(host));
            for entry in [
                entry,
                entry.locked(),
                entry.unstable(),
                entry.unstable().locked(),
            ] {
                assert_eq!(entry.place(), place);
                assert_eq!(entry.locked().unlocked(), entry.unlocked());
                assert_eq!(entry.unstable().stable(), entry.stable());
                assert_eq!(entry.changed().marked().written().synced(), entry);
                assert!(entry.changed().synced().is_changed());
            }
            let changed_back = entry.after(Entry::HOLE).after(entry);
            assert_ne!(changed_back, entry);
            assert_eq!(changed_back.place(), entry.place());
            assert!(!changed_back.is_same_change(entry));
            assert!(entry.unstable().changed().locked().is_same_change(entry));
            assert!(entry.locked().is_locked() && !entry.is_locked());
            assert!(entry.unstable().is_unstable() && !entry.is_unstable());
        }
        assert_eq!(Entry::HOLE.locked().place(), Place::Hole);
    }

    /// A hole and a cluster with every set of marks, after some changes.
    fn all_states() -> Vec<Entry> {
        let mut states = Vec::new();
        for place in [
            Entry::HOLE,
            Entry::mapped(FileId(0xa5), HostCluster(0xffff_0001)),
        ] {
            for marks in 0..16 {
                let mut entry = place.after(Entry::HOLE).after(place.after(Entry::HOLE));
                entry = if marks & 1 != 0 {
                    entry.locked()
                } else {
                    entry
                };
                entry = if marks & 2 != 0 {
                    entry.unstable()
                } else {
                    entry
                };
                entry = if marks & 4 != 0 {
                    entry.changed()
                } else {
                    entry
                };
                entry = if marks & 8 != 0 {
                    entry.written()
                } else {
                    entry
                };
                states.push(entry);
            }
        }
        states
    }

    /// What an entry says, but for whether it was written.
    fn says(entry: Entry) -> (Place, u64, [bool; 4]) {
        let marks = [
            entry.is_locked(),
            entry.is_unstable(),
            entry.is_changed(),
            entry.is_unmarked(),
        ];
        (entry.place(), entry.bits() >> CHANGE_SHIFT, marks)
    }

    #[test]
    fn each_mark_comes_and_goes_alone() {
        for entry in all_states() {
            let (place, number, [locked, unstable, changed, unmarked]) = says(entry);
            let expected = |marks| (place, number, marks);
            let twice = |mark: fn(Entry) -> Entry, marks| {
                assert_eq!(says(mark(entry)), expected(marks));
                assert_eq!(mark(mark(entry)), mark(entry));
            };
            twice(Entry::locked, [true, unstable, changed, unmarked]);
            twice(Entry::unlocked, [false, unstable, changed, unmarked]);
            twice(Entry::unstable, [locked, true, changed, unmarked]);
            twice(Entry::stable, [locked, false, changed, unmarked]);
            twice(Entry::changed, [locked, unstable, true, true]);
            twice(Entry::marked, [locked, unstable, changed, false]);
            twice(Entry::written, [locked, unstable, changed, false]);
            twice(Entry::on_disk, [locked, false, false, false]);
            // Only what a write has contained is on disk after a sync.
            let is_written = entry.written() == entry;
            let after_sync = [locked, unstable, changed && !is_written, unmarked];
            twice(Entry::synced, after_sync);
            assert_eq!(Entry::from_bits(entry.bits()), entry);
        }
    }

    #[test]
    fn a_change_has_the_number_after_the_one_before() {
        let mut before = Entry::HOLE;
        for number in 1..1 << (u64::BITS - CHANGE_SHIFT) {
            let entry = Entry::mapped(FileId(1), HostCluster(2)).changed();
            let after = entry.after(before);
            assert_eq!(after.bits() >> CHANGE_SHIFT, number);
            assert_eq!(says(after).2, says(entry).2);
            assert!(before.is_older_than(after) && !after.is_older_than(before));
            before = after;
        }
        assert_eq!(Entry::HOLE.after(before), Entry::HOLE, "they begin again");
    }

    #[test]
    fn who_is_older_shows_up_to_half_of_the_numbers_apart() {
        let numbers = 1_u64 << (u64::BITS - CHANGE_SHIFT);
        let at = |number: u64| Entry::from_bits((number % numbers) << CHANGE_SHIFT);
        for start in [0, 1, numbers / 2, numbers - 1] {
            for (ahead, is_older) in [
                (0, false),
                (1, true),
                (numbers / 2 - 1, true),
                (numbers / 2, false),
                (numbers - 1, false),
            ] {
                let older = at(start).is_older_than(at(start + ahead));
                assert_eq!(older, is_older, "{ahead} after {start}");
            }
        }
    }

    #[test]
    fn what_is_remembered_says_where_the_cluster_is_and_what_change_it_was() {
        for entry in all_states() {
            let remembered = entry.remembered();
            assert_ne!(remembered, 0);
            let back = Entry::from_remembered(remembered).expect("it was made here");
            assert_eq!(
                says(back),
                (
                    entry.place(),
                    entry.bits() >> CHANGE_SHIFT,
                    [false, false, true, false]
                )
            );
            // Each mark that is none of what is remembered, and a hole with a place.
            for foreign in [LOCKED, UNSTABLE, UNMARKED, WRITTEN] {
                assert_eq!(Entry::from_remembered(remembered | foreign), None);
            }
            assert_eq!(Entry::from_remembered(remembered & !CHANGED), None);
            assert_eq!(
                Entry::from_remembered(remembered & !MAPPED).is_some(),
                entry.place() == Place::Hole
            );
        }
        for stray in [1, 1 << LEVEL_SHIFT, MAPPED >> 1] {
            assert_eq!(Entry::from_remembered(CHANGED | stray), None);
        }
        assert_eq!(Entry::from_remembered(0), None);
    }

    #[test]
    fn marks_do_not_tell_changes_apart_and_places_do() {
        let states = all_states();
        for (index, one) in states.iter().enumerate() {
            for (other_index, other) in states.iter().enumerate() {
                // The first half are holes.
                let same = index / 16 == other_index / 16;
                assert_eq!(one.is_same_change(*other), same);
            }
            assert!(!one.is_same_change(one.after(*one)));
        }
    }
}
