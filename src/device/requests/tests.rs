//! The requests of one queue on a simulated disk, whose threads the tests drive.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use smallvec::smallvec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::device::memory::{SharedMemory, anonymous};
use crate::device::request::RequestError;
use crate::device::stops::{self, Stops};
use crate::device::throttle::Limits;
use crate::device::{Queues, Serial};
use crate::format::{ClusterSize, Header, Sector};
use crate::ploop::control::Control;
use crate::ploop::{Chain, Engine, Level, MdWriter, Opened, Options, Runner, SectorRange, preempt};
use crate::sim::disk::{Medium, SimDisk};
use crate::storage::FileId;

const CLUSTER: u64 = 32 << 10;
const QUEUE_SIZE: u16 = 128;
const DISK_SIZE: Sector = Sector(512 * CLUSTER / 512);

/// A read of holes of that length takes the engine more than two turns.
const MANY_HOLES: usize = 9 << 20;

/// Where the status byte of a request is, by its head.
fn status_of(head: u16) -> GuestAddress {
    GuestAddress(u64::from(head))
}

/// Of a request that has no answer.
const UNTOUCHED: u8 = 0xaa;

/// All of the engine but the queue.
struct Others {
    runners: Vec<Runner<SimDisk>>,
    md: MdWriter<SimDisk>,
    disk: SimDisk,
}

impl Others {
    fn turn(&mut self) {
        for runner in &mut self.runners {
            runner.poll(Duration::ZERO);
        }
        self.md.poll(Duration::ZERO);
        if self.disk.is_busy() {
            self.disk.step();
        }
    }
}

struct Rig {
    disk: SimDisk,
    device: Arc<BlockDevice<SimDisk>>,
    others: Rc<RefCell<Others>>,
    /// Taken at the end.
    requests: Option<Requests<SimDisk>>,
    memory: QueueMemory,
    /// What is written, or room for what is read.
    data: Vec<u8>,
}

impl Rig {
    fn new(ended: Vec<Used>) -> Self {
        Self::with_stops(ended, Stops::new())
    }

    fn with_stops(ended: Vec<Used>, stops: Stops) -> Self {
        let disk = SimDisk::new(1, Medium::default(), 1);
        let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
        let header = Header::new(DISK_SIZE, cluster).unwrap();
        disk.prepare(FileId(0), 0, &header.to_bytes());
        disk.set_len(FileId(0), header.geometry().data_start)
            .unwrap();
        disk.sync(FileId(0)).unwrap();
        let levels = vec![Level::Ploop];
        let opened = Engine::open(disk.clone(), &Chain { levels }, Options::default()).unwrap();
        let Opened {
            engine,
            runners,
            md,
        } = opened;
        let serial: Serial = "a serial number".parse().unwrap();
        let queues = Queues::new(1, QUEUE_SIZE).unwrap();
        let mut device = BlockDevice::new(engine, serial, queues);
        device.stops = stops;
        let device = Arc::new(device);
        let others = Others {
            runners,
            md,
            disk: disk.clone(),
        };
        let queue = device.engine().unwrap().queue().unwrap();
        let shared = Arc::new(SharedMemory::new());
        shared.replace(anonymous(GuestAddress(0), 0x1000));
        let memory = QueueMemory::new(shared);
        memory
            .map()
            .write_slice(&[UNTOUCHED; 0x1000], GuestAddress(0))
            .unwrap();
        Self {
            requests: Some(Requests::new(3, Arc::clone(&device), queue, ended)),
            disk,
            device,
            others: Rc::new(RefCell::new(others)),
            memory,
            data: vec![7; 1 << 20],
        }
    }

    fn requests(&mut self) -> &mut Requests<SimDisk> {
        self.requests
            .as_mut()
            .expect("they are there until the end")
    }

    fn accept(&mut self, head: u16, operation: Operation) {
        let reply = self.reply_to(head);
        let requests = self.requests.as_mut().expect("as above");
        requests.accept(head, Request { operation, reply }, &self.memory);
    }

    /// A write of one piece.
    fn write(&mut self, head: u16, len: usize) {
        let data = self.pieces(len, 1);
        let start = Sector(0);
        self.accept(head, Operation::Engine(Command::Write { start, data }));
    }

