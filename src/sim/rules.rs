//! Shows that the proof can fail: engines that break a rule, each another one.

use std::sync::Mutex;
use std::thread;

use super::scenario::{HostTrouble, Mix};
use super::{life, power_cuts};
use crate::ploop::rule::{self, Rule};

/// Cuts, made or imagined, within which each has to be noticed.
const CUTS_MAX: u64 = 1_000_000;

/// Of all lives those in which the rule matters.
fn mix_for(which: Rule) -> Mix {
    let trouble = match which {
        Rule::FailedPageRemovesNothing | Rule::FailedPageIsNotOnDisk | Rule::EveryPageCounts => {
            Some(HostTrouble::Pages)
        }
        Rule::StableWritesHoldSync => Some(HostTrouble::StableWrites),
        _ => None,
    };
    let merges = matches!(
        which,
        Rule::CopiesEndBeforeDrop
            | Rule::FlushBeforeDrop
            | Rule::NameBeforeFileGoes
            | Rule::ReadsEndBeforeFileGoes
            | Rule::MarkBeforeLevelChanges
            | Rule::CopyBeforeLevelMaps
            | Rule::LevelMapBeforeDrop
    );
    // Without lower deltas there are no copies, which make rounds with two syncs.
    let chains = matches!(
        which,
        Rule::CopyBeforeMapping
            | Rule::UnmarkedIsSeen
            | Rule::FailedPageIsNotOnDisk
            | Rule::CopiesInTheWayEnd
    ) || merges;
    let grows = matches!(
        which,
        Rule::OldIoBeforeCopy
            | Rule::MoveBeforeMapping
            | Rule::NothingNewInTheWay
            | Rule::CopiesInTheWayEnd
            | Rule::NoPunchInTheWay
            | Rule::MappingBeforeZeroing
            | Rule::OldIoBeforeZeroing
            | Rule::ZerosBeforeSize
            | Rule::StableBeforeSize
            | Rule::EndIsCut
            | Rule::SizeBeforeUse
            | Rule::RoomOutlivesProcess
    );
    let snapshots = matches!(
        which,
        Rule::HeldForNewTop
            | Rule::FlushBeforeNewTop
            | Rule::MarkBeforeNewTop
            | Rule::OldTopIsLeftAlone
            | Rule::NewTopBeforeName
            | Rule::NameBeforeUse
            | Rule::MarkBeforeKeptTop
            | Rule::SettledWhileClosed
            | Rule::MemoryFollowsTop
    );
    let compacts = matches!(
        which,
        Rule::OldIoBeforeZeroCheck | Rule::ZerosHideBelow | Rule::MappingBeforeLeaving
    );
    let chains = chains || which == Rule::ZerosHideBelow;
    Mix {
        compacts,
        snapshots,
        merges,
        chains,
        trouble,
        grows,
    }
}

/// How many cuts an engine stands that breaks the rule, and what is noticed then.
fn notice(which: Rule) -> Option<(u64, String)> {
    let mix = mix_for(which);
    let mut cuts = 0;
    rule::broken(which, || {
        for seed in 1.. {
            match life::live(seed, mix, false) {
                Ok(record) => cuts += record.cuts.all(),
                Err(failure) => return Some((cuts, format!("{failure} (seed {seed})"))),
            }
            if cuts >= CUTS_MAX {
                break;
            }
        }
        None
    })
}

/// Those that are noticed soon: for a debug build that nobody asked for more.
const QUICK: [Rule; 5] = [
    Rule::FlushWritesBat,
    Rule::PunchBeforeReuse,
    Rule::FailedWriteStaysMapped,
    Rule::LengthBeforeMapping,
    Rule::ChangeOutlivesProcess,
];

#[test]
fn power_cuts_notice_every_broken_rule() {
    let all = power_cuts::is_long();
    let rules = if all { &Rule::ALL[..] } else { &QUICK };
    // For who works on one of them.
    let only = std::env::var("PLOOP_SIM_RULE").unwrap_or_default();
    let rules = rules
        .iter()
        .filter(|rule| format!("{rule:?}").contains(&only));
    let rules = Mutex::new(rules);
    let missed = Mutex::new(Vec::new());
    let notice_next = || {
        let next = || rules.lock().unwrap().next().copied();
        while let Some(which) = next() {
            match notice(which) {
                Some((cuts, failure)) => println!("{which:?} after {cuts} cuts: {failure}"),
                None => missed.lock().unwrap().push(which),
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(notice_next);
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(
        missed.is_empty(),
        "not noticed in {CUTS_MAX} cuts: {missed:?}"
    );
}
