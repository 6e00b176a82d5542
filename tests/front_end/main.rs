//! The device against `vhost`'s own front-end and rings made by hand: what a guest
//! in QEMU or `blkio` does not do, and what nobody should.

mod dirty_log;
#[path = "../common/front_end.rs"]
mod front_end;
mod held;
mod rig;
mod suspended;

use std::{
    fs,
    io::{Read, Write},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd},
    os::unix::fs::{FileExt, MetadataExt},
    os::unix::net::UnixStream,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use front_end::*;
use rig::*;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost_user_ploop::device::Parked;
use vhost_user_ploop::format::Sector;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const MIB: u64 = 1 << 20;

/// How many transfers of 1 MiB a queue has under way if no other needs any: all that the
/// queues share.
const MOST_PARTS: usize = 16;

/// How many requests a test has in flight.
const BUSY: usize = 8;

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(7) ^ seed)
        .collect()
}

/// Writes a sector and reads it back into another place of the memory.
fn expect_service(front_end: &mut FrontEnd, queue: usize) {
    let data = pattern(queue as u8, 512);
    front_end.fill(DATA, &data);
    front_end.fill(DATA + 512, &[0; 512]);
    let sector = 100 + queue as u64;
    let ring = &mut front_end.rings[queue];
    assert_eq!(
        ring.run(VIRTIO_BLK_T_OUT, sector, &[readable(DATA, 512)]),
        (OK, 1)
    );
    let target = [writable(DATA + 512, 512)];
    assert_eq!(ring.run(VIRTIO_BLK_T_IN, sector, &target), (OK, 513));
    assert_eq!(front_end.bytes(DATA + 512, 512), data);
}

#[test]
fn every_queue_serves_every_kind_of_request() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    for queue in 0..front_end.rings.len() {
        expect_service(&mut front_end, queue);
        front_end.fill(DATA, &ranges(&[(100, 8, 0)]));
        let ring = &mut front_end.rings[queue];
        let parts = [readable(DATA, 16)];
        assert_eq!(ring.run(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        assert_eq!(ring.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, &parts), (OK, 1));
        assert_eq!(ring.run(VIRTIO_BLK_T_DISCARD, 0, &parts), (OK, 1));
        assert_eq!(
            ring.run(VIRTIO_BLK_T_GET_ID, 0, &[writable(DATA, 20)]),
            (OK, 21)
        );
        assert_eq!(
            &front_end.bytes(DATA, 20)[..SERIAL.len()],
            SERIAL.as_bytes()
        );
        front_end.fill(DATA, &[1; 512]);
        let ring = &mut front_end.rings[queue];
        let target = [writable(DATA, 512)];
        assert_eq!(ring.run(VIRTIO_BLK_T_IN, 100, &target), (OK, 513));
        assert_eq!(front_end.bytes(DATA, 512), [0; 512]);
    }
}

/// Ranges as they lie in memory: first sector, count and flags of each.
fn ranges(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let bytes = ranges.iter().map(|(sector, count, flags)| {
        let (count, flags) = (count.to_le_bytes(), flags.to_le_bytes());
        [&sector.to_le_bytes()[..], &count, &flags].concat()
    });
    bytes.collect::<Vec<_>>().concat()
}

#[test]
fn a_discard_or_write_zeroes_may_have_many_ranges() {
    const UNMAP: u32 = 1;
    /// Of what is written at the start of each of the first four clusters.
    const SECTORS: u64 = 64;
    /// Between the starts of clusters.
    const CLUSTER: u64 = 2048;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let data = pattern(1, SECTORS as usize * 512);
    let places = (DATA, DATA + data.len() as u64);
    let len = data.len() as u32;

    // A part of a cluster, a whole one, and from one far into the next. The
    // sectors of the zeroes are aligned to nothing, some ranges are unmapped, and
    // one comes twice.
    let discards = [
        (8, 16, 0),
        (CLUSTER, CLUSTER as u32, 0),
        (2 * CLUSTER + 32, CLUSTER as u32, 0),
    ];
    let zeroes = [
        (3, 5, 0),
        (CLUSTER + 1, 1, UNMAP),
        (3 * CLUSTER - 7, 14, UNMAP),
        (2 * CLUSTER + 63, 9, 0),
        (3, 5, UNMAP),
    ];
    let cases = [
        (VIRTIO_BLK_T_DISCARD, &discards[..]),
        (VIRTIO_BLK_T_WRITE_ZEROES, &zeroes),
    ];
    for (kind, list) in cases {
        for cluster in 0..4 {
            front_end.fill(places.0, &data);
            let source = [readable(places.0, len)];
            let ring = &mut front_end.rings[0];
            let answer = ring.run(VIRTIO_BLK_T_OUT, cluster * CLUSTER, &source);
            assert_eq!(answer, (OK, 1));
        }
        // Cut where the driver pleases.
        let bytes = ranges(list);
        front_end.fill(places.0, &bytes);
        let cut = bytes.len() as u32 - 10;
        let parts = [
            readable(places.0, cut),
            readable(places.0 + u64::from(cut), 10),
        ];
        assert_eq!(front_end.rings[0].run(kind, 0, &parts), (OK, 1));

        for cluster in 0..4 {
            let first = cluster * CLUSTER;
            let target = [writable(places.1, len)];
            let answer = front_end.rings[0].run(VIRTIO_BLK_T_IN, first, &target);
            assert_eq!(answer, (OK, len + 1));
            let mut expected = data.clone();
            for (index, sector) in expected.chunks_mut(512).enumerate() {
                let number = first + index as u64;
                let is_in = |range: &(u64, u32, u32)| {
                    (range.0..range.0 + u64::from(range.1)).contains(&number)
                };
                if list.iter().any(is_in) {
                    sector.fill(0);
                }
            }
            let found = front_end.bytes(places.1, data.len());
            assert!(found == expected, "{kind}: cluster {cluster}");
        }
    }
}

#[test]
fn empty_ranges_change_nothing() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        front_end.fill(DATA, &ranges(&[(0, 0, 0), (DISK_SIZE.0, 0, 0)]));
        let answer = front_end.rings[0].run(kind, 0, &[readable(DATA, 32)]);
        assert_eq!(answer, (OK, 1));
    }
}

#[test]
fn a_bad_range_among_good_ones_changes_nothing() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let size = DISK_SIZE.0;
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for bad in [(size - 1, 2, 0), (u64::MAX, 2, 0), (200, 8, 1 << 31)] {
            let data = pattern(3, 512);
            front_end.fill(DATA, &data);
            let source = [readable(DATA, 512)];
            let answer = front_end.rings[0].run(VIRTIO_BLK_T_OUT, 100, &source);
            assert_eq!(answer, (OK, 1));
            front_end.fill(DATA, &ranges(&[(100, 8, 0), bad]));
            let parts = [readable(DATA, 32)];
            let (status, used) = front_end.rings[0].run(kind, 0, &parts);
            assert_ne!(status, OK, "{kind}: {bad:?}");
            assert_eq!(used, 1);
            let target = [writable(DATA, 512)];
            let answer = front_end.rings[0].run(VIRTIO_BLK_T_IN, 100, &target);
            assert_eq!(answer, (OK, 513));
            assert_eq!(front_end.bytes(DATA, 512), data, "{kind}: {bad:?}");
        }
    }
}

#[test]
fn a_driver_without_event_idx_is_served() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(WITHOUT_EVENT_IDX);
    front_end.start_rings();
    expect_service(&mut front_end, 0);
}

#[test]
fn a_batch_has_one_signal() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let ring = &mut front_end.rings[0];
    let heads = make_busy(&rig, ring);
    let before = ring.signals();
    rig.disk.let_go();
    for _ in &heads {
        ring.wait_used();
    }
    thread::sleep(A_WHILE);
    assert_eq!(ring.signals(), before + 1);
}

