//! Virtual disks in the ploop format, served from user space.
//!
//! Floors, top to bottom; each knows only the ones below it:
//! [`control`] (event loop, sockets, signals), [`device`] (virtio-blk over
//! vhost-user), [`ploop`] (the engine), [`image`] (offline work on images),
//! [`storage`] (host file I/O), [`mod@format`] (bytes on disk). Beside them stands
//! [`printable`], for what ends up on a terminal.
//! `docs/architecture.md` says who must not know what.

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
