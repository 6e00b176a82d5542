//! Limits on what guests may do with the disk in a time.
//!
//! Limits are QEMU's: for bytes and for operations, of reads, of writes, and of both
//! together, each a leaky bucket. Its level leaks at `avg` a second. A request may pass
//! when no bucket that it concerns is over-full, and then fills them in full, so that a
//! large one never starves. Zeroing is a write, a discard one of no bytes; a flush is free.
//!
//! A level that leaks is a moment: the one at which the bucket will be empty. So all that
//! the queues share of a limit is one number for each bucket, which a request moves on by
//! what it takes; where it was before says when the request may go. A queue books for the
//! first request that it has waiting of each kind, and for no other: queues take turns.
//! While there are no limits, a request costs a queue one look at a number that nobody
//! writes.

use std::collections::VecDeque;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use thiserror::Error;

use crate::parcel::{ParcelError, Reader, Writer};
use crate::quantity::parse_bytes;

/// Moments are counted in so many parts of a nanosecond: for a fast disk's bytes.
const PARTS: f64 = 16.0;

/// Of a second.
const SECOND: f64 = 1e9 * PARTS;

/// The longest wait that one request can cause. More is no limit, but an end.
const LONGEST: f64 = 1e6 * SECOND;

/// Most units a second, as in QEMU.
pub const MAX_RATE: u64 = 1_000_000_000_000_000;

/// How often a queue that waits looks for new limits.
const LOOK: Duration = Duration::from_millis(100);

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Units a second in the long run; 0: there is none.
    pub avg: u64,
    /// Units a second in a burst; 0: only what is due to the grain of time.
    pub max: u64,
    /// How long a burst may last, in seconds.
    pub max_length: u64,
}

impl Default for Limit {
    fn default() -> Self {
        Self {
            avg: 0,
            max: 0,
            max_length: 1,
        }
    }
}

/// A number of a limit.
enum Part {
    Avg,
    Max,
    Length,
}

/// What a unit is, and of which requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all requests.
    pub bps: Limit,
    /// Of reads.
    pub bps_rd: Limit,
    /// Of writes.
    pub bps_wr: Limit,
    /// All requests.
    pub iops: Limit,
    /// Reads.
    pub iops_rd: Limit,
    /// Writes.
    pub iops_wr: Limit,
    /// A request of more bytes counts as several; 0: as one.
    pub iops_size: u64,
}

/// Limits that cannot be. The words are QEMU's.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum LimitsError {
    /// Which of them would hold?
    #[error("bps/iops/max total values and read/write values cannot be used at the same time")]
    Both,
    /// There is nothing whose size it could be.
    #[error("iops size requires an iops value to be set")]
    Size,
    /// Of a rate.
    #[error("bps/iops/max values must be within [0, {MAX_RATE}]")]
    Rate,
    /// A burst of no length.
    #[error("the burst length cannot be 0")]
    NoLength,
    /// A length without a rate.
    #[error("burst length set without burst rate")]
    Length,
    /// A burst without a limit.
    #[error("bps_max/iops_max require corresponding bps/iops values")]
    Burst,
    /// A burst slower than the limit.
    #[error("bps_max/iops_max cannot be lower than bps/iops")]
    SlowBurst,
    /// A burst that never ends.
    #[error("burst length too high for this burst rate")]
    LongBurst,
}

impl Limits {
    /// Whether there are any.
    pub fn are_any(&self) -> bool {
        self.all().iter().any(|limit| limit.avg > 0)
    }

    /// The number of that name: `bps`, `iops_wr_max_length`, `iops_size`, as QEMU has them.
    pub fn field(&mut self, name: &str) -> Option<&mut u64> {
        if name == "iops_size" {
            return Some(&mut self.iops_size);
        }
        let (base, part) = match name.strip_suffix("_max_length") {
            Some(base) => (base, Part::Length),
            None => match name.strip_suffix("_max") {
                Some(base) => (base, Part::Max),
                None => (name, Part::Avg),
            },
        };
        let at = Self::NAMES.iter().position(|known| *known == base)?;
        let limit = self.all_mut().into_iter().nth(at)?;
        Some(match part {
            Part::Avg => &mut limit.avg,
            Part::Max => &mut limit.max,
            Part::Length => &mut limit.max_length,
        })
    }

