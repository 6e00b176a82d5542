//! The format extension: one cluster of features, today dirty bitmaps.
//!
//! Valid only while the in-use mark says so
//! ([`InUse::ClosedWithExtension`](super::InUse::ClosedWithExtension)); whoever
//! opens the image for writing drops it. Source: `docs/interop/parallels.rst` of
//! QEMU.

use md5::{Digest, Md5};
use thiserror::Error;

use super::{ClusterSize, Sector};

const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
const DIRTY_BITMAP: u64 = 0x2038_5FAE_252C_B34A;
const END: u64 = 0;
const FLAG_NECESSARY: u64 = 1;
/// Magic and checksum; the checksum covers what follows, to the cluster's end.
const HEAD_LEN: usize = 24;
const FEATURE_HEAD_LEN: usize = 24;
const BITMAP_HEAD_LEN: usize = 32;

/// Why a cluster is no valid extension.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ExtensionError {
    /// The magic is not there.
    #[error("the format extension has magic {0:#x}, expected {MAGIC:#x}")]
    Magic(u64),
    /// The content was changed or torn.
    #[error("the checksum of the format extension is wrong")]
    Checksum,
    /// Something reaches beyond the end of what holds it.
    #[error("the {0} of the format extension is cut off")]
    Cut(&'static str),
    /// A feature that must be understood to open the image, and is not.
    #[error("the image needs the format feature {0:#x}, which is not supported")]
    Necessary(u64),
}

/// A dirty bitmap: which parts of the disk were written since it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    /// How much of the disk it covers.
    pub size: Sector,
    /// Its name.
    pub id: BitmapId,
    /// What one bit covers, in sectors.
    pub granularity: u32,
    /// 0: all clear, 1: all set, else the sector of the image file where a
    /// cluster of bits starts.
    pub l1: Vec<u64>,
}

/// The name of a dirty bitmap: a GUID in the byte order of the file, which is also that of its
/// digits as QEMU shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapId(pub [u8; 16]);

/// After how many bytes a GUID has a hyphen.
const GROUPS: [usize; 4] = [4, 6, 8, 10];

impl BitmapId {
    /// Reads what [`Display`](std::fmt::Display) shows, and nothing else: small letters, no
    /// braces.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
        if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).ok()?;
            *byte = u8::from_str_radix(pair, 16).ok()?;
        }
        Some(Self(id)).filter(|id| id.to_string() == text)
    }
}

impl std::fmt::Display for BitmapId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if GROUPS.contains(&index) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A checked extension.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extension {
    /// In the order of the file.
    pub bitmaps: Vec<DirtyBitmap>,
    /// Magics of features that we do not know and may ignore.
    pub unknown: Vec<u64>,
}

impl Extension {
    /// Checks the cluster that the header's extension offset points at.
    ///
    /// # Errors
    /// The first thing that is wrong, or a necessary feature that is unknown.
    pub fn parse(cluster: &[u8]) -> Result<Self, ExtensionError> {
        let mut rest = Bytes(cluster);
        let magic = rest.u64().ok_or(ExtensionError::Cut("head"))?;
        if magic != MAGIC {
            return Err(ExtensionError::Magic(magic));
        }
        let checksum = rest.take(16).ok_or(ExtensionError::Cut("head"))?;
        if Md5::digest(&cluster[HEAD_LEN..]).as_slice() != checksum {
            return Err(ExtensionError::Checksum);
        }
        let mut extension = Self::default();
        while let Some(feature) = Feature::parse(&mut rest)? {
            match feature.magic {
                DIRTY_BITMAP => extension.bitmaps.push(DirtyBitmap::parse(feature.data)?),
                magic if feature.flags & FLAG_NECESSARY != 0 => {
                    return Err(ExtensionError::Necessary(magic));
                }
                magic => extension.unknown.push(magic),
            }
        }
        Ok(extension)
    }

