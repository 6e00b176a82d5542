//! What each sector of the guest's disk may read.
//!
//! A sector has candidates: the changes that may be the last one to it. A change
//! is ruled out by another that began after it had ended. For a reader that
//! other change must have ended before the read began; for a power cut it must
//! also be durable: it ended well before a flush began that succeeded, or it was
//! a write-through one (I3, I4). Changes that overlap in time rule each other out
//! in neither order. Nothing else may ever be read (I5).
//!
//! A change that failed may have been done, in any part, or not. So may a
//! discard of less than a whole cluster: virtio leaves it open. Such a change
//! adds a candidate and rules none out.

use std::ops::Range;

use smallvec::SmallVec;

use super::pattern::Value;

/// The name of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangeId(u32);

/// A moment; each call of the model is one.
type Moment = u64;

const NEVER: Moment = Moment::MAX;

#[derive(Debug)]
struct Change {
    began: Moment,
    /// When its client heard of its end.
    ended: Moment,
    /// It ended well.
    good: bool,
    durable: bool,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    change: ChangeId,
    value: Value,
    /// If it ended well, it was done.
    certain: bool,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    candidates: SmallVec<[Candidate; 2]>,
    last_began: Moment,
}

/// A read under way.
#[derive(Debug)]
pub struct Read {
    began: Moment,
    range: Range<u64>,
    /// For each sector, what it could have read had nothing begun since.
    allowed: Vec<SmallVec<[Value; 2]>>,
}

/// A flush, or the turning on of write-through, under way.
#[derive(Debug)]
pub struct Flush {
    began: Moment,
}

/// A sector that reads what it must not.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Which.
    pub sector: u64,
    /// What it reads; `None`: nothing that was ever written there.
    pub found: Option<Value>,
    /// What it may read.
    pub allowed: Vec<Value>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Model {
    sectors: Vec<Sector>,
    changes: Vec<Change>,
    now: Moment,
}

impl Model {
    /// A disk of so many sectors, all zero and stable.
    pub fn new(sectors: u64) -> Self {
        let mut model = Self {
            sectors: vec![Sector::default(); sectors as usize],
            changes: Vec::new(),
            now: 0,
        };
        model.rebase(&|_| Value::ZEROS);
        model
    }

    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// Forgets what may be: this is what is, and it is stable.
    pub fn rebase(&mut self, value: &dyn Fn(u64) -> Value) {
        self.changes.clear();
        self.changes.push(Change {
            began: 0,
            ended: 0,
            good: true,
            durable: true,
        });
        self.now = 0;
        for (number, sector) in (0..).zip(&mut self.sectors) {
            sector.last_began = 0;
            sector.candidates.clear();
            sector.candidates.push(Candidate {
                change: ChangeId(0),
                value: value(number),
                certain: true,
            });
        }
    }

    /// A request that will change sectors begins. Follow up with
    /// [`Self::touch`] for each of its ranges.
    pub fn begin(&mut self) -> ChangeId {
        let began = self.tick();
        self.changes.push(Change {
            began,
            ended: NEVER,
            good: false,
            durable: false,
        });
        ChangeId(self.changes.len() as u32 - 1)
    }

    /// The change gives these sectors this value; `certain` as in the module's
    /// text.
    pub fn touch(&mut self, change: ChangeId, range: Range<u64>, value: Value, certain: bool) {
        let began = self.changes[change.0 as usize].began;
        for sector in &mut self.sectors[range.start as usize..range.end as usize] {
            sector.last_began = began;
            sector.candidates.push(Candidate {
                change,
                value,
                certain,
            });
        }
    }

    /// The change has ended; `durable` if it did so in write-through mode, which
    /// had been on when it began.
    pub fn end(&mut self, change: ChangeId, good: bool, durable: bool) {
        let ended = self.tick();
        let change = &mut self.changes[change.0 as usize];
        change.ended = ended;
        change.good = good;
        change.durable = good && durable;
        if change.durable {
            self.prune();
        }
    }

