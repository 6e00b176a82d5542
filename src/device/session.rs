//! What a front-end asks of the device: one method for each message.
//!
//! The library reads, checks and answers the messages. Here is what they do to the
//! state of the connection: features, memory and rings. A message that cannot be
//! obeyed is refused with a reason, which ends the connection unless it is one that a
//! guest can provoke.

mod holding;

use std::fs::File;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};
use virtio_queue::Error as QueueError;
use vm_memory::GuestAddressSpace;

use self::holding::{KnownSize, with_causes};
use super::config::{self, CAPACITY_OFFSET, WRITEBACK_OFFSET};
use super::continuity::{Continuity, ContinuityError};
use super::dirty_log::{Log, LogError};
use super::event::{Event, EventError};
use super::gate::Gate;
use super::image::{Haste, HoldError};
use super::mailbox::Parked;
use super::memory_table::{MAX_REGIONS, MemoryError, MemoryTable};
use super::ratelimit::{debug_log, guest_log};
use super::ring::{Ring, RingError, Surroundings};
use super::ring_size::RingSizes;
use super::signalled::{Signalled, UNBLOCK_INTERVAL};
use super::suspended::SessionState;
use super::vanishing::Alarm;
use super::write_cache::WriteCache;
use super::{BlockDevice, LogicalBlockError};
use crate::ploop::EngineError;
use crate::storage::Disk;

