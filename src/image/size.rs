//! Disk sizes: what is made has whole clusters, and what is too large gets an answer
//! that helps.

use std::path::Path;

use super::error::ImageError;
use crate::format::{ClusterSize, Header, HeaderError, Sector, TooLarge, Version};

/// The size that a disk gets for which `wanted` was asked. Tools that read ploop
/// images round down to whole clusters, so a started one would be lost to them.
pub(super) fn whole_clusters(path: &Path, wanted: Sector, cluster: ClusterSize) -> Sector {
    let size = cluster.round_up(wanted);
    // What is too large for any disk is refused later.
    if size != wanted && size <= Version::V2.disk_size_max(cluster) {
        log::info!(
            "{}: the size is rounded up to {} bytes, whole clusters of {cluster}",
            path.display(),
            size.bytes()
        );
    }
    size
}

/// Why a new image cannot have a size.
pub(super) fn refuse_new(path: &Path, error: HeaderError) -> ImageError {
    refuse(path, error, |error| match error.cluster_that_fits() {
        Some(cluster) => {
            let option = option(cluster);
            format!("clusters of {cluster} hold it (--cluster-size {option})")
        }
        None => largest_of_all(),
    })
}

fn largest_of_all() -> String {
    let cluster = ClusterSize::MAX;
    let max = Version::V2.disk_size_max(cluster).bytes();
    format!("the largest possible disk has {max} bytes, with clusters of {cluster}")
}

/// Why an image that is there cannot get a size.
pub(super) fn refuse_growth(path: &Path, header: &Header, error: HeaderError) -> ImageError {
    refuse(path, error, |error| {
        let Some(cluster) = error.cluster_that_fits() else {
            return largest_of_all();
        };
        if cluster > error.cluster {
            let option = option(cluster);
            return format!(
                "a copy with larger clusters can have it: 'ploop-img convert --cluster-size \
                 {option}'"
            );
        }
        match header.in_version(Version::V2) {
            Ok(_) => "version 2 holds it: change the image with 'ploop-img convert \
                      --format-version 2' first"
                .to_owned(),
            Err(_) => "a copy of version 2 can have it: 'ploop-img convert'".to_owned(),
        }
    })
}

fn refuse(path: &Path, error: HeaderError, remedy: impl FnOnce(&TooLarge) -> String) -> ImageError {
    let path = path.to_owned();
    match error {
        HeaderError::TooLarge(error) => ImageError::TooLarge {
            path,
            remedy: format!("; {}", remedy(&error)),
            source: error,
        },
        source => ImageError::Header { path, source },
    }
}

/// As `--cluster-size` takes it: `64K`, `4M`.
fn option(cluster: ClusterSize) -> String {
    cluster
        .to_string()
        .replace(" KiB", "K")
        .replace(" MiB", "M")
}