    /// Who asked for anything is gone, and who did it: this is what the host has, stable
    /// or not.
    pub fn inherit(&mut self, value: &dyn Fn(u64) -> Value) {
        let ended = self.tick();
        for change in &mut self.changes {
            change.ended = change.ended.min(ended);
        }
        let found = self.begin();
        for (number, sector) in (0..).zip(&mut self.sectors) {
            sector.candidates.push(Candidate {
                change: found,
                value: value(number),
                certain: true,
            });
        }
        self.end(found, true, false);
    }

    /// A flush begins.
    pub fn begin_flush(&mut self) -> Flush {
        Flush { began: self.tick() }
    }

    /// A flush has ended well.
    pub fn end_flush(&mut self, flush: &Flush) {
        for change in &mut self.changes {
            change.durable |= change.good && change.ended < flush.began;
        }
        self.prune();
    }

    fn prune(&mut self) {
        let changes = &self.changes;
        for sector in &mut self.sectors {
            if sector.candidates.len() > 1 {
                let durable = |change: &Change| change.durable;
                let latest = latest_beginning(changes, &sector.candidates, durable);
                sector
                    .candidates
                    .retain(|candidate| changes[candidate.change.0 as usize].ended >= latest);
            }
        }
    }

    /// A read begins.
    pub fn begin_read(&mut self, range: Range<u64>) -> Read {
        let began = self.tick();
        let sectors = &self.sectors[range.start as usize..range.end as usize];
        let allowed = sectors.iter().map(|sector| {
            let ended = |change: &Change| change.good;
            let latest = latest_beginning(&self.changes, &sector.candidates, ended);
            let candidates = sector.candidates.iter();
            candidates
                .filter(|candidate| self.changes[candidate.change.0 as usize].ended >= latest)
                .map(|candidate| candidate.value)
                .collect()
        });
        Read {
            began,
            allowed: allowed.collect(),
            range,
        }
    }

    /// A read has ended well, with these values.
    ///
    /// # Errors
    /// The first sector that it must not have read so. A sector that changed
    /// while the read was under way is not judged, unless it reads something
    /// that was never written there.
    pub fn end_read(
        &self,
        read: &Read,
        found: impl Fn(u64) -> Option<Value>,
    ) -> Result<(), Box<Wrong>> {
        for (sector, allowed) in read.range.clone().zip(&read.allowed) {
            let found = found(sector);
            let changed = self.sectors[sector as usize].last_began > read.began;
            if !found.is_some_and(|value| changed || allowed.contains(&value)) {
                return Err(Box::new(Wrong {
                    sector,
                    found,
                    allowed: allowed.to_vec(),
                }));
            }
        }
        Ok(())
    }

    /// Judges a sector after a power cut.
    ///
    /// # Errors
    /// If it reads what it must not.
    pub fn check_after_cut(&self, sector: u64, found: Option<Value>) -> Result<(), Box<Wrong>> {
        let candidates = &self.sectors[sector as usize].candidates;
        let mut allowed = candidates.iter().map(|candidate| candidate.value);
        if found.is_some_and(|found| allowed.clone().any(|value| value == found)) {
            return Ok(());
        }
        Err(Box::new(Wrong {
            sector,
            found,
            allowed: allowed.by_ref().collect(),
        }))
    }

    /// How many sectors may read one of several values after a cut.
    pub fn undecided(&self) -> usize {
        let sectors = self.sectors.iter();
        sectors.filter(|sector| sector.candidates.len() > 1).count()
    }
}

