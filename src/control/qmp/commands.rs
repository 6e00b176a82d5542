//! The commands, each in a function of its own.
//!
//! Those with a name of QEMU's mean what they mean in QEMU; `docs/control.md` says where
//! one says less. What takes time is only begun here: see [`Wish`].

use serde_json::{Value, json};

use super::arguments::{Arguments, missing};
use super::bitmaps;
use super::message::{Answer, Class, Failure, Request, no_such_snapshot};
use super::names::{DISK, lower_level};
use super::shapes;
use crate::control::jobs::{GUEST_SHARE, Terms, Verb, speed_of};
use crate::control::subject::Subject;
use crate::device::ThrottleLimits;
use crate::format::{Guid, SECTOR_SIZE, Sector, SnapshotNotes};
use crate::image::NewSnapshot;
use crate::ploop::BitmapAction;
use crate::served::delete::Which;
use crate::storage::LockStanding;

/// What a command wants of the program besides its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// Nothing.
    #[default]
    Nothing,
    /// It is to end.
    Quit,
    /// The disk is to become of this size, or a little larger. The answer is not there before
    /// that has happened, or has failed.
    Resize(Sector),
    /// It is to become larger by so much, or a little more than it is when the wish is
    /// granted. Likewise; the answer says how large it is then.
    Grow(Sector),
    /// What was written is to be in the files of the disk, the mapping included. Likewise.
    Flush,
    /// Which snapshots there are. Likewise.
    ListSnapshots,
    /// A snapshot is to be made. Likewise; the answer has its name, unless another has the same
    /// description and that is to be an error.
    CreateSnapshot {
        /// How it is to be called.
        new: NewSnapshot,
        /// No other may have the same description.
        is_unique: bool,
        /// What is done to dirty bitmaps at the moment of which it is.
        bitmaps: Vec<BitmapAction>,
    },
    /// All of this is to be done to dirty bitmaps, at one moment, or nothing. Likewise.
    ChangeBitmaps(Vec<BitmapAction>),
    /// Which jobs there are. Likewise.
    ListJobs {
        /// As `query-block-jobs` has them; else as `query-jobs`.
        are_of_block: bool,
    },
    /// The space of zeros and gaps is to be given back, by a job. The answer does not wait for
    /// its end.
    Compact(Terms),
    /// Snapshots are to be deleted, by a job. Likewise.
    DeleteSnapshot {
        /// Which.
        which: Which,
        /// How.
        terms: Terms,
    },
    /// The same, and the answer, what the snapshot was, is not there before that has happened or
    /// has failed.
    DeleteInternalSnapshot(Which),
    /// The disk is to go back to this snapshot.
    SwitchSnapshot(Guid),
    /// Something is to be done with a job.
    ToJob {
        /// Its name.
        id: String,
        /// What.
        verb: Verb,
    },
}

impl Wish {
    /// Whether whoever grants it answers the command.
    #[must_use]
    pub fn is_answered_later(&self) -> bool {
        !matches!(self, Self::Nothing | Self::Quit)
    }
}

/// What a command works with.
pub(super) struct Context<'a> {
    pub subject: &'a dyn Subject,
    pub wish: Wish,
}

