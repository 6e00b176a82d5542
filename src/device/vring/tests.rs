use super::*;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::GuestAddress;

fn vring() -> Vring {
    let map = GuestMap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let vring = Vring::new(GuestMemoryAtomic::new(map), 16).unwrap();
    vring.set_queue_info(0x1000, 0x2000, 0x3000).unwrap();
    vring
}

#[test]
fn reading_a_kick_that_somebody_else_has_read_neither_blocks_nor_fails() {
    let vring = vring();
    for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
        let kick = eventfd(1, flags).unwrap();
        vring.set_kick(Some(File::from(kick.try_clone().unwrap())));
        assert!(!vring.read_kick().unwrap());
        assert!(!vring.read_kick().unwrap());
        rustix::io::write(&kick, &1_u64.to_ne_bytes()).unwrap();
        vring.set_enabled(true);
        assert!(vring.read_kick().unwrap());
        vring.set_enabled(false);
    }
}

#[test]
fn a_kick_is_consumed() {
    let vring = vring();
    let kick = eventfd(3, EventfdFlags::NONBLOCK).unwrap();
    vring.set_kick(Some(File::from(kick.try_clone().unwrap())));
    vring.read_kick().unwrap();
    assert_eq!(rustix::io::read(&kick, &mut [0; 8]), Err(Errno::AGAIN));
}

#[test]
fn a_signal_that_cannot_be_delivered_does_not_block() {
    let vring = vring();
    for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
        let call = eventfd(0, flags).unwrap();
        vring.set_call(Some(File::from(call.try_clone().unwrap())));
        vring.signal_used_queue().unwrap();
        let full = u64::MAX - 2;
        rustix::io::write(&call, &full.to_ne_bytes()).unwrap();
        vring.signal_used_queue().unwrap();
        let mut counter = [0; 8];
        rustix::io::read(&call, &mut counter).unwrap();
        assert_eq!(u64::from_ne_bytes(counter), u64::MAX - 1);
        vring.signal_used_queue().unwrap();
        rustix::io::read(&call, &mut counter).unwrap();
        assert_eq!(u64::from_ne_bytes(counter), 1);
    }
}

#[test]
fn disabling_waits_for_the_queue_thread() {
    let vring = vring();
    let gate = Arc::new(Gate::new().unwrap());
    vring.set_enabled(true);
    vring.link(&gate);
    gate.set_active();
    let disabling = std::thread::spawn({
        let vring = vring.clone();
        move || vring.set_enabled(false)
    });
    let (order, receipt) = loop {
        if let Some(taken) = gate.take() {
            break taken;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(!disabling.is_finished());
    assert!(!vring.get_ref().is_enabled());
    gate.settle(order, receipt);
    disabling.join().unwrap();
}

#[test]
fn a_restarted_ring_has_nothing_left_to_signal() {
    let vring = vring();
    vring.set_queue_ready(true);
    // Firmware without EVENT_IDX: 65,530 used entries, each signalled.
    for _ in 0..65_530 {
        vring.add_used(0, 0).unwrap();
        assert!(vring.needs_notification().unwrap());
    }
    vring.set_queue_ready(false);
    vring.set_queue_next_used(0);
    vring.set_queue_event_idx(true);
    vring.set_queue_ready(true);
    // The next driver uses it and waits for the first of ten entries. Counted on
    // from the old entries, they would be -6 to 4, and the first hidden.
    for _ in 0..10 {
        vring.add_used(0, 0).unwrap();
    }
    assert!(vring.needs_notification().unwrap());
}
