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
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use thiserror::Error;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestRegionCollectionError, MmapRegion};

use super::BlockDevice;
use super::dirty_log::Marks;
use super::event::Event;
use super::inflight::InFlightQueue;
use super::mailbox::{Mail, Mailbox, Parked};
use super::memory::{GuestMap, GuestRegion, QueueMemory};
use super::ratelimit::guest_log;
use super::request;
use super::requests::{Left, Requests, Used};
use super::spin::Spin;
use super::unshared::{self, Sharing};
use super::view::GuestView;
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

/// How long a ring that stops goes on with what another process had taken: as much as the
/// region names, which a hostile guest has filled.
const RESUMING_TIME: Duration = Duration::from_secs(2);

/// Layout of the used ring, in bytes (virtio 1.2, 2.7.8).
const USED_INDEX_OFFSET: u64 = 2;
const USED_HEADER_LEN: u64 = 4;
const USED_ELEMENT_LEN: u64 = 8;

/// What a look at the available ring has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// A chain or a few, or a reason to look again at once.
    Some,
    /// Nothing is there.
    Nothing,
    /// As many requests are in flight as may be, or none is to be begun now.
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
    /// The driver may have missed what was told to a call before this one.
    pub owes_signal: bool,
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
    /// While what is written to guest memory is logged.
    marks: Option<Marks>,
    /// Requests that another process had taken are under way or to be taken again. One may
    /// have been done before, and must not be done again after a newer one: nothing else is
    /// taken until then.
    is_resuming: bool,
    /// Those that are to be taken again, in order.
    to_resume: Vec<u16>,
    /// Nothing is to be begun for now: other rings stop.
    is_paused: bool,
    sharing: Sharing,
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
        marks: Option<Marks>,
    ) -> Self {
        Self {
            index: requests.queue_index(),
            mailbox,
            events,
            memory,
            requests,
            in_flight,
            marks,
            is_resuming: false,
            to_resume: Vec::new(),
            is_paused: false,
            sharing: Sharing::Open,
            spin: Spin::new(device.longest_poll()),
            device,
        }
    }

    /// What there may be something to do for when it is readable: first the kick.
    pub fn fds(&self) -> SmallVec<[RawFd; 2]> {
        self.requests.fds()
    }

    /// After which time there may be something to do in any case.
    pub fn pause(&self) -> Option<Duration> {
        if self.is_paused {
            // It may be over since it was looked at.
            return Some(self.device.stops().pause().unwrap_or_default());
        }
        let times = [self.sharing.due_in(), self.requests.pause()];
        times.into_iter().flatten().min()
    }

    /// The driver has kicked.
    pub fn kicked(&mut self) {
        self.sharing.kicked();
    }

    /// See [`Events::kick`].
    pub fn kick(&self) -> &Event {
        &self.events.kick
    }

    /// Before the first [`Self::serve`].
    pub fn begin(&mut self, ring: &Queue) {
        self.mark_used_ring(ring);
        if ring.next_avail() != 0 {
            self.sharing = Sharing::Settled;
        }
        if std::mem::take(&mut self.events.owes_signal) {
            self.signal();
        }
    }

    /// Will start again what another process had taken from the ring and not answered.
    pub fn resume(&mut self, heads: Vec<u16>) {
        self.is_resuming = true;
        self.to_resume = heads;
        // The one who died may have answered and not told.
        self.signal();
    }

    /// Goes on with that, as far as there is room. Returns whether something of it is left
    /// to be done.
    fn resumes(&mut self, ring: &Queue) -> bool {
        if !self.to_resume.is_empty()
            && let Err(error) = self.take_again(ring)
        {
            self.complain(format_args!("requests cannot be taken again: {error}"));
            self.tell_of_error();
            self.to_resume.clear();
        }
        self.is_resuming = !self.to_resume.is_empty() || self.requests.in_flight() > 0;
        self.is_resuming
    }

    /// Does what another process had taken: it cannot go back into the ring, and the guest
    /// may go on where nobody knows of it.
    fn finish_resuming(&mut self, ring: &mut Queue) {
        let start = Instant::now();
        self.requests.hold(false);
        while self.is_resuming && self.resumes(ring) && start.elapsed() < RESUMING_TIME {
            self.requests.poll(&mut self.memory);
            self.answer(ring);
            self.requests.wait_for_an_end();
        }
    }

    fn take_again(&mut self, ring: &Queue) -> Result<(), ReplayError> {
        let limits = self.requests.limits();
        let (map, mut replay) = replay_ring(ring, self.memory.map(), &self.to_resume)?;
        let mut taken = 0;
        for chain in replay.iter(&map)? {
            if !self.requests.has_room(ring.size()) {
                break;
            }
            taken += 1;
            let head = chain.head_index();
            // Not the map with the ring of our own in it: a request that points there
            // must not reach it.
            let map = self.memory.map();
            // SAFETY: the map is held until the engine has completed the request, and
            // then gone from it.
            match unsafe { request::parse(chain, map, &limits) } {
                Ok(request) => self.requests.accept(head, request, &self.memory),
                Err(rejected) => self.requests.reject(head, rejected),
            }
        }
        self.to_resume.drain(..taken);
        Ok(())
    }

    /// Works until there is nothing to do at the moment.
    pub fn serve(&mut self, ring: &mut Queue) -> Next {
        self.spin.wake();
        self.look_for_sharing(ring);
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

    fn look_for_sharing(&mut self, ring: &Queue) {
        if self.sharing == Sharing::Settled {
            return;
        }
        if self.sharing.looks_private(ring, self.memory.map()) && self.memory.doubt() {
            self.complain(unshared::WARNING);
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
                Mail::Marks(marks) => {
                    self.marks = marks;
                    // What was written there before counts, too.
                    self.mark_used_ring(ring);
                    self.mailbox.confirm();
                }
                Mail::Stop(parked) => {
                    self.drain(ring, parked);
                    self.answer(ring);
                    return Next::End;
                }
            }
        }
        Next::Sleep
    }

    /// Waits for what is in flight. What was taken last and not done goes back into the
    /// available ring, where its entries still are: the driver has had no use for their
    /// places, since it has at most as many chains outstanding as the ring has entries.
    fn drain(&mut self, ring: &mut Queue, parked: Parked) {
        self.requests.lift_limits();
        if parked != Parked::Drop {
            self.finish_resuming(ring);
        }
        // What another process had taken did not come from there.
        let may_give_back = !self.is_resuming;
        let memory = &mut self.memory;
        let given_back = self.requests.drain(memory, parked, may_give_back);
        // Some of it may have been done.
        self.mark_written(ring, &given_back);
        for head in given_back {
            ring.set_next_avail(ring.next_avail().wrapping_sub(1));
            if let Some(in_flight) = &mut self.in_flight {
                in_flight.give_back(head);
            }
        }
    }

    /// Takes what the driver has made available and hands it to the engine.
    fn take(&mut self, ring: &mut Queue) -> Taken {
        self.memory.refresh();
        self.is_paused = self.device.stops().pause().is_some();
        self.requests.hold(self.is_paused);
        if self.is_paused {
            return Taken::Full;
        }
        if self.is_resuming && self.resumes(ring) {
            return Taken::Full;
        }
        let limits = self.requests.limits();
        let ring_size = ring.size();
        let map = self.memory.view();
        // This saves kicks; all works without.
        let _ = ring.disable_notification(map);
        self.mark_used_ring(ring);
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
        let mut odd = None;
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
            self.sharing = Sharing::Settled;
            let head = chain.head_index();
            if head >= ring_size {
                odd = Some(head);
                break;
            }
            if let Some(in_flight) = &mut self.in_flight {
                in_flight.take(head);
            }
            // SAFETY: the map is held until the engine has completed the request,
            // and then gone from it.
            match unsafe { request::parse(chain, map, &limits) } {
                Ok(request) => self.requests.accept(head, request, &self.memory),
                Err(rejected) => self.requests.reject(head, rejected),
            }
        }
        if let Some(head) = odd {
            self.hand_back_odd(ring, head);
        }
        Taken::Some
    }

    /// Answers an entry of the available ring that is no descriptor's. The used index has
    /// to count it: else a ring that goes on behind what was answered finds it, or what
    /// came after it, again.
    fn hand_back_odd(&mut self, ring: &mut Queue, head: u16) {
        self.complain(format_args!("there is no descriptor {head}"));
        self.requests.skip();
        let put = put_back_odd(ring, self.memory.view(), head);
        self.mark_used_ring(ring);
        match put {
            Ok(()) => {
                if let Some(in_flight) = &mut self.in_flight {
                    in_flight.note_used(ring.next_used());
                }
                // The library has not counted it.
                self.signal();
            }
            Err(error) => {
                self.complain(format_args!("the used ring cannot be written: {error}"));
                self.tell_of_error();
            }
        }
    }

    /// What could not be brought to its end.
    pub fn into_left(self) -> Left {
        let mut left = self.requests.into_left();
        // Taken before this thread was there, and not again yet.
        left.unfinished.extend(self.to_resume);
        left
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
    /// Returns whether there was something. What cannot be put there, since the front-end
    /// has taken the ring's memory away for a while, is kept for the next time.
    fn answer(&mut self, ring: &mut Queue) -> bool {
        if self.requests.used() == 0 {
            return false;
        }
        if self.marks.is_some() {
            let answers = self.requests.to_put_back().iter();
            let heads: Vec<_> = answers.map(|answer| answer.head).collect();
            self.mark_written(ring, &heads);
        }
        let map = self.memory.view();
        let mut put = 0;
        let mut result = Ok(());
        for &Used { head, len } in self.requests.to_put_back() {
            if let Some(in_flight) = &mut self.in_flight {
                in_flight.begin_answer(head);
            }
            result = put_back(ring, map, head, len);
            if result.is_err() {
                break;
            }
            put += 1;
            if let Some(in_flight) = &mut self.in_flight {
                in_flight.end_answer(head, ring.next_used());
            }
        }
        self.requests.were_put_back(put);
        self.mark_used_ring(ring);
        if put > 0 && wants_signal(ring, map) {
            self.signal();
        }
        if let Err(error) = result {
            self.complain(format_args!("the used ring cannot be written: {error}"));
            self.tell_of_error();
        }
        put > 0
    }

    /// Marks all that requests with these heads can have written.
    fn mark_written(&self, ring: &Queue, heads: &[u16]) {
        let Some(marks) = self.marks.as_ref().filter(|_| !heads.is_empty()) else {
            return;
        };
        let marked = replay_ring(ring, self.memory.map(), heads).and_then(|(map, mut replay)| {
            for chain in replay.iter(&map)? {
                for descriptor in chain.writable() {
                    marks.mark(descriptor.addr().0, descriptor.len());
                }
            }
            Ok(())
        });
        if let Err(error) = marked {
            self.complain(format_args!("what was written cannot be logged: {error}"));
            self.tell_of_error();
        }
    }

    fn mark_used_ring(&self, ring: &Queue) {
        if let Some(marks) = &self.marks {
            marks.mark_used_ring(ring.size());
        }
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
        let is_there_more = ring.enable_notification(self.memory.view());
        self.mark_used_ring(ring);
        is_there_more.unwrap_or(false)
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

/// Puts one chain into the used ring. If it fails, nothing has happened.
fn put_back(ring: &mut Queue, map: &GuestView, head: u16, len: u32) -> Result<(), QueueError> {
    let before = ring.next_used();
    let result = ring.add_used(map, head, len);
    if result.is_err() {
        // The library may have counted an entry that the driver cannot see.
        ring.set_next_used(before);
    }
    result
}

/// The same for a head that the library does not let pass.
fn put_back_odd(ring: &mut Queue, map: &GuestView, head: u16) -> Result<(), GuestMemoryError> {
    let address = |offset| {
        let address = ring.used_ring().checked_add(offset);
        address
            .map(GuestAddress)
            .ok_or(GuestMemoryError::GuestAddressOverflow)
    };
    let slot = u64::from(ring.next_used() % ring.size());
    // A length of 0 in the upper half.
    let element = u64::from(head).to_le();
    map.write_obj(element, address(USED_HEADER_LEN + slot * USED_ELEMENT_LEN)?)?;
    let next = ring.next_used().wrapping_add(1);
    map.store(next.to_le(), address(USED_INDEX_OFFSET)?, Ordering::Release)?;
    ring.set_next_used(next);
    Ok(())
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
    let region = GuestRegion::new(region, REPLAY_ADDRESS, None);
    let region = region.ok_or(QueueError::AddressOverflow)?;
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
fn wants_signal(ring: &mut Queue, map: &GuestView) -> bool {
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
