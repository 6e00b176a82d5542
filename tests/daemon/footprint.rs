//! What a front-end costs the host while it is there, and that nothing of it stays.

use std::env;
use std::fs;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::front_end::*;
use crate::{Rig, descriptors, expect_service, tasks};

/// Front-ends that come and go, unless `PLOOP_CONNECTS` says how many, and a tenth as many
/// resets.
const CONNECTS: u32 = 200;

/// How much more memory may be in use afterwards: what an allocator keeps of the last ones,
/// more or less as threads happen to meet. 20 KiB a front-end would show.
const SLACK_KIB: u64 = 4096;

/// How often it may be exceeded, less one.
const TRIES: usize = 3;

/// Memory that no other process shares, in KiB.
fn private_kib(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let private = |line: &&str| line.starts_with("Private_");
    let kib = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    rollup.lines().filter(private).filter_map(kib).sum()
}

#[test]
fn a_queue_costs_a_thread_and_a_few_descriptors() {
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let mut front_end = FrontEnd::connect(backend.socket());
    front_end.negotiate(u64::MAX);
    let mut costs = Vec::new();
    for index in 0..usize::from(QUEUES) {
        front_end.start_ring_at(index, 0);
        front_end.vhost.set_vring_enable(index, true).unwrap();
        if index == 0 {
            expect_service(&mut front_end);
        }
        costs.push((tasks(backend.pid()).len(), descriptors(backend.pid())));
    }
    eprintln!("threads and descriptors: {costs:?}");
    let (threads, fds) = costs[0];
    assert!(threads <= 9 && fds <= 40, "{costs:?}");
    for pair in costs.windows(2) {
        let [(threads, fds), (more_threads, more_fds)] = [pair[0], pair[1]];
        assert!(more_threads <= threads + 1, "{costs:?}");
        assert!(more_fds <= fds + 5, "{costs:?}");
    }
    backend.stop();
}

/// Requests in all rings that nobody waits for.
fn load(front_end: &mut FrontEnd) {
    for ring in &mut front_end.rings {
        for sector in 0..8 {
            ring.request(VIRTIO_BLK_T_OUT, sector * 2048, &[readable(DATA, 4096)]);
        }
        ring.kick();
    }
}

/// As a driver that begins anew.
fn reset(front_end: &mut FrontEnd) {
    for index in 0..usize::from(QUEUES) {
        front_end.vhost.get_vring_base(index).unwrap();
    }
    front_end.rings.iter_mut().for_each(Ring::forget);
    front_end.start_rings();
}

#[test]
fn nothing_stays_of_front_ends_and_resets_under_load() {
    let connects = env::var("PLOOP_CONNECTS").ok();
    let connects = connects.map_or(CONNECTS, |number| number.parse().unwrap());
    let rig = Rig::new();
    let backend = rig.serve(&[]);
    let connect = || {
        let mut front_end = crate::start_front_end(backend.socket());
        load(&mut front_end);
        front_end
    };
    // Else the next one might be turned away on a busy host.
    let wait_for_end = || {
        let start = Instant::now();
        while tasks(backend.pid()).iter().any(|task| task == "messages") {
            assert!(start.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(1));
        }
    };
    let cost = || {
        wait_for_end();
        // The end is noticed after the thread has gone.
        thread::sleep(Duration::from_millis(50));
        let pid = backend.pid();
        (tasks(pid).len(), descriptors(pid), private_kib(pid))
    };
    // What is allocated once is there after some.
    for _ in 0..50 {
        reset(&mut connect());
        wait_for_end();
    }
    let mut costs = vec![cost()];
    // More threads at a time than ever before, on a busy host, take more memory once. What
    // is lost would be lost each time.
    while costs.len() <= TRIES {
        for number in 0..connects {
            match number % 3 {
                0 => drop(UnixStream::connect(backend.socket()).unwrap()),
                _ => drop(connect()),
            }
            wait_for_end();
        }
        let mut front_end = connect();
        for _ in 0..connects / 10 {
            reset(&mut front_end);
            load(&mut front_end);
        }
        drop(front_end);
        let [before, after] = [costs[costs.len() - 1], cost()];
        costs.push(after);
        assert_eq!((after.0, after.1), (before.0, before.1));
        if after.2 <= before.2 + SLACK_KIB {
            break;
        }
    }
    eprintln!("threads, descriptors, KiB, after each {connects} front-ends: {costs:?}");
    assert!(costs.len() <= TRIES, "{costs:?}");
    expect_service(&mut crate::start_front_end(backend.socket()));
    backend.stop();
}

/// What the process adds to the memory in use, in KiB: what it shares with others counts in
/// part.
fn proportional_kib(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse().unwrap()
}

#[test]
fn many_daemons_take_little_memory() {
    /// Unless `PLOOP_DAEMONS` says how many.
    const DAEMONS: usize = 16;
    const MOST_KIB: u64 = 3 << 10;
    let daemons = env::var("PLOOP_DAEMONS").ok();
    let daemons = daemons.map_or(DAEMONS, |number| number.parse().unwrap());
    let start = |_| {
        let rig = Rig::new();
        let backend = rig.serve(&[]);
        let mut front_end = FrontEnd::connect(backend.socket());
        front_end.negotiate(u64::MAX);
        for index in 0..2 {
            front_end.start_ring_at(index, 0);
            front_end.vhost.set_vring_enable(index, true).unwrap();
        }
        expect_service(&mut front_end);
        (rig, backend, front_end)
    };
    let all: Vec<_> = (0..daemons).map(start).collect();
    let taken = all
        .iter()
        .map(|(_, backend, _)| proportional_kib(backend.pid()));
    let taken: Vec<_> = taken.collect();
    let most = taken.iter().max().unwrap();
    let mean = taken.iter().sum::<u64>() / daemons as u64;
    eprintln!("{daemons} daemons: {mean} KiB each, {most} at most");
    assert!(*most < MOST_KIB, "{taken:?}");
    for (_rig, backend, front_end) in all {
        drop(front_end);
        backend.stop();
    }
}
