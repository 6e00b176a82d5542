//! Changing the version of the format in place.
//!
//! Every entry of the BAT changes its meaning, and an entry alone does not tell
//! which it has. So a copy of header and BAT is put beside the image first, and
//! stays until the change is done; meanwhile a flag in the header keeps everybody
//! away. A change that was cut off is undone from the copy. So is one of the official
//! tool, whose copy has another name and no checksum.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use md5::{Digest, Md5};

use super::create::publish_file;
use super::delta::Delta;
use super::error::{ImageError, IoContext, Result};
use super::file::{HostImage, ImageFile};
use super::folder::Folder;
use super::open::{Access, OpenMode, image_of, open};
use super::ownership::Ownership;
use super::repair::drop_extension;
use crate::format::{GuestCluster, Header, HeaderError, HostCluster, InUse, Version};
use crate::ploop::Level;

/// The name of the copy is that of the image with this appended.
pub(super) const COPY_SUFFIX: &str = ".old-bat";
/// The official tool's copy has the name of the image with this appended.
pub(super) const IDX_SUFFIX: &str = ".idx";
const CHECKSUM_LEN: usize = 16;

/// Changes all images of the disk at `path` to `version`.
///
/// # Errors
/// An image that the version cannot express, that is in use or not sound; any
/// I/O error.
pub fn change_version(path: &Path, version: Version) -> Result<()> {
    let image = open(path, OpenMode::new(Access::Repair))?;
    let is_ploop = |level: &Level| *level == Level::Ploop;
    let files = image.chain.levels.iter().zip(&image.files);
    let mut deltas = Vec::new();
    for (_, file) in files.filter(|(level, _)| is_ploop(level)) {
        let delta = Delta::load(image_of(file)?)?;
        delta.require_sound()?;
        converted(&delta, version)?;
        deltas.push(delta);
    }
    for mut delta in deltas {
        if delta.geometry().version == version {
            continue;
        }
        // Of an earlier change that ended well but for this.
        remove_copy(delta.path())?;
        let (folder, name) = Folder::of(delta.path())?;
        let copy = copy_name(name);
        let ownership = Ownership::of(delta.file().file(), delta.path())?;
        change(&mut delta, version, |content| {
            publish_file(&folder, &copy, |file| {
                ownership.give(file.file(), file.path())?;
                write_copy(file, content)
            })
        })?;
        remove_copy(delta.path())?;
    }
    Ok(())
}

/// Whether there is a copy beside an image.
///
/// # Errors
/// Any I/O error.
pub(super) fn has_copy(image: &Path) -> Result<bool> {
    let (folder, name) = Folder::of(image)?;
    folder.contains(Path::new(&copy_name(name)))
}

/// Whether the official tool's copy lies beside an image.
///
/// # Errors
/// Any I/O error.
pub(super) fn has_idx(image: &Path) -> Result<bool> {
    let (folder, name) = Folder::of(image)?;
    folder.contains(Path::new(&with_suffix(name, IDX_SUFFIX)))
}

/// Removes the copy beside an image, if there is one.
///
/// # Errors
/// Any I/O error.
pub(super) fn remove_copy(image: &Path) -> Result<()> {
    let (folder, name) = Folder::of(image)?;
    let copy = copy_name(name);
    if folder.contains(Path::new(&copy))? {
        folder.remove(Path::new(&copy))?;
    }
    Ok(())
}

/// Undoes the change of one image that was cut off.
///
/// # Errors
/// The copy is not there or not of this image; any I/O error.
pub(super) fn undo_change(delta: &mut Delta<HostImage>) -> Result<()> {
    let (folder, name) = Folder::of(delta.path())?;
    let idx = with_suffix(name, IDX_SUFFIX);
    let copy = copy_name(name);
    let is_ours = folder.contains(Path::new(&copy))?;
    let longest = copy_len(delta);
    if !is_ours && folder.contains(Path::new(&idx))? {
        undo_official(delta, &read_copy(&folder, Path::new(&idx), longest)?)?;
        return folder.remove(Path::new(&idx));
    }
    let content = match is_ours {
        true => read_copy(&folder, Path::new(&copy), longest)?,
        false => Vec::new(),
    };
    undo(delta, &content)?;
    remove_copy(delta.path())
}