/// Writes what later reads have to fetch from the disk: holes and zeros need none.
fn map_sectors(ring: &mut Ring, count: usize) {
    ring.fill(DATA, &pattern(1, 512 * count));
    let data = [readable(DATA, 512 * count as u32)];
    assert_eq!(ring.run(VIRTIO_BLK_T_OUT, 0, &data), (OK, 1));
}

/// Puts reads in flight and keeps them there.
fn make_busy(rig: &Rig, ring: &mut Ring) -> Vec<u16> {
    map_sectors(ring, BUSY);
    rig.disk.hold();
    let heads = (0..BUSY as u64)
        .map(|index| ring.request(VIRTIO_BLK_T_IN, index, &[writable(DATA + 512 * index, 512)]))
        .collect();
    ring.kick();
    rig.disk.wait_for_held(BUSY);
    heads
}

/// Checks that all of these are in the used ring now, successfully.
fn expect_answered(ring: &mut Ring, heads: &[u16]) {
    let mut used: Vec<_> = std::iter::from_fn(|| ring.take_used()).collect();
    used.sort_unstable();
    let expected: Vec<_> = heads.iter().map(|&head| (head, 513)).collect();
    assert_eq!(used, expected);
    for &head in heads {
        assert_eq!(ring.status(head), OK);
    }
}

/// Sends a message while requests are in flight. It must be answered only when
/// they are, and then all of them.
fn expect_drained_by<R: Send>(
    message: impl FnOnce(&mut FrontEnd) -> R + Send,
) -> (Rig, FrontEnd, R, Served) {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.start();
    let heads = make_busy(&rig, &mut front_end.rings[0]);
    let reply = thread::scope(|scope| {
        let (tell, answered) = mpsc::channel();
        let front_end = &mut front_end;
        let rig = &rig;
        let heads = &heads;
        let sender = scope.spawn(move || {
            let reply = message(front_end);
            tell.send(()).unwrap();
            expect_answered(&mut front_end.rings[0], heads);
            reply
        });
        let early = answered.recv_timeout(A_WHILE);
        rig.disk.let_go();
        assert_eq!(
            early,
            Err(mpsc::RecvTimeoutError::Timeout),
            "it did not wait"
        );
        sender.join().unwrap()
    });
    // The connection is still good.
    front_end.vhost.get_features().unwrap();
    (rig, front_end, reply, connection)
}

#[test]
fn stopping_a_ring_drains_it() {
    let (_rig, mut front_end, base, _connection) =
        expect_drained_by(|front_end| front_end.vhost.get_vring_base(0).unwrap());
    assert_eq!(base, u32::from(front_end.rings[0].avail_idx()));
    // Nothing is taken from a stopped ring, and all of it when it runs again.
    let ring = &mut front_end.rings[0];
    let head = ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    ring.kick();
    thread::sleep(A_WHILE);
    assert_eq!(ring.take_used(), None);
    let ring_start = ring.avail_idx() - 1;
    restart_ring(&mut front_end, 0, ring_start);
    assert_eq!(front_end.rings[0].wait_used(), (head, 1));
    expect_service(&mut front_end, 0);
    expect_service(&mut front_end, 1);
}

/// A transfer of all but the first MiB of the disk, by one page of descriptors that
/// all point to the same 64 KiB.
fn huge_request(front_end: &mut FrontEnd, kind: u32) -> u16 {
    const PIECE: u32 = 64 << 10;
    const TABLE: u64 = FAR + 0x8_0000;
    let is_read = kind == VIRTIO_BLK_T_IN;
    let count = (DISK_SIZE.0 * 512 - MIB) / u64::from(PIECE);
    let ring = &mut front_end.rings[0];
    let status = TABLE - 1;
    let piece = if is_read { writable } else { readable }(FAR, PIECE);
    let mut parts = vec![piece; count as usize];
    parts.insert(0, ring.header(kind, MIB / 512));
    parts.push(writable(status, 1));
    for (next, part) in (1..).zip(&mut parts) {
        part.next = next;
        part.flags |= if part.addr == status { 0 } else { NEXT };
    }
    ring.write_table(TABLE, &parts);
    ring.fill(status, &[UNTOUCHED]);
    let indirect = Desc {
        flags: INDIRECT,
        ..readable(TABLE, 16 * parts.len() as u32)
    };
    let head = ring.chain(&[indirect]);
    ring.kick();
    head
}

/// Stops ring 0, whose transfers are let go when that has begun. Returns the entry to go on
/// at.
fn stop_and_let_go(rig: &Rig, front_end: &mut FrontEnd) -> u16 {
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(A_WHILE);
            rig.disk.let_go();
        });
        front_end.vhost.get_vring_base(0).unwrap() as u16
    })
}

#[test]
fn a_stopped_ring_has_back_what_it_could_not_start() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    front_end.fill(FAR, &[0x55; 64 << 10]);
    let head = huge_request(&mut front_end, VIRTIO_BLK_T_OUT);
    assert_eq!(front_end.rings[0].wait_used(), (head, 1));
    rig.disk.hold();
    front_end.fill(FAR, &[0; 64 << 10]);
    let head = huge_request(&mut front_end, VIRTIO_BLK_T_IN);
    rig.disk.wait_for_held(MOST_PARTS);
    thread::sleep(A_WHILE);
    assert_eq!(rig.disk.held(), MOST_PARTS);
    // Two that come behind it stay in the ring.
    let target = [writable(DATA, 512)];
    let ring = &mut front_end.rings[0];
    let behind = [0; 2].map(|_| ring.request(VIRTIO_BLK_T_IN, 2048, &target));
    ring.kick();
    let base = stop_and_let_go(&rig, &mut front_end);
    let ring = &mut front_end.rings[0];
    assert_eq!(base, ring.avail_idx() - 3);
    assert_eq!(ring.take_used(), None);
    restart_ring(&mut front_end, 0, base);
    let ring = &mut front_end.rings[0];
    let mut used = [0; 3].map(|_| ring.wait_used().0);
    let mut expected = [head, behind[0], behind[1]];
    used.sort_unstable();
    expected.sort_unstable();
    assert_eq!(used, expected);
    assert_eq!(front_end.bytes(FAR, 64 << 10), vec![0x55; 64 << 10]);
    expect_service(&mut front_end, 0);
}

/// Stops a ring in whose place limits keep writes back that are far more than the engine
/// starts at a time, with a flush that was done behind them and one more write behind that.
/// What the guest does after that must find all of them done or in the ring.
fn expect_held_writes_done_by(stop: impl FnOnce(&mut FrontEnd) -> Option<u16>) {
    const WRITES: u64 = 14;
    const LEN: u64 = 2 * MIB;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let data = pattern(3, MIB as usize);
    front_end.fill(SEAM, &data);
    rig.limit("bps_wr=1");
    let piece = readable(SEAM, MIB as u32);
    let ring = &mut front_end.rings[0];
    let write = |index| ring.request(VIRTIO_BLK_T_OUT, index * (LEN / 512), &[piece; 2]);
    let heads: Vec<_> = (0..WRITES).map(write).collect();
    ring.kick();
    assert_eq!(ring.wait_used(), (heads[0], 1), "none is too large");
    let flush = ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    let last = ring.request(VIRTIO_BLK_T_OUT, WRITES * (LEN / 512), &[piece]);
    ring.kick();
    assert_eq!(ring.wait_used(), (flush, 1), "it is free");
    thread::sleep(A_WHILE);
    let base = stop(&mut front_end);
    let ring = &mut front_end.rings[0];
    assert_eq!(base.unwrap_or(ring.avail_idx() - 1), ring.avail_idx() - 1);
    let mut used: Vec<_> = std::iter::from_fn(|| ring.take_used()).collect();
    used.sort_unstable();
    let expected: Vec<_> = heads[1..].iter().map(|&head| (head, 1)).collect();
    assert_eq!(used, expected);
    for &head in &heads {
        assert_eq!(ring.status(head), OK);
    }
    assert_eq!(ring.status(last), UNTOUCHED);

    rig.limit("");
    match base {
        Some(base) => restart_ring(&mut front_end, 0, base),
        None => front_end.vhost.set_vring_enable(0, true).unwrap(),
    }
    assert_eq!(front_end.rings[0].wait_used(), (last, 1));
    for index in 0..WRITES * LEN / MIB + 1 {
        front_end.fill(SEAM, &vec![0; MIB as usize]);
        let target = [writable(SEAM, MIB as u32)];
        let ring = &mut front_end.rings[0];
        let read = ring.run(VIRTIO_BLK_T_IN, index * (MIB / 512), &target);
        assert_eq!(read, (OK, MIB as u32 + 1));
        assert!(front_end.bytes(SEAM, MIB as usize) == data, "MiB {index}");
    }
    expect_service(&mut front_end, 0);
}

