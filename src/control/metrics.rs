//! Metrics: how the disk is doing, for Prometheus and what understands its formats.
//!
//! - `address`: where they are asked for, as the command line says it;
//! - `http`: from bytes to a question, and from its answer to bytes;
//! - `page`: the answer;
//! - `client`: one that asks: its socket;
//! - `server`: all of them;
//! - `fuzzing`: what a fuzz target reaches of it.
//!
//! As with the control socket, everything runs in the main loop and waits for nothing. Who
//! asks may be anybody who reaches the socket: what he may send, how many there are, and how
//! long they stay is bounded. The numbers are those that the control socket tells, added up
//! when somebody asks. `docs/metrics.md` describes them. Knows HTTP and Prometheus. Must not
//! know how a disk is served: what it says of one it asks a [`Subject`](super::Subject).

mod address;
mod client;
#[cfg(fuzzing)]
pub mod fuzzing;
mod http;
mod page;
mod server;
#[cfg(test)]
mod tests;

pub use address::MetricsAddress;
pub(super) use page::Names;
pub(super) use server::Server;
