//! One virtqueue's thread.
//!
//! It takes chains from the ring and puts answers back as long as there are any,
//! and tells the driver meanwhile that it need not kick. Then it sleeps in the
//! library's event loop, which watches the kick, the engine's descriptors and the
//! [`Gate`]. Everything here runs on the queue's own thread.

use std::ffi::CString;
use std::fmt::Display;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use smallvec::SmallVec;
use vhost_user_backend::VringT;
use virtio_queue::{QueueOwnedT, QueueT};

use super::BlockDevice;
use super::gate::{Gate, Order, Parked};
use super::memory::{QueueMemory, SharedMemory};
use super::ratelimit::guest_log;
use super::request;
use super::requests::{Requests, Used};
use super::spin::Spin;
use super::vring::Vring;
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
    /// The ring is stopped, disabled, or makes no sense.
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

/// The state of one queue thread.
pub(super) struct Worker<D: Disk> {
    index: usize,
    device: Arc<BlockDevice<D>>,
    gate: Arc<Gate>,
    memory: QueueMemory,
    requests: Requests<D>,
    /// Whether [`Self::open`] has found the ring running. Nothing is taken before.
    in_use: bool,
    spin: Spin,
    named: bool,
}

impl<D: Disk> Worker<D> {
    pub fn new(
        index: usize,
        device: Arc<BlockDevice<D>>,
        gate: Arc<Gate>,
        memory: Arc<SharedMemory>,
    ) -> Self {
        Self {
            index,
            gate,
            memory: QueueMemory::new(memory),
            requests: Requests::new(index, Arc::clone(&device)),
            in_use: false,
            spin: Spin::new(device.longest_poll()),
            device,
            named: false,
        }
    }

    /// Opens the engine's side when the ring is first used: a ring that no driver
    /// enables costs next to nothing. Returns the descriptors to be watched from
    /// now on; none if it was open.
    ///
    /// # Errors
    /// Any of [`Engine::queue`](crate::ploop::Engine::queue). Requests that are
    /// served all the same fail.
    pub fn open(&mut self, vring: &Vring) -> io::Result<SmallVec<[RawFd; 2]>> {
        if self.requests.is_open() || !is_running(vring) {
            return Ok(SmallVec::new());
        }
        // Before the first request is taken: who stops the ring from now on waits
        // until this thread has drained it.
        vring.link(&self.gate);
        self.gate.set_active();
        self.in_use = true;
        self.requests.open()
    }

    /// Gives the engine's side back. Nothing may be in flight.
    pub fn close(&mut self) {
        self.requests.close();
    }

    /// Names the thread after its queue; the library names all of them alike.
    pub fn name_thread(&mut self) {
        if std::mem::replace(&mut self.named, true) {
            return;
        }
        // The name is for people who look at the process: no matter if it fails.
        if let Ok(name) = CString::new(format!("vq{}", self.index)) {
            let _ = rustix::thread::set_name(&name);
        }
    }

    /// Works until there is nothing to do at the moment.
    pub fn serve(&mut self, vring: &Vring) -> Next {
        self.spin.wake();
        let mut must_find_some = false;
        loop {
            if self.gate.has_order() && self.obey(vring) == Next::End {
                return Next::End;
            }
            let taken = self.take(vring);
            self.requests.poll(&mut self.memory);
            let answered = self.is_time_to_answer(taken) && self.answer(vring);
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
                    self.complain("the available ring cannot be read");
                    return Next::Sleep;
                }
                Taken::Nothing if self.ask_for_kicks(vring) => must_find_some = true,
                _ if !self.requests.may_sleep() => {}
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

    /// Carries out the order that the gate holds.
    fn obey(&mut self, vring: &Vring) -> Next {
        let Some((order, receipt)) = self.gate.take() else {
            return Next::Sleep;
        };
        let (parked, next) = match order {
            Order::Drain => (Parked::Fail, Next::Sleep),
            Order::Close(parked) => (parked, Next::End),
        };
        self.requests.drain(&mut self.memory, parked);
        self.answer(vring);
        if next == Next::End {
            self.close();
        }
        self.gate.settle(order, receipt);
        next
    }

    /// Takes what the driver has made available and hands it to the engine.
    fn take(&mut self, vring: &Vring) -> Taken {
        self.memory.refresh();
        let limits = self.device.limits();
        let mut state = vring.get_mut();
        // A ring that started after `open` has looked comes with an event of its own.
        if !self.in_use || !state.is_enabled() || !state.get_queue().ready() {
            return Taken::Unusable;
        }
        let ring = state.get_queue_mut();
        let ring_size = ring.size();
        let map = self.memory.map();
        // This saves kicks; all works without.
        let _ = ring.disable_notification(map);
        let mut chains = match ring.iter(map) {
            Ok(chains) => chains,
            Err(error) => {
                self.complain(format_args!("the available ring makes no sense: {error}"));
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
    fn answer(&mut self, vring: &Vring) -> bool {
        if self.requests.used() == 0 {
            return false;
        }
        let mut state = vring.get_mut();
        let ring = state.get_queue_mut();
        let map = self.memory.map();
        let mut result = Ok(());
        for Used { head, len } in self.requests.take_used() {
            result = result.and(ring.add_used(map, head, len));
        }
        let signalled = match ring.needs_notification(map) {
            Ok(false) => Ok(()),
            Ok(true) | Err(_) => vring.signal(&state),
        };
        drop(state);
        if let Err(error) = result {
            self.complain(format_args!("the used ring cannot be written: {error}"));
        }
        if let Err(error) = signalled {
            self.complain(format_args!("the driver cannot be signalled: {error}"));
        }
        true
    }

    /// Asks the driver to kick from now on. Returns whether there is something in
    /// the ring already.
    fn ask_for_kicks(&self, vring: &Vring) -> bool {
        let mut state = vring.get_mut();
        state
            .get_queue_mut()
            .enable_notification(self.memory.map())
            .unwrap_or(false)
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

/// Whether requests may be taken from the ring.
fn is_running(vring: &Vring) -> bool {
    let state = vring.get_ref();
    state.is_enabled() && state.get_queue().ready()
}