    /// What all numbers are called that [`Self::field`] knows: the limits first, then their
    /// bursts.
    pub const NUMBERS: [&'static str; 19] = [
        "bps",
        "bps_rd",
        "bps_wr",
        "iops",
        "iops_rd",
        "iops_wr",
        "bps_max",
        "bps_rd_max",
        "bps_wr_max",
        "iops_max",
        "iops_rd_max",
        "iops_wr_max",
        "bps_max_length",
        "bps_rd_max_length",
        "bps_wr_max_length",
        "iops_max_length",
        "iops_rd_max_length",
        "iops_wr_max_length",
        "iops_size",
    ];

    /// Whether the number of this name is one of bytes, which may have a suffix.
    #[must_use]
    pub fn is_of_bytes(name: &str) -> bool {
        let is_rate = name.starts_with("bps") && !name.ends_with("_length");
        is_rate || name == "iops_size"
    }

    /// The same with some numbers changed, by their names. A burst goes with its limit, its
    /// length with the burst, and the size of operations with the last limit on them, unless
    /// they are named, too: nobody has to know what else there is to lift a limit.
    ///
    /// # Errors
    /// If there is no number of that name; gives it back.
    pub fn with<'a>(&self, changes: &[(&'a str, u64)]) -> Result<Self, &'a str> {
        let mut limits = *self;
        for &(name, value) in changes {
            *limits.field(name).ok_or(name)? = value;
        }
        let is_named = |name: &str| changes.iter().any(|(named, _)| *named == name);
        for (limit, name) in limits.all_mut().into_iter().zip(Self::NAMES) {
            let [max, length] = ["max", "max_length"].map(|part| format!("{name}_{part}"));
            if limit.avg == 0 && !is_named(&max) {
                limit.max = 0;
            }
            if limit.max == 0 && !is_named(&length) {
                limit.max_length = 1;
            }
        }
        let counts = [limits.iops, limits.iops_rd, limits.iops_wr];
        if counts.iter().all(|limit| limit.avg == 0) && !is_named("iops_size") {
            limits.iops_size = 0;
        }
        Ok(limits)
    }

    /// Each limit with its name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Limit)> {
        Self::NAMES.into_iter().zip(self.all())
    }

    /// Of the limits.
    pub const NAMES: [&'static str; 6] = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];

    fn all(&self) -> [&Limit; 6] {
        [
            &self.bps,
            &self.bps_rd,
            &self.bps_wr,
            &self.iops,
            &self.iops_rd,
            &self.iops_wr,
        ]
    }

    fn all_mut(&mut self) -> [&mut Limit; 6] {
        [
            &mut self.bps,
            &mut self.bps_rd,
            &mut self.bps_wr,
            &mut self.iops,
            &mut self.iops_rd,
            &mut self.iops_wr,
        ]
    }

    /// For another process.
    pub(crate) fn write(&self, to: &mut Writer<'_>) {
        for limit in self.all() {
            to.u64(limit.avg);
            to.u64(limit.max);
            to.u64(limit.max_length);
        }
        to.u64(self.iops_size);
    }

    /// Those of another process.
    ///
    /// # Errors
    /// If there are none, or they cannot be.
    pub(crate) fn read(from: &mut Reader) -> Result<Self, ParcelError> {
        let mut limits = Self::default();
        for limit in limits.all_mut() {
            *limit = Limit {
                avg: from.u64()?,
                max: from.u64()?,
                max_length: from.u64()?,
            };
        }
        limits.iops_size = from.u64()?;
        let check = limits.check();
        check.map_err(|_| ParcelError::Invalid("limits that cannot be"))?;
        Ok(limits)
    }

    /// That they can be.
    ///
    /// # Errors
    /// See [`LimitsError`].
    pub fn check(&self) -> Result<(), LimitsError> {
        let clash = |total: u64, read: u64, write: u64| total > 0 && (read > 0 || write > 0);
        if clash(self.bps.avg, self.bps_rd.avg, self.bps_wr.avg)
            || clash(self.iops.avg, self.iops_rd.avg, self.iops_wr.avg)
            || clash(self.bps.max, self.bps_rd.max, self.bps_wr.max)
            || clash(self.iops.max, self.iops_rd.max, self.iops_wr.max)
        {
            return Err(LimitsError::Both);
        }
        let counts = self.iops.avg > 0 || self.iops_rd.avg > 0 || self.iops_wr.avg > 0;
        if self.iops_size > 0 && !counts {
            return Err(LimitsError::Size);
        }
        self.all().into_iter().try_for_each(Limit::check)
    }
}