#[test]
fn a_ring_that_is_stopped_has_done_what_limits_kept_back_or_has_it_back() {
    expect_held_writes_done_by(|front_end| Some(front_end.vhost.get_vring_base(0).unwrap() as u16));
}

#[test]
fn a_ring_that_is_disabled_has_done_what_limits_kept_back_or_has_it_back() {
    expect_held_writes_done_by(|front_end| {
        front_end.vhost.set_vring_enable(0, false).unwrap();
        None
    });
}

#[test]
fn what_limits_keep_back_and_nothing_was_done_behind_stays_in_the_ring() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    rig.limit("bps_wr=1");
    let ring = &mut front_end.rings[0];
    let data = [readable(SEAM, MIB as u32)];
    let heads: Vec<_> = (0..20)
        .map(|index| ring.request(VIRTIO_BLK_T_OUT, index * (MIB / 512), &data))
        .collect();
    ring.kick();
    assert_eq!(ring.wait_used(), (heads[0], 1));
    thread::sleep(A_WHILE);
    let base = front_end.vhost.get_vring_base(0).unwrap();
    assert_eq!(base, 1);
    let ring = &mut front_end.rings[0];
    assert_eq!(ring.take_used(), None);
    rig.limit("");
    restart_ring(&mut front_end, 0, 1);
    let ring = &mut front_end.rings[0];
    let mut used: Vec<_> = heads[1..].iter().map(|_| ring.wait_used().0).collect();
    used.sort_unstable();
    assert_eq!(used, heads[1..]);
    assert!(heads.iter().all(|&head| ring.status(head) == OK));
}

#[test]
fn while_a_ring_stops_the_others_begin_nothing() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    front_end.fill(DATA, &[0x77; 512]);
    let target = [readable(DATA, 512)];
    for ring in &mut front_end.rings[..2] {
        ring.run(VIRTIO_BLK_T_OUT, 0, &target);
    }
    rig.disk.hold();
    let target = [writable(DATA, 512)];
    front_end.rings[0].request(VIRTIO_BLK_T_IN, 0, &target);
    front_end.rings[0].kick();
    rig.disk.wait_for_held(1);
    let (rings, vhost) = (&mut front_end.rings, &mut front_end.vhost);
    let other = thread::scope(|scope| {
        let stop = scope.spawn(|| vhost.get_vring_base(0).unwrap());
        thread::sleep(A_WHILE);
        let other = rings[1].request(VIRTIO_BLK_T_IN, 0, &target);
        rings[1].kick();
        thread::sleep(A_WHILE);
        let held = rig.disk.held();
        rig.disk.let_go();
        stop.join().unwrap();
        assert_eq!(held, 1);
        other
    });
    assert_eq!(front_end.rings[1].wait_used(), (other, 513));
}

fn restart_ring(front_end: &mut FrontEnd, index: usize, base: u16) {
    front_end.start_ring_at(index, base);
    front_end.vhost.set_vring_enable(index, true).unwrap();
}

#[test]
fn disabling_a_ring_drains_it() {
    let (_rig, mut front_end, (), _connection) = expect_drained_by(|front_end| {
        front_end.vhost.set_vring_enable(0, false).unwrap();
    });
    let ring = &mut front_end.rings[0];
    let head = ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    ring.kick();
    thread::sleep(A_WHILE);
    assert_eq!(ring.take_used(), None);
    front_end.vhost.set_vring_enable(0, true).unwrap();
    assert_eq!(front_end.rings[0].wait_used(), (head, 1));
    expect_service(&mut front_end, 0);
}

#[test]
fn resetting_the_device_drains_it() {
    let (_rig, mut front_end, (), _connection) = expect_drained_by(|front_end| {
        front_end.vhost.reset_device().unwrap();
    });
    let features = front_end.vhost.get_features().unwrap();
    front_end.vhost.set_features(features).unwrap();
    for index in 0..front_end.rings.len() {
        front_end.vhost.get_vring_base(index).unwrap();
        front_end.rings[index].forget();
    }
    front_end.start_rings();
    expect_service(&mut front_end, 0);
    expect_service(&mut front_end, 3);
}

#[test]
fn a_disconnect_drains_the_rings() {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.start();
    let heads = make_busy(&rig, &mut front_end.rings[0]);
    let FrontEnd {
        vhost, mut rings, ..
    } = front_end;
    drop(vhost);
    assert!(!connection.has_ended_within(A_WHILE), "it did not wait");
    rig.disk.let_go();
    assert!(connection.has_ended_within(PATIENCE));
    expect_answered(&mut rings[0], &heads);
    connection.stop(Parked::Drop);

    let (mut front_end, _connection) = rig.start();
    expect_service(&mut front_end, 0);
}

#[test]
fn stopping_the_device_drains_the_rings() {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.start();
    let heads = make_busy(&rig, &mut front_end.rings[2]);
    let stopping = thread::spawn(move || connection.stop(Parked::Fail));
    thread::sleep(A_WHILE);
    assert!(!stopping.is_finished(), "it did not wait");
    rig.disk.let_go();
    stopping.join().unwrap();
    expect_answered(&mut front_end.rings[2], &heads);
}

#[test]
fn idle_and_unused_rings_stop_at_once() {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    for index in 0..front_end.rings.len() {
        front_end.vhost.set_vring_enable(index, false).unwrap();
        assert_eq!(front_end.vhost.get_vring_base(index).unwrap(), 0);
    }
    front_end.vhost.reset_device().unwrap();
    connection.stop(Parked::Fail);
}

#[test]
fn a_request_from_before_the_start_is_found_without_a_kick() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    let early = front_end.rings[0].request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    front_end.start_ring_at(0, 0);
    let late = front_end.rings[0].request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    // The kick comes before the ring is enabled.
    front_end.rings[0].kick();
    thread::sleep(A_WHILE);
    assert_eq!(front_end.rings[0].take_used(), None, "it is not enabled");
    front_end.vhost.set_vring_enable(0, true).unwrap();
    let mut used = [
        front_end.rings[0].wait_used(),
        front_end.rings[0].wait_used(),
    ];
    used.sort_unstable();
    assert_eq!(used, [(early, 1), (late, 1)]);
}

#[test]
fn a_kick_that_somebody_else_reads_does_not_end_the_queue() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    // The device and this loop compete for the kicks.
    for _ in 0..200 {
        let ring = &mut front_end.rings[0];
        let head = ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
        ring.kick();
        let _ = ring.kick.read();
        ring.kick();
        assert_eq!(ring.wait_used(), (head, 1));
    }
    expect_service(&mut front_end, 0);
}

