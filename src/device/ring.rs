//! A ring as the front-end sets it up, starts and stops it.
//!
//! A ring is *started* by its kick and *enabled* by a message of its own. While it is
//! both it runs, and has a thread. The ring itself is the library's type, whose lock
//! hands it from the thread that serves messages to the queue thread and back: only
//! one of the two uses it at a time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use vhost_user_backend::{VringMutex, VringT};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::GuestAddressSpace;

use super::continuity::{Continuity, ContinuityError};
use super::event::Event;
use super::inflight::{InFlightQueue, Recovery};
use super::mailbox::{Mail, Parked};
use super::memory::{Memory, SharedMemory};
use super::queue_thread::{QueueThread, Start};
use super::ratelimit::guest_log;
use super::ring_size::RingSizes;
use super::worker::Events;
use super::{BlockDevice, MIN_QUEUE_SIZE, config};
use crate::storage::Disk;

/// What a ring cannot be or do.
#[derive(Debug, Error)]
pub(super) enum RingError {
    #[error(
        "a queue size of {size} is not possible; powers of two from {MIN_QUEUE_SIZE} to {max} are"
    )]
    Size { size: u32, max: u16 },
    #[error("it cannot be changed while it runs")]
    Running,
    #[error("its index cannot be {0}")]
    Index(u32),
    #[error("its addresses are not possible: {0}")]
    Addresses(QueueError),
    #[error("it does not lie in the memory that the front-end shares: {0}")]
    OutsideMemory(QueueError),
    #[error("its thread cannot be started: {0}")]
    Thread(io::Error),
    #[error("its {size} descriptors are more than the in-flight region has entries for")]
    Region { size: u16 },
    #[error("the in-flight region has no part for it")]
    NoPart,
    #[error(transparent)]
    Continuity(#[from] ContinuityError),
}

/// What all rings of a connection share.
pub(super) struct Surroundings<'a, D: Disk> {
    pub device: &'a Arc<BlockDevice<D>>,
    pub memory: &'a Arc<SharedMemory>,
    /// What the driver has accepted.
    pub acked_features: u64,
    pub ring_sizes: &'a RingSizes,
    /// Whether the driver has used any ring before it starts now.
    pub is_under_way: bool,
    pub continuity: &'a mut Continuity<D>,
}

impl<D: Disk> Surroundings<'_, D> {
    fn has_event_idx(&self) -> bool {
        self.acked_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
    }

    /// A ring of so many descriptors has started.
    fn look_at_size(&self, size: u16) {
        let seg_max = config::seg_max(self.device.queue_size());
        let warning = self.ring_sizes.started(size, self.acked_features, seg_max);
        if let Some(warning) = warning {
            guest_log!(self.device.host_limit(), Warn, "{warning}");
        }
    }
}

/// See the module's text.
pub(super) struct Ring {
    index: usize,
    max_size: u16,
    vring: VringMutex<Memory>,
    /// There as long as the ring is started.
    kick: Option<Arc<Event>>,
    call: Option<Arc<Event>>,
    error: Option<Arc<Event>>,
    enabled: bool,
    /// There as long as the ring runs.
    thread: Option<QueueThread>,
}

impl Ring {
    /// A stopped one, of up to `max_size` descriptors.
    ///
    /// # Errors
    /// If that is no power of two.
    pub fn new(index: usize, max_size: u16, memory: Memory) -> Result<Self, QueueError> {
        Ok(Self {
            index,
            max_size,
            vring: VringMutex::new(memory, max_size)?,
            kick: None,
            call: None,
            error: None,
            enabled: false,
            thread: None,
        })
    }

    /// Whether requests are being served.
    pub fn is_running(&self) -> bool {
        self.thread.is_some()
    }

    /// Whether the driver has used it before it starts next.
    pub fn is_under_way(&self) -> bool {
        !self.is_running() && self.vring.queue_next_avail() != 0
    }

