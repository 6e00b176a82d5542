//! How much of the main loop's processor all clients may take together.
//!
//! What they are answered with is made at the priority of everything else, on processors that
//! a guest's requests want too: programs that ask without a pause would take a fifth of a
//! disk's rate where there are two. So what their turns have cost is owed, and paid back with
//! time. While much is owed, whoever has had a turn has the next one later, by what that one
//! has cost: one who asks now and then hardly waits beside those who do not stop.

use std::time::{Duration, Instant};

/// Of a processor: one part in so many.
const SHARE: u32 = 128;

/// How long it may take to pay back what is owed before anybody has to wait: a 128th of it
/// is what can be asked for at once, hundreds of commands.
const CREDIT: Duration = Duration::from_secs(4);

/// Shortest wait: each turn wakes a thread here and one there, which is less of a nuisance when
/// it happens several times at once.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);

/// Longest wait, whatever is owed: nobody may seem dead.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Allowance {
    /// When everything will have been paid back.
    paid_at: Option<Instant>,
}

impl Allowance {
    /// A turn that has ended `now` has cost this much of the processor, and `others` wait for
    /// theirs. Returns until when whoever had it has to wait for the next one, if at all.
    pub fn charge(&mut self, cost: Duration, others: usize, now: Instant) -> Option<Instant> {
        let owed_since = self.paid_at.map_or(now, |paid_at| paid_at.max(now));
        let latest = now + CREDIT + LONGEST_WAIT;
        self.paid_at = Some((owed_since + cost * SHARE).min(latest));
        self.newcomers_wait_until(now)?;
        let all = u32::try_from(others).map_or(u32::MAX, |others| others.saturating_add(1));
        let wait = cost.saturating_mul(SHARE.saturating_mul(all));
        Some(now + wait.clamp(SHORTEST_WAIT, LONGEST_WAIT))
    }

    /// Until when one has to wait who comes `now`, if at all. Else who has had a turn could
    /// have the next one by coming anew.
    pub fn newcomers_wait_until(&self, now: Instant) -> Option<Instant> {
        let until = self.paid_at?.checked_sub(CREDIT)?;
        (until > now).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_asks_now_and_then_waits_for_nothing() {
        let mut allowance = Allowance::default();
        let mut now = Instant::now();
        for _ in 0..1_000 {
            assert_eq!(allowance.charge(SECOND / 2_000, 0, now), None);
            now += SECOND / 10;
        }
        // As much at once as is not noticed.
        assert_eq!(allowance.charge(CREDIT / SHARE, 0, now), None);
        assert_eq!(allowance.newcomers_wait_until(now), None);
        assert!(allowance.charge(SECOND / 10_000, 0, now).is_some());
    }

    /// What several take together that have their next turn as soon as they may, and how many
    /// turns each has had, when the turns of each cost so much.
    fn besieged(costs: &[Duration]) -> (f64, Vec<usize>) {
        let mut allowance = Allowance::default();
        let begin = Instant::now();
        let (mut now, mut taken) = (begin, Duration::ZERO);
        let mut next = vec![begin; costs.len()];
        let mut turns = vec![0; costs.len()];
        while now < begin + 500 * SECOND {
            let first = next.iter().copied().enumerate().min_by_key(|one| one.1);
            let (who, at) = first.expect("there is one");
            now = now.max(at) + costs[who];
            taken += costs[who];
            let others = next.iter().enumerate();
            let waiting = others.filter(|(other, until)| *other != who && **until > now);
            let until = allowance.charge(costs[who], waiting.count(), now);
            next[who] = until.unwrap_or(now);
            turns[who] += 1;
        }
        let share = taken.as_secs_f64() / (now - begin).as_secs_f64();
        (share * f64::from(SHARE), turns)
    }

    #[test]
    fn whatever_the_turns_cost_it_is_their_share_in_the_end() {
        for cost in [
            SECOND / 100_000,
            SECOND / 2_000,
            SECOND / 1_000,
            SECOND / 500,
        ] {
            for clients in [1, 4, 16] {
                let (share, _) = besieged(&vec![cost; clients]);
                assert!(
                    (0.7..1.3).contains(&share),
                    "{clients} of {cost:?}: {share}"
                );
            }
        }
    }

    #[test]
    fn who_wants_little_hardly_waits_beside_those_who_want_all() {
        let (_, turns) = besieged(&[
            SECOND / 1_000,
            SECOND / 1_000,
            SECOND / 1_000,
            SECOND / 50_000,
        ]);
        let (polite, others) = turns.split_last().unwrap();
        assert!(*polite > 4_000, "{turns:?}");
        assert!(
            others.iter().all(|turns| (700..2_000).contains(turns)),
            "{turns:?}"
        );
    }

    #[test]
    fn nobody_waits_for_ever() {
        let mut allowance = Allowance::default();
        let now = Instant::now();
        for _ in 0..1_000 {
            allowance.charge(10 * SECOND, 15, now);
        }
        let until = Some(now + LONGEST_WAIT);
        assert_eq!(allowance.charge(SECOND, 15, now), until);
        assert_eq!(allowance.newcomers_wait_until(now), until);
        assert_eq!(allowance.newcomers_wait_until(now + LONGEST_WAIT), None);
    }
}
