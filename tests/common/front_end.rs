//! A front-end and a guest's driver made by hand: `vhost`'s protocol, and rings
//! that the test fills as it likes.
#![allow(dead_code)]

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
    sync::atomic::{Ordering, fence},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};
use vmm_sys_util::eventfd::EventFd;

/// How long a test waits for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long a test waits to see that something does not happen.
pub const A_WHILE: Duration = Duration::from_millis(100);

/// Number of queues that a front-end has.
pub const QUEUES: u16 = 4;

/// Descriptors in a ring.
pub const RING_SIZE: u16 = 64;

/// Of events: daemons that other tests start meanwhile shall not inherit them.
const EVENT_FLAGS: i32 = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;

const MIB: u64 = 1 << 20;

/// Guest addresses: rings, headers and status bytes in the first region, data in
/// the rest of it and in the others.
const RING_STRIDE: u64 = 0x4000;
const AVAIL_OFFSET: u64 = 0x1000;
const USED_OFFSET: u64 = 0x2000;
const HEADERS: u64 = 0x4_0000;
/// A page for each ring.
pub const STATUSES: u64 = 0x5_0000;

/// Start of memory for data in the first region.
pub const DATA: u64 = 0x8_0000;
/// Where the first and the second region meet.
pub const SEAM: u64 = MIB;
/// The third region, which lies behind a hole.
pub const FAR: u64 = 16 * MIB;
/// Length of each region.
pub const REGION_LEN: u64 = MIB;

/// What a status byte holds until it is written.
pub const UNTOUCHED: u8 = 0xaa;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Whether it gets readable in that time.
pub fn is_readable(fd: &impl AsFd, time: Duration) -> bool {
    let time = Timespec::try_from(time).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&time)).unwrap() == 1
}

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A descriptor to be read.
pub fn readable(addr: u64, len: u32) -> Desc {
    Desc {
        addr,
        len,
        flags: 0,
        next: 0,
    }
}

/// A descriptor to be written.
pub fn writable(addr: u64, len: u32) -> Desc {
    Desc {
        flags: WRITE,
        ..readable(addr, len)
    }
}

/// A guest and its front-end in one.
pub struct FrontEnd {
    pub vhost: Frontend,
    pub memory: GuestMemoryMmap,
    pub rings: Vec<Ring>,
}

/// One queue, as the driver sees it.
pub struct Ring {
    pub index: usize,
    memory: GuestMemoryMmap,
    pub kick: EventFd,
    call: EventFd,
    next_desc: u16,
    avail_idx: u16,
    used_idx: u16,
    /// That the driver has heard so far.
    signals: u64,
}

/// See [`FrontEnd::driver`].
pub struct Driver(Vec<(u16, u16, u16)>, GuestMemoryMmap);

impl FrontEnd {
    /// Connects; says nothing yet.
    pub fn connect(socket: &Path) -> Self {
        Self::connect_for(socket, make_memory())
    }

    /// The same for the driver of another one, which has been migrated: all of its memory
    /// goes along.
    pub fn connect_with(socket: &Path, from: &Self) -> Self {
        let mut front_end = Self::connect(socket);
        for region in from.memory.iter() {
            let (at, len) = (region.start_addr(), region.len() as usize);
            let mut bytes = vec![0; len];
            from.memory.read_slice(&mut bytes, at).unwrap();
            front_end.memory.write_slice(&bytes, at).unwrap();
        }
        front_end.go_on_as(from.driver());
        front_end
    }

    /// Where the driver is, ring by ring.
    pub fn driver(&self) -> Driver {
        let rings = self.rings.iter();
        Driver(
            rings
                .map(|ring| (ring.next_desc, ring.avail_idx, ring.used_idx))
                .collect(),
            self.memory.clone(),
        )
    }

    /// Becomes that driver, with all that its rings hold.
    pub fn go_on_as(&mut self, driver: Driver) {
        let Driver(rings, memory) = driver;
        for (ring, (next_desc, avail_idx, used_idx)) in self.rings.iter_mut().zip(rings) {
            (ring.next_desc, ring.avail_idx, ring.used_idx) = (next_desc, avail_idx, used_idx);
            let mut bytes = vec![0; RING_STRIDE as usize];
            let at = GuestAddress(ring.table());
            memory.read_slice(&mut bytes, at).unwrap();
            self.memory.write_slice(&bytes, at).unwrap();
        }
    }

    fn connect_for(socket: &Path, memory: GuestMemoryMmap) -> Self {
        let vhost = Frontend::connect(socket, QUEUES.into()).expect("the socket is there");
        let rings = (0..QUEUES.into())
            .map(|index| Ring::new(index, memory.clone()))
            .collect();
        Self {
            vhost,
            memory,
            rings,
        }
    }

