//! Servers that say of a write that it is well, lose it, and tell only one description of
//! that, or only the first that asks.

use std::sync::Barrier;
use std::thread;

use super::*;
use crate::storage::one_file_fs::{Answers, OneFileFs, Use};

const BLOCK: [u8; 4096] = [7; 4096];

const CACHES: [Cache; 2] = [Cache::Writeback, Cache::None];

const LOSES: Answers = Answers {
    open: None,
    direct_open: None,
    look: None,
    statfs: None,
    is_nameless: false,
    write: None,
    direct_write: None,
    loses_writes: true,
    tells_first_who_asks: false,
    keeps_shards: false,
};

/// A disk of one file on such a server, and two threads of it.
struct Rig {
    disk: HostDisk,
    one: HostIo,
    other: HostIo,
    // Last: it ends when nobody has its file open.
    served: OneFileFs,
}

/// Does it in each way of I/O, if there is FUSE.
fn in_every_way(cache: Cache, test: impl Fn(Rig)) {
    for way in WAYS {
        let Some(served) = OneFileFs::mount() else {
            return;
        };
        let disk = disk_with(&served.path(), cache);
        assert_eq!(
            disk.known_file(FileId(0))
                .is_some_and(|file| file.is_direct),
            cache == Cache::None
        );
        let (Some(one), Some(other)) = (open_way(&disk, way, 4), open_way(&disk, way, 4)) else {
            continue;
        };
        eprintln!("{way:?}, {cache:?}");
        test(Rig {
            disk,
            one,
            other,
            served,
        });
    }
}

fn write(io: &mut HostIo) {
    assert_eq!(run_one(io, write_op(0, &BLOCK, false)).0, Ok(()));
}

/// A write that is said to be well, but is not.
fn lose_write(served: &OneFileFs, io: &mut HostIo) {
    served.answer(LOSES);
    write(io);
    served.answer(Answers::default());
}

fn sync(io: &mut HostIo) -> Result<(), Errno> {
    run_one(io, Op::Sync { file: TOP }).0
}

/// The server takes no direct writes any more, and this thread is the first to notice.
fn give_up_direct(served: &OneFileFs, io: &mut HostIo) {
    served.answer(Answers {
        direct_write: Some(fuser::Errno::EINVAL),
        ..Answers::default()
    });
    write(io);
    served.answer(Answers::default());
}

#[test]
fn a_sync_hears_of_a_write_that_another_thread_lost() {
    for cache in CACHES {
        in_every_way(cache, |mut rig| {
            lose_write(&rig.served, &mut rig.one);
            assert_eq!(sync(&mut rig.other), Err(Errno::IO));
            assert_eq!(sync(&mut rig.other), Ok(()), "it was told");
            lose_write(&rig.served, &mut rig.one);
            rig.disk.sync(TOP).expect_err("it is lost");
            lose_write(&rig.served, &mut rig.other);
            assert_eq!(sync(&mut rig.one), Err(Errno::IO));
        });
    }
}

#[test]
fn a_sync_hears_of_what_was_lost_after_direct_io_was_given_up() {
    in_every_way(Cache::None, |mut rig| {
        write(&mut rig.other);
        give_up_direct(&rig.served, &mut rig.one);
        lose_write(&rig.served, &mut rig.one);
        // This thread has not noticed yet, and has nothing to write.
        assert_eq!(sync(&mut rig.other), Err(Errno::IO));
        assert_eq!(sync(&mut rig.other), Ok(()), "it was told");
        lose_write(&rig.served, &mut rig.other);
        assert_eq!(sync(&mut rig.one), Err(Errno::IO));
        lose_write(&rig.served, &mut rig.one);
        rig.disk.sync(TOP).expect_err("it is lost");
    });
}

#[test]
fn a_sync_hears_of_what_was_lost_before_direct_io_was_given_up() {
    in_every_way(Cache::None, |mut rig| {
        write(&mut rig.other);
        lose_write(&rig.served, &mut rig.one);
        give_up_direct(&rig.served, &mut rig.one);
        assert_eq!(sync(&mut rig.other), Err(Errno::IO));
        assert_eq!(sync(&mut rig.other), Ok(()), "it was told");
    });
    // The same where it is given up before it was refused.
    in_every_way(Cache::None, |mut rig| {
        lose_write(&rig.served, &mut rig.one);
        rig.disk.forgo_direct();
        rig.disk.write_all_at(TOP, b"mark", 0).expect("write");
        assert_eq!(sync(&mut rig.other), Err(Errno::IO));
        rig.served.answer(LOSES);
        rig.disk.write_all_at(TOP, b"mark", 0).expect("write");
        assert_eq!(sync(&mut rig.other), Err(Errno::IO));
    });
}

#[test]
fn a_thread_that_ends_takes_no_lost_write_with_it() {
    for cache in CACHES {
        for tells_first_who_asks in [false, true] {
            in_every_way(cache, |mut rig| {
                rig.served.answer(Answers {
                    tells_first_who_asks,
                    ..LOSES
                });
                write(&mut rig.one);
                drop(rig.one);
                assert_eq!(sync(&mut rig.other), Err(Errno::IO));
            });
        }
    }
}

#[test]
fn threads_that_give_direct_io_up_at_once_open_one_description() {
    const THREADS: usize = 8;
    let Some(served) = OneFileFs::mount() else {
        return;
    };
    let disk = disk_with(&served.path(), Cache::None);
    let open = || open_way(&disk, Way::Psync, 4).expect("plain calls");
    let threads: Vec<_> = std::iter::repeat_with(open).take(THREADS).collect();
    disk.forgo_direct();
    served.take_uses();
    let start = &Barrier::new(THREADS);
    thread::scope(|scope| {
        for mut io in threads {
            scope.spawn(move || {
                start.wait();
                write(&mut io);
            });
        }
    });
    let uses = served.take_uses();
    let opened = uses.iter().filter(|what| matches!(what, Use::Open(_)));
    assert_eq!(opened.count(), 1, "{uses:?}");
}

/// It could be such a server, and who takes it for another kind of file system hides errors.
#[test]
fn a_server_that_does_not_say_what_it_is_is_asked_by_one_description_all_the_same() {
    for error in [fuser::Errno::ENOSYS, fuser::Errno::EIO, fuser::Errno::EINTR] {
        let Some(served) = OneFileFs::mount() else {
            return;
        };
        served.answer(Answers {
            statfs: Some(error),
            ..Answers::default()
        });
        let file = SharedFile::new(host_file(&served.path(), true), Cache::Writeback, None);
        let file = file.expect("it can be opened");
        assert!(file.must_share());
        assert!(!file.can(Fallocation::ZeroRange));
    }
}

/// The error of one could be the only word of what another write lost.
#[test]
fn where_one_description_is_told_no_write_is_a_stable_one() {
    for cache in CACHES {
        in_every_way(cache, |rig| assert!(!rig.disk.has_stable_writes()));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, BLOCK).unwrap();
    assert!(disk_with(&path, Cache::Writeback).has_stable_writes());
}
