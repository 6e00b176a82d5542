//! Disks that are being served: the process that serves one does what it is asked to.

use std::fmt::Display;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;
use vhost_user_ploop::control::{AskError, Asker, JobEnd, file_id, find_control_socket};
use vhost_user_ploop::format::{Guid, SECTOR_SIZE, Sector};
use vhost_user_ploop::image::{
    self, Access, Bundle, ImageError, NewSize, OpenMode, Progress, Shrink,
};

use crate::notes;

/// The process that serves the disk and can be asked, if it is where it would be.
fn server_of(path: &Path) -> Option<Asker> {
    let socket = find_control_socket(path).ok().flatten()?;
    Asker::connect(&socket).ok()
}

/// Whether such a process says that it serves that disk.
pub fn is_served(path: &Path) -> bool {
    connect(path, None, Purpose::Change).is_ok()
}

/// One that was found.
pub struct Server {
    pub socket: PathBuf,
    pub asker: Asker,
}

/// What a process is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Who may not read the image, or whose image is no longer there, may ask about it.
    Look,
    /// Only of the right disk.
    Change,
}

/// The process that serves the disk at `path`: who listens at `control`, or is found by the
/// image.
///
/// # Errors
/// In words: there is none that can be asked, it serves another disk, or that cannot be told
/// and something is to be changed.
pub fn connect(path: &Path, control: Option<&Path>, purpose: Purpose) -> Result<Server, String> {
    let words = |error: &dyn Display| error.to_string();
    let socket = match control {
        Some(socket) => Some(socket.to_owned()),
        None => find_control_socket(path).map_err(|error| words(&error))?,
    };
    let socket = socket.ok_or_else(|| unknown(path))?;
    let mut asker = Asker::connect(&socket).map_err(|error| words(&error))?;
    let engine = asker.ask("query-engine").map_err(|error| words(&error))?;
    match (serves(&engine, path), purpose) {
        (Ok(true), _) | (Err(_), Purpose::Look) => {}
        (Ok(false), _) => {
            let nodes = asker.ask("query-named-block-nodes");
            let nodes = nodes.map_err(|error| words(&error))?;
            let why = other_disk(control, &nodes);
            return Err(format!("{}: {why}", path.display()));
        }
        (Err(error), Purpose::Change) => {
            return Err(format!(
                "{error}, so whether {} serves that disk cannot be told",
                socket.display()
            ));
        }
    }
    Ok(Server { socket, asker })
}

/// Says that no process is where one would be that serves the disk.
pub fn unknown(path: &Path) -> String {
    format!(
        "no process that serves {} can be found; give the socket of its --control with --control",
        path.display()
    )
}

/// Why a disk that is being served was not changed.
pub enum Refusal {
    /// Nobody can be asked.
    Unserved,
    /// It cannot be.
    Image(ImageError),
    /// It was said already.
    Said,
}

