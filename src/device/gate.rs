//! How another thread makes a queue thread stop and waits until it has.
//!
//! The queue thread owns its engine queue and its I/O ring, so only it can drain
//! them. The thread that serves the front-end's messages leaves an [`Order`] here,
//! wakes the queue thread, and waits.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// What becomes of requests that wait for space on the host (see
/// [`Queue::drain`](crate::ploop::Queue::drain)) and still find
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// They fail. For a guest that goes on.
    Fail,
    /// They are left without an answer. For a front-end that is gone: it may come
    /// back and send them again.
    Drop,
}

/// What a queue thread is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Complete what is in flight.
    Drain,
    /// The same, then give everything back and end the thread.
    Close(Parked),
}

/// Between one queue thread and those that give it orders.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether there is an order: what the queue thread looks at between batches.
    pending: AtomicBool,
    /// Whether the queue thread may have requests in flight.
    active: AtomicBool,
    wake: OwnedFd,
}

#[derive(Debug)]
struct State {
    order: Option<Order>,
    /// Orders given and carried out so far.
    given: u64,
    done: u64,
    closed: bool,
}

impl Gate {
    /// Without an order. [`Self::as_raw_fd`] is readable from the start, so that
    /// the queue thread comes round once when it is registered.
    ///
    /// # Errors
    /// Any of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                order: None,
                given: 0,
                done: 0,
                closed: false,
            }),
            changed: Condvar::new(),
            pending: AtomicBool::new(false),
            active: AtomicBool::new(false),
            wake: eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Gives an order and returns a receipt to wait with. A drain is not given to
    /// a queue that has never been active.
    ///
    /// The caller must have stopped the ring before it orders a drain: the queue
    /// thread becomes active before it looks whether the ring is running.
    pub fn order(&self, order: Order) -> Option<u64> {
        if order == Order::Drain && !self.active.load(Ordering::SeqCst) {
            return None;
        }
        let mut state = self.state();
        if state.closed {
            return None;
        }
        state.order = Some(match state.order {
            Some(close @ Order::Close(_)) => close,
            _ => order,
        });
        state.given += 1;
        self.pending.store(true, Ordering::Release);
        self.wake();
        Some(state.given)
    }

    /// Makes the queue thread look round without an order, if it has ever been
    /// active.
    pub fn nudge(&self) {
        if self.active.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        // It can only fail when the counter is full: then it is readable anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Waits until the order with this receipt is carried out.
    pub fn wait(&self, receipt: u64) {
        let mut state = self.state();
        while state.done < receipt && !state.closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives an order and waits until it is carried out.
    pub fn order_and_wait(&self, order: Order) {
        if let Some(receipt) = self.order(order) {
            self.wait(receipt);
        }
    }

    /// Queue thread: there may be requests in flight from now on.
    pub fn set_active(&self) {
        self.active.store(true, Ordering::SeqCst);
    }

    /// Queue thread: makes [`Self::as_raw_fd`] unreadable until the next order.
    pub fn consume_wake(&self) {
        // Nothing to read is fine: the fd is non-blocking.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Queue thread: whether there is an order. Costs a relaxed load.
    pub fn has_order(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    /// Queue thread: takes the order, and the receipts that it settles.
    pub fn take(&self) -> Option<(Order, u64)> {
        let mut state = self.state();
        self.pending.store(false, Ordering::Relaxed);
        let order = state.order.take()?;
        Some((order, state.given))
    }

    /// Queue thread: the order is carried out.
    pub fn settle(&self, order: Order, receipt: u64) {
        let mut state = self.state();
        state.done = receipt;
        state.closed |= matches!(order, Order::Close(_));
        drop(state);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held; and no state here is half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Gate {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn an_order_is_waited_for() {
        let gate = Arc::new(Gate::new().unwrap());
        gate.set_active();
        let served = Arc::new(AtomicBool::new(false));
        let waiter = {
            let (gate, served) = (Arc::clone(&gate), Arc::clone(&served));
            thread::spawn(move || {
                gate.order_and_wait(Order::Drain);
                served.load(Ordering::SeqCst)
            })
        };
        let (order, receipt) = loop {
            if let Some(taken) = gate.take() {
                break taken;
            }
            thread::yield_now();
        };
        served.store(true, Ordering::SeqCst);
        gate.settle(order, receipt);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn an_idle_queue_needs_no_drain_but_is_closed() {
        let gate = Gate::new().unwrap();
        assert_eq!(gate.order(Order::Drain), None);
        assert!(!gate.has_order());
        assert!(gate.order(Order::Close(Parked::Fail)).is_some());
        assert!(gate.has_order());
    }

    #[test]
    fn a_close_is_not_weakened_and_a_closed_gate_takes_no_orders() {
        let gate = Gate::new().unwrap();
        gate.set_active();
        let close = Order::Close(Parked::Drop);
        gate.order(close);
        gate.order(Order::Drain);
        let (order, receipt) = gate.take().unwrap();
        assert_eq!((order, receipt), (close, 2));
        gate.settle(order, receipt);
        gate.order_and_wait(Order::Drain);
        assert_eq!(gate.take(), None);
    }
}
