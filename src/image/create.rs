//! New images. What is made has its final name only when it is whole and stable.

use std::ffi::OsStr;
use std::path::Path;

use super::error::{ImageError, IoContext, Result};
use super::file::{HostImage, ImageFile};
use super::folder::Folder;
use super::ownership::Ownership;
use super::size::{refuse_new, whole_clusters};
use crate::format::{ClusterSize, Descriptor, Geometry, Header, ImageKind, Sector};

/// The name of the first image file in a bundle.
pub(super) const ROOT_NAME: &str = "root.hds";

/// Whether `path` names a bare image: it ends in `.hds`. Any other is a bundle.
pub fn is_bare_name(path: &Path) -> bool {
    path.extension() == Some(OsStr::new("hds"))
}

/// Suffixes of raw images.
const RAW: [&str; 2] = ["raw", "img"];
/// Suffixes of formats that are neither raw nor ours.
const FOREIGN: [&str; 7] = ["qcow2", "qcow", "qed", "vdi", "vhd", "vhdx", "vmdk"];

/// The suffix of `path`, if it is one of those, in whichever case.
fn suffix_of<'a>(path: &Path, known: &[&'a str]) -> Option<&'a str> {
    let suffix = path.extension()?;
    let is_it = |name: &&&str| suffix.eq_ignore_ascii_case(name);
    known.iter().find(is_it).copied()
}

/// Whether `path` has the name of a raw image.
pub(super) fn is_raw_name(path: &Path) -> bool {
    suffix_of(path, &RAW).is_some()
}

/// Refuses a name that promises another format than a disk of ours, or than a raw
/// image, would have. `instead` says what to do.
pub(super) fn refuse_foreign_name(path: &Path, instead: &str) -> Result<()> {
    refuse_suffix(path, &FOREIGN, instead)
}

fn refuse_suffix(path: &Path, known: &[&str], instead: &str) -> Result<()> {
    match suffix_of(path, known) {
        None => Ok(()),
        Some(suffix) => Err(ImageError::Unsupported {
            path: path.to_owned(),
            why: format!("is a name for a {suffix} image, and this would not be one; {instead}"),
        }),
    }
}

/// Makes an empty disk in the ploop format, version 2, and gives back its size, which is
/// rounded up to whole clusters.
///
/// # Errors
/// [`ImageError::Exists`]; a name with the suffix of another format; a size that
/// the format cannot hold; any I/O error.
pub fn create(path: &Path, disk_size: Sector, cluster: ClusterSize) -> Result<Sector> {
    let instead = "choose one that ends in .hds for a bare ploop image, or a folder's for a bundle";
    refuse_foreign_name(path, instead)?;
    refuse_suffix(path, &RAW, instead)?;
    let header = new_header(path, whole_clusters(path, disk_size, cluster), cluster)?;
    publish_disk(path, |image| {
        write_empty(image, &header)?;
        Ok(*header.geometry())
    })?;
    Ok(header.geometry().disk_size)
}

/// A header for a new image at `path`; its disk has whole clusters.
pub(super) fn new_header(path: &Path, disk_size: Sector, cluster: ClusterSize) -> Result<Header> {
    Header::new(cluster.round_up(disk_size), cluster).map_err(|error| refuse_new(path, error))
}

/// Writes header and empty BAT, and makes the file reach to the data area.
pub(super) fn write_empty(image: &HostImage, header: &Header) -> Result<()> {
    image
        .set_len(header.geometry().data_start)
        .and_then(|()| image.write_all_at(&header.to_bytes(), 0))
        .context(image.path(), "write the header")
}

/// Makes a bare image or a bundle, as the name says; `fill` writes its image file
/// and says what is in it. On an error nothing is left behind.
///
/// # Errors
/// [`ImageError::Exists`], those of `fill`, and any I/O error.
pub(super) fn publish_disk(
    path: &Path,
    fill: impl FnOnce(&HostImage) -> Result<Geometry>,
) -> Result<()> {
    let (folder, name) = Folder::of(path)?;
    refuse_existing(&folder, name)?;
    if is_bare_name(path) {
        return publish_file(&folder, name, fill).map(drop);
    }
    let bundle = folder.new_folder()?;
    let geometry = publish_file(bundle.inside(), OsStr::new(ROOT_NAME), fill)?;
    let descriptor = Descriptor::new(
        geometry.disk_size,
        geometry.cluster,
        ImageKind::Expandable,
        ROOT_NAME.into(),
    );
    let text = descriptor.to_xml();
    let inside = bundle.inside();
    let image = inside.open_image(Path::new(ROOT_NAME), false)?;
    let ownership = Ownership::of(&image, path)?;
    inside.replace(Descriptor::FILE_NAME, text.as_bytes(), Some(ownership))?;
    bundle.publish(name)
}

/// Makes a file that `fill` writes; gives back what that says.
///
/// # Errors
/// [`ImageError::Exists`], those of `fill`, and any I/O error.
pub(super) fn publish_file<T>(
    folder: &Folder,
    name: &OsStr,
    fill: impl FnOnce(&HostImage) -> Result<T>,
) -> Result<T> {
    let file = folder.new_file(name)?;
    let filled = fill(file.image())?;
    file.publish()?;
    Ok(filled)
}

/// Says at once what publishing would say in the end.
pub(super) fn refuse_existing(folder: &Folder, name: &OsStr) -> Result<()> {
    if folder.contains(Path::new(name))? {
        return Err(ImageError::Exists(folder.path().join(name)));
    }
    Ok(())
}
