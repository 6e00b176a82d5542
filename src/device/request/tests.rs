use super::*;
use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT_TABLE: u64 = 0x4000;
const HEADER: u64 = 0x5000;
const STATUS: u64 = 0x6000;
/// The two regions of the memory meet here.
const SEAM: u64 = 0x1_0000;
const DATA: u64 = 0x8000;
const MEMORY_LEN: u64 = 0x2_0000;
/// A small third region, behind a hole.
const FAR: u64 = 0x4_0000;
const RING_SIZE: u16 = 16;

const LIMITS: Limits = Limits {
    disk_size: Sector(1000),
    read_only: false,
    max_ranges: 4,
    max_range_sectors: 500,
};

/// Status of a request without an answer.
const UNTOUCHED: u8 = 0xaa;

#[derive(Clone, Copy, Debug)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn readable(addr: u64, len: u32) -> Desc {
    Desc {
        addr,
        len,
        flags: 0,
        next: 0,
    }
}

fn writable(addr: u64, len: u32) -> Desc {
    Desc {
        flags: WRITE,
        ..readable(addr, len)
    }
}

fn header_part() -> Desc {
    readable(HEADER, 16)
}

fn status_part() -> Desc {
    writable(STATUS, 1)
}

/// Links descriptors in order.
fn linked(parts: &[Desc]) -> Vec<Desc> {
    let mut parts = parts.to_vec();
    let last = parts.len() - 1;
    for (index, part) in parts[..last].iter_mut().enumerate() {
        part.flags |= NEXT;
        part.next = index as u16 + 1;
    }
    parts
}

struct Rig {
    memory: GuestMemoryMmap,
    limits: Limits,
}

/// What a chain was answered with.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Accepted {
        used_len: u32,
    },
    Refused {
        error: RequestError,
        status: Option<u8>,
    },
}

impl Rig {
    fn new() -> Self {
        let regions = [
            (GuestAddress(0), SEAM as usize),
            (GuestAddress(SEAM), (MEMORY_LEN - SEAM) as usize),
            (GuestAddress(FAR), 0x1000),
        ];
        let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
        memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        Self {
            memory,
            limits: LIMITS,
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.write(HEADER, &bytes);
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn table(&self, at: u64, parts: &[Desc]) {
        for (index, part) in parts.iter().enumerate() {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&part.addr.to_le_bytes());
            bytes[8..12].copy_from_slice(&part.len.to_le_bytes());
            bytes[12..14].copy_from_slice(&part.flags.to_le_bytes());
            bytes[14..].copy_from_slice(&part.next.to_le_bytes());
            self.write(at + 16 * index as u64, &bytes);
        }
    }

    /// Parses the chain that starts at descriptor 0 of the table in memory.
    fn parse_table(&self) -> Result<Request, Rejected> {
        let mut queue = Queue::new(RING_SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(TABLE))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(AVAIL))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        self.write(AVAIL, &[0, 0, 1, 0, 0, 0]);
        let chain = queue.iter(&self.memory).unwrap().next().unwrap();
        // SAFETY: the memory lives longer than what the tests do with the request.
        unsafe { parse(chain, &self.memory, &self.limits) }
    }

    fn parse(&self, parts: &[Desc]) -> Result<Request, Rejected> {
        self.table(TABLE, &linked(parts));
        self.parse_table()
    }

    fn answer(&self, parsed: Result<Request, Rejected>) -> Answer {
        match parsed {
            Ok(request) => Answer::Accepted {
                used_len: request.reply.finish(Status::Ok),
            },
            Err(Rejected { error, reply, .. }) => {
                let status = reply.map(|reply| {
                    let has_room_for_data = reply.room > 0;
                    let used_len = reply.finish(error.status());
                    assert_eq!(used_len, u32::from(!has_room_for_data));
                    self.memory.read_obj(GuestAddress(STATUS)).unwrap()
                });
                Answer::Refused { error, status }
            }
        }
    }

    /// Expects a refusal with an answer.
    fn refused(&self, parts: &[Desc]) -> (RequestError, u8) {
        match self.answer(self.parse(parts)) {
            Answer::Refused {
                error,
                status: Some(status),
            } => (error, status),
            other => panic!("{other:?}"),
        }
    }

