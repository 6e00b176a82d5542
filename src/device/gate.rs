//! Holds threads back until all is there that they need.
//!
//! Who takes a guest over starts all threads first, for each may fail to start. Only then
//! may any of them touch the rings: until then the process before can still go on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Where a gate stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Shut,
    Open,
    /// It will not be opened any more.
    Gone,
}

/// What threads wait at.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Waits until it is open. `false` if it never will be.
    pub fn wait(&self) -> bool {
        let shut = |state: &mut State| *state == State::Shut;
        let waited = self.changed.wait_while(self.state(), shut);
        *waited.unwrap_or_else(PoisonError::into_inner) == State::Open
    }

    /// Nobody will open it, unless somebody has: whoever waits goes home.
    fn give_up(&self) {
        let mut state = self.state();
        if *state == State::Shut {
            *state = State::Gone;
            drop(state);
            self.changed.notify_all();
        }
    }

    fn set(&self, state: State) {
        *self.state() = state;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who opens a gate. Dropped without that, whoever waits goes home.
#[derive(Debug, Default)]
pub(super) struct Keeper(Arc<Gate>);

impl Keeper {
    /// The gate, for those who wait.
    pub fn gate(&self) -> Arc<Gate> {
        Arc::clone(&self.0)
    }

    /// Lets all pass.
    pub fn open(self) {
        self.0.set(State::Open);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// Sees to it that nobody waits any more at a gate that is shut when it is dropped.
#[derive(Debug)]
pub(super) struct Release(Arc<Gate>);

impl Release {
    pub fn of(gate: &Arc<Gate>) -> Self {
        Self(Arc::clone(gate))
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_gate_is_waited_at_until_it_is_open_or_gone() {
        for opens in [true, false] {
            let keeper = Keeper::default();
            let gate = keeper.gate();
            let waiting = thread::spawn(move || gate.wait());
            thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            let gate = keeper.gate();
            match opens {
                true => keeper.open(),
                false => drop(keeper),
            }
            assert_eq!(waiting.join().unwrap(), opens);
            assert_eq!(gate.wait(), opens);
        }
    }
}
