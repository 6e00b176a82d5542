//! The main thread: waits for front-ends, for their end, for what control clients have to
//! say, for who asks for metrics, and for the signal to end the program. Never blocks on any
//! of them.
//!
//! One front-end is served at a time, since two guests on one disk would destroy
//! it. While one is, whoever else connects is turned away at once: a program that waits
//! for an answer may stand still, as QEMU's main loop does with the guest in it. Only
//! when the one has hung up, and its last requests are being completed, does the next
//! one wait, for a short time. One that connects and says nothing (QEMU does while it
//! prepares a guest's memory) keeps nobody else from being served, and nothing here but
//! a descriptor for a while.

mod jobs;
mod tasks;

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroI32;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Doors;
use super::caretaker::{Operation, Plan, Task};
use super::deadline;
use super::jobs::Jobs;
use super::metrics::{Names, Server};
use super::qmp::{ClientId, Event, Failure, Monitor, Wish};
use super::question::Question;
use super::served::{Image, Served};
use super::signals::Signals;
use super::socket::ServerSocket;
use super::upgrade::{Step, Successor};
use crate::device::{BlockDevice, Connection, Parked, has_spoken};
use crate::format::Sector;
use crate::notices::{IoError, Notice, Notices};
use crate::peer::Peer;
use crate::ploop::{Engine, EngineError};
use crate::storage::{Disk, HostDisk};
use crate::threads::{self, Role};
use tasks::{Underway, Wants};

/// How long to wait after a front-end could not be accepted: what was missing,
/// descriptors or threads, is not there again at once.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// How long a front-end may be silent after it has connected.
const SILENCE: Duration = Duration::from_secs(60);

/// How long one that wants to be served may have to wait for the end of the one before.
const TURN: Duration = Duration::from_secs(5);

/// How many may wait at a time. One more, and the first of them has to go.
const MAX_WAITING: usize = 16;

/// Questions of clients that have hung up, at most: each has descriptors until it is answered,
/// and a thread, perhaps, and on storage that does not answer that can be for ever.
const MAX_UNHEARD: usize = 16;

/// Events of the main loop.
mod event {
    pub const SIGNAL: u32 = 0;
    pub const FRONT_END: u32 = 1;
    pub const CONNECTION_ENDED: u32 = 2;
    pub const SPOKEN: u32 = 3;
    pub const UPGRADE: u32 = 4;
    pub const SUCCESSOR: u32 = 5;
    pub const CONTROL: u32 = 6;
    pub const CLIENT: u32 = 7;
    pub const NOTICE: u32 = 8;
    pub const SYNCED: u32 = 9;
    pub const DONE: u32 = 10;
    pub const METRICS: u32 = 11;
    pub const SCRAPER: u32 = 12;
    pub const ANSWER: u32 = 13;
    pub const JOB: u32 = 14;
}

/// Where the disk is asked and told of: its clients stay when one loop follows another.
pub(super) struct Desk {
    monitor: Monitor,
    jobs: Jobs,
    metrics: Server,
    notices: Arc<Notices>,
}

impl Desk {
    /// Without clients; tells them of `notices`.
    pub fn new(notices: Arc<Notices>, names: Names) -> Self {
        Self {
            monitor: Monitor::new(event::CLIENT),
            jobs: Jobs::default(),
            metrics: Server::new(names, event::SCRAPER),
            notices,
        }
    }
}

/// Front-ends that one loop leaves to the next one, in this process or another.
#[derive(Default)]
pub(super) struct Carried {
    /// The one that is being served.
    pub connection: Option<Connection>,
    /// Have connected and said nothing yet.
    pub waiting: Vec<UnixStream>,
}

/// Room for the descriptors that a loop begins with, for when it must not fail to. To be
/// dropped just before.
pub(super) struct Room {
    _descriptors: [EventFd; 4],
}

