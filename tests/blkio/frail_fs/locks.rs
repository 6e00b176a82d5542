//! Locks of a server, which it can take away as servers do.

use fuser::{Errno, FileHandle, INodeNo, LockOwner};

/// What who has lost a lock notices of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// No such lock is there any more, and nothing else (GlusterFS).
    Silent,
    /// I/O by what had a lock fails as well (GlusterFS with `client.strict-locks`).
    Strict,
    /// The lock still shows, and I/O by what had it fails (NFS).
    Denied,
    /// Nothing at all can be done by whoever was there (CephFS).
    Fenced,
}

impl Loss {
    pub const ALL: [Self; 4] = [Self::Silent, Self::Strict, Self::Denied, Self::Fenced];

    /// What I/O fails with by what had a lock.
    fn error(self) -> Option<Errno> {
        match self {
            Self::Silent => None,
            Self::Strict => Some(Errno::from_i32(libc::EBADFD)),
            Self::Denied => Some(Errno::EIO),
            Self::Fenced => Some(Errno::ESHUTDOWN),
        }
    }
}

#[derive(Clone, Copy)]
pub struct Lock {
    pub inode: INodeNo,
    pub handle: FileHandle,
    pub owner: LockOwner,
    /// The last byte counts.
    pub range: (u64, u64),
    pub kind: i32,
}

impl Lock {
    fn overlaps(&self, other: &Self) -> bool {
        let is_apart = self.range.1 < other.range.0 || other.range.1 < self.range.0;
        self.inode == other.inode && !is_apart
    }

    fn is_in_the_way_of(&self, other: &Self) -> bool {
        let both_read = self.kind == libc::F_RDLCK && other.kind == libc::F_RDLCK;
        self.owner != other.owner && self.overlaps(other) && !both_read
    }
}

#[derive(Default)]
pub struct Locks {
    held: Vec<Lock>,
    /// That were taken away, by what is still open.
    lost: Vec<Lock>,
    loss: Option<Loss>,
    /// What was opened by who has lost them: up to this handle.
    losers: u64,
    are_final: bool,
}

impl Locks {
    /// All are taken away.
    pub fn lose(&mut self, loss: Loss, last_handle: u64) {
        self.loss = Some(loss);
        self.lost.append(&mut self.held);
        self.losers = last_handle;
    }

    /// What has a lock gets none any more, and keeps what it has.
    pub fn refuse_more(&mut self) {
        self.are_final = true;
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether this has one far behind the end of any file.
    pub fn has_far(&self, handle: FileHandle) -> bool {
        let mut held = self.held.iter();
        held.any(|lock| lock.handle == handle && lock.range.0 > 1 << 40)
    }

    /// Whether this can be used for I/O.
    pub fn allow(&self, handle: FileHandle) -> Result<(), Errno> {
        let error = self.loss.and_then(Loss::error).unwrap_or(Errno::EIO);
        let had_lock = self.lost.iter().any(|lock| lock.handle == handle);
        match (had_lock && self.loss != Some(Loss::Silent)) || self.is_fenced(handle) {
            true => Err(error),
            false => Ok(()),
        }
    }

    pub fn set(&mut self, lock: Lock) -> Result<(), Errno> {
        self.allow(lock.handle)?;
        let is_of = |it: &Lock| it.owner == lock.owner && it.overlaps(&lock);
        let has_one = || self.held.iter().any(|it| it.handle == lock.handle);
        if self.are_final && lock.kind != libc::F_UNLCK && has_one() {
            return Err(Errno::from_i32(libc::EBADFD));
        }
        if lock.kind == libc::F_UNLCK {
            self.held.retain(|it| !is_of(it));
            return Ok(());
        }
        if self.held.iter().any(|it| it.is_in_the_way_of(&lock)) {
            return Err(Errno::EAGAIN);
        }
        if !self.held.iter().any(|it| is_of(it) && it.kind == lock.kind) {
            // It becomes of another kind.
            self.held
                .retain(|it| !(is_of(it) && it.range == lock.range));
            self.held.push(lock);
        }
        Ok(())
    }

    /// Which is in the way.
    pub fn find(&self, lock: Lock) -> Result<Option<Lock>, Errno> {
        if self.is_fenced(lock.handle) {
            return Err(Errno::ESHUTDOWN);
        }
        // A host answers for itself, by what it takes to be its own.
        let of_host = self.loss == Some(Loss::Denied) && lock.handle.0 <= self.losers;
        let own = self.lost.iter().filter(|_| of_host);
        let mut all = self.held.iter().chain(own);
        Ok(all.find(|it| it.is_in_the_way_of(&lock)).copied())
    }

    fn is_fenced(&self, handle: FileHandle) -> bool {
        self.loss == Some(Loss::Fenced) && handle.0 <= self.losers
    }

    pub fn close(&mut self, handle: FileHandle) {
        self.held.retain(|lock| lock.handle != handle);
        self.lost.retain(|lock| lock.handle != handle);
    }
}
