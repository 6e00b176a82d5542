//! Jobs as QMP has them: long work with a name, that can be watched, paused, slowed down and
//! cancelled.
//!
//! One runs at a time; those that are over stay until they are dismissed, if their client
//! wanted that. When there are many, the oldest of clients that are gone make room. Who runs one and who is asked about it meet in its [`Reins`]. Knows what QMP
//! says of jobs (`qapi/job.json`); must not know what one is about, nor how it is run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use super::qmp::{ClientId, Event};
use crate::served::job::Progress;

/// Jobs that are over and not dismissed, at most: no client can fill the memory with them.
const MAX_CONCLUDED: usize = 16;

/// What of its rate a guest keeps at least beside a job unless somebody says otherwise, in
/// percent.
pub(super) const GUEST_SHARE: u8 = 70;

/// What QMP calls the status of a job, as far as there is such a one here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Created,
    Running,
    Paused,
    /// It has done its work; there are no others to wait for.
    Waiting,
    /// It has been committed; whoever would still have to agree has.
    Pending,
    Aborting,
    Concluded,
    /// It is about to be forgotten.
    Null,
}

impl Status {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    const fn is_under_way(self) -> bool {
        matches!(self, Self::Created | Self::Running | Self::Paused)
    }

    const fn accepts(self, verb: Verb) -> bool {
        match verb {
            Verb::Cancel | Verb::Pause | Verb::Resume | Verb::SetSpeed(_) => self.is_under_way(),
            // No job here waits to be told that it may end.
            Verb::Complete | Verb::Finalize => false,
            Verb::Dismiss => matches!(self, Self::Concluded),
        }
    }
}

/// What clients can do with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Goes no further until it is resumed.
    Pause,
    /// Goes on.
    Resume,
    /// Ends, and leaves the disk as it was or better.
    Cancel,
    /// Of jobs that go on until they are told to end, of which there are none here.
    Complete,
    /// Of jobs that are to be committed by hand, likewise.
    Finalize,
    /// Is forgotten.
    Dismiss,
    /// Bytes a second at most; 0 is no limit.
    SetSpeed(i64),
}

impl Verb {
    const fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Cancel => "cancel",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::SetSpeed(_) => "set-speed",
        }
    }
}

/// How a job is to be called, and run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Its name; no other may have it.
    pub id: String,
    /// Bytes a second at most; 0 is no limit.
    pub speed: u64,
    /// What of its rate the guest keeps at least, in percent.
    pub guest_share: u8,
    /// It is forgotten as soon as it is over.
    pub auto_dismiss: bool,
}

impl Terms {
    /// Of one that its client does not know as a job. Others can see and stop it, by a name that
    /// nobody can ask for: those that QEMU makes up begin so.
    pub(super) fn unnamed(kind: &str) -> Self {
        Self {
            id: format!("#{kind}"),
            speed: 0,
            guest_share: GUEST_SHARE,
            auto_dismiss: true,
        }
    }
}

/// By which a job is held: shared by who runs it and who is asked about it.
#[derive(Debug)]
pub(super) struct Reins(Mutex<Held>);

/// What is wanted of a job, and what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub is_cancelled: bool,
    /// Its first step was begun.
    pub has_begun: bool,
    pub wants_pause: bool,
    pub speed: u64,
    pub guest_share: u8,
    pub progress: Progress,
    /// It rests because somebody wants it to.
    pub is_paused: bool,
    /// It waits for space.
    pub is_host_full: bool,
}

impl Reins {
    /// Of a job that is about to begin.
    pub fn new(terms: &Terms) -> Self {
        Self(Mutex::new(Held {
            is_cancelled: false,
            has_begun: false,
            wants_pause: false,
            speed: terms.speed,
            guest_share: terms.guest_share,
            progress: Progress::default(),
            is_paused: false,
            is_host_full: false,
        }))
    }

    /// As it is now.
    pub fn held(&self) -> Held {
        *self.lock()
    }

    /// It shall end. `true` if it has not begun, and never will.
    pub fn cancel(&self) -> bool {
        let mut held = self.lock();
        held.is_cancelled = true;
        !held.has_begun
    }

