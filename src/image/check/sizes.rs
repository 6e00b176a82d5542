//! Chains whose disk another tool has cut to whole clusters.
//!
//! A tool that rounds disk sizes down makes a snapshot of a disk with a started
//! cluster at its end that is smaller than what it lies on. Nothing is lost by that,
//! as the end of the disk is still in the lower image: the images above it grow until
//! they reach over it.

use super::{CheckReport, Repair};
use crate::format::{Guid, Sector};
use crate::image::delta::Delta;
use crate::image::error::{ImageError, Result};
use crate::image::open::{OpenImage, image_of};
use crate::image::resize::grow;
use crate::ploop::Level;

/// Looks for such levels, and makes the disk whole again, rounded up.
pub(super) fn check_sizes(
    image: &OpenImage,
    repair: Option<Repair>,
    report: &mut CheckReport,
) -> Result<()> {
    let levels = load_levels(image)?;
    let mut cuts = 0;
    let mut wanted = Vec::new();
    // Of whole clusters, over all that was cut so far.
    let mut reach = Sector(0);
    for (index, (guid, delta)) in levels.iter().enumerate() {
        let geometry = delta.geometry();
        let above = levels.get(index + 1).map(|(_, above)| above.geometry());
        let above = above.filter(|above| above.disk_size < geometry.disk_size);
        if let Some(above) = above {
            cuts += 1;
            let (disk_size, above) = (geometry.disk_size, above.disk_size);
            let path = delta.path().to_owned();
            report.corruption(ImageError::CutDisk {
                path,
                disk_size,
                above,
            });
            let whole = geometry.cluster.round_up(disk_size);
            if is_only_below_one(image, *guid) {
                reach = reach.max(whole);
            }
            wanted.push(reach.max(disk_size));
            reach = reach.max(whole);
        } else {
            wanted.push(reach.max(geometry.disk_size));
        }
    }
    if cuts == 0 || repair != Some(Repair::All) {
        return Ok(());
    }
    // From the top down: wherever this is cut off, what is still to be done shows.
    for ((_, mut delta), wanted) in levels.into_iter().zip(wanted).rev() {
        if delta.geometry().disk_size < wanted {
            grow(&mut delta, wanted)?;
        }
    }
    report.corruptions -= cuts;
    report.corruptions_fixed += cuts;
    Ok(())
}

type LoadedLevel = (Option<Guid>, Delta<crate::image::file::HostImage>);

/// The levels that are no raw images, base first.
fn load_levels(image: &OpenImage) -> Result<Vec<LoadedLevel>> {
    let levels = image.chain.levels.iter().zip(&image.files);
    let levels = levels.zip(image.guids());
    let levels = levels.filter(|((level, _), _)| **level == Level::Ploop);
    levels
        .map(|((_, file), guid)| Ok((guid, Delta::load_for_repair(image_of(file)?)?)))
        .collect()
}

/// Whether no other branch of the tree lies on this image: it may be smaller.
fn is_only_below_one(image: &OpenImage, guid: Option<Guid>) -> bool {
    let descriptor = image.bundle.as_ref().map(|bundle| bundle.descriptor());
    let children = descriptor
        .zip(guid)
        .map(|(descriptor, guid)| descriptor.children(guid).count());
    children.is_none_or(|children| children == 1)
}
