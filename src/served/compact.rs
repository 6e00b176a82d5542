//! Giving back the space of a disk that is being served: what `ploop-img compact` does with one
//! that nobody uses, for its top.
//!
//! 1. Zeros become holes, and clusters that are nothing else become unmapped, unless a lower
//!    level would show in their place. What is read for that is read beside the guest; only
//!    where there is something to give back is the cluster locked and looked at again.
//! 2. What is free at the end of the file is cut off.
//! 3. Clusters from the end move into gaps in front of them, and the end is cut off again.
//!
//! Each step leaves a disk that is complete and smaller, so what was gained stays, however the
//! job ends. Lower levels belong to snapshots and stay what they are: with nobody using them
//! `ploop-img compact` takes these, too.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::job::{Job, JobError, Progress, Site, Step};
use crate::format::{GuestCluster, Packing, is_zero, zero_blocks};
use crate::ploop::{Engine, EngineError, Outcome};
use crate::storage::{AlignedBuf, Disk, FileId};

/// How long a step may read.
const STEP: Duration = Duration::from_millis(20);

/// Clusters that are locked at the same time, at most.
const LOCKED: usize = 4;

/// Bytes that move in a step; one cluster may have more.
const MOVED_BYTES: u64 = 4 << 20;

/// Bytes that are read at once, at most.
const CHUNK: u64 = 1 << 20;

/// Clusters behind the end without gaps that are found, and then moved, in one round.
const FOUND_AT_ONCE: usize = 1 << 16;

/// How often it is looked what lies behind gaps once all of that has moved: while the guest
/// writes there are always others.
const PASSES: u32 = 4;

/// How long a step waits at most for what the engine does meanwhile: between two steps the job
/// can be called off.
const WAIT: Duration = Duration::from_millis(50);

/// See the module's text.
pub struct Compaction {
    stage: Stage,
    /// What the engine has under way for it.
    under_way: Option<Outcome>,
    progress: Progress,
    found_at_once: usize,
}

enum Stage {
    Begin,
    Zeros {
        next: u32,
    },
    Cut {
        is_last: bool,
    },
    Find(Search),
    Move {
        search: Search,
        packing: Packing,
        todo: VecDeque<GuestCluster>,
        /// So many of them are under way, if any.
        batch: usize,
    },
}

/// For clusters that lie behind the end without gaps.
#[derive(Clone, Copy)]
struct Search {
    /// How often all of them were found.
    passes: u32,
    /// If more are found, the last round was not worth it.
    at_most: usize,
}

impl Compaction {
    /// One that has not begun.
    pub fn new() -> Self {
        Self {
            stage: Stage::Begin,
            under_way: None,
            progress: Progress::default(),
            found_at_once: FOUND_AT_ONCE,
        }
    }

    fn try_step<D: Disk>(&mut self, engine: &Engine<D>, at_most: u64) -> Result<Step, JobError> {
        let cluster = engine.geometry().cluster.bytes();
        match &mut self.stage {
            Stage::Begin => {
                // Clusters of a disk that is not known yet may be a guest's all the same.
                engine.open_for_growth()?;
                let mapped = u64::from(engine.mapped_in_top());
                self.progress.total = mapped * cluster;
                self.stage = Stage::Zeros { next: 0 };
                Ok(Step::More { bytes: 0 })
            }
            Stage::Zeros { next } => {
                let read = squeeze_some(engine, at_most, next, &mut self.progress)?;
                if *next >= engine.geometry().entries {
                    self.progress.done = self.progress.total.max(self.progress.done);
                    self.progress.total = self.progress.done;
                    if engine.is_raw() {
                        return Ok(Step::Done);
                    }
                    self.stage = Stage::Cut { is_last: false };
                }
                Ok(Step::More { bytes: read })
            }
            Stage::Cut { is_last } => {
                if !is_over(engine, &mut self.under_way, || engine.cut_tail())? {
                    return Ok(Step::More { bytes: 0 });
                }
                if *is_last {
                    return Ok(Step::Done);
                }
                self.stage = Stage::Find(Search {
                    passes: 0,
                    at_most: usize::MAX,
                });
                Ok(Step::More { bytes: 0 })
            }
            Stage::Find(search) => {
                let packing = engine.packing();
                let (todo, count) = engine.behind(packing, self.found_at_once);
                self.stage = match search.next(todo.len(), count) {
                    None => Stage::Cut { is_last: true },
                    Some(search) => {
                        self.progress.total = self.progress.done + count as u64 * cluster;
                        Stage::Move {
                            search,
                            packing,
                            todo: todo.into(),
                            batch: 0,
                        }
                    }
                };
                Ok(Step::More { bytes: 0 })
            }
            Stage::Move {
                search,
                packing,
                todo,
                batch,
            } => {
                let begin = || {
                    *batch = (MOVED_BYTES.min(at_most) / cluster).max(1) as usize;
                    engine.move_down(todo.iter().copied().take(*batch).collect(), *packing)
                };
                if !is_over(engine, &mut self.under_way, begin)? {
                    return Ok(Step::More { bytes: 0 });
                }
                let count = todo.drain(..(*batch).min(todo.len())).len();
                let bytes = count as u64 * cluster;
                self.progress.done += bytes;
                if todo.is_empty() {
                    self.stage = Stage::Find(*search);
                }
                Ok(Step::More { bytes })
            }
        }
    }

    /// What is under way ends soon, well or not.
    fn give_up<D: Disk>(&mut self, engine: &Engine<D>) {
        let Some(outcome) = self.under_way.take() else {
            return;
        };
        engine.abandon_growth();
        // Where the lock is lost, a server that is gone may keep it waiting for ever. Nothing
        // else is asked of such an engine.
        while outcome.wait_for(WAIT).is_none() && !engine.has_lost_lock() {}
    }
}

