//! `throttle`: limits on what a guest may do with its disk.

use std::path::Path;

use serde_json::{Map, Value};
use vhost_user_ploop::control::AskError;
use vhost_user_ploop::device::ThrottleLimits;

use crate::args::Output;
use crate::sample::limits_in;
use crate::served::{self, Purpose};
use crate::show::{self, print};

/// Changes what is named of the limits of the disk at `path`, lifts the others if `lifts_all`,
/// and shows what holds then.
///
/// # Errors
/// In words.
pub fn run(
    path: &Path,
    control: Option<&Path>,
    lifts_all: bool,
    changes: &[(&'static str, u64)],
    output: Output,
) -> Result<(), String> {
    let mut arguments = Map::new();
    if lifts_all {
        arguments.extend(ThrottleLimits::NAMES.map(|name| (name.to_owned(), 0.into())));
    }
    for &(name, value) in changes {
        arguments.insert(name.to_owned(), value.into());
    }
    let purpose = match arguments.is_empty() {
        true => Purpose::Look,
        false => Purpose::Change,
    };
    let mut server = served::connect(path, control, purpose)?;
    let answer = server.asker.ask_with("throttle", Value::Object(arguments));
    let limits = answer.map_err(|error| {
        let path = path.display();
        match (&error, purpose) {
            (AskError::Io(_), Purpose::Change) => format!(
                "{path}: {error}; the limits may hold all the same, which 'ploop-img throttle' \
                 without any shows"
            ),
            _ => format!("{path}: {error}"),
        }
    })?;
    match output {
        Output::Json => show::json(&limits),
        Output::Human => match limits_in(&limits).to_string() {
            none if none.is_empty() => print("no limits"),
            some => print(some),
        },
    }
    Ok(())
}
