//! Atomics of the standard library, or loom's while it checks the models.

#[cfg(loom)]
pub use loom::sync::atomic;
#[cfg(not(loom))]
pub use std::sync::atomic;
