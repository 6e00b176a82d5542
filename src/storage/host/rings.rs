//! How rings of io_uring are made, and by whom.
//!
//! What a ring does, the kernel does without asking the filters of system calls that
//! a process may have. So each ring is [restricted](restrict) to what is used here. But
//! a filter does not see whether a ring that is made will be: so [`start_maker`] has all
//! of them made by one thread, which does nothing else, and no other needs the right to.
//!
//! Knows what rings are used for. Must not know what they are asked to do.

use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue};

use crate::threads::{self, Role};

/// The operations that a ring is used for.
const OPERATIONS: [u8; 8] = [
    opcode::Nop::CODE,
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fallocate::CODE,
    opcode::Fsync::CODE,
    opcode::PollAdd::CODE,
];

/// `IORING_REGISTER_FILES_UPDATE` of io_uring_register(2), which the crate keeps to
/// itself: the only registration after the start.
const REGISTER_FILES_UPDATE: u8 = 6;

/// What a kernel can give a ring, by how new it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Generation {
    /// The beginnings.
    Plain,
    /// Linux 5.10: it does only what was agreed on before it was enabled.
    Restricted,
    /// Linux 5.19: completions do not interrupt the thread.
    Cooperative,
}

impl Generation {
    /// Newest first.
    pub(super) const ALL: [Self; 3] = [Self::Cooperative, Self::Restricted, Self::Plain];

    fn build(self, entries: u32) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.setup_clamp();
        if self == Self::Cooperative {
            builder
                .setup_submit_all()
                .setup_coop_taskrun()
                .setup_taskrun_flag();
        }
        if self.starts_disabled() {
            builder.setup_r_disabled();
        }
        builder.build(entries)
    }

    /// Whether a ring does nothing until [`restrict`].
    fn starts_disabled(self) -> bool {
        self != Self::Plain
    }
}

/// What is to be made.
struct Order {
    what: Wanted,
    /// Of the newest of these that the kernel can make.
    generations: &'static [Generation],
    /// Where it is waited for.
    reply: SyncSender<io::Result<IoUring>>,
}

enum Wanted {
    /// A ring of so many entries that knows these files.
    Ring { entries: u32, files: Vec<RawFd> },
    /// One that is of no use but to ask the kernel what it can do.
    Trial,
}

impl Wanted {
    fn make(self, generations: &[Generation]) -> io::Result<IoUring> {
        match self {
            Self::Ring { entries, files } => {
                let (ring, generation) = build(entries, generations)?;
                ring.submitter().register_files(&files)?;
                if generation.starts_disabled() {
                    restrict(&ring)?;
                }
                Ok(ring)
            }
            Self::Trial => {
                let (ring, _) = build(1, generations)?;
                let mut probe = Probe::new();
                ring.submitter().register_probe(&mut probe)?;
                let knows_all = OPERATIONS.iter().all(|&code| probe.is_supported(code));
                match knows_all {
                    true => Ok(ring),
                    false => Err(io::ErrorKind::Unsupported.into()),
                }
            }
        }
    }
}

/// The thread that makes them, where there is one.
static MAKER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();

/// From now on one thread makes all rings of the process, which need the right to make them
/// in no other.
///
/// # Errors
/// When there can be no more threads.
pub fn start_maker() -> io::Result<()> {
    if MAKER.get().is_some() {
        return Ok(());
    }
    let (orders, inbox) = channel();
    threads::start(Role::Rings, "rings", move || make_all(&inbox))?;
    let _ = MAKER.set(Mutex::new(orders));
    Ok(())
}

fn make_all(inbox: &Receiver<Order>) {
    for order in inbox {
        // Who has asked waits for it.
        let _ = order.reply.send(order.what.make(order.generations));
    }
}

fn have_made(what: Wanted, generations: &'static [Generation]) -> io::Result<IoUring> {
    let Some(maker) = MAKER.get() else {
        return what.make(generations);
    };
    let (reply, made) = sync_channel(1);
    let order = Order {
        what,
        generations,
        reply,
    };
    let orders = maker.lock().unwrap_or_else(PoisonError::into_inner);
    let ordered = orders.send(order);
    drop(orders);
    // It is there as long as the process.
    ordered.map_err(io::Error::other)?;
    made.recv().map_err(io::Error::other)?
}

/// Whether this kernel has an io_uring that can be used here.
pub(super) fn try_out() -> io::Result<()> {
    have_made(Wanted::Trial, &Generation::ALL).map(drop)
}

/// A ring that knows these files (-1 is none), and does what it is used for here. It is of the
/// newest of `generations` that the kernel can make.
pub(super) fn make(
    entries: u32,
    files: Vec<RawFd>,
    generations: &'static [Generation],
) -> io::Result<IoUring> {
    have_made(Wanted::Ring { entries, files }, generations)
}

/// A ring of the newest of these generations that the kernel can make.
fn build(entries: u32, generations: &[Generation]) -> io::Result<(IoUring, Generation)> {
    let mut refused = io::ErrorKind::Unsupported.into();
    for &generation in generations {
        match generation.build(entries) {
            // Without this, completions could be lost.
            Ok(ring) if !ring.params().is_feature_nodrop() => break,
            Ok(ring) => return Ok((ring, generation)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
            Err(error) => return Err(error),
        }
    }
    Err(refused)
}

/// From now on the ring does what it is used for here, and nothing else: whoever takes
/// this process over cannot open files or sockets by way of it. Files need not be
/// registered ones, since a poll waits for an eventfd that comes and goes, and a sync names
/// its description.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let used = squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC;
    let mut allowed: Vec<_> = OPERATIONS.map(Restriction::sqe_op).into();
    allowed.push(Restriction::register_op(REGISTER_FILES_UPDATE));
    allowed.push(Restriction::sqe_flags_allowed(used.bits()));
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}
