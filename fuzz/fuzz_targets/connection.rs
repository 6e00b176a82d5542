//! A guest that uses its disk, and one of its queues and its front-end for nonsense. What
//! it has written reads back, each request is answered once, and the image is sound in
//! the end.
#![no_main]

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use fuzz::driver::{DISK_SECTORS, Desc, Device, Guest, HOSTILE, HOSTILE_START, RING_SIZE, ring_at};
use fuzz::front_end::{NEED_REPLY, message, words};
use libfuzzer_sys::fuzz_target;
use vhost_user_ploop::image::Delta;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Flags of descriptors.
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;

/// Each request of a batch has a place for what belongs to it.
const SLOTS: u64 = 0x1_0000;
const SLOT_LEN: u64 = 0x1_0000;
const SLOT_HEADER: u64 = 0;
const SLOT_STATUS: u64 = 0x100;
const SLOT_TABLE: u64 = 0x200;
const SLOT_DATA: u64 = 0x1000;
const BATCH_MAX: usize = 8;
const SECTORS_MAX: u64 = 96;

/// What nonsense may read and what it may write, so that it never asks for a change of
/// the disk.
const HOSTILE_READ: u64 = HOSTILE_START + 0x4000;
const HOSTILE_WRITE: u64 = HOSTILE_START + 0x8000;

#[derive(Arbitrary, Debug)]
struct Input {
    has_event_idx: bool,
    is_write_through: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Batch(Vec<Request>),
    Nonsense {
        header: [u8; 16],
        chains: Vec<Vec<RawDesc>>,
        with: Vec<Request>,
    },
    /// An available index out of the blue.
    Index(u16),
    /// An entry that is no descriptor's.
    Head(u16),
    /// The used ring of the hostile queue over its own descriptors.
    Overlap(u16),
    Restart {
        queue: u8,
        is_asked_first: bool,
    },
    Disable {
        queue: u8,
    },
    Memory(Change),
    Cache(bool),
    Config {
        offset: u8,
        len: u8,
    },
    Reset,
    Reconnect,
    /// A message that ends the connection, or does not.
    Bad {
        request: u8,
        payload: Vec<u8>,
    },
}

#[derive(Arbitrary, Debug)]
enum Change {
    Same,
    AwayAndBack,
}

#[derive(Arbitrary, Debug)]
struct Request {
    queue: bool,
    kind: u8,
    start: u16,
    sectors: u8,
    cuts: [u16; 2],
    offset: u8,
    is_indirect: bool,
    fault: Option<Fault>,
}