type Run = fn(Arguments, &mut Context<'_>) -> Answer;

const COMMANDS: &[(&str, Run)] = &[
    ("block-dirty-bitmap-add", |all, context| {
        bitmaps::alone("block-dirty-bitmap-add", all, context)
    }),
    ("block-dirty-bitmap-clear", |all, context| {
        bitmaps::alone("block-dirty-bitmap-clear", all, context)
    }),
    ("block-dirty-bitmap-disable", |all, context| {
        bitmaps::alone("block-dirty-bitmap-disable", all, context)
    }),
    ("block-dirty-bitmap-enable", |all, context| {
        bitmaps::alone("block-dirty-bitmap-enable", all, context)
    }),
    ("block-dirty-bitmap-merge", |all, context| {
        bitmaps::alone("block-dirty-bitmap-merge", all, context)
    }),
    ("block-dirty-bitmap-remove", |all, context| {
        bitmaps::alone("block-dirty-bitmap-remove", all, context)
    }),
    ("block-job-set-speed", set_job_speed),
    ("block-latency-histogram-set", set_latency_histogram),
    ("block-set-write-threshold", set_write_threshold),
    ("block_resize", resize),
    ("block_set_io_throttle", set_io_throttle),
    (
        "blockdev-snapshot-delete-internal-sync",
        delete_internal_snapshot,
    ),
    ("blockdev-snapshot-internal-sync", create_internal_snapshot),
    ("compact", compact),
    ("flush", flush),
    ("grow", grow),
    ("job-cancel", cancel_job),
    ("job-complete", complete_job),
    ("job-dismiss", dismiss_job),
    ("job-finalize", finalize_job),
    ("job-pause", pause_job),
    ("job-resume", resume_job),
    ("query-block", query_block),
    ("query-block-jobs", query_block_jobs),
    ("query-blockstats", query_blockstats),
    ("query-commands", query_commands),
    ("query-engine", query_engine),
    ("query-jobs", query_jobs),
    ("query-latencies", query_latencies),
    ("query-named-block-nodes", query_named_block_nodes),
    ("query-status", query_status),
    ("query-version", query_version),
    ("quit", quit),
    ("snapshot-create", create_snapshot),
    ("snapshot-delete", delete_snapshot),
    ("snapshot-list", list_snapshots),
    ("snapshot-merge", merge_snapshots),
    ("snapshot-switch", switch_snapshot),
    ("throttle", throttle),
    ("transaction", bitmaps::transaction),
];

/// The one by which a client ends its introduction.
pub(super) const NEGOTIATE: &str = "qmp_capabilities";

/// Does what is asked for.
pub(super) fn run(request: Request, context: &mut Context<'_>) -> Answer {
    let name = request.command.as_str();
    match COMMANDS.iter().find(|(known, _)| *known == name) {
        Some((_, run)) => run(Arguments::new(request.arguments), context),
        None => Err(Failure::new(
            Class::CommandNotFound,
            format!("The command {name} has not been found"),
        )),
    }
}

/// The end of the introduction: nothing is on offer that could be enabled.
pub(super) fn negotiate(mut arguments: Arguments) -> Answer {
    let enable = arguments.texts("enable")?;
    arguments.end()?;
    match enable.unwrap_or_default().first() {
        Some(capability) => Err(Failure::generic(format!(
            "Capability '{capability}' is not available"
        ))),
        None => Ok(json!({})),
    }
}

/// What the programs that were made for QEMU know by its number.
pub(super) fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 2 },
        "package": concat!("vhost-user-ploop-", env!("CARGO_PKG_VERSION")),
    })
}

fn query_version(arguments: Arguments, _: &mut Context<'_>) -> Answer {
    arguments.end()?;
    Ok(version())
}

fn query_commands(arguments: Arguments, _: &mut Context<'_>) -> Answer {
    arguments.end()?;
    let names = COMMANDS.iter().map(|(name, _)| *name).chain([NEGOTIATE]);
    Ok(names.map(|name| json!({ "name": name })).collect())
}

fn query_status(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    let engine = context.subject.engine();
    let status = match (engine.waits_for_space, engine.is_suspended) {
        _ if matches!(engine.lock, LockStanding::InDoubt | LockStanding::Lost) => "io-error",
        (true, _) => "io-error",
        (_, true) => "paused",
        _ => "running",
    };
    Ok(json!({ "status": status, "running": status == "running" }))
}

fn query_block(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    Ok(json!([shapes::device(context.subject)]))
}

fn query_named_block_nodes(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    // What is below a node is never repeated in it.
    arguments.bool("flat")?;
    arguments.end()?;
    Ok(shapes::nodes(context.subject))
}

fn query_blockstats(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let of_nodes = arguments.bool("query-nodes")?.unwrap_or_default();
    arguments.end()?;
    let (totals, bins) = (context.subject.totals(), context.subject.bins());
    Ok(json!([shapes::statistics(&totals, &bins, of_nodes)]))
}

fn query_engine(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    let (report, queues) = (context.subject.engine(), context.subject.queues());
    let is_open = context.subject.is_open();
    let mut engine = shapes::engine(&context.subject.file_id(), is_open, &report, &queues);
    engine["folder-id"] = context.subject.folder_id().into();
    Ok(engine)
}

fn query_latencies(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    Ok(shapes::latencies(&context.subject.latencies()))
}