#[test]
fn requests_in_flight_keep_their_memory() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    front_end.fill(DATA, &pattern(9, 512));
    let ring = &mut front_end.rings[0];
    assert_eq!(
        ring.run(VIRTIO_BLK_T_OUT, 5, &[readable(DATA, 512)]),
        (OK, 1)
    );
    rig.disk.hold();
    let read = ring.request(VIRTIO_BLK_T_IN, 5, &[writable(FAR, 512)]);
    ring.kick();
    rig.disk.wait_for_held(1);
    // The region goes while the kernel has its address.
    front_end.set_memory(2);
    rig.disk.let_go();
    assert_eq!(front_end.rings[0].wait_used(), (read, 513));
    assert_eq!(front_end.bytes(FAR, 512), pattern(9, 512));
    // New requests do not find it any more.
    let ring = &mut front_end.rings[0];
    assert_eq!(
        ring.run(VIRTIO_BLK_T_IN, 5, &[writable(FAR, 512)]),
        (IOERR, 0)
    );
    expect_service(&mut front_end, 0);
}

#[test]
fn regions_come_and_go_one_by_one() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    front_end.set_memory(2);
    assert!(front_end.vhost.get_max_mem_slots().unwrap() > 8);
    let far = front_end.region(2);
    for _ in 0..50 {
        let read = [writable(FAR, 512)];
        assert_eq!(
            front_end.rings[0].run(VIRTIO_BLK_T_IN, 5, &read),
            (IOERR, 0)
        );
        front_end.vhost.add_mem_region(&far).unwrap();
        assert_eq!(front_end.rings[0].run(VIRTIO_BLK_T_IN, 5, &read), (OK, 513));
        front_end.vhost.remove_mem_region(&far).unwrap();
    }
}

/// How often this process has mapped the file of that region.
fn mappings(front_end: &FrontEnd, region: usize) -> usize {
    let region = front_end.memory.iter().nth(region).unwrap();
    let inode = region
        .file_offset()
        .unwrap()
        .file()
        .metadata()
        .unwrap()
        .ino();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let inode = format!(" {inode} ");
    maps.lines().filter(|line| line.contains(&inode)).count()
}

#[test]
fn idle_queues_let_go_of_memory_that_has_gone() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    for queue in 0..front_end.rings.len() {
        expect_service(&mut front_end, queue);
    }
    assert_eq!(mappings(&front_end, 2), 2);
    let far = front_end.region(2);
    front_end.vhost.remove_mem_region(&far).unwrap();
    let start = Instant::now();
    while mappings(&front_end, 2) > 1 {
        assert!(start.elapsed() < PATIENCE, "it is still mapped");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn data_may_lie_anywhere_in_the_memory() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let data = pattern(3, 4096);
    // Over a seam, at odd addresses, and in many pieces.
    let pieces = [(SEAM - 1000, 1999), (DATA + 1, 97), (FAR + 513, 2000)];
    let mut at = 0;
    let descs = pieces.map(|(addr, len)| {
        front_end.fill(addr, &data[at..at + len]);
        at += len;
        readable(addr, len as u32)
    });
    assert_eq!(at, data.len());
    let ring = &mut front_end.rings[0];
    assert_eq!(ring.run(VIRTIO_BLK_T_OUT, 40, &descs), (OK, 1));
    let target = writable(SEAM - 2048, 4096);
    assert_eq!(ring.run(VIRTIO_BLK_T_IN, 40, &[target]), (OK, 4097));
    assert_eq!(front_end.bytes(SEAM - 2048, 4096), data);
}

#[test]
fn refused_requests_are_answered_and_the_next_one_works() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let size = DISK_SIZE.0;
    front_end.fill(DATA, &[0xff; 512]);
    let cases: &[(u32, u64, Vec<Desc>, u8)] = &[
        (VIRTIO_BLK_T_IN, size, vec![writable(DATA, 512)], IOERR),
        (VIRTIO_BLK_T_IN, size - 1, vec![writable(DATA, 1024)], IOERR),
        (VIRTIO_BLK_T_OUT, u64::MAX, vec![readable(DATA, 512)], IOERR),
        (
            VIRTIO_BLK_T_OUT,
            u64::MAX / 512 + 1,
            vec![readable(DATA, 512)],
            IOERR,
        ),
        (VIRTIO_BLK_T_IN, 0, vec![], IOERR),
        (VIRTIO_BLK_T_OUT, 0, vec![], IOERR),
        (VIRTIO_BLK_T_IN, 0, vec![writable(DATA, 513)], IOERR),
        (VIRTIO_BLK_T_OUT, 0, vec![readable(DATA, 513)], IOERR),
        (VIRTIO_BLK_T_IN, 0, vec![writable(1 << 40, 512)], IOERR),
        (
            VIRTIO_BLK_T_OUT,
            0,
            vec![readable(u64::MAX - 5, 512)],
            IOERR,
        ),
        (
            VIRTIO_BLK_T_OUT,
            0,
            vec![readable(FAR + REGION_LEN - 1, 512)],
            IOERR,
        ),
        // Ranges of ones: flags that nobody knows, beyond the end.
        (VIRTIO_BLK_T_DISCARD, 0, vec![readable(DATA, 16)], UNSUPP),
        (VIRTIO_BLK_T_DISCARD, 0, vec![readable(DATA, 7)], IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0, vec![], IOERR),
        (VIRTIO_BLK_T_GET_ID, 0, vec![], IOERR),
        (77, 0, vec![], UNSUPP),
        (u32::MAX, 0, vec![writable(DATA, 512)], UNSUPP),
    ];
    for (kind, sector, data, status) in cases {
        let answer = front_end.rings[0].run(*kind, *sector, data);
        // The status byte counts where nothing in front of it was left unwritten.
        let used = u32::from(!data.iter().any(|part| part.flags & WRITE != 0));
        assert_eq!(answer, (*status, used), "{kind} at {sector}: {data:?}");
        expect_service(&mut front_end, 0);
    }
}

#[test]
fn chains_without_an_answer_come_back_and_the_next_one_works() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let ring = &mut front_end.rings[0];
    let header = ring.header(VIRTIO_BLK_T_IN, 0);
    let chains: &[&[Desc]] = &[
        &[header],
        &[header, readable(DATA, 512)],
        &[header, writable(1 << 50, 512)],
        &[readable(0, 0)],
        &[
            readable(0, u32::MAX),
            readable(0, u32::MAX),
            writable(DATA, 1),
        ],
    ];
    for chain in chains {
        let head = front_end.rings[0].chain(chain);
        front_end.rings[0].kick();
        assert_eq!(front_end.rings[0].wait_used(), (head, 0), "{chain:?}");
        expect_service(&mut front_end, 0);
    }
}

#[test]
fn tables_that_loop_or_lead_nowhere_end() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let ring = &mut front_end.rings[0];
    let link = |desc: Desc, next| Desc {
        flags: desc.flags | NEXT,
        next,
        ..desc
    };
    let table = |addr, len| Desc {
        flags: INDIRECT,
        ..readable(addr, len)
    };
    let header = ring.header(VIRTIO_BLK_T_IN, 0);
    let status = writable(DATA, 1);
    let tables: &[&[Desc]] = &[
        &[link(header, 0)],
        &[link(header, 1), link(status, 0)],
        &[link(header, 5000)],
        &[link(header, RING_SIZE)],
        &[table(DATA, 15)],
        &[table(1 << 40, 48)],
        &[table(u64::MAX - 15, 48)],
        &[table(ring.table(), 16)],
        &[table(DATA, 0xffff_fff0)],
    ];
    for descs in tables {
        let ring = &mut front_end.rings[0];
        ring.write_table(ring.table(), descs);
        ring.make_available(0);
        ring.kick();
        assert_eq!(ring.wait_used(), (0, 0), "{descs:?}");
        expect_service(&mut front_end, 0);
    }
}

#[test]
fn heads_and_indexes_that_cannot_be_are_survived() {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.start();
    // A head that does not exist is given back as it is; the one after it is served.
    let ring = &mut front_end.rings[0];
    ring.make_available(RING_SIZE);
    ring.make_available(u16::MAX);
    let head = ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    ring.kick();
    assert_eq!(ring.wait_used(), (RING_SIZE, 0));
    assert_eq!(ring.wait_used(), (u16::MAX, 0));
    assert_eq!(ring.wait_used(), (head, 1));
    // More entries than the ring has.
    let ring = &front_end.rings[0];
    ring.set_avail_idx(ring.avail_idx().wrapping_add(RING_SIZE + 1));
    ring.kick();
    thread::sleep(A_WHILE);
    // The other queues do not notice, and this one can be restarted.
    expect_service(&mut front_end, 1);
    front_end.vhost.get_vring_base(0).unwrap();
    front_end.rings[0].forget();
    restart_ring(&mut front_end, 0, 0);
    expect_service(&mut front_end, 0);
    connection.stop(Parked::Fail);
}