impl Room {
    /// Keeps it free.
    ///
    /// # Errors
    /// If there is none.
    pub fn keep() -> io::Result<Self> {
        let one = || EventFd::new(EFD_CLOEXEC);
        Ok(Self {
            _descriptors: [one()?, one()?, one()?, one()?],
        })
    }
}

/// Why a loop has ended.
pub(super) enum Left {
    /// A signal has come, and nothing is in flight.
    Signalled,
    /// The same, but it was no signal: see [`Error::StorageBack`](super::Error::StorageBack).
    StorageBack,
    /// Another process takes over.
    For(Successor, Carried),
}

/// Serves the disk to one front-end after the other until a signal comes, or a process
/// that takes over.
///
/// # Errors
/// Any of `epoll_create(2)`, `epoll_ctl(2)`, `epoll_wait(2)`.
pub(super) fn run(
    (served, image): (&mut Served, &mut Image),
    doors: &mut Doors,
    signals: &Signals,
    carried: Carried,
    desk: &mut Desk,
) -> Result<Left, event_manager::Error> {
    let mut manager = EventManager::new()?;
    let until = Instant::now() + SILENCE;
    let waiting = carried.waiting.into_iter();
    let id = manager.add_subscriber(MainLoop {
        device: Arc::clone(served.device()),
        served,
        image,
        doors,
        signals,
        desk,
        reserve: reserve(),
        waiting: waiting.map(|socket| Waiting { socket, until }).collect(),
        connection: carried.connection,
        successor: None,
        sync: None,
        underway: None,
        questions: Vec::new(),
        outcome: None,
    });
    let mut waited = Ok(0);
    while waited.is_ok() && manager.subscriber_mut(id)?.outcome.is_none() {
        let at_most = manager.subscriber_mut(id)?.time_left_ms();
        waited = manager.run_with_timeout(at_most);
        while let Some(socket) = manager.subscriber_mut(id)?.take_overdue() {
            manager.event_ops(id)?.remove(Events::empty(&socket))?;
        }
        if let Some(successor) = manager.subscriber_mut(id)?.take_late_successor() {
            manager.event_ops(id)?.remove(Events::empty(&successor))?;
        }
        for client in manager.subscriber_mut(id)?.desk.monitor.take_stalled() {
            manager.event_ops(id)?.remove(Events::empty(&client))?;
        }
        while let Some(client) = manager.subscriber_mut(id)?.desk.monitor.take_rested() {
            if let Err(error) = manager.event_ops(id)?.add(client) {
                log::warn!("a control client cannot be served any more: {error}");
                let monitor = &mut manager.subscriber_mut(id)?.desk.monitor;
                monitor.drop_client(client.fd());
            }
        }
        for client in manager.subscriber_mut(id)?.desk.metrics.take_overdue() {
            manager.event_ops(id)?.remove(Events::empty(&client))?;
        }
    }
    let mut main_loop = manager.remove_subscriber(id)?;
    let successor = main_loop.successor.take();
    if let (Ok(_), Some(Ok(Outcome::TakeOver)), Some(successor)) =
        (&waited, &main_loop.outcome, successor)
    {
        main_loop.refuse_questions("Another process is about to take over; ask that one");
        let waiting = main_loop.waiting.into_iter();
        let carried = Carried {
            connection: main_loop.connection,
            waiting: waiting.map(|one| one.socket).collect(),
        };
        return Ok(Left::For(successor, carried));
    }
    main_loop.end();
    waited?;
    Ok(match main_loop.outcome.transpose()? {
        Some(Outcome::StorageBack) => Left::StorageBack,
        _ => Left::Signalled,
    })
}

/// What ends the loop.
#[derive(Debug)]
enum Outcome {
    Signal,
    StorageBack,
    TakeOver,
}

/// A front-end that has connected and is not served yet.
struct Waiting {
    socket: UnixStream,
    until: Instant,
}

/// A sync of the image, beside everything else. It may take long.
struct ImageSync {
    is_over: Arc<EventFd>,
    result: Receiver<Result<(), EngineError>>,
}

