//! Shows that the proof can fail: engines that are wrong, each in one way.

use super::{life, power_cuts};
use crate::ploop::sabotage::{self, Sabotage};

/// Cuts within which each has to be noticed.
const CUTS_MAX: u64 = 20_000;

/// How many cuts an engine stands that does this wrong, and what is noticed then.
fn notice(which: Sabotage) -> Option<(u64, String)> {
    let chains = which == Sabotage::MapUnstableCopy;
    let mut cuts = 0;
    sabotage::with(which, || {
        for seed in 1.. {
            match life::live(seed, chains, false) {
                Ok(record) => cuts += record.cuts,
                Err(failure) => return Some((cuts, failure)),
            }
            if cuts >= CUTS_MAX {
                break;
            }
        }
        None
    })
}

/// Those that are noticed soon: for a debug build that nobody asked for more.
const QUICK: [Sabotage; 5] = [
    Sabotage::FlushWithoutBat,
    Sabotage::ReuseUnpunched,
    Sabotage::FailedWriteUnmaps,
    Sabotage::MapBeyondLength,
    Sabotage::ForgetChange,
];

#[test]
fn power_cuts_notice_every_sabotage() {
    let mut missed = Vec::new();
    let all = power_cuts::is_long();
    for &which in if all { &Sabotage::ALL[..] } else { &QUICK } {
        match notice(which) {
            Some((cuts, failure)) => println!("{which:?} after {cuts} cuts: {failure}"),
            None => missed.push(which),
        }
    }
    assert!(
        missed.is_empty(),
        "not noticed in {CUTS_MAX} cuts: {missed:?}"
    );
}
