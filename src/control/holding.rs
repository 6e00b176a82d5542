//! The image of a disk that is open, and locked, only while a ring runs (`--lock running`).
//!
//! The thread of a connection's messages opens and closes it, in the place of the front-end
//! that waits for the answer. Control clients are answered from what was known last.

use std::error::Error as _;
use std::io;
use std::iter::successors;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

use super::caretaker::{Activity, Caretaker, NewChain, Operation, Plan, Stop, Task, TaskError};
use super::jobs::Reins;
use super::lock_keeper::LockKeeper;
use super::served::{Image, Standing, level_list};
use super::subject::Level;
use super::{Args, Error};
use crate::device::{Haste, HoldError, Holder};
use crate::image::{self, Access, OpenMode};
use crate::notices::Notice;
use crate::ploop::{Engine, EngineError, EngineReport, Running, WriteThreshold};
use crate::storage::{HostDisk, LockStanding};

/// See the module's text.
pub(super) struct Holding {
    args: Args,
    standing: Standing,
    /// Locked as long as the image is being opened or closed.
    held: Mutex<Option<Held>>,
    known: Mutex<Known>,
    /// Device and inode of what the command line names, at the start.
    place: Option<(u64, u64)>,
}

/// `None` if that cannot be found out.
fn place_of(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// What there is while the image is open.
struct Held {
    running: Running<HostDisk>,
    /// Where there are locks to look after. As long as anything is done to the image.
    locks: Option<LockKeeper>,
    /// Of what was done to it last as a whole.
    operation: Option<Stop>,
    /// Goes last: the locks are in it.
    image: Image,
}

impl Held {
    /// Its lock is lost, so nothing can be written. Whoever opens it next, here or elsewhere,
    /// finds whether somebody else has had it.
    fn let_go(self) {
        log::warn!("no ring runs: the image, whose lock is lost, is let go as it is");
        // Says itself that nothing was closed.
        drop(self.running);
        drop(self.locks);
        self.image.unlock();
    }
}

/// What is told of the disk while the image is not open.
#[derive(Clone)]
pub(super) struct Known {
    /// See [`file_id`](super::place::file_id).
    pub top: String,
    pub levels: Vec<Level>,
    pub report: EngineReport,
}

impl Holding {
    /// Of an image that nobody here has open; `top` and `levels` are what it is like now.
    pub fn new(args: &Args, standing: Standing, top: String, levels: Vec<Level>) -> Self {
        Self {
            place: place_of(&args.blk_file),
            args: args.clone(),
            standing,
            held: Mutex::default(),
            known: Mutex::new(Known {
                top,
                levels,
                report: EngineReport {
                    runners: args.engine_options().runners,
                    ..EngineReport::default()
                },
            }),
        }
    }

    /// What was known when the image was open last.
    pub fn known(&self) -> Known {
        self.lock_known().clone()
    }

    /// The same of its file alone.
    pub fn top(&self) -> String {
        self.lock_known().top.clone()
    }

    /// Whether the image is closed, and nobody is about to open it.
    pub fn is_at_rest(&self) -> bool {
        self.try_lock_held().is_some_and(|held| held.is_none())
    }

    /// What of the top's file is to be told of when it is used.
    pub fn write_threshold(&self) -> &WriteThreshold {
        &self.standing.write_threshold
    }

    /// Has something done to the disk. Returns at once.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub fn begin(&self, task: Task) -> Result<Operation, TaskError> {
        self.begin_with(task.off_line(), |caretaker, engine| {
            caretaker.begin(engine, task)
        })
    }

    /// Has a job done on the disk. Returns at once.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub fn begin_job(
        &self,
        plan: Plan,
        reins: Arc<Reins>,
        activity: Activity,
    ) -> Result<Operation, TaskError> {
        self.begin_with(plan.off_line(), |caretaker, engine| {
            caretaker.begin_job(engine, (plan, reins), activity)
        })
    }

    fn begin_with(
        &self,
        off_line: &'static str,
        begin: impl FnOnce(&Caretaker, &Arc<Engine<HostDisk>>) -> Result<Operation, TaskError>,
    ) -> Result<Operation, TaskError> {
        let mut held = self.try_lock_held().ok_or(TaskError::Turning)?;
        let Some(held) = &mut *held else {
            return Err(TaskError::NotOpen(off_line));
        };
        let caretaker = self.standing.caretaker.as_ref();
        let caretaker = caretaker.ok_or(TaskError::Gone)?;
        let operation = begin(caretaker, held.running.engine())?;
        held.operation = Some(operation.stop());
        Ok(operation)
    }

    /// The disk has other levels. Returns at once: whoever closes the image takes that, too.
    pub fn follow(&self, new_chain: &NewChain) {
        if let Some(mut held) = self.try_lock_held()
            && let Some(held) = &mut *held
            // Not of one that was left behind with an image whose lock was lost.
            && held.operation.as_ref().is_some_and(|stop| stop.puts_into(new_chain))
            && let Some(change) = new_chain.take()
        {
            held.image.follow(change, held.running.engine());
            self.take_note(held.image.top(), held.running.engine());
        }
    }

    /// Closes what could not be released. `Ok` if nothing is open.
    ///
    /// # Errors
    /// What is missing in the image.
    pub fn close(&self) -> Result<(), Error> {
        match self.lock_held().take() {
            Some(held) => held.running.close().map_err(Error::Close),
            None => Ok(()),
        }
    }

    fn open(&self) -> Result<Held, Error> {
        let args = &self.args;
        let access = if args.is_read_only() {
            Access::Read
        } else {
            Access::Serve
        };
        // To look for who has it would take rights that are given up.
        let mode = OpenMode::new(access)
            .snapshot(args.snapshot)
            .names_no_holder();
        let opened = image::open(&args.blk_file, mode)?;
        let hidden = image::require_nothing_hidden(&opened.files, &opened.chain).err();
        let mut image = Image::of(opened, self.standing.clone()).map_err(Error::Setup)?;
        if let Some(caretaker) = &self.standing.caretaker {
            caretaker.image_opened(hidden);
        }
        let disk = image.disk(args)?;
        let (running, locks) = image.run(disk, args, args.engine_options())?;
        self.take_note(image.top(), running.engine());
        // What was set meanwhile may be exceeded.
        let engine = running.engine();
        engine.set_write_threshold(engine.write_threshold());
        Ok(Held {
            running,
            locks,
            operation: None,
            image,
        })
    }

    /// The rights that this process has kept are those to the files that there were at its start.
    /// Those of another mount, or that were put into their place, another one may open.
    fn look_for_other_files(&self, error: &Error) {
        let mut causes = successors(error.source(), |&cause| cause.source());
        let is_denied = causes.any(|cause| {
            let cause = cause.downcast_ref::<io::Error>();
            cause.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
        });
        let is_another = || self.place.is_some() && place_of(&self.args.blk_file) != self.place;
        if is_denied && is_another() {
            let path = self.args.blk_file.clone();
            self.standing.notices().post(Notice::StorageBack { path });
        }
    }

    fn take_note(&self, top: &str, engine: &Engine<HostDisk>) {
        let mut known = self.lock_known();
        top.clone_into(&mut known.top);
        known.levels = level_list(engine.disk(), &engine.shape());
        known.report = engine.report();
        // Nobody looks at locks that are given up.
        known.report.lock = LockStanding::Unwatched;
    }

    /// `None` while the image is being opened or closed.
    fn try_lock_held(&self) -> Option<MutexGuard<'_, Option<Held>>> {
        match self.held.try_lock() {
            Ok(held) => Some(held),
            Err(TryLockError::Poisoned(held)) => Some(held.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn lock_held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Holder<HostDisk> for Holding {
    fn hold(&self) -> Result<Arc<Engine<HostDisk>>, HoldError> {
        let mut held = self.lock_held();
        let start = Instant::now();
        let opened = self
            .open()
            .inspect_err(|error| self.look_for_other_files(error))
            .map_err(|error| HoldError::from(Box::from(error)))?;
        let engine = Arc::clone(opened.running.engine());
        *held = Some(opened);
        log::info!(
            "a ring is to run: the image was locked, read and opened in {:.1} ms",
            start.elapsed().as_secs_f64() * 1e3
        );
        Ok(engine)
    }

    fn release(&self, haste: Haste) -> Result<(), EngineError> {
        let mut held = self.lock_held();
        let Some(mut opened) = held.take() else {
            return Ok(());
        };
        let start = Instant::now();
        let engine = Arc::clone(opened.running.engine());
        if let Some(operation) = opened.operation.take()
            && let Some(change) = operation.end(|| engine.has_lost_lock())
        {
            opened.image.follow(change, &engine);
        }
        self.take_note(opened.image.top(), &engine);
        if engine.has_lost_lock() {
            opened.let_go();
            return Ok(());
        }
        let Held {
            running,
            locks,
            image,
            ..
        } = opened;
        match running.hand_over(haste == Haste::Nobody) {
            Ok(()) => {}
            Err((Some(running), _)) if engine.has_lost_lock() => {
                let operation = None;
                let lost = Held {
                    running,
                    locks,
                    operation,
                    image,
                };
                lost.let_go();
                return Ok(());
            }
            Err((Some(running), error)) => {
                // Another host believes the mark, so it gets no image without.
                log::error!(
                    "no ring runs, but the image cannot be closed ({error}): it stays open and \
                     locked"
                );
                *held = Some(Held {
                    running,
                    locks,
                    operation: None,
                    image,
                });
                return Err(error);
            }
            Err((None, error)) => log::error!("the image was closed already: {error}"),
        }
        drop(locks);
        image.unlock();
        log::info!(
            "no ring runs: the image was closed and unlocked in {:.1} ms",
            start.elapsed().as_secs_f64() * 1e3
        );
        Ok(())
    }
}