impl From<ImageError> for Refusal {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

/// Has the process that serves the disk at `path` put all into the files that was written
/// until now: who listens at `control`, or is found by the image. Then `read` can be done
/// without locks.
pub fn read<T>(
    path: &Path,
    control: Option<&Path>,
    read: impl FnOnce() -> Result<T, ImageError>,
) -> Result<T, Refusal> {
    let mut server = match connect(path, control, Purpose::Look) {
        Ok(server) => server.asker,
        Err(_) if control.is_none() => return Err(Refusal::Unserved),
        Err(why) => {
            notes::say(why);
            return Err(Refusal::Said);
        }
    };
    match server.ask_patiently("flush", json!({})) {
        Ok(_) => {}
        // It is of an older version.
        Err(AskError::Unknown(_)) => notes::say(format_args!(
            "{}: the process that serves it cannot be asked to flush it, so what was written \
             in the last moments may be missing",
            path.display()
        )),
        Err(error) => return Err(say(path, &error)),
    }
    Ok(read()?)
}

/// The process that serves the top at `path`: who listens at `control`, or is found by the
/// image.
pub fn server_to_change(path: &Path, control: Option<&Path>) -> Result<Asker, Refusal> {
    let said = |error: &dyn Display| say(path, error);
    let mut server = match control {
        None => server_of(path).ok_or(Refusal::Unserved)?,
        Some(socket) => Asker::connect(socket).map_err(|error| said(&error))?,
    };
    let engine = server.ask("query-engine").map_err(|error| said(&error))?;
    let image = image::open(path, OpenMode::new(Access::Read).force_share(true))?;
    let top = image.files.last().and_then(|top| id_of(&top.file));
    if top.is_none_or(|top| engine["file-id"] != top) {
        let nodes = server.ask("query-named-block-nodes");
        let nodes = nodes.map_err(|error| said(&error))?;
        return Err(said(&other_disk(control, &nodes)));
    }
    require_same_folder(&engine, image.bundle.as_ref(), path)?;
    Ok(server)
}

/// That what has the image of the disk at `path` for its own is the same bundle: a copy of hard
/// links has the same files, and what is done to the one disk would change the other.
fn require_same_folder(
    engine: &Value,
    bundle: Option<&Bundle>,
    path: &Path,
) -> Result<(), Refusal> {
    let own = bundle.and_then(|bundle| id_of(bundle.folder().file()));
    // One of an older version does not say it.
    let theirs = engine["folder-id"].as_str();
    match (own, theirs) {
        (Some(own), Some(theirs)) if own != theirs => Err(say(
            path,
            &"its image is part of another disk, too, which is being served: the one is a copy of \
              the other that consists of hard links. What is done to one of them changes both; \
              copy the files",
        )),
        _ => Ok(()),
    }
}

pub fn say(path: &Path, error: &dyn Display) -> Refusal {
    let error = error.to_string();
    let path = format!("{}: ", path.display());
    // The process may have named it itself.
    let error = error.strip_prefix(&path).unwrap_or(&error);
    notes::say(format_args!("{path}{error}"));
    Refusal::Said
}

/// What [`image::create_snapshot`] does, for a disk that is being served: by who listens at
/// `control`, or is found by the image. Gives back the name of the snapshot.
pub fn create_snapshot(
    path: &Path,
    guid: Option<Guid>,
    description: Option<&str>,
    control: Option<&Path>,
) -> Result<Guid, Refusal> {
    let mut server = server_to_change(path, control)?;
    let mut arguments = json!({});
    if let Some(guid) = guid {
        arguments["guid"] = guid.to_string().into();
    }
    if let Some(description) = description {
        arguments["description"] = description.into();
    }
    match server.ask_patiently("snapshot-create", arguments) {
        Ok(answer) => {
            let guid = answer["guid"].as_str().and_then(|guid| guid.parse().ok());
            guid.ok_or_else(|| say(path, &AskError::Odd))
        }
        Err(error @ AskError::Io(_)) => Err(say(
            path,
            &format_args!(
                "{error}; the snapshot may have been made all the same, which 'ploop-img snapshot \
                 list' shows"
            ),
        )),
        Err(error) => Err(say(path, &error)),
    }
}

/// What [`image::resize`] does, for a disk that is being served: by who listens at `control`,
/// or is found by the image. Gives back the size then.
pub fn resize(
    path: &Path,
    size: NewSize,
    shrink: Shrink,
    control: Option<&Path>,
) -> Result<Sector, Refusal> {
    let said = |error: &dyn Display| say(path, error);
    let mut server = server_to_change(path, control)?;
    let expected = image::size_after(path, size, shrink)?;
    let exactly = |server: &mut Asker| {
        let arguments = json!({ "node-name": "disk", "size": expected.bytes() });
        server.ask_patiently("block_resize", arguments)
    };
    let answer = match size {
        // Added up there: others may make it larger at the same time.
        NewSize::GrowBy(more) => {
            match server.ask_patiently("grow", json!({ "by": more.bytes() })) {
                // It is of an older version.
                Err(AskError::Unknown(_)) => exactly(&mut server),
                answer => answer,
            }
        }
        NewSize::Exactly(_) | NewSize::ShrinkBy(_) => exactly(&mut server),
    };
    match answer {
        Ok(answer) => Ok(match answer["size"].as_u64() {
            Some(bytes) => Sector(bytes / SECTOR_SIZE),
            None => expected,
        }),
        Err(error @ AskError::Io(_)) => Err(said(&format_args!(
            "{error}; the disk may be larger all the same, which 'ploop-img info' shows"
        ))),
        Err(error) => Err(said(&error)),
    }
}

/// How often it is asked how far a job is.
const LOOK: Duration = Duration::from_millis(100);

/// What [`image::compact`] does, for the top of a disk that is being served: by who listens at
/// `control`, or is found by the image. Gives back how many bytes less it takes on the host.
pub fn compact(
    path: &Path,
    control: Option<&Path>,
    progress: &dyn Progress,
) -> Result<u64, Refusal> {
    let mut server = server_to_change(path, control)?;
    let before = space_of(path)?;
    let state = "what was gained so far stays";
    match run_job(&mut server, "compact", json!({}), progress) {
        Ok(job) => job.map_err(|why| why.refusal(path, state))?,
        Err(error) => return Err(say(path, &format_args!("{error}; {state}"))),
    }
    Ok(before.saturating_sub(space_of(path)?))
}

/// What [`image::delete_snapshot`] does, for a disk that is being served: by who listens at
/// `control`, or is found by the image.
pub fn delete_snapshot(
    path: &Path,
    guid: Guid,
    control: Option<&Path>,
    progress: &dyn Progress,
) -> Result<(), Refusal> {
    let mut server = server_to_change(path, control)?;
    let arguments = json!({ "guid": guid.to_string() });
    match run_job(&mut server, "snapshot-delete", arguments, progress) {
        Ok(job) => job.map_err(|why| why.refusal(path, "the snapshot stays")),
        Err(error) => Err(say(
            path,
            &format_args!(
                "{error}; the snapshot may have been deleted all the same, which 'ploop-img \
                 snapshot list' shows"
            ),
        )),
    }
}

/// What [`image::merge_snapshots`] does, for a disk that is being served: by who listens at
/// `control`, or is found by the image.
pub fn merge_snapshots(
    path: &Path,
    (from, to): (Option<Guid>, Option<Guid>),
    control: Option<&Path>,
    progress: &dyn Progress,
) -> Result<(), Refusal> {
    let mut server = server_to_change(path, control)?;
    let mut arguments = json!({});
    for (name, guid) in [("from", from), ("to", to)] {
        if let Some(guid) = guid {
            arguments[name] = guid.to_string().into();
        }
    }
    match run_job(&mut server, "snapshot-merge", arguments, progress) {
        Ok(job) => job.map_err(|why| why.refusal(path, "the snapshots stay")),
        Err(error) => Err(say(
            path,
            &format_args!(
                "{error}; the snapshots may have been merged all the same, which 'ploop-img \
                 snapshot list' shows"
            ),
        )),
    }
}

/// What [`image::switch_snapshot`] does, for a disk that is being served: who listens at
/// `control`, or is found by the image, says what that takes.
pub fn switch_snapshot(path: &Path, guid: Guid, control: Option<&Path>) -> Result<(), Refusal> {
    let mut server = server_to_change(path, control)?;
    let arguments = json!({ "guid": guid.to_string() });
    match server.ask_with("snapshot-switch", arguments) {
        Ok(_) => Ok(()),
        // It is of an older version.
        Err(AskError::Unknown(_)) => Err(Refusal::Unserved),
        Err(error) => Err(say(path, &error)),
    }
}

/// Why a job has come to nothing.
enum NoJob {
    /// The process says why.
    Refused(String),
    /// The user has wanted that.
    Interrupted,
}

impl NoJob {
    /// Of the disk at `path`; `state` says what is left then.
    fn refusal(self, path: &Path, state: &'static str) -> Refusal {
        match self {
            Self::Refused(why) => say(path, &why),
            Self::Interrupted => {
                let path = path.to_owned();
                Refusal::Image(ImageError::Interrupted { path, state })
            }
        }
    }
}

/// What is said of a job that was cancelled.
const CANCELLED: &str = "Operation canceled";

/// Has a job done by the process that serves a disk, and waits for its end. `Err` if it is not
/// known what has become of it.
fn run_job(
    server: &mut Asker,
    command: &str,
    mut arguments: Value,
    progress: &dyn Progress,
) -> Result<Result<(), NoJob>, AskError> {
    // The number of the process is that of others in other containers.
    let id = format!("ploop-img-{}", Uuid::new_v4().simple());
    server.heed_job(&id);
    arguments["job-id"] = id.as_str().into();
    arguments["auto-dismiss"] = false.into();
    match server.ask_with(command, arguments) {
        Ok(_) => {}
        Err(AskError::Refused(why) | AskError::Unknown(why)) => {
            return Ok(Err(NoJob::Refused(why)));
        }
        Err(error) => return Err(error),
    }
    Ok(match wait_for_job(server, &id, progress)? {
        None => Ok(()),
        Some(why) if why == CANCELLED && progress.is_cancelled() => Err(NoJob::Interrupted),
        Some(why) => Err(NoJob::Refused(why)),
    })
}

/// Waits for the end of a job, and has it cancelled if the user wants that. Why it has failed,
/// if it has.
fn wait_for_job(
    server: &mut Asker,
    id: &str,
    progress: &dyn Progress,
) -> Result<Option<String>, AskError> {
    let mut known_total = 0;
    let mut is_cancelled = false;
    loop {
        let jobs = server.ask("query-jobs")?;
        let mut jobs = jobs.as_array().into_iter().flatten();
        let Some(job) = jobs.find(|job| job["id"] == id) else {
            // Somebody else has dismissed it. What it has come to was told before.
            return match server.job_end() {
                Some(JobEnd::Well) => Ok(None),
                Some(JobEnd::Cancelled) => Ok(Some(CANCELLED.to_owned())),
                Some(JobEnd::Failed(why)) => Ok(Some(why.clone())),
                None => Err(AskError::JobGone),
            };
        };
        let number = |name: &str| job[name].as_u64().unwrap_or_default();
        let (done, total) = (number("current-progress"), number("total-progress"));
        if std::mem::replace(&mut known_total, total) != total {
            progress.begin(total);
        }
        progress.done(done);
        if job["status"] == "concluded" {
            match server.ask_with("job-dismiss", json!({ "id": id })) {
                // Somebody else has.
                Ok(_) | Err(AskError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
            return Ok(job["error"].as_str().map(str::to_owned));
        }
        if progress.is_cancelled() && !is_cancelled {
            is_cancelled = true;
            match server.ask_with("job-cancel", json!({ "id": id })) {
                // It has just ended.
                Ok(_) | Err(AskError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        thread::sleep(LOOK);
    }
}

/// What the files of a disk take on the host, in bytes.
fn space_of(path: &Path) -> Result<u64, ImageError> {
    let image = image::open(path, OpenMode::new(Access::Read).force_share(true))?;
    let blocks = image.files.iter().filter_map(|file| {
        let metadata = file.file.metadata().ok()?;
        Some(metadata.blocks() * SECTOR_SIZE)
    });
    Ok(blocks.sum())
}

/// Says that a process serves another disk than it is asked about. A path would not do to
/// tell them apart: a process may have been started elsewhere, and calls the image by the path
/// that it had from there.
fn other_disk(control: Option<&Path>, nodes: &Value) -> String {
    let file = nodes[0]["file"].as_str().unwrap_or_default();
    let server = match control {
        Some(socket) => socket.display().to_string(),
        None => "the process that was found".to_owned(),
    };
    format!("{server} is of another disk, {file}")
}

/// Whether a process with such an `engine` serves the disk at `path`: a level or a snapshot of
/// it.
///
/// # Errors
/// Whatever keeps the disk from being looked at.
fn serves(engine: &Value, path: &Path) -> Result<bool, ImageError> {
    let image = image::open(path, OpenMode::new(Access::Read).force_share(true))?;
    let is_it = |file: &File| id_of(file).is_some_and(|id| engine["file-id"] == id);
    if image.files.iter().any(|file| is_it(&file.file)) {
        return Ok(true);
    }
    let bundle = image.bundle.iter();
    let mut others = bundle.flat_map(|bundle| {
        let images = bundle.descriptor().images().iter();
        images.filter_map(|image| bundle.folder().open_image(&image.file, false).ok())
    });
    Ok(others.any(|file| is_it(&file)))
}

fn id_of(file: &File) -> Option<String> {
    file.metadata().ok().as_ref().map(file_id)
}