/// Takes the name of the device.
fn require_disk(name: &str) -> Result<(), Failure> {
    match name == DISK {
        true => Ok(()),
        false => Err(Failure::no_device(name)),
    }
}

/// Most boundaries of a histogram.
const MAX_BOUNDARIES: usize = 1024;

fn set_latency_histogram(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let id = arguments.required_text("id")?;
    let all = arguments.counts("boundaries")?;
    let mut own = |kind| arguments.counts(&format!("boundaries-{kind}"));
    let (read, write, zap, flush) = (own("read")?, own("write")?, own("zap")?, own("flush")?);
    arguments.end()?;
    require_disk(&id)?;
    // QEMU does not look at those of appending to zones here, of which there are none.
    if [&all, &read, &write, &flush]
        .into_iter()
        .all(Option::is_none)
    {
        context.subject.give_up_bins();
        return Ok(json!({}));
    }
    let of_kind = |own: Option<Vec<u64>>, kind: &str| {
        let list = own.or_else(|| all.clone());
        let is_valid = |list: &Vec<u64>| {
            let ascends = list.windows(2).all(|pair| pair[0] < pair[1]);
            ascends && list.first() != Some(&0) && list.len() <= MAX_BOUNDARIES
        };
        match list.as_ref().is_none_or(is_valid) {
            true => Ok(list),
            false => Err(Failure::generic(format!(
                "Device '{id}' set {kind} boundaries fail"
            ))),
        }
    };
    let (reads, writes) = (of_kind(read, "read")?, of_kind(write, "write")?);
    of_kind(zap, "append write")?;
    let flushes = of_kind(flush, "flush")?;
    // Kinds that are not named keep theirs, and what was counted of them.
    context.subject.ask_for_bins([reads, writes, flushes]);
    Ok(json!({}))
}

fn set_write_threshold(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let node = arguments.required_text("node-name")?;
    let bytes = arguments.required_size("write-threshold")?;
    arguments.end()?;
    let levels = context.subject.levels();
    let Some(index) = shapes::index_of_node(levels.len(), &node) else {
        return Err(Failure::generic(format!("Device '{node}' not found")));
    };
    let refuse = |why: &str| Err(Failure::generic(format!("Node '{node}' {why}")));
    let level = &levels[index];
    if !level.is_writable {
        return refuse("is only read");
    }
    if !level.is_ploop {
        return refuse("is a raw image, whose file has the size of the disk from the start");
    }
    context.subject.set_write_threshold(bytes);
    Ok(json!({}))
}

fn set_io_throttle(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let names = (arguments.text("id")?, arguments.text("device")?);
    let mut limits = ThrottleLimits::default();
    for name in ThrottleLimits::NAMES {
        set(&mut limits, name, arguments.required_count(name)?);
    }
    for name in ThrottleLimits::NAMES {
        for part in ["max", "max_length"] {
            let name = format!("{name}_{part}");
            if let Some(value) = arguments.count(&name)? {
                set(&mut limits, &name, value);
            }
        }
    }
    limits.iops_size = arguments.count("iops_size")?.unwrap_or_default();
    let group = arguments.text("group")?;
    arguments.end()?;
    let name = match names {
        (Some(name), None) | (None, Some(name)) => name,
        _ => {
            let desc = "Need exactly one of 'device' and 'id'";
            return Err(Failure::generic(desc));
        }
    };
    require_disk(&name)?;
    if group.is_some() {
        return Err(Failure::generic("Groups of disks cannot be limited here"));
    }
    let set = context.subject.set_limits(limits);
    set.map_err(|error| Failure::generic(error.to_string()))?;
    Ok(json!({}))
}

/// Changes those limits that are named, and returns all: who changes one need not know the
/// others, which somebody else may change at the same time.
fn throttle(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let mut changes = Vec::new();
    for name in ThrottleLimits::NUMBERS {
        if let Some(value) = arguments.count(name)? {
            changes.push((name, value));
        }
    }
    arguments.end()?;
    if !changes.is_empty() {
        let limits = context.subject.limits().with(&changes);
        let limits = limits.map_err(missing)?;
        let set = context.subject.set_limits(limits);
        set.map_err(|error| Failure::generic(error.to_string()))?;
    }
    Ok(shapes::limits(context.subject.limits()))
}

