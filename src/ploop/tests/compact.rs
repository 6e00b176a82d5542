//! Space is given back while the disk is in use.

use std::rc::Rc;

use super::*;
use crate::format::GuestCluster;
use crate::ploop::preempt;
use crate::ploop::rule::{self, Rule};

const CLUSTERS: u64 = 12;

impl Rig {
    fn wait(&self, outcome: &Outcome) -> Result<(), EngineError> {
        for _ in 0..10_000 {
            if let Some(result) = outcome.get() {
                return result;
            }
            self.turn();
        }
        panic!("it does not end");
    }

    fn clusters_in_file(&self) -> u64 {
        self.disk.len(FileId(0)).unwrap() / CLUSTER
    }
}

#[test]
fn zeros_and_gaps_are_given_back_and_the_file_gets_as_short_as_it_can() {
    let rig = Rig::new(CLUSTERS * CLUSTER);
    for cluster in 0..CLUSTERS {
        rig.write(cluster * CLUSTER, &[cluster as u8 + 1; 8192])
            .unwrap();
    }
    rig.write(2 * CLUSTER, &[0; 8192]).unwrap();
    rig.write(4 * CLUSTER + 4096, &[0; 4096]).unwrap();
    rig.discard(6 * CLUSTER, CLUSTER).unwrap();
    for cluster in 0..CLUSTERS as u32 {
        let outcome = rig.engine.squeeze(GuestCluster(cluster));
        assert_eq!(rig.wait(&outcome), Ok(()));
    }
    assert_eq!(rig.engine.mapped_in_top() as u64, CLUSTERS - 2);
    assert_eq!(rig.wait(&rig.engine.cut_tail()), Ok(()));
    let before = rig.clusters_in_file();
    let packing = rig.engine.packing();
    let (behind, count) = rig.engine.behind(packing, 100);
    assert_eq!((behind.len(), count), (2, 2));
    assert_eq!(rig.engine.behind(packing, 1), (vec![behind[0]], 2));
    assert_eq!(rig.wait(&rig.engine.move_down(behind, packing)), Ok(()));
    assert_eq!(rig.engine.behind(packing, 100), (Vec::new(), 0));
    assert_eq!(rig.wait(&rig.engine.cut_tail()), Ok(()));
    assert_eq!(rig.clusters_in_file(), before - 2);
    assert_eq!(rig.clusters_in_file(), u64::from(packing.end()));
    let rig = rig.cut();
    for cluster in 0..CLUSTERS {
        let read = rig.read(cluster * CLUSTER, 8192);
        let byte = match cluster {
            2 | 6 => 0,
            cluster => cluster as u8 + 1,
        };
        let second = if cluster == 4 { 0 } else { byte };
        assert!(read == [[byte; 4096], [second; 4096]].concat(), "{cluster}");
    }
}

#[test]
fn what_holes_cannot_be_made_for_is_said() {
    let rig = Rig::new(CLUSTERS * CLUSTER);
    rig.write(0, &[[1; 4096], [0; 4096]].concat()).unwrap();
    rig.disk
        .change_medium(|medium| medium.next_zero_is_full = true);
    let squeeze = || rig.wait(&rig.engine.squeeze(GuestCluster(0)));
    assert_eq!(squeeze(), Err(EngineError::NoSpace));
    assert_eq!(squeeze(), Ok(()));
}

#[test]
fn where_clusters_were_is_given_back_when_moving_is_given_up() {
    let rig = Rig::new(CLUSTERS * CLUSTER);
    for cluster in 0..CLUSTERS {
        let content = vec![cluster as u8 + 1; CLUSTER as usize];
        rig.write(cluster * CLUSTER, &content).unwrap();
    }
    rig.discard(0, 4 * CLUSTER).unwrap();
    assert_eq!(rig.wait(&rig.engine.cut_tail()), Ok(()));
    let packing = rig.engine.packing();
    let (behind, _) = rig.engine.behind(packing, 100);
    assert_eq!(behind.len(), 4);
    let moved = rig.engine.move_down(behind, packing);
    while rig.engine.behind(packing, 100).1 > 0 {
        rig.turn();
    }
    // The disk does not know it yet.
    rig.engine.abandon_growth();
    assert_eq!(rig.wait(&moved), Err(EngineError::Stopped));
    assert_eq!(rig.wait(&rig.engine.cut_tail()), Ok(()));
    assert_eq!(rig.clusters_in_file(), u64::from(packing.end()));
    let rig = rig.cut();
    for cluster in 4..CLUSTERS {
        let read = rig.read(cluster * CLUSTER, CLUSTER as usize);
        assert!(
            read.iter().all(|byte| *byte == cluster as u8 + 1),
            "{cluster}"
        );
    }
}

/// A write has seen where the file ends, and goes no further; meanwhile the end is to be cut
/// off. Whether what it has written, and was flushed, is there after a power cut.
fn a_write_that_has_seen_the_end_is_kept() -> bool {
    let rig = Rc::new(Rig::new(CLUSTERS * CLUSTER));
    rig.write(0, &[1; 512]).unwrap();
    let others = rig.clone();
    let _hook = preempt::once("end seen", move || {
        drop(others.engine.cut_tail());
        for _ in 0..200 {
            others.poll_md();
            others.step_disk();
        }
    });
    let written = rig.write(CLUSTER, &[2; 512]);
    assert_eq!(written.and_then(|()| rig.flush()), Ok(()));
    let rig = rig.cut();
    rig.read(CLUSTER, 512) == [2; 512]
}

#[test]
fn the_end_is_not_cut_off_under_who_has_seen_where_it_was() {
    assert!(a_write_that_has_seen_the_end_is_kept());
    let broken = rule::broken(Rule::OldIoBeforeCut, a_write_that_has_seen_the_end_is_kept);
    assert!(!broken, "the test would not notice");
}

#[test]
fn nothing_is_given_back_while_requests_are_held() {
    let rig = Rig::new(CLUSTERS * CLUSTER);
    rig.write(0, &[0; 512]).unwrap();
    rig.control(Control::Suspend).unwrap();
    let held = Err(EngineError::Suspended);
    let packing = rig.engine.packing();
    for outcome in [
        rig.engine.squeeze(GuestCluster(0)),
        rig.engine.move_down(vec![GuestCluster(0)], packing),
        rig.engine.cut_tail(),
    ] {
        assert_eq!(rig.wait(&outcome), held);
    }
    rig.control(Control::Resume).unwrap();
    assert_eq!(rig.wait(&rig.engine.cut_tail()), Ok(()));
}