    /// So much of the data, in pieces that do not follow each other.
    fn pieces(&mut self, len: usize, count: usize) -> Segments {
        let mut segments = Segments::new();
        let stride = self.data.len() / count;
        for piece in 0..count {
            let start = self.data.as_mut_ptr().wrapping_add(piece * stride);
            // SAFETY: inside `data`, which lives as long as the requests.
            unsafe { segments.push(start, len / count) };
        }
        segments
    }

    fn discard(&mut self, head: u16) {
        let range = SectorRange {
            start: Sector(0),
            count: Sector(CLUSTER / 512),
        };
        let ranges = smallvec![range];
        self.accept(head, Operation::Engine(Command::Discard { ranges }));
    }

    /// Of the start of an empty disk, by pieces that are all the same place.
    fn read_holes(&mut self, head: u16, len: usize) {
        let mut data = Segments::new();
        let piece = len.min(self.data.len());
        for _ in 0..len / piece {
            // SAFETY: `data` lives as long as the requests.
            unsafe { data.push(self.data.as_mut_ptr(), piece) };
        }
        let start = Sector(0);
        self.accept(head, Operation::Engine(Command::Read { start, data }));
    }

    /// Something that is done at once, by which all before it cannot go back.
    fn go_past(&mut self, head: u16) {
        let target = self.pieces(15, 1);
        self.accept(head, Operation::GetId(target));
    }

    /// As on the command line; none with an empty text.
    fn limit(&self, limits: &str) {
        let limits = match limits {
            "" => Limits::default(),
            limits => limits.parse().unwrap(),
        };
        self.device.throttle().set(limits).unwrap();
    }

    fn poll(&mut self) {
        let requests = self.requests.as_mut().expect("as above");
        requests.poll(&mut self.memory);
    }

    /// Until so many answers are there to be put back.
    fn run_until(&mut self, used: usize) {
        for _ in 0..10_000 {
            self.poll();
            if self.requests().used() >= used {
                return;
            }
            self.turn_others();
        }
        panic!("nothing has ended");
    }

    fn turn_others(&self) {
        self.others.borrow_mut().turn();
    }

    /// Of all of the disk, which takes as much of the engine as may be under way.
    fn zero(&mut self, head: u16) {
        let range = SectorRange {
            start: Sector(0),
            count: DISK_SIZE,
        };
        let ranges = smallvec![range];
        let unmap = false;
        let command = Command::WriteZeroes { ranges, unmap };
        self.accept(head, Operation::Engine(command));
    }

    /// As [`Self::drain`], while the others have a turn whenever the queue has looked so
    /// often. Says how often it has.
    fn drain_with_others(&mut self, parked: Parked, from: usize) -> (Vec<u16>, usize) {
        let looks = Rc::new(Cell::new(0));
        let (others, counted) = (Rc::clone(&self.others), Rc::clone(&looks));
        let _hook = preempt::each(move |at| {
            // Others come to such points, too.
            if at == "reaped"
                && let Ok(mut others) = others.try_borrow_mut()
            {
                counted.set(counted.get() + 1);
                if counted.get() >= from {
                    others.turn();
                }
            }
        });
        (self.drain(parked, true), looks.get())
    }

    fn drain(&mut self, parked: Parked, may_give_back: bool) -> Vec<u16> {
        let requests = self.requests.as_mut().expect("as above");
        requests.drain(&mut self.memory, parked, may_give_back)
    }

    fn reply_to(&self, head: u16) -> Reply {
        let byte = self.memory.map().get_host_address(status_of(head));
        // SAFETY: the memory is the rig's, which outlives its replies.
        unsafe { Reply::at(byte.unwrap()) }
    }

    fn status(&self, head: u16) -> u8 {
        let map = self.memory.map();
        map.read_obj(status_of(head)).unwrap()
    }

    fn left(&mut self) -> Left {
        self.requests.take().expect("it is the end").into_left()
    }

    fn heads(&mut self) -> Vec<u16> {
        let used = self.requests().to_put_back().iter();
        used.map(|used| used.head).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if thread::panicking() {
            // Nobody drives what it would wait for.
            self.device.engine().unwrap().abandon();
        }
        self.requests = None;
        self.device.engine().unwrap().abandon();
    }
}

const OK: u8 = Status::Ok as u8;
const IO_ERROR: u8 = Status::IoError as u8;

fn rejected(error: RequestError, reply: Option<Reply>) -> Rejected {
    let kind = None;
    Rejected { error, kind, reply }
}

