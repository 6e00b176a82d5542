//! A connection that is left between two messages and goes on.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_ploop::ploop::Options;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::front_end::*;
use crate::rig::*;
use crate::{OK, expect_service, make_busy, map_sectors, with_region};

/// How long a connection is waited for that cannot be left.
const AT_MOST: Duration = Duration::from_secs(2);

#[test]
fn a_connection_goes_on_where_it_was_left() {
    for has_region in [false, true] {
        let rig = Rig::new();
        let (mut front_end, mut connection) = rig.connect();
        front_end.negotiate(u64::MAX);
        if has_region {
            with_region(&mut front_end);
        }
        front_end.start_rings();
        for round in 0..5 {
            let ring = &mut front_end.rings[0];
            let heads = make_busy(&rig, ring);
            let (suspended, _) = suspend_during(connection, |_| {
                thread::sleep(A_WHILE);
                rig.disk.let_go();
            });
            let suspended = suspended.expect("it can be left");
            connection = rig.resume(suspended).unwrap();
            for _ in heads {
                let ring = &mut front_end.rings[0];
                let (head, _) = ring.wait_used();
                assert_eq!(ring.status(head), OK);
            }
            expect_service(&mut front_end, round % 4);
        }
    }
}

/// Leaves the connection, whose front-end goes on `meanwhile`, which sees whether it has been
/// left; returns how long that took.
fn suspend_during(
    connection: Served,
    meanwhile: impl FnOnce(&AtomicBool),
) -> (Suspension, Duration) {
    let is_left = AtomicBool::new(false);
    thread::scope(|scope| {
        let start = Instant::now();
        let suspended = scope.spawn(|| {
            let suspended = connection.suspend();
            is_left.store(true, Ordering::Release);
            suspended
        });
        meanwhile(&is_left);
        let suspended = suspended.join().unwrap();
        (suspended, start.elapsed())
    })
}

#[test]
fn a_front_end_that_changes_its_memory_is_left_when_it_has() {
    let rig = Rig::new();
    let (mut front_end, mut connection) = rig.start();
    map_sectors(&mut front_end.rings[0], 8);
    // The one that the rings are in, and one that only data is in.
    for index in [0, 2] {
        let memory = front_end.region(index);
        front_end.vhost.remove_mem_region(&memory).unwrap();
        let away = match index {
            0 => 5 * A_WHILE,
            _ => A_WHILE / 2,
        };
        let (suspended, took) = suspend_during(connection, |is_left| {
            thread::sleep(away);
            // Else nobody would answer.
            assert!(!is_left.load(Ordering::Acquire), "{index}");
            front_end.vhost.add_mem_region(&memory).unwrap();
        });
        assert!(took >= away, "{index}: {took:?}");
        let suspended = suspended.expect("its memory is there");
        connection = rig.resume(suspended).unwrap();
        let target = [writable(FAR, 512)];
        let ring = &mut front_end.rings[0];
        assert_eq!(ring.run(VIRTIO_BLK_T_IN, 1, &target), (OK, 513));
    }
    // Data's memory that is not given back is not waited for.
    let memory = front_end.region(2);
    front_end.vhost.remove_mem_region(&memory).unwrap();
    let (suspended, took) = suspend_during(connection, |_| {});
    assert!(took < AT_MOST, "{took:?}");
    let _connection = rig.resume(suspended.expect("it is left")).unwrap();
    expect_service(&mut front_end, 0);
}

#[test]
fn a_front_end_without_memory_for_its_rings_goes_on() {
    for has_region in [false, true] {
        let rig = Rig::new();
        let (mut front_end, connection) = rig.connect();
        front_end.negotiate(u64::MAX);
        if has_region {
            with_region(&mut front_end);
        }
        front_end.start_rings();
        let heads = make_busy(&rig, &mut front_end.rings[0]);
        let memory = front_end.region(0);
        front_end.vhost.remove_mem_region(&memory).unwrap();
        rig.disk.let_go();
        let (suspended, took) = suspend_during(connection, |_| {});
        let (_connection, why) = suspended.err().expect("it cannot go on elsewhere");
        assert!(took >= AT_MOST, "{took:?}");
        assert!(why.to_string().contains("memory of its rings"), "{why}");
        front_end.vhost.add_mem_region(&memory).unwrap();
        for _ in heads {
            let ring = &mut front_end.rings[0];
            let (head, _) = ring.wait_used();
            assert_eq!(ring.status(head), OK);
        }
        expect_service(&mut front_end, 1);
    }
}

