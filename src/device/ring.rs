//! A ring as the front-end sets it up, starts and stops it.
//!
//! A ring is *started* by its kick and *enabled* by a message of its own. While it is
//! both it runs, and has a thread. The ring itself is the library's type, whose lock
//! hands it from the thread that serves messages to the queue thread and back: only
//! one of the two uses it at a time.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use vhost_user_backend::{VringMutex, VringT};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::continuity::{Continuity, ContinuityError};
use super::dirty_log::{Log, Marks};
use super::event::{Event, EventError};
use super::gate::Gate;
use super::inflight::{InFlightQueue, Recovery};
use super::mailbox::{Mail, Parked};
use super::memory::{GuestMap, Memory, SharedMemory};
use super::queue_thread::{QueueThread, Start};
use super::ratelimit::{debug_log, guest_log};
use super::requests::Left;
use super::ring_size::RingSizes;
use super::signalled::Signalled;
use super::suspended::RingState;
use super::worker::Events;
use super::{BlockDevice, MIN_QUEUE_SIZE, config};
use crate::storage::Disk;

/// What a ring cannot be or do.
#[derive(Debug, Error)]
pub(super) enum RingError {
    #[error(
        "a queue size of {size} is not supported: it must be a power of two from {MIN_QUEUE_SIZE} to {max}"
    )]
    Size { size: u32, max: u16 },
    #[error("it cannot be changed while it runs")]
    Running,
    #[error("index {0} is out of range")]
    Index(u32),
    #[error("its addresses are invalid: {0}")]
    Addresses(QueueError),
    #[error("it does not lie in the memory that the front-end shares: {0}")]
    OutsideMemory(QueueError),
    #[error("its thread cannot be started: {0}")]
    Thread(io::Error),
    #[error("the in-flight region has no part for it")]
    NoPart,
    #[error("it was handed over with requests that it cannot have")]
    ForeignRequests,
    #[error(transparent)]
    Continuity(#[from] ContinuityError),
    #[error(transparent)]
    Event(#[from] EventError),
}

/// What all rings of a connection share.
pub(super) struct Surroundings<'a, D: Disk> {
    pub device: &'a Arc<BlockDevice<D>>,
    pub memory: &'a Arc<SharedMemory>,
    /// What the driver has accepted.
    pub acked_features: u64,
    pub ring_sizes: &'a RingSizes,
    /// Where what is written to guest memory is marked, while it is.
    pub log: Option<&'a Arc<Log>>,
    /// Whether the driver has used any ring before it starts now.
    pub is_under_way: bool,
    pub continuity: &'a mut Continuity<D>,
    /// What threads that start now wait at.
    pub gate: Option<&'a Arc<Gate>>,
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
    /// Where its parts lie that runs now or has run last, and their lengths: its thread keeps
    /// the ring to itself.
    extents: [(u64, usize); 3],
    /// Where the log of written memory has the used ring, if it is to be marked there.
    used_ring_in_log: Option<u64>,
    /// By which threads signal, of all rings of the connection.
    signalled: Arc<Signalled>,
    /// The driver may have missed what the last call was signalled.
    owes_signal: bool,
    /// What the last thread could not bring to its end: not for a ring that lies
    /// elsewhere or goes on elsewhere, which is another one. What it had taken and not done
    /// counts only for a front-end without an in-flight region, and only where the
    /// connection goes on.
    left: Left,
}

impl Ring {
    /// A stopped one, of up to `max_size` descriptors.
    ///
    /// # Errors
    /// If that is no power of two.
    pub fn new(
        index: usize,
        max_size: u16,
        memory: Memory,
        signalled: Arc<Signalled>,
    ) -> Result<Self, QueueError> {
        Ok(Self {
            index,
            max_size,
            vring: VringMutex::new(memory, max_size)?,
            kick: None,
            call: None,
            error: None,
            enabled: false,
            thread: None,
            extents: [(0, 0); 3],
            used_ring_in_log: None,
            signalled,
            owes_signal: false,
            left: Left::default(),
        })
    }

    /// Whether requests are being served.
    pub fn is_running(&self) -> bool {
        self.thread.is_some()
    }

