//! What tests and the simulator look at, and break.

use super::super::entry::Place;
#[cfg(not(ploop_loom))]
use super::super::remembered::Remembered;
use super::super::sync::atomic::Ordering;
use super::Engine;
use crate::format::GuestCluster;
#[cfg(not(ploop_loom))]
use crate::format::HostCluster;
use crate::storage::Disk;
#[cfg(not(ploop_loom))]
use crate::storage::SharedWords;

impl<D: Disk> Engine<D> {
    /// Whether the memory that outlives a process says that the disk has everything.
    #[cfg(not(ploop_loom))]
    pub(crate) fn is_settled_in(words: &SharedWords) -> bool {
        Remembered::is_settled_in(words)
    }

    /// Whether the simulated power is gone: nobody is left to drain anything.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Whether the cluster is mapped in the top delta, in memory.
    pub(crate) fn is_mapped_here(&self, cluster: GuestCluster) -> bool {
        matches!(self.bat.get(cluster).place(), Place::In(file, _) if file == self.top())
    }

    /// What is mapped in the top delta, in memory.
    #[cfg(not(ploop_loom))]
    pub(crate) fn mapped_here(&self) -> Vec<(u32, HostCluster)> {
        let entries = (0..).zip(self.bat.iter());
        let mapped = entries.filter_map(|(cluster, entry)| match entry.place() {
            Place::In(file, host) if file == self.top() => Some((cluster, host)),
            _ => None,
        });
        mapped.collect()
    }

    /// Whether a BAT entry points at a cluster that is not given out any more, as a larger
    /// BAT goes there.
    #[cfg(not(ploop_loom))]
    pub(crate) fn keeps_out(&self, value: u32) -> bool {
        let first = HostCluster(self.alloc().first());
        self.geometry()
            .host_cluster(value)
            .is_some_and(|host| host < first)
    }

    /// A cluster whose entry somebody has changed who has not come to marking its page.
    #[cfg(not(ploop_loom))]
    pub(crate) fn in_the_midst(&self) -> Option<GuestCluster> {
        let mut entries = (0..).map(GuestCluster).zip(self.bat.iter());
        let unmarked = entries.find(|(_, entry)| entry.is_unmarked());
        unmarked.map(|(cluster, _)| cluster)
    }

    /// Breaks [`Rule::FailedWriteStaysMapped`].
    #[cfg(not(ploop_loom))]
    pub(crate) fn unmap_after_failure(&self, cluster: GuestCluster) {
        let entry = self.bat.get(cluster);
        if let Place::In(file, host) = entry.place()
            && file == self.top()
            && self.has_bat()
        {
            self.unmap(cluster, entry, host);
        }
    }

    /// The simulated power is gone.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
    }
}
