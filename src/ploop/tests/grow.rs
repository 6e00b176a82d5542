//! A disk becomes larger while it is in use.

use std::rc::Rc;

use super::*;
use crate::format::{Geometry, Header, HostCluster, InUse};
use crate::ploop::control::Outcome;
use crate::ploop::preempt;
use crate::sim::checker::Image;
use crate::storage::SharedWords;

/// Takes one cluster for header and BAT.
pub(super) const OLD: u64 = 16;
/// Takes three.
pub(super) const NEW: u64 = 20_000;

pub(super) fn sectors(clusters: u64) -> Sector {
    Sector(clusters * CLUSTER / 512)
}

pub(super) fn content(cluster: u64) -> Vec<u8> {
    vec![cluster as u8 + 1; CLUSTER as usize]
}

fn header(disk: &SimDisk) -> Header {
    let bytes = disk.read_live(FileId(0), 0, Header::LEN);
    Header::parse(&bytes.try_into().unwrap()).unwrap()
}

/// An image of either version whose clusters are all mapped.
pub(super) fn full(version: u8) -> SimDisk {
    let disk = empty(version);
    let rig = Rig::open(&disk, 1, options());
    for cluster in 0..OLD {
        rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
    }
    rig.control(Control::Close).unwrap();
    disk
}

fn empty(version: u8) -> SimDisk {
    empty_of(version, OLD)
}

fn empty_of(version: u8, clusters: u64) -> SimDisk {
    let disk = SimDisk::new(1, Medium::default(), 1);
    let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
    let header = Header::new(sectors(clusters), cluster).unwrap();
    let mut bytes = header.to_bytes();
    if version == 1 {
        bytes[..16].copy_from_slice(b"WithoutFreeSpace");
        // The data area starts right behind the BAT, off the clusters' grid.
        bytes[48..52].fill(0);
    }
    let header = Header::parse(&bytes).unwrap();
    disk.prepare(FileId(0), header.geometry().data_start - 512, &[0; 512]);
    disk.prepare(FileId(0), 0, &bytes);
    disk
}

impl Rig {
    fn grow(&self, size: Sector) -> Result<(), EngineError> {
        self.control(Control::PrepareGrowth(size))?;
        self.control(Control::CommitGrowth)
    }

    pub(super) fn check_full(&self) {
        for cluster in 0..OLD {
            let read = self.read(cluster * CLUSTER, CLUSTER as usize);
            assert!(read == content(cluster), "cluster {cluster}");
        }
    }
}

/// That another tool finds nothing wrong.
fn check_image(disk: &SimDisk) {
    disk.view(|view| Image::read(view, FileId(0))).unwrap();
}

#[test]
fn a_disk_grows_and_what_was_in_the_way_has_moved() {
    for version in [1, 2] {
        let disk = full(version);
        let before = header(&disk);
        let rig = Rig::open(&disk, 1, options());
        rig.grow(Sector(sectors(NEW).0 - 1)).unwrap();
        assert_eq!(rig.engine.disk_size(), sectors(NEW), "in whole clusters");
        assert_eq!(rig.engine.geometry().disk_size, sectors(NEW));
        assert_eq!(u64::from(rig.engine.geometry().entries), NEW);
        rig.check_full();
        assert_eq!(rig.read((NEW - 1) * CLUSTER, 512), [0; 512]);
        rig.write((NEW - 1) * CLUSTER, &content(99)).unwrap();
        rig.write(OLD * CLUSTER - 512, &[7; 1024]).unwrap();
        rig.control(Control::Close).unwrap();
        drop(rig);
        check_image(&disk);
        let after = header(&disk);
        let geometry = after.geometry();
        assert_eq!(after.in_use, InUse::Closed);
        assert_eq!(
            (geometry.disk_size, geometry.entries),
            (sectors(NEW), NEW as u32)
        );
        assert!(geometry.data_start >= geometry.metadata_len());
        let moved_by = geometry.data_start - before.geometry().data_start;
        assert!(moved_by == 2 * CLUSTER || moved_by == 3 * CLUSTER);
        let rig = Rig::open(&disk, 1, options());
        assert!(rig.read((NEW - 1) * CLUSTER, CLUSTER as usize) == content(99));
        assert_eq!(
            rig.read(OLD * CLUSTER, 1024)[..],
            [[7; 512], [0; 512]].concat()
        );
        rig.write(OLD * CLUSTER - 512, &[OLD as u8; 512]).unwrap();
        rig.check_full();
    }
}

