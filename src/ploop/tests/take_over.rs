//! What completed survives the death of the process (I13).

use super::grow::{NEW, OLD, content, full, sectors};
use super::*;
use crate::format::GuestCluster;
use crate::ploop::{CopyUp, CopyUpStep, TakeOverError};
use crate::storage::SharedWords;

mod settled;

const SECTOR: usize = 512;

fn awaiting() -> Options {
    Options {
        awaits_take_over: true,
        ..options()
    }
}

/// An engine that remembers, and its memory, which the caller holds as QEMU does.
struct Mortal {
    rig: Rig,
    memory: SharedWords,
    levels: Vec<Level>,
}

/// Its process is killed; gives back the disk, for another one to open.
fn kill(rig: Rig) -> SimDisk {
    let disk = rig.disk.clone();
    disk.kill();
    drop(rig);
    disk.restart();
    disk
}

/// The same memory, as it comes back.
fn again(memory: &SharedWords) -> SharedWords {
    memory.map_again().unwrap()
}

impl Mortal {
    fn new(disk: &SimDisk, levels: Vec<Level>) -> Self {
        let rig = Rig::open_chain(disk, levels.clone(), awaiting());
        let words = rig.engine.remembered_len() as usize / 8;
        let memory = SharedWords::new(words).unwrap();
        rig.engine.remember_in(again(&memory)).unwrap();
        Self {
            rig,
            memory,
            levels,
        }
    }

    fn single() -> Self {
        let disk = empty_image(Medium::default(), 1, 16 * CLUSTER);
        Self::new(&disk, vec![Level::Ploop])
    }

    fn chain() -> Self {
        let disk = empty_image(Medium::default(), 2, 4 * CLUSTER);
        let base = Rig::open(&disk, 1, options());
        base.write(0, &vec![1; 2 * CLUSTER as usize]).unwrap();
        base.control(Control::Close).unwrap();
        drop(base);
        Self::new(&disk, vec![Level::Ploop; 2])
    }

    /// The process is killed, and another one opens the disk.
    fn die(self) -> (Rig, SharedWords) {
        let Self {
            rig,
            memory,
            levels,
        } = self;
        (Rig::open_chain(&kill(rig), levels, awaiting()), memory)
    }

    /// The process is killed, and another one takes over.
    fn die_and_rise(self) -> Self {
        let levels = self.levels.clone();
        let (rig, memory) = self.die();
        assert!(rig.engine.awaits_take_over());
        rig.engine.take_over(again(&memory)).unwrap();
        assert!(!rig.engine.awaits_take_over());
        Self {
            rig,
            memory,
            levels,
        }
    }
}

impl Rig {
    fn turns_of(&self, duration: Duration) {
        let end = self.now.get() + duration;
        while self.now.get() < end {
            self.turn();
        }
    }
}

#[test]
fn a_write_that_was_not_flushed_survives_the_process() {
    let mut mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal.rig.write(9 * CLUSTER, &[8; SECTOR]).unwrap();
    for _ in 0..3 {
        mortal = mortal.die_and_rise();
        assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
        assert_eq!(mortal.rig.read(9 * CLUSTER, SECTOR), [8; SECTOR]);
    }
    mortal.rig.flush().unwrap();
    let disk = mortal.rig.disk.clone();
    disk.power_off();
    drop(mortal);
    disk.power_on();
    let rig = Rig::open(&disk, 1, options());
    assert_eq!(rig.read(0, SECTOR), [7; SECTOR]);
    assert_eq!(rig.read(9 * CLUSTER, SECTOR), [8; SECTOR]);
}

#[test]
fn without_the_memory_the_same_write_is_gone() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let (rig, _) = mortal.die();
    assert!(rig.engine.awaits_take_over());
    rig.engine.begin();
    assert_eq!(rig.read(0, SECTOR), [0; SECTOR]);
}

#[test]
fn a_process_that_nobody_came_to_leaves_it_to_the_next_one() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let levels = mortal.levels.clone();
    let (rig, memory) = mortal.die();
    rig.control(Control::Close).unwrap();
    let disk = rig.disk.clone();
    drop(rig);
    let rig = Rig::open_chain(&disk, levels, awaiting());
    assert!(rig.engine.awaits_take_over());
    rig.engine.take_over(again(&memory)).unwrap();
    assert_eq!(rig.read(0, SECTOR), [7; SECTOR]);
}

