//! The log that the device mapper's `log-writes` keeps; see the kernel's
//! Documentation/admin-guide/device-mapper/log-writes.rst.
//!
//! A block with the header, then the entries: each a block of its own, and the data of
//! the write behind it. A write stands before the first flush that was submitted after
//! its end, and a flush, like a write with FUA, where it ended. So at a power cut behind
//! some entry all is on the device that stands before the last flush, and of the later
//! ones what was written with FUA; the others may be there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x6a_7366_7773_6872;

const VERSION: u64 = 1;

/// Sectors of all lengths and places but those of the header's blocks are of 512 bytes.
const SECTOR: u64 = 512;

const FLUSH: u64 = 1 << 0;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;

/// What was asked of the device.
pub struct Entry {
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes were written there.
    pub len: u64,
    /// Where these bytes are in the log.
    data: u64,
    /// All before it is stable.
    pub is_flush: bool,
    /// It is stable itself.
    pub is_fua: bool,
    /// The name of a mark, which is all that it is.
    pub mark: Option<String>,
}

/// The log of one device.
pub struct Log {
    file: File,
    pub entries: Vec<Entry>,
}

impl Log {
    pub fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let header = words(&file, 0);
        assert_eq!(header[..2], [MAGIC, VERSION], "it is a log");
        let count = header[2];
        let block = header[3] & 0xffff_ffff;
        assert_eq!(block, SECTOR, "the devices have sectors of 512 bytes");
        let mut at = block;
        let mut entries = Vec::new();
        for _ in 0..count {
            let [sector, sectors, flags, mark_len] = words(&file, at);
            let mark = (flags & MARK != 0).then(|| {
                let mut name = vec![0; mark_len as usize];
                file.read_exact_at(&mut name, at + 32).unwrap();
                String::from_utf8(name).unwrap()
            });
            at += block;
            // A discard need not have an effect, and has no data.
            let len = if flags & (DISCARD | MARK) == 0 {
                sectors * SECTOR
            } else {
                0
            };
            entries.push(Entry {
                offset: sector * SECTOR,
                len,
                data: at,
                is_flush: flags & FLUSH != 0,
                is_fua: flags & FUA != 0,
                mark,
            });
            at += len;
        }
        Self { file, entries }
    }

    /// What an entry has written.
    pub fn data(&self, entry: &Entry) -> Vec<u8> {
        let mut data = vec![0; entry.len as usize];
        self.file.read_exact_at(&mut data, entry.data).unwrap();
        data
    }
}

fn words(file: &File, at: u64) -> [u64; 4] {
    let mut bytes = [0; 32];
    file.read_exact_at(&mut bytes, at).unwrap();
    std::array::from_fn(|word| {
        let bytes = bytes[word * 8..][..8].try_into().unwrap();
        u64::from_le_bytes(bytes)
    })
}
