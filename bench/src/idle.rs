//! What a server costs while somebody is attached and does nothing.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::bed::Bed;
use crate::contestant::{Contestant, Launch, OURS, QSD_PARALLELS};
use crate::guest::{self, Guest};
use crate::image::{Geometry, Image};
use crate::measure::Setting;
use crate::opening;
use crate::scratch;
use crate::server::Server;
use crate::station::{PREPARED, Station};

/// Where the image lies: it is only written to have had something to do.
const BED: Bed = Bed::Tmpfs;
const GEOMETRY: Geometry = Geometry {
    disk_bytes: 128 << 20,
    cluster_bytes: None,
};

/// What the guest does before it idles, and after, when it finds out whether the
/// server was idle or dead.
const SCRIPT: &str = "
head -c 16777216 /dev/urandom >/data
dd if=/data of=/dev/vda bs=64k conv=fsync 2>/dev/null
meet_host idle
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k count=256 2>/dev/null | cmp - /data
";

/// How long the server is left alone before the CPU is looked at. Spinning and
/// delayed writes end within it, and the kernel's workers of a ring, which leave
/// after five seconds without work.
const SETTLE: Duration = Duration::from_secs(7);

/// What shall be reached: the share of a CPU below which it counts as none, as the
/// clock itself ticks.
pub const TARGET_SHARE: f64 = 1e-5;

/// Who is attached to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attached {
    /// A guest under QEMU.
    Guest,
    /// The client of all other measurements.
    Client,
}

impl Attached {
    /// What the report calls it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Guest => "a guest",
            Self::Client => "a client",
        }
    }
}

/// What idling cost one side.
pub struct Idle {
    /// Who.
    pub contestant: Contestant,
    /// With whom.
    pub attached: Attached,
    /// What was seen.
    pub seen: Seen,
}

/// What a server was seen to use.
pub struct Seen {
    /// How long it was watched.
    pub time: Duration,
    /// CPU time.
    pub cpu: Duration,
    /// How often one of its threads ran.
    pub context_switches: u64,
}

/// Attaches a guest, and then a client, does some I/O, and watches the server for
/// `time` after it. Our server with a guest is the first of the figures.
///
/// # Errors
/// There is no guest, a server or a guest that fails, or the user's wish to stop.
pub fn measure(setting: &Setting, time: Duration) -> Result<Vec<Idle>> {
    guest::check(&setting.guest)?;
    let mut idles = Vec::new();
    for attached in [Attached::Guest, Attached::Client] {
        for contestant in [OURS, QSD_PARALLELS] {
            let image = Image::empty(&setting.directories, BED, contestant, GEOMETRY)?;
            let seen = match attached {
                Attached::Guest => with_guest(setting, contestant, &image, time),
                Attached::Client => with_client(setting, contestant, &image, time),
            };
            let seen = seen.with_context(|| {
                format!("idle: {} with {}", contestant.label(), attached.label())
            })?;
            idles.push(Idle {
                contestant,
                attached,
                seen,
            });
        }
    }
    Ok(idles)
}

fn with_client(
    setting: &Setting,
    contestant: Contestant,
    image: &Image,
    time: Duration,
) -> Result<Seen> {
    let mut station = Station::filled(&setting.programs, BED, contestant, image)?;
    let server = station.server().context("a contestant without a server")?;
    let seen = watch(setting, server, time)?;
    // It was idle, not dead.
    station.verify_sample(PREPARED)?;
    station.stop()?;
    Ok(seen)
}

fn with_guest(
    setting: &Setting,
    contestant: Contestant,
    image: &Image,
    time: Duration,
) -> Result<Seen> {
    let dir = scratch::for_socket()?;
    let socket = dir.path().join("s");
    let launch = Launch {
        image: &image.path,
        backing: &[],
        socket: &socket,
        bed: BED,
        queues: 1,
        write_through: false,
    };
    let command = contestant.command(&setting.programs, launch);
    let command = command.context("a contestant without a server")?;
    let server = Server::start(contestant.label(), command, dir.path())?;
    let mut server = server.of_peer(contestant.is_peer());
    server.once_listening(|| opening::ask_for_features(&socket))?;
    let mut guest = Guest::boot(&setting.guest, dir.path(), &socket, "", SCRIPT)?;
    guest
        .wait_at("idle")
        .map_err(|error| server.explain(error))?;
    let seen = watch(setting, &server, time)?;
    guest
        .go_on()
        .and_then(|()| guest.finish())
        .map_err(|error| server.explain(error))?;
    server.stop()?;
    Ok(seen)
}

/// How long it was watched, CPU time, context switches.
fn watch(setting: &Setting, server: &Server, time: Duration) -> Result<Seen> {
    thread::sleep(SETTLE);
    let cpu = server.cpu_time()?;
    let switches = server.context_switches()?;
    let start = Instant::now();
    while start.elapsed() < time {
        setting.check_interrupted()?;
        thread::sleep(Duration::from_millis(100));
    }
    Ok(Seen {
        time: start.elapsed(),
        cpu: server.cpu_time()? - cpu,
        context_switches: server.context_switches()?.since(&switches),
    })
}
