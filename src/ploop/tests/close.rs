//! Requests that are under way when the engine is closed or changes its mode.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::ploop::preempt;
use crate::sim::disk::Faults;

/// All of the engine but the metadata thread goes on.
fn without_md(rig: &Rig) {
    rig.poll_queue(0);
    rig.poll_runners();
    rig.step_disk();
}

/// Of two queues the first goes on, and the metadata thread.
fn with_md(rig: &Rig) {
    without_md(rig);
    rig.poll_md();
}

#[test]
fn a_change_that_would_be_made_stable_after_the_end_fails() {
    let rig = Rig::new(4 * CLUSTER);
    rig.write(0, &vec![5; CLUSTER as usize]).unwrap();
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.flush().unwrap();
    // A runner has done it, and the queue has not heard of that yet.
    let ranges = smallvec![range(0, CLUSTER)];
    let late = rig.push(Command::Discard { ranges });
    rig.poll_runners();
    let outcome = rig.engine.control(Control::Close);
    while outcome.get().is_none() {
        rig.poll_md();
        rig.step_disk();
    }
    assert_eq!(outcome.get(), Some(Ok(())));
    assert_eq!(rig.result_by(late, without_md), Err(EngineError::Stopped));
}

#[test]
fn who_asks_a_closed_engine_is_told_so() {
    let rig = Rig::new(4 * CLUSTER);
    rig.control(Control::Close).unwrap();
    let stopped = Some(Err(EngineError::Stopped));
    assert_eq!(rig.engine.control(Control::Suspend).get(), stopped);
    let barrier = rig.engine.begin_write_through(true);
    assert_eq!(barrier.unwrap().get(), stopped);
}

/// A round that starts while the write cache is being turned off does not vouch for what
/// still ends in the old mode. A read that nobody looks after holds up the barrier's own.
#[test]
fn a_round_that_is_older_than_the_new_mode_does_not_end_its_barrier() {
    let rig = Rc::new(Rig::new(16 * CLUSTER).and_a_queue());
    rig.write(0, &[1; 512]).unwrap();
    rig.flush().unwrap();
    rig.write(4096, &[2; 512]).unwrap();
    let data = rig.segments(&[0; 512]);
    let start = Sector(0);
    rig.push_to(1, Command::Read { start, data });
    let flush = rig.push(Command::Flush);
    let others = rig.clone();
    let _hook = preempt::once("barrier opened", move || {
        others.poll_md();
        let late = others.push_write_to(0, CLUSTER, &[7; 512]);
        assert_eq!(others.result_by(late, without_md), Ok(()));
    });
    assert!(rig.engine.begin_write_through(true).is_some());
    assert_eq!(rig.result_by(flush, with_md), Ok(()));
    // In the new mode, and to a cluster that the disk maps.
    let stable = rig.push_write_to(0, 0, &[3; 512]);
    assert_eq!(rig.result_by(stable, with_md), Ok(()));
    assert_eq!(rig.cut().read(CLUSTER, 512), [7; 512]);
}

/// A full host has a write wait, which is given up in the last moment: everything is
/// flushed, and from now on nothing is tried any more.
#[test]
fn a_write_that_is_given_up_while_the_image_is_closed_ends() {
    let rig = Rig::new(4 * CLUSTER);
    let used = rig.disk.used_blocks();
    rig.disk
        .change_medium(|medium| medium.capacity = Some(used));
    let waiting = rig.push_write_to(0, 0, &[5; 512]);
    for _ in 0..100 {
        rig.turn();
    }
    assert!(rig.done.borrow().is_empty());
    let outcome = rig.engine.control(Control::Close);
    while !rig.disk.is_busy() {
        rig.poll_md();
    }
    while rig.disk.is_busy() {
        rig.disk.step();
    }
    rig.queues[0].borrow_mut().give_up_parked();
    rig.poll_md();
    assert_eq!(outcome.get(), Some(Ok(())));
    assert_eq!(
        rig.result_by(waiting, without_md),
        Err(EngineError::NoSpace)
    );
}