fn used(head: u16, len: u32) -> Used {
    Used { head, len }
}

#[test]
fn what_a_request_weighs_is_its_data_and_the_list_of_its_segments() {
    assert_eq!(weight(&Command::Flush), Weight::default());
    let mut memory = vec![0_u8; 64 << 10];
    let mut data = Segments::new();
    for at in (0..memory.len()).step_by(1024) {
        // SAFETY: inside `memory`, which outlives the segments.
        unsafe { data.push(memory.as_mut_ptr().wrapping_add(at), 512) };
    }
    let start = Sector(0);
    let scattered = weight(&Command::Read { start, data });
    assert_eq!(scattered.data, 32 << 10);
    assert!(scattered.list >= 64 * 16, "{scattered:?}");
}

#[test]
fn each_chain_is_answered_once_and_counted_as_long_as_it_is_there() {
    // One was left by the thread before.
    let mut rig = Rig::new(vec![used(9, 5)]);
    assert_eq!(rig.requests().queue_index(), 3);
    assert_eq!(rig.device.open_queues(), 1);
    rig.write(1, 4096);
    rig.write(2, 512);
    assert_eq!(rig.requests().load(), 4608);
    assert_eq!(rig.requests().in_flight(), 2);
    assert_eq!((rig.requests().used(), rig.requests().used_load()), (1, 0));
    rig.run_until(3);
    assert_eq!(rig.requests().load(), 0);
    assert_eq!(rig.requests().in_flight(), 0);
    assert_eq!(rig.requests().used_load(), 4608);
    let (first, second) = match rig.heads()[1] {
        1 => (1, 2),
        _ => (2, 1),
    };
    let answers = [used(9, 5), used(first, 1), used(second, 1)];
    assert_eq!(rig.requests().to_put_back(), answers);
    assert_eq!([1, 2].map(|head| rig.status(head)), [OK; 2]);
    rig.requests().were_put_back(2);
    assert_eq!(rig.requests().used_load(), 0);
    assert_eq!(rig.requests().to_put_back(), [used(second, 1)]);
    assert_eq!(rig.left().unanswered, [used(second, 1)]);
    assert_eq!(rig.device.open_queues(), 0);
}

#[test]
fn the_serial_number_and_what_is_no_request_are_answered_at_once() {
    let mut rig = Rig::new(Vec::new());
    let target = rig.pieces(15, 1);
    rig.accept(4, Operation::GetId(target));
    assert_eq!(&rig.data[..16], b"a serial number\x07");
    let error = RequestError::UnknownType(77);
    for reply in [Some(rig.reply_to(5)), None] {
        let requests = rig.requests.as_mut().unwrap();
        let error = error.clone();
        requests.reject(5, rejected(error, reply));
    }
    let answers = [used(4, 1), used(5, 1), used(5, 0)];
    assert_eq!(rig.requests().to_put_back(), answers);
    assert_eq!(rig.status(5), Status::Unsupported as u8);
}

#[test]
fn there_is_room_for_as_many_as_the_ring_has_and_for_lists_that_are_bounded() {
    let mut rig = Rig::new(Vec::new());
    assert!(rig.requests().has_room(2));
    rig.write(1, 512);
    assert!(rig.requests().has_room(2) && !rig.requests().has_room(1));
    rig.write(2, 512);
    assert!(!rig.requests().has_room(2));
    rig.run_until(2);
    assert!(!rig.requests().has_room(2), "they are not put back");
    rig.requests().were_put_back(1);
    assert!(rig.requests().has_room(2));
    rig.requests().were_put_back(1);

    // In so many pieces that their list is what counts.
    const PIECES: usize = 1024;
    let data = rig.pieces(512 * PIECES, PIECES);
    let list = data.list_bytes();
    assert!(list >= 16 * PIECES);
    let fit = MAX_LIST_BYTES.div_ceil(list);
    for head in 0..fit as u16 {
        assert!(rig.requests().has_room(1024), "{head}");
        let data = rig.pieces(512 * PIECES, PIECES);
        let start = Sector(0);
        rig.accept(head, Operation::Engine(Command::Read { start, data }));
    }
    assert!(!rig.requests().has_room(1024));
    assert!(rig.requests().engine.has_room(), "it is the lists");
    rig.run_until(1);
    assert!(rig.requests().has_room(1024));
    rig.run_until(fit);
}

