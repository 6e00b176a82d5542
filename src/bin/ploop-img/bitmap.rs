//! `bitmap`: what of a disk was changed since some moment.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::{Map, Value, json};
use vhost_user_ploop::control::AskError;
use vhost_user_ploop::format::{BitmapId, Guid};
use vhost_user_ploop::image::{self, Access, BitmapNote, ImageError, OpenMode};
use vhost_user_ploop::ploop::BitmapAction;

use crate::args::{Output, OutputFormat};
use crate::served::{self, Refusal};
use crate::show;
use crate::size::parse_bytes;

#[derive(Debug, Subcommand)]
pub enum Bitmap {
    /// Make one, in which nothing is set yet
    Add {
        #[command(flatten)]
        disk: Disk,
        /// A GUID in small letters without braces; a random one, which is printed, if none is given
        #[arg(value_parser = parse_name)]
        bitmap: Option<String>,
        /// What a bit stands for, a power of two from 512 on; 64k, or the cluster if that is smaller
        #[arg(short, long, value_name = "SIZE", value_parser = parse_bytes)]
        granularity: Option<u64>,
    },
    /// Forget one
    Remove {
        #[command(flatten)]
        disk: Disk,
        /// Its name
        bitmap: String,
    },
    /// Nothing is set in it any more: changes are those from now on
    Clear {
        #[command(flatten)]
        disk: Disk,
        /// Its name
        bitmap: String,
    },
    /// It records changes again, of a disk that is being served
    Enable {
        #[command(flatten)]
        disk: Disk,
        /// Its name
        bitmap: String,
    },
    /// It records no more changes until the process ends that serves the disk
    Disable {
        #[command(flatten)]
        disk: Disk,
        /// Its name
        bitmap: String,
    },
    /// What is set in others is set in it as well; those stay what they are
    Merge {
        #[command(flatten)]
        disk: Disk,
        /// Its name
        bitmap: String,
        /// Those of the others
        #[arg(required = true)]
        source: Vec<String>,
    },
    /// Show all, and how much is set in each
    List {
        #[command(flatten)]
        disk: Disk,
        #[command(flatten)]
        format: OutputFormat,
    },
}

