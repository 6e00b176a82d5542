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
/// The first entry.
const AT_FIRST: usize = 512;

/// A sync has failed: nothing becomes stable any more.
const SYNC_FAILED: u64 = 1;
/// The disk has everything: the image was flushed and about to be closed.
const SETTLED: u64 = 2;

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
        for (at, value) in identity.head() {
            remembered.set(at, value);
        }
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
        let mut head = identity.head().into_iter();
        let fits = head.all(|(at, value)| remembered.get(at) == value);
        if !fits || remembered.words.len() < identity.words() {
            return Err(TakeOverError::OtherImage);
        }
        Ok(remembered)
    }

    /// Whether memory is of ours, and the process that left it had flushed everything,
    /// whatever the image was like then.
    pub fn is_settled_in(words: &SharedWords) -> bool {
        let get = |index| {
            words
                .word(index)
                .map_or(0, |word| word.load(Ordering::Acquire))
        };
        get(AT_MAGIC) == MAGIC
            && get(AT_VERSION) == VERSION
            && get(AT_FLAGS) == SETTLED
            && get(AT_DOUBTS) == 0
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

    /// The name of the opening of the image that it belongs to.
    pub fn opening(&self) -> u64 {
        self.get(AT_OPENING)
    }

    /// The entry has changed. Of two changes of a cluster the later one stays,
    /// whichever comes first.
    pub fn note(&self, cluster: GuestCluster, entry: Entry) {
        let Some(word) = self.words.word(AT_FIRST + cluster.0 as usize) else {
            return;
        };
        let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
            let is_news = Entry::from_remembered(bits).is_none_or(|old| old.is_older_than(entry));
            is_news.then_some(entry.remembered())
        });
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

    /// There may be changes again that the disk does not have.
    pub fn unsettle(&self) {
        self.set(AT_FLAGS, 0);
    }

    /// A sync has failed.
    pub fn set_sync_failed(&self) {
        self.raise(SYNC_FAILED);
    }

    /// Whether a sync has failed, for all that is known.
    pub fn has_sync_failed(&self) -> bool {
        self.get(AT_FLAGS) & SYNC_FAILED != 0 || self.get(AT_DOUBTS) != 0
    }

    /// A stable write has failed; or, after a doubt, it is known what that was.
    pub fn doubt(&self, more: bool) {
        if let Some(word) = self.words.word(AT_DOUBTS) {
            let step = if more { 1 } else { u64::MAX };
            word.fetch_add(step, Ordering::AcqRel);
        }
    }

    /// The disk has everything, and nothing changes any more.
    pub fn set_settled(&self) {
        self.raise(SETTLED);
    }

    pub fn is_settled(&self) -> bool {
        self.get(AT_FLAGS) & SETTLED != 0
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
