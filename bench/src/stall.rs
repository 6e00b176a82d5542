//! How long a guest's requests wait while another process begins to serve its disk.
//!
//! A guest under QEMU reads and writes at random, and fio says for each half second how
//! long the slowest request has taken. So many of these as there were changes, the longest
//! ones, are taken for what the changes have cost; what is left shows how slow a request
//! is without one.

use std::fmt::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::bed::Bed;
use crate::guest::{self, Guest};
use crate::image;
use crate::measure::Setting;
use crate::opening::{CLUSTER_BYTES, DISK_BYTES};
use crate::scratch;
use crate::server::Server;
use crate::stats::median;

/// The small disk: 4 GiB, in bytes.
const SMALL_BYTES: u64 = 4 << 30;

/// Between two changes.
const PAUSE: Duration = Duration::from_secs(2);

/// What the guest has in flight.
const DEPTH: u32 = 8;

/// Slow requests that end within so many milliseconds have waited for the same.
const TOGETHER_MS: u64 = 1000;

/// How another process comes to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The first is killed with SIGKILL, another started on the same listening socket.
    /// QEMU looks every 10 ms whether it can connect again.
    Death,
    /// The first hands over (`--take-over`).
    TakeOver,
}

impl Change {
    fn label(self) -> &'static str {
        match self {
            Self::Death => "SIGKILL and start",
            Self::TakeOver => "take-over",
        }
    }
}

/// What was measured of one kind of change on one disk.
pub struct Stalls {
    change: Change,
    disk_bytes: u64,
    /// What shall not be exceeded, in milliseconds.
    target: f64,
    /// In milliseconds, longest first, one for each change.
    stalls: Vec<f64>,
    /// The slowest request beside, in milliseconds.
    beside: f64,
}

/// Kills and hands over, `rounds` times each.
///
/// # Errors
/// There is no guest, a server or a guest that fails, or the user's wish to stop.
pub fn measure(setting: &Setting, rounds: u32) -> Result<Vec<Stalls>> {
    guest::check(&setting.guest)?;
    let mut all = Vec::new();
    for (change, disk_bytes, target) in [
        (Change::Death, SMALL_BYTES, 200.0),
        (Change::Death, DISK_BYTES, 500.0),
        (Change::TakeOver, SMALL_BYTES, 20.0),
        (Change::TakeOver, DISK_BYTES, 20.0),
    ] {
        let dir = setting.directories.make(Bed::Tmpfs)?;
        let image = dir.path().join("image");
        image::write_fully_mapped(&image, disk_bytes, CLUSTER_BYTES).context("an image")?;
        let (stalls, beside) = change_often(setting, change, &image, rounds)
            .with_context(|| format!("stalls: {}", change.label()))?;
        all.push(Stalls {
            change,
            disk_bytes,
            target,
            stalls,
            beside,
        });
    }
    Ok(all)
}

/// A table for a terminal.
pub fn table(all: &[Stalls]) -> String {
    let mut text = String::from(
        "| another process by | disk | times | median ms | longest ms | target ms | \
         below it | slowest beside ms |\n|---|---|---:|---:|---:|---:|---:|---:|\n",
    );
    for seen in all {
        let below = seen.stalls.iter().filter(|stall| **stall < seen.target);
        let _ = writeln!(
            text,
            "| {} | {} GiB | {} | {:.1} | {:.1} | {} | {} | {:.1} |",
            seen.change.label(),
            seen.disk_bytes >> 30,
            seen.stalls.len(),
            median(&seen.stalls).unwrap_or_default(),
            seen.stalls.first().copied().unwrap_or_default(),
            seen.target,
            below.count(),
            seen.beside,
        );
    }
    text
}