impl ImageSync {
    fn start<D: Disk>(engine: Arc<Engine<D>>) -> io::Result<Self> {
        let is_over = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let (tell, result) = sync_channel(1);
        threads::start(Role::Sync, "sync", {
            let is_over = Arc::clone(&is_over);
            move || {
                // Who takes over has locks by now, which are of use if these were there
                // until then.
                engine.disk().doubt_locks();
                // Nobody may wait for it any more.
                let _ = tell.send(engine.settle());
                let _ = is_over.write(1);
            }
        })?;
        Ok(Self { is_over, result })
    }

    fn result(self) -> Result<(), EngineError> {
        self.result.recv().unwrap_or(Err(EngineError::Stopped))
    }
}

struct MainLoop<'a> {
    served: &'a mut Served,
    image: &'a mut Image,
    device: Arc<BlockDevice<HostDisk>>,
    doors: &'a mut Doors,
    signals: &'a Signals,
    desk: &'a mut Desk,
    /// A descriptor for a front-end that comes when there are no more.
    reserve: Option<EventFd>,
    /// The oldest first.
    waiting: VecDeque<Waiting>,
    connection: Option<Connection>,
    /// A process that prepares itself to take over, or waits for [`Self::sync`].
    successor: Option<Successor>,
    sync: Option<ImageSync>,
    /// One at a time, and nobody takes over meanwhile.
    underway: Option<Underway>,
    /// What clients wait for besides.
    questions: Vec<(ClientId, Question)>,
    /// Of the loop, when it is to end.
    outcome: Option<Result<Outcome, event_manager::Error>>,
}

