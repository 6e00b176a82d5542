//! A front-end's memory vanishes under the daemon.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::thread;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::common::backend::Backend;
use crate::front_end::*;
use crate::{Rig, expect_service, start_front_end, wait_for};

/// Cuts the file of a region to nothing. The test must not touch it any more.
fn cut(front_end: &FrontEnd, region: usize) {
    let region = front_end.memory.iter().nth(region).unwrap();
    region.file_offset().unwrap().file().set_len(0).unwrap();
}

/// The connection ends, the daemon does not, and the next front-end, which is returned, is served.
/// (Another one that comes before that one's end is seen would be turned away.)
fn expect_to_lose_the_connection(
    backend: &Backend,
    mut front_end: FrontEnd,
    round: usize,
) -> FrontEnd {
    let hangs_up = || front_end.vhost.get_queue_num().is_err();
    wait_for("the end of the connection", hangs_up);
    drop(front_end);
    let lines = || backend.log().matches("guest memory has vanished").count();
    wait_for("the line that says so", || lines() == round);
    let mut next = start_front_end(backend.socket());
    expect_service(&mut next);
    next
}

#[test]
fn memory_that_is_cut_short_ends_the_connection_and_not_the_daemon() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    // The ring itself.
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    cut(&front_end, 0);
    front_end.rings[0].kick();
    // What a read of a hole is to fill.
    let mut front_end = expect_to_lose_the_connection(&backend, front_end, 1);
    cut(&front_end, 2);
    let ring = &mut front_end.rings[0];
    ring.request(VIRTIO_BLK_T_IN, 1 << 14, &[writable(FAR, 512)]);
    ring.kick();
    expect_to_lose_the_connection(&backend, front_end, 2);
    backend.stop();
}

#[test]
fn huge_pages_that_the_host_has_not_end_the_connection_and_not_the_daemon() {
    const HUGE: u64 = 2 << 20;
    const AT: u64 = 64 << 20;
    let free = std::fs::read_to_string("/proc/meminfo").unwrap();
    let none = free.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.next() == Some("HugePages_Free:") && words.next() == Some("0")
    });
    if !none {
        let _ = crate::common::left_out("the host has free huge pages");
        return;
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(memfd_create("huge", flags).unwrap());
    file.set_len(HUGE).unwrap();
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    let mut region = front_end.region(2);
    region.guest_phys_addr = AT;
    region.memory_size = HUGE;
    region.userspace_addr = 1 << 40;
    region.mmap_handle = file.as_raw_fd();
    front_end.vhost.add_mem_region(&region).unwrap();
    let ring = &mut front_end.rings[0];
    ring.request(VIRTIO_BLK_T_IN, 1 << 14, &[writable(AT, 512)]);
    ring.kick();
    expect_to_lose_the_connection(&backend, front_end, 1);
    backend.stop();
}

#[test]
fn a_bus_error_of_another_kind_is_what_it_always_was() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let mut front_end = start_front_end(backend.socket());
    expect_service(&mut front_end);
    // Rust's own handler, which looks for an overflow of the stack, lets the first one pass.
    let pid = Pid::from_raw(backend.pid() as i32).unwrap();
    for _ in 0..2 {
        kill_process(pid, Signal::BUS).unwrap();
        thread::sleep(A_WHILE);
    }
    assert_eq!(backend.wait_for_signal(), Signal::BUS.as_raw());
    assert!(front_end.vhost.get_queue_num().is_err());
}
