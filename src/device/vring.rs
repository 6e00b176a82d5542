//! A ring that completes what is in flight before it counts as disabled.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::GuestMemoryAtomic;

use super::gate::{Gate, Order};
use super::memory::GuestMap;

type Memory = GuestMemoryAtomic<GuestMap>;

/// The library's ring, changed in four places: see [`VringT::set_enabled`],
/// [`VringT::set_queue_ready`], [`VringT::read_kick`] and [`Self::signal`].
///
/// It has a lock. A queue's own thread takes it once or twice per batch of
/// requests, another thread only to serve a message of the front-end.
#[derive(Clone)]
pub(super) struct Vring {
    inner: VringMutex<Memory>,
    gate: Arc<OnceLock<Arc<Gate>>>,
    /// Whether a write to the call descriptor can block.
    call_may_block: Arc<AtomicBool>,
}

impl Vring {
    /// Tells which queue thread serves the ring; to be called before it takes the
    /// first request. (The library makes the rings and knows nothing of gates.)
    pub fn link(&self, gate: &Arc<Gate>) {
        self.gate.get_or_init(|| Arc::clone(gate));
    }

    /// Signals the driver; `state` is what [`VringT::get_mut`] gives. Never blocks:
    /// where the descriptor is full, the driver has not heard of earlier signals
    /// yet, and needs no more.
    ///
    /// # Errors
    /// Any of `write(2)`.
    pub fn signal(&self, state: &VringState<Memory>) -> io::Result<()> {
        if self.call_may_block.load(Ordering::Relaxed)
            && let Some(call) = state.get_call()
            && !is_ready(call, PollFlags::OUT)
        {
            return Ok(());
        }
        match state.signal_used_queue() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Self {
            inner: VringMutex::new(memory, max_queue_size)?,
            gate: Arc::default(),
            call_may_block: Arc::default(),
        })
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.signal(&self.get_ref())
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    /// Disabling waits until all requests of the ring have been answered: this is
    /// all that cloud-hypervisor does to pause a disk.
    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
        if let (false, Some(gate)) = (enabled, self.gate.get()) {
            gate.order_and_wait(Order::Drain);
        }
    }

    fn set_queue_info(
        &self,
        desc_table: u64,
        avail_ring: u64,
        used_ring: u64,
    ) -> Result<(), QueueError> {
        self.inner.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.inner.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    /// A ring starts with nothing to signal. The library's queue counts the used
    /// entries since the last signal, but without EVENT_IDX never from 0 again:
    /// firmware that does without would leave Linux a count that hides a signal.
    fn set_queue_ready(&self, ready: bool) {
        let mut state = self.get_mut();
        let queue = state.get_queue_mut();
        queue.set_ready(ready);
        if let Ok(fresh) = Queue::try_from(queue.state()) {
            *queue = fresh;
        }
    }

    fn set_kick(&self, file: Option<File>) {
        self.inner.set_kick(file);
    }

    /// Never fails and never blocks. The library would end the queue's thread for
    /// good when someone else has read the event first, as QEMU does when it stops
    /// a disk, and would wait for ever if its descriptor is a blocking one.
    fn read_kick(&self) -> io::Result<bool> {
        let state = self.get_ref();
        if let Some(kick) = state.get_kick() {
            // SAFETY: the descriptor is open as long as `state` is borrowed.
            let fd = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            // Not an eventfd, or an old kernel, refuses. Left unread, it would be
            // reported for ever.
            if read_now(fd) == Err(Errno::OPNOTSUPP) && is_ready(kick, PollFlags::IN) {
                let _ = kick.consume();
            }
        }
        Ok(state.is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        // All front-ends of note make it non-blocking. The flag is that of their
        // descriptor as well, so it is not ours to set.
        let flags = file.as_ref().map(rustix::fs::fcntl_getfl);
        let may_block = matches!(flags, Some(Ok(flags)) if !flags.contains(OFlags::NONBLOCK));
        self.call_may_block.store(may_block, Ordering::Relaxed);
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}

/// Reads an event's counter if it can be read at once.
fn read_now(event: BorrowedFd<'_>) -> Result<(), Errno> {
    /// Reads at the file's own position: events have no other.
    const NO_OFFSET: u64 = u64::MAX;
    let mut counter = [0; 8];
    let mut buffers = [IoSliceMut::new(&mut counter)];
    preadv2(event, &mut buffers, NO_OFFSET, ReadWriteFlags::NOWAIT).map(drop)
}

/// Whether it can be read or written at once.
fn is_ready(fd: &impl AsRawFd, how: PollFlags) -> bool {
    // SAFETY: the descriptor is open as long as `fd` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let now = Timespec::default();
    poll(&mut [PollFd::from_borrowed_fd(fd, how)], Some(&now)) == Ok(1)
}

#[cfg(test)]
mod tests;
