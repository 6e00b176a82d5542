//! A life: one image through several power cuts.
//!
//! The image is opened, used, and cut off from power: while it is opened, used or
//! closed, or after it was closed. What is left is judged, becomes what the model
//! starts from, and is opened again: stale data hurts late.

use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::cases::{Case, Cases};
use super::checker::{self, Image};
use super::death::Heritage;
use super::disk::{Faults, SimDisk};
use super::file::SimFile;
use super::model::Model;
use super::pattern::Value;
use super::scenario::{Profile, Scenario};
use super::session::{Closed, Failure, Session, World};
use crate::ploop::Engine;
use crate::storage::FileId;

/// Cuts in a row that an image has to stand.
const GENERATIONS: u32 = 4;

/// Changes and syncs of the host's files, at most, until the power goes in the midst of an
/// opening or closing.
const CHANGES_MAX: u64 = 12;

/// What a life has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Cuts that could lose something.
    pub cuts: u64,
    /// Cuts that could not, as everything was synced.
    pub idle_cuts: u64,
    /// Of the former, how many there were of each kind of disk: number of deltas,
    /// and what the lowest is.
    pub kinds: BTreeMap<(usize, &'static str), u64>,
    /// See [`Cases`].
    pub cases: Cases,
}

impl Record {
    /// Adds what another life has shown.
    pub fn add(&mut self, other: &Self) {
        self.cuts += other.cuts;
        self.idle_cuts += other.idle_cuts;
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
    record: Record,
}

/// How the top was before it was opened last.
struct Before {
    closed: bool,
    extension: bool,
    file: SimFile,
    /// See [`Scenario::bytes_behind`].
    behind: Vec<u8>,
}

/// Lives the life that follows from a seed.
///
/// # Errors
/// What the engine did wrong. With `trace`, what led to it comes along.
pub fn live(seed: u64, chains: bool, trace: bool) -> Result<Record, Failure> {
    let mut life = Life::new(seed, chains, trace);
    let result = (0..GENERATIONS).try_for_each(|_| life.generation());
    match result {
        Ok(()) => {
            life.record.cases = life.world.cases;
            Ok(life.record)
        }
        Err(failure) if trace => {
            let scenario = format!("{:#?}", life.world.scenario);
            let trace = life.world.disk.take_trace().join("\n");
            Err(format!("{scenario}\n{trace}\n{failure}"))
        }
        failure => failure.map(|()| Record::default()),
    }
}

impl Life {
    fn new(seed: u64, chains: bool, trace: bool) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut scenario = Scenario::random(&mut rng, chains);
        let disk = SimDisk::new(scenario.levels, scenario.medium.clone(), rng.random());
        let mut next_value = 0;
        scenario.prepare(&disk, &mut rng, || {
            next_value += 1;
            Value(next_value)
        });
        if trace {
            disk.start_trace();
        }
        let world = World {
            model: Model::new(scenario.layout.len()),
            cases: Cases::default(),
            rng,
            scenario,
            disk,
            next_value,
        };
        let mut life = Self {
            world,
            record: Record::default(),
        };
        let chain = life.read_chain().expect("the image was made well");
        life.rebase(&chain);
        life
    }

    fn generation(&mut self) -> Result<(), Failure> {
        let world = &mut self.world;
        world.disk.tidy();
        let profile = Profile::random(&mut world.rng, world.scenario.cluster);
        world.disk.note(|| format!("{profile:?}"));
        let top = world.scenario.top();
        let image = read_image(world, top)?;
        let before = Before {
            closed: image.closed,
            extension: image.extension.is_some(),
            file: world.disk.snapshot(top),
            behind: world.scenario.bytes_behind(&world.disk),
        };
        let closed = self.session(&profile)?;
        let world = &mut self.world;
        let violations = world.disk.take_violations();
        if let Some(first) = violations.first() {
            return Err(first.clone());
        }
        let is_unsynced = world.disk.is_unsynced();
        if is_unsynced {
            self.record.cuts += 1;
            let kind = (world.scenario.levels, world.scenario.base());
            *self.record.kinds.entry(kind).or_default() += 1;
            let undecided = world.model.undecided() > 0;
            world.cases.count_if(Case::Undecided, undecided);
        } else {
            self.record.idle_cuts += 1;
        }
        let live = world.disk.snapshot(top);
        world.disk.power_on();
        self.judge(&profile, &before, &live, closed)
    }

