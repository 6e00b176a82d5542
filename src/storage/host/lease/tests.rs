//! What is begun while a lock is there, in doubt, lost, and not looked after.

use std::sync::mpsc::sync_channel;
use std::thread;

use super::*;
use crate::storage::host::{Aio, Cache, HostDisk, HostFile, HostIo, HostOptions};
use crate::storage::{AlignedBuf, Buffer, Completion, Disk, FileId, Io, Op, ZeroMode};

const BLOCK: usize = 4096;
const FILE: FileId = FileId(0);

struct Rig {
    disk: HostDisk,
    lease: Arc<Lease>,
    path: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

/// A disk of one file, as if it lay on a server.
fn rig(aio: Aio) -> Rig {
    let target = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let folder = tempfile::tempdir_in(target).expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, vec![1; 16 * BLOCK]).expect("write");
    let file = File::options().read(true).write(true).open(&path);
    let file = HostFile {
        file: file.expect("open"),
        path: path.clone(),
        writable: true,
    };
    let options = HostOptions {
        cache: Cache::None,
        aio,
    };
    let lease = Arc::new(Lease::new().expect("a lease"));
    let disk = HostDisk::pretend_leased(vec![file], options, &lease).expect("a disk");
    Rig {
        disk,
        lease,
        path,
        _folder: folder,
    }
}

fn write(block: u64, byte: u8) -> Op {
    Op::Write {
        file: FILE,
        offset: block * BLOCK as u64,
        buffer: Buffer::Owned(AlignedBuf::from_slice(BLOCK, &[byte; BLOCK])),
        dsync: false,
    }
}

/// A file that has gone would look like a lost lock.
#[test]
fn no_file_goes_where_a_server_may_take_locks_away() {
    assert!(!rig(Aio::Psync).disk.can_retire());
    let file = tempfile::tempfile().expect("a file");
    file.set_len(4096).expect("a length");
    let file = HostFile {
        file,
        path: "image".into(),
        writable: true,
    };
    let disk = HostDisk::build(vec![file], HostOptions::default(), None, |_| false);
    assert!(disk.expect("a disk").can_retire());
}

/// All that changes a file, or makes it stable, and a read.
fn everything() -> Vec<Op> {
    let (offset, len) = (BLOCK as u64, BLOCK as u64);
    let zero = |mode| Op::Zero {
        file: FILE,
        offset,
        len,
        mode,
    };
    vec![
        write(1, 9),
        zero(ZeroMode::Punch),
        zero(ZeroMode::KeepAllocated),
        Op::Allocate {
            file: FILE,
            offset: 64 * offset,
            len,
        },
        Op::Clone {
            from: FILE,
            from_offset: 0,
            file: FILE,
            offset,
            len,
        },
        Op::Sync { file: FILE },
        Op::Read {
            file: FILE,
            offset,
            buffer: Buffer::Owned(AlignedBuf::from_slice(BLOCK, &[0; BLOCK])),
        },
    ]
}

fn finish(io: &mut HostIo, count: usize) -> Vec<Completion> {
    let mut done = Vec::new();
    while done.len() < count {
        io.submit();
        io.reap(&mut done);
        thread::yield_now();
    }
    done
}

fn ways() -> [Aio; 2] {
    [Aio::IoUring, Aio::Psync]
}

#[test]
fn nothing_is_begun_once_the_lock_is_lost() {
    for aio in ways() {
        let rig = rig(aio);
        let before = std::fs::read(&rig.path).unwrap();
        let mut io = rig.disk.open_io(16).unwrap();
        rig.lease.begin_watch();
        assert!(rig.lease.lose() && !rig.lease.lose());
        // Nothing brings it back.
        assert!(!rig.lease.affirm(0));
        let ops = everything();
        let count = ops.len();
        for op in ops {
            io.queue(0, op).unwrap();
        }
        for completion in finish(&mut io, count) {
            assert_eq!(completion.result, Err(LOST), "{aio:?}: {:?}", completion.op);
        }
        assert!(rig.disk.write_all_at(FILE, &[9], 0).is_err());
        assert!(rig.disk.set_len(FILE, 1).is_err());
        assert!(rig.disk.sync(FILE).is_err());
        assert!(rig.disk.allocate(FILE, 0, 1 << 20).is_err());
        assert!(rig.disk.set_opening(FILE, 1).is_err());
        assert_eq!(rig.disk.lock_standing(), LockStanding::Lost);
        assert!(std::fs::read(&rig.path).unwrap() == before);
    }
}

