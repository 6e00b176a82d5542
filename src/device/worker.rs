//! One virtqueue's work, between ring and engine.
//!
//! It takes chains from the ring and puts answers back as long as there are any,
//! and tells the driver meanwhile that it need not kick. Then its thread sleeps until
//! there is a kick, something from the engine, or mail. Everything here runs on the
//! queue's own thread.

use std::fmt::Display;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use smallvec::SmallVec;
use thiserror::Error;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, GuestAddress, GuestRegionCollectionError, GuestRegionMmap, MmapRegion};

use super::BlockDevice;
use super::event::Event;
use super::inflight::InFlightQueue;
use super::mailbox::{Mail, Mailbox};
use super::memory::{GuestMap, QueueMemory};
use super::ratelimit::guest_log;
use super::request;
use super::requests::{Requests, Used};
use super::spin::Spin;
use crate::storage::Disk;

/// How many chains are taken before they are submitted. Answers that come together
/// bring new requests that come together: submitted in parts, the first are with the
/// device before the last are parsed, and do not all end together again.
const SUBMIT_BATCH: usize = 8;

/// How many answers are kept back at most while there is more to take, if the driver
/// has a CPU to work on them meanwhile. If it has none, a ring full of them may be.
const ANSWER_BATCH: usize = 16;

/// How many bytes make a batch of either kind full, however few the requests are. I/O
/// that ends within its submission is a copy of so much, and the driver waits for it.
const BATCH_BYTES: u64 = 64 << 10;

/// What a look at the available ring has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// A chain or a few, or a reason to look again at once.
    Some,
    /// Nothing is there.
    Nothing,
    /// As many requests are in flight as may be.
    Full,
    /// The available ring is invalid.
    Unusable,
}

/// Whether the thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for the next event.
    Sleep,
    /// End the thread.
    End,
}

/// By which events a ring and its driver tell each other of news.
#[derive(Debug)]
pub(super) struct Events {
    /// The driver's word for us.
    pub kick: Arc<Event>,
    /// Ours for the driver.
    pub call: Option<Arc<Event>>,
    /// Ours for the front-end, about the ring itself.
    pub error: Option<Arc<Event>>,
}

/// The state of one queue thread.
pub(super) struct Worker<D: Disk> {
    index: usize,
    device: Arc<BlockDevice<D>>,
    mailbox: Arc<Mailbox>,
    events: Events,
    memory: QueueMemory,
    requests: Requests<D>,
    /// Where it is noted what is in flight, for a process after this one.
    in_flight: Option<InFlightQueue>,
    /// Requests that another process had taken are under way. One may have been done
    /// before, and must not be done again after a newer one: nothing is taken until then.
    is_resuming: bool,
    spin: Spin,
}

impl<D: Disk> Worker<D> {
    pub fn new(
        device: Arc<BlockDevice<D>>,
        mailbox: Arc<Mailbox>,
        events: Events,
        memory: QueueMemory,
        requests: Requests<D>,
        in_flight: Option<InFlightQueue>,
    ) -> Self {
        Self {
            index: requests.queue_index(),
            mailbox,
            events,
            memory,
            requests,
            in_flight,
            is_resuming: false,
            spin: Spin::new(device.longest_poll()),
            device,
        }
    }

    /// What there may be something to do for when it is readable: first the kick.
    pub fn fds(&self) -> SmallVec<[RawFd; 2]> {
        self.requests.fds()
    }

    /// See [`Events::kick`].
    pub fn kick(&self) -> &Event {
        &self.events.kick
    }

    /// Starts again what another process had taken from the ring and not answered.
    pub fn resume(&mut self, ring: &Queue, heads: &[u16]) {
        self.is_resuming = true;
        if let Err(error) = self.take_again(ring, heads) {
            self.complain(format_args!("requests cannot be taken again: {error}"));
            self.tell_of_error();
        }
        // The one who died may have answered and not told.
        self.signal();
    }

    fn take_again(&mut self, ring: &Queue, heads: &[u16]) -> Result<(), ReplayError> {
        self.memory.refresh();
        let limits = self.device.limits();
        let (map, mut replay) = replay_ring(ring, self.memory.map(), heads)?;
        for chain in replay.iter(&map)? {
            let head = chain.head_index();
            // Not the map with the ring of our own in it: a request that points there
            // must not reach it.
            let map = self.memory.map();
            // SAFETY: the map is held until the engine has completed the request, and
            // then gone from it.
            match unsafe { request::parse(chain, map, &limits) } {
                Ok(request) => self.requests.accept(head, request, &self.memory),
                Err(rejected) => self.requests.reject(head, rejected, map),
            }
        }
        Ok(())
    }

