//! Guests under QEMU use disks that `vhost-user-ploop` serves.
//!
//! Nothing here looks inside the daemon: what counts is what a stock guest
//! sees, what is in the image file, and what `qemu-img` thinks of it.

#[path = "../common/mod.rs"]
mod common;
mod compact;
mod deaths;
mod deletions;
mod growth;
mod limits;
mod load;
mod migration;
mod plugging;
mod properties;
mod qemu;
mod queues;
mod rig;
mod snapshots;
mod space;
mod survival;
mod upgrades;
