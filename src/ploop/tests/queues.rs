//! What queues have to do with each other: nothing (S24). When one may sleep, and how
//! much it has under way.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::*;
use crate::ploop::preempt;

/// Clusters of the disk that have their entries in one md page.
const PAGE: u64 = 1024;

/// A request takes fewer turns.
const TURNS: usize = 40;

fn write(rig: &Rig, start: u64, bytes: &[u8]) -> Command {
    let data = rig.segments(bytes);
    let start = Sector(start / 512);
    Command::Write { start, data }
}

/// A queue writes to a hole and its thread stops in the middle of that, at any point.
/// Everything goes on for another queue, in the same md page and in another one.
#[test]
fn a_queue_that_is_stuck_holds_up_no_other() {
    let mut had_ended = [0; 2];
    for (turns, page) in (0..TURNS).flat_map(|turns| [(turns, 0), (turns, 1)]) {
        let rig = Rig::new(2 * PAGE * CLUSTER);
        let mut stuck = rig.engine.queue().unwrap();
        let mut ended = Vec::new();
        let command = write(&rig, 0, &[1; 512]);
        stuck.push(Request { tag: 1, command });
        let mut go_on = |rig: &Rig, ended: &mut Vec<Done>| {
            stuck.submit();
            stuck.poll(ended);
            rig.turn();
        };
        for _ in 0..turns {
            go_on(&rig, &mut ended);
        }
        had_ended[usize::from(!ended.is_empty())] += 1;

        let (first, second) = (page * PAGE + 1, page * PAGE + 2);
        rig.write(first * CLUSTER, &[2; 512]).unwrap();
        rig.write(first * CLUSTER, &[3; 512]).unwrap();
        rig.write(second * CLUSTER, &[4; 512]).unwrap();
        rig.discard(first * CLUSTER, CLUSTER).unwrap();
        rig.flush().unwrap();
        assert_eq!(rig.read(first * CLUSTER, 512), [0; 512]);
        assert_eq!(rig.read(second * CLUSTER, 512), [4; 512]);

        for _ in 0..10 * TURNS {
            go_on(&rig, &mut ended);
        }
        assert_eq!(ended.len(), 1);
        assert_eq!(ended[0].result, Ok(()));
        assert_eq!(rig.read(0, 512), [1; 512]);
    }
    assert!(had_ended.iter().all(|count| *count > 0), "{had_ended:?}");
}

