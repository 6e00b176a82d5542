//! Memory of our own that transfers go through whose memory, or whose start and end,
//! direct I/O cannot use.
//!
//! It comes in pieces, and there is a bound for all threads together: each thread has
//! a piece of its own, and takes what else it needs from a pool that all share. An
//! operation holds one piece at most, however long it is, and waits for no other; who
//! finds none waits for an operation of the same thread to end, in the order in which
//! they came. So nobody waits for another thread, and nobody waits for ever.
//!
//! Knows memory. Must not know what it is for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::storage::AlignedBuf;

/// Length of a piece in bytes: a multiple of every alignment.
pub(super) const PIECE_LEN: usize = 128 << 10;

/// How many pieces all threads share: 16 MiB.
const SHARED_PIECES: usize = 128;

/// What all threads share.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<PoolState>);

#[derive(Debug, Default)]
struct PoolState {
    /// That nobody uses.
    free: Vec<AlignedBuf>,
    /// That there are, free or not.
    made: usize,
}

impl Pool {
    /// Held for a moment only: no memory is made or filled meanwhile.
    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory that is free, or leave to make some; `None` if all is in use.
    fn take(&self) -> Option<Option<AlignedBuf>> {
        let mut state = self.lock();
        let free = state.free.pop();
        if free.is_none() {
            if state.made == SHARED_PIECES {
                return None;
            }
            state.made += 1;
        }
        Some(free)
    }
}

/// Memory for a part of an operation, with anything in it.
#[derive(Debug)]
pub(super) struct Piece {
    /// [`PIECE_LEN`] bytes.
    pub memory: AlignedBuf,
    /// Where it goes back to, if it is not the thread's own.
    pool: Option<Arc<Pool>>,
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            let memory = std::mem::replace(&mut self.memory, AlignedBuf::new(1));
            pool.lock().free.push(memory);
        }
    }
}

/// The pieces of one thread.
#[derive(Debug)]
pub(super) struct Pieces {
    pool: Arc<Pool>,
    /// The thread's own, once it was made and while it is not in use.
    own: Option<AlignedBuf>,
    is_own_in_use: bool,
}

impl Pieces {
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            own: None,
            is_own_in_use: false,
        }
    }

    /// A piece; `None` if all are in use. Then this thread uses one.
    ///
    /// # Errors
    /// `ENOMEM` if the host has no memory for one.
    pub fn take(&mut self) -> Result<Option<Piece>, Errno> {
        if !self.is_own_in_use {
            let memory = self.own.take().map_or_else(make, Ok)?;
            self.is_own_in_use = true;
            return Ok(Some(Piece { memory, pool: None }));
        }
        let Some(free) = self.pool.take() else {
            return Ok(None);
        };
        let memory = free.map_or_else(make, Ok).inspect_err(|_| {
            self.pool.lock().made -= 1;
        })?;
        let pool = Some(Arc::clone(&self.pool));
        Ok(Some(Piece { memory, pool }))
    }

    /// A piece is not needed any more.
    pub fn give(&mut self, mut piece: Piece) {
        if piece.pool.is_none() {
            self.is_own_in_use = false;
            self.own = Some(std::mem::replace(&mut piece.memory, AlignedBuf::new(1)));
        }
    }
}

fn make() -> Result<AlignedBuf, Errno> {
    let mut memory = AlignedBuf::new(1);
    memory
        .try_reserve_exact(PIECE_LEN)
        .map_err(|_| Errno::NOMEM)?;
    memory.resize(PIECE_LEN, 0);
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_threads_together_have_one_each_and_what_they_share() {
        let pool = Arc::new(Pool::default());
        let mut greedy = Pieces::new(Arc::clone(&pool));
        let mut held = Vec::new();
        while let Some(piece) = greedy.take().unwrap() {
            assert_eq!(piece.memory.len(), PIECE_LEN);
            assert!(piece.memory.as_ptr().addr().is_multiple_of(4096));
            held.push(piece);
        }
        assert_eq!(held.len(), 1 + SHARED_PIECES);
        let mut other = Pieces::new(Arc::clone(&pool));
        let own = other.take().unwrap().unwrap();
        assert!(other.take().unwrap().is_none());
        other.give(own);
        let own = other.take().unwrap().unwrap();
        assert!(other.take().unwrap().is_none());
        // Given back or dropped, it is there for others.
        drop(held.pop());
        assert!(other.take().unwrap().is_some());
        other.give(own);
        for piece in held {
            greedy.give(piece);
        }
        assert!(greedy.take().unwrap().is_some());
        assert_eq!(pool.lock().made, SHARED_PIECES, "no more is made");
    }
}
