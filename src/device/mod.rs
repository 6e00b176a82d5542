//! virtio-blk over vhost-user.
//!
//! A [`BlockDevice`] is what a virtual disk looks like to drivers; a
//! [`Connection`] serves it to one front-end. A thread reads the front-end's messages;
//! each virtqueue that runs has a thread of its own:
//!
//! - `connection`: the thread of the messages, from beginning to end;
//! - `channel`: what the front-end is told without asking;
//! - `session`: what each message does;
//! - `image`: the image behind the disk, which need not be open all the time;
//! - `suspended`: a connection on its way to another process;
//! - `gate`: what threads wait at until all of them are there;
//! - `memory_table`: the guest's memory as the front-end shares it;
//! - `ring`: a ring as it is set up, started and stopped;
//! - `write_cache`: what the driver believes of its write cache;
//! - `continuity`: how a guest outlives this process;
//! - `inflight`: which requests were taken and not answered, in memory that does;
//! - `queue_thread`: the thread of a ring that runs;
//! - `mailbox`: what it is told by the thread of the messages;
//! - `worker`: its loop between ring and engine;
//! - `request`: from a descriptor chain to a checked request and to its answer;
//! - `requests`: those of one queue that are in flight;
//! - `memory`: the guest's memory, replaceable under requests in flight;
//! - `statistics`: what is counted of each queue;
//! - `histogram`: how long requests took;
//! - `throttle`: limits on what guests may do in a time;
//! - `dirty_log`: marks on guest memory that was written, for a migration;
//! - `vanishing`: guest memory that is there no more when it is touched;
//! - `event`: the descriptors for kicks and signals;
//! - `config`: feature bits, configuration space and limits;
//! - `ratelimit`: all logging, since guests can provoke most of it;
//! - `fuzzing`: what fuzz targets reach of it.
//!
//! Knows virtio and vhost-user. Must not know clusters, files or sockets' paths:
//! it hands sectors and memory to the engine ([`crate::ploop`]) and hears how it
//! went.
#![deny(clippy::disallowed_macros)]

mod channel;
mod config;
mod connection;
mod continuity;
mod dirty_log;
mod event;
#[cfg(fuzzing)]
pub mod fuzzing;
mod gate;
mod histogram;
mod image;
mod inflight;
mod mailbox;
mod memory;
mod memory_table;
mod queue_thread;
mod ratelimit;
mod request;
mod requests;
mod ring;
mod ring_size;
mod session;
mod signalled;
mod spin;
mod statistics;
mod stops;
mod suspended;
mod throttle;
mod unshared;
mod vanishing;
mod view;
mod worker;
mod write_cache;

use std::fmt;
use std::num::{NonZeroU16, NonZeroUsize};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use thiserror::Error;

pub use connection::{Connection, ConnectionError, NotSuspended, Resumed, has_spoken};
pub use histogram::Histogram;
pub use image::{Haste, HoldError, Holder};
pub use mailbox::Parked;
pub use statistics::{Bins, KindCounts, Latencies, LatencyBins, QueueReport, Statistics, Totals};
pub use suspended::Suspended;
pub use throttle::{Limit, Limits as ThrottleLimits, LimitsError, Throttle};

use crate::format::Sector;
use crate::notices::Notices;
use crate::ploop::{Engine, EngineError, Shape};
use crate::storage::Disk;
use config::ConfigSpace;
use image::Image;
use ratelimit::RateLimit;
use request::ID_LEN;
use stops::Stops;

/// Most virtqueues. QEMU asks for one per vCPU, and serves few with more.
pub const MAX_QUEUES: u16 = 64;

/// Largest ring, in descriptors. virtio allows more; QEMU makes none larger, and
/// the kernel takes no more segments in one transfer.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Smallest ring, in descriptors: the smallest request with data has 3.
pub const MIN_QUEUE_SIZE: u16 = 4;

/// The disk's serial number: what Linux shows in `/sys/block/vda/serial`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial([u8; ID_LEN]);

/// A text that is no [`Serial`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SerialError {
    /// It has too many bytes.
    #[error("a serial number has at most {ID_LEN} bytes; this one has {0}")]
    TooLong(usize),
    /// It has something other than visible ASCII characters and spaces in it.
    #[error("a serial number has only visible ASCII characters, not {0:?}")]
    NotVisible(char),
}

impl Serial {
    /// The beginning of a file's name, as far as it fits.
    pub fn from_file_name(name: &str) -> Self {
        let mut bytes = [0; ID_LEN];
        let visible = name.bytes().filter(u8::is_ascii_graphic);
        for (to, from) in bytes.iter_mut().zip(visible) {
            *to = from;
        }
        Self(bytes)
    }