#[test]
fn a_discard_survives_the_process_and_its_cluster_comes_back() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &vec![7; 2 * CLUSTER as usize]).unwrap();
    mortal.rig.flush().unwrap();
    mortal.rig.discard(0, CLUSTER).unwrap();
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [0; SECTOR]);
    assert_eq!(mortal.rig.read(CLUSTER, SECTOR), [7; SECTOR]);
    for round in 0..20 {
        mortal.rig.write(CLUSTER * 3, &[round; SECTOR]).unwrap();
        mortal.rig.discard(CLUSTER * 3, CLUSTER).unwrap();
        mortal.rig.flush().unwrap();
    }
    let end = mortal.rig.disk.live_len(FileId(0));
    assert!(end <= 12 * CLUSTER, "clusters are used again: {end}");
}

#[test]
fn a_discarded_cluster_that_was_given_out_again_is_the_other_ones() {
    let mut mortal = Mortal::single();
    for round in 1..40_u8 {
        let at = u64::from(round % 8) * CLUSTER;
        mortal.rig.write(at, &[round; SECTOR]).unwrap();
        mortal.rig.discard(at, CLUSTER).unwrap();
        mortal.rig.write(at, &[round; SECTOR]).unwrap();
        mortal
            .rig
            .turns_of(Duration::from_millis(u64::from(round) * 40));
        if round % 4 == 0 {
            mortal = mortal.die_and_rise();
        }
        for back in 0..8.min(round) {
            let round = round - back;
            let at = u64::from(round % 8) * CLUSTER;
            assert_eq!(mortal.rig.read(at, SECTOR), [round; SECTOR]);
        }
    }
}

#[test]
fn a_copy_survives_the_process_and_is_stable_before_it_is_mapped() {
    let mortal = Mortal::chain();
    mortal.rig.write(SECTOR as u64, &[7; SECTOR]).unwrap();
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [1; SECTOR]);
    assert_eq!(mortal.rig.read(SECTOR as u64, SECTOR), [7; SECTOR]);
    // Nobody flushes: the page is written, and then the power goes.
    mortal.rig.turns_of(Duration::from_secs(3));
    let disk = mortal.rig.disk.clone();
    disk.power_off();
    drop(mortal);
    disk.power_on();
    let rig = Rig::open(&disk, 2, options());
    assert_eq!(rig.read(0, SECTOR), [1; SECTOR]);
    assert!(
        [[1; SECTOR], [7; SECTOR]].contains(&rig.read(SECTOR as u64, SECTOR).try_into().unwrap())
    );
}

#[test]
fn a_failed_sync_is_remembered() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 0.0);
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
}

#[test]
fn after_a_failed_sync_a_copy_is_not_mapped_by_the_next_process_either() {
    let mortal = Mortal::chain();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 0.0);
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
    mortal.rig.turns_of(Duration::from_secs(3));
    assert_eq!(mortal.rig.disk.read_live(FileId(1), 64, 4), [0; 4]);
}

/// The entry of a cluster, as the file of the top has it.
fn entry_on_disk(rig: &Rig, cluster: u64) -> u32 {
    let top = FileId((rig.engine.levels.len() - 1) as u8);
    let bytes = rig.disk.read_live(top, 64 + 4 * cluster, 4);
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

/// Also where the file is long enough for sure, since the disk maps what lies behind it.
#[test]
fn after_a_failed_sync_a_copy_in_front_of_mapped_clusters_is_not_mapped_either() {
    // With its entry in a page that is no neighbour of the first.
    const OTHER: u64 = 2100;
    let disk = empty_image(Medium::default(), 2, (OTHER + 1) * CLUSTER);
    let base = Rig::open(&disk, 1, options());
    for cluster in [0, OTHER] {
        base.write(cluster * CLUSTER, &[1; SECTOR]).unwrap();
    }
    base.control(Control::Close).unwrap();
    drop(base);
    let mortal = Mortal::new(&disk, vec![Level::Ploop; 2]);
    for cluster in [0, OTHER] {
        let at = cluster * CLUSTER + SECTOR as u64;
        mortal.rig.write(at, &[7; SECTOR]).unwrap();
    }
    mortal.rig.engine.bat.mark_urgent(2);
    mortal.rig.turns_of(Duration::from_millis(100));
    let copies = [0, OTHER].map(|cluster| entry_on_disk(&mortal.rig, cluster));
    assert_eq!(copies[0], 0);
    assert_ne!(copies[1], 0);
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 0.0);
    let mortal = mortal.die_and_rise();
    mortal.rig.turns_of(Duration::from_secs(3));
    assert_eq!(entry_on_disk(&mortal.rig, 0), 0);
    assert_eq!(mortal.rig.read(0, SECTOR), [1; SECTOR]);
    assert_eq!(mortal.rig.read(SECTOR as u64, SECTOR), [7; SECTOR]);
}