    /// Expects a read; returns its sector and the guest addresses of its memory.
    fn read_parts(&self, parts: &[Desc]) -> (Sector, Vec<(u64, usize)>) {
        let request = self.parse(parts).unwrap();
        let Operation::Engine(Command::Read { start, data }) = &request.operation else {
            panic!("{request:?}");
        };
        let parts = (*start, self.addresses(data));
        request.reply.abandon();
        parts
    }

    fn addresses(&self, segments: &Segments) -> Vec<(u64, usize)> {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
        let find = |ptr: usize| {
            self.memory.iter().find_map(|region: &GuestRegionMmap| {
                let offset = ptr.checked_sub(region.as_ptr() as usize)? as u64;
                (offset < region.len()).then(|| region.start_addr().0 + offset)
            })
        };
        let parts = segments.as_slice().iter();
        parts
            .map(|part| (find(part.as_ptr() as usize).unwrap(), part.len()))
            .collect()
    }
}

#[test]
fn a_read_is_what_the_driver_asked_for() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_IN, 7);
    let parts = [header_part(), writable(DATA, 1024), status_part()];
    let (start, data) = rig.read_parts(&parts);
    assert_eq!(start, Sector(7));
    assert_eq!(data, [(DATA, 1024)]);
    assert_eq!(
        rig.answer(rig.parse(&parts)),
        Answer::Accepted { used_len: 1025 }
    );
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
}

#[test]
fn the_length_of_an_error_claims_no_byte_that_was_not_written() {
    let rig = Rig::new();
    let fail = |kind, data: &[Desc]| {
        rig.header(kind, 7);
        let parts = [&[header_part()], data, &[status_part()]].concat();
        let reply = rig.parse(&parts).unwrap().reply;
        let used_len = reply.finish(Status::IoError);
        assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 1);
        used_len
    };
    // The status byte lies behind data that was not written.
    assert_eq!(fail(virtio_blk::VIRTIO_BLK_T_IN, &[writable(DATA, 512)]), 0);
    // It is the only byte to be written.
    assert_eq!(
        fail(virtio_blk::VIRTIO_BLK_T_OUT, &[readable(DATA, 512)]),
        1
    );
    assert_eq!(fail(virtio_blk::VIRTIO_BLK_T_FLUSH, &[]), 1);
}

#[test]
fn the_barrier_flag_of_old_firmware_is_ignored() {
    let rig = Rig::new();
    let barrier = 1 << 31;
    rig.header(virtio_blk::VIRTIO_BLK_T_IN | barrier, 7);
    let parts = [header_part(), writable(DATA, 512), status_part()];
    assert_eq!(rig.read_parts(&parts).0, Sector(7));
    rig.header(virtio_blk::VIRTIO_BLK_T_OUT | barrier, 7);
    let request = rig
        .parse(&[header_part(), readable(DATA, 512), status_part()])
        .unwrap();
    assert!(matches!(
        request.operation,
        Operation::Engine(Command::Write { .. })
    ));
    request.reply.abandon();
}

#[test]
fn a_write_takes_what_follows_the_header() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_OUT, 998);
    let request = rig
        .parse(&[
            header_part(),
            readable(DATA, 1000),
            readable(DATA + 4096, 24),
            status_part(),
        ])
        .unwrap();
    let Operation::Engine(Command::Write { start, data }) = &request.operation else {
        panic!("{request:?}");
    };
    assert_eq!(*start, Sector(998));
    assert_eq!(rig.addresses(data), [(DATA, 1000), (DATA + 4096, 24)]);
    assert_eq!(request.reply.finish(Status::Ok), 1);
}

#[test]
fn the_layout_of_descriptors_is_free() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_IN, 7);
    // A header in four pieces with empty ones between, and a status byte in one
    // descriptor with data.
    let pieces = [
        readable(HEADER, 1),
        readable(0, 0),
        readable(HEADER + 1, 9),
        readable(HEADER + 10, 4),
        readable(HEADER + 14, 2),
        writable(DATA, 100),
        writable(u64::MAX, 0),
        writable(STATUS - 412, 413),
    ];
    let (start, data) = rig.read_parts(&pieces);
    assert_eq!(start, Sector(7));
    assert_eq!(data, [(DATA, 100), (STATUS - 412, 412)]);
    assert_eq!(
        rig.answer(rig.parse(&pieces)),
        Answer::Accepted { used_len: 513 }
    );

    // Header and data of a write in one descriptor.
    rig.header(virtio_blk::VIRTIO_BLK_T_OUT, 3);
    let request = rig
        .parse(&[readable(HEADER, 16 + 512), status_part()])
        .unwrap();
    let Operation::Engine(Command::Write { data, .. }) = &request.operation else {
        panic!("{request:?}");
    };
    assert_eq!(rig.addresses(data), [(HEADER + 16, 512)]);
    request.reply.abandon();
}

