//! What the files of a disk hold: as readers see them, or as a power cut would leave
//! them.

use std::cell::RefCell;

use smallvec::SmallVec;

use super::checker::Image;
use super::disk::for_sectors;
use super::file::{ContentId, Contents, Left, SECTOR, SimFile};
use super::pattern::{self, Value};
use crate::format::Header;
use crate::storage::FileId;

/// See the module's text.
pub struct View<'a> {
    files: SmallVec<[(&'a [ContentId], u64); 8]>,
    contents: &'a Contents,
    origins: &'a Origins,
}

impl<'a> View<'a> {
    /// Of what readers see, but for files of which a cut has `left` something else.
    pub fn new(
        files: &'a [SimFile],
        left: &'a [Option<Left>],
        contents: &'a Contents,
        origins: &'a Origins,
    ) -> Self {
        let left = left
            .iter()
            .map(Option::as_ref)
            .chain(std::iter::repeat(None));
        let files = files.iter().zip(left).map(|(file, left)| match left {
            Some(left) => (&left.sectors[..], left.len),
            None => (file.sectors(), file.len()),
        });
        Self {
            files: files.collect(),
            contents,
            origins,
        }
    }

    /// Bytes of a file.
    pub fn len(&self, file: FileId) -> u64 {
        self.files[usize::from(file.0)].1
    }

    /// The bytes of a range; zeros beyond the end.
    pub fn read(&self, file: FileId, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for_sectors(offset, len as u64, |sector, within, range| {
            let content = self.contents.get(self.content(file, sector));
            bytes[range].copy_from_slice(&content[within]);
        });
        bytes
    }

    /// What the sector at this byte holds, read as `sector` of the guest's disk; `None`
    /// if nobody ever wrote that there.
    pub fn value(&self, file: FileId, offset: u64, sector: u64) -> Option<Value> {
        debug_assert!(offset.is_multiple_of(SECTOR as u64), "data is in sectors");
        match self.content(file, offset / SECTOR as u64) {
            ContentId::ZEROS => Some(Value::ZEROS),
            id => match self.origins.of(id, self.contents)? {
                (value, of) if of == sector => Some(value),
                _ => None,
            },
        }
    }

    /// Whether readers of the file, which is this `image`, see the same as those of another. What
    /// the first sector says beside the entries is left out, as the mark is there, and so are
    /// clusters that nothing is mapped to: a hole that was punched while the image was being
    /// closed need not be stable, and whoever opens the image takes such a cluster for one that
    /// was left with data in it.
    pub fn has_data_of(&self, file: FileId, image: &Image, other: &SimFile) -> bool {
        self.has_data_but(file, image, other, |_, _| false)
    }

    /// The same, but for sectors of clusters that may have other content, as `may_have` says.
    pub fn has_data_but(
        &self,
        file: FileId,
        image: &Image,
        other: &SimFile,
        may_have: impl Fn(u64, ContentId) -> bool,
    ) -> bool {
        let sectors_of = |offset: u64, len: u64| {
            let sector = SECTOR as u64;
            offset / sector..(offset + len) / sector
        };
        let bytes = |content| self.contents.get(content);
        let is_same = |sector: u64| {
            let (own, its) = (self.content(file, sector), other.sector(sector));
            own == its || bytes(own) == bytes(its)
        };
        let entries = |content| &bytes(content)[Header::LEN..];
        let mapped = image.map.iter().filter(|offset| **offset != 0);
        self.len(file) == other.len()
            && entries(self.content(file, 0)) == entries(other.sector(0))
            && sectors_of(0, image.data_start).skip(1).all(is_same)
            && mapped
                .flat_map(|offset| sectors_of(*offset, image.cluster))
                .all(|sector| is_same(sector) || may_have(sector, self.content(file, sector)))
    }

    fn content(&self, file: FileId, sector: u64) -> ContentId {
        let content = self.files[usize::from(file.0)].0.get(sector as usize);
        content.copied().unwrap_or(ContentId::ZEROS)
    }
}

/// Which write each content came from, as far as anybody has asked.
#[derive(Default)]
pub struct Origins {
    known: RefCell<Vec<Origin>>,
}

#[derive(Clone, Copy)]
enum Origin {
    NotAsked,
    Foreign,
    Write(Value, u64),
}

impl Origins {
    fn of(&self, id: ContentId, contents: &Contents) -> Option<(Value, u64)> {
        let mut known = self.known.borrow_mut();
        if known.len() < contents.len() {
            known.resize(contents.len(), Origin::NotAsked);
        }
        let origin = &mut known[id.index()];
        if let Origin::NotAsked = origin {
            *origin = match pattern::origin(contents.get(id)) {
                Some((value, sector)) => Origin::Write(value, sector),
                None => Origin::Foreign,
            };
        }
        match *origin {
            Origin::Write(value, sector) => Some((value, sector)),
            _ => None,
        }
    }
}