#[test]
fn what_moves_takes_the_space_that_is_there() {
    let disk = empty(2);
    let rig = Rig::open(&disk, 1, options());
    for cluster in 0..4 {
        rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
    }
    let free = rig.engine.alloc().available();
    assert!(free > 2, "the file is longer than it has to be");
    rig.grow(sectors(NEW)).unwrap();
    for cluster in 0..4 {
        assert!(rig.read(cluster * CLUSTER, CLUSTER as usize) == content(cluster));
    }
    rig.control(Control::Close).unwrap();
    // Three clusters of header and BAT, and four of data: nothing is left between them.
    assert_eq!(disk.len(FileId(0)).unwrap(), 7 * CLUSTER);
}

#[test]
fn a_disk_grows_again_and_again_as_far_as_the_format_goes() {
    let disk = full(1);
    let rig = Rig::open(&disk, 1, options());
    let largest = sectors(u64::from(u32::MAX) * 512 / CLUSTER);
    for size in [sectors(OLD), sectors(8000), sectors(9000), largest] {
        rig.grow(size).unwrap();
        assert_eq!(rig.engine.disk_size(), size);
        rig.check_full();
    }
    let error = rig.grow(Sector(largest.0 + 1)).unwrap_err();
    assert!(matches!(error, EngineError::TooLarge(_)), "{error}");
    let error = rig.grow(sectors(9000)).unwrap_err();
    assert!(matches!(error, EngineError::Smaller { .. }), "{error}");
    let error = rig.control(Control::CommitGrowth).unwrap_err();
    assert_eq!(error, EngineError::NotPrepared);
    rig.control(Control::Close).unwrap();
    drop(rig);
    check_image(&disk);
}

#[test]
fn what_others_write_meanwhile_is_there() {
    let disk = full(2);
    let rig = Rig::open(&disk, 1, options()).and_a_queue();
    let growth = rig.engine.control(Control::PrepareGrowth(sectors(NEW)));
    let mut round = 0;
    while growth.get().is_none() {
        round += 1;
        assert!(round < 10_000, "it does not end");
        let cluster = round % OLD;
        let written = vec![round as u8; 4096];
        let tag = rig.push_write_to(1, cluster * CLUSTER + 512, &written);
        rig.result(tag).unwrap();
        assert_eq!(rig.read(cluster * CLUSTER + 512, 4096), written);
        if round % 7 == 0 {
            rig.discard(cluster * CLUSTER, CLUSTER).unwrap();
            assert_eq!(rig.read(cluster * CLUSTER, 4096), [0; 4096]);
        }
        rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
    }
    assert_eq!(growth.get(), Some(Ok(())));
    assert!(round > 0);
    assert_eq!(rig.engine.disk_size(), sectors(OLD), "not yet");
    assert!(rig.write(OLD * CLUSTER, &[1; 512]).is_err());
    rig.control(Control::CommitGrowth).unwrap();
    rig.check_full();
    let rig = rig.reopen();
    rig.check_full();
    assert_eq!(rig.engine.disk_size(), sectors(NEW));
}

/// Fills the lowest delta of a chain, which is the whole disk so far.
fn fill_base(disk: &SimDisk) {
    let base = Rig::open(disk, 1, options());
    for cluster in 0..OLD {
        base.write(cluster * CLUSTER, &content(cluster)).unwrap();
    }
    base.control(Control::Close).unwrap();
}

#[test]
fn clusters_above_a_lower_delta_move_too_and_it_stays_as_it_is() {
    let disk = empty_image(Medium::default(), 2, OLD * CLUSTER);
    fill_base(&disk);
    let rig = Rig::open(&disk, 2, options());
    for cluster in (0..OLD).step_by(3) {
        rig.write(cluster * CLUSTER, &content(cluster)[..512])
            .unwrap();
    }
    let before = disk.read_live(FileId(0), 0, disk.live_len(FileId(0)) as usize);
    rig.grow(sectors(NEW)).unwrap();
    rig.check_full();
    assert_eq!(rig.read(OLD * CLUSTER, 512), [0; 512]);
    rig.write((OLD + 1) * CLUSTER, &content(OLD + 1)).unwrap();
    rig.write(CLUSTER, &content(1)[..512]).unwrap();
    let rig = rig.reopen();
    rig.check_full();
    assert!(rig.read((OLD + 1) * CLUSTER, CLUSTER as usize) == content(OLD + 1));
    assert!(before == disk.read_live(FileId(0), 0, before.len()));
}

