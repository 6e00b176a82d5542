//! Messages of the protocol with any content, lengths and descriptors, as bytes on the
//! socket. Whatever they were, the connection ends, and the next one is served.
#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use fuzz::driver::{Device, wait_for_end};
use fuzz::front_end::{FrontEnd, event, halves, header, memory, message, words};
use libfuzzer_sys::fuzz_target;
use vhost_user_ploop::device::Parked;

/// Most messages of an input: their answers must fit into the socket.
const MESSAGES_MAX: usize = 24;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Without it, nearly all is refused.
    is_introduced: bool,
    features: u64,
    messages: Vec<Message>,
}

#[derive(Arbitrary, Debug)]
struct Message {
    content: Content,
    files: Vec<Kind>,
    flags: u8,
    /// In place of the true one.
    len: Option<u16>,
    /// Ends the input in the midst of this message.
    cut: Option<u8>,
}

#[derive(Arbitrary, Debug)]
enum Content {
    Any {
        request: u8,
        payload: Vec<u8>,
    },
    Words {
        request: u8,
        words: Vec<Word>,
    },
    Table(Vec<Region>),
    Add(Region),
    Remove(Region),
    Ring {
        request: u8,
        queue: u8,
        value: Word,
    },
    Addresses {
        queue: u8,
        flags: u8,
        at: [Word; 4],
    },
    Event {
        request: u8,
        queue: u8,
        has_none: bool,
    },
    Config {
        set: bool,
        offset: u16,
        len: u16,
        flags: u8,
        bytes: Vec<u8>,
    },
    InFlight {
        set: bool,
        len: Word,
        offset: Word,
        queues: u16,
        entries: u16,
    },
    Log {
        len: Word,
        offset: Word,
    },
}

