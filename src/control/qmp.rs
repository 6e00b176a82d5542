//! The control socket: what a running disk is asked and told, in QMP, QEMU's protocol.
//!
//! - `framing`: from a stream of bytes to objects;
//! - `message`: from an object to a request, and from its end to the answer;
//! - `arguments`: those of a request;
//! - `commands`: what is done for each; `bitmaps`: those for dirty bitmaps, and transactions;
//! - `shapes`: answers as QEMU shapes them;
//! - `names`: of the disk and its levels;
//! - `event`: what clients are told unasked;
//! - `session`: one client's talk, without a socket;
//! - `client`: its socket;
//! - `allowance`: how much of the processor clients may take;
//! - `monitor`: all clients.
//!
//! Everything runs in the main loop and waits for nothing: clients are other programs of
//! the host, which may stall, flood and send rubbish, and none of that may touch a guest.
//! What takes time is a [`Wish`], which others grant; until then its client waits.
//! `docs/control.md` describes commands and events. Knows JSON and QMP. Must not know how
//! a disk is served: what it says of one it asks a [`Subject`](super::Subject).

mod allowance;
mod arguments;
mod bitmaps;
mod client;
mod commands;
mod event;
mod framing;
mod message;
mod monitor;
mod names;
mod session;
mod shapes;
#[cfg(test)]
mod tests;

pub(super) use client::ClientId;
pub use commands::Wish;
pub(super) use event::Event;
pub use message::Failure;
pub(super) use message::no_such_snapshot;
pub(super) use monitor::Monitor;
pub use session::Session;
pub(super) use shapes::snapshot_info;
