//! Jobs against a kernel that does what it may: it transfers less than asked, is
//! interrupted, refuses what this or that file system lacks; and against one
//! that fails.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::storage::Segments;
use crate::storage::host::file::SharedFile;
use crate::storage::host::{pieces, psync};

/// The real kernel, made difficult.
struct Kernel {
    rng: StdRng,
    /// What must hold of direct transfers.
    alignment: Alignment,
    /// Direct transfers fail with this.
    refuses_direct: Option<Errno>,
    /// The sync of a stable write fails with this, when the data is written.
    refuses_sync: Option<Errno>,
    /// `fallocate` fails with this.
    refuses_fallocate: Option<Errno>,
    /// Transfers that touch this byte fail with `EIO`.
    bad_byte: Option<u64>,
    /// Whether transfers are cut short and calls interrupted.
    difficult: bool,
    calls: usize,
    /// Of each write, whether it was to be direct, and stable.
    writes: Vec<(bool, bool)>,
}

impl Kernel {
    fn new(seed: u64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            alignment: BLOCK,
            refuses_direct: None,
            refuses_sync: None,
            refuses_fallocate: None,
            bad_byte: None,
            difficult: false,
            calls: 0,
            writes: Vec::new(),
        }
    }

    /// Does a step, or a part of it, or fails.
    fn call(&mut self, step: Step, file: &mut Description) -> i32 {
        self.calls += 1;
        if self.difficult && self.rng.random_ratio(1, 8) {
            let error = [Errno::INTR, Errno::AGAIN][self.rng.random_range(0..2)];
            return -error.raw_os_error();
        }
        let (offset, memory) = match step {
            Step::Read { offset, memory } | Step::Write { offset, memory, .. } => (offset, memory),
            Step::Fallocate { .. } => {
                return match self.refuses_fallocate {
                    Some(error) => -error.raw_os_error(),
                    None => psync::call(&step, file),
                };
            }
            _ => return psync::call(&step, file),
        };
        let is_stable = matches!(step, Step::Write { dsync: true, .. });
        if let Step::Write { .. } = step {
            self.writes.push((file.direct().is_some(), is_stable));
        }
        let mut list = list_of(memory);
        let len: usize = list.iter().map(Segment::len).sum();
        if self
            .bad_byte
            .is_some_and(|bad| (offset..offset + len as u64).contains(&bad))
        {
            return -Errno::IO.raw_os_error();
        }
        if let Some(alignment) = file.direct() {
            assert_eq!(alignment, self.alignment);
            assert!(alignment.fits(offset), "direct at {offset}");
            assert!(
                list.iter()
                    .all(|piece| alignment.fits_memory(piece.as_ptr() as usize, piece.len())),
                "direct with {list:?}"
            );
            if let Some(error) = self.refuses_direct {
                return -error.raw_os_error();
            }
        }
        if self.difficult && self.rng.random() {
            cut(&mut list, self.rng.random_range(1..=len));
        }
        let memory = memory_of_list(&list);
        let step = match step {
            Step::Write { dsync, .. } => Step::Write {
                offset,
                memory,
                dsync,
            },
            _ => Step::Read { offset, memory },
        };
        let result = psync::call(&step, file);
        match self.refuses_sync.filter(|_| is_stable && result > 0) {
            Some(error) => -error.raw_os_error(),
            None => result,
        }
    }

    fn run(&mut self, op: Op, file: &mut Description) -> (Result<(), Errno>, Op) {
        let mut job = Job::new(op);
        let mut pieces = pieces();
        let result = loop {
            let result = match job.step(file, &mut pieces) {
                Step::Nothing(result) => break result,
                step => self.call(step, file),
            };
            if let Verdict::Done(result) = job.ended(result, file) {
                break result;
            }
            assert!(self.calls < 100_000, "it never ends: {job:?}");
        };
        (result, job.into_op())
    }
}

/// Of a thread that has no other job.
fn pieces() -> pieces::Pieces {
    pieces::Pieces::new(Arc::default())
}

const BLOCK: Alignment = Alignment {
    memory: 4,
    offset: 512,
};

