//! Models of what threads do to each other, checked by loom in every order that the
//! memory model allows. The cfg is not named `loom`, which some dependencies of the
//! tests take for themselves.
//!
//! The models call the engine itself. Some of them are checked once more with the rule
//! broken that they are about: then they have to fail.
//!
//! Run with `RUSTFLAGS="--cfg ploop_loom" cargo test --lib loom_models`.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::EngineError;
use super::alloc::Allocator;
use super::bat::{Bat, BatSize};
use super::control::Control;
use super::engine::{Engine, Shared};
use super::entry::{Entry, Place};
use super::epoch::Epochs;
use super::inbox::Inbox;
use super::levels::LevelMap;
use super::llist::LockFreeList;
use super::options::Options;
use super::rule::{self, Rule};
use super::take_over::Beginning;
use crate::format::{ClusterSize, GuestCluster, Header, HostCluster, Sector};
use crate::storage::{Completion, Disk, FileId, Io, Op};

const CLUSTER: GuestCluster = GuestCluster(0);
const PAGE: u32 = 0;
const HOST: HostCluster = HostCluster(5);

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

fn mapped(host: HostCluster) -> Entry {
    Entry::mapped(FileId(0), host)
}

/// An engine for a disk of one cluster.
fn engine(entry: Entry) -> Arc<Engine<NoDisk>> {
    let header = Header::new(Sector(64), ClusterSize::MIN).unwrap();
    let level = LevelMap {
        geometry: *header.geometry(),
        plain: false,
    };
    let size = BatSize {
        entries: 1,
        pages: 1,
    };
    let bat = Bat::holes(size, size).unwrap();
    bat.load(CLUSTER, entry);
    let shared = Shared {
        bitmaps: Vec::new(),
        levels: vec![level],
        bat,
        alloc: Allocator::new(HOST, HOST),
        beginning: Beginning::Begun(None),
    };
    let options = Options {
        runners: 1,
        max_queues: 1,
        ..Options::default()
    };
    Arc::new(Engine::new(NoDisk, shared, options).unwrap())
}

/// Of which nothing is asked: the models are about memory.
struct NoDisk;

impl Io for NoDisk {
    fn queue(&mut self, _: u64, op: Op) -> Result<(), Op> {
        Err(op)
    }

    fn submit(&mut self) {}

    fn reap(&mut self, _: &mut Vec<Completion>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn completion_fd(&self) -> Option<RawFd> {
        None
    }
}

impl Disk for NoDisk {
    type Io = Self;

    fn open_io(&self, _: u32) -> io::Result<Self> {
        Ok(Self)
    }

    fn len(&self, _: FileId) -> io::Result<u64> {
        Ok(0)
    }

