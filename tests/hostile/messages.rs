//! Messages that no front-end sends. Each ends the connection that it came by, or changes
//! nothing; the daemon goes on, and so do the queues of the next front-end.

use std::{
    fs::File,
    io::{ErrorKind, Write},
    net::Shutdown,
    os::fd::{AsRawFd, RawFd},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use crate::front_end::*;
use crate::suite::{
    NEED_REPLY, Outcome, Suite, VERSION, event, expect_service, halves, memory, message, send,
    send_as, socket_of, words,
};

/// Of a region of memory in these tests.
const LEN: u64 = 0x10_0000;

/// Where neither the guest nor the front-end has memory yet.
const FREE: u64 = 0x1_0000_0000;

/// A case: the words of the header, the payload, and how many descriptors of memory come
/// with it.
struct Case {
    name: &'static str,
    header: [u32; 3],
    payload: Vec<u8>,
    files: usize,
}

/// A message whose header tells the truth.
fn case(name: &'static str, request: u32, payload: Vec<u8>, files: usize) -> Case {
    Case {
        name,
        header: [request, VERSION | NEED_REPLY, payload.len() as u32],
        payload,
        files,
    }
}

fn expect_all(outcome: Outcome, cases: Vec<Case>) {
    let suite = Suite::start();
    for case in cases {
        suite.expect(case.name, outcome, |front_end| {
            let files: Vec<File> = (0..case.files).map(|_| memory(LEN)).collect();
            let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
            // It may be hung up on before it has said all of it.
            let _ = send_as(&socket_of(front_end), case.header, &case.payload, &fds);
        });
    }
    suite.end();
}

#[test]
fn messages_that_are_cut_short_end_with_the_connection() {
    let suite = Suite::start();
    let whole = [
        &halves(&[message::SET_VRING_NUM, VERSION, 8])[..],
        &halves(&[0, 64]),
    ]
    .concat();
    for len in [1, 11, 12, 19] {
        suite.expect("a message that ends early", Outcome::Ends, |front_end| {
            let mut socket = socket_of(front_end);
            socket.write_all(&whole[..len]).unwrap();
            socket.shutdown(Shutdown::Write).unwrap();
        });
    }
    suite.end();
}

#[test]
fn a_message_that_is_begun_and_not_ended_is_not_waited_for() {
    let suite = Suite::start();
    let front_end = suite.connect();
    let mut socket = socket_of(&front_end);
    socket
        .write_all(&halves(&[message::SET_MEM_TABLE, VERSION]))
        .unwrap();
    let start = Instant::now();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let end = std::io::Read::read(&mut socket, &mut [0; 1]);
    assert!(
        matches!(end, Ok(0)) || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
    );
    assert!(
        start.elapsed() > Duration::from_secs(1),
        "it was given time"
    );
    drop((socket, front_end));
    drop(suite.connect());
    suite.end();
}

#[test]
fn headers_that_lie_end_the_connection() {
    let raw = |name, header: [u32; 3], payload: Vec<u8>| Case {
        name,
        header,
        payload,
        files: 0,
    };
    let num = message::SET_VRING_NUM;
    let ring = halves(&[0, 64]);
    expect_all(
        Outcome::Ends,
        vec![
            raw("longer than any", [num, VERSION, 0x1001], ring.clone()),
            raw(
                "as long as can be said",
                [num, VERSION, u32::MAX],
                ring.clone(),
            ),
            raw("shorter than it is", [num, VERSION, 4], halves(&[0])),
            raw(
                "longer than it is",
                [num, VERSION, 16],
                halves(&[0, 64, 0, 0]),
            ),
            raw("no payload", [num, VERSION, 0], vec![]),
            raw("no version", [num, 0, 8], ring.clone()),
            raw("another version", [num, 3, 8], ring.clone()),
            raw("an answer", [num, VERSION | 4, 8], ring.clone()),
            raw("request 0", [0, VERSION, 0], vec![]),
            raw("an unknown request", [1000, VERSION, 8], ring.clone()),
            raw("the last request", [u32::MAX, VERSION, 8], ring),
            raw("a request of other devices", [29, VERSION, 8], words(&[0])),
        ],
    );
}

#[test]
fn descriptors_of_the_wrong_number_end_the_connection() {
    let table = |count: u64| {
        let regions = (0..count).flat_map(|n| [FREE + n * LEN, LEN, FREE + n * LEN, 0]);
        words(&[count].into_iter().chain(regions).collect::<Vec<_>>())
    };
    let region = words(&[0, FREE, LEN, FREE, 0]);
    let log = words(&[0x1000, 0]);
    let in_flight = [words(&[0x1000, 0]), halves(&[0x40_0001, 0])].concat();
    expect_all(
        Outcome::Ends,
        vec![
            case(
                "a table without memory",
                message::SET_MEM_TABLE,
                table(2),
                0,
            ),
            case(
                "a table with too little",
                message::SET_MEM_TABLE,
                table(2),
                1,
            ),
            case("a table with too much", message::SET_MEM_TABLE, table(2), 3),
            case(
                "a region without memory",
                message::ADD_MEM_REG,
                region.clone(),
                0,
            ),
            case("a region with too much", message::ADD_MEM_REG, region, 2),
            case("a kick of nothing", message::SET_VRING_KICK, words(&[0]), 0),
            case(
                "no kick at all",
                message::SET_VRING_KICK,
                words(&[0x100]),
                0,
            ),
            case("two kicks", message::SET_VRING_KICK, words(&[0]), 2),
            case("two calls", message::SET_VRING_CALL, words(&[0]), 2),
            case(
                "an error that is not there",
                message::SET_VRING_ERR,
                words(&[0]),
                0,
            ),
            case("a log without memory", message::SET_LOG_BASE, log, 0),
            case("nothing in flight", message::SET_INFLIGHT_FD, in_flight, 0),
            case("no channel", message::SET_BACKEND_REQ_FD, vec![], 0),
            case("features with memory", message::GET_FEATURES, vec![], 1),
            case(
                "a size with memory",
                message::SET_VRING_NUM,
                halves(&[1, 64]),
                3,
            ),
        ],
    );
}

#[test]
fn descriptors_of_the_wrong_kind_end_the_connection() {
    let suite = Suite::start();
    let folder = File::open("/").unwrap();
    let null = File::open("/dev/null").unwrap();
    let zero = File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    let (pipe, _other) = std::io::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let event = event();
    let region = words(&[0, FREE, LEN, FREE, 0]);
    let kinds = [
        ("a folder", folder.as_raw_fd()),
        ("/dev/null", null.as_raw_fd()),
        ("/dev/zero", zero.as_raw_fd()),
        ("a pipe", pipe.as_raw_fd()),
        ("a socket", socket.as_raw_fd()),
        ("an event", event.as_raw_fd()),
    ];
    for (name, fd) in kinds {
        suite.expect(&format!("{name} as memory"), Outcome::Ends, |front_end| {
            let socket = socket_of(front_end);
            send(&socket, message::ADD_MEM_REG, VERSION, &region, &[fd]).unwrap();
        });
    }
    for (name, fd) in kinds.into_iter().filter(|(name, _)| *name != "an event") {
        for request in [message::SET_VRING_KICK, message::SET_VRING_CALL] {
            suite.expect(&format!("{name} as an event"), Outcome::Ends, |front_end| {
                let socket = socket_of(front_end);
                send(&socket, request, VERSION, &words(&[3]), &[fd]).unwrap();
            });
        }
    }
    suite.end();
}

#[test]
fn memory_that_cannot_be_ends_the_connection() {
    let add = |name, region: [u64; 4]| {
        let payload = words(&[&[0], &region[..]].concat());
        case(name, message::ADD_MEM_REG, payload, 1)
    };
    let table = |name, regions: &[[u64; 4]]| {
        let all = [&[regions.len() as u64], &regions.concat()[..]].concat();
        case(name, message::SET_MEM_TABLE, words(&all), regions.len())
    };
    let far = 1 << 40;
    expect_all(
        Outcome::Ends,
        vec![
            add("over the guest's own", [0, LEN, FREE, 0]),
            add("over its end", [LEN / 2, LEN, FREE, 0]),
            add("no bytes", [FREE, 0, FREE, 0]),
            add("beyond the file", [FREE, 2 * LEN, FREE, 0]),
            add("at the end of the file", [FREE, LEN, FREE, 0x1000]),
            add("at an odd place of it", [FREE, LEN / 2, FREE, 1]),
            add(
                "an offset that overflows",
                [FREE, LEN, FREE, u64::MAX - 0xfff],
            ),
            add("a size that overflows", [FREE, u64::MAX, FREE, 1]),
            add(
                "a guest address that overflows",
                [u64::MAX - 0xfff, LEN, FREE, 0],
            ),
            table("no regions", &[]),
            table("twice the same", &[[0, LEN, FREE, 0], [0, LEN, far, 0]]),
            table(
                "one in the other",
                &[[0, LEN, FREE, 0], [LEN / 2, 0x1000, far, 0]],
            ),
            table(
                "one that overflows",
                &[[0, LEN, FREE, 0], [far, u64::MAX - far, far, 0]],
            ),
            table("one without bytes", &[[0, LEN, FREE, 0], [far, 0, far, 0]]),
            table(
                "more than there may be",
                &std::array::from_fn::<_, 33, _>(|n| {
                    let at = FREE + n as u64 * LEN;
                    [at, LEN, at, 0]
                }),
            ),
            case(
                "more than it has",
                message::SET_MEM_TABLE,
                words(&[8, 0, LEN, FREE, 0]),
                1,
            ),
            case(
                "away with what is not there",
                message::REM_MEM_REG,
                words(&[0, FREE, LEN, FREE, 0]),
                0,
            ),
        ],
    );
}

#[test]
fn rings_that_cannot_be_end_the_connection() {
    let ring =
        |name, request, index: u32, value: u32| case(name, request, halves(&[index, value]), 0);
    let addresses = |name, index: u32, at: [u64; 3]| {
        let payload = [halves(&[index, 0]), words(&at), words(&[0])].concat();
        case(name, message::SET_VRING_ADDR, payload, 0)
    };
    let queues = u32::from(QUEUES);
    expect_all(
        Outcome::Ends,
        vec![
            ring(
                "the size of one that is not there",
                message::SET_VRING_NUM,
                1000,
                64,
            ),
            ring("a size while it runs", message::SET_VRING_NUM, 0, 32),
            ring("a place while it runs", message::SET_VRING_BASE, 0, 1),
            ring("a place in none", message::SET_VRING_BASE, u32::MAX, 1),
            ring(
                "the end of one that is not there",
                message::GET_VRING_BASE,
                1 << 31,
                0,
            ),
            ring(
                "one that is not there",
                message::SET_VRING_ENABLE,
                1 << 16,
                1,
            ),
            ring(
                "neither on nor off",
                message::SET_VRING_ENABLE,
                queues - 1,
                2,
            ),
            addresses("nowhere", 1, [u64::MAX; 3]),
            addresses("in no region", 1, [1 << 60; 3]),
            addresses("of one that is not there", 1 << 20, [0; 3]),
            case(
                "a kick for none",
                message::SET_VRING_KICK,
                words(&[0xff]),
                1,
            ),
            case(
                "a call for none",
                message::SET_VRING_CALL,
                words(&[0xfe]),
                1,
            ),
            case(
                "features that nobody has",
                message::SET_FEATURES,
                words(&[u64::MAX]),
                0,
            ),
            case("a second owner", message::SET_OWNER, vec![], 0),
        ],
    );
}

#[test]
fn shared_regions_that_cannot_be_end_the_connection() {
    let in_flight = |name, request, len: u64, offset: u64, queues: u16, size: u16, files| {
        let mut payload = words(&[len, offset]);
        payload.extend(queues.to_ne_bytes());
        payload.extend(size.to_ne_bytes());
        payload.extend([0; 4]);
        case(name, request, payload, files)
    };
    let (get, set) = (message::GET_INFLIGHT_FD, message::SET_INFLIGHT_FD);
    let log =
        |name, len: u64, offset: u64| case(name, message::SET_LOG_BASE, words(&[len, offset]), 1);
    expect_all(
        Outcome::Ends,
        vec![
            // Rings run.
            in_flight("one while rings run", get, 0, 0, 4, 64, 0),
            in_flight("another one while rings run", set, LEN, 0, 4, 64, 1),
            log("a log of no bytes", 0, 0),
            log("a log beyond its file", 2 * LEN, 0),
            log("a log at the end of its file", LEN, 0x1000),
            log("a log that overflows", u64::MAX, 1),
            log("a log at an overflow", 0x1000, u64::MAX - 0xfff),
        ],
    );
    let suite = Suite::start();
    for (queues, size) in [(0, 64), (4, 0), (u16::MAX, u16::MAX), (4, u16::MAX)] {
        for (request, files) in [(get, 0), (set, 1)] {
            let mut front_end = FrontEnd::connect(suite.backend.socket());
            front_end.negotiate(u64::MAX);
            let case = in_flight("", request, LEN, 0, queues, size, files);
            let memory = memory(LEN);
            let fds: Vec<RawFd> = (0..files).map(|_| memory.as_raw_fd()).collect();
            send_as(&socket_of(&front_end), case.header, &case.payload, &fds).unwrap();
            // Refused or not: what follows is served.
            drop(front_end);
            drop(suite.connect());
        }
    }
    suite.end();
}

#[test]
fn what_is_harmless_leaves_the_connection() {
    let config = |name, request, offset: u32, len: u32| {
        let mut payload = halves(&[offset, len, 0]);
        payload.resize(12 + len as usize, 0xff);
        case(name, request, payload, 0)
    };
    expect_all(
        Outcome::GoesOn,
        vec![
            config("all that there is", message::GET_CONFIG, 0, 256),
            config("the end of it", message::GET_CONFIG, 255, 1),
            config("the size of the disk", message::SET_CONFIG, 0, 8),
            config("much of it", message::SET_CONFIG, 0, 60),
            // Nothing is ever looked for in the part that cannot be.
            case(
                "memory whose end is no address of the front-end's",
                message::ADD_MEM_REG,
                words(&[0, FREE, LEN, u64::MAX - 0xfff, 0]),
                1,
            ),
        ],
    );
}

#[test]
fn storms_of_messages_are_survived() {
    let suite = Suite::start();
    // Questions whose answers nobody reads: they stop when there is room for no more.
    suite.expect_end_of_storm("questions", |socket, _| {
        send(socket, message::GET_FEATURES, VERSION, &[], &[])
    });
    suite.expect_end_of_storm("configuration spaces", |socket, _| {
        let mut payload = halves(&[0, 256, 0]);
        payload.resize(12 + 256, 0);
        send(socket, message::GET_CONFIG, VERSION, &payload, &[])
    });
    suite.end();

    let suite = Suite::start();
    let far = memory(LEN);
    suite.expect("regions", Outcome::GoesOn, |front_end| {
        let socket = socket_of(front_end);
        let region = words(&[0, FREE, LEN, FREE, 0]);
        for round in 0..500 {
            let fd = [far.as_raw_fd()];
            send(&socket, message::ADD_MEM_REG, VERSION, &region, &fd).unwrap();
            if round % 100 == 0 {
                expect_service(front_end, 0);
            }
            send(&socket, message::REM_MEM_REG, VERSION, &region, &[]).unwrap();
        }
    });
    suite.expect("starts and stops of a ring", Outcome::GoesOn, |front_end| {
        let socket = socket_of(front_end);
        for round in 0..500 {
            for enable in [0, 1] {
                let payload = halves(&[0, enable]);
                send(&socket, message::SET_VRING_ENABLE, VERSION, &payload, &[]).unwrap();
            }
            if round % 100 == 0 {
                expect_service(front_end, 1);
            }
        }
    });
    suite.expect("events", Outcome::GoesOn, |front_end| {
        let socket = socket_of(front_end);
        for _ in 0..500 {
            let event = event();
            for request in [message::SET_VRING_KICK, message::SET_VRING_CALL] {
                send(
                    &socket,
                    request,
                    VERSION,
                    &words(&[0]),
                    &[event.as_raw_fd()],
                )
                .unwrap();
            }
        }
        // The driver's own again, and a look at the ring.
        for request in [message::SET_VRING_CALL, message::SET_VRING_KICK] {
            let ring = &front_end.rings[0];
            let event = match request {
                message::SET_VRING_KICK => ring.kick.as_raw_fd(),
                _ => ring.call().as_raw_fd(),
            };
            send(&socket, request, VERSION, &words(&[0]), &[event]).unwrap();
        }
    });
    suite.expect("kicks", Outcome::GoesOn, |front_end| {
        for _ in 0..20_000 {
            front_end.rings[0].kick();
        }
        expect_service(front_end, 1);
    });
    for _ in 0..300 {
        drop(UnixStream::connect(suite.backend.socket()));
    }
    drop(suite.connect());
    suite.end();
}

impl Suite {
    /// Sends until nothing more is taken, and hangs up.
    fn expect_end_of_storm(
        &self,
        name: &str,
        say: impl Fn(&UnixStream, usize) -> std::io::Result<()>,
    ) {
        let front_end = self.connect();
        let socket = socket_of(&front_end);
        socket
            .set_write_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let said = (0..100_000).take_while(|&number| say(&socket, number).is_ok());
        let said = said.count();
        assert!((100..100_000).contains(&said), "{said} {name} were taken");
        drop((socket, front_end));
        drop(self.connect());
    }
}
