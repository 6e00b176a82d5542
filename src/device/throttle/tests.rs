//! Limits in a time of their own, beside QEMU's algorithm.

use proptest::prelude::*;

use super::*;

const SECOND_PARTS: u64 = SECOND as u64;

fn limit(avg: u64, max: u64, max_length: u64) -> Limit {
    Limit {
        avg,
        max,
        max_length,
    }
}

fn iops(limit: Limit) -> Limits {
    Limits {
        iops: limit,
        ..Limits::default()
    }
}

/// When requests go that are always there, until the time is over.
fn departures(limits: &Limits, bytes: u64, until: u64) -> Vec<u64> {
    let buckets = Buckets::new(limits);
    let mut now = 0;
    let mut departures = Vec::new();
    loop {
        now = buckets.book(Kind::Write, bytes, now).max(now);
        if now >= until {
            return departures;
        }
        departures.push(now);
    }
}

/// One of QEMU's buckets, as `util/throttle.c` describes it: two levels that leak, and a
/// request that waits for as long as the larger excess takes.
struct Twin {
    limit: Limit,
    level: f64,
    burst_level: f64,
    at: f64,
}

impl Twin {
    fn new(limit: Limit) -> Self {
        Self {
            limit,
            level: 0.0,
            burst_level: 0.0,
            at: 0.0,
        }
    }

    fn leak(&mut self, now: f64) {
        let passed = now - self.at;
        self.at = now;
        self.level = (self.level - passed * self.limit.avg as f64).max(0.0);
        self.burst_level = (self.burst_level - passed * self.limit.max as f64).max(0.0);
    }

    fn wait(&self) -> f64 {
        let (avg, max) = (self.limit.avg as f64, self.limit.max as f64);
        let size = match self.limit.max {
            0 => avg / 10.0,
            _ => max * self.limit.max_length as f64,
        };
        // What has just leaked may be over by a rounding error, behind which the burst counts.
        let main = (self.level - size) / avg;
        if main > 1e-9 {
            return main;
        }
        if self.limit.max_length > 1 {
            return (self.burst_level - max / 10.0) / max;
        }
        0.0
    }

    /// When the next request goes that is there at once.
    fn go(&mut self, units: f64) -> f64 {
        loop {
            let wait = self.wait();
            if wait < 1e-9 {
                break;
            }
            self.leak(self.at + wait);
        }
        self.level += units;
        self.burst_level += units;
        self.at
    }
}

proptest! {
    #[test]
    fn requests_go_when_they_would_in_qemu(
        avg in 1_u64..100_000,
        factor in 0_u64..20,
        length in 1_u64..5,
        size in 0_u64..3,
        bytes in 512_u64..1 << 20,
    ) {
        let length = if factor == 0 { 1 } else { length };
        let of_bytes = limit(avg * 1000, avg * 1000 * factor, length);
        let limits = Limits { bps: of_bytes, ..Limits::default() };
        let of_operations = limit(avg, avg * factor, length);
        let sized = Limits { iops_size: size * 4096, ..iops(of_operations) };
        let units = if size == 0 { 1.0 } else { (bytes as f64 / (size * 4096) as f64).max(1.0) };
        for (limits, limit, units) in [(limits, of_bytes, bytes as f64), (sized, of_operations, units)] {
            limits.check().unwrap();
            let mut twin = Twin::new(limit);
            let until = 10 * SECOND_PARTS;
            for (number, departure) in departures(&limits, bytes, until).into_iter().take(500).enumerate() {
                let expected = twin.go(units);
                let found = departure as f64 / SECOND;
                prop_assert!((found - expected).abs() < 1e-4, "{number}: {found} for {expected}");
            }
        }
    }
}

#[test]
fn a_second_has_as_many_requests_as_its_limit() {
    for avg in [10, 1000, 300_000] {
        let times = departures(&iops(limit(avg, 0, 1)), 512, 10 * SECOND_PARTS);
        for second in 1..9 {
            let range = second * SECOND_PARTS..(second + 1) * SECOND_PARTS;
            let count = times.iter().filter(|time| range.contains(time)).count() as f64;
            let share = count / avg as f64;
            assert!(
                (0.97..1.03).contains(&share),
                "{count} in second {second} at {avg}"
            );
        }
    }
}