/// As on the command line, and empty if there are none.
impl Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut limits, plain) = (*self, &mut Self::default());
        let mut separator = "";
        for name in Self::NUMBERS {
            let value = limits.field(name).map(|value| *value);
            let usual = plain.field(name).map(|value| *value);
            if let Some(value) = value.filter(|_| value != usual) {
                write!(f, "{separator}{name}={value}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}

/// As on the command line: `iops=100,bps=10M,iops_max=1000`.
impl FromStr for Limits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut limits = Self::default();
        for part in text.split(',') {
            let (name, value) = part
                .split_once('=')
                .ok_or_else(|| format!("'{part}' is no limit: write iops=100, for example"))?;
            let name = name.replace('-', "_");
            let is_of_bytes = Self::is_of_bytes(&name);
            let field = limits.field(&name);
            let field = field.ok_or_else(|| format!("there is no limit '{name}'"))?;
            *field = match is_of_bytes {
                true => parse_bytes(value)?,
                false => value
                    .parse()
                    .map_err(|_| format!("'{value}' is no number for {name}"))?,
            };
        }
        limits.check().map_err(|error| error.to_string())?;
        Ok(limits)
    }
}

impl Limit {
    fn check(&self) -> Result<(), LimitsError> {
        if self.avg > MAX_RATE || self.max > MAX_RATE {
            return Err(LimitsError::Rate);
        }
        if self.max_length == 0 {
            return Err(LimitsError::NoLength);
        }
        if self.max_length > 1 && self.max == 0 {
            return Err(LimitsError::Length);
        }
        if self.max > 0 && self.avg == 0 {
            return Err(LimitsError::Burst);
        }
        if self.max > 0 && self.max < self.avg {
            return Err(LimitsError::SlowBurst);
        }
        if self.max > 0 && self.max_length > MAX_RATE / self.max {
            return Err(LimitsError::LongBurst);
        }
        Ok(())
    }

    fn buckets(&self) -> impl Iterator<Item = Bucket> {
        let rate = self.avg as f64;
        let main = (self.avg > 0).then(|| match self.max {
            0 => Bucket::new(rate, rate / 10.0),
            max => Bucket::new(rate, max as f64 * self.max_length as f64),
        });
        // During a burst its own rate holds.
        let max = self.max as f64;
        let burst = (self.avg > 0 && self.max_length > 1).then(|| Bucket::new(max, max / 10.0));
        [main, burst].into_iter().flatten()
    }
}

/// A limit at work.
#[derive(Debug)]
struct Bucket {
    /// What a unit takes of the time.
    unit: f64,
    /// The time after which a full one is empty.
    size: u64,
    /// When it will be empty.
    empty_at: CachePadded<AtomicU64>,
}

impl Bucket {
    /// Of so many units, of which `rate` leak in a second.
    fn new(rate: f64, size: f64) -> Self {
        Self {
            unit: SECOND / rate,
            size: (size / rate * SECOND).min(LONGEST) as u64,
            empty_at: CachePadded::default(),
        }
    }

    /// Fills it. Returns from when on that may be so.
    fn book(&self, units: f64, now: u64) -> u64 {
        let time = (units * self.unit).min(LONGEST) as u64;
        let fill = |empty_at: u64| Some(empty_at.max(now).saturating_add(time));
        // Always succeeds.
        let before = self
            .empty_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fill)
            .unwrap_or_default();
        before.saturating_sub(self.size)
    }
}