fn change_often(
    setting: &Setting,
    change: Change,
    image: &Path,
    rounds: u32,
) -> Result<(Vec<f64>, f64)> {
    let dir = scratch::for_socket()?;
    let socket = dir.path().join("s");
    let upgrade = dir.path().join("u");
    let listener = UnixListener::bind(&socket)?;
    fcntl_setfd(&listener, FdFlags::empty())?;
    let command = |what: &[&str]| {
        let mut command = Command::new(&setting.programs.server);
        command.args(what).arg("--blk-file").arg(image);
        command.args(&setting.programs.server_args);
        command
    };
    let fd = format!("--fd={}", listener.as_raw_fd());
    let to_come = format!("--upgrade-socket={}", upgrade.display());
    let take_over = format!("--take-over={}", upgrade.display());
    let start = |what: &[&str]| Server::start("vhost-user-ploop".into(), command(what), dir.path());
    let first: &[&str] = match change {
        Change::Death => &[&fd],
        Change::TakeOver => &[&fd, &to_come],
    };
    let mut server = start(first)?;
    let script = script(PAUSE * (rounds + 2));
    let reconnect = if change == Change::Death {
        ",reconnect-ms=10"
    } else {
        ""
    };
    let mut guest = Guest::boot(&setting.guest, dir.path(), &socket, reconnect, &script)?;
    guest
        .wait_at("busy")
        .map_err(|error| server.explain(error))?;
    guest.go_on()?;
    for _ in 0..rounds {
        let begin = Instant::now();
        while begin.elapsed() < PAUSE {
            setting.check_interrupted()?;
            thread::sleep(Duration::from_millis(50));
        }
        server = match change {
            Change::Death => {
                drop(server);
                start(&[&fd])?
            }
            Change::TakeOver => {
                let successor = start(&[&take_over])?;
                ensure!(server.wait()?.success(), "the first has not handed over");
                successor
            }
        };
    }
    let console = guest.finish().map_err(|error| server.explain(error))?;
    server.stop()?;
    stalls_of(&console, rounds as usize)
}

fn script(time: Duration) -> String {
    format!(
        "
meet_host busy
fio --name=load --filename=/dev/vda --rw=randrw --bs=4k --iodepth={DEPTH} --size=2G \
    --ioengine=libaio --direct=1 --time_based --runtime={} --norandommap --randrepeat=0 \
    --write_lat_log=/run/load --log_avg_msec=500 --log_max_value=1 >/dev/null </dev/null
sed 's/^/guest: slowest=/' /run/load_clat.1.log
",
        time.as_secs()
    )
}

/// The longest of what the guest has logged, and the longest of the rest.
fn stalls_of(console: &str, count: usize) -> Result<(Vec<f64>, f64)> {
    let mut slowest = Vec::new();
    for line in console.lines() {
        let Some(entry) = line.trim_end().strip_prefix("guest: slowest=") else {
            continue;
        };
        let mut words = entry.split(',').map(|word| word.trim().parse::<u64>());
        let (Some(Ok(ms)), Some(Ok(ns))) = (words.next(), words.next()) else {
            continue;
        };
        slowest.push((ms, ns as f64 / 1e6));
    }
    ensure!(!slowest.is_empty(), "fio has logged nothing:\n{console}");
    // A change can end requests in two half seconds, reads and writes.
    let mut apart: Vec<(u64, f64)> = Vec::new();
    slowest.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (ms, long) in slowest {
        if apart.iter().all(|(at, _)| at.abs_diff(ms) >= TOGETHER_MS) {
            apart.push((ms, long));
        }
    }
    let all: Vec<f64> = apart.into_iter().map(|(_, long)| long).collect();
    ensure!(all.len() > count, "fio has logged too little");
    let beside = all[count];
    Ok((all[..count].to_vec(), beside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_that_are_apart_are_stalls() {
        let console = "+ sed\nguest: slowest=500, 1000000, 0, 4096, 0, 0\n\
                       guest: slowest=2000, 90000000, 0, 4096, 0, 0\n\
                       guest: slowest=2500, 80000000, 1, 4096, 0, 0\n\
                       guest: slowest=4000, 2000000, 0, 4096, 0, 0\n\
                       guest: slowest=6000, 70000000, 0, 4096, 0, 0\n";
        let (stalls, beside) = stalls_of(console, 2).unwrap();
        assert_eq!((stalls, beside), (vec![90.0, 70.0], 2.0));
    }

    #[test]
    fn a_guest_that_says_nothing_is_an_error() {
        assert!(stalls_of("guest: script ended with status 0\n", 1).is_err());
    }
}
