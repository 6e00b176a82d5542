//! What clients want of jobs, and how those go.

use std::sync::Arc;

use event_manager::{Error, EventOps, EventSet, Events};
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use super::super::caretaker::Plan;
use super::super::jobs::{Reins, Terms, Verb};
use super::super::qmp::{ClientId, Event, Failure};
use super::tasks::{Asker, Underway, Wants};
use super::{MainLoop, done_events, event};

/// What a client is to hear, and all of them.
type Answer = (Result<Value, Failure>, Vec<Event>);

impl MainLoop<'_> {
    pub(super) fn list_jobs(
        &mut self,
        are_of_block: bool,
        client: ClientId,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        let jobs = match are_of_block {
            true => self.desk.jobs.list_of_block(),
            false => self.desk.jobs.list(),
        };
        self.desk.monitor.answer(client, Ok(jobs), ops)
    }

    /// Begins a job, or says why not. Its client need not wait for its end.
    pub(super) fn begin_job(
        &mut self,
        (plan, terms): (Plan, &Terms),
        client: ClientId,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        let is_there = |client| self.desk.monitor.has(client);
        let begun = match self.desk.jobs.check(terms, is_there) {
            Ok(()) => self.try_begin_job((plan, terms), (client, None), ops)?,
            Err(why) => Err(self.refusal().map_or(why, str::to_owned)),
        };
        let (answer, events) = match begun {
            Ok(events) => (Ok(json!({})), events),
            Err(why) => (Err(Failure::generic(why)), Vec::new()),
        };
        self.tell_all(&events, ops)?;
        self.desk.monitor.answer(client, answer, ops)
    }

    /// Begins one that its client does not know as a job, and whose end it waits for, or says why
    /// not.
    pub(super) fn begin_unnamed(
        &mut self,
        plan: Plan,
        wants: Wants,
        client: ClientId,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        let terms = Terms::unnamed(plan.kind());
        let asker = Some(Asker { client, wants });
        match self.try_begin_job((plan, &terms), (client, asker), ops)? {
            Ok(events) => self.tell_all(&events, ops),
            Err(why) => {
                let refusal = Err(Failure::generic(why));
                self.desk.monitor.answer(client, refusal, ops)
            }
        }
    }

    fn try_begin_job(
        &mut self,
        (plan, terms): (Plan, &Terms),
        (client, asker): (ClientId, Option<Asker>),
        ops: &mut EventOps,
    ) -> Result<Result<Vec<Event>, String>, Error> {
        if let Some(why) = self.refusal() {
            return Ok(Err(why.to_owned()));
        }
        let kind = plan.kind();
        let reins = Arc::new(Reins::new(terms));
        let operation = match self.served.begin_job(plan, Arc::clone(&reins)) {
            Ok(operation) => operation,
            Err(error) => return Ok(Err(error.words())),
        };
        ops.add(done_events(&operation))?;
        if let Some(changed) = operation.changed() {
            ops.add(changed_events(changed))?;
        }
        let is_there = |client| self.desk.monitor.has(client);
        let mut events = Vec::from_iter(self.desk.jobs.make_room(terms, is_there));
        events.extend(self.desk.jobs.begin((terms, client), kind, reins));
        self.underway = Some(Underway { operation, asker });
        Ok(Ok(events))
    }

    /// Does something with a job.
    pub(super) fn apply_to_job(
        &mut self,
        (id, verb): (&str, Verb),
        client: ClientId,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        let (answer, events) = self.try_apply(id, verb);
        self.tell_all(&events, ops)?;
        self.desk.monitor.answer(client, answer, ops)
    }

    fn try_apply(&mut self, id: &str, verb: Verb) -> Answer {
        if matches!(verb, Verb::SetSpeed(_)) && !self.desk.jobs.has(id) {
            return (Err(Failure::no_block_job(id)), Vec::new());
        }
        match self.desk.jobs.apply(id, verb) {
            Ok((has_to_look, events)) => {
                if has_to_look && let Some(underway) = &self.underway {
                    underway.operation.look();
                }
                (Ok(json!({})), events)
            }
            Err(why) => (Err(Failure::generic(why)), Vec::new()),
        }
    }

    /// Its status may be another.
    pub(super) fn look_at_job(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        let underway = self.underway.as_ref();
        if let Some(changed) = underway.and_then(|underway| underway.operation.changed()) {
            // Whether anything was there makes no difference.
            let _ = changed.read();
        }
        let events = self.desk.jobs.look();
        self.tell_all(&events, ops)
    }

    pub(super) fn tell_all(&mut self, events: &[Event], ops: &mut EventOps) -> Result<(), Error> {
        let monitor = &mut self.desk.monitor;
        events.iter().try_for_each(|event| monitor.tell(event, ops))
    }
}

pub(super) fn changed_events(changed: &EventFd) -> Events {
    Events::with_data(changed, event::JOB, EventSet::IN)
}
