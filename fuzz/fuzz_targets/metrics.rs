//! What somebody sends who asks for metrics, in pieces of any length. What has its end is
//! answered, once, with what a second reading of HTTP finds, by this target; what has none is
//! waited for; and it does not matter where the stream was cut, what comes behind, or how
//! slowly the answer is read.
#![no_main]

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vhost_user_ploop::control::fuzzing::{Client, MAX_HEAD, answer};

/// More than a socket keeps.
const LARGE_PAGE: usize = 400 << 10;

#[derive(Arbitrary, Debug)]
struct Input {
    question: Question,
    /// Behind it.
    rest: Vec<u8>,
    /// Lengths of the pieces that it comes in, over and over.
    pieces: Vec<u16>,
    /// How much of an answer is read at once, over and over.
    reads: Vec<u16>,
    page: Page,
}

#[derive(Arbitrary, Debug)]
enum Question {
    /// That may be anything.
    Bytes(Vec<u8>),
    /// A right one, whatever it asks for.
    Right(Right),
    /// The same with something in it that may be anything.
    Spliced(Right, u16, Vec<u8>),
    /// Nearly, or just, too long.
    Long { is_target: bool, len: u8 },
}

#[derive(Arbitrary, Debug)]
struct Right {
    method: u8,
    target: u8,
    version: u8,
    hosts: u8,
    /// Kinds that are accepted, and how much they are liked.
    accepts: Vec<(u8, u8)>,
    more_fields: u8,
    has_bare_line_ends: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Page {
    Empty,
    Short,
    Large,
    CannotBeWritten,
}

/// What is to be answered: the status, whether the body is wanted, and whether it is in
/// OpenMetrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expected {
    status: u16,
    has_body: bool,
    is_open_metrics: bool,
}

const METHODS: [&str; 6] = ["GET", "HEAD", "POST", "get", "OPTIONS", "GETS"];

/// Whether the page is there.
const TARGETS: [(&str, bool); 10] = [
    ("/metrics", true),
    ("/metrics?a=b?c", true),
    ("http://a.example:1/metrics", true),
    ("HTTP://[::1]/metrics?", true),
    ("/", false),
    ("/metrics/", false),
    ("//metrics", false),
    ("http://metrics", false),
    ("*", false),
    ("?/metrics", false),
];

const VERSIONS: [&str; 4] = ["1.1", "1.0", "1.2", "2.0"];

/// Whether it is a format that is spoken, and then whether it is OpenMetrics.
const KINDS: [(&str, Option<bool>); 8] = [
    ("application/openmetrics-text", Some(true)),
    ("application/openmetrics-text; version=1.0.0", Some(true)),
    ("application/openmetrics-text;version=0.0.1", None),
    ("text/plain", Some(false)),
    ("text/plain ;version=\"0.0.4\"", Some(false)),
    ("text/plain;version=1.0.0", None),
    ("*/*", None),
    ("text/html;level=1", None),
];

const MAX_FIELDS: usize = 64;

