//! That a cluster is not used again under I/O that found it mapped (I2).

use std::rc::Rc;

use super::*;
use crate::ploop::preempt;

/// A queue has looked up where its write goes, and goes no further. Meanwhile the
/// cluster is discarded, and the metadata thread wants to know when older I/O is over.
#[test]
fn no_hole_is_punched_under_a_write_that_was_looked_up_before_the_discard() {
    let rig = Rc::new(Rig::new(16 * CLUSTER).and_a_queue());
    rig.write(0, &[1; 512]).unwrap();
    rig.flush().unwrap();
    rig.disk.start_trace();
    let others = rig.clone();
    let _hook = preempt::once("looked up", move || {
        let ranges = smallvec![range(0, CLUSTER)];
        let discard = others.push_to(1, Command::Discard { ranges });
        let others_turn = |rig: &Rig| {
            rig.poll_queue(1);
            rig.poll_runners();
            rig.poll_md();
            rig.step_disk();
        };
        assert_eq!(others.result_by(discard, others_turn), Ok(()));
        for _ in 0..10 {
            others_turn(&others);
        }
    });
    let write = rig.push_write_to(0, 0, &[2; 512]);
    let is_punched = |rig: &Rig| {
        let trace = rig.disk.take_trace();
        rig.disk.start_trace();
        trace.iter().any(|line| line.contains("Punch"))
    };
    for _ in 0..10 {
        rig.poll_md();
    }
    assert!(!is_punched(&rig), "the write is still under way");
    assert_eq!(rig.result(write), Ok(()));
    for _ in 0..10 {
        rig.turn();
    }
    assert!(is_punched(&rig), "it is not");
}

/// The write of a page that was under way when a cluster was unmapped need not contain
/// that, and the next one may fail.
#[test]
fn a_page_that_was_being_written_before_a_discard_gives_no_cluster_back() {
    let rig = Rig::new(16 * CLUSTER);
    rig.write(0, &[5; 512]).unwrap();
    rig.flush().unwrap();
    // Space is short, and stays so.
    rig.disk
        .change_medium(|medium| medium.faults.allocate = 1.0);
    while rig.engine.alloc().available() > rig.engine.options.low_water {
        rig.engine.alloc().take();
    }
    rig.write(CLUSTER, &[6; 512]).unwrap();
    let before = rig.engine.alloc().available();
    rig.disk.start_trace();
    rig.engine.bat.mark_urgent(0);
    rig.poll_md();
    let trace = rig.disk.take_trace();
    assert!(trace.iter().any(|line| line.contains("write file 0 0x0+")));
    let ranges = smallvec![range(0, CLUSTER)];
    let discard = rig.push(Command::Discard { ranges });
    while rig.engine.mapped_here().len() > 1 {
        rig.poll_queue(0);
        rig.poll_runners();
    }
    rig.poll_md();
    while rig.disk.is_busy() {
        rig.disk.step();
    }
    let metadata_len = rig.engine.geometry().metadata_len();
    rig.disk.change_medium(|medium| {
        medium.metadata_len = metadata_len;
        medium.faults.page = 1.0;
    });
    rig.result(discard).unwrap();
    for _ in 0..3_000 {
        rig.turn();
    }
    assert_eq!(rig.engine.alloc().available(), before);
    rig.disk.change_medium(|medium| medium.faults.page = 0.0);
    for _ in 0..3_000 {
        rig.turn();
    }
    assert_eq!(rig.engine.alloc().available(), before + 1);
}