#[test]
fn a_raw_file_becomes_longer_and_what_was_behind_the_disk_is_gone() {
    let disk = SimDisk::new(1, Medium::default(), 1);
    disk.prepare(FileId(0), 0, &vec![5; 3 * CLUSTER as usize + 1536]);
    let level = |bytes: u64| Level::Plain {
        size: Sector(bytes / 512),
        cluster: ClusterSize::from_bytes(CLUSTER).unwrap(),
    };
    let rig = Rig::open_chain(&disk, vec![level(3 * CLUSTER + 512)], options());
    rig.control(Control::PrepareGrowth(sectors(9))).unwrap();
    assert_eq!(disk.live_len(FileId(0)), 9 * CLUSTER);
    assert!(!disk.is_unsynced());
    assert!(rig.write(3 * CLUSTER, &[1; 1024]).is_err());
    rig.control(Control::CommitGrowth).unwrap();
    assert_eq!(rig.read(3 * CLUSTER, 512), [5; 512]);
    assert_eq!(rig.read(3 * CLUSTER + 512, 4096), [0; 4096]);
    rig.write(8 * CLUSTER, &content(8)).unwrap();
    rig.control(Control::Close).unwrap();
    assert!(disk.read_live(FileId(0), 8 * CLUSTER, CLUSTER as usize) == content(8));
}

#[test]
fn what_is_read_only_does_not_grow() {
    let disk = full(2);
    let read_only = Options {
        read_only: true,
        ..options()
    };
    let rig = Rig::open(&disk, 1, read_only);
    assert_eq!(rig.grow(sectors(NEW)), Err(EngineError::ReadOnly));
}

#[test]
fn without_space_the_disk_stays_as_it_is_and_can_grow_later() {
    let disk = full(2);
    let rig = Rig::open(&disk, 1, options());
    let used = disk.used_blocks();
    disk.change_medium(|medium| medium.capacity = Some(used));
    assert_eq!(rig.grow(sectors(NEW)), Err(EngineError::NoSpace));
    assert_eq!(rig.engine.disk_size(), sectors(OLD));
    rig.check_full();
    disk.change_medium(|medium| medium.capacity = None);
    rig.grow(sectors(NEW)).unwrap();
    rig.check_full();
    rig.reopen().check_full();
}

/// Its file is shorter than the larger BAT.
#[test]
fn a_growth_that_comes_to_nothing_leaves_the_guest_its_space() {
    let options = Options {
        on_enospc: OnEnospc::Report,
        ..options()
    };
    for is_full in [true, false] {
        let disk = empty_image(Medium::default(), 1, OLD * CLUSTER);
        let rig = Rig::open(&disk, 1, options.clone());
        rig.write(0, &content(0)).unwrap();
        rig.flush().unwrap();
        let space = disk.used_blocks();
        if is_full {
            let more = 2 * OLD * CLUSTER / 4096;
            disk.change_medium(|medium| medium.capacity = Some(space + more));
            assert_eq!(rig.grow(sectors(HUGE)), Err(EngineError::NoSpace));
        } else {
            rig.control(Control::PrepareGrowth(sectors(HUGE))).unwrap();
            rig.control(Control::AbandonGrowth).unwrap();
            let used = disk.used_blocks();
            disk.change_medium(|medium| medium.capacity = Some(used));
        }
        for cluster in 1..OLD {
            rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
        }
        rig.flush().unwrap();
        rig.check_full();
        disk.change_medium(|medium| medium.capacity = None);
        rig.grow(sectors(HUGE)).unwrap();
        rig.check_full();
        rig.reopen().check_full();
    }
}

#[test]
fn a_suspended_disk_keeps_its_size_and_nobody_waits() {
    let disk = full(2);
    let rig = Rig::open(&disk, 1, options());
    rig.control(Control::Suspend).unwrap();
    let prepared = rig.control(Control::PrepareGrowth(sectors(NEW)));
    assert_eq!(prepared, Err(EngineError::Suspended));
    rig.control(Control::Resume).unwrap();
    rig.control(Control::PrepareGrowth(sectors(NEW))).unwrap();
    rig.control(Control::Suspend).unwrap();
    let committed = rig.control(Control::CommitGrowth);
    assert_eq!(committed, Err(EngineError::Suspended));
    rig.control(Control::Resume).unwrap();
    assert_eq!(rig.engine.disk_size(), sectors(OLD));
    // One that was begun before ends.
    rig.control(Control::PrepareGrowth(sectors(NEW))).unwrap();
    let growth = rig.engine.control(Control::CommitGrowth);
    rig.control(Control::Suspend).unwrap();
    while growth.get().is_none() {
        rig.turn();
    }
    assert_eq!(growth.get(), Some(Ok(())));
    assert_eq!(rig.engine.disk_size(), sectors(NEW));
    rig.control(Control::Resume).unwrap();
    rig.check_full();
}

#[test]
fn one_grows_at_a_time_and_one_that_is_given_up_leaves_nothing() {
    let disk = full(2);
    let rig = Rig::open(&disk, 1, options());
    let first = rig.engine.control(Control::PrepareGrowth(sectors(NEW)));
    let second = rig.control(Control::PrepareGrowth(sectors(NEW)));
    assert_eq!(second, Err(EngineError::Growing));
    assert_eq!(
        rig.control(Control::CommitGrowth),
        Err(EngineError::Growing)
    );
    rig.control(Control::AbandonGrowth).unwrap();
    while first.get().is_none() {
        rig.turn();
    }
    assert_eq!(first.get(), Some(Err(EngineError::Stopped)));
    rig.check_full();
    let rig = rig.reopen();
    rig.check_full();
    assert_eq!(rig.engine.disk_size(), sectors(OLD));
    rig.grow(sectors(NEW)).unwrap();
    rig.check_full();
}

