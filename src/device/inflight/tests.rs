use super::*;

const LAYOUT: Layout = Layout {
    queues: 2,
    entries: 16,
};
const SIZE: u16 = 8;

fn words() -> Arc<SharedWords> {
    Arc::new(SharedWords::new(LAYOUT.words()).unwrap())
}

fn queue(words: &Arc<SharedWords>) -> InFlightQueue {
    InFlightQueue::new(Arc::clone(words), LAYOUT, 1).unwrap()
}

#[test]
fn the_layout_is_that_of_the_specification() {
    assert_eq!(LAYOUT.len(), 2 * 320);
    let words = words();
    let mut queue = queue(&words);
    queue.recover(SIZE, 0x1234, 0x1234);
    queue.take(3);
    queue.take(5);
    queue.begin_answer(3);
    queue.begin_answer(5);
    let bytes: Vec<u8> = (0..words.len())
        .flat_map(|index| {
            words
                .word(index)
                .unwrap()
                .load(Ordering::Relaxed)
                .to_ne_bytes()
        })
        .collect();
    assert_eq!(bytes[..320], [0; 320], "the other queue");
    let u16_at = |at: usize| u16::from_ne_bytes([bytes[320 + at], bytes[321 + at]]);
    assert_eq!([8, 10, 12, 14].map(u16_at), [1, 16, 5, 0x1234]);
    let entry = 16 + 16 * 5;
    assert_eq!(bytes[320 + entry], 1);
    assert_eq!(u16_at(entry + 6), 3);
    assert_eq!(bytes[320 + entry + 8], 2, "it was taken second");
}

#[test]
fn a_fresh_region_says_nothing_and_knows_the_used_index() {
    let words = words();
    assert_eq!(queue(&words).recover(SIZE, 77, 80), Recovery::default());
    let again = queue(&words).recover(SIZE, 77, 80);
    assert_eq!(
        (again.heads, again.is_old, again.is_stale),
        (vec![], true, false)
    );
}

/// Takes requests 4, 1, 6 and 2 and answers 1, 6 and 4 in this order, but dies before
/// step `death`. Returns how many the used index tells of, and which are in flight then.
fn die_before(words: &Arc<SharedWords>, death: usize, start: u16) -> u16 {
    let mut queue = queue(words);
    queue.recover(SIZE, start, start);
    for head in [4, 1, 6, 2] {
        queue.take(head);
    }
    let mut used_idx = start;
    let mut step = 0;
    let mut lives = || {
        step += 1;
        step <= death
    };
    for head in [1, 6, 4] {
        // Each step is one store that a reader can see.
        if !lives() {
            return used_idx;
        }
        queue.set_entry(head, true, queue.last_batch_head);
        if !lives() {
            return used_idx;
        }
        queue.begin_answer(head);
        if !lives() {
            return used_idx;
        }
        used_idx = used_idx.wrapping_add(1);
        if !lives() {
            return used_idx;
        }
        let (_, next) = queue.entry(head);
        queue.set_entry(head, false, next);
        if !lives() {
            return used_idx;
        }
        queue.end_answer(head, used_idx);
    }
    used_idx
}

#[test]
fn wherever_a_process_dies_each_request_is_answered_once() {
    for start in [0, 1000, u16::MAX - 1] {
        for death in 0..=15 {
            let words = words();
            let used_idx = die_before(&words, death, start);
            let answered = usize::from(used_idx.wrapping_sub(start));
            let left: Vec<u16> = [4, 1, 6, 2]
                .into_iter()
                .filter(|head| ![1, 6, 4][..answered].contains(head))
                .collect();
            let recovery = queue(&words).recover(SIZE, used_idx, start.wrapping_add(4));
            assert!(recovery.is_old && !recovery.is_stale, "death {death}");
            assert_eq!(recovery.heads, left, "death {death} from {start}");
            // Killed again before it has done anything.
            let again = queue(&words).recover(SIZE, used_idx, start.wrapping_add(4));
            assert_eq!(again, recovery, "death {death} from {start}");
        }
    }
}

#[test]
fn a_region_from_before_others_served_is_dropped() {
    let words = words();
    die_before(&words, 0, 0);
    // Sixty more were answered without it.
    let recovery = queue(&words).recover(SIZE, 60, 60);
    assert!(recovery.is_stale && recovery.heads.is_empty());
    let again = queue(&words).recover(SIZE, 60, 60);
    assert!(!again.is_stale && again.heads.is_empty());
}

#[test]
fn more_in_flight_than_the_ring_tells_of_are_dropped() {
    let words = words();
    die_before(&words, 0, 0);
    assert!(queue(&words).recover(SIZE, 0, 3).is_stale);
}

#[test]
fn what_cannot_be_is_dropped() {
    let hostile: [fn(&InFlightQueue); 5] = [
        // Beyond the ring, the region, in a circle, at the same time.
        |queue| queue.set_entry(12, true, 0),
        |queue| queue.set_entry(4, true, 60_000),
        |queue| queue.set_entry(4, true, 4),
        |queue| queue.word_of(4, 1).unwrap().store(2, Ordering::Relaxed),
        |queue| {
            let header = queue.words.word(queue.first + 1).unwrap();
            header.store(!0xffff | 1, Ordering::Relaxed);
        },
    ];
    for (case, harm) in hostile.into_iter().enumerate() {
        let words = words();
        let mut writer = queue(&words);
        writer.recover(SIZE, 0, 0);
        for head in [4, 1, 6, 2] {
            writer.take(head);
        }
        for head in [2, 4] {
            writer.begin_answer(head);
        }
        harm(&writer);
        let used_idx = if case == 3 { 0 } else { 2 };
        let recovery = queue(&words).recover(SIZE, used_idx, 4);
        assert!(recovery.is_stale && recovery.heads.is_empty(), "{case}");
    }
}

#[test]
fn a_queue_that_the_region_has_not_is_none() {
    let words = words();
    assert!(InFlightQueue::new(Arc::clone(&words), LAYOUT, 2).is_none());
    assert!(InFlightQueue::new(words, LAYOUT, usize::MAX).is_none());
}
