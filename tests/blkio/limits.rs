//! Limits on what guests may do, under a load that wants more.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::client::{Client, Lane};
use crate::common::qmp::Qmp;
use crate::{MIB, Rig};

/// Lanes that load the disk.
const LANES: usize = 4;

/// Requests that each has under way.
const IN_FLIGHT: usize = 8;

/// Reads all the time; returns how many reads have ended.
fn read(lane: &mut Lane, time: Duration) -> u64 {
    let start = Instant::now();
    let mut count = 0;
    (0..IN_FLIGHT).for_each(|tag| lane.read(0, 4096, tag));
    while start.elapsed() < time {
        for (tag, result) in lane.wait(1) {
            assert_eq!(result, 0);
            count += 1;
            lane.read(0, 4096, tag);
        }
    }
    let mut left = IN_FLIGHT;
    while left > 0 {
        left -= lane.wait(1).len();
    }
    count
}

/// The same by all lanes at once.
fn load(client: &mut Client, time: Duration) -> Vec<u64> {
    thread::scope(|scope| {
        let lanes = client.lanes.iter_mut();
        let loads: Vec<_> = lanes
            .map(|lane| scope.spawn(move || read(lane, time)))
            .collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    })
}

fn iops(limit: u64) -> Value {
    json!({
        "id": "disk", "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": limit, "iops_rd": 0, "iops_wr": 0,
    })
}

/// Of the CPU, by all threads of a process.
fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = fields.split_ascii_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

#[test]
fn limits_hold_for_all_queues_together_and_can_be_changed() {
    const LIMIT: u64 = 200;
    const SECONDS: u64 = 3;
    let rig = Rig::ploop_img("64M", "1M");
    let control = rig.folder.path().join("control");
    let option = format!("--control={}", control.display());
    let backend = rig.serve(&[&option, &format!("--throttle=iops={LIMIT}")]);
    let mut client = Client::connect(backend.socket(), LANES);
    let mut qmp = Qmp::connect(&control);

    let before = cpu_time(backend.pid());
    let counts = load(&mut client, Duration::from_secs(SECONDS));
    let cpu = cpu_time(backend.pid()) - before;
    let total: u64 = counts.iter().sum();
    eprintln!("{counts:?} reads at {LIMIT} a second, {cpu:?} of CPU");
    // What may go at once, and what ends a moment too late.
    let most = LIMIT * SECONDS * 103 / 100 + LIMIT / 10 + LANES as u64;
    // Others may want the machine as well.
    assert!(
        (LIMIT * SECONDS * 8 / 10..=most).contains(&total),
        "{counts:?}"
    );
    let fair = total / LANES as u64;
    assert!(
        counts.iter().all(|count| count.abs_diff(fair) <= fair / 4),
        "{counts:?}"
    );
    assert!(cpu < Duration::from_secs(1), "it spins: {cpu:?}");

    qmp.ask("block_set_io_throttle", iops(10 * LIMIT));
    let more: u64 = load(&mut client, Duration::from_secs(1)).iter().sum();
    assert!((2 * LIMIT..12 * LIMIT).contains(&more), "{more}");
    let shown = &qmp.ask("query-block", json!({}))[0]["inserted"]["iops"];
    assert_eq!(shown, 10 * LIMIT);
    qmp.ask("block_set_io_throttle", iops(0));
    let all: u64 = load(&mut client, Duration::from_secs(1)).iter().sum();
    assert!(all > 13 * LIMIT, "{all}");
    drop(client);
    backend.stop();
}

#[test]
fn what_waits_for_limits_is_done_when_they_change_or_the_ring_stops() {
    let rig = Rig::ploop_img("64M", "1M");
    let control = rig.folder.path().join("control");
    let option = format!("--control={}", control.display());
    let backend = rig.serve(&[&option, "--throttle=bps_wr=1"]);
    let mut client = Client::connect(backend.socket(), 2);
    let mut qmp = Qmp::connect(&control);
    let bytes = [7; 4096];
    let lane = &mut client.lanes[0];
    let write = |lane: &mut Lane| {
        for tag in 0..IN_FLIGHT {
            lane.write(tag as u64 * MIB, &bytes, tag);
        }
        // One is never too large. Reads and flushes do not fall under this limit.
        assert_eq!(lane.wait(1).len(), 1);
        lane.read(60 * MIB, 4096, IN_FLIGHT);
        assert_eq!(lane.wait(1), [(IN_FLIGHT, 0)]);
        lane.flush(IN_FLIGHT);
        assert_eq!(lane.wait(1), [(IN_FLIGHT, 0)]);
        assert_eq!(lane.wait_for(1, Duration::from_millis(300)), None);
    };
    write(lane);
    let engine = qmp.ask("query-engine", json!({}));
    assert_eq!(engine["queues"][0]["in-flight"], IN_FLIGHT - 1, "{engine}");
    qmp.ask("block_set_io_throttle", iops(0));
    let mut left = IN_FLIGHT - 1;
    while left > 0 {
        let ended = lane.wait(1);
        assert!(ended.iter().all(|(_, result)| *result == 0));
        left -= ended.len();
    }
    let mut limits = iops(0);
    limits["bps_wr"] = 1.into();
    qmp.ask("block_set_io_throttle", limits);
    write(lane);
    let start = Instant::now();
    // It is checked that the daemon ends in order.
    backend.stop();
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(client);
    let backend = rig.serve(&[]);
    let mut client = Client::connect(backend.socket(), 1);
    for tag in 0..IN_FLIGHT {
        client.lanes[0].read(tag as u64 * MIB, 4096, tag);
        assert_eq!(client.lanes[0].wait(1), [(tag, 0)]);
        assert_eq!(client.lanes[0].bytes(tag, 4096), bytes);
    }
    drop(client);
    backend.stop();
}
