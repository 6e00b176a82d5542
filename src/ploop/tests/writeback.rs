//! When and how the pages of the BAT are written.

use super::*;
use crate::ploop::bat::{Bat, BatSize};
use crate::ploop::preempt;

/// One cluster of each of so many md pages is on the disk.
const PAGES: u64 = 5;

/// Clusters of the disk that have their entries in one md page.
const PAGE: u64 = 1024;

/// Longer than a changed page waits.
const DELAY: usize = 1_500;

/// An engine whose file is long enough for all that follows, which is stable.
fn rig() -> Rig {
    let rig = Rig::new(PAGES * PAGE * CLUSTER);
    rig.write(CLUSTER, &[1; 512]).unwrap();
    rig.flush().unwrap();
    rig.disk.start_trace();
    rig
}

/// Writes to a hole whose entry is in that md page.
fn change(rig: &Rig, page: u64) {
    rig.write(page * PAGE * CLUSTER, &[2; 512]).unwrap();
}

fn turns(rig: &Rig, count: usize) {
    for _ in 0..count {
        rig.turn();
    }
}

/// What was done to the disk since then: the writes of md pages, in the order in which
/// they were started, and how many syncs.
fn writes_and_syncs(rig: &Rig) -> (Vec<String>, usize) {
    let trace = rig.disk.take_trace();
    rig.disk.start_trace();
    let started = || trace.iter().filter_map(|line| line.split_once(" starts "));
    let data_start = rig.engine.geometry().data_start;
    let page_write = |(_, op): (&str, &str)| {
        let (_, range) = op.split_once("write file 0 ")?;
        let range = range.split(' ').next()?;
        let offset = range.trim_start_matches("0x").split('+').next()?;
        let offset = u64::from_str_radix(offset, 16).ok()?;
        (offset < data_start).then(|| range.to_owned())
    };
    let syncs = trace.iter().filter(|line| line.contains("Sync")).count();
    (started().filter_map(page_write).collect(), syncs)
}

#[test]
fn pages_are_written_later_neighbours_in_one_and_without_a_sync() {
    let rig = rig();
    for page in [1, 3, 0] {
        change(&rig, page);
    }
    assert_eq!(writes_and_syncs(&rig), (vec![], 0), "they wait");
    turns(&rig, DELAY);
    let pages = ["0x0+0x2000", "0x3000+0x1000"].map(String::from);
    assert_eq!(writes_and_syncs(&rig), (pages.into(), 0));
    turns(&rig, DELAY);
    assert_eq!(writes_and_syncs(&rig), (vec![], 0), "they are clean");
}

#[test]
fn pages_that_somebody_waits_for_are_written_first() {
    let rig = rig();
    for page in [0, 2, 4] {
        change(&rig, page);
    }
    rig.engine.bat.mark_urgent(2);
    rig.flush().unwrap();
    let pages = ["0x2000+0x1000", "0x0+0x1000", "0x4000+0x1000"].map(String::from);
    assert_eq!(writes_and_syncs(&rig), (pages.into(), 1));
}

#[test]
fn every_dirty_page_of_a_large_disk_is_found() {
    const PAGES: u32 = 200;
    let size = BatSize {
        entries: PAGES * 1024,
        pages: PAGES,
    };
    let bat = Bat::holes(size, size).unwrap();
    let dirty = || bat.dirty_pages().collect::<Vec<_>>();
    assert!(dirty().is_empty());
    let pages = [0, 1, 63, 64, 65, 130, PAGES - 1];
    for page in pages.into_iter().rev() {
        assert!(bat.mark_dirty(page));
    }
    assert_eq!(dirty(), pages);
    assert!(!bat.mark_dirty(64));
    bat.begin_writeback(64);
    assert!(!dirty().contains(&64));
    bat.end_writeback(64, false);
    assert_eq!(dirty(), pages);
}

