//! Virtual disks in the ploop format, served from user space.
//!
//! Floors, top to bottom; each knows only the ones below it:
//! [`control`] (event loop, sockets, signals, the log), [`device`] (virtio-blk over
//! vhost-user), [`image`] (offline work on images), [`ploop`] (the engine),
//! [`storage`] (host file I/O), [`mod@format`] (bytes on disk). Beside them stands
//! [`printable`], for what ends up on a terminal or in a log.
//! `docs/architecture.md` says who must not know what, and `docs/durability.md`
//! which order of writes survives a power cut.

// The models leave the simulation out, and with it the only user of some helpers.
#![cfg_attr(ploop_loom, allow(dead_code))]

pub mod control;
pub mod device;
pub mod format;
pub mod image;
pub mod ploop;
pub mod printable;
pub mod storage;

#[cfg(all(test, not(ploop_loom)))]
mod sim;
