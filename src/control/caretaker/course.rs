//! A job under way: when its next step comes, and what becomes of it.
//!
//! The guest goes before: while it does anything, the job rests between two steps for so long
//! that the guest has the disk to itself for its share of the time. What a step takes of the
//! disk is not known; but if it took all, that share would be what the guest keeps.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::{Done, Kept, NewChain, TaskError};
use crate::control::jobs::{Held, Reins};
use crate::control::question::Ending;
use crate::ploop::Engine;
use crate::served::delete::Deleted;
use crate::served::job::{Job, Progress, Site, Step};
use crate::storage::HostDisk;

/// The longest rest between two steps: who shows progress would think that nothing happens.
const LONGEST_REST: Duration = Duration::from_secs(10);

/// After how long a host that was full is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// For which a limited job gets its bytes at once, as in QEMU's `block/blockjob.c`.
const SLICE: Duration = Duration::from_millis(100);

/// How much the guest has done, or has under way: any change of it means that it does
/// something.
pub(in crate::control) type Activity = Arc<dyn Fn() -> Option<u64> + Send + Sync>;

/// See the module's text.
pub(super) struct Course {
    /// Dropped last, whatever happens.
    pub ending: Ending,
    /// Whoever closes the image meanwhile calls it off.
    pub engine: Weak<Engine<HostDisk>>,
    pub job: Box<dyn Job<HostDisk>>,
    pub reins: Arc<Reins>,
    /// Written to when its status has changed.
    pub changed: Arc<EventFd>,
    /// For who has the image open.
    pub new_chain: NewChain,
    pub tell: SyncSender<Result<Done, TaskError>>,
    pub pace: Pace,
}

impl Course {
    /// Until the next step; `None` while it is paused.
    pub fn time_left(&self) -> Option<Duration> {
        let held = self.reins.held();
        if held.is_cancelled || held.wants_pause != held.is_paused {
            return Some(Duration::ZERO);
        }
        let next = self.pace.next(held.speed);
        (!held.is_paused).then(|| next.saturating_duration_since(Instant::now()))
    }

    /// Does what there is to do now. Gives itself back unless it is over.
    pub fn go_on(mut self, disk: &mut Kept) -> Option<Self> {
        if self.time_left().is_none_or(|time| !time.is_zero()) {
            return Some(self);
        }
        let held = self.reins.begin_step();
        let Some(engine) = self.engine.upgrade() else {
            self.end(Err(TaskError::Cancelled));
            return None;
        };
        let mut site = Site {
            engine: &engine,
            bundle: disk.bundle.as_mut(),
            at_most: step_within(held.speed),
        };
        if held.is_cancelled {
            self.job.cancel(&mut site);
            drop(engine);
            self.end(Err(TaskError::Cancelled));
            return None;
        }
        if held.wants_pause {
            self.show(true, held.is_host_full);
            return Some(self);
        }
        if held.is_paused {
            self.show(false, held.is_host_full);
        }
        self.pace.begin();
        let step = self.job.step(&mut site);
        // Who hears of the end may close the image.
        drop(engine);
        match step {
            Ok(Step::More { bytes }) => {
                self.pace.end(bytes, &held);
                self.show(false, false);
            }
            Ok(Step::HostFull) => {
                self.pace.wait(RETRY);
                self.show(false, true);
            }
            Ok(Step::Later) => {
                self.pace.wait(RETRY);
                self.show(false, false);
            }
            Ok(Step::Done) => {
                self.show(false, false);
                let mut deleted = self.job.take_deleted();
                let space = deleted.as_mut().map(|it| std::mem::take(&mut it.space));
                disk.leftovers.extend(space.into_iter().flatten());
                let has_gone = |it: &Deleted| !it.levels.is_empty() && it.doubt.is_none();
                if deleted.as_ref().is_some_and(has_gone) {
                    // A level that hides something is not deleted, and what was hidden below
                    // the top was in the one that has gone.
                    disk.hidden = None;
                }
                let done = Done::of(deleted, &self.new_chain);
                self.end(Ok(done));
                return None;
            }
            Err(error) => {
                self.end(Err(error.into()));
                return None;
            }
        }
        Some(self)
    }

    fn show(&self, is_paused: bool, is_host_full: bool) {
        let Progress { done, total } = self.job.progress();
        let total = total.max(done);
        let progress = Progress { done, total };
        if self.reins.tell(progress, is_paused, is_host_full) {
            // It can only fail when the descriptor is readable anyway.
            let _ = self.changed.write(1);
        }
    }

