//! A pio: the part of a request that lies in one cluster (or, for discards and
//! zeroing, in a few neighbouring ones), on its way between threads.

use std::sync::Arc;

use super::EngineError;
use super::control::Outcome;
use super::engine::MdMessage;
use super::inbox::Inbox;
use crate::format::{GuestCluster, HostCluster, Packing};
use crate::storage::{FileId, Segments};

/// What a [`Queue`](super::Queue) hears from other threads.
pub(super) enum QueueMessage {
    /// A pio of its has ended.
    PioDone {
        /// The key of the request that it is a part of.
        request: usize,
        /// What it still took of the queue's allowance.
        charge: u64,
        /// How it went.
        result: Result<(), EngineError>,
    },
    /// A pio of its waits for space on the host, and takes nothing of the disk.
    Parked {
        /// What it took of the queue's allowance.
        charge: u64,
    },
    /// A flush that it waits for has ended.
    FlushDone {
        /// The key of the waiting request.
        request: usize,
        /// How it went.
        result: Result<(), EngineError>,
    },
    /// The engine takes requests again.
    Resumed,
}

/// Where the end of a pio is told. It is told exactly once: the value is consumed
/// by it, and one that is lost on the way tells of an error when it is dropped.
pub(super) struct Home {
    owner: Option<Owner>,
    request: usize,
    charge: u64,
}

/// Whose pio it is.
enum Owner {
    Queue(Arc<Inbox<QueueMessage>>),
    Metadata(Arc<Inbox<MdMessage>>),
    /// Of who looks there.
    Other(Outcome),
}

impl Home {
    pub fn new(inbox: Arc<Inbox<QueueMessage>>, request: usize, charge: u64) -> Self {
        Self {
            owner: Some(Owner::Queue(inbox)),
            request,
            charge,
        }
    }

    /// The metadata thread has something done.
    pub fn of_metadata(inbox: Arc<Inbox<MdMessage>>) -> Self {
        Self {
            owner: Some(Owner::Metadata(inbox)),
            request: 0,
            charge: 0,
        }
    }

    /// Somebody else wants to know of its end.
    pub fn of_other(outcome: Outcome) -> Self {
        Self {
            owner: Some(Owner::Other(outcome)),
            request: 0,
            charge: 0,
        }
    }

    /// The pio waits for a host that is full: what it takes of the queue's allowance is
    /// free for others.
    pub fn uncharge(&mut self) {
        let charge = std::mem::take(&mut self.charge);
        if charge > 0
            && let Some(Owner::Queue(inbox)) = &self.owner
        {
            inbox.post(QueueMessage::Parked { charge });
        }
    }

    /// The pio has ended. Any thread may say so.
    pub fn complete(mut self, result: Result<(), EngineError>) {
        self.tell(result);
    }

    /// Whether the pio belongs to the queue with this inbox.
    pub fn is_of(&self, inbox: &Arc<Inbox<QueueMessage>>) -> bool {
        matches!(&self.owner, Some(Owner::Queue(mine)) if Arc::ptr_eq(mine, inbox))
    }

    fn tell(&mut self, result: Result<(), EngineError>) {
        match self.owner.take() {
            Some(Owner::Queue(inbox)) => inbox.post(QueueMessage::PioDone {
                request: self.request,
                charge: self.charge,
                result,
            }),
            Some(Owner::Metadata(inbox)) => inbox.post(MdMessage::ErrandDone(result)),
            Some(Owner::Other(outcome)) => outcome.set(result),
            None => {}
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.tell(Err(EngineError::Stopped));
    }
}

/// Why a range shall read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroKind {
    /// The guest has no use for the content.
    Discard,
    /// The guest wants to read zeros, and the space may be given back.
    Unmap,
    /// The guest wants to read zeros, and the space shall stay allocated.
    KeepAllocated,
}

/// What is left to do for a pio.
pub(super) enum Work {
    /// Write inside one cluster.
    Write {
        cluster: GuestCluster,
        /// Bytes from the start of the cluster.
        offset: u32,
        data: Segments,
    },
    /// Zero or discard a range of bytes of the disk, cluster by cluster.
    Zero {
        start: u64,
        len: u64,
        kind: ZeroKind,
    },
    /// Copy the cluster from this level into the top, if it is still there, and that the top.
    CopyUp {
        cluster: GuestCluster,
        level: FileId,
        top: FileId,
    },
    /// For a growth: wait for the end of copies that were begun to where the BAT goes.
    EndCopies,
    /// Give back the zeros of the cluster.
    Squeeze { cluster: GuestCluster },
    /// Copy the cluster to `to`, which reads as zeros, and keep it locked.
    Move {
        cluster: GuestCluster,
        to: HostCluster,
        /// As many bytes of it as belong to the disk.
        keep: u64,
        /// It may be elsewhere by now.
        only_if: MoveIf,
    },
    /// The copy is stable, and is to be used, or there is none. Whatever was
    /// locked is not any more.
    EndMove {
        cluster: GuestCluster,
        is_stable: bool,
    },
}

/// Where a cluster has to be if it is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MoveIf {
    /// Where the BAT of a larger disk goes, or its end is to be cut.
    InTheWay,
    /// Behind the end that the file would have without gaps.
    Behind(Packing),
}

impl Work {
    /// So many bytes of a zeroing are done.
    pub fn advance(&mut self, done: u64) {
        if let Self::Zero { start, len, .. } = self {
            *start += done;
            *len -= done;
        }
    }
}

/// See the module's text.
pub(super) struct Pio {
    pub home: Home,
    pub work: Work,
    /// The client waits for its end in vain: without space it fails.
    pub last_try: bool,
}
