//! The disk that is served: its image, and the engine and the device on it.
//!
//! The image stays open and locked as long as the process has anything to do with it, or
//! as long as a ring runs ([`Holding`]). In the first case the engine comes and goes: who hands
//! the disk to another process closes it, and opens it again from the same files if the other
//! one cannot serve it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::LockLossPolicy;
use super::caretaker::{Activity, Caretaker, Change, NewChain, Operation, Plan, Task, TaskError};
use super::holding::{Holding, Known};
use super::jobs::Reins;
use super::lock_keeper::LockKeeper;
use super::place::file_id;
use super::question::Question;
use super::subject::{Level, Subject};
use super::{Args, Error, Sandbox};
use crate::device::{
    BlockDevice, Holder, Latencies, LatencyBins, LimitsError, QueueReport, Queues, Statistics,
    Throttle, ThrottleLimits, Totals,
};
use crate::format::Sector;
use crate::image::{self, Bundle, OpenImage};
use crate::notices::Notices;
use crate::ploop::{
    self, Bitmap, BitmapAction, BitmapInfo, Chain, Engine, EngineError, EngineReport, LevelShape,
    Running, Shape, WriteThreshold,
};
use crate::served::delete::GoneLevel;
use crate::served::snapshot::Created;
use crate::storage::lock::{ImageLock, LockError};
use crate::storage::{HostDisk, HostFile, WatchError, lock_promise};
use crate::threads::{self, Role};

/// How long one that has ended may still have I/O under way.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// The files of a disk, and what they are. Drop it last: the locks are in it.
pub(super) struct Image {
    files: Vec<HostFile>,
    /// Of the last of them.
    top: String,
    chain: Chain,
    /// Until there is [`Self::caretaker`].
    bundle: Option<Bundle>,
    locks: Vec<ImageLock>,
    standing: Standing,
}

/// What goes on while engines come and go.
#[derive(Clone)]
pub(super) struct Standing {
    pub caretaker: Option<Arc<Caretaker>>,
    /// See [`Subject::folder_id`].
    folder: Option<String>,
    statistics: Arc<Statistics>,
    throttle: Arc<Throttle>,
    notices: Arc<Notices>,
    pub write_threshold: Arc<WriteThreshold>,
}

impl Standing {
    /// What is to be told of the disk.
    pub fn notices(&self) -> &Arc<Notices> {
        &self.notices
    }
}

impl Image {
    /// One that is written to, now or when it is opened again, if `is_to_be_written`.
    ///
    /// # Errors
    /// When there are no more descriptors; any of `fstat(2)`.
    pub fn new(image: OpenImage, is_to_be_written: bool) -> io::Result<Self> {
        // Later the program sees no mounts.
        if let Some(top) = image.files.last().filter(|_| is_to_be_written) {
            lock_promise::warn_of_late_refusal(&top.file, &top.path);
        }
        let notices = Arc::new(Notices::new()?);
        let standing = Standing {
            caretaker: None,
            folder: None,
            statistics: Arc::default(),
            throttle: Arc::default(),
            write_threshold: Arc::new(WriteThreshold::new(Arc::clone(&notices))),
            notices,
        };
        Self::of(image, standing)
    }

    /// The same with what there was before.
    ///
    /// # Errors
    /// Any of `fstat(2)`.
    pub fn of(image: OpenImage, standing: Standing) -> io::Result<Self> {
        let top = image.files.last();
        let top = top.map(|top| top.file.metadata()).transpose()?;
        Ok(Self {
            top: top.as_ref().map(file_id).unwrap_or_default(),
            files: image.files,
            chain: image.chain,
            bundle: image.bundle,
            locks: image.locks,
            standing,
        })
    }

    /// See [`file_id`].
    pub fn top(&self) -> &str {
        &self.top
    }

    /// What guests may do with the disk.
    pub fn throttle(&self) -> &Throttle {
        &self.standing.throttle
    }

    /// What of its file is to be told of when it is used.
    pub fn write_threshold(&self) -> &Arc<WriteThreshold> {
        &self.standing.write_threshold
    }

    /// What is to be told of the disk.
    pub fn notices(&self) -> &Arc<Notices> {
        self.standing.notices()
    }

