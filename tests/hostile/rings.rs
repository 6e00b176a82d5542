//! Rings that no driver makes. Whatever becomes of one, another queue works on meanwhile,
//! and the ring works again once it is made anew.

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VringConfigData};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::front_end::*;
use crate::suite::{Outcome, Suite, expect_service, halves, message, send, socket_of};

/// Memory of the attack's: tables, data, rings in other places.
const TABLE: u64 = FAR;
const ELSEWHERE: u64 = FAR + 0x1_0000;

/// Where a ring has its used ring, behind its table.
const USED: u64 = 0x2000;

/// The queue that is attacked, and the other one.
const ATTACKED: usize = 0;
const OTHER: usize = 1;

/// One case on a connection of its own: `attack` does what it likes to queue 0 and its
/// ring, and kicks.
fn expect_survival(suite: &Suite, name: &str, attack: impl FnOnce(&mut FrontEnd)) {
    println!("{name}");
    suite.expect(name, Outcome::GoesOn, |front_end| {
        attack(front_end);
        front_end.rings[ATTACKED].kick();
        for _ in 0..5 {
            expect_service(front_end, OTHER);
        }
        renew(front_end);
    });
}

/// The driver gives up the ring and makes it anew.
fn renew(front_end: &mut FrontEnd) {
    front_end.vhost.get_vring_base(ATTACKED).unwrap();
    let ring = &front_end.rings[ATTACKED];
    front_end.fill(ring.table(), &[0; 0x3000]);
    front_end.rings[ATTACKED].forget();
    front_end.start_ring_at(ATTACKED, 0);
}

