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

#[test]
fn a_region_that_is_shorter_than_it_should_be_has_no_queue_beyond_its_end() {
    let one = Layout {
        queues: 1,
        ..LAYOUT
    };
    let words = Arc::new(SharedWords::new(one.words()).unwrap());
    assert!(InFlightQueue::new(Arc::clone(&words), LAYOUT, 0).is_some());
    assert!(InFlightQueue::new(words, LAYOUT, 1).is_none());
}

#[test]
fn a_longer_region_has_no_more_queues() {
    let words = Arc::new(SharedWords::new(2 * LAYOUT.words()).unwrap());
    assert!(InFlightQueue::new(words, LAYOUT, 2).is_none());
}

#[test]
fn a_queue_keeps_to_its_own_part() {
    // No word is left over between the queues.
    let layout = Layout {
        queues: 2,
        entries: 19,
    };
    let words = Arc::new(SharedWords::new(layout.words()).unwrap());
    let mut queue = InFlightQueue::new(Arc::clone(&words), layout, 0).unwrap();
    assert_eq!(queue.entries(), 19);
    queue.recover(SIZE, 0, 0);
    for head in [0, 18, 19, u16::MAX] {
        queue.take(head);
    }
    queue.begin_answer(19);
    let word = |index| words.word(index).unwrap().load(Ordering::Relaxed);
    assert!((layout.words() / 2..layout.words()).all(|index| word(index) == 0));
    assert!(queue.entry(0).0 && queue.entry(18).0 && !queue.entry(17).0);
}

#[test]
fn whether_a_ring_was_served_shows_until_it_is_forgotten() {
    let words = words();
    assert!(!queue(&words).is_old());
    let mut served = queue(&words);
    served.recover(SIZE, 0, 0);
    served.take(3);
    assert!(queue(&words).is_old());
    served.forget();
    assert!(!queue(&words).is_old());
    // Another driver has the ring now, at the same place.
    let mut other = queue(&words);
    assert_eq!(other.recover(SIZE, 0, 1), Recovery::default());
    assert!(queue(&words).recover(SIZE, 0, 1).heads.is_empty());
}

#[test]
fn what_is_taken_after_a_recovery_comes_after_what_was_left() {
    let words = words();
    die_before(&words, 5, 0);
    let mut risen = queue(&words);
    assert_eq!(risen.recover(SIZE, 1, 5).heads, [4, 6, 2]);
    // In this order, and the one that is free again.
    risen.take(1);
    assert_eq!(queue(&words).recover(SIZE, 1, 5).heads, [4, 6, 2, 1]);
}

/// The front-end could write to the region.
#[test]
fn counts_that_are_as_high_as_can_be_are_in_nobodys_way() {
    let words = words();
    let mut first = queue(&words);
    first.recover(SIZE, 0, 0);
    for (head, count) in [(2, u64::MAX), (0, 0), (1, u64::MAX - 1)] {
        first.take(head);
        first
            .word_of(head, 1)
            .unwrap()
            .store(count, Ordering::Relaxed);
    }
    let mut second = queue(&words);
    assert_eq!(second.recover(SIZE, 0, 3).heads, [0, 1, 2]);
    for head in [7, 3, 5] {
        second.take(head);
    }
    let found = queue(&words).recover(SIZE, 0, 6);
    assert_eq!(found.heads, [0, 1, 2, 7, 3, 5]);
    assert!(!found.is_stale);
}

#[test]
fn what_was_given_back_is_not_in_flight() {
    let words = words();
    let mut writer = queue(&words);
    writer.recover(SIZE, 0, 0);
    for head in [4, 1] {
        writer.take(head);
    }
    writer.begin_answer(4);
    writer.end_answer(4, 1);
    writer.take(4);
    writer.give_back(4);
    let recovery = queue(&words).recover(SIZE, 1, 3);
    assert_eq!(recovery.heads, [1]);
    assert!(!recovery.is_stale);
}

#[test]
fn an_entry_of_the_used_ring_without_a_request_takes_nothing_out_of_flight() {
    let words = words();
    let mut writer = queue(&words);
    writer.recover(SIZE, 0, 0);
    for head in [4, 1] {
        writer.take(head);
    }
    writer.begin_answer(4);
    writer.end_answer(4, 1);
    writer.note_used(2);
    let recovery = queue(&words).recover(SIZE, 2, 3);
    assert_eq!(recovery.heads, [1]);
    assert!(!recovery.is_stale);
}

/// A process of another program may note the used index once for many answers.
#[test]
fn as_many_may_have_been_answered_at_once_as_the_ring_has_descriptors() {
    let words = words();
    let mut writer = queue(&words);
    writer.recover(SIZE, 0, 0);
    for head in 0..SIZE {
        writer.take(head);
    }
    for head in 0..SIZE {
        writer.begin_answer(head);
    }
    let recovery = queue(&words).recover(SIZE, SIZE, SIZE);
    assert_eq!((recovery.heads, recovery.is_stale), (vec![], false));
}

#[test]
fn a_ring_may_be_full_of_requests_in_flight_and_no_more() {
    let all: Vec<u16> = (0..SIZE).collect();
    for (avail_idx, is_sound) in [(SIZE, true), (SIZE - 1, false), (SIZE + 1, false)] {
        let words = words();
        let mut writer = queue(&words);
        writer.recover(SIZE, 0, 0);
        for &head in &all {
            writer.take(head);
        }
        let recovery = queue(&words).recover(SIZE, 0, avail_idx);
        assert_eq!(recovery.heads == all, is_sound, "{avail_idx}");
        assert_eq!(recovery.is_stale, !is_sound, "{avail_idx}");
    }
}

#[test]
fn a_used_index_that_is_further_than_the_ring_is_long_is_not_believed() {
    let words = words();
    queue(&words).recover(SIZE, 0, 0);
    // Nothing is in flight: more is available than can be.
    assert!(queue(&words).recover(SIZE, 0, SIZE + 1).is_stale);
}

/// The first entry that a ring of that size cannot have.
#[test]
fn the_entry_behind_the_ring_is_none_of_its() {
    let harms: [fn(&InFlightQueue); 2] = [
        |queue| queue.set_entry(SIZE, true, 0),
        |queue| queue.set_entry(2, true, SIZE),
    ];
    for (case, harm) in harms.into_iter().enumerate() {
        let words = words();
        let mut writer = queue(&words);
        writer.recover(SIZE, 0, 0);
        for head in [4, 2] {
            writer.take(head);
        }
        writer.begin_answer(4);
        writer.begin_answer(2);
        harm(&writer);
        let recovery = queue(&words).recover(SIZE, 2, 4);
        assert!(recovery.is_stale && recovery.heads.is_empty(), "{case}");
    }
}
