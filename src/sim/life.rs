//! A life: one image through several power cuts.
//!
//! The image is opened, used, and cut off from power: while it is opened, used or
//! closed, or after it was closed. What is left is judged, becomes what the model
//! starts from, and is opened again: stale data hurts late.

use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::bitmap::{self, Bitmaps};
use super::cases::{Case, Cases};
use super::checker::{self, Image};
use super::death::Heritage;
use super::disk::{Faults, SimDisk};
use super::judge::{Before, Cuts};
use super::model::Model;
use super::pattern::Value;
use super::scenario::{Mix, Profile, Scenario};
use super::session::{Closed, Failure, Session, World};
use crate::ploop::Engine;
use crate::ploop::control::Control;
use crate::storage::FileId;

/// Cuts in a row that an image has to stand.
const GENERATIONS: u32 = 4;

/// Changes and syncs of the host's files, at most, until the power goes in the midst of an
/// opening or closing.
const CHANGES_MAX: u64 = 12;

/// What a life has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Cuts, made or imagined.
    pub cuts: Cuts,
    /// How many cuts that could lose something there were of each kind of disk: number
    /// of deltas, and what the lowest is.
    pub kinds: BTreeMap<(usize, &'static str), u64>,
    /// See [`Cases`].
    pub cases: Cases,
}

impl Record {
    /// Adds what another life has shown.
    pub fn add(&mut self, other: &Self) {
        self.cuts.add(other.cuts);
        for (kind, cuts) in &other.kinds {
            *self.kinds.entry(*kind).or_default() += cuts;
        }
        self.cases.add(&other.cases);
    }

    /// How many cuts there were of disks with so many deltas.
    pub fn cuts_at_depth(&self, levels: usize) -> u64 {
        let kinds = self.kinds.iter();
        let at_depth = kinds.filter(|((depth, _), _)| *depth == levels);
        at_depth.map(|(_, cuts)| cuts).sum()
    }
}

struct Life {
    world: World,
    mix: Mix,
}

/// Lives the life that follows from a seed.
///
/// # Errors
/// What the engine did wrong. With `trace`, what led to it comes along.
pub fn live(seed: u64, mix: Mix, trace: bool) -> Result<Record, Failure> {
    let mut life = Life::new(seed, mix, trace);
    let result = (0..GENERATIONS).try_for_each(|_| life.generation());
    match result {
        Ok(()) => Ok(life.into_record()),
        Err(failure) if trace => {
            let scenario = format!("{:#?}", life.world.scenario);
            let trace = life.world.disk.take_trace().join("\n");
            Err(format!("{scenario}\n{trace}\n{failure}"))
        }
        failure => failure.map(|()| Record::default()),
    }
}