/// As many requests for an answer as the device takes from a front-end that reads none.
fn ask_without_listening(mut socket: &UnixStream) {
    const GET_FEATURES: u32 = 1;
    const VERSION: u32 = 1;
    let message = [GET_FEATURES, VERSION, 0].map(u32::to_ne_bytes).concat();
    socket.set_nonblocking(true).unwrap();
    loop {
        match socket.write(&message) {
            Ok(len) if len == message.len() => {}
            // Until the thread that reads them has got as far as it can.
            Err(_) if !is_writable_soon(socket) => return,
            Ok(len) => panic!("{len} bytes of a message"),
            Err(_) => {}
        }
    }
}

fn is_writable_soon(socket: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let time = Timespec::try_from(A_WHILE).unwrap();
    poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&time)).unwrap() == 1
}

#[test]
fn a_front_end_that_reads_no_answers_is_not_waited_for() {
    let rig = Rig::new();
    let (mut front_end, connection) = rig.start();
    // SAFETY: the front-end has it as long as it lives.
    let socket = unsafe { BorrowedFd::borrow_raw(front_end.vhost.as_raw_fd()) };
    let mut socket = UnixStream::from(socket.try_clone_to_owned().unwrap());
    ask_without_listening(&socket);
    let (suspended, took) = suspend_during(connection, |_| {});
    let (_connection, why) = suspended.err().expect("it is amid an answer");
    assert!(took >= AT_MOST && took < 3 * AT_MOST, "{took:?}");
    assert!(why.to_string().contains("its answers"), "{why}");
    // Its requests are served all the time, and its messages once it listens.
    expect_service(&mut front_end, 0);
    let mut bytes = vec![0; 1 << 16];
    while is_readable(&socket, A_WHILE) {
        let _ = socket.read(&mut bytes).unwrap();
    }
    socket.set_nonblocking(false).unwrap();
    front_end.vhost.get_features().unwrap();
    front_end.vhost.get_vring_base(1).unwrap();
}

/// The threads of the rings before it wait to be let go, and must not for ever.
#[test]
fn a_connection_goes_on_with_all_its_rings_or_not_at_all() {
    let rig = Rig::new();
    let mut options = Options::default();
    options.max_queues = 1;
    let small = Rig::with_options(options);
    let (mut front_end, connection) = rig.start();
    expect_service(&mut front_end, 0);
    let suspended = connection.suspend().expect("it can be left");
    let copy = suspended.try_clone().unwrap();
    let (tell, told) = mpsc::channel();
    let attempt = thread::spawn(move || {
        let error = small.resume(copy).err().map(|error| error.to_string());
        tell.send(error).unwrap();
    });
    let error = told.recv_timeout(PATIENCE).expect("it comes to an end");
    attempt.join().unwrap();
    let error = error.expect("it has room for one queue");
    assert!(error.contains("queue 1"), "{error}");
    // Nobody has touched a ring.
    front_end.fill(DATA, &[7; 512]);
    let ring = &mut front_end.rings[0];
    let head = ring.request(VIRTIO_BLK_T_OUT, 9, &[readable(DATA, 512)]);
    ring.kick();
    thread::sleep(A_WHILE);
    assert_eq!(ring.take_used(), None);
    let _connection = rig.resume(suspended).unwrap();
    assert_eq!(front_end.rings[0].wait_used(), (head, 1));
    expect_service(&mut front_end, 3);
}

#[test]
fn a_connection_that_was_never_gone_on_with_is_still_there() {
    let rig = Rig::new();
    let other = Rig::new();
    let (mut front_end, connection) = rig.start();
    expect_service(&mut front_end, 0);
    let suspended = connection.suspend().expect("it can be left");
    other.resume_and_drop(suspended.try_clone().unwrap());
    let _connection = rig.resume(suspended).unwrap();
    expect_service(&mut front_end, 0);
    front_end.vhost.get_features().unwrap();
}