#[test]
fn what_is_in_doubt_waits_and_is_done_when_the_lock_is_found() {
    for aio in ways() {
        let rig = rig(aio);
        rig.lease.begin_watch();
        assert!(rig.lease.doubt());
        let LookFor::Doubts(doubts) = rig.lease.wait_for_look(Duration::ZERO) else {
            panic!("it is not over");
        };
        let mut io = rig.disk.open_io(16).unwrap();
        let (tell, told) = sync_channel(2);
        thread::scope(|scope| {
            scope.spawn(move || {
                io.queue(0, write(2, 7)).unwrap();
                tell.send("begun").unwrap();
                let done = finish(&mut io, 1);
                assert_eq!(done[0].result, Ok(()));
                tell.send("done").unwrap();
            });
            assert_eq!(told.recv(), Ok("begun"));
            assert!(told.recv_timeout(Duration::from_millis(300)).is_err());
            let byte = |block: usize| std::fs::read(&rig.path).unwrap()[block * BLOCK];
            assert_eq!(byte(2), 1, "{aio:?}");
            // A look from before another doubt decides nothing.
            assert!(rig.lease.doubt());
            assert!(!rig.lease.affirm(doubts));
            assert!(rig.lease.affirm(doubts + 1));
            assert_eq!(told.recv(), Ok("done"));
            assert_eq!(byte(2), 7, "{aio:?}");
        });
    }
}

/// What is no part of the files is changed only by who knows that the lock is there.
#[test]
fn who_waits_for_the_lock_hears_when_it_is_decided() {
    for is_lost in [false, true] {
        let rig = rig(Aio::Psync);
        rig.disk.wait_for_locks();
        rig.lease.begin_watch();
        rig.disk.wait_for_locks();
        rig.lease.doubt();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                rig.disk.wait_for_locks();
                rig.disk.lock_standing()
            });
            thread::sleep(Duration::from_millis(100));
            assert!(!waiting.is_finished());
            assert!(match is_lost {
                true => rig.lease.lose(),
                false => rig.lease.affirm(1),
            });
            let expected = match is_lost {
                true => LockStanding::Lost,
                false => LockStanding::Held,
            };
            assert_eq!(waiting.join().unwrap(), expected);
        });
    }
}

/// What the watch is there for.
#[test]
fn without_a_watch_everything_is_written() {
    for aio in ways() {
        let rig = rig(aio);
        assert!(!rig.lease.doubt());
        let mut io = rig.disk.open_io(16).unwrap();
        io.queue(0, write(2, 7)).unwrap();
        assert_eq!(finish(&mut io, 1)[0].result, Ok(()));
        assert_eq!(std::fs::read(&rig.path).unwrap()[2 * BLOCK], 7);
    }
}

#[test]
fn who_ends_the_watch_in_doubt_has_lost_the_lock() {
    let held = rig(Aio::Psync);
    held.lease.begin_watch();
    held.lease.end_watch();
    assert_eq!(held.lease.standing(), LockStanding::Unwatched);
    assert_eq!(held.lease.wait_for_look(Duration::ZERO), LookFor::End);
    let doubted = rig(Aio::Psync);
    doubted.lease.begin_watch();
    doubted.lease.doubt();
    doubted.lease.end_watch();
    assert_eq!(doubted.lease.standing(), LockStanding::Lost);
    assert!(doubted.disk.write_all_at(FILE, &[9], 0).is_err());
}

#[test]
fn every_description_has_the_lock() {
    let one = rig(Aio::Psync);
    let stranger = File::open(&one.path).unwrap();
    assert!(one.lease.is_seen_by(&stranger).unwrap());
    let io = one.disk.open_io(4).unwrap();
    let top = Arc::clone(one.disk.files.top());
    let (locked, free) = (top.open_to_look().unwrap(), top.open_to_ask().unwrap());
    drop((top, one.disk));
    drop(free.unwrap());
    // Those of threads have it, each for itself.
    assert!(one.lease.is_seen_by(&locked).unwrap());
    drop(io);
    assert!(!one.lease.is_seen_by(&locked).unwrap());
    assert!(one.lease.is_seen_by(&stranger).unwrap());
    drop(locked);
    assert!(!one.lease.is_seen_by(&stranger).unwrap());
}

#[test]
fn what_is_found_of_a_lock_that_was_given_up_is_no_loss() {
    let lease = Arc::new(Lease::new().expect("a lease"));
    lease.begin_watch();
    assert_eq!(lease.renew(|| 5), Some(5));
    let (begin, begun) = sync_channel(0);
    let (end, ended) = sync_channel(0);
    let renewing = Arc::clone(&lease);
    let renewal = thread::spawn(move || {
        renewing.renew(|| {
            begin.send(()).expect("it is waited for");
            ended.recv().expect("it is told");
        })
    });
    begun.recv().expect("it begins");
    let ending = Arc::clone(&lease);
    let ending = thread::spawn(move || ending.end_watch());
    while lease.standing() != LockStanding::Unwatched {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(50));
    assert!(!ending.is_finished(), "the lock is still being taken");
    end.send(()).expect("it waits");
    renewal.join().expect("it ends");
    ending.join().expect("it ends");
    assert_eq!(lease.renew(|| 5), None);
    assert!(!lease.lose());
    assert_eq!(lease.standing(), LockStanding::Unwatched);
}
