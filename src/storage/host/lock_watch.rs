//! Looks whether the locks on the files of a disk are still there.
//!
//! Nobody tells a host that a server has taken its locks away, and of file systems that can
//! have that happen none says it in the same way: GlusterFS knows no such lock any more, and
//! with `client.strict-locks` refuses I/O by whatever had one; NFS answers for itself that
//! all is well, and fails I/O by whatever had one; CephFS lets a client that was late do
//! nothing at all. So a look does three things: it asks, by a description without a lock,
//! whether ours is seen; it reads around the page cache by one that has the lock; and of a
//! server that may consist of several it takes the locks once more, since one that was
//! started anew has forgotten them.
//!
//! A look that finds anything odd is not the end. Nothing is begun from then on, and it is
//! looked again, more closely ([`LockWatch::confirm`]): a server may have answered with an
//! error once, or have forgotten locks without giving them to anybody.
//!
//! A look can take for ever, so it needs a thread that nobody waits for, and another one that
//! keeps the time: see [`LockWatch::standing_is_unclear`].
//!
//! After a loss it is looked whether the files could be opened anew
//! ([`LockWatch::require_openable`]), and by their paths: the mount that they were opened on
//! may be dead, and another one in its place.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use rustix::fs::Statx;
use rustix::io::Errno;
use thiserror::Error;

use super::FileList;
use super::file::{SharedFile, Shown};
use super::lease::{Lease, LookFor, tells_of_absence, tells_of_loss};
use crate::storage::filesystem::Kind;
use crate::storage::lock::{self, ImageLock, LockError, LockMode};
use crate::storage::{AlignedBuf, LockStanding, filesystem};
use crate::threads;

/// Between two looks. Who has lost a lock may write for so long before it is noticed, unless
/// the server keeps it from that.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long a look may take until the lock is in doubt. With the time between two looks this
/// is less than the shortest time after which a server gives up on a client.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long one may take while the lock is in doubt for its answer to count, if the next one
/// begins at once: so what is known is never older than after a look that was only just in time.
const PATIENCE_IN_DOUBT: Duration = PATIENCE.saturating_add(INTERVAL);

/// How much is read by a description with the lock, in bytes.
const READ_LEN: usize = 4096;

/// A moment of a clock that also goes on while the machine sleeps, as servers and other hosts do.
#[derive(Clone, Copy, Debug)]
pub struct Moment(Duration);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Not rustix's, which may have to read for that what the sandbox hides.
        // SAFETY: the memory is there to be written to. It fails for a clock that is not there.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
        let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        Self(Duration::new(
            seconds.unwrap_or_default(),
            nanos.unwrap_or_default(),
        ))
    }

    /// Since then.
    pub fn elapsed(self) -> Duration {
        Self::now().since(self)
    }

    /// From the other one to this one.
    pub fn since(self, other: Self) -> Duration {
        self.0.saturating_sub(other.0)
    }

    /// So much later.
    #[cfg(test)]
    pub(crate) fn later(self, time: Duration) -> Self {
        Self(self.0 + time)
    }
}

