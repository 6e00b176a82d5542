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

/// Clusters that are found at once.
const FOUND_AT_ONCE: usize = 1 << 16;

/// How often it is looked what lies behind gaps: while the guest writes there are always
/// others.
const PASSES: u32 = 4;

/// See the module's text.
pub struct Compaction {
    stage: Stage,
    progress: Progress,
}

enum Stage {
    Begin,
    Zeros {
        next: u32,
    },
    Cut {
        passes: u32,
    },
    Find {
        passes: u32,
        found: usize,
    },
    Move {
        passes: u32,
        packing: Packing,
        found: usize,
        todo: VecDeque<GuestCluster>,
    },
}

impl Compaction {
    /// One that has not begun.
    pub fn new() -> Self {
        Self {
            stage: Stage::Begin,
            progress: Progress::default(),
        }
    }

    fn try_step<D: Disk>(&mut self, engine: &Engine<D>) -> Result<Step, JobError> {
        match &mut self.stage {
            Stage::Begin => {
                // Clusters of a disk that is not known yet may be a guest's all the same.
                engine.open_for_growth()?;
                let mapped = u64::from(engine.mapped_in_top());
                self.progress.total = mapped * engine.geometry().cluster.bytes();
                self.stage = Stage::Zeros { next: 0 };
                Ok(Step::More { bytes: 0 })
            }
            Stage::Zeros { next } => {
                let read = squeeze_some(engine, next, &mut self.progress)?;
                if *next >= engine.geometry().entries {
                    self.progress.done = self.progress.total.max(self.progress.done);
                    self.progress.total = self.progress.done;
                    if engine.is_raw() {
                        return Ok(Step::Done);
                    }
                    self.stage = Stage::Cut { passes: 0 };
                }
                Ok(Step::More { bytes: read })
            }
            Stage::Cut { passes } => {
                engine.wait_unless_held(&engine.cut_tail())?;
                let passes = *passes;
                self.stage = Stage::Find {
                    passes,
                    found: usize::MAX,
                };
                match passes > 0 {
                    true => Ok(Step::Done),
                    false => Ok(Step::More { bytes: 0 }),
                }
            }
            Stage::Find { passes, found } => {
                let packing = engine.packing();
                let todo = engine.behind(packing, FOUND_AT_ONCE);
                let has_got_on = todo.len() < *found;
                let passes = *passes + 1;
                self.stage = match todo.is_empty() || !has_got_on || passes > PASSES {
                    true => Stage::Cut { passes },
                    false => Stage::Move {
                        passes,
                        packing,
                        found: todo.len(),
                        todo: todo.into(),
                    },
                };
                if let Stage::Move { found, .. } = &self.stage {
                    let bytes = *found as u64 * engine.geometry().cluster.bytes();
                    self.progress.total = self.progress.done + bytes;
                }
                Ok(Step::More { bytes: 0 })
            }
            Stage::Move {
                passes,
                packing,
                found,
                todo,
            } => {
                let cluster = engine.geometry().cluster.bytes();
                let count = (MOVED_BYTES / cluster).max(1) as usize;
                let batch: Vec<_> = todo.iter().copied().take(count).collect();
                let bytes = batch.len() as u64 * cluster;
                if !batch.is_empty() {
                    engine.wait_unless_held(&engine.move_down(batch, *packing))?;
                }
                todo.drain(..count.min(todo.len()));
                self.progress.done += bytes;
                if todo.is_empty() {
                    self.stage = Stage::Find {
                        passes: *passes,
                        found: *found,
                    };
                }
                Ok(Step::More { bytes })
            }
        }
    }
}

impl Default for Compaction {
    fn default() -> Self {
        Self::new()
    }
}

impl<D: Disk> Job<D> for Compaction {
    fn step(&mut self, site: &mut Site<'_, D>) -> Result<Step, JobError> {
        if site.engine.is_suspended() {
            return Ok(Step::Later);
        }
        match self.try_step(site.engine) {
            Err(JobError::Engine(EngineError::NoSpace)) => Ok(Step::HostFull),
            // Somebody else is at it, or has had to end it.
            Err(JobError::Engine(
                EngineError::Suspended | EngineError::Growing | EngineError::Stopped,
            )) if !site.engine.has_lost_lock() => Ok(Step::Later),
            step => step,
        }
    }

    fn progress(&self) -> Progress {
        self.progress
    }

    // Whatever a step has under way it waits for.
    fn cancel(&mut self, _: &mut Site<'_, D>) {}
}

/// Looks for zeros for a while, from cluster `next` on, and gives them back. How many bytes
/// were read for that.
fn squeeze_some<D: Disk>(
    engine: &Engine<D>,
    next: &mut u32,
    progress: &mut Progress,
) -> Result<u64, JobError> {
    let geometry = engine.geometry();
    let cluster = geometry.cluster.bytes();
    let until = Instant::now() + STEP;
    let mut bytes = 0;
    let mut locked: Vec<Outcome> = Vec::new();
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
        progress.done += cluster;
        let look = look_for_zeros(engine, file, start..start + cluster)?;
        bytes += look.bytes;
        if look.is_worth_it || (!look.has_data && engine.can_unmap_zeros()) {
            locked.push(engine.squeeze(guest));
        }
        if Instant::now() >= until {
            break;
        }
    }
    for outcome in locked {
        engine.wait_unless_held(&outcome)?;
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
