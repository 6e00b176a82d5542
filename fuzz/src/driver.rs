//! A device on a disk in memory, and the driver of a guest that uses it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::io::dup;
use vhost_user_ploop::device::{BlockDevice, Connection, Parked, Queues, Serial};
use vhost_user_ploop::format::{ClusterSize, Header, Sector};
use vhost_user_ploop::ploop::{Chain, Engine, Level, Options, Running};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::disk::MemDisk;
use crate::front_end::{
    FrontEnd, PATIENCE, event, halves, is_readable, memory, message, pair, words,
};

/// Of the disk, in sectors: it ends inside a cluster.
pub const DISK_SECTORS: u64 = 12 * 64 + 3;

/// Queues of the device: the last is for chains that are none.
pub const QUEUES: u16 = 3;
pub const HOSTILE: usize = 2;

/// Descriptors of each ring.
pub const RING_SIZE: u16 = 32;

/// Lengths of the two regions of guest memory.
pub const HONEST_LEN: u64 = 1 << 20;
pub const HOSTILE_LEN: u64 = 1 << 16;
/// Where the second begins.
pub const HOSTILE_START: u64 = 0x100_0000;

/// What the front-end adds to guest addresses to get its own.
const FRONT_END: u64 = 0x7000_0000_0000;

/// Places in each region: a ring has so much room.
const RING_STRIDE: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;

/// The running device.
pub struct Device {
    pub disk: MemDisk,
    device: Arc<BlockDevice<MemDisk>>,
    running: Option<Running<MemDisk>>,
}

impl Device {
    /// With an empty disk.
    pub fn new() -> Self {
        let cluster = ClusterSize::MIN;
        let header = Header::new(Sector(DISK_SECTORS), cluster).expect("such a disk can be");
        let mut image = header.to_bytes().to_vec();
        image.resize(header.geometry().data_start as usize, 0);
        let disk = MemDisk::new(vec![image]);
        let chain = Chain {
            levels: vec![Level::Ploop],
        };
        let mut options = Options::default();
        options.runners = 1;
        options.preallocation = 4 * cluster.bytes();
        let opened = Engine::open(disk.clone(), &chain, options).expect("the image is sound");
        let running = Running::start(opened).expect("there are threads left");
        let serial: Serial = "fuzz".parse().expect("it is visible");
        let queues = Queues::new(QUEUES, 64).expect("there can be so many");
        let device = BlockDevice::new(Arc::clone(running.engine()), serial, queues);
        Self {
            disk,
            device: Arc::new(device.with_poll(Duration::ZERO)),
            running: Some(running),
        }
    }

    /// A front-end that has said nothing yet.
    pub fn connect(&self) -> (FrontEnd, Connection) {
        let (front_end, socket) = pair();
        let connection = Connection::start(Arc::clone(&self.device), socket);
        (front_end, connection.expect("a front-end can be served"))
    }

    /// Closes the image.
    pub fn close(mut self) -> MemDisk {
        let running = self.running.take().expect("it is taken once");
        running.close().expect("nothing has failed");
        self.disk
    }
}

impl Default for Device {
    fn default() -> Self {
        Self::new()
    }
}

/// Waits until all that served a front-end is taken down.
pub fn wait_for_end(connection: &Connection) {
    assert!(
        is_readable(&connection.ended_fd(), PATIENCE),
        "the connection does not end"
    );
}

/// The driver's side of one ring.
pub struct Ring {
    pub kick: OwnedFd,
    call: OwnedFd,
    next_desc: u16,
    pub avail_idx: u16,
    pub used_idx: u16,
}

/// A descriptor: address, length, flags, next.
pub type Desc = (u64, u32, u16, u16);

/// A guest with its front-end.
pub struct Guest {
    pub front_end: FrontEnd,
    connection: Option<Connection>,
    features: u64,
    pub memory: GuestMemoryMmap<()>,
    /// Of the two regions of the memory.
    pub files: [File; 2],
    pub rings: Vec<Ring>,
}

