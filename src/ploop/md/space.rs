//! Space for new clusters: growing the file ahead of its writers, and the pios
//! that wait for space. And the flushes that do, on a host that needs some to overwrite
//! the BAT, or refuses every write while it is full.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::super::EngineError;
use super::super::inbox::Inbox;
use super::super::options::OnEnospc;
use super::super::pio::{Pio, QueueMessage};
use super::{Flush, MdOp, MdWriter, Waiter};
use crate::format::HostCluster;
use crate::storage::{Disk, Op};

/// How long after the host said that it is full it is asked again.
const RETRY: Duration = Duration::from_millis(500);

/// Writers that use a step up in less are fast.
const FAST: Duration = Duration::from_secs(1);

/// The largest step, as a multiple of the usual one.
const FACTOR_MAX: u32 = 8;

/// What the metadata thread shall do next about space.
pub(super) enum SpaceStep {
    Nothing,
    /// Make the file so many clusters longer.
    Extend(u32),
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Space {
    parked: Vec<Pio>,
    /// Parked pios that have had their last try.
    hopeless: Vec<Pio>,
    /// Flushes that wait for a page of the BAT to be written.
    flushes: Vec<Flush>,
    /// There was none for a page of the BAT when one was written last.
    is_short_for_pages: bool,
    extending: bool,
    /// When the file was made longer last, and by how many times the usual step.
    last_extension: Option<(Duration, u32)>,
    /// Somebody has needed space: from then on the file grows ahead.
    needed: bool,
    /// The host is full. When to look again.
    retry_at: Option<Duration>,
    /// It is time to ask a full host once more.
    ask_again: bool,
    /// That was said in the log.
    announced: bool,
    /// Since the last retry the host has said again that it is full.
    still_full: bool,
    /// At the last retry pios waited. They may still be on their way back.
    retried: bool,
    /// Since the host refused a step: how many clusters it is asked for at most.
    limit: Option<u32>,
}

impl Space {
    /// A pio has come that needs space. `full`: the host said that it has none.
    pub fn park(&mut self, mut pio: Pio, full: bool, policy: OnEnospc, now: Duration) {
        if full {
            self.is_full(policy, now);
        }
        if self.announced {
            pio.home.uncharge();
        }
        if full && (pio.last_try || policy == OnEnospc::Report) {
            return self.hopeless.push(pio);
        }
        // Who does not wait for space does not wait to hear that there is none.
        self.ask_again |= policy == OnEnospc::Report;
        self.needed = true;
        self.parked.push(pio);
    }

    /// The host has no space for a page of the BAT.
    pub fn pages_lack_space(&mut self, policy: OnEnospc, now: Duration) {
        self.is_short_for_pages = true;
        self.is_full(policy, now);
    }

    /// It has: pages were written.
    pub fn pages_have_space(&mut self) {
        self.is_short_for_pages = false;
    }

    /// A flush waits for that.
    pub fn hold(&mut self, flush: Flush) {
        self.flushes.push(flush);
    }

    /// Flushes that shall be tried again because their time has come.
    pub fn due_flushes(&mut self, now: Duration) -> Vec<Flush> {
        match self.retry_at.is_none_or(|at| at <= now) {
            true => self.take_flushes(),
            false => Vec::new(),
        }
    }

    /// All of them.
    pub fn take_flushes(&mut self) -> Vec<Flush> {
        std::mem::take(&mut self.flushes)
    }

    /// Flushes of a queue that must not wait any longer: to be tried once more now.
    pub fn give_up_flushes(&mut self, inbox: &Arc<Inbox<QueueMessage>>) -> Vec<Flush> {
        let of_queue = |flush: &mut Flush| Arc::ptr_eq(&flush.inbox, inbox);
        let mut given_up: Vec<_> = self.flushes.extract_if(.., of_queue).collect();
        for flush in &mut given_up {
            flush.last_try = true;
        }
        given_up
    }