#[test]
fn the_same_chain_again_and_again_fills_the_ring_and_no_more() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let ring = &mut front_end.rings[0];
    map_sectors(ring, 1);
    rig.disk.hold();
    let head = ring.request(VIRTIO_BLK_T_IN, 0, &[writable(DATA, 512)]);
    ring.kick();
    rig.disk.wait_for_held(1);
    for count in 2..=RING_SIZE {
        ring.make_available(head);
        ring.kick();
        rig.disk.wait_for_held(count.into());
    }
    // As many as the ring has room for are in flight: the device takes no more,
    // and does not spin either.
    for _ in 0..RING_SIZE / 2 {
        ring.make_available(head);
    }
    ring.kick();
    thread::sleep(A_WHILE);
    rig.disk.let_go();
    for _ in 0..RING_SIZE + RING_SIZE / 2 {
        assert_eq!(ring.wait_used(), (head, 513));
    }
    expect_service(&mut front_end, 0);
}

#[test]
fn any_part_of_the_configuration_space_can_be_read() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    let whole = front_end.get_config(0, 256);
    assert_eq!(whole[..8], DISK_SIZE.0.to_le_bytes());
    assert_eq!(whole[60..], [0; 196]);
    for (offset, size) in [
        (0, 1),
        (0, 36),
        (0, 60),
        (0, 96),
        (32, 1),
        (58, 10),
        (100, 100),
    ] {
        let part = front_end.get_config(offset, size);
        assert_eq!(part, whole[offset as usize..(offset + size) as usize]);
    }
}

#[test]
fn the_write_cache_can_be_turned_off_and_on() {
    const WRITEBACK: u32 = 32;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    assert_eq!(front_end.get_config(WRITEBACK, 1), [1]);
    for (mode, is_stable) in [(0, true), (1, false), (0, true)] {
        front_end.set_config(WRITEBACK, &[mode]);
        assert_eq!(front_end.get_config(WRITEBACK, 1), [mode]);
        let before = rig.disk.syncs();
        front_end.fill(DATA, &pattern(mode, 512));
        let write = front_end.rings[0].run(VIRTIO_BLK_T_OUT, 9, &[readable(DATA, 512)]);
        assert_eq!(write, (OK, 1));
        assert_eq!(rig.disk.syncs() > before, is_stable, "mode {mode}");
    }
    // What cannot be written is refused, and the connection lives.
    for (offset, bytes) in [(0, &[1, 2, 3][..]), (WRITEBACK, &[1, 0]), (33, &[1])] {
        let flags = VhostUserConfigFlags::WRITABLE;
        front_end
            .vhost
            .set_config(offset, flags, bytes)
            .unwrap_err();
    }
    assert_eq!(front_end.get_config(0, 8), DISK_SIZE.0.to_le_bytes());
    assert_eq!(front_end.get_config(WRITEBACK, 1), [0]);
    // A driver that is told so after a reset has it on again.
    front_end.vhost.reset_device().unwrap();
    assert_eq!(front_end.get_config(WRITEBACK, 1), [1]);
}

#[test]
fn the_write_cache_starts_off_for_a_driver_that_could_not_flush_it() {
    const WRITEBACK: u32 = 32;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(!(1 << VIRTIO_BLK_F_FLUSH));
    assert_eq!(front_end.get_config(WRITEBACK, 1), [0]);
    let could_not = front_end.vhost.get_features().unwrap() & !(1 << VIRTIO_BLK_F_FLUSH);
    let can = could_not | 1 << VIRTIO_BLK_F_FLUSH;
    // It may turn it on, and the same features again do not turn it off.
    front_end.set_config(WRITEBACK, &[1]);
    front_end.vhost.set_features(could_not).unwrap();
    assert_eq!(front_end.get_config(WRITEBACK, 1), [1]);
    // Firmware that could not, and then a system that can.
    front_end.vhost.reset_device().unwrap();
    for (features, writeback) in [(could_not, 0), (can, 1)] {
        front_end.vhost.set_features(features).unwrap();
        assert_eq!(front_end.get_config(WRITEBACK, 1), [writeback]);
    }
}

#[test]
fn a_driver_that_cannot_flush_gets_stable_writes() {
    let cannot_flush = !(1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE);
    for (features, is_stable) in [(cannot_flush, true), (u64::MAX, false)] {
        let rig = Rig::new();
        let (mut front_end, _connection) = rig.connect();
        front_end.negotiate(features);
        front_end.get_config(0, 60);
        front_end.start_rings();
        front_end.fill(DATA, &pattern(1, 512));
        let ring = &mut front_end.rings[0];
        // The first write may sync for its own reasons.
        assert_eq!(
            ring.run(VIRTIO_BLK_T_OUT, 9, &[readable(DATA, 512)]),
            (OK, 1)
        );
        let before = rig.disk.syncs();
        assert_eq!(
            ring.run(VIRTIO_BLK_T_OUT, 9, &[readable(DATA, 512)]),
            (OK, 1)
        );
        assert_eq!(rig.disk.syncs() > before, is_stable);
    }
}

#[test]
fn front_ends_come_and_go_and_come_again() {
    let rig = Rig::new();
    for round in 0..20 {
        let (mut front_end, connection) = rig.start();
        expect_service(&mut front_end, round % 4);
        drop(front_end);
        assert!(connection.has_ended_within(PATIENCE));
        connection.stop(Parked::Drop);
        // One that says nothing.
        let (front_end, connection) = rig.connect();
        drop(front_end);
        assert!(connection.has_ended_within(PATIENCE));
        connection.stop(Parked::Drop);
    }
}

#[test]
fn a_full_host_disk_does_not_hang_the_front_end() {
    for message in ["stop", "disable", "reset", "end"] {
        let rig = Rig::new();
        let (mut front_end, connection) = rig.start();
        let ring = &mut front_end.rings[0];
        rig.disk.set_full(true);
        ring.fill(DATA, &pattern(1, 512));
        let head = ring.request(VIRTIO_BLK_T_OUT, 1 << 14, &[readable(DATA, 512)]);
        ring.kick();
        thread::sleep(A_WHILE);
        assert_eq!(ring.take_used(), None, "it waits for space");
        match message {
            "stop" => drop(front_end.vhost.get_vring_base(0).unwrap()),
            "disable" => front_end.vhost.set_vring_enable(0, false).unwrap(),
            "reset" => front_end.vhost.reset_device().unwrap(),
            _ => connection.stop(Parked::Fail),
        }
        let ring = &mut front_end.rings[0];
        assert_eq!(ring.take_used(), Some((head, 1)), "{message}");
        assert_eq!(ring.status(head), IOERR, "{message}");
        rig.disk.set_full(false);
    }
}

#[test]
fn a_disconnect_drops_what_waits_for_space() {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.start();
    let ring = &mut front_end.rings[0];
    rig.disk.set_full(true);
    ring.fill(DATA, &pattern(1, 512));
    let head = ring.request(VIRTIO_BLK_T_OUT, 1 << 14, &[readable(DATA, 512)]);
    ring.kick();
    thread::sleep(A_WHILE);
    let FrontEnd {
        vhost, mut rings, ..
    } = front_end;
    drop(vhost);
    assert!(connection.has_ended_within(PATIENCE));
    assert_eq!(rings[0].take_used(), None);
    assert_eq!(rings[0].status(head), UNTOUCHED);
    rig.disk.set_full(false);
    let (mut front_end, _connection) = rig.start();
    expect_service(&mut front_end, 0);
}

