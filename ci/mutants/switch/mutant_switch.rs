//! Which mutant this program is: put into the copy of the sources that is built.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

struct Switch {
    active: Option<u32>,
    /// A byte for each mutant, in a file that all processes of a test share.
    reached: Option<&'static [AtomicU8]>,
}

static SWITCH: OnceLock<Switch> = OnceLock::new();

/// Whether this mutant is the one; notes that it was asked for.
pub fn is(number: u32) -> bool {
    let switch = SWITCH.get_or_init(init);
    if let Some(byte) = switch.reached.and_then(|map| map.get(number as usize)) {
        byte.store(1, Ordering::Relaxed);
    }
    switch.active == Some(number)
}

fn init() -> Switch {
    let active = std::env::var("MUTANT").ok();
    let reached = std::env::var_os("MUTANTS_REACHED").and_then(|path| {
        let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        let len = file.metadata().ok()?.len() as usize;
        // SAFETY: a new mapping of a file; the result is checked.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        // SAFETY: so many bytes are mapped and stay so; they are used as atomics only.
        (map != libc::MAP_FAILED).then(|| unsafe { std::slice::from_raw_parts(map.cast(), len) })
    });
    Switch {
        active: active.and_then(|number| number.parse().ok()),
        reached,
    }
}
