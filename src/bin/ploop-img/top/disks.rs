//! The disks that are shown: in which order, which of them is selected, and what they have
//! done in the last minutes.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use super::watch::{News, What};
use crate::sample::Report;

/// How many intervals are remembered.
const REMEMBERED: usize = 300;

/// What is shown of a disk, and can be sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Column {
    /// Its file
    Disk,
    /// Reads a second
    Reads,
    /// Bytes read a second
    ReadBytes,
    /// Writes a second
    Writes,
    /// Bytes written a second
    WrittenBytes,
    /// The time that 99 of 100 reads and writes took at most
    P99,
    /// How many requests were under way on average
    Depth,
    /// Bytes read and written a second
    Bytes,
    /// What the image takes on the host
    Size,
    /// Pages of the block allocation table that are to be written
    Dirty,
    /// Whether it runs
    Status,
}

impl Column {
    pub const ALL: [Self; 11] = [
        Self::Disk,
        Self::Reads,
        Self::ReadBytes,
        Self::Writes,
        Self::WrittenBytes,
        Self::P99,
        Self::Depth,
        Self::Bytes,
        Self::Size,
        Self::Dirty,
        Self::Status,
    ];

    /// So many columns further on.
    pub fn next(self, by: isize) -> Self {
        let at = Self::ALL.iter().position(|column| *column == self);
        let at = at.unwrap_or_default() as isize + by;
        Self::ALL[at.rem_euclid(Self::ALL.len() as isize) as usize]
    }

    /// Names from A to Z, numbers from the highest on.
    fn compare(self, a: &Report, b: &Report) -> Ordering {
        match self {
            Self::Disk => a.file.cmp(&b.file),
            Self::Status => a.status.cmp(&b.status),
            _ => self.value(b).total_cmp(&self.value(a)),
        }
    }

    fn value(self, report: &Report) -> f64 {
        match self {
            Self::Disk | Self::Status => 0.0,
            Self::Reads => report.reads.operations_per_second,
            Self::ReadBytes => report.reads.bytes_per_second,
            Self::Writes => report.writes.operations_per_second,
            Self::WrittenBytes => report.writes.bytes_per_second,
            Self::P99 => report.p99_ns.unwrap_or_default() as f64,
            Self::Depth => report.queue_depth,
            Self::Bytes => report.reads.bytes_per_second + report.writes.bytes_per_second,
            Self::Size => report.actual_size as f64,
            Self::Dirty => report.dirty_pages as f64,
        }
    }
}

/// In which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    pub by: Column,
    pub is_reversed: bool,
}

impl Order {
    pub fn sort(self, disks: &mut [Disk]) {
        disks.sort_by(|a, b| {
            let ordering = self.by.compare(&a.report, &b.report);
            let ordering = if self.is_reversed {
                ordering.reverse()
            } else {
                ordering
            };
            // Those that are alike shall not change places.
            let name = |disk: &Disk| (disk.report.file.clone(), disk.socket.clone());
            ordering.then_with(|| name(a).cmp(&name(b)))
        });
    }
}

/// One disk.
#[derive(Debug)]
pub struct Disk {
    /// Where its process listens.
    pub socket: PathBuf,
    /// What it has done last.
    pub report: Report,
    heard_at: Instant,
    is_silent: bool,
    history: VecDeque<Moment>,
}

/// What is remembered of an interval.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub p99_ns: u64,
}

impl Moment {
    pub fn bytes(&self) -> u64 {
        self.read_bytes + self.written_bytes
    }
}

impl Disk {
    pub fn new(socket: PathBuf, now: Instant) -> Self {
        Self {
            socket,
            report: Report::default(),
            heard_at: now,
            is_silent: false,
            history: VecDeque::new(),
        }
    }

    pub fn hear(&mut self, report: Report, now: Instant) {
        let whole = |rate: f64| rate.round() as u64;
        let moment = Moment {
            read_bytes: whole(report.reads.bytes_per_second),
            written_bytes: whole(report.writes.bytes_per_second),
            p99_ns: report.p99_ns.unwrap_or_default(),
        };
        self.history.truncate(REMEMBERED - 1);
        self.history.push_front(moment);
        self.report = report;
        self.heard_at = now;
        self.is_silent = false;
    }

    /// Whether its process has not answered for longer than it should take.
    pub fn is_silent(&self, now: Instant, pause: Duration) -> bool {
        let late = pause * 2 + Duration::from_secs(2);
        self.is_silent || now.saturating_duration_since(self.heard_at) > late
    }

    /// The last intervals, the latest first.
    pub fn history(&self) -> impl Iterator<Item = &Moment> {
        self.history.iter()
    }
}

/// All disks.
#[derive(Debug)]
pub struct Disks {
    disks: Vec<Disk>,
    order: Order,
    /// By its socket: it stays the same wherever it goes in the list.
    selected: Option<PathBuf>,
}

impl Disks {
    pub fn new(order: Order) -> Self {
        Self {
            disks: Vec::new(),
            order,
            selected: None,
        }
    }

    pub fn all(&self) -> &[Disk] {
        &self.disks
    }

    pub fn order(&self) -> Order {
        self.order
    }

