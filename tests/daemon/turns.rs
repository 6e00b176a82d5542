//! How long it takes to open an image for a ring that is to run, and to close it when the last one
//! has stopped: a guest that is migrated stands still meanwhile.

use std::time::Instant;

use super::*;
use crate::common::img::ploop_img;
use crate::grow::create;

/// In milliseconds, in their order.
pub struct Turns {
    /// What the log says.
    pub opened: Vec<f64>,
    pub closed: Vec<f64>,
    /// What the front-end had to wait.
    started: Vec<f64>,
    stopped: Vec<f64>,
    /// What each took of a processor, by both: as much on a machine that is busy.
    pub cpu: f64,
}

/// What a process has taken of processors so far, in milliseconds.
fn cpu_of(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name, which may have spaces in it.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks = |index: usize| fields[index].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) * 10.0
}

/// A guest starts and stops its rings so often, and writes at `at` in between, in bytes.
pub fn take(backend: &Backend, count: usize, at: u64) -> Turns {
    const OPENED: &str = "the image was locked, read and opened in ";
    const CLOSED: &str = "the image was closed and unlocked in ";
    let mut front_end = FrontEnd::connect(backend.socket());
    front_end.negotiate(u64::MAX);
    let ms = |start: Instant| start.elapsed().as_secs_f64() * 1e3;
    let (mut started, mut stopped) = (Vec::new(), Vec::new());
    let before = cpu_of(backend.pid());
    for _ in 0..count {
        let start = Instant::now();
        front_end.start_rings();
        started.push(ms(start));
        crate::death::write(&mut front_end, at / 512, 7);
        crate::death::expect(&mut front_end, at / 512, 7);
        let start = Instant::now();
        crate::hand_over::stop_rings(&mut front_end);
        stopped.push(ms(start));
    }
    let cpu = (cpu_of(backend.pid()) - before) / count as f64;
    drop(front_end);
    backend.expect_to_say(CLOSED);
    let log = backend.log();
    let times = |what: &str| -> Vec<f64> {
        let lines = log.lines().filter_map(|line| line.split_once(what));
        let times = lines.map(|(_, time)| time.trim_end_matches(" ms").parse().unwrap());
        times.collect()
    };
    let (opened, closed) = (times(OPENED), times(CLOSED));
    assert_eq!((opened.len(), closed.len()), (count, count), "{log}");
    Turns {
        opened,
        closed,
        started,
        stopped,
        cpu,
    }
}

/// Smallest, median and largest.
fn spread(values: &[f64]) -> String {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let (middle, last) = (values.len() / 2, values.len() - 1);
    format!(
        "{:.1} .. {:.1} .. {:.1}",
        values[0], values[middle], values[last]
    )
}

/// Of the storage that the place of tests is on: `ci/gluster.sh turns`.
#[test]
#[ignore = "measures: run it with --release where nothing else runs"]
fn how_long_a_chain_takes() {
    for levels in [1, 2, 4, 8] {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = create(folder.path(), "bundle", &["--cluster-size", "64K"]);
        for _ in 1..levels {
            ploop_img(["snapshot", "create", image.to_str().unwrap()]).ok();
        }
        let place = TempDir::new().unwrap();
        let socket = place.path().join("socket");
        let backend = Backend::start(&image, &socket, &["--lock=running"]);
        let turns = take(&backend, 11, 7 << 20);
        eprintln!(
            "{levels} levels: opened in {} ms, which started rings in {}; closed in {}, which \
             stopped them in {}; {:.1} of a processor",
            spread(&turns.opened),
            spread(&turns.started),
            spread(&turns.closed),
            spread(&turns.stopped),
            turns.cpu,
        );
        backend.stop();
    }
}
