//! What the engine knows and the disk does not, in memory that outlives the process.
//!
//! A request that has completed may rely on entries of the map that no page write
//! contains yet, and nothing becomes stable any more after a failed sync. A guest
//! that lives on when its back-end is killed was told of the one and must not be
//! spared the other (I13). So both are in [`SharedWords`] as well, before anything
//! that depends on them completes: a store for each change of an entry, nothing for
//! what changes none.
//!
//! A word for each guest cluster: zero, or the last change of its entry since the
//! memory was given to us. Threads may come with their changes in another order than
//! they made them; the number of the change decides. Entries that have reached the
//! disk stay: there they say what the disk says.
//!
//! Knows the layout of the memory. What is found in it was in the hands of the
//! front-end, so it is believed only after a check, see [`super::take_over`].

use std::io;
use std::sync::atomic::Ordering;

use super::entry::Entry;
use super::take_over::TakeOverError;
use crate::format::{Geometry, GuestCluster};
use crate::storage::SharedWords;
use crate::storage::opening::NO_OPENING;

const MAGIC: u64 = u64::from_be_bytes(*b"ploopmem");
const VERSION: u64 = 1;

// Words of the head.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_ENTRIES: usize = 2;
const AT_CLUSTER: usize = 3;
const AT_DATA_START: usize = 4;
const AT_LEVELS: usize = 5;
/// The name of the opening of the image that it belongs to, see
/// [`crate::storage::Disk::opening`].
const AT_OPENING: usize = 6;
const AT_FLAGS: usize = 7;
/// Of whoever uses the engine: see [`super::Engine::set_note`].
const AT_NOTE: usize = 8;
/// Stable writes that have failed, of which it is not known yet whether it was the
/// write or the sync.
const AT_DOUBTS: usize = 9;
/// The size of the disk that the guest may know, in sectors.
const AT_SIZE: usize = 10;
/// The first entry.
const AT_FIRST: usize = 512;

/// A sync has failed: nothing becomes stable any more.
const SYNC_FAILED: u64 = 1;
/// The disk has everything: the image was flushed and about to be closed. It still has if a sync
/// fails later, before something else is written for the guest.
const SETTLED: u64 = 2;
/// The process served the image read-only, so there is nothing that the disk does not have.
const READ_ONLY: u64 = 4;
/// It is in doubt whether the lock on the image is lost, and with it what is not stable; or a
/// sync has failed that nobody is told of before that is known.
const LOCK_DOUBTED: u64 = 8;

/// What the memory must agree with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    /// Of the top.
    pub geometry: Geometry,
    pub levels: usize,
    /// Whether the top has a BAT: else there are no entries to remember.
    pub has_bat: bool,
}

impl Identity {
    fn entries(&self) -> u32 {
        if self.has_bat {
            self.geometry.entries
        } else {
            0
        }
    }

    /// How many words that takes.
    pub fn words(&self) -> usize {
        AT_FIRST + self.entries() as usize
    }

    /// How many bytes that are.
    pub fn bytes(&self) -> u64 {
        (self.words() * size_of::<u64>()) as u64
    }

    /// Whether memory with this head is of the same image. A disk that grows may have been
    /// cut off between its header and this, and levels below the top may have gone since: it
    /// is the name of the opening that tells one top from another.
    fn is_that_of(&self, head: impl Fn(usize) -> u64) -> bool {
        let cluster = self.geometry.cluster.bytes();
        head(AT_CLUSTER) == cluster
            && (head(AT_ENTRIES) == 0) == (self.entries() == 0)
            && head(AT_DATA_START) % cluster == self.geometry.data_start % cluster
    }