fn copy_name(image: &OsStr) -> OsString {
    with_suffix(image, COPY_SUFFIX)
}

fn with_suffix(image: &OsStr, suffix: &str) -> OsString {
    let mut name = image.to_owned();
    name.push(suffix);
    name
}

fn write_copy(file: &HostImage, content: &[u8]) -> Result<()> {
    file.write_all_at(content, 0).context(file.path(), "write")
}

/// What is in a copy, as far as one of this image can be long, and one byte more: a
/// longer one is of another image.
fn read_copy(folder: &Folder, name: &Path, longest: u64) -> Result<Vec<u8>> {
    let path = folder.path().join(name);
    let file: File = folder.open_image(name, false)?;
    let mut content = Vec::new();
    file.take(longest + 1)
        .read_to_end(&mut content)
        .context(&path, "read")?;
    Ok(content)
}

/// The header and the entries in another version.
fn converted<F: ImageFile>(delta: &Delta<F>, version: Version) -> Result<(Header, Vec<u32>)> {
    // A copy has version 2, and its clusters where both versions can have them.
    let (remedy, why_smaller) = match version {
        Version::V2 => ("copy it with 'ploop-img convert' instead", ""),
        Version::V1 => (
            "copy it with 'ploop-img convert', and change the version of the copy",
            "; it stays in version 2",
        ),
    };
    let refuse = |why: String| ImageError::Unsupported {
        path: delta.path().to_owned(),
        why: format!("{why}; {remedy}"),
    };
    let header = delta.header().in_version(version);
    let header = header.map_err(|error| match error {
        // Nothing makes the disk smaller.
        HeaderError::TooLarge(source) => ImageError::TooLarge {
            path: delta.path().to_owned(),
            source,
            remedy: why_smaller.to_owned(),
        },
        error => refuse(error.to_string()),
    })?;
    let (old, new) = (delta.geometry(), header.geometry());
    let entries = delta.bat().iter().map(|value| {
        if *value == 0 {
            return Ok(0);
        }
        let host = old.host_cluster(*value);
        let host = host.filter(|HostCluster(host)| *host < new.host_cluster_limit());
        let host = host.ok_or_else(|| refuse(format!("entry {value} has no counterpart")))?;
        Ok(new.bat_value(host))
    });
    let entries = entries.collect::<Result<_>>()?;
    Ok((header, entries))
}

/// Changes one image. `keep_copy` must make what it gets stable.
pub(super) fn change<F: ImageFile>(
    delta: &mut Delta<F>,
    version: Version,
    keep_copy: impl FnOnce(&[u8]) -> Result<()>,
) -> Result<()> {
    drop_extension(delta)?;
    let (new_header, new_entries) = converted(delta, version)?;
    keep_copy(&copy_of(delta))?;

    delta.rename_opening()?;
    let mut header = delta.header().clone();
    header.set_converting();
    header.in_use = InUse::Open;
    delta.set_header(header);
    delta.write_header()?;
    delta.sync()?;

    replace_all(delta, new_header, new_entries)
}

/// How long [`copy_of`] is, in bytes. Of the official tool's copy, what lies behind is
/// of no interest.
fn copy_len<F: ImageFile>(delta: &Delta<F>) -> u64 {
    let entries = 4 * u64::from(delta.geometry().entries);
    (Header::LEN + CHECKSUM_LEN) as u64 + entries
}

/// Header, BAT, and a checksum over both.
fn copy_of<F: ImageFile>(delta: &Delta<F>) -> Vec<u8> {
    let mut content = delta.header().to_bytes().to_vec();
    content.extend(delta.bat().iter().flat_map(|entry| entry.to_le_bytes()));
    let checksum = Md5::digest(&content);
    content.extend_from_slice(&checksum);
    content
}

