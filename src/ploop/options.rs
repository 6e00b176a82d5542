//! How an engine shall work.

use std::sync::Arc;
use std::time::Duration;

use super::write_threshold::WriteThreshold;
use crate::notices::Notices;

/// What becomes of writes when the host file system is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnEnospc {
    /// They wait until there is space again; the guest sees a slow disk.
    #[default]
    Stop,
    /// They fail, and the guest sees an I/O error.
    Report,
}

/// What becomes of requests when the lock on the image is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLockLoss {
    /// They wait: whoever looks after the guest decides.
    #[default]
    Stop,
    /// They fail, and the guest sees an I/O error.
    Report,
}

/// See the fields.
#[derive(Clone, Debug)]
pub struct Options {
    /// Write nothing at all.
    pub read_only: bool,
    /// Threads for pios that change the mapping; at least 1.
    pub runners: usize,
    /// How many [`Queue`](super::Queue)s there can be at a time.
    pub max_queues: usize,
    /// How many host operations a queue can have in flight.
    pub queue_depth: u32,
    /// How long a changed page of the BAT may wait to be written with others.
    /// A flush does not wait for it.
    pub writeback_delay: Duration,
    /// What to do when the host file system is full.
    pub on_enospc: OnEnospc,
    /// What to do when another host may have the image.
    pub on_lock_loss: OnLockLoss,
    /// By how many bytes the file grows ahead of its writers, at least; up to
    /// eight times as many when they use that up within a second.
    pub preallocation: u64,
    /// The smallest cluster in bytes that a copy-on-write clones, where the host can
    /// share data between files. A small one is cheap to copy, and the host lets a
    /// clone wait for all I/O to both files.
    pub smallest_clone: u64,
    /// After an opening of an image that was not closed, leave clusters that it does not
    /// map alone until [`Engine::begin`](super::Engine::begin) or
    /// [`Engine::take_over`](super::Engine::take_over).
    pub awaits_take_over: bool,
    /// A process that lives has passed the image on (`Control::Pass`),
    /// and the guest with it that the opening is named for.
    pub is_passed_on: bool,
    /// Who is told that the host is full and that it is not any more.
    pub notices: Option<Arc<Notices>>,
    /// What is told of when the file of the top is used behind it.
    pub write_threshold: Arc<WriteThreshold>,
    /// When no more clusters than this are left to be given out, the file grows. Set by the engine.
    pub(super) low_water: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            runners: 2,
            max_queues: 64,
            queue_depth: 256,
            writeback_delay: Duration::from_secs(1),
            on_enospc: OnEnospc::Stop,
            on_lock_loss: OnLockLoss::Stop,
            preallocation: 128 << 20,
            smallest_clone: 256 << 10,
            awaits_take_over: false,
            is_passed_on: false,
            notices: None,
            write_threshold: Arc::default(),
            low_water: 0,
        }
    }
}
