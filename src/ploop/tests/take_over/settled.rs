//! The process had flushed everything, and the memory says so.

use super::*;

/// That a disk with a sector of 7 and the note 5 is served, and outlives another death.
fn expect_to_go_on(mortal: Mortal) {
    assert_eq!(mortal.rig.engine.note(), Some(5));
    assert_eq!(mortal.rig.read(0, SECTOR), [7; SECTOR]);
    // And on it goes.
    mortal.rig.write(CLUSTER, &[8; SECTOR]).unwrap();
    let mortal = mortal.die_and_rise();
    assert_eq!(mortal.rig.read(CLUSTER, SECTOR), [8; SECTOR]);
    assert_eq!(mortal.rig.engine.note(), Some(5));
}

#[test]
fn after_a_clean_end_there_is_nothing_to_take_over() {
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal.rig.engine.set_note(5);
    mortal.rig.control(Control::Close).unwrap();
    let levels = mortal.levels.clone();
    let (rig, memory) = mortal.die();
    assert!(!rig.engine.awaits_take_over());
    rig.engine.take_over(again(&memory)).unwrap();
    expect_to_go_on(Mortal {
        rig,
        memory,
        levels,
    });
}

/// It would find an end where it knows of none.
#[test]
fn who_knows_of_a_larger_disk_does_not_go_on() {
    use std::sync::atomic::Ordering::Relaxed;
    const SIZE: usize = 10;
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    let size = mortal.rig.engine.disk_size().0;
    let known = || mortal.memory.word(SIZE).unwrap();
    assert_eq!(known().load(Relaxed), size);
    mortal.rig.control(Control::Close).unwrap();
    known().store(size + 1, Relaxed);
    let (rig, memory) = mortal.die();
    let refused = rig.engine.take_over(again(&memory)).unwrap_err();
    assert!(
        matches!(refused, TakeOverError::Smaller { .. }),
        "{refused}"
    );
    let refused = rig.engine.take_back(again(&memory)).unwrap_err();
    assert!(
        matches!(refused, TakeOverError::Smaller { .. }),
        "{refused}"
    );
    // A larger one is served.
    memory.word(SIZE).unwrap().store(size - 1, Relaxed);
    rig.engine.take_over(again(&memory)).unwrap();
    assert_eq!(memory.word(SIZE).unwrap().load(Relaxed), size);
}

#[test]
fn a_clean_end_is_one_though_the_image_has_another_shape_since() {
    use std::sync::atomic::Ordering::Relaxed;
    const LEVELS: usize = 5;
    let mortal = Mortal::single();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal.rig.engine.set_note(5);
    mortal.rig.control(Control::Close).unwrap();
    let (rig, memory) = mortal.die();
    // As if it had had two.
    memory.word(LEVELS).unwrap().store(2, Relaxed);
    rig.engine.take_over(again(&memory)).unwrap();
    assert_eq!(rig.engine.note(), Some(5));
    assert_eq!(rig.read(0, SECTOR), [7; SECTOR]);
    assert_eq!(memory.word(LEVELS).unwrap().load(Relaxed), 1);
}

#[test]
fn a_process_takes_back_what_another_one_has_had_and_not_served() {
    use std::sync::atomic::Ordering::Relaxed;
    const MAGIC: usize = 0;
    // How far the other process has come, and whether attributes are kept.
    for (is_begun, is_cleared) in [(false, false), (true, false), (true, true)] {
        for keeps_names in [true, false] {
            let mortal = Mortal::single();
            mortal.rig.write(0, &[7; SECTOR]).unwrap();
            mortal.rig.engine.set_note(5);
            mortal.rig.control(Control::Close).unwrap();
            let levels = mortal.levels.clone();
            let (rig, memory) = mortal.die();
            if is_begun {
                rig.engine.take_over(again(&memory)).unwrap();
            }
            if is_cleared {
                memory.word(MAGIC).unwrap().store(0, Relaxed);
            }
            let disk = rig.disk.clone();
            kill(rig);
            if !keeps_names {
                disk.set_opening(FileId(0), 0).unwrap();
            }
            let rig = Rig::open_chain(&disk, levels.clone(), awaiting());
            assert!(rig.engine.awaits_take_over());
            if is_begun && !keeps_names {
                rig.engine.take_over(again(&memory)).unwrap_err();
            }
            rig.engine.take_back(again(&memory)).unwrap();
            assert!(!rig.engine.awaits_take_over());
            expect_to_go_on(Mortal {
                rig,
                memory,
                levels,
            });
        }
    }
}

/// A raw image has been closed for a new top, which is there, and then a sync has failed.
#[test]
fn a_sync_that_fails_once_the_disk_has_everything_takes_nothing_back() {
    let mortal = mortal_of_raw_image();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    mortal.rig.engine.set_note(5);
    mortal.rig.control(Control::CloseTop).unwrap();
    let levels = put_a_top_on(&mortal);
    fail_a_sync(&mortal);
    let Mortal { rig, memory, .. } = mortal;
    let disk = kill(rig);
    let rig = Rig::open_chain(&disk, levels.clone(), awaiting());
    // A disk with a map needs more of it.
    let words = rig.engine.remembered_len() as usize / 8;
    let memory = memory.with_len(words).unwrap();
    rig.engine.take_over(again(&memory)).unwrap();
    assert_eq!(rig.flush(), Ok(()));
    expect_to_go_on(Mortal {
        rig,
        memory,
        levels,
    });
}

#[test]
fn of_an_image_in_another_shape_a_sync_that_failed_before_is_not_forgotten() {
    let mortal = mortal_of_raw_image();
    mortal.rig.write(0, &[7; SECTOR]).unwrap();
    fail_a_sync(&mortal);
    let levels = put_a_top_on(&mortal);
    let Mortal { rig, memory, .. } = mortal;
    let disk = kill(rig);
    let rig = Rig::open_chain(&disk, levels, awaiting());
    let words = rig.engine.remembered_len() as usize / 8;
    let memory = memory.with_len(words).unwrap();
    let error = rig.engine.take_over(memory).unwrap_err();
    assert!(matches!(error, TakeOverError::OtherImage), "{error}");
}

/// Puts an empty image on the raw one: who opens the disk from now on finds both.
fn put_a_top_on(mortal: &Mortal) -> Vec<Level> {
    let header = mortal.rig.engine.header_on_top().unwrap();
    let len = header.geometry().data_start;
    mortal.rig.disk.add_file(&header.to_bytes(), len, true);
    let mut levels = mortal.levels.clone();
    levels.push(Level::Ploop);
    levels
}

fn fail_a_sync(mortal: &Mortal) {
    let disk = &mortal.rig.disk;
    disk.change_medium(|medium| medium.faults.sync = 1.0);
    let result = mortal.rig.control(Control::Barrier);
    disk.change_medium(|medium| medium.faults.sync = 0.0);
    assert_eq!(result, Err(EngineError::SyncFailed));
}
