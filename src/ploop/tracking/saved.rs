//! Persistent bitmaps in the image: read when it is opened for writing, written when it is
//! closed.
//!
//! They are valid only while the mark says so, and the mark goes, with the word where they are,
//! before anything else of the file changes; that is stable first (I12). So a process that dies,
//! or a power cut, leaves none, and no bitmap that misses a write is ever read. What is read and
//! is not right has everything set.
//!
//! They lie behind everything else in the file, where nothing maps them; who opens the image
//! next finds space there that nothing uses. They are stable before the mark says that they are
//! there.

use std::io;

use super::bits::Bits;
use super::{ALL_BITS_MAX, BITMAPS_MAX, BITS_MAX, Bitmap, BitmapInfo, bits_of};
use crate::format::{
    DirtyBitmap, Extension, ExtensionError, Geometry, Header, HostCluster, InUse, SECTOR_SIZE,
    Sector,
};
use crate::ploop::rule::{self, Rule};
use crate::storage::{Disk, FileId};

/// What was written.
#[derive(Clone, Copy, Debug)]
pub(in crate::ploop) struct Saved {
    /// Where the extension is, if all is well.
    pub extension: Option<Sector>,
    /// The first cluster that may have been written to.
    pub start: u32,
    /// The one behind the last.
    pub end: u32,
}

/// That the image has no feature which must be understood to open it, and is not.
pub(in crate::ploop) fn require_understood(
    disk: &impl Disk,
    file: FileId,
    header: &Header,
) -> Result<(), ExtensionError> {
    match read_extension(disk, file, header) {
        Some(Ok(Err(error @ ExtensionError::Necessary(_)))) => Err(error),
        // What is wrong otherwise costs the bitmaps alone.
        _ => Ok(()),
    }
}

/// The valid extension of the image, if there is one.
fn read_extension(
    disk: &impl Disk,
    file: FileId,
    header: &Header,
) -> Option<io::Result<Result<Extension, ExtensionError>>> {
    let is_valid = header.in_use == InUse::ClosedWithExtension;
    let is_valid = is_valid || !rule::kept(Rule::BitmapsEndWithUse);
    if !is_valid || header.extension.0 == 0 {
        return None;
    }
    let mut cluster = vec![0; header.geometry().cluster.bytes() as usize];
    let read = match header.extension.0.checked_mul(SECTOR_SIZE) {
        Some(offset) => disk.read_exact_at(file, &mut cluster, offset),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    };
    Some(read.map(|()| Extension::parse(&cluster)))
}

/// Those that the image has, before it is marked as in use.
pub(in crate::ploop) fn load(disk: &impl Disk, file: FileId, header: &Header) -> Vec<Bitmap> {
    let geometry = header.geometry();
    let extension = match read_extension(disk, file, header) {
        None => return Vec::new(),
        Some(Ok(Ok(extension))) => extension,
        Some(Ok(Err(error))) => {
            warn_lost(&error);
            return Vec::new();
        }
        Some(Err(error)) => {
            warn_lost(&error);
            return Vec::new();
        }
    };
    let mut all: Vec<Bitmap> = Vec::new();
    for stored in extension.bitmaps {
        let name = stored.id.to_string();
        let shift = shift_of(&stored, geometry);
        let is_new = all.len() < BITMAPS_MAX && all.iter().all(|bitmap| bitmap.name != name);
        let shift = shift.filter(|shift| is_new && have_room(&all, *shift, geometry));
        let Some(shift) = shift else {
            log::warn!("the dirty bitmap {name} of the image cannot be used and is dropped");
            continue;
        };
        let bits = read_bits(disk, file, geometry, (&stored, shift)).unwrap_or_else(|why| {
            log::warn!(
                "the dirty bitmap {name} of the image is not right ({why}): all of the disk \
                 counts as changed"
            );
            let mut bits = Bits::new(shift);
            bits.set(0, geometry.disk_size.bytes());
            bits
        });
        all.push(Bitmap {
            name,
            bits,
            records: true,
            is_persistent: true,
        });
    }
    all
}

/// What there is to know of those that the image has, without a change of it.
///
/// # Errors
/// There is no header that can be read.
pub fn read_bitmaps(disk: &impl Disk, file: FileId) -> io::Result<Vec<BitmapInfo>> {
    let header = read_header(disk, file)?;
    Ok(load(disk, file, &header).iter().map(Bitmap::info).collect())
}

pub(super) fn read_header(disk: &impl Disk, file: FileId) -> io::Result<Header> {
    let mut bytes = [0; Header::LEN];
    disk.read_exact_at(file, &mut bytes, 0)?;
    Header::parse(&bytes).map_err(io::Error::other)
}

/// Whether there may be another one beside these.
fn have_room(bitmaps: &[Bitmap], shift: u32, geometry: &Geometry) -> bool {
    let disk_bytes = geometry.disk_size.bytes();
    let bits = bitmaps.iter().map(|bitmap| bits_of(bitmap, disk_bytes));
    let more = disk_bytes.div_ceil(1 << shift);
    bits.fold(more, u64::saturating_add) <= ALL_BITS_MAX
}

