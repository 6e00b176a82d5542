//! Virtual disks in the ploop format, served from user space.
//!
//! Floors, top to bottom; each knows only the ones below it:
//! [`control`] (event loop, sockets, signals, the log), [`served`] (what is done to a disk
//! that is being served), [`device`] (virtio-blk over vhost-user), [`image`] (offline work on images), [`ploop`] (the engine),
//! [`storage`] (host file I/O), [`mod@format`] (bytes on disk). Beside them stand
//! [`printable`], for what ends up on a terminal or in a log, [`quantity`], for sizes on
//! command lines, [`threads`], which starts them, [`notices`], what somebody outside should hear of, `headroom`, which asks for memory
//! before it is needed, `parcel`, what one process hands to another, `peer`, who that is, and
//! [`usage`], for command lines that are wrong.
//! `docs/architecture.md` says who must not know what, and `docs/durability.md`
//! which order of writes survives a power cut.

// The models leave the simulation out, and with it the only user of some helpers.
#![cfg_attr(ploop_loom, allow(dead_code))]

pub mod control;
pub mod device;
pub mod format;
mod headroom;
pub mod image;
pub mod notices;
mod parcel;
mod peer;
pub mod ploop;
pub mod printable;
pub mod quantity;
pub mod served;
pub mod storage;
pub mod threads;
pub mod usage;

#[cfg(all(test, not(ploop_loom)))]
mod sim;