/// Where nothing can be a copy, a failed sync keeps back only what the file may be too
/// short for.
#[test]
fn after_a_failed_sync_the_next_process_goes_on_mapping_what_was_in_the_file() {
    let mortal = Mortal::single();
    for cluster in [0, 1] {
        mortal.rig.write(cluster * CLUSTER, &[7; SECTOR]).unwrap();
    }
    mortal.rig.flush().unwrap();
    let first = entry_on_disk(&mortal.rig, 0);
    mortal.rig.discard(0, CLUSTER).unwrap();
    mortal.rig.turns_of(Duration::from_millis(100));
    mortal.rig.flush().unwrap();
    // The first of these gets the cluster that has come back, and the last ones some
    // that the file has got since it was synced.
    for cluster in 5..14 {
        mortal.rig.write(cluster * CLUSTER, &[8; SECTOR]).unwrap();
    }
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 0.0);
    assert_eq!(entry_on_disk(&mortal.rig, 5), 0);
    let mortal = mortal.die_and_rise();
    mortal.rig.turns_of(Duration::from_secs(3));
    assert_eq!(entry_on_disk(&mortal.rig, 5), first);
    for cluster in 6..14 {
        assert_eq!(entry_on_disk(&mortal.rig, cluster), 0, "{cluster}");
        assert_eq!(mortal.rig.read(cluster * CLUSTER, SECTOR), [8; SECTOR]);
    }
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
}

/// Of the disk of one file or two, just when the first cluster has moved, since the disk
/// grows: memory knows, and the file has the entry that is returned.
fn moved(files: usize) -> (Mortal, u32) {
    let disk = match files {
        1 => full(2),
        _ => {
            let disk = empty_image(Medium::default(), files, OLD * CLUSTER);
            for levels in 1..=files {
                let rig = Rig::open(&disk, levels, options());
                for cluster in 0..OLD {
                    let byte = if levels == files {
                        cluster as u8 + 1
                    } else {
                        0xaa
                    };
                    let data = vec![byte; CLUSTER as usize];
                    rig.write(cluster * CLUSTER, &data).unwrap();
                }
                rig.control(Control::Close).unwrap();
            }
            disk
        }
    };
    let mortal = Mortal::new(&disk, vec![Level::Ploop; files]);
    let place = || mortal.rig.engine.bat.get(GuestCluster(0)).place();
    let (before, on_disk) = (place(), entry_on_disk(&mortal.rig, 0));
    mortal
        .rig
        .engine
        .control(Control::PrepareGrowth(sectors(NEW)));
    for _ in 0..10_000 {
        mortal.rig.poll_runners();
        if place() != before {
            break;
        }
        mortal.rig.poll_md();
        mortal.rig.step_disk();
    }
    assert_ne!(place(), before);
    assert_eq!(entry_on_disk(&mortal.rig, 0), on_disk);
    (mortal, on_disk)
}

/// What the file of the top has where the entry says.
fn data_at(rig: &Rig, entry: u32) -> Vec<u8> {
    let top = FileId((rig.engine.levels.len() - 1) as u8);
    rig.disk
        .read_live(top, u64::from(entry) * CLUSTER, CLUSTER as usize)
}

/// A power cut may bring back the entry.
#[test]
fn what_has_moved_stays_where_it_was_until_the_disk_knows() {
    for files in [1, 2] {
        let (mortal, before) = moved(files);
        let mortal = mortal.die_and_rise();
        mortal.rig.turns_of(Duration::from_millis(100));
        assert_eq!(entry_on_disk(&mortal.rig, 0), before);
        assert!(data_at(&mortal.rig, before) == content(0));
        // And it is punched in the end, when a cut brings back nothing.
        let mut turns = 0;
        while data_at(&mortal.rig, before) == content(0) {
            turns += 1;
            assert!(turns < 10_000, "it is never punched");
            if turns == 5000 {
                mortal.rig.flush().unwrap();
            }
            mortal.rig.turn();
        }
        mortal.rig.check_full();
        mortal.rig.cut().check_full();
    }
}

#[test]
fn after_a_failed_sync_what_has_moved_is_still_mapped_where_it_was() {
    for files in [1, 2] {
        let (mortal, before) = moved(files);
        mortal.rig.engine.set_sync_failed("a sync in a test");
        let mut mortal = mortal.die_and_rise();
        for _ in 0..2 {
            mortal.rig.turns_of(Duration::from_secs(8));
            mortal.rig.check_full();
            assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
            assert_eq!(entry_on_disk(&mortal.rig, 0), before, "{files} files");
            assert!(data_at(&mortal.rig, before) == content(0));
            mortal = mortal.die_and_rise();
        }
    }
}