impl MainLoop<'_> {
    fn handle(&mut self, events: Events, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        match events.data() {
            event::SIGNAL => {
                self.begin_end();
                Ok(())
            }
            event::FRONT_END => self.accept(ops),
            event::SPOKEN => self.hear(events.fd(), ops),
            event::CONNECTION_ENDED => self.forget_connection(ops),
            event::UPGRADE => self.accept_successor(ops),
            event::SUCCESSOR => self.hear_successor(ops),
            event::CONTROL => self.accept_client(ops),
            event::CLIENT => self.serve_client(events.fd(), ops),
            event::METRICS => self.accept_scraper(ops),
            event::SCRAPER => self.desk.metrics.serve(events.fd(), &*self.served, ops),
            event::NOTICE => self.pass_on_notices(ops),
            event::SYNCED => self.hear_of_sync(ops),
            event::DONE => self.hear_of_end(ops),
            event::ANSWER => self.pass_on_answer(events.fd(), ops),
            event::JOB => self.look_at_job(ops),
            _ => Ok(()),
        }
    }

    /// The program is to end.
    fn begin_end(&mut self) {
        self.begin_end_with(Outcome::Signal, deadline::NOT_CLOSED);
    }

    fn begin_end_with(&mut self, outcome: Outcome, status: u8) {
        if let Some(Ok(Outcome::Signal | Outcome::StorageBack)) = self.outcome {
            return;
        }
        log::info!("shutting down");
        deadline::set(status);
        if let Some(underway) = &self.underway {
            underway.operation.call_off();
        }
        self.outcome = Some(Ok(outcome));
    }

    /// Nobody is served any more. The guest goes first: what it went on to write would be in
    /// each sync that is waited for from now on.
    fn end(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Of a disk that waits for a lock, the next process can go on with what waits.
            let engine = self.device.engine();
            let is_locked_out = engine.is_some_and(|engine| engine.is_locked_out());
            connection.stop(match is_locked_out {
                true => Parked::Drop,
                false => Parked::FailSoon,
            });
        }
        self.refuse_questions("The program is about to end");
        self.end_underway();
    }

    /// A control client has come.
    fn accept_client(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let Some(control) = &self.doors.control else {
            return Ok(());
        };
        match control.accept() {
            Ok(socket) => self.desk.monitor.admit(socket.into(), ops),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => {
                log::error!("a control client cannot be accepted: {error}");
                turn_next_away(&mut self.reserve, control);
                thread::sleep(RETRY_DELAY);
                Ok(())
            }
        }
    }

    /// Somebody has come who asks for metrics.
    fn accept_scraper(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let Some(metrics) = &self.doors.metrics else {
            return Ok(());
        };
        match metrics.accept() {
            Ok(socket) => self.desk.metrics.admit(socket, ops),
            Err(error) if is_shortage(&error) => {
                log::error!("a client for metrics cannot be accepted: {error}");
                turn_next_away(&mut self.reserve, metrics);
                thread::sleep(RETRY_DELAY);
                Ok(())
            }
            // Nobody, or somebody by network who has gone before he was seen.
            Err(error) if is_of_one_client(&error) => Ok(()),
            Err(error) => {
                log::error!("clients for metrics cannot be accepted: {error}");
                thread::sleep(RETRY_DELAY);
                Ok(())
            }
        }
    }

    fn serve_client(&mut self, fd: RawFd, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        match self.desk.monitor.serve(fd, &*self.served, ops)? {
            Some((client, wish)) => self.at_its_cost(client, |this| this.grant(client, wish, ops)),
            None => Ok(()),
        }
    }

    /// Does what a client has asked for, outside its turn.
    fn at_its_cost<T>(&mut self, client: ClientId, act: impl FnOnce(&mut Self) -> T) -> T {
        let before = threads::processor_time();
        let done = act(self);
        let cost = threads::processor_time().saturating_sub(before);
        self.desk.monitor.charge(client, cost);
        done
    }

    /// Grants a client's wish.
    fn grant(
        &mut self,
        client: ClientId,
        wish: Wish,
        ops: &mut EventOps,
    ) -> Result<(), event_manager::Error> {
        match wish {
            Wish::Nothing => Ok(()),
            Wish::Quit => {
                log::info!("a control client sent quit");
                self.begin_end();
                Ok(())
            }
            Wish::Flush => self.ask(Served::flush, client, ops),
            Wish::ListSnapshots => self.ask(Served::list_snapshots, client, ops),
            Wish::Resize(size) => {
                let task = Task::Grow(size);
                self.begin(task, Wants::Nothing, client, ops)
            }
            Wish::Grow(by) => {
                // Nothing changes it meanwhile.
                let old_size = self.device.disk_size();
                let task = Task::Grow(Sector(old_size.0.saturating_add(by.0)));
                self.begin(task, Wants::Size, client, ops)
            }
            Wish::ChangeBitmaps(actions) => {
                self.ask(|served| served.change_bitmaps(actions), client, ops)
            }
            Wish::CreateSnapshot {
                new,
                is_unique,
                bitmaps,
            } => {
                let wants = match is_unique {
                    true => Wants::Nothing,
                    false => Wants::Guid,
                };
                let task = Task::Snapshot {
                    new,
                    is_unique,
                    bitmaps,
                };
                self.begin(task, wants, client, ops)
            }
            Wish::ListJobs { are_of_block } => self.list_jobs(are_of_block, client, ops),
            Wish::Compact(terms) => self.begin_job((Plan::Compact, &terms), client, ops),
            Wish::DeleteSnapshot { which, terms } => {
                self.begin_job((Plan::Delete(which), &terms), client, ops)
            }
            Wish::DeleteInternalSnapshot(which) => {
                self.begin_unnamed(Plan::Delete(which), Wants::Snapshot, client, ops)
            }
            Wish::SwitchSnapshot(_) => {
                let why = self.served.why_no_switch(self.connection.is_some());
                let refusal = Err(Failure::generic(why));
                self.desk.monitor.answer(client, refusal, ops)
            }
            Wish::ToJob { id, verb } => self.apply_to_job((&id, verb), client, ops),
        }
    }

    /// Waits for the answer to what a client wants to know, unless it cannot be asked.
    fn ask(
        &mut self,
        question: impl FnOnce(&Served) -> Result<Question, String>,
        client: ClientId,
        ops: &mut EventOps,
    ) -> Result<(), event_manager::Error> {
        let asked = match self.unheard_questions() {
            MAX_UNHEARD.. => Err(format!(
                "{MAX_UNHEARD} questions of clients that have hung up are not answered yet: most \
                 likely the storage does not answer"
            )),
            _ => question(self.served),
        };
        match asked {
            Ok(question) => {
                ops.add(answer_events(&question))?;
                self.questions.push((client, question));
                Ok(())
            }
            Err(why) => {
                let refusal = Err(Failure::generic(why));
                self.desk.monitor.answer(client, refusal, ops)
            }
        }
    }

    /// How many answers nobody waits for any more. Those who do are only so many.
    fn unheard_questions(&self) -> usize {
        let clients = self.questions.iter().map(|(client, _)| *client);
        clients
            .filter(|client| !self.desk.monitor.has(*client))
            .count()
    }

    fn pass_on_answer(
        &mut self,
        fd: RawFd,
        ops: &mut EventOps,
    ) -> Result<(), event_manager::Error> {
        let is_it = |(_, question): &(ClientId, Question)| question.as_raw_fd() == fd;
        let Some(at) = self.questions.iter().position(is_it) else {
            return Ok(());
        };
        let (client, question) = self.questions.swap_remove(at);
        ops.remove(answer_events(&question))?;
        self.at_its_cost(client, |this| {
            let answer = question.answer().map_err(Failure::generic);
            this.desk.monitor.answer(client, answer, ops)
        })
    }

    /// Nobody waits for the answers any more.
    fn refuse_questions(&mut self, why: &str) {
        for (client, _) in self.questions.drain(..) {
            let refusal = Err(Failure::generic(why));
            self.desk.monitor.answer_last(client, refusal);
        }
    }

    fn pass_on_notices(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        for notice in self.desk.notices.take() {
            let is_back = matches!(notice, Notice::StorageBack { .. });
            self.desk.monitor.tell(&event_of(notice), ops)?;
            if is_back {
                self.begin_end_with(Outcome::StorageBack, super::STORAGE_BACK);
            }
        }
        Ok(())
    }

    fn accept(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let socket = match self.doors.front_ends.accept() {
            Ok(socket) => UnixStream::from(socket),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => {
                log::error!("a front-end cannot be accepted: {error}");
                turn_next_away(&mut self.reserve, &self.doors.front_ends);
                thread::sleep(RETRY_DELAY);
                return Ok(());
            }
        };
        if self.is_busy() {
            self.device.tell_of_other(&socket);
            return Ok(());
        }
        if self.waiting.len() >= MAX_WAITING
            && let Some(oldest) = self.leave(0)
        {
            ops.remove(Events::empty(&oldest))?;
        }
        ops.add(spoken_events(&socket))?;
        self.waiting.push_back(Waiting {
            socket,
            until: Instant::now() + SILENCE,
        });
        Ok(())
    }

    /// A process has come that is to take over. One at a time.
    fn accept_successor(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let Some(upgrades) = &self.doors.upgrades else {
            return Ok(());
        };
        let socket = match upgrades.accept() {
            Ok(socket) => UnixStream::from(socket),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => {
                log::error!("a process that is to take over cannot be accepted: {error}");
                turn_next_away(&mut self.reserve, upgrades);
                thread::sleep(RETRY_DELAY);
                return Ok(());
            }
        };
        if self.successor.is_some() {
            log::warn!("a process is turned away: another one is about to take over");
            return Ok(());
        }
        match Successor::of(socket, self.doors.user) {
            Ok(successor) => {
                log::info!("{} is about to take over", successor.peer());
                ops.add(successor_events(&successor))?;
                self.successor = Some(successor);
            }
            Err(error) => log::warn!("a process is turned away: {error}"),
        }
        Ok(())
    }

    fn hear_successor(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let Some(mut successor) = self.successor.take() else {
            return Ok(());
        };
        let step = match &self.doors.terms {
            Some(terms) => successor.hear(terms, self.doors),
            None => Step::Ends,
        };
        match step {
            Step::Waits => self.successor = Some(successor),
            // Not in the midst of the end of the program.
            Step::IsReady if self.outcome.is_none() => {
                self.successor = Some(successor);
                self.begin_take_over(ops)?;
            }
            Step::IsReady | Step::Ends => ops.remove(successor_events(&successor))?,
        }
        Ok(())
    }

    /// Has the image synced for a process that waits for it, once nothing is done to the disk.
    fn begin_take_over(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        if self.outcome.is_some() {
            return Ok(());
        }
        let called_off = self
            .underway
            .take_if(|underway| underway.operation.call_off());
        if let Some(Underway { operation, asker }) = called_off {
            self.forget_events_of(&operation, ops)?;
            return self.go_on_after(operation.end(), asker, ops);
        }
        if self.underway.is_some() {
            return Ok(());
        }
        let Some(successor) = self.successor.take_if(|successor| successor.is_ready()) else {
            return Ok(());
        };
        match self.begin_sync(&successor, ops)? {
            true => self.successor = Some(successor),
            false => ops.remove(successor_events(&successor))?,
        }
        Ok(())
    }

    /// What is synced now need not be when the guest waits. `false` if the process was
    /// refused instead.
    fn begin_sync(
        &mut self,
        successor: &Successor,
        ops: &mut EventOps,
    ) -> Result<bool, event_manager::Error> {
        let Some(engine) = self.device.engine() else {
            successor.refuse("the image is not open");
            return Ok(false);
        };
        if engine.awaits_take_over() {
            // Closing the image would let that guest go on without what it was told is written.
            successor.refuse(
                "a guest of a process that was killed may come back for what is not in the image",
            );
            return Ok(false);
        }
        // Of a process that did not wait for it.
        if let Some(old) = self.sync.take() {
            ops.remove(synced_events(&old))?;
        }
        match ImageSync::start(engine) {
            Ok(sync) => {
                ops.add(synced_events(&sync))?;
                self.sync = Some(sync);
                Ok(true)
            }
            Err(error) => {
                successor.refuse(&format!("the image cannot be synced: {error}"));
                Ok(false)
            }
        }
    }

    fn hear_of_sync(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let Some(sync) = self.sync.take() else {
            return Ok(());
        };
        ops.remove(synced_events(&sync))?;
        let waits = |successor: &&Successor| successor.is_ready();
        match (self.successor.as_ref().filter(waits), sync.result()) {
            // Of one that has gone, and another process waits that something is not done yet.
            _ if self.underway.is_some() => {}
            (Some(_), Ok(())) if self.outcome.is_none() => {
                self.outcome = Some(Ok(Outcome::TakeOver));
            }
            (Some(successor), Err(error)) => {
                successor.refuse(&format!("the image cannot be synced: {error}"));
                ops.remove(successor_events(successor))?;
                self.successor = None;
            }
            _ => {}
        }
        Ok(())
    }

    /// One that has not been ready in time; to be hung up on.
    fn take_late_successor(&mut self) -> Option<Successor> {
        let successor = self
            .successor
            .take_if(|successor| successor.until() <= Instant::now() && self.outcome.is_none())?;
        successor.is_late();
        Some(successor)
    }

    /// Whether a front-end is being served that has not hung up.
    fn is_busy(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(Connection::has_front_end)
    }

    /// Something has come from one that waits.
    fn hear(&mut self, fd: RawFd, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let is_it = |one: &Waiting| one.socket.as_raw_fd() == fd;
        let Some(position) = self.waiting.iter().position(is_it) else {
            return Ok(());
        };
        let spoken = has_spoken(&self.waiting[position].socket);
        let is_busy = self.is_busy();
        match spoken {
            Ok(false) => return Ok(()),
            Ok(true) if self.connection.is_some() && !is_busy => {
                let turn = Instant::now() + TURN;
                let one = &mut self.waiting[position];
                one.until = one.until.min(turn);
                return Ok(());
            }
            Ok(true) | Err(_) => {}
        }
        let Some(Waiting { socket, .. }) = self.waiting.remove(position) else {
            return Ok(());
        };
        ops.remove(Events::empty(&socket))?;
        if is_busy {
            self.device.tell_of_other(&socket);
        } else if spoken.is_ok() {
            self.serve(socket, ops)?;
        }
        Ok(())
    }

    fn serve(
        &mut self,
        socket: UnixStream,
        ops: &mut EventOps,
    ) -> Result<(), event_manager::Error> {
        let peer = Peer::of(&socket).ok();
        match Connection::start(Arc::clone(&self.device), socket) {
            Ok(connection) => {
                ops.add(ended_events(&connection))?;
                self.connection = Some(connection);
                let pid = peer.and_then(|peer| peer.pid).map(NonZeroI32::get);
                let event = Event::FrontEndConnected { pid };
                self.desk.monitor.tell(&event, ops)?;
            }
            Err(error) => {
                log::error!("a front-end cannot be served: {error}");
                thread::sleep(RETRY_DELAY);
            }
        }
        Ok(())
    }

    fn forget_connection(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        if let Some(connection) = self.connection.take() {
            ops.remove(ended_events(&connection))?;
            connection.stop(Parked::Drop);
            self.desk.monitor.tell(&Event::FrontEndGone, ops)?;
        }
        // Who has spoken meanwhile is not told of again.
        let fds: Vec<_> = self
            .waiting
            .iter()
            .map(|one| one.socket.as_raw_fd())
            .collect();
        fds.into_iter().try_for_each(|fd| self.hear(fd, ops))
    }

    /// How long to wait for events, in the event manager's terms.
    fn time_left_ms(&self) -> i32 {
        let front_ends = self.waiting.iter().map(|one| one.until);
        let successor = self.successor.as_ref().map(Successor::until);
        let clients = self.desk.monitor.deadline();
        let scrapers = self.desk.metrics.deadline();
        let all = front_ends.chain(successor).chain(clients).chain(scrapers);
        let Some(first) = all.min() else {
            return -1;
        };
        let left = first.saturating_duration_since(Instant::now());
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    }

    /// One that is not waited for any more; to be hung up on.
    fn take_overdue(&mut self) -> Option<UnixStream> {
        let now = Instant::now();
        let overdue = self.waiting.iter().position(|one| one.until <= now)?;
        self.leave(overdue)
    }

    fn leave(&mut self, position: usize) -> Option<UnixStream> {
        let Waiting { socket, .. } = self.waiting.remove(position)?;
        self.device.tell_of_silent(&socket);
        Some(socket)
    }

    /// All that is waited for from the beginning.
    fn first_events(&self) -> Vec<Events> {
        let mut all = vec![
            Events::with_data(self.signals, event::SIGNAL, EventSet::IN),
            Events::with_data(&self.doors.front_ends, event::FRONT_END, EventSet::IN),
        ];
        let upgrades = self.doors.upgrades.as_ref();
        all.extend(upgrades.map(|it| Events::with_data(it, event::UPGRADE, EventSet::IN)));
        let control = self.doors.control.as_ref();
        all.extend(control.map(|it| Events::with_data(it, event::CONTROL, EventSet::IN)));
        all.extend(self.desk.monitor.first_events());
        let metrics = self.doors.metrics.as_ref();
        all.extend(metrics.map(|it| Events::with_data(it, event::METRICS, EventSet::IN)));
        all.extend(self.desk.metrics.first_events());
        let notices = &*self.desk.notices;
        all.push(Events::with_data(notices, event::NOTICE, EventSet::IN));
        all.extend(self.connection.as_ref().map(ended_events));
        let waiting = self.waiting.iter();
        all.extend(waiting.map(|one| spoken_events(&one.socket)));
        all
    }
}