#[test]
fn what_was_prepared_and_given_up_is_in_nobodys_way() {
    let rig = Rig::open(&full(2), 1, options());
    let prepare = Control::PrepareGrowth(sectors(NEW));
    rig.control(prepare).unwrap();
    // All of it before the metadata thread has a look.
    let given_up = rig.engine.control(Control::AbandonGrowth);
    let committed = rig.engine.control(Control::CommitGrowth);
    let prepared = rig.engine.control(prepare);
    while prepared.get().is_none() {
        rig.turn();
    }
    assert_eq!(given_up.get(), Some(Ok(())));
    assert_eq!(committed.get(), Some(Err(EngineError::NotPrepared)));
    assert_eq!(prepared.get(), Some(Ok(())));
    rig.control(Control::CommitGrowth).unwrap();
    assert_eq!(rig.engine.disk_size(), sectors(NEW));
    rig.check_full();
}

#[test]
fn a_header_that_could_not_be_written_can_be_committed_again() {
    let disk = full(2);
    let rig = Rig::open(&disk, 1, options());
    rig.control(Control::PrepareGrowth(sectors(NEW))).unwrap();
    disk.change_medium(|medium| medium.faults.write = 1.0);
    let error = rig.control(Control::CommitGrowth).unwrap_err();
    assert_eq!(error, EngineError::Metadata(Errno::IO));
    assert_eq!(rig.engine.disk_size(), sectors(OLD));
    disk.change_medium(|medium| medium.faults.write = 0.0);
    rig.grow(sectors(NEW)).unwrap();
    assert_eq!(rig.engine.disk_size(), sectors(NEW));
    rig.check_full();
    rig.reopen().check_full();
}

#[test]
fn an_image_that_is_closed_meanwhile_is_as_it_was() {
    for turns in 0..60 {
        let disk = full(2);
        let rig = Rig::open(&disk, 1, options());
        let growth = rig.engine.control(Control::PrepareGrowth(sectors(NEW)));
        (0..turns).for_each(|_| rig.turn());
        rig.control(Control::Close).unwrap();
        assert!(growth.get().is_some());
        drop(rig);
        check_image(&disk);
        assert_eq!(header(&disk).geometry().disk_size, sectors(OLD));
        Rig::open(&disk, 1, options()).check_full();
    }
}

/// Operations that have begun may end, and no more.
fn expect_suspension_to_hold_it(rig: &Rig, growth: &Outcome) {
    rig.control(Control::Suspend).unwrap();
    let before = growth.get();
    let is_locked = || rig.engine.bat.iter().any(|entry| entry.is_locked());
    for _ in 0..60 {
        assert!(!is_locked(), "a write to it would wait");
        rig.turn();
    }
    assert_eq!(growth.get(), before);
    rig.control(Control::Resume).unwrap();
}

/// What has to move does not move at once.
#[test]
fn no_more_clusters_are_moved_while_the_engine_is_suspended() {
    const CLUSTERS: u64 = 700;
    let content = |cluster: u64| [cluster as u8; 512];
    let disk = empty_of(2, CLUSTERS);
    let rig = Rig::open(&disk, 1, options());
    for cluster in 0..CLUSTERS {
        rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
    }
    // Its BAT takes 611 clusters, and 512 are moved at once.
    let size = sectors(5_000_000);
    let growth = rig.engine.control(Control::PrepareGrowth(size));
    while !rig.engine.bat.iter().any(|entry| entry.is_locked()) {
        rig.turn();
    }
    expect_suspension_to_hold_it(&rig, &growth);
    let first = rig.engine.alloc().first();
    let mut mapped = rig.engine.mapped_here().into_iter();
    assert!(mapped.any(|(_, host)| host.0 < first), "not all has moved");
    while growth.get().is_none() {
        rig.turn();
    }
    assert_eq!(growth.get(), Some(Ok(())));
    rig.control(Control::CommitGrowth).unwrap();
    for cluster in 0..CLUSTERS {
        assert_eq!(rig.read(cluster * CLUSTER, 512), content(cluster));
    }
}