#[test]
fn memory_of_another_opening_is_refused_and_changes_nothing() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let (rig, memory) = mortal.die();
    // Somebody else has used the image, and was killed too.
    rig.engine.begin();
    rig.write(CLUSTER, &[9; SECTOR]).unwrap();
    rig.flush().unwrap();
    let error = rig.engine.take_over(again(&memory)).unwrap_err();
    assert!(matches!(error, TakeOverError::Begun));
    let rig = Rig::open(&kill(rig), 1, awaiting());
    let error = rig.engine.take_over(again(&memory)).unwrap_err();
    assert!(matches!(error, TakeOverError::Changed));
    rig.engine.begin();
    assert_eq!(rig.read(0, SECTOR), [0; SECTOR]);
    assert_eq!(rig.read(CLUSTER, SECTOR), [9; SECTOR]);
}

/// An engine that serves the image only to readers, as the next process.
fn reader(disk: &SimDisk, levels: &[Level]) -> Rig {
    let above = FileId(levels.len() as u8);
    disk.change_medium(|medium| medium.first_writable = above);
    let options = Options {
        read_only: true,
        ..awaiting()
    };
    Rig::open_chain(disk, levels.to_vec(), options)
}

#[test]
fn who_only_reads_has_no_use_for_what_a_writer_knew() {
    use std::sync::atomic::Ordering::Relaxed;
    const AT_OPENING: usize = 6;
    // One whose opening had a name, and one on a file system that keeps none.
    for is_named in [true, false] {
        let mortal = Mortal::single();
        mortal.rig.write(0, &[7; SECTOR]).unwrap();
        let Mortal {
            rig,
            memory,
            levels,
        } = mortal;
        let name = memory.word(AT_OPENING).unwrap();
        let old = name.load(Relaxed);
        if !is_named {
            name.store(0, Relaxed);
        }
        let disk = kill(rig);
        let rig = reader(&disk, &levels);
        assert!(rig.engine.awaits_take_over());
        let error = rig.engine.take_over(again(&memory)).unwrap_err();
        assert!(matches!(error, TakeOverError::ReadOnly), "{error}");
        rig.control(Control::Close).unwrap();
        kill(rig);
        // And who can use it still can.
        disk.change_medium(|medium| medium.first_writable = FileId(0));
        name.store(old, Relaxed);
        let rig = Rig::open_chain(&disk, levels, awaiting());
        rig.engine.take_over(again(&memory)).unwrap();
        assert_eq!(rig.read(0, SECTOR), [7; SECTOR]);
    }
}

#[test]
fn of_a_process_that_only_read_nothing_is_missed() {
    for is_closed in [true, false] {
        let disk = empty_image(Medium::default(), 1, 16 * CLUSTER);
        let rig = Rig::open(&disk, 1, options());
        rig.write(0, &[7; SECTOR]).unwrap();
        rig.flush().unwrap();
        if is_closed {
            rig.control(Control::Close).unwrap();
        }
        kill(rig);
        let levels = [Level::Ploop];
        let mut rig = reader(&disk, &levels);
        assert_eq!(rig.engine.awaits_take_over(), !is_closed);
        let words = rig.engine.remembered_len() as usize / 8;
        let memory = SharedWords::new(words).unwrap();
        rig.engine.remember_in(again(&memory)).unwrap();
        for _ in 0..3 {
            assert!(!rig.engine.awaits_take_over());
            assert_eq!(rig.read(0, SECTOR), [7; SECTOR]);
            kill(rig);
            rig = reader(&disk, &levels);
            rig.engine.take_over(again(&memory)).unwrap();
        }
        rig.control(Control::Close).unwrap();
    }
}

#[test]
fn who_only_reads_a_raw_image_knows_whether_somebody_may_come_back() {
    let mortal = mortal_of_raw_image();
    let Mortal { rig, levels, .. } = mortal;
    let disk = kill(rig);
    let rig = reader(&disk, &levels);
    assert!(rig.engine.awaits_take_over());
    kill(rig);
    disk.change_medium(|medium| medium.first_writable = FileId(0));
    let rig = Rig::open_chain(&disk, levels.clone(), options());
    rig.control(Control::Close).unwrap();
    drop(rig);
    let rig = reader(&disk, &levels);
    assert!(!rig.engine.awaits_take_over());
}

