//! The disk that is served: its image, and the engine and the device on it.
//!
//! The image stays open and locked as long as the process has anything to do with it. The
//! engine comes and goes: who hands the disk to another process closes it, and opens it
//! again from the same files if the other one cannot serve it.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::LockLossPolicy;
use super::caretaker::{Caretaker, Operation, Task, TaskError};
use super::lock_keeper::LockKeeper;
use super::place::file_id;
use super::question::Question;
use super::subject::{Level, Subject};
use super::{Args, Error, Sandbox};
use crate::device::{
    BlockDevice, Latencies, LatencyBins, LimitsError, QueueReport, Queues, Statistics, Throttle,
    ThrottleLimits, Totals,
};
use crate::format::{Geometry, Sector};
use crate::image::{self, Bundle, OpenImage};
use crate::notices::Notices;
use crate::ploop::{self, Chain, Engine, EngineError, EngineReport, Running, WriteThreshold};
use crate::served::snapshot::Created;
use crate::storage::lock::{ImageLock, LockError};
use crate::storage::{HostDisk, HostFile, KnownFile, lock_promise};
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
    caretaker: Option<Arc<Caretaker>>,
    locks: Vec<ImageLock>,
    /// What goes on while engines come and go.
    statistics: Arc<Statistics>,
    throttle: Arc<Throttle>,
    notices: Arc<Notices>,
    write_threshold: Arc<WriteThreshold>,
}

impl Image {
    /// # Errors
    /// When there are no more descriptors; any of `fstat(2)`.
    pub fn new(image: OpenImage) -> io::Result<Self> {
        let notices = Arc::new(Notices::new()?);
        let top = image.files.last();
        if let Some(top) = top.filter(|top| top.writable) {
            lock_promise::warn_of_late_refusal(&top.file, &top.path);
        }
        let top = top.map(|top| top.file.metadata()).transpose()?;
        Ok(Self {
            top: top.as_ref().map(file_id).unwrap_or_default(),
            files: image.files,
            chain: image.chain,
            bundle: image.bundle,
            caretaker: None,
            locks: image.locks,
            statistics: Arc::default(),
            throttle: Arc::default(),
            write_threshold: Arc::new(WriteThreshold::new(Arc::clone(&notices))),
            notices,
        })
    }

    /// What guests may do with the disk.
    pub fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    /// What of its file is to be told of when it is used.
    pub fn write_threshold(&self) -> &Arc<WriteThreshold> {
        &self.write_threshold
    }

    /// What is to be told of the disk.
    pub fn notices(&self) -> &Arc<Notices> {
        &self.notices
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
        // Lower levels stay what they are.
        let hidden = image::require_nothing_hidden(&self.files, &self.chain).err();
        let keeps = sandbox.keeping_to(bundle.as_ref(), &self.files)?;
        self.caretaker = Some(Arc::new(Caretaker::start(bundle, hidden, keeps)?));
        Ok(())
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

    /// What was made the top of the disk of this engine, by a snapshot, belongs to the image as
    /// if it had been opened with it.
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
        if let Some(caretaker) = &self.caretaker {
            caretaker.watch(engine.disk().watch(Some(Arc::clone(&self.notices))));
        }
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
        let notices = Some(Arc::clone(&self.notices));
        self.caretaker()?.watch(disk.watch(notices));
        Ok(disk)
    }

