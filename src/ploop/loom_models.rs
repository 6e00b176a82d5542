//! Models of what threads do to each other, checked by loom in every order that the
//! memory model allows. The cfg is not named `loom`, which some dependencies of the
//! tests take for themselves.
//!
//! Run with `RUSTFLAGS="--cfg ploop_loom" cargo test --release --lib loom_models`.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;

use super::bat::Bat;
use super::entry::{Entry, Place};
use super::epoch::Epochs;
use super::inbox::Inbox;
use super::llist::LockFreeList;
use crate::format::{GuestCluster, HostCluster};
use crate::storage::FileId;

const CLUSTER: GuestCluster = GuestCluster(0);
const PAGE: u32 = 0;

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

fn bat(entry: Entry) -> Arc<Bat> {
    let bat = Bat::holes(1, 1).unwrap();
    bat.load(GuestCluster(0), entry);
    Arc::new(bat)
}

fn mapped(host: u32) -> Entry {
    Entry::mapped(FileId(0), HostCluster(host))
}

/// As `Engine::change_and_tell` does it.
fn change(bat: &Bat, from: Entry, to: Entry) -> bool {
    let to = to.changed().after(from);
    if bat.replace(CLUSTER, from, to).is_err() {
        return false;
    }
    bat.mark_dirty(PAGE);
    let _ = bat.replace(CLUSTER, to, to.marked());
    true
}

#[test]
fn a_list_loses_nothing_and_keeps_the_order_of_each_pusher() {
    check(|| {
        let list = Arc::new(LockFreeList::default());
        let pusher = |base: u32| {
            let list = list.clone();
            thread::spawn(move || {
                list.push(base);
                list.push(base + 1);
            })
        };
        let pushers = [pusher(10), pusher(20)];
        let mut taken: Vec<u32> = list.take_all().collect();
        for pusher in pushers {
            pusher.join().unwrap();
        }
        taken.extend(list.take_all());
        assert_eq!(
            taken.iter().filter(|n| **n < 20).collect::<Vec<_>>(),
            [&10, &11]
        );
        assert_eq!(
            taken.iter().filter(|n| **n >= 20).collect::<Vec<_>>(),
            [&20, &21]
        );
    });
}

#[test]
fn a_reader_is_woken_for_a_message_that_it_did_not_see() {
    check(|| {
        let inbox = Arc::new(Inbox::new().unwrap());
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.post(1))
        };
        inbox.waker().arm();
        let seen = inbox.take_all().count();
        sender.join().unwrap();
        if seen == 0 {
            let mut counter = [0; 8];
            let woken = rustix::io::read(inbox.waker(), &mut counter);
            assert!(woken.is_ok(), "asleep, with a message in the inbox");
        }
    });
}

#[test]
fn a_reader_that_worked_meanwhile_is_woken_or_may_not_sleep() {
    check(|| {
        let inbox = Arc::new(Inbox::new().unwrap());
        inbox.waker().arm();
        let sender = {
            let inbox = inbox.clone();
            thread::spawn(move || inbox.post(1))
        };
        inbox.waker().disarm();
        let mut seen = inbox.take_all().count();
        while !inbox.may_sleep() {
            seen += inbox.take_all().count();
        }
        sender.join().unwrap();
        if seen == 0 {
            let mut counter = [0; 8];
            let woken = rustix::io::read(inbox.waker(), &mut counter);
            assert!(woken.is_ok(), "asleep, with a message in the inbox");
        }
    });
}

#[test]
fn a_look_up_sees_a_hole_or_a_cluster_that_is_ready() {
    check(|| {
        let bat = bat(Entry::HOLE);
        let zeroed = Arc::new(AtomicBool::new(false));
        let writer = {
            let (bat, zeroed) = (bat.clone(), zeroed.clone());
            thread::spawn(move || {
                zeroed.store(true, Ordering::Relaxed);
                change(&bat, Entry::HOLE, mapped(5))
            })
        };
        match bat.get(CLUSTER).place() {
            Place::Hole => {}
            Place::In(file, host) => {
                assert_eq!((file, host), (FileId(0), HostCluster(5)));
                assert!(zeroed.load(Ordering::Relaxed));
            }
        }
        assert!(writer.join().unwrap());
    });
}

#[test]
fn of_two_that_map_a_hole_one_wins() {
    check(|| {
        let bat = bat(Entry::HOLE);
        let other = {
            let bat = bat.clone();
            thread::spawn(move || change(&bat, Entry::HOLE, mapped(5)))
        };
        let mine = change(&bat, Entry::HOLE, mapped(6));
        let others = other.join().unwrap();
        assert!(mine != others);
        let place = Place::In(FileId(0), HostCluster(if mine { 6 } else { 5 }));
        assert_eq!(bat.get(CLUSTER).place(), place);
    });
}