#[test]
fn memory_of_an_image_that_was_closed_meanwhile_is_refused() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let (rig, memory) = mortal.die();
    let disk = rig.disk.clone();
    drop(rig);
    disk.restart();
    // A tool that knows nothing of openings repairs it.
    let rig = Rig::open(&disk, 1, options());
    let opening = disk.opening(FileId(0)).unwrap().unwrap();
    rig.control(Control::Close).unwrap();
    drop(rig);
    disk.set_opening(FileId(0), opening).unwrap();
    disk.restart();
    let rig = Rig::open(&disk, 1, awaiting());
    let error = rig.engine.take_over(again(&memory)).unwrap_err();
    assert!(matches!(error, TakeOverError::Changed));
}

/// As another program does that has changed the image and knows nothing of openings.
fn close_by_hand(disk: &SimDisk) {
    const IN_USE: u64 = 44;
    disk.write_all_at(FileId(0), &[0; 4], IN_USE).unwrap();
}

/// Whoever is told that it completed may find the lock lost, and the process dead.
#[test]
fn a_change_that_completes_in_doubt_is_noted_and_does_not_wait() {
    let mortal = Mortal::single();
    mortal.rig.flush().unwrap();
    mortal.rig.engine.doubt_lock(false);
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
    // That a sync has failed holds up nothing but flushes, in doubt or not.
    mortal.rig.engine.doubt_lock(false);
    mortal.rig.write(0, &[8; SECTOR]).unwrap();
    mortal.rig.engine.trust_lock();
    mortal.rig.write(0, &[9; SECTOR]).unwrap();
}

/// Nothing can be written any more, and the memory said already that the disk has everything.
fn lose_lock_while_closing(mortal: &Mortal) {
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal.rig.flush().unwrap();
    let top = FileId(0);
    let name = mortal.rig.disk.opening(top).unwrap();
    mortal.rig.engine.begin_switch();
    mortal.rig.engine.lose_lock();
    mortal.rig.engine.end_switch();
    mortal.rig.engine.lose_lock();
    assert_eq!(mortal.rig.disk.opening(top).unwrap(), name);
}

#[test]
fn who_had_flushed_goes_on_though_the_lock_was_lost_while_the_image_was_closed() {
    let mortal = Mortal::single();
    lose_lock_while_closing(&mortal);
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
    mortal.rig.write(0, &[8; SECTOR]).unwrap();
    mortal.rig.flush().unwrap();
}

#[test]
fn who_has_lost_the_lock_while_the_image_was_closed_is_refused_if_another_had_it() {
    let mortal = Mortal::single();
    lose_lock_while_closing(&mortal);
    let (rig, memory) = mortal.die();
    rig.engine.begin();
    rig.write(0, &[9; SECTOR]).unwrap();
    rig.control(Control::Close).unwrap();
    let disk = kill(rig);
    let rig = Rig::open_chain(&disk, vec![Level::Ploop], awaiting());
    let refused = rig.engine.take_over(memory).unwrap_err();
    assert!(matches!(refused, TakeOverError::Changed), "{refused}");
}

#[test]
fn who_was_refused_is_refused_by_the_next_process_too() {
    for serves_another in [false, true] {
        let mortal = Mortal::single();
        mortal.rig.write(0, &[7; SECTOR]).unwrap();
        let Mortal {
            rig,
            memory,
            levels,
        } = mortal;
        let disk = kill(rig);
        close_by_hand(&disk);
        let second = Rig::open_chain(&disk, levels.clone(), awaiting());
        let error = second.engine.take_over(again(&memory)).unwrap_err();
        assert!(matches!(error, TakeOverError::Changed));
        if serves_another {
            second.engine.begin();
        }
        kill(second);
        let third = Rig::open_chain(&disk, levels, awaiting());
        let error = third.engine.take_over(again(&memory)).unwrap_err();
        assert!(matches!(error, TakeOverError::Changed));
    }
}

/// The guest would lose the disk that it is to go on with.
#[test]
fn an_image_that_is_passed_on_keeps_the_name_of_its_guest() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal.rig.control(Control::Pass).unwrap();
    let disk = mortal.rig.disk.clone();
    let opening = disk.opening(FileId(0)).unwrap();
    drop(mortal);
    disk.restart();
    let options = Options {
        is_passed_on: true,
        ..awaiting()
    };
    let rig = Rig::open(&disk, 1, options);
    assert_eq!(disk.opening(FileId(0)).unwrap(), opening);
    assert_eq!(rig.read(0, SECTOR), [7; SECTOR]);
}

