//! Atomics of the standard library, or loom's while it checks the models.

#[cfg(ploop_loom)]
pub use loom::sync::atomic;
#[cfg(not(ploop_loom))]
pub use std::sync::atomic;
