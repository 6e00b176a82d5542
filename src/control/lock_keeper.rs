//! Looks after the locks on the image, where a server can take them away.
//!
//! Two threads: one looks, every second, and a look can take for ever; the other one keeps
//! the time, and says what follows. A look that is late puts the lock in doubt, and nothing
//! is begun until another one has found it. So does one that finds anything odd, and it is
//! looked more closely then, again and again for a while. If it is gone, that is the end:
//! nothing is read or written any more, by any thread, and the engine, the log and control
//! clients are told. Where requests wait, it is looked from then on whether the image could be
//! opened anew, for them to go on. On file systems of this host there is nothing to look after,
//! and no thread.
//!
//! Knows threads, and whom to tell. How a lock is looked at, and what keeps others from
//! writing, is [`storage`](crate::storage)'s.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use crate::format;
use crate::notices::{Notice, Notices};
use crate::ploop::Engine;
use crate::storage::{HostDisk, LockWatch, Look, LookFor, Moment, WatchError};
use crate::threads::{self, Role};

/// How long after a loss it is looked once more what guests were told meanwhile.
const AFTERMATH: Duration = Duration::from_secs(1);

/// How long what is odd about a lock has to last for it to be lost. Nothing is begun meanwhile.
const CONFIRMATION: Duration = Duration::from_secs(2);

/// The same where the way to the server is lost, or nothing can be found out, and requests
/// would wait in any case.
const ABSENCE: Duration = Duration::from_secs(300);

/// The pause between two closer looks.
const PAUSE: Duration = Duration::from_millis(100);

/// How long after a doubt what was withheld meanwhile may not have been told yet: the threads that
/// tell it are woken by the end of the doubt.
const TELLING: Duration = Duration::from_secs(1);

/// How often it is seen to what happens while the other thread looks.
const TICK: Duration = Duration::from_millis(20);

/// So many looks in a row may find nothing out.
const UNCLEAR_LOOKS: u32 = 3;

/// See the module's text. Dropped, nobody looks any more: to be dropped last, since what is
/// in doubt then is lost.
pub(super) struct LockKeeper(LockWatch);

