//! Looks after the locks on the image, where a server can take them away.
//!
//! Two threads: one looks, every second, and a look can take for ever; the other one keeps
//! the time, and says what follows. A look that is late puts the lock in doubt, and nothing
//! is begun until another one has found it. One that finds it gone is the end: nothing is
//! read or written any more, by any thread, and the engine, the log and control clients are
//! told. On file systems of this host there is nothing to look after, and no thread.
//!
//! Knows threads, and whom to tell. How a lock is looked at, and what keeps others from
//! writing, is [`storage`](crate::storage)'s.

use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::notices::{Notice, Notices};
use crate::ploop::Engine;
use crate::storage::{HostDisk, LockWatch, Look, LookFor};
use crate::threads::{self, Role};

/// How long after a loss it is looked once more what guests were told meanwhile.
const AFTERMATH: Duration = Duration::from_secs(1);

/// See the module's text. Dropped, nobody looks any more: to be dropped last, since what is
/// in doubt then is lost.
pub(super) struct LockKeeper(LockWatch);

impl LockKeeper {
    /// Starts the threads; `None` if there are no locks to look after. `waits` is whether
    /// requests wait after a loss.
    ///
    /// # Errors
    /// When there can be no more threads or descriptors.
    pub fn start(
        engine: &Arc<Engine<HostDisk>>,
        notices: Arc<Notices>,
        waits: bool,
    ) -> io::Result<Option<Self>> {
        let Some(watch) = engine.disk().watch_locks()? else {
            return Ok(None);
        };
        let keeper = Self(watch.clone());
        let (ask, asked) = sync_channel(0);
        let (answer, answers) = sync_channel(1);
        let looker = watch.clone();
        threads::start(Role::LockWatch, "lock-look", move || {
            look_when_asked(&looker, &asked, &answer);
        })?;
        let timekeeper = Timekeeper {
            watch,
            ask,
            answers,
            engine: Arc::downgrade(engine),
            notices,
            waits,
        };
        threads::start(Role::LockWatch, "lock", move || timekeeper.work())?;
        Ok(Some(keeper))
    }
}

impl Drop for LockKeeper {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn look_when_asked(watch: &LockWatch, asked: &Receiver<()>, answer: &SyncSender<Look>) {
    while asked.recv().is_ok() {
        if answer.send(watch.look()).is_err() {
            return;
        }
    }
}

struct Timekeeper {
    watch: LockWatch,
    ask: SyncSender<()>,
    answers: Receiver<Look>,
    /// It may be closed meanwhile.
    engine: Weak<Engine<HostDisk>>,
    notices: Arc<Notices>,
    waits: bool,
}

impl Timekeeper {
    fn work(self) {
        while let LookFor::Doubts(doubts) = self.watch.wait_for_look() {
            let Some(look) = self.look() else {
                return;
            };
            match look {
                Look::Held => {
                    if self.watch.affirm(doubts) {
                        log::info!("the lock on the image is still there; requests go on");
                    }
                }
                Look::Unclear(error) => log::debug!("the lock cannot be looked at: {error}"),
                Look::Lost { path, why } => return self.lose(&path, why),
            }
        }
    }

    /// Has the other thread look. `None` if it has ended.
    fn look(&self) -> Option<Look> {
        let start = Instant::now();
        self.ask.send(()).ok()?;
        match self.answers.recv_timeout(self.watch.patience()) {
            Ok(look) => return Some(look),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => {}
        }
        self.watch.standing_is_unclear();
        log::warn!(
            "the file system of the image does not say whether the lock on it is still there; \
             requests wait until it does"
        );
        let look = self.answers.recv().ok()?;
        let seconds = start.elapsed().as_secs();
        log::info!("the file system of the image has answered after {seconds} s");
        Some(look)
    }

    fn lose(&self, path: &Path, why: String) {
        // First: nothing is begun any more.
        if !self.watch.lose() {
            return;
        }
        if let Some(engine) = self.engine.upgrade() {
            engine.lose_lock();
        }
        let guest = match self.waits {
            true => {
                "Its requests wait; a process that is started anew can go on with them if \
                     nobody else has opened the image"
            }
            false => "Its requests fail",
        };
        log::error!(
            "{}: THE LOCK ON THE IMAGE IS LOST ({why}): another host may use it. Nothing is \
             read or written here any more, and the image is not closed. {guest}",
            path.display()
        );
        self.notices.post(Notice::LockLost {
            path: path.to_owned(),
            why,
            waits: self.waits,
        });
        thread::sleep(AFTERMATH);
        if let Some(engine) = self.engine.upgrade() {
            engine.lose_lock();
        }
    }
}