    /// Padded with zeros; not terminated if it is full.
    pub(crate) fn as_bytes(&self) -> &[u8; ID_LEN] {
        &self.0
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        if let Some(odd) = text.chars().find(|c| !matches!(c, ' '..='~')) {
            return Err(SerialError::NotVisible(odd));
        }
        let mut bytes = [0; ID_LEN];
        bytes
            .get_mut(..text.len())
            .ok_or(SerialError::TooLong(text.len()))?
            .copy_from_slice(text.as_bytes());
        Ok(Self(bytes))
    }
}

/// The smallest unit in which drivers are to read and write. Requests in sectors of
/// 512 bytes are served all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogicalBlock {
    /// What every driver and firmware can use.
    #[default]
    Bytes512,
    /// As a disk of the kind "4K native" has it.
    Bytes4096,
}

impl LogicalBlock {
    /// Its length.
    pub fn bytes(self) -> u32 {
        match self {
            Self::Bytes512 => 512,
            Self::Bytes4096 => 4096,
        }
    }
}

/// A disk that does not end with a logical block.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the disk has {disk_bytes} bytes, which is not a multiple of the logical block size, {}: \
     serve it with 512, or make it larger",
    block.bytes()
)]
pub struct LogicalBlockError {
    disk_bytes: u64,
    block: LogicalBlock,
}

/// How long a queue thread that has nothing under way looks for work before it
/// sleeps, at most; measured in `docs/performance.md`.
pub const DEFAULT_POLL: Duration = Duration::from_micros(50);

/// How many queues of what size a device offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues {
    number: NonZeroU16,
    size: NonZeroU16,
}

/// Queues that cannot be.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum QueuesError {
    /// None or too many.
    #[error("the number of queues must be from 1 to {MAX_QUEUES}, not {0}")]
    Number(u16),
    /// Not a power of two, too small or too large.
    #[error(
        "the queue size must be a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}, \
         not {0}"
    )]
    Size(u16),
}

impl Queues {
    /// `number` queues of up to `size` descriptors.
    ///
    /// # Errors
    /// See [`QueuesError`].
    pub fn new(number: u16, size: u16) -> Result<Self, QueuesError> {
        let number = NonZeroU16::new(number)
            .filter(|n| n.get() <= MAX_QUEUES)
            .ok_or(QueuesError::Number(number))?;
        let size = NonZeroU16::new(size)
            .filter(|s| s.is_power_of_two() && (MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&s.get()))
            .ok_or(QueuesError::Size(size))?;
        Ok(Self { number, size })
    }
}

/// A virtual disk as drivers see it. Outlives the front-ends that come and go.
pub struct BlockDevice<D: Disk> {
    image: Image<D>,
    serial: Serial,
    queues: Queues,
    logical_block: LogicalBlock,
    longest_poll: Duration,
    /// Of the host, as far as this process may use them.
    cpus: usize,
    /// Queues in use at present.
    open_queues: AtomicUsize,
    stops: Stops,
    statistics: Arc<Statistics>,
    throttle: Arc<Throttle>,
    /// Who is told of failed requests.
    notices: Option<Arc<Notices>>,
    /// For log lines that a guest can provoke.
    guest_limit: RateLimit,
    /// For the others, so that a guest cannot drown them.
    host_limit: RateLimit,
}

impl<D: Disk> BlockDevice<D> {
    /// Shows what `engine` serves.
    pub fn new(engine: Arc<Engine<D>>, serial: Serial, queues: Queues) -> Self {
        Self::of(Image::open(engine), serial, queues)
    }

    /// Shows an image that `holder` opens when a ring is to run, and closes when none does.
    /// `shape` is what it is like now.
    pub fn held_by(
        holder: Arc<dyn Holder<D>>,
        shape: Shape,
        serial: Serial,
        queues: Queues,
    ) -> Self {
        Self::of(Image::held_by(holder, shape), serial, queues)
    }

    fn of(image: Image<D>, serial: Serial, queues: Queues) -> Self {
        Self {
            image,
            serial,
            queues,
            logical_block: LogicalBlock::default(),
            longest_poll: DEFAULT_POLL,
            cpus: thread::available_parallelism().map_or(1, NonZeroUsize::get),
            open_queues: AtomicUsize::new(0),
            stops: Stops::new(),
            statistics: Arc::default(),
            throttle: Arc::default(),
            notices: None,
            guest_limit: RateLimit::new(),
            host_limit: RateLimit::new(),
        }
    }

