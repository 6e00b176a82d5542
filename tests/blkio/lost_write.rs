//! A server that says of a write that it is well, loses it, and tells one of those who
//! could ask: a flush of the guest must hear of it, whichever thread made the write.

use crate::client::{Client, Lane};
use crate::frail_fs::Told;
use crate::stable::{Disk, EIO, flush, in_every_way, write};

/// A cluster that is mapped on disk before anything goes wrong.
const MAPPED: u64 = 3;
const OTHER: u64 = 4;

const TOLD: [Told; 2] = [Told::Writer, Told::First];

/// Serves a disk with two queues, whose first has mapped a cluster and flushed.
fn with_mapped_cluster(told: Told, test: impl Fn(&Disk, &mut Client, Told)) {
    in_every_way(|disk, way| {
        eprintln!("{told:?}");
        let backend = disk.serve(way);
        let mut client = Client::connect(backend.socket(), 2);
        assert_eq!(write(&mut client.lanes[0], MAPPED, 1), 0);
        assert_eq!(flush(&mut client.lanes[1]), 0);
        test(&disk, &mut client, told);
        for lane in &mut client.lanes {
            assert_eq!(flush(lane), EIO);
        }
        drop(client);
        backend.stop_with_failure();
        assert!(disk.is_marked());
    });
}

fn lose_write(disk: &Disk, lane: &mut Lane, told: Told) {
    disk.fs.lose_next_write(told);
    assert_eq!(write(lane, MAPPED, 2), 0);
    assert!(!disk.fs.loses_next_write());
}

/// From now on direct I/O is refused. This queue is the first to notice.
fn refuse_direct(disk: &Disk, lane: &mut Lane) {
    disk.fs.be_strict(1 << 20);
    assert_eq!(write(lane, OTHER, 3), 0);
}

#[test]
fn a_flush_fails_after_a_write_of_another_queue_was_lost() {
    for told in TOLD {
        with_mapped_cluster(told, |disk, client, told| {
            lose_write(disk, &mut client.lanes[0], told);
            assert_eq!(flush(&mut client.lanes[1]), EIO);
        });
    }
}

#[test]
fn a_flush_fails_after_a_write_to_a_new_cluster_was_lost() {
    with_mapped_cluster(Told::Writer, |disk, client, told| {
        disk.fs.lose_next_write(told);
        assert_eq!(write(&mut client.lanes[0], OTHER, 2), 0);
        assert!(!disk.fs.loses_next_write());
        assert_eq!(flush(&mut client.lanes[1]), EIO);
    });
}

#[test]
fn a_flush_fails_after_a_write_was_lost_since_direct_io_was_given_up() {
    for told in TOLD {
        with_mapped_cluster(told, |disk, client, told| {
            refuse_direct(disk, &mut client.lanes[0]);
            assert_eq!(flush(&mut client.lanes[1]), 0);
            lose_write(disk, &mut client.lanes[0], told);
            assert_eq!(flush(&mut client.lanes[1]), EIO);
        });
    }
}

#[test]
fn a_flush_fails_after_a_write_was_lost_just_before_direct_io_was_given_up() {
    with_mapped_cluster(Told::Writer, |disk, client, told| {
        lose_write(disk, &mut client.lanes[0], told);
        refuse_direct(disk, &mut client.lanes[0]);
        assert_eq!(flush(&mut client.lanes[1]), EIO);
    });
}

/// The end of a queue's thread closes nothing by which a lost write would be told.
#[test]
fn a_flush_fails_after_the_queue_has_ended_that_made_the_lost_write() {
    for told in TOLD {
        in_every_way(|disk, way| {
            let backend = disk.serve(way);
            let mut client = Client::connect(backend.socket(), 1);
            assert_eq!(write(&mut client.lanes[0], MAPPED, 1), 0);
            assert_eq!(flush(&mut client.lanes[0]), 0);
            lose_write(&disk, &mut client.lanes[0], told);
            drop(client);
            let mut client = Client::connect(backend.socket(), 1);
            assert_eq!(flush(&mut client.lanes[0]), EIO, "{told:?}");
            drop(client);
            backend.stop_with_failure();
            assert!(disk.is_marked());
        });
    }
}