/// For want of descriptors, most likely. Who is not accepted is not hung up on either, and
/// would wait for a first answer for ever.
fn turn_next_away(reserved: &mut Option<EventFd>, door: &ServerSocket) {
    drop(reserved.take());
    // If somebody else was faster to take it, whoever has come is still there.
    drop(door.accept());
    *reserved = reserve();
}

/// Whether something is missing that may be there again in a while.
fn is_shortage(error: &io::Error) -> bool {
    let missing = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| missing.contains(&errno))
}

/// Whether accept(2) says this of a client, and the next one may do better.
fn is_of_one_client(error: &io::Error) -> bool {
    let of_one = [
        Errno::AGAIN,
        Errno::CONNABORTED,
        Errno::HOSTDOWN,
        Errno::HOSTUNREACH,
        Errno::INTR,
        Errno::NETDOWN,
        Errno::NETUNREACH,
        Errno::NONET,
        Errno::NOPROTOOPT,
        Errno::OPNOTSUPP,
        Errno::PROTO,
    ];
    Errno::from_io_error(error).is_some_and(|errno| of_one.contains(&errno))
}

/// As clients are told of it.
fn event_of(notice: Notice) -> Event {
    match notice {
        Notice::HostFull { waits } => Event::HostFull { waits },
        Notice::HostHasSpace => Event::HostHasSpace,
        Notice::IoError(IoError {
            is_read,
            no_space,
            reason,
        }) => Event::IoError {
            is_read,
            no_space,
            reason,
        },
        Notice::WriteThreshold {
            threshold,
            exceeded_by,
        } => Event::WriteThreshold {
            threshold,
            exceeded_by,
        },
        Notice::LockLost { path, why, waits } => Event::LockLost {
            file: path.to_string_lossy().into_owned(),
            reason: why,
            waits,
        },
        Notice::StorageBack { path } => Event::StorageBack {
            file: path.to_string_lossy().into_owned(),
        },
        Notice::ImageVanished { path, how } => Event::ImageVanished {
            file: path.to_string_lossy().into_owned(),
            how,
        },
    }
}

