//! What a guest knows of its requests, and what its disk may hold after a power cut.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::dm::Device;
use crate::model::Model;
use crate::survivors::{Event, Survivors};

/// A line of the journal.
#[derive(Serialize, Deserialize)]
enum Line {
    /// Something has happened to the sectors of a lane.
    Event(usize, Event),
    /// A mark with this number was put into the log of the device's writes.
    Mark(u64),
}

/// Kept by the guest while it runs. All that is in the log before a mark was written
/// when the mark's line was, and all that the lines before it call flushed is in the log
/// before the mark.
pub struct Journal {
    device: Device,
    lines: Vec<Line>,
    marks: u64,
}

impl Journal {
    pub fn new(device: Device) -> Self {
        Self {
            device,
            lines: Vec::new(),
            marks: 0,
        }
    }

    pub fn mark(&mut self) {
        self.marks += 1;
        self.device.mark(&self.marks.to_string());
        self.lines.push(Line::Mark(self.marks));
    }

    /// Hears of all that happens to the sectors of a lane.
    pub fn follow(journal: &Arc<Mutex<Self>>, lane: usize, model: &mut Model) {
        let journal = Arc::clone(journal);
        model.set_witness(Box::new(move |event| {
            let mut journal = journal.lock().unwrap();
            let is_stable = matches!(event, Event::FlushEnds(_));
            journal.lines.push(Line::Event(lane, event));
            if is_stable {
                journal.mark();
            }
        }));
    }

    /// Ends the device, and with it the journal. As text, for [`Truth::new`].
    pub fn finish(&self) -> Vec<u8> {
        self.device.remove();
        serde_json::to_vec(&self.lines).unwrap()
    }
}

/// What the sectors may hold after power cuts, one later than the other.
pub struct Truth {
    lines: Vec<Line>,
    /// Of each mark, its line.
    marks: Vec<usize>,
    survivors: Survivors,
    /// Lines of which all is known to `survivors`.
    done: usize,
    /// Lines of which it knows the changes that start.
    started: usize,
    /// By lane and number: the sectors, and the number in `survivors`.
    changes: HashMap<(usize, u64), (Range<u64>, u64)>,
    /// The same: what a flush covers, of all lanes.
    flushes: HashMap<(usize, u64), u64>,
}

impl Truth {
    /// Of a disk that was empty when the journal began.
    pub fn new(journal: &[u8], sectors: u64) -> Self {
        let lines: Vec<Line> = serde_json::from_slice(journal).unwrap();
        let marks = (0..lines.len()).filter(|&at| matches!(lines[at], Line::Mark(_)));
        Self {
            marks: marks.collect(),
            lines,
            survivors: Survivors::new(sectors),
            done: 0,
            started: 0,
            changes: HashMap::new(),
            flushes: HashMap::new(),
        }
    }

    /// How many marks there are.
    pub fn marks(&self) -> usize {
        self.marks.len()
    }

    /// The power was cut when the log had so many of the marks, not fewer than the last
    /// time: what the lines before the last of them call flushed is there, and what the
    /// lines before the next one start may be.
    pub fn advance(&mut self, marks: usize) {
        let last = self.marks[marks - 1];
        while self.done <= last {
            self.start(self.done);
            self.end(self.done);
            self.done += 1;
        }
        let next = self.marks.get(marks).copied();
        let next = next.unwrap_or(self.lines.len());
        (self.started..next).for_each(|at| self.start(at));
    }

    fn start(&mut self, at: usize) {
        if at < self.started {
            return;
        }
        self.started = at + 1;
        if let Line::Event(
            lane,
            Event::ChangeStarts {
                change,
                sectors,
                version,
            },
        ) = &self.lines[at]
        {
            let number = self.survivors.change_starts(sectors.clone(), *version);
            self.changes
                .insert((*lane, *change), (sectors.clone(), number));
        }
    }

    fn end(&mut self, at: usize) {
        let Line::Event(lane, event) = &self.lines[at] else {
            return;
        };
        match event {
            Event::ChangeStarts { .. } => {}
            Event::ChangeEnds(change) => {
                let (sectors, number) = self.changes.remove(&(*lane, *change)).unwrap();
                self.survivors.change_ends(sectors, number);
            }
            // Of flushes with one number the first covers least.
            Event::FlushStarts(number) => {
                let covered = self.survivors.flush_starts();
                self.flushes.entry((*lane, *number)).or_insert(covered);
            }
            Event::FlushEnds(number) => self.survivors.flush_ends(self.flushes[&(*lane, *number)]),
        }
    }

    /// The versions of which a sector holds one.
    pub fn of(&self, sector: usize) -> SmallVec<[u32; 3]> {
        self.survivors.of(sector)
    }
}