    /// Whether all parts of it are in this memory, if it runs.
    pub fn is_there(&self, map: &GuestMap) -> bool {
        let is_there = |&(at, len): &(u64, usize)| map.check_range(GuestAddress(at), len);
        !self.is_running() || self.extents.iter().all(is_there)
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
        let ring = self.stopped()?;
        let before = ring.get_ref().get_queue().size();
        ring.set_queue_size(size);
        if size != before {
            // They were heads of another ring.
            self.left = Left::default();
        }
        Ok(())
    }

    /// Sets the guest addresses of table, available and used ring. A ring that runs
    /// stays where it is: the message comes then to turn logging on or off.
    pub fn set_addresses(&mut self, table: u64, avail: u64, used: u64) -> Result<(), RingError> {
        if self.is_running() {
            return Ok(());
        }
        let places = self.places();
        self.vring
            .set_queue_info(table, avail, used)
            .map_err(RingError::Addresses)?;
        if self.places() != places {
            self.left = Left::default();
        }
        Ok(())
    }

    fn places(&self) -> [u64; 3] {
        let state = self.vring.get_ref();
        let queue = state.get_queue();
        [queue.desc_table(), queue.avail_ring(), queue.used_ring()]
    }

    /// Says where the log of written memory has the used ring, if it is to be marked there.
    pub fn set_used_ring_in_log(&mut self, address: Option<u64>) {
        self.used_ring_in_log = address;
    }

    fn marks(&self, log: Option<&Arc<Log>>) -> Option<Marks> {
        log.map(|log| Marks {
            log: Arc::clone(log),
            used_ring: self.used_ring_in_log,
        })
    }

    /// Lets the ring mark what it writes there from now on, or nowhere;
    /// [`Self::wait_for_marks`] waits until it does.
    pub fn set_log(&mut self, log: Option<&Arc<Log>>) {
        let marks = self.marks(log);
        if let Some(thread) = &mut self.thread {
            thread.set_marks(marks);
        }
    }

    /// See [`Self::set_log`].
    pub fn wait_for_marks(&self) {
        if let Some(thread) = &self.thread {
            thread.wait_for_marks(&self.signalled);
        }
    }

    /// Sets the available entry to go on at.
    pub fn set_next_avail(&mut self, index: u32) -> Result<(), RingError> {
        let next = u16::try_from(index).map_err(|_| RingError::Index(index))?;
        let vring = self.stopped()?;
        let is_another = vring.queue_next_avail() != next;
        vring.set_queue_next_avail(next);
        if is_another {
            self.left = Left::default();
        }
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
        self.call = self.shared(call);
        match &self.thread {
            Some(thread) => thread.post(Mail::Call(self.call.clone())),
            // What came to the one before may have come too late for the driver. Only a
            // queue's thread signals: nobody who has messages to serve may block.
            None => self.owes_signal = true,
        }
    }

    /// One that threads may signal by.
    fn shared(&self, event: Option<Event>) -> Option<Arc<Event>> {
        let event = event.map(Arc::new);
        event.inspect(|event| self.signalled.add(event))
    }

    pub fn set_error(&mut self, error: Option<Event>) {
        self.error = self.shared(error);
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

    /// The device is reset: nobody waits for anything.
    pub fn reset(&mut self) {
        self.disable();
        self.stop();
        self.left = Left::default();
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
            self.left = thread.join(&self.signalled);
        }
    }

    /// Copies of its events' descriptors, so that nothing is missing when it is
    /// [drained](Self::export).
    pub fn events(&self) -> io::Result<[Option<OwnedFd>; 3]> {
        let copy = |event: &Option<Arc<Event>>| {
            let event = event.as_ref();
            event.map(|event| event.as_fd().try_clone_to_owned())
        };
        let [kick, call, error] = [&self.kick, &self.call, &self.error].map(copy);
        Ok([kick.transpose()?, call.transpose()?, error.transpose()?])
    }

    /// What another process has to know of it, once it was halted.
    pub fn export(&mut self, [kick, call, error]: [Option<OwnedFd>; 3]) -> RingState {
        let state = self.vring.get_ref().get_queue().state();
        let left = std::mem::take(&mut self.left);
        RingState {
            size: state.size,
            table: state.desc_table,
            avail: state.avail_ring,
            used: state.used_ring,
            next_avail: state.next_avail,
            used_ring_in_log: self.used_ring_in_log,
            is_enabled: self.enabled,
            kick,
            call,
            error,
            unanswered: left.unanswered,
            unfinished: left.unfinished,
        }
    }