fn set(limits: &mut ThrottleLimits, name: &str, value: u64) {
    if let Some(field) = limits.field(name) {
        *field = value;
    }
}

/// Begins it. What is wrong with the size but its kind, whoever grants the wish says.
fn resize(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let (device, node) = (arguments.text("device")?, arguments.text("node-name")?);
    let size = arguments.required_integer("size")?;
    arguments.end()?;
    let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
    if device != DISK && node != DISK {
        let mut lower = (1..context.subject.levels().len()).map(|index| lower_level(index - 1));
        if lower.any(|name| name == node) {
            let why = format!("Node '{node}' is of a snapshot, which keeps its size");
            return Err(Failure::generic(why));
        }
        return Err(Failure::generic(format!(
            "Cannot find device='{device}' nor node-name='{node}'"
        )));
    }
    let size = match u64::try_from(size) {
        Ok(size) if size > 0 => size,
        _ => return Err(Failure::generic("Parameter 'size' expects a >0 size")),
    };
    context.wish = Wish::Resize(sectors(size)?);
    Ok(json!({}))
}

/// Begins it. By how much is for the one to add up who knows the size at that moment: who
/// asks may know an older one.
fn grow(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let by = arguments.required_count("by")?;
    arguments.end()?;
    context.wish = Wish::Grow(sectors(by)?);
    Ok(json!({}))
}

fn flush(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    context.wish = Wish::Flush;
    Ok(json!({}))
}

fn list_snapshots(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    context.wish = Wish::ListSnapshots;
    Ok(json!({}))
}

fn create_snapshot(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let (guid, description) = (arguments.text("guid")?, arguments.text("description")?);
    arguments.end()?;
    let guid = guid.as_deref().map(parse_guid).transpose()?;
    require_description(description.as_deref())?;
    context.wish = Wish::CreateSnapshot {
        new: NewSnapshot { guid, description },
        is_unique: false,
        bitmaps: Vec::new(),
    };
    Ok(json!({}))
}

fn parse_guid(guid: &str) -> Result<Guid, Failure> {
    let parsed: Result<Guid, _> = guid.parse();
    parsed.map_err(|_| Failure::generic(format!("Parameter 'guid' expects a GUID: {guid}")))
}

/// Begins it.
fn delete_snapshot(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let guid = arguments.required_text("guid")?;
    let terms = job_terms(arguments)?;
    let which = Which::Guid(parse_guid(&guid)?);
    context.wish = Wish::DeleteSnapshot { which, terms };
    Ok(json!({}))
}

/// Begins it.
fn merge_snapshots(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let (from, to) = (arguments.text("from")?, arguments.text("to")?);
    let terms = job_terms(arguments)?;
    let parse = |name: &str, guid: Option<String>| {
        let parsed = guid.as_deref().map(str::parse::<Guid>).transpose();
        parsed.map_err(|_| {
            let guid = guid.unwrap_or_default();
            Failure::generic(format!("Parameter '{name}' expects a GUID: {guid}"))
        })
    };
    let which = Which::Range {
        from: parse("from", from)?,
        to: parse("to", to)?,
    };
    context.wish = Wish::DeleteSnapshot { which, terms };
    Ok(json!({}))
}

/// Whoever grants it says what it would take.
fn switch_snapshot(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let guid = arguments.required_text("guid")?;
    arguments.end()?;
    context.wish = Wish::SwitchSnapshot(parse_guid(&guid)?);
    Ok(json!({}))
}

/// QEMU's IDs are numbers, which it gives out; here they are GUIDs.
fn delete_internal_snapshot(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let device = arguments.required_text("device")?;
    let (id, name) = (arguments.text("id")?, arguments.text("name")?);
    arguments.end()?;
    require_root(&device)?;
    if id.is_none() && name.is_none() {
        return Err(Failure::generic("Name or id must be provided"));
    }
    let guid = match id.as_deref().map(str::parse) {
        None => None,
        Some(Ok(guid)) => Some(guid),
        Some(Err(_)) => {
            let why = no_such_snapshot(id.as_deref(), name.as_deref());
            return Err(Failure::generic(why));
        }
    };
    context.wish = Wish::DeleteInternalSnapshot(Which::Having {
        guid,
        description: name,
    });
    Ok(json!({}))
}