/// Why locks cannot be looked after.
#[derive(Debug, Error)]
pub enum WatchError {
    /// One was gone before anybody looked.
    #[error("the lock on {} was taken away while the image was opened", .0.display())]
    Lost(PathBuf),
    /// There is nothing to look by.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a look has found.
#[derive(Debug)]
pub enum Look {
    /// The locks are there.
    Held,
    /// It could not be found out.
    Unclear(io::Error),
    /// One may not be there any more: it is to be [looked more closely](LockWatch::confirm).
    Suspect {
        /// On this file.
        path: PathBuf,
        /// By what that may be known.
        why: String,
        /// The way to the server is lost, which may come back.
        is_away: bool,
    },
    /// One is not there any more.
    Lost {
        /// On this file.
        path: PathBuf,
        /// By what that is known.
        why: String,
    },
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct LockWatch {
    lease: Arc<Lease>,
    files: Arc<[Looked]>,
    /// Whose locks are renewed first with the next look: there may be no time for those of all.
    next: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Looked {
    file: Arc<SharedFile>,
    /// Has the lock of the lease.
    locked: File,
    /// Has none, and sees those of others.
    other: Option<File>,
    mode: LockMode,
    /// They are to be taken again and again.
    is_renewed: bool,
    /// They are being taken again, or were so late that somebody else may have had them before:
    /// that they are there shows nothing.
    is_late: AtomicBool,
    sees_mark: SeesMark,
    proof: Proof,
    /// Where it is, if its path leads there.
    place: Option<Place>,
    /// Of the file system that it is on.
    kind: Kind,
}

/// A file system and a file on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    device: (u32, u32),
    inode: u64,
}

impl From<Statx> for Place {
    fn from(stat: Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
        }
    }
}

/// Why files cannot be opened anew.
#[derive(Debug, Error)]
pub enum NotOpenable {
    /// Their storage does not answer, or not as it should.
    #[error("{}: {source}", path.display())]
    Away {
        /// Of one of them.
        path: PathBuf,
        /// What it answers.
        source: io::Error,
    },
    /// Somebody else uses one.
    #[error("{}: {source}", path.display())]
    Taken {
        /// Of that one.
        path: PathBuf,
        /// Who.
        source: LockError,
    },
    /// A path leads to another file, or has never led to this one.
    #[error("{}: it is not known whether this is the file", .0.display())]
    Other(PathBuf),
}

/// By what it can be told that nobody else has had a file open for writing.
#[derive(Debug)]
enum Proof {
    /// Not at all.
    None,
    /// By the name of its opening, and by the mark in it, if it had one.
    Name { is_marked: bool },
    /// Nobody writes to it, this process included.
    Stamp(Stamp),
}

/// When a file was changed last, and its length.
#[derive(Debug, PartialEq, Eq)]
struct Stamp([i64; 4], u64);

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let stat = filesystem::stat_now(file)?;
        let times = [stat.stx_mtime, stat.stx_ctime].map(|it| [it.tv_sec, it.tv_nsec.into()]);
        let [[a, b], [c, d]] = times;
        Ok(Self([a, b, c, d], stat.stx_size))
    }
}

/// Whether the beginning of a file says that somebody has opened it and has not closed it.
pub type SeesMark = fn(&[u8]) -> bool;

const OPENED: &str = "another process has had the image meanwhile";

/// What is odd about a lock.
enum Odd {
    /// No such lock is seen.
    Unseen,
    /// It was renewed late.
    Late,
    /// I/O by a description with the lock fails, or the question.
    Fails(io::Error),
    /// It could not be found out.
    Unclear(io::Error),
    /// Somebody else is there, or was.
    Taken(String),
    /// The mount that it was opened on is dead, and there is another one in its place.
    Anew,
}

impl Odd {
    fn of(error: io::Error) -> Self {
        match Errno::from_io_error(&error).is_some_and(tells_of_loss) {
            true => Self::Fails(error),
            false => Self::Unclear(error),
        }
    }
}

impl LockWatch {
    /// `None` if no file has a lock that can be watched.
    ///
    /// # Errors
    /// See [`WatchError`].
    pub(super) fn new(
        lease: &Arc<Lease>,
        files: &FileList,
        sees_mark: SeesMark,
    ) -> Result<Option<Self>, WatchError> {
        let leased = files.iter().filter(|file| file.lease().is_some());
        let looked = threads::side_by_side(leased, |file| Looked::new(file, lease, sees_mark));
        let looked: Arc<[_]> = looked
            .into_iter()
            .collect::<Result<_, WatchError>>()
            .inspect_err(|error| {
                if matches!(error, WatchError::Lost(_)) {
                    // Who closes the image now must not write to it.
                    lease.lose();
                }
            })?;
        if looked.is_empty() {
            return Ok(None);
        }
        lease.begin_watch();
        Ok(Some(Self {
            lease: Arc::clone(lease),
            files: looked,
            next: Arc::default(),
        }))
    }

    /// How long a look may take at present.
    pub fn patience(&self) -> Duration {
        match self.is_in_doubt() {
            true => PATIENCE_IN_DOUBT,
            false => PATIENCE,
        }
    }

    /// Whether so much time has passed since the last look began that nothing may be begun before
    /// the next one has an answer.
    pub fn is_overdue(&self, since_look: Duration) -> bool {
        since_look > PATIENCE_IN_DOUBT + INTERVAL
    }

    /// Whether after a look that took so long the next one has to begin at once.
    pub fn is_slow(&self, look: Duration) -> bool {
        look > PATIENCE
    }

    /// Waits until a look is due.
    pub fn wait_for_look(&self) -> LookFor {
        self.lease.wait_for_look(INTERVAL)
    }

    /// The same if that is within this time.
    pub fn wait_for_look_within(&self, pause: Duration) -> LookFor {
        self.lease.wait_for_look(pause)
    }

