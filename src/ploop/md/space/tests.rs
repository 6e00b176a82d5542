use super::super::super::pio::{Home, Work, ZeroKind};
use super::*;

const STEP: u32 = 16;

/// A space that somebody needs, on a host that was found full at `now`.
fn full(now: Duration) -> Space {
    let mut space = Space {
        needed: true,
        ..Space::default()
    };
    space.is_full(OnEnospc::Stop, now);
    space
}

/// By how many clusters the file is to grow, if it is; it then begins.
fn begin(space: &mut Space, now: Duration) -> Option<u32> {
    match space.step(0, 0, STEP, now) {
        SpaceStep::Nothing => None,
        SpaceStep::Extend(clusters) => {
            space.begin_extending(now);
            Some(clusters)
        }
    }
}

fn pio() -> Pio {
    let inbox = Arc::new(Inbox::new().unwrap());
    Pio {
        home: Home::new(inbox, 0, 0),
        work: Work::Zero {
            start: 0,
            len: 0,
            kind: ZeroKind::Discard,
        },
        last_try: false,
    }
}

#[test]
fn a_full_host_is_asked_for_little_and_not_at_once() {
    let mut space = full(Duration::ZERO);
    assert_eq!(begin(&mut space, Duration::ZERO), None);
    let _ = space.due(RETRY / 2);
    assert_eq!(begin(&mut space, RETRY / 2), None);
    let _ = space.due(RETRY);
    assert_eq!(begin(&mut space, RETRY), Some(1));
    assert!(!space.extension_failed(1, OnEnospc::Stop, RETRY));
    assert_eq!(begin(&mut space, RETRY), None);
}

#[test]
fn steps_grow_without_a_pause_on_a_host_that_has_space_again() {
    let mut space = full(Duration::ZERO);
    let _ = space.due(RETRY);
    for clusters in [1, 2, 4, 8] {
        assert!(space.announced);
        assert_eq!(begin(&mut space, RETRY), Some(clusters));
        let _ = space.extended(clusters, STEP);
    }
    assert!(!space.announced);
    let later = RETRY + FAST;
    assert_eq!(begin(&mut space, later), Some(STEP));
}

#[test]
fn a_step_that_is_too_large_is_not_tried_for_each_cluster() {
    let mut space = Space {
        needed: true,
        ..Space::default()
    };
    let now = Duration::ZERO;
    assert_eq!(begin(&mut space, now), Some(STEP));
    assert!(space.extension_failed(STEP, OnEnospc::Stop, now));
    space.begin_extending(now);
    let _ = space.extended(1, STEP);
    assert_eq!(begin(&mut space, now), Some(2));
    assert!(!space.announced, "nobody was refused");
}

#[test]
fn a_host_that_is_being_asked_is_not_said_to_have_space() {
    let mut space = full(Duration::ZERO);
    let _ = space.due(RETRY);
    assert_eq!(begin(&mut space, RETRY), Some(1));
    let _ = space.due(2 * RETRY);
    assert!(space.announced);
    space.extension_ended();
    let _ = space.due(3 * RETRY);
    assert!(!space.announced);
}

#[test]
fn the_host_is_said_to_be_full_though_who_waits_is_on_the_way() {
    let mut space = Space::default();
    space.park(pio(), false, OnEnospc::Stop, Duration::ZERO);
    assert_eq!(begin(&mut space, Duration::ZERO), Some(STEP));
    let on_the_way = space.extended(STEP, STEP);
    assert_eq!(on_the_way.len(), 1);
    let later = FAST;
    assert_eq!(begin(&mut space, later), Some(STEP));
    assert!(space.extension_failed(STEP, OnEnospc::Stop, later));
    space.begin_extending(later);
    assert!(!space.extension_failed(1, OnEnospc::Stop, later));
    assert!(!space.announced, "nobody waits");
    for pio in on_the_way {
        space.park(pio, false, OnEnospc::Stop, later);
    }
    let later = later + RETRY;
    let on_the_way = space.due(later);
    assert_eq!(on_the_way.len(), 1);
    assert_eq!(begin(&mut space, later), Some(1));
    assert!(!space.extension_failed(1, OnEnospc::Stop, later));
    assert!(space.announced);
}

#[test]
fn fast_writers_get_larger_steps() {
    let mut space = Space {
        needed: true,
        ..Space::default()
    };
    let mut now = Duration::ZERO;
    for factor in [1, 2, 4, 8, 8] {
        assert_eq!(begin(&mut space, now), Some(factor * STEP));
        let _ = space.extended(factor * STEP, STEP);
        now += FAST / 2;
    }
    now += FAST;
    assert_eq!(begin(&mut space, now), Some(STEP));
}