    fn head(&self) -> [(usize, u64); 4] {
        [
            (AT_ENTRIES, u64::from(self.entries())),
            (AT_CLUSTER, self.geometry.cluster.bytes()),
            (AT_DATA_START, self.geometry.data_start),
            (AT_LEVELS, self.levels as u64),
        ]
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Remembered {
    words: SharedWords,
    entries: u32,
}

impl Remembered {
    /// Memory with nothing in it yet: whatever was there is forgotten.
    pub fn new(words: SharedWords, identity: &Identity, opening: u64) -> io::Result<Self> {
        if words.len() < identity.words() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the memory is too small for the map of the disk",
            ));
        }
        // The magic goes first and comes last.
        words.clear_from(0)?;
        let remembered = Self {
            words,
            entries: identity.entries(),
        };
        remembered.set_head(identity);
        remembered.set(AT_VERSION, VERSION);
        remembered.set(AT_OPENING, opening);
        remembered.set(AT_MAGIC, MAGIC);
        Ok(remembered)
    }

    /// Memory that another process has left; its head says that it is of this image.
    /// What else is in it is not checked.
    pub fn found(words: SharedWords, identity: &Identity) -> Result<Self, TakeOverError> {
        let remembered = Self {
            words,
            entries: identity.entries(),
        };
        let is_ours = remembered.get(AT_MAGIC) == MAGIC && remembered.get(AT_VERSION) == VERSION;
        if !is_ours {
            return Err(TakeOverError::Foreign);
        }
        let fits = identity.is_that_of(|at| remembered.get(at));
        if !fits || remembered.words.len() < identity.words() {
            return Err(TakeOverError::OtherImage);
        }
        remembered.set_head(identity);
        Ok(remembered)
    }

    /// Whether it has room for the map of this image, and knows that it is of it.
    pub fn has_room_for(&self, identity: &Identity) -> bool {
        self.entries == identity.entries() && self.words.len() >= identity.words()
    }

    /// The same memory with room for the map of this image, which has grown.
    ///
    /// # Errors
    /// Any of `ftruncate(2)` and `mmap(2)`.
    pub fn longer(&self, identity: &Identity) -> io::Result<Self> {
        let remembered = Self {
            words: self.words.with_len(identity.words())?,
            entries: identity.entries(),
        };
        remembered.set_head(identity);
        Ok(remembered)
    }

    fn set_head(&self, identity: &Identity) {
        for (at, value) in identity.head() {
            self.set(at, value);
        }
    }

    /// Whether memory is of ours, and the process that left it had flushed everything,
    /// whatever the image was like then.
    pub fn is_settled_in(words: &SharedWords) -> bool {
        let get = |index| {
            words
                .word(index)
                .map_or(0, |word| word.load(Ordering::Acquire))
        };
        get(AT_MAGIC) == MAGIC && get(AT_VERSION) == VERSION && get(AT_FLAGS) & SETTLED != 0
    }

    /// The size of the disk in such memory, in sectors; zero if it is not known.
    pub fn size_in(words: &SharedWords) -> u64 {
        words
            .word(AT_SIZE)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// The guest may know from now on that the disk has this size, in sectors.
    pub fn set_size(&self, sectors: u64) {
        self.set(AT_SIZE, sectors);
    }

    /// The note of such memory.
    pub fn note_in(words: &SharedWords) -> u64 {
        words
            .word(AT_NOTE)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Whether it is this memory.
    pub fn is_in(&self, words: &SharedWords) -> bool {
        self.words.is_same(words)
    }

    /// Whether it is the same memory as this.
    pub fn is_same(&self, other: &Self) -> bool {
        self.words.is_same(&other.words)
    }

    /// The name of the opening of the image that it belongs to.
    pub fn opening(&self) -> u64 {
        self.get(AT_OPENING)
    }

    /// The entry has changed. Of two changes of a cluster the later one stays,
    /// whichever comes first.
    pub fn note(&self, cluster: GuestCluster, entry: Entry) {
        let Some(word) = self.words.word(AT_FIRST + cluster.0 as usize) else {
            return self.lack_room(cluster);
        };
        let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
            let is_news = Entry::from_remembered(bits).is_none_or(|old| old.is_older_than(entry));
            is_news.then_some(entry.remembered())
        });
    }

    /// It belongs to no opening any more: nobody takes over with it. Gives back to which it
    /// has belonged.
    pub fn disown(&self) -> u64 {
        let opening = self.words.word(AT_OPENING);
        opening.map_or(NO_OPENING, |word| word.swap(NO_OPENING, Ordering::AcqRel))
    }

    /// There is no room for a change: nobody may take over without it.
    fn lack_room(&self, cluster: GuestCluster) {
        if self.disown() != NO_OPENING {
            log::error!(
                "the memory that outlives this process has no room for guest cluster {}: the \
                 guest cannot carry on if this process is killed",
                cluster.0
            );
        }
    }

    /// What is remembered of single entries, in order. What is no entry has `None`.
    pub fn entries(&self) -> io::Result<Vec<(GuestCluster, Option<Entry>)>> {
        let end = AT_FIRST + self.entries as usize;
        let mut entries = Vec::new();
        for run in self.words.data()? {
            for index in run.start.max(AT_FIRST)..run.end.min(end) {
                let bits = self.get(index);
                if bits != 0 {
                    let cluster = GuestCluster((index - AT_FIRST) as u32);
                    entries.push((cluster, Entry::from_remembered(bits)));
                }
            }
        }
        Ok(entries)
    }

    /// Everything but the note is forgotten; from now on it belongs to this opening.
    /// It stays settled, if it is, until [`Self::unsettle`].
    pub fn renew(&self, opening: u64) -> io::Result<()> {
        self.words.clear_from(AT_FIRST)?;
        self.set(AT_OPENING, opening);
        Ok(())
    }

    /// There may be changes again that the disk does not have; a sync may have failed.
    pub fn unsettle(&self, has_sync_failed: bool) {
        self.set(AT_FLAGS, if has_sync_failed { SYNC_FAILED } else { 0 });
    }

    /// A sync has failed.
    pub fn set_sync_failed(&self) {
        self.raise(SYNC_FAILED);
    }

    /// Whether a sync has failed, for all that is known.
    pub fn has_sync_failed(&self) -> bool {
        self.get(AT_FLAGS) & (SYNC_FAILED | LOCK_DOUBTED) != 0 || self.get(AT_DOUBTS) != 0
    }

    /// A stable write has failed; or, after a doubt, it is known what that was.
    pub fn doubt(&self, more: bool) {
        if let Some(word) = self.words.word(AT_DOUBTS) {
            let step = if more { 1 } else { u64::MAX };
            word.fetch_add(step, Ordering::AcqRel);
        }
    }

    /// The lock on the image may be lost, with what is not stable.
    pub fn doubt_lock(&self) {
        self.raise(LOCK_DOUBTED);
    }

    /// It is there, and whoever had to be told of a failed sync has been.
    pub fn trust_lock(&self) {
        if let Some(word) = self.words.word(AT_FLAGS) {
            word.fetch_and(!LOCK_DOUBTED, Ordering::AcqRel);
        }
    }

    /// The disk has everything, and nothing changes any more.
    pub fn set_settled(&self) {
        self.raise(SETTLED);
    }

    pub fn is_settled(&self) -> bool {
        self.get(AT_FLAGS) & SETTLED != 0
    }

    /// Nothing changes as long as this process remembers in it.
    pub fn set_read_only(&self) {
        self.raise(READ_ONLY);
    }

    pub fn is_read_only(&self) -> bool {
        self.get(AT_FLAGS) & READ_ONLY != 0
    }

    pub fn set_note(&self, note: u64) {
        self.set(AT_NOTE, note);
    }

    pub fn note_of_user(&self) -> u64 {
        self.get(AT_NOTE)
    }

    fn raise(&self, flag: u64) {
        if let Some(word) = self.words.word(AT_FLAGS) {
            word.fetch_or(flag, Ordering::AcqRel);
        }
    }

    fn get(&self, index: usize) -> u64 {
        let word = self.words.word(index);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn set(&self, index: usize, value: u64) {
        if let Some(word) = self.words.word(index) {
            word.store(value, Ordering::Release);
        }
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;
    use crate::format::{ClusterSize, Header, HostCluster, Sector};
    use crate::storage::FileId;

    fn identity() -> Identity {
        let cluster = ClusterSize::MIN;
        let header = Header::new(Sector(4 * cluster.bytes() / 512), cluster).unwrap();
        Identity {
            geometry: *header.geometry(),
            levels: 1,
            has_bat: true,
        }
    }

    #[test]
    fn memory_that_lacks_a_change_belongs_to_no_opening() {
        let identity = identity();
        let words = SharedWords::new(identity.words()).unwrap();
        let remembered = Remembered::new(words, &identity, 7).unwrap();
        let entry = Entry::mapped(FileId(0), HostCluster(7)).changed();
        remembered.note(GuestCluster(identity.entries() - 1), entry);
        assert_eq!(remembered.opening(), 7);
        let beyond = remembered.words.len() - AT_FIRST;
        remembered.note(GuestCluster(beyond as u32), entry);
        assert_eq!(remembered.opening(), NO_OPENING);
    }

    #[test]
    fn memory_that_is_longer_than_the_map_has_no_more_entries() {
        let identity = identity();
        let entries = identity.entries();
        assert!(SharedWords::new(identity.words() - 1).is_ok_and(|words| {
            // Too short to be used.
            Remembered::new(words, &identity, 1).is_err()
        }));
        let words = SharedWords::new(identity.words() + 4096).unwrap();
        let memory = words.map_again().unwrap();
        let remembered = Remembered::new(words, &identity, 1).unwrap();
        let entry = Entry::mapped(FileId(0), HostCluster(7)).changed();
        let last = GuestCluster(entries - 1);
        for cluster in [GuestCluster(0), last, GuestCluster(entries)] {
            remembered.note(cluster, entry);
        }
        let found = Remembered::found(memory, &identity).unwrap();
        let entry = Entry::from_remembered(entry.remembered());
        let expected = [(GuestCluster(0), entry), (last, entry)];
        assert_eq!(found.entries().unwrap(), expected);
    }
}