/// All limits at work.
#[derive(Debug)]
struct Buckets {
    /// Indexed by [`Kind`].
    bytes: [Vec<Arc<Bucket>>; 2],
    operations: [Vec<Arc<Bucket>>; 2],
    iops_size: u64,
}

impl Buckets {
    fn new(limits: &Limits) -> Self {
        let make = |total: &Limit, of_kinds: [&Limit; 2]| {
            let total: Vec<_> = total.buckets().map(Arc::new).collect();
            of_kinds.map(|of_kind| {
                let own = of_kind.buckets().map(Arc::new);
                total.iter().cloned().chain(own).collect()
            })
        };
        Self {
            bytes: make(&limits.bps, [&limits.bps_rd, &limits.bps_wr]),
            operations: make(&limits.iops, [&limits.iops_rd, &limits.iops_wr]),
            iops_size: limits.iops_size,
        }
    }

    /// Books for a request. Returns when it may go.
    fn book(&self, kind: Kind, bytes: u64, now: u64) -> u64 {
        let operations = match self.iops_size {
            0 => 1.0,
            size => (bytes as f64 / size as f64).max(1.0),
        };
        let of_bytes = self.bytes[kind as usize].iter();
        let of_bytes = of_bytes.map(|bucket| bucket.book(bytes as f64, now));
        let of_operations = self.operations[kind as usize].iter();
        let of_operations = of_operations.map(|bucket| bucket.book(operations, now));
        of_bytes.chain(of_operations).max().unwrap_or_default()
    }
}

/// Which limits a request falls under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
}

/// The limits of a disk, for all queues.
#[derive(Debug)]
pub struct Throttle {
    /// What moments are counted from.
    start: Instant,
    /// Counts changes of the limits. Looked at by every queue for each request.
    changes: CachePadded<AtomicU64>,
    held: Mutex<Held>,
}

/// The limits that hold.
#[derive(Debug, Default)]
struct Held {
    limits: Limits,
    /// `None` if there are none.
    buckets: Option<Arc<Buckets>>,
    /// Whether they are others than the process began with, or were set again.
    are_new: bool,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            changes: CachePadded::default(),
            held: Mutex::default(),
        }
    }
}

impl Throttle {
    /// Those that hold.
    pub fn limits(&self) -> Limits {
        self.lock().limits
    }

    /// The same, if they were [set](Self::set): `None` if they are what the disk
    /// [began](Self::begin_with) with.
    pub fn new_limits(&self) -> Option<Limits> {
        let held = self.lock();
        held.are_new.then_some(held.limits)
    }

    /// Those that hold from the beginning, before anything is served.
    ///
    /// # Errors
    /// If they cannot be.
    pub fn begin_with(&self, limits: Limits) -> Result<(), LimitsError> {
        self.hold(limits, false)
    }

    /// Lets others hold from now on. What was waiting is judged by them.
    ///
    /// # Errors
    /// If they cannot be; then nothing has changed.
    pub fn set(&self, limits: Limits) -> Result<(), LimitsError> {
        self.hold(limits, true)
    }

    fn hold(&self, limits: Limits, are_new: bool) -> Result<(), LimitsError> {
        limits.check()?;
        let buckets = limits.are_any().then(|| Arc::new(Buckets::new(&limits)));
        *self.lock() = Held {
            limits,
            buckets,
            are_new,
        };
        self.changes.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        (self.start.elapsed().as_nanos() as u64).saturating_mul(PARTS as u64)
    }
}

/// Where the requests of one queue wait that may not go yet. `T` is a request.
#[derive(Debug)]
pub(super) struct Valve<T> {
    throttle: Arc<Throttle>,
    /// Of the limits, those that are known here.
    changes: u64,
    buckets: Option<Arc<Buckets>>,
    /// Of each kind, the oldest first.
    waiting: [Line<T>; 2],
    /// How many have waited here so far.
    count: u64,
}

/// A request that waits.
#[derive(Debug)]
struct Waiting<T> {
    /// How many have waited before it.
    number: u64,
    /// That it counts as.
    bytes: u64,
    request: T,
}