fn list_of(memory: Memory) -> Vec<Segment> {
    match memory {
        Memory::One { ptr, len } => vec![Segment::new(ptr, len as usize)],
        // SAFETY: the job says that there are `count` segments.
        Memory::Many { list, count } => unsafe {
            std::slice::from_raw_parts(list, count as usize).to_vec()
        },
    }
}

fn cut(list: &mut Vec<Segment>, mut len: usize) {
    list.retain_mut(|piece| {
        *piece = Segment::new(piece.as_ptr(), piece.len().min(len));
        len -= piece.len();
        !piece.is_empty()
    });
}

/// A file with random bytes, and the same bytes.
fn random_file(len: usize, rng: &mut StdRng) -> (File, Vec<u8>) {
    let file = tempfile::tempfile().expect("temporary file");
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes[..]);
    file.write_all_at(&bytes, 0).expect("write");
    (file, bytes)
}

/// A description that is taken to be direct, and a second look at the file.
fn pretended(file: File, direct: bool) -> (Description, File) {
    let look = file.try_clone().expect("dup");
    let shared = Arc::new(SharedFile::pretend_direct(file, BLOCK));
    let mut description = Description::share(&shared);
    if !direct {
        description.stop_direct(Errno::INVAL);
    }
    (description, look)
}

/// A client's memory, cut into pieces at random places.
struct Pieces {
    bytes: Vec<u8>,
    cuts: Vec<usize>,
}

impl Pieces {
    /// `step` is what pieces are multiples of, `skew` how far the first one is
    /// from an aligned address.
    fn new(len: usize, step: usize, skew: usize, rng: &mut StdRng) -> Self {
        let mut cuts: Vec<usize> = (0..rng.random_range(0..5))
            .map(|_| rng.random_range(0..=len / step) * step)
            .collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        let mut bytes = vec![0; len + skew + 4096];
        let start = bytes.as_ptr().align_offset(4096) + skew;
        rng.fill(&mut bytes[..]);
        for cut in &mut cuts {
            *cut += start;
        }
        Self { bytes, cuts }
    }

    fn data(&mut self) -> &mut [u8] {
        let (first, last) = (self.cuts[0], self.cuts[self.cuts.len() - 1]);
        &mut self.bytes[first..last]
    }

    fn buffer(&mut self) -> Buffer {
        let mut segments = Segments::new();
        let base = self.bytes.as_mut_ptr();
        for pair in self.cuts.windows(2) {
            let at = base.wrapping_add(pair[0]);
            // SAFETY: the memory lives until the end of the test's operation.
            unsafe { segments.push(at, pair[1] - pair[0]) };
        }
        Buffer::Client(segments)
    }
}

#[derive(Clone, Debug)]
enum Kind {
    Read,
    Write,
    Punch,
    Zero,
    Allocate,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        3 => Just(Kind::Read),
        3 => Just(Kind::Write),
        1 => Just(Kind::Punch),
        2 => Just(Kind::Zero),
        1 => Just(Kind::Allocate),
    ]
}

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    file_len: usize,
    direct: bool,
    refuses_direct: bool,
    refuses_fallocate: bool,
    ops: Vec<(Kind, usize, usize, usize)>,
}

fn case() -> impl Strategy<Value = Case> {
    let op = (kind(), 0..20_000_usize, 0..20_000_usize, 0..9_usize);
    (
        any::<u64>(),
        0..30_000_usize,
        any::<bool>(),
        prop::bool::weighted(0.2),
        any::<bool>(),
        prop::collection::vec(op, 1..12),
    )
        .prop_map(
            |(seed, file_len, direct, refuses_direct, refuses_fallocate, ops)| Case {
                seed,
                file_len,
                direct,
                refuses_direct,
                refuses_fallocate,
                ops,
            },
        )
}

