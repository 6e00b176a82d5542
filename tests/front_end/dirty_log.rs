//! Every page of guest memory that the device writes is marked while that is logged.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::front_end::*;
use crate::rig::*;
use crate::{OK, expect_service, make_busy, map_sectors, note_taken, with_region};

const PAGE: u64 = 4096;
const LOG_LEN: u64 = 4096;

/// A log that has been given to the device.
struct Log(File);

impl Log {
    fn give(front_end: &FrontEnd) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LOG_LEN).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: LOG_LEN,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        front_end.vhost.set_log_base(0, Some(region)).unwrap();
        Self(file)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LOG_LEN as usize];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn clear(&self) {
        self.0.write_all_at(&[0; LOG_LEN as usize], 0).unwrap();
    }

    /// Pages, by number.
    fn marked(&self) -> Vec<u64> {
        let bytes = self.bytes();
        let is_marked = |page: &u64| bytes[(page / 8) as usize] & 1 << (page % 8) != 0;
        (0..LOG_LEN * 8).filter(is_marked).collect()
    }
}

/// All of the guest's memory.
fn snapshot(front_end: &FrontEnd) -> Vec<(u64, Vec<u8>)> {
    let regions = front_end.memory.iter();
    let pages = regions.flat_map(|region| {
        let start = region.start_addr().0;
        (start..start + region.len()).step_by(PAGE as usize)
    });
    pages
        .map(|at| (at / PAGE, front_end.bytes(at, PAGE as usize)))
        .collect()
}

/// Pages that have changed since, but for those that only the driver writes.
fn changed(front_end: &FrontEnd, before: &[(u64, Vec<u8>)]) -> Vec<u64> {
    let drivers: Vec<_> = front_end
        .rings
        .iter()
        .map(|ring| ring.avail() / PAGE)
        .collect();
    let now = snapshot(front_end).into_iter();
    now.zip(before)
        .filter(|((page, now), (_, before))| now != before && !drivers.contains(page))
        .map(|((page, _), _)| page)
        .collect()
}

/// Turns logging on or off, as QEMU does.
fn set_logging(front_end: &mut FrontEnd, on: bool) {
    let features = front_end.vhost.get_features().unwrap();
    let features = if on { features } else { features & !LOG_ALL };
    front_end.vhost.set_features(features).unwrap();
    for index in 0..front_end.rings.len() {
        front_end.set_addresses(index, on);
    }
}

/// Starts ring 0, whose used ring is logged or not. What is available already is taken.
fn start(front_end: &mut FrontEnd, base: u16, is_logged: bool) {
    front_end.start_ring_at(0, base);
    front_end.set_addresses(0, is_logged);
    front_end.vhost.set_vring_enable(0, true).unwrap();
}

/// Waits for so many answers.
fn wait_for(front_end: &mut FrontEnd, count: usize) {
    for _ in 0..count {
        front_end.rings[0].wait_used();
    }
}

/// Has the device write to guest memory in all ways there are. Returns the pages that have
/// changed.
fn write_memory(front_end: &mut FrontEnd, is_logged: bool) -> Vec<u64> {
    map_sectors(&mut front_end.rings[0], 64);
    // It must not see anything before the snapshot.
    let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    let ring = &mut front_end.rings[0];
    // A long way over a seam; a hole; the serial number; nothing but a status; a request
    // that is refused.
    ring.fill(SEAM - 0x2000, &[0xee; 0x4000]);
    ring.fill(FAR, &[0xee; 0xb000]);
    let requests: [(u32, u64, &[Desc]); 6] = [
        (VIRTIO_BLK_T_IN, 0, &[writable(SEAM - 0x2000, 0x4000)]),
        (
            VIRTIO_BLK_T_IN,
            1,
            &[writable(FAR + 0x100, 0x1200), writable(FAR + 0x6000, 0x200)],
        ),
        (VIRTIO_BLK_T_IN, 1 << 14, &[writable(FAR + 0x8000, 512)]),
        (VIRTIO_BLK_T_GET_ID, 0, &[writable(FAR + 0x9ff0, 20)]),
        (VIRTIO_BLK_T_FLUSH, 0, &[]),
        (VIRTIO_BLK_T_OUT, u64::MAX, &[readable(DATA, 512)]),
    ];
    for (kind, sector, data) in requests {
        ring.request(kind, sector, data);
    }
    let before = snapshot(front_end);
    start(front_end, base, is_logged);
    wait_for(front_end, requests.len());
    let changed = changed(front_end, &before);
    assert!(changed.len() >= 10, "{changed:?}");
    changed
}