    /// A step is about to begin, unless [`Held::is_cancelled`] or [`Held::wants_pause`] says
    /// otherwise.
    pub fn begin_step(&self) -> Held {
        let mut held = self.lock();
        held.has_begun |= !held.is_cancelled && !held.wants_pause;
        *held
    }

    /// Who runs it tells how it goes. `true` if its status is another by that.
    pub fn tell(&self, progress: Progress, is_paused: bool, is_host_full: bool) -> bool {
        let mut held = self.lock();
        held.progress = progress;
        held.is_host_full = is_host_full;
        std::mem::replace(&mut held.is_paused, is_paused) != is_paused
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a job has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Well,
    Cancelled,
    /// Why, in words.
    Failed(String),
}

/// One that there is.
#[derive(Debug)]
struct Record {
    id: String,
    /// Who has begun it.
    client: ClientId,
    /// As QMP calls it.
    kind: &'static str,
    status: Status,
    reins: Arc<Reins>,
    auto_dismiss: bool,
    error: Option<String>,
}

/// All that there are, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Jobs(Vec<Record>);

impl Jobs {
    /// Whether one can be made; else why not, as QEMU says it. Of clients that are not there
    /// any more none is in its way.
    pub fn check(&self, terms: &Terms, is_there: impl Fn(ClientId) -> bool) -> Result<(), String> {
        if !is_well_formed(&terms.id) {
            return Err(format!("Invalid job ID '{}'", terms.id));
        }
        let of_name = self.0.iter().find(|job| job.id == terms.id);
        if of_name.is_some_and(|job| !job.is_forsaken(&is_there)) {
            return Err(format!("Job ID '{}' already in use", terms.id));
        }
        if self.0.len() >= MAX_CONCLUDED && self.forsaken(is_there).is_none() {
            return Err(format!(
                "There are {MAX_CONCLUDED} jobs that nobody has dismissed"
            ));
        }
        Ok(())
    }

    /// The oldest that is over and that nobody will dismiss, most likely: the next client can
    /// do so, but has not begun it.
    fn forsaken(&self, is_there: impl Fn(ClientId) -> bool) -> Option<usize> {
        self.0.iter().position(|job| job.is_forsaken(&is_there))
    }

    /// Forgets one that has the same name, or the oldest where there is no room for another.
    /// It can be done without: see [`Self::check`].
    pub fn make_room(
        &mut self,
        terms: &Terms,
        is_there: impl Fn(ClientId) -> bool,
    ) -> Option<Event> {
        let of_name = self.0.iter().position(|job| job.id == terms.id);
        let at = match of_name {
            Some(at) => at,
            None if self.0.len() < MAX_CONCLUDED => return None,
            None => self.forsaken(is_there)?,
        };
        Some(self.0.remove(at).turn(Status::Null))
    }

    /// There is one more, held by these reins, which runs from now on.
    pub fn begin(
        &mut self,
        (terms, client): (&Terms, ClientId),
        kind: &'static str,
        reins: Arc<Reins>,
    ) -> Vec<Event> {
        self.0.push(Record {
            id: terms.id.clone(),
            client,
            kind,
            status: Status::Created,
            reins,
            auto_dismiss: terms.auto_dismiss,
            error: None,
        });
        let mut events = Vec::new();
        if let Some(job) = self.0.last_mut() {
            events.push(job.event());
            events.push(job.turn(Status::Running));
        }
        events
    }

    /// The one that runs may have been paused, or go on.
    pub fn look(&mut self) -> Vec<Event> {
        let running = self.0.iter_mut().filter(|job| job.status.is_under_way());
        running
            .filter_map(|job| {
                let status = match job.reins.held().is_paused {
                    true => Status::Paused,
                    false => Status::Running,
                };
                (status != job.status).then(|| job.turn(status))
            })
            .collect()
    }

    /// The one that ran is over.
    pub fn end(&mut self, ended: Ended) -> Vec<Event> {
        let mut events = self.look();
        let Some(at) = self.0.iter().position(|job| job.status.is_under_way()) else {
            return events;
        };
        let job = &mut self.0[at];
        match &ended {
            Ended::Well => {
                events.push(job.turn(Status::Waiting));
                events.push(job.turn(Status::Pending));
            }
            Ended::Cancelled => {
                job.error = Some("Operation canceled".to_owned());
                events.push(job.turn(Status::Aborting));
            }
            Ended::Failed(why) => {
                job.error = Some(why.clone());
                events.push(job.turn(Status::Aborting));
            }
        }
        events.push(job.ending(&ended));
        events.push(job.turn(Status::Concluded));
        if job.auto_dismiss {
            events.push(job.turn(Status::Null));
            self.0.remove(at);
        }
        events
    }

