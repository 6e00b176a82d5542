//! The contents of files, and what of them a power cut leaves: all that was synced,
//! and any part of what came later.

use std::collections::BTreeMap;

use rand::Rng;
use rand::rngs::SmallRng;

/// What is written whole or not at all, in bytes.
const SECTOR: usize = 512;

/// What was done to a file, in the order in which it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Write { offset: u64, len: u64 },
    Zero { offset: u64, len: u64 },
    Length(u64),
    Sync { good: bool },
}

/// A change of the bytes that is not stable yet.
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Zero { offset: usize, len: usize },
}

impl Change {
    fn offset(&self) -> usize {
        match *self {
            Self::Write { offset, .. } | Self::Zero { offset, .. } => offset,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Write { bytes, .. } => bytes.len(),
            Self::Zero { len, .. } => *len,
        }
    }

    /// Does a part of it: so many bytes from `start`, counted from its own start.
    fn apply(&self, to: &mut Vec<u8>, start: usize, len: usize) {
        let at = self.offset() + start;
        if to.len() < at + len {
            to.resize(at + len, 0);
        }
        match self {
            Self::Write { bytes, .. } => {
                to[at..at + len].copy_from_slice(&bytes[start..start + len]);
            }
            Self::Zero { .. } => to[at..at + len].fill(0),
        }
    }

    fn apply_all(&self, to: &mut Vec<u8>) {
        self.apply(to, 0, self.len());
    }

    /// All of it, nothing, or any of its sectors.
    fn apply_any(&self, to: &mut Vec<u8>, rng: &mut SmallRng) {
        match rng.random_range(0..3) {
            0 => (),
            1 => self.apply_all(to),
            _ => {
                let mut start = 0;
                while start < self.len() {
                    let to_border = SECTOR - (self.offset() + start) % SECTOR;
                    let len = to_border.min(self.len() - start);
                    if rng.random() {
                        self.apply(to, start, len);
                    }
                    start += len;
                }
            }
        }
    }
}

/// A file.
#[derive(Default)]
pub struct FileState {
    /// What who reads it sees.
    pub live: Vec<u8>,
    stable: Vec<u8>,
    changes: Vec<Change>,
    /// Lengths that it has had since the last sync.
    lengths: Vec<u64>,
    /// How long it was at the last sync that was more than one of data.
    kept_len: usize,
    events: Vec<Event>,
}

impl FileState {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            stable: bytes.clone(),
            kept_len: bytes.len(),
            live: bytes,
            ..Self::default()
        }
    }

    /// A sync of more than data.
    pub fn keep_len(&mut self) {
        self.kept_len = self.live.len();
    }

    /// Ends it where its data does, or where it is known to have ended.
    pub fn find_len(&mut self) {
        let data = self.live.iter().rposition(|&byte| byte != 0);
        let end = data.map_or(0, |last| last + 1).max(self.kept_len);
        self.live.truncate(end);
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let len = bytes.len() as u64;
        self.events.push(Event::Write { offset, len });
        self.change(Change::Write {
            offset: offset as usize,
            bytes: bytes.to_vec(),
        });
    }

    pub fn zero(&mut self, offset: u64, len: u64) {
        self.events.push(Event::Zero { offset, len });
        let end = (offset + len).min(self.live.len() as u64);
        if offset < end {
            self.change(Change::Zero {
                offset: offset as usize,
                len: (end - offset) as usize,
            });
        }
    }

    fn change(&mut self, change: Change) {
        let before = self.live.len();
        change.apply_all(&mut self.live);
        if self.live.len() != before {
            self.lengths.push(self.live.len() as u64);
        }
        self.changes.push(change);
    }

    pub fn set_len(&mut self, len: u64) {
        self.events.push(Event::Length(len));
        if (len as usize) < self.live.len() {
            // What it grows over later is zeros.
            self.change(Change::Zero {
                offset: len as usize,
                len: self.live.len() - len as usize,
            });
        }
        self.live.resize(len as usize, 0);
        self.lengths.push(len);
    }

    /// What was done before is stable.
    pub fn sync(&mut self) {
        self.events.push(Event::Sync { good: true });
        self.stable.clone_from(&self.live);
        self.changes.clear();
        self.lengths.clear();
    }

    /// As the kernel does it: what could not be written is forgotten, and no later
    /// sync speaks of it, though it can be read until the power is cut.
    pub fn fail_sync(&mut self, rng: &mut SmallRng) {
        self.events.push(Event::Sync { good: false });
        self.stable = self.after_cut(rng);
        self.changes.clear();
        self.lengths.clear();
    }

    /// What a power cut leaves. Nothing orders what was not synced, and the length
    /// of the file is a thing of its own.
    pub fn after_cut(&self, rng: &mut SmallRng) -> Vec<u8> {
        let mut bytes = self.stable.clone();
        for change in &self.changes {
            change.apply_any(&mut bytes, rng);
        }
        let which = rng.random_range(0..=self.lengths.len());
        let len = match which.checked_sub(1) {
            Some(index) => self.lengths[index] as usize,
            None => self.stable.len(),
        };
        bytes.resize(len, 0);
        bytes
    }

    /// Whether bytes are written that a cut could take back.
    pub fn has_unsynced_bytes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Takes what was done since the last time.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }
}

/// All files, by name. Names change at once and for good: only what is in the files
/// is put to the test.
pub type Files = BTreeMap<String, FileState>;

#[test]
fn a_cut_takes_what_was_not_synced_and_nothing_else() {
    use rand::SeedableRng;
    let mut rng = SmallRng::seed_from_u64(1);
    let mut file = FileState::new(vec![1; 1024]);
    file.write(0, &[2; 512]);
    file.sync();
    assert!(!file.has_unsynced_bytes());
    file.write(512, &[3; 512]);
    file.set_len(4096);
    assert!(file.has_unsynced_bytes());
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let left = file.after_cut(&mut rng);
        assert_eq!(left[..512], [2; 512]);
        assert!(left[512..1024] == [1; 512] || left[512..1024] == [3; 512]);
        seen.insert((left[512], left.len()));
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
    file.fail_sync(&mut rng);
    file.sync();
    assert_eq!(file.after_cut(&mut rng), file.live);
}