#[test]
fn it_waits_while_the_engine_is_suspended() {
    for turns in 0..40 {
        let disk = full(2);
        let rig = Rig::open(&disk, 1, options());
        let growth = rig.engine.control(Control::PrepareGrowth(sectors(NEW)));
        (0..turns).for_each(|_| rig.turn());
        expect_suspension_to_hold_it(&rig, &growth);
        while growth.get().is_none() {
            rig.turn();
        }
        assert_eq!(growth.get(), Some(Ok(())));
        rig.control(Control::CommitGrowth).unwrap();
        rig.check_full();
    }
}

/// Lets all have turns but the second queue.
fn turn_without_second(rig: &Rig) {
    for _ in 0..500 {
        rig.poll_queue(0);
        rig.poll_runners();
        rig.poll_md();
        rig.step_disk();
    }
}

/// It may still do what only the old size allows.
#[test]
fn a_disk_has_grown_when_nobody_is_left_that_has_seen_the_old_size() {
    let rig = Rig::open(&full(2), 1, options()).and_a_queue();
    rig.control(Control::PrepareGrowth(sectors(NEW))).unwrap();
    // A read that nobody looks after.
    let data = rig.segments(&[0; 512]);
    let start = Sector(0);
    rig.push_to(1, Command::Read { start, data });
    let growth = rig.engine.control(Control::CommitGrowth);
    turn_without_second(&rig);
    assert_eq!(rig.engine.disk_size(), sectors(NEW), "as far as it goes");
    assert_eq!(growth.get(), None);
    // Nobody would tell the metadata thread of the end of the read.
    let looks_again = rig.md.borrow_mut().poll(rig.now.get());
    assert_eq!(looks_again, Some(Duration::from_millis(1)));
    while growth.get().is_none() {
        rig.turn();
    }
    assert_eq!(growth.get(), Some(Ok(())));
}

/// It is given one that lies where the BAT goes, and has not mapped it yet.
#[test]
fn who_has_been_given_a_cluster_in_the_way_is_waited_for() {
    let disk = empty(2);
    let rig = Rc::new(Rig::open(&disk, 1, options()).and_a_queue());
    rig.write(0, &content(0)).unwrap();
    let growth = Rc::new(RefCell::new(None));
    let (others, begun) = (rig.clone(), growth.clone());
    let hook = preempt::once("allocated", move || {
        let growth = others.engine.control(Control::PrepareGrowth(sectors(NEW)));
        turn_without_second(&others);
        assert_eq!(growth.get(), None);
        *begun.borrow_mut() = Some(growth);
    });
    let write = rig.push_write_to(1, CLUSTER, &content(1));
    drop(hook);
    assert_eq!(rig.result(write), Ok(()));
    let growth = growth.borrow_mut().take().expect("it was given one");
    while growth.get().is_none() {
        rig.turn();
    }
    assert_eq!(growth.get(), Some(Ok(())));
    rig.control(Control::CommitGrowth).unwrap();
    for cluster in 0..2 {
        assert!(rig.read(cluster * CLUSTER, CLUSTER as usize) == content(cluster));
    }
    rig.control(Control::Close).unwrap();
    check_image(&disk);
}

/// What is there was no entry before.
#[test]
fn what_follows_the_last_entry_in_its_page_does_not_become_entries() {
    // The second one has entries in two pages.
    let disks = [(1, OLD), (2, OLD), (1, 1500), (2, 1500)];
    // So many entries more in the same page, and more than there is room for.
    let cases = disks.map(|(version, old)| [(version, old, old + 10), (version, old, NEW)]);
    for (version, old, size) in cases.into_iter().flatten() {
        let disk = empty_of(version, old);
        let geometry = *header(&disk).geometry();
        let page_end = geometry.metadata_len().next_multiple_of(Geometry::MD_PAGE);
        let rest = page_end.min(geometry.data_start) - geometry.metadata_len();
        disk.prepare(
            FileId(0),
            geometry.metadata_len(),
            &vec![0x11; rest as usize],
        );
        let rig = Rig::open(&disk, 1, options());
        for cluster in 0..OLD {
            rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
        }
        rig.grow(sectors(size)).unwrap();
        let expect_zeros = |rig: &Rig| {
            let behind = (size - old).min(100) * CLUSTER;
            let read = rig.read(old * CLUSTER, behind as usize);
            assert!(read.iter().all(|byte| *byte == 0));
        };
        expect_zeros(&rig);
        let rig = rig.reopen();
        rig.check_full();
        check_image(&disk);
        expect_zeros(&rig);
    }
}

/// Where zeros have to be written by hand, blocks are read and written for that.
#[test]
fn nothing_is_zeroed_where_a_page_may_be_written() {
    let disk = full(2);
    let rig = Rig::open(&disk, 1, options());
    disk.start_trace();
    rig.grow(sectors(NEW)).unwrap();
    let trace = disk.take_trace();
    let zeroed = trace.iter().filter(|line| line.contains(": Zero {"));
    let zeroed: Vec<_> = zeroed
        .filter(|line| line.contains("KeepAllocated"))
        .collect();
    assert_eq!(zeroed.len(), 1, "{trace:?}");
    let offset = format!("offset: {:x},", Geometry::MD_PAGE);
    assert!(zeroed[0].contains(&offset), "{zeroed:?}");
}