    /// Works until there is nothing to do at the moment.
    pub fn serve(&mut self, ring: &mut Queue) -> Next {
        self.spin.wake();
        let mut must_find_some = false;
        loop {
            if self.mailbox.has_mail() && self.read_mail(ring) == Next::End {
                return Next::End;
            }
            let taken = self.take(ring);
            self.requests.poll(&mut self.memory);
            let answered = self.is_time_to_answer(taken) && self.answer(ring);
            match taken {
                Taken::Some => {
                    must_find_some = false;
                    self.spin.found();
                }
                _ if answered || self.requests.has_ready() => self.spin.found(),
                Taken::Nothing | Taken::Full if !must_find_some && self.spins() => {
                    std::hint::spin_loop();
                }
                Taken::Nothing if must_find_some => {
                    must_find_some = false;
                    self.complain("the available ring cannot be read");
                    self.tell_of_error();
                    // Only like this do mail and completions wake the thread.
                    if self.requests.may_sleep() && !self.mailbox.has_mail() {
                        return Next::Sleep;
                    }
                }
                Taken::Nothing if self.ask_for_kicks(ring) => must_find_some = true,
                _ if !self.requests.may_sleep() || self.mailbox.has_mail() => {}
                Taken::Nothing | Taken::Full | Taken::Unusable => {
                    if self.requests.in_flight() == 0 {
                        self.spin.sleep();
                    } else {
                        self.spin.break_off();
                    }
                    return Next::Sleep;
                }
            }
        }
    }

    /// Does what the mail asks for.
    fn read_mail(&mut self, ring: &mut Queue) -> Next {
        for mail in self.mailbox.take() {
            match mail {
                Mail::Kick(kick) => self.events.kick = kick,
                Mail::Call(call) => {
                    self.events.call = call;
                    // A signal to the one before may have come after the driver has
                    // looked at it for the last time.
                    self.signal();
                }
                Mail::Error(error) => self.events.error = error,
                Mail::Memory => self.memory.refresh(),
                Mail::Stop(parked) => {
                    self.requests.drain(&mut self.memory, parked);
                    self.answer(ring);
                    return Next::End;
                }
            }
        }
        Next::Sleep
    }

    /// Takes what the driver has made available and hands it to the engine.
    fn take(&mut self, ring: &mut Queue) -> Taken {
        self.memory.refresh();
        if self.is_resuming {
            if self.requests.in_flight() > 0 {
                return Taken::Full;
            }
            self.is_resuming = false;
        }
        let limits = self.device.limits();
        let ring_size = ring.size();
        let map = self.memory.map();
        // This saves kicks; all works without.
        let _ = ring.disable_notification(map);
        let mut chains = match ring.iter(map) {
            Ok(chains) => chains,
            Err(error) => {
                self.complain(format_args!("the available ring is invalid: {error}"));
                self.tell_of_error();
                return Taken::Unusable;
            }
        };
        // Looked at behind the available index: what was made available before then
        // may lie in memory that was there before then, and in no older.
        if self.memory.is_stale() {
            return Taken::Some;
        }
        let full = self.requests.load() + BATCH_BYTES;
        for count in 0..SUBMIT_BATCH {
            if self.requests.load() >= full {
                break;
            }
            if !self.requests.has_room(ring_size) {
                return if count == 0 { Taken::Full } else { Taken::Some };
            }
            let Some(chain) = chains.next() else {
                return if count == 0 {
                    Taken::Nothing
                } else {
                    Taken::Some
                };
            };
            let head = chain.head_index();
            if head >= ring_size {
                self.complain(format_args!("there is no descriptor {head}"));
                continue;
            }
            if let Some(in_flight) = &mut self.in_flight {
                in_flight.take(head);
            }
            // SAFETY: the map is held until the engine has completed the request,
            // and then gone from it.
            match unsafe { request::parse(chain, map, &limits) } {
                Ok(request) => self.requests.accept(head, request, &self.memory),
                Err(rejected) => self.requests.reject(head, rejected, map),
            }
        }
        Taken::Some
    }