#[test]
fn what_was_taken_last_and_not_begun_is_given_back() {
    let mut rig = Rig::new(Vec::new());
    rig.requests().hold(true);
    for head in [5, 6, 7] {
        rig.write(head, 512);
    }
    rig.poll();
    assert_eq!(rig.drain(Parked::Fail, true), [7, 6, 5]);
    assert_eq!((rig.requests().used(), rig.requests().in_flight()), (0, 0));
    // They are taken again.
    rig.requests().hold(true);
    for head in [5, 6, 7] {
        rig.write(head, 512);
    }
    assert_eq!(rig.drain(Parked::Drop, true), [7, 6, 5]);
    let left = rig.left();
    assert!(left.unanswered.is_empty() && left.unfinished.is_empty());
    assert_eq!([5, 6, 7].map(|head| rig.status(head)), [UNTOUCHED; 3]);
}

#[test]
fn what_others_were_taken_after_cannot_be_given_back() {
    // By a request that is done, by a chain that is none, and by one that cannot be.
    let others: [fn(&mut Rig); 3] = [
        |rig| {
            let target = rig.pieces(15, 1);
            rig.accept(8, Operation::GetId(target));
        },
        |rig| {
            let error = RequestError::NoStatus;
            let reply = None;
            let requests = rig.requests.as_mut().unwrap();
            requests.reject(8, rejected(error, reply));
        },
        |rig| rig.requests().skip(),
    ];
    for (case, other) in others.into_iter().enumerate() {
        let mut rig = Rig::new(Vec::new());
        rig.requests().hold(true);
        rig.write(5, 512);
        rig.discard(6);
        other(&mut rig);
        rig.write(7, 512);
        assert_eq!(rig.drain(Parked::Fail, true), [7], "{case}");
        // A discard is no promise.
        let statuses = [5, 6, 7].map(|head| rig.status(head));
        assert_eq!(statuses, [IO_ERROR, OK, UNTOUCHED], "{case}");
        let mut heads = rig.heads();
        heads.retain(|head| *head != 8);
        assert_eq!(heads, [6, 5], "{case}");
        assert!(rig.left().unfinished.is_empty());
    }
}

#[test]
fn what_cannot_be_given_back_is_left_in_its_order_where_nobody_is_told() {
    let mut rig = Rig::new(Vec::new());
    rig.requests().hold(true);
    for head in [6, 5, 7] {
        rig.write(head, 512);
    }
    assert!(rig.drain(Parked::Drop, false).is_empty());
    assert_eq!([5, 6, 7].map(|head| rig.status(head)), [UNTOUCHED; 3]);
    let left = rig.left();
    assert!(left.unanswered.is_empty());
    assert_eq!(left.unfinished, [6, 5, 7]);
}

/// Its driver goes on with another host, or another process, and does not hear of an error.
#[test]
fn what_waits_for_a_lost_lock_is_left_whoever_stops_the_ring() {
    for parked in [Parked::Fail, Parked::FailSoon] {
        let mut rig = Rig::new(Vec::new());
        rig.device.engine().unwrap().lose_lock();
        rig.write(5, 512);
        rig.discard(6);
        let target = rig.pieces(15, 1);
        rig.accept(7, Operation::GetId(target));
        assert!(rig.drain(parked, true).is_empty());
        assert_eq!([5, 6].map(|head| rig.status(head)), [UNTOUCHED; 2]);
        assert_eq!(rig.heads(), [7]);
        assert_eq!(rig.left().unfinished, [5, 6]);
    }
}

/// What waits for space, or for the end of a suspension, ends so in a drain.
#[test]
fn what_waits_is_left_or_fails_as_it_is_wanted() {
    for (parked, is_left) in [(Parked::Drop, true), (Parked::Fail, false)] {
        for (error, waits) in [
            (EngineError::NoSpace, true),
            (EngineError::Stopped, true),
            (EngineError::Metadata(rustix::io::Errno::NOSPC), true),
            (EngineError::Metadata(rustix::io::Errno::IO), false),
            (EngineError::Io(rustix::io::Errno::IO), false),
        ] {
            let mut rig = Rig::new(Vec::new());
            rig.requests().hold(true);
            rig.write(5, 512);
            let requests = rig.requests.as_mut().unwrap();
            // As if the engine had said so, which in truth has not begun it.
            let mut undone = Vec::new();
            requests.engine.drain(&mut undone, Duration::ZERO);
            for Done { tag, .. } in undone {
                let result = Err(error);
                requests.done.push(Done { tag, result });
            }
            requests.settle(&mut rig.memory, parked);
            let is_left = is_left && waits;
            let status = if is_left { UNTOUCHED } else { IO_ERROR };
            assert_eq!(rig.status(5), status, "{parked:?} {error:?}");
            let left = rig.left();
            assert_eq!(left.unfinished, if is_left { vec![5] } else { vec![] });
            assert_eq!(left.unanswered.len(), usize::from(!is_left));
        }
    }
}

