//! What a server costs while a client is attached and does nothing.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::contestant::{Contestant, OURS, QSD_PARALLELS};
use crate::measure::{Lab, Setting};

/// How long the server is left alone before the CPU is looked at: spinning and
/// delayed writes end within it.
const SETTLE: Duration = Duration::from_secs(2);

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
    let lab = Lab::new(setting);
    [OURS, QSD_PARALLELS]
        .into_iter()
        .map(|contestant| {
            lab.with_attached(contestant, |server| {
                thread::sleep(SETTLE);
                let cpu = server.cpu_time()?;
                let switches = server.context_switches()?;
                let start = Instant::now();
                while start.elapsed() < time {
                    if setting.interrupted.load(Ordering::Relaxed) {
                        bail!("stopped by the user");
                    }
                    thread::sleep(Duration::from_millis(100));
                }
                Ok(Idle {
                    contestant,
                    time: start.elapsed(),
                    cpu: server.cpu_time()? - cpu,
                    context_switches: server.context_switches()? - switches,
                })
            })
        })
        .collect()
}
