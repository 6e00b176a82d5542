//! Rules that a test can have the engine break.
//!
//! A proof by simulated power cuts is worth something only if it fails for an
//! engine that is wrong. Each name here is one wrong engine; the test has to
//! notice it. Outside tests [`is`] is `false` at compile time.

/// What the engine shall do wrong. The invariants are those of
/// `docs/durability.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sabotage {
    /// I1, I2(a): a freed cluster is used again before the BAT on disk has lost it.
    ReuseBeforeRemoval,
    /// I2(b): a freed cluster is punched while older I/O may still write to it.
    PunchUnderOldIo,
    /// I2(c): a freed cluster is used again with what it held.
    ReuseUnpunched,
    /// I2(c): a freed cluster is used again before its hole is stable.
    ReuseUnsynced,
    /// I3: a flush does not write the BAT.
    FlushWithoutBat,
    /// I3: a flush shares a sync that was under way when it came.
    FlushSharesOldSync,
    /// I3: what completed during a sync counts as covered by it.
    FlushCoversTooMuch,
    /// I4: a write-through write does not wait for its mapping.
    WriteThroughTooEarly,
    /// I5: a failed write unmaps the cluster that was mapped for it.
    FailedWriteUnmaps,
    /// I5: a read-modify-write does not wait for writes under way.
    ModifyUnderOldIo,
    /// I6: a copy is mapped on disk before it is stable.
    MapUnstableCopy,
    /// I7: a failed sync is forgotten once it was reported.
    ForgetFailedSync,
    /// I7: a sync counts that ended after a stable write had failed, and before it was
    /// known whether it was its sync that lost something.
    SyncInDoubt,
    /// I7: a failed write of the BAT is forgotten.
    ForgetFailedPage,
    /// I8: a cluster is mapped on disk before the length that covers it is stable.
    MapBeyondLength,
    /// I11: a page is written again while a write of it is in flight.
    WritePageTwice,
    /// I12: the file changes before the in-use mark is stable.
    ChangeBeforeMark,
    /// I12: the closed mark is written before everything else is stable.
    MarkBeforeSync,
    /// I13: a change of the map dies with the process.
    ForgetChange,
    /// I13: that a sync has failed dies with the process.
    ForgetFailureAtDeath,
    /// I13: what only the memory maps counts as leaked when it is taken over.
    ReuseTakenOver,
}

#[cfg(test)]
impl Sabotage {
    /// Every one.
    pub(crate) const ALL: [Self; 21] = [
        Self::ReuseBeforeRemoval,
        Self::PunchUnderOldIo,
        Self::ReuseUnpunched,
        Self::ReuseUnsynced,
        Self::FlushWithoutBat,
        Self::FlushSharesOldSync,
        Self::FlushCoversTooMuch,
        Self::WriteThroughTooEarly,
        Self::FailedWriteUnmaps,
        Self::ModifyUnderOldIo,
        Self::MapUnstableCopy,
        Self::ForgetFailedSync,
        Self::SyncInDoubt,
        Self::ForgetFailedPage,
        Self::MapBeyondLength,
        Self::WritePageTwice,
        Self::ChangeBeforeMark,
        Self::MarkBeforeSync,
        Self::ForgetChange,
        Self::ForgetFailureAtDeath,
        Self::ReuseTakenOver,
    ];
}

#[cfg(test)]
thread_local! {
    static CURRENT: std::cell::Cell<Option<Sabotage>> = const { std::cell::Cell::new(None) };
}

/// Whether this is to be done wrong now.
#[cfg(test)]
pub(crate) fn is(which: Sabotage) -> bool {
    CURRENT.get() == Some(which)
}

/// Whether this is to be done wrong now: never.
#[cfg(not(test))]
pub(crate) const fn is(_: Sabotage) -> bool {
    false
}

/// Engines that this thread drives do this wrong while `body` runs.
#[cfg(test)]
pub(crate) fn with<T>(which: Sabotage, body: impl FnOnce() -> T) -> T {
    CURRENT.set(Some(which));
    let result = body();
    CURRENT.set(None);
    result
}
