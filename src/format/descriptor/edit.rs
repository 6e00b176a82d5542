//! Changes of the snapshot tree. Each takes a valid descriptor to a valid one,
//! or says why not; what it means for the files is up to `image`.

use std::path::PathBuf;

use thiserror::Error;

use super::{Descriptor, Guid, Image, ImageKind, Shot};

/// Why a change of the tree is not possible.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum EditError {
    /// There is no snapshot of that name.
    #[error("there is no snapshot {0}")]
    NotFound(Guid),
    /// A new snapshot needs a new name.
    #[error("there is already a snapshot {0}")]
    Exists(Guid),
    /// The all-zero GUID stands for "none".
    #[error("the all-zero GUID cannot name a snapshot")]
    NoneGuid,
    /// What the guest writes to is no snapshot.
    #[error("{0} is the top, which the guest writes to, not a snapshot")]
    IsTop(Guid),
    /// Several snapshots lie on it, each needs its content.
    #[error("{children} snapshots lie on {guid}; delete all but one of them first")]
    SeveralChildren {
        /// Which.
        guid: Guid,
        /// How many.
        children: usize,
    },
    /// Other snapshots lie on it.
    #[error("{0} has snapshots above it")]
    HasChildren(Guid),
    /// The snapshot is the base and no other is left to take its place.
    #[error("{0} is the base")]
    IsBase(Guid),
    /// The chain would get too long.
    #[error("the chain would have more than {max} levels, the most that is served; delete or merge snapshots first", max = Descriptor::LEVELS_MAX)]
    TooDeep,
}

impl Descriptor {
    /// Puts a new, empty top in `file` above the present one, which becomes the
    /// snapshot `snapshot`.
    ///
    /// # Errors
    /// The name is taken, or the chain is as long as it may be.
    pub fn push_top(&mut self, snapshot: Guid, file: PathBuf) -> Result<(), EditError> {
        if snapshot == Guid::NONE {
            return Err(EditError::NoneGuid);
        }
        let old_top = self.top;
        // The top's own name is no obstacle: it goes to the new top.
        let taken = snapshot == Guid::TOP || snapshot != old_top && self.shot(snapshot).is_some();
        if taken {
            return Err(EditError::Exists(snapshot));
        }
        if self.chain(old_top).len() >= Self::LEVELS_MAX {
            return Err(EditError::TooDeep);
        }
        self.rename(old_top, snapshot);
        self.add_top(snapshot, file);
        Ok(())
    }

    /// Drops the top, and puts a new, empty one in `file` on the snapshot
    /// `snapshot`. Gives back the image that is no more part of the disk.
    ///
    /// # Errors
    /// There is no such snapshot, or it is the top itself.
    pub fn switch_top(&mut self, snapshot: Guid, file: PathBuf) -> Result<Image, EditError> {
        self.snapshot(snapshot)?;
        if self.chain(snapshot).len() >= Self::LEVELS_MAX {
            return Err(EditError::TooDeep);
        }
        let old_top = self.top;
        let dropped = self.take(old_top).ok_or(EditError::NotFound(old_top))?;
        self.add_top(snapshot, file);
        Ok(dropped)
    }

    /// Drops a snapshot that nothing lies on. Gives back its image.
    ///
    /// # Errors
    /// There is no such snapshot, it is the top, or something lies on it.
    pub fn remove_leaf(&mut self, guid: Guid) -> Result<Image, EditError> {
        self.snapshot(guid)?;
        if self.children(guid).next().is_some() {
            return Err(EditError::HasChildren(guid));
        }
        self.take(guid).ok_or(EditError::NotFound(guid))
    }

    /// The one child that deleting snapshot `guid` would merge into it.
    ///
    /// # Errors
    /// There is no such snapshot, it is the top, nothing lies on it, or more
    /// than one does.
    pub fn only_child(&self, guid: Guid) -> Result<Guid, EditError> {
        self.snapshot(guid)?;
        let mut children = self.children(guid);
        match (children.next(), children.count()) {
            (None, _) => Err(EditError::IsBase(guid)),
            (Some(child), 0) => Ok(child.guid),
            (Some(_), more) => Err(EditError::SeveralChildren {
                guid,
                children: more + 1,
            }),
        }
    }

