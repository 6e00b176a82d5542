//! How far a long operation is, and whether it should go on.

use std::path::Path;

use super::error::{ImageError, Result};

/// Hears from an operation that takes long. All methods may do nothing.
pub trait Progress {
    /// The operation begins; it will have done `total` bytes in the end.
    fn begin(&self, total: u64) {
        let _ = total;
    }

    /// So many bytes are done, of the total.
    fn done(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Whether to give up at the next place where nothing is left behind.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Nobody listens.
impl Progress for () {}

/// Ends an operation that makes the file or folder `path`, if it shall end.
pub(super) fn check_cancelled(progress: &dyn Progress, path: &Path) -> Result<()> {
    if progress.is_cancelled() {
        return Err(ImageError::Interrupted(path.to_owned()));
    }
    Ok(())
}
