//! How long it takes to open a large image, and what it costs in memory.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bed::Bed;
use crate::contestant::{Contestant, Launch, OURS, QSD_PARALLELS};
use crate::image;
use crate::measure::Setting;
use crate::scratch;
use crate::server::Server;

/// 8 TiB.
pub const DISK_BYTES: u64 = 8 << 40;
/// 1 MiB.
pub const CLUSTER_BYTES: u32 = 1 << 20;

/// What shall be reached: seconds from the start of the program to its first
/// answer.
pub const TARGET_SECONDS: f64 = 0.4;
/// What shall be reached: memory in bytes, 10 MiB a TiB.
pub const TARGET_MEMORY: u64 = (10 << 20) * (DISK_BYTES >> 40);

/// What opening took one side.
pub struct Opening {
    /// Who.
    pub contestant: Contestant,
    /// In seconds, one a round.
    pub seconds: Vec<f64>,
    /// The most memory in bytes.
    pub peak_memory: u64,
}

/// Opens an image with every entry mapped, in turn with each server.
///
/// # Errors
/// A server that fails, or the user's wish to stop.
pub fn measure(setting: &Setting, rounds: u32) -> Result<Vec<Opening>> {
    let dir = setting.directories.make(Bed::Tmpfs)?;
    let path = dir.path().join("image");
    image::write_fully_mapped(&path, DISK_BYTES, CLUSTER_BYTES)
        .context("writing the 8 TiB image")?;
    let mut openings: Vec<Opening> = [OURS, QSD_PARALLELS]
        .map(|contestant| Opening {
            contestant,
            seconds: Vec::new(),
            peak_memory: 0,
        })
        .into();
    for _ in 0..rounds {
        for opening in &mut openings {
            setting.check_interrupted()?;
            let (time, memory) = open_once(setting, opening.contestant, &path)
                .with_context(|| format!("opening 8 TiB: {}", opening.contestant.label()))?;
            opening.seconds.push(time.as_secs_f64());
            opening.peak_memory = opening.peak_memory.max(memory);
        }
    }
    Ok(openings)
}

fn open_once(setting: &Setting, contestant: Contestant, image: &Path) -> Result<(Duration, u64)> {
    let socket_dir = scratch::for_socket()?;
    let socket = socket_dir.path().join("s");
    let launch = Launch {
        image,
        backing: &[],
        socket: &socket,
        bed: Bed::Tmpfs,
        queues: 1,
        write_through: false,
    };
    let command = contestant
        .command(&setting.programs, launch)
        .context("a contestant without a server")?;
    let start = Instant::now();
    let server = Server::start(contestant.label(), command, socket_dir.path())?;
    let mut server = server.of_peer(contestant.is_peer());
    server.once_listening(|| ask_for_features(&socket))?;
    let time = start.elapsed();
    let memory = server.peak_memory()?;
    server.stop()?;
    Ok((time, memory))
}

/// Sends VHOST_USER_GET_FEATURES and waits for the answer: a server may listen
/// before it can serve.
///
/// # Errors
/// Nobody listens, or what answers is not such a server.
pub fn ask_for_features(socket: &Path) -> Result<()> {
    const GET_FEATURES: u32 = 1;
    const VERSION: u32 = 1;
    const REPLY: u32 = 1 << 2;
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut request = Vec::new();
    // Request, flags, size of the payload.
    for word in [GET_FEATURES, VERSION, 0] {
        request.extend_from_slice(&u32::to_ne_bytes(word));
    }
    stream.write_all(&request)?;
    let mut reply = [0; 20];
    stream
        .read_exact(&mut reply)
        .map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => anyhow::Error::msg("no answer in 20 seconds"),
            _ => error.into(),
        })?;
    let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| reply[at + i]));
    ensure!(word(0) == GET_FEATURES, "an answer to something else");
    ensure!(word(4) & REPLY != 0, "not an answer");
    Ok(())
}