/// Why a message is not obeyed.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("queue {index}: {why}")]
    Ring { index: usize, why: RingError },
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("queue {index}: {why}")]
    Event { index: usize, why: EventError },
    #[error("queue {0}: it cannot be served without an eventfd for kicks")]
    NoKick(usize),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Continuity(#[from] ContinuityError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("{len} bytes at {offset} of the configuration space cannot be written")]
    ReadOnlyField { offset: u32, len: usize },
    #[error("the front-end sent SET_OWNER a second time")]
    Owned,
    #[error("{0} was not offered")]
    NotOffered(&'static str),
    #[error("the image cannot be opened: {}", with_causes(.0))]
    Image(#[from] HoldError),
    #[error(transparent)]
    Blocks(#[from] LogicalBlockError),
    #[error(
        "the disk has {now} bytes, and the front-end has read that it has {read}: it was made \
         smaller, or replaced, while no ring ran"
    )]
    Smaller { read: u64, now: u64 },
    #[error("{rings} queues were handed over, and there are {there}")]
    QueuesLeft { rings: usize, there: usize },
}

impl Refusal {
    /// Whether a guest can provoke it, so that the connection must survive it.
    pub fn is_harmless(&self) -> bool {
        matches!(self, Self::ReadOnlyField { .. })
    }
}

/// One front-end's view of the device.
pub(super) struct Session<D: Disk> {
    device: Arc<BlockDevice<D>>,
    memory: MemoryTable,
    rings: Vec<Ring>,
    /// By which their threads signal.
    signalled: Arc<Signalled>,
    is_owned: bool,
    /// What the library holds messages against.
    negotiated: Option<u64>,
    protocol_features: Option<u64>,
    acked_features: u64,
    write_cache: WriteCache,
    continuity: Continuity<D>,
    ring_sizes: RingSizes,
    known_size: KnownSize,
    /// Where written memory is marked while the features say so.
    log: Option<Arc<Log>>,
    /// Of the last message, if it was not obeyed.
    refusal: Option<Refusal>,
    /// While rings are started for a connection that goes on: what their threads wait at.
    gate: Option<Arc<Gate>>,
}

impl<D: Disk> Session<D> {
    /// For a front-end that has not said anything yet; `alarm` rings when its memory
    /// vanishes.
    ///
    /// # Errors
    /// None that [`super::Queues`] does not exclude.
    pub fn new(device: Arc<BlockDevice<D>>, alarm: Arc<Alarm>) -> Result<Self, QueueError> {
        let memory = MemoryTable::new(alarm);
        let signalled = Arc::new(Signalled::default());
        let make = |index| {
            let memory = memory.shared().atomic();
            Ring::new(index, device.queue_size(), memory, Arc::clone(&signalled))
        };
        let rings = (0..usize::from(device.num_queues())).map(make);
        Ok(Self {
            rings: rings.collect::<Result<_, _>>()?,
            signalled,
            memory,
            is_owned: false,
            negotiated: None,
            protocol_features: None,
            acked_features: 0,
            write_cache: WriteCache::new(),
            continuity: Continuity::new(Arc::clone(&device)),
            ring_sizes: RingSizes::default(),
            known_size: KnownSize::default(),
            log: None,
            refusal: None,
            gate: None,
            device,
        })
    }

    /// Whether the front-end has said nothing yet that matters.
    pub fn is_new(&self) -> bool {
        !self.is_owned && self.negotiated.is_none()
    }

    /// Why the last message was not obeyed.
    pub fn take_refusal(&mut self) -> Option<Refusal> {
        self.refusal.take()
    }

    /// Whether the front-end of a driver that runs has to be told to read the configuration
    /// space: it has read another size, or none, which another process or connection may
    /// have told it. While no ring runs a front-end need not listen.
    pub fn owes_size(&self) -> bool {
        let size = Some(self.device.disk_size());
        let knows = self.known_size.read == size || self.known_size.told == size;
        !knows && self.rings.iter().any(Ring::is_running)
    }

    /// It has been told.
    pub fn has_told_size(&mut self) {
        self.known_size.told = Some(self.device.disk_size());
    }

    /// Goes on where another session was left. The threads of its rings are there, and
    /// wait at `gate`.
    ///
    /// # Errors
    /// What of it is not possible here.
    pub fn restore(&mut self, state: SessionState, gate: &Arc<Gate>) -> Result<(), Refusal> {
        let unknown = state.acked_features & !self.offered_features();
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        let (rings, there) = (state.rings.len(), self.rings.len());
        if rings > there {
            return Err(Refusal::QueuesLeft { rings, there });
        }
        self.is_owned = state.is_owned;
        self.negotiated = state.negotiated;
        self.protocol_features = state.protocol_features;
        self.acked_features = state.acked_features;
        self.known_size = KnownSize {
            read: state.read_size,
            told: state.told_size,
        };
        for (region, file) in state.regions {
            self.memory.add(&region, file)?;
        }
        if let Some(region) = state.in_flight {
            let is_settled = state.is_settled && region.is_used;
            self.take_region(&region.given, region.file, is_settled)?;
        }
        self.write_cache = state.write_cache.with_features(state.acked_features);
        if let Some((given, file)) = state.log {
            let alarm = Arc::clone(self.memory.alarm());
            self.log = Some(Arc::new(Log::map(&given, file, alarm)?));
        }
        for (index, ring) in (0..).zip(state.rings) {
            self.with_ring(index, |new, _| new.restore(ring))?;
        }
        self.start_restored(gate)
    }

    fn start_restored(&mut self, gate: &Arc<Gate>) -> Result<(), Refusal> {
        if !self.rings.iter().any(Ring::is_started) {
            return Ok(());
        }
        self.hold_image()?;
        self.apply_cache_mode();
        self.gate = Some(Arc::clone(gate));
        let mut indexes = 0..self.rings.len() as u32;
        let started = indexes.try_for_each(|index| {
            self.with_ring(index, |ring, around| ring.run_if_possible(around))
        });
        self.gate = None;
        self.note_cache_mode();
        started
    }

    /// Answers all that is in flight and stops all rings, for a session that
    /// [goes on](Self::restore) elsewhere. If it fails, nothing has happened.
    ///
    /// # Errors
    /// If there are not enough descriptors.
    pub fn suspend(&mut self) -> io::Result<SessionState> {
        let regions = self.memory.export()?;
        let in_flight = self.continuity.export()?;
        let log = self.log.as_ref().map(|log| log.export()).transpose()?;
        let events = self.rings.iter().map(Ring::events);
        let events = events.collect::<io::Result<Vec<_>>>()?;
        self.halt_all(Parked::Drop);
        let rings = self.rings.iter_mut().zip(events);
        Ok(SessionState {
            is_owned: self.is_owned,
            negotiated: self.negotiated,
            protocol_features: self.protocol_features,
            acked_features: self.acked_features,
            write_cache: self.write_cache,
            read_size: self.known_size.read,
            told_size: self.known_size.told,
            regions,
            in_flight,
            log,
            rings: rings.map(|(ring, events)| ring.export(events)).collect(),
            is_settled: false,
        })
    }

    /// Whether the front-end is in the midst of messages that belong together: it has taken
    /// memory away, and will give it back or other memory for it. A ring cannot start
    /// meanwhile that lies there, nor a request that it has taken.
    pub fn is_amid_change(&self) -> bool {
        let map = self.memory.shared().atomic().memory();
        self.memory.is_being_changed() || !self.rings.iter().all(|ring| ring.is_there(&map))
    }

    /// Answers all that is in flight and stops all rings.
    pub fn close(&mut self, parked: Parked) {
        // The front-end has kept them, and the next process gets them again.
        let is_kept = self.continuity.is_kept();
        self.halt_all(if is_kept { Parked::Drop } else { parked });
        self.release_image(Haste::Nobody);
    }

    /// All at once: the drains overlap.
    fn halt_all(&mut self, parked: Parked) {
        let _stopping = self.device.stops().begin();
        for ring in &self.rings {
            ring.ask_to_halt(parked);
        }
        for ring in &mut self.rings {
            ring.halt(parked);
        }
    }

    /// The driver may have another mode now. While no ring runs it is not needed, and to
    /// turn the cache off takes a flush.
    fn cache_mode_changed(&self) {
        if self.rings.iter().any(Ring::is_running) {
            self.apply_cache_mode();
        }
    }

    /// Waits until no request of the old mode is left.
    fn set_write_through(&self, on: bool) -> Result<(), EngineError> {
        let engine = self.device.engine();
        let Some(flush) = engine.and_then(|engine| engine.begin_write_through(on)) else {
            return Ok(());
        };
        loop {
            if let Some(result) = flush.wait_for(UNBLOCK_INTERVAL) {
                return result;
            }
            self.signalled.unblock();
        }
    }

    /// Puts the engine in the mode that the driver has negotiated.
    fn apply_cache_mode(&self) {
        self.note_cache_mode();
        let write_through = self.write_cache.is_write_through();
        if let Err(error) = self.set_write_through(write_through) {
            // The engine remembers the failure and fails every write that would
            // have to be stable, so the guest learns of it.
            guest_log!(
                self.device.host_limit(),
                Error,
                "the write cache could not be flushed: {error}"
            );
        }
    }

    fn note_cache_mode(&self) {
        if let Some(is_on) = self.write_cache.known() {
            self.continuity.note_mode(is_on);
        }
    }

    fn refuse(&mut self, refusal: impl Into<Refusal>) -> VhostError {
        self.refusal = Some(refusal.into());
        VhostError::InvalidParam
    }

    fn settle<T>(&mut self, result: Result<T, Refusal>) -> VhostResult<T> {
        result.map_err(|refusal| self.refuse(refusal))
    }

    fn with_ring<T>(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Ring, &mut Surroundings<'_, D>) -> Result<T, RingError>,
    ) -> Result<T, Refusal> {
        let mut surroundings = Surroundings {
            device: &self.device,
            memory: self.memory.shared(),
            acked_features: self.acked_features,
            ring_sizes: &self.ring_sizes,
            log: self
                .log
                .as_ref()
                .filter(|_| has_logging(self.acked_features)),
            is_under_way: self.rings.iter().any(Ring::is_under_way),
            continuity: &mut self.continuity,
            gate: self.gate.as_ref(),
        };
        let number = index as usize;
        let ring = self.rings.get_mut(number).ok_or(Refusal::NoQueue(index))?;
        change(ring, &mut surroundings).map_err(|why| Refusal::Ring { index: number, why })
    }

    fn event(index: u8, file: Option<File>) -> Result<Option<Event>, Refusal> {
        let index = usize::from(index);
        let event = file.map(Event::new).transpose();
        event.map_err(|why| Refusal::Event { index, why })
    }

    /// What to do after the table of memory has changed: idle queues, too, shall let
    /// go of memory that the guest has no more.
    fn memory_changed(&mut self, result: Result<(), MemoryError>) -> VhostResult<()> {
        self.settle(result.map_err(Refusal::from))?;
        debug_log!("memory of the guest: {}", self.memory);
        for ring in &self.rings {
            ring.renew_memory();
        }
        Ok(())
    }

    fn start_ring(&mut self, index: u8, kick: Option<File>) -> Result<(), Refusal> {
        let kick = Self::event(index, kick)?;
        let kick = kick.ok_or(Refusal::NoKick(index.into()))?;
        let ring = self.rings.get(usize::from(index));
        if ring.is_some_and(Ring::is_enabled) {
            self.hold_image()?;
        }
        self.apply_cache_mode();
        self.with_ring(index.into(), |ring, around| ring.set_kick(kick, around))?;
        self.note_cache_mode();
        Ok(())
    }

    fn enable_ring(&mut self, index: u32, enable: bool) -> Result<(), Refusal> {
        let has_run = self.rings.iter().any(Ring::is_running);
        if enable {
            let ring = self.rings.get(index as usize);
            if ring.is_some_and(Ring::has_kick) {
                self.hold_image()?;
            }
            self.apply_cache_mode();
        }
        self.with_ring(index, |ring, around| {
            if enable {
                return ring.enable(around);
            }
            let _stopping = around.device.stops().begin();
            ring.disable();
            Ok(())
        })?;
        if enable {
            self.note_cache_mode();
        } else if has_run {
            self.ring_stopped();
        }
        Ok(())
    }

    fn set_ring_addresses(
        &mut self,
        index: u32,
        [table, avail, used]: [u64; 3],
        used_in_log: Option<u64>,
    ) -> Result<(), Refusal> {
        let table = self.memory.guest_address(table)?;
        let avail = self.memory.guest_address(avail)?;
        let used = self.memory.guest_address(used)?;
        self.with_ring(index, |ring, around| {
            ring.set_addresses(table, avail, used)?;
            ring.set_used_ring_in_log(used_in_log);
            ring.set_log(around.log);
            ring.wait_for_marks();
            Ok(())
        })
    }

    fn accept_features(&mut self, features: u64) -> Result<(), Refusal> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        debug_log!(
            "features {features:#x} of {:#x} are accepted",
            self.offered_features()
        );
        let before = std::mem::replace(&mut self.acked_features, features);
        if has_logging(features) != has_logging(before) {
            self.renew_marks();
        }
        if !has_logging(features) {
            self.log = None;
        }
        self.write_cache.negotiated(features);
        self.cache_mode_changed();
        // Without this there is no message to enable rings, and no more than one of them:
        // whether others are under way would not be known yet when the first one starts.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.enable_ring(0, true)?;
        }
        Ok(())
    }

    fn offered_features(&self) -> u64 {
        config::features(self.device.image().is_read_only())
    }

    /// Back to where a driver begins.
    fn reset(&mut self) {
        self.halt_all(Parked::Fail);
        for ring in &mut self.rings {
            ring.reset();
        }
        self.acked_features = 0;
        self.log = None;
        self.write_cache.reset();
        self.continuity.forget();
        self.release_image(Haste::Nobody);
    }

    fn check_stopped(&self) -> Result<(), Refusal> {
        if self.rings.iter().any(Ring::is_running) {
            return Err(ContinuityError::Running.into());
        }
        Ok(())
    }

    fn take_region(
        &mut self,
        region: &VhostUserInflight,
        file: File,
        is_settled: bool,
    ) -> Result<(), Refusal> {
        self.check_stopped()?;
        if let Some(cache_is_on) = self.continuity.take(region, file, is_settled)? {
            self.write_cache.remembered(cache_is_on);
        }
        Ok(())
    }

    /// Lets all rings mark what they write as it is to be now. When this returns, nothing
    /// is marked any more where it was before.
    fn renew_marks(&mut self) {
        let log = self.log.as_ref();
        let log = log.filter(|_| has_logging(self.acked_features));
        for ring in &mut self.rings {
            ring.set_log(log);
        }
        self.rings.iter().for_each(Ring::wait_for_marks);
    }

    fn take_log(&mut self, given: &VhostUserLog, file: File) -> Result<(), Refusal> {
        let alarm = Arc::clone(self.memory.alarm());
        self.log = Some(Arc::new(Log::map(given, file, alarm)?));
        self.renew_marks();
        Ok(())
    }

    fn not_offered<T>(&mut self, what: &'static str) -> VhostResult<T> {
        Err(self.refuse(Refusal::NotOffered(what)))
    }
}