    /// Opens, uses, and perhaps closes the image; then the power goes.
    fn session(&mut self, profile: &Profile) -> Result<Option<Closed>, Failure> {
        let world = &mut self.world;
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
                return Ok(None);
            }
        };
        let heritage = profile
            .deaths
            .map(|_| Heritage::new(&opened.engine, &options));
        let mut session = Session::new(opened, world, profile, policy);
        set_trouble(world, profile);
        let mut result = session.run(world, profile);
        for _ in 0..profile.deaths.unwrap_or(0) {
            if let Some(heritage) = &heritage
                && result.is_ok()
                && world.disk.is_powered()
            {
                session = heritage.pass_on(session, world, profile, policy)?;
                result = session.run(world, profile);
            }
        }
        let result = result.and_then(|()| {
            if world.disk.is_powered() && world.rng.random_ratio(1, 4) {
                close(&mut session, world).map(Some)
            } else {
                Ok(None)
            }
        });
        world.disk.power_off();
        session.abandon();
        end_trouble(world);
        result
    }

    fn read_chain(&self) -> Result<Vec<Image>, Failure> {
        let world = &self.world;
        (0..world.scenario.levels)
            .map(|level| read_image(world, FileId(level as u8)))
            .collect()
    }

    fn rebase(&mut self, chain: &[Image]) {
        let World {
            model,
            disk,
            scenario,
            ..
        } = &mut self.world;
        let sectors: Vec<u64> = scenario.layout.sectors().collect();
        model.rebase(|index| {
            let value = checker::guest_sector(disk, chain, sectors[index as usize]);
            value.unwrap_or(Value::ZEROS)
        });
    }

    /// Judges what the cut has left.
    fn judge(
        &mut self,
        profile: &Profile,
        before: &Before,
        live: &SimFile,
        closed: Option<Closed>,
    ) -> Result<(), Failure> {
        let chain = self.read_chain()?;
        let world = &self.world;
        for (index, sector) in (0..).zip(world.scenario.layout.sectors()) {
            let found = checker::guest_sector(&world.disk, &chain, sector);
            world
                .model
                .check_after_cut(index, found)
                .map_err(|wrong| format!("after the cut, guest sector {sector}: {wrong:?}"))?;
        }
        let top = world.scenario.top();
        let image = &chain[chain.len() - 1];
        world.scenario.check_extension(&world.disk, image)?;
        let is_dropped = before.extension && image.extension.is_none();
        let had_extension = before.extension;
        self.world
            .cases
            .count_if(Case::ExtensionKept, had_extension && !is_dropped);
        self.world
            .cases
            .count_if(Case::ExtensionDropped, is_dropped);
        let world = &self.world;
        let now = world.disk.snapshot(top);
        // The kernel may have given up what a failed write has left.
        let is_known = !profile.has_trouble();
        if image.closed
            && is_known
            && !now.has_same_data(live)
            && !(before.closed && now.has_same_data(&before.file))
        {
            return Err("I12: the image is marked as closed, and its content is neither the old nor the new one".to_owned());
        }
        if image.plain {
            judge_plain(world, before, &now)?;
        } else if closed == Some(Closed::Well) && !profile.read_only {
            let tail = image.tail(now.len());
            if !image.closed || tail > 0 {
                return Err(format!(
                    "I12: the image was closed; its mark says {}, {tail} bytes are behind its last cluster",
                    image.closed
                ));
            }
        }
        self.rebase(&chain);
        Ok(())
    }
}

fn read_image(world: &World, file: FileId) -> Result<Image, Failure> {
    match file.0 {
        0 if world.scenario.plain_base => Ok(world.scenario.plain_image()),
        _ => Image::read(&world.disk, file),
    }
}

/// A raw file never becomes another length than that of its disk, and what it has
/// behind the disk stays.
fn judge_plain(world: &World, before: &Before, now: &SimFile) -> Result<(), Failure> {
    let (old, full) = (before.file.len(), world.scenario.plain_len());
    if now.len() != old && now.len() != full {
        return Err(format!(
            "I12: the raw file had {old} bytes and now has {}",
            now.len()
        ));
    }
    if world.scenario.bytes_behind(&world.disk) != before.behind {
        return Err("I5: what is behind the disk in its raw file has changed".to_owned());
    }
    Ok(())
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
    });
}

fn close(session: &mut Session, world: &mut World) -> Result<Closed, Failure> {
    if world.rng.random() {
        session.drain(world)?;
        let changes = world.rng.random_range(0..CHANGES_MAX);
        world.disk.cut_after(Some(changes));
    }
    let closed = session.close(world)?;
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
