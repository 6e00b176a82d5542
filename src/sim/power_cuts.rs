//! The test itself: lives, one after the other, until there were enough cuts.
//!
//! `PLOOP_SIM_CUTS` says how many cuts are enough, `PLOOP_SIM_SEED` where to
//! start. The seed of a life is the first seed plus the number of the life, so a
//! life that failed is seen again as the first of its own run. `ci/sim.sh` makes
//! long runs.

use std::fmt::Write;
use std::time::Instant;

use super::cases::Case;
use super::life::{self, Record};
use super::scenario::{DELTAS_MAX, Mix};

/// Cuts of a run that nobody asked to be longer: what a debug build does in some
/// seconds.
const CUTS: u64 = 300;

/// After so many cuts every case must have been there.
const ENOUGH: u64 = 10_000;

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name} is {value:?}, expected a number")))
}

/// Whether a run of some length was asked for.
pub fn is_long() -> bool {
    setting("PLOOP_SIM_CUTS").is_some()
}

/// Lives from `seed` on, until there were `cuts` cuts.
fn run(seed: u64, cuts: u64, mix: Mix) -> Record {
    let mut record = Record::default();
    for seed in seed.. {
        match life::live(seed, mix, false) {
            Ok(life) => record.add(&life),
            Err(failure) => {
                let trace = match life::live(seed, mix, true) {
                    Ok(_) => {
                        "it went well the second time: something is not by the seed".to_owned()
                    }
                    Err(trace) => trace,
                };
                panic!("{trace}\nthe life of seed {seed}: {failure}");
            }
        }
        if record.cuts.all() >= cuts {
            break;
        }
    }
    record
}

fn run_and_report(what: &str, mix: Mix) -> Record {
    let seed = setting("PLOOP_SIM_SEED").unwrap_or(1);
    let cuts = setting("PLOOP_SIM_CUTS").unwrap_or(CUTS);
    let start = Instant::now();
    let record = run(seed, cuts, mix);
    println!(
        "{what}: seed {seed}, {} cuts with something unsynced, {} of them made and the others \
         imagined (and {} made without), {:.0?}, no violation\n{}{}",
        record.cuts.all(),
        record.cuts.made,
        record.cuts.idle,
        start.elapsed(),
        record.cases,
        kinds(&record)
    );
    record
}

/// The cuts of each kind of disk, a line for each number of deltas.
fn kinds(record: &Record) -> String {
    let mut text = String::new();
    for depth in 1..=DELTAS_MAX {
        let kinds = record.kinds.iter().filter(|((of, _), _)| *of == depth);
        let kinds: Vec<_> = kinds
            .map(|((_, base), cuts)| format!("{cuts} on {base}"))
            .collect();
        if !kinds.is_empty() {
            let _ = writeln!(text, "  {depth} deltas: {}", kinds.join(", "));
        }
    }
    text
}

#[test]
fn a_life_follows_from_its_seed() {
    let mix = Mix {
        chains: true,
        ..Mix::default()
    };
    for seed in 0..20 {
        let record = life::live(seed, mix, false);
        assert_eq!(record, life::live(seed, mix, true));
    }
}

#[test]
fn power_cuts_single_image() {
    let record = run_and_report("single images", Mix::default());
    if record.cuts.all() < ENOUGH {
        return;
    }
    for case in [
        Case::Moved,
        Case::Reused,
        Case::Flush,
        Case::WriteThrough,
        Case::Undecided,
        Case::HostFailed,
        Case::LostOfOthers,
        Case::FailedFlush,
        Case::Grown,
        Case::HeldBack,
        Case::Marking,
        Case::Passed,
        Case::Killed,
        Case::ExtensionDropped,
        Case::ClosedWithBitmaps,
        Case::TakenOver,
    ] {
        assert!(record.cases.get(case) > 0, "never happened: {case:?}");
    }
}

#[test]
fn power_cuts_of_disks_that_grow() {
    let growing = Mix {
        chains: true,
        grows: true,
        ..Mix::default()
    };
    let record = run_and_report("disks that grow", growing);
    if record.cuts.all() < ENOUGH {
        return;
    }
    for case in [
        Case::Larger,
        Case::MovedForBat,
        Case::LargerCut,
        Case::LargerKilled,
    ] {
        assert!(record.cases.get(case) > 100, "too seldom: {case:?}");
    }
}

#[test]
fn power_cuts_of_disks_with_snapshots() {
    let snapshots = Mix {
        chains: true,
        snapshots: true,
        ..Mix::default()
    };
    let record = run_and_report("disks of which snapshots are made", snapshots);
    if record.cuts.all() < ENOUGH {
        return;
    }
    for case in [Case::Snapshot, Case::SnapshotKilled, Case::KilledInChange] {
        assert!(record.cases.get(case) > 100, "too seldom: {case:?}");
    }
    let under_way = record.cases.get(Case::SnapshotCut);
    assert!(under_way > record.cuts.all() / 3, "{under_way} cuts");
}

#[test]
fn power_cuts_of_disks_that_are_compacted() {
    let compacted = Mix {
        chains: true,
        compacts: true,
        ..Mix::default()
    };
    let record = run_and_report("disks that are compacted", compacted);
    if record.cuts.all() < ENOUGH {
        return;
    }
    for (case, at_least) in [
        (Case::Shorter, 100),
        (Case::CompactionCut, 50),
        (Case::CompactionKilled, 2),
    ] {
        let times = record.cases.get(case);
        assert!(times > at_least, "too seldom: {case:?}, {times}");
    }
}

#[test]
fn power_cuts_of_disks_whose_levels_go() {
    let merges = Mix {
        chains: true,
        merges: true,
        ..Mix::default()
    };
    let record = run_and_report("disks whose levels go", merges);
    let with_snapshots = Mix {
        snapshots: true,
        ..merges
    };
    let both = run_and_report("and of which snapshots are made", with_snapshots);
    if record.cuts.all() < ENOUGH {
        return;
    }
    for record in [record, both] {
        for (case, at_least) in [
            (Case::Merge, 100),
            (Case::Lift, 100),
            (Case::MergeKilled, 20),
        ] {
            let times = record.cases.get(case);
            assert!(times > at_least, "too seldom: {case:?}, {times}");
        }
        let under_way = record.cases.get(Case::MergeCut);
        assert!(under_way > record.cuts.all() / 3, "{under_way} cuts");
    }
}

#[test]
fn power_cuts_chains() {
    let chains = Mix {
        chains: true,
        ..Mix::default()
    };
    let record = run_and_report("images and chains", chains);
    if record.cuts.all() < ENOUGH {
        return;
    }
    for case in [Case::Copied, Case::CopyCut, Case::CopyFailed] {
        assert!(record.cases.get(case) > 0, "never happened: {case:?}");
    }
    for depth in 1..=DELTAS_MAX {
        let cuts = record.cuts_at_depth(depth);
        assert!(cuts > ENOUGH / 100, "{depth} deltas: {cuts} cuts");
    }
}
