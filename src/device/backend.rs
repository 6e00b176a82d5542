//! What the vhost-user library asks of a device: one connection's side of it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::EventSet;

use super::BlockDevice;
use super::config::{self, WRITEBACK_OFFSET};
use super::gate::{Gate, Order, Parked};
use super::memory::{GuestMap, SharedMemory};
use super::ratelimit::guest_log;
use super::vring::Vring;
use super::worker::{Next, Worker};
use crate::storage::Disk;

/// The event loop of one queue thread, which the library owns.
pub(super) type EventLoop<D> = VringEpollHandler<Arc<Backend<D>>>;

/// A queue thread, seen from the others.
struct Slot<D: Disk> {
    gate: Arc<Gate>,
    /// Locked by the queue thread alone, once per event.
    worker: Mutex<Worker<D>>,
    event_loop: OnceLock<Weak<EventLoop<D>>>,
}

/// One front-end's view of the device.
pub(super) struct Backend<D: Disk> {
    device: Arc<BlockDevice<D>>,
    memory: Arc<SharedMemory>,
    slots: Vec<Slot<D>>,
    acked_features: AtomicU64,
    /// Whether the driver has the write cache on.
    writeback: AtomicBool,
}

impl<D: Disk> Backend<D> {
    /// For a front-end that has not said anything yet.
    ///
    /// # Errors
    /// Any of `eventfd(2)`.
    pub fn new(device: Arc<BlockDevice<D>>) -> io::Result<Self> {
        let memory = Arc::new(SharedMemory::new());
        let slots = (0..usize::from(device.num_queues()))
            .map(|index| {
                let gate = Arc::new(Gate::new()?);
                let worker = Worker::new(
                    index,
                    Arc::clone(&device),
                    Arc::clone(&gate),
                    Arc::clone(&memory),
                );
                Ok(Slot {
                    gate,
                    worker: Mutex::new(worker),
                    event_loop: OnceLock::new(),
                })
            })
            .collect::<io::Result<_>>()?;
        let backend = Self {
            device,
            memory,
            slots,
            acked_features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
        };
        backend.apply_cache_mode();
        Ok(backend)
    }

    /// What the library needs to replace the table of guest memory.
    pub fn memory(&self) -> GuestMemoryAtomic<GuestMap> {
        self.memory.atomic()
    }

    /// Connects the queue threads that the library has started with their gates.
    ///
    /// # Errors
    /// Any of `epoll_ctl(2)`.
    pub fn attach(&self, event_loops: &[Arc<EventLoop<D>>]) -> io::Result<()> {
        for (slot, event_loop) in self.slots.iter().zip(event_loops) {
            slot.event_loop.get_or_init(|| Arc::downgrade(event_loop));
            event_loop.register_listener(slot.gate.as_raw_fd(), EventSet::IN, self.gate_event())?;
        }
        Ok(())
    }

    /// Completes what is in flight on all queues and ends their threads. Waits
    /// until that is done.
    pub fn close(&self, parked: Parked) {
        // All at once: the drains overlap.
        let receipts: Vec<_> = self
            .slots
            .iter()
            .map(|slot| slot.gate.order(Order::Close(parked)))
            .collect();
        for (slot, receipt) in self.slots.iter().zip(receipts) {
            if let Some(receipt) = receipt {
                slot.gate.wait(receipt);
            }
        }
    }

    /// The library's name for "the gate has an order". It keeps the numbers of the
    /// queues and the one after them for itself.
    fn gate_event(&self) -> u64 {
        self.slots.len() as u64 + 1
    }

    /// The library's name for "the engine has something".
    fn engine_event(&self) -> u64 {
        self.slots.len() as u64 + 2
    }

    /// Puts the engine in the mode that the driver has negotiated.
    fn apply_cache_mode(&self) {
        let write_through = config::is_write_through(
            self.acked_features.load(Ordering::Relaxed),
            self.writeback.load(Ordering::Relaxed),
        );
        if let Err(error) = self.device.engine().set_write_through(write_through) {
            // The engine remembers the failure and fails every write that would
            // have to be stable, so the guest learns of it.
            guest_log!(
                self.device.host_limit(),
                Error,
                "the write cache could not be flushed: {error}"
            );
        }
    }

    fn open_queue(&self, slot: &Slot<D>, worker: &mut Worker<D>, vring: &Vring, thread_id: usize) {
        let watch = |fd| match slot.event_loop.get().and_then(Weak::upgrade) {
            Some(event_loop) => event_loop.register_listener(fd, EventSet::IN, self.engine_event()),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        let opened = worker.open(vring).and_then(|fds| {
            let watched = fds.into_iter().try_for_each(watch);
            // Unwatched, its completions would never be seen.
            watched.inspect_err(|_| worker.close())
        });
        if let Err(error) = opened {
            guest_log!(
                self.device.host_limit(),
                Error,
                "queue {thread_id} cannot be served: {error}"
            );
        }
    }
}

impl<D: Disk> VhostUserBackend for Backend<D> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.slots.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.device.queue_size())
    }

    fn features(&self) -> u64 {
        config::features(self.device.engine().is_read_only())
    }

    fn acked_features(&self, features: u64) {
        let before = self.acked_features.swap(features, Ordering::Relaxed);
        // Only then is it another driver's: the same features come again, too.
        let initial = config::initial_writeback(features);
        if initial != config::initial_writeback(before) {
            self.writeback.store(initial, Ordering::Relaxed);
        }
        self.apply_cache_mode();
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features()
    }

    fn reset_device(&self) {
        // The library has disabled, and thereby drained, all rings.
        self.writeback.store(true, Ordering::Relaxed);
        self.acked_features(0);
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The library tells the rings.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.device
            .config_space(self.writeback.load(Ordering::Relaxed))
            .read(offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        // An error would end the connection, and a guest can write here.
        let (WRITEBACK_OFFSET, [writeback]) = (offset, bytes) else {
            guest_log!(
                self.device.guest_limit(),
                Warn,
                "{} bytes at {offset} of the configuration space cannot be written",
                bytes.len()
            );
            return Ok(());
        };
        self.writeback.store(*writeback != 0, Ordering::Relaxed);
        self.apply_cache_mode();
        Ok(())
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMap>) -> io::Result<()> {
        self.memory.replaced();
        // Idle queues, too, shall let go of memory that the guest has no more.
        for slot in &self.slots {
            slot.gate.nudge();
        }
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.slots.len()).map(|index| 1 << index).collect()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        if let Some(slot) = self.slots.get(queue_index as usize) {
            slot.gate.order_and_wait(Order::Drain);
        }
        Ok(())
    }

    /// An error ends the thread; the library knows no other way that does not leak
    /// a descriptor (its exit event). So that is what one means here, and nothing
    /// else.
    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        let (Some(slot), [vring]) = (self.slots.get(thread_id), vrings) else {
            return Ok(());
        };
        let mut worker = slot.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if u64::from(event) == self.gate_event() {
            slot.gate.consume_wake();
            worker.name_thread();
        }
        self.open_queue(slot, &mut worker, vring, thread_id);
        match worker.serve(vring) {
            Next::Sleep => Ok(()),
            Next::End => Err(io::Error::other("the queue is closed")),
        }
    }
}