/// Puts a chain into the ring as it is.
fn offer(front_end: &mut FrontEnd, descs: &[Desc]) {
    let ring = &mut front_end.rings[ATTACKED];
    ring.write_table(ring.table(), descs);
    ring.make_available(0);
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

#[test]
fn chains_that_lead_nowhere() {
    let suite = Suite::start();
    let cases: &[(&str, &[Desc])] = &[
        ("itself", &[desc(TABLE, 16, NEXT, 0)]),
        (
            "a loop of two",
            &[desc(TABLE, 16, NEXT, 1), desc(TABLE, 16, NEXT | WRITE, 0)],
        ),
        ("out of the table", &[desc(TABLE, 16, NEXT, RING_SIZE)]),
        ("far out of the table", &[desc(TABLE, 16, NEXT, u16::MAX)]),
        ("no memory", &[desc(1 << 50, 16, 0, 0)]),
        (
            "memory that overflows",
            &[desc(u64::MAX, u32::MAX, WRITE, 0)],
        ),
        (
            "more than 4 GiB",
            &[
                desc(TABLE, u32::MAX, NEXT, 1),
                desc(TABLE, u32::MAX, NEXT | WRITE, 2),
                desc(TABLE, u32::MAX, WRITE, 0),
            ],
        ),
        ("every flag", &[desc(TABLE, 16, u16::MAX, 0)]),
        ("nothing", &[desc(0, 0, 0, 0)]),
    ];
    for (name, descs) in cases {
        expect_survival(&suite, name, |front_end| offer(front_end, descs));
    }
    suite.end();
}

#[test]
fn indirect_tables_that_lead_nowhere() {
    let suite = Suite::start();
    let table = |name: &str, head: Desc, descs: &[Desc]| {
        expect_survival(&suite, name, |front_end| {
            front_end.rings[ATTACKED].write_table(TABLE, descs);
            offer(front_end, &[head, desc(TABLE, 16, 0, 0)]);
        });
    };
    let one = desc(TABLE, 16, INDIRECT, 0);
    let two = desc(TABLE, 32, INDIRECT, 0);
    table("empty", desc(TABLE, 0, INDIRECT, 0), &[]);
    table("half a descriptor", desc(TABLE, 8, INDIRECT, 0), &[]);
    table(
        "one and a half",
        desc(TABLE, 24, INDIRECT, 0),
        &[desc(TABLE, 16, NEXT, 1)],
    );
    table("outside", desc(1 << 50, 64, INDIRECT, 0), &[]);
    table(
        "over the end",
        desc(FAR + REGION_LEN - 16, 64, INDIRECT, 0),
        &[],
    );
    table("at an overflow", desc(u64::MAX - 15, 64, INDIRECT, 0), &[]);
    table("with all of memory", desc(0, !15, INDIRECT, 0), &[]);
    table(
        "and a next one",
        desc(TABLE, 16, INDIRECT | NEXT, 1),
        &[desc(TABLE, 16, 0, 0)],
    );
    table("in itself", one, &[one]);
    table(
        "and another in it",
        two,
        &[desc(TABLE + 16, 16, INDIRECT, 0), one],
    );
    table(
        "a loop",
        two,
        &[desc(TABLE, 16, NEXT, 1), desc(TABLE, 16, NEXT, 0)],
    );
    table("out of it", two, &[desc(TABLE, 16, NEXT, 2)]);
    table("the ring's own", desc(0, 16 * 64, INDIRECT, 0), &[]);
    suite.end();
}

#[test]
fn heads_and_indexes_out_of_the_blue() {
    let suite = Suite::start();
    for head in [RING_SIZE, RING_SIZE + 1, 1 << 15, u16::MAX] {
        expect_survival(&suite, &format!("head {head}"), |front_end| {
            front_end.rings[ATTACKED].make_available(head);
        });
    }
    for step in [RING_SIZE + 1, 1 << 15, u16::MAX] {
        expect_survival(&suite, &format!("an index {step} further"), |front_end| {
            let ring = &front_end.rings[ATTACKED];
            ring.set_avail_idx(ring.avail_idx().wrapping_add(step));
        });
    }
    expect_survival(&suite, "indexes that race", |front_end| {
        for round in 0..20_000_u16 {
            let ring = &front_end.rings[ATTACKED];
            ring.set_avail_idx(round.wrapping_mul(40_503));
            if round % 100 == 0 {
                ring.kick();
            }
        }
    });
    expect_survival(&suite, "the same head again and again", |front_end| {
        let ring = &mut front_end.rings[ATTACKED];
        let head = ring.request(VIRTIO_BLK_T_IN, 0, &[writable(ELSEWHERE, 512)]);
        for _ in 1..RING_SIZE {
            ring.make_available(head);
        }
    });
    suite.end();
}

/// The ring starts again with its parts at these places.
fn move_ring(front_end: &mut FrontEnd, [table, avail, used]: [u64; 3]) {
    front_end.vhost.get_vring_base(ATTACKED).unwrap();
    let host = |at| front_end.memory.get_host_address(GuestAddress(at)).unwrap() as u64;
    let config = VringConfigData {
        queue_max_size: RING_SIZE,
        queue_size: RING_SIZE,
        flags: 0,
        desc_table_addr: host(table),
        used_ring_addr: host(used),
        avail_ring_addr: host(avail),
        log_addr: None,
    };
    let vhost = &mut front_end.vhost;
    vhost.set_vring_addr(ATTACKED, &config).unwrap();
    vhost.set_vring_base(ATTACKED, 0).unwrap();
    let ring = &front_end.rings[ATTACKED];
    vhost.set_vring_call(ATTACKED, ring.call()).unwrap();
    vhost.set_vring_kick(ATTACKED, &ring.kick).unwrap();
}

#[test]
fn parts_of_a_ring_over_each_other() {
    let suite = Suite::start();
    let at = ELSEWHERE;
    let places = [
        ("the used ring over the descriptors", [at, at + 0x1000, at]),
        (
            "the used ring over some descriptors",
            [at, at + 0x1000, at + 0x20],
        ),
        (
            "the used ring over the available ring",
            [at, at + 0x1000, at + 0x1000],
        ),
        (
            "the used ring over available entries",
            [at, at + 0x1000, at + 0x1004],
        ),
        (
            "the available ring over the descriptors",
            [at, at, at + 0x1000],
        ),
        ("all in one place", [at, at, at]),
        ("at the very end", [at, at + 0x1000, FAR + REGION_LEN - 4]),
        ("over another queue's data", [at, at + 0x1000, DATA]),
    ];
    for (name, places) in places {
        expect_survival(&suite, name, |front_end| {
            let [table, avail, _] = places;
            move_ring(front_end, places);
            // Chains that are answered: each answer changes what comes next.
            let ring = &front_end.rings[ATTACKED];
            for slot in 0..16_u64 {
                let chain = [
                    desc(TABLE, 16, NEXT, 2 * slot as u16 + 1),
                    desc(TABLE + 0x100, 1, WRITE, 0),
                ];
                ring.write_table(table + 32 * slot, &chain);
                front_end.fill(avail + 4 + 2 * slot, &(2 * slot as u16).to_le_bytes());
            }
            front_end.fill(avail + 2, &16_u16.to_le_bytes());
        });
    }
    suite.end();
}

#[test]
fn requests_that_write_over_their_own_ring() {
    let suite = Suite::start();
    // What is read from the disk comes to lie there: bytes of any kind.
    let fill = |front_end: &mut FrontEnd| {
        let data: Vec<u8> = (0..4096_u32).map(|at| (at * 37 % 251) as u8).collect();
        front_end.fill(ELSEWHERE, &data);
        let ring = &mut front_end.rings[OTHER];
        let write = ring.run(VIRTIO_BLK_T_OUT, 0, &[readable(ELSEWHERE, 4096)]);
        assert_eq!(write, (0, 1));
    };
    let targets = [
        ("the descriptors", 0),
        ("the available ring", 0x1000),
        ("the used ring", USED),
    ];
    for (name, target) in targets {
        expect_survival(&suite, &format!("a read into {name}"), |front_end| {
            fill(front_end);
            let ring = &mut front_end.rings[ATTACKED];
            let target = ring.table() + target;
            for _ in 0..8 {
                ring.request(VIRTIO_BLK_T_IN, 0, &[writable(target, 512)]);
            }
        });
        expect_survival(&suite, &format!("a status in {name}"), |front_end| {
            let ring = &mut front_end.rings[ATTACKED];
            for at in 0..8 {
                let header = ring.header(VIRTIO_BLK_T_IN, 0);
                let place = ring.table() + target + at;
                ring.chain(&[header, writable(ELSEWHERE, 512), writable(place, 1)]);
            }
        });
    }
    expect_survival(&suite, "a header in the used ring", |front_end| {
        let ring = &mut front_end.rings[ATTACKED];
        let header = readable(ring.table() + USED, 16);
        ring.chain(&[header, writable(ELSEWHERE, 513)]);
    });
    suite.end();
}

#[test]
fn memory_that_goes_while_it_is_used() {
    let suite = Suite::start();
    // The region of the data is taken away and given back, with requests in flight on it.
    let region = 2;
    expect_survival(&suite, "the data's", |front_end| {
        let ring = &mut front_end.rings[ATTACKED];
        for sector in 0..8 {
            ring.request(VIRTIO_BLK_T_IN, sector, &[writable(ELSEWHERE, 512)]);
        }
        ring.kick();
        let info = front_end.region(region);
        front_end.vhost.remove_mem_region(&info).unwrap();
        expect_service(front_end, OTHER);
        // What comes now lies nowhere.
        let ring = &mut front_end.rings[ATTACKED];
        for sector in 0..4 {
            ring.request(VIRTIO_BLK_T_IN, sector, &[writable(ELSEWHERE, 512)]);
        }
        ring.kick();
        expect_service(front_end, OTHER);
        front_end.vhost.add_mem_region(&info).unwrap();
    });
    expect_survival(&suite, "the ring's", |front_end| {
        move_ring(
            front_end,
            [ELSEWHERE, ELSEWHERE + 0x1000, ELSEWHERE + 0x2000],
        );
        let info = front_end.region(region);
        front_end.vhost.remove_mem_region(&info).unwrap();
        front_end.rings[ATTACKED].kick();
        expect_service(front_end, OTHER);
        front_end.vhost.add_mem_region(&info).unwrap();
    });
    expect_survival(&suite, "all of it, again and again", |front_end| {
        for round in 0..200 {
            let ring = &mut front_end.rings[ATTACKED];
            if round % 8 == 0 {
                ring.request(VIRTIO_BLK_T_IN, 0, &[writable(ELSEWHERE, 512)]);
                ring.kick();
            }
            front_end.set_memory(3);
        }
    });
    suite.expect("the file of the ring", Outcome::Ends, |front_end| {
        let places = [ELSEWHERE, ELSEWHERE + 0x1000, ELSEWHERE + 0x2000];
        move_ring(front_end, places);
        let far = front_end.memory.iter().nth(region).unwrap();
        far.file_offset().unwrap().file().set_len(0).unwrap();
        front_end.rings[ATTACKED].kick();
        // Nothing is said before it has come to the end.
        assert!(is_readable(&socket_of(front_end), PATIENCE));
    });
    suite.end();
}

#[test]
fn a_ring_that_is_stopped_in_the_midst_of_nonsense() {
    let suite = Suite::start();
    expect_survival(&suite, "stops between indexes that race", |front_end| {
        let socket = socket_of(front_end);
        for round in 0..200_u16 {
            let ring = &front_end.rings[ATTACKED];
            ring.set_avail_idx(round.wrapping_mul(40_503));
            ring.kick();
            let enable = halves(&[ATTACKED as u32, u32::from(round % 2)]);
            send(&socket, message::SET_VRING_ENABLE, 1, &enable, &[]).unwrap();
        }
        let enable = halves(&[ATTACKED as u32, 1]);
        send(&socket, message::SET_VRING_ENABLE, 1, &enable, &[]).unwrap();
    });
    suite.end();
}