    /// The folder in which all is that belongs to the disk, if there is one.
    ///
    /// # Errors
    /// If there are not enough descriptors.
    pub fn folder(&self, args: &Args) -> io::Result<Option<File>> {
        let around = self.bundle.is_none();
        let around = around.then(|| image::bundle_around(&args.blk_file));
        let bundle = self
            .bundle
            .as_ref()
            .or(around.as_ref().and_then(Option::as_ref));
        let folder = bundle.map(|bundle| bundle.folder().file().try_clone());
        folder.transpose()
    }

    /// The top is to be written to when it is opened again.
    pub fn set_writable(&mut self, args: &Args) {
        if let Some(top) = self.files.last_mut() {
            top.writable = !args.is_read_only();
        }
    }

    /// Starts the thread that makes the disk larger, if it can become so: before anything is
    /// given up that the thread needs. One that only looks at the files needs nothing, and
    /// starts later.
    ///
    /// # Errors
    /// When there can be no more threads, or it could not be restricted.
    pub fn start_caretaker(&mut self, args: &Args, sandbox: &Sandbox) -> Result<(), Error> {
        let bundle = self.bundle.take();
        if args.is_read_only() {
            return Ok(());
        }
        // The descriptor has to follow even if nobody has named it.
        let bundle = bundle.or_else(|| image::bundle_around(&args.blk_file));
        self.standing.folder = bundle.as_ref().and_then(|bundle| {
            let folder = bundle.folder().file().metadata();
            folder.as_ref().map(file_id).ok()
        });
        // Lower levels stay what they are.
        let hidden = image::require_nothing_hidden(&self.files, &self.chain).err();
        let keeps = sandbox.keeping_to(bundle.as_ref(), &self.files)?;
        self.standing.caretaker = Some(Arc::new(Caretaker::start(bundle, hidden, keeps)?));
        Ok(())
    }

    /// The files are this process's by now, and what of the bundle is no part of the disk may be
    /// other than it was when they were opened.
    pub fn catch_up(&self) {
        if let Some(caretaker) = &self.standing.caretaker {
            caretaker.catch_up();
        }
    }

    /// The disk has this size by now. A raw image does not say so itself, and whoever has
    /// opened it may have read an old descriptor. One that is shorter keeps what it was
    /// opened with.
    ///
    /// # Errors
    /// Any of `fstat(2)`.
    pub fn set_raw_size(&mut self, now: Sector) -> io::Result<()> {
        if let (Some(ploop::Level::Plain { size, .. }), Some(file)) =
            (self.chain.levels.last_mut(), self.files.last())
            && file.file.metadata()?.len() >= now.bytes()
        {
            *size = now;
        }
        Ok(())
    }

    /// What has become of the levels of this engine's disk has become of the image's, as if it
    /// had been opened so.
    pub fn follow(&mut self, change: Change, engine: &Engine<HostDisk>) {
        match change {
            Change::Top(created) => self.add_top(*created, engine),
            Change::Without(levels) => levels.iter().rev().for_each(|level| self.remove(level)),
        }
    }

    fn remove(&mut self, gone: &GoneLevel) {
        if gone.depth >= self.chain.levels.len() {
            return;
        }
        if self.locks.len() == self.chain.levels.len() {
            self.locks.remove(gone.depth);
        }
        self.chain.levels.remove(gone.depth);
        // Who cannot be upgraded has only those that came since.
        self.files.retain(|level| level.path != gone.path);
    }

    fn add_top(&mut self, created: Created, engine: &Engine<HostDisk>) {
        let Created { top, lock, .. } = created;
        match top.file.metadata() {
            Ok(metadata) => self.top = file_id(&metadata),
            Err(error) => log::error!("{}: cannot be looked at: {error}", top.path.display()),
        }
        // Of a raw image only the one above it knows.
        if let Some(ploop::Level::Plain { size, .. }) = self.chain.levels.last_mut() {
            *size = engine.disk_size();
        }
        self.chain.levels.push(ploop::Level::Ploop);
        if let Some(old) = self.files.last_mut() {
            old.writable = false;
        }
        self.files.push(top);
        if let Some(old) = self.locks.last_mut()
            && let Err(error) = old.stop_writing()
        {
            log::warn!("others still find a snapshot locked as if it was written to: {error}");
        }
        self.locks.push(lock);
        if let Some(caretaker) = &self.standing.caretaker {
            caretaker.watch(engine.disk().watch(Some(Arc::clone(self.notices()))));
        }
    }

    /// Gives the locks back, all at once: each is a question to a server.
    pub fn unlock(mut self) {
        threads::side_by_side(std::mem::take(&mut self.locks), drop);
    }