/// Whatever the front-end writes there, nothing of it is believed unless all of it
/// can be true.
#[test]
fn damaged_memory_is_refused() {
    use std::sync::atomic::Ordering::Relaxed;
    const FIRST: usize = 512;
    let mapped = |level: u64, host: u64| 1 << 43 | 1 << 40 | level << 32 | host | 1 << 46;
    // First host cluster 1; the file has 9 clusters then.
    let cases: [&[(usize, u64)]; 8] = [
        &[(FIRST, u64::MAX)],
        &[(FIRST, 1)],
        &[(FIRST, mapped(0, 0))],
        &[(FIRST, mapped(0, 100))],
        &[(FIRST, mapped(0, u64::from(u32::MAX)))],
        &[(FIRST + 4, mapped(0, 5)), (FIRST + 5, mapped(0, 5))],
        &[(0, 1)],
        // It belongs to no opening.
        &[(6, 0)],
    ];
    for case in cases {
        let mortal = Mortal::single();
        mortal.rig.write(0, &[7; SECTOR]).unwrap();
        let (rig, memory) = mortal.die();
        let before: Vec<_> = case
            .iter()
            .map(|(at, bits)| memory.word(*at).unwrap().swap(*bits, Relaxed))
            .collect();
        rig.engine.take_over(again(&memory)).unwrap_err();
        assert_eq!(rig.read(0, SECTOR), [0; SECTOR], "nothing was adopted");
        for ((at, _), bits) in case.iter().zip(before) {
            memory.word(*at).unwrap().store(bits, Relaxed);
        }
        rig.engine.take_over(again(&memory)).unwrap();
        assert_eq!(rig.read(0, SECTOR), [7; SECTOR]);
    }
}

/// Nor can an entry be in a lower delta, which does not change.
#[test]
fn memory_that_maps_a_cluster_in_a_lower_delta_is_refused() {
    use std::sync::atomic::Ordering::Relaxed;
    let mortal = Mortal::chain();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let (rig, memory) = mortal.die();
    let word = memory.word(512).unwrap();
    word.fetch_and(!(0xff << 32), Relaxed);
    rig.engine.take_over(again(&memory)).unwrap_err();
}

/// Nor is a hole where the disk would show what lies below.
#[test]
fn memory_that_would_bring_a_lower_delta_to_light_is_refused() {
    use std::sync::atomic::Ordering::Relaxed;
    const FIRST: usize = 512;
    const HOLE: u64 = 1 << 43 | 1 << 46;
    let mortal = Mortal::chain();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let (rig, memory) = mortal.die();
    let word = memory.word(FIRST + 1).unwrap();
    word.store(HOLE, Relaxed);
    let error = rig.engine.take_over(again(&memory)).unwrap_err();
    assert!(matches!(error, TakeOverError::Damaged { cluster: 1, .. }));
    // Of a cluster that nothing has below it is one.
    word.store(0, Relaxed);
    memory.word(FIRST + 3).unwrap().store(HOLE, Relaxed);
    rig.engine.take_over(again(&memory)).unwrap();
    assert_eq!(rig.read(0, SECTOR), [7; SECTOR]);
    assert_eq!(rig.read(CLUSTER, SECTOR), [1; SECTOR]);
}

#[test]
fn the_memory_of_this_very_process_may_come_back() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal.rig.engine.take_over(again(&mortal.memory)).unwrap();
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
}

#[test]
fn new_memory_gets_what_the_disk_does_not_have() {
    let mut mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    // The guest has reset the device.
    let words = mortal.memory.len();
    mortal.memory = SharedWords::new(words).unwrap();
    mortal
        .rig
        .engine
        .remember_in(again(&mortal.memory))
        .unwrap();
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
}

#[test]
fn a_raw_image_remembers_a_failed_sync() {
    let mortal = mortal_of_raw_image();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 1.0);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 0.0);
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
}

/// A process is killed, and the next one's sync with this number, counted from 0, fails and
/// loses what the first one wrote; it ends, and no later sync fails. Whoever comes then must
/// not take over. `trouble` comes between the first two.
fn the_third_refuses(mortal: Mortal, failing: u32, trouble: impl FnOnce(&SimDisk)) {
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let Mortal {
        rig,
        memory,
        levels,
    } = mortal;
    let disk = kill(rig);
    trouble(&disk);
    disk.change_medium(|medium| medium.syncs_until_failure = Some(failing));
    let chain = Chain {
        levels: levels.clone(),
    };
    match Engine::open(disk.clone(), &chain, awaiting()) {
        Ok(opened) => {
            let rig = Rig::of(&disk, opened);
            assert!(rig.engine.awaits_take_over());
            let closed = rig.control(Control::Close);
            assert_eq!(closed, Err(EngineError::SyncFailed));
        }
        Err(error) => assert!(matches!(error, OpenError::Io { .. }), "{error}"),
    }
    disk.change_medium(|medium| {
        assert_eq!(medium.syncs_until_failure.take(), None, "none has failed");
        medium.len_max = u64::MAX;
    });
    disk.kill();
    disk.restart();
    let rig = Rig::open_chain(&disk, levels, awaiting());
    // Nor is a guest served that comes without its memory.
    assert!(rig.engine.awaits_take_over());
    let error = rig.engine.take_over(again(&memory)).unwrap_err();
    assert!(matches!(error, TakeOverError::Changed), "{error}");
}