    fn is_full(&mut self, policy: OnEnospc, now: Duration) {
        self.still_full = true;
        self.limit = Some(1);
        if self.retry_at.is_none() {
            self.retry_at = Some(now + RETRY);
        }
        if !self.announced {
            self.announced = true;
            for pio in &mut self.parked {
                pio.home.uncharge();
            }
            match policy {
                OnEnospc::Stop => log::warn!(
                    "the host file system is full: writes that need space wait until there is some"
                ),
                OnEnospc::Report => {
                    log::warn!("the host file system is full: writes that need space fail");
                }
            }
        }
    }

    /// A pio that cannot be tried again at present, though it should. One that had
    /// its last try waits no longer.
    pub fn keep(&mut self, pio: Pio) {
        if pio.last_try {
            self.hopeless.push(pio);
        } else {
            self.parked.push(pio);
        }
    }

    /// Pios that wait for clusters to be there, and not for the host to have space.
    pub fn waiting_for_clusters(&mut self) -> Vec<Pio> {
        if self.announced {
            return Vec::new();
        }
        std::mem::take(&mut self.parked)
    }

    /// Whether the file is being made longer.
    pub fn is_extending(&self) -> bool {
        self.extending
    }

    /// The file is being made longer for another reason.
    pub fn begin_other_extension(&mut self) {
        self.extending = true;
    }

    /// The file was not made longer, or not for who waits, or that had nothing to do with
    /// space.
    pub fn extension_ended(&mut self) {
        self.extending = false;
    }

    /// The end of the file was cut off: it is made longer when somebody needs that.
    pub fn grow_ahead_no_more(&mut self) {
        self.needed = !self.parked.is_empty();
    }

    /// Pios of a queue that must not wait any longer: to be tried once more now.
    pub fn give_up(&mut self, inbox: &Arc<Inbox<QueueMessage>>) -> Vec<Pio> {
        let (mut of_queue, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.parked)
            .into_iter()
            .partition(|pio| pio.home.is_of(inbox) && !pio.last_try);
        self.parked = rest;
        for pio in &mut of_queue {
            pio.last_try = true;
        }
        of_queue
    }

    /// What shall be done now, with so many clusters to be given out.
    pub fn step(&self, available: u32, low_water: u32, step: u32, now: Duration) -> SpaceStep {
        let may_ask =
            self.retry_at.is_none() || self.ask_again || self.parked.iter().any(|pio| pio.last_try);
        if self.extending || !may_ask || !self.needed || available > low_water {
            return SpaceStep::Nothing;
        }
        let clusters = step.saturating_mul(self.next_factor(now));
        let clusters = clusters.min(self.limit.unwrap_or(u32::MAX));
        SpaceStep::Extend(clusters.max(1))
    }

    /// The file is being made longer.
    pub fn begin_extending(&mut self, now: Duration) {
        self.extending = true;
        self.ask_again = false;
        self.last_extension = Some((now, self.next_factor(now)));
    }

    /// How many times the usual step is right: while the host makes the file
    /// longer, direct writes to it wait, so fast writers get larger steps.
    fn next_factor(&self, now: Duration) -> u32 {
        match self.last_extension {
            Some((at, factor)) if now.saturating_sub(at) < FAST => (factor * 2).min(FACTOR_MAX),
            _ => 1,
        }
    }

    /// The file could not be made longer by so many clusters. True if it should
    /// be tried with one at once.
    pub fn extension_failed(&mut self, clusters: u32, policy: OnEnospc, now: Duration) -> bool {
        self.extending = false;
        // A full host may still have space for one.
        self.limit = Some(1);
        if clusters > 1 {
            return true;
        }
        self.retry_at = Some(now + RETRY);
        if self.parked.is_empty() && !self.retried {
            return false;
        }
        self.is_full(policy, now);
        let (hopeless, rest): (Vec<_>, _) = std::mem::take(&mut self.parked)
            .into_iter()
            .partition(|pio| pio.last_try || policy == OnEnospc::Report);
        self.hopeless.extend(hopeless);
        self.parked = rest;
        false
    }

