//! Whether there is memory for more, asked before it is needed.
//!
//! When an allocation fails, Rust ends the process; so does its library when a new
//! thread finds no memory for its signal stack. Where a front-end can make the process
//! need more (another queue, another part of the guest's memory), or somebody who asks for
//! metrics or for anything else, room is looked for first, and what would take the last of
//! it is refused: an error of that connection.
//!
//! It bounds the address space and the committed memory, as `RLIMIT_AS` and strict
//! accounting do. What a control group limits shows only when memory is touched.

use std::io;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// What has to be left, in bytes: the stacks of a thread, what a queue allocates at its
/// start, and a good deal for small things.
const HEADROOM: usize = 16 << 20;

/// That there is memory left.
///
/// # Errors
/// `ENOMEM` if not.
pub fn check() -> io::Result<()> {
    // SAFETY: a new mapping at an address that the kernel chooses concerns no other
    // memory.
    let mapped = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            HEADROOM,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    }?;
    // SAFETY: it was just mapped, and nobody else knows of it.
    unsafe { munmap(mapped, HEADROOM) }?;
    Ok(())
}