fn mortal_of_raw_image() -> Mortal {
    let level = Level::Plain {
        size: Sector(4 * CLUSTER / 512),
        cluster: ClusterSize::from_bytes(CLUSTER).unwrap(),
    };
    Mortal::new(&SimDisk::new(1, Medium::default(), 1), vec![level])
}

#[test]
fn nobody_takes_over_once_the_sync_of_the_mark_has_failed() {
    the_third_refuses(Mortal::single(), 0, |_| ());
    the_third_refuses(Mortal::chain(), 0, |_| ());
}

/// Makes the last cluster one that is not whole.
fn add_a_part(disk: &SimDisk) {
    let top = FileId(0);
    disk.set_len(top, disk.live_len(top) + 512).unwrap();
}

#[test]
fn nobody_takes_over_once_the_sync_of_the_last_cluster_has_failed() {
    the_third_refuses(Mortal::single(), 1, add_a_part);
}

#[test]
fn nobody_takes_over_once_the_sync_of_a_mark_that_is_undone_has_failed() {
    the_third_refuses(Mortal::single(), 1, |disk| {
        add_a_part(disk);
        let len = disk.live_len(FileId(0));
        disk.change_medium(|medium| medium.len_max = len);
    });
}

#[test]
fn nobody_takes_over_a_raw_image_once_the_sync_of_its_length_has_failed() {
    the_third_refuses(mortal_of_raw_image(), 0, |disk| {
        disk.set_len(FileId(0), CLUSTER).unwrap();
    });
}

/// It has no mark, so what was written is synced by the end of that process only.
#[test]
fn nobody_takes_over_a_raw_image_once_the_end_of_a_process_in_vain_could_not_sync() {
    the_third_refuses(mortal_of_raw_image(), 0, |_| ());
}

/// There is nobody to be refused: the next guest is not kept waiting.
#[test]
fn a_sync_that_fails_at_the_opening_of_a_closed_raw_image_is_no_matter_to_the_next() {
    let Mortal {
        rig,
        memory: _,
        levels,
    } = mortal_of_raw_image();
    rig.control(Control::Close).unwrap();
    let disk = rig.disk.clone();
    drop(rig);
    disk.restart();
    disk.set_len(FileId(0), CLUSTER).unwrap();
    disk.change_medium(|medium| medium.syncs_until_failure = Some(0));
    let chain = Chain {
        levels: levels.clone(),
    };
    assert!(Engine::open(disk.clone(), &chain, awaiting()).is_err());
    disk.restart();
    let rig = Rig::open_chain(&disk, levels, awaiting());
    assert!(!rig.engine.awaits_take_over());
}

#[test]
fn a_stable_write_in_doubt_counts_as_a_failed_sync() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[5; SECTOR]).unwrap();
    assert!(mortal.rig.engine.begin_write_through(true).is_some());
    mortal.rig.write(0, &[6; SECTOR]).unwrap();
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 1.0);
    let data = mortal.rig.segments(&[7; SECTOR]);
    let start = Sector(0);
    mortal.rig.push(Command::Write { start, data });
    // Until the sync of the write has failed, which is heard; not any longer.
    while mortal.rig.disk.take_failures() == 0 {
        mortal.rig.queues[0].borrow_mut().submit();
        mortal.rig.disk.step();
    }
    let mut done = Vec::new();
    mortal.rig.queues[0].borrow_mut().poll(&mut done);
    assert!(done.is_empty(), "it is tried again");
    mortal
        .rig
        .disk
        .change_medium(|medium| medium.faults.sync = 0.0);
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.flush(), Err(EngineError::SyncFailed));
}