/// Whether a front-end with these features wants written memory to be marked.
fn has_logging(features: u64) -> bool {
    features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0
}

/// A region as the table of all of them has it.
fn plain(region: &VhostUserSingleMemoryRegion) -> VhostUserMemoryRegion {
    VhostUserMemoryRegion::new(
        region.guest_phys_addr,
        region.memory_size,
        region.user_addr,
        region.mmap_offset,
    )
}

impl<D: Disk> VhostUserBackendReqHandlerMut for Session<D> {
    fn set_owner(&mut self) -> VhostResult<()> {
        if std::mem::replace(&mut self.is_owned, true) {
            return Err(self.refuse(Refusal::Owned));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset();
        self.is_owned = false;
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.offered_features())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        let result = self.accept_features(features);
        self.negotiated = Some(features);
        self.settle(result)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let result = self.memory.set(regions, files);
        self.memory_changed(result).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> VhostResult<()> {
        let result = self.with_ring(index, |ring, _| ring.set_size(size));
        self.settle(result)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        table: u64,
        used: u64,
        avail: u64,
        log: u64,
    ) -> VhostResult<()> {
        let used_in_log = flags
            .contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG)
            .then_some(log);
        let result = self.set_ring_addresses(index, [table, avail, used], used_in_log);
        self.settle(result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let result = self.with_ring(index, |ring, _| ring.set_next_avail(base));
        self.settle(result)
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let has_run = self.rings.iter().any(Ring::is_running);
        let result = self.with_ring(index, |ring, around| {
            let _stopping = around.device.stops().begin();
            Ok(ring.stop())
        });
        let base = self.settle(result)?;
        debug_log!("queue {index} has stopped, at {base} of the available ring");
        if has_run {
            self.ring_stopped();
        }
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let result = self.start_ring(index, file);
        self.settle(result)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let result = Self::event(index, file).and_then(|call| {
            self.with_ring(index.into(), |ring, _| {
                ring.set_call(call);
                Ok(())
            })
        });
        self.settle(result)
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let result = Self::event(index, file).and_then(|error| {
            self.with_ring(index.into(), |ring, _| {
                ring.set_error(error);
                Ok(())
            })
        });
        self.settle(result)
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        debug_log!("protocol features {features:#x} are accepted");
        // The library holds messages against them.
        self.protocol_features = Some(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        let result = self.enable_ring(index, enable);
        self.settle(result)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<Vec<u8>> {
        let asked = offset..offset.saturating_add(size);
        if asked.contains(&CAPACITY_OFFSET) {
            self.known_size.read = Some(self.device.disk_size());
        }
        let writeback = if asked.contains(&WRITEBACK_OFFSET) {
            let told = self.write_cache.read();
            self.cache_mode_changed();
            told
        } else {
            self.write_cache.peek()
        };
        Ok(self.device.config_space(writeback).read(offset, size))
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<()> {
        let (WRITEBACK_OFFSET, [writeback]) = (offset, bytes) else {
            let len = bytes.len();
            return Err(self.refuse(Refusal::ReadOnlyField { offset, len }));
        };
        self.write_cache.write(*writeback != 0);
        self.cache_mode_changed();
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> VhostResult<()> {
        self.not_offered("a GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        self.not_offered("a shared object")
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> VhostResult<(VhostUserInflight, File)> {
        let result = self.check_stopped();
        let result = result.and_then(|()| Ok(self.continuity.make(inflight)?));
        self.settle(result)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> VhostResult<()> {
        let result = self.take_region(inflight, file, false);
        self.settle(result)
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        let result = self.memory.add(&plain(region), file);
        self.memory_changed(result).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let result = self.memory.remove(&plain(region));
        self.memory_changed(result)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> VhostResult<Option<File>> {
        self.not_offered("a device state")
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        self.not_offered("a device state")
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        self.not_offered("shared memory of the device")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        let result = self.take_log(log, file);
        self.settle(result)
    }
}