fn warn_lost(error: &dyn std::error::Error) {
    log::warn!(
        "the dirty bitmaps of the image cannot be read, and are dropped: the next backup has to \
         be a full one: {error}"
    );
}

/// The granularity as a power of two in bytes, if a bitmap of it can be kept.
fn shift_of(stored: &DirtyBitmap, geometry: &Geometry) -> Option<u32> {
    let granularity = u64::from(stored.granularity) * SECTOR_SIZE;
    let bits = geometry.disk_size.bytes().div_ceil(granularity.max(1));
    let is_usable = granularity.is_power_of_two() && bits <= BITS_MAX;
    is_usable.then(|| granularity.trailing_zeros())
}

fn read_bits(
    disk: &impl Disk,
    file: FileId,
    geometry: &Geometry,
    (stored, shift): (&DirtyBitmap, u32),
) -> Result<Bits, String> {
    let disk_bytes = geometry.disk_size.bytes();
    if stored.size != geometry.disk_size {
        return Err("it is of a disk of another size".to_owned());
    }
    let cluster = geometry.cluster.bytes();
    // That a cluster of bits covers, in bytes.
    let covers = 1_u64.checked_shl(shift);
    let covers = covers.and_then(|granularity| granularity.checked_mul(cluster * 8));
    let covers = covers.unwrap_or(u64::MAX);
    if stored.l1.len() as u64 != disk_bytes.div_ceil(covers) {
        return Err("its table has another length".to_owned());
    }
    let mut bits = Bits::new(shift);
    let mut bytes = vec![0; cluster as usize];
    for (index, entry) in (0_u64..).zip(&stored.l1) {
        let start = index.saturating_mul(covers);
        match *entry {
            0 => {}
            1 => bits.set(start, disk_bytes.min(start.saturating_add(covers))),
            sector => {
                let offset = sector
                    .checked_mul(SECTOR_SIZE)
                    .ok_or("it is not in the file")?;
                let read = disk.read_exact_at(file, &mut bytes, offset);
                read.map_err(|error| error.to_string())?;
                bits.add_bytes((start >> shift) / 64, &bytes);
            }
        }
    }
    bits.cut(disk_bytes);
    Ok(bits)
}

/// Writes those that are persistent behind the end of the file, and behind this cluster. To be
/// synced before the mark.
pub(in crate::ploop) fn save(
    disk: &impl Disk,
    file: FileId,
    geometry: &Geometry,
    (bitmaps, at_least): (&[Bitmap], HostCluster),
) -> Option<Saved> {
    let persistent: Vec<&Bitmap> = bitmaps.iter().filter(|it| it.is_persistent).collect();
    if persistent.is_empty() {
        return None;
    }
    let mut saved = Saved {
        extension: None,
        start: at_least.0,
        end: at_least.0,
    };
    let len = disk.len(file);
    match try_save(disk, file, geometry, (&persistent, at_least), &mut saved) {
        Ok(extension) => saved.extension = Some(extension),
        Err(error) => {
            log::warn!(
                "the dirty bitmaps cannot be kept in the image, and are lost: the next backup \
                 has to be a full one: {error}"
            );
            // What was written of them is space that nothing uses.
            let _ = len.and_then(|len| disk.set_len(file, len));
        }
    }
    Some(saved)
}

fn try_save(
    disk: &impl Disk,
    file: FileId,
    geometry: &Geometry,
    (bitmaps, at_least): (&[&Bitmap], HostCluster),
    saved: &mut Saved,
) -> io::Result<Sector> {
    let cluster = geometry.cluster.bytes();
    let behind = disk
        .len(file)?
        .saturating_sub(geometry.host_offset(HostCluster(0)));
    let next = u32::try_from(behind.div_ceil(cluster)).unwrap_or(u32::MAX);
    (saved.start, saved.end) = (next.max(at_least.0), next.max(at_least.0));
    let mut write = |bytes: &[u8]| {
        let at = HostCluster(saved.end);
        if saved.end >= geometry.host_cluster_limit() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        saved.end += 1;
        let offset = geometry.host_offset(at);
        disk.write_all_at(file, bytes, offset)?;
        Ok::<_, io::Error>(Sector(offset / SECTOR_SIZE))
    };
    let mut extension = Extension::default();
    for bitmap in bitmaps {
        let Some(id) = bitmap.id() else { continue };
        let bits = bitmap.bits.to_bytes(geometry.disk_size.bytes());
        let mut l1 = Vec::new();
        for part in bits.chunks(cluster as usize) {
            if part.iter().all(|byte| *byte == 0) {
                l1.push(0);
            } else {
                let mut bytes = part.to_vec();
                bytes.resize(cluster as usize, 0);
                l1.push(write(&bytes)?.0);
            }
        }
        extension.bitmaps.push(DirtyBitmap {
            size: geometry.disk_size,
            id,
            granularity: (1_u64 << bitmap.bits.shift() >> 9) as u32,
            l1,
        });
    }
    let bytes = extension.to_bytes(geometry.cluster);
    write(&bytes.ok_or_else(|| io::Error::other("there is no place for so many"))?)
}