impl Search {
    /// When so many were found, of so many that there are: the search after these have moved,
    /// unless they are not worth it.
    fn next(self, found: usize, count: usize) -> Option<Self> {
        let is_all = found == count;
        let passes = self.passes + u32::from(is_all);
        // A full round has to move half of what it wants to: the guest may map as many behind.
        let gain = if is_all { 1 } else { (found / 2).max(1) };
        let is_worth_it = found > 0 && count <= self.at_most && passes <= PASSES;
        is_worth_it.then(|| Self {
            passes,
            at_most: count - gain,
        })
    }
}

/// Begins it, unless it is under way. Whether it has ended after a while; how, if not well.
fn is_over<D: Disk>(
    engine: &Engine<D>,
    under_way: &mut Option<Outcome>,
    begin: impl FnOnce() -> Outcome,
) -> Result<bool, EngineError> {
    let Some(result) = under_way.get_or_insert_with(begin).wait_for(WAIT) else {
        if engine.is_suspended() {
            // Somebody else wants all to be quiet.
            engine.abandon_growth();
        }
        return Ok(false);
    };
    *under_way = None;
    result.map(|()| true)
}

impl Default for Compaction {
    fn default() -> Self {
        Self::new()
    }
}

impl<D: Disk> Job<D> for Compaction {
    fn step(&mut self, site: &mut Site<'_, D>) -> Result<Step, JobError> {
        let engine = site.engine;
        if engine.has_lost_lock() {
            self.give_up(engine);
            return Err(EngineError::LockLost.into());
        }
        if engine.is_suspended() && self.under_way.is_none() {
            return Ok(Step::Later);
        }
        match self.try_step(engine, site.at_most) {
            Err(_) if engine.has_lost_lock() => Err(EngineError::LockLost.into()),
            Err(JobError::Engine(EngineError::NoSpace)) => Ok(Step::HostFull),
            // Somebody else is at it, or has had to end it.
            Err(JobError::Engine(
                EngineError::Suspended | EngineError::Growing | EngineError::Stopped,
            )) => Ok(Step::Later),
            step => step,
        }
    }

    fn progress(&self) -> Progress {
        self.progress
    }

    fn cancel(&mut self, site: &mut Site<'_, D>) {
        self.give_up(site.engine);
    }
}

/// Looks for zeros for a while, from cluster `next` on, and gives them back. How many bytes
/// were read for that.
fn squeeze_some<D: Disk>(
    engine: &Engine<D>,
    at_most: u64,
    next: &mut u32,
    progress: &mut Progress,
) -> Result<u64, JobError> {
    let geometry = engine.geometry();
    let cluster = geometry.cluster.bytes();
    let until = Instant::now() + STEP;
    let mut bytes = 0;
    let mut locked: Vec<(GuestCluster, u64, Outcome)> = Vec::new();
    let mut begun = 0_u32;
    while *next < geometry.entries && locked.len() < LOCKED {
        // A look at an entry costs next to nothing, at the clock more.
        begun += 1;
        if begun.is_multiple_of(256) && Instant::now() >= until {
            break;
        }
        let guest = GuestCluster(*next);
        *next += 1;
        let Some((file, start)) = engine.place_in_top(guest) else {
            continue;
        };
        let done = progress.done;
        progress.done += cluster;
        let look = look_for_zeros(engine, file, start..start + cluster)?;
        bytes += look.bytes;
        if look.is_worth_it || (!look.has_data && engine.can_unmap_zeros()) {
            locked.push((guest, done, engine.squeeze(guest)));
        }
        if bytes >= at_most || Instant::now() >= until {
            break;
        }
    }
    for (guest, done, outcome) in locked {
        if let Err(error) = engine.wait_unless_held(&outcome) {
            // From here on once more.
            progress.done = done;
            *next = guest.0;
            return Err(error.into());
        }
    }
    Ok(bytes)
}

struct Looked {
    /// So many were read.
    bytes: u64,
    /// There are blocks of zeros that take space.
    is_worth_it: bool,
    /// There is anything but zeros.
    has_data: bool,
}

/// Beside the guest, who may change it meanwhile.
fn look_for_zeros<D: Disk>(
    engine: &Engine<D>,
    file: FileId,
    range: Range<u64>,
) -> Result<Looked, JobError> {
    let mut looked = Looked {
        bytes: 0,
        is_worth_it: false,
        has_data: false,
    };
    let failed = |error: std::io::Error| {
        let errno = rustix::io::Errno::from_io_error(&error);
        EngineError::Io(errno.unwrap_or(rustix::io::Errno::IO))
    };
    let mut buffer = AlignedBuf::new(4096);
    let mut at = range.start;
    while at < range.end {
        let data = engine.disk().next_data(file, at).map_err(failed)?;
        let Some(data) = data.filter(|data| data.start < range.end) else {
            break;
        };
        let (start, end) = (data.start.max(at), data.end.min(range.end));
        let end = end.min(start + CHUNK);
        buffer.resize((end - start) as usize, 0);
        match engine.disk().read_exact_at(file, &mut buffer, start) {
            Ok(()) => {}
            // The end of the file was cut off meanwhile: it is another cluster's by now.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(failed(error).into()),
        }
        looked.bytes += end - start;
        looked.is_worth_it |= !zero_blocks(&buffer, start).is_empty();
        looked.has_data |= !is_zero(&buffer);
        at = end;
    }
    Ok(looked)
}

#[cfg(all(test, not(ploop_loom)))]
mod tests;
