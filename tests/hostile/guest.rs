//! A guest that fills all of its queues with one and the same request.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};
use vmm_sys_util::eventfd::EventFd;

/// As many as there can be, each as long as it can be.
pub const QUEUES: usize = 64;
pub const RING_SIZE: u16 = 1024;

/// All of the guest's memory, in bytes.
const MEMORY_LEN: usize = 64 << 20;

/// Where things lie: the rings, then what the requests of all queues share.
const RING_STRIDE: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
const SHARED: u64 = QUEUES as u64 * RING_STRIDE;
const HEADER: u64 = SHARED;
const STATUS: u64 = SHARED + 0x100;
const TABLE: u64 = SHARED + 0x1000;
const VICTIMS: u64 = SHARED + 0x20_0000;
/// Where a request may have its data.
pub const DATA: u64 = SHARED + 0x40_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

pub struct Guest {
    vhost: Frontend,
    memory: GuestMemoryMmap,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

/// A request with its parts of data: address and length.
pub struct Attack {
    pub kind: u32,
    pub sector: u64,
    pub parts: Vec<(u64, u32)>,
    /// Whether they are to be written by the device.
    pub is_read: bool,
}

impl Guest {
    pub fn connect(socket: &Path) -> Self {
        let mut vhost = Frontend::connect(socket, QUEUES as u64).expect("the socket is there");
        let memory = make_memory();
        vhost.set_owner().unwrap();
        let offered = vhost.get_features().unwrap();
        let protocol = vhost.get_protocol_features().unwrap();
        vhost.set_protocol_features(protocol).unwrap();
        vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        vhost
            .set_features(offered & !(1 << VIRTIO_RING_F_EVENT_IDX))
            .unwrap();
        let regions: Vec<_> = memory.iter().map(region_info).collect();
        vhost.set_mem_table(&regions).unwrap();
        let event = |_| EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self {
            vhost,
            memory,
            kicks: (0..QUEUES).map(event).collect(),
            calls: (0..QUEUES).map(event).collect(),
        }
    }