/// What a file of plain bytes would be after the operation.
fn apply(model: &mut Vec<u8>, kind: &Kind, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    match kind {
        Kind::Read => {}
        _ if data.is_empty() => {}
        Kind::Write => {
            if model.len() < end {
                model.resize(end, 0);
            }
            model[offset..end].copy_from_slice(data);
        }
        Kind::Punch | Kind::Zero => {
            let (from, to) = (offset.min(model.len()), end.min(model.len()));
            model[from..to].fill(0);
        }
        Kind::Allocate => {
            if model.len() < end {
                model.resize(end, 0);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn whatever_the_kernel_does_the_bytes_are_right(case in case()) {
        let mut kernel = Kernel::new(case.seed);
        kernel.difficult = true;
        kernel.refuses_direct = case.refuses_direct.then_some(Errno::INVAL);
        kernel.refuses_fallocate = case.refuses_fallocate.then_some(Errno::OPNOTSUPP);
        let mut rng = StdRng::seed_from_u64(case.seed ^ 1);
        // Files of whole blocks only: the last block cannot be written in part.
        let file_len = if case.direct { case.file_len & !511 } else { case.file_len };
        let (file, mut model) = random_file(file_len, &mut rng);
        let (mut description, mut look) = pretended(file, case.direct);
        for (kind, offset, len, skew) in case.ops {
            let (offset, len) = match kind {
                Kind::Write | Kind::Allocate if description.direct().is_some() => (offset & !511, len & !511),
                _ => (offset, len),
            };
            let step = [1, 4, 512][rng.random_range(0..3)];
            let mut memory = Pieces::new(len, step, skew, &mut rng);
            let data = memory.data().to_vec();
            let id = FileId(0);
            let op = match kind {
                Kind::Read => Op::Read { file: id, offset: offset as u64, buffer: memory.buffer() },
                Kind::Write => Op::Write {
                    file: id, offset: offset as u64, buffer: memory.buffer(), dsync: false,
                },
                Kind::Punch | Kind::Zero => Op::Zero {
                    file: id, offset: offset as u64, len: len as u64,
                    mode: if matches!(kind, Kind::Punch) { ZeroMode::Punch } else { ZeroMode::KeepAllocated },
                },
                Kind::Allocate => Op::Allocate { file: id, offset: offset as u64, len: len as u64 },
            };
            let (result, op) = kernel.run(op, &mut description);
            prop_assert_eq!(result, Ok(()));
            prop_assert_eq!(op.file(), id);
            if matches!(kind, Kind::Read) {
                let mut expected = vec![0; len];
                let from = offset.min(model.len());
                let to = (offset + len).min(model.len());
                expected[..to - from].copy_from_slice(&model[from..to]);
                prop_assert!(memory.data() == expected, "{kind:?} {offset} {len}");
            }
            apply(&mut model, &kind, offset, &data);
            let mut content = Vec::new();
            std::io::Seek::rewind(&mut look).expect("seek");
            look.read_to_end(&mut content).expect("read");
            prop_assert_eq!(content.len(), model.len());
            prop_assert!(content == model, "{kind:?} {offset} {len}");
        }
    }
}

fn read_op(offset: u64, len: usize) -> Op {
    Op::Read {
        file: FileId(0),
        offset,
        buffer: Buffer::zeroed(len),
    }
}

fn write_op(offset: u64, len: usize) -> Op {
    Op::Write {
        file: FileId(0),
        offset,
        buffer: Buffer::zeroed(len),
        dsync: false,
    }
}

fn eight_blocks() -> (Description, File) {
    let (file, _) = random_file(4096, &mut StdRng::seed_from_u64(1));
    pretended(file, true)
}

#[test]
fn an_io_error_is_not_taken_for_trouble_with_direct_io() {
    let (mut description, _look) = eight_blocks();
    let mut kernel = Kernel::new(1);
    kernel.bad_byte = Some(1024);
    let (result, _) = kernel.run(read_op(0, 4096), &mut description);
    assert_eq!(result, Err(Errno::IO));
    let (result, _) = kernel.run(write_op(512, 1024), &mut description);
    assert_eq!(result, Err(Errno::IO));
    assert_eq!(kernel.calls, 2);
    assert_eq!(description.direct(), Some(BLOCK));
    let (result, _) = kernel.run(read_op(2048, 2048), &mut description);
    assert_eq!(result, Ok(()));
}

#[test]
fn each_refusal_of_direct_io_ends_it_once() {
    for error in [Errno::INVAL, Errno::NOTBLK, Errno::OPNOTSUPP] {
        let (mut description, _look) = eight_blocks();
        let mut kernel = Kernel::new(1);
        kernel.refuses_direct = Some(error);
        let (result, _) = kernel.run(write_op(0, 4096), &mut description);
        assert_eq!(result, Ok(()));
        assert_eq!(kernel.calls, 2, "the write is submitted again");
        assert_eq!(description.direct(), None);
        assert_eq!(description.shared().alignment().offset, 1);
        // Without direct I/O the error is one like any other.
        kernel.calls = 0;
        let mut job = Job::new(read_op(0, 512));
        assert!(matches!(
            job.step(&mut description, &mut pieces()),
            Step::Read { .. }
        ));
        assert_eq!(
            job.ended(-error.raw_os_error(), &mut description),
            Verdict::Done(Err(error))
        );
    }
}

const REFUSALS: [Errno; 3] = [Errno::INVAL, Errno::NOTBLK, Errno::OPNOTSUPP];

fn stable_write_op(offset: u64, len: usize) -> Op {
    Op::Write {
        file: FileId(0),
        offset,
        buffer: Buffer::zeroed(len),
        dsync: true,
    }
}

/// Else nobody would hear of what it may have lost of others.
#[test]
fn a_sync_that_fails_like_direct_io_is_not_taken_for_it() {
    for error in REFUSALS {
        for len in [512, 4096] {
            let (mut description, _look) = eight_blocks();
            let mut kernel = Kernel::new(1);
            kernel.refuses_sync = Some(error);
            let (result, _) = kernel.run(stable_write_op(0, len), &mut description);
            assert_eq!(result, Err(error));
            assert_eq!(kernel.writes, [(true, true), (true, false)]);
            assert_eq!(description.direct(), Some(BLOCK));
        }
    }
}

#[test]
fn a_stable_write_whose_direct_data_is_refused_is_made_through_the_cache() {
    for error in REFUSALS {
        let (mut description, _look) = eight_blocks();
        let mut kernel = Kernel::new(1);
        kernel.refuses_direct = Some(error);
        let (result, _) = kernel.run(stable_write_op(0, 4096), &mut description);
        assert_eq!(result, Ok(()));
        assert_eq!(kernel.writes, [(true, true), (true, false), (false, true)]);
        assert_eq!(description.direct(), None);
        // There its sync is heard of like any other.
        kernel.refuses_sync = Some(error);
        let (result, _) = kernel.run(stable_write_op(0, 4096), &mut description);
        assert_eq!(result, Err(error));
    }
}

/// The next step of a stable write is a write, and stable if `is_stable`.
fn expect_write(job: &mut Job, file: &mut Description, is_stable: bool) {
    let step = job.step(file, &mut pieces());
    assert!(
        matches!(step, Step::Write { dsync, .. } if dsync == is_stable),
        "{step:?}"
    );
}

/// Whoever asked compares it with how the write ends without a sync.
#[test]
fn what_a_stable_write_failed_with_first_is_said_if_it_fails_differently_then() {
    let (mut description, _look) = eight_blocks();
    let mut job = Job::new(stable_write_op(0, 4096));
    expect_write(&mut job, &mut description, true);
    let refused = -Errno::OPNOTSUPP.raw_os_error();
    assert_eq!(job.ended(refused, &mut description), Verdict::Again);
    expect_write(&mut job, &mut description, false);
    let interrupted = -Errno::INTR.raw_os_error();
    assert_eq!(job.ended(interrupted, &mut description), Verdict::Again);
    expect_write(&mut job, &mut description, false);
    assert_eq!(
        job.ended(-Errno::NOSPC.raw_os_error(), &mut description),
        Verdict::Done(Err(Errno::OPNOTSUPP))
    );
    assert_eq!(description.direct(), Some(BLOCK));
}

#[test]
fn a_stable_write_is_no_sync_that_failed_if_another_thread_is_refused_direct_io_meanwhile() {
    for is_under_way in [false, true] {
        for end in [4096, -Errno::NOSPC.raw_os_error()] {
            let (file, _) = random_file(4096, &mut StdRng::seed_from_u64(1));
            let shared = Arc::new(SharedFile::pretend_direct(file, BLOCK));
            let mut here = Description::share(&shared);
            let mut there = Description::share(&shared);
            let mut job = Job::new(stable_write_op(0, 4096));
            expect_write(&mut job, &mut here, true);
            let refused = -Errno::INVAL.raw_os_error();
            assert_eq!(job.ended(refused, &mut here), Verdict::Again);
            if is_under_way {
                expect_write(&mut job, &mut here, false);
            }
            there.stop_direct(Errno::INVAL);
            if is_under_way && end > 0 {
                // Whether that was direct nobody knows.
                assert_eq!(job.ended(end, &mut here), Verdict::Again);
            }
            if !is_under_way || end > 0 {
                expect_write(&mut job, &mut here, true);
            }
            let expected = match end > 0 {
                true => Ok(()),
                false => Err(Errno::NOSPC),
            };
            assert_eq!(job.ended(end, &mut here), Verdict::Done(expected));
        }
    }
}

#[test]
fn a_thread_learns_of_the_end_of_direct_io_from_another() {
    let (file, _) = random_file(4096, &mut StdRng::seed_from_u64(1));
    let shared = Arc::new(SharedFile::pretend_direct(file, BLOCK));
    let mut here = Description::share(&shared);
    let mut there = Description::share(&shared);
    here.stop_direct(Errno::INVAL);
    assert_eq!(there.direct(), None);
}

/// First by the one that was given up, then by the one at present, each once.
#[test]
fn a_sync_is_made_by_both_descriptions_whenever_direct_io_is_given_up() {
    for given_up_at in 0..4 {
        for make in [Description::share, Description::open] {
            let (file, _) = random_file(4096, &mut StdRng::seed_from_u64(1));
            let shared = Arc::new(SharedFile::pretend_direct(file, BLOCK));
            let mut description = make(&shared);
            let before = description.as_fd().as_raw_fd();
            let give_up_at = |moment, description: &mut Description| {
                if moment == given_up_at {
                    description.stop_direct(Errno::INVAL);
                }
            };
            let mut job = Job::new(Op::Sync { file: FileId(0) });
            let mut synced = Vec::new();
            give_up_at(0, &mut description);
            loop {
                let Step::Sync { fd, .. } = job.step(&mut description, &mut pieces()) else {
                    panic!("it is a sync");
                };
                synced.push(fd);
                give_up_at(synced.len(), &mut description);
                let interrupted = -Errno::INTR.raw_os_error();
                if synced.len() == 1 {
                    assert_eq!(job.ended(interrupted, &mut description), Verdict::Again);
                    let again = job.step(&mut description, &mut pieces());
                    assert!(matches!(again, Step::Sync { fd: same, .. } if same == fd));
                }
                match job.ended(0, &mut description) {
                    Verdict::Again => {}
                    end => break assert_eq!(end, Verdict::Done(Ok(()))),
                }
            }
            let present = description.as_fd().as_raw_fd();
            // Given up after the end, or never: it is no matter of this sync.
            match given_up_at {
                0 | 1 => assert_eq!(synced, [before, present], "{given_up_at}"),
                _ => assert_eq!(synced, [before], "{given_up_at}"),
            }
        }
    }
}

#[test]
fn a_direct_write_that_is_not_whole_blocks_is_refused_before_the_kernel() {
    for (offset, len) in [(1, 512), (512, 511), (256, 256)] {
        let (mut description, _look) = eight_blocks();
        let mut kernel = Kernel::new(1);
        let (result, _) = kernel.run(write_op(offset, len), &mut description);
        assert_eq!(result, Err(Errno::INVAL));
        assert_eq!(kernel.calls, 0);
        assert_eq!(description.direct(), Some(BLOCK));
    }
}

#[test]
fn nothing_written_is_an_error_and_not_a_loop() {
    let (mut description, _look) = eight_blocks();
    let mut job = Job::new(write_op(0, 1024));
    assert!(matches!(
        job.step(&mut description, &mut pieces()),
        Step::Write { .. }
    ));
    assert_eq!(job.ended(512, &mut description), Verdict::Again);
    match job.step(&mut description, &mut pieces()) {
        Step::Write {
            offset: 512,
            memory: Memory::One { len: 512, .. },
            ..
        } => {}
        step => panic!("{step:?}"),
    }
    assert_eq!(
        job.ended(0, &mut description),
        Verdict::Done(Err(Errno::IO))
    );
}

#[test]
fn a_write_that_stops_for_want_of_space_fails_with_that() {
    let (mut description, _look) = eight_blocks();
    let mut job = Job::new(write_op(0, 1024));
    job.step(&mut description, &mut pieces());
    assert_eq!(job.ended(512, &mut description), Verdict::Again);
    job.step(&mut description, &mut pieces());
    assert_eq!(
        job.ended(-Errno::NOSPC.raw_os_error(), &mut description),
        Verdict::Done(Err(Errno::NOSPC))
    );
}

#[test]
fn progress_that_is_no_whole_block_does_not_go_on_for_ever() {
    for op in [read_op(0, 1024), write_op(0, 1024)] {
        let (mut description, _look) = eight_blocks();
        let mut job = Job::new(op);
        let mut tries = 0;
        let verdict = loop {
            job.step(&mut description, &mut pieces());
            match job.ended(100, &mut description) {
                Verdict::Again => tries += 1,
                done => break done,
            }
            assert!(tries < 1000);
        };
        assert_eq!(verdict, Verdict::Done(Err(Errno::IO)));
    }
}

#[test]
fn a_transfer_that_gets_on_by_little_each_time_ends_well() {
    const LEN: usize = 2 * PATIENCE as usize;
    for op in [read_op(0, LEN), write_op(0, LEN)] {
        let (mut description, _look) = eight_blocks();
        description.stop_direct(Errno::INVAL);
        let mut job = Job::new(op);
        for byte in 1..=LEN {
            job.step(&mut description, &mut pieces());
            let expected = match byte {
                LEN => Verdict::Done(Ok(())),
                _ => Verdict::Again,
            };
            assert_eq!(job.ended(1, &mut description), expected, "byte {byte}");
        }
    }
}

#[test]
fn zeros_that_cannot_be_written_either_are_not_begun_anew() {
    for error in [Errno::OPNOTSUPP, Errno::NOSYS] {
        let (mut description, _look) = eight_blocks();
        description.stop_direct(Errno::INVAL);
        let mut job = Job::new(Op::Zero {
            file: FileId(0),
            offset: 512,
            len: 1024,
            mode: ZeroMode::KeepAllocated,
        });
        let mut pieces = pieces();
        let asked = job.step(&mut description, &mut pieces);
        assert!(matches!(asked, Step::Fallocate { .. }), "{asked:?}");
        let refused = -error.raw_os_error();
        assert_eq!(job.ended(refused, &mut description), Verdict::Again);
        let written = job.step(&mut description, &mut pieces);
        assert!(matches!(written, Step::Write { .. }), "{written:?}");
        assert_eq!(
            job.ended(refused, &mut description),
            Verdict::Done(Err(error))
        );
    }
}

#[test]
fn a_step_that_always_would_block_ends() {
    let (mut description, _look) = eight_blocks();
    let mut job = Job::new(read_op(0, 1024));
    job.step(&mut description, &mut pieces());
    assert!(!job.may_block());
    let again = -Errno::AGAIN.raw_os_error();
    assert_eq!(job.ended(again, &mut description), Verdict::Again);
    assert!(job.may_block());
    let tries = (0..1000)
        .take_while(|_| job.ended(again, &mut description) == Verdict::Again)
        .count();
    assert!(tries < 1000);
}

#[test]
fn a_range_that_no_file_has_is_refused() {
    let (mut description, _look) = eight_blocks();
    let mut kernel = Kernel::new(1);
    for offset in [u64::MAX, i64::MAX as u64, i64::MAX as u64 - 511] {
        for op in [
            read_op(offset, 512),
            write_op(offset, 512),
            Op::Zero {
                file: FileId(0),
                offset,
                len: 512,
                mode: ZeroMode::Punch,
            },
            Op::Allocate {
                file: FileId(0),
                offset,
                len: 512,
            },
        ] {
            let (result, _) = kernel.run(op, &mut description);
            assert_eq!(result, Err(Errno::INVAL));
        }
    }
    assert_eq!(kernel.calls, 0);
}

#[test]
fn where_no_hole_can_be_made_zeros_take_no_space() {
    const LEN: u64 = 1 << 20;
    for direct in [false, true] {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(LEN).expect("set_len");
        // Two neighbours, one that begins in the midst of a block, and the last.
        for (offset, len) in [(64 << 10, 8192), (512 << 10, 512), (LEN - 4096, 4096)] {
            file.write_all_at(&vec![1; len], offset).expect("write");
        }
        let (mut description, look) = pretended(file, direct);
        let space = || {
            look.sync_all().expect("sync");
            std::os::unix::fs::MetadataExt::blocks(&look.metadata().expect("stat"))
        };
        let before = space();
        let mut kernel = Kernel::new(1);
        kernel.refuses_fallocate = Some(Errno::OPNOTSUPP);
        let punch = |offset, len| Op::Zero {
            file: FileId(0),
            offset,
            len,
            mode: ZeroMode::Punch,
        };
        let (offset, end) = (100, LEN - 100);
        assert_eq!(
            kernel.run(punch(offset, end - offset), &mut description).0,
            Ok(())
        );
        assert_eq!(space(), before);
        let places = kernel.writes.len();
        assert!((3..=5).contains(&places), "{places} writes");
        let mut content = vec![0; LEN as usize];
        look.read_exact_at(&mut content, 0).expect("read");
        let data: Vec<usize> = (0..LEN as usize).filter(|at| content[*at] != 0).collect();
        assert_eq!(data, Vec::from_iter(end as usize..LEN as usize));
    }
}

#[test]
fn what_the_file_system_lacks_is_asked_for_once() {
    let (mut description, look) = eight_blocks();
    let mut kernel = Kernel::new(1);
    kernel.refuses_fallocate = Some(Errno::OPNOTSUPP);
    let zero = || Op::Zero {
        file: FileId(0),
        offset: 512,
        len: 1024,
        mode: ZeroMode::KeepAllocated,
    };
    assert_eq!(kernel.run(zero(), &mut description).0, Ok(()));
    assert_eq!(kernel.calls, 2, "asked, then written");
    assert_eq!(kernel.run(zero(), &mut description).0, Ok(()));
    assert_eq!(kernel.calls, 3, "written");
    let allocate = || Op::Allocate {
        file: FileId(0),
        offset: 4096,
        len: 4096,
    };
    assert_eq!(kernel.run(allocate(), &mut description).0, Ok(()));
    assert_eq!(look.metadata().expect("stat").len(), 8192);
    assert_eq!(kernel.calls, 4, "asked, then made longer");
    look.set_len(20_000).expect("set_len");
    assert_eq!(kernel.run(allocate(), &mut description).0, Ok(()));
    assert_eq!(kernel.calls, 4);
    assert_eq!(
        look.metadata().expect("stat").len(),
        20_000,
        "never shorter"
    );
}

#[test]
fn more_segments_than_the_kernel_takes() {
    let (mut description, look) = eight_blocks();
    // With gaps: neighbours would be one segment.
    let mut memory: Vec<u8> = (0..10_000).map(|n| (n % 251) as u8).collect();
    let expected: Vec<u8> = memory.iter().copied().step_by(2).collect();
    let mut segments = Segments::new();
    for byte in memory.iter_mut().step_by(2) {
        // SAFETY: the memory lives until the end of the test.
        unsafe { segments.push(byte, 1) };
    }
    description.stop_direct(Errno::INVAL);
    let op = Op::Write {
        file: FileId(0),
        offset: 7,
        buffer: Buffer::Client(segments),
        dsync: true,
    };
    let mut kernel = Kernel::new(1);
    assert_eq!(kernel.run(op, &mut description).0, Ok(()));
    assert_eq!(kernel.calls, 5);
    let mut written = vec![0; 5000];
    look.read_exact_at(&mut written, 7).expect("read");
    assert_eq!(written, expected);
}