    /// Lets queue threads look for work this long before they sleep, in place of
    /// [`DEFAULT_POLL`]. They do only while sleeps are as short as that.
    #[must_use]
    pub fn with_poll(mut self, longest: Duration) -> Self {
        self.longest_poll = longest;
        self
    }

    /// Lets queue threads count on so many CPUs of the host, in place of what can be
    /// found out when this is made.
    #[must_use]
    pub fn with_cpus(mut self, cpus: usize) -> Self {
        self.cpus = cpus;
        self
    }

    /// Goes on counting where another device of the same disk has left off.
    #[must_use]
    pub fn with_statistics(mut self, statistics: Arc<Statistics>) -> Self {
        self.statistics = statistics;
        self
    }

    /// Keeps guests within limits, which may change.
    #[must_use]
    pub fn with_throttle(mut self, throttle: Arc<Throttle>) -> Self {
        self.throttle = throttle;
        self
    }

    /// Tells `notices` of requests that have failed.
    #[must_use]
    pub fn with_notices(mut self, notices: Arc<Notices>) -> Self {
        self.notices = Some(notices);
        self
    }

    /// What guests may do.
    pub fn throttle(&self) -> &Arc<Throttle> {
        &self.throttle
    }

    /// What guests have done with the disk.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.statistics
    }

    /// Tells drivers to use blocks of this size, in place of 512 bytes.
    ///
    /// # Errors
    /// The disk does not end with such a block.
    pub fn with_logical_block(mut self, block: LogicalBlock) -> Result<Self, LogicalBlockError> {
        self.logical_block = block;
        self.check_blocks()?;
        Ok(self)
    }

    /// That the disk ends with a logical block.
    fn check_blocks(&self) -> Result<(), LogicalBlockError> {
        let disk_bytes = self.disk_size().bytes();
        let block = self.logical_block;
        match disk_bytes.is_multiple_of(u64::from(block.bytes())) {
            true => Ok(()),
            false => Err(LogicalBlockError { disk_bytes, block }),
        }
    }

    /// In sectors, as it is now, or was when the image was seen last.
    pub fn disk_size(&self) -> Sector {
        self.image.disk_size()
    }

    fn longest_poll(&self) -> Duration {
        self.longest_poll
    }

    fn queue_opened(&self) {
        self.open_queues.fetch_add(1, Ordering::Relaxed);
    }

    fn queue_closed(&self) {
        self.open_queues.fetch_sub(1, Ordering::Relaxed);
    }

    fn open_queues(&self) -> usize {
        self.open_queues.load(Ordering::Relaxed)
    }

    /// Whether each queue in use has a CPU for its thread and one for its driver.
    /// Without, an early signal only makes the driver push the thread aside.
    fn has_cpus_to_spare(&self) -> bool {
        2 * self.open_queues() <= self.cpus
    }

    fn stops(&self) -> &Stops {
        &self.stops
    }

    /// While the image is open.
    pub(crate) fn engine(&self) -> Option<Arc<Engine<D>>> {
        self.image.engine()
    }

    /// Has the image closed if it is open only while a ring runs. To be called while nobody
    /// is served.
    ///
    /// # Errors
    /// Not everything could be made stable: it stays open.
    pub fn close_image(&self) -> Result<(), EngineError> {
        self.image.release(Haste::Nobody).map(drop)
    }

    fn image(&self) -> &Image<D> {
        &self.image
    }

    fn serial(&self) -> &[u8; ID_LEN] {
        self.serial.as_bytes()
    }

    fn num_queues(&self) -> u16 {
        self.queues.number.get()
    }

    fn queue_size(&self) -> u16 {
        self.queues.size.get()
    }

    fn guest_limit(&self) -> &RateLimit {
        &self.guest_limit
    }

    fn host_limit(&self) -> &RateLimit {
        &self.host_limit
    }

    fn config_space(&self, writeback: bool) -> ConfigSpace {
        let shape = self.image.shape();
        ConfigSpace {
            disk_size: shape.disk_size(),
            logical_block: self.logical_block.bytes(),
            num_queues: self.num_queues(),
            queue_size: self.queue_size(),
            host_block: shape.zero_granularity(),
            cluster: shape.cluster().bytes() as u32,
            writeback,
        }
    }
}

impl<D: Disk> fmt::Debug for BlockDevice<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockDevice")
            .field("serial", &self.serial)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
