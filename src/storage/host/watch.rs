//! Files that go while they are served: deleted, replaced, moved, or cut short.
//!
//! Nothing tells a process that holds a file open that others can no longer reach
//! it: the guest would write into nothing for days. So somebody looks now and then, and
//! what is found is said in the log, once of each file. It has to be a thread that no
//! guest waits for: a look at a file of a server that has gone can take for ever.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::fs::Statx;
use rustix::io::Errno;

use super::file::SharedFile;
use crate::notices::{Notice, Notices};
use crate::storage::filesystem::{stat_now, stat_path_now};

/// Between two looks: soon enough for a person, and next to nothing for an idle
/// process.
const INTERVAL: Duration = Duration::from_secs(5);

/// Until the second look at a file that was found short.
const DOUBT: Duration = Duration::from_millis(500);

/// How a file is out of reach for everybody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// It has no name any more, and its old one is free.
    Deleted,
    /// Its name is another file's, and it has none.
    Replaced,
    /// It has a name, but not the one that it was opened by.
    Moved,
}

impl Gone {
    fn word(self) -> &'static str {
        match self {
            Self::Deleted => "deleted",
            Self::Replaced => "replaced",
            Self::Moved => "moved",
        }
    }
}

/// A file that is looked at. Does not keep it open.
#[derive(Debug)]
struct Watched {
    file: Weak<SharedFile>,
    /// Whether its path led to it at first. If not, its path tells nothing later.
    has_path: bool,
    /// It was shorter than it should be at the last look. A file system of several
    /// hosts may be late, so one look is no proof.
    looked_cut: bool,
    /// That it was cut has been told.
    told_cut: bool,
    said: bool,
    /// Who is told of what is said.
    notices: Option<Arc<Notices>>,
}

impl Watched {
    fn new(file: &Arc<SharedFile>) -> Self {
        let names_it = |path: Statx| stat_now(file.given()).is_ok_and(|it| same_file(&it, &path));
        Self {
            has_path: stat_path_now(file.path()).is_ok_and(names_it),
            file: Arc::downgrade(file),
            looked_cut: false,
            told_cut: false,
            said: false,
            notices: None,
        }
    }

    /// Looks, and says what is new. `false` if the file is not served any more.
    fn look(&mut self) -> bool {
        let Some(file) = self.file.upgrade().filter(|file| !file.is_retired()) else {
            return false;
        };
        let tell = |how| {
            if let Some(notices) = &self.notices {
                let path = file.path().to_owned();
                notices.post(Notice::ImageVanished { path, how });
            }
        };
        let is_shorter = file.seems_cut();
        if is_shorter && self.looked_cut {
            // Says it itself.
            file.is_found_cut();
        }
        if !self.told_cut && file.is_cut() {
            self.told_cut = true;
            tell("cut");
        }
        self.looked_cut = is_shorter;
        if !self.said
            && let Some(gone) = self.gone(&file)
        {
            self.said = true;
            say(&file, gone);
            tell(gone.word());
        }
        true
    }

    fn is_cut(&self) -> bool {
        self.file.upgrade().is_some_and(|file| file.is_cut())
    }

    fn gone(&self, file: &SharedFile) -> Option<Gone> {
        let by_path = stat_path_now(file.path());
        let is_nameless = match stat_now(file.given()) {
            Ok(stat) => {
                if by_path.as_ref().is_ok_and(|path| same_file(&stat, path)) {
                    return None;
                }
                stat.stx_nlink == 0
            }
            // What a server says of a file that it has no more.
            Err(error) => is_one_of(&error, &[Errno::NOENT, Errno::STALE]),
        };
        // A path that cannot be looked at tells nothing.
        let is_free = |error: &io::Error| is_one_of(error, &[Errno::NOENT, Errno::NOTDIR]);
        let is_taken = by_path.is_ok();
        match (is_nameless, is_taken) {
            (true, true) => Some(Gone::Replaced),
            (true, false) => Some(Gone::Deleted),
            (false, _) => {
                let has_left = is_taken || by_path.is_err_and(|error| is_free(&error));
                (self.has_path && has_left).then_some(Gone::Moved)
            }
        }
    }
}

fn same_file(a: &Statx, b: &Statx) -> bool {
    let place = |stat: &Statx| (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
    place(a) == place(b)
}

fn is_one_of(error: &io::Error, errors: &[Errno]) -> bool {
    Errno::from_io_error(error).is_some_and(|error| errors.contains(&error))
}

fn say(file: &SharedFile, gone: Gone) {
    let path = file.path().display();
    let rescue = || {
        use std::os::fd::AsRawFd;
        let fd = file.given().as_raw_fd();
        format!(
            "All that the guest has written and goes on writing is lost when this process ends. \
             To save it, shut the guest down and copy /proc/{}/fd/{fd} elsewhere first",
            std::process::id()
        )
    };
    match gone {
        Gone::Deleted => {
            log::error!(
                "{path}: the file has been deleted while it is being served. {}",
                rescue()
            );
        }
        Gone::Replaced => {
            let rescue = rescue();
            log::error!("{path}: another file has replaced it while it is being served. {rescue}");
        }
        Gone::Moved => log::error!(
            "{path}: the file that is being served has been renamed. The guest goes on using it; \
             whoever opens this path will not find its data"
        ),
    }
}

/// The files of a disk, to be looked at now and then: see
/// [`HostDisk::watch`](super::HostDisk::watch). Keeps none of them open.
#[derive(Debug)]
pub struct FileWatch(Vec<Watched>);

impl FileWatch {
    /// Tells `notices` of what it says in the log.
    pub(super) fn new<'a>(
        files: impl Iterator<Item = &'a Arc<SharedFile>>,
        notices: Option<Arc<Notices>>,
    ) -> Self {
        let watch = |file: &Arc<SharedFile>| Watched {
            notices: notices.clone(),
            ..Watched::new(file)
        };
        Self(files.map(watch).collect())
    }

    /// How long to wait before the next look; `None` once no file is used any more.
    pub fn pause(&self) -> Option<Duration> {
        let mut files = self.0.iter();
        let in_doubt = files.any(|file| file.looked_cut && !file.is_cut());
        let pause = if in_doubt { DOUBT } else { INTERVAL };
        (!self.0.is_empty()).then_some(pause)
    }

    /// Looks at each, and says what is new. May take for ever.
    pub fn look(&mut self) {
        self.0.retain_mut(Watched::look);
    }
}

#[cfg(test)]
mod tests;
