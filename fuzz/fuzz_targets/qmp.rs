//! What a client of the control socket sends, in pieces of any length. Each line that it
//! is answered is JSON in ASCII; what it has is said once it has introduced itself, and
//! nothing but errors before; and objects that are right are answered one by one, with the
//! client's name for each, wherever the stream was cut.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vhost_user_ploop::control::qmp::{Session, Wish};
use vhost_user_ploop::control::{Level, Subject};
use vhost_user_ploop::device::{
    Latencies, LatencyBins, LimitsError, QueueReport, ThrottleLimits, Totals,
};
use vhost_user_ploop::format::Sector;
use vhost_user_ploop::ploop::{BitmapInfo, EngineReport};

const COMMANDS: &[&str] = &[
    "query-block",
    "query-blockstats",
    "query-engine",
    "query-named-block-nodes",
    "query-status",
    "query-version",
    "block_set_io_throttle",
    "block-latency-histogram-set",
    "block_resize",
    "block-set-write-threshold",
    "flush",
    "grow",
    "snapshot-list",
    "throttle",
    "quit",
    "no-such",
];

#[derive(Arbitrary, Debug)]
struct Input {
    is_introduced: bool,
    parts: Vec<Part>,
    /// Lengths of the pieces that it comes in, over and over.
    pieces: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
enum Part {
    /// That may be anything, and is followed by what begins anew.
    Bytes(Vec<u8>),
    Nested {
        bracket: u8,
        depth: u16,
    },
    /// A right object, whatever is done with it.
    Request {
        command: u8,
        id: u16,
        argument: Option<u8>,
    },
}

struct Disk;

impl Subject for Disk {
    fn levels(&self) -> Vec<Level> {
        vec![Level {
            file: "/vz/\u{e4}\u{1f600}\u{7f}.hds".into(),
            is_ploop: true,
            is_writable: true,
            is_direct: false,
            virtual_size: u64::MAX,
            actual_size: 0,
            cluster_size: 1 << 20,
        }]
    }

    fn file_id(&self) -> String {
        "fe00-20d3".to_owned()
    }

    fn folder_id(&self) -> Option<String> {
        None
    }

    fn is_open(&self) -> bool {
        true
    }

    fn has_write_cache(&self) -> bool {
        false
    }

    fn totals(&self) -> Totals {
        Totals::default()
    }

    fn queues(&self) -> Vec<QueueReport> {
        Vec::new()
    }

    fn engine(&self) -> EngineReport {
        EngineReport::default()
    }

    fn latencies(&self) -> Latencies {
        Latencies::default()
    }

    fn bins(&self) -> LatencyBins {
        LatencyBins::default()
    }

    fn ask_for_bins(&self, boundaries: [Option<Vec<u64>>; 3]) {
        assert!(boundaries.iter().flatten().all(|list| list.is_sorted()));
    }

    fn give_up_bins(&self) {}

    fn bitmaps(&self) -> Vec<BitmapInfo> {
        vec![BitmapInfo {
            name: "since-noon".to_owned(),
            granularity: 65536,
            count: 131_072,
            records: true,
            is_persistent: false,
        }]
    }

    fn write_threshold(&self) -> u64 {
        0
    }

    fn set_write_threshold(&self, _: u64) {}

    fn limits(&self) -> ThrottleLimits {
        ThrottleLimits::default()
    }

    fn set_limits(&self, limits: ThrottleLimits) -> Result<(), LimitsError> {
        limits.check()
    }
}

/// Answers all of `bytes`, given in pieces.
fn answers(session: &mut Session, bytes: &[u8], pieces: &[u8]) -> Vec<(Value, Wish)> {
    let mut answers = Vec::new();
    let mut rest = bytes;
    let mut lengths = pieces.iter().map(|&len| usize::from(len) + 1).cycle();
    while !rest.is_empty() {
        let len = lengths.next().unwrap_or(rest.len()).min(rest.len());
        let (mut piece, behind) = rest.split_at(len);
        rest = behind;
        while let Some((line, wish)) = session.answer_next(&mut piece, &Disk) {
            assert_eq!(session.awaits_answer(), wish.is_answered_later());
            let line = match &wish {
                wish if wish.is_answered_later() => {
                    assert!(*wish != Wish::Resize(Sector(0)) && line.is_empty());
                    // Nothing is taken before that.
                    let waits = piece;
                    assert_eq!(session.answer_next(&mut piece, &Disk), None);
                    assert_eq!(piece, waits);
                    session.answer(Ok(json!({})))
                }
                _ => line,
            };
            let line = line.strip_suffix("\r\n").expect("it ends a line");
            assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            answers.push((serde_json::from_str(line).expect("it is JSON"), wish));
        }
        assert!(piece.is_empty());
    }
    answers
}

fuzz_target!(|input: Input| {
    let mut session = Session::default();
    let mut bytes = Vec::new();
    let mut ids = Vec::new();
    if input.is_introduced {
        bytes.extend(br#"{"execute":"qmp_capabilities"}"#);
    }
    for part in &input.parts {
        match part {
            Part::Bytes(odd) => {
                bytes.extend(odd);
                // No object has this byte, and no garbage the line's end.
                bytes.extend(b"\xff\n");
            }
            Part::Nested { bracket, depth } => {
                let bracket = [b"[", b"{"][usize::from(bracket % 2)];
                bytes.extend(b"{\"execute\":");
                bytes.extend(bracket.repeat((*depth).into()));
                bytes.extend(b"\xff\n");
            }
            Part::Request {
                command,
                id,
                argument,
            } => {
                let command = COMMANDS[usize::from(*command) % COMMANDS.len()];
                let mut request = json!({ "execute": command, "id": id });
                if let Some(argument) = argument {
                    request["arguments"] = match argument % 5 {
                        3 => json!({ "device": "disk", "size": u32::from(*id) << 4 }),
                        4 => json!({ "by": u32::from(*id) << 4 }),
                        0 => json!({ "flat": argument % 2 == 0 }),
                        1 => json!({ "id": "disk", "boundaries": [argument, id] }),
                        _ => json!({
                            "id": "disk", "bps": argument, "bps_rd": 0, "bps_wr": 0,
                            "iops": id, "iops_rd": 0, "iops_wr": 0, "iops_max": argument,
                        }),
                    };
                }
                bytes.extend(request.to_string().into_bytes());
                ids.push(*id);
            }
        }
    }
    let answers = answers(&mut session, &bytes, &input.pieces);
    for (answer, wish) in &answers {
        let is_error = answer["error"]["class"].is_string();
        assert!(is_error || !answer["return"].is_null());
        assert!(*wish == Wish::Nothing || session.hears_events());
    }
    // Numbers are what our own requests have; what is made of bytes may have some as well.
    let answered: Vec<_> = answers
        .iter()
        .filter_map(|(it, _)| it["id"].as_u64())
        .collect();
    let mut expected = ids.iter().peekable();
    for id in answered {
        if expected.peek().is_some_and(|next| u64::from(**next) == id) {
            expected.next();
        }
    }
    assert_eq!(expected.next(), None, "a request was not answered");
});