    /// Takes those of the features that are offered and gives the memory.
    pub fn negotiate(&mut self, features: u64) {
        let vhost = &mut self.vhost;
        vhost.set_owner().unwrap();
        let offered = vhost.get_features().unwrap();
        let protocol = vhost.get_protocol_features().unwrap();
        vhost.set_protocol_features(protocol).unwrap();
        vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        vhost.set_features(offered & features & !LOG_ALL).unwrap();
        self.set_memory(3);
    }

    /// Gives the first `count` regions of the memory, instead of those before.
    pub fn set_memory(&mut self, count: usize) {
        let regions: Vec<_> = self.memory.iter().take(count).map(region_info).collect();
        self.vhost.set_mem_table(&regions).unwrap();
    }

    /// One region of the memory, as a message has it.
    pub fn region(&self, index: usize) -> VhostUserMemoryRegionInfo {
        region_info(self.memory.iter().nth(index).unwrap())
    }

    pub fn start_rings(&mut self) {
        for index in 0..self.rings.len() {
            let base = self.rings[index].avail_idx;
            self.start_ring_at(index, base);
            self.vhost.set_vring_enable(index, true).unwrap();
        }
    }

    /// Where a ring lies, and whether its used ring is logged.
    pub fn set_addresses(&mut self, index: usize, is_logged: bool) {
        let ring = &self.rings[index];
        let host = |addr| self.memory.get_host_address(GuestAddress(addr)).unwrap() as u64;
        let config = VringConfigData {
            queue_max_size: RING_SIZE,
            queue_size: RING_SIZE,
            flags: is_logged.into(),
            desc_table_addr: host(ring.table()),
            used_ring_addr: host(ring.used()),
            avail_ring_addr: host(ring.avail()),
            log_addr: is_logged.then_some(ring.used()),
        };
        self.vhost.set_vring_addr(index, &config).unwrap();
    }

    /// Sets a ring up that goes on at entry `base`. It is not enabled yet.
    pub fn start_ring_at(&mut self, index: usize, base: u16) {
        self.try_start_ring_at(index, base).unwrap();
    }

    /// The same of one that may be refused.
    pub fn try_start_ring_at(&mut self, index: usize, base: u16) -> vhost::Result<()> {
        self.set_addresses(index, false);
        let ring = &self.rings[index];
        self.vhost.set_vring_num(index, RING_SIZE)?;
        self.vhost.set_vring_base(index, base)?;
        self.vhost.set_vring_call(index, &ring.call)?;
        self.vhost.set_vring_kick(index, &ring.kick)
    }

    pub fn get_config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let zeros = vec![0; size as usize];
        let flags = VhostUserConfigFlags::WRITABLE;
        self.vhost
            .get_config(offset, size, flags, &zeros)
            .unwrap()
            .1
    }

    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.vhost.set_config(offset, flags, bytes).unwrap();
    }

    pub fn fill(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(addr))
            .unwrap();
        bytes
    }
}

fn region_info(region: &GuestRegionMmap) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()
}

fn make_memory() -> GuestMemoryMmap {
    let ranges = [0, SEAM, FAR].map(|start| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(REGION_LEN).unwrap();
        (
            GuestAddress(start),
            REGION_LEN as usize,
            Some(FileOffset::new(file, 0)),
        )
    });
    GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
}

impl Ring {
    fn new(index: usize, memory: GuestMemoryMmap) -> Self {
        Self {
            index,
            memory,
            kick: EventFd::new(EVENT_FLAGS).unwrap(),
            call: EventFd::new(EVENT_FLAGS).unwrap(),
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
            signals: 0,
        }
    }

    pub fn table(&self) -> u64 {
        RING_STRIDE * self.index as u64
    }

    pub fn avail(&self) -> u64 {
        self.table() + AVAIL_OFFSET
    }

    pub fn used(&self) -> u64 {
        self.table() + USED_OFFSET
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, addr: u64) {
        self.memory.write_obj(value, GuestAddress(addr)).unwrap();
    }

    fn read<T: vm_memory::ByteValued>(&self, addr: u64) -> T {
        self.memory.read_obj(GuestAddress(addr)).unwrap()
    }