    /// The file is so many clusters longer now: all may try again. `step` is by how
    /// many it usually grows.
    pub fn extended(&mut self, clusters: u32, step: u32) -> Vec<Pio> {
        self.extending = false;
        // Who had space for these may have for twice as many.
        let limit = self.limit.map(|_| clusters.saturating_mul(2));
        self.limit = limit.filter(|&limit| limit < step);
        if !self.announced {
            self.retry_at = None;
        } else if self.limit.is_none() && !self.still_full && !self.is_short_for_pages {
            self.is_full_no_more();
        } else {
            // Or writers would wait between the steps with space at hand.
            self.ask_again = true;
        }
        std::mem::take(&mut self.parked)
    }

    fn is_full_no_more(&mut self) {
        log::warn!("the host file system has space again");
        self.announced = false;
        self.retry_at = None;
    }

    /// Pios that shall be tried again because their time has come.
    pub fn due(&mut self, now: Duration) -> Vec<Pio> {
        if self.retry_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        let is_short = self.still_full || self.is_short_for_pages;
        if self.announced && !is_short && !self.extending && self.parked.is_empty() {
            self.is_full_no_more();
        }
        self.still_full = false;
        self.retried = !self.parked.is_empty();
        self.ask_again = true;
        self.retry_at = self.announced.then(|| now + RETRY);
        std::mem::take(&mut self.parked)
    }

    /// Pios whose last try has failed.
    pub fn take_hopeless(&mut self) -> Vec<Pio> {
        std::mem::take(&mut self.hopeless)
    }

    /// All that wait, for an engine that closes.
    pub fn take_all(&mut self) -> Vec<Pio> {
        std::mem::take(&mut self.parked)
    }

    /// Whether anybody waits.
    pub fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// How many wait.
    pub fn parked(&self) -> u64 {
        self.parked.len() as u64
    }

    /// Whether the host is full.
    pub fn is_host_full(&self) -> bool {
        self.announced
    }

    /// When [`Self::due`] or [`Self::step`] has something.
    pub fn deadline(&self) -> Option<Duration> {
        self.retry_at
    }
}

impl<D: Disk> MdWriter<D> {
    pub(super) fn step_space(&mut self, now: Duration) {
        if self.is_closing() || self.leaves_file_alone() {
            return;
        }
        let flushes = self.space.due_flushes(now);
        self.waiters.extend(flushes.into_iter().map(Waiter::Queue));
        let pios = self.space.due(now);
        self.try_again(pios);
        if self.engine.alloc().available() > 0 {
            let pios = self.space.waiting_for_clusters();
            self.try_again(pios);
        }
        // Also of those that were given up while nothing could be tried.
        self.fail_hopeless();
        let engine = self.engine.clone();
        if engine.alloc().available() > engine.options.low_water {
            // Who takes of it from now on tells again when it gets low.
            engine.space_is_low.store(false, Ordering::Release);
        }
        // Space that is in the file already comes before more of it.
        if self.reclaim.has_leaked() && !engine.has_sync_failed() {
            return;
        }
        let step = self.extension();
        // Where the file is long enough for the whole disk, growing ahead is over.
        let low_water = engine.options.low_water.min(self.missing());
        // In a raw image it is the holes that lack space: trying again is all.
        if engine.has_bat()
            && let SpaceStep::Extend(clusters) =
                self.space
                    .step(engine.alloc().available(), low_water, step, now)
        {
            self.extend(clusters, now);
        }
    }

    /// By how many clusters the file usually grows.
    pub(super) fn extension(&self) -> u32 {
        let shift = self.geometry.cluster.shift();
        let step = self.engine.options.preallocation >> shift;
        u32::try_from(step).unwrap_or(u32::MAX).max(1)
    }