/// Which disk.
#[derive(Debug, clap::Args)]
pub struct Disk {
    /// A bundle's folder, its DiskDescriptor.xml, or a bare image
    path: PathBuf,
    /// The socket of the --control of the process that serves the disk, if one does
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

fn parse_name(text: &str) -> Result<String, String> {
    match BitmapId::parse(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err(format!(
            "'{text}' is no GUID in small letters, like c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5"
        )),
    }
}

fn random_name() -> String {
    let guid = Guid::random().to_string();
    guid.trim_matches(['{', '}']).to_lowercase()
}

/// Does it, whether the disk is being served or not.
///
/// # Errors
/// Nothing was done.
pub fn run(what: Bitmap) -> Result<Result<(), Refusal>, ImageError> {
    let (disk, action) = match what {
        Bitmap::Add {
            disk,
            bitmap,
            granularity,
        } => {
            let is_named = bitmap.is_some();
            let name = bitmap.unwrap_or_else(random_name);
            let action = BitmapAction::Add {
                name: name.clone(),
                granularity,
                is_persistent: true,
                records: true,
            };
            let added = change(&disk, action)?;
            if added.is_ok() && !is_named {
                show::print(name);
            }
            return Ok(added);
        }
        Bitmap::List { disk, format } => return list(&disk, format.output),
        Bitmap::Remove { disk, bitmap } => (disk, BitmapAction::Remove(bitmap)),
        Bitmap::Clear { disk, bitmap } => (disk, BitmapAction::Clear(bitmap)),
        Bitmap::Enable { disk, bitmap } => (disk, BitmapAction::Enable(bitmap)),
        Bitmap::Disable { disk, bitmap } => (disk, BitmapAction::Disable(bitmap)),
        Bitmap::Merge {
            disk,
            bitmap,
            source,
        } => {
            let (target, sources) = (bitmap, source);
            (disk, BitmapAction::Merge { target, sources })
        }
    };
    change(&disk, action)
}

fn change(disk: &Disk, action: BitmapAction) -> Result<Result<(), Refusal>, ImageError> {
    match image::change_bitmaps(&disk.path, std::slice::from_ref(&action)) {
        Err(locked @ ImageError::Locked { .. }) => {
            match change_served(&disk.path, action, disk.control.as_deref()) {
                Err(Refusal::Unserved) => Err(locked),
                changed => Ok(changed),
            }
        }
        changed => changed.map(Ok),
    }
}

fn change_served(path: &Path, action: BitmapAction, control: Option<&Path>) -> Result<(), Refusal> {
    let (verb, mut arguments) = match action {
        BitmapAction::Add {
            name, granularity, ..
        } => {
            let mut arguments = json!({ "name": name, "persistent": true });
            if let Some(granularity) = granularity {
                arguments["granularity"] = granularity.into();
            }
            ("add", arguments)
        }
        BitmapAction::Remove(name) => ("remove", json!({ "name": name })),
        BitmapAction::Clear(name) => ("clear", json!({ "name": name })),
        BitmapAction::Enable(name) => ("enable", json!({ "name": name })),
        BitmapAction::Disable(name) => ("disable", json!({ "name": name })),
        BitmapAction::Merge { target, sources } => {
            ("merge", json!({ "target": target, "bitmaps": sources }))
        }
    };
    arguments["node"] = "disk".into();
    let mut server = served::server_to_change(path, control)?;
    match server.ask_patiently(&format!("block-dirty-bitmap-{verb}"), arguments) {
        Ok(_) => Ok(()),
        Err(error @ AskError::Io(_)) => Err(served::say(
            path,
            &format_args!(
                "{error}; it may have been done all the same, which 'ploop-img bitmap list' shows"
            ),
        )),
        Err(error) => Err(served::say(path, &error)),
    }
}

/// One, as it is shown.
struct Shown {
    note: BitmapNote,
    /// What only a process knows of it.
    of_process: Option<OfProcess>,
}

struct OfProcess {
    records: bool,
    is_persistent: bool,
}

fn list(disk: &Disk, output: Output) -> Result<Result<(), Refusal>, ImageError> {
    let shown = match image::list_bitmaps(&disk.path, OpenMode::new(Access::Read)) {
        Err(locked @ ImageError::Locked { .. }) => {
            match list_served(&disk.path, disk.control.as_deref()) {
                Err(Refusal::Unserved) => return Err(locked),
                Err(refusal) => return Ok(Err(refusal)),
                Ok(shown) => shown,
            }
        }
        listed => {
            let shown = |bitmap| Shown {
                note: BitmapNote::from(bitmap),
                of_process: None,
            };
            listed?.into_iter().map(shown).collect()
        }
    };
    match output {
        Output::Json => show::json(&shown.iter().map(to_json).collect::<Value>()),
        Output::Human => shown.iter().for_each(print),
    }
    Ok(Ok(()))
}

fn list_served(path: &Path, control: Option<&Path>) -> Result<Vec<Shown>, Refusal> {
    let mut server = served::server_to_change(path, control)?;
    let nodes = server.ask("query-named-block-nodes");
    let nodes = nodes.map_err(|error| served::say(path, &error))?;
    let bitmaps = nodes[0]["dirty-bitmaps"].as_array().into_iter().flatten();
    let number = |bitmap: &Value, name: &str| bitmap[name].as_u64().unwrap_or_default();
    let shown = |bitmap: &Value| Shown {
        note: BitmapNote {
            name: bitmap["name"].as_str().unwrap_or_default().to_owned(),
            granularity: number(bitmap, "granularity"),
            count: number(bitmap, "count"),
        },
        of_process: Some(OfProcess {
            records: bitmap["recording"] == true,
            is_persistent: bitmap["persistent"] == true,
        }),
    };
    let mut all: Vec<_> = bitmaps.map(shown).collect();
    // A process tells of the newest first, as QEMU does.
    all.reverse();
    Ok(all)
}

fn to_json(shown: &Shown) -> Value {
    let BitmapNote {
        name,
        granularity,
        count,
    } = &shown.note;
    let mut object = Map::new();
    object.insert("name".into(), name.as_str().into());
    object.insert("granularity".into(), (*granularity).into());
    object.insert("count".into(), (*count).into());
    if let Some(of_process) = &shown.of_process {
        object.insert("recording".into(), of_process.records.into());
        object.insert("persistent".into(), of_process.is_persistent.into());
    }
    Value::Object(object)
}

fn print(shown: &Shown) {
    let states = shown.of_process.iter().flat_map(|it| {
        let disabled = (!it.records).then_some(", does not record");
        let transient = (!it.is_persistent).then_some(", ends with the process");
        [disabled, transient].into_iter().flatten()
    });
    let states: String = states.collect();
    show::bitmap(&shown.note, &states);
}