    fn end(self, result: Result<Done, TaskError>) {
        let Self {
            ending: _ending,
            job,
            tell,
            ..
        } = self;
        drop(job);
        // Nobody may wait for it any more.
        let _ = tell.send(result);
    }
}

/// When steps come.
pub(super) struct Pace {
    activity: Activity,
    /// What it was when the last step began.
    seen: Option<u64>,
    began: Instant,
    /// Of the last step.
    bytes: u64,
    /// By the end of the rest after it.
    rested: Instant,
}

impl Pace {
    pub fn new(activity: Activity) -> Self {
        let now = Instant::now();
        Self {
            seen: activity(),
            activity,
            began: now,
            bytes: 0,
            rested: now,
        }
    }

    /// When the next one may begin, with so many bytes a second at most.
    fn next(&self, speed: u64) -> Instant {
        let limited = match speed {
            0 => self.began,
            speed => {
                let ns = u128::from(self.bytes) * 1_000_000_000 / u128::from(speed);
                let ns = u64::try_from(ns).unwrap_or(u64::MAX);
                // A day: it can be set anew at any time.
                self.began + Duration::from_nanos(ns).min(Duration::from_secs(86_400))
            }
        };
        limited.max(self.rested)
    }

    fn begin(&mut self) {
        self.began = Instant::now();
    }

    fn end(&mut self, bytes: u64, held: &Held) {
        let now = Instant::now();
        self.bytes = bytes;
        let seen = (self.activity)();
        let is_busy = seen.is_none() || seen != self.seen;
        self.seen = seen;
        let took = now.saturating_duration_since(self.began);
        self.rested = match is_busy {
            true => now + rest_after(took, held.guest_share),
            false => now,
        };
    }

    fn wait(&mut self, time: Duration) {
        self.bytes = 0;
        self.rested = Instant::now() + time;
    }
}

/// How much a step may move where there is a limit in bytes a second: what the limit grants for
/// [`SLICE`], as in QEMU, or else a job that is to be slow would be so in bursts only.
fn step_within(speed: u64) -> u64 {
    match speed {
        0 => u64::MAX,
        speed => speed / (1000 / SLICE.as_millis() as u64),
    }
}

/// How long the guest has the disk to itself after a step that took so long.
fn rest_after(took: Duration, guest_share: u8) -> Duration {
    let share = u32::from(guest_share.min(99));
    (took * share / (100 - share)).min(LONGEST_REST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_has_its_share_of_the_time() {
        let ms = Duration::from_millis;
        assert_eq!(rest_after(ms(30), 70), ms(70));
        assert_eq!(rest_after(ms(30), 0), ms(0));
        assert_eq!(rest_after(ms(30), 50), ms(30));
        assert_eq!(rest_after(ms(10), 99), ms(990));
        assert_eq!(rest_after(ms(10), 200), ms(990));
        assert_eq!(rest_after(Duration::from_secs(30), 70), LONGEST_REST);
    }

    #[test]
    fn a_step_moves_what_the_limit_grants_for_a_slice() {
        assert_eq!(step_within(0), u64::MAX, "there is no limit");
        // Of a second a slice is a tenth.
        assert_eq!(step_within(50 << 20), 5 << 20);
        assert_eq!(step_within(u64::MAX), u64::MAX / 10);
        // Less than that is less than any step can be.
        assert_eq!(step_within(9), 0);
    }

    #[test]
    fn nobody_rests_for_a_guest_that_does_nothing() {
        let held = |share| Held {
            is_cancelled: false,
            has_begun: true,
            wants_pause: false,
            speed: 0,
            guest_share: share,
            progress: Progress::default(),
            is_paused: false,
            is_host_full: false,
        };
        let mut idle = Pace::new(Arc::new(|| Some(5)));
        let mut busy = Pace::new(Arc::new(|| None));
        for pace in [&mut idle, &mut busy] {
            pace.begin();
            std::thread::sleep(Duration::from_millis(5));
            pace.end(1000, &held(70));
        }
        let now = Instant::now();
        assert!(idle.next(0) <= now);
        let left = busy.next(0).saturating_duration_since(now);
        assert!(left > Duration::from_millis(8), "{left:?}");
        // A limit counts from the beginning of the step.
        let left = idle.next(1000).saturating_duration_since(now);
        assert!(left > Duration::from_millis(900), "{left:?}");
        assert!(left < Duration::from_secs(1), "{left:?}");
    }
}
