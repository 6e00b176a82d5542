//! Disks that are being served: the process that serves one does what it is asked to.

use std::fmt::Display;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;
use vhost_user_ploop::control::{Asker, find_control_socket};
use vhost_user_ploop::format::Sector;
use vhost_user_ploop::image::{self, Access, ImageError, NewSize, OpenMode, Shrink};

use crate::notes;

/// The process that serves the disk and can be asked, if it is where it would be.
pub fn server_of(path: &Path) -> Option<Asker> {
    let socket = find_control_socket(path).ok().flatten()?;
    Asker::connect(&socket).ok()
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

/// What [`image::resize`] does, for a disk that is being served: by who listens at `control`,
/// or is found by the image. Gives back the size then.
pub fn resize(
    path: &Path,
    size: NewSize,
    shrink: Shrink,
    control: Option<&Path>,
) -> Result<Sector, Refusal> {
    let said = |error: &dyn Display| {
        notes::say(format_args!("{}: {error}", path.display()));
        Refusal::Said
    };
    let mut server = match control {
        None => server_of(path).ok_or(Refusal::Unserved)?,
        Some(socket) => {
            let mut server = Asker::connect(socket).map_err(|error| said(&error))?;
            let nodes = server.ask("query-named-block-nodes");
            let nodes = nodes.map_err(|error| said(&error))?;
            let file = nodes[0]["file"].as_str().unwrap_or_default();
            if !is_top_of(Path::new(file), path)? {
                let why = format!("{} is of another disk, {file}", socket.display());
                return Err(said(&why));
            }
            server
        }
    };
    let size = image::size_after(path, size, shrink)?;
    let arguments = json!({ "node-name": "disk", "size": size.bytes() });
    let answer = server.ask_patiently("block_resize", arguments);
    answer.map_err(|error| said(&error))?;
    Ok(size)
}

/// Whether a file that another process has opened is the top of this disk.
fn is_top_of(file: &Path, disk: &Path) -> Result<bool, ImageError> {
    let image = image::open(disk, OpenMode::new(Access::Read).force_share(true))?;
    let Some(top) = image.files.last() else {
        return Ok(false);
    };
    // Else it is to be looked for from where that process was started.
    if !file.is_absolute() {
        return Ok(file.file_name() == top.path.file_name());
    }
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (theirs, ours) = (fs::metadata(file), top.file.metadata());
    Ok(theirs.is_ok_and(|theirs| ours.is_ok_and(|ours| identity(theirs) == identity(ours))))
}
