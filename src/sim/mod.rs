//! Power cuts, simulated: a disk that can lose what was not synced, a model that
//! knows what may be lost, and a driver that runs the engine between the two.
//!
//! Compiled for tests only. Everything is done in one thread and follows from a
//! seed, so that a failure can be seen again.
//!
//! - [`file`]: one host file, with every state that a cut may leave it in;
//! - [`disk`]: the files behind the storage trait, with the order of completions
//!   and the faults chosen by the seed;
//! - [`pattern`]: guest data from which each sector can be told again;
//! - [`model`]: what each sector of the guest's disk may read;
//! - [`death`]: the process alone is gone, and the guest goes on with another one;
//! - [`checker`]: reads an image without a line of the code under test.

mod cases;
mod checker;
mod death;
pub(crate) mod disk;
mod file;
mod life;
mod memory;
mod model;
mod pattern;
mod power_cuts;
mod sabotage;
mod scenario;
mod session;
mod tests;
