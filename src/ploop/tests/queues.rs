//! What queues have to do with each other: nothing (S24).

use super::*;

/// Clusters of the disk that have their entries in one md page.
const PAGE: u64 = 1024;

/// A request takes fewer turns.
const TURNS: usize = 40;

fn write(rig: &Rig, start: u64, bytes: &[u8]) -> Command {
    let data = rig.segments(bytes);
    let start = Sector(start / 512);
    Command::Write { start, data }
}

/// A queue writes to a hole and its thread stops in the middle of that, at any point.
/// Everything goes on for another queue, in the same md page and in another one.
#[test]
fn a_queue_that_is_stuck_holds_up_no_other() {
    let mut had_ended = [0; 2];
    for (turns, page) in (0..TURNS).flat_map(|turns| [(turns, 0), (turns, 1)]) {
        let rig = Rig::new(2 * PAGE * CLUSTER);
        let mut stuck = rig.engine.queue().unwrap();
        let mut ended = Vec::new();
        let command = write(&rig, 0, &[1; 512]);
        stuck.push(Request { tag: 1, command });
        let mut go_on = |rig: &Rig, ended: &mut Vec<Done>| {
            stuck.submit();
            stuck.poll(ended);
            rig.turn();
        };
        for _ in 0..turns {
            go_on(&rig, &mut ended);
        }
        had_ended[usize::from(!ended.is_empty())] += 1;

        let (first, second) = (page * PAGE + 1, page * PAGE + 2);
        rig.write(first * CLUSTER, &[2; 512]).unwrap();
        rig.write(first * CLUSTER, &[3; 512]).unwrap();
        rig.write(second * CLUSTER, &[4; 512]).unwrap();
        rig.discard(first * CLUSTER, CLUSTER).unwrap();
        rig.flush().unwrap();
        assert_eq!(rig.read(first * CLUSTER, 512), [0; 512]);
        assert_eq!(rig.read(second * CLUSTER, 512), [4; 512]);

        for _ in 0..10 * TURNS {
            go_on(&rig, &mut ended);
        }
        assert_eq!(ended.len(), 1);
        assert_eq!(ended[0].result, Ok(()));
        assert_eq!(rig.read(0, 512), [1; 512]);
    }
    assert!(had_ended.iter().all(|count| *count > 0), "{had_ended:?}");
}