    /// Sets the number of descriptors.
    pub fn set_size(&mut self, size: u32) -> Result<(), RingError> {
        let max = self.max_size;
        let fits = |&size: &u16| size.is_power_of_two() && (MIN_QUEUE_SIZE..=max).contains(&size);
        let fitting = u16::try_from(size).ok().filter(fits);
        let size = fitting.ok_or(RingError::Size { size, max })?;
        self.stopped()?.set_queue_size(size);
        Ok(())
    }

    /// Sets the guest addresses of table, available and used ring. A ring that runs
    /// stays where it is: the message comes then to turn logging on or off.
    pub fn set_addresses(&mut self, table: u64, avail: u64, used: u64) -> Result<(), RingError> {
        if self.is_running() {
            return Ok(());
        }
        self.vring
            .set_queue_info(table, avail, used)
            .map_err(RingError::Addresses)
    }

    /// Sets the available entry to go on at.
    pub fn set_next_avail(&mut self, index: u32) -> Result<(), RingError> {
        let next = u16::try_from(index).map_err(|_| RingError::Index(index))?;
        self.stopped()?.set_queue_next_avail(next);
        Ok(())
    }

    fn stopped(&self) -> Result<&VringMutex<Memory>, RingError> {
        if self.is_running() {
            return Err(RingError::Running);
        }
        Ok(&self.vring)
    }

    /// Starts the ring, or gives it another event.
    pub fn set_kick<D: Disk>(
        &mut self,
        kick: Event,
        surroundings: &mut Surroundings<'_, D>,
    ) -> Result<(), RingError> {
        let kick = Arc::new(kick);
        self.kick = Some(Arc::clone(&kick));
        match &self.thread {
            Some(thread) => thread.post(Mail::Kick(kick)),
            None => self.run_if_possible(surroundings)?,
        }
        Ok(())
    }

    pub fn set_call(&mut self, call: Option<Event>) {
        self.call = call.map(Arc::new);
        match (&self.thread, &self.call) {
            (Some(thread), call) => thread.post(Mail::Call(call.clone())),
            // What came to the one before may have come too late for the driver.
            (None, Some(call)) => call.signal(),
            (None, None) => {}
        }
    }

    pub fn set_error(&mut self, error: Option<Event>) {
        self.error = error.map(Arc::new);
        if let Some(thread) = &self.thread {
            thread.post(Mail::Error(self.error.clone()));
        }
    }

    pub fn enable<D: Disk>(
        &mut self,
        surroundings: &mut Surroundings<'_, D>,
    ) -> Result<(), RingError> {
        self.enabled = true;
        self.run_if_possible(surroundings)
    }

    /// Answers all requests of the ring, and takes no more: this is all that
    /// cloud-hypervisor does to pause a disk.
    pub fn disable(&mut self) {
        self.enabled = false;
        self.halt(Parked::Fail);
    }

    /// The same, and forgets the events. Returns the entry to go on at.
    pub fn stop(&mut self) -> u16 {
        self.halt(Parked::Fail);
        self.kick = None;
        self.call = None;
        self.vring.queue_next_avail()
    }

    /// The table of guest memory has changed.
    pub fn renew_memory(&self) {
        if let Some(thread) = &self.thread {
            thread.post(Mail::Memory);
        }
    }

    /// Begins to answer what is in flight; [`Self::halt`] waits for the end.
    pub fn ask_to_halt(&self, parked: Parked) {
        if let Some(thread) = &self.thread {
            thread.ask_to_stop(parked);
        }
    }

    /// Answers what is in flight and ends the thread.
    pub fn halt(&mut self, parked: Parked) {
        self.ask_to_halt(parked);
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }

