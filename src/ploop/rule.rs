//! The rules on which durability rests, by name, each asked for where it is kept.
//!
//! A proof by simulated power cuts, or by a model, is worth something only if it fails
//! for an engine that is wrong. So each rule can be broken, by a test and on its thread
//! alone; the test has to notice it. Outside tests [`kept`] is `true` at compile time.

/// What the engine does. The invariants are those of `docs/durability.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// I1, I2(a): a freed cluster is used again when the BAT on disk has lost it.
    RemovalBeforeReuse,
    /// I2(a): only a page that was written counts as a removal on disk.
    FailedPageRemovesNothing,
    /// I2: it is told which cluster lost its place before the page is marked, so that it
    /// is known which write of the page is without it.
    TellBeforeMark,
    /// I2(b): a freed cluster is punched when no older I/O can write to it.
    OldIoBeforePunch,
    /// I2(c): a freed cluster is used again as a hole.
    PunchBeforeReuse,
    /// I2(c): a freed cluster is used again when a sync has begun after its punch.
    SyncBeforeReuse,
    /// I3: a flush writes the BAT.
    FlushWritesBat,
    /// I3: the sync of a flush starts after it.
    FlushSyncIsNew,
    /// I3: a sync covers what had completed before its round.
    CountBeforeRound,
    /// I3: who relies on another's change marks the page for him.
    MarkForOthers,
    /// I3, I4, I6: an entry that waits is seen also while whoever published it has not
    /// come to marking its page.
    UnmarkedIsSeen,
    /// I3, I7: one page of a round that cannot be written fails the round.
    EveryPageCounts,
    /// I4: no sync makes entries count as on disk whose page could not be written.
    FailedPageIsNotOnDisk,
    /// I4: a write-through write waits for its mapping.
    WriteThroughMapping,
    /// I5: a failed write leaves the cluster that was mapped for it. Its place has
    /// nothing that could be left out: who drives the engine breaks it.
    #[cfg(test)]
    FailedWriteStaysMapped,
    /// I5: a read-modify-write waits for writes under way.
    OldIoBeforeModify,
    /// I5: a cluster that moves is copied when no older I/O can write to it.
    OldIoBeforeCopy,
    /// I6: a copy is mapped on disk when it is stable.
    CopyBeforeMapping,
    /// I7: a failed sync is remembered after it was reported.
    FailedSyncIsKept,
    /// I7: a sync counts only when of each stable write that had begun by its end it is
    /// known that its own sync has not failed.
    StableWritesHoldSync,
    /// I7: a page that could not be written stays dirty.
    FailedPageStaysDirty,
    /// I8: a cluster is mapped on disk when the length that covers it is stable.
    LengthBeforeMapping,
    /// I11: of a page one write is in flight at a time.
    OneWriteOfPage,
    /// I12: the in-use mark is stable before the file changes.
    MarkBeforeChange,
    /// I12: everything else is stable before the closed mark is written.
    SyncBeforeMark,
    /// I12: bitmaps are stable before the mark that says that they are there.
    BitmapsBeforeMark,
    /// I12: bitmaps that an image had are not valid any more once it is in use.
    BitmapsEndWithUse,
    /// A change is recorded in bitmaps before it is begun.
    ChangeIsRecorded,
    /// I6, I12: a cluster that has moved is mapped where it is now when it is stable there.
    MoveBeforeMapping,
    /// I12: no cluster is given out any more that lies where the larger BAT goes.
    NothingNewInTheWay,
    /// I12: copies that were begun to where the larger BAT goes end first.
    CopiesInTheWayEnd,
    /// I12: what lies where the larger BAT goes is not punched as a freed cluster.
    NoPunchInTheWay,
    /// I12: the BAT on disk tells of no cluster where the larger BAT goes when that is
    /// zeroed.
    MappingBeforeZeroing,
    /// I2, I12: nobody reads or writes where the larger BAT goes when that is zeroed.
    OldIoBeforeZeroing,
    /// I12: where the larger BAT goes there are zeros.
    ZerosBeforeSize,
    /// I12: they are stable before the header tells of them.
    StableBeforeSize,
    /// I12: what lies behind the end of the disk in its last cluster stays behind.
    EndIsCut,
    /// I12: the guest is told of a size that is stable.
    SizeBeforeUse,
    /// I2, I5: whether a cluster is zero is looked at when no older write is under way to it.
    OldIoBeforeZeroCheck,
    /// A cluster of zeros above lower levels stays, to hide what they have.
    ZerosHideBelow,
    /// I2, I5: where a cluster was before it moved to make the file shorter is given up when
    /// the disk knows where it is.
    MappingBeforeLeaving,
    /// I2, I8: the end of the file is cut off when nobody can have been given a cluster there.
    OldIoBeforeCut,
    /// I15: requests are held while the top is closed and a new one takes its place.
    HeldForNewTop,
    /// I3, I15: everything that completed is in the top, and stable, before it is closed.
    FlushBeforeNewTop,
    /// I12, I15: the closed mark of the top is stable before the new one is named.
    MarkBeforeNewTop,
    /// I15: nothing is written to the old top once there is a new one: what was to be freed
    /// there stays.
    OldTopIsLeftAlone,
    /// I12, I15: the new top is stable before it is named. Who drives the engine makes it.
    #[cfg(test)]
    NewTopBeforeName,
    /// I3, I15: the name of the new top is stable before it is used. As above.
    #[cfg(test)]
    NameBeforeUse,
    /// I12, I15: a top that is kept after all is marked as in use before it changes.
    MarkBeforeKeptTop,
    /// I13, I15: while the top is closed, the memory that outlives the process says that
    /// the disk has everything.
    SettledWhileClosed,
    /// I13, I15: from the first request to the new top on, that memory belongs to it.
    MemoryFollowsTop,
    /// I6, I15: a level that is to go is empty for all: copies of it have ended.
    CopiesEndBeforeDrop,
    /// I3, I15: copies of it are stable, mapping included, before the chain is without it.
    FlushBeforeDrop,
    /// I15: that the chain is without it is stable before its file goes. Who drives the
    /// engine sees to it.
    #[cfg(test)]
    NameBeforeFileGoes,
    /// I15: reads of it have ended before its file goes: a flush of all waits for them.
    ReadsEndBeforeFileGoes,
    /// I12, I15: a level that gets what another has is marked as in use before it changes.
    MarkBeforeLevelChanges,
    /// I6, I15: what a level gets from another is stable before its map tells of it.
    CopyBeforeLevelMaps,
    /// I15: its map is stable before the chain is without the other.
    LevelMapBeforeDrop,
    /// I13: the memory that outlives the process has room for the larger map.
    RoomOutlivesProcess,
    /// I13: a change of the map outlives the process.
    ChangeOutlivesProcess,
    /// I13: that a sync has failed outlives the process.
    FailureOutlivesProcess,
    /// I13: what only the memory maps is in use when it is taken over.
    TakenOverIsUsed,
}

