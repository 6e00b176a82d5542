//! The engine: a ploop disk served in parallel.
//!
//! Knows clusters, the BAT, pios, and what may reach the disk in which order.
//! Must not know virtio, sockets, file names or how host I/O is made.
//!
//! Threads, each with its own [`Io`](crate::storage::Io): any number of
//! [`Queue`]s (one for each virtqueue) submit; [`Runner`]s do the pios that a
//! queue does not do on the spot; one [`MdWriter`] writes the mapping, flushes and
//! manages space. They share the [`Engine`]. All three are state machines that
//! never block, so that a test can drive them in any order; [`Running`] gives
//! each its thread.

mod alloc;
mod allowance;
mod bat;
mod compact;
pub(crate) mod control;
mod copy_up;
mod engine;
mod entry;
mod epoch;
mod error;
mod inbox;
mod levels;
mod llist;
mod md;
mod open;
mod options;
mod pio;
pub(crate) mod preempt;
mod queue;
mod redirect;
mod remembered;
mod report;
mod request;
mod reserved;
pub(crate) mod rule;
mod runner;
mod running;
mod shape;
mod stable_writes;
mod sync;
mod take_over;
mod tracking;
mod write_threshold;

pub(crate) use control::Outcome;
pub use copy_up::{CopyUp, CopyUpStep};
pub use engine::Engine;
pub use error::{EngineError, OpenError};
pub use levels::Needless;
pub use md::MdWriter;
pub use open::{Chain, Level, Opened};
pub use options::{OnEnospc, OnLockLoss, Options};
pub use queue::{Queue, QueueWaker};
pub use redirect::{Redirect, RedirectStep};
pub use report::EngineReport;
pub use request::{Command, Done, Request, SectorRange};
pub use runner::Runner;
pub use running::Running;
pub use shape::{LevelShape, Shape};
pub use take_over::{LeftMemory, TakeOverError};
pub(crate) use tracking::Bitmap;
pub use tracking::check_saved_bitmaps;
pub use tracking::saved::read_bitmaps;
pub use tracking::{BITMAPS_MAX, BitmapAction, BitmapError, BitmapInfo};
pub use write_threshold::WriteThreshold;

#[cfg(all(test, ploop_loom))]
mod loom_models;
#[cfg(all(test, not(ploop_loom)))]
mod property_tests;
#[cfg(all(test, not(ploop_loom)))]
mod tests;