    /// Takes the name off a snapshot whose child is about to be merged into it,
    /// so that nobody takes the half-merged content for the snapshot. Gives back
    /// the name that it has until [`Self::collapse`].
    ///
    /// # Errors
    /// As [`Self::only_child`].
    pub fn begin_collapse(&mut self, guid: Guid) -> Result<Guid, EditError> {
        self.only_child(guid)?;
        if let Some(shot) = self.shot(guid).filter(|shot| shot.merging) {
            return Ok(shot.guid);
        }
        let nameless = Guid::random();
        self.rename(guid, nameless);
        for shot in self.shots.iter_mut().filter(|s| s.guid == nameless) {
            shot.merging = true;
        }
        Ok(nameless)
    }

    /// Ends a merge of the only child of `guid` into the image of `guid`: that
    /// image is now the child's. Gives back the image that the child had.
    ///
    /// # Errors
    /// As [`Self::only_child`].
    pub fn collapse(&mut self, guid: Guid) -> Result<Image, EditError> {
        let child = self.only_child(guid)?;
        let grandparent = self.shot(guid).and_then(|shot| shot.parent);
        let merged = self.take(guid).ok_or(EditError::NotFound(guid))?;
        for shot in self.shots.iter_mut().filter(|shot| shot.guid == child) {
            shot.parent = grandparent;
        }
        let image = self.images.iter_mut().find(|image| image.guid == child);
        let image = image.ok_or(EditError::NotFound(child))?;
        let child_image = image.clone();
        image.kind = merged.kind;
        image.file = merged.file;
        Ok(child_image)
    }

    /// The only child of `guid` has all that it needs, and lies where `guid` lay. Gives back
    /// the image that is no more part of the disk.
    ///
    /// # Errors
    /// As [`Self::only_child`].
    pub fn bypass(&mut self, guid: Guid) -> Result<Image, EditError> {
        let child = self.only_child(guid)?;
        let grandparent = self.shot(guid).and_then(|shot| shot.parent);
        let bypassed = self.take(guid).ok_or(EditError::NotFound(guid))?;
        for shot in self.shots.iter_mut().filter(|shot| shot.guid == child) {
            shot.parent = grandparent;
        }
        Ok(bypassed)
    }

    /// That `guid` names a snapshot: a node that is not the top.
    fn snapshot(&self, guid: Guid) -> Result<(), EditError> {
        if guid == self.top {
            return Err(EditError::IsTop(guid));
        }
        match self.shot(guid) {
            Some(_) => Ok(()),
            None => Err(EditError::NotFound(guid)),
        }
    }

    pub(super) fn rename(&mut self, from: Guid, to: Guid) {
        let rename = |guid: &mut Guid| {
            if *guid == from {
                *guid = to;
            }
        };
        self.images.iter_mut().for_each(|i| rename(&mut i.guid));
        for shot in &mut self.shots {
            rename(&mut shot.guid);
            shot.parent.as_mut().map(rename);
        }
        rename(&mut self.top);
    }

    fn take(&mut self, guid: Guid) -> Option<Image> {
        self.shots.retain(|shot| shot.guid != guid);
        let index = self.images.iter().position(|image| image.guid == guid)?;
        Some(self.images.remove(index))
    }

    pub(super) fn add_top(&mut self, parent: Guid, file: PathBuf) {
        // Other tools may have given the usual name to some other node.
        self.top = match self.shot(Guid::TOP) {
            None => Guid::TOP,
            Some(_) => Guid::random(),
        };
        self.images.push(Image {
            guid: self.top,
            kind: ImageKind::Expandable,
            file,
        });
        self.shots.push(Shot {
            guid: self.top,
            parent: Some(parent),
            merging: false,
            unknown: Vec::new(),
        });
    }
}
