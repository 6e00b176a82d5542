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
//! - [`stage`]: where threads can be preempted, and others go on meanwhile;
//! - [`death`]: the process alone is gone, and the guest goes on with another one;
//! - [`shot`]: snapshots, and what a cut leaves of a name that is not stable;
//! - [`merge`]: levels that go, likewise; [`lift`]: another than the top gets what they have;
//! - [`bitmap`]: what dirty bitmaps have to say once an image is closed;
//! - [`view`]: what the files hold, now or after a cut;
//! - [`judge`]: whether a cut, made or imagined, leaves what it may;
//! - [`checker`]: reads an image without a line of the code under test;
//! - [`rules`]: that the proof fails for engines that break a rule.

mod bitmap;
mod cases;
pub(crate) mod checker;
mod compaction;
mod death;
pub(crate) mod disk;
mod file;
mod judge;
mod life;
mod lift;
mod memory;
mod merge;
mod model;
mod pattern;
mod power_cuts;
mod rules;
mod scenario;
mod session;
mod shot;
mod stage;
mod tests;
mod view;