    fn caretaker(&mut self) -> Result<&Arc<Caretaker>, Error> {
        let caretaker = match self.caretaker.take() {
            Some(caretaker) => caretaker,
            None => Arc::new(Caretaker::start_watching()?),
        };
        Ok(self.caretaker.insert(caretaker))
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

    fn serve_with(
        &self,
        disk: HostDisk,
        args: &Args,
        cpus: usize,
        mut options: ploop::Options,
    ) -> Result<Served, Error> {
        options.notices = Some(Arc::clone(&self.notices));
        options.write_threshold = Arc::clone(&self.write_threshold);
        let opened = Engine::open(disk, &self.chain, options);
        let opened = opened.map_err(|source| Error::Engine {
            path: args.blk_file.clone(),
            source,
        })?;
        let running = Running::start(opened).map_err(Error::Setup)?;
        let waits = args.on_lock_loss == LockLossPolicy::Stop;
        let locks = LockKeeper::start(running.engine(), Arc::clone(&self.notices), waits);
        let locks = locks.map_err(Error::Setup)?;
        let device = self.device(args, cpus, &running);
        match device {
            Ok(device) => Ok(Served {
                device: Arc::new(device),
                top: self.top.clone(),
                running,
                caretaker: self.caretaker.clone(),
                locks,
            }),
            Err(error) => {
                // Says itself what goes wrong.
                drop(running);
                Err(error)
            }
        }
    }

    fn device(
        &self,
        args: &Args,
        cpus: usize,
        running: &Running<HostDisk>,
    ) -> Result<BlockDevice<HostDisk>, Error> {
        let queues = Queues::new(args.num_queues, args.queue_size)?;
        let engine = Arc::clone(running.engine());
        let device = BlockDevice::new(engine, args.serial_number(), queues)
            .with_cpus(cpus)
            .with_poll(args.longest_poll())
            .with_statistics(Arc::clone(&self.statistics))
            .with_throttle(Arc::clone(&self.throttle))
            .with_notices(Arc::clone(&self.notices))
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

/// An engine that runs, and the device that shows it.
pub(super) struct Served {
    device: Arc<BlockDevice<HostDisk>>,
    /// See [`file_id`].
    top: String,
    running: Running<HostDisk>,
    caretaker: Option<Arc<Caretaker>>,
    /// Where there are locks to look after. As long as anything is done to the image.
    locks: Option<LockKeeper>,
}

/// What has become of an image that was to be passed on.
pub(super) enum Passed {
    Closed,
    /// It has everything, and could not be marked as closed.
    Unmarked(EngineError),
    /// Not everything could be made stable. The disk can be served on.
    Kept(Served, EngineError),
}

impl Served {
    pub fn device(&self) -> &Arc<BlockDevice<HostDisk>> {
        &self.device
    }

    pub fn engine(&self) -> &Engine<HostDisk> {
        self.running.engine()
    }

    /// Has something done to the disk. Returns at once.
    ///
    /// # Errors
    /// See [`Caretaker::begin`].
    pub fn begin(&self, task: Task) -> Result<Operation, TaskError> {
        match &self.caretaker {
            Some(caretaker) => caretaker.begin(Arc::clone(self.running.engine()), task),
            None => Err(TaskError::Gone),
        }
    }

    /// The engine has another top since a snapshot was made. `image` is that of this engine.
    pub fn add_top(&mut self, image: &mut Image, created: Created) {
        image.add_top(created, self.running.engine());
        self.top.clone_from(&image.top);
    }

    /// Has the snapshots of the disk looked up. Returns at once.
    ///
    /// # Errors
    /// In words.
    pub fn list_snapshots(&self) -> Result<Question, String> {
        match &self.caretaker {
            Some(caretaker) => caretaker.list_snapshots(),
            None => Err(TaskError::Gone.words()),
        }
    }

    /// Has all that was written until now put into the files, the mapping included. Returns
    /// at once.
    ///
    /// # Errors
    /// In words: there can be no more threads or descriptors.
    pub fn flush(&self) -> Result<Question, String> {
        let begin = || {
            let (question, answerer) = Question::new()?;
            let engine = Arc::clone(self.running.engine());
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
            top,
            running,
            caretaker,
            locks,
        } = self;
        match running.pass() {
            Ok(()) => Passed::Closed,
            Err((None, error)) => Passed::Unmarked(error),
            Err((Some(running), error)) => {
                let kept = Self {
                    device,
                    top,
                    running,
                    caretaker,
                    locks,
                };
                Passed::Kept(kept, error)
            }
        }
    }

    /// Closes the image. Nobody is served any more.
    pub fn close(self) -> Result<(), Error> {
        drop(self.device);
        self.running.close().map_err(Error::Close)
    }
}

impl Subject for Served {
    fn levels(&self) -> Vec<Level> {
        let files = self.engine().disk().known_files();
        let levels = files.zip(self.engine().level_geometries());
        let level = |(file, (geometry, is_ploop)): (KnownFile<'_>, (Geometry, bool))| Level {
            file: file.path.to_owned(),
            is_ploop,
            is_writable: file.is_writable && !self.engine().is_read_only(),
            is_direct: file.is_direct,
            virtual_size: geometry.disk_size.bytes(),
            actual_size: file.allocation,
            cluster_size: geometry.cluster.bytes(),
        };
        let mut levels: Vec<_> = levels.map(level).collect();
        if let Some(top) = levels.last_mut() {
            // It may have grown since it was opened.
            top.virtual_size = self.engine().disk_size().bytes();
        }
        levels
    }

    fn file_id(&self) -> &str {
        &self.top
    }

    fn has_write_cache(&self) -> bool {
        !self.engine().report().is_write_through
    }

    fn totals(&self) -> Totals {
        self.device.statistics().totals()
    }

    fn queues(&self) -> Vec<QueueReport> {
        self.device.statistics().queues()
    }

    fn engine(&self) -> EngineReport {
        Self::engine(self).report()
    }

    fn latencies(&self) -> Latencies {
        self.device.statistics().latencies()
    }

    fn bins(&self) -> LatencyBins {
        self.device.statistics().bins()
    }

    fn boundaries(&self) -> [Option<Vec<u64>>; 3] {
        self.device.statistics().boundaries()
    }

    fn ask_for_bins(&self, boundaries: [Option<Vec<u64>>; 3]) {
        self.device.statistics().ask_for_bins(boundaries);
    }

    fn write_threshold(&self) -> u64 {
        self.engine().write_threshold()
    }

    fn set_write_threshold(&self, bytes: u64) {
        self.engine().set_write_threshold(bytes);
    }

    fn limits(&self) -> ThrottleLimits {
        self.device.throttle().limits()
    }

    fn set_limits(&self, limits: ThrottleLimits) -> Result<(), LimitsError> {
        self.device.throttle().set(limits)
    }
}