    /// Makes a new ring what another one was. It does not run yet.
    pub fn restore(&mut self, state: RingState) -> Result<(), RingError> {
        let event = |fd: Option<OwnedFd>| fd.map(|fd| Event::new(File::from(fd))).transpose();
        self.set_size(state.size.into())?;
        self.set_addresses(state.table, state.avail, state.used)?;
        self.set_next_avail(state.next_avail.into())?;
        self.used_ring_in_log = state.used_ring_in_log;
        self.enabled = state.is_enabled;
        self.kick = event(state.kick)?.map(Arc::new);
        // Nobody knows whether the last signal has been seen; one more does no harm.
        self.set_call(event(state.call)?);
        self.set_error(event(state.error)?);
        let heads = state.unanswered.iter().map(|used| &used.head);
        let heads = heads.chain(&state.unfinished);
        if heads.clone().count() > state.size.into() || heads.max() >= Some(&state.size) {
            return Err(RingError::ForeignRequests);
        }
        self.left = Left {
            unanswered: state.unanswered,
            unfinished: state.unfinished,
        };
        Ok(())
    }

    /// Whether it runs as soon as it is enabled.
    pub fn has_kick(&self) -> bool {
        self.kick.is_some()
    }

    /// Whether it runs as soon as it has a kick.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Whether it is to run.
    pub fn is_started(&self) -> bool {
        self.kick.is_some() && self.enabled
    }

    /// Starts the ring if it is both started and enabled and does not run yet.
    pub fn run_if_possible<D: Disk>(
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
        let (in_flight, mut recovery) = self.recover(used, surroundings)?;
        // Before it has a thread, which keeps the ring to itself.
        let size = self.vring.get_ref().get_queue().size();
        self.extents = extents(size, self.places());
        surroundings.look_at_size(size);
        debug_log!(
            "queue {} starts: {size} descriptors, at {} of the available ring, {used} used",
            self.index,
            self.vring.queue_next_avail()
        );
        let events = Events {
            kick: Arc::clone(kick),
            call: self.call.clone(),
            error: self.error.clone(),
            owes_signal: std::mem::take(&mut self.owes_signal),
        };
        let mut left = std::mem::take(&mut self.left);
        if in_flight.is_some() {
            // The region has them as well.
            left = Left::default();
        } else if !left.unfinished.is_empty() {
            recovery = Recovery {
                heads: left.unfinished,
                is_old: true,
                is_stale: false,
            };
        }
        surroundings.device.stops().are_over();
        let thread = QueueThread::start(Start {
            index: self.index,
            device: surroundings.device,
            memory: surroundings.memory,
            vring: self.vring.clone(),
            events,
            in_flight,
            recovery,
            unanswered: left.unanswered,
            marks: self.marks(surroundings.log),
            gate: surroundings.gate.map(Arc::clone),
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
            // A driver that takes more than it was offered (SLOF does).
            in_flight.forget();
            guest_log!(
                surroundings.device.host_limit(),
                Warn,
                "queue {}: its {size} descriptors are more than the {} that the in-flight region \
                 has entries for: requests that are under way when this process dies may never \
                 be answered",
                self.index,
                in_flight.entries()
            );
            return Ok((None, Recovery::default()));
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
        } else {
            // Whatever the front-end believes, see `InFlightQueue`. In a region that is new, too:
            // cloud-hypervisor says the available index of a guest that has come from
            // elsewhere, and what is not answered by then nobody else has.
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

/// Table, available and used ring with their lengths (virtio 1.2, 2.7).
fn extents(size: u16, [table, avail, used]: [u64; 3]) -> [(u64, usize); 3] {
    let size = usize::from(size);
    [
        (table, 16 * size),
        (avail, 6 + 2 * size),
        (used, 6 + 8 * size),
    ]
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.halt(Parked::Drop);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::anonymous;
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryAtomic};

    fn ring() -> Ring {
        let map = anonymous(GuestAddress(0), 0x10_0000);
        let mut ring = Ring::new(0, 16, GuestMemoryAtomic::new(map), Arc::default()).unwrap();
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