/// Not the clusters that its own BAT has taken.
#[test]
fn a_growth_that_is_given_up_leaves_the_one_before_what_it_has() {
    let disk = full(2);
    let rig = Rig::open(&disk, 1, options());
    // Some are free, in the way.
    rig.discard(0, 4 * CLUSTER).unwrap();
    rig.flush().unwrap();
    for _ in 0..100 {
        rig.turn();
    }
    rig.grow(sectors(NEW)).unwrap();
    rig.control(Control::PrepareGrowth(sectors(3 * NEW)))
        .unwrap();
    rig.control(Control::AbandonGrowth).unwrap();
    let first = rig.engine.geometry().first_host_cluster();
    for cluster in 0..2 * OLD {
        rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
    }
    let mapped = rig.engine.mapped_here();
    assert!(mapped.iter().all(|(_, host)| *host >= first));
    rig.reopen().check_full();
    check_image(&disk);
}

/// Where the end of the disk was in the midst of a cluster, that has moved.
#[test]
fn the_place_of_what_has_moved_and_is_not_in_the_way_is_used_again() {
    let disk = SimDisk::new(1, Medium::default(), 1);
    let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
    let header = Header::new(Sector(sectors(OLD).0 - 8), cluster).unwrap();
    disk.prepare(FileId(0), header.geometry().data_start - 512, &[0; 512]);
    disk.prepare(FileId(0), 0, &header.to_bytes());
    let rig = Rig::open(&disk, 1, options());
    let last = CLUSTER as usize - 4096;
    rig.write((OLD - 1) * CLUSTER, &content(3)[..last]).unwrap();
    rig.flush().unwrap();
    // As other programs leave it.
    let end = header.geometry().data_start + last as u64;
    disk.prepare(FileId(0), end, &[0x11; 4096]);
    rig.grow(sectors(OLD)).unwrap();
    for cluster in 0..OLD - 1 {
        rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
        rig.flush().unwrap();
    }
    let hosts = rig.engine.mapped_here().into_iter().map(|(_, host)| host.0);
    let mut hosts: Vec<_> = hosts.collect();
    hosts.sort_unstable();
    let first = header.geometry().first_host_cluster().0;
    assert_eq!(hosts, (first..first + OLD as u32).collect::<Vec<_>>());
    let read = rig.read((OLD - 1) * CLUSTER, CLUSTER as usize);
    assert!(read[..last] == content(3)[..last] && read[last..] == [0; 4096]);
}

/// The number behind `name` in a line of a trace.
fn number(line: &str, name: &str) -> Option<u64> {
    let (_, rest) = line.split_once(name)?;
    let end = rest.find(|digit: char| !digit.is_ascii_hexdigit());
    u64::from_str_radix(&rest[..end.unwrap_or(rest.len())], 16).ok()
}

/// Grows a disk to such a size, of which the host does so many steps a turn: all that is
/// written or punched where the BAT goes, and that `is_meant`, has ended before the file is
/// made longer for that. How much there is of it.
fn expect_none_in_the_way(rig: &Rig, size: u64, steps: usize, is_meant: fn(&str) -> bool) -> usize {
    let growth = rig.engine.control(Control::PrepareGrowth(sectors(size)));
    while growth.get().is_none() {
        rig.turn();
        (1..steps).for_each(|_| rig.step_disk());
    }
    assert_eq!(growth.get(), Some(Ok(())));
    rig.control(Control::CommitGrowth).unwrap();
    let trace = rig.disk.take_trace();
    let starts = |line: &str| line.contains(" starts ");
    let is_long = |line: &str| {
        let len = number(line, "len: ");
        line.contains("Allocate") && len.is_some_and(|len| len > 100 * CLUSTER)
    };
    let making = trace.iter().position(|line| starts(line) && is_long(line));
    let making = making.expect("the file has become longer");
    let meant = trace.iter().filter(|line| starts(line) && is_meant(line));
    let mut count = 0;
    for line in meant {
        let (_, id) = line.split_once(" starts ").expect("it starts");
        let (id, _) = id.split_once(':').expect("it has a number");
        let end = trace
            .iter()
            .position(|line| line.starts_with(&format!("{id} ends")));
        assert!(end.is_some_and(|end| end < making), "{trace:#?}");
        count += 1;
    }
    count
}

/// Its BAT takes 129 clusters.
const HUGE: u64 = 1 << 20;