    /// Whether what has ended is worth a signal now.
    fn is_time_to_answer(&self, taken: Taken) -> bool {
        let used = self.requests.used();
        let is_full = if self.device.has_cpus_to_spare() {
            used >= ANSWER_BATCH || self.requests.used_load() >= BATCH_BYTES
        } else {
            used >= usize::from(self.device.queue_size())
        };
        is_full || taken != Taken::Some
    }

    /// Whether to look on instead of sleeping. What is under way takes longer than
    /// the driver, and ends with a wake-up of its own.
    fn spins(&mut self) -> bool {
        self.requests.in_flight() == 0 && self.spin.goes_on()
    }

    /// Puts what has ended into the used ring, with one signal for all of it.
    /// Returns whether there was something.
    fn answer(&mut self, ring: &mut Queue) -> bool {
        if self.requests.used() == 0 {
            return false;
        }
        let map = self.memory.map();
        let mut result = Ok(());
        for Used { head, len } in self.requests.take_used() {
            let Some(in_flight) = &mut self.in_flight else {
                result = result.and(ring.add_used(map, head, len));
                continue;
            };
            in_flight.begin_answer(head);
            result = result.and(ring.add_used(map, head, len));
            in_flight.end_answer(head, ring.next_used());
        }
        if wants_signal(ring, map) {
            self.signal();
        }
        if let Err(error) = result {
            self.complain(format_args!("the used ring cannot be written: {error}"));
            self.tell_of_error();
        }
        true
    }

    fn signal(&self) {
        if let Some(call) = &self.events.call {
            call.signal();
        }
    }

    /// The driver will wait in vain: what it waits for is known to the front-end.
    fn tell_of_error(&self) {
        if let Some(error) = &self.events.error {
            error.signal();
        }
    }

    /// Asks the driver to kick from now on. Returns whether there is something in
    /// the ring already.
    fn ask_for_kicks(&self, ring: &mut Queue) -> bool {
        ring.enable_notification(self.memory.map()).unwrap_or(false)
    }

    fn complain(&self, what: impl Display) {
        guest_log!(
            self.device.guest_limit(),
            Warn,
            "queue {}: {what}",
            self.index
        );
    }
}

/// Why requests cannot be taken again.
#[derive(Debug, Error)]
enum ReplayError {
    #[error("there is no memory for it: {0}")]
    Memory(MmapRegionError),
    #[error("there is no address for it: {0}")]
    Address(GuestRegionCollectionError),
    #[error("{0}")]
    Ring(#[from] QueueError),
}

/// Where the guest has no memory.
const REPLAY_ADDRESS: GuestAddress = GuestAddress(1 << 62);

/// A ring with the same descriptors in which just these heads are available. Only the
/// guest's own ring knows its available heads, and it may have used their places again.
fn replay_ring(
    ring: &Queue,
    map: &GuestMap,
    heads: &[u16],
) -> Result<(GuestMap, Queue), ReplayError> {
    let count = heads.len() as u16;
    let words = [0, count].into_iter().chain(heads.iter().copied());
    let bytes: Vec<u8> = words.flat_map(u16::to_le_bytes).collect();
    // As long as an available ring of that size.
    let len = 2 * usize::from(ring.size()) + 6;
    let region = MmapRegion::new(len).map_err(ReplayError::Memory)?;
    let region = GuestRegionMmap::new(region, REPLAY_ADDRESS).ok_or(QueueError::AddressOverflow)?;
    let map = map
        .insert_region(Arc::new(region))
        .map_err(ReplayError::Address)?;
    map.write_slice(&bytes, REPLAY_ADDRESS)
        .map_err(QueueError::GuestMemory)?;
    let mut state = ring.state();
    state.avail_ring = REPLAY_ADDRESS.0;
    state.next_avail = 0;
    Ok((map, Queue::try_from(state)?))
}

/// Whether the driver wants to hear of what was put into the used ring.
fn wants_signal(ring: &mut Queue, map: &GuestMap) -> bool {
    if ring.event_idx_enabled() {
        return ring.needs_notification(map).unwrap_or(true);
    }
    // The used index comes before the look at what the driver wants.
    fence(Ordering::SeqCst);
    let flags = map.load::<u16>(GuestAddress(ring.avail_ring()), Ordering::Relaxed);
    flags.map_or(true, |flags| {
        u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
    })
}
