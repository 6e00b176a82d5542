//! How the disk and its levels are called in commands.

/// The disk: the device, and the node of its top level.
pub(super) const DISK: &str = "disk";

/// The node of a level below the top; 0 is the base.
pub(super) fn lower_level(index: usize) -> String {
    format!("level-{index}")
}
