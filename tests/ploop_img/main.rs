//! `ploop-img` as its users meet it: the program itself, the disks of the
//! official tool, and QEMU's tools as judges.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod chain;
mod check;
mod convert;
mod create;
mod cuts;
mod disk;
mod fixtures;
mod kill;
mod like_qemu_img;
mod other_tools;
mod ownership;
mod progress;
mod repairs;
mod resize;
mod sizes;
mod snapshot;
mod two_mounts;
