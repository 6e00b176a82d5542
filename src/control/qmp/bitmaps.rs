//! Commands for dirty bitmaps, and `transaction`, which does several of them at one moment.
//!
//! What is wrong with arguments is said first, of all actions, as QEMU does; then what is wrong
//! with what they are to do.

use serde_json::{Value, json};

use super::arguments::{Arguments, wrong_type};
use super::commands::{Context, Wish, internal_snapshot};
use super::message::{Answer, Failure};
use super::names::{DISK, lower_level};
use crate::control::subject::Subject;
use crate::image::NewSnapshot;
use crate::ploop::BitmapAction;

/// A command for one bitmap, and the action of a transaction of the same name.
type Read = fn(Arguments) -> Result<Asked, Failure>;

/// By name.
const ACTIONS: &[(&str, Read)] = &[
    ("abort", read_abort),
    ("block-dirty-bitmap-add", read_add),
    ("block-dirty-bitmap-clear", read_clear),
    ("block-dirty-bitmap-disable", read_disable),
    ("block-dirty-bitmap-enable", read_enable),
    ("block-dirty-bitmap-merge", read_merge),
    ("block-dirty-bitmap-remove", read_remove),
    ("blockdev-snapshot-internal-sync", read_snapshot),
];

/// Those of QEMU that have no meaning here.
const UNKNOWN_HERE: [&str; 4] = [
    "blockdev-backup",
    "blockdev-snapshot",
    "blockdev-snapshot-sync",
    "drive-backup",
];

/// What is asked for, before it is known whether that can be.
#[derive(Debug)]
enum Asked {
    /// Of a node's bitmap, and of others that have sources.
    Bitmap {
        node: String,
        action: BitmapAction,
        /// Nodes of sources, if there are any, and of which bitmap.
        others: Vec<(String, String)>,
    },
    Snapshot {
        device: String,
        name: String,
    },
    Abort,
}

/// What is to be done at one moment.
#[derive(Debug, Default)]
struct Plan {
    bitmaps: Vec<BitmapAction>,
    snapshot: Option<NewSnapshot>,
}

impl Plan {
    fn add(&mut self, asked: Asked, subject: &dyn Subject) -> Result<(), Failure> {
        match asked {
            Asked::Abort => Err(Failure::generic("Transaction aborted using Abort action")),
            Asked::Snapshot { device, name } => {
                let snapshot = internal_snapshot(&device, name)?;
                match self.snapshot.replace(snapshot) {
                    None => Ok(()),
                    Some(_) => Err(Failure::generic(
                        "A disk has one snapshot of a moment, and no other",
                    )),
                }
            }
            Asked::Bitmap {
                node,
                action,
                others,
            } => {
                require_node(&node, &action, subject)?;
                for (node, name) in others {
                    match node == DISK {
                        true => {}
                        false if is_lower(&node, subject) => return Err(not_found(&name)),
                        false => return Err(no_node(&node)),
                    }
                }
                self.bitmaps.push(action);
                Ok(())
            }
        }
    }

    fn wish(self) -> Wish {
        match self.snapshot {
            Some(new) => Wish::CreateSnapshot {
                new,
                is_unique: true,
                bitmaps: self.bitmaps,
            },
            None if self.bitmaps.is_empty() => Wish::Nothing,
            None => Wish::ChangeBitmaps(self.bitmaps),
        }
    }
}

/// Bitmaps are of the disk, and none is of a level below its top.
fn require_node(node: &str, action: &BitmapAction, subject: &dyn Subject) -> Result<(), Failure> {
    let name = match action {
        BitmapAction::Add { name, .. } => {
            if name.is_empty() {
                return Err(Failure::generic("Bitmap name cannot be empty"));
            }
            if node == DISK {
                return Ok(());
            }
            return Err(Failure::generic(match is_lower(node, subject) {
                true => format!("Node '{node}' is of a snapshot, which does not change"),
                false => format!("Cannot find device='{node}' nor node-name='{node}'"),
            }));
        }
        BitmapAction::Remove(name)
        | BitmapAction::Clear(name)
        | BitmapAction::Enable(name)
        | BitmapAction::Disable(name)
        | BitmapAction::Merge { target: name, .. } => name,
    };
    match node == DISK {
        true => Ok(()),
        false if is_lower(node, subject) => Err(not_found(name)),
        false => Err(no_node(node)),
    }
}

fn is_lower(node: &str, subject: &dyn Subject) -> bool {
    let lower = subject.levels().len().saturating_sub(1);
    (0..lower).any(|index| lower_level(index) == node)
}

fn no_node(node: &str) -> Failure {
    Failure::generic(format!("Node '{node}' not found"))
}

fn not_found(name: &str) -> Failure {
    Failure::generic(format!("Dirty bitmap '{name}' not found"))
}