#[test]
fn data_may_cross_from_one_region_into_the_next() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_IN, 0);
    let parts = [header_part(), writable(SEAM - 100, 512), status_part()];
    let (_, data) = rig.read_parts(&parts);
    // In one piece, should the two happen to follow each other in this process.
    let pieces = [(SEAM - 100, 100), (SEAM, 412)];
    assert!(data == pieces || data == [(SEAM - 100, 512)], "{data:x?}");
}

#[test]
fn an_indirect_table_is_followed() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_IN, 5);
    rig.table(
        INDIRECT_TABLE,
        &linked(&[header_part(), writable(DATA, 512), status_part()]),
    );
    let indirect = Desc {
        flags: INDIRECT,
        ..readable(INDIRECT_TABLE, 48)
    };
    let (start, data) = rig.read_parts(&[indirect]);
    assert_eq!((start, data), (Sector(5), vec![(DATA, 512)]));
}

/// The answer to a read by an indirect table of so many descriptors.
fn answer_to_long_chain(rig: &Rig, count: usize) -> Answer {
    rig.header(virtio_blk::VIRTIO_BLK_T_IN, 0);
    // The same memory over and over: no two of them are one piece.
    let mut parts = vec![writable(DATA, 256); count];
    parts[0] = header_part();
    parts[count - 1] = status_part();
    rig.table(SEAM, &linked(&parts));
    let indirect = Desc {
        flags: INDIRECT,
        ..readable(SEAM, 16 * count as u32)
    };
    rig.answer(rig.parse(&[indirect]))
}

#[test]
fn a_chain_is_at_most_as_long_as_the_longest_ring_can_be() {
    let rig = Rig::new();
    let used_len = 256 * (MAX_CHAIN as u32 - 2) + 1;
    assert_eq!(
        answer_to_long_chain(&rig, MAX_CHAIN),
        Answer::Accepted { used_len }
    );
    let refused = Answer::Refused {
        error: RequestError::ChainTooLong,
        status: None,
    };
    for count in [MAX_CHAIN + 2, 4000] {
        assert_eq!(answer_to_long_chain(&rig, count), refused, "{count}");
    }
}

#[test]
fn a_flush_has_no_data() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_FLUSH, 0);
    let request = rig.parse(&[header_part(), status_part()]).unwrap();
    assert!(matches!(
        request.operation,
        Operation::Engine(Command::Flush)
    ));
    assert_eq!(request.reply.finish(Status::Ok), 1);
}

#[test]
fn get_id_has_up_to_20_bytes() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_GET_ID, 0);
    // Without the status byte where there is a gap in front of it.
    for (len, expected, used) in [(20, 20, 21), (512, 20, 20), (7, 7, 8)] {
        let request = rig
            .parse(&[header_part(), writable(DATA, len), status_part()])
            .unwrap();
        let Operation::GetId(memory) = &request.operation else {
            panic!("{request:?}");
        };
        assert_eq!(memory.len(), expected);
        assert_eq!(request.reply.finish(Status::Ok), used);
    }
    let (error, status) = rig.refused(&[header_part(), status_part()]);
    assert_eq!((error, status), (RequestError::DataLength(0), 1));
}

fn range_bytes(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn discards_have_ranges() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_DISCARD, 0);
    rig.write(
        DATA,
        &[range_bytes(1, 2, 0), range_bytes(500, 500, 0)].concat(),
    );
    // The ranges are cut over two descriptors.
    let parts = [
        header_part(),
        readable(DATA, 20),
        readable(DATA + 20, 12),
        status_part(),
    ];
    let request = rig.parse(&parts).unwrap();
    let Operation::Engine(Command::Discard { ranges }) = &request.operation else {
        panic!("{request:?}");
    };
    let range = |start, count| SectorRange {
        start: Sector(start),
        count: Sector(count),
    };
    assert_eq!(ranges[..], [range(1, 2), range(500, 500)]);
    assert_eq!(request.reply.finish(Status::Ok), 1);
}

