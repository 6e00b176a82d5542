//! For how long a suspicion has to last to be the end.

use super::*;

const STEP: Duration = Duration::from_millis(100);

/// After how long it is the end, if each look finds what `is_away` says of that time.
fn time_until_over(is_away: impl Fn(Duration) -> bool) -> Duration {
    let start = Moment::now();
    let mut lasting = Lasting::since(start, is_away(Duration::ZERO));
    let mut time = STEP;
    while !lasting.is_over(start.later(time), is_away(time)) {
        time += STEP;
    }
    time
}

#[test]
fn what_is_odd_has_to_last_for_two_seconds_and_an_absence_for_five_minutes() {
    assert_eq!(time_until_over(|_| false), CONFIRMATION + STEP);
    assert_eq!(time_until_over(|_| true), ABSENCE + STEP);
}

#[test]
fn what_is_odd_after_an_absence_has_to_last_as_long_as_before_one() {
    let back = Duration::from_secs(10);
    let end = back + CONFIRMATION + STEP;
    assert_eq!(time_until_over(|time| time < back), end);
}

/// Else what comes and goes would be for ever.
#[test]
fn an_absence_with_odd_answers_in_between_ends_as_well() {
    let is_away = |time: Duration| !time.as_secs().is_multiple_of(2);
    let end = time_until_over(is_away);
    assert!(end <= ABSENCE + CONFIRMATION, "{end:?}");
}
