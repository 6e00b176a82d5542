//! Where a test can kill the process: before each change of a file or folder.
//!
//! Debug builds only. `PLOOP_IMG_KILL_AT=N` kills the process with SIGKILL right
//! before its N-th change; `PLOOP_IMG_COUNT=FILE` writes the number of changes
//! made so far to FILE. Release builds compile none of this.

/// The caller is about to change a file or a folder.
#[cfg(not(debug_assertions))]
pub(super) fn point() {}

/// The caller is about to change a file or a folder.
#[cfg(debug_assertions)]
pub(super) fn point() {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{LazyLock, Mutex};

    static KILL_AT: LazyLock<Option<u64>> =
        LazyLock::new(|| std::env::var("PLOOP_IMG_KILL_AT").ok()?.parse().ok());
    static COUNT_FILE: LazyLock<Option<std::ffi::OsString>> =
        LazyLock::new(|| std::env::var_os("PLOOP_IMG_COUNT"));
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static WRITING: Mutex<()> = Mutex::new(());

    let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    if *KILL_AT == Some(count) {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
    if let Some(file) = &*COUNT_FILE {
        let _writing = WRITING.lock();
        let _ = std::fs::write(file, count.to_string());
    }
}