#[test]
fn a_range_may_be_empty() {
    let rig = Rig::new();
    for kind in [
        virtio_blk::VIRTIO_BLK_T_DISCARD,
        virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES,
    ] {
        rig.header(kind, 0);
        for start in [0, 1000] {
            rig.write(DATA, &range_bytes(start, 0, 0));
            let parts = [header_part(), readable(DATA, 16), status_part()];
            assert_eq!(
                rig.answer(rig.parse(&parts)),
                Answer::Accepted { used_len: 1 }
            );
        }
    }
}

#[test]
fn zeroes_are_unmapped_only_where_that_is_allowed() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES, 0);
    for (flags, expected) in [([0, 0], false), ([1, 0], false), ([1, 1], true)] {
        let bytes = [range_bytes(1, 2, flags[0]), range_bytes(9, 1, flags[1])].concat();
        rig.write(DATA, &bytes);
        let request = rig
            .parse(&[header_part(), readable(DATA, 32), status_part()])
            .unwrap();
        let Operation::Engine(Command::WriteZeroes { unmap, .. }) = request.operation else {
            panic!("{request:?}");
        };
        assert_eq!(unmap, expected);
        request.reply.abandon();
    }
}

#[test]
fn bad_ranges_are_refused() {
    let rig = Rig::new();
    let discard = virtio_blk::VIRTIO_BLK_T_DISCARD;
    let zeroes = virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES;
    let past_end = |start, count| RequestError::PastEnd {
        start,
        count,
        disk_size: 1000,
    };
    for (kind, bytes, error, status) in [
        (
            discard,
            range_bytes(0, 1, 1),
            RequestError::UnknownFlags(1),
            2,
        ),
        (
            zeroes,
            range_bytes(0, 1, 2),
            RequestError::UnknownFlags(2),
            2,
        ),
        (
            zeroes,
            range_bytes(0, 1, 3),
            RequestError::UnknownFlags(3),
            2,
        ),
        // The flag counts for more than that the range is wrong, too.
        (
            discard,
            range_bytes(1000, 1, 1),
            RequestError::UnknownFlags(1),
            2,
        ),
        (
            zeroes,
            range_bytes(0, 501, 2),
            RequestError::UnknownFlags(2),
            2,
        ),
        (discard, range_bytes(1001, 0, 0), past_end(1001, 0), 1),
        (
            discard,
            range_bytes(0, 501, 0),
            RequestError::RangeLength(501),
            1,
        ),
        (discard, range_bytes(501, 500, 0), past_end(501, 500), 1),
        (
            zeroes,
            range_bytes(u64::MAX, 2, 0),
            past_end(u64::MAX, 2),
            1,
        ),
        (discard, vec![0; 15], RequestError::RangesLength(15), 1),
        (discard, vec![], RequestError::RangesLength(0), 1),
        (discard, vec![0; 17], RequestError::RangesLength(17), 1),
        (
            discard,
            range_bytes(0, 1, 0).repeat(5),
            RequestError::RangesLength(80),
            1,
        ),
    ] {
        rig.header(kind, 0);
        rig.write(DATA, &bytes);
        let data = readable(DATA, bytes.len() as u32);
        assert_eq!(
            rig.refused(&[header_part(), data, status_part()]),
            (error, status)
        );
    }
}

#[test]
fn sectors_beyond_the_end_are_refused() {
    let rig = Rig::new();
    for (sector, len, count) in [
        (1000, 512, 1),
        (999, 1024, 2),
        (u64::MAX, 512, 1),
        (u64::MAX / 512, 512, 1),
    ] {
        let error = RequestError::PastEnd {
            start: sector,
            count,
            disk_size: 1000,
        };
        rig.header(virtio_blk::VIRTIO_BLK_T_IN, sector);
        let read = rig.refused(&[header_part(), writable(DATA, len), status_part()]);
        assert_eq!(read, (error.clone(), 1));
        rig.header(virtio_blk::VIRTIO_BLK_T_OUT, sector);
        let write = rig.refused(&[header_part(), readable(DATA, len), status_part()]);
        assert_eq!(write, (error, 1));
    }
}

#[test]
fn data_is_one_or_more_whole_sectors() {
    let rig = Rig::new();
    for len in [0, 1, 511, 513] {
        let expected = (RequestError::DataLength(len as usize), 1);
        rig.header(virtio_blk::VIRTIO_BLK_T_IN, 0);
        let read = rig.refused(&[header_part(), writable(DATA, len), status_part()]);
        assert_eq!(read, expected);
        rig.header(virtio_blk::VIRTIO_BLK_T_OUT, 0);
        let write = rig.refused(&[header_part(), readable(DATA, len), status_part()]);
        assert_eq!(write, expected);
    }
}