/// Whether a write of a driver with all features is stable when it completes.
fn write_is_stable(rig: &Rig, front_end: &mut FrontEnd) -> bool {
    front_end.fill(DATA, &pattern(1, 512));
    let source = [readable(DATA, 512)];
    // The first write may sync for its own reasons.
    for _ in 0..2 {
        let before = rig.disk.syncs();
        let answer = front_end.rings[0].run(VIRTIO_BLK_T_OUT, 9, &source);
        assert_eq!(answer, (OK, 1));
        if rig.disk.syncs() == before {
            return false;
        }
    }
    true
}

#[test]
fn a_driver_that_was_told_of_its_cache_by_nobody_gets_stable_writes() {
    let rig = Rig::new();
    // A front-end that connects again for a running driver does not ask.
    let (mut front_end, _connection) = rig.start();
    assert!(write_is_stable(&rig, &mut front_end));
    // A part of the space without the field says nothing of it.
    front_end.get_config(0, 32);
    front_end.get_config(33, 10);
    assert!(write_is_stable(&rig, &mut front_end));
    assert_eq!(front_end.get_config(20, 20)[12], 1);
    assert!(!write_is_stable(&rig, &mut front_end));
}

#[test]
fn a_cache_that_is_off_stays_off_over_a_reset_that_the_driver_is_not_told_of() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    front_end.get_config(0, 60);
    front_end.set_config(32, &[0]);
    front_end.vhost.reset_device().unwrap();
    let features = front_end.vhost.get_features().unwrap();
    front_end.vhost.set_features(features).unwrap();
    for ring in &mut front_end.rings {
        ring.forget();
    }
    front_end.start_rings();
    assert!(write_is_stable(&rig, &mut front_end));
}

#[test]
fn a_reset_stops_the_rings() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    expect_service(&mut front_end, 0);
    front_end.vhost.reset_device().unwrap();
    let features = front_end.vhost.get_features().unwrap();
    front_end.vhost.set_features(features).unwrap();
    // Enabled, but not started: no kick has come since.
    front_end.vhost.set_vring_enable(0, true).unwrap();
    let ring = &mut front_end.rings[0];
    ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    ring.kick();
    thread::sleep(A_WHILE);
    assert_eq!(ring.take_used(), None);
}

#[test]
fn queue_sizes_that_cannot_be_are_refused() {
    for size in [0, 3, 100, 1024] {
        let rig = Rig::new();
        let (mut front_end, connection) = rig.connect();
        front_end.negotiate(u64::MAX);
        front_end.vhost.set_vring_num(0, size).unwrap_err();
        assert!(connection.has_ended_within(PATIENCE), "{size}");
    }
}

#[test]
fn a_driver_that_wants_no_signals_gets_none() {
    const NO_INTERRUPT: u16 = 1;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(WITHOUT_EVENT_IDX);
    front_end.start_rings();
    for (flags, expected) in [(NO_INTERRUPT, 0), (0, 1), (NO_INTERRUPT, 0)] {
        let ring = &mut front_end.rings[0];
        ring.set_avail_flags(flags);
        thread::sleep(A_WHILE);
        let before = ring.signals();
        ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
        ring.kick();
        let start = Instant::now();
        while ring.take_used().is_none() {
            assert!(start.elapsed() < PATIENCE);
        }
        thread::sleep(A_WHILE);
        assert_eq!(ring.signals() - before, expected, "flags {flags}");
    }
}

#[test]
fn errors_of_a_ring_are_signalled() {
    let rig = Rig::new();
    let (front_end, _connection) = rig.start();
    let error = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    front_end.vhost.set_vring_err(0, &error).unwrap();
    let ring = &front_end.rings[0];
    ring.set_avail_idx(ring.avail_idx().wrapping_add(RING_SIZE + 1));
    ring.kick();
    // SAFETY: the event lives as long as this function.
    let fd = unsafe { BorrowedFd::borrow_raw(error.as_raw_fd()) };
    assert!(is_readable(&fd, PATIENCE));
}

#[test]
fn events_can_be_replaced_while_a_ring_runs() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    for _ in 0..20 {
        let ring = &mut front_end.rings[0];
        ring.renew_events();
        let (call, kick) = (ring.call(), &ring.kick);
        front_end.vhost.set_vring_call(0, call).unwrap();
        front_end.vhost.set_vring_kick(0, kick).unwrap();
        expect_service(&mut front_end, 0);
    }
    // What was made available under the old event is found by the new one.
    let ring = &mut front_end.rings[0];
    let head = ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    ring.renew_events();
    let (call, kick) = (ring.call(), &ring.kick);
    front_end.vhost.set_vring_call(0, call).unwrap();
    front_end.vhost.set_vring_kick(0, kick).unwrap();
    assert_eq!(front_end.rings[0].wait_used(), (head, 1));
}

#[test]
fn descriptors_that_are_not_events_end_the_connection() {
    type Send = fn(&mut FrontEnd, &EventFd) -> vhost::Result<()>;
    let messages: [Send; 3] = [
        |front_end, fd| front_end.vhost.set_vring_kick(0, fd),
        |front_end, fd| front_end.vhost.set_vring_call(0, fd),
        |front_end, fd| front_end.vhost.set_vring_err(0, fd),
    ];
    let rig = Rig::new();
    for message in messages {
        let (mut front_end, connection) = rig.start();
        let (reader, _writer) = std::io::pipe().unwrap();
        // SAFETY: the descriptor is given up in the same call.
        let pipe = unsafe { EventFd::from_raw_fd(OwnedFd::from(reader).into_raw_fd()) };
        message(&mut front_end, &pipe).unwrap_err();
        assert!(connection.has_ended_within(PATIENCE));
    }
}

#[test]
fn memory_that_others_control_is_refused() {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.start();
    let mut region = front_end.region(2);
    front_end.vhost.remove_mem_region(&region).unwrap();
    // Longer than its file: touching its end would kill the process.
    region.memory_size += REGION_LEN;
    front_end.vhost.add_mem_region(&region).unwrap_err();
    assert!(connection.has_ended_within(PATIENCE));

    let (mut front_end, connection) = rig.start();
    let mut region = front_end.region(2);
    front_end.vhost.remove_mem_region(&region).unwrap();
    let zero = fs::File::open("/dev/zero").unwrap();
    region.mmap_handle = zero.as_raw_fd();
    front_end.vhost.add_mem_region(&region).unwrap_err();
    assert!(connection.has_ended_within(PATIENCE));
}

/// A region for rings of this test, set.
fn with_region(front_end: &mut FrontEnd) -> (VhostUserInflight, fs::File) {
    region_of(front_end, RING_SIZE)
}

/// The same for rings of so many descriptors.
fn region_of(front_end: &mut FrontEnd, queue_size: u16) -> (VhostUserInflight, fs::File) {
    let asked = VhostUserInflight {
        num_queues: QUEUES,
        queue_size,
        ..VhostUserInflight::default()
    };
    let (made, file) = front_end.vhost.get_inflight_fd(&asked).unwrap();
    let fd = file.as_raw_fd();
    front_end.vhost.set_inflight_fd(&made, fd).unwrap();
    (made, file)
}

/// Notes in the region that queue 0 has taken these heads, in this order.
fn note_taken(file: &fs::File, heads: &[u16]) {
    for (&head, count) in heads.iter().zip(1_u64..) {
        let entry = 16 + 16 * u64::from(head);
        file.write_all_at(&count.to_ne_bytes(), entry + 8).unwrap();
        file.write_all_at(&[1], entry).unwrap();
    }
}