impl Life {
    fn new(seed: u64, mix: Mix, trace: bool) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut scenario = Scenario::random(&mut rng, mix);
        let disk = SimDisk::new(scenario.levels, scenario.medium.clone(), rng.random());
        let mut next_value = 0;
        scenario.prepare(&disk, &mut rng, || {
            next_value += 1;
            Value(next_value)
        });
        if trace {
            disk.start_trace();
        }
        let before = Before {
            closed: false,
            extension: false,
            file: disk.snapshot(scenario.top()),
            behind: Vec::new(),
            is_troubled: false,
        };
        let mut world = World {
            model: Model::new(scenario.layout.len()),
            cases: Cases::default(),
            cuts: Cuts::default(),
            lower: Vec::new(),
            changing: Vec::new(),
            before,
            bitmaps: Bitmaps::default(),
            sizes: vec![scenario.disk_sectors],
            raw_lens: Vec::new(),
            is_growing: false,
            is_snapshotting: false,
            is_compacting: false,
            is_either: false,
            is_merging: false,
            gone: None,
            mortal: None,
            relic: None,
            rng,
            scenario,
            disk,
            next_value,
        };
        world.scenario.tell_bitmap(&mut world.bitmaps, next_value);
        let read = world.disk.view(|view| world.read_lower(view));
        world.lower = read.expect("the images were made well");
        let mut life = Self { world, mix };
        let top = life.read_top().expect("the image was made well");
        life.learn(&top, Model::rebase);
        life
    }

    fn into_record(self) -> Record {
        let World {
            cuts,
            cases,
            scenario,
            ..
        } = self.world;
        let kind = (scenario.levels, scenario.base());
        Record {
            cuts,
            cases,
            kinds: BTreeMap::from([(kind, cuts.all())]),
        }
    }

    fn generation(&mut self) -> Result<(), Failure> {
        let world = &mut self.world;
        let is_inherited = world.disk.is_unsynced();
        if !is_inherited {
            world.disk.tidy();
        }
        let mut profile = Profile::random(&mut world.rng, world.scenario.cluster, self.mix);
        // What a killed process has left is made stable by the opening for writing.
        profile.read_only &= !is_inherited;
        world.disk.note(|| format!("{profile:?}"));
        let top = world.scenario.top();
        let image = world.disk.view(|view| world.read_image(view, top))?;
        world.use_size(image.sectors);
        // A length that a killed process has left need not be stable yet.
        match is_inherited {
            true => world.raw_lens.push(world.before.file.len()),
            false => world.raw_lens.clear(),
        }
        world.before = Before {
            closed: image.closed,
            extension: image.extension.is_some(),
            file: world.disk.snapshot(top),
            behind: world.disk.view(|view| world.scenario.bytes_behind(view)),
            is_troubled: profile.has_trouble(),
        };
        let ending = self.session(&profile)?;
        let world = &mut self.world;
        let was_growing = std::mem::take(&mut world.is_growing);
        let was_snapshotting = std::mem::take(&mut world.is_snapshotting);
        let was_merging = std::mem::take(&mut world.is_merging);
        let was_compacting = std::mem::take(&mut world.is_compacting);
        let violations = world.disk.take_violations();
        if let Some(first) = violations.first() {
            return Err(first.clone());
        }
        if matches!(ending, Ending::Killed | Ending::Passed) {
            world.cases.count_if(Case::SnapshotKilled, was_snapshotting);
            world.cases.count_if(Case::MergeKilled, was_merging);
            world.cases.count_if(Case::CompactionKilled, was_compacting);
            if world.is_either {
                world.adopt_new_top()?;
            }
            world.find_gone(false)?;
            let live = world.disk.snapshot(world.scenario.top());
            let image = world.disk.view(|view| world.judge(view, &live))?;
            let was_lost = image.extension.is_none() && !world.bitmaps.is_empty();
            if was_lost && ending == Ending::Passed && !profile.read_only {
                return Err("I12: the image was passed on without its bitmaps".to_owned());
            }
            world.settle_bitmaps(&image)?;
            self.learn(&image, Model::inherit);
            return Ok(());
        }
        if world.disk.is_unsynced() {
            world.cuts.made += 1;
            world.cases.count_if(Case::LargerCut, was_growing);
            world.cases.count_if(Case::SnapshotCut, was_snapshotting);
            world.cases.count_if(Case::MergeCut, was_merging);
            world.cases.count_if(Case::CompactionCut, was_compacting);
            let undecided = world.model.undecided() > 0;
            world.cases.count_if(Case::Undecided, undecided);
        } else {
            world.cuts.idle += 1;
        }
        let top = world.scenario.top();
        let live = world.disk.snapshot(top);
        let new = world
            .is_either
            .then(|| world.disk.snapshot(FileId(top.0 + 1)));
        world.disk.power_on();
        let live = world.find_name(live, new)?;
        world.find_gone(true)?;
        let image = world.disk.view(|view| world.judge(view, &live))?;
        world.levels_are_settled()?;
        world.set_size(image.sectors);
        self.judge_ending(ending, &profile, &image)?;
        self.world.settle_bitmaps(&image)?;
        self.learn(&image, Model::rebase);
        Ok(())
    }

    /// Opens, uses, and perhaps closes the image; then the power goes, or the process is
    /// killed together with its guest.
    fn session(&mut self, profile: &Profile) -> Result<Ending, Failure> {
        let world = &mut self.world;
        world.relic = None;
        world.cases.begin(&world.disk, &world.scenario);
        let early_cut = world.rng.random_ratio(1, 6);
        if early_cut {
            let changes = world.rng.random_range(0..8);
            world.disk.cut_after(Some(changes));
        }
        let mut options = world.scenario.options(&mut world.rng);
        options.read_only = profile.read_only;
        let policy = options.on_enospc;
        let top = world.scenario.top();
        let first_writable = FileId(top.0 + u8::from(profile.read_only));
        world
            .disk
            .change_medium(|medium| medium.first_writable = first_writable);
        world.disk.note(|| format!("opening with {options:?}"));
        let chain = world.scenario.chain();
        let is_faulty = world.rng.random_ratio(1, 24);
        if is_faulty {
            world.disk.change_medium(|medium| {
                medium.faults.read = 0.1;
                medium.faults.write = 0.1;
                medium.faults.sync = 0.1;
            });
        }
        options.awaits_take_over = profile.deaths.is_some();
        let opened = match Engine::open(world.disk.clone(), &chain, options.clone()) {
            Ok(opened) => opened,
            Err(error) if world.disk.is_powered() && !is_faulty => {
                return Err(format!("the image is not opened: {}", say(&error)));
            }
            Err(_) => {
                world
                    .cases
                    .count_if(Case::Marking, world.disk.is_unsynced());
                end_trouble(world);
                return Ok(Ending::Cut);
            }
        };
        world.see_size(&opened.engine)?;
        if !profile.read_only {
            world.bitmaps.are_loaded(&opened.engine, is_faulty)?;
        }
        let mut heritage = profile
            .deaths
            .map(|_| Heritage::new(&opened.engine, &options));
        let mut session = Session::new(opened, world, profile, policy);
        if world.rng.random_ratio(1, 2) {
            session.change_bitmaps(world)?;
        }
        set_trouble(world, profile);
        let deaths = profile.deaths.unwrap_or(0);
        let mortal = |heritage: &Heritage, deaths_left| {
            (deaths_left > 0).then(|| heritage.memory.map_again().expect("there is memory"))
        };
        world.mortal = heritage
            .as_ref()
            .and_then(|heritage| mortal(heritage, deaths));
        let mut result = session.run(world, profile);
        for deaths_left in (0..deaths).rev() {
            world.mortal = None;
            if let Some(heritage) = &mut heritage
                && result.is_ok()
                && (world.disk.is_powered() || world.relic.is_some())
            {
                session = heritage.pass_on(session, world, profile, policy)?;
                world.mortal = mortal(heritage, deaths_left);
                result = session.run(world, profile);
            }
        }
        world.mortal = None;
        let ending = result.and_then(|()| {
            if !world.disk.is_powered() {
                return Ok(Ending::Cut);
            }
            match world.rng.random_range(0..24) {
                0..7 => close(&mut session, world).map(Ending::Closed),
                // Of what has failed only the dead would know.
                7..9 if !profile.has_trouble() => Ok(Ending::Killed),
                9..12 if !profile.has_trouble() => {
                    session
                        .close(world, Control::Pass)
                        .map(|closed| match closed {
                            Closed::Well => Ending::Passed,
                            closed => Ending::Closed(closed),
                        })
                }
                _ => Ok(Ending::Cut),
            }
        });
        if matches!(ending, Ok(Ending::Killed | Ending::Passed)) {
            let is_passed = ending == Ok(Ending::Passed);
            world.cases.count_if(Case::Abandoned, !is_passed);
            world.cases.count_if(Case::Passed, is_passed);
            world.disk.kill();
            session.abandon();
            world.disk.restart();
        } else {
            world.disk.power_off();
            session.abandon();
        }
        end_trouble(world);
        ending
    }

    fn read_top(&self) -> Result<Image, Failure> {
        let world = &self.world;
        let top = world.scenario.top();
        world.disk.view(|view| world.read_image(view, top))
    }

    /// The model learns what there is now.
    fn learn(&mut self, top: &Image, how: fn(&mut Model, &dyn Fn(u64) -> Value)) {
        let World {
            model,
            disk,
            scenario,
            lower,
            ..
        } = &mut self.world;
        let sectors: Vec<u64> = scenario.layout.sectors().collect();
        disk.view(|view| {
            how(model, &|index| {
                let value = checker::guest_sector(view, lower, top, sectors[index as usize]);
                value.unwrap_or(Value::ZEROS)
            });
        });
    }

    /// Judges what an ending promises beyond any cut.
    fn judge_ending(
        &mut self,
        ending: Ending,
        profile: &Profile,
        image: &Image,
    ) -> Result<(), Failure> {
        let world = &mut self.world;
        if world.disk.view(|view| world.read_lower(view))? != world.lower {
            return Err("a lower delta has changed".to_owned());
        }
        let (had, has) = (world.before.extension, image.extension.is_some());
        world.cases.count_if(Case::ExtensionKept, had && has);
        world.cases.count_if(Case::ExtensionDropped, had && !has);
        let is_in_haste = ending == Ending::Closed(Closed::InHaste);
        let is_closed = is_in_haste || ending == Ending::Closed(Closed::Well);
        if is_closed && !image.plain && !profile.read_only {
            let tail = world.unexplained_tail(image)?;
            let was_lost = image.extension.is_none() && !world.bitmaps.is_empty();
            let may_fail = profile.has_trouble();
            if !image.closed || (tail > 0 && !is_in_haste && !(was_lost && may_fail)) {
                return Err(format!(
                    "I12: the image was closed; its mark says {}, {tail} bytes are behind its last cluster",
                    image.closed
                ));
            }
            if was_lost && !may_fail {
                return Err("I12: the image was closed without its bitmaps".to_owned());
            }
            let with_bitmaps = image.extension.is_some() && !world.bitmaps.is_empty();
            world.cases.count_if(Case::ClosedWithBitmaps, with_bitmaps);
        }
        Ok(())
    }
}

