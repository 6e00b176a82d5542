//! What is done to the disk because a client wants it, one thing at a time, and who hears what
//! has come of it.

use event_manager::{Error, EventOps};
use serde_json::{Value, json};

use super::super::caretaker::{Done, NewChain, Operation, Task, TaskError};
use super::super::jobs::Ended;
use super::super::qmp::{ClientId, Event, Failure, snapshot_info};
use super::super::upgrade::Successor;
use super::{MainLoop, done_events, jobs, successor_events};

/// What is being done to the disk, and who waits for it.
pub(super) struct Underway {
    pub operation: Operation,
    /// Of a job nobody waits for the end, unless its client has not asked for one.
    pub asker: Option<Asker>,
}

pub(super) struct Asker {
    pub client: ClientId,
    pub wants: Wants,
}

/// What a client is told besides that it went well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wants {
    Nothing,
    /// The size, as it has only asked for more.
    Size,
    /// The name of the snapshot, as it has given none, perhaps.
    Guid,
    /// What the snapshot was that is no more.
    Snapshot,
}

/// What has come of it.
struct Concluded {
    /// What its client is told.
    answer: Result<Value, Failure>,
    /// There are snapshots more or less.
    snapshots: Vec<Event>,
    /// What there is to tell of a job that is over.
    events: Vec<Event>,
}

impl MainLoop<'_> {
    /// Begins what is to be done to the disk, or says why not.
    pub(super) fn begin(
        &mut self,
        task: Task,
        wants: Wants,
        client: ClientId,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        let begun = match self.refusal() {
            Some(why) => Err(why.to_owned()),
            None => self.served.begin(task).map_err(|error| error.words()),
        };
        match begun {
            Ok(operation) => {
                ops.add(done_events(&operation))?;
                let asker = Some(Asker { client, wants });
                self.underway = Some(Underway { operation, asker });
                Ok(())
            }
            Err(why) => {
                let refusal = Err(Failure::generic(why));
                self.desk.monitor.answer(client, refusal, ops)
            }
        }
    }

    /// Why nothing can be done to the disk now.
    pub(super) fn refusal(&self) -> Option<&'static str> {
        if let Some(underway) = &self.underway {
            return Some(underway.operation.task().is_under_way());
        }
        if self.outcome.is_some() {
            return Some("The program is about to end");
        }
        // It has looked at the image.
        let waits = self.successor.as_ref().is_some_and(Successor::is_ready);
        waits.then_some("Another process is about to take over; ask that one")
    }

    pub(super) fn hear_of_end(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        let Some(Underway { operation, asker }) = self.underway.take() else {
            return Ok(());
        };
        self.forget_events_of(&operation, ops)?;
        self.go_on_after(operation.result(), asker, ops)
    }

    /// Nothing is heard of it any more.
    pub(super) fn forget_events_of(
        &self,
        operation: &Operation,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        ops.remove(done_events(operation))?;
        match operation.changed() {
            Some(changed) => ops.remove(jobs::changed_events(changed)),
            None => Ok(()),
        }
    }

    pub(super) fn go_on_after(
        &mut self,
        result: Result<Done, TaskError>,
        asker: Option<Asker>,
        ops: &mut EventOps,
    ) -> Result<(), Error> {
        let wants = asker.as_ref().map(|asker| asker.wants);
        let concluded = self.conclude(result, wants);
        self.tell_all(&concluded.events, ops)?;
        // It knows the disk as it was.
        if !concluded.snapshots.is_empty()
            && let Some(successor) = self.successor.take()
        {
            successor.refuse("the snapshots of the disk are others meanwhile; start it again");
            ops.remove(successor_events(&successor))?;
        }
        self.tell_all(&concluded.snapshots, ops)?;
        self.begin_take_over(ops)?;
        let Some(asker) = asker else {
            return Ok(());
        };
        let answer = concluded.answer;
        self.desk.monitor.answer(asker.client, answer, ops)
    }

    /// Waits for what is being done when nothing else is waited for any more, and tells whoever
    /// is there what has come of it.
    pub(super) fn end_underway(&mut self) {
        let Some(Underway { operation, asker }) = self.underway.take() else {
            return;
        };
        let wants = asker.as_ref().map(|asker| asker.wants);
        let Concluded {
            answer,
            snapshots,
            events,
        } = self.conclude(operation.end(), wants);
        for event in events.iter().chain(&snapshots) {
            self.desk.monitor.tell_last(event);
        }
        if let Some(asker) = asker {
            self.desk.monitor.answer_last(asker.client, answer);
        }
    }

    /// Whoever has to know of it learns what has become of the disk. Of a job nobody `wants`
    /// anything.
    fn conclude(&mut self, result: Result<Done, TaskError>, wants: Option<Wants>) -> Concluded {
        let snapshots = match &result {
            Ok(Done::Grown(_)) => {
                if let Some(connection) = &self.connection {
                    connection.config_changed();
                }
                Vec::new()
            }
            Ok(Done::Snapshot {
                guid, new_chain, ..
            }) => {
                self.follow(new_chain);
                vec![Event::SnapshotCreated { guid: *guid }]
            }
            Ok(Done::Deleted {
                snapshots,
                new_chain,
                ..
            }) => {
                self.follow(new_chain);
                let guids = snapshots.iter().map(|(guid, _)| *guid);
                guids.map(|guid| Event::SnapshotDeleted { guid }).collect()
            }
            Ok(Done::Job) | Err(_) => Vec::new(),
        };
        let is_cancelled = matches!(result, Err(TaskError::Cancelled));
        let answer = answer_to(result, wants);
        let ended = match &answer {
            Ok(_) => Ended::Well,
            Err(_) if is_cancelled => Ended::Cancelled,
            Err(why) => {
                // Who has asked may have gone.
                log::warn!("{why}");
                Ended::Failed(why.clone())
            }
        };
        Concluded {
            answer: answer.map_err(Failure::generic),
            snapshots,
            // Of what is no job there is nothing.
            events: self.desk.jobs.end(ended),
        }
    }

    /// The disk has other levels.
    fn follow(&mut self, new_chain: &NewChain) {
        self.served.follow(self.image, new_chain);
        if let Some(terms) = &mut self.doors.terms {
            terms.follow(self.image.files());
        }
    }
}

/// What its client is told, or why nothing has come of it, in words.
fn answer_to(result: Result<Done, TaskError>, wants: Option<Wants>) -> Result<Value, String> {
    match (result, wants) {
        (Err(error), _) => Err(error.words()),
        (
            Ok(
                Done::Snapshot {
                    doubt: Some(doubt), ..
                }
                | Done::Deleted {
                    doubt: Some(doubt), ..
                },
            ),
            _,
        ) => Err(doubt),
        (Ok(Done::Grown(size)), Some(Wants::Size)) => Ok(json!({ "size": size.bytes() })),
        (Ok(Done::Snapshot { guid, .. }), Some(Wants::Guid)) => {
            Ok(json!({ "guid": guid.to_string() }))
        }
        (Ok(Done::Deleted { snapshots, .. }), Some(Wants::Snapshot)) => {
            let infos = snapshots.iter();
            let mut infos = infos.map(|(guid, note)| snapshot_info(*guid, note.as_ref()));
            Ok(infos.next().unwrap_or_default())
        }
        (Ok(_), _) => Ok(json!({})),
    }
}