    fn set_len(&self, _: FileId, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_exact_at(&self, _: FileId, _: &mut [u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_all_at(&self, _: FileId, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn allocate(&self, _: FileId, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self, _: FileId) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn zero_granularity(&self) -> u32 {
        4096
    }
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
        let engine = engine(Entry::HOLE);
        let zeroed = Arc::new(AtomicBool::new(false));
        let writer = {
            let (engine, zeroed) = (engine.clone(), zeroed.clone());
            thread::spawn(move || {
                zeroed.store(true, Ordering::Relaxed);
                engine.change(CLUSTER, Entry::HOLE, mapped(HOST))
            })
        };
        match engine.bat.get(CLUSTER).place() {
            Place::Hole => {}
            Place::In(file, host) => {
                assert_eq!((file, host), (FileId(0), HOST));
                assert!(zeroed.load(Ordering::Relaxed));
            }
        }
        assert!(writer.join().unwrap());
    });
}

#[test]
fn of_two_that_map_a_hole_one_wins() {
    check(|| {
        let engine = engine(Entry::HOLE);
        let other = {
            let engine = engine.clone();
            thread::spawn(move || engine.change(CLUSTER, Entry::HOLE, mapped(HOST)))
        };
        let mine = engine.change(CLUSTER, Entry::HOLE, mapped(HostCluster(6)));
        let others = other.join().unwrap();
        assert!(mine != others);
        let host = if mine { HostCluster(6) } else { HOST };
        assert_eq!(engine.bat.get(CLUSTER).place(), Place::In(FileId(0), host));
    });
}

#[test]
fn a_change_is_in_the_write_of_its_page_or_the_page_is_dirty_again() {
    check(|| {
        let engine = engine(Entry::HOLE);
        let bat = &engine.bat;
        bat.mark_dirty(PAGE);
        let writer = {
            let engine = engine.clone();
            thread::spawn(move || engine.change(CLUSTER, Entry::HOLE, mapped(HOST)))
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

/// Another request sees a mapping, completes, and its client flushes, before the maker of
/// the mapping has come to marking the page.
fn relying() {
    let engine = engine(Entry::HOLE);
    let maker = {
        let engine = engine.clone();
        thread::spawn(move || engine.change(CLUSTER, Entry::HOLE, mapped(HOST)))
    };
    let entry = engine.rely_on(CLUSTER);
    if entry.place() != Place::Hole {
        let bat = &engine.bat;
        let is_dirty = bat.dirty_pages().count() > 0;
        assert!(is_dirty, "the flush would not write the page");
        bat.begin_writeback(PAGE);
        assert_eq!(bat.get(CLUSTER).place(), entry.place());
        bat.end_writeback(PAGE, true);
    }
    maker.join().unwrap();
}

#[test]
fn who_relies_on_a_change_can_have_it_flushed_before_its_maker_marks_the_page() {
    check(relying);
}

#[test]
#[should_panic(expected = "the flush would not write the page")]
fn who_relies_on_a_change_and_does_not_mark_the_page_is_noticed() {
    rule::broken(Rule::MarkForOthers, || check(relying));
}

/// The metadata thread takes the mark of a page that has lost a cluster.
fn taking_a_mark() {
    let engine = engine(mapped(HOST));
    let changer = {
        let engine = engine.clone();
        thread::spawn(move || engine.unmap(CLUSTER, mapped(HOST), HOST))
    };
    // As a round does it: the marks, then the messages, then the entries.
    if engine.bat.dirty_pages().count() > 0 {
        engine.bat.begin_writeback(PAGE);
        let told = engine.md.take_all().count();
        assert_eq!(
            told, 1,
            "a cluster whose removal is written was not told of"
        );
        assert_eq!(engine.bat.get(CLUSTER).place(), Place::Hole);
        engine.bat.end_writeback(PAGE, true);
    }
    assert!(changer.join().unwrap());
}

#[test]
fn who_takes_the_mark_of_a_page_has_been_told_what_it_lost() {
    check(taking_a_mark);
}

#[test]
#[should_panic(expected = "was not told of")]
fn who_marks_a_page_before_telling_what_it_lost_is_noticed() {
    rule::broken(Rule::TellBeforeMark, || check(taking_a_mark));
}

/// A host cluster: who reads and who reuses it at the same time is told by loom.
#[test]
fn a_cluster_is_not_used_again_while_io_that_knew_it_is_in_flight() {
    check(|| {
        let engine = engine(mapped(HOST));
        let content = Arc::new(UnsafeCell::new(0));
        let reader = {
            let (engine, content) = (engine.clone(), content.clone());
            thread::spawn(move || {
                let mut participant = engine.epochs.join().unwrap();
                for _ in 0..2 {
                    let epoch = participant.enter();
                    if engine.bat.get(CLUSTER).place() != Place::Hole {
                        // SAFETY: checked by loom, which is what the model is for.
                        content.with(|content| unsafe { assert_eq!(*content, 0) });
                    }
                    participant.leave(epoch);
                }
            })
        };
        assert!(engine.unmap(CLUSTER, mapped(HOST), HOST));
        let removal = engine.epochs.advance();
        if engine.epochs.all_reached(removal) {
            // SAFETY: as above.
            content.with_mut(|content| unsafe { *content = 1 });
        }
        reader.join().unwrap();
    });
}

/// A larger BAT goes where there is a free cluster: who looks through the map when older
/// I/O is over finds it there, or it was not given out.
#[test]
fn a_cluster_where_the_bat_goes_is_in_the_map_or_was_not_given_out() {
    check(|| {
        let engine = engine(Entry::HOLE);
        let end = HostCluster(HOST.0 + 1);
        engine.alloc().extend(end.0);
        let taker = {
            let engine = engine.clone();
            thread::spawn(move || {
                let mut participant = engine.epochs.join().unwrap();
                let epoch = participant.enter();
                let taken = engine.alloc().take();
                if let Some(host) = taken {
                    assert!(engine.change(CLUSTER, Entry::HOLE, mapped(host)));
                }
                participant.leave(epoch);
                taken
            })
        };
        engine.alloc().keep_below(end);
        let epoch = engine.epochs.advance();
        let is_over = engine.epochs.all_reached(epoch);
        let found = engine.bat.get(CLUSTER).place();
        let taken = taker.join().unwrap();
        assert!(!is_over || taken.is_none() || found != Place::Hole);
        assert_eq!(engine.alloc().take(), None);
    });
}

#[test]
fn what_overlaps_an_older_io_waits_for_the_newer_one_too() {
    check(|| {
        let engine = engine(mapped(HOST));
        let epochs = Arc::new(Epochs::new(1));
        let content = Arc::new(UnsafeCell::new(0));
        let reader = {
            let (engine, epochs, content) = (engine.clone(), epochs.clone(), content.clone());
            thread::spawn(move || {
                let mut participant = epochs.join().unwrap();
                let older = participant.enter();
                let newer = participant.enter();
                let sees_it = engine.bat.get(CLUSTER).place() != Place::Hole;
                participant.leave(older);
                if sees_it {
                    // SAFETY: checked by loom.
                    content.with(|content| unsafe { assert_eq!(*content, 0) });
                }
                participant.leave(newer);
            })
        };
        assert!(engine.unmap(CLUSTER, mapped(HOST), HOST));
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
        let engine = engine(Entry::HOLE);
        let written = Arc::new(AtomicBool::new(false));
        let stable = Arc::new(AtomicBool::new(false));
        let md = {
            let engine = engine.clone();
            let (written, stable) = (written.clone(), stable.clone());
            thread::spawn(move || {
                // A round: count, sync, publish.
                let completed = engine.epochs.completed();
                stable.store(written.load(Ordering::Acquire), Ordering::Relaxed);
                engine.set_covered(completed);
            })
        };
        let mut participant = engine.epochs.join().unwrap();
        written.store(true, Ordering::Release);
        participant.count_completed();
        if engine.is_covered() {
            assert!(stable.load(Ordering::Relaxed));
        }
        md.join().unwrap();
    });
}

#[test]
fn who_asks_while_the_metadata_thread_ends_is_answered() {
    check(|| {
        let engine = engine(Entry::HOLE);
        let md = {
            let engine = engine.clone();
            thread::spawn(move || engine.end_md())
        };
        let outcome = engine.control(Control::Suspend);
        md.join().unwrap();
        assert_eq!(outcome.get(), Some(Err(EngineError::Stopped)));
    });
}

/// A stable write loses, by its own sync, what a sync that is under way is to cover.
fn losing_beside_a_sync() {
    let engine = engine(mapped(HOST));
    let is_lost = Arc::new(AtomicBool::new(false));
    let writer = {
        let (engine, is_lost) = (engine.clone(), is_lost.clone());
        thread::spawn(move || {
            for _ in 0..2 {
                let generation = engine.begin_stable_write();
                is_lost.store(true, Ordering::SeqCst);
                engine.set_sync_failed("a stable write");
                engine.end_stable_write(generation);
            }
        })
    };
    // What the sync of the metadata thread finds when it ends.
    let has_lost = is_lost.load(Ordering::SeqCst);
    engine.stable_writes.advance();
    let waits = !engine.stable_writes.is_old_over() && rule::kept(Rule::StableWritesHoldSync);
    let is_counted = !waits && !engine.has_sync_failed();
    assert!(!(is_counted && has_lost), "a sync counted what was lost");
    writer.join().unwrap();
    if waits {
        assert!(engine.stable_writes.is_old_over());
        let told = engine.md.take_all().count();
        assert!(told > 0, "the metadata thread sleeps for ever");
    }
}

#[test]
fn no_sync_counts_what_a_stable_write_has_lost() {
    check(losing_beside_a_sync);
}

#[test]
#[should_panic(expected = "a sync counted what was lost")]
fn who_counts_a_sync_beside_a_stable_write_is_noticed() {
    rule::broken(Rule::StableWritesHoldSync, || check(losing_beside_a_sync));
}