impl Right {
    fn write(&self) -> (Vec<u8>, Expected) {
        let method = METHODS[usize::from(self.method) % METHODS.len()];
        let (target, is_there) = TARGETS[usize::from(self.target) % TARGETS.len()];
        let version = VERSIONS[usize::from(self.version) % VERSIONS.len()];
        let hosts = usize::from(self.hosts % 3);
        let mut lines = vec![format!("{method} {target} HTTP/{version}")];
        lines.extend(vec!["hOST: a".to_owned(); hosts]);
        let (mut open_metrics, mut text) = (0, 0);
        for &(kind, tenths) in self.accepts.iter().take(20) {
            let (kind, format) = KINDS[usize::from(kind) % KINDS.len()];
            let tenths = tenths % 11;
            let q = format!("{}.{}", tenths / 10, tenths % 10);
            lines.push(format!("Accept: {kind};q={q}"));
            match format {
                Some(true) => open_metrics = open_metrics.max(tenths),
                Some(false) => text = text.max(tenths),
                None => {}
            }
        }
        lines.extend(vec!["x: ".to_owned(); (self.more_fields % 70).into()]);
        let fields = lines.len() - 1;
        lines.extend([String::new(), String::new()]);
        let status = match version {
            "1.2" | "2.0" => 505,
            _ if fields > MAX_FIELDS => 431,
            "1.1" if hosts != 1 => 400,
            "1.0" if hosts > 1 => 400,
            _ if !is_there => 404,
            _ if !matches!(method, "GET" | "HEAD") => 405,
            _ => 200,
        };
        // Of what is no request the method is not known.
        let is_read = !matches!(status, 431 | 505);
        let expected = Expected {
            status,
            has_body: method != "HEAD" || !is_read,
            is_open_metrics: open_metrics > 0 && open_metrics >= text,
        };
        let line_end = if self.has_bare_line_ends {
            "\n"
        } else {
            "\r\n"
        };
        (lines.join(line_end).into_bytes(), expected)
    }
}

impl Question {
    /// And what it asks for, as far as that is known.
    fn write(&self) -> (Vec<u8>, Option<Expected>) {
        match self {
            Self::Bytes(bytes) => (bytes.clone(), None),
            Self::Right(right) => {
                let (bytes, expected) = right.write();
                (bytes, Some(expected))
            }
            Self::Spliced(right, at, more) => {
                let (mut bytes, _) = right.write();
                let at = usize::from(*at) % (bytes.len() + 1);
                bytes.splice(at..at, more.iter().copied());
                (bytes, None)
            }
            Self::Long { is_target, len } => {
                let begin = if *is_target {
                    "GET /"
                } else {
                    "GET / HTTP/1.1\r\nHost: "
                };
                let len = MAX_HEAD - 128 + usize::from(*len);
                let mut bytes = begin.as_bytes().to_vec();
                bytes.resize(len, b'a');
                let expected = (len >= MAX_HEAD).then_some(Expected {
                    status: 431,
                    has_body: true,
                    is_open_metrics: false,
                });
                (bytes, expected)
            }
        }
    }
}

impl Page {
    fn write(self, is_open_metrics: bool) -> Result<String, fmt::Error> {
        let name = if is_open_metrics { "open\n" } else { "text\n" };
        match self {
            Self::Empty => Ok(String::new()),
            Self::Short => Ok(name.to_owned()),
            Self::Large => Ok(name.repeat(LARGE_PAGE / name.len())),
            Self::CannotBeWritten => Err(fmt::Error),
        }
    }
}

/// What is wrong with its form ends this; the rest is returned: the status, the type and the
/// body, whose length may be another's.
fn parse(answer: &[u8]) -> (u16, String, usize, &[u8]) {
    let mut fields = [httparse::EMPTY_HEADER; 8];
    let mut response = httparse::Response::new(&mut fields);
    let head = response.parse(answer).expect("it is HTTP");
    let body = &answer[head.unwrap()..];
    let value = |name: &str| {
        let mut found = response.headers.iter().filter(|field| field.name == name);
        let value = str::from_utf8(found.next()?.value).expect("it is text");
        assert!(found.next().is_none(), "{name} twice");
        Some(value.to_owned())
    };
    let status = response.code.expect("a status");
    assert_eq!(value("Connection").as_deref(), Some("close"));
    assert_eq!(value("Allow").is_some(), status == 405);
    let kind = value("Content-Type").expect("a type");
    let len = value("Content-Length").expect("a length");
    (status, kind, len.parse().expect("a number"), body)
}