/// The latest beginning of a certain candidate that `rules_out` others: what
/// ended before it is ruled out.
fn latest_beginning(
    changes: &[Change],
    candidates: &[Candidate],
    rules_out: impl Fn(&Change) -> bool,
) -> Moment {
    let certain = candidates.iter().filter(|candidate| candidate.certain);
    certain
        .map(|candidate| &changes[candidate.change.0 as usize])
        .filter(|change| rules_out(change))
        .map(|change| change.began)
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Value = Value(1);
    const NEW: Value = Value(2);

    fn write(model: &mut Model, value: Value) -> ChangeId {
        let change = model.begin();
        model.touch(change, 0..1, value, true);
        change
    }

    fn cut_may_leave(model: &Model, value: Value) -> bool {
        model.check_after_cut(0, Some(value)).is_ok()
    }

    #[test]
    fn a_flush_makes_what_ended_before_it_certain() {
        let mut model = Model::new(1);
        let old = write(&mut model, OLD);
        assert!(cut_may_leave(&model, Value::ZEROS) && cut_may_leave(&model, OLD));
        let early = model.begin_flush();
        model.end(old, true, false);
        model.end_flush(&early);
        assert!(cut_may_leave(&model, Value::ZEROS), "it ended too late");
        let flush = model.begin_flush();
        let new = write(&mut model, NEW);
        model.end(new, true, false);
        model.end_flush(&flush);
        assert!(!cut_may_leave(&model, Value::ZEROS));
        assert!(cut_may_leave(&model, OLD) && cut_may_leave(&model, NEW));
        assert!(model.check_after_cut(0, None).is_err());
    }

    #[test]
    fn a_write_through_write_is_certain_when_it_ends() {
        let mut model = Model::new(1);
        let old = write(&mut model, OLD);
        model.end(old, true, true);
        assert!(!cut_may_leave(&model, Value::ZEROS) && cut_may_leave(&model, OLD));
    }

    #[test]
    fn changes_at_the_same_time_do_not_rule_each_other_out() {
        let mut model = Model::new(1);
        let old = write(&mut model, OLD);
        let new = write(&mut model, NEW);
        model.end(new, true, false);
        model.end(old, true, false);
        let flush = model.begin_flush();
        model.end_flush(&flush);
        assert!(cut_may_leave(&model, OLD) && cut_may_leave(&model, NEW));
        let read = model.begin_read(0..1);
        assert!(model.end_read(&read, |_| Some(OLD)).is_ok());
        assert!(model.end_read(&read, |_| Some(NEW)).is_ok());
        assert!(model.end_read(&read, |_| Some(Value::ZEROS)).is_err());
    }

    #[test]
    fn what_a_host_has_kept_is_read_and_is_stable_after_a_flush() {
        let mut model = Model::new(1);
        let old = write(&mut model, OLD);
        model.end(old, true, false);
        write(&mut model, NEW);
        model.inherit(&|_| OLD);
        let read = model.begin_read(0..1);
        assert!(model.end_read(&read, |_| Some(OLD)).is_ok());
        assert!(model.end_read(&read, |_| Some(NEW)).is_err());
        assert!(cut_may_leave(&model, Value::ZEROS) && cut_may_leave(&model, NEW));
        let flush = model.begin_flush();
        model.end_flush(&flush);
        assert!(cut_may_leave(&model, OLD));
        assert!(!cut_may_leave(&model, Value::ZEROS) && !cut_may_leave(&model, NEW));
    }

    #[test]
    fn what_failed_or_is_left_open_may_be_or_not() {
        let mut model = Model::new(1);
        let old = write(&mut model, OLD);
        model.end(old, true, true);
        let new = write(&mut model, NEW);
        model.end(new, false, true);
        let discard = model.begin();
        model.touch(discard, 0..1, Value::ZEROS, false);
        model.end(discard, true, true);
        let flush = model.begin_flush();
        model.end_flush(&flush);
        for value in [OLD, NEW, Value::ZEROS] {
            assert!(cut_may_leave(&model, value));
        }
    }

    #[test]
    fn a_read_sees_the_last_change_that_ended_before_it() {
        let mut model = Model::new(1);
        let old = write(&mut model, OLD);
        model.end(old, true, false);
        let new = write(&mut model, NEW);
        let read = model.begin_read(0..1);
        assert!(model.end_read(&read, |_| Some(OLD)).is_ok());
        assert!(model.end_read(&read, |_| Some(Value::ZEROS)).is_err());
        model.end(new, true, false);
        let read = model.begin_read(0..1);
        assert!(model.end_read(&read, |_| Some(NEW)).is_ok());
        assert!(model.end_read(&read, |_| Some(OLD)).is_err());
        write(&mut model, OLD);
        assert!(model.end_read(&read, |_| Some(OLD)).is_ok(), "not judged");
    }
}
