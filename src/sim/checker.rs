//! Reads an image without a line of the code under test.

use std::collections::HashMap;

use super::file::SECTOR;
use super::pattern::Value;
use super::view::View;
use crate::storage::FileId;

/// The header and the BAT of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Of the guest's disk.
    pub sectors: u64,
    /// Byte offset of the data area.
    pub data_start: u64,
    /// The in-use mark says closed.
    pub closed: bool,
    /// Byte offset of the format extension, if the header says that it is valid.
    pub extension: Option<u64>,
    /// Byte offset of each guest cluster in the file, 0 if it is not mapped.
    pub map: Vec<u64>,
    /// A raw image: every cluster is where it is on the guest's disk.
    pub plain: bool,
}

const IN_USE: u32 = 0x746F_6E59;

/// The mark of an image that was closed by who knows of format extensions.
pub const CLOSED_WITH_EXTENSION: u32 = 0x312E_3276;

impl Image {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// What is wrong with it, beginning with the invariant that it breaks.
    pub fn read(view: &View<'_>, file: FileId) -> Result<Self, String> {
        let header = view.read(file, 0, 64);
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let version = match &header[..16] {
            b"WithouFreSpacExt" => 2,
            b"WithoutFreeSpace" => 1,
            _ => return Err("I12: the header is gone".to_owned()),
        };
        let cluster = u64::from(word(28)) * SECTOR as u64;
        let entries = word(32) as usize;
        let bat = view.read(file, 64, entries * 4);
        let unit = if version == 2 { cluster } else { SECTOR as u64 };
        let entry = |bytes: &[u8]| u64::from(u32::from_le_bytes(bytes.try_into().unwrap())) * unit;
        let bat_end = 64 + 4 * entries as u64;
        let data_start = match u64::from(word(48)) * SECTOR as u64 {
            0 => bat_end.next_multiple_of(SECTOR as u64),
            start => start,
        };
        let image = Self {
            cluster,
            sectors: u64::from(word(36)) | u64::from(word(40)) << 32,
            data_start,
            closed: word(44) != IN_USE,
            extension: (word(44) == CLOSED_WITH_EXTENSION)
                .then(|| (u64::from(word(56)) | u64::from(word(60)) << 32) * SECTOR as u64)
                .filter(|offset| *offset != 0),
            map: bat.chunks_exact(4).map(entry).collect(),
            plain: false,
        };
        image.check(view.len(file))?;
        Ok(image)
    }

    fn check(&self, len: u64) -> Result<(), String> {
        let mut owners = HashMap::new();
        let mapped = (0..).zip(&self.map).filter(|(_, offset)| **offset != 0);
        for (guest, &offset) in mapped {
            let at = format!("guest cluster {guest} is mapped to {offset:#x}");
            if offset < self.data_start || !(offset - self.data_start).is_multiple_of(self.cluster)
            {
                return Err(format!("I1: {at}, which is no data cluster"));
            }
            if offset + self.cluster > len {
                return Err(format!("I8: {at}, and the file ends at {len:#x}"));
            }
            if let Some(other) = owners.insert(offset, guest) {
                return Err(format!("I1: {at}, and so is {other}"));
            }
        }
        Ok(())
    }

    /// Byte offset in the file of a sector of the guest's disk, if it is mapped.
    pub fn offset(&self, sector: u64) -> Option<u64> {
        let at = sector * SECTOR as u64;
        if self.plain {
            return Some(at);
        }
        let offset = *self.map.get((at / self.cluster) as usize)?;
        (offset != 0).then_some(offset + at % self.cluster)
    }

    /// How many bytes the file has beyond its last mapped cluster.
    pub fn tail(&self, len: u64) -> u64 {
        let ends = self.map.iter().filter(|offset| **offset != 0);
        let end = ends.map(|offset| offset + self.cluster).max();
        len.saturating_sub(end.unwrap_or(self.data_start))
    }
}

/// What a sector of the guest's disk reads, through a chain of images, the lower ones
/// base first; `None` if nobody ever wrote that there.
pub fn guest_sector(view: &View<'_>, lower: &[Image], top: &Image, sector: u64) -> Option<Value> {
    let top_down = std::iter::once(top).chain(lower.iter().rev());
    for (level, image) in (0..=lower.len()).rev().zip(top_down) {
        if sector < image.sectors
            && let Some(offset) = image.offset(sector)
        {
            return view.value(FileId(level as u8), offset, sector);
        }
    }
    Some(Value::ZEROS)
}
