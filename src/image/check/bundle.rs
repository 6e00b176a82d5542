//! What only a bundle can have wrong: images of other branches, a descriptor that
//! a resize did not get to, files that nothing names.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::{CheckReport, Repair};
use crate::format::{Descriptor, Guid, Header, ImageKind};
use crate::image::bundle::{Bundle, Location};
use crate::image::delta::read_header_for_repair;
use crate::image::error::Result;
use crate::image::folder::TEMPORARY_PREFIX;
use crate::image::open::{OpenImage, OpenMode, image_of, lock, open_level};
use crate::image::progress::Progress;
use crate::image::snapshot::finish_merge;
use crate::image::version::{COPY_SUFFIX, IDX_SUFFIX};
use crate::ploop::Level;
use crate::storage::HostFile;

/// Checks the images that only other snapshots than the top's own use.
pub(super) fn check_branches(
    image: &OpenImage,
    repairs: bool,
    mode: OpenMode,
    check: impl Fn(&HostFile) -> Result<CheckReport>,
) -> Result<Vec<CheckReport>> {
    let Some(bundle) = &image.bundle else {
        return Ok(Vec::new());
    };
    let mode = match repairs {
        true => OpenMode::new(crate::image::Access::Repair),
        false => mode,
    };
    let descriptor = bundle.descriptor();
    let chain = descriptor.chain(descriptor.top());
    let mut reports = Vec::new();
    for image in descriptor.images() {
        // A plain image is the base, so it is in every chain.
        let is_elsewhere = chain.iter().all(|level| level.guid != image.guid);
        if is_elsewhere && image.kind == ImageKind::Expandable {
            let file = open_level(bundle, image, repairs)?;
            let _lock = lock(&file, mode)?;
            reports.push(check(&file)?);
        }
    }
    Ok(reports)
}

/// Finishes what deleting snapshots began, if it was cut off.
pub(super) fn finish_merges(
    path: &Path,
    report: &mut CheckReport,
    progress: &dyn Progress,
) -> Result<()> {
    if matches!(Location::of(path)?, Location::Bare(_)) {
        return Ok(());
    }
    while finish_merge(path, progress)? {
        report.leaks_fixed += 1;
        let text = "the deletion of a snapshot had been cut off";
        report.messages.push(text.to_owned());
    }
    Ok(())
}

/// Checks descriptor and folder.
pub(super) fn check_bundle(
    mut image: OpenImage,
    repair: Option<Repair>,
    report: &mut CheckReport,
) -> Result<()> {
    check_descriptor(&mut image, repair, report)?;
    match &image.bundle {
        Some(bundle) => check_strays(bundle, repair, report),
        None => Ok(()),
    }
}

/// The same while it is served, when files may be there that are about to belong to it.
pub(super) fn check_served_bundle(mut image: OpenImage, report: &mut CheckReport) -> Result<()> {
    check_descriptor(&mut image, None, report)
}

fn check_descriptor(
    image: &mut OpenImage,
    repair: Option<Repair>,
    report: &mut CheckReport,
) -> Result<()> {
    check_disk_size(image, repair, report)?;
    if let Some(bundle) = &image.bundle {
        for shot in bundle.descriptor().shots().iter().filter(|s| s.merging) {
            let text = "is left over from a deletion that was cut off";
            report.leak(1, format!("snapshot {} {text}", shot.guid));
        }
    }
    Ok(())
}

/// A resize that was cut off between header and descriptor, or a snapshot that
/// another tool went back to. The header has the last word, so nothing is wrong.
fn check_disk_size(
    image: &mut OpenImage,
    repair: Option<Repair>,
    report: &mut CheckReport,
) -> Result<()> {
    let (Some(Level::Ploop), Some(file), Some(bundle)) = (
        image.chain.levels.last(),
        image.files.last(),
        image.bundle.as_mut(),
    ) else {
        return Ok(());
    };
    let disk_size = read_header_for_repair(&image_of(file)?)?
        .geometry()
        .disk_size;
    let mut descriptor = bundle.descriptor().clone();
    if descriptor.disk_size == disk_size {
        return Ok(());
    }
    let mut text = format!(
        "the descriptor says that the disk has {} sectors, its top says {}, which counts",
        descriptor.disk_size.0, disk_size.0
    );
    if repair == Some(Repair::All) {
        descriptor.disk_size = disk_size;
        bundle.save(descriptor)?;
        text += "; corrected";
    }
    report.messages.push(text);
    Ok(())
}

/// Files that a change of the bundle left behind when it was cut off. Only those
/// are removed whose names we, or the official tool, have given them.
fn check_strays(bundle: &Bundle, repair: Option<Repair>, report: &mut CheckReport) -> Result<()> {
    let folder = bundle.folder();
    for (name, kind) in folder.names()? {
        let path = PathBuf::from(&name);
        let is_known = name == Descriptor::FILE_NAME
            // That of an image, and the copy of its BAT, which belongs to it.
            || bundle.descriptor().images().iter().any(|image| {
                let image = image.file.as_os_str();
                image == name || is_copy_of(&name, image)
            });
        if is_known || !matches!(kind, FileType::RegularFile | FileType::Unknown) {
            continue;
        }
        if is_ours(&name) {
            report.leak(1, format!("{} is not part of the disk", path.display()));
            if repair.is_some() {
                folder.remove(&path)?;
                report.leaks -= 1;
                report.leaks_fixed += 1;
            }
        } else if looks_like_image(bundle, &path) {
            let text = "is an image but not part of the disk; it is left alone";
            report.messages.push(format!("{} {text}", path.display()));
        }
    }
    Ok(())
}

fn is_copy_of(name: &OsStr, image: &OsStr) -> bool {
    let of_image = name
        .as_encoded_bytes()
        .strip_prefix(image.as_encoded_bytes());
    [COPY_SUFFIX, IDX_SUFFIX]
        .map(|suffix| Some(suffix.as_bytes()))
        .contains(&of_image)
}

/// A passing name, or one of a delta: `root.hds.{GUID}`.
fn is_ours(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    let is_delta = || {
        let (_, guid) = name.rsplit_once('.')?;
        let is_braced = guid.starts_with('{') && guid.ends_with('}');
        is_braced.then(|| guid.parse::<Guid>().ok())?
    };
    name.starts_with(TEMPORARY_PREFIX) || is_delta().is_some()
}

fn looks_like_image(bundle: &Bundle, name: &Path) -> bool {
    use std::os::unix::fs::FileExt;
    let mut start = [0; Header::LEN];
    let read = bundle
        .folder()
        .open_image(name, false)
        .map(|file| file.read_exact_at(&mut start, 0));
    matches!(read, Ok(Ok(()))) && Header::has_signature(&start)
}