/// QEMU has names and no GUIDs, so the name is the description.
fn create_internal_snapshot(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let device = arguments.required_text("device")?;
    let name = arguments.required_text("name")?;
    arguments.end()?;
    context.wish = Wish::CreateSnapshot {
        new: internal_snapshot(&device, name)?,
        is_unique: true,
        bitmaps: Vec::new(),
    };
    Ok(json!({}))
}

/// A snapshot of this name, of this device.
pub(super) fn internal_snapshot(device: &str, name: String) -> Result<NewSnapshot, Failure> {
    require_root(device)?;
    if name.is_empty() {
        return Err(Failure::generic("Name is empty"));
    }
    require_description(Some(&name))?;
    Ok(NewSnapshot {
        guid: None,
        description: Some(name),
    })
}

/// Takes the name of the device or of its top node.
fn require_root(name: &str) -> Result<(), Failure> {
    match name == DISK {
        true => Ok(()),
        false => Err(Failure::generic(format!(
            "Cannot find device='{name}' nor node-name='{name}'"
        ))),
    }
}

fn require_description(text: Option<&str>) -> Result<(), Failure> {
    match text.is_none_or(SnapshotNotes::is_description) {
        true => Ok(()),
        false => Err(Failure::generic(format!(
            "A description is one line of 1 to {} bytes without control characters",
            SnapshotNotes::DESCRIPTION_MAX
        ))),
    }
}

fn sectors(bytes: u64) -> Result<Sector, Failure> {
    match bytes % SECTOR_SIZE {
        0 => Ok(Sector(bytes / SECTOR_SIZE)),
        _ => Err(Failure::generic(format!(
            "The size is no multiple of {SECTOR_SIZE} bytes: {bytes}"
        ))),
    }
}

fn query_jobs(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    context.wish = Wish::ListJobs {
        are_of_block: false,
    };
    Ok(json!([]))
}

fn query_block_jobs(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    context.wish = Wish::ListJobs { are_of_block: true };
    Ok(json!([]))
}

/// Begins it.
fn compact(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    context.wish = Wish::Compact(job_terms(arguments)?);
    Ok(json!({}))
}

/// What commands that begin a job are told of it.
fn job_terms(mut arguments: Arguments) -> Result<Terms, Failure> {
    let id = arguments.text("job-id")?.unwrap_or_else(|| DISK.to_owned());
    let speed = arguments.integer("speed")?.unwrap_or_default();
    let share = arguments.count("guest-share")?;
    let auto_dismiss = arguments.bool("auto-dismiss")?.unwrap_or(true);
    arguments.end()?;
    let share = share.unwrap_or(u64::from(GUEST_SHARE));
    let guest_share = u8::try_from(share).ok().filter(|share| *share < 100);
    let guest_share = guest_share
        .ok_or_else(|| Failure::generic("Parameter 'guest-share' expects percent, from 0 to 99"))?;
    Ok(Terms {
        id,
        speed: speed_of(speed).map_err(Failure::generic)?,
        guest_share,
        auto_dismiss,
    })
}

fn set_job_speed(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let id = arguments.required_text("device")?;
    let speed = arguments.required_integer("speed")?;
    arguments.end()?;
    let verb = Verb::SetSpeed(speed);
    context.wish = Wish::ToJob { id, verb };
    Ok(json!({}))
}

fn pause_job(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    to_job(arguments, context, Verb::Pause)
}

fn resume_job(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    to_job(arguments, context, Verb::Resume)
}

fn cancel_job(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    to_job(arguments, context, Verb::Cancel)
}

fn complete_job(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    to_job(arguments, context, Verb::Complete)
}

fn finalize_job(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    to_job(arguments, context, Verb::Finalize)
}

fn dismiss_job(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    to_job(arguments, context, Verb::Dismiss)
}

fn to_job(mut arguments: Arguments, context: &mut Context<'_>, verb: Verb) -> Answer {
    let id = arguments.required_text("id")?;
    arguments.end()?;
    context.wish = Wish::ToJob { id, verb };
    Ok(json!({}))
}

fn quit(arguments: Arguments, context: &mut Context<'_>) -> Answer {
    arguments.end()?;
    context.wish = Wish::Quit;
    Ok(json!({}))
}