    /// Of all levels, base first.
    pub fn files(&self) -> &[HostFile] {
        &self.files
    }

    /// Gives the files to the engine's disk.
    pub fn disk(&mut self, args: &Args) -> Result<HostDisk, Error> {
        let files = match args.can_be_upgraded() {
            true => self.copies().map_err(Error::Setup)?,
            false => std::mem::take(&mut self.files),
        };
        let disk = HostDisk::new(files, args.host_options()).map_err(Error::Setup)?;
        let notices = Some(Arc::clone(self.notices()));
        self.caretaker()?.watch(disk.watch(notices));
        Ok(disk)
    }

    fn caretaker(&mut self) -> Result<&Arc<Caretaker>, Error> {
        let caretaker = match self.standing.caretaker.take() {
            Some(caretaker) => caretaker,
            None => Arc::new(Caretaker::start_watching()?),
        };
        Ok(self.standing.caretaker.insert(caretaker))
    }

    fn copies(&self) -> io::Result<Vec<HostFile>> {
        let copy = |file: &HostFile| {
            Ok(HostFile {
                file: file.file.try_clone()?,
                path: file.path.clone(),
                writable: file.writable,
            })
        };
        self.files.iter().map(copy).collect()
    }

    /// Reads the image and makes the device on it.
    pub fn serve(&self, disk: HostDisk, args: &Args, cpus: usize) -> Result<Served, Error> {
        self.serve_with(disk, args, cpus, args.engine_options())
    }

    /// As [`Self::serve`], when a process that lives has passed the image on.
    pub fn serve_on(&self, disk: HostDisk, args: &Args, cpus: usize) -> Result<Served, Error> {
        let mut options = args.engine_options();
        options.is_passed_on = true;
        self.serve_with(disk, args, cpus, options)
    }

    /// Makes the device on the image as it is, which nobody here has open until a ring runs.
    /// All that can be opened later has to be opened for that, so whatever keeps this process
    /// from it shows now.
    pub fn serve_rings(&mut self, args: &Args, cpus: usize) -> Result<Served, Error> {
        self.caretaker()?;
        let mut files = std::mem::take(&mut self.files);
        for file in &mut files {
            let again = File::options()
                .read(true)
                .write(file.writable)
                .open(&file.path);
            again.map_err(|source| Error::OpenAgain {
                path: file.path.clone(),
                source,
            })?;
            // It is only looked at now, and another host may write to it.
            file.writable = false;
        }
        let disk = HostDisk::new(files, args.host_options()).map_err(Error::Setup)?;
        let shape = Shape::read(&disk, &self.chain, args.is_read_only());
        let shape = shape.map_err(|source| Error::Engine {
            path: args.blk_file.clone(),
            source,
        })?;
        let levels = level_list(&disk, &shape);
        let holding = Holding::new(args, self.standing.clone(), self.top.clone(), levels);
        let holding = Arc::new(holding);
        let holder = Arc::clone(&holding) as Arc<dyn Holder<HostDisk>>;
        let queues = Queues::new(args.num_queues, args.queue_size)?;
        let device = BlockDevice::held_by(holder, shape, args.serial_number(), queues);
        Ok(Served {
            device: Arc::new(self.furnish(device, args, cpus)?),
            way: Way::ForRings(holding),
            folder: self.standing.folder.clone(),
            caretaker: self.standing.caretaker.clone(),
        })
    }

    fn serve_with(
        &self,
        disk: HostDisk,
        args: &Args,
        cpus: usize,
        options: ploop::Options,
    ) -> Result<Served, Error> {
        let (running, locks) = self.run(disk, args, options)?;
        let device = self.device(args, cpus, &running);
        match device {
            Ok(device) => Ok(Served {
                device: Arc::new(device),
                way: Way::Always {
                    top: self.top.clone(),
                    running: Box::new(running),
                    locks,
                },
                folder: self.standing.folder.clone(),
                caretaker: self.standing.caretaker.clone(),
            }),
            Err(error) => {
                // Says itself what goes wrong.
                drop(running);
                Err(error)
            }
        }
    }