#[derive(Arbitrary, Debug)]
struct Region {
    guest: Word,
    size: Word,
    front_end: Word,
    offset: Word,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Word {
    Small(u8),
    Pages(u8),
    Bit(u8),
    Highest(u8),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Memory,
    Event,
    Socket,
    Null,
    Pipe,
    Folder,
}

impl Word {
    fn value(self) -> u64 {
        match self {
            Self::Small(value) => value.into(),
            Self::Pages(value) => 0x1000 * u64::from(value),
            Self::Bit(bit) => 1 << (bit % 64),
            Self::Highest(by) => u64::MAX - u64::from(by),
            Self::Any(value) => value,
        }
    }
}

impl Kind {
    fn open(self) -> OwnedFd {
        match self {
            Self::Memory => memory(0x10_0000).into(),
            Self::Event => event(),
            Self::Socket => UnixStream::pair()
                .expect("there are descriptors left")
                .0
                .into(),
            Self::Null => File::open("/dev/null").expect("it is there").into(),
            Self::Pipe => std::io::pipe()
                .expect("there are descriptors left")
                .1
                .into(),
            Self::Folder => File::open("/").expect("it is there").into(),
        }
    }
}

impl Region {
    fn words(&self) -> [u64; 4] {
        [&self.guest, &self.size, &self.front_end, &self.offset].map(|word| word.value())
    }
}

impl Content {
    fn bytes(&self) -> (u32, Vec<u8>) {
        match self {
            Self::Any { request, payload } => (
                (request % 50).into(),
                payload[..payload.len().min(0x1100)].to_vec(),
            ),
            Self::Words {
                request,
                words: list,
            } => {
                let list: Vec<_> = list.iter().take(80).map(|word| word.value()).collect();
                ((request % 50).into(), words(&list))
            }
            Self::Table(regions) => {
                let regions = &regions[..regions.len().min(9)];
                let mut list = vec![regions.len() as u64];
                list.extend(regions.iter().flat_map(Region::words));
                (message::SET_MEM_TABLE, words(&list))
            }
            Self::Add(region) => (message::ADD_MEM_REG, one(region)),
            Self::Remove(region) => (message::REM_MEM_REG, one(region)),
            Self::Ring {
                request,
                queue,
                value,
            } => {
                let requests = [
                    message::SET_VRING_NUM,
                    message::SET_VRING_BASE,
                    message::GET_VRING_BASE,
                    message::SET_VRING_ENABLE,
                ];
                let request = requests[usize::from(request % 4)];
                (
                    request,
                    halves(&[u32::from(queue % 5), value.value() as u32]),
                )
            }
            Self::Addresses { queue, flags, at } => {
                let at = at.map(Word::value);
                let payload = [
                    halves(&[u32::from(queue % 5), u32::from(*flags)]),
                    words(&at),
                ];
                (message::SET_VRING_ADDR, payload.concat())
            }
            Self::Event {
                request,
                queue,
                has_none,
            } => {
                let requests = [
                    message::SET_VRING_KICK,
                    message::SET_VRING_CALL,
                    message::SET_VRING_ERR,
                ];
                let flag = u64::from(*has_none) << 8;
                let request = requests[usize::from(request % 3)];
                (request, words(&[u64::from(queue % 5) | flag]))
            }
            Self::Config {
                set,
                offset,
                len,
                flags,
                bytes,
            } => {
                let request = if *set {
                    message::SET_CONFIG
                } else {
                    message::GET_CONFIG
                };
                let mut payload = halves(&[(*offset).into(), (*len).into(), (*flags).into()]);
                payload.extend_from_slice(&bytes[..bytes.len().min(0x200)]);
                (request, payload)
            }
            Self::InFlight {
                set,
                len,
                offset,
                queues,
                entries,
            } => {
                let request = match set {
                    true => message::SET_INFLIGHT_FD,
                    false => message::GET_INFLIGHT_FD,
                };
                let mut payload = words(&[len.value(), offset.value()]);
                payload.extend(queues.to_ne_bytes());
                payload.extend(entries.to_ne_bytes());
                payload.extend([0; 4]);
                (request, payload)
            }
            Self::Log { len, offset } => {
                (message::SET_LOG_BASE, words(&[len.value(), offset.value()]))
            }
        }
    }
}

fn one(region: &Region) -> Vec<u8> {
    words(&[&[0], &region.words()[..]].concat())
}

static DEVICE: LazyLock<Device> = LazyLock::new(Device::new);

fuzz_target!(|input: Input| run(&input));

fn run(input: &Input) {
    let (front_end, connection) = DEVICE.connect();
    if input.is_introduced {
        let features = input.features & 0xffff_ffff_fbff_ffff | 1 << 30;
        front_end.introduce(features);
    }
    for message in input.messages.iter().take(MESSAGES_MAX) {
        if say(&front_end, message).is_none() {
            break;
        }
    }
    // What has come before the end is obeyed or refused, and nothing is waited for.
    let _ = front_end.socket.shutdown(Shutdown::Write);
    wait_for_end(&connection);
    connection.stop(Parked::Drop);
    let (front_end, connection) = DEVICE.connect();
    front_end.introduce(u64::MAX);
    drop(front_end);
    wait_for_end(&connection);
}

/// `None` if there is nothing to say after it.
fn say(front_end: &FrontEnd, message: &Message) -> Option<()> {
    let (request, payload) = message.content.bytes();
    let files: Vec<_> = message
        .files
        .iter()
        .take(9)
        .map(|kind| kind.open())
        .collect();
    let len = message.len.map_or(payload.len() as u32, u32::from);
    // Version 1, most of the time.
    let flags = u32::from(message.flags & 0xf) ^ 1;
    let bytes = [&header(request, flags, len)[..], &payload].concat();
    let end = message
        .cut
        .map_or(bytes.len(), |cut| bytes.len().min(1 + usize::from(cut)));
    front_end.send_raw(&bytes[..end], &files).ok()?;
    (end == bytes.len()).then_some(())
}