/// What is wrong with a request.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Fault {
    PastEnd,
    HalfSector,
    NoData,
    UnknownType(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct RawDesc {
    is_writable: bool,
    is_outside: bool,
    at: u16,
    len: u16,
    flags: u8,
    next: u8,
}

/// What each sector may hold: 0 is zeros, anything else the number of a write.
struct Model {
    sectors: Vec<Vec<u16>>,
    writes: u16,
}

/// A request as it was made available.
struct Made {
    slot: u64,
    queue: usize,
    head: u16,
    kind: u32,
    start: u64,
    sectors: u64,
    /// Of the write.
    mark: u16,
    pieces: Vec<(u64, u32)>,
    is_good: bool,
}

fuzz_target!(|input: Input| run(input));

fn run(input: Input) {
    let device = Device::new();
    let mut features = u64::MAX & !(1 << 26);
    if !input.has_event_idx {
        features &= !(1 << 29);
    }
    if input.is_write_through {
        // Neither FLUSH nor CONFIG_WCE.
        features &= !(1 << 9 | 1 << 11);
    }
    let mut guest = Guest::new(&device, features);
    let mut model = Model {
        sectors: vec![vec![0]; DISK_SECTORS as usize],
        writes: 0,
    };
    for step in input.steps.into_iter().take(12) {
        model.step(&device, &mut guest, step);
    }
    model.look_at_all(&mut guest);
    drop(guest);
    let disk = device.close();
    let delta = Delta::load(disk.image(0)).expect("it is an image");
    delta.require_sound().expect("its BAT is sound");
}

impl Model {
    fn step(&mut self, device: &Device, guest: &mut Guest, step: Step) {
        match step {
            Step::Batch(requests) => self.batch(guest, requests),
            Step::Nonsense {
                header,
                chains,
                with,
            } => {
                let offered = nonsense(guest, header, &chains);
                self.batch(guest, with);
                if offered {
                    guest.wait_used(HOSTILE);
                }
            }
            Step::Index(index) => {
                guest.set_avail_idx(HOSTILE, index);
                guest.kick(HOSTILE);
                self.renew_hostile(guest);
            }
            Step::Head(head) => {
                // What lies in the table was nonsense before.
                guest.offer(HOSTILE, head.max(RING_SIZE));
                guest.kick(HOSTILE);
                assert_eq!(guest.wait_used(HOSTILE).len(), 1);
            }
            Step::Overlap(by) => {
                guest.stop(HOSTILE);
                guest.reset_hostile();
                let at = ring_at(HOSTILE);
                overlap(guest, at + 4 * u64::from(by % 0x80));
                guest.set_avail_idx(HOSTILE, 8);
                guest.kick(HOSTILE);
                self.renew_hostile(guest);
            }
            Step::Restart {
                queue,
                is_asked_first,
            } => {
                let queue = usize::from(queue % 2);
                if is_asked_first {
                    self.batch(guest, Vec::new());
                }
                let next = guest.stop(queue);
                assert_eq!(next, guest.rings[queue].used_idx, "all has been answered");
                guest.start(queue);
            }
            Step::Disable { queue } => {
                let queue = usize::from(queue % 2);
                guest.enable(queue, false);
                guest.enable(queue, true);
            }
            Step::Memory(Change::Same) => guest.set_memory(),
            Step::Memory(Change::AwayAndBack) => {
                let region = Guest::hostile_region();
                guest.front_end.tell(message::REM_MEM_REG, &region, &[]);
                self.batch(guest, Vec::new());
                let file = rustix::io::dup(&guest.files[1]).expect("it is open");
                guest.front_end.tell(message::ADD_MEM_REG, &region, &[file]);
            }
            Step::Cache(on) => {
                // The offset of the one field that can be written.
                let mut payload = fuzz::front_end::halves(&[32, 1, 1]);
                payload.push(on.into());
                guest.front_end.ask(message::SET_CONFIG, &payload, &[]);
            }
            Step::Config { offset, len } => {
                let len = u32::from(len).clamp(1, 255);
                let offset = u32::from(offset).min(256 - len);
                let mut payload = fuzz::front_end::halves(&[offset, len, 0]);
                payload.resize(12 + len as usize, 0);
                guest.front_end.ask(message::GET_CONFIG, &payload, &[]);
            }
            Step::Reset => {
                guest.front_end.tell(message::RESET_DEVICE, &[], &[]);
                guest.reconnect(device);
            }
            Step::Reconnect => guest.reconnect(device),
            Step::Bad { request, payload } => {
                let payload = &payload[..payload.len().min(0x400)];
                let request = u32::from(request % 48);
                // It may change a ring under the guest's feet: this guest has nothing
                // under way, and begins anew.
                let _ = guest.front_end.send(request, NEED_REPLY, payload, &[]);
                guest.reconnect(device);
            }
        }
    }

    /// The hostile queue, after its ring was spoilt.
    fn renew_hostile(&mut self, guest: &mut Guest) {
        self.batch(guest, Vec::new());
        guest.stop(HOSTILE);
        guest.reset_hostile();
        guest.start(HOSTILE);
    }

    /// All requests at once, and one good read on each queue.
    fn batch(&mut self, guest: &mut Guest, requests: Vec<Request>) {
        let mut made: Vec<Made> = Vec::new();
        for request in requests.into_iter().take(BATCH_MAX) {
            made.extend(self.make(guest, made.len() as u64, request));
        }
        for queue in 0..2 {
            let last = Request {
                queue: queue == 1,
                kind: 0,
                start: 17 * made.len() as u16,
                sectors: 3,
                cuts: [0; 2],
                offset: 0,
                is_indirect: false,
                fault: None,
            };
            made.extend(self.make(guest, made.len() as u64, last));
        }
        for request in &made {
            guest.offer(request.queue, request.head);
        }
        for queue in 0..2 {
            guest.kick(queue);
        }
        for queue in 0..2 {
            let mut used: Vec<_> = guest
                .wait_used(queue)
                .into_iter()
                .map(|(head, _)| head)
                .collect();
            let of_queue = made.iter().filter(|request| request.queue == queue);
            let mut heads: Vec<_> = of_queue.map(|request| request.head).collect();
            used.sort_unstable();
            heads.sort_unstable();
            assert_eq!(used, heads, "each is answered once");
        }
        self.judge(guest, &made);
    }

    fn make(&mut self, guest: &mut Guest, number: u64, request: Request) -> Option<Made> {
        let slot = SLOTS + SLOT_LEN * number;
        let kind = [
            READ,
            WRITE,
            WRITE,
            FLUSH,
            GET_ID,
            DISCARD,
            WRITE_ZEROES,
            READ,
        ][usize::from(request.kind % 8)];
        let start = u64::from(request.start) % DISK_SECTORS;
        let sectors = (1 + u64::from(request.sectors))
            .min(SECTORS_MAX)
            .min(DISK_SECTORS - start);
        let is_transfer = matches!(kind, READ | WRITE);
        let fault = request
            .fault
            .filter(|fault| is_transfer || matches!(fault, Fault::UnknownType(_)));
        let mut len = match kind {
            READ | WRITE => 512 * sectors,
            GET_ID => 20,
            DISCARD | WRITE_ZEROES => 16,
            _ => 0,
        };
        let (mut sent_kind, mut sent_start) = (kind, start);
        match fault {
            Some(Fault::PastEnd) => sent_start = DISK_SECTORS - sectors + 1,
            Some(Fault::HalfSector) => len -= 256,
            Some(Fault::NoData) => len = 0,
            Some(Fault::UnknownType(other)) => sent_kind = 0x100 | other & 0x7fff_ffff,
            None => {}
        }
        if matches!(kind, FLUSH | GET_ID | DISCARD | WRITE_ZEROES) {
            sent_start = 0;
        }
        let mut header = sent_kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sent_start.to_le_bytes());
        guest.write(slot + SLOT_HEADER, &header);
        guest.write(slot + SLOT_STATUS, &[0xaa]);
        let data = slot + SLOT_DATA + u64::from(request.offset);
        let mut mark = 0;
        match kind {
            WRITE => {
                self.writes += 1;
                mark = self.writes;
                guest.write(data, &mark.to_ne_bytes().repeat(len as usize / 2));
            }
            DISCARD | WRITE_ZEROES => {
                let unmap = u32::from(kind == WRITE_ZEROES && request.cuts[0] % 2 == 1);
                let mut range = start.to_le_bytes().to_vec();
                range.extend((sectors as u32).to_le_bytes());
                range.extend(unmap.to_le_bytes());
                guest.write(data, &range);
            }
            _ => guest.write(data, &vec![0x55; len as usize]),
        }
        let pieces = cut(data, len as u32, request.cuts);
        let flags = if matches!(kind, READ | GET_ID) {
            WRITABLE
        } else {
            0
        };
        let mut chain: Vec<Desc> = vec![(slot + SLOT_HEADER, 16, 0, 0)];
        chain.extend(pieces.iter().map(|&(at, len)| (at, len, flags, 0)));
        chain.push((slot + SLOT_STATUS, 1, WRITABLE, 0));
        if request.is_indirect {
            let last = chain.len() - 1;
            for (index, desc) in chain[..last].iter_mut().enumerate() {
                desc.2 |= 1;
                desc.3 = index as u16 + 1;
            }
            guest.write_table(slot + SLOT_TABLE, &chain);
            chain = vec![(slot + SLOT_TABLE, 16 * chain.len() as u32, INDIRECT, 0)];
        }
        let queue = usize::from(request.queue);
        let head = guest.add_chain(queue, chain)?;
        Some(Made {
            slot,
            queue,
            head,
            kind,
            start,
            sectors,
            mark,
            pieces,
            is_good: fault.is_none(),
        })
    }

    fn judge(&mut self, guest: &Guest, made: &[Made]) {
        for request in made {
            let status = guest.read(request.slot + SLOT_STATUS, 1)[0];
            assert!(status <= 2, "a status that is none");
            assert_eq!(status == 0, request.is_good, "status {status}");
        }
        let good = || made.iter().filter(|request| request.is_good);
        // What each sector may hold after this, if it was changed.
        let mut changed: BTreeMap<u64, (Vec<u16>, bool)> = BTreeMap::new();
        for request in good() {
            for sector in request.start..request.start + request.sectors {
                match request.kind {
                    WRITE => changed.entry(sector).or_default().0.push(request.mark),
                    WRITE_ZEROES => changed.entry(sector).or_default().0.push(0),
                    DISCARD => changed.entry(sector).or_default().1 = true,
                    _ => {}
                }
            }
        }
        for request in good().filter(|request| request.kind == READ) {
            let read = gather(guest, &request.pieces);
            for (sector, bytes) in (request.start..).zip(read.chunks(512)) {
                let value = number(bytes);
                let before = &mut self.sectors[sector as usize];
                match changed.get(&sector) {
                    Some((values, is_discarded)) => {
                        let may_be = before.contains(&value)
                            || values.contains(&value)
                            || (value == 0 && *is_discarded);
                        assert!(may_be, "sector {sector} reads {value}");
                    }
                    None => {
                        assert!(before.contains(&value), "sector {sector} reads {value}");
                        // What it is by now, it stays.
                        *before = vec![value];
                    }
                }
            }
        }
        for (sector, (mut values, is_discarded)) in changed {
            let before = &mut self.sectors[sector as usize];
            if is_discarded {
                // Zeros, or what was there.
                values.push(0);
                if values.len() == 1 {
                    values.append(before);
                }
            }
            *before = values;
        }
    }

    /// Reads the whole disk while nothing else is under way.
    fn look_at_all(&mut self, guest: &mut Guest) {
        let starts: Vec<_> = (0..DISK_SECTORS).step_by(SECTORS_MAX as usize).collect();
        for starts in starts.chunks(BATCH_MAX / 2) {
            let requests = starts.iter().map(|&start| Request {
                queue: start % 5 == 0,
                kind: 0,
                start: start as u16,
                sectors: SECTORS_MAX as u8 - 1,
                cuts: [0; 2],
                offset: 0,
                is_indirect: false,
                fault: None,
            });
            self.batch(guest, requests.collect());
        }
    }
}