    /// Does this with the job of that name. `true` if whoever runs it has to look.
    ///
    /// # Errors
    /// As QEMU says it.
    pub fn apply(&mut self, id: &str, verb: Verb) -> Result<(bool, Vec<Event>), String> {
        let at = self.0.iter().position(|job| job.id == id);
        let at = at.ok_or("Job not found")?;
        let job = &mut self.0[at];
        // In this order, as in QEMU.
        if verb == Verb::Resume && !job.reins.held().wants_pause {
            return Err("Can't resume a job that was not paused".to_owned());
        }
        if !job.status.accepts(verb) {
            return Err(format!(
                "Job '{id}' in state '{}' cannot accept command verb '{}'",
                job.status.name(),
                verb.name()
            ));
        }
        match verb {
            Verb::Dismiss => {
                let event = job.turn(Status::Null);
                self.0.remove(at);
                return Ok((false, vec![event]));
            }
            // Whoever runs it tells of its end in any case.
            Verb::Cancel => {
                job.reins.cancel();
            }
            Verb::SetSpeed(speed) => job.reins.lock().speed = speed_of(speed)?,
            Verb::Pause => {
                if std::mem::replace(&mut job.reins.lock().wants_pause, true) {
                    return Err("Job is already paused".to_owned());
                }
            }
            Verb::Resume => job.reins.lock().wants_pause = false,
            // Never accepted.
            Verb::Complete | Verb::Finalize => {}
        }
        Ok((true, Vec::new()))
    }

    /// Whether there is one of that name.
    pub fn has(&self, id: &str) -> bool {
        self.0.iter().any(|job| job.id == id)
    }

    /// `query-jobs`.
    pub fn list(&self) -> Value {
        self.0.iter().map(Record::info).collect()
    }

    /// `query-block-jobs`.
    pub fn list_of_block(&self) -> Value {
        self.0.iter().map(Record::block_info).collect()
    }
}

impl Record {
    /// Whether it is over, and the one who was to dismiss it has gone.
    fn is_forsaken(&self, is_there: impl Fn(ClientId) -> bool) -> bool {
        self.status == Status::Concluded && !is_there(self.client)
    }

    fn turn(&mut self, status: Status) -> Event {
        self.status = status;
        self.event()
    }

    fn event(&self) -> Event {
        Event::JobStatusChange {
            id: self.id.clone(),
            status: self.status.name(),
        }
    }

    /// The event of block jobs that says how it has ended.
    fn ending(&self, ended: &Ended) -> Event {
        let Held {
            progress, speed, ..
        } = self.reins.held();
        Event::BlockJobEnded {
            id: self.id.clone(),
            kind: self.kind,
            is_cancelled: *ended == Ended::Cancelled,
            done: progress.done,
            total: progress.total,
            speed,
            error: match ended {
                Ended::Failed(why) => Some(why.clone()),
                Ended::Well | Ended::Cancelled => None,
            },
        }
    }

    /// `JobInfo`.
    fn info(&self) -> Value {
        let progress = self.reins.held().progress;
        let mut info = json!({
            "id": self.id,
            "type": self.kind,
            "status": self.status.name(),
            "current-progress": progress.done,
            "total-progress": progress.total,
        });
        if let Some(error) = &self.error {
            info["error"] = error.as_str().into();
        }
        info
    }