/// Told once for each piece that comes: the first may be less than a message.
fn spoken_events(socket: &UnixStream) -> Events {
    let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
    Events::with_data(socket, event::SPOKEN, events)
}

fn successor_events(successor: &Successor) -> Events {
    Events::with_data(successor, event::SUCCESSOR, EventSet::IN)
}

fn synced_events(sync: &ImageSync) -> Events {
    Events::with_data(&*sync.is_over, event::SYNCED, EventSet::IN)
}

fn answer_events(question: &Question) -> Events {
    Events::with_data(question, event::ANSWER, EventSet::IN)
}

fn done_events(operation: &Operation) -> Events {
    Events::with_data(operation, event::DONE, EventSet::IN)
}

/// See [`MainLoop::reserve`]; `None` if there is none left.
fn reserve() -> Option<EventFd> {
    EventFd::new(EFD_CLOEXEC).ok()
}

fn ended_events(connection: &Connection) -> Events {
    let fd = connection.ended_fd().as_raw_fd();
    Events::with_data_raw(fd, event::CONNECTION_ENDED, EventSet::IN)
}

impl MutEventSubscriber for MainLoop<'_> {
    fn init(&mut self, ops: &mut EventOps) {
        let mut events = self.first_events().into_iter();
        let added = events.try_for_each(|events| ops.add(events));
        if let Err(error) = added {
            self.outcome = Some(Err(error));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(error) = self.handle(events, ops) {
            self.outcome = Some(Err(error));
        }
    }
}