impl Guest {
    pub fn new(device: &Device, features: u64) -> Self {
        let files = [HONEST_LEN, HOSTILE_LEN].map(memory);
        let range = |start, len: u64, file: &File| {
            let file = file.try_clone().expect("there are descriptors left");
            (
                GuestAddress(start),
                len as usize,
                Some(FileOffset::new(file, 0)),
            )
        };
        let ranges = [
            range(0, HONEST_LEN, &files[0]),
            range(HOSTILE_START, HOSTILE_LEN, &files[1]),
        ];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).expect("they fit together");
        let rings = (0..QUEUES).map(|_| Ring {
            kick: event(),
            call: event(),
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
        });
        let (front_end, connection) = device.connect();
        let mut guest = Self {
            front_end,
            connection: Some(connection),
            features,
            memory,
            files,
            rings: rings.collect(),
        };
        guest.begin();
        guest
    }

    /// Ends the connection, whoever has given it up, and makes another.
    pub fn reconnect(&mut self, device: &Device) {
        self.disconnect();
        let (front_end, connection) = device.connect();
        self.front_end = front_end;
        self.connection = Some(connection);
        self.begin();
    }

    /// Hangs up, and waits for the end.
    pub fn disconnect(&mut self) {
        let _ = self.front_end.socket.shutdown(std::net::Shutdown::Both);
        if let Some(connection) = self.connection.take() {
            wait_for_end(&connection);
            connection.stop(Parked::Drop);
        }
    }

    fn begin(&mut self) {
        self.front_end.introduce(self.features);
        self.set_memory();
        self.reset_hostile();
        for index in 0..self.rings.len() {
            self.start(index);
        }
    }

    /// Gives all of the memory.
    pub fn set_memory(&self) {
        let honest = [0, HONEST_LEN, FRONT_END, 0];
        let hostile = [HOSTILE_START, HOSTILE_LEN, FRONT_END + HOSTILE_START, 0];
        let table = words(&[&[2], &honest[..], &hostile].concat());
        let files = self
            .files
            .each_ref()
            .map(|file| dup(file).expect("it is open"));
        self.front_end.tell(message::SET_MEM_TABLE, &table, &files);
    }

    /// The region of the hostile queue, as a message has it.
    pub fn hostile_region() -> Vec<u8> {
        words(&[0, HOSTILE_START, HOSTILE_LEN, FRONT_END + HOSTILE_START, 0])
    }

    /// Sets a ring up that goes on where it was, and starts it.
    pub fn start(&mut self, index: usize) {
        let at = ring_at(index);
        let ring = &self.rings[index];
        let queue = index as u32;
        let front_end = &self.front_end;
        front_end.tell(
            message::SET_VRING_NUM,
            &halves(&[queue, RING_SIZE.into()]),
            &[],
        );
        front_end.tell(
            message::SET_VRING_BASE,
            &halves(&[queue, ring.used_idx.into()]),
            &[],
        );
        let addresses = [at, at + USED, at + AVAIL].map(|at| FRONT_END + at);
        let payload = [halves(&[queue, 0]), words(&addresses), words(&[0])].concat();
        front_end.tell(message::SET_VRING_ADDR, &payload, &[]);
        let event = |event: &OwnedFd| [dup(event).expect("it is open")];
        let number = words(&[index as u64]);
        front_end.tell(message::SET_VRING_CALL, &number, &event(&ring.call));
        front_end.tell(message::SET_VRING_KICK, &number, &event(&ring.kick));
        self.enable(index, true);
    }

    pub fn enable(&self, index: usize, enable: bool) {
        let payload = halves(&[index as u32, enable.into()]);
        self.front_end
            .tell(message::SET_VRING_ENABLE, &payload, &[]);
    }

    /// Stops a ring. Gives the index that it would go on at.
    pub fn stop(&self, index: usize) -> u16 {
        let payload = halves(&[index as u32, 0]);
        let answer = self.front_end.ask(message::GET_VRING_BASE, &payload, &[]);
        let payload = answer.expect("it listens").payload;
        u32::from_ne_bytes(payload[4..8].try_into().expect("4 bytes")) as u16
    }

    /// The hostile queue is as new; it must not run.
    pub fn reset_hostile(&mut self) {
        let ring = &mut self.rings[HOSTILE];
        (ring.next_desc, ring.avail_idx, ring.used_idx) = (0, 0, 0);
        self.write(ring_at(HOSTILE), &vec![0; RING_STRIDE as usize]);
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(at))
            .expect("it is guest memory");
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("it is guest memory");
        bytes
    }

    fn read_u16(&self, at: u64) -> u16 {
        self.memory
            .read_obj(GuestAddress(at))
            .expect("it is guest memory")
    }

    /// Writes descriptors as they are.
    pub fn write_table(&self, at: u64, descs: &[Desc]) {
        for (index, &(addr, len, flags, next)) in descs.iter().enumerate() {
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            self.write(at + 16 * index as u64, &bytes);
        }
    }

    /// Puts a chain into the table of a ring, and links it. Gives its head; `None` if
    /// there is no room until all before have been used.
    pub fn add_chain(&mut self, index: usize, mut chain: Vec<Desc>) -> Option<u16> {
        let ring = &mut self.rings[index];
        let count = chain.len() as u16;
        if ring.next_desc + count > RING_SIZE {
            return None;
        }
        let head = ring.next_desc;
        ring.next_desc += count;
        let last = chain.len() - 1;
        for (at, desc) in chain[..last].iter_mut().enumerate() {
            desc.2 |= 1;
            desc.3 = head + at as u16 + 1;
        }
        self.write_table(ring_at(index) + 16 * u64::from(head), &chain);
        Some(head)
    }

    /// Makes a chain available.
    pub fn offer(&mut self, index: usize, head: u16) {
        let ring = &mut self.rings[index];
        let slot = u64::from(ring.avail_idx % RING_SIZE);
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        let next = ring.avail_idx;
        let used = ring.used_idx;
        let avail = ring_at(index) + AVAIL;
        self.write(avail + 4 + 2 * slot, &head.to_le_bytes());
        // A signal is wanted for the next one.
        self.write(avail + 4 + 2 * u64::from(RING_SIZE), &used.to_le_bytes());
        fence(Ordering::SeqCst);
        self.write(avail + 2, &next.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// Writes an index that need not be one.
    pub fn set_avail_idx(&self, index: usize, value: u16) {
        self.write(ring_at(index) + AVAIL + 2, &value.to_le_bytes());
    }

    pub fn kick(&self, index: usize) {
        rustix::io::write(&self.rings[index].kick, &1_u64.to_ne_bytes()).expect("it has room");
    }

    /// Waits until all that was made available has been used. Gives heads and lengths.
    pub fn wait_used(&mut self, index: usize) -> Vec<(u16, u32)> {
        let start = Instant::now();
        let used = ring_at(index) + USED;
        while self.read_u16(used + 2) != self.rings[index].avail_idx {
            assert!(
                start.elapsed() < PATIENCE,
                "queue {index}: a request is not answered"
            );
            let ring = &self.rings[index];
            if is_readable(&ring.call, Duration::from_millis(1)) {
                let _ = rustix::io::read(&ring.call, &mut [0; 8]);
            }
        }
        fence(Ordering::SeqCst);
        let mut all = Vec::new();
        while self.rings[index].used_idx != self.rings[index].avail_idx {
            let slot = u64::from(self.rings[index].used_idx % RING_SIZE);
            let entry = self.read(used + 4 + 8 * slot, 8);
            let word =
                |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("4 bytes"));
            all.push((word(0) as u16, word(4)));
            self.rings[index].used_idx = self.rings[index].used_idx.wrapping_add(1);
        }
        self.rings[index].next_desc = 0;
        all
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.disconnect();
        }
    }
}

/// Where a ring lies.
pub fn ring_at(index: usize) -> u64 {
    match index {
        HOSTILE => HOSTILE_START,
        _ => RING_STRIDE * index as u64,
    }
}