/// Opens an image with threads of its own, and does this beside them. Says also whether it
/// is marked as closed then.
fn with_threads<T>(act: impl FnOnce(Running<SimDisk>, &SimDisk) -> T) -> (T, bool) {
    let disk = empty_image(Medium::default(), 1, 4 * CLUSTER);
    let chain = Chain {
        levels: vec![Level::Ploop],
    };
    let running = Running::start(Engine::open(disk.clone(), &chain, options()).unwrap()).unwrap();
    let is_over = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Acquire) {
                if disk.is_busy() {
                    disk.step();
                }
                thread::yield_now();
            }
        });
        let result = act(running, &disk);
        is_over.store(true, Ordering::Release);
        result
    });
    (result, disk.read_live(FileId(0), 44, 4) == [0; 4])
}

/// Closes it on a disk with these faults.
fn closed_by_threads(faults: Faults) -> (Result<(), EngineError>, bool) {
    with_threads(|running, disk| {
        disk.change_medium(|medium| medium.faults = faults);
        running.close()
    })
}

/// It stays suspended for good, and nobody waits for an end that does not come.
#[test]
fn who_passes_an_image_on_whose_lock_is_lost_hears_so() {
    let (result, is_closed) = with_threads(|running, _| {
        running.engine().lose_lock();
        let (tell, told) = mpsc::channel();
        // Not one of the scope, which would wait for it.
        thread::spawn(move || tell.send(running.pass().map_err(|(left, _)| left.is_some())));
        told.recv_timeout(Duration::from_secs(20))
    });
    assert_eq!(result, Ok(Err(true)), "it is still there");
    assert!(!is_closed);
}

#[test]
fn who_closes_hears_whether_everything_is_stable() {
    assert_eq!(closed_by_threads(Faults::default()), (Ok(()), true));
    let faults = Faults {
        sync: 1.0,
        ..Faults::default()
    };
    let failed = Err(EngineError::SyncFailed);
    assert_eq!(closed_by_threads(faults), (failed, false));
}

#[test]
fn an_image_that_is_passed_on_has_everything_and_is_opened_at_once() {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    let before = rig.disk.live_len(FileId(0));
    rig.control(Control::Pass).unwrap();
    assert_eq!(rig.disk.live_len(FileId(0)), before, "it is not trimmed");
    let disk = rig.disk.clone();
    drop(rig);
    disk.kill();
    disk.restart();
    let rig = Rig::open(&disk, 1, options());
    assert!(!rig.engine.awaits_take_over());
    assert_eq!(rig.read(0, 512), [1; 512]);
    rig.write(CLUSTER, &[2; 512]).unwrap();
    rig.control(Control::Close).unwrap();
}

#[test]
fn an_image_that_cannot_be_passed_on_is_served_on() {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    let faults = |sync| {
        rig.disk.change_medium(|medium| medium.faults.sync = sync);
    };
    faults(1.0);
    assert_eq!(rig.control(Control::Pass), Err(EngineError::SyncFailed));
    faults(0.0);
    assert!(!rig.engine.is_suspended());
    assert_eq!(rig.read(0, 512), [1; 512]);
    rig.write(0, &[2; 512]).unwrap();
    assert_eq!(rig.read(0, 512), [2; 512]);
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
    assert_eq!(rig.control(Control::Pass), Err(EngineError::SyncFailed));
    assert_eq!(rig.read(0, 512), [2; 512]);
}

#[test]
fn an_image_that_is_handed_over_is_marked_and_trimmed() {
    for trims in [true, false] {
        let rig = Rig::new(16 * CLUSTER);
        rig.write(0, &[1; 512]).unwrap();
        let before = rig.disk.live_len(FileId(0));
        rig.control(Control::HandOver { trims }).unwrap();
        assert!(rig.disk.live_len(FileId(0)) < before);
        let disk = rig.disk.clone();
        drop(rig);
        disk.power_off();
        disk.restart();
        assert_eq!(disk.read_live(FileId(0), 44, 4), [0; 4], "it is stable");
        let rig = Rig::open(&disk, 1, options());
        assert!(!rig.engine.awaits_take_over());
        assert_eq!(rig.read(0, 512), [1; 512]);
        rig.write(CLUSTER, &[2; 512]).unwrap();
        rig.control(Control::HandOver { trims }).unwrap();
    }
}

