//! How the map changes: what a write takes, who is told, and from when on a flush covers it.

use super::super::alloc::Extent;
use super::super::entry::{Entry, Place};
use super::super::preempt;
use super::super::rule::{self, Rule};
use super::super::sync::atomic::Ordering;
use super::{Engine, MdMessage};
use crate::format::{GuestCluster, HostCluster};
use crate::storage::{Disk, FileId, Segments};

/// What to do for a write inside one cluster.
pub(in crate::ploop) enum WritePlan {
    /// Write there. `on_disk`: the mapping is stable on disk already.
    At { offset: u64, on_disk: bool },
    /// Zeros into a hole: nothing. `on_disk`: the disk knows of the hole.
    Nothing { on_disk: bool },
    /// The cluster's runner has to do it.
    Runner,
    /// There is no space at hand.
    Space,
}

impl<D: Disk> Engine<D> {
    /// The entry of a cluster, for a request that relies on it: from then on a
    /// flush of the client covers the entry, even if whoever changed it has not
    /// come to marking its page dirty.
    pub(in crate::ploop) fn rely_on(&self, cluster: GuestCluster) -> Entry {
        let entry = self.bat.get(cluster);
        preempt::point("looked up");
        if entry.is_unmarked() && rule::kept(Rule::MarkForOthers) {
            self.note_change(cluster, entry);
            preempt::point("noted");
            self.mark_dirty(cluster);
        }
        entry
    }

    /// What a write inside a cluster takes. To be called, and carried out, inside
    /// an epoch. May map the cluster: then other threads see it at once, though
    /// nothing is written yet, as the new cluster reads as zeros (I2).
    pub(in crate::ploop) fn plan_write(
        &self,
        cluster: GuestCluster,
        offset: u32,
        data: &Segments,
    ) -> WritePlan {
        let (align, is_tracked) = self.tracking.terms();
        if is_tracked {
            let start = self.grid().cluster_start(cluster) + u64::from(offset);
            self.tracking.mark(start, data.len() as u64);
        }
        if (offset as usize | data.len()) & align as usize != 0 {
            return WritePlan::Runner;
        }
        loop {
            let entry = self.rely_on(cluster);
            if entry.is_locked() {
                return WritePlan::Runner;
            }
            let at = |file: FileId, host, on_disk: bool| {
                if !on_disk && self.is_write_through() {
                    // The write will wait for its mapping.
                    self.bat.mark_urgent(self.grid().md_page(cluster));
                }
                WritePlan::At {
                    offset: self.level(file).offset(host) + u64::from(offset),
                    on_disk,
                }
            };
            match entry.place() {
                Place::In(file, host) if file == self.top() => {
                    return at(file, host, !entry.is_changed());
                }
                Place::In(..) => return WritePlan::Runner,
                Place::Hole if data.is_zero() => {
                    return WritePlan::Nothing {
                        on_disk: !entry.is_changed(),
                    };
                }
                Place::Hole => {
                    let Some(host) = self.allocate() else {
                        return WritePlan::Space;
                    };
                    if self.change(cluster, entry, Entry::mapped(self.top(), host)) {
                        return at(self.top(), host, false);
                    }
                    self.put_back(host);
                }
            }
        }
    }

    /// A cluster that reads as zeros and is mapped nowhere.
    pub(in crate::ploop) fn allocate(&self) -> Option<HostCluster> {
        let host = self.take_cluster();
        preempt::point("allocated");
        let low = self.alloc().available() <= self.options.low_water;
        if low && !self.space_is_low.swap(true, Ordering::AcqRel) {
            self.md.waker().wake();
        }
        host
    }

    /// One of those that are there; whoever may take the last has [others](Self::allocate)
    /// made.
    pub(in crate::ploop) fn take_cluster(&self) -> Option<HostCluster> {
        let host = self.alloc().take()?;
        self.check_write_threshold(host);
        Some(host)
    }