#[test]
fn a_stop_amid_what_another_process_had_taken_does_all_of_it() {
    const COUNT: u64 = 20;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    front_end.get_config(0, 60);
    let (_, file) = with_region(&mut front_end);
    front_end.start_rings();
    front_end.fill(FAR, &[0x55; 64 << 10]);
    let head = huge_request(&mut front_end, VIRTIO_BLK_T_OUT);
    assert_eq!(front_end.rings[0].wait_used(), (head, 1));
    let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    // More than is begun at a time.
    let target = [writable(SEAM, MIB as u32)];
    let ring = &mut front_end.rings[0];
    let read = |index| ring.request(VIRTIO_BLK_T_IN, (1 + index) * (MIB / 512), &target);
    let heads: Vec<_> = (0..COUNT).map(read).collect();
    note_taken(&file, &heads);
    rig.disk.hold();
    restart_ring(&mut front_end, 0, base);
    rig.disk.wait_for_held(MOST_PARTS);
    let base = stop_and_let_go(&rig, &mut front_end);
    let ring = &mut front_end.rings[0];
    assert_eq!(base, ring.avail_idx());
    for _ in 0..COUNT {
        let (_, len) = ring.take_used().expect("all of them are answered");
        assert_eq!(u64::from(len), MIB + 1, "with success");
    }
}

#[test]
fn limits_do_not_hold_for_what_another_process_had_taken_once_the_ring_stops() {
    const COUNT: u64 = 12;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    front_end.get_config(0, 60);
    let (_, file) = with_region(&mut front_end);
    front_end.start_rings();
    let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    rig.limit("bps_wr=1");
    let ring = &mut front_end.rings[0];
    let data = [readable(SEAM, MIB as u32)];
    let write = |index| ring.request(VIRTIO_BLK_T_OUT, index * (MIB / 512), &data);
    let heads: Vec<_> = (0..COUNT).map(write).collect();
    note_taken(&file, &heads);
    restart_ring(&mut front_end, 0, base);
    assert_eq!(front_end.rings[0].wait_used(), (heads[0], 1));
    let start = Instant::now();
    let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    let time = start.elapsed();
    let ring = &mut front_end.rings[0];
    assert_eq!(base, ring.avail_idx());
    let mut used: Vec<_> = std::iter::from_fn(|| ring.take_used()).collect();
    used.sort_unstable();
    let expected: Vec<_> = heads[1..].iter().map(|&head| (head, 1)).collect();
    assert_eq!(used, expected);
    assert!(heads.iter().all(|&head| ring.status(head) == OK));
    // Less than such a ring may take to go on with them.
    assert!(time < Duration::from_secs(2), "{time:?}");
}

/// SLOF, the firmware of QEMU's pseries machines, makes longer rings than it was offered,
/// and QEMU asks for a region of what it has offered.
#[test]
fn a_ring_that_is_longer_than_the_region_is_served() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    front_end.get_config(0, 60);
    region_of(&mut front_end, RING_SIZE / 2);
    for _ in 0..2 {
        front_end.start_rings();
        for index in 0..front_end.rings.len() {
            // More than the ring has, so that each descriptor was a head.
            for _ in 0..RING_SIZE {
                expect_service(&mut front_end, index);
            }
            front_end.vhost.get_vring_base(index).unwrap();
        }
    }
}

#[test]
fn what_another_process_had_taken_is_done_before_anything_new() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    front_end.get_config(0, 60);
    let (_, file) = with_region(&mut front_end);
    front_end.start_rings();
    expect_service(&mut front_end, 0);
    let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    // Four writes to one sector, of which three were taken, and in another order.
    for (index, byte) in [1, 2, 3, 4].into_iter().enumerate() {
        front_end.fill(DATA + 512 * index as u64, &[byte; 512]);
    }
    let ring = &mut front_end.rings[0];
    let heads: Vec<_> = (0..4)
        .map(|index| ring.request(VIRTIO_BLK_T_OUT, 9, &[readable(DATA + 512 * index, 512)]))
        .collect();
    note_taken(&file, &[heads[1], heads[0], heads[2]]);
    // Whatever the front-end says of the index: QEMU means the used one.
    restart_ring(&mut front_end, 0, base);
    let ring = &mut front_end.rings[0];
    let mut used: Vec<_> = (0..4).map(|_| ring.wait_used().0).collect();
    assert_eq!(used.pop(), Some(heads[3]), "the new one is the last");
    used.sort_unstable();
    let mut expected = heads[..3].to_vec();
    expected.sort_unstable();
    assert_eq!(used, expected);
    thread::sleep(A_WHILE);
    assert_eq!(ring.take_used(), None);
    for queue in 0..4 {
        expect_service(&mut front_end, queue);
    }
    let target = [writable(DATA, 512)];
    let ring = &mut front_end.rings[0];
    assert_eq!(ring.run(VIRTIO_BLK_T_IN, 9, &target), (OK, 513));
    assert_eq!(front_end.bytes(DATA, 512), [4; 512]);
}

#[test]
fn regions_that_were_not_made_here_are_refused() {
    let rig = Rig::new();
    for case in 0..4 {
        let (mut front_end, connection) = rig.connect();
        front_end.negotiate(u64::MAX);
        let (mut made, file) = with_region(&mut front_end);
        let other = tempfile::tempfile().unwrap();
        other.set_len(made.mmap_size).unwrap();
        let mut fd = file.as_raw_fd();
        match case {
            0 => fd = other.as_raw_fd(),
            1 => made.mmap_offset = 4096,
            2 => made.num_queues = QUEUES + 1,
            _ => made.queue_size = u16::MAX,
        }
        // The message has no answer of its own.
        let _ = front_end.vhost.set_inflight_fd(&made, fd);
        assert!(connection.has_ended_within(PATIENCE), "{case}");
    }
}

#[test]
fn heads_that_cannot_be_are_not_found_again() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    with_region(&mut front_end);
    front_end.start_rings();
    for _ in 0..3 {
        let ring = &mut front_end.rings[0];
        ring.make_available(RING_SIZE);
        let head = ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
        ring.kick();
        assert_eq!(ring.wait_used(), (RING_SIZE, 0));
        assert_eq!(ring.wait_used(), (head, 1));
        let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
        restart_ring(&mut front_end, 0, base);
        thread::sleep(A_WHILE);
        assert_eq!(front_end.rings[0].take_used(), None);
        expect_service(&mut front_end, 0);
    }
}

/// Whether the region says that queue 0 has this request in flight.
fn is_noted(file: &fs::File, head: u16) -> bool {
    let mut mark = [0];
    file.read_exact_at(&mut mark, 16 + 16 * u64::from(head))
        .unwrap();
    mark[0] != 0
}

/// Waits for these answers, in any order.
fn wait_for_answers(ring: &mut Ring, heads: &[u16]) {
    let mut used: Vec<_> = heads.iter().map(|_| ring.wait_used()).collect();
    used.sort_unstable();
    let expected: Vec<_> = heads.iter().map(|&head| (head, 513)).collect();
    assert_eq!(used, expected);
}

#[test]
fn answers_wait_while_the_memory_of_their_ring_is_away() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    let (_, file) = with_region(&mut front_end);
    front_end.start_rings();
    let heads = make_busy(&rig, &mut front_end.rings[0]);
    let memory = front_end.region(0);
    front_end.vhost.remove_mem_region(&memory).unwrap();
    rig.disk.let_go();
    thread::sleep(A_WHILE);
    assert_eq!(front_end.rings[0].take_used(), None);
    assert!(heads.iter().all(|&head| is_noted(&file, head)));
    front_end.vhost.add_mem_region(&memory).unwrap();
    wait_for_answers(&mut front_end.rings[0], &heads);
    for &head in &heads {
        assert_eq!(front_end.rings[0].status(head), OK);
    }
    expect_service(&mut front_end, 0);
    assert!(!heads.iter().any(|&head| is_noted(&file, head)));
}