    /// Whether the lock is there, as far as that is known, or nobody looks any more.
    pub fn is_held(&self) -> bool {
        matches!(
            self.lease.standing(),
            LockStanding::Held | LockStanding::Unwatched
        )
    }

    /// Whether it is in doubt whether the lock is there.
    pub fn is_in_doubt(&self) -> bool {
        self.lease.standing() == LockStanding::InDoubt
    }

    /// Whether a sync has failed, and who waits for it is not told before the doubt ends.
    pub fn withholds_failed_sync(&self) -> bool {
        self.lease.withholds_sync()
    }

    /// A look takes too long, or has found nothing out: nothing is begun until another one
    /// has.
    pub fn standing_is_unclear(&self) {
        self.lease.doubt();
    }

    /// A look has found the locks that began when [`Self::wait_for_look`] gave
    /// this number.
    /// `true` if they were in doubt, and are not any more.
    pub fn affirm(&self, doubts: u64) -> bool {
        self.lease.affirm(doubts)
    }

    /// Nothing is begun any more, for good. `true` the first time.
    pub fn lose(&self) -> bool {
        self.lease.lose()
    }

    /// Looks at each file. May take for ever.
    pub fn look(&self) -> Look {
        let start = Moment::now();
        match self.look_by(Looked::look) {
            Look::Held => self.renew(start),
            look => look,
        }
    }

    /// Takes the locks once more, as far as there is time for that: later, somebody else may have
    /// got them since the look began.
    fn renew(&self, start: Moment) -> Look {
        let first = self.next.load(Relaxed);
        let count = self.files.len();
        for at in (first..first + count).map(|at| at % count) {
            if start.elapsed() >= PATIENCE / 2 {
                self.next.store(at, Relaxed);
                break;
            }
            let file = &self.files[at];
            if let Err(odd) = file.keep(&self.lease, start) {
                return file.found(odd);
            }
        }
        Look::Held
    }

    /// Looks at each file more closely, while the lock is in doubt: takes locks that nobody
    /// has any more once more, if it can be told that nobody has had them. May take for ever.
    pub fn confirm(&self) -> Look {
        self.look_by(Looked::confirm)
    }

    fn look_by(&self, look: impl Fn(&Looked, &Lease) -> Result<(), Odd>) -> Look {
        for file in self.files.iter() {
            if let Err(odd) = look(file, &self.lease) {
                return file.found(odd);
            }
        }
        Look::Held
    }

    /// After a loss: whether who opens the files anew, by their paths, would find them, and
    /// nobody else there, as far as can be told by descriptions that have lost their locks. May
    /// take for ever.
    ///
    /// # Errors
    /// Why not.
    pub fn require_openable(&self) -> Result<(), NotOpenable> {
        self.files.iter().try_for_each(Looked::require_openable)
    }

    /// Ends the wait of [`Self::wait_for_look`], for good.
    pub fn end(&self) {
        self.lease.end_watch();
    }
}

impl Looked {
    fn new(file: &Arc<SharedFile>, lease: &Lease, sees_mark: SeesMark) -> Result<Self, WatchError> {
        let path = || file.path().to_owned();
        let other = file.open_to_ask()?.filter(|_| file.shown() != Shown::No);
        // Before there is another description that has it.
        let is_there = match &other {
            Some(other) => lease.is_seen_by(other)?,
            None => true,
        };
        if !is_there || file.shown() == Shown::Lost {
            return Err(WatchError::Lost(path()));
        }
        if other.is_none() {
            log::warn!(
                "{}: the locks on it cannot be asked for: that one is lost is noticed only where \
                 I/O fails without it",
                file.path().display()
            );
        }
        let locked = file.open_to_look()?;
        // Ceph's server has all locks of a file, and no order in them any more once one that two
        // descriptions share is taken again: from then on it answers questions with what
        // the kernel takes for EIO (seen with 16.2.15).
        let is_renewed = filesystem::is_fuse(&locked) && !filesystem::is_ceph(&locked);
        let (place, kind) = (
            Place::from(filesystem::stat_now(&locked)?),
            Kind::of(&locked),
        );
        let by_path = filesystem::stat_path_now(file.path());
        let mut looked = Self {
            mode: match file.is_writable() {
                true => LockMode::ReadWrite,
                false => LockMode::ReadOnly,
            },
            file: Arc::clone(file),
            locked,
            other,
            is_renewed,
            is_late: AtomicBool::new(false),
            sees_mark,
            proof: Proof::None,
            place: Some(place).filter(|place| by_path.is_ok_and(|it| *place == it.into())),
            kind,
        };
        if is_renewed && !file.is_writable() {
            looked.proof = Proof::Stamp(Stamp::of(&looked.locked)?);
        } else if is_renewed && file.note_name()? {
            let is_marked = sees_mark(&looked.read()?);
            looked.proof = Proof::Name { is_marked };
        }
        Ok(looked)
    }