    /// Whether a cluster of so many bytes has room for bitmaps with so many clusters of bits
    /// each.
    pub fn fits(clusters_of_bits: impl Iterator<Item = u64>, cluster_bytes: u64) -> bool {
        let heads = (FEATURE_HEAD_LEN + BITMAP_HEAD_LEN) as u64;
        let bitmaps = clusters_of_bits.map(|count| heads.saturating_add(count.saturating_mul(8)));
        // And what ends the list.
        let fixed = (HEAD_LEN + FEATURE_HEAD_LEN) as u64;
        bitmaps.fold(fixed, u64::saturating_add) <= cluster_bytes
    }

    /// The cluster that [`Self::parse`] reads; features that are not known are left out. `None`
    /// if it has no room for them.
    pub fn to_bytes(&self, cluster: ClusterSize) -> Option<Vec<u8>> {
        let counts = self.bitmaps.iter().map(|bitmap| bitmap.l1.len() as u64);
        if !Self::fits(counts, cluster.bytes()) {
            return None;
        }
        let mut bytes = vec![0; HEAD_LEN];
        for bitmap in &self.bitmaps {
            let size = BITMAP_HEAD_LEN + 8 * bitmap.l1.len();
            bytes.extend(DIRTY_BITMAP.to_le_bytes());
            bytes.extend(0_u64.to_le_bytes());
            bytes.extend((size as u32).to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(bitmap.size.0.to_le_bytes());
            bytes.extend(bitmap.id.0);
            bytes.extend(bitmap.granularity.to_le_bytes());
            bytes.extend((bitmap.l1.len() as u32).to_le_bytes());
            bytes.extend(bitmap.l1.iter().flat_map(|entry| entry.to_le_bytes()));
        }
        bytes.resize(cluster.bytes() as usize, 0);
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        let checksum = Md5::digest(&bytes[HEAD_LEN..]);
        bytes[8..HEAD_LEN].copy_from_slice(&checksum);
        Some(bytes)
    }

    /// Where the clusters of the image file start that hold bits, in sectors.
    pub fn clusters(&self) -> impl Iterator<Item = Sector> {
        let entries = self.bitmaps.iter().flat_map(|bitmap| &bitmap.l1);
        entries.filter(|entry| **entry > 1).map(|e| Sector(*e))
    }
}

impl DirtyBitmap {
    fn parse(data: &[u8]) -> Result<Self, ExtensionError> {
        let cut = || ExtensionError::Cut("dirty bitmap");
        let mut rest = Bytes(data);
        let head = rest.take(BITMAP_HEAD_LEN).ok_or_else(cut)?;
        let mut head = Bytes(head);
        let (size, id) = (head.u64(), head.take(16));
        let (granularity, l1_size) = (head.u32(), head.u32().ok_or_else(cut)?);
        let l1_len = (l1_size as usize).checked_mul(8).ok_or_else(cut)?;
        // Taken before it is believed, so that memory stays below the cluster.
        let l1 = rest.take(l1_len).ok_or_else(cut)?;
        let mut entries = Bytes(l1);
        Ok(Self {
            size: Sector(size.ok_or_else(cut)?),
            id: BitmapId(id.and_then(|id| id.try_into().ok()).ok_or_else(cut)?),
            granularity: granularity.ok_or_else(cut)?,
            l1: std::iter::from_fn(|| entries.u64()).collect(),
        })
    }
}

struct Feature<'a> {
    magic: u64,
    flags: u64,
    data: &'a [u8],
}

impl<'a> Feature<'a> {
    /// The next feature; `None` at the end mark.
    fn parse(rest: &mut Bytes<'a>) -> Result<Option<Self>, ExtensionError> {
        let cut = || ExtensionError::Cut("list of features");
        let magic = rest.u64().ok_or_else(cut)?;
        if magic == END {
            return Ok(None);
        }
        let head = rest.take(FEATURE_HEAD_LEN - 8).ok_or_else(cut)?;
        let mut head = Bytes(head);
        let flags = head.u64().ok_or_else(cut)?;
        let size = head.u32().ok_or_else(cut)? as usize;
        let data = rest.take(size).ok_or_else(cut)?;
        let padding = size.next_multiple_of(8) - size;
        rest.take(padding).ok_or_else(cut)?;
        Ok(Some(Self { magic, flags, data }))
    }
}

/// Bytes that are consumed from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u64(&mut self) -> Option<u64> {
        let bytes = self.take(8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        let bytes = self.take(4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests;