    /// Reads the image and starts the engine's threads.
    pub fn run(
        &self,
        disk: HostDisk,
        args: &Args,
        mut options: ploop::Options,
    ) -> Result<(Running<HostDisk>, Option<LockKeeper>), Error> {
        options.notices = Some(Arc::clone(self.notices()));
        options.write_threshold = Arc::clone(self.write_threshold());
        let opened = Engine::open(disk, &self.chain, options);
        let opened = opened.map_err(|source| Error::Engine {
            path: args.blk_file.clone(),
            source,
        })?;
        let running = Running::start(opened).map_err(Error::Setup)?;
        let waits = args.on_lock_loss == LockLossPolicy::Stop;
        let locks = LockKeeper::start(running.engine(), Arc::clone(self.notices()), waits);
        let locks = locks.map_err(|error| match error {
            WatchError::Lost(path) => Error::LockGone(path),
            WatchError::Io(error) => Error::Setup(error),
        })?;
        Ok((running, locks))
    }

    fn device(
        &self,
        args: &Args,
        cpus: usize,
        running: &Running<HostDisk>,
    ) -> Result<BlockDevice<HostDisk>, Error> {
        let queues = Queues::new(args.num_queues, args.queue_size)?;
        let engine = Arc::clone(running.engine());
        let device = BlockDevice::new(engine, args.serial_number(), queues);
        self.furnish(device, args, cpus)
    }

    fn furnish(
        &self,
        device: BlockDevice<HostDisk>,
        args: &Args,
        cpus: usize,
    ) -> Result<BlockDevice<HostDisk>, Error> {
        let device = device
            .with_cpus(cpus)
            .with_poll(args.longest_poll())
            .with_statistics(Arc::clone(&self.standing.statistics))
            .with_throttle(Arc::clone(&self.standing.throttle))
            .with_notices(Arc::clone(&self.standing.notices))
            .with_logical_block(args.logical_block_size)?;
        Ok(device)
    }

    /// Waits until nobody else uses the image: a process that was to take it over has
    /// ended, and its last I/O has, too.
    pub fn wait_until_alone(&self) -> Result<(), LockError> {
        let start = Instant::now();
        loop {
            match self.locks.iter().try_for_each(ImageLock::is_alone) {
                Err(_) if start.elapsed() < PATIENCE => thread::sleep(PAUSE),
                result => return result,
            }
        }
    }
}

/// A device, and who has the image open that it shows.
pub(super) struct Served {
    device: Arc<BlockDevice<HostDisk>>,
    way: Way,
    /// See [`Subject::folder_id`].
    folder: Option<String>,
    caretaker: Option<Arc<Caretaker>>,
}

/// How an image is open.
enum Way {
    /// All the time.
    Always {
        /// See [`file_id`].
        top: String,
        running: Box<Running<HostDisk>>,
        /// Where there are locks to look after. As long as anything is done to the image.
        locks: Option<LockKeeper>,
    },
    /// While a ring runs.
    ForRings(Arc<Holding>),
}

/// What has become of an image that was to be passed on.
pub(super) enum Passed {
    /// With the bitmaps that it had, for who goes on with it after all.
    Closed(Option<Vec<Bitmap>>),
    /// It has everything, and could not be marked as closed. The same.
    Unmarked(EngineError, Vec<Bitmap>),
    /// The lock on it went meanwhile: it is not to be used here any more.
    Lost,
    /// Not everything could be made stable. The disk can be served on.
    Kept(Served, EngineError),
}

impl Served {
    pub fn device(&self) -> &Arc<BlockDevice<HostDisk>> {
        &self.device
    }

    /// While the image is open.
    pub fn engine(&self) -> Option<Arc<Engine<HostDisk>>> {
        self.device.engine()
    }

    /// Whether nobody here has the image open, or opens or closes it.
    fn is_at_rest(&self) -> bool {
        match &self.way {
            Way::Always { .. } => false,
            Way::ForRings(holding) => holding.is_at_rest(),
        }
    }

    fn known(&self) -> Option<Known> {
        match &self.way {
            Way::Always { .. } => None,
            Way::ForRings(holding) => Some(holding.known()),
        }
    }