impl World {
    /// What the file of the top has behind its last mapped cluster, beside bitmaps and, before
    /// these, holes.
    fn unexplained_tail(&self, image: &Image) -> Result<u64, Failure> {
        let top = self.scenario.top();
        let len = self.disk.live_len(top);
        let place = self.disk.view(|view| bitmap::place(view, top, image))?;
        let Some(bitmaps) = place else {
            return Ok(image.tail(len));
        };
        let used_end = len - image.tail(len);
        let data = self.disk.data_from(top, used_end);
        let is_hole = data.is_none_or(|data| data.start >= bitmaps.start);
        Ok(match is_hole {
            true => len - bitmaps.end,
            false => len - used_end,
        })
    }

    /// What there is of bitmaps from now on.
    fn settle_bitmaps(&mut self, image: &Image) -> Result<(), Failure> {
        let Self {
            disk,
            bitmaps,
            scenario,
            ..
        } = self;
        disk.view(|view| bitmaps.settle(view, scenario.top(), image))
    }
}

/// How a session has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The power went.
    Cut,
    /// The power went after the image was closed, or while it was.
    Closed(Closed),
    /// The process was killed, and its guest with it. The host has kept everything,
    /// stable or not.
    Killed,
    /// The image was closed for another process, which opens it at once.
    Passed,
}

