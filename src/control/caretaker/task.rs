//! What can be done to a disk that is being served, and what has come of it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use crate::control::qmp::no_such_snapshot;
use crate::control::with_causes;
use crate::format::{Guid, Sector, SnapshotNote};
use crate::image::{ImageError, NewSnapshot};
use crate::ploop::{BitmapAction, EngineError};
use crate::served::GrowError;
use crate::served::compact::Compaction;
use crate::served::delete::{Deleted, Deletion, GoneLevel, Which};
use crate::served::job::{Job, JobError};
use crate::served::snapshot::{Created, SnapshotError};
use crate::storage::HostDisk;

/// What can be done to a disk that is being served. One at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::control) enum Task {
    /// It becomes as large as this.
    Grow(Sector),
    /// A snapshot of it is made.
    Snapshot {
        /// How that is to be called.
        new: NewSnapshot,
        /// No other may have the same description.
        is_unique: bool,
        /// What is done to dirty bitmaps at the moment of which it is.
        bitmaps: Vec<BitmapAction>,
    },
    /// Long work, step by step.
    Job(Plan),
}

impl Task {
    /// Why nothing else can be done meanwhile.
    pub fn is_under_way(&self) -> &'static str {
        match self {
            Self::Grow(_) => "The disk is being resized already",
            Self::Snapshot { .. } => "A snapshot of the disk is being made already",
            Self::Job(plan) => plan.is_under_way(),
        }
    }

    /// By which it is done to an image that nobody serves.
    pub fn off_line(&self) -> &'static str {
        match self {
            Self::Grow(_) => "resize",
            Self::Snapshot { .. } => "snapshot create",
            Self::Job(plan) => plan.off_line(),
        }
    }

    /// What has come of it if it was called off before it began.
    pub(super) fn called_off(&self) -> TaskError {
        match self {
            Self::Grow(_) => GrowError::CalledOff.into(),
            Self::Snapshot { .. } => SnapshotError::CalledOff.into(),
            Self::Job(_) => TaskError::Cancelled,
        }
    }
}

/// What a job is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::control) enum Plan {
    /// The space of zeros and gaps is given back.
    Compact,
    /// Snapshots are deleted.
    Delete(Which),
}

impl Plan {
    /// As QMP calls jobs of this kind.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Compact => "compact",
            // As QEMU calls it.
            Self::Delete(Which::Range { .. }) => "commit",
            Self::Delete(_) => "snapshot-delete",
        }
    }

    const fn is_under_way(&self) -> &'static str {
        match self {
            Self::Compact => "The disk is being compacted already",
            Self::Delete(Which::Range { .. }) => "Snapshots of the disk are being merged already",
            Self::Delete(_) => "A snapshot of the disk is being deleted already",
        }
    }

    /// By which it is done to an image that nobody serves.
    pub const fn off_line(&self) -> &'static str {
        match self {
            Self::Compact => "compact",
            Self::Delete(Which::Range { .. }) => "snapshot merge",
            Self::Delete(_) => "snapshot delete",
        }
    }

    pub(super) fn job(&self) -> Box<dyn Job<HostDisk>> {
        match self {
            Self::Compact => Box::new(Compaction::new()),
            Self::Delete(which) => Box::new(Deletion::new(which.clone())),
        }
    }
}

/// What has come of a task.
#[derive(Debug)]
pub(in crate::control) enum Done {
    /// The disk has this size.
    Grown(Sector),
    /// It has another top.
    Snapshot {
        /// Its name.
        guid: Guid,
        /// What whoever has the image open takes.
        new_chain: NewChain,
        /// Why it may not be there after a power cut, in words.
        doubt: Option<String>,
    },
    /// Snapshots are no more.
    Deleted {
        /// Their names, and what was noted of them.
        snapshots: Vec<(Guid, Option<SnapshotNote>)>,
        /// What whoever has the image open takes.
        new_chain: NewChain,
        /// What was not done, in words.
        doubt: Option<String>,
    },
    /// All of it.
    Job,
}

impl Done {
    /// Of a job that has ended well.
    pub(super) fn of(deleted: Option<Deleted>, new_chain: &NewChain) -> Self {
        let Some(deleted) = deleted else {
            return Self::Job;
        };
        if !deleted.levels.is_empty() {
            new_chain.put(Change::Without(deleted.levels));
        }
        Self::Deleted {
            snapshots: deleted.snapshots,
            new_chain: new_chain.clone(),
            doubt: deleted.doubt.map(|doubt| {
                let why = with_causes(&doubt);
                format!("the snapshot is deleted, but not all of that is done: {why}")
            }),
        }
    }
}

/// What has become of the levels of the disk.
#[derive(Debug)]
pub(in crate::control) enum Change {
    /// A snapshot was made, and there is a new top.
    Top(Box<Created>),
    /// These levels are no more.
    Without(Vec<GoneLevel>),
}

/// A change of the levels, until it is taken by whoever has the image open: the main thread,
/// when it hears of it, or who closes the image before.
#[derive(Clone, Debug, Default)]
pub(in crate::control) struct NewChain(Arc<Mutex<Option<Change>>>);

impl NewChain {
    pub(super) fn put(&self, change: Change) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(change);
    }

    /// Whether the other one is where this one puts it, too.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// `None` if there is none, or it was taken.
    pub fn take(&self) -> Option<Change> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Why nothing has come of it.
#[derive(Debug, Error)]
pub(in crate::control) enum TaskError {
    /// The disk cannot become larger.
    #[error(transparent)]
    Grow(#[from] GrowError),
    /// Something is hidden below it; see
    /// [`require_nothing_hidden`](crate::image::require_nothing_hidden).
    #[error("the disk keeps its size")]
    Hidden(#[source] Arc<ImageError>),
    /// No snapshot of it can be made.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// There is nowhere to note one.
    #[error("no snapshot was made: the disk is a bare image, and only a bundle has snapshots")]
    NoBundle,
    /// As QEMU says it.
    #[error("Snapshot with name '{0}' already exists on device 'disk'")]
    NameTaken(String),
    /// Which there are cannot be read.
    #[error("no snapshot was made")]
    Names(#[source] ImageError),
    /// It is only read.
    #[error("no snapshot was made: the disk is only read")]
    ReadOnly,
    /// A job came to nothing.
    #[error(transparent)]
    Job(#[from] JobError),
    /// Somebody has cancelled it.
    #[error("Operation canceled")]
    Cancelled,
    /// There are no more descriptors, most likely.
    #[error("it cannot be begun")]
    Setup(#[from] io::Error),
    /// No ring runs, and so nobody here has the image open.
    #[error(
        "no guest uses the disk, so its image is not open (--lock=running): 'ploop-img {0}' does \
         it now"
    )]
    NotOpen(&'static str),
    /// A ring is about to run, or the last one has stopped.
    #[error("the image is being opened or closed (--lock=running); try again")]
    Turning,
    /// The thread has ended in a panic.
    #[error("the thread that changes the disk has failed; see the log")]
    Gone,
}

impl TaskError {
    /// For the client, with what can be done.
    pub fn words(&self) -> String {
        let words = with_causes(self);
        match self {
            Self::Grow(GrowError::Engine(EngineError::Smaller { .. })) => {
                format!("{words}; when nobody serves it, 'ploop-img resize --shrink' does it")
            }
            // As QEMU says it, whose client alone asks in this way.
            Self::Job(JobError::NoSuchSnapshot { guid, description }) => {
                let id = guid.map(|guid| guid.to_string());
                no_such_snapshot(id.as_deref(), description.as_deref())
            }
            _ => words,
        }
    }
}
