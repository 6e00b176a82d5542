//! A pio: the part of a request that lies in one cluster (or, for discards and
//! zeroing, in a few neighbouring ones), on its way between threads.

use std::sync::Arc;

use super::EngineError;
use super::inbox::Inbox;
use crate::format::GuestCluster;
use crate::storage::Segments;

/// What a [`Queue`](super::Queue) hears from other threads.
pub(super) enum QueueMessage {
    /// A pio of its has ended.
    PioDone {
        /// The key of the request that it is a part of.
        request: usize,
        /// How it went.
        result: Result<(), EngineError>,
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
    inbox: Option<Arc<Inbox<QueueMessage>>>,
    request: usize,
}

impl Home {
    pub fn new(inbox: Arc<Inbox<QueueMessage>>, request: usize) -> Self {
        Self {
            inbox: Some(inbox),
            request,
        }
    }

    /// The pio has ended. Any thread may say so.
    pub fn complete(mut self, result: Result<(), EngineError>) {
        self.tell(result);
    }

    /// Whether the pio belongs to the queue with this inbox.
    pub fn is_of(&self, inbox: &Arc<Inbox<QueueMessage>>) -> bool {
        self.inbox
            .as_ref()
            .is_some_and(|mine| Arc::ptr_eq(mine, inbox))
    }

    fn tell(&mut self, result: Result<(), EngineError>) {
        if let Some(inbox) = self.inbox.take() {
            inbox.post(QueueMessage::PioDone {
                request: self.request,
                result,
            });
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
