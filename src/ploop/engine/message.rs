//! What the metadata thread is told, and what becomes of that when it has ended.

use std::sync::Arc;

use super::super::EngineError;
use super::super::alloc::Extent;
use super::super::control::{Control, Outcome};
use super::super::inbox::Inbox;
use super::super::pio::{Pio, QueueMessage};
use crate::format::{GuestCluster, HostCluster, Packing};
use crate::storage::FileId;

/// What the metadata thread is told.
pub(in crate::ploop) enum MdMessage {
    /// A flush, to be answered in the queue's inbox.
    Flush {
        inbox: Arc<Inbox<QueueMessage>>,
        request: usize,
    },
    /// A cluster was unmapped; posted before its md page is marked dirty.
    Freed { host: HostCluster, page: u32 },
    /// What the disk does not map is known: clusters that a lost process has unmapped,
    /// with their md pages, those that the disk maps for a guest cluster that such a
    /// process had mapped elsewhere, and those that nothing maps.
    Begin {
        freed: Vec<(u32, HostCluster)>,
        moved: Vec<(GuestCluster, HostCluster)>,
        leaked: Vec<Extent>,
    },
    /// Clusters were given out and then not used, but may have been written to.
    Dropped { host: HostCluster },
    /// A pio that needs space; `full` if the host answered that there is none.
    Park { pio: Pio, full: bool },
    /// Parked pios of this queue get one more try, then fail.
    GiveUp { inbox: Arc<Inbox<QueueMessage>> },
    /// The last one of a generation that a round waits for; see
    /// [`StableWrites`](crate::ploop::stable_writes::StableWrites).
    StableWritesEnded,
    /// What it had dispatched for a growth has been done; see `Work`.
    ErrandDone(Result<(), EngineError>),
    /// The cluster is to be copied from this level into the top, if that is the same then.
    CopyUp {
        cluster: GuestCluster,
        level: FileId,
        top: FileId,
        outcome: Outcome,
    },
    /// For a growth a cluster has moved from here. The disk does not know of it before this
    /// md page is written.
    Moved { host: HostCluster, page: u32 },
    /// The zeros of a cluster are to be given back.
    Squeeze {
        cluster: GuestCluster,
        outcome: Outcome,
    },
    /// Clusters are to move in front of where the file would end without gaps.
    MoveDown {
        clusters: Vec<GuestCluster>,
        packing: Packing,
        outcome: Outcome,
    },
    /// From the control thread.
    Control(Control, Outcome),
}

impl MdMessage {
    /// Nobody will do what it asks for.
    pub(super) fn turn_down(self) {
        let result = Err(EngineError::Stopped);
        match self {
            Self::Flush { inbox, request } => {
                inbox.post(QueueMessage::FlushDone { request, result });
            }
            Self::Park { pio, .. } => pio.home.complete(result),
            Self::Control(_, outcome)
            | Self::CopyUp { outcome, .. }
            | Self::Squeeze { outcome, .. }
            | Self::MoveDown { outcome, .. } => outcome.set(result),
            Self::Freed { .. }
            | Self::Begin { .. }
            | Self::Dropped { .. }
            | Self::GiveUp { .. }
            | Self::ErrandDone(_)
            | Self::Moved { .. }
            | Self::StableWritesEnded => {}
        }
    }
}
