//! Copies from a lower delta that end just when a round of the metadata thread is
//! about to vouch for everything that has ended (I3, I4, I6).
//!
//! The lower delta has the first clusters, full of ones; space for copies is there,
//! and the length that covers it is stable, as most of the time.

use std::rc::Rc;

use super::*;
use crate::ploop::preempt;

/// The cluster whose copy is judged, written to from queue 1.
const COPIED: u64 = 0;
/// One of the top, for somebody else.
const OTHER: u64 = 3 * CLUSTER;

fn chain() -> Rc<Rig> {
    let disk = empty_image(Medium::default(), 2, 4 * CLUSTER);
    let base = Rig::open(&disk, 1, options());
    base.write(COPIED, &vec![1; CLUSTER as usize]).unwrap();
    base.control(Control::Close).unwrap();
    let rig = Rig::open(&disk, 2, options()).and_a_queue();
    rig.write(OTHER, &[9; 512]).unwrap();
    rig.flush().unwrap();
    Rc::new(rig)
}

/// While all of the engine but the thread that is preempted goes on.
fn others_turn(rig: &Rig) {
    rig.poll_queue(1);
    rig.poll_runners();
    rig.poll_md();
    rig.step_disk();
}

/// A runner has published a copy, for queue 0, and goes no further. Meanwhile queue 1
/// writes to the cluster, and hears of the end of that.
fn a_write_to_a_copy_just_published(is_flushed_by_client: bool) -> Rig {
    let rig = chain();
    let others = rig.clone();
    let _hook = preempt::once("published", move || {
        let tag = others.push_write_to(1, COPIED + 4096, &[7; 512]);
        assert_eq!(others.result_by(tag, others_turn), Ok(()));
        if is_flushed_by_client {
            let tag = others.push_to(1, Command::Flush);
            assert_eq!(others.result_by(tag, others_turn), Ok(()));
        }
        others.disk.power_off();
    });
    if !is_flushed_by_client {
        assert!(rig.engine.begin_write_through(true).is_some());
    }
    rig.push_write_to(0, COPIED, &[2; 512]);
    while rig.disk.is_powered() {
        rig.turn();
    }
    rig.cut()
}

#[test]
fn a_flush_covers_a_write_to_a_copy_that_was_published_just_now() {
    let rig = a_write_to_a_copy_just_published(true);
    assert_eq!(rig.read(COPIED + 4096, 512)[0], 7);
}

#[test]
fn a_write_through_write_to_a_copy_that_was_published_just_now_is_stable() {
    let rig = a_write_to_a_copy_just_published(false);
    assert_eq!(rig.read(COPIED + 4096, 512)[0], 7);
}

/// The metadata thread has heard what there was to hear, and goes no further. Meanwhile
/// the copy that is under way ends, and its client is told.
fn when_heard_the_copy_ends(rig: &Rc<Rig>) -> preempt::Hook {
    let copy = rig.push_write_to(1, COPIED, &[7; 512]);
    let others = rig.clone();
    preempt::once("heard", move || {
        assert_eq!(others.result_by(copy, others_turn), Ok(()));
    })
}

#[test]
fn a_round_does_not_count_a_copy_that_it_has_not_heard_of() {
    let rig = chain();
    // Somebody has something to flush, and does.
    rig.write(OTHER + 4096, &[3; 512]).unwrap();
    let _hook = when_heard_the_copy_ends(&rig);
    let flush = rig.push(Command::Flush);
    let md_turn = |rig: &Rig| {
        rig.poll_md();
        rig.step_disk();
        rig.poll_queue(0);
        rig.poll_queue(1);
    };
    assert_eq!(rig.result_by(flush, md_turn), Ok(()));
    // Now the client of the copy flushes, too.
    let flush = rig.push_to(1, Command::Flush);
    assert_eq!(rig.result_by(flush, md_turn), Ok(()));
    assert_eq!(rig.cut().read(COPIED, 512)[0], 7);
}

#[test]
fn a_suspension_makes_a_copy_stable_that_ends_just_then() {
    let rig = chain();
    let _hook = when_heard_the_copy_ends(&rig);
    let outcome = rig.engine.control(Control::Suspend);
    while outcome.get().is_none() {
        rig.poll_md();
        rig.step_disk();
    }
    assert_eq!(outcome.get(), Some(Ok(())));
    assert_eq!(rig.cut().read(COPIED, 512)[0], 7);
}