    /// What is odd, if anything is.
    fn look(&self, lease: &Lease) -> Result<(), Odd> {
        if !self.is_seen(lease)? {
            return Err(Odd::Unseen);
        }
        // An answer is all that it is for.
        match self.read().map_err(Odd::of) {
            Err(odd @ Odd::Fails(_)) => Err(odd),
            _ => Ok(()),
        }
    }

    /// Takes a lock once more that was seen by a look that began then, if there is time for that:
    /// later, somebody else may have got it since. One that this is refused for is not on all
    /// servers that it was on, though it shows, and what is written with it would not be either.
    fn keep(&self, lease: &Lease, start: Moment) -> Result<(), Odd> {
        if !self.is_renewed || self.other.is_none() || start.elapsed() >= PATIENCE / 2 {
            return Ok(());
        }
        // First: from now on one may be there that was not.
        let was_late = self.is_late.swap(true, Relaxed);
        let renewed = lease.renew(|| self.renew(lease)).unwrap_or(Ok(()));
        if was_late || start.elapsed() > PATIENCE {
            return renewed.and(Err(Odd::Late));
        }
        if renewed.is_ok() && !self.is_named_as_before()? {
            // It stays late: the time was not what it seemed to be.
            return Err(Odd::Taken(OPENED.to_owned()));
        }
        self.is_late.store(false, Relaxed);
        renewed
    }

    /// As far as it has a name.
    fn is_named_as_before(&self) -> Result<bool, Odd> {
        match self.proof {
            Proof::Name { .. } => self.file.is_still_named().map_err(Odd::of),
            Proof::None | Proof::Stamp(_) => Ok(true),
        }
    }

    /// Whether the lock is there, or can be taken again as if it had been.
    fn confirm(&self, lease: &Lease) -> Result<(), Odd> {
        self.confirm_where_it_was(lease).map_err(|odd| match odd {
            Odd::Fails(_) if self.is_mounted_anew() => Odd::Anew,
            odd => odd,
        })
    }

    fn confirm_where_it_was(&self, lease: &Lease) -> Result<(), Odd> {
        let start = Moment::now();
        self.read().map_err(Odd::of)?;
        let is_seen = self.is_seen(lease)?;
        if is_seen && !self.is_late.load(Relaxed) {
            return self.keep(lease, start);
        }
        if matches!(self.proof, Proof::None) {
            return Err(Odd::Unseen);
        }
        // Until it is proven: what is taken now may be seen, and not be given back.
        self.is_late.store(true, Relaxed);
        let take_again = || {
            // Whoever has the image is not to be kept from giving it to others.
            self.take_again(lease).inspect_err(|_| self.release())
        };
        let Some(taken) = lease.renew(take_again) else {
            return Ok(());
        };
        taken?;
        self.is_late.store(false, Relaxed);
        log::warn!(
            "{}: its server had forgotten the lock, and has given it to nobody else: it was \
             taken once more",
            self.file.path().display()
        );
        Ok(())
    }

    fn take_again(&self, lease: &Lease) -> Result<(), Odd> {
        // First: whoever comes now finds it, and goes.
        self.renew(lease)?;
        lock::test_everywhere(self.file.given(), self.mode).map_err(|error| match error {
            LockError::Io(error) => Odd::of(error),
            error => Odd::Taken(error.to_string()),
        })?;
        match self.is_untouched().map_err(Odd::of)? {
            true => Ok(()),
            false => Err(Odd::Taken(OPENED.to_owned())),
        }
    }

    /// Whether nobody else has opened the file for writing since it was watched.
    fn is_untouched(&self) -> io::Result<bool> {
        match &self.proof {
            Proof::None => Ok(false),
            // Who was there, and has gone, has left a name, or no mark.
            Proof::Name { is_marked } => Ok(
                (!is_marked || (self.sees_mark)(&self.read()?)) && self.file.is_still_named()?
            ),
            Proof::Stamp(stamp) => Ok(*stamp == Stamp::of(&self.locked)?),
        }
    }

    /// Whether its path leads to another file system than the one that it was opened on.
    fn is_mounted_anew(&self) -> bool {
        let found = filesystem::stat_path_now(self.file.path());
        found.is_ok_and(|found| self.is_remounted(found.into()))
    }