#[test]
fn nothing_is_punched_any_more_where_the_bat_goes_when_that_is_made() {
    let mut punched = 0;
    for turns in 0..40 {
        let disk = full(2);
        let rig = Rig::open(&disk, 1, options());
        disk.start_trace();
        // Each is a hole of its own.
        let clusters = (0..OLD).step_by(2);
        let ranges = clusters.map(|cluster| range(cluster * CLUSTER, CLUSTER));
        rig.push(Command::Discard {
            ranges: ranges.collect(),
        });
        (0..turns).for_each(|_| rig.turn());
        let is_punch = |line: &str| line.contains("Punch");
        punched += expect_none_in_the_way(&rig, HUGE, 1 + turns % 5, is_punch);
    }
    assert!(punched > 100, "{punched}");
}

#[test]
fn nothing_is_copied_any_more_to_where_the_bat_goes_when_that_is_made() {
    // The second runner has them.
    const FIRST: u64 = 64;
    const COPIES: u64 = 6;
    let mut copied = 0;
    for turns in 0..40 {
        let disk = empty_image(Medium::default(), 2, 2 * FIRST * CLUSTER);
        let base = Rig::open(&disk, 1, options());
        for cluster in FIRST..FIRST + COPIES {
            base.write(cluster * CLUSTER, &content(cluster)).unwrap();
        }
        base.control(Control::Close).unwrap();
        drop(base);
        let rig = Rig::open(&disk, 2, options()).and_a_queue();
        disk.start_trace();
        let write = |cluster| rig.push_write_to(1, cluster * CLUSTER, &[7; 512]);
        let writes: Vec<_> = (FIRST..FIRST + COPIES).map(write).collect();
        (0..turns).for_each(|_| rig.turn());
        copied += expect_none_in_the_way(&rig, HUGE, 1 + turns % 5, |line| {
            let offset = number(line, "write file 1 0x");
            let is_cluster = line.contains(&format!("+{CLUSTER:#x} "));
            is_cluster && offset.is_some_and(|offset| offset < 100 * CLUSTER)
        });
        for write in writes {
            rig.result(write).unwrap();
        }
        for cluster in FIRST..FIRST + COPIES {
            let expected = [&[7; 512], &content(cluster)[512..]].concat();
            assert!(rig.read(cluster * CLUSTER, CLUSTER as usize) == expected);
        }
    }
    assert!(copied > 50, "{copied}");
}

/// What could not be copied, or of which it is not known that it is stable, stays.
#[test]
fn what_cannot_be_moved_stays_where_it_is() {
    use crate::sim::disk::Faults;
    let error = EngineError::Io(Errno::IO);
    let (mut read, mut write, mut sync) = [Faults::default(); 3].into();
    (read.read, write.write, sync.sync) = (1.0, 1.0, 1.0);
    for (faults, expected) in [
        (read, error),
        (write, error),
        (sync, EngineError::SyncFailed),
    ] {
        let disk = full(2);
        let rig = Rig::open(&disk, 1, options());
        let before = rig.engine.mapped_here();
        disk.change_medium(|medium| medium.faults = faults);
        let prepared = rig.control(Control::PrepareGrowth(sectors(NEW)));
        assert_eq!(prepared, Err(expected));
        assert!(rig.engine.mapped_here() == before);
        disk.change_medium(|medium| medium.faults = Faults::default());
        rig.check_full();
        for cluster in 0..OLD {
            rig.write(cluster * CLUSTER, &content(cluster)).unwrap();
        }
        if expected == error {
            rig.grow(sectors(NEW)).unwrap();
            rig.reopen().check_full();
        }
    }
}

/// Some of it may have been written.
#[test]
fn where_a_copy_has_failed_to_go_nothing_of_it_is_read() {
    for seed in 0..8 {
        let medium = Medium::default();
        let disk = SimDisk::new(1, medium, seed);
        let image = full(2);
        let len = image.live_len(FileId(0)) as usize;
        disk.prepare(FileId(0), 0, &image.read_live(FileId(0), 0, len));
        let rig = Rig::open(&disk, 1, options());
        disk.change_medium(|medium| medium.faults.write = 1.0);
        let prepared = rig.control(Control::PrepareGrowth(sectors(NEW)));
        assert_eq!(prepared, Err(EngineError::Io(Errno::IO)));
        disk.change_medium(|medium| medium.faults.write = 0.0);
        rig.grow(sectors(OLD + 10)).unwrap();
        for cluster in OLD..OLD + 10 {
            rig.write(cluster * CLUSTER, &[7; 512]).unwrap();
            let read = rig.read(cluster * CLUSTER + 512, CLUSTER as usize - 512);
            assert!(read.iter().all(|byte| *byte == 0), "{seed} {cluster}");
        }
    }
}

