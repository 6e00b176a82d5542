//! How far a long operation is, and whether it should go on.

use std::path::Path;

use super::error::{ImageError, Result};

/// Hears from an operation that takes long. All methods may do nothing.
pub trait Progress {
    /// The operation begins; it will have done `total` bytes in the end. Not called
    /// where nobody knows how much that is.
    fn begin(&self, total: u64) {
        let _ = total;
    }

    /// So many bytes are done, of the total.
    fn done(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Whether to give up at the next place where that does no harm.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Nobody listens.
impl Progress for () {}

/// Ends an operation on `path`, if it shall end; `state` says what is left then.
pub(super) fn check_cancelled(
    progress: &dyn Progress,
    path: &Path,
    state: &'static str,
) -> Result<()> {
    if progress.is_cancelled() {
        let path = path.to_owned();
        return Err(ImageError::Interrupted { path, state });
    }
    Ok(())
}