#[test]
fn unknown_types_are_unsupported() {
    let rig = Rig::new();
    for kind in [2, 3, 5, 14, 0x4000_0000, 0x8000_0002, u32::MAX] {
        rig.header(kind, 0);
        let answer = rig.refused(&[header_part(), status_part()]);
        let error = RequestError::UnknownType(kind & !TYPE_BARRIER);
        assert_eq!(answer, (error, 2));
    }
}

#[test]
fn a_read_only_disk_is_not_changed() {
    let mut rig = Rig::new();
    rig.limits.read_only = true;
    rig.write(DATA, &range_bytes(0, 1, 0));
    for (kind, len) in [
        (virtio_blk::VIRTIO_BLK_T_OUT, 512),
        (virtio_blk::VIRTIO_BLK_T_DISCARD, 16),
        (virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES, 16),
    ] {
        rig.header(kind, 0);
        let answer = rig.refused(&[header_part(), readable(DATA, len), status_part()]);
        assert_eq!(answer, (RequestError::ReadOnly, 1));
    }
    rig.header(virtio_blk::VIRTIO_BLK_T_FLUSH, 0);
    rig.parse(&[header_part(), status_part()])
        .unwrap()
        .reply
        .abandon();
}

#[test]
fn chains_without_a_proper_frame_are_refused() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_IN, 0);
    let outside = |addr, len| RequestError::OutsideMemory { addr, len };
    // A header that is to be written.
    let answer = rig.refused(&[writable(HEADER, 16), writable(DATA, 512), status_part()]);
    assert_eq!(answer, (RequestError::NoHeader(0), 1));
    let answer = rig.refused(&[readable(HEADER, 15), status_part()]);
    assert_eq!(answer, (RequestError::NoHeader(15), 1));
    let answer = rig.refused(&[writable(DATA, 512), header_part(), status_part()]);
    assert_eq!(answer, (RequestError::OutOfOrder, 1));
    let answer = rig.refused(&[readable(MEMORY_LEN, 16), status_part()]);
    assert_eq!(answer, (outside(MEMORY_LEN, 16), 1));
    // Data that begins or ends outside, or goes round the end of addresses.
    for (addr, len) in [
        (MEMORY_LEN, 512),
        (MEMORY_LEN - 511, 512),
        (u64::MAX - 10, 512),
    ] {
        let answer = rig.refused(&[header_part(), writable(addr, len), status_part()]);
        assert_eq!(answer, (outside(addr, len), 1));
        let answer = rig.refused(&[header_part(), readable(addr, len), status_part()]);
        assert_eq!(answer, (outside(addr, len), 1));
    }
    // Data outside in the descriptor that has the status byte.
    rig.memory.write_obj(UNTOUCHED, GuestAddress(FAR)).unwrap();
    let parsed = rig.parse(&[header_part(), writable(FAR - 512, 513)]);
    let Err(Rejected {
        error,
        reply: Some(reply),
        ..
    }) = parsed
    else {
        panic!("{parsed:?}");
    };
    assert_eq!(error, outside(FAR - 512, 512));
    reply.finish(error.status());
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(FAR)).unwrap(), 1);
}

#[test]
fn chains_without_a_status_byte_have_no_answer() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_IN, 0);
    let no_answer = |error| Answer::Refused {
        error,
        status: None,
    };
    for (parts, error) in [
        (vec![header_part()], RequestError::NoStatus),
        (
            vec![header_part(), readable(DATA, 512)],
            RequestError::NoStatus,
        ),
        (
            vec![header_part(), writable(DATA, 0)],
            RequestError::NoStatus,
        ),
        (vec![readable(0, 0)], RequestError::NoStatus),
        (
            vec![header_part(), writable(MEMORY_LEN, 1)],
            RequestError::NoStatus,
        ),
    ] {
        assert_eq!(rig.answer(rig.parse(&parts)), no_answer(error));
    }
    // Two halves of 4 GiB are more than a chain may have.
    let half = readable(0, 1 << 31);
    let answer = rig.answer(rig.parse(&[half, half, status_part()]));
    assert_eq!(answer, no_answer(RequestError::BrokenChain));
}