impl LockKeeper {
    /// Starts the threads; `None` if there are no locks to look after. `waits` is whether
    /// requests wait after a loss.
    ///
    /// # Errors
    /// When a lock has gone already, or there can be no more threads or descriptors.
    pub fn start(
        engine: &Arc<Engine<HostDisk>>,
        notices: Arc<Notices>,
        waits: bool,
    ) -> Result<Option<Self>, WatchError> {
        let Some(watch) = engine.disk().watch_locks(format::is_marked_in_use)? else {
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
            is_noted: Cell::new(false),
            affirmed: Cell::new(Moment::now()),
            was_slow: Cell::new(false),
            last: Cell::new(Moment::now()),
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

/// How the other thread is to look.
enum Ask {
    Look,
    Confirm,
}

fn look_when_asked(watch: &LockWatch, asked: &Receiver<Ask>, answer: &SyncSender<Look>) {
    while let Ok(ask) = asked.recv() {
        let look = match ask {
            Ask::Look => watch.look(),
            Ask::Confirm => watch.confirm(),
        };
        if answer.send(look).is_err() {
            return;
        }
    }
}

/// What makes it doubtful that the lock is there.
struct Suspicion {
    path: PathBuf,
    why: String,
    /// See [`Look::Suspect`].
    is_away: bool,
}

impl Suspicion {
    fn unclear(why: String) -> Self {
        Self {
            path: PathBuf::from("the image"),
            why,
            is_away: true,
        }
    }
}

/// What has come of a suspicion.
enum Confirmed {
    Held,
    Lost {
        path: PathBuf,
        why: String,
    },
    /// Nobody wants to know any more.
    End,
}

/// For how long there has been a suspicion.
struct Lasting {
    start: Moment,
    /// Since when it is another one than that the server is away.
    odd_since: Option<Moment>,
}

impl Lasting {
    fn since(start: Moment, is_away: bool) -> Self {
        Self {
            start,
            odd_since: (!is_away).then_some(start),
        }
    }

    /// Whether it has lasted for so long that it is the end, after a look that has found this.
    fn is_over(&mut self, now: Moment, is_away: bool) -> bool {
        if is_away {
            self.odd_since = None;
            return now.since(self.start) > ABSENCE;
        }
        let odd_since = *self.odd_since.get_or_insert(now);
        now.since(odd_since) > CONFIRMATION
    }
}

struct Timekeeper {
    watch: LockWatch,
    ask: SyncSender<Ask>,
    answers: Receiver<Look>,
    /// It may be closed meanwhile.
    engine: Weak<Engine<HostDisk>>,
    notices: Arc<Notices>,
    waits: bool,
    /// The engine knows of a doubt.
    is_noted: Cell<bool>,
    /// When the last doubt ended.
    affirmed: Cell<Moment>,
    /// The last look was.
    was_slow: Cell<bool>,
    /// When it began.
    last: Cell<Moment>,
}

impl Timekeeper {
    fn work(self) {
        let mut unclear = 0;
        while let LookFor::Doubts(doubts) = self.wait_for_look() {
            self.note_doubt();
            let Some(look) = self.look(Ask::Look) else {
                return;
            };
            let suspicion = match look {
                Look::Held => {
                    unclear = 0;
                    self.affirm(doubts);
                    continue;
                }
                Look::Unclear(error) if unclear < UNCLEAR_LOOKS => {
                    log::debug!("the lock cannot be looked at: {error}");
                    unclear += 1;
                    continue;
                }
                Look::Unclear(error) => Suspicion::unclear(error.to_string()),
                Look::Suspect { path, why, is_away } => Suspicion { path, why, is_away },
                Look::Lost { path, why } => return self.lose(&path, why),
            };
            unclear = 0;
            match self.confirm(suspicion) {
                Confirmed::Held => {}
                Confirmed::Lost { path, why } => return self.lose(&path, why),
                Confirmed::End => return,
            }
        }
    }

    /// Has the engine note for whoever comes next that the lock is in doubt; or, a second after
    /// the doubt has ended, that it is not any more: what was withheld until then has been told.
    fn note_doubt(&self) {
        let is_in_doubt = self.watch.is_in_doubt();
        let may_be_trusted = self.is_noted.get() && self.affirmed.get().elapsed() >= TELLING;
        // A doubt that nobody decides any more becomes a loss, and stays noted.
        let may_be_trusted = may_be_trusted && self.watch.is_held();
        if !is_in_doubt && !may_be_trusted {
            return;
        }
        self.is_noted.set(is_in_doubt);
        if let Some(engine) = self.engine.upgrade() {
            match is_in_doubt {
                true => engine.doubt_lock(self.watch.withholds_failed_sync()),
                false => engine.trust_lock(),
            }
        }
    }

    /// The lock is in doubt from now on.
    fn doubt(&self) {
        self.watch.standing_is_unclear();
        self.note_doubt();
    }

    fn affirm(&self, doubts: u64) {
        if self.watch.affirm(doubts) {
            self.affirmed.set(Moment::now());
            log::info!("the lock on the image is still there; requests go on");
        }
    }

    /// Nothing is begun until it is known whether the lock is there.
    fn confirm(&self, mut suspicion: Suspicion) -> Confirmed {
        self.doubt();
        let Suspicion { path, why, .. } = &suspicion;
        log::warn!(
            "{}: the lock on the image may be lost ({why}); requests wait until that is known",
            path.display()
        );
        let mut lasting = Lasting::since(Moment::now(), self.may_be_away(&suspicion));
        loop {
            let LookFor::Doubts(doubts) = self.watch.wait_for_look_within(PAUSE) else {
                return Confirmed::End;
            };
            self.note_doubt();
            match self.look(Ask::Confirm) {
                None => return Confirmed::End,
                Some(Look::Held) => {
                    self.affirm(doubts);
                    return Confirmed::Held;
                }
                Some(Look::Lost { path, why }) => return Confirmed::Lost { path, why },
                Some(Look::Unclear(error)) => {
                    suspicion.why = error.to_string();
                    suspicion.is_away = true;
                }
                Some(Look::Suspect { path, why, is_away }) => {
                    suspicion = Suspicion { path, why, is_away };
                }
            }
            if lasting.is_over(Moment::now(), self.may_be_away(&suspicion)) {
                let Suspicion { path, why, .. } = suspicion;
                return Confirmed::Lost { path, why };
            }
            thread::sleep(PAUSE);
        }
    }

    /// Whether it may take longer than [`CONFIRMATION`] until the suspicion is the end.
    fn may_be_away(&self, suspicion: &Suspicion) -> bool {
        suspicion.is_away && self.waits
    }

    /// Waits until a look is due.
    fn wait_for_look(&self) -> LookFor {
        let look_for = match self.was_slow.get() {
            true => self.watch.wait_for_look_within(Duration::ZERO),
            false => self.watch.wait_for_look(),
        };
        let time = self.last.get().elapsed();
        if look_for == LookFor::End || self.watch.is_in_doubt() || !self.watch.is_overdue(time) {
            return look_for;
        }
        // Others had all that time.
        self.doubt();
        log::warn!(
            "this machine, or this process, has stood still: {} s have passed since it was looked \
             whether the lock on the image is there; requests wait until that is known",
            time.as_secs()
        );
        self.watch.wait_for_look_within(Duration::ZERO)
    }

    /// Has the other thread look. `None` if it has ended.
    fn look(&self, ask: Ask) -> Option<Look> {
        let start = Moment::now();
        self.last.set(start);
        self.ask.send(ask).ok()?;
        let mut is_late = false;
        let look = loop {
            match self.answers.recv_timeout(TICK) {
                Ok(look) => break look,
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            // I/O may have failed meanwhile; and what completes in doubt may be lost as well.
            self.note_doubt();
            if !is_late && start.elapsed() > self.watch.patience() {
                is_late = true;
                self.doubt();
                log::warn!(
                    "the file system of the image does not say whether the lock on it is still \
                     there; requests wait until it does"
                );
            }
        };
        let time = start.elapsed();
        self.was_slow.set(self.watch.is_slow(time));
        if is_late {
            let seconds = time.as_secs();
            log::info!("the file system of the image has answered after {seconds} s");
        }
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
                "Its requests wait; when the storage is there, and nobody else uses the image, \
                     this process ends, and one that is started anew can go on with them"
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
        if self.waits {
            self.wait_until_openable(path);
        }
    }

    /// Says when the image can be opened anew, until somebody has heard it. Here it cannot be:
    /// see [`Error::StorageBack`](super::Error::StorageBack).
    fn wait_until_openable(&self, path: &Path) {
        let mut said = String::new();
        while let LookFor::Doubts(_) = self.watch.wait_for_look() {
            let Err(why) = self.watch.require_openable() else {
                self.notices.post(Notice::StorageBack {
                    path: path.to_owned(),
                });
                continue;
            };
            let why = why.to_string();
            if why != said {
                log::info!("the image cannot be opened anew yet: {why}");
                said = why;
            }
        }
    }
}

#[cfg(test)]
mod tests;