    /// Has something done to the disk. Returns at once.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub fn begin(&self, task: Task) -> Result<Operation, TaskError> {
        match (&self.way, &self.caretaker) {
            (Way::ForRings(holding), _) => holding.begin(task),
            (Way::Always { running, .. }, Some(caretaker)) => {
                caretaker.begin(running.engine(), task)
            }
            (Way::Always { .. }, None) => Err(TaskError::Gone),
        }
    }

    /// Has a job done on the disk. Returns at once.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub fn begin_job(&self, plan: Plan, reins: Arc<Reins>) -> Result<Operation, TaskError> {
        let statistics = Arc::clone(self.device.statistics());
        let activity: Activity = Arc::new(move || statistics.activity());
        match (&self.way, &self.caretaker) {
            (Way::ForRings(holding), _) => holding.begin_job(plan, reins, activity),
            (Way::Always { running, .. }, Some(caretaker)) => {
                caretaker.begin_job(running.engine(), (plan, reins), activity)
            }
            (Way::Always { .. }, None) => Err(TaskError::Gone),
        }
    }

    /// The engine's disk has other levels since something was done to it. `image` is that of
    /// this engine, if it is open all the time.
    pub fn follow(&mut self, image: &mut Image, new_chain: &NewChain) {
        match &mut self.way {
            Way::Always { top, running, .. } => {
                if let Some(change) = new_chain.take() {
                    image.follow(change, running.engine());
                    top.clone_from(&image.top);
                }
            }
            Way::ForRings(holding) => holding.follow(new_chain),
        }
    }

    /// Why the disk does not go back to a snapshot, and what to do. It would be another disk under
    /// a guest, or under one that comes back for what it was told is written.
    pub fn why_no_switch(&self, has_front_end: bool) -> String {
        const GUEST: &str = "a guest uses the disk, which cannot become another one under it: shut \
                             the guest down";
        const SWITCH: &str = "'ploop-img snapshot switch' does it then";
        match (&self.way, has_front_end) {
            (Way::ForRings(holding), _) if holding.is_at_rest() => {
                TaskError::NotOpen("snapshot switch").words()
            }
            (Way::ForRings(_), _) => format!("{GUEST}; {SWITCH}"),
            (Way::Always { .. }, true) => {
                format!("{GUEST} and end the process that serves the disk; {SWITCH}")
            }
            (Way::Always { .. }, false) => format!(
                "a guest may come back to the disk as long as the process that serves it runs: end \
                 that process; {SWITCH}. One with --lock=running need not be ended"
            ),
        }
    }

    /// Has the snapshots of the disk looked up. Returns at once.
    ///
    /// # Errors
    /// In words.
    pub fn list_snapshots(&self) -> Result<Question, String> {
        match &self.caretaker {
            Some(caretaker) => {
                if !self.is_open() {
                    // Others may have changed it.
                    caretaker.read_bundle_anew();
                }
                caretaker.list_snapshots()
            }
            None => Err(TaskError::Gone.words()),
        }
    }

    /// Has all of this done to the dirty bitmaps of the disk, at one moment. Returns at once.
    ///
    /// # Errors
    /// In words.
    pub fn change_bitmaps(&self, actions: Vec<BitmapAction>) -> Result<Question, String> {
        let engine = self.engine().ok_or_else(|| {
            let why = match self.is_at_rest() {
                true => TaskError::NotOpen("bitmap"),
                false => TaskError::Turning,
            };
            why.words()
        })?;
        match &self.caretaker {
            Some(caretaker) => caretaker.change_bitmaps(&engine, actions),
            None => Err(TaskError::Gone.words()),
        }
    }

    /// Has all that was written until now put into the files, the mapping included. Returns
    /// at once.
    ///
    /// # Errors
    /// In words: there can be no more threads or descriptors, or the image is about to be
    /// opened or closed.
    pub fn flush(&self) -> Result<Question, String> {
        let begin = || {
            let (question, answerer) = Question::new()?;
            let Some(engine) = self.engine() else {
                // One that is closed has everything.
                answerer.answer(match self.is_at_rest() {
                    true => Ok(json!({})),
                    false => Err("the image is about to be opened or closed".to_owned()),
                });
                return Ok(question);
            };
            threads::start(Role::Sync, "sync", move || {
                let settled = engine.settle();
                // Who hears of the end may close the image.
                drop(engine);
                answerer.answer(match settled {
                    Ok(()) => Ok(json!({})),
                    Err(error) => Err(format!("the disk cannot be flushed: {error}")),
                });
            })?;
            Ok(question)
        };
        begin().map_err(|error: io::Error| error.to_string())
    }

    /// Closes the image for somebody who opens it at once. Nobody is served any more.
    pub fn pass(self) -> Passed {
        let Self {
            device,
            way,
            folder,
            caretaker,
        } = self;
        let keep = |way| Self {
            device: Arc::clone(&device),
            way,
            folder,
            caretaker,
        };
        match way {
            Way::Always {
                top,
                running,
                locks,
            } => {
                let engine = Arc::clone(running.engine());
                match running.pass() {
                    Ok(()) => Passed::Closed(Some(engine.all_bitmaps())),
                    Err((None, _)) if engine.has_lost_lock() => Passed::Lost,
                    Err((None, error)) => Passed::Unmarked(error, engine.all_bitmaps()),
                    Err((Some(running), error)) => {
                        let way = Way::Always {
                            top,
                            running: Box::new(running),
                            locks,
                        };
                        Passed::Kept(keep(way), error)
                    }
                }
            }
            Way::ForRings(holding) => match device.close_image() {
                // As between two guests.
                Ok(()) => Passed::Closed(None),
                Err(error) => Passed::Kept(keep(Way::ForRings(holding)), error),
            },
        }
    }

    /// Closes the image. Nobody is served any more.
    pub fn close(self) -> Result<(), Error> {
        match self.way {
            Way::Always { running, locks, .. } => {
                let closed = running.close().map_err(Error::Close);
                drop(locks);
                closed
            }
            Way::ForRings(holding) => holding.close(),
        }
    }
}