    /// Puts bytes into the guest's memory.
    pub fn fill(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// What the guest's memory has.
    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(addr))
            .unwrap();
        bytes
    }

    /// Other events for kicks and signals, which the device has not heard of yet.
    pub fn renew_events(&mut self) {
        self.kick = EventFd::new(EVENT_FLAGS).unwrap();
        self.call = EventFd::new(EVENT_FLAGS).unwrap();
    }

    /// By which the device signals.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// Writes the flags of the available ring.
    pub fn set_avail_flags(&self, flags: u16) {
        self.write(flags, self.avail());
    }

    /// Forgets the past, as a driver does when it resets the device.
    pub fn forget(&mut self) {
        self.next_desc = 0;
        self.avail_idx = 0;
        self.used_idx = 0;
        self.write(0_u16, self.avail() + 2);
        self.write(0_u16, self.used() + 2);
    }

    /// Writes descriptors to a table as they are.
    pub fn write_table(&self, table: u64, descs: &[Desc]) {
        for (index, desc) in descs.iter().enumerate() {
            let at = table + 16 * index as u64;
            self.write(desc.addr, at);
            self.write(desc.len, at + 8);
            self.write(desc.flags, at + 12);
            self.write(desc.next, at + 14);
        }
    }

    /// Makes the chain that starts at `head` available, without a kick.
    pub fn make_available(&mut self, head: u16) {
        let slot = self.avail_idx % RING_SIZE;
        self.write(head, self.avail() + 4 + 2 * u64::from(slot));
        fence(Ordering::SeqCst);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    /// Writes any number as the available index.
    pub fn set_avail_idx(&self, idx: u16) {
        self.write(idx, self.avail() + 2);
        // Kicks are always wanted by these tests: what the device asks for is not
        // looked at. Signals are wanted for the next entry.
        let used_event = self.avail() + 4 + 2 * u64::from(RING_SIZE);
        self.write(self.used_idx, used_event);
        fence(Ordering::SeqCst);
    }

    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Makes the descriptors available as one chain; returns its head.
    pub fn chain(&mut self, descs: &[Desc]) -> u16 {
        let count = descs.len() as u16;
        if self.next_desc + count > RING_SIZE {
            self.next_desc = 0;
        }
        let head = self.next_desc;
        self.next_desc += count;
        let mut linked = descs.to_vec();
        for (index, desc) in linked.iter_mut().enumerate() {
            if index + 1 < descs.len() {
                desc.flags |= NEXT;
                desc.next = head + index as u16 + 1;
            }
        }
        self.write_table(self.table() + 16 * u64::from(head), &linked);
        self.make_available(head);
        head
    }

    /// A request header and where it is.
    pub fn header(&self, kind: u32, sector: u64) -> Desc {
        let slot = u64::from(self.next_desc % RING_SIZE);
        let at = HEADERS + 0x1000 * self.index as u64 + 16 * slot;
        self.write(kind, at);
        self.write(0_u32, at + 4);
        self.write(sector, at + 8);
        readable(at, 16)
    }

    fn status_at(&self, head: u16) -> u64 {
        STATUSES + 0x1000 * self.index as u64 + u64::from(head)
    }

    /// Makes a well-formed request available; returns its head.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Desc]) -> u16 {
        let count = data.len() as u16 + 2;
        if self.next_desc + count > RING_SIZE {
            self.next_desc = 0;
        }
        let status_at = self.status_at(self.next_desc);
        self.write(UNTOUCHED, status_at);
        let header = self.header(kind, sector);
        let parts = [&[header], data, &[writable(status_at, 1)]].concat();
        self.chain(&parts)
    }

    /// The status byte of a well-formed request.
    pub fn status(&self, head: u16) -> u8 {
        self.read(self.status_at(head))
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next used entry, if it is there: head and length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        fence(Ordering::SeqCst);
        if self.read::<u16>(self.used() + 2) == self.used_idx {
            return None;
        }
        let at = self.used() + 4 + 8 * u64::from(self.used_idx % RING_SIZE);
        self.used_idx = self.used_idx.wrapping_add(1);
        Some((self.read::<u32>(at) as u16, self.read(at + 4)))
    }

    /// Waits for the next used entry as a driver does: by its signal.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let start = Instant::now();
        loop {
            let used_event = self.avail() + 4 + 2 * u64::from(RING_SIZE);
            self.write(self.used_idx, used_event);
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "nothing is used");
            if is_readable(&self.call_fd(), Duration::from_secs(1)) {
                self.signals();
            }
        }
    }

    /// How many signals the driver has had so far.
    pub fn signals(&mut self) -> u64 {
        self.signals += self.call.read().unwrap_or(0);
        self.signals
    }

    fn call_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event lives as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) }
    }

    /// One request from start to end: its status and its used length.
    pub fn run(&mut self, kind: u32, sector: u64, data: &[Desc]) -> (u8, u32) {
        let head = self.request(kind, sector, data);
        self.kick();
        let (used_head, len) = self.wait_used();
        assert_eq!(used_head, head);
        (self.status(head), len)
    }
}

/// The feature bit that turns the log of written memory on.
pub const LOG_ALL: u64 = 1 << 26;

/// All features but EVENT_IDX.
pub const WITHOUT_EVENT_IDX: u64 = !(1 << VIRTIO_RING_F_EVENT_IDX);