/// Others believe the mark, so without it the image stays here.
#[test]
fn an_image_that_cannot_be_marked_is_served_on_as_one_in_use() {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    rig.flush().unwrap();
    let hand_over = Control::HandOver { trims: false };
    let outcome = rig.engine.control(hand_over);
    // The flush is well, and what follows it fails.
    rig.disk.change_medium(|medium| medium.faults.write = 1.0);
    while outcome.get().is_none() {
        rig.poll_md();
        rig.step_disk();
    }
    assert!(matches!(outcome.get(), Some(Err(EngineError::Io(_)))));
    rig.disk.change_medium(|medium| medium.faults.write = 0.0);
    assert!(!rig.engine.is_suspended());
    assert_ne!(rig.disk.read_live(FileId(0), 44, 4), [0; 4]);
    rig.write(0, &[2; 512]).unwrap();
    rig.flush().unwrap();
    rig.control(hand_over).unwrap();
    assert_eq!(rig.disk.read_live(FileId(0), 44, 4), [0; 4]);
}

const TRIMMED: Control = Control::HandOver { trims: true };

/// An image with one cluster whose trimmed hand-over has failed, on a medium that was also changed
/// so meanwhile, given the length that the file had before; and that length.
fn hand_over_in_vain(change: impl FnOnce(&mut Medium, u64)) -> (Rig, u64) {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    rig.flush().unwrap();
    let before = rig.disk.live_len(FileId(0));
    let outcome = rig.engine.control(TRIMMED);
    rig.disk.change_medium(|medium| {
        medium.faults.write = 1.0;
        change(medium, before);
    });
    while outcome.get().is_none() {
        rig.poll_md();
        rig.step_disk();
    }
    assert!(matches!(outcome.get(), Some(Err(EngineError::Io(_)))));
    rig.disk.change_medium(|medium| medium.faults.write = 0.0);
    (rig, before)
}

/// A sync makes the length stable that the file has, not the one that it had before.
#[test]
fn an_image_that_was_trimmed_and_is_served_on_is_as_long_as_before() {
    let (rig, before) = hand_over_in_vain(|_, _| {});
    assert_eq!(rig.disk.live_len(FileId(0)), before);
    rig.write(CLUSTER, &[2; 512]).unwrap();
    rig.flush().unwrap();
    rig.control(TRIMMED).unwrap();
    assert!(rig.disk.live_len(FileId(0)) < before);
}

/// Nothing that is behind its end could be made stable any more, and nobody is told that it was.
#[test]
fn an_image_that_stays_shorter_than_it_was_counts_as_one_that_cannot_be_synced() {
    let (rig, before) = hand_over_in_vain(|medium, before| medium.len_max = before - 1);
    rig.disk.change_medium(|medium| medium.len_max = u64::MAX);
    assert!(rig.disk.live_len(FileId(0)) < before);
    assert!(!rig.engine.is_suspended());
    assert_eq!(rig.read(0, 512), [1; 512]);
    rig.write(0, &[2; 512]).unwrap();
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
    assert_eq!(rig.control(TRIMMED), Err(EngineError::SyncFailed));
}

#[test]
fn an_image_whose_mark_cannot_be_synced_stays_and_nothing_counts_as_stable() {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    rig.disk.change_medium(|medium| medium.faults.sync = 1.0);
    let hand_over = Control::HandOver { trims: true };
    assert_eq!(rig.control(hand_over), Err(EngineError::SyncFailed));
    rig.disk.change_medium(|medium| medium.faults.sync = 0.0);
    assert!(!rig.engine.is_suspended());
    assert_eq!(rig.read(0, 512), [1; 512]);
    rig.write(0, &[2; 512]).unwrap();
    assert_eq!(rig.control(hand_over), Err(EngineError::SyncFailed));
    assert_ne!(rig.disk.read_live(FileId(0), 44, 4), [0; 4]);
}

/// Whoever drops it, and wherever: nobody waits for it in vain.
#[test]
fn a_part_that_is_dropped_has_ended() {
    use crate::ploop::inbox::Inbox;
    use crate::ploop::pio::{Home, QueueMessage};
    let inbox = Arc::new(Inbox::new().unwrap());
    let home = Home::new(inbox.clone(), 3, 4096);
    assert!(home.is_of(&inbox) && inbox.is_empty());
    drop(home);
    let told: Vec<_> = inbox.take_all().collect();
    let [
        QueueMessage::PioDone {
            request,
            charge,
            result,
        },
    ] = told[..]
    else {
        panic!("{} messages", told.len());
    };
    assert_eq!((request, charge), (3, 4096));
    assert_eq!(result, Err(EngineError::Stopped));
}