#[test]
fn what_limits_keep_back_and_others_were_taken_behind_is_done_in_a_drain() {
    for parked in [Parked::Fail, Parked::Drop] {
        let mut rig = Rig::new(Vec::new());
        rig.limit("bps_rd=1");
        rig.read_holes(0, 512);
        for head in 1..=5 {
            rig.read_holes(head, MANY_HOLES);
        }
        rig.go_past(6);
        rig.read_holes(7, MANY_HOLES);
        rig.read_holes(8, 512);
        rig.poll();
        assert_eq!(rig.heads(), [6, 0], "the others wait");
        assert_eq!(rig.drain(parked, true), [8, 7]);
        assert_eq!(rig.heads(), [6, 0, 1, 2, 3, 4, 5]);
        assert_eq!([1, 2, 3, 4, 5].map(|head| rig.status(head)), [OK; 5]);
        assert_eq!([7, 8].map(|head| rig.status(head)), [UNTOUCHED; 2]);
        assert_eq!((rig.requests().in_flight(), rig.requests().load()), (0, 0));
        assert!(rig.left().unfinished.is_empty());
    }
}

#[test]
fn what_cannot_be_given_back_is_done_although_limits_keep_it_back() {
    let mut rig = Rig::new(Vec::new());
    rig.limit("bps_rd=1");
    for head in 0..4 {
        rig.read_holes(head, MANY_HOLES);
    }
    assert!(rig.drain(Parked::Fail, false).is_empty());
    assert_eq!([0, 1, 2, 3].map(|head| rig.status(head)), [OK; 4]);
}

/// Limits keep five reads back, another request was taken behind them, and the time is over.
fn kept_back_out_of_time() -> Rig {
    let mut rig = Rig::with_stops(Vec::new(), Stops::since(stops::GRACE));
    rig.limit("bps_rd=1");
    rig.read_holes(0, 512);
    for head in 1..=5 {
        rig.read_holes(head, MANY_HOLES);
    }
    rig.go_past(6);
    rig
}

#[test]
fn what_limits_keep_back_is_left_when_the_time_is_over() {
    let mut rig = kept_back_out_of_time();
    assert!(rig.drain(Parked::Drop, true).is_empty());
    assert_eq!(rig.heads(), [6, 0]);
    assert_eq!([1, 2, 3, 4, 5].map(|head| rig.status(head)), [UNTOUCHED; 5]);
    assert_eq!(rig.left().unfinished, [1, 2, 3, 4, 5]);
}

/// The program has to end, and its guest may go on.
#[test]
fn what_limits_keep_back_fails_when_the_program_has_no_more_time() {
    for (parked, status) in [(Parked::Fail, OK), (Parked::FailSoon, IO_ERROR)] {
        let mut rig = kept_back_out_of_time();
        assert!(rig.drain(parked, true).is_empty());
        let statuses = [1, 2, 3, 4, 5].map(|head| rig.status(head));
        assert_eq!(statuses, [status; 5], "{parked:?}");
        assert!(rig.left().unfinished.is_empty());
    }
}

/// It could wait for the one who waits for this ring.
#[test]
fn nothing_is_waited_for_that_a_suspended_engine_does_not_begin() {
    let mut rig = Rig::new(Vec::new());
    rig.read_holes(0, MANY_HOLES);
    rig.limit("bps_rd=1");
    for head in 1..=2 {
        rig.read_holes(head, 512);
    }
    rig.go_past(3);
    rig.device.engine().unwrap().control(Control::Suspend);
    while !rig.requests().engine.is_suspended() {
        rig.turn_others();
    }
    let (given_back, looks) = rig.drain_with_others(Parked::Fail, 1);
    assert!(given_back.is_empty());
    assert!(looks < 10, "it has looked {looks} times");
    assert_eq!([0, 1, 2].map(|head| rig.status(head)), [IO_ERROR; 3]);
}