/// What a sector says it is.
fn number(sector: &[u8]) -> u16 {
    // Each half word is the same as the next one.
    assert!(sector[2..] == sector[..510], "a sector of two minds");
    u16::from_ne_bytes([sector[0], sector[1]])
}

fn gather(guest: &Guest, pieces: &[(u64, u32)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &(at, len) in pieces {
        bytes.extend_from_slice(&guest.read(at, len as usize));
    }
    bytes
}

/// Up to three pieces.
fn cut(at: u64, len: u32, cuts: [u16; 2]) -> Vec<(u64, u32)> {
    let mut places = cuts.map(|cut| u32::from(cut) % (len + 1)).to_vec();
    places.extend([0, len]);
    places.sort_unstable();
    let pairs = places
        .windows(2)
        .map(|pair| (at + u64::from(pair[0]), pair[1] - pair[0]));
    pairs.filter(|(_, len)| *len > 0).collect()
}

/// Chains that are requests by accident at most. Whether there is one.
fn nonsense(guest: &mut Guest, header: [u8; 16], chains: &[Vec<RawDesc>]) -> bool {
    // Wherever it is read from, this is never the beginning of a change of the disk.
    let twice = [header, header].concat();
    let is_change = |bytes: &[u8]| {
        let kind = u32::from_le_bytes(bytes.try_into().expect("4 bytes")) & 0x7fff_ffff;
        matches!(kind, WRITE | DISCARD | WRITE_ZEROES)
    };
    // Pieces may be read in any order: no three bytes of zeros beside a small one.
    if twice.windows(4).any(is_change) || header.iter().any(|byte| matches!(byte, 1 | 11 | 13)) {
        return false;
    }
    guest.write(HOSTILE_READ, &header.repeat(0x4000 / 16));
    let mut is_any = false;
    for chain in chains.iter().take(4) {
        let descs = chain.iter().take(8).map(|desc| desc.plain());
        let descs: Vec<Desc> = descs.collect();
        if descs.is_empty() {
            continue;
        }
        let Some(head) = guest.add_chain(HOSTILE, descs.clone()) else {
            break;
        };
        // Links as they were wanted, loops among them.
        guest.write_table(ring_at(HOSTILE) + 16 * u64::from(head), &descs);
        guest.offer(HOSTILE, head);
        is_any = true;
    }
    guest.kick(HOSTILE);
    is_any
}

impl RawDesc {
    fn plain(self) -> Desc {
        let at = if self.is_outside {
            0x200_0000 + u64::from(self.at)
        } else if self.is_writable {
            HOSTILE_WRITE + u64::from(self.at % 0x4000)
        } else {
            HOSTILE_READ + u64::from(self.at % 0x3000)
        };
        // Never beyond what is read only, and never an indirect table: what is read there
        // would say nothing but the header.
        let len = match self.is_writable {
            true => u32::from(self.len),
            false => u32::from(self.len % 0x1000),
        };
        let flags = u16::from(self.flags & 1) | if self.is_writable { WRITABLE } else { 0 };
        (at, len, flags, u16::from(self.next % 40))
    }
}

/// Starts the hostile ring with its used ring at this place.
fn overlap(guest: &Guest, used: u64) {
    const FRONT_END: u64 = 0x7000_0000_0000;
    let at = ring_at(HOSTILE);
    let addresses = [at, used, at + 0x400].map(|at| FRONT_END + at);
    let head = fuzz::front_end::halves(&[HOSTILE as u32, 0]);
    let payload = [head, words(&addresses), words(&[0])].concat();
    guest.front_end.tell(message::SET_VRING_ADDR, &payload, &[]);
    let base = fuzz::front_end::halves(&[HOSTILE as u32, 0]);
    guest.front_end.tell(message::SET_VRING_BASE, &base, &[]);
    let kick = rustix::io::dup(&guest.rings[HOSTILE].kick).expect("it is open");
    let number = words(&[HOSTILE as u64]);
    guest
        .front_end
        .tell(message::SET_VRING_KICK, &number, &[kick]);
}