/// Whether something would wake the thread of the queue.
fn is_woken(queue: &Queue<SimDisk>) -> bool {
    use std::os::fd::BorrowedFd;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    let [inbox] = queue.fds()[..] else {
        panic!("a disk without a ring has no descriptor");
    };
    // SAFETY: of the queue's inbox, which lives as long as the queue.
    let inbox = unsafe { BorrowedFd::borrow_raw(inbox) };
    let mut fds = [PollFd::from_borrowed_fd(inbox, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
}

#[test]
fn a_queue_sleeps_only_if_there_is_nothing_to_do_and_is_woken_by_what_comes() {
    let rig = Rig::new(4 * CLUSTER);
    rig.write(0, &[1; 512]).unwrap();
    rig.flush().unwrap();
    // What a runner does without the disk.
    let discard = || {
        let ranges = smallvec![range(CLUSTER, CLUSTER)];
        rig.push(Command::Discard { ranges })
    };
    let queue = &rig.queues[0];
    let may_sleep = || queue.borrow_mut().may_sleep();
    assert!(may_sleep());
    assert!(!is_woken(&queue.borrow()));
    let done = discard();
    rig.poll_runners();
    assert!(is_woken(&queue.borrow()), "it slept");
    rig.poll_queue(0);
    assert_eq!(rig.ended(done), Some(Ok(())));
    assert!(may_sleep());
    assert!(!is_woken(&queue.borrow()));

    rig.poll_queue(0);
    let done = discard();
    rig.poll_runners();
    assert!(!is_woken(&queue.borrow()), "it looks by itself");
    assert!(!may_sleep(), "a message has come");
    rig.poll_queue(0);
    assert_eq!(rig.ended(done), Some(Ok(())));
    assert!(may_sleep());

    rig.flush().unwrap();
    assert!(may_sleep());
    let flush = rig.push(Command::Flush);
    assert!(!may_sleep(), "it has ended at once, and nobody knows");
    rig.poll_queue(0);
    assert_eq!(rig.ended(flush), Some(Ok(())));

    let data = rig.segments(&[0; 512]);
    let start = Sector(0);
    let read = rig.push(Command::Read { start, data });
    assert!(!may_sleep(), "nobody would tell of the end of the read");
    assert_eq!(rig.result(read), Ok(()));
    assert!(may_sleep());
}

/// An image over a raw base that has everything, with such clusters.
fn over_a_base(cluster: ClusterSize, clusters: u64) -> Rig {
    let disk = SimDisk::new(2, Medium::default(), 1);
    let size = Sector(clusters * cluster.bytes() / 512);
    disk.prepare(FileId(0), size.bytes() - 512, &[7; 512]);
    let header = Header::new(size, cluster).unwrap();
    disk.prepare(FileId(1), 0, &header.to_bytes());
    disk.set_len(FileId(1), header.geometry().data_start)
        .unwrap();
    let levels = vec![Level::Plain { size, cluster }, Level::Ploop];
    Rig::open_chain(&disk, levels, options())
}

/// How many parts runners have to do when a queue has started all that it may.
fn parts_begun(rig: &Rig, commands: impl IntoIterator<Item = Command>) -> usize {
    for command in commands {
        rig.push(command);
    }
    for _ in 0..100 {
        rig.poll_queue(0);
    }
    rig.engine.dispatched.load(Ordering::Relaxed)
}

/// One queue alone may have work for 16.25 MiB of the disk under way.
#[test]
fn what_runners_have_to_do_for_a_queue_is_bounded_by_what_it_costs() {
    const MIB: u64 = 1 << 20;
    // 64 clusters are a part, and each costs 4 KiB.
    let rig = Rig::new(70 * 64 * CLUSTER);
    let ranges = smallvec![range(0, 70 * 64 * CLUSTER)];
    assert_eq!(parts_begun(&rig, [Command::Discard { ranges }]), 65);
    // What stays allocated may have to be written.
    let rig = Rig::new(70 * 64 * CLUSTER);
    let ranges = smallvec![range(0, 70 * 64 * CLUSTER)];
    let unmap = false;
    let zero = Command::WriteZeroes { ranges, unmap };
    assert_eq!(parts_begun(&rig, [zero]), 16);

    // A copy is read and written.
    let cluster = ClusterSize::from_bytes(MIB).unwrap();
    let chain = || over_a_base(cluster, 32);
    let rig = chain();
    let writes = (0..32).map(|at| write(&rig, at * MIB, &[3; 4096]));
    assert_eq!(parts_begun(&rig, writes), 8);
    // So is one for either end of what is zeroed that is inside a cluster.
    for (from, to, parts) in [(512, MIB, 8), (0, 512, 8), (512, 1024, 4)] {
        let rig = chain();
        let zero = |at| {
            let ranges = smallvec![range(at * MIB + from, to - from)];
            Command::WriteZeroes {
                ranges,
                unmap: true,
            }
        };
        assert_eq!(parts_begun(&rig, (0..32).map(zero)), parts);
    }
    // Of which a discard makes none.
    let rig = chain();
    let discard = |at| {
        let ranges = smallvec![range(at * MIB + 512, 512)];
        Command::Discard { ranges }
    };
    assert_eq!(parts_begun(&rig, (0..32).map(discard)), 32);
}

#[test]
fn a_queue_has_room_for_more_behind_a_long_discard_and_not_behind_a_transfer() {
    let rig = Rig::new(200 * 64 * CLUSTER);
    let has_room = || rig.queues[0].borrow().has_room();
    let data = rig.segments(&vec![1; 6 << 20]);
    let start = Sector(0);
    let read = rig.push(Command::Read { start, data });
    assert!(!has_room());
    assert_eq!(rig.result(read), Ok(()));
    assert!(has_room());
    let discard = || {
        let ranges = smallvec![range(0, 200 * 64 * CLUSTER)];
        rig.push(Command::Discard { ranges })
    };
    let first = discard();
    assert!(has_room());
    let second = discard();
    assert!(!has_room());
    assert_eq!(rig.result(first), Ok(()));
    assert_eq!(rig.result(second), Ok(()));
    assert!(has_room());
}

/// So much is not begun at once: something is left to be begun by the next look. No part
/// needs the disk, as nobody has written there.
const MORE_THAN_A_TURN: usize = 6 << 20;

fn read_of_holes(rig: &Rig) -> u64 {
    let data = rig.segments(&vec![1; MORE_THAN_A_TURN]);
    let start = Sector(0);
    rig.push(Command::Read { start, data })
}

fn turn_often(rig: &Rig) {
    (0..100).for_each(|_| rig.turn());
}

#[test]
fn a_queue_on_hold_begins_no_more_of_what_was_pushed() {
    let rig = Rig::new(200 * 64 * CLUSTER);
    let read = read_of_holes(&rig);
    rig.queues[0].borrow_mut().hold(true);
    turn_often(&rig);
    assert_eq!(rig.ended(read), None);
    rig.queues[0].borrow_mut().hold(false);
    assert_eq!(rig.result(read), Ok(()));
}

/// Who suspends waits for what is under way: not for what is left of long requests.
#[test]
fn a_suspended_queue_begins_no_more_of_what_was_pushed() {
    let rig = Rig::new(200 * 64 * CLUSTER);
    let read = read_of_holes(&rig);
    let suspended = rig.engine.control(Control::Suspend);
    while !rig.engine.is_suspended() {
        rig.poll_md();
    }
    turn_often(&rig);
    assert_eq!(suspended.get(), Some(Ok(())));
    assert_eq!(rig.ended(read), None);
    rig.control(Control::Resume).unwrap();
    assert_eq!(rig.result(read), Ok(()));
}

/// For how long a drain may go on with what it need not drop: far longer than it takes.
const LONG: Duration = Duration::from_secs(60);

/// So many parts of zeroing may be under way at a time, of 1 MiB each.
const ZEROING_AT_ONCE: u64 = 16;

fn zeroing(rig: &Rig, parts: u64) -> u64 {
    let ranges = smallvec![range(0, parts << 20)];
    let unmap = false;
    rig.push(Command::WriteZeroes { ranges, unmap })
}

/// How the requests have ended when the queue was drained. Whenever it has looked, this
/// runs.
fn ends_of_drain(
    rig: &Rc<Rig>,
    grace: Duration,
    requests: &[u64],
    others: impl Fn(&Rig) + 'static,
) -> Vec<Result<(), EngineError>> {
    let shared = rig.clone();
    let _hook = preempt::each(move |at| {
        if at == "reaped" {
            others(&shared);
        }
    });
    let mut done = Vec::new();
    rig.queues[0].borrow_mut().drain(&mut done, grace);
    rig.done.borrow_mut().append(&mut done);
    let ended = |tag: &u64| rig.ended(*tag).expect("nothing is left by a drain");
    requests.iter().map(ended).collect()
}

/// Others may have been pushed behind it: what they were to come after has to be done.
#[test]
fn a_drain_goes_on_with_zeroing_for_a_while_and_drops_what_else_has_not_begun() {
    let undone = Err(EngineError::Undone);
    for (grace, is_suspended, expected) in [
        (LONG, false, Ok(())),
        (Duration::ZERO, false, undone),
        (LONG, true, undone),
    ] {
        let rig = Rc::new(Rig::new(200 * 64 * CLUSTER));
        let first = zeroing(&rig, 2 * ZEROING_AT_ONCE);
        let read = read_of_holes(&rig);
        let ranges = smallvec![range(0, 64 * CLUSTER)];
        let discard = rig.push(Command::Discard { ranges });
        if is_suspended {
            rig.engine.set_suspended(true);
        }
        let requests = [first, read, discard];
        let ends = ends_of_drain(&rig, grace, &requests, Rig::poll_runners);
        assert_eq!(ends, [expected, undone, undone], "{grace:?} {is_suspended}");
    }
}

/// What it asks the metadata thread for is that nothing waits for space.
#[test]
fn a_drain_waits_only_when_all_has_begun_that_may() {
    let rig = Rc::new(Rig::new(200 * 64 * CLUSTER));
    // What comes with the opening.
    rig.poll_md();
    let zeroing = zeroing(&rig, 2 * ZEROING_AT_ONCE);
    let begun = rig.engine.dispatched.load(Ordering::Relaxed);
    assert!((1..16).contains(&begun), "{begun} at once");
    let waited = Rc::new(Cell::new(None));
    let first = waited.clone();
    let ends = ends_of_drain(&rig, LONG, &[zeroing], move |rig| {
        if first.get().is_none() && !rig.engine.md.is_empty() {
            first.set(Some(rig.engine.dispatched.load(Ordering::Relaxed)));
        }
        if first.get().is_some() {
            rig.poll_runners();
        }
    });
    assert_eq!(ends, [Ok(())]);
    assert_eq!(waited.get(), Some(ZEROING_AT_ONCE as usize));
}