/// Whether there is room for more that limits keep back, or nothing more of that.
#[test]
fn who_waits_in_a_drain_for_what_is_under_way_sleeps() {
    const LOOKS: usize = 6;
    for waiting in [1, 4] {
        let mut rig = Rig::new(Vec::new());
        rig.zero(0);
        for _ in 0..10 {
            rig.poll();
        }
        assert!(rig.requests().engine.is_begun());
        rig.limit("iops_wr=1");
        rig.discard(1);
        for head in 2..2 + waiting {
            rig.zero(head);
        }
        rig.go_past(9);
        let start = Instant::now();
        // Nothing wakes it until then.
        let (given_back, looks) = rig.drain_with_others(Parked::Fail, LOOKS);
        assert!(given_back.is_empty());
        assert!(looks >= LOOKS);
        let slept = start.elapsed();
        assert!(slept >= Duration::from_millis(50), "{looks} in {slept:?}");
        let statuses: Vec<_> = (0..2 + waiting).map(|head| rig.status(head)).collect();
        assert!(statuses.iter().all(|status| *status == OK), "{statuses:?}");
    }
}

#[test]
fn limits_give_the_engine_no_more_than_it_has_room_for() {
    let mut rig = Rig::new(Vec::new());
    rig.limit("bps_rd=1");
    rig.read_holes(0, 512);
    for head in 1..=9 {
        rig.read_holes(head, MANY_HOLES);
    }
    rig.limit("");
    rig.poll();
    assert!(rig.requests().used() < 4, "{:?}", rig.heads());
    assert!(!rig.requests().engine.has_room());
    // It is woken by an end, and not again and again until there is one.
    assert_eq!(rig.requests().pause(), None);
    rig.go_past(10);
    // One more to be taken back.
    rig.read_holes(11, 512);
    assert_eq!(rig.drain(Parked::Fail, true), [11]);
    let statuses: Vec<_> = (0..10).map(|head| rig.status(head)).collect();
    assert_eq!(statuses, [OK; 10]);

    // What has room goes on by itself.
    rig.limit("bps_rd=1");
    for head in 0..6 {
        rig.read_holes(head, MANY_HOLES);
    }
    rig.limit("");
    rig.run_until(17);
}

#[test]
fn what_limits_keep_back_goes_on_without_them_when_they_are_lifted_for_good() {
    let mut rig = Rig::new(Vec::new());
    rig.limit("iops=1");
    for head in 0..3 {
        rig.read_holes(head, 512);
    }
    rig.poll();
    assert_eq!(rig.heads(), [0]);
    rig.requests().lift_limits();
    // Whoever sets others now does not mean a ring that stops.
    rig.limit("iops=1,iops_max=1");
    rig.read_holes(3, 512);
    rig.poll();
    assert_eq!(rig.heads(), [0, 1, 2, 3]);
}

#[test]
fn a_discard_is_an_operation_and_no_bytes() {
    let mut rig = Rig::new(Vec::new());
    rig.limit("bps_wr=1");
    for head in 0..3 {
        rig.discard(head);
    }
    rig.run_until(3);
    // A write does not wait for them.
    rig.write(3, 512);
    rig.run_until(4);
    rig.limit("iops_wr=1,iops_size=512");
    for head in 4..6 {
        rig.discard(head);
    }
    rig.run_until(5);
    for _ in 0..100 {
        rig.poll();
    }
    assert_eq!(rig.requests().used(), 5, "the other one waits");
    let pause = rig.requests().pause().unwrap();
    assert!(pause > Duration::ZERO);
    rig.drain(Parked::Fail, true);
}

#[test]
fn who_waits_for_an_end_gives_up_what_waits_for_space() {
    let mut rig = Rig::new(Vec::new());
    let full = 2 * CLUSTER / 4096;
    rig.disk
        .change_medium(|medium| medium.capacity = Some(full));
    rig.write(5, 1 << 20);
    for _ in 0..10_000 {
        rig.poll();
        rig.turn_others();
    }
    assert_eq!(rig.requests().used(), 0, "it waits for space");
    rig.requests().wait_for_an_end();
    rig.run_until(1);
    assert_eq!(rig.status(5), IO_ERROR);
}