#[test]
fn a_doubt_that_was_resolved_is_none() {
    let mortal = Mortal::single();
    let rig = &mortal.rig;
    rig.write(0, &[5; SECTOR]).unwrap();
    assert!(rig.engine.begin_write_through(true).is_some());
    rig.write(0, &[6; SECTOR]).unwrap();
    rig.disk.change_medium(|medium| medium.faults.write = 1.0);
    let failed = rig.write(0, &[7; SECTOR]);
    assert_eq!(failed, Err(EngineError::Io(Errno::IO)));
    rig.disk.change_medium(|medium| medium.faults.write = 0.0);
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.flush(), Ok(()));
}

/// Nor by the process itself that was told of the failure.
#[test]
fn nobody_takes_over_when_a_sync_has_failed_before() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let (rig, memory) = mortal.die();
    let faults = |sync| rig.disk.change_medium(|medium| medium.faults.sync = sync);
    faults(1.0);
    let settled = rig.control(Control::Barrier);
    assert_eq!(settled, Err(EngineError::SyncFailed));
    faults(0.0);
    let error = rig.engine.take_over(again(&memory)).unwrap_err();
    assert!(matches!(error, TakeOverError::Changed), "{error}");
}

/// As if it had grown between the mapping of the memory and this.
#[test]
fn memory_that_is_shorter_than_a_disk_which_has_grown_is_made_longer() {
    for is_old in [false, true] {
        let disk = full(2);
        let mortal = Mortal::new(&disk, vec![Level::Ploop]);
        let short = again(&mortal.memory);
        mortal.rig.control(Control::Close).unwrap();
        let levels = mortal.levels.clone();
        let (rig, memory) = mortal.die();
        rig.control(Control::PrepareGrowth(sectors(NEW))).unwrap();
        rig.control(Control::CommitGrowth).unwrap();
        match is_old {
            true => rig.engine.take_over(short).unwrap(),
            false => rig.engine.remember_in(short).unwrap(),
        }
        rig.write((NEW - 1) * CLUSTER, &[9; SECTOR]).unwrap();
        let words = rig.engine.remembered_len() as usize / 8;
        let memory = memory.with_len(words).unwrap();
        let mortal = Mortal {
            rig,
            memory,
            levels,
        };
        let mortal = mortal.die_and_rise();
        assert_eq!(mortal.rig.read((NEW - 1) * CLUSTER, SECTOR), [9; SECTOR]);
        mortal.rig.check_full();
    }
}

/// The process is killed when the descriptor is without a level of which the engine still
/// has the number.
#[test]
fn what_was_written_survives_the_process_when_a_level_has_gone_from_below() {
    let disk = empty_image(Medium::default(), 3, 4 * CLUSTER);
    for (levels, byte) in [(1, 1), (2, 2)] {
        let rig = Rig::open(&disk, levels, options());
        let start = u64::from(byte) * CLUSTER;
        rig.write(start, &vec![byte; CLUSTER as usize]).unwrap();
        rig.control(Control::Close).unwrap();
    }
    let mortal = Mortal::new(&disk, vec![Level::Ploop; 3]);
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let engine = mortal.rig.engine.clone();
    let mut copies = CopyUp::new(&engine, None).unwrap();
    assert_eq!(copies.progress(), (0, 1));
    while copies.step(&engine, 1).unwrap() != CopyUpStep::Ready {
        mortal.rig.turn();
    }
    assert_eq!(copies.progress(), (1, 1));
    assert_eq!(copies.levels(&engine), [FileId(1)]);
    copies.into_levels().drop_from_chain(&engine);
    assert_eq!(engine.level_shapes().count(), 2);
    mortal.rig.write(3 * CLUSTER, &[9; SECTOR]).unwrap();
    let Mortal { rig, memory, .. } = mortal;
    drop(engine);
    let disk = kill(rig);
    let rig = Rig::open_chain(&disk.without(FileId(1)), vec![Level::Ploop; 2], awaiting());
    rig.engine.take_over(again(&memory)).unwrap();
    for (cluster, byte) in [(0, 7), (1, 1), (2, 2), (3, 9)] {
        assert_eq!(rig.read(cluster * CLUSTER, SECTOR), [byte; SECTOR]);
    }
    // The level below the top is another one from now on.
    let mut copies = CopyUp::new(&rig.engine, None).unwrap();
    while copies.step(&rig.engine, 1).unwrap() != CopyUpStep::Ready {
        rig.turn();
    }
    copies.into_levels().drop_from_chain(&rig.engine);
    assert!(matches!(
        CopyUp::new(&rig.engine, None),
        Err(EngineError::NoLevelBelow)
    ));
    for (cluster, byte) in [(0, 7), (1, 1), (2, 2), (3, 9)] {
        assert_eq!(rig.read(cluster * CLUSTER, SECTOR), [byte; SECTOR]);
    }
}