fn expect_all_marked(changed: &[u64], log: &Log) {
    let marked = log.marked();
    let missing: Vec<_> = changed
        .iter()
        .filter(|page| !marked.contains(page))
        .collect();
    assert!(missing.is_empty(), "{missing:x?} of {changed:x?}");
}

#[test]
fn what_is_written_is_marked_while_it_is_logged_and_nothing_otherwise() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let log = Log::give(&front_end);
    let unlogged = write_memory(&mut front_end, false);
    assert!(!unlogged.is_empty() && log.marked().is_empty(), "it is off");
    set_logging(&mut front_end, true);
    let log = Log::give(&front_end);
    log.clear();
    let changed = write_memory(&mut front_end, true);
    expect_all_marked(&changed, &log);
    // No more than is needed: pages that only the driver writes are not.
    let drivers = [DATA / PAGE, front_end.rings[0].table() / PAGE];
    assert!(!log.marked().iter().any(|page| drivers.contains(page)));
    // Another log: the one before is not touched any more.
    let next = Log::give(&front_end);
    log.clear();
    let changed = write_memory(&mut front_end, true);
    expect_all_marked(&changed, &next);
    assert!(log.marked().is_empty());
    set_logging(&mut front_end, false);
    next.clear();
    write_memory(&mut front_end, false);
    assert!(next.marked().is_empty());
    expect_service(&mut front_end, 1);
}

#[test]
fn requests_that_were_under_way_when_logging_began_are_marked() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let heads = make_busy(&rig, &mut front_end.rings[0]);
    front_end.fill(DATA, &[0; 8192]);
    let before = snapshot(&front_end);
    let log = Log::give(&front_end);
    set_logging(&mut front_end, true);
    log.clear();
    rig.disk.let_go();
    wait_for(&mut front_end, heads.len());
    let changed = changed(&front_end, &before);
    assert!(changed.contains(&(DATA / PAGE)));
    expect_all_marked(&changed, &log);
}

#[test]
fn everything_is_marked_when_a_ring_has_stopped() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.start();
    let log = Log::give(&front_end);
    set_logging(&mut front_end, true);
    map_sectors(&mut front_end.rings[0], 8);
    let mut base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    let mut answered = 0;
    for round in 0..50 {
        let ring = &mut front_end.rings[0];
        ring.fill(FAR, &[round; 512]);
        ring.request(VIRTIO_BLK_T_IN, 1, &[writable(FAR, 512)]);
        let before = snapshot(&front_end);
        log.clear();
        start(&mut front_end, base, true);
        // Stopped at once, or a little later.
        thread::sleep(Duration::from_micros(20) * round.into());
        base = front_end.vhost.get_vring_base(0).unwrap() as u16;
        expect_all_marked(&changed(&front_end, &before), &log);
        answered += std::iter::from_fn(|| front_end.rings[0].take_used()).count();
    }
    assert!(answered >= 10, "{answered}");
}

#[test]
fn requests_that_are_taken_again_are_marked() {
    let rig = Rig::new();
    let (mut front_end, _connection) = rig.connect();
    front_end.negotiate(u64::MAX);
    front_end.get_config(0, 60);
    let (_, file) = with_region(&mut front_end);
    front_end.start_rings();
    map_sectors(&mut front_end.rings[0], 8);
    let base = front_end.vhost.get_vring_base(0).unwrap() as u16;
    let log = Log::give(&front_end);
    set_logging(&mut front_end, true);
    let head = front_end.rings[0].request(VIRTIO_BLK_T_IN, 1, &[writable(FAR, 512)]);
    note_taken(&file, &[head]);
    let before = snapshot(&front_end);
    log.clear();
    start(&mut front_end, base, true);
    assert_eq!(front_end.rings[0].wait_used(), (head, 513));
    assert_eq!(front_end.rings[0].status(head), OK);
    expect_all_marked(&changed(&front_end, &before), &log);
}