    /// How many clusters the file lacks for the whole disk to be mapped.
    fn missing(&self) -> u32 {
        let geometry = &self.geometry;
        // While the disk grows, what lies where its BAT goes maps nothing.
        let first = geometry
            .first_host_cluster()
            .0
            .max(self.engine.alloc().first());
        let in_file = self.engine.alloc().end().saturating_sub(first);
        geometry.entries.saturating_sub(in_file)
    }

    /// Why the file cannot become longer any more, if it cannot.
    fn no_growth(&self) -> Option<EngineError> {
        let engine = &self.engine;
        if engine.alloc().end() >= self.geometry.host_cluster_limit() {
            Some(EngineError::ImageFull)
        } else if engine.has_sync_failed() {
            Some(EngineError::SyncFailed)
        } else {
            None
        }
    }

    /// Whether clusters are on their way back. After a failed sync none will arrive.
    fn can_reclaim(&self) -> bool {
        self.reclaim.is_under_way() && !self.engine.has_sync_failed()
    }

    pub(super) fn extend(&mut self, clusters: u32, now: Duration) {
        let engine = self.engine.clone();
        self.space.begin_extending(now);
        if let Some(error) = self.no_growth() {
            self.space.extension_ended();
            if !self.can_reclaim() {
                for pio in self.space.take_all() {
                    pio.home.complete(Err(error));
                }
            }
            return;
        }
        let end = engine.alloc().end();
        let room = self.geometry.host_cluster_limit() - end;
        // At least one: some may be on their way through reclaim.
        let clusters = clusters.min(room).min(self.missing().max(1));
        let op = Op::Allocate {
            file: engine.top(),
            offset: self.geometry.host_offset(HostCluster(end)),
            len: u64::from(clusters) << self.geometry.cluster.shift(),
        };
        self.queue(MdOp::Extend { clusters }, op);
    }

    pub(super) fn extended(&mut self, clusters: u32, result: Result<(), Errno>, now: Duration) {
        match result {
            Ok(()) => {
                self.engine
                    .alloc()
                    .extend(self.engine.alloc().end() + clusters);
                let pios = self.space.extended(clusters, self.extension());
                self.try_again(pios);
            }
            Err(Errno::NOSPC | Errno::DQUOT) => {
                let policy = self.engine.options.on_enospc;
                if self.space.extension_failed(clusters, policy, now) {
                    self.extend(1, now);
                }
            }
            Err(errno) => {
                if !self.engine.has_lost_lock() {
                    log::error!("cannot make the image file longer: {errno}");
                }
                self.space.extension_ended();
                for pio in self.space.take_all() {
                    pio.home.complete(Err(EngineError::Io(errno)));
                }
            }
        }
        self.fail_hopeless();
    }

    pub(super) fn park(&mut self, pio: Pio, full: bool, now: Duration) {
        if self.closed {
            return pio.home.complete(Err(EngineError::Stopped));
        }
        if !full && self.engine.alloc().available() > 0 {
            return self.try_again([pio]);
        }
        let waits = full || (self.can_reclaim() && !pio.last_try);
        if let Some(error) = self.no_growth().filter(|_| !waits) {
            return pio.home.complete(Err(error));
        }
        let policy = self.engine.options.on_enospc;
        self.space.park(pio, full, policy, now);
        self.fail_hopeless();
    }

    pub(super) fn fail_hopeless(&mut self) {
        for pio in self.space.take_hopeless() {
            pio.home.complete(Err(EngineError::NoSpace));
        }
    }

    pub(super) fn try_again(&mut self, pios: impl IntoIterator<Item = Pio>) {
        for pio in pios {
            if self.engine.is_suspended() {
                self.space.keep(pio);
                continue;
            }
            let cluster = pio.work.cluster(self.engine.grid());
            self.engine.dispatch(cluster, pio);
        }
    }
}