fn check(answer: &[u8], page: Page, expected: Option<Expected>) {
    let (status, kind, len, body) = parse(answer);
    let is_page = status == 200;
    let is_open_metrics = kind.starts_with("application/openmetrics-text");
    assert!([200, 400, 404, 405, 431, 500, 505].contains(&status));
    assert!(is_page || !is_open_metrics);
    assert!(body.is_empty() || body.len() == len);
    if is_page {
        let page = page.write(is_open_metrics).expect("it could be written");
        assert_eq!(len, page.len());
        assert!(body.is_empty() || body == page.as_bytes());
    }
    if let Some(mut expected) = expected {
        if expected.status == 200 && matches!(page, Page::CannotBeWritten) {
            expected.status = 500;
        }
        let is = Expected {
            status,
            has_body: !body.is_empty() || (len == 0 && expected.has_body),
            is_open_metrics: if is_page {
                is_open_metrics
            } else {
                expected.is_open_metrics
            },
        };
        assert_eq!(is, expected);
    }
}

/// But for its date, which may be another second's.
fn without_date(answer: &[u8]) -> Vec<u8> {
    let mut answer = answer.to_vec();
    let at = answer.windows(6).position(|name| name == b"Date: ");
    let at = at.expect("a date") + 6;
    answer[at..at + "Mon, 30 Nov 2026 17:00:00".len()].fill(b'0');
    answer
}

/// Asks over a socket, and returns what is answered.
fn ask(bytes: &[u8], input: &Input) -> Vec<u8> {
    let (mut peer, socket) = UnixStream::pair().expect("a socket");
    peer.set_nonblocking(true).expect("a socket");
    let mut client = Client::new(socket.into());
    let page = |is_open_metrics| input.page.write(is_open_metrics);
    let mut reads = input.reads.iter().map(|&len| usize::from(len) + 1).cycle();
    let mut chunk = vec![0; 1 << 16];
    let mut answer = Vec::new();
    let mut hear = |peer: &mut UnixStream| {
        let len = reads.next().unwrap_or(chunk.len());
        match peer.read(&mut chunk[..len]) {
            Ok(len) => answer.extend(&chunk[..len]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    };
    let mut stays = true;
    let mut lengths = input.pieces.iter().map(|&len| usize::from(len) + 1).cycle();
    let mut rest = bytes;
    while stays && !rest.is_empty() {
        let len = lengths.next().unwrap_or(rest.len()).min(rest.len());
        let (piece, behind) = rest.split_at(len);
        rest = behind;
        // It reads as much as is sent: there is always room.
        let sent = peer.write(piece).expect("it listens");
        assert_eq!(sent, piece.len());
        for _ in 0..=piece.len() / 1024 {
            stays = stays && client.serve(&page);
        }
        hear(&mut peer);
    }
    peer.shutdown(Shutdown::Write).expect("it is connected");
    // Each of these turns reads something of one side or the other.
    for _ in 0..LARGE_PAGE + bytes.len() {
        if !stays {
            break;
        }
        stays = client.serve(&page);
        hear(&mut peer);
    }
    assert!(!stays, "it stays for ever");
    drop(client);
    peer.set_nonblocking(false).expect("a socket");
    let mut end = Vec::new();
    // It resets the connection if there was more than it reads.
    match peer.read_to_end(&mut end) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    answer.extend(end);
    answer
}

fuzz_target!(|input: Input| {
    let (mut bytes, expected) = input.question.write();
    bytes.extend(&input.rest);
    let page = |is_open_metrics| input.page.write(is_open_metrics);
    // No more is looked at.
    let looked_at = &bytes[..bytes.len().min(MAX_HEAD)];
    let at_once = answer(looked_at, &page);
    match &at_once {
        Some(answer) => check(answer, input.page, expected),
        None => assert!(expected.is_none() && bytes.len() < MAX_HEAD),
    }
    // Who asks learns the same, wherever it was cut.
    let answered = ask(&bytes, &input);
    match at_once {
        Some(at_once) => assert!(without_date(&answered) == without_date(&at_once)),
        None => assert!(answered.is_empty()),
    }
});
