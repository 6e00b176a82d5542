//! What a file system does with I/O of a host that has lost its lock and does not know it.
//!
//! Until that host notices, only the server can keep it from writing over whoever has the
//! lock by then. Some always do, some only if they are told to, and of some it is not known.
//! Knows names of file systems and GlusterFS's options; changes nothing.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::filesystem;

/// Types of mounts whose servers refuse such I/O, or shut such a host out: NFS from version 4
/// on, as every description has a lock, and I/O is by that; CephFS and Lustre, which evict the client; file systems on shared
/// block devices, which fence the host.
const REFUSE: [&str; 8] = [
    "nfs4",
    "ceph",
    "fuse.ceph",
    "fuse.ceph-fuse",
    "lustre",
    "gpfs",
    "gfs2",
    "ocfs2",
];

const GLUSTER: &str = "fuse.glusterfs";

/// NFS of version 2 or 3, whose I/O knows nothing of locks. They are no leases either: they
/// go when the server is started anew and this host does not reclaim them in time.
const OLD_NFS: &str = "nfs";

/// Types of mounts of which Linux answers itself whether this host has a lock: what a server has
/// made of it is never heard. So it does for every NFS, but from version 4 on I/O fails.
const ANSWERED_HERE: [&str; 5] = [OLD_NFS, "cifs", "smb3", "smbfs", "9p"];

/// Says in the log, if it is so, that the file system of an image may let a host write for a
/// moment that has lost its lock. Needs `/proc` and the root of the mount.
pub fn warn_of_late_refusal(file: &File, path: &Path) {
    if !filesystem::may_be_shared(file) {
        return;
    }
    let mount = mount_of(file);
    let kind = mount.as_ref().map_or("unknown", |mount| &mount.kind);
    let strict = mount.as_ref().filter(|_| kind == GLUSTER);
    let strict = strict.and_then(|mount| has_strict_locks(&mount.point));
    if let Some(warning) = warning(kind, strict) {
        log::warn!("{}: {warning}", path.display());
    }
}

/// `is_strict` is what is known of a GlusterFS volume.
fn warning(kind: &str, is_strict: Option<bool>) -> Option<String> {
    match is_strict {
        Some(true) => None,
        None if REFUSE.contains(&kind) => None,
        None if kind == OLD_NFS => Some(
            "NFS before version 4 lets a host write that has lost its lock, as when the server was \
             started anew while the host was cut off, and the host does not notice that. Mount it \
             with 'vers=4'"
                .to_owned(),
        ),
        None if ANSWERED_HERE.contains(&kind) => Some(format!(
            "with this file system (type {kind}) a host does not notice that it has lost its lock \
             unless I/O fails, and whether the server has what such a host writes fail is not \
             known: let no other host use the image"
        )),
        Some(false) => Some(
            "this GlusterFS volume lets a host write that has lost its lock, until it notices \
             that, a second later. 'gluster volume set VOLUME client.strict-locks on' prevents it"
                .to_owned(),
        ),
        None => Some(format!(
            "whether this file system (type {kind}) refuses what a host writes that has lost its \
             lock is not known; if not, it can write for a second until it notices"
        )),
    }
}

struct Mount {
    kind: String,
    point: PathBuf,
}

fn mount_of(file: &File) -> Option<Mount> {
    let device = file.metadata().ok()?.dev();
    let device = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| parse_mount(line, &device))
}

/// A line of `/proc/PID/mountinfo`, if it is of a whole file system on this device: see
/// proc_pid_mountinfo(5).
fn parse_mount(line: &str, device: &str) -> Option<Mount> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let is_it = fields.next()? == device && fields.next()? == "/";
    let point = fields.next()?.replace("\\040", " ");
    is_it.then_some(Mount {
        kind: filesystem.split(' ').next()?.to_owned(),
        point: point.into(),
    })
}

/// What each of the mount's clients has been told, which GlusterFS shows in a hidden folder.
/// `None` if that cannot be seen.
fn has_strict_locks(mount: &Path) -> Option<bool> {
    let parts = fs::read_dir(mount.join(".meta/graphs/active")).ok()?;
    let options = parts
        .flatten()
        .map(|part| part.path().join("options/strict-locks"));
    let mut clients = options.filter_map(|option| fs::read_to_string(option).ok());
    let is_on = |value: String| matches!(value.trim(), "on" | "true" | "yes" | "enable" | "1");
    let first = is_on(clients.next()?);
    Some(first && clients.all(is_on))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_device() {
        let line = "36 35 0:53 / /mnt/two\\040words rw,relatime shared:1 - fuse.glusterfs h:/v rw";
        let mount = parse_mount(line, "0:53").unwrap();
        assert_eq!(mount.kind, GLUSTER);
        assert_eq!(mount.point, Path::new("/mnt/two words"));
        assert!(parse_mount(line, "0:54").is_none());
        let part = line.replace(" / /mnt", " /part /mnt");
        assert!(parse_mount(&part, "0:53").is_none());
        assert!(parse_mount("nonsense", "0:53").is_none());
    }

    #[test]
    fn a_time_is_promised_only_where_a_loss_is_noticed() {
        let said = |kind, is_strict| warning(kind, is_strict).unwrap_or_default();
        let in_a_second = "a second";
        for kind in ANSWERED_HERE {
            let warning = said(kind, None);
            assert!(!warning.contains(in_a_second), "{warning}");
            assert!(warning.contains("does not notice"), "{warning}");
        }
        for (kind, is_strict) in [(GLUSTER, Some(false)), (GLUSTER, None), ("fuse", None)] {
            let warning = said(kind, is_strict);
            assert!(warning.contains(in_a_second), "{warning}");
        }
        assert_eq!(said("nfs4", None), "");
        assert_eq!(said(GLUSTER, Some(true)), "");
    }

    #[test]
    fn all_clients_of_a_volume_have_to_be_strict() {
        let mount = tempfile::tempdir().unwrap();
        assert_eq!(has_strict_locks(mount.path()), None);
        for (client, value, expected) in [
            ("v-client-0", "on\n", Some(true)),
            ("v-client-1", "true", Some(true)),
            ("v-client-2", "off\n", Some(false)),
        ] {
            let options = mount.path().join(".meta/graphs/active").join(client);
            fs::create_dir_all(options.join("options")).unwrap();
            fs::write(options.join("options/strict-locks"), value).unwrap();
            assert_eq!(has_strict_locks(mount.path()), expected);
        }
    }
}