    /// This cluster of the top's file is used from now on.
    pub(in crate::ploop) fn check_write_threshold(&self, host: HostCluster) {
        let end = self.grid().host_offset(host) + self.grid().cluster().bytes();
        self.options.write_threshold.check(end);
    }

    /// Whoever it was made for is told once when something behind this place in the file of
    /// the top is used, which a raw image always is; at once, if it is so already. 0 is none.
    pub fn set_write_threshold(&self, bytes: u64) {
        self.options.write_threshold.set(bytes);
        self.check_old_use();
    }

    /// Where that is; 0 if it is nowhere, or was told of.
    pub fn write_threshold(&self) -> u64 {
        self.options.write_threshold.bytes()
    }

    pub(super) fn check_old_use(&self) {
        if self.has_bat()
            && let Some(last) = self.alloc().used_end().checked_sub(1)
        {
            self.check_write_threshold(HostCluster(last));
        }
    }

    /// Gives back a cluster that was not written to.
    pub(in crate::ploop) fn put_back(&self, host: HostCluster) {
        self.alloc().put(Extent {
            start: host.0,
            end: host.0 + 1,
        });
    }

    /// The value of an entry in the BAT of the top.
    pub(in crate::ploop) fn bat_value(&self, entry: Entry) -> u32 {
        match entry.place() {
            Place::In(file, host) if file == self.top() => self.grid().bat_value(host),
            _ => 0,
        }
    }

    /// Whether the length of the top's file that covers the entry's cluster is stable
    /// (I8), if it is in the top at all.
    pub(in crate::ploop) fn is_length_stable(&self, entry: Entry) -> bool {
        match entry.place() {
            Place::In(file, host) if file == self.top() => self.alloc().is_length_stable(host),
            _ => true,
        }
    }

    /// Changes an entry and has its page written; false if it was not `from` any
    /// more.
    pub(in crate::ploop) fn change(&self, cluster: GuestCluster, from: Entry, to: Entry) -> bool {
        self.change_and_tell(cluster, from, to, None)
    }

    /// Maps a cluster that the caller has locked to where its data was copied; it is
    /// locked no more.
    pub(in crate::ploop) fn relocate(&self, cluster: GuestCluster, to: HostCluster) {
        let to = Entry::mapped(self.top(), to);
        // The metadata thread may note meanwhile what has become of the last change.
        while !self.change(cluster, self.bat.get(cluster), to) {}
    }

    /// Makes a cluster a hole. False if it was not `from` any more.
    pub(in crate::ploop) fn unmap(
        &self,
        cluster: GuestCluster,
        from: Entry,
        host: HostCluster,
    ) -> bool {
        let page = self.grid().md_page(cluster);
        let freed = MdMessage::Freed { host, page };
        self.change_and_tell(cluster, from, Entry::HOLE, Some(freed))
    }

    /// The message is posted before the page is marked dirty: so the write of the
    /// page that takes the mark is known to contain the change (see `MdWriter`).
    fn change_and_tell(
        &self,
        cluster: GuestCluster,
        from: Entry,
        to: Entry,
        message: Option<MdMessage>,
    ) -> bool {
        debug_assert!(self.has_bat(), "a raw image stays as it is");
        let to = to.changed().after(from);
        if self.bat.replace(cluster, from, to).is_err() {
            return false;
        }
        preempt::point("published");
        self.note_change(cluster, to);
        let tells_first = rule::kept(Rule::TellBeforeMark);
        if !tells_first {
            self.mark_dirty(cluster);
            preempt::point("marked");
        }
        if let Some(message) = message {
            self.md.post(message);
        }
        preempt::point("told");
        if tells_first {
            self.mark_dirty(cluster);
            preempt::point("marked");
        }
        // Unless it is another's change by now: that one's page is not marked.
        let _ = self.bat.replace(cluster, to, to.marked());
        true
    }

    pub(in crate::ploop) fn mark_dirty(&self, cluster: GuestCluster) {
        if self.bat.mark_dirty(self.grid().md_page(cluster)) {
            self.md.waker().wake();
        }
    }
}