/// Lets things go wrong as the profile says.
fn set_trouble(world: &mut World, profile: &Profile) {
    let room = world.rng.random_range(0..6) * world.scenario.cluster / 4096;
    let capacity = profile.is_tight.then(|| world.disk.used_blocks() + room);
    world.disk.change_medium(|medium| {
        medium.faults = profile.faults;
        medium.capacity = capacity;
    });
}

/// The host is as it should be.
fn end_trouble(world: &mut World) {
    let failures = world.disk.take_failures();
    world.cases.count_many(Case::HostFailed, failures);
    let losses = world.disk.take_losses();
    world.cases.count_many(Case::LostOfOthers, losses);
    let copies = world.disk.take_copies();
    world.cases.count_many(Case::CopyFailed, copies.failed);
    world.cases.count_many(Case::CopyCut, copies.cut);
    world.disk.change_medium(|medium| {
        medium.faults = Faults::default();
        medium.capacity = None;
        medium.stalled = None;
    });
}

fn close(session: &mut Session, world: &mut World) -> Result<Closed, Failure> {
    if world.rng.random() {
        session.drain(world)?;
        let changes = world.rng.random_range(0..CHANGES_MAX);
        world.disk.cut_after(Some(changes));
    }
    let how = match world.rng.random_range(0..4) {
        0 => Control::HandOver { trims: true },
        1 => Control::HandOver { trims: false },
        _ => Control::Close,
    };
    let mut closed = session.close(world, how)?;
    if closed == Closed::Badly && how.can_go_on() && session.use_on(world)? {
        closed = session.close(world, Control::Close)?;
    }
    world.cases.count_if(
        Case::Marking,
        closed == Closed::Cut && world.disk.is_unsynced(),
    );
    Ok(closed)
}

fn say(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", say(source)),
        None => error.to_string(),
    }
}