#[test]
fn answers_wait_while_their_ring_is_disabled_and_its_memory_away() {
    for with_region_kept in [false, true] {
        let rig = Rig::new();
        let (mut front_end, _connection) = rig.connect();
        front_end.negotiate(u64::MAX);
        if with_region_kept {
            with_region(&mut front_end);
        }
        front_end.start_rings();
        let heads = make_busy(&rig, &mut front_end.rings[0]);
        let memory = front_end.region(0);
        front_end.vhost.remove_mem_region(&memory).unwrap();
        rig.disk.let_go();
        front_end.vhost.set_vring_enable(0, false).unwrap();
        front_end.vhost.add_mem_region(&memory).unwrap();
        front_end.vhost.set_vring_enable(0, true).unwrap();
        wait_for_answers(&mut front_end.rings[0], &heads);
        expect_service(&mut front_end, 0);
    }
}

#[test]
fn no_more_is_taken_again_at_a_time_than_is_taken_anew() {
    /// Together they are far more than one queue may have under way.
    const REQUESTS: u16 = 16;
    /// Of each request, of 1 MiB each.
    const PARTS: u32 = 62;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    let (_, file) = with_region(&mut front_end);
    front_end.start_rings();
    /// A request of so many parts, each all of the second region.
    fn indirect(ring: &Ring, kind: u32, access: fn(u64, u32) -> Desc) -> Desc {
        const TABLE: u64 = DATA + 0x1000;
        let mut table = vec![ring.header(kind, 0)];
        table.extend((0..PARTS).map(|_| access(SEAM, REGION_LEN as u32)));
        for (next, desc) in (1..).zip(&mut table) {
            desc.flags |= NEXT;
            desc.next = next;
        }
        table.push(writable(DATA, 1));
        ring.write_table(TABLE, &table);
        Desc {
            flags: INDIRECT,
            ..readable(TABLE, 16 * table.len() as u32)
        }
    }
    // Holes and zeros need no transfers.
    front_end.fill(SEAM, &pattern(1, REGION_LEN as usize));
    let ring = &mut front_end.rings[0];
    let written = ring.chain(&[indirect(ring, VIRTIO_BLK_T_OUT, readable)]);
    ring.kick();
    assert_eq!(ring.wait_used(), (written, 1));
    assert_eq!(front_end.bytes(DATA, 1), [OK]);

    let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    let ring = &mut front_end.rings[0];
    let request = indirect(ring, VIRTIO_BLK_T_IN, writable);
    let heads: Vec<_> = (0..REQUESTS).map(|_| ring.chain(&[request])).collect();
    note_taken(&file, &heads);
    rig.disk.hold();
    restart_ring(&mut front_end, 0, base);
    rig.disk.wait_for_held(1);
    thread::sleep(2 * A_WHILE);
    let held = rig.disk.held();
    rig.disk.let_go();
    let ring = &mut front_end.rings[0];
    let mut used: Vec<_> = heads.iter().map(|_| ring.wait_used().0).collect();
    used.sort_unstable();
    assert_eq!(used, heads);
    assert_eq!(held, MOST_PARTS);
    expect_service(&mut front_end, 0);
}

#[test]
fn without_the_message_that_enables_rings_there_is_one() {
    const PROTOCOL_FEATURES: u64 = 1 << 30;
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    let features = front_end.vhost.get_features().unwrap();
    front_end
        .vhost
        .set_features(features & !PROTOCOL_FEATURES)
        .unwrap();
    for index in 0..2 {
        front_end.start_ring_at(index, 0);
    }
    expect_service(&mut front_end, 0);
    let ring = &mut front_end.rings[1];
    ring.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    ring.kick();
    thread::sleep(A_WHILE);
    assert_eq!(ring.take_used(), None);
}

/// The next message on the channel by which the front-end is told of changes.
fn next_told(channel: &mut UnixStream, patience: Duration) -> Option<[u32; 3]> {
    channel.set_read_timeout(Some(patience)).unwrap();
    let mut bytes = [0; 12];
    channel.read_exact(&mut bytes).ok()?;
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    Some([word(0), word(4), word(8)])
}

/// Stops all rings and starts them again.
fn restart_rings(front_end: &mut FrontEnd) {
    for index in 0..front_end.rings.len() {
        front_end.vhost.get_vring_base(index).unwrap();
    }
    front_end.start_rings();
}

#[test]
fn a_driver_that_runs_and_was_told_no_size_is_told_to_look() {
    /// Of the configuration space, without an answer.
    const CHANGE: [u32; 3] = [2, 1, 0];
    for with_answers in [true, false] {
        let rig = Rig::new();
        let (mut front_end, connection) = rig.connect();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        front_end.negotiate(u64::MAX);
        if !with_answers {
            let mut protocol = front_end.vhost.get_protocol_features().unwrap();
            protocol.remove(VhostUserProtocolFeatures::REPLY_ACK);
            front_end.vhost.set_protocol_features(protocol).unwrap();
        }
        front_end.vhost.set_backend_request_fd(&theirs).unwrap();
        drop(theirs);
        assert_eq!(next_told(&mut ours, 3 * A_WHILE), None, "nothing runs");
        front_end.start_rings();
        assert_eq!(next_told(&mut ours, PATIENCE), Some(CHANGE));
        connection.config_changed();
        assert_eq!(next_told(&mut ours, 3 * A_WHILE), None, "it was told once");
        expect_service(&mut front_end, 0);
        // It may not have listened.
        restart_rings(&mut front_end);
        assert_eq!(next_told(&mut ours, PATIENCE), Some(CHANGE));
        // Who has looked knows.
        front_end.get_config(0, 60);
        restart_rings(&mut front_end);
        connection.config_changed();
        assert_eq!(next_told(&mut ours, 3 * A_WHILE), None);
        expect_service(&mut front_end, 0);
    }
}

#[test]
fn a_disk_that_grows_tells_its_driver_and_can_be_used_up_to_the_new_end() {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.connect();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    front_end.negotiate(u64::MAX);
    front_end.vhost.set_backend_request_fd(&theirs).unwrap();
    front_end.start_rings();
    let capacity = |front_end: &mut FrontEnd| {
        let space = front_end.get_config(0, 60);
        u64::from_le_bytes(space[..8].try_into().unwrap())
    };
    assert_eq!(capacity(&mut front_end), DISK_SIZE.0);
    let data = pattern(9, 512);
    front_end.fill(DATA, &data);
    let end = 8 << 30 >> 9;
    let write = |front_end: &mut FrontEnd, sector| {
        front_end.rings[0].run(VIRTIO_BLK_T_OUT, sector, &[readable(DATA, 512)])
    };
    assert_eq!(write(&mut front_end, DISK_SIZE.0).0, IOERR);
    assert_eq!(rig.grow(&connection, Sector(end - 5)), Sector(end));
    assert_eq!(next_told(&mut ours, PATIENCE), Some([2, 1, 0]));
    assert_eq!(capacity(&mut front_end), end);
    for sector in [DISK_SIZE.0, end - 1] {
        assert_eq!(write(&mut front_end, sector), (OK, 1));
    }
    assert_eq!(write(&mut front_end, end).0, IOERR);
    expect_service(&mut front_end, 1);
}

#[test]
fn a_front_end_that_does_not_listen_holds_nobody_up() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    front_end.negotiate(u64::MAX);
    theirs.set_nonblocking(true).unwrap();
    while theirs.write(&[0; 4096]).is_ok() {}
    theirs.set_nonblocking(false).unwrap();
    front_end.vhost.set_backend_request_fd(&theirs).unwrap();
    front_end.start_rings();
    thread::sleep(3 * A_WHILE);
    expect_service(&mut front_end, 0);
    front_end.vhost.get_features().unwrap();
    // Nor does one that has closed the channel.
    let (ours_again, theirs) = UnixStream::pair().unwrap();
    drop((ours, ours_again));
    front_end.vhost.set_backend_request_fd(&theirs).unwrap();
    let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    restart_ring(&mut front_end, 0, base);
    thread::sleep(3 * A_WHILE);
    expect_service(&mut front_end, 0);
    front_end.vhost.get_features().unwrap();
}