    fn run_if_possible<D: Disk>(
        &mut self,
        surroundings: &mut Surroundings<'_, D>,
    ) -> Result<(), RingError> {
        let (Some(kick), true, None) = (&self.kick, self.enabled, &self.thread) else {
            return Ok(());
        };
        let used = self.vring.queue_used_idx();
        let used = used.map_err(RingError::OutsideMemory)?;
        self.renew_queue(used, surroundings.has_event_idx());
        // Whatever the front-end says of the index.
        let is_under_way = surroundings.is_under_way || used != 0;
        surroundings.continuity.admit(is_under_way)?;
        let (in_flight, recovery) = self.recover(used, surroundings)?;
        // Before it has a thread, which keeps the ring to itself.
        surroundings.look_at_size(self.vring.get_ref().get_queue().size());
        let events = Events {
            kick: Arc::clone(kick),
            call: self.call.clone(),
            error: self.error.clone(),
        };
        let thread = QueueThread::start(Start {
            index: self.index,
            device: surroundings.device,
            memory: surroundings.memory,
            vring: self.vring.clone(),
            events,
            in_flight,
            recovery,
        });
        self.thread = Some(thread.map_err(RingError::Thread)?);
        Ok(())
    }

    /// Finds out what another process has left, and where to go on.
    fn recover<D: Disk>(
        &self,
        used: u16,
        surroundings: &Surroundings<'_, D>,
    ) -> Result<(Option<InFlightQueue>, Recovery), RingError> {
        let Some(mut in_flight) = surroundings.continuity.queue(self.index) else {
            if surroundings.continuity.is_kept() {
                return Err(RingError::NoPart);
            }
            return Ok((None, Recovery::default()));
        };
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        let size = queue.size();
        if size > in_flight.entries() {
            return Err(RingError::Region { size });
        }
        let map = surroundings.memory.atomic().memory().into_inner();
        let avail = queue.avail_idx(&*map, Ordering::Acquire);
        let avail = avail.map_err(RingError::OutsideMemory)?.0;
        let recovery = in_flight.recover(size, used, avail);
        if recovery.is_stale {
            guest_log!(
                surroundings.device.host_limit(),
                Warn,
                "queue {}: the in-flight region does not fit the ring and is not used: requests \
                 that were under way may never be answered",
                self.index
            );
        } else if recovery.is_old {
            // Whatever the front-end believes, see `InFlightQueue`.
            queue.set_next_avail(used.wrapping_add(recovery.heads.len() as u16));
        }
        Ok((Some(in_flight), recovery))
    }

    /// A ring starts with nothing to signal. The library's queue counts the used
    /// entries since the last signal, but without EVENT_IDX never from 0 again:
    /// firmware that does without would leave Linux a count that hides a signal.
    fn renew_queue(&self, next_used: u16, event_idx: bool) {
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        queue.set_next_used(next_used);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if let Ok(fresh) = Queue::try_from(queue.state()) {
            *queue = fresh;
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.halt(Parked::Drop);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::GuestMap;
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryAtomic};

    fn ring() -> Ring {
        let map = GuestMap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let mut ring = Ring::new(0, 16, GuestMemoryAtomic::new(map)).unwrap();
        ring.set_addresses(0x1000, 0x2000, 0x3000).unwrap();
        ring
    }

    #[test]
    fn a_restarted_ring_has_nothing_left_to_signal() {
        let ring = ring();
        ring.renew_queue(0, false);
        // Firmware without EVENT_IDX: 65,530 used entries, each signalled.
        for _ in 0..65_530 {
            ring.vring.add_used(0, 0).unwrap();
            assert!(ring.vring.needs_notification().unwrap());
        }
        ring.renew_queue(0, true);
        // The next driver uses it and waits for the first of ten entries. Counted on
        // from the old entries, they would be -6 to 4, and the first hidden.
        for _ in 0..10 {
            ring.vring.add_used(0, 0).unwrap();
        }
        assert!(ring.vring.needs_notification().unwrap());
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let mut ring = ring();
        for size in [0, 1, 2, 3, 12, 32, 1 << 16, 1 << 20] {
            let error = ring.set_size(size).unwrap_err();
            assert!(matches!(error, RingError::Size { .. }), "{error}");
        }
        for size in [4, 8, 16] {
            ring.set_size(size).unwrap();
            assert_eq!(u32::from(ring.vring.get_ref().get_queue().size()), size);
        }
    }
}
