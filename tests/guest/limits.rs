//! Limits on what a guest may do, as fio in the guest finds them.

use serde_json::json;

use crate::common::qmp::Qmp;
use crate::rig::Rig;

/// What each measurement takes, in seconds.
const SECONDS: u64 = 6;

/// Two jobs, each on a processor and so on a queue of its own, that want all they can get:
/// how many operations a second each has got, at a limit that a start, a command, and another
/// command have set.
const LOAD: &str = r"
    load() {
        fio --name=load --filename=/dev/vda --rw=randrw --bs=4k --iodepth=16 --numjobs=2 \
            --cpus_allowed=0,1 --cpus_allowed_policy=split --ioengine=libaio --direct=1 \
            --time_based --runtime=SECONDS --randrepeat=0 --norandommap --minimal \
            </dev/null >/tmp/fio
        job=0
        for rate in $(awk -F';' '{ print int($8 + $49) }' /tmp/fio); do
            report $1_$job $rate
            job=$((job + 1))
        done
    }
    report queues $(ls /sys/block/vda/mq | wc -l)
    load start
    meet_host more
    load command
    meet_host bytes
    load bytes
";

#[test]
fn a_guest_gets_what_it_may_and_its_queues_the_same() {
    let Some(rig) = Rig::new() else { return };
    let control = rig.path("control");
    let option = format!("--control={}", control.display());
    let backend = rig.serve(&[&option, "--throttle=iops=200"]);
    let script = LOAD.replace("SECONDS", &SECONDS.to_string());
    let mut guest = rig
        .guest(&script)
        .cpus(2)
        .disk(backend.socket(), ",num-queues=2")
        .boot();
    guest.wait_at("more");
    let mut qmp = Qmp::connect(&control);
    let mut set = |iops: u64, bps: u64| {
        let limits = json!({
            "id": "disk", "bps": bps, "bps_rd": 0, "bps_wr": 0,
            "iops": iops, "iops_rd": 0, "iops_wr": 0,
        });
        qmp.ask("block_set_io_throttle", limits);
    };
    set(400, 0);
    guest.go_on();
    guest.wait_at("bytes");
    set(0, 300 * 4096);
    guest.go_on();
    let outcome = guest.finish();
    assert_eq!(outcome.number("queues"), 2);
    for (name, limit) in [("start", 200), ("command", 400), ("bytes", 300)] {
        let rates = [0, 1].map(|job| outcome.number(&format!("{name}_{job}")));
        eprintln!("{name}: {rates:?} at {limit}");
        let sum: u64 = rates.iter().sum();
        // What a tenth of a second allows may go at once when a load begins.
        let most = limit * 103 / 100 + limit / 10 / SECONDS + 2;
        // Others may want the machine as well.
        assert!((limit * 7 / 10..=most).contains(&sum), "{name}: {rates:?}");
        let half = sum / 2;
        assert!(
            rates.iter().all(|rate| rate.abs_diff(half) <= half / 4),
            "{name}: {rates:?}"
        );
    }
    rig.close(backend);
}