/// Whether the rule is kept here: always.
#[cfg(not(test))]
pub(crate) const fn kept(_: Rule) -> bool {
    true
}

#[cfg(test)]
pub(crate) use broken::{broken, kept};

#[cfg(test)]
mod broken {
    use std::cell::Cell;

    use super::Rule;

    thread_local! {
        static BROKEN: Cell<Option<Rule>> = const { Cell::new(None) };
    }

    /// Whether the rule is kept here: unless a test of this thread has it broken.
    pub(crate) fn kept(rule: Rule) -> bool {
        BROKEN.get() != Some(rule)
    }

    /// Engines that this thread drives break the rule while `body` runs.
    pub(crate) fn broken<T>(rule: Rule, body: impl FnOnce() -> T) -> T {
        /// Also if `body` panics.
        struct Mended;
        impl Drop for Mended {
            fn drop(&mut self) {
                BROKEN.set(None);
            }
        }
        BROKEN.set(Some(rule));
        let _mended = Mended;
        body()
    }

    impl Rule {
        /// Every one but [`Self::OldIoBeforeCut`]: the moment in which that matters is so short that
        /// it has a test of its own (`tests/compact.rs`).
        #[cfg_attr(ploop_loom, allow(dead_code, reason = "the simulator breaks them all"))]
        pub(crate) const ALL: [Self; 61] = [
            Self::RemovalBeforeReuse,
            Self::FailedPageRemovesNothing,
            Self::TellBeforeMark,
            Self::OldIoBeforePunch,
            Self::PunchBeforeReuse,
            Self::SyncBeforeReuse,
            Self::FlushWritesBat,
            Self::FlushSyncIsNew,
            Self::CountBeforeRound,
            Self::MarkForOthers,
            Self::UnmarkedIsSeen,
            Self::EveryPageCounts,
            Self::FailedPageIsNotOnDisk,
            Self::WriteThroughMapping,
            Self::FailedWriteStaysMapped,
            Self::OldIoBeforeModify,
            Self::OldIoBeforeCopy,
            Self::CopyBeforeMapping,
            Self::FailedSyncIsKept,
            Self::StableWritesHoldSync,
            Self::FailedPageStaysDirty,
            Self::LengthBeforeMapping,
            Self::OneWriteOfPage,
            Self::MarkBeforeChange,
            Self::SyncBeforeMark,
            Self::BitmapsBeforeMark,
            Self::BitmapsEndWithUse,
            Self::ChangeIsRecorded,
            Self::MoveBeforeMapping,
            Self::NothingNewInTheWay,
            Self::CopiesInTheWayEnd,
            Self::NoPunchInTheWay,
            Self::MappingBeforeZeroing,
            Self::OldIoBeforeZeroing,
            Self::ZerosBeforeSize,
            Self::StableBeforeSize,
            Self::EndIsCut,
            Self::SizeBeforeUse,
            Self::OldIoBeforeZeroCheck,
            Self::ZerosHideBelow,
            Self::MappingBeforeLeaving,
            Self::HeldForNewTop,
            Self::FlushBeforeNewTop,
            Self::MarkBeforeNewTop,
            Self::OldTopIsLeftAlone,
            Self::NewTopBeforeName,
            Self::NameBeforeUse,
            Self::MarkBeforeKeptTop,
            Self::SettledWhileClosed,
            Self::MemoryFollowsTop,
            Self::CopiesEndBeforeDrop,
            Self::FlushBeforeDrop,
            Self::NameBeforeFileGoes,
            Self::ReadsEndBeforeFileGoes,
            Self::MarkBeforeLevelChanges,
            Self::CopyBeforeLevelMaps,
            Self::LevelMapBeforeDrop,
            Self::RoomOutlivesProcess,
            Self::ChangeOutlivesProcess,
            Self::FailureOutlivesProcess,
            Self::TakenOverIsUsed,
        ];
    }
}
