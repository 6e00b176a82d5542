//! An in-flight region that the front-end has written, and a ring that goes on with it,
//! with deaths of the process at any moment.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vhost_user_ploop::device::fuzzing::InFlight;

#[derive(Arbitrary, Debug)]
struct Input {
    queues: u8,
    entries: u8,
    index: u8,
    size: u16,
    used: u16,
    avail: u16,
    region: Vec<u8>,
    /// Makes the region's header a right one, so that its entries are looked at.
    is_old: bool,
    noted: u8,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    /// Takes what the driver has made available, under this head.
    Take(u8),
    GiveBack(u8),
    /// Answers one of those that are taken.
    Answer(u8),
    Odd,
    /// The process dies, in an answer or between them.
    Die {
        answers: u8,
        is_noted: bool,
    },
}

fuzz_target!(|input: Input| run(input));

fn run(input: Input) {
    let entries = u16::from(input.entries % 64);
    let size = input.size.min(entries);
    let mut region = input.region;
    if input.is_old && region.len() >= 16 {
        // Flags; version, entries, last batch head, used index.
        region[8..10].copy_from_slice(&1_u16.to_ne_bytes());
        let noted = input.used.wrapping_sub(u16::from(input.noted % 8));
        region[14..16].copy_from_slice(&noted.to_ne_bytes());
    }
    let queues = u16::from(input.queues % 4);
    let Some(mut queue) = InFlight::new(queues, entries, usize::from(input.index % 5), &region)
    else {
        return;
    };
    let (mut used, mut avail) = (input.used, input.avail);
    let (heads, _, is_stale) = queue.recover(size, used, avail);
    check(&heads, size, used, avail);
    assert!(!is_stale || heads.is_empty());
    // Nothing but them is noted from now on.
    let mut later = queue.after_death().expect("it is the same region");
    let left = avail.wrapping_sub(used);
    let again = later.recover(size, used, avail);
    assert_eq!(again, (heads.clone(), true, left > size));
    queue = later;
    if left > size {
        return;
    }
    // What a sane driver has of the ring from here on.
    let mut taken = heads;
    avail = used.wrapping_add(taken.len() as u16);
    for step in input.steps.into_iter().take(64) {
        match step {
            Step::Take(head) => {
                let head = u16::from(head) % size.max(1);
                if taken.contains(&head) || size == 0 {
                    continue;
                }
                queue.take(head);
                taken.push(head);
                avail = avail.wrapping_add(1);
            }
            Step::GiveBack(which) if !taken.is_empty() => {
                // The driver has made it available again by the time that it counts.
                let head = taken.remove(usize::from(which) % taken.len());
                queue.give_back(head);
                avail = avail.wrapping_sub(1);
            }
            Step::Answer(which) if !taken.is_empty() => {
                let head = taken.remove(usize::from(which) % taken.len());
                queue.begin_answer(head);
                used = used.wrapping_add(1);
                queue.end_answer(head, used);
            }
            Step::Odd => {
                used = used.wrapping_add(1);
                avail = avail.wrapping_add(1);
                queue.note_used(used);
            }
            Step::Die { answers, is_noted } => {
                let mut half = None;
                if answers % 2 == 1 && !taken.is_empty() {
                    let head = taken.remove(usize::from(answers / 2) % taken.len());
                    queue.begin_answer(head);
                    // The used index may have been advanced or not.
                    match is_noted {
                        true => used = used.wrapping_add(1),
                        false => half = Some(head),
                    }
                }
                let mut next = queue.after_death().expect("it is the same region");
                let (heads, is_old, is_stale) = next.recover(size, used, avail);
                assert!(is_old && !is_stale, "what we have left is sound");
                check(&heads, size, used, avail);
                taken.extend(half);
                let sorted = |mut heads: Vec<u16>| {
                    heads.sort_unstable();
                    heads
                };
                assert_eq!(sorted(heads.clone()), sorted(taken), "no more and no less");
                taken = heads;
                queue = next;
            }
            _ => {}
        }
    }
}

fn check(heads: &[u16], size: u16, used: u16, avail: u16) {
    let mut sorted = heads.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), heads.len(), "each once");
    assert!(heads.iter().all(|&head| head < size));
    assert!(heads.len() <= usize::from(avail.wrapping_sub(used)));
}