/// Puts back what [`change`] kept.
pub(super) fn undo<F: ImageFile>(delta: &mut Delta<F>, copy: &[u8]) -> Result<()> {
    let (header, entries) = parse_copy(delta, copy).ok_or_else(|| ImageError::Unsupported {
        path: delta.path().to_owned(),
        why: format!(
            "the copy of its BAT, which a change of the format version keeps beside the image \
             (the same name with {COPY_SUFFIX}), is missing, damaged or of another image; \
             without it nobody knows what the entries mean"
        ),
    })?;
    delta.rename_opening()?;
    replace_all(delta, header, entries)
}

/// Undoes a change of the official tool, whose copy is header and BAT as they were,
/// in whole clusters and without a checksum. That it belongs to this image shows in
/// the entries: each is still the old one, or what that becomes.
pub(super) fn undo_official<F: ImageFile>(delta: &mut Delta<F>, idx: &[u8]) -> Result<()> {
    let (header, entries) = parse_idx(delta, idx).ok_or_else(|| ImageError::Unsupported {
        path: delta.path().to_owned(),
        why: format!(
            "the copy of its BAT, which another tool has put beside the image (the same name with \
             {IDX_SUFFIX}), is damaged or of another image; without it nobody knows what the \
             entries mean"
        ),
    })?;
    delta.rename_opening()?;
    replace_all(delta, header, entries)
}

fn parse_idx<F: ImageFile>(delta: &Delta<F>, idx: &[u8]) -> Option<(Header, Vec<u32>)> {
    let (start, rest) = idx.split_first_chunk::<{ Header::LEN }>()?;
    let header = Header::parse(start).ok()?;
    let (old, now) = (header.geometry(), delta.geometry());
    let is_same = old.cluster == now.cluster
        && old.entries == now.entries
        && old.disk_size == now.disk_size
        && old.data_start == now.data_start;
    let words = rest.get(..4 * old.entries as usize)?.chunks_exact(4);
    let entries: Vec<_> = words
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    let other = match old.version {
        Version::V1 => Version::V2,
        Version::V2 => Version::V1,
    };
    let becomes = header.in_version(other).ok()?;
    let is_from = |(entry, now): (&u32, &u32)| {
        let host = old.host_cluster(*entry).filter(|_| *entry != 0);
        now == entry || host.is_some_and(|host| *now == becomes.geometry().bat_value(host))
    };
    let is_of_image = is_same && entries.iter().zip(delta.bat()).all(is_from);
    is_of_image.then_some((header, entries))
}

fn parse_copy<F: ImageFile>(delta: &Delta<F>, copy: &[u8]) -> Option<(Header, Vec<u32>)> {
    let (content, checksum) = copy.split_last_chunk::<CHECKSUM_LEN>()?;
    if Md5::digest(content).as_slice() != checksum {
        return None;
    }
    let (header, entries) = content.split_first_chunk::<{ Header::LEN }>()?;
    let header = Header::parse(header).ok()?;
    let (old, now) = (header.geometry(), delta.geometry());
    let is_same = old.cluster == now.cluster
        && old.entries == now.entries
        && old.disk_size == now.disk_size
        && old.data_start == now.data_start
        && entries.len() as u64 == 4 * u64::from(old.entries);
    let words = entries.chunks_exact(4);
    let entries = words.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    is_same.then(|| (header.clone(), entries.collect()))
}

/// Writes all entries while the flag keeps everybody away, and then the sector
/// that holds the header, which takes the flag away.
fn replace_all<F: ImageFile>(
    delta: &mut Delta<F>,
    header: Header,
    entries: Vec<u32>,
) -> Result<()> {
    delta.set_bat(entries);
    delta.write_entries((0..delta.geometry().entries).map(GuestCluster))?;
    delta.sync()?;
    delta.set_header(header);
    delta.finish(InUse::Closed)
}

#[cfg(test)]
mod tests;