#[test]
fn the_thread_is_not_called_for_nothing() {
    let rig = rig();
    turns(&rig, DELAY);
    let next_call = || rig.md.borrow_mut().poll(rig.now.get());
    assert_eq!(next_call(), None);
    change(&rig, 1);
    let delay = rig.engine.options.writeback_delay;
    let due = next_call().expect("a page is dirty");
    assert!(Duration::ZERO < due && due <= delay, "{due:?}");
    // What is under way does not tell of its end here.
    rig.now.set(rig.now.get() + delay);
    assert_eq!(next_call(), Some(Duration::ZERO));
    turns(&rig, DELAY);
    assert_eq!(next_call(), None);
}

#[test]
fn an_urgent_page_does_not_wait_for_its_delay_and_the_others_do() {
    let rig = rig();
    for page in [0, 2] {
        change(&rig, page);
    }
    rig.engine.bat.mark_urgent(2);
    turns(&rig, 100);
    let pages = vec!["0x2000+0x1000".to_owned()];
    assert_eq!(writes_and_syncs(&rig), (pages, 0));
}

#[test]
fn clusters_on_their_way_back_hurry_no_page_while_there_are_others() {
    let rig = rig();
    rig.discard(CLUSTER, CLUSTER).unwrap();
    for page in [2, 4] {
        change(&rig, page);
    }
    assert!(rig.engine.alloc().available() > rig.engine.options.low_water);
    rig.engine.bat.mark_urgent(2);
    turns(&rig, 100);
    let pages = vec!["0x2000+0x1000".to_owned()];
    assert_eq!(writes_and_syncs(&rig), (pages, 0));
}

#[test]
fn where_space_is_short_the_next_write_of_a_page_brings_clusters_back() {
    let rig = rig();
    // The file grows no more.
    rig.disk
        .change_medium(|medium| medium.faults.allocate = 1.0);
    while rig.engine.alloc().available() > rig.engine.options.low_water {
        rig.engine.alloc().take();
    }
    let before = rig.engine.alloc().available();
    rig.discard(CLUSTER, CLUSTER).unwrap();
    change(&rig, 2);
    rig.engine.bat.mark_urgent(2);
    turns(&rig, 100);
    let pages = ["0x2000+0x1000", "0x0+0x1000"].map(String::from);
    assert_eq!(writes_and_syncs(&rig), (pages.into(), 1));
    assert_eq!(
        rig.engine.alloc().available(),
        before,
        "one goes, one comes"
    );
}

/// A round for one page, for which nobody waits, ends with a sync, because space became
/// short while the page was being written. A flush cannot count on that sync.
#[test]
fn the_sync_of_a_round_that_leaves_pages_out_is_no_flush() {
    let rig = std::rc::Rc::new(rig().and_a_queue());
    rig.discard(CLUSTER, CLUSTER).unwrap();
    turns(&rig, DELAY / 3);
    // Its page is due later, and is no neighbour of that of the discard.
    change(&rig, 2);
    // So that space stays short.
    rig.disk
        .change_medium(|medium| medium.faults.allocate = 1.0);
    let others = rig.clone();
    let has_begun = std::rc::Rc::new(Cell::new(false));
    let begins = has_begun.clone();
    let _hook = preempt::once("counted", move || {
        // Under way for long: its end is not heard of.
        others.push_write_to(1, 10 * CLUSTER, &vec![3; 6 * CLUSTER as usize]);
        begins.set(true);
    });
    let without_queue_1 = |rig: &Rig| {
        rig.poll_queue(0);
        rig.poll_md();
        rig.step_disk();
    };
    while !has_begun.get() {
        without_queue_1(&rig);
    }
    for _ in 0..100 {
        without_queue_1(&rig);
    }
    let flush = rig.push(Command::Flush);
    assert_eq!(rig.result_by(flush, without_queue_1), Ok(()));
    assert_eq!(rig.cut().read(2 * PAGE * CLUSTER, 512)[0], 2);
}
