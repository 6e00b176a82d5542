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
//! A look can take for ever, so it needs a thread that nobody waits for, and another one that
//! keeps the time: see [`LockWatch::standing_is_unclear`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::FileList;
use super::file::SharedFile;
use super::lease::{Lease, LookFor, tells_of_loss};
use crate::storage::lock::{ImageLock, LockMode};
use crate::storage::{AlignedBuf, filesystem};

/// Between two looks. Who has lost a lock may write for so long before it is noticed, unless
/// the server keeps it from that.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long a look may take until the lock is in doubt. With the time between two looks this
/// is less than the shortest time after which a server gives up on a client.
const PATIENCE: Duration = Duration::from_secs(2);

/// How much is read by a description with the lock, in bytes.
const READ_LEN: usize = 4096;

/// What a look has found.
#[derive(Debug)]
pub enum Look {
    /// The locks are there.
    Held,
    /// It could not be found out.
    Unclear(io::Error),
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
}

#[derive(Debug)]
struct Looked {
    path: PathBuf,
    /// Has the lock of the lease.
    locked: File,
    /// Has none.
    other: File,
    /// Has the locks that keep others away.
    given: File,
    mode: LockMode,
    /// Locks are seen where they are asked for.
    can_ask: bool,
    /// They are to be taken again and again.
    is_renewed: bool,
}

impl LockWatch {
    /// `None` if no file has a lock that can be watched.
    pub(super) fn new(lease: &Arc<Lease>, files: &FileList) -> io::Result<Option<Self>> {
        let leased = files.iter().filter(|file| file.lease().is_some());
        let looked: Arc<[_]> = leased
            .map(|file| Looked::new(file, lease))
            .collect::<io::Result<_>>()?;
        if looked.is_empty() {
            return Ok(None);
        }
        lease.begin_watch();
        Ok(Some(Self {
            lease: Arc::clone(lease),
            files: looked,
        }))
    }

    /// How long a look may take.
    pub const fn patience(&self) -> Duration {
        PATIENCE
    }

    /// Waits until a look is due.
    pub fn wait_for_look(&self) -> LookFor {
        self.lease.wait_for_look(INTERVAL)
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
        for file in self.files.iter() {
            match file.look(&self.lease) {
                Ok(None) => {}
                Ok(Some(why)) => return file.lost(why.to_owned()),
                Err(error) if is_of_loss(&error) => return file.lost(error.to_string()),
                Err(error) => return Look::Unclear(error),
            }
        }
        Look::Held
    }

    /// Ends the wait of [`Self::wait_for_look`], for good.
    pub fn end(&self) {
        self.lease.end_watch();
    }
}

impl Looked {
    fn new(file: &SharedFile, lease: &Lease) -> io::Result<Self> {
        let (locked, other) = file.open_to_look()?;
        let can_ask = lease.is_seen_by(&other).unwrap_or(false);
        if !can_ask {
            log::warn!(
                "{}: its file system does not show the locks of others: that one is lost is \
                 noticed only where I/O fails without it",
                file.path().display()
            );
        }
        Ok(Self {
            path: file.path().to_owned(),
            is_renewed: filesystem::is_fuse(&other),
            locked,
            other,
            given: file.given().try_clone()?,
            mode: match file.is_writable() {
                true => LockMode::ReadWrite,
                false => LockMode::ReadOnly,
            },
            can_ask,
        })
    }

    /// How it is known that the lock is gone, if it is.
    fn look(&self, lease: &Lease) -> io::Result<Option<&'static str>> {
        let start = Instant::now();
        if self.can_ask && !lease.is_seen_by(&self.other)? {
            return Ok(Some("the file system knows no such lock"));
        }
        let mut bytes = AlignedBuf::from_slice(READ_LEN, &[0; READ_LEN]);
        match self.locked.read_at(&mut bytes, 0) {
            Err(error) if is_of_loss(&error) => return Err(error),
            // An answer is all that it is for.
            _ => {}
        }
        // Later, somebody else may have got it in between.
        match self.is_renewed && self.can_ask && start.elapsed() < PATIENCE / 2 {
            true => self.renew(lease, start),
            false => Ok(None),
        }
    }

    fn renew(&self, lease: &Lease, start: Instant) -> io::Result<Option<&'static str>> {
        let renew = || {
            let renewed = lease.lock(&self.locked);
            renewed.and_then(|()| ImageLock::renew(&self.given, self.mode))
        };
        let Some(renewed) = lease.renew(renew) else {
            return Ok(None);
        };
        match renewed {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(Some("somebody else has locked it exclusively"))
            }
            Err(error) => Err(error),
            Ok(()) if start.elapsed() > PATIENCE => Ok(Some("it could not be renewed in time")),
            Ok(()) => Ok(None),
        }
    }

    fn lost(&self, why: String) -> Look {
        Look::Lost {
            path: self.path.clone(),
            why,
        }
    }
}

fn is_of_loss(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(tells_of_loss)
}