    pub fn fill(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn ring(queue: usize) -> u64 {
        queue as u64 * RING_STRIDE
    }

    /// Starts a ring; false if the back-end cannot.
    pub fn start(&mut self, queue: usize, base: u16) -> bool {
        let at = Self::ring(queue);
        let host = |addr| self.memory.get_host_address(GuestAddress(addr)).unwrap() as u64;
        let config = VringConfigData {
            queue_max_size: RING_SIZE,
            queue_size: RING_SIZE,
            flags: 0,
            desc_table_addr: host(at),
            used_ring_addr: host(at + USED),
            avail_ring_addr: host(at + AVAIL),
            log_addr: None,
        };
        let vhost = &mut self.vhost;
        let started = vhost
            .set_vring_num(queue, RING_SIZE)
            .and_then(|()| vhost.set_vring_base(queue, base))
            .and_then(|()| vhost.set_vring_addr(queue, &config))
            .and_then(|()| vhost.set_vring_call(queue, &self.calls[queue]))
            .and_then(|()| vhost.set_vring_kick(queue, &self.kicks[queue]))
            .and_then(|()| vhost.set_vring_enable(queue, true));
        started.is_ok()
    }

    /// Stops a ring. Returns how long that took.
    pub fn stop(&mut self, queue: usize) -> Duration {
        let start = Instant::now();
        self.vhost.get_vring_base(queue).unwrap();
        start.elapsed()
    }

    /// Fills these queues with the request.
    pub fn attack(&self, queues: std::ops::Range<usize>, attack: &Attack) {
        self.table(TABLE, HEADER, STATUS, attack);
        for queue in queues {
            for entry in 0..RING_SIZE {
                self.make_available(queue, entry, TABLE, attack.parts.len() + 2);
            }
            let avail = Self::ring(queue) + AVAIL;
            self.write(avail + 2, &RING_SIZE.to_le_bytes());
            self.kicks[queue].write(1).unwrap();
        }
    }

    /// The same with another request behind them, the last entry of the ring.
    pub fn attack_before(&self, queues: std::ops::Range<usize>, attack: &Attack, last: &Attack) {
        self.table(VICTIMS, VICTIMS + 0x1000, VICTIMS + 0x1100, last);
        self.table(TABLE, HEADER, STATUS, attack);
        for queue in queues {
            for entry in 0..RING_SIZE - 1 {
                self.make_available(queue, entry, TABLE, attack.parts.len() + 2);
            }
            self.make_available(queue, RING_SIZE - 1, VICTIMS, last.parts.len() + 2);
            let avail = Self::ring(queue) + AVAIL;
            self.write(avail + 2, &RING_SIZE.to_le_bytes());
            self.kicks[queue].write(1).unwrap();
        }
    }

    /// Makes as many requests of these queues available again as were answered.
    pub fn refill(&self, queues: std::ops::Range<usize>) {
        for queue in queues {
            let avail = Self::ring(queue) + AVAIL;
            let taken = self.used(queue).wrapping_add(RING_SIZE);
            self.write(avail + 2, &taken.to_le_bytes());
            self.kicks[queue].write(1).unwrap();
        }
    }

    /// One request on a queue that has had `count` so far; how long it took.
    pub fn run(&self, queue: usize, count: u16, request: &Attack) -> Duration {
        let table = VICTIMS + 0x2000 * queue as u64;
        self.table(table, table + 0x1000, table + 0x1100, request);
        self.write(table + 0x1100, &[0xaa]);
        self.make_available(queue, count % RING_SIZE, table, request.parts.len() + 2);
        let avail = Self::ring(queue) + AVAIL;
        let start = Instant::now();
        self.write(avail + 2, &(count + 1).to_le_bytes());
        self.kicks[queue].write(1).unwrap();
        while self.used(queue) != count + 1 {
            assert!(start.elapsed().as_secs() < 60, "queue {queue} is starved");
            thread::sleep(Duration::from_micros(50));
        }
        let status: u8 = self.memory.read_obj(GuestAddress(table + 0x1100)).unwrap();
        assert_eq!(status, 0, "the request has failed");
        start.elapsed()
    }

    /// How many requests of a queue have been answered.
    pub fn used(&self, queue: usize) -> u16 {
        let at = Self::ring(queue) + USED + 2;
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn table(&self, at: u64, header: u64, status: u64, attack: &Attack) {
        let fields = [u64::from(attack.kind), attack.sector].map(u64::to_le_bytes);
        self.write(header, &fields.concat());
        let access = if attack.is_read { WRITE } else { 0 };
        let data = attack.parts.iter().map(|&(at, len)| (at, len, access));
        let parts = [(header, 16, 0)].into_iter().chain(data);
        let parts = parts.chain([(status, 1, WRITE)]);
        let count = attack.parts.len() + 2;
        let mut bytes = Vec::with_capacity(16 * count);
        for (index, (at, len, flags)) in parts.enumerate() {
            let is_last = index + 1 == count;
            let flags = flags | if is_last { 0 } else { NEXT };
            bytes.extend(desc(at, len, flags, index as u16 + 1));
        }
        self.write(at, &bytes);
    }

    fn make_available(&self, queue: usize, entry: u16, table: u64, count: usize) {
        let ring = Self::ring(queue);
        let head = desc(table, 16 * count as u32, INDIRECT, 0);
        self.write(ring + 16 * u64::from(entry), &head);
        self.write(
            ring + AVAIL + 4 + 2 * u64::from(entry),
            &entry.to_le_bytes(),
        );
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }
}

fn desc(at: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = at.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

fn region_info(region: &GuestRegionMmap) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()
}

fn make_memory() -> GuestMemoryMmap {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(MEMORY_LEN as u64).unwrap();
    let range = (GuestAddress(0), MEMORY_LEN, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}