    /// `BlockJobInfo`.
    fn block_info(&self) -> Value {
        let held = self.reins.held();
        let mut info = json!({
            "type": self.kind,
            "device": self.id,
            "len": held.progress.total,
            "offset": held.progress.done,
            "busy": self.status == Status::Running,
            "paused": self.status == Status::Paused,
            "speed": held.speed,
            "io-status": if held.is_host_full { "nospace" } else { "ok" },
            "ready": false,
            "status": self.status.name(),
            "auto-finalize": true,
            "auto-dismiss": self.auto_dismiss,
        });
        if let Some(error) = &self.error {
            info["error"] = error.as_str().into();
        }
        info
    }
}

/// Bytes a second that are asked for.
///
/// # Errors
/// As QEMU says it.
pub(super) fn speed_of(asked: i64) -> Result<u64, String> {
    u64::try_from(asked).map_err(|_| "Parameter 'speed' expects a non-negative value".to_owned())
}

/// As QEMU wants it: a letter, then letters, digits, `-`, `.` and `_`.
fn is_well_formed(id: &str) -> bool {
    let may_follow = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let mut bytes = id.bytes();
    id.len() <= 127
        && bytes
            .next()
            .is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(may_follow)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(id: &str, auto_dismiss: bool) -> Terms {
        Terms {
            id: id.to_owned(),
            speed: 0,
            guest_share: GUEST_SHARE,
            auto_dismiss,
        }
    }

    /// What clients are told, in short.
    fn told(events: &[Event]) -> Vec<String> {
        let name = |event: &Event| match event {
            Event::JobStatusChange { status, .. } => (*status).to_owned(),
            Event::BlockJobEnded {
                is_cancelled,
                error,
                ..
            } => format!("ended {is_cancelled} {}", error.is_some()),
            event => format!("{event:?}"),
        };
        events.iter().map(name).collect()
    }

    fn begin(jobs: &mut Jobs, id: &str, auto_dismiss: bool) -> (Arc<Reins>, Vec<Event>) {
        begin_as(jobs, ClientId::of(1), id, auto_dismiss)
    }

    fn begin_as(
        jobs: &mut Jobs,
        client: ClientId,
        id: &str,
        auto_dismiss: bool,
    ) -> (Arc<Reins>, Vec<Event>) {
        let terms = terms(id, auto_dismiss);
        let reins = Arc::new(Reins::new(&terms));
        let events = jobs.begin((&terms, client), "compact", Arc::clone(&reins));
        (reins, events)
    }

    fn check(jobs: &Jobs, terms: &Terms) -> Result<(), String> {
        jobs.check(terms, |_| true)
    }

    #[test]
    fn a_job_is_told_of_from_its_beginning_to_its_end() {
        let mut jobs = Jobs::default();
        let (reins, events) = begin(&mut jobs, "one", true);
        assert_eq!(told(&events), ["created", "running"]);
        assert_eq!(jobs.apply("one", Verb::Pause), Ok((true, Vec::new())));
        assert!(reins.held().wants_pause);
        assert_eq!(
            told(&jobs.look()),
            [""; 0],
            "whoever runs it has not paused it"
        );
        let progress = Progress { done: 2, total: 5 };
        assert!(reins.tell(progress, true, false) && !reins.tell(progress, true, false));
        assert_eq!(told(&jobs.look()), ["paused"]);
        assert_eq!(told(&jobs.look()), [""; 0]);
        assert_eq!(jobs.list()[0]["status"], "paused");
        assert_eq!(jobs.list()[0]["current-progress"], 2);
        assert_eq!(jobs.list_of_block()[0]["paused"], true);
        jobs.apply("one", Verb::Resume).unwrap();
        assert!(reins.tell(progress, false, true));
        assert_eq!(jobs.list_of_block()[0]["io-status"], "nospace");
        let events = jobs.end(Ended::Well);
        let expected = [
            "running",
            "waiting",
            "pending",
            "ended false false",
            "concluded",
            "null",
        ];
        assert_eq!(told(&events), expected);
        assert_eq!(jobs.list(), json!([]));
    }

    #[test]
    fn one_that_was_cancelled_or_failed_says_so_until_it_is_dismissed() {
        for (ended, error, how) in [
            (Ended::Cancelled, "Operation canceled", "ended true false"),
            (Ended::Failed("no".to_owned()), "no", "ended false true"),
        ] {
            let mut jobs = Jobs::default();
            let (reins, _) = begin(&mut jobs, "one", false);
            jobs.apply("one", Verb::Cancel).unwrap();
            assert!(reins.held().is_cancelled);
            let events = jobs.end(ended);
            assert_eq!(told(&events), ["aborting", how, "concluded"]);
            assert_eq!(jobs.list()[0]["error"], error);
            assert_eq!(
                check(&jobs, &terms("one", true)),
                Err("Job ID 'one' already in use".to_owned())
            );
            let (_, events) = jobs.apply("one", Verb::Dismiss).unwrap();
            assert_eq!(told(&events), ["null"]);
            assert!(!jobs.has("one"));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_as_qemu_does() {
        let mut jobs = Jobs::default();
        assert_eq!(
            jobs.apply("one", Verb::Cancel),
            Err("Job not found".to_owned())
        );
        for id in ["", "1a", "a b", "-a", "ä", &"a".repeat(128)] {
            let invalid = format!("Invalid job ID '{id}'");
            assert_eq!(check(&jobs, &terms(id, true)), Err(invalid));
        }
        assert_eq!(check(&jobs, &terms("a-1._", true)), Ok(()));
        begin(&mut jobs, "one", false);
        assert!(jobs.apply("one", Verb::Resume).is_err());
        jobs.apply("one", Verb::Pause).unwrap();
        assert!(jobs.apply("one", Verb::Pause).is_err());
        for (verb, name) in [
            (Verb::Complete, "complete"),
            (Verb::Finalize, "finalize"),
            (Verb::Dismiss, "dismiss"),
        ] {
            let words = format!("Job 'one' in state 'running' cannot accept command verb '{name}'");
            assert_eq!(jobs.apply("one", verb), Err(words));
        }
        jobs.end(Ended::Well);
        assert!(jobs.apply("one", Verb::Pause).is_err());
        // Nobody dismisses them.
        for index in 1..MAX_CONCLUDED {
            let terms = terms(&format!("j{index}"), false);
            assert_eq!(check(&jobs, &terms), Ok(()));
            begin(&mut jobs, &terms.id, false);
            jobs.end(Ended::Well);
        }
        assert!(check(&jobs, &terms("more", false)).is_err());
    }

    #[test]
    fn those_of_clients_that_are_gone_make_room() {
        let mut jobs = Jobs::default();
        let (gone, there) = (ClientId::of(1), ClientId::of(2));
        let is_there = |client| client == there;
        for index in 0..MAX_CONCLUDED {
            let client = if index % 4 == 2 { gone } else { there };
            let next = terms(&format!("j{index}"), false);
            assert_eq!(jobs.make_room(&next, is_there), None, "there is room");
            begin_as(&mut jobs, client, &format!("j{index}"), false);
            jobs.end(Ended::Well);
        }
        for index in (2..MAX_CONCLUDED).step_by(4) {
            let more = terms(&format!("more{index}"), false);
            assert_eq!(jobs.check(&more, is_there), Ok(()));
            let told = jobs.make_room(&more, is_there).unwrap();
            let id = format!("j{index}");
            assert!(!jobs.has(&id));
            let status = "null";
            assert_eq!(told, Event::JobStatusChange { id, status });
            begin_as(&mut jobs, there, &more.id, false);
            jobs.end(Ended::Well);
        }
        let more = terms("more", false);
        assert!(jobs.check(&more, is_there).is_err());
        assert_eq!(jobs.make_room(&more, is_there), None);
        // One that runs is nobody's to forget.
        let (_, _) = jobs.apply("j0", Verb::Dismiss).unwrap();
        begin_as(&mut jobs, gone, "runs", false);
        let more = terms("more", false);
        assert!(jobs.check(&more, is_there).is_err());
        assert_eq!(jobs.make_room(&more, is_there), None);
    }

    #[test]
    fn the_name_of_one_whose_client_is_gone_can_be_had_again() {
        let mut jobs = Jobs::default();
        let gone = ClientId::of(1);
        let is_there = |client| client != gone;
        let one = terms("one", false);
        begin_as(&mut jobs, gone, "one", false);
        let in_use = Err("Job ID 'one' already in use".to_owned());
        assert_eq!(jobs.check(&one, is_there), in_use, "it runs");
        jobs.end(Ended::Well);
        assert_eq!(jobs.check(&one, |_| true), in_use, "its client is there");
        assert_eq!(jobs.check(&one, is_there), Ok(()));
        let told = jobs.make_room(&one, is_there);
        assert_eq!(
            told.map(|event| vec![event]).as_deref().map(self::told),
            Some(vec!["null".to_owned()])
        );
        assert!(!jobs.has("one"));
    }
}