    /// Whether what is found by the path is on another file system of the same kind. Where
    /// nothing is mounted any more there may be a file too, of the file system below.
    fn is_remounted(&self, found: Place) -> bool {
        self.place.is_some_and(|place| place.device != found.device)
            && Kind::at(self.file.path()) == self.kind
    }

    fn require_openable(&self) -> Result<(), NotOpenable> {
        let path = || self.file.path().to_owned();
        let away = |source: io::Error| NotOpenable::Away {
            path: path(),
            source,
        };
        let place = self.place.ok_or_else(|| NotOpenable::Other(path()))?;
        let found = match filesystem::stat_path_now(self.file.path()) {
            // GlusterFS answers that, too, by a description that this host has of the file.
            Err(error) if is_refused_for_good(&error) => return Ok(()),
            found => found.map_err(away)?,
        };
        let found = Place::from(found);
        if self.is_remounted(found) {
            // Whoever opens it there finds who else has it.
            return Ok(());
        }
        if found != place {
            return Err(NotOpenable::Other(path()));
        }
        if let Some(other) = &self.other {
            // That names can be looked up does not say that there are enough servers for data.
            match read_by(other) {
                Err(error) if is_refused_for_good(&error) => return Ok(()),
                read => read.map_err(away)?,
            };
        }
        // By the one that had the locks, which may still show here. Or, where nothing can be
        // done by that any more, by one that has never had any.
        let tested = match (lock::test(self.file.given(), self.mode), &self.other) {
            (Err(LockError::Io(_)), Some(other)) => lock::test(other, self.mode),
            (tested, _) => tested,
        };
        if matches!(&tested, Err(LockError::Io(error)) if is_refused_for_good(error)) {
            return Ok(());
        }
        tested.map_err(|error| match error {
            LockError::Io(source) => away(source),
            source => NotOpenable::Taken {
                path: path(),
                source,
            },
        })
    }

    fn is_seen(&self, lease: &Lease) -> Result<bool, Odd> {
        let asked = self.other.as_ref().map(|other| lease.is_seen_by(other));
        asked
            .transpose()
            .map(|seen| seen.unwrap_or(true))
            .map_err(Odd::of)
    }

    /// By the description with the lock, where the file begins.
    fn read(&self) -> io::Result<AlignedBuf> {
        read_by(&self.locked)
    }

    fn renew(&self, lease: &Lease) -> Result<(), Odd> {
        let mut locked = std::iter::once(&self.locked).chain(self.file.locked_descriptions());
        let renewed = locked
            .try_for_each(|file| lease.lock(file))
            .and_then(|()| ImageLock::renew(self.file.given(), self.mode));
        renewed.map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => {
                Odd::Taken("somebody else has locked it exclusively".to_owned())
            }
            _ => Odd::of(error),
        })
    }

    fn release(&self) {
        let locked = [&self.locked, self.file.given()];
        let locked = locked.into_iter().chain(self.file.locked_descriptions());
        locked.for_each(lock::unlock_all);
    }

    fn found(&self, odd: Odd) -> Look {
        let path = self.file.path().to_owned();
        let suspect = |path, why, is_away| Look::Suspect { path, why, is_away };
        match odd {
            Odd::Unclear(error) => Look::Unclear(error),
            Odd::Unseen if matches!(self.proof, Proof::None) => Look::Lost {
                path,
                why: "the file system knows no such lock".to_owned(),
            },
            Odd::Unseen => suspect(path, "the file system knows no such lock".to_owned(), false),
            Odd::Late => suspect(path, "it was renewed late".to_owned(), false),
            Odd::Anew => Look::Lost {
                path,
                why: "its file system was mounted anew".to_owned(),
            },
            Odd::Fails(error) => {
                let is_away = Errno::from_io_error(&error).is_some_and(tells_of_absence);
                suspect(path, error.to_string(), is_away)
            }
            Odd::Taken(why) => suspect(path, why, false),
        }
    }
}

/// Whether a server takes nothing any more by a description that it had taken before: what it
/// would do by a new one only that one can tell, and who opens it finds out who else has the
/// file. GlusterFS with `client.strict-locks`, where servers were started anew.
fn is_refused_for_good(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::BADFD)
}

/// The beginning of a file.
fn read_by(file: &File) -> io::Result<AlignedBuf> {
    let mut bytes = AlignedBuf::from_slice(READ_LEN, &[0; READ_LEN]);
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}
