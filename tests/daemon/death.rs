//! The daemon is killed under a front-end that lives on and keeps its in-flight region.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH};

use rustix::io::Errno;
use rustix::process::Signal;

use crate::common::backend::Backend;
use crate::common::fixtures::fixture;
use crate::front_end::*;
use crate::grow::rig_of;
pub use crate::survivor::*;
use crate::{OK, Rig, ploop_img, start_front_end, tasks, wait_for};

/// Sectors of a cluster.
pub const CLUSTER: u64 = 2048;

fn discard(front_end: &mut FrontEnd, sector: u64) {
    let range = [
        &sector.to_le_bytes()[..],
        &(CLUSTER as u32).to_le_bytes(),
        &[0; 4],
    ]
    .concat();
    front_end.fill(DATA, &range);
    let answer = front_end.rings[0].run(VIRTIO_BLK_T_DISCARD, 0, &[readable(DATA, 16)]);
    assert_eq!(answer, (OK, 1));
}

pub const NEVER: &[&str] = &["--writeback-delay=60000"];

#[test]
fn what_was_completed_survives_a_kill() {
    let rig = Rig::new();
    let mut backend = rig.serve(NEVER);
    let (mut front_end, region) = begin(&backend);
    write(&mut front_end, 0, 1);
    for round in 0..4_u8 {
        let first = u64::from(round) * 3 * CLUSTER;
        write(&mut front_end, first + CLUSTER, 10 + round);
        write(&mut front_end, first + 2 * CLUSTER, 20 + round);
        discard(&mut front_end, first + 2 * CLUSTER);
        backend.kill();
        backend = rig.serve(NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        front_end.start_rings();
        expect(&mut front_end, 0, 1);
        expect(&mut front_end, first + CLUSTER, 10 + round);
        expect(&mut front_end, first + 2 * CLUSTER, 0);
        // All of them have one log.
        wait_for("what was taken over", || {
            backend.log().matches("took over").count() == usize::from(round) + 1
        });
    }
    drop(front_end);
    backend.stop();
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();
}

#[test]
fn a_guest_goes_on_after_a_clean_end() {
    let rig = Rig::new();
    let mut backend = rig.serve(NEVER);
    let (mut front_end, region) = begin(&backend);
    for round in 0..3 {
        write(&mut front_end, round * CLUSTER, 3);
        backend.stop();
        backend = rig.serve(NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        front_end.start_rings();
        expect(&mut front_end, round * CLUSTER, 3);
    }
    // The same process, another connection.
    write(&mut front_end, 9 * CLUSTER, 4);
    drop(front_end.vhost.get_features());
    reconnect(&mut front_end, &backend, Some(&region));
    front_end.start_rings();
    expect(&mut front_end, 9 * CLUSTER, 4);
    backend.stop();
}

/// A front-end learns that it is refused before all of it is taken down, and the next one
/// would be turned away meanwhile.
fn wait_for_nobody(backend: &Backend) {
    wait_for("the end of a connection", || {
        tasks(backend.pid()).iter().all(|task| task != "messages")
    });
}

#[test]
fn a_guest_whose_region_is_gone_is_refused_and_one_that_begins_anew_is_not() {
    let rig = Rig::new();
    let backend = rig.serve(NEVER);
    let (mut front_end, _region) = begin(&backend);
    write(&mut front_end, 0, 1);
    backend.kill();
    let backend = rig.serve(NEVER);
    reconnect(&mut front_end, &backend, None);
    let base = front_end.rings[0].avail_idx();
    front_end.start_ring_at(0, base);
    front_end.vhost.set_vring_enable(0, true).unwrap_err();
    wait_for_nobody(&backend);
    // A region without what the process before knew is as good as none.
    reconnect(&mut front_end, &backend, None);
    let other = ask_for_region(&mut front_end);
    set_region(&mut front_end, &other).unwrap();
    front_end.start_ring_at(0, base);
    front_end.vhost.set_vring_enable(0, true).unwrap_err();
    // The answer comes before the line.
    let start = Instant::now();
    while backend.log().matches("no in-flight region").count() < 2 {
        assert!(start.elapsed() < PATIENCE, "{}", backend.log());
        thread::sleep(A_WHILE);
    }
    wait_for_nobody(&backend);
    let (mut front_end, _region) = begin(&backend);
    write(&mut front_end, 0, 2);
    expect(&mut front_end, 0, 2);
    drop(front_end);
    backend.stop();
}

fn flush(front_end: &mut FrontEnd) {
    let answer = front_end.rings[0].run(VIRTIO_BLK_T_FLUSH, 0, &[]);
    assert_eq!(answer, (OK, 1));
}

/// The image is not what it was.
const CHANGED: &str = "somebody else has opened the image for writing";

/// That a guest must not go on, and why.
fn expect_refusal(mut front_end: FrontEnd, region: &Region, backend: &Backend, why: &str) {
    reconnect(&mut front_end, backend, Some(region));
    let base = front_end.rings[0].avail_idx();
    front_end.start_ring_at(0, base);
    front_end.vhost.set_vring_enable(0, true).unwrap_err();
    wait_for_nobody(backend);
    backend.expect_to_say(why);
}

#[test]
fn a_guest_whose_image_was_repaired_after_a_kill_is_refused() {
    for repair in ["leaks", "all"] {
        let rig = Rig::new();
        let backend = rig.serve(NEVER);
        let (mut front_end, region) = begin(&backend);
        for cluster in 0..4 {
            write(&mut front_end, cluster * CLUSTER, 1);
        }
        discard(&mut front_end, 0);
        flush(&mut front_end);
        // In a cluster in the midst of the file that only the region knows: to a repair it
        // looks unused.
        write(&mut front_end, 9 * CLUSTER, 2);
        backend.kill();
        ploop_img(["check", "--repair", repair, rig.image.to_str().unwrap()]);
        let backend = rig.serve(NEVER);
        expect_refusal(front_end, &region, &backend, CHANGED);
        let (mut front_end, _region) = begin(&backend);
        expect(&mut front_end, CLUSTER, 1);
        drop(front_end);
        backend.stop();
    }
}

/// Of a raw image, the sync at the end of a process to which nobody came is the only one to
/// tell what became of the writes of the one before.
#[test]
fn a_guest_is_refused_after_a_process_that_ended_without_a_sync() {
    let Some(rig) = rig_of(|folder| fixture("plain").unpack(folder)) else {
        return;
    };
    let backend = rig.serve(NEVER);
    let (mut front_end, region) = begin(&backend);
    write(&mut front_end, 0, 1);
    backend.kill();
    // Those of the image: that of its folder comes before the image is opened.
    let syncs = [libc::SYS_fdatasync];
    let backend = rig.serve_without(&syncs, Errno::IO, &["--aio=psync"]);
    backend.signal(Signal::TERM);
    backend.fails();
    let backend = rig.serve(NEVER);
    reconnect(&mut front_end, &backend, Some(&region));
    let base = front_end.rings[0].avail_idx();
    front_end.start_ring_at(0, base);
    front_end.vhost.set_vring_enable(0, true).unwrap_err();
    drop(front_end);
    backend.stop();
}

#[test]
fn a_guest_whose_raw_disk_was_changed_after_a_kill_is_refused() {
    type Change = fn(&Rig, &str);
    let changes: [(&str, Change); 5] = [
        ("overwritten", |rig, bundle| {
            let other = rig.folder.path().join("other.raw");
            File::create(&other).unwrap().set_len(8 << 20).unwrap();
            let target = format!("{bundle}/root.hds");
            let other = other.to_str().unwrap();
            ploop_img(["convert", "-n", "-f", "raw", "-O", "raw", other, &target]).ok();
        }),
        ("shrunk", |_, bundle| {
            ploop_img(["resize", "--shrink", bundle, "8M"]).ok();
        }),
        ("grown", |_, bundle| {
            ploop_img(["resize", bundle, "24M"]).ok();
        }),
        ("compacted", |_, bundle| {
            ploop_img(["compact", bundle]).ok();
        }),
        ("kept in a snapshot and merged", |rig, bundle| {
            ploop_img(["snapshot", "create", bundle]).ok();
            let backend = rig.serve(NEVER);
            let (mut front_end, _region) = begin(&backend);
            write(&mut front_end, 3 * CLUSTER, 9);
            drop(front_end);
            backend.stop();
            ploop_img(["snapshot", "merge", bundle]).ok();
        }),
    ];
    for (what, change) in changes {
        let Some(rig) = rig_of(|folder| fixture("plain").unpack(folder)) else {
            return;
        };
        let backend = rig.serve(NEVER);
        let (mut front_end, region) = begin(&backend);
        write(&mut front_end, 3 * CLUSTER, 1);
        backend.kill();
        let bundle = rig.image.to_str().unwrap();
        println!("the disk is {what}");
        change(&rig, bundle);
        let backend = rig.serve(NEVER);
        expect_refusal(front_end, &region, &backend, CHANGED);
        drop(begin(&backend));
        backend.stop();
    }
}

#[test]
fn a_guest_whose_raw_disk_nobody_has_changed_goes_on_after_a_kill() {
    let Some(rig) = rig_of(|folder| fixture("plain").unpack(folder)) else {
        return;
    };
    let mut backend = rig.serve(NEVER);
    let (mut front_end, region) = begin(&backend);
    for looks in [&["check"][..], &["check", "--repair", "all"], &["info"]] {
        write(&mut front_end, 3 * CLUSTER, 1);
        backend.kill();
        ploop_img(looks.iter().copied().chain(rig.image.to_str())).ok();
        backend = rig.serve(NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        front_end.start_rings();
        expect(&mut front_end, 3 * CLUSTER, 1);
    }
    drop(front_end);
    backend.stop();
}

#[test]
fn a_guest_that_was_told_of_writes_is_not_served_read_only_after_a_kill() {
    for has_region in [false, true] {
        let rig = Rig::new();
        let backend = rig.serve(NEVER);
        let (mut front_end, region) = begin(&backend);
        write(&mut front_end, 0, 1);
        backend.kill();
        let backend = rig.serve(&["--read-only"]);
        reconnect(&mut front_end, &backend, has_region.then_some(&region));
        let base = front_end.rings[0].avail_idx();
        front_end.start_ring_at(0, base);
        front_end.vhost.set_vring_enable(0, true).unwrap_err();
        backend.expect_to_say(match has_region {
            true => "of use only to a process that may write",
            false => "no in-flight region",
        });
        wait_for_nobody(&backend);
        // Who begins has been told of nothing.
        start_front_end(backend.socket());
        wait_for_nobody(&backend);
        backend.stop();
        let backend = rig.serve(NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        front_end.start_rings();
        expect(&mut front_end, 0, 1);
        drop(front_end);
        backend.stop();
    }
}

#[test]
fn a_guest_that_only_reads_goes_on_after_a_kill() {
    for (is_closed, has_region) in [(true, true), (true, false), (false, true)] {
        let rig = Rig::new();
        let backend = rig.serve(NEVER);
        let (mut writer, _region) = begin(&backend);
        write(&mut writer, 0, 1);
        flush(&mut writer);
        drop(writer);
        match is_closed {
            true => backend.stop(),
            false => backend.kill(),
        }
        let mut backend = rig.serve(&["--read-only"]);
        let (mut front_end, region) = begin(&backend);
        for _ in 0..2 {
            expect(&mut front_end, 0, 1);
            backend.kill();
            backend = rig.serve(&["--read-only"]);
            reconnect(&mut front_end, &backend, has_region.then_some(&region));
            front_end.start_rings();
        }
        expect(&mut front_end, 0, 1);
        drop(front_end);
        backend.stop();
    }
}

#[test]
fn a_guest_is_refused_once_another_one_was_served_without_a_region() {
    for is_killed in [false, true] {
        let rig = Rig::new();
        let mut backend = rig.serve(NEVER);
        let (mut front_end, region) = begin(&backend);
        write(&mut front_end, 0, 1);
        let (nowhere, _) = UnixStream::pair().unwrap();
        front_end.vhost = Frontend::from_stream(nowhere, QUEUES.into());
        wait_for_nobody(&backend);
        let mut other = start_front_end(backend.socket());
        write(&mut other, 0, 2);
        drop(other);
        if is_killed {
            backend.kill();
            backend = rig.serve(NEVER);
        } else {
            wait_for_nobody(&backend);
        }
        // What it had under way would run over what the other one has written.
        let why = match is_killed {
            true => CHANGED,
            false => "without the memory that came back",
        };
        expect_refusal(front_end, &region, &backend, why);
        drop(begin(&backend));
        backend.stop();
    }
}

#[test]
fn a_driver_after_another_on_one_connection_may_go_on_after_a_kill() {
    let rig = Rig::new();
    let backend = rig.serve(NEVER);
    let (mut front_end, region) = begin(&backend);
    write(&mut front_end, 0, 1);
    // Firmware, which leaves the device to the kernel without a word.
    for index in 0..front_end.rings.len() {
        front_end.vhost.get_vring_base(index).unwrap();
    }
    front_end.start_rings();
    write(&mut front_end, CLUSTER, 2);
    backend.kill();
    let backend = rig.serve(NEVER);
    reconnect(&mut front_end, &backend, Some(&region));
    front_end.start_rings();
    expect(&mut front_end, 0, 1);
    expect(&mut front_end, CLUSTER, 2);
    drop(front_end);
    backend.stop();
}

#[test]
fn a_cache_that_is_off_stays_off_over_a_kill() {
    let rig = Rig::new();
    let mut backend = rig.serve(NEVER);
    let (mut front_end, region) = begin(&backend);
    for mode in [0, 1, 0] {
        front_end.set_config(32, &[mode]);
        backend.kill();
        backend = rig.serve(NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        assert_eq!(front_end.get_config(32, 1), [mode]);
        front_end.start_rings();
        write(&mut front_end, 0, 1);
    }
    drop(front_end);
    backend.stop();
}

#[test]
fn a_guest_goes_on_with_a_disk_that_has_grown_meanwhile() {
    let rig = Rig::new();
    let mut backend = rig.serve(NEVER);
    let (mut front_end, region) = begin(&backend);
    write(&mut front_end, 0, 3);
    // The part of the region that is for the map is rounded up; this is beyond.
    for size in ["8G", "64G"] {
        backend.stop();
        ploop_img(["resize", rig.image.to_str().unwrap(), size]).ok();
        backend = rig.serve(NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        front_end.start_rings();
        expect(&mut front_end, 0, 3);
        // At the end of the disk, and what only the process knows of it.
        let last = u64::from_le_bytes(front_end.get_config(0, 8).try_into().unwrap()) - 1;
        write(&mut front_end, last, 5);
        backend.kill();
        backend = rig.serve(NEVER);
        reconnect(&mut front_end, &backend, Some(&region));
        front_end.start_rings();
        expect(&mut front_end, last, 5);
    }
    drop(front_end);
    backend.stop();
    ploop_img(["check", rig.image.to_str().unwrap()]).ok();
}