#[test]
fn what_only_a_lower_delta_has_is_not_in_the_way_of_the_top() {
    let disk = empty_image(Medium::default(), 2, OLD * CLUSTER);
    fill_base(&disk);
    let options = Options {
        preallocation: 0,
        ..options()
    };
    let rig = Rig::open(&disk, 2, options);
    rig.grow(sectors(NEW)).unwrap();
    assert_eq!(disk.live_len(FileId(1)), 3 * CLUSTER);
    rig.check_full();
}

/// The BAT is longer than it has to be, and says where something is that no guest has seen.
#[test]
fn what_an_entry_behind_the_disk_maps_becomes_a_hole() {
    let disk = full(2);
    let mut bytes = disk.read_live(FileId(0), 0, Header::LEN);
    let smaller = OLD - 2;
    bytes[36..44].copy_from_slice(&sectors(smaller).0.to_le_bytes());
    disk.prepare(FileId(0), 0, &bytes);
    let rig = Rig::open(&disk, 1, options());
    assert_eq!(rig.engine.disk_size(), sectors(smaller));
    rig.grow(sectors(OLD)).unwrap();
    let mapped = rig.engine.mapped_here();
    assert_eq!(mapped.len() as u64, smaller);
    for cluster in smaller..OLD {
        assert_eq!(rig.read(cluster * CLUSTER, 512), [0; 512]);
    }
}

/// Both begin at the end of the file that is known.
#[test]
fn a_growth_and_writers_do_not_make_the_file_longer_at_a_time() {
    for (turns, is_first) in (0..30).flat_map(|turns| [(turns, true), (turns, false)]) {
        let disk = empty(2);
        let rig = Rig::open(&disk, 1, options()).and_a_queue();
        let grow = || rig.engine.control(Control::PrepareGrowth(sectors(NEW)));
        let write = |at| rig.push_write_to(1, at * CLUSTER, &content(at));
        let first = is_first.then(grow);
        let writes: Vec<_> = match is_first {
            true => {
                (0..turns).for_each(|_| rig.turn());
                (0..OLD).map(write).collect()
            }
            false => {
                let writes = (0..OLD).map(write).collect();
                (0..turns).for_each(|_| rig.turn());
                writes
            }
        };
        let growth = first.unwrap_or_else(grow);
        while growth.get().is_none() {
            rig.turn();
            let end = HostCluster(rig.engine.alloc().end());
            let end = rig.engine.grid().host_offset(end);
            assert!(end <= disk.live_len(FileId(0)), "after {turns} turns");
        }
        for write in writes {
            rig.result(write).unwrap();
        }
        assert_eq!(growth.get(), Some(Ok(())));
        rig.control(Control::CommitGrowth).unwrap();
        rig.check_full();
    }
}

#[test]
fn after_a_failed_sync_a_raw_file_keeps_its_length() {
    let disk = SimDisk::new(1, Medium::default(), 1);
    disk.prepare(FileId(0), 0, &content(3));
    let level = Level::Plain {
        size: Sector(CLUSTER / 512),
        cluster: ClusterSize::from_bytes(CLUSTER).unwrap(),
    };
    let rig = Rig::open_chain(&disk, vec![level], options());
    rig.write(0, &content(4)).unwrap();
    disk.change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(rig.flush(), Err(EngineError::SyncFailed));
    assert_eq!(rig.grow(sectors(9)), Err(EngineError::SyncFailed));
    assert_eq!(disk.live_len(FileId(0)), CLUSTER);
}

/// Nobody is to wait for what is there.
#[test]
fn a_disk_that_has_the_size_already_is_not_written_to() {
    let disk = full(2);
    let rig = Rig::open(&disk, 1, options());
    (0..100).for_each(|_| rig.turn());
    disk.start_trace();
    rig.grow(sectors(OLD)).unwrap();
    (0..100).for_each(|_| rig.turn());
    assert_eq!(disk.take_trace(), [""; 0]);
}

#[test]
fn what_is_written_behind_the_old_end_survives_the_process() {
    let disk = full(2);
    let options = Options {
        awaits_take_over: true,
        ..options()
    };
    let rig = Rig::open(&disk, 1, options.clone());
    let words = rig.engine.remembered_len() as usize / 8;
    let memory = SharedWords::new(words).unwrap();
    rig.engine.remember_in(memory.map_again().unwrap()).unwrap();
    rig.grow(sectors(NEW)).unwrap();
    rig.write((NEW - 1) * CLUSTER, &content(9)).unwrap();
    rig.write(0, &content(0)).unwrap();
    disk.kill();
    drop(rig);
    disk.restart();
    let rig = Rig::open(&disk, 1, options);
    let words = rig.engine.remembered_len() as usize / 8;
    rig.engine
        .take_over(memory.with_len(words).unwrap())
        .unwrap();
    assert!(rig.read((NEW - 1) * CLUSTER, CLUSTER as usize) == content(9));
    rig.check_full();
}
