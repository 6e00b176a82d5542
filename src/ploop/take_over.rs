//! The begin of serving an image: with nothing but what the disk has, or with what a
//! process that was killed has left in [`Remembered`] memory.
//!
//! An image that was not closed may belong to a guest that lives on. Until it is
//! known whether it does, no cluster that the disk does not map may be punched or
//! given out again: it may hold what that guest was told is written. So an engine
//! that [`Options::awaits_take_over`](super::Options::awaits_take_over) leaves them
//! alone until [`Engine::begin`] or [`Engine::take_over`].
//!
//! What the memory says was in the hands of the front-end. It is checked as a BAT of a
//! file is, and against that of the file: if anything is wrong with it, nothing of it
//! is believed.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};

use thiserror::Error;

use super::EngineError;
use super::alloc::Extent;
use super::control::Control;
use super::engine::{Engine, MdMessage};
use super::entry::{Entry, Place};
use super::preempt;
use super::remembered::{Identity, Remembered};
use super::rule::{self, Rule};
use super::sync::atomic::Ordering;
use crate::format::{ClusterSet, Geometry, GuestCluster, HostCluster};
use crate::storage::opening::{NO_OPENING, new_opening};
use crate::storage::{Disk, FileId, SharedWords};

/// Why what a process has left cannot be taken over. The guest that it belongs to must
/// not go on: it was told of writes that are lost.
#[derive(Debug, Error)]
pub enum TakeOverError {
    /// There is nothing of ours in it.
    #[error("the memory that came back holds nothing of this program")]
    Foreign,
    /// It is about another disk.
    #[error("the memory that came back belongs to another image")]
    OtherImage,
    /// Somebody has opened the image for writing since, or it cannot be known.
    #[error("somebody else has opened the image for writing in the meantime")]
    Changed,
    /// The guest knows of a larger disk.
    #[error("the disk had {was} bytes when the guest was served last, and has {now} now")]
    Smaller {
        /// Its size then, in bytes.
        was: u64,
        /// And now.
        now: u64,
    },
    /// Requests may have been served without it.
    #[error("this process has served the image without the memory that came back")]
    Begun,
    /// What is in it would have to be written.
    #[error("the memory that came back is of use only to a process that may write")]
    ReadOnly,
    /// It cannot be true.
    #[error("the memory that came back is damaged: guest cluster {cluster} {what}")]
    Damaged {
        /// Of the guest's disk.
        cluster: u32,
        /// What is wrong with its entry.
        what: &'static str,
    },
    /// The memory cannot be read, or the image not be marked.
    #[error("cannot {what}")]
    Io {
        /// "read the memory that came back", say.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How far an engine has come.
pub(super) enum Beginning {
    /// Nothing may be used again yet.
    Awaited {
        /// The image was in use when it was opened.
        unclosed: bool,
        /// The name of that opening.
        opening: Option<u64>,
        /// Clusters that nothing on the disk maps.
        leaked: Vec<Extent>,
    },
    /// With this name of the opening, if one could be kept.
    Begun(Option<u64>),
}

/// What follows from memory that was found to be right.
struct Adoption {
    /// Entries that are not what the disk has.
    changed: Vec<(GuestCluster, Entry)>,
    /// Clusters that the disk maps for a guest cluster that has them no more.
    freed: Vec<(GuestCluster, HostCluster)>,
    /// Clusters that neither maps.
    leaked: Vec<Extent>,
    /// The cluster after the last one that the disk maps.
    mapped_end: HostCluster,
}

/// Memory in which an engine has remembered that has closed its image since. A guest may come
/// back with it, unless another one is served first.
pub struct LeftMemory(Arc<Remembered>);

impl LeftMemory {
    /// The image is open again, in this engine, and a guest is about to be served. Unless it
    /// is one that goes on with this memory, nobody may from now on: what had been under way
    /// would run over what is written now.
    pub fn strike_out_unless_of<D: Disk>(self, engine: &Engine<D>) {
        let now = engine.remembered.load();
        if !now.as_ref().is_some_and(|now| now.is_same(&self.0)) {
            self.0.disown();
            self.0.unsettle(false);
        }
    }
}

impl<D: Disk> Engine<D> {
    /// Bytes that [`Self::remember_in`] and [`Self::take_over`] need, a multiple of
    /// eight. Most of it is never touched.
    pub fn remembered_len(&self) -> u64 {
        self.identity().bytes()
    }

    fn identity(&self) -> Identity {
        self.identity_of(&self.geometry())
    }

    fn identity_of(&self, geometry: &Geometry) -> Identity {
        Identity {
            geometry: *geometry,
            levels: self.levels.len(),
            has_bat: self.has_bat(),
        }
    }

    /// Makes the memory that outlives the process, if there is any, as long as a disk of
    /// this geometry needs it.
    ///
    /// # Errors
    /// Any of `ftruncate(2)` and `mmap(2)`.
    pub(super) fn make_room(&self, geometry: &Geometry) -> io::Result<()> {
        let _geometry = self.lock_geometry();
        self.make_room_locked(geometry)
    }

    fn make_room_locked(&self, geometry: &Geometry) -> io::Result<()> {
        if let Some(remembered) = &*self.remembered.load() {
            let longer = remembered.longer(&self.identity_of(geometry))?;
            self.remembered.store(Some(Arc::new(longer)));
        }
        Ok(())
    }

    /// The disk is of this geometry now.
    pub(super) fn publish_size(&self, geometry: &Geometry) {
        let mut now = self.lock_geometry();
        // Memory may have come since room was made.
        if rule::kept(Rule::RoomOutlivesProcess)
            && let Err(error) = self.make_room_locked(geometry)
        {
            log::error!("a larger disk cannot be remembered: {error}");
        }
        *now = *geometry;
        // First: the guest hears of it afterwards.
        if let Some(remembered) = &*self.remembered.load() {
            remembered.set_size(geometry.disk_size.0);
        }
        self.tracking.reach(geometry.disk_size.bytes());
        self.set_disk_size(geometry.disk_size);
    }

    /// Whether the image was not closed, and nobody has said yet that no guest that
    /// lives on will come back for it.
    pub fn awaits_take_over(&self) -> bool {
        matches!(*self.beginning(), Beginning::Awaited { unclosed: true, .. })
    }

    /// Nobody will come back for what the disk does not have: clusters that it does not
    /// map may be used again. Does nothing the second time.
    pub fn begin(&self) {
        self.begin_at(&mut self.beginning());
    }

    fn begin_at(&self, beginning: &mut Beginning) -> Option<u64> {
        match beginning {
            Beginning::Begun(opening) => *opening,
            Beginning::Awaited { leaked, .. } => {
                let leaked = std::mem::take(leaked);
                let opening = self.name_opening();
                *beginning = Beginning::Begun(opening);
                self.md.post(MdMessage::Begin {
                    freed: Vec::new(),
                    moved: Vec::new(),
                    leaked,
                });
                opening
            }
        }
    }

    fn beginning(&self) -> MutexGuard<'_, Beginning> {
        self.beginning
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins, or gives the opening another name: memory that was given to us before
    /// gets old from now on, and must not be taken over.
    fn rename(&self, beginning: &mut Beginning) -> Option<u64> {
        if self.is_switching() {
            // The top is closed, and the new one gets its name when it is there.
            return None;
        }
        if let Beginning::Begun(opening) = beginning {
            *opening = self.name_opening();
        }
        self.begin_at(beginning)
    }

    /// Gives the present opening of the image a name, if that can be kept. A read-only
    /// one changes nothing that could be taken over.
    fn name_opening(&self) -> Option<u64> {
        if self.is_read_only() {
            return None;
        }
        let name = new_opening();
        let Err(error) = self.disk.set_opening(self.top(), name) else {
            return Some(name);
        };
        match self.disk.opening(self.top()) {
            Ok(None | Some(NO_OPENING)) => log::info!(
                "the opening cannot be noted with the image ({error}): a guest cannot carry on \
                 if this process is killed"
            ),
            _ => log::error!(
                "the opening cannot be noted with the image ({error}), which may have the \
                 name of another: a guest cannot live on if this process is killed, and one of a \
                 process that was killed before must be stopped, as the next process would \
                 not refuse it"
            ),
        }
        None
    }

    /// A sync has failed: before anybody has come, it was the only one to say what became of
    /// the writes of a process that was killed.
    pub(super) fn refuse_whoever_is_awaited(&self) {
        if let Beginning::Awaited { opening, .. } = &mut *self.beginning() {
            *opening = None;
            refuse_take_over(&self.disk, self.top());
        }
    }

    /// The image is closed: nobody will have to take over from this opening.
    pub(super) fn forget_opening(&self) {
        if let Beginning::Begun(Some(_)) = *self.beginning() {
            // Else the next opening waits for somebody who does not come.
            let _ = self.disk.set_opening(self.top(), NO_OPENING);
        }
    }

    /// From now on what the disk does not know is in `words` as well, of
    /// [`Self::remembered_len`]; what was in it is forgotten. It is made longer if the disk
    /// has grown since. Begins, if nobody has. To be called while no request is under way.
    ///
    /// # Errors
    /// When the memory cannot be made long enough, or cannot be cleared.
    pub fn remember_in(&self, words: SharedWords) -> io::Result<()> {
        let mut beginning = self.beginning();
        // Without a name nobody can take it over.
        let opening = self.rename(&mut beginning).unwrap_or(NO_OPENING);
        let geometry = self.lock_geometry();
        let identity = self.identity_of(&geometry);
        // The disk may have grown since whoever mapped it was told how long it has to be.
        let words = match words.len() < identity.words() {
            true => words.with_len(identity.words())?,
            false => words,
        };
        let remembered = Remembered::new(words, &identity, opening)?;
        if self.is_switching() {
            remembered.set_settled();
        }
        self.remember(Arc::new(remembered));
        Ok(())
    }

    fn remember(&self, remembered: Arc<Remembered>) {
        remembered.set_size(self.disk_size().0);
        if self.is_read_only() {
            remembered.set_read_only();
        }
        // First: whoever changes an entry from now on notes it there.
        self.remembered.store(Some(remembered.clone()));
        for (cluster, entry) in (0..).map(GuestCluster).zip(self.bat.iter()) {
            if entry.is_changed() {
                remembered.note(cluster, entry);
            }
        }
        if self.has_sync_failed() {
            remembered.set_sync_failed();
        }
        self.note_unstable_in_doubt();
    }

    /// The entry of a cluster has changed, which has to outlive the process before
    /// anybody who relies on it is told of an end (I13).
    pub(super) fn note_change(&self, cluster: GuestCluster, entry: Entry) {
        if let Some(remembered) = &*self.remembered.load()
            && rule::kept(Rule::ChangeOutlivesProcess)
        {
            remembered.note(cluster, entry);
        }
    }

    /// A sync has failed, likewise.
    pub(super) fn note_failed_sync(&self) {
        if let Some(remembered) = &*self.remembered.load()
            && rule::kept(Rule::FailureOutlivesProcess)
        {
            remembered.set_sync_failed();
        }
    }

    /// A stable write has failed, perhaps in its sync, or it is known what has failed.
    pub(super) fn note_doubt(&self, is_open: bool) {
        if let Some(remembered) = &*self.remembered.load() {
            remembered.doubt(is_open);
        }
    }

    /// The lock on the image may be lost, with what is not stable, or is known to be there.
    pub(super) fn note_lock_doubt(&self, is_open: bool) {
        if let Some(remembered) = &*self.remembered.load() {
            match is_open && rule::kept(Rule::FailureOutlivesProcess) {
                true => remembered.doubt_lock(),
                false => remembered.trust_lock(),
            }
        }
    }

    /// The disk has everything, and nothing changes any more.
    pub(super) fn note_settled(&self) {
        if let Some(remembered) = &*self.remembered.load() {
            remembered.set_settled();
        }
    }

    /// Nothing is remembered any more: the memory goes away, and whoever comes back with it
    /// nevertheless is refused, as others may have been served meanwhile. What only memory
    /// knows is lost then if the process is killed, so [`Self::settle`] comes before.
    pub fn forget(&self) {
        if let Some(remembered) = self.remembered.swap(None) {
            remembered.disown();
        }
    }

    /// The memory in which this engine, whose image is closed, has remembered: nothing is
    /// remembered any more.
    pub fn leave_memory(&self) -> Option<LeftMemory> {
        self.remembered.swap(None).map(LeftMemory)
    }

    /// Makes everything that completed before stable, mapping included: then there is
    /// nothing to be remembered. Blocks.
    ///
    /// # Errors
    /// What went wrong with that flush.
    pub fn settle(&self) -> Result<(), EngineError> {
        self.control(Control::Barrier).wait()
    }

    /// A word that outlives the process like the map does, for whoever uses the engine;
    /// zero at first.
    pub fn set_note(&self, note: u64) {
        if let Some(remembered) = &*self.remembered.load() {
            remembered.set_note(note);
        }
    }

    /// The word of [`Self::set_note`], which another process may have set. The
    /// front-end can set it, too.
    pub fn note(&self) -> Option<u64> {
        let remembered = self.remembered.load();
        remembered
            .as_ref()
            .map(|remembered| remembered.note_of_user())
    }

    /// Takes over from a process that was killed, or has closed the image, and goes on
    /// remembering in the same memory. To be called before any request.
    ///
    /// Nobody knows any more which copies, and which part of the file's length, that
    /// process had made stable before it would have mapped them on disk (I6, I8). All of
    /// it is: the in-use mark was synced when the image was opened, after its end.
    /// Nothing but `words` is used, or changed, if it fails; another attempt,
    /// or [`Self::begin`], may follow.
    ///
    /// # Errors
    /// See [`TakeOverError`].
    pub fn take_over(&self, words: SharedWords) -> Result<(), TakeOverError> {
        if let Some(present) = &*self.remembered.load()
            && present.is_in(&words)
        {
            // This very process was never gone.
            return Ok(());
        }
        let size = self.require_size(&words);
        let found = match words.map_again() {
            Ok(again) => match Remembered::found(words, &self.identity()) {
                Err(TakeOverError::OtherImage) if Remembered::is_settled_in(&again) => {
                    size?;
                    return self.take_over_changed(again);
                }
                found => found?,
            },
            Err(source) => {
                return Err(TakeOverError::Io {
                    what: "map the memory that came back",
                    source,
                });
            }
        };
        // Another process without a name of its opening may have known what the disk does not
        // have.
        let is_unneeded = self.is_read_only() && found.is_read_only();
        let mut beginning = self.beginning();
        if found.is_settled() || is_unneeded {
            size?;
            return self.take_over_settled(found, &mut beginning);
        }
        if self.is_read_only() {
            return Err(TakeOverError::ReadOnly);
        }
        let Beginning::Awaited {
            unclosed, opening, ..
        } = *beginning
        else {
            return Err(TakeOverError::Begun);
        };
        if !unclosed || opening.is_none_or(|opening| opening != found.opening()) {
            return Err(TakeOverError::Changed);
        }
        let adoption = self.adopt(&found)?;
        if found.has_sync_failed() {
            // Also what was only in doubt.
            found.set_sync_failed();
            self.set_sync_failed("a sync of the process that served the image before");
        }
        log::info!(
            "took over from a process that was killed: {} changes of the mapping that were not on \
             the disk",
            adoption.changed.len()
        );
        if self.has_sync_failed() {
            // One that has failed before this.
            found.set_sync_failed();
        }
        found.set_size(self.disk_size().0);
        self.remembered.store(Some(Arc::new(found)));
        *beginning = Beginning::Begun(opening);
        self.apply(adoption);
        Ok(())
    }

    /// Goes on with memory in which this process has remembered, after it has closed the
    /// image and opened it again. Another process may have had both meanwhile, and be dead
    /// now: it has served nobody, so whatever it has left in the memory, the disk has
    /// everything. To be called before any request.
    ///
    /// # Errors
    /// [`TakeOverError::Io`].
    pub fn take_back(&self, words: SharedWords) -> Result<(), TakeOverError> {
        self.require_size(&words)?;
        let again = words.map_again().map_err(|source| TakeOverError::Io {
            what: "map the memory that came back",
            source,
        })?;
        match Remembered::found(words, &self.identity()) {
            Ok(found) => {
                // For the next process, if this one is killed before it has a new name.
                found.set_settled();
                self.take_over_settled(found, &mut self.beginning())
            }
            Err(_) => self.take_over_changed(again),
        }
    }

    /// A front-end that connects again does not ask for the size, so the guest would find an end
    /// where it knows of none.
    fn require_size(&self, words: &SharedWords) -> Result<(), TakeOverError> {
        let (was, now) = (Remembered::size_in(words), self.disk_size());
        match was > now.0 {
            true => Err(TakeOverError::Smaller {
                was: was.saturating_mul(crate::format::SECTOR_SIZE),
                now: now.bytes(),
            }),
            false => Ok(()),
        }
    }

    /// The process that left the memory had flushed everything, and the image was given
    /// another shape since, by a snapshot say.
    fn take_over_changed(&self, words: SharedWords) -> Result<(), TakeOverError> {
        let note = Remembered::note_in(&words);
        self.remember_in(words)
            .map_err(|source| TakeOverError::Io {
                what: "go on with the memory that came back",
                source,
            })?;
        self.set_note(note);
        Ok(())
    }

    /// The process that left the memory had flushed everything: there is nothing in it.
    fn take_over_settled(
        &self,
        found: Remembered,
        beginning: &mut Beginning,
    ) -> Result<(), TakeOverError> {
        let opening = self.rename(beginning).unwrap_or(NO_OPENING);
        // No size becomes known until it is remembered in there.
        let geometry = self.lock_geometry();
        let found = self.in_full(found, &geometry)?;
        found.renew(opening).map_err(|source| TakeOverError::Io {
            what: "clear the memory that came back",
            source,
        })?;
        let found = Arc::new(found);
        // Last: a process that is killed before has changed nothing.
        if !self.is_switching() {
            found.unsettle(false);
        }
        self.remember(found);
        Ok(())
    }

    fn is_switching(&self) -> bool {
        self.switching.load(Ordering::Acquire)
    }

    /// The disk has everything, requests are held, and the top is about to be closed. Until
    /// [`Self::end_switch`] the memory that outlives the process says so.
    pub(super) fn begin_switch(&self) {
        let _beginning = self.beginning();
        self.switching.store(true, Ordering::Release);
        if rule::kept(Rule::SettledWhileClosed) {
            self.note_settled();
        }
    }

    /// There is a new top, or the old one is in use again, and requests are about to be taken:
    /// the memory that outlives the process belongs to that from now on. It has nothing to
    /// remember.
    pub(super) fn end_switch(&self) {
        let mut beginning = self.beginning();
        if self.has_lost_lock() {
            self.unsettle_after_loss();
            return self.switching.store(false, Ordering::Release);
        }
        let opening = self.name_opening();
        *beginning = Beginning::Begun(opening);
        preempt::point("named");
        if rule::kept(Rule::MemoryFollowsTop)
            && let Some(remembered) = &*self.remembered.load()
            && let Err(error) = self.rebind(remembered, opening.unwrap_or(NO_OPENING))
        {
            log::error!(
                "the memory that outlives this process cannot be used for the new top: {error}; \
                 the guest cannot live on if this process is killed"
            );
            remembered.disown();
            remembered.unsettle(false);
            self.remembered.store(None);
        }
        self.switching.store(false, Ordering::Release);
    }

    /// The lock was lost before the image was closed. The disk has everything, but others may have
    /// it by now: whoever goes on with the memory has to find the name of this opening, which
    /// stays, and the mark, as after a kill.
    pub(super) fn unsettle_after_loss(&self) {
        if let Some(remembered) = &*self.remembered.load() {
            remembered.unsettle(!self.is_covered());
        }
    }

    fn rebind(&self, remembered: &Remembered, opening: u64) -> io::Result<()> {
        let identity = self.identity_of(&self.lock_geometry());
        let remembered = Arc::new(remembered.longer(&identity)?);
        remembered.renew(opening)?;
        preempt::point("renewed");
        // Last: until here it says that the disk has everything.
        remembered.unsettle(self.has_sync_failed());
        self.remembered.store(Some(remembered));
        Ok(())
    }

    /// The same memory, as long as a disk of this geometry needs it.
    fn in_full(&self, found: Remembered, now: &Geometry) -> Result<Remembered, TakeOverError> {
        let identity = self.identity_of(now);
        if found.has_room_for(&identity) {
            return Ok(found);
        }
        found.longer(&identity).map_err(|source| TakeOverError::Io {
            what: "make the memory that came back longer",
            source,
        })
    }

    /// What the memory adds to what the disk has; `Err` if it cannot be true.
    fn adopt(&self, found: &Remembered) -> Result<Adoption, TakeOverError> {
        let entries = found.entries().map_err(|source| TakeOverError::Io {
            what: "read the memory that came back",
            source,
        })?;
        let top = self.top();
        let first = self.geometry().first_host_cluster();
        let end = u64::from(self.alloc().end());
        let mut mapped = ClusterSet::new(end);
        let mut on_disk = ClusterSet::new(end);
        let mut changed = Vec::new();
        let mut freed = Vec::new();
        let mut remembered = entries.into_iter().peekable();
        for (cluster, entry) in (0..).map(GuestCluster).zip(self.bat.iter()) {
            let damaged = |what| TakeOverError::Damaged {
                cluster: cluster.0,
                what,
            };
            let disk_host = in_file(entry, top);
            if let Some(host) = disk_host {
                on_disk.insert(host);
            }
            let mut now = entry;
            if let Some((_, news)) = remembered.next_if(|(at, _)| *at == cluster) {
                let news = news.ok_or_else(|| damaged("has no entry of ours"))?;
                if matches!(news.place(), Place::In(file, _) if file < top) {
                    return Err(damaged("is mapped in a lower delta"));
                }
                // Only the top changes, and it had a higher number when there were more levels.
                now = news.in_file(top);
                self.check_adopted(now, entry).map_err(damaged)?;
                if let Some(host) = disk_host.filter(|host| in_file(now, top) != Some(*host)) {
                    freed.push((cluster, host));
                }
                // Also one that is what the disk has: the number of its change counts.
                changed.push((cluster, now));
            }
            if let Some(host) = in_file(now, top) {
                if host < first || u64::from(host.0) >= end {
                    return Err(damaged("is mapped outside of the file"));
                }
                if !mapped.insert(host) {
                    return Err(damaged("is mapped to a cluster that another one has"));
                }
            }
        }
        if let Some((cluster, _)) = freed.iter().find(|(_, host)| mapped.contains(*host)) {
            return Err(TakeOverError::Damaged {
                cluster: cluster.0,
                what: "has lost a cluster that another one has before the disk knows",
            });
        }
        let mapped_end = on_disk.end().max(first);
        let mut used = on_disk;
        for (_, entry) in &changed {
            let host = in_file(*entry, top);
            if let Some(host) = host.filter(|_| rule::kept(Rule::TakenOverIsUsed)) {
                used.insert(host);
            }
        }
        let leaked = used.gaps(first).map(|gap| Extent {
            start: gap.start.0,
            end: gap.end.0,
        });
        Ok(Adoption {
            mapped_end,
            leaked: leaked.collect(),
            changed,
            freed,
        })
    }

    /// Whether an entry can have become this one.
    fn check_adopted(&self, now: Entry, on_disk: Entry) -> Result<(), &'static str> {
        match (now.place(), on_disk.place()) {
            (Place::Hole, Place::In(..)) if !self.can_unmap() => {
                Err("is a hole, and a lower delta has it")
            }
            _ => Ok(()),
        }
    }

    /// Before any other thread looks.
    fn apply(&self, adoption: Adoption) {
        let failed = self.has_sync_failed();
        if failed {
            // What the disk maps, the file has for sure (I8).
            self.alloc().doubt_length(adoption.mapped_end);
        }
        let may_be_copy = self.levels.len() > 1;
        let mut pages = BTreeSet::new();
        for (cluster, entry) in adoption.changed {
            let is_on_disk = self.bat.get(cluster).place() == entry.place();
            let entry = match (is_on_disk, failed) {
                (true, false) => entry.on_disk(),
                (false, true) if may_be_copy => entry.unstable(),
                _ => entry,
            };
            self.bat.load(cluster, entry);
            if entry.is_changed() {
                pages.insert(self.grid().md_page(cluster));
            }
        }
        self.uncover();
        // What is mapped elsewhere may have been moved there, and not been discarded: until
        // the disk has the new entry, a power cut brings back the old one with its data.
        let (freed, moved): (Vec<_>, Vec<_>) = adoption
            .freed
            .into_iter()
            .partition(|(cluster, _)| self.bat.get(*cluster).place() == Place::Hole);
        let freed = freed.into_iter();
        let freed = freed.map(|(cluster, host)| (self.grid().md_page(cluster), host));
        // Before the marks, as with every change.
        self.md.post(MdMessage::Begin {
            freed: freed.collect(),
            moved,
            leaked: adoption.leaked,
        });
        for page in pages {
            self.bat.mark_dirty(page);
        }
        self.md.waker().wake();
    }
}

/// What the process that had the image before has left must not be taken over, by any process
/// that opens the image from now on: writes that its guest was told of may be lost.
pub(super) fn refuse_take_over(disk: &impl Disk, top: FileId) {
    if matches!(disk.opening(top), Ok(None | Some(NO_OPENING))) {
        // Nobody can come back for it.
        return;
    }
    // Not the name of no opening: for a raw image that would be a good end.
    match disk.set_opening(top, new_opening()) {
        Ok(()) => log::error!(
            "a sync has failed, so writes of a process that was killed may be lost: a guest of \
             it that lives on will be refused"
        ),
        Err(error) => log::error!(
            "a sync has failed, so writes of a process that was killed may be lost, and that \
             cannot be noted with the image ({error}): a guest of it that lives on must be \
             stopped, as the next process would not refuse it"
        ),
    }
}

/// The cluster of the top that an entry maps.
fn in_file(entry: Entry, top: FileId) -> Option<HostCluster> {
    match entry.place() {
        Place::In(file, host) if file == top => Some(host),
        _ => None,
    }
}