#[test]
fn a_burst_lasts_as_long_as_it_may() {
    let times = departures(&iops(limit(100, 1000, 3)), 512, 10 * SECOND_PARTS);
    let within = |from: f64, to: f64| {
        let range = (from * SECOND) as u64..(to * SECOND) as u64;
        times.iter().filter(|time| range.contains(time)).count()
    };
    assert!(
        (950..1050).contains(&within(1.0, 2.0)),
        "{}",
        within(1.0, 2.0)
    );
    assert!(
        (95..=105).contains(&within(5.0, 6.0)),
        "{}",
        within(5.0, 6.0)
    );
}

#[test]
fn limits_are_changed_one_by_one() {
    let limits: Limits = "iops=500,iops_max=2000,iops_max_length=10,iops_size=4096,bps_rd=7"
        .parse()
        .unwrap();
    let with =
        |changes: &[(&'static str, u64)]| limits.with(changes).map(|limits| limits.to_string());
    assert_eq!(with(&[]), Ok(limits.to_string()));
    for (changes, expected) in [
        (
            &[("bps_wr", 9)][..],
            "bps_rd=7,bps_wr=9,iops=500,iops_max=2000,iops_max_length=10,iops_size=4096",
        ),
        (&[("iops_max", 0)], "bps_rd=7,iops=500,iops_size=4096"),
        (&[("iops", 0)], "bps_rd=7"),
        (
            &[("iops", 0), ("iops_rd", 3)],
            "bps_rd=7,iops_rd=3,iops_size=4096",
        ),
        (&[("iops", 0), ("bps_rd", 0)], ""),
        // What is named stays, even where it cannot be.
        (
            &[("iops", 0), ("iops_max", 5)],
            "bps_rd=7,iops_max=5,iops_max_length=10",
        ),
    ] {
        assert_eq!(with(changes).as_deref(), Ok(expected));
    }
    assert_eq!(with(&[("iops_min", 0)]), Err("iops_min"));
    let mut all = Limits::default();
    assert!(Limits::NUMBERS.iter().all(|name| all.field(name).is_some()));
}

proptest! {
    #[test]
    fn limits_are_shown_as_they_are_given(
        names in prop::sample::subsequence(Limits::NUMBERS.to_vec(), 1..19),
        value in 2..1000_u64,
    ) {
        let mut limits = Limits::default();
        for name in &names {
            *limits.field(name).unwrap() = value;
        }
        let shown = limits.to_string();
        prop_assert_eq!(shown.split(',').count(), names.len());
        let again = shown.parse::<Limits>();
        prop_assert_eq!(again.ok(), limits.check().is_ok().then_some(limits));
    }
}

#[test]
fn queues_take_turns() {
    let throttle = Arc::new(Throttle::default());
    throttle.set(iops(limit(1000, 0, 1))).unwrap();
    let buckets = Arc::clone(throttle.lock().buckets.as_ref().unwrap());
    // Each books its next request when its last one goes.
    let mut next = [0; 4].map(|now| buckets.book(Kind::Read, 512, now));
    let mut counts = [0; 4];
    loop {
        let (queue, &now) = next
            .iter()
            .enumerate()
            .min_by_key(|(_, time)| **time)
            .unwrap();
        if now >= 5 * SECOND_PARTS {
            break;
        }
        // What may go at once is whoever's comes first.
        counts[queue] += u32::from(now >= SECOND_PARTS);
        next[queue] = buckets.book(Kind::Read, 512, now).max(now);
    }
    assert!(
        counts.iter().all(|count| (990..=1010).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn what_does_not_fall_under_a_limit_does_not_wait_for_it() {
    let throttle = Arc::new(Throttle::default());
    let mut valve = Valve::new(Arc::clone(&throttle));
    for request in 0..1000 {
        assert_eq!(valve.pass(Kind::Write, 4096, request), Some(request));
    }
    assert_eq!(valve.pause(), None);
    let limits = Limits {
        bps_wr: limit(1, 0, 1),
        ..Limits::default()
    };
    throttle.set(limits).unwrap();
    assert_eq!(
        valve.pass(Kind::Write, 1 << 30, 1),
        Some(1),
        "none is too large"
    );
    assert_eq!(valve.pass(Kind::Write, 512, 2), None);
    assert_eq!(valve.pass(Kind::Write, 512, 3), None);
    assert_eq!(valve.pass(Kind::Read, 512, 4), Some(4));
    assert_eq!(valve.next(), None);
    assert!(valve.pause().is_some_and(|pause| pause <= LOOK));
    // In their order, once there are no limits any more.
    throttle.set(Limits::default()).unwrap();
    assert_eq!(valve.pass(Kind::Write, 512, 5), None);
    let rest: Vec<_> = std::iter::from_fn(|| valve.next()).collect();
    assert_eq!(rest, [2, 3, 5]);
    assert_eq!(valve.pass(Kind::Write, 512, 6), Some(6));
}

#[test]
fn a_queue_that_stops_takes_what_waits() {
    let throttle = Arc::new(Throttle::default());
    throttle.set(iops(limit(1, 0, 1))).unwrap();
    let mut valve = Valve::new(throttle);
    assert_eq!(valve.pass(Kind::Read, 512, 1), Some(1));
    for request in 2..5 {
        assert_eq!(valve.pass(Kind::Read, 512, request), None);
    }
    assert_eq!(valve.pass(Kind::Write, 512, 5), None);
    assert_eq!(valve.pass(Kind::Read, 512, 6), None);
    assert_eq!(valve.take_all(), [2, 3, 4, 5, 6], "in their order");
    assert_eq!(valve.pause(), None);
}

#[test]
fn what_may_go_goes_in_the_order_in_which_it_came() {
    let throttle = Arc::new(Throttle::default());
    throttle.set(iops(limit(1, 0, 1))).unwrap();
    let mut valve = Valve::new(Arc::clone(&throttle));
    assert_eq!(valve.pass(Kind::Read, 512, 0), Some(0));
    let kinds = [Kind::Write, Kind::Read, Kind::Read, Kind::Write, Kind::Read];
    for (request, kind) in (1..).zip(kinds) {
        assert_eq!(valve.pass(kind, 512, request), None);
    }
    throttle.set(Limits::default()).unwrap();
    let all: Vec<_> = std::iter::from_fn(|| valve.next()).collect();
    assert_eq!(all, [1, 2, 3, 4, 5]);
}

#[test]
fn a_valve_that_is_opened_for_good_knows_no_limits_any_more() {
    let throttle = Arc::new(Throttle::default());
    throttle.set(iops(limit(1, 0, 1))).unwrap();
    let mut valve = Valve::new(Arc::clone(&throttle));
    assert_eq!(valve.pass(Kind::Read, 512, 1), Some(1));
    assert_eq!(valve.pass(Kind::Read, 512, 2), None);
    assert_eq!(valve.pass(Kind::Write, 512, 3), None);
    valve.open_for_good();
    throttle.set(iops(limit(2, 0, 1))).unwrap();
    assert_eq!(
        valve.pass(Kind::Read, 512, 4),
        None,
        "not before the others"
    );
    assert_eq!(valve.pause(), Some(Duration::ZERO));
    let all: Vec<_> = std::iter::from_fn(|| valve.next()).collect();
    assert_eq!(all, [2, 3, 4]);
    assert!(valve.is_open());
    assert_eq!(valve.pass(Kind::Read, 512, 5), Some(5));
}

#[test]
fn limits_are_read_from_text() {
    let limits: Limits =
        "iops=100,iops-max=200,iops_max_length=3,bps_rd=5,bps_wr=1.5k,iops_size=4KiB"
            .parse()
            .unwrap();
    let expected = Limits {
        iops: limit(100, 200, 3),
        bps_rd: limit(5, 0, 1),
        bps_wr: limit(1536, 0, 1),
        iops_size: 4096,
        ..Limits::default()
    };
    assert_eq!(limits, expected);
    for odd in [
        "",
        "iops",
        "iops=",
        "iops=x",
        "x=1",
        "iops=1,",
        "iops_max=1",
        "iops=-1",
        "iops=1k",
        "bps=1x",
        "bps=5,bps_max=9,bps_max_length=1k",
    ] {
        assert!(odd.parse::<Limits>().is_err(), "{odd}");
    }
}