    pub fn set_order(&mut self, order: Order) {
        self.order = order;
        order.sort(&mut self.disks);
    }

    pub fn hear(&mut self, News { socket, what }: News, now: Instant) {
        let at = self.disks.iter().position(|disk| disk.socket == socket);
        match what {
            What::Gone => {
                let Some(at) = at else {
                    return;
                };
                let is_selected = self.selected_index() == Some(at);
                self.disks.remove(at);
                if is_selected {
                    self.select(at);
                }
            }
            What::Silent => {
                // One that has never answered may be anything.
                if let Some(at) = at {
                    self.disks[at].is_silent = true;
                }
            }
            What::Did(report) => {
                let at = at.unwrap_or_else(|| {
                    self.disks.push(Disk::new(socket, now));
                    self.disks.len() - 1
                });
                self.disks[at].hear(*report, now);
                self.order.sort(&mut self.disks);
            }
        }
    }

    /// The selected one; the first if none was.
    pub fn selected_index(&self) -> Option<usize> {
        if self.disks.is_empty() {
            return None;
        }
        let selected = self.selected.as_ref();
        let at = selected.and_then(|it| self.disks.iter().position(|disk| disk.socket == *it));
        Some(at.unwrap_or_default())
    }

    pub fn selected(&self) -> Option<&Disk> {
        self.selected_index().map(|at| &self.disks[at])
    }

    /// Selects this one, or the last.
    pub fn select(&mut self, at: usize) {
        let last = self.disks.len().checked_sub(1);
        let at = last.map(|last| at.min(last));
        self.selected = at.map(|at| self.disks[at].socket.clone());
    }

    /// Selects the one so many lines below.
    pub fn move_selection(&mut self, by: isize) {
        let at = self.selected_index().unwrap_or_default();
        self.select(at.saturating_add_signed(by));
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::sample::tests::sample;

    pub const DEPTH: Order = Order {
        by: Column::Depth,
        is_reversed: false,
    };

    /// A disk has read so much in a second.
    pub fn did(name: &str, reads: u64) -> News {
        let file = format!("/vz/{name}/root.hds");
        let report = Report::of(&sample(&file, 1, 0), &sample(&file, 2, reads));
        News {
            socket: name.into(),
            what: What::Did(Box::new(report)),
        }
    }

    fn names(disks: &Disks) -> Vec<&str> {
        let names = disks.all().iter();
        names.map(|disk| disk.socket.to_str().unwrap()).collect()
    }

    #[test]
    fn disks_are_sorted_and_the_selection_goes_with_its_disk() {
        let now = Instant::now();
        let mut disks = Disks::new(DEPTH);
        assert_eq!(disks.selected_index(), None);
        disks.move_selection(1);
        for (name, reads) in [("b", 10), ("c", 900), ("a", 10)] {
            disks.hear(did(name, reads), now);
        }
        assert_eq!(names(&disks), ["c", "a", "b"]);
        assert_eq!(disks.selected_index(), Some(0));
        disks.move_selection(1);
        assert_eq!(disks.selected().unwrap().socket.to_str(), Some("a"));
        disks.hear(did("a", 9000), now);
        assert_eq!(
            (names(&disks), disks.selected_index()),
            (vec!["a", "c", "b"], Some(0))
        );
        disks.set_order(Order {
            by: Column::Disk,
            is_reversed: true,
        });
        assert_eq!(
            (names(&disks), disks.selected_index()),
            (vec!["c", "b", "a"], Some(2))
        );
        let gone = |name: &str| News {
            socket: name.into(),
            what: What::Gone,
        };
        disks.hear(gone("a"), now);
        disks.hear(gone("a"), now);
        assert_eq!(
            (names(&disks), disks.selected_index()),
            (vec!["c", "b"], Some(1))
        );
        disks.move_selection(-5);
        assert_eq!(disks.selected_index(), Some(0));
        disks.hear(gone("c"), now);
        disks.hear(gone("b"), now);
        assert_eq!(disks.selected_index(), None);
    }

    #[test]
    fn a_disk_that_does_not_answer_is_known_to_be_silent() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut disks = Disks::new(DEPTH);
        let silent = |name: &str| News {
            socket: name.into(),
            what: What::Silent,
        };
        disks.hear(silent("a"), now);
        assert!(disks.all().is_empty(), "it may be none");
        disks.hear(did("a", 1), now);
        assert!(!disks.all()[0].is_silent(now + second, second));
        assert!(disks.all()[0].is_silent(now + 10 * second, second));
        disks.hear(silent("a"), now);
        assert!(disks.all()[0].is_silent(now, second));
        for _ in 0..2 * REMEMBERED {
            disks.hear(did("a", 7), now);
        }
        assert!(!disks.all()[0].is_silent(now, second));
        assert_eq!(disks.all()[0].history().count(), REMEMBERED);
        assert_eq!(disks.all()[0].history().next().unwrap().bytes(), 7 * 4096);
    }

    #[test]
    fn columns_follow_each_other() {
        assert_eq!(Column::Disk.next(1), Column::Reads);
        assert_eq!(Column::Disk.next(-1), Column::Status);
        assert_eq!(Column::Status.next(1), Column::Disk);
    }
}
