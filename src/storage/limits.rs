//! What the host lets a process use.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::SIGXFSZ;

/// Sets the process up so that limits on files are met late, and as errors. To be
/// called once, at the start of a program.
///
/// Each thread that does I/O has descriptors of its own for the files of a chain; the
/// usual limit of 1024 is for the sake of `select(2)`, which is not used here. The memory of
/// rings is counted as locked memory of the user, on some kernels; who may lift that limit
/// (root) gives the right away later, so it is done now. A file
/// that would become larger than the process may make it (`RLIMIT_FSIZE`) is an error
/// of that operation, `EFBIG`, and not the end of the process, which the signal that
/// comes with it would be.
pub fn ease_limits() {
    raise(Resource::Nofile);
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    if setrlimit(Resource::Memlock, unlimited).is_err() {
        raise(Resource::Memlock);
    }
    // That it came is of no interest: the system call says so as well.
    let came = Arc::new(AtomicBool::new(false));
    if let Err(error) = signal_hook::flag::register(SIGXFSZ, came) {
        log::debug!("files that become too large end the program: {error}");
    }
}

/// As far as anybody may.
fn raise(resource: Resource) {
    let limit = getrlimit(resource);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(resource, raised) {
        log::debug!("the limit of {resource:?} stays: {error}");
    }
}
