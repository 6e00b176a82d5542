//! Descriptor tables and memory that a guest has written, against a reading of the
//! standard that shares no code with the device's.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vhost_user_ploop::device::fuzzing::{Asked, Disk, Parsed, parse_all};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const RING_SIZE: u16 = 16;
const TABLE: u64 = 0x100;
const AVAIL: u64 = 0x300;
const USED: u64 = 0x400;
/// Where headers, ranges and indirect tables lie.
const CONTENT: u64 = 0x800;
/// The first region ends here and the second begins.
const SEAM: u64 = 0x2000;
const END: u64 = 0x4000;
/// A third one, behind a hole.
const FAR: u64 = 0x8000;
const FAR_END: u64 = 0x8400;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// As many as the device takes in one chain.
const CHAIN_MAX: usize = 1024;

#[derive(Arbitrary, Debug)]
struct Input {
    disk_size: u16,
    read_only: bool,
    heads: Vec<u8>,
    table: Vec<Desc>,
    /// At [`CONTENT`]; the first 16 bytes of each are a header.
    headers: Vec<Header>,
    indirect: Vec<Desc>,
    /// At the end of the first region.
    raw: Vec<u8>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Desc {
    addr: Addr,
    len: Len,
    flags: u8,
    next: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Addr {
    Header(u8),
    Indirect(u8),
    Near(u16),
    Seam(i8),
    Far(u16),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    Header,
    One,
    Sectors(u8),
    Table(u8),
    Small(u8),
    Any(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Header {
    kind: Kind,
    sector: u64,
    count: u32,
    flags: u32,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Known(u8),
    Range { sector: u16 },
    Any(u32),
}

/// A descriptor as the oracle reads it.
#[derive(Clone, Copy, Debug)]
struct Plain {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fuzz_target!(|input: Input| run(input));

fn run(input: Input) {
    let regions = [
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), (END - SEAM) as usize),
        (GuestAddress(FAR), (FAR_END - FAR) as usize),
    ];
    let memory = GuestMemoryMmap::<()>::from_ranges(&regions).expect("they fit together");
    fill(&memory, &input);
    let before = snapshot(&memory);
    let mut ring = Queue::new(RING_SIZE).expect("it is a power of two");
    ring.set_size(RING_SIZE);
    ring.set_desc_table_address(Some(TABLE as u32), None);
    ring.set_avail_ring_address(Some(AVAIL as u32), None);
    ring.set_used_ring_address(Some(USED as u32), None);
    ring.set_ready(true);
    let disk = Disk {
        size: u64::from(input.disk_size),
        read_only: input.read_only,
        max_ranges: 4,
        max_range_sectors: 1000,
    };
    // One at a time: an answer may change the chains behind it, as the guest asked.
    let parsed = parse_all(&memory, &mut ring, disk);
    let [first, ..] = parsed.as_slice() else {
        return;
    };
    check(first, &before, &memory, disk);
    for parsed in &parsed {
        check_bounds(parsed, &memory, disk);
    }
}

fn fill(memory: &GuestMemoryMmap<()>, input: &Input) {
    let write = |at: u64, bytes: &[u8]| {
        memory
            .write_slice(bytes, GuestAddress(at))
            .expect("it is guest memory");
    };
    let table = |at: u64, descs: &[Desc]| {
        for (index, desc) in descs.iter().take(usize::from(RING_SIZE) * 2).enumerate() {
            write(at + 16 * index as u64, &desc.bytes());
        }
    };
    table(
        TABLE,
        &input.table[..input.table.len().min(usize::from(RING_SIZE))],
    );
    table(INDIRECT_TABLE, &input.indirect);
    for (index, header) in input.headers.iter().take(16).enumerate() {
        write(CONTENT + 16 * index as u64, &header.bytes());
    }
    let raw = &input.raw[..input.raw.len().min(0x400)];
    write(SEAM - 0x800, raw);
    let heads = input.heads.iter().take(usize::from(RING_SIZE));
    let count = heads.len() as u16;
    for (index, head) in heads.enumerate() {
        write(
            AVAIL + 4 + 2 * index as u64,
            &u16::from(*head).to_le_bytes(),
        );
    }
    write(AVAIL + 2, &count.to_le_bytes());
}

const INDIRECT_TABLE: u64 = 0xc00;

impl Desc {
    fn bytes(self) -> [u8; 16] {
        let addr = match self.addr {
            Addr::Header(index) => CONTENT + 16 * u64::from(index % 16),
            Addr::Indirect(index) => INDIRECT_TABLE + 16 * u64::from(index % 4),
            Addr::Near(at) => u64::from(at) % END,
            Addr::Seam(by) => SEAM.wrapping_add_signed(i64::from(by)),
            Addr::Far(at) => FAR + u64::from(at) % 0x500,
            Addr::Any(at) => at,
        };
        let len = match self.len {
            Len::Header => 16,
            Len::One => 1,
            Len::Sectors(count) => 512 * u32::from(count % 8),
            Len::Table(count) => 16 * u32::from(count % 40),
            Len::Small(len) => len.into(),
            Len::Any(len) => len,
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&u16::from(self.flags % 8).to_le_bytes());
        bytes[14..].copy_from_slice(&u16::from(self.next % 20).to_le_bytes());
        bytes
    }
}

impl Header {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let kind = match self.kind {
            Kind::Known(index) => [0_u32, 1, 4, 8, 11, 13][usize::from(index % 6)],
            Kind::Range { sector } => {
                bytes[..8].copy_from_slice(&u64::from(sector).to_le_bytes());
                bytes[8..12].copy_from_slice(&(self.count % 1024).to_le_bytes());
                bytes[12..].copy_from_slice(&(self.flags % 3).to_le_bytes());
                return bytes;
            }
            Kind::Any(kind) => kind,
        };
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        let sector = match self.count % 2 {
            0 => self.sector % 0x1_0000,
            _ => self.sector,
        };
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }
}

/// All memory: address and content of each region.
fn snapshot(memory: &GuestMemoryMmap<()>) -> Vec<(u64, Vec<u8>)> {
    let parts = [(0, SEAM), (SEAM, END), (FAR, FAR_END)];
    let read = |(start, end): (u64, u64)| {
        let mut bytes = vec![0; (end - start) as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(start))
            .expect("it is there");
        (start, bytes)
    };
    parts.into_iter().map(read).collect()
}

/// The bytes of a range of guest memory, if all of it is there.
fn bytes_at(memory: &[(u64, Vec<u8>)], addr: u64, len: u64) -> Option<Vec<u8>> {
    let end = addr.checked_add(len)?;
    let mut bytes = Vec::new();
    let mut at = addr;
    while at < end {
        let (start, content) = memory
            .iter()
            .find(|(start, content)| (*start..*start + content.len() as u64).contains(&at))?;
        let from = (at - start) as usize;
        let until = content.len().min((end - start) as usize);
        bytes.extend_from_slice(&content[from..until]);
        at = start + until as u64;
    }
    Some(bytes)
}

fn desc_at(memory: &[(u64, Vec<u8>)], addr: u64) -> Option<Plain> {
    let bytes = bytes_at(memory, addr, 16)?;
    Some(Plain {
        addr: u64::from_le_bytes(bytes[..8].try_into().ok()?),
        len: u32::from_le_bytes(bytes[8..12].try_into().ok()?),
        flags: u16::from_le_bytes(bytes[12..14].try_into().ok()?),
        next: u16::from_le_bytes(bytes[14..].try_into().ok()?),
    })
}

/// The descriptors of a chain, if it is one by virtio 1.2, 2.7.5.
fn walk(memory: &[(u64, Vec<u8>)], head: u16) -> Option<Vec<Plain>> {
    let mut chain = Vec::new();
    let (mut table, mut size, mut index) = (TABLE, u32::from(RING_SIZE), head);
    let mut is_indirect = false;
    loop {
        if u32::from(index) >= size || chain.len() >= CHAIN_MAX {
            return None;
        }
        let desc = desc_at(memory, table.checked_add(16 * u64::from(index))?)?;
        if desc.flags & INDIRECT != 0 {
            let is_table = desc.len.is_multiple_of(16) && desc.len > 0;
            // A driver must not set NEXT as well (2.7.5.3.1). The device has the chain end
            // with the table then, as QEMU has.
            if is_indirect || !is_table {
                return None;
            }
            (table, size, index) = (desc.addr, desc.len / 16, 0);
            is_indirect = true;
            continue;
        }
        chain.push(desc);
        if desc.flags & NEXT == 0 {
            return Some(chain);
        }
        index = desc.next;
    }
}

/// The first chain, whose memory is as it was when the device looked at it.
fn check(parsed: &Parsed, before: &[(u64, Vec<u8>)], memory: &GuestMemoryMmap<()>, disk: Disk) {
    let chain = walk(before, parsed.head);
    let Some(asked) = &parsed.asks_for else {
        if let Some(chain) = chain {
            assert!(
                !is_right(&chain, before, disk),
                "a request was refused: {chain:?}"
            );
        }
        return;
    };
    let chain = chain.expect("what is no chain is no request");
    let readable = collect(&chain, before, 0).expect("it was read");
    let writable: u64 = lengths(&chain, WRITE);
    let (kind, sector) = header(&readable).expect("it has a header");
    let from_guest = (readable.len() - 16) as u64;
    let in_order = chain
        .iter()
        .filter(|desc| desc.len > 0)
        .map(|desc| desc.flags & WRITE)
        .is_sorted();
    assert!(in_order, "what is to be written comes last");
    match asked {
        Asked::Read { start, memory } => {
            assert_eq!((kind, sector), (0, *start));
            assert_eq!(total(memory), writable - 1);
        }
        Asked::Write { start, memory } => {
            assert_eq!((kind, sector), (1, *start));
            assert_eq!(total(memory), from_guest);
        }
        Asked::Flush => assert_eq!(kind, 4),
        Asked::GetId { memory } => {
            assert_eq!(kind, 8);
            assert_eq!(total(memory), (writable - 1).min(20));
        }
        Asked::Discard(ranges) => {
            assert_eq!(kind, 11);
            assert_eq!(ranges.len() as u64 * 16, from_guest);
        }
        Asked::WriteZeroes(ranges, _) => {
            assert_eq!(kind, 13);
            assert_eq!(ranges.len() as u64 * 16, from_guest);
        }
    }
    let (_, status) = parsed.answer.expect("each request is answered");
    assert_eq!(status, 0);
    let _ = memory;
}

/// That a chain is a request beyond doubt.
fn is_right(chain: &[Plain], memory: &[(u64, Vec<u8>)], disk: Disk) -> bool {
    let is_sorted = chain.iter().map(|desc| desc.flags & WRITE).is_sorted();
    let has_bytes = chain.iter().all(|desc| desc.len > 0);
    let total: u64 = chain.iter().map(|desc| u64::from(desc.len)).sum();
    let (Some(readable), Some(_)) = (collect(chain, memory, 0), collect(chain, memory, WRITE))
    else {
        return false;
    };
    let writable = lengths(chain, WRITE);
    let Some((kind, sector)) = header(&readable) else {
        return false;
    };
    if !is_sorted || !has_bytes || total > 1 << 20 || writable == 0 {
        return false;
    }
    let fits = |len: u64| {
        len > 0
            && len.is_multiple_of(512)
            && sector
                .checked_add(len / 512)
                .is_some_and(|end| end <= disk.size)
    };
    match kind {
        0 => fits(writable - 1),
        1 => !disk.read_only && fits(readable.len() as u64 - 16),
        4 => true,
        8 => writable > 1,
        _ => false,
    }
}

fn header(readable: &[u8]) -> Option<(u32, u64)> {
    let (head, _) = readable.split_first_chunk::<16>()?;
    let kind = u32::from_le_bytes(head[..4].try_into().ok()?) & !(1 << 31);
    let sector = u64::from_le_bytes(head[8..].try_into().ok()?);
    Some((kind, sector))
}

/// The bytes of all descriptors of one kind, if they are guest memory.
fn collect(chain: &[Plain], memory: &[(u64, Vec<u8>)], kind: u16) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for desc in chain.iter().filter(|desc| desc.flags & WRITE == kind) {
        bytes.extend(bytes_at(memory, desc.addr, desc.len.into())?);
    }
    Some(bytes)
}

fn lengths(chain: &[Plain], kind: u16) -> u64 {
    let of_kind = chain.iter().filter(|desc| desc.flags & WRITE == kind);
    of_kind.map(|desc| u64::from(desc.len)).sum()
}

fn total(memory: &[(usize, usize)]) -> u64 {
    memory.iter().map(|(_, len)| *len as u64).sum()
}

/// Whatever the chains were: no memory but the guest's, no sector but the disk's.
fn check_bounds(parsed: &Parsed, memory: &GuestMemoryMmap<()>, disk: Disk) {
    let on_disk =
        |start: u64, count: u64| start.checked_add(count).is_some_and(|end| end <= disk.size);
    let Some(asked) = &parsed.asks_for else {
        return;
    };
    match asked {
        Asked::Read {
            start,
            memory: pieces,
        }
        | Asked::Write {
            start,
            memory: pieces,
        } => {
            assert!(total(pieces) > 0 && total(pieces).is_multiple_of(512));
            assert!(on_disk(*start, total(pieces) / 512));
            check_pieces(pieces, memory);
            assert!(!disk.read_only || matches!(asked, Asked::Read { .. }));
        }
        Asked::Discard(ranges) | Asked::WriteZeroes(ranges, _) => {
            assert!(!disk.read_only);
            assert!(!ranges.is_empty() && ranges.len() <= disk.max_ranges as usize);
            for &(start, count) in ranges {
                assert!(count <= disk.max_range_sectors.into() && on_disk(start, count));
            }
        }
        Asked::GetId { memory: pieces } => check_pieces(pieces, memory),
        Asked::Flush => {}
    }
}

fn check_pieces(pieces: &[(usize, usize)], memory: &GuestMemoryMmap<()>) {
    let regions = [(0, SEAM), (SEAM, END), (FAR, FAR_END)].map(|(start, end)| {
        let host = memory
            .get_host_address(GuestAddress(start))
            .expect("it is there");
        host as usize..host as usize + (end - start) as usize
    });
    let mut bounds: Vec<_> = regions.into_iter().collect();
    bounds.sort_by_key(|region| region.start);
    for &(at, len) in pieces {
        // A piece may go on in the next region where the two are neighbours here, too.
        let mut left = at..at + len;
        for region in &bounds {
            if region.contains(&left.start) {
                left.start = region.end.min(left.end);
            }
        }
        assert!(
            left.is_empty(),
            "{len} bytes at {at:#x} are not the guest's"
        );
    }
}