/// Also where there is no place for an answer.
#[test]
fn what_is_refused_counts_as_what_it_was_to_be() {
    let rig = Rig::new();
    for (request_type, kind) in [
        (virtio_blk::VIRTIO_BLK_T_IN, Some(Kind::Read)),
        (virtio_blk::VIRTIO_BLK_T_OUT, Some(Kind::Write)),
        (virtio_blk::VIRTIO_BLK_T_FLUSH, Some(Kind::Flush)),
        (virtio_blk::VIRTIO_BLK_T_DISCARD, Some(Kind::Unmap)),
        (virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES, Some(Kind::Write)),
        (virtio_blk::VIRTIO_BLK_T_GET_ID, None),
        (77, None),
    ] {
        rig.header(request_type, 0);
        let out_of_order = [header_part(), status_part(), readable(DATA, 512)];
        for parts in [&out_of_order[..], &[header_part()]] {
            let rejected = rig.parse(parts).unwrap_err();
            assert_eq!(rejected.kind, kind, "{request_type}");
            if let Some(reply) = rejected.reply {
                reply.abandon();
            }
        }
        let cut = rig.parse(&[readable(HEADER, 15), status_part()]);
        let Rejected { kind, reply, .. } = cut.unwrap_err();
        assert_eq!(kind, None, "it is not known what it was to be");
        reply.unwrap().abandon();
    }
}

#[test]
fn loops_and_links_that_lead_nowhere_end() {
    let rig = Rig::new();
    rig.header(virtio_blk::VIRTIO_BLK_T_IN, 0);
    let broken = Answer::Refused {
        error: RequestError::BrokenChain,
        status: None,
    };
    let link = |part: Desc, next| Desc {
        flags: part.flags | NEXT,
        next,
        ..part
    };
    let table = |addr, len| Desc {
        flags: INDIRECT,
        ..readable(addr, len)
    };
    let chains = [
        vec![link(header_part(), 0)],
        vec![link(header_part(), 1), link(status_part(), 0)],
        vec![link(header_part(), RING_SIZE)],
        vec![link(header_part(), 1), link(status_part(), u16::MAX)],
        // Indirect tables of no whole number of descriptors, outside, in themselves.
        vec![table(INDIRECT_TABLE, 15)],
        vec![table(INDIRECT_TABLE, 0)],
        vec![table(MEMORY_LEN, 48)],
        vec![table(u64::MAX, 48)],
        vec![table(TABLE, 16)],
        vec![table(INDIRECT_TABLE, 0xffff_fff0)],
    ];
    for chain in chains {
        rig.table(TABLE, &chain);
        assert_eq!(rig.answer(rig.parse_table()), broken, "{chain:?}");
    }
}

/// Mostly sensible values, and some that are not.
fn desc() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        4 => (0..MEMORY_LEN).prop_map(|addr| addr & !0xf),
        2 => Just(HEADER),
        1 => Just(INDIRECT_TABLE),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => prop::sample::select(vec![0_u32, 1, 16, 48, 512, 513, 4096]),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![4 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![4 => 0..RING_SIZE, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Desc {
        addr,
        len,
        flags,
        next,
    })
}

proptest! {
    #[test]
    fn no_table_panics_or_hangs(
        table in prop::collection::vec(desc(), usize::from(RING_SIZE)),
        indirect in prop::collection::vec(desc(), 8),
        header in prop::collection::vec(any::<u8>(), 16),
        kind in 0..16_u32,
        sector in prop_oneof![0..1000_u64, any::<u64>()],
        is_random_header in any::<bool>(),
    ) {
        let rig = Rig::new();
        if is_random_header {
            rig.write(HEADER, &header);
        } else {
            rig.header(kind, sector);
        }
        rig.table(TABLE, &table);
        rig.table(INDIRECT_TABLE, &indirect);
        match rig.parse_table() {
            Ok(request) => {
                if let Operation::Engine(Command::Read { start, data } | Command::Write { start, data }) = &request.operation {
                    let sectors = data.len() as u64 / SECTOR_SIZE;
                    prop_assert!((data.len() as u64).is_multiple_of(SECTOR_SIZE) && sectors > 0);
                    prop_assert!(start.0 + sectors <= LIMITS.disk_size.0);
                    let total: usize = rig.addresses(data).iter().map(|part| part.1).sum();
                    prop_assert_eq!(total, data.len());
                }
                request.reply.finish(Status::Ok);
            }
            Err(Rejected { error, reply, .. }) => {
                if let Some(reply) = reply {
                    reply.finish(error.status());
                }
            }
        }
    }
}