#[derive(Debug)]
struct Line<T> {
    requests: VecDeque<Waiting<T>>,
    /// When the first may go, once that was booked.
    booked: Option<u64>,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self {
            requests: VecDeque::new(),
            booked: None,
        }
    }
}

impl<T> Valve<T> {
    pub fn new(throttle: Arc<Throttle>) -> Self {
        Self {
            throttle,
            changes: 0,
            buckets: None,
            waiting: Default::default(),
            count: 0,
        }
    }

    /// Whether there are no limits, and nothing waits that has come under some.
    #[inline]
    pub fn is_open(&mut self) -> bool {
        if self.throttle.changes.load(Ordering::Relaxed) != self.changes {
            self.look_for_changes();
        }
        self.buckets.is_none() && self.is_empty()
    }

    /// Gives the request back if it may go at once; else it waits here.
    pub fn pass(&mut self, kind: Kind, bytes: u64, request: T) -> Option<T> {
        if self.is_open() {
            return Some(request);
        }
        let line = &mut self.waiting[kind as usize];
        line.requests.push_back(Waiting {
            number: self.count,
            bytes,
            request,
        });
        self.count += 1;
        // Not before those that have come before it.
        match line.requests.len() {
            1 => self.next_of(kind, self.throttle.now()),
            _ => None,
        }
    }

    /// The next request that may go now: the oldest of those that may.
    #[inline]
    pub fn next(&mut self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        self.next_of_some()
    }

    fn next_of_some(&mut self) -> Option<T> {
        self.look_for_changes();
        let now = self.throttle.now();
        let mut kinds = [Kind::Read, Kind::Write];
        kinds.sort_unstable_by_key(|&kind| {
            let first = self.waiting[kind as usize].requests.front();
            first.map_or(u64::MAX, |first| first.number)
        });
        kinds.into_iter().find_map(|kind| self.next_of(kind, now))
    }

    /// From now on nothing waits for limits: for a queue that stops.
    pub fn open_for_good(&mut self) {
        // Of its own, which nobody else can change.
        self.throttle = Arc::default();
        self.changes = 0;
        self.buckets = None;
        for line in &mut self.waiting {
            line.booked = None;
        }
    }

    /// All that wait, for a queue that stops, the oldest first.
    pub fn take_all(&mut self) -> Vec<T> {
        let lines = std::mem::take(&mut self.waiting).into_iter();
        let mut waiting: Vec<_> = lines.flat_map(|line| line.requests).collect();
        waiting.sort_unstable_by_key(|one| one.number);
        waiting.into_iter().map(|one| one.request).collect()
    }

    /// After which time there may be something to take, if anything waits.
    pub fn pause(&self) -> Option<Duration> {
        if self.is_empty() {
            return None;
        }
        let now = self.throttle.now();
        let lines = self.waiting.iter().filter(|line| !line.requests.is_empty());
        let left = lines.map(|line| line.booked.unwrap_or(now).saturating_sub(now));
        let left = left.min().unwrap_or_default().div_ceil(PARTS as u64);
        Some(Duration::from_nanos(left).min(LOOK))
    }

    #[inline]
    fn is_empty(&self) -> bool {
        self.waiting.iter().all(|line| line.requests.is_empty())
    }

    #[cold]
    fn look_for_changes(&mut self) {
        let changes = self.throttle.changes.load(Ordering::Relaxed);
        if changes == self.changes {
            return;
        }
        // In this order: it may be newer than the number says, and is looked at again then.
        self.changes = self.throttle.changes.load(Ordering::Acquire);
        self.buckets = self.throttle.lock().buckets.clone();
        for line in &mut self.waiting {
            line.booked = None;
        }
    }

    fn next_of(&mut self, kind: Kind, now: u64) -> Option<T> {
        let line = &mut self.waiting[kind as usize];
        let bytes = line.requests.front()?.bytes;
        let booked = line.booked.get_or_insert_with(|| {
            let buckets = self.buckets.as_ref();
            buckets.map_or(0, |buckets| buckets.book(kind, bytes, now))
        });
        if *booked > now {
            return None;
        }
        line.booked = None;
        line.requests.pop_front().map(|first| first.request)
    }
}

#[cfg(test)]
mod tests;
