//! How threads start: under a name, and restricted from their first step on.
//!
//! Each thread has a [`Role`], and a role needs little of what a process may ask of
//! the kernel. Whoever knows what that is [says it once](restrict_with), before there
//! are threads; from then on each thread gives up the rest before it does anything.
//!
//! Knows nothing of what threads do, or of the ways to restrict one.

use std::io;
use std::panic;
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Builder, JoinHandle};
use std::time::Duration;

use crate::headroom;

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Writes the log.
    Log,
    /// Ends the program when its time is over.
    Deadline,
    /// Looks whether the files of the image are still what they were.
    Watch,
    /// The same, and makes the disk larger or a snapshot of it.
    Caretaker,
    /// Looks whether the locks on the image are still there.
    LockWatch,
    /// Makes rings for others.
    Rings,
    /// Writes the image's metadata.
    Metadata,
    /// Makes new mappings.
    Runner,
    /// Waits for a sync of the image.
    Sync,
    /// Answers the messages of a front-end.
    Messages,
    /// Serves a virtqueue.
    Queue,
    /// Clones ranges of files.
    Clone,
}

impl Role {
    /// Each of them once.
    pub const ALL: [Self; 12] = [
        Self::Log,
        Self::Deadline,
        Self::Watch,
        Self::Caretaker,
        Self::LockWatch,
        Self::Rings,
        Self::Metadata,
        Self::Runner,
        Self::Sync,
        Self::Messages,
        Self::Queue,
        Self::Clone,
    ];
}

/// Takes from the calling thread what one of this role does not need.
pub type Restrict = fn(Role) -> io::Result<()>;

static RESTRICT: OnceLock<Restrict> = OnceLock::new();

/// From now on each thread that is started here calls this first. The first one of the
/// process counts.
pub fn restrict_with(restrict: Restrict) {
    let _ = RESTRICT.set(restrict);
}

/// Processor time that the calling thread has taken since it began. Zero where the kernel
/// does not say.
#[must_use]
pub fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for writing during the call. (Of the libraries here that wrap
    // it, rustix asks the kernel for something at the first call that a restricted thread
    // may not.)
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::from_secs(seconds) + Duration::from_nanos(time.tv_nsec.unsigned_abs())
}

/// Starts a thread of this role.
///
/// # Errors
/// When there can be no more threads, there is no memory left for one, or it could not
/// be restricted.
pub fn start<F, T>(role: Role, name: impl Into<String>, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    headroom::check()?;
    let builder = Builder::new().name(name.into());
    let Some(&restrict) = RESTRICT.get() else {
        return builder.spawn(body);
    };
    let (tell, told) = sync_channel(1);
    let thread = builder.spawn(move || {
        let restricted = restrict(role);
        let goes_on = restricted.is_ok();
        // Who started it waits for this.
        let _ = tell.send(restricted);
        if !goes_on {
            // Ends the thread, and says nothing.
            panic::resume_unwind(Box::new(()));
        }
        body()
    })?;
    told.recv().map_err(io::Error::other)??;
    Ok(thread)
}

/// So many threads work [side by side](side_by_side) at most.
const AT_ONCE: usize = 16;

/// Does the same with each of several things, which come back in their order, at once, where to
/// do it means to wait for a server. Threads for that may do what the caller may, and have ended
/// when this returns. With those that cannot be had, it takes longer.
pub fn side_by_side<T: Send, R: Send>(
    things: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let things: Vec<_> = things.into_iter().enumerate().collect();
    let others = things.len().min(AT_ONCE).saturating_sub(1);
    let left = Mutex::new(things.into_iter());
    let done = Mutex::new(Vec::new());
    let take_part = || {
        loop {
            let next = lock(&left).next();
            let Some((index, thing)) = next else { return };
            let result = work(thing);
            lock(&done).push((index, result));
        }
    };
    thread::scope(|scope| {
        let start = |_| {
            headroom::check()?;
            Builder::new()
                .name("side".to_owned())
                .spawn_scoped(scope, take_part)
        };
        let threads: Vec<_> = (0..others).map_while(|at| start(at).ok()).collect();
        take_part();
        for thread in threads {
            // Also until nothing is left of it: the caller may be about to give up rights.
            if let Err(panic) = thread.join() {
                panic::resume_unwind(panic);
            }
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    #[test]
    fn a_thread_has_its_name() {
        let (tell, told) = channel();
        let thread = start(Role::Watch, "watch", move || {
            let name = std::thread::current().name().map(str::to_owned);
            tell.send(name).unwrap();
        });
        assert_eq!(told.recv().unwrap().as_deref(), Some("watch"));
        thread.unwrap().join().unwrap();
    }

    #[test]
    fn what_is_done_side_by_side_comes_back_in_its_order() {
        // Each waits for all others.
        let barrier = Barrier::new(AT_ONCE);
        let twice = side_by_side(0..AT_ONCE, |number| {
            barrier.wait();
            2 * number
        });
        assert_eq!(twice, (0..AT_ONCE).map(|it| 2 * it).collect::<Vec<_>>());
        let more = side_by_side(0..100, |number| number + 1);
        assert_eq!(more, (1..101).collect::<Vec<_>>());
        assert!(side_by_side([], |thing: u8| thing).is_empty());
    }
}