/// Has the action of this name done alone.
pub(super) fn alone(name: &str, arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let read = reader_of(name).ok_or_else(|| not_accepted("type", name))?;
    let mut plan = Plan::default();
    plan.add(read(arguments)?, context.subject)?;
    context.wish = plan.wish();
    Ok(json!({}))
}

fn reader_of(name: &str) -> Option<Read> {
    let known = ACTIONS.iter().find(|(known, _)| *known == name);
    known.map(|(_, read)| *read)
}

pub(super) fn transaction(mut arguments: Arguments, context: &mut Context<'_>) -> Answer {
    let actions = arguments.required_objects("actions")?;
    let mut asked = Vec::new();
    for mut action in actions {
        let kind = action.required_text("type")?;
        let Some(read) = reader_of(&kind) else {
            return Err(match UNKNOWN_HERE.contains(&kind.as_str()) {
                true => Failure::generic(format!(
                    "There is no '{kind}' here, in a transaction or without one"
                )),
                false => not_accepted("type", &kind),
            });
        };
        let data = action.required_object("data")?;
        action.end()?;
        asked.push((kind, read(data)?));
    }
    let mut is_grouped = false;
    if let Some(mut properties) = arguments.object("properties")? {
        let mode = properties.text("completion-mode")?;
        properties.end()?;
        is_grouped = match mode.as_deref() {
            None | Some("individual") => false,
            Some("grouped") => true,
            Some(mode) => return Err(not_accepted("completion-mode", mode)),
        };
    }
    arguments.end()?;
    let mut plan = Plan::default();
    for (kind, asked) in asked {
        if is_grouped {
            // Jobs alone have an end that could be another's.
            return Err(Failure::generic(format!(
                "Action '{kind}' does not support transaction property completion-mode = grouped"
            )));
        }
        plan.add(asked, context.subject)?;
    }
    context.wish = plan.wish();
    Ok(json!({}))
}

/// One of a list of words, without its place, as QEMU says it.
fn not_accepted(name: &str, value: &str) -> Failure {
    Failure::generic(format!(
        "Parameter '{name}' does not accept value '{value}'"
    ))
}

fn read_abort(arguments: Arguments) -> Result<Asked, Failure> {
    arguments.end()?;
    Ok(Asked::Abort)
}

fn read_snapshot(mut arguments: Arguments) -> Result<Asked, Failure> {
    let device = arguments.required_text("device")?;
    let name = arguments.required_text("name")?;
    arguments.end()?;
    Ok(Asked::Snapshot { device, name })
}

fn read_add(mut arguments: Arguments) -> Result<Asked, Failure> {
    let node = arguments.required_text("node")?;
    let name = arguments.required_text("name")?;
    let granularity = arguments.uint32("granularity")?;
    let is_persistent = arguments.bool("persistent")?.unwrap_or_default();
    let is_disabled = arguments.bool("disabled")?.unwrap_or_default();
    arguments.end()?;
    let action = BitmapAction::Add {
        name,
        granularity: granularity.map(u64::from),
        is_persistent,
        records: !is_disabled,
    };
    Ok(of(node, action))
}

fn of(node: String, action: BitmapAction) -> Asked {
    Asked::Bitmap {
        node,
        action,
        others: Vec::new(),
    }
}

fn read_one(
    mut arguments: Arguments,
    action: fn(String) -> BitmapAction,
) -> Result<Asked, Failure> {
    let node = arguments.required_text("node")?;
    let name = arguments.required_text("name")?;
    arguments.end()?;
    Ok(of(node, action(name)))
}

fn read_remove(arguments: Arguments) -> Result<Asked, Failure> {
    read_one(arguments, BitmapAction::Remove)
}

fn read_clear(arguments: Arguments) -> Result<Asked, Failure> {
    read_one(arguments, BitmapAction::Clear)
}

fn read_enable(arguments: Arguments) -> Result<Asked, Failure> {
    read_one(arguments, BitmapAction::Enable)
}

fn read_disable(arguments: Arguments) -> Result<Asked, Failure> {
    read_one(arguments, BitmapAction::Disable)
}

fn read_merge(mut arguments: Arguments) -> Result<Asked, Failure> {
    let node = arguments.required_text("node")?;
    let target = arguments.required_text("target")?;
    let mut sources = Vec::new();
    let mut others = Vec::new();
    for (place, source) in arguments.required_list("bitmaps")? {
        match source {
            Value::String(name) => sources.push(name),
            Value::Object(map) => {
                let mut source = Arguments::within(&place, map);
                let node = source.required_text("node")?;
                let name = source.required_text("name")?;
                source.end()?;
                others.push((node, name.clone()));
                sources.push(name);
            }
            // As QEMU calls what has no name.
            _ => return Err(wrong_type("null", "BlockDirtyBitmapOrStr")),
        }
    }
    arguments.end()?;
    Ok(Asked::Bitmap {
        node,
        action: BitmapAction::Merge { target, sources },
        others,
    })
}
