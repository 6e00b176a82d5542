//! Results, for people and for programs.

use serde::Serialize;
use vhost_user_ploop::image::{DiskInfo, ImageInfo};

use crate::args::Output;
use crate::size::human;

/// Prints to standard output; a reader that has gone away is no error of ours.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}

fn json(value: &impl Serialize) {
    // Our reports have string keys and finite numbers: they serialise.
    if let Ok(text) = serde_json::to_string_pretty(value) {
        say!("{text}");
    }
}

/// `info`: the top alone, or the whole chain.
pub fn info(info: &DiskInfo, whole_chain: bool, output: Output) {
    let Some(top) = info.levels.first() else {
        return;
    };
    match (output, whole_chain) {
        (Output::Json, true) => json(&info.levels),
        (Output::Json, false) => json(top),
        (Output::Human, true) => {
            for (index, level) in info.levels.iter().enumerate() {
                if index > 0 {
                    say!("");
                }
                level_info(level);
            }
        }
        (Output::Human, false) => {
            level_info(top);
            if let Some(snapshots) = info.snapshots.filter(|n| *n > 0) {
                say!("snapshots: {snapshots} (see 'ploop-img snapshot list')");
            }
        }
    }
}

fn level_info(info: &ImageInfo) {
    say!("image: {}", info.filename.display());
    say!("file format: {}", info.format);
    say!(
        "virtual size: {} ({} bytes)",
        human(info.virtual_size),
        info.virtual_size
    );
    say!("disk size: {}", human(info.actual_size));
    if let Some(cluster) = info.cluster_size {
        say!("cluster_size: {cluster}");
    }
    if info.dirty_flag {
        say!("not closed cleanly, or in use");
    }
    if let Some(backing) = &info.backing_filename {
        say!("backing file: {}", backing.display());
    }
    if let Some(specific) = &info.format_specific {
        let data = &specific.data;
        say!("Format specific information:");
        say!("    version: {}", data.version);
        say!(
            "    allocated clusters: {} of {}",
            data.allocated_clusters,
            data.bat_entries
        );
        say!("    data offset: {}", data.data_offset);
        say!("    in use: {}", data.in_use);
        if let Some(guid) = &data.guid {
            say!("    GUID: {guid}");
        }
    }
}
