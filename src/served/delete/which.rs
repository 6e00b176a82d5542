//! Which snapshots are to go, and how.

use crate::format::Guid;
use crate::image::{self, Bundle, ImageError};
use crate::ploop::Engine;
use crate::served::job::JobError;
use crate::storage::{FileId, HostDisk};

/// Which snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one of this name.
    Guid(Guid),
    /// The one that has all of these.
    Having {
        /// Its name.
        guid: Option<Guid>,
        /// What it is for.
        description: Option<String>,
    },
    /// All from the first on, or from the base, up to the one below the second, or below the
    /// top: what [`image::merge_snapshots`] takes.
    Range {
        /// The first that goes.
        from: Option<Guid>,
        /// The one that stays.
        to: Option<Guid>,
    },
}

/// What is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Going {
    /// One that nothing lies on.
    Leaf(Guid),
    /// Of `guids`, one right below the other, base first, each is a part of the next alone, and
    /// the last of `to`.
    Parts { guids: Vec<Guid>, to: Guid },
}

impl Which {
    /// Of a bundle, as its descriptor was last read.
    pub(super) fn find(&self, bundle: &Bundle) -> Result<Going, JobError> {
        let guid = match self {
            Self::Guid(guid) => *guid,
            Self::Having { guid, description } => one_of(bundle, *guid, description.as_deref())?,
            Self::Range { from, to } => {
                let mut guids = image::range(bundle, *from, *to)?;
                let to = guids.pop().unwrap_or(bundle.descriptor().top());
                let going = Going::Parts { guids, to };
                going.check(bundle)?;
                return Ok(going);
            }
        };
        let descriptor = bundle.descriptor();
        let is_snapshot = descriptor.shot(guid).is_some() && guid != descriptor.top();
        if is_snapshot && descriptor.children(guid).next().is_none() {
            return Ok(Going::Leaf(guid));
        }
        let going = Going::Parts {
            guids: vec![guid],
            to: bundle.only_child(guid)?,
        };
        going.check(bundle)?;
        Ok(going)
    }
}

fn one_of(
    bundle: &Bundle,
    guid: Option<Guid>,
    description: Option<&str>,
) -> Result<Guid, JobError> {
    let found = match (guid, description) {
        (_, Some(description)) => image::described(bundle, description)?,
        (Some(guid), None) => vec![guid],
        (None, None) => Vec::new(),
    };
    let top = bundle.descriptor().top();
    let is_it = |found: &Guid| {
        guid.is_none_or(|guid| guid == *found)
            && *found != top
            && bundle.descriptor().shot(*found).is_some()
    };
    let found: Vec<_> = found.into_iter().filter(is_it).collect();
    match found[..] {
        [guid] => Ok(guid),
        [] => Err(JobError::NoSuchSnapshot {
            guid,
            description: description.map(str::to_owned),
        }),
        _ => Err(JobError::Impossible(
            "several snapshots have this description: name one by its GUID",
        )),
    }
}

impl Going {
    fn check(&self, bundle: &Bundle) -> Result<(), ImageError> {
        match self {
            Self::Leaf(_) => Ok(()),
            Self::Parts { guids, to } => bundle.without(guids, *to).map(drop),
        }
    }
}

/// What each image of the disk that is served is in its bundle, base first.
pub(super) struct Levels(Vec<(Guid, FileId)>);

impl Levels {
    /// Of the engine and of the descriptor as it was last read.
    pub fn of(engine: &Engine<HostDisk>, bundle: &Bundle) -> Result<Self, JobError> {
        let descriptor = bundle.descriptor();
        let chain = descriptor.chain(descriptor.top());
        let files: Vec<_> = engine.level_shapes().map(|level| level.file).collect();
        let is_same = |(image, file): (&&crate::format::Image, &FileId)| {
            let name = image.file.file_name();
            name.is_some() && engine.disk().path(*file).and_then(|path| path.file_name()) == name
        };
        let are_same = chain.len() == files.len() && chain.iter().zip(&files).all(is_same);
        if !are_same {
            return Err(JobError::Impossible(
                "the descriptor has other images below the top than those that are served",
            ));
        }
        let guids = chain.iter().map(|image| image.guid);
        Ok(Self(guids.zip(files).collect()))
    }

    /// Which file of the engine's disk the image is; `None` if it is of another branch.
    pub fn file(&self, guid: Guid) -> Option<FileId> {
        let found = self.0.iter().find(|(of, _)| *of == guid);
        found.map(|(_, file)| *file)
    }

    /// How many images are below it in the disk that is served.
    pub fn depth(&self, guid: Guid) -> Option<usize> {
        self.0.iter().position(|(of, _)| *of == guid)
    }
}
