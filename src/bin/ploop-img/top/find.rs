//! Which disks are shown: where the processes that serve them listen.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vhost_user_ploop::control::{
    ControlPlace, control_places, file_id, find_likely_control_socket,
};

use crate::served;

/// What was asked for on the command line: if nothing, all disks of this host.
#[derive(Debug)]
pub struct Wanted {
    disks: Vec<PathBuf>,
    folders: Vec<Folder>,
    sockets: Vec<PathBuf>,
}

/// Whose disks are shown.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// Whether a file is in it, of those that were looked for.
    known: HashMap<String, bool>,
}

impl Wanted {
    /// The disks at these paths, those in them that are folders, and those of who listens at
    /// `sockets`.
    ///
    /// # Errors
    /// In words, if one can be none.
    pub fn new(paths: Vec<PathBuf>, sockets: Vec<PathBuf>) -> Result<Self, String> {
        let is_folder = |path: &PathBuf| path.is_dir() && !is_bundle(path);
        let (folders, disks) = paths.into_iter().partition::<Vec<_>, _>(is_folder);
        for disk in &disks {
            let found = find_likely_control_socket(disk).map_err(|error| error.to_string())?;
            found.ok_or_else(|| served::unknown(disk))?;
        }
        let folder = |path| Folder {
            path,
            known: HashMap::new(),
        };
        Ok(Self {
            disks,
            folders: folders.into_iter().map(folder).collect(),
            sockets,
        })
    }

    /// Where somebody listens for them now, or has.
    pub fn sockets(&mut self) -> BTreeSet<PathBuf> {
        let mut sockets: BTreeSet<_> = self.sockets.iter().cloned().collect();
        let found = self.disks.iter().filter_map(|disk| {
            // It may have been moved meanwhile.
            find_likely_control_socket(disk).ok().flatten()
        });
        sockets.extend(found);
        let is_all = self.disks.is_empty() && self.folders.is_empty() && self.sockets.is_empty();
        if is_all || !self.folders.is_empty() {
            let places = control_places();
            let is_wanted = self.in_folders(&places);
            let wanted = places.into_iter().zip(is_wanted);
            let wanted = wanted.filter(|(_, is_in)| is_all || *is_in);
            sockets.extend(wanted.map(|(place, _)| place.socket));
        }
        sockets
    }

    fn in_folders(&mut self, places: &[ControlPlace]) -> Vec<bool> {
        for folder in &mut self.folders {
            folder.look_for(places);
        }
        let folders = &self.folders;
        let is_in = |place: &ControlPlace| {
            let mut known = folders.iter().map(|folder| &folder.known);
            known.any(|known| known.get(&place.file_id) == Some(&true))
        };
        places.iter().map(is_in).collect()
    }
}

/// Whether it is a disk itself.
fn is_bundle(folder: &Path) -> bool {
    folder.join("DiskDescriptor.xml").exists()
}

impl Folder {
    /// Looks through the folder only if there are files that it has not been looked through
    /// for: there may be much in it.
    fn look_for(&mut self, places: &[ControlPlace]) {
        let is_new = |place: &&ControlPlace| !self.known.contains_key(&place.file_id);
        let new: HashSet<_> = places
            .iter()
            .filter(is_new)
            .map(|place| place.file_id.clone())
            .collect();
        if new.is_empty() {
            return;
        }
        let found = found_below(&self.path, &new);
        self.known.extend(new.into_iter().map(|id| {
            let is_in = found.contains(&id);
            (id, is_in)
        }));
    }
}

/// Those of the files that are somewhere in the folder. Other file systems that are mounted
/// there are looked through only if there may be some on them.
fn found_below(folder: &Path, files: &HashSet<String>) -> HashSet<String> {
    let mut found = HashSet::new();
    let devices: HashSet<_> = files.iter().filter_map(|id| id.split('-').next()).collect();
    let may_have_some = |device: u64| devices.contains(format!("{device:x}").as_str());
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        // What may not be read is of others.
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() && may_have_some(metadata.dev()) {
                folders.push(entry.path());
            } else if metadata.is_file() {
                let id = file_id(&metadata);
                if files.contains(&id) {
                    found.insert(id);
                }
            }
            if found.len() == files.len() {
                return found;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_in_a_folder_however_deep() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir(folder.path().join("z")).unwrap();
        let id = |path: PathBuf| {
            fs::write(&path, "x").unwrap();
            file_id(&fs::metadata(path).unwrap())
        };
        let inside = id(deep.join("disk.hds"));
        let other = tempfile::tempdir().unwrap();
        let outside = id(other.path().join("disk.hds"));
        std::os::unix::fs::symlink(other.path(), folder.path().join("link")).unwrap();
        let wanted = HashSet::from([inside.clone(), outside.clone()]);
        assert_eq!(
            found_below(folder.path(), &wanted),
            HashSet::from([inside.clone()])
        );
        let place = |file_id: &String| ControlPlace {
            file_id: file_id.clone(),
            socket: PathBuf::from(file_id),
        };
        let folders = vec![folder.path().to_owned(), other.path().join("none")];
        let error = Wanted::new(folders, Vec::new()).unwrap_err();
        assert!(error.contains("none"), "{error}");
        let mut wanted = Wanted::new(vec![folder.path().to_owned()], Vec::new()).unwrap();
        let places = [place(&inside), place(&outside)];
        assert_eq!(wanted.in_folders(&places), [true, false]);
        // Not looked for again.
        fs::remove_dir_all(folder.path().join("a")).unwrap();
        assert_eq!(wanted.in_folders(&places), [true, false]);
    }
}