#[test]
fn a_change_is_in_the_write_of_its_page_or_the_page_is_dirty_again() {
    check(|| {
        let bat = bat(Entry::HOLE);
        bat.mark_dirty(PAGE);
        let writer = {
            let bat = bat.clone();
            thread::spawn(move || change(&bat, Entry::HOLE, mapped(5)))
        };
        // A round of the metadata thread.
        bat.begin_writeback(PAGE);
        let on_disk = bat.get(CLUSTER);
        if on_disk.is_changed() {
            bat.set_written(CLUSTER, on_disk);
        }
        bat.end_writeback(PAGE, true);
        bat.set_synced(CLUSTER);

        assert!(writer.join().unwrap());
        let is_dirty = bat.dirty_pages().count() > 0;
        assert!(on_disk.place() != Place::Hole || is_dirty);
        let known_on_disk = !bat.get(CLUSTER).is_changed();
        assert!(!known_on_disk || on_disk.place() != Place::Hole);
    });
}

#[test]
fn who_relies_on_a_change_can_have_it_flushed_before_its_maker_marks_the_page() {
    check(|| {
        let bat = bat(Entry::HOLE);
        let maker = {
            let bat = bat.clone();
            thread::spawn(move || change(&bat, Entry::HOLE, mapped(5)))
        };
        // Another request sees the mapping, completes, and its client flushes.
        let entry = bat.get(CLUSTER);
        if entry.place() != Place::Hole {
            if entry.is_unmarked() {
                bat.mark_dirty(PAGE);
            }
            let is_dirty = bat.dirty_pages().count() > 0;
            assert!(is_dirty, "the flush would not write the page");
            bat.begin_writeback(PAGE);
            assert_eq!(bat.get(CLUSTER).place(), entry.place());
            bat.end_writeback(PAGE, true);
        }
        maker.join().unwrap();
    });
}

/// A host cluster: who reads and who reuses it at the same time is told by loom.
#[test]
fn a_cluster_is_not_used_again_while_io_that_knew_it_is_in_flight() {
    check(|| {
        let bat = bat(mapped(5));
        let epochs = Arc::new(Epochs::new(2));
        let content = Arc::new(UnsafeCell::new(0));
        let reader = {
            let (bat, epochs, content) = (bat.clone(), epochs.clone(), content.clone());
            thread::spawn(move || {
                let mut participant = epochs.join().unwrap();
                for _ in 0..2 {
                    let epoch = participant.enter();
                    if bat.get(CLUSTER).place() != Place::Hole {
                        // SAFETY: checked by loom, which is what the model is for.
                        content.with(|content| unsafe { assert_eq!(*content, 0) });
                    }
                    participant.leave(epoch);
                }
            })
        };
        assert!(change(&bat, mapped(5), Entry::HOLE));
        let removal = epochs.advance();
        if epochs.all_reached(removal) {
            // SAFETY: as above.
            content.with_mut(|content| unsafe { *content = 1 });
        }
        reader.join().unwrap();
    });
}

#[test]
fn what_overlaps_an_older_io_waits_for_the_newer_one_too() {
    check(|| {
        let bat = bat(mapped(5));
        let epochs = Arc::new(Epochs::new(1));
        let content = Arc::new(UnsafeCell::new(0));
        let reader = {
            let (bat, epochs, content) = (bat.clone(), epochs.clone(), content.clone());
            thread::spawn(move || {
                let mut participant = epochs.join().unwrap();
                let older = participant.enter();
                let newer = participant.enter();
                let sees_it = bat.get(CLUSTER).place() != Place::Hole;
                participant.leave(older);
                if sees_it {
                    // SAFETY: checked by loom.
                    content.with(|content| unsafe { assert_eq!(*content, 0) });
                }
                participant.leave(newer);
            })
        };
        assert!(change(&bat, mapped(5), Entry::HOLE));
        let removal = epochs.advance();
        if epochs.all_reached(removal) {
            // SAFETY: checked by loom.
            content.with_mut(|content| unsafe { *content = 1 });
        }
        reader.join().unwrap();
    });
}

#[test]
fn a_flush_that_is_skipped_had_nothing_to_do() {
    check(|| {
        let epochs = Arc::new(Epochs::new(1));
        let covered = Arc::new(AtomicU64::new(0));
        let written = Arc::new(AtomicBool::new(false));
        let stable = Arc::new(AtomicBool::new(false));
        let md = {
            let (epochs, covered) = (epochs.clone(), covered.clone());
            let (written, stable) = (written.clone(), stable.clone());
            thread::spawn(move || {
                // A round: count, sync, publish.
                let completed = epochs.completed();
                stable.store(written.load(Ordering::Acquire), Ordering::Relaxed);
                covered.store(completed, Ordering::Release);
            })
        };
        let mut participant = epochs.join().unwrap();
        written.store(true, Ordering::Release);
        participant.count_completed();
        if covered.load(Ordering::Acquire) == epochs.completed() {
            assert!(stable.load(Ordering::Relaxed));
        }
        md.join().unwrap();
    });
}