/// The levels of a disk, base first.
pub(super) fn level_list(disk: &HostDisk, shape: &Shape) -> Vec<Level> {
    let level = |level: &LevelShape| {
        let file = disk.known_file(level.file)?;
        Some(Level {
            file: file.path.to_owned(),
            is_ploop: level.is_ploop,
            is_writable: false,
            is_direct: file.is_direct,
            virtual_size: level.geometry.disk_size.bytes(),
            actual_size: file.allocation,
            cluster_size: level.geometry.cluster.bytes(),
        })
    };
    let mut levels: Vec<_> = shape.levels().iter().filter_map(level).collect();
    if let Some(top) = levels.last_mut() {
        top.is_writable = !shape.is_read_only();
        // It may have grown since it was opened.
        top.virtual_size = shape.disk_size().bytes();
    }
    levels
}

impl Subject for Served {
    fn levels(&self) -> Vec<Level> {
        match self.engine() {
            Some(engine) => level_list(engine.disk(), &engine.shape()),
            None => self.known().map(|known| known.levels).unwrap_or_default(),
        }
    }

    fn file_id(&self) -> String {
        match &self.way {
            Way::Always { top, .. } => top.clone(),
            Way::ForRings(holding) => holding.top(),
        }
    }

    fn folder_id(&self) -> Option<String> {
        self.folder.clone()
    }

    fn is_open(&self) -> bool {
        // Also while it is being closed, and may be locked.
        !self.is_at_rest()
    }

    fn has_write_cache(&self) -> bool {
        !Subject::engine(self).is_write_through
    }

    fn totals(&self) -> Totals {
        self.device.statistics().totals()
    }

    fn queues(&self) -> Vec<QueueReport> {
        self.device.statistics().queues()
    }

    fn engine(&self) -> EngineReport {
        match Self::engine(self) {
            Some(engine) => engine.report(),
            None => self.known().map(|known| known.report).unwrap_or_default(),
        }
    }

    fn latencies(&self) -> Latencies {
        self.device.statistics().latencies()
    }

    fn bins(&self) -> LatencyBins {
        self.device.statistics().bins()
    }

    fn ask_for_bins(&self, boundaries: [Option<Vec<u64>>; 3]) {
        self.device.statistics().ask_for_bins(boundaries);
    }

    fn give_up_bins(&self) {
        self.device.statistics().give_up_bins();
    }

    fn write_threshold(&self) -> u64 {
        match &self.way {
            Way::Always { running, .. } => running.engine().write_threshold(),
            Way::ForRings(holding) => holding.write_threshold().bytes(),
        }
    }

    fn set_write_threshold(&self, bytes: u64) {
        match (self.engine(), &self.way) {
            (Some(engine), _) => engine.set_write_threshold(bytes),
            // It is looked at when the image is opened.
            (None, Way::ForRings(holding)) => holding.write_threshold().set(bytes),
            (None, Way::Always { running, .. }) => running.engine().set_write_threshold(bytes),
        }
    }

    fn bitmaps(&self) -> Vec<BitmapInfo> {
        Self::engine(self).map_or_else(Vec::new, |engine| engine.bitmaps())
    }

    fn limits(&self) -> ThrottleLimits {
        self.device.throttle().limits()
    }

    fn set_limits(&self, limits: ThrottleLimits) -> Result<(), LimitsError> {
        self.device.throttle().set(limits)
    }
}
