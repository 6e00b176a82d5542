//! What a server costs while a client is attached and does nothing.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::bed::Bed;
use crate::contestant::{Contestant, OURS, QSD_PARALLELS};
use crate::image::{Geometry, Image};
use crate::measure::Setting;
use crate::station::{PREPARED, Station};

/// Where the image lies: it is only written to have had something to do.
const BED: Bed = Bed::Tmpfs;
const GEOMETRY: Geometry = Geometry {
    disk_bytes: 128 << 20,
    cluster_bytes: None,
};

/// How long the server is left alone before the CPU is looked at. Spinning and
/// delayed writes end within it, and the kernel's workers of a ring, which leave
/// after five seconds without work.
const SETTLE: Duration = Duration::from_secs(7);

/// What shall be reached: the share of a CPU below which it counts as none, as the
/// clock itself ticks.
pub const TARGET_SHARE: f64 = 1e-5;

/// What idling cost one side.
pub struct Idle {
    /// Who.
    pub contestant: Contestant,
    /// How long it was watched.
    pub time: Duration,
    /// CPU time that it used.
    pub cpu: Duration,
    /// How often one of its threads ran.
    pub context_switches: u64,
}

/// Attaches a client, does some I/O, and watches the server for `time` after it.
///
/// # Errors
/// A server that fails, or the user's wish to stop.
pub fn measure(setting: &Setting, time: Duration) -> Result<Vec<Idle>> {
    [OURS, QSD_PARALLELS]
        .into_iter()
        .map(|contestant| {
            watch(setting, contestant, time)
                .with_context(|| format!("idle: {}", contestant.label()))
        })
        .collect()
}

fn watch(setting: &Setting, contestant: Contestant, time: Duration) -> Result<Idle> {
    let (programs, directories) = (&setting.programs, &setting.directories);
    let image = Image::empty(directories, BED, contestant, GEOMETRY)?;
    let mut station = Station::filled(programs, BED, contestant, &image)?;
    let server = station.server().context("a contestant without a server")?;

    thread::sleep(SETTLE);
    let cpu = server.cpu_time()?;
    let switches = server.context_switches()?;
    let start = Instant::now();
    while start.elapsed() < time {
        setting.check_interrupted()?;
        thread::sleep(Duration::from_millis(100));
    }
    let idle = Idle {
        contestant,
        time: start.elapsed(),
        cpu: server.cpu_time()? - cpu,
        context_switches: server.context_switches()?.since(&switches),
    };
    // It was idle, not dead.
    station.verify_sample(PREPARED)?;
    station.stop()?;
    Ok(idle)
}
